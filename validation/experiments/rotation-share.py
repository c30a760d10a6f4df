"""What rotation takes of a decode step of turboquant: whole steps of a Llama-3-8B shape, with and without it.

``python rotation-share.py --copy DIR`` makes a copy of the packages whose kernels do not rotate, for ``PYTHONPATH``: a
step there answers wrongly.  ``python rotation-share.py OUT.json LABEL SIZE METHOD ...`` adds rows to ``OUT.json``:
``1x32k turboquant:nbits=4``, for example.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EDITS = (  # file, what it says, what the copy says
    ("store.py", "SIZE: tl.constexpr = rotation(CODING, DIM)", "SIZE: tl.constexpr = 1"),
    ("store.py", "    if rotation(layout.key, layout.key_dim):", "    if False:"),
    ("attention.py", "rotation(*each) for each in", "0 * len(each) for each in"),
)


def copy(folder: Path) -> None:
    for name in ("kvruntime", "kvsim"):
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
    for name, before, after in EDITS:
        path = folder / "kvruntime/methods/token" / name
        text = path.read_text()
        assert text.count(before) == 1, (name, before)
        path.write_text(text.replace(before, after))


def main(out: str, label: str, sizes: list[str], specs: list[str]) -> None:
    import torch

    from kvruntime.bench.engine import suite

    torch.cuda.set_device(0)
    subject, models = suite.SUBJECTS["llama-3-8b"], suite.Models("cuda:0")
    path = Path(out)
    rows = json.loads(path.read_text()) if path.exists() else []
    for size in sizes:
        batch_size, num_tokens = suite.size_of(size)
        for spec in specs:
            (method,) = suite.chosen([spec], subject.dtype)[1:]
            engine = models.engine(subject, method, batch_size, num_tokens)
            row = suite.measure_steps(engine, suite.cuda_clock, num_tokens, 3, models.loaded(subject).vocab_size)
            rows.append({"label": label, "size": size, "method": method.name, "ms": [1e3 * x for x in row["runs"]]})
            print(json.dumps(rows[-1]), flush=True)
            path.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    if sys.argv[1] == "--copy":
        copy(Path(sys.argv[2]))
    else:
        given = sys.argv[3:]
        main(sys.argv[1], sys.argv[2], [x for x in given if x[0].isdigit()], [x for x in given if not x[0].isdigit()])
