"""`motley doctor`: will this machine, and every node of its Ray cluster, be able to serve?"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from rich.text import Text

from cluster import doctor_checks as checks
from cluster.commands.errors import ChecksFailedError
from cluster.commands.output import Output
from cluster.config import MotleyConfig


def examine(config: MotleyConfig, output: Output) -> None:
    """Run every check and write the findings; raises `ChecksFailedError` when any failed."""
    findings = run_checks(config)
    failed = sum(check.outcome == "fail" for check in findings)
    colors = {"pass": "green", "warn": "yellow", "fail": "red"}
    lines = [
        Text.assemble(
            (f"{check.outcome:5}", colors[check.outcome]), f"{check.name}: ", check.message
        )
        for check in findings
    ]
    output.result({"ok": not failed, "checks": [asdict(check) for check in findings]}, *lines)
    if failed:
        raise ChecksFailedError(f"{failed} of {len(findings)} checks failed")


def run_checks(config: MotleyConfig) -> list[checks.Check]:
    """Return the findings for a deployment with these settings."""
    address = config.ray.address or os.environ.get("RAY_ADDRESS")
    versions = checks.installed_versions(checks.NODE_PACKAGES)
    checkpoint_check, checkpoint = checks.check_checkpoint(config)
    plan_check, plan = checks.check_plan(config, checkpoint)
    findings = [
        *checks.check_imports(checks.ROOT),
        *checks.check_versions(checks.declared_requirements(), versions),
        *checks.check_ports(config.gateway),
        checkpoint_check,
        plan_check,
        checks.check_memory(config, plan, checks.available_memory_bytes()),
        checks.check_disk(Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()))),
        checks.check_ray_auth(address, os.environ),
    ]
    if address is not None:
        from cluster.doctor_nodes import check_nodes  # Ray: only for a cluster that was named

        findings += check_nodes(address, checks.NODE_PACKAGES)
    return findings
