"""A process that is killed in the middle of a save, at every point where one can be.

`python saving_run.py OUTPUT N` resumes the run in OUTPUT, saves the step after its newest, and
kills itself just before its N-th operation on a file below OUTPUT; 0 says that it got to the end.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from cluster.training.checkpoints import RunFolder, TrainingState

KEEP = 2
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.chmod")
"""As Python's audit events name them."""
CONTENTS = ("model.safetensors", "config.json", "training/optimizer-layer-0.safetensors")


def write_step(folder: Path, step: int) -> None:
    """Fill a folder with files that all say which step they are of."""
    (folder / "training").mkdir()
    for name in CONTENTS:
        (folder / name).write_text(f"{name} of step {step}", encoding="utf-8")


def state_of(step: int) -> TrainingState:
    return TrainingState(step=step, seed=0, settings={"model": "tiny"}, tokens_seen=10 * step)


def save_next(output: Path) -> None:
    run = RunFolder(output, keep=KEEP)
    newest = run.start(resume=True)
    step = 1 + (run.load_state(newest).step if newest else 0)
    run.save(step, lambda folder: write_step(folder, step), state_of(step))


def kill_before_operation(number: int, below: Path) -> None:
    """Let this process be killed just before its `number`-th operation below a folder."""
    left = number

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in OPERATIONS:
            return
        # Names without a folder are those that a removal of a whole tree works with.
        path = Path(str(arguments[0]))
        if path.is_relative_to(below) or not path.is_absolute():
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


if __name__ == "__main__":
    kill_before_operation(int(sys.argv[2]), Path(sys.argv[1]))
    save_next(Path(sys.argv[1]))
