from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.cli import app

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "ray", "transformers", "fastapi")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOTLEY_HOME", str(tmp_path / "home"))
    for name in ("MOTLEY_TARGET", "MOTLEY_TOKEN", "MOTLEY_URL", "RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def motley(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin)


def config_file(folder: Path, extra: str) -> str:
    path = folder / "config.yaml"
    model = ROOT / "deploy" / "checkpoints" / "tiny-qwen3"
    path.write_text(f"model: {model}\n{extra}\n", encoding="utf-8")
    return str(path)


def test_plan_shows_the_cut_of_the_embedded_default() -> None:
    result = motley("plan")

    assert result.exit_code == 0
    assert "tiny-qwen3: 3 stages" in result.stdout
    assert "[0, 5)" in result.stdout
    assert "predicted" in result.stdout


def test_plan_as_json_is_one_document_and_nothing_else() -> None:
    result = motley("plan", "--json")

    value = json.loads(result.stdout)
    assert [stage["device_id"] for stage in value["plan"]["stages"]] == ["big", "middle", "small"]
    assert value["alone"] is None


def test_plan_compares_with_one_device_that_holds_the_whole_model(home: Path) -> None:
    devices = (
        "devices:\n"
        "  - {id: a, kind: paced, flops_per_s: 1e12, memory_bytes_per_s: 1e9, memory_bytes: 1 GB}\n"
        "  - {id: b, kind: paced, flops_per_s: 1e12, memory_bytes_per_s: 5e8, memory_bytes: 1 GB}"
    )

    result = motley("plan", "--config", config_file(home, devices))

    assert "split for throughput: 2 stages give" in result.stdout
    assert "a alone gives" in result.stdout
    assert "a single stream is slower" in result.stdout


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        ("engine: {dtpye: float32}", 2, "engine.dtpye: unknown key; did you mean dtype?"),
        ("devices: [{id: a, kind: cpu}]", 2, "devices a have no figures"),
        (
            "devices: [{id: a, kind: paced, flops_per_s: 1, memory_bytes_per_s: 1,"
            " memory_bytes: 1 MB}]",
            3,
            "8 layers need",
        ),
    ],
)
def test_settings_that_do_not_work_have_their_own_exit_codes(
    home: Path, extra: str, code: int, message: str
) -> None:
    path = config_file(home, extra)

    told = motley("plan", "--config", path)
    machine = motley("plan", "--config", path, "--json")

    assert told.exit_code == machine.exit_code == code
    assert message in told.stderr
    assert told.stdout == ""
    error = json.loads(machine.stdout)["error"]
    assert message in error["message"]
    assert error["exit_code"] == code


def test_an_unreadable_checkpoint_is_an_error(home: Path) -> None:
    (home / "empty").mkdir()

    result = motley("plan", "--model", str(home / "empty"))

    assert result.exit_code == 1
    assert "no config.json" in result.stderr


def test_a_model_alone_is_planned_only_once_its_devices_were_measured() -> None:
    result = motley("plan", "--model", str(ROOT / "deploy" / "checkpoints" / "tiny-qwen3"))

    assert result.exit_code == 2
    assert "devices is not set" in result.stderr
    assert "Run `motley profile`" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["status"], ["down"], ["generate", "hello"], ["chat"]], ids=lambda a: a[0]
)
def test_without_a_deployment_every_verb_says_so(arguments: list[str]) -> None:
    result = motley(*arguments, "--json")

    assert result.exit_code == 4
    assert "start one with `motley up`" in json.loads(result.stdout)["error"]["message"]


def test_a_wrong_flag_is_a_usage_error() -> None:
    assert motley("plan", "--colour").exit_code == 2
    assert motley("generate").exit_code == 2
    assert motley().exit_code == 2


def test_doctor_passes_here_and_fails_on_a_port_that_is_taken(home: Path) -> None:
    import socket

    healthy = motley("doctor", "--json", "--config", config_file(home, "gateway: {http_port: 0}"))
    names = {check["name"] for check in json.loads(healthy.stdout)["checks"]}
    assert {"import placement", "torch", "http_port", "checkpoint", "disk", "ray auth"} <= names

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        taken = config_file(home, f"gateway: {{http_port: {port}, grpc_port: 0}}")
        result = motley("doctor", "--json", "--config", taken)

    assert result.exit_code == 1
    value = json.loads(result.stdout)
    assert value["ok"] is False
    [failed] = [check for check in value["checks"] if check["outcome"] == "fail"]
    assert failed["name"] == "http_port"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["plan", "--help"],
        ["profile", "--help"],
        ["up", "--help"],
        ["plan", "--json"],
        ["status"],
        ["down"],
        ["generate", "hello"],
        ["doctor", "--help"],
    ],
    ids=" ".join,
)
def test_light_verbs_import_neither_torch_nor_ray(home: Path, arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from cluster.cli import app\n"
        "try:\n"
        f"    app({arguments!r})\n"
        "except SystemExit:\n"
        "    pass\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.stderr.write('HEAVY ' + ' '.join(heavy))\n"
    )
    environment = os.environ | {"MOTLEY_HOME": str(home)}

    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stderr.endswith("HEAVY ")
