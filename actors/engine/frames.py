"""Tensors as bytes: a small description and the raw buffer, checked before anything is allocated.

A description is msgpack of [version, dtype word, shape]. Decoding shares the received buffer.
"""

from __future__ import annotations

import math
import warnings

import msgpack
import torch

from actors.engine.packed import unpack

VERSION = 1
MAX_DIMENSIONS = 4
_MAX_NUMEL = 2**48
"""Of the sizes above 0, multiplied: more cannot be sent, and would overflow an empty tensor."""
_MOST_DESCRIPTION_BYTES = 64
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WORDS = {dtype: word for word, dtype in _DTYPES.items()}


class FrameError(ValueError):
    """A frame whose description and bytes do not agree."""


def encode_tensor(tensor: torch.Tensor) -> tuple[bytes, memoryview]:
    """Return (description, bytes); the bytes share memory with a contiguous CPU tensor."""
    word = _WORDS.get(tensor.dtype)
    if word is None:
        raise FrameError(f"tensors of {tensor.dtype} are not sent; use one of {sorted(_DTYPES)}")
    if tensor.dim() > MAX_DIMENSIONS:
        raise FrameError(f"shape {tuple(tensor.shape)} is not sent; at most {MAX_DIMENSIONS} sizes")
    flat = tensor.detach().contiguous().cpu()
    description = msgpack.packb([VERSION, word, list(tensor.shape)])
    return description, memoryview(flat.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def decode_tensor(description: bytes | memoryview, data: memoryview) -> torch.Tensor:
    """Return the tensor; it shares memory with `data` and must not be written.

    Raises:
        FrameError: Unknown version or type, a bad shape, or bytes that do not fill it.
    """
    try:
        # Bounded, so that what it says can be repeated in an error.
        version, word, shape = unpack(description, max_bytes=_MOST_DESCRIPTION_BYTES)
    except (ValueError, TypeError) as error:
        raise FrameError(f"malformed tensor description: {error}") from error
    if version != VERSION:
        raise FrameError(f"frame version {version!r}; this side speaks {VERSION}")
    dtype = _DTYPES.get(word) if isinstance(word, str) else None
    if dtype is None:
        raise FrameError(f"unknown tensor type {word!r}; known: {sorted(_DTYPES)}")
    if not _is_shape(shape):
        raise FrameError(
            f"bad tensor shape {shape!r}; at most {MAX_DIMENSIONS} sizes, none below 0, and no "
            f"more than {_MAX_NUMEL} elements"
        )
    expected_bytes = math.prod(shape) * dtype.itemsize
    if expected_bytes != data.nbytes:
        raise FrameError(f"shape {shape} of {word} needs {expected_bytes} bytes, got {data.nbytes}")
    if expected_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(shape)


def _is_shape(shape: object) -> bool:
    return (
        isinstance(shape, list)
        and len(shape) <= MAX_DIMENSIONS
        and all(
            isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape
        )
        and math.prod(size for size in shape if size) <= _MAX_NUMEL
    )


# torch warns once a process that a received buffer is read-only. It stays so: a stage copies
# before it computes in place.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(bytes(1), dtype=torch.uint8)
