"""`motley up --detach` over children that only pretend: what it shows, returns and leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.commands.detach import DetachedError, bring_up_detached, up_command
from cluster.commands.errors import NotReadyError
from cluster.commands.output import Output
from cluster.commands.reporting import ExitCode
from cluster.commands.up import AlreadyRunningError
from cluster.events import Planned, Ready, StageProgress, Stopped, event_from_json, event_json
from cluster.runstate import RunState, is_running, log_file, run_folder, write_state
from placement.stages import StagesPlan

NAME = "tiny"
READY = Ready("http://127.0.0.1:8000", "127.0.0.1:8001", "secret-token", 1.5)
TELL = "import json, sys, time\ndef tell(value): print(json.dumps(value), flush=True)\n"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOTLEY_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def end_child() -> Iterator[Callable[[int], None]]:
    """End the children that a test leaves running."""
    pids: list[int] = []
    yield pids.append
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def child(code: str) -> list[str]:
    return [sys.executable, "-c", TELL + code, "-m", "cluster", "up"]


def start(code: str, *, as_json: bool = True, timeout_s: float = 20.0) -> ExitCode:
    return bring_up_detached(child(code), NAME, timeout_s, Output(as_json=as_json))


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def running_with(part: str) -> list[str]:
    """The processes whose command line holds a text."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(file.read_bytes().decode(errors="replace"))
    return [line for line in found if part in line]


def test_it_returns_when_the_child_is_ready_and_leaves_it_running(
    capsys: pytest.CaptureFixture[str], end_child: Callable[[int], None]
) -> None:
    progress = StageProgress(0, "big", 0.5)
    code = start(
        f"print('a warning', file=sys.stderr, flush=True)\n"
        f"tell({event_json(progress)!r}); tell({event_json(READY)!r}); time.sleep(60)"
    )
    told = lines(capsys.readouterr().out)
    detached = told[-1]
    end_child(detached["pid"])

    assert code is ExitCode.OK
    assert told[:2] == [event_json(progress), event_json(READY)]
    assert detached["log"] == str(log_file(NAME))
    pid = detached["pid"]
    assert os.getsid(pid) == pid != os.getsid(0)
    assert os.readlink(f"/proc/{pid}/fd/0") == os.devnull
    assert log_file(NAME).read_text(encoding="utf-8") == "a warning\n"
    assert stat.S_IMODE(log_file(NAME).stat().st_mode) == 0o600
    # Its events, which hold the token, are nowhere on the disk.
    assert [path.name for path in run_folder().iterdir()] == [log_file(NAME).name]


def test_a_child_can_go_on_telling_when_nobody_listens(
    capsys: pytest.CaptureFixture[str],
) -> None:
    start(f"tell({event_json(READY)!r}); time.sleep(1); tell({event_json(Stopped('signal'))!r})")
    pid = lines(capsys.readouterr().out)[-1]["pid"]

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_people_see_where_it_is_and_no_token_in_a_log(
    capsys: pytest.CaptureFixture[str], end_child: Callable[[int], None]
) -> None:
    start(f"tell({event_json(READY)!r}); time.sleep(60)", as_json=False)
    out, err = capsys.readouterr()
    end_child(int(err.split("left running as process ")[1].split(";")[0]))

    assert out == ""
    assert "http://127.0.0.1:8000/v1" in err
    assert f"stop with `motley down --name {NAME}`" in err
    assert "Ctrl-C" not in err
    assert "secret-token" not in err


def test_a_child_that_fails_gives_its_reason_its_code_and_the_end_of_its_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = {"error": {"message": "8 layers need 9 bytes", "exit_code": 3}}
    code = start(
        f"for i in range(40): print(f'line {{i}}', file=sys.stderr)\ntell({error!r}); sys.exit(3)"
    )
    out, err = capsys.readouterr()

    assert code is ExitCode.INFEASIBLE
    assert lines(out) == [error]
    assert "line 39" in err
    assert "line 5\n" not in err


def test_a_child_that_dies_without_a_word_is_an_error() -> None:
    with pytest.raises(DetachedError, match=r"ended before it was ready \(signal 9\)"):
        start("import os; os.kill(os.getpid(), 9)")


def test_a_child_that_is_not_ready_in_time_is_stopped(home: Path) -> None:
    with pytest.raises(NotReadyError, match=r"not ready after 0\.5 s and has been stopped"):
        start(f"folder = {str(home)!r}; time.sleep(60)", timeout_s=0.5)
    assert not running_with(str(home))


def test_an_interrupt_stops_the_child(home: Path) -> None:
    code = "import os, signal; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
    # A shell has what it runs in the background ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            start(f"folder = {str(home)!r}; {code}")
    finally:
        signal.signal(signal.SIGINT, before)
    assert not running_with(str(home))


def test_the_log_of_the_start_before_is_kept() -> None:
    for text in ("first", "second", "third"):
        with pytest.raises(DetachedError):
            start(f"print({text!r}, file=sys.stderr); sys.exit(1)")

    assert log_file(NAME).read_text(encoding="utf-8") == "third\n"
    before = log_file(NAME).with_name(f"{NAME}.log.1")
    assert before.read_text(encoding="utf-8") == "second\n"


def test_a_name_that_runs_is_refused_and_its_log_stays() -> None:
    other = subprocess.Popen(child("time.sleep(60)"))
    state = RunState(name=NAME, pid=other.pid, started_unix_s=1, config_path="x")
    try:
        deadline_s = time.monotonic() + 10.0
        while not is_running(state):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        write_state(state)
        log_file(NAME).write_text("its log", encoding="utf-8")
        with pytest.raises(AlreadyRunningError, match="already runs"):
            start("")
        assert log_file(NAME).read_text(encoding="utf-8") == "its log"
    finally:
        other.kill()
        other.wait()


def test_the_childs_command_line_is_the_same_deployment() -> None:
    command = up_command(("--config", Path("a b.yaml")), ("--model", None), ("--http-port", 0))

    assert command[1:] == [
        "-P", "-m", "cluster", "up", "--json", "--config", "a b.yaml", "--http-port", "0",
    ]  # fmt: skip


@pytest.mark.parametrize("event", [READY, StageProgress(1, "big", 0.25), Stopped("signal")])
def test_events_survive_json(event: Ready | StageProgress | Stopped) -> None:
    assert event_from_json(json.loads(json.dumps(event_json(event)))) == event


def test_a_plan_survives_json() -> None:
    from actors.engine.checkpoint import Checkpoint
    from cluster.config import default_config
    from cluster.planning import declared_topology, make_plan

    config = default_config()
    profile = Checkpoint.open(config.model).profile(dtype_bytes=4)
    plan: StagesPlan = make_plan(config, profile, declared_topology(config))
    told = event_from_json(json.loads(json.dumps(event_json(Planned(plan, "split: because")))))

    assert told == Planned(plan, "split: because")
