"""What a client asks for and what it is told: the value types of a request's life.

Torch-free and Ray-free, so that the gateway, the client and a lane share one vocabulary. Every
type has `to_wire` / `from_wire`, which map to msgpack-able values.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from actors.engine.packed import are_whole

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
"""Of one stop string: with each token the text is searched for all its beginnings."""
MAX_STOP_TOKEN_IDS = 64
MAX_CHOICES = 32
MAX_SEED = 2**63 - 1


_FINISH_REASONS = get_args(FinishReason)


class RequestError(ValueError):
    """A request that cannot be served as asked; `param` names the field to change."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are drawn from the model's distribution.

    The order is: penalties, temperature, top-k, top-p, min-p, draw. `repetition_penalty` is over
    prompt and output (as in transformers); presence and frequency are over the output (as in the
    OpenAI API). Draws depend on `(seed, position)` alone.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    """Until so many tokens no end-of-sequence or stop token is drawn; a stop string still ends."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: no log-probabilities; k: the chosen token's and the k best of each position."""
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 0, 2**31 - 1)
        _check_int("min_tokens", self.min_tokens, 0, max(0, self.max_tokens))
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_int("top_k", self.top_k, 0, 2**31 - 1)
        _check_float("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise RequestError("top_p (0) must be above 0; use temperature=0 for greedy", "top_p")
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_int("seed", self.seed, 0, MAX_SEED)
        stop: object = self.stop  # a client of this class may not check its types
        if isinstance(stop, str):
            raise RequestError("stop must be a list of strings, not one string", "stop")
        if len(self.stop) > MAX_STOPS:
            raise RequestError(f"{len(self.stop)} stop strings; at most {MAX_STOPS}", "stop")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                f"{len(self.stop_token_ids)} stop token ids; at most {MAX_STOP_TOKEN_IDS}",
                "stop_token_ids",
            )
        for text in self.stop:
            _check_stop(text)
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0, 2**31 - 1)
        if type(self.ignore_eos) is not bool:
            raise RequestError(f"ignore_eos ({self.ignore_eos!r}) must be true or false")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_int(name, value, 0, MAX_LOGPROBS)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def needs_history(self) -> bool:
        """Whether drawing needs the tokens so far."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, value: dict[str, Any]) -> SamplingParams:
        value = dict(value)
        for name in ("stop", "stop_token_ids"):
            value[name] = tuple(value.get(name, ()))
        return cls(**value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt to be continued `n` times.

    `id` is chosen by the gateway (or the client) and is unique among requests in flight.
    Choice i is drawn with seed `sampling.seed + i`.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    deadline_s: float | None = None
    """Seconds from arrival after which the request is ended with what it has."""
    is_named: bool = False
    """Its client has chosen the id, and may send it again."""
    progress: tuple[tuple[int, ...] | None, ...] = ()
    """Of a request that goes on after a lane was lost: for each choice the tokens that were drawn,
    or None when it has ended. Empty: it begins."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise RequestError("the prompt is empty: 0 tokens; send at least 1", "prompt")
        _check_int("n", self.n, 1, MAX_CHOICES)
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise RequestError(f"deadline_s ({self.deadline_s}) must be above 0", "deadline_s")
        if self.progress and len(self.progress) != self.n:
            raise RequestError(f"progress of {len(self.progress)} of {self.n} choices", "progress")

    def to_wire(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "prompt": list(self.prompt),
            "sampling": self.sampling.to_wire(),
            "n": self.n,
            "deadline_s": self.deadline_s,
            "is_named": self.is_named,
            "progress": self.progress,
        }

    @classmethod
    def from_wire(cls, value: dict[str, Any]) -> Request:
        """Take a request from its wire form.

        Raises ValueError, TypeError, AttributeError or LookupError for a malformed one.
        """
        prompt, progress = value["prompt"], value.get("progress", ())
        drawn = [tokens for tokens in progress if tokens is not None]
        if type(value["id"]) is not str or not all(are_whole(part) for part in (prompt, *drawn)):
            # In a step such tokens would fail the requests beside it too.
            raise ValueError("a request's id is no text, or it holds more than token ids")
        return cls(
            id=value["id"],
            prompt=tuple(prompt),
            sampling=SamplingParams.from_wire(value["sampling"]),
            n=value["n"],
            deadline_s=value["deadline_s"],
            is_named=bool(value.get("is_named")),
            progress=tuple(None if p is None else tuple(p) for p in progress),
        )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probabilities at one position under the unmodified model distribution."""

    token_id: int
    logprob: float | None
    """None for the first prompt token, which nothing predicts."""
    top: tuple[tuple[int, float], ...] = ()
    """The best alternatives, best first: (token id, log-probability)."""

    def to_wire(self) -> list[Any]:
        return [self.token_id, self.logprob, [list(pair) for pair in self.top]]

    @classmethod
    def from_wire(cls, value: list[Any]) -> TokenLogprob:
        token_id, logprob, top = value
        pairs = tuple((other, number) for other, number in top)
        numbers = [number for _, number in pairs] + ([] if logprob is None else [logprob])
        if not are_whole([token_id, *(other for other, _ in pairs)]) or any(
            type(number) is not float for number in numbers
        ):
            raise ValueError("a log-probability is no number, or its token no token id")
        return cls(token_id, logprob, pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestOutput:
    """What happened to one choice of a request since its last output.

    Tokens arrive as they are sampled. `text` is withheld while it could still become part of a
    stop string or of an incomplete UTF-8 character, so it may lag behind `tokens`; the last
    output (with a `finish_reason`) flushes it. The stop string itself is not in `text`.
    """

    id: str
    index: int = 0
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """Once per request, on choice 0, when asked for: one entry per prompt token."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or token id that ended the choice."""
    error: str = ""
    """With finish_reason "error": what went wrong, fit for a client to read."""
    cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache (set on the first output of a choice)."""

    def to_wire(self) -> list[Any]:
        """Positional, the request's id first: one is sent for every token."""
        prompt = self.prompt_logprobs
        return [
            self.id,
            self.index,
            self.tokens,
            self.text,
            [entry.to_wire() for entry in self.logprobs],
            None if prompt is None else [entry.to_wire() for entry in prompt],
            self.finish_reason,
            self.stop_reason,
            self.error,
            self.cached_tokens,
        ]

    @classmethod
    def from_wire(cls, value: list[Any]) -> RequestOutput:
        request_id, index, tokens, text, logprobs, prompt, finish, stop, error, cached = value
        if not (
            type(request_id) is type(text) is type(error) is str
            and are_whole([index, cached])
            and are_whole(tokens)
            and (finish is None or finish in _FINISH_REASONS)
            and (stop is None or type(stop) in (str, int))
        ):
            raise ValueError(f"malformed output of {len(value)} fields")
        return cls(
            id=request_id,
            index=index,
            tokens=tuple(tokens),
            text=text,
            logprobs=tuple(TokenLogprob.from_wire(entry) for entry in logprobs),
            prompt_logprobs=(
                None if prompt is None else tuple(TokenLogprob.from_wire(entry) for entry in prompt)
            ),
            finish_reason=finish,
            stop_reason=stop,
            error=error,
            cached_tokens=cached,
        )


def _check_stop(text: object) -> None:
    if not isinstance(text, str):
        raise RequestError(f"stop ({text!r}) must be a list of strings", "stop")
    if not text:
        raise RequestError("a stop string is empty; leave it out instead", "stop")
    if len(text) > MAX_STOP_CHARACTERS:
        raise RequestError(
            f"a stop string has {len(text)} characters; at most {MAX_STOP_CHARACTERS}", "stop"
        )


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} ({value!r}) must be a whole number", name)
    if not low <= value <= high:
        raise RequestError(f"{name} ({value}) must be between {low} and {high}", name)


def _check_float(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name} ({value!r}) must be a number", name)
    if math.isnan(value) or not low <= value <= high:
        raise RequestError(f"{name} ({value}) must be between {low:g} and {high:g}", name)
