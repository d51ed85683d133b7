"""The deployment under Ray Serve: the gateway's own routes, token and streams, and a clean end."""

from __future__ import annotations

import json
import socket
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import yaml
from leftovers import nothing_left_behind

from cluster.backend import DeploymentStatus

pytest.importorskip("aiorwlock", reason="Ray Serve is not installed; the `serve` extra brings it")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own use of pydantic
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    from cluster.serve_app import NotReadyForLongError, Patience, build

TOKEN = "correct-horse-battery"
PROMPT = "import os\n"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore"),  # Serve's own
]


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def url(
    ray_session: None, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A running application on Serve's own HTTP port."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "token").write_text(TOKEN, encoding="ascii")
    device = {
        "kind": "paced", "flops_per_s": 2e10, "memory_bytes_per_s": 4e9, "memory_bytes": "64 MiB",
    }  # fmt: skip
    settings = {
        "model": str(checkpoints / "tiny-qwen3"),
        "devices": [device | {"id": f"paced{i}"} for i in range(2)],
        "plan": {"layer_counts": [5, 3]},
        "gateway": {"http_port": 0, "grpc_port": 0, "token_file": str(folder / "token")},
    }
    config = folder / "config.yaml"
    config.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    port = free_port()
    with nothing_left_behind():
        serve.start(http_options=serve.HTTPOptions(host="127.0.0.1", port=port))
        try:
            serve.run(build({"config": str(config)}), name="motley", route_prefix="/")
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()  # type: ignore[no-untyped-call]


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60.0, trust_env=False) as client:
        yield client


def test_it_answers_through_serve_as_on_its_own_port(http: httpx.Client) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    answer = http.post("/v1/completions", json=asked)

    assert answer.status_code == 200, answer.text
    text = answer.json()["choices"][0]["text"]
    with http.stream("POST", "/v1/completions", json=asked | {"stream": True}) as stream:
        events = [line for line in stream.iter_lines() if line.startswith("data: {")]
    pieces = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events]
    assert len(pieces) > 1
    assert "".join(pieces) == text
    assert http.get("/ready").status_code == 200
    assert "motley_ready 1.0" in http.get("/metrics").text


def test_it_asks_for_the_token_there_too(url: str) -> None:
    for path in ("/status", "/v1/models", "/metrics", "/nothing"):
        assert httpx.get(f"{url}{path}", trust_env=False).status_code == 401


def test_serve_finds_it_well(http: httpx.Client) -> None:
    application = serve.status().applications["motley"]

    assert application.status == "RUNNING"
    assert application.deployments["Gateway"].status == "HEALTHY"


def test_serve_accepts_the_settings_of_the_shipped_rayservice() -> None:
    manifest = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes" / "rayservice.yaml"
    tree = yaml.safe_load(manifest.read_text(encoding="utf-8"))
    settings = ServeDeploySchema.model_validate(yaml.safe_load(tree["spec"]["serveConfigV2"]))

    [application] = settings.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    assert [deployment.name for deployment in application.deployments] == ["Gateway"]


def test_a_deployment_may_be_unready_for_a_while_and_no_longer() -> None:
    lost = DeploymentStatus(ready=False, reason="stage 1 is lost")
    now_s = 100.0
    patience = Patience(300.0, lambda: now_s)

    patience.check(DeploymentStatus(ready=True))
    now_s = 400.0
    patience.check(lost)
    now_s = 400.5
    with pytest.raises(NotReadyForLongError, match=r"not ready for 300 s.*stage 1 is lost"):
        patience.check(lost)
    patience.check(DeploymentStatus(ready=True))
    now_s = 700.0
    patience.check(lost)
