"""Decode steps that are there for speed only: the same logits from compiled code."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lit_swa.generate import Session
from lit_swa.linear_formats import OneTokenLinear, replace_linears
from lit_swa.model import GPT
from lit_swa.utils import wait_for


def compile_decode(model: GPT) -> Callable[[Tensor, Tensor], Tensor]:
    """A one-token step for `Session(decode=...)`, compiled at its first call, once for all positions.

    On a GPU the whole model becomes one CUDA graph. On a CPU one block is compiled and serves all layers, which takes
    seconds instead of minutes; its products are sums that Inductor writes itself (see OneTokenLinear), and the model
    stays changed in this way.
    """
    if model.transformer.wte.weight.device.type == "cpu":
        model.fixed_shape_steps = True
        replace_linears(model, OneTokenLinear)
        for module in (*model.transformer.h, model.lm_head):
            compile_for_one_token(module)
        return model
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    def step(token: Tensor, input_pos: Tensor) -> Tensor:
        return compiled(token, input_pos).clone()  # the next run of the CUDA graph overwrites its result

    return step


def warm_up(session: Session, tokens: int) -> float:
    """Compile the session's decode step, with room in the caches for so many tokens; returns the seconds it took."""
    started = time.perf_counter()
    session.reserve(tokens)
    for _ in range(int(min(3, session.room))):  # a CUDA graph is recorded at the second call
        session.feed([[0]] * session.batch_size)
    wait_for(session.device)
    session.reset()
    return time.perf_counter() - started


def compile_for_one_token(module: nn.Module) -> None:
    """Make a module whose first argument is (B, T, C) run compiled code if T is 1, and its own code otherwise."""
    plain = module.forward
    compiled = torch.compile(plain, fullgraph=True)

    def forward(x: Tensor, *arguments: Any) -> Tensor:
        return (compiled if x.size(1) == 1 else plain)(x, *arguments)

    module.forward = forward
