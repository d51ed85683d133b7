"""The client's vocabulary: prompts in, chunks and completions out, and errors. No I/O."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict, cast

import grpc
from google.protobuf import json_format

from protos import motley_pb2 as pb

FinishReason = Literal["stop", "length", "abort"]


class Message(NamedTuple):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


Prompt = str | Sequence[int] | Sequence[Message]


class Sampling(TypedDict, total=False):
    """How tokens are drawn; see protos/motley.proto for the defaults."""

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
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int


class GenerateOptions(Sampling, total=False):
    """What a call may say besides the prompt."""

    n: int
    model: str
    request_id: str
    """Chosen by the caller to be able to abort."""
    template_variables: Mapping[str, Any]
    """Extra variables for the chat template, such as enable_thinking."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """The natural-log probability of one token, and of the best alternatives."""

    token_id: int
    text: str
    token_bytes: bytes
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a request cost."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int


RESUME_TIMEOUT_S = 60.0
"""How long a named request is sent again after its last new chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """What happened to one choice; `text` is ready to append."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None
    """On the last chunk of the stream."""


class Heard:
    """Which chunks of a named request have come, so that a client that asks again has each once."""

    def __init__(self, request: pb.GenerateRequest, now_s: float) -> None:
        self._is_named = bool(request.request_id)
        self._since_s = now_s
        self._num_heard: Counter[int] = Counter()
        self._num_again: Counter[int] = Counter()

    def is_new(self, chunk: Chunk, now_s: float) -> bool:
        """Whether a chunk has not come before; every choice's come in the same order each time."""
        self._num_again[chunk.index] += 1
        if self._num_again[chunk.index] <= self._num_heard[chunk.index]:
            return False
        self._num_heard[chunk.index] += 1
        self._since_s = now_s
        return True

    def wait_s(self, error: Unreachable, now_s: float) -> float:
        """Return how long to wait before asking again.

        Raises:
            Unreachable: The same; it is not to be asked again.
        """
        if not self._is_named or now_s - self._since_s > RESUME_TIMEOUT_S:
            raise error
        self._num_again.clear()
        return error.retry_after_s or 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One whole continuation."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A whole answer."""

    request_id: str
    choices: tuple[Choice, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """The served checkpoint."""

    name: str
    architecture: str
    vocab_size: int
    num_layers: int
    max_model_tokens: int
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    dtype: str
    created_unix_s: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Layers [first_layer, end_layer) on a device, with counters since it was placed."""

    index: int
    device: str
    node: str
    first_layer: int
    end_layer: int
    active: bool
    loaded_fraction: float
    busy_s: float
    steps: int
    late_s: float
    link_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The plan in force."""

    plan: Mapping[str, Any]
    """The whole plan as the planner wrote it."""
    stages: tuple[Stage, ...]
    epoch: int
    ready: bool
    reason: str
    progress: float


class MotleyError(Exception):
    """A call failed; `str()` is the server's sentence."""


class InvalidRequest(MotleyError):
    """The request cannot be served as asked."""

    param: str | None = None


class Unauthenticated(MotleyError):
    """The token is missing or wrong."""


class Forbidden(MotleyError):
    """The key lacks the scope for this; the message names it."""


class NotFound(MotleyError):
    """No such model, or no such request in flight."""


class Unreachable(MotleyError):
    """The deployment cannot be reached, or cannot serve at present."""

    retry_after_s: float | None = None


class Overloaded(Unreachable):
    """Every queue is full."""


class DeadlineExceeded(MotleyError):
    """The call took longer than its `timeout_s`."""


class ServerFailed(MotleyError):
    """The server could not do what it should have."""


_ERRORS: Mapping[grpc.StatusCode, type[MotleyError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: Forbidden,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNAVAILABLE: Unreachable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}


def error_of(error: Any) -> MotleyError:
    """Return the exception for a failed RPC."""
    text = error.details() or error.code().name
    trailing = dict(error.trailing_metadata() or ())
    mapped = _ERRORS.get(error.code(), ServerFailed)(text)
    if isinstance(mapped, Overloaded) and "retry-after" not in trailing:
        mapped = InvalidRequest(text)  # grpc's own use of the code: a message above the limit
    if isinstance(mapped, InvalidRequest):
        mapped.param = trailing.get("motley-param")
    if isinstance(mapped, Unreachable) and "retry-after" in trailing:
        mapped.retry_after_s = float(trailing["retry-after"])
    return mapped


def generate_request(prompt: Prompt, options: GenerateOptions) -> pb.GenerateRequest:
    """Return the message; raise `InvalidRequest` for values that do not fit its fields."""
    sampling: dict[str, Any] = dict(options)
    about = {name: sampling.pop(name, None) for name in ("n", "model", "request_id")}
    variables = dict(sampling.pop("template_variables", {}))
    try:
        request = pb.GenerateRequest(sampling=pb.SamplingOptions(**sampling), **about)
        if isinstance(prompt, str):
            request.text = prompt
        elif prompt and isinstance(prompt[0], Message):
            turns = cast("Sequence[Message]", prompt)
            request.chat.messages.extend(
                pb.ChatMessage(role=turn.role, content=turn.content) for turn in turns
            )
            json_format.ParseDict(variables, request.chat.template_variables)
        else:
            request.token_ids.ids.extend(cast("Sequence[int]", prompt))
    except (TypeError, ValueError, AttributeError, json_format.ParseError) as error:
        raise InvalidRequest(f"the request cannot be encoded: {error}") from None
    if variables and not request.HasField("chat"):
        raise InvalidRequest("template_variables need a prompt of Messages")
    return request


def chunk_of(message: pb.GenerateResponse) -> Chunk:
    reason: FinishReason | None = None
    if message.finish_reason != pb.FINISH_REASON_UNSPECIFIED:
        name = pb.FinishReason.Name(message.finish_reason)
        reason = name.removeprefix("FINISH_REASON_").lower()  # type: ignore[assignment]
    stop = message.WhichOneof("stop_reason")
    return Chunk(
        request_id=message.request_id,
        index=message.index,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=_logprobs(message.logprobs),
        prompt_logprobs=_logprobs(message.prompt_logprobs),
        finish_reason=reason,
        stop_reason=None if stop is None else getattr(message, stop),
        usage=_usage(message.usage) if message.HasField("usage") else None,
    )


def _logprobs(entries: Iterable[pb.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            token_id=entry.token_id,
            text=entry.text,
            token_bytes=entry.token_bytes,
            logprob=entry.logprob if entry.HasField("logprob") else None,
            top=_logprobs(entry.top),
        )
        for entry in entries
    )


def _usage(message: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_prompt_tokens=message.cached_prompt_tokens,
    )


def join(chunks: Iterable[Chunk]) -> Completion:
    """Return the whole answer of a stream; raise `ServerFailed` when it broke off."""
    parts: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        parts.setdefault(chunk.index, []).append(chunk)
    everything = [chunk for each in parts.values() for chunk in each]
    usage = next((chunk.usage for chunk in everything if chunk.usage), None)
    if usage is None:
        raise ServerFailed("the stream ended before its last message")
    return Completion(
        request_id=everything[0].request_id,
        choices=tuple(_choice(index, each) for index, each in sorted(parts.items())),
        prompt_logprobs=next((c.prompt_logprobs for c in everything if c.prompt_logprobs), ()),
        usage=usage,
    )


def _choice(index: int, parts: Sequence[Chunk]) -> Choice:
    return Choice(
        index=index,
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        logprobs=tuple(entry for part in parts for entry in part.logprobs),
        finish_reason=parts[-1].finish_reason or "abort",
        stop_reason=parts[-1].stop_reason,
    )


def model_info_of(message: pb.GetModelInfoResponse) -> ModelInfo:
    return ModelInfo(
        name=message.name,
        architecture=message.architecture,
        vocab_size=message.vocab_size,
        num_layers=message.num_layers,
        max_model_tokens=message.max_model_tokens,
        eos_token_ids=tuple(message.eos_token_ids),
        num_parameters=message.num_parameters,
        dtype=message.dtype,
        created_unix_s=message.created_unix_s,
    )


def plan_of(message: pb.GetPlanResponse) -> Plan:
    return Plan(
        plan=json.loads(message.plan_json),
        stages=tuple(
            Stage(**{each.name: getattr(stage, each.name) for each in stage.DESCRIPTOR.fields})
            for stage in message.stages
        ),
        epoch=message.epoch,
        ready=message.ready,
        reason=message.reason,
        progress=message.progress,
    )
