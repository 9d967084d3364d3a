"""Trained weights in float32 inside a model that computes in bfloat16."""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_swa.head_norms import EachHeadNorm, WholeNorm
from lit_swa.memory import require_memory
from lit_swa.model import GPT, Mixer, RMSNorm
from lit_swa.moe import Experts


def train_in_float32(model: GPT, dtype: torch.dtype) -> int:
    """Hold trained weights in float32 though the model computes in `dtype`; returns how many modules that concerns.

    A step of 1e-4 would be lost in bfloat16's rounding. Each weight is rounded where it is used. Experts, mixers, norms
    of heads and injected modules (LoRA, adapters) do this by themselves.
    """
    if dtype == torch.float32:
        return 0
    needed = sum(4 * p.numel() for p in model.parameters() if p.requires_grad and p.dtype != torch.float32)
    what = "The trained weights, in float32 beside the model,"
    require_memory(needed, model.transformer.wte.weight.device, what, "train less of it, as finetune/lora.py does")
    count = 0
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        rounded = ROUNDED.get(type(module))
        if not own or not (rounded or isinstance(module, BY_THEMSELVES)):
            continue
        for p in own:
            p.data = p.data.float()
        if rounded:
            module.forward, module.compute_dtype = rounded.__get__(module), dtype
        count += 1
    return count


def is_wide(module: nn.Module) -> bool:
    """True for linear layers and experts whose weights are trained in float32."""
    own = list(module.parameters(recurse=False)) if isinstance(module, (nn.Linear, Experts)) else []
    return bool(own) and all(p.requires_grad and p.dtype == torch.float32 for p in own)


def copies_for_backward(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the weights, rounded to `dtype`, that a module's wide layers keep for the backward."""
    if dtype == torch.float32:
        return 0
    return dtype.itemsize * sum(m.weight.numel() for m in module.modules() if is_wide(m))


def rounded_linear(self: nn.Linear, x: Tensor) -> Tensor:
    bias = None if self.bias is None else self.bias.to(x.dtype)
    return F.linear(x, self.weight.to(x.dtype), bias)


def rounded_embedding(self: nn.Embedding, idx: Tensor) -> Tensor:
    return F.embedding(idx, self.weight).to(self.compute_dtype)


def rounded_layer_norm(self: nn.LayerNorm, x: Tensor) -> Tensor:
    weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
    return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def rounded_rms_norm(self: RMSNorm, x: Tensor) -> Tensor:
    weight = self.weight.float() + self.unit_offset
    return F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype)


BY_THEMSELVES = (Experts, Mixer, EachHeadNorm, WholeNorm)
ROUNDED: dict[type, Callable[..., Tensor]] = {
    nn.Linear: rounded_linear,
    nn.Embedding: rounded_embedding,
    nn.LayerNorm: rounded_layer_norm,
    RMSNorm: rounded_rms_norm,
}
