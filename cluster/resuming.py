"""Requests that clients have named outlive a broken connection, and the gateway itself.

A client that sends a request again under its name joins the one that runs, or hears what it has
become, from the first output on; nothing runs twice. A request that nobody listens to is given up
after a grace. What had been accepted when the gateway died runs again when it is back: draws depend
on seed and position alone, so the outputs are the same.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from actors.engine.requests import Request, RequestError, RequestOutput
from cluster.backend import Unavailable
from cluster.journal import Journal

_log = logging.getLogger(__name__)
_RETRY_S = 2.0
_MOST_KEPT = 1000
"""Requests whose outputs are kept after their end; beyond that the oldest go early."""
Generate = Callable[[Request], AsyncGenerator[RequestOutput, None]]


@dataclass(eq=False)
class _Named:
    """A named request: what it has become so far."""

    request: Request
    owner: str
    outputs: list[RequestOutput] = field(default_factory=list)
    has_ended: bool = False
    error: BaseException | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    num_listeners: int = 0
    num_charged: int = 0
    """Output tokens that its client has paid for."""
    running: asyncio.Task[None] | None = None
    giving_up: asyncio.TimerHandle | None = None

    def tell(self) -> None:
        """Wake who listens."""
        self.changed.set()
        self.changed = asyncio.Event()


class Resuming:
    """Runs named requests over a backend's `generate`. Use on the event loop."""

    def __init__(self, generate: Generate, journal: Journal, *, grace_s: float) -> None:
        self._generate = generate
        self._journal = journal
        self._grace_s = grace_s
        self._named: dict[str, _Named] = {}

    def recall(self) -> None:
        """Know again what the journal holds; before any request is taken."""
        self._journal.forget_old()
        for entry in self._journal.entries():
            named = self._named[entry.request.id] = _Named(entry.request, entry.owner)
            if entry.outputs is not None:
                named.outputs, named.has_ended = list(entry.outputs), True

    def restart(self) -> int:
        """Run again what had not ended, once requests are served; returns how many those are."""
        waiting = [n for n in self._named.values() if not n.has_ended and n.running is None]
        for named in waiting:
            self._start(named, is_written=True)
            if not named.num_listeners:
                self._wait_for_listener(named)
        return len(waiting)

    async def generate(self, request: Request, owner: str) -> AsyncGenerator[RequestOutput, None]:
        """Stream a named request from its first output on.

        Raises:
            RequestError: The name is another request's.
        """
        named = self._named.get(request.id)
        if named is None:
            named = self._named[request.id] = _Named(request, owner)
            self._start(named)
        elif not _is_same(named, request, owner):
            raise RequestError(
                f"request id `{request.id}` is another request's; choose another", "request_id"
            )
        async with aclosing(self._listen(named)) as outputs:
            async for output in outputs:
                yield output

    def is_known(self, request_id: str, owner: str) -> bool:
        """Whether a client's request of this name would be joined, not begun."""
        named = self._named.get(request_id)
        return named is not None and named.owner == owner

    def num_to_charge(self, request_id: str, num_heard: int) -> int:
        """How many of the tokens that a listener has heard so far are to be paid for now: nobody
        pays for those that were heard before."""
        named = self._named.get(request_id)
        if named is None:
            return 0
        num_new = max(0, num_heard - named.num_charged)
        named.num_charged += num_new
        return num_new

    def owner(self, request_id: str) -> str | None:
        """Whose request runs under a name; None: nobody's."""
        named = self._named.get(request_id)
        return None if named is None or named.has_ended else named.owner

    def num_unheard(self, owner: str, *, besides: str) -> int:
        """How many requests of a client run with nobody listening, not counting one."""
        return sum(
            named.owner == owner
            and not named.num_listeners
            and not named.has_ended
            and request_id != besides
            for request_id, named in self._named.items()
        )

    async def suspend(self) -> None:
        """Stop all; what has not ended is in the journal, and goes on from there."""
        live = [named for named in self._named.values() if not named.has_ended]
        for named in live:
            if named.giving_up is not None:
                named.giving_up.cancel()
            named.error = Unavailable(
                "the gateway is shutting down; send the request again under its name", _RETRY_S
            )
            if named.running is not None:
                named.running.cancel()
        tasks = [named.running for named in live if named.running is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """Stop all, and close the journal once what has ended is in it."""
        await self.suspend()
        running = [named.running for named in self._named.values() if named.running is not None]
        await asyncio.gather(*running, return_exceptions=True)
        self._journal.close()

    async def _listen(self, named: _Named) -> AsyncGenerator[RequestOutput, None]:
        named.num_listeners += 1
        if named.giving_up is not None:
            named.giving_up.cancel()
            named.giving_up = None
        try:
            heard = 0
            while True:
                changed = named.changed
                while heard < len(named.outputs):
                    heard += 1
                    yield named.outputs[heard - 1]
                if named.error is not None:
                    raise named.error
                if named.has_ended:
                    return
                await changed.wait()
        finally:
            named.num_listeners -= 1
            if not named.num_listeners and not named.has_ended and named.error is None:
                self._wait_for_listener(named)

    def _start(self, named: _Named, *, is_written: bool = False) -> None:
        # On a task of its own: a client that leaves takes nothing with it.
        named.running = asyncio.create_task(self._run(named, is_written=is_written))

    async def _run(self, named: _Named, *, is_written: bool) -> None:
        request = named.request
        try:
            if not is_written:
                await asyncio.to_thread(self._journal.accept, request, named.owner)
            async with aclosing(self._generate(request)) as outputs:
                async for output in outputs:
                    named.outputs.append(output)
                    named.tell()
        except asyncio.CancelledError:
            raise
        except sqlite3.Error as error:
            await self._fail(named, Unavailable(f"the request is not written down: {error}", 2.0))
        except Exception as error:  # noqa: BLE001 - raised to whoever listens
            await self._fail(named, error)
        else:
            if any(output.finish_reason == "error" for output in named.outputs):
                await self._forget([named])  # it may be tried again
            named.has_ended = True
            named.tell()
            await self._keep(named)
        finally:
            named.tell()

    async def _fail(self, named: _Named, error: BaseException) -> None:
        """A request has come to nothing: it may come again under its name."""
        await self._forget([named])
        named.error = error

    async def _keep(self, named: _Named) -> None:
        """Write down what a request has become, if it is known still. Forget old ones."""
        try:
            await asyncio.to_thread(self._journal.finish, named.request.id, named.outputs)
            for old in await asyncio.to_thread(self._journal.forget_old):
                self._named.pop(old, None)
        except sqlite3.Error as error:
            # Its client has it all; after a restart it would run once more.
            _log.warning("the end of %s is not written down: %s", named.request.id, error)
        ended = [other for other in self._named.values() if other.has_ended]
        await self._forget(ended[: max(0, len(ended) - _MOST_KEPT)])

    async def _forget(self, gone: Sequence[_Named]) -> None:
        """Drop requests, from the journal first: a name that is free has no row."""
        for named in gone:
            try:
                await asyncio.to_thread(self._journal.forget, named.request.id)
            except sqlite3.Error as error:
                _log.warning("%s stays in the journal: %s", named.request.id, error)
            self._drop(named)

    def _drop(self, named: _Named) -> None:
        if self._named.get(named.request.id) is named:
            del self._named[named.request.id]

    def _wait_for_listener(self, named: _Named) -> None:
        loop = asyncio.get_running_loop()
        named.giving_up = loop.call_later(self._grace_s, self._give_up, named)

    def _give_up(self, named: _Named) -> None:
        is_live = self._named.get(named.request.id) is named and named.error is None
        if named.num_listeners or named.has_ended or not is_live:
            return
        _log.info("request %s is given up: nobody listens", named.request.id)
        if named.running is not None:
            named.running.cancel()
        self._drop(named)
        try:
            self._journal.forget(named.request.id)
        except sqlite3.Error as error:
            _log.warning("%s stays in the journal: %s", named.request.id, error)


def _is_same(named: _Named, request: Request, owner: str) -> bool:
    """Whether a request has come again; how much time its client gives it may differ."""
    return named.owner == owner and replace(named.request, deadline_s=request.deadline_s) == request
