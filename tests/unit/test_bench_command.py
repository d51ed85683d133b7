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
        (("--trace", "swap", "--rows-per-s", "1,1e308", *SMALL), 2, "must be from 0.001 to 1e+12"),
        (("--trace", "swap", "--rows-per-s", "1e-300", *SMALL), 2, "rows_per_s (1e-300) must be"),
        (("--trace", "swap", "--rows-per-s", "nan", *SMALL), 2, "rows_per_s (nan) must be"),
        (("--trace", "swap", "--zipf", "1e308", *SMALL), 2, "zipf (1e+308) must be from 0 to 4"),
        (("--trace", "swap", "--spare-slots", "17", *SMALL), 2, "from 0 to the trace's 16 experts"),
        (("--trace", "swap", "--zipf", "nan", *SMALL), 2, "zipf (nan) must be from 0 to 4"),
        (
            ("--trace", "device-loss", *SMALL, "--rows-per-s", "1"),
            2,
            "trace device-loss loses 1 devices and the fleet has 1: none is left",
        ),
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


def traced(file: Path, name: str = "mine", losses: tuple[tuple[int, int], ...] = ()) -> str:
    rows = np.eye(8, dtype=np.int64)[:, None, :]
    trace = ExpertTrace(name=name, phase="decode", top_k=1, rows_SLE=rows, losses=losses)
    file.write_bytes(trace.to_bytes())
    return str(file)


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        (b"hello", "5 bytes cannot be unpacked: File is not a zip file"),
        (None, "it is a folder; give 1 file"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, data: bytes | None, fact: str) -> None:
    file = tmp_path / "[b]no\x1btes"
    file.mkdir() if data is None else file.write_bytes(data)

    result = bench("--trace", str(file), "--json")

    assert result.exit_code == 2
    assert result.stderr == f"motley: {tmp_path}/[b]no\ufffdtes is no expert trace: {fact}\n"
    assert json.loads(result.stdout)["error"]["exit_code"] == 2


def test_a_file_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**31 + 1)

    result = bench("--trace", file.name)

    assert result.exit_code == 2
    assert "is no expert trace: it has 2147483649 bytes; at most 2147483648" in result.stderr


def test_a_trace_that_loses_every_device_is_refused(tmp_path: Path) -> None:
    file = traced(tmp_path / "mine", losses=((1, 0), (2, 1)))

    result = bench("--trace", file, "--rows-per-s", "1,1", "--spare-slots", "8")

    assert result.exit_code == 2
    assert "trace mine loses 2 devices and the fleet has 2: none is left" in result.stderr


@pytest.mark.parametrize("name", ["[bold]x[/bold]", "[/]", "a :warning: b\\"])
def test_a_name_is_shown_as_it_is(tmp_path: Path, name: str) -> None:
    result = bench("--trace", traced(tmp_path / "mine", name), "--rows-per-s", "2,1")

    assert result.exit_code == 0, result.stderr
    assert f"{name}, decode: simulated" in result.stdout


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("missing/trace", "No such file or directory"),
        ("file/trace", "Not a directory"),
        (".", "Is a directory"),
        ("/proc/trace", "No such file or directory"),  # no one may write here
    ],
)
def test_a_trace_that_cannot_be_saved_is_not_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, why: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("cluster.commands.expert_bench.show_replay", None)

    result = bench("--trace", "swap", *SMALL, "--save", str(tmp_path / where))

    assert result.exit_code == 2
    assert f"--save {tmp_path / where}: {why}; name a file in a folder" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_what_is_there_stays_when_the_replay_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("mine", encoding="utf-8")
    (tmp_path / "link").symlink_to("new")
    for name in ("old", "link", "other"):
        refused = bench(
            "--trace", "swap", *SMALL, "--save", str(tmp_path / name), "--copy-rate", "fast"
        )
        assert refused.exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "old"]
    assert (tmp_path / "old").read_text(encoding="utf-8") == "mine"
