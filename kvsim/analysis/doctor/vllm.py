"""Boot logs of vLLM, 0.4 to 0.33: worker/worker.py and v1/worker/gpu_worker.py, v1/core/kv_cache_utils.py.

* The first engine ("V0", to 0.10) holds keys and values of every attention layer whole, windows too, in one table of
  blocks; states stand beside the pool.  ``# CPU blocks`` are ``swap_space`` (4 GiB where nothing is said) over a
  block's bytes, so they tell the bytes of a block.
* The pool is that of the rank with the fewest blocks.  Where the log has several ranks, its figures are read.
* A draft model's layers share the pool.
* ``kv_cache_memory_bytes`` and ``num_gpu_blocks_override`` fix the pool whatever the card's memory is.  "Overriding
  num_gpu_blocks=0" is the trial run of the CUDA graphs, not the pool.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from kvsim.analysis.doctor import vllm_lines as lines
from kvsim.analysis.doctor.log import (
    CLOSE,
    GIB,
    NUMBER,
    QUANTITY,
    Diagnosis,
    Finding,
    Found,
    Log,
    Reader,
    gib,
    number,
    rank_of,
)
from kvsim.engines.engine import Pool
from kvsim.engines.vllm import OVERHEAD_BAND, Vllm, block_nbytes, padding_layers, server_defaults
from kvsim.hardware import Hardware
from kvsim.layout import LayerShape, Method
from kvsim.memory.capacity import room
from kvsim.memory.sharding import Deployment, Sharding, stages
from kvsim.methods import make_method
from kvsim.models.model import Model
from kvsim.models.quantization import KV_DTYPES, QUANTIZATIONS

GRAPHS_IN_BUDGET = (0, 21)
"""The release from which vLLM takes CUDA graphs out of the pool's memory."""
TOKENS_BY_REQUESTS = (0, 21)
"""The release from which "GPU KV cache size" counts whole requests, not blocks over groups (vllm#43308: ten times the
tokens for the same bytes of a model with windows)."""
NEED_BY_GROUPS = (0, 14)
"""The release from which the memory that a request needs counts the layers that pad its groups."""
SWAP_GIB = 4
"""``--swap-space`` where nothing is said."""
V0_WHOLE = 32768
"""``max_model_len`` up to which V0 takes a prompt in one step."""
RANKS_APART = 0.25
"""Ranks of one model differ by less than this share of the pool's memory."""
KV_SPELLINGS = {
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8_e5m2",
    "fp8_inc": "fp8",
    "fp8_ds_mla": "fp8",
    "float": "fp32",
}
"""Types of the cache as a log spells them beside those of :data:`KV_DTYPES`."""

_UNKNOWN_CARD = Hardware("card", "", "", None, "not known", None, None, None, None, None, None, "")


def diagnosis(log: Log, model: Model | None, hardware: Hardware | None, drafted: Model | None) -> Diagnosis:
    """The reconciled log.  Raises ``ValueError`` where it has no figure, or no model is given."""
    if model is None:
        raise ValueError("the log does not name its model: give --model")
    log, notes = lines.one_boot(log)
    boot = _Boot(log, model, hardware, drafted)
    boot.notes += notes
    return boot.diagnosis()


@dataclass
class _Memory:
    """GiB for the cache: as logged, else as estimated (``logged`` false)."""

    size: float
    logged: bool
    source: str = "the memory above, which is printed to 0.01 GiB"


@dataclass(frozen=True)
class _RankSize:
    """GiB of one rank for its cache and the blocks of its stage that they hold; ``derived``: from what is not cache."""

    rank: str
    size: float
    blocks: float
    stage: Model
    method: Method
    found: Found
    derived: bool


@dataclass
class _Setup:
    """What a pool is predicted with, and in words what was changed for it."""

    what: str
    engine: Vllm
    model: Model
    method: Method
    state: dict[str, int] = field(default_factory=dict)


class _Boot:
    """A boot, its settings read, its figures predicted one after another."""

    def __init__(self, log: Log, model: Model, hardware: Hardware | None, drafted: Model | None) -> None:
        self.log, self.model, self.hardware, self.drafted = log, model, hardware, drafted
        self.findings: list[Finding] = []
        self.notes: list[str] = []
        self.settings: dict[str, str] = {}
        self.version = log.value(r"LLM engine \(v?([^)]+)\)", r"version (\d+\.\d+\.\d+)") or ""
        numbers = re.findall(r"\d+", self.version)
        self.release = (int(numbers[0]), int(numbers[1])) if len(numbers) > 1 else None
        self.v0 = self._first_engine()
        self.rank = ""
        total = log.find(*lines.MEMORY)
        if total is not None:
            self.memory = gib(total[1], len(total[1].groups()) - 1) * GIB
        else:
            self.memory = float(hardware.memory_nbytes or 0) if hardware else 0.0
        given = log.number(*lines.UTILIZATION)
        self.utilization = given or (0.92 if self.release and self.release >= (0, 21) else 0.9)
        self.sharding = Sharding(
            self._size("tensor_parallel_size"),
            self._size("pipeline_parallel_size"),
            self._size("data_parallel_size"),
            decode_context_parallel_size=self._size("decode_context_parallel_size"),
        )
        self.method = self._method()
        self.quantization = self._setting("quantization", "None")
        asked = log.find(lines.CONCURRENCY) or log.find(lines.NEEDED) or log.find(lines.STORED)
        self.length = max(1, int(number(asked[1][1]) if asked else log.number(rf"max_seq_len={NUMBER}") or 8192))
        defaults = server_defaults(int(self.memory), hardware.id if hardware else "")
        if self.v0:  # prompts whole; in pieces where they may be very long
            whole = max(2048, self.length) if self.length <= V0_WHOLE else 512
            defaults = {"max_num_batched_tokens": whole, "max_num_seqs": 256}
        batched = log.number(r"max_num_batched_tokens(?:=|': | to )" + NUMBER)
        seqs = log.number(r"max_num_seqs(?:=|': | to )" + NUMBER)
        block = log.number(
            rf"(?:Forcing|Setting) kv cache block size to {NUMBER}",
            rf"'block_size': {NUMBER}",
            rf"[ (]block_size={NUMBER}",
        )
        self.engine = Vllm(
            block_size=int(block or 16),
            gpu_memory_utilization=self.utilization,
            max_num_batched_tokens=int(batched or defaults["max_num_batched_tokens"]),
            max_num_seqs=int(seqs or defaults["max_num_seqs"]),
            disable_hybrid_kv_cache_manager=self.v0 or log.find("Hybrid KV cache manager is disabled") is not None,
            tensor_parallel_size=self.sharding.tensor_parallel_size,
        )
        self.draft = lines.draft(log)
        self.ranks = self._stages()
        self.stage, self.method = self.ranks[0]

    def _first_engine(self) -> bool:
        """Whether this is vLLM's first engine, V0."""
        found = self.log.find(lines.ENGINE)
        if found is not None and found[1][1] is not None:
            return bool(found[1][1] == "V0")
        if self.log.find(lines.TOKENS) is not None:
            return False
        older = found is not None and (self.release is None or self.release < (0, 11))
        return older or self.log.find(lines.CPU_BLOCKS) is not None

    def _setting(self, name: str, default: str) -> str:
        """As the engine's configuration has it, else as any line has it."""
        plain, quoted = rf"(?<![\w.]){name}=([^,\s)]+)", rf"'{name}': '?([^,'}}]+)'?"
        value = self.log.value(rf"with config:.*?{plain}", plain, quoted) or default
        self.settings[name] = value.strip("'\"")
        return self.settings[name]

    def _size(self, name: str) -> int:
        told = self._setting(name, "1")
        return int(told) if told.isdecimal() else 1

    def _method(self) -> Method:
        kv = self._setting("kv_cache_dtype", "auto").removeprefix("torch.").lower()
        dtype = self._setting("dtype", "auto").removeprefix("torch.").lower()
        if dtype == "auto":
            dtype = self.model.dtype or "float16"
        name = (self.model.cache_dtype or dtype) if kv == "auto" else kv
        name = KV_SPELLINGS.get(name, name)
        if name not in KV_DTYPES:
            self.notes.append(f"kv_cache_dtype {kv}: not known here, the cache is counted at 16 bits")
        plugin = lines.plugin(self.log)
        if plugin is not None:
            return self._plugin_method(*plugin, dtype)
        return make_method(KV_DTYPES.get(name, "fp16"))

    def _plugin_method(self, name: str, options: dict[str, object], dtype: str) -> Method:
        """What kvruntime's plugin stores; raises ``ValueError`` for what it would not."""
        self.settings["kvruntime"] = " ".join([name, *(f"{key}={value}" for key, value in options.items())])
        try:
            method = make_method(name, **options)
        except LookupError as error:
            raise ValueError(f"the log's additional_config: {error.args[0]}") from None
        return make_method(name, **{**options, "dtype": dtype}) if hasattr(method, "dtype") else method

    def _stages(self) -> list[tuple[Model, Method]]:
        """The model as a rank of each pipeline stage holds it in the pool, a draft's layers on the last, and the method
        there."""
        placed = Deployment(self.model, self.method, self.engine, self.sharding).placed
        split = [stage for stage, _ in placed]
        self.whole = split[0]
        if self.draft is not None:
            last = split[-1]
            if self.drafted is not None:
                extra = tuple(
                    stages(self.drafted, self.sharding)[0].layers
                    if self.sharding != Sharding()
                    else self.drafted.layers
                )
            else:
                extra = last.cache_layers[-1:]
            split[-1] = replace(last, layers=last.layers + extra)
            counted = (
                f"its {len(extra)} layers share the pool" if self.drafted else "counted as one layer more of the model"
            )
            name = f"draft model {self.draft.name}" if self.draft.name else "the model's own draft layers"
            self.notes.append(f"{name} ({self.draft.method}): {counted}")
        if self.v0:
            split = [replace(each, layers=tuple(x for x in each.layers if isinstance(x, LayerShape))) for each in split]
        return [(stage, method) for stage, (_, method) in zip(split, placed, strict=True)]

    def diagnosis(self) -> Diagnosis:
        memory = self._available()
        self._settle_by_cpu_blocks()
        self._layout()
        if memory is not None:
            self._pool(memory)
        self._failures(memory)
        if not self.findings:
            raise ValueError("the log has lines of vLLM, but none with a figure that can be reconciled")
        self.findings.sort(key=lambda finding: finding.line)
        name = lines.model_name(self.log) or self.model.name
        if self.draft is not None and self.draft.name:
            name = f"{name}, draft {self.draft.name}"
        return Diagnosis("vllm", self.version, name, self.settings, tuple(self.findings), tuple(self.notes))

    def _add(self, found: Found, what: str, unit: str, predicted: float | None, reported: float, cause: str) -> None:
        self.findings.append(Finding(found[0], what, unit, predicted, reported, cause))

    def _found(self, patterns: tuple[str, ...]) -> Found | None:
        """The first of ``patterns`` that is found, of the rank whose pool it is where that rank printed it."""
        for pattern in patterns:
            every = list(self.log.all(pattern))
            if every:
                return next((each for each in every if rank_of(each[1]) == self.rank), every[0])
        return None

    # memory

    def _weights(self) -> float | None:
        """GiB of a rank's weights: predicted, and reported where the log has them."""
        predicted = self._predicted_weights()
        found = self._found(lines.WEIGHTS)
        if found is None:
            return predicted
        reported = gib(found[1])
        cause = self._weight_note
        if predicted and abs(reported / predicted - 1) > CLOSE:
            cause = self._why_weights(reported, predicted)
        self._add(found, "weights", "GiB", predicted, reported, cause)
        return reported

    _weight_note = ""

    def _why_weights(self, reported: float, predicted: float) -> str:
        untold = self.quantization in ("None", "")
        sizes = {bits: self._weigh(bits, quantized=bits < 16) or 0.0 for bits in (32, 16, 8, 4.5, 4.25) if untold}
        fits = [bits for bits, size in sizes.items() if _near(reported, size, CLOSE)]
        if fits:
            return f"fits weights of {fits[0]:g} bits"
        if reported > predicted and self.draft is not None and self.drafted is None:
            return "the draft's weights are in it, and are not predicted"
        if reported > predicted:
            return "not explained: vision weights, padding and layers kept in 16 bits are not predicted"
        if self.log.find(r"expert[_-]parallel(?:_size)?(?:=|': )(?:True|[2-9])") is not None:
            return "expert parallel: a rank's share of the experts is not predicted"
        return "not explained: fewer bits a weight than predicted, or not all of the weights"

    def _predicted_weights(self) -> float | None:
        bits = QUANTIZATIONS.get(self.quantization)
        wide = 32.0 if self.settings["dtype"] in ("torch.float32", "float32", "float") else 16.0
        if self.quantization not in ("None", "") and bits is None:
            bits = self.model.weight_bits
            self._weight_note = f"quantization {self.quantization}: bits as the config says"
            if bits is None or bits >= 16:
                self._weight_note = f"quantization {self.quantization}: its bits a weight are not known, give none"
                return None
        size = self._weigh(bits or wide, quantized=bits is not None)
        if size is None:
            self.notes.append(f"model {self.model.name}: its number of weights is not known")
        return size

    def _weigh(self, bits: float, quantized: bool) -> float | None:
        card = replace(_UNKNOWN_CARD, memory_nbytes=1 << 60)
        try:
            size = room(self.model, card, bits, 0.0, quantized=quantized, sharding=self.sharding).weight_nbytes / GIB
            if self.drafted is not None and not self.v0:  # V0 prints the target's weights and the draft's apart
                size += room(self.drafted, card, None, 0.0, sharding=self.sharding).weight_nbytes / GIB
        except ValueError:
            return None
        return size

    def _overhead(self, name: str, what: str, patterns: tuple[str, ...]) -> tuple[float, bool]:
        """GiB and whether the log has it, else an estimate."""
        estimate = self.engine.overhead(self.whole, self.hardware or _UNKNOWN_CARD)[name] / GIB
        found = self._found(patterns)
        if found is None:
            return estimate, False
        reported = gib(found[1])
        self._add(found, what, "GiB", estimate, reported, f"an estimate: {_band(reported, estimate, name)}")
        return reported, True

    def _terms(self) -> list[tuple[str, float | None, bool]]:
        """What stands beside the cache within the share: name, GiB, whether it is logged."""
        weights = self._weights()
        logged = self._found(lines.WEIGHTS) is not None
        peak, consumed = self._found(lines.PEAK), self._found(lines.CONSUMED)
        graphs, graphs_logged = self._overhead("cuda_graphs", "CUDA graphs", lines.GRAPHS)
        if peak is not None:
            estimate = self.engine.overhead(self.whole, self.hardware or _UNKNOWN_CARD)
            wanted, cause = None, "the weights are not known"
            if weights is not None:
                wanted = weights + estimate["activation"] / GIB
                band = _band(gib(peak[1]) - weights, estimate["activation"] / GIB, "activation")
                cause = f"{weights:.2f} of weights and activations, an estimate: {band}"
            self._add(peak, "peak of PyTorch", "GiB", wanted, gib(peak[1]), cause)
            other, other_logged = self._overhead("non_torch", "not PyTorch's", lines.NON_TORCH)
            return [("peak of PyTorch", gib(peak[1]), True), ("not PyTorch's", other, other_logged)]
        activation, activation_logged = self._overhead("activation", "peak activations", lines.ACTIVATION)
        if consumed is not None:
            estimate = self.engine.overhead(self.whole, self.hardware or _UNKNOWN_CARD)
            wanted = None if weights is None else weights + estimate["non_torch"] / GIB
            cause = "weights above and an estimate of what is not PyTorch's"
            self._add(consumed, "weights and not PyTorch's", "GiB", wanted, gib(consumed[1]), cause)
            return [
                ("weights and not PyTorch's", gib(consumed[1]), True),
                ("activations", activation, activation_logged),
            ]
        other, other_logged = self._overhead("non_torch", "not PyTorch's", lines.NON_TORCH)
        terms = [
            ("weights", weights, logged),
            ("activations", activation, activation_logged),
            ("not PyTorch's", other, other_logged),
        ]
        if self._graphs_counted():
            planned = self._found(lines.GRAPHS_PLANNED)
            size = (gib(planned[1]), True) if planned is not None else (graphs, graphs_logged)
            terms.append(("CUDA graphs", *size))
        return terms

    def _graphs_counted(self) -> bool:
        """Whether CUDA graphs come out of the share: as the log says, else by the release."""
        if self.log.find(r"CUDA graph memory profiling is enabled") is not None:
            return True
        if self.log.find(r"CUDA graph memory profiling (?:is disabled|will be enabled)") is not None:
            return False
        if self.log.find(r"enforce_eager=True|'enforce_eager': True") is not None:
            return False
        return self.release is not None and self.release >= GRAPHS_IN_BUDGET

    def _available(self) -> _Memory | None:
        """The memory for the cache, and with it which rank's figures are read."""
        sizes = self._rank_sizes()
        if sizes:
            least = min(sizes, key=lambda each: each.blocks)
            self.stage, self.method, self.rank = least.stage, least.method, least.rank
        terms = self._terms()
        fixed = bool(sizes) and sizes[0].found[1].re.pattern == lines.RESERVED
        predicted: float | None = None
        if self.memory and all(size is not None for _, size, _ in terms):
            predicted = self.memory / GIB * self.utilization - sum(size or 0.0 for _, size, _ in terms)
        bytes_given = self.log.number(
            rf"'kv_cache_memory(?:_bytes)?': {NUMBER}", rf"[ (]kv_cache_memory_bytes={NUMBER}"
        )
        if not sizes:
            if bytes_given:
                return _Memory(bytes_given / GIB, True)
            return None if predicted is None else _Memory(predicted, False)
        reported, found = least.size, least.found
        if fixed:
            predicted = bytes_given / GIB if bytes_given else None
            self._add(
                found, "KV cache memory", "GiB", predicted, reported, "fixed by kv_cache_memory_bytes, not by the card"
            )
            return _Memory(predicted or reported, True)
        listed = ", ".join(f"{size or 0:.2f} {name}{'' if logged else ' (estimated)'}" for name, size, logged in terms)
        cause = f"{self.utilization:g} of {self.memory / GIB:.2f} GiB less {listed}"
        if not self.memory:
            cause = "the log does not say the card's memory: give --gpu"
        elif predicted is None:
            cause = "the weights are not known"
        if least.derived:
            cause += f"; {least.rank} prints what is not cache, {reported:.2f} GiB are left"
        low, high = (pick(each.size for each in sizes) for pick in (min, max))
        if high > low:
            cause += f"; {len(sizes)} ranks have {low:.2f} to {high:.2f}, the fewest blocks are the pool"
        self._add(found, "KV cache memory", "GiB", predicted, reported, cause)
        suggested = lines.suggested(self.log, reported) if len(sizes) == 1 else None
        if suggested is None:
            return _Memory(reported, True)
        at, nbytes = suggested
        return _Memory(nbytes / GIB, True, f"{nbytes:,.0f} B, of the --kv-cache-memory that line {at} suggests")

    def _rank_sizes(self) -> list[_RankSize]:
        """The memory of every rank that prints it, or prints what is not cache."""
        out: dict[str, _RankSize] = {}

        def add(found: Found, size: float, derived: bool = False) -> None:
            rank = rank_of(found[1])
            place = re.search(r"PP(\d+)", rank)
            stage, method = self.ranks[min(int(place[1]), len(self.ranks) - 1) if place else 0]
            blocks = size / self._block(self.engine, stage, method)
            if rank not in out or (not rank and blocks < out[rank].blocks):
                out[rank] = _RankSize(rank, size, blocks, stage, method, found, derived)

        for pattern in lines.AVAILABLE:
            if out and pattern in lines.AVAILABLE[-2:] and "" in out:
                break  # ranks are not told apart: a line that repeats the memory is none of another rank
            for found in self.log.all(pattern):
                add(found, gib(found[1]))
        if out and self.memory and "" not in out and not self._graphs_counted():
            for found in self.log.all(lines.NOT_CACHE):
                add(found, self.memory / GIB * self.utilization - gib(found[1]), derived=True)
        return list(out.values())

    # layout

    @staticmethod
    def _block(engine: Vllm, model: Model, method: Method) -> int:
        return block_nbytes(engine.groups(model, method))

    def _settle_by_cpu_blocks(self) -> None:
        """Compares ``# CPU blocks``; a block of other bytes than predicted is taken as it is where a change fits it."""
        found = self.log.find(lines.CPU_BLOCKS)
        if found is None or not number(found[1][1]):
            return
        swap = self.log.number(rf"swap_space(?:=|': ){NUMBER}")
        size = (SWAP_GIB if swap is None else swap) * GIB
        reported, block = number(found[1][1]), self._block(self.engine, self.stage, self.method)
        predicted = size // block
        said = f"swap space of {size / GIB:g} GiB{' (the default)' if swap is None else ''}"
        cause = f"{said} in blocks of {block:,} B"
        if abs(reported / predicted - 1) > CLOSE:
            wanted = size / reported
            fits = [
                each
                for each in self._trials()
                if abs(self._block(each.engine, each.model, each.method) / wanted - 1) <= CLOSE / 2
            ]
            if fits:
                taken = fits[0]
                self.engine, self.stage, self.method = taken.engine, taken.model, taken.method
                block = self._block(self.engine, self.stage, self.method)
                listed = " or ".join(each.what for each in fits)
                cause = f"{said} makes blocks of {block:,} B: fits {listed}; so the pool is predicted"
            else:
                cause = f"not explained: {said} makes blocks of {wanted:,.0f} B, predicted are {block:,} B"
        self._add(found, "CPU blocks", "blocks", predicted, reported, cause)

    def _layout(self) -> None:
        """Block size and padding layers that vLLM says it chose."""
        groups = self.engine.groups(self.stage, self.method)
        found = self.log.find(rf"Setting attention block size to {NUMBER} tokens")
        if found is not None:
            size = max(group.block_size for group in groups)
            why = "a page of keys and values holds a layer's state"
            self._add(found, "block size", "tokens", size, number(found[1][1]), why)
        found = self.log.find(rf"Add {NUMBER} padding layers")
        if found is not None:
            padding = padding_layers(self.stage, groups)
            why = f"{len(groups)} groups of {groups[0].num_layers} layers"
            self._add(found, "padding layers", "layers", padding, number(found[1][1]), why)

    # the pool

    def _pool(self, memory: _Memory) -> None:
        """Blocks, tokens and concurrency from the memory of the cache."""
        given = self._overridden(memory)
        ranks = self.sharding.context_ranks
        logged = self.log.number(lines.TOKENS)

        def figures(engine: Vllm, model: Model, method: Method, size: float = memory.size) -> Pool:
            pool = engine.pool(model, method, int(size * GIB), self.sharding.rank_tokens(self.length))
            return pool if given is None else pool._replace(num_gpu_blocks=given)

        def tokens(pool: Pool) -> float:
            ways = (pool.num_tokens_before * ranks, pool.num_tokens * ranks)
            if self.release is None and logged is not None:  # an unknown release: whichever it is nearer to
                return min(ways, key=lambda way: abs(way - logged))
            return ways[self.release is not None and self.release >= TOKENS_BY_REQUESTS]

        def concurrency(pool: Pool) -> float:
            return pool.num_gpu_blocks * self.engine.block_size / self.length if self.v0 else pool.concurrency

        readings: tuple[tuple[str, str, str, Callable[[Pool], float]], ...] = (
            (lines.BLOCKS, "GPU blocks", "blocks", lambda pool: pool.num_gpu_blocks),
            (lines.TOKENS, "KV cache size", "tokens", tokens),
            (lines.CONCURRENCY, f"concurrency at {self.length:,} tokens", "requests", concurrency),
            (lines.STORED, "longest context", "tokens", lambda pool: pool.num_gpu_blocks * self.engine.block_size),
        )
        present = [(each, found) for each in readings if (found := self.log.find(each[0])) is not None]

        def fits(pool: Pool, within: float) -> bool:
            return all(_near(number(found[1].groups()[-1]), read(pool), within) for (*_, read), found in present)

        pool = figures(self.engine, self.stage, self.method)
        cause = f"from {memory.source}"
        if given is not None:
            cause = "num_gpu_blocks_override, not the memory"
        elif not memory.logged:
            cause = f"from an estimate of {memory.size:.2f} GiB: the log does not print the memory of the cache"
        why = cause
        if memory.logged and present and not fits(pool, CLOSE):
            why = self._why(
                figures, fits, [(number(f[1].groups()[-1]), read(pool)) for (*_, read), f in present], memory
            )
        for (_, what, unit, read), found in present:
            reported, predicted = number(found[1].groups()[-1]), read(pool)
            self._add(found, what, unit, predicted, reported, cause if _near(reported, predicted, CLOSE) else why)

    def _overridden(self, memory: _Memory) -> int | None:
        """Blocks that ``num_gpu_blocks_override`` fixes, and what they replace."""
        told = rf"(?<!with)[ (]num_gpu_blocks_override={NUMBER}"
        given = self.log.number(rf"'num_gpu_blocks_override': {NUMBER}", told)
        real = [each for each in self.log.all(lines.OVERRIDE) if number(each[1][1]) > 0]
        for found in real[:1]:
            natural = self.engine.pool(self.stage, self.method, int(memory.size * GIB), self.length).num_gpu_blocks
            cause = f"num_gpu_blocks_override={found[1][2]} replaces them"
            self._add(found, "GPU blocks before", "blocks", natural, number(found[1][1]), cause)
            return int(number(found[1][2]))
        return None if given is None else int(given)

    def _trials(self) -> list[_Setup]:
        """Single changes of the settings that a log may not show."""
        engine, stage, method = self.engine, self.stage, self.method
        out = []
        if not self.v0:
            windows = any(layer.window is not None for layer in stage.cache_layers)
            if windows:
                changed = replace(engine, disable_hybrid_kv_cache_manager=not engine.disable_hybrid_kv_cache_manager)
                how = "with" if engine.disable_hybrid_kv_cache_manager else "without"
                text = f"{how} the hybrid cache manager (windows {'apart' if how == 'with' else 'as full attention'})"
                out.append(_Setup(text, changed, stage, method))
                out.append(_Setup("with asynchronous scheduling", replace(engine, concurrent_batches=2), stage, method))
            if stage.state_layers:
                out.append(_Setup("with two blocks a state", replace(engine, state_blocks=2), stage, method))
        for name in ("fp8", "fp16", "fp32") if self.v0 else ("fp8", "fp16", "fp32", "int8", "int4", "nvfp4"):
            out.append(_Setup(f"with a {name} cache", engine, stage, make_method(name)))
        count = self.sharding.tensor_parallel_size
        if count > 1:
            whole = replace(self.model, layers=tuple(x for x in self.model.layers if isinstance(x, LayerShape)))
            wide = self.model if not self.v0 else whole
            if self.sharding.pipeline_parallel_size == 1:
                out.append(_Setup(f"with heads not split over the {count} ranks", engine, wide, method))
        if self.draft is not None:
            layers = len(stages(self.model, self.sharding)[-1].layers)
            out.append(
                _Setup("without the draft's layers", engine, replace(stage, layers=stage.layers[:layers]), method)
            )
        return out

    def _why(
        self,
        figures: Callable[..., Pool],
        fits: Callable[[Pool, float], bool],
        pairs: list[tuple[float, float]],
        memory: _Memory,
    ) -> str:
        """The changes of settings of which one explains all figures, or that none was found."""
        found = []
        for each in self._trials():
            try:
                pool = figures(each.engine, each.model, each.method)
            except ValueError:
                continue
            if pool.num_gpu_blocks and fits(pool, CLOSE):
                found.append(each.what)
        if found:
            return f"fits {' or '.join(found)}"
        ratios = [reported / predicted for reported, predicted in pairs if predicted]
        printed = len(self._rank_sizes())
        shortest = min(ratios, default=1.0)
        world = self.sharding.replica_ranks
        if world > printed and 1 - RANKS_APART <= shortest < 1 and max(ratios) - shortest <= CLOSE:
            least = memory.size * shortest
            told = f"{printed} of {world} ranks print theirs, the least is the pool's"
            return f"fits {least:.2f} GiB on another rank: {told}"
        return "not explained: the log's model or settings may not be those predicted"

    # boots that failed

    def _failed(self, line: int, why: str) -> None:
        self.notes.insert(0, f"the boot failed, line {line}: {why}")

    def _failures(self, memory: _Memory | None) -> None:
        found = self.log.find(lines.NEEDED)
        if found is not None:
            self._too_long(found)
        found = self.log.find(lines.STORED)
        if found is not None:
            self._failed(
                found[0], f"{number(found[1][1]):,.0f} tokens are asked for, the pool holds {number(found[1][2]):,.0f}"
            )
        found = self.log.find(lines.NO_BLOCKS)
        if found is not None:
            self._failed(found[0], "no memory is left for the cache")
            if memory is None or not memory.logged:
                blocks = None
                if memory is not None:
                    blocks = max(0, int(memory.size * GIB)) // self._block(self.engine, self.stage, self.method)
                cause = "not one block" if memory is None else f"predicted from an estimate of {memory.size:.2f} GiB"
                self._add(found, "GPU blocks", "blocks", blocks, 0.0, cause)
        found = self.log.find(lines.NOT_FREE)
        if found is not None:
            free, total, share = (number(found[1][place]) for place in (1, 2, 3))
            asked = gib(found[1], 4)
            self._failed(found[0], f"{asked:.2f} GiB are asked for, {free:.2f} are free")
            self._add(found, "memory asked for", "GiB", total * share, asked, f"{share:g} of {total:.2f} GiB")
            fits = int(100 * free / total) / 100
            cause = f"{total - free:.2f} GiB are held already; --gpu-memory-utilization {fits:g} fits"
            self._add(found, "memory free at start", "GiB", None, free, cause)
        self._out_of_memory()

    def _too_long(self, found: Found) -> None:
        """A request of the longest length does not fit: what it needs, and the length that fits."""
        asked, needed, available = number(found[1][1]), gib(found[1], 2), gib(found[1], 4)
        self._failed(found[0], f"a request of {int(asked):,} tokens needs {needed:.2f} GiB, {available:.2f} are left")
        windows = any(layer.window is not None for layer in self.stage.cache_layers)
        cause = f"one request at its longest, {self.method.name}"
        if windows:
            cause += f"; windows with {self.engine.max_num_batched_tokens:,} batched tokens"
        predicted = self._needed(int(asked)) / GIB
        if not _near(needed, predicted, CLOSE):
            fits = [each.what for each in self._trials() if _near(needed, self._needed(int(asked), each) / GIB, CLOSE)]
            cause = f"fits {' or '.join(fits)}" if fits else f"not explained: {cause}"
        self._add(found, f"needed at {int(asked):,} tokens", "GiB", predicted, needed, cause)
        longest = self.log.find(lines.LONGEST)
        if longest is not None:
            low, high = 0, int(asked)
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if self._needed(middle) <= available * GIB else (low, middle - 1)
            cause = f"the longest request within {available:.2f} GiB"
            self._add(longest, "longest context", "tokens", low, number(longest[1][1]), cause)

    def _needed(self, num_tokens: int, setup: _Setup | None = None) -> int:
        """Bytes of a request of ``num_tokens`` tokens as vLLM checks them: of its layers, since 0.14 of the groups."""
        engine, model = (self.engine, self.stage) if setup is None else (setup.engine, setup.model)
        groups = engine.groups(model, self.method if setup is None else setup.method)
        tokens = self.sharding.rank_tokens(num_tokens)
        if len(groups) == 1 or self.release is None or self.release >= NEED_BY_GROUPS:
            return engine.blocks(groups, tokens) * block_nbytes(groups)
        grouped: Counter[tuple[str, int | None]] = Counter()
        for group in groups:
            grouped[group.kind, group.reach] += group.num_layers
        held: Counter[tuple[str, int | None]] = Counter()
        held["state", None] = len(model.state_layers)
        held["full", None] = len(model.index_layers)
        for layer in model.cache_layers:
            full = layer.window is None or engine.disable_hybrid_kv_cache_manager
            held[
                "full" if full else "chunk" if layer.kind == "chunked" else "window", None if full else layer.window
            ] += 1
        total = 0.0
        for group in groups:
            share = held[group.kind, group.reach] / grouped[group.kind, group.reach]
            total += engine.blocks((group,), tokens) * group.page_nbytes * share
        return int(total)

    def _out_of_memory(self) -> None:
        found = self.log.find(lines.OUT_OF_MEMORY)
        if found is None:
            return
        loaded = any(at < found[0] for pattern in lines.WEIGHTS for at, _ in self.log.all(pattern))
        around = self.log.between(found[0], found[0] + 2)
        held = around.find(rf"{QUANTITY} is allocated by PyTorch", rf"{QUANTITY} already allocated")
        asked = around.find(rf"Tried to allocate {QUANTITY}")
        when = "after the weights were loaded" if loaded else "while the weights were loaded"
        self._failed(found[0], f"out of memory {when}")
        reported = held or asked
        if reported is None:
            return
        weights = None if loaded else self._predicted_weights()
        cause = when
        if weights is not None and self.memory:
            more = "more" if weights > self.memory / GIB else "not more"
            cause = f"{weights:.2f} GiB of weights are {more} than the card's {self.memory / GIB:.2f}"
        what = "allocated at the end" if held else "the allocation that failed"
        self._add(reported, what, "GiB", weights if held else None, gib(reported[1]), cause)


def _band(reported: float, estimate: float, name: str) -> str:
    low, high = (factor * estimate for factor in OVERHEAD_BAND[name])
    return f"{'within' if low <= reported <= high else 'outside'} its band {low:.2f}-{high:.2f}"


def _near(reported: float, predicted: float, within: float) -> bool:
    return abs(reported - predicted) <= within * abs(predicted)


def _model_name(log: Log) -> str | None:
    """The model's name as the log gives it."""
    return lines.model_name(lines.one_boot(log)[0])


def _draft_name(log: Log) -> str | None:
    """The draft model's name as the log gives it, where it is another than the model's."""
    draft = lines.draft(lines.one_boot(log)[0])
    return draft.name if draft is not None and draft.name else None


READER = Reader(Vllm.label, lines.SIGNS, diagnosis, _model_name, _draft_name, needs_model=True)
