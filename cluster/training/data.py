"""The documents of a training run: read, encoded, and split into learnt and held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from actors.engine.checkpoint import CheckpointError, read_configuration
from cluster.training.documents import Corpus, DataError, Document
from cluster.training.encoding import Encoder
from cluster.training.records import Source, companion_sources, find_sources, read_records
from cluster.training_settings import DataSettings

__all__ = ["Corpus", "DataError", "Document", "Documents", "read_documents"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """What is learnt from, and what only measures."""

    train: Corpus
    held_out: Corpus
    """May be empty."""
    num_left_out: int
    """Records with nothing to learn: blank texts, conversations without an answer. Every document
    of the two others has a target."""


def read_documents(
    settings: DataSettings, checkpoint_path: Path, *, sequence_tokens: int
) -> Documents:
    """Read and encode everything that the settings name.

    Held out is, in this order: `held_out` (whose files are then no part of `train`); the
    validation or test split that lies beside the train split of a `datasets` folder; or
    `held_out_fraction` of the documents, chosen by what they say, whatever their order.

    Raises:
        DataError: Sequences longer than the model's, or data that cannot be read, encoded or
            learnt from.
    """
    num_token_ids = _check_model(checkpoint_path, sequence_tokens)
    train = find_sources(settings.train, settings, "train")
    held_out = find_sources(settings.held_out, settings, "held_out")
    if not held_out:
        held_out = companion_sources(settings.train, settings)
    train = _without(train, held_out)
    encoder = Encoder(checkpoint_path, train_on_prompts=settings.train_on_prompts)
    documents, left_out = _encode(encoder, train, settings, num_token_ids)
    if held_out:
        chosen, left_out_too = _encode(encoder, held_out, settings, num_token_ids)
        left_out += left_out_too
    else:
        is_held_out = _choose(documents, settings.held_out_fraction)
        chosen, documents = documents.subset(is_held_out), documents.subset(~is_held_out)
    return Documents(train=documents, held_out=chosen, num_left_out=left_out)


def _check_model(checkpoint_path: Path, sequence_tokens: int) -> int | None:
    """Check that sequences fit the model; return how many token ids it knows."""
    try:
        config = read_configuration(str(checkpoint_path))
    except CheckpointError as error:
        raise DataError(str(error)) from error
    longest = config.get("max_position_embeddings")
    if isinstance(longest, int) and sequence_tokens > longest:
        raise DataError(
            f"training.sequence_tokens ({sequence_tokens}) is more than the model's "
            f"max_position_embeddings ({longest}, {checkpoint_path / 'config.json'}); set "
            f"training.sequence_tokens to at most {longest}"
        )
    size = config.get("vocab_size")
    return size if isinstance(size, int) else None


def _without(train: Sequence[Source], held_out: Sequence[Source]) -> list[Source]:
    paths = {source.path.resolve() for source in held_out}
    left = [source for source in train if source.path.resolve() not in paths]
    if not left:
        raise DataError(
            f"training.data.train names {len(train)} files and all of them are held out; name "
            f"others in training.data.held_out, or leave it empty to use held_out_fraction"
        )
    return left


def _encode(
    encoder: Encoder, sources: Sequence[Source], settings: DataSettings, num_token_ids: int | None
) -> tuple[Corpus, int]:
    """Return the documents that have a target, and how many records give none."""
    encoded = encoder.encode(
        record for source in sources for record in read_records(source, settings.text_field)
    )
    targets = np.concatenate([[0], np.cumsum(encoded.row_counts())])
    has_target = np.diff(targets[encoded.offsets]) > 0
    num_left_out = int((~has_target).sum())
    files = f"{sources[0].path}" + (f" and {len(sources) - 1} others" if sources[1:] else "")
    if not has_target.any():
        raise DataError(
            f"{files}: none of {num_left_out} records has a token to learn; give text, "
            f"completions or assistant messages, or set training.data.train_on_prompts"
        )
    largest = int(encoded.tokens.max())
    if num_token_ids is not None and largest >= num_token_ids:
        raise DataError(
            f"{files}: the tokenizer gives token {largest}, but the model's vocabulary has "
            f"{num_token_ids}; use the tokenizer that belongs to the checkpoint"
        )
    return encoded if has_target.all() else encoded.subset(has_target), num_left_out


def _choose(documents: Corpus, fraction: float) -> npt.NDArray[np.bool_]:
    """Choose documents by a hash of their tokens, so equal ones are on the same side.

    A fraction above 0 gets at least one of two or more documents, and leaves at least one.
    """
    hashes = np.array([_hash(document) for document in documents], dtype=np.uint64)
    chosen = hashes < np.uint64(int(fraction * 2**64))
    if fraction > 0 and len(documents) > 1:
        if not chosen.any():
            chosen[np.argmin(hashes)] = True
        elif chosen.all():
            chosen[np.argmax(hashes)] = False
    return chosen if len(documents) > 1 else np.zeros(len(documents), dtype=np.bool_)


def _hash(document: Document) -> int:
    digest = hashlib.blake2b(document.tokens.astype("<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
