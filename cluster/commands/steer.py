"""`motley rebalance` and `motley drain`: what an operator asks of the controller, over HTTP."""

from __future__ import annotations

import json
import time
from typing import Any

from rich.text import Text

from cluster.commands.errors import NotReadyError
from cluster.commands.output import Output
from cluster.commands.status import HttpTarget, fetch_json

_PLAN_TIMEOUT_S = 120.0
_POLL_S = 0.5


def rebalance(target: HttpTarget, output: Output, *, is_dry: bool) -> None:
    """Say what the controller would do now; unless it is dry, have it done."""
    if is_dry:
        answer = fetch_json(target, "/controller", timeout_s=_PLAN_TIMEOUT_S)
    else:
        answer = fetch_json(
            target, "/controller/rebalance", timeout_s=_PLAN_TIMEOUT_S, method="POST"
        )
    would = answer["would"]
    verdict = would["verdict"]
    if not is_dry:
        verdict = verdict.replace("would move:", "moving:", 1).partition("; by itself")[0]
    output.result(answer, Text(f"{target.url}: {verdict}"), Text(_cut_text(would)))


def drain(target: HttpTarget, node: str, output: Output, *, cancel: bool, timeout_s: float) -> None:
    """Let a node hold nothing, and wait until it does; or use it again.

    Raises:
        RefusedError: There is no such node.
        NotReadyError: It still holds something after `timeout_s`.
    """
    body = json.dumps({"node": node, "cancel": cancel}).encode()
    fetch_json(target, "/controller/drain", method="POST", body=body)
    if cancel:
        output.result({"node": node, "drained": False}, Text(f"{node} may be used again"))
        return
    deadline_s = time.monotonic() + timeout_s
    while held := _held_on(target, node):
        if time.monotonic() > deadline_s:
            controller = fetch_json(target, "/controller")["controller"]
            reason = controller.get("drains", {}).get(node) or controller["reason"]
            raise NotReadyError(
                f"{node} still holds {', '.join(held)} after {timeout_s:g} s: {reason}; the "
                f"drain stands until `motley drain {node} --cancel`"
            )
        time.sleep(_POLL_S)
    output.result({"node": node, "drained": True}, Text(f"{node} holds nothing any more"))


def _held_on(target: HttpTarget, node: str) -> list[str]:
    """Name stages on a node; once there are none, devices with experts."""
    status = fetch_json(target, "/status")
    stages = [
        f"layers {stage['first_layer']} to {stage['end_layer']} on {stage['device']}"
        for stage in status["stages"]
        if stage["node"] == node
    ]
    if stages:
        return stages
    controller = fetch_json(target, "/controller", timeout_s=_PLAN_TIMEOUT_S)["controller"]
    experts = controller.get("experts", {"nodes": {}})
    return [
        f"{experts['copies'][device]} experts on {device}"
        for device, at in experts["nodes"].items()
        if at == node
    ]


def _cut_text(would: dict[str, Any]) -> str:
    if would["cut"] is None:
        return ""
    return ", ".join(f"{device}: {layers} layers" for device, layers in would["cut"].items())
