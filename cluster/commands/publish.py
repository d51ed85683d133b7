"""`motley publish`: bring an adapter into use in a running deployment, over HTTP."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.text import Text

from actors.engine.adapter import Adapter
from cluster.commands.errors import RefusedError
from cluster.commands.output import Output
from cluster.commands.status import HttpTarget, adapter_text, fetch_json

_PATH = "/v1/adapter"


def publish(target: HttpTarget, folder: Path, output: Output, *, timeout_s: float) -> None:
    """Check an adapter against itself, send it, and say what came into use.

    Raises:
        AdapterError: It is damaged or of a kind that is not served; nothing was sent.
        RefusedError: It is too large, or does not fit the base model.
        NotReadyError: Another is being published, or the deployment is not ready.
    """
    began_s = time.monotonic()
    message = Adapter.read(folder).encode()
    # Asked first: a gateway that refuses a body half-way may not be heard.
    limit_bytes = fetch_json(target, _PATH)["max_bytes"]
    if len(message) > limit_bytes:
        raise RefusedError(
            f"{folder} takes {len(message)} bytes to send; {target.url} takes {limit_bytes} "
            "(gateway.max_adapter_bytes)"
        )
    answer = fetch_json(target, _PATH, timeout_s=timeout_s, method="POST", body=message)
    seconds = time.monotonic() - began_s
    _show(answer | {"total_seconds": seconds, "num_bytes": len(message)}, output, target)


def remove(target: HttpTarget, output: Output, *, timeout_s: float) -> None:
    """Go back to the base model."""
    answer = fetch_json(target, _PATH, timeout_s=timeout_s, method="DELETE")
    _show(answer, output, target)


def _show(answer: dict[str, Any], output: Output, target: HttpTarget) -> None:
    output.result(
        answer,
        Text(
            f"{target.url}: {adapter_text(answer)} in use after {answer['seconds']:.2f} s; lanes "
            f"paused for {answer['pause_s'] * 1e3:.2f} ms"
        ),
    )
