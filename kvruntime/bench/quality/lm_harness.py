"""lm-evaluation-harness' interface to a model, with a kvruntime cache: any of its tasks runs on any method.

Importing this module registers the model as ``kvruntime``; ``kvruntime lm-eval ...`` is lm_eval's own command line
after that.  Contexts are stored after one forward; continuations are decoded and answers generated through the cache.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from kvruntime.bench.given import check_reads
from kvruntime.bench.harness.results import Row
from kvruntime.bench.harness.tables import BASE
from kvruntime.bench.harness.tasks import Task, Tick
from kvruntime.bench.model.caches import Contender, ours
from kvruntime.bench.model.tasks import subject
from kvruntime.bench.quality.report import HARNESS as KIND
from kvruntime.checkpoints.load import LoadedModel, load, pick_device, resolve
from kvruntime.eval.answers import Answerer
from kvruntime.hf.cache import argument
from kvruntime.specs import DEFAULT, chosen_method
from kvsim.layout import Method
from kvsim.specs import parse_dtype

LOG = logging.getLogger(__name__)
LM_EVAL_TAKES = (
    "add_bos_token", "batch_size", "chat_template_args", "enable_thinking", "max_batch_size", "max_length",
    "prefix_token_id", "think_end_token", "truncation",
)  # fmt: skip
"""What lm_eval's own model still reads where it is given a loaded model."""
OTHERS = inspect.signature(HFLM.__init__).parameters.keys() - {"self", "kwargs", *LM_EVAL_TAKES}
"""What it reads only where it loads the model itself, or in forwards that have no cache."""


@register_model("kvruntime")
class KvruntimeLM(HFLM):
    """A model whose every request runs through a cache of ``method``.

    ``pretrained``: a name, directory or hub id as of ``kvruntime --model``, or a :class:`LoadedModel`.  ``method``: one
    with its options, ``kivi:nbits=2``, or a :class:`Contender`; arguments that lm_eval's own model does not take are
    the method's options too, ``method=kivi,nbits=2,group_size=64``.  ``chunk``: tokens of a continuation that are fed
    at a time, 1 as in decoding.  Raises ``LookupError`` and ``ValueError`` as ``kvruntime`` does, ``ValueError`` also
    for an argument that would do nothing and for ``batch_size=auto``, which lm_eval finds without a cache.
    """

    def __init__(
        self,
        pretrained: str | LoadedModel = "smollm2-135m",
        method: str | Method | Contender = DEFAULT[0],
        chunk: int = 1,
        device: str | None = None,
        dtype: str | None = None,
        offline: bool = False,
        **kwargs: Any,
    ) -> None:
        if idle := [name for name in kwargs if name in OTHERS]:
            own = "pretrained, method and its options, chunk, device, dtype, offline"
            raise ValueError(f"model argument {', '.join(idle)}: allowed are {own}, {', '.join(LM_EVAL_TAKES)}")
        size = str(kwargs.setdefault("batch_size", 1))
        self.batch = int(size) if size.isdecimal() else 0
        if self.batch < 1:
            raise ValueError(f"batch_size {size}: allowed are 1 and above, in whole numbers")
        options = [f"{name}={kwargs.pop(name)}" for name in list(kwargs) if name not in LM_EVAL_TAKES]
        if isinstance(method, str):
            joint = "," if ":" in method else ":"
            method = chosen_method([joint.join([method, ",".join(options)]) if options else method], None, {})
        elif options:
            raise ValueError(f"options {', '.join(options)}: allowed with a method's name only")
        self.contender = method if isinstance(method, Contender) else ours(method)
        if isinstance(pretrained, str):
            kind = None if dtype in (None, "auto") else parse_dtype(str(dtype))
            found = resolve(pretrained, offline=offline, say=lambda line: print(line, file=sys.stderr))
            pretrained = load(found, pick_device(None if device in (None, "", "None") else device), kind)
        check_reads(pretrained)
        self.loaded, self.chunk = pretrained, int(chunk)
        super().__init__(pretrained=pretrained.model, tokenizer=pretrained.tokenizer, **kwargs)

    def _answerer(self) -> Answerer:
        build = self.contender.build
        return Answerer(self.model, self.tokenizer, lambda n: build(self.model, n), self.batch, self.chunk)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation and whether it is the greedy one; a context too long loses its start."""
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        pairs = []
        for index in order:
            _, context, continuation = requests[index]
            room = max(1, self.max_length + 1 - len(continuation))
            pairs.append((context[-room:], continuation))
        if cut := sum(len(requests[index][1]) > len(pair[0]) for index, pair in zip(order, pairs, strict=True)):
            LOG.warning("%d of %d contexts exceed %d tokens and lose their start", cut, len(pairs), self.max_length)
        bar = tqdm(total=len(pairs), disable=disable_tqdm, desc="Running loglikelihood requests")
        with self.contender.around(self.model):
            found = self._answerer().continuations(pairs, tick=lambda share: bar.update(round(share * len(pairs))))
        bar.close()
        out: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for index, answer in zip(order, found, strict=True):
            out[index] = answer
            if requests[index][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
        return out

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> Any:
        with self.contender.around(self.model):
            cache = self.contender.build(self.model, max_length)
            return super()._model_generate(context, max_length, stop, **argument(cache), **generation_kwargs)


def tasks_named(names: Sequence[str], include: str | None) -> tuple[Any, list[str]]:
    """lm_eval's ``TaskManager`` and those of its tasks that ``names``, which may hold ``*``, stand for.

    ``include``: a folder with tasks of one's own.

    Raises ``LookupError`` for a task that lm_eval does not know, ``ValueError`` for an ``include`` that is no folder.
    """
    from lm_eval.tasks import TaskManager

    if include is not None and not Path(include).is_dir():
        raise ValueError(f"lm-eval-include {include}: allowed is a folder with tasks")
    manager = TaskManager(include_path=include)
    found: list[str] = []
    for name in names:
        if not (there := manager.match_tasks([name])):
            raise LookupError(f"lm_eval has no task {name!r}: `kvruntime lm-eval ls tasks` lists them")
        found += there
    return manager, list(dict.fromkeys(found))


def harness_tasks(
    loaded: LoadedModel,
    contenders: Sequence[Contender],
    names: Sequence[str],
    manager: Any,
    *,
    batch: int,
    limit: int | None,
    chat: bool,
    seed: int,
) -> list[Task]:
    """One a task of lm_eval's ``manager`` and contender."""

    def task(name: str, contender: Contender) -> Task:
        key = {"kind": KIND, **subject(loaded, contender, seed), "task": name, "limit": limit, "chat": chat}
        key |= {"batch_size": batch, "lm_eval": version("lm_eval")}

        def measured(tick: Tick) -> Row:
            return measure(loaded, contender, name, manager, batch=batch, limit=limit, chat=chat, seed=seed)

        cost = 1 if contender.name in BASE else 2
        return Task(key, measured, cost=cost, guest=contender.package != "kvruntime")

    return [task(name, contender) for name in names for contender in contenders]


def measure(
    loaded: LoadedModel,
    contender: Contender,
    task: str,
    manager: Any,
    *,
    batch: int,
    limit: int | None,
    chat: bool,
    seed: int,
) -> Row:
    """The row's figures of one of lm_eval's tasks or groups: ``metrics``, task -> metric -> value, and seconds."""
    from lm_eval import simple_evaluate

    start = perf_counter()
    found = simple_evaluate(
        model=KvruntimeLM(loaded, contender, batch_size=batch),
        tasks=[task],
        limit=limit,
        task_manager=manager,
        apply_chat_template=chat,
        bootstrap_iters=1000,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert found is not None
    metrics = {
        name: {key: value for key, value in values.items() if isinstance(value, int | float)}
        for name, values in found["results"].items()
    }
    samples = {name: counts["effective"] for name, counts in found["n-samples"].items()}
    return {"metrics": metrics, "num_examples": samples, "seconds": perf_counter() - start}


def command_line(arguments: Sequence[str]) -> int:
    """lm_eval's own command line, where ``--model kvruntime`` is known; its exit code."""
    from lm_eval.__main__ import cli_evaluate

    before, sys.argv = sys.argv, ["lm_eval", *arguments]
    try:
        cli_evaluate()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv = before
    return 0
