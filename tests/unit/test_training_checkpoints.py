"""A save is all or nothing, whatever stops it, and a run goes on only from what it left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from saving_run import CONTENTS, KEEP, state_of, write_step

from actors.engine.training_config import LoraSettings, OptimizerSettings
from cluster.training.checkpoints import (
    CheckpointSaveError,
    ResumeError,
    RunFolder,
    RunFolderError,
    TrainingState,
    fixed_settings,
)
from cluster.training_settings import DataSettings, TrainingSettings

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "saving_run.py"


def save(run: RunFolder, step: int, **options: Any) -> Path:
    return run.save(step, lambda folder: write_step(folder, step), state_of(step), **options)


def made_run(output: Path, *steps: int, keep: int = KEEP) -> RunFolder:
    run = RunFolder(output, keep=keep)
    run.start(resume=False)
    for step in steps:
        save(run, step)
    return run


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def check_whole(run: RunFolder, folder: Path) -> int:
    """Assert that every file of a step folder is there and of that step; returns the step."""
    step = run.load_state(folder).step
    for name in CONTENTS:
        assert (folder / name).read_text(encoding="utf-8") == f"{name} of step {step}"
    assert folder.resolve().name == f"step-{step:06d}"
    return step


def test_saved_steps_are_found_and_the_oldest_go(tmp_path: Path) -> None:
    run = made_run(tmp_path, 5, 10, 100, keep=2)
    assert names(tmp_path) == ["latest", "step-000010", "step-000100"]
    assert (tmp_path / "latest").readlink() == Path("step-000100")
    assert run.latest() == tmp_path / "step-000100"
    assert run.load_state(tmp_path / "latest") == state_of(100)


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    run = made_run(tmp_path, 999_999, 1_000_000, 1_000_001, keep=2)
    assert names(tmp_path) == ["latest", "step-1000000", "step-1000001"]
    assert run.latest() == tmp_path / "step-1000001"


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = TrainingState(
        step=3, seed=7, settings={"model": "m", "training.lora": None, "training.x": [1, 2.5]},
        tokens_seen=12, losses=(3.5, float("nan"), 0.1),
    )  # fmt: skip
    run = RunFolder(tmp_path, keep=1)
    run.start(resume=False)
    loaded = run.load_state(run.save(3, lambda _: None, state))
    assert repr(loaded) == repr(state)


def test_a_folder_without_state_is_no_checkpoint_and_gives_way_to_one(tmp_path: Path) -> None:
    run = made_run(tmp_path, 1)
    (tmp_path / "step-000002").mkdir()
    (tmp_path / "step-000002" / "stray").touch()
    assert run.latest() == tmp_path / "step-000001"
    save(run, 2)
    assert check_whole(run, tmp_path / "step-000002") == 2
    assert not (tmp_path / "step-000002" / "stray").exists()


def test_a_step_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    run = made_run(tmp_path, 1)
    again = run.save(1, lambda _: pytest.fail("written again"), state_of(1))
    assert again == tmp_path / "step-000001"


def test_whoever_reads_the_run_may_read_its_checkpoints(tmp_path: Path) -> None:
    run = made_run(tmp_path, 1)
    mask = os.umask(0o022)
    os.umask(mask)
    folder = run.latest()
    assert folder is not None
    for path in (folder, *folder.rglob("*")):
        everything = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == everything & ~mask


def test_a_run_that_is_there_is_not_started_over(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "new" / "run", keep=1)
    assert not run.has_run
    assert run.start(resume=True) is None
    save(run, 4)
    assert RunFolder(tmp_path / "new" / "run", keep=1).has_run
    with pytest.raises(RunFolderError, match=r"run holds a run already \(newest: step-000004\)"):
        run.start(resume=False)
    with pytest.raises(RunFolderError, match=r"--resume, or set training\.output"):
        run.start(resume=False)
    assert run.start(resume=True) == tmp_path / "new" / "run" / "step-000004"


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(RunFolderError, match=r"training\.output .*run cannot be used"):
        RunFolder(tmp_path / "run", keep=1).start(resume=False)


def test_the_next_start_clears_leftovers_and_nothing_else(tmp_path: Path) -> None:
    run = made_run(tmp_path, 1)
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "notes.txt").touch()
    shutil.copytree(tmp_path / "step-000001", tmp_path / ".motley-step-000002")
    (tmp_path / ".motley-latest").symlink_to("nowhere")
    (tmp_path / "latest").unlink()
    assert run.start(resume=True) == tmp_path / "step-000001"
    assert names(tmp_path) == ["latest", "notes.txt", "step-000001", "tensorboard"]
    assert check_whole(run, tmp_path / "latest") == 1


@pytest.mark.parametrize("error", [RuntimeError("a host died"), KeyboardInterrupt()])
def test_what_stops_the_writer_passes_and_leaves_nothing(
    tmp_path: Path, error: BaseException
) -> None:
    run = made_run(tmp_path, 1)

    def write(folder: Path) -> None:
        write_step(folder, 2)
        raise error

    with pytest.raises(type(error)):
        run.save(2, write, state_of(2))
    assert names(tmp_path) == ["latest", "step-000001"]


def dirty_run(output: Path) -> None:
    """Two steps, and what a save that was killed in two places would leave."""
    made_run(output, 1, 2)
    shutil.copytree(output / "step-000001", output / ".motley-step-000003")
    shutil.copytree(output / "step-000001", output / ".motley-old-step-000000")
    (output / ".motley-latest").symlink_to("step-000001")


@pytest.mark.parametrize("start", [lambda _: None, dirty_run], ids=["first save", "third save"])
def test_a_save_killed_anywhere_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, start: Any
) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    seen, outcomes = 0, set()
    for number in range(1, 1000):
        output = tmp_path / str(number)
        output.mkdir()
        start(output)
        run = RunFolder(output, keep=KEEP)
        before = run.latest()
        old = None if before is None else check_whole(run, before)
        command = [sys.executable, str(SCRIPT), str(output), str(number)]
        code = subprocess.run(command, env=environment, check=False).returncode

        assert code in (0, -signal.SIGKILL)
        newest = run.latest()
        step = None if newest is None else check_whole(run, newest)
        assert step in (old, 1 + (old or 0))
        outcomes.add(step)
        if old is not None:
            # Whoever serves `latest` finds it at any time.
            assert check_whole(run, output / "latest") in (old, step)
        for folder in output.glob("step-*"):
            check_whole(run, folder)
        assert run.start(resume=True) == newest
        assert [name for name in names(output) if name.startswith(".")] == []
        assert newest is None or (output / "latest").resolve() == newest.resolve()
        if code == 0:
            break
        seen += 1
    assert code == 0
    assert seen >= 20
    assert outcomes == {old, 1 + (old or 0)}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here: {error}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def write_plainly(file: Path) -> None:
    file.write_bytes(bytes(4_000_000))


def write_over_half(file: Path) -> None:
    file.write_bytes(bytes(1_200_000))


def write_tensors(file: Path) -> None:
    save_file({"weight": np.zeros(1_000_000, np.float32)}, file)


@pytest.mark.parametrize("write", [write_plainly, write_tensors])
def test_a_disk_that_fills_up_keeps_the_checkpoint_before(small_disk: Path, write: Any) -> None:
    run = made_run(small_disk / "run", 1)

    def fill(folder: Path) -> None:
        write_step(folder, 2)
        write(folder / "more.safetensors")

    with pytest.raises(CheckpointSaveError) as caught:
        run.save(2, fill, state_of(2))

    text = str(caught.value)
    assert "step 2" in text
    assert "No space left on device" in text
    assert "training.keep_checkpoints (2)" in text
    assert str(small_disk / "run") in text
    assert names(small_disk / "run") == ["latest", "step-000001"]
    assert check_whole(run, small_disk / "run" / "latest") == 1
    save(run, 2)
    assert check_whole(run, small_disk / "run" / "latest") == 2


def test_a_disk_that_is_too_small_is_seen_before_anything_is_written(small_disk: Path) -> None:
    run = made_run(small_disk / "run", 1)
    with pytest.raises(CheckpointSaveError, match=r"at least 9,000,000 bytes, 2,0\d\d,\d\d\d were"):
        run.save(2, lambda _: pytest.fail("written"), state_of(2), needed_bytes=9_000_000)
    assert names(small_disk / "run") == ["latest", "step-000001"]


def test_a_checkpoint_is_taken_to_need_what_the_one_before_has(small_disk: Path) -> None:
    run = RunFolder(small_disk, keep=1)
    run.start(resume=False)
    run.save(1, lambda folder: write_over_half(folder / "weights"), state_of(1))
    with pytest.raises(CheckpointSaveError, match="at least 1,200,"):
        run.save(2, lambda _: pytest.fail("written"), state_of(2))


def test_no_permission_is_an_error_of_the_save(tmp_path: Path) -> None:
    run = made_run(tmp_path, 1)

    def write(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder / "x"))

    with pytest.raises(CheckpointSaveError, match=r"step 2 was not written.*Permission denied"):
        run.save(2, write, state_of(2))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "cut state": ("training/state.json", cut, "cannot be read"),
    "empty state": ("training/state.json", lambda file: file.write_text(""), "cannot be read"),
    "list": ("training/state.json", lambda file: file.write_text("[]"), "cannot be read"),
    "no state": (
        "training/state.json",
        lambda file: file.write_text("{}"),
        r"cannot be read \(no 'state'\)",
    ),
    "cut tensors": ("model.safetensors", cut, r"has 22 of 27 bytes"),
    "no optimizer": ("training/optimizer-layer-0.safetensors", Path.unlink, "is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_names_its_file_and_the_one_before(tmp_path: Path, name: str) -> None:
    file, damage, reason = DAMAGES[name]
    run = made_run(tmp_path, 1, 2)
    damage(tmp_path / "step-000002" / file)
    pattern = rf"step-000002/{file}: {reason}.*remove .*step-000002 to resume from step-000001"
    with pytest.raises(ResumeError, match=pattern):
        run.load_state(tmp_path / "step-000002")
    with pytest.raises(ResumeError, match=r"remove .*step-000002 to resume from step-000001"):
        run.load_state(tmp_path / "latest")


def test_a_damaged_checkpoint_without_an_older_one_says_so(tmp_path: Path) -> None:
    run = made_run(tmp_path, 1)
    cut(tmp_path / "step-000001" / "model.safetensors")
    with pytest.raises(ResumeError, match="no older one"):
        run.load_state(tmp_path / "step-000001")


@pytest.mark.parametrize(
    ("field", "value"), [("step", "many"), ("losses", 3), ("tokens_seen", None)]
)
def test_a_state_of_wrong_types_names_the_field(tmp_path: Path, field: str, value: Any) -> None:
    run = made_run(tmp_path, 1)
    file = tmp_path / "step-000001" / "training" / "state.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    stored["state"][field] = value
    file.write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(ResumeError, match=rf"state\.json: cannot be read \({field}: "):
        run.load_state(tmp_path / "step-000001")


def test_a_newer_format_asks_for_the_version_that_wrote_it(tmp_path: Path) -> None:
    run = made_run(tmp_path, 1)
    file = tmp_path / "step-000001" / "training" / "state.json"
    text = file.read_text(encoding="utf-8").replace('"format_version": 1', '"format_version": 2')
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ResumeError, match=r"of format 2, this version of Motley reads 1"):
        run.load_state(tmp_path / "step-000001")


def settings(**changes: Any) -> TrainingSettings:
    return TrainingSettings(**({"data": DataSettings(train=(Path("a.txt"),))} | changes))


def resumed(before: TrainingSettings, after: TrainingSettings, **models: str) -> None:
    """Go on with `after` from what a run with `before` left."""
    saved = fixed_settings(before, model="base", documents=3)
    state = TrainingState(step=8, seed=0, settings=saved, tokens_seen=0)
    stored = json.loads(json.dumps(dict(state.settings)))
    loaded = TrainingState(step=8, seed=0, settings=stored, tokens_seen=0)
    loaded.check_same(fixed_settings(after, model=models.get("model", "base"), documents=3))


def test_the_same_settings_resume_and_so_does_a_longer_run() -> None:
    resumed(settings(), settings())
    resumed(settings(steps=100), settings(steps=200, keep_checkpoints=5, loss_chunk_tokens=7))
    lower = OptimizerSettings(learning_rate=1e-5, clip_norm=0.1)
    resumed(settings(), settings(optimizer=lower))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "training.seed was 0 and is 1"),
        ({"sequence_tokens": 4}, "training.sequence_tokens was 2048 and is 4"),
        ({"rounds_per_step": 2}, "training.rounds_per_step was 4 and is 2"),
        (
            {"optimizer": OptimizerSettings(weight_decay=0.5)},
            "training.optimizer.weight_decay was 0.01 and is 0.5",
        ),
        ({"lora": LoraSettings(rank=4)}, "training.lora.rank was not set and is 4"),
        (
            {"data": DataSettings(train=(Path("b.txt"),))},
            'training.data.train was ["a.txt"] and is ["b.txt"]',
        ),
    ],
)
def test_other_settings_are_refused_with_both_values(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ResumeError) as caught:
        resumed(settings(), settings(**change))
    assert message in str(caught.value)
    assert "from step 8" in str(caught.value)


def test_another_model_is_refused() -> None:
    with pytest.raises(ResumeError, match='model was "base" and is "other"'):
        resumed(settings(), settings(), model="other")
