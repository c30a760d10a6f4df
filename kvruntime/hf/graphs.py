"""CUDA graphs of a model's own decode step, so that stock ``generate()`` costs the host one launch a token.

:class:`GraphForward` stands in a model's place of ``forward``.  The first steps with a cache run as they are; then
one is captured, and all that are like it are replayed: the same modules, the same kernels, nothing compiled.  A step
that is not like it (other arguments, a hook on a module, gradients, autocast changed) runs as it is.  Steps of several
tokens a row, as assisted decoding checks them, have a graph for each number of tokens.  A model whose step cannot be
captured is named in one warning.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import call
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from kvruntime.hf.cache import Cache
from kvruntime.hf.counts import StepCounts
from kvruntime.hf.fused import fused

WARM = 2
"""Steps that run as they are before one is captured: kernels are compiled and libraries allocate.  None where the
process has run the model's step with such a cache before."""
HELD = 16
"""Graphs of one cache at most, each of another number of tokens a row.  Steps of further numbers run as they are: to
capture one takes as long as a few of them."""
KNOWN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position")
"""Tensors that a step of several tokens may be told: with others it may be a prompt with images."""

_SEEN: WeakKeyDictionary[torch.nn.Module, set[tuple[object, ...]]] = WeakKeyDictionary()
"""Steps that were captured of a model: by arguments, and the sizes and types of what the cache held."""


class Inputs(NamedTuple):
    """The arguments of a step."""

    like: tuple[object, ...]
    """What two steps have in common that one graph serves."""
    tensors: list[Tensor]
    mask: Tensor | None
    """The 2-D attention mask, which no graph holds: it is held against what the cache knows."""


class Graph(NamedTuple):
    """One captured step."""

    graph: torch.cuda.CUDAGraph
    like: tuple[object, ...]
    addresses: tuple[int, ...]
    tensors: list[Tensor]
    """Where its arguments are read."""
    mask: Tensor | None
    """The attention mask that it was captured with: one column that all see."""
    leaves: list[Any]
    """Its outputs, one by one; a cache among them as a weak reference, so that the graph ends with the cache, and with
    it what it holds of NCCL's communicator."""
    spec: Any


class Weights:
    """What of a model a graph holds by address, and the hooks that it would not run."""

    def __init__(self, model: torch.nn.Module, own: Callable[[Any], bool]) -> None:
        modules = list(model.modules())
        parameters = list(model.parameters())
        tensors = [*parameters, *model.buffers()]
        self.model_id = id(model)
        self.outer = weakref.ref(parameters[0]), weakref.ref(parameters[-1])  # a cache keeps no weights alive
        self.ends = parameters[0].data_ptr(), parameters[-1].data_ptr()
        self.addresses = (*map(id, modules), *(tensor.data_ptr() for tensor in tensors))
        hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        counts = [(weakref.ref(found), sum(map(own, found.values()))) for found in hooks]  # which lead to the model
        self.hooks = [found for found, count in counts if not count]
        self.own = [(found, count) for found, count in counts if count]
        """Of the modules that have the cache's own hooks, how many of these."""

    @property
    def moved(self) -> bool:
        """A quick look: other weights than these."""
        first, last = (outer() for outer in self.outer)
        return first is None or last is None or self.ends != (first.data_ptr(), last.data_ptr())

    @property
    def hooked(self) -> bool:
        """Whether a module has a hook that a graph would not run."""
        if any(map(call, self.hooks)) or any(len(found() or ()) != count for found, count in self.own):
            return True
        return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


class Graphs:
    """The graphs of one cache."""

    def __init__(self, counts: StepCounts) -> None:
        self.counts = counts
        self._forget()

    def _forget(self) -> None:
        self.busy = False
        self.warm: dict[int, tuple[tuple[object, ...], int]] = {}
        """By the tokens a row of a step what the last ones had in common, and how many they were."""
        self.held: dict[int, Graph] = {}
        """By the tokens a row."""
        self.weights: Weights | None = None
        self.failed = ""
        self.several = ""
        """Why steps of several tokens a row cannot be captured, as far as is known; empty where they can."""
        self.stream: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Graphs are of this process."""
        return {"counts": self.counts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.counts = state["counts"]
        self._forget()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that a graph reads its arguments from and writes its outputs to."""
        tensors = [x for held in self.held.values() for x in (*held.tensors, held.mask, *held.leaves)]
        storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @property
    def state(self) -> str:
        if self.failed:
            return f"plain, {self.failed}"
        sizes = sorted(self.held)
        out = "CUDA graph" if sizes == [1] else f"CUDA graphs of {', '.join(map(str, sizes))} tokens a row"
        if not sizes:
            out = f"plain {self.counts.moves_beside or 'so far'}"
        return f"{out}; of several tokens plain, {self.several}" if self.several else out

    def run(self, model: Any, own: Callable[[Any], bool], forward: Any, args: Any, kwargs: Any) -> Any:
        """``forward(*args, **kwargs)``, or the replay of a step that is like it."""
        if self.busy:
            return forward(*args, **kwargs)
        counts = self.counts
        with self._alone():
            stays = not self.failed and counts.is_fixed_beside
            if not stays:
                self.held = {}
            elif not self.several:
                counts.at_once = self._tokens(args, kwargs)
            inputs = self._inputs(model, args, kwargs) if stays else None
            if inputs is None:
                self.warm = {}
                self._check_weights(model, own)
                return forward(*args, **kwargs)
            if self.weights is None or self.weights.model_id != id(model) or self.weights.moved:
                self.held, self.weights = {}, Weights(model, own)
            if self.weights.hooked:
                self.held = {}
                return forward(*args, **kwargs)
            counts.make_room()
            tokens, addresses = counts.at_once, (*counts.addresses, *counts.addresses_beside)
            graph = self.held.get(tokens)
            if graph is None or graph.like != inputs.like or graph.addresses != addresses:
                self.held = {each: other for each, other in self.held.items() if other.addresses == addresses}
                full = tokens > 1 and tokens not in self.held and len(self.held) >= HELD
                if full or not self._is_warm(model, inputs, addresses):
                    with fused(model):  # what the graph will hold is compiled now
                        out = forward(*args, **kwargs)
                    if counts.at_once != tokens:  # its mask made the host plan it
                        self.warm.pop(tokens, None)
                    return out
                with fused(model):
                    graph = self._capture(inputs, addresses, forward, args, kwargs)
                if graph is None:
                    return forward(*args, **kwargs)
                _SEEN.setdefault(model, set()).add(self._kind(inputs))
            self.held[tokens] = graph
            return self._replay(graph, inputs)

    def _is_warm(self, model: torch.nn.Module, inputs: Inputs, addresses: tuple[int, ...]) -> bool:
        """Whether enough steps like this one have run as they are; it is counted."""
        if self.counts.at_once not in self.held and self._kind(inputs) in _SEEN.get(model, ()):
            return True  # nor does it take the place of steps with other arguments, which may come in turn
        state, (last, count) = (*inputs.like, addresses), self.warm.get(self.counts.at_once, ((), 0))
        count = count + 1 if state == last else 1
        self.warm[self.counts.at_once] = state, count
        return count > WARM

    def _kind(self, inputs: Inputs) -> tuple[object, ...]:
        """What a step's kernels are compiled for."""
        return (*inputs.like, *self.counts.kind)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self.busy = True
        try:
            yield
        finally:
            self.busy, self.counts.at_once = False, 1

    def _check_weights(self, model: Any, own: Callable[[Any], bool]) -> None:
        """Between steps, as before a prompt: a graph of other weights than the model's is forgotten."""
        weights, self.weights = self.weights, None
        if self.held:
            self.weights = Weights(model, own)
            if weights is None or weights.addresses != self.weights.addresses:
                self.held = {}

    def _tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Tokens a row that a forward brings as one step: :meth:`StepCounts.step_of`."""
        ids, mask = _ids(args, kwargs), kwargs.get("attention_mask")
        if len(args) > 1 or not isinstance(ids, Tensor) or ids.ndim < 2 or ids.shape[1] == 1:
            return 1  # the second by number may be a mask
        others = [name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in KNOWN]
        if others or not (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)):
            return 1
        return self.counts.step_of(ids, mask)

    def _inputs(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs | None:
        """What a graph needs to know of the arguments; None where this is no step that a graph could hold."""
        counts = self.counts
        if not counts.started or len(args) > 1 or torch.is_grad_enabled() or model.training:
            return None
        ids = _ids(args, kwargs)
        if not isinstance(ids, Tensor) or not ids.is_cuda or ids.shape[:2] != (len(counts.positions), counts.at_once):
            return None
        if ids.device != counts.positions.device or torch._C._len_torch_dispatch_stack():
            return None
        mask, tensors, like = (
            None,
            [],
            [id(model), torch.is_autocast_enabled("cuda"), torch.is_inference_mode_enabled()],
        )
        for name, value in (*enumerate(args), *kwargs.items()):
            if isinstance(value, Tensor):
                if name == "attention_mask":
                    if value.ndim != 2:
                        return None
                    mask = value
                elif value.is_cuda:
                    tensors.append(value)
                    like += [name, value.shape, value.dtype]
                else:
                    return None
            elif value is None or isinstance(value, bool | int | float | str):
                like += [name, value]
            elif not isinstance(value, Cache):
                return None
        if counts.padded and kwargs.get("position_ids") is None:
            return None  # a model may derive them from the mask
        return Inputs(tuple(like), tensors, mask)

    def _capture(
        self, inputs: Inputs, addresses: tuple[int, ...], forward: Any, args: Any, kwargs: Any
    ) -> Graph | None:
        """The step as a graph; nothing runs.  None, with a warning, where the model's step cannot be captured."""
        counts, device = self.counts, inputs.tensors[0].device
        with torch.inference_mode(False):
            static = [tensor.clone() for tensor in inputs.tensors]
        there = iter(static)
        args = [next(there) if isinstance(value, Tensor) else value for value in args]
        kwargs = {
            name: value if name == "attention_mask" or not isinstance(value, Tensor) else next(there)
            for name, value in kwargs.items()
        }
        mask = None
        if inputs.mask is not None and kwargs.get("position_ids") is not None:  # without one, OPT asks for a length
            mask = torch.ones(len(inputs.mask), 1, dtype=inputs.mask.dtype, device=device)
        kwargs["attention_mask"] = mask
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            self.stream = self.stream or torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())
            counts.tracing = True
            try:
                with torch.cuda.stream(self.stream), _kept():
                    graph.capture_begin(capture_error_mode="thread_local")
                    try:
                        out = forward(*args, **kwargs)
                    finally:
                        graph.capture_end()
            except Exception as error:
                self.took_back()
                self._fail(error)
                _mend()
                return None
            finally:
                counts.tracing = False
            torch.cuda.current_stream().wait_stream(self.stream)
        return Graph(graph, inputs.like, addresses, static, mask, *flattened(out))

    def took_back(self) -> None:
        """A capture ended early: nothing ran, so no layer is ahead of another."""
        books = self.counts.layers[-1].forward
        books.unfinished, books.states = False, 0

    def _fail(self, error: Exception) -> None:
        first: BaseException = error
        while first.__context__ is not None:  # what the capture says of it tells nobody what to do
            first = first.__context__
        lines = str(first).strip().splitlines() or [type(first).__name__]
        which, failed = "every decode step", f"its step cannot be captured ({lines[0]})"
        if self.counts.at_once > 1:
            which, self.several = "every step of several tokens", failed
        else:
            self.failed, self.held = failed, {}
        warnings.warn(f"kvruntime: {which} of this model waits for the host, {failed}", RuntimeWarning, stacklevel=2)

    def _replay(self, graph: Graph, inputs: Inputs) -> Any:
        counts = self.counts
        counts.check(inputs.mask)
        torch._foreach_copy_(graph.tensors, inputs.tensors)
        graph.graph.replay()
        counts.replay()
        return rebuilt(graph.leaves, graph.spec)


def flattened(out: Any) -> tuple[list[Any], Any]:
    """A step's outputs one by one, caches by weak reference, and how they are put together."""
    leaves, spec = pytree.tree_flatten(out, is_leaf=lambda value: isinstance(value, Cache))
    return [weakref.ref(leaf) if isinstance(leaf, Cache) else leaf for leaf in leaves], spec


def rebuilt(leaves: Sequence[Any], spec: Any) -> Any:
    """What :func:`flattened` took apart, with tensors of its own."""
    there = [leaf() if isinstance(leaf, weakref.ref) else leaf for leaf in leaves]
    return pytree.tree_unflatten([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in there], spec)


def _ids(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a forward was given as its tokens, by number or embedded."""
    ids = args[0] if args else kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if ids is None else ids


@contextmanager
def _kept() -> Iterator[None]:
    """No garbage is collected: the end of another cache's graph would break off a capture."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _mend() -> None:
    """A capture that failed leaves PyTorch's generator as if one were under way: one that ends well puts it right."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin(capture_error_mode="thread_local")
        torch.zeros(1, device="cuda")
        graph.capture_end()


class GraphForward:
    """A model's ``forward``: what it was, or with a cache of steps the replay of a graph."""

    def __init__(self, model: torch.nn.Module, own: Callable[[Any], bool]) -> None:
        self.model, self.own = model, own
        self.__wrapped__ = model.forward  # what signatures are read from
        self.replaced = model.__dict__.get("forward")

    def take_back(self) -> None:
        """The model's ``forward`` is what it was."""
        if self.replaced is None:
            del self.model.forward
        else:
            self.model.forward = self.replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.__wrapped__
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        for value in (*kwargs.values(), *args):
            if isinstance(value, Cache):
                graphs = getattr(value, "graphs", None)
                if graphs is not None:
                    return graphs.run(self.model, self.own, forward, args, kwargs)
                break
        return forward(*args, **kwargs)
