"""`motley status`: what a running deployment is doing, over HTTP."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.text import Text

from cluster.commands.errors import NotReadyError, RefusedError, UnauthorizedError
from cluster.commands.output import Output
from cluster.commands.tables import lane_table, runs_table, status_table
from cluster.gateway.settings import is_loopback
from cluster.runstate import NotRunningError
from cluster.trainstate import training_states


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpTarget:
    """Where a gateway listens for HTTP and how to be let in."""

    url: str
    token: str = field(repr=False)
    tls_cert_file: Path | None = None
    tls_client_cert_file: Path | None = None
    tls_client_key_file: Path | None = None


def show_status(target: HttpTarget, output: Output) -> None:
    """Write the deployment's status, and for people this machine's training runs.

    Raises:
        NotReadyError: It is not ready; after writing.
    """
    status = fetch_json(target, "/status")
    state = "ready" if status["ready"] else f"not ready: {status['reason']}"
    runs = training_states()
    output.result(
        status,
        Text(f"{target.url}: {state}, plan {status['epoch']}, {adapter_text(status['adapter'])}"),
        status_table(status["stages"]),
        lane_table(status["lanes"]),
        *([Text(controller_text(controller))] if (controller := status.get("controller")) else []),
        *([runs_table(runs)] if runs else []),
    )
    if not status["ready"]:
        raise NotReadyError(
            f"{target.url} is not ready: {status['reason']} ({status['progress']:.0%} loaded)"
        )


def controller_text(controller: Mapping[str, Any]) -> str:
    """Say in a line what the controller does and has done."""
    text = f"controller: {controller['phase']}"
    if controller["moves"]:
        moves = ", ".join(f"{n} {outcome}" for outcome, n in sorted(controller["moves"].items()))
        text += f"; rebalances: {moves}; last pause {controller['last_pause_s'] * 1e3:.0f} ms"
    return f"{text} (`motley rebalance --dry-run` says more)"


def adapter_text(adapter: Mapping[str, Any]) -> str:
    """Name the adapter that requests are answered with."""
    if adapter["name"] is None:
        return "no adapter"
    return f"adapter {adapter['name']} (version {adapter['version']})"


def fetch_json(
    target: HttpTarget,
    path: str,
    *,
    timeout_s: float = 10.0,
    method: str = "GET",
    body: bytes | None = None,
) -> dict[str, Any]:
    """Ask the gateway for a JSON object; `body` is sent as it is.

    Raises:
        NotRunningError: Nothing answers there.
        UnauthorizedError: The token or key is wrong, or lacks the scope.
        NotReadyError: It answers 503, 429 because the key's rate is used up, or 409 because it is
            busy with another such request.
        RefusedError: It answers 400 or 413.
    """
    headers = {"Authorization": f"Bearer {target.token}"}
    if body is not None:
        headers["Content-Type"] = "application/octet-stream"
    url = target.url.rstrip("/") + path
    request = urllib.request.Request(url, data=body, headers=headers, method=method)
    try:
        with _opener(target).open(request, timeout=timeout_s) as response:
            value = json.load(response)
    except urllib.error.HTTPError as error:
        raise _refused(target, path, error) from None
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise NotRunningError(
            f"nothing answers at {target.url} ({reason}); start a deployment with `motley up`, or "
            f"name one with --url"
        ) from None
    except ValueError as error:
        raise RuntimeError(f"{target.url}{path} gave no JSON ({error}); is it a gateway?") from None
    if not isinstance(value, dict):
        raise RuntimeError(f"{target.url}{path} answered {type(value).__name__}, not an object")
    return value


def _opener(target: HttpTarget) -> urllib.request.OpenerDirector:
    handlers: list[urllib.request.BaseHandler] = []
    if target.tls_cert_file is not None or target.tls_client_cert_file is not None:
        context = ssl.create_default_context(cafile=target.tls_cert_file)
        if target.tls_client_cert_file is not None:
            context.load_cert_chain(target.tls_client_cert_file, target.tls_client_key_file)
        handlers.append(urllib.request.HTTPSHandler(context=context))
    if is_loopback(urlsplit(target.url).hostname or ""):
        # A proxy from the environment cannot reach this machine's loopback.
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers)


def _refused(target: HttpTarget, path: str, error: urllib.error.HTTPError) -> RuntimeError:
    body = _message(error.read(20_000).decode(errors="replace"))
    if error.code == 401:
        return UnauthorizedError(
            f"{target.url} refused the token (401); set --token or MOTLEY_TOKEN"
        )
    if error.code == 403:
        return UnauthorizedError(f"{target.url} refused (403): {body}")
    if error.code in (409, 429, 503):
        return NotReadyError(f"{target.url} cannot answer now ({error.code}): {body}")
    if error.code in (400, 413):
        return RefusedError(f"{target.url} refused ({error.code}): {body}")
    return RuntimeError(f"{target.url}{path} answered {error.code}: {body}")


def _message(body: str) -> str:
    """The gateway's own sentence, or what else came."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, TypeError, KeyError):
        return body[:2000]
