"""The one reader of files: regular ones of bounded size, each failure one line; and JSON of finite numbers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvsim.finite_json import json_text, not_finite, read_json
from kvsim.regular_files import read_bytes, read_named, signature


def test_a_failure_calls_the_file_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1234")
    os.mkfifo(tmp_path / "pipe")
    assert read_named(tmp_path / "file", "results") == read_bytes(tmp_path / "file") == b"1234"
    for name, most, message in (
        ("none", 9, r"^cannot read results \S+none: No such file or directory$"),
        ("pipe", 9, r"^cannot read results: \S+pipe is not a regular file$"),
        ("", 9, r"^cannot read results: \S+ is not a regular file$"),
        ("file", 3, r"^cannot read results: \S+file has 4 bytes: allowed are up to 3$"),
    ):
        with pytest.raises(ValueError, match=message):
            read_named(tmp_path / name, "results", most)


@pytest.mark.parametrize("text", ["{", "NaN", '{"a": [-Infinity]}', "\xff", "[" * 100_000])
def test_json_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"^results \S+a\.json is not valid JSON: "):
        read_json(tmp_path / "a.json", "results")


def test_no_number_is_written() -> None:
    assert json_text({"a": [1.5, None]}) == '{"a": [1.5, null]}'
    assert not_finite({"a": [1, {"b": float("inf")}]}) == "a[1].b is inf"
    with pytest.raises(ValueError, match=r"^a\[0\] is nan: JSON holds finite numbers only$"):
        json_text({"a": [float("nan")]})


def test_a_signature_changes_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert signature(path) is None
    path.write_bytes(b"1")
    before = signature(path)
    path.write_bytes(b"12")
    assert before is not None
    assert signature(path) not in (None, before)
