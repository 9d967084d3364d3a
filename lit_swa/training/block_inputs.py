"""What a block reads: the residual stream before its first norm, of every token of the texts, as files.

block-NNN/inputs holds a table of N rows of C elements, one a token: the texts that are trained on, one behind the
other, then those that are validated on. It is cut into part-NNNNN.safetensors of about PART_BYTES, between texts.
inputs.json, written first, says what it is a table of and which parts there must be; each part is there whole or not at
all, and its tensor bears the table's mark. So a run that is killed, or ends with a full disk, goes on at the next part,
and a part that was left or copied from another table counts as missing.
"""

import bisect
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from lit_swa.data import Dataset
from lit_swa.formats.files import (
    DTYPES,
    LazyTensor,
    as_lazy,
    directory_lock,
    find_inside,
    open_safetensors,
    read_json,
    remove_directory,
    remove_leftovers,
    write_json,
    write_safetensors,
)
from lit_swa.model import GPT
from lit_swa.training.blocks import INPUTS_AGAIN, INPUTS_FILE, read_own
from lit_swa.training.resuming import difference

PART_BYTES = 2**28  # of a part, which is in memory while it is made
MOST_ROWS = 2**31  # a row's number is an int32, as a token is
LENGTHS_FILE = "lengths.safetensors"
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values() if dtype.is_floating_point}


class Texts(NamedTuple):
    """What is trained on, and what is validated on, as one row of texts."""

    data: Dataset
    held_out: Dataset | None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text."""
        return np.concatenate([d.lengths for d in self if d is not None])

    def ids(self, i: int) -> np.ndarray:
        return (self.data[i] if i < len(self.data) else self.held_out[i - len(self.data)]).ids

    @property
    def identity(self) -> dict[str, Any]:
        held_out = None if self.held_out is None else self.held_out.fingerprint
        return {"data": self.data.fingerprint, "validation": held_out}


class Table(NamedTuple):
    """What inputs.json holds."""

    identity: dict[str, Any]  # of which layer, which weights and which texts it is
    dtype: str
    width: int  # C
    max_seq_length: int  # of a text
    trained: int  # texts that are trained on; the others are validated on
    parts: list[int]  # rows of each

    @property
    def row_bytes(self) -> int:
        return self.width * DTYPE_NAMES[self.dtype].itemsize


def mark(table: Table) -> str:
    """The name of the tensors in a table's files."""
    return hashlib.sha256(json.dumps(table._asdict(), sort_keys=True).encode()).hexdigest()[:16]


def part_name(n: int) -> str:
    return f"part-{n:05d}.safetensors"


def cut_parts(lengths: np.ndarray, most: int) -> list[int]:
    """How many texts each part has: as many as `most` rows hold, and at least one."""
    counts, rows = [], 0
    for n in lengths.tolist():
        if not counts or rows + n > most:
            counts, rows = [*counts, 0], 0
        counts[-1], rows = counts[-1] + 1, rows + n
    return counts


def make_table(texts: Texts, identity: dict[str, Any], dtype: torch.dtype, width: int, max_seq_length: int) -> Table:
    lengths, counts = texts.lengths, parts_of(texts.lengths, dtype, width)
    rows = [int(lengths[a:b].sum()) for a, b in itertools.pairwise(itertools.accumulate(counts, initial=0))]
    if sum(rows) >= MOST_ROWS:
        raise ValueError(f"The texts have {sum(rows)} tokens, and at most {MOST_ROWS} are numbered: give --limit.")
    name = str(dtype).removeprefix("torch.")
    return Table(identity, name, width, max_seq_length, len(texts.data), rows)


def parts_of(lengths: np.ndarray, dtype: torch.dtype, width: int) -> list[int]:
    return cut_parts(lengths, max(1, PART_BYTES // (width * dtype.itemsize)))


# -------------------------------------------------------------------------------------------------------------- writing


def held_table(directory: Path) -> dict[str, Any] | None:
    """What a block's directory holds inputs of; None if it holds none; empty if that is damaged."""
    if not (directory / INPUTS_FILE).exists():
        return None
    path = find_inside(directory, INPUTS_FILE)
    with suppress(ValueError):
        return read_json(path)
    return {}


def refuse_other_inputs(directory: Path, table: Table) -> None:
    """Raises ValueError where there are inputs of another table."""
    if (held := held_table(directory)) == {}:
        raise ValueError(f"{directory / INPUTS_FILE} is damaged: {INPUTS_AGAIN}.")
    if held not in (None, now := table._asdict()):
        raise ValueError(
            f"{directory} holds other inputs ({difference(held, now)}): use the same arguments and data as before, "
            "another --out_dir, or --resume restart, which deletes them."
        )


def begin_inputs(directory: Path, table: Table, lengths: np.ndarray) -> None:
    """inputs.json and the texts' lengths, where they are not there yet, in place of those of another table."""
    if (held := held_table(directory)) == table._asdict() and np.array_equal(read_lengths(directory, table), lengths):
        return
    if held not in (None, table._asdict()):
        remove_directory(directory)
    with directory_lock(directory):
        remove_leftovers(directory)
        held_lengths = as_lazy(torch.from_numpy(lengths.astype(np.int64)))
        write_safetensors(directory / LENGTHS_FILE, {mark(table): held_lengths})
        write_json(directory / INPUTS_FILE, table._asdict())


def read_lengths(directory: Path, table: Table) -> np.ndarray:
    """Tokens of each text; none if the file is not there, damaged or of another table."""
    with suppress(ValueError, OSError):
        if (found := open_safetensors(find_inside(directory, LENGTHS_FILE)).get(mark(table))) is not None:
            return found.load().numpy().copy()
    return np.zeros(0, dtype=np.int64)


def is_part(path: Path, rows: int, table: Table, name: str) -> bool:
    """True if the part is there, whole. name: the table's mark."""
    with suppress(ValueError, OSError):
        x = open_safetensors(path).get(name)
        return x is not None and x.shape == (rows, table.width) and x.dtype == DTYPE_NAMES[table.dtype]
    return False


def missing_parts(directory: Path, table: Table) -> list[int]:
    name = mark(table)
    return [n for n, rows in enumerate(table.parts) if not is_part(directory / part_name(n), rows, table, name)]


def missing_bytes(directory: Path, table: Table) -> int:
    same = held_table(directory) == table._asdict()
    missing = missing_parts(directory, table) if same else range(len(table.parts))
    return sum(table.parts[n] for n in missing) * table.row_bytes


@torch.no_grad()
def write_parts(
    directory: Path,
    table: Table,
    lengths: np.ndarray,
    model: GPT,
    ids: Callable[[int], np.ndarray],
    tokens: int,
    tell: Callable[[int], None],
) -> None:
    """Make the parts that are missing, with a model that has the layers since the table before.

    ids: what it reads of a text. tokens: how many it reads at once. tell: called with the rows that are done. Raises
    OSError, with nothing incomplete under a part's name, when the disk is full.
    """
    dtype = DTYPE_NAMES[table.dtype]
    ends = list(itertools.accumulate(parts_of(lengths, dtype, table.width), initial=0))
    with directory_lock(directory):
        remove_leftovers(directory)
        for n in missing_parts(directory, table):
            x = torch.empty(table.parts[n], table.width, dtype=dtype)
            at = 0
            for batch in batches(lengths, ends[n], ends[n + 1], tokens):
                idx = torch.from_numpy(np.concatenate([ids(i) for i in batch]).astype(np.int64))[None]
                sizes = [int(lengths[i]) for i in batch]
                y = model.hidden_states(idx.to(model.transformer.wte.weight.device), documents=sizes)
                require_numbers(y, batch)
                x[at : at + sum(sizes)] = y[0]
                at += sum(sizes)
                tell(sum(table.parts[:n]) + at)
            write_safetensors(directory / part_name(n), {mark(table): as_lazy(x)})


def batches(lengths: np.ndarray, a: int, b: int, tokens: int) -> Iterator[list[int]]:
    """The texts a .. b - 1, as many at once as `tokens` hold."""
    batch: list[int] = []
    filled = 0
    for i, n in enumerate(lengths[a:b].tolist(), start=a):
        if batch and filled + n > tokens:
            yield batch
            batch, filled = [], 0
        batch.append(i)
        filled += n
    yield batch


def require_numbers(x: Tensor, texts: list[int]) -> None:
    if not bool(x.isfinite().all()):
        raise ValueError(
            f"The residual stream of the texts {texts[0]} to {texts[-1]} (counted from 0) is NaN or infinite: the "
            "weights or the precision do not fit."
        )


# -------------------------------------------------------------------------------------------------------------- reading


class Inputs:
    """A block's table."""

    def __init__(self, directory: Path) -> None:
        """Raises FileNotFoundError or ValueError, which names the part, when it is incomplete."""
        self.directory = directory
        if not (directory / INPUTS_FILE).exists():
            raise FileNotFoundError(f"{directory} is missing: --step inputs makes it.")
        self.table = read_table(directory)
        if missing := missing_parts(directory, self.table):
            more = f" and {len(missing) - 1} more" * (len(missing) > 1)
            how = "has a broken or stale" if (directory / part_name(missing[0])).exists() else "lacks"
            raise FileNotFoundError(
                f"{directory} is incomplete: it {how} {part_name(missing[0])}{more} of {len(self.table.parts)} parts; "
                "--step inputs goes on."
            )
        name = mark(self.table)
        self.parts = [open_part(directory, n, name) for n in range(len(self.table.parts))]
        self.starts = list(itertools.accumulate(self.table.parts, initial=0))
        self.lengths = read_lengths(directory, self.table)
        self.ends = np.cumsum(self.lengths)
        if self.lengths.sum() != self.starts[-1] or not 0 < self.table.trained <= len(self.lengths):
            raise ValueError(f"{directory / LENGTHS_FILE} is missing or damaged: --step inputs makes it anew.")

    def numbers(self, i: int) -> np.ndarray:
        """Of the rows of text i."""
        return np.arange(self.ends[i] - self.lengths[i], self.ends[i])

    def rows(self, numbers: Tensor, out: Tensor | None = None) -> Tensor:
        """(T,) -> (T, C), in `out` if it is given. Rows that follow each other are copied at once."""
        n = numbers.cpu().numpy()
        begins = [0, *(np.flatnonzero(np.diff(n) != 1) + 1).tolist(), len(n)]
        runs = [(int(n[a]), int(n[b - 1]) + 1) for a, b in itertools.pairwise(begins)]
        return torch.cat([piece for run in runs for piece in self.pieces(*run)], out=out)

    def pieces(self, a: int, b: int) -> Iterator[Tensor]:
        """The rows a .. b - 1, as they lie in the parts."""
        while a < b:
            p = bisect.bisect_right(self.starts, a) - 1
            end = min(b, self.starts[p + 1])
            yield self.parts[p].rows(a - self.starts[p], end - self.starts[p]).load()
            a = end

    def datasets(self) -> tuple[Dataset, Dataset | None]:
        """What is trained on, and what is validated on: the tokens are the numbers of the rows."""
        numbers, starts = np.arange(self.starts[-1], dtype=np.int32), self.ends - self.lengths
        whole = Dataset(numbers, None, starts, self.lengths, "", {})
        cut = np.split(np.arange(len(whole)), [self.table.trained])
        data, held_out = (whole.subset(index, "") for index in cut)
        return data, held_out if len(held_out) else None


def read_table(directory: Path) -> Table:
    content = read_own(directory, INPUTS_FILE, INPUTS_AGAIN)
    if content.keys() == set(Table._fields):
        table = Table(**content)
        parts = table.parts if type(table.parts) is list else [0]
        counts = [table.width, table.max_seq_length, table.trained, *parts]
        proper = all(type(n) is int and 0 < n < 2**40 for n in counts) and table.dtype in DTYPE_NAMES
        if proper and type(table.identity) is dict and sum(parts) < MOST_ROWS:
            return table
    raise ValueError(f"{directory / INPUTS_FILE} is damaged: {INPUTS_AGAIN}.")


def open_part(directory: Path, n: int, name: str) -> LazyTensor:
    return open_safetensors(find_inside(directory, part_name(n)))[name]


class Rows(nn.Module):
    """In the place of an embedding: token n is row n of a table. What is expected is read while the device computes."""

    def __init__(self, inputs: Inputs, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.inputs = inputs
        empty = torch.empty(0, inputs.table.width, dtype=dtype, device=device)
        self.register_buffer("weight", empty, persistent=False)  # says where the model is, as an embedding's does
        self.reader = ThreadPoolExecutor(1)
        self.coming: list[Tensor] = []  # numbers of rows, of a micro-batch each
        self.ahead: tuple[Tensor, Future[Tensor]] | None = None  # the one that is read now, or was

    def expect(self, batches: Iterable[Tensor]) -> None:
        """These micro-batches (one or more) come next: each is read while the one before is computed with."""
        self.coming = [idx.flatten() for idx in batches]
        if self.is_ahead(self.coming[0]):
            self.coming.pop(0)
        else:
            self.read_next()

    def is_ahead(self, numbers: Tensor) -> bool:
        """True if the rows of these numbers are being read, or are there."""
        return self.ahead is not None and torch.equal(self.ahead[0], numbers)

    def read_next(self) -> None:
        """Begin to read the first micro-batch of those that come, if there is one."""
        self.ahead = None
        if self.coming:
            numbers, table = self.coming.pop(0), self.inputs.table
            kind: dict[str, Any] = {"dtype": DTYPE_NAMES[table.dtype], "pin_memory": self.weight.device.type == "cuda"}
            out = torch.empty(len(numbers), table.width, **kind)  # pinned: its copy to the GPU waits for nothing
            self.ahead = numbers, self.reader.submit(self.inputs.rows, numbers, out)

    def forward(self, idx: Tensor) -> Tensor:
        """(B, T) -> (B, T, C)"""
        numbers = idx.flatten().cpu()
        if self.is_ahead(numbers):
            x = self.ahead[1].result()
            self.read_next()
        else:
            x = self.inputs.rows(numbers)
        return x.to(self.weight.device, self.weight.dtype, non_blocking=True).view(*idx.shape, -1)
