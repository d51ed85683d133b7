"""Print the dependencies of a pyproject.toml, and of the extras named after it, one a line."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def main(file: str, *extras: str) -> None:
    """Write what `pip install -r` reads to standard output."""
    project = tomllib.loads(Path(file).read_text(encoding="utf-8"))["project"]
    wanted = list(project["dependencies"])
    for extra in extras:
        wanted += project["optional-dependencies"][extra]
    sys.stdout.writelines(f"{line}\n" for line in wanted)


if __name__ == "__main__":
    main(*sys.argv[1:])
