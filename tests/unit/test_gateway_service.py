"""The protocol-neutral core: defaults, seeds, accounting, merging and its own promptness."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest

from actors.engine.requests import MAX_SEED, Request, RequestError, RequestOutput
from cluster.backend import DeploymentStatus, Overloaded, Unavailable
from cluster.gateway.service import (
    ContextLengthExceeded,
    GatewayService,
    GenerationFailed,
    NotFound,
    random_seed,
)
from cluster.gateway.streams import merge
from cluster.gateway.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tests.unit.conftest import FakeBackend


@pytest.fixture
def service(backend: FakeBackend, tokenizer: Tokenizer) -> GatewayService:
    seeds = iter(range(100))
    return GatewayService(backend, tokenizer, new_seed=lambda: next(seeds))


def outcomes(service: GatewayService) -> dict[str, float]:
    return {
        sample.labels["outcome"]: sample.value
        for family in service.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "motley_requests_total"
    }


async def run(service: GatewayService, request: Request) -> list[RequestOutput]:
    return [output async for output in service.generate(request)]


def test_each_request_without_a_seed_gets_a_fresh_one(service: GatewayService) -> None:
    first = service.request("a", [1], {})
    second = service.request("b", [1], {})
    chosen = service.request("c", [1], {"seed": 9})

    assert [r.sampling.seed for r in (first, second, chosen)] == [0, 1, 9]


def test_random_seeds_span_63_bits() -> None:
    seeds = {random_seed() for _ in range(64)}

    assert len(seeds) == 64
    assert all(0 <= seed <= MAX_SEED for seed in seeds)
    assert max(seeds) > 2**56


@pytest.mark.parametrize(
    ("num_prompt", "asked", "default", "expected"),
    [(10, None, 16, 16), (60, None, 16, 4), (10, None, None, 54), (64, 0, 16, 0), (4, 60, 16, 60)],
)
def test_the_length_is_as_asked_or_what_fits(
    service: GatewayService, num_prompt: int, asked: int | None, default: int | None, expected: int
) -> None:
    options: Any = {} if asked is None else {"max_tokens": asked}
    request = service.request("a", [1] * num_prompt, options, default_max_tokens=default)

    assert request.sampling.max_tokens == expected


@pytest.mark.parametrize(
    ("num_prompt", "asked", "param"),
    [(64, None, "prompt"), (65, 0, "prompt"), (60, 5, "max_tokens")],
)
def test_what_cannot_fit_says_which_length_to_change(
    service: GatewayService, num_prompt: int, asked: int | None, param: str
) -> None:
    options: Any = {} if asked is None else {"max_tokens": asked}
    with pytest.raises(ContextLengthExceeded, match="the model takes 64") as caught:
        service.request("a", [1] * num_prompt, options)

    assert caught.value.param == param


def test_only_the_served_model_is_known(service: GatewayService) -> None:
    service.check_model(None)
    service.check_model("")
    service.check_model("org/tiny-model")
    with pytest.raises(NotFound, match="serves `org/tiny-model`"):
        service.check_model("tiny-model")


async def test_long_text_is_tokenized_like_short(service: GatewayService) -> None:
    assert await service.encode_text("ab" * 10_000) == (97, 98) * 10_000
    long = [{"role": "user", "content": "x" * 20_000}]
    assert len(await service.encode_chat(long)) == 20_005


async def test_outcomes_are_counted_once(service: GatewayService, backend: FakeBackend) -> None:
    await run(service, service.request("a", [1], {}))
    with pytest.raises(RequestError):
        service.request("b", [1], {"temperature": -1})
    for refusal in (Overloaded("full", 1), Unavailable("loading", 1), RequestError("big")):
        backend.refusal = refusal
        with pytest.raises(type(refusal)):
            await run(service, service.request("c", [1], {}))
    backend.refusal = None
    backend.fail_after = 1
    with pytest.raises(GenerationFailed):
        await run(service, service.request("d", [1], {}))

    assert outcomes(service) == {
        "completed": 1,
        "invalid": 2,
        "overloaded": 1,
        "unavailable": 1,
        "failed": 1,
    }


async def test_leaving_early_counts_as_cancelled_and_closes_at_once(
    service: GatewayService, backend: FakeBackend
) -> None:
    async with aclosing(service.generate(service.request("a", [1], {}))) as outputs:
        await anext(outputs)

    assert backend.closed == ["a"]
    assert outcomes(service) == {"cancelled": 1}


async def test_leaving_after_the_last_output_counts_as_completed(
    service: GatewayService,
) -> None:
    async with aclosing(service.generate(service.request("a", [1], {"max_tokens": 1}))) as outputs:
        await anext(outputs)

    assert outcomes(service) == {"completed": 1}


async def test_an_id_can_be_used_again_once_it_is_done(service: GatewayService) -> None:
    request = service.request("a", [1], {})
    await run(service, request)

    assert await run(service, request)


async def test_a_backend_that_stops_short_is_a_failure(
    service: GatewayService, backend: FakeBackend
) -> None:
    backend.reply_stops_short = True

    with pytest.raises(GenerationFailed, match="ended 0 of 2 choices"):
        await run(service, service.request("a", [1], {}, n=2))


async def test_a_status_that_does_not_come_is_not_ready(
    backend: FakeBackend, tokenizer: Tokenizer
) -> None:
    class Stuck(type(backend)):  # type: ignore[misc]  # the class is the fixture's
        async def status(self) -> DeploymentStatus:
            await asyncio.sleep(60)
            raise AssertionError

    service = GatewayService(Stuck(), tokenizer, status_timeout_s=0.05)
    status = await service.status()

    assert not status.ready
    assert "within 0.05 s" in status.reason


async def _count(start: int, log: list[str]) -> AsyncGenerator[int, None]:
    try:
        for value in range(start, start + 3):
            await asyncio.sleep(0)
            yield value
    finally:
        log.append(f"closed {start}")


async def test_merging_keeps_each_streams_order_and_closes_all() -> None:
    log: list[str] = []
    merged = [item async for item in merge([_count(0, log), _count(10, log)])]

    assert [v for i, v in merged if i == 0] == [0, 1, 2]
    assert [v for i, v in merged if i == 1] == [10, 11, 12]
    assert sorted(log) == ["closed 0", "closed 10"]


async def test_a_merge_left_early_has_closed_every_stream() -> None:
    log: list[str] = []
    async with aclosing(merge([_count(0, log), _count(10, log)])) as merged:
        await anext(merged)

    assert sorted(log) == ["closed 0", "closed 10"]


async def test_one_failure_ends_a_merge_and_closes_the_rest() -> None:
    log: list[str] = []

    async def fail() -> AsyncGenerator[int, None]:
        await asyncio.sleep(0)
        if not log:
            raise ValueError("no")
        yield 0

    with pytest.raises(ValueError, match="no"):
        async for _ in merge([_count(0, log), fail()]):
            pass
    assert log == ["closed 0"]
