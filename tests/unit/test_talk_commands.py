"""`generate` and `chat` against a real gateway on loopback, over a backend that is not there."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner, Result

from cluster.backend import Overloaded, Unavailable
from cluster.cli import app

if TYPE_CHECKING:
    from cluster.gateway.server import GatewayHandle
    from tests.unit.conftest import FakeBackend

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTLEY_HOME", str(tmp_path))


@pytest.fixture(autouse=True)
def reach(monkeypatch: pytest.MonkeyPatch, gateway: GatewayHandle, token: str) -> None:
    monkeypatch.setenv("MOTLEY_TARGET", gateway.grpc_target)
    monkeypatch.setenv("MOTLEY_URL", gateway.http_url)
    monkeypatch.setenv("MOTLEY_TOKEN", token)


async def motley(*arguments: str, stdin: str | None = None) -> Result:
    # The gateway runs in this thread's loop, so the blocking client needs a thread of its own.
    return await asyncio.to_thread(CliRunner().invoke, app, arguments, input=stdin)


async def generate(*arguments: str, stdin: str | None = None) -> Result:
    return await motley("generate", "--max-tokens", "20", *arguments, stdin=stdin)


async def test_generate_streams_the_text_and_says_what_it_cost(backend: FakeBackend) -> None:
    result = await generate("Say", "--seed", "3", "--temperature", "0", "--stop", "zz")

    assert result.exit_code == 0
    assert result.stdout == "Hi there\n"
    assert "9 tokens in" in result.stderr
    [request] = backend.requests
    assert bytes(request.prompt) == b"Say"
    assert (request.sampling.seed, request.sampling.temperature) == (3, 0.0)
    assert request.sampling.stop == ("zz",)


async def test_generate_reads_the_prompt_from_stdin(backend: FakeBackend) -> None:
    result = await generate("-", stdin="from a pipe")

    assert result.exit_code == 0
    assert bytes(backend.requests[0].prompt) == b"from a pipe"


async def test_generate_as_json_is_one_document(backend: FakeBackend) -> None:
    result = await motley("generate", "Say", "--json", "--max-tokens", "2", "--top-p", "0.5")

    value = json.loads(result.stdout)
    assert (value["text"], value["finish_reason"]) == ("Hi", "length")
    assert value["usage"]["completion_tokens"] == 2
    assert value["tokens_per_s"] > 0
    assert backend.requests[0].sampling.top_p == 0.5


async def test_a_wrong_token_exits_6(backend: FakeBackend) -> None:
    generated = await motley("generate", "Say", "--token", "wrong-token")
    asked = await motley("status", "--token", "wrong-token")

    assert (generated.exit_code, asked.exit_code) == (6, 6)
    assert "set --token or MOTLEY_TOKEN" in generated.stderr


async def test_a_busy_or_loading_deployment_exits_5(backend: FakeBackend) -> None:
    backend.refusal = Overloaded("2 lanes are full", 1.0)
    assert (await generate("Say")).exit_code == 5
    backend.refusal = Unavailable("stage 1 loads its weights", 1.0)
    assert (await generate("Say")).exit_code == 5


async def test_a_request_that_cannot_be_served_exits_2(backend: FakeBackend) -> None:
    result = await motley("generate", "", "--json")

    assert result.exit_code == 2


async def test_a_failure_of_the_deployment_exits_1(backend: FakeBackend) -> None:
    backend.fail_after = 1

    result = await generate("Say")

    assert result.exit_code == 1
    assert "stage 1 was lost" in result.stderr


async def test_chat_keeps_the_conversation(backend: FakeBackend) -> None:
    result = await motley("chat", "--system", "s", stdin="one\n\ntwo\n/exit\nnever\n")

    assert result.exit_code == 0
    assert result.stdout.count("Hi there\n") == 2
    prompts = [bytes(request.prompt).decode() for request in backend.requests]
    assert prompts == ["s:s\nu:one\na:", "s:s\nu:one\na:Hi there\nu:two\na:"]


async def test_chat_ends_with_its_input_and_speaks_json(backend: FakeBackend) -> None:
    result = await motley("chat", "--json", stdin="one\ntwo\n")

    assert result.exit_code == 0
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["text"] for answer in answers] == ["Hi there", "Hi there"]


async def test_status_shows_the_stages_of_a_real_gateway(backend: FakeBackend) -> None:
    shown = await motley("status")
    value = await motley("status", "--json")

    assert shown.exit_code == 0
    assert "gpu0" in shown.stdout
    assert [stage["device"] for stage in json.loads(value.stdout)["stages"]] == ["gpu0", "cpu0"]


async def test_status_of_a_loading_deployment_exits_5_after_showing_it(
    backend: FakeBackend,
) -> None:
    backend.is_ready = False

    result = await motley("status", "--json")

    assert result.exit_code == 5
    assert json.loads(result.stdout)["reason"] == "stage 1 loads its weights"
