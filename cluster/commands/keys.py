"""`motley keys`: who else may use a deployment, and how much of it."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.table import Table
from rich.text import Text

from cluster.audit import Act, AuditLog, default_audit_file
from cluster.commands.options import JsonFlag, NameOption
from cluster.commands.output import Output
from cluster.commands.reporting import reporting
from cluster.config import ConfigError, load_config
from cluster.keys import SCOPES, ClientKey, KeysError, add_key, new_key, read_keys, remove_key
from cluster.runstate import find_state

keys_app = typer.Typer(
    help="Keys of further clients: made, listed and revoked without a restart.",
    no_args_is_help=True,
)

KeyName = Annotated[str, typer.Argument(help="What the client is called, in the audit log too.")]
FileOption = Annotated[
    Path | None,
    typer.Option("--file", envvar="MOTLEY_API_KEYS", help="The keys file itself."),
]
ConfigFileOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="A YAML file with gateway.api_keys_file.")
]
PerMinute = Annotated[int | None, typer.Option(min=1, help="No limit without it.")]


class Files(NamedTuple):
    """Which files a command works on."""

    keys: Path
    audit: Path | None
    """None: the default."""


@keys_app.command()
def create(
    client: KeyName,
    scope: Annotated[
        list[str], typer.Option(help=f"{', '.join(SCOPES)}; give it once for each scope.")
    ],
    requests_per_minute: PerMinute = None,
    tokens_per_minute: PerMinute = None,
    concurrent_requests: PerMinute = None,
    file: FileOption = None,
    config: ConfigFileOption = None,
    name: NameOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a key and show it, this once: only a hash of it is kept."""
    output = Output(as_json=as_json)
    with _reporting(output):
        files = _files(file, config, name)
        key, text = new_key(
            client,
            scope,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrent_requests=concurrent_requests,
        )
        add_key(files.keys, key)
        _record(files, "create_key", key)
        output.note(f"key of {key.name} ({', '.join(key.scopes)}), in {files.keys} as a hash:")
        output.result(_shown(key) | {"key": text}, Text(text))


@keys_app.command(name="list")
def list_keys(
    file: FileOption = None,
    config: ConfigFileOption = None,
    name: NameOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show who has a key and what it allows."""
    output = Output(as_json=as_json)
    with _reporting(output):
        files = _files(file, config, name)
        keys = read_keys(files.keys)
        output.result(
            {"file": str(files.keys), "keys": [_shown(key) for key in keys]}, _table(keys)
        )


@keys_app.command()
def revoke(
    client: KeyName,
    file: FileOption = None,
    config: ConfigFileOption = None,
    name: NameOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Take a key away; from the next call on it is refused. What runs with it ends by itself."""
    output = Output(as_json=as_json)
    with _reporting(output):
        files = _files(file, config, name)
        key = remove_key(files.keys, client)
        _record(files, "revoke_key", key)
        output.result(_shown(key) | {"revoked": True}, f"revoked the key of {key.name}")


@contextmanager
def _reporting(output: Output) -> Iterator[None]:
    with reporting(output):
        try:
            yield
        except KeysError as error:
            raise ConfigError(str(error)) from None


def _files(file: Path | None, config: Path | None, name: str | None) -> Files:
    """Return what the flags say, or what a running deployment does."""
    if config is not None:
        gateway = load_config(config).gateway
        keys, audit = file or gateway.api_keys_file, gateway.audit_file
        if keys is None:
            raise ConfigError(f"{config}: gateway.api_keys_file is not set; nobody reads keys")
        return Files(keys, audit)
    if file is not None:
        return Files(file, None)
    state = find_state(name)
    if state.api_keys_file is None:
        raise ConfigError(
            f"{state.name} runs without gateway.api_keys_file; set it and start again, or name a "
            "file with --file"
        )
    return Files(Path(state.api_keys_file), Path(state.audit_file) if state.audit_file else None)


def _record(files: Files, act: Act, key: ClientKey) -> None:
    audit = AuditLog(files.audit or default_audit_file())
    try:
        audit.record(
            act,
            who=getpass.getuser(),
            source="command line",
            key=key.name,
            key_id=key.id,
            scopes=",".join(key.scopes),
            file=str(files.keys),
        )
    finally:
        audit.close()


def _shown(key: ClientKey) -> dict[str, Any]:
    return key.model_dump(exclude={"salt", "sha256"})


def _table(keys: tuple[ClientKey, ...]) -> Table:
    table = Table("client", "id", "scopes", "requests/min", "tokens/min", "at a time", "created")
    for key in keys:
        limits = (key.requests_per_minute, key.tokens_per_minute, key.concurrent_requests)
        table.add_row(
            Text(key.name),
            key.id,
            ", ".join(key.scopes),
            *("" if limit is None else str(limit) for limit in limits),
            key.created,
        )
    return table
