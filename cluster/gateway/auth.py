"""The bearer token: how it is made, read and compared. Loads without grpc or fastapi."""

from __future__ import annotations

import hmac
import secrets
from pathlib import Path

MIN_TOKEN_CHARACTERS = 8


def new_token() -> str:
    """Return a fresh token of 256 random bits."""
    return secrets.token_urlsafe(32)


def read_token(path: Path) -> str:
    """Read the token from a file; blanks around it are dropped."""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"token_file {path} cannot be read: {error}") from None
    check_token(token, source=f"the token in {path}")
    return token


def check_token(token: str, *, source: str = "the token") -> None:
    """Raise `ValueError` for a token that could not travel in a header, or is easy to guess."""
    if len(token) < MIN_TOKEN_CHARACTERS:
        raise ValueError(
            f"{source} has {len(token)} characters; at least {MIN_TOKEN_CHARACTERS} are needed"
        )
    if not all("!" <= character <= "~" for character in token):
        raise ValueError(f"{source} may hold visible ASCII characters only, without blanks")


class BearerAuth:
    """Holds the token of a deployment and judges `authorization` values against it."""

    def __init__(self, token: str) -> None:
        check_token(token)
        self._token = token.encode("ascii")

    def accepts(self, authorization: str | bytes | None) -> bool:
        """Whether the value is `Bearer <token>`; takes the same time for every wrong token."""
        credential = credential_of(authorization)
        return credential is not None and hmac.compare_digest(credential, self._token)


def credential_of(authorization: str | bytes | None) -> bytes | None:
    """Return what follows `Bearer`; None for anything else."""
    if authorization is None:
        return None
    if isinstance(authorization, str):
        authorization = authorization.encode("utf-8", "surrogateescape")
    scheme, _, credential = authorization.partition(b" ")
    return credential.strip() if scheme.lower() == b"bearer" else None
