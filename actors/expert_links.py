"""A stage's way to experts on other nodes and in its own process.

One message goes to each node with experts of a layer, to the worker that is the node's front (see
`actors.expert_server`); rows so many that their bytes and not messages take the time skip that hop.
Experts of this process run while those rows travel. Every wait has a deadline. A layer's result is
a pure function of its rows, so where a device fails, the same rows are sent again as soon as there
is another map, and the step does not fail. Knows no Ray.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import NamedTuple, Protocol

import torch

from actors import wire
from actors.engine.expert_calls import ExpertCall, ExpertError, Routes, Share, Span, cut, shares
from actors.engine.expert_host import ExpertHost
from actors.engine.row_spans import gather, scatter
from actors.expert_messages import call_message, take_answer

_log = logging.getLogger(__name__)
_POLL_S = 0.02
"""How soon a wait notices that a worker was lost."""
DIRECT_BYTES = 2**20
"""A node's rows of one layer beyond this go straight to its devices, in messages of about this
size: a front would take longer to pass them on than more messages take, and a device computes its
first rows while the next ones travel."""
_NODE_FRACTION = 0.5
"""Of the deadline, for a node's front to hear from its other workers: then it can still say which
is missing."""


class ExpertCallError(ExpertError):
    """A node did not answer, or refused; `devices` are those that were asked."""

    def __init__(self, message: str, devices: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.devices = tuple(devices)


class ExpertRefusal(ExpertCallError):
    """A node has said that it cannot serve the call; `is_of_map`: another map may help."""

    def __init__(self, message: str, devices: Sequence[str], *, is_of_map: bool) -> None:
        super().__init__(message, devices)
        self.is_of_map = is_of_map


@dataclass(frozen=True, slots=True)
class ExpertNode:
    """The expert workers of a node."""

    front: str
    """Device of the worker that is sent the node's rows, and answers."""
    workers: Mapping[str, wire.Address]
    """By device, the front's too."""

    def __post_init__(self) -> None:
        if self.front not in self.workers:
            raise ValueError(
                f"front {self.front} is none of its node's workers {sorted(self.workers)}"
            )


class NodeRoutes(Routes, Protocol):
    """A version of the expert map, and where its devices are."""

    @property
    def nodes(self) -> Sequence[ExpertNode]:
        """Of all devices of the map but those in the caller's process."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a stage waits for experts."""

    answer_s: float = 10.0
    """For a node's answer; longer than its slowest layer takes."""
    reroute_s: float = 30.0
    """For another map after a failure that one may help against, and for the first one; 0 fails the
    step at once."""


class _Awaited(NamedTuple):
    """A node's answer to come: who computes, and where its rows belong."""

    devices: tuple[str, ...]
    addresses: tuple[wire.Address, ...]
    spans: tuple[Span, ...]


class ExpertLinks:
    """Dispatches a stage's rows over the wire (see `actors.engine.experts.ExpertDispatcher`).

    `run` and `backward` from one thread; `use` and `lose` from any.
    """

    def __init__(
        self,
        name: str,
        keys: wire.WireKeys,
        fingerprint: str,
        *,
        host: str = "127.0.0.1",
        beside: wire.Address | None = None,
        own: Mapping[str, ExpertHost] | None = None,
        patience: Patience | None = None,
        is_frozen: bool = False,
        on_failure: Callable[[ExpertError], None] = lambda _: None,
        on_rows: Callable[[int, Sequence[int]], None] = lambda _layer, _counts_E: None,
    ) -> None:
        """`host` and `beside` are its inbox's; `own` are experts in this process by device. Of
        frozen experts nobody wants the weights' gradients.
        `on_failure` may call `use`; `on_rows` is told the layer and the rows of each expert, once a
        call."""
        self.is_frozen = is_frozen
        self._keys = keys
        self._fingerprint = fingerprint
        self._own = own or {}
        self._patience = patience or Patience()
        self._on_failure = on_failure
        self._on_rows = on_rows
        self._running: NodeRoutes | None = None
        """What the call that runs was divided by."""
        self._routes: NodeRoutes | None = None
        self._next: NodeRoutes | None = None
        """For the step after the one that runs."""
        self._in_step = False
        self._changed = threading.Condition()
        """Guards the routes and who was lost."""
        self._lost: frozenset[wire.Address] = frozenset()
        self._outboxes: dict[wire.Address, wire.Outbox] = {}
        self._closed_bytes = 0
        self._calls_sent = 0
        self.num_repeated = 0
        """Layer calls that were sent again after a failure."""
        self.waited_s = 0.0
        """Spent in `run`, for experts elsewhere and for another map."""
        self._inbox = wire.Inbox(f"experts of {name}", keys, host=host, beside=beside)

    @property
    def address(self) -> wire.Address:
        """Where workers answer: what their `connect` must be given."""
        return self._inbox.address

    @property
    def messages_sent(self) -> int:
        return self._calls_sent

    @property
    def bytes_sent(self) -> int:
        return self._closed_bytes + sum(box.bytes_sent for box in self._outboxes.values())

    def use(self, routes: NodeRoutes, *, at_once: bool = False) -> None:
        """Divide rows by this map from the next step on, or at once: from the next call on.

        A call that runs ends with its own; one that has failed goes on with this.
        """
        with self._changed:
            self._next = routes
            if at_once or not self._in_step:
                self._change()
            self._changed.notify_all()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Keep to one map for the calls within."""
        with self._changed:
            self._in_step = True
        try:
            yield
        finally:
            with self._changed:
                self._in_step = False
                self._change()

    def settle(self, timeout_s: float) -> bool:
        """Wait until no call runs by another map than the newest; returns whether that is so."""
        with self._changed:
            return self._changed.wait_for(
                lambda: (
                    self._next is None and (self._running is None or self._running is self._routes)
                ),
                timeout_s,
            )

    def lose(self, workers: Sequence[wire.Address]) -> None:
        """Wait for these workers no more: they are gone for good. Calls to them fail at once."""
        with self._changed:
            self._lost |= frozenset(workers)

    def run(self, layer: int, counts_E: Sequence[int], rows_SH: torch.Tensor) -> torch.Tensor:
        """Return the rows computed, (S, H).

        Raises:
            ExpertError: It failed, and no other map came in time.
        """
        began_s = time.monotonic()
        self._on_rows(layer, counts_E)
        try:
            return self._insist(wire.EXPERTS, layer, counts_E, (rows_SH,))
        finally:
            self._end_call()
            self.waited_s += time.monotonic() - began_s

    def _insist(
        self, kind: bytes, layer: int, counts_E: Sequence[int], tensors: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """Have the rows computed, by another map where that in force fails."""
        while True:
            routes = self._current()
            try:
                return self._call_once_or_twice(routes, kind, layer, counts_E, tensors)
            except (ExpertError, wire.WireError) as error:
                _log.warning("layer %d, map version %d: %s", layer, routes.version, error)
                failure = error if isinstance(error, ExpertError) else ExpertCallError(str(error))
                self._on_failure(failure)
                if isinstance(failure, ExpertRefusal) and not failure.is_of_map:
                    raise failure from None
                if not self._another_than(routes):
                    raise failure from None
                self.num_repeated += 1

    def _call_once_or_twice(
        self,
        routes: NodeRoutes,
        kind: bytes,
        layer: int,
        counts_E: Sequence[int],
        tensors: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        """Have the rows computed; where guests were brought and refused, without them."""
        divided = shares(counts_E, routes, layer, with_guests=kind == wire.EXPERTS)
        try:
            return self._call(routes, kind, layer, divided, tensors)
        except ExpertRefusal as error:
            if not any(share.portion.guests for share in divided):
                raise
            _log.warning("layer %d, guests: %s", layer, error)
        self.num_repeated += 1
        divided = shares(counts_E, routes, layer, with_guests=False)
        return self._call(routes, kind, layer, divided, tensors)

    def backward(
        self,
        layer: int,
        counts_E: Sequence[int],
        rows_SH: torch.Tensor,
        gradient_SH: torch.Tensor,
    ) -> torch.Tensor:
        """Return the rows' gradient, (S, H); the weights' are added up at the workers.

        Unless the experts are frozen, not sent again after a failure: some of the workers may have
        added theirs already.

        Raises:
            ExpertError: It failed; what the workers added up is of no use then.
        """
        tensors = (rows_SH, gradient_SH)
        try:
            if self.is_frozen:
                return self._insist(wire.ROW_GRADIENTS, layer, counts_E, tensors)
            routes = self._current()
            divided = shares(counts_E, routes, layer, with_guests=False)
            return self._call(routes, wire.EXPERT_GRADIENTS, layer, divided, tensors)
        finally:
            self._end_call()

    def close(self) -> None:
        self._inbox.close()
        for outbox in self._outboxes.values():
            outbox.close()

    def _current(self) -> NodeRoutes:
        """Return the map in force; the first one is waited for, as one after a failure is."""
        with self._changed:
            wait_s = self._patience.reroute_s
            self._changed.wait_for(lambda: (self._routes or self._next) is not None, wait_s)
            if self._routes is None:
                self._change()
            if self._routes is None:
                raise ExpertError(
                    f"no expert map is in force after {wait_s:g} s; experts are being made good"
                )
            self._running = self._routes
            return self._routes

    def _end_call(self) -> None:
        with self._changed:
            self._running = None
            self._changed.notify_all()

    def _change(self) -> None:
        """Take the next map up, if there is one."""
        if self._next is not None:
            self._routes, self._next = self._next, None
            self._changed.notify_all()

    def _another_than(self, failed: NodeRoutes) -> bool:
        """Wait for a map after a failure, and take it up within the step."""
        with self._changed:
            came = self._changed.wait_for(
                lambda: self._next is not None or self._routes is not failed,
                self._patience.reroute_s,
            )
            self._change()
            return came

    def _call(
        self,
        routes: NodeRoutes,
        kind: bytes,
        layer: int,
        divided: Sequence[Share],
        tensors: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        end_s = time.monotonic() + self._patience.answer_s
        by_device = {share.portion.device: share for share in divided}
        own = {device: by_device.pop(device) for device in self._own.keys() & by_device.keys()}
        awaited: dict[int, _Awaited] = {}
        for node in routes.nodes:
            asked = [by_device.pop(device) for device in node.workers if device in by_device]
            for device, together in _messages(node, asked, tensors[0]):
                number = self._send(node.workers[device], routes, kind, layer, together, tensors)
                awaited[number] = _awaited(node, device, together)
        if by_device:
            raise ExpertError(
                f"map version {routes.version} names {sorted(by_device)}, which are on none of its "
                "nodes"
            )
        out_SH = torch.empty_like(tensors[0])
        for device, (portion, spans) in own.items():
            host, at = self._own[device], (routes.version, layer, portion.experts)
            rows, *gradient = (gather(each, spans) for each in tensors)
            if kind == wire.EXPERTS:
                done = host.run(*at, rows, guests=portion.guests)
            else:
                done = host.backward(*at, rows, *gradient, of_weights=not self.is_frozen)
            scatter(out_SH, spans, done)
        self._receive(awaited, out_SH, end_s)
        return out_SH

    def _send(
        self,
        worker: wire.Address,
        routes: NodeRoutes,
        kind: bytes,
        layer: int,
        asked: Sequence[Share],
        tensors: Sequence[torch.Tensor],
    ) -> int:
        """Send a worker rows for its node; returns the number of the call."""
        self._calls_sent += 1
        call = ExpertCall(
            self._calls_sent, layer, routes.version, self._fingerprint, self.address.ipc,
            self._patience.answer_s * _NODE_FRACTION, tuple(share.portion for share in asked),
        )  # fmt: skip
        spans = [span for share in asked for span in share.spans]
        if worker not in self._outboxes:
            self._open(worker, routes)
        self._outboxes[worker].send(call_message(kind, call, [gather(t, spans) for t in tensors]))
        return self._calls_sent

    def _open(self, worker: wire.Address, routes: NodeRoutes) -> None:
        """Connect to a worker, and close the connections that the map has no use for."""
        used = {address for node in routes.nodes for address in node.workers.values()}
        for address in self._outboxes.keys() - used:
            outbox = self._outboxes.pop(address)
            self._closed_bytes += outbox.bytes_sent
            outbox.close()
        self._outboxes[worker] = wire.Outbox(worker, self._keys)

    def _receive(self, awaited: dict[int, _Awaited], out_SH: torch.Tensor, end_s: float) -> None:
        """Put the nodes' rows where they belong, until all have answered."""
        while awaited:
            for devices, addresses, _ in awaited.values():
                if not self._lost.isdisjoint(addresses):
                    raise ExpertCallError(f"a device of {', '.join(devices)} was lost", devices)
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                devices = tuple(d for each in awaited.values() for d in each.devices)
                raise ExpertCallError(
                    f"{', '.join(devices)} did not answer within {self._patience.answer_s:g} s "
                    "(patience.answer_s)",
                    devices,
                )
            parts = self._inbox.receive(min(left_s, _POLL_S))
            if parts is not None:
                self._take(parts, awaited, out_SH)

    def _take(
        self, parts: Sequence[memoryview], awaited: dict[int, _Awaited], out_SH: torch.Tensor
    ) -> None:
        try:
            number, rows_SH, refusal, is_of_map = take_answer(parts)
        except ValueError as error:
            _log.warning("%s dropped a message: %s", self.address.name, error)
            return
        if number not in awaited:
            return  # of a call that was given up
        devices, _, spans = awaited.pop(number)
        if rows_SH is None:
            raise ExpertRefusal(refusal, devices, is_of_map=is_of_map)
        wanted = (sum(end - start for start, end in spans), out_SH.shape[1])
        if rows_SH.shape != wanted or rows_SH.dtype != out_SH.dtype:
            raise ExpertCallError(
                f"{', '.join(devices)} answered with rows of shape {tuple(rows_SH.shape)} and "
                f"{rows_SH.dtype}, {wanted} of {out_SH.dtype} were asked",
                devices,
            )
        scatter(out_SH, spans, rows_SH.to(out_SH.device))


def _messages(
    node: ExpertNode, asked: Sequence[Share], rows_SH: torch.Tensor
) -> list[tuple[str, Sequence[Share]]]:
    """Return what a node is sent: to which of its devices, and whose rows."""
    row_bytes = rows_SH.shape[1] * rows_SH.element_size()
    if sum(share.portion.num_rows for share in asked) * row_bytes <= DIRECT_BYTES:
        return [(node.front, asked)] if asked else []
    cuts = [cut(share, max(1, DIRECT_BYTES // row_bytes)) for share in asked]
    # In turns, so that all devices begin soon.
    turns = chain.from_iterable(zip_longest(*cuts))
    return [(share.portion.device, [share]) for share in turns if share is not None]


def _awaited(node: ExpertNode, receiver: str, asked: Sequence[Share]) -> _Awaited:
    devices = tuple(share.portion.device for share in asked)
    return _Awaited(
        devices,
        tuple(node.workers[device] for device in sorted({receiver, *devices})),
        tuple(span for share in asked for span in share.spans),
    )
