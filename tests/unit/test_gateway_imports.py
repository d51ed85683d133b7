"""Which modules of the front door stay light, each in an interpreter of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("cluster.client", {"torch", "ray", "transformers", "fastapi", "uvicorn", "tokenizers"}),
        ("cluster.gateway.tokenizer", {"torch", "ray", "transformers", "grpc", "fastapi"}),
        ("cluster.gateway.service", {"torch", "ray", "transformers", "grpc", "fastapi"}),
        ("cluster.gateway.dashboard, cluster.trainstate", {"torch", "ray", "grpc", "fastapi"}),
        ("cluster.gateway.server", {"torch", "ray", "transformers"}),
        (
            "cluster.gateway.settings, cluster.gateway.auth, cluster.gateway.access, cluster.keys, "
            "cluster.audit, cluster.rates, cluster.commands.keys",
            {"torch", "ray", "grpc", "fastapi", "tokenizers"},
        ),
    ],
)
def test_a_module_loads_without(modules: str, heavy: set[str]) -> None:
    code = f"import sys, {modules}; found = {heavy!r} & set(sys.modules); assert not found, found"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
