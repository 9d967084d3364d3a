"""A Triton kernel for one token of linear attention, as linear.py defines it: a program for a part of each query head's
values reads that part of the head's window, sinks and state once, and leaves the state as the next token finds it. The
last program of a key/value head moves the window on."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lit_swa.decode_kernels import early_launch, next_power
from lit_swa.linear import GATE_SCALE

MOST_ENTRIES = 128  # keys of a window, and those that can be taken back
MOST_HEAD_SIZE = 128
FEW_PROGRAMS = 264  # two for each multiprocessor of an H100


@triton.jit
def rotated(x, cos, sin, gain, D: tl.constexpr, N_ROPE: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, eps):
    """The head at x (D,), normed if NORM and rotated, in float32 with the dtype's rounding."""
    dtype = x.dtype.element_ty
    d = tl.arange(0, D)
    swapped = tl.where(d < N_ROPE, (d + N_ROPE // 2) % N_ROPE, d)
    v, u = tl.load(x + d).to(tl.float32), tl.load(x + swapped).to(tl.float32)
    if NORM:
        rms = tl.rsqrt(tl.sum(v * v, 0) / D + eps)
        v = (v * rms * (tl.load(gain + d).to(tl.float32) + OFFSET)).to(dtype).to(tl.float32)
        u = (u * rms * (tl.load(gain + swapped).to(tl.float32) + OFFSET)).to(dtype).to(tl.float32)
    c = tl.load(cos + d, mask=d < N_ROPE, other=1.0)
    s = tl.load(sin + d, mask=d < N_ROPE, other=0.0)
    return (v * c + u * s).to(dtype).to(tl.float32)


@triton.jit
def features(x, weight, RELU: tl.constexpr):
    """The two halves of phi(x) for x (D,) and the weight (D, D) of a head, (D,) each."""
    z = tl.sum(x[:, None] * weight.to(tl.float32), 0)
    if RELU:
        a, b = tl.maximum(z, 0.0), tl.maximum(-z, 0.0)
    else:
        a, b = tl.exp(z - tl.max(z, 0)), tl.exp(tl.min(z, 0) - z)
        a, b = a / tl.sum(a, 0), b / tl.sum(b, 0)
    return a, b


@triton.jit
def load_held(held, source, there, lag, n, WIDTH: tl.constexpr):
    """Elements n (N,) of each entry that the cache holds at `held` (lag, WIDTH): (entries, N)."""
    return tl.load(held + source[:, None] * WIDTH + n[None, :], mask=(there & (source < lag))[:, None], other=0.0)


@triton.jit
def with_own(x, own, source, lag):
    """Entries x (entries, N) with the token's own (N,) where it belongs."""
    return tl.where((source == lag)[:, None], own.to(x.dtype)[None, :], x)


@triton.jit
def capped(scores, cap, CAP: tl.constexpr):
    if CAP:
        scores = cap * (2.0 / (1.0 + tl.exp(-2.0 * scores / cap)) - 1.0)
    return scores


@triton.jit
def gate(v, weight, bias, scale):
    """What a gate takes away behind values v (entries, D) of a head whose weight is (D,): (entries,)."""
    rates = scale * (tl.sum(v.to(tl.float32) * weight.to(tl.float32)[None, :], 1) + bias.to(tl.float32))
    return tl.minimum(tl.maximum(rates, 0.0), 1.0)


@triton.jit
def linear_kernel(
    y, qkv, kv, sinks, state, norm, cos, sin, order, valid, kept, seen, own_sinks, feature_q, feature_k, mix,
    decay_weight, decay_bias, gate_scale, norm_q, norm_k, counts, lag, n_sinks, row_angle, scale, cap, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PART: tl.constexpr, N_ROPE: tl.constexpr, ENTRIES: tl.constexpr,
    SINKS: tl.constexpr, BEHIND: tl.constexpr, RELU: tl.constexpr, GATE: tl.constexpr, OFF: tl.constexpr,
    NORM: tl.constexpr, OFFSET: tl.constexpr, CAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """order, valid: (B, lag + 1), kept: (B,), seen, own_sinks: (B, n_sinks), as linear.py's Plan and Moves say. BEHIND:
    the newest entry that is older than the window. PART: so many of the values' D elements are a program's. counts: of
    the programs of each head that are done, (B * H,), and of the heads of each key/value head, (B * G,)."""
    R: tl.constexpr = H // G
    PARTS: tl.constexpr = D // PART
    WIDTH: tl.constexpr = 2 * D
    dtype = qkv.dtype.element_ty
    row, first = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS * PART
    b, h = (row // H).to(tl.int64), row % H
    g, E = h // R, lag + 1
    d, p, s = tl.arange(0, D), first + tl.arange(0, PART), tl.arange(0, SINKS)
    e = (BEHIND >= 0) + tl.arange(0, ENTRIES)  # an entry 0 that is older is read apart
    kv += (b * G + g) * lag * WIDTH
    sinks += (b * G + g) * n_sinks * WIDTH
    state += (b * H + h) * (2 * D * D) + d[:, None] * D + p[None, :]
    norm += (b * H + h) * (2 * D) + d
    square = h * (D * D) + d[:, None] * D + d[None, :]
    there = e < E
    source = tl.load(order + b * E + e, mask=there, other=0).to(tl.int32)
    known = there & (tl.load(valid + b * E + e, mask=there, other=0) != 0)
    k, v = load_held(kv, source, there, lag, d, WIDTH), load_held(kv + D, source, there, lag, p, WIDTH)
    if not OFF:  # the state does not wait for the token: the oldest entry that is held enters it
        weight_q, weight_k = tl.load(feature_q + square), tl.load(feature_k + square)
        goes_on = (tl.load(kept + b) != 0).to(tl.float32)
        plus_state, minus_state = tl.load(state) * goes_on, tl.load(state + D * D) * goes_on
        plus_norm, minus_norm = tl.load(norm) * goes_on, tl.load(norm + D) * goes_on
        oldest = tl.load(order + b * E).to(tl.int32)
        is_held = oldest < lag
        leaves = ((tl.load(valid + b * E) != 0) & is_held & (BEHIND >= 0)).to(tl.float32)
        k_0 = tl.load(kv + oldest * WIDTH + d, mask=is_held, other=0.0).to(tl.float32)
        v_0 = tl.load(kv + oldest * WIDTH + D + p, mask=is_held, other=0.0).to(tl.float32)
        plus_0, minus_0 = features(k_0, weight_k, RELU)
        plus_0, minus_0, gone_0 = plus_0 * leaves, minus_0 * leaves, 0.0
        if GATE:
            gate_w, gate_b = tl.load(decay_weight + h * D + d), tl.load(decay_bias + h)
            whole_0 = tl.load(kv + oldest * WIDTH + D + d, mask=is_held, other=0.0)
            gone_0 = leaves * tl.sum(gate(whole_0[None, :], gate_w, gate_b, gate_scale), 0)
        left = tl.exp(-gone_0)
        tl.store(state, plus_state * left + plus_0[:, None] * v_0[None, :])
        tl.store(state + D * D, minus_state * left + minus_0[:, None] * v_0[None, :])
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = qkv + b * ((H + 2 * G) * D)
    cos, sin = cos + b * row_angle, sin + b * row_angle
    q = rotated(token + h * D, cos, sin, norm_q, D, N_ROPE, NORM, OFFSET, eps)
    own_k = rotated(token + (H + g) * D, cos, sin, norm_k, D, N_ROPE, NORM, OFFSET, eps)
    at_v = token + (H + G + g) * D
    own_v = tl.load(at_v + p).to(tl.float32)
    k, v = with_own(k, own_k, source, lag), with_own(v, own_v, source, lag)
    # exact: the window, and the sinks
    scores = capped(tl.sum(k.to(tl.float32) * q[None, :], 1) * scale, cap, CAP)
    scores = tl.where(known & (e > BEHIND), scores, float("-inf"))
    is_sink = s < n_sinks
    sink_own = (tl.load(own_sinks + b * n_sinks + s, mask=is_sink, other=0) != 0)[:, None]
    sink_seen = tl.load(seen + b * n_sinks + s, mask=is_sink, other=0) != 0
    at_sinks = sinks + s[:, None] * WIDTH
    sink_k = tl.load(at_sinks + d[None, :], mask=is_sink[:, None], other=0.0).to(tl.float32)
    sink_v = tl.load(at_sinks + D + p[None, :], mask=is_sink[:, None], other=0.0).to(tl.float32)
    sink_k, sink_v = tl.where(sink_own, own_k[None, :], sink_k), tl.where(sink_own, own_v[None, :], sink_v)
    sink_scores = capped(tl.sum(sink_k * q[None, :], 1) * scale, cap, CAP)
    sink_scores = tl.where(sink_seen, sink_scores, float("-inf"))
    top = tl.maximum(tl.max(scores, 0), tl.max(sink_scores, 0))
    top = tl.where(top == float("-inf"), 0.0, top)
    share = tl.sigmoid(tl.load(mix + h).to(tl.float32))
    w, sink_w = share * tl.exp(scores - top), share * tl.exp(sink_scores - top)
    total = tl.sum(w, 0) + tl.sum(sink_w, 0)
    out = tl.sum(w[:, None] * v.to(tl.float32), 0) + tl.sum(sink_w[:, None] * sink_v, 0)
    if not OFF:
        older = known & (e <= BEHIND)
        fade, fade_0, fade_q = e * 0.0 + 1.0, 1.0, 1.0
        if GATE:
            whole = load_held(kv + D, source, there, lag, d, WIDTH)
            rates = gate(with_own(whole, tl.load(at_v + d), source, lag), gate_w, gate_b, gate_scale)
            rates = tl.where(older, rates, 0.0)
            gone = tl.sum(rates, 0)
            fade, fade_0, fade_q = tl.exp(tl.cumsum(rates, 0) - gone), tl.exp(-gone), tl.exp(-gone - gone_0)
        plus, minus = features(q, weight_q, RELU)
        for j in range(1, BEHIND + 1):  # those behind the window that can be taken back
            k_j = tl.sum(tl.where((e == j)[:, None], k, 0.0).to(tl.float32), 0)
            plus_j, minus_j = features(k_j, weight_k, RELU)
            w_j = tl.where((e == j) & older, tl.sum(plus * plus_j + minus * minus_j, 0) * fade, 0.0)
            out += tl.sum(w_j[:, None] * v.to(tl.float32), 0)
            total += tl.sum(w_j, 0)
        w_0 = tl.sum(plus * plus_0 + minus * minus_0, 0) * fade_0
        out += w_0 * v_0 + fade_q * tl.sum(plus[:, None] * plus_state + minus[:, None] * minus_state, 0)
        total += w_0 + fade_q * tl.sum(plus * plus_norm + minus * minus_norm, 0)
    tl.store(y + (b * H + h) * D + p, (out / tl.where(total == 0, 1.0, total)).to(dtype))
    tl.debug_barrier()
    if tl.atomic_add(counts + row, 1, sem="acq_rel") == PARTS - 1:  # the head's norm has been read by all
        tl.store(counts + row, 0)
        if not OFF:
            tl.store(norm, plus_norm * left + plus_0)
            tl.store(norm + D, minus_norm * left + minus_0)
        done = counts + tl.num_programs(0) // PARTS + b * G + g
        if tl.atomic_add(done, 1, sem="acq_rel") == R - 1:  # the window and the sinks have been read by all
            tl.store(done, 0)
            after, to = (there & (e > 0))[:, None], kv + (e - 1)[:, None] * WIDTH + d[None, :]
            whole_own = tl.load(at_v + d)
            whole_v = with_own(load_held(kv + D, source, there, lag, d, WIDTH), whole_own, source, lag)
            tl.debug_barrier()
            tl.store(to, k, mask=after)
            tl.store(to + D, whole_v, mask=after)
            new, to_sinks = sink_own & is_sink[:, None], at_sinks + d[None, :]
            tl.store(to_sinks, sink_k.to(k.dtype), mask=new)
            tl.store(to_sinks + D, tl.broadcast_to(whole_own.to(k.dtype)[None, :], SINKS, D), mask=new)


def linear_step(
    qkv: Tensor, mixer: Any, cache: Any, plan: Any, counts: Tensor, heads: tuple[int, int], norms: tuple | None
) -> Tensor:
    """LinearAttention for one token of each sequence: qkv (B, 1, (H + 2 G) * D) -> (B, 1, H * D).

    plan: linear.py's, for a call with the cache that nobody looked at. counts: zeros (B * (H + G),), int32. norms: as
    in decode_kernels.attention.
    """
    (B, _, _), (H, G), config, D = qkv.shape, heads, mixer.config, cache.state.size(-1)
    lag, n, (cos, sin) = plan.lag, plan.seen.size(-1), plan.angles
    y = torch.empty(B, 1, H * D, dtype=qkv.dtype, device=qkv.device)
    gain_q, gain_k, eps, offset = norms or (qkv, qkv, 0.0, 0.0)
    gate = (mixer.decay_weight, mixer.decay_bias) if config.linear_gate else (mixer.mix, mixer.mix)
    cap, scale = config.attention_logit_softcapping, (config.attention_scores_scalar or config.head_size) ** -0.5
    own, _ = plan.moves.own_sinks
    parts = 4 if 4 * B * H <= FEW_PROGRAMS else 2
    linear_kernel[(B * H * parts,)](
        y, qkv, cache.kv, cache.sinks, cache.state, cache.norm, cos, sin, plan.moves.order, plan.valid,
        plan.moves.kept, plan.seen.expand(B, -1, -1).contiguous(), own.contiguous(), mixer.feature_q, mixer.feature_k,
        mixer.mix, *gate, GATE_SCALE, gain_q, gain_k, counts, lag, n, cos.stride(0) if cos.size(0) > 1 else 0,
        scale, cap or 0.0, eps, H=H, G=G, D=D, PART=D // parts, N_ROPE=cos.size(-1),
        ENTRIES=next_power(lag + (lag < plan.window)), SINKS=next_power(max(1, n)), BEHIND=lag - plan.window,
        RELU=config.linear_feature_map == "relu", GATE=config.linear_gate, OFF=config.linear_off,
        NORM=norms is not None, OFFSET=offset, CAP=cap is not None, num_warps=8, **early_launch(qkv.device),
    )  # fmt: skip
    return y


def fits(cache: Any, tokens: int) -> bool:
    """True if the kernel takes calls of so many tokens with a layer's cache."""
    D, lag = cache.state.size(-1), cache.kv.size(2)
    return tokens == 1 and D <= MOST_HEAD_SIZE and math.log2(D).is_integer() and lag <= MOST_ENTRIES
