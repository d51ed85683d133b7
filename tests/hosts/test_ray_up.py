"""deploy/clusters/lan.yaml on three hosts over real ssh: up, a submitted job that serves, down."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from host_cases import TEXTS, in_one_process, staged
from host_ray import reached, share_token
from host_ssh import SERVER, make_key, serve_ssh, wait_for_ssh
from hosts import ROOT, Host, HostProcess, Network, network, wait_until
from identity import check_identical

from cluster.client import MotleyClient

CLUSTER = ROOT / "deploy" / "clusters" / "lan.yaml"
DASHBOARD = "http://127.0.0.1:8265"
DEADLINE_S = 180.0
GONE_TIMEOUT_S = 90.0
COMMAND_EVERY_S = 2.0
"""Ray's commands take seconds of a processor: asking without a break slows what is asked about."""
NUM_NEW = 24
NODES = ("h0", "h1", "h2")
JOB = "lan"
ACTORS = (b"ray::StageWorker", b"ray::DecodeWorker")

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def lan(separate_hosts: None) -> Iterator[Network]:
    """An operator's machine, and three hosts that it can log in to."""
    missing = [name for name in ("ssh", "ssh-keygen", "rsync", SERVER) if not shutil.which(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found; on Debian: apt install openssh-server rsync")
    with network(("operator", *NODES)) as hosts:
        key = make_key(hosts["operator"])
        nodes = {name: hosts[name] for name in NODES}
        for host in nodes.values():
            serve_ssh(host, key)
        share_token(hosts["operator"], secrets.token_hex(32))
        wait_for_ssh(hosts["operator"], nodes)
        yield hosts


def rendered(lan: Network) -> dict[str, Any]:
    """The shipped file with these addresses, user and key; all else as it is."""
    config: dict[str, Any] = yaml.safe_load(CLUSTER.read_text(encoding="utf-8"))
    head, *workers = (lan[name].address for name in NODES)
    config["provider"] |= {"head_ip": head, "worker_ips": workers}
    config["auth"] |= {"ssh_user": "motley", "ssh_private_key": "~/.ssh/id_ed25519"}
    config["max_workers"] = len(workers)
    return config


def test_the_lan_cluster_comes_up_serves_a_job_and_goes_down(lan: Network) -> None:
    operator, head = lan["operator"], lan["h0"]
    (operator.folder / "lan.yaml").write_text(yaml.safe_dump(rendered(lan)), encoding="utf-8")
    nodes = {name: lan[name] for name in NODES}
    settings = staged(nodes, 3, 3, 2, gateway={"http_port": 0, "grpc_port": 0})
    settings["ray"] = {"address": "auto", "start_timeout_s": DEADLINE_S}
    (head.folder / "serve.yaml").write_text(json.dumps(settings), encoding="utf-8")

    operator.run("ray", "up", "--yes", "/tmp/lan.yaml", timeout_s=DEADLINE_S)
    try:
        wait_until(
            lambda: all_joined(operator, nodes),
            DEADLINE_S,
            lambda: status_of(operator),
            every_s=COMMAND_EVERY_S,
        )
        with dashboard(operator):
            check_it_serves(operator, head)
    finally:
        operator.run("ray", "down", "--yes", "/tmp/lan.yaml", timeout_s=DEADLINE_S)
    for host in nodes.values():
        assert "uv pip install" in (host.folder / "home" / "installed.log").read_text("utf-8")
    # `ray down` stops the head alone; on the others Ray ends when it misses the head, but for
    # helpers that wait for the next `ray stop` there.
    everything = (b"ray::", b"python", sys.executable.encode())
    wait_until(lambda: not left(head, *everything), GONE_TIMEOUT_S, head.command_lines)
    for host in nodes.values():
        wait_until(lambda host=host: not left(host, *ACTORS), GONE_TIMEOUT_S, host.command_lines)  # type: ignore[misc]


def status_of(operator: Host) -> str:
    return operator.run("ray", "exec", "/tmp/lan.yaml", "ray status", check=False).stdout


def all_joined(operator: Host, nodes: Network) -> bool:
    counts = re.findall(r"(?m)^ (\d+) (?:local|node_)", status_of(operator))
    return sum(map(int, counts)) == len(nodes)


def left(host: Host, *titles: bytes) -> list[int]:
    """Return what runs of Ray's own programs, and of other processes."""
    programs = Path(ray.__file__).parent / "core" / "src"
    return host.processes(f"{programs}/".encode(), *titles)


@contextmanager
def dashboard(operator: Host) -> Iterator[HostProcess]:
    """Forward the head's dashboard, which takes jobs, to the operator's loopback."""
    forwarding = operator.start("ray", "dashboard", "/tmp/lan.yaml")
    try:
        listing = ("ray", "job", "list", "--address", DASHBOARD)
        wait_until(
            lambda: operator.run(*listing, check=False).returncode == 0,
            DEADLINE_S,
            lambda: forwarding.output,
            every_s=COMMAND_EVERY_S,
        )
        yield forwarding
    finally:
        forwarding.end()


def check_it_serves(operator: Host, head: Host) -> None:
    submit = ("ray", "job", "submit", "--address", DASHBOARD, "--no-wait", "--submission-id", JOB)
    motley = ("python", "-m", "cluster", "up", "--json", "--config", "/tmp/serve.yaml")
    operator.run(*submit, "--working-dir", ".", "--", *motley)
    ready = job_event(operator, "ready")
    with (
        reached(head, ready["grpc_target"]) as target,
        MotleyClient(target, ready["token"]) as client,
    ):
        got = [
            list(
                client.complete(text, max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True)
                .choices[0]
                .token_ids
            )
            for text in TEXTS
        ]
    check_identical(in_one_process(TEXTS, NUM_NEW), got)
    operator.run("ray", "job", "stop", "--address", DASHBOARD, JOB)


def job_event(operator: Host, name: str) -> dict[str, Any]:
    told: list[str] = []

    def is_there() -> bool:
        logs = operator.run("ray", "job", "logs", "--address", DASHBOARD, JOB, check=False)
        told[:] = logs.stdout.splitlines()
        return bool(events())

    def events() -> list[str]:
        return [line for line in told if re.match(rf'\{{.*"event": ?"{name}"', line)]

    wait_until(is_there, DEADLINE_S, lambda: "\n".join(told), every_s=COMMAND_EVERY_S)
    value: dict[str, Any] = json.loads(events()[0])
    return value
