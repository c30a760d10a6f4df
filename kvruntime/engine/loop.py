"""A lean loop over a fixed batch: prefill, then one step a token, which on CUDA is the replay of one graph.

The lengths of the rows lie in device memory, so a captured step holds for any of them; a graph is captured for each
power of four of tokens, because the splits of the attention are planned for so many.  Admission and preemption belong
to a serving engine, not here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvruntime.engine.decoders import lean as lean_decoder
from kvruntime.engine.greedy import greedy
from kvruntime.hf import make_cache
from kvruntime.hf.cache import AppendQueue, argument
from kvruntime.hf.models import layer_shapes, refuse_stages, tensor_ranks
from kvruntime.methods import Steps, room_of
from kvsim.engines.kvruntime import stored_shape
from kvsim.layout import Method
from kvsim.methods import in_order
from kvsim.methods.defaults import COMPRESSED

SMALLEST_BUCKET = 512
FILL_TOKENS = 8192
"""Random tokens that :meth:`Engine.fill` makes at a time."""
LAG = 2
"""Steps that the device is ahead of the host while text is generated."""


class Engine:
    """``batch_size`` sequences of at most ``max_seq_len`` tokens under one cache.

    ``method`` and ``options``: as :func:`kvruntime.make_cache` takes them (``"fp16"`` is the uncompressed engine).
    ``lean``: run a model of a known architecture by fused kernels (:mod:`kvruntime.engine.decoders`), else its own
    forward; both are captured alike.  The model's own ``forward`` stays as it is.

    Raises ``LookupError`` for an unknown method, ``ValueError`` for an option, a size or a model that cannot be run.
    """

    def __init__(
        self,
        model: Any,
        method: str | Method = COMPRESSED,
        *,
        batch_size: int,
        max_seq_len: int,
        lean: bool = True,
        **options: object,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: allowed are 1 and above")
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if limit is not None and max_seq_len > limit:
            raise ValueError(f"max_seq_len {max_seq_len}: allowed are up to the model's {limit} positions")
        self.model, self.batch_size, self.max_seq_len = model.eval(), batch_size, max_seq_len
        refuse_stages(model)
        self.cache = make_cache(model, method, max_seq_len=max_seq_len, compiled=False, **options)
        self.method, self.device = self.cache.method, next(model.parameters()).device
        shapes = layer_shapes(model)
        methods = in_order(self.method, shapes)
        if self.device.type == "cuda" and not room_of(methods[0]).layer.has_steps:  # type: ignore[attr-defined]
            raise ValueError(f"{self.method.name} has no step that the engine could capture in a CUDA graph")
        if any(stored_shape(method, shape) != shape for method, shape in zip(methods, shapes, strict=True)):
            raise ValueError(
                f"heads of {shapes[0].key_dim}: the engine takes those that {self.method.name} packs as they are"
            )
        for layer, shape in zip(self.cache.layers, shapes, strict=True):
            layer.make_store(shape, batch_size, self.device)
        self.decoder = lean_decoder(model) if lean else None
        self.tokens = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        """The tokens that the next step feeds, and after it those that it chose: the likeliest ones."""
        self.logits = torch.empty(batch_size, 0, dtype=model.dtype, device=self.device)
        """``[batch_size, vocab_size]`` after the newest prefill or step; the next one may write over it."""
        self.positions = torch.zeros(batch_size, dtype=torch.int32, device=self.device)
        q_heads = model.config.get_text_config(decoder=True).num_attention_heads // tensor_ranks(model)
        self._scratch = self.cache.stores[0].scratch(q_heads)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._lengths = [0] * batch_size

    @property
    def layers(self) -> str:
        """What runs the model's layers but attention."""
        return "the model's own modules" if self.decoder is None else "fused kernels"

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return self.cache.nbytes

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row holds."""
        return list(self._lengths)

    def reset(self) -> None:
        """Forget every token; buffers and graphs stay."""
        self.cache.reset()
        self.positions.zero_()
        self._lengths = [0] * self.batch_size

    @torch.inference_mode()
    def prefill(self, prompts: Sequence[Sequence[int]] | Tensor) -> Tensor:
        """Reads one prompt a row, of any lengths, and returns the logits after each: ``[batch_size, vocab_size]``.

        ``prompts``: token ids, lists or ``[batch_size, L]`` int64.  What the engine held before is forgotten.
        """
        rows = [list(row) for row in (prompts.tolist() if isinstance(prompts, Tensor) else prompts)]
        lengths = [len(row) for row in rows]
        self._check(lengths)
        self._capture(max(lengths))
        longest = max(lengths)
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=self.device)
        column = torch.arange(longest, device=self.device)
        padding = longest - torch.tensor(lengths, device=self.device)[:, None]
        mask = (column >= padding).long() if min(lengths) < longest else None
        self.reset()
        held = AppendQueue()
        for layer in self.cache.layers:
            layer.held = held
        try:
            out = self.model(
                ids,
                attention_mask=mask,
                position_ids=(column - padding).clamp(min=0),
                **argument(self.cache),
                use_cache=True,
                logits_to_keep=1,
            )
            held.store()
        finally:
            for layer in self.cache.layers:
                layer.held = None
        self._begin(lengths)
        self.logits = out.logits[:, -1]
        self.tokens.copy_(self.logits.argmax(-1))
        return self.logits

    @torch.inference_mode()
    def fill(self, num_tokens: int | Sequence[int], seed: int = 0) -> None:
        """Puts random normal keys and values into every layer, no forward: what a benchmark of decoding needs."""
        lengths = [num_tokens] * self.batch_size if isinstance(num_tokens, int) else list(num_tokens)
        self._check(lengths)
        self._capture(max(lengths))
        self.reset()
        generator = torch.Generator(self.device).manual_seed(seed)
        for layer in self.cache.layers:
            shape = layer.store.shape
            for first in range(0, max(lengths), FILL_TOKENS):
                size = min(FILL_TOKENS, max(lengths) - first)
                counts = [min(max(length - first, 0), size) for length in lengths]
                key, value = (
                    torch.randn(
                        (self.batch_size, shape.num_kv_heads, size, dim),
                        generator=generator,
                        device=self.device,
                        dtype=self.model.dtype,
                    )
                    for dim in (shape.key_dim, shape.value_dim)
                )
                layer.store.append(key, value, None if min(counts) == size else counts)
            layer.num_columns = max(lengths)
        self._begin(lengths)

    @torch.inference_mode()
    def step(self) -> None:
        """One token a row: feeds ``tokens``, leaves ``logits`` and the likeliest next ``tokens``.

        On CUDA it only starts the work.  Raises ``ValueError`` where a row is full.
        """
        longest = max(self._lengths) + 1
        if longest > self.max_seq_len:
            raise ValueError(f"a row of {longest - 1} tokens is full: the engine's max_seq_len is {self.max_seq_len}")
        if self.device.type == "cuda":
            graph, self.logits = self._graphs[min(bucket for bucket in self._graphs if bucket >= longest)]
            graph.replay()
        else:
            self.logits = self._forward(self.max_seq_len)
        self._lengths = [length + 1 for length in self._lengths]

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos: int | Sequence[int] = (),
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """New tokens of each row, ``max_new_tokens`` or up to and with the first of ``eos``.

        Greedy at ``temperature`` 0, else sampled from the ``top_k`` likeliest tokens that make up ``top_p`` of the
        probability.  ``on_token(row, token)`` is called as tokens come.
        """
        ends = {eos} if isinstance(eos, int) else set(eos)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {max_new_tokens}: allowed are 1 and above")
        self._check([len(prompt) + max_new_tokens - 1 for prompt in prompts])
        choose = _sampler(temperature, top_k, top_p, torch.Generator(self.device).manual_seed(seed))
        out: list[list[int]] = [[] for _ in prompts]
        running = set(range(self.batch_size))
        waiting: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

        def read() -> None:
            chosen, done = waiting.popleft()
            if done is not None:
                done.synchronize()
            for row, token in enumerate(chosen.tolist()):
                if row in running:
                    out[row].append(token)
                    if on_token is not None:
                        on_token(row, token)
                    if token in ends:
                        running.discard(row)

        self.prefill(prompts)
        for turn in range(max_new_tokens):
            if turn:
                self.step()
            if choose is not None:
                self.tokens.copy_(choose(self.logits))
            waiting.append(self._to_host())
            if len(waiting) > LAG:
                read()
            if not running:
                break
        while waiting:
            read()
        return out

    def _to_host(self) -> tuple[Tensor, torch.cuda.Event | None]:
        if self.device.type != "cuda":
            return self.tokens.clone(), None
        copy = torch.empty(self.batch_size, dtype=torch.int64, pin_memory=True)
        copy.copy_(self.tokens, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return copy, done

    def _check(self, lengths: list[int]) -> None:
        if len(lengths) != self.batch_size:
            raise ValueError(f"{len(lengths)} rows: the engine was made for a batch of {self.batch_size}")
        if min(lengths) < 1:
            raise ValueError("a row without a token: allowed are 1 and above")
        if max(lengths) > self.max_seq_len:
            raise ValueError(f"{max(lengths)} tokens do not fit: the engine's max_seq_len is {self.max_seq_len}")

    def _begin(self, lengths: list[int]) -> None:
        self._lengths = lengths
        self.positions.copy_(torch.tensor(lengths, dtype=torch.int32), non_blocking=True)

    def _forward(self, num_tokens: int) -> Tensor:
        """One step on the static tensors, in kernels alone: its logits.  Rows hold at most ``num_tokens``."""
        steps = Steps(self.positions, self.positions, self._scratch, num_tokens)
        if self.decoder is not None:
            logits = self.decoder(self.tokens, self.positions, self._attend(steps, self.decoder))
        else:
            for layer in self.cache.layers:
                layer.steps = steps
            try:
                logits = self.model(
                    self.tokens[:, None],
                    position_ids=self.positions[:, None].long(),
                    **argument(self.cache),
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
            finally:
                for layer in self.cache.layers:
                    layer.steps = None
        logits = logits.contiguous()
        if logits.is_cuda:
            greedy(logits, self.tokens, self.positions)
        else:
            torch.argmax(logits, -1, out=self.tokens)
            self.positions += 1
        return logits

    def _attend(self, steps: Steps, decoder: Any) -> Callable[[int, Tensor], Tensor]:
        q_heads, heads, dim = decoder.num_q_heads, decoder.num_kv_heads, decoder.head_dim

        def attend(index: int, qkv: Tensor) -> Tensor:
            query, key, value = qkv.view(self.batch_size, q_heads + 2 * heads, 1, dim).split([q_heads, heads, heads], 1)
            store = self.cache.layers[index].store
            out = store.step(query, key, value, decoder.scale, steps, decoder.rotary)
            return out.view(self.batch_size, q_heads * dim)

        return attend

    def _capture(self, num_tokens: int) -> None:
        """Graphs for rows of ``num_tokens`` and more.  What the cache holds is lost."""
        if self.device.type != "cuda":
            return
        bucket = SMALLEST_BUCKET
        while True:
            size = min(bucket, self.max_seq_len)
            if size > num_tokens or size == self.max_seq_len:
                if size not in self._graphs:
                    self._capture_one(size)
                if size == self.max_seq_len:
                    return
            bucket *= 4

    def _capture_one(self, size: int) -> None:
        self.reset()
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            self._forward(size)  # compiles, and lets libraries allocate
            self._forward(size)
        torch.cuda.current_stream(self.device).wait_stream(side)
        pool = next(iter(self._graphs.values()))[0].pool() if self._graphs else None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = self._forward(size)
        self._graphs[size] = graph, logits
        self.reset()


def _sampler(
    temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Callable[[Tensor], Tensor] | None:
    """Logits ``[batch_size, vocab_size]`` to tokens ``[batch_size]``; None for greedy."""
    if temperature < 0:
        raise ValueError(f"temperature {temperature:g}: allowed are 0 and above")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k}: allowed are 1 and above")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p:g}: allowed are above 0 to 1")
    if temperature == 0:
        return None

    def choose(logits: Tensor) -> Tensor:
        scores, index = (logits.float() / temperature).sort(-1, descending=True)
        probability = scores.softmax(-1)
        if top_k is not None:
            probability[:, top_k:] = 0
        if top_p is not None:
            probability[probability.cumsum(-1) - probability >= top_p] = 0
        return index.gather(1, torch.multinomial(probability, 1, generator=generator))[:, 0]

    return choose
