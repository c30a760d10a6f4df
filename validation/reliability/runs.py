"""The runs that stay in one process.  Each takes a device and a scale, and returns what it found or raises.

``Broken`` is a promise that was not kept; whatever else is raised is one too, told by its type.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvruntime import make_cache
from kvruntime.engine import Engine
from kvruntime.hf.cache import argument
from kvruntime.methods import Layer, make_layer, room_of
from kvruntime.methods.rows import free_nbytes
from kvsim.layout import LayerShape, Method, nbytes, shared_buffers
from validation.reliability import subjects
from validation.reliability.findings import Broken, Findings, each
from validation.reliability.subjects import Scale

DRIFT = {"cpu": 1e-4, "cuda": 4e-2}
"""Of logits, by norms: what rounding may change; in bfloat16 two ways of computing one step differ by 1e-2 to 2e-2."""
GROWTH = 2.0
"""Times the first error, and a quarter of what is allowed: what the last may be."""
ATTENTION = {"cpu": 5e-4, "cuda": 1e-2}
"""Of attention: an exact token that is rotated before it is stored may round to the neighbouring number of 16 bits."""


def decoded(device: torch.device, scale: Scale) -> Findings:
    """Two rows decode ``scale.decoded`` tokens each with every layout.

    Held: the cache's bytes at the end, to the byte; the engine's logits at about a hundredth, a tenth and the end of
    the way, against the model's own forward over the tokens that the cache says that it holds (dequantized): an error
    that grew on the way would show.
    """
    model = subjects.model(device, scale, positions=scale.decoded + 64)
    return each(subjects.layouts(device, scale), lambda method: _decoded(model, method, device, scale))


def _decoded(model: Any, method: Method, device: torch.device, scale: Scale) -> Findings:
    engine = Engine(model, method, batch_size=2, max_seq_len=scale.decoded + 32)
    generator = torch.Generator().manual_seed(0)
    engine.prefill(torch.randint(1, 512, (2, 16), generator=generator))
    stops = sorted({max(8, scale.decoded // 100), max(16, scale.decoded // 10), scale.decoded})
    errors, done = [], 0
    for stop in stops:
        while done < stop - 1:
            engine.step()
            done += 1
        errors.append(_drift(model, engine))
        done += 1
    lengths = engine.positions.tolist()
    if lengths != [16 + done] * 2 or engine.lengths != lengths:
        raise Broken(f"rows hold {lengths}, {engine.lengths} by the host, not {16 + done}")
    shapes = [layer.store.shape for layer in engine.cache.layers]
    predicted = sum(nbytes(method.buffers(shape, 2, scale.decoded + 32)) for shape in shapes)
    predicted += nbytes(shared_buffers(method, shapes))
    if engine.nbytes != predicted:
        raise Broken(f"{engine.nbytes:,} B, predicted {predicted:,}")
    if max(errors) > DRIFT[device.type]:
        raise Broken(f"logits are off by {', '.join(f'{e:.1e}' for e in errors)} at {stops}")
    if errors[-1] > GROWTH * errors[0] + DRIFT[device.type] / 4:
        raise Broken(f"the error of the logits grows: {', '.join(f'{e:.1e}' for e in errors)} at {stops}")
    told = " ".join(f"{e:.0e}" for e in errors)
    return Findings(f"{done:,} tokens a row, {predicted:,} B exact, logits off by {told}")


@torch.inference_mode()
def _drift(model: Any, engine: Engine) -> float:
    """How far one step's logits are from the model's own over what the cache holds after it, the step's own token among
    it, by norms; the step is taken."""
    engine.cache.settle() if hasattr(engine.cache, "settle") else None
    tokens, positions = engine.tokens.clone(), engine.positions.long().clone()
    engine.step()
    found = engine.logits.float()
    for layer in engine.cache.layers:
        layer.store.catch_up(engine.positions)
    held = [[layer.store.tokens(row) for row in range(2)] for layer in engine.cache.layers]
    worst = 0.0
    for row in range(2):
        stock = _as_stored([tuple(x[None].to(model.dtype) for x in rows[row]) for rows in held])
        want = model(tokens[row, None, None], position_ids=positions[row, None, None], **argument(stock)).logits[0, -1]
        worst = max(worst, ((found[row] - want.float()).norm() / want.float().norm()).item())
    return worst


def _as_stored(held: list[Any]) -> Any:
    """A stock cache of all but the newest of ``held``, keys and values a layer; the newest is attended to as it was
    stored, whatever the model brings."""
    from transformers import DynamicCache

    class AsStored(DynamicCache):  # type: ignore[misc]
        def update(self, key: Any, value: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            return held[layer_idx]

    stock = AsStored()
    for index, (key, value) in enumerate(held):
        DynamicCache.update(stock, key[:, :, :-1], value[:, :, :-1], index)
    return stock


def out_of_memory(device: torch.device, scale: Scale) -> Findings:
    """Memory ends in a prompt and while a cache grows: one line that says what would have fitted, that much does fit,
    and after ``reset()`` the cache answers as a new one.  On a GPU: memory is held until little is left."""
    cuda = device.type == "cuda"
    model = subjects.model(device, scale, positions=1 << 20 if cuda else 1024)
    work = _out_of_memory if cuda else _out_of_pretended_memory
    return each(subjects.layouts(device, scale), lambda method: work(model, method, device))


def _out_of_memory(model: Any, method: Method, device: torch.device) -> Findings:
    short = torch.randint(1, 512, (4, 40), generator=torch.Generator().manual_seed(1)).to(device)
    want = _answer(model, make_cache(model, method), short)
    cache = make_cache(model, method)
    _answer(model, cache, short)
    cache.reset()
    hostage = _hold_all_but(device, 96 << 20)
    try:
        asked = make_cache(model, method, max_seq_len=1 << 19)
        prompt = _fits(_refused(partial(_answer, model, asked, short)))
        message = _refused(partial(_provide, cache, 1 << 19))
        fits = _fits(message)
        _provide(cache, fits)  # raises where the message promised too much
        grown = _ended(partial(_grow, model, cache, short, 1 << 19))
    finally:
        del hostage
        torch.cuda.empty_cache()
    for used in (cache, asked):
        used.reset()
        if not torch.equal(_answer(model, used, short), want):
            raise Broken("after reset() the cache answers otherwise than a new one")
    told = f"{prompt:,} tokens would have fitted before a prompt and {fits:,} in growth, and did"
    return Findings(f"{told}; prompts in pieces ended with: {grown[:60]}")


def _out_of_pretended_memory(model: Any, method: Method, device: torch.device) -> Findings:
    """The same where no memory can be taken away: allocations fail as PyTorch's would."""
    from kvruntime.methods import rows

    real = rows.grown
    short = torch.randint(1, 512, (2, 40), generator=torch.Generator().manual_seed(1))
    want, cache = _answer(model, make_cache(model, method), short), make_cache(model, method)
    _answer(model, cache, short)
    try:
        rows.grown = _no_memory  # type: ignore[assignment]
        message = _refused(partial(_provide, cache, 4096))
    finally:
        rows.grown = real
    cache.reset()
    if not torch.equal(_answer(model, cache, short), want):
        raise Broken("after reset() the cache answers otherwise than a new one")
    return Findings(f"{_fits(message):,} tokens would have fitted")


def _provide(cache: Any, num_tokens: int) -> None:
    for layer in cache.layers:
        layer.store.provide(num_tokens)


def _no_memory(*_: Any) -> Tensor:
    raise torch.OutOfMemoryError("pretended")


def _hold_all_but(device: torch.device, left: int) -> list[Tensor]:
    """Tensors that leave ``left`` bytes of the device free."""
    torch.cuda.empty_cache()
    held, most = [], 8 << 30
    while (there := free_nbytes(device)) > left + (32 << 20) and most > (1 << 20):
        try:
            held.append(torch.empty(min(there - left, most), dtype=torch.uint8, device=device))
        except torch.OutOfMemoryError:
            most //= 2
    return held


def _ended(work: Callable[[], Any]) -> str:
    """What was said where memory ended: by the cache, or by PyTorch where the model's own tensors did not fit."""
    try:
        work()
    except torch.OutOfMemoryError as error:
        said = str(error)
        return said if "would have fitted" in said else f"the model's own tensors: {said.splitlines()[0]}"
    raise Broken("memory ended and nothing was said")


def _refused(work: Callable[[], Any]) -> str:
    try:
        work()
    except torch.OutOfMemoryError as error:
        if len(str(error).splitlines()) != 1 or "would have fitted" not in str(error):
            raise Broken(f"the error does not say what would have fitted: {str(error)[:120]}") from error
        return str(error)
    raise Broken("memory ended and nothing was said")


def _fits(message: str) -> int:
    found = re.search(r"held: ([\d,]+) tokens a row would have fitted", message)
    if found is None:
        raise Broken(f"no number of tokens in: {message}")
    return int(found[1].replace(",", ""))


@torch.inference_mode()
def _grow(model: Any, cache: Any, ids: Tensor, most: int) -> None:
    """Chunks of a prompt until memory ends."""
    cache.reset()
    done = 0
    while done < most:
        chunk = ids.repeat(1, 64)
        model(chunk, position_ids=torch.arange(done, done + chunk.shape[1], device=ids.device)[None], **argument(cache))
        done += chunk.shape[1]


def _answer(model: Any, cache: Any, ids: Tensor) -> Tensor:
    out: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, **argument(cache)
    )
    return out


def beside_nan(device: torch.device, scale: Scale) -> Findings:
    """A row whose keys and values are NaN from the first token, or from the middle on: the others' attention stays
    bit for bit what it is without, prompts and single tokens, with every layout of every room."""
    return each(subjects.every_layout(scale), lambda method: _beside_nan(method, device, scale))


def _beside_nan(method: Method, device: torch.device, scale: Scale) -> Findings:
    count = 0
    for start in scale.nan_starts:
        clean, dirty = (_outputs(method, device, nan_from) for nan_from in (None, start))
        for one, other in zip(clean, dirty, strict=True):
            if not torch.equal(one[[0, 2]], other[[0, 2]]):
                raise Broken(f"NaN from token {start} of a row changes its neighbours")
            if not one.isfinite().all():
                raise Broken(f"{(~one.isfinite()).sum()} numbers that are not finite without any NaN")
            count += one.shape[0] - 1
    return Findings(f"{count:,} rows beside one of NaN as without it")


def _outputs(method: Method, device: torch.device, nan_from: int | None) -> list[Tensor]:
    """Attention after a prompt of 200 tokens a row and after each of 40 more, three rows."""
    shape, heads = LayerShape(2, 64, 64), 4
    layer = make_layer(method, shape, 3, None, device)
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(3, 2, 240, 64, generator=generator).half() for _ in range(2))
    if nan_from is not None:
        key[1, :, nan_from:], value[1, :, nan_from:] = float("nan"), float("nan")
    query = torch.randn(3, heads, 1, 64, generator=generator).half()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    key, value, query = (x.to(device, dtype) for x in (key, value, query))
    out = []
    for first, last in [(0, 200), *((token, token + 1) for token in range(200, 240))]:
        layer.append(key[:, :, first:last], value[:, :, first:last])
        out.append(layer.attend(query, 0.125).cpu())
    return out


def fuzzed(device: torch.device, scale: Scale) -> Findings:
    """Random sequences of calls on layers of every layout: chunks and single tokens of ragged rows, crops, reordered
    rows, reset.  After each call: lengths, tensors and bytes as predicted; attention against float64 over what the
    layer reads back, and that against the room's oracle, which quantizes the exact tokens by other code.

    A crop leaves packed what was packed; from then on the oracle holds what was read back before it.
    """
    every = [method.name for method in subjects.every_layout()]
    numbers: dict[str, list[int]] = {name: [] for name in every}
    for number in range(scale.sequences):
        numbers[every[number % len(every)]].append(number)
    return each(subjects.every_layout(scale), lambda method: _fuzzed(method, numbers[method.name], device, scale))


def _fuzzed(method: Method, numbers: Sequence[int], device: torch.device, scale: Scale) -> Findings:
    """The sequences of these numbers, each drawn from its own."""
    calls, worst = 0, 0.0
    for number in numbers:
        draw = random.Random(number)
        heads, dim = draw.choice(scale.shapes)
        shape = LayerShape(heads, dim, dim)
        try:
            method.buffers(shape, 1, 1)
        except ValueError:
            shape = LayerShape(1, 64, 64)
        own = CallSequence(method, shape, draw.choice(scale.batches), device, draw)
        try:
            for _ in range(draw.randint(2, scale.calls)):
                own.call()
                worst = max(worst, own.check())
                calls += 1
        except Exception as error:
            last = ", ".join(own.log[-6:])
            raise Broken(f"sequence {number}, after {last}: {type(error).__name__}: {error}") from error
    return Findings(f"{len(numbers):,} sequences, {calls:,} calls, attention off by at most {worst:.0e}")


TOKEN = {"cpu": 1e-3, "cuda": 5e-3}
"""Of a token read back, by norms: more is another code."""
TIES = 1e-3
"""Share of the tokens that may have another code, besides two."""


class CallSequence:
    """One layer, and the exact tokens that it was given, row by row."""

    def __init__(self, method: Method, shape: LayerShape, batch_size: int, device: torch.device, draw: Any) -> None:
        self.method, self.shape, self.device, self.draw = method, shape, device, draw
        self.layer: Layer = make_layer(method, shape, batch_size, None, device)
        self.generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
        self.rows = [self._none() for _ in range(batch_size)]
        self.judged = [True] * batch_size
        self.log: list[str] = []

    def _none(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.shape.num_kv_heads, 0, self.shape.key_dim), torch.zeros(
            self.shape.num_kv_heads, 0, self.shape.value_dim
        )

    def call(self) -> None:
        """One call at random."""
        names = ["append"] * 4 + ["single"] * 4 + ["crop", "reorder", "reset"]
        name = self.draw.choice(names if any(row[0].shape[1] for row in self.rows) else names[:8])
        getattr(self, f"_{name}")()

    def _append(self) -> None:
        size = self.draw.choice((1, 2, 7, 33, 64, 130, 300))
        counts = [self.draw.randint(1, size) for _ in self.rows]
        counts[self.draw.randrange(len(counts))] = size
        self._give(size, counts)

    def _single(self) -> None:
        for _ in range(self.draw.choice((1, 5, 40))):
            self._give(1, [1] * len(self.rows))

    def _give(self, size: int, counts: list[int]) -> None:
        heads, batch_size = self.shape.num_kv_heads, len(self.rows)
        key, value = (
            torch.randn(batch_size, heads, size, dim, generator=self.generator).half()
            for dim in (self.shape.key_dim, self.shape.value_dim)
        )
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        whole = min(counts) == size
        self.layer.append(key.to(self.device, dtype), value.to(self.device, dtype), None if whole else counts)
        for row, count in enumerate(counts):
            first, second = (x[row, :, size - count :].float() for x in (key, value))
            held = self.rows[row]
            self.rows[row] = torch.cat([held[0], first], 1), torch.cat([held[1], second], 1)
        self.log.append(f"append({size}, {counts})")

    def _crop(self) -> None:
        if not self.layer.is_croppable:
            return
        longest, drop = max(self.layer.row_lengths), self.draw.randint(1, 8)
        try:
            self.layer.crop(longest - drop)
        except ValueError:
            return  # packed already: nothing may have changed, which the check holds
        self.rows = [(key[:, : key.shape[1] - drop], value[:, : value.shape[1] - drop]) for key, value in self.rows]
        self.judged = [False] * len(self.rows)
        self.log.append(f"crop({longest - drop})")

    def _reorder(self) -> None:
        index = [self.draw.randrange(len(self.rows)) for _ in self.rows]
        self.layer.reorder(torch.tensor(index))
        self.rows = [self.rows[row] for row in index]
        self.judged = [self.judged[row] for row in index]
        self.log.append(f"reorder({index})")

    def _reset(self) -> None:
        self.layer.reset()
        self.rows = [self._none() for _ in self.rows]
        self.judged = [True] * len(self.rows)
        self.log.append("reset()")

    def check(self) -> float:
        """Raises ``Broken`` where the layer is not what it should be; how far its attention is off."""
        lengths = [row[0].shape[1] for row in self.rows]
        if list(self.layer.seq_lengths) != lengths:
            raise Broken(f"rows hold {self.layer.seq_lengths}, not {lengths}")
        self._weigh()
        if not min(lengths):
            return 0.0
        heads = self.shape.num_kv_heads * 2
        query = torch.randn(len(self.rows), heads, 1, self.shape.key_dim, generator=self.generator).half()
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        scale = self.shape.key_dim**-0.5
        have = self.layer.attend(query.to(self.device, dtype), scale).cpu().double()
        worst = 0.0
        for row in range(len(self.rows)):
            read = tuple(x.cpu().float() for x in self.layer.tokens(row))
            self._judge(row, read)
            key, value = (x.double().repeat_interleave(2, 0) for x in read)
            want = ((query[row].double() @ key.transpose(1, 2)) * scale).softmax(-1) @ value
            worst = max(worst, (have[row] - want).abs().max().item())
        if not worst <= ATTENTION[self.device.type]:
            raise Broken(f"attention is off by {worst:.1e}")
        return worst

    def _weigh(self) -> None:
        have = {name: tuple(tensor.shape) for name, tensor in self.layer.tensors.items()}
        want = {b.name: b.shape for b in self.method.buffers(self.shape, len(self.rows), self.layer.num_provided)}
        if have != want:
            raise Broken(f"tensors are {have}, predicted {want}")

    def _judge(self, row: int, read: tuple[Tensor, ...]) -> None:
        """Raises ``Broken`` where what is attended to is not what the room's oracle says of the exact tokens.

        A number midway between two codes may take either, by one way of computing or another: a few tokens may differ.
        """
        if not self.judged[row]:
            return
        try:
            oracle = room_of(self.method).read_back(self.method, *(x[None].half() for x in self.rows[row]))
        except ValueError:
            return  # the oracle knows no such layout
        for name, have, want in zip(("keys", "values"), read, oracle, strict=True):
            off = (have - want[0].float()).norm(dim=-1) / want[0].float().norm(dim=-1).clamp(min=1e-6)
            other = int((off > TOKEN[self.device.type]).sum())
            if other > TIES * off.numel() + 2:
                raise Broken(f"{other} of {off.numel():,} {name} of a row are not what they should be read back as")


RUNS: dict[str, Callable[[torch.device, Scale], Findings]] = {
    "decoded tokens": decoded,
    "out of memory": out_of_memory,
    "a row of NaN": beside_nan,
    "fuzzed calls": fuzzed,
}
