"""ShellCheck on every shell script."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHELLCHECK = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which(
    "shellcheck"
)


def scripts() -> list[Path]:
    """Return the files that begin with a shell's name, or are sourced by one that does."""
    found = []
    for folder in ("deploy", ".ci"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file():
                with path.open("rb") as file:
                    first = file.readline(80)
                if path.suffix == ".sh" or (first.startswith(b"#!") and b"sh" in first):
                    found.append(path)
    return found


def test_scripts_are_found() -> None:
    names = {path.name for path in scripts()}
    assert {"quickstart.sh", "test.sh", "environment.sh", "motley", "run"} <= names


@pytest.mark.skipif(
    SHELLCHECK is None, reason="shellcheck is not installed; the `test` extra brings it"
)
@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    ran = subprocess.run(
        [str(SHELLCHECK), "--external-sources", str(path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
