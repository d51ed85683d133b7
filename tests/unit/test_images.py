"""The container recipe by the rules that matter; no image is built."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "deploy" / "docker"
RECIPES = sorted(DOCKER.glob("*Dockerfile*"))
SECRET = re.compile(r"token|secret|passw|api_?key|credential", re.IGNORECASE)


class Instruction(NamedTuple):
    word: str
    text: str


def instructions(path: Path) -> list[Instruction]:
    """Return a Dockerfile's instructions, continued lines joined."""
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def texts(path: Path, word: str) -> list[str]:
    return [text for name, text in instructions(path) if name == word]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_base_is_pinned_by_a_full_version(path: Path) -> None:
    stages: set[str] = set()
    for text in texts(path, "FROM"):
        base, _, stage = text.partition(" AS ")
        if base not in stages:
            _, _, tag = base.partition(":")
            assert re.match(r"\d+\.\d+\.\d+", tag), base
        stages.add(stage)
    assert {"cpu", "cuda"} <= stages


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_an_image_runs_as_a_user_by_number_and_says_whether_it_is_well(path: Path) -> None:
    [user] = texts(path, "USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    [check] = texts(path, "HEALTHCHECK")
    assert "--start-period=" in check
    # What the runtime stage says holds for those that are built on it.
    words = [word for word, _ in instructions(path)]
    assert words.index("USER") > max(i for i, word in enumerate(words) if word == "COPY")
    for word in ("ENTRYPOINT", "CMD"):
        [command] = texts(path, word)
        assert json.loads(command)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_nothing_secret_is_built_in(path: Path) -> None:
    for word, text in instructions(path):
        if word in ("ARG", "ENV"):
            for name in re.findall(r"(\w+)=", text):
                assert not SECRET.search(name.replace("RAY_AUTH_MODE", "")), text
    assert "RAY_AUTH_MODE=token" in " ".join(texts(path, "ENV"))
    assert "ADD" not in {word for word, _ in instructions(path)}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_layer_leaves_no_package_lists_or_caches(path: Path) -> None:
    for text in texts(path, "RUN"):
        if "apt-get install" in text:
            assert "--no-install-recommends" in text
            assert "rm -rf /var/lib/apt/lists/*" in text
        for command in re.findall(r"pip install.*?(?:&&|$)", text):
            assert "--no-cache-dir" in command


def sent_to_the_builder(path: str) -> bool:
    """Docker's ignore file: the last pattern that matches decides; `!` takes back."""
    is_sent = True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#") and _matches(line.removeprefix("!"), path):
            is_sent = line.startswith("!")
    return is_sent


def _matches(pattern: str, path: str) -> bool:
    """Whether a pattern names the path or a folder above it; `**/` is any depth."""
    parts = path.split("/")
    if pattern.startswith("**/"):
        return any(fnmatch(part, pattern.removeprefix("**/")) for part in parts)
    above = "/".join(parts[: pattern.count("/") + 1])
    return fnmatch(above, pattern)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_what_is_copied_is_there_and_is_sent_to_the_builder(path: Path) -> None:
    for text in texts(path, "COPY"):
        parts = [part for part in shlex.split(text) if not part.startswith("--chmod")]
        if parts[0].startswith("--from="):
            continue
        for source in parts[:-1]:
            assert (ROOT / source).exists(), source
            some = source if (ROOT / source).is_file() else f"{source}/some.py"
            assert sent_to_the_builder(some), source


def test_secrets_tests_and_history_stay_at_home() -> None:
    for path in (".git/HEAD", ".venv/bin/python", "tests/unit/test_cli.py", "token", "runs/a/x"):
        assert not sent_to_the_builder(path), path
    assert not sent_to_the_builder("cluster/__pycache__/cli.pyc")


def test_the_entry_point_is_the_command_line() -> None:
    [entry] = texts(DOCKER / "Dockerfile", "ENTRYPOINT")
    copied = " ".join(texts(DOCKER / "Dockerfile", "COPY"))

    assert json.loads(entry)[-1] == "motley"
    assert "deploy/docker/motley /usr/local/bin/motley" in copied
    script = (DOCKER / "motley").read_text(encoding="utf-8")
    assert 'exec /opt/motley/env/bin/python -P -m cluster "$@"' in script


def test_the_requirements_are_those_of_the_project_and_of_ray_serve() -> None:
    [run] = [text for text in texts(DOCKER / "Dockerfile", "RUN") if "requirements.py" in text]
    assert "requirements.py pyproject.toml serve" in run
    ran = subprocess.run(
        [sys.executable, DOCKER / "requirements.py", ROOT / "pyproject.toml", "serve"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    wanted = project["dependencies"] + project["optional-dependencies"]["serve"]
    assert ran.stdout.splitlines() == wanted
    assert len([line for line in wanted if re.match(r"torch[<>=]", line)]) == 1
