"""What a failure looks like: a line on stderr, an exit code, and JSON where that was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import typer
from rich.text import Text

from cluster.commands.errors import (
    ChecksFailedError,
    NotReadyError,
    RefusedError,
    UnauthorizedError,
)
from cluster.commands.output import Output
from cluster.config import ConfigError
from cluster.runstate import AmbiguousNameError, NotRunningError
from placement.errors import InfeasiblePlanError


class ExitCode(IntEnum):
    """What a command's exit status says."""

    OK = 0
    ERROR = 1
    USAGE = 2
    INFEASIBLE = 3
    NOT_RUNNING = 4
    NOT_READY = 5
    UNAUTHORIZED = 6
    INTERRUPTED = 130


@contextmanager
def reporting(output: Output) -> Iterator[None]:
    """Turn an expected failure into one line on stderr and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        output.note("interrupted")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except _EXPECTED as error:
        code = _exit_code(error)
        if output.as_json:
            output.failure({"error": {"message": str(error), "exit_code": int(code)}})
        output.note(Text(f"motley: {error}"))
        raise typer.Exit(code) from None


def _exit_code(error: BaseException) -> ExitCode:
    for kind, code in _CODE_OF_ERROR.items():
        if isinstance(error, kind):
            return code
    return ExitCode.ERROR


_CODE_OF_ERROR: dict[type[Exception], ExitCode] = {
    ConfigError: ExitCode.USAGE,
    AmbiguousNameError: ExitCode.USAGE,
    InfeasiblePlanError: ExitCode.INFEASIBLE,
    NotRunningError: ExitCode.NOT_RUNNING,
    NotReadyError: ExitCode.NOT_READY,
    UnauthorizedError: ExitCode.UNAUTHORIZED,
    RefusedError: ExitCode.USAGE,
    ChecksFailedError: ExitCode.ERROR,
}

_EXPECTED: tuple[type[Exception], ...] = (*_CODE_OF_ERROR, RuntimeError, OSError)
"""What a user can cause; anything else is a defect and keeps its traceback."""
