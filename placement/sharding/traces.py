"""Traces of expert loads: what every step asked of every expert, recorded or made up.

On disk a trace is one compressed npz archive of plain arrays; nothing in it is ever executed. A
reader checks it before a byte of it is used.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from placement.sharding.loads import Phase

FORMAT = 1
MOST_BYTES = 2**31
"""Of a trace once it is unpacked."""
_PHASES: tuple[Phase, ...] = get_args(Phase)
_KEYS = ("format", "name", "phase", "top_k", "rows", "losses")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertTrace:
    """Rows of every step, layer and expert, and the devices that were lost."""

    name: str
    phase: Phase
    top_k: int
    """Experts that each token chooses in a layer."""
    rows_SLE: NDArray[np.int64]
    """[steps, layers, experts]."""
    losses: tuple[tuple[int, int], ...] = ()
    """(step before which a device is lost, its position in the fleet), in order."""

    def __post_init__(self) -> None:
        rows = self.rows_SLE
        if rows.ndim != 3 or not rows.size:
            raise ValueError(
                f"trace {self.name}: rows have shape {rows.shape}; give [steps, layers, experts], "
                f"at least one each"
            )
        if rows.dtype.kind not in "iu" or int(rows.min()) < 0:
            raise ValueError(
                f"trace {self.name}: rows are of type {rows.dtype}, the least is {rows.min()}; "
                f"they must be whole numbers, 0 or more"
            )
        if self.phase not in _PHASES:
            raise ValueError(
                f"trace {self.name}: phase ({self.phase!r}) must be one of {', '.join(_PHASES)}"
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"trace {self.name}: top_k ({self.top_k}) must be from 1 to its "
                f"{self.num_experts} experts"
            )
        for step, device in self.losses:
            if not 0 < step < self.num_steps or device < 0:
                raise ValueError(
                    f"trace {self.name}: device {device} is lost before step {step}; steps that "
                    f"may be named are 1 to {self.num_steps - 1}, devices 0 and up"
                )

    @property
    def num_steps(self) -> int:
        return int(self.rows_SLE.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.rows_SLE.shape[1])

    @property
    def num_experts(self) -> int:
        return int(self.rows_SLE.shape[2])

    def to_bytes(self) -> bytes:
        """Return the archive that `from_bytes` reads."""
        file = io.BytesIO()
        np.savez_compressed(
            file,
            format=np.array(FORMAT),
            name=np.array(self.name),
            phase=np.array(self.phase),
            top_k=np.array(self.top_k),
            rows=self.rows_SLE.astype(np.min_scalar_type(int(self.rows_SLE.max()))),
            losses=np.array(self.losses, dtype=np.int64).reshape(-1, 2),
        )
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> ExpertTrace:
        """Read an archive.

        Raises:
            ValueError: It is no trace, of another format, too large, or one that cannot be.
        """
        arrays = _arrays(data)
        rows: NDArray[Any] = arrays["rows"]
        return cls(
            name=str(arrays["name"]),
            phase=str(arrays["phase"]),  # type: ignore[arg-type]  # checked by the class
            top_k=_whole(arrays, "top_k"),
            rows_SLE=rows.astype(np.int64) if rows.dtype.kind in "iu" else rows,
            losses=_losses(arrays["losses"]),
        )


class TraceRecorder:
    """Collects the steps of one phase, up to a number of steps; memory is taken at the start."""

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        *,
        phase: Phase,
        top_k: int,
        max_steps: int,
        name: str = "recorded",
    ) -> None:
        if max_steps < 1:
            raise ValueError(f"max_steps ({max_steps}) must be at least 1")
        self._rows_SLE = np.zeros((max_steps, num_layers, num_experts), dtype=np.int32)
        self._num_steps = 0
        self._phase: Phase = phase
        self._top_k, self._name = top_k, name

    @property
    def is_full(self) -> bool:
        """Further steps are not kept."""
        return self._num_steps == len(self._rows_SLE)

    def add(self, rows_LE: NDArray[np.int64]) -> None:
        """Keep one step. O(layers x experts)."""
        if rows_LE.shape != self._rows_SLE.shape[1:]:
            raise ValueError(
                f"rows_LE has shape {rows_LE.shape}; the recorder takes {self._rows_SLE.shape[1:]}"
            )
        if not self.is_full:
            self._rows_SLE[self._num_steps] = rows_LE
            self._num_steps += 1

    def trace(self) -> ExpertTrace:
        """Return what was kept.

        Raises:
            ValueError: Nothing was.
        """
        return ExpertTrace(
            name=self._name,
            phase=self._phase,
            top_k=self._top_k,
            rows_SLE=self._rows_SLE[: self._num_steps].astype(np.int64),
        )


def gini(loads: NDArray[np.float64]) -> float:
    """Return how unequal loads are: 0 when all are equal, near 1 when one has everything."""
    ascending = np.sort(loads)
    n, total = len(ascending), float(ascending.sum())
    if total <= 0:
        return 0.0
    return float((2.0 * np.arange(1, n + 1) - n - 1.0) @ ascending) / (n * total)


def _arrays(data: bytes) -> dict[str, NDArray[np.generic]]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(part.file_size for part in archive.infolist())
        if size > MOST_BYTES:
            raise ValueError(
                f"a trace of {size} bytes unpacked; at most {MOST_BYTES} are read: record fewer "
                f"steps or layers"
            )
        with np.load(io.BytesIO(data), allow_pickle=False) as loaded:
            arrays = {key: loaded[key] for key in loaded.files}
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"this is no expert trace: {error}") from error
    if missing := [key for key in _KEYS if key not in arrays]:
        raise ValueError(
            f"this is no expert trace: it lacks {', '.join(missing)} and has "
            f"{', '.join(sorted(arrays)) or 'nothing'}"
        )
    if (version := _whole(arrays, "format")) != FORMAT:
        raise ValueError(f"this trace is of format {version}; this version reads {FORMAT}")
    return arrays


def _whole(arrays: dict[str, NDArray[np.generic]], key: str) -> int:
    array = arrays[key]
    if array.shape or array.dtype.kind not in "iu":
        raise ValueError(
            f"{key} of the trace is {array.dtype} of shape {array.shape}; it must be a whole number"
        )
    return int(array)


def _losses(array: NDArray[np.generic]) -> tuple[tuple[int, int], ...]:
    if array.ndim != 2 or array.shape[1] != 2 or array.dtype.kind not in "iu":
        raise ValueError(
            f"losses of the trace are {array.dtype} of shape {array.shape}; give [losses, 2]: step "
            f"and device"
        )
    return tuple((int(step), int(device)) for step, device in array.tolist())
