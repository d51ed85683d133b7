"""The copies of experts that devices hold, load, and are to load next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from placement.moving.moves import Move, Piece, Release
from placement.sharding.expert_map import ExpertMap


class Copy(NamedTuple):
    """An expert of a layer on a device."""

    device_id: str
    piece: Piece

    @property
    def release(self) -> Release:
        return Release(device_id=self.device_id, piece=self.piece)


def copies_of(current: ExpertMap) -> set[Copy]:
    """Return what a map names."""
    return {
        Copy(device.id, Piece(part="expert", layer=index, expert=expert))
        for index, layer in enumerate(current.layers)
        for device, experts in zip(current.devices, layer.experts, strict=True)
        for expert in experts
    }


class Copies:
    """Which are whole, which are on their way, and what is still to be asked for."""

    def __init__(self, held: Iterable[Copy], expert_bytes: int) -> None:
        self.held = set(held)
        """Whole."""
        self.wanted: dict[Copy, int] = {}
        """To be loaded and not whole, and their bytes that were not asked for."""
        self._expert_bytes = expert_bytes
        self._in_flight: set[Move] = set()

    def want(self, copies: Iterable[Copy]) -> None:
        """From now on these are to be loaded, as far as they are not whole."""
        self.wanted = dict.fromkeys((c for c in copies if c not in self.held), self._expert_bytes)

    def ask(self, budget_bytes: int, nodes: Mapping[str, str]) -> list[Move]:
        """Ask for the next of what is wanted, once what was asked for before is there.

        `nodes` are the devices' in use.
        """
        if self._in_flight:
            return []
        parts = []
        for copy, left_bytes in self.wanted.items():
            size = min(left_bytes, budget_bytes)
            if size > 0:
                parts.append((copy, self._expert_bytes - left_bytes, size))
                self.wanted[copy] = left_bytes - size
                budget_bytes -= size
        return self._moves(parts, nodes)

    def ask_for_all(self, nodes: Mapping[str, str]) -> list[Move]:
        """Ask for all that is wanted, whole and at once."""
        asked = [copy for copy, left_bytes in self.wanted.items() if left_bytes]
        self.wanted = dict.fromkeys(self.wanted, 0)
        return self.read(asked, nodes)

    def read(self, copies: Iterable[Copy], nodes: Mapping[str, str]) -> list[Move]:
        """Ask for copies that no step can do without, whole and at once."""
        return self._moves([(copy, 0, self._expert_bytes) for copy in copies], nodes)

    def _moves(
        self, parts: Sequence[tuple[Copy, int, int]], nodes: Mapping[str, str]
    ) -> list[Move]:
        """Find a source for (copy, first byte, bytes) each, and note that they are on their way."""
        sources: dict[Piece, list[str]] = {copy.piece: [] for copy, _, _ in parts}
        for held in self.held:
            if held.piece in sources:
                sources[held.piece].append(held.device_id)
        moves = [
            Move(
                piece=copy.piece,
                # From its own node if it can be: that link is the widest.
                source=min(
                    sources[copy.piece],
                    key=lambda s: (nodes[s] != nodes[copy.device_id], s),
                    default=None,
                ),
                target=copy.device_id,
                first_byte=first_byte,
                num_bytes=num_bytes,
                is_last=first_byte + num_bytes == self._expert_bytes,
            )
            for copy, first_byte, num_bytes in parts
        ]
        self._in_flight.update(moves)
        return moves

    def end(self, move: Move) -> bool:
        """A move is over; returns whether it was still waited for."""
        is_known = move in self._in_flight
        self._in_flight.discard(move)
        return is_known

    def whole(self, copy: Copy) -> None:
        """A copy is there."""
        self.held.add(copy)
        self.wanted.pop(copy, None)

    def asked(self) -> set[Copy]:
        """Return the copies that are on their way."""
        return {Copy(move.target, move.piece) for move in self._in_flight}

    def keep_moves(self, named: set[Copy]) -> None:
        """What is on its way and not named is given up on arrival."""
        self._in_flight = {m for m in self._in_flight if Copy(m.target, m.piece) in named}

    def want_nothing(self) -> list[Copy]:
        """Give up what is wanted; returns what has begun to come."""
        begun = [
            copy for copy, left_bytes in self.wanted.items() if left_bytes < self._expert_bytes
        ]
        self._in_flight = {m for m in self._in_flight if Copy(m.target, m.piece) not in begun}
        self.wanted.clear()
        return begun

    def drop_unnamed(self, named: set[Copy]) -> list[Copy]:
        """Hold no more what is not named; returns those copies in order."""
        unused = sorted(self.held - named, key=lambda copy: (copy.piece, copy.device_id))
        self.held.difference_update(unused)
        return unused

    def lose(self, device_id: str) -> None:
        """A device is gone: what it held, and what was on its way to it or from it."""
        self.held = {copy for copy in self.held if copy.device_id != device_id}
        # Copies from it fail as well; those that are still needed are asked for anew.
        self._in_flight = {m for m in self._in_flight if device_id not in (m.target, m.source)}
