"""The page and its document over a real socket: who may have them, and what their headers say."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from cluster.trainstate import TrainingState, write_training

if TYPE_CHECKING:
    from cluster.gateway.server import GatewayHandle
    from tests.unit.conftest import FakeBackend

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTLEY_HOME", str(tmp_path))


async def test_the_page_is_for_everybody_and_its_document_for_those_with_a_token(
    gateway: GatewayHandle, http: httpx.AsyncClient
) -> None:
    async with httpx.AsyncClient(base_url=gateway.http_url) as stranger:
        page = await stranger.get("/")
        refused = await stranger.get("/dashboard.json")
        posted = await stranger.post("/")
    allowed = await http.get("/dashboard.json")

    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert refused.status_code == 401
    assert posted.status_code == 405
    assert allowed.status_code == 200
    assert allowed.headers["cache-control"] == "no-store"


async def test_the_page_holds_nothing_of_the_deployment(http: httpx.AsyncClient) -> None:
    page = (await http.get("/")).text

    for secret in ("tiny-model", "gpu0", "correct-horse"):
        assert secret not in page


async def test_the_policy_lets_the_pages_own_blocks_run_and_nothing_else(
    http: httpx.AsyncClient,
) -> None:
    response = await http.get("/")
    policy = dict(
        part.split(" ", 1) for part in response.headers["content-security-policy"].split("; ")
    )

    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    for tag in ("script", "style"):
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(b.encode()).digest()).decode() for b in blocks]
        assert policy[f"{tag}-src"] == " ".join(f"'sha256-{digest}'" for digest in digests)
    assert "unsafe" not in response.headers["content-security-policy"]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


async def test_the_page_is_whole_and_needs_nothing_from_elsewhere(http: httpx.AsyncClient) -> None:
    page = (await http.get("/")).text

    assert re.findall(r"<(?:script|link|img|iframe|style)[^>]*(?:src|href)=\"(?!data:)", page) == []
    assert re.findall(r"\son[a-z]+=|style=\"|@import|url\(|innerHTML|eval\(", page) == []
    assert set(re.findall(r"https?://[^\s'\"]+", page)) == {"http://www.w3.org/2000/svg"}


async def test_requests_and_tokens_are_the_gateways_own_counters(
    http: httpx.AsyncClient, backend: FakeBackend
) -> None:
    before = (await http.get("/dashboard.json")).json()["traffic"]
    body = {"model": "org/tiny-model", "prompt": "ab", "max_tokens": 3}
    await http.post("/v1/completions", json=body)
    after = (await http.get("/dashboard.json")).json()["traffic"]

    assert after["generated_tokens"] - before["generated_tokens"] == 3
    assert after["prompt_tokens"] - before["prompt_tokens"] == 2
    assert after["requests"]["completed"] - before["requests"].get("completed", 0) == 1


async def test_what_the_controller_and_training_runs_say_is_passed_on(
    http: httpx.AsyncClient, backend: FakeBackend, tmp_path: Path
) -> None:
    backend.controller = {"phase": "halted", "reason": "no device holds layer 3", "moves": []}
    run = TrainingState(
        name="chats", pid=1, output=str(tmp_path / "chats"), started_unix_s=1.0,
        updated_unix_s=2.0, num_steps=5, phase="finished",
    )  # fmt: skip
    write_training(run)

    shown = (await http.get("/dashboard.json")).json()

    assert shown["controller"]["phase"] == "halted"
    assert [told["name"] for told in shown["trainings"]] == ["chats"]


def _luminance(colour: str) -> float:
    """WCAG's relative luminance of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


async def test_text_and_bars_stand_out_in_the_light_and_in_the_dark(
    http: httpx.AsyncClient,
) -> None:
    page = (await http.get("/")).text
    schemes = re.findall(r":root \{(.*?)\n\}", page, re.DOTALL)

    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#\w{6});", scheme))
        for ground in ("page", "card", "soft"):
            for text in ("text", "dim", "good", "warn", "bad"):
                assert _contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
            for index in range(8):
                assert _contrast(colours[f"s{index}"], colours[ground]) >= 3.0, (index, ground)
