"""HTTP routes over a real socket: bytes on the wire, refusals, limits and disconnects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from actors.engine.requests import RequestError
from cluster.backend import Overloaded, Unavailable

if TYPE_CHECKING:
    from cluster.gateway.server import GatewayHandle
    from tests.unit.conftest import FakeBackend, GatewayFactory

pytestmark = pytest.mark.asyncio(loop_scope="module")

Eventually = Callable[[Callable[[], bool]], Awaitable[None]]

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "x"}]


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "org/tiny-model", "prompt": "ab"} | fields


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "org/tiny-model", "messages": USER} | fields


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object; its shape is OpenAI's in every answer."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    error: dict[str, Any] = body["error"]
    return error


async def test_a_streamed_completion_byte_for_byte(
    http: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.reply = "é\n"
    response = await http.post(COMPLETIONS, json=completion(stream=True, max_tokens=3))

    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    answer_id = backend.requests[0].id
    created = json.loads(response.text.partition("\n")[0].removeprefix("data: "))["created"]
    head = (
        f'data: {{"id":"{answer_id}","object":"text_completion","created":{created},'
        '"model":"org/tiny-model","choices":[{"index":0,'
    )
    assert response.content.decode() == (
        f'{head}"text":"é","logprobs":null,"finish_reason":null,"stop_reason":null}}]}}\n\n'
        f'{head}"text":"\\n","logprobs":null,"finish_reason":"length","stop_reason":null}}],'
        '"usage":{"prompt_tokens":2,"completion_tokens":3,"total_tokens":5,'
        '"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
        "data: [DONE]\n\n"
    )


async def test_a_streamed_chat_byte_for_byte(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    backend.reply = "Hi"
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = await http.post(CHAT, json=chat(max_tokens=2, **options))

    answer_id = backend.requests[0].id
    created = json.loads(response.text.partition("\n")[0].removeprefix("data: "))["created"]
    head = (
        f'data: {{"id":"{answer_id}","object":"chat.completion.chunk","created":{created},'
        '"model":"org/tiny-model","choices":['
    )
    rest = '"logprobs":null,"finish_reason":null}],"usage":null}\n\n'
    assert response.content.decode() == (
        f'{head}{{"index":0,"delta":{{"role":"assistant","content":""}},{rest}'
        f'{head}{{"index":0,"delta":{{"content":"H"}},{rest}'
        f'{head}{{"index":0,"delta":{{"content":"i"}},{rest}'
        f'{head}{{"index":0,"delta":{{}},"logprobs":null,"finish_reason":"length"}}],"usage":null}}'
        f'\n\n{head}],"usage":{{"prompt_tokens":6,"completion_tokens":2,"total_tokens":8,'
        '"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
        "data: [DONE]\n\n"
    )


BAD_VALUES: list[tuple[str, dict[str, Any], int, str, str]] = [
    (COMPLETIONS, completion(temperature=-1), 400, "temperature", "between 0 and 100"),
    (COMPLETIONS, completion(top_p=0), 400, "top_p", "temperature=0 for greedy"),
    (COMPLETIONS, completion(n=0), 400, "n", "between 1 and 32"),
    (COMPLETIONS, completion(n=33), 400, "n", "between 1 and 32"),
    (COMPLETIONS, completion(max_tokens=-1), 400, "max_tokens", "between 0"),
    (COMPLETIONS, completion(max_tokens=2**40), 400, "max_tokens", "the model takes 64"),
    (COMPLETIONS, completion(prompt="x" * 64), 400, "prompt", "has 64 tokens"),
    (COMPLETIONS, completion(prompt=""), 400, "prompt", "0 tokens"),
    (COMPLETIONS, completion(prompt=[257]), 400, "prompt", "ids 0 to 256"),
    (COMPLETIONS, completion(prompt=[-1]), 400, "prompt", "token id -1"),
    (COMPLETIONS, completion(prompt=["a"] * 257), 400, "prompt", "at most 256"),
    (COMPLETIONS, completion(logprobs=21), 400, "logprobs", "between 0 and 20"),
    (COMPLETIONS, completion(best_of=3, n=2), 400, "best_of", "must equal n (2)"),
    (COMPLETIONS, completion(suffix="end"), 400, "suffix", "not supported"),
    (COMPLETIONS, completion(logit_bias={"5": 1.0}), 400, "logit_bias", "not supported"),
    (COMPLETIONS, completion(stop=["s"] * 17), 400, "stop", "at most 16"),
    (COMPLETIONS, completion(stop=""), 400, "stop", "empty"),
    (COMPLETIONS, completion(seed=-1), 400, "seed", "between 0"),
    (COMPLETIONS, completion(seed=2**63), 400, "seed", "between 0"),
    (COMPLETIONS, completion(stop_token_ids=[9999]), 400, "stop_token_ids", "token id 9999"),
    (COMPLETIONS, completion(stream_options={}), 400, "stream_options", "stream: true"),
    (COMPLETIONS, completion(model="nope"), 404, "model", "`nope` does not exist"),
    (COMPLETIONS, {"model": "org/tiny-model"}, 422, "prompt", "Field required"),
    (COMPLETIONS, completion(prompt=[]), 422, "prompt", "not empty"),
    (COMPLETIONS, completion(prompt=[1, "a"]), 422, "prompt", "list of token ids"),
    (COMPLETIONS, completion(prompt=[[1], []]), 422, "prompt", "list of token ids"),
    (COMPLETIONS, completion(prompt=[True]), 422, "prompt", "list of token ids"),
    (COMPLETIONS, completion(max_tokens="7"), 422, "max_tokens", "valid integer"),
    (COMPLETIONS, completion(max_tokens=7.5), 422, "max_tokens", "valid integer"),
    (COMPLETIONS, completion(temperature=True), 422, "temperature", "valid number"),
    (COMPLETIONS, completion(stream="yes"), 422, "stream", "valid boolean"),
    (CHAT, chat(messages=[]), 400, "messages", "send at least 1"),
    (CHAT, chat(messages=[{"role": "robot", "content": ""}]), 400, "messages", "'robot'"),
    (CHAT, chat(messages=[{"role": "user"}]), 400, "messages", "content is missing"),
    (CHAT, chat(messages=[{"role": "assistant", "content": "x"}]), 400, "messages", "user first"),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
        400,
        "messages",
        "'image_url'; only text parts",
    ),
    (
        CHAT,
        chat(messages=[{"role": "assistant", "content": "x", "tool_calls": [{}]}]),
        400,
        "messages",
        "tools are not supported",
    ),
    (CHAT, chat(tools=[{"type": "function"}]), 400, "tools", "not supported"),
    (CHAT, chat(functions=[{}]), 400, "functions", "not supported"),
    (CHAT, chat(audio={"voice": "x"}), 400, "audio", "not supported"),
    (CHAT, chat(top_logprobs=3), 400, "top_logprobs", "needs logprobs: true"),
    (CHAT, chat(logprobs=True, top_logprobs=21), 400, "logprobs", "between 0 and 20"),
    (CHAT, chat(max_tokens=0), 400, "max_tokens", "at least 1"),
    (CHAT, chat(max_tokens=1, max_completion_tokens=2), 400, "max_completion_tokens", "differ"),
    (
        CHAT,
        chat(response_format={"type": "json_object"}),
        400,
        "response_format",
        "'json_object' is not supported",
    ),
    (
        CHAT,
        chat(chat_template_kwargs={"chat_template": "{{ 1 }}"}),
        400,
        "chat_template_kwargs",
        "may not set chat_template",
    ),
    (CHAT, chat(messages="hello"), 422, "messages", "valid array"),
    (CHAT, chat(messages=[{"content": "x"}]), 422, "messages.0.role", "Field required"),
    (CHAT, chat(logprobs=3), 422, "logprobs", "valid boolean"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "message"), BAD_VALUES)
async def test_a_bad_value_is_named(
    http: httpx.AsyncClient,
    backend: FakeBackend,
    path: str,
    body: dict[str, Any],
    status: int,
    param: str,
    message: str,
) -> None:
    response = await http.post(path, json=body)

    error = error_of(response)
    assert response.status_code == status
    assert error["param"] == param
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert backend.requests == []


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "is not JSON"),
        (b'{"prompt": "a",}', 400, "line 1 column 16"),
        (b'{"prompt": "a"', 400, "is not JSON"),
        (b'{"prompt": "\xff"}', 400, "is not JSON"),
        (b'{"prompt": "\\ud800"}', 400, "is not JSON"),
        (b"[" * 5000, 400, "is not JSON"),
        (b"[1]", 422, "should be an object"),
        (b"null", 422, "should be an object"),
        (b'{"prompt": "a", "temperature": NaN}', 400, "temperature (nan)"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", 400, "out of range"),
    ],
)
async def test_a_body_that_is_no_request_says_where(
    http: httpx.AsyncClient, body: bytes, status: int, message: str
) -> None:
    response = await http.post(COMPLETIONS, content=body)

    assert response.status_code == status, response.text
    assert message in error_of(response)["message"]


async def test_harmless_fields_of_other_servers_are_taken(
    http: httpx.AsyncClient, backend: FakeBackend
) -> None:
    body = chat(
        tools=[], logit_bias={}, response_format={"type": "text"}, user="u", store=False, echo=True
    )

    assert (await http.post(CHAT, json=body)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "code", "retry_after"),
    [
        (Overloaded("257 wait; the limit is 256", 2.5), 429, "overloaded", "3"),
        (Unavailable("stages load: 40 %", 0.1), 503, "unavailable", "1"),
        (RequestError("9 blocks are needed; 8 exist", "prompt"), 400, None, None),
        (ZeroDivisionError("a secret detail"), 500, None, None),
    ],
)
async def test_what_the_backend_refuses_keeps_its_status(
    http: httpx.AsyncClient,
    backend: FakeBackend,
    stream: bool,
    refusal: Exception,
    status: int,
    code: str | None,
    retry_after: str | None,
) -> None:
    backend.refusal = refusal
    response = await http.post(COMPLETIONS, json=completion(stream=stream))

    error = error_of(response)
    assert response.status_code == status
    assert error["code"] == code
    assert response.headers.get("retry-after") == retry_after
    assert "secret" not in response.text


@pytest.mark.parametrize(
    ("knob", "message"),
    [("fail_after", "stage 1 was lost"), ("crash_after", "its log says why")],
)
async def test_a_failure_in_a_stream_is_its_last_event(
    http: httpx.AsyncClient, backend: FakeBackend, knob: str, message: str
) -> None:
    setattr(backend, knob, 2)
    response = await http.post(COMPLETIONS, json=completion(stream=True))

    *before, last, end = response.text.split("\n\n")
    assert (response.status_code, end, len(before)) == (200, "", 2)
    assert message in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert "[DONE]" not in response.text
    assert "secret" not in response.text


@pytest.mark.parametrize("knob", ["fail_after", "crash_after"])
async def test_a_failure_of_a_whole_answer_is_a_500(
    http: httpx.AsyncClient, backend: FakeBackend, knob: str
) -> None:
    setattr(backend, knob, 2)
    response = await http.post(COMPLETIONS, json=completion())

    assert response.status_code == 500
    assert error_of(response)["type"] == "server_error"
    assert "secret" not in response.text


async def test_one_refused_prompt_closes_the_others(
    http: httpx.AsyncClient, backend: FakeBackend, eventually: Eventually
) -> None:
    backend.fail_after = 1
    response = await http.post(COMPLETIONS, json=completion(prompt=["a", "b", "c"]))

    assert response.status_code == 500
    await eventually(lambda: len(backend.closed) == len(backend.requests))


async def test_a_declared_body_above_the_limit_is_refused_unread(gateway: GatewayHandle) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 65537\r\n"
        b"Authorization: Bearer correct-horse-battery\r\n\r\n"
    )
    status = await reader.readline()
    writer.close()
    await writer.wait_closed()

    assert b"413" in status


async def test_a_body_that_grows_above_the_limit_is_refused(http: httpx.AsyncClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(17):
            yield b" " * 4096

    response = await http.post(COMPLETIONS, content=chunks())

    assert response.status_code == 413
    assert "larger than 65536 bytes (gateway.max_request_bytes)" in error_of(response)["message"]


async def test_a_body_of_the_limit_is_read(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = json.dumps(completion()).encode()
    response = await http.post(COMPLETIONS, content=body + b" " * (65536 - len(body)))

    assert response.status_code == 200


@pytest.mark.parametrize("hang_after", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_closes_its_request(
    gateway: GatewayHandle,
    backend: FakeBackend,
    eventually: Eventually,
    stream: bool,
    hang_after: int,
) -> None:
    backend.hang_after = hang_after
    body = json.dumps(completion(stream=stream, prompt=["a", "b"])).encode()
    _, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(body)
        + b"Authorization: Bearer correct-horse-battery\r\n\r\n"
        + body
    )
    await eventually(lambda: len(backend.requests) == 2)
    assert backend.closed == []
    writer.close()
    await writer.wait_closed()

    await eventually(lambda: len(backend.closed) == 2)


async def test_health_is_alive_even_when_nothing_is_ready(
    http: httpx.AsyncClient, backend: FakeBackend
) -> None:
    backend.is_ready = False
    response = await http.get("/health")

    assert (response.status_code, response.json()) == (200, {"status": "alive"})


async def test_ready_tells_the_progress(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    assert (await http.get("/ready")).status_code == 200
    backend.is_ready = False
    response = await http.get("/ready")

    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"
    body = response.json()
    assert (body["ready"], body["progress"]) == (False, 0.4)
    assert body["reason"] == "stage 1 loads its weights"
    assert body["stages"][1] == {
        "index": 1,
        "device": "cpu0",
        "active": False,
        "loaded_fraction": 0.4,
    }


async def test_status_and_plan_are_plain_json(
    http: httpx.AsyncClient, backend: FakeBackend
) -> None:
    status = (await http.get("/status")).json()

    assert status["epoch"] == 3
    assert status["stages"][0]["busy_s"] == 1.5
    assert status["link_bytes"] == {"gpu0->cpu0": 640}
    assert (await http.get("/plan")).json() == backend.plan_json()


async def test_metrics_count_what_happened(
    gateway_with: GatewayFactory, backend: FakeBackend, token: str
) -> None:
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        gateway_with() as gateway,
        httpx.AsyncClient(base_url=gateway.http_url, headers=headers) as http,
    ):
        await http.post(COMPLETIONS, json=completion())
        await http.post(COMPLETIONS, json=completion(n=99))
        response = await http.get("/metrics")

    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    assert 'motley_requests_total{outcome="completed"} 1.0' in lines
    assert 'motley_requests_total{outcome="invalid"} 1.0' in lines
    assert "motley_prompt_tokens_total 2.0" in lines
    assert "motley_generated_tokens_total 9.0" in lines
    assert "motley_time_to_first_token_seconds_count 1.0" in lines
    assert "motley_inter_token_latency_seconds_count 8.0" in lines
    assert "motley_ready 1.0" in lines


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/docs", 404), ("GET", COMPLETIONS, 405)],
)
async def test_routes_that_are_not_there_answer_in_shape(
    http: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    response = await http.request(method, path)

    assert response.status_code == status
    assert error_of(response)["type"] == "invalid_request_error"
