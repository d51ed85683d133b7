"""Timing one direction of a link over the wire that tokens travel on.

One end sends, the other answers each message as soon as its last byte is there. Every wait has a
deadline.
"""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

from actors import wire

PING = b"ping"
PONG = b"pong"
BYE = b"bye"
_WARM_UPS = 5
_PINGS = 50
_TRANSFERS = 7
_LEAST_TRANSFER_BYTES = 64 * 2**10
_MOST_TRANSFER_BYTES = 16 * 2**20
_LONG_TRANSFER_S = 0.02
"""Bytes are added until a transfer takes so long, and many round trips: then it shows the rate."""
_LONG_ROUND_TRIPS = 10
_GOODBYE_S = 0.01


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


def time_link(inbox: wire.Inbox, outbox: wire.Outbox, timeout_s: float) -> LinkTimes:
    """Time messages to a peer that answers.

    Raises:
        ProbeError: It did not answer in time.
    """
    caller = _Caller(inbox, outbox, time.monotonic() + timeout_s)
    try:
        times = [caller.round_trip_s(b"") for _ in range(_WARM_UPS + _PINGS)]
        rtt_s = statistics.median(times[_WARM_UPS:])
        rate = caller.bandwidth_bytes_per_s(rtt_s)
        outbox.send([BYE])
        # A socket that is closed at once may take its last message along.
        time.sleep(_GOODBYE_S)
    finally:
        outbox.close()
    return LinkTimes(rtt_s, rate)


class _Caller:
    """The side of a link that times."""

    def __init__(self, inbox: wire.Inbox, outbox: wire.Outbox, end_s: float) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._end_s = end_s
        self._sent = 0

    def round_trip_s(self, payload: bytes) -> float:
        """Return the seconds until the peer's short answer to a payload is here."""
        self._sent += 1
        number = self._sent.to_bytes(8, "big")
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
        """Return the median rate of messages long enough to show it, their latency taken off."""
        size = _LEAST_TRANSFER_BYTES
        long_s = max(_LONG_TRANSFER_S, _LONG_ROUND_TRIPS * rtt_s)
        while self.round_trip_s(bytes(size)) < long_s and size < _MOST_TRANSFER_BYTES:
            size *= 2
        payload = bytes(size)
        seconds = statistics.median(self.round_trip_s(payload) for _ in range(_TRANSFERS))
        # On a link whose latency hides the transfer, at least what was seen to pass.
        return size / (seconds - rtt_s if seconds > 2 * rtt_s else seconds)
