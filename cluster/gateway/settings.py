"""Where the gateway listens and what it accepts. Loads without grpc, fastapi or transformers."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator


class GatewaySettings(BaseModel):
    """Settings of the two listeners, gRPC and HTTP."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", min_length=1)
    http_port: int = Field(8000, ge=0, le=65535)
    """0 picks a free port; the handle says which."""
    grpc_port: int = Field(8001, ge=0, le=65535)
    max_request_bytes: int = Field(4 * 1024 * 1024, ge=1024)
    """Largest HTTP body and largest gRPC message; adapters have a limit of their own."""
    max_adapter_bytes: int = Field(1024 * 1024 * 1024, ge=1024)
    """Largest adapter that `motley publish` may send; the gateway holds one in memory at a time
    for each upload."""
    tls_cert_file: Path | None = None
    """PEM certificate chain of both listeners."""
    tls_key_file: Path | None = None
    tls_client_ca_file: Path | None = None
    """PEM certificates of the authority whose clients alone are let in (mutual TLS), on both
    listeners; None: the token or a key is enough."""
    insecure_plaintext: bool = False
    """Listen off loopback without TLS: the token and every prompt cross the network readable."""
    token_file: Path | None = None
    """A file that holds the bearer token; None: the launcher makes one."""
    api_keys_file: Path | None = None
    """Keys of further clients, as `motley keys` writes them; read again when it changes. None: the
    token alone is valid."""
    audit_file: Path | None = None
    """Where administrative acts and refused callers are put on record; None: `audit.jsonl` in the
    folder of the run-state files."""
    resume_grace_s: float = Field(30.0, ge=0, allow_inf_nan=False)
    """How long a request that its client has named goes on with nobody listening; the same time is
    given to clients to come back after the gateway was away."""
    resume_keep_s: float = Field(600.0, ge=0, allow_inf_nan=False)
    """How long the outputs of a named request are kept after its end."""
    max_connections: int = Field(1024, ge=1)
    """HTTP connections, and gRPC calls, that are open at a time; what is more is turned away."""
    body_timeout_s: float = Field(30.0, gt=0, allow_inf_nan=False)
    """Time for the head of an HTTP request to be there, again for its body or a call's message,
    and for a client to read when there is no more room for what it is sent."""
    adapter_timeout_s: float = Field(600.0, gt=0, allow_inf_nan=False)
    """Time for an adapter's bytes to be there."""

    @property
    def uses_tls(self) -> bool:
        return self.tls_cert_file is not None

    @model_validator(mode="after")
    def _tls_comes_in_pairs(self) -> GatewaySettings:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            given, absent = (
                ("tls_key_file", "tls_cert_file")
                if self.tls_cert_file is None
                else ("tls_cert_file", "tls_key_file")
            )
            raise ValueError(f"{given} is set without {absent}; TLS needs both")
        return self

    @model_validator(mode="after")
    def _client_certificates_need_tls(self) -> GatewaySettings:
        if self.tls_client_ca_file is not None and not self.uses_tls:
            raise ValueError(
                "tls_client_ca_file is set without tls_cert_file and tls_key_file; clients show "
                "certificates over TLS only"
            )
        return self

    @model_validator(mode="after")
    def _plaintext_stays_on_loopback(self) -> GatewaySettings:
        if not (is_loopback(self.host) or self.uses_tls or self.insecure_plaintext):
            raise ValueError(
                f"host ({self.host}) is not loopback and TLS is off: the token and every prompt "
                "would cross the network readable. Set tls_cert_file and tls_key_file, or "
                "insecure_plaintext: true where the network itself is trusted"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether a listener on `host` can be reached from this machine only.

    A name other than localhost is not looked up: what it resolves to can change.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
