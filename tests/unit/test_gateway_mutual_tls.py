"""Mutual TLS: who shows no certificate of the right authority is not heard, on both listeners."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from typer.testing import CliRunner

from cluster.cli import app
from cluster.client import AsyncMotleyClient, MotleyClient, Unreachable
from cluster.gateway.server import serve
from cluster.gateway.settings import GatewaySettings
from cluster.gateway.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tests.unit.conftest import FakeBackend, GatewayFactory

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Authority:
    """Signs certificates; its own is `ca`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.ca = folder / f"{name}.pem"
        self.ca.write_bytes(
            self._sign(self._name, self._key, is_ca=True).public_bytes(serialization.Encoding.PEM)
        )

    def issue(self, name: str) -> tuple[Path, Path]:
        """Return the files of a new certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        cert_file, key_file = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        cert_file.write_bytes(
            self._sign(subject, key, is_ca=False).public_bytes(serialization.Encoding.PEM)
        )
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return cert_file, key_file

    def _sign(self, subject: x509.Name, key: Any, *, is_ca: bool) -> x509.Certificate:
        today = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(today - datetime.timedelta(days=1))
            .not_valid_after(today + datetime.timedelta(days=1))
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
                critical=False,
            )
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )


@dataclass(frozen=True)
class Files:
    ca: Path
    server: tuple[Path, Path]
    client: tuple[Path, Path]
    stranger: tuple[Path, Path]

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "tls_cert_file": self.server[0],
            "tls_key_file": self.server[1],
            "tls_client_ca_file": self.ca,
        }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("tls")
    ours, others = Authority(folder, "ours"), Authority(folder, "others")
    return Files(ours.ca, ours.issue("server"), ours.issue("client"), others.issue("stranger"))


def context(files: Files, own: tuple[Path, Path] | None) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=str(files.ca))
    if own is not None:
        made.load_cert_chain(*own)
    return made


async def test_only_who_shows_a_certificate_of_the_authority_is_heard(
    gateway_with: GatewayFactory, files: Files, token: str
) -> None:
    headers = {"Authorization": f"Bearer {token}"}
    async with gateway_with(**files.settings) as gateway:
        async with httpx.AsyncClient(verify=context(files, files.client)) as http:
            assert (await http.get(f"{gateway.http_url}/ready", headers=headers)).is_success
        async with AsyncMotleyClient(
            gateway.grpc_target,
            token,
            tls_ca_file=files.ca,
            tls_client_cert_file=files.client[0],
            tls_client_key_file=files.client[1],
        ) as client:
            assert (await client.complete("ab")).text == "Hi there"

        for own in (None, files.stranger):
            async with httpx.AsyncClient(verify=context(files, own)) as http:
                # A refused certificate is told on the first read, after the handshake.
                with pytest.raises((httpx.ReadError, httpx.ConnectError, httpx.ProtocolError)):
                    await http.get(f"{gateway.http_url}/health")
            async with AsyncMotleyClient(
                gateway.grpc_target,
                token,
                tls_ca_file=files.ca,
                tls_client_cert_file=None if own is None else own[0],
                tls_client_key_file=None if own is None else own[1],
            ) as client:
                with pytest.raises(Unreachable):
                    await client.ready(timeout_s=5)


async def test_the_command_line_shows_its_certificate(
    gateway_with: GatewayFactory, files: Files, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--token", token, "--tls-cert", str(files.ca)]
    own = ["--tls-client-cert", str(files.client[0]), "--tls-client-key", str(files.client[1])]

    async def motley(*arguments: str) -> Any:
        return await asyncio.to_thread(CliRunner().invoke, app, arguments)

    async with gateway_with(**files.settings) as gateway:
        url, target = ["--url", gateway.http_url], ["--target", gateway.grpc_target]
        status = await motley("status", *url, *flags, *own, "--json")
        answer = await motley(
            "generate", "ab", "--max-tokens", "16", *target, *flags, *own, "--json"
        )
        without = await motley("status", *url, *flags)
        half = await motley("status", *url, *flags, *own[:2])
        monkeypatch.setenv("MOTLEY_TLS_CLIENT_CERT", own[1])
        monkeypatch.setenv("MOTLEY_TLS_CLIENT_KEY", own[3])
        by_environment = await motley("status", *url, *flags, "--json")

    assert json.loads(status.stdout)["ready"] is True
    assert json.loads(answer.stdout)["text"] == "Hi there"
    assert without.exit_code == 4
    assert half.exit_code == 2
    assert "come together" in half.output
    assert by_environment.exit_code == 0


async def test_half_of_a_clients_files_are_refused(files: Files) -> None:
    with pytest.raises(ValueError, match="come together"):
        MotleyClient("x:1", "t", tls_ca_file=files.ca, tls_client_cert_file=files.client[0])
    with pytest.raises(ValueError, match="needs tls_ca_file"):
        MotleyClient(
            "x:1",
            "t",
            tls_client_cert_file=files.client[0],
            tls_client_key_file=files.client[1],
        )


async def test_an_authority_without_tls_is_refused(files: Files) -> None:
    with pytest.raises(ValueError, match="tls_client_ca_file is set without tls_cert_file"):
        GatewaySettings(tls_client_ca_file=files.ca)


async def test_an_unusable_authority_is_named(
    backend: FakeBackend, tokenizer: Tokenizer, files: Files, tmp_path: Path, token: str
) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate", encoding="utf-8")
    settings = GatewaySettings(
        http_port=0, grpc_port=0, **(files.settings | {"tls_client_ca_file": bad})
    )

    with pytest.raises(ValueError, match="tls_client_ca_file cannot be used"):
        await serve(backend, tokenizer, settings, token)
