"""Search for cuts that keep activations on a device, so that its backward slots repeat nothing.

A backward slot that finds its activations must hold just the layers of a forward slot and follow
it to its device. That pays where a device has room for a round's micro-batches of some layers; the
search starts from evened stages that mirror each other, with as many kept as memory allows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from placement.pooling.cuts import Cut, even_counts, grown, mirrored, reshaped, seed_shapes
from placement.pooling.search import (
    COARSE,
    FINE,
    NUM_FINALISTS,
    CutSimulator,
    climb,
    ranked,
    reference_weights,
)
from placement.training import Slot

KEEP_EFFORT = 1 / 3
"""Of the effort of the search for other cuts, on top of it."""
SEED_SHARE = 0.6
"""Of that, up to where seeds are tried; the rest is for moves."""
NUM_STARTS = 8


def can_keep(simulator: CutSimulator) -> bool:
    """Whether some device has room for what one layer keeps, beside a forward slot of it.

    Activations of 0 bytes are taken as unknown rather than free.
    """
    costs, prices = simulator.costs, simulator.prices
    layers = [
        Slot(kind="forward", first_layer=layer, end_layer=layer + 1)
        for layer in range(costs.num_layers)
    ]
    least_bytes = min(
        prices.kept_bytes(layer, simulator.objective.micro_batches)
        + prices.resident_bytes(layer, "none")
        for layer in layers
    )
    return all(costs.layer_activation_bytes) and least_bytes <= max(costs.memory_bytes)


def kept_cuts(simulator: CutSimulator, bases: list[Cut], effort: int) -> list[Cut]:
    """Return up to `NUM_FINALISTS` cuts that keep activations, the shortest rounds first.

    `bases` are good cuts that keep none, `effort` what the search for them might price.
    """
    if not can_keep(simulator):
        return []
    begun, effort = simulator.effort, int(KEEP_EFFORT * effort)
    tried = []
    for seed in _seeds(simulator, bases):
        if simulator.effort - begun >= SEED_SHARE * effort:
            break
        most = _most_kept(simulator, seed)
        tried += [seed._replace(kept=kept) for kept in sorted({most, (most + 1) // 2}) if kept]
        for cut in tried[-2:]:
            simulator.seconds(cut, COARSE)
    starts = ranked(simulator, tried, COARSE)[:NUM_STARTS]
    climbed = [climb(simulator, start, kept_neighbours, begun + effort) for start in starts]
    best = ranked(simulator, climbed, FINE)[:NUM_FINALISTS]
    return [cut for cut in best if math.isfinite(simulator.seconds(cut, FINE))]


def _seeds(simulator: CutSimulator, bases: list[Cut]) -> list[Cut]:
    """Return cuts whose backward stages are the forward ones, the most promising first."""
    weights = reference_weights(simulator.costs)
    num_layers = simulator.costs.num_layers
    seeds = [
        cut
        for base in bases
        for cut in (
            mirrored(base.forward, base.fused, len(base.forward)),
            mirrored(base.backward[::-1], base.fused, len(base.backward)),
        )
    ]
    shapes = seed_shapes(weights)
    both = [f + b for f, b in zip(weights.forward, weights.backward, strict=True)]
    fused_counts = [*(base.fused for base in bases), *(shape.fused for shape in shapes)]
    for fused in dict.fromkeys(fused_counts):
        rest = num_layers - fused
        if rest:
            # As many stages as promise much without keeping, and the finest, which hold the least.
            counts = {shape.num_forward: None for shape in shapes if shape.fused == fused}
            seeds += [
                mirrored(even_counts(both[:rest], num_stages), fused, num_stages)
                for num_stages in (*counts, rest)
            ]
    return [cut for cut in dict.fromkeys(seeds) if cut.kept]


def _most_kept(simulator: CutSimulator, cut: Cut) -> int:
    """Return how many stages from the fused slot down memory lets the cut keep: bisection."""
    low, high = 0, cut.kept
    while low < high:
        middle = (low + high + 1) // 2
        if simulator.schedule(cut._replace(kept=middle)) is None:
            high = middle - 1
        else:
            low = middle
    return low


class _Parts(NamedTuple):
    """A cut's stages, the kept ones apart."""

    below: tuple[int, ...]
    """Forward stages that keep nothing."""
    kept: tuple[int, ...]
    """Those that do, and their backward stages in reverse."""
    fused: int
    back: tuple[int, ...]
    """Backward stages that recompute."""

    @property
    def cut(self) -> Cut:
        backward = (*self.kept[::-1], *self.back)
        return Cut((*self.below, *self.kept), self.fused, backward, len(self.kept))


def kept_neighbours(cut: Cut) -> Iterator[Cut]:
    """Yield the cuts one move away from one that keeps activations: among the kept stages or the
    others, a layer or a stage from these to those, a layer into or out of the fused slot."""
    kept = cut.kept
    parts = _Parts(cut.forward[:-kept], cut.forward[-kept:], cut.fused, cut.backward[kept:])
    for moved in (*_moves_of_kept(parts), *_moves_below(parts)):
        if moved.kept:
            yield moved.cut


def _moves_of_kept(parts: _Parts) -> Iterator[_Parts]:
    below, kept, fused, back = parts
    yield parts._replace(kept=grown(kept, -1, -1), fused=fused + 1)
    if fused:
        yield parts._replace(kept=grown(kept, -1, 1), fused=fused - 1)
    for counts in reshaped(kept):
        yield parts._replace(kept=counts)
    yield _Parts((*below, kept[0]), kept[1:], fused, (kept[0], *back))
    yield _Parts(grown(below, -1, 1), grown(kept, 0, -1), fused, grown(back, 0, 1))


def _moves_below(parts: _Parts) -> Iterator[_Parts]:
    below, kept, fused, back = parts
    if not below:
        return
    yield _Parts(grown(below, -1, -1), grown(kept, 0, 1), fused, grown(back, 0, -1))
    if below[-1] == back[0]:
        yield _Parts(below[:-1], (below[-1], *kept), fused, back[1:])
    for counts in reshaped(below):
        yield parts._replace(below=counts)
    for counts in reshaped(back):
        yield parts._replace(back=counts)
