"""What the gateway needs of a running deployment, as a protocol.

The dispatcher over real lanes implements it (`cluster.dispatch`); a fake one serves in unit tests.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from actors.engine.adapter import Adapter
from actors.engine.requests import Request, RequestOutput


class Unavailable(RuntimeError):
    """The deployment cannot take the request now; retry after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class Overloaded(Unavailable):
    """Every lane's queue is full."""


class PublishInProgress(RuntimeError):
    """Adapters are published one at a time, and one is on its way."""


class PublishFailed(RuntimeError):
    """An adapter could not be put to use; the one before it serves on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """The served checkpoint, as clients see it."""

    name: str
    architecture: str
    vocab_size: int
    num_layers: int
    max_model_tokens: int
    eos_token_ids: tuple[int, ...]
    num_parameters: int
    dtype: str
    created_unix_s: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StageStatus:
    """One stage: where it is, whether it serves, and what it has done since it was placed."""

    index: int
    device: str
    node: str
    first_layer: int
    end_layer: int
    active: bool
    loaded_fraction: float = 0.0
    busy_s: float = 0.0
    steps: int = 0
    late_s: float = 0.0
    """Paced devices only: seconds by which the real work outlasted the declared time."""
    link_bytes: int = 0
    """Bytes this stage sent on (to the next stage, or to the lanes)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaneStatus:
    """One lane: its queue and its KV blocks."""

    index: int
    running: int = 0
    waiting: int = 0
    blocks_in_use: int = 0
    """Blocks held by live sequences (cached but unreferenced blocks are not in use)."""
    num_blocks: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterStatus:
    """The adapter that requests are answered with."""

    name: str | None = None
    """None: none, the base model answers."""
    version: int = 0
    """Counts publications, failed ones too; 0: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """An adapter that came into use."""

    name: str | None
    version: int
    seconds: float
    """From taking it to every lane using it."""
    pause_s: float
    """The longest that a lane spent on the switch instead of stepping."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerStatus:
    """What the controller has decided since the deployment came up."""

    phase: str
    """In one word: what it does now."""
    epoch: int
    """Number of the plan that it asked for last; the one in force follows it."""
    moves: Mapping[str, int] = field(default_factory=dict)
    """Rebalances that have ended, by outcome."""
    num_pauses: int = 0
    """Switches from one plan to the next, at each of which the lanes were held."""
    pause_s: float = 0.0
    """How long they were held, all switches together."""
    last_pause_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploymentStatus:
    """A snapshot of everything."""

    ready: bool
    reason: str = ""
    """Why it is not ready, fit for a client to read."""
    progress: float = 0.0
    """Share of the stages' weights loaded, 0 to 1."""
    epoch: int = 0
    stages: tuple[StageStatus, ...] = ()
    lanes: tuple[LaneStatus, ...] = ()
    link_bytes: dict[str, int] = field(default_factory=dict)
    """Bytes sent over each link, keyed "from->to" with device (or lane) names."""
    adapter: AdapterStatus = AdapterStatus()
    controller: ControllerStatus | None = None
    """None: the plan is not steered."""


class Steering(Protocol):
    """What an operator may ask of the controller. From the event loop."""

    def status(self) -> ControllerStatus: ...

    def document(self) -> dict[str, object]:
        """See `Backend.controller_json`."""
        ...

    async def would_move(self) -> dict[str, object]:
        """Return the plan that would be best now: "verdict" in words, and "cut" (device id:
        layers), or null where nothing fits."""
        ...

    def rebalance(self) -> None:
        """Have the best plan now, if it gains anything."""
        ...

    def drain(self, node: str, *, cancel: bool) -> None:
        """Let a node hold nothing, or use it again.

        Raises:
            RequestError: There is no such node.
        """
        ...


class Backend(Protocol):
    """A deployment behind the gateway."""

    def steering(self) -> Steering:
        """The controller, once it steers.

        Raises:
            Unavailable: It does not, yet.
        """
        ...

    def model_info(self) -> ModelInfo: ...

    def plan_json(self) -> dict[str, object]:
        """The plan in force, as plain JSON values (see `placement.stages`)."""
        ...

    async def status(self) -> DeploymentStatus: ...

    def controller_json(self) -> dict[str, object] | None:
        """What moves layers is doing, as plain JSON values; None: nothing moves them.

        "phase" ("idle", "moving", "trial", "halted"), "epoch", "reason", "draining" (nodes),
        "factors" (device id: how many times slower than planned), "links" (as measured while
        serving: "source_node", "target_node", "bandwidth_bytes_per_s", "latency_s") and "moves",
        the last one last: "at_s" (Unix), "epoch", "from" and "to" (device id: layers), "reason",
        "predicted_gain" and "measured_gain" (fractions or null), "pause_s" (or null), "outcome"
        ("kept", "rolled back", "running", "failed", "recovery").

        Where experts are sharded also "experts": "version" (of the map in force), "reason" (why
        nothing is served, or what was last decided), "is_moving", "maps" (that came into force),
        "copies" (device id: experts of all layers), "nodes" (device id: its node), "layers" (those
        of the model that have some), by these "loads" (of each expert, 1 is the layer's mean) and
        "replicas" (how many devices hold it), "changes" (the last maps, the newest last: "at_s"
        (Unix), "version", "reason", "copies" that are new: "device_id", "layer", "expert"),
        "guests" (device id: experts that it took in for rows of long prompts) and "recoveries"
        ("device_id", "seconds", "reason").
        """
        ...

    def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Admit the request and stream its outputs until every choice has finished.

        Closing the iterator early (or cancelling the task) aborts the request and frees its
        blocks. Raises `RequestError` for a request that can never be served, `Overloaded` or
        `Unavailable` when it cannot be taken now; all before the first output.
        """
        ...

    async def abort(self, request_id: str) -> bool:
        """End a request in flight; its stream closes with finish_reason "abort". False: unknown."""
        ...

    def adapter(self) -> AdapterStatus:
        """The adapter in use."""
        ...

    async def publish(self, adapter: Adapter | None) -> Published:
        """Put an adapter to use in all lanes, each between two of its steps; None: use none.

        Raises:
            AdapterError: It does not fit the model. Nothing has changed.
            PublishInProgress: Another is being published.
            PublishFailed: A stage or lane did not take it. The one before is in use.
            Unavailable: The deployment is not ready.
        """
        ...
