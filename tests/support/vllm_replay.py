"""A run of vLLM (:mod:`vllm_run`) again in transformers with the same cache: each request's steps as it was given them.

``python vllm_replay.py MODEL OPTIONS RUN...`` prints a line of JSON a run, in float32 on a CPU.
"""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch

import kvruntime
from kvruntime.hf.cache import argument

Step = tuple[int, list[int]]


class Apart(NamedTuple):
    worst: float
    """Difference of the log probability of a new token."""
    mean: float
    greedy: int
    """New tokens that are the likeliest here too."""
    again: int
    """Steps that began before the end of what was stored: preemption, prefix hits, drafts taken back."""


def lives_of(row: dict[str, Any]) -> list[list[Step]]:
    """Rounds of steps; where they were not watched, the prompt at once behind its cached prefix, and single tokens."""
    whole = row["prompt"] + row["tokens"]
    if not any(row.get("lives", [])):
        parts = [(0, row["cached"]), (row["cached"], len(row["prompt"]))]
        parts += [(at, at + 1) for at in range(len(row["prompt"]), len(whole) - 1)]
        return [[(start, whole[start:end]) for start, end in parts if end > start]]
    found = []
    for life in row["lives"]:
        found.append([(at, [whole[at + i] if x < 0 else x for i, x in enumerate(given)]) for at, given in life])
    return found


def length_of(steps: list[Step]) -> int:
    return steps[-1][0] + len(steps[-1][1]) if steps else 0


def kept(steps: list[Step], length: int) -> list[Step]:
    """Those that the first ``length`` tokens came by."""
    return [(start, tokens[: length - start]) for start, tokens in steps if start < length]


def replay(model: Any, row: dict[str, Any], method: Any = "kivi", **options: Any) -> Apart:
    """A row's last round in ``model``, float32.  A prefix that was hit comes as the steps of the round that stored it,
    and so does what a preempted request computes again; what the scheduler took back is not computed."""
    whole, first = row["prompt"] + row["tokens"], len(row["prompt"])
    *earlier, last = lives_of(row)
    steps: list[Step] = []
    for before, tokens in (step for life in earlier for step in life):
        steps = [*kept(steps, before), (before, tokens)]
    cache, held = kvruntime.make_cache(model, method, **options), 0
    saved: tuple[int, Any] | None = None
    greedy, again, seen, apart = 0, 0, set(), [0.0]

    def run(before: int, tokens: list[int]) -> Any:
        nonlocal held
        assert before == held
        held += len(tokens)
        with torch.no_grad():
            given = torch.tensor([tokens], device=model.device)
            return model(given, use_cache=True, **argument(cache)).logits[0].float().log_softmax(-1)

    def again_of(start: int, part: list[int]) -> None:
        """A step that is computed again.  Of drafts of which none was taken one token is left: that token came among
        others and saw itself as it was, which matters where every token is coded."""
        nonlocal held
        whole_step = next((list(tokens) for at, tokens in last if at == start), part)
        if len(part) == 1 < len(whole_step) and whole_step[:1] == part and not hasattr(cache.method, "residual_length"):
            run(start, whole_step)
            cache.crop(1 - len(whole_step))
            held = start + 1
        else:
            run(start, part)

    for number, (before, tokens) in enumerate(last):
        if before != held or not number:
            again += before != held
            steps = kept(steps, before)
            cache, held = kvruntime.make_cache(model, method, **options), 0
            if saved is not None and saved[0] <= before:
                held, cache = saved
            for start, part in steps:
                if start >= held:
                    again_of(start, part)
            saved = None
        if len(tokens) > 1 and before >= first:
            saved = before, deepcopy(cache)
        steps.append((before, tokens))
        logits = run(before, tokens)
        right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tokens, whole[before:], strict=False)))
        for i in range(right):
            new = before + i + 1 - first
            if 0 <= new < len(row["tokens"]) and new not in seen:
                seen.add(new)
                token = row["tokens"][new]
                apart.append(abs(logits[i, token].item() - row["logprobs"][new]))
                greedy += int(logits[i].argmax()) == token
    assert len(seen) == len(row["tokens"])
    return Apart(max(apart), sum(apart) / len(seen), greedy, again)


def main(folder: str, options: str, *runs: str) -> None:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for run in runs:
        found = json.loads(Path(run).read_text())
        if "error" in found:
            print(json.dumps({"run": Path(run).stem, "error": found["error"][:300]}), flush=True)
            continue
        rows = [replay(model, row, **json.loads(options)) for row in found["rows"]]
        print(json.dumps({
            "run": Path(run).stem, "worst": [round(row.worst, 7) for row in rows],
            "mean": round(sum(row.mean for row in rows) / len(rows), 7),
            "greedy": sum(row.greedy for row in rows), "tokens": sum(len(row["tokens"]) for row in found["rows"]),
            "again": sum(row.again for row in rows), "cached": [row["cached"] for row in found["rows"]],
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
