"""What stands around every HTTP route: who calls, the body limits, errors and disconnects.

Every error body has OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`. The table
of exceptions is `describe`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Coroutine
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from actors.engine.adapter import AdapterError
from actors.engine.requests import RequestError
from cluster.backend import Overloaded, PublishFailed, PublishInProgress, Unavailable
from cluster.gateway.access import (
    PUBLIC_PATHS,
    Access,
    Forbidden,
    Need,
    RateLimited,
    Unauthenticated,
    anonymous,
    current_caller,
)
from cluster.gateway.service import ContextLengthExceeded, GenerationFailed, NotFound

logger = logging.getLogger(__name__)

T = TypeVar("T")
Body = TypeVar("Body", bound=BaseModel)

_MAX_SCHEMA_ERRORS = 3
_INTERNAL = "the gateway failed while handling this request; its log says why"


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


class BodyTooLarge(Exception):
    """A body above the limit."""

    def __init__(self, limit: BodyLimit) -> None:
        super().__init__(
            f"the body is larger than {limit.max_bytes} bytes (gateway.{limit.bytes_setting})"
        )


class BodyTooSlow(Exception):
    """A body that was not complete in time."""

    def __init__(self, num_bytes: int, limit: BodyLimit) -> None:
        super().__init__(
            f"{num_bytes} bytes of the body had come after {limit.timeout_s:g} s, and not its end "
            f"(gateway.{limit.timeout_setting})"
        )


@dataclass(frozen=True, slots=True)
class BodyLimit:
    """How large a body may be, how long it may take, and which settings say so."""

    max_bytes: int
    timeout_s: float
    bytes_setting: str = "max_request_bytes"
    timeout_setting: str = "body_timeout_s"


class InvalidBody(Exception):
    """A body that is not JSON (400), or JSON of the wrong shape (422)."""

    def __init__(self, message: str, *, status: int, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpError:
    """An exception as HTTP tells it."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


def describe(error: Exception) -> HttpError:
    """Return what a client is told of an exception."""
    match error:
        case RequestError():
            code = "context_length_exceeded" if isinstance(error, ContextLengthExceeded) else None
            return HttpError(status=400, message=error.message, param=error.param, code=code)
        case InvalidBody():
            return HttpError(status=error.status, message=error.message, param=error.param)
        case NotFound():
            return HttpError(status=404, message=error.message, param="model", code=error.code)
        case Unauthenticated():
            return _UNAUTHENTICATED
        case Unavailable():
            return _describe_unavailable(error)
        case HTTPException():
            headers = dict(error.headers or {})
            return HttpError(status=error.status_code, message=str(error.detail), headers=headers)
        case GenerationFailed() | PublishFailed():
            return HttpError(status=500, message=str(error), type="server_error")
        case _:
            return _describe_refusal(error)


_REFUSALS: dict[type[Exception], tuple[int, str]] = {
    BodyTooLarge: (413, "request_too_large"),
    BodyTooSlow: (408, "request_too_slow"),
    Forbidden: (403, "insufficient_scope"),
    AdapterError: (400, "adapter_refused"),
    PublishInProgress: (409, "publish_in_progress"),
}


def _describe_refusal(error: Exception) -> HttpError:
    for kind, (status, code) in _REFUSALS.items():
        if isinstance(error, kind):
            return HttpError(status=status, message=str(error), code=code)
    return HttpError(status=500, message=_INTERNAL, type="server_error")


_UNAUTHENTICATED = HttpError(
    status=401,
    message="a valid token is needed: header `Authorization: Bearer <token>`",
    code="invalid_api_key",
    headers={"WWW-Authenticate": "Bearer"},
)


def _describe_unavailable(error: Unavailable) -> HttpError:
    overloaded = isinstance(error, Overloaded)
    code = "overloaded" if overloaded else "unavailable"
    return HttpError(
        status=429 if overloaded else 503,
        message=error.message,
        type="rate_limit_error" if overloaded else "service_unavailable_error",
        code="rate_limit_exceeded" if isinstance(error, RateLimited) else code,
        headers={"Retry-After": retry_after(error.retry_after_s)},
    )


def retry_after(seconds: float) -> str:
    """Return a Retry-After value: whole seconds, rounded up, at least 1."""
    return str(max(1, math.ceil(seconds)))


def is_expected(error: Exception) -> bool:
    """Whether the exception is part of the contract, so that its trace need not be logged."""
    return describe(error).message != _INTERNAL


class AccessMiddleware:
    """Lets nobody in unknown, unknown routes included, but to what is public."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] in PUBLIC_PATHS:
            with self._access.serving(anonymous(source_of(scope))):
                await self._app(scope, receive, send)
            return
        source = source_of(scope)
        with ExitStack() as stack:
            try:
                values = Headers(scope=scope).getlist("authorization")
                caller = self._access.caller(values, source)
                stack.enter_context(self._access.serving(caller))
            except (Unauthenticated, RateLimited) as error:
                what = f"{scope['method']} {scope['path']}"
                await self._access.note_refusal(error, source, what)
                await describe(error).response()(scope, receive, send)
                return
            await self._app(scope, receive, send)


def source_of(scope: Scope) -> str:
    """Return the address a call comes from."""
    host, port = scope["client"] or ("unknown", 0)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Needs:
    """A route's dependency: what its caller must be allowed to do."""

    def __init__(self, need: Need) -> None:
        self.need = need

    async def __call__(self) -> None:
        current_caller().check(self.need)


async def read_body(
    request: Request, model: type[Body], *, limit: BodyLimit, empty: Body | None = None
) -> Body:
    """Read a body within its limits and parse it; `empty` is what none at all stands for."""
    body = await read_bytes(request, limit=limit)
    if not body and empty is not None:
        return empty
    try:
        return model.model_validate_json(bytes(body))
    except ValidationError as error:
        raise _invalid_body(error) from None


async def read_bytes(request: Request, *, limit: BodyLimit) -> bytearray:
    """Read a body within its limits."""
    declared = request.headers.get("content-length")
    if declared is not None and int(declared) > limit.max_bytes:
        raise BodyTooLarge(limit)
    body = bytearray()
    try:
        async with asyncio.timeout(limit.timeout_s):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limit.max_bytes:
                    raise BodyTooLarge(limit)
                body += chunk
    except TimeoutError:
        raise BodyTooSlow(len(body), limit) from None
    return body


def _invalid_body(error: ValidationError) -> InvalidBody:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    if problems[0]["type"] == "json_invalid":
        return InvalidBody(f"the body is not JSON: {problems[0]['msg']}", status=400)
    told = [f"{_path(each['loc'])}: {each['msg']}" for each in problems[:_MAX_SCHEMA_ERRORS]]
    if len(problems) > _MAX_SCHEMA_ERRORS:
        told.append(f"and {len(problems) - _MAX_SCHEMA_ERRORS} more")
    return InvalidBody("; ".join(told), status=422, param=_path(problems[0]["loc"]))


def _path(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in location) or "body"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`; when the client goes away first, cancel it and raise `ClientGone`."""
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
