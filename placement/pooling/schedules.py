"""Operation lists of the schedules that bind stages to devices.

Stage s of S lives on device s mod D. Each device executes its list in order.

Sources: GPipe (Huang et al., 2019); 1F1B (Narayanan et al., "PipeDream", 2019, with the flush of
"Memory-Efficient Pipeline-Parallel DNN Training", 2021); interleaved 1F1B (Narayanan et al.,
"Efficient Large-Scale Language Model Training on GPU Clusters", 2021); looped breadth-first
(Lamy-Poirier, "Breadth-First Pipeline Parallelism", 2022).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

BoundSchedule = Literal["gpipe", "1f1b", "interleaved", "looped_bfs"]


class Operation(NamedTuple):
    """The forward or backward pass of one micro-batch through one stage."""

    is_backward: bool
    stage: int
    micro_batch: int


def operation_lists(
    schedule: BoundSchedule, *, num_devices: int, num_stages: int, micro_batches: int
) -> list[list[Operation]]:
    """Return what each device executes, in order. O(stages x micro_batches).

    Raises:
        ValueError: The stages are no multiple of the devices (all of them for `gpipe` and `1f1b`),
            or `interleaved` has micro-batches that are no multiple of the devices.
    """
    if min(num_devices, num_stages, micro_batches) < 1:
        raise ValueError(
            f"devices ({num_devices}), stages ({num_stages}) and micro_batches ({micro_batches}) "
            f"must be at least 1"
        )
    _check_stages(schedule, num_devices, num_stages)
    devices = range(num_devices)
    match schedule:
        case "gpipe":
            return [_breadth_first([device], micro_batches, mirrored=False) for device in devices]
        case "looped_bfs":
            return [
                _breadth_first(range(device, num_stages, num_devices), micro_batches, mirrored=True)
                for device in devices
            ]
        case "1f1b":
            return [_one_f_one_b(device, num_devices, micro_batches) for device in devices]
        case "interleaved":
            if micro_batches % num_devices:
                raise ValueError(
                    f"interleaved needs micro_batches ({micro_batches}) to be a multiple of the "
                    f"{num_devices} devices"
                )
            return [
                _interleaved(device, num_devices, num_stages, micro_batches) for device in devices
            ]


def structural_bubble(num_devices: int, num_stages: int, micro_batches: int) -> float:
    """Return the idle share of equal stages without links: D (D - 1) / (S M + D (D - 1)).

    With S = D it is (D - 1) / (M + D - 1), GPipe's and 1F1B's. It holds for `interleaved` and
    `looped_bfs` with S stages, and for one isolated round-robin iteration of S slots (RoundPipe,
    Luo et al., 2026).
    """
    bubble = num_devices * (num_devices - 1)
    return bubble / (num_stages * micro_batches + bubble)


def _check_stages(schedule: BoundSchedule, num_devices: int, num_stages: int) -> None:
    if schedule in ("gpipe", "1f1b") and num_stages != num_devices:
        raise ValueError(
            f"{schedule} runs 1 stage per device: {num_stages} stages for {num_devices} devices"
        )
    if num_stages % num_devices:
        raise ValueError(
            f"{schedule} needs the stages ({num_stages}) to be a multiple of the "
            f"{num_devices} devices"
        )


def _breadth_first(
    stages: range | list[int], micro_batches: int, *, mirrored: bool
) -> list[Operation]:
    """Return all forwards stage by stage, then all backwards from the last stage."""
    order = range(micro_batches)
    backward_order = reversed(order) if mirrored else order
    backward_micro_batches = list(backward_order)
    return [Operation(False, stage, m) for stage in stages for m in order] + [
        Operation(True, stage, m) for stage in reversed(stages) for m in backward_micro_batches
    ]


def _one_f_one_b(device: int, num_devices: int, micro_batches: int) -> list[Operation]:
    warm_up = min(num_devices - device, micro_batches)
    operations = [Operation(False, device, m) for m in range(warm_up)]
    for m in range(micro_batches):
        operations.append(Operation(True, device, m))
        if warm_up + m < micro_batches:
            operations.append(Operation(False, device, warm_up + m))
    return operations


def _interleaved(
    device: int, num_devices: int, num_stages: int, micro_batches: int
) -> list[Operation]:
    """Return forwards and backwards in turn after a warm-up of (v - 1) D + 2 (D - 1 - device)."""
    per_device = num_stages // num_devices
    total = micro_batches * per_device
    warm_up = min(total, (per_device - 1) * num_devices + 2 * (num_devices - 1 - device))

    def operation(index: int, *, is_backward: bool) -> Operation:
        # D micro-batches pass one stage, then the same D the device's next stage.
        group, within = divmod(index, num_stages)
        chunk = within // num_devices
        if is_backward:
            chunk = per_device - 1 - chunk
        micro_batch = group * num_devices + index % num_devices
        return Operation(is_backward, chunk * num_devices + device, micro_batch)

    operations = [operation(index, is_backward=False) for index in range(warm_up)]
    for index in range(total):
        if warm_up + index < total:
            operations.append(operation(warm_up + index, is_backward=False))
        operations.append(operation(index, is_backward=True))
    return operations
