"""Triton kernels of a decode step: products with few rows, and attention of few queries over a cache.

A step of few tokens reads every weight once and computes little with it, so the memory's speed is its limit. These
kernels keep to it: what lies between two products (a norm before, an activation, a residual after) is done inside, and
a kernel begins to read its weights before the kernel in front of it has ended (programmatic dependent launch).

Only a GPU runs this file, and only fast_decode.py imports it. B rows, N outputs, K inputs of a product.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn as nn
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lit_swa.linear_formats import is_injected, is_plain

# ------------------------------------------------------------------------------------------------ products, one row
#
# A program makes BN outputs, of each of two weights where there is a gate. A thread reads a run of 16 bytes of a row at
# a time: 8 weights of 16 bits, 16 of 8, 32 of 4. So a tile is (rows, runs, words). Every program reads x again, which
# is short.


@triton.jit
def activate(x, ACT: tl.constexpr):
    if ACT == "silu":
        x = x * tl.sigmoid(x)
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "relu":
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def finish(
    out, squares, tile, w_n, bias, residual, y, delta_bias, N, K, eps, GATED: tl.constexpr, NORM: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write the outputs of a tile from their sums (BN,), or (2 * BN,) where there is a gate."""
    n, half = tile * BN + w_n % BN, (w_n // BN).to(tl.int64)
    if NORM:
        out *= tl.rsqrt(squares / K + eps)
    if BIAS:
        out += tl.load(bias + half * delta_bias + n, mask=n < N, other=0.0).to(tl.float32)
    if GATED:
        left, right = tl.split(tl.trans(tl.reshape(out, (2, BN))))
        out = activate(left, ACT) * right
        n = tile * BN + tl.arange(0, BN)
    else:
        out = activate(out, ACT)
    if RESIDUAL:
        out += tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y + n, out.to(y.dtype.element_ty), mask=n < N)


@triton.jit
def vector_kernel(
    y, x, gain, w, scale, bias, residual, delta_w, delta_scale, delta_bias, N, K, eps,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BN: tl.constexpr, RUNS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Dense weights. A program makes one tile of outputs, and reads the next runs while it adds up those before."""
    RUN: tl.constexpr = 16 // (w.dtype.element_ty.primitive_bitwidth // 8)
    w_n = tl.arange(0, BN * (2 if GATED else 1))
    n = tl.program_id(0) * BN + w_n % BN
    runs, e = tl.arange(0, RUNS), tl.arange(0, RUN)
    n_runs, live = K // RUN, (n < N)[:, None, None]
    rows = w + (w_n // BN).to(tl.int64) * delta_w + n.to(tl.int64) * K
    tile = rows[:, None, None] + (runs[:, None] * RUN + e[None, :])[None, :, :]
    weights = tl.load(tile, mask=live & (runs < n_runs)[None, :, None], other=0.0, eviction_policy="evict_first")
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    acc = tl.zeros((BN * (2 if GATED else 1), RUNS), tl.float32)
    squares = tl.zeros((RUNS,), tl.float32)
    for first in range(0, n_runs, RUNS):
        there = live & (first + RUNS + runs < n_runs)[None, :, None]
        later = tl.load(tile + (first + RUNS) * RUN, mask=there, other=0.0, eviction_policy="evict_first")
        at, here = (first + runs)[:, None] * RUN + e[None, :], (first + runs < n_runs)[:, None]
        v = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        if NORM:
            squares += tl.sum(v * v, 1)
            v *= tl.load(gain + at, mask=here, other=0.0).to(tl.float32) + OFFSET
        acc += tl.sum(weights.to(tl.float32) * v[None, :, :], 2)
        weights = later
    finish(
        tl.sum(acc, 1), tl.sum(squares, 0), tl.program_id(0), w_n, bias, residual, y, delta_bias, N, K, eps, GATED,
        NORM, ACT, BIAS, RESIDUAL, BN,
    )  # fmt: skip


# Codes of 8 or 4 bits become float16 by bit operations, two at a time: the float16 numbers from 1024 on are whole ones,
# so a code's bits beside the exponent of 1024 are the number 1024 + code. x is brought into float16's range by a power
# of two for each run. Products are added up within a run in float16 and beyond it in float32: the error is below that
# of an output rounded to 16 bits. x in float32 is not multiplied in this way.


@triton.jit
def pack_halves(low, high):
    return tl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
    )  # fmt: skip


@triton.jit
def unpack_int4(words):
    """Four tensors of pairs of float16: nibbles j and j + 4, less 8, in the low and the high half, for j = 0 .. 3."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 h, eight, sixteenth, less;
        mov.b32 eight, 0x64086408;
        mov.b32 sixteenth, 0x2C002C00;
        mov.b32 less, 0xD480D480;
        shr.u32 h, $4, 8;
        lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA;
        lop3.b32 $1, $4, 0x00F000F0, 0x64006400, 0xEA;
        lop3.b32 $2, h, 0x000F000F, 0x64006400, 0xEA;
        lop3.b32 $3, h, 0x00F000F0, 0x64006400, 0xEA;
        sub.f16x2 $0, $0, eight;
        fma.rn.f16x2 $1, $1, sixteenth, less;
        sub.f16x2 $2, $2, eight;
        fma.rn.f16x2 $3, $3, sixteenth, less;
        }""",
        "=&r,=&r,=&r,=&r,r", [words], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def unpack_int8(words):
    """Two tensors of pairs of float16: bytes 0 and 2, and bytes 1 and 3, signed."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 h, zero;
        mov.b32 zero, 0x64806480;
        shr.u32 h, $2, 8;
        lop3.b32 $0, $2, 0x00FF00FF, 0x64806480, 0x6A;
        lop3.b32 $1, h, 0x00FF00FF, 0x64806480, 0x6A;
        sub.f16x2 $0, $0, zero;
        sub.f16x2 $1, $1, zero;
        }""",
        "=&r,=&r,r", [words], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def dot_4(c0, c1, c2, c3, x0, x1, x2, x3):
    """The sum of the products of four pairs of float16, as float32."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a;
        .reg .b16 low, high;
        .reg .f32 f, g;
        mul.f16x2 a, $1, $5;
        fma.rn.f16x2 a, $2, $6, a;
        fma.rn.f16x2 a, $3, $7, a;
        fma.rn.f16x2 a, $4, $8, a;
        mov.b32 {low, high}, a;
        cvt.f32.f16 f, low;
        cvt.f32.f16 g, high;
        add.f32 $0, f, g;
        }""",
        "=f,r,r,r,r,r,r,r,r", [c0, c1, c2, c3, x0, x1, x2, x3], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def dot_2(c0, c1, x0, x1):
    """The sum of the products of two pairs of float16, as float32."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a;
        .reg .b16 low, high;
        .reg .f32 f, g;
        mul.f16x2 a, $1, $3;
        fma.rn.f16x2 a, $2, $4, a;
        mov.b32 {low, high}, a;
        cvt.f32.f16 f, low;
        cvt.f32.f16 g, high;
        add.f32 $0, f, g;
        }""",
        "=f,r,r,r,r", [c0, c1, x0, x1], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def load_part(x, gain, at, here, NORM: tl.constexpr, OFFSET: tl.constexpr):
    """(x times gain, sum of squares of each run of x), of the inputs `at` (RUNS, 4)."""
    v = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    squares = tl.sum(v * v, 1)
    if NORM:
        v *= tl.load(gain + at, mask=here, other=0.0).to(tl.float32) + OFFSET
    return v, squares


@triton.jit
def pack_inputs(x, gain, runs, e, here, FORMAT: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr):
    """Inputs as dot_4 or dot_2 takes them, (RUNS, 4) int32 each; and of each run the power of two that they were
    divided by, their sum, and the sum of squares before the gain."""
    if FORMAT == "int4":
        at = runs[:, None] * 32 + e[None, :]
        v0, s0 = load_part(x, gain, at, here, NORM, OFFSET)
        v1, s1 = load_part(x, gain, at + 4, here, NORM, OFFSET)
        v2, s2 = load_part(x, gain, at + 8, here, NORM, OFFSET)
        v3, s3 = load_part(x, gain, at + 12, here, NORM, OFFSET)
        v4, s4 = load_part(x, gain, at + 16, here, NORM, OFFSET)
        v5, s5 = load_part(x, gain, at + 20, here, NORM, OFFSET)
        v6, s6 = load_part(x, gain, at + 24, here, NORM, OFFSET)
        v7, s7 = load_part(x, gain, at + 28, here, NORM, OFFSET)
        squares = s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7
        total = tl.sum(v0 + v1 + v2 + v3 + v4 + v5 + v6 + v7, 1)
        a, b = tl.maximum(tl.abs(v0), tl.abs(v1)), tl.maximum(tl.abs(v2), tl.abs(v3))
        c, d = tl.maximum(tl.abs(v4), tl.abs(v5)), tl.maximum(tl.abs(v6), tl.abs(v7))
        largest = tl.max(tl.maximum(tl.maximum(a, b), tl.maximum(c, d)), 1)
    else:
        at = runs[:, None] * 16 + e[None, :] * 4
        v0, s0 = load_part(x, gain, at, here, NORM, OFFSET)
        v1, s1 = load_part(x, gain, at + 1, here, NORM, OFFSET)
        v2, s2 = load_part(x, gain, at + 2, here, NORM, OFFSET)
        v3, s3 = load_part(x, gain, at + 3, here, NORM, OFFSET)
        squares = s0 + s1 + s2 + s3
        total = tl.sum(v0 + v1 + v2 + v3, 1)
        a, b = tl.maximum(tl.abs(v0), tl.abs(v1)), tl.maximum(tl.abs(v2), tl.abs(v3))
        largest = tl.max(tl.maximum(a, b), 1)
    power = tl.maximum(largest, 1e-30).to(tl.int32, bitcast=True) & 0x7F800000  # the one below the largest
    up, down = power.to(tl.float32, bitcast=True), (0x7F000000 - power).to(tl.float32, bitcast=True)[:, None]
    if FORMAT == "int4":
        x0, x1 = pack_halves(v0 * down, v4 * down), pack_halves(v1 * down, v5 * down)
        x2, x3 = pack_halves(v2 * down, v6 * down), pack_halves(v3 * down, v7 * down)
    else:
        x0, x1 = pack_halves(v0 * down, v2 * down), pack_halves(v1 * down, v3 * down)
        x2, x3 = x0, x1
    return x0, x1, x2, x3, up, total, squares


@triton.jit
def pack_kernel(
    packed, factors, x, gain, K, eps, FORMAT: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
    RUNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Pack a row of norm(x): packed (M, K / run, 4, 4) int32, factors (M, K / run, 2): powers of two, and sums."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    PER_RUN: tl.constexpr = 32 if FORMAT == "int4" else 16
    m, runs, e, n_runs = tl.program_id(0).to(tl.int64), tl.arange(0, RUNS), tl.arange(0, 4), K // PER_RUN
    here = (runs < n_runs)[:, None]
    x0, x1, x2, x3, up, total, squares = pack_inputs(x + m * K, gain, runs, e, here, FORMAT, NORM, OFFSET)
    to = packed + (m * n_runs + runs)[:, None] * 16 + e[None, :]
    tl.store(to, x0, mask=here)
    tl.store(to + 4, x1, mask=here)
    if FORMAT == "int4":
        tl.store(to + 8, x2, mask=here)
        tl.store(to + 12, x3, mask=here)
    if NORM:
        rms = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        up, total = up * rms, total * rms
    to = factors + (m * n_runs + runs) * 2
    tl.store(to, up, mask=runs < n_runs)
    tl.store(to + 1, total, mask=runs < n_runs)


@triton.jit
def codes_kernel(
    y, x, gain, packed, factors, w, scale, bias, residual, delta_w, delta_scale, delta_bias, M, N, K, eps,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PACKED: tl.constexpr, BN: tl.constexpr,
    RUNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Weights in 8 or 4 bits, as int32 words. A program goes from tile to tile of the outputs, for one row of x, which
    it packs itself, or for M rows that were PACKED before."""
    PER_RUN: tl.constexpr = 32 if FORMAT == "int4" else 16
    w_n = tl.arange(0, BN * (2 if GATED else 1))
    half, runs, e = (w_n // BN).to(tl.int64), tl.arange(0, RUNS), tl.arange(0, 4)
    n_runs, groups = K // PER_RUN, K // GROUP
    here = (runs < n_runs)[:, None]
    columns = (half * delta_w)[:, None, None] + (runs[:, None] * 4 + e[None, :])[None, :, :]
    tile, n_tiles = tl.program_id(0), (N + BN - 1) // BN
    n = tile * BN + w_n % BN
    there = (n < N)[:, None] & (runs < n_runs)[None, :]
    words = tl.load(
        w + n.to(tl.int64)[:, None, None] * (n_runs * 4) + columns, mask=there[:, :, None], other=0,
        eviction_policy="evict_first",
    )  # fmt: skip
    if FORMAT == "int4":
        of_group = (half * delta_scale)[:, None] + (runs * 32 // GROUP)[None, :]
        pairs = tl.load(scale + n.to(tl.int64)[:, None] * groups + of_group, mask=there, other=0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    sum_of_squares = 0.0
    if not PACKED:
        x0, x1, x2, x3, up, total, squares = pack_inputs(x, gain, runs, e, here, FORMAT, NORM, OFFSET)
        sum_of_squares = tl.sum(squares, 0)
    while tile < n_tiles:
        later = tile + tl.num_programs(0)
        n = later * BN + w_n % BN
        there = (n < N)[:, None] & (runs < n_runs)[None, :]
        next_words = tl.load(
            w + n.to(tl.int64)[:, None, None] * (n_runs * 4) + columns, mask=there[:, :, None], other=0,
            eviction_policy="evict_first",
        )  # fmt: skip
        n = tile * BN + w_n % BN
        if FORMAT == "int4":
            next_pairs = tl.load(
                scale + (later * BN + w_n % BN).to(tl.int64)[:, None] * groups + of_group, mask=there, other=0
            )  # fmt: skip
            s, o = (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)
            c0, c1, c2, c3 = unpack_int4(words)
        else:
            c0, c1 = unpack_int8(words)
            s = tl.load(scale + half * delta_scale + n, mask=n < N, other=0.0)
        for m in range(M):
            if PACKED:
                of_run = packed + (m * n_runs + runs)[:, None] * 16 + e[None, :]
                x0, x1 = tl.load(of_run, mask=here, other=0), tl.load(of_run + 4, mask=here, other=0)
                up = tl.load(factors + (m * n_runs + runs) * 2, mask=runs < n_runs, other=0.0)
                if FORMAT == "int4":
                    x2, x3 = tl.load(of_run + 8, mask=here, other=0), tl.load(of_run + 12, mask=here, other=0)
                    total = tl.load(factors + (m * n_runs + runs) * 2 + 1, mask=runs < n_runs, other=0.0)
            if FORMAT == "int4":
                part = dot_4(c0, c1, c2, c3, x0[None, :, :], x1[None, :, :], x2[None, :, :], x3[None, :, :])
                out = tl.sum((s * up[None, :]) * tl.sum(part, 2) + o * total[None, :], 1)
            else:
                part = dot_2(c0, c1, x0[None, :, :], x1[None, :, :])
                out = tl.sum(tl.sum(part, 2) * up[None, :], 1) * s
            finish(
                out, sum_of_squares, tile, w_n, bias, residual + m * N, y + m * N, delta_bias, N, K, eps, GATED,
                NORM and not PACKED, ACT, BIAS, RESIDUAL, BN,
            )  # fmt: skip
        if FORMAT == "int4":
            pairs = next_pairs
        words, tile = next_words, later


# ------------------------------------------------------------------------------------------- products, a few rows
#
# Dense weights times up to 32 rows of x: the products go to the tensor cores, a tile of weights (BN, BK) from the left
# and the rows of x (BK, ROWS) from the right. So do codes where x is float32, after they were made dense.


@triton.jit
def load_inputs(x, gain, k, M, K, NORM: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr):
    """(x times gain, x * x) of the inputs k, (BK, ROWS), in float32."""
    m = tl.arange(0, ROWS)
    v = tl.load(x + m[None, :] * K + k[:, None], mask=(m < M)[None, :] & (k < K)[:, None], other=0.0).to(tl.float32)
    squares = v * v
    if NORM:
        v *= (tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32) + OFFSET)[:, None]
    return v, squares


@triton.jit
def accumulate(
    w, scale, x, gain, n, M, N, K, FORMAT: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
    ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(W x^T (BN, ROWS) of the outputs n, the sum of squares of each row of x)"""
    acc = tl.zeros((BN, ROWS), tl.float32)
    dtype = x.dtype.element_ty
    squares = tl.zeros((BK // 8 if FORMAT == "int4" else BK, ROWS), tl.float32)
    live = (n < N)[:, None]
    if FORMAT == "int4":
        i = tl.arange(0, BK // 8)
        rows, of_row = w + n.to(tl.int64)[:, None] * (K // 8), scale + n.to(tl.int64)[:, None] * (K // GROUP)
        for first in tl.range(0, K // 8, BK // 8):
            k = first + i
            here = live & (k < K // 8)[None, :]
            words = tl.load(rows + k[None, :], mask=here, other=0)
            pairs = tl.load(of_row + (k * 8 // GROUP)[None, :], mask=here, other=0)
            s, o = (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)
            for j in tl.static_range(8):
                v, sq = load_inputs(x, gain, k // 4 * 32 + 4 * j + k % 4, M, K, NORM, OFFSET, ROWS)
                squares += sq
                code = (((words >> (4 * j)) & 15) - 8).to(tl.float32)
                acc = tl.dot((code * s + o).to(dtype), v.to(dtype), acc, input_precision="ieee")
    else:
        i, rows = tl.arange(0, BK), w + n.to(tl.int64)[:, None] * K
        for first in tl.range(0, K, BK, num_stages=STAGES):
            k = first + i
            weights = tl.load(rows + k[None, :], mask=live & (k < K)[None, :], other=0)
            v, sq = load_inputs(x, gain, k, M, K, NORM, OFFSET, ROWS)
            squares += sq
            acc = tl.dot(weights.to(dtype), v.to(dtype), acc, input_precision="ieee")
        if FORMAT == "int8":
            acc *= tl.load(scale + n, mask=n < N, other=0.0)[:, None]
    return acc, tl.sum(squares, 0)


@triton.jit
def matrix_kernel(
    y, x, gain, w, scale, bias, residual, w_2, scale_2, bias_2, M, N, K, eps,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    n, m = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, ROWS)
    out, squares = accumulate(w, scale, x, gain, n, M, N, K, FORMAT, GROUP, NORM, OFFSET, ROWS, BN, BK, STAGES)
    rms = tl.rsqrt(squares / K + eps)[None, :]
    if NORM:
        out *= rms
    if BIAS:
        out += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    out = activate(out, ACT)
    if GATED:
        right, _ = accumulate(w_2, scale_2, x, gain, n, M, N, K, FORMAT, GROUP, NORM, OFFSET, ROWS, BN, BK, STAGES)
        if NORM:
            right *= rms
        if BIAS:
            right += tl.load(bias_2 + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        out *= right
    at, there = m[None, :] * N + n[:, None], (m < M)[None, :] & (n < N)[:, None]
    if RESIDUAL:
        out += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=there)


# ----------------------------------------------------------------------------------------------------------- attention
#
# Queries of few tokens over the slots of a cache. The slots are split among programs (Flash-Decoding, Dao et al. 2023);
# the last program of a key/value head joins what all of them found. Who sees whom is a table, made by the masks of
# model.py: for each query token and slot 0, or 1 + the part of the variant in which the slot is seen. Blocks of slots
# that nobody sees are not read.


@triton.jit
def load_rotated(
    x, cos, sin, weight, rows, live, D: tl.constexpr, DP: tl.constexpr, N_ROPE: tl.constexpr, NORM: tl.constexpr,
    OFFSET: tl.constexpr, eps, dtype: tl.constexpr,
):  # fmt: skip
    """The heads at x + rows (ROWS,), normed if NORM and rotated, (ROWS, DP). cos, sin: (ROWS,) pointers to angles."""
    d = tl.arange(0, DP)
    there = live[:, None] & (d < D)[None, :]
    swapped = tl.where(d < N_ROPE, (d + N_ROPE // 2) % N_ROPE, d)
    v = tl.load(x + rows[:, None] + d[None, :], mask=there, other=0.0).to(tl.float32)
    u = tl.load(x + rows[:, None] + swapped[None, :], mask=there, other=0.0).to(tl.float32)
    if NORM:
        rms = tl.rsqrt(tl.sum(v * v, 1) / D + eps)[:, None]
        v = (
            (v * rms * (tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32) + OFFSET)[None, :])
            .to(dtype)
            .to(tl.float32)
        )
        u = (
            (u * rms * (tl.load(weight + swapped, mask=d < D, other=0.0).to(tl.float32) + OFFSET)[None, :])
            .to(dtype)
            .to(tl.float32)
        )
    turned = live[:, None] & (d < N_ROPE)[None, :]
    c = tl.load(cos[:, None] + d[None, :], mask=turned, other=1.0)
    s = tl.load(sin[:, None] + d[None, :], mask=turned, other=0.0)
    return (v * c + u * s).to(dtype)


@triton.jit
def scores_of(q, q_1, q_2, k, seen, scale, cap, PARTS: tl.constexpr, CAP: tl.constexpr):
    """(ROWS, keys): the scores of the part in which a key is seen, -inf where none sees it."""
    kt = tl.trans(k)
    s = tl.dot(q, kt, input_precision="ieee")
    if PARTS > 1:
        s = tl.where(seen == 2, tl.dot(q_1, kt, input_precision="ieee"), s)
    if PARTS > 2:
        s = tl.where(seen == 3, tl.dot(q_2, kt, input_precision="ieee"), s)
    s *= scale
    if CAP:
        s = cap * (2.0 / (1.0 + tl.exp(-2.0 * s / cap)) - 1.0)
    return tl.where(seen > 0, s, float("-inf"))


@triton.jit
def fetch_lines(cache, slots, there, D: tl.constexpr):
    """Bring what the slots hold into the L2 cache."""
    LINE: tl.constexpr = 128 // (cache.dtype.element_ty.primitive_bitwidth // 8)
    LINES: tl.constexpr = (D + LINE - 1) // LINE
    if LINES * LINE == D and (LINES & (LINES - 1)) == 0:
        at = cache + slots[:, None] * D + (tl.arange(0, LINES) * LINE)[None, :]
        at = tl.where(there[:, None], at, cache).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )  # fmt: skip


@triton.jit
def attention_kernel(
    y, qkv, k_cache, v_cache, cos, sin, k_cos, k_sin, seen, slots, blocks, norm_q, norm_k, partial,
    counts, T, L, n_slots, row_seen, row_slots, row_blocks, row_angle, part_angle, scale, cap, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N_ROPE: tl.constexpr, PARTS: tl.constexpr,
    COPIES: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, CAP: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, SPLITS: tl.constexpr, JOINED: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = H // G
    W: tl.constexpr = (H + 2 * G) * D  # of a token in qkv
    dtype = qkv.dtype.element_ty
    b, g, split = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G, tl.program_id(1)
    m, d, c = tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, KEYS * WIDTH)
    t, live = m // R, m < R * T
    head = (b * G + g) * n_slots * D
    blocks += b * row_blocks
    n_blocks = tl.load(blocks + (L + KEYS - 1) // KEYS)
    if PDL:
        mine = split * WIDTH + c // KEYS < n_blocks
        first = tl.load(blocks + split * WIDTH + c // KEYS, mask=mine, other=0) * KEYS + c % KEYS
        fetch_lines(k_cache + head, first, mine & (first < L), D)
        fetch_lines(v_cache + head, first, mine & (first < L), D)
        gdc_wait()
        gdc_launch_dependents()
    tokens = qkv + b * T * W
    rows = t * W + (g * R + m % R) * D
    # cos and sin: (PARTS, 1 or B, T, N_ROPE)
    angle = b * row_angle + t * N_ROPE
    q = load_rotated(
        tokens, cos + angle, sin + angle, norm_q, rows, live, D, DP, N_ROPE, NORM, OFFSET, eps, dtype
    )  # fmt: skip
    q_1, q_2 = q, q
    if PARTS > 1:
        angle += part_angle
        q_1 = load_rotated(
            tokens, cos + angle, sin + angle, norm_q, rows, live, D, DP, N_ROPE, NORM, OFFSET, eps, dtype
        )  # fmt: skip
    if PARTS > 2:
        angle += part_angle
        q_2 = load_rotated(
            tokens, cos + angle, sin + angle, norm_q, rows, live, D, DP, N_ROPE, NORM, OFFSET, eps, dtype
        )  # fmt: skip
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DP), tl.float32)
    if split == SPLITS:  # the call's own keys and values: seen, and written to their slots
        i = tl.arange(0, OWN)
        new = i < T
        k_angle = b * row_angle + i * N_ROPE
        k = load_rotated(
            tokens,
            k_cos + k_angle,
            k_sin + k_angle,
            norm_k,
            i * W + (H + g) * D,
            new,
            D,
            DP,
            N_ROPE,
            NORM,
            OFFSET,
            eps,
            dtype,
        )
        there = new[:, None] & (d < D)[None, :]
        v = tl.load(tokens + (i * W + (H + G + g) * D)[:, None] + d[None, :], mask=there, other=0.0)
        for copy in tl.static_range(COPIES):
            slot = tl.load(slots + b * row_slots + copy * T + i, mask=new, other=-1)
            to = head + slot[:, None] * D + d[None, :]
            tl.store(k_cache + to, k, mask=there & (slot >= 0)[:, None])
            tl.store(v_cache + to, v, mask=there & (slot >= 0)[:, None])
        known = live[:, None] & new[None, :]
        sees = tl.load(seen + b * row_seen + t[:, None] * (L + T) + L + i[None, :], mask=known, other=0)
        s = scores_of(q, q_1, q_2, k, sees, scale, cap, PARTS, CAP)
        top = tl.max(s, 1)
        p = tl.exp(s - tl.where(top == float("-inf"), 0.0, top)[:, None])
        total = tl.sum(p, 1)
        acc = tl.dot(p.to(dtype), v, input_precision="ieee")
    else:
        for n in tl.range(split * WIDTH, n_blocks, SPLITS * WIDTH, num_stages=STAGES):
            mine = n + c // KEYS < n_blocks
            j = tl.load(blocks + n + c // KEYS, mask=mine, other=0) * KEYS + c % KEYS
            mine = mine & (j < L)
            there = mine[:, None] & (d < D)[None, :]
            k = tl.load(k_cache + head + j[:, None] * D + d[None, :], mask=there, other=0.0)
            v = tl.load(v_cache + head + j[:, None] * D + d[None, :], mask=there, other=0.0)
            known = live[:, None] & mine[None, :]
            sees = tl.load(seen + b * row_seen + t[:, None] * (L + T) + j[None, :], mask=known, other=0)
            s = scores_of(q, q_1, q_2, k, sees, scale, cap, PARTS, CAP)
            higher = tl.maximum(top, tl.max(s, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp(s - base[:, None])
            fade = tl.exp(top - base)
            total = total * fade + tl.sum(p, 1)
            acc = tl.dot(p.to(dtype), v, acc * fade[:, None], input_precision="ieee")
            top = higher
    # partial: (B * G, ROWS, SPLITS + 1, DP + 2): sums of values, the greatest score, the sum of weights
    here = partial + ((tl.program_id(0) * ROWS + m).to(tl.int64) * (SPLITS + 1) + split) * (DP + 2)
    tl.store(here[:, None] + d[None, :], acc, mask=live[:, None] & (d < D)[None, :])
    tl.store(here + DP, top, mask=live)
    tl.store(here + DP + 1, total, mask=live)
    tl.debug_barrier()
    if (
        tl.atomic_add(counts + tl.program_id(0), 1, sem="acq_rel") == SPLITS
    ):  # all others are done: join what they found
        tl.store(counts + tl.program_id(0), 0)
        s = tl.arange(0, JOINED)
        there = s < SPLITS + 1
        for token in range(0, T):
            for r in tl.static_range(R):
                row = (tl.program_id(0) * ROWS + token * R + r).to(tl.int64)
                found = partial + (row * (SPLITS + 1) + s) * (DP + 2)
                tops = tl.load(found + DP, mask=there, other=float("-inf"), cache_modifier=".cg")
                totals = tl.load(found + DP + 1, mask=there, other=0.0, cache_modifier=".cg")
                known = there[:, None] & (d < D)[None, :]
                sums = tl.load(found[:, None] + d[None, :], mask=known, other=0.0, cache_modifier=".cg")
                highest = tl.max(tops, 0)
                weight = tl.exp(tops - tl.where(highest == float("-inf"), 0.0, highest))
                whole = tl.sum(totals * weight, 0)
                joined = tl.sum(sums * weight[:, None], 0) / tl.where(whole > 0, whole, 1.0)
                tl.store(y + ((b * T + token) * H + g * R + r) * D + d, joined.to(dtype), mask=d < D)


# ------------------------------------------------------------------------------------------------------------ launching

MOST_ROWS = 32  # of a product: from there on the libraries' are as fast
KEYS = 64  # slots of a block
MOST_QUERIES = 64  # query tokens times query heads of a key/value head


def next_power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


class Weight(NamedTuple):
    """A linear layer's weight, as the kernels take it."""

    format: str  # dense, int8 or int4
    outputs: int
    weight: Tensor  # int4: words of int32
    scale: Tensor  # int8: float32 (N,); int4: pairs of bfloat16 as int32 (N, K / group); dense: anything
    bias: Tensor | None
    group: int = 32


def kernel_weight(linear: nn.Module) -> Weight | None:
    """The layer's weight as the kernels take it; None where they do not know the layer."""
    if is_injected(linear):
        return None
    if is_plain(linear):
        return Weight("dense", linear.out_features, linear.weight, linear.weight, linear.bias)
    form = getattr(linear, "kernel_format", None)
    if form == "int8":
        return Weight("int8", linear.out_features, linear.weight, linear.scale, linear.bias)
    if form == "int4":
        pairs = linear.scales.view(torch.int32)
        return Weight("int4", linear.out_features, linear.weight, pairs, linear.bias, linear.group_size)
    return None


def product(
    x: Tensor,
    linear: nn.Module,
    gate: nn.Module | None = None,
    *,
    gain: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    activation: str = "none",
    residual: Tensor | None = None,
    bias: bool = True,
) -> Tensor:
    """activation(linear(norm(x))) * gate(norm(x)) + residual, (..., K) -> (..., N), for at most MOST_ROWS rows.

    gain: that of an RMS norm of x, to which `offset` is added; None: no norm. bias: add the layers' biases.
    Sums are float32, and rounded once.
    """
    first = kernel_weight(linear)
    second = first if gate is None else kernel_weight(gate)
    K, N = x.size(-1), first.outputs
    M = x.numel() // K
    y = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    residual_of = x if residual is None else residual.contiguous()
    x = x.contiguous()
    one, two = ((w.weight, w.scale, w.weight if w.bias is None else w.bias) for w in (first, second))
    how = {
        "FORMAT": first.format, "GROUP": first.group, "GATED": gate is not None, "ACT": activation,
        "BIAS": bias and first.bias is not None, "RESIDUAL": residual is not None, "PDL": True, "launch_pdl": True,
    }  # fmt: skip
    how |= {"NORM": gain is not None, "OFFSET": offset}
    gain = x if gain is None else gain
    if first.format != "dense" and x.dtype != torch.float32:
        if first.format == "int8":
            one, two = ((w.view(torch.int32), *rest) for w, *rest in (one, two))
        grid, BN, RUNS, warps = code_tiles(first.format, M, N, K, gate is not None, x.device)
        how |= {"RUNS": RUNS, "num_warps": warps}
        packed = factors = x
        if M > 1:
            size = M * (K // (32 if first.format == "int4" else 16))
            packed = torch.empty(size * 16, dtype=torch.int32, device=x.device)
            factors = torch.empty(size * 2, dtype=torch.float32, device=x.device)
            only = {k: how[k] for k in ("FORMAT", "NORM", "OFFSET", "RUNS", "PDL", "launch_pdl", "num_warps")}
            pack_kernel[(M,)](packed, factors, x, gain, K, eps, **only)
        tensors = y, x, gain, packed, factors, *one, residual_of, *distances(one, two)
        codes_kernel[(grid,)](*tensors, M, N, K, eps, BN=BN, PACKED=M > 1, **how)
    elif M == 1 and first.format == "dense":
        BN, how["RUNS"], how["num_warps"] = dense_tiles(N, K, gate is not None)
        tensors = y, x, gain, *one, residual_of, *distances(one, two)
        vector_kernel[(triton.cdiv(N, BN),)](*tensors, N, K, eps, BN=BN, **how)
    else:
        BN, how["BK"], how["num_warps"], how["STAGES"] = matrix_tiles(x.element_size(), how["NORM"])
        how["ROWS"] = max(16, next_power(M))
        matrix_kernel[(triton.cdiv(N, BN),)](y, x, gain, *one, residual_of, *two, M, N, K, eps, BN=BN, **how)
    return y


def distances(one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> list[int]:
    """How many elements each of the second tensors lies behind the first."""
    return [(b.data_ptr() - a.data_ptr()) // a.element_size() for a, b in zip(one, two, strict=True)]


# The tiles below were the fastest of those tried on an H100 at the sizes of a 7B.


def dense_tiles(N: int, K: int, gated: bool) -> tuple[int, int, int]:
    """(outputs of a program, runs of a tile, warps)"""
    if gated:
        return 1, 64, 2
    return (1, 256, 8) if K > 8192 else (2, 64, 2) if N > 16384 else (4, 128, 2)


def code_tiles(format: str, M: int, N: int, K: int, gated: bool, device: torch.device) -> tuple[int, int, int, int]:
    """(programs, outputs of a tile, runs of a row, warps). Each program makes the same number of tiles, or one less."""
    runs = max(32, next_power(K // (32 if format == "int4" else 16)))
    warps, wide = min(8, runs // 32), runs > (256 if format == "int4" else 512)
    if M > 1:
        BN = 2 if gated else 4
    elif format == "int4":
        BN = 1 if gated else 2 if wide else 4
    else:
        BN = 2 if gated else 1 if wide else 4
    tiles, most = triton.cdiv(N, BN), multiprocessors(device) * (24 if BN == 1 and gated else 16) // warps
    return triton.cdiv(tiles, triton.cdiv(tiles, most)), BN, runs, warps


def matrix_tiles(size: int, norm: bool) -> tuple[int, int, int, int]:
    """(outputs of a program, inputs of a tile, warps, tiles in flight). size: bytes of a number of x."""
    if size == 4:
        return 32, 128, 4, 2
    return (64, 256, 4, 3) if norm else (32, 256, 2, 4)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def attention(
    qkv: Tensor, cache, plan, n_head: int, n_query_groups: int, norms: tuple | None, scale: float, cap: float | None
) -> Tensor:
    """Rotate, write and attend: qkv (B, T, (H + 2 G) * D) of a call's tokens -> (B, T, H * D).

    cache: a KVCache, whose slots `plan` (a fast_decode.SlotPlan) was made for. norms: (gain of queries, of keys, eps,
    offset) of heads' RMS norms. cap: of the scores.
    """
    B, T, _ = qkv.shape
    H, G, D = n_head, n_query_groups, cache.k.size(-1)
    ROWS, OWN, DP = (max(16, next_power(n)) for n in (H // G * T, T, D))
    splits, width, warps, stages = attention_tiles(plan.blocks.size(1) - 1, B * G, DP * qkv.element_size(), qkv.device)
    y = torch.empty(B, T, H * D, dtype=qkv.dtype, device=qkv.device)
    partial = torch.empty(B * G * ROWS * (splits + 1) * (DP + 2), dtype=torch.float32, device=qkv.device)
    gain_q, gain_k, eps, offset = norms or (qkv, qkv, 0.0, 0.0)

    def stride(x: Tensor) -> int:  # from sequence to sequence; 0 where all share one
        return x.stride(0) if x.size(0) > 1 else 0

    attention_kernel[(B * G, splits + 1)](
        y, qkv, cache.k, cache.v, plan.cos, plan.sin, plan.k_cos, plan.k_sin, plan.seen, plan.slots,
        plan.blocks, gain_q, gain_k, partial, plan.counts, T, plan.seen.size(-1) - T, cache.k.size(2),
        *map(stride, (plan.seen, plan.slots, plan.blocks, plan.k_cos)), plan.cos.stride(0), scale,
        cap or 0.0, eps, H=H, G=G, D=D, DP=DP, N_ROPE=plan.cos.size(-1), PARTS=plan.cos.size(0),
        COPIES=plan.slots.size(1), NORM=norms is not None, OFFSET=offset, CAP=cap is not None, ROWS=ROWS, KEYS=KEYS,
        WIDTH=width, OWN=OWN, SPLITS=splits, JOINED=next_power(splits + 1), STAGES=stages, PDL=True, num_warps=warps,
        launch_pdl=True,
    )  # fmt: skip
    return y


def attention_tiles(blocks: int, heads: int, size: int, device: torch.device) -> tuple[int, int, int, int]:
    """(programs that share the slots of a head, blocks that one reads at a time, warps, reads in flight).

    size: bytes of a key. About two programs for each multiprocessor, and no more than there are blocks.
    """
    width = 2 if size <= 256 and blocks >= 64 else 1
    wanted = next_power(max(1, 2 * multiprocessors(device) // heads))
    return max(1, min(wanted, next_power(blocks) // 2, 128)), width, 4, 1
