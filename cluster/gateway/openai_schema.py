"""The bodies of the OpenAI API, as far as Motley takes them.

Field types are strict: a wrong type is a schema violation (422), told apart from a value that
cannot be served (400). A field that OpenAI or vLLM has and Motley cannot honour is refused when it
asks for something; fields nobody here knows are ignored, as OpenAI does.
"""

from __future__ import annotations

from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

from actors.engine.requests import RequestError
from cluster.gateway.service import SamplingOptions

MAX_PROMPTS = 256
"""Prompts of one completion call."""

Prompt = str | list[int]

_SAME_NAME = (
    "min_tokens",
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
)
_UNSUPPORTED = {
    "logit_bias": "tokens cannot be biased; leave it out",
    "tools": "tools cannot be called; describe them in a message instead",
    "functions": "functions cannot be called; describe them in a message instead",
    "audio": "this deployment answers with text only",
    "suffix": "text is only continued, not filled in",
}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class GenerationBody(BaseModel):
    """What completions and chat have in common."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = None

    def sampling_options(self) -> SamplingOptions:
        """Return the fields that were given, other than lengths and log-probabilities."""
        given = {name: getattr(self, name) for name in _SAME_NAME}
        given["top_k"] = 0 if self.top_k == -1 else self.top_k  # -1 is vLLM's "all of them"
        if self.stop is not None:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.stop_token_ids is not None:
            given["stop_token_ids"] = tuple(self.stop_token_ids)
        return cast(SamplingOptions, {k: v for k, v in given.items() if v is not None})

    def check_supported(self) -> None:
        """Raise `RequestError` for a field that asks for what Motley does not do."""
        for name, reason in _UNSUPPORTED.items():
            if getattr(self, name, None):
                raise RequestError(f"{name} is not supported: {reason}", name)
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream: true", "stream_options")


def _prompts(value: object) -> list[Prompt]:
    """Take a string, a list of strings, token ids, or a list of token-id lists."""
    if isinstance(value, str) or _is_token_ids(value):
        return [cast(Prompt, value)]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return cast("list[Prompt]", value)
        if all(_is_token_ids(item) for item in value):
            return cast("list[Prompt]", value)
    raise PydanticCustomError(
        "prompt_type",
        "Input should be a string, a list of strings, a list of token ids or a list of "
        "token-id lists, and not empty",
    )


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[list[Prompt], PlainValidator(_prompts)]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None

    def check_supported(self) -> None:
        super().check_supported()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError(
                f"best_of ({self.best_of}) must equal n ({self.n or 1}): choices are not ranked",
                "best_of",
            )
        if len(self.prompt) > MAX_PROMPTS:
            raise RequestError(
                f"{len(self.prompt)} prompts in one call; at most {MAX_PROMPTS}", "prompt"
            )

    def sampling_options(self) -> SamplingOptions:
        options = super().sampling_options()
        if self.max_tokens is not None:
            options["max_tokens"] = self.max_tokens
        if self.logprobs is not None:
            options["logprobs"] = self.logprobs
            if self.echo:
                options["prompt_logprobs"] = self.logprobs
        return options


class ContentPart(BaseModel):
    model_config = ConfigDict(strict=True)

    type: str
    text: str | None = None


class ChatMessage(BaseModel):
    model_config = ConfigDict(strict=True)

    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: list[Any] | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True)

    type: str


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    audio: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Extra variables for the chat template, such as enable_thinking (as in vLLM)."""

    def check_supported(self) -> None:
        super().check_supported()
        if self.response_format is not None and self.response_format.type != "text":
            raise RequestError(
                f"response_format of type {self.response_format.type!r} is not supported: "
                "output is not constrained; use type text",
                "response_format",
            )

    def sampling_options(self) -> SamplingOptions:
        options = super().sampling_options()
        max_tokens = self._max_tokens()
        if max_tokens is not None:
            options["max_tokens"] = max_tokens
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", "top_logprobs")
        if self.logprobs:
            options["logprobs"] = self.top_logprobs or 0
        return options

    def _max_tokens(self) -> int | None:
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) == 2:
            raise RequestError(
                f"max_tokens ({self.max_tokens}) and max_completion_tokens "
                f"({self.max_completion_tokens}) differ; give one of them",
                "max_completion_tokens",
            )
        value = both.pop() if both else None
        if value is not None and value < 1:
            raise RequestError(f"max_tokens ({value}) must be at least 1", "max_tokens")
        return value

    def template_messages(self) -> list[dict[str, str]]:
        """Return the messages as a chat template takes them; `developer` becomes `system`."""
        return [_template_message(f"messages[{i}]", m) for i, m in enumerate(self.messages)]


def _template_message(where: str, message: ChatMessage) -> dict[str, str]:
    role = "system" if message.role == "developer" else message.role
    if role not in ("system", "user", "assistant"):
        raise RequestError(
            f"{where}.role ({message.role!r}) must be system, developer, user or assistant",
            "messages",
        )
    if message.tool_calls:
        raise RequestError(f"{where}.tool_calls: tools are not supported", "messages")
    if message.content is None:
        raise RequestError(f"{where}.content is missing; send text", "messages")
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    return {"role": role, "content": "".join(_part_text(where, p) for p in message.content)}


def _part_text(where: str, part: ContentPart) -> str:
    if part.type != "text" or part.text is None:
        raise RequestError(
            f"{where}.content has a part of type {part.type!r}; only text parts are taken",
            "messages",
        )
    return part.text
