"""A dataset: examples of token ids and labels over one flat array; splitting it, and packing examples into rows.

    dataset = load_dataset("alpaca.json", tokenizer, max_seq_length=1024)
    example = dataset[0]                        # Example(ids, labels), both (T,) int32
    train, validation = split_dataset(dataset, 0.05, seed=1234)
    rows = pack(train.lengths, 1024, seed=0)    # lists of examples that fit one row

A label is the token itself where it is trained, and IGNORED where it is not. Labels are aligned with ids; the trainer
shifts them. The tokens lie in one flat array, in memory or mapped from a file.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any, NamedTuple

import numpy as np

from lit_swa.config import IGNORED


class Example(NamedTuple):
    """T tokens, and which of them are trained. labels[0] is IGNORED: nothing predicts the first token."""

    ids: np.ndarray  # (T,) int32
    labels: np.ndarray  # (T,) int32


class Dataset:
    """Examples over one flat array of tokens.

    Attributes:
        lengths: (n,) int64, tokens of each example.
        trained: (n,) int64, trained tokens of each example, at least one.
        report: one sentence: examples, tokens, trained tokens, what was cut and what was dropped.
        info: how it was made: kind ("instruction" or "text"), prompt_style, preset, mask_prompt, max_seq_length,
            truncated (examples cut), end_ids (tokens that end an answer), tokenizer (its identity), vocab_size.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        mask: np.ndarray | None,
        starts: np.ndarray,
        lengths: np.ndarray,
        report: str,
        info: dict[str, Any],
        trained: np.ndarray | None = None,
    ) -> None:
        """tokens: (N,) all ids. mask: (N,), 1 where a token is trained; None trains all but an example's first token.
        starts, lengths: (n,), where each example is. trained: counted here unless given."""
        self.tokens, self.mask, self.starts, self.lengths = tokens, mask, starts, lengths
        self.report, self.info = report, info
        if trained is None:
            trained = lengths - 1 if mask is None else count_trained(mask, starts, lengths)
        self.trained = trained

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Example:
        if not -len(self) <= i < len(self):
            raise IndexError(f"There is no example {i}: there are {len(self)}.")
        start = int(self.starts[i])
        end = start + int(self.lengths[i])
        ids = self.tokens[start:end].astype(np.int32)
        labels = ids.copy() if self.mask is None else np.where(self.mask[start:end], ids, np.int32(IGNORED))
        labels[:1] = IGNORED
        return Example(ids, labels)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the ids and labels of all examples in order. A resumed run compares it."""
        digest = hashlib.sha256(self.lengths.astype("<i8").tobytes())
        for i in range(len(self)):
            ids, labels = self[i]
            digest.update(ids.astype("<i4").tobytes())
            digest.update((labels != IGNORED).tobytes())
        return digest.hexdigest()

    def subset(self, index: np.ndarray, report: str) -> Dataset:
        """The examples of these indices, over the same tokens."""
        starts, lengths, trained = self.starts[index], self.lengths[index], self.trained[index]
        return Dataset(self.tokens, self.mask, starts, lengths, report, self.info, trained)


def count_trained(mask: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(n,) how many tokens of each example are trained, never counting its first."""
    return np.array(
        [np.count_nonzero(mask[s + 1 : s + n]) for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)],
        dtype=np.int64,
    )


def split_dataset(dataset: Dataset, validation: float | int, seed: int) -> tuple[Dataset, Dataset]:
    """(training, validation), disjoint, both in the dataset's order; the same seed gives the same split.

    validation: how many examples, from 1; or which part of them, between 0 and 1. Some more are taken where a
    conversation has several, so that none is on both sides. Raises ValueError for none or all.
    """
    n = len(dataset)
    count = round(validation * n) if 0 < validation < 1 else validation
    if count != int(count) or not 1 <= count < n:
        raise ValueError(
            f"A validation set of {validation} out of {n} examples does not fit: give a number of examples below {n}, "
            "or a part between 0 and 1 that is at least one example."
        )
    numbers = number_conversations(dataset)
    numbers = numbers if numbers[-1] else np.arange(n)  # one conversation alone is cut all the same
    shuffled = np.random.RandomState(seed).permutation(numbers[-1] + 1)  # NumPy promises that its numbers stay the same
    taken = np.cumsum(np.bincount(numbers)[shuffled])
    chosen = shuffled[: min(int(np.searchsorted(taken, count)) + 1, len(shuffled) - 1)]
    held_out = np.isin(numbers, chosen)
    parts = [np.flatnonzero(~held_out), np.flatnonzero(held_out)]
    return tuple(
        dataset.subset(
            index,
            f"{len(index)} {name} examples, {int(dataset.lengths[index].sum())} tokens, "
            f"{int(dataset.trained[index].sum())} of them trained.",
        )
        for name, index in zip(("training", "validation"), parts, strict=True)
    )


def number_conversations(dataset: Dataset) -> np.ndarray:
    """(n,) numbers in order, the same for neighbours that begin with the same prompt, such as the answers of one
    conversation."""
    if dataset.mask is None or not dataset.info["mask_prompt"]:
        return np.arange(len(dataset))
    new, before = [], None
    for i in range(len(dataset)):
        ids, labels = dataset[i]
        new.append(before is None or not np.array_equal(ids[: len(before)], before))
        if new[-1]:
            prompt = ids[: int(np.argmax(labels != IGNORED))]
            before = prompt if len(prompt) > 1 else None  # BOS alone is no prompt
    return np.cumsum(new) - 1


def pack(lengths: np.ndarray, max_seq_length: int, seed: int) -> list[list[int]]:
    """Bins of at most max_seq_length tokens, as lists of example indices, shuffled. Each example is in one bin.

    Best fit, longest first: an example goes into the bin where it leaves the least room. The seed decides
    which examples of a length go together, and the order. Raises ValueError for an example that fits no bin.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= max_seq_length:
        raise ValueError(
            f"An example has {int(lengths.max())} tokens and a row {max_seq_length}: an example must have 1 to "
            f"{max_seq_length} tokens."
        )
    max_seq_length = min(max_seq_length, max(1, int(lengths.sum())))  # more room than that is of no use
    random = np.random.RandomState(seed)
    order = random.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(max_seq_length + 1)]  # room -> the bins that have so much left
    rooms = 0  # bit r is set where with_room[r] is not empty: a shift finds the least room that is enough
    for i, n in zip(order.tolist(), lengths[order].tolist(), strict=True):
        enough = rooms >> n
        if enough:
            room = n + (enough & -enough).bit_length() - 1
            b = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            bins[b].append(i)
        else:
            room, b = max_seq_length, len(bins)
            bins.append([i])
        left = room - n
        if left:
            with_room[left].append(b)
            rooms |= 1 << left
    mixed = [bins[b] for b in random.permutation(len(bins)).tolist()]
    return [[one[k] for k in random.permutation(len(one))] for one in mixed]
