"""Server-sent events: an answer as a stream of `data:` lines.

Nothing is sent before the first event exists, so a request that is refused still gets its proper
status. A failure after that is sent as one event with an `error` object, and the stream ends
without [DONE]. A client that goes away closes the events at once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.gateway.http_guard import ClientGone, describe, is_expected, until_disconnect

logger = logging.getLogger(__name__)

Json = dict[str, Any]

DONE = b"data: [DONE]\n\n"

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would otherwise hold events back
]


def event(value: Json) -> bytes:
    """Return one event."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"


class EventStream(Response):
    """A response that sends each JSON object as it comes, then [DONE]."""

    def __init__(self, values: AsyncGenerator[Json, None]) -> None:
        super().__init__()
        self._values = values

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._run(scope, receive, send))
        except ClientGone:
            logger.debug("a client left its stream")

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_started = False
        try:
            async with aclosing(self._values) as values:
                async for value in values:
                    if not has_started:
                        has_started = True
                        await send(
                            {"type": "http.response.start", "status": 200, "headers": _HEADERS}
                        )
                    await _send_body(send, event(value), more=True)
            await _send_body(send, DONE, more=False)
        except Exception as error:  # the last layer: each has a description
            if not is_expected(error):
                logger.error("a stream failed", exc_info=error)
            if has_started:
                await _send_body(send, event(describe(error).body()), more=False)
            else:
                await describe(error).response()(scope, receive, send)


async def _send_body(send: Send, body: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
