from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from training_events import (
    evaluated,
    finished,
    planned,
    saved,
    started,
    step_done,
    traced,
)
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.commands.output import Output
from cluster.commands.train import TrainOptions, train, training_config
from cluster.config import ConfigError, MotleyConfig
from cluster.training.documents import DataError
from cluster.training.events import TrainingEvent
from cluster.trainstate import training_states
from placement.errors import InfeasiblePlanError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "deploy" / "configs"
MODEL = CONFIGS.parent / "checkpoints" / "tiny-qwen3"
OnEvent = Callable[[TrainingEvent], None]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOTLEY_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_file(folder: Path, training: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(f"model: {MODEL}\ntraining: {training}\n", encoding="utf-8")
    return path


def ready(folder: Path, more: str = "") -> Path:
    """A job that can run: its data is there, and its output folder is not."""
    (folder / "chats.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    return config_file(folder, f"{{data: {{train: [chats.jsonl]}}, output: run, steps: 4{more}}}")


def holds_a_run(output: Path) -> None:
    (output / "step-000002" / "training").mkdir(parents=True)
    (output / "step-000002" / "training" / "state.json").touch()


class Curves:
    """Remembers what it was told, and that it was closed."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.events: list[TrainingEvent] = []
        self.is_closed = False

    def handle(self, event: TrainingEvent) -> None:
        self.events.append(event)

    @contextmanager
    def scalars_in(self, folder: Path, note: Callable[[str], None]) -> Iterator[Curves]:
        self.folder = folder
        try:
            yield self
        finally:
            self.is_closed = True


class FakeRun:
    """Stands in for the driver: reports `events`, then fails if it is to."""

    def __init__(self, *events: TrainingEvent, failure: Exception | None = None) -> None:
        self.events = events
        self.failure = failure
        self.config: MotleyConfig | None = None
        self.flags: dict[str, bool] = {}

    def __call__(
        self, config: MotleyConfig, on_event: OnEvent, *, resume: bool, trace: bool
    ) -> None:
        self.config = config
        self.flags = {"resume": resume, "trace": trace}
        for event in self.events:
            on_event(event)
        if self.failure is not None:
            raise self.failure


WHOLE = (planned(), started(), step_done(1), traced(0), evaluated(2), saved(4), finished(4))


def motley_train(
    monkeypatch: pytest.MonkeyPatch, run: FakeRun, curves: Curves, *arguments: str
) -> Result:
    """Run `motley train` with the driver and the curves replaced."""
    for name, attributes in (
        ("cluster.training.run", {"run": run}),
        ("cluster.training.tensorboard", {"scalars_in": curves.scalars_in}),
    ):
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return CliRunner().invoke(app, ("train", *arguments))


def refusal(path: Path | None, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        training_config(path, None, TrainOptions(**options))  # type: ignore[arg-type]
    return str(caught.value)


def test_data_and_output_are_asked_for_by_key_with_an_example(folder: Path) -> None:
    message = refusal(config_file(folder, "{}"))

    assert "training.data and training.output not set" in message
    assert "data: {train: [chats.jsonl]}" in message
    assert "training.output not set" in refusal(config_file(folder, "{data: {train: [x]}}"))
    assert "training.data not set" in refusal(config_file(folder, "{output: run}"))


def test_every_shipped_training_configuration_can_run(folder: Path) -> None:
    for name in ("train-tiny.yaml", "train-lora.yaml"):
        config = training_config(CONFIGS / name, None, TrainOptions())

        data = config.training.data
        assert data is not None
        assert all(path.is_file() for path in data.train)
        assert config.training.output == folder / "runs" / name.removesuffix(".yaml")


def test_shipped_chats_are_records_of_a_user_and_an_answer() -> None:
    text = (CONFIGS / "data" / "chats.jsonl").read_text(encoding="utf-8")

    records = [json.loads(line) for line in text.splitlines()]

    assert len(records) > 20
    for record in records:
        assert [message["role"] for message in record["messages"]] == ["user", "assistant"]


def test_data_is_looked_up_here_and_then_beside_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "job").mkdir()
    (folder / "job" / "chats.jsonl").touch()
    path = config_file(folder / "job", "{data: {train: [chats.jsonl]}, output: run}")

    beside = training_config(path, None, TrainOptions())
    (folder / "chats.jsonl").touch()
    here = training_config(path, None, TrainOptions())

    assert beside.training.data is not None
    assert beside.training.data.train == (folder / "job" / "chats.jsonl",)
    assert here.training.data is not None
    assert here.training.data.train == (folder / "chats.jsonl",)


def test_missing_data_is_refused_with_its_key_and_where_it_was_looked_for(folder: Path) -> None:
    (folder / "a.txt").touch()
    message = refusal(
        config_file(folder, "{data: {train: [a.txt], held_out: [a.txt, b.txt]}, output: run}")
    )

    assert f"training.data.held_out[1]: no file or folder b.txt (tried {folder / 'b.txt'})" in (
        message
    )


def test_flags_replace_steps_output_and_model(folder: Path) -> None:
    path = ready(folder)
    (folder / "other").mkdir()

    options = TrainOptions(steps=7, output=Path("elsewhere"))
    config = training_config(path, str(folder / "other"), options)

    assert config.training.steps == 7
    assert config.training.output == folder / "elsewhere"
    assert config.model == str(folder / "other")


def test_flags_are_validated_with_the_rest(folder: Path) -> None:
    message = refusal(ready(folder, ", optimizer: {warmup_steps: 3}"), steps=2)

    assert message == (
        "command line: training: optimizer.warmup_steps (3) must be at most steps (2)"
    )


def test_a_folder_that_holds_a_run_is_not_started_over(folder: Path) -> None:
    path = ready(folder)
    holds_a_run(folder / "run")

    message = refusal(path)

    assert "holds a run already (newest: step-000002); go on with it by --resume" in message
    assert training_config(path, None, TrainOptions(resume=True)).training.steps == 4


def test_there_must_be_something_to_resume(folder: Path) -> None:
    message = refusal(ready(folder), resume=True)

    assert f"--resume: {folder / 'run'} holds no checkpoint to go on from" in message


def test_a_folder_whose_first_run_saved_nothing_can_be_used(folder: Path) -> None:
    (folder / "run" / "tensorboard").mkdir(parents=True)

    assert training_config(ready(folder), None, TrainOptions()).training.output == folder / "run"


def test_files_that_cannot_be_written_are_refused_before_hours_of_training(folder: Path) -> None:
    path = ready(folder)

    assert f"--trace: no folder {folder / 'no'}" in refusal(path, trace=Path("no/trace.json"))
    assert f"--trace: {folder} is a folder; name a file" in refusal(path, trace=folder)
    assert "chats.jsonl is a file; name a folder" in refusal(path, output=Path("chats.jsonl"))


def test_a_run_is_shown_plotted_and_traced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, curves = FakeRun(*WHOLE), Curves()

    result = motley_train(
        monkeypatch, run, curves, "--config", str(ready(folder)), "--trace", "trace.json"
    )

    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert "plan 0: " in result.stderr
    assert "step 1/4  loss 2.0000" in result.stderr
    assert "wrote trace.json: 2 micro-batches" in result.stderr
    assert run.flags == {"resume": False, "trace": True}
    assert curves.events == list(WHOLE)
    assert curves.is_closed
    assert curves.folder == folder / "run" / "tensorboard"
    assert json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]


def test_a_run_tells_others_how_it_went(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = str(ready(folder))
    motley_train(monkeypatch, FakeRun(*WHOLE), Curves(), "--config", config)
    [state] = training_states()
    assert (state.name, state.phase, state.step, state.losses) == (
        "run", "finished", 4, ((1, 2.0),),
    )  # fmt: skip

    failing = FakeRun(started(), failure=RuntimeError("step 1: all lost"))
    motley_train(monkeypatch, failing, Curves(), "--config", config)
    [state] = training_states()
    assert (state.phase, state.reason, state.losses) == ("failed", "step 1: all lost", ())


def test_json_is_one_event_a_line_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = motley_train(
        monkeypatch, FakeRun(*WHOLE), Curves(), "--config", str(ready(folder)), "--json"
    )

    assert [json.loads(line)["event"] for line in result.stdout.splitlines()] == [
        "training_planned",
        "training_started",
        "step_done",
        "evaluated",
        "checkpoint_saved",
        "training_finished",
    ]
    assert result.stderr == ""


def test_a_run_that_was_told_to_stop_exits_as_interrupted_and_still_writes_its_trace(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun(planned(), started(), step_done(1), traced(0), saved(1), finished(1))

    result = motley_train(
        monkeypatch, run, Curves(), "--config", str(ready(folder)), "--trace", "trace.json"
    )

    assert result.exit_code == 130
    assert "interrupted; go on with --resume" in result.stderr
    assert (folder / "trace.json").exists()


def test_a_run_that_was_stopped_before_its_first_step_is_interrupted_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = motley_train(monkeypatch, FakeRun(planned()), Curves(), "--config", str(ready(folder)))

    assert result.exit_code == 130


def test_a_run_that_is_resumed_after_its_last_step_is_done(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holds_a_run(folder / "run")
    run = FakeRun(finished(4))

    result = motley_train(monkeypatch, run, Curves(), "--config", str(ready(folder)), "--resume")

    assert result.exit_code == 0
    assert run.flags == {"resume": True, "trace": False}


def test_a_run_that_fails_closes_its_curves_and_writes_its_trace(folder: Path) -> None:
    curves = Curves()
    options = TrainOptions(trace=folder / "trace.json")
    config = training_config(ready(folder), None, options)
    run = FakeRun(planned(), started(), traced(0), failure=RuntimeError("step 1: all lost"))

    with pytest.raises(RuntimeError, match="all lost"):
        train(config, options, Output(as_json=True), run, curves.scalars_in)

    assert curves.is_closed
    assert (folder / "trace.json").exists()


def test_a_trace_that_cannot_be_written_does_not_hide_a_run_that_went_well(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = TrainOptions(trace=folder / "trace.json")
    config = training_config(ready(folder), None, options)
    (folder / "trace.json").mkdir()

    assert train(config, options, Output(as_json=False), FakeRun(*WHOLE), Curves().scalars_in)
    assert "no trace: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (RuntimeError("step 3: gone"), 1, "step 3: gone"),
        (ConfigError("devices: none"), 2, "devices: none"),
        (DataError("a.jsonl:3: no text"), 2, "training.data: a.jsonl:3: no text"),
        (InfeasiblePlanError("the head fits no device"), 3, "the head fits no device"),
    ],
)
def test_a_failure_has_the_exit_code_of_its_kind(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, code: int, message: str
) -> None:
    result = motley_train(
        monkeypatch, FakeRun(failure=failure), Curves(), "--config", str(ready(folder)), "--json"
    )

    assert result.exit_code == code
    assert json.loads(result.stdout)["error"] == {"message": message, "exit_code": code}


def test_settings_that_cannot_work_are_refused_before_torch_and_ray_are_loaded(
    folder: Path,
) -> None:
    code = (
        "import sys\n"
        "from cluster.cli import app\n"
        "try:\n"
        f"    app(['train', '--config', {str(config_file(folder, '{}'))!r}])\n"
        "except SystemExit as exit:\n"
        "    heavy = sorted({'torch', 'ray', 'transformers', 'tensorboard'} & set(sys.modules))\n"
        "    sys.stderr.write(f'EXIT {exit.code} HEAVY {heavy}')\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert "training.data and training.output not set" in done.stderr
    assert done.stderr.endswith("EXIT 2 HEAVY []")
