"""Every file that kvsim writes is whole whatever fails: the old one, or the new one, and one line that says so."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from write_faults import Killed, failing, steps, visible

from kvsim import atomic
from kvsim.atomic import check_replaceable, replace_file, sync_files
from kvsim.cli import run

OLD = b"what was there"


def everywhere(
    folder: Path, call: Callable[[], object], before: Callable[[], None], last: bool = False
) -> Iterator[tuple[str, str]]:
    """Runs ``call`` once whole, then with each step failing, by an error and by a kill; yields after each what failed.

    ``last``: only the last step of each kind.
    """
    before()
    found = steps(folder, call)
    for at in dict(found).items() if last else found:
        for error in ("full" if at[0] in ("write", "sync") else "forbidden", "killed"):
            before()
            try:
                with failing(folder, at, error):
                    call()
            except (ValueError, Killed) as caught:
                assert isinstance(caught, Killed) == (error == "killed")  # noqa: PT017
                assert "\n" not in str(caught)  # noqa: PT017
            yield f"{at[0]} {at[1]}", error
            for left in folder.glob(".*.tmp"):  # a kill's; this process lives on
                left.unlink()


@pytest.mark.parametrize("there", [True, False])
def test_a_fault_at_any_step_leaves_the_old_or_the_new(there: bool, tmp_path: Path) -> None:
    path, content = tmp_path / "a", b"new" * 100_000

    def before() -> None:
        path.write_bytes(OLD) if there else path.unlink(missing_ok=True)

    seen = set()
    for what, error in everywhere(tmp_path, lambda: replace_file(path, content), before):
        found = path.read_bytes() if path.exists() else None
        assert found in (OLD if there else None, content), what
        assert (found == content) == (what == "sync 2"), (what, error)  # the folder's, after the rename
        left = os.listdir(tmp_path)
        assert (visible(left) if error == "killed" else set(left)) == ({"a"} if found is not None else set()), what
        seen.add(what)
    assert seen >= {"open 1", "write 1", "sync 1", "sync 2", "replace 1"}


COMMANDS = {
    "report": ("page.html", "report --model gpt2 --gpu l4 --ctx 1k --batch 1 --method fp16 --out {path}"),
    "plot": ("plot.png", "plot --model gpt2 --ctx 1k --method fp16 -o {path}"),
    "sweep-csv": ("grid.csv", "sweep --model gpt2 --method fp16 --method fp8 --ctx 1k --out {path} --quiet"),
    "sweep-json": ("grid.json", "sweep --model gpt2 --method fp16 --method fp8 --ctx 1k --out {path} --quiet"),
    "sweep-parquet": ("grid.parquet", "sweep --model gpt2 --method fp16 --method fp8 --ctx 1k --out {path} --quiet"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_leaves_half_a_file(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in {"plot": ["matplotlib"], "sweep": ["numpy"]}.get(name.partition("-")[0], []):
        pytest.importorskip(package, reason=f"{package} is not installed")
    if name == "sweep-parquet":
        pytest.importorskip("pyarrow", reason="pyarrow (the parquet extra) is not installed")
    file, line = COMMANDS[name]
    path = tmp_path / file
    argv = line.format(path=path).split()
    assert run(argv) == 0
    whole = path.read_bytes()
    if name == "plot":  # drawn once: what is judged is how it is written

        def save(figure: object, file: IO[bytes], **options: object) -> None:
            file.write(whole[:100])
            file.write(whole[100:])

        monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
    codes: list[int] = []
    last = name in ("sweep-json", "sweep-parquet")  # their parts are written as those of CSV
    call, before = (lambda: codes.append(run(argv))), (lambda: path.write_bytes(OLD) and None)
    for what, error in everywhere(tmp_path, call, before, last):
        found = path.read_bytes()
        assert found in (OLD, whole), (what, error)
        left = set(os.listdir(tmp_path)) - {file}
        assert (visible(left) if error == "killed" else left) <= {f"{file}.parts"}, (what, error)
        if error != "killed":
            assert codes[-1] == 2, (what, error)
            err = capsys.readouterr().err
            assert err.count("\n") == 1, (what, err)
            assert err.startswith("kvsim: error: cannot write "), err
        if left or last:  # nothing is in the way of the next one
            assert run(argv) == 0, (what, error)
            assert path.read_bytes() == whole, (what, error)
            assert visible(os.listdir(tmp_path)) == {file}, (what, error)
            capsys.readouterr()
    assert codes


def test_the_profile_of_calibrate_is_put_in_place_whole(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the runtime extra (torch) is not installed")
    from kvruntime.calibrate.card import write

    path = tmp_path / "profile.json"
    write(path, {"a": 1})
    whole = path.read_bytes()
    for what, _ in everywhere(tmp_path, lambda: write(path, {"a": 1}), lambda: path.write_bytes(OLD) and None):
        assert path.read_bytes() in (OLD, whole), what
        assert visible(os.listdir(tmp_path)) == {"profile.json"}, what


def test_what_killed_processes_left_goes_with_the_next_write_of_the_file(tmp_path: Path) -> None:
    """Only theirs: not a living process's, nor one's of another machine, nor another file's."""
    os.kill(gone := os.posix_spawnp("true", ["true"], os.environ), 0)
    os.waitpid(gone, 0)
    here = atomic._place()
    kept = {
        f".a.{here}-{os.getpid()}-01234567.tmp",
        f".a.{here}-1-01234567.tmp",
        f".a.00000000-{gone}-01234567.tmp",
        f".b.{here}-{gone}-01234567.tmp",
        f".a.{here}-{gone}-01234567.tmp.mine",
    }
    for name in (*kept, f".a.{here}-{gone}-01234567.tmp", f".a.{here}-{gone}-89abcdef.tmp"):
        (tmp_path / name).touch()
    replace_file(tmp_path / "a", b"new")
    assert set(os.listdir(tmp_path)) == {"a", *kept}


def test_a_kill_leaves_a_file_that_the_next_write_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Killed), failing(tmp_path, ("replace", 1), "killed"):
        replace_file(tmp_path / "a", b"1")
    assert len(os.listdir(tmp_path)) == 1
    monkeypatch.setattr(atomic, "_lives", lambda process: False)
    replace_file(tmp_path / "a", b"2")
    assert os.listdir(tmp_path) == ["a"]


def test_a_mode_is_kept_and_a_link_followed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(OLD)
    (tmp_path / "a").chmod(0o640)
    (tmp_path / "link").symlink_to("a")
    replace_file(tmp_path / "link", "text: é")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a").read_text(encoding="utf-8") == "text: é"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_new_file_has_the_mode_that_any_new_file_gets(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    replace_file(tmp_path / "a", b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_device_is_written_to() -> None:
    replace_file("/dev/null", b"gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(ValueError, match=r"^cannot write /dev/full: No space left on device$"):
        replace_file("/dev/full", b"gone")
    with pytest.raises(ValueError, match=r"^cannot write /dev/null: it is not a regular file$"):
        replace_file("/dev/null", b"gone", regular=True)


@pytest.mark.parametrize("there", ["folder", "missing/file", "file/below", "n" * 300])
def test_what_cannot_be_written_is_one_line(there: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^cannot write [^\n]+: [^\n]+$"):
        replace_file(tmp_path / there, b"")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_long_work_begins_only_where_its_file_can_be_written(tmp_path: Path) -> None:
    check_replaceable(tmp_path / "new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="Is a directory"):
        check_replaceable(tmp_path / "folder")


def test_files_left_unsynced_are_synced_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(atomic.os, "fsync", synced.append)
    for name in "abc":
        replace_file(tmp_path / name, b"1", sync=False)
    assert not synced
    sync_files([tmp_path / name for name in "abc"])
    assert len(synced) == 4  # the folder's names too
    sync_files([])
