"""Bytes, and MB/s of writing and reading, of prefixes in files (:mod:`kvruntime.prefix_store`): Llama-3-8B's shape.

    python prefix-store.py FOLDER cuda 8192 kivi:group_size=64 kivi kivi:nbits=4 bf16   # in memory: /dev/shm/...

Prints a JSON line a method: the file's bytes and the times of 16 bits; the median of three writes and of three reads
with each byte checked, in the file's bytes; milliseconds from the file, unchecked, to pages of an engine on the device.
A file that was just written is read from the page cache.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from statistics import median

import torch

from kvruntime import paged
from kvruntime.prefix_store import LayerPrefix, PrefixStore, to_pages
from kvsim.layout import LayerShape
from kvsim.specs import parse_method

LAYERS, SHAPE, TURNS = 32, LayerShape(8, 128, 128), 3
folder, device, length = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
tokens = list(range(length))
generator = torch.Generator().manual_seed(0)
plain = LAYERS * length * SHAPE.num_kv_heads * (SHAPE.key_dim + SHAPE.value_dim) * 2


def held_of(method):
    page, packed = paged.page_shape(method, SHAPE), paged.num_packed(method, length)
    records = None
    if page.record_tokens:
        size = packed // page.record_tokens, SHAPE.num_kv_heads, page.record_nbytes // SHAPE.num_kv_heads // 4
        records = torch.randint(-(2**31), 2**31, size, dtype=torch.int32, generator=generator)
    key, value = (torch.randn(length - packed, 8, 128, generator=generator).bfloat16() for _ in range(2))
    return LayerPrefix(records, key, value)


def timed(act):
    seconds = []
    for _ in range(TURNS):
        start = time.perf_counter()
        act()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def measured(method):
    store = PrefixStore(folder / method.name, method, [SHAPE] * LAYERS, "Llama-3-8B's shape")
    layers, asked = [held_of(method)] * LAYERS, [*tokens, 0]
    write = timed(lambda: store.put(tokens, layers))
    size = store.path(tokens).stat().st_size
    read = timed(lambda: store.get(asked))
    page = paged.page_shape(method, SHAPE)
    blocks = torch.arange(-(-length // page.record_tokens) if page.record_tokens else 0, device=device)
    places = torch.arange(-(-length // page.exact_tokens), device=device)
    words = page.record_nbytes // SHAPE.num_kv_heads // 4
    pool = torch.zeros(len(blocks), SHAPE.num_kv_heads, words, dtype=torch.int32, device=device)
    exact = torch.zeros(len(places), SHAPE.num_kv_heads, page.exact_tokens, 256, dtype=torch.bfloat16, device=device)
    pages = paged.Pages(pool if page.record_tokens else None, *exact.split(128, 3))

    def load():
        for held in store.get(asked, device, check=False).layers:
            to_pages(method, held, pages, blocks, places, length)

    told = {"method": method.name, "tokens": length, "bytes": size, "times smaller": round(plain / size, 2)}
    told |= {"write MB/s": round(size / write / 1e6), "read MB/s": round(size / read / 1e6)}
    told["to pages ms"] = round(1e3 * timed(load), 1)
    shutil.rmtree(store.folder)
    return told | {"device": device}


for spec in sys.argv[4:]:
    print(json.dumps(measured(parse_method(spec, {}, "bfloat16"))), flush=True)
