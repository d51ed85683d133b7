"""Timing one direction of a link over the wire that tokens travel on.

One end sends, the other answers each message as soon as its last byte is there. Every wait has a
deadline.
"""

from __future__ import annotations

import secrets
import statistics
import time
from dataclasses import dataclass
from typing import NamedTuple

from actors import wire

PING = b"ping"
PONG = b"pong"
BYE = b"bye"
_GOODBYE_S = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkEffort:
    """How much is sent over a link to time it."""

    warm_ups: int
    pings: int
    transfers: int
    least_transfer_bytes: int
    most_transfer_bytes: int
    long_s: float
    """Bytes are added until a transfer takes so long beyond `long_round_trips`: then it shows the
    rate."""
    long_round_trips: float
    takes_least_rtt: bool
    """Not the median: where other traffic may share the link, which only ever slows a ping. Of
    transfers always the median: a shaper that has seen a pause lets one pass at once."""


THOROUGH = LinkEffort(
    warm_ups=5,
    pings=50,
    transfers=7,
    least_transfer_bytes=64 * 2**10,
    most_transfer_bytes=16 * 2**20,
    long_s=0.02,
    long_round_trips=10,
    takes_least_rtt=False,
)
LIGHT = LinkEffort(
    warm_ups=2,
    pings=6,
    transfers=3,
    least_transfer_bytes=32 * 2**10,
    most_transfer_bytes=2**20,
    long_s=0.01,
    long_round_trips=1,
    takes_least_rtt=True,
)
"""About 80 ms of the link whatever its rate: 160 KB over 20 Mbit/s."""


class ProbeError(RuntimeError):
    """A measurement failed or did not end in time."""


class LinkTimes(NamedTuple):
    """What one direction of a link does."""

    rtt_s: float
    bandwidth_bytes_per_s: float


def answer(inbox: wire.Inbox, outbox: wire.Outbox, timeout_s: float) -> int:
    """Answer the peer's messages until it says goodbye; returns how many there were."""
    end_s = time.monotonic() + timeout_s
    answered = 0
    try:
        while (left_s := end_s - time.monotonic()) > 0:
            parts = inbox.receive(left_s)
            if parts is None or bytes(parts[0]) == BYE:
                break
            if bytes(parts[0]) == PING:
                outbox.send([PONG, bytes(parts[1])])
                answered += 1
    finally:
        outbox.close()
    return answered


def time_link(
    inbox: wire.Inbox, outbox: wire.Outbox, timeout_s: float, effort: LinkEffort = THOROUGH
) -> LinkTimes:
    """Time messages to a peer that answers.

    Raises:
        ProbeError: It did not answer in time.
    """
    caller = _Caller(inbox, outbox, time.monotonic() + timeout_s, effort)
    try:
        rtt_s = caller.rtt_s()
        rate = caller.bandwidth_bytes_per_s(rtt_s)
        outbox.send([BYE])
        # A socket that is closed at once may take its last message along.
        time.sleep(_GOODBYE_S)
    finally:
        outbox.close()
    return LinkTimes(rtt_s, rate)


class _Caller:
    """The side of a link that times."""

    def __init__(
        self, inbox: wire.Inbox, outbox: wire.Outbox, end_s: float, effort: LinkEffort
    ) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._end_s = end_s
        self._effort = effort
        self._sent = 0
        # Numbers of its own: a late answer to a caller before this one is none to this.
        self._first = secrets.randbits(32) << 32

    def rtt_s(self) -> float:
        """Return the seconds of a round trip without a payload."""
        effort = self._effort
        times = [self.round_trip_s(b"") for _ in range(effort.warm_ups + effort.pings)]
        del times[: effort.warm_ups]
        return min(times) if effort.takes_least_rtt else statistics.median(times)

    def round_trip_s(self, payload: bytes) -> float:
        """Return the seconds until the peer's short answer to a payload is here."""
        self._sent += 1
        number = (self._first + self._sent).to_bytes(8, "big")
        start_s = time.monotonic()
        self._outbox.send([PING, number, payload])
        while (left_s := self._end_s - time.monotonic()) > 0:
            parts = self._inbox.receive(left_s)
            if parts is not None and bytes(parts[0]) == PONG and bytes(parts[1]) == number:
                return time.monotonic() - start_s
        raise ProbeError(
            f"message {self._sent} of {len(payload)} bytes had no answer in time; open the ports "
            f"between the nodes to each other, raise --timeout, or declare the link"
        )

    def bandwidth_bytes_per_s(self, rtt_s: float) -> float:
        """Return the rate of messages long enough to show it, their latency taken off."""
        effort = self._effort
        size = effort.least_transfer_bytes
        long_s = effort.long_s + effort.long_round_trips * rtt_s
        # Opens the window of a connection that was idle, and takes what a shaper lets pass at once.
        self.round_trip_s(bytes(size))
        while self.round_trip_s(bytes(size)) < long_s and size < effort.most_transfer_bytes:
            size *= 2
        payload = bytes(size)
        seconds = statistics.median(self.round_trip_s(payload) for _ in range(effort.transfers))
        # On a link whose latency hides the transfer, at least what was seen to pass.
        is_seen = seconds - rtt_s > min(rtt_s, effort.long_s / 2)
        return size / (seconds - rtt_s if is_seen else seconds)
