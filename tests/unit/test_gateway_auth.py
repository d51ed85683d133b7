"""Every route and every RPC wants a token or key of its scope, but HTTP /health.

They are enumerated from the servers themselves, so that one that is added without a scope fails.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.gateway.access import PUBLIC_PATHS
from cluster.gateway.grpc_guard import RPC_NEEDS
from cluster.gateway.http_guard import Needs
from cluster.keys import SCOPES, add_key, new_key

if TYPE_CHECKING:
    from cluster.gateway.server import GatewayHandle
    from tests.unit.conftest import FakeBackend, GatewayFactory

pytestmark = pytest.mark.asyncio(loop_scope="module")

BAD_HEADERS: list[dict[str, str]] = [
    {},
    {"Authorization": "Bearer wrong-token"},
    {"Authorization": "correct-horse-battery"},
    {"Authorization": "Basic correct-horse-battery"},
]


def routes_of(gateway: GatewayHandle) -> set[tuple[str, str]]:
    """Every (method, path) of the application, found by walking it."""
    found = set()
    for route in _walk(gateway.app.router.routes):
        for method in route.methods:
            found.add((method, route.path.replace("{model_id:path}", "x")))
    return found


def _walk(routes: Any) -> list[Any]:
    flat = []
    for route in routes:
        if hasattr(route, "methods"):
            flat.append(route)
        inner = getattr(route, "original_router", None)
        flat += _walk(inner.routes) if inner is not None else []
    return flat


async def test_every_route_but_health_and_the_empty_page_wants_the_token(
    gateway: GatewayHandle,
) -> None:
    routes = routes_of(gateway)
    assert {path for _, path in routes} == {
        "/health", "/ready", "/status", "/plan", "/metrics", "/v1/models", "/v1/models/x",
        "/v1/completions", "/v1/chat/completions", "/v1/adapter", "/", "/dashboard.json",
            "/controller", "/controller/rebalance", "/controller/drain",
    }  # fmt: skip
    elsewhere = [("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/no"), ("PUT", "/v1/models")]
    almost = [("GET", "/health/"), ("GET", "/HEALTH"), ("GET", "//health"), ("GET", "/health/../x")]
    async with httpx.AsyncClient(base_url=gateway.http_url) as client:
        for method, path in [*sorted(routes), *elsewhere, *almost]:
            for headers in BAD_HEADERS:
                # Whole, or "//health" would be taken for a machine of that name.
                url = gateway.http_url + path
                response = await client.request(method, url, headers=headers)
                expected = 200 if path in ("/", "/health") else 401
                assert response.status_code == expected, (method, path, headers)
                if expected == 401:
                    assert response.headers["www-authenticate"] == "Bearer"
                    assert response.json()["error"]["code"] == "invalid_api_key"


def needs_of(gateway: GatewayHandle) -> dict[tuple[str, str], list[str]]:
    """What each (method, path) declares; one that declares nothing has an empty list."""
    found: dict[tuple[str, str], list[str]] = {}
    declared: list[str]
    for route in _walk(gateway.app.router.routes):
        declared = [
            each.dependency.need
            for each in getattr(route, "dependencies", ())
            if isinstance(each.dependency, Needs)
        ]
        for method in route.methods:
            found[method, route.path.replace("{model_id:path}", "x")] = declared
    return found


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    """One key for each scope, in `keys.jsonl`."""
    made: dict[str, str] = {}
    for scope in SCOPES:
        key, made[scope] = new_key(f"client-{scope}", [scope])
        add_key(tmp_path / "keys.jsonl", key)
    return made


async def test_every_route_is_refused_to_a_key_of_another_scope(
    gateway_with: GatewayFactory, keys: dict[str, str], tmp_path: Path
) -> None:
    async with (
        gateway_with(api_keys_file=tmp_path / "keys.jsonl") as gateway,
        httpx.AsyncClient(base_url=gateway.http_url) as client,
    ):
        needs = needs_of(gateway)
        assert set(needs) == routes_of(gateway)
        assert {path for (_, path), need in needs.items() if need == ["public"]} == PUBLIC_PATHS
        for (method, path), declared in sorted(needs.items()):
            assert len(declared) == 1, f"{method} {path} declares {declared}; name one scope"
            [need] = declared
            for scope, key in keys.items():
                headers = {"Authorization": f"Bearer {key}"}
                response = await client.request(method, path, headers=headers)
                if need in ("any", "public", scope):
                    assert response.status_code not in (401, 403), (method, path, scope)
                else:
                    assert response.status_code == 403, (method, path, scope)
                    error = response.json()["error"]
                    assert error["code"] == "insufficient_scope"
                    assert f"scope {need}" in error["message"]
                    assert f"client-{scope} has {scope}" in error["message"]


async def test_every_rpc_is_refused_to_a_key_of_another_scope(
    gateway_with: GatewayFactory, keys: dict[str, str], tmp_path: Path, metadata: Any
) -> None:
    async with (
        gateway_with(api_keys_file=tmp_path / "keys.jsonl") as gateway,
        grpc.aio.insecure_channel(gateway.grpc_target) as channel,
    ):
        paths = {
            f"/{service}/{method}"
            for service, methods in (await rpcs_of(channel, metadata)).items()
            for method in methods
        }
        assert paths <= set(RPC_NEEDS), "an RPC declares no scope"
        for path in sorted(paths):
            for scope, key in keys.items():
                call = channel.stream_stream(path)(
                    iter([b""]), metadata=(("authorization", f"Bearer {key}"),), timeout=5
                )
                reached = RPC_NEEDS[path] in ("any", scope)
                # The status comes behind the responses; Watch goes on until it is left.
                first = None
                with contextlib.suppress(grpc.aio.AioRpcError):
                    first = await call.read()
                if first not in (None, grpc.aio.EOF):
                    assert reached, (path, scope)
                    call.cancel()
                    continue
                code = await call.code()
                assert (code is grpc.StatusCode.PERMISSION_DENIED) is not reached, (path, scope)
                assert code is not grpc.StatusCode.UNAUTHENTICATED
                if not reached:
                    assert f"scope {RPC_NEEDS[path]}" in await call.details()


async def test_an_rpc_without_a_scope_is_refused_to_everyone(
    channel: Any, metadata: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "/motley.v1.Motley/GetPlan"
    left = {name: need for name, need in RPC_NEEDS.items() if name != path}
    monkeypatch.setattr("cluster.gateway.grpc_guard.RPC_NEEDS", left)

    call = channel.stream_stream(path)(iter([b""]), metadata=metadata, timeout=5)

    assert await call.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "declares no scope" in await call.details()


async def test_a_revoked_key_is_refused_at_once(
    gateway_with: GatewayFactory, backend: FakeBackend, tmp_path: Path
) -> None:
    file = tmp_path / "keys.jsonl"
    async with (
        gateway_with(api_keys_file=file) as gateway,
        httpx.AsyncClient(base_url=gateway.http_url) as client,
    ):
        key, text = new_key("late", ["generate"])
        client.headers["Authorization"] = f"Bearer {text}"
        assert (await client.get("/v1/models")).status_code == 401
        add_key(file, key)
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.post("/v1/completions", json={"prompt": "ab"})).status_code == 200
        file.write_text("", encoding="utf-8")
        assert (await client.get("/v1/models")).status_code == 401


async def test_two_authorization_headers_are_refused(gateway: GatewayHandle, token: str) -> None:
    headers = [("Authorization", f"Bearer {token}"), ("Authorization", "Bearer other-token")]
    async with httpx.AsyncClient(base_url=gateway.http_url, headers=headers) as client:
        assert (await client.get("/status")).status_code == 401


async def _reflect(stub: Any, metadata: Any, **fields: Any) -> Any:
    call = stub.ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(**fields)]), metadata=metadata, timeout=5
    )
    return await anext(aiter(call))


async def rpcs_of(channel: Any, metadata: Any) -> dict[str, list[str]]:
    """Every service and its methods, as the server itself reports them."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    listed = await _reflect(stub, metadata, list_services="")
    found = {}
    for service in listed.list_services_response.service:
        answer = await _reflect(stub, metadata, file_containing_symbol=service.name)
        for data in answer.file_descriptor_response.file_descriptor_proto:
            proto = descriptor_pb2.FileDescriptorProto.FromString(data)
            for each in proto.service:
                if f"{proto.package}.{each.name}" == service.name:
                    found[service.name] = [method.name for method in each.method]
    return found


async def test_every_rpc_of_every_service_wants_the_token(channel: Any, metadata: Any) -> None:
    rpcs = await rpcs_of(channel, metadata)
    assert rpcs["motley.v1.Motley"] == ["Generate", "Abort", "GetModelInfo", "GetPlan"]
    assert {"Check", "Watch"} <= set(rpcs["grpc.health.v1.Health"])
    assert rpcs["grpc.reflection.v1alpha.ServerReflection"] == ["ServerReflectionInfo"]
    paths = [f"/{service}/{method}" for service, methods in rpcs.items() for method in methods]
    bad: list[Any] = [
        (),
        (("authorization", "Bearer wrong-token"),),
        (("authorization", "correct-horse-battery"),),
        (*metadata, ("authorization", "Bearer wrong-token")),
    ]
    for path in [*paths, "/motley.v1.Motley/Nothing", "/no.Service/Nothing"]:
        for wrong in bad:
            call = channel.stream_stream(path)(iter([b""]), metadata=wrong, timeout=5)
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED, (path, wrong)


async def test_a_call_that_sends_nothing_is_refused_too(channel: Any) -> None:
    call = channel.stream_stream("/motley.v1.Motley/Generate")(timeout=5)

    assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
