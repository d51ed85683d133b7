"""A token on every route of every protocol, but HTTP /health."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

if TYPE_CHECKING:
    from cluster.gateway.server import GatewayHandle

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
