"""Tensors as numpy arrays, which Ray keeps in shared memory and reads without a copy.

numpy has no bfloat16: such values travel as their 16 bits, and the reader names the type.
"""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.generic]


def to_array(tensor: torch.Tensor) -> Array:
    """Return the values; they share memory with a contiguous CPU tensor."""
    flat = tensor.detach().contiguous().cpu()
    if flat.dtype == torch.bfloat16:
        flat = flat.view(torch.int16)
    array: Array = flat.numpy()
    return array


def as_tensor(array: Array, dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor that `to_array` was given; it shares the array's memory.

    Shared memory is read-only: who gets the tensor must not write to it.
    """
    with warnings.catch_warnings():
        # torch warns of arrays that may not be written; the docstring passes the warning on.
        warnings.simplefilter("ignore")
        tensor = torch.from_numpy(array)
    return tensor.view(dtype) if dtype == torch.bfloat16 else tensor
