from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest

from cluster.commands.dashboard import page_link, show_dashboard
from cluster.commands.errors import UnauthorizedError
from cluster.commands.output import Output
from cluster.commands.status import HttpTarget

if TYPE_CHECKING:
    from cluster.gateway.server import GatewayHandle

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTLEY_HOME", str(tmp_path))


def read(file: Path) -> tuple[str, int]:
    return file.read_text(encoding="utf-8"), stat.S_IMODE(file.stat().st_mode)


@pytest.mark.parametrize(
    ("url", "link"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/#token=a%2Bb"),
        ("https://lab.example/motley/", "https://lab.example/motley/#token=a%2Bb"),
        ("http://0.0.0.0:8000", "http://127.0.0.1:8000/#token=a%2Bb"),
        ("http://[::]:8000", "http://[::1]:8000/#token=a%2Bb"),
    ],
)
async def test_the_link_holds_the_token_where_no_server_sees_it(url: str, link: str) -> None:
    assert page_link(HttpTarget(url=url, token="a+b")) == link


async def test_the_address_is_printed_once_the_gateway_took_the_token(
    gateway: GatewayHandle, token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = HttpTarget(url=gateway.http_url, token=token)

    await asyncio.to_thread(show_dashboard, target, Output(as_json=True), open_it=False)

    assert json.loads(capsys.readouterr().out) == {"url": f"{gateway.http_url}/#token={token}"}
    with pytest.raises(UnauthorizedError):
        await asyncio.to_thread(
            show_dashboard,
            HttpTarget(url=gateway.http_url, token="another-token"),
            Output(as_json=True),
            open_it=False,
        )


async def test_a_browser_is_led_there_without_the_token_among_its_arguments(
    gateway: GatewayHandle, token: str, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []

    def refuse(url: str) -> bool:
        opened.append(url)
        return False

    await asyncio.to_thread(
        show_dashboard,
        HttpTarget(url=gateway.http_url, token=token),
        Output(as_json=False),
        open_it=True,
        open_url=refuse,
    )

    [address] = opened
    assert token not in address
    text, mode = read(Path(url2pathname(urlsplit(address).path)))
    assert f"0; url={gateway.http_url}/#token={token}" in text
    assert mode == 0o600
    out, err = capsys.readouterr()
    assert out.strip() == f"{gateway.http_url}/#token={token}"
    assert "open the address above" in err
