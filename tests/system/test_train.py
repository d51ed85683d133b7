"""`motley train` as a process: killed at random moments, told to stop, out of disk; and served."""

from __future__ import annotations

import json
import random
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_command import Command, Event, SmallDisk, TrainingFolder, Victim, training_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

OK, ERROR, INTERRUPTED = 0, 1, 130

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def folder() -> Iterator[TrainingFolder]:
    with training_folder() as made:
        yield made


def steps(command: Command) -> list[int]:
    return [event["step"] for event in command.of_kind("step_done")]


def is_after(step: int, event: Event) -> bool:
    return bool(event["step"] >= step)


# -- kills -------------------------------------------------------------------------------------

STEPS, CHECKPOINT_EVERY, KILLS, SEED = 60, 5, 10, 20
VICTIMS: tuple[Victim, ...] = ("driver", "device", "weight host")


def test_ten_kills_at_random_moments_cost_the_steps_since_the_checkpoint_and_change_nothing(
    folder: TrainingFolder,
) -> None:
    schedule = {"steps": STEPS, "checkpoint_every_steps": CHECKPOINT_EVERY}
    whole, broken = folder.folder / "whole", folder.folder / "broken"
    with folder.start("train", folder.training_config(whole, **schedule)) as command:
        assert command.wait() == OK, folder.errors
    losses = {event["step"]: event["loss"] for event in command.of_kind("step_done")}

    last_step, checkpoint = 0, 0
    for event in killed_run(folder, folder.training_config(broken, **schedule), broken):
        if event["event"] == "checkpoint_saved":
            checkpoint = event["step"]
        if event["event"] == "step_done":
            assert checkpoint < event["step"] <= last_step + 1
            last_step = event["step"]
            assert event["loss"] == losses[last_step]
    assert last_step == STEPS
    assert_same_tensors(whole / "latest", broken / "latest")
    assert folder.errors == ""


def killed_run(folder: TrainingFolder, config: Path, output: Path) -> list[Event]:
    """Run to the end through the kills; returns what all its processes said."""
    rng = random.Random(SEED)
    plan = deque(kill_plan(rng))
    events: list[Event] = []
    while True:
        resume = ("--resume",) if any(output.glob("step-*")) else ()
        with folder.start("train", config, *resume) as command:
            is_killed = kill_until_driver(command, plan, rng)
            code = command.wait()
        events += command.events
        if not is_killed:
            assert code == OK, folder.errors
            return events


def kill_plan(rng: random.Random) -> list[tuple[int, Victim]]:
    """Return steps, ascending and none of the last ones, each with whom to kill after it."""
    victims = [*VICTIMS * (KILLS // len(VICTIMS)), *rng.choices(VICTIMS, k=KILLS % len(VICTIMS))]
    rng.shuffle(victims)
    return list(zip(sorted(rng.sample(range(1, STEPS - 8), KILLS)), victims, strict=True))


def kill_until_driver(
    command: Command, plan: deque[tuple[int, Victim]], rng: random.Random
) -> bool:
    """Kill what the plan says up to the next driver; False: there is no driver left in it."""
    while plan:
        step, victim = plan.popleft()
        assert command.wait_for("step_done", partial(is_after, step))
        time.sleep(rng.uniform(0.0, 0.3))
        assert command.process.poll() is None, "it ended by itself"
        sys.stdout.write(f"after step {step}: a {victim} is killed\n")
        command.kill(victim, rng.choice)
        if victim == "driver":
            return True
    return False


def assert_same_tensors(left: Path, right: Path) -> None:
    """Weights and optimizer state are equal bit for bit."""
    names = sorted(str(path.relative_to(left)) for path in left.rglob("*.safetensors"))
    assert len(names) > 1
    for name in names:
        torch.testing.assert_close(load_file(left / name), load_file(right / name), rtol=0, atol=0)


# -- told to stop ------------------------------------------------------------------------------

PROMPT, NUM_TOKENS = "line 7: the quick fox", 16


def test_a_run_that_is_told_to_stop_saves_and_goes_on_and_what_it_trained_is_served(
    folder: TrainingFolder,
) -> None:
    output = folder.folder / "run"
    config = folder.training_config(output, steps=1000, checkpoint_every_steps=500)
    with folder.start("train", config) as command:
        assert command.wait_for("step_done", partial(is_after, 3)), folder.errors
        command.process.terminate()
        assert command.wait() == INTERRUPTED
    [saved] = command.of_kind("checkpoint_saved")
    assert saved["step"] == steps(command)[-1]
    assert folder.errors == "interrupted; go on with --resume\n"

    last_step = saved["step"] + 2
    with folder.start("train", config, "--resume", "--steps", str(last_step)) as command:
        assert command.wait() == OK, folder.errors
    assert steps(command) == [last_step - 1, last_step]
    assert (output / "latest").resolve().name == f"step-{last_step:06d}"
    assert served_text(folder, output / "latest") == text_of_transformers(output / "latest")


def served_text(folder: TrainingFolder, model: Path) -> str:
    """What a deployment of a trained folder continues the prompt with."""
    with folder.start("up", folder.serving_config(model)) as up:
        assert up.wait_for("ready"), folder.errors
        options = ("--temperature", "0", "--max-tokens", str(NUM_TOKENS), "--json")
        asked = folder.run("generate", PROMPT, *options)
    text: str = json.loads(asked.stdout)["text"]
    return text


def text_of_transformers(model: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens_BT = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    made_BT = network.generate(tokens_BT, do_sample=False, max_new_tokens=NUM_TOKENS)
    text: str = tokenizer.decode(made_BT[0, tokens_BT.shape[1] :], skip_special_tokens=True)
    return text


# -- a full disk -------------------------------------------------------------------------------

DISK_BYTES, LARGE_DISK_BYTES = 64 * 2**20, 256 * 2**20
"""A checkpoint takes 43 MB."""


@pytest.fixture
def disk(folder: TrainingFolder) -> Iterator[SmallDisk]:
    try:
        mounted = SmallDisk(folder.folder / "disk", DISK_BYTES)
    except PermissionError as error:
        pytest.skip(str(error))
    with closing(mounted):
        yield mounted


def test_a_full_disk_costs_checkpoints_but_not_the_run_nor_the_checkpoint_before(
    folder: TrainingFolder, disk: SmallDisk
) -> None:
    config = folder.training_config(disk.folder / "run", steps=9, checkpoint_every_steps=3)
    with folder.start("train", config) as command:
        assert command.wait() == ERROR
    assert steps(command) == list(range(1, 10))
    assert [event["step"] for event in command.of_kind("checkpoint_saved")] == [3]
    assert [event["step"] for event in command.of_kind("checkpoint_failed")] == [6, 9]
    told = command.events[-1]["error"]["message"]
    assert "step 9 was not written" in told
    assert "No space left on device" in told
    assert [path.name for path in (disk.folder / "run").glob("step-*")] == ["step-000003"]

    disk.resize(LARGE_DISK_BYTES)
    with folder.start("train", config, "--resume") as command:
        assert command.wait() == OK, folder.errors
    assert steps(command) == list(range(4, 10))
