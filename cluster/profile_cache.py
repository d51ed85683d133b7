"""Measured profiles on disk: the cache below `$MOTLEY_HOME/profiles`, and files.

A cached device is known by its node's host name, kind, index and name, by the checkpoint's
fingerprint, the number format, and the versions that measured it. Files are written whole or not
at all.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from cluster.config import ConfigError
from cluster.runstate import run_folder
from placement.profiles import (
    DeviceProfile,
    LinkProfile,
    Profile,
    device_from_json,
    link_from_json,
    plain_json,
)
from placement.topology import DeviceKind

_VERSIONED = ("motley", "torch", "transformers")
# What a checkpoint's configuration says about its history and not about its shapes.
_HISTORY = ("_name_or_path", "transformers_version")

T = TypeVar("T")


def fingerprint(checkpoint_config: Mapping[str, Any]) -> str:
    """Return what identifies a checkpoint's layers: its configuration, whatever its weights."""
    told = {name: value for name, value in checkpoint_config.items() if name not in _HISTORY}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def own_versions() -> dict[str, str]:
    """Return the versions whose measurements may be used here."""
    versions = {}
    for package in _VERSIONED:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "source"  # run from its checkout
    return versions


# --- files ------------------------------------------------------------------------------------


def read_profile(path: Path | str, checkpoint_fingerprint: str) -> Profile:
    """Read a file that `motley profile --output` wrote.

    Raises:
        ConfigError: Unreadable, damaged, or the profile of another checkpoint.
    """
    profile = _read(Path(path), Profile.from_json)
    if profile.fingerprint != checkpoint_fingerprint:
        raise ConfigError(
            f"{path}: is a profile of {profile.checkpoint} ({profile.fingerprint}), not of this "
            f"checkpoint ({checkpoint_fingerprint}); measure it with `motley profile --output`"
        )
    return profile


def write_profile(path: Path | str, profile: Profile) -> None:
    """Write a profile, whole or not at all."""
    _write(Path(path), profile.to_json())


def _read(path: Path, parse: Callable[[object, str], T]) -> T:
    advice = "delete it, or measure again with `motley profile --refresh`"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        wanted = "name a file that `motley profile --output` wrote"
        raise ConfigError(f"{path}: cannot be read ({error}); {wanted}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is damaged, no JSON ({error}); {advice}") from None
    try:
        return parse(value, str(path))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _write(path: Path, value: Mapping[str, Any]) -> None:
    # allow_nan: a NaN is a defect of the measuring and must not reach the disk.
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error}); name another place") from None
    finally:
        if draft.is_file():
            draft.unlink()


# --- the cache --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceKey:
    """Which device, computing how, measured with what."""

    host: str
    kind: DeviceKind
    index: int
    name: str
    dtype: str
    threads: int
    versions: Mapping[str, str]

    @classmethod
    def of(cls, device: DeviceProfile) -> DeviceKey:
        return cls(**{name: getattr(device, name) for name in cls.__slots__})

    @property
    def file_name(self) -> str:
        versions = [f"{name} {version}" for name, version in sorted(self.versions.items())]
        return _file_name(
            self.host,
            f"{self.kind}{self.index}",
            self.name,
            self.dtype,
            f"{self.threads} threads",
            *versions,
        )


@dataclass(frozen=True)
class ProfileCache:
    """The measured devices of one checkpoint, and the measured links."""

    fingerprint: str

    @cached_property
    def folder(self) -> Path:
        return run_folder().parent / "profiles"

    def devices(self) -> list[DeviceProfile]:
        """Return every device measured with the versions in use, the latest first."""
        found = [_read(path, device_from_json) for path in _latest(self._device_folder)]
        versions = own_versions()
        return [device for device in found if device.versions == versions]

    def find(self, key: DeviceKey) -> DeviceProfile | None:
        """Return what was measured of a device."""
        path = self._device_folder / key.file_name
        return _read(path, device_from_json) if path.exists() else None

    def store(self, device: DeviceProfile) -> None:
        """Keep a device; one that was measured before is replaced."""
        _write(self._device_folder / DeviceKey.of(device).file_name, plain_json(device))

    def links(self) -> list[LinkProfile]:
        """Return every measured link, the latest first."""
        return [_read(path, link_from_json) for path in _latest(self.folder / "links")]

    def store_link(self, link: LinkProfile) -> None:
        """Keep a link; one that was measured before is replaced."""
        name = _file_name(*link.source_names[:1], *link.target_names[:1])
        _write(self.folder / "links" / name, plain_json(link))

    @property
    def _device_folder(self) -> Path:
        return self.folder / self.fingerprint


def _latest(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"), key=lambda path: (-path.stat().st_mtime_ns, path.name))


def _file_name(*words: str) -> str:
    """A name to recognise, and a digest that tells apart what a file name cannot hold."""
    digest = hashlib.sha256(json.dumps(words).encode()).hexdigest()[:12]
    shown = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(words[:2]))
    return f"{shown}-{digest}.json"
