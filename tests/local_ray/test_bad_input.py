"""What a real deployment refuses: how, how clearly, and that nothing is held afterwards."""

from __future__ import annotations

import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from leftovers import nothing_left_behind
from safetensors.torch import load_file, save_file

from actors.engine.checkpoint import CheckpointError, UnsupportedArchitectureError
from actors.hosting import FleetError
from cluster.client import DeadlineExceeded, MotleyClient, Overloaded, Unreachable
from cluster.config import ConfigError, load_config
from placement.errors import InfeasiblePlanError
from protos import motley_pb2 as pb
from protos import motley_pb2_grpc
from tests.local_ray.conftest import Served, make_config, serving

MODEL = "tiny-qwen3"
CUT = (5, 2, 1)
ENGINE = {"num_kv_blocks": 512}
MAX_REQUEST_BYTES = 65_536
CONTEXT = 2048
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
DEADLINE_S = 60.0
TOKEN = "a-token-of-the-tests"


@pytest.fixture(scope="module")
def served(serve_model: Callable[..., Served], checkpoints: Path) -> Served:
    gateway = {"max_request_bytes": MAX_REQUEST_BYTES}
    return serve_model(checkpoints / MODEL, CUT, engine=ENGINE, gateway=gateway)


@pytest.fixture
def usual_answer(served: Served) -> Iterator[None]:
    """After the test no block is held, and a usual request is answered as it was before."""
    before = usual(served)
    yield
    assert usual(served) == before
    served.wait_until_idle()


def usual(served: Served) -> str:
    with MotleyClient(served.running.grpc_target, served.running.token) as client:
        return client.complete("def f(", max_tokens=4, temperature=0.0, timeout_s=DEADLINE_S).text


@pytest.fixture
def http(served: Served, usual_answer: None) -> Iterator[httpx.Client]:
    with http_client(served.running.http_url, served.running.token) as client:
        yield client


def http_client(url: str, token: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.Client(base_url=url, headers=headers, timeout=DEADLINE_S, trust_env=False)


@pytest.fixture
def channel(served: Served, usual_answer: None) -> Iterator[Any]:
    with grpc.insecure_channel(served.running.grpc_target) as channel:
        yield channel


@pytest.fixture
def metadata(served: Served) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {served.running.token}"),)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object, of OpenAI's shape and fit for a client to read."""
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    check_sentence(error["message"])
    return error


def check_sentence(text: str) -> None:
    assert text
    for trace in ("Traceback", 'File "', ".py", "Error:", "0x"):
        assert trace not in text


# -- values ------------------------------------------------------------------------------------

# What is sent besides a good prompt, the field at fault, and what the sentence must name: the
# value or count that is wrong, and the limit or what would do instead.
BAD_SAMPLING: list[tuple[dict[str, Any], str, tuple[str, ...]]] = [
    ({"temperature": -0.5}, "temperature", ("-0.5", "0 and 100")),
    ({"temperature": 101}, "temperature", ("101", "0 and 100")),
    ({"top_p": 0}, "top_p", ("(0)", "temperature=0")),
    ({"top_p": 1.5}, "top_p", ("1.5", "0 and 1")),
    ({"top_k": -3}, "top_k", ("-3", "between 0")),
    ({"min_p": 2}, "min_p", ("2", "0 and 1")),
    ({"repetition_penalty": 0}, "repetition_penalty", ("0", "0.01 and 100")),
    ({"presence_penalty": 3}, "presence_penalty", ("3", "-2 and 2")),
    ({"frequency_penalty": -3}, "frequency_penalty", ("-3", "-2 and 2")),
    ({"seed": -1}, "seed", ("-1", "between 0")),
    ({"n": 0}, "n", ("(0)", "1 and 32")),
    ({"n": 33}, "n", ("33", "1 and 32")),
    ({"max_tokens": -1}, "max_tokens", ("-1", "between 0")),
    ({"max_tokens": CONTEXT}, "max_tokens", (str(CONTEXT), "lower max_tokens")),
    ({"max_tokens": 5, "min_tokens": 6}, "min_tokens", ("6", "0 and 5")),
    ({"stop": [str(i) for i in range(17)]}, "stop", ("17", "at most 16")),
    ({"stop": [""]}, "stop", ("empty",)),
    ({"stop_token_ids": [2048]}, "stop_token_ids", ("2048", "0 to 2047")),
    ({"logprobs": 21}, "logprobs", ("21", "0 and 20")),
    ({"logprobs": -1}, "logprobs", ("-1", "0 and 20")),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("change", "param", "told"), BAD_SAMPLING)
def test_a_bad_sampling_value_is_a_400_that_names_it(
    http: httpx.Client, change: dict[str, Any], param: str, told: tuple[str, ...], stream: bool
) -> None:
    response = http.post(COMPLETIONS, json={"prompt": "def f(", "stream": stream} | change)

    error = error_of(response)
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    for part in (param, *told):
        assert part in error["message"]


@pytest.mark.parametrize(("change", "param", "told"), BAD_SAMPLING)
def test_a_bad_sampling_value_is_an_invalid_argument_that_names_it(
    channel: Any, metadata: Any, change: dict[str, Any], param: str, told: tuple[str, ...]
) -> None:
    sampling = {name: value for name, value in change.items() if name != "n"}
    request = pb.GenerateRequest(
        text="def f(", n=change.get("n"), sampling=pb.SamplingOptions(**sampling)
    )

    error = failure(motley_pb2_grpc.MotleyStub(channel).Generate(request, metadata=metadata))

    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    check_sentence(error.details())
    assert dict(error.trailing_metadata())["motley-param"] == param
    for part in (param, *told):
        assert part in error.details()


def failure(call: Any) -> Any:
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "told"),
    [
        (COMPLETIONS, {"prompt": ""}, 400, "prompt", "0 tokens"),
        (COMPLETIONS, {"prompt": []}, 422, "prompt", "not empty"),
        (COMPLETIONS, {"prompt": "x", "model": "gpt-4"}, 404, "model", "serves `tiny-qwen3`"),
        (CHAT, {"messages": [], "model": "tiny-qwen3"}, 400, "messages", "at least 1"),
        (COMPLETIONS, {"prompt": [0, 2048]}, 400, "prompt", "token id 2048"),
        (COMPLETIONS, {"prompt": "a " * 3000}, 400, "prompt", f"takes {CONTEXT}"),
        (COMPLETIONS, {"prompt": ["x", "a " * 3000]}, 400, "prompt", f"takes {CONTEXT}"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 10**12}, 400, "max_tokens", "10000"),
        (COMPLETIONS, {}, 422, "prompt", "required"),
        (COMPLETIONS, {"prompt": 7}, 422, "prompt", "string"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": "7"}, 422, "max_tokens", "integer"),
        (COMPLETIONS, {"prompt": "x", "temperature": "hot"}, 422, "temperature", "number"),
        (COMPLETIONS, {"prompt": "x", "stream": 1}, 422, "stream", "boolean"),
        (CHAT, {"messages": "hello"}, 422, "messages", "array"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "messages", "missing"),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}, 400, "messages", "'robot'"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": "a " * 3000}]},
            400,
            "prompt",
            f"takes {CONTEXT}",
        ),
    ],
)  # fmt: skip
def test_a_bad_body_is_refused_in_openais_shape(
    http: httpx.Client, path: str, body: dict[str, Any], status: int, param: str, told: str
) -> None:
    response = http.post(path, json=body)

    error = error_of(response)
    assert (response.status_code, error["param"]) == (status, param), response.text
    assert told in error["message"]


def test_too_long_a_prompt_has_openais_code(http: httpx.Client) -> None:
    response = http.post(COMPLETIONS, json={"prompt": "a " * 3000})
    assert error_of(response)["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "told"),
    [(b"{", "not JSON"), (b"", "not JSON"), (b"\xff\xfe", "not JSON"), (b"[" * 9000, "not JSON")],
    ids=["open", "empty", "not utf-8", "deep"],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_malformed_json_is_a_400(http: httpx.Client, path: str, body: bytes, told: str) -> None:
    response = http.post(path, content=body)
    assert response.status_code == 400
    assert told in error_of(response)["message"]


def test_a_huge_body_is_a_413_declared_or_not(http: httpx.Client) -> None:
    text = json.dumps({"prompt": "x" * MAX_REQUEST_BYTES}).encode()
    for content in (text, iter([text[:1000], text[1000:]])):
        response = http.post(COMPLETIONS, content=content)
        assert response.status_code == 413
        message = error_of(response)["message"]
        assert f"{MAX_REQUEST_BYTES} bytes (gateway.max_request_bytes)" in message


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404), ("POST", "/v1/embeddings", 404), ("GET", "/docs", 404),
        ("GET", COMPLETIONS, 405), ("DELETE", "/v1/models", 405), ("GET", "/v1/models/x/y", 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", 404),
    ],
)  # fmt: skip
def test_a_route_that_is_not_there_answers_in_shape(
    http: httpx.Client, method: str, path: str, status: int
) -> None:
    response = http.request(method, path)
    assert response.status_code == status
    assert error_of(response)["type"] == "invalid_request_error"


# -- who asks ----------------------------------------------------------------------------------

ROUTES = [
    ("GET", "/ready"), ("GET", "/status"), ("GET", "/plan"), ("GET", "/metrics"),
    ("GET", "/v1/models"), ("GET", "/v1/models/tiny-qwen3"), ("POST", COMPLETIONS),
    ("POST", CHAT), ("GET", "/nothing"),
]  # fmt: skip
WRONG: list[Any] = [
    {},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer wrong-token-but-long-enough"},
    {"Authorization": "Basic dXNlcjpwYXNz"},
    {"Authorization": "Bearer \u00e9\u00e9".encode()},
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_wants_the_token(
    served: Served, usual_answer: None, method: str, path: str
) -> None:
    with http_client(served.running.http_url, token="") as client:
        for headers in WRONG:
            response = client.request(
                method,
                path,
                headers=headers,
                json={"prompt": "x"},
            )
            assert response.status_code == 401, (headers, response.text)
            assert error_of(response)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
            assert served.running.token not in response.text
        twice = [("Authorization", f"Bearer {served.running.token}")] * 2
        assert client.request(method, path, headers=twice).status_code == 401
        assert client.get("/health").json() == {"status": "alive"}


def test_every_call_wants_the_token(channel: Any, served: Served) -> None:
    motley = motley_pb2_grpc.MotleyStub(channel)
    health = health_pb2_grpc.HealthStub(channel)
    reflect = reflection_pb2_grpc.ServerReflectionStub(channel)
    calls: list[Callable[[Any], Any]] = [
        lambda m: list(motley.Generate(pb.GenerateRequest(text="x"), metadata=m)),
        lambda m: motley.Abort(pb.AbortRequest(request_id="x"), metadata=m),
        lambda m: motley.GetModelInfo(pb.GetModelInfoRequest(), metadata=m),
        lambda m: motley.GetPlan(pb.GetPlanRequest(), metadata=m),
        lambda m: health.Check(health_pb2.HealthCheckRequest(), metadata=m),
        lambda m: list(health.Watch(health_pb2.HealthCheckRequest(), metadata=m)),
        lambda m: list(
            reflect.ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=m
            )
        ),
        lambda m: channel.unary_unary("/motley.v1.Motley/Nothing")(b"", metadata=m),
    ]
    good = ("authorization", f"Bearer {served.running.token}")
    wrong = [(), (("authorization", "Bearer wrong-token-long-enough"),), (good, good)]
    for call in calls:
        for metadata in wrong:
            with pytest.raises(grpc.RpcError) as caught:
                call(metadata)
            error: Any = caught.value
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert "authorization: Bearer <token>" in error.details()


# -- raw calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message", [b"\xff\xff\xff", b"\x0a\x7f", b"\x12\x02\xc3\x28", b"\x07" * 50]
)
@pytest.mark.parametrize("method", ["Generate", "Abort"])
def test_malformed_protobuf_is_an_invalid_argument(
    channel: Any, metadata: Any, method: str, message: bytes
) -> None:
    call = channel.unary_stream(f"/motley.v1.Motley/{method}")
    error = failure(call(message, metadata=metadata, timeout=DEADLINE_S))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    check_sentence(error.details())


def test_a_message_above_the_limit_is_refused(channel: Any, metadata: Any) -> None:
    request = pb.GenerateRequest(text="x" * (MAX_REQUEST_BYTES + 1))
    error = failure(motley_pb2_grpc.MotleyStub(channel).Generate(request, metadata=metadata))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(MAX_REQUEST_BYTES) in error.details()


@pytest.mark.parametrize(
    ("request_", "code", "told"),
    [
        (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "set text, token_ids or chat"),
        (pb.GenerateRequest(text=""), grpc.StatusCode.INVALID_ARGUMENT, "0 tokens"),
        (pb.GenerateRequest(text="x", model="y"), grpc.StatusCode.NOT_FOUND, "serves `tiny-qwen3`"),
        (
            pb.GenerateRequest(text="a " * 3000),
            grpc.StatusCode.INVALID_ARGUMENT,
            f"takes {CONTEXT}",
        ),
        (
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=[-1])),
            grpc.StatusCode.INVALID_ARGUMENT,
            "token id -1",
        ),
        (
            pb.GenerateRequest(text="x", request_id="no blanks"),
            grpc.StatusCode.INVALID_ARGUMENT,
            "9 characters",
        ),
        (pb.GenerateRequest(chat=pb.Chat()), grpc.StatusCode.INVALID_ARGUMENT, "at least 1"),
    ],
)  # fmt: skip
def test_a_bad_message_is_refused(
    channel: Any, metadata: Any, request_: pb.GenerateRequest, code: grpc.StatusCode, told: str
) -> None:
    error = failure(motley_pb2_grpc.MotleyStub(channel).Generate(request_, metadata=metadata))
    assert error.code() is code
    check_sentence(error.details())
    assert told in error.details()


def test_bytes_that_are_no_http_disturb_nobody(served: Served, usual_answer: None) -> None:
    port = int(served.running.http_url.rpartition(":")[2])
    grpc_port = int(served.running.grpc_target.rpartition(":")[2])
    for target in (port, grpc_port):
        with socket.create_connection(("127.0.0.1", target), timeout=DEADLINE_S) as raw:
            raw.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 not a request\r\n\r\n")
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(4096):
                pass


def test_a_deadline_ends_the_request_and_frees_its_blocks(served: Served) -> None:
    before = served.wait_until_idle()
    with MotleyClient(served.running.grpc_target, served.running.token) as client:
        chunks = client.generate("def f(", max_tokens=1500, ignore_eos=True, timeout_s=1.0)
        with closing(chunks), pytest.raises(DeadlineExceeded):
            for _ in chunks:
                pass
    after = served.wait_until_idle()
    assert after.stages[0].steps - before.stages[0].steps < 1500
    usual(served)


# -- before it is ready, and when it is full ---------------------------------------------------


class Starting:
    """A small deployment on known ports, which is watched from before it is up."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        token_file = folder / "token"
        token_file.write_text(TOKEN, encoding="utf-8")
        self.http_port, self.grpc_port = free_port(), free_port()
        config = make_config(
            checkpoint,
            CUT,
            engine=ENGINE | {"max_running": 1, "max_waiting": 1, "max_step_tokens": 64},
            plan={"lanes": 1, "sequences_per_lane": 1},
            gateway={
                "http_port": self.http_port,
                "grpc_port": self.grpc_port,
                "token_file": str(token_file),
            },
        )
        self.http_url = f"http://127.0.0.1:{self.http_port}"
        self.served: Served | None = None
        self.is_up = threading.Event()
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(config,))
        self._thread.start()

    def _serve(self, config: Any) -> None:
        try:
            with serving(config) as self.served:
                self.is_up.set()
                self._leave.wait()
        finally:
            self.is_up.set()

    def up(self) -> Served:
        assert self.is_up.wait(DEADLINE_S)
        assert self.served is not None, "it did not come up"
        return self.served

    def close(self) -> None:
        self._leave.set()
        self._thread.join(DEADLINE_S)


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def starting(
    ray_session: None, checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Starting]:
    deployment = Starting(checkpoints / MODEL, tmp_path_factory.mktemp("starting"))
    yield deployment
    deployment.close()


def test_while_it_loads_it_says_so_and_how_far_it_is(starting: Starting) -> None:
    told: list[dict[str, Any]] = []
    with http_client(starting.http_url, TOKEN) as client:
        deadline_s = time.monotonic() + DEADLINE_S
        while not told:
            assert time.monotonic() < deadline_s
            assert not starting.is_up.is_set(), "it was up before it was asked"
            try:
                told.append(check_not_ready(client.get("/ready")))
            except httpx.ConnectError:
                time.sleep(0.02)
        check_refused_while_loading(client, starting)
        while (response := client.get("/ready")).status_code != 200:
            assert time.monotonic() < deadline_s
            told.append(check_not_ready(response))
            time.sleep(0.05)

    progress = [body["progress"] for body in told]
    assert progress == sorted(progress)
    assert 0 <= progress[0] < 1
    assert len(told[0]["stages"]) == 3
    served = starting.up()
    assert usual(served)


def check_not_ready(response: httpx.Response) -> dict[str, Any]:
    body: dict[str, Any] = response.json()
    assert (response.status_code, body["ready"]) == (503, False)
    assert int(response.headers["retry-after"]) > 0
    assert re.search("loading|not serving yet", body["reason"]), body
    return body


def check_refused_while_loading(client: httpx.Client, starting: Starting) -> None:
    assert client.get("/health").status_code == 200
    assert client.get("/v1/models").json()["data"][0]["id"] == MODEL
    response = client.post(COMPLETIONS, json={"prompt": "x"})
    error = error_of(response)
    assert (response.status_code, error["code"]) == (503, "unavailable")
    assert int(response.headers["retry-after"]) > 0
    with MotleyClient(f"127.0.0.1:{starting.grpc_port}", TOKEN) as motley:
        assert not motley.ready()
        with pytest.raises(Unreachable) as caught:
            motley.complete("x")
    assert caught.value.retry_after_s is not None


def test_a_full_deployment_refuses_with_429_and_goes_on(starting: Starting) -> None:
    served = starting.up()
    body = {"prompt": "def f(", "max_tokens": 400, "ignore_eos": True}

    def ask(_: int) -> httpx.Response:
        with http_client(starting.http_url, TOKEN) as client:
            return client.post(COMPLETIONS, json=body)

    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(ask, 0)
        served.wait_until(lambda status: status.lanes[0].running == 1)
        waiting = pool.submit(ask, 1)
        served.wait_until(lambda status: status.lanes[0].waiting == 1)
        for stream in (False, True):
            with http_client(starting.http_url, TOKEN) as client:
                response = client.post(COMPLETIONS, json=body | {"stream": stream})
            error = error_of(response)
            assert (response.status_code, error["code"]) == (429, "overloaded")
            assert error["type"] == "rate_limit_error"
            assert "engine.max_waiting" in error["message"]
            assert int(response.headers["retry-after"]) > 0
        with (
            MotleyClient(f"127.0.0.1:{starting.grpc_port}", TOKEN) as motley,
            pytest.raises(Overloaded, match=r"engine\.max_waiting") as caught,
        ):
            motley.complete("x")
        assert caught.value.retry_after_s is not None
        assert not waiting.done()
        answers = [running.result(DEADLINE_S), waiting.result(DEADLINE_S)]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [400, 400]
    served.wait_until_idle()
    assert usual(served)


def test_more_choices_than_a_queue_holds_will_not_fit_later(starting: Starting) -> None:
    served = starting.up()
    for n in (2, 3):
        with http_client(starting.http_url, TOKEN) as client:
            response = client.post(COMPLETIONS, json={"prompt": "x", "n": n})
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, "n")
        assert f"n ({n})" in error["message"]
        assert "engine.max_waiting" in error["message"]
    served.wait_until_idle()


# -- checkpoints and settings that cannot be served --------------------------------------------


@pytest.fixture
def copy(tmp_path: Path, checkpoints: Path) -> Path:
    """A copy of the checkpoint in two shards, to be damaged."""
    folder = tmp_path / MODEL
    shutil.copytree(checkpoints / MODEL, folder)
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map: dict[str, str] = {}
    for i, half in enumerate(halves, start=1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(half, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(values), encoding="utf-8")


def missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def truncated_shard(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def empty_shard(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")


def unsupported(folder: Path) -> None:
    change_config(folder, model_type="gpt2", architectures=["GPT2LMHeadModel"])


def quantised(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq"})


def more_layers(folder: Path) -> None:
    change_config(folder, num_hidden_layers=9)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_of_words(folder: Path) -> None:
    (folder / "config.json").write_text("not json", encoding="utf-8")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model"', encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "kind", "told"),
    [
        (missing_shard, CheckpointError, "1 of 2 shards missing: model-00002"),
        (truncated_shard, CheckpointError, "model-00002-of-00002.safetensors: cannot be read"),
        (empty_shard, CheckpointError, "model-00001-of-00002.safetensors: cannot be read"),
        (unsupported, UnsupportedArchitectureError, "allow_unverified_architectures"),
        (quantised, CheckpointError, "quantised (gptq)"),
        (more_layers, CheckpointError, r"no tensors for layers \[8\] of 9"),
        (no_config, CheckpointError, "no config.json"),
        (config_of_words, CheckpointError, "cannot be read as JSON"),
        (no_tokenizer, CheckpointError, "knows 1 tokens; add a tokenizer.json"),
        (damaged_tokenizer, CheckpointError, "cannot be loaded (EOF"),
    ],
)
def test_a_checkpoint_that_cannot_be_served_starts_nothing(
    ray_session: None,
    copy: Path,
    damage: Callable[[Path], None],
    kind: type[Exception],
    told: str,
) -> None:
    damage(copy)
    config = make_config(copy, CUT, engine=ENGINE)
    with (
        nothing_left_behind(),
        pytest.raises(kind, match=told.replace("(", r"\(").replace(")", r"\)")),
        serving(config),
    ):
        pass


def test_two_shards_are_served_like_one(ray_session: None, copy: Path, served: Served) -> None:
    with nothing_left_behind(), serving(make_config(copy, CUT, engine=ENGINE)) as again:
        assert usual(again) == usual(served)


def test_a_stage_that_cannot_load_is_quoted_and_the_others_are_taken_down(
    ray_session: None, copy: Path
) -> None:
    change_config(copy, intermediate_size=520)
    config = make_config(copy, CUT, engine=ENGINE)
    with (
        nothing_left_behind(),
        pytest.raises((FleetError, CheckpointError), match="mlp") as caught,
        serving(config),
    ):
        pass
    assert "Traceback" not in str(caught.value)


def test_a_plan_that_does_not_fit_names_the_bytes(ray_session: None, checkpoints: Path) -> None:
    devices = [
        {
            "id": "small", "kind": "paced", "flops_per_s": 1e9, "memory_bytes_per_s": 1e9,
            "memory_bytes": "2 MiB",
        }
    ]  # fmt: skip
    config = make_config(checkpoints / MODEL, (8,), devices=devices)
    with nothing_left_behind(), pytest.raises(InfeasiblePlanError) as caught, serving(config):
        pass
    assert re.search(r"\d[\d_,.]* ?(bytes|[KMG]i?B)", str(caught.value)), caught.value
    assert "small" in str(caught.value)


def test_an_unknown_key_is_refused_with_the_one_that_was_meant(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: x/y\nengine: {max_runing: 3}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"engine\.max_runing: unknown key; did you mean"):
        load_config(path)


def test_a_taken_port_is_refused_with_the_knob(
    ray_session: None, checkpoints: Path, served: Served
) -> None:
    for name, port in (
        ("http_port", served.running.http_url.rpartition(":")[2]),
        ("grpc_port", served.running.grpc_target.rpartition(":")[2]),
    ):
        config = make_config(checkpoints / MODEL, CUT, engine=ENGINE, gateway={name: int(port)})
        with (
            nothing_left_behind(),
            pytest.raises(OSError, match=f"{port}.*gateway.{name}"),
            serving(config),
        ):
            pass
    usual(served)
