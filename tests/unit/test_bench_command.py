from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from cluster.cli import app
from placement.sharding.traces import ExpertTrace

SMALL = ("--steps", "60", "--layers", "1", "--experts", "16", "--top-k", "2", "--tokens", "64")


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ("bench", "experts", *arguments))


def test_a_made_up_trace_is_replayed_three_ways_and_called_simulated() -> None:
    result = bench("--trace", "swap", *SMALL, "--window", "32")

    assert result.exit_code == 0, result.stderr
    assert "swap, prefill: simulated" in result.stdout
    for policy in ("none", "eplb", "motley"):
        assert policy in result.stdout
    assert "1000 and 3000 steps" in result.stdout


def test_a_saved_trace_gives_the_same_figures(tmp_path: Path) -> None:
    file = tmp_path / "trace.npz"

    made = json.loads(bench("--trace", "device-loss", *SMALL, "--save", str(file), "--json").stdout)
    read = json.loads(bench("--trace", str(file), "--json").stdout)

    assert made == read
    assert made["kind"] == "simulated"
    assert made["trace"]["losses"] == [[30, 7]]
    assert {policy["policy"] for policy in made["policies"]} == {"none", "eplb", "motley"}


def test_a_recorded_decode_trace_is_replayed(tmp_path: Path) -> None:
    rows = np.eye(8, dtype=np.int64)[:, None, :].repeat(2, axis=1)
    trace = ExpertTrace(name="mine", phase="decode", top_k=1, rows_SLE=rows)
    (tmp_path / "mine").write_bytes(trace.to_bytes())

    result = bench("--trace", str(tmp_path / "mine"), "--rows-per-s", "2,1", "--spare-slots", "0")

    assert result.exit_code == 0, result.stderr
    assert "mine, decode: simulated" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--trace", "calm"), 2, "no such file; made-up traces are called stationary, drift"),
        (("--trace", "swap", "--rows-per-s", "fast"), 2, "write one number for each device"),
        (("--trace", "swap", "--rows-per-s", "1,-1", *SMALL), 2, "rows_per_s (-1.0)"),
        (("--trace", "swap", "--top-k", "9", "--experts", "8"), 2, "top_k (9) must be from 1"),
        (("--trace", "swap", "--copy-rate", "fast", *SMALL), 2, "'fast' is not a rate"),
        (
            ("--trace", "device-loss", *SMALL, "--rows-per-s", "2,1", "--spare-slots", "0"),
            3,
            "1 expert devices offer 11 slots a layer",
        ),
    ],
)
def test_what_cannot_be_replayed_says_why(
    arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = bench(*arguments)

    assert result.exit_code == code
    assert message in result.stderr
    assert result.stdout == ""


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")

    result = bench("--trace", str(tmp_path / "notes.txt"))

    assert result.exit_code == 2
    assert "notes.txt: this is no expert trace" in result.stderr
