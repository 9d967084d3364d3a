"""The random numbers with which the tokens of several texts are chosen: those of a text depend on its seed alone."""

import torch
from torch import Tensor

from lit_swa.linear_formats import gpu_kernels


class Noise:
    """Exponentially distributed numbers for B rows, each with a text or free."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.device = torch.device(device)
        self.generators: list[torch.Generator | None] = [None] * rows

    def begin(self, row: int, seed: int | None) -> None:
        """A text begins in this row. seed None: it gets one that nobody knows."""
        generator = torch.Generator(self.device)
        self.generators[row] = generator.manual_seed(generator.seed() if seed is None else seed)

    def end(self, row: int) -> None:
        self.generators[row] = None

    def move(self, row: int, to: int) -> None:
        self.generators[to], self.generators[row] = self.generators[row], None

    def draw(self, rows: slice, vocab_size: int) -> Tensor:
        """(n, vocab_size) float32, for the next choice of some rows; ones where a row is free."""
        held = self.generators[rows]
        noise = torch.ones(len(held), vocab_size, device=self.device)
        for of_row, generator in zip(noise, held, strict=True):
            if generator is not None:
                of_row.exponential_(1, generator=generator)
        return noise


class CountedNoise(Noise):
    """The same on a GPU, made for all rows at once: from the seed of each, and how often it has drawn."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.device = torch.device(device)
        self.seeds, self.counts = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(2))

    def begin(self, row: int, seed: int | None) -> None:
        self.seeds[row] = int(torch.randint(2**62, ())) if seed is None else seed % 2**62
        self.counts[row] = 0

    def end(self, row: int) -> None:
        pass

    def move(self, row: int, to: int) -> None:
        for held in (self.seeds, self.counts):
            held[to] = held[row]

    def draw(self, rows: slice, vocab_size: int) -> Tensor:
        noise = gpu_kernels("sampling_kernel").exponential_noise(self.seeds[rows], self.counts[rows], vocab_size)
        self.counts[rows] += 1
        return noise


def row_noise(rows: int, device: torch.device | str) -> Noise:
    device = torch.device(device)
    counted = device.type == "cuda" and gpu_kernels() is not None
    return CountedNoise(rows, device) if counted else Noise(rows, device)
