"""GPTQ: int4 codes that keep a layer's outputs on a text, not its weights (Frantar et al. 2022, arXiv 2210.17323).

For the inputs x of a layer on a calibration text, the squared error of its outputs is (w - q) H (w - q)^T for each row
w, with H = sum of x x^T. GPTQ rounds one column of the weight after the other, and after each it moves the columns that
are still to come so that they make up for its error as well as they can. The columns whose inputs are largest come
first, and the scales of all groups are chosen before, for the least error with the inputs' squares as weights.
"""

import torch
from torch import Tensor

from lit_swa.hqq import SHARES, TURNS, fit_line, keep_better
from lit_swa.weight_only import nearest_codes, round_scales

DAMPING = 0.01  # of the mean of H's diagonal, added to it: the H of few tokens has no inverse
COLUMNS = 128  # whose errors reach the columns behind them in one product


@torch.no_grad()
def gptq(weight: Tensor, hessian: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and scales (out, in / group, 2) of a weight (out, in) in float32.

    hessian: sum of x x^T over the layer's inputs, (in, in), in float32.
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal += (DAMPING * diagonal.mean()).clamp(min=torch.finfo(torch.float32).tiny)
    scales = fit_scales(weight, group_size, diagonal)
    order = diagonal.argsort(descending=True)
    steps = inverse_factor(hessian[order][:, order])
    rest = weight[:, order]
    chosen = torch.empty_like(rest)
    by_column = scales.float()[:, order // group_size]  # (out, in, 2)
    for start in range(0, rest.size(1), COLUMNS):
        block = slice(start, start + COLUMNS)
        chosen[:, block], errors = round_columns(rest[:, block], steps[block, block], by_column[:, block])
        rest[:, start + COLUMNS :] -= errors @ steps[block, start + COLUMNS :]
    codes = torch.empty_like(chosen, dtype=torch.uint8)
    codes[:, order] = chosen.to(torch.uint8)
    return codes, scales


def round_columns(weight: Tensor, steps: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of a few columns (out, n), one after the other, and what each leaves to those behind it.

    steps: their part of inverse_factor's, (n, n). scales: (out, n, 2).
    """
    weight, codes, errors = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
    scale, offset = scales.unbind(-1)
    for i in range(weight.size(1)):
        column, s, z = weight[:, i], scale[:, i], offset[:, i]
        code = torch.where(s == 0, 0, (column - z) / s).round_().clamp_(-8, 7)
        error = (column - code * s - z) / steps[i, i]
        weight[:, i:] -= error[:, None] * steps[i, i:]
        codes[:, i], errors[:, i] = code + 8, error
    return codes, errors


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U with U^T U = H^-1: its row i says how the error of column i is passed on."""
    exact = hessian if hessian.device.type == "mps" else hessian.double()  # where there is float64
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(exact))
    return torch.linalg.cholesky(inverse, upper=True).float()


def fit_scales(weight: Tensor, group_size: int, importance: Tensor) -> Tensor:
    """The scales (out, in / group, 2) with the least sum of importance (in,) times squared error, of those tried: parts
    of each group's range, and the lines that fit their codes best."""
    groups = weight.view(weight.size(0), -1, group_size)
    importance = importance.view(1, -1, group_size)
    least, largest = (end[..., None] for end in groups.aminmax(dim=2))
    best, scales = None, None
    for share in SHARES:
        scale = share * (largest - least) / 15
        offset = share * least + 8 * scale
        for _ in range(TURNS):
            tried = round_scales(scale[..., 0], offset[..., 0])
            best, scales = keep_better(best, scales, groups, tried, importance)
            steps = nearest_codes(weight, tried).view_as(groups).float() - 8
            scale, offset = fit_line(steps, groups, scale, importance)
    return scales
