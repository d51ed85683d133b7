"""Messages that somebody damaged on purpose: seeded, so that each run damages them alike."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

_CLAIMS = (
    b"\xdd\xff\xff\xff\xff",  # a list of 2**32 - 1
    b"\xdf\xff\xff\xff\xff",  # a map
    b"\xdb\x7f\xff\xff\xff",  # a text
    b"\xc6\xff\xff\xff\xff",  # bytes
    b"\xc9\xff\xff\xff\xff\x01",  # an extension
    b"\xd6\xff\x00\x00\x00\x00",  # a time
    b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",  # not a number
    b"\xc1",  # never used
    b"\x91" * 1100,  # lists within lists
    b"\xff" * 10,  # protobuf: a varint without an end
)
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**64 - 1, -(2**63), 0.5, -0.0, 1e308,
    float("nan"), float("inf"), float("-inf"), "", "x", "\0", "é" * 300, "9" * 5000, b"", b"\xff",
    [], [[]], [None], {}, {"a": 1}, [0] * 2000, ["x"] * 300,
)  # fmt: skip


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def damaged_bytes(rng: Random, data: bytes) -> bytes:
    """Return the bytes with one to four things done to them."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(7):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << rng.randrange(8)
            case 1 if changed:
                changed[at % len(changed)] = rng.choice((0, 1, 0x7F, 0x80, 0xC0, 0xFE, 0xFF))
            case 2:
                del changed[at:]
            case 3:
                changed[at:at] = rng.randbytes(rng.randint(1, 8))
            case 4:
                changed[at:at] = rng.choice(_CLAIMS)
            case 5:
                end = min(len(changed), at + rng.randint(1, 40))
                changed[at:at] = changed[at:end]
            case _:
                del changed[at : at + rng.randint(1, 8)]
    return bytes(changed)


def damaged_value(rng: Random, value: Any) -> Any:
    """Return a value of lists and maps with one or two of its parts replaced, lost or doubled."""
    for _ in range(rng.randint(1, 2)):
        value = _damage(rng, value)
    return value


def _damage(rng: Random, value: Any) -> Any:
    if not isinstance(value, list | tuple | dict) or not value or rng.random() < 0.1:
        return _nested(rng.choice((3, 200))) if rng.random() < 0.05 else rng.choice(HOSTILE)
    if isinstance(value, dict):
        name = rng.choice(list(value))
        if rng.random() < 0.1:
            return {key: each for key, each in value.items() if key != name}
        return value | {name: _damage(rng, value[name])}
    items = list(value)
    at = rng.randrange(len(items))
    match rng.randrange(12):
        case 0:
            del items[at]
        case 1:
            items.insert(at, items[at])
        case _:
            items[at] = _damage(rng, items[at])
    return items


def resident_bytes() -> int:
    """Return what this process holds in memory, what is unreachable let go of first."""
    gc.collect()
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * 4096


def each_damaged(
    seed: int, originals: Sequence[Any], count: int, damage: Callable[[Random, Any], Any]
) -> list[Any]:
    """Return `count` damaged copies, of the originals in turn."""
    rng = Random(seed)
    return [damage(rng, originals[number % len(originals)]) for number in range(count)]
