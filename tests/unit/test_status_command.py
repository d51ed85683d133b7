from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from cluster.commands.errors import NotReadyError, UnauthorizedError
from cluster.commands.output import Output
from cluster.commands.status import HttpTarget, fetch_json, show_status
from cluster.runstate import NotRunningError
from cluster.trainstate import TrainingState, write_training

STAGE = {
    "index": 0,
    "device": "big",
    "node": "local",
    "first_layer": 0,
    "end_layer": 5,
    "active": True,
    "loaded_fraction": 1.0,
    "busy_s": 1.5,
    "steps": 7,
    "late_s": 0.0,
    "link_bytes": 2048,
}
LANE = {
    "index": 0,
    "running": 1,
    "waiting": 2,
    "blocks_in_use": 3,
    "num_blocks": 4,
    "preemptions": 0,
    "prefix_hit_tokens": 5,
}
STATUS: dict[str, Any] = {
    "ready": True,
    "reason": "",
    "progress": 1.0,
    "epoch": 3,
    "stages": [STAGE],
    "lanes": [LANE],
    "link_bytes": {},
    "adapter": {"name": "step-000100", "version": 2},
}


class Gateway(BaseHTTPRequestHandler):
    answer: ClassVar[tuple[int, bytes]] = (200, b"")
    asked: ClassVar[list[tuple[str, str | None]]] = []

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Authorization")))
        code, body = self.answer
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as inherited
        pass


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTLEY_HOME", str(tmp_path))


@pytest.fixture
def target() -> Iterator[HttpTarget]:
    server = HTTPServer(("127.0.0.1", 0), Gateway)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    Gateway.asked.clear()
    yield HttpTarget(url=f"http://127.0.0.1:{server.server_port}", token="secret")
    server.shutdown()
    thread.join()
    server.server_close()


def answer(value: object, code: int = 200) -> None:
    Gateway.answer = (code, json.dumps(value).encode())


def test_the_status_is_asked_for_with_the_token_and_written_as_it_is(
    target: HttpTarget, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(STATUS)

    show_status(target, Output(as_json=True))

    assert Gateway.asked == [("/status", "Bearer secret")]
    assert json.loads(capsys.readouterr().out) == STATUS


def test_people_get_tables(target: HttpTarget, capsys: pytest.CaptureFixture[str]) -> None:
    answer(STATUS | {"stages": [STAGE | {"active": False, "loaded_fraction": 0.25}]})

    show_status(target, Output(as_json=False))

    shown = capsys.readouterr().out
    assert "ready, plan 3" in shown
    assert "[0, 5)" in shown
    assert "loading 25%" in shown
    assert "2.0 KiB" in shown


def test_people_also_see_the_training_runs_of_this_machine(
    target: HttpTarget, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(STATUS)
    run = TrainingState(
        name="chats", pid=1, output="/runs/chats", started_unix_s=1.0, updated_unix_s=2.0,
        phase="running", step=12, num_steps=40, loss=1.25, eta_s=61.0,
    )  # fmt: skip
    write_training(run)

    show_status(target, Output(as_json=False))
    shown = capsys.readouterr().out
    show_status(target, Output(as_json=True))

    assert "chats gone 12/40 1.2500" in " ".join(shown.split())
    assert json.loads(capsys.readouterr().out) == STATUS


def test_a_loading_deployment_is_shown_and_reported_as_not_ready(
    target: HttpTarget, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(STATUS | {"ready": False, "reason": "loading", "progress": 0.5})

    with pytest.raises(NotReadyError, match=r"is not ready: loading .50% loaded."):
        show_status(target, Output(as_json=True))
    assert json.loads(capsys.readouterr().out)["ready"] is False


@pytest.mark.parametrize(
    ("code", "error"),
    [(401, UnauthorizedError), (403, UnauthorizedError), (503, NotReadyError), (500, RuntimeError)],
)
def test_refusals_have_their_own_errors(
    target: HttpTarget, code: int, error: type[Exception]
) -> None:
    answer({"error": "no"}, code)

    with pytest.raises(error, match=str(code)):
        fetch_json(target, "/status")


def test_an_answer_that_is_no_object_is_refused(target: HttpTarget) -> None:
    answer([1])
    with pytest.raises(RuntimeError, match="answered list, not an object"):
        fetch_json(target, "/status")
    Gateway.answer = (200, b"<html>")
    with pytest.raises(RuntimeError, match="gave no JSON"):
        fetch_json(target, "/status")


def test_a_dead_address_is_reported_as_not_running(target: HttpTarget) -> None:
    with pytest.raises(NotRunningError, match=r"nothing answers at http://127\.0\.0\.1:1 "):
        fetch_json(HttpTarget(url="http://127.0.0.1:1", token=""), "/status")
