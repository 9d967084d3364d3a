"""HQQ: scales and offsets of int4 groups by half-quadratic splitting (Badri & Shaji 2023), from the weights alone.

Rounding by the least and largest number of a group lets the few numbers at the ends decide about all others. HQQ takes
them out. In steps of a group's first scale, it looks for the scale s, the offset z and a sparse error E that make

    |E|^p + beta / 2 ||W - ((codes - 8) s + z) - E||^2        (p < 1)

small, by turns: the codes are the nearest ones; E is what a shrinkage leaves of the residual W - (codes - 8) s - z;
s and z are the straight line, in the least-squares sense, from the codes to W - E. beta grows. Where this ends depends
on where it begins, so it begins with several parts of a group's range, and the result with the least squares is taken.
"""

import torch
from torch import Tensor

from lit_swa.weight_only import nearest_codes, round_scales

SHARES = (1.0, 0.9, 0.8, 0.7, 0.6)  # of a group's range that the codes are tried on
TURNS = 4  # for each of them
P = 0.7
BETA, GROWTH = 1.0, 1.01


def hqq(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and scales (out, in / group, 2) of a weight in float32."""
    groups = weight.view(weight.size(0), -1, group_size)
    least, largest = (end[..., None] for end in groups.aminmax(dim=2))
    best, scales = None, None
    for share in SHARES:
        scale = share * (largest - least) / 15
        offset, unit = share * least + 8 * scale, scale.clamp(min=torch.finfo(torch.float32).tiny)
        for turn in range(TURNS):
            steps = ((groups - offset) / unit).round_().clamp_(-8, 7)
            error = shrink((groups - steps * scale - offset) / unit, BETA * GROWTH**turn)
            scale, offset = fit_line(steps, groups - unit * error, scale)
            unit = scale.clamp(min=torch.finfo(torch.float32).tiny)
        best, scales = keep_better(best, scales, groups, round_scales(scale[..., 0], offset[..., 0]))
    return nearest_codes(weight, scales), scales


def keep_better(
    best: Tensor | None, scales: Tensor | None, groups: Tensor, tried: Tensor, importance: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """For each group the scales (out, groups, 2) with the smaller error (out, groups), of those so far and those tried.

    importance: of each number of the groups (out, groups, group), a factor of its squared error.
    """
    steps = nearest_codes(groups.flatten(1), tried).view_as(groups).float() - 8
    scale, offset = tried.float().unsqueeze(2).unbind(-1)
    error = ((groups - steps * scale - offset).square() * importance).sum(dim=2)
    if best is None:
        return error, tried
    better = error < best
    return torch.where(better, error, best), torch.where(better[..., None], tried, scales)


def shrink(x: Tensor, beta: float) -> Tensor:
    """The E that makes |E|^p + beta / 2 (x - E)^2 small: what of |x| lies above |x|^(p - 1) / beta."""
    size = x.abs()
    return x.sign() * (size - size.clamp(min=1e-6).pow(P - 1) / beta).relu_()


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
