"""Blocks compiled for training: norms, activations and sums, each of which is a pass of its own over a GPU's memory in
an eager block, become parts of few kernels.

A block is cut at its attention, which stays eager: its plan differs from call to call (windows, documents, chunks), and
its kernels are chosen, and compiled, for each plan. So another plan compiles nothing anew, and all layers share what is
compiled for the first: a start takes seconds, where a whole model would take minutes. Experts stay eager too: how many
tokens each of them has is known only when they are chosen.
"""

import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lit_swa.cpu_decode import COMPILERS
from lit_swa.fast_attention import has_triton
from lit_swa.linear import LinearAttention
from lit_swa.model import GPT
from lit_swa.training.memory import RecomputedForward, TiledForward

BACKEND = "inductor"


class Compiled:
    """A function of a module, compiled where the module is in training. It generates and validates as it is written:
    the lengths that it meets there would compile it again and again."""

    def __init__(self, module: nn.Module, function: Callable[..., Any], shapes: int | None = None) -> None:
        """shapes: of its arguments, so many are compiled, each for itself; None: whatever torch chooses."""
        self.module, self.plain, self.shapes, self.seen = module, function, shapes, set()
        self.compiled = torch.compile(function, backend=BACKEND, dynamic=None if shapes is None else False)

    def __call__(self, *args: Any) -> Any:
        return (self.compiled if self.module.training and self.knows(args) else self.plain)(*args)

    def knows(self, args: tuple[Any, ...]) -> bool:
        if self.shapes is None:
            return True
        shape = tuple(x.shape for x in tree_leaves(args) if isinstance(x, Tensor))
        if len(self.seen) < self.shapes:
            self.seen.add(shape)
        return shape in self.seen


def compile_blocks(model: GPT, device: torch.device | None = None) -> None:
    """Compile what is around attention in every block, linear attention, and the loss of a piece of a text.

    Call it when it is decided which blocks compute their activations again, and before the model is sharded.
    device: where it will run; None: where it is. Raises ValueError where there is nothing to compile with.
    """
    check_compiler(device or model.transformer.wte.weight.device)
    for block in model.transformer.h:
        tiled = isinstance(block.mlp.__dict__.get("forward"), TiledForward)
        for part in (block.attn, *[block.mlp] * (block.moe or tiled)):
            part.forward = torch.compiler.disable(part.forward)
        forward, recomputed = Compiled(block, type(block).forward.__get__(block)), block.__dict__.get("forward")
        if isinstance(recomputed, RecomputedForward):
            recomputed.forward = forward
        else:
            block.forward = forward
    compile_linear_attention(model)
    model.token_losses = Compiled(model, model.token_losses)


def compile_linear_attention(model: GPT) -> None:
    """Compile how linear layers read a piece of a text, for the first lengths of pieces: texts of one length have up to
    three. Of texts of many lengths, packed in rows, the others run as they are written."""
    for attn in model.layers:
        if isinstance(mixer := attn.mixer, LinearAttention):
            mixer.attend_chunks = Compiled(mixer, mixer.attend_chunks, shapes=4)


def check_compiler(device: torch.device) -> None:
    if BACKEND != "inductor":
        return
    if device.type == "cuda" and not has_triton():
        raise ValueError("compile needs Triton on a GPU: pip install triton, or leave --compile out.")
    if device.type == "cpu" and not any(map(shutil.which, COMPILERS)):
        raise ValueError("compile needs a C++ compiler on a CPU: install g++ or clang++, or leave --compile out.")
