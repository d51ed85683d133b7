"""Cuts of a model into training slots, and the moves between them.

Values and enumeration only; how good a cut is, a simulation says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from placement.training import Slot, slots_from_counts


class Cut(NamedTuple):
    """Layer counts of the slots in the order in which they run; see `slots_from_counts`."""

    forward: tuple[int, ...]
    fused: int
    backward: tuple[int, ...]
    kept: int = 0
    """The last so many forward stages keep their activations for the first so many backward ones,
    which hold the same layers."""

    @property
    def num_slots(self) -> int:
        return len(self.forward) + 1 + len(self.backward)

    @property
    def slots(self) -> tuple[Slot, ...]:
        return slots_from_counts(self.forward, self.fused, self.backward)

    @property
    def kept_pairs(self) -> list[tuple[int, int]]:
        """The indices of a forward and a backward slot each."""
        fused = len(self.forward)
        return [(fused - 1 - stage, fused + 1 + stage) for stage in range(self.kept)]


class LayerWeights(NamedTuple):
    """Reference seconds of each layer in each kind of slot, and of the head in the fused one."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    fused: tuple[float, ...]
    head: float


def even_counts(weights: Sequence[float], num_stages: int) -> tuple[int, ...]:
    """Cut at the layers whose cumulative weight is nearest to equal shares, one layer at least."""
    sums = list(accumulate(weights, initial=0.0))
    cuts = [0]
    for stage in range(1, num_stages):
        target = sums[-1] * stage / num_stages
        low, high = cuts[-1] + 1, len(weights) - (num_stages - stage)
        cuts.append(min(range(low, high + 1), key=lambda cut: (abs(sums[cut] - target), cut)))
    cuts.append(len(weights))
    return tuple(end - first for first, end in pairwise(cuts))


def least_stages(weights: Sequence[float], limit: float) -> int:
    """Return how few contiguous stages of at most `limit` hold the layers (one layer always
    fits): greedy, which is optimal."""
    stages, room = 0, 0.0
    for weight in weights:
        if not stages or weight > room:
            stages, room = stages + 1, limit
        room -= weight
    return stages


class Shape(NamedTuple):
    """How many layers are fused, into how many stages the others are evened, and in which order:
    larger stages spread, last or first."""

    fused: int
    num_forward: int
    num_backward: int
    forward_order: int = 0
    backward_order: int = 0


NUM_ORDERS = 3


def shaped(weights: LayerWeights, shape: Shape) -> Cut:
    """Return the evened cut of a shape."""
    rest = len(weights.forward) - shape.fused
    if not rest:
        return Cut((), shape.fused, ())
    forward = even_counts(weights.forward[:rest], shape.num_forward)
    # Backward stages descend, so the evened cut of the reversed layers.
    backward = even_counts(weights.backward[rest - 1 :: -1], shape.num_backward)
    return Cut(
        _ordered(forward, shape.forward_order),
        shape.fused,
        _ordered(backward, shape.backward_order),
    )


def seed_shapes(weights: LayerWeights) -> list[Shape]:
    """Return shapes worth trying, the most promising first.

    For slots as long as 1, 2, ... layers of a forward, backward or fused stage: as many layers as
    fit go to the fused slot, or fewer down to the head alone; the others to as few forward and
    backward stages as fit, or one more. Order: RoundPipe's objective, slots x longest slot (Luo et
    al., 2026), then fewest slots.
    """
    estimates: dict[Shape, float] = {}
    for limit in _slot_lengths(weights):
        most_fused = _most_fused(weights, limit)
        for fused in {most_fused, max(0, most_fused - 1), most_fused // 2, min(1, most_fused), 0}:
            rest = len(weights.forward) - fused
            least_forward = least_stages(weights.forward[:rest], limit)
            least_backward = least_stages(weights.backward[:rest], limit)
            for num_forward in range(least_forward, min(least_forward + 1, rest) + 1):
                for num_backward in range(least_backward, min(least_backward + 1, rest) + 1):
                    shape = Shape(fused, num_forward, num_backward)
                    estimates[shape] = _estimate(weights, shape)
    return sorted(
        estimates,
        key=lambda shape: (estimates[shape], shape.num_forward + shape.num_backward, shape),
    )


def all_cuts(num_layers: int) -> Iterator[Cut]:
    """Yield every cut: (4^layers + 2) / 3 of them."""
    for fused in range(num_layers + 1):
        for forward in _compositions(num_layers - fused):
            for backward in _compositions(num_layers - fused):
                yield Cut(forward, fused, backward)


def similar_shapes(shape: Shape, num_layers: int) -> Iterator[Shape]:
    """Yield the shapes one step away: a stage or two more or less, a layer fused or not, another
    order."""
    fused, num_forward, num_backward, *_ = shape
    for step in (1, -1, 2, -2):
        yield shape._replace(num_backward=num_backward + step)
        yield shape._replace(num_forward=num_forward + step)
    for step in (1, -1):
        rest = num_layers - fused - step
        yield shape._replace(
            fused=fused + step,
            num_forward=max(min(num_forward, rest), 1) if rest > 0 else 0,
            num_backward=max(min(num_backward, rest), 1) if rest > 0 else 0,
        )
    for order in range(NUM_ORDERS):
        yield shape._replace(forward_order=order)
        yield shape._replace(backward_order=order)


def is_possible(shape: Shape, num_layers: int) -> bool:
    """Whether so many layers can be cut into so many stages."""
    rest = num_layers - shape.fused
    least = min(rest, 1)
    return (
        shape.fused >= 0
        and rest >= 0
        and all(least <= count <= rest for count in (shape.num_forward, shape.num_backward))
    )


def neighbours(cut: Cut) -> Iterator[Cut]:
    """Yield the cuts one move away: a layer to an adjacent stage, a layer into or out of the
    fused slot, two stages swapped, merged, or one split in halves."""
    forward, fused, backward, _ = cut
    if forward:
        yield Cut(grown(forward, -1, -1), fused + 1, grown(backward, 0, -1))
    if fused:
        yield Cut(grown(forward, -1, 1), fused - 1, grown(backward, 0, 1))
    for counts in reshaped(backward):
        yield Cut(forward, fused, counts)
    for counts in reshaped(forward):
        yield Cut(counts, fused, backward)


def mirrored(forward: Sequence[int], fused: int, kept: int) -> Cut:
    """Return the cut whose backward stages are the forward ones."""
    return Cut(tuple(forward), fused, tuple(reversed(forward)), kept)


def _compositions(total: int) -> list[tuple[int, ...]]:
    if not total:
        return [()]
    return [(head, *rest) for head in range(1, total + 1) for rest in _compositions(total - head)]


def _slot_lengths(weights: LayerWeights) -> list[float]:
    lengths = set()
    for layers in (weights.forward, weights.backward):
        mean = sum(layers) / len(layers)
        # A sum of k mean layers, and a hair more so that rounding does not split equal layers.
        lengths |= {mean * count * (1 + 1e-9) for count in range(1, len(layers) + 1)}
    for total in accumulate(reversed(weights.fused), initial=weights.head):
        lengths.add(total * (1 + 1e-9))
    return sorted(lengths)


def _most_fused(weights: LayerWeights, limit: float) -> int:
    totals = list(accumulate(reversed(weights.fused), initial=weights.head))
    return max(0, sum(total <= limit for total in totals) - 1)


def _estimate(weights: LayerWeights, shape: Shape) -> float:
    cut = shaped(weights, shape)
    rest = len(weights.forward) - cut.fused
    longest = max(
        weights.head + sum(weights.fused[rest:]),
        *_stage_sums(weights.forward[:rest], cut.forward),
        *_stage_sums(weights.backward[:rest][::-1], cut.backward),
        0.0,
    )
    return cut.num_slots * longest


def _ordered(counts: tuple[int, ...], order: int) -> tuple[int, ...]:
    return counts if order == 0 else tuple(sorted(counts, reverse=order == 2))


def _stage_sums(weights: Sequence[float], counts: Sequence[int]) -> list[float]:
    ends = accumulate(counts)
    return [sum(weights[end - count : end]) for count, end in zip(counts, ends, strict=True)]


def grown(counts: tuple[int, ...], index: int, change: int) -> tuple[int, ...]:
    """Return the counts with `change` layers more in one stage; a stage of 0 layers goes."""
    if not counts:
        return (change,)
    grown = list(counts)
    grown[index] += change
    return tuple(count for count in grown if count)


def reshaped(counts: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield stages of the same layers: one layer moved, stages merged, halved or swapped."""
    for left in range(len(counts) - 1):
        pair = counts[left : left + 2]
        before, after = counts[:left], counts[left + 2 :]
        for change in (1, -1):
            moved = (pair[0] + change, pair[1] - change)
            if min(moved) >= 1:
                yield before + moved + after
        yield (*before, sum(pair), *after)
    for index, count in enumerate(counts):
        if count > 1:
            halves = (count - count // 2, count // 2)
            yield (*counts[:index], *halves, *counts[index + 1 :])
    for left in range(len(counts)):
        for right in range(left + 2, len(counts)):
            yield from _exchanged(counts, left, right)


def _exchanged(counts: tuple[int, ...], left: int, right: int) -> Iterator[tuple[int, ...]]:
    """Yield two distant stages swapped, and with a layer of one given to the other."""
    pair = counts[left], counts[right]
    for new in ((pair[1], pair[0]), (pair[0] + 1, pair[1] - 1), (pair[0] - 1, pair[1] + 1)):
        if new != pair and min(new) >= 1:
            moved = list(counts)
            moved[left], moved[right] = new
            yield tuple(moved)
