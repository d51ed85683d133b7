"""`motley publish` and the route behind it, over a real gateway with no deployment."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from plain_adapters import MODULE, write_adapter
from typer.testing import CliRunner, Result

from actors.engine.adapter import Adapter, AdapterError
from cluster.backend import PublishFailed, PublishInProgress, Unavailable
from cluster.cli import app
from cluster.config import ConfigError, discovering_config, load_config, with_overrides

if TYPE_CHECKING:
    from cluster.gateway.server import GatewayHandle
    from tests.unit.conftest import FakeBackend, GatewayFactory

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "deploy" / "checkpoints" / "tiny-qwen3"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "step-000100")


async def motley(handle: GatewayHandle, token: str, *arguments: str) -> Result:
    """Run `motley publish` in a thread, as the gateway shares this loop."""
    where = ("--url", handle.http_url, "--token", token)
    return await asyncio.to_thread(CliRunner().invoke, app, ["publish", *arguments, *where])


# -- the command -------------------------------------------------------------------------------


async def test_a_folder_is_published_whole(
    gateway: GatewayHandle, backend: FakeBackend, token: str, adapter: Path
) -> None:
    result = await motley(gateway, token, str(adapter), "--json")

    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert (answer["name"], answer["version"], answer["seconds"]) == ("step-000100", 1, 0.25)
    [got] = backend.published
    read = Adapter.read(adapter)
    assert got is not None
    assert (got.name, got.config, list(got.pairs)) == (read.name, read.config, [MODULE])
    assert bytes(got.bytes_of(got.pairs[MODULE].b)) == bytes(read.bytes_of(read.pairs[MODULE].b))


async def test_a_link_is_published_under_the_name_of_its_folder(
    gateway: GatewayHandle, backend: FakeBackend, token: str, adapter: Path
) -> None:
    latest = adapter.parent / "latest"
    latest.symlink_to(adapter.name)

    result = await motley(gateway, token, str(latest))

    assert "adapter step-000100 (version 1) in use after 0.25 s" in result.stdout
    assert "lanes paused for 0.00 ms" in result.stdout


async def test_removing_says_that_the_base_model_answers(
    gateway: GatewayHandle, backend: FakeBackend, token: str
) -> None:
    result = await motley(gateway, token, "--remove")

    assert result.exit_code == 0
    assert "no adapter in use" in result.stdout
    assert backend.published == [None]


@pytest.mark.parametrize("arguments", [[], ["some/folder", "--remove"]])
async def test_a_folder_or_remove_is_asked_for(
    arguments: list[str], gateway: GatewayHandle, token: str
) -> None:
    result = await motley(gateway, token, *arguments)

    assert result.exit_code == 2
    assert "name an adapter's folder, or --remove" in result.stderr


async def test_a_damaged_adapter_is_not_sent(
    gateway: GatewayHandle, backend: FakeBackend, token: str, tmp_path: Path
) -> None:
    spoilt = write_adapter(tmp_path / "spoilt", value=float("nan"))

    result = await motley(gateway, token, str(spoilt))

    assert result.exit_code == 1
    assert f"lora_A of {MODULE} holds values that are not finite" in result.stderr
    assert backend.published == []


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (AdapterError("lora_A of x has shape 3"), 2, "refused (400): lora_A of x has shape 3"),
        (PublishInProgress("another one"), 5, "cannot answer now (409): another one"),
        (Unavailable("stages are loading", 2.0), 5, "(503): stages are loading"),
        (PublishFailed("stage 1 died"), 1, "answered 500: stage 1 died"),
    ],
)
async def test_what_the_gateway_says_is_passed_on(
    error: Exception,
    exit_code: int,
    message: str,
    gateway: GatewayHandle,
    backend: FakeBackend,
    token: str,
    adapter: Path,
) -> None:
    backend.publish_error = error

    result = await motley(gateway, token, str(adapter))

    assert result.exit_code == exit_code, result.output
    assert message in result.stderr.replace("\n", " ")


async def test_a_wrong_token_is_told_before_anything_is_sent(
    gateway: GatewayHandle, backend: FakeBackend, adapter: Path
) -> None:
    result = await motley(gateway, "wrong", str(adapter))

    assert result.exit_code == 6
    assert backend.published == []


async def test_an_adapter_above_the_limit_is_refused_with_the_setting(
    gateway_with: GatewayFactory, backend: FakeBackend, token: str, tmp_path: Path
) -> None:
    large = write_adapter(tmp_path / "large", rank=64)
    async with gateway_with(max_adapter_bytes=1024) as gateway:
        result = await motley(gateway, token, str(large))
        posted = httpx.Request(
            "POST",
            f"{gateway.http_url}/v1/adapter",
            content=Adapter.read(large).encode(),
            headers={"Authorization": f"Bearer {token}"},
        )
        async with httpx.AsyncClient() as client:
            response = await client.send(posted)

    assert result.exit_code == 2
    assert "takes 1024 (gateway.max_adapter_bytes)" in result.stderr.replace("\n", " ")
    assert response.status_code == 413
    assert "1024 bytes (gateway.max_adapter_bytes)" in response.json()["error"]["message"]
    assert backend.published == []


# -- the route ---------------------------------------------------------------------------------


async def test_what_is_no_adapter_is_a_clear_400(
    http: httpx.AsyncClient, backend: FakeBackend, adapter: Path
) -> None:
    whole = Adapter.read(adapter).encode()
    for body in (b"", b"{}", whole[:-1], (adapter / "adapter_model.safetensors").read_bytes()):
        response = await http.post("/v1/adapter", content=body)
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "adapter_refused"
    assert backend.published == []


async def test_the_adapter_in_use_is_shown(
    http: httpx.AsyncClient, backend: FakeBackend, adapter: Path
) -> None:
    none: dict[str, Any] = {"name": None, "version": 0}
    assert (await http.get("/v1/models")).json()["data"][0]["adapter"] == none
    body = Adapter.read(adapter).encode()
    assert (await http.post("/v1/adapter", content=body)).status_code == 200

    used = {"name": "step-000100", "version": 1}
    assert (await http.get("/v1/models")).json()["data"][0]["adapter"] == used
    assert (await http.get("/v1/adapter")).json() == used | {"max_bytes": 2**30}
    assert (await http.delete("/v1/adapter")).json()["name"] is None


async def test_a_gateway_that_shuts_down_takes_no_adapter(
    gateway_with: GatewayFactory, backend: FakeBackend, token: str, adapter: Path
) -> None:
    headers = {"Authorization": f"Bearer {token}"}
    async with gateway_with() as gateway, httpx.AsyncClient(headers=headers) as client:
        await gateway.service.drain(0.0)
        body = Adapter.read(adapter).encode()
        response = await client.post(f"{gateway.http_url}/v1/adapter", content=body)

    assert response.status_code == 503
    assert backend.published == []


# -- `motley up` with an adapter's folder --------------------------------------------------------


async def test_an_adapters_folder_stands_for_its_base_with_the_adapter(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "tuned", base_model_name_or_path=str(BASE))

    config = discovering_config(str(folder))

    assert (config.model, config.adapter) == (str(BASE), str(folder))
    assert config.served_name == "tuned"
    again = with_overrides(config, name="mine")
    assert (again.adapter, again.served_name) == (str(folder), "mine")
    other = with_overrides(config, model=str(BASE))
    assert (other.model, other.adapter, other.served_name) == (str(BASE), None, "tiny-qwen3")


async def test_the_base_may_be_a_hub_id_or_beside_the_adapter(tmp_path: Path) -> None:
    hub = write_adapter(tmp_path / "a", base_model_name_or_path="owner/base")
    beside = write_adapter(tmp_path / "b", base_model_name_or_path="../base")
    (tmp_path / "base").mkdir()

    assert discovering_config(str(hub)).model == "owner/base"
    assert discovering_config(str(beside)).model == str(tmp_path / "base")


async def test_a_file_names_the_adapter_as_the_model_or_beside_it(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "tuned", base_model_name_or_path=str(BASE))
    file = tmp_path / "motley.yaml"

    for text in (f"model: {folder}\n", f"model: {BASE}\nadapter: tuned\n"):
        file.write_text(text, encoding="utf-8")
        config = load_config(file)
        assert (config.model, config.adapter) == (str(BASE), str(folder))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: no-base\n", r"base_model_name_or_path \(None\) names no base model; or give the"),
        (
            "model: lost\n",
            r"base_model_name_or_path: model: no folder \./gone .*; or give the base",
        ),
        ("model: chained\n", "no-base is itself an adapter; name a whole model"),
        ("model: lost\nadapter: lost\n", "is an adapter's folder, and adapter is set too"),
        (f"model: {BASE}\nadapter: {BASE}\n", "is no PEFT adapter's folder"),
        (f"model: {BASE}\nadapter: ./nowhere\n", "adapter: model: no folder ./nowhere"),
        ("model: broken\n", "adapter_config.json: cannot be read as JSON"),
    ],
)
async def test_adapters_that_cannot_be_served_are_refused_by_name(
    text: str, message: str, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "no-base")
    write_adapter(tmp_path / "lost", base_model_name_or_path="./gone")
    write_adapter(tmp_path / "chained", base_model_name_or_path=str(tmp_path / "no-base"))
    write_adapter(tmp_path / "broken")
    (tmp_path / "broken" / "adapter_config.json").write_text("{", encoding="utf-8")
    file = tmp_path / "motley.yaml"
    file.write_text(text, encoding="utf-8")

    with pytest.raises(ConfigError, match=message):
        load_config(file)
