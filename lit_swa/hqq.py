"""HQQ: scales and offsets of int4 groups by half-quadratic splitting (Badri & Shaji 2023), from the weights alone.

Rounding by the least and largest number of a group lets the few numbers at the ends decide about all others. HQQ takes
them out: it looks for the offset z of a group, its scale s, and a sparse error E that make

    |E|^p + beta / 2 ||W - ((codes - 8) s + z) - E||^2        (p < 1)

small, step by step: the codes are the nearest ones; E is what a shrinkage leaves of the residual W - (codes - 8) s - z;
s and z are the straight line, in the least-squares sense, from the codes to W - E. beta grows.
"""

import torch
from torch import Tensor

from lit_swa.weight_only import nearest_codes, round_groups, round_scales

ITERATIONS = 20
P = 0.7
BETA, GROWTH = 10.0, 1.01


def hqq(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and scales (out, in / group, 2) of a weight in float32."""
    _, scales = round_groups(weight, group_size)
    groups = weight.view(*scales.shape[:2], -1)
    scale, offset = scales.float().unsqueeze(2).unbind(-1)
    for n in range(ITERATIONS):
        steps = torch.where(scale == 0, 0, (groups - offset) / scale).round_().clamp_(-8, 7)
        residual = groups - steps * scale - offset
        target = groups - shrink(residual, BETA * GROWTH**n)
        scale, offset = fit_line(steps, target, scale)
    scales = round_scales(scale[..., 0], offset[..., 0])
    return nearest_codes(weight, scales), scales


def shrink(x: Tensor, beta: float) -> Tensor:
    """The E that makes |E|^p + beta / 2 (x - E)^2 small: what of |x| lies above |x|^(p - 1) / beta."""
    size = x.abs()
    return x.sign() * (size - size.clamp(min=1e-12).pow(P - 1) / beta).relu_()


def fit_line(steps: Tensor, target: Tensor, scale: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """s and z (..., 1) of each group with the least sum of importance times (target - steps s - z)^2; all are equally
    important by default. Where all steps are equal, the old s."""
    share = torch.ones_like(steps) if importance is None else importance.expand_as(steps)
    share = share / share.sum(dim=-1, keepdim=True)
    mean, around = ((x * share).sum(dim=-1, keepdim=True) for x in (steps, target))
    apart = steps - mean
    spread = (apart.square() * share).sum(dim=-1, keepdim=True)
    slope = (apart * (target - around) * share).sum(dim=-1, keepdim=True) / spread.clamp(min=1e-12)
    scale = torch.where(spread > 1e-12, slope, scale)
    return scale, around - scale * mean
