"""Hosts that are reached over ssh, each with the environment that a Ray cluster file expects."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from hosts import Host, HostProcess, Network, wait_until

SSH_TIMEOUT_S = 30.0
SERVER = "/usr/sbin/sshd"
_SKELETON = Path("/etc/skel")
"""What the home of a new user holds."""
_SERVER_SETTINGS = """
HostKey /tmp/host_key
AuthorizedKeysFile /tmp/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
SetEnv OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 LANG=C.UTF-8 RAY_gcs_rpc_server_reconnect_timeout_s=5
"""
# The environment is there already, and hosts reach no package index: what would install is noted.
_PROGRAMS = {
    "python": f'exec {sys.executable} "$@"',
    "ray": f'exec {Path(sys.executable).parent / "ray"} "$@"',
    "pip": 'echo "pip $*" >> ~/installed.log',
    "uv": 'echo "uv $*" >> ~/installed.log',
}


def make_key(host: Host) -> str:
    """Make the key that a host's user logs in elsewhere with; returns its public half."""
    (host.folder / "home" / ".ssh").mkdir(mode=0o700)
    host.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/tmp/home/.ssh/id_ed25519")
    return (host.folder / "home" / ".ssh" / "id_ed25519.pub").read_text(encoding="ascii")


def serve_ssh(host: Host, public_key: str) -> HostProcess:
    """Let the key's owner log in to a host as `motley`, who finds ~/motley/env there."""
    (host.folder / "authorized_keys").write_text(public_key, encoding="ascii")
    (host.folder / "sshd_config").write_text(_SERVER_SETTINGS, encoding="ascii")
    home = host.folder / "home"
    if _SKELETON.is_dir():
        shutil.copytree(_SKELETON, home, dirs_exist_ok=True)
    programs = home / "motley" / "env" / "bin"
    programs.mkdir(parents=True)
    for name, command in _PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/sh\n{command}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    host.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/tmp/host_key")
    return host.start(SERVER, "-D", "-e", "-f", "/tmp/sshd_config")


def wait_for_ssh(operator: Host, hosts: Network) -> None:
    """Return when the operator can log in everywhere."""
    options = ("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null")
    for host in hosts.values():
        command = ("ssh", *options, "-o", "ConnectTimeout=5", f"motley@{host.address}", "true")
        wait_until(
            lambda command=command: operator.run(*command, check=False).returncode == 0,  # type: ignore[misc]
            SSH_TIMEOUT_S,
            lambda command=command: operator.run(*command, check=False).stderr,  # type: ignore[misc]
        )
