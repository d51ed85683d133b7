"""Encoding, chat templates and the display of single tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models

from actors.engine.requests import RequestError
from cluster.gateway.tokenizer import Tokenizer, load_tokenizer


def test_text_becomes_its_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("hé") == (104, 0xC3, 0xA9)
    assert tokenizer.encode("") == ()
    assert tokenizer.vocab_size == 257
    assert tokenizer.eos_token_ids == (256,)


def test_saved_truncation_and_padding_are_dropped(raw_tokenizer: tokenizers.Tokenizer) -> None:
    copy = tokenizers.Tokenizer.from_str(raw_tokenizer.to_str())
    copy.enable_truncation(4)
    copy.enable_padding(length=8)

    assert len(Tokenizer(copy).encode("0123456789")) == 10
    assert json.loads(Tokenizer(copy).to_json())["truncation"] is None


def test_half_a_surrogate_pair_is_refused_with_its_place(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="half of a surrogate pair at character 2"):
        tokenizer.encode("ab\ud800")


def test_chat_messages_are_rendered_and_encoded(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "x"}]

    assert bytes(tokenizer.encode_chat(messages)) == b"u:x\na:"
    assert bytes(tokenizer.encode_chat(messages, {"enable_thinking": True})) == b"u:x\na!"


def test_a_model_without_a_chat_template_says_so(raw_tokenizer: tokenizers.Tokenizer) -> None:
    bare = Tokenizer(raw_tokenizer)

    assert not bare.has_chat_template
    with pytest.raises(RequestError, match="no chat template"):
        bare.encode_chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "tools", "messages"])
def test_template_variables_may_not_take_over(tokenizer: Tokenizer, name: str) -> None:
    with pytest.raises(RequestError, match=f"may not set {name}"):
        tokenizer.encode_chat([{"role": "user", "content": "x"}], {name: "{{ 1 }}"})


@pytest.mark.parametrize(
    ("token_id", "value", "text"),
    [
        (65, b"A", "A"),
        (32, b" ", " "),
        (10, b"\n", "\n"),
        (0xC3, b"\xc3", "bytes:\\xc3"),
        (256, b"<eos>", "<eos>"),
        (999, b"", ""),
    ],
)
def test_a_byte_level_token_shows_its_bytes(
    tokenizer: Tokenizer, token_id: int, value: bytes, text: str
) -> None:
    assert tokenizer.token_bytes(token_id) == value
    assert tokenizer.token_text(token_id) == text


def test_sentencepiece_tokens_show_blanks_and_bytes() -> None:
    vocab = {"<unk>": 0, "\u2581the": 1, "<0x0A>": 2, "<0xE2>": 3, "cat": 4}
    built = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    built.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    pieces = Tokenizer(built)

    assert [pieces.token_text(i) for i in range(1, 5)] == [" the", "\n", "bytes:\\xe2", "cat"]


def test_a_lane_can_rebuild_the_tokenizer(tokenizer: Tokenizer) -> None:
    copy = tokenizers.Tokenizer.from_str(tokenizer.to_json())

    assert copy.decode(tokenizer.encode("hé!")) == "hé!"


def _save_checkpoint(
    folder: Path, raw_tokenizer: tokenizers.Tokenizer, template: str | None
) -> None:
    raw_tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def test_a_checkpoint_is_loaded_with_its_chat_template(
    tmp_path: Path, raw_tokenizer: tokenizers.Tokenizer
) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
        "{{ mood }}"
    )
    _save_checkpoint(tmp_path, raw_tokenizer, template)
    loaded = load_tokenizer(tmp_path)

    assert loaded.eos_token_ids == (256,)
    assert bytes(loaded.encode_chat([{"role": "user", "content": "x"}])) == b"[x]>"
    assert bytes(loaded.encode_chat([{"role": "user", "content": "x"}], {"mood": "!"})) == b"[x]>!"
    with pytest.raises(RequestError, match="chat template refused the messages: no system"):
        loaded.encode_chat([{"role": "system", "content": "x"}])


def test_a_checkpoint_without_a_template_has_none(
    tmp_path: Path, raw_tokenizer: tokenizers.Tokenizer
) -> None:
    _save_checkpoint(tmp_path, raw_tokenizer, None)

    assert not load_tokenizer(tmp_path).has_chat_template
