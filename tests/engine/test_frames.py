"""Tensors cross as they are; a description that lies about its bytes is refused, and only so."""

from __future__ import annotations

import contextlib
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from actors.engine.frames import VERSION, FrameError, decode_tensor, encode_tensor

pytestmark = pytest.mark.engine

DTYPES = ("float32", "bfloat16", "float16")
SHAPES = ((), (1,), (7,), (0,), (3, 0), (0, 5), (4, 6), (2, 3, 5), (2, 1, 3, 4))


def description(version: Any = VERSION, word: Any = "float32", shape: Any = (2, 2)) -> bytes:
    data: bytes = msgpack.packb([version, word, shape])
    return data


def over_the_wire(tensor: torch.Tensor) -> torch.Tensor:
    head, data = encode_tensor(tensor)
    return decode_tensor(memoryview(head), memoryview(bytes(data)))


@pytest.mark.parametrize("word", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tensor_survives_the_wire(word: str, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape).to(getattr(torch, word))

    got = over_the_wire(tensor)

    assert got.dtype == tensor.dtype
    assert got.shape == tensor.shape
    assert torch.equal(got, tensor)


@pytest.mark.parametrize("word", DTYPES)
def test_every_bit_survives_even_of_what_is_no_number(word: str) -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 6e-8]).to(
        getattr(torch, word)
    )

    assert bytes(encode_tensor(over_the_wire(tensor))[1]) == bytes(encode_tensor(tensor)[1])


def test_views_are_sent_as_what_they_show() -> None:
    base = torch.arange(24, dtype=torch.float32).view(4, 6)

    for view in (base.t(), base[:, ::2], base[1:3], base[0].expand(5, 6), base[:, 3]):
        assert torch.equal(over_the_wire(view), view)


def test_a_tensor_that_needs_a_gradient_is_sent_without_it() -> None:
    got = over_the_wire(torch.ones(2, 2, requires_grad=True))

    assert not got.requires_grad


def test_bytes_are_shared_on_both_sides() -> None:
    tensor = torch.zeros(3)
    head, data = encode_tensor(tensor)
    tensor[1] = 5.0

    received = bytearray(data)
    got = decode_tensor(head, memoryview(received))
    received[0:4] = torch.tensor([7.0]).numpy().tobytes()

    assert got.tolist() == [7.0, 5.0, 0.0]


def test_a_buffer_at_an_odd_address_is_read() -> None:
    head, data = encode_tensor(torch.tensor([1.0, 2.0]))

    got = decode_tensor(head, memoryview(b"x" + bytes(data))[1:])

    assert got.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64, torch.complex64])
def test_a_type_that_is_not_sent_is_refused_by_the_sender(dtype: torch.dtype) -> None:
    with pytest.raises(FrameError, match=f"{dtype} are not sent; use one of .*bfloat16"):
        encode_tensor(torch.zeros(2, dtype=dtype))


def test_too_many_dimensions_are_refused_by_the_sender_too() -> None:
    with pytest.raises(FrameError, match="at most 4"):
        encode_tensor(torch.zeros(1, 1, 1, 1, 1))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"", "malformed"),
        (b"\xc1", "malformed"),
        (description()[:-1], "malformed"),
        (description() + b"\0", "malformed"),
        (msgpack.packb(5), "malformed"),
        (msgpack.packb([1, "float32"]), "malformed"),
        (msgpack.packb([1, "float32", [4], 0]), "malformed"),
        (b"\xdd\xff\xff\xff\xff", "malformed"),
        (b"\x91" * 5000, "malformed"),
        (description(version=2), "version 2; this side speaks 1"),
        (description(version=None), "version None"),
        (description(version=[]), "version"),
        (description(word="float64"), "unknown tensor type 'float64'"),
        (description(word="__class__"), "unknown tensor type"),
        (description(word=["float32"]), "unknown tensor type"),
        (description(word=b"float32"), "unknown tensor type"),
        (description(shape=4), "bad tensor shape 4"),
        (description(shape=[4.0]), "bad tensor shape"),
        (description(shape=[True, 4]), "bad tensor shape"),
        (description(shape=[-1, -4]), "bad tensor shape"),
        (description(shape=[1, 1, 1, 1, 4]), "bad tensor shape"),
        (description(shape={"a": 4}), "bad tensor shape"),
        (description(shape=[5]), r"needs 20 bytes, got 16"),
        (description(shape=[0]), r"needs 0 bytes, got 16"),
        (description(shape=[2**24, 2**24]), r"needs \d+ bytes, got 16"),
        (description(shape=[2**62, 2**62]), "bad tensor shape"),
        (description(shape=[2**64 - 1]), "bad tensor shape"),
    ],
)
def test_a_description_that_does_not_fit_its_bytes_is_refused(head: bytes, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        decode_tensor(head, memoryview(bytes(16)))


@pytest.mark.parametrize(
    "shape",
    [[0, 2**64 - 1], [2**64 - 1, 0], [0, 2**62, 2**62], [0, *[2**31 - 1] * 3]],
    ids=str,
)
def test_an_empty_tensor_of_absurd_size_is_refused(shape: list[int]) -> None:
    with pytest.raises(FrameError, match="no more than 281474976710656 elements"):
        decode_tensor(description(shape=shape), memoryview(b""))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.sampled_from(DTYPES)
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=8,
)
DESCRIPTIONS = (
    st.binary(max_size=40)
    | VALUES.map(msgpack.packb)
    | st.builds(
        description,
        version=st.just(VERSION) | VALUES,
        word=st.sampled_from(DTYPES) | VALUES,
        shape=VALUES | st.lists(st.integers(0, 2**64 - 1), max_size=5),
    )
)


@given(DESCRIPTIONS, st.binary(max_size=16))
@settings(max_examples=300)
@example(b"\xc7\x00\xff", b"")
@example(b"\xd7\xff" + b"\xff" * 8, b"")
@example(b"\x81\x90\x00", b"")
def test_nothing_but_a_frame_error_comes_of_any_bytes(head: bytes, data: bytes) -> None:
    with contextlib.suppress(FrameError):
        tensor = decode_tensor(head, memoryview(data))
        assert tensor.numel() * tensor.element_size() == len(data)
