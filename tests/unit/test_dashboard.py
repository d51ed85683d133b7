"""What the dashboard's document says, from readings of one's own making."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from dashboard_backend import BUSY, BYTES_PER_S, STEP_S, HomeLab, busy_controller, serving_plan

from cluster.backend import DeploymentStatus
from cluster.gateway.dashboard import WINDOW_S, Dashboard, Reading, Traffic
from cluster.trainstate import TrainingState


class Lab:
    """Readings of a deployment at times of one's choice."""

    def __init__(self, controller: dict[str, object] | None = None) -> None:
        self.now_s = 100.0
        self.backend = HomeLab(now_s=lambda: self.now_s, controller=controller)
        self.dashboard = Dashboard()

    async def reading(self, now_s: float, **changes: Any) -> Reading:
        self.now_s = now_s
        elapsed_s = now_s - 100.0
        reading = Reading(
            monotonic_s=now_s,
            unix_s=1_700_000_000.0 + elapsed_s,
            version="1.2.3",
            model=self.backend.model_info(),
            plan=self.backend.plan_json(),
            status=await self.backend.status(),
            controller=self.backend.controller_json(),
            trainings=(),
            traffic=Traffic(
                requests={"completed": 2.0 * elapsed_s, "failed": 1.0},
                prompt_tokens=30.0 * elapsed_s,
                generated_tokens=120.0 * elapsed_s,
            ),
        )
        return replace(reading, **changes)

    async def shown(self, now_s: float, **changes: Any) -> dict[str, Any]:
        return self.dashboard.show(await self.reading(now_s, **changes))


def run(name: str = "run", **changes: Any) -> TrainingState:
    values: dict[str, Any] = {
        "name": name,
        "pid": 1,
        "output": f"/secret/{name}",
        "started_unix_s": 1.0,
        "updated_unix_s": 2.0,
        "num_steps": 10,
    }
    return TrainingState(**values | changes)


async def test_the_first_reading_has_no_rates() -> None:
    shown = await Lab().shown(101.0)

    assert {stage["busy"] for stage in shown["stages"]} == {None}
    assert {link["bytes_per_s"] for link in shown["links"]} == {None}
    assert shown["traffic"]["tokens_per_s"] is None
    assert shown["traffic"]["requests"] == {"completed": 2.0, "failed": 1.0}


async def test_counters_become_rates_beside_what_was_planned() -> None:
    lab = Lab()
    await lab.shown(101.0)
    shown = await lab.shown(103.0)

    plan = serving_plan()
    assert [stage["device"] for stage in shown["stages"]] == [s.device_id for s in plan.stages]
    for stage, placed in zip(shown["stages"], plan.stages, strict=True):
        assert stage["busy"] == pytest.approx(BUSY[placed.index])
        assert stage["step_s"] == pytest.approx(STEP_S, rel=0.05)
        assert stage["predicted_step_s"] == placed.step_s
        assert stage["predicted_busy"] == pytest.approx(placed.step_s / plan.period_s)
        assert stage["need_bytes"] == placed.need_bytes
    assert shown["traffic"]["tokens_per_s"] == pytest.approx(120.0)
    assert shown["plan"]["predicted_tokens_per_s"] == plan.predicted_tokens_per_s
    assert shown["plan"]["left_out"] == [
        {"device": device, "reason": reason} for device, reason in plan.left_out
    ]


async def test_links_of_all_lanes_are_one_link() -> None:
    lab = Lab()
    await lab.shown(101.0)
    links = (await lab.shown(103.0))["links"]

    ends = [(link["source"], link["target"]) for link in links]
    assert ends == [
        ("lanes", "rtx4090"),
        ("rtx4090", "rtx3060"),
        ("rtx3060", "m2-laptop"),
        ("m2-laptop", "lanes"),
    ]
    assert [link["bytes_per_s"] for link in links] == pytest.approx([3000, *BYTES_PER_S], rel=0.01)


async def test_a_device_called_like_a_lane_stays_a_device() -> None:
    lab = Lab()
    status = await lab.backend.status()
    odd = replace(status.stages[0], device="lane-0")
    status = replace(status, stages=(odd,), link_bytes={"lane-0->lanes": 7, "lane-1->lane-0": 5})

    links = (await lab.shown(101.0, status=status))["links"]

    assert [(link["source"], link["target"]) for link in links] == [
        ("lane-0", "lanes"),
        ("lanes", "lane-0"),
    ]


async def test_rates_are_of_the_last_seconds_only() -> None:
    lab = Lab()
    await lab.shown(101.0)
    shown = await lab.shown(101.0 + 2 * WINDOW_S)

    assert shown["stages"][0]["busy"] is None
    shown = await lab.shown(102.0 + 2 * WINDOW_S)
    assert shown["stages"][0]["busy"] == pytest.approx(BUSY[0])


async def test_a_counter_that_starts_anew_has_no_rate() -> None:
    lab = Lab()
    status = (await lab.reading(110.0)).status
    await lab.shown(110.0)
    restarted = replace(status, stages=(replace(status.stages[0], busy_s=0.1),))
    shown = await lab.shown(111.0, status=restarted)

    assert shown["stages"][0]["busy"] is None


async def test_a_report_that_comes_late_does_not_make_a_stage_more_than_busy() -> None:
    lab = Lab()
    await lab.shown(101.0)
    status = (await lab.reading(102.0)).status
    ahead = replace(status, stages=(replace(status.stages[0], busy_s=9.0),))

    assert (await lab.shown(102.0, status=ahead))["stages"][0]["busy"] == 1.0


async def test_two_readings_at_one_time_have_no_rate() -> None:
    lab = Lab()
    await lab.shown(101.0)

    assert (await lab.shown(101.0))["traffic"]["tokens_per_s"] is None


async def test_a_deployment_that_is_not_there_yet_can_be_shown() -> None:
    lab = Lab()
    status = DeploymentStatus(ready=False, reason="it loads")

    shown = await lab.shown(101.0, status=status, plan={"stages": [{"device": "x"}]})

    assert (shown["ready"], shown["reason"], shown["stages"]) == (False, "it loads", [])
    assert shown["plan"]["objective"] is None
    assert shown["controller"] is None


async def test_stages_say_what_the_controller_knows_of_their_devices() -> None:
    controller = busy_controller(0.0) | {"draining": ["kitchen"]}
    shown = await Lab(controller).shown(101.0)

    assert [stage["factor"] for stage in shown["stages"]] == [None, 1.9, 1.0]
    assert [stage["draining"] for stage in shown["stages"]] == [False, False, True]


async def test_moves_are_the_last_ones_newest_first() -> None:
    controller = busy_controller(0.0)
    controller["moves"] = [controller["moves"][0] | {"epoch": epoch} for epoch in range(40)]

    shown = (await Lab(controller).shown(101.0))["controller"]

    assert [move["epoch"] for move in shown["moves"]] == list(range(39, 27, -1))


async def test_training_runs_are_shown_without_paths_or_process_ids() -> None:
    losses = ((1, 2.5), (2, None))
    shown = (await Lab().shown(101.0, trainings=[run("a", losses=losses)]))["trainings"]

    [told] = shown
    assert told["losses"] == [[1, 2.5], [2, None]]
    assert "secret" not in json.dumps(told)
    assert "pid" not in told


async def test_the_document_is_json_whatever_a_figure_is() -> None:
    controller = busy_controller(0.0)
    controller["moves"][0]["predicted_gain"] = float("nan")
    lab = Lab(controller)
    trainings = [run(loss=float("inf"))]

    shown = await lab.shown(101.0, trainings=trainings)

    assert shown["controller"]["moves"][-1]["predicted_gain"] is None
    assert shown["trainings"][0]["loss"] is None
    json.dumps(shown, allow_nan=False)
