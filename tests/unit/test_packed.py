"""msgpack within bounds: whatever the bytes claim, it is one error, and nothing stays allocated."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import resident_bytes

from actors.engine.packed import PackedError, are_whole, is_finite, is_whole, seconds_in, unpack


@given(st.recursive(st.none() | st.integers(-(2**63), 2**64 - 1) | st.text(), st.lists))
def test_what_is_packed_is_unpacked(value: object) -> None:
    assert unpack(msgpack.packb(value)) == value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 5000,
        b"\x90\x90",
        b"\xa1\xff",
        b"\x81\x90\x90",
        b"\xc7\x01\x05\x00",
    ],
)
def test_what_is_not_ours_is_one_kind_of_error(data: bytes) -> None:
    with pytest.raises(PackedError, match=f"{len(data)} malformed bytes"):
        unpack(data)


def test_a_message_above_the_bound_is_not_looked_at() -> None:
    with pytest.raises(PackedError, match="65 bytes where at most 64 belong"):
        unpack(b"\xc4\x3f" + bytes(63), max_bytes=64)


def test_lists_that_claim_more_than_they_hold_are_not_made_room_for() -> None:
    # A thousand lists, one within the other, each said to have as many items as there are bytes.
    size = 400_000
    bomb = b"".join(b"\xdd" + size.to_bytes(4, "big") for _ in range(1000))
    data = bomb + bytes(size - len(bomb))
    before_bytes = resident_bytes()

    for _ in range(20):
        with pytest.raises(PackedError):
            unpack(data)

    assert resident_bytes() - before_bytes < 64 * 2**20


def test_numbers_are_numbers() -> None:
    assert is_whole(0)
    assert is_whole(2**31 - 1)
    assert not any(is_whole(value) for value in (True, -1, 2**31, 1.0, "1", None))
    assert are_whole([])
    assert are_whole([0, 5])
    assert not any(are_whole(values) for values in (None, "1", [True], [1, -1], [2**31], [1.0]))
    assert is_finite(0)
    assert not any(is_finite(value) for value in (True, float("nan"), float("inf"), "1", None))


def test_seconds_are_a_list_of_numbers() -> None:
    assert seconds_in(msgpack.packb([0.5, 1])) == [0.5, 1]
    for wrong in (1.0, ["x"], [float("nan")], {"a": 1}):
        with pytest.raises(PackedError, match="no numbers"):
            seconds_in(msgpack.packb(wrong))
