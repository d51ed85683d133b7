"""Where a command finds the deployment it talks to: flags, environment, the run-state file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cluster.commands.errors import NotReadyError
from cluster.config import ConfigError
from cluster.runstate import RunState, find_state

if TYPE_CHECKING:
    from cluster.commands.status import HttpTarget
    from cluster.commands.talk import GrpcTarget


class Tls(NamedTuple):
    """The files that TLS needs on this side."""

    ca: Path | None
    """Whom to trust."""
    cert: Path | None
    key: Path | None


def http_target(name: str | None, url: str | None, token: str | None, tls: Tls) -> HttpTarget:
    """Return what the flags and the environment say, and the run-state file for the rest."""
    from cluster.commands.status import HttpTarget

    url, token, tls = _found(name, url, token, tls, lambda state: state.http_url)
    return HttpTarget(
        url=url,
        token=token,
        tls_cert_file=tls.ca,
        tls_client_cert_file=tls.cert,
        tls_client_key_file=tls.key,
    )


def grpc_target(name: str | None, target: str | None, token: str | None, tls: Tls) -> GrpcTarget:
    """Return what the flags and the environment say, and the run-state file for the rest."""
    from cluster.commands.talk import GrpcTarget

    target, token, tls = _found(name, target, token, tls, lambda state: state.grpc_target)
    return GrpcTarget(
        target=target,
        token=token,
        tls_ca_file=tls.ca,
        tls_client_cert_file=tls.cert,
        tls_client_key_file=tls.key,
    )


def _found(
    name: str | None,
    address: str | None,
    token: str | None,
    tls: Tls,
    address_of: Callable[[RunState], str],
) -> tuple[str, str, Tls]:
    """Return (address, token, TLS files); the run-state file says what is not given."""
    if (tls.cert is None) != (tls.key is None):
        raise ConfigError("--tls-client-cert and --tls-client-key come together; one is missing")
    if address is None:
        state = _ready_state(name)
        address, token = address_of(state), token or state.token
        tls = tls._replace(ca=tls.ca or _path(state.tls_cert_file))
    return address, token or "", tls


def _ready_state(name: str | None) -> RunState:
    state = find_state(name)
    if not state.is_ready:
        raise NotReadyError(f"{state.name} (process {state.pid}) is still starting; try again")
    return state


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
