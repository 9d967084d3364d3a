"""A GPT in the plainest way: attention pair by pair, in float64, as the definitions of the methods have it.

Nothing of lit_swa's attention, masks, caches or RoPE is used, only the weights.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

Meet = Callable[[int, int, int], tuple[float, float] | None]


def meet_full(i: int, j: int, head: int) -> tuple[float, float] | None:
    return (i, j) if j <= i else None


def meet_sliding(S: int) -> Meet:
    return lambda i, j, head: (i, j) if i - S < j <= i else None


def meet_streaming(S: int, n_sinks: int) -> Meet:
    """Positions are counted in the cache: the sinks, then the last S tokens."""

    def meet(i: int, j: int, head: int) -> tuple[float, float] | None:
        cache = [p for p in range(i + 1) if p < n_sinks or i - p < S]
        return (cache.index(i), cache.index(j)) if j in cache else None

    return meet


def meet_dilated(S: int, n_sinks: int, dilation: int = 2) -> Meet:
    """The sinks, and every dilation-th of the last dilation * S positions, all at their own positions."""

    def meet(i: int, j: int, head: int) -> tuple[float, float] | None:
        seen = [*range(n_sinks), *range(i, i - dilation * S, -dilation)]
        return (i, j) if j <= i and j in seen else None

    return meet


def meet_dual_chunk(s: int, w: int) -> Meet:
    def meet(i: int, j: int, head: int) -> tuple[float, float] | None:
        if j > i:
            return None
        chunks_between = i // s - j // s
        if chunks_between == 0:
            return i % s, j % s
        return (min(i % s + s, s + w) if chunks_between == 1 else s + w), j % s

    return meet


def meet_shifted_groups(g: int, n_head: int) -> Meet:
    def meet(i: int, j: int, head: int) -> tuple[float, float] | None:
        shift = g // 2 if head >= n_head // 2 else 0
        return (i, j) if j <= i and (i + shift) // g == (j + shift) // g else None

    return meet


def attention_weights(
    q: Tensor,
    k: Tensor,
    places: list[int],
    meet: Meet,
    config,
    scale: float,
    base: float,
    factor: Callable[[int], float],
) -> Tensor:
    """Softmax weights (H, T, T) of q (H, T, D) on k (G, T, D), tokens at these places.

    Two elements of a head are a complex number, which RoPE multiplies by exp(i * position * frequency). So what a pair
    contributes to a score depends on the difference of the two positions alone, which is exact here.
    """
    (H, T, _), n = q.shape, config.rope_n_elem
    k = k.repeat_interleave(H // k.size(0), dim=0)
    frequencies = base ** (-2 * torch.arange(n // 2, dtype=torch.float64) / n) / scale
    apart = torch.full((H, T, T), math.nan, dtype=torch.float64)  # from the key to the query; NaN: they do not meet
    for h, i, j in itertools.product(range(H), range(T), range(T)):
        met = meet(places[i], places[j], h) if places[j] <= places[i] else None
        apart[h, i, j] = math.nan if met is None else met[0] - met[1]
    q_pairs, k_pairs = (torch.complex(x[..., : n // 2], x[..., n // 2 : n]) for x in (q, k))
    turns = torch.exp(1j * apart.nan_to_num()[..., None] * frequencies)  # (H, T, T, n / 2)
    scores = torch.einsum("hid,hjd,hijd->hij", q_pairs, k_pairs.conj(), turns).real + q[..., n:] @ k[..., n:].mT
    factors = torch.tensor([factor(place) for place in places], dtype=torch.float64)[:, None]
    scores = scores * factors / math.sqrt(q.size(-1))
    return scores.masked_fill(apart.isnan(), -math.inf).softmax(-1)


@torch.no_grad()
def logits(
    model,
    idx: Tensor,
    meet: Meet | list[Meet],
    *,
    places: list[int] | None = None,
    scale: float = 1.0,
    base: float | None = None,
    factor=lambda i: 1.0,
) -> Tensor:
    """Logits (T, V) for idx (T,) of a model with RMSNorm, gated MLP and no biases. places: the tokens' positions; None:
    they follow each other from 0 on. meet: a list has one for each layer."""
    config, weights = model.config, {name: p.double() for name, p in model.state_dict().items()}
    H, G, D, base = config.n_head, config.n_query_groups, config.head_size, base or config.rope_base

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights[name]

    places = list(range(len(idx))) if places is None else places
    x = weights["transformer.wte.weight"][idx]
    for layer in range(config.n_layer):
        at = f"transformer.h.{layer}."
        qkv = norm(x, at + "norm_1.weight") @ weights[at + "attn.qkv.weight"].T
        q, k, v = qkv.view(len(idx), -1, D).transpose(0, 1).split((H, G, G))
        met = meet[layer] if isinstance(meet, list) else meet
        y = attention_weights(q, k, places, met, config, scale, base, factor) @ v.repeat_interleave(H // G, dim=0)
        x = x + y.transpose(0, 1).flatten(1) @ weights[at + "attn.proj.weight"].T
        h = norm(x, at + "norm_2.weight")
        gate = torch.nn.functional.silu(h @ weights[at + "mlp.fc_1.weight"].T)
        x = x + (gate * (h @ weights[at + "mlp.fc_2.weight"].T)) @ weights[at + "mlp.proj.weight"].T
    return norm(x, "transformer.ln_f.weight") @ weights["lm_head.weight"].T
