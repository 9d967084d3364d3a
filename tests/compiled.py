"""Gradients of linear attention that is compiled, for tests on a CPU and on a GPU."""

import torch
from torch import Tensor

from lit_swa import GPT
from lit_swa.training.compiling import compile_linear_attention


def check_gradients(model: GPT, idx: Tensor, tolerance: float) -> None:
    """Compiling changes no gradient by more than this share of it, or a tenth of that of the largest one."""
    torch._dynamo.reset()
    found = []
    for compiles in (False, True):
        if compiles:
            compile_linear_attention(model)
        model.zero_grad()
        model(idx).square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=tolerance, atol=0.1 * tolerance * plain.abs().max().item())
