"""Norms of queries and keys, (..., heads, T, D), that are not one norm over the head size: Config's norm_qk_type."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

if __package__:
    from .config import Config
else:  # copied beside a script of another project
    from config import Config


class EachHeadNorm(nn.Module):
    """norm_qk_type="each": every head has weights of its own (StableLM 2 12B, Command R+)."""

    def __init__(self, config: Config, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, 1, config.head_size))
        self.eps, self.centred = config.norm_eps, config.norm_class_name == "LayerNorm"

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1:]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = F.layer_norm(wide, size, eps=self.eps) if self.centred else F.rms_norm(wide, size, eps=self.eps)
        return (normed * self.weight).to(x.dtype)


class WholeNorm(nn.Module):
    """norm_qk_type="whole": RMSNorm over all heads of a token at once (OLMo 2 and 3)."""

    def __init__(self, config: Config, heads: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(heads * config.head_size)), config.norm_eps
        self.size, self.join = heads * config.head_size, None  # join: what sums over several ranks; see parallel.py

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.join is not None:  # x and the weight are those of a rank's heads
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            squares = self.join(wide.square().sum(dim=-3, keepdim=True)).sum(dim=-1, keepdim=True)  # (..., 1, T, 1)
            normed = wide * torch.rsqrt(squares / self.size + self.eps)
            return (normed * self.weight.view(-1, 1, x.size(-1))).to(x.dtype)
        rows, dtype = x.transpose(-3, -2), torch.promote_types(x.dtype, self.weight.dtype)  # (..., T, heads, D)
        normed = F.rms_norm(rows.flatten(-2).to(dtype), self.weight.shape, self.weight.to(dtype), self.eps)
        return normed.view(rows.shape).transpose(-3, -2).to(x.dtype)


class PlainNorm(nn.Module):
    """norm_qk_type="plain": RMSNorm without weights (Llama 4, where it comes after RoPE, which keeps lengths)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.eps = config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, x.shape[-1:], eps=self.eps).to(x.dtype)


def build(config: Config, layer: int, heads: int) -> nn.Module:
    if config.norm_qk_type == "plain":  # in layers with RoPE
        return nn.Identity() if config.layer_positions[layer] == "none" else PlainNorm(config)
    return (EachHeadNorm if config.norm_qk_type == "each" else WholeNorm)(config, heads)
