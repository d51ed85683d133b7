"""The log of the experts' rebalancer: written, read and replayed to the same commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cluster.controller_log import ExpertLog, read_expert_log
from placement.experts import ExpertDevice
from placement.sharding.decision import RebalanceSettings
from placement.sharding.expert_map import ExpertMap, weighted_layer
from placement.sharding.loads import LoadSummary
from placement.sharding.log import ExpertEntry, ExpertOpening, replay
from placement.sharding.rebalance_values import (
    CopyDone,
    ExpertDeviceLost,
    ExpertEvent,
    LoadsMeasured,
    MapInForce,
    RebalanceRequested,
    StepsDone,
    UseMap,
)
from placement.sharding.rebalancer import ExpertRebalancer


def opening() -> ExpertOpening:
    devices = tuple(
        ExpertDevice(id=name, node="n", rows_per_s=1e3, slots_per_layer=4) for name in "ab"
    )
    layer = weighted_layer([frozenset({0, 1, 2}), frozenset({1, 2, 3})], [1.0] * 4, [1e3, 1e3])
    made = ExpertMap(
        version=0, checkpoint="c", num_experts=4, devices=devices, layers=(layer, layer)
    )
    settings = RebalanceSettings(
        expert_bytes=10, copy_bytes_per_s=1e9, step_budget_bytes=100, least_steps=1,
        cool_down_steps=0,
    )  # fmt: skip
    return ExpertOpening(map=made, settings=settings)


def hot(expert: int) -> LoadsMeasured:
    rows_LE = np.full((2, 4), 0.123456789012345)
    rows_LE[:, expert] = 30.0
    steps_L = np.full(2, 50)
    return LoadsMeasured(
        summary=LoadSummary(
            steps_L=steps_L, mean_rows_LE=rows_LE, recent_rows_LE=rows_LE,
            recent_steps_L=steps_L, drift_L=np.ones(2),
        )
    )  # fmt: skip


def incident(began: ExpertOpening) -> list[ExpertEntry]:
    """A hot expert is copied, steps pass, and a device is lost."""
    rebalancer = ExpertRebalancer(began.map, began.settings)
    queue: list[ExpertEvent] = [
        RebalanceRequested(), hot(0), *[StepsDone()] * 3, StepsDone(steps=2), *[StepsDone()] * 4,
        hot(3), *[StepsDone()] * 3, ExpertDeviceLost(device_id="b", reason="killed"), StepsDone(),
    ]  # fmt: skip
    entries = []
    while queue:
        event = queue.pop(0)
        commands = rebalancer.handle(event)
        entries.append(ExpertEntry(event=event, commands=tuple(commands)))
        answers: list[ExpertEvent] = []
        for command in commands:
            if isinstance(command, UseMap):
                answers.append(MapInForce(version=command.map.version))
            elif type(command).__name__ == "Move":
                answers.append(CopyDone(move=command))  # type: ignore[arg-type]
        queue = answers + queue
    return entries


def test_a_log_that_was_read_replays_to_the_same_commands(tmp_path: Path) -> None:
    began = opening()
    happened = incident(began)
    log = ExpertLog(tmp_path / "x.experts.jsonl", began)
    for entry in happened:
        log.write(entry)
    log.close()

    read, entries = read_expert_log(tmp_path / "x.experts.jsonl")

    assert read == began
    assert any(isinstance(c, UseMap) for entry in entries for c in entry.commands)
    assert len(entries) < len(happened), "steps without consequence are one entry"
    steps = [e.event.steps for e in entries if isinstance(e.event, StepsDone)]
    assert sum(steps) == sum(e.event.steps for e in happened if isinstance(e.event, StepsDone))
    assert replay(read, entries) == ""


def test_a_difference_is_named() -> None:
    began = opening()
    entries = incident(began)
    at = next(i for i, entry in enumerate(entries) if entry.commands)
    entries[at] = ExpertEntry(event=entries[at].event, commands=())

    assert replay(began, entries).startswith(f"entry {at} (")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "Nonsense"}, "unknown event 'Nonsense'; known are LoadsMeasured"),
        ({"kind": "StepsDone", "steps": 1.5}, "steps"),
        ({"kind": "LoadsMeasured", "summary": {"steps_L": [[1], [1, 2]]}}, "lacks"),
    ],
)
def test_what_is_no_entry_is_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ExpertEntry.from_json({"event": change, "commands": []})


def test_arrays_of_another_type_or_shape_are_refused() -> None:
    entry = ExpertEntry(event=hot(1), commands=()).to_json()
    for wrong in ([[1, 2], [3]], "rows", [["a"]]):
        value = json.loads(json.dumps(entry))
        value["event"]["summary"]["recent_rows_LE"] = wrong
        with pytest.raises(ValueError, match="is no array of float64"):
            ExpertEntry.from_json(value)


def test_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match=r"format \(2\) must be 1"):
        ExpertOpening.from_json(opening().to_json() | {"format": 2})
