"""Gateway settings and the bearer token."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from cluster.gateway.auth import BearerAuth, check_token, new_token, read_token
from cluster.gateway.settings import GatewaySettings, is_loopback


def test_defaults_stay_on_loopback() -> None:
    settings = GatewaySettings()

    assert (settings.host, settings.http_port, settings.grpc_port) == ("127.0.0.1", 8000, 8001)
    assert settings.max_request_bytes == 4 * 1024 * 1024
    assert not settings.insecure_plaintext


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]"])
def test_loopback_hosts_need_no_tls(host: str) -> None:
    assert is_loopback(host)
    assert GatewaySettings(host=host).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "gateway.example", "localhost.evil"])
def test_other_hosts_are_refused_in_plaintext_unless_told(host: str) -> None:
    with pytest.raises(ValidationError, match=r"insecure_plaintext: true"):
        GatewaySettings(host=host)

    assert GatewaySettings(host=host, insecure_plaintext=True).host == host
    tls = GatewaySettings(host=host, tls_cert_file=Path("c"), tls_key_file=Path("k"))
    assert tls.uses_tls


@pytest.mark.parametrize("name", ["tls_cert_file", "tls_key_file"])
def test_half_of_tls_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=f"{name} is set without tls_"):
        GatewaySettings.model_validate({name: "x.pem"})


@pytest.mark.parametrize(
    "values",
    [
        {"http_port": -1},
        {"grpc_port": 65536},
        {"max_request_bytes": 10},
        {"host": ""},
        {"prot": 1},
    ],
)
def test_bad_settings_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        GatewaySettings.model_validate(values)


def test_a_token_is_read_from_a_file_without_its_line_end(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("0123456789abcdef\n", encoding="utf-8")

    assert read_token(path) == "0123456789abcdef"


def test_an_unreadable_token_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"token_file .*absent cannot be read"):
        read_token(tmp_path / "absent")


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "has 0 characters; at least 8"),
        ("short", "has 5 characters; at least 8"),
        ("with a blank", "visible ASCII"),
        ("line\nbreak", "visible ASCII"),
        ("ümläut-token", "visible ASCII"),
    ],
)
def test_tokens_that_could_not_travel_are_refused(token: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_token(token)


def test_new_tokens_are_fresh_and_valid() -> None:
    first, second = new_token(), new_token()

    check_token(first)
    assert first != second
    assert len(first) >= 43


@pytest.mark.parametrize("value", ["Bearer 12345678", "bearer 12345678", b"Bearer 12345678"])
def test_the_right_token_is_accepted(value: str | bytes) -> None:
    assert BearerAuth("12345678").accepts(value)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "12345678",
        "Bearer",
        "Bearer ",
        "Bearer 1234567",
        "Bearer 123456789",
        "Basic 12345678",
        "Bearer 1234567\udcff",
        b"Bearer \xff\xfe",
    ],
)
def test_anything_else_is_not(value: str | bytes | None) -> None:
    assert not BearerAuth("12345678").accepts(value)
