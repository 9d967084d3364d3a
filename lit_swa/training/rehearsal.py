"""The rehearsal before step 1: what would otherwise fail after hours is tried at once, and nothing is left of it."""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch.nn as nn

from lit_swa.config import IGNORED
from lit_swa.formats.files import TEMPORARY, directory_lock, format_bytes, require_space
from lit_swa.training.distribution import unwrapped, whole_weights
from lit_swa.training.loop import Run
from lit_swa.training.resuming import all_steps
from lit_swa.utils import memory_in_use


def rehearse(
    run: Run,
    model: nn.Module,
    validate: Callable[..., float],
    save_model: Callable[[Path], None],
    load: Callable[[Path], None],
) -> None:
    """Try the longest micro-batch forward and backward, validation, saving, loading; then say what the run will need.

    validate: lit_swa.training.loop's, or what the loop calls in its place. save_model: writes into a directory what the
    next command loads. load: reads it as the next command does.
    Raises whatever fails, and OSError when the disk has not enough room for the run.
    """
    fabric, out_dir = run.fabric, run.out_dir
    started = time.perf_counter()
    tokens = try_step(run, model)
    seconds = time.perf_counter() - started
    if run.valid is not None:
        validate(fabric, model, run.valid.head())
    with whole_weights(unwrapped(model), keep=fabric.is_global_zero):
        size = try_saving(run, save_model, load) if fabric.is_global_zero else 0
    if fabric.is_global_zero:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        kept = run.args.keep_last + 1 + (run.args.early_stop > 0)  # a new step is whole before the old one goes
        needed = (kept + 1) * size + kept * 12 * trained  # with weights and two moments in float32
        run.log.say(
            f"{trained:,} of {sum(p.numel() for p in model.parameters()):,} weights are trained. The longest "
            f"micro-batch has {tokens} tokens: {seconds:.1f} s, {memory_in_use()} of memory. The disk needs "
            f"{format_bytes(needed)} under {out_dir}. {run.steps} steps of {run.feed.batch_size} rows."
        )
        require_space(out_dir, needed - bytes_of_run(out_dir))  # which the new steps replace
    fabric.barrier()


def bytes_of_run(out_dir: Path) -> int:
    """What the steps and final/ of a run that is there take."""
    held = [path for directory in (*all_steps(out_dir), out_dir / "final") for path in directory.rglob("*")]
    return sum(path.stat().st_size for path in held if path.is_file())


def try_step(run: Run, model: nn.Module) -> int:
    """The longest micro-batch forward and backward; returns its tokens. Raises ValueError for a loss that is no
    number."""
    batch = run.feed.longest().to(run.fabric.device)
    nll = model(batch.idx, targets=batch.targets, documents=batch.documents)
    loss = nll / int((batch.targets != IGNORED).sum())
    if not math.isfinite(loss.item()):
        raise ValueError(f"The loss is {loss.item()} before the first step: the weights or the precision do not fit.")
    run.fabric.backward(loss)
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, f"{without[:3]} got no gradient"
    model.zero_grad(set_to_none=True)
    return batch.idx.numel()


def try_saving(run: Run, save_model: Callable[[Path], None], load: Callable[[Path], None]) -> int:
    """Save, load and delete; returns the bytes that it took."""
    run.out_dir.mkdir(parents=True, exist_ok=True)
    trial = run.out_dir / f".trial{TEMPORARY}"
    with directory_lock(run.out_dir):
        shutil.rmtree(trial, ignore_errors=True)
        try:
            trial.mkdir()
            save_model(trial)
            load(trial)
            return sum(p.stat().st_size for p in trial.rglob("*"))
        finally:
            shutil.rmtree(trial, ignore_errors=True)
