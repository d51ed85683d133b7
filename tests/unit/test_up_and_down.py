from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.commands.down import StillRunningError, bring_down
from cluster.commands.output import Output
from cluster.commands.up import AlreadyRunningError, bring_up
from cluster.config import MotleyConfig, default_config
from cluster.events import LaunchEvent, Planned, Ready, StageProgress, Stopped, event_json
from cluster.planning import declared_topology, make_plan
from cluster.runstate import (
    NotRunningError,
    RunState,
    find_state,
    is_running,
    state_file,
    write_state,
)
from placement.stages import StagesPlan

Report = Callable[[LaunchEvent], None]
READY = Ready("http://127.0.0.1:8000", "127.0.0.1:8001", "secret-token", 1.5)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTLEY_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def plan() -> StagesPlan:
    from actors.engine.checkpoint import Checkpoint

    config = default_config()
    profile = Checkpoint.open(config.model).profile(dtype_bytes=4)
    return make_plan(config, profile, declared_topology(config))


def saved() -> dict[str, object]:
    path = state_file("tiny-qwen3")
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def process(code: str) -> subprocess.Popen[bytes]:
    """A live process that looks like `python -m cluster up`."""
    return subprocess.Popen([sys.executable, "-c", code, "-m", "cluster", "up"])


def state_of(pid: int) -> RunState:
    return RunState(name="tiny-qwen3", pid=pid, started_unix_s=1, config_path="x")


def wait_until(holds: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10.0
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_the_state_follows_the_launch_and_ends_with_it(plan: StagesPlan) -> None:
    seen = []

    def launcher(config: MotleyConfig, report: Report) -> None:
        seen.append(saved())
        report(Planned(plan, "split: because"))
        report(READY)
        seen.append(saved())
        report(Stopped("signal"))

    bring_up(default_config(), "x.yaml", Output(as_json=True), launcher)

    starting, ready = seen
    assert (starting["pid"], starting["http_url"], starting["token"]) == (os.getpid(), "", "")
    assert (ready["http_url"], ready["token"]) == (READY.http_url, "secret-token")
    assert saved() == {}


def test_a_failed_launch_leaves_no_state() -> None:
    def launcher(config: MotleyConfig, report: Report) -> None:
        raise RuntimeError("no devices")

    with pytest.raises(RuntimeError, match="no devices"):
        bring_up(default_config(), "x.yaml", Output(as_json=False), launcher)
    assert saved() == {}


def test_json_is_one_event_a_line(plan: StagesPlan, capsys: pytest.CaptureFixture[str]) -> None:
    events: list[LaunchEvent] = [
        Planned(plan, "split: because"),
        StageProgress(1, "middle", 0.5),
        READY,
        Stopped("signal"),
    ]

    def launcher(config: MotleyConfig, report: Report) -> None:
        for event in events:
            report(event)

    bring_up(default_config(), "x.yaml", Output(as_json=True), launcher)

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [event_json(event) for event in events]
    assert [line["event"] for line in lines] == ["planned", "stage_progress", "ready", "stopped"]
    assert StagesPlan.from_json(lines[0]["plan"]) == plan


def test_people_see_the_plan_and_the_addresses_but_no_token_in_a_log(
    plan: StagesPlan, capsys: pytest.CaptureFixture[str]
) -> None:
    def launcher(config: MotleyConfig, report: Report) -> None:
        for event in (
            Planned(plan, "split: because"),
            StageProgress(0, "big", 1.0),
            StageProgress(9, "unknown", 1.0),
            READY,
            Stopped("signal"),
        ):
            report(event)

    bring_up(default_config(), "x.yaml", Output(as_json=False), launcher)

    out, err = capsys.readouterr()
    assert out == ""
    assert "http://127.0.0.1:8000/v1" in err
    assert "http://127.0.0.1:8000/  (see `motley dashboard`)" in err
    assert "slowest stage" in err
    assert "split: because" in err
    assert "stopped: signal" in err
    assert "secret-token" not in err


def test_a_name_that_runs_is_not_started_again() -> None:
    other = process("import time; time.sleep(60)")
    state = state_of(other.pid)
    wait_until(lambda: is_running(state))
    write_state(state)
    try:
        with pytest.raises(AlreadyRunningError, match=f"already runs as process {other.pid}"):
            bring_up(default_config(), "x.yaml", Output(as_json=True), lambda *_: None)
    finally:
        other.kill()
        other.wait()


def test_down_stops_the_process_and_clears_its_state(capsys: pytest.CaptureFixture[str]) -> None:
    running = process("import time; time.sleep(60)")
    state = state_of(running.pid)
    wait_until(lambda: is_running(state))
    write_state(state)

    bring_down(None, 10.0, Output(as_json=True))

    assert running.wait() == -signal.SIGTERM
    result = json.loads(capsys.readouterr().out)
    assert (result["name"], result["pid"], result["stopped"]) == ("tiny-qwen3", running.pid, True)
    assert saved() == {}


def test_down_says_when_a_process_does_not_stop(capfd: pytest.CaptureFixture[str]) -> None:
    stubborn = process(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('deaf', flush=True); time.sleep(60)"
    )
    write_state(state_of(stubborn.pid))
    wait_until(lambda: "deaf" in capfd.readouterr().out)
    try:
        with pytest.raises(StillRunningError, match=f"process {stubborn.pid} still runs 0 s after"):
            bring_down("tiny-qwen3", 0.2, Output(as_json=True))
        assert find_state().pid == stubborn.pid
    finally:
        stubborn.kill()
        stubborn.wait()


def test_down_without_a_deployment_says_so() -> None:
    with pytest.raises(NotRunningError, match="no deployment runs"):
        bring_down(None, 1.0, Output(as_json=True))
