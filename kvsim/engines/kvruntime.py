"""kvruntime, this project's own runtime: the method's buffers as they are, provided for in blocks of 256 tokens.

Without a known final length every full-attention layer's buffers provide for ``256 * ceil(n / 256)`` tokens a row
(kvruntime/methods/rows.py); with ``max_seq_len`` they are allocated for it once.  Windows and states stay as
transformers has them (kvruntime/hf/exact.py), in the activations' type, which is taken to be the method's ``dtype``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvsim.engines.engine import Engine
from kvsim.engines.ideal import method_parts
from kvsim.engines.states import in_transformers
from kvsim.layout import Layers, LayerShape, Method, leaving, parts
from kvsim.methods import METHODS, Full, LayerMix, in_order
from kvsim.methods.evict import windowed
from kvsim.whole_numbers import check_whole

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvsim.models.model import Model

GROW_TOKENS = 256
LONG_WINDOW = 1024
"""Windows of so many tokens are packed where a model has no other layers; shorter ones stay exact."""
MOST = (1 << 31) - 1
"""The largest count that an option of a method takes here: kernels count in 32 bits."""
STEPS = ("engine", "generate", "compiled")
"""How steps run: ``kvruntime.Engine``'s own decoder, or the model's own step under stock ``generate()``, as it comes
or compiled (``make_cache(compiled=True)``)."""


def stored(method: object) -> bool:
    """Whether kvruntime has a room for ``method``, and for the one inside it where there is one."""
    inner = getattr(method, "inner", None)
    return bool(getattr(method, "kvruntime", False)) and (inner is None or stored(inner))


def check_runs(method: object) -> None:
    """Raises ``ValueError`` for what is no method, one that kvruntime has no room for, a count beyond ``MOST``, or what
    the method's own ``check_runs`` refuses.

    A mix by layer runs where its layers are of one kind of method, of which they share nothing.
    """
    if isinstance(method, LayerMix):
        check_mix(method)
        return
    if not stored(method):
        name = getattr(method, "name", repr(method))
        raise ValueError(f"kvruntime does not run the method {name}: allowed are {', '.join(names())}")
    for name, value in vars(method).items():
        if isinstance(value, int) and value > MOST:
            raise ValueError(f"{name.replace('_', ' ')} {value}: allowed are at most {MOST:,}")
    own = getattr(method, "check_runs", None)
    if own is not None:
        own()


def check_mix(mix: LayerMix) -> None:
    """Raises ``ValueError`` where kvruntime does not run ``mix``."""
    parts, kinds = [mix.exact, mix.inner], set()
    while parts:
        part = parts.pop()
        if isinstance(part, LayerMix):
            parts += [part.exact, part.inner]
            continue
        check_runs(part)
        kinds.add(type(part))
        if hasattr(part, "inner") or hasattr(part, "shared_buffers"):
            raise ValueError(f"{part.name} in a mix: kvruntime mixes methods that hold no other and share nothing")
    if len(kinds) > 1:
        raise ValueError(f"{mix.name}: kvruntime mixes one kind of method, such as kivi with other bits")


def check_alike(method: Method, methods: Iterable[Method], others: bool) -> None:
    """Raises ``ValueError`` where ``methods``, those of ``method`` in packed layers, differ in a model with ``others``
    beside full attention: windows, states, layers without a cache."""
    if others and len(set(methods)) > 1:
        raise ValueError(f"{method.name}: allowed is a choice by layer where all layers are full attention")


def stored_shape(method: Method, layer: LayerShape) -> LayerShape:
    """``layer`` as kvruntime stores it: heads filled up with zeros to what the method packs; of MLA the latent as a key
    and the rotary key beside it as a value."""
    inner = getattr(method, "inner", None)
    if inner is not None:
        return stored_shape(inner, layer)
    layer = _apart(layer)
    multiple = getattr(method, "head_multiple", 1)
    key_dim, value_dim = (-(-dim // multiple) * multiple for dim in (layer.key_dim, layer.value_dim))
    return (
        layer
        if (key_dim, value_dim) == (layer.key_dim, layer.value_dim)
        else replace(layer, key_dim=key_dim, value_dim=value_dim)
    )


def _apart(layer: LayerShape) -> LayerShape:
    """A latent as a key, and the rotary key beside it as a value; any other layer as it is."""
    if layer.kind != "mla" or layer.value_dim or not layer.rope:
        return layer
    return replace(layer, key_dim=layer.key_dim - layer.rope, value_dim=layer.rope)


def window_of(layers: Iterable[LayerShape]) -> int:
    """The window of a model whose layers all slide alike, where it is packed; else 0."""
    windows = {(layer.kind, layer.window, layer.stride) for layer in layers}
    kind, window, stride = windows.pop() if len(windows) == 1 else ("", None, 1)
    return window if kind == "sliding" and window is not None and window >= LONG_WINDOW and stride == 1 else 0


def names() -> list[str]:
    """The names of the methods that kvruntime stores."""
    return [name for name, make in METHODS.items() if stored(make())]


def latent_names() -> list[str]:
    """Those of methods that store latents of MLA."""
    return [name for name in names() if getattr(METHODS[name](), "latents", False)]


@dataclass(frozen=True)
class Kvruntime(Engine):
    """``max_seq_len``: tokens a row to allocate for at once; 0 grows in blocks of 256.  ``steps``: how a token is
    computed, by ``kvruntime.Engine`` or under stock ``generate()``, as it comes or compiled; it changes times, no
    bytes."""

    remainder_first = True

    max_seq_len: int = 0
    steps: str = STEPS[0]

    def __post_init__(self) -> None:
        check_whole("max_seq_len", self.max_seq_len, least=0)
        if self.steps not in STEPS:
            raise ValueError(f"kvruntime steps {self.steps!r}: allowed are {', '.join(STEPS)}")

    @property
    def name(self) -> str:
        return "kvruntime"

    @property
    def timed_as(self) -> str:
        return self.name if self.steps == STEPS[0] else f"{self.name}:{self.steps}"

    def provided(self, num_tokens: int) -> int:
        """Tokens a row that the buffers provide for.  Raises ``ValueError`` beyond ``max_seq_len``."""
        if not self.max_seq_len:
            return -(-num_tokens // GROW_TOKENS) * GROW_TOKENS
        if num_tokens > self.max_seq_len:
            raise ValueError(f"kvruntime: {num_tokens:,} tokens do not fit max_seq_len {self.max_seq_len:,}")
        return self.max_seq_len

    def parts(self, model: Model, method: Method, batch_size: int, num_tokens: int) -> dict[str, int]:
        """The method's parts of the packed layers with their ``padding``, ``window_key`` and ``window_value``,
        ``state_*``."""
        if model.index_layers:
            raise ValueError("kvruntime does not run models with index keys")
        check_runs(method)
        packed = Layers(layer for layer in model.cache_layers if layer.window is None)
        window = window_of(model.cache_layers)
        if window:
            packed = Layers(replace(layer, window=None, kind="") for layer in model.cache_layers)
        if not packed:
            least = f"{LONG_WINDOW:,} tokens and more"
            raise ValueError(f"kvruntime packs full attention, or alone windows of {least}: this model has none")
        others = bool(model.state_layers) or "none" in dict(model.kinds)
        others = others or any(layer.window is not None for layer in model.cache_layers)
        check_alike(method, in_order(method, packed), others)
        if window:
            method = windowed(method, window)
            check_runs(method)
        methods = in_order(method, packed)
        for layer, chosen in zip(packed, methods, strict=True):
            if layer.kind == "mla" and layer.rope:
                if not getattr(chosen, "latents", False):
                    allowed = ", ".join(latent_names())
                    raise ValueError(f"kvruntime does not hold latents under {chosen.name}: allowed are {allowed}")
            elif not layer.value_dim or layer.stride > 1:
                raise ValueError(f"kvruntime packs full-attention layers only, not {layer.kind} ones")
        filled = Layers(stored_shape(each, layer) for each, layer in zip(methods, packed, strict=True))
        exact = method_parts(method, filled, batch_size, num_tokens)
        provided = sum(method_parts(method, filled, batch_size, self.provided(num_tokens)).values())
        total = exact | {"padding": provided - sum(exact.values())}
        dtype = activations(method)
        exact_layers = () if window else (layer for layer in model.cache_layers if layer.window is not None)
        for layer, count in Counter(exact_layers).items():
            for name, size in parts(Full(dtype).buffers(layer, batch_size, num_tokens)).items():
                total[f"window_{name}"] = total.get(f"window_{name}", 0) + count * size
        for state, count in Counter(model.state_layers).items():
            for name, size in parts(in_transformers(state, dtype).buffers(batch_size)).items():
                total[f"state_{name}"] = total.get(f"state_{name}", 0) + count * size
        return total

    def held(self, model: Model) -> Model:
        """``model`` with its latents' rotary keys apart, as they are stored."""
        apart = tuple(_apart(layer) if isinstance(layer, LayerShape) else layer for layer in model.layers)
        return model if apart == model.layers else replace(model, layers=apart)

    def stored(self, model: Model, method: Method) -> Method:
        if all(layer.window is None for layer in model.cache_layers):
            return method
        if window := window_of(model.cache_layers):
            return windowed(method, window)
        return LayerMix(first=0, last=0, windows=1, exact=Full(activations(method)), inner=method)

    def notes(self, model: Model, method: Method) -> tuple[str, ...]:
        grows = f"grows in blocks of {GROW_TOKENS} tokens a row"
        out = [f"allocated for {self.max_seq_len:,} tokens a row at once" if self.max_seq_len else grows]
        if window := window_of(model.cache_layers):
            step = leaving(method, 0)
            out.append(
                f"windows of {window:,} tokens are packed: what has left them is forgotten {step} tokens at a time"
            )
        elif any(layer.window is not None for layer in model.cache_layers):
            out.append(f"windows are not packed: their newest tokens stay in {activations(method)}")
        if any(layer.kind == "mla" for layer in model.cache_layers):
            out.append("latents are held by one rank alone: tensor parallelism of such models is refused when it runs")
        if model.state_layers:
            out.append(
                f"states are not packed: convolutions in {activations(method)}, recurrent ones as the model has them"
            )
        return tuple(out)


def activations(method: Method) -> str:
    """The type of what is not packed: that of the method's exact tokens, or of those of the method inside it."""
    while not hasattr(method, "dtype") and getattr(method, "inner", None) is not None:
        method = method.inner  # type: ignore[attr-defined]
    return str(getattr(method, "dtype", "float16"))
