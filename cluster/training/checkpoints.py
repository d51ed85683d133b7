"""The folder of a run: complete step folders, the newest of which a run goes on from.

A save writes into a hidden folder beside the others, flushes every file of it to disk and renames
it into place, so a step folder is complete from the moment it has its name; a process killed at any
point leaves hidden leftovers, which the next start removes. What lies in a step folder is its
writer's business, except `training/state.json`. One run at a time may use a folder.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from cluster.training_settings import TrainingSettings

FORMAT_VERSION = 1
LATEST = "latest"

_STATE_FILE = Path("training", "state.json")
_STEP_NAME = re.compile(r"step-(\d{6,})")
_HIDDEN = ".motley-"
# A change of any of these changes what the rest of the run computes. `steps` is not among them:
# a run may be made longer, on the learning-rate curve of the new length.
_FIXED_SETTINGS = (
    "data",
    "lora",
    "micro_batches",
    "optimizer",
    "rounds_per_step",
    "router_loss_coefficient",
    "seed",
    "sequence_tokens",
    "sequences_per_micro_batch",
)
# What may be changed to save a run that diverged.
_FREE_OPTIMIZER_SETTINGS = ("learning_rate", "warmup_steps", "final_fraction", "clip_norm")

logger = logging.getLogger(__name__)


class RunFolderError(RuntimeError):
    """The run's folder cannot be used; the message names the folder and the knob."""


class CheckpointSaveError(RunFolderError):
    """A checkpoint was not written; the ones before it are as they were."""


class ResumeError(RunFolderError):
    """A run cannot go on from a checkpoint: it is damaged, or of another run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """What a run needs to go on, beside weights and optimizer state."""

    step: int
    """Optimizer steps done."""
    seed: int
    settings: Mapping[str, Any]
    """What must not change; see `fixed_settings`."""
    tokens_seen: int
    losses: tuple[float, ...] = ()
    """Of the steps so far, nats."""
    format_version: int = FORMAT_VERSION

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Refuse to go on with other settings.

        Raises:
            ResumeError: Names every difference with both values.
        """
        names = sorted({*self.settings, *settings})
        differences = [
            f"{name} was {_shown(self.settings, name)} and is {_shown(settings, name)}"
            for name in names
            if self.settings.get(name) != settings.get(name)
        ]
        if differences:
            raise ResumeError(
                f"cannot resume from step {self.step}: {'; '.join(differences)}. Set them back, or "
                "set training.output to a new folder"
            )


def fixed_settings(
    settings: TrainingSettings, *, model: str, **facts: str | float
) -> dict[str, Any]:
    """Return, flat, what must not change when a run is resumed.

    `facts` are of the caller's choice, as the number of documents or a digest of the data.
    """
    kept = settings.model_dump(mode="json", include=set(_FIXED_SETTINGS))
    for name in _FREE_OPTIMIZER_SETTINGS:
        del kept["optimizer"][name]
    if settings.optimizer.asynchronous:
        # It decides when the pool is drained, and so which weights a step runs on.
        kept["checkpoint_every_steps"] = settings.checkpoint_every_steps
    return {"model": model} | facts | dict(_flat("training", kept))


class RunFolder:
    """The checkpoints of one run in `output`; the newest `keep` stay."""

    def __init__(self, output: Path, *, keep: int) -> None:
        if keep < 1:
            raise ValueError(f"keep_checkpoints ({keep}) must be at least 1")
        self.output = output
        self.keep = keep

    @property
    def has_run(self) -> bool:
        """Whether it holds a checkpoint."""
        return bool(self._steps())

    def latest(self) -> Path | None:
        """Return the newest complete step folder."""
        steps = self._steps()
        return steps[-1] if steps else None

    def start(self, *, resume: bool) -> Path | None:
        """Make the folder, clear what a killed save left and return what to go on from.

        Raises:
            RunFolderError: It cannot be made, or holds a run that is not to be resumed.
        """
        if self.has_run and not resume:
            raise RunFolderError(
                f"{self.output} holds a run already (newest: {self._steps()[-1].name}); go on with "
                "it by --resume, or set training.output to another folder"
            )
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            for leftover in self.output.glob(f"{_HIDDEN}*"):
                _remove(leftover)
            newest = self.latest()
            if newest is not None:
                self._point_latest_at(newest)
        except OSError as error:
            raise RunFolderError(
                f"training.output {self.output} cannot be used: {error}"
            ) from error
        return newest

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        state: TrainingState,
        *,
        needed_bytes: int | None = None,
    ) -> Path:
        """Let `write` fill a folder, put it in place as `step`'s and remove the oldest.

        A step that is there already stays as it is. `needed_bytes` is what `write` will write; by
        default what the checkpoint before takes.

        Raises:
            CheckpointSaveError: It cannot be written, as on a full disk; nothing has changed.
        """
        folder = self.output / f"step-{step:06d}"
        if folder in self._steps():
            return folder
        draft = self.output / f"{_HIDDEN}{folder.name}"
        newest = self.latest()
        if needed_bytes is None:
            needed_bytes = 0 if newest is None else _tree_bytes(newest)
        with self._refusing(step, draft, needed_bytes):
            self._check_room(needed_bytes)
            _remove(draft)
            draft.mkdir(parents=True)
            write(draft)
            _write_state(draft, state)
            _flush(draft)
            _remove(folder)
            draft.rename(folder)
            _flush_entry(self.output)
            self._point_latest_at(folder)
        self._remove_oldest()
        return folder

    def load_state(self, folder: Path) -> TrainingState:
        """Return the state of a step folder, whose tensor files are as long as when saved.

        Raises:
            ResumeError: A file is missing, cut short or not of this format.
        """
        file = folder / _STATE_FILE
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            version = stored["state"]["format_version"]
            if version != FORMAT_VERSION:
                raise ResumeError(
                    f"{file}: of format {version}, this version of Motley reads {FORMAT_VERSION}; "
                    "resume with the version that wrote it"
                )
            state = TypeAdapter(TrainingState).validate_python(stored["state"])
            file_bytes = TypeAdapter(dict[str, int]).validate_python(stored["file_bytes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(folder, file, f"cannot be read ({_reason(error)})") from error
        for name, num_bytes in file_bytes.items():
            self._check_length(folder, folder / name, num_bytes)
        return state

    def _steps(self) -> list[Path]:
        """Return the complete step folders, oldest first."""
        if not self.output.is_dir():
            return []
        complete = [
            folder
            for folder in self.output.iterdir()
            if _STEP_NAME.fullmatch(folder.name) and (folder / _STATE_FILE).exists()
        ]
        return sorted(complete, key=_step_number)

    def _point_latest_at(self, folder: Path) -> None:
        link = self.output / f"{_HIDDEN}{LATEST}"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        link.replace(self.output / LATEST)
        _flush_entry(self.output)

    def _remove_oldest(self) -> None:
        for folder in self._steps()[: -self.keep]:
            hidden = self.output / f"{_HIDDEN}old-{folder.name}"
            try:
                # Out of sight first: a half-removed folder must not pass for a checkpoint.
                folder.rename(hidden)
                shutil.rmtree(hidden)
            except OSError as error:
                logger.warning("old checkpoint %s cannot be removed: %s", folder, error)

    def _check_room(self, needed_bytes: int) -> None:
        if needed_bytes > _free_bytes(self.output):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def _refusing(self, step: int, draft: Path, needed_bytes: int) -> Iterator[None]:
        """Turn what stops a save into its error; whatever stops it, the draft goes."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            written_bytes = _tree_bytes(draft)
            free_bytes = _free_bytes(self.output) + written_bytes
            raise CheckpointSaveError(
                f"the checkpoint of step {step} was not written to {self.output}: "
                f"{_reason(error)}. It needs at least {max(needed_bytes, written_bytes):,} bytes, "
                f"{free_bytes:,} were free; the checkpoints before it are untouched. Free space "
                f"there, lower training.keep_checkpoints ({self.keep}), or set training.output to "
                "another disk"
            ) from error
        finally:
            # What cannot be removed now is removed at the next start.
            shutil.rmtree(draft, ignore_errors=True)

    def _check_length(self, folder: Path, file: Path, num_bytes: int) -> None:
        if not file.exists():
            raise self._damaged(folder, file, "is missing")
        if file.stat().st_size != num_bytes:
            found = f"has {file.stat().st_size:,} of {num_bytes:,} bytes"
            raise self._damaged(folder, file, found)

    def _damaged(self, folder: Path, file: Path, reason: str) -> ResumeError:
        folder = folder.resolve()
        older = [step for step in self._steps() if _step_number(step) < _step_number(folder)]
        way_out = (
            f"remove {folder} to resume from {older[-1].name}"
            if older
            else "there is no older one to resume from; start again in another training.output"
        )
        return ResumeError(f"{file}: {reason}, so the checkpoint is damaged; {way_out}")


def _step_number(folder: Path) -> int:
    match = _STEP_NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else 0


def _write_state(folder: Path, state: TrainingState) -> None:
    """Write the state, and the lengths of the files that a resumed run will read."""
    file_bytes = {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*.safetensors"))
    }
    file = folder / _STATE_FILE
    file.parent.mkdir(exist_ok=True)
    text = json.dumps({"state": asdict(state), "file_bytes": file_bytes}, indent=1)
    file.write_text(text, encoding="utf-8")


def _flush(folder: Path) -> None:
    """Force a folder's files, then the folders that name them, to disk."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            _flush_entry(Path(parent, name))
        _flush_entry(Path(parent))


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(path: Path) -> int:
    exists = next(place for place in (path, *path.absolute().parents) if place.exists())
    return shutil.disk_usage(exists).free


def _tree_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    if isinstance(error, KeyError):
        return f"no {error.args[0]!r}"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}.{name}", value)
        else:
            yield f"{prefix}.{name}", value


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name]) if name in settings else "not set"
