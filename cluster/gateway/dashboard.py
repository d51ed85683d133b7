"""What the page at `/` shows, as plain JSON values: one reading in, one document out.

Counters become rates over the last few seconds of readings, so a rate needs two of them; it is null
until then. Everything predicted is the plan's, everything measured the deployment's own report. No
clock and no I/O: a reading carries its time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.backend import DeploymentStatus, ModelInfo, StageStatus
from cluster.trainstate import TrainingState

WINDOW_S = 6.0
"""Stages report between steps, four times a second at most; a shorter window would flicker."""
_MOVES = 12
_RUNS = 8
_HIDDEN = {"output", "pid", "stride"}
"""Of a training run: a key that may generate need not know paths of the machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What clients asked for since the gateway started."""

    requests: Mapping[str, float]
    """By outcome."""
    prompt_tokens: float
    generated_tokens: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """Everything that is known at one time."""

    monotonic_s: float
    unix_s: float
    version: str
    model: ModelInfo
    plan: Mapping[str, Any]
    status: DeploymentStatus
    controller: Mapping[str, Any] | None
    trainings: Sequence[TrainingState]
    traffic: Traffic


class Dashboard:
    """Remembers the counters of the last seconds."""

    def __init__(self) -> None:
        self._past: deque[tuple[float, dict[str, float]]] = deque()

    def show(self, reading: Reading) -> dict[str, Any]:
        """Return the document of a reading; readings come in the order of their times."""
        now_s = reading.monotonic_s
        rates = self._rates(now_s, _counters(reading))
        status = reading.status
        value = {
            "unix_s": reading.unix_s,
            "version": reading.version,
            "model": asdict(reading.model),
            "ready": status.ready,
            "reason": status.reason,
            "progress": status.progress,
            "epoch": status.epoch,
            "adapter": asdict(status.adapter),
            "plan": _plan(reading.plan),
            "stages": _stages(reading, rates),
            "links": _links(status, rates),
            "lanes": [asdict(lane) for lane in status.lanes],
            "traffic": _traffic(reading.traffic, rates),
            "trainings": [_training(run) for run in reading.trainings[:_RUNS]],
            "controller": _controller(reading.controller),
        }
        plain: dict[str, Any] = _plain(value)
        return plain

    def _rates(self, now_s: float, counters: dict[str, float]) -> dict[str, float]:
        """Return how fast each counter rose since the oldest reading of the window.

        A counter that fell was started anew: it has no rate until the window has passed it.
        """
        while self._past and now_s - self._past[0][0] > WINDOW_S:
            self._past.popleft()
        rates = {}
        if self._past and now_s > self._past[0][0]:
            then_s, before = self._past[0]
            rates = {
                name: (value - before[name]) / (now_s - then_s)
                for name, value in counters.items()
                if name in before and value >= before[name]
            }
        self._past.append((now_s, counters))
        return rates


def _counters(reading: Reading) -> dict[str, float]:
    counters = {
        "generated": reading.traffic.generated_tokens,
        "prompt": reading.traffic.prompt_tokens,
        "completed": reading.traffic.requests.get("completed", 0.0),
    }
    for stage in reading.status.stages:
        counters[f"busy {stage.index} {stage.device}"] = stage.busy_s
        counters[f"steps {stage.index} {stage.device}"] = float(stage.steps)
    for (source, target), num_bytes in _bytes_by_link(reading.status).items():
        counters[f"link {source}->{target}"] = float(num_bytes)
    return counters


def _plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    names = (
        "objective",
        "predicted_tokens_per_s",
        "bottleneck_s",
        "period_s",
        "latency_s",
        "objective_value",
        "objective_lower_bound",
        "is_exact",
        "kv_tokens_capacity",
    )
    return {name: plan.get(name) for name in names} | {
        "left_out": [
            {"device": device, "reason": reason} for device, reason in plan.get("left_out", ())
        ]
    }


def _stages(reading: Reading, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return each stage with what was planned for its device, where the plan knows it."""
    planned = {stage.get("device_id"): stage for stage in reading.plan.get("stages", ())}
    controller = reading.controller or {}
    factors, draining = controller.get("factors") or {}, controller.get("draining") or ()
    return [
        asdict(stage)
        | _figures(stage, planned.get(stage.device, {}), reading.plan, rates)
        | {"factor": factors.get(stage.device), "draining": stage.node in draining}
        for stage in reading.status.stages
    ]


def _figures(
    stage: StageStatus,
    placed: Mapping[str, Any],
    plan: Mapping[str, Any],
    rates: Mapping[str, float],
) -> dict[str, Any]:
    step_s, period_s = placed.get("step_s"), plan.get("period_s")
    busy = rates.get(f"busy {stage.index} {stage.device}")
    steps = rates.get(f"steps {stage.index} {stage.device}")
    parts = [placed.get(f"{part}_bytes") for part in ("weight", "kv", "activation")]
    return {
        "kind": placed.get("kind"),
        "num_experts": placed.get("num_experts"),
        "need_bytes": None if None in parts else sum(part for part in parts if part is not None),
        "memory_cap_bytes": placed.get("memory_cap_bytes"),
        "predicted_step_s": step_s,
        "predicted_busy": step_s / period_s if step_s is not None and period_s else None,
        # A report that comes late can hold more work than the time between two readings.
        "busy": None if busy is None else min(1.0, busy),
        "step_s": busy / steps if busy is not None and steps else None,
    }


def _links(status: DeploymentStatus, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "source": source,
            "target": target,
            "bytes": num_bytes,
            "bytes_per_s": rates.get(f"link {source}->{target}"),
        }
        for (source, target), num_bytes in _bytes_by_link(status).items()
    ]


def _bytes_by_link(status: DeploymentStatus) -> dict[tuple[str, str], int]:
    """Return the bytes sent from device to device; all lanes are one end, called "lanes"."""
    devices = {stage.device for stage in status.stages}
    lanes = {f"lane-{lane.index}" for lane in status.lanes} - devices
    totals: dict[tuple[str, str], int] = {}
    for link, num_bytes in status.link_bytes.items():
        source, _, target = link.partition("->")
        ends = ("lanes" if source in lanes else source, "lanes" if target in lanes else target)
        totals[ends] = totals.get(ends, 0) + num_bytes
    return totals


def _traffic(traffic: Traffic, rates: Mapping[str, float]) -> dict[str, Any]:
    return {
        "tokens_per_s": rates.get("generated"),
        "prompt_tokens_per_s": rates.get("prompt"),
        "requests_per_s": rates.get("completed"),
        "generated_tokens": traffic.generated_tokens,
        "prompt_tokens": traffic.prompt_tokens,
        "requests": dict(traffic.requests),
    }


def _training(run: TrainingState) -> dict[str, Any]:
    return {key: value for key, value in asdict(run).items() if key not in _HIDDEN}


def _controller(controller: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return its state with the last moves, newest first."""
    if controller is None:
        return None
    moves = list(controller.get("moves") or ())[-_MOVES:]
    return dict(controller) | {"moves": moves[::-1]}


def _plain(value: object) -> Any:
    """Return JSON values; null for a number that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
