"""Files and folders to records: what a data set says, before any tokenizer.

Knows .txt (a file is a document), .jsonl (a line is a record) and folders that `datasets` wrote.
Every error names the file, the line (from 1) or row (from 0, as `datasets` counts), and what
would do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.training.documents import DataError
from cluster.training_settings import DataSettings

_HELD_OUT = ("validation", "test")
_ROWS = 1000
"""Rows of a `datasets` table that are Python objects at once."""


@dataclass(frozen=True, slots=True)
class Text:
    """One document, all of it to be learnt."""

    where: str
    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and what should follow it."""

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation; each message has at least a role and a content."""

    where: str
    messages: Sequence[Mapping[str, Any]]


Record = Text | Completion | Chat
Split = Literal["train", "held_out"]


@dataclass(frozen=True, slots=True)
class Source:
    """A text file, a file of JSON lines, or one table that `datasets` wrote."""

    path: Path
    format: Literal["text", "jsonl", "datasets"]


def find_sources(paths: Sequence[Path], settings: DataSettings, split: Split) -> list[Source]:
    """Return what the paths name: files as given, those of a folder sorted by their path.

    Raises:
        DataError: A path does not exist, or holds nothing that can be read.
    """
    found: list[Source] = []
    for given in paths:
        path = given.expanduser()
        if not path.exists():
            raise DataError(
                f"{path}: no such file or folder; change training.data.{split} "
                f"(looked up from {Path.cwd()})"
            )
        found += _sources_at(path, settings, split)
    return list(dict.fromkeys(found))


def companion_sources(paths: Sequence[Path], settings: DataSettings) -> list[Source]:
    """Return the validation or test tables that lie beside the train tables of `paths`."""
    tables: list[Source] = []
    for path in (given.expanduser() for given in paths):
        if settings.format in ("auto", "datasets") and (path / "dataset_dict.json").is_file():
            names = _split_names(path)
            held_out = [name for name in _HELD_OUT if name in names and "train" in names]
            tables += [Source(path / name, "datasets") for name in held_out[:1]]
    return tables


def read_records(source: Source, text_field: str) -> Iterator[Record]:
    """Yield the records of one source.

    Raises:
        DataError: It is empty, cannot be read, or a record has no known shape.
    """
    if source.format == "text":
        yield Text(str(source.path), _read_text(source.path))
        return
    if source.format == "jsonl":
        rows = _json_lines(source.path)
    else:
        rows = _table_rows(source.path, text_field)
    empty = True
    for where, row in rows:
        empty = False
        yield _record(where, row, text_field)
    if empty:
        raise DataError(f"{source.path}: holds no record; leave it out or fill it")


def _sources_at(path: Path, settings: DataSettings, split: Split) -> list[Source]:
    if path.is_file():
        if settings.format == "datasets":
            raise DataError(f"{path}: is a file; training.data.format: datasets needs a folder")
        return [Source(path, _file_format(path, settings.format))]
    is_table, is_dict = (path / "state.json").is_file(), (path / "dataset_dict.json").is_file()
    if settings.format in ("auto", "datasets") and (is_table or is_dict):
        return [Source(_chosen_table(path, split) if is_dict else path, "datasets")]
    if settings.format == "datasets":
        raise DataError(
            f"{path}: has neither state.json nor dataset_dict.json; name a folder that "
            f"`datasets` wrote with save_to_disk"
        )
    found = [
        Source(file, _file_format(file, settings.format))
        for file in sorted(path.rglob("*"))
        if file.is_file() and _is_wanted(file.relative_to(path), settings.format)
    ]
    if not found:
        wanted = {
            "auto": ".txt or .jsonl file, nor is it written by `datasets`",
            "text": "file",
            "jsonl": ".jsonl file",
        }
        raise DataError(f"{path}: has no {wanted[settings.format]}; change training.data.{split}")
    return found


def _is_wanted(file: Path, data_format: str) -> bool:
    """Return whether a file of a folder is read; it is given relative to the folder."""
    if any(part.startswith(".") for part in file.parts):
        return False
    suffixes = {"auto": (".txt", ".jsonl"), "jsonl": (".jsonl",)}
    return data_format == "text" or file.suffix.lower() in suffixes[data_format]


def _file_format(file: Path, data_format: str) -> Literal["text", "jsonl"]:
    """Decide by the name, else by whether the first line begins a JSON object."""
    if data_format in ("text", "jsonl"):
        return "text" if data_format == "text" else "jsonl"
    if file.suffix.lower() in (".txt", ".jsonl", ".json"):
        return "text" if file.suffix.lower() == ".txt" else "jsonl"
    try:
        with file.open("rb") as stream:
            return "jsonl" if stream.readline().lstrip().startswith(b"{") else "text"
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None


def _chosen_table(path: Path, split: Split) -> Path:
    names = _split_names(path)
    preferred = _preferred(split, names)
    if not preferred:
        raise DataError(
            f"{path}: has the splits {', '.join(names)}; training.data.{split} needs "
            f"{'train' if split == 'train' else 'validation or test'}, or the folder of one split"
        )
    return path / preferred[0]


def _preferred(split: Split, names: Sequence[str]) -> list[str]:
    wanted = ("train",) if split == "train" else _HELD_OUT
    return [name for name in wanted if name in names] or (list(names) if len(names) == 1 else [])


def _split_names(path: Path) -> list[str]:
    file = path / "dataset_dict.json"
    try:
        names = json.loads(file.read_text(encoding="utf-8"))["splits"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: names no splits ({error}); write the folder with save_to_disk"
        ) from None
    return [str(name) for name in names]


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not content.strip():
        raise DataError(f"{path}: is empty; leave it out or fill it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(_not_utf8(f"{path}:{line}", error)) from None


def _not_utf8(where: str, error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"{where}: is not UTF-8 (byte 0x{byte:02x}, {error.reason}); save the file as UTF-8"


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, _parsed(where, line)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _parsed(where: str, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(where, error)) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON ({error}); write one object a line") from None


def _table_rows(path: Path, text_field: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{path}: was written by `datasets`, which is not installed; "
            f"run `pip install -e '.[data]'` from the checkout"
        ) from None
    try:
        table = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: `datasets` cannot read it ({error})") from error
    known = {"messages", "prompt", "completion", text_field}.intersection(table.column_names)
    if known:  # others may be costly to read
        table = table.select_columns(sorted(known))
    for first in range(0, len(table), _ROWS):
        columns = table[first : first + _ROWS]
        for offset in range(min(_ROWS, len(table) - first)):
            row = {name: values[offset] for name, values in columns.items()}
            yield f"{path}: row {first + offset}", row


def _record(where: str, row: Any, text_field: str) -> Record:
    if not isinstance(row, dict):
        raise DataError(f"{where}: is {_kind(row)}; each record must be an object")
    if row.get("messages") is not None:
        return Chat(where, _messages(where, row["messages"]))
    if row.get("prompt") is not None and row.get("completion") is not None:
        prompt = _text(where, "prompt", row["prompt"])
        return Completion(where, prompt, _text(where, "completion", row["completion"]))
    if text_field in row:
        return Text(where, _text(where, text_field, row[text_field]))
    raise DataError(
        f"{where}: has {', '.join(map(repr, sorted(row))) or 'nothing'}; a record has 'messages', "
        f"'prompt' and 'completion', or {text_field!r} (training.data.text_field names the last)"
    )


def _messages(where: str, messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        kind = "an empty list" if messages == [] else _kind(messages)
        raise DataError(f"{where}: messages is {kind}; it must be a list of role and content")
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, dict):
            raise DataError(f"{where}: {name} is {_kind(message)}; it must have role and content")
        for key in ("role", "content"):
            if key not in message:
                raise DataError(f"{where}: {name} has no {key}; it must have role and content")
            _text(where, f"{name}.{key}", message[key])
    return messages


def _text(where: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {_kind(value)}; it must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {name} has half of a surrogate pair at character {error.start}; "
            f"write valid Unicode"
        ) from None
    return value


def _kind(value: Any) -> str:
    """Return what JSON calls a value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    names = {int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
