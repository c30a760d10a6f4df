"""Where every byte of a model's cache comes from: each section of each buffer as a product of named numbers.

A method writes its own factors down (:mod:`kvsim.methods.formulas`); here they are put together over a model's layers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from kvsim.layout import DTYPE_BITS, LayerShape, Method, StateShape, layer_label, shared_buffers
from kvsim.methods import Full, placed
from kvsim.methods.formulas import Formula, Number, shared, written
from kvsim.models.model import Model


@dataclass(frozen=True)
class Explanation:
    """A method's numbers and formulas; the bytes of those that do not stand apart add up to the cache."""

    method: Method
    numbers: tuple[Number, ...]
    formulas: tuple[Formula, ...]

    @property
    def nbytes(self) -> int:
        return sum(formula.nbytes for formula in self.formulas if not formula.apart)

    @property
    def apart_nbytes(self) -> int:
        """Constant state and index keys."""
        return sum(formula.nbytes for formula in self.formulas if formula.apart)


def model_numbers(model: Model, batch_size: int, num_tokens: int) -> list[Number]:
    """The numbers that every method shares; of each kind of layer its own where there are several."""
    kinds = Counter(model.layers)
    numbers = []
    for layer, count in kinds.items():
        label = f" ({layer.kind})" if len(kinds) > 1 else ""
        numbers.append(Number("layers" + label, count, model.source("num_layers")))
        if isinstance(layer, LayerShape):
            numbers += _shape_numbers(layer, label, model)
    numbers.append(Number("batch", batch_size, "--batch"))
    numbers.append(Number("tokens", num_tokens, "--ctx"))
    return list(dict.fromkeys(numbers))


def _shape_numbers(layer: LayerShape, label: str, model: Model) -> list[Number]:
    numbers = [Number("kv heads" + label, layer.num_kv_heads, model.source("num_kv_heads", layer.kind))]
    if not layer.value_dim:
        what = "one vector for keys and values" if layer.kind != "indexer" else "index key"
        numbers.append(Number("latent" + label, layer.key_dim, model.source("head_dim", layer.kind) or what))
    else:
        numbers.append(Number("head dim" + label, layer.key_dim, model.source("head_dim", layer.kind)))
        if layer.value_dim != layer.key_dim:
            numbers.append(Number("value dim" + label, layer.value_dim, model.source("value_dim", layer.kind)))
    if layer.window is not None:
        numbers.append(Number("window" + label, layer.window, model.source("window", layer.kind)))
    if layer.stride > 1:
        numbers.append(Number("stride" + label, layer.stride, "tokens an entry"))
    return numbers


def explain(model: Model, method: Method, batch_size: int, num_tokens: int) -> Explanation:
    """The formulas of ``method``'s cache for every distinct layer of ``model``, its index keys and its state last.

    Raises ``ValueError`` where the method cannot hold such a layer.
    """
    numbers: dict[tuple[str, str], Number] = {}
    formulas: list[Formula] = []
    pieces = placed(method, model.cache_layers)
    several = len(pieces) > 1
    for (layer, chosen), count in pieces.items():
        more, found = written(chosen, layer, count, batch_size, num_tokens)
        label = layer_label(layer, count, chosen if chosen != method else None) if several else ""
        for number in more:
            shown = replace(number, name=f"{number.name} ({layer.kind})") if several else number
            numbers[shown.name, shown.origin] = shown
        formulas += [replace(formula, layer=label) for formula in found if _says_something(formula, several)]
    formulas += shared(shared_buffers(method, model.cache_layers))
    for layer, count in Counter(model.index_layers).items():
        _, index = written(Full(), layer, count, batch_size, num_tokens)
        label = layer_label(layer, count, None)
        formulas += [
            replace(formula, layer=label, buffer="index", section=f"index_{formula.section}", apart=True)
            for formula in index
            if formula.nbytes
        ]
    for state, count in Counter(model.state_layers).items():
        formulas += _state(state, count, batch_size)
    return Explanation(method, tuple(numbers.values()), tuple(formulas))


def _says_something(formula: Formula, several: bool) -> bool:
    """Whether a formula is shown: not one of a stream that the layers lack, nor an empty one among several kinds."""
    return (0, "head dim") not in formula.factors and (bool(formula.nbytes) or not several)


def _state(state: StateShape, count: int, batch_size: int) -> list[Formula]:
    plural = "s" if count > 1 else ""
    out = []
    for name, shape, dtype in state.tensors:
        axes = tuple((size, f"[{axis}]") for axis, size in enumerate(shape))
        factors = ((count, "layers"), (batch_size, "batch"), *axes, (DTYPE_BITS[dtype] // 8, f"bytes ({dtype})"))
        label = f"{count} {state.kind} layer{plural}: constant state, whatever the tokens"
        out.append(Formula("state", f"state_{name}", factors, layer=label, apart=True))
    return out
