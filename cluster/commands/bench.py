"""`motley bench experts`: replay a trace of expert loads, without a model, a GPU or Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import JsonFlag
from cluster.commands.output import Output
from cluster.commands.reporting import reporting
from cluster.config import ConfigError
from placement.sharding.loads import DEFAULT_WINDOW_STEPS, Phase
from placement.sharding.synthetic import MOST_SIGMA, MOST_ZIPF, REGIMES, TraceRecipe

bench_app = typer.Typer(
    help="Figures of this version, simulated: no model, GPU or Ray needed.",
    no_args_is_help=True,
)

DEFAULT_EXPERT_BYTES = "9437184"
"""Of Qwen3-30B-A3B in bfloat16: three matrices of 2048 x 768."""
_RECIPE = TraceRecipe()
_DECODE_TOKENS = 16


@bench_app.callback()
def bench() -> None:
    """Keep `experts` a word of its own while it is the only bench."""


@bench_app.command()
def experts(
    trace: Annotated[
        str, typer.Option(help=f"{', '.join(REGIMES)}; or a file that was recorded or saved.")
    ],
    phase: Annotated[Phase, typer.Option(help="Of a made-up trace.")] = "prefill",
    steps: Annotated[int, typer.Option(min=2)] = _RECIPE.num_steps,
    layers: Annotated[int, typer.Option(min=1)] = _RECIPE.num_layers,
    num_experts: Annotated[int, typer.Option("--experts", min=1)] = _RECIPE.num_experts,
    top_k: Annotated[int, typer.Option(min=1, help="Experts of a token.")] = _RECIPE.top_k,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a step; default: 1024, decoding 16.")
    ] = None,
    zipf: Annotated[
        float,
        typer.Option(
            help=f"Skew, to {MOST_ZIPF:g}: 0.2 balanced, 0.6 common, 1.2 the worst reported."
        ),
    ] = _RECIPE.zipf,
    domain_sigma: Annotated[
        float,
        typer.Option(
            help=f"How much domains of text differ, to {MOST_SIGMA:g}; 0.5 to 1 is a lot."
        ),
    ] = _RECIPE.domain_sigma,
    noise_sigma: Annotated[
        float, typer.Option(help=f"Of the logits, slowly varying; to {MOST_SIGMA:g}.")
    ] = _RECIPE.noise_sigma,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    rows_per_s: Annotated[
        str | None,
        typer.Option(help="Of each device, as 2e5,1e5,5e4; default: eight unequal devices."),
    ] = None,
    spare_slots: Annotated[
        int, typer.Option(min=0, help="Of each device, beside one copy of every expert in all.")
    ] = 1,
    expert_bytes: Annotated[str, typer.Option(help="One expert.")] = DEFAULT_EXPERT_BYTES,
    copy_rate: Annotated[str, typer.Option(help="What copies may count on.")] = "1.1 GB/s",
    step_budget: Annotated[
        str | None, typer.Option(help="Most bytes copied per step; default: one expert.")
    ] = None,
    window_steps: Annotated[
        int, typer.Option("--window", min=16, help="Steps that loads are counted over.")
    ] = DEFAULT_WINDOW_STEPS,
    save: Annotated[Path | None, typer.Option(help="Write the trace to this file.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Replay a trace under no rebalancing, EPLB and Motley. All figures are simulated."""
    output = Output(as_json=as_json)
    with reporting(output):
        # The planners' solvers take half a second to import.
        from cluster.commands.expert_bench import FleetOptions, run_bench

        fleet = FleetOptions(
            rows_per_s=rows_per_s,
            spare_slots=spare_slots,
            expert_bytes=expert_bytes,
            copy_rate=copy_rate,
            step_budget=step_budget,
            window_steps=window_steps,
        )
        asked: str | TraceRecipe = trace
        if trace in REGIMES:
            try:
                asked = TraceRecipe(
                    regime=next(known for known in REGIMES if known == trace),
                    phase=phase,
                    num_steps=steps,
                    num_layers=layers,
                    num_experts=num_experts,
                    top_k=top_k,
                    tokens=tokens or (_DECODE_TOKENS if phase == "decode" else _RECIPE.tokens),
                    zipf=zipf,
                    domain_sigma=domain_sigma,
                    noise_sigma=noise_sigma,
                )
            except ValueError as error:
                raise ConfigError(str(error)) from error
        run_bench(asked, seed, fleet, save, output)
