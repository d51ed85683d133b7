"""The rate a pool settles to when rounds follow each other.

Between two rounds all that matters of the past is how far apart the devices' clocks are, and when
the optimizer steps in flight end. As soon as that recurs, the rounds between are a cycle, and its
length over its number of rounds is the exact rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from placement.pooling.pool import Pool, SlotOption
from placement.pooling.slot_prices import SlotPrices
from placement.training import SlotSchedule, TrainingCosts

STEADY_VISITS = 8192
"""Visits of slots after which a pool whose state has not recurred is measured over its second
half. Averages over n visits of a device are off by up to 1 / n."""
STEADY_ROUNDS = 32
"""The same in rounds, at least: what the first rounds do differently must not reach that half."""
RECURRENCE_DIGITS = 7
"""Two states are the same when their clocks agree to 10^-7 of a round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SteadyState:
    """What a pool settles to."""

    seconds_per_round: float
    idle_fraction: float
    """Share of the aggregate speed of all devices, those without work included; see
    `placement.simulate`."""
    busy_s: tuple[float, ...]
    """Per device and round, on average."""
    rounds_measured: int
    is_periodic: bool
    """The pool's state recurred, so the figures hold for ever; if not, they are an average."""
    rounds_in_flight: int
    """Most rounds begun and not done at once: what the host keeps boundary activations of."""


def steady_state(
    costs: TrainingCosts, schedule: SlotSchedule, *, max_visits: int = STEADY_VISITS
) -> SteadyState:
    """Measure the seconds per round once fill is over, with drain never reached.

    Without a recurrence in `max_visits` visits (but at least 32 rounds, and 4 optimizer steps) the
    second half of them is measured: how far the clocks of the devices at work advanced, weighted
    by speed. O(max_visits x devices).

    Raises:
        ValueError: `max_visits` is below 1, or round robin meets a device that may not run a slot.
    """
    if max_visits < 1:
        raise ValueError(f"max_visits ({max_visits}) must be at least 1")
    prices = SlotPrices(costs, fused_forward_overlaps=schedule.fused_forward_overlaps)
    pool = Pool(costs.hand_off_s, schedule)
    speeds = [1.0 / seconds for seconds in alone_s(prices, schedule)]
    max_rounds = max(max_visits // len(schedule.slots), STEADY_ROUNDS)
    return measure(pool, slot_options(prices, schedule), speeds, schedule, max_rounds)


def slot_options(prices: SlotPrices, schedule: SlotSchedule) -> list[tuple[SlotOption, ...]]:
    """Return every slot's price on the devices that may run it."""
    devices = schedule.devices or [None] * len(schedule.slots)
    return [
        prices.options(slot, grain, allowed)
        for slot, grain, allowed in zip(schedule.slots, schedule.grain_list, devices, strict=True)
    ]


def alone_s(prices: SlotPrices, schedule: SlotSchedule) -> list[float]:
    """Return what a whole round's compute would take on each device alone; 1 / speed."""
    rows = [
        prices.options(slot, grain)
        for slot, grain in zip(schedule.slots, schedule.grain_list, strict=True)
    ]
    return [
        schedule.micro_batches * sum(option.total_s for option in column)
        for column in zip(*rows, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Mark:
    """The pool between two rounds."""

    num_rounds: int
    free_s: tuple[float, ...]
    busy_s: tuple[float, ...]


def measure(
    pool: Pool,
    slots: Sequence[Sequence[SlotOption]],
    speeds: Sequence[float],
    schedule: SlotSchedule,
    max_rounds: int,
) -> SteadyState:
    """Run the pool until its state recurs or the rounds are over, and measure; see above.

    `speeds` are rounds per second of each device alone. Fewer rounds than 4 optimizer steps are
    raised to that.
    """
    rounds_per_step = schedule.rounds_per_step or 1
    max_rounds = max(max_rounds, 4 * rounds_per_step)
    devices = sorted({option.device for options in slots for option in options})
    longest_s = [0.0] * len(speeds)
    marks: list[_Mark] = []
    spans_s: list[tuple[float, float]] = []
    seen: dict[tuple[float, ...], int] = {}
    busy_s = [0.0] * len(speeds)
    round_s = 1.0 / sum(speeds)
    begin: int | None = None
    while begin is None and pool.num_rounds < max_rounds:
        visits = pool.run_round(slots)
        for option, _, _ in visits:
            visit_s = schedule.micro_batches * option.total_s
            busy_s[option.device] += visit_s
            longest_s[option.device] = max(longest_s[option.device], visit_s)
        spans_s.append((visits[0].first_end_s - visits[0].option.total_s, visits[-1].last_end_s))
        if pool.num_rounds % rounds_per_step == 0:
            marks.append(_Mark(pool.num_rounds, tuple(pool.free_s), tuple(busy_s)))
            key = _state_key(pool, devices, round_s, schedule.staleness)
            begin = seen.get(key)
            seen.setdefault(key, len(marks) - 1)
    is_periodic = begin is not None
    if begin is None:
        begin = (len(marks) - 1) // 2
    window = _Window(marks[begin], marks[-1], speeds, longest_s)
    return _summary(window, spans_s, is_periodic=is_periodic)


def _state_key(
    pool: Pool, devices: Sequence[int], round_s: float, staleness: int
) -> tuple[float, ...]:
    """Return what the next rounds depend on, in rounds relative to the latest clock.

    A clock that lies before the next release cannot matter, nor can that of a device without
    slots.
    """
    latest_s = max(pool.free_s)
    release_s = pool.release_s()

    def relative(seconds: float) -> float:
        return round((max(seconds, release_s) - latest_s) / round_s, RECURRENCE_DIGITS)

    clocks = [float(pool.next_device)]
    for device in devices:
        clocks += [relative(pool.free_s[device]), relative(pool.upload_from_s[device])]
    steps_s = pool.step_ends_s[-1 - staleness :] if pool.has_steps else []
    return (*clocks, *map(relative, steps_s))


@dataclass(frozen=True, slots=True)
class _Window:
    begin: _Mark
    end: _Mark
    speeds: Sequence[float]
    longest_s: Sequence[float]
    """The longest visit of each device."""

    @property
    def busy_s(self) -> list[float]:
        pairs = zip(self.end.busy_s, self.begin.busy_s, strict=True)
        return [after_s - before_s for after_s, before_s in pairs]

    def latest_advance_s(self) -> float:
        """Return how far the latest clock advanced.

        Between equal states that is exact. The other clocks may differ where they lie before the
        release, where they do not matter.
        """
        return max(self.end.free_s) - max(self.begin.free_s)

    def mean_advance_s(self) -> float:
        """Return how far the clocks advanced, each weighted by its speed.

        A device that got nothing has a clock that stands still; its time is idle all the same.
        A bottleneck may leave the others ever further behind: it sets the pace, up to the one
        visit that may have begun before the window.
        """
        at_work = [device for device, busy_s in enumerate(self.busy_s) if busy_s]
        weights = [self.speeds[device] for device in at_work]
        advance_s = sum(
            weight * (self.end.free_s[device] - self.begin.free_s[device])
            for weight, device in zip(weights, at_work, strict=True)
        )
        paces_s = [
            busy - longest for busy, longest in zip(self.busy_s, self.longest_s, strict=True)
        ]
        return max(advance_s / sum(weights), *paces_s)


def _summary(
    window: _Window, spans_s: Sequence[tuple[float, float]], *, is_periodic: bool
) -> SteadyState:
    num_rounds = window.end.num_rounds - window.begin.num_rounds
    seconds = window.latest_advance_s() if is_periodic else window.mean_advance_s()
    busy_s = window.busy_s
    work_s = sum(speed * busy for speed, busy in zip(window.speeds, busy_s, strict=True))
    return SteadyState(
        seconds_per_round=seconds / num_rounds,
        idle_fraction=1.0 - work_s / (seconds * sum(window.speeds)),
        busy_s=tuple(busy / num_rounds for busy in busy_s),
        rounds_measured=num_rounds,
        is_periodic=is_periodic,
        rounds_in_flight=most_in_flight(spans_s[window.begin.num_rounds :]),
    )


def most_in_flight(spans_s: Sequence[tuple[float, float]]) -> int:
    """Return how many of the (begin, end) spans overlap at most."""
    changes = [(begin_s, 1) for begin_s, _ in spans_s] + [(end_s, -1) for _, end_s in spans_s]
    most = now = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most
