from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.runstate import (
    AmbiguousNameError,
    NotRunningError,
    RunState,
    find_state,
    is_running,
    remove_state,
    run_folder,
    running_states,
    state_file,
    write_state,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOTLEY_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def live() -> Iterator[RunState]:
    """The state of a real process that looks like `python -m cluster up`."""
    command = [sys.executable, "-c", "import time; time.sleep(60)", "-m", "cluster", "up"]
    process = subprocess.Popen(command)
    written = state(pid=process.pid)
    deadline_s = time.monotonic() + 10.0
    # Right after it is started a process shows no command line yet.
    while not is_running(written) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    yield written
    process.kill()
    process.wait()


def state(name: str = "tiny", pid: int = 1) -> RunState:
    return RunState(name=name, pid=pid, started_unix_s=5, config_path="x.yaml")


def test_a_written_state_is_found_again(live: RunState) -> None:
    write_state(live)
    ready = replace(live, http_url="http://h:1", grpc_target="h:2", token="secret")
    write_state(ready)

    assert find_state() == find_state("tiny") == ready
    assert ready.is_ready
    assert not live.is_ready


def test_the_file_is_private_because_it_holds_the_token(live: RunState) -> None:
    path = write_state(live)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["tiny.json"]


def test_a_file_whose_process_is_gone_is_stale(live: RunState) -> None:
    write_state(live)
    os.kill(live.pid, 9)
    os.waitpid(live.pid, 0)

    assert running_states() == []
    with pytest.raises(NotRunningError, match=r"no deployment runs .*; start one with `motley up`"):
        find_state()


def test_a_reused_process_id_is_not_taken_for_a_deployment() -> None:
    # This process is alive, and is not `motley up`.
    assert not is_running(state(pid=os.getpid()))


def test_an_unknown_name_is_refused(live: RunState) -> None:
    write_state(live)

    with pytest.raises(NotRunningError, match="no deployment called other runs"):
        find_state("other")


def test_several_deployments_must_be_told_apart(live: RunState) -> None:
    write_state(live)
    write_state(replace(live, name="second"))

    with pytest.raises(AmbiguousNameError, match=r"2 deployments run \(second, tiny\)"):
        find_state()
    assert find_state("second").name == "second"


def test_only_its_owner_removes_a_file(live: RunState) -> None:
    write_state(live)

    remove_state(replace(live, pid=live.pid + 1))
    assert state_file("tiny").exists()
    remove_state(live)
    assert not state_file("tiny").exists()
    remove_state(live)


def test_a_damaged_file_is_ignored() -> None:
    run_folder().mkdir(parents=True)
    state_file("broken").write_text("{", encoding="utf-8")
    state_file("strange").write_text('{"what": 1}', encoding="utf-8")

    assert running_states() == []


def test_a_name_becomes_a_file_name(home: Path) -> None:
    assert state_file("a/b c") == home / "run" / "a_b_c.json"


def test_without_a_home_of_its_own_it_is_the_users(
    monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.delenv("MOTLEY_HOME")
    monkeypatch.setenv("HOME", str(home))

    assert run_folder() == home / ".motley" / "run"
