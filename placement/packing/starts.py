"""Where the search for a layer's placement starts: greedy packings that know speed and slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from placement.packing.eplb import replicate
from placement.packing.search import MET, LayerProblem

Piece = tuple[float, int]
"""(rows, expert): one copy with an equal part of its expert's rows."""


def greedy_starts(problem: LayerProblem) -> Iterator[list[list[int]]]:
    """Yield placements, as the holders of every expert.

    Two choices of replicas (only what no device could finish within the bound; every slot, spare
    ones to the expert with the most rows per copy) by two rules of packing (earliest finish; the
    device with the most rows to come per slot, which suits devices whose slots do not follow their
    speed). O(slots x devices) each.
    """
    every_slot = _pieces_in_every_slot(problem)
    needed = _needed_pieces(problem)
    for pieces in (every_slot,) if needed == every_slot else (every_slot, needed):
        for by_slot in (False, True):
            yield _pack(problem, pieces, by_slot=by_slot)


def _pieces_in_every_slot(problem: LayerProblem) -> list[Piece]:
    num_experts, num_devices = len(problem.loads), len(problem.speeds)
    num_copies = min(sum(problem.slots), num_experts * num_devices)
    experts, counts = replicate(problem.loads, num_copies)
    return _sorted([(problem.loads[expert] / counts[expert], expert) for expert in experts])


def _needed_pieces(problem: LayerProblem) -> list[Piece]:
    """Water-fill: give an expert as many of the fastest devices as finish it within the bound."""
    fastest = list(accumulate(sorted(problem.speeds, reverse=True)))
    num_spare = sum(problem.slots) - len(problem.loads)
    pieces = []
    for load, expert in _sorted([(load, expert) for expert, load in enumerate(problem.loads)]):
        count = 1
        most = min(len(fastest), num_spare + 1)
        while count < most and load > problem.bound_s * fastest[count - 1] * (1.0 + MET):
            count += 1
        num_spare -= count - 1
        pieces += [(load / count, expert)] * count
    return _sorted(pieces)


def _sorted(pieces: Sequence[Piece]) -> list[Piece]:
    return sorted(pieces, key=lambda piece: (-piece[0], piece[1]))


def _pack(problem: LayerProblem, pieces: Sequence[Piece], *, by_slot: bool) -> list[list[int]]:
    """Place the pieces, heaviest first; a replica for which no other device has a slot is left out.

    There are no more pieces than slots, so an expert's first copy always finds one.
    """
    speeds, num_free = problem.speeds, list(problem.slots)
    rows_on = [0.0] * len(speeds)
    holders: list[list[int]] = [[] for _ in problem.loads]
    for rows, expert in pieces:
        open_devices = [d for d, free in enumerate(num_free) if free and d not in holders[expert]]
        if not open_devices:
            continue
        if by_slot:
            due = [
                ((rows_on[d] - problem.bound_s * speeds[d]) / num_free[d], d) for d in open_devices
            ]
        else:
            due = [((rows_on[d] + rows) / speeds[d], d) for d in open_devices]
        device = min(due)[1]
        holders[expert].append(device)
        rows_on[device] += rows
        num_free[device] -= 1
    return holders
