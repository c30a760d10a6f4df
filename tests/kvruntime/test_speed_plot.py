"""The pictures of ``bench kernels`` and ``bench engine``: what is drawn is what the rows say."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure
from speed_rows import attention_rows, step_rows

from kvruntime.bench import speed_plot
from kvruntime.cli import run


def test_the_roof_and_the_points() -> None:
    axes = Figure().subplots()
    speed_plot.roofline(axes, attention_rows())
    (roof,) = axes.get_lines()
    x, y = roof.get_data()
    assert y[1] / x[1] == pytest.approx(3.0)  # tera-operations a byte: the read bandwidth
    clouds = {cloud.get_label(): cloud.get_offsets().tolist() for cloud in axes.collections}
    assert [len(points) for points in clouds.values()] == [3, 3, 3]  # flash and the portable kernel are not drawn
    for points in clouds.values():
        for intensity, rate in points:
            assert rate <= 3.0 * intensity
    assert clouds["kivi-2bit-g64-r64"][0][0] == pytest.approx(6.4 * clouds["fp16, best of cuDNN and flash"][0][0])


def test_the_gain_over_length() -> None:
    axes = Figure().subplots()
    speed_plot.speedup(axes, attention_rows())
    lines = {line.get_label(): line.get_data() for line in axes.get_lines()}
    x, y = lines["kivi-2bit-g64-r64, batch 1"]
    assert list(x) == [8192, 32768]
    assert y[0] == pytest.approx(6.4 * 2.6 / 2.8)
    assert list(lines["kivi-4bit-g64-r64, batch above 1"][0]) == [32768]


def test_the_break_even_is_marked() -> None:
    axes = Figure().subplots()
    speed_plot.latency(axes, step_rows())
    (mark,) = (line for line in axes.get_lines() if "faster from" in str(line.get_label()))
    assert mark.get_xdata()[0] == pytest.approx(0.08e-3 / 3e-8)
    assert "2,667" in mark.get_label()


@pytest.mark.parametrize(
    ("rows", "names"),
    [(attention_rows, {"roofline", "speedup", "summary"}), (step_rows, {"latency", "summary"})],
    ids=["kernels", "engine"],
)
def test_the_command_draws_them(rows, names, tmp_path) -> None:
    file = {"schema": "kvruntime.bench/1", "device": {"name": "card"}, "versions": {"torch": "2.11"}, "rows": rows()}
    (tmp_path / "r.json").write_text(json.dumps(file))
    assert run(["plot", str(tmp_path / "r.json"), "--out", str(tmp_path / "p")]) == 0
    assert {path.stem for path in (tmp_path / "p").iterdir()} == names
