"""Traces of expert loads: what every step asked of every expert, recorded or made up.

On disk a trace is one compressed npz archive of plain arrays; nothing in it is ever executed. A
reader checks what an array says of itself (type, shape, bytes) before memory is taken for it, and
only what `to_bytes` writes is read: other archives of other tools need not be guessed at.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from placement.sharding.loads import Phase

FORMAT = 1
MOST_BYTES = 2**31
"""Of a trace's rows in memory, and of its file."""
MOST_NAME = 200
"""Characters."""
MOST_ROWS = 2**40
"""Of one expert in one step; what is less is exact in floating point too."""
MOST_ROWS_IN_ALL = 2**62
_MOST_OTHER_BYTES = 2**14
"""Of any array but the rows."""
_MOST_MEMBERS = 100
_PHASES: tuple[Phase, ...] = get_args(Phase)
_KIND = {"format": "iu", "name": "U", "phase": "U", "top_k": "iu", "rows": "iu", "losses": "iu"}
"""Of every array in the archive, as NumPy calls them."""
_SHAPE = {"rows": "[steps, layers, experts]", "losses": "[losses, 2]: step and device"}
"""Of every array that is more than one value."""
_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    r"\{'descr': '([<>|=][a-zA-Z][0-9]{0,9})', 'fortran_order': (True|False), "
    r"'shape': \(([0-9, ]{0,99})\), \}\s*"
)
_METHODS = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}


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
        if len(self.name) > MOST_NAME or not self.name.isprintable():
            raise ValueError(
                f"its name ({self.name[:40]!a}) has {len(self.name)} characters; give at most "
                f"{MOST_NAME}, all of them printable"
            )
        _check_rows(self.rows_SLE)
        if self.phase not in _PHASES:
            raise ValueError(f"phase ({self.phase[:40]!a}) must be one of {', '.join(_PHASES)}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k ({self.top_k}) must be from 1 to its {self.num_experts} experts"
            )
        for step, device in self.losses:
            if not 0 < step < self.num_steps or device < 0:
                raise ValueError(
                    f"device {device} is lost before step {step}; steps that may be named are 1 "
                    f"to {self.num_steps - 1}, devices 0 and up"
                )
        for (step, _), (following, _) in pairwise(self.losses):
            if following < step:
                raise ValueError(
                    f"its losses name step {following} after step {step}; give them in order"
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
            ValueError: It is no trace, of another format, too large, or one that cannot be. The
                message is the fact alone, to be put after "is no expert trace:".
        """
        arrays = _arrays(data)
        if (version := int(arrays["format"])) != FORMAT:
            raise ValueError(f"it is of format {version}; this version reads {FORMAT}")
        # Before the conversion, which would make 2**63 a negative number.
        _check_rows(arrays["rows"])
        return cls(
            name=_text(arrays, "name"),
            phase=_text(arrays, "phase"),  # type: ignore[arg-type]  # checked by the class
            top_k=int(arrays["top_k"]),
            rows_SLE=arrays["rows"].astype(np.int64),
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
    def num_steps(self) -> int:
        return self._num_steps

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


def _check_rows(rows: NDArray[Any]) -> None:
    if rows.ndim != 3 or not rows.size:
        raise ValueError(
            f"rows have shape {rows.shape}; give [steps, layers, experts], at least one each"
        )
    if rows.dtype.kind not in "iu" or int(rows.min()) < 0:
        raise ValueError(
            f"rows are of type {rows.dtype}, the least is {rows.min()}; they must be whole "
            f"numbers, 0 or more"
        )
    if int(rows.max()) >= MOST_ROWS:
        raise ValueError(
            f"an expert has {rows.max()} rows in one step; they must be fewer than {MOST_ROWS}"
        )
    # In floating point, where a sum cannot wrap around.
    if (total := float(rows.sum(dtype=np.float64))) >= MOST_ROWS_IN_ALL:
        raise ValueError(
            f"it has {total:.4g} rows in all; they must be fewer than {MOST_ROWS_IN_ALL}"
        )


def _arrays(data: bytes) -> dict[str, NDArray[Any]]:
    """Return what the archive holds, each array of the kind and the size that it may have."""
    # What every member has in the directory; counted before an object is made for each.
    if (num_members := data.count(b"PK\x01\x02")) > _MOST_MEMBERS:
        raise ValueError(f"it has {num_members} members; at most {_MOST_MEMBERS} are read")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = _members(archive)
            return {key: _array(archive, key, members[key]) for key in _KIND}
    except ValueError:
        raise
    # The bytes are foreign, and zipfile and zlib refuse them with a dozen kinds of errors.
    except Exception as error:
        fact = f"{error}" or type(error).__name__
        raise ValueError(f"{len(data)} bytes cannot be unpacked: {fact}") from error


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        key = member.filename.removesuffix(".npy")
        shown = f"its member {member.filename[:40]!a}"
        if key == member.filename:
            raise ValueError(f"{shown} is no array: {member.file_size} bytes without .npy")
        if key in members:
            raise ValueError(f"{shown} is there 2 times or more; give it once")
        if member.flag_bits & 0x1:
            raise ValueError(f"{shown} of {member.file_size} bytes is encrypted")
        if member.compress_type not in _METHODS:
            known = " and ".join(f"{name} ({number})" for number, name in _METHODS.items())
            raise ValueError(
                f"{shown} is compressed by method {member.compress_type}; {known} are read"
            )
        members[key] = member
    if missing := [key for key in _KIND if key not in members]:
        there = ", ".join(sorted(ascii(key[:40])[1:-1] for key in members)) or "nothing"
        raise ValueError(f"it lacks {', '.join(missing)} and has {there}")
    return members


def _array(archive: zipfile.ZipFile, key: str, member: zipfile.ZipInfo) -> NDArray[Any]:
    """Read one array, whose header is checked before memory is taken for it."""
    with archive.open(member) as file:
        magic, length = file.read(len(_MAGIC)), file.read(2)
        header = file.read(int.from_bytes(length, "little")).decode("latin-1")
        found = _HEADER.fullmatch(header)
        if magic != _MAGIC or found is None:
            raise ValueError(
                f"the header of {key} is {(magic + length)!a} and {header[:60]!a}; it must be "
                f"that of one plain array"
            )
        dtype = _dtype(key, found[1])
        shape = tuple(int(part) for part in re.findall(r"[0-9]+", found[3]))
        if len(shape) != {"rows": 3, "losses": 2}.get(key, 0):
            raise ValueError(
                f"{key} have shape {shape}; give {_SHAPE[key]}"
                if key in _SHAPE
                else f"{key} has shape {shape}; it must be one value"
            )
        num_values = math.prod(shape)
        _check_bytes(key, shape, num_values, dtype, member.file_size - file.tell())
        data = file.read(num_values * dtype.itemsize)
    if len(data) != num_values * dtype.itemsize:
        raise ValueError(
            f"{key}: {num_values * dtype.itemsize} bytes; {len(data)} of them can be unpacked"
        )
    return np.ndarray(shape, dtype, data, order="F" if found[2] == "True" else "C")


def _dtype(key: str, described: str) -> np.dtype[Any]:
    try:
        dtype = np.dtype(described)
    except TypeError:
        dtype = None
    if dtype is None or dtype.kind not in _KIND[key] or not dtype.itemsize:
        raise ValueError(
            f"{key} of the trace is of type {described if dtype is None else dtype}; it must be "
            f"{'text' if _KIND[key] == 'U' else 'whole numbers'}"
        )
    return dtype


def _check_bytes(
    key: str, shape: tuple[int, ...], num_values: int, dtype: np.dtype[Any], there: int
) -> None:
    # Rows become int64, whatever they are in the file.
    num_bytes = num_values * (8 if key == "rows" else dtype.itemsize)
    most = MOST_BYTES if key == "rows" else _MOST_OTHER_BYTES
    if num_bytes > most:
        raise ValueError(
            f"{key} (shape {shape}, type {dtype}): {num_bytes} bytes; at most {most} are read"
        )
    if num_values * dtype.itemsize != there:
        raise ValueError(
            f"{key} (shape {shape}, type {dtype}): {num_values * dtype.itemsize} bytes; the file "
            f"has {there} of them"
        )


def _text(arrays: dict[str, NDArray[Any]], key: str) -> str:
    # Not by NumPy, which makes a SystemError of what is no character.
    order = "be" if arrays[key].dtype.str.startswith(">") else "le"
    try:
        return arrays[key].tobytes().decode(f"utf-32-{order}").rstrip("\0")
    except UnicodeDecodeError as error:
        raise ValueError(f"{key} of the trace is no text: {error}") from error


def _losses(array: NDArray[Any]) -> tuple[tuple[int, int], ...]:
    if array.shape[1] != 2:
        raise ValueError(f"losses have shape {array.shape}; give {_SHAPE['losses']}")
    return tuple((int(step), int(device)) for step, device in array.tolist())
