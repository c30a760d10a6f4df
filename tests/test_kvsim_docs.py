"""The blocks of docs/kvsim.md between ``<!-- kvsim ... -->`` and ``<!-- end -->`` are what the command prints.

``python tests/test_kvsim_docs.py`` writes them anew.
"""

import re
import shlex
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from kvsim.cli import run

DOCS = Path(__file__).parents[1] / "docs" / "kvsim.md"
BLOCK = re.compile(r"(<!-- kvsim (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def regenerated(text: str) -> str:
    def block(match: re.Match[str]) -> str:
        out = StringIO()
        with redirect_stdout(out):
            assert run(shlex.split(match[2])) == 0
        return f"{match[1]}```text\n{out.getvalue().strip()}\n```\n{match[4]}"

    return BLOCK.sub(block, text)


def test_the_blocks_are_what_the_commands_print() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert len(BLOCK.findall(text)) >= 3
    assert text == regenerated(text)


if __name__ == "__main__":
    DOCS.write_text(regenerated(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
