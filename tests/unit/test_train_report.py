from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import pytest
from rich.console import Console
from training_events import (
    HOST,
    evaluated,
    finished,
    planned,
    saved,
    started,
    step_done,
    traced,
    with_router_loss,
)

from cluster.training.events import (
    CheckpointFailed,
    DeviceJoined,
    DeviceLost,
    HostsLost,
    TrainingEvent,
    event_json,
)
from cluster.training.report import (
    JsonReport,
    LineReport,
    LiveReport,
    format_duration,
    host_lines,
    idle_text,
    notable,
    plan_lines,
    report_to,
)
from cluster.training.tracing import SlotTrace
from placement.train import TrainPlan

RUN: tuple[TrainingEvent, ...] = (
    planned(),
    started(),
    step_done(1),
    step_done(2),
    evaluated(2),
    saved(2),
    CheckpointFailed(step=3, reason="no space left"),
    DeviceLost(device_id="gpu1", reason="its actor died", num_slots=2),
    DeviceJoined(device_id="gpu2"),
    HostsLost(reason="node b died", from_step=2),
    traced(0),
    finished(4),
)


def lines_of(*events: TrainingEvent) -> list[str]:
    stream = io.StringIO()
    report = LineReport(Console(file=stream, width=200, soft_wrap=True))
    for event in events:
        report.handle(event)
    report.close()
    return stream.getvalue().splitlines()


def screen_of(*events: TrainingEvent, width: int = 100) -> str:
    """Everything that the live report writes to a terminal, without its control codes."""
    stream = io.StringIO()
    console = Console(
        file=stream, width=width, force_terminal=True, soft_wrap=True, highlight=False
    )
    with report_to(console, None) as report:
        assert isinstance(report, LiveReport)
        for event in events:
            report.handle(event)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).replace("\r", "\n")


def test_the_run_above_has_every_kind_of_event() -> None:
    assert {type(event) for event in RUN} == set(get_args(TrainingEvent))


def test_json_has_one_document_per_event_with_every_field_but_no_traced_slots() -> None:
    documents: list[Mapping[str, Any]] = []
    report = JsonReport(documents.append)
    for event in RUN:
        report.handle(event)

    told = [event for event in RUN if type(event).__name__ != "SlotsTraced"]
    assert len(documents) == len(told)
    for document, event in zip(documents, told, strict=True):
        assert is_dataclass(event)
        assert {field.name for field in fields(event)} <= set(document)
    names = [document["event"] for document in documents[:4]]
    assert names == ["training_planned", "training_started", "step_done", "step_done"]


def test_json_is_strict_json_and_gives_back_the_plan() -> None:
    event = planned()
    text = json.dumps(
        event_json(replace(event, nodes=MappingProxyType(event.nodes))), allow_nan=False
    )

    value = json.loads(text)

    assert TrainPlan.from_json(value["plan"]) == event.plan
    assert value["nodes"] == event.nodes


def test_json_adds_what_follows_from_the_fields() -> None:
    assert event_json(step_done(1, seconds=0.5))["tokens_per_s"] == 200.0
    assert event_json(started())["host_bytes"]["per_trained_parameter"] == 16.0
    assert event_json(saved(2))["path"] == str(Path("run/step-000002"))


def test_a_loss_that_is_no_number_is_null_in_json() -> None:
    value = event_json(step_done(1, loss=float("nan")))

    assert json.loads(json.dumps(value, allow_nan=False))["loss"] is None


def test_the_plan_names_slots_layers_grain_and_devices_and_what_a_step_costs() -> None:
    plan = planned().plan

    told = plan_lines(plan)

    assert told[0] == (
        f"plan 0: {len(plan.slots)} slots a round, 4 micro-batches a round, 2 rounds a step, "
        f"synchronous"
    )
    for slot, line in zip(plan.slots, told[1:], strict=False):
        assert f" {slot.kind} " in line
        assert f"[{slot.first_layer}, {slot.end_layer})" in line
        assert ("grain " + slot.grain in line) == (slot.kind == "backward")
        assert line.endswith("on any device")
    cost = told[1 + len(plan.slots)]
    assert f"predicted {plan.seconds_per_round * 2:.3g} s a step" in cost
    assert f"(lower bound {plan.lower_bound_s * 2:.3g} s)" in cost
    assert f"idles {plan.idle_fraction:.1%}" in cost


def test_a_plan_with_many_slots_and_devices_left_out_stays_short() -> None:
    plan = planned().plan
    slot = replace(plan.slots[0], device_ids=tuple("abcdefg"))
    many = replace(
        plan, slots=(slot,) * 40, left_out=tuple((f"d{i}", "too small") for i in range(9))
    )

    told = plan_lines(many)

    assert len(told) < 25
    assert "on a, b, c, d and 3 more" in told[1]
    assert "  and 24 more slots; --json has them all" in told
    assert told[-1] == "left out: 5 more; --json has them all"


def test_the_bytes_of_a_trained_parameter_are_split_by_what_they_hold() -> None:
    assert host_lines(HOST) == [
        "16.0 bytes of host memory a trained parameter: 2 weights, 2 residual, 8 moments, "
        "4 gradients",
        "1,000 trained parameters (15.6 KiB)",
    ]


def test_frozen_weights_are_told_beside_the_trained_ones_and_what_is_not_held_is_not_named() -> (
    None
):
    adapters = replace(HOST, residual_bytes=0, num_frozen=50_000, frozen_bytes=102_400)

    each, total = host_lines(adapters)

    assert each.startswith("14.0 bytes")
    assert "residual" not in each
    assert total == "1,000 trained parameters (13.7 KiB), beside 50,000 frozen (100.0 KiB)"


def test_plain_steps_come_at_most_every_two_seconds_of_training_and_the_last_always() -> None:
    steps = [step_done(step, num_steps=9, seconds=0.75) for step in range(1, 10)]

    told = [line.split()[1] for line in lines_of(*steps)]

    assert told == ["1/9", "4/9", "7/9", "9/9"]


def test_a_plain_step_shows_all_its_figures() -> None:
    [line] = lines_of(with_router_loss(step_done(3, num_steps=200), 1.25))

    assert line == (
        "step 3/200  loss 2.0000  router loss 1.2500  200 tokens/s  gradient norm 0.75  "
        "learning rate 1.00e-04  idle gpu0 25%, gpu1 0%  ETA 1:38"
    )


def test_a_step_after_an_evaluation_shows_the_held_out_loss_with_its_step() -> None:
    told = lines_of(step_done(1, seconds=2.0), evaluated(1), step_done(2, seconds=2.0))

    assert told[1] == "step 1: held-out loss 2.5000 (640 tokens, 1.5 s)"
    assert "held-out" not in told[0]
    assert "held-out loss 2.5000 (step 1)" in told[2]


def test_all_that_happens_beside_steps_is_told() -> None:
    told = "\n".join(lines_of(*RUN))

    for part in (
        "plan 0: ",
        "12 documents in 30 sequences",
        "step 1 of 4 follows",
        "step 2: saved run/step-000002 (0.2 s)",
        "step 3: no checkpoint: no space left. Those before it are kept",
        "lost device gpu1: its actor died; 2 slots run again elsewhere",
        "device gpu2 joins from the next round on",
        "lost the weights: node b died; going on from step 2",
        "ended after step 4: 2500 tokens in 2:05, 20 tokens/s",
        "last checkpoint run/step-000004",
    ):
        assert part in told
    assert "\x1b" not in told


def test_a_resumed_run_says_from_which_checkpoint() -> None:
    told = notable(started(first_step=3))

    assert told[-1] == "step 3 of 4 follows, resumed from run/step-000002"


@pytest.mark.parametrize("width", [40, 100])
def test_the_bar_shows_the_last_step_and_events_stay_above_it(width: int) -> None:
    screen = screen_of(*RUN[:2], step_done(1), step_done(2), evaluated(2), saved(2), width=width)

    flat = " ".join(screen.split())
    assert "step 2/4" in flat
    assert "50%" in flat
    assert "ETA 0:01" in flat
    assert "loss 2.0000 held-out loss 2.5000 (step 2)" in flat
    assert "200 tokens/s gradient norm 0.75 learning rate 1.00e-04" in flat
    assert "idle gpu0 25%, gpu1 0%" in flat
    assert "step 2: saved run/step-000002" in flat


def test_the_bar_of_a_resumed_run_starts_where_it_went_on() -> None:
    assert "step 2/4" in screen_of(started(first_step=3))


def test_a_device_called_like_markup_is_shown_as_it_is() -> None:
    odd = replace(step_done(1), idle_fractions={"[red]gpu[/red]": 0.5})

    assert "idle [red]gpu[/red] 50%" in screen_of(started(), odd)
    assert "idle [red]gpu[/red] 50%" in lines_of(odd)[0]


def test_the_report_suits_where_it_goes() -> None:
    with report_to(Console(file=io.StringIO()), None) as report:
        assert isinstance(report, LineReport)
    with report_to(Console(file=io.StringIO(), force_terminal=True), lambda _: None) as report:
        assert isinstance(report, JsonReport)


def test_of_many_devices_the_mean_and_the_idlest_are_named() -> None:
    idle = {f"d{index}": index / 10 for index in range(9)}

    assert idle_text(idle) == (
        "idle 40% on average of 9 devices; most: d8 80%, d7 70%, d6 60%, d5 50%"
    )
    assert idle_text({}) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0:00"), (59.6, "1:00"), (3723.0, "1:02:03"), (float("inf"), "?"), (float("nan"), "?")],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_trace_has_every_slot_on_its_device(tmp_path: Path) -> None:
    trace = SlotTrace()
    for event in (planned(), traced(0), traced(1, device_id="gpu1"), step_done(1)):
        trace.handle(event)

    told = trace.write(tmp_path / "trace.json")

    assert told == (f"wrote {tmp_path / 'trace.json'}: 4 micro-batches in slots of rounds 0 to 1")
    value = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    complete = [event for event in value["traceEvents"] if event["ph"] == "X"]
    assert [event["args"]["round"] for event in complete] == [0, 0, 1, 1]
    assert [event["tid"] for event in complete] == [0, 0, 1, 1]


def test_a_long_trace_keeps_the_last_events_and_says_how_many_it_dropped(tmp_path: Path) -> None:
    trace = SlotTrace(most_events=3)
    for event in (planned(), traced(0), traced(1), traced(2)):
        trace.handle(event)

    told = trace.write(tmp_path / "trace.json")

    assert trace.num_dropped == 3
    assert told.endswith("of rounds 1 to 2; the 3 before them were dropped (at most 3 kept)")


def test_a_device_that_was_lost_keeps_its_track(tmp_path: Path) -> None:
    both, one = planned(), planned(num_devices=1)
    trace = SlotTrace()
    for event in (both, traced(0, device_id="gpu1"), one, traced(1, device_id="gpu0")):
        trace.handle(event)

    trace.write(tmp_path / "trace.json")

    assert "gpu1" in (tmp_path / "trace.json").read_text(encoding="utf-8")


def test_a_trace_of_nothing_is_still_a_file(tmp_path: Path) -> None:
    told = SlotTrace().write(tmp_path / "trace.json")

    assert told.endswith(": 0 micro-batches in slots")
    assert json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"] == []
