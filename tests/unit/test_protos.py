"""The committed stubs are what the sources generate, and the conventions hold."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor

from protos import motley_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]
STUBS = ("motley_pb2.py", "motley_pb2.pyi", "motley_pb2_grpc.py", "motley_pb2_grpc.pyi")


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stubs made afresh, as `poe protos` makes them."""
    folder = tmp_path_factory.mktemp("protos")
    (folder / "protos").mkdir()
    shutil.copy(ROOT / "protos" / "motley.proto", folder / "protos")
    outputs = [f"--{kind}_out=." for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    scripts = str(Path(sys.executable).parent)  # where protoc finds protoc-gen-mypy
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *outputs, "protos/motley.proto"],
        cwd=folder,
        env=os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"},
        check=True,
        capture_output=True,
    )
    return folder / "protos"


@pytest.mark.parametrize("name", STUBS)
def test_committed_stubs_are_up_to_date(generated: Path, name: str) -> None:
    committed = (ROOT / "protos" / name).read_bytes()

    assert (generated / name).read_bytes() == committed, "run `poe protos` and commit the stubs"


def test_the_zero_of_every_enum_is_unspecified() -> None:
    enums = pb.DESCRIPTOR.enum_types_by_name.values()

    assert enums
    assert all(enum.values_by_number[0].name.endswith("_UNSPECIFIED") for enum in enums)


def test_every_single_sampling_field_knows_whether_it_was_given() -> None:
    fields = pb.SamplingOptions.DESCRIPTOR.fields

    assert all(field.has_presence for field in fields if not field.is_repeated)
    assert {field.name for field in fields if field.is_repeated} == {"stop", "stop_token_ids"}
    assert all(field.type != FieldDescriptor.TYPE_FLOAT for field in fields)
