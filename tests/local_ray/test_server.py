"""Both servers of a real deployment, spoken to by the clients that people use."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import openai
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from identity import NEAR_TIE, generate
from prometheus_client.parser import text_string_to_metric_families

from cluster.client import AsyncMotleyClient, Message, MotleyClient, NotFound

if TYPE_CHECKING:
    from tests.local_ray.conftest import Served

MODEL = "tiny-qwen3"
ENGINE = {"num_kv_blocks": 512}
CODE = "import os\nimport sys\n\n\ndef main("
QUESTION = "What does os.path.join do?"
LONG_TOKENS = 1500
"""Takes several seconds, so that there is time to leave."""
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def served(serve_model: Callable[..., Served], checkpoints: Path) -> Served:
    return serve_model(checkpoints / MODEL, (5, 2, 1), engine=ENGINE)


@pytest.fixture
def api(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{served.running.http_url}/v1",
        api_key=served.running.token,
        max_retries=0,
        timeout=DEADLINE_S,
    ) as client:
        yield client


@pytest.fixture
async def async_api(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{served.running.http_url}/v1",
        api_key=served.running.token,
        max_retries=0,
        timeout=DEADLINE_S,
    ) as client:
        yield client


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=served.running.http_url,
        headers=bearer(served),
        timeout=DEADLINE_S,
        trust_env=False,
    ) as client:
        yield client


@pytest.fixture
def motley(served: Served) -> Iterator[MotleyClient]:
    with MotleyClient(served.running.grpc_target, served.running.token) as client:
        yield client


@pytest.fixture
def metadata(served: Served) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {served.running.token}"),)


@pytest.fixture
def channel(served: Served) -> Iterator[Any]:
    with grpc.insecure_channel(served.running.grpc_target) as channel:
        yield channel


@cache
def reference(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@cache
def expected_text(path: Path, prompt: tuple[int, ...], num_new: int) -> str:
    """What transformers writes greedily, its own tokenizer decoding."""
    from transformers import AutoTokenizer

    expected = generate(reference(path), prompt, num_new)
    assert min(expected.gaps) > NEAR_TIE, "a near tie may part rightly; choose another prompt"
    return str(
        AutoTokenizer.from_pretrained(path).decode(expected.tokens, skip_special_tokens=True)
    )


# -- completions -----------------------------------------------------------------------------


def test_the_model_is_listed_under_its_name(api: openai.OpenAI) -> None:
    [model] = api.models.list().data
    assert (model.id, model.owned_by) == (MODEL, "motley")
    assert api.models.retrieve(MODEL) == model


def test_a_greedy_completion_is_the_text_that_transformers_writes(
    api: openai.OpenAI, served: Served, checkpoints: Path
) -> None:
    prompt = served.running.tokenizer.encode(CODE)
    want = expected_text(checkpoints / MODEL, prompt, 48)

    answer = api.completions.create(model=MODEL, prompt=CODE, max_tokens=48, temperature=0)
    by_ids = api.completions.create(model=MODEL, prompt=list(prompt), max_tokens=48, temperature=0)

    assert answer.choices[0].text == by_ids.choices[0].text == want
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(prompt)
    assert 0 < answer.usage.completion_tokens <= 48
    assert answer.usage.total_tokens == len(prompt) + answer.usage.completion_tokens


def test_a_list_of_prompts_is_answered_in_order(api: openai.OpenAI) -> None:
    prompts = [CODE, "class Queue:\n    def ", "try:\n    import "]
    alone = [
        api.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0)
        for prompt in prompts
    ]
    together = api.completions.create(model=MODEL, prompt=prompts, max_tokens=8, temperature=0, n=2)

    assert [choice.index for choice in together.choices] == list(range(6))
    texts = [choice.text for choice in together.choices]
    assert texts == [answer.choices[0].text for answer in alone for _ in range(2)]


def test_a_seed_makes_samples_repeatable_and_choices_differ(api: openai.OpenAI) -> None:
    def sample(seed: int) -> list[str]:
        answer = api.completions.create(
            model=MODEL, prompt="def ", max_tokens=16, temperature=1.0, n=2, seed=seed
        )
        return [choice.text for choice in answer.choices]

    first = sample(7)
    assert first[0] != first[1]
    assert sample(7) == first
    assert sample(8) != first


def test_a_stop_string_ends_the_text_before_itself(api: openai.OpenAI) -> None:
    whole = api.completions.create(model=MODEL, prompt=CODE, max_tokens=48, temperature=0)
    text = whole.choices[0].text
    stop = text[12:15]
    assert stop.strip()

    cut = api.completions.create(
        model=MODEL, prompt=CODE, max_tokens=48, temperature=0, stop=[stop, "never there"]
    )

    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_an_echoed_prompt_carries_the_models_own_log_probabilities(
    api: openai.OpenAI, served: Served, checkpoints: Path
) -> None:
    prompt = served.running.tokenizer.encode(CODE)
    answer = api.completions.create(
        model=MODEL, prompt=CODE, max_tokens=0, echo=True, logprobs=3, temperature=0
    )

    [choice] = answer.choices
    assert choice.text == CODE
    assert choice.logprobs is not None
    got: Any = choice.logprobs.token_logprobs
    want, best = scores(checkpoints / MODEL, prompt)
    assert got[0] is None
    assert got[1:] == pytest.approx(want, abs=1e-4)
    tops = choice.logprobs.top_logprobs
    assert tops is not None
    for top, three in zip(tops[1:], best, strict=True):
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(three, abs=1e-4)
    assert "".join(choice.logprobs.tokens or ()) == CODE
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def scores(path: Path, prompt: tuple[int, ...]) -> tuple[list[float], list[list[float]]]:
    """log_softmax of transformers' logits: of each next token, and of the three best."""
    with torch.inference_mode():
        logits = reference(path)(torch.tensor([prompt])).logits[0, :-1]
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    return chosen.tolist(), logprobs.topk(3, dim=-1).values.tolist()


def test_generated_tokens_carry_log_probabilities(
    api: openai.OpenAI, served: Served, checkpoints: Path
) -> None:
    answer = api.completions.create(
        model=MODEL, prompt=CODE, max_tokens=8, temperature=0, logprobs=3,
        extra_body={"ignore_eos": True},
    )  # fmt: skip

    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.tokens or ()) == len(logprobs.token_logprobs or ()) == 8
    assert "".join(logprobs.tokens or ()) == answer.choices[0].text
    prompt = served.running.tokenizer.encode(CODE)
    tokens = tuple(generate(reference(checkpoints / MODEL), prompt, 8).tokens)
    want, _ = scores(checkpoints / MODEL, prompt + tokens)
    assert logprobs.token_logprobs == pytest.approx(want[-8:], abs=1e-4)
    for top in logprobs.top_logprobs or ():
        assert len(top) == 3


# -- chat ------------------------------------------------------------------------------------


def test_a_chat_is_the_same_streamed_or_whole(api: openai.OpenAI, served: Served) -> None:
    messages: Any = [
        {"role": "system", "content": "You know Python's standard library."},
        {"role": "user", "content": QUESTION},
    ]
    whole = api.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=40, temperature=0
    )
    with api.chat.completions.create(
        model=MODEL, messages=messages, max_completion_tokens=40, temperature=0, stream=True,
        stream_options={"include_usage": True},
    ) as stream:  # fmt: skip
        chunks = list(stream)

    [choice] = whole.choices
    assert choice.message.content
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == choice.message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == choice.finish_reason
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    prompt = served.running.tokenizer.encode_chat(messages)
    assert whole.usage.prompt_tokens == len(prompt)
    assert len({c.id for c in chunks}) == 1


def test_chat_log_probabilities_are_one_entry_a_token(api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], max_tokens=6,
        temperature=0, logprobs=True, top_logprobs=2, extra_body={"ignore_eos": True},
    )  # fmt: skip
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    entries = logprobs.content
    assert entries is not None
    assert len(entries) == 6
    for entry in entries:
        # Greedy: what was drawn is the best alternative.
        assert entry.top_logprobs[0].token == entry.token
        assert entry.logprob == entry.top_logprobs[0].logprob
        assert [top.logprob for top in entry.top_logprobs][1] <= entry.logprob < 0
        assert bytes(entry.bytes or ()).decode() == entry.token


async def test_streamed_completions_run_side_by_side(async_api: openai.AsyncOpenAI) -> None:
    async def streamed(prompt: str) -> str:
        stream = await async_api.completions.create(
            model=MODEL, prompt=prompt, max_tokens=24, temperature=0, stream=True
        )
        async with stream:
            return "".join([c.choices[0].text async for c in stream if c.choices])

    async def whole(prompt: str) -> str:
        answer = await async_api.completions.create(
            model=MODEL, prompt=prompt, max_tokens=24, temperature=0
        )
        return answer.choices[0].text

    prompts = [CODE, "class A:\n", "for i in ", "import ", "# The ", "return ", "x = {", "with "]
    alone = [await whole(prompt) for prompt in prompts]
    assert await asyncio.gather(*map(streamed, prompts)) == alone
    assert await asyncio.gather(*map(whole, prompts)) == alone


# -- errors as the openai client raises them ----------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "status", "change"),
    [
        (openai.BadRequestError, 400, {"temperature": -1}),
        (openai.BadRequestError, 400, {"max_tokens": 5000}),
        (openai.NotFoundError, 404, {"model": "gpt-4"}),
        (openai.UnprocessableEntityError, 422, {"max_tokens": "many"}),
    ],
)
def test_a_refusal_is_the_openai_clients_own_exception(
    api: openai.OpenAI, kind: type[openai.APIStatusError], status: int, change: dict[str, Any]
) -> None:
    for create, prompt in (
        (api.completions.create, {"prompt": CODE}),
        (api.chat.completions.create, {"messages": [{"role": "user", "content": "x"}]}),
    ):
        call: Any = create
        for stream in (False, True):
            with pytest.raises(kind) as caught:
                call(**({"model": MODEL, "stream": stream} | prompt | change))
            assert caught.value.status_code == status
            assert isinstance(caught.value.body, dict)
            assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_a_wrong_key_is_an_authentication_error(api: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError):
        api.with_options(api_key="not the token").models.list()


# -- gRPC --------------------------------------------------------------------------------------


def test_the_typed_client_gets_the_same_text_as_http(
    motley: MotleyClient, api: openai.OpenAI
) -> None:
    http_text = api.completions.create(
        model=MODEL, prompt=CODE, max_tokens=32, temperature=0
    ).choices[0].text  # fmt: skip

    result = motley.complete(CODE, max_tokens=32, temperature=0.0)
    with closing(motley.generate(CODE, max_tokens=32, temperature=0.0)) as chunks:
        streamed = [chunk for chunk in chunks if chunk.text or chunk.finish_reason]

    assert result.text == "".join(chunk.text for chunk in streamed) == http_text
    assert streamed[-1].usage == result.usage
    assert len(streamed) > 2, "it came in one piece"


def test_a_chat_over_grpc_is_a_chat_over_http(motley: MotleyClient, api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": QUESTION}], max_tokens=24, temperature=0
    )
    result = motley.chat([Message("user", QUESTION)], max_tokens=24, temperature=0.0)
    assert result.text == answer.choices[0].message.content
    assert result.choices[0].finish_reason == answer.choices[0].finish_reason


def test_a_request_is_aborted_by_its_id(motley: MotleyClient, served: Served) -> None:
    with closing(
        motley.generate(CODE, max_tokens=LONG_TOKENS, ignore_eos=True, request_id="to-be-aborted")
    ) as chunks:
        next(chunks)
        motley.abort("to-be-aborted")
        rest = list(chunks)

    assert rest[-1].finish_reason == "abort"
    assert rest[-1].usage is not None
    assert rest[-1].usage.completion_tokens < LONG_TOKENS
    with pytest.raises(NotFound, match="to-be-aborted"):
        motley.abort("to-be-aborted")
    served.wait_until_idle()


def test_model_and_plan_are_told(motley: MotleyClient) -> None:
    info = motley.model_info()
    assert (info.name, info.architecture) == (MODEL, "Qwen3ForCausalLM")
    assert (info.num_layers, info.vocab_size, info.max_model_tokens) == (8, 2048, 2048)

    plan = motley.plan()
    assert (plan.ready, plan.reason, plan.progress) == (True, "", 1.0)
    cut = [(stage.first_layer, stage.end_layer) for stage in plan.stages]
    assert cut == [(0, 5), (5, 7), (7, 8)]
    assert all(stage.active and stage.loaded_fraction == 1.0 for stage in plan.stages)
    assert [stage["device_id"] for stage in plan.plan["stages"]] == ["cpu0", "cpu1", "cpu2"]


@pytest.mark.parametrize("service", ["", "motley.v1.Motley"])
def test_health_is_checked_and_watched(channel: Any, metadata: Any, service: str) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=service)
    serving = health_pb2.HealthCheckResponse.SERVING

    assert stub.Check(request, metadata=metadata, timeout=DEADLINE_S).status == serving
    watch = stub.Watch(request, metadata=metadata, timeout=DEADLINE_S)
    assert next(watch).status == serving
    watch.cancel()


def test_health_of_an_unknown_service_is_not_found(channel: Any, metadata: Any) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="x"), metadata=metadata, timeout=10)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services(channel: Any, metadata: Any) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="motley.v1.Motley"),
    ]
    listed, described = stub.ServerReflectionInfo(
        iter(requests), metadata=metadata, timeout=DEADLINE_S
    )
    names = {service.name for service in listed.list_services_response.service}
    assert {"motley.v1.Motley", "grpc.health.v1.Health"} <= names
    assert described.file_descriptor_response.file_descriptor_proto


# -- what an operator reads --------------------------------------------------------------------


def test_ready_status_and_plan_agree(http: httpx.Client, motley: MotleyClient) -> None:
    assert http.get("/health").json() == {"status": "alive"}
    ready = http.get("/ready")
    assert ready.status_code == 200
    assert [stage["active"] for stage in ready.json()["stages"]] == [True, True, True]

    status = http.get("/status").json()
    assert (status["ready"], status["progress"], len(status["lanes"])) == (True, 1.0, 2)
    assert http.get("/plan").json() == motley.plan().plan


def test_metrics_grow_by_what_was_served(
    http: httpx.Client, motley: MotleyClient, served: Served
) -> None:
    served.wait_until_idle()
    before = metrics(http)
    steps = before["motley_stage_steps_total"]
    prompt = served.running.tokenizer.encode("def measured(")

    motley.complete("def measured(", max_tokens=40, ignore_eos=True)
    served.wait_until(lambda status: min(s.steps for s in status.stages) >= steps + 40)
    served.wait_until_idle()
    after = metrics(http)

    grown = {name: after[name] - before[name] for name in after}
    assert grown["motley_requests_total"] == 1
    assert grown["motley_generated_tokens_total"] == 40
    assert grown["motley_prompt_tokens_total"] == len(prompt)
    assert grown["motley_time_to_first_token_seconds_count"] == 1
    assert 0 < grown["motley_time_to_first_token_seconds_sum"] < DEADLINE_S
    assert grown["motley_inter_token_latency_seconds_count"] == 39
    assert (
        0
        < grown["motley_inter_token_latency_seconds_sum"]
        < grown["motley_request_duration_seconds_sum"]
        < DEADLINE_S
    )
    # A hidden row is 192 float32; each of 40 tokens crosses two links between stages.
    assert grown["motley_link_bytes_total"] > 2 * 40 * 192 * 4
    assert after["motley_lane_kv_blocks"] == 512
    assert after["motley_lane_kv_blocks_in_use"] == 0
    assert after["motley_lane_waiting_requests"] == after["motley_lane_running_requests"] == 0
    assert after["motley_stage_active"] == after["motley_ready"] == 1


def test_what_runs_holds_blocks_in_the_metrics(
    http: httpx.Client, motley: MotleyClient, served: Served
) -> None:
    with closing(motley.generate(CODE, max_tokens=LONG_TOKENS, ignore_eos=True)) as chunks:
        next(chunks)
        served.wait_until(lambda status: sum(lane.blocks_in_use for lane in status.lanes) > 0)
        running = metrics(http)
    assert 0 < running["motley_lane_kv_blocks_in_use"] < 2 * 512
    assert running["motley_lane_running_requests"] == 1
    served.wait_until_idle()
    assert metrics(http)["motley_lane_kv_blocks_in_use"] == 0


def test_busy_seconds_and_bytes_are_told_of_each_stage_and_link(http: httpx.Client) -> None:
    families = {f.name: f for f in text_string_to_metric_families(http.get("/metrics").text)}
    busy = {s.labels["stage"]: s.value for s in families["motley_stage_busy_seconds"].samples}
    assert set(busy) == {"0", "1", "2"}
    assert busy["0"] > busy["1"] > 0  # five layers against two
    links = {s.labels["link"]: s.value for s in families["motley_link_bytes"].samples}
    assert set(links) == {
        "lane-0->cpu0", "lane-1->cpu0", "cpu0->cpu1", "cpu1->cpu2", "cpu2->lanes",
    }  # fmt: skip
    assert all(sent > 0 for sent in links.values())
    # The same rows leave both stages; step messages are passed on unchanged.
    assert links["cpu0->cpu1"] == pytest.approx(links["cpu1->cpu2"], rel=0.1)
    assert links["cpu2->lanes"] < links["cpu1->cpu2"]


def metrics(http: httpx.Client) -> dict[str, float]:
    """Every sample by name: gauges of lanes and stages the least (largest for use), else sums."""
    values: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            if not sample.name.endswith(("_bucket", "_created", "_info")):
                values.setdefault(sample.name, []).append(sample.value)
    least = ("motley_stage_steps_total", "motley_stage_active", "motley_lane_kv_blocks")
    return {name: min(each) if name in least else math.fsum(each) for name, each in values.items()}


# -- clients that leave ----------------------------------------------------------------------


async def leave_a_stream(served: Served, gone: asyncio.Event) -> None:
    async with http_client(served) as client:
        body = long_body() | {"stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            lines = answer.aiter_lines()  # kept: httpx leaves with its iterator
            await anext(lines)
            await gone.wait()


async def leave_a_whole_answer(served: Served, gone: asyncio.Event) -> None:
    async with http_client(served) as client:
        asking = asyncio.create_task(client.post("/v1/completions", json=long_body()))
        await gone.wait()
        assert not asking.done()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def leave_a_grpc_stream(served: Served, gone: asyncio.Event) -> None:
    async with AsyncMotleyClient(served.running.grpc_target, served.running.token) as client:
        chunks = client.generate(CODE, max_tokens=LONG_TOKENS, ignore_eos=True, n=2)
        await anext(chunks)
        await gone.wait()
        await chunks.aclose()


def http_client(served: Served) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=served.running.http_url,
        headers=bearer(served),
        timeout=DEADLINE_S,
        trust_env=False,
    )


def long_body() -> dict[str, Any]:
    return {"prompt": CODE, "max_tokens": LONG_TOKENS, "ignore_eos": True, "n": 2}


@pytest.mark.parametrize("leave", [leave_a_stream, leave_a_whole_answer, leave_a_grpc_stream])
async def test_a_client_that_leaves_frees_its_blocks_and_disturbs_nobody(
    leave: Callable[[Served, asyncio.Event], Any], served: Served, async_api: openai.AsyncOpenAI
) -> None:
    async def other() -> str:
        answer = await async_api.completions.create(
            model=MODEL, prompt=CODE, max_tokens=64, temperature=0
        )
        return answer.choices[0].text

    undisturbed = await other()
    before = served.wait_until_idle()
    cancelled = outcomes(served).get("cancelled", 0.0)
    gone = asyncio.Event()
    leaving = asyncio.create_task(leave(served, gone))
    await asyncio.to_thread(
        served.wait_until,
        lambda status: leaving.done() or sum(lane.running for lane in status.lanes) == 2,
    )
    assert not leaving.done(), leaving.result()
    others = [asyncio.create_task(other()) for _ in range(4)]
    gone.set()
    await leaving

    assert await asyncio.gather(*others) == [undisturbed] * 4
    after = await asyncio.to_thread(served.wait_until_idle)
    # Had it run to its end, its tokens alone would be this many steps.
    assert after.stages[0].steps - before.stages[0].steps < LONG_TOKENS
    assert outcomes(served)["cancelled"] == cancelled + 1


def outcomes(served: Served) -> dict[str, float]:
    with httpx.Client(trust_env=False, headers=bearer(served)) as client:
        text = client.get(f"{served.running.http_url}/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    return {
        sample.labels["outcome"]: sample.value
        for sample in families["motley_requests"].samples
        if sample.name.endswith("_total")
    }


def bearer(served: Served) -> dict[str, str]:
    return {"Authorization": f"Bearer {served.running.token}"}
