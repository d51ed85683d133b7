"""How far the training runs of this machine's user are: one private JSON file for each run.

`motley train` owns the file of its output folder: it writes it as it goes and leaves it behind when
it ends, for the curve. A file that says "running" and whose process is gone is shown as gone.
Folder: `training` in the run-state folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from cluster.runstate import run_folder, runs_verb, write_private

TrainingPhase = Literal["starting", "running", "finished", "interrupted", "failed", "gone"]

MAX_POINTS = 200
_KEPT_RUNS = 20
"""Files of ended runs that stay; older ones go when a run starts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """One run, as its last write tells it."""

    name: str
    pid: int
    output: str
    started_unix_s: float
    updated_unix_s: float
    phase: TrainingPhase = "starting"
    reason: str = ""
    """Why it failed."""
    step: int = 0
    num_steps: int
    loss: float | None = None
    """Of the last step; None before it, or where it overflowed."""
    losses: tuple[tuple[int, float | None], ...] = ()
    """(step, loss) over the whole run, at most `MAX_POINTS`, every `stride` steps."""
    stride: int = 1
    held_out: tuple[tuple[int, float | None], ...] = ()
    tokens_per_s: float | None = None
    idle_fractions: dict[str, float] = field(default_factory=dict)
    """Per device, over the last steps."""
    eta_s: float | None = None

    @property
    def is_ended(self) -> bool:
        return self.phase not in ("starting", "running")


def training_file(output: Path) -> Path:
    """Return the file of the run that trains into a folder: one folder, one run."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", output.name)[:80]
    digest = hashlib.sha256(str(output).encode()).hexdigest()[:8]
    return _folder() / f"{name}-{digest}.json"


def write_training(state: TrainingState) -> None:
    """Replace the run's file."""
    write_private(training_file(Path(state.output)), json.dumps(asdict(state)))


def read_training(path: Path) -> TrainingState | None:
    """Read a file; None: it is not there, or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        value["losses"] = tuple((step, loss) for step, loss in value["losses"])
        value["held_out"] = tuple((step, loss) for step, loss in value["held_out"])
        return TrainingState(**value)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def training_states() -> list[TrainingState]:
    """Return all runs, the live ones first and then the last written ones."""
    read = (read_training(path) for path in _folder().glob("*.json"))
    states = [_seen_alive(state) for state in read if state is not None]
    return sorted(states, key=lambda state: (state.is_ended, -state.updated_unix_s))


def forget_old_runs() -> None:
    """Remove all but the newest files of ended runs."""
    for state in [state for state in training_states() if state.is_ended][_KEPT_RUNS:]:
        training_file(Path(state.output)).unlink(missing_ok=True)


def _seen_alive(state: TrainingState) -> TrainingState:
    if state.is_ended or runs_verb(state.pid, "train"):
        return state
    return replace(state, phase="gone", eta_s=None)


def _folder() -> Path:
    return run_folder() / "training"
