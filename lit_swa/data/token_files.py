"""Token files and plain text: one stream of token ids, on disk or made of documents, and its rows as a dataset.

A token file (.bin) has no header: ids of 16 bits for a vocabulary of up to 65,536, else of 32, little-endian.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_swa.data.dataset import Dataset
from lit_swa.data.prompts import encode_at
from lit_swa.data.readers import READERS
from lit_swa.data.records import Dropped, Fields, to_record
from lit_swa.formats.directory import load_config
from lit_swa.formats.files import atomic_file
from lit_swa.formats.tokenizer import Tokenizer
from lit_swa.texts import encode_file
from lit_swa.utils import ProgressLine

INFO_KEYS = (
    "kind", "prompt_style", "preset", "mask_prompt", "max_seq_length", "truncated", "end_ids", "vocab_size",
    "tokenizer",
)  # fmt: skip


def make_info(
    kind: str,
    tokenizer: Tokenizer,
    max_seq_length: int,
    *,
    prompt_style: str | None = None,
    preset: str | None = None,
    mask_prompt: bool = True,
    truncated: int = 0,
    end_ids: Sequence[int] = (),
) -> dict[str, Any]:
    """How a dataset was made: Dataset.info, with INFO_KEYS."""
    values = (kind, prompt_style, preset, mask_prompt, max_seq_length, truncated, list(end_ids))
    return dict(zip(INFO_KEYS, (*values, tokenizer.vocab_size, tokenizer_hash(tokenizer)), strict=True))


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """A hash of all tokens: the same for a vocabulary that another library saved."""
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.vocab_size)]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def id_dtype(vocab_size: int) -> np.dtype:
    """What ids are stored as."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def model_vocab_size(tokenizer: Tokenizer) -> int:
    """The size of the vocabulary, from the model's config if there is one: it decides between 16 and 32 bits."""
    if (tokenizer.checkpoint_dir / "lit_config.json").exists():
        return load_config(tokenizer.checkpoint_dir).vocab_size
    return tokenizer.vocab_size


def read_documents(files: Sequence[Path], tokenizer: Tokenizer, most: int | None = None) -> Iterator[np.ndarray]:
    """The ids of each document, BOS included where the tokenizer adds it, and EOS: uint32 arrays.

    most: a text file is encoded no further than so many ids; None: to its end.

    A .txt file is one document, and so is each {"text": ...} of a .jsonl, .json, .csv or .parquet file. Raises
    ValueError or OSError.
    """
    for file in files:
        if file.suffix == ".txt":
            yield encode_file(tokenizer, file, most, eos=True)
            continue
        for where, content in READERS[file.suffix](file):
            try:
                record = to_record(content, where, Fields(text="text"))
            except Dropped:
                continue
            yield np.array(encode_at(where, record, "plain", tokenizer, False)[0][0].ids, dtype=np.uint32)


def write_token_file(
    files: Sequence[Path], tokenizer: Tokenizer, output: Path, progress: ProgressLine | None = None
) -> tuple[int, int]:
    """Write documents as one stream of ids; returns (documents, tokens).

    The file appears whole or not at all. Raises ValueError or OSError.
    """
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"There is no file {file}: give texts, or a directory of .txt files.")
        if file.suffix not in (*READERS, ".txt"):
            raise ValueError(f"{file} is no text: it must be .txt, or {', '.join(READERS)} with a text in each record.")
    vocab_size = model_vocab_size(tokenizer)
    kind = id_dtype(vocab_size)
    n_documents = n_tokens = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as stream:
        for ids in read_documents(files, tokenizer):
            check_tokens(ids, vocab_size, f"Document {n_documents} (counted from 0)")
            stream.write(ids.astype(kind).tobytes())
            n_documents, n_tokens = n_documents + 1, n_tokens + len(ids)
            if progress:
                progress.show(n_documents, f"{n_tokens} tokens", tokens=n_tokens)
        if not n_tokens:
            raise ValueError(f"{files[0]} holds no text: give a file with some.")
    return n_documents, n_tokens


def open_token_file(file: Path, vocab_size: int) -> np.ndarray:
    """The ids in a .bin file, memory-mapped. Raises ValueError when they are not of this vocabulary's width."""
    kind = id_dtype(vocab_size)
    n_bytes = file.stat().st_size
    if n_bytes == 0:
        raise ValueError(f"{file} is empty: give some tokens.")
    if n_bytes % kind.itemsize:
        raise ValueError(
            f"{file} has {n_bytes} bytes, which are no whole number of {8 * kind.itemsize}-bit ids, as a vocabulary "
            f"of {vocab_size} has them: the file is truncated, or made for another vocabulary."
        )
    tokens = np.memmap(file, dtype=kind, mode="r")
    low_halves, high_halves = tokens[0:4096:2], tokens[1:4096:2]
    if kind.itemsize == 2 and len(tokens) >= 16 and low_halves.any() and not high_halves.any():
        raise ValueError(f"{file} holds 32-bit ids, and a vocabulary of {vocab_size} has 16-bit ones: write it anew.")
    return tokens


def check_tokens(tokens: np.ndarray, vocab_size: int, data: object, piece: int = 2**22) -> str:
    """A hash of the ids, the same from whichever file they come. Raises ValueError for an id beyond the vocabulary."""
    digest = hashlib.sha256()
    for start in range(0, len(tokens), piece):
        ids = tokens[start : start + piece]
        if (outside := np.flatnonzero(ids >= vocab_size)).size:
            raise ValueError(
                f"{data} has the token id {ids[outside[0]]} at position {start + outside[0]}, and the vocabulary has "
                f"{vocab_size}: the tokens are another tokenizer's."
            )
        digest.update(ids.astype("<u4").tobytes())
    return digest.hexdigest()


def load_text(
    files: list[Path],
    data: Path | str,
    tokenizer: Tokenizer,
    row: int,
    limit: int | None,
    progress: ProgressLine | None,
) -> Dataset:
    """All documents as one stream, or a token file, in rows of `row` tokens."""
    if files[0].suffix == ".bin":
        vocab_size = model_vocab_size(tokenizer)
        tokens = open_token_file(files[0], vocab_size)
        check_tokens(tokens, vocab_size, files[0])
    else:
        parts, n = [], 0
        for ids in read_documents(files, tokenizer, None if limit is None else limit * row):
            parts.append(ids)
            n += len(ids)
            if progress:
                progress.show(len(parts), f"{n} tokens", tokens=n)
            if limit is not None and n >= limit * row:
                break
        tokens = np.concatenate(parts)
    n_rows = min(len(tokens) // row, limit or len(tokens))
    if not n_rows:
        raise ValueError(
            f"{data} gives {len(tokens)} tokens and a row has {row}: lower max_seq_length, or give more text."
        )
    rest = len(tokens) - n_rows * row
    report = (
        f"{data}: {n_rows} examples of {row} tokens, {n_rows * row} tokens, {n_rows * (row - 1)} of them trained; "
        f"none cut, {rest} tokens behind the last row dropped."
    )
    starts = np.arange(n_rows, dtype=np.int64) * row
    lengths = np.full(n_rows, row, dtype=np.int64)
    return Dataset(tokens, None, starts, lengths, report, make_info("text", tokenizer, row))
