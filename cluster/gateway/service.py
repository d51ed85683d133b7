"""The gateway's core, free of any protocol: from what a client sent to a stream of outputs.

The two servers are codecs around `GatewayService`. It checks the model name, tokenizes, checks
lengths and ids against the model, fills in defaults, runs the request on the backend and measures
it. What it raises, and what the codecs make of it:

    exception              gRPC                  HTTP
    RequestError           INVALID_ARGUMENT      400 (code context_length_exceeded where it is)
    NotFound               NOT_FOUND             404 (code model_not_found for a model)
    Overloaded             RESOURCE_EXHAUSTED    429 with Retry-After
    Forbidden              PERMISSION_DENIED     403
    Unavailable            UNAVAILABLE           503 with Retry-After
    GenerationFailed       INTERNAL              500
    AdapterError                                 400 (code adapter_refused)
    PublishInProgress                            409
    PublishFailed                                500
    anything else          INTERNAL              500 with a plain sentence; the log has the trace
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, aclosing
from typing import Any, TypedDict

from actors.engine.adapter import Adapter
from actors.engine.requests import MAX_SEED, Request, RequestError, RequestOutput, SamplingParams
from cluster.audit import Act, AuditLog
from cluster.backend import (
    AdapterStatus,
    Backend,
    DeploymentStatus,
    ModelInfo,
    Published,
    Unavailable,
)
from cluster.gateway.access import current_caller, on_record
from cluster.gateway.tokenizer import ChatMessages, Tokenizer, check_text
from cluster.resuming import Resuming
from cluster.telemetry import GatewayMetrics, Outcome

logger = logging.getLogger(__name__)

DEFAULT_COMPLETION_TOKENS = 16
"""max_tokens of a completion that names none, as in the OpenAI API."""

STATUS_TIMEOUT_S = 5.0
_RETRY_AFTER_SHUTDOWN_S = 5.0
_INLINE_CHARACTERS = 16_384
"""Longer text is tokenized in a thread, so that other streams keep flowing meanwhile."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class SamplingOptions(TypedDict, total=False):
    """The sampling fields a client gave; an absent key takes the default."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int


class ContextLengthExceeded(RequestError):
    """Prompt and output do not fit the model together."""


class NotFound(Exception):
    """The client named a model or a request that is not here."""

    def __init__(self, message: str, *, code: str) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class GenerationFailed(Exception):
    """A request that was admitted could not be finished; the message is fit for a client."""


def random_seed() -> int:
    """Return 63 fresh random bits."""
    return secrets.randbelow(MAX_SEED + 1)


def seed_of(request_id: str) -> int:
    """Return 63 bits that follow from a name."""
    digest = hashlib.sha256(request_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") & MAX_SEED


class GatewayService:
    """One deployment, as both servers see it."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        *,
        audit: AuditLog | None = None,
        resuming: Resuming | None = None,
        metrics: GatewayMetrics | None = None,
        new_seed: Callable[[], int] = random_seed,
        monotonic_s: Callable[[], float] = time.monotonic,
        status_timeout_s: float = STATUS_TIMEOUT_S,
    ) -> None:
        self.tokenizer = tokenizer
        self.metrics = metrics or GatewayMetrics()
        self._backend = backend
        self._audit = audit
        self._new_seed = new_seed
        self._monotonic_s = monotonic_s
        self._status_timeout_s = status_timeout_s
        self._resuming = resuming
        self._listeners = itertools.count(1)
        self._in_flight: dict[tuple[str, int], str] = {}
        """Who asked for each request, by its id; a named one counts each listener (from 1 on)."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_draining = False

    def model_info(self) -> ModelInfo:
        return self._backend.model_info()

    def plan(self) -> dict[str, object]:
        return self._backend.plan_json()

    def controller(self) -> dict[str, object] | None:
        return self._backend.controller_json()

    async def would_move(self) -> dict[str, object]:
        """Return what the controller would do now."""
        return await self._backend.steering().would_move()

    async def rebalance(self) -> dict[str, object]:
        """Have the best plan now; returns what that is."""
        steering = self._backend.steering()
        would = await steering.would_move()
        async with on_record(self._audit, "rebalance", verdict=str(would["verdict"])):
            steering.rebalance()
        return would

    async def drain_node(self, node: str, *, cancel: bool) -> None:
        """Let a node hold nothing, or use it again."""
        async with on_record(self._audit, "drain", node=node, cancel=cancel):
            self._backend.steering().drain(node, cancel=cancel)

    async def status(self) -> DeploymentStatus:
        """Return a snapshot; a deployment that does not answer in time is not ready."""
        try:
            async with asyncio.timeout(self._status_timeout_s):
                return await self._backend.status()
        except TimeoutError:
            reason = f"the deployment did not report its status within {self._status_timeout_s:g} s"
        except Unavailable as error:
            reason = error.message
        return DeploymentStatus(ready=False, reason=reason)

    async def render_metrics(self) -> bytes:
        """Return the Prometheus text, with a fresh snapshot of the deployment."""
        return self.metrics.render(await self.status(), self.model_info())

    def check_model(self, name: str | None) -> None:
        """Raise `NotFound` unless `name` is the served model; None and "" mean that one."""
        served = self.model_info().name
        if name and name != served:
            raise NotFound(
                f"The model `{name}` does not exist; this deployment serves `{served}`",
                code="model_not_found",
            )

    async def encode_text(self, text: str) -> tuple[int, ...]:
        with self.metrics.counting_refusals():
            if len(text) <= _INLINE_CHARACTERS:
                return self.tokenizer.encode(text)
            return await asyncio.to_thread(self.tokenizer.encode, text)

    async def encode_chat(
        self, messages: ChatMessages, variables: Mapping[str, Any] | None = None
    ) -> tuple[int, ...]:
        with self.metrics.counting_refusals():
            if not messages:
                raise RequestError("messages is empty; send at least 1", "messages")
            if sum(len(message["content"]) for message in messages) <= _INLINE_CHARACTERS:
                return self.tokenizer.encode_chat(messages, variables)
            return await asyncio.to_thread(self.tokenizer.encode_chat, messages, variables)

    def request(
        self,
        request_id: str,
        prompt: Sequence[int],
        options: SamplingOptions,
        *,
        n: int = 1,
        deadline_s: float | None = None,
        default_max_tokens: int | None = DEFAULT_COMPLETION_TOKENS,
        is_named: bool = False,
    ) -> Request:
        """Return the request with every default filled in and every limit checked.

        `default_max_tokens` of None means all that fits after the prompt. One that its client has
        named has a seed that follows from the name, so that it is the same when it comes again.
        """
        with self.metrics.counting_refusals():
            info = self.model_info()
            _check_request_id(request_id)
            _check_token_ids(prompt, info.vocab_size, "prompt")
            _check_token_ids(options.get("stop_token_ids", ()), info.vocab_size, "stop_token_ids")
            for stop in options.get("stop", ()):
                check_text(stop, "stop")
            options = options.copy()
            options["max_tokens"] = _max_tokens(
                len(prompt), options.get("max_tokens"), default_max_tokens, info.max_model_tokens
            )
            if "seed" not in options:
                options["seed"] = seed_of(request_id) if is_named else self._new_seed()
            return Request(
                id=request_id,
                prompt=tuple(prompt),
                sampling=SamplingParams(**options),
                n=n,
                deadline_s=deadline_s,
                is_named=is_named,
            )

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Run the request; closing this generator aborts it on the backend at once."""
        caller = current_caller()
        resuming = self._resuming
        num_unheard, num_prompt = 0, len(request.prompt)
        if resuming is not None:
            num_unheard = resuming.num_unheard(caller.name, besides=request.id)
            if request.is_named and resuming.is_known(request.id, caller.name):
                num_prompt = 0  # paid for when it came first
        with ExitStack() as held:
            with self.metrics.counting_refusals():
                place = caller.prompt(num_prompt, self._monotonic_s, num_unheard=num_unheard)
                usage = held.enter_context(place)
                key = self._admit(request, caller.name)
            held.callback(self._leave, key)
            outputs = self._outputs(request, caller.name)
            num_heard = 0
            try:
                async with aclosing(self._watched(request, outputs)) as watched:
                    async for output in watched:
                        num_heard += len(output.tokens)
                        if usage is not None:
                            num_new = len(output.tokens)
                            if request.is_named and resuming is not None:
                                num_new = resuming.num_to_charge(request.id, num_heard)
                            usage.generated(num_new, self._monotonic_s())
                        yield output
            finally:
                await _close(outputs)

    def _outputs(self, request: Request, caller: str) -> AsyncGenerator[RequestOutput, None]:
        if request.is_named and self._resuming is not None:
            return self._resuming.generate(request, caller)
        return self._backend.generate(request)

    async def _watched(
        self, request: Request, outputs: AsyncIterator[RequestOutput]
    ) -> AsyncGenerator[RequestOutput, None]:
        """Pass the outputs on; count and time them; raise for a failure."""
        timer = self.metrics.track(request, self._monotonic_s)
        outcome: Outcome | None = "cancelled"
        reasons = []
        try:
            with self.metrics.counting_refusals():
                async for output in outputs:
                    timer.saw(output)
                    if output.finish_reason == "error":
                        raise GenerationFailed(output.error or "generation failed")
                    if output.finish_reason is not None:
                        reasons.append(output.finish_reason)
                        if len(reasons) == request.n:
                            outcome = "aborted" if "abort" in reasons else "completed"
                    yield output
            if len(reasons) < request.n:
                raise GenerationFailed(
                    f"the deployment ended {len(reasons)} of {request.n} choices; send it again"
                )
        except (RequestError, Unavailable):
            outcome = None  # counted as a refusal
            raise
        except Exception:
            outcome = "failed"
            raise
        finally:
            if outcome is not None:
                timer.ended(outcome)

    async def abort(self, request_id: str) -> None:
        """End a request in flight; raise `NotFound` when there is none of that id.

        Another caller's request needs the scope admin.
        """
        caller = current_caller()
        owner = self._owner_of(request_id) or caller.name
        if owner == caller.name:
            await self._abort(request_id)
            return
        caller.check("admin")
        async with on_record(self._audit, "abort", request=request_id, asked_by=owner):
            await self._abort(request_id)

    async def _abort(self, request_id: str) -> None:
        if not await self._backend.abort(request_id):
            raise NotFound(
                f"no request `{request_id}` is in flight; it may have finished",
                code="request_not_found",
            )

    def adapter(self) -> AdapterStatus:
        return self._backend.adapter()

    async def publish(self, adapter: Adapter | None) -> Published:
        """Put an adapter to use while requests run; see `Backend.publish`."""
        self._check_open()
        act: Act = "remove_adapter" if adapter is None else "publish"
        name = "" if adapter is None else adapter.name
        async with on_record(self._audit, act, adapter=name):
            return await self._backend.publish(adapter)

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests, let those in flight finish for `grace_s`, then abort the rest."""
        self._is_draining = True
        if await self._wait_until_idle(grace_s):
            return
        if self._resuming is not None:
            await self._resuming.suspend()
        left = sorted(request_id for request_id, _ in self._in_flight)
        logger.warning("%d requests outlasted the grace of %g s; aborting", len(left), grace_s)
        await asyncio.gather(*(self._backend.abort(request_id) for request_id in left))
        await self._wait_until_idle(1.0)

    async def _wait_until_idle(self, limit_s: float) -> bool:
        try:
            async with asyncio.timeout(limit_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _check_open(self) -> None:
        if self._is_draining:
            raise Unavailable("the gateway is shutting down", _RETRY_AFTER_SHUTDOWN_S)

    def _admit(self, request: Request, caller: str) -> tuple[str, int]:
        """Note a request, or one more listener of a named one; returns what to `_leave` with."""
        self._check_open()
        number = 0
        if request.is_named and self._resuming is not None:
            number = next(self._listeners)
        elif (request.id, 0) in self._in_flight:
            raise RequestError(
                f"request id `{request.id}` is already in flight; choose another", "request_id"
            )
        self._in_flight[request.id, number] = caller
        self._idle.clear()
        return request.id, number

    def _leave(self, key: tuple[str, int]) -> None:
        del self._in_flight[key]
        if not self._in_flight:
            self._idle.set()

    def _owner_of(self, request_id: str) -> str | None:
        named = None if self._resuming is None else self._resuming.owner(request_id)
        return named or self._in_flight.get((request_id, 0))


async def _close(outputs: AsyncIterator[RequestOutput]) -> None:
    close = getattr(outputs, "aclose", None)  # AsyncIterator itself does not promise one
    if close is not None:
        await close()


def _check_request_id(request_id: str) -> None:
    if not _REQUEST_ID.fullmatch(request_id):
        raise RequestError(
            f"the request id has {len(request_id)} characters; use 1 to 128 of letters, digits "
            "and . _ : -",
            "request_id",
        )


def _check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> None:
    if not token_ids:
        return
    worst = min(token_ids) if min(token_ids) < 0 else max(token_ids)
    if not 0 <= worst < vocab_size:
        raise RequestError(
            f"{param} holds token id {worst}; the model has ids 0 to {vocab_size - 1}", param
        )


def _max_tokens(num_prompt: int, asked: int | None, default: int | None, limit: int) -> int:
    """Return the output length: as asked, or the default as far as it fits."""
    room = limit - num_prompt
    if asked is None:
        if room < 1:
            raise ContextLengthExceeded(
                f"the prompt has {num_prompt} tokens; the model takes {limit} with the output. "
                "Shorten the prompt",
                "prompt",
            )
        return room if default is None else min(default, room)
    if asked > room:
        raise ContextLengthExceeded(
            f"the prompt has {num_prompt} tokens and max_tokens is {asked}, together "
            f"{num_prompt + asked}; the model takes {limit}. Shorten the prompt or lower "
            "max_tokens",
            "max_tokens" if room > 0 else "prompt",
        )
    return asked
