"""Lower bounds: finish times that no placement of a layer's experts can beat.

Notation: experts with loads w (rows), devices with speeds s (rows per second) and slots c (copies),
E experts, C slots in all, q = C - E spare slots; top(j) sums the j largest loads, low(j) the j
smallest, fast(k) the k highest speeds (all of them when k exceeds the devices). Split freely or
not, every bound holds for any replica weights:

- *work*: T >= top(E) / fast(all). The devices do all rows.
- *few copies*: T >= top(j) / fast(j + q) for every j. Each other expert takes a slot, so the j
  experts have at most j + q copies, on at most as many devices.
- *replicas*: T >= min over counts n >= 1 with sum n <= C of max_e w_e / fast(n_e). An expert with n
  copies sits on at most n devices. Spending each spare slot on the current maximum is optimal,
  since another copy only ever lowers that expert's own term.
- *shared device*: T >= (the r + 1 smallest of the m largest) / fast(1), m = r D + q + 1, D devices.
  At most q of those m experts have a second copy, so more than r D have one only, and r + 1 of
  these meet on one device.
- *crowded*: T >= min over devices d of (w + low(c_d - q - 1)) / s_d, w the load number q + 1 in
  descending order. One of the q + 1 largest has one copy only. The devices without d hold at most
  C - c_d experts, so d alone holds at least c_d - q, that one among them if it is there.
- *slots*: T >= low(E - k) / s(not B) for every set B of devices with k slots in all. At
  most k experts have a copy in B, so the others do all rows of at least E - k experts. The
  least s(not B) for every k is a knapsack, O(C x devices).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def finish_bound_s(
    loads: NDArray[np.float64], speeds: NDArray[np.float64], slots: Sequence[int]
) -> float:
    """Return the largest of this module's bounds for one layer, in seconds.

    `loads` [experts] rows, `speeds` [devices] rows per second, `slots` [devices] copies, each at
    least 1 and enough for one copy of every expert. O(experts log experts + slots x devices).
    """
    loads = np.sort(loads)[::-1]
    fast = np.cumsum(np.sort(speeds)[::-1])
    num_spare = sum(slots) - len(loads)
    return max(
        float(loads.sum() / fast[-1]),
        _few_copies_s(loads, fast, num_spare),
        _replicas_s(loads, fast, num_spare),
        _shared_device_s(loads, fast, num_spare),
        _crowded_s(loads, speeds, slots),
        _slots_s(loads, speeds, slots),
    )


def _few_copies_s(loads: NDArray[np.float64], fast: NDArray[np.float64], num_spare: int) -> float:
    copies = np.minimum(np.arange(1, len(loads) + 1) + num_spare, len(fast))
    return float(np.max(np.cumsum(loads) / fast[copies - 1]))


def _replicas_s(loads: NDArray[np.float64], fast: NDArray[np.float64], num_spare: int) -> float:
    # (-seconds, load, copies); a spare slot cannot help once the maximum is on all devices.
    slowest = [(-load / float(fast[0]), load, 1) for load in loads.tolist()]
    heapq.heapify(slowest)
    for _ in range(num_spare):
        _, load, copies = slowest[0]
        if copies == len(fast):
            break
        heapq.heapreplace(slowest, (-load / float(fast[copies]), load, copies + 1))
    return -float(slowest[0][0])


def _shared_device_s(
    loads: NDArray[np.float64], fast: NDArray[np.float64], num_spare: int
) -> float:
    best_rows = 0.0
    meeting = 1
    while (num_largest := meeting * len(fast) + num_spare + 1) <= len(loads):
        best_rows = max(best_rows, float(loads[num_largest - meeting - 1 : num_largest].sum()))
        meeting += 1
    return best_rows / float(fast[0])


def _crowded_s(
    loads: NDArray[np.float64], speeds: NDArray[np.float64], slots: Sequence[int]
) -> float:
    num_spare = sum(slots) - len(loads)
    if num_spare >= len(loads):
        return 0.0
    low = np.append(0.0, np.cumsum(loads[::-1]))
    # c_d - q - 1 others at most: d alone holds c_d - q of E, and c_d is E at most.
    others = np.maximum(0, np.array(slots) - num_spare - 1)
    return float(((loads[num_spare] + low[others]) / speeds).min())


def _slots_s(
    loads: NDArray[np.float64], speeds: NDArray[np.float64], slots: Sequence[int]
) -> float:
    num_experts = len(loads)
    # rest[k]: the least speed outside a set of devices with k slots or fewer. It is above 0: all
    # devices together hold every expert, and k stays below the number of experts.
    rest = np.zeros(num_experts)
    for speed, count in zip(speeds.tolist(), slots, strict=True):
        inside = rest[: max(0, num_experts - count)]
        rest = rest + speed
        rest[count:] = np.minimum(rest[count:], inside)
    low = np.cumsum(loads[::-1])[::-1]
    return float((low / rest).max())
