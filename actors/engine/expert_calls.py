"""What is asked of devices that hold experts: rows of one layer, sorted by expert.

A layer's rows are cut into pieces, each of one expert and for one device; a device's pieces are
its portion, and an `ExpertCall` carries portions to a node. No torch: rows travel beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import msgpack

from actors.engine.packed import MAX_INDEX, are_whole, is_finite, is_whole, unpack

MOST_HEADER_BYTES = 2**20
_MOST_NAME_CHARS = 256
_MOST_NUMBER = 2**63 - 1


class ExpertError(RuntimeError):
    """Rows cannot be run through their experts; the message says where, and what to change."""


class ExpertMapError(ExpertError):
    """The map that rows were divided by is not, or no more, that of a device: another one helps."""


class Piece(NamedTuple):
    """Consecutive rows of one expert that one device computes."""

    device: str
    expert: int
    rows: int
    is_guest: bool = False
    """The device takes the expert in for this call."""


class ExpertRows(NamedTuple):
    """How many rows go through an expert."""

    expert: int
    rows: int


class Routes(Protocol):
    """One version of the expert map, as far as a dispatcher must know it."""

    @property
    def version(self) -> int: ...

    def split(
        self, layer: int, counts_E: Sequence[int], *, with_guests: bool = True
    ) -> Sequence[Piece]:
        """Cut a layer's rows: by ascending expert, and together `counts_E[expert]` rows of each."""
        ...


class Portion(NamedTuple):
    """What one device computes of a layer: experts in ascending order, each once."""

    device: str
    experts: tuple[ExpertRows, ...]
    guests: tuple[int, ...] = ()
    """Experts of the layer, ascending, that the device does not hold and is to take in, for these
    rows or for some that follow."""

    @property
    def num_rows(self) -> int:
        return sum(rows for _, rows in self.experts)


class Span(NamedTuple):
    """Rows [start, end) of a layer's rows sorted by expert."""

    start: int
    end: int


class Share(NamedTuple):
    """A device's portion, and which of the layer's rows it is."""

    portion: Portion
    spans: tuple[Span, ...]

    def only(self, *, are_guests: bool) -> Share:
        """Return the share's rows of guests, or all others."""
        left = list(self.spans)
        spans: list[Span] = []
        experts = []
        for each in self.portion.experts:
            own = _first(left, each.rows)
            if (each.expert in self.portion.guests) == are_guests:
                experts.append(each)
                spans += own
        return Share(self.portion._replace(experts=tuple(experts)), _joined(spans))


def shares(
    counts_E: Sequence[int], routes: Routes, layer: int, *, with_guests: bool = True
) -> list[Share]:
    """Return each device's share of a layer's rows, in the order in which devices first occur.

    Raises:
        ExpertError: The split leaves rows out, has too many, or an expert twice on a device.
    """
    pieces = routes.split(layer, counts_E, with_guests=with_guests)
    _check_split(counts_E, pieces, f"layer {layer}, map version {routes.version}")
    ends = accumulate((piece.rows for piece in pieces), initial=0)
    spans: dict[str, list[Span]] = {}
    experts: dict[str, list[ExpertRows]] = {}
    guests: dict[str, list[int]] = {}
    for piece, (start, end) in zip(pieces, pairwise(ends), strict=True):
        spans.setdefault(piece.device, []).append(Span(start, end))
        experts.setdefault(piece.device, []).append(ExpertRows(piece.expert, piece.rows))
        if piece.is_guest:
            guests.setdefault(piece.device, []).append(piece.expert)
    return [
        Share(
            Portion(device, tuple(experts[device]), tuple(guests.get(device, ()))),
            _joined(spans[device]),
        )
        for device in spans
    ]


def cut(share: Share, most_rows: int) -> list[Share]:
    """Cut a share between experts into ones of at most so many rows, or of one expert each.

    Rows of guests come last: they are taken in while the others are computed.
    """
    return [
        small
        for part in (share.only(are_guests=False), share.only(are_guests=True))
        for small in (_cut(part, most_rows) if part.spans else ())
    ]


def _cut(share: Share, most_rows: int) -> list[Share]:
    cuts: list[Share] = []
    spans = list(share.spans)
    experts: list[ExpertRows] = []
    rows = 0
    for each in share.portion.experts:
        if experts and rows + each.rows > most_rows:
            portion = share.portion._replace(experts=tuple(experts))
            cuts.append(Share(portion, _first(spans, rows)))
            experts, rows = [], 0
        experts.append(each)
        rows += each.rows
    return [*cuts, Share(share.portion._replace(experts=tuple(experts)), tuple(spans))]


def _first(spans: list[Span], rows: int) -> tuple[Span, ...]:
    """Take the first rows out of spans."""
    taken = []
    while rows:
        start, end = spans.pop(0)
        if end - start > rows:
            spans.insert(0, Span(start + rows, end))
            end = start + rows
        taken.append(Span(start, end))
        rows -= end - start
    return tuple(taken)


def _joined(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Make one of spans that follow each other."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].end == span.start:
            joined[-1] = Span(joined[-1].start, span.end)
        else:
            joined.append(span)
    return tuple(joined)


def _check_split(counts_E: Sequence[int], pieces: Sequence[Piece], where: str) -> None:
    given = [0] * len(counts_E)
    previous = -1
    for piece in pieces:
        if not previous <= piece.expert < len(counts_E) or piece.rows < 1:
            raise ExpertError(
                f"{where}: {piece.rows} rows of expert {piece.expert} after expert {previous}; "
                f"pieces go by ascending expert below {len(counts_E)}, each with a row"
            )
        previous = piece.expert
        given[piece.expert] += piece.rows
    for expert, (rows, count) in enumerate(zip(given, counts_E, strict=True)):
        if rows != count:
            raise ExpertError(
                f"{where}: expert {expert} has {count} rows and devices were given {rows}; the "
                "map holds no replica of it, or its shares do not add up"
            )
    if len({(piece.device, piece.expert) for piece in pieces}) < len(pieces):
        raise ExpertError(f"{where}: an expert was given twice to one device; once is enough")


@dataclass(frozen=True, slots=True)
class ExpertCall:
    """One layer's rows for some devices of a node; they follow in the order of the portions."""

    number: int
    """The caller's, unique among its calls."""
    layer: int
    version: int
    """Of the expert map that the caller divided the rows by."""
    fingerprint: str
    """Of the caller's checkpoint."""
    reply_to: str
    """The caller's inbox (see `actors.wire.Address.ipc`)."""
    time_left_s: float
    """How long the caller's node waits for the other devices of the node."""
    portions: tuple[Portion, ...]

    @property
    def num_rows(self) -> int:
        return sum(portion.num_rows for portion in self.portions)

    def encode(self) -> bytes:
        portions = [
            [device, [e for e, _ in experts], [r for _, r in experts], list(guests)]
            for device, experts, guests in self.portions
        ]
        data: bytes = msgpack.packb(
            [
                self.number, self.layer, self.version, self.fingerprint, self.reply_to,
                self.time_left_s, portions,
            ]
        )  # fmt: skip
        return data

    @classmethod
    def decode(cls, data: bytes | memoryview) -> ExpertCall:
        """Decode a call; raises ValueError when it is malformed."""
        try:
            *head, portions = unpack(data, max_bytes=MOST_HEADER_BYTES)
            number, layer, version, fingerprint, reply_to, time_left_s = head
            call = cls(
                number, layer, version, fingerprint, reply_to, time_left_s,
                tuple(_portion(*portion) for portion in portions),
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise ValueError(f"malformed expert call of {len(data)} bytes: {error}") from error
        if wrong := _what_is_wrong(call):
            raise ValueError(f"malformed expert call of {len(data)} bytes: {wrong} out of place")
        return call


def _portion(device: Any, experts: Any, rows: Any, guests: Any) -> Portion:
    numbers = are_whole(experts) and are_whole(rows, low=1) and are_whole(guests)
    if not (_is_name(device) and numbers) or not experts:
        raise ValueError("a portion out of place")
    if any(b <= a for numbered in (experts, guests) for a, b in pairwise(numbered)):
        raise ValueError("experts out of order")
    pairs = zip(experts, rows, strict=True)
    return Portion(device, tuple(ExpertRows(expert, n) for expert, n in pairs), tuple(guests))


def _what_is_wrong(call: ExpertCall) -> str:
    """Name the first field whose type or range is wrong; "" when none is."""
    devices = {portion.device for portion in call.portions}
    checks = (
        ("number or version", are_whole((call.number, call.version), high=_MOST_NUMBER)),
        ("layer", is_whole(call.layer)),
        ("fingerprint or reply_to", _is_name(call.fingerprint) and _is_name(call.reply_to)),
        ("time_left_s", is_finite(call.time_left_s) and call.time_left_s > 0),
        ("portions", 0 < len(devices) == len(call.portions) and call.num_rows <= MAX_INDEX),
    )
    return next((name for name, is_right in checks if not is_right), "")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MOST_NAME_CHARS
