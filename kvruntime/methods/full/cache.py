"""One attention layer's uncompressed cache: the tensors of ``Full.buffers``, filled and read.

Rows are compacted: token t of row b lies in slot t, whatever padding stood before it.  Stored tokens of the
query's own type are read in place by ``scaled_dot_product_attention``.  Otherwise (another type, or fresh tokens
besides) they are read ``BLOCK_TOKENS`` at a time and merged by the online softmax, so that no converted or
concatenated copy of the past is ever made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvruntime.kernels.reference import Partial, embedded
from kvruntime.methods.rows import grown, tokens_to_provide
from kvsim.layout import LayerShape
from kvsim.methods.full import Full

Fresh = tuple[Tensor, Tensor, list[int] | None]
"""Tokens not yet stored: key, value, lengths, as ``append`` takes them."""

BLOCK_TOKENS = 1024
"""Stored tokens that are converted to float32 at a time."""


class FullLayer:
    """Keys and values of ``batch_size`` rows in one layer, as they are.

    ``max_seq_len``: tokens a row to provide for at once; ``None`` provides in blocks of ``GROW_TOKENS``.
    Rows may hold different numbers of tokens.  ``tensors`` are exactly
    ``method.buffers(shape, batch_size, num_provided)``.
    """

    def __init__(
        self,
        method: Full,
        shape: LayerShape,
        batch_size: int,
        max_seq_len: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if shape.window is not None:
            raise ValueError(f"a full cache holds full-attention layers only, not a window of {shape.window} tokens")
        self.method, self.shape, self.batch_size = method, shape, batch_size
        self.max_seq_len, self.device = max_seq_len, torch.device(device)
        self.row_lengths = [0] * batch_size
        self.num_provided = 0
        self.tensors: dict[str, Tensor] = {}
        self._provide(max_seq_len or 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the layer's tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    is_croppable = True

    def _provide(self, num_tokens: int) -> None:
        if self.tensors and num_tokens <= self.num_provided:
            return
        provided = tokens_to_provide(num_tokens, self.max_seq_len)
        for buffer in self.method.buffers(self.shape, self.batch_size, provided):
            self.tensors[buffer.name] = grown(self.tensors.get(buffer.name), buffer, self.device)
        self.num_provided = provided

    def append(self, key: Tensor, value: Tensor, lengths: list[int] | None = None) -> None:
        """Store ``key [batch_size, num_kv_heads, L, key_dim]`` and ``value`` alike.

        ``lengths``: row b's real tokens are the last ``lengths[b]`` of the L (the rest is left padding, which is
        not stored); ``None`` takes all.
        """
        length = key.shape[2]
        counts = [length] * self.batch_size if lengths is None else lengths
        ends = [start + count for start, count in zip(self.row_lengths, counts, strict=True)]
        self._provide(max(ends))
        for name, fresh in (("key", key.detach()), ("value", value.detach())):
            store = self.tensors[name]
            if len(set(counts)) > 1:
                for row, (start, end) in enumerate(zip(self.row_lengths, ends, strict=True)):
                    store[row, :, start:end] = fresh[row, :, length - (end - start) :]
            elif len(set(ends)) == 1:
                store[:, :, self.row_lengths[0] : ends[0]] = fresh[:, :, length - counts[0] :]
            else:
                slots = self._on_device(self.row_lengths)[:, None] + torch.arange(counts[0], device=self.device)
                rows = torch.arange(self.batch_size, device=self.device)[:, None]
                store[rows, :, slots] = fresh[:, :, length - counts[0] :].transpose(1, 2).to(store.dtype)
        self.row_lengths = ends

    @staticmethod
    def append_all(held: Sequence[tuple[FullLayer, Tensor, Tensor, list[int] | None]]) -> None:
        """:meth:`append` of each ``(layer, key, value, lengths)``."""
        for layer, key, value, lengths in held:
            layer.append(key, value, lengths)

    def attend(self, query: Tensor, scale: float, fresh: Fresh | None = None) -> Tensor:
        """Attention of ``query [batch_size, num_q_heads, L, key_dim]`` over what is stored.

        ``fresh``: ``(key, value, lengths)`` of L tokens not yet stored, which query i sees up to and with its own;
        without it L must be 1.  Returns ``[batch_size, num_q_heads, L, value_dim]`` in the query's type; padding
        queries get zeros.
        """
        batch_size, num_q_heads, length, _ = query.shape
        if fresh is None and length != 1:
            raise ValueError(f"{length} queries over stored tokens only: allowed is 1, or give the fresh tokens")
        # Query heads that share a kv head become more queries of it: [batch_size, num_kv_heads, q_per_kv * L, key_dim]
        packed = query.reshape(batch_size, self.shape.num_kv_heads, -1, self.shape.key_dim)
        if fresh is None and self.tensors["key"].dtype == query.dtype and min(self.row_lengths):
            longest = max(self.row_lengths)
            key, value = (self.tensors[name][:, :, :longest] for name in ("key", "value"))
            visible = self._visible(0, longest)
            out = scaled_dot_product_attention(packed, key, value, attn_mask=visible, scale=scale)
        else:
            out = self._merged(packed, length, scale, fresh)
        return out.reshape(batch_size, num_q_heads, length, self.shape.value_dim).to(query.dtype)

    def _merged(self, query: Tensor, length: int, scale: float, fresh: Fresh | None) -> Tensor:
        """Blockwise attention in float32; ``query [batch_size, num_kv_heads, q_per_kv * length, key_dim]``."""
        state = Partial(query, self.shape.value_dim, scale)
        longest = max(self.row_lengths)
        for start in range(0, longest, BLOCK_TOKENS):
            stop = min(start + BLOCK_TOKENS, longest)
            key, value = (self.tensors[name][:, :, start:stop] for name in ("key", "value"))
            state.add(key, value, self._visible(start, stop))
        if fresh is None:
            return state.result()
        key, value, lengths = fresh
        position = torch.arange(length, device=query.device)
        causal = position <= position[:, None]  # [L queries, L keys]
        if lengths is None:
            state.add(key, value, causal.repeat(query.shape[2] // length, 1))
            return state.result()
        real = position >= length - self._on_device(lengths)[:, None]  # [batch_size, L]
        visible = causal & real[:, None, None]  # [batch_size, 1, L, L]
        state.add(key, value, visible.repeat(1, 1, query.shape[2] // length, 1))
        return torch.where(real.repeat(1, query.shape[2] // length)[:, None, :, None], state.result(), 0.0)

    def _visible(self, start: int, stop: int) -> Tensor | None:
        """Which of the slots ``start:stop`` hold a row's token, ``[batch_size, 1, 1, stop - start]``; None for all."""
        if min(self.row_lengths) >= stop:
            return None
        slots = torch.arange(start, stop, device=self.device)
        return slots < self._on_device(self.row_lengths)[:, None, None, None]

    def _on_device(self, counts: list[int]) -> Tensor:
        return torch.tensor(counts).to(self.device, non_blocking=True)

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        positions: Tensor,
        ticket: Tensor,
        num_tokens: int,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """One decode step with nothing decided on the host: :meth:`KiviLayer.step`, whose arguments these are."""
        if not key.is_cuda:
            query, key = embedded(query, key, rotary, positions)
            self.append(key, value)
            return self.attend(query, scale)
        from kvruntime.methods.full import decode

        stored_key, stored_value = self.tensors["key"], self.tensors["value"]
        decode.store(query, key, value, rotary, stored_key, stored_value, positions)
        return decode.attend(query, stored_key, stored_value, positions, scale, num_tokens)

    def catch_up(self, positions: Tensor) -> None:
        """Takes the rows' lengths from ``positions``, where steps have left the host's books behind."""
        self.row_lengths = positions.tolist()

    def tokens(self, row: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a row, ``[num_kv_heads, row_lengths[row], dim]`` each; views."""
        key, value = (self.tensors[name][row, :, : self.row_lengths[row]] for name in ("key", "value"))
        return key, value

    def reset(self) -> None:
        """Forget every token; the buffers stay, zeroed (a NaN left behind would reach a shorter row's sums)."""
        for tensor in self.tensors.values():
            tensor.zero_()
        self.row_lengths = [0] * self.batch_size

    def reorder(self, index: Tensor) -> None:
        """Rows become ``index`` (int64, any number of rows, repeats allowed)."""
        rows = index.tolist()
        for name, tensor in self.tensors.items():
            self.tensors[name] = tensor.index_select(0, index.to(self.device))
        self.row_lengths = [self.row_lengths[row] for row in rows]
        self.batch_size = len(rows)

    def crop(self, num_tokens: int) -> None:
        """Cut the longest row to ``num_tokens``, and as many newest tokens from every other row.

        Their slots are zeroed (a NaN left behind would reach a shorter row's sums).
        """
        drop = max(0, max(self.row_lengths) - num_tokens)
        if drop > min(self.row_lengths):
            least = max(self.row_lengths) - min(self.row_lengths)
            raise ValueError(f"cannot crop to {num_tokens} tokens: allowed are {least} and above (a shorter row)")
        self.row_lengths = [length - drop for length in self.row_lengths]
        for tensor in self.tensors.values():
            for row, length in enumerate(self.row_lengths):
                tensor[row, :, length : length + drop] = 0
