"""Every verb of the command line as a process of its own, its exit code and what it leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cli_machine import CHECKPOINT, DEADLINE_S, NAME, Machine, end, event, free_port

RAY_NOTICES_S = 150.0
"""Ray's agents look for a dead parent now and then; a minute has been seen."""

OK, ERROR, USAGE, INFEASIBLE, NOT_RUNNING, NOT_READY, UNAUTHORIZED = range(7)

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def machine() -> Iterator[Machine]:
    folder = Path(tempfile.mkdtemp(prefix="cli-"))
    yield Machine(folder)
    shutil.rmtree(folder, ignore_errors=True)


def error_of(ran: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The error document that --json leaves on stdout; stderr says it in one sentence."""
    assert "Traceback" not in ran.stderr
    [line] = ran.stdout.splitlines()
    error: dict[str, Any] = json.loads(line)["error"]
    assert error["exit_code"] == ran.returncode
    return error


# -- a life: up, every verb, down --------------------------------------------------------------


def test_every_verb_of_a_running_deployment_and_its_exit_codes(machine: Machine) -> None:
    config = machine.config()
    up = machine.up("--config", config)
    try:
        ready = event(up, "ready")
        sys.stdout.write(f"ready after {ready['seconds']:.1f} s\n")
        assert ready["http_url"] == f"http://127.0.0.1:{machine.http_port}"
        assert ready["grpc_target"] == f"127.0.0.1:{machine.grpc_port}"
        check_status(machine)
        check_generate(machine)
        check_chat(machine)
        check_refusals(machine, ready)
        check_second_up(machine, config)

        down = machine.run("down", "--json", "--name", NAME)
        assert (down.returncode, json.loads(down.stdout)["stopped"]) == (OK, True)
        assert up.wait(DEADLINE_S) == OK
        assert event(up, "stopped")["reason"] == "signal"
        machine.check_nothing_is_left()
    finally:
        end(up)


def check_status(machine: Machine) -> None:
    status = machine.run("status", "--json")
    value = json.loads(status.stdout)
    assert (status.returncode, value["ready"]) == (OK, True)
    cut = [(stage["first_layer"], stage["end_layer"]) for stage in value["stages"]]
    assert cut == [(0, 5), (5, 7), (7, 8)]
    plain = machine.run("status", "--name", NAME)
    assert plain.returncode == OK
    assert all(f"paced{i}" in plain.stdout for i in range(3))


def check_generate(machine: Machine) -> None:
    asked = ("generate", "import os\n", "--max-tokens", "12", "--temperature", "0")
    as_json = machine.run(*asked, "--json")
    plain = machine.run(*asked)
    piped = machine.run("generate", "-", *asked[2:], stdin="import os\n")

    assert [ran.returncode for ran in (as_json, plain, piped)] == [OK] * 3
    text = json.loads(as_json.stdout)["text"]
    assert text
    assert plain.stdout == f"{text}\n"
    assert piped.stdout == plain.stdout
    assert "tokens" in plain.stderr
    seeded = [
        json.loads(machine.run("generate", "def ", "--seed", seed, "--json").stdout)["text"]
        for seed in ("3", "3", "4")
    ]
    assert seeded[0] == seeded[1] != seeded[2]


def check_chat(machine: Machine) -> None:
    turns = "What does os.path.join do?\n\nAnd posixpath.split?\n/exit\nnever read\n"
    asked = ("chat", "--system", "You know Python.", "--max-tokens", "16", "--temperature", "0")
    plain = machine.run(*asked, stdin=turns)
    as_json = machine.run(*asked, "--json", stdin=turns.replace("/exit\nnever read\n", ""))

    assert (plain.returncode, as_json.returncode) == (OK, OK), plain.stderr
    answers = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert len(answers) == 2
    assert plain.stdout == "".join(f"{answer['text']}\n" for answer in answers)


def check_refusals(machine: Machine, ready: dict[str, Any]) -> None:
    for verb in (("generate", "x"), ("chat",), ("status",)):
        ran = machine.run(*verb, "--json", "--token", "not-the-token", stdin="x\n")
        assert ran.returncode == UNAUTHORIZED, ran
        assert "refused the token" in error_of(ran)["message"]
    long = machine.run("generate", "x " * 3000, "--json")
    assert long.returncode == USAGE
    assert "2048" in error_of(long)["message"]
    assert machine.run("generate", "x", "--max-tokens", "many").returncode == USAGE
    assert machine.run("status", "--name", "another").returncode == NOT_RUNNING
    # By address alone, from a place that has no run-state file.
    other = Machine.__new__(Machine)
    other.__dict__ |= machine.__dict__
    other.environment = machine.environment | {
        "MOTLEY_HOME": str(machine.folder / "elsewhere"),
        "MOTLEY_TARGET": ready["grpc_target"],
        "MOTLEY_URL": ready["http_url"],
        "MOTLEY_TOKEN": ready["token"],
    }
    assert other.run("generate", "x", "--max-tokens", "1").returncode == OK
    assert other.run("status").returncode == OK


def check_second_up(machine: Machine, config: Path) -> None:
    same_name = machine.run("up", "--json", "--config", config)
    assert same_name.returncode == ERROR
    assert f"{NAME} already runs as process" in error_of(same_name)["message"]

    same_port = machine.run("up", "--json", "--config", config, "--name", "second")
    assert same_port.returncode == ERROR
    message = json.loads(same_port.stdout.splitlines()[-1])["error"]["message"]
    assert f"cannot listen on 127.0.0.1:{machine.http_port}" in message
    assert "gateway.http_port" in message
    assert "Traceback" not in same_port.stderr
    assert machine.run("status").returncode == OK


# -- nothing runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [("status",), ("generate", "x"), ("chat",), ("down",)])
def test_with_nothing_running_a_verb_says_so(machine: Machine, verb: tuple[str, ...]) -> None:
    ran = machine.run(*verb, "--json")
    assert ran.returncode == NOT_RUNNING
    assert "motley up" in error_of(ran)["message"]


@pytest.mark.parametrize(
    "verb",
    [("status", "--url", "http://{}"), ("generate", "x", "--target", "{}", "--token", "y" * 9)],
)
def test_an_address_where_nothing_listens_is_not_running(
    machine: Machine, verb: tuple[str, ...]
) -> None:
    ran = machine.run(*(part.format(f"127.0.0.1:{free_port()}") for part in verb), "--json")
    assert ran.returncode == NOT_RUNNING
    assert "nothing answers at" in error_of(ran)["message"]


def test_plan_predicts_without_starting_anything(machine: Machine) -> None:
    config = machine.config()
    ran = machine.run("plan", "--json", "--config", config)
    value = json.loads(ran.stdout)
    assert ran.returncode == OK
    assert [stage["device_id"] for stage in value["plan"]["stages"]] == [
        "paced0", "paced1", "paced2",
    ]  # fmt: skip
    plain = machine.run("plan", "--config", config)
    assert plain.returncode == OK
    assert "paced2" in plain.stdout
    machine.check_nothing_is_left()


def test_doctor_finds_this_machine_fit_and_a_taken_port_unfit(machine: Machine) -> None:
    good = machine.run("doctor", "--json", "--config", machine.config())
    checks = json.loads(good.stdout)
    assert (good.returncode, checks["ok"]) == (OK, True), checks
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        gateway = {"http_port": port, "grpc_port": 0}
        bad = machine.run("doctor", "--json", "--config", machine.config(gateway=gateway))
    [failed] = [c for c in json.loads(bad.stdout)["checks"] if c["outcome"] == "fail"]
    assert bad.returncode == ERROR
    assert str(port) in failed["message"]


@pytest.mark.parametrize("verb", ["up", "plan", "doctor"])
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: {model}\nengin: {{}}\n", "engin: unknown key; did you mean engine?"),
        ("model: {model}\nengine: {{max_running: 0}}\n", "engine.max_running"),
        ("model: ./not-there\n", "no folder ./not-there"),
        ("model: [", "is not YAML"),
        (None, "cannot be read"),
    ],
)
def test_settings_that_cannot_be_used_are_wrong_usage(
    machine: Machine, verb: str, text: str | None, told: str
) -> None:
    path = machine.folder / "bad.yaml"
    if text is not None:
        path.write_text(text.format(model=CHECKPOINT), encoding="utf-8")
    ran = machine.run(verb, "--json", "--config", path)
    assert ran.returncode == USAGE
    assert told in error_of(ran)["message"]
    assert str(path) in error_of(ran)["message"]
    machine.check_nothing_is_left()


@pytest.mark.parametrize("verb", ["up", "plan"])
def test_a_plan_that_does_not_fit_names_the_bytes(machine: Machine, verb: str) -> None:
    devices = [
        {
            "id": "tiny", "kind": "paced", "flops_per_s": 1e9, "memory_bytes_per_s": 1e9,
            "memory_bytes": "3 MiB",
        }
    ]  # fmt: skip
    config = machine.config(devices=devices, plan={})
    ran = machine.run(verb, "--json", "--config", config)
    assert ran.returncode == INFEASIBLE
    told = error_of(ran)["message"]
    assert re.search(r"8 layers need \d+ bytes .* offer \d+", told), told
    machine.check_nothing_is_left()


@pytest.mark.parametrize("verb", ["up", "plan"])
def test_a_checkpoint_that_cannot_be_served_is_an_error(machine: Machine, verb: str) -> None:
    folder = machine.folder / "damaged"
    shutil.copytree(CHECKPOINT, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    truncated = machine.run(verb, "--json", "--config", machine.config(model=str(folder)))
    file.unlink()
    missing = machine.run(verb, "--json", "--config", machine.config(model=str(folder)))
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(
        json.dumps(values | {"model_type": "gpt2"}), encoding="utf-8"
    )
    unsupported = machine.run(verb, "--json", "--config", machine.config(model=str(folder)))

    refused = [(truncated, "truncated or damaged"), (unsupported, "'gpt2' is not served")]
    if verb == "up":
        refused.append((missing, "safetensors"))
    else:
        # Enough to plan with, and said so.
        assert missing.returncode == 0
        assert "planned from config.json alone: no weights in" in missing.stderr
    for ran, part in refused:
        assert ran.returncode == ERROR
        assert part in error_of(ran)["message"]
    machine.check_nothing_is_left()


# -- Ctrl-C ------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["planned", "ready"])
def test_ctrl_c_takes_everything_down(machine: Machine, when: str) -> None:
    up = machine.up("--config", machine.config())
    try:
        event(up, when)
        # A terminal signals every process of the group: Ray's must leave the stopping to us.
        os.killpg(up.pid, signal.SIGINT)
        assert up.wait(DEADLINE_S) in (OK, 130)
        machine.check_nothing_is_left()
    finally:
        end(up)
    assert "Traceback" not in (machine.folder / "up.log").read_text(encoding="utf-8")


def test_an_up_that_was_killed_is_no_obstacle_to_the_next(machine: Machine) -> None:
    config = machine.config()
    up = machine.up("--config", config)
    try:
        event(up, "ready")
        up.kill()
        up.wait(DEADLINE_S)
        assert machine.run("status").returncode == NOT_RUNNING
        machine.check_no_process_is_left(within_s=RAY_NOTICES_S)
    finally:
        end(up)
    again = machine.up("--config", config)
    try:
        event(again, "ready")
        assert machine.run("generate", "x", "--max-tokens", "1").returncode == OK
        assert machine.run("down").returncode == OK
        assert again.wait(DEADLINE_S) == OK
    finally:
        end(again)


# -- one program -------------------------------------------------------------------------------


def test_the_script_and_the_module_are_one_program(machine: Machine) -> None:
    script = (str(Path(sys.executable).with_name("motley")),)
    for arguments, code in (
        (("--help",), OK),
        (("status", "--json"), NOT_RUNNING),
        (("x",), USAGE),
    ):
        ran = [machine.run(*arguments, program=program) for program in ((), script)]
        assert [each.returncode for each in ran] == [code, code]
        # The usage line names the program and is padded to the width.
        shown = [each.stdout.replace("python -m cluster", "motley").split() for each in ran]
        assert shown[0] == shown[1]
