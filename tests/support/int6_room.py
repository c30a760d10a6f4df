"""The toy method's room in kvruntime: its layer in plain PyTorch, and its row."""

from __future__ import annotations

import torch
from int6 import Int6
from torch import Tensor

from kvruntime.kernels.reference import Partial, embedded
from kvruntime.methods.room import Room
from kvruntime.methods.rows import Fresh, Rows, Steps


def levels(method: Int6, buffers: object, device: torch.device) -> dict[str, Tensor]:
    """The levels of the 64 codes, -32 to 31, which all layers share."""
    return {"levels": torch.arange(-32, 32, dtype=torch.float16, device=device)}


def pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """``[..., dim]`` to bytes ``[..., dim * 6 / 8]`` and scales ``[...]``."""
    scale = (x.float().abs().amax(-1) / 31).half()
    inverse = torch.where(scale > 0, 1 / scale.float(), 0.0)[..., None]
    code = ((x.float() * inverse).round().clamp(-32, 31).int() + 32).unflatten(-1, (-1, 4))
    word = code[..., 0] | code[..., 1] << 6 | code[..., 2] << 12 | code[..., 3] << 18
    return torch.stack([word & 255, word >> 8 & 255, word >> 16], -1).flatten(-2).to(torch.uint8), scale


def unpack(codes: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """:func:`pack` read back, float32."""
    part = codes.int().unflatten(-1, (-1, 3))
    word = part[..., 0] | part[..., 1] << 8 | part[..., 2] << 16
    code = torch.stack([word >> shift & 63 for shift in (0, 6, 12, 18)], -1).flatten(-2)
    return levels.float()[code] * scale.float()[..., None]


class Int6Layer(Rows):
    """Every token packed at once."""

    has_steps = False

    def append(self, key: Tensor, value: Tensor, lengths: list[int] | None = None, query: Tensor | None = None) -> None:
        counts = self.make_room(key, lengths)
        for stream, fresh in (("key", key), ("value", value)):
            codes, scale = pack(fresh)
            for row, (start, count) in enumerate(zip(self.row_lengths, counts, strict=True)):
                new = slice(fresh.shape[2] - count, None)
                self.tensors[f"{stream}_codes"][row, :, start : start + count] = codes[row, :, new]
                self.tensors[f"{stream}_scale"][row, :, start : start + count] = scale[row, :, new]
        self.row_lengths = [start + count for start, count in zip(self.row_lengths, counts, strict=True)]

    def tokens(self, row: int) -> tuple[Tensor, Tensor]:
        held = slice(self.row_lengths[row])
        key, value = (
            unpack(
                self.tensors[f"{stream}_codes"][row, :, held],
                self.tensors[f"{stream}_scale"][row, :, held],
                self.shared["levels"],
            )
            for stream in ("key", "value")
        )
        return key, value

    def attend(self, query: Tensor, scale: float, fresh: Fresh | None = None) -> Tensor:
        heads, length = self.shape.num_kv_heads, query.shape[2]
        out = query.new_zeros(*query.shape[:3], self.shape.value_dim)
        for row in range(self.batch_size):
            grouped = query[row : row + 1].reshape(1, heads, -1, self.shape.key_dim)
            state = Partial(grouped, self.shape.value_dim, scale)
            if self.row_lengths[row]:
                state.add(*(x[None] for x in self.tokens(row)))
            real = torch.ones(length, dtype=torch.bool, device=query.device)
            if fresh is not None:
                at = torch.arange(length, device=query.device)
                real = at >= length - (length if fresh[2] is None else fresh[2][row])
                causal = (at <= at[:, None]) & real
                state.add(
                    fresh[0][row : row + 1], fresh[1][row : row + 1], causal.repeat(grouped.shape[2] // length, 1)
                )
            got = state.result().reshape(query.shape[1], length, -1)
            out[row] = torch.where(real[:, None], got, 0.0).to(query.dtype)
        return out

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        steps: Steps,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        query, key = embedded(query, key, rotary, steps.positions)
        self.append(key, value)
        return self.attend(query, scale)

    def crop(self, num_tokens: int) -> None:
        drop = max(0, max(self.row_lengths) - num_tokens)
        self.row_lengths = [max(0, length - drop) for length in self.row_lengths]


def read_back(method: Int6, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """By other code than the layer's: no bytes."""
    out = []
    for x in (key, value):
        scale = (x.abs().amax(-1, keepdim=True) / 31).half().float()
        out.append((x * torch.where(scale > 0, 1 / scale, 0.0)).round().clamp(-32, 31) * scale)
    return out[0], out[1]


ROOM = Room(layer=Int6Layer, read_back=read_back, examples=(Int6(),), shared=levels)
