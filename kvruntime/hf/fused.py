"""Launches saved in a captured step: one for a norm, a rotary embedding or a gate where PyTorch needs two to ten.

A module or function is replaced only where its code is, statement for statement, one that is known here, and only while
a step runs that a graph will hold.  Sums are taken in another order, all else is rounded as the model does it.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers.activations import SiLUActivation

SILU = torch.nn.SiLU, SiLUActivation

LLAMA_NORM = """
input_dtype = hidden_states.dtype
hidden_states = hidden_states.to(torch.float32)
variance = hidden_states.pow(2).mean(-1, keepdim=True)
hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
return self.weight * hidden_states.to(input_dtype)
"""
GEMMA_NORM = """
output = self._norm(x.float())
output = output * (1.0 + self.weight.float())
return output.type_as(x)
"""
GEMMA_INNER = "return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)"
GATED = """
down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
return down_proj
"""
ROTARY = """
cos = cos.unsqueeze(unsqueeze_dim)
sin = sin.unsqueeze(unsqueeze_dim)
q_embed = q * cos + rotate_half(q) * sin
k_embed = k * cos + rotate_half(k) * sin
return (q_embed, k_embed)
"""
ROTATE_HALF = """
x1 = x[..., :x.shape[-1] // 2]
x2 = x[..., x.shape[-1] // 2:]
return torch.cat((-x2, x1), dim=-1)
"""


@cache
def statements(function: Callable[..., Any]) -> str:
    """The body of ``function`` without its docstring and the layout of its code; empty where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ""
    body = getattr(tree.body[0], "body", [])
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    return "\n".join(map(ast.unparse, body))


@contextmanager
def fused(model: torch.nn.Module) -> Iterator[None]:
    """While it lasts, what is known of ``model`` runs fused."""
    undo: list[Callable[[], None]] = []
    try:
        for module in model.modules():
            if (run := _norm(module) or _gated(module)) is not None:
                module.forward = run
                undo.append(partial(delattr, module, "forward"))
        for file in {sys.modules.get(type(module).__module__) for module in model.modules()}:
            if (function := _rotary(file)) is not None:
                setattr(file, "apply_rotary_pos_emb", partial(_rotate, function))  # noqa: B010
                undo.append(partial(setattr, file, "apply_rotary_pos_emb", function))
        yield
    finally:
        for one in undo:
            one()


def _norm(module: torch.nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The fused ``forward`` of a norm that is known; None for every other module."""
    kind = type(module)
    weight = getattr(module, "weight", None)
    if "forward" in module.__dict__ or not isinstance(weight, Tensor) or weight.ndim != 1 or not weight.is_cuda:
        return None
    body = statements(kind.forward)
    if body == LLAMA_NORM.strip():
        return partial(_rms_norm, module, "variance_epsilon", False)
    if body == GEMMA_NORM.strip() and statements(getattr(kind, "_norm", None)) == GEMMA_INNER:
        return partial(_rms_norm, module, "eps", True)
    return None


def _rms_norm(module: Any, eps: str, from_one: bool, x: Tensor) -> Tensor:
    if x.dtype != module.weight.dtype or x.shape[-1] != module.weight.shape[0]:
        out: Tensor = type(module).forward(module, x)
        return out
    from kvruntime.kernels.rms_norm import rms_norm

    return rms_norm(x, module.weight, getattr(module, eps), from_one)


def _gated(module: torch.nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The fused ``forward`` of a gated feed-forward layer that is known; None for every other module."""
    kind = type(module)
    if "forward" in module.__dict__ or statements(kind.forward) != GATED.strip():
        return None
    return partial(_feed_forward, module) if type(module.act_fn) in SILU else None


def _feed_forward(module: Any, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    if gate.dtype != up.dtype or gate.shape != up.shape:
        return module.down_proj(module.act_fn(gate) * up)  # type: ignore[no-any-return]
    from kvruntime.kernels.gated import silu_product

    return module.down_proj(silu_product(gate, up))  # type: ignore[no-any-return]


def _rotary(file: Any) -> Any:
    """The rotary function of a module's file where it is known; None where it has none, or another."""
    function = getattr(file, "apply_rotary_pos_emb", None)
    if not inspect.isfunction(function) or function.__globals__ is not file.__dict__:
        return None
    known = (
        statements(function) == ROTARY.strip()
        and statements(function.__globals__["rotate_half"]) == ROTATE_HALF.strip()
    )
    return function if known else None


def _rotate(function: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
    each = q.ndim == k.ndim == 4 and cos.ndim == 3 and q.shape[2] == k.shape[2] == cos.shape[1]
    alike = q.is_cuda and q.dtype == k.dtype == cos.dtype == sin.dtype and q.shape[3] == k.shape[3] == cos.shape[2]
    if args or kwargs or not (each and alike) or q.stride(3) != 1 or k.stride(3) != 1:
        return function(q, k, cos, sin, *args, **kwargs)
    from kvruntime.kernels.rotary import rotate

    return rotate(q, k, cos.contiguous(), sin.contiguous())
