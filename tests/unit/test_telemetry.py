"""Metric names, their values, and the shape of log lines."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from actors.engine.requests import Request, RequestOutput
from cluster.backend import ControllerStatus
from cluster.telemetry import GatewayMetrics, configure_logging, software_version

if TYPE_CHECKING:
    from tests.unit.conftest import FakeBackend


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


async def rendered(metrics: GatewayMetrics, backend: FakeBackend) -> list[str]:
    text = metrics.render(await backend.status(), backend.model_info()).decode()
    return text.splitlines()


async def test_the_deployment_is_shown_as_it_is_at_the_scrape(backend: FakeBackend) -> None:
    metrics = GatewayMetrics()
    lines = await rendered(metrics, backend)

    for line in (
        "motley_ready 1.0",
        "motley_plan_epoch 3.0",
        'motley_stage_busy_seconds_total{device="gpu0",node="a",stage="0"} 1.5',
        'motley_stage_late_seconds_total{device="cpu0",node="b",stage="1"} 0.25',
        'motley_stage_active{device="cpu0",node="b",stage="1"} 1.0',
        'motley_link_bytes_total{link="gpu0->cpu0"} 640.0',
        'motley_lane_running_requests{lane="0"} 2.0',
        'motley_lane_waiting_requests{lane="0"} 1.0',
        'motley_lane_kv_blocks_in_use{lane="0"} 5.0',
        'motley_lane_kv_blocks{lane="0"} 40.0',
        'motley_lane_preemptions_total{lane="0"} 3.0',
        'motley_lane_prefix_hit_tokens_total{lane="0"} 96.0',
        f'motley_build_info{{model="org/tiny-model",version="{software_version()}"}} 1.0',
    ):
        assert line in lines
    backend.is_ready = False
    assert "motley_ready 0.0" in await rendered(metrics, backend)


async def test_a_controller_is_shown_where_there_is_one(backend: FakeBackend) -> None:
    metrics, status = GatewayMetrics(), await backend.status()
    assert not [line for line in await rendered(metrics, backend) if "motley_controller" in line]
    controller = ControllerStatus(
        phase="settling", epoch=4, moves={"kept": 2, "undone": 1}, num_pauses=3, pause_s=0.25,
        last_pause_s=0.0625,
    )  # fmt: skip

    text = metrics.render(replace(status, controller=controller), backend.model_info()).decode()

    for line in (
        "motley_controller_epoch 4.0",
        'motley_controller_phase{phase="settling"} 1.0',
        'motley_controller_moves_total{outcome="kept"} 2.0',
        'motley_controller_moves_total{outcome="undone"} 1.0',
        "motley_controller_pause_seconds_count 3.0",
        "motley_controller_pause_seconds_sum 0.25",
        "motley_controller_last_pause_seconds 0.0625",
    ):
        assert line in text.splitlines()


async def test_every_metric_carries_the_prefix(backend: FakeBackend) -> None:
    lines = await rendered(GatewayMetrics(), backend)
    names = {line.split()[2] for line in lines if line.startswith("# TYPE")}

    assert names
    assert all(name.startswith("motley_") for name in names)


async def test_latencies_are_those_of_the_clock(backend: FakeBackend) -> None:
    now_s = 100.0
    metrics = GatewayMetrics()
    timer = metrics.track(Request(id="a", prompt=(1, 2, 3)), lambda: now_s)
    now_s = 100.5
    timer.saw(RequestOutput(id="a", tokens=(1,)))
    now_s = 100.75
    timer.saw(RequestOutput(id="a", tokens=(2, 3)))
    timer.ended("completed")
    lines = await rendered(metrics, backend)

    assert "motley_time_to_first_token_seconds_sum 0.5" in lines
    assert "motley_inter_token_latency_seconds_sum 0.25" in lines
    assert "motley_inter_token_latency_seconds_count 2.0" in lines
    assert "motley_request_duration_seconds_sum 0.75" in lines
    assert "motley_prompt_tokens_total 3.0" in lines
    assert "motley_generated_tokens_total 3.0" in lines


async def test_two_gateways_of_one_process_do_not_share_counts(backend: FakeBackend) -> None:
    first, second = GatewayMetrics(), GatewayMetrics()
    first.count("failed")

    assert 'motley_requests_total{outcome="failed"} 1.0' in await rendered(first, backend)
    assert not [line for line in await rendered(second, backend) if 'outcome="failed"' in line]


@pytest.mark.usefixtures("restored_logging")
def test_json_log_lines_parse(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", as_json=True)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("motley.test").exception("request %s failed", "r1")

    [line] = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert (entry["level"], entry["message"]) == ("error", "request r1 failed")
    assert "two\nlines" in entry["exception"]
    assert entry["time"].endswith("+00:00")


@pytest.mark.usefixtures("restored_logging")
def test_plain_logs_leave_chatty_libraries_out(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("INFO")
    logging.getLogger("motley.test").info("kept")
    logging.getLogger("uvicorn.error").info("dropped")

    assert [line.split()[-1] for line in capsys.readouterr().err.splitlines()] == ["kept"]
