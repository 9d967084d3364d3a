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


def compile_decode(model: GPT, tokens: int = 1) -> Callable[[Tensor, Tensor], Tensor]:
    """A step of few tokens for `Session(decode=...)`, compiled at its first call, once for all positions.

    tokens: how many tokens of a sequence it feeds at most, as its attribute most_tokens says.
    It takes (idx (B, T), input_pos (T,) or (B, T)) and gives logits (B, T, padded_vocab_size).

    On a GPU the whole model becomes one CUDA graph. On a CPU one block is compiled and serves all layers, which takes
    seconds instead of minutes; its products are sums that Inductor writes itself (see OneTokenLinear), and the model
    stays changed in this way.
    """
    if model.transformer.wte.weight.device.type == "cpu":
        model.fixed_shape_steps = True
        replace_linears(model, OneTokenLinear)
        for module in (*model.transformer.h, model.lm_head):
            compile_for_one_token(module)

        def run(idx: Tensor, input_pos: Tensor) -> Tensor:
            return model(idx, input_pos)

        run.most_tokens = tokens
        return run
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    def step(idx: Tensor, input_pos: Tensor) -> Tensor:
        return compiled(idx, input_pos).clone()  # the next run of the CUDA graph overwrites its result

    step.most_tokens = tokens
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
