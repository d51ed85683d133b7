"""Protobuf messages to the gateway's values, and back. Pure: no I/O, no defaults of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from google.protobuf import json_format

from actors.engine.requests import RequestError, RequestOutput, TokenLogprob
from cluster.backend import DeploymentStatus, ModelInfo, StageStatus
from cluster.gateway.service import SamplingOptions
from cluster.gateway.tokenizer import Tokenizer
from protos import motley_pb2 as pb

_ROLES = frozenset({"system", "user", "assistant"})
_FINISH_REASONS: Mapping[str | None, pb.FinishReason.ValueType] = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
}


def sampling_options(message: pb.SamplingOptions) -> SamplingOptions:
    """Return the fields that are present."""
    given: dict[str, Any] = {}
    for descriptor, value in message.ListFields():
        given[descriptor.name] = tuple(value) if descriptor.is_repeated else value
    return cast(SamplingOptions, given)  # the message's field names are the dict's keys


def chat_messages(chat: pb.Chat) -> list[dict[str, str]]:
    """Return the messages as the tokenizer takes them."""
    for index, message in enumerate(chat.messages):
        if message.role not in _ROLES:
            raise RequestError(
                f"messages[{index}].role ({message.role!r}) must be system, user or assistant",
                "messages",
            )
    return [{"role": message.role, "content": message.content} for message in chat.messages]


def template_variables(chat: pb.Chat) -> dict[str, Any]:
    return json_format.MessageToDict(chat.template_variables)


def response(
    output: RequestOutput, tokenizer: Tokenizer, usage: pb.Usage | None
) -> pb.GenerateResponse:
    """Return one message of the stream."""
    message = pb.GenerateResponse(
        request_id=output.id,
        index=output.index,
        text=output.text,
        token_ids=output.tokens,
        logprobs=_logprobs(output.logprobs, tokenizer),
        prompt_logprobs=_logprobs(output.prompt_logprobs or (), tokenizer),
        finish_reason=_FINISH_REASONS[output.finish_reason],
        usage=usage,
    )
    if isinstance(output.stop_reason, str):
        message.stop_text = output.stop_reason
    elif output.stop_reason is not None:
        message.stop_token_id = output.stop_reason
    return message


def _logprobs(entries: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(
            token_id=entry.token_id,
            text=tokenizer.token_text(entry.token_id),
            token_bytes=tokenizer.token_bytes(entry.token_id),
            logprob=entry.logprob,
            top=_logprobs([TokenLogprob(*pair) for pair in entry.top], tokenizer),
        )
        for entry in entries
    ]


def model_info(info: ModelInfo) -> pb.GetModelInfoResponse:
    return pb.GetModelInfoResponse(
        name=info.name,
        architecture=info.architecture,
        vocab_size=info.vocab_size,
        num_layers=info.num_layers,
        max_model_tokens=info.max_model_tokens,
        eos_token_ids=info.eos_token_ids,
        num_parameters=info.num_parameters,
        dtype=info.dtype,
        created_unix_s=info.created_unix_s,
    )


def plan(plan_json: Mapping[str, object], status: DeploymentStatus) -> pb.GetPlanResponse:
    return pb.GetPlanResponse(
        plan_json=json.dumps(plan_json),
        stages=[_stage(stage) for stage in status.stages],
        epoch=status.epoch,
        ready=status.ready,
        reason=status.reason,
        progress=status.progress,
    )


def _stage(stage: StageStatus) -> pb.Stage:
    return pb.Stage(
        index=stage.index,
        device=stage.device,
        node=stage.node,
        first_layer=stage.first_layer,
        end_layer=stage.end_layer,
        active=stage.active,
        loaded_fraction=stage.loaded_fraction,
        busy_s=stage.busy_s,
        steps=stage.steps,
        late_s=stage.late_s,
        link_bytes=stage.link_bytes,
    )
