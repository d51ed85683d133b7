"""Rates, places and records of each client: counted on a fake clock, then over both protocols."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from actors.engine.requests import RequestOutput, SamplingParams
from cluster.client import AsyncMotleyClient, Forbidden, NotFound, Overloaded, Unauthenticated
from cluster.gateway.access import (
    Access,
    Caller,
    RateLimited,
    current_caller,
)
from cluster.gateway.access import Unauthenticated as NotLetIn
from cluster.gateway.service import GatewayService, SamplingOptions
from cluster.gateway.tokenizer import Tokenizer
from cluster.journal import Journal
from cluster.keys import KeyRing, add_key, new_key, remove_key
from cluster.resuming import Resuming

if TYPE_CHECKING:
    from tests.unit.conftest import FakeBackend, GatewayFactory

pytestmark = pytest.mark.asyncio(loop_scope="module")

Eventually = Callable[[Callable[[], bool]], Awaitable[None]]
BODY = {"prompt": "ab", "max_tokens": 4}


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.jsonl"


def made(file: Path, name: str, *scopes: str, **limits: int) -> str:
    key, text = new_key(name, scopes or ("generate",), **limits)
    add_key(file, key)
    return text


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


# --- counted ----------------------------------------------------------------------------------


class Door:
    """One key's way in, on a clock of its own."""

    def __init__(self, file: Path, token: str, **limits: int) -> None:
        self.clock = Clock()
        self.text = made(file, "alice", **limits)
        self.access = Access(token, keys=KeyRing(file), monotonic_s=self.clock)

    def caller(self) -> Caller:
        return self.access.caller([f"Bearer {self.text}"], "here")


async def test_calls_are_counted_and_the_wait_is_told(file: Path, token: str) -> None:
    door = Door(file, token, requests_per_minute=2)

    for _ in range(2):
        with door.access.serving(door.caller()):
            assert current_caller().name == "alice"
    with (
        pytest.raises(RateLimited, match=r"its 2 calls a minute.* 30.0 s") as caught,
        door.access.serving(door.caller()),
    ):
        pass

    assert caught.value.retry_after_s == 30.0
    assert current_caller().name == "owner"
    door.clock.now_s = 30.0
    with door.access.serving(door.caller()):
        pass


async def test_open_calls_have_a_limit_and_give_their_place_back(file: Path, token: str) -> None:
    door = Door(file, token, concurrent_requests=1)

    with door.access.serving(door.caller()):
        with (
            pytest.raises(RateLimited, match="1 calls are open for key alice, which may have 1"),
            door.access.serving(door.caller()),
        ):
            pass
        with (
            door.caller().prompt(3, door.clock),
            pytest.raises(RateLimited, match="1 prompts run"),
            door.caller().prompt(3, door.clock),
        ):
            pass

    with door.access.serving(door.caller()), door.caller().prompt(3, door.clock):
        pass


async def test_a_key_whose_limits_are_changed_begins_afresh(file: Path, token: str) -> None:
    door = Door(file, token, requests_per_minute=1)
    with door.access.serving(door.caller()):
        pass
    remove_key(file, "alice")
    door.text = made(file, "alice", requests_per_minute=5)

    with door.access.serving(door.caller()):
        pass


async def test_nothing_but_one_bearer_value_is_looked_at(file: Path, token: str) -> None:
    door = Door(file, token)
    for values in ([], [f"Bearer {token}"] * 2, [door.text], [f"Basic {door.text}"], ["Bearer"]):
        with pytest.raises(NotLetIn):
            door.access.caller(values, "here")


async def test_prompt_and_output_are_charged_and_what_runs_goes_on(
    file: Path, token: str, backend: FakeBackend, tokenizer: Tokenizer
) -> None:
    door = Door(file, token, tokens_per_minute=12)
    service = GatewayService(backend, tokenizer, monotonic_s=door.clock)

    async def ask(request_id: str) -> int:
        request = service.request(request_id, (1, 2), {"max_tokens": 9})
        return len([output async for output in service.generate(request)])

    with door.access.serving(door.caller()):
        assert await ask("a") == 9  # 2 + 9 of 12
        with pytest.raises(RateLimited, match=r"12 tokens a minute.*prompt of 2 may come in 5.0 s"):
            await ask("b")
        door.clock.now_s = 5.0
        assert await ask("c") == 9  # 2 of 2, and 9 on credit
        with pytest.raises(RateLimited) as caught:
            await ask("d")

    assert caught.value.retry_after_s == pytest.approx(55.0)
    assert door.caller().usage is not None
    assert door.caller().usage.num_running == 0  # type: ignore[union-attr]
    assert service._in_flight == {}
    assert isinstance(backend.requests[0].sampling, SamplingParams)
    text = service.metrics.render(await service.status(), service.model_info()).decode()
    assert 'motley_requests_total{outcome="overloaded"} 2.0' in text


async def test_a_named_request_that_its_client_has_left_keeps_its_place(
    file: Path, token: str, backend: FakeBackend, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    door = Door(file, token, concurrent_requests=1)
    backend.hang_after = 1
    journal = Journal(tmp_path / "journal.sqlite3", keep_s=60.0)
    resuming = Resuming(backend.generate, journal, grace_s=60.0)
    service = GatewayService(backend, tokenizer, resuming=resuming)

    def ask(request_id: str) -> AsyncGenerator[RequestOutput, None]:
        options: SamplingOptions = {"max_tokens": 9}
        return service.generate(service.request(request_id, (1, 2), options, is_named=True))

    with door.access.serving(door.caller()):
        async with aclosing(ask("a")) as first:
            await anext(first)
        with pytest.raises(RateLimited, match="1 prompts run"):
            await anext(ask("b"))
        async with aclosing(ask("a")) as again:
            backend.hang_after = None
            backend.release()
            assert len([output async for output in again]) == 9
        async with aclosing(ask("b")) as second:
            assert len([output async for output in second]) == 9
    await resuming.close()


# --- over both protocols ----------------------------------------------------------------------


async def test_a_rate_is_kept_over_both_protocols_together(
    gateway_with: GatewayFactory, file: Path
) -> None:
    key = made(file, "alice", requests_per_minute=3)
    other = made(file, "bob", requests_per_minute=3)
    async with (
        gateway_with(api_keys_file=file) as gateway,
        httpx.AsyncClient(base_url=gateway.http_url, headers=bearer(key)) as http,
        AsyncMotleyClient(gateway.grpc_target, key) as client,
    ):
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200
        await client.model_info()
        assert (await client.complete("ab")).text == "Hi there"
        refused = await http.get("/v1/models")
        with pytest.raises(Overloaded, match="requests_per_minute") as caught:
            await client.complete("ab")
        others = await http.get("/v1/models", headers=bearer(other))

    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert caught.value.retry_after_s is not None
    assert 0 < caught.value.retry_after_s <= 20
    assert others.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_are_a_rate_too(
    gateway_with: GatewayFactory, file: Path, stream: bool
) -> None:
    key = made(file, "alice", tokens_per_minute=5)
    async with (
        gateway_with(api_keys_file=file) as gateway,
        httpx.AsyncClient(base_url=gateway.http_url, headers=bearer(key)) as http,
    ):
        first = await http.post("/v1/completions", json=BODY | {"stream": stream})
        second = await http.post("/v1/completions", json=BODY | {"stream": stream})

    assert first.status_code == 200
    assert second.status_code == 429
    assert "tokens_per_minute" in second.json()["error"]["message"]


async def test_running_requests_have_a_limit_and_a_client_that_leaves_frees_its_place(
    gateway_with: GatewayFactory, backend: FakeBackend, eventually: Eventually, file: Path
) -> None:
    key = made(file, "alice", concurrent_requests=1)
    backend.hang_after = 1
    async with (
        gateway_with(api_keys_file=file) as gateway,
        httpx.AsyncClient(base_url=gateway.http_url, headers=bearer(key)) as http,
    ):
        running = asyncio.create_task(http.post("/v1/completions", json=BODY))
        await eventually(lambda: len(backend.requests) == 1)
        refused = await http.post("/v1/completions", json=BODY)
        running.cancel()
        await eventually(lambda: len(backend.closed) == 1)
        backend.hang_after = None
        two = await http.post("/v1/completions", json={"prompt": ["ab", "cd"]})
        one = await http.post("/v1/completions", json=BODY)

    assert refused.status_code == 429
    assert "concurrent_requests" in refused.json()["error"]["message"]
    assert two.status_code == 429
    assert one.status_code == 200


async def test_aborting_anothers_request_needs_admin_and_is_put_on_record(
    gateway_with: GatewayFactory,
    backend: FakeBackend,
    eventually: Eventually,
    file: Path,
    tmp_path: Path,
) -> None:
    alice, bob = made(file, "alice"), made(file, "bob")
    carol = made(file, "carol", "generate", "admin")
    backend.hang_after = 1
    acts = tmp_path / "acts.jsonl"
    async with (
        gateway_with(api_keys_file=file, audit_file=acts) as gateway,
        AsyncMotleyClient(gateway.grpc_target, alice) as owner,
        AsyncMotleyClient(gateway.grpc_target, bob) as stranger,
        AsyncMotleyClient(gateway.grpc_target, carol) as admin,
    ):
        for number, ended_by in enumerate((owner, admin)):
            running: asyncio.Task[Any] = asyncio.create_task(
                owner.complete("ab", request_id=f"r{number}")
            )
            await eventually(lambda number=number: len(backend.requests) == number + 1)  # type: ignore[misc]
            with pytest.raises(Forbidden, match="scope admin; bob has generate"):
                await stranger.abort(f"r{number}")
            await ended_by.abort(f"r{number}")
            assert (await running).choices[0].finish_reason == "abort"
        with pytest.raises(NotFound):
            await stranger.abort("r0")

    entries = [json.loads(line) for line in acts.read_text(encoding="utf-8").splitlines()]
    told = [(each["act"], each["who"], each["outcome"]) for each in entries]
    assert told == [
        ("authorize", "bob", "refused"),
        ("authorize", "bob", "refused"),
        ("abort", "carol", "done"),
        ("shut_down", "owner", "done"),
    ]
    assert (entries[2]["request"], entries[2]["asked_by"]) == ("r1", "alice")
    assert "127.0.0.1" in entries[2]["source"]


async def test_admin_acts_and_refusals_are_put_on_record(
    gateway_with: GatewayFactory, backend: FakeBackend, file: Path, tmp_path: Path, token: str
) -> None:
    alice = made(file, "alice")
    acts = tmp_path / "acts.jsonl"
    async with (
        gateway_with(api_keys_file=file, audit_file=acts) as gateway,
        httpx.AsyncClient(base_url=gateway.http_url) as http,
        AsyncMotleyClient(gateway.grpc_target, "wrong-token") as stranger,
    ):
        await http.get("/status", headers=bearer("wrong-token"))
        with pytest.raises(Unauthenticated):
            await stranger.ready()
        await http.delete("/v1/adapter", headers=bearer(alice))
        await http.delete("/v1/adapter", headers=bearer(token))
        backend.publish_error = RuntimeError("stage 1 is full")
        await http.delete("/v1/adapter", headers=bearer(token))

    entries = [json.loads(line) for line in acts.read_text(encoding="utf-8").splitlines()]
    told = [(each["act"], each["who"], each["outcome"], each.get("what")) for each in entries]
    assert told == [
        ("authenticate", "", "refused", "GET /status"),
        ("authenticate", "", "refused", "/grpc.health.v1.Health/Check"),
        ("authorize", "alice", "refused", "DELETE /v1/adapter"),
        ("remove_adapter", "owner", "done", None),
        ("remove_adapter", "owner", "failed: stage 1 is full", None),
        ("shut_down", "owner", "done", None),
    ]
    assert all(each["source"] for each in entries)
    assert {each["deployment"] for each in entries} == {"tiny"}
