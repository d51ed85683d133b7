"""msgpack that came over a network, unpacked within bounds, and the types found in it.

A message may claim more than it holds; what it may claim is bounded by its own length and by
`MAX_ITEMS`, and a claim that cannot be met is one kind of error, a ValueError, whatever it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import msgpack

MAX_PACKED_BYTES = 64 * 2**20
"""Of one message: steps, results, requests and reports are far smaller."""
MAX_ITEMS = 2**20
"""Of one list or map in it: the tokens of the longest prompt."""
MAX_INDEX = 2**31 - 1
"""Largest token id, block, position or count that anything here can hold."""


class PackedError(ValueError):
    """Bytes that are no message of ours."""


def unpack(data: bytes | memoryview, *, max_bytes: int = MAX_PACKED_BYTES) -> Any:
    """Return the value.

    Raises:
        PackedError: Too long, malformed, or claiming more than it holds.
    """
    if len(data) > max_bytes:
        raise PackedError(f"{len(data)} bytes where at most {max_bytes} belong")
    most = min(len(data), MAX_ITEMS)
    try:
        return msgpack.unpackb(data, max_array_len=most, max_map_len=most, max_ext_len=0)
    except (ValueError, TypeError, MemoryError, msgpack.exceptions.UnpackException) as error:
        raise PackedError(f"{len(data)} malformed bytes: {error or type(error).__name__}") from None


def is_whole(value: object, *, low: int = 0, high: int = MAX_INDEX) -> bool:
    """Whether it is a whole number within bounds (a truth value is none)."""
    return type(value) is int and low <= value <= high


def are_whole(values: object, *, low: int = 0, high: int = MAX_INDEX) -> bool:
    """Whether it is a list of whole numbers from `low` to `high`."""
    if not isinstance(values, list | tuple):
        return False
    if not values:
        return True
    return set(map(type, values)) == {int} and min(values) >= low and max(values) <= high


def is_finite(value: object) -> bool:
    """Whether it is a number that is neither infinite nor none (a truth value is no number)."""
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def are_finite(values: Iterable[object]) -> bool:
    """Whether all are numbers that are neither infinite nor none."""
    numbers = tuple(values)
    return set(map(type, numbers)) <= {int, float} and all(map(math.isfinite, numbers))  # type: ignore[arg-type]


def seconds_in(data: bytes | memoryview) -> list[float]:
    """Return the seconds that stages have noted on a step; raises PackedError for anything else."""
    seconds = unpack(data)
    if not isinstance(seconds, list) or not all(is_finite(each) for each in seconds):
        raise PackedError("the seconds of a step are no numbers")
    return seconds
