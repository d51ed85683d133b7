"""What the gateway measures, in Prometheus' words, and the only place that configures logging.

Request metrics are observed as requests run. Everything about stages, lanes and links is read
from the latest `DeploymentStatus` when the metrics are rendered, so nothing is counted twice; a
stage that is gone is shown as not active. All names begin with `motley_` and end in their unit.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from actors.engine.requests import Request, RequestError, RequestOutput
from cluster.backend import (
    ControllerStatus,
    DeploymentStatus,
    LaneStatus,
    ModelInfo,
    Overloaded,
    Unavailable,
)

Outcome = Literal[
    "completed", "aborted", "cancelled", "failed", "invalid", "overloaded", "unavailable"
]
"""cancelled: the client went away; aborted: ended by Abort or by a shutdown; failed: our fault."""

METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# From one step of a small model on a server to a long prompt over thin links.
_LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)


class GatewayMetrics:
    """The metrics of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._first_token = Histogram(
            "motley_time_to_first_token_seconds",
            "From admission by the gateway to a request's first token.",
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self._inter_token = Histogram(
            "motley_inter_token_latency_seconds",
            "Between two tokens of one choice; tokens that arrive together share their gap.",
            buckets=_TOKEN_BUCKETS_S,
            registry=self.registry,
        )
        self._duration = Histogram(
            "motley_request_duration_seconds",
            "From admission by the gateway to the end of the last choice; completed requests.",
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self._requests = Counter(
            "motley_requests",
            "Generation requests by outcome.",
            ["outcome"],
            registry=self.registry,
        )
        self._prompt_tokens = Counter(
            "motley_prompt_tokens", "Prompt tokens of admitted requests.", registry=self.registry
        )
        self._generated_tokens = Counter(
            "motley_generated_tokens", "Tokens generated, all choices.", registry=self.registry
        )
        self._deployment = _DeploymentCollector()
        self.registry.register(self._deployment)

    def count(self, outcome: Outcome) -> None:
        self._requests.labels(outcome).inc()

    @contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """Count a refusal that passes through; nothing else is changed."""
        try:
            yield
        except RequestError:
            self.count("invalid")
            raise
        except Overloaded:
            self.count("overloaded")
            raise
        except Unavailable:
            self.count("unavailable")
            raise

    def track(self, request: Request, clock: Callable[[], float]) -> RequestTimer:
        """Start timing one request."""
        return RequestTimer(self, request, clock)

    def render(self, status: DeploymentStatus, info: ModelInfo | None) -> bytes:
        """Return the exposition text, with the deployment as `status` shows it."""
        self._deployment.show(status, info)
        return generate_latest(self.registry)

    def observe_first(self, seconds: float, prompt_tokens: int) -> None:
        self._first_token.observe(seconds)
        self._prompt_tokens.inc(prompt_tokens)

    def observe_gap(self, seconds: float, num_tokens: int) -> None:
        for _ in range(num_tokens):
            self._inter_token.observe(seconds / num_tokens)

    def observe_tokens(self, num_tokens: int) -> None:
        self._generated_tokens.inc(num_tokens)

    def observe_duration(self, seconds: float) -> None:
        self._duration.observe(seconds)


class RequestTimer:
    """Watches the outputs of one request go by."""

    def __init__(
        self, metrics: GatewayMetrics, request: Request, clock: Callable[[], float]
    ) -> None:
        self._metrics = metrics
        self._prompt_tokens = len(request.prompt)
        self._clock = clock
        self._start_s = clock()
        self._has_output = False
        self._last_s: dict[int, float] = {}

    def saw(self, output: RequestOutput) -> None:
        now_s = self._clock()
        if not self._has_output:
            self._has_output = True
            self._metrics.observe_first(now_s - self._start_s, self._prompt_tokens)
        if not output.tokens:
            return
        last_s = self._last_s.get(output.index)
        if last_s is not None:
            self._metrics.observe_gap(now_s - last_s, len(output.tokens))
        self._last_s[output.index] = now_s
        self._metrics.observe_tokens(len(output.tokens))

    def ended(self, outcome: Outcome) -> None:
        if outcome == "completed":
            self._metrics.observe_duration(self._clock() - self._start_s)
        self._metrics.count(outcome)


class _DeploymentCollector(Collector):
    """Turns the latest snapshot into metric families."""

    def __init__(self) -> None:
        self._status = DeploymentStatus(ready=False)
        self._info: ModelInfo | None = None

    def show(self, status: DeploymentStatus, info: ModelInfo | None) -> None:
        self._status = status
        self._info = info

    def collect(self) -> Iterable[Metric]:
        yield from self._overall()
        yield from self._stages()
        yield from self._lanes()
        links = CounterMetricFamily("motley_link_bytes", "Bytes sent over a link.", labels=["link"])
        for link, num_bytes in sorted(self._status.link_bytes.items()):
            links.add_metric([link], num_bytes)
        yield links
        if self._status.controller is not None:
            yield from _controller_families(self._status.controller)

    def _overall(self) -> Iterable[Metric]:
        status = self._status
        yield GaugeMetricFamily("motley_ready", "1 when requests are served.", status.ready)
        yield GaugeMetricFamily(
            "motley_load_progress_ratio", "Share of the stages' weights loaded.", status.progress
        )
        yield GaugeMetricFamily("motley_plan_epoch", "Number of the plan in force.", status.epoch)
        build = InfoMetricFamily("motley_build", "The software and the model it serves.")
        model = self._info.name if self._info else ""
        build.add_metric([], {"version": software_version(), "model": model})
        yield build

    def _stages(self) -> Iterable[Metric]:
        labels = ["stage", "device", "node"]
        busy = CounterMetricFamily(
            "motley_stage_busy_seconds", "Seconds a stage computed.", labels=labels
        )
        late = CounterMetricFamily(
            "motley_stage_late_seconds",
            "Seconds by which real work outlasted a paced device's declared time.",
            labels=labels,
        )
        steps = CounterMetricFamily("motley_stage_steps", "Steps a stage ran.", labels=labels)
        sent = CounterMetricFamily("motley_stage_sent_bytes", "Bytes a stage sent.", labels=labels)
        active = GaugeMetricFamily("motley_stage_active", "1 when a stage serves.", labels=labels)
        for stage in self._status.stages:
            values = [str(stage.index), stage.device, stage.node]
            busy.add_metric(values, stage.busy_s)
            late.add_metric(values, stage.late_s)
            steps.add_metric(values, stage.steps)
            sent.add_metric(values, stage.link_bytes)
            active.add_metric(values, stage.active)
        yield from (busy, late, steps, sent, active)

    def _lanes(self) -> Iterable[Metric]:
        gauges: list[tuple[str, str, Callable[[LaneStatus], int]]] = [
            ("motley_lane_running_requests", "Sequences that decode.", lambda x: x.running),
            ("motley_lane_waiting_requests", "Requests in the queue.", lambda x: x.waiting),
            ("motley_lane_kv_blocks_in_use", "KV blocks held.", lambda x: x.blocks_in_use),
            ("motley_lane_kv_blocks", "KV blocks in all.", lambda x: x.num_blocks),
        ]
        counters: list[tuple[str, str, Callable[[LaneStatus], int]]] = [
            ("motley_lane_preemptions", "Sequences put back to wait.", lambda x: x.preemptions),
            (
                "motley_lane_prefix_hit_tokens",
                "Prompt tokens taken from the prefix cache.",
                lambda x: x.prefix_hit_tokens,
            ),
        ]
        for name, text, value_of in gauges:
            yield self._per_lane(GaugeMetricFamily(name, text, labels=["lane"]), value_of)
        for name, text, value_of in counters:
            yield self._per_lane(CounterMetricFamily(name, text, labels=["lane"]), value_of)

    def _per_lane(
        self,
        family: GaugeMetricFamily | CounterMetricFamily,
        value_of: Callable[[LaneStatus], int],
    ) -> Metric:
        for lane in self._status.lanes:
            family.add_metric([str(lane.index)], value_of(lane))
        return family


def _controller_families(controller: ControllerStatus) -> Iterable[Metric]:
    yield GaugeMetricFamily(
        "motley_controller_epoch", "Number of the plan asked for last.", controller.epoch
    )
    phase = GaugeMetricFamily(
        "motley_controller_phase", "1 for what the controller does now.", labels=["phase"]
    )
    phase.add_metric([controller.phase], 1)
    yield phase
    moves = CounterMetricFamily(
        "motley_controller_moves", "Rebalances that have ended.", labels=["outcome"]
    )
    for outcome, count in sorted(controller.moves.items()):
        moves.add_metric([outcome], count)
    yield moves
    yield SummaryMetricFamily(
        "motley_controller_pause_seconds",
        "How long lanes were held at a switch of plans.",
        count_value=controller.num_pauses,
        sum_value=controller.pause_s,
    )
    yield GaugeMetricFamily(
        "motley_controller_last_pause_seconds", "The latest such pause.", controller.last_pause_s
    )


def software_version() -> str:
    """Return Motley's version, or `unknown` when it runs from a tree that is not installed."""
    try:
        return metadata.version("motley")
    except metadata.PackageNotFoundError:
        return "unknown"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def configure_logging(level: str = "INFO", *, as_json: bool = False) -> None:
    """Send every log record to standard error, one event per line."""
    handler = logging.StreamHandler(sys.stderr)
    if as_json:
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # One line per connection at INFO says nothing that the metrics do not.
    for name in ("uvicorn", "uvicorn.error", "httpx", "grpc"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
