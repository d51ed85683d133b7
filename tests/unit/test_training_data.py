"""Files to documents: formats, which tokens are learnt, what is held out, and bad input."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers

from cluster.training import encoding
from cluster.training.data import DataError, Document, Documents, read_documents
from cluster.training_settings import DataSettings

TINY = Path(__file__).resolve().parents[2] / "deploy" / "checkpoints" / "tiny-qwen3"
EOS, IM_START, IM_END = 0, 1, 2
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "It is 6.\nSix."},
]
# As Qwen3's: the last answer gets a block that earlier ones do not have.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As gpt-oss': an answer has a header of its own, and the last one another end.
CHANNELS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|pad|>{{ m.content }}"
    "{{ '<|endoftext|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{%- generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}"
    "{% endif %}\n{% endfor %}"
)
WITHOUT_SPECIAL_TOKENS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(str(TINY))


@pytest.fixture
def checkpoint_with(tmp_path: Path) -> Callable[[str | None], Path]:
    """Copy the tiny checkpoint's tokenizer with another chat template."""

    def copy(template: str | None) -> Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY / name, folder)
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        config["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return copy


def jsonl(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return path


def read(
    *train: Path, checkpoint: Path = TINY, sequence_tokens: int = 128, **settings: Any
) -> Documents:
    values = {"train": train, "held_out_fraction": 0} | settings
    return read_documents(
        DataSettings.model_validate(values), checkpoint, sequence_tokens=sequence_tokens
    )


def refusal(*train: Path, **changes: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(*train, **changes)
    return str(caught.value)


def learnt(document: Document, tokenizer: Any) -> str:
    return str(tokenizer.decode(document.tokens[document.counted]))


def texts(documents: Documents, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(document.tokens) for document in documents.train]


# Formats


def test_a_text_file_is_one_document_that_ends(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffdef f():\n\n    return 'h\u00e9'\n".encode())

    [document] = read(path).train

    text = "def f():\n\n    return 'h\u00e9'\n"
    assert document.tokens.tolist() == [*tokenizer.encode(text), EOS]
    assert document.counted.all()


def test_a_text_that_ends_itself_is_not_ended_twice(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "one<|endoftext|>"})

    [document] = read(path).train

    assert document.tokens.tolist() == [*tokenizer.encode("one"), EOS]


def test_a_long_text_is_encoded_in_pieces_as_it_would_be_at_once(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_PIECE_CHARACTERS", 300)
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 2000)
    text = Path(encoding.__file__).read_text(encoding="utf-8")
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")

    [document] = read(path).train

    assert len(list(encoding._text_pieces(text))) > 5
    assert document.tokens.tolist() == [*tokenizer.encode(text), EOS]


def test_records_of_every_shape_may_share_a_file(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(
        tmp_path / "a.jsonl",
        {"text": "plain", "id": 3},
        {"prompt": "2+2=", "completion": " 4"},
        {"messages": CHAT[1:3], "prompt": "ignored", "text": "ignored"},
    )

    assert texts(read(path), tokenizer) == [
        "plain<|endoftext|>",
        "2+2= 4<|endoftext|>",
        "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n",
    ]


def test_the_text_field_has_the_name_it_is_given(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "no", "body": "yes"})

    assert texts(read(path, text_field="body"), tokenizer) == ["yes<|endoftext|>"]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "data"
    jsonl(folder / "b" / "2.jsonl", {"text": "second"})
    (folder / "c.txt").write_text("third", encoding="utf-8")
    jsonl(folder / "a.jsonl", {"text": "first"})
    (folder / "d.py").write_text("fourth", encoding="utf-8")
    (folder / ".hidden.txt").write_text("never", encoding="utf-8")

    assert [text[:5] for text in texts(read(folder), tokenizer)] == ["first", "secon", "third"]
    as_text = texts(read(folder, format="text"), tokenizer)
    assert [text[:5] for text in as_text] == ['{"tex', '{"tex', "third", "fourt"]
    assert len(read(folder, format="jsonl").train) == 2


def test_a_file_of_another_name_is_known_by_how_it_begins(tmp_path: Path, tokenizer: Any) -> None:
    records = jsonl(tmp_path / "records", {"text": "one"}, {"text": "two"})
    (tmp_path / "prose").write_text("three", encoding="utf-8")

    found = texts(read(records, tmp_path / "prose"), tokenizer)

    assert [text.removesuffix("<|endoftext|>") for text in found] == ["one", "two", "three"]


def test_a_path_that_is_named_twice_is_read_once(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "one"})

    assert len(read(path, path, tmp_path).train) == 1


def test_blank_lines_and_blank_texts_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": ""}\n{"text": " \\n"}\n', encoding="utf-8")

    documents = read(path)

    assert (len(documents.train), documents.num_left_out) == (1, 2)


# A folder that `datasets` wrote


@pytest.fixture
def datasets() -> Any:
    return pytest.importorskip("datasets")


def test_a_saved_data_set_gives_what_its_records_would(
    tmp_path: Path, tokenizer: Any, datasets: Any
) -> None:
    rows = [{"messages": CHAT[1:3], "other": 1}, {"messages": CHAT, "other": 2}]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    jsonl(tmp_path / "a.jsonl", *rows)

    saved, lines = read(tmp_path / "saved"), read(tmp_path / "a.jsonl")

    assert saved.train.tokens.tolist() == lines.train.tokens.tolist()
    assert saved.train.counted.tolist() == lines.train.counted.tolist()


def test_a_split_that_is_there_is_held_out(tmp_path: Path, datasets: Any) -> None:
    def table(*words: str) -> Any:
        return datasets.Dataset.from_dict({"text": list(words)})

    folder = tmp_path / "saved"
    splits = {"train": table("one", "two"), "test": table("x"), "validation": table("y", "z", "w")}
    datasets.DatasetDict(splits).save_to_disk(str(folder))

    beside = read(folder, held_out_fraction=0.5)
    named = read(folder / "train", held_out=[folder])

    for documents in (beside, named):
        assert (len(documents.train), len(documents.held_out)) == (2, 3)


def test_splits_of_other_names_are_refused(tmp_path: Path, datasets: Any) -> None:
    table = datasets.Dataset.from_dict({"text": ["one"]})
    datasets.DatasetDict({"left": table, "right": table}).save_to_disk(str(tmp_path / "saved"))

    message = refusal(tmp_path / "saved")

    assert "has the splits left, right; training.data.train needs train" in message


def test_a_row_that_is_wrong_is_named(tmp_path: Path, datasets: Any) -> None:
    table = datasets.Dataset.from_dict({"text": ["one", None]})
    table.save_to_disk(str(tmp_path / "saved"))

    assert refusal(tmp_path / "saved").endswith("saved: row 1: text is null; it must be text")


def test_without_the_library_the_error_says_how_to_get_it(
    tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(str(tmp_path / "saved"))
    found = builtins.__import__

    def without_datasets(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)

    assert "pip install -e '.[data]'" in refusal(tmp_path / "saved")


# What is learnt


def test_a_completion_is_learnt_and_its_prompt_is_not(tmp_path: Path, tokenizer: Any) -> None:
    # As one text "= " and "4" would share no boundary: the blank belongs to the four.
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "2+2 = ", "completion": "4."})

    [document] = read(path).train
    [all_of_it] = read(path, train_on_prompts=True).train

    prompt = tokenizer.encode("2+2 = ")
    assert document.tokens.tolist() == [*prompt, *tokenizer.encode("4."), EOS]
    assert document.counted.tolist() == [False] * len(prompt) + [True] * (
        len(document) - len(prompt)
    )
    assert all_of_it.counted.all()


@pytest.mark.parametrize("prompt", ["", "Say nothing:"])
def test_an_empty_prompt_or_completion_is_a_document(
    tmp_path: Path, prompt: str, tokenizer: Any
) -> None:
    completion = "" if prompt else "Hello there"
    path = jsonl(tmp_path / "a.jsonl", {"prompt": prompt, "completion": completion})

    [document] = read(path).train

    assert learnt(document, tokenizer) == completion + "<|endoftext|>"


def test_a_conversation_is_rendered_and_encoded_as_when_it_is_served(
    tmp_path: Path, tokenizer: Any
) -> None:
    [document] = read(jsonl(tmp_path / "a.jsonl", {"messages": CHAT})).train

    expected = tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert document.tokens.tolist() == expected
    assert learnt(document, tokenizer) == "4<|im_end|>It is 6.\nSix.<|im_end|>"


def test_every_token_of_a_conversation_can_be_learnt(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"messages": CHAT})

    [document] = read(path, train_on_prompts=True).train

    assert document.tokens.tolist() == tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert document.counted.all()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (THINKING, "4<|im_end|><think>\n\n</think>\n\nIt is 6.\nSix.<|im_end|>"),
        (MARKED, "4<|im_end|>It is 6.\nSix.<|im_end|>"),
        (WITHOUT_SPECIAL_TOKENS, "4\n It is 6.\nSix.\n"),
        (CHANNELS, "<|pad|>4<|im_end|><|pad|>It is 6.\nSix.<|endoftext|>"),
    ],
    ids=["thinking", "marks generation", "no special tokens", "channels"],
)
def test_answers_are_found_in_what_templates_make_of_them(
    tmp_path: Path,
    tokenizer: Any,
    checkpoint_with: Callable[[str | None], Path],
    template: str,
    expected: str,
) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"messages": CHAT})

    [document] = read(path, checkpoint=checkpoint_with(template)).train

    assert learnt(document, tokenizer) == expected


def test_marked_answers_are_those_of_transformers(
    tmp_path: Path, checkpoint_with: Callable[[str | None], Path]
) -> None:
    checkpoint = checkpoint_with(MARKED)
    path = jsonl(tmp_path / "a.jsonl", {"messages": CHAT})

    [document] = read(path, checkpoint=checkpoint).train

    loaded = transformers.AutoTokenizer.from_pretrained(str(checkpoint))
    expected = loaded.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert document.tokens.tolist() == expected["input_ids"]
    assert document.counted.tolist() == [bool(each) for each in expected["assistant_masks"]]


def test_repeated_and_empty_answers_are_told_apart(tmp_path: Path, tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "ok"},
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": "<|im_end|> ok"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "ok"},
        {"role": "assistant", "content": "say <|im_end|> ok"},
    ]

    [document] = read(jsonl(tmp_path / "a.jsonl", {"messages": messages})).train

    assert learnt(document, tokenizer) == "ok<|im_end|><|im_end|>say <|im_end|> ok<|im_end|>"


def test_a_template_whose_prompt_is_no_beginning_is_refused(
    tmp_path: Path, checkpoint_with: Callable[[str | None], Path]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"messages": CHAT[:3]}, {"messages": CHAT})
    broken = checkpoint_with("{{ messages | length }}" + WITHOUT_SPECIAL_TOKENS)

    message = refusal(path, checkpoint=broken)

    assert message.startswith(
        f"{path}:1: what the chat template makes of the prompt for messages[2]"
    )
    assert "{% generation %}" in message
    assert "training.data.train_on_prompts" in message
    assert len(read(path, checkpoint=broken, train_on_prompts=True).train) == 2


def test_a_template_that_changes_earlier_answers_is_refused(
    tmp_path: Path, checkpoint_with: Callable[[str | None], Path]
) -> None:
    template = WITHOUT_SPECIAL_TOKENS.replace(
        "{{ m.content }}", "{{ m.content if loop.last or m.role != 'assistant' else '...' }}"
    )
    path = jsonl(tmp_path / "a.jsonl", {"messages": CHAT})

    message = refusal(path, checkpoint=checkpoint_with(template))

    assert "the chat template changes messages[2] once others follow" in message


def test_conversations_without_an_answer_are_left_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"messages": CHAT[:2]}, {"messages": CHAT})

    documents = read(path)

    assert (len(documents.train), documents.num_left_out) == (1, 1)
    assert len(read(path, train_on_prompts=True).train) == 2


def sentencepiece_checkpoint(folder: Path) -> Path:
    """As Llama 2's: a blank before every text, and a token that opens it."""
    letters = ["\u2581", *"abcdefg", "\u2581a", "\u2581ab", *(f"<0x{b:02X}>" for b in range(256))]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    built = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[("\u2581", "a"), ("\u2581a", "b")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    built.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    built.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    built.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    loaded = transformers.PreTrainedTokenizerFast(
        tokenizer_object=built, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    loaded.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return folder


def test_a_completion_gets_no_blank_that_its_text_does_not_have(tmp_path: Path) -> None:
    checkpoint = sentencepiece_checkpoint(tmp_path / "checkpoint")
    path = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "ab", "completion": "cd"},
        {"prompt": "ab", "completion": " ab"},
        {"text": "<s> ab"},
    )

    documents = read(path, checkpoint=checkpoint)

    loaded = transformers.AutoTokenizer.from_pretrained(str(checkpoint))
    tokens = [
        loaded.convert_ids_to_tokens(document.tokens.tolist()) for document in documents.train
    ]
    assert tokens[0] == ["<s>", "\u2581ab", "c", "d", "</s>"]
    assert tokens[1] == ["<s>", "\u2581ab", "\u2581ab", "</s>"]
    assert tokens[2].count("<s>") == 1
    assert documents.train[0].counted.tolist() == [False, False, True, True, True]


def test_long_texts_of_such_a_tokenizer_are_cut_without_a_blank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = sentencepiece_checkpoint(tmp_path / "checkpoint")
    path = tmp_path / "a.txt"
    path.write_text("abc\nab cd\n\nefg\nab\n" * 40, encoding="utf-8")
    [whole] = read(path, checkpoint=checkpoint).train

    monkeypatch.setattr(encoding, "_PIECE_CHARACTERS", 20)
    [pieced] = read(path, checkpoint=checkpoint).train

    assert pieced.tokens.tolist() == whole.tokens.tolist()


# Held out


def words(path: Path, number: int) -> Path:
    return jsonl(path, *({"text": f"document {i} of many"} for i in range(number)))


def kept(documents: Documents) -> tuple[set[bytes], set[bytes]]:
    train, held_out = (
        {document.tokens.tobytes() for document in part}
        for part in (documents.train, documents.held_out)
    )
    return train, held_out


def test_a_fraction_of_the_documents_is_held_out_whatever_their_order(tmp_path: Path) -> None:
    forward = words(tmp_path / "a.jsonl", 400)
    lines = forward.read_text(encoding="utf-8").splitlines()
    backward = tmp_path / "b.jsonl"
    backward.write_text("\n".join(reversed(lines)), encoding="utf-8")

    train, held_out = kept(read(forward, held_out_fraction=0.1))

    assert 20 < len(held_out) < 60
    assert len(train) + len(held_out) == 400
    assert not train & held_out
    assert kept(read(backward, held_out_fraction=0.1)) == (train, held_out)


@pytest.mark.parametrize(
    ("number", "fraction", "held_out"), [(2, 1e-9, 1), (2, 0.999999, 1), (1, 0.5, 0), (3, 0, 0)]
)
def test_both_sides_get_a_document_if_there_are_two(
    tmp_path: Path, number: int, fraction: float, held_out: int
) -> None:
    documents = read(words(tmp_path / "a.jsonl", number), held_out_fraction=fraction)

    assert (len(documents.train), len(documents.held_out)) == (number - held_out, held_out)


def test_files_that_are_held_out_are_not_learnt(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    words(folder / "train.jsonl", 5)
    held_out = jsonl(folder / "val.jsonl", {"text": "never learnt"})

    documents = read(folder, held_out=[held_out], held_out_fraction=0.5)

    assert (len(documents.train), len(documents.held_out)) == (5, 1)
    assert "all of them are held out" in refusal(held_out, held_out=[held_out])


# Bad input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.jsonl: holds no record"),
        (b"\n \n", "a.jsonl: holds no record"),
        (b'{"text": "a"}\n{"text": ', "a.jsonl:2: is not JSON"),
        (b"[" * 100_000, "a.jsonl:1: is not JSON"),
        (b'{"text": "a"}\n\n["b"]', "a.jsonl:3: is a list; each record must be an object"),
        (b'{"text": "a"}\n{"text": "\xff"}', "a.jsonl:2: is not UTF-8 (byte 0xff"),
        (b'{"txt": "a"}', "a.jsonl:1: has 'txt'; a record has 'messages', 'prompt' and"),
        (b"{}", "a.jsonl:1: has nothing; a record has"),
        (b'{"prompt": "a"}', "a.jsonl:1: has 'prompt'; a record has"),
        (b'{"text": 5}', "a.jsonl:1: text is a number; it must be text"),
        (b'{"text": "a\\ud800"}', "a.jsonl:1: text has half of a surrogate pair at character 1"),
        (b'{"prompt": ["a"], "completion": "b"}', "a.jsonl:1: prompt is a list"),
        (b'{"prompt": "a", "completion": true}', "a.jsonl:1: completion is a boolean"),
        (b'{"messages": []}', "a.jsonl:1: messages is an empty list"),
        (b'{"messages": "hi"}', "a.jsonl:1: messages is text; it must be a list"),
        (b'{"messages": ["hi"]}', "a.jsonl:1: messages[0] is text; it must have role and content"),
        (b'{"messages": [{"from": "human"}]}', "a.jsonl:1: messages[0] has no role"),
        (b'{"messages": [{"role": "user"}]}', "a.jsonl:1: messages[0] has no content"),
        (b'{"messages": [{"role": 1, "content": "a"}]}', "messages[0].role is a number"),
        (b'{"messages": [{"role": "user", "content": null}]}', "messages[0].content is null"),
        (b'{"text": " "}\n{"text": ""}', "none of 2 records has a token to learn"),
    ],
)
def test_records_that_cannot_be_learnt_are_named_by_file_and_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)

    assert message in refusal(path)


def test_text_files_that_cannot_be_learnt_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b" \n")
    (tmp_path / "latin.txt").write_bytes(b"one\ntwo\nthr\xe9e\n")

    assert "empty.txt: is empty; leave it out or fill it" in refusal(tmp_path / "empty.txt")
    assert "latin.txt:3: is not UTF-8 (byte 0xe9" in refusal(tmp_path / "latin.txt")


def test_paths_that_hold_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    path = jsonl(tmp_path / "a.jsonl", {"text": "one"})

    assert "nowhere: no such file or folder; change training.data.train" in refusal(
        tmp_path / "nowhere"
    )
    assert "change training.data.held_out" in refusal(path, held_out=[tmp_path / "nowhere"])
    assert "empty: has no .txt or .jsonl file" in refusal(tmp_path / "empty")
    assert "save_to_disk" in refusal(tmp_path / "empty", format="datasets")
    assert "is a file; training.data.format: datasets needs a folder" in refusal(
        path, format="datasets"
    )


def test_conversations_need_a_chat_template_that_takes_them(
    tmp_path: Path, checkpoint_with: Callable[[str | None], Path]
) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"messages": CHAT})
    bare = checkpoint_with(None)

    assert f"{path}:2: has messages, but the model has no chat template" in refusal(
        path, checkpoint=bare
    )
    config = json.loads((bare / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = "{{ raise_exception('no system') }}"
    (bare / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert f"{path}:2: the model's chat template refuses the messages: no system" in refusal(
        path, checkpoint=bare
    )


def test_sequences_longer_than_the_model_are_refused_with_both_numbers(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "one"})

    message = refusal(path, sequence_tokens=2049)

    assert "training.sequence_tokens (2049)" in message
    assert "max_position_embeddings (2048" in message
    assert len(read(path, sequence_tokens=2048).train) == 1


def test_a_tokenizer_of_another_model_is_refused(
    tmp_path: Path, checkpoint_with: Callable[[str | None], Path]
) -> None:
    checkpoint = checkpoint_with(None)
    (checkpoint / "config.json").write_text(
        '{"model_type": "llama", "vocab_size": 50}', encoding="utf-8"
    )

    message = refusal(jsonl(tmp_path / "a.jsonl", {"text": "one"}), checkpoint=checkpoint)

    assert "the model's vocabulary has 50" in message


def test_a_checkpoint_without_tokenizer_or_end_token_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "one"})
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")

    assert "add a tokenizer.json" in refusal(path, checkpoint=checkpoint)
    shutil.copy(TINY / "tokenizer.json", checkpoint)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "set eos_token in tokenizer_config.json" in refusal(path, checkpoint=checkpoint)


def test_documents_are_views_of_one_array(tmp_path: Path) -> None:
    train = read(words(tmp_path / "a.jsonl", 3)).train

    assert all(np.shares_memory(document.tokens, train.tokens) for document in train)
    assert [len(document) for document in train[1:]] == train.lengths()[1:].tolist()
