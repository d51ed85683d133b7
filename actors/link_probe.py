"""LinkProbeActor: one end of the links of its node. Loads no torch: it runs beside serving."""

from __future__ import annotations

import ray

from actors import wire
from actors.link_timer import THOROUGH, LinkEffort, LinkTimes, answer, time_link


class LinkProbeWorker:
    """Times links, or answers the end that does; call its methods one at a time."""

    def __init__(self) -> None:
        self._inbox: wire.Inbox | None = None
        self._keys: wire.WireKeys | None = None

    def listen(self, keys: wire.WireKeys, host: str) -> wire.Address:
        """Open the probe's inbox on its node's own interface."""
        if self._inbox is None:
            self._inbox = wire.Inbox("probe", keys, host=host)
            self._keys = keys
        return self._inbox.address

    def echo(self, peer: wire.Address, timeout_s: float) -> int:
        """Answer the peer's messages until it says goodbye; returns how many there were."""
        inbox, outbox = self._ends(peer)
        return answer(inbox, outbox, timeout_s)

    def time_link(
        self, peer: wire.Address, timeout_s: float, effort: LinkEffort = THOROUGH
    ) -> LinkTimes:
        """Time messages to a peer that echoes.

        Raises:
            ProbeError: It did not answer in time.
        """
        inbox, outbox = self._ends(peer)
        return time_link(inbox, outbox, timeout_s, effort)

    def stop(self) -> None:
        """Close the sockets, and remove what killed processes of the node have left: maybe no
        stage comes after them that would. Safe to call twice."""
        if self._inbox is not None:
            self._inbox.close()
            self._inbox = None
        wire.sweep()

    def _ends(self, peer: wire.Address) -> tuple[wire.Inbox, wire.Outbox]:
        assert self._inbox is not None
        assert self._keys is not None
        return self._inbox, wire.Outbox(peer, self._keys)


LinkProbeActor = ray.remote(LinkProbeWorker)
