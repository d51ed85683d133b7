"""Which experts a device holds in which version of the expert map.

A version is prepared beside running calls and is there all or not at all; calls name the version
that they were divided by, and are served as long as it is kept. What no version needs is dropped.

A call may bring guests: experts that its rows surprise the map with. They are read while the call's
other rows are computed, and stay until others need their room.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, pairwise

import torch

from actors.engine.expert_calls import ExpertError, ExpertMapError, Span
from actors.engine.expert_slots import ExpertSlots, Weights
from actors.engine.row_spans import gather, scatter

Holding = frozenset[tuple[int, int]]
"""(layer, expert) of each expert that a version has here."""


class ExpertHost:
    """The experts of one device by map version. Calls run one at a time."""

    def __init__(self, slots: ExpertSlots, *, num_guests: int = 0) -> None:
        """`num_guests` of the slots are kept free of what versions hold, for guests."""
        self._slots = slots
        self._num_guests = num_guests
        self._guests: dict[tuple[int, int], Future[None]] = {}
        """(layer, expert) taken in, the one longest unused first."""
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="guests")
        self.num_taken_in = 0
        """Guests that were read, so far."""
        self._changing = threading.Lock()
        """Held while a version is made or given up."""
        self._turn = threading.Lock()
        """Held while a call runs; a version changes only between calls."""
        self._given_up: set[int] = set()
        self._fetched: set[tuple[int, int]] = set()
        """(layer, expert) here for a version to come."""
        self._versions: dict[int, Holding] = {}
        self._gradients: dict[tuple[int, int], Weights] = {}

    @property
    def fingerprint(self) -> str:
        """Of the checkpoint."""
        return self._slots.fingerprint

    @property
    def bytes_read(self) -> int:
        return self._slots.bytes_read

    @property
    def versions(self) -> tuple[int, ...]:
        """Those that calls may name."""
        return tuple(sorted(self._versions))

    def experts(self, version: int) -> Holding:
        """Return what a version has here."""
        return self._versions[version]

    def prepare(
        self, version: int, experts: Mapping[int, Iterable[int]], *, in_place: bool = False
    ) -> None:
        """Load what a version has here by layer, beside running calls. Again: nothing happens.

        In place, versions before are given up first, for the room that they take: after a loss no
        step can go on by them anyway.

        Raises:
            ExpertError: An expert that does not exist, or no free slot; nothing has changed then
                (in place: but that the versions before are gone).
            CheckpointError: Its tensors cannot be read; as above.
        """
        wanted = frozenset((layer, expert) for layer, own in experts.items() for expert in own)
        for layer, expert in sorted(wanted):
            self._slots.check_exists(layer, expert)
        with self._changing:
            if self._versions.get(version, wanted) != wanted:
                raise ExpertError(
                    f"map version {version} has other experts here already; give the new map "
                    "another number"
                )
            # Also those that are here as guests, and would leave with these.
            added = wanted - self._fetched
            self._fetched |= wanted
            try:
                if in_place:
                    self._retain(lambda number: number >= version)
                    self._drop_unused()
                for layer, expert in sorted(wanted - self._slots.held):
                    self._slots.load(layer, expert)
            except BaseException:
                self._fetched -= added
                self._drop_unused()
                raise
            if version not in self._given_up:
                with self._turn:
                    self._versions[version] = wanted
            self._fetched -= wanted
            self._drop_unused()

    def fetch(self, layer: int, expert: int, *, share: float = 1.0) -> None:
        """Load an expert that a version to come names, beside running calls, or this share of it.

        It stays until a version that named it is forgotten, or `release`.

        Raises:
            ExpertError: It does not exist, or no slot is free.
            CheckpointError: Its tensors cannot be read.
        """
        with self._changing:
            self._slots.load(layer, expert, share=share)
            self._fetched.add((layer, expert))

    def release(self, layer: int, expert: int) -> None:
        """Undo `fetch`; what a version has here stays."""
        with self._changing:
            self._fetched.discard((layer, expert))
            self._drop_unused()

    def retire(self, version: int) -> None:
        """Forget versions before this one, once their calls have ended."""
        self._keep(lambda number: number >= version)

    def forget(self, version: int) -> None:
        """Undo `prepare` of a version that never came into force; it may still be loading."""
        self._given_up.add(version)
        self._keep(lambda number: number != version)

    def run(
        self,
        version: int,
        layer: int,
        experts: Sequence[tuple[int, int]],
        rows_SH: torch.Tensor,
        *,
        guests: Sequence[int] = (),
    ) -> torch.Tensor:
        """Run rows sorted by expert, (expert, how many) one after another: (S, H).

        `guests` of the layer are taken in, whether they have rows in this call or in one to come.

        Raises:
            ExpertError: The version or one of its experts is not here, the rows do not fit, or
                there is no room for as many guests.
            CheckpointError: A guest cannot be read.
        """
        with self._turn:
            self._check(version, layer, [each for each in experts if each[0] not in guests])
            if not guests:
                return self._slots.run(layer, experts, rows_SH)
            self._take_in(layer, guests)
            return self._run_guests_last(layer, experts, rows_SH, guests)

    def backward(
        self,
        version: int,
        layer: int,
        experts: Sequence[tuple[int, int]],
        rows_SH: torch.Tensor,
        gradient_SH: torch.Tensor,
        *,
        of_weights: bool = True,
    ) -> torch.Tensor:
        """Return the gradient of the rows (see `ExpertSlots.backward`), (S, H).

        Those of the weights, if asked for, are added up until `take_gradients`.

        Raises:
            ExpertError: As `run`.
        """
        with self._turn:
            self._check(version, layer, experts)
            into_rows, into_weights = self._slots.backward(
                layer, experts, rows_SH, gradient_SH, of_weights=of_weights
            )
            for expert, new in into_weights.items():
                old = self._gradients.get((layer, expert))
                if old is not None:
                    new = tuple(a.add_(b) for a, b in zip(old, new, strict=True))
                self._gradients[layer, expert] = new
            return into_rows

    def take_gradients(self) -> dict[tuple[int, int], Weights]:
        """Return the weights' gradients by (layer, expert) since the last time, in the order of
        `actors.engine.experts.weight_names`; those of replicas add up to the whole."""
        with self._turn:
            taken, self._gradients = self._gradients, {}
            return taken

    def close(self) -> None:
        """Take no more guests in."""
        self._reader.shutdown(wait=False, cancel_futures=True)

    def _take_in(self, layer: int, guests: Sequence[int]) -> None:
        """Begin to read the guests that are not here, in place of those longest unused."""
        for expert in guests:
            self._slots.check_exists(layer, expert)
        wanted = [(layer, expert) for expert in guests]
        if len(wanted) > self._num_guests:
            raise ExpertError(
                f"layer {layer} brings {len(wanted)} guests and there is room for "
                f"{self._num_guests}; raise plan.guest_experts"
            )
        for key in wanted:
            if key in self._guests:
                self._guests[key] = self._guests.pop(key)  # used last
        for key in wanted:
            if key not in self._guests:
                if len(self._guests) >= self._num_guests:
                    self._see_off(next(each for each in self._guests if each not in wanted))
                self._guests[key] = self._reader.submit(self._slots.load, *key)
                self.num_taken_in += 1

    def _see_off(self, key: tuple[int, int]) -> None:
        """Free a guest's slot, once it is read."""
        self._guests.pop(key).exception()
        if key not in self._fetched.union(*self._versions.values()):
            self._slots.drop(*key)

    def _run_guests_last(
        self,
        layer: int,
        experts: Sequence[tuple[int, int]],
        rows_SH: torch.Tensor,
        guests: Sequence[int],
    ) -> torch.Tensor:
        ends = accumulate((rows for _, rows in experts), initial=0)
        placed = list(zip(experts, map(Span._make, pairwise(ends)), strict=True))
        out_SH = torch.empty_like(rows_SH)
        for are_guests in (False, True):
            own = [each for each in placed if (each[0][0] in guests) == are_guests]
            if not own:
                continue
            chosen, spans = [each for each, _ in own], [span for _, span in own]
            if are_guests:
                self._await_guests(layer, [expert for expert, _ in chosen])
            scatter(out_SH, spans, self._slots.run(layer, chosen, gather(rows_SH, spans)))
        return out_SH

    def _await_guests(self, layer: int, experts: Sequence[int]) -> None:
        for expert in experts:
            try:
                self._guests[layer, expert].result()
            except BaseException:
                del self._guests[layer, expert]
                raise

    def _check(self, version: int, layer: int, experts: Sequence[tuple[int, int]]) -> None:
        holding = self._versions.get(version)
        if holding is None:
            raise ExpertMapError(
                f"expert map version {version} is not here, there are {list(self.versions)}; "
                "prepare it, or divide the rows by one of these"
            )
        missing = [expert for expert, _ in experts if (layer, expert) not in holding]
        if missing:
            raise ExpertMapError(
                f"experts {missing} of layer {layer} are not here in map version {version}; the "
                "caller's map of that version says otherwise, make it anew"
            )

    def _keep(self, is_kept: Callable[[int], bool]) -> None:
        self._retain(is_kept)
        with self._changing:
            self._drop_unused()

    def _retain(self, is_kept: Callable[[int], bool]) -> None:
        with self._turn:
            self._versions = {n: held for n, held in self._versions.items() if is_kept(n)}

    def _drop_unused(self) -> None:
        with self._turn:
            used = self._fetched.union(*self._versions.values(), self._guests)
            for layer, expert in self._slots.taken - used:
                self._slots.drop(layer, expert)
