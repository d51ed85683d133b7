"""Parts of a deployment are lost while requests are in flight: they go on, with the same tokens."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from leftovers import nothing_left_behind

from actors.losses import Member
from cluster.backend import DeploymentStatus
from cluster.client import AsyncMotleyClient, Completion, Unreachable
from cluster.controller_log import controller_log_file, read_log
from placement.controller import Controller
from placement.steering.log import replay
from placement.steering.values import DeviceLost, Event, NodeJoined, NodeLost
from tests.local_ray.conftest import Served, make_config, serving

MODEL = "tiny-qwen3"
NUM_REQUESTS = 8
PROMPTS = [f"import os\nclass C{i}:\n    " * (1 + i % 4) for i in range(NUM_REQUESTS)]
DEADLINE_S = 120.0
SILENCE_S = 6.0

pytestmark = pytest.mark.timeout(300)


def open_deployment(checkpoints: Path, **controller: Any) -> Any:
    config = make_config(
        checkpoints / MODEL,
        (5, 2, 1),
        engine={"num_kv_blocks": 512, "step_timeout_s": 60.0},
        controller={"silence_timeout_s": SILENCE_S} | controller,
    )
    return serving(config)


@pytest.fixture
def served(ray_session: None, checkpoints: Path) -> Iterator[Served]:
    with nothing_left_behind(), open_deployment(checkpoints) as it:
        yield it


def pid_of(member: Member) -> int:
    return int(ray.get(member.actor.__ray_call__.remote(lambda _: os.getpid())))


def kill(member: Member) -> None:
    os.kill(pid_of(member), signal.SIGKILL)


def hang(member: Member) -> None:
    os.kill(pid_of(member), signal.SIGSTOP)


def break_the_loop(member: Member) -> None:
    """The process lives on, its work does not: a defect that nothing catches."""
    ray.get(member.actor.__ray_call__.remote(lambda self: setattr(self, "_inbox", None)))


async def ask_all(served: Served, **options: Any) -> list[Completion]:
    async with AsyncMotleyClient(served.running.grpc_target, served.running.token) as client:
        calls = [
            client.complete(prompt, max_tokens=300, ignore_eos=True, seed=i, n=1 + i % 2, **options)
            for i, prompt in enumerate(PROMPTS)
        ]
        return list(await asyncio.gather(*calls))


def texts(answers: list[Completion]) -> list[Any]:
    return [[(c.text, c.token_ids, c.finish_reason) for c in answer.choices] for answer in answers]


def all_run(status: DeploymentStatus) -> bool:
    return sum(lane.running for lane in status.lanes) >= NUM_REQUESTS


LOSSES: list[tuple[str, Callable[[Member], None]]] = [
    ("stage cpu0", kill),
    ("stage cpu1", hang),
    ("stage cpu2", break_the_loop),
    ("lane 0", kill),
    ("lane 1", hang),
]


def member_of(served: Served, name: str) -> Member:
    kind, _, key = name.partition(" ")
    fleet = served.running.fleet
    return fleet.stages[key] if kind == "stage" else fleet.lanes[int(key)]


@pytest.mark.parametrize(("name", "lose"), LOSSES)
async def test_requests_go_on_with_the_same_tokens(
    name: str, lose: Callable[[Member], None], served: Served
) -> None:
    options = {"temperature": 0.7, "top_p": 0.9}
    expected = texts(await ask_all(served, **options))
    calls = asyncio.create_task(ask_all(served, **options))
    await asyncio.to_thread(served.wait_until, all_run)
    lost = member_of(served, name)

    await asyncio.to_thread(lose, lost)
    async with asyncio.timeout(DEADLINE_S):
        actual = texts(await calls)

    assert actual == expected
    assert served.running.supervisor.document()["phase"] != "halted"
    assert lost not in served.running.fleet.members
    status = await asyncio.to_thread(served.wait_until, lambda status: status.ready)
    assert status.epoch == (1 if name.startswith("stage") else 0)
    served.wait_until_idle()


async def test_a_lane_lost_together_with_stages(served: Served) -> None:
    expected = texts(await ask_all(served, temperature=0.0))
    calls = asyncio.create_task(ask_all(served, temperature=0.0))
    await asyncio.to_thread(served.wait_until, all_run)
    lost = [member_of(served, name) for name in ("lane 0", "stage cpu1", "stage cpu2")]

    pids = [await asyncio.to_thread(pid_of, member) for member in lost]
    for pid, number in zip(pids, (signal.SIGSTOP, signal.SIGKILL, signal.SIGKILL), strict=True):
        os.kill(pid, number)
    async with asyncio.timeout(DEADLINE_S):
        actual = texts(await calls)

    assert actual == expected
    assert not set(lost) & set(served.running.fleet.members)
    await asyncio.to_thread(served.wait_until, lambda status: status.ready)
    served.wait_until_idle()


async def test_what_has_loaded_serves_though_another_stage_is_lost_meanwhile(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = texts(await ask_all(served, temperature=0.0))
    calls = asyncio.create_task(ask_all(served, temperature=0.0))
    await asyncio.to_thread(served.wait_until, all_run)
    second = await asyncio.to_thread(pid_of, member_of(served, "stage cpu2"))
    started: list[Member] = []
    fleet = served.running.fleet
    start = fleet.start_stage

    def start_and_lose_another(*arguments: Any) -> Member:
        started.append(start(*arguments))
        if len(started) == 1:
            os.kill(second, signal.SIGKILL)
        return started[-1]

    monkeypatch.setattr(fleet, "start_stage", start_and_lose_another)
    await asyncio.to_thread(kill, member_of(served, "stage cpu1"))
    async with asyncio.timeout(DEADLINE_S):
        actual = texts(await calls)

    assert actual == expected
    assert [member.key for member in started] == ["cpu1", "cpu2"], "the first is not started again"
    assert started[0] in fleet.members
    served.wait_until_idle()


async def test_the_log_of_a_loss_replays_to_the_same_commands(served: Served) -> None:
    await asyncio.to_thread(kill, member_of(served, "stage cpu1"))
    await asyncio.to_thread(served.wait_until, lambda status: status.epoch == 1)
    opening, entries = read_log(controller_log_file(MODEL))
    again = Controller(
        opening.profile,
        opening.topology,
        opening.workload,
        opening.settings,
        in_force=opening.in_force,
    )
    assert replay(again, entries) == ""
    assert any(isinstance(entry.event, DeviceLost) for entry in entries)


async def test_streams_have_no_token_twice_and_none_missing(served: Served) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 400, "temperature": 0, "ignore_eos": True}
    expected = "".join([piece async for piece in stream(served, body)])
    pieces: list[str] = []
    for name in ("lane 0", "lane 1", "stage cpu1"):
        async with asyncio.timeout(DEADLINE_S):
            pieces = []
            async for piece in stream(served, body):
                pieces.append(piece)
                if len(pieces) == 50:
                    await asyncio.to_thread(kill, member_of(served, name))
        assert "".join(pieces) == expected


async def stream(served: Served, body: dict[str, Any]) -> Any:
    async with (
        httpx.AsyncClient(
            base_url=served.running.http_url,
            headers={"Authorization": f"Bearer {served.running.token}"},
            timeout=DEADLINE_S,
            trust_env=False,
        ) as client,
        client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer,
    ):
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))["choices"][0]["text"]


async def test_requests_wait_while_nothing_fits_and_go_on_when_a_node_is_back(
    served: Served,
) -> None:
    expected = texts(await ask_all(served, temperature=0.0))
    calls = asyncio.create_task(ask_all(served, temperature=0.0))
    await asyncio.to_thread(served.wait_until, all_run)
    tell(served, lambda now_s: NodeLost(at_s=now_s, node="local", reason="pulled out"))
    status = await asyncio.to_thread(served.wait_until, lambda status: "device" in status.reason)
    assert not status.ready
    with pytest.raises(Unreachable, match="device") as refused:
        await ask_all(served)
    assert refused.value.retry_after_s is not None
    assert not calls.done()

    join(served)
    async with asyncio.timeout(DEADLINE_S):
        assert texts(await calls) == expected


async def test_requests_end_when_nothing_fits_for_too_long(
    ray_session: None, checkpoints: Path
) -> None:
    with nothing_left_behind(), open_deployment(checkpoints, recovery_timeout_s=0.5) as served:
        calls = asyncio.create_task(ask_all(served, temperature=0.0))
        await asyncio.to_thread(served.wait_until, all_run)
        tell(served, lambda now_s: NodeLost(at_s=now_s, node="local", reason="pulled out"))
        async with asyncio.timeout(DEADLINE_S):
            [outcome] = await asyncio.gather(calls, return_exceptions=True)
        assert isinstance(outcome, Unreachable), outcome
        join(served)
        await asyncio.to_thread(served.wait_until, lambda status: status.ready)
        assert await ask_all(served, temperature=0.0)


def tell(served: Served, event: Callable[[float], Event]) -> None:
    served.running.supervisor._shell.tell(event)


def join(served: Served) -> None:
    devices = served.running.devices
    tell(served, lambda now_s: NodeJoined(at_s=now_s, node="local", devices=devices))
