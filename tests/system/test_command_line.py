"""The command line as a user runs it: every verb in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
READY_DEADLINE_S = 180.0
STOP_DEADLINE_S = 60.0

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


class CommandLine:
    """Runs verbs with a run-state folder of their own."""

    def __init__(self, home: Path) -> None:
        self.marker = f"MOTLEY_TEST_RUN={home}"
        name, value = self.marker.split("=", 1)
        self.environment = os.environ | {"MOTLEY_HOME": str(home), name: value}
        self.up: subprocess.Popen[str] | None = None

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        self.up = subprocess.Popen(
            [sys.executable, "-m", "cluster", "up", *arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self.up

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cluster", *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def processes(self) -> list[int]:
        """Every live process that this command line, or what it started, started."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if self.marker.encode() in environment:
                found.append(int(folder.name))
        return found


@pytest.fixture
def motley(tmp_path: Path) -> Iterator[CommandLine]:
    command_line = CommandLine(tmp_path / "home")
    yield command_line
    if command_line.up is not None:
        command_line.up.terminate()
        # Read to its end: a process that cannot write its last event would not stop.
        command_line.up.communicate(timeout=STOP_DEADLINE_S)


def events(up: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert up.stdout is not None
    for line in up.stdout:
        yield json.loads(line)


def test_a_deployment_comes_up_answers_and_leaves_nothing_behind(motley: CommandLine) -> None:
    up = motley.start("--json", "--http-port", "0", "--grpc-port", "0")
    told = []
    for event in events(up):
        told.append(event)
        if event["event"] == "ready":
            break
    assert told[0]["event"] == "planned"
    assert told[-1]["event"] == "ready", told
    loaded = {e["index"]: e["loaded_fraction"] for e in told if e["event"] == "stage_progress"}
    assert loaded == {0: 1.0, 1: 1.0, 2: 1.0}

    status = json.loads(motley.run("status", "--json").stdout)
    assert (status["ready"], len(status["stages"])) == (True, 3)
    twice = [
        json.loads(motley.run("generate", "def f(", "--json", "--seed", "7").stdout)["text"]
        for _ in range(2)
    ]
    assert twice[0] == twice[1]
    assert motley.run("generate", "x", "--token", "not-the-token").returncode == 6
    refused = motley.run("up", "--json")
    assert refused.returncode == 1
    assert "already runs as process" in json.loads(refused.stdout)["error"]["message"]

    down = motley.run("down", "--json")
    assert json.loads(down.stdout)["stopped"] is True
    assert up.wait(STOP_DEADLINE_S) == 0
    assert [event["event"] for event in events(up)] == ["stopped"]
    assert motley.run("status").returncode == 4
    deadline_s = time.monotonic() + STOP_DEADLINE_S
    while motley.processes() and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert motley.processes() == []


def test_down_while_it_starts_leaves_nothing_behind(motley: CommandLine) -> None:
    up = motley.start("--json", "--http-port", "0", "--grpc-port", "0")
    assert next(events(up))["event"] == "planned"

    assert motley.run("down").returncode == 0
    told = [event["event"] for event in events(up)]
    assert told[-1] == "stopped"
    assert "ready" not in told, "it does not load to the end first"
    assert up.wait(STOP_DEADLINE_S) == 0
    deadline_s = time.monotonic() + STOP_DEADLINE_S
    while motley.processes() and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert motley.processes() == []


def test_a_detached_deployment_serves_until_it_is_taken_down(motley: CommandLine) -> None:
    ran = motley.run("up", "--detach", "--json", "--http-port", "0", "--grpc-port", "0")
    try:
        told = [json.loads(line) for line in ran.stdout.splitlines()]
        assert ran.returncode == 0, ran
        assert told[0]["event"] == "planned"
        assert [event["event"] for event in told[-2:]] == ["ready", "detached"]
        assert os.getsid(told[-1]["pid"]) == told[-1]["pid"]
        log = Path(told[-1]["log"])
        assert log.stat().st_mode & 0o777 == 0o600

        assert json.loads(motley.run("status", "--json").stdout)["ready"] is True
        assert motley.run("generate", "def f(", "--max-tokens", "4").returncode == 0
        again = motley.run("up", "--detach", "--json")
        assert again.returncode == 1
        assert "already runs as process" in json.loads(again.stdout)["error"]["message"]
        logged = log.read_text(encoding="utf-8")
        assert f"serving HTTP on {told[-2]['http_url']}" in logged
        assert told[-2]["token"] not in logged
    finally:
        down = motley.run("down", "--json")
    assert json.loads(down.stdout)["stopped"] is True
    deadline_s = time.monotonic() + STOP_DEADLINE_S
    while motley.processes() and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert motley.processes() == []


def test_a_detached_start_that_fails_says_why_and_leaves_nothing(
    motley: CommandLine, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    tiny = "{id: a, kind: paced, flops_per_s: 1e9, memory_bytes_per_s: 1e9, memory_bytes: 3 MiB}"
    checkpoint = ROOT / "deploy" / "checkpoints" / "tiny-qwen3"
    path.write_text(f"model: {checkpoint}\ndevices: [{tiny}]\n", encoding="utf-8")

    ran = motley.run("up", "--detach", "--json", "--config", str(path))

    assert ran.returncode == 3
    assert "8 layers need" in json.loads(ran.stdout.splitlines()[-1])["error"]["message"]
    assert "motley: " in ran.stderr
    assert motley.processes() == []


def test_settings_that_cannot_work_start_nothing(motley: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: ./nowhere\n", encoding="utf-8")

    up = motley.run("up", "--config", str(path))

    assert up.returncode == 2
    assert "no folder ./nowhere" in up.stderr
    assert motley.processes() == []
