"""`motley train` as a process: killed at random moments, stopped, and out of disk."""

from __future__ import annotations

import os
import random
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_command import Event, TrainCommand, TrainingFolder, Victim, training_folder

OK, ERROR, INTERRUPTED = 0, 1, 130

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def folder() -> Iterator[TrainingFolder]:
    with training_folder() as made:
        yield made


# -- kills -------------------------------------------------------------------------------------

STEPS, EVERY, KILLS = 60, 5, 10
VICTIMS: tuple[Victim, ...] = ("driver", "device", "weight host")
SEED = int(os.environ.get("KILL_SEED", "20"))


def test_ten_kills_at_random_moments_cost_the_steps_since_the_checkpoint_and_change_nothing(
    folder: TrainingFolder,
) -> None:
    schedule = {"steps": STEPS, "checkpoint_every_steps": EVERY}
    whole, broken = folder.folder / "whole", folder.folder / "broken"
    with folder.train(folder.config(whole, **schedule)) as command:
        assert command.wait() == OK
    expected = {event["step"]: event["loss"] for event in command.of_kind("step_done")}

    lives = killed_run(folder, folder.config(broken, **schedule), broken)

    last_step, checkpoint = 0, 0
    for events in lives:
        for event in events:
            if event["event"] == "checkpoint_saved":
                checkpoint = event["step"]
            if event["event"] == "step_done":
                step = event["step"]
                assert event["loss"] == expected[step], step
                assert checkpoint < step <= last_step + 1
                last_step = step
    assert last_step == STEPS
    assert_same_tensors(whole / "latest", broken / "latest")
    folder.check_no_process_is_left()


def killed_run(folder: TrainingFolder, config: Path, output: Path) -> list[list[Event]]:
    """Run to the end through the kills; returns what each process said."""
    rng = random.Random(SEED)
    plan = deque(kill_plan(rng))
    lives: list[list[Event]] = []
    while True:
        resume = ("--resume",) if any(output.glob("step-*")) else ()
        with folder.train(config, *resume) as command:
            lives.append(command.events)
            if not kill_driver(command, plan, rng):
                assert command.wait() == OK, folder.log.read_text(encoding="utf-8")
                return lives
            command.wait()


def kill_plan(rng: random.Random) -> list[tuple[int, Victim]]:
    """Steps in order, the last ones left out, each with whom to kill after it."""
    victims = list(VICTIMS) * (KILLS // len(VICTIMS))
    victims += rng.choices(VICTIMS, k=KILLS - len(victims))
    rng.shuffle(victims)
    return list(zip(sorted(rng.sample(range(1, STEPS - 8), KILLS)), victims, strict=True))


def kill_driver(command: TrainCommand, plan: deque[tuple[int, Victim]], rng: random.Random) -> bool:
    """Kill what the plan says up to the next driver; False: there is no driver left in it."""
    while plan:
        step, victim = plan.popleft()
        assert command.wait_for("step_done", lambda event, step=step: event["step"] >= step)
        time.sleep(rng.uniform(0.0, 0.3))
        assert command.process.poll() is None, "it ended by itself"
        sys.stdout.write(f"after step {step}: a {victim} is killed\n")
        command.kill(victim, rng.choice)
        if victim == "driver":
            return True
    return False


def assert_same_tensors(left: Path, right: Path) -> None:
    names = sorted(str(path.relative_to(left)) for path in left.rglob("*.safetensors"))
    assert names
    for name in names:
        torch.testing.assert_close(load_file(left / name), load_file(right / name), rtol=0, atol=0)
