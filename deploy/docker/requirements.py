"""Print the dependencies of a pyproject.toml, one a line, as `pip install -r` reads them."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def main(file: str) -> None:
    """Write the project's dependencies to standard output."""
    tree = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    sys.stdout.writelines(f"{line}\n" for line in tree["project"]["dependencies"])


if __name__ == "__main__":
    main(sys.argv[1])
