"""Named requests: none runs twice, none is forgotten, and a gateway that comes back goes on."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from actors.engine.requests import (
    FinishReason,
    Request,
    RequestError,
    RequestOutput,
    SamplingParams,
)
from cluster import resuming as resuming_module
from cluster.backend import Unavailable
from cluster.client_values import Chunk, Heard, Unreachable
from cluster.journal import Journal
from cluster.resuming import Resuming
from protos import motley_pb2 as pb

TOKENS = (3, 1, 4, 1, 5)


def named(request_id: str = "mine", *, n: int = 1, deadline_s: float | None = None) -> Request:
    sampling = SamplingParams(seed=1)
    return Request(
        id=request_id, prompt=(7,), sampling=sampling, n=n, deadline_s=deadline_s, is_named=True
    )


class Backend:
    """Draws `TOKENS`; `gate` holds it up after two of them."""

    def __init__(self) -> None:
        self.runs: list[str] = []
        self.begun: asyncio.Queue[str] = asyncio.Queue()
        self.ended: asyncio.Queue[str] = asyncio.Queue()
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.last_reason: FinishReason = "length"

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        self.runs.append(request.id)
        self.begun.put_nowait(request.id)
        try:
            if self.error is not None:
                raise self.error
            for number, token in enumerate(TOKENS):
                if number == 2:
                    await self.gate.wait()
                is_last = number == len(TOKENS) - 1
                yield RequestOutput(
                    id=request.id,
                    tokens=(token,),
                    finish_reason=self.last_reason if is_last else None,
                )
        finally:
            self.ended.put_nowait(request.id)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "requests.sqlite3"


@pytest.fixture
def opened(file: Path) -> Callable[..., Resuming]:
    def make(backend: Backend, *, grace_s: float = 60.0, keep_s: float = 60.0) -> Resuming:
        return Resuming(backend.generate, Journal(file, keep_s=keep_s), grace_s=grace_s)

    return make


async def listen(resuming: Resuming, request: Request, owner: str = "alice") -> list[int]:
    async with aclosing(resuming.generate(request, owner)) as outputs:
        return [token async for output in outputs for token in output.tokens]


async def test_a_request_that_comes_again_joins_the_one_that_runs(
    opened: Callable[..., Resuming],
) -> None:
    backend = Backend()
    resuming = opened(backend)
    backend.gate.clear()
    first = asyncio.create_task(listen(resuming, named()))
    second = asyncio.create_task(listen(resuming, named(deadline_s=5.0)))
    await backend.begun.get()
    assert resuming.owner("mine") == "alice"
    backend.gate.set()
    assert await first == await second == list(TOKENS)
    assert await listen(resuming, named()) == list(TOKENS)
    assert backend.runs == ["mine"]
    await resuming.close()


async def test_tokens_that_are_heard_again_are_not_paid_for_again(
    opened: Callable[..., Resuming],
) -> None:
    it = opened(Backend())
    assert not it.is_known("mine", "alice")
    outputs = [output async for output in it.generate(named(), "alice")]
    assert it.is_known("mine", "alice")
    assert not it.is_known("mine", "bob")

    heard = range(1, len(outputs) + 1)
    assert [it.num_to_charge("mine", number) for number in heard] == [1] * len(TOKENS)
    assert [it.num_to_charge("mine", number) for number in heard] == [0] * len(TOKENS)
    await it.close()


@pytest.mark.parametrize(("request_", "owner"), [(named(n=2), "alice"), (named(), "bob")])
async def test_a_name_belongs_to_one_request_of_one_client(
    request_: Request, owner: str, opened: Callable[..., Resuming]
) -> None:
    resuming = opened(Backend())
    await listen(resuming, named())
    with pytest.raises(RequestError, match="`mine` is another request's"):
        await listen(resuming, request_, owner)
    await resuming.close()


async def test_a_gateway_that_comes_back_goes_on_and_knows_what_has_ended(
    opened: Callable[..., Resuming],
) -> None:
    backend = Backend()
    before = opened(backend)
    await listen(before, named("done"))
    backend.gate.clear()
    cut_off = asyncio.create_task(listen(before, named("cut off")))
    await backend.begun.get()
    await backend.begun.get()
    await before.close()
    with pytest.raises(Unavailable, match="send the request again under its name"):
        await cut_off

    backend.gate.set()
    after = opened(backend)
    after.recall()
    # A client that is early waits; nothing runs before requests are served.
    early = asyncio.create_task(listen(after, named("cut off")))
    await asyncio.sleep(0)
    assert backend.runs == ["done", "cut off"]
    assert after.restart() == 1
    assert await early == list(TOKENS)
    assert await listen(after, named("cut off")) == list(TOKENS)
    assert await listen(after, named("done")) == list(TOKENS)
    assert backend.runs == ["done", "cut off", "cut off"]
    await after.close()


async def test_what_nobody_listens_to_is_given_up_after_a_grace(
    opened: Callable[..., Resuming], file: Path
) -> None:
    backend = Backend()
    resuming = opened(backend, grace_s=0.0)
    backend.gate.clear()
    outputs = resuming.generate(named(), "alice")
    await anext(outputs)
    await outputs.aclose()
    await backend.ended.get()
    assert resuming.owner("mine") is None
    assert Journal(file, keep_s=1.0).entries() == []
    await resuming.close()


async def test_what_was_refused_may_come_again(opened: Callable[..., Resuming]) -> None:
    backend = Backend()
    resuming = opened(backend)
    backend.error = Unavailable("full", 1.0)
    with pytest.raises(Unavailable, match="full"):
        await listen(resuming, named())
    backend.error = None
    assert await listen(resuming, named()) == list(TOKENS)
    await resuming.close()


async def test_what_failed_runs_again_when_it_is_asked_for_again(
    opened: Callable[..., Resuming], file: Path
) -> None:
    backend = Backend()
    resuming = opened(backend)
    backend.last_reason = "error"
    await listen(resuming, named())
    backend.last_reason = "length"
    assert await listen(resuming, named()) == list(TOKENS)
    assert backend.runs == ["mine", "mine"]
    await resuming.close()


async def test_what_failed_does_not_take_its_successor_with_it(
    opened: Callable[..., Resuming],
) -> None:
    backend = Backend()
    resuming = opened(backend, grace_s=0.02)
    backend.error = Unavailable("full", 1.0)
    with pytest.raises(Unavailable, match="full"):
        await listen(resuming, named())
    backend.error = None
    backend.gate.clear()
    again = asyncio.create_task(listen(resuming, named()))
    await asyncio.sleep(0.1)  # the first one's grace, had it any
    assert resuming.owner("mine") == "alice"
    backend.gate.set()
    assert await again == list(TOKENS)
    await resuming.close()


async def test_a_client_that_leaves_at_once_leaves_a_request_that_runs(
    opened: Callable[..., Resuming],
) -> None:
    backend = Backend()
    resuming = opened(backend)
    hasty = asyncio.create_task(listen(resuming, named()))
    await asyncio.sleep(0)
    hasty.cancel()
    await asyncio.gather(hasty, return_exceptions=True)
    assert await listen(resuming, named()) == list(TOKENS)
    assert backend.runs == ["mine"]
    await resuming.close()


async def test_only_so_many_are_kept_after_their_end(
    opened: Callable[..., Resuming], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming_module, "_MOST_KEPT", 2)
    backend = Backend()
    resuming = opened(backend)
    for name in "abc":
        await listen(resuming, named(name))
    await resuming.close()
    journal = Journal(file, keep_s=60.0)
    assert [entry.request.id for entry in journal.entries()] == ["b", "c"]
    journal.close()


async def test_a_full_disk_at_the_end_costs_its_client_nothing(
    opened: Callable[..., Resuming], monkeypatch: pytest.MonkeyPatch
) -> None:
    resuming = opened(Backend())

    def finish(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(resuming._journal, "finish", finish)
    assert await listen(resuming, named()) == list(TOKENS)
    assert await listen(resuming, named()) == list(TOKENS)
    await resuming.close()


async def test_a_full_disk_refuses_named_requests_and_holds_none(
    opened: Callable[..., Resuming], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Backend()
    resuming = opened(backend)

    def accept(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(resuming._journal, "accept", accept)
    with pytest.raises(Unavailable, match="disk is full"):
        await listen(resuming, named())
    assert resuming.owner("mine") is None
    assert backend.runs == []
    await resuming.close()


def test_outputs_are_kept_for_a_while(file: Path) -> None:
    now = [1000.0]
    journal = Journal(file, keep_s=10.0, unix_s=lambda: now[0])
    journal.accept(named("old"), "alice")
    journal.accept(named("running"), "alice")
    journal.finish("old", [RequestOutput(id="old", tokens=(1,), finish_reason="stop")])
    now[0] = 1009.0
    assert journal.forget_old() == []
    now[0] = 1011.0
    assert journal.forget_old() == ["old"]
    [left] = journal.entries()
    assert (left.request, left.owner, left.outputs) == (named("running"), "alice", None)
    journal.close()


def chunk(index: int, token: int) -> Chunk:
    return Chunk(request_id="mine", index=index, text="x", token_ids=(token,))


def test_a_client_that_asks_again_has_every_chunk_once() -> None:
    heard = Heard(pb.GenerateRequest(request_id="mine"), 0.0)
    first = [chunk(0, 1), chunk(1, 5), chunk(0, 2)]
    assert all(heard.is_new(c, 1.0) for c in first)
    assert heard.wait_s(Unreachable("gone"), 2.0) == 1.0
    again = [chunk(1, 5), chunk(0, 1), chunk(1, 6), chunk(0, 2), chunk(0, 3)]
    assert [heard.is_new(c, 3.0) for c in again] == [False, False, True, False, True]
    with pytest.raises(Unreachable):
        heard.wait_s(Unreachable("gone for good"), 100.0)


def test_a_request_without_a_name_is_not_sent_again() -> None:
    with pytest.raises(Unreachable):
        Heard(pb.GenerateRequest(), 0.0).wait_s(Unreachable("gone"), 0.0)
