"""A Triton kernel for one token of linear attention, as linear.py defines it: a program for each query head reads the
head's window, sinks and state once, and leaves the state as the next token finds it. The last program of a key/value
head moves the window on."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lit_swa.decode_kernels import early_launch, next_power

MOST_ENTRIES = 256  # keys of a window, the token's own and those that can be taken back included
MOST_HEAD_SIZE = 128


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
def features(x, weight, D: tl.constexpr, RELU: tl.constexpr):
    """The two halves of phi(x) for x (D,) and the weight (D, D) of a head, (D,) each."""
    d = tl.arange(0, D)
    z = tl.sum(x[:, None] * tl.load(weight + d[:, None] * D + d[None, :]).to(tl.float32), 0)
    if RELU:
        a, b = tl.maximum(z, 0.0), tl.maximum(-z, 0.0)
    else:
        a, b = tl.exp(z - tl.max(z, 0)), tl.exp(tl.min(z, 0) - z)
        a, b = a / tl.sum(a, 0), b / tl.sum(b, 0)
    return a, b


@triton.jit
def load_entries(held, own, source, there, lag, D: tl.constexpr):
    """Of each entry, what is at `held` (lag, 2 D) in its row, or the token's own (D,): (entries, D)."""
    d = tl.arange(0, D)
    x = tl.load(held + source[:, None] * (2 * D) + d[None, :], mask=(there & (source < lag))[:, None], other=0.0)
    return tl.where((source == lag)[:, None], own.to(x.dtype)[None, :], x)


@triton.jit
def half_state(
    y, total, phi_q, phi_k, v, state, norm, d, kept, left, D: tl.constexpr,
):  # fmt: skip
    """Read and move on half of a head's state (D, D) and norm (D,): adds what the query finds to y (D,) and total."""
    at = state + d[:, None] * D + d[None, :]
    s, m = tl.load(at) * kept, tl.load(norm + d) * kept
    y += tl.sum(phi_q[:, None] * s, 0)
    total += tl.sum(phi_q * m, 0)
    tl.store(at, s * left + phi_k[:, None] * v[None, :])
    tl.store(norm + d, m * left + phi_k)
    return y, total


@triton.jit
def linear_kernel(
    y, qkv, kv, sinks, state, norm, cos, sin, order, valid, kept, seen, own_sinks, feature_q, feature_k, mix,
    gate_weight, gate_bias, norm_q, norm_k, counts, lag, n_sinks, row_angle, scale, cap, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, N_ROPE: tl.constexpr, ENTRIES: tl.constexpr, SINKS: tl.constexpr,
    BEHIND: tl.constexpr, RELU: tl.constexpr, GATE: tl.constexpr, OFF: tl.constexpr, NORM: tl.constexpr,
    OFFSET: tl.constexpr, CAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """order, valid: (B, lag + 1), kept: (B,), seen, own_sinks: (B, n_sinks), as linear.py's Plan and Moves say. BEHIND:
    the newest entry that is older than the window."""
    R: tl.constexpr = H // G
    dtype = qkv.dtype.element_ty
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    g, E = h // R, lag + 1
    d, e, s = tl.arange(0, D), tl.arange(0, ENTRIES), tl.arange(0, SINKS)
    kv += (b * G + g) * lag * (2 * D)
    sinks += (b * G + g) * n_sinks * (2 * D)
    state += (b * H + h) * (2 * D * D)
    norm += (b * H + h) * (2 * D)
    there = e < E
    source = tl.load(order + b * E + e, mask=there, other=0).to(tl.int32)
    known = tl.load(valid + b * E + e, mask=there, other=0) != 0
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = qkv + b * ((H + 2 * G) * D)
    cos, sin = cos + b * row_angle, sin + b * row_angle
    q = rotated(token + h * D, cos, sin, norm_q, D, N_ROPE, NORM, OFFSET, eps)
    own_k = rotated(token + (H + g) * D, cos, sin, norm_k, D, N_ROPE, NORM, OFFSET, eps)
    own_v = tl.load(token + (H + G + g) * D + d).to(tl.float32)
    k = load_entries(kv, own_k, source, there, lag, D)
    v = load_entries(kv + D, own_v, source, there, lag, D)
    # exact: the window, and the sinks
    exact = there & known & (e > BEHIND)
    scores = tl.sum(k.to(tl.float32) * q[None, :], 1) * scale
    if CAP:
        scores = cap * (2.0 / (1.0 + tl.exp(-2.0 * scores / cap)) - 1.0)
    scores = tl.where(exact, scores, float("-inf"))
    top = tl.max(scores, 0)
    sink_own = tl.load(own_sinks + b * n_sinks + s, mask=s < n_sinks, other=0) != 0
    sink_seen = tl.load(seen + b * n_sinks + s, mask=s < n_sinks, other=0) != 0
    at_sinks, is_sink = sinks + s[:, None] * (2 * D) + d[None, :], (s < n_sinks)[:, None]
    sink_k = tl.where(sink_own[:, None], own_k[None, :], tl.load(at_sinks, mask=is_sink, other=0.0).to(tl.float32))
    sink_v = tl.where(sink_own[:, None], own_v[None, :], tl.load(at_sinks + D, mask=is_sink, other=0.0).to(tl.float32))
    sink_scores = tl.sum(sink_k * q[None, :], 1) * scale
    if CAP:
        sink_scores = cap * (2.0 / (1.0 + tl.exp(-2.0 * sink_scores / cap)) - 1.0)
    sink_scores = tl.where(sink_seen, sink_scores, float("-inf"))
    top = tl.maximum(top, tl.max(sink_scores, 0))
    top = tl.where(top == float("-inf"), 0.0, top)
    share = tl.sigmoid(tl.load(mix + h).to(tl.float32))
    w, sink_w = share * tl.exp(scores - top), share * tl.exp(sink_scores - top)
    total = tl.sum(w, 0) + tl.sum(sink_w, 0)
    out = tl.sum(w[:, None] * v.to(tl.float32), 0) + tl.sum(sink_w[:, None] * sink_v, 0)
    if not OFF:
        older = there & known & (e <= BEHIND)
        fade, passed, left = e * 0.0 + 1.0, e * 0.0, 1.0
        fade_q = 1.0
        if GATE:
            rates = tl.sum(v.to(tl.float32) * tl.load(gate_weight + h * D + d).to(tl.float32)[None, :], 1)
            rates = tl.minimum(tl.maximum(rates + tl.load(gate_bias + h).to(tl.float32), 0.0), 1.0)
            rates = tl.where(older, rates, 0.0)
            passed = tl.cumsum(rates, 0)
            gone = tl.sum(rates, 0)
            fade, fade_q = tl.exp(passed - gone), tl.exp(-gone)
            left = tl.exp(-tl.sum(tl.where(e == 0, rates, 0.0), 0))
        plus, minus = features(q, feature_q + h * (D * D), D, RELU)
        for j in range(1, BEHIND + 1):  # those behind the window that can be taken back
            k_j = tl.sum(tl.where((e == j)[:, None], k, 0.0).to(tl.float32), 0)
            a, b_ = features(k_j, feature_k + h * (D * D), D, RELU)
            w_j = tl.where((e == j) & older, (tl.sum(plus * a, 0) + tl.sum(minus * b_, 0)) * fade, 0.0)
            out += tl.sum(w_j[:, None] * v.to(tl.float32), 0)
            total += tl.sum(w_j, 0)
        leaves = tl.sum(tl.where((e == 0) & older, 1.0, 0.0), 0)  # the oldest entry enters the state
        k_0 = tl.sum(tl.where((e == 0)[:, None], k, 0.0).to(tl.float32), 0)
        v_0 = tl.sum(tl.where((e == 0)[:, None], v, 0.0).to(tl.float32), 0)
        a, b_ = features(k_0, feature_k + h * (D * D), D, RELU)
        a, b_ = a * leaves, b_ * leaves
        w_0 = (tl.sum(plus * a, 0) + tl.sum(minus * b_, 0)) * tl.sum(tl.where(e == 0, fade, 0.0), 0)
        out += w_0 * v_0
        total += w_0
        goes_on = (tl.load(kept + b) != 0).to(tl.float32)
        out, total = half_state(out, total, plus * fade_q, a, v_0, state, norm, d, goes_on, left, D)
        out, total = half_state(
            out, total, minus * fade_q, b_, v_0, state + D * D, norm + D, d, goes_on, left, D
        )  # fmt: skip
    tl.store(y + (b * H + h) * D + d, (out / tl.where(total == 0, 1.0, total)).to(dtype))
    tl.debug_barrier()
    if tl.atomic_add(counts + b * G + g, 1, sem="acq_rel") == R - 1:  # all heads have read the window
        tl.store(counts + b * G + g, 0)
        after = (there & (e > 0))[:, None]
        to = kv + (e - 1)[:, None] * (2 * D) + d[None, :]
        tl.store(to, k, mask=after)
        tl.store(to + D, v, mask=after)
        new = sink_own[:, None] & is_sink
        tl.store(at_sinks, sink_k.to(kv.dtype.element_ty), mask=new)
        tl.store(at_sinks + D, sink_v.to(kv.dtype.element_ty), mask=new)


def linear_step(
    qkv: Tensor, mixer: Any, cache: Any, plan: Any, counts: Tensor, heads: tuple[int, int], norms: tuple | None
) -> Tensor:
    """LinearAttention for one token of each sequence: qkv (B, 1, (H + 2 G) * D) -> (B, 1, H * D).

    plan: linear.py's, for a call with the cache that nobody looked at. counts: zeros (B * G,), int32. norms: as in
    decode_kernels.attention.
    """
    (B, _, _), (H, G), config, D = qkv.shape, heads, mixer.config, cache.state.size(-1)
    lag, n, (cos, sin) = plan.lag, plan.seen.size(-1), plan.angles
    y = torch.empty(B, 1, H * D, dtype=qkv.dtype, device=qkv.device)
    gain_q, gain_k, eps, offset = norms or (qkv, qkv, 0.0, 0.0)
    gate = (mixer.gate_weight, mixer.gate_bias) if config.linear_gate else (mixer.mix, mixer.mix)
    cap, scale = config.attention_logit_softcapping, (config.attention_scores_scalar or config.head_size) ** -0.5
    own, _ = plan.moves.own_sinks
    entries = next_power(lag + 1)
    linear_kernel[(B * H,)](
        y, qkv, cache.kv, cache.sinks, cache.state, cache.norm, cos, sin, plan.moves.order, plan.valid,
        plan.moves.kept, plan.seen.expand(B, -1, -1).contiguous(), own.contiguous(), mixer.feature_q, mixer.feature_k,
        mixer.mix, *gate, gain_q, gain_k, counts, lag, n, cos.stride(0) if cos.size(0) > 1 else 0,
        scale, cap or 0.0, eps, H=H, G=G, D=D, N_ROPE=cos.size(-1), ENTRIES=entries, SINKS=next_power(max(1, n)),
        BEHIND=lag - plan.window, RELU=config.linear_feature_map == "relu", GATE=config.linear_gate,
        OFF=config.linear_off, NORM=norms is not None, OFFSET=offset, CAP=cap is not None,
        num_warps=8 if entries <= 128 else 16, **early_launch(qkv.device),
    )  # fmt: skip
    return y


def fits(cache: Any, tokens: int) -> bool:
    """True if the kernel takes calls of so many tokens with a layer's cache."""
    D, lag = cache.state.size(-1), cache.kv.size(2)
    return tokens == 1 and D <= MOST_HEAD_SIZE and math.log2(D).is_integer() and lag < MOST_ENTRIES
