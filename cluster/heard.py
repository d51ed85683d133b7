"""What stages and lanes tell the gateway: taken from its wire form and checked, or refused whole.

What is accepted here can be shown and added up without a further look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from actors import wire
from actors.engine.packed import PackedError, is_finite, is_whole, unpack
from actors.engine.requests import RequestOutput

_MOST_KIND_BYTES = 32
_MOST_LANES = 2**16
_MOST_NAME_CHARACTERS = 256
_STAGE_NUMBERS = (
    "epoch",
    "loaded_fraction",
    "busy_s",
    "predicted_s",
    "steps",
    "late_s",
    "link_bytes",
)
_EXPERT_NUMBERS = ("busy_s", "predicted_s", "calls", "late_s", "guests", "link_bytes")
_LANE_NUMBERS = (
    "running",
    "waiting",
    "blocks_in_use",
    "num_blocks",
    "preemptions",
    "prefix_hit_tokens",
    "link_bytes",
    "adapter_version",
    "adapter_switch_s",
)


def take_message(parts: Sequence[bytes | memoryview]) -> tuple[bytes, Any]:
    """Return a message's kind and value: of OUTPUTS a list of them, of REPORT a mapping.

    Raises:
        ValueError: It is malformed.
    """
    if len(parts) < 2 or len(parts[0]) > _MOST_KIND_BYTES:
        raise PackedError(f"a message of {len(parts)} parts, the first of {len(parts[0])} bytes")
    kind, value = bytes(parts[0]), unpack(parts[1])
    if kind == wire.OUTPUTS:
        return kind, _outputs(value)
    if kind == wire.REPORT:
        return kind, _report(value)
    return kind, value


def _outputs(value: Any) -> list[RequestOutput]:
    try:
        _, entries = value
        return [RequestOutput.from_wire(entry) for entry in entries]
    except TypeError as error:
        raise PackedError(f"malformed outputs: {error}") from None


def _report(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise PackedError(f"a report that is a {type(value).__name__}")
    if "stage" in value:
        device = value["stage"]
        if type(device) is not str or not 0 < len(device) <= _MOST_NAME_CHARACTERS:
            raise PackedError("a report of no stage")
        # A stage may leave out what it has not begun to count; a lane counts from the start.
        _check_numbers(value, [name for name in _STAGE_NUMBERS if name in value])
    elif "experts" in value:
        device = value["experts"]
        if type(device) is not str or not 0 < len(device) <= _MOST_NAME_CHARACTERS:
            raise PackedError("a report of no device's experts")
        _check_numbers(value, _EXPERT_NUMBERS)
    else:
        if not is_whole(value.get("lane"), high=_MOST_LANES - 1):
            raise PackedError("a report of no stage, lane or experts")
        _check_numbers(value, _LANE_NUMBERS)
    return value


def _check_numbers(report: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if not is_finite(report.get(name)):
            raise PackedError(f"a report whose {name} is no number")
