"""10,000 damaged messages: nothing crashes, nothing is answered as our own fault, nothing is kept.

Most go to what parses a message (`PARSED`), the others over real sockets: to a lane's inbox, and
to the gateway in both its protocols. The seeds are fixed; a failure is repeated by its number.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import msgpack
import pytest
import torch
from mutations import damaged_bytes, damaged_value, each_damaged, resident_bytes
from plain_adapters import write_adapter
from tokenizers import Tokenizer

from actors import wire
from actors.decode import DecodeWorker, LaneSpec
from actors.engine.adapter import Adapter, AdapterError
from actors.engine.batch import Draw, Rows, StepBatch, StepResult
from actors.engine.batching import LaneLimits
from actors.engine.frames import decode_tensor, encode_tensor
from actors.engine.lane import LaneCore
from actors.engine.packed import unpack
from actors.engine.requests import Request, RequestOutput, SamplingParams, TokenLogprob
from cluster.gateway.access import current_caller
from cluster.heard import take_message
from protos import motley_pb2 as pb

if TYPE_CHECKING:
    from cluster.gateway.server import GatewayHandle
    from tests.unit.conftest import FakeBackend

COUNTS = {
    "step": 2000,
    "tensor": 1000,
    "request": 1500,
    "heard": 1500,
    "adapter": 1000,
    "result": 1000,
    "inbox": 700,
    "http body": 500,
    "http bytes": 300,
    "grpc": 500,
}
MOST_GROWTH_BYTES = 64 * 2**20
REQUEST = Request(
    id="r",
    prompt=(72, 105),
    sampling=SamplingParams(max_tokens=3, stop=("x",), stop_token_ids=(5,), logprobs=1),
    n=2,
    deadline_s=5.0,
)


def test_there_are_ten_thousand() -> None:
    assert sum(COUNTS.values()) == 10_000


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Let no test keep memory."""
    before_bytes = resident_bytes()
    yield
    assert resident_bytes() - before_bytes < MOST_GROWTH_BYTES


# --- parsers ----------------------------------------------------------------------------------

STEP = StepBatch(
    0, 7, 1, [5, 6, 7, 8], [Rows(0, 3, [1]), Rows(4, 1, [0, 2])], copies=[(1, 2)], drawn=[0, 1],
    draws=[Draw(7, 3, 0.5, 4, 0.9, logprobs=2), Draw(9, 5, history=(1, 2), num_prompt=1)],
    prompt_logprobs=[(0, 1)], targets=[[6, 7]],
)  # fmt: skip
RESULT = StepResult([6], [TokenLogprob(6, -0.5, ((7, -1.0),))], [[TokenLogprob(6, -1.5)]])
OUTPUT = RequestOutput(
    id="r", tokens=(1, 2), text="ab", logprobs=(TokenLogprob(1, -0.5, ((2, -1.0),)),),
    prompt_logprobs=(TokenLogprob(1, None),), finish_reason="stop", stop_reason="x",
)  # fmt: skip
STAGE_REPORT = {
    "stage": "gpu0", "active": True, "loaded_fraction": 1.0, "busy_s": 0.5, "steps": 3,
    "late_s": 0.0, "link_bytes": 640,
}  # fmt: skip
EXPERTS_REPORT = {
    "experts": "gpu0", "versions": [3], "busy_s": 0.5, "predicted_s": 0.4, "calls": 7,
    "late_s": 0.0, "guests": 2, "link_bytes": 640,
}  # fmt: skip
LANE_REPORT = {
    "lane": 0, "link_bytes": 1, "adapter_switch_s": 0.0, "running": 1, "waiting": 0,
    "blocks_in_use": 2, "num_blocks": 8, "preemptions": 0, "prefix_hit_tokens": 0, "steps": 4,
    "step_s": 0.1, "stage_s": 0.1, "adapter_version": 0,
}  # fmt: skip


def packed(name: str, values: list[Any]) -> list[bytes]:
    """Return `COUNTS[name]` damaged messages: half of them as bytes, half as values."""
    count = COUNTS[name]
    of_values = [
        msgpack.packb(value) for value in each_damaged(1, values, count // 2, damaged_value)
    ]
    whole = [msgpack.packb(value) for value in values]
    of_bytes = each_damaged(2, whole, count - count // 2, damaged_bytes)
    return of_values + of_bytes


def refused(parse: Callable[[Any], object], messages: list[Any], *errors: type[Exception]) -> int:
    """Parse each; returns how many were refused, which is all that may happen besides success."""
    count = 0
    for number, message in enumerate(messages):
        try:
            parse(message)
        except errors:
            count += 1
        except BaseException as error:
            raise AssertionError(f"message {number} raised {error!r}: {message[:200]!r}") from error
    return count


def test_steps() -> None:
    messages = packed("step", [msgpack.unpackb(STEP.encode())])
    assert len(messages) == COUNTS["step"]

    def parse(message: bytes) -> None:
        batch = StepBatch.decode(message)
        # What was accepted can be counted and sent on.
        assert batch.num_head_rows >= 0
        assert batch.context_tokens >= 0
        assert StepBatch.decode(batch.encode()) == batch

    assert 0 < COUNTS["step"] - refused(parse, messages, ValueError) < COUNTS["step"] // 2


def test_tensors() -> None:
    description, data = encode_tensor(torch.arange(12, dtype=torch.float32).view(3, 4))
    messages = packed("tensor", [msgpack.unpackb(description)])
    assert len(messages) == COUNTS["tensor"]

    def parse(message: bytes) -> None:
        assert decode_tensor(message, data).nbytes == data.nbytes

    assert refused(parse, messages, ValueError) > 0


def test_requests() -> None:
    messages = packed("request", [REQUEST.to_wire()])
    assert len(messages) == COUNTS["request"]

    def parse(message: bytes) -> None:
        # Whatever a lane accepts it can run to its end.
        run(Request.from_wire(unpack(message)))

    number = refused(parse, messages, ValueError, TypeError, AttributeError, LookupError)
    assert COUNTS["request"] - number > 0


def test_what_the_gateway_hears() -> None:
    values = [[0, [OUTPUT.to_wire()]], STAGE_REPORT, LANE_REPORT, EXPERTS_REPORT]
    kinds = [wire.OUTPUTS] + [wire.REPORT] * 3
    messages = packed("heard", values)
    assert len(messages) == COUNTS["heard"]
    heard = [[kinds[number % 4], message] for number, message in enumerate(messages)]

    assert 0 < refused(take_message, heard, ValueError) < len(messages)


def test_adapters(tmp_path: Path) -> None:
    whole = Adapter.read(write_adapter(tmp_path / "a")).encode()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def framed(value: Any) -> bytes:
        text = json.dumps(value, default=str).encode()
        return len(text).to_bytes(8, "little") + text + data

    count = COUNTS["adapter"]
    messages = [framed(each) for each in each_damaged(3, [header], count // 2, damaged_value)]
    messages += each_damaged(4, [whole[: 8 + length + 64]], count - len(messages), damaged_bytes)
    assert len(messages) == count

    assert refused(Adapter.decode, messages, AdapterError) > count // 2


# --- a lane -----------------------------------------------------------------------------------

LIMITS = LaneLimits(
    num_blocks=64, block_tokens=4, max_running=8, max_step_tokens=32, max_model_tokens=128,
    max_waiting=64, eos_token_ids=(256,),
)  # fmt: skip


def answer_of(batch: StepBatch) -> StepResult:
    return StepResult(
        [65] * len(batch.drawn),
        [TokenLogprob(65, -1.0)] * len(batch.drawn),
        [[TokenLogprob(t, -2.0) for t in targets] for targets in batch.targets],
    )


_TOKENIZER: list[Tokenizer] = []


@pytest.fixture(autouse=True)
def byte_level(raw_tokenizer: Tokenizer) -> None:
    _TOKENIZER[:] = [raw_tokenizer]


def run(request: Request) -> None:
    """Run a request on a lane of its own until it has ended."""
    core = LaneCore(LIMITS, _TOKENIZER[0])
    outputs = core.add(request, 0.0)
    for _ in range(1000):
        step = core.next_step(0.0)
        if step is None:
            break
        StepBatch.decode(step.batch.encode())
        core.accept_result(step.batch.step, answer_of(step.batch), now_s=0.0, stage_s=0.0)
        outputs += core.render()
    check_idle(core)
    for output in outputs:
        RequestOutput.from_wire(unpack(msgpack.packb(output.to_wire())))


def check_idle(core: LaneCore) -> None:
    counters = core.counters()
    assert (counters.running, counters.waiting, counters.blocks_in_use) == (0, 0, 0)
    assert core.step_in_flight is None
    assert not core._text
    assert not core._deadlines
    assert not core._scored


def test_results() -> None:
    messages = packed("result", [RESULT.to_wire()])
    assert len(messages) == COUNTS["result"]
    core = LaneCore(LIMITS, _TOKENIZER[0])
    accepted = 0
    for number, message in enumerate(messages):
        how = SamplingParams(max_tokens=2, logprobs=1, prompt_logprobs=1)
        core.add(Request(id=str(number), prompt=(1, 6), sampling=how), 0.0)
        step = core.next_step(0.0)
        assert step is not None

        def take(each: bytes, step_id: int = step.batch.step) -> None:
            result = StepResult.from_wire(unpack(each))
            core.accept_result(step_id, result, now_s=0.0, stage_s=0.0)

        accepted += 1 - refused(take, [message], ValueError, TypeError)
        # Refused or not, the lane goes on with the answer that was due.
        core.accept_result(step.batch.step, answer_of(step.batch), now_s=0.0, stage_s=0.0)
        core.render()
        core.abort(str(number))
        assert core.counters().blocks_in_use == 0
        core.next_step(0.0)
        core.fail_all("over")
    check_idle(core)
    assert 0 < accepted < len(messages)


def test_a_lanes_inbox(byte_level: None) -> None:
    values = [REQUEST.to_wire(), "r", [0, RESULT.to_wire()], [0, "stage 1 is lost"], 3, "lost"]
    kinds = [wire.REQUEST, wire.ABORT, wire.RESULT, wire.REFUSED, wire.ADAPTER, wire.FAIL]
    messages = packed("inbox", values)
    assert len(messages) == COUNTS["inbox"]
    keys = wire.WireKeys.make()
    spec = LaneSpec(index=0, limits=LIMITS, step_timeout_s=60.0)
    with (
        closing(wire.Inbox("gateway", keys)) as gateway,
        closing(wire.Inbox("stage 0", keys)) as stage,
    ):
        worker = DecodeWorker(spec, _TOKENIZER[0].to_str(), keys, gateway.address)
        worker._first_stage = wire.Outbox(stage.address, keys)
        with closing(wire.Outbox(worker.ready(), keys)) as sender:
            for number, message in enumerate(messages):
                # Whole, cut short, or with parts too many.
                kind = kinds[number % (len(messages) // 2) % len(kinds)]
                parts = [kind, message, b"\x90"][: 1 + number % 8]
                sender.send(parts + [b"x"] * (2000 if number % 97 == 96 else 0))
                worker._take_turn()
            sender.send([wire.FAIL, msgpack.packb("over")])
            sender.send([wire.REQUEST, msgpack.packb(REQUEST.to_wire() | {"id": "last"})])
            while not worker._core._scheduler.live("last"):
                worker._take_turn()
            sender.send([wire.FAIL, msgpack.packb("over")])
            while worker._core._scheduler.live("last"):
                worker._take_turn()
        check_idle(worker._core)
        heard = 0
        while (told := gateway.receive(0.2)) is not None:
            take_message(told)
            heard += 1
        worker.stop()
    assert heard > 0


# --- the gateway ------------------------------------------------------------------------------

BODIES: list[tuple[str, dict[str, Any]]] = [
    (
        "/v1/completions",
        {"model": "org/tiny-model", "prompt": ["ab", "cd"], "n": 2, "max_tokens": 2, "stop": ["x"],
         "logprobs": 1, "echo": True, "seed": 5, "stop_token_ids": [1], "temperature": 0.5},
    ),
    (
        "/v1/completions",
        {"prompt": [[1, 2], [3]], "max_tokens": 2, "stream": True,
         "stream_options": {"include_usage": True}},
    ),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x"},
                      {"role": "assistant", "content": [{"type": "text", "text": "y"}]}],
         "max_completion_tokens": 2, "logprobs": True, "top_logprobs": 1,
         "chat_template_kwargs": {"enable_thinking": True}},
    ),
]  # fmt: skip
RPCS: list[tuple[str, bytes]] = [
    (
        "/motley.v1.Motley/Generate",
        pb.GenerateRequest(
            text="ab", n=2, request_id="r",
            sampling=pb.SamplingOptions(max_tokens=2, temperature=0.5, stop=["x"], logprobs=1),
        ).SerializeToString(),
    ),
    (
        "/motley.v1.Motley/Generate",
        pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[1, 2]), sampling=pb.SamplingOptions(max_tokens=2)
        ).SerializeToString(),
    ),
    (
        "/motley.v1.Motley/Generate",
        pb.GenerateRequest(
            chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="x")]),
            sampling=pb.SamplingOptions(max_tokens=2, prompt_logprobs=1),
        ).SerializeToString(),
    ),
    ("/motley.v1.Motley/Abort", pb.AbortRequest(request_id="nobody").SerializeToString()),
    ("/motley.v1.Motley/GetPlan", b"\x0a\x01x"),
    ("/grpc.health.v1.Health/Check", b"\x0a\x00"),
    ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", b"\x3a\x01*"),
]  # fmt: skip
AT_ONCE = 16


class Served:
    """What a gateway holds for its clients, before and after."""

    def __init__(self, gateway: GatewayHandle, backend: FakeBackend) -> None:
        self._gateway = gateway
        self._backend = backend
        self._tasks = len(asyncio.all_tasks())

    def is_over(self) -> bool:
        state = self._gateway._http_server.server_state
        return (
            not self._gateway.service._in_flight
            and not state.tasks
            and not state.connections
            and len(self._backend.closed) == len(self._backend.requests)
            and len(asyncio.all_tasks()) <= self._tasks
        )


async def in_groups(calls: list[Any]) -> list[Any]:
    done: list[Any] = []
    for start in range(0, len(calls), AT_ONCE):
        done += await asyncio.gather(*calls[start : start + AT_ONCE])
    return done


@pytest.mark.asyncio(loop_scope="module")
async def test_http_bodies(
    gateway: GatewayHandle,
    backend: FakeBackend,
    eventually: Any,
    token: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    count = COUNTS["http body"]
    served = Served(gateway, backend)
    values = [body for _, body in BODIES]
    texts = [
        json.dumps(each, default=str).encode()
        for each in each_damaged(5, values, count // 2, damaged_value)
    ]
    whole = [json.dumps(body).encode() for body in values]
    texts += each_damaged(6, whole, count - len(texts), damaged_bytes)
    assert len(texts) == count
    async with httpx.AsyncClient(
        base_url=gateway.http_url, headers={"Authorization": f"Bearer {token}"}
    ) as http:
        answers = await in_groups(
            [http.post(BODIES[n % len(BODIES)][0], content=text) for n, text in enumerate(texts)]
        )

    codes = [answer.status_code for answer in answers]
    assert set(codes) <= {200, 400, 404, 413, 422}, sorted(set(codes))
    assert codes.count(200) < count
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == []
    await eventually(served.is_over)


@pytest.mark.asyncio(loop_scope="module")
async def test_http_bytes(
    gateway: GatewayHandle,
    backend: FakeBackend,
    eventually: Any,
    token: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    served = Served(gateway, backend)
    body = b'{"prompt": "ab", "max_tokens": 2}'
    whole = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    ).encode() + body
    chunked = (
        f"POST /v1/adapter HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\nGET /health HTTP/1.1\r\n\r\n"
    ).encode()

    async def send(data: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port)
        try:
            writer.write(data)
            writer.write_eof()
            async with asyncio.timeout(20):
                return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()

    messages = each_damaged(7, [whole, chunked], COUNTS["http bytes"], damaged_bytes)
    answers = await in_groups([send(message) for message in messages])

    assert len(answers) == COUNTS["http bytes"]
    starts = {answer[:12] for answer in answers if answer}
    assert {int(start[9:]) // 100 for start in starts} <= {2, 4}, starts
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == []
    await eventually(served.is_over)


@pytest.mark.asyncio(loop_scope="module")
async def test_grpc_messages(
    gateway: GatewayHandle,
    backend: FakeBackend,
    eventually: Any,
    metadata: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    served = Served(gateway, backend)
    messages = each_damaged(8, [data for _, data in RPCS], COUNTS["grpc"], damaged_bytes)
    assert len(messages) == COUNTS["grpc"]
    async with grpc.aio.insecure_channel(gateway.grpc_target) as channel:

        async def send(path: str, message: bytes) -> Any:
            call = channel.stream_stream(path)(iter([message]), metadata=metadata, timeout=20)
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for _ in call:
                    pass
            return await call.code()

        codes = await in_groups(
            [send(RPCS[n % len(RPCS)][0], message) for n, message in enumerate(messages)]
        )

    expected = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    assert set(codes) <= expected, set(codes)
    assert codes.count(grpc.StatusCode.INVALID_ARGUMENT) > 0
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == []
    await eventually(served.is_over)
    assert current_caller().name == "owner"
