"""One OpenAI call from parsed body to answer: the requests it needs, and how it is written."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from actors.engine.requests import Request
from cluster.gateway.openai_format import AnswerFormat, AnswerHead, ChatFormat, CompletionFormat
from cluster.gateway.openai_pieces import Piece, Pieces, join
from cluster.gateway.openai_schema import ChatBody, CompletionBody, GenerationBody, Prompt
from cluster.gateway.service import GatewayService
from cluster.gateway.streams import merge

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A call that passed every check and has not begun."""

    requests: Sequence[Request]
    format: AnswerFormat
    echo: Sequence[str] | None = None
    include_usage: bool | None = None
    """True: a chunk of its own, with no choices; False: none; None: on the last chunk, where
    clients that expect a choice in every chunk can read it too."""


async def completion_call(
    service: GatewayService, body: CompletionBody, head: AnswerHead, *, is_named: bool = False
) -> Call:
    """Check and tokenize a completion body."""
    service.check_model(body.model)
    with service.metrics.counting_refusals():
        body.check_supported()
        options = body.sampling_options()
    requests = [
        service.request(
            head.id if len(body.prompt) == 1 else f"{head.id}-{index}",
            await service.encode_text(prompt) if isinstance(prompt, str) else prompt,
            options,
            n=1 if body.n is None else body.n,
            is_named=is_named,
        )
        for index, prompt in enumerate(body.prompt)
    ]
    return Call(
        requests=requests,
        format=CompletionFormat(
            head, service.tokenizer, with_logprobs=options.get("logprobs") is not None
        ),
        echo=[_echo(service, prompt) for prompt in body.prompt] if body.echo else None,
        include_usage=_include_usage(body),
    )


async def chat_call(
    service: GatewayService, body: ChatBody, head: AnswerHead, *, is_named: bool = False
) -> Call:
    """Check a chat body and render its messages with the model's template."""
    service.check_model(body.model)
    with service.metrics.counting_refusals():
        body.check_supported()
        options = body.sampling_options()
        messages = body.template_messages()
    prompt = await service.encode_chat(messages, body.chat_template_kwargs)
    request = service.request(
        head.id,
        prompt,
        options,
        n=1 if body.n is None else body.n,
        default_max_tokens=None,
        is_named=is_named,
    )
    return Call(
        requests=[request],
        format=ChatFormat(head, service.tokenizer, with_logprobs=bool(body.logprobs)),
        include_usage=_include_usage(body),
    )


async def whole(service: GatewayService, call: Call) -> Json:
    """Run the call and return its answer."""
    pieces = Pieces(call.requests, call.echo)
    async with aclosing(_run(service, call, pieces)) as taken:
        collected = [piece async for piece in taken]
    return call.format.whole(join(collected), pieces.usage())


async def streamed(service: GatewayService, call: Call) -> AsyncGenerator[Json, None]:
    """Run the call and yield its chunks."""
    pieces = Pieces(call.requests, call.echo)
    async with aclosing(_run(service, call, pieces)) as taken:
        async for piece in taken:
            chunks = call.format.chunks(piece)
            if call.include_usage:
                chunks = [chunk | {"usage": None} for chunk in chunks]
            elif piece.is_last and call.include_usage is None:
                chunks[-1] |= {"usage": pieces.usage()}
            for chunk in chunks:
                yield chunk
    if call.include_usage:
        yield call.format.usage_chunk(pieces.usage())


async def _run(service: GatewayService, call: Call, pieces: Pieces) -> AsyncGenerator[Piece, None]:
    streams = [service.generate(request) for request in call.requests]
    async with aclosing(merge(streams)) as outputs:
        async for prompt_index, output in outputs:
            for piece in pieces.take(prompt_index, output):
                yield piece


def _echo(service: GatewayService, prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt)


def _include_usage(body: GenerationBody) -> bool | None:
    return None if body.stream_options is None else body.stream_options.include_usage
