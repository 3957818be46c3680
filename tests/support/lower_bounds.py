"""Prints the oldest version that pyproject.toml admits of everything users install, as constraints for pip."""

import re
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[2]


def pins() -> Iterator[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for requirement in chain(project["dependencies"], *(extras[name] for name in extras if name != "dev")):
        found = re.fullmatch(r"([\w-]+)>=([\w.]+)", requirement)
        if found is None:
            raise SystemExit(f"a requirement must be NAME>=VERSION, got {requirement!r}")
        yield "{}=={}".format(*found.groups())


if __name__ == "__main__":
    print(*pins(), sep="\n")
