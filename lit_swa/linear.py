"""Learned linear attention beside an exact window (LoLCATs, Zhang et al. 2024, arXiv 2410.10254): constant memory.

Of the keys up to its own, a query meets the S nearest and the first n (sinks) by softmax, and all older ones by a
kernel of learned features, which are summed in a state and need not be kept. For query i of a head, after RoPE, with
s_ij the scaled product of q_i and k_j, c_i the greatest s_ij of the exact keys, and g = sigmoid(mix):

    w_ij = g exp(s_ij - c_i)            exact: one of the S nearest, or a sink
    w_ij = d_ij phi(q_i) . phi(k_j)     older
    y_i  = sum of w_ij v_j / sum of w_ij

    phi(x) = [softmax(x W), softmax(-x W)]   hedgehog (Zhang et al. 2024, arXiv 2402.04347), or relu for softmax
    d_ij = exp(-sum of a_t over the older keys t behind j) with linear_gate, else 1
    a_t  = clamp((v_t . u + b) / 100, 0, 1)

Where no key is older, this is softmax attention. The window counts tokens: where a text leaves positions out, it is the
S nearest tokens that there are. linear_off leaves the older keys out.

How it is computed: a call of T tokens reads E = lag + T entries, in order and valid or not: the `lag` keys before it
and its own, query i's at lag + i. What came before them is in the state, the sums of d_j phi(k_j) v_j^T and of
d_j phi(k_j). Queries are cut into N chunks of C, which read the state before the chunk and C + lag entries; the first C
of these then enter the state. A step is a chunk of one. So any split of a text gives the same numbers, and the most
that is made is T * (C + lag) weights and N states. Shapes as in model.py, and F = 2 D features.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if __package__:
    from .config import VARIANTS, Config, Variant, check_linear
    from .model import Mixer, softcap
    from .rope import RoPE, Span, apply_rope, join_angles
else:  # copied beside a script of another project
    from config import VARIANTS, Config, Variant, check_linear
    from model import Mixer, softcap
    from rope import RoPE, Span, apply_rope, join_angles

CHUNKS = 128, 256  # queries of a chunk: as many as a window has keys, of these
PIECE_ELEMENTS = 2**23, 2**29  # weights and states of a piece of text, if more than a chunk: on a CPU, on a GPU
NEW_MIX = math.log(0.1 / 0.9)  # g = 0.1 in a new layer
GATE_SCALE = 0.01  # of u and b: a text is long, and what moves a feature a little would else forget most of it

State = tuple[Tensor, Tensor]  # (B, H, F, D) and (B, H, F), float32: sums over keys, with and without their values


class Moves(NamedTuple):
    """What a call does with a cache."""

    order: Tensor | None  # (B, E): where each entry is among the keys held and the call's own behind them; None: there
    queries: Tensor | None  # (B, T): where each of the call's tokens is, so that it keeps beside its entry; None: there
    kept: Tensor | None  # (B, 1): False where the sequence begins anew; None: nowhere
    own_sinks: tuple[Tensor, Tensor]  # (B, n) each: which sinks are the call's own, and which of its tokens they are


class Plan(NamedTuple):
    """How the layers of a kind treat a call."""

    angles: tuple[Tensor, Tensor]  # cos and sin, (1 or B, 1, T, rope_n_elem)
    window: int = 0  # S
    lag: int = 0
    valid: Tensor | None = None  # (1 or B, E): which entries are keys behind the sinks
    seen: Tensor | None = None  # (1 or B, T, n): which query sees which sink
    moves: Moves | None = None
    whole: bool = False  # each row is a text from its beginning, and its state needs no gradient
    texts: "list[tuple[int, Plan]]" = []  # lengths and plans of texts in a sequence; empty: one text


class LinearAttention(Mixer):
    """The mixer of attention="linear".

    near: S. It may be set lower for some steps of training, down to 0, so that the features learn the window's work
    too: hybrids may else learn to do without them (arXiv 2510.05901).
    """

    rolls = any_length = True

    def __init__(self, config: Config, variant: str, layer: int = 0) -> None:
        super().__init__(config, variant, layer)
        H, D = config.n_head, config.head_size
        self.near = config.linear_window
        self.feature_q, self.feature_k = (nn.Parameter(torch.empty(H, D, D)) for _ in range(2))  # W
        self.mix = nn.Parameter(torch.empty(H))
        if config.linear_gate:
            self.decay_weight, self.decay_bias = nn.Parameter(torch.empty(H, D)), nn.Parameter(torch.empty(H))  # u, b
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """W is the identity, g is 0.1, and the gate keeps everything."""
        for weight in (self.feature_q, self.feature_k):
            weight.copy_(torch.eye(weight.size(-1), device=weight.device))
        self.mix.fill_(NEW_MIX)
        if self.config.linear_gate:
            self.decay_weight.zero_()
            self.decay_bias.zero_()

    def cache_length(self, tokens: int) -> int:
        n = self.config.linear_sinks
        return n + min(max(1, self.config.linear_window), max(1, tokens - n))

    def new_cache(self, batch: int, length: int, lookahead: int, heads: Any, beside: Any = None, **place: Any) -> Any:
        recent = Recent(self.config, batch, length, lookahead, place["device"]) if beside is None else beside.recent
        return StateCache(recent, self.config, heads, **place)

    # planning

    def plan(self, pos: Tensor, span: Span, cache: "StateCache | None", rope: RoPE) -> Plan:
        n, T = self.config.linear_sinks, pos.size(1)
        if cache is not None:
            valid, sink_pos, moves = cache.recent.admit(pos, self.near, span.looked)
            pos_of = pos if moves.queries is None else pos.expand(moves.queries.shape).gather(1, moves.queries)
        else:
            valid, sink_pos, moves, pos_of = F.pad(pos >= n, (max(1, min(self.near, T)), 0)), pos[:, :n], None, pos
        seen = (sink_pos[:, None] >= 0) & (sink_pos[:, None] <= pos_of[:, :, None])
        in_order = cache is not None and span.fresh and moves.order is None and moves.queries is None
        whole = cache is None or (in_order and not torch.is_grad_enabled())
        return Plan(rope(pos, self.rope_base), self.near, valid.size(1) - T, valid, seen, moves, whole)

    def join(self, texts: list[tuple[int, Plan]]) -> Plan:
        return Plan(join_angles([plan.angles for _, plan in texts]), texts=texts)

    # mixing

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, cache: "StateCache | None") -> Tensor:
        if plan.texts:
            return self.read_texts(q, k, v, plan.texts)
        if kernels := text_kernels(q, plan, self.config):
            return self.read_by(kernels, q, k, v, plan, cache)
        q, k = (apply_rope(x, *plan.angles) for x in (q, k))
        kv = torch.cat([k, v], dim=-1)
        if cache is None:
            sinks, entries, state = kv[:, :, : plan.seen.size(-1)], F.pad(kv, (0, 0, plan.lag, 0)), empty_state(q)
            return self.attend(self.tokens(q, sinks, entries, plan), state, plan)[0].to(v.dtype)
        (sinks, entries, state), order = cache.exchange(kv, plan.moves), plan.moves.queries
        q = q if order is None else along_tokens(q, order)
        y, state = self.attend(self.tokens(q, sinks, entries, plan), state, plan)
        cache.keep(state)
        return (y if order is None else along_tokens(y, order.argsort(dim=1))).to(v.dtype)

    def read_texts(self, q: Tensor, k: Tensor, v: Tensor, texts: list[tuple[int, Plan]]) -> Tensor:
        """forward() for texts one behind the other. Those whose lengths lie between the same powers of two are read
        side by side, as long as the longest: what is behind a text's end, nothing in it sees."""
        lengths, groups = [n for n, _ in texts], {}
        parts, outputs = [x.split(lengths, dim=2) for x in (q, k, v)], list(lengths)
        for i, n in enumerate(lengths):
            groups.setdefault((n - 1).bit_length(), []).append(i)
        for group in groups.values():
            longest, plan = max((texts[i] for i in group), key=lambda text: text[0])
            rows = (torch.cat([F.pad(x[i], (0, 0, 0, longest - lengths[i])) for i in group]) for x in parts)
            for i, y in zip(group, self.forward(*rows, plan, None).split(q.size(0)), strict=True):
                outputs[i] = y[:, :, : lengths[i]]
        return torch.cat(outputs, dim=2)

    def read_by(self, kernels: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, cache: "StateCache | None") -> Tensor:
        """forward() for whole texts, by linear_text_kernels.py."""
        from .fast_attention import rotate

        q, k, v = (x.contiguous() for x in (*(rotate(x, *plan.angles) for x in (q, k)), v))  # once for all kernels
        valid, gone = plan.valid[:, plan.lag :], None
        if self.config.linear_off:
            phi_q = phi_k = q.new_zeros(*q.shape[:3], 2 * q.size(3))
            rates = None
        else:
            relu = self.config.linear_feature_map == "relu"
            phi_q, phi_k = kernels.features(q, self.feature_q, relu), kernels.features(k, self.feature_k, relu, valid)
            rates = self.rates(v, q.dtype, valid) if self.config.linear_gate else None
        if cache is not None:
            cache.exchange(torch.cat([k, v], dim=-1), plan.moves)
            cache.keep(state_of(*(x[:, :, : max(0, q.size(2) - plan.lag)] for x in (phi_k, v)), valid, rates))
        if rates is not None:
            phi_q, phi_k, gone = kernels.gated(phi_q, phi_k, rates, plan.window)
        scale = (self.config.attention_scores_scalar or self.config.head_size) ** -0.5
        return kernels.attention(q, k, v, phi_q, phi_k, self.mix, gone, valid, plan.seen, plan.window, scale)

    def attention_weights(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        """w_ij / sum of w_ij, (B, H, T, T), of a short text without a cache: what is made of unit vectors as values.
        v: the gate reads it."""
        q, kv = apply_rope(q, *plan.angles), torch.cat([apply_rope(k, *plan.angles), v], dim=-1)
        x = self.tokens(q, kv[:, :, : plan.seen.size(-1)], F.pad(kv, (0, 0, plan.lag, 0)), plan)
        units = torch.eye(q.size(2), dtype=q.dtype, device=q.device).expand(*q.shape[:3], -1)
        x = x._replace(v=F.pad(units, (0, 0, plan.lag, 0)), sink_v=units[:, :, : x.sink_v.size(2)])
        return self.attend(x, empty_state(q, q.size(2)), plan)[0]

    def tokens(self, q: Tensor, sinks: Tensor, entries: Tensor, plan: Plan) -> "Tokens":
        """What is mixed, of queries (B, H, T, D), and keys and values (B, G, ..., 2 D)."""
        (sink_k, sink_v), (k, v), rates = sinks.chunk(2, dim=-1), entries.chunk(2, dim=-1), None
        if self.config.linear_gate:
            rates = self.rates(v, q.dtype, plan.valid)
        return Tokens(q, k, v, rates, plan.valid, plan.seen, sink_k, sink_v)

    def rates(self, v: Tensor, dtype: torch.dtype, valid: Tensor) -> Tensor:
        """a_t of entries with values (B, G, E, D), (B, H, E)"""
        (u, b), v = (widened(x, dtype) for x in (self.decay_weight, self.decay_bias)), widened(v, dtype)
        rates = v @ u.unflatten(0, (v.size(1), -1)).mT  # (B, G, E, R)
        return (GATE_SCALE * (rates.mT.flatten(1, 2) + b[:, None])).clamp(0, 1) * valid[:, None]

    def attend(self, x: "Tokens", state: State, plan: Plan) -> tuple[Tensor, State]:
        """Outputs (B, H, T, D), and the state behind the call. A long text is read in pieces, in order; in training,
        what they make on the way is made again in the backward."""
        (B, H, T, D), outputs = x.q.shape, []
        C = next((c for c in CHUNKS if c >= plan.window), CHUNKS[-1])
        most = PIECE_ELEMENTS[x.q.device.type == "cuda"]
        size = C * max(1, most // (B * H * (C * (C + plan.lag) + 4 * D * D)))  # a chunk's weights, and two states
        cuts = [*range(0, T - T % C, size), *([T - T % C] if T % C else []), T]
        again = functools.partial(checkpoint, self.attend_chunks, use_reentrant=False, preserve_rng_state=False)
        run = again if len(cuts) > 3 and torch.is_grad_enabled() else self.attend_chunks
        for a, b in itertools.pairwise(cuts):
            y, *state = run(min(C, b - a), plan.lag - plan.window, *state, *x.cut(a, b))
            outputs.append(y)
        return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0], tuple(state)

    def attend_chunks(self, C: int, behind: int, total: Tensor, norm: Tensor, *tokens: Tensor | None) -> tuple:
        """attend() for N chunks of C queries: the outputs and both parts of the state. Each tensor is an argument of
        its own: where a whole block computes again too, only such are given up in between.

        behind: the newest older entry of a chunk's query c is behind + c. total, norm: the state. tokens: Tokens.
        """
        x, state = Tokens(*tokens), (total, norm)
        (_, H, T, _), lag, device = x.q.shape, x.k.size(2) - x.q.size(2), x.q.device
        q, k, v, sink_k, sink_v = (widened(t, x.q.dtype, H) for t in (x.q, x.k, x.v, x.sink_k, x.sink_v))
        N, width, old = T // C, C + lag, C + max(0, behind)  # entries that a chunk reads; that some queries call older
        query, entry = torch.arange(C, device=device)[:, None], torch.arange(width, device=device)
        older = entry <= query + behind  # (C, width)
        exact = ~older & (entry <= query + lag) & x.valid.unfold(1, width, C)[:, :, None]  # (1 or B, N, C, width)
        q, values = q.unflatten(2, (N, C)), strips(v, width, C)  # (B, H, N, C, D), (B, H, N, width, D)
        if x.seen.size(-1):
            exact = torch.cat([exact, x.seen.unflatten(1, (N, C))], dim=-1)  # the sinks are behind the entries
            values = torch.cat([values, sink_v[:, :, None].expand(-1, -1, N, -1, -1)], dim=-2)
        weights = self.exact_weights(q, strips(k, width, C), sink_k, exact)
        if self.config.linear_off:
            return normalised(weights @ values, weights.sum(-1)), *state
        read = T + old - C
        phi_q = features(q.flatten(2, 3), self.feature_q, self.config)  # (B, H, T, F)
        phi_k = features(k[:, :, :read], self.feature_k, self.config) * x.valid[:, None, :read, None]
        phi_q, phi_k = phi_q.unflatten(2, (N, C)), strips(phi_k, old, C)  # (B, H, N, C, F), (B, H, N, old, F)
        kernel, left = phi_q @ phi_k.mT, None
        if x.rates is not None:
            fade, fade_q, fade_k, left = fading(strips(x.rates[:, :, :read], old, C), C, behind)
            kernel, phi_q, phi_k = kernel * fade, phi_q * fade_q, phi_k * fade_k
        kernel = kernel.masked_fill(~older[:, :old], 0)
        weights = weights + F.pad(kernel, (0, weights.size(-1) - old))
        before, norms, state = run_states(phi_k[..., :C, :], v[:, :, :T].unflatten(2, (N, C)), left, state)
        y = weights @ values + phi_q @ before  # (B, H, N, C, D)
        return normalised(y, weights.sum(-1) + (phi_q @ norms[..., None]).squeeze(-1)), *state

    def exact_weights(self, q: Tensor, k: Tensor, sink_k: Tensor, exact: Tensor) -> Tensor:
        """g exp(s_ij - c_i) where exact (1 or B, N, C, width + n) says so, else 0: (B, H, N, C, width + n)."""
        cap, scale = self.config.attention_logit_softcapping, self.config.attention_scores_scalar
        scores = q @ k.mT
        if sink_k.size(2):
            scores = torch.cat([scores, q @ sink_k[:, :, None].mT], dim=-1)
        scores = scores * (scale or self.config.head_size) ** -0.5
        scores = (scores if cap is None else softcap(scores, cap)).masked_fill(~exact[:, None], -math.inf)
        top = scores.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)  # finite if nothing is exact
        return self.mix.to(q.dtype).sigmoid()[:, None, None, None] * (scores - top).exp()


class Tokens(NamedTuple):
    """Queries, keys and values of a call."""

    q: Tensor  # (B, H, T, D)
    k: Tensor  # (B, G, E, D)
    v: Tensor  # (B, G, E, D)
    rates: Tensor | None  # (B, H, E): a_t of each entry; None: nothing fades
    valid: Tensor  # as in Plan
    seen: Tensor
    sink_k: Tensor  # (B, G, n, D)
    sink_v: Tensor

    def cut(self, a: int, b: int) -> "Tokens":
        """The queries a .. b - 1 and the entries that they read."""
        end = b + self.k.size(2) - self.q.size(2)
        k, v, rates = (x if x is None else x[:, :, a:end] for x in (self.k, self.v, self.rates))
        q, valid, seen = self.q[:, :, a:b], self.valid[:, a:end], self.seen[:, a:b]
        return self._replace(q=q, k=k, v=v, rates=rates, valid=valid, seen=seen)


def widened(x: Tensor, dtype: torch.dtype, heads: int = 0) -> Tensor:
    """x in float32 at least, and in `dtype` if that is more; with `heads`, a copy for each of the query heads."""
    x = x.to(torch.promote_types(dtype, torch.float32))
    return x.repeat_interleave(heads // x.size(1), dim=1) if heads and heads > x.size(1) else x


def features(x: Tensor, weight: Tensor, config: Config) -> Tensor:
    """phi(x), (B, H, T, D) -> (B, H, T, F)"""
    x = x @ weight.to(x.dtype)
    if config.linear_feature_map == "relu":
        return torch.cat([x, -x], dim=-1).relu()
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1)


def text_kernels(q: Tensor, plan: Plan, config: Config) -> Any | None:
    """linear_text_kernels.py, where it takes such a call and config."""
    more = config.attention_logit_softcapping or not plan.whole or q.size(2) == 1
    if more or not (__package__ and q.is_cuda and q.dtype == torch.bfloat16):
        return None
    from .linear_formats import gpu_kernels

    kernels = gpu_kernels("linear_text_kernels")
    return kernels if kernels is not None and kernels.fits(q, plan.window, plan.seen.size(-1)) else None


def fading(rates: Tensor, C: int, behind: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the gates leave, given a_t of the entries that are older to some query of a chunk, (B, H, N, old): of a key
    for a query, (B, H, N, C, old); of the state before the chunk for a query, (B, H, N, C, 1); of a key, (B, H, N, old,
    1), and, as a logarithm, of that state, (B, H, N, 1), behind the chunk."""
    passed = rates.cumsum(-1)  # up to and with each entry
    newest = (torch.arange(C, device=rates.device) + behind + 1).clamp(min=0)
    gone = F.pad(passed, (1, 0))[..., newest, None]  # (B, H, N, C, 1): over all that is older to a query
    end = passed[..., C - 1, None]  # (B, H, N, 1)
    between = (passed[..., None, :] - gone).clamp(max=0)  # where a key is not older, what this says is not used
    return between.exp(), (-gone).exp(), (passed - end).clamp(max=0).exp()[..., None], -end


def strips(x: Tensor, size: int, step: int) -> Tensor:
    """(B, H, T, ...) -> (B, H, N, size, ...): `size` tokens from every step-th on. They are put together from pieces
    that do not overlap: of those that do, as x.unfold's, compiled code may add gradients up wrongly."""
    N, T = (x.size(2) - size) // step + 1, x.size(2)
    if N == 1:
        return x[:, :, None, :size]
    parts = []
    for start in range(0, size, step):
        width = min(step, size - start)
        part = x[:, :, start : start + N * step]
        if missing := max(0, start + N * step - T):  # of the last strip, which does not read them
            part = torch.cat([part, part[:, :, :missing]], dim=2)
        parts.append(part.unflatten(2, (N, step))[:, :, :, :width])
    return torch.cat(parts, dim=3) if len(parts) > 1 else parts[0]


def along_tokens(x: Tensor, order: Tensor) -> Tensor:
    """The tokens of x (B, H, T, D) in the order (B, T)."""
    return x.gather(2, order[:, None, :, None].expand(x.shape))


def is_in_place(order: Tensor) -> bool:
    return bool((order == torch.arange(order.size(1), device=order.device)).all())


def normalised(y: Tensor, total: Tensor) -> Tensor:
    """(B, H, N, C, D) by (B, H, N, C), to (B, H, T, D). A query that sees nothing, which is padding, gets zeros."""
    return (y / (total + (total == 0))[..., None]).flatten(2, 3)


def empty_state(q: Tensor, size: int | None = None) -> State:
    """A state for queries (B, H, T, D) and values of `size` elements: (B, H, F, size) and (B, H, F)."""
    (B, H, _, D), wide = q.shape, torch.promote_types(q.dtype, torch.float32)
    return q.new_zeros(B, H, 2 * D, size or D, dtype=wide), q.new_zeros(B, H, 2 * D, dtype=wide)


@torch.no_grad()
def state_of(phi: Tensor, v: Tensor, valid: Tensor, rates: Tensor | None) -> State:
    """The state that holds the first keys of texts: features (B, H, n, F) and values (B, G, n, D) of n of them."""
    n, wide = phi.size(2), torch.promote_types(phi.dtype, torch.float32)
    phi = phi.to(wide) * valid[:, None, :n, None]
    if rates is not None:  # float64: differences of sums over a long text count
        passed = rates[..., :n].double().cumsum(-1)
        phi = phi * (passed - passed[..., -1:]).exp()[..., None].to(wide)
    return phi.mT @ widened(v, phi.dtype, phi.size(1)), phi.sum(-2)


def run_states(phi: Tensor, v: Tensor, left: Tensor | None, state: State) -> tuple[Tensor, Tensor, State]:
    """The states before each of N chunks, (B, H, N, F, D) and (B, H, N, F), and that behind the last.

    phi, v: of the keys that each chunk adds, (B, H, N, C, ...). left: the logarithm of what a chunk leaves of the state
    before it, (B, H, N, 1); None: all is left.
    """
    (total, norm), (new, new_norm), N = state, (phi.mT @ v, phi.sum(-2)), phi.size(2)
    before = total[:, :, None], norm[:, :, None]
    if N == 1:  # a step
        if left is not None:
            total, norm = total * left.exp(), norm * left.exp()[..., 0]
        return *before, (total + new[:, :, 0], norm + new_norm[:, :, 0])
    states, norms = torch.cat([before[0], new], dim=2), torch.cat([before[1], new_norm], dim=2)
    if left is None:
        states, norms = states.cumsum(dim=2), norms.cumsum(dim=2)
    else:  # float64: differences of sums over a long text count
        passed = F.pad(left[..., 0].double().cumsum(-1), (1, 0))  # (B, H, N + 1)
        decay = (passed[..., :, None] - passed[..., None, :]).clamp(max=0).exp().tril().to(new.dtype)
        states, norms = (decay @ states.flatten(-2)).view_as(states), decay @ norms
    return states[:, :, :N], norms[:, :, :N], (states[:, :, N], norms[:, :, N])


# --------------------------------------------------------------------------------------------------------------- caches


class Recent(nn.Module):
    """Which positions a cache's entries (B, lag) and sinks (B, n) hold, in all layers of a kind; -1: none.

    The entries are in order, invalid ones first. lag = S + lookahead: so many tokens can be taken back, since the state
    holds only keys that have left the windows of these too. gone: the greatest position in the state.
    """

    def __init__(self, config: Config, batch: int, length: int, lookahead: int, device: Any) -> None:
        super().__init__()
        n, window = config.linear_sinks, max(1, config.linear_window)
        self.lookahead, lag = lookahead, min(window, max(1, length - n)) + lookahead
        self.unbounded = lag - lookahead == window
        for name, size in (("pos", lag), ("sink_pos", n), ("gone", 1)):
            self.register_buffer(name, torch.full((batch, size), -1, device=device), persistent=False)

    def admit(self, pos: Tensor, window: int, looked: bool) -> tuple[Tensor, Tensor, Moves]:
        """Take note of a call at pos (1 or B, T). What a sequence held from its first position on is forgotten. Returns
        which of the call's entries are valid (B, E), the sinks' positions (B, n), and how keys move."""
        T, numbers = pos.size(1), torch.arange(self.sink_pos.size(1), device=pos.device)
        pos = pos.expand(self.pos.size(0), T)
        first = pos.where(pos >= 0, 2**40).amin(dim=1, keepdim=True)
        held, kept = self.pos.where(self.pos < first, -1), first > 0
        if looked:
            self.check(first, held, window)
        entries = torch.cat([held, pos.where(pos >= len(numbers), -1)], dim=1)
        order, queries = ((x >= 0).byte().argsort(dim=1, stable=True) for x in (entries, entries[:, -T:]))
        entries = entries.gather(1, order)
        self.pos.copy_(entries[:, T:])
        self.gone.copy_(torch.maximum(self.gone.where(kept, -1), entries[:, :T].amax(dim=1, keepdim=True)))
        found = pos[:, None] == numbers[:, None]  # (B, n, T)
        own = found.any(-1)
        self.sink_pos.copy_(torch.where(own, numbers, self.sink_pos.where(self.sink_pos < first, -1)))
        if looked:  # what changes nothing is left out
            order, queries = (None if is_in_place(x) else x for x in (order, queries))
            kept = None if kept.all() else kept
        queries = queries if T > 1 else None
        return entries >= 0, self.sink_pos, Moves(order, queries, kept, (own, found.byte().argmax(-1)))

    def check(self, first: Tensor, held: Tensor, window: int) -> None:
        """Refuse a call whose first positions (B, 1) the state is ahead of, or see keys exactly that are in it."""
        exact = (held >= 0).sum(dim=1, keepdim=True)
        wrong = (first > 0) & (self.gone >= 0) & ((self.gone >= first) | (exact < window - 1))
        if wrong.any():
            raise ValueError(
                f"Position {int(first[wrong].min())} comes after later ones, which are in linear attention's state: "
                f"it takes back {self.lookahead} tokens, more with set_kv_cache(lookahead=...). Another text begins at "
                "0, or after reset_kv_cache()."
            )

    def take_over(self, old: "Recent") -> None:
        for name in ("pos", "sink_pos", "gone"):
            held = getattr(old, name)
            getattr(self, name)[:, -held.size(1) :] = held


class StateCache(nn.Module):
    """The state of a layer in float32, the nearest keys (after RoPE) and values, and those of the sinks."""

    def __init__(self, recent: Recent, config: Config, heads: tuple[int, int], device: Any, dtype: torch.dtype) -> None:
        super().__init__()
        (H, G), D, wide = heads, config.head_size, torch.promote_types(dtype, torch.float32)
        self.recent, (B, lag), n = recent, recent.pos.shape, recent.sink_pos.size(1)
        shapes = {"kv": (B, G, lag, 2 * D), "sinks": (B, G, n, 2 * D), "state": (B, H, 2 * D, D), "norm": (B, H, 2 * D)}
        for name, shape in shapes.items():
            kind = wide if name in ("state", "norm") else dtype
            self.register_buffer(name, torch.zeros(shape, device=device, dtype=kind), persistent=False)

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (self.kv, self.sinks, self.state, self.norm))

    @property
    def unbounded(self) -> bool:
        return self.recent.unbounded

    def reset(self) -> None:
        for x in (self.recent.pos, self.recent.sink_pos, self.recent.gone):
            x.fill_(-1)
        self.state.zero_()
        self.norm.zero_()

    def can_take_back(self, n: int) -> bool:
        return n <= self.recent.lookahead

    def take_back(self, n: int) -> None:
        """Nothing to do: what is fed next at their positions takes the place of the newest tokens."""

    def take_over(self, old: "StateCache") -> None:
        """Hold what a smaller cache holds."""
        self.recent.take_over(old.recent)
        self.kv[:, :, -old.kv.size(2) :] = old.kv
        for name in ("sinks", "state", "norm"):
            getattr(self, name).copy_(getattr(old, name))

    def exchange(self, kv: Tensor, moves: Moves) -> tuple[Tensor, Tensor, State]:
        """Take in the call's keys and values (B, G, T, 2 D); returns the sinks (B, G, n, 2 D), the entries (B, G, E,
        2 D) and the state before them. No gradient flows through a cache."""
        kv, (own, source) = kv.to(self.kv.dtype), moves.own_sinks
        if own.size(1):
            new = kv.gather(2, source[:, None, :, None].expand(self.sinks.shape))
            self.sinks.copy_(torch.where(own[:, None, :, None], new, self.sinks).detach())
        entries, held = torch.cat([self.kv, kv], dim=2), (self.sinks, self.state, self.norm)
        if torch.is_grad_enabled():  # a backward reads them when the next call has changed them
            held = (x.clone() for x in held)
        sinks, state, norm = held
        if moves.order is not None:
            entries = along_tokens(entries, moves.order)
        if moves.kept is not None:
            anew = ~moves.kept[..., None]
            state, norm = state.masked_fill(anew[..., None], 0), norm.masked_fill(anew, 0)
        self.kv.copy_(entries[:, :, kv.size(2) :].detach())
        return sinks, entries, (state, norm)

    def keep(self, state: State) -> None:
        for held, new in zip((self.state, self.norm), state, strict=True):
            held.copy_(new.detach())


VARIANTS["linear"] = Variant(
    fields=("linear_feature_map", "linear_window", "linear_sinks", "linear_gate", "linear_off", "linear_teacher"),
    check=check_linear,
    mixer=LinearAttention,
)
