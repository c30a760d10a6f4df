"""Prints the lowest versions that pyproject.toml states for what an install of ``[all]`` needs, one requirement a line.

python tests/support/lowest.py [NAME==VERSION ...]      each in place of the stated one: torch==2.13.0
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
REQUIREMENT = re.compile(r"(?P<name>[\w-]+)(\[(?P<extras>[\w,]+)\])?(>=(?P<least>[\d.]+))?")


def lowest(extra: str = "all", path: Path = PROJECT) -> dict[str, str]:
    """Package -> lowest version, of the project's own dependencies and those of ``extra``.

    Raises ``ValueError`` for a package without a lowest version, or with two.
    """
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    found: dict[str, str] = {}
    todo = [*project["dependencies"], f"{project['name']}[{extra}]"]
    while todo:
        given = todo.pop()
        match = REQUIREMENT.match(given)
        assert match is not None, given
        if match["name"] == project["name"]:
            for name in match["extras"].split(","):
                todo += project["optional-dependencies"][name]
        elif match["least"] is None or found.setdefault(match["name"], match["least"]) != match["least"]:
            raise ValueError(f"{given}: allowed is one lowest version a package, NAME>=VERSION")
    return dict(sorted(found.items()))


if __name__ == "__main__":
    others = dict(given.split("==") for given in sys.argv[1:])
    for name, least in (lowest() | others).items():
        print(f"{name}=={least}")
