"""The blocking and the asyncio client against a real gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, closing
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from cluster.backend import Overloaded as BackendOverloaded
from cluster.backend import Unavailable
from cluster.client import (
    AsyncMotleyClient,
    Chunk,
    DeadlineExceeded,
    InvalidRequest,
    Message,
    MotleyClient,
    MotleyError,
    NotFound,
    Overloaded,
    ServerFailed,
    Unauthenticated,
    Unreachable,
    Usage,
)
from cluster.client_values import join

if TYPE_CHECKING:
    from cluster.gateway.server import GatewayHandle
    from tests.unit.conftest import FakeBackend

pytestmark = pytest.mark.asyncio(loop_scope="module")

Eventually = Callable[[Callable[[], bool]], Awaitable[None]]


@pytest_asyncio.fixture(loop_scope="module")
async def client(
    gateway: GatewayHandle, backend: FakeBackend, token: str
) -> AsyncGenerator[AsyncMotleyClient, None]:
    async with AsyncMotleyClient(gateway.grpc_target, token) as client:
        yield client


async def test_a_completion_is_joined_from_its_stream(client: AsyncMotleyClient) -> None:
    answer = await client.complete("ab", n=2, max_tokens=4, logprobs=1, prompt_logprobs=0)

    assert answer.text == "Hi t"
    assert [choice.index for choice in answer.choices] == [0, 1]
    choice = answer.choices[1]
    assert (choice.finish_reason, choice.stop_reason) == ("length", None)
    assert choice.token_ids == tuple(b"Hi t")
    assert [entry.text for entry in choice.logprobs] == ["H", "i", " ", "t"]
    assert choice.logprobs[0].top[0].logprob == -0.5
    assert [entry.logprob for entry in answer.prompt_logprobs] == [None, -1.5]
    assert answer.usage == Usage(prompt_tokens=2, completion_tokens=8, cached_prompt_tokens=4)


async def test_a_chat_goes_through_the_template(
    client: AsyncMotleyClient, backend: FakeBackend
) -> None:
    messages = [Message("system", "s"), Message("user", "u")]
    answer = await client.chat(messages, template_variables={"enable_thinking": True})

    assert (answer.text, answer.choices[0].finish_reason) == ("Hi there", "stop")
    assert bytes(backend.requests[0].prompt) == b"s:s\nu:u\na!"


async def test_every_option_reaches_the_backend(
    client: AsyncMotleyClient, backend: FakeBackend
) -> None:
    await client.complete(
        [1, 2], model="org/tiny-model", request_id="r-1", max_tokens=3, min_tokens=1,
        temperature=0.5, top_k=4, top_p=0.9, min_p=0.1, repetition_penalty=1.2,
        presence_penalty=0.3, frequency_penalty=0.4, seed=5, stop=["x"], stop_token_ids=[7],
        ignore_eos=True, timeout_s=30,
    )  # fmt: skip

    [request] = backend.requests
    assert (request.id, request.prompt) == ("r-1", (1, 2))
    assert request.deadline_s is not None
    assert 25 < request.deadline_s < 31
    wire = request.sampling.to_wire()
    assert wire | {"logprobs": 0, "prompt_logprobs": 0} == {
        "max_tokens": 3, "min_tokens": 1, "temperature": 0.5, "top_k": 4, "top_p": 0.9,
        "min_p": 0.1, "repetition_penalty": 1.2, "presence_penalty": 0.3,
        "frequency_penalty": 0.4, "seed": 5, "stop": ("x",), "stop_token_ids": (7,),
        "ignore_eos": True, "logprobs": 0, "prompt_logprobs": 0,
    }  # fmt: skip


async def test_leaving_a_stream_cancels_it(
    client: AsyncMotleyClient, backend: FakeBackend, eventually: Eventually
) -> None:
    backend.hang_after = 2
    async with aclosing(client.generate("ab")) as chunks:
        assert (await anext(chunks)).text == "H"

    await eventually(lambda: len(backend.closed) == 1)


async def test_abort_from_another_task(
    client: AsyncMotleyClient, backend: FakeBackend, eventually: Eventually
) -> None:
    backend.hang_after = 2
    running = asyncio.create_task(client.complete("ab", request_id="mine"))
    await eventually(lambda: len(backend.requests) == 1)
    await client.abort("mine")
    answer = await running

    assert (answer.text, answer.choices[0].finish_reason) == ("Hi", "abort")


async def test_model_plan_and_readiness_are_typed(
    client: AsyncMotleyClient, backend: FakeBackend
) -> None:
    info, plan = await client.model_info(), await client.plan()

    assert (info.name, info.vocab_size, info.eos_token_ids) == ("org/tiny-model", 257, (256,))
    assert plan.plan["predicted_s"] == 0.5
    assert (plan.stages[0].device, plan.stages[0].busy_s, plan.epoch) == ("gpu0", 1.5, 3)
    assert await client.ready()
    backend.is_ready = False
    assert not await client.ready()
    assert (await client.plan()).reason == "stage 1 loads its weights"


@pytest.mark.parametrize(
    ("refusal", "kind", "retry_after_s"),
    [
        (BackendOverloaded("257 wait", 2.5), Overloaded, 2.5),
        (Unavailable("loading", 4), Unreachable, 4.0),
        (ZeroDivisionError("x"), ServerFailed, None),
    ],
)
async def test_refusals_have_their_own_type(
    client: AsyncMotleyClient,
    backend: FakeBackend,
    refusal: Exception,
    kind: type[MotleyError],
    retry_after_s: float | None,
) -> None:
    backend.refusal = refusal
    with pytest.raises(kind) as caught:
        await client.complete("ab")

    assert type(caught.value) is kind
    assert getattr(caught.value, "retry_after_s", None) == retry_after_s


async def test_client_errors_name_what_to_change(
    client: AsyncMotleyClient, backend: FakeBackend, gateway: GatewayHandle
) -> None:
    with pytest.raises(InvalidRequest, match="between 0 and 100") as invalid:
        await client.complete("ab", temperature=-1)
    assert invalid.value.param == "temperature"
    with pytest.raises(InvalidRequest, match="cannot be encoded"):
        await client.complete("ab", max_tokens=2**40)
    with pytest.raises(InvalidRequest, match="need a prompt of Messages"):
        await client.complete("ab", template_variables={"x": 1})
    with pytest.raises(InvalidRequest, match="0 tokens"):
        await client.complete([])
    with pytest.raises(InvalidRequest, match="larger than max"):
        await client.complete("x" * 70_000)
    with pytest.raises(NotFound):
        await client.abort("ghost")
    async with AsyncMotleyClient(gateway.grpc_target, "wrong-token") as stranger:
        with pytest.raises(Unauthenticated):
            await stranger.ready()
    backend.hang_after = 0
    with pytest.raises(DeadlineExceeded):
        await client.complete("ab", timeout_s=0.2)


async def test_nobody_listening_is_unreachable(token: str) -> None:
    async with AsyncMotleyClient("127.0.0.1:1", token) as client:
        with pytest.raises(Unreachable) as caught:
            await client.ready(timeout_s=5)

    assert caught.value.retry_after_s is None


async def test_the_blocking_client_does_the_same(
    gateway: GatewayHandle, backend: FakeBackend, token: str, eventually: Eventually
) -> None:
    def work() -> None:
        with MotleyClient(gateway.grpc_target, token) as client:
            assert client.ready()
            assert client.model_info().name == "org/tiny-model"
            assert client.plan().epoch == 3
            assert client.complete("ab").text == "Hi there"
            assert client.chat([Message("user", "x")], max_tokens=2).text == "Hi"
            assert "".join(chunk.text for chunk in client.generate("ab")) == "Hi there"
            with pytest.raises(InvalidRequest) as invalid:
                client.complete("ab", top_p=0)
            assert invalid.value.param == "top_p"
            with pytest.raises(NotFound):
                client.abort("ghost")
            backend.hang_after = 2
            with closing(client.generate("ab", request_id="left")) as chunks:
                assert next(chunks).text == "H"
            with pytest.raises(DeadlineExceeded):
                client.complete("ab", timeout_s=0.2)
        with (
            MotleyClient(gateway.grpc_target, "wrong-token") as client,
            pytest.raises(Unauthenticated),
        ):
            client.ready()

    await asyncio.to_thread(work)
    await eventually(lambda: "left" in backend.closed)


async def test_a_stream_that_broke_off_is_not_an_answer() -> None:
    chunk = Chunk(request_id="a", index=0, text="x", token_ids=(1,))

    with pytest.raises(ServerFailed, match="before its last message"):
        join([chunk])
