"""Timing a device: matrix products, memory, and the way from its node's memory.

A figure is the median of repeats after a warm-up, within a budget of seconds. Knows no Ray.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

from actors.engine.checkpoint import Checkpoint
from placement.measured import MatmulRate

MATMUL_ROWS = {"cpu": (1, 4, 16, 64, 256), "cuda": (1, 4, 16, 64, 256, 1024, 4096)}
"""Up to where the rate of a product no longer grows."""
QUICK_ROWS = {"cpu": (1, 16, 256), "cuda": (1, 16, 256, 4096)}
_SQUARE = {"cpu": 1024, "cuda": 4096}
"""Width of the matrices that a device's rates are measured with when no checkpoint is at hand."""
_COPY_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}


class MeasureError(RuntimeError):
    """A figure could not be taken; the message says which, and what to change."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to repeat one measurement."""

    budget_s: float
    least_repeats: int
    most_repeats: int


FULL = Effort(budget_s=0.5, least_repeats=5, most_repeats=200)
QUICK = Effort(budget_s=0.08, least_repeats=3, most_repeats=50)


@dataclass(frozen=True, slots=True)
class DeviceFigures:
    """What a device does, whatever the checkpoint."""

    matmul_rates: dict[str, tuple[MatmulRate, ...]]
    """By number format."""
    memory_bytes_per_s: float
    host_bytes_per_s: float | None
    """None: it computes in its node's memory."""


def device_name(device: torch.device) -> str:
    """Return the card's or the processor's name."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(models), platform.processor() or platform.machine())


def free_card_bytes(device: torch.device) -> int:
    """Return what is free of a card's memory."""
    return int(torch.cuda.mem_get_info(device)[0])


def median_s(work: Callable[[], object], device: torch.device, effort: Effort) -> float:
    """Return the median seconds of `work`, which the first run, unmeasured, warms up."""
    work()
    finish(device)
    times: list[float] = []
    end_s = time.perf_counter() + effort.budget_s
    while len(times) < effort.most_repeats:
        start_s = time.perf_counter()
        if len(times) >= effort.least_repeats and start_s > end_s:
            break
        work()
        finish(device)
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)


def measure_device(
    device: torch.device,
    dtypes: Sequence[str],
    effort: Effort,
    *,
    shapes: Sequence[tuple[int, int]] = (),
    rows: Sequence[int],
) -> DeviceFigures:
    """Measure matmul rates (of (outputs, inputs) matrices), memory and the way from the host."""
    width = _SQUARE[device.type]
    matrices = shapes or [(width, width)]
    rates = {
        name: tuple(
            MatmulRate(rows=n, flops_per_s=_matmul_rate(device, name, matrices, n, effort))
            for n in rows
        )
        for name in dtypes
    }
    return DeviceFigures(
        matmul_rates=rates,
        memory_bytes_per_s=_copy_rate(device, effort),
        host_bytes_per_s=_host_rate(device, effort) if device.type == "cuda" else None,
    )


@torch.inference_mode()
def _matmul_rate(
    device: torch.device,
    dtype: str,
    matrices: Sequence[tuple[int, int]],
    rows: int,
    effort: Effort,
) -> float:
    flops, seconds = 0, 0.0
    for outputs, inputs in matrices:
        weight = torch.randn(outputs, inputs, device=device, dtype=getattr(torch, dtype))
        if device.type == "cpu":
            weight = weight.t().contiguous().t()  # as `slice` stores matrices
        x = torch.randn(rows, inputs, device=device, dtype=weight.dtype)
        seconds += median_s(partial(functional.linear, x, weight), device, effort)
        flops += 2 * rows * outputs * inputs
    return flops / seconds


def _copy_rate(device: torch.device, effort: Effort) -> float:
    source = torch.zeros(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # A copy reads and writes each byte.
    return 2 * source.numel() / median_s(lambda: target.copy_(source), device, effort)


def _host_rate(device: torch.device, effort: Effort) -> float:
    source = torch.zeros(_COPY_BYTES["cpu"], dtype=torch.uint8).pin_memory()
    target = torch.empty(source.shape, dtype=torch.uint8, device=device)
    return source.numel() / median_s(
        lambda: target.copy_(source, non_blocking=True), device, effort
    )


def main_shapes(checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """Return the (outputs, inputs) of the first layer's distinct matrices, of one expert's too."""
    shapes = [t.shape[-2:] for t in checkpoint.tensors if t.layer == 0 and len(t.shape) >= 2]
    return list(dict.fromkeys((outputs, inputs) for outputs, inputs in shapes))


@contextmanager
def explaining_memory(what: str) -> Iterator[None]:
    """Turn a lack of memory into a `MeasureError`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MeasureError(
            f"{what} does not fit the device's free memory ({error}); give smaller --tokens, or "
            f"declare the device's figures"
        ) from error


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
