from __future__ import annotations

import socket
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from actors.engine.checkpoint import Checkpoint
from cluster.config import MotleyConfig, default_config
from cluster.doctor_checks import (
    NODE_PACKAGES,
    PROCESS_BYTES,
    ROOT,
    TOP_LEVEL_PACKAGES,
    available_memory_bytes,
    check_checkpoint,
    check_disk,
    check_imports,
    check_memory,
    check_plan,
    check_ports,
    check_ray_auth,
    check_versions,
    compare_nodes,
    declared_requirements,
    installed_versions,
)
from cluster.gateway.settings import GatewaySettings


def config_with(**changes: object) -> MotleyConfig:
    return MotleyConfig.model_validate(default_config().model_dump() | changes)


def test_our_packages_resolve_to_this_checkout() -> None:
    checks = check_imports(ROOT)

    assert [check.outcome for check in checks] == ["pass"] * len(TOP_LEVEL_PACKAGES)


def test_a_package_from_elsewhere_is_found_out(tmp_path: Path) -> None:
    checks = check_imports(tmp_path)

    assert {check.outcome for check in checks} == {"fail"}
    assert f"not to {tmp_path}" in checks[0].message


def test_this_environment_is_within_the_tested_ranges() -> None:
    ranges = declared_requirements()

    assert {"python", *NODE_PACKAGES} <= set(ranges)
    checks = check_versions(ranges, installed_versions(NODE_PACKAGES))
    assert {check.outcome for check in checks} == {"pass"}


def test_a_missing_or_wrong_version_says_what_to_install() -> None:
    ranges = {"torch": SpecifierSet(">=2.11"), "ray": SpecifierSet("<3")}

    torch, ray = check_versions(ranges, {"torch": "2.0.1", "ray": None})

    assert (torch.outcome, ray.outcome) == ("fail", "fail")
    assert torch.message == "2.0.1 is outside >=2.11; install a version of that range"
    assert "pip install 'ray<3'" in ray.message
    assert installed_versions(["no-such-package"])["no-such-package"] is None


def test_a_taken_port_is_found_and_named() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]

        http, grpc = check_ports(GatewaySettings(http_port=port, grpc_port=0))

    assert (http.outcome, grpc.outcome) == ("fail", "pass")
    assert http.message == (
        f"cannot listen on 127.0.0.1:{port} (already in use); set gateway.http_port"
    )
    http, _ = check_ports(GatewaySettings(http_port=port, grpc_port=0))
    assert http.outcome == "pass"


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    settings = GatewaySettings(host="192.0.2.1", http_port=1, insecure_plaintext=True)

    assert check_ports(settings)[0].outcome == "fail"


def test_a_checkpoint_is_opened_and_planned() -> None:
    config = default_config()

    readable, checkpoint = check_checkpoint(config)
    planned, plan = check_plan(config, checkpoint)

    assert (readable.outcome, planned.outcome) == ("pass", "pass")
    assert "Qwen3ForCausalLM, 8 layers" in readable.message
    assert plan is not None


def test_an_unreadable_checkpoint_fails_and_leaves_the_plan_open(tmp_path: Path) -> None:
    config = config_with(model=str(tmp_path))

    unreadable, checkpoint = check_checkpoint(config)

    assert (unreadable.outcome, checkpoint) == ("fail", None)
    assert check_plan(config, checkpoint)[0].outcome == "warn"


def test_undeclared_devices_leave_the_plan_open_and_small_ones_fail_it() -> None:
    checkpoint = Checkpoint.open(default_config().model)
    small = {
        "id": "s",
        "kind": "paced",
        "flops_per_s": 1,
        "memory_bytes_per_s": 1,
        "memory_bytes": 1000,
    }

    found = check_plan(config_with(devices=None), checkpoint)
    misfit = check_plan(config_with(devices=[small]), checkpoint)

    assert (found[0].outcome, found[1]) == ("warn", None)
    assert (misfit[0].outcome, misfit[1]) == ("fail", None)
    assert "8 layers need" in misfit[0].message


def test_memory_is_compared_with_what_the_plan_puts_here() -> None:
    config = default_config()
    _, plan = check_plan(config, Checkpoint.open(config.model))
    assert plan is not None
    processes = len(plan.stages) + config.plan.lanes

    def outcome(available_bytes: int | None) -> str:
        return check_memory(config, plan, available_bytes).outcome

    assert outcome(2 * processes * PROCESS_BYTES) == "pass"
    assert outcome(processes * PROCESS_BYTES // 2) == "warn"
    assert outcome(1000) == "fail"
    assert outcome(None) == "warn"
    assert check_memory(config, None, 1000).outcome == "warn"
    assert (available_memory_bytes() or 0) > 0


@pytest.mark.parametrize(
    ("used", "free_bytes", "outcome"),
    [(0.5, 50 * 2**30, "pass"), (0.9, 2**30, "warn"), (0.96, 40 * 2**30, "fail")],
)
def test_a_disk_is_judged_by_rays_own_threshold(
    monkeypatch: pytest.MonkeyPatch, used: float, free_bytes: int, outcome: str
) -> None:
    usage = type("Usage", (), {"free": free_bytes, "total": round(free_bytes / (1 - used))})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)

    assert check_disk(Path("/spill")).outcome == outcome


@pytest.mark.parametrize(
    ("address", "mode", "outcome"),
    [
        (None, None, "pass"),
        (None, "disabled", "warn"),
        ("auto", "token", "pass"),
        ("127.0.0.1:6379", None, "warn"),
        ("10.0.0.5:6379", None, "fail"),
        ("ray://10.0.0.5:10001", "disabled", "fail"),
    ],
)
def test_ray_without_tokens_off_loopback_fails(
    address: str | None, mode: str | None, outcome: str
) -> None:
    environment = {} if mode is None else {"RAY_AUTH_MODE": mode}

    assert check_ray_auth(address, environment).outcome == outcome


def test_nodes_must_agree_on_every_version() -> None:
    checks = compare_nodes(
        {
            "a": {"python": "3.11.7", "torch": "2.13.0", "ray": "2.60.0"},
            "b": {"python": "3.11.7", "torch": "2.12.0", "ray": None},
        }
    )

    outcomes = {check.name: check.outcome for check in checks}
    assert outcomes == {
        "python on every node": "pass",
        "torch on every node": "fail",
        "ray on every node": "fail",
    }
    assert "2.13.0 on a; 2.12.0 on b; install one version on every node" in checks[1].message
