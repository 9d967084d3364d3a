"""Activations: kept for the backward, or computed again there to save memory (Chen et al. 2016, arXiv 1604.06174)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_swa.model import GPT
from lit_swa.training.loop import Batch, Run


def choose_recompute(run: Run, model: GPT) -> int:
    """Let as many layers recompute their activations as --recompute says; returns how many.

    auto: on a GPU, as many as it takes to leave a tenth of its memory free with the longest micro-batch; on a CPU none.
    """
    n, device = model.config.n_layer, run.fabric.device
    wanted = {"all": n, "none": 0}.get(run.args.recompute, run.args.recompute)
    if wanted == "auto" and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        wanted = fitting_recompute(model, run.feed.longest().to(device), int(0.9 * total))
    wanted = 0 if wanted == "auto" else min(int(wanted), n)
    recompute_blocks(model, wanted)
    return wanted


def recompute_blocks(model: GPT, n: int) -> None:
    """Let the first n layers compute their activations again in the backward."""
    for i, block in enumerate(model.transformer.h):
        block.__dict__.pop("forward", None)
        if i < n:
            block.forward = RecomputedForward(type(block).forward.__get__(block))


class RecomputedForward:
    """A forward that keeps nothing but its input."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self.forward = forward

    def __call__(self, *args: Any) -> Tensor:
        return checkpoint(self.forward, *args, use_reentrant=False, preserve_rng_state=True)


def fitting_recompute(model: GPT, batch: Batch, limit: int) -> int:
    """How many layers must recompute so that a step on a GPU stays below `limit` bytes.

    It measures the peak of a step in which all layers recompute, and what one layer keeps; the optimiser's moments are
    added.
    """
    device, n = batch.idx.device, model.config.n_layer
    recompute_blocks(model, n)
    torch.cuda.reset_peak_memory_stats(device)
    model(batch.idx, targets=batch.targets, documents=batch.documents).backward()
    model.zero_grad(set_to_none=True)
    moments = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    peak = torch.cuda.max_memory_allocated(device) + moments
    recompute_blocks(model, n - 1)
    with torch.no_grad():
        call = model.plan_call(batch.idx, None, documents=batch.documents)
        x = model.transformer.wte(batch.idx)
    x.requires_grad_()
    before = torch.cuda.memory_allocated(device)
    kept = model.transformer.h[n - 1](x, call)
    of_a_layer = torch.cuda.memory_allocated(device) - before
    del kept, call, x
    return n - max(0, min(n, (limit - peak) // max(1, of_a_layer)))
