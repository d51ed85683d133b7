"""A real browser without a window, driven over its DevTools protocol.

It resolves no name and uses no proxy: what a page asks of any other machine fails, and is noted.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DEADLINE_S = 30.0
_POLL_S = 0.05
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # pages of our own only; containers seldom allow one
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-port=0",
)


def find_chromium() -> str | None:
    """Return a browser's program; None: there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab: what it says, what it asks for, and what goes wrong in it."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.requests: list[str] = []
        """The address of everything it asked for."""
        self.errors: list[str] = []
        """Errors and warnings of its console, uncaught exceptions, refusals of its policy."""
        self._socket = socket
        self._has_loaded = asyncio.Event()
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Give a command of the protocol and return its result."""
        number = next(self._ids)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        await self._socket.send_json({"id": number, "method": method, "params": params})
        async with asyncio.timeout(DEADLINE_S):
            return await answer

    async def go(self, url: str) -> None:
        """Load an address, and return when that has been done."""
        await self._load("Page.navigate", url=url)

    async def reload(self) -> None:
        await self._load("Page.reload")

    async def _load(self, method: str, **params: Any) -> None:
        self._has_loaded.clear()
        await self.send(method, **params)
        async with asyncio.timeout(DEADLINE_S):
            await self._has_loaded.wait()

    async def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = await self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until an expression holds."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not await self.evaluate(expression):  # noqa: ASYNC110  # pages push nothing
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            text = await self.text("body")
            raise AssertionError(f"never: {expression}\n{self.errors}\n{text}") from None

    async def text(self, selector: str) -> str:
        """Return the text of an element as it is seen, blanks folded."""
        found = await self.evaluate(f"document.querySelector({selector!r})?.innerText ?? ''")
        return " ".join(str(found).split())

    async def press(self, key: str) -> None:
        code = {"Enter": 13, "Tab": 9}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            await self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key,
                windowsVirtualKeyCode=code, **(text if kind == "keyDown" else {}),
            )  # fmt: skip

    async def write(self, text: str) -> None:
        """Type into whatever has the focus."""
        await self.send("Input.insertText", text=text)

    async def screenshot(self) -> bytes:
        """Return a PNG of the whole page."""
        answer = await self.send("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    async def listen(self) -> None:
        """Take what the browser says until the tab is closed."""
        async for message in self._socket:
            value = message.json()
            if "id" in value:
                self._settle(self._answers.pop(value["id"]), value)
            else:
                self._note(value["method"], value["params"])

    @staticmethod
    def _settle(answer: asyncio.Future[dict[str, Any]], value: dict[str, Any]) -> None:
        if answer.done():  # whoever asked has given up
            return
        if "error" in value:
            answer.set_exception(RuntimeError(value["error"]["message"]))
        else:
            answer.set_result(value["result"])

    def _note(self, method: str, params: dict[str, Any]) -> None:
        match method:
            case "Page.loadEventFired":
                self._has_loaded.set()
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.errors.append(str(params["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.errors.append(str(params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.errors.append(params["entry"]["text"])


class Browser:
    """A running browser."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    @asynccontextmanager
    async def page(self) -> AsyncIterator[Page]:
        """Open a tab, and close it at the end."""
        async with self._session.put(f"{self._url}/json/new?about:blank") as answer:
            target = await answer.json(content_type=None)
        async with self._session.ws_connect(
            target["webSocketDebuggerUrl"], max_msg_size=0
        ) as socket:
            page = Page(socket)
            listener = asyncio.create_task(page.listen())
            try:
                for domain in ("Page", "Runtime", "Network", "Log"):
                    await page.send(f"{domain}.enable")
                yield page
            finally:
                listener.cancel()
                await asyncio.gather(listener, return_exceptions=True)
        async with self._session.get(f"{self._url}/json/close/{target['id']}"):
            pass


@asynccontextmanager
async def browser(program: str, folder: Path) -> AsyncIterator[Browser]:
    """Run a browser that keeps everything in a folder of its own."""
    process = _start(program, folder)
    try:
        port = await _debugging_port(process, folder)
        async with aiohttp.ClientSession() as session:
            yield Browser(session, f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, DEADLINE_S)


def _start(program: str, folder: Path) -> subprocess.Popen[bytes]:
    command = [program, *_FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
    with (folder / "chromium.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


async def _debugging_port(process: subprocess.Popen[bytes], folder: Path) -> int:
    """Wait until the browser has written where it listens."""
    file = folder / "profile" / "DevToolsActivePort"
    async with asyncio.timeout(DEADLINE_S):
        while True:
            log = await asyncio.to_thread((folder / "chromium.log").read_text, errors="replace")
            assert process.poll() is None, f"the browser ended by itself: {log}"
            lines = await asyncio.to_thread(_lines, file)
            if len(lines) >= 2:
                return int(lines[0])
            await asyncio.sleep(_POLL_S)


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []
