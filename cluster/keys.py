"""The keys of a deployment's clients: who may do what, how often, and how a key is recognised.

A file holds one JSON object a line for each key, with a salted SHA-256 of it and never the key: a
key has 256 random bits, so nothing slower is needed against guessing. A key reads
`mk-<id>-<secret>`; the id is public and finds the line. `motley keys` writes the file whole and in
one step; a gateway reads it again when it has changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_log = logging.getLogger(__name__)

Scope = Literal["generate", "train", "admin", "edge"]
"""generate: use the model. train: start and stop training. admin: change what is served, see and
end what others do. edge: bring a device into the fleet."""
SCOPES: tuple[Scope, ...] = get_args(Scope)

OWNER = "owner"
"""Whoever holds the deployment's own token; no key may be called so."""

_PREFIX = "mk"
_ID_BYTES = 8
_SALT_BYTES = 16
_MOST_FILE_BYTES = 16 * 2**20


class KeysError(ValueError):
    """The keys file, or what is asked of it, cannot be used."""


class ClientKey(BaseModel):
    """One client's key, as the file holds it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    id: str = Field(pattern=r"^[0-9a-f]{16}$")
    salt: str = Field(pattern=r"^[0-9a-f]{32}$", repr=False)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    scopes: tuple[Scope, ...] = Field(min_length=1, strict=False)
    requests_per_minute: int | None = Field(None, ge=1)
    """Calls of any kind; None: no limit, as with the next two."""
    tokens_per_minute: int | None = Field(None, ge=1)
    """Prompt and output together."""
    concurrent_requests: int | None = Field(None, ge=1)
    """Calls that are open at a time, and prompts that run at a time."""
    created: str

    def matches(self, secret: bytes) -> bool:
        """Whether this is the key's secret; takes the same time for every wrong one."""
        return hmac.compare_digest(_digest(bytes.fromhex(self.salt), secret), self.sha256)


def _digest(salt: bytes, secret: bytes) -> str:
    return hashlib.sha256(salt + secret).hexdigest()


def new_key(
    name: str,
    scopes: Sequence[str],
    *,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
    concurrent_requests: int | None = None,
) -> tuple[ClientKey, str]:
    """Return a fresh key as the file holds it, and as its client does."""
    if name == OWNER:
        raise KeysError(f"`{OWNER}` names the holder of the deployment's token; choose another")
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown:
        raise KeysError(f"there is no scope {unknown[0]}; scopes: {', '.join(SCOPES)}")
    key_id, secret = secrets.token_hex(_ID_BYTES), secrets.token_urlsafe(32)
    salt = secrets.token_bytes(_SALT_BYTES)
    try:
        key = ClientKey(
            name=name,
            id=key_id,
            salt=salt.hex(),
            sha256=_digest(salt, secret.encode("ascii")),
            scopes=tuple(scope for scope in SCOPES if scope in scopes),
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrent_requests=concurrent_requests,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
    except ValidationError as error:
        raise KeysError(_first(error)) from None
    return key, f"{_PREFIX}-{key_id}-{secret}"


def read_keys(path: Path) -> tuple[ClientKey, ...]:
    """Return the keys of a file; one that does not exist holds none.

    Raises:
        KeysError: It cannot be read, or a line is no key.
    """
    try:
        if path.stat().st_size > _MOST_FILE_BYTES:
            raise KeysError(f"{path} has more than {_MOST_FILE_BYTES} bytes; is it a keys file?")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise KeysError(f"{path} cannot be read: {error}") from None
    keys: list[ClientKey] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            keys.append(ClientKey.model_validate_json(line))
        except ValidationError as error:
            raise KeysError(f"{path}, line {number}: {_first(error)}") from None
    for what in ("name", "id"):
        values = [getattr(key, what) for key in keys]
        if len(set(values)) < len(values):
            raise KeysError(f"{path}: a key's {what} is there twice; keep one")
    return tuple(keys)


def add_key(path: Path, key: ClientKey) -> None:
    """Write a key beside those of the file; raises `KeysError` when its name is taken."""
    with _locked(path):
        keys = read_keys(path)
        if any(each.name == key.name for each in keys):
            raise KeysError(
                f"{path} has a key called {key.name}; revoke it with `motley keys revoke "
                f"{key.name}`, or choose another name"
            )
        _write(path, (*keys, key))


def remove_key(path: Path, name: str) -> ClientKey:
    """Take a key out of the file and return it; raises `KeysError` when there is none."""
    with _locked(path):
        keys = read_keys(path)
        for key in keys:
            if key.name == name:
                _write(path, [each for each in keys if each is not key])
                return key
    names = ", ".join(key.name for key in keys) or "none"
    raise KeysError(f"{path} has no key called {name}; it has {names}")


class KeyRing:
    """A keys file as a gateway uses it: every call sees the file as it is then."""

    def __init__(self, path: Path) -> None:
        """Raises `KeysError` for a file that cannot be used; it may come to exist later."""
        self._path = path
        self._seen = self._stamp()
        self._keys = {key.id: key for key in read_keys(path)}
        self._nobody, _ = new_key("nobody", SCOPES)

    def find(self, credential: bytes) -> ClientKey | None:
        """Return the key that a client presents, or None for one that is not in the file."""
        self._refresh()
        prefix, _, rest = credential.partition(b"-")
        key_id, _, secret = rest.partition(b"-")
        # An id that is not there costs the same comparison.
        key = self._keys.get(key_id.decode("ascii", "replace"), self._nobody)
        is_right = key.matches(secret) and prefix == _PREFIX.encode("ascii")
        return key if is_right and key is not self._nobody else None

    def _refresh(self) -> None:
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._keys = {key.id: key for key in read_keys(self._path)}
        except KeysError as error:
            _log.error("%s; the %d keys read before stay valid", error, len(self._keys))
        else:
            _log.info("%s has %d keys now", self._path, len(self._keys))

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep two writers of one file from undoing each other's work."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, keys: Sequence[ClientKey]) -> None:
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        for key in keys:
            file.write(json.dumps(key.model_dump(exclude_none=True)) + "\n")
        file.flush()
        os.fsync(descriptor)
    draft.replace(path)


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"{where}: {problem['msg']}" if where else problem["msg"]
