"""The command line: verbs and flags. What a verb does lives in `cluster.commands`.

Imports are light: a verb's module is imported when the verb runs, so `motley --help`, `plan`,
`status` and `generate` load neither torch nor Ray.

Exit codes: 0 done; 1 an error; 2 wrong usage or settings; 3 no plan fits; 4 nothing is running,
or it cannot be reached; 5 not ready, or overloaded; 6 the token or key was refused, or lacks a
scope; 130 interrupted.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cluster.commands.bench import bench_app
from cluster.commands.keys import keys_app
from cluster.commands.options import (
    ConfigOption,
    JsonFlag,
    MaxTokensOption,
    ModelOption,
    NameOption,
    SeedOption,
    StopOption,
    TargetOption,
    TemperatureOption,
    TlsClientCertOption,
    TlsClientKeyOption,
    TlsOption,
    TokenOption,
    TopPOption,
    UrlOption,
)
from cluster.commands.output import Output
from cluster.commands.reporting import ExitCode, reporting
from cluster.commands.targets import Tls, grpc_target, http_target
from cluster.config import ConfigError
from placement.workload import Objective

if TYPE_CHECKING:
    from cluster.client import GenerateOptions

app = typer.Typer(
    name="motley",
    help="Fine-tune and serve one Hugging Face checkpoint across unequal machines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.add_typer(bench_app, name="bench")
app.add_typer(keys_app, name="keys")


@app.command()
def up(
    config: ConfigOption = None,
    model: ModelOption = None,
    name: NameOption = None,
    http_port: Annotated[int | None, typer.Option(help="0 picks a free one.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="0 picks a free one.")] = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Return when it is ready; it goes on.")
    ] = False,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=1, help="With --detach: seconds until it is ready.")
    ] = 600.0,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None,
        typer.Option(help="Log to stderr from this level on; with --detach: info, to a file."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Bring a deployment up and keep it up until Ctrl-C, SIGTERM or `motley down`."""
    output = Output(as_json=as_json)
    code = ExitCode.OK
    with reporting(output):
        from cluster.commands.settings import chosen_config

        settings, source = chosen_config(
            config, model, name=name, http_port=http_port, grpc_port=grpc_port
        )
        if detach:
            from cluster.commands.detach import bring_up_detached, up_command

            command = up_command(
                ("--config", config),
                ("--model", model),
                ("--name", name),
                ("--http-port", http_port),
                ("--grpc-port", grpc_port),
                ("--log-level", log_level or "info"),
            )
            code = bring_up_detached(command, settings.served_name, timeout_s, output)
        else:
            # Ray and torch take seconds to import; settings that cannot work are refused before.
            from cluster.commands.up import bring_up
            from cluster.launch import run
            from cluster.telemetry import configure_logging

            if log_level is not None:
                configure_logging(log_level)
            bring_up(settings, source, output, run)
    # Outside, because typer's own exit counts as an expected failure there.
    if code is not ExitCode.OK:
        raise typer.Exit(code)


@app.command()
def down(
    name: NameOption = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0, help="Seconds to wait for it to stop.")
    ] = 60.0,
    as_json: JsonFlag = False,
) -> None:
    """Stop a deployment that `motley up` started on this machine."""
    output = Output(as_json=as_json)
    with reporting(output):
        from cluster.commands.down import bring_down

        bring_down(name, timeout_s, output)


@app.command()
def status(
    name: NameOption = None,
    url: UrlOption = None,
    token: TokenOption = None,
    tls_cert: TlsOption = None,
    tls_client_cert: TlsClientCertOption = None,
    tls_client_key: TlsClientKeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show stages, lanes and links of a running deployment."""
    output = Output(as_json=as_json)
    with reporting(output):
        from cluster.commands.status import show_status

        show_status(
            http_target(name, url, token, Tls(tls_cert, tls_client_cert, tls_client_key)), output
        )


@app.command()
def dashboard(
    open_it: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
    name: NameOption = None,
    url: UrlOption = None,
    token: TokenOption = None,
    tls_cert: TlsOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Print the address of a running deployment's page; it holds the token."""
    output = Output(as_json=as_json)
    with reporting(output):
        from cluster.commands.dashboard import show_dashboard

        show_dashboard(
            http_target(name, url, token, Tls(tls_cert, None, None)), output, open_it=open_it
        )


@app.command()
def plan(
    config: ConfigOption = None,
    model: ModelOption = None,
    objective: Annotated[
        Objective | None, typer.Option(help="What to plan for; default: the settings'.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the front to this file (.svg, .png or .pdf).")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Write the schedule (with --training: that one) for ui.perfetto.dev."),
    ] = None,
    profile_file: Annotated[
        Path | None,
        typer.Option("--profile", help="Figures that `motley profile --output` wrote."),
    ] = None,
    shard_experts: Annotated[
        bool, typer.Option("--shard-experts", help="Also plan the experts over all devices.")
    ] = False,
    training: Annotated[
        bool, typer.Option("--training", help="Also plan fine-tuning over the devices as a pool.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Predict a deployment without starting it: no Ray, no torch, no GPU.

    Needs devices with declared figures, or measured ones: see `motley profile`.
    """
    output = Output(as_json=as_json)
    with reporting(output):
        from cluster.commands.plan import PlanOptions, show_plan
        from cluster.commands.settings import chosen_config

        options = PlanOptions(
            shard_experts=shard_experts,
            training=training,
            plot=plot,
            trace=trace,
            profile=profile_file,
        )
        show_plan(chosen_config(config, model, objective=objective)[0], output, options)


@app.command()
def profile(
    config: ConfigOption = None,
    model: ModelOption = None,
    tokens: Annotated[
        str, typer.Option(help="Rows of a step to time layers at, as 1,8,32.")
    ] = "1,8,32,128,512",
    output_file: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the profile to this file too.")
    ] = None,
    refresh: Annotated[bool, typer.Option(help="Measure again what is cached.")] = False,
    quick: Annotated[bool, typer.Option(help="Repeat less; figures are noisier.")] = False,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Measure so many figures of the layers and estimate the rest."),
    ] = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds that one measurement may take.")
    ] = 300.0,
    as_json: JsonFlag = False,
) -> None:
    """Measure devices, links and the checkpoint's layers for `plan` and `up`.

    Without --config: this machine's devices, or those of the Ray cluster that RAY_ADDRESS names.
    """
    output = Output(as_json=as_json)
    with reporting(output):
        from cluster.commands.settings import chosen_config
        from cluster.config import default_config

        # The embedded default's devices are paced: with a model alone, real ones are found.
        found_on = model if model is not None or config is not None else default_config().model
        settings = chosen_config(config, found_on)[0]
        # Ray and torch take seconds to import; settings that cannot work are refused before.
        from cluster.commands.profile import parse_tokens, show_profile
        from cluster.profiling import ProfileOptions

        options = ProfileOptions(
            tokens=parse_tokens(tokens),
            refresh=refresh,
            quick=quick,
            samples=samples,
            timeout_s=timeout_s,
        )
        show_profile(settings, options, output_file, output)


@app.command()
def train(
    config: ConfigOption = None,
    model: ModelOption = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps in all; default: training.steps.")
    ] = None,
    output_folder: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The run's folder; default: training.output."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the folder's latest checkpoint.")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write what devices did lately, for ui.perfetto.dev.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Fine-tune the checkpoint over all devices as a pool; Ctrl-C or SIGTERM saves and stops."""
    output = Output(as_json=as_json)
    is_done = False
    with reporting(output):
        from cluster.commands.train import TrainOptions, training_config
        from cluster.commands.train import train as train_with

        options = TrainOptions(steps=steps, output=output_folder, resume=resume, trace=trace)
        settings = training_config(config, model, options)
        # Ray and torch take seconds to import; settings that cannot work are refused before.
        from cluster.training.run import run
        from cluster.training.tensorboard import scalars_in

        is_done = train_with(settings, options, output, run, scalars_in)
    # Outside, because typer's own exit counts as an expected failure there.
    if not is_done:
        raise typer.Exit(ExitCode.INTERRUPTED)


@app.command()
def publish(
    adapter: Annotated[
        Path | None, typer.Argument(help="The folder of a PEFT LoRA adapter.")
    ] = None,
    remove: Annotated[
        bool, typer.Option("--remove", help="Use no adapter: go back to the base model.")
    ] = False,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds until every stage must have it.")
    ] = 300.0,
    name: NameOption = None,
    url: UrlOption = None,
    token: TokenOption = None,
    tls_cert: TlsOption = None,
    tls_client_cert: TlsClientCertOption = None,
    tls_client_key: TlsClientKeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Swap an adapter into a running deployment between two steps; no request fails."""
    output = Output(as_json=as_json)
    with reporting(output):
        from cluster.commands import publish as command

        if (adapter is None) is not remove:
            raise ConfigError("name an adapter's folder, or --remove; one of the two")
        target = http_target(name, url, token, Tls(tls_cert, tls_client_cert, tls_client_key))
        if adapter is None:
            command.remove(target, output, timeout_s=timeout_s)
        else:
            command.publish(target, adapter, output, timeout_s=timeout_s)


@app.command()
def rebalance(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would move, and why.")
    ] = False,
    name: NameOption = None,
    url: UrlOption = None,
    token: TokenOption = None,
    tls_cert: TlsOption = None,
    tls_client_cert: TlsClientCertOption = None,
    tls_client_key: TlsClientKeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Move layers to the best plan now, if it gains; requests go on."""
    output = Output(as_json=as_json)
    with reporting(output):
        from cluster.commands import steer

        target = http_target(name, url, token, Tls(tls_cert, tls_client_cert, tls_client_key))
        steer.rebalance(target, output, is_dry=dry_run)


@app.command()
def drain(
    node: Annotated[str, typer.Argument(help="The node, as the configuration calls it.")],
    cancel: Annotated[bool, typer.Option("--cancel", help="Use the node again.")] = False,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds until it must hold nothing.")
    ] = 300.0,
    name: NameOption = None,
    url: UrlOption = None,
    token: TokenOption = None,
    tls_cert: TlsOption = None,
    tls_client_cert: TlsClientCertOption = None,
    tls_client_key: TlsClientKeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Move everything off a node while requests go on; returns when it holds nothing."""
    output = Output(as_json=as_json)
    with reporting(output):
        from cluster.commands import steer

        target = http_target(name, url, token, Tls(tls_cert, tls_client_cert, tls_client_key))
        steer.drain(target, node, output, cancel=cancel, timeout_s=timeout_s)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help='The text to continue; "-" reads stdin.')],
    max_tokens: MaxTokensOption = 128,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    name: NameOption = None,
    target: TargetOption = None,
    token: TokenOption = None,
    tls_cert: TlsOption = None,
    tls_client_cert: TlsClientCertOption = None,
    tls_client_key: TlsClientKeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Continue a prompt, streaming to stdout as it is generated."""
    output = Output(as_json=as_json)
    with reporting(output):
        from cluster.commands import talk

        address = grpc_target(name, target, token, Tls(tls_cert, tls_client_cert, tls_client_key))
        sampling = _options(max_tokens, temperature, top_p, seed, stop)
        talk.generate(address, prompt, sampling, output)


@app.command()
def chat(
    system: Annotated[str | None, typer.Option(help="Instructions ahead of the talk.")] = None,
    max_tokens: MaxTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    seed: SeedOption = None,
    stop: StopOption = None,
    name: NameOption = None,
    target: TargetOption = None,
    token: TokenOption = None,
    tls_cert: TlsOption = None,
    tls_client_cert: TlsClientCertOption = None,
    tls_client_key: TlsClientKeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Talk with the model; /exit or Ctrl-D leaves."""
    output = Output(as_json=as_json)
    with reporting(output):
        from cluster.commands import talk

        address = grpc_target(name, target, token, Tls(tls_cert, tls_client_cert, tls_client_key))
        sampling = _options(max_tokens, temperature, top_p, seed, stop)
        talk.chat(address, system, sampling, output, lambda: output.errors.input("> "))


@app.command()
def doctor(
    config: ConfigOption = None, model: ModelOption = None, as_json: JsonFlag = False
) -> None:
    """Check this machine, and every node of the Ray cluster that the settings name."""
    output = Output(as_json=as_json)
    with reporting(output):
        from cluster.commands.settings import chosen_config
        from cluster.doctor import examine

        examine(chosen_config(config, model)[0], output)


def _options(
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    stop: list[str] | None,
) -> GenerateOptions:
    options: GenerateOptions = {}
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    if temperature is not None:
        options["temperature"] = temperature
    if top_p is not None:
        options["top_p"] = top_p
    if seed is not None:
        options["seed"] = seed
    if stop:
        options["stop"] = stop
    return options
