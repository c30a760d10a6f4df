"""Rows as ``bench kernels`` and ``bench engine`` record them, made up."""

from __future__ import annotations


def attention_rows() -> list[dict]:
    rows = [{"kind": "ceiling", "what": "read", "bandwidth": 3e12}]
    heads = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": "float16", "model": "llama-3-8b"}
    for batch, tokens in ((1, 8192), (1, 32768), (8, 32768)):
        size = {**heads, "batch_size": batch, "num_tokens": tokens, "ragged": False}
        flops, read = 4 * 32 * 128 * batch * tokens, 4096 * batch * tokens
        for name, slower in (("fp16-cudnn", 1.0), ("fp16-flash", 1.2)):
            seconds = slower * read / 2.8e12
            row = {
                "kind": "sdpa",
                **size,
                "method": name,
                "flops": flops,
                "nbytes_read": read,
                "seconds": [seconds] * 3,
            }
            rows.append(row)
        for name, times in (("kivi-2bit-g64-r64", 6.4), ("kivi-4bit-g64-r64", 3.6)):
            row = {"kind": "attend", **size, "method": name, "flops": flops, "nbytes_read": read / times}
            row |= {"seconds": [read / times / 2.6e12] * 3, "portable": False}
            rows.append(row)
    rows.append({**rows[-1], "portable": True, "seconds": [1.0] * 3})
    return rows


def step_rows() -> list[dict]:
    about = {"kind": "step", "model": "llama-3-8b", "weights": "random", "dtype": "bfloat16", "package": "kvruntime"}
    rows = []
    for context in (1024, 4096, 16384):
        for method, start, slope in (("bf16", 6e-3, 4e-8), ("kivi-2bit-g64-r64", 6.08e-3, 1e-8)):
            seconds = start + slope * context
            row = {
                **about,
                "method": method,
                "batch_size": 1,
                "num_tokens": context,
                "tokens_per_second": [1 / seconds] * 3,
            }
            rows.append(row | {"seconds_per_step": [seconds] * 3})
    return rows
