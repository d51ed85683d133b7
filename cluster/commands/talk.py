"""`motley generate` and `motley chat`: the gRPC client at work, streaming to stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.text import Text

from cluster.client import (
    Chunk,
    Forbidden,
    GenerateOptions,
    InvalidRequest,
    Message,
    MotleyClient,
    MotleyError,
    Overloaded,
    Unauthenticated,
    Unreachable,
    Usage,
)
from cluster.commands.errors import NotReadyError, RefusedError, UnauthorizedError
from cluster.commands.output import Output
from cluster.runstate import NotRunningError

LEAVE = "/exit"


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpcTarget:
    """Where a gateway listens for gRPC and how to be let in."""

    target: str
    token: str = field(repr=False)
    tls_ca_file: Path | None = None
    tls_client_cert_file: Path | None = None
    tls_client_key_file: Path | None = None


@dataclass(slots=True)
class Answer:
    """One answer as it grows, and how long it took."""

    text: str = ""
    request_id: str = ""
    finish_reason: str | None = None
    usage: Usage | None = None
    first_token_s: float | None = None
    seconds: float = 0.0
    began_s: float = field(default_factory=time.monotonic)

    def add(self, chunk: Chunk) -> None:
        self.seconds = time.monotonic() - self.began_s
        if self.first_token_s is None and chunk.token_ids:
            self.first_token_s = self.seconds
        self.text += chunk.text
        self.request_id = chunk.request_id
        self.finish_reason = chunk.finish_reason or self.finish_reason
        self.usage = chunk.usage or self.usage

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens after the first over the time they took; None below two tokens."""
        if self.usage is None or self.first_token_s is None or self.usage.completion_tokens < 2:
            return None
        decoding_s = self.seconds - self.first_token_s
        return (self.usage.completion_tokens - 1) / decoding_s if decoding_s > 0 else None

    def to_json(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "request_id": self.request_id,
            "finish_reason": self.finish_reason,
            "usage": None if self.usage is None else asdict(self.usage),
            "first_token_s": self.first_token_s,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
        }

    def summary(self) -> Text:
        """Say what it cost."""
        tokens = 0 if self.usage is None else self.usage.completion_tokens
        rate = "" if self.tokens_per_s is None else f", then {self.tokens_per_s:.1f} tokens/s"
        first = "" if self.first_token_s is None else f"; first after {self.first_token_s:.2f} s"
        return Text(
            f"{tokens} tokens in {self.seconds:.2f} s{first}{rate} ({self.finish_reason})",
            style="dim",
        )


def generate(target: GrpcTarget, prompt: str, options: GenerateOptions, output: Output) -> None:
    """Continue one prompt; "-" reads it from stdin."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with _client(target) as client:
        answer = _stream(client, text, options, output)
    if output.as_json:
        output.result(answer.to_json())
    else:
        output.text("\n")
        output.note(answer.summary())


def chat(
    target: GrpcTarget,
    system: str | None,
    options: GenerateOptions,
    output: Output,
    read_line: Callable[[], str],
) -> None:
    """Hold a conversation until `/exit` or the end of the input.

    Ctrl-C ends the answer being written and keeps what there is of it.
    """
    turns = [] if system is None else [Message("system", system)]
    output.note(Text(f"{LEAVE} or Ctrl-D leaves", style="dim"))
    with _client(target) as client:
        for line in _lines(read_line):
            turns.append(Message("user", line))
            answer = _stream(client, turns, options, output, may_interrupt=True)
            turns.append(Message("assistant", answer.text))
            if output.as_json:
                output.line(answer.to_json())
            else:
                output.text("\n")


def _lines(read_line: Callable[[], str]) -> Iterator[str]:
    while True:
        try:
            line = read_line().strip()
        except EOFError:
            return
        if line == LEAVE:
            return
        if line:
            yield line


def _stream(
    client: MotleyClient,
    prompt: str | list[Message],
    options: GenerateOptions,
    output: Output,
    *,
    may_interrupt: bool = False,
) -> Answer:
    answer = Answer()
    with closing(client.generate(prompt, **options)) as chunks:
        try:
            for chunk in chunks:
                answer.add(chunk)
                if not output.as_json:
                    output.text(chunk.text)
        except KeyboardInterrupt:
            if not may_interrupt:
                raise
            answer.finish_reason = "abort"
    return answer


@contextmanager
def _client(target: GrpcTarget) -> Iterator[MotleyClient]:
    """Open a client and give its errors the meaning that exit codes have."""
    try:
        with MotleyClient(
            target.target,
            target.token,
            tls_ca_file=target.tls_ca_file,
            tls_client_cert_file=target.tls_client_cert_file,
            tls_client_key_file=target.tls_client_key_file,
        ) as client:
            yield client
    except MotleyError as error:
        raise _explain(target, error) from None


def _explain(target: GrpcTarget, error: MotleyError) -> RuntimeError:
    match error:
        case Unauthenticated():
            return UnauthorizedError(
                f"{target.target} refused the token ({error}); set --token or MOTLEY_TOKEN"
            )
        case Forbidden():
            return UnauthorizedError(f"{target.target} refused: {error}")
        case Overloaded():
            return NotReadyError(f"{target.target} is overloaded: {error}")
        case Unreachable(retry_after_s=float()):
            return NotReadyError(f"{target.target} is not ready: {error}")
        case Unreachable():
            return NotRunningError(
                f"nothing answers at {target.target} ({error}); start a deployment with "
                f"`motley up`, or name one with --target"
            )
        case InvalidRequest():
            return RefusedError(str(error))
        case _:
            return RuntimeError(f"{target.target}: {error}")
