"""Triton kernels for choosing tokens: Sampling.choose of generate.py with one program for each sequence, and the random
numbers that it takes, which depend on a text's seed and on how many tokens it has chosen, and on no other text."""

import torch
import triton
import triton.language as tl
from torch import Tensor

KEY_BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}  # of a float32 with the values of such numbers


@triton.jit
def kth_largest(logits, V, k, BITS: tl.constexpr, CHUNK: tl.constexpr):
    """The greatest number that k of the logits (V,) reach, found bit by bit; -inf where all do.

    A number's key has the order of the numbers: the bits of one that is not negative with the first bit set, and the
    inverted bits of others.
    """
    c, key, found = tl.arange(0, CHUNK), tl.full((), 0, tl.int32), tl.full((), float("-inf"), tl.float32)
    for bit in range(BITS):
        trial = key | (1 << (31 - bit))
        number = tl.where(trial < 0, trial ^ -2147483648, ~trial).to(tl.float32, bitcast=True)
        count = tl.zeros((CHUNK,), tl.int32)
        for start in range(0, V, CHUNK):
            x = tl.load(logits + start + c, mask=start + c < V, other=float("-inf")).to(tl.float32)
            count += (x >= number).to(tl.int32)
        reached = tl.sum(count, 0) >= k
        key, found = tl.where(reached, trial, key), tl.where(reached, number, found)
    return found


@triton.jit
def choose_kernel(
    tokens, logits, noise, V, row_stride, temperature, top_k, min_p,
    DRAW: tl.constexpr, TOP_K: tl.constexpr, MIN_P: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNK)
    logits, noise = logits + row * row_stride, noise + row * V
    if DRAW:
        highest = tl.full((CHUNK,), float("-inf"), tl.float32)
        for start in range(0, V, CHUNK):
            x = tl.load(logits + start + c, mask=start + c < V, other=float("-inf")).to(tl.float32)
            highest = tl.maximum(highest, x)
        top = tl.max(highest, 0) / temperature
        least = float("-inf")
        if TOP_K:
            least = kth_largest(logits, V, top_k, BITS, CHUNK) / temperature
    best, at = tl.full((CHUNK,), float("-inf"), tl.float32), tl.zeros((CHUNK,), tl.int32)
    for start in range(0, V, CHUNK):
        there = start + c < V
        x = tl.load(logits + start + c, mask=there, other=float("-inf")).to(tl.float32)
        if DRAW:
            x /= temperature
            p = tl.exp(x - top)
            kept = x >= least
            if MIN_P:
                kept = kept & (p >= min_p)
            x = tl.where(kept & there, p / tl.load(noise + start + c, mask=there, other=1.0), float("-inf"))
        best, at = tl.where(x > best, x, best), tl.where(x > best, start + c, at)
    # logits that are no numbers choose the last token: whoever reads it finds that out
    tl.store(tokens + row, tl.min(tl.where(best == tl.max(best, 0), at, V - 1), 0).to(tl.int64))


@triton.jit
def exponential(bits):
    """Exponentially distributed numbers, more than 0, from uniform random bits."""
    u = tl.uint_to_uniform_float(bits)  # [0, 1), in steps of 2^-31
    return tl.maximum(tl.where(u < 0.001, u * (1.0 + 0.5 * u), -tl.log(1.0 - u)), 1e-10)


@triton.jit
def noise_kernel(noise, seeds, counts, V, CHUNK: tl.constexpr):
    """noise (B, V) for seeds (B,) and counts (B,), by Philox (Salmon et al. 2011): four numbers at a time."""
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    count = tl.load(counts + row).to(tl.int32) + tl.zeros((CHUNK,), tl.int32)
    at, quarter = noise + row * V + c, (V + 3) // 4
    w, x, y, z = tl.philox(tl.load(seeds + row), c, count, 0 * c, 0 * c)
    tl.store(at, exponential(w), mask=c < quarter)
    tl.store(at + quarter, exponential(x), mask=(c < quarter) & (c + quarter < V))
    tl.store(at + 2 * quarter, exponential(y), mask=(c < quarter) & (c + 2 * quarter < V))
    tl.store(at + 3 * quarter, exponential(z), mask=(c < quarter) & (c + 3 * quarter < V))


def exponential_noise(seeds: Tensor, counts: Tensor, vocab_size: int) -> Tensor:
    """(B, vocab_size) float32: the numbers of a text's choice, for seeds and counts (B,) int64."""
    noise = torch.empty(seeds.size(0), vocab_size, device=seeds.device)
    grid = seeds.size(0), triton.cdiv(triton.cdiv(vocab_size, 4), 1024)
    with torch.cuda.device(seeds.device):
        noise_kernel[grid](noise, seeds, counts, vocab_size, CHUNK=1024)
    return noise


def choose_tokens(logits: Tensor, noise: Tensor | None, temperature: float, top_k: int | None, min_p: float) -> Tensor:
    """(B, 1): the tokens that win the exponential race of `generate.draw` with the numbers noise (B, V), from logits
    (B, V) that a penalty may have changed; noise None: the likeliest."""
    (B, V), draw = logits.shape, noise is not None
    logits = logits if logits.dtype in KEY_BITS else logits.float()
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens = torch.empty(B, 1, dtype=torch.long, device=logits.device)
    with torch.cuda.device(logits.device):
        choose_kernel[(B,)](
            tokens, logits, noise.contiguous() if draw else logits, V, logits.stride(0), temperature, top_k or 0, min_p,
            DRAW=draw, TOP_K=draw and top_k is not None and top_k < V, MIN_P=draw and min_p > 0,
            BITS=KEY_BITS[logits.dtype], CHUNK=min(8192, triton.next_power_of_2(V)), num_warps=32,
        )  # fmt: skip
    return tokens
