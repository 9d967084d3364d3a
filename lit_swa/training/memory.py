"""Activations: kept for the backward, or computed again there to save memory (Chen et al. 2016, arXiv 1604.06174)."""

import bisect
import contextlib
import ctypes
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from lit_swa.arguments import Loop
from lit_swa.checks import check_range
from lit_swa.config import Config
from lit_swa.exact_chunks import border_bytes, check_chunks, kept_bytes
from lit_swa.memory import format_bytes, free_memory, ran_out_of_memory, require_memory
from lit_swa.model import GPT, SoftmaxAttention
from lit_swa.training.distribution import count_shards, is_sharded
from lit_swa.training.estimate import estimate_step
from lit_swa.training.loop import Batch, Run

TILE = 2**14  # tokens that an MLP reads at once where activations are offloaded


def check_layers(args: Loop, config: Config) -> None:
    """Raises ValueError for a model that cannot be trained by chunks, or has fewer layers than are to recompute."""
    if args.chunk_size is not None:
        check_chunks(config)
    if isinstance(args.recompute, int):
        check_range("recompute", args.recompute, 0, config.n_layer)


def choose_recompute(run: Run, model: GPT, accumulates: bool = True) -> int:
    """Let as many layers recompute their activations as --recompute says; returns how many.

    auto: as many as it takes to leave some memory free with the longest micro-batch, beside what other programs hold: a
    tenth of a GPU's, a quarter of a CPU's, whose heap falls into pieces. accumulates: a step may read several
    micro-batches.
    Raises ValueError when the step does not fit into the memory.
    """
    n, asked = model.config.n_layer, run.args.recompute
    recompute_blocks(model, 0)
    wanted = {"all": n, "none": 0, "offload": n}.get(asked, asked)
    if run.fabric.device.type == "cuda":
        if asked == "offload":
            require_inputs(run, model)
        wanted = fitting_on_gpu(run, model, wanted, accumulates)
    else:
        wanted = fitting_on_cpu(run, model, wanted, accumulates)
    recompute_blocks(model, wanted, offload=asked == "offload")
    return wanted


def require_inputs(run: Run, model: GPT) -> None:
    """Raises ValueError where the CPU's memory cannot hold what all layers read."""
    batch, config = read_at_once(run), model.config
    here = run.fabric.world_size // run.args.num_nodes  # processes that share it
    needed = here * config.n_layer * batch.idx.numel() * config.n_embd * run.dtype.itemsize
    what = f"What the {config.n_layer} layers read of {batch.idx.numel():,} tokens"
    require_memory(needed, torch.device("cpu"), what, f"use a smaller {run.args.LENGTH}, or --recompute all")


def read_at_once(run: Run) -> Batch:
    """The tokens that a graph is made of at once: the longest micro-batch, or as many of it as a chunk has."""
    batch, n = run.feed.longest(), run.args.chunk_size
    if n is None or batch.idx.size(1) <= n:
        return batch
    one = None if batch.documents is None else [n]
    return batch._replace(idx=batch.idx[:, :n], targets=batch.targets[:, :n], documents=one)


def hands_on_all(run: Run, model: GPT) -> bool:
    """True if there are chunks, and a layer in which each sees all keys before it."""
    size = run.args.chunk_size
    long = size is not None and run.feed.longest().idx.size(1) > size
    return long and any(isinstance(attn.mixer, SoftmaxAttention) and attn.mixer.window is None for attn in model.layers)


def kept_between_chunks(run: Run, model: GPT) -> int:
    """Bytes on the device of what the chunks of the longest text leave for each other, and of what one holds of it
    beside its graph. Raises ValueError where what waits, in the CPU's memory or on a GPU, does not fit there."""
    if run.args.chunk_size is None:
        return 0
    rows, length = (batch := run.feed.longest()).idx.shape
    longest, device = max(batch.documents or [length]), run.fabric.device
    size, width = run.args.chunk_size, run.dtype.itemsize
    needed = rows * kept_bytes(model, longest, size, width)
    beside = rows * border_bytes(model, size, width) if longest > size else 0
    if device.type == "cpu":
        return needed + beside
    waits = run.args.chunk_offload
    what = f"What chunks of {run.args.chunk_size} tokens keep of a text of {longest:,}"
    remedy = "use " + "--chunk_offload true, " * (not waits)
    remedy += f"a larger --chunk_size, or a smaller window or {run.args.LENGTH}"
    require_memory(needed, torch.device("cpu") if waits else device, what, remedy)
    return beside if waits else needed + beside


def fitting_on_gpu(run: Run, model: GPT, wanted: int | str, accumulates: bool) -> int:
    """How many layers recompute: as many as are wanted or, for auto, as fit. Raises ValueError as kept_between_chunks
    does."""
    device, n = run.fabric.device, model.config.n_layer
    here = torch.cuda.memory_allocated(device) + free_memory(device)
    limit = here - torch.cuda.get_device_properties(device).total_memory // 10 - kept_between_chunks(run, model)
    if wanted != "auto":
        return wanted
    if is_sharded(run.fabric):  # the model may be larger than the device: nothing is tried
        batch = read_at_once(run).to(model.transformer.wte.weight.device)  # a model from a file waits on the CPU
        try:
            step = estimate_step(model, batch, accumulates, run.fabric.autocast, count_shards(run.fabric, run.args))
        except RuntimeError:  # experts, or a module of the user's, look at numbers: nothing is known of the step
            return n
        return next((i for i in range(n) if step.weights + step.beside_weights(i) < limit), n)
    if hands_on_all(run, model):  # a later chunk takes more than the first, which is tried
        return n
    return fitting_recompute(model, read_at_once(run).to(device), limit)


def fitting_on_cpu(run: Run, model: GPT, wanted: int | str, accumulates: bool) -> int:
    """How many layers recompute, by an estimate, which is told. Raises ValueError when it exceeds the memory."""
    fabric, n = run.fabric, model.config.n_layer
    batch = read_at_once(run)
    try:
        step = estimate_step(model, batch, accumulates, fabric.autocast)
    except RuntimeError as error:
        if ran_out_of_memory(error):
            raise
        return 0 if wanted == "auto" else wanted  # a module of the user's looks at numbers: nothing is known of it
    here = fabric.world_size // run.args.num_nodes  # processes that share this machine's memory
    shared = step.gradients if fabric.world_size > 1 else 0  # DDP's copies of the gradients
    extra = shared + mapped_bytes(p for p in model.parameters() if p.requires_grad)  # what a step writes to is copied
    extra += (kept := kept_between_chunks(run, model))
    needed = [here * (step.beside_weights(i) + extra) for i in range(n + 1)]
    free = free_memory(fabric.device)
    if wanted == "auto":
        wanted = next((i for i in range(n + 1) if needed[i] < 0.75 * free), n)
    weights = format_bytes(here * step.weights)
    name = "A chunk of the longest micro-batch" if kept else "The longest micro-batch"
    between = f" and {format_bytes(here * kept)} that chunks keep for each other" if kept else ""
    what = f"{name} ({batch.idx.numel()} tokens), with gradients and moments beside weights of {weights}{between},"
    remedy = training_remedy(run.args, needed, wanted, free)
    remedy = f"use a larger --chunk_size or a smaller window, or {remedy.removeprefix('use ')}" if kept else remedy
    require_memory(needed[wanted], fabric.device, what, remedy)
    if returns := 4 * needed[wanted] > free or run.args.dry_run:
        return_what_is_freed()
    beside = "" if returns else ", beside freed memory that is not given back at once"
    program = here * program_bytes(model, step.weights)
    total = format_bytes(program + here * step.weights + needed[wanted])
    run.log.say(
        f"Memory, estimated: {total} at most{beside} (program {format_bytes(program)}, weights {weights}, gradients "
        f"{format_bytes(here * step.gradients)}, moments {format_bytes(here * step.moments)}, the rest activations; "
        f"{wanted} of {n} layers compute theirs again); {format_bytes(free)} are free."
    )
    return wanted


def program_bytes(model: GPT, weights: int) -> int:
    """What this process holds beside the model's weights: Python, torch, the data. 0 where the system does not say."""
    try:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
    return max(0, resident - weights + mapped_bytes((*model.parameters(), *model.buffers())))


def training_remedy(args: Loop, needed: list[int], wanted: int, free: int) -> str:
    """What to do when a step does not fit that needs so many bytes, by the layers that recompute."""
    if needed[-1] < free:
        return f"use --recompute all ({format_bytes(needed[-1])}), a smaller {args.LENGTH} or --micro_batch_size 1"
    less = f" (--recompute all alone would leave {format_bytes(needed[-1])})" if wanted < len(needed) - 1 else ""
    return f"use a smaller {args.LENGTH}, --micro_batch_size 1, or {args.LESS}{less}"


def return_what_is_freed() -> None:
    """Let malloc give blocks of 1 MB and more back to the system when they are freed, where it is glibc's.

    Otherwise it keeps those below 32 MB in a heap that falls into pieces: with rows of 4,096 tokens a step held twice
    what it used. A step takes about a sixth longer.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD


def mapped_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors that are a file's pages: they take memory of their own once they are written to."""
    try:
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    except OSError:
        return 0
    files = [line[0].split("-") for line in lines if len(line) > 5 and line[4] != "0"]
    ranges = sorted((int(start, 16), int(end, 16)) for start, end in files)
    starts = [start for start, _ in ranges]
    total = 0
    for x in tensors:
        i = bisect.bisect_right(starts, x.data_ptr()) - 1
        total += x.nbytes if i >= 0 and x.data_ptr() < ranges[i][1] else 0
    return total


def recompute_blocks(model: GPT, n: int, offload: bool = False) -> None:
    """Let the first n layers compute their activations again in the backward. offload: what they are computed from
    waits in the CPU's memory, and MLPs read some of the tokens at a time."""
    for i, block in enumerate(model.transformer.h):
        block.__dict__.pop("forward", None)
        if isinstance(block.mlp.__dict__.get("forward"), TiledForward):
            del block.mlp.forward
        if i < n:
            block.forward = RecomputedForward(type(block).forward.__get__(block), offload)
            if offload and not block.moe:
                block.mlp.forward = TiledForward(block.mlp.forward)


class RecomputedForward:
    """A forward that keeps nothing but its input."""

    def __init__(self, forward: Callable[..., Tensor], offload: bool = False) -> None:
        self.forward, self.offload = forward, offload

    def __call__(self, x: Tensor, *args: Any) -> Tensor:
        with save_on_cpu(pin_memory=x.is_cuda) if self.offload else contextlib.nullcontext():
            return checkpoint(self.forward, x, *args, use_reentrant=False, preserve_rng_state=True)


class TiledForward:
    """The forward of an MLP for TILE tokens at a time, whose activations exist for no more tokens than these."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        self.forward = forward

    def __call__(self, x: Tensor) -> Tensor:
        tiles = x.flatten(0, 1)[None].split(TILE, dim=1)  # of all sequences, one behind the other
        if len(tiles) == 1:
            return self.forward(x)
        return torch.cat([checkpoint(self.forward, tile, use_reentrant=False) for tile in tiles], dim=1).view_as(x)


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
        x = model.transformer.wte(batch.idx.reshape(call.texts * batch.idx.size(0), -1))
    x.requires_grad_()
    before = torch.cuda.memory_allocated(device)
    kept = model.transformer.h[n - 1](x, call)
    of_a_layer = torch.cuda.memory_allocated(device) - before
    del kept, call, x
    return n - max(0, min(n, (limit - peak) // max(1, of_a_layer)))
