"""FullLayer against attention computed in float64 from a plain list of each row's tokens."""

from __future__ import annotations

import math

import pytest
import torch

from kvruntime.methods.full import cache
from kvruntime.methods.full.cache import FullLayer
from kvruntime.methods.rows import GROW_TOKENS
from kvsim.layout import LayerShape, nbytes
from kvsim.methods import Full


def expected(query, rows, scale, fresh_lengths=None):
    """In float64; rows[b] = (keys [H, n, D], values), the last fresh_lengths[b] of them causal to the queries."""
    batch, num_q_heads, length, _ = query.shape
    out = torch.zeros(batch, num_q_heads, length, rows[0][1].shape[-1], dtype=torch.float64)
    for b, (keys, values) in enumerate(rows):
        repeat = num_q_heads // keys.shape[0]
        keys, values = keys.double().repeat_interleave(repeat, 0), values.double().repeat_interleave(repeat, 0)
        count = fresh_lengths[b] if fresh_lengths else 1
        for i in range(length - count, length):
            seen = keys.shape[1] - (length - 1 - i)
            if seen > 0:
                weights = (query[b, :, i : i + 1].double() @ keys[:, :seen].transpose(1, 2) * scale).softmax(-1)
                out[b, :, i] = (weights @ values[:, :seen])[:, 0]
    return out


class Rows:
    """The same tokens as plain tensors, row by row."""

    def __init__(self, shape, batch_size, dtype):
        self.shape, self.dtype = shape, dtype
        self.rows = [
            (torch.zeros(shape.num_kv_heads, 0, shape.key_dim), torch.zeros(shape.num_kv_heads, 0, shape.value_dim))
            for _ in range(batch_size)
        ]

    def with_fresh(self, key, value, lengths):
        counts = [key.shape[2]] * len(self.rows) if lengths is None else lengths
        return [
            (torch.cat([k, key[b, :, key.shape[2] - c :]], 1), torch.cat([v, value[b, :, key.shape[2] - c :]], 1))
            for b, ((k, v), c) in enumerate(zip(self.rows, counts, strict=True))
        ]

    def append(self, key, value, lengths):
        store = getattr(torch, self.dtype)
        self.rows = self.with_fresh(key.to(store).float(), value.to(store).float(), lengths)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("q_per_kv", [1, 3])
@pytest.mark.parametrize("max_seq_len", [None, 300])
def test_append_and_attend_agree_with_float64(dtype, q_per_kv, max_seq_len, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK_TOKENS", 64)
    torch.manual_seed(0)
    shape = LayerShape(2, 16, 24)
    layer, rows = FullLayer(Full(dtype), shape, 3, max_seq_len), Rows(shape, 3, dtype)
    steps = [(40, [40, 7, 0]), (1, None), (70, None), (9, [9, 1, 0]), (1, [1, 1, 0]), (1, None)]
    steps += [(150, [3, 150, 20]), (1, None)]
    for length, lengths in steps:
        query = torch.randn(3, 2 * q_per_kv, length, 16)
        key, value = torch.randn(3, 2, length, 16), torch.randn(3, 2, length, 24)
        if length > 1:
            want = expected(query, rows.with_fresh(key, value, lengths), 0.3, lengths or [length] * 3)
            got = layer.attend(query, 0.3, (key, value, lengths))
            layer.append(key, value, lengths)
            rows.append(key, value, lengths)
        else:
            layer.append(key, value, lengths)
            rows.append(key, value, lengths)
            want = expected(query, rows.rows, 0.3)
            got = layer.attend(query, 0.3)
        assert got.dtype == query.dtype
        torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)
        held = [keys.shape[1] for keys, _ in rows.rows]
        assert layer.row_lengths == held
        assert layer.num_provided == (max_seq_len or GROW_TOKENS * math.ceil(max(held) / GROW_TOKENS))
        assert layer.nbytes == nbytes(Full(dtype).buffers(shape, 3, layer.num_provided))


def test_equal_rows_are_read_in_place():
    layer = FullLayer(Full("float32"), LayerShape(2, 8, 8), 2)
    key, value = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    layer.append(key, value)
    query = torch.randn(2, 4, 1, 8)
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.5, enable_gqa=True)
    torch.testing.assert_close(layer.attend(query, 0.5), want)


def test_reorder_crop_and_reset():
    layer = FullLayer(Full("float32"), LayerShape(1, 8, 8), 2)
    key, value = torch.randn(2, 1, 6, 8), torch.randn(2, 1, 6, 8)
    layer.append(key, value, [6, 4])
    layer.reorder(torch.tensor([1, 1, 0]))
    assert layer.row_lengths == [4, 4, 6]
    assert layer.nbytes == nbytes(layer.method.buffers(layer.shape, 3, layer.num_provided))
    torch.testing.assert_close(layer.tensors["key"][0, :, :4], key[1, :, 2:])
    layer.crop(3)
    assert layer.row_lengths == [1, 1, 3]
    torch.testing.assert_close(layer.tensors["value"][2, :, :3], value[0, :, :3])
    layer.crop(8)
    assert layer.row_lengths == [1, 1, 3]
    with pytest.raises(ValueError, match="cannot crop to 1 tokens: allowed are 2 and above"):
        layer.crop(1)
    layer.append(torch.full((3, 1, 2, 8), torch.nan), torch.full((3, 1, 2, 8), torch.nan))
    layer.reset()
    layer.append(torch.randn(3, 1, 4, 8), torch.randn(3, 1, 4, 8), [4, 1, 2])
    assert layer.attend(torch.randn(3, 1, 1, 8), 1.0).isfinite().all()


def test_bad_input_is_one_clear_error():
    layer = FullLayer(Full("float32"), LayerShape(1, 8, 8), 1, max_seq_len=4)
    with pytest.raises(ValueError, match="5 tokens do not fit: the cache was made for max_seq_len 4"):
        layer.append(torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8))
    assert layer.row_lengths == [0]
    with pytest.raises(ValueError, match="3 queries over stored tokens only"):
        layer.attend(torch.randn(1, 1, 3, 8), 1.0)
