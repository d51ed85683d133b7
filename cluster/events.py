"""What the launcher tells whoever started it, in the order in which it happens.

`Planned` once, `StageProgress` as weights arrive, `Ready` once every stage serves, `Stopped` last.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from placement.stages import StagesPlan


@dataclass(frozen=True, slots=True)
class Planned:
    """The devices are known and the layers are cut."""

    plan: StagesPlan
    verdict: str
    """Whether to split the model, in words."""


@dataclass(frozen=True, slots=True)
class StageProgress:
    """A stage has loaded this share of its weights; 1.0 is loaded and warm."""

    index: int
    device: str
    loaded_fraction: float


@dataclass(frozen=True, slots=True)
class Ready:
    """Every stage and lane serves, and the gateway listens."""

    http_url: str
    grpc_target: str
    token: str = field(repr=False)
    seconds: float
    """From the start of the launch."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """Everything this launch started is gone."""

    reason: str


LaunchEvent = Planned | StageProgress | Ready | Stopped


def event_json(event: LaunchEvent) -> dict[str, Any]:
    """Return plain JSON values, the event's name under "event"."""
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
    if isinstance(event, Planned):
        return {"event": name, "plan": event.plan.to_json(), "verdict": event.verdict}
    return {"event": name, **asdict(event)}


def event_from_json(value: Mapping[str, Any]) -> LaunchEvent:
    """Return the event that `event_json` made these values of."""
    name = "".join(part.title() for part in value["event"].split("_"))
    fields = {key: field for key, field in value.items() if key != "event"}
    if name == Planned.__name__:
        return Planned(StagesPlan.from_json(fields["plan"]), fields["verdict"])
    return _FLAT_EVENTS[name](**fields)


_FLAT_EVENTS: dict[str, type[StageProgress | Ready | Stopped]] = {
    kind.__name__: kind for kind in (StageProgress, Ready, Stopped)
}
