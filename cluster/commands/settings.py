"""Which settings a command works with: a file, a model alone, or the embedded default."""

from __future__ import annotations

from pathlib import Path

from cluster.config import (
    EMBEDDED_CONFIG,
    MotleyConfig,
    default_config,
    discovering_config,
    load_config,
    with_overrides,
)
from placement.workload import Objective


def chosen_config(
    path: Path | None,
    model: str | None,
    *,
    name: str | None = None,
    http_port: int | None = None,
    grpc_port: int | None = None,
    objective: Objective | None = None,
) -> tuple[MotleyConfig, str]:
    """Return the settings and where they come from.

    With neither file nor model: the embedded default. A model alone is served on the devices that
    `motley up` finds. With both, the model replaces the file's.
    """
    if path is not None:
        config, source = load_config(path), str(path.resolve())
    elif model is not None:
        config, source, model = discovering_config(model), f"--model {model}", None
    else:
        config, source = default_config(), str(EMBEDDED_CONFIG)
    return (
        with_overrides(
            config,
            model=model,
            name=name,
            http_port=http_port,
            grpc_port=grpc_port,
            objective=objective,
        ),
        source,
    )
