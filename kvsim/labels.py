"""A kind of layer in words."""

from __future__ import annotations

from kvsim.layout import LayerShape, Method


def layer_label(layer: LayerShape, count: int, method: Method | None) -> str:
    """``52 sliding layers: 16 kv heads of 128, window 1,024`` and, where given, the method of these layers."""
    dims = f"{layer.key_dim}" if layer.key_dim == layer.value_dim else f"{layer.key_dim}+{layer.value_dim}"
    window = f", window {layer.window:,}" if layer.window is not None else ""
    stride = f", one entry a {layer.stride} tokens" if layer.stride > 1 else ""
    named = f", {method.name}" if method is not None else ""
    plural = "s" if count > 1 else ""
    return f"{count} {layer.kind} layer{plural}: {layer.num_kv_heads} kv heads of {dims}{window}{stride}{named}"
