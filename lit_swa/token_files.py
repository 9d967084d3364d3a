"""Directories of token files, and the blocks of tokens that pretraining reads from them.

A directory holds shards `tokens-00000.bin` (ids of 16 or 32 bits, little-endian, without a header), beside each of them
`tokens-00000.docs` (where its documents start, as 64-bit numbers), and `index.json`: the vocabulary, and the length and
the SHA-256 of every file. index.json is written last: without it the directory is unfinished.

    data = TokenData({"data/web": 0.7, "data/code": 0.3}, block_length=2048, batch_size=64, seed=1)
    for batch in data:                    # batch.ids (B, T + 1); without an end
        loss = model(batch.inputs, targets=batch.targets)
        state = data.state_dict()         # load_state_dict(state) goes on with the next batch

Which tokens a batch holds is a function of the seed and of the batch's number alone. Nothing is drawn, so that nothing
of the order has to be kept: an epoch's order is a permutation that is computed number by number.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_swa.checks import check_range
from lit_swa.config import IGNORED
from lit_swa.data.token_files import tokenizer_hash
from lit_swa.formats.files import find_inside, format_bytes, read_json
from lit_swa.formats.tokenizer import Tokenizer

INDEX, MIXTURE, JOB = "index.json", "mixture.json", "job.json"  # JOB is there as long as a directory is unfinished
FORMAT = 1
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
STARTS = np.dtype("<u8")
OPEN_FILES = 256  # shards that are mapped at once: each takes a file descriptor
CYCLE = 2**16  # samples in which a mixture's weights are met exactly

# -------------------------------------------------------------------------------------------------------------- writing


class ShardWriter:
    """Writes documents, one after the other, into a stream of ids, and notes where they start."""

    def __init__(self, stream: BinaryIO, dtype: str) -> None:
        self.stream, self.dtype = stream, DTYPES[dtype]
        self.digest, self.starts = hashlib.sha256(), array("Q")
        self.n_tokens = self.n_text_bytes = 0

    def add(self, ids: np.ndarray, n_text_bytes: int) -> None:
        """Write a document's ids, BOS and EOS included. n_text_bytes: the length of its text in UTF-8."""
        data = np.ascontiguousarray(ids, dtype=self.dtype).tobytes()
        self.stream.write(data)
        self.digest.update(data)
        self.starts.append(self.n_tokens)
        self.n_tokens += len(ids)
        self.n_text_bytes += n_text_bytes

    def start_bytes(self) -> bytes:
        """What the shard's .docs file holds."""
        return np.array(self.starts, dtype=STARTS).tobytes()

    def record(self) -> dict[str, Any]:
        """The shard's entry in index.json, without its name."""
        return {
            "tokens": self.n_tokens,
            "documents": len(self.starts),
            "text_bytes": self.n_text_bytes,
            "sha256": self.digest.hexdigest(),
            "docs_sha256": hashlib.sha256(self.start_bytes()).hexdigest(),
        }


# -------------------------------------------------------------------------------------------------------------- reading


@functools.lru_cache(maxsize=OPEN_FILES)
def map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r")


class TokenDirectory:
    """All tokens of a directory as one sequence: shard behind shard, mapped as they are read.

    Raises OSError or ValueError, in one sentence, for a directory that is unfinished, damaged or truncated.

    Attributes:
        n_tokens, n_documents, n_text_bytes: of all shards together.
        vocab_size, eos_id, tokenizer: of the tokenizer that made the ids; the latter is a hash of its vocabulary.
        digest: the same for the same tokens in the same order.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        content = read_index(self.directory)
        self.vocab_size, self.eos_id, self.tokenizer = (content[key] for key in ("vocab_size", "eos_id", "tokenizer"))
        self.dtype, self.shards = DTYPES[content["dtype"]], content["shards"]
        self.borders = np.cumsum([0, *(shard["tokens"] for shard in self.shards)])
        self.n_tokens = int(self.borders[-1])
        self.n_documents, self.n_text_bytes = (sum(s[key] for s in self.shards) for key in ("documents", "text_bytes"))
        self.digest = hashlib.sha256(json.dumps(self.shards).encode()).hexdigest()
        for shard in self.shards:
            self.check_length(shard["file"], shard["tokens"] * self.dtype.itemsize, shard["sha256"])
            self.check_length(docs_name(shard["file"]), shard["documents"] * STARTS.itemsize, shard["docs_sha256"])

    def check_length(self, name: str, expected: int, sha256: str) -> None:
        n_bytes = self.size(name)
        if n_bytes != expected:
            what = "truncated" if n_bytes < expected else "too long"
            raise ValueError(
                f"{self.directory / name} is {what}: it has {n_bytes} bytes and {INDEX} says {expected} (SHA-256 "
                f"{sha256[:16]}...); copy it again, or delete {INDEX} and prepare the text again."
            )

    def size(self, name: str) -> int:
        """The length of one of the files, which an index from elsewhere may name."""
        return find_inside(self.directory, name).stat().st_size

    def path(self, name: str) -> Path:
        """Where one of the files lies on this machine."""
        return self.directory / name

    def verify(self) -> None:
        """Read every byte, and compare it with the checksums. Raises ValueError that names the file."""
        for shard in self.shards:
            for name, expected in ((shard["file"], shard["sha256"]), (docs_name(shard["file"]), shard["docs_sha256"])):
                with open(self.path(name), "rb") as stream:
                    found = hashlib.file_digest(stream, "sha256").hexdigest()
                if found != expected:
                    raise ValueError(
                        f"{self.directory / name} is damaged: its SHA-256 is {found[:16]}... and {INDEX} says "
                        f"{expected[:16]}...; copy it again, or delete {INDEX} and prepare the text again."
                    )

    def read(self, start: int, out: np.ndarray) -> np.ndarray:
        """Fill an array with the tokens from `start` on, and return it."""
        done = 0
        for shard, a, b in self.pieces(start, start + len(out)):
            out[done : done + b - a] = map_file(self.path(shard["file"]), self.dtype)[a:b]
            done += b - a
        return out

    def document_lengths(self, start: int, count: int) -> list[int]:
        """How many of the tokens start .. start + count each document has, in order."""
        borders, done = [np.zeros(1, dtype=np.int64)], 0
        for shard, a, b in self.pieces(start, start + count):
            starts = map_file(self.path(docs_name(shard["file"])), STARTS)
            first, last = np.searchsorted(starts, [a, b])
            borders.append(starts[first:last].astype(np.int64) - a + done)
            done += b - a
        return np.diff(np.unique(np.concatenate([*borders, [count]]))).tolist()

    def pieces(self, start: int, stop: int) -> Iterator[tuple[dict[str, Any], int, int]]:
        """(shard, from, to) of the shards that the tokens start .. stop lie in."""
        at = int(np.searchsorted(self.borders, start, side="right")) - 1
        while start < stop:
            first, behind = int(self.borders[at]), min(stop, int(self.borders[at + 1]))
            yield self.shards[at], start - first, behind - first
            start, at = behind, at + 1


Place = str | Path | TokenDirectory


def docs_name(shard: str) -> str:
    return f"{shard.removesuffix('.bin')}.docs"


def read_index(directory: Path) -> dict[str, Any]:
    """The content of index.json, checked. Raises OSError or ValueError."""
    if not (directory / INDEX).is_file():
        if (directory / JOB).is_file():
            raise FileNotFoundError(
                f"{directory} is unfinished: give the command that made it (scripts/prepare_text.py) again: it "
                "goes on where it stopped."
            )
        raise FileNotFoundError(
            f"{directory} holds no {INDEX}: copy it from where it was made, or make it with scripts/prepare_text.py."
        )
    content = read_json(find_inside(directory, INDEX))
    counts = ("tokens", "documents", "text_bytes")
    sound = content.get("format") == FORMAT and content.get("dtype") in DTYPES
    sound = sound and type(content.get("vocab_size")) is int and isinstance(content.get("tokenizer"), str)
    shards = content.get("shards") if sound else None
    for shard in shards if isinstance(shards, list) and shards else [None]:
        sound = sound and isinstance(shard, dict) and all(type(shard.get(c)) is int and shard[c] > 0 for c in counts)
        sound = sound and all(isinstance(shard.get(key), str) for key in ("file", "sha256", "docs_sha256"))
    if not sound:
        raise ValueError(f"{directory / INDEX} is damaged, or of another version: prepare the text again.")
    return {"eos_id": None} | content


def check_tokenizer(directory: TokenDirectory, tokenizer: Tokenizer) -> None:
    """Raises ValueError where the ids were not made by a tokenizer with this vocabulary."""
    if directory.tokenizer != tokenizer_hash(tokenizer):
        raise ValueError(
            f"{directory.directory} was made with another vocabulary (of {directory.vocab_size} tokens) than that of "
            f"{tokenizer.checkpoint_dir} ({tokenizer.vocab_size}): prepare the text again, or give its own tokenizer."
        )


# ------------------------------------------------------------------------------------------------------ an order by key


def scramble(x: np.ndarray) -> np.ndarray:
    """64 bits to 64 bits, one to one, every bit of the result depending on all: the finaliser of SplitMix64 (Steele,
    Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def make_key(*numbers: int) -> np.uint64:
    """A key that depends on all of the numbers and on their order."""
    key = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        key = scramble(key + np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(number % 2**64))
    return key[0]


def permute(numbers: np.ndarray, n: int, key: np.uint64, rounds: int = 6) -> np.ndarray:
    """Where the permutation of 0 .. n - 1 with this key takes each of the numbers.

    A Feistel network over an even number of bits permutes 0 .. 4^h - 1 >= n - 1; what lies beyond n goes through it
    again until it does not (Black and Rogaway 2002), less than four times on average.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = scramble(key + np.arange(1, rounds + 1, dtype=np.uint64))
    x = np.array(numbers, dtype=np.uint64)
    todo = np.arange(len(x))
    while todo.size:
        left, right = x[todo] >> half, x[todo] & low
        for k in keys:
            left, right = right, left ^ (scramble(right ^ k) & low)
        x[todo] = left << half | right
        todo = todo[x[todo] >= n]
    return x.astype(np.int64)


def interleave(weights: Sequence[float], key: np.uint64) -> np.ndarray:
    """CYCLE numbers of sources in a shuffled order, each as often as its weight says."""
    shares = np.array(weights, dtype=np.float64) / sum(weights) * CYCLE
    counts = np.maximum(np.floor(shares).astype(np.int64), 1)
    for i in np.argsort(counts - shares, kind="stable")[: max(0, CYCLE - counts.sum())]:
        counts[i] += 1
    counts[np.argmax(counts)] -= counts.sum() - CYCLE  # what was too much, since every source comes at least once
    return np.repeat(np.arange(len(counts)), counts)[permute(np.arange(CYCLE), CYCLE, key)]


# ----------------------------------------------------------------------------------------------------------- the loader


class TokenBatch(NamedTuple):
    """ids: (B, T + 1) int64. lengths: of the documents in each row, where documents are to be kept apart."""

    ids: Tensor
    lengths: list[list[int]] | None = None

    @property
    def inputs(self) -> Tensor:
        """(B, T)"""
        return self.ids[:, :-1]

    @property
    def targets(self) -> Tensor:
        """(B, T); where documents are kept apart, none predicts the first token of the next."""
        if self.lengths is None:
            return self.ids[:, 1:]
        targets = self.ids[:, 1:].clone()
        for row, lengths in zip(targets, self.lengths, strict=True):
            row[np.cumsum(lengths[:-1]) - 1] = IGNORED
        return targets

    @property
    def documents(self) -> list[int] | None:
        """The lengths of the documents in the inputs, row behind row: model(inputs.reshape(1, -1), documents=...)."""
        if self.lengths is None:
            return None
        rows = [[*lengths[:-1], lengths[-1] - 1] for lengths in self.lengths]
        return [length for row in rows for length in row if length]


class Source(NamedTuple):
    tokens: TokenDirectory
    weight: float
    n_blocks: int


class TokenData:
    """Shuffled blocks of T + 1 tokens from several directories, in micro-batches of one rank. It has no end: behind the
    last block of a directory its next epoch begins, in another order.

    Block i of a directory holds its tokens i * T .. (i + 1) * T: the last token of a block is the first of the next, so
    that every token is predicted once in an epoch. A step's global batch is the same for every number of ranks,
    micro-batches and workers.
    """

    def __init__(
        self,
        sources: Place | Mapping[Place, float],
        block_length: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int | None = None,
        documents: bool = False,
        tokenizer: Tokenizer | None = None,
        vocab_size: int | None = None,
        num_workers: int = 0,
        verify: bool = True,
    ) -> None:
        """
        Args:
            sources: A directory that scripts/prepare_text.py made, or several with their weights, which count samples.
                A directory may be a mixture: it holds others, and mixture.json. It may be open already, as one in a
                bucket is (see token_buckets.py).
            block_length: T, the tokens of a block that are predicted.
            batch_size: Blocks of one optimiser step, over all ranks and micro-batches.
            micro_batch_size: Blocks of one batch of this rank; by default its whole share of a step.
            documents: Give the documents' lengths, so that they can be kept apart.
            tokenizer, vocab_size: Refuse directories that another tokenizer made, or whose ids the model does not have.
            num_workers: Processes that read ahead; 0: none.
            verify: Compare all files with their checksums first, which reads every byte.

        Raises OSError or ValueError, in one sentence.
        """
        for name, value in (("block_length", block_length), ("batch_size", batch_size), ("world_size", world_size)):
            check_range(name, value, 1, whole=True)
        check_range("rank", rank, 0, world_size - 1, whole=True)
        check_range("num_workers", num_workers, 0, whole=True)
        micro = micro_batch_size or max(1, batch_size // world_size)
        if batch_size % (micro * world_size):
            raise ValueError(
                f"batch_size={batch_size} does not fit: it must be a multiple of the {world_size} processes times "
                f"their micro-batches of {micro}."
            )
        self.block_length, self.batch_size, self.micro_batch_size = block_length, batch_size, micro
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.documents, self.num_workers = documents, num_workers
        self.sources = open_sources(sources, block_length, batch_size, tokenizer, vocab_size)
        if verify:
            for source in self.sources:
                source.tokens.verify()
        self.pattern = interleave([source.weight for source in self.sources], make_key(seed))
        self.counts = np.bincount(self.pattern, minlength=len(self.sources))
        self.ranks = np.zeros(CYCLE, dtype=np.int64)  # how often the pattern has named the same source before
        for i, count in enumerate(self.counts):
            self.ranks[self.pattern == i] = np.arange(count)
        self.position = 0  # samples that all ranks together have been given

    @property
    def n_tokens(self) -> int:
        """Of all directories together."""
        return sum(source.tokens.n_tokens for source in self.sources)

    @property
    def samples_per_batch(self) -> int:
        """Samples that all ranks together take from one batch to the next."""
        return self.micro_batch_size * self.world_size

    def epochs(self) -> dict[str, float]:
        """How often each directory has been read so far."""
        seen = self.counts * (self.position // CYCLE)
        seen = seen + np.bincount(self.pattern[: self.position % CYCLE], minlength=len(self.sources))
        return {str(s.tokens.directory): float(n / s.n_blocks) for s, n in zip(self.sources, seen, strict=True)}

    def places(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, block) of each sample, counted from the beginning of training."""
        cycles, within = np.divmod(samples, CYCLE)
        numbers = self.pattern[within]
        blocks = cycles * self.counts[numbers] + self.ranks[within]  # as if the source had no end
        for number in np.unique(numbers):
            n_blocks = self.sources[number].n_blocks
            own = np.flatnonzero(numbers == number)
            epochs, inside = np.divmod(blocks[own], n_blocks)
            for epoch in np.unique(epochs):
                key, same = make_key(self.seed, int(number) + 1, int(epoch)), epochs == epoch
                blocks[own[same]] = permute(inside[same], n_blocks, key)
        return numbers, blocks

    def __getitem__(self, number: int) -> TokenBatch:
        """This rank's micro-batch of that number, counted from the beginning of training."""
        first = number * self.samples_per_batch + self.rank * self.micro_batch_size
        samples = first + np.arange(self.micro_batch_size)
        ids = np.empty((len(samples), self.block_length + 1), dtype=np.int64)
        lengths = []
        for row, source, block in zip(ids, *self.places(samples), strict=True):
            tokens, start = self.sources[source].tokens, int(block) * self.block_length
            tokens.read(start, row)
            if self.documents:
                lengths.append(tokens.document_lengths(start, len(row)))
        return TokenBatch(torch.from_numpy(ids), lengths if self.documents else None)

    def __iter__(self) -> Iterator[TokenBatch]:
        """The batches from here on, without end. A batch counts as read as soon as it is given."""
        numbers = itertools.count(self.position // self.samples_per_batch)
        batches: Iterator[TokenBatch] = map(self.__getitem__, numbers)
        if self.num_workers:
            from torch.utils.data import DataLoader

            batches = iter(DataLoader(self, None, sampler=numbers, num_workers=self.num_workers, collate_fn=_as_it_is))
        for batch in batches:
            self.position += self.samples_per_batch
            yield batch

    def identity(self) -> dict[str, Any]:
        """What the order of samples depends on."""
        directories = [[source.tokens.digest, source.weight] for source in self.sources]
        return {
            "data": hashlib.sha256(json.dumps(directories).encode()).hexdigest(),
            "block_length": self.block_length,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, **self.identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the last batch that was given before state_dict. Raises ValueError where the next one would not
        be that of the interrupted run."""
        for key, value in self.identity().items():
            if state.get(key) != value:
                what = "other data or weights" if key == "data" else f"{key}={state.get(key)!r} and not {value!r}"
                raise ValueError(f"The interrupted run had {what}: go on with the same, or start a new run.")
        position = state.get("position")
        check_range("position", position, 0, whole=True)
        if position % self.samples_per_batch:
            raise ValueError(
                f"The interrupted run stopped within a step, behind {position} samples, and {self.world_size} ranks "
                f"take {self.samples_per_batch} at a time: go on with as many ranks as it had."
            )
        self.position = position


def _as_it_is(batch: TokenBatch) -> TokenBatch:
    return batch


def open_sources(
    given: Place | Mapping[Place, float],
    block_length: int,
    batch_size: int,
    tokenizer: Tokenizer | None,
    vocab_size: int | None,
) -> list[Source]:
    """The directories with their weights and numbers of blocks, checked."""
    weights = expand_mixtures(given)
    total, sources = sum(weights.values()), []
    for directory, weight in weights.items():
        tokens = directory if isinstance(directory, TokenDirectory) else TokenDirectory(directory)
        directory = tokens.directory
        if tokenizer is not None:
            check_tokenizer(tokens, tokenizer)
        if vocab_size is not None and tokens.vocab_size > vocab_size:
            raise ValueError(
                f"{directory} holds ids of a vocabulary of {tokens.vocab_size}, and the model's has {vocab_size}: "
                "prepare the text with the model's tokenizer."
            )
        if sources and tokens.tokenizer != sources[0].tokens.tokenizer:
            raise ValueError(
                f"{directory} and {sources[0].tokens.directory} were made with different vocabularies: prepare one of "
                "them again."
            )
        n_blocks = (tokens.n_tokens - 1) // block_length
        share = max(1, round(batch_size * weight / total))
        if n_blocks < share:
            fewer = f"the batch's size (now {batch_size}) or " if batch_size > 1 else ""
            raise ValueError(
                f"{directory} holds {tokens.n_tokens} tokens, and one batch takes {share} block{'s' * (share > 1)} of "
                f"{block_length} + 1 from it: give more text, or lower {fewer}the blocks' length."
            )
        sources.append(Source(tokens, weight, n_blocks))
    return sources


def expand_mixtures(given: Place | Mapping[Place, float]) -> dict[Path | TokenDirectory, float]:
    """Directory -> weight, with the parts of a mixture in place of the mixture. Raises OSError or ValueError."""
    given = given if isinstance(given, Mapping) else {given: 1.0}
    if not given:
        raise ValueError("No directory of token files is given: give one.")
    found: dict[Path | TokenDirectory, float] = {}
    for name, weight in given.items():
        check_range(f"The weight of {name}", weight, 1e-9)
        directory = name if isinstance(name, TokenDirectory) else Path(name)
        parts: dict[Path | TokenDirectory, float] = {directory: 1.0}
        if isinstance(directory, Path) and (directory / MIXTURE).is_file():
            content = read_json(find_inside(directory, MIXTURE))
            if not content:
                raise ValueError(f'{directory / MIXTURE} names no directory: give some weights, as {{"web": 0.7}}.')
            for part, share in content.items():
                check_range(f"The weight of {part} in {directory / MIXTURE}", share, 1e-9)
            parts = {find_part(directory, part): share for part, share in content.items()}
        for part, share in parts.items():
            found[part] = found.get(part, 0.0) + weight * share / sum(parts.values())
    return found


def find_part(directory: Path, name: str) -> Path:
    """A directory of a mixture, which lies in the mixture's own."""
    if Path(name).name != name or name in ("", ".."):
        raise ValueError(f"{directory / MIXTURE} names {name[:80]!r}, which is no directory in it: prepare it again.")
    return directory / name


def describe(tokens: TokenDirectory) -> str:
    """One line on what a directory holds."""
    size = tokens.n_tokens * tokens.dtype.itemsize
    return (
        f"{tokens.n_documents} documents, {tokens.n_tokens} tokens in {len(tokens.shards)} files of "
        f"{format_bytes(size)} together, {tokens.n_text_bytes / tokens.n_tokens:.2f} bytes of text a token"
    )
