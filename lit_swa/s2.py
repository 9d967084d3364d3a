"""S2-Attn (LongLoRA, Chen et al. 2023, arXiv 2309.12307): shifted sparse attention, which trains full attention on
long texts at the cost of short ones. s2_attention=True puts it where softmax attention is. Shapes as in model.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

if __package__:
    from .config import Config
    from .model import KeyRange, KVCache, Plan, QueryBlock, SoftmaxAttention, attend_ranges
    from .rope import RoPE, Span
else:  # copied beside a script of another project
    from config import Config
    from model import KeyRange, KVCache, Plan, QueryBlock, SoftmaxAttention, attend_ranges
    from rope import RoPE, Span


class ShiftedSparseAttention(SoftmaxAttention):
    """S2-Attn, causal: in training, half of the heads attend within groups of g tokens, the others
    within groups that are shifted by half a group. No pair wraps around the ends.

    g = 4, T = 10, who is with whom:    |0 1 2 3|4 5 6 7|8 9|    shifted    |0 1|2 3 4 5|6 7 8 9|

    In eval, with a cache, and where one group holds the whole text, it attends in full.
    """

    def plan(self, pos: Tensor, span: Span, cache: "KVCache | None", rope: RoPE) -> Plan:
        T, plan = pos.size(1), super().plan(pos, span, cache, rope)
        g = self.config.s2_group(T)
        return plan._replace(group=g) if self.training and cache is None and g < T else plan

    def attend(self, queries: list[Tensor], k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        if not plan.group:
            return super().attend(queries, k, v, plan)
        (q,), H, G, g = queries, queries[0].size(1), k.size(1), plan.group
        causal = causal_attention if plan.faster is None else plan.faster.causal
        if not self.config.s2_shift:
            return attend_groups(q, k, v, g, 0, self.config, causal)
        half = H // 2
        if half % (H // G):  # the border cuts a key head's group of query heads
            k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
        cut = half * k.size(1) // H
        straight = attend_groups(q[:, :half], k[:, :cut], v[:, :cut], g, 0, self.config, causal) if half else q[:, :0]
        shifted = attend_groups(q[:, half:], k[:, cut:], v[:, cut:], g, g - g // 2, self.config, causal)
        return torch.cat([straight, shifted], dim=1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Every query sees the keys up to its own: (B, H, T, D) with (B, G, T, D) to (B, H, T, D)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1))


def attend_groups(q: Tensor, k: Tensor, v: Tensor, g: int, first: int, config: Config, causal: Callable) -> Tensor:
    """S2-Attn's groups: causal attention within the tokens 0 .. first - 1, then within every g tokens, then within the
    rest. causal: the kernel, as causal_attention."""
    n = max(0, q.size(2) - first) // g
    outputs = []
    for start, groups, size in ((0, 1, first), (first, n, g), (first + n * g, 1, q.size(2) - first - n * g)):
        if groups * size <= 0:
            continue
        cut = [x[:, :, start : start + groups * size].unflatten(2, (groups, -1)) for x in (q, k, v)]
        q_, k_, v_ = (x.transpose(1, 2).flatten(0, 1) for x in cut)  # (B * groups, heads, size, D)
        if config.attention_logit_softcapping is None:
            y = causal(q_, k_, v_, (config.attention_scores_scalar or config.head_size) ** -0.5)
        else:
            lower, all_of_it = torch.ones(1, 1, size, size, dtype=torch.bool, device=q.device).tril(), slice(0, size)
            y = attend_ranges([q_], k_, v_, QueryBlock(all_of_it, [KeyRange(all_of_it, {0: lower})]), config)
        outputs.append(y.unflatten(0, (-1, groups)).transpose(1, 2).flatten(2, 3))  # (B, heads, groups * size, D)
    return torch.cat(outputs, dim=2)
