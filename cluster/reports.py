"""What stages and lanes last said of themselves, and what it says of them now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cluster.backend import LaneStatus, StageStatus
from placement.stages import StagePlacement

_LANE_NUMBERS = (
    "running",
    "waiting",
    "blocks_in_use",
    "num_blocks",
    "preemptions",
    "prefix_hit_tokens",
)


class Reports:
    """The latest reports; `cluster.heard` has checked them."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self.stages: dict[str, Mapping[str, Any]] = {}
        """By device."""
        self.lanes: dict[int, Mapping[str, Any]] = {}
        self.experts: dict[str, Mapping[str, Any]] = {}
        """Of workers with sharded experts, by device."""
        self._heard_s: dict[str, float] = {}
        self._now_s = now_s

    def take(self, report: Mapping[str, Any]) -> None:
        if "stage" in report:
            self.stages[report["stage"]] = report
            self._heard_s[report["stage"]] = self._now_s()
        elif "experts" in report:
            self.experts[report["experts"]] = report
        else:
            self.lanes[report["lane"]] = report

    def forget_lane(self, index: int) -> None:
        self.lanes.pop(index, None)

    def stage_status(self, placed: StagePlacement, *, silence_s: float) -> StageStatus:
        """Return a stage as it is; one that has been silent for so long is not active."""
        report = self.stages.get(placed.device_id, {})
        is_heard = self._now_s() - self._heard_s.get(placed.device_id, 0.0) < silence_s
        return StageStatus(
            index=placed.index,
            device=placed.device_id,
            node=placed.node,
            first_layer=placed.first_layer,
            end_layer=placed.end_layer,
            active=bool(report.get("active", False)) and is_heard,
            loaded_fraction=report.get("loaded_fraction", 0.0),
            busy_s=report.get("busy_s", 0.0),
            steps=report.get("steps", 0),
            late_s=report.get("late_s", 0.0),
            link_bytes=report.get("link_bytes", 0),
        )

    def lane_statuses(self) -> tuple[LaneStatus, ...]:
        return tuple(
            LaneStatus(index=index, **{name: report[name] for name in _LANE_NUMBERS})
            for index, report in sorted(self.lanes.items())
        )

    def link_bytes(self, devices: Sequence[str]) -> dict[str, int]:
        """Bytes over each link of a pipeline: lanes to its first stage, stage to stage, last stage
        to lanes."""
        links = {
            f"lane-{index}->{devices[0]}": report["link_bytes"]
            for index, report in sorted(self.lanes.items())
        }
        for device, target in zip(devices, [*devices[1:], "lanes"], strict=True):
            links[f"{device}->{target}"] = self.stages.get(device, {}).get("link_bytes", 0)
        return links
