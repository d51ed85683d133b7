"""Which characters of a rendered conversation the model is to learn: the assistant's answers.

A template that marks answers with {% generation %} is taken at its word. For any other, an answer
begins where the template's own prompt for it ends, and goes on through its end-of-turn token:
what the model has to generate when it is served.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from cluster.training.documents import DataError
from cluster.training.records import Chat

Span = tuple[int, int]
"""Characters, half open."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_WAYS_OUT = (
    "mark answers with {% generation %} in the template, or set training.data.train_on_prompts"
)


class ChatTemplate:
    """The chat template of a tokenizer that transformers loaded."""

    def __init__(self, loaded: Any) -> None:
        self._template = str(loaded.get_chat_template()) if loaded.chat_template else None
        self._variables = dict(loaded.special_tokens_map)
        self._marks_answers = bool(_GENERATION.search(self._template or ""))
        special = [each.content for each in loaded.added_tokens_decoder.values() if each.special]
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def render(self, chat: Chat) -> str:
        """Return the conversation as text.

        Raises:
            DataError: There is no template, or it refuses the messages.
        """
        return self._rendered(chat, chat.messages)[0]

    def answers(self, chat: Chat) -> tuple[str, list[Span]]:
        """Return the conversation as text, and where in it the assistant speaks.

        Raises:
            DataError: As `render`, or an answer cannot be told from what surrounds it.
        """
        if self._marks_answers:
            return self._rendered(chat, chat.messages, mark_answers=True)
        text = self.render(chat)
        spans = []
        for index, message in enumerate(chat.messages):
            if message["role"] == "assistant":
                start = self._answer_start(chat, index, text)
                spans.append((start, self._answer_end(chat, index, text, start)))
        return text, spans

    def _answer_start(self, chat: Chat, index: int, text: str) -> int:
        prompt, _ = self._rendered(chat, chat.messages[:index], add_generation_prompt=True)
        if not text.startswith(prompt):
            raise DataError(
                f"{chat.where}: what the chat template makes of the prompt for messages[{index}] "
                f"is not how the whole conversation begins; {_WAYS_OUT}"
            )
        return len(prompt)

    def _answer_end(self, chat: Chat, index: int, text: str, start: int) -> int:
        # Templates may render an answer otherwise once more messages follow (Qwen3 drops the
        # thinking, gpt-oss changes the end-of-turn token), so look in the whole conversation first.
        content = str(chat.messages[index]["content"]).strip()
        content_end = text.find(content, start) + len(content)
        for special in self._special.finditer(text, start):
            if not content or (
                content_end >= start + len(content)
                and special.start() >= content_end
                and not text[content_end : special.start()].strip()
            ):
                return special.end()
        so_far, _ = self._rendered(chat, chat.messages[: index + 1])
        if not text.startswith(so_far):
            raise DataError(
                f"{chat.where}: the chat template changes messages[{index}] once others follow, "
                f"so its tokens cannot be told; {_WAYS_OUT}"
            )
        return len(so_far)

    def _rendered(
        self,
        chat: Chat,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        mark_answers: bool = False,
    ) -> tuple[str, list[Span]]:
        if self._template is None:
            raise DataError(
                f"{chat.where}: has messages, but the model has no chat template; add "
                f"chat_template.jinja to the checkpoint, or write prompt and completion"
            )
        # `datasets` gives every message the keys of all others, as null.
        conversation = [
            {key: value for key, value in message.items() if value is not None}
            for message in messages
        ]
        try:
            [text], marks = render_jinja_template(
                [conversation],
                chat_template=self._template,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=mark_answers,
                **self._variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise DataError(
                f"{chat.where}: the model's chat template refuses the messages: {error}"
            ) from None
        return str(text), list(marks[0]) if mark_answers else []
