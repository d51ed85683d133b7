"""Where a command's words go: results to stdout, everything else to stderr.

With `--json`, stdout carries JSON documents, one a line, and nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console, RenderableType

_FILE_COLUMNS = 120


class Output:
    """The two streams of one command."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._has_result = False
        # What others print later, to a `sys.stdout` that was replaced, is none of the result.
        self._stdout = sys.stdout
        self.errors = _console(sys.stderr)
        self._results = _console(sys.stdout)

    def result(self, value: Mapping[str, Any], *shown: RenderableType) -> None:
        """Write the command's result: `value` with --json, else what is to be shown of it."""
        self._has_result = True
        if self.as_json:
            self.line(value)
        else:
            for part in shown:
                self._results.print(part)

    def line(self, value: Mapping[str, Any]) -> None:
        """Write one JSON document."""
        self._stdout.write(json.dumps(value) + "\n")
        self._stdout.flush()

    def failure(self, value: Mapping[str, Any]) -> None:
        """Write why there is no result; after a result (which says it too) nothing is added."""
        if not self._has_result:
            self.line(value)

    def text(self, text: str) -> None:
        """Write a piece of streamed text as it is."""
        self._stdout.write(text)
        self._stdout.flush()

    def note(self, *parts: RenderableType) -> None:
        """Say something beside the result."""
        for part in parts:
            self.errors.print(part)


def _console(stream: TextIO) -> Console:
    # A file or a pipe has no width of its own; tables keep their lines whole there.
    width = None if stream.isatty() else _FILE_COLUMNS
    return Console(file=stream, width=width, highlight=False, soft_wrap=True)
