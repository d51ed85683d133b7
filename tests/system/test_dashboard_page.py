"""The dashboard in a real browser, before a real gateway whose deployment is made up."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import tokenizers
from chromium import NAMES, Browser, Page, browser, find_chromium
from dashboard_backend import DEVICES, HomeLab, busy_controller, serving_plan, sharded_experts
from tokenizers import models

from cluster.gateway.server import GatewayHandle, serve
from cluster.gateway.settings import GatewaySettings
from cluster.gateway.tokenizer import Tokenizer
from cluster.trainstate import TrainingState, write_training

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(
        CHROMIUM is None, reason=f"no browser here: install one of {', '.join(NAMES)}"
    ),
]
TOKEN = "correct-horse-battery"
HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=2</script>'
SERVING = "document.querySelector('#state').textContent === 'serving'"
BANNER = "!document.querySelector('#banner').hidden"
RATES = "/[0-9] %/.test(document.querySelector('#stages td:nth-child(4)')?.textContent)"


def now_unix_s() -> float:
    return datetime.now(UTC).timestamp()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTLEY_HOME", str(tmp_path))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Browser, None]:
    assert CHROMIUM is not None
    async with browser(CHROMIUM, tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def page(chromium: Browser) -> AsyncGenerator[Page, None]:
    async with chromium.page() as opened:
        yield opened


@asynccontextmanager
async def gateway(lab: HomeLab, port: int = 0) -> AsyncIterator[GatewayHandle]:
    raw = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "<eos>": 3}, "a"))
    tokenizer = Tokenizer(raw, render_chat=lambda messages, variables: "a", eos_token_ids=(3,))
    settings = GatewaySettings(http_port=port, grpc_port=0)
    handle = await serve(lab, tokenizer, settings, TOKEN)
    try:
        yield handle
    finally:
        await handle.close(0)


def train(name: str = "support-chats", **changes: Any) -> None:
    """Leave the file of a run that ended after a curve."""
    losses = tuple((step, 1.2 + 2.2 / (1 + step / 40)) for step in range(0, 400, 4))
    run = TrainingState(
        name=name, pid=os.getpid(), output=f"/runs/{name}", started_unix_s=now_unix_s(),
        updated_unix_s=now_unix_s(), phase="finished", step=400, num_steps=400, loss=1.4012,
        losses=losses, held_out=((100, 2.1), (200, 1.8), (300, 1.6)), tokens_per_s=1834.0,
        idle_fractions={"rtx4090": 0.04, "rtx3060": 0.07},
    )  # fmt: skip
    write_training(replace(run, **changes))


async def test_a_link_shows_everything_and_asks_no_other_machine(page: Page) -> None:
    lab = HomeLab(controller=busy_controller(now_unix_s()))
    train()
    async with gateway(lab) as running:
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx.AsyncClient(base_url=running.http_url, headers=headers) as client:
            answer = await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
            assert answer.status_code == 200, answer.text
        await page.go(f"{running.http_url}/#token={TOKEN}")
        await page.until(SERVING)
        await page.until(RATES)

        assert await page.evaluate("location.href") == f"{running.http_url}/"
        assert await page.text("#model") == "Qwen3-8B"
        assert "adapter support-lora" in await page.text("#about")
        await check_stages(page)
        lanes, moves, runs = [
            await page.text(f"#{part}") for part in ("lanes", "controller", "runs")
        ]
        assert "412 / 640" in lanes
        assert "trial" in moves
        assert "rtx3060 runs 1.9 times slower than planned" in moves
        assert "rtx3060 is 1.9 times slower +31 % +28 % 46 ms" in moves
        assert "+4.0 % \N{MINUS SIGN}1.2 % 31 ms" in moves
        assert "rolled back 14 min" in moves
        assert "support-chats finished" in runs
        assert "loss 1.4012 held out 1.6000 1,834 tokens/s" in runs
        assert "Answered 1 " in await page.text("#figures")
        for url in page.requests:
            assert url.startswith((f"{running.http_url}/", "data:image/svg+xml")), url
        assert not any(TOKEN in url for url in page.requests)
        assert page.errors == []


async def check_stages(page: Page) -> None:
    """Layers in proportion, predicted beside measured, and what goes over the links."""
    plan = serving_plan()
    for stage in plan.stages:
        row = f"#stages tbody tr:nth-child({stage.index + 1})"
        text = await page.text(row)
        assert stage.device_id in text
        assert f"{100 * stage.step_s / plan.period_s:.0f} %" in text
        assert f"{1000 * stage.step_s:.3g} ms" in text
        grown = f"#layers > div:nth-child({stage.index + 1})"
        width = await page.evaluate(f"document.querySelector({grown!r}).style.flexGrow")
        assert int(width) == stage.num_layers
    measured = await page.text("#stages tbody tr:nth-child(1) td:nth-child(4)")
    assert 60 < float(measured.removesuffix(" %")) < 100
    await page.evaluate("document.querySelector('summary').click()")
    links = await page.text("#links tbody")
    for ends in ("lanes rtx4090", "rtx4090 rtx3060", "rtx3060 m2-laptop", "m2-laptop lanes"):
        assert f"{ends} " in links
    assert links.count("KiB/s") == 4
    assert "KiB/s" in await page.evaluate("document.querySelector('#edges').textContent")
    assert "old-phone stays out: " in await page.text("#left-out")


PIXELS = """(() => {
    const c = document.querySelector('#heat');
    const all = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
    const at = (x, y) => [...all.slice(4 * (y * c.width + x), 4 * (y * c.width + x) + 4)].join(' ');
    return [c.width, c.height, at(9 * 12 + 5, 4 * 12 + 5), at(5, 5), at(9 * 12 + 1, 4 * 12 + 5)];
})()"""
"""Of the map: its size, and a dot of the hot expert, of a cool one and of the frame."""


async def test_experts_are_a_map_of_heat_where_they_are_sharded(page: Page) -> None:
    controller = busy_controller(now_unix_s())
    lab = HomeLab(controller=controller)
    async with gateway(lab) as running:
        await page.go(f"{running.http_url}/#token={TOKEN}")
        await page.until(SERVING)
        assert await page.evaluate("document.querySelector('#experts-card').hidden")

        lab.controller = controller | {"experts": sharded_experts(now_unix_s())}
        await page.until("!document.querySelector('#experts-card').hidden")
        shown = await page.text("#experts-card")
        assert "moving map 7 rtx4090 holds 200" in shown
        assert "the busiest is expert 9 of layer 12 with 6.2 times the mean" in shown
        assert "on 3 devices" in shown
        assert "m2-laptop was lost; its experts were served again after 0.21 s" in shown
        assert "2 expert 9 is hot" in await page.text("#maps tbody tr:nth-child(1)")
        # Twelve rows of 32 cells, twelve dots wide each.
        width, height, hot, cool, framed = await page.evaluate(PIXELS)
        assert (width, height) == (32 * 12, 12 * 12)
        assert len({hot, cool, framed}) == 3
        assert page.errors == []


async def test_a_reload_needs_no_new_link(page: Page) -> None:
    async with gateway(HomeLab()) as running:
        await page.go(f"{running.http_url}/#token={TOKEN}")
        await page.until(SERVING)
        await page.reload()
        await page.until(SERVING)

        assert page.errors == []


async def test_a_wrong_token_is_said_and_another_can_be_typed(page: Page) -> None:
    async with gateway(HomeLab()) as running:
        await page.go(f"{running.http_url}/#token=not-this-one")
        await page.until(BANNER)

        assert await page.text("#banner") == "The gateway refused the key."
        assert await page.evaluate("document.querySelector('#main').hidden")
        assert await page.evaluate("document.activeElement.id") == "token"
        await page.write(TOKEN)
        await page.press("Enter")
        await page.until(SERVING)
        assert not await page.evaluate(BANNER)
        assert await page.evaluate("document.querySelector('#ask').hidden")


async def test_without_a_token_nothing_is_asked_of_the_gateway(page: Page) -> None:
    async with gateway(HomeLab()) as running:
        await page.go(f"{running.http_url}/")
        await page.until("document.activeElement.id === 'token'")

        assert not await page.evaluate(BANNER)
        assert not any("dashboard.json" in url for url in page.requests)
        assert page.errors == []


async def test_a_restart_of_the_gateway_is_said_and_survived(page: Page) -> None:
    lab = HomeLab()
    async with gateway(lab) as running:
        await page.go(f"{running.http_url}/#token={TOKEN}")
        await page.until(SERVING)
    await page.until(BANNER)
    assert "The gateway cannot be reached." in await page.text("#banner")
    assert await page.evaluate("document.querySelector('#main').classList.contains('stale')")
    assert await page.text("#state") == "away"
    assert "rtx4090" in await page.text("#stages")

    async with gateway(lab, running.http_port):
        await page.until(f"!({BANNER}) && {SERVING}")
        assert not await page.evaluate(
            "document.querySelector('#main').classList.contains('stale')"
        )


async def test_names_from_the_server_are_text_and_never_markup(page: Page) -> None:
    ids = (HOSTILE, f'"{HOSTILE}', f"' {HOSTILE}")
    controller = busy_controller(now_unix_s(), ids)
    for move in controller["moves"]:
        move["reason"] = move["outcome"] = HOSTILE
    controller["phase"] = controller["reason"] = HOSTILE
    experts = sharded_experts(now_unix_s(), ids)
    experts["reason"] = experts["changes"][0]["reason"] = HOSTILE
    controller["experts"] = experts
    train(HOSTILE, reason=HOSTILE, idle_fractions={HOSTILE: 0.5})
    lab = HomeLab(serving_plan(ids, HOSTILE), controller=controller)
    async with gateway(lab) as running:
        await page.go(f"{running.http_url}/#token={TOKEN}")
        await page.until(SERVING)
        await page.until(RATES)

        for part in ("#model", "#stages", "#nodes", "#controller", "#runs", "#experts", "#maps"):
            assert HOSTILE in await page.text(part)
        assert await page.evaluate("document.querySelectorAll('img, main script').length") == 0
        assert await page.evaluate("window.hacked") is None
        assert page.errors == []


async def test_a_deployment_that_loads_says_how_far_it_is(page: Page) -> None:
    lab = HomeLab()
    lab.is_ready = False
    async with gateway(lab) as running:
        await page.go(f"{running.http_url}/#token={TOKEN}")
        await page.until("document.querySelector('#state').textContent === 'loading 40 %'")

        assert "stages are loading" in await page.text("#about")
        assert "no controller runs" in await page.text("#controller")
        assert await page.text("#runs") == "No training run on this machine."
        lab.is_ready = True
        await page.until(SERVING)


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (820, "light"), (1400, "dark")])
async def test_it_fits_any_screen_and_everything_has_a_name(
    page: Page, width: int, scheme: str
) -> None:
    await page.send(
        "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1,
        mobile=False,
    )  # fmt: skip
    await page.send(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
    )
    train()
    controller = busy_controller(now_unix_s()) | {"experts": sharded_experts(now_unix_s())}
    async with gateway(HomeLab(controller=controller)) as running:
        await page.go(f"{running.http_url}/#token={TOKEN}")
        await page.until(SERVING)

        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        nameless = (
            "[...document.querySelectorAll('section, [role], article, table')].filter(e => "
            "!e.getAttribute('aria-label') && !e.getAttribute('aria-labelledby') && "
            "!['listitem', 'status'].includes(e.getAttribute('role'))).length"
        )
        assert await page.evaluate(nameless) == 0
        assert await page.evaluate("document.documentElement.lang") == "en"
        assert set(DEVICES) <= set(
            await page.evaluate(
                "[...document.querySelectorAll('.device h3')].map(e => e.innerText)"
            )
        )
