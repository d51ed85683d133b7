"""How one layer gets from what its devices hold to what they shall hold, in swaps that fit.

A swap is all or nothing: new copies are loaded beside those in use, then the layer changes over
between two steps, then the old copies are released. Until then a device holds both, so a swap may
load no more than its free slots and the staging slots that all layers share. A change that loads
more is cut into several swaps, and every layout between them holds every expert.

The cut follows chains: a full device takes an expert in where it can give one up; if that was the
last copy, the device that shall have it takes it in, and so on, until a device has room, gives up a
copy that is not the last, or the chain closes to a ring. A chain loads once on each device.
"""

from __future__ import annotations

from collections.abc import Sequence

Layout = tuple[frozenset[int], ...]
"""[devices] the experts of one layer that each holds."""
_Copy = tuple[int, int]
"""(expert, device)."""


def layouts_between(
    held: Layout, wanted: Layout, slots: Sequence[int], *, staging_slots: int
) -> list[Layout]:
    """Return the layouts to swap to, one after another; the last is `wanted`.

    Both must hold every expert and keep to `slots`. With `staging_slots` of 1 or more there always
    is such a sequence. O(copies^2 x devices).
    """
    if staging_slots < 1:
        raise ValueError(
            f"staging_slots ({staging_slots}) must be at least 1: a full device has no other place "
            f"for a copy that it takes in"
        )
    layouts = []
    while held != wanted:
        held = _next_layout(held, wanted, slots, staging_slots)
        layouts.append(held)
    return layouts


def _next_layout(held: Layout, wanted: Layout, slots: Sequence[int], staging_slots: int) -> Layout:
    """Follow chains as long as what they load fits beside what is held."""
    now = [set(here) for here in held]
    room = [slots[d] + staging_slots - len(here) for d, here in enumerate(held)]
    while pending := _first_pending(now, wanted):
        adds, drops = _chain(pending, now, wanted, slots)
        if any(room[device] == 0 for _, device in adds):
            return tuple(map(frozenset, now))
        for expert, device in adds:
            now[device].add(expert)
            room[device] -= 1
        for expert, device in drops:
            now[device].remove(expert)
    return wanted


def _first_pending(now: Sequence[set[int]], wanted: Layout) -> _Copy | None:
    for device, here in enumerate(wanted):
        if missing := here - now[device]:
            return min(missing), device
    return None


def _chain(
    pending: _Copy, now: Sequence[set[int]], wanted: Layout, slots: Sequence[int]
) -> tuple[list[_Copy], list[_Copy]]:
    """Return the loads and releases of one chain that begins with a load."""
    expert, device = pending
    adds: list[_Copy] = []
    drops: list[_Copy] = []
    at: dict[int, int] = {}
    while device not in at:
        at[device] = len(adds)
        adds.append((expert, device))
        if len(now[device]) < slots[device]:
            return adds, drops
        unwanted = sorted(now[device] - wanted[device])
        spare = [other for other in unwanted if sum(other in here for here in now) > 1]
        if spare:
            return adds, [*drops, (spare[0], device)]
        drops.append((unwanted[0], device))
        expert = unwanted[0]
        device = next(d for d, here in enumerate(wanted) if expert in here)
    # A ring: what came before it goes on another time.
    first = at[device]
    return [*adds[first + 1 :], (expert, device)], drops[first:]
