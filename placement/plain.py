"""Frozen dataclasses to plain JSON values and back, by their annotations.

Covers what events and commands are made of: numbers, text, None, tuples, arrays of numbers,
mappings by text, unions with None, and dataclasses of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

T = TypeVar("T")


def to_plain(value: object) -> Any:
    """Return a value as plain JSON."""
    if is_dataclass(value):
        return {part.name: to_plain(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(part) for part in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


def from_plain(kind: type[T], value: object) -> T:
    """Rebuild what `to_plain` wrote.

    Raises:
        ValueError: A key is unknown or missing, or a value is of another type; names where.
    """
    built: T = _build(kind, value, kind.__name__)
    return built


def _build(kind: Any, value: object, at: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        [inner] = [argument for argument in arguments if argument is not NoneType]
        return _build(inner, value, at)
    if origin is np.ndarray:
        return _build_array(get_args(arguments[1])[0], value, at)
    if origin is tuple:
        return _build_tuple(arguments, value, at)
    if origin is not None and _is_mapping(origin):
        tree = _mapping(value, at)
        return {key: _build(arguments[1], part, f"{at}.{key}") for key, part in tree.items()}
    if is_dataclass(kind):
        return _build_dataclass(kind, value, at)
    return _check_scalar(kind, value, at)


def _is_mapping(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _build_tuple(arguments: tuple[Any, ...], value: object, at: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{at} is {type(value).__name__}, not a list")
    kinds = arguments
    if arguments[-1] is ...:
        kinds = (arguments[0],) * len(value)
    if len(kinds) != len(value):
        raise ValueError(f"{at} has {len(value)} entries; it must have {len(kinds)}")
    return tuple(
        _build(kind, part, f"{at}[{index}]")
        for index, (kind, part) in enumerate(zip(kinds, value, strict=True))
    )


def _build_array(dtype: Any, value: object, at: str) -> Any:
    built = None
    if isinstance(value, list):
        try:
            built = np.array(value)
        except ValueError:  # its rows are of unequal length
            built = None
    if built is None or not np.can_cast(built.dtype, dtype, "same_kind"):
        raise ValueError(f"{at} is no array of {np.dtype(dtype).name}")
    return built.astype(dtype)


def _build_dataclass(kind: Any, value: object, at: str) -> Any:
    tree, hints = _mapping(value, at), _hints(kind)
    if unknown := sorted(tree.keys() - hints.keys()):
        raise ValueError(f"{at} has unknown keys {unknown}; known keys: {', '.join(hints)}")
    needed = {p.name for p in fields(kind) if p.default is MISSING and p.default_factory is MISSING}
    if missing := sorted(needed - tree.keys()):
        raise ValueError(f"{at} lacks {', '.join(missing)}")
    return kind(**{name: _build(hints[name], part, f"{at}.{name}") for name, part in tree.items()})


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {part.name: hints[part.name] for part in fields(kind)}


def _mapping(value: object, at: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{at} is {type(value).__name__}, not keys with values")
    return value


def _check_scalar(kind: Any, value: object, at: str) -> Any:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{at} ({value!r}) must be one of {', '.join(get_args(kind))}")
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        # Infinity is not JSON; no steering value means it.
        if math.isfinite(value):
            return float(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{at} ({value!r}) must be {kind.__name__}")
