"""What stands around every HTTP route: the token, the body limit, errors and disconnects.

Every error body has OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`. The table
of exceptions is `describe`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Coroutine
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
from cluster.gateway.auth import BearerAuth
from cluster.gateway.service import ContextLengthExceeded, GenerationFailed, NotFound

logger = logging.getLogger(__name__)

T = TypeVar("T")
Body = TypeVar("Body", bound=BaseModel)

_MAX_SCHEMA_ERRORS = 3
_OPEN_PATHS = frozenset({"/", "/health"})
"""What is shown to everybody: a page without data, and that the process lives."""
_INTERNAL = "the gateway failed while handling this request; its log says why"


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


class BodyTooLarge(Exception):
    """A body above the limit."""

    def __init__(self, limit_bytes: int, setting: str) -> None:
        super().__init__(limit_bytes, setting)
        self.limit_bytes = limit_bytes
        self.setting = setting


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
        case BodyTooLarge():
            text = f"the body is larger than {error.limit_bytes} bytes (gateway.{error.setting})"
            return HttpError(status=413, message=text, code="request_too_large")
        case AdapterError():
            return HttpError(status=400, message=str(error), code="adapter_refused")
        case PublishInProgress():
            return HttpError(status=409, message=str(error), code="publish_in_progress")
        case Unavailable():
            return _describe_unavailable(error)
        case HTTPException():
            headers = dict(error.headers or {})
            return HttpError(status=error.status_code, message=str(error.detail), headers=headers)
        case GenerationFailed() | PublishFailed():
            return HttpError(status=500, message=str(error), type="server_error")
        case _:
            return HttpError(status=500, message=_INTERNAL, type="server_error")


def _describe_unavailable(error: Unavailable) -> HttpError:
    overloaded = isinstance(error, Overloaded)
    return HttpError(
        status=429 if overloaded else 503,
        message=error.message,
        type="rate_limit_error" if overloaded else "service_unavailable_error",
        code="overloaded" if overloaded else "unavailable",
        headers={"Retry-After": retry_after(error.retry_after_s)},
    )


def retry_after(seconds: float) -> str:
    """Return a Retry-After value: whole seconds, rounded up, at least 1."""
    return str(max(1, math.ceil(seconds)))


def is_expected(error: Exception) -> bool:
    """Whether the exception is part of the contract, so that its trace need not be logged."""
    return describe(error).message != _INTERNAL


class BearerMiddleware:
    """Answers 401 without the token to all but the open paths, unknown routes included."""

    def __init__(self, app: ASGIApp, auth: BearerAuth) -> None:
        self._app = app
        self._auth = auth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_allowed(scope):
            refusal = HttpError(
                status=401,
                message="a valid token is needed: header `Authorization: Bearer <token>`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await refusal.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        if scope["path"] in _OPEN_PATHS:
            return True
        values = Headers(scope=scope).getlist("authorization")
        return len(values) == 1 and self._auth.accepts(values[0])


async def read_body(request: Request, model: type[Body], *, limit_bytes: int) -> Body:
    """Read at most `limit_bytes` of body and parse it."""
    body = await read_bytes(request, limit_bytes=limit_bytes, setting="max_request_bytes")
    try:
        return model.model_validate_json(bytes(body))
    except ValidationError as error:
        raise _invalid_body(error) from None


async def read_bytes(request: Request, *, limit_bytes: int, setting: str) -> bytearray:
    """Read a body of at most `limit_bytes`, which `setting` of the gateway says."""
    declared = request.headers.get("content-length")
    if declared is not None and int(declared) > limit_bytes:
        raise BodyTooLarge(limit_bytes, setting)
    body = bytearray()
    async for chunk in request.stream():
        if len(body) + len(chunk) > limit_bytes:
            raise BodyTooLarge(limit_bytes, setting)
        body += chunk
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
