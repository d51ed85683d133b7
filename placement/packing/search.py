"""Search for one layer's placement: where copies of experts go so that the slowest device is fast.

Every placement tried gets its exact replica weights (`placement.packing.weights`), whose critical
devices say where the trouble is: only a change that takes rows off them can help. Two changes are
tried: exchange a copy there for a lighter one (or for an empty slot) elsewhere, and copy one of
their experts onto a slot elsewhere that is empty, or is emptied: its copy was one of several, or
moves the other way. A change is scored as if the critical devices were one device; the best scored
are solved exactly.

`search_layer` descends from every start, then walks on from the local optima by tabu search
(Glover, "Tabu search, part I", ORSA Journal on Computing 1(3), 1989). No randomness: ties go to the
lower device, then the lower expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from placement.packing.weights import solve_weights

MET = 1e-9
"""Gap to the bound that is rounding."""
WORTHWHILE_GAP = 1e-4
"""Gap to the bound under which no other start is tried: loads are not measured that finely."""
NEGLIGIBLE_SHARE = 1e-9
"""A replica with less of its expert's rows is dropped."""
MAX_BEST_SCORED = 5
"""Changes of each kind that are solved exactly per step."""
TABU_STEPS = 5
"""Steps for which a dropped copy may not come back, and up to 3 more in turn, so that the walk does
not lock into a cycle of one length."""

Copy = tuple[int, int]
"""(expert, device)."""


class LayerProblem(NamedTuple):
    """One layer: rows per expert; rows per second and slots per device; a bound on the finish."""

    loads: tuple[float, ...]
    speeds: tuple[float, ...]
    slots: tuple[int, ...]
    """At most one per expert, and together enough for one copy of each."""
    bound_s: float


class LayerState:
    """A placement of every expert with its exact weights. Replicas that carry nothing are gone."""

    def __init__(
        self,
        problem: LayerProblem,
        holders: Sequence[Sequence[int]],
        pinned: frozenset[Copy] = frozenset(),
    ) -> None:
        self.problem = problem
        self.pinned = pinned
        """Copies that stay, whatever they carry."""
        self.weights = solve_weights(holders, problem.loads, problem.speeds)
        self.bottleneck_s = self.weights.bottleneck_s
        self.spread = sum(
            finish_s * finish_s * speed
            for finish_s, speed in zip(self.weights.finish_s, problem.speeds, strict=True)
        )
        """Least when all devices finish together: tells placements of one bottleneck apart."""
        self.holders = [
            held if len(held) == 1 else self._needed(expert, held)
            for expert, held in enumerate(holders)
        ]

    def _needed(self, expert: int, held: Sequence[int]) -> Sequence[int]:
        rows, least = self.weights.rows[expert], NEGLIGIBLE_SHARE * self.problem.loads[expert]
        needed = sorted(d for d in held if rows[d] > least or (expert, d) in self.pinned)
        return needed or [min(held)]

    @property
    def is_optimal(self) -> bool:
        return self.bottleneck_s <= self.problem.bound_s * (1.0 + MET)

    @property
    def is_close(self) -> bool:
        return self.bottleneck_s <= self.problem.bound_s * (1.0 + WORTHWHILE_GAP)

    def beats(self, other: LayerState) -> bool:
        """Say whether the slowest device is faster, or as fast with the others more level."""
        if self.bottleneck_s < other.bottleneck_s * (1.0 - MET):
            return True
        is_tie = self.bottleneck_s <= other.bottleneck_s * (1.0 + NEGLIGIBLE_SHARE / 1e3)
        return is_tie and self.spread < other.spread * (1.0 - MET)

    def changed(self, change: Change) -> LayerState:
        return LayerState(self.problem, self.holders_after(change), self.pinned)

    def holders_after(self, change: Change) -> list[Sequence[int]]:
        holders = list(self.holders)
        for expert, device in change.drops:
            holders[expert] = [held for held in holders[expert] if held != device]
        for expert, device in change.adds:
            holders[expert] = [*holders[expert], device]
        return holders


class Change(NamedTuple):
    """Copies to add and to drop, with the finish of the slowest device that it may lead to."""

    score_s: float
    adds: tuple[Copy, ...]
    drops: tuple[Copy, ...]


class Trials:
    """Exact solutions that the search may still pay for."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self) -> bool:
        self.left -= 1
        return self.left >= 0


def search_layer(
    problem: LayerProblem, starts: Iterable[Sequence[Sequence[int]]], max_trials: int
) -> LayerState:
    """Return the best placement found from `starts` (holders per expert) in `max_trials` trials.

    Never worse than any start. Stops early when the bound is met, or nearly met by a local
    optimum. O(max_trials x (weights + copies^2)).
    """
    states = [LayerState(problem, holders) for holders in starts]
    states.sort(key=lambda state: state.bottleneck_s)
    trials = Trials(max_trials)
    for index, state in enumerate(states):
        states[index] = descend(state, trials)
        if states[index].is_close:
            return _best(states)
    states.sort(key=lambda state: state.bottleneck_s)
    share = max(0, trials.left) // len(states)
    for index, state in enumerate(states):
        states[index] = walk(state, Trials(share))
        if states[index].is_optimal:
            break
    return _best(states)


def _best(states: Sequence[LayerState]) -> LayerState:
    best = states[0]
    for state in states[1:]:
        if state.beats(best):
            best = state
    return best


def descend(state: LayerState, trials: Trials) -> LayerState:
    """Apply the first change in order of score that is an improvement, until there is none."""
    for improved in improvements(state, trials):
        state = improved
    return state


def improvements(state: LayerState, trials: Trials) -> Iterator[LayerState]:
    """Yield the ever better placements of a descent, each one change from the one before."""
    while not state.is_optimal:
        for change in _Changes(state).best():
            if change.score_s >= state.bottleneck_s * (1.0 - MET):
                continue
            if not trials.take():
                return
            tried = state.changed(change)
            if tried.beats(state):
                state = tried
                yield state
                break
        else:
            return


def walk(state: LayerState, trials: Trials) -> LayerState:
    """Apply the best change, improvement or not, and return the best state passed."""
    best = state
    tabu = np.zeros((len(state.problem.loads) + 1, len(state.problem.speeds)), dtype=np.int64)
    step = 0
    while not best.is_optimal:
        step += 1
        chosen: tuple[LayerState, Change] | None = None
        for change in _Changes(state, tabu > step).best():
            if not trials.take():
                return best
            tried = state.changed(change)
            if chosen is None or tried.beats(chosen[0]):
                chosen = tried, change
        if chosen is None:
            if not (tabu > step).any():
                return best
            # Every way on is barred; waiting would be the same as forgetting.
            tabu[:] = 0
            continue
        state = chosen[0]
        for copy in chosen[1].drops:
            tabu[copy] = step + TABU_STEPS + step % 4
        if state.beats(best):
            best = state
    return best


class _Changes:
    """The changes around a state, scored all at once.

    Index legend: P copies on critical devices, Q copies and empty slots on the others (an empty
    slot is a copy of the expert after the last, with no rows).
    """

    def __init__(self, state: LayerState, tabu: NDArray[np.bool_] | None = None) -> None:
        problem, weights = state.problem, state.weights
        self.is_descent = tabu is None
        num_experts, num_devices = len(problem.loads), len(problem.speeds)
        copies = [(e, d) for e, held in enumerate(state.holders) for d in held]
        expert, device = np.array(copies, dtype=np.int64).T
        rows = np.array([weights.rows[e][d] for e, d in copies])
        movable = np.array([copy not in state.pinned for copy in copies])
        self.holds = np.zeros((num_experts + 1, num_devices), dtype=bool)
        self.holds[expert, device] = True
        # Where a copy may not go: it is there, or it left too recently.
        self.barred = self.holds if tabu is None else self.holds | tabu
        self.loads = np.append(np.array(problem.loads), 0.0)
        self.num_copies = np.append(np.bincount(expert, minlength=num_experts), 2)
        self.speeds = np.array(problem.speeds)
        self.rows_on = np.array(weights.finish_s) * self.speeds

        is_critical = np.zeros(num_devices, dtype=bool)
        is_critical[list(weights.critical_devices)] = True
        self.critical_rows = float(self.rows_on[is_critical].sum())
        self.critical_speed = float(self.speeds[is_critical].sum())
        inside = is_critical[device]
        self.expert_P, self.device_P = expert[inside], device[inside]
        self.rows_P, self.movable_P = rows[inside], movable[inside]

        self.num_free = np.array(problem.slots) - np.bincount(device, minlength=num_devices)
        empty = np.flatnonzero(~is_critical & (self.num_free > 0))
        outside = ~inside & movable
        self.expert_Q = np.append(expert[outside], np.full(len(empty), num_experts))
        self.device_Q = np.append(device[outside], empty)
        self.rows_Q = np.append(rows[outside], np.zeros(len(empty)))
        self.no_expert = num_experts

    def best(self) -> list[Change]:
        """Return the best scored changes, exchanges before copies: they take no slot."""
        if not len(self.expert_Q):
            return []
        return self._exchanges() + self._copies()

    def _exchanges(self) -> list[Change]:
        keep = np.flatnonzero(self.movable_P)
        expert, device = self.expert_P[keep], self.device_P[keep]
        moved_PQ = self.rows_P[keep][:, None] - self.rows_Q[None, :]
        score_PQ = self._finish_s(moved_PQ, self.rows_on[self.device_Q], self.device_Q)
        barred_PQ = self.barred[np.ix_(expert, self.device_Q)]
        barred_PQ |= self.barred[np.ix_(self.expert_Q, device)].T
        barred_PQ |= moved_PQ <= 0 if self.is_descent else moved_PQ == 0
        score_PQ[barred_PQ] = np.inf
        changes = []
        for score_s, p, q in _lowest(score_PQ):
            here, there = int(device[p]), int(self.device_Q[q])
            one, other = int(expert[p]), int(self.expert_Q[q])
            adds: tuple[Copy, ...] = ((one, there),)
            drops: tuple[Copy, ...] = ((one, here),)
            if other != self.no_expert:
                adds, drops = (*adds, (other, here)), (*drops, (other, there))
            changes.append(Change(score_s, adds, drops))
        return changes

    def _copies(self) -> list[Change]:
        expert, device, dropped = self.expert_Q, self.device_Q, self.rows_Q
        loads_P = self.loads[self.expert_P]
        # As many rows as level the two, the dropped copy's going to the critical devices.
        rows_on, speed = self.rows_on[device] - dropped, self.speeds[device]
        level_s = (self.critical_rows + self.rows_on[device]) / (self.critical_speed + speed)
        moved_PQ = np.minimum(loads_P[:, None], np.maximum(0.0, level_s * speed - rows_on))
        score_PQ = self._finish_s(moved_PQ - dropped, self.rows_on[device], device)
        # Among equals the expert with more rows leaves more to choose from.
        score_PQ *= 1.0 - MET * (loads_P / loads_P.max())[:, None]
        # An expert's only copy makes way for an empty slot beside the one that is copied.
        has_room_P = self.num_free[self.device_P] > 0
        can_yield_PQ = ~self.barred[np.ix_(expert, self.device_P)].T & has_room_P[:, None]
        is_only_Q = self.num_copies[expert] == 1
        score_PQ[is_only_Q & ~can_yield_PQ] = np.inf
        score_PQ[self.barred[np.ix_(self.expert_P, device)]] = np.inf
        changes = []
        for score_s, p, q in _lowest(score_PQ):
            there, other = int(device[q]), int(expert[q])
            adds: tuple[Copy, ...] = ((int(self.expert_P[p]), there),)
            if is_only_Q[q]:
                adds = (*adds, (other, int(self.device_P[p])))
            drops = () if other == self.no_expert else ((other, there),)
            changes.append(Change(score_s, adds, drops))
        return changes

    def _finish_s(
        self,
        moved_PQ: NDArray[np.float64],
        rows_on_Q: NDArray[np.float64],
        device_Q: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        """Return the later of the critical devices and the other, once rows have moved."""
        critical_s = (self.critical_rows - moved_PQ) / self.critical_speed
        other_s: NDArray[np.float64] = (rows_on_Q + moved_PQ) / self.speeds[device_Q]
        return np.maximum(critical_s, other_s)


def _lowest(score_PQ: NDArray[np.float64]) -> list[tuple[float, int, int]]:
    """Return the lowest finite scores with where they are, lowest first; ties by position."""
    flat = score_PQ.ravel()
    num_kept = min(MAX_BEST_SCORED, len(flat))
    if not num_kept:
        return []
    limit = np.partition(flat, num_kept - 1)[num_kept - 1]
    kept = np.flatnonzero((flat <= limit) & np.isfinite(flat))
    kept = kept[np.argsort(flat[kept], kind="stable")][:num_kept]
    width = score_PQ.shape[1]
    return [(float(flat[i]), int(i) // width, int(i) % width) for i in kept]
