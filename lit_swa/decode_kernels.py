"""Triton kernels of a decode step: products with few rows, and attention of few queries over a cache.

A step of few tokens reads every weight once and computes little with it, so the memory's speed is its limit. These
kernels keep to it: what lies between two products (a norm before, an activation, a residual after) is done inside, and
a kernel begins to read its weights before the kernel in front of it has ended (programmatic dependent launch).

Only a GPU runs this file; linear_formats.gpu_kernels gives it where it can be used. M rows, N outputs, K inputs of a
product.
"""

import functools
from typing import Any, NamedTuple

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
    y, x, gain, w, scale, bias, residual, delta_w, delta_scale, delta_bias, N, K, eps, chosen,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BN: tl.constexpr, RUNS: tl.constexpr,
    EACH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Dense weights. A program makes one tile of outputs, and reads the next runs while it adds up those before.

    EACH > 0: w holds experts, of which output row n is made by chosen[n], of row n // EACH of x.
    """
    if EACH:
        row = tl.program_id(1)
        expert = tl.load(chosen + row).to(tl.int64)
        x, y, w, bias = x + row // EACH * K, y + row * N, w + expert * N * K, bias + expert * N
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
def dot_int4(words, x0, x1, x2, x3):
    """sum over j of (nibble j - 8) * x_j; xj holds x_j (low half) and x_{j + 4} (high half) in float16."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 h, c, a, eight, sixteenth, less;
        .reg .b16 low, high;
        .reg .f32 f, g;
        mov.b32 eight, 0x64086408;
        mov.b32 sixteenth, 0x2C002C00;
        mov.b32 less, 0xD480D480;
        shr.u32 h, $1, 8;
        lop3.b32 c, $1, 0x000F000F, 0x64006400, 0xEA;
        sub.f16x2 c, c, eight;
        mul.f16x2 a, c, $2;
        lop3.b32 c, $1, 0x00F000F0, 0x64006400, 0xEA;
        fma.rn.f16x2 c, c, sixteenth, less;
        fma.rn.f16x2 a, c, $3, a;
        lop3.b32 c, h, 0x000F000F, 0x64006400, 0xEA;
        sub.f16x2 c, c, eight;
        fma.rn.f16x2 a, c, $4, a;
        lop3.b32 c, h, 0x00F000F0, 0x64006400, 0xEA;
        fma.rn.f16x2 c, c, sixteenth, less;
        fma.rn.f16x2 a, c, $5, a;
        mov.b32 {low, high}, a;
        cvt.f32.f16 f, low;
        cvt.f32.f16 g, high;
        add.f32 $0, f, g;
        }""",
        "=f,r,r,r,r,r", [words, x0, x1, x2, x3], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def dot_int8(words, x0, x1):
    """sum over j of byte j * x_j, bytes signed; x0 holds x_0 and x_2 in float16, x1 holds x_1 and x_3."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 h, c, a, zero;
        .reg .b16 low, high;
        .reg .f32 f, g;
        mov.b32 zero, 0x64806480;
        shr.u32 h, $1, 8;
        lop3.b32 c, $1, 0x00FF00FF, 0x64806480, 0x6A;
        sub.f16x2 c, c, zero;
        mul.f16x2 a, c, $2;
        lop3.b32 c, h, 0x00FF00FF, 0x64806480, 0x6A;
        sub.f16x2 c, c, zero;
        fma.rn.f16x2 a, c, $3, a;
        mov.b32 {low, high}, a;
        cvt.f32.f16 f, low;
        cvt.f32.f16 g, high;
        add.f32 $0, f, g;
        }""",
        "=f,r,r,r", [words, x0, x1], dtype=tl.float32, is_pure=True, pack=1,
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
    """Inputs as dot_int4 or dot_int8 takes them, (RUNS, 4) int32 each; and of each run the power of two that they were
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
def codes_kernel(
    y, x, gain, w, scale, bias, residual, delta_w, delta_scale, delta_bias, N, K, eps, chosen,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, BN: tl.constexpr, RUNS: tl.constexpr,
    EACH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Weights in 8 or 4 bits, as int32 words. A program packs a row of x once, and goes from tile to tile of outputs.
    The programs of several rows read a tile at about the same time: from memory once, and then from the L2 cache.

    EACH > 0: w holds experts, as in vector_kernel.
    """
    PER_RUN: tl.constexpr = 32 if FORMAT == "int4" else 16
    row = tl.program_id(1)
    x, y, residual = x + (row // EACH if EACH else row) * K, y + row * N, residual + row * N
    if EACH:
        expert = tl.load(chosen + row).to(tl.int64)
        w, bias = w + expert * N * (K // PER_RUN * 4), bias + expert * N
        scale += expert * N * (K // GROUP if FORMAT == "int4" else 1)
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
        if FORMAT == "int4":
            next_pairs = tl.load(scale + n.to(tl.int64)[:, None] * groups + of_group, mask=there, other=0)
            s, o = (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)
            part = tl.sum(dot_int4(words, x0[None, :, :], x1[None, :, :], x2[None, :, :], x3[None, :, :]), 2)
            out = tl.sum((s * up[None, :]) * part + o * total[None, :], 1)
            pairs = next_pairs
        else:
            out = tl.sum(tl.sum(dot_int8(words, x0[None, :, :], x1[None, :, :]), 2) * up[None, :], 1)
            n = tile * BN + w_n % BN
            out *= tl.load(scale + half * delta_scale + n, mask=n < N, other=0.0)
        finish(
            out, sum_of_squares, tile, w_n, bias, residual, y, delta_bias, N, K, eps, GATED, NORM, ACT, BIAS,
            RESIDUAL, BN,
        )  # fmt: skip
        words, tile = next_words, later


# ------------------------------------------------------------------------------------------- products, a few rows
#
# Up to 64 rows of x: the products go to the tensor cores, a tile of weights (BN, BK) from the left and the rows of x
# (BK, ROWS) from the right. Codes are made dense in registers, tile by tile. Then making x ready in every program would
# take longer than the products: prepare_kernel norms it once, and lays it out as the tiles are read.


@triton.jit
def prepare_kernel(
    out, x, gain, M, K, eps, NORM: tl.constexpr, OFFSET: tl.constexpr, INT4: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """norm(x) (M, K) -> (K, ROWS), zeros from row M on; INT4: in the order in which multiply_codes joins nibbles."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    m, k = tl.program_id(0), tl.arange(0, SIZE)
    v = tl.load(x + m * K + k, mask=(k < K) & (m < M), other=0.0).to(tl.float32)
    if NORM:
        v *= tl.rsqrt(tl.sum(v * v, 0) / K + eps)
        v *= tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32) + OFFSET
    if INT4:
        j = k % 32 // 4
        to = (k // 32 * 4 + k % 4) * 8 + (j % 2) * 4 + j // 2 % 2 * 2 + j // 4
    else:
        to = k
    tl.store(out + to * ROWS + m, v.to(out.dtype.element_ty), mask=k < K)


@triton.jit
def nibbles(words, s, o, j: tl.constexpr, dtype: tl.constexpr):
    """Code j of each word, times s, plus o. Bits 16 .. 19 of a float32 with the exponent of 128 are 128 + code."""
    moved = words << (16 - 4 * j) if j < 4 else words >> (4 * j - 16)
    return (((moved & 0x000F0000) | 0x43000000).to(tl.float32, bitcast=True) * s + o).to(dtype)


@triton.jit
def multiply_codes(
    w, scale, x, n, N, K, FORMAT: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """W x^T (BN, ROWS) of the outputs n, for a prepared x."""
    acc = tl.zeros((BN, ROWS), tl.float32)
    dtype = x.dtype.element_ty
    PER_WORD: tl.constexpr = 8 if FORMAT == "int4" else 1
    m, i, k, live = tl.arange(0, ROWS), tl.arange(0, BK // PER_WORD), tl.arange(0, BK), (n < N)[:, None]
    n_words = K // PER_WORD
    rows = w + n.to(tl.int64)[:, None] * n_words
    for first in tl.range(0, n_words, BK // PER_WORD, num_stages=STAGES):
        words = tl.load(rows + (first + i)[None, :], mask=live & (first + i < n_words)[None, :], other=0)
        at = first * PER_WORD + k
        v = tl.load(x + at[:, None] * ROWS + m[None, :], mask=(at < K)[:, None], other=0.0)
        if FORMAT == "int4":
            of_row = scale + n.to(tl.int64)[:, None] * (K // GROUP) + ((first + i) * 8 // GROUP)[None, :]
            pairs = tl.load(of_row, mask=live & (first + i < n_words)[None, :], other=0)
            s, o = (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)
            o -= 136.0 * s
            a = tl.join(nibbles(words, s, o, 0, dtype), nibbles(words, s, o, 1, dtype))
            b = tl.join(nibbles(words, s, o, 2, dtype), nibbles(words, s, o, 3, dtype))
            c = tl.join(nibbles(words, s, o, 4, dtype), nibbles(words, s, o, 5, dtype))
            d = tl.join(nibbles(words, s, o, 6, dtype), nibbles(words, s, o, 7, dtype))
            weights = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BN, BK))
        else:
            weights = words.to(dtype)
        acc = tl.dot(weights, v, acc, input_precision="ieee")
    if FORMAT == "int8":
        acc *= tl.load(scale + n, mask=n < N, other=0.0)[:, None]
    return acc


@triton.jit
def multiply_dense(
    w, x, gain, n, M, N, K, NORM: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(W x^T (BN, ROWS) of the outputs n, the sum of squares of each row of x)"""
    acc, squares = tl.zeros((BN, ROWS), tl.float32), tl.zeros((BK, ROWS), tl.float32)
    dtype = x.dtype.element_ty
    m, i, live = tl.arange(0, ROWS), tl.arange(0, BK), (n < N)[:, None]
    for first in tl.range(0, K, BK, num_stages=STAGES):
        k = first + i
        weights = tl.load(w + n.to(tl.int64)[:, None] * K + k[None, :], mask=live & (k < K)[None, :], other=0.0)
        v = tl.load(x + m[None, :] * K + k[:, None], mask=(m < M)[None, :] & (k < K)[:, None], other=0.0)
        if NORM:
            v = v.to(tl.float32)
            squares += v * v
            v *= (tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32) + OFFSET)[:, None]
        acc = tl.dot(weights.to(dtype), v.to(dtype), acc, input_precision="ieee")
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
    rms = 1.0
    if FORMAT == "dense":
        out, squares = multiply_dense(w, x, gain, n, M, N, K, NORM, OFFSET, ROWS, BN, BK, STAGES)
        if NORM:
            rms = tl.rsqrt(squares / K + eps)[None, :]
            out *= rms
    else:
        out = multiply_codes(w, scale, x, n, N, K, FORMAT, GROUP, ROWS, BN, BK, STAGES)
    if BIAS:
        out += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    out = activate(out, ACT)
    if GATED:
        if FORMAT == "dense":
            right, _ = multiply_dense(w_2, x, gain, n, M, N, K, NORM, OFFSET, ROWS, BN, BK, STAGES)
            right *= rms
        else:
            right = multiply_codes(w_2, scale_2, x, n, N, K, FORMAT, GROUP, ROWS, BN, BK, STAGES)
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
def keep_layout(x):
    """x. The compiler would make what it comes from in the layout of what follows, which takes many registers."""
    if x.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)


@triton.jit
def load_rotated(
    x, cos, sin, weight, rows, angles, live, D: tl.constexpr, DP: tl.constexpr, N_ROPE: tl.constexpr,
    NORM: tl.constexpr, OFFSET: tl.constexpr, eps, dtype: tl.constexpr,
):  # fmt: skip
    """The heads at x + rows (ROWS,), normed if NORM and rotated by what is at cos and sin + angles, (ROWS, DP)."""
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
    c = tl.load(cos + angles[:, None] + d[None, :], mask=turned, other=1.0)
    s = tl.load(sin + angles[:, None] + d[None, :], mask=turned, other=0.0)
    return keep_layout((v * c + u * s).to(dtype))


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
def fetch(lines, there):
    """Bring lines of 128 bytes into the L2 cache. lines: where each begins."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l,r",
        [lines.to(tl.int64), there.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def load_slots(
    k_cache, v_cache, seen, blocks, n, later, n_blocks, t, live, L, T, D: tl.constexpr, DP: tl.constexpr,
    KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Keys and values of the live blocks n .. n + WIDTH - 1, (keys, DP) each, and who sees them, (ROWS, keys). Those of
    the blocks from `later` on are brought into the L2 cache."""
    c, d = tl.arange(0, KEYS * WIDTH), tl.arange(0, DP)
    mine = n + c // KEYS < n_blocks
    j = tl.load(blocks + n + c // KEYS, mask=mine, other=0).to(tl.int32) * KEYS + c % KEYS
    mine = mine & (j < L)
    there = mine[:, None] & (d < D)[None, :]
    k = tl.load(k_cache + j[:, None] * D + d[None, :], mask=there, other=0.0)
    v = tl.load(v_cache + j[:, None] * D + d[None, :], mask=there, other=0.0)
    sees = tl.load(seen + t[:, None] * (L + T) + j[None, :], mask=live[:, None] & mine[None, :], other=0)
    LINE: tl.constexpr = 1024 // k_cache.dtype.element_ty.primitive_bitwidth  # elements of 128 bytes
    mine = later + c // KEYS < n_blocks
    j = tl.load(blocks + later + c // KEYS, mask=mine, other=0).to(tl.int32) * KEYS + c % KEYS
    line = tl.arange(0, (DP + LINE - 1) // LINE) * LINE
    there = (mine & (j < L))[:, None] & (line < D)[None, :]
    fetch(k_cache + j[:, None] * D + line[None, :], there)
    fetch(v_cache + j[:, None] * D + line[None, :], there)
    return k, v, sees


@triton.jit
def join_splits(
    y, sums, edges, sinks, H, first, rows, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, SPLITS: tl.constexpr,
    JOINED: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Write the outputs of the rows first .. first + GROUP - 1 from what each of SPLITS programs found. SINKS: sinks
    (R,) are logits that share the softmax and have no value."""
    d, m = tl.arange(0, DP), first + tl.arange(0, GROUP)
    here = m * SPLITS
    s = tl.arange(0, JOINED)
    found = edges + (here[:, None] + s[None, :]) * 2
    known = (m < rows)[:, None] & (s < SPLITS)[None, :]
    tops = tl.load(found, mask=known, other=float("-inf"), cache_modifier=".cg")
    highest = tl.max(tops, 1)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp(tops - highest[:, None])
    whole = tl.sum(tl.load(found + 1, mask=known, other=0.0, cache_modifier=".cg") * weights, 1)
    if SINKS:
        logits = tl.load(sinks + m % R, mask=m < rows, other=float("-inf")).to(tl.float32)
        whole += tl.exp(logits - highest)  # infinite where nothing else counts: then the output is 0
    joined = tl.zeros((GROUP, DP), tl.float32)
    for start in range(0, SPLITS, CHUNK):
        c = start + tl.arange(0, CHUNK)
        there, places = (m < rows)[:, None] & (c < SPLITS)[None, :], here[:, None] + c[None, :]
        w = tl.exp(
            tl.load(edges + places * 2, mask=there, other=float("-inf"), cache_modifier=".cg") - highest[:, None]
        )
        x = sums + places[:, :, None] * DP + d[None, None, :]
        joined += tl.sum(tl.load(x, mask=there[:, :, None], other=0.0, cache_modifier=".cg") * w[:, :, None], 1)
    joined /= tl.where(whole > 0, whole, 1.0)[:, None]
    to = y + (m // R * H + m % R)[:, None] * D + d[None, :]
    tl.store(to, joined.to(y.dtype.element_ty), mask=(m < rows)[:, None] & (d < D)[None, :])


@triton.jit
def attention_kernel(
    y, qkv, k_cache, v_cache, cos, sin, k_cos, k_sin, seen, slots, blocks, norm_q, norm_k, sinks, partial,
    counts, T, L, n_slots, row_seen, row_slots, row_blocks, row_angle, part_angle, scale, cap, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N_ROPE: tl.constexpr, PARTS: tl.constexpr,
    COPIES: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, CAP: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, SPLITS: tl.constexpr, JOINED: tl.constexpr,
    SHARES: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, SINKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """SPLITS programs for each key/value head: the first SHARES of them share the slots, L of the n_slots in the cache,
    and the last one takes the call's own keys."""
    R: tl.constexpr = H // G
    W: tl.constexpr = (H + 2 * G) * D  # of a token in qkv
    dtype = qkv.dtype.element_ty
    b, g, split = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G, tl.program_id(1)
    m, d = tl.arange(0, ROWS), tl.arange(0, DP)
    t, live, own = m // R, m < R * T, split == SPLITS - 1
    k_cache, v_cache = k_cache + (b * G + g) * n_slots * D, v_cache + (b * G + g) * n_slots * D
    blocks += b * row_blocks
    seen += b * row_seen
    n_blocks, blocks = tl.load(blocks), blocks + 1
    n, stride = tl.where(split < SHARES, split * WIDTH, n_blocks), SHARES * WIDTH
    # what the caches hold does not depend on the kernel in front of this one
    k, v, sees = load_slots(
        k_cache, v_cache, seen, blocks, n, n + stride, n_blocks, t, live, L, T, D, DP, KEYS, WIDTH
    )  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tokens = qkv + b * T * W
    rows = t * W + (g * R + m % R) * D
    # cos and sin: (PARTS, 1 or B, T, N_ROPE)
    cos, sin, k_cos, k_sin = cos + b * row_angle, sin + b * row_angle, k_cos + b * row_angle, k_sin + b * row_angle
    q = load_rotated(
        tokens, cos, sin, norm_q, rows, t * N_ROPE, live, D, DP, N_ROPE, NORM, OFFSET, eps, dtype
    )  # fmt: skip
    q_1, q_2 = q, q
    if PARTS > 1:
        cos, sin = cos + part_angle, sin + part_angle
        q_1 = load_rotated(
            tokens, cos, sin, norm_q, rows, t * N_ROPE, live, D, DP, N_ROPE, NORM, OFFSET, eps, dtype
        )  # fmt: skip
    if PARTS > 2:
        cos, sin = cos + part_angle, sin + part_angle
        q_2 = load_rotated(
            tokens, cos, sin, norm_q, rows, t * N_ROPE, live, D, DP, N_ROPE, NORM, OFFSET, eps, dtype
        )  # fmt: skip
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DP), tl.float32)
    if own:  # seen, and written to their slots
        i = tl.arange(0, OWN)
        new = i < T
        k_rows = i * W + (H + g) * D
        own_k = load_rotated(
            tokens, k_cos, k_sin, norm_k, k_rows, i * N_ROPE, new, D, DP, N_ROPE, NORM, OFFSET, eps, dtype
        )  # fmt: skip
        there = new[:, None] & (d < D)[None, :]
        own_v = tl.load(tokens + (k_rows + G * D)[:, None] + d[None, :], mask=there, other=0.0)
        for copy in tl.static_range(COPIES):
            slot = tl.load(slots + b * row_slots + copy * T + i, mask=new, other=-1)
            to = slot.to(tl.int32)[:, None] * D + d[None, :]
            tl.store(k_cache + to, own_k, mask=there & (slot >= 0)[:, None])
            tl.store(v_cache + to, own_v, mask=there & (slot >= 0)[:, None])
        known = live[:, None] & new[None, :]
        sees_own = tl.load(seen + t[:, None] * (L + T) + L + i[None, :], mask=known, other=0)
        s = scores_of(q, q_1, q_2, own_k, sees_own, scale, cap, PARTS, CAP)
        top = tl.max(s, 1)
        p = tl.exp(s - tl.where(top == float("-inf"), 0.0, top)[:, None])
        total = tl.sum(p, 1)
        acc = tl.dot(p.to(dtype), own_v, input_precision="ieee")
    while n < n_blocks:
        n += stride
        later_k, later_v, later_sees = load_slots(
            k_cache, v_cache, seen, blocks, n, n + stride, n_blocks, t, live, L, T, D, DP, KEYS, WIDTH
        )  # fmt: skip
        s = scores_of(q, q_1, q_2, k, sees, scale, cap, PARTS, CAP)
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp(s - base[:, None])
        fade = tl.exp(top - base)
        total = total * fade + tl.sum(p, 1)
        acc = tl.dot(p.to(dtype), v, acc * fade[:, None], input_precision="ieee")
        top = higher
        k, v, sees = later_k, later_v, later_sees
    # partial: (B * G, ROWS, SPLITS) times DP sums of values, and then times 2: the greatest score, the sum of weights
    at = tl.program_id(0).to(tl.int64) * ROWS
    edges = partial + tl.num_programs(0).to(tl.int64) * (ROWS * SPLITS * DP)
    partial, edges = partial + at * SPLITS * DP, edges + at * SPLITS * 2
    here = m * SPLITS + split
    tl.store(partial + here[:, None] * DP + d[None, :], acc, mask=live[:, None])
    tl.store(edges + here * 2, top, mask=live)
    tl.store(edges + here * 2 + 1, total, mask=live)
    tl.debug_barrier()
    done = tl.atomic_add(counts + tl.program_id(0), 1, sem="acq_rel")
    if done == SPLITS - 1:  # so all others are
        tl.store(counts + tl.program_id(0), 0)
        to = y + (b * T * H + g * R) * D
        for first in range(0, R * T, GROUP):
            join_splits(
                to, partial, edges, sinks + g * R, H, first, R * T, D, DP, R, SPLITS, JOINED, GROUP, CHUNK, SINKS
            )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ launching

MOST_ROWS = {"dense": 32, "int8": 64, "int4": 64}  # of a product: from there on the libraries' are as fast
MOST_CODED_ROWS = {"int8": 2, "int4": 16}  # rows of x with which the tensor cores are no faster
KEYS = 64  # slots of a block


def next_power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def most_queries(size: int) -> int:
    """Query tokens times query heads of a key/value head that attention takes, for keys of so many bytes: what the
    shared memory of most GPUs holds."""
    return 64 if size <= 256 else 16 if size <= 512 else 0


class Weight(NamedTuple):
    """A linear layer's weight, as the kernels take it."""

    format: str  # dense, int8 or int4
    outputs: int
    weight: Tensor  # int4: words of int32
    scale: Tensor  # int8: float32 (N,); int4: pairs of bfloat16 as int32 (N, K / group); dense: anything
    bias: Tensor | None
    group: int = 32


def kernel_weight(linear: nn.Module) -> Weight | None:
    """The layer's weight as the kernels take it; None where they do not know the layer or a row is no whole runs."""
    if is_injected(linear):
        return None
    if is_plain(linear) and linear.in_features % 8 == 0:
        return Weight("dense", linear.out_features, linear.weight, linear.weight, linear.bias)
    form = getattr(linear, "kernel_format", None)
    if form == "int8" and linear.in_features % 16 == 0:
        return Weight("int8", linear.out_features, linear.weight, linear.scale, linear.bias)
    if form == "int4":
        pairs = linear.scales.view(torch.int32)
        return Weight("int4", linear.out_features, linear.weight, pairs, linear.bias, linear.group_size)
    return None


def knows(rows: int, linear: nn.Module, gate: nn.Module | None = None) -> bool:
    """True if `product` takes so many rows of x to these layers."""
    first = kernel_weight(linear)
    if first is None or rows > MOST_ROWS[first.format]:
        return False
    if gate is None:
        return True
    second = kernel_weight(gate)
    alike = second is not None and (first.format, first.group) == (second.format, second.group)
    return alike and (first.bias is None) == (second.bias is None)


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
    """activation(linear(norm(x))) * gate(norm(x)) + residual, (..., K) -> (..., N), for as many rows as MOST_ROWS says.

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
        "BIAS": bias and first.bias is not None, "RESIDUAL": residual is not None,
    }  # fmt: skip
    how |= early_launch(x.device)
    how |= {"NORM": gain is not None, "OFFSET": offset, "EACH": 0}
    gain = x if gain is None else gain
    if first.format != "dense" and M <= MOST_CODED_ROWS[first.format] and x.dtype != torch.float32:
        if first.format == "int8":
            one, two = ((w.view(torch.int32), *rest) for w, *rest in (one, two))
        grid, BN, how["RUNS"], how["num_warps"] = code_tiles(first.format, N, K, gate is not None, x.device)
        codes_kernel[(grid, M)](y, x, gain, *one, residual_of, *distances(one, two), N, K, eps, x, BN=BN, **how)
    elif M == 1 and first.format == "dense":
        BN, how["RUNS"], how["num_warps"] = dense_tiles(N, K, gate is not None)
        grid = triton.cdiv(N, BN)
        vector_kernel[(grid,)](y, x, gain, *one, residual_of, *distances(one, two), N, K, eps, x, BN=BN, **how)
    else:
        ROWS = max(16, next_power(M))
        if first.format != "dense":
            x = prepare(x, gain, M, K, eps, first.format, ROWS, how)
        tiles = matrix_tiles(first.format, ROWS, x.element_size(), how["NORM"], properties(x.device).shared)
        BN, how["BK"], how["num_warps"], how["STAGES"] = tiles
        del how["EACH"]
        grid = triton.cdiv(N, BN)
        matrix_kernel[(grid,)](y, x, gain, *one, residual_of, *two, M, N, K, eps, BN=BN, ROWS=ROWS, **how)
    return y


def expert_weight(experts: nn.Module) -> Weight | None:
    """Weight of a stack of experts; None where the kernels do not know it."""
    form, n = getattr(experts, "kernel_format", "dense"), experts.in_features
    if n % (16 if form == "int8" else 8):
        return None
    if form == "int4":
        pairs = experts.scales.view(torch.int32)
        return Weight(form, experts.out_features, experts.weight, pairs, experts.bias, experts.group_size)
    scale = experts.scale if form == "int8" else experts.weight
    return Weight(form, experts.out_features, experts.weight, scale, experts.bias)


def knows_experts(x: Tensor, experts: nn.Module, gate: nn.Module) -> bool:
    """True if `expert_product` takes x to these stacks of experts."""
    first, second = expert_weight(experts), expert_weight(gate)
    if first is None or second is None or (first.format != "dense" and x.dtype == torch.float32):
        return False
    return (first.format, first.group, first.bias is None) == (second.format, second.group, second.bias is None)


def expert_product(
    x: Tensor, experts: nn.Module, gate: nn.Module | None, chosen: Tensor, activation: str = "none"
) -> Tensor:
    """activation(expert(x)) * gate(x) of the experts `chosen` (P,), for rows x (P, K), or (P / k, K) where k experts in
    a row were chosen for each: (P, N). Every one reads its expert's weights where they are."""
    first = expert_weight(experts)
    second = first if gate is None else expert_weight(gate)
    P, K, N = chosen.numel(), x.size(-1), first.outputs
    x, y = x.contiguous(), torch.empty(P, N, dtype=x.dtype, device=x.device)
    one, two = ((w.weight, w.scale, w.weight if w.bias is None else w.bias) for w in (first, second))
    how = {
        "FORMAT": first.format, "GROUP": first.group, "GATED": gate is not None, "ACT": activation, "NORM": False,
        "OFFSET": 0.0, "BIAS": first.bias is not None, "RESIDUAL": False, "EACH": P // x.size(0), "PDL": False,
    }  # fmt: skip
    if first.format == "dense":
        kernel, (BN, how["RUNS"], how["num_warps"]) = vector_kernel, dense_tiles(N, K, gate is not None)
        grid = triton.cdiv(N, BN)
    else:
        kernel = codes_kernel
        if first.format == "int8":
            one, two = ((w.view(torch.int32), *rest) for w, *rest in (one, two))
        grid, BN, how["RUNS"], how["num_warps"] = code_tiles(first.format, N, K, gate is not None, x.device)
    kernel[(grid, P)](y, x, x, *one, x, *distances(one, two), N, K, 0.0, chosen, BN=BN, **how)
    return y


def prepare(x: Tensor, gain: Tensor, M: int, K: int, eps: float, form: str, ROWS: int, how: dict[str, Any]) -> Tensor:
    """x as matrix_kernel reads it for codes, normed where `how` says so."""
    out = torch.empty(K, ROWS, dtype=x.dtype, device=x.device)
    same = {"NORM": how["NORM"], "OFFSET": how["OFFSET"]} | early_launch(x.device)
    prepare_kernel[(ROWS,)](
        out, x, gain, M, K, eps, INT4=form == "int4", ROWS=ROWS, SIZE=next_power(K), num_warps=8, **same
    )  # fmt: skip
    return out


def distances(one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> list[int]:
    """How many elements each of the second tensors lies behind the first."""
    return [(b.data_ptr() - a.data_ptr()) // a.element_size() for a, b in zip(one, two, strict=True)]


# The tiles below were the fastest of those tried on an H100 at the sizes of a 7B.


def dense_tiles(N: int, K: int, gated: bool) -> tuple[int, int, int]:
    """(outputs of a program, runs of a tile, warps)"""
    if gated:
        return 1, 64, 2
    return (1, 256, 8) if K > 8192 else (2, 64, 2) if N > 16384 else (4, 128, 2)


def code_tiles(form: str, N: int, K: int, gated: bool, device: torch.device) -> tuple[int, int, int, int]:
    """(programs, outputs of a tile, runs of a row, warps). Each program makes the same number of tiles, or one less."""
    runs = max(32, next_power(K // (32 if form == "int4" else 16)))
    warps, wide = min(8, runs // 32), runs > (256 if form == "int4" else 512)
    if form == "int4":
        BN, share = (1, 24) if gated else (2 if wide else 4, 16)
    else:
        BN, share = 2 if gated else 1 if wide else 4, 16
    tiles, most = triton.cdiv(N, BN), properties(device).multiprocessors * share // warps
    return triton.cdiv(tiles, triton.cdiv(tiles, most)), BN, runs, warps


def matrix_tiles(form: str, rows: int, size: int, norm: bool, shared: int) -> tuple[int, int, int, int]:
    """(outputs of a program, inputs of a tile, warps, tiles in flight). size: bytes of a number of x. shared: bytes of
    shared memory that a program may have."""
    if shared < 160_000:
        return 32, 64 if size == 4 else 128, 4, 2
    if form != "dense":
        return (32, 128, 4, 1) if size == 4 else (64, 256 if rows <= 32 else 128, 4, 3)
    if size == 4:
        return 32, 128, 4, 2
    return (64, 256, 4, 3) if norm else (32, 256, 2, 4)


class Properties(NamedTuple):
    multiprocessors: int
    shared: int  # bytes of shared memory that a program may have
    hopper: bool  # or later: a kernel can be launched before the one in front of it has ended


@functools.cache
def properties(device: torch.device) -> Properties:
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", 99 * 1024)
    return Properties(found.multi_processor_count, shared, found.major >= 9)


def early_launch(device: torch.device) -> dict[str, bool]:
    """The options of a kernel that may be launched before the one in front of it has ended, where the device can."""
    return {"PDL": True, "launch_pdl": True} if properties(device).hopper else {"PDL": False}


def attention(
    qkv: Tensor,
    cache,
    plan,
    n_head: int,
    n_query_groups: int,
    norms: tuple | None,
    scale: float,
    cap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Rotate, write and attend: qkv (B, T, (H + 2 G) * D) of a call's tokens -> (B, T, H * D).

    cache: a KVCache, whose slots `plan` (a gpu_decode.SlotPlan) was made for. norms: (gain of queries, of keys, eps,
    offset) of heads' RMS norms. cap: of the scores. sinks: learned logits (H,).
    """
    B, T, _ = qkv.shape
    H, G, D = n_head, n_query_groups, cache.k.size(-1)
    ROWS, OWN, DP = (max(16, next_power(n)) for n in (H // G * T, T, D))
    blocks, size = plan.blocks.size(1) - 1, DP * qkv.element_size()
    splits, shares, width, warps = attention_tiles(blocks, B * G, ROWS, size, qkv.device)
    joined, group = next_power(splits), min(4, next_power(H // G * T))  # programs and rows that are joined together
    y = torch.empty(B, T, H * D, dtype=qkv.dtype, device=qkv.device)
    partial = torch.empty(B * G * ROWS * splits * (DP + 2), dtype=torch.float32, device=qkv.device)
    gain_q, gain_k, eps, offset = norms or (qkv, qkv, 0.0, 0.0)

    def stride(x: Tensor) -> int:  # from sequence to sequence; 0 where all share one
        return x.stride(0) if x.size(0) > 1 else 0

    attention_kernel[(B * G, splits)](
        y, qkv, cache.k, cache.v, plan.cos, plan.sin, plan.k_cos, plan.k_sin, plan.seen, plan.slots,
        plan.blocks, gain_q, gain_k, qkv if sinks is None else sinks, partial, plan.counts, T,
        plan.seen.size(-1) - T, cache.k.size(2),
        *map(stride, (plan.seen, plan.slots, plan.blocks, plan.k_cos)), plan.cos.stride(0), scale,
        cap or 0.0, eps, H=H, G=G, D=D, DP=DP, N_ROPE=plan.cos.size(-1), PARTS=plan.cos.size(0),
        COPIES=plan.slots.size(1), NORM=norms is not None, OFFSET=offset, CAP=cap is not None, SINKS=sinks is not None,
        ROWS=ROWS, KEYS=KEYS, WIDTH=width, OWN=OWN, SPLITS=splits, SHARES=shares, JOINED=joined, GROUP=group,
        CHUNK=min(joined, max(1, 8192 // (group * DP))), num_warps=warps,
        **early_launch(qkv.device),
    )  # fmt: skip
    return y


def attention_tiles(blocks: int, heads: int, rows: int, size: int, device: torch.device) -> tuple[int, int, int, int]:
    """(programs of a key/value head, those that share its blocks, blocks that one reads at a time, warps).

    rows: queries of a program. size: bytes of a key. As few share the blocks as fill the multiprocessors, in rounds
    that are nearly full. Another one takes the call's own keys where there is a place left for it.
    """
    width, warps = 1, 4 if size <= 256 and rows <= 16 else 8  # more rows would not fit the registers of 4
    places = properties(device).multiprocessors * (8 // warps)
    most = max(1, min(128, triton.cdiv(blocks, width)))
    fewest = min(most, max(1, places // heads))
    full = (n for n in range(fewest, most + 1) if n * heads >= 0.9 * places * triton.cdiv(n * heads, places))
    shares = next(full, fewest)
    return shares + (heads * (shares + 1) <= places), shares, width, warps
