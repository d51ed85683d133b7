"""`motley train`: check the settings, run, and show, plot and trace what the run tells."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError
from rich.text import Text

from cluster.commands.output import Output
from cluster.commands.settings import chosen_config
from cluster.commands.train_state import tell_others
from cluster.config import ConfigError, MotleyConfig
from cluster.training.checkpoints import RunFolder
from cluster.training.documents import DataError
from cluster.training.events import TrainingEvent, TrainingFinished
from cluster.training.report import report_to
from cluster.training.tracing import SlotTrace
from cluster.training_settings import DataSettings, TrainingSettings

CURVES = "tensorboard"
"""Name, in the run's folder, of the folder of event files."""

_EXAMPLE = """\
training:
  data: {train: [chats.jsonl]}
  output: runs/my-model"""

OnEvent = Callable[[TrainingEvent], None]


class Runner(Protocol):
    """Trains, reports, blocks until done or told to stop, and saves a checkpoint."""

    def __call__(
        self, config: MotleyConfig, on_event: OnEvent, *, resume: bool, trace: bool
    ) -> None: ...


class Listener(Protocol):
    """Is told every event."""

    def handle(self, event: TrainingEvent) -> None: ...


ScalarsIn = Callable[[Path, Callable[[str], None]], AbstractContextManager[Listener]]
"""Opens a folder of curves; the second argument says what goes wrong with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """What the command line says beside the settings' file."""

    steps: int | None = None
    output: Path | None = None
    resume: bool = False
    trace: Path | None = None


def training_config(path: Path | None, model: str | None, options: TrainOptions) -> MotleyConfig:
    """Return the settings of a run with every path absolute.

    Data is looked up in the working directory, then beside the configuration file.

    Raises:
        ConfigError: Keys or files are missing, or the output folder holds another run.
    """
    config, source = chosen_config(path, model)
    settings = config.training
    output = options.output or settings.output
    missing = [
        f"training.{key}"
        for key, value in (("data", settings.data), ("output", output))
        if value is None
    ]
    if settings.data is None or output is None:
        raise ConfigError(
            f"{source}: {' and '.join(missing)} not set; `motley train` needs both, as in\n"
            f"{_EXAMPLE}"
        )
    output = output.expanduser().absolute()
    _check_output(output, resume=options.resume)
    _check_trace(options.trace)
    changed = {
        "data": _found(settings.data, source, None if path is None else path.resolve().parent),
        "output": output,
        "steps": options.steps or settings.steps,
    }
    return config.model_copy(update={"training": _revised(settings, changed)})


def train(
    config: MotleyConfig,
    options: TrainOptions,
    output: Output,
    runner: Runner,
    scalars_in: ScalarsIn,
) -> bool:
    """Train, and return whether every step was done; a run that was told to stop saved first.

    Raises:
        ConfigError: The data cannot be learnt from; beside what `runner` raises.
    """
    assert config.training.output is not None

    def note(text: str) -> None:
        output.note(Text(text))

    trace = None if options.trace is None else SlotTrace()
    finished: list[TrainingFinished] = []
    with ExitStack() as stack:
        if trace is not None and options.trace is not None:
            stack.callback(_write_trace, trace, options.trace, note)
        report = stack.enter_context(
            report_to(output.errors, output.line if output.as_json else None)
        )
        scalars = stack.enter_context(scalars_in(config.training.output / CURVES, note))
        teller = stack.enter_context(
            tell_others(config.training.output, config.training.steps, note)
        )
        listeners: list[Listener] = [report, scalars, teller, *([] if trace is None else [trace])]

        def on_event(event: TrainingEvent) -> None:
            if isinstance(event, TrainingFinished):
                finished.append(event)
            for listener in listeners:
                listener.handle(event)

        try:
            runner(config, on_event, resume=options.resume, trace=trace is not None)
        except DataError as error:
            raise ConfigError(f"training.data: {error}") from error
    is_done = bool(finished) and finished[-1].step >= config.training.steps
    if not is_done:
        has_saved = bool(finished) and finished[-1].path is not None
        note("interrupted; go on with --resume" if has_saved else "interrupted")
    return is_done


def _check_output(folder: Path, *, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"training.output: {folder} is a file; name a folder")
    newest = RunFolder(folder, keep=1).latest()
    if resume and newest is None:
        raise ConfigError(
            f"--resume: {folder} holds no checkpoint to go on from; start without --resume, or "
            f"name the run's folder with --output"
        )
    if not resume and newest is not None:
        raise ConfigError(
            f"training.output: {folder} holds a run already (newest: {newest.name}); go on with it "
            f"by --resume, or name another folder with --output"
        )


def _check_trace(file: Path | None) -> None:
    if file is None:
        return
    if file.is_dir():
        raise ConfigError(f"--trace: {file} is a folder; name a file")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"--trace: no folder {file.absolute().parent} for {file.name}; make it")


def _found(data: DataSettings, source: str, beside: Path | None) -> DataSettings:
    def found(key: str) -> tuple[Path, ...]:
        return tuple(
            _existing(written, beside, f"{source}: training.data.{key}[{index}]")
            for index, written in enumerate(getattr(data, key))
        )

    return data.model_copy(update={"train": found("train"), "held_out": found("held_out")})


def _existing(written: Path, beside: Path | None, key: str) -> Path:
    folders = [Path.cwd()] if beside is None else [Path.cwd(), beside]
    tried = list(dict.fromkeys(folder / written.expanduser() for folder in folders))
    for candidate in tried:
        if candidate.exists():
            return candidate.resolve()
    places = ", ".join(map(str, tried))
    raise ConfigError(f"{key}: no file or folder {written} (tried {places})")


def _revised(settings: TrainingSettings, changed: dict[str, object]) -> TrainingSettings:
    """Return the settings with values replaced, validated again."""
    try:
        return TrainingSettings.model_validate(dict(settings) | changed)
    except ValidationError as error:
        reasons = [details["msg"].removeprefix("Value error, ") for details in error.errors()]
        raise ConfigError(f"command line: training: {'; '.join(reasons)}") from None


def _write_trace(trace: SlotTrace, path: Path, note: Callable[[str], None]) -> None:
    try:
        note(trace.write(path))
    except OSError as error:
        # Must not hide how the training itself ended.
        note(f"no trace: {error}")
