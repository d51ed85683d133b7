from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_events import (
    evaluated,
    finished,
    planned,
    saved,
    started,
    step_done,
    with_router_loss,
)

from cluster.training.events import HostsLost, TrainingEvent
from cluster.training.tensorboard import Scalars, scalars_in


def run(folder: Path, *events: TrainingEvent) -> list[str]:
    """Write the events' scalars and return what was said of them."""
    notes: list[str] = []
    with scalars_in(folder, notes.append) as scalars:
        for event in events:
            scalars.handle(event)
    return notes


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    read = EventAccumulator(str(folder))
    read.Reload()
    tags: Sequence[str] = read.Tags()["scalars"]
    return {tag: [(point.step, point.value) for point in read.Scalars(tag)] for tag in tags}


def test_every_figure_of_a_run_can_be_read_back(tmp_path: Path) -> None:
    notes = run(
        tmp_path,
        planned(),
        started(),
        with_router_loss(step_done(1, loss=3.0), 1.25),
        step_done(2, loss=2.5),
        evaluated(2, loss=2.75),
        saved(2),
        finished(2),
    )

    read = curves(tmp_path)
    assert notes == []
    assert read["loss/train"] == [(1, 3.0), (2, 2.5)]
    assert read["loss/held_out"] == [(2, 2.75)]
    assert read["loss/router"] == [(1, 1.25)]
    assert read["optimizer/gradient_norm"] == [(1, 0.75), (2, 0.75)]
    assert [value for _, value in read["optimizer/learning_rate"]] == pytest.approx([1e-4] * 2)
    assert read["throughput/tokens_per_s"] == [(1, 200.0), (2, 200.0)]
    assert read["idle/gpu0"] == [(1, 0.25), (2, 0.25)]
    assert read["idle/gpu1"] == [(1, 0.0), (2, 0.0)]
    assert read["host/bytes_per_trained_parameter"] == [(0, 16.0)]
    assert read["host/moment_bytes"] == [(0, 8000.0)]


def test_steps_that_are_done_again_after_a_resume_replace_the_old_ones(tmp_path: Path) -> None:
    run(tmp_path, started(), *(step_done(step, loss=step) for step in (1, 2, 3)), evaluated(2))
    run(tmp_path, started(first_step=3), *(step_done(step, loss=10 + step) for step in (3, 4)))

    read = curves(tmp_path)
    assert read["loss/train"] == [(1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0)]
    assert read["loss/held_out"] == [(2, 2.5)]


def test_steps_that_are_done_again_after_weights_were_lost_replace_the_old_ones(
    tmp_path: Path,
) -> None:
    run(
        tmp_path,
        started(),
        *(step_done(step, loss=step) for step in (1, 2, 3)),
        HostsLost(reason="node b died", from_step=1),
        *(step_done(step, loss=10 + step) for step in (2, 3)),
    )

    assert curves(tmp_path)["loss/train"] == [(1, 1.0), (2, 12.0), (3, 13.0)]


def test_a_checkpoint_leaves_all_that_came_before_on_disk(tmp_path: Path) -> None:
    scalars = Scalars(tmp_path, print)
    try:
        for event in (started(), step_done(1), step_done(2), saved(2)):
            scalars.handle(event)

        assert [step for step, _ in curves(tmp_path)["loss/train"]] == [1, 2]
    finally:
        scalars.close()


def test_a_folder_that_cannot_be_written_ends_the_curves_and_not_the_training(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()

    notes = run(tmp_path / "file", started(), step_done(1), step_done(2), saved(2))

    [note] = notes
    assert note.startswith(f"no more curves in {tmp_path / 'file'}: ")
    assert note.endswith("; training goes on")


def test_a_run_that_never_started_leaves_no_files(tmp_path: Path) -> None:
    run(tmp_path / "curves", planned())

    assert not (tmp_path / "curves").exists()
