"""One attention layer's uncompressed cache: the tensors of ``Full.buffers``, filled and read.

Rows are compacted: token t of row b lies in slot t, whatever padding stood before it.  Stored tokens of the
query's own type are read in place by ``scaled_dot_product_attention``.  Otherwise (another type, or fresh tokens
besides) they are read ``BLOCK_TOKENS`` at a time and merged by the online softmax, so that no converted or
concatenated copy of the past is ever made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvruntime.kernels.reference import PLAIN, Partial, Scores, causal, embedded
from kvruntime.methods.full.reference import Stored
from kvruntime.methods.rows import Fresh, Rows, Steps, on_device
from kvsim.layout import LayerShape
from kvsim.methods.full import Full

BLOCK_TOKENS = 1024
"""Stored tokens that are converted to float32 at a time."""


class FullLayer(Rows):
    """Keys and values of ``batch_size`` rows in one layer, as they are."""

    method: Full

    def __init__(self, method: Full, shape: LayerShape, *args: Any, **kwargs: Any) -> None:
        if shape.window is not None:
            raise ValueError(f"a full cache holds full-attention layers only, not a window of {shape.window} tokens")
        super().__init__(method, shape, *args, **kwargs)

    @property
    def kernel(self) -> str:
        """What attends."""
        stock = "PyTorch's scaled_dot_product_attention"
        return f"Triton in steps, {stock} elsewhere" if self.device.type == "cuda" else stock

    def append(self, key: Tensor, value: Tensor, lengths: list[int] | None = None, query: Tensor | None = None) -> None:
        """Store ``key [batch_size, num_kv_heads, L, key_dim]`` and ``value`` alike.

        ``lengths``: row b's real tokens are the last ``lengths[b]`` of the L (the rest is left padding, which is
        not stored); ``None`` takes all.
        """
        length = key.shape[2]
        counts = self.make_room(key, lengths, value)
        ends = [start + count for start, count in zip(self.row_lengths, counts, strict=True)]
        for name, fresh in (("key", key.detach()), ("value", value.detach())):
            store = self.tensors[name]
            if len(set(counts)) > 1:
                for row, (start, end) in enumerate(zip(self.row_lengths, ends, strict=True)):
                    store[row, :, start:end] = fresh[row, :, length - (end - start) :]
            elif len(set(ends)) == 1:
                store[:, :, self.row_lengths[0] : ends[0]] = fresh[:, :, length - counts[0] :]
            else:
                slots = on_device(self.row_lengths, self.device)[:, None] + torch.arange(counts[0], device=self.device)
                rows = torch.arange(self.batch_size, device=self.device)[:, None]
                store[rows, :, slots] = fresh[:, :, length - counts[0] :].transpose(1, 2).to(store.dtype)
        self.row_lengths = ends

    @classmethod
    def changes_scores(cls, device: torch.device) -> bool:
        """Everywhere, block by block in PyTorch."""
        return True

    def attend(self, query: Tensor, scale: float, fresh: Fresh | None = None, *, scores: Scores = PLAIN) -> Tensor:
        """Attention of ``query [batch_size, num_q_heads, L, key_dim]`` over what is stored.

        ``fresh``: ``(key, value, lengths)`` of L tokens not yet stored, which query i sees up to and with its own;
        without it L must be 1.  ``scores``: what the model does to them.  Returns
        ``[batch_size, num_q_heads, L, value_dim]`` in the query's type; padding queries get zeros.
        """
        batch_size, num_q_heads, length, _ = query.shape
        self.check_fresh(query, fresh)
        # Query heads that share a kv head become more queries of it: [batch_size, num_kv_heads, q_per_kv * L, key_dim]
        packed = query.reshape(batch_size, self.shape.num_kv_heads, -1, self.shape.key_dim)
        plain = fresh is None and scores.is_plain
        if plain and self.tensors["key"].dtype == query.dtype and min(self.row_lengths):
            longest = max(self.row_lengths)
            key, value = (self.tensors[name][:, :, :longest] for name in ("key", "value"))
            visible = self._visible(0, longest)
            out = scaled_dot_product_attention(packed, key, value, attn_mask=visible, scale=scale)
        else:
            out = self._merged(packed, length, scale, fresh, scores)
        return out.reshape(batch_size, num_q_heads, length, self.shape.value_dim).to(query.dtype)

    def _merged(self, query: Tensor, length: int, scale: float, fresh: Fresh | None, scores: Scores) -> Tensor:
        """Blockwise attention in float32; ``query [batch_size, num_kv_heads, q_per_kv * length, key_dim]``."""
        state = Partial(query, self.shape.value_dim, scale, scores.softcap)
        sinks = scores.sinks_of(self.shape.num_kv_heads, length)
        longest, group = max(self.row_lengths), query.shape[2] // length
        position = torch.arange(length, device=query.device)
        counts = [length] * self.batch_size if fresh is None or fresh[2] is None else fresh[2]
        first = [held - count for held, count in zip(self.row_lengths, counts, strict=True)]
        own = 0 if fresh is None else length  # a query's own token
        token = on_device(first, self.device)[:, None] + position + own
        newest = token.repeat(1, group)
        for start in range(0, longest, BLOCK_TOKENS):
            stop = min(start + BLOCK_TOKENS, longest)
            key, value = (self.tensors[name][:, :, start:stop] for name in ("key", "value"))
            slots = torch.arange(start, stop, device=self.device)[None]
            state.add(key, value, self._visible(start, stop), scores.sees(slots, newest))
        if fresh is None:
            return state.result(sinks)
        key, value, lengths = fresh
        within = scores.sees(token, newest)
        if lengths is None:
            state.add(key, value, (position <= position[:, None]).repeat(group, 1), within)
            return state.result(sinks)
        real, visible = causal(on_device(lengths, self.device), length, group)
        state.add(key, value, visible, within)
        return torch.where(real.repeat(1, group)[:, None, :, None], state.result(sinks), 0.0)

    def _visible(self, start: int, stop: int) -> Tensor | None:
        """Which of the slots ``start:stop`` hold a row's token, ``[batch_size, 1, 1, stop - start]``; None for all."""
        if min(self.row_lengths) >= stop:
            return None
        slots = torch.arange(start, stop, device=self.device)
        return slots < on_device(self.row_lengths, self.device)[:, None, None, None]

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        steps: Steps,
        rotary: tuple[Tensor, Tensor] | None = None,
        scores: Scores = PLAIN,
    ) -> Tensor:
        """One decode step with nothing decided on the host, so that a CUDA graph may hold it: store, then attend.

        ``query [batch_size, num_q_heads, 1, key_dim]`` and one key and value a row.  ``rotary``: (cos, sin), each
        ``[positions, key_dim]``; None: already embedded.  Returns ``[batch_size, num_q_heads, 1, value_dim]``.  On CUDA
        the host's books stay behind until :meth:`catch_up` or :meth:`reset`.
        """
        if not key.is_cuda:
            query, key = embedded(query, key, rotary, steps.positions)
            self.append(key, value)
            return self.attend(query, scale, scores=scores)
        from kvruntime.methods.full import decode

        stored = Stored(self.tensors["key"], self.tensors["value"], steps.lengths)
        decode.step(query, key, value, stored, steps.positions, rotary)
        return decode.attend(query, stored, scale, stepped=True, num_tokens=steps.num_tokens, scores=scores)

    def tokens(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a row, ``[num_kv_heads, row_lengths[row], dim]`` each; views."""
        key, value = (self.tensors[name][row, :, : self.row_lengths[row]] for name in ("key", "value"))
        return key, value

    def forget(self, counts: Sequence[int], sink: int) -> None:
        """Forgets row b's ``counts[b]`` oldest tokens after its first ``sink``."""
        for tensor in self.tensors.values():
            for row, (length, count) in enumerate(zip(self.row_lengths, counts, strict=True)):
                if count:
                    tensor[row, :, sink : length - count] = tensor[row, :, sink + count : length].clone()
                    tensor[row, :, length - count : length] = 0
        self.forgot(counts)

    def reset(self) -> None:
        """Forget every token; the buffers stay, zeroed (a NaN left behind would reach a shorter row's sums)."""
        for tensor in self.tensors.values():
            tensor.zero_()
        super().reset()

    def crop(self, num_tokens: int) -> None:
        """The same, and their slots are zeroed (a NaN left behind would reach a shorter row's sums)."""
        before = self.row_lengths
        super().crop(num_tokens)
        for tensor in self.tensors.values():
            for row, (length, end) in enumerate(zip(self.row_lengths, before, strict=True)):
                tensor[row, :, length:end] = 0
