"""What an engine says of itself: bytes taken, and where commands ask, the defaults of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from kvsim.layout import LayerShape, Method

if TYPE_CHECKING:
    from kvsim.hardware import Hardware
    from kvsim.models.model import Model


class Group(NamedTuple):
    """Layers that share a block table: bytes of a block over its layers, tokens a block, and their kind."""

    kind: str
    num_layers: int
    block_size: int
    page_nbytes: int
    reach: int | None = None


class Pool(NamedTuple):
    """An engine's pool of blocks.  ``num_gpu_blocks`` includes a block that stays empty; ``concurrency`` requests of
    ``max_model_len`` fit.

    ``num_tokens`` counts the tokens of whole requests, ``num_tokens_before`` blocks over groups.
    """

    num_gpu_blocks: int
    block_nbytes: int
    max_model_len: int
    blocks_per_request: int
    groups: tuple[Group, ...]

    @property
    def concurrency(self) -> float:
        return self.num_gpu_blocks / self.blocks_per_request

    @property
    def num_tokens(self) -> int:
        return int(self.concurrency * self.max_model_len)

    @property
    def num_tokens_before(self) -> int:
        return self.num_gpu_blocks // len(self.groups) * min(group.block_size for group in self.groups)


class Engine(ABC):
    """What an engine takes for a cache.  Implementations are frozen dataclasses that derive from this, one file each.

    ``name`` and ``parts`` are an engine's own; everything else has a default, which holds for an engine that does not
    say otherwise.
    """

    label: ClassVar[str] = ""
    """How the engine spells itself in a sentence (``vLLM``); empty: its name."""
    own_flags: ClassVar[tuple[str, ...]] = ()
    """Options of the command line that choose this engine where none is named."""
    cache_methods: ClassVar[tuple[str, ...] | None] = None
    """Methods shown beside the uncompressed cache where none is asked for; ``None``: those that every engine shows."""
    checkpoint_cache: ClassVar[bool] = False
    """Whether ``--kv-cache-dtype auto`` means the type of cache that a checkpoint asks for."""
    remainder_first: ClassVar[bool] = False
    """Whether the first stages of a pipeline have the layers that do not divide, or those before the last."""
    runtime: ClassVar[str | None] = None
    """Whose kernels it runs, where a card can be measured with them (:mod:`kvsim.latency.profile`)."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name for tables: ``ideal``, ``vllm``."""

    @abstractmethod
    def parts(self, model: Model, method: Method, batch_size: int, num_tokens: int) -> dict[str, int]:
        """Bytes that the engine takes for ``batch_size`` sequences of ``num_tokens`` tokens, by purpose.

        Constant-size state stands under names that start with ``state_``, index keys under ``index_``
        (:data:`kvsim.layout.APART`); whatever the engine adds by rounding and padding under names of its own.  Never
        falls as the batch or the context grows.  Raises ``ValueError`` where the engine does not have the method, or
        not for such a model.
        """

    @property
    def timed_as(self) -> str:
        """Whose constants of time it takes (:mod:`kvsim.latency.constants`): its name, and after a colon the way in
        which its steps run where it has several."""
        return self.name

    def overhead(self, model: Model, hardware: Hardware) -> dict[str, int]:
        """Estimated bytes beside weights and cache on one card, by name (workspaces, graphs, the runtime itself)."""
        return {}

    @property
    def overhead_band(self) -> Mapping[str, tuple[float, float]]:
        """Low and high of each overhead, over the estimate."""
        return {}

    def notes(self, model: Model, method: Method) -> tuple[str, ...]:
        """Why its bytes differ from ``ideal`` for this model and method, a line each."""
        return ()

    def held(self, model: Model) -> Model:
        """``model`` with the windows that the engine applies, for bytes read and times alike."""
        return model

    def stored(self, model: Model, method: Method) -> Method:
        """How the engine stores ``model`` under ``method``, for bytes read and times: where it leaves layers as they
        are, a mix that says so."""
        return method

    def pool(self, model: Model, method: Method, available: int, max_model_len: int) -> Pool | None:
        """The pool of blocks in ``available`` bytes for requests of ``max_model_len`` tokens; ``None``: it has none."""
        return None

    def shared_tokens(self, model: Model, method: Method, layer: LayerShape, chosen: Method, shared: int) -> int:
        """Of ``shared`` tokens of a prefix that ``layer`` still holds, those that the engine stores once for all
        sequences (``chosen``: ``method`` in this layer).  An engine that does not say so shares no prefix."""
        raise ValueError(f"{self.name} does not share prefixes")

    @property
    def gpu_memory_utilization(self) -> float | None:
        """Share of a card's memory that it uses by default; ``None``: it has no such flag."""
        return None

    @property
    def kept_free(self) -> float:
        """Share that stays free of what weights and overhead leave of a card's memory."""
        return 0.0

    @property
    def max_seq_len(self) -> int:
        """Tokens a row that it allocates for at once; 0: it grows."""
        return 0

    @classmethod
    def on(cls, card: Hardware | None, num_cards: int) -> dict[str, Any]:
        """Its options as it starts by default on ``num_cards`` of this card (``None``: of one that is not named)."""
        return {}
