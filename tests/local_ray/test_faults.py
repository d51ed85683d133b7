"""Parts of a deployment die, or are told nonsense, while requests are in flight."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgpack
import pytest
import ray
import torch
from leftovers import nothing_left_behind

from actors import wire
from actors.engine.batch import Draw, Rows, StepBatch
from actors.engine.frames import encode_tensor
from cluster.client import (
    AsyncMotleyClient,
    Completion,
    MotleyClient,
    ServerFailed,
    Unreachable,
)
from tests.local_ray.conftest import Served, make_config, serving

MODEL = "tiny-qwen3"
CUT = (5, 2, 1)
ENGINE = {"num_kv_blocks": 512, "step_timeout_s": 8.0}
PROMPT = "import os\nimport sys\n\n\ndef main("
LONG: dict[str, Any] = {"max_tokens": 1500, "ignore_eos": True}
"""Takes several seconds."""
DEADLINE_S = 30.0

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def served(serve_model: Callable[..., Served], checkpoints: Path) -> Served:
    return serve_model(checkpoints / MODEL, CUT, engine=ENGINE)


@pytest.fixture
def to_be_broken(ray_session: None, checkpoints: Path) -> Iterator[Served]:
    """A deployment of the test's own, closed (and looked after) when it ends."""
    with nothing_left_behind(), serving(make_config(checkpoints / MODEL, CUT, engine=ENGINE)) as it:
        yield it


def http_client(served: Served) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=served.running.http_url,
        headers={"Authorization": f"Bearer {served.running.token}"},
        timeout=DEADLINE_S,
        trust_env=False,
    )


def greedy(served: Served) -> str:
    with MotleyClient(served.running.grpc_target, served.running.token) as client:
        return client.complete(PROMPT, max_tokens=16, temperature=0.0, timeout_s=DEADLINE_S).text


def pid_of(actor: Any) -> int:
    return int(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())))


# -- closing ------------------------------------------------------------------------------------


async def stream_grpc(served: Served) -> Completion:
    async with AsyncMotleyClient(served.running.grpc_target, served.running.token) as client:
        return await client.complete(PROMPT, **LONG)


async def test_closing_lets_short_requests_finish_and_ends_long_ones(
    ray_session: None, checkpoints: Path
) -> None:
    with nothing_left_behind():
        block = serving(make_config(checkpoints / MODEL, CUT, engine=ENGINE))
        served = await asyncio.to_thread(block.__enter__)
        await check_closing(served, lambda: block.__exit__(None, None, None))


async def check_closing(served: Served, close: Callable[[], object]) -> None:
    want = await asyncio.to_thread(greedy, served)
    long = asyncio.create_task(stream_grpc(served))
    await asyncio.to_thread(
        served.wait_until, lambda status: sum(lane.running for lane in status.lanes) == 1
    )
    async with http_client(served) as client:
        body = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.aiter_lines()
            received = [await anext(lines)]
            closing_down = asyncio.create_task(asyncio.to_thread(close))
            received += [line async for line in lines]

        events = [line.removeprefix("data: ") for line in received if line]
        assert events.pop() == "[DONE]"
        assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == want
    async with asyncio.timeout(DEADLINE_S):
        [outcome] = await asyncio.gather(long, return_exceptions=True)
        await closing_down
    if isinstance(outcome, Completion):
        assert outcome.choices[0].finish_reason == "abort"
        assert outcome.usage.completion_tokens < LONG["max_tokens"]
    else:
        assert isinstance(outcome, Unreachable), outcome


# -- nonsense on the wire ----------------------------------------------------------------------


GOOD = StepBatch(
    0, 10**9, 0, [5], [Rows(0, 1, [0])], drawn=[0], draws=[Draw(seed=0, position=1)]
)  # fmt: skip
"""A step that could be run, of a number that no lane waits for."""
HIDDEN = torch.zeros(1, 192)


def packed(**changes: Any) -> bytes:
    return replace(GOOD, **changes).encode()


def step(
    data: bytes, seconds: bytes = msgpack.packb([]), hidden: torch.Tensor = HIDDEN
) -> list[Any]:
    return [wire.STEP, data, seconds, *encode_tensor(hidden)]


NONSENSE: dict[str, list[Any]] = {
    "a kind alone": [wire.STEP],
    "an empty part": [b""],
    "not msgpack": step(b"\xc1\xff\x00"),
    "not a list": step(msgpack.packb(7)),
    "too few fields": step(msgpack.packb([0, 1, 2])),
    "words for numbers": step(msgpack.packb(["a"] * 10)),
    "tokens that are a number": step(packed(tokens=3)),
    "rows of words": step(packed(rows=[("x", "y", "z")])),
    "rows without blocks": step(packed(rows=[Rows(0, 1, [])])),
    "rows that do not add up": step(packed(rows=[Rows(0, 9, [0])])),
    "a block that is not there": step(packed(rows=[Rows(0, 1, [10**9])])),
    "a token that is not there": step(packed(tokens=[10**9])),
    "a lane that is not there": step(packed(lane=99)),
    "a lane that is a list": step(packed(lane=[1])),
    "a draw that is not there": step(packed(drawn=[77])),
    "a plan to come": step(packed(epoch=3)),
    "a lane's former life": step(packed(life=3)),
    "no seconds": [wire.STEP, GOOD.encode()],
    "seconds that are a number": step(GOOD.encode(), seconds=msgpack.packb(5)),
    "seconds that are no msgpack": step(GOOD.encode(), seconds=b"\xc1"),
    "no hidden rows": [wire.STEP, GOOD.encode(), msgpack.packb([])],
    "half a hidden row": [
        wire.STEP, GOOD.encode(), msgpack.packb([]), encode_tensor(HIDDEN)[0], b"half",
    ],
    "hidden rows of another width": step(GOOD.encode(), hidden=torch.zeros(1, 7)),
    "five hundred parts": [b"x"] * 500,
    "a result with no step": [wire.RESULT, msgpack.packb([]), msgpack.packb([])],
    "a result of words": [wire.RESULT, msgpack.packb([0, ["a", "b", "c"]]), msgpack.packb([1])],
    "a request of nothing": [wire.REQUEST, msgpack.packb({})],
    "a request that is a word": [wire.REQUEST, msgpack.packb("x")],
    "a request of words": [
        wire.REQUEST,
        msgpack.packb(
            {"id": "x", "prompt": ["a"], "sampling": {}, "n": 1, "deadline_s": None}
        ),
    ],
    "a request with an endless deadline": [
        wire.REQUEST,
        msgpack.packb(
            {"id": "y", "prompt": [1], "sampling": {}, "n": 1, "deadline_s": "tomorrow"}
        ),
    ],
    "an abort of a list": [wire.ABORT, msgpack.packb([1])],
    "a refusal of nothing": [wire.REFUSED, msgpack.packb([])],
    "outputs of nothing": [wire.OUTPUTS, msgpack.packb([])],
    "outputs of words": [wire.OUTPUTS, msgpack.packb([0, ["x"]])],
    "a report of nothing": [wire.REPORT, msgpack.packb({})],
    "a report that is a number": [wire.REPORT, msgpack.packb(1)],
    "an unknown kind": [b"unheard-of", msgpack.packb(1)],
}  # fmt: skip


@pytest.fixture(scope="module")
def inboxes(served: Served) -> Iterator[dict[str, wire.Outbox]]:
    """A way into every inbox, as only a holder of the deployment's keys has it."""
    running = served.running
    keys = running.dispatcher.keys
    gateway = running.dispatcher._inbox
    assert gateway is not None
    addresses = [
        *(member.address for member in running.fleet.members if member.address),
        gateway.address,
    ]
    boxes = {address.name: wire.Outbox(address, keys) for address in addresses}
    yield boxes
    for box in boxes.values():
        box.close()


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_in_an_inbox_is_dropped_and_serving_goes_on(
    name: str, served: Served, inboxes: dict[str, wire.Outbox]
) -> None:
    want = greedy(served)
    for box in inboxes.values():
        box.send(NONSENSE[name])
    for _ in range(2):  # one for each lane, and after the message
        assert greedy(served) == want
    served.wait_until_idle()


async def test_a_step_that_is_refused_fails_its_own_requests_only(served: Served) -> None:
    want = await asyncio.to_thread(greedy, served)
    lane = served.running.fleet.lanes[0].actor
    ray.get(lane.__ray_call__.remote(lambda self: setattr(self._core._scheduler, "_epoch", 7)))
    try:
        async with AsyncMotleyClient(served.running.grpc_target, served.running.token) as client:
            calls = [
                client.complete(PROMPT, max_tokens=16, temperature=0.0, timeout_s=DEADLINE_S)
                for _ in range(4)
            ]
            ended = await asyncio.gather(*calls, return_exceptions=True)
    finally:
        ray.get(lane.__ray_call__.remote(lambda self: setattr(self._core._scheduler, "_epoch", 0)))

    # A lane that fails its requests at once is the one with fewer: it may get more than half.
    failed = [outcome for outcome in ended if not isinstance(outcome, Completion)]
    assert {outcome.text for outcome in ended if isinstance(outcome, Completion)} <= {want}
    assert failed
    for error in failed:
        assert isinstance(error, ServerFailed)
        assert "the stage on cpu0" in str(error)
        assert "is of plan 7; it has [0]" in str(error)
    served.wait_until_idle()
    assert [await asyncio.to_thread(greedy, served) for _ in range(2)] == [want] * 2
