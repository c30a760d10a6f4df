"""``kvruntime eval``'s windows: likelihood, divergence, the floor, bits, intervals, the command and its rows."""

import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from runtime_tiny import tiny_directory, tiny_model  # noqa: E402
from transformers import DynamicCache  # noqa: E402

from kvruntime import make_cache  # noqa: E402
from kvruntime.bench.quality.report import change, tables  # noqa: E402
from kvruntime.cli import run  # noqa: E402
from kvruntime.eval.bits import held_bits, packed_bits  # noqa: E402
from kvruntime.eval.intervals import interval, mean_interval, perplexity_change, resampled_means  # noqa: E402
from kvruntime.eval.perplexity import perplexity  # noqa: E402
from kvruntime.eval.windows import position_edges, ranges_of, score_windows  # noqa: E402
from kvruntime.hf.cache import argument  # noqa: E402
from kvsim.layout import LayerShape  # noqa: E402
from kvsim.methods import Evict, Full, Kivi, kivi_boost  # noqa: E402

KIVI = Kivi(nbits=2, residual_length=32, dtype="float32")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def windows():
    return torch.randint(128, (3, 97), generator=torch.Generator().manual_seed(1))


def scored(model, windows, method, **options):
    return score_windows(
        model,
        windows,
        lambda n: make_cache(model, method, max_seq_len=n),
        make_reference=lambda n: DynamicCache(config=model.config),
        **{"chunk": 8, "batch": 3, "reference_chunk": 32, **options},
    )


def test_scores_are_those_of_whole_distributions(model, windows):
    """Against logits of the same chunks, kept whole and compared here in double precision."""
    method, chunk = KIVI, 8
    scores = scored(model, windows, method)
    cache, kept = make_cache(model, method, max_seq_len=97), []
    with torch.inference_mode():
        for start in range(0, 96, chunk):
            kept.append(model(windows[:, start : start + chunk], **argument(cache)).logits.double())
        plain = model(windows[:, :96]).logits.double().log_softmax(-1)
    own = torch.cat(kept, 1).log_softmax(-1)
    nll = -own.gather(-1, windows[:, 1:, None])[..., 0]
    kl = (plain.exp() * (plain - own)).sum(-1)
    agreed = (own.argmax(-1) == plain.argmax(-1)).double()
    assert torch.allclose(scores.nll, nll.sum(1), rtol=1e-5)
    assert torch.allclose(scores.kl, kl.sum(1), rtol=1e-3, atol=1e-4)
    assert torch.equal(scores.agreed, agreed.sum(1))
    first, second = scores.by_position.tolist()
    assert ranges_of(scores.edges) == [(1, 63), (64, 96)]
    assert [first[0], second[0]] == [3 * 63, 3 * 33]
    assert first[1] == pytest.approx(nll[:, :63].sum().item(), rel=1e-5)
    assert second[2] == pytest.approx(kl[:, 63:].sum().item(), rel=1e-3)
    assert scores.nll.sum().item() / 288 == pytest.approx(
        perplexity(model, windows, lambda n: make_cache(model, method, max_seq_len=n), chunk=chunk, batch=3).nll
    )


def test_the_floor_is_far_below_a_lossy_cache(model, windows):
    floor = scored(model, windows, Full("float32")).figures()
    lossy = scored(model, windows, KIVI).figures()
    assert floor["kl"] < 1e-6 < 1e-2 < lossy["kl"]
    assert floor["agreement"] == 1 > lossy["agreement"]
    assert floor["ppl"] == pytest.approx(math.exp(floor["nll"]))
    assert len(lossy["window_nll"]) == len(lossy["window_kl"]) == 3
    assert np.mean(lossy["window_nll"]) == pytest.approx(lossy["nll"])


def test_batches_and_reference_chunks_change_nothing(model, windows):
    want = scored(model, windows, KIVI)
    have = scored(model, windows, KIVI, batch=2, reference_chunk=100)
    assert torch.allclose(want.nll, have.nll)
    assert torch.allclose(want.kl, have.kl, atol=1e-4)
    assert torch.allclose(want.by_position, have.by_position, atol=1e-3)
    ragged = {"prompt_length": 29, "chunk": 5, "reference_chunk": 32}  # a step begins before the reference's chunk ends
    assert scored(model, windows, Full("float32"), **ragged).figures()["kl"] < 1e-6
    with pytest.raises(ValueError, match="batch 0: allowed are 1 and above"):
        scored(model, windows, KIVI, batch=0)


def test_ranges_of_positions():
    assert position_edges(4096) == (1, 64, 128, 256, 512, 1024, 2048, 4096)
    assert position_edges(10) == (1, 10)
    assert ranges_of(position_edges(200)) == [(1, 63), (64, 127), (128, 199)]


def test_bits_by_hand():
    """Keys: 2 bits, 16 of 64 channels 2 more, scale and zero a group of 64 tokens; values: 2 bits, one scale of 64."""
    shapes = [LayerShape(3, 64, 64)] * 30
    assert packed_bits(kivi_boost(2), shapes) == (2 + 0.5 + 32 / 64 + 2 + 16 / 64) / 2 == 2.625
    assert packed_bits(Kivi(nbits=4, group_size=64), shapes) == 4.5
    assert packed_bits(Full(), shapes) == held_bits(Full(), shapes, 100) == 16
    assert held_bits(kivi_boost(2), shapes, 1024) > held_bits(kivi_boost(2), shapes, 4096) > 2.625
    assert packed_bits(Evict(budget=512), shapes) == 0
    assert held_bits(Evict(budget=512), shapes, 1024) == 8


def test_intervals_are_paired():
    """A constant difference has an interval of no width, however much windows differ; an unpaired one would not."""
    base = [1.0, 2.0, 5.0, 3.0] * 10
    change_, low, high = perplexity_change([value + 0.02 for value in base], base)
    assert change_ == pytest.approx(math.expm1(0.02))
    assert low == pytest.approx(change_)
    assert high == pytest.approx(change_)
    mean, low, high = mean_interval(base)
    assert low < mean == 2.75 < high
    assert high - low == pytest.approx(2 * 1.96 * np.std(base) / math.sqrt(40), rel=0.15)
    assert interval(np.arange(101.0), 0.9) == pytest.approx((5, 95))
    with pytest.raises(ValueError, match="columns of 1, 2 windows"):
        resampled_means([1.0], [1.0, 2.0])


def command(folder, out, *more):
    text = folder / "t.txt"
    text.write_text("abcdefghij klmno pqrs" * 30)
    words = [
        "eval",
        "--model",
        str(folder),
        "--text",
        str(text),
        "--window",
        "64",
        "--window",
        "150",
        "--offline",
        "--chunk",
        "32",
    ]
    return run([*words, "--method", "kivi:nbits=2,residual_length=32", "--device", "cpu", "--out", str(out), *more])


def test_the_command(tmp_path, capsys):
    folder, out = tiny_directory(tmp_path), tmp_path / "rows.json"
    assert command(folder, out, "--max-tokens", "320") == 0, capsys.readouterr().err
    shown = capsys.readouterr()
    rows = json.loads(out.read_text())["rows"]
    assert [(row["window"], row["num_windows"], row["method"]) for row in rows] == [
        (64, 5, "fp16"), (64, 5, "kivi-2bit-g32-r32"), (150, 2, "fp16"), (150, 2, "kivi-2bit-g32-r32")
    ]  # fmt: skip
    base, row = rows[:2]
    assert row["bits"] == 3
    assert row["commit"] == base["commit"]
    off = change(row, base)
    assert off[0] == pytest.approx(row["ppl"] / base["ppl"] - 1)
    assert off[1] <= off[0] <= off[2]
    line = next(line for line in shown.out.splitlines() if line.startswith("| kivi"))
    assert f"{off[0]:+.2%}" in line
    assert f"{row['kl']:.5f}" in line
    assert "random" not in shown.out
    assert "128 to 149" in shown.out
    measured = [row["seconds"] for row in rows]
    assert command(folder, out, "--max-tokens", "320", "--resume") == 0
    assert "4 of 4 measurements are in" in capsys.readouterr().err
    assert [row["seconds"] for row in json.loads(out.read_text())["rows"]] == measured


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--window", "1"], "window 1: allowed are 2 and above"),
        (["--window", "300"], "window 300 exceeds the model's 256 positions"),
        (["--window", "999999"], "window 999999 exceeds the model's 256 positions"),  # longer than the text, too
        (["--batch", "0"], "batch 0: allowed are 1 to"),
        (["--reference-chunk", "0"], "reference chunk 0: allowed are 1 to"),
    ],
)
def test_what_the_command_refuses(tmp_path, capsys, more, said):
    assert command(tiny_directory(tmp_path), tmp_path / "rows.json", *more) == 2
    assert said in capsys.readouterr().err


def test_a_table_without_the_uncompressed_cache_compares_nothing():
    row = {
        "kind": "windows", "method": "x", "model": "m", "weights": "w", "dtype": "float32", "text": "t", "window": 9,
        "num_windows": 1, "chunk": 1, "num_tokens": 8, "bits": 2.0, "held_bits": 3.0, "ppl": 2.0, "kl": 0.1,
        "agreement": 0.5, "by_position": [[1, 8, 0.7, 0.1, 0.5]], "window_nll": [0.7],
    }  # fmt: skip
    assert "%" not in tables([row]).replace("95 %", "").replace("50.00%", "")
