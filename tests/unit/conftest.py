"""A deployment that is not there, and a real gateway in front of it on loopback ports.

Test modules cannot import from here (tests are no package); they take the fixtures, and name the
types under TYPE_CHECKING.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, NoReturn

import grpc
import httpx
import openai
import pytest
import pytest_asyncio
import ray
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from actors.engine.adapter import Adapter
from actors.engine.requests import Request, RequestError, RequestOutput, TokenLogprob
from cluster.backend import (
    AdapterStatus,
    DeploymentStatus,
    LaneStatus,
    ModelInfo,
    Published,
    StageStatus,
    Steering,
    Unavailable,
)
from cluster.gateway.server import GatewayHandle, open_audit, serve
from cluster.gateway.settings import GatewaySettings
from cluster.gateway.tokenizer import ChatMessages, Tokenizer

TOKEN = "correct-horse-battery"
SEED = 4242
EOS = 256
MODEL = "org/tiny-model"
MAX_MODEL_TOKENS = 64


class FakeBackend:
    """Answers every prompt with `reply`, one byte a token, and remembers what happened."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.reply = "Hi there"
        self.requests: list[Request] = []
        self.closed: list[str] = []
        """Ids whose stream has ended or was closed, in order."""
        self.refusal: Exception | None = None
        self.crash_after: int | None = None
        """Tokens after which generation raises something unforeseen."""
        self.fail_after: int | None = None
        """Tokens after which a choice ends with finish_reason "error"."""
        self.hang_after: int | None = None
        """Tokens after which nothing comes until the request is aborted or closed."""
        self.first_logprob = -0.5
        self.reply_stops_short = False
        """End the stream with no choice finished."""
        self.is_ready = True
        self.published: list[Adapter | None] = []
        self.publish_error: Exception | None = None
        self.controller: dict[str, object] | None = None
        self._aborts: dict[str, asyncio.Event] = {}
        self._released = False

    def release(self) -> None:
        """Let hanging requests go on."""
        self._released = True
        for event in self._aborts.values():
            event.set()

    def model_info(self) -> ModelInfo:
        return ModelInfo(
            name=MODEL,
            architecture="TinyForCausalLM",
            vocab_size=257,
            num_layers=4,
            max_model_tokens=MAX_MODEL_TOKENS,
            eos_token_ids=(EOS,),
            num_parameters=1234,
            dtype="float32",
            created_unix_s=1_700_000_000,
        )

    def plan_json(self) -> dict[str, object]:
        return {"stages": [{"device": "gpu0"}], "predicted_s": 0.5}

    def steering(self) -> Steering:
        raise Unavailable("no controller", 1.0)

    def controller_json(self) -> dict[str, object] | None:
        return self.controller

    async def status(self) -> DeploymentStatus:
        return DeploymentStatus(
            ready=self.is_ready,
            reason="" if self.is_ready else "stage 1 loads its weights",
            progress=1.0 if self.is_ready else 0.4,
            epoch=3,
            stages=(
                StageStatus(
                    index=0, device="gpu0", node="a", first_layer=0, end_layer=3, active=True,
                    loaded_fraction=1.0, busy_s=1.5, steps=7, link_bytes=640,
                ),
                StageStatus(
                    index=1, device="cpu0", node="b", first_layer=3, end_layer=4,
                    active=self.is_ready, loaded_fraction=0.4, late_s=0.25,
                ),
            ),
            lanes=(
                LaneStatus(
                    index=0, running=2, waiting=1, blocks_in_use=5, num_blocks=40, preemptions=3,
                    prefix_hit_tokens=96,
                ),
            ),
            link_bytes={"gpu0->cpu0": 640},
        )  # fmt: skip

    def adapter(self) -> AdapterStatus:
        last = self.published[-1] if self.published else None
        if last is None:
            return AdapterStatus()
        return AdapterStatus(name=last.name, version=len(self.published))

    async def publish(self, adapter: Adapter | None) -> Published:
        if self.publish_error is not None:
            raise self.publish_error
        self.published.append(adapter)
        used = self.adapter()
        return Published(name=used.name, version=used.version, seconds=0.25, pause_s=0.0)

    async def abort(self, request_id: str) -> bool:
        if request_id not in self._aborts:
            return False
        self._aborts[request_id].set()
        return True

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        if self.reply_stops_short:
            return
        aborted = self._aborts[request.id] = asyncio.Event()
        try:
            running = set(range(request.n))
            for position in range(MAX_MODEL_TOKENS):
                for index in sorted(running):
                    output = await self._output(request, index, position, aborted)
                    if output.finish_reason is not None:
                        running.discard(index)
                    yield output
        finally:
            del self._aborts[request.id]
            self.closed.append(request.id)

    async def _output(
        self, request: Request, index: int, position: int, aborted: asyncio.Event
    ) -> RequestOutput:
        """Return what choice `index` does at `position`."""
        tokens = (*self.reply.encode(), EOS)
        end = min(len(tokens), request.sampling.max_tokens)
        if position == self.crash_after:
            raise ZeroDivisionError("a secret detail")
        if position == self.fail_after:
            return RequestOutput(
                id=request.id, index=index, finish_reason="error", error="stage 1 was lost"
            )
        if position == self.hang_after:
            await aborted.wait()
        if aborted.is_set() and not self._released:
            return RequestOutput(id=request.id, index=index, finish_reason="abort")
        await asyncio.sleep(0)
        return self._token(request, index, position, tokens, end)

    def _token(
        self, request: Request, index: int, position: int, tokens: tuple[int, ...], end: int
    ) -> RequestOutput:
        sampling = request.sampling
        token = tokens[position : position + 1] if end else ()
        is_last = position >= end - 1
        is_eos = token == (EOS,)
        prompt_logprobs = None
        if position == 0 and index == 0 and sampling.prompt_logprobs is not None:
            prompt_logprobs = (
                TokenLogprob(request.prompt[0], None),
                *(self._entry(t, i, sampling.prompt_logprobs) for i, t in
                  enumerate(request.prompt[1:], 1)),
            )  # fmt: skip
        return RequestOutput(
            id=request.id,
            index=index,
            tokens=token,
            text=_text(tokens[: position + 1]).removeprefix(_text(tokens[:position]))
            if end
            else "",
            logprobs=()
            if sampling.logprobs is None
            else tuple(self._entry(t, position, sampling.logprobs) for t in token),
            prompt_logprobs=prompt_logprobs,
            finish_reason=("stop" if is_eos else "length") if is_last else None,
            cached_tokens=4 if position == 0 else 0,
        )

    def _entry(self, token: int, position: int, k: int) -> TokenLogprob:
        logprob = self.first_logprob - position
        top = tuple(((token + i) % 256, logprob - i) for i in range(k))
        return TokenLogprob(token, logprob, top)


def _text(tokens: tuple[int, ...]) -> str:
    """The whole characters so far, as a lane sends them: text lags behind its bytes."""
    return bytes(token for token in tokens if token != EOS).decode(errors="ignore")


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Return a tokenizer whose ids 0 to 255 are the bytes, and 256 the end of text."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable}
    vocab.update({chr(256 + rank): byte for rank, byte in enumerate(others)})
    built = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(["<eos>"])
    return built


def _render(messages: ChatMessages, variables: Mapping[str, Any]) -> str:
    if messages[0]["role"] == "assistant":
        raise RequestError("the model's chat template refused the messages: user first", "messages")
    turns = [f"{message['role'][0]}:{message['content']}\n" for message in messages]
    return "".join(turns) + ("a!" if variables.get("enable_thinking") else "a:")


@asynccontextmanager
async def _running(
    backend: FakeBackend, tokenizer: Tokenizer, **settings: Any
) -> AsyncGenerator[GatewayHandle, None]:
    values = {"http_port": 0, "grpc_port": 0, "max_request_bytes": 65536} | settings
    made = GatewaySettings(**values)
    audit = None if made.audit_file is None else open_audit(made, "tiny")
    handle = await serve(backend, tokenizer, made, TOKEN, audit=audit, new_seed=lambda: SEED)
    try:
        yield handle
    finally:
        await handle.close(0)
        if audit is not None:
            audit.close()


GatewayFactory = Callable[..., AbstractAsyncContextManager[GatewayHandle]]


@pytest.fixture(scope="session")
def raw_tokenizer() -> tokenizers.Tokenizer:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tokenizer(raw_tokenizer: tokenizers.Tokenizer) -> Tokenizer:
    return Tokenizer(raw_tokenizer, render_chat=_render, eos_token_ids=(EOS,))


@pytest.fixture(scope="module")
def module_backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def backend(module_backend: FakeBackend) -> Iterator[FakeBackend]:
    """The backend of the module's gateway, as new."""
    module_backend.reset()
    yield module_backend
    module_backend.reset()


@pytest.fixture
def gateway_with(backend: FakeBackend, tokenizer: Tokenizer) -> GatewayFactory:
    """Start another gateway, with settings of its own."""

    def start(tokenizer: Tokenizer = tokenizer, **settings: Any) -> Any:
        return _running(backend, tokenizer, **settings)

    return start


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(
    module_backend: FakeBackend, tokenizer: Tokenizer
) -> AsyncGenerator[GatewayHandle, None]:
    async with _running(module_backend, tokenizer) as handle:
        yield handle


@pytest_asyncio.fixture(loop_scope="module")
async def http(
    gateway: GatewayHandle, backend: FakeBackend
) -> AsyncGenerator[httpx.AsyncClient, None]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(base_url=gateway.http_url, headers=headers) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def openai_client(
    gateway: GatewayHandle, backend: FakeBackend
) -> AsyncGenerator[openai.AsyncOpenAI, None]:
    async with openai.AsyncOpenAI(
        base_url=gateway.openai_url, api_key=TOKEN, max_retries=0
    ) as client:
        yield client


@pytest_asyncio.fixture(loop_scope="module")
async def channel(gateway: GatewayHandle, backend: FakeBackend) -> AsyncGenerator[Any, None]:
    async with grpc.aio.insecure_channel(gateway.grpc_target) as channel:
        yield channel


@pytest.fixture
def token() -> str:
    return TOKEN


@pytest.fixture
def metadata() -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {TOKEN}"),)


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], Any]:
    """Wait until a condition holds; fail after 3 s."""

    async def wait(holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(3):
            while not holds():  # noqa: ASYNC110  # the fake has no event for each fact
                await asyncio.sleep(0.005)

    return wait


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `ray.init` fail, so that a test which starts Ray is moved to tests/local_ray."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a unit test called ray.init; move it to tests/local_ray")

    monkeypatch.setattr(ray, "init", refuse)
