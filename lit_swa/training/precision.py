"""Trained weights in float32 inside a model that computes in bfloat16."""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_swa.memory import require_memory
from lit_swa.model import GPT, RMSNorm


def train_in_float32(model: GPT, dtype: torch.dtype) -> int:
    """Hold trained weights in float32 though the model computes in `dtype`; returns how many modules that concerns.

    A step of 1e-4 would be lost in bfloat16's rounding. Each weight is rounded where it is used. Injected modules
    (LoRA, adapters) do this by themselves.
    """
    if dtype == torch.float32:
        return 0
    needed = sum(4 * p.numel() for p in model.parameters() if p.requires_grad and p.dtype != torch.float32)
    what = "The trained weights, in float32 beside the model,"
    require_memory(needed, model.transformer.wte.weight.device, what, "train less of it, as finetune/lora.py does")
    count = 0
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if not own or type(module) not in ROUNDED:
            continue
        for p in own:
            p.data = p.data.float()
        module.forward = ROUNDED[type(module)].__get__(module)
        module.compute_dtype = dtype
        count += 1
    return count


def rounded_linear(self: nn.Linear, x: Tensor) -> Tensor:
    bias = None if self.bias is None else self.bias.to(x.dtype)
    return F.linear(x, self.weight.to(x.dtype), bias)


def rounded_embedding(self: nn.Embedding, idx: Tensor) -> Tensor:
    return F.embedding(idx, self.weight).to(self.compute_dtype)


def rounded_norm(self: nn.Module, x: Tensor) -> Tensor:
    return type(self).forward(self, x.float()).to(x.dtype)


ROUNDED: dict[type, Callable[..., Tensor]] = {
    nn.Linear: rounded_linear,
    nn.Embedding: rounded_embedding,
    nn.LayerNorm: rounded_norm,
    RMSNorm: rounded_norm,
}
