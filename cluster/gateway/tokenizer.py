"""Text to token ids, chat messages to token ids, and the text of a single token.

`Tokenizer` needs a fast tokenizer (`tokenizers.Tokenizer`) and, for chat, a function that renders
the model's chat template. `load_tokenizer` makes both from a checkpoint; it alone imports
transformers, so this module is light to import. Turning a generated stream back into text is the
lane's work, not done here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from actors.engine.requests import RequestError

ChatMessages = Sequence[Mapping[str, str]]
ChatRenderer = Callable[[ChatMessages, Mapping[str, Any]], str]
"""Messages and extra template variables to the prompt; raises `RequestError`."""

# Names that transformers' apply_chat_template or the gateway itself gives a meaning to. Letting a
# client set `chat_template` would let it run a template of its own.
_RESERVED_VARIABLES = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "processor_kwargs",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


class Tokenizer:
    """The served model's tokenizer. Safe to use from several threads: nothing is changed."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        render_chat: ChatRenderer | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._backend.no_truncation()  # a checkpoint may have saved training-time settings
        self._backend.no_padding()
        self._render_chat = render_chat
        self._eos_token_ids = tuple(eos_token_ids)
        self._added = {
            token_id: token.content
            for token_id, token in self._backend.get_added_tokens_decoder().items()
        }
        self._is_byte_level = "ByteLevel" in _decoder_types(self._backend)

    @property
    def vocab_size(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._eos_token_ids

    @property
    def has_chat_template(self) -> bool:
        return self._render_chat is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Return the token ids of `text`."""
        check_text(text, "prompt")
        return tuple(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_chat(
        self, messages: ChatMessages, variables: Mapping[str, Any] | None = None
    ) -> tuple[int, ...]:
        """Return the token ids of the conversation, ready for the assistant's next turn."""
        if self._render_chat is None:
            raise RequestError(
                "this model has no chat template; send a prompt to /v1/completions", "messages"
            )
        reserved = sorted(_RESERVED_VARIABLES.intersection(variables or {}))
        if reserved:
            raise RequestError(
                f"chat_template_kwargs may not set {', '.join(reserved)}", "chat_template_kwargs"
            )
        text = self._render_chat(messages, variables or {})
        check_text(text, "messages")
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of whole token ids, special tokens included."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=False))

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes one token stands for, which need not be whole characters.

        Empty for an id the tokenizer does not know (a model may have more rows than tokens).
        """
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            return b"".join(_byte_of(character) for character in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])  # a byte-fallback token of SentencePiece
        return str(token).replace("\u2581", " ").encode()

    def token_text(self, token_id: int) -> str:
        """Return one token for display; `bytes:\\xNN...` when it is not whole characters."""
        value = self.token_bytes(token_id)
        try:
            return value.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)

    def to_json(self) -> str:
        """Return the tokenizer as JSON, from which a lane builds its own copy."""
        return str(self._backend.to_str())


def check_text(text: str, param: str) -> None:
    """Raise `RequestError` for text that is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{param} has half of a surrogate pair at character {error.start}; send valid Unicode",
            param,
        ) from None


def load_tokenizer(checkpoint: str | Path, *, revision: str | None = None) -> Tokenizer:
    """Load the tokenizer of a checkpoint directory (or Hugging Face id). Runs no remote code.

    Raises:
        ValueError: There is none, or it cannot be read.
    """
    loaded = load_pretrained(checkpoint, revision=revision)
    eos = loaded.eos_token_id
    return Tokenizer(
        loaded.backend_tokenizer,
        render_chat=_chat_renderer(loaded) if loaded.chat_template else None,
        eos_token_ids=() if eos is None else (int(eos),),
    )


def load_pretrained(checkpoint: str | Path, *, revision: str | None = None) -> Any:
    """Return transformers' own tokenizer, made sure to be a fast one that knows text.

    Raises:
        ValueError: There is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(
            str(checkpoint), revision=revision or "main", trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises a bare Exception
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the tokenizer of {checkpoint} cannot be loaded ({reason}); add a tokenizer.json"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ValueError(
            f"{checkpoint} has no fast tokenizer ({type(loaded).__name__}); add a tokenizer.json"
        )
    # Without any file transformers makes one that knows no text.
    if (known := backend.get_vocab_size(with_added_tokens=False)) < 2:
        raise ValueError(
            f"the tokenizer of {checkpoint} knows {known} tokens; add a tokenizer.json"
        )
    return loaded


def _chat_renderer(loaded: Any) -> ChatRenderer:
    import jinja2

    def render(messages: ChatMessages, variables: Mapping[str, Any]) -> str:
        try:
            text = loaded.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=True,
                **variables,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise RequestError(
                f"the model's chat template refused the messages: {error}", "messages"
            ) from None
        return str(text)

    return render


def _decoder_types(backend: tokenizers.Tokenizer) -> set[str]:
    decoder = json.loads(backend.to_str())["decoder"] or {}
    parts = [decoder, *decoder.get("decoders", ())]
    return {part["type"] for part in parts if "type" in part}


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """The inverse of GPT-2's map of bytes to printable characters."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + rank): byte for rank, byte in enumerate(others)})
    return alphabet


def _byte_of(character: str) -> bytes:
    byte = _byte_level_alphabet().get(character)
    return character.encode() if byte is None else bytes([byte])
