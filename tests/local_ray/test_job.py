"""`ray job submit -- python -m cluster up` on a real Ray head, through the jobs API, to tokens."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cluster.client import MotleyClient

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 90.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The venv's programs first, a token of its own, and no cluster of the test session."""
    bin_folder = str(Path(sys.executable).parent)
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4, encoding="ascii")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return kept | {
        "PATH": os.pathsep.join([bin_folder, kept.get("PATH", "")]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "MOTLEY_HOME": str(tmp_path / "home"),
    }


@pytest.fixture
def ray_head(environment: dict[str, str], tmp_path: Path) -> Iterator[str]:
    """A Ray head of its own with the dashboard (which serves the jobs API); yields its URL."""
    folder = Path("/tmp") / f"motley-ray-{os.getpid()}"  # Ray's socket paths must be short
    dashboard = free_port()
    command = [
        "ray", "start", "--head", "--block", f"--port={free_port()}",
        f"--dashboard-port={dashboard}", "--num-cpus=8", "--object-store-memory=80000000",
        f"--temp-dir={folder}", "--node-ip-address=127.0.0.1", "--include-dashboard=true",
        # Without ports of its own the agent that starts jobs cannot listen beside another Ray's.
        f"--dashboard-agent-listen-port={free_port()}",
        f"--dashboard-agent-grpc-port={free_port()}", f"--metrics-export-port={free_port()}",
    ]  # fmt: skip
    log = tmp_path / "head.log"
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not _ray("job", "list", "--address", url, environment=environment).ok:
            assert process.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < deadline_s, log.read_text(encoding="utf-8")
            time.sleep(0.5)
        yield url
    finally:
        # `ray stop` would end every Ray of this machine; this ends this test's own.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)
        _kill_processes_of(folder)
        shutil.rmtree(folder, ignore_errors=True)


class _Ran:
    def __init__(self, completed: subprocess.CompletedProcess[str]) -> None:
        self.ok = completed.returncode == 0
        self.out = completed.stdout + completed.stderr


def _ray(*arguments: str, environment: dict[str, str]) -> _Ran:
    return _Ran(
        subprocess.run(
            ["ray", *arguments], env=environment, capture_output=True, text=True, check=False,
            timeout=60, cwd=ROOT,
        )
    )  # fmt: skip


def _kill_processes_of(folder: Path) -> None:
    """End what `ray start` left: processes whose command line names this test's own folder."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
                if str(folder) in command:
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:
                continue


def test_a_submitted_job_serves_tokens(
    ray_head: str, environment: dict[str, str], tmp_path: Path
) -> None:
    config = tmp_path / "job.yaml"
    settings: dict[str, Any] = {
        "model": str(ROOT / "deploy" / "checkpoints" / "tiny-qwen3"),
        "devices": [
            {
                "id": name, "kind": "paced", "flops_per_s": speed, "memory_bytes_per_s": speed / 8,
                "memory_bytes": "64 MiB",
            }
            for name, speed in (("fast", 1.6e10), ("slow", 8e9))
        ],
        "gateway": {"http_port": 0, "grpc_port": 0},
    }  # fmt: skip
    config.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML

    job = _submit(ray_head, config, environment)
    ready = _wait_for_ready(ray_head, job, environment)

    with MotleyClient(ready["grpc_target"], ready["token"]) as client:
        result = client.complete("def f(n):", max_tokens=8, temperature=0.0, ignore_eos=True)
    assert len(result.choices[0].token_ids) == 8

    stopped = _ray("job", "stop", "--address", ray_head, job, environment=environment)
    assert stopped.ok, stopped.out


def _submit(url: str, config: Path, environment: dict[str, str]) -> str:
    """Submit the job, again while the head has no agent yet to run it."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    for attempt in itertools.count():
        job = f"motley-test-{attempt}"
        submitted = _ray(
            "job", "submit", "--address", url, "--no-wait", "--submission-id", job,
            "--working-dir", str(ROOT), "--", "python", "-m", "cluster", "up", "--json",
            "--config", str(config), environment=environment,
        )  # fmt: skip
        if submitted.ok:
            return job
        assert "No available agent" in submitted.out, submitted.out
        assert time.monotonic() < deadline_s, submitted.out
        time.sleep(0.5)
    raise AssertionError("unreachable")


def _wait_for_ready(url: str, job: str, environment: dict[str, str]) -> dict[str, Any]:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while True:
        logs = _ray("job", "logs", "--address", url, job, environment=environment).out
        for line in logs.splitlines():
            if re.match(r'\{.*"event": ?"ready"', line):
                value: dict[str, Any] = json.loads(line)
                return value
        assert time.monotonic() < deadline_s, logs
        time.sleep(0.5)
