"""The file by which a training run tells others how far it is."""

from __future__ import annotations

import itertools
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from training_events import evaluated, finished, planned, saved, started, step_done, traced

from cluster.commands.train_state import TrainingTeller, after, tell_others
from cluster.runstate import runs_verb
from cluster.training.events import DeviceJoined, HostsLost, TrainingEvent
from cluster.trainstate import (
    MAX_POINTS,
    TrainingState,
    forget_old_runs,
    read_training,
    training_file,
    training_states,
    write_training,
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOTLEY_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def trainer() -> Iterator[int]:
    """The id of a process that looks like `python -m cluster train`."""
    command = [sys.executable, "-c", "import time; time.sleep(60)", "-m", "cluster", "train"]
    process = subprocess.Popen(command)
    deadline_s = time.monotonic() + 10.0
    # Right after it is started a process shows no command line yet.
    while not runs_verb(process.pid, "train") and time.monotonic() < deadline_s:
        time.sleep(0.01)
    yield process.pid
    process.kill()
    process.wait()


def state(output: str = "/runs/chats", **changes: object) -> TrainingState:
    whole = TrainingState(
        name=Path(output).name, pid=os.getpid(), output=output, started_unix_s=1.0,
        updated_unix_s=2.0, num_steps=4,
    )  # fmt: skip
    return replace(whole, **changes)  # type: ignore[arg-type]


def led_to(*events: TrainingEvent, before: TrainingState | None = None) -> TrainingState:
    current = before or state()
    for event in events:
        current = after(current, event)
    return current


def teller(folder: Path, clock: list[float], notes: list[str] | None = None) -> TrainingTeller:
    note = (notes if notes is not None else []).append
    return TrainingTeller(
        folder / "chats", 4, note, monotonic_s=lambda: clock[0], unix_s=lambda: 1000.0 + clock[0]
    )


def saved_state(folder: Path) -> TrainingState:
    found = read_training(training_file(folder / "chats"))
    assert found is not None
    return found


def test_events_lead_to_the_figures_of_the_last_step() -> None:
    reached = led_to(
        planned(), started(), step_done(1), traced(0), evaluated(1), saved(1),
        DeviceJoined(device_id="x"), step_done(2, loss=1.5),
    )  # fmt: skip

    assert (reached.phase, reached.step, reached.num_steps) == ("running", 2, 4)
    assert reached.losses == ((1, 2.0), (2, 1.5))
    assert reached.held_out == ((1, 2.5),)
    assert (reached.loss, reached.tokens_per_s, reached.eta_s) == (1.5, 200.0, 1.0)
    assert reached.idle_fractions == {"gpu0": 0.25, "gpu1": 0.0}


@pytest.mark.parametrize(("last", "phase"), [(4, "finished"), (3, "interrupted")])
def test_a_run_ends_finished_only_after_its_last_step(last: int, phase: str) -> None:
    reached = led_to(started(), step_done(last), finished(last))

    assert (reached.phase, reached.eta_s, reached.is_ended) == (phase, None, True)


def test_a_loss_that_overflowed_is_a_gap() -> None:
    reached = led_to(started(), step_done(1, loss=float("nan")), evaluated(1, loss=float("inf")))

    assert reached.losses == ((1, None),)
    assert reached.held_out == ((1, None),)
    assert reached.loss is None


def test_a_long_curve_is_thinned_evenly_from_its_first_step_to_its_last() -> None:
    steps = 5000
    reached = led_to(
        started(num_steps=steps), *(step_done(step, steps, loss=step) for step in range(1, steps))
    )

    at = [step for step, _ in reached.losses]
    assert MAX_POINTS // 2 <= len(at) <= MAX_POINTS
    assert {b - a for a, b in itertools.pairwise(at)} == {reached.stride}
    assert at[0] == reached.stride
    assert at[-1] > steps - 2 * reached.stride
    assert reached.loss == steps - 1


def test_many_held_out_losses_are_thinned_and_the_last_one_stays() -> None:
    reached = led_to(started(), *(evaluated(step) for step in range(1, 1001)))

    assert len(reached.held_out) <= MAX_POINTS
    assert reached.held_out[-1][0] == 1000


def test_steps_that_are_done_again_replace_those_that_were_lost() -> None:
    reached = led_to(
        started(), step_done(1), step_done(2, loss=9.0), evaluated(2),
        HostsLost(reason="gone", from_step=1), step_done(2, loss=1.0),
    )  # fmt: skip

    assert reached.losses == ((1, 2.0), (2, 1.0))
    assert reached.held_out == ()


def test_a_resumed_run_goes_on_with_its_curve_and_a_new_one_does_not(tmp_path: Path) -> None:
    first = teller(tmp_path, [0.0])
    for event in (started(), step_done(1), step_done(2), finished(2)):
        first.handle(event)
    first.close()

    resumed, fresh = teller(tmp_path, [0.0]), teller(tmp_path, [0.0])
    resumed.handle(started(first_step=3))
    fresh.handle(started())

    assert resumed.state.losses == ((1, 2.0), (2, 2.0))
    assert resumed.state.step == 2
    assert fresh.state.losses == ()


def test_the_file_is_written_at_most_once_a_second_and_whole_at_the_end(tmp_path: Path) -> None:
    clock = [0.0]
    told = teller(tmp_path, clock)
    told.handle(started())
    clock[0] = 0.5
    told.handle(step_done(1))
    assert saved_state(tmp_path).step == 0
    clock[0] = 1.0
    told.handle(step_done(2))
    assert saved_state(tmp_path).step == 2
    told.handle(step_done(4))
    told.handle(finished(4))
    told.close()

    assert (saved_state(tmp_path).step, saved_state(tmp_path).phase) == (4, "finished")
    assert saved_state(tmp_path).updated_unix_s == 1001.0


def test_the_file_is_its_owners_only(tmp_path: Path) -> None:
    teller(tmp_path, [0.0]).handle(started())

    path = training_file(tmp_path / "chats")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_failure_is_told_with_its_reason(tmp_path: Path) -> None:
    def fail() -> None:
        with tell_others(tmp_path / "chats", 4, print) as told:
            told.handle(started())
            raise RuntimeError("step 1: all lost")

    with pytest.raises(RuntimeError, match="all lost"):
        fail()

    assert (saved_state(tmp_path).phase, saved_state(tmp_path).reason) == (
        "failed",
        "step 1: all lost",
    )


def test_an_interrupt_is_no_failure(tmp_path: Path) -> None:
    def interrupt() -> None:
        with tell_others(tmp_path / "chats", 4, print) as told:
            told.handle(started())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()

    assert saved_state(tmp_path).phase == "interrupted"


def test_training_goes_on_when_the_file_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOTLEY_HOME", str(tmp_path / "file"))
    notes: list[str] = []
    told = teller(tmp_path, [0.0], notes)

    told.handle(started())
    told.close()

    assert len(notes) == 1
    assert "cannot be shown to others" in notes[0]


def test_a_run_whose_process_is_gone_is_gone(trainer: int) -> None:
    write_training(state("/runs/alive", pid=trainer, phase="running", eta_s=5.0))
    # This process is alive, and trains nothing.
    write_training(state("/runs/dead", phase="running", eta_s=5.0, updated_unix_s=9.0))
    write_training(state("/runs/done", phase="finished", updated_unix_s=8.0))

    seen = [(run.name, run.phase, run.eta_s) for run in training_states()]

    assert seen == [("alive", "running", 5.0), ("dead", "gone", None), ("done", "finished", None)]


def test_runs_of_one_name_in_two_folders_are_two() -> None:
    write_training(state("/a/chats"))
    write_training(state("/b/chats"))

    assert len(training_states()) == 2


def test_a_damaged_file_is_no_run() -> None:
    write_training(state())
    path = training_file(Path("/runs/chats"))
    for text in ("{", "[]", '{"losses": [], "held_out": []}', json.dumps({"losses": [1]})):
        path.write_text(text, encoding="utf-8")
        assert training_states() == []


def test_only_the_newest_ended_runs_are_kept(trainer: int) -> None:
    for index in range(30):
        ended = state(f"/runs/{index}", phase="finished", updated_unix_s=float(index))
        write_training(ended)
    write_training(state("/runs/alive", pid=trainer, phase="running", updated_unix_s=-1.0))

    forget_old_runs()

    names = [run.name for run in training_states()]
    assert names == ["alive", *(str(index) for index in range(29, 9, -1))]
