"""The shipped systemd units: parsed here, and checked by systemd where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

UNITS = sorted((Path(__file__).resolve().parents[2] / "deploy" / "systemd").glob("*.service"))
HARDENED = {
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "ProtectKernelModules": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectControlGroups": "yes",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "DevicePolicy": "closed",
    "SystemCallArchitectures": "native",
    "UMask": "0077",
}
MOST_EXPOSURE = 20
"""Tenths of systemd's own measure: 0 is locked up, 100 is open."""


def settings(path: Path) -> dict[str, list[str]]:
    """Return the values of each directive, all sections together."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and line[0] not in "#[":
            name, separator, value = line.partition("=")
            assert separator, line
            found[name].append(value)
    return found


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_a_unit_runs_as_its_own_user_hardened_and_comes_back(path: Path) -> None:
    found = settings(path)

    assert found["User"] == ["motley"]
    assert {name: found[name][0] for name in HARDENED} == HARDENED
    assert found["Restart"] == ["always"]
    assert found["WantedBy"] == ["multi-user.target"]
    assert "@system-service" in found["SystemCallFilter"]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_secrets_are_credentials_and_never_in_the_unit(path: Path) -> None:
    found = settings(path)

    [credential] = found["LoadCredential"]
    name, _, file = credential.partition(":")
    assert file.startswith("/etc/motley/")
    assert f"%d/{name}" in " ".join(found["Environment"] + found["ExecStart"])
    assert not re.search(r"TOKEN=\S", " ".join(found["Environment"]))


def test_a_node_joins_with_the_token_and_tells_its_name() -> None:
    [path] = [unit for unit in UNITS if unit.name == "motley-node.service"]
    found = settings(path)

    [start] = found["ExecStart"]
    assert "ray start --block --address=${MOTLEY_HEAD}" in start
    assert "motley-node:${MOTLEY_NODE}" in start
    assert "RAY_AUTH_MODE=token" in found["Environment"][0]


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on PATH"
)
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_accepts_a_unit_and_finds_it_locked_up(path: Path, tmp_path: Path) -> None:
    # The program is not installed on the machine that runs the tests.
    text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", path.read_text("utf-8"), flags=re.M)
    unit = tmp_path / path.name
    unit.write_text(text, encoding="utf-8")

    for asked in (
        ["verify", "--man=no"],
        ["security", "--offline=true", f"--threshold={MOST_EXPOSURE}"],
    ):
        ran = subprocess.run(
            ["systemd-analyze", *asked, str(unit)], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        if asked[0] == "verify":
            assert ran.stderr == ""
