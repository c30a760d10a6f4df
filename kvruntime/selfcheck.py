"""Both caches exercised on this machine: results against an independent oracle, shapes, bytes, and the whole path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from kvruntime.bench.harness.weigh import weigh
from kvruntime.checkpoints.load import pick_device
from kvruntime.eval.axes import CHANNEL, TOKEN, fake_quantize
from kvruntime.methods.full.cache import FullLayer
from kvruntime.methods.kivi.cache import KiviLayer
from kvsim.layout import LayerShape, Method, nbytes
from kvsim.methods import Full, Kivi

SHAPES = ((LayerShape(2, 64, 64), 4), (LayerShape(1, 128, 128), 8))
"""``(layer, query heads)``: plain and grouped queries."""

BATCH, PROMPT, STEPS = 2, 150, 70
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-2}
"""Of attention, for values of order 1: float32 on a CPU, float16 on a GPU."""
LOGITS = {"cpu": 1e-3, "cuda": 5e-2}
"""Of logits: what storing keys and values in float16 may change."""

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
    for shape, heads in SHAPES:
        layers: list[Full | Kivi] = [Full(), *(Kivi(nbits=bits, residual_length=64) for bits in (2, 4, 8))]
        for method in layers:
            name = f"{method.name}, {heads} query heads on {shape.num_kv_heads} of {shape.key_dim}"
            yield name, partial(_layer, method, shape, heads, device)
    for cache in (Full(), Kivi(residual_length=32)):
        yield f"{cache.name} under generate()", partial(_generate, cache, device)


def _layer(method: Full | Kivi, shape: LayerShape, num_q_heads: int, device: torch.device) -> str:
    """A prompt, then one token at a time; the layer's attention against float64 over what it should hold."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    total = PROMPT + STEPS
    key, value = (
        torch.randn(BATCH, shape.num_kv_heads, total, dim, generator=generator).half()
        for dim in (shape.key_dim, shape.value_dim)
    )
    query = torch.randn(BATCH, num_q_heads, 1, shape.key_dim, generator=generator).half()
    kind = FullLayer if isinstance(method, Full) else KiviLayer
    layer = kind(method, shape, BATCH, total, device)  # type: ignore[arg-type]
    scale = shape.key_dim**-0.5
    worst = 0.0
    for stop in [PROMPT, *range(PROMPT + 1, total + 1)]:
        start = layer.row_lengths[0]
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
    if isinstance(layer, KiviLayer) and device.type == "cuda":
        _same_words(layer, key, value)
    size = nbytes(method.buffers(shape, BATCH, total))
    if weigh(layer) != size:
        raise ValueError(f"holds {weigh(layer)} B, predicted {size}")
    words = ", words as the reference's" if device.type == "cuda" and isinstance(layer, KiviLayer) else ""
    return f"error {worst:.0e}, {size:,} B as predicted{words}"


def _oracle(method: Full | Kivi, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention in float64 over keys and values quantized by other code than the layer's."""
    if isinstance(method, Kivi):
        packed = method.num_packed(key.shape[2])
        old_key = fake_quantize(key[:, :, :packed].float(), method.k_bits, int(method.k_group), CHANNEL)
        old_value = fake_quantize(value[:, :, :packed].float(), method.v_bits, int(method.v_group), TOKEN)
        key, value = (torch.cat([old, x[:, :, packed:].float()], 2) for old, x in ((old_key, key), (old_value, value)))
    q_per_kv = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(q_per_kv, 1) for x in (key, value))
    return ((query.double() @ key.transpose(2, 3)) * scale).softmax(-1) @ value


def _same_words(layer: KiviLayer, key: Tensor, value: Tensor) -> None:
    twin = KiviLayer(layer.method, layer.shape, layer.batch_size, layer.max_seq_len, "cpu")
    twin.append(key[:, :, :PROMPT], value[:, :, :PROMPT])
    for token in range(PROMPT, key.shape[2]):
        twin.append(key[:, :, token : token + 1], value[:, :, token : token + 1])
    count = max(layer.row_packed) // layer.method.record_length
    wrong = (layer.tensors["records"][:, :count].cpu() != twin.tensors["records"][:, :count]).sum().item()
    if wrong:
        raise ValueError(f"{wrong} packed words differ from the reference's")


def _generate(method: Method, device: torch.device) -> str:
    """A tiny random Llama under ``model.generate``: the cache against stock transformers, and its bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

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
    settings = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        want = model.generate(ids, **settings)
        cache = make_cache(model, method, max_seq_len=64)
        have = model.generate(ids, **argument(cache), **settings)
    # all 24 prompt tokens are exact: the first decoded steps must agree whatever the method
    off = max((a - b).abs().max().item() for a, b in zip(want.logits[:2], have.logits[:2], strict=True))
    if not off <= LOGITS[device.type]:
        raise ValueError(f"logits are off by {off:.1e} before anything was packed")
    size = sum(nbytes(method.buffers(shape, BATCH, 64)) for shape in layer_shapes(model))
    if not weigh(cache) == cache.nbytes == size:
        raise ValueError(f"holds {weigh(cache)} B, says {cache.nbytes}, predicted {size}")
    return f"logits within {off:.0e} of transformers' own, {size:,} B as predicted"
