"""Flags that several verbs share. Loads nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JsonFlag = Annotated[
    bool, typer.Option("--json", help="Write JSON to stdout and nothing else there.")
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="A YAML file; without it, the embedded default."),
]
ModelOption = Annotated[
    str | None,
    typer.Option(help="A checkpoint folder or hub id. Without --config: on the devices found."),
]
NameOption = Annotated[str | None, typer.Option(help="The deployment; needed when several run.")]
TargetOption = Annotated[
    str | None,
    typer.Option(envvar="MOTLEY_TARGET", help="host:port of the gateway's gRPC listener."),
]
UrlOption = Annotated[
    str | None, typer.Option(envvar="MOTLEY_URL", help="URL of the gateway's HTTP listener.")
]
TokenOption = Annotated[
    str | None, typer.Option(envvar="MOTLEY_TOKEN", help="Bearer token of the deployment.")
]
TlsOption = Annotated[
    Path | None,
    typer.Option(envvar="MOTLEY_TLS_CERT", help="PEM certificates to trust."),
]
TlsClientCertOption = Annotated[
    Path | None,
    typer.Option(
        envvar="MOTLEY_TLS_CLIENT_CERT",
        help="PEM certificate to show to a gateway that asks clients for one.",
    ),
]
TlsClientKeyOption = Annotated[
    Path | None,
    typer.Option(envvar="MOTLEY_TLS_CLIENT_KEY", help="PEM key of that certificate."),
]

MaxTokensOption = Annotated[
    int | None, typer.Option(min=1, help="Most tokens to generate; in a chat, all that fit.")
]
TemperatureOption = Annotated[float | None, typer.Option(min=0, help="0 is greedy.")]
TopPOption = Annotated[float | None, typer.Option(min=0, max=1)]
SeedOption = Annotated[int | None, typer.Option(min=0, help="Makes the answer repeatable.")]
StopOption = Annotated[
    list[str] | None, typer.Option(help="Text that ends the answer; may be given several times.")
]
