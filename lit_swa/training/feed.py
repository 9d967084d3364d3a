"""The order in which a dataset's examples are read: packed into rows, shuffled every epoch, split over devices."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from lit_swa.config import IGNORED
from lit_swa.data.dataset import Dataset, Example, pack
from lit_swa.training.loop import Batch
from lit_swa.utils import count_processes


def tokens_at_once(device: torch.device, n_embd: int) -> int:
    """About how many tokens a model of this width reads at once, if nobody says: more are hardly faster, and take
    memory. On a GPU a smaller model reads more, as far as 2 MiB are there for each: its kernels are short, and one is
    else over before the next has begun."""
    if device.type != "cuda":
        return 1024
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(8192, min(2**25 // n_embd, memory // 2**21, 32768))


def join_examples(examples: Sequence[Example], numbers: Sequence[int]) -> Batch:
    """Examples as one micro-batch, each predicting its own next tokens and nothing of its neighbour's."""
    ids = np.concatenate([e.ids for e in examples]).astype(np.int64)
    nexts = [np.append(e.labels[1:], IGNORED) for e in examples]
    targets = np.concatenate(nexts).astype(np.int64)
    return Batch(
        torch.from_numpy(ids)[None], torch.from_numpy(targets)[None], [len(e.ids) for e in examples], list(numbers)
    )


class ExampleFeed:
    """Feeds a dataset: see lit_swa.training.loop.Feed.

    A row is one example, or several short ones packed. Every epoch has its own order. The longest row comes in the
    first step: if memory is too small for it, the run fails at once.
    """

    def __init__(self, dataset: Dataset, args: Any, max_seq_length: int, at_once: int = 1024) -> None:
        """args: as Training, with the number of devices, which all get their share of a step. at_once: tokens of a
        micro-batch, if args do not have its rows."""
        self.dataset, self.seed, self.batch_size = dataset, args.seed, args.batch_size
        self.max_seq_length, self.packs = max_seq_length, args.pack
        devices, nodes = count_processes(args.devices, args.num_nodes)
        share = math.ceil(args.batch_size / (devices * nodes))
        self.micro_batch_size = args.micro_batch_size or min(share, max(1, at_once // max_seq_length))
        packs = args.pack and len(dataset) > 1
        self.rows = pack(dataset.lengths, max_seq_length, args.seed) if packs else [[i] for i in range(len(dataset))]
        self.row_tokens = [int(sum(dataset.lengths[i] for i in row)) for row in self.rows]
        self.steps_per_epoch = math.ceil(len(self.rows) / self.batch_size)
        self.last_order: tuple[int, list[int]] = (-1, [])  # of which epoch

    @property
    def identity(self) -> dict[str, Any]:
        order = [self.batch_size, self.seed, self.packs, self.max_seq_length]
        return {"data": self.dataset.fingerprint, "order": order}

    def order(self, epoch: int) -> list[int]:
        """All rows, as the epoch reads them."""
        if self.last_order[0] != epoch:
            self.last_order = epoch, self.new_order(epoch)
        return self.last_order[1]

    def new_order(self, epoch: int) -> list[int]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows)).tolist()
        if epoch == 0:
            longest = order.index(int(np.argmax(self.row_tokens)))
            order[0], order[longest] = order[longest], order[0]
        return order

    def rows_of(self, step: int) -> list[int]:
        """The rows of a step. An epoch's last step may have fewer than batch_size."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[within * self.batch_size : (within + 1) * self.batch_size]

    def trained_tokens(self, step: int) -> int:
        return int(sum(self.dataset.trained[i] for row in self.rows_of(step) for i in self.rows[row]))

    def tokens(self, step: int) -> int:
        return sum(self.row_tokens[row] for row in self.rows_of(step))

    def batches(self, step: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
        rows, size = self.rows_of(step), self.micro_batch_size
        micro = [rows[a : a + size] for a in range(0, len(rows), size)]
        own = [self.join(m) for m in micro[rank::world_size]]
        for _ in range(math.ceil(len(micro) / world_size) - len(own)):  # sharded devices wait for each other
            own.append(self.join(micro[0])._replace(weight=0.0))
        return own

    def join(self, rows: Sequence[int]) -> Batch:
        numbers = [i for row in rows for i in self.rows[row]]
        return join_examples([self.dataset[i] for i in numbers], numbers)

    def longest(self) -> Batch:
        order = np.argsort(self.row_tokens)[::-1]
        return self.join(order[: self.micro_batch_size].tolist())


class ExampleValidation:
    """A dataset to validate on, in micro-batches of about so many tokens: see lit_swa.training.loop.Validation."""

    def __init__(self, dataset: Dataset, tokens: int) -> None:
        self.dataset, self.tokens, self.trained_tokens = dataset, tokens, int(dataset.trained.sum())

    @property
    def identity(self) -> str:
        return self.dataset.fingerprint

    def batches(self) -> Iterator[Batch]:
        numbers: list[int] = []
        filled = 0
        for i, length in enumerate(self.dataset.lengths.tolist()):
            if numbers and filled + length > self.tokens:
                yield self.join(numbers)
                numbers, filled = [], 0
            numbers.append(i)
            filled += length
        if numbers:
            yield self.join(numbers)

    def join(self, numbers: Sequence[int]) -> Batch:
        return join_examples([self.dataset[n] for n in numbers], numbers)

    def head(self) -> "ExampleValidation":
        return ExampleValidation(self.dataset.subset(np.arange(min(len(self.dataset), 4)), ""), self.tokens)
