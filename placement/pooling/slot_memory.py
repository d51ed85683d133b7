"""Which devices have the memory for which slots, and at which grain they recompute.

While a slot runs, the weights of the next one are brought. Any two slots of a device may follow
each other, so a device takes a set of slots in which every one fits beside the heaviest weights
of the set.

Kept activations, and their weights, stay on a device from a forward slot to its backward slot,
beside whatever it runs in between. They are those of one round at most: a device runs its slots in
order, so it is done with the backward slots of a round before it begins the forward slots of the
next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from placement.pooling.slot_prices import SlotPrices
from placement.training import RecomputeGrain, Slot


@dataclass(frozen=True, slots=True)
class SlotNeed:
    """What one slot needs at the grain chosen for it."""

    grain: RecomputeGrain
    resident_bytes: int
    weight_bytes: int
    seconds: float
    """Of one micro-batch on the reference device: how much it is worth to take the slot."""
    kept_bytes: int = 0
    """Of a forward slot: what stays on the device until its backward slot is done."""
    kept_with: int | None = None
    """The slot that a device must take too, because activations stay on it."""


def slot_need(prices: SlotPrices, slot: Slot) -> SlotNeed:
    """Choose the grain of a slot: whole stages, unless layer by layer it fits more devices.

    A whole stage recomputes ahead of the gradient that it waits for; layer by layer only the last
    layer does, but one layer's activations are kept instead of all.
    """
    grain: RecomputeGrain = "none"
    if slot.kind == "backward":
        caps = prices.costs.memory_bytes
        whole, single = prices.alone_bytes(slot, "stage"), prices.alone_bytes(slot, "layer")
        grain = "layer" if any(single <= cap < whole for cap in caps) else "stage"
    return SlotNeed(
        grain,
        prices.resident_bytes(slot, grain),
        prices.weight_bytes(slot),
        prices.option(slot, grain, 0).total_s,
    )


def keeping_needs(
    prices: SlotPrices,
    slots: Sequence[Slot],
    needs: Sequence[SlotNeed],
    pairs: Sequence[tuple[int, int]],
    micro_batches: int,
) -> list[SlotNeed]:
    """Return the needs where forward slots keep their activations for backward slots."""
    changed = list(needs)
    for forward, backward in pairs:
        changed[forward] = replace(
            needs[forward],
            kept_bytes=prices.kept_bytes(slots[forward], micro_batches),
            kept_with=backward,
        )
        changed[backward] = SlotNeed(
            "keep",
            prices.resident_bytes(slots[backward], "keep"),
            prices.weight_bytes(slots[backward], "keep"),
            prices.option(slots[backward], "keep", 0).total_s,
            kept_with=forward,
        )
    return changed


def devices_of_slots(
    needs: Sequence[SlotNeed], memory_bytes: Sequence[int]
) -> tuple[tuple[int, ...], ...] | None:
    """Return per slot the devices that take it, or None when some slot finds none.

    Every device takes the set worth the most seconds (ties: none that keep activations, then the
    lighter weights); one that takes slots which keep activations has room for all of those. A slot
    that
    nobody took is pinned to the roomiest device that can hold it (ties: the lowest index), which
    then chooses again among the sets that have it. O(devices x slots x distinct weights).
    """
    heaviest_bytes = max(need.weight_bytes for need in needs)
    most_bytes = max(need.resident_bytes for need in needs) + heaviest_bytes
    if most_bytes + sum(need.kept_bytes for need in needs) <= min(memory_bytes):
        return (tuple(range(len(memory_bytes))),) * len(needs)
    taken = [_best_set(needs, cap, frozenset()) for cap in memory_bytes]
    roomiest = sorted(range(len(memory_bytes)), key=lambda device: (-memory_bytes[device], device))
    pins: list[frozenset[int]] = [frozenset()] * len(memory_bytes)
    for slot in range(len(needs)):
        if any(slot in slots for slots in taken):
            continue
        for device in roomiest:
            pinned = _best_set(needs, memory_bytes[device], pins[device] | {slot})
            if pinned and _still_covered(taken, device, pinned, slot):
                taken[device], pins[device] = pinned, pins[device] | {slot}
                break
        else:
            return None
    return tuple(
        tuple(device for device, slots in enumerate(taken) if slot in slots)
        for slot in range(len(needs))
    )


def _best_set(
    needs: Sequence[SlotNeed], cap_bytes: int, must_have: frozenset[int]
) -> frozenset[int]:
    best: frozenset[int] = frozenset()
    best_seconds = 0.0
    kept_bytes = sum(need.kept_bytes for need in needs)
    rooms_bytes = (cap_bytes, cap_bytes - kept_bytes) if kept_bytes else (cap_bytes,)
    for room_bytes in rooms_bytes:
        keeps = room_bytes < cap_bytes
        for heaviest_bytes in sorted({need.weight_bytes for need in needs}):
            fitting = {
                index
                for index, need in enumerate(needs)
                if need.weight_bytes <= heaviest_bytes
                and need.resident_bytes + heaviest_bytes <= room_bytes
                and (keeps or need.kept_with is None)
            }
            chosen = frozenset(
                index for index in fitting if (needs[index].kept_with in fitting | {None})
            )
            seconds = sum(needs[index].seconds for index in sorted(chosen))
            if must_have <= chosen and seconds > best_seconds:
                best, best_seconds = chosen, seconds
    return best


def _still_covered(
    taken: Sequence[frozenset[int]], device: int, pinned: frozenset[int], slot: int
) -> bool:
    """Whether every slot before `slot` keeps a device when `device` takes `pinned` instead."""
    others = [slots for other, slots in enumerate(taken) if other != device]
    lost = taken[device] - pinned
    return all(before > slot or any(before in slots for slots in others) for before in lost)
