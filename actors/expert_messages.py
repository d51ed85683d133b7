"""Messages between a stage and expert workers, and between the workers of a node.

A call is [kind, ExpertCall, tensors], its answer [ROWS, number, tensor] or [REFUSED, (number, why,
whether another map may help)]. A tensor is two parts (see `actors.engine.frames`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgpack
import torch

from actors import wire
from actors.engine.expert_calls import ExpertCall
from actors.engine.frames import decode_tensor, encode_tensor
from actors.engine.packed import is_whole, unpack

TENSORS_OF = {wire.EXPERTS: 1, wire.EXPERT_GRADIENTS: 2, wire.ROW_GRADIENTS: 2}
"""Rows; and for gradients (of rows and weights, or of rows alone) those of the result too. All
(S, H)."""
_MOST_TEXT_BYTES = 4096
_MOST_NUMBER = 2**63 - 1


class Answer(NamedTuple):
    """What came back of a call."""

    number: int
    rows_SH: torch.Tensor | None
    """None: it was refused."""
    refusal: str = ""
    is_of_map: bool = False
    """Of a refusal: another map may help."""


def call_message(
    kind: bytes, call: ExpertCall, tensors: Sequence[torch.Tensor]
) -> list[bytes | memoryview]:
    encoded = [part for tensor in tensors for part in encode_tensor(tensor)]
    return [kind, call.encode(), *encoded]


def take_tensors(parts: Sequence[memoryview], call: ExpertCall) -> list[torch.Tensor]:
    """Return a call's tensors; they share the message's memory and must not be written.

    Raises:
        ValueError: Too few or too many, malformed, or not one row for each that the call counts.
    """
    expected = TENSORS_OF[bytes(parts[0])]
    if len(parts) != 2 + 2 * expected:
        raise ValueError(f"{len(parts)} parts where {2 + 2 * expected} belong")
    tensors = [decode_tensor(parts[i], parts[i + 1]) for i in range(2, len(parts), 2)]
    for tensor in tensors:
        if tensor.dim() != 2 or tensor.shape[0] != call.num_rows:
            raise ValueError(
                f"rows of shape {tuple(tensor.shape)} where the call counts {call.num_rows}"
            )
    return tensors


def answer_message(number: int, rows_SH: torch.Tensor) -> list[bytes | memoryview]:
    return [wire.ROWS, msgpack.packb(number), *encode_tensor(rows_SH)]


def refusal_message(number: int, why: str, *, is_of_map: bool) -> list[bytes | memoryview]:
    return [wire.REFUSED, msgpack.packb([number, why[: _MOST_TEXT_BYTES // 4], is_of_map])]


def take_answer(parts: Sequence[memoryview]) -> Answer:
    """Return an answer; raises ValueError when it is none, or malformed."""
    kind = bytes(parts[0][:64])
    if kind == wire.ROWS and len(parts) == 4:
        number = unpack(parts[1], max_bytes=64)
        answer = Answer(number, decode_tensor(parts[2], parts[3]))
    elif kind == wire.REFUSED and len(parts) == 2:
        value = unpack(parts[1], max_bytes=_MOST_TEXT_BYTES)
        if not isinstance(value, list) or [type(each) for each in value[1:]] != [str, bool]:
            raise ValueError("a refusal out of place")
        answer = Answer(value[0], None, *value[1:])
    else:
        raise ValueError(f"{kind!r} of {len(parts)} parts is no answer")
    if not is_whole(answer.number, high=_MOST_NUMBER):
        raise ValueError("an answer without its number")
    return answer
