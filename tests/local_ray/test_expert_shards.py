"""Experts of a deployment on devices of their own: tokens do not depend on where they are."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from expert_loads import hot
from identity import check_identical
from leftovers import nothing_left_behind

from actors.engine.requests import Request, SamplingParams
from actors.experts_shell import ExpertsShell
from actors.losses import Member
from cluster.controller_log import expert_log_file, expert_trace_file, read_expert_log
from placement.sharding.expert_map import ExpertMap
from placement.sharding.log import replay
from placement.sharding.rebalance_values import LoadsMeasured, MapInForce, RebalanceRequested
from placement.sharding.traces import ExpertTrace
from tests.local_ray.conftest import Served, make_config, serving
from tests.local_ray.test_serving_identity import NUM_NEW, TEXTS, reference

MODEL = "tiny-qwen3-moe"
MIB = 2**20
NUM_ROUNDS, TIMES = 4, 7
"""Of eight prompts each: more than 200 requests."""
NUM_TRACED = 40
SPEEDS = (4e9, 1e9, 2.5e9, 1.2e9)
SILENCE_S = 4.0

pytestmark = pytest.mark.timeout(300)


def devices(*memory_bytes: int, speeds: tuple[float, ...] = SPEEDS) -> list[dict[str, Any]]:
    """Of unequal speed, so that the plan divides experts unequally."""
    return [
        {
            "id": f"cpu{i}",
            "kind": "cpu",
            "flops_per_s": speeds[i],
            "memory_bytes_per_s": speeds[i],
            "memory_bytes": memory,
        }
        for i, memory in enumerate(memory_bytes)
    ]


def shard_config(
    checkpoints: Path,
    layer_counts: tuple[int, ...],
    memory: tuple[int, ...],
    speeds: tuple[float, ...] = SPEEDS,
    **changes: Any,
) -> Any:
    return make_config(
        checkpoints / MODEL,
        layer_counts,
        devices=devices(*memory, speeds=speeds),
        plan={"experts": "shards", "sequences_per_lane": 4} | changes.pop("plan", {}),
        **changes,
    )


LAYOUTS = {
    "1 device": ((6,), (64 * MIB,)),
    "2 devices": ((4, 2), (21 * MIB, 17 * MIB)),
    "4 devices": ((2, 0, 4, 0), (20 * MIB, 8 * MIB, 24 * MIB, 12 * MIB)),
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, seed=11, max_tokens=48, ignore_eos=True)


async def collect(dispatcher: Any, request: Request) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {i: [] for i in range(request.n)}
    async for output in dispatcher.generate(request):
        assert output.error == ""
        tokens[output.index] += output.tokens
    return tokens


async def ask_all(
    served: Served, sampling: SamplingParams, *, name: str = "r", times: int = 1
) -> list[dict[int, list[int]]]:
    dispatcher = served.running.dispatcher
    prompts = [served.running.tokenizer.encode(text) for text in TEXTS]
    requests = [
        Request(id=f"{name}-{k}-{i}", prompt=prompt, sampling=sampling, n=1 + i % 2)
        for k in range(times)
        for i, prompt in enumerate(prompts)
    ]
    return list(await asyncio.gather(*(collect(dispatcher, request) for request in requests)))


@pytest.fixture(scope="module")
def sampled(serve_model: Callable[..., Served], checkpoints: Path) -> list[dict[int, list[int]]]:
    """What a deployment with its experts in stages draws."""
    served = serve_model(checkpoints / MODEL, (4, 2))
    return served.call(ask_all(served, SAMPLED))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_those_of_stages_with_their_experts(
    layout: str, sampled: list[dict[int, list[int]]], ray_session: None, checkpoints: Path
) -> None:
    counts, memory = LAYOUTS[layout]
    with nothing_left_behind(), serving(shard_config(checkpoints, counts, memory)) as served:
        crew = served.running.fleet.experts
        assert crew is not None
        copies = [len(held) for layer in crew.map.layers for held in layer.experts]
        assert len(crew.map.devices) == len(counts)
        if len(counts) > 1:
            assert sum(copies) > 6 * 16, "some experts have replicas"
            assert max(copies) > min(copies)
        prompts = [served.running.tokenizer.encode(text) for text in TEXTS]

        greedy = served.call(ask_all(served, GREEDY, name="greedy"))
        drawn = served.call(ask_all(served, SAMPLED, name="sampled"))

        check_identical(reference(checkpoints / MODEL, prompts), [tokens[0] for tokens in greedy])
        assert drawn == sampled
        served.wait_until_idle()


# --- losses -----------------------------------------------------------------------------------

LONG = SamplingParams(temperature=0.9, top_p=0.9, seed=3, max_tokens=96, ignore_eos=True)
REPLICATED = (4, 2), (24 * MIB, 30 * MIB), (4e9, 1e9)
LOSSES = {
    "without replicas": ((4, 2, 0), (40 * MIB, 40 * MIB, 12 * MIB), (2e9, 1e9, 1e9), "cpu2"),
    "and the others' slots are full": ((4, 2, 0), (18 * MIB, 14 * MIB, 9 * MIB), SPEEDS, "cpu2"),
    "of all experts": ((6,), (64 * MIB,), (1e9,), "cpu0"),
}


def kill(member: Member, number: signal.Signals = signal.SIGKILL) -> None:
    pid = ray.get(member.actor.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, number)


def shell_of(served: Served) -> ExpertsShell:
    shell = served.running.supervisor.experts
    assert shell is not None
    return shell


def num_without_replica(current: ExpertMap, device_id: str) -> int:
    """Experts of all layers that this device alone holds."""
    held = [current.held(other) for other in current.device_ids if other != device_id]
    return sum(
        len(own.difference(*(layers[index] for layers in held)))
        for index, own in enumerate(current.held(device_id))
    )


class Losing:
    """Requests in flight while workers are lost."""

    def __init__(self, served: Served) -> None:
        crew = served.running.fleet.experts
        assert crew is not None
        self.served, self.crew, self.shell = served, crew, shell_of(served)
        self.expected = served.call(ask_all(served, LONG))
        self._calls = served.start(ask_all(served, LONG, name="again"))
        served.wait_until(lambda status: sum(lane.running for lane in status.lanes) >= 8)
        self._before = self.shell.rebalancer.map.version, len(self.shell.recoveries)

    def check(self, device_id: str) -> float:
        """Requests go on with their tokens, and the device's new worker is given experts; returns
        how long they had waited since the loss was noticed."""
        version, num_recoveries = self._before
        assert self._calls.result(120.0) == self.expected
        recoveries = list(self.shell.recoveries)[num_recoveries:]
        assert [each.device_id for each in recoveries] == [device_id]
        assert self.crew.map.version > version
        served = self.served
        served.wait_until(lambda status: status.ready)
        served.wait_until(lambda _: experts_told(served)["copies"].get(device_id, 0) > 0)
        assert served.call(ask_all(served, LONG, name="later")) == self.expected
        assert set(experts_told(served)["copies"]) == set(self.crew.map.device_ids)
        served.wait_until_idle()
        return recoveries[0].seconds


def experts_told(served: Served) -> dict[str, Any]:
    told: dict[str, Any] = served.running.supervisor.document()["experts"]
    return told


def kill_and_check(served: Served, device_id: str) -> None:
    losing = Losing(served)
    alone = num_without_replica(losing.crew.map, device_id)
    kill(losing.crew.members[device_id])
    killed_s = time.monotonic()
    num_recoveries = len(losing.shell.recoveries)
    served.wait_until(lambda _: len(losing.shell.recoveries) > num_recoveries)
    known_s = time.monotonic() - killed_s
    seconds = losing.check(device_id)
    sys.stdout.write(
        f"{alone} experts that only {device_id} held; served again {seconds:.2f} s after the loss "
        f"was noticed, {known_s:.2f} s after the kill (to 0.05 s)\n"
    )


@pytest.mark.parametrize("case", LOSSES)
def test_requests_go_on_when_a_worker_is_killed(
    case: str, ray_session: None, checkpoints: Path
) -> None:
    counts, memory, speeds, device_id = LOSSES[case]
    config = shard_config(checkpoints, counts, memory, speeds)
    with nothing_left_behind(), serving(config) as served:
        crew = served.running.fleet.experts
        assert crew is not None
        assert num_without_replica(crew.map, device_id)
        if "full" in case:
            left = [each.slots_per_layer for each in crew.map.devices if each.id != device_id]
            assert sum(left) == crew.map.num_experts
        kill_and_check(served, device_id)


@pytest.fixture(scope="module")
def replicated(ray_session: None, checkpoints: Path) -> Iterator[Served]:
    """A deployment in which every expert has a replica."""
    controller = {"silence_timeout_s": SILENCE_S}
    with serving(shard_config(checkpoints, *REPLICATED, controller=controller)) as served:
        crew = served.running.fleet.experts
        assert crew is not None
        assert [num_without_replica(crew.map, d) for d in crew.map.device_ids] == [0, 0]
        yield served


@pytest.mark.parametrize("device_id", ["cpu1", "cpu0"])
def test_replicas_take_over_when_a_worker_is_killed(device_id: str, replicated: Served) -> None:
    kill_and_check(replicated, device_id)


def test_replicas_take_over_when_a_worker_hangs(replicated: Served) -> None:
    losing = Losing(replicated)
    kill(losing.crew.members["cpu1"], signal.SIGSTOP)
    losing.check("cpu1")


def test_requests_go_on_when_a_stage_and_a_worker_are_killed_at_once(replicated: Served) -> None:
    losing = Losing(replicated)
    epoch = replicated.running.fleet.plan.epoch
    for member in (replicated.running.fleet.stages["cpu1"], losing.crew.members["cpu0"]):
        kill(member)
    losing.check("cpu0")
    assert replicated.running.fleet.plan.epoch == epoch + 1


# --- moving -----------------------------------------------------------------------------------


def parted(
    got: list[dict[int, list[int]]], wanted: list[dict[int, list[int]]]
) -> list[tuple[int, int, int, list[int]]]:
    """Return (request, choice, first token that differs, and what follows) of each that does."""
    found = []
    for request, (mine, theirs) in enumerate(zip(got, wanted, strict=True)):
        for choice, tokens in mine.items():
            pairs = zip(tokens, theirs[choice], strict=True)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
            if at is not None:
                found.append((request, choice, at, tokens[at : at + 4]))
    return found


def test_tokens_stay_while_experts_move_all_the_time(
    ray_session: None, checkpoints: Path, sampled: list[dict[int, list[int]]]
) -> None:
    config = shard_config(
        checkpoints,
        (4, 2, 0),
        (17 * MIB, 14 * MIB, 9 * MIB),
        controller={
            "rebalance": False,
            "expert_step_bytes": 200_000,
            "expert_trace_steps": NUM_TRACED,
        },
    )
    with nothing_left_behind(), serving(config) as served:
        crew, shell = served.running.fleet.experts, shell_of(served)
        assert crew is not None
        begun, rounds = crew.map, 0
        for _ in range(NUM_ROUNDS):
            calls = served.start(ask_all(served, SAMPLED, name=f"round-{rounds}", times=TIMES))
            while not calls.done():
                rounds += 1
                shell.tell(RebalanceRequested())
                shell.tell(LoadsMeasured(summary=hot(6, 16, 4 * rounds)))
                time.sleep(0.2)
            assert parted(calls.result(), sampled * TIMES) == []

        name = served.running.dispatcher.model_info().name
        file = expert_log_file(name)
        moved = sum(old != new for old, new in zip(begun.layers, crew.map.layers, strict=True))
        sys.stdout.write(f"{shell.num_maps} maps came into force, {moved} layers differ\n")
        assert shell.num_maps > 10
        assert not shell.recoveries
        # What goes on ends by itself, and no device keeps what no step goes by any more.
        served.wait_until(
            lambda _: (
                not shell.rebalancer.is_moving
                and all(
                    ray.get(worker.actor.versions.remote()) == (crew.map.version,)
                    for worker in crew.members.values()
                )
            )
        )
        served.wait_until_idle()
    opening, entries = read_expert_log(file)
    assert opening.map == begun
    assert sum(isinstance(entry.event, MapInForce) for entry in entries) == shell.num_maps
    assert replay(opening, entries) == ""
    trace = ExpertTrace.from_bytes(expert_trace_file(name, "decode").read_bytes())
    assert (trace.num_steps, trace.num_layers, trace.num_experts) == (NUM_TRACED, 6, 16)
    # Steps of different stages are the same ones: every layer has the same tokens.
    tokens_SL = trace.rows_SLE.sum(axis=2) / trace.top_k
    assert (tokens_SL == tokens_SL[:, :1]).all()
    assert tokens_SL.min() >= 1
