"""A shape with random weights, each rank's own part of them made on its device: no checkpoint, no whole model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from kvsim.models.load import load_config
from validation.ranks.group import Group

SPREAD = 0.02
SEED = 0


def config_of(name: str, num_layers: int | None, positions: int) -> Any:
    """transformers' config of a catalogue name or a config.json; with ``num_layers``, of so many of its layers."""
    config = load_config(name)[1]
    config = dict(config.get("text_config", config))
    config["max_position_embeddings"] = max(positions, config.get("max_position_embeddings", 0))
    if num_layers is not None:
        config["num_hidden_layers"] = num_layers
    return AutoConfig.for_model(**config)


def split_model(config: Any, group: Group, dtype: torch.dtype) -> Any:
    """transformers' model, split by its own tensor-parallel plan as ``from_pretrained`` splits it.

    Replicated weights are the same on every rank, norms are 1, split ones each rank's own.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    kind = type(model)
    split, _, mesh = kind.prepare_distribute_model(DistributedConfig(tp_size=group.ranks))
    model = kind.maybe_distribute_model(model, split, mesh)
    model.to_empty(device=group.device)
    generator = torch.Generator(group.device)
    with torch.no_grad():
        for index, (name, weight) in enumerate(model.named_parameters()):
            own = weight.to_local() if hasattr(weight, "to_local") else weight
            generator.manual_seed(SEED + (1 + group.rank) * 100_003 * (own is not weight) + index)
            own.fill_(1) if "norm" in name else own.normal_(0, SPREAD, generator=generator)
    for module in list(model.modules()):  # buffers that are no weights: made again, where they lie
        for name, child in module.named_children():
            if hasattr(child, "inv_freq"):
                setattr(module, name, type(child)(child.config).to(group.device))
    return model.eval()
