"""A gateway that dies and comes back has forgotten no request that it had accepted."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore

import pytest
from cli_machine import Machine, end, event

from cluster.client import MotleyClient

PROMPT = "import os\nimport sys\n\n\ndef main("
NUM_TOKENS = 400
DEADLINE_S = 240.0

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(500)]


@pytest.fixture
def machine() -> Iterator[Machine]:
    folder = Path(tempfile.mkdtemp(prefix="cli-"))
    yield Machine(folder)
    shutil.rmtree(folder, ignore_errors=True)


def ask(client: MotleyClient, name: str, heard: Semaphore | None = None) -> list[int]:
    """Stream a sampled request under a name; its tokens follow from the name."""
    tokens: list[int] = []
    chunks = client.generate(
        PROMPT,
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        temperature=0.8,
        request_id=name,
        timeout_s=DEADLINE_S,
    )
    for chunk in chunks:
        tokens += chunk.token_ids
        if len(tokens) == 20 and heard is not None:
            heard.release()
    return tokens


def test_named_requests_survive_a_killed_gateway(machine: Machine) -> None:
    config = machine.config()
    names = ["first", "second", "third"]
    up = machine.up("--config", config)
    try:
        ready = event(up, "ready")
        with MotleyClient(ready["grpc_target"], ready["token"]) as client:
            expected = {name: ask(client, name) for name in names}
    finally:
        end(up)
    assert len(set(map(tuple, expected.values()))) == 3

    (machine.folder / "home").rename(machine.folder / "finished")  # their outputs are kept
    token = machine.folder / "token"
    token.write_text("a-token-that-outlives-the-gateway")
    gateway = {"http_port": machine.http_port, "grpc_port": machine.grpc_port}
    config = machine.config(gateway=gateway | {"token_file": str(token)})
    up = machine.up("--config", config)
    try:
        ready = event(up, "ready")
        heard = Semaphore(0)
        with (
            MotleyClient(ready["grpc_target"], token.read_text()) as client,
            ThreadPoolExecutor(len(names)) as pool,
        ):
            streams = {name: pool.submit(ask, client, name, heard) for name in names}
            for _ in names:
                assert heard.acquire(timeout=DEADLINE_S)
            os.kill(up.pid, signal.SIGKILL)
            end(up)
            up = machine.up("--config", config)
            event(up, "ready")
            actual = {name: stream.result(DEADLINE_S) for name, stream in streams.items()}
            assert actual == expected
            # And once more: nothing runs again, all is heard again.
            assert {name: ask(client, name) for name in names} == expected
    finally:
        end(up)
