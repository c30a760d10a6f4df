"""All that ``validation memory`` measures on a device, in order."""

from __future__ import annotations

import torch

from validation.claims.generated import generate_tasks
from validation.claims.memory import layer_tasks
from validation.claims.peak import peak_tasks
from validation.claims.subjects import grid_for
from validation.claims.tasks import Task


def memory_tasks(device: str, quick: bool, models: tuple[str, ...]) -> list[Task]:
    """Layers alone, single layers' peaks, ``generate()``."""
    place = torch.device(device)
    grid = grid_for(place.type, quick=quick, models=models)
    return [*layer_tasks(grid, place), *peak_tasks(grid, place), *generate_tasks(grid, place)]
