"""What a cache must give, computed the slow way: everything stored read back, then stock attention over it."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from kvruntime.hf.cache import argument
from kvruntime.methods.full.cache import FullLayer
from kvruntime.methods.kivi import turned
from kvruntime.methods.kivi.reference import ring_positions, unpack_records


def stored(store) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a layer as floats, ``[batch_size, num_kv_heads, num_tokens, dim]``; rows of equal length."""
    (length,) = set(store.row_lengths)
    if isinstance(store, FullLayer):
        return tuple(store.tensors[name][:, :, :length].float() for name in ("key", "value"))
    (packed,) = set(store.row_packed)
    method, params, order = store.method, store.tensors.get("key_params"), store.tensors.get("key_order")
    records = store.tensors["records"][:, : packed // store.record.num_tokens].transpose(1, 2)
    out = []
    lengths = (torch.full((store.batch_size,), n, device=store.device) for n in (length, packed))
    slots = store.tensors["exact_key"].shape[2]
    position = ring_positions(*lengths, method.sink_length, method.residual_length, slots)[0]
    unpacked = unpack_records(records, store.record, None if params is None else (params[0], params[1]), order)
    for packed_tokens, exact in zip(unpacked, ("exact_key", "exact_value"), strict=True):
        tokens = torch.full((*packed_tokens.shape[:2], length, packed_tokens.shape[3]), torch.nan, device=store.device)
        tokens[:, :, method.sink_length : method.sink_length + packed] = packed_tokens
        tokens[:, :, position[position >= 0]] = store.tensors[exact][:, :, position >= 0].float()
        assert not tokens.isnan().any()
        out.append(tokens)
    return (out[0], turned(out[1])) if method.rotate_values else tuple(out)


def stock_past(cache, dtype: torch.dtype, num_tokens: int | None = None) -> DynamicCache:
    """A stock cache with what ``cache`` holds, read back; the first ``num_tokens`` of it."""
    past = DynamicCache()
    for index, store in enumerate(cache.stores):
        key, value = stored(store)
        past.update(key[:, :, :num_tokens].to(dtype), value[:, :, :num_tokens].to(dtype), index)
    return past


@torch.no_grad()
def step(model, cache, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of ``ids`` on ``cache``, and on a stock cache with the same past read back.

    One token is stored (and may push others into a record) before it attends, several are stored after.
    """
    before = cache.get_seq_length()
    past = stock_past(cache, model.dtype) if ids.shape[1] > 1 and before else None
    got = model(ids, **argument(cache)).logits
    if ids.shape[1] == 1:
        past = stock_past(cache, model.dtype, before)
    return got, model(ids, **argument(past)).logits
