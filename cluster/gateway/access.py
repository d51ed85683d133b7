"""Who is calling, what they may do, and how much of it: the same for both servers.

`Access` turns an `authorization` value into a `Caller`; the servers make it the current one for
as long as the call is served. A route or RPC declares what it needs:

    public          nothing, not even a token (`PUBLIC_PATHS` of HTTP)
    any             a valid token or key of any scope
    a scope         that scope; the holder of the deployment's token has all of them

What is raised, and what the codecs make of it:

    exception          gRPC                  HTTP
    Unauthenticated    UNAUTHENTICATED       401
    Forbidden          PERMISSION_DENIED     403, naming the scope
    RateLimited        RESOURCE_EXHAUSTED    429 with Retry-After
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from cluster.audit import DONE, Act, AuditLog
from cluster.backend import Overloaded
from cluster.gateway.auth import BearerAuth, credential_of
from cluster.keys import OWNER, SCOPES, ClientKey, KeyRing, Scope
from cluster.rates import TokenBucket

logger = logging.getLogger(__name__)

Need = Scope | Literal["any", "public"]

PUBLIC_PATHS = frozenset({"/", "/health"})

_BUSY_RETRY_S = 1.0


class Unauthenticated(Exception):
    """No token or key, or one that nobody has."""


class Forbidden(Exception):
    """The caller is known and lacks the scope for this; `who` is the caller's name."""

    def __init__(self, message: str, who: str) -> None:
        super().__init__(message)
        self.who = who


class RateLimited(Overloaded):
    """The caller has used up what its key allows for now."""


class Usage:
    """What one key's client has taken lately and has running; its limits are the key's."""

    def __init__(self, key: ClientKey, now_s: float) -> None:
        self.key = key
        self._calls = _bucket(key.requests_per_minute, now_s)
        self._tokens = _bucket(key.tokens_per_minute, now_s)
        self.num_calls = 0
        self.num_running = 0

    def begin_call(self, now_s: float) -> None:
        """Count a call that opens, or raise `RateLimited`."""
        self._check_number(self.num_calls, "calls are open")
        if self._calls is not None:
            wait_s = self._calls.wait_s(1, now_s)
            if wait_s > 0:
                raise RateLimited(
                    f"key {self.key.name} has made its {self.key.requests_per_minute} calls a "
                    f"minute; the next one may come in {wait_s:.1f} s (requests_per_minute)",
                    wait_s,
                )
            self._calls.take(1, now_s)
        self.num_calls += 1

    def begin_prompt(self, num_tokens: int, now_s: float, *, num_unheard: int = 0) -> None:
        """Count a prompt that is about to run, or raise `RateLimited`.

        `num_unheard` are those of the client that go on although it has left them.
        """
        self._check_number(self.num_running + num_unheard, "prompts run")
        if self._tokens is not None and num_tokens:
            wait_s = self._tokens.wait_s(num_tokens, now_s)
            if wait_s > 0:
                raise RateLimited(
                    f"key {self.key.name} may use {self.key.tokens_per_minute} tokens a minute, "
                    f"prompt and output together; this prompt of {num_tokens} may come in "
                    f"{wait_s:.1f} s (tokens_per_minute)",
                    wait_s,
                )
            self._tokens.take(num_tokens, now_s)
        self.num_running += 1

    def generated(self, num_tokens: int, now_s: float) -> None:
        """Charge tokens as they come: what runs goes on, the next prompt waits for it."""
        if self._tokens is not None and num_tokens:
            self._tokens.take(num_tokens, now_s)

    def _check_number(self, number: int, what: str) -> None:
        most = self.key.concurrent_requests
        if most is not None and number >= most:
            raise RateLimited(
                f"{number} {what} for key {self.key.name}, which may have {most} at a time "
                "(concurrent_requests)",
                _BUSY_RETRY_S,
            )


def _bucket(per_minute: int | None, now_s: float) -> TokenBucket | None:
    return None if per_minute is None else TokenBucket(per_minute, now_s)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call."""

    name: str
    source: str
    """The address it comes from, as the server names it."""
    scopes: frozenset[Scope]
    usage: Usage | None = None
    """None: no limits."""

    def check(self, need: Need) -> None:
        """Raise `Forbidden` (of a stranger `Unauthenticated`) unless the caller may do this."""
        if need == "public" or need in self.scopes or (need == "any" and self.scopes):
            return
        if not self.scopes:
            raise Unauthenticated
        has = ", ".join(scope for scope in SCOPES if scope in self.scopes)
        raise Forbidden(f"this needs a key of scope {need}; {self.name} has {has}", self.name)

    @contextmanager
    def prompt(
        self, num_tokens: int, monotonic_s: Callable[[], float], *, num_unheard: int = 0
    ) -> Iterator[Usage | None]:
        """Hold one of the caller's places for a prompt that runs."""
        if self.usage is None:
            yield None
            return
        self.usage.begin_prompt(num_tokens, monotonic_s(), num_unheard=num_unheard)
        try:
            yield self.usage
        finally:
            self.usage.num_running -= 1


OWN_PROCESS = Caller(OWNER, "this process", frozenset(SCOPES))
"""Calls that come through no server."""


def anonymous(source: str) -> Caller:
    """Return whoever reads what is public."""
    return Caller("", source, frozenset())


_caller: ContextVar[Caller] = ContextVar("caller", default=OWN_PROCESS)


def current_caller() -> Caller:
    """Return who makes the call that is being served."""
    return _caller.get()


class Access:
    """Recognises callers, and keeps count of what each has taken."""

    def __init__(
        self,
        token: str,
        *,
        keys: KeyRing | None = None,
        audit: AuditLog | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._owner = BearerAuth(token)
        self._keys = keys
        self.audit = audit
        self._monotonic_s = monotonic_s
        self._usages: dict[str, Usage] = {}

    def caller(self, authorizations: Sequence[str | bytes], source: str) -> Caller:
        """Return who presents these `authorization` values; there must be exactly one."""
        if len(authorizations) != 1:
            raise Unauthenticated
        if self._owner.accepts(authorizations[0]):
            return Caller(OWNER, source, frozenset(SCOPES))
        credential = credential_of(authorizations[0])
        key = None
        if self._keys is not None and credential is not None:
            key = self._keys.find(credential)
        if key is None:
            raise Unauthenticated
        return Caller(key.name, source, frozenset(key.scopes), self._usage(key))

    @contextmanager
    def serving(self, caller: Caller) -> Iterator[None]:
        """Be the current caller within; raises `RateLimited` when it may not call now."""
        if caller.usage is not None:
            caller.usage.begin_call(self._monotonic_s())
        previous = _caller.set(caller)
        try:
            yield
        finally:
            _caller.reset(previous)
            if caller.usage is not None:
                caller.usage.num_calls -= 1

    async def note_refusal(self, error: Exception, source: str, what: str) -> None:
        """Put a refused caller on record, as long as there are not too many of them."""
        if self.audit is None or not isinstance(error, Unauthenticated | Forbidden):
            return
        if not self.audit.wants_refusal():
            return
        is_known = isinstance(error, Forbidden)
        try:
            await asyncio.to_thread(
                self.audit.record_refusal,
                "authorize" if is_known else "authenticate",
                who=error.who if isinstance(error, Forbidden) else "",
                source=source,
                what=what,
            )
        except OSError as failure:
            logger.error("a refusal could not be put on record: %s", failure)

    def _usage(self, key: ClientKey) -> Usage:
        """The key's usage so far; a key that was changed starts afresh."""
        usage = self._usages.get(key.name)
        if usage is None or usage.key != key:
            usage = self._usages[key.name] = Usage(key, self._monotonic_s())
        return usage


@asynccontextmanager
async def on_record(
    audit: AuditLog | None, act: Act, **details: str | int | float
) -> AsyncGenerator[None, None]:
    """Put what happens within on record as the current caller's act, however it ends."""
    caller = current_caller()
    outcome = "cancelled"
    try:
        yield
        outcome = DONE
    except Exception as error:
        outcome = f"failed: {error}"
        raise
    finally:
        if audit is not None:
            await asyncio.to_thread(
                audit.record,
                act,
                who=caller.name,
                source=caller.source,
                outcome=outcome,
                **details,
            )
