"""The official openai client against a real gateway."""

from __future__ import annotations

from typing import TYPE_CHECKING

import openai
import pytest

if TYPE_CHECKING:
    from tests.unit.conftest import FakeBackend

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODEL = "org/tiny-model"


async def test_a_completion_is_answered_whole(
    openai_client: openai.AsyncOpenAI, backend: FakeBackend
) -> None:
    answer = await openai_client.completions.create(model=MODEL, prompt="ab", max_tokens=20)

    [choice] = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("Hi there", "stop", None)
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 9)
    assert backend.requests[0].prompt == (97, 98)
    assert backend.requests[0].sampling.seed == 4242
