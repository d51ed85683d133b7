"""Weights on their way from host memory to a device, beside the compute.

On CUDA a flat tensor goes through two small pinned buffers in turn and on a stream of its own: one
is filled while the other is sent, and compute waits for the event behind the last copy only when
it needs the weights.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass

import torch

STAGING_BYTES = 32 * 2**20
"""Of each of the two pinned buffers."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A flat tensor that is on the device, or will be once `ready` has happened."""

    flat: torch.Tensor
    ready: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Make the current stream wait for the copy; the host goes on."""
        if self.ready is not None:
            self.ready.wait()


class Uploader:
    """Brings flat tensors to one device in one type. Any thread may call it."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._dtype = dtype
        self._lock = threading.Lock()
        if device.type != "cuda":
            return
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._chunk = STAGING_BYTES // dtype.itemsize
        buffers = [torch.empty(self._chunk, dtype=dtype, pin_memory=True) for _ in range(2)]
        events = [torch.cuda.Event() for _ in buffers]  # type: ignore[no-untyped-call]
        self._staging = itertools.cycle(zip(buffers, events, strict=True))

    def upload(self, flat: torch.Tensor) -> Upload:
        """Start to bring a flat tensor, which is never written.

        On a CPU, and where it is on the device already, a tensor of the right type is not copied.
        """
        if self._device.type != "cuda" or flat.device.type == "cuda":
            return Upload(flat.to(self._device, self._dtype))
        with self._lock, torch.cuda.stream(self._stream):
            target = torch.empty(flat.numel(), dtype=self._dtype, device=self._device)
            for start in range(0, flat.numel(), self._chunk):
                part = flat[start : start + self._chunk]
                buffer, is_sent = next(self._staging)
                is_sent.synchronize()
                staged = buffer[: part.numel()].copy_(part)
                target[start : start + part.numel()].copy_(staged, non_blocking=True)
                is_sent.record()
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        # It was allocated on the side stream: not to be handed out again while compute reads it.
        target.record_stream(torch.cuda.default_stream(self._device))
        return Upload(target, ready)
