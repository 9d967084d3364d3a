"""Triton kernels for a whole text of linear attention, as linear.py defines it, with gradients: no weight of a query
and a key is written to memory.

A text is cut into N blocks of C tokens, and the window is M of them. Queries of block n meet the keys of block n - M,
some of them exactly and some as older ones, those of the blocks up to n exactly, and those before n - M by the state:

    make_features   phi of queries or keys                           a program: a block of a query head
    add_states      the states before each block, in order           a program: a part of a head's states
    read_queries    outputs                                          a program: a block of queries of a head
    grad_queries    gradients of queries, their features, sinks      the same
    add_grads       gradients of the states, from the last block on  as add_states
    grad_keys       gradients of keys, their features, values        a program: a block of keys of a query head
    grad_features   gradients of queries or keys, and of W           a program: a part of the blocks of a query head

States are summed in float32 and rounded where they are multiplied. With y_i = sum of w_ij v_j / Z_i, and its gradient
dy_i:

    d_ij = (dy_i . v_j - dy_i . y_i) / Z_i                              the gradient of w_ij
    exact: that of s_ij is w_ij d_ij, and that of c_i, which is the greatest s_ij, - E_i = - sum of w_ij d_ij

The sum of w_ij d_ij over all keys is 0. What it is instead, since y_i was rounded, says how far dy_i . y_i is off; E_i
and what the keys are told are put right by it. The gradient of the mix is a sum of E_i of both signs, where it counts.

With gates the features hold what is left within a block (gated()), and exp(-gone) of a state is left behind a block.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_swa.fast_attention import as_one_kernel

BLOCKS = 64, 32, 16  # tokens of a block, the largest that the window is a multiple of
SINKS = 16  # rows that are computed for sinks
MOST_HEAD_SIZE = 128
SHARED_MEMORY = 72 * 2**10, 144 * 2**10  # bytes that a program takes at most: of heads of up to 64 elements, of 128
PART = 32  # of the values' elements, and of the features, that are read at once
FEATURE_BLOCK = 32  # tokens whose features are made at once
# 8 warps are slower, and with two stages Triton 3.6 makes wrong gradients of them for heads of 128 elements with sinks.
LAUNCH = {"num_warps": 4, "num_stages": 2}
SCAN = LAUNCH | {"num_stages": 3}  # of what goes through a whole text, and can ask early for what is next
PROGRAMS = 512  # of grad_features, about: each sums up a gradient of W


@triton.jit
def load_rows(x, t, T, d, D: tl.constexpr):
    """Elements d of rows t of x (T, D), zeros behind the text and before it."""
    return tl.load(x + t[:, None] * D + d[None, :], mask=((t >= 0) & (t < T))[:, None], other=0.0)


@triton.jit
def load_each(x, t, T):
    return tl.load(x + t, mask=(t >= 0) & (t < T), other=0)


@triton.jit
def key_head(row, H: tl.constexpr, G: tl.constexpr):
    """Which of B * G key/value heads a query head of B * H has."""
    return row // H * G + row % H // (H // G)


@triton.jit
def sees_exactly(u, t, window):
    """Whether a query at t has the key at u in its window."""
    return (u <= t) & (u > t - window)


@triton.jit
def take_in(queries, keys, values, sees, first, scale, best, where, mass, mean):
    """A softmax over some keys, whose first is at place `first`, joined to that over others: the greatest score, the
    place of its key, the sum of the weights and that of the weighted values."""
    scores = tl.where(sees, tl.dot(queries, tl.trans(keys)) * scale, float("-inf"))
    new = tl.max(scores, 1)
    where = tl.where(new > best, first + tl.argmax(scores, 1), where)
    new = tl.maximum(new, best)
    finite = tl.where(new == float("-inf"), 0.0, new)
    weights, kept = tl.exp(scores - finite[:, None]), tl.exp(best - finite)
    mean = mean * kept[:, None] + tl.dot(weights.to(values.dtype), values)
    return new, where, mass * kept + tl.sum(weights, 1), mean


@triton.jit
def exact_grads(rows, columns, of_rows, of_columns, sees, best, inverse, delta, share, scale):
    """w_ij and w_ij d_ij, given queries and their dy, and keys and their values: either of them may be the rows."""
    scores = tl.where(sees, tl.dot(rows, tl.trans(columns)) * scale, best)
    weights = tl.where(sees, share * tl.exp(scores - best), 0.0)
    return weights, weights * (tl.dot(of_rows, tl.trans(of_columns)) * inverse - delta)


@triton.jit
def both_halves(z, RELU: tl.constexpr):
    """The halves of phi for z = x W (C, D)."""
    if RELU:
        plus, minus = tl.maximum(z, 0.0), tl.maximum(-z, 0.0)
    else:
        plus, minus = tl.exp(z - tl.max(z, 1)[:, None]), tl.exp(tl.min(z, 1)[:, None] - z)
        plus, minus = plus / tl.sum(plus, 1)[:, None], minus / tl.sum(minus, 1)[:, None]
    return plus, minus


@triton.jit
def make_features(
    x, weight, valid, phi, T, N, valid_row,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, RELU: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    """x (B, G, T, D), weight (H, D, D) -> phi (B, H, T, 2 D), zeros where `valid` says no"""
    n, row = tl.program_id(0) % N, (tl.program_id(0) // N).to(tl.int64)
    b, h = row // H, row % H
    x, phi = x + key_head(row, H, G) * T * D, phi + row * T * (2 * D)
    t, d = n * C + tl.arange(0, C), tl.arange(0, D)
    w = tl.load(weight + h * (D * D) + d[:, None] * D + d[None, :]).to(tl.float32)
    plus, minus = both_halves(tl.dot(load_rows(x, t, T, d, D).to(tl.float32), w), RELU)
    if VALID:
        ok = (load_each(valid + b * valid_row, t, T) != 0)[:, None]
        plus, minus = tl.where(ok, plus, 0.0), tl.where(ok, minus, 0.0)
    at, mask = phi + t[:, None] * (2 * D) + d[None, :], (t < T)[:, None]
    tl.store(at, plus.to(phi.dtype.element_ty), mask=mask)
    tl.store(at + D, minus.to(phi.dtype.element_ty), mask=mask)


@triton.jit
def grad_features(
    x, weight, dphi, dx, dweight, T, blocks, parts,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, RELU: tl.constexpr, OF_X: tl.constexpr,
    OF_WEIGHT: tl.constexpr,
):  # fmt: skip
    """Those that are asked for: dx (B, H, T, D) of each query head, dweight (B, H, parts, D, D). parts: programs of a
    head, of so many blocks."""
    part, row = tl.program_id(0) % parts, (tl.program_id(0) // parts).to(tl.int64)
    h = row % H
    x, dphi, dx = x + key_head(row, H, G) * T * D, dphi + row * T * (2 * D), dx + row * T * D
    d = tl.arange(0, D)
    square = d[:, None] * D + d[None, :]
    w = tl.load(weight + h * (D * D) + square).to(tl.float32)
    rounded, total = tl.trans(w.to(x.dtype.element_ty)), tl.zeros((D, D), tl.float32)
    for n in range(part * blocks, part * blocks + blocks):
        t = n * C + tl.arange(0, C)
        rows = load_rows(x, t, T, d, D)
        z = tl.dot(rows.to(tl.float32), w)
        of_plus = load_rows(dphi, t, T, d, 2 * D).to(tl.float32)
        of_minus = load_rows(dphi + D, t, T, d, 2 * D).to(tl.float32)
        if RELU:
            change = tl.where(z > 0, of_plus, 0.0) - tl.where(z < 0, of_minus, 0.0)
        else:
            plus, minus = both_halves(z, RELU)
            change = plus * (of_plus - tl.sum(plus * of_plus, 1)[:, None])
            change -= minus * (of_minus - tl.sum(minus * of_minus, 1)[:, None])
        change = change.to(rows.dtype)
        if OF_X:
            out = tl.dot(change, rounded)
            tl.store(dx + t[:, None] * D + d[None, :], out.to(dx.dtype.element_ty), mask=(t < T)[:, None])
        if OF_WEIGHT:
            total += tl.dot(tl.trans(rows), change)
    if OF_WEIGHT:
        tl.store(dweight + (row * parts + part) * (D * D) + square, total)


@triton.jit
def part_of_a_state(D: tl.constexpr, F: tl.constexpr, PART: tl.constexpr):
    """What a program has: a head's row of B * H, half of the features and some of the values' elements, and whether it
    has the norms of these features too."""
    ACROSS: tl.constexpr = D // PART
    PARTS: tl.constexpr = F // PART
    row, part = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS
    f, p = part // ACROSS * D + tl.arange(0, D), part % ACROSS * PART + tl.arange(0, PART)
    return row, f, p, part % ACROSS == 0


@triton.jit
def add_states(
    phi, v, gone, states, norms, T, N,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, PART: tl.constexpr,
    GATE: tl.constexpr,
):  # fmt: skip
    """phi (B, H, T, F), v (B, G, T, D), gone (B, H, N) -> states (B, H, N, F, D), norms (B, H, N, F)"""
    row, f, p, has_norms = part_of_a_state(D, F, PART)
    phi, v = phi + row * T * F, v + key_head(row, H, G) * T * D
    states, norms = states + row * N * F * D, norms + row * N * F
    total, norm = tl.zeros((D, PART), tl.float32), tl.zeros((D,), tl.float32)
    for n in range(N):
        tl.store(states + f[:, None] * D + p[None, :], total.to(states.dtype.element_ty))
        if has_norms:
            tl.store(norms + f, norm)
        t = n * C + tl.arange(0, C)
        x = load_rows(phi, t, T, f, F)
        total += tl.dot(tl.trans(x), load_rows(v, t, T, p, D))
        norm += tl.sum(x.to(tl.float32), 0)
        if GATE:
            left = tl.exp(-tl.load(gone + row * N + n))
            total, norm = total * left, norm * left
        states += F * D
        norms += F


@triton.jit
def read_queries(
    q, k, v, phi_q, phi_k, valid, seen, mix, states, norms, y, top, place, total, T, N, M, valid_row, seen_row, n_sinks,
    scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, PART: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """y (B, H, T, D); for each query, (B, H, T): c, the place of the key that has it, and the sum of its weights."""
    n, row = tl.program_id(0) % N, (tl.program_id(0) // N).to(tl.int64)
    b, h = row // H, row % H
    dtype = q.dtype.element_ty
    group = key_head(row, H, G) * T * D
    k, v, valid, seen = k + group, v + group, valid + b * valid_row, seen + b * seen_row
    q, y, phi_q, phi_k = q + row * T * D, y + row * T * D, phi_q + row * T * F, phi_k + row * T * F
    top, place, total = top + row * T, place + row * T, total + row * T
    c, d = tl.arange(0, C), tl.arange(0, D)
    t = n * C + c
    queries = load_rows(q, t, T, d, D)
    best, where = tl.full((C,), float("-inf"), tl.float32), tl.zeros((C,), tl.int32)
    mass, mean = tl.zeros((C,), tl.float32), tl.zeros((C, D), tl.float32)
    for m in range(tl.maximum(n - M, 0), n + 1):
        u = m * C + c
        sees = sees_exactly(u[None, :], t[:, None], M * C) & (load_each(valid, u, T) != 0)[None, :]
        keys, values = load_rows(k, u, T, d, D), load_rows(v, u, T, d, D)
        best, where, mass, mean = take_in(queries, keys, values, sees, m * C, scale, best, where, mass, mean)
    if SINKS > 0:
        s = tl.arange(0, SINKS)
        mask = (s < n_sinks)[None, :] & (t < T)[:, None]
        sees = tl.load(seen + t[:, None] * n_sinks + s[None, :], mask=mask, other=0) != 0
        keys, values = load_rows(k, s, n_sinks, d, D), load_rows(v, s, n_sinks, d, D)
        best, where, mass, mean = take_in(queries, keys, values, sees, 0, scale, best, where, mass, mean)
    share = tl.sigmoid(tl.load(mix + h).to(tl.float32))
    mass, mean = mass * share, mean * share
    u, at = (n - M) * C + c, row * N + tl.maximum(n - M, 0)  # where that is before the text all is zeros
    older = u[None, :] <= t[:, None] - M * C
    kernel = tl.zeros((C, C), tl.float32)
    for first in range(0, F, PART):
        f = first + tl.arange(0, PART)
        x = load_rows(phi_q, t, T, f, F)
        kernel += tl.dot(x, tl.trans(load_rows(phi_k, u, T, f, F)))
        mean += tl.dot(x, tl.load(states + at * F * D + f[:, None] * D + d[None, :]))
        mass += tl.sum(x.to(tl.float32) * tl.load(norms + at * F + f)[None, :], 1)
    kernel = tl.where(older, kernel, 0.0)
    mass += tl.sum(kernel, 1)
    mean += tl.dot(kernel.to(dtype), load_rows(v, u, T, d, D))
    rows = t < T
    outputs = mean / tl.where(mass == 0, 1.0, mass)[:, None]
    tl.store(y + t[:, None] * D + d[None, :], outputs.to(dtype), mask=rows[:, None])
    tl.store(top + t, tl.where(best == float("-inf"), 0.0, best), mask=rows)
    tl.store(place + t, where, mask=rows)
    tl.store(total + t, mass, mask=rows)


@triton.jit
def grad_queries(
    q, k, v, phi_q, phi_k, valid, seen, mix, states, norms, y, top, place, total, dy,
    dq, dphi_q, inverse, delta, share_grad, dk_sinks, dv_sinks, T, N, M, valid_row, seen_row, n_sinks, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, PART: tl.constexpr,
    SINKS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dphi_q (B, H, T, F); for each query, (B, H, T): 1 / Z, dy . y / Z and E. And with EXACT what the softmax says of
    dq (B, H, T, D), and of the sinks' keys and values, a block of queries at a time: (B, H, N, SINKS, D)."""
    n, row = tl.program_id(0) % N, (tl.program_id(0) // N).to(tl.int64)
    b, h = row // H, row % H
    dtype = q.dtype.element_ty
    group = key_head(row, H, G) * T * D
    k, v, valid, seen = k + group, v + group, valid + b * valid_row, seen + b * seen_row
    q, y, dy, dq = q + row * T * D, y + row * T * D, dy + row * T * D, dq + row * T * D
    phi_q, phi_k, dphi_q = phi_q + row * T * F, phi_k + row * T * F, dphi_q + row * T * F
    top, place, total = top + row * T, place + row * T, total + row * T
    inverse, delta, share_grad = inverse + row * T, delta + row * T, share_grad + row * T
    c, d = tl.arange(0, C), tl.arange(0, D)
    t = n * C + c
    rows = t < T
    queries, grads = load_rows(q, t, T, d, D), load_rows(dy, t, T, d, D)
    best, where, mass = load_each(top, t, T), load_each(place, t, T), load_each(total, t, T)
    inv = 1.0 / tl.where(mass == 0, 1.0, mass)
    inv = tl.where(rows, inv, 0.0)
    off = tl.sum(grads.to(tl.float32) * load_rows(y, t, T, d, D).to(tl.float32), 1) * inv
    tl.store(inverse + t, inv, mask=rows)
    share = tl.sigmoid(tl.load(mix + h).to(tl.float32))
    out, summed, near = tl.zeros((C, D), tl.float32), tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for m in range(tl.maximum(n - M, 0), n + 1):
        u = m * C + c
        sees = sees_exactly(u[None, :], t[:, None], M * C) & (load_each(valid, u, T) != 0)[None, :]
        keys, values = load_rows(k, u, T, d, D), load_rows(v, u, T, d, D)
        weights, change = exact_grads(
            queries, keys, grads, values, sees, best[:, None], inv[:, None], off[:, None], share, scale
        )
        summed += tl.sum(change, 1)
        near += tl.sum(weights, 1)
        if EXACT:
            out += tl.dot(change.to(dtype), keys)
    if SINKS > 0:
        s = tl.arange(0, SINKS)
        mask = (s < n_sinks)[None, :] & rows[:, None]
        sees = tl.load(seen + t[:, None] * n_sinks + s[None, :], mask=mask, other=0) != 0
        keys, values = load_rows(k, s, n_sinks, d, D), load_rows(v, s, n_sinks, d, D)
        weights, change = exact_grads(
            queries, keys, grads, values, sees, best[:, None], inv[:, None], off[:, None], share, scale
        )
        summed += tl.sum(change, 1)
        near += tl.sum(weights, 1)
        if EXACT:
            out += tl.dot(change.to(dtype), keys)
            change -= tl.where(sees & (where[:, None] == s[None, :]), summed[:, None], 0.0)
            at = (row * N + n) * SINKS * D + s[:, None] * D + d[None, :]
            tl.store(dk_sinks + at, tl.dot(tl.trans(change.to(dtype)), queries) * scale)
            tl.store(dv_sinks + at, tl.dot(tl.trans((weights * inv[:, None]).to(dtype)), grads))
    if EXACT:
        out -= summed[:, None] * load_rows(k, tl.where(rows, where, T), T, d, D).to(tl.float32)
        tl.store(dq + t[:, None] * D + d[None, :], (out * scale).to(dtype), mask=rows[:, None])
    u, at = (n - M) * C + c, row * N + tl.maximum(n - M, 0)
    older = u[None, :] <= t[:, None] - M * C
    slope = tl.dot(grads, tl.trans(load_rows(v, u, T, d, D))) * inv[:, None] - off[:, None]
    slope = tl.where(older, slope, 0.0).to(dtype)
    scaled, rest = (grads.to(tl.float32) * inv[:, None]).to(dtype), summed
    for first in range(0, F, PART):
        f = first + tl.arange(0, PART)
        state = tl.load(states + at * F * D + f[:, None] * D + d[None, :])
        part = tl.dot(slope, load_rows(phi_k, u, T, f, F)) + tl.dot(scaled, tl.trans(state))
        part -= off[:, None] * tl.load(norms + at * F + f)[None, :]
        rest += tl.sum(load_rows(phi_q, t, T, f, F).to(tl.float32) * part, 1)
        tl.store(dphi_q + t[:, None] * F + f[None, :], part.to(dtype), mask=rows[:, None])
    rest *= inv
    tl.store(delta + t, off + rest, mask=rows)
    tl.store(share_grad + t, summed - near * rest, mask=rows)


@triton.jit
def add_grads(
    phi, dy, inverse, delta, gone, states, norms, of_states, of_norms, gone_grads, T, N, M,
    D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, PART: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """What the queries of block n and of all behind it say of the state that block n reads: of_states (B, H, N, F, D),
    of_norms (B, H, N, F). Without gates these may take the place of the states and norms. phi: of the queries.
    gone_grads: (B, H, parts, N)"""
    row, f, p, has_norms = part_of_a_state(D, F, PART)
    phi, dy, inverse, delta = phi + row * T * F, dy + row * T * D, inverse + row * T, delta + row * T
    of_state = row * N * F * D + f[:, None] * D + p[None, :]
    states, of_states = states + of_state, of_states + of_state
    norms, of_norms, gone = norms + row * N * F + f, of_norms + row * N * F + f, gone + row * N
    gone_grads += tl.program_id(0).to(tl.int64) * N
    total, norm = tl.zeros((D, PART), tl.float32), tl.zeros((D,), tl.float32)
    for i in range(N):
        n = N - 1 - i
        if GATE:
            m = tl.maximum(n - M, 0)  # the block that enters the state behind what block n reads
            after = tl.minimum(m + 1, N - 1)
            change = tl.sum(total * tl.load(states + after * F * D).to(tl.float32))
            if has_norms:
                change += tl.sum(norm * tl.load(norms + after * F))
            tl.store(gone_grads + m, -change, mask=n >= M)
            left = tl.exp(-tl.load(gone + m))
            total, norm = total * left, norm * left
        t = n * C + tl.arange(0, C)
        x, grads = load_rows(phi, t, T, f, F), load_rows(dy, t, T, p, D)
        scaled = (grads.to(tl.float32) * load_each(inverse, t, T)[:, None]).to(grads.dtype)
        total += tl.dot(tl.trans(x), scaled)
        norm -= tl.sum(x.to(tl.float32) * load_each(delta, t, T)[:, None], 0)
        tl.store(of_states + n * F * D, total.to(of_states.dtype.element_ty))
        if has_norms:
            tl.store(of_norms + n * F, norm)


@triton.jit
def grad_keys(
    q, k, v, phi_q, phi_k, valid, gone, mix, states, norms, top, place, dy, inverse, delta, share_grad, dk, dv,
    dphi_k, T, N, M, valid_row, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, F: tl.constexpr, C: tl.constexpr, PART: tl.constexpr,
    GATE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dphi_k (B, H, T, F), and with EXACT what the softmax says of dk, and dv, (B, H, T, D) of each query head. states,
    norms: what add_grads found."""
    m, row = tl.program_id(0) % N, (tl.program_id(0) // N).to(tl.int64)
    b, h = row // H, row % H
    dtype = q.dtype.element_ty
    group = key_head(row, H, G) * T * D
    k, v, valid = k + group, v + group, valid + b * valid_row
    q, dy, dk, dv = q + row * T * D, dy + row * T * D, dk + row * T * D, dv + row * T * D
    phi_q, phi_k, dphi_k = phi_q + row * T * F, phi_k + row * T * F, dphi_k + row * T * F
    top, place, inverse = top + row * T, place + row * T, inverse + row * T
    delta, share_grad = delta + row * T, share_grad + row * T
    c, d = tl.arange(0, C), tl.arange(0, D)
    u = m * C + c
    rows, ok = u < T, load_each(valid, u, T) != 0
    keys, values = load_rows(k, u, T, d, D), load_rows(v, u, T, d, D)
    share = tl.sigmoid(tl.load(mix + h).to(tl.float32))
    key_grads, value_grads = tl.zeros((C, D), tl.float32), tl.zeros((C, D), tl.float32)
    if EXACT:
        for n in range(m, tl.minimum(m + M + 1, N)):  # weights are turned: a row is a key's
            t = n * C + c
            queries, grads = load_rows(q, t, T, d, D), load_rows(dy, t, T, d, D)
            best, where = load_each(top, t, T), load_each(place, t, T)
            inv, off, summed = load_each(inverse, t, T), load_each(delta, t, T), load_each(share_grad, t, T)
            sees = sees_exactly(u[:, None], t[None, :], M * C) & ok[:, None] & (t < T)[None, :]
            weights, change = exact_grads(
                keys, queries, values, grads, sees, best[None, :], inv[None, :], off[None, :], share, scale
            )
            change -= tl.where(sees & (u[:, None] == where[None, :]), summed[None, :], 0.0)
            key_grads += tl.dot(change.to(dtype), queries)
            value_grads += tl.dot((weights * inv[None, :]).to(dtype), grads)
        tl.store(dk + u[:, None] * D + d[None, :], (key_grads * scale).to(dtype), mask=rows[:, None])
    t = (m + M) * C + c
    grads = load_rows(dy, t, T, d, D)
    inv, off = load_each(inverse, t, T), load_each(delta, t, T)
    older = (u[:, None] <= t[None, :] - M * C) & ok[:, None] & (t < T)[None, :]
    slope = tl.dot(values, tl.trans(grads)) * inv[None, :] - off[None, :]
    slope = tl.where(older, slope, 0.0).to(dtype)
    states, norms = states + (row * N + m + M + 1) * F * D, norms + (row * N + m + M + 1) * F
    has_state, left = m + M + 1 < N, 1.0
    if GATE:
        left = tl.exp(-tl.load(gone + row * N + m))
    kernel = tl.zeros((C, C), tl.float32)
    for first in range(0, F, PART):
        f = first + tl.arange(0, PART)
        x, of_queries = load_rows(phi_k, u, T, f, F), load_rows(phi_q, t, T, f, F)
        kernel += tl.dot(x, tl.trans(of_queries))
        part = tl.dot(slope, of_queries)
        if has_state:
            state = tl.load(states + f[:, None] * D + d[None, :])
            part += left * (tl.dot(values, tl.trans(state)) + tl.load(norms + f)[None, :])
            if EXACT:
                value_grads += left * tl.dot(x, state)
        part = tl.where(ok[:, None], part, 0.0)
        tl.store(dphi_k + u[:, None] * F + f[None, :], part.to(dtype), mask=rows[:, None])
    if EXACT:
        kernel = tl.where(older, kernel * inv[None, :], 0.0)
        value_grads += tl.dot(kernel.to(dtype), grads)
        tl.store(dv + u[:, None] * D + d[None, :], value_grads.to(dtype), mask=rows[:, None])


def launch(kernel: Any, programs: int) -> Callable[..., None]:
    """Runs so many programs of a kernel, but none for tensors without numbers, whose memory is estimated."""

    def run(x: Tensor, *arguments: Any, **constants: Any) -> None:
        if not hasattr(x, "fake_mode"):
            kernel[(programs,)](x, *arguments, **constants)

    return run


class Features(torch.autograd.Function):
    """features(), with gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, relu: bool, valid: Tensor | None) -> Tensor:
        x, weight, (B, G, T, D), H = x.contiguous(), weight.contiguous(), x.shape, weight.size(0)
        phi, N = x.new_empty(B, H, T, 2 * D), triton.cdiv(T, FEATURE_BLOCK)
        told = phi if valid is None else valid.contiguous()
        launch(make_features, N * B * H)(
            x, weight, told, phi, T, N, row_of(told), H=H, G=G, D=D, C=FEATURE_BLOCK, RELU=relu,
            VALID=valid is not None, **LAUNCH,
        )  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.relu = relu
        return phi

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dphi: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (B, G, T, D), H = x.shape, weight.size(0)
        blocks = triton.cdiv(triton.cdiv(T, FEATURE_BLOCK), max(1, PROGRAMS // (B * H)))
        parts = triton.cdiv(T, blocks * FEATURE_BLOCK)
        of_x, of_weight = ctx.needs_input_grad[:2]
        dx = x.new_empty(B, H, T, D) if of_x else None
        dweight = x.new_empty(B, H, parts, D, D, dtype=torch.float32) if of_weight else None
        launch(grad_features, parts * B * H)(
            x, weight, dphi.contiguous(), dx if of_x else x, dweight if of_weight else x, T, blocks, parts,
            H=H, G=G, D=D, C=FEATURE_BLOCK, RELU=ctx.relu, OF_X=of_x, OF_WEIGHT=of_weight, **LAUNCH,
        )  # fmt: skip
        dx = of_key_heads(dx, G) if of_x else None
        return dx, dweight.sum(dim=(0, 2)).to(weight.dtype) if of_weight else None, None, None


class TextAttention(torch.autograd.Function):
    """attention(), with gradients. The states are summed again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, mix: Tensor, gone: Tensor | None,
        valid: Tensor, seen: Tensor, window: int, scale: float,
    ) -> Tensor:  # fmt: skip
        q, k, v, phi_q, phi_k = (x.contiguous() for x in (q, k, v, phi_q, phi_k))
        sizes = Sizes(q, k, phi_q, valid, seen, window)
        states, norms = sizes.states(phi_k, v, gone)
        y, (top, total) = torch.empty_like(q), (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
        place = q.new_empty(q.shape[:3], dtype=torch.int32)
        launch(read_queries, sizes.programs)(
            q, k, v, phi_q, phi_k, valid, seen, mix, states, norms, y, top, place, total, sizes.T, sizes.N, sizes.M,
            *sizes.rows, seen.size(-1), scale, **sizes.constants, SINKS=SINKS * (seen.size(-1) > 0), **LAUNCH,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, phi_q, phi_k, mix, gone, valid, seen, y, top, place, total)
        ctx.window, ctx.scale = window, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, phi_q, phi_k, mix, gone, valid, seen, y, top, place, total = ctx.saved_tensors
        sizes, n, dy = Sizes(q, k, phi_q, valid, seen, ctx.window), seen.size(-1), dy.contiguous()
        states, norms = sizes.states(phi_k, v, gone)
        exact = any(ctx.needs_input_grad[:3])  # else features alone learn: nothing else is computed
        dphi_q, dphi_k = torch.empty_like(phi_q), torch.empty_like(phi_k)
        dq, dk, dv = (torch.empty_like(q) if exact else dphi_q for _ in range(3))
        inverse, delta, share_grad = (torch.empty_like(total) for _ in range(3))
        of_sinks = q.new_empty(2, *q.shape[:2], sizes.N if n else 0, SINKS, q.size(3), dtype=torch.float32)
        launch(grad_queries, sizes.programs)(
            q, k, v, phi_q, phi_k, valid, seen, mix, states, norms, y, top, place, total, dy, dq, dphi_q, inverse,
            delta, share_grad, *of_sinks, sizes.T, sizes.N, sizes.M, *sizes.rows, n, ctx.scale, **sizes.constants,
            SINKS=SINKS * (n > 0), EXACT=exact, **LAUNCH,
        )  # fmt: skip
        dgone = None if gone is None else gone.new_zeros(*q.shape[:2], sizes.parts, sizes.N)
        before = (states, norms)
        if gone is not None:  # the gradients of gates read states, and Triton may read them after it writes
            states, norms = (torch.empty_like(x) for x in before)
        alike = {name: value for name, value in sizes.constants.items() if name not in ("H", "G")}
        launch(add_grads, sizes.heads * sizes.parts)(
            phi_q, dy, inverse, delta, norms if gone is None else gone, *before, states, norms,
            norms if gone is None else dgone, sizes.T, sizes.N, sizes.M, GATE=gone is not None, **alike, **SCAN,
        )  # fmt: skip
        launch(grad_keys, sizes.programs)(
            q, k, v, phi_q, phi_k, valid, norms if gone is None else gone, mix, states, norms, top, place, dy, inverse,
            delta, share_grad, dk, dv, dphi_k, sizes.T, sizes.N, sizes.M, sizes.rows[0], ctx.scale,
            GATE=gone is not None, EXACT=exact, **sizes.constants, **LAUNCH,
        )  # fmt: skip
        if exact:
            dk, dv = (of_key_heads(x, k.size(1)) for x in (dk, dv))
            for x, part in zip((dk, dv), of_sinks if n else (), strict=False):
                x[:, :, :n] += of_key_heads(part[..., :n, :].sum(2), k.size(1)).to(x.dtype)
        else:
            dq = dk = dv = None
        dmix = (share_grad.sum(dim=(0, 2)) * (1 - mix.float().sigmoid())).to(mix.dtype)
        return dq, dk, dv, dphi_q, dphi_k, dmix, None if gone is None else dgone.sum(2), None, None, None, None


class Sizes:
    """What the kernels are told of their tensors."""

    def __init__(self, q: Tensor, k: Tensor, phi_q: Tensor, valid: Tensor, seen: Tensor, window: int) -> None:
        (B, H, self.T, self.D), self.F = q.shape, phi_q.size(-1)
        C = block_size(window)
        self.heads, self.N, self.M = B * H, triton.cdiv(self.T, C), window // C
        self.rows = row_of(valid), row_of(seen)
        self.programs = self.N * self.heads  # in one dimension: a GPU's others end at 65,535
        self.constants = {"H": H, "G": k.size(1), "D": self.D, "F": self.F, "C": C, "PART": min(PART, self.D)}
        self.parts = self.F // self.constants["PART"]  # of a head's states

    def states(self, phi_k: Tensor, v: Tensor, gone: Tensor | None) -> tuple[Tensor, Tensor]:
        """The states before each block."""
        states = phi_k.new_empty(self.heads, self.N, self.F, self.D)
        norms = phi_k.new_empty(self.heads, self.N, self.F, dtype=torch.float32)
        launch(add_states, self.heads * self.parts)(
            phi_k, v, norms if gone is None else gone, states, norms, self.T, self.N, GATE=gone is not None,
            **self.constants, **SCAN,
        )  # fmt: skip
        return states, norms


def attention(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, mix: Tensor, gone: Tensor | None, valid: Tensor,
    seen: Tensor, window: int, scale: float,
) -> Tensor:  # fmt: skip
    """Linear attention of whole texts, with nothing before them: (B, H, T, D).

    q (B, H, T, D), k and v (B, G, T, D), after RoPE. phi_q, phi_k: features (B, H, T, F), of invalid keys zeros. mix:
    (H,). gone: for gates, as gated() gives it, with its features. valid: (1 or B, T), False for sinks, which are the
    first n tokens, and for padding. seen: (1 or B, T, n), also of sinks that a short text does not have yet. window: S.
    """
    valid, seen = valid.contiguous(), seen[..., : q.size(2)].contiguous()
    return TextAttention.apply(q, k, v, phi_q, phi_k, mix, gone, valid, seen, window, scale)


def gated(phi_q: Tensor, phi_k: Tensor, rates: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features that hold what gates leave within a block, and the sums of a_t over each block, (B, H, N).

    A key grows by exp of the sum of a_t from its block's first token up to it, and a query shrinks by that up to the
    newest key that is older to it, which has the same place in its block. rates: a_t of the tokens, (B, H, T).
    """
    T, C = rates.size(-1), block_size(window)
    passed = F.pad(rates, (0, -T % C)).unflatten(-1, (-1, C)).cumsum(-1)
    of_keys = passed.flatten(2)[..., :T, None]
    of_queries = F.pad(of_keys, (0, 0, window, 0))[:, :, :T]
    phi_q, phi_k = (as_one_kernel(faded, *pair) for pair in ((phi_q, -of_queries), (phi_k, of_keys)))
    return phi_q, phi_k, passed[..., -1].contiguous()


def faded(phi: Tensor, exponent: Tensor) -> Tensor:
    return (phi * exponent.exp()).to(phi.dtype)


def features(x: Tensor, weight: Tensor, relu: bool, valid: Tensor | None = None) -> Tensor:
    """phi (B, H, T, 2 D) of x (B, G, T, D), in its dtype, by weight (H, D, D): relu's, or hedgehog's. valid: (1 or B,
    T), which are keys behind the sinks; the others' are zeros, and are given no gradient."""
    return Features.apply(x, weight, relu, valid)


def row_of(x: Tensor) -> int:
    """Elements from one text of a batch to the next, 0 for one that all share."""
    return x.stride(0) if x.size(0) > 1 else 0


def of_key_heads(x: Tensor, G: int) -> Tensor:
    """The sums over the query heads of each of G key heads, of (B, H, ...)."""
    return x if x.size(1) == G else x.unflatten(1, (G, -1)).sum(2)


def block_size(window: int) -> int:
    return next(size for size in BLOCKS if window % size == 0)


def fits(q: Tensor, window: int, sinks: int) -> bool:
    """True if the kernels take such queries, and their GPU has the memory. Not in float16: states of long texts, and
    features that grow by gates up to e^64, are beyond what it holds."""
    B, H, T, D = q.shape
    if q.dtype == torch.float16 or window % BLOCKS[-1] or sinks > SINKS:
        return False
    if not 16 <= D <= MOST_HEAD_SIZE or D & (D - 1):
        return False
    N, device = triton.cdiv(T, block_size(window)), torch.cuda.get_device_properties(q.device)
    if 2 * D * max(T, D * N) >= 2**31:  # 32 bits count a head's features and states
        return False
    held = q.element_size() * B * H * 2 * D * (2 * T + D * N)  # bytes of the features and states of all heads
    shared = getattr(device, "shared_memory_per_block_optin", 0)
    return held <= device.total_memory // 8 and shared >= SHARED_MEMORY[D > 64]
