"""Without a CUDA device the Triton kernels run in Triton's interpreter; it must be chosen before they are imported.

At every call of a device function that interpreter looks through ``triton.language`` for what it replaces.  The names
are remembered here, which saves a fifth of its time.  Hypothesis measures no time: a slow, loaded machine finds what a
fast one finds.
"""

import inspect
import os

import pytest


def remember_builtins() -> None:
    """``_patch_builtin`` of Triton 3.6 to 3.9 without ``inspect.getmembers`` at every call: the first look at a module,
    before anything in it is replaced, finds all."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    names: dict[object, list[str]] = {}

    def patch_builtin(module: object, *builder_and_scope: object) -> None:
        if module not in names:
            names[module] = [name for name, member in inspect.getmembers(module) if is_builtin(member)]
        for name in names[module]:
            if is_builtin(member := getattr(module, name)):
                interpreter._patch_attr(module, name, member, *builder_and_scope)

    assert callable(interpreter._patch_builtin)
    interpreter._patch_builtin = patch_builtin


os.environ.pop("COLUMNS", None)  # tables are as wide as they are, whatever the terminal that runs the tests

try:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        remember_builtins()
except ImportError:
    pass

try:
    from hypothesis import HealthCheck, settings

    settings.register_profile("kvsim", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("kvsim")
except ImportError:
    pass


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes comes first, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
