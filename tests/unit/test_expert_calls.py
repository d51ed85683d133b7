"""A call says exactly what it asks, and rows are cut so that each is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged_bytes, damaged_value, each_damaged

from actors.engine.expert_calls import (
    ExpertCall,
    ExpertError,
    ExpertRows,
    Piece,
    Portion,
    cut,
    shares,
)

CALL = ExpertCall(
    7, 3, 12, "0123456789abcdef", "ipc:///tmp/motley-x/inbox", 2.5,
    (
        Portion("gpu0", (ExpertRows(0, 4), ExpertRows(9, 1))),
        Portion("gpu1", (ExpertRows(9, 2),), (3, 9)),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Given:
    """Routes that give these pieces."""

    pieces: Sequence[Piece]
    version: int = 5

    def split(
        self, layer: int, counts_E: Sequence[int], *, with_guests: bool = True
    ) -> Sequence[Piece]:
        return self.pieces


def test_a_call_survives_the_wire() -> None:
    assert ExpertCall.decode(CALL.encode()) == CALL
    assert CALL.num_rows == 7


@pytest.mark.parametrize(
    "change",
    [
        {"number": -1},
        {"layer": True},
        {"version": 2**63},
        {"fingerprint": ""},
        {"reply_to": "x" * 300},
        {"time_left_s": 0},
        {"time_left_s": float("nan")},
        {"portions": ()},
        {"portions": (CALL.portions[0], CALL.portions[0])},
        {"portions": (Portion("gpu0", ()),)},
        {"portions": (Portion("gpu0", (ExpertRows(0, 0),)),)},
        {"portions": (Portion("gpu0", (ExpertRows(2, 1), ExpertRows(1, 1))),)},
        {"portions": (Portion("gpu0", (ExpertRows(2, 1), ExpertRows(2, 1))),)},
        {"portions": (Portion("gpu0", (ExpertRows(2, 1),), (-1,)),)},
        {"portions": (Portion("gpu0", (ExpertRows(2, 1),), (3, 3)),)},
        {"portions": (Portion("", (ExpertRows(2, 1),)),)},
        {"portions": (Portion("gpu0", (ExpertRows(0, 2**31 - 1), ExpertRows(1, 1))),)},
    ],
    ids=str,
)
def test_a_call_that_is_out_of_place_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="malformed expert call"):
        ExpertCall.decode(replace(CALL, **change).encode())


def test_damaged_calls_are_refused_or_right() -> None:
    value = msgpack.unpackb(CALL.encode())
    messages = [msgpack.packb(each) for each in each_damaged(21, [value], 600, damaged_value)]
    messages += each_damaged(22, [CALL.encode()], 600, damaged_bytes)
    refused = 0
    for message in messages:
        try:
            call = ExpertCall.decode(message)
        except ValueError:
            refused += 1
        else:
            assert ExpertCall.decode(call.encode()) == call
    assert refused > len(messages) / 2


@given(st.data())
def test_each_row_is_in_one_share(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    pieces = []
    for expert, count in enumerate(counts):
        devices = data.draw(st.permutations("abc"))
        for device in devices[:-1]:
            rows = data.draw(st.integers(0, count))
            if rows:
                pieces.append(Piece(device, expert, rows))
            count -= rows
        if count:
            pieces.append(Piece(devices[-1], expert, count))

    found = shares(counts, Given(pieces), 0)

    covered = sorted(row for share in found for span in share.spans for row in range(*span))
    assert covered == list(range(sum(counts)))
    of_row = [expert for expert, count in enumerate(counts) for _ in range(count)]
    for portion, spans in found:
        mine = [of_row[row] for span in spans for row in range(*span)]
        assert mine == [expert for expert, count in portion.experts for _ in range(count)]
        assert all(a.end < b.start for a, b in pairwise(spans))


@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=8),
    st.integers(1, 12),
    st.sets(st.integers(0, 7)),
)
def test_a_share_is_cut_between_experts_and_guests_come_last(
    counts: list[int], most_rows: int, guests: set[int]
) -> None:
    pieces = []
    for expert, count in enumerate(counts):
        half = count // 2
        of_b = Piece("b", expert, count - half, expert in guests)
        pieces += [piece for piece in (Piece("a", expert, half), of_b) if piece.rows]

    for share in shares(counts, Given(pieces), 0):
        parts = cut(share, most_rows)

        brought = share.portion.guests
        order = sorted(share.portion.experts, key=lambda each: (each.expert in brought, each))
        assert [e for part in parts for e in part.portion.experts] == order
        rows_of = {}
        left = [row for span in share.spans for row in range(*span)]
        for expert, num_rows in share.portion.experts:
            rows_of[expert], left = left[:num_rows], left[num_rows:]
        wanted = [row for expert, _ in order for row in rows_of[expert]]
        assert [row for part in parts for span in part.spans for row in range(*span)] == wanted
        for portion, spans in parts:
            assert portion.device == share.portion.device
            assert portion.guests == brought == tuple(sorted(brought))
            assert sum(end - start for start, end in spans) == portion.num_rows
            assert portion.num_rows <= most_rows or len(portion.experts) == 1


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([Piece("a", 0, 2)], "expert 2 has 1 rows and devices were given 0"),
        ([Piece("a", 0, 3), Piece("a", 2, 1)], "expert 0 has 2 rows and devices were given 3"),
        ([Piece("a", 2, 1), Piece("a", 0, 2)], "2 rows of expert 0 after expert 2"),
        ([Piece("a", 0, 2), Piece("a", 3, 1)], "1 rows of expert 3 after expert 0; .* below 3"),
        ([Piece("a", 0, 2), Piece("a", 2, 0)], "0 rows of expert 2"),
        ([Piece("a", 0, 1), Piece("a", 0, 1), Piece("a", 2, 1)], "given twice to one device"),
    ],
)
def test_a_split_that_does_not_add_up_is_refused(pieces: list[Piece], message: str) -> None:
    with pytest.raises(ExpertError, match=f"layer 4, map version 5: .*{message}"):
        shares([2, 0, 1], Given(pieces), 4)
