"""Every cache exercised on this machine: results against an independent oracle, shapes, bytes, and the whole path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from kvruntime.bench.harness.weigh import weigh
from kvruntime.checkpoints.load import pick_device
from kvruntime.methods import LAYERS, Layer, make_layer, room_of
from kvsim.layout import LayerShape, Method, nbytes, shared_buffers

SHAPES = ((LayerShape(2, 64, 64), 4), (LayerShape(1, 128, 128), 8))
"""``(layer, query heads)``: plain and grouped queries."""

BATCH, PROMPT, STEPS = 2, 150, 70
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-2}
"""Of attention, for values of order 1: float32 on a CPU, float16 on a GPU."""
LOGITS = {"cpu": 1e-3, "cuda": 5e-2}
"""Of logits: what rounding may change."""

Check = tuple[str, Callable[[], str]]


def selfcheck(device: str | None = None, say: Callable[[str], None] = print) -> bool:
    """Runs every check, one line each; True when all hold.  Under a minute."""
    where = torch.device(pick_device(device))
    path = "Triton kernels" if where.type == "cuda" else "PyTorch reference (the Triton kernels need a GPU)"
    say(f"device: {where} {torch.cuda.get_device_name(where) if where.type == 'cuda' else ''}".rstrip())
    say(f"path: {path}")
    failures = 0
    for name, check in checks(where):
        start = perf_counter()
        try:
            detail = check()
        except Exception as error:  # whatever it is, it is what this command is for
            failures += 1
            say(f"FAIL  {name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        else:
            say(f"ok    {name}: {detail} ({perf_counter() - start:.1f} s)")
    say("all checks passed" if not failures else f"{failures} checks failed")
    return not failures


def checks(device: torch.device) -> Iterator[Check]:
    """``(name, check)``: a check returns a detail or raises."""
    rooms = list(LAYERS.values())
    for shape, heads in SHAPES:
        for method in (example for room in rooms for example in room.examples):
            name = f"{method.name}, {heads} query heads on {shape.num_kv_heads} of {shape.key_dim}"
            yield name, partial(_layer, method, shape, heads, device)
    for room in rooms:
        method = room.examples[0]
        yield f"{method.name} under generate()", partial(_generate, method, device)


def _layer(method: Method, shape: LayerShape, num_q_heads: int, device: torch.device) -> str:
    """A prompt, then one token at a time; the layer's attention against float64 over what it should hold."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    total = PROMPT + STEPS
    key, value = (
        torch.randn(BATCH, shape.num_kv_heads, total, dim, generator=generator).half()
        for dim in (shape.key_dim, shape.value_dim)
    )
    query = torch.randn(BATCH, num_q_heads, 1, shape.key_dim, generator=generator).half()
    layer = make_layer(method, shape, BATCH, total, device)
    scale = shape.key_dim**-0.5
    worst = 0.0
    for stop in [PROMPT, *range(PROMPT + 1, total + 1)]:
        start = layer.seq_lengths[0]
        fresh = (x[:, :, start:stop].to(device, dtype) for x in (key, value))
        layer.append(*fresh)
        if stop in (PROMPT, PROMPT + 1, total):
            out = layer.attend(query.to(device, dtype), scale).cpu().double()
            want = _oracle(method, query, key[:, :, :stop], value[:, :, :stop], scale)
            worst = max(worst, (out - want).abs().max().item())
    if not worst <= TOLERANCE[device.type]:
        raise ValueError(f"attention is off by {worst:.1e}, more than {TOLERANCE[device.type]:.0e}")
    predicted = {b.name: (b.shape, b.dtype) for b in method.buffers(shape, BATCH, total)}
    have = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in layer.tensors.items()}
    if have != predicted:
        raise ValueError(f"buffers are {have}, predicted {predicted}")
    size = nbytes(method.buffers(shape, BATCH, total)) + nbytes(shared_buffers(method, [shape]))
    if weigh(layer) != size:
        raise ValueError(f"holds {weigh(layer)} B, predicted {size}")
    same = ""
    if device.type == "cuda":
        _reads_as_the_reference(layer, key, value)
        same = ", reads back as the reference"
    return f"error {worst:.0e}, {size:,} B as predicted{same} ({layer.kernel})"


def _oracle(method: Method, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention in float64 over keys and values as the method's room reads them back: not the layer's own code."""
    key, value = room_of(method).read_back(method, key.float(), value.float())
    q_per_kv = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(q_per_kv, 1) for x in (key, value))
    return ((query.double() @ key.transpose(2, 3)) * scale).softmax(-1) @ value


def _reads_as_the_reference(layer: Layer, key: Tensor, value: Tensor) -> None:
    """The kernels stored what the PyTorch reference stores of the same tokens, bit for bit."""
    twin = make_layer(layer.method, layer.shape, layer.batch_size, key.shape[2], torch.device("cpu"))
    twin.append(key[:, :, :PROMPT], value[:, :, :PROMPT])
    for token in range(PROMPT, key.shape[2]):
        twin.append(key[:, :, token : token + 1], value[:, :, token : token + 1])
    for row in range(layer.batch_size):
        for mine, its in zip(layer.tokens(row), twin.tokens(row), strict=True):
            wrong = (mine.cpu() != its).sum().item()
            if wrong:
                raise ValueError(f"{wrong} numbers read back differ from the reference's")


def _generate(method: Method, device: torch.device) -> str:
    """A tiny random Llama under ``model.generate``: the cache against stock transformers, and its bytes."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    from kvruntime import make_cache
    from kvruntime.hf.cache import argument
    from kvruntime.hf.models import layer_shapes

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 256}
    config = LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=256
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    model.generation_config.pad_token_id = 0
    model.to(device, torch.float16 if device.type == "cuda" else torch.float32)
    ids = torch.randint(256, (BATCH, 24), generator=torch.Generator().manual_seed(0)).to(device)
    ids, newest = ids[:, :-2], ids[:, -2:]  # several at once see each other as they are, whatever the method
    with torch.inference_mode():
        cache, stock = make_cache(model, method, max_seq_len=64), DynamicCache()
        model(ids, **argument(cache))
        for index, (key, value, _) in enumerate(cache):
            stock.update(key, value, index)
        have, want = (model(newest, **argument(each)).logits for each in (cache, stock))
        off = (have - want).abs().max().item()
        cache.reset()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=42, do_sample=False, **argument(cache))
    if not off <= LOGITS[device.type]:
        raise ValueError(f"logits are off by {off:.1e} from transformers' own over what the cache says that it holds")
    shapes = layer_shapes(model)
    size = sum(nbytes(method.buffers(shape, BATCH, 64)) for shape in shapes) + nbytes(shared_buffers(method, shapes))
    held = weigh(cache) - cache.step_nbytes
    if not held == cache.nbytes == size:
        raise ValueError(f"holds {held} B, says {cache.nbytes}, predicted {size}")
    return f"logits within {off:.0e} of transformers' own over what it holds, {size:,} B as predicted"
