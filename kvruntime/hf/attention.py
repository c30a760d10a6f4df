"""How a model attends through the cache: one attention function and one mask function in transformers' interfaces.

A model has them only while it runs with a kvruntime cache (:class:`Switch`); with another or none it is as it was.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    create_masks_for_generate,
    sdpa_mask,
)

from kvruntime.hf import latents
from kvruntime.hf.cache import UNCOMPILED, Cache, CacheLayer, Length, PendingUpdate
from kvruntime.hf.counts import StepLength
from kvruntime.hf.graphs import GraphForward
from kvruntime.hf.models import window_applies
from kvruntime.hf.prompts import let_go, watch
from kvruntime.kernels.reference import PLAIN, Partial, Scores

NAME = "kvruntime"
"""Holds none of the words and signs by which transformers recognizes flash, sdpa, flex, paged or hub kernels."""

MASKS = "create_masks_for_generate"
"""The attribute by which ``generate()`` finds a model's own way to make masks."""

PREPARES = "_prepare_cache_for_generation"
"""The method by which ``generate()`` tells how many tokens a cache may need."""

REFUSED = frozenset(("position_bias", "head_mask", "output_attentions"))
"""Keyword arguments that would change the scores or ask for them."""

SCORE_BLOCK = 1 << 26
"""Scores that are held at a time where PyTorch has no attention with sinks or softcaps."""

_LOCK = threading.Lock()


class Switch:
    """Puts a model's configs to :data:`NAME` while it runs with a kvruntime cache, and back: its forward hooks.

    Whatever the implementation was is what every other forward finds: other caches, ``eager`` and its attention
    weights, ``generate_batch``.
    """

    def __init__(self, configs: list[Any], model: Any) -> None:
        self.configs, self.original = configs, getattr(model, MASKS, create_masks_for_generate)
        self.prepares: Any = getattr(model, PREPARES, None)
        self.previous: list[str | None] = [None] * len(configs)
        self.active: set[int] = set()
        """Threads with a forward under way."""

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward begins."""
        cache = _given(args, kwargs)
        if cache is not None:
            self.on(cache)
            cache.hold()
            cache.forward.begin(cache.layers)
        elif not torch.compiler.is_compiling() and threading.get_ident() in self.active:
            self._leave()  # an interrupt ended this thread's last forward, after which no hook runs

    def after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """It ended, or with ``output`` None raised."""
        cache = _given(args, kwargs)
        if cache is not None:
            self.off(cache)
            cache.let_go(output is None)
            cache.forward.end(cache.layers, output is None)

    def create_masks(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``create_masks_for_generate``, which ``generate()`` calls for a compiled cache."""
        cache = _given(args, kwargs)
        if cache is None:
            return self.original(*args, **kwargs)
        self.on(cache)
        try:
            return self.original(*args, **kwargs)
        finally:
            self.off(cache)

    def prepare_cache(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``_prepare_cache_for_generation``, which knows how long rows may get."""
        out = self.prepares(*args, **kwargs)
        given = inspect.signature(self.prepares).bind(*args, **kwargs).arguments
        cache = _given((), given.get("model_kwargs", {}))
        if cache is not None and getattr(given.get("generation_config"), "use_cache", None) is False:
            raise ValueError(
                "use_cache=False with a kvruntime cache: it would be given every token again, leave one out"
            )
        if cache is not None and "max_cache_length" in given:
            cache.expect(int(given["max_cache_length"]))
        if cache is not None:
            columns = getattr(given.get("generation_config"), "_mask_length", None) or 0
            cache.begin(given.get("generation_mode") == GenerationMode.ASSISTED_GENERATION, columns)
        return out

    def on(self, cache: Cache) -> None:
        cache.forward.running = True
        if torch.compiler.is_compiling():
            self._set()
            return
        with _LOCK:
            self.active.add(threading.get_ident())
            self._set()

    def off(self, cache: Cache) -> None:
        cache.forward.running = False
        if torch.compiler.is_compiling():
            self._put_back()
        else:
            self._leave()

    def _leave(self) -> None:
        with _LOCK:
            self.active.discard(threading.get_ident())
            if not self.active:
                self._put_back()

    def _set(self) -> None:
        for index, config in enumerate(self.configs):
            if config._attn_implementation_internal != NAME:
                self.previous[index] = config._attn_implementation_internal
                object.__setattr__(config, "_attn_implementation_internal", NAME)

    def _put_back(self) -> None:
        for config, previous in zip(self.configs, self.previous, strict=True):
            if config._attn_implementation_internal == NAME:
                object.__setattr__(config, "_attn_implementation_internal", previous)


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Cache | None:
    """The kvruntime cache among a forward's arguments."""
    for value in (*kwargs.values(), *args):
        if isinstance(value, Cache):
            return value
    return None


def attach(model: Any, replays: bool = False) -> None:
    """Lets ``model`` attend through a kvruntime cache; raises ``ValueError`` where transformers does not allow it.

    ``replays``: its decode steps may be CUDA graphs (:mod:`kvruntime.hf.graphs`).
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    _attach(model)
    for module, _ in list(_attached(model)) if replays else ():
        if not isinstance(module.__dict__.get("forward"), GraphForward):
            module.forward = GraphForward(module, is_own)


def _attach(model: Any) -> None:
    for _, switch in _attached(model):
        switch._leave()
        return
    config = model.config.get_text_config(decoder=True)
    inside = [module for module in model.modules() if isinstance(getattr(module, "config", None), type(config))]
    models = [module for module in {id(m): m for m in (model, *inside)}.values() if isinstance(module, PreTrainedModel)]
    for one in models:
        if not one._can_set_attn_implementation():
            raise ValueError(f"{type(model).__name__} is not supported: its attention implementation cannot be set")
    configs = list({id(c): c for c in (config, *(module.config for module in inside))}.values())
    switch = Switch(configs, model)
    for one in models:
        one.register_forward_pre_hook(switch.before, with_kwargs=True)
        one.register_forward_hook(switch.after, with_kwargs=True, always_call=True)
        setattr(one, MASKS, switch.create_masks)
        if one is model and switch.prepares is not None:
            setattr(one, PREPARES, switch.prepare_cache)
    latents.attach(model)
    watch(model)


def restore(model: Any) -> None:
    """Takes back what ``make_cache`` added to ``model``: its hooks.

    A kvruntime cache given to it afterwards is read back whole for the model's own attention, as any stock cache is.
    """
    for module, switch in list(_attached(model)):
        for hooks, extra in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is switch]:
                del hooks[key]
                extra.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
        for name in (MASKS, PREPARES):
            if getattr(module.__dict__.get(name), "__self__", None) is switch:
                delattr(module, name)
        if isinstance(replayed := module.__dict__.get("forward"), GraphForward):
            replayed.take_back()
        let_go(module)
        for inside in latents.modules(module):
            latents.let_go(inside)
        switch._put_back()


def _attached(model: Any) -> Iterator[tuple[Any, Switch]]:
    """The modules of ``model`` that :func:`attach` hooked, each with its :class:`Switch`."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if is_own(hook):
                yield module, hook.__self__
                break


def is_own(hook: Any) -> bool:
    """Whether :func:`attach` put it there."""
    return isinstance(getattr(hook, "__self__", None), Switch)


def is_hooked(module: torch.nn.Module) -> bool:
    """Whether a module has a hook around its forward, or a forward, that :func:`attach` did not put there."""
    forward = module.__dict__.get("forward")
    if forward is not None and not (isinstance(forward, GraphForward) and forward.replaced is None):
        return True
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all(map(is_own, hooks))


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | PendingUpdate,
    value: Tensor | PendingUpdate,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``query [batch_size, num_q_heads, L, key_dim]`` -> ``(out [batch_size, L, num_q_heads, value_dim], None)``.

    The first tokens attend to each other as stock sdpa does it, then are stored.  One later token is stored and
    attends to all that is; several attend to the stored ones and to each other, then are stored.
    """
    scores = _scores(kwargs)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if not (isinstance(key, PendingUpdate) and isinstance(value, PendingUpdate)):
        if attention_mask is not None and attention_mask.shape[3] == 1 < key.shape[2]:
            attention_mask = None  # a step's, which sees all of a window
        if not scores.is_plain:
            return _changed(query, key, value, attention_mask, scale, scores), None
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    _refuse(module, query, key, dropout, kwargs)
    layer, fresh_key, fresh_value = key.layer, key.fresh, value.fresh
    if key.steps is not None and layer.takes_mask(attention_mask):
        layer.num_q_heads, plain = query.shape[1], query.shape[3] - fresh_value.shape[3]
        query = latents.absorbed(module, query, layer) if layer.kind else query
        out = layer.step(query, fresh_key, fresh_value, scale, key.steps, scores)
        out = latents.projected(module, out, layer, plain) if layer.kind else out
        return out.transpose(1, 2), None
    run = _uncompiled if torch.compiler.is_compiling() else _attend
    return run(module, layer, query, fresh_key, fresh_value, attention_mask, scale, scores), None


def _scores(kwargs: dict[str, Any]) -> Scores:
    """What an attention function's keyword arguments say of scores; they are taken from ``kwargs``."""
    softcap, sinks = kwargs.pop("softcap", None), kwargs.pop("s_aux", None)
    return PLAIN if softcap is None and sinks is None else Scores(softcap, sinks)


def _changed(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, scores: Scores) -> Tensor:
    """``query [batch_size, num_q_heads, L, key_dim]`` -> ``[batch_size, L, num_q_heads, value_dim]``: attention with
    sinks or a softcap, causal where there is no mask ``[batch_size or 1, 1, L, columns]``."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask == 0
    if query.is_cuda:
        from kvruntime.kernels import prompt

        return prompt.attend(query, key, value, mask, scale, scores)
    batch_size, num_q_heads, length, _ = query.shape
    num_kv_heads, columns = key.shape[1:3]
    if mask is None:
        at = torch.arange(columns, device=query.device)
        mask = (at <= at[columns - length :, None])[None, None]
    out = query.new_empty(batch_size, length, num_q_heads, value.shape[3])
    block = max(1, SCORE_BLOCK // max(1, batch_size * num_q_heads * columns))
    for first in range(0, length, block):
        part = query[:, :, first : first + block]
        size = part.shape[2]
        grouped = part.reshape(batch_size, num_kv_heads, -1, query.shape[3])
        state = Partial(grouped, value.shape[3], scale, scores.softcap)
        state.add(key, value, mask[:, :, first : first + block].repeat(1, 1, num_q_heads // num_kv_heads, 1))
        done = state.result(scores.sinks_of(num_kv_heads, size)).reshape(batch_size, num_q_heads, size, -1)
        out[:, first : first + block] = done.transpose(1, 2).to(out.dtype)
    return out


def _attend(
    module: torch.nn.Module,
    layer: CacheLayer,
    query: Tensor,
    fresh_key: Tensor,
    fresh_value: Tensor,
    attention_mask: Tensor | None,
    scale: float,
    scores: Scores,
) -> Tensor:
    """:func:`attention` as the host plans it."""
    length, layer.num_q_heads, layer.scale = query.shape[2], query.shape[1], scale
    lengths = layer.read_mask(attention_mask, length)
    if layer.window:
        layer.columns.check_window(layer.num_columns + length, layer.window)
    if not layer.num_columns:
        key, value = latents.expanded(module, fresh_key, fresh_value) if layer.kind else (fresh_key, fresh_value)
        if layer.window and length > layer.window:
            attention_mask = _within(attention_mask, length, layer.window, query.device)
        if scores.is_plain:
            out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scale)
        else:
            out = _changed(query, key, value, attention_mask, scale, scores)
        order = layer.order(attention_mask)
        queries = _ordered(query, order) if layer.store.wants_query else None
        layer.append_first(_ordered(fresh_key, order), _ordered(fresh_value, order), lengths, queries)
        return out
    if layer.held is not None:
        layer.held.store()  # a model that runs a layer twice reads what it stored
    plain = query.shape[3] - fresh_value.shape[3]
    query = latents.absorbed(module, query, layer) if layer.kind else query
    if length == 1 and lengths is None and layer.store.prefers_steps:
        out = layer.advance(query, fresh_key, fresh_value, scale, scores)
    elif length == 1:
        layer.append(fresh_key, fresh_value, lengths, query)
        out = layer.attend(query, scale, None, scores)
    else:
        order = layer.order(attention_mask)
        query, fresh_key, fresh_value = (_ordered(x, order) for x in (query, fresh_key, fresh_value))
        out = layer.attend(query, scale, (fresh_key, fresh_value, lengths), scores)
        layer.append(fresh_key, fresh_value, lengths, query)
        out = _ordered(out, None if order is None else order.argsort(1))
    out = latents.projected(module, out, layer, plain) if layer.kind else out
    return out.transpose(1, 2).contiguous()


_uncompiled = torch.compiler.disable(_attend, reason=UNCOMPILED)


def _within(mask: Tensor | None, length: int, window: int, device: torch.device) -> Tensor:
    """A first prompt's mask ``[batch_size or 1, 1, L, L]`` or None, causal, of which a query sees ``window``
    columns."""
    at = torch.arange(length, device=device)
    band = (at > at[:, None] - window) & (at <= at[:, None])
    if mask is None:
        return band[None, None]
    return mask & band if mask.dtype == torch.bool else mask.masked_fill(~band, torch.finfo(mask.dtype).min)


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    """``x [batch_size, heads, L, dim]``, each row's L in the order ``[batch_size or 1, L]``; None as they are."""
    return x if order is None else x.take_along_dim(order[:, None, :, None], 2)


def _refuse(
    module: torch.nn.Module, query: Tensor, key: PendingUpdate, dropout: float, kwargs: dict[str, Any]
) -> None:
    """Raises ``ValueError`` for what would change the scores, and for a window that is the config's alone."""
    own, num_columns, window = key.layer.window, key.num_columns, kwargs.get("sliding_window")
    if own and not window and not key.layer.columns.slides:
        raise ValueError(
            f"{type(module).__name__} attends without the window of {own} tokens that its config names: "
            "a kvruntime cache cannot follow it"
        )
    if window and window != own and (num_columns > window or window_applies(window, getattr(module, "config", None))):
        raise ValueError(
            f"{type(module).__name__} attends to {num_columns} tokens with sliding_window {window}, "
            "which a kvruntime cache does not support"
        )
    for name in (each for each in REFUSED if each in kwargs):
        if kwargs[name] is not None and kwargs[name] is not False:
            raise ValueError(f"{type(module).__name__} attends with {name}, which a kvruntime cache does not support")
    if kwargs.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise ValueError(f"{type(module).__name__} attends without a causal mask: a kvruntime cache cannot")
    if dropout:
        raise ValueError(f"attention dropout {dropout}: a kvruntime cache is for inference, call model.eval()")
    if query.requires_grad:
        raise ValueError("a kvruntime cache keeps no gradients: run the model under torch.no_grad()")


def _without_window(function: Any) -> Any:
    """The causal mask function of one that is causal, within a window or not: some models make both masks, whichever
    their layers take.  Raises ``ValueError`` for any other."""
    if function is causal_mask_function:
        return function
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    inside = [each for cell in cells if isinstance(cell, tuple) for each in cell]
    names = {each.__qualname__.partition(".")[0] for each in inside}
    if len(inside) != 2 or names != {"sliding_window_overlay", causal_mask_function.__qualname__}:
        raise ValueError("a mask that is more than causal within a window: a packed window cannot follow it")
    return causal_mask_function


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Stock ``sdpa_mask``; but for one token on a kvruntime cache it never waits for the device to skip the mask."""
    length = kwargs.get("kv_length")
    if isinstance(length, Length) and length.window and length.columns is not None:
        length.columns.slides |= kwargs.get("mask_function") is not causal_mask_function
    if isinstance(length, StepLength):
        if kwargs.get("q_length") == 1 or kwargs.get("mask_function") is causal_mask_function:
            return length.mask(kwargs.get("attention_mask"))
        if length.counts.tracing:  # before anything is stored that no graph could hold
            raise ValueError(f"a mask of {kwargs.get('q_length')} tokens that is more than causal: the host plans it")
        length.counts.at_once = 1  # several tokens that see otherwise, as an image's may: no step
    if isinstance(length, Length) and length.window:  # the layer sees to it: rows are counted without padding there
        kwargs |= {"mask_function": _without_window(kwargs["mask_function"]), "local_size": None}
    if isinstance(length, Length) and kwargs.get("q_length") == 1:
        given = kwargs.get("attention_mask")
        if given is None:
            return None
        if length.columns is not None and (checked := length.columns.step_mask(given)) is not None:
            return checked
        kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)
