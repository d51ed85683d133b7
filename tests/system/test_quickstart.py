"""`deploy/quickstart.sh` as a newcomer runs it, in a checkout whose environment is installed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 300.0
GONE_DEADLINE_S = 30.0

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    """Where these tests run from the checkout's own .venv, it holds all: tell the script so.

    The stamp is the script's own (see deploy/environment.sh). From another environment the script
    makes .venv, which takes minutes.
    """
    stamp = ROOT / ".venv" / ".motley-installed"
    before = stamp.read_text(encoding="utf-8") if stamp.exists() else None
    if Path(sys.prefix).resolve() == (ROOT / ".venv").resolve():
        about = (ROOT / "pyproject.toml").read_bytes() + sys.version.encode() + str(ROOT).encode()
        stamp.write_text(f"{hashlib.sha256(about).hexdigest()}\n", encoding="utf-8")
    yield
    if before is None:
        stamp.unlink(missing_ok=True)
    else:
        stamp.write_text(before, encoding="utf-8")


class Newcomer:
    """Runs the script with a temporary folder of its own and finds what it left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.marker = f"MOTLEY_TEST_RUN={folder}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MOTLEY_", "RAY_"))}
        self.environment = kept | {"TMPDIR": str(folder), "MOTLEY_TEST_RUN": str(folder)}

    def quickstart(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._run("bash", "deploy/quickstart.sh", *arguments)

    def motley(self, *arguments: str, home: str) -> subprocess.CompletedProcess[str]:
        self.environment["MOTLEY_HOME"] = home
        return self._run(".venv/bin/python", "-m", "cluster", *arguments)

    def _run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False,
            timeout=DEADLINE_S,
        )  # fmt: skip

    def check_no_process_is_left(self) -> None:
        deadline_s = time.monotonic() + GONE_DEADLINE_S
        while left := self.processes():
            assert time.monotonic() < deadline_s, left
            time.sleep(0.2)

    def processes(self) -> list[str]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.marker.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_text(encoding="utf-8"))
            except OSError:
                continue
        return found


@pytest.fixture
def newcomer() -> Iterator[Newcomer]:
    folder = Path(tempfile.mkdtemp(prefix="qs-"))  # short: Ray puts sockets there
    yield Newcomer(folder)
    shutil.rmtree(folder, ignore_errors=True)


STAGE = re.compile(
    r"^stage (\d) on (\w+) +layers \[(\d), (\d)\): +([\d.]+) tokens per second of busy time "
    r"\((\d+) steps, ([\d.]+) s busy",
    re.MULTILINE,
)


def check_story(ran: subprocess.CompletedProcess[str]) -> None:
    """The plan, an answer, and what each stage did for it."""
    assert ran.returncode == 0, ran.stderr
    assert "environment is up to date" in ran.stderr
    plan, _, rest = ran.stdout.partition("stage 0 on ")
    for device in ("big", "middle", "small"):
        assert device in plan
    assert "tokens/s" in plan
    stages = STAGE.findall(f"stage 0 on {rest}")
    assert [stage[:4] for stage in stages] == [
        ("0", "big", "0", "5"),
        ("1", "middle", "5", "7"),
        ("2", "small", "7", "8"),
    ]
    for *_, tokens_per_s, steps, busy_s in stages:
        assert float(tokens_per_s) > 0
        assert int(steps) > 1
        assert float(busy_s) > 0


def test_it_works_twice_in_a_row_and_leaves_nothing(newcomer: Newcomer) -> None:
    told = []
    for _ in range(2):
        ran = newcomer.quickstart()
        check_story(ran)
        assert "nothing is left running" in ran.stderr
        newcomer.check_no_process_is_left()
        assert list(newcomer.folder.glob("motley-*")) == []
        plan_and_answer, timing, _ = re.split(r"(?m)^(.* tokens in .*)$", ran.stdout)
        sys.stdout.write(f"{timing}\n")
        told.append(plan_and_answer)
    assert told[0] == told[1]


def test_kept_it_answers_where_it_says_until_it_is_taken_down(newcomer: Newcomer) -> None:
    ran = newcomer.quickstart("--keep")
    check_story(ran)
    told = dict(
        re.findall(
            r"^  (?:export )?(MOTLEY_HOME|OpenAI HTTP|gRPC|token)[ =]+(\S+)$", ran.stdout, re.M
        )
    )
    home = told["MOTLEY_HOME"]
    try:
        assert newcomer.processes()
        headers = {"Authorization": f"Bearer {told['token']}"}
        with httpx.Client(headers=headers, timeout=60.0, trust_env=False) as client:
            body = {"prompt": "import os\n", "max_tokens": 4}
            answer = client.post(f"{told['OpenAI HTTP']}/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] > 0
        asked = newcomer.motley(
            "generate", "x", "--target", told["gRPC"], "--token", told["token"], home=home
        )
        assert asked.returncode == 0, asked.stderr
    finally:
        down = newcomer.motley("down", home=home)
    assert down.returncode == 0, down.stderr
    newcomer.check_no_process_is_left()


def test_an_unknown_argument_is_refused_before_anything_is_done(newcomer: Newcomer) -> None:
    ran = newcomer.quickstart("--kept")
    assert ran.returncode == 1
    assert "usage: deploy/quickstart.sh [--keep]" in ran.stderr
    assert list(newcomer.folder.iterdir()) == []
