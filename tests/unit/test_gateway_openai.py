"""The official openai client against a real gateway."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import openai
import pytest

from cluster.backend import Overloaded, Unavailable

if TYPE_CHECKING:
    from tests.unit.conftest import FakeBackend, GatewayFactory

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "org/tiny-model"
USER: list[Any] = [{"role": "user", "content": "hello"}]


async def test_a_completion_is_answered_whole(
    openai_client: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    answer = await openai_client.completions.create(model=MODEL, prompt="ab", max_tokens=20)

    [choice] = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("Hi there", "stop", None)
    assert (answer.object, answer.model) == ("text_completion", MODEL)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 9)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert backend.requests[0].prompt == (97, 98)
    assert backend.closed == [answer.id]


async def test_defaults_are_openais_and_the_seed_is_fresh(
    openai_client: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    await openai_client.completions.create(model=MODEL, prompt="ab")
    await openai_client.chat.completions.create(model=MODEL, messages=USER)

    completion, chat = (request.sampling for request in backend.requests)
    assert (completion.max_tokens, completion.temperature, completion.seed) == (16, 1.0, 4242)
    assert chat.max_tokens == 64 - len(b"u:hello\na:")


async def test_a_default_length_is_what_fits_when_little_does(
    openai_client: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    await openai_client.completions.create(model=MODEL, prompt="x" * 60)

    assert backend.requests[0].sampling.max_tokens == 4


async def test_every_sampling_field_reaches_the_backend(
    openai_client: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    await openai_client.completions.create(
        model=MODEL,
        prompt="ab",
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        seed=7,
        stop=["x", "yz"],
        n=2,
        best_of=2,
        extra_body={
            "top_k": 3,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "stop_token_ids": [9],
            "ignore_eos": True,
            "min_tokens": 1,
            "unheard_of": {"is": "ignored"},
        },
    )

    [request] = backend.requests
    sampling = request.sampling
    assert request.n == 2
    assert (sampling.max_tokens, sampling.min_tokens, sampling.seed) == (5, 1, 7)
    assert (sampling.temperature, sampling.top_p, sampling.min_p) == (0.5, 0.9, 0.05)
    assert (sampling.top_k, sampling.repetition_penalty) == (3, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.1, -0.2)
    assert (sampling.stop, sampling.stop_token_ids, sampling.ignore_eos) == (
        ("x", "yz"),
        (9,),
        True,
    )


async def test_vllms_top_k_of_minus_one_means_all(
    openai_client: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    await openai_client.completions.create(model=MODEL, prompt="a", extra_body={"top_k": -1})

    assert backend.requests[0].sampling.top_k == 0


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [(97, 98)]),
        (["a", "bc"], [(97,), (98, 99)]),
        ([1, 2, 3], [(1, 2, 3)]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
    ],
)
async def test_a_prompt_has_four_forms(
    openai_client: openai.AsyncOpenAI,
    backend: FakeBackend,
    prompt: Any,
    expected: list[tuple[int, ...]],
) -> None:
    answer = await openai_client.completions.create(model=MODEL, prompt=prompt, n=2)

    assert sorted(request.prompt for request in backend.requests) == expected
    assert [choice.index for choice in answer.choices] == list(range(2 * len(expected)))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(each) for each in expected)
    assert answer.usage.completion_tokens == 2 * 9 * len(expected)


async def test_echo_with_logprobs_and_no_output_scores_the_prompt(
    openai_client: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    answer = await openai_client.completions.create(
        model=MODEL, prompt="aé", max_tokens=0, logprobs=2, echo=True, temperature=0
    )

    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == ("aé", "length")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert choice.logprobs.token_logprobs == [None, -1.5, -2.5]
    assert choice.logprobs.text_offset == [0, 1, 1]
    assert choice.logprobs.top_logprobs == [
        None,
        {"bytes:\\xc3": -1.5, "bytes:\\xc4": -2.5},
        {"bytes:\\xa9": -2.5, "bytes:\\xaa": -3.5},
    ]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


async def test_echo_with_one_token_is_read_as_a_harness_reads_it(
    openai_client: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    context, continuation = [97, 98], [99, 100]
    answer = await openai_client.completions.create(
        model=MODEL, prompt=[context + continuation], max_tokens=1, logprobs=1, echo=True, n=2
    )

    for choice in answer.choices:
        assert choice.text == "abcdH"
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == ["a", "b", "c", "d", "H"]
        assert choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs[len(context) : -1] == [-2.5, -3.5]


async def test_a_streamed_completion_joins_to_the_whole_one(
    openai_client: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    common: dict[str, Any] = {
        "model": MODEL, "prompt": ["ab", "c"], "n": 2, "logprobs": 1, "echo": True, "max_tokens": 3,
    }  # fmt: skip
    whole = await openai_client.completions.create(**common)
    stream = await openai_client.completions.create(**common, stream=True)
    texts = [""] * 4
    tokens: list[list[str]] = [[] for _ in range(4)]
    reasons = {}
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
        last = chunk

    assert texts == [choice.text for choice in whole.choices] == ["abHi ", "abHi ", "cHi ", "cHi "]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices if choice.logprobs]
    assert reasons == dict.fromkeys(range(4), "length")
    assert last.usage == whole.usage


async def test_a_chat_is_answered_whole(
    openai_client: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "he"}, {"type": "text", "text": "y"}],
        },
    ]
    answer = await openai_client.chat.completions.create(
        model=MODEL, messages=messages, max_completion_tokens=4, n=2
    )

    assert [choice.message.content for choice in answer.choices] == ["Hi t", "Hi t"]
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert answer.choices[0].message.role == "assistant"
    assert bytes(backend.requests[0].prompt) == b"s:be brief\nu:hey\na:"


async def test_chat_logprobs_carry_bytes_and_alternatives(
    openai_client: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    backend.reply = "é"
    answer = await openai_client.chat.completions.create(
        model=MODEL, messages=USER, logprobs=True, top_logprobs=2, max_tokens=1
    )

    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    [entry] = logprobs.content
    assert (entry.token, entry.logprob, entry.bytes) == ("bytes:\\xc3", -0.5, [0xC3])
    assert [(top.bytes, top.logprob) for top in entry.top_logprobs] == [
        ([0xC3], -0.5),
        ([0xC4], -1.5),
    ]


async def test_an_impossible_token_is_sent_as_openai_does(
    openai_client: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    backend.first_logprob = float("-inf")
    answer = await openai_client.chat.completions.create(
        model=MODEL, messages=USER, logprobs=True, max_tokens=1
    )

    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert logprobs.content[0].logprob == -9999.0


async def test_a_streamed_chat_says_role_text_reason(
    openai_client: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    stream = await openai_client.chat.completions.create(
        model=MODEL, messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]

    first, *_, reason, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "Hi there"
    assert reason.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 9
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_usage_is_left_out_when_the_client_says_so(
    openai_client: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    stream = await openai_client.chat.completions.create(
        model=MODEL, messages=USER, stream=True, stream_options={"include_usage": False}
    )

    assert [chunk.usage async for chunk in stream if chunk.usage] == []


async def test_models_are_listed_and_found_by_name(openai_client: openai.AsyncOpenAI) -> None:
    listed = [model.id async for model in await openai_client.models.list()]

    assert listed == [MODEL]
    assert (await openai_client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError) as caught:
        await openai_client.models.retrieve("gpt-x")
    assert caught.value.code == "model_not_found"


async def test_errors_have_the_clients_own_types(
    openai_client: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    create = openai_client.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        await create(model=MODEL, prompt="x" * 60, max_tokens=5)
    assert (bad.value.code, bad.value.param) == ("context_length_exceeded", "max_tokens")
    assert "together 65; the model takes 64" in bad.value.message
    with pytest.raises(openai.NotFoundError):
        await create(model="other", prompt="x")
    with pytest.raises(openai.UnprocessableEntityError):
        await create(model=MODEL, prompt="x", max_tokens="many")  # type: ignore[call-overload]
    with pytest.raises(openai.AuthenticationError):
        await openai_client.with_options(api_key="wrong-token").models.list()
    backend.refusal = Overloaded("257 requests wait; the limit is 256", 1.2)
    with pytest.raises(openai.RateLimitError) as limited:
        await create(model=MODEL, prompt="x")
    assert limited.value.response.headers["retry-after"] == "2"
    backend.refusal = Unavailable("stages load: 40 %", 0.2)
    with pytest.raises(openai.InternalServerError) as down:
        await create(model=MODEL, prompt="x", stream=True)
    assert down.value.status_code == 503
    assert down.value.response.headers["retry-after"] == "1"


async def test_a_failure_in_a_stream_is_raised_by_the_client(
    openai_client: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    backend.fail_after = 3
    stream = await openai_client.chat.completions.create(model=MODEL, messages=USER, stream=True)

    texts = [(await anext(stream)).choices[0].delta.content for _ in range(4)]
    assert texts == ["", "H", "i", " "]
    with pytest.raises(openai.APIError, match="stage 1 was lost"):
        await anext(stream)


async def test_a_model_without_a_chat_template_still_completes(
    gateway_with: GatewayFactory, raw_tokenizer: Any, token: str
) -> None:
    from cluster.gateway.tokenizer import Tokenizer

    async with (
        gateway_with(Tokenizer(raw_tokenizer)) as gateway,
        openai.AsyncOpenAI(base_url=gateway.openai_url, api_key=token, max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            await client.chat.completions.create(model=MODEL, messages=USER)
        assert (await client.completions.create(model=MODEL, prompt="x")).choices[0].text


async def test_the_blocking_client_works_too(
    openai_client: openai.AsyncOpenAI, backend: FakeBackend, token: str
) -> None:
    import asyncio

    def ask() -> str:
        with openai.OpenAI(
            base_url=str(openai_client.base_url), api_key=token, max_retries=0
        ) as client:
            stream = client.completions.create(model=MODEL, prompt="x", stream=True)
            return "".join(chunk.choices[0].text for chunk in stream)

    assert await asyncio.to_thread(ask) == "Hi there"
