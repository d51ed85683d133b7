"""Text that comes in pieces is the text that comes at once, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from actors.engine.detokenize import Detokenizer

SHIPPED = Path(__file__).parents[2] / "deploy/checkpoints/tiny-qwen3/tokenizer.json"
CORPUS = [
    "the cat sat on the mat, the cat said hello hello",
    "caf\u00e9 na\u00efve \u4f60\u597d \u4e16\u754c \U0001f600\U0001f680\U0001f468\u200d\U0001f469",
    "\U0001f600 \U0001f600 \U0001f680 abc abcabc STOP END",
]


def byte_level() -> Tokenizer:
    """As GPT, Llama 3 and Qwen: a token is any run of bytes, whole characters or not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2 and Mistral: words marked by U+2581, unknown characters as single bytes."""
    words = ["<end>", "\u2581", "a", "b", "\u2581a", "\u2581the", "cat", "\u00e9", "STOP"]
    vocabulary = [*words[:1], *(f"<0x{byte:02X}>" for byte in range(256)), *words[1:]]
    model = models.BPE(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


BYTE_LEVEL = byte_level()
BYTE_FALLBACK = byte_fallback()
TOKENIZERS = {"byte-level": BYTE_LEVEL, "byte-fallback": BYTE_FALLBACK}
if SHIPPED.exists():
    TOKENIZERS["shipped"] = Tokenizer.from_file(str(SHIPPED))


def ids(text: str, tokenizer: Tokenizer = BYTE_LEVEL) -> list[int]:
    encoded: list[int] = tokenizer.encode(text).ids
    return encoded


def named(token: str, tokenizer: Tokenizer = BYTE_FALLBACK) -> int:
    token_id: int | None = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def single_bytes(text: str) -> list[int]:
    return [named(f"<0x{byte:02X}>") for byte in text.encode()]


def stream(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int], stops: Sequence[str] = ()
) -> tuple[list[str], str | None]:
    """The pieces released, the last one by `finish`, and the stop string if one ended it."""
    detokenizer = Detokenizer(tokenizer, prompt, stops)
    pieces = []
    for token in tokens:
        pieces.append(detokenizer.push(token))
        if detokenizer.stop is not None:
            return pieces, detokenizer.stop
    pieces.append(detokenizer.finish())
    return pieces, detokenizer.stop


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """What the tokens add to the prompt's text when all is decoded at once."""
    before = tokenizer.decode(list(prompt), skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)
    shared = 0
    while shared < min(len(before), len(whole)) and before[shared] == whole[shared]:
        shared += 1
    return whole[shared:]


def until_a_stop(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int], stops: Sequence[str]
) -> str:
    """The text so far when the first token completes a stop string, cut where that begins."""
    for count in range(1, len(tokens) + 1):
        text = continuation(tokenizer, prompt, tokens[:count])
        if count < len(tokens) and text.endswith("\ufffd"):
            continue
        if found := [at for stop in stops if (at := text.find(stop)) >= 0]:
            return text[: min(found)]
    return continuation(tokenizer, prompt, tokens)


# --- examples ---------------------------------------------------------------------------------


def test_a_character_is_held_back_until_its_last_byte() -> None:
    tokens = single_bytes("\U0001f680")

    pieces, _ = stream(BYTE_FALLBACK, ids("a", BYTE_FALLBACK), tokens)

    assert pieces == ["", "", "", "\U0001f680", ""]


def test_an_end_in_the_middle_of_a_character_releases_a_replacement() -> None:
    prompt, tokens = ids("the"), ids(" cat \u2603")[:-1]

    pieces, _ = stream(BYTE_LEVEL, prompt, tokens)

    assert "".join(pieces) == continuation(BYTE_LEVEL, prompt, tokens)
    assert pieces[-1] == "\ufffd"


def test_a_leading_space_survives_a_decoder_that_strips_it() -> None:
    prompt = [named(t) for t in ("\u2581the", "cat")]
    tokens = [named(t) for t in ("\u2581a", "\u2581the")]

    assert stream(BYTE_FALLBACK, prompt, tokens) == ([" a", " the", ""], None)


def test_special_tokens_are_not_text() -> None:
    end = named("<end>", BYTE_LEVEL)

    pieces, _ = stream(BYTE_LEVEL, [end], [*ids("the"), end, *ids(" cat")])

    assert "".join(pieces) == "the cat"


def test_a_prompt_that_ends_in_a_replacement_character_stays_out_of_the_text() -> None:
    pieces, _ = stream(BYTE_LEVEL, ids("odd \ufffd"), ids("the cat"))

    assert "".join(pieces) == "the cat"


def test_a_character_begun_by_the_prompt_is_completed_in_the_text() -> None:
    *prompt, last = ids("odd \u20ac")

    pieces, _ = stream(BYTE_LEVEL, prompt, [last, *ids(" cat \u20ac")[:-1]])

    assert "".join(pieces) == "\u20ac cat \ufffd"


def test_bytes_that_are_no_text_do_not_stop_a_byte_fallback_decoder() -> None:
    a = named("a")
    invalid = named("<0xFF>")
    accented = single_bytes("\u00e9")

    pieces, _ = stream(BYTE_FALLBACK, [a], [*accented, invalid, a, a])

    # Decoded at once, a run of bytes with an invalid one is all replacements; the accented
    # letter was complete and has been released.
    assert pieces[:2] == ["", "\u00e9"]
    assert "".join(pieces).endswith("\ufffdaa")
    assert stream(BYTE_FALLBACK, [*accented, invalid, a], [a]) == (["a", ""], None)


def test_what_could_become_a_stop_string_is_held_back_and_released_when_it_does_not() -> None:
    prompt = ids("the")
    detokenizer = Detokenizer(BYTE_LEVEL, prompt, ["STOP"])

    pieces = [detokenizer.push(token) for token in ids("xS") + ids("T") + ids("xx")]

    assert pieces == ["x", "", "", "STx", "x"]


def test_a_stop_string_over_several_tokens_is_cut_with_all_that_follows() -> None:
    tokens = ids("x") + ids("ST") + ids("OPmore")

    pieces, stop = stream(BYTE_LEVEL, ids("the"), tokens, ["END", "STOP"])

    assert ("".join(pieces), stop) == ("x", "STOP")


def test_of_two_stops_completed_by_one_token_the_earlier_wins_then_the_longer() -> None:
    tokens = ids("abc")
    assert len(tokens) == 1

    assert stream(BYTE_LEVEL, ids("the"), tokens, ["c", "bc", "b"]) == (["a"], "bc")


def test_the_end_of_a_text_is_searched_for_stops_too() -> None:
    prompt, tokens = ids("the"), ids("x\u2603")[:-1]

    pieces, stop = stream(BYTE_LEVEL, prompt, tokens, ["\ufffd"])

    assert ("".join(pieces), stop) == ("x", "\ufffd")


def test_nothing_is_released_after_a_stop() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, ids("the"), ["c"])

    pieces = [detokenizer.push(token) for token in ids("xcx") + ids("abc")]

    assert "".join(pieces) == "x"
    assert detokenizer.finish() == ""
    assert detokenizer.stop == "c"


# --- any tokens -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "byte-fallback"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_pieces_joined_are_the_text_of_all_tokens_at_once(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    any_ids = st.integers(0, tokenizer.get_vocab_size() - 1)
    prompt = data.draw(st.lists(any_ids, min_size=1, max_size=6))
    tokens = data.draw(st.lists(any_ids, max_size=25))

    pieces, _ = stream(tokenizer, prompt, tokens)

    assert "".join(pieces) == continuation(tokenizer, prompt, tokens)


@given(
    prompt=st.text("ab \u00e9\u4e16\U0001f680\ufffd", min_size=1),
    text=st.text("ab \u00e9\u4e16\U0001f680\U0001f600\ufffd"),
    cut=st.integers(0, 40),
)
@settings(max_examples=100)
@example(prompt="\ufffd", text="\ufffda", cut=40)
def test_valid_text_in_single_bytes_is_streamed_as_it_is(prompt: str, text: str, cut: int) -> None:
    before, tokens = single_bytes(prompt), single_bytes(text)[:cut]
    pieces, _ = stream(BYTE_FALLBACK, [*before, named("b")], tokens)

    whole = bytes(text.encode()[:cut]).decode(errors="ignore")
    joined = "".join(pieces)
    assert joined.startswith(whole)
    assert not joined[len(whole) :].strip("\ufffd")


@given(data=st.data())
@settings(max_examples=100)
def test_any_bytes_can_be_streamed(data: st.DataObject) -> None:
    any_ids = st.integers(0, BYTE_FALLBACK.get_vocab_size() - 1) | st.sampled_from(
        single_bytes("\u00e9\U0001f680")
    )
    prompt = data.draw(st.lists(any_ids, min_size=1, max_size=8))
    tokens = data.draw(st.lists(any_ids, max_size=25))

    pieces, _ = stream(BYTE_FALLBACK, prompt, tokens, ["a", "\ufffd\ufffd"])

    assert "\ufffd\ufffd" not in "".join(pieces)
    assert "a" not in "".join(pieces)


@given(
    text=st.text("abcSTOP \u00e9\U0001f680", max_size=30),
    stops=st.lists(st.text("abcSTOP \u00e9\U0001f680", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
@settings(max_examples=100)
def test_the_text_is_cut_where_the_first_completed_stop_begins(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    parts = data.draw(st.lists(st.integers(0, len(text)), max_size=5).map(sorted))
    bounds = [0, *parts, len(text)]
    tokens = [t for a, b in pairwise(bounds) for t in ids(text[a:b])]
    prompt = ids("the")

    pieces, stop = stream(BYTE_LEVEL, prompt, tokens, stops)

    joined = "".join(pieces)
    assert joined == until_a_stop(BYTE_LEVEL, prompt, tokens, stops)
    assert text.startswith(joined)
    assert (stop is None) == (not any(s in text for s in stops))
    assert not any(s in joined for s in stops)
    assert stop is None or text[len(joined) :].startswith(stop)
