"""A Triton kernel in which ranks exchange small tensors: each writes its own into the memory of all others, and waits
for theirs. A kernel behind it may begin to read its weights meanwhile."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lit_swa.decode_kernels import early_launch

BLOCK = 1024  # elements of a program


@triton.jit
def exchange_kernel(
    y, x, plus, bases, counts, N, flags_at,
    MOST: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, GATHER: tl.constexpr, PLUS: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y (N,): the sum of all ranks' x (N,), with PLUS that and plus (N,); or with GATHER y (SIZE, N): all x.

    bases (SIZE,): where each rank's memory begins. It holds numbers (2, SIZE, MOST), written by the rank of the second
    index, and at flags_at (SIZE, MOST / BLOCK) int32, up to which exchange they are there. Exchanges take turns with
    the two halves: a rank writes to one again when the others have begun the exchange after it, so they have read it.
    counts (MOST / BLOCK,): how many exchanges this rank's programs have made.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    n = program * BLOCK + tl.arange(0, BLOCK)
    there, count = n < N, tl.load(counts + program) + 1
    half, flag = (count & 1) * SIZE * MOST, program * 4 + flags_at
    v = tl.load(x + n, mask=there, other=0.0)
    for p in tl.static_range(SIZE):
        if p != RANK:
            theirs = tl.multiple_of(tl.load(bases + p).to(tl.pointer_type(x.dtype.element_ty)), 16)
            tl.store(theirs + half + RANK * MOST + n, v, mask=there)
    tl.debug_barrier()
    for p in tl.static_range(SIZE):
        if p != RANK:
            theirs = (tl.load(bases + p) + flag + RANK * (MOST // BLOCK * 4)).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(theirs, count, sem="release", scope="sys")
    total = tl.zeros((BLOCK,), tl.float32)
    if PLUS:
        total += tl.load(plus + n, mask=there, other=0.0).to(tl.float32)
    for p in tl.static_range(SIZE):  # the same order on all ranks, so the same bits
        other = v
        if p != RANK:
            own = tl.load(bases + RANK)
            here = (own + flag + p * (MOST // BLOCK * 4)).to(tl.pointer_type(tl.int32))
            while tl.atomic_add(here, 0, sem="acquire", scope="sys") < count:
                pass
            tl.debug_barrier()
            mine = tl.multiple_of(own.to(tl.pointer_type(x.dtype.element_ty)), 16)
            other = tl.load(mine + half + p * MOST + n, mask=there, other=0.0, volatile=True)
        if GATHER:
            tl.store(y + p * N + n, other, mask=there)
        else:
            total += other.to(tl.float32)
    if not GATHER:
        tl.store(y + n, total.to(y.dtype.element_ty), mask=there)
    tl.store(counts + program, count)


def exchange(
    x: Tensor, plus: Tensor | None, bases: Tensor, counts: Tensor, flags_at: int, most: int, rank: int, gather: bool
) -> Tensor:
    """The sum of all ranks' x and of plus, rounded once, or all x (SIZE, *x.shape), of `most` elements at most."""
    size = bases.numel()
    y = x.new_empty(size, *x.shape) if gather else torch.empty_like(x)
    with torch.cuda.device(x.device):
        exchange_kernel[(triton.cdiv(x.numel(), BLOCK),)](
            y, x, x if plus is None else plus.contiguous(), bases, counts, x.numel(), flags_at, MOST=most, RANK=rank,
            SIZE=size, GATHER=gather, PLUS=plus is not None, BLOCK=BLOCK, num_warps=4, **early_launch(x.device),
        )  # fmt: skip
    return y
