"""motley.v1, health and reflection over a real channel."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from actors.engine.requests import RequestError
from cluster.backend import Overloaded, Unavailable
from protos import motley_pb2 as pb
from protos import motley_pb2_grpc

if TYPE_CHECKING:
    from tests.unit.conftest import FakeBackend, GatewayFactory

pytestmark = pytest.mark.asyncio(loop_scope="module")

Eventually = Callable[[Callable[[], bool]], Awaitable[None]]
SERVICE = "motley.v1.Motley"


@pytest.fixture
def stub(channel: Any) -> Any:
    return motley_pb2_grpc.MotleyStub(channel)


@pytest.fixture
def health(channel: Any) -> Any:
    return health_pb2_grpc.HealthStub(channel)


async def collect(call: Any) -> list[pb.GenerateResponse]:
    return [response async for response in call]


async def failure(call: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(call)
    return caught.value


async def test_text_is_continued_and_streamed(
    stub: Any, metadata: Any, backend: FakeBackend
) -> None:
    request = pb.GenerateRequest(text="ab", n=2, sampling=pb.SamplingOptions(max_tokens=3))
    responses = await collect(stub.Generate(request, metadata=metadata))

    texts = ["".join(r.text for r in responses if r.index == i) for i in range(2)]
    assert texts == ["Hi ", "Hi "]
    assert [t for r in responses if r.index == 0 for t in r.token_ids] == list(b"Hi ")
    ends = [r.finish_reason for r in responses if r.finish_reason]
    assert ends == [pb.FINISH_REASON_LENGTH] * 2
    assert [r.HasField("usage") for r in responses] == [False] * 5 + [True]
    assert responses[-1].usage == pb.Usage(
        prompt_tokens=2, completion_tokens=6, cached_prompt_tokens=4
    )
    assert {r.request_id for r in responses} == {backend.requests[0].id}


async def test_absent_fields_take_the_servers_defaults(
    stub: Any, metadata: Any, backend: FakeBackend
) -> None:
    await collect(stub.Generate(pb.GenerateRequest(text="ab"), metadata=metadata))

    [request] = backend.requests
    assert (request.n, request.deadline_s) == (1, None)
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (16, 1.0, 1.0)
    assert (sampling.seed, sampling.logprobs, sampling.stop) == (4242, None, ())


async def test_a_zero_that_was_given_is_not_an_absence(
    stub: Any, metadata: Any, backend: FakeBackend
) -> None:
    options = pb.SamplingOptions(temperature=0, seed=0, logprobs=0, max_tokens=1, stop=["x"])
    await collect(stub.Generate(pb.GenerateRequest(text="ab", sampling=options), metadata=metadata))

    sampling = backend.requests[0].sampling
    assert (sampling.temperature, sampling.seed, sampling.logprobs) == (0.0, 0, 0)
    assert sampling.stop == ("x",)


async def test_token_ids_and_chat_are_prompts_too(
    stub: Any, metadata: Any, backend: FakeBackend
) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="x")])
    chat.template_variables.update({"enable_thinking": True})
    await collect(stub.Generate(pb.GenerateRequest(chat=chat), metadata=metadata))
    ids = pb.TokenIds(ids=[1, 2])
    await collect(stub.Generate(pb.GenerateRequest(token_ids=ids), metadata=metadata))

    first, second = backend.requests
    assert bytes(first.prompt) == b"u:x\na!"
    assert first.sampling.max_tokens == 64 - 6
    assert (second.prompt, second.sampling.max_tokens) == ((1, 2), 16)


async def test_logprobs_carry_text_bytes_and_alternatives(stub: Any, metadata: Any) -> None:
    options = pb.SamplingOptions(max_tokens=1, logprobs=1, prompt_logprobs=0)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[0xC3, 66]), sampling=options)
    [response] = await collect(stub.Generate(request, metadata=metadata))

    assert response.logprobs == [
        pb.TokenLogprob(
            token_id=72,
            text="H",
            token_bytes=b"H",
            logprob=-0.5,
            top=[pb.TokenLogprob(token_id=72, text="H", token_bytes=b"H", logprob=-0.5)],
        )
    ]
    first, second = response.prompt_logprobs
    assert (first.text, first.token_bytes) == ("bytes:\\xc3", b"\xc3")
    assert not first.HasField("logprob")
    assert second.logprob == -1.5


async def test_the_calls_deadline_is_the_requests(
    stub: Any, metadata: Any, backend: FakeBackend, eventually: Eventually
) -> None:
    backend.hang_after = 1
    error = await failure(
        stub.Generate(pb.GenerateRequest(text="ab"), metadata=metadata, timeout=0.3)
    )

    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    deadline_s = backend.requests[0].deadline_s
    assert deadline_s is not None
    assert 0 < deadline_s < 0.5
    await eventually(lambda: len(backend.closed) == 1)


@pytest.mark.parametrize("hang_after", [0, 2])
async def test_a_client_that_leaves_closes_its_request(
    stub: Any, metadata: Any, backend: FakeBackend, eventually: Eventually, hang_after: int
) -> None:
    backend.hang_after = hang_after
    call = stub.Generate(pb.GenerateRequest(text="ab"), metadata=metadata)
    await eventually(lambda: len(backend.requests) == 1)
    if hang_after:
        await call.read()
    call.cancel()

    await eventually(lambda: len(backend.closed) == 1)


async def test_abort_ends_a_request_by_its_id(
    stub: Any, metadata: Any, backend: FakeBackend, eventually: Eventually
) -> None:
    backend.hang_after = 1
    call = stub.Generate(pb.GenerateRequest(text="ab", request_id="mine"), metadata=metadata)
    await eventually(lambda: len(backend.requests) == 1)
    twin = await failure(
        stub.Generate(pb.GenerateRequest(text="ab", request_id="mine"), metadata=metadata)
    )
    await stub.Abort(pb.AbortRequest(request_id="mine"), metadata=metadata)
    responses = await collect(call)

    assert twin.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "already in flight" in twin.details()
    assert responses[-1].finish_reason == pb.FINISH_REASON_ABORT
    assert responses[-1].usage.completion_tokens == 1


BAD: list[tuple[pb.GenerateRequest, grpc.StatusCode, str, str | None]] = [
    (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "set text, token_ids", "prompt"),
    (pb.GenerateRequest(text=""), grpc.StatusCode.INVALID_ARGUMENT, "0 tokens", "prompt"),
    (
        pb.GenerateRequest(text="x", n=0),
        grpc.StatusCode.INVALID_ARGUMENT,
        "between 1 and 32",
        "n",
    ),
    (
        pb.GenerateRequest(text="x", request_id="no blanks"),
        grpc.StatusCode.INVALID_ARGUMENT,
        "1 to 128 of letters",
        "request_id",
    ),
    (
        pb.GenerateRequest(text="x", sampling=pb.SamplingOptions(top_p=0)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "must be above 0",
        "top_p",
    ),
    (
        pb.GenerateRequest(text="x", sampling=pb.SamplingOptions(temperature=float("nan"))),
        grpc.StatusCode.INVALID_ARGUMENT,
        "temperature (nan)",
        "temperature",
    ),
    (
        pb.GenerateRequest(text="x" * 60, sampling=pb.SamplingOptions(max_tokens=5)),
        grpc.StatusCode.INVALID_ARGUMENT,
        "together 65",
        "max_tokens",
    ),
    (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[300])),
        grpc.StatusCode.INVALID_ARGUMENT,
        "ids 0 to 256",
        "prompt",
    ),
    (
        pb.GenerateRequest(chat=pb.Chat()),
        grpc.StatusCode.INVALID_ARGUMENT,
        "messages is empty",
        "messages",
    ),
    (
        pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role="tool")])),
        grpc.StatusCode.INVALID_ARGUMENT,
        "messages[0].role ('tool')",
        "messages",
    ),
    (pb.GenerateRequest(text="x", model="gpt"), grpc.StatusCode.NOT_FOUND, "`gpt`", None),
]


@pytest.mark.parametrize(("request_", "code", "message", "param"), BAD)
async def test_a_bad_request_is_named(
    stub: Any,
    metadata: Any,
    backend: FakeBackend,
    request_: pb.GenerateRequest,
    code: grpc.StatusCode,
    message: str,
    param: str | None,
) -> None:
    error = await failure(stub.Generate(request_, metadata=metadata))

    assert error.code() is code
    assert message in error.details()
    assert dict(error.trailing_metadata()).get("motley-param") == param
    assert backend.requests == []


@pytest.mark.parametrize(
    ("refusal", "code", "message", "retry_after"),
    [
        (Overloaded("257 wait", 2.5), grpc.StatusCode.RESOURCE_EXHAUSTED, "257 wait", "2.500"),
        (Unavailable("loading: 40 %", 9), grpc.StatusCode.UNAVAILABLE, "loading: 40 %", "9.000"),
        (RequestError("9 blocks", "n"), grpc.StatusCode.INVALID_ARGUMENT, "9 blocks", None),
        (ZeroDivisionError("a secret"), grpc.StatusCode.INTERNAL, "its log says why", None),
    ],
)
async def test_what_the_backend_refuses_keeps_its_status(
    stub: Any,
    metadata: Any,
    backend: FakeBackend,
    refusal: Exception,
    code: grpc.StatusCode,
    message: str,
    retry_after: str | None,
) -> None:
    backend.refusal = refusal
    error = await failure(stub.Generate(pb.GenerateRequest(text="ab"), metadata=metadata))

    assert error.code() is code
    assert message in error.details()
    assert "secret" not in error.details()
    assert dict(error.trailing_metadata()).get("retry-after") == retry_after


async def test_a_failure_on_the_way_is_internal_with_its_sentence(
    stub: Any, metadata: Any, backend: FakeBackend
) -> None:
    backend.fail_after = 2
    error = await failure(stub.Generate(pb.GenerateRequest(text="ab"), metadata=metadata))

    assert error.code() is grpc.StatusCode.INTERNAL
    assert error.details() == "stage 1 was lost"


@pytest.mark.parametrize("method", ["Generate", "Abort", "GetModelInfo", "GetPlan"])
async def test_bytes_that_are_no_message_are_an_invalid_argument(
    channel: Any, metadata: Any, method: str
) -> None:
    error = await failure(channel.unary_stream(f"/{SERVICE}/{method}")(b"\xff", metadata=metadata))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "cannot be parsed" in error.details()


async def test_aborting_nothing_is_not_found(stub: Any, metadata: Any) -> None:
    for request_id, code in [
        ("ghost", grpc.StatusCode.NOT_FOUND),
        ("", grpc.StatusCode.INVALID_ARGUMENT),
    ]:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Abort(pb.AbortRequest(request_id=request_id), metadata=metadata)
        assert caught.value.code() is code


async def test_model_info_and_plan(stub: Any, metadata: Any, backend: FakeBackend) -> None:
    info = await stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=metadata)
    plan = await stub.GetPlan(pb.GetPlanRequest(), metadata=metadata)

    assert (info.name, info.max_model_tokens, list(info.eos_token_ids)) == (
        "org/tiny-model",
        64,
        [256],
    )
    assert plan.plan_json == '{"stages": [{"device": "gpu0"}], "predicted_s": 0.5}'
    assert (plan.epoch, plan.ready, plan.progress) == (3, True, 1.0)
    assert [(s.device, s.first_layer, s.end_layer, s.active) for s in plan.stages] == [
        ("gpu0", 0, 3, True),
        ("cpu0", 3, 4, True),
    ]
    assert (plan.stages[0].busy_s, plan.stages[0].link_bytes) == (1.5, 640)


@pytest.mark.parametrize("name", ["", SERVICE])
async def test_health_follows_the_deployment(
    health: Any, metadata: Any, backend: FakeBackend, name: str
) -> None:
    request = health_pb2.HealthCheckRequest(service=name)
    assert (await health.Check(request, metadata=metadata)).status == 1
    backend.is_ready = False
    assert (await health.Check(request, metadata=metadata)).status == 2


async def test_health_of_another_service_is_not_found(health: Any, metadata: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.Check(health_pb2.HealthCheckRequest(service="x"), metadata=metadata)

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_watching_health_tells_each_change(
    health: Any, metadata: Any, backend: FakeBackend
) -> None:
    backend.is_ready = False
    call = health.Watch(health_pb2.HealthCheckRequest(), metadata=metadata)
    unknown = health.Watch(health_pb2.HealthCheckRequest(service="x"), metadata=metadata)

    assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    assert (await call.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    backend.is_ready = True
    assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
    call.cancel()
    unknown.cancel()


async def test_a_health_watcher_does_not_hold_up_a_shutdown(
    gateway_with: GatewayFactory, metadata: Any
) -> None:
    async with (
        gateway_with() as gateway,
        grpc.aio.insecure_channel(gateway.grpc_target) as channel,
    ):
        call = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), metadata=metadata
        )
        await call.read()
        async with asyncio.timeout(2.5):
            await gateway.close(0)
