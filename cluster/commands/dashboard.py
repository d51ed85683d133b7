"""`motley dashboard`: the address of a deployment's page, with the token that lets one in."""

from __future__ import annotations

import html
import webbrowser
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, urlsplit

from rich.text import Text

from cluster.commands.output import Output
from cluster.commands.status import HttpTarget, fetch_json
from cluster.runstate import run_folder, write_private

_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}
"""Listening on every address is no address to go to."""


def show_dashboard(
    target: HttpTarget,
    output: Output,
    *,
    open_it: bool,
    open_url: Callable[[str], bool] = webbrowser.open,
) -> None:
    """Write the page's address once the gateway has taken the token, and open it if asked to.

    Raises:
        NotRunningError: Nothing answers there.
        UnauthorizedError: The token is wrong.
    """
    fetch_json(target, "/dashboard.json")
    link = page_link(target)
    output.result({"url": link}, Text(link))
    if open_it and not open_url(_private_redirect(link).as_uri()):
        output.note(Text("no browser could be started here; open the address above"))


def page_link(target: HttpTarget) -> str:
    """Return the page's address; what follows the # never leaves the browser."""
    parts = urlsplit(target.url)
    host, colon, port = parts.netloc.rpartition(":")
    if host in _ANY_ADDRESS:
        parts = parts._replace(netloc=f"{_ANY_ADDRESS[host]}{colon}{port}")
    path = parts.path.rstrip("/") + "/"
    return parts._replace(path=path, query="", fragment=f"token={quote(target.token)}").geturl()


def _private_redirect(link: str) -> Path:
    """Write a file that leads to the page: a browser's arguments are for everybody to read."""
    path = run_folder() / "dashboard.html"
    target = html.escape(link, quote=True)
    write_private(
        path,
        '<!doctype html><meta charset="utf-8"><title>Motley</title>'
        f'<meta http-equiv="refresh" content="0; url={target}"><a href="{target}">Motley</a>',
    )
    return path
