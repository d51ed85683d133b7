"""Layers move while requests are in flight, and the tokens do not change."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from leftovers import nothing_left_behind

from actors.hosting import FleetError
from actors.moving import MoveReport, move
from cluster.client import AsyncMotleyClient, Completion
from cluster.planning import serving_workload
from placement.moving.transit import tight_devices
from placement.stages import StagesPlan, plan_stages
from placement.steering.values import LanesChanged
from placement.topology import Topology
from tests.local_ray.conftest import Served, make_config, serving

MODEL = "tiny-qwen3"
NUM_REQUESTS = 12
DEADLINE_S = 180.0
PROMPTS = [f"def f{i}(x):\n    " * (1 + i % 5) for i in range(NUM_REQUESTS)]

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def served(ray_session: None, checkpoints: Path) -> Iterator[Served]:
    """Four devices, of which the first three have stages."""
    config = make_config(
        checkpoints / MODEL, (4, 2, 2, 0), engine={"num_kv_blocks": 256, "step_timeout_s": 60.0}
    )
    with nothing_left_behind(), serving(config) as it:
        yield it


def plan_for(served: Served, counts: Sequence[int]) -> StagesPlan:
    running = served.running
    config = make_config(MODEL, tuple(counts), engine={"num_kv_blocks": 256})
    plan = plan_stages(
        running.profile,
        Topology(devices=running.devices),
        workload=serving_workload(config),
        layer_counts=counts,
    )
    return replace(plan, epoch=running.fleet.plan.epoch + 1)


def cut_to(served: Served, counts: Sequence[int], *, recompute: bool = False) -> MoveReport:
    running = served.running
    plan = plan_for(served, counts)
    with running.supervisor.fleet_turn:
        return move(running.fleet, plan, recompute=recompute, timeout_s=180.0, step_timeout_s=30.0)


async def ask_all(served: Served, **options: Any) -> list[Completion]:
    async with AsyncMotleyClient(served.running.grpc_target, served.running.token) as client:
        calls = [
            client.complete(prompt, max_tokens=160, ignore_eos=True, seed=i, **options)
            for i, prompt in enumerate(PROMPTS)
        ]
        return list(await asyncio.gather(*calls))


def texts(answers: Sequence[Completion]) -> list[Any]:
    return [(answer.text, answer.choices[0].token_ids) for answer in answers]


async def under_load(
    served: Served, act: Callable[[], Any], expected: list[Any], **options: Any
) -> Any:
    """Return what an act gives, while requests come again and again and stay the same."""
    calls = asyncio.create_task(ask_all(served, **options))
    await asyncio.to_thread(
        served.wait_until,
        lambda status: sum(lane.running for lane in status.lanes) == NUM_REQUESTS,
    )
    acting = asyncio.create_task(asyncio.to_thread(act))
    while True:
        async with asyncio.timeout(DEADLINE_S):
            assert texts(await calls) == expected
        if acting.done():
            return acting.result()
        calls = asyncio.create_task(ask_all(served, **options))


CUTS = [(2, 4, 2, 0), (6, 0, 2, 0), (4, 0, 2, 2), (4, 2, 2, 0)]
"""Layers move on, two stages merge and a device retires, one splits in two on a device that is new,
and one device takes the place of another."""


async def test_tokens_do_not_change_while_layers_move(served: Served) -> None:
    options = {"temperature": 0.9, "top_p": 0.95}
    expected = texts(await ask_all(served, **options))

    def moves() -> list[MoveReport]:
        return [cut_to(served, counts) for counts in CUTS]

    reports = await under_load(served, moves, expected, **options)
    assert any(report.kv_bytes > 0 for report in reports)
    assert list(served.running.fleet.stages) == ["cpu0", "cpu2", "cpu1"]
    served.wait_until_idle()


async def test_sequences_that_are_computed_again_have_the_same_tokens(served: Served) -> None:
    expected = texts(await ask_all(served, temperature=0.0))
    report = await under_load(
        served,
        lambda: cut_to(served, (2, 4, 2, 0), recompute=True),
        expected,
        temperature=0.0,
    )
    assert report.kv_bytes == 0


async def test_a_move_that_fails_leaves_the_plan_before_in_force(served: Served) -> None:
    expected = texts(await ask_all(served, temperature=0.0))
    fleet = served.running.fleet
    receiver = fleet.stages["cpu1"].actor
    # Its process can take in no KV.
    broken = "setattr(__import__('actors.stage').stage, 'as_tensor', None)"
    ray.get(receiver.__ray_call__.remote(lambda _: eval(broken)))

    def fail() -> None:
        with pytest.raises(FleetError, match="the stage on cpu1"):
            cut_to(served, (2, 4, 2, 0))

    await under_load(served, fail, expected, temperature=0.0)
    assert fleet.plan.epoch == 0
    served.wait_until_idle()


async def test_a_stage_that_hangs_while_others_load_ends_the_move_at_once(served: Served) -> None:
    """Nothing that loads would wait for it otherwise but the deadline of starting."""
    expected = texts(await ask_all(served, temperature=0.0))
    fleet = served.running.fleet
    hung = fleet.stages["cpu1"]
    plan = replace(plan_for(served, (2, 2, 2, 2)), epoch=100)

    def fail() -> None:
        pid = ray.get(hung.actor.__ray_call__.remote(lambda _: os.getpid()))
        with served.running.supervisor.fleet_turn:
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(FleetError, match="the stage on cpu1 is lost: it hung"):
                move(fleet, plan, recompute=False, timeout_s=DEADLINE_S, step_timeout_s=DEADLINE_S)

    await under_load(served, fail, expected, temperature=0.0)
    assert hung not in fleet.members
    served.wait_until_idle()


async def test_lanes_come_and_go_while_requests_are_in_flight(
    ray_session: None, checkpoints: Path
) -> None:
    """Three stages want three lanes, which the first measurement says; then two retire."""
    config = make_config(
        checkpoints / MODEL,
        (4, 2, 2),
        plan={"lanes": 1, "max_lanes": 3},
        engine={"num_kv_blocks": 256, "step_timeout_s": 60.0},
    )
    options = {"temperature": 0.9, "top_p": 0.95}
    with nothing_left_behind(), serving(config) as served:
        expected = texts(await ask_all(served, **options))
        await under_load(
            served,
            lambda: served.wait_until(lambda status: len(status.lanes) == 3),
            expected,
            **options,
        )
        shell = served.running.supervisor._shell

        def retire() -> LanesChanged:
            with served.running.supervisor.fleet_turn:
                return shell._change_lanes(1)

        changed = await under_load(served, retire, expected, **options)
        assert changed.num_lanes == 1
        await asyncio.to_thread(served.wait_until, lambda status: len(status.lanes) == 1)
        assert served.running.supervisor.status().phase == "idle"
        served.wait_until_idle()


async def test_where_memory_is_short_layers_are_let_go_of_first(
    ray_session: None, checkpoints: Path
) -> None:
    """Each device has room for what it is given, and not for what it had besides."""
    config = make_config(checkpoints / MODEL, (4, 4, 0, 0), engine={"num_kv_blocks": 256})
    devices = tuple(
        device.model_copy(update={"memory_bytes": 36 * 2**20}) for device in config.devices or ()
    )
    config = config.model_copy(update={"devices": devices})
    with nothing_left_behind(), serving(config) as served:
        expected = texts(await ask_all(served, temperature=0.0))
        old, new = (plan_for(served, counts) for counts in ((4, 4, 0, 0), (2, 2, 2, 2)))
        profile, kv_tokens = served.running.profile, 2 * 256 * 16
        assert tight_devices(old, new, profile, kv_tokens=kv_tokens) == ("cpu1",)
        report = await under_load(
            served, lambda: cut_to(served, (2, 2, 2, 2)), expected, temperature=0.0
        )
        assert report.kv_bytes == 0
