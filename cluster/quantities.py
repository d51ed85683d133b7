"""Text to numbers, once, at the edge: "64 MiB", "1 Gbit/s", "20 GFLOP/s".

Inside the program every quantity is a number in base units, with the unit in its name. A bare
number (also as text, because YAML reads `1e9` as text) is taken to be in base units.
"""

from __future__ import annotations

import math
import re
import sys

_DECIMAL = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}

_BYTES = {f"{prefix}B": scale for prefix, scale in (_DECIMAL | _BINARY).items()}
_BYTES_PER_S = {f"{unit}/s": scale for unit, scale in _BYTES.items()} | {
    f"{prefix}bit/s": scale / 8 for prefix, scale in _DECIMAL.items()
}
_FLOPS_PER_S = {
    f"{prefix}{name}": scale for prefix, scale in _DECIMAL.items() for name in ("FLOP/s", "FLOPS")
}
_QUANTITY = re.compile(r"^\s*([0-9][0-9_]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z/]*)\s*$")


def parse_bytes(value: object) -> int:
    """Return a whole number of bytes from a number or from text such as "64 MiB" or "2 GB"."""
    expected = 'an amount of memory; write bytes, "64 MiB" or "2 GB"'
    return round(_parse(value, _BYTES, expected))


def parse_bytes_per_s(value: object) -> float:
    """Return bytes per second from a number or from text such as "1 GB/s" or "1 Gbit/s"."""
    return _parse(value, _BYTES_PER_S, 'a rate; write bytes per second, "1 GB/s" or "1 Gbit/s"')


def parse_flops_per_s(value: object) -> float:
    """Return FLOPs per second from a number or from text such as "20 GFLOP/s"."""
    return _parse(value, _FLOPS_PER_S, 'a speed; write FLOPs per second or "20 GFLOP/s"')


def format_bytes(num_bytes: float) -> str:
    """Return bytes for people, in binary units: "1.5 MiB"."""
    for unit, scale in reversed(_BINARY.items()):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}B"
    return f"{num_bytes:.0f} B"


def _parse(value: object, units: dict[str, int] | dict[str, float], expected: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value) if abs(value) <= sys.float_info.max else math.inf
    else:
        match = _QUANTITY.match(value) if isinstance(value, str) else None
        if match is None or (match.group(2) and match.group(2) not in units):
            raise ValueError(f"{value!r} is not {expected}")
        number = float(match.group(1)) * units.get(match.group(2), 1)
    if not (math.isfinite(number) and number > 0):
        told = repr(value) if number <= 0 else "the number"
        raise ValueError(f"{told} must be above 0 and finite; it should be {expected}")
    # Less than one byte or FLOP (a second) is a slip, and would overflow the seconds of a plan.
    if number < 1:
        raise ValueError(f"{value!r} must be at least 1; it should be {expected}")
    return number
