"""Prepared directories: a dataset that was tokenised once, to be mapped by every run that trains on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lit_swa.config import IGNORED
from lit_swa.data.dataset import Dataset, count_trained
from lit_swa.data.token_files import INFO_KEYS, check_tokens, id_dtype, tokenizer_hash
from lit_swa.formats.files import (
    atomic_file,
    directory_lock,
    find_inside,
    read_json,
    remove_leftovers,
    require_space,
    write_json,
)
from lit_swa.formats.tokenizer import Tokenizer

INFO_NAME, TOKENS_NAME, MASK_NAME, LENGTHS_NAME = "dataset.json", "tokens.bin", "trained.bin", "lengths.npy"
FORMAT = 1


def save_dataset(dataset: Dataset, directory: Path) -> None:
    """Write a directory that load_dataset takes, in place of a dataset that is there.

    dataset.json is written last: without it the directory is incomplete. Raises OSError when the disk is full.
    """
    kind = id_dtype(dataset.info["vocab_size"])
    n_tokens = int(dataset.lengths.sum())
    with directory_lock(directory):
        remove_leftovers(directory)
        require_space(directory, n_tokens * (kind.itemsize + 1) + 8 * len(dataset))
        (directory / INFO_NAME).unlink(missing_ok=True)
        with atomic_file(directory / TOKENS_NAME) as tokens, atomic_file(directory / MASK_NAME) as mask:
            for i in range(len(dataset)):
                ids, labels = dataset[i]
                tokens.write(ids.astype(kind).tobytes())
                mask.write((labels != IGNORED).tobytes())
        with atomic_file(directory / LENGTHS_NAME) as stream:
            np.save(stream, dataset.lengths.astype("<i8"), allow_pickle=False)
        content = {"format": FORMAT, "report": dataset.report, "fingerprint": dataset.fingerprint, **dataset.info}
        write_json(directory / INFO_NAME, content)


def load_prepared(
    directory: Path, tokenizer: Tokenizer, max_seq_length: int, wanted: dict[str, Any], limit: int | None = None
) -> Dataset:
    """The dataset of a directory that save_dataset wrote, its tokens mapped, cut to max_seq_length.

    wanted: prompt_style, preset and mask_prompt, each None where any will do. Raises ValueError when the directory was
    prepared in another way or for another tokenizer, or is damaged.
    """
    content = read_info(directory)
    for key, value in wanted.items():
        if value is not None and value != content[key]:
            raise ValueError(
                f"{directory} was prepared with {key}={content[key]!r} and not {value!r}: leave it so, or prepare it "
                "again."
            )
    if content["tokenizer"] != tokenizer_hash(tokenizer):
        raise ValueError(
            f"{directory} was prepared for another vocabulary (of {content['vocab_size']} tokens) than that of "
            f"{tokenizer.checkpoint_dir} ({tokenizer.vocab_size}): prepare it again."
        )
    if max_seq_length > content["max_seq_length"] and content["truncated"]:
        raise ValueError(
            f"{directory} was prepared with max_seq_length={content['max_seq_length']}, which cut "
            f"{content['truncated']} examples: for {max_seq_length} prepare it again."
        )
    dataset = open_prepared(directory, content)
    return shorten_examples(dataset, directory, max_seq_length, limit)


def read_info(directory: Path) -> dict[str, Any]:
    """dataset.json. Raises ValueError unless every key is there and holds what it should."""
    path = find_inside(directory, INFO_NAME)
    content = read_json(path)
    for key, fits in INFO_CHECKS.items():
        if key not in content or not fits(content[key]):
            raise ValueError(f"{path} is damaged or of another version ({key}): prepare the dataset again.")
    return content


def is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) < 10_000


def is_name(value: Any) -> bool:
    return value is None or (isinstance(value, str) and len(value) < 100)


def is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**31


INFO_CHECKS: dict[str, Callable[[Any], bool]] = {
    "format": lambda value: is_count(value) and value == FORMAT,
    "report": is_text,
    "fingerprint": is_text,
    "kind": lambda value: value in ("instruction", "text"),
    "prompt_style": is_name,
    "preset": is_name,
    "mask_prompt": lambda value: isinstance(value, bool),
    "max_seq_length": lambda value: is_count(value, 2),
    "truncated": is_count,
    "end_ids": lambda value: isinstance(value, list) and all(map(is_count, value)),
    "vocab_size": lambda value: is_count(value, 1),
    "tokenizer": is_text,
}


def open_prepared(directory: Path, content: dict[str, Any]) -> Dataset:
    """Map the files. Raises ValueError when they do not fit each other, the fingerprint or the vocabulary."""
    kind = id_dtype(content["vocab_size"])
    damaged = ValueError(f"{directory} is damaged: its files do not fit each other; prepare the dataset again.")
    try:  # mapped, since its header may name any length
        lengths = np.array(np.load(find_inside(directory, LENGTHS_NAME), mmap_mode="r", allow_pickle=False))
    except Exception as error:  # a wrong header is read as Python, and raises what Python's parser does
        raise (error if isinstance(error, OSError) else damaged) from None
    if lengths.dtype != np.dtype("<i8") or lengths.ndim != 1 or len(lengths) < 1 or lengths.min() < 2:
        raise damaged
    n_tokens = sum(lengths.tolist())  # in Python's ints, which do not overflow
    paths = [(find_inside(directory, TOKENS_NAME), kind), (find_inside(directory, MASK_NAME), np.dtype("u1"))]
    if any(path.stat().st_size != n_tokens * dtype.itemsize for path, dtype in paths):
        raise damaged
    tokens, mask = (np.memmap(path, dtype=dtype, mode="r") for path, dtype in paths)
    info = {key: content[key] for key in INFO_KEYS}
    dataset = Dataset(tokens, mask, np.cumsum(lengths) - lengths, lengths, content["report"], info)
    if dataset.fingerprint != content["fingerprint"] or dataset.trained.min() < 1:
        raise damaged
    check_tokens(tokens, content["vocab_size"], directory)
    return dataset


def shorten_examples(dataset: Dataset, name: object, max_seq_length: int, limit: int | None) -> Dataset:
    """The first `limit` examples, cut to max_seq_length; those without a trained token left are dropped."""
    n = len(dataset) if limit is None else min(limit, len(dataset))
    if n == len(dataset) and int(dataset.lengths.max()) <= max_seq_length:
        return dataset
    lengths = np.minimum(dataset.lengths[:n], max_seq_length)
    cut = int((dataset.lengths[:n] > max_seq_length).sum())
    trained = count_trained(dataset.mask, dataset.starts[:n], lengths)
    kept = np.flatnonzero(trained)
    if not kept.size:
        raise ValueError(
            f"None of the {n} examples of {name} has a trained token within {max_seq_length}: raise max_seq_length."
        )
    lengths, trained = lengths[kept], trained[kept]
    info = {**dataset.info, "max_seq_length": max_seq_length, "truncated": dataset.info["truncated"] + cut}
    report = (
        f"{name}: {len(kept)} examples, {int(lengths.sum())} tokens, {int(trained.sum())} of them trained; {cut} cut "
        f"to {max_seq_length} tokens, {n - len(kept)} dropped with nothing to train within {max_seq_length} tokens."
    )
    return Dataset(dataset.tokens, dataset.mask, dataset.starts[kept], lengths, report, info, trained)
