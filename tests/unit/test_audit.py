"""The audit log: whole lines, on the disk, private, and not to be filled by strangers."""

from __future__ import annotations

import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from stat import S_IMODE
from typing import Any

import pytest

from cluster.audit import AuditLog


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_an_act_is_one_line_with_who_what_when_from_where_and_how_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "audit.jsonl"
    log = AuditLog(path, deployment="tiny", now=lambda: datetime(2026, 1, 31, 12, tzinfo=UTC))

    log.record("drain", who="alice", source="10.0.0.7:5", outcome="done", node="b")
    log.close()

    assert lines(path) == [
        {
            "time": "2026-01-31T12:00:00.000+00:00",
            "deployment": "tiny",
            "act": "drain",
            "who": "alice",
            "source": "10.0.0.7:5",
            "outcome": "done",
            "node": "b",
        }
    ]
    assert S_IMODE(path.stat().st_mode) == 0o600


def test_it_is_on_the_disk_before_record_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    log = AuditLog(tmp_path / "audit.jsonl")

    log.record("publish", who="owner", source="here")

    assert len(synced) == 1


def test_two_logs_of_one_file_keep_each_others_lines_whole(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    logs = [AuditLog(path, deployment=str(number)) for number in range(2)]

    def write(log: AuditLog) -> None:
        for number in range(40):
            log.record("abort", who="x" * 200, source="y" * 200, number=number)

    threads = [threading.Thread(target=write, args=(log,)) for log in (*logs, *logs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(lines(path)) == 160


def test_a_text_is_one_line_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    AuditLog(path).record("authenticate", who="", source="x", what="GET /\n" + "a" * 5000)

    [entry] = lines(path)
    assert entry["what"].startswith("GET /\n")
    assert len(entry["what"]) == 303


def test_refusals_beyond_a_rate_are_counted_in_the_next_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    clock = Clock()
    log = AuditLog(path, monotonic_s=clock)

    def knock() -> None:
        if log.wants_refusal():
            log.record_refusal("authenticate", who="", source="10.0.0.9:1", what="GET /status")

    for _ in range(1000):
        knock()
    assert len(lines(path)) == 30
    clock.now_s = 2.0
    knock()
    knock()

    last = lines(path)[-1]
    assert len(lines(path)) == 31
    assert last["untold_before"] == 970
    assert last["outcome"] == "refused"


def test_a_file_that_cannot_be_written_is_named_with_its_setting(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"audit file .* cannot be written .*gateway.audit_file"):
        AuditLog(tmp_path)
