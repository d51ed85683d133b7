"""Adapters are swapped into a real deployment while it answers: no request fails or is misled.

One deployment, which begins with adapter `first`, serves all tests in their order.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import safetensors.torch
import torch
from adapters import DENSE, load_adapted, save_adapter, tensors_of
from identity import Expected, check_identical, generate
from transformers import AutoModelForCausalLM

from actors.engine.adapter import Adapter
from actors.engine.requests import Request, SamplingParams
from cluster.commands.output import Output
from cluster.commands.publish import publish, remove
from cluster.commands.status import HttpTarget, show_status
from tests.local_ray.conftest import Served

MODEL = "tiny-qwen3"
MAX_ADAPTER_BYTES = 2 * 2**20
ENGINE = {"num_kv_blocks": 512, "step_timeout_s": 20.0}
TEXTS = (
    "import os\nimport sys\n\n\ndef main(",
    "class Queue:\n    def __init__(self):",
    "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n"
    "    if len(ordered) % 2:\n        return ordered[middle]\n    return (ordered[middle - 1]",
)
NUM_NEW = 24
LONG = 400
DEADLINE_S = 60.0

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def adapters(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base, root = checkpoints / MODEL, tmp_path_factory.mktemp("adapters")
    return {
        "first": save_adapter(base, root / "first", targets=DENSE, strength=0.2),
        # Strong: a text that repeats itself must not go on alike.
        "second": save_adapter(base, root / "second", targets=DENSE, strength=0.7, seed=1),
    }


@pytest.fixture(scope="module")
def served(
    serve_model: Callable[..., Served], checkpoints: Path, adapters: dict[str, Path]
) -> Served:
    return serve_model(
        checkpoints / MODEL,
        (5, 3),
        adapter=str(adapters["first"]),
        engine=ENGINE,
        gateway={"max_adapter_bytes": MAX_ADAPTER_BYTES},
    )


@pytest.fixture
def target(served: Served) -> HttpTarget:
    return HttpTarget(url=served.running.http_url, token=served.running.token)


@pytest.fixture
async def http(served: Served) -> AsyncGenerator[httpx.AsyncClient, None]:
    headers = {"Authorization": f"Bearer {served.running.token}"}
    async with httpx.AsyncClient(
        base_url=served.running.http_url, headers=headers, timeout=DEADLINE_S, trust_env=False
    ) as client:
        yield client


@pytest.fixture(scope="module")
def expected(
    served: Served, checkpoints: Path, adapters: dict[str, Path]
) -> Callable[..., list[Expected]]:
    """What transformers and PEFT write for `TEXTS` with an adapter, or with none."""
    base = checkpoints / MODEL

    @cache
    def make(name: str | None, num_new: int = NUM_NEW) -> list[Expected]:
        model = (
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
            if name is None
            else load_adapted(base, adapters[name])
        )
        model.generation_config.eos_token_id = None  # as ignore_eos
        return [generate(model, served.running.tokenizer.encode(t), num_new) for t in TEXTS]

    return make


class Stream:
    """A greedy request and the tokens that have come of it."""

    def __init__(self, served: Served, id_: str, text: str, num_new: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True)
        prompt = served.running.tokenizer.encode(text)
        self._request = Request(id=id_, prompt=prompt, sampling=sampling)
        self._dispatcher = served.running.dispatcher
        self.tokens: list[int] = []
        self.cached_tokens = 0

    async def run(self) -> list[int]:
        async for output in self._dispatcher.generate(self._request):
            assert output.error == ""
            self.tokens += output.tokens
            self.cached_tokens += output.cached_tokens
        return self.tokens


def answers(served: Served, id_: str, num_new: int = NUM_NEW) -> list[Stream]:
    """Answer all texts at once."""
    streams = [Stream(served, f"{id_}-{i}", text, num_new) for i, text in enumerate(TEXTS)]

    async def all_at_once() -> None:
        await asyncio.gather(*(stream.run() for stream in streams))

    served.call(all_at_once())
    return streams


def check_answers(served: Served, id_: str, wanted: list[Expected]) -> list[Stream]:
    streams = answers(served, id_)
    check_identical(wanted, [stream.tokens for stream in streams])
    return streams


async def send(http: httpx.AsyncClient, folder: Path) -> httpx.Response:
    return await http.post("/v1/adapter", content=Adapter.read(folder).encode())


def used(served: Served) -> tuple[str | None, int]:
    adapter = served.status().adapter
    assert {r["adapter_version"] for r in served.running.dispatcher.lane_reports().values()} == {
        adapter.version
    }
    return adapter.name, adapter.version


# -- swapping ----------------------------------------------------------------------------------


def test_the_first_request_has_the_adapter_that_the_deployment_began_with(
    served: Served, expected: Callable[..., list[Expected]], http: httpx.AsyncClient
) -> None:
    check_answers(served, "begin", expected("first"))
    assert used(served) == ("first", 1)
    again = check_answers(served, "again", expected("first"))
    assert again[2].cached_tokens > 0


async def test_an_adapter_is_published_while_requests_stream(
    served: Served,
    expected: Callable[..., list[Expected]],
    adapters: dict[str, Path],
    http: httpx.AsyncClient,
) -> None:
    before = await asyncio.to_thread(expected, "first", LONG)
    after = await asyncio.to_thread(expected, "second")
    streams = [Stream(served, f"swap-{i}", TEXTS[i % 3], LONG) for i in range(6)]
    running = [served.start(stream.run()) for stream in streams]
    await asyncio.to_thread(
        served.wait_until, lambda _: all(len(stream.tokens) > 20 for stream in streams)
    )
    counts = [len(stream.tokens) for stream in streams]

    response = await send(http, adapters["second"])
    assert not any(future.done() for future in running), "they ended before the switch"
    await asyncio.to_thread(check_answers, served, "new", after)

    assert response.status_code == 200, response.text
    answer = response.json()
    assert (answer["name"], answer["version"]) == ("second", 2)
    assert 0 <= answer["pause_s"] < answer["seconds"]
    results = [await asyncio.to_thread(future.result, DEADLINE_S) for future in running]
    assert [len(tokens) for tokens in results] == [LONG] * len(streams)
    for i, (tokens, count) in enumerate(zip(results, counts, strict=True)):
        wanted = before[i % 3]
        known = replace(wanted, tokens=wanted.tokens[:count], gaps=wanted.gaps[:count])
        check_identical([known], [tokens[:count]])
    as_before = [tokens == before[i % 3].tokens for i, tokens in enumerate(results)]
    assert not any(as_before), as_before
    assert used(served) == ("second", 2)


def test_kv_of_the_old_weights_is_not_shared(
    served: Served, expected: Callable[..., list[Expected]], adapters: dict[str, Path]
) -> None:
    def cached(id_: str, name: str | None) -> int:
        served.wait_until_idle()
        return check_answers(served, id_, expected(name))[2].cached_tokens

    for round_, name in enumerate(("first", "second", "first")):
        served.call(served.running.dispatcher.publish(Adapter.read(adapters[name])))
        assert cached(f"fresh-{round_}", name) == 0
        assert cached(f"shared-{round_}", name) > 0


def test_removing_it_gives_the_base_models_answers(
    served: Served,
    target: HttpTarget,
    expected: Callable[..., list[Expected]],
    adapters: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    remove(target, Output(as_json=True), timeout_s=DEADLINE_S)
    check_answers(served, "base", expected(None))
    assert used(served) == (None, 0)
    assert json.loads(capsys.readouterr().out.splitlines()[0])["name"] is None

    publish(target, adapters["first"], Output(as_json=False), timeout_s=DEADLINE_S)
    check_answers(served, "back", expected("first"))
    show_status(target, Output(as_json=False))
    name, version = used(served)
    told = capsys.readouterr().out
    assert told.count(f"adapter {name} (version {version})") == 2


# -- what is refused ---------------------------------------------------------------------------


def message(tensors: dict[str, torch.Tensor], config: Any) -> bytes:
    metadata = {"adapter_name": "bad", "adapter_config": json.dumps(config)}
    return safetensors.torch.save(tensors, metadata)


def bad_messages(folder: Path) -> Iterator[tuple[str, bytes, int, str]]:
    """Name, body, status and what the answer says."""
    sound, tensors = Adapter.read(folder), tensors_of(folder)
    config = dict(sound.config)
    name = "base_model.model.model.layers.6.mlp.down_proj.lora_A.weight"
    thin = tensors | {name: tensors[name][:2].contiguous()}
    yield "rank", message(thin, config), 400, r"down_proj has lora_A of shape \(2, "
    narrow = tensors | {name: tensors[name][:, :-8].contiguous()}
    yield "base", message(narrow, config), 400, "fits; is it another base model's"
    spoilt = tensors | {name: torch.full_like(tensors[name], torch.nan)}
    yield "nan", message(spoilt, config), 400, "layers.6.mlp.down_proj holds values that are not"
    yield "truncated", sound.encode()[:-1000], 400, "the file is truncated"
    odd = config | {"target_modules": [*DENSE, "c_attn"]}
    yield "target", message(tensors, odd), 400, "the model has no module 'c_attn'"
    dora = config | {"use_dora": True}
    yield "kind", message(tensors, dora), 400, "use_dora .* is not supported"
    yield "not one", b"{}", 400, "no safetensors file"
    large = bytes(MAX_ADAPTER_BYTES + 1)
    yield "size", large, 413, rf"larger than {MAX_ADAPTER_BYTES} bytes \(gateway.max_adapter_bytes"


async def test_bad_adapters_are_refused_and_the_old_one_serves_on(
    served: Served,
    expected: Callable[..., list[Expected]],
    adapters: dict[str, Path],
    http: httpx.AsyncClient,
) -> None:
    before = await asyncio.to_thread(used, served)
    for name, body, status, text in bad_messages(adapters["second"]):
        response = await http.post("/v1/adapter", content=body)
        assert response.status_code == status, (name, response.text)
        with pytest.raises(AssertionError, match=text):
            raise AssertionError(response.json()["error"]["message"])

    assert await asyncio.to_thread(used, served) == before
    assert (await http.get("/v1/adapter")).json()["name"] == before[0]
    await asyncio.to_thread(check_answers, served, "still", expected("first"))


def pid_of(actor: Any) -> int:
    return int(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())))


async def until_one_is_refused(
    http: httpx.AsyncClient, folder: Path
) -> tuple[httpx.Response, asyncio.Task[httpx.Response]]:
    """Publish twice at once; returns the refusal, and the other, which a stopped stage holds up."""
    posts = {asyncio.create_task(send(http, folder)) for _ in range(2)}
    async with asyncio.timeout(DEADLINE_S):
        [refused], [waiting] = await asyncio.wait(posts, return_when=asyncio.FIRST_COMPLETED)
    return refused.result(), waiting


async def test_of_two_at_once_one_is_told_to_wait(
    served: Served, adapters: dict[str, Path], http: httpx.AsyncClient
) -> None:
    _, version = await asyncio.to_thread(used, served)
    pid = await asyncio.to_thread(pid_of, served.running.fleet.stages["cpu1"].actor)
    os.kill(pid, signal.SIGSTOP)
    try:
        refused, waiting = await until_one_is_refused(http, adapters["second"])
    finally:
        os.kill(pid, signal.SIGCONT)
    published = await waiting

    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "publish_in_progress"
    assert published.status_code == 200, published.text
    assert await asyncio.to_thread(used, served) == ("second", version + 1)


async def test_a_stage_that_dies_meanwhile_fails_the_publication_or_is_replaced(
    served: Served, adapters: dict[str, Path], http: httpx.AsyncClient
) -> None:
    pid = await asyncio.to_thread(pid_of, served.running.fleet.stages["cpu1"].actor)
    os.kill(pid, signal.SIGSTOP)
    _, waiting = await until_one_is_refused(http, adapters["first"])
    os.kill(pid, signal.SIGKILL)

    async with asyncio.timeout(DEADLINE_S):
        response = await waiting
    in_use = "first"
    if response.status_code != 200:  # it was at the stage already
        assert response.status_code == 500, response.text
        assert "the stage on cpu1" in response.json()["error"]["message"]
        in_use = "second"
    assert (await http.get("/status")).json()["adapter"]["name"] == in_use
    # Another stage takes its place, with the adapter that is in use.
    await asyncio.to_thread(served.wait_until, lambda status: status.ready)
    assert (await asyncio.to_thread(used, served))[0] == in_use
