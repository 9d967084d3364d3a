"""Saving and resuming: out_dir/step-N, whole or not at all, from which a run goes on to the same losses.

A saved step holds what the next command loads (a checkpoint or an adapter), state.safetensors with every trained weight
and its moments in float32, and run.json with the arguments and the progress.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lit_swa.formats.checkpoint import check_checkpoint_dir
from lit_swa.formats.files import (
    LOCK_NAME,
    TEMPORARY,
    LazyTensor,
    copy_file,
    directory_lock,
    find_inside,
    hold_directory,
    named_when_full,
    open_safetensors,
    read_json,
    remove_directory,
    remove_leftovers,
    replace_directory,
    write_json,
    write_safetensors,
)
from lit_swa.training.distribution import gather, reshard, trained_parameters, whole_weights
from lit_swa.training.loop import Batch, Progress, Run, learning_rate, warmup_steps
from lit_swa.training.resuming import (
    RUN_FILE,
    STATE_FILE,
    all_steps,
    compare_identity,
    damaged,
    find_run,
    half_deleted_steps,
    read_progress,
    restore,
    saved_steps,
    step_dir,
    what_remains,
)
from lit_swa.utils import describe_command, describe_machine, memory_in_use

FALLING = ("cosine", "wsd")  # schedules that depend on the number of the run's steps

# -------------------------------------------------------------------------------------------------- weights and moments


def trained_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every trained weight and its moments, whole and on the CPU. Every process must call it."""
    state: dict[str, Tensor] = {}
    reshard(model)
    for name, p in trained_parameters(model).items():
        state[f"weight.{name}"] = gather(p)
        for key, value in optimizer.state.get(p, {}).items():
            state[f"{key}.{name}"] = gather(value)
    return state


@torch.no_grad()
def require_finite_weights(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Raises ValueError, on every process, when what the step trained is no number: it must not replace a good one."""
    held = [t for p in trained_parameters(model).values() for t in (p, *optimizer.state.get(p, {}).values())]
    held = [t.detach().to_local() if hasattr(t, "to_local") else t.detach() for t in held]
    broken = torch.stack([~t.isfinite().all().to(run.fabric.device) for t in held]).any().float()
    if run.fabric.all_reduce(broken, reduce_op="sum") > 0:
        raise ValueError(
            f"The weights are no numbers after step {step}, and are not saved; {what_remains(run.out_dir)}. Lower "
            "--learning_rate or --grad_clip, or look at the examples of this step."
        )


# ---------------------------------------------------------------------------------------------------------------- a run


class Saver:
    """Writes the steps of a run, removes older ones once a newer one is whole, and finds the step to go on from."""

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        save_model: Callable[[Path], None],
        method: dict[str, Any],
    ) -> None:
        """save_model: writes into a directory what the next command loads. method: what is trained and how, as JSON; a
        resumed run must have the same."""
        self.run, self.model, self.optimizer, self.save_model = run, model, optimizer, save_model
        self.identity = json.loads(json.dumps(identity_of(run, method)))
        self.validation = json.loads(json.dumps(None if run.valid is None else run.valid.identity))
        self.saved = -1  # the last step that was

    def save_step(self, progress: Progress) -> None:
        """out_dir/step-N, unless it is saved already."""
        if self.saved < progress.step:
            self.save(step_dir(self.run.out_dir, progress.step), progress)
            self.saved = progress.step

    def save(self, path: Path, progress: Progress, state: bool = True) -> None:
        """The model as it is, with state.safetensors if a run may go on from it. Every process must call it; the first
        writes.

        Raises ValueError, with all that was saved untouched, when a weight is no number.
        """
        require_finite_weights(self.run, self.model, self.optimizer, progress.step)
        tensors = trained_state(self.model, self.optimizer) if state else {}
        lazy = {n: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()}

        def fill(directory: Path) -> None:
            self.save_model(directory)
            if lazy:
                write_safetensors(directory / STATE_FILE, lazy)
                open_safetensors(directory / STATE_FILE)

        with whole_weights(self.model, keep=self.run.fabric.is_global_zero):
            if self.run.fabric.is_global_zero:
                self.write(path, fill, progress, progress.step)
        self.run.fabric.barrier()

    def write(self, path: Path, fill: Callable[[Path], None], progress: Progress, step: int) -> None:
        """What `fill` writes of a step, in a directory that has another name until it is whole. Older steps go after
        that."""
        out_dir, temporary = path.parent, path.parent / f".{path.name}{TEMPORARY}"
        with directory_lock(out_dir), named_when_full(out_dir):
            remove_leftovers(out_dir)
            temporary.mkdir()
            fill(temporary)
            write_json(temporary / RUN_FILE, self.record(progress, step))
            (temporary / LOCK_NAME).unlink(missing_ok=True)
            replace_directory(temporary, path)
            self.remove_old_steps(progress)

    def remove_old_steps(self, progress: Progress) -> None:
        """Delete the steps that are not to be kept, and what a kill left of others."""
        out_dir, best = self.run.out_dir, self.run.best_step(progress)
        kept = [*saved_steps(out_dir)[-self.run.args.keep_last :], best is not None and step_dir(out_dir, best)]
        for old in [*saved_steps(out_dir), *half_deleted_steps(out_dir)]:
            if old not in kept:
                with suppress(OSError):
                    remove_directory(old)

    def record(self, progress: Progress, step: int) -> dict[str, Any]:
        return {
            "command": describe_command(),
            "machine": describe_machine(str(self.run.fabric.device)),
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
            "memory": memory_in_use(),
            "arguments": self.run.args.as_json(),
            "identity": self.identity,
            "validation": self.validation,
            "progress": asdict(progress),
            "weights_of_step": step,
            "prompt_style": self.run.prompt_style,
        }

    def resume(self) -> Progress:
        """Load weights, moments and progress of the run in out_dir, if there is one and --resume says so.

        Raises ValueError when there is one and --resume does not say what to do with it, when it is another run, is
        damaged, or is at work.
        """
        run = self.run
        if run.fabric.is_global_zero:
            self.lock = hold_directory(run.out_dir)  # until this object is gone: two runs would mix their steps
        path = find_run(run.args.resume, run.out_dir)
        if path is None:
            if run.args.resume != "restart":
                run.log.rewind(-1)  # rows of a run that ended before it saved anything
            return Progress()
        try:
            record = read_json(find_inside(path, RUN_FILE))
        except ValueError:
            raise damaged(path, f"{RUN_FILE} cannot be read") from None
        progress, identity = read_progress(record.get("progress"), path), record.get("identity")
        if isinstance(identity, dict) and self.had_rates_of(identity.get("steps"), progress.step):
            identity = identity | {"steps": self.identity["steps"]}
        if unsaid := compare_identity(identity, self.identity, path):
            run.log.say(f"note: {path} does not say its {', '.join(unsaid)}, which cannot be compared")
        if progress.step > run.steps:
            raise ValueError(f"{path} is beyond the {run.steps} steps of this run: raise --max_steps or --epochs.")
        restore(self.model, self.optimizer, path)
        run.log.rewind(progress.step)
        self.saved = progress.step
        self.forget_best(progress, record)
        run.log.say(self.end_of(progress) if run.is_over(progress) else f"going on from {path}")
        return progress

    def had_rates_of(self, steps: object, done: int) -> bool:
        """True if a run of so many steps has had, in those that are done, the learning rates of this one: with wsd it
        may become longer or shorter until its rate falls."""
        run = self.run
        if run.args.lr_schedule != "wsd" or type(steps) is not int or steps < 1:
            return False
        return all(
            learning_rate(n, steps, run.args, 1.0) == learning_rate(n, run.steps, run.args, 1.0) for n in range(done)
        )

    def forget_best(self, progress: Progress, record: dict[str, Any]) -> None:
        """Look for the best validation loss anew where the one before cannot be compared, or its step was not kept."""
        run, why = self.run, ""
        if record.get("validation", self.validation) != self.validation:
            why = "what is validated on is not what it was"
        elif run.args.early_stop > 0 and (
            progress.best_step is None or step_dir(run.out_dir, progress.best_step) not in saved_steps(run.out_dir)
        ):
            why = f"step {progress.best_step}, which has it, was not kept"
        if why and progress.best is not None:
            run.log.say(f"note: the best validation loss is looked for anew: {why}")
            progress.best, progress.best_step, progress.since_best, progress.plateau = None, None, 0, 0

    def end_of(self, progress: Progress) -> str:
        """What is said of a run that is started again after its end."""
        more = "another --out_dir makes another run"
        if self.run.stops_early(progress):
            more = "a greater --early_stop goes on"
        elif self.run.args.lr_schedule not in FALLING:
            more = "more --max_steps or --epochs go on"
        return f"{self.run.out_dir} holds this run, and it ended after step {progress.step}: no step is made; {more}"

    def finish(self, progress: Progress) -> Path:
        """Save the last step and out_dir/final; returns the latter.

        final/ holds the last step or, with --early_stop, the one with the best validation loss. Raises
        KeyboardInterrupt, with the last step saved, when the run was interrupted before its end.
        """
        run = self.run
        self.save_step(progress)
        if not run.is_over(progress):
            run.log.say(f"stopped after step {progress.step} of {run.steps}: --resume auto goes on")
            raise KeyboardInterrupt
        path, best = run.out_dir / "final", run.best_step(progress)
        step = progress.step if best is None else best
        if run.fabric.broadcast(is_final(path, asdict(progress), step)):
            if run.fabric.is_global_zero:  # a kill may have come between final/ and the end
                with suppress(OSError), directory_lock(run.out_dir):
                    remove_leftovers(run.out_dir)
                    self.remove_old_steps(progress)
            return path
        if step == progress.step:
            self.save(path, progress, state=False)
        elif run.fabric.is_global_zero:
            saved = step_dir(run.out_dir, step)
            self.write(path, lambda directory: copy_model(saved, directory), progress, step)
        run.fabric.barrier()
        return path


def remove_old_run(run: Run) -> None:
    """Delete the run that --resume restart replaces. Call it when all is tried that could keep the new one from
    starting."""
    if run.args.resume == "restart" and run.fabric.is_global_zero:
        with directory_lock(run.out_dir):
            for path in (*all_steps(run.out_dir), run.out_dir / "final"):
                if path.exists():
                    remove_directory(path)
            (run.out_dir / "metrics.csv").unlink(missing_ok=True)
    run.fabric.barrier()


def is_final(path: Path, progress: dict[str, Any], step: int) -> bool:
    """True if final/ is there already, of a run that ended in the same way."""
    with suppress(ValueError, OSError):
        record = read_json(find_inside(path, RUN_FILE))
        check_checkpoint_dir(path, tokenizer=False)
        return record.get("progress") == progress and record.get("weights_of_step") == step
    return False


def copy_model(step: Path, directory: Path) -> None:
    """The files of a saved step that the next command loads."""
    for path in sorted(step.iterdir()):
        if path.is_file() and path.name not in (STATE_FILE, RUN_FILE):
            copy_file(find_inside(step, path.name), directory / path.name)


def identity_of(run: Run, method: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run must have in common with the run that was saved."""
    args = run.args
    names = ("lr_schedule", "warmup_steps", "weight_decay", "beta2", "grad_clip")
    optimiser = {"learning_rate": run.peak_rate, **{name: getattr(args, name) for name in names}}
    if args.lr_schedule == "wsd":  # whose run may become longer, and has the warmup of the shorter one then
        optimiser["warmup_steps"] = warmup_steps(run.steps, args)
    return {
        "method": method,
        **run.identity(),
        "optimiser": optimiser,
        "precision": str(run.dtype).removeprefix("torch.") if args.precision != "bf16-mixed" else "bf16-mixed",
        "steps": run.steps if args.lr_schedule in FALLING else None,
    }


def read_record(run: Path) -> dict[str, Any]:
    """How a run was started, with which arguments and versions and on what machine, from its newest directory.

    Raises ValueError when it is damaged.
    """
    kinds = {"command": str, "machine": str, "versions": dict, "arguments": dict}
    found = [path for path in (run / "final", *reversed(saved_steps(run))) if (path / RUN_FILE).is_file()]
    record = read_json(find_inside(found[0], RUN_FILE)) if found else {}
    for key, kind in kinds.items():
        if not isinstance(record.get(key), kind | None):
            raise ValueError(f"{found[0] / RUN_FILE} is damaged: it has no proper {key}; delete this entry.")
    return {key: record.get(key) for key in kinds} if found else {}


def require_finite(run: Run, step: int, loss: float, norm: float, batches: Sequence[Batch]) -> None:
    """Raises ValueError, naming the examples that were read and the last good step, when a loss or a gradient is no
    number."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = "loss" if not math.isfinite(loss) else "gradient"
    numbers = sorted({i for batch in batches for i in batch.examples})
    shown = ", ".join(map(str, numbers[:12])) + (", ..." if len(numbers) > 12 else "")
    raise ValueError(
        f"The {what} of step {step + 1} is {loss if what == 'loss' else norm}: it read the examples {shown} (counted "
        f"from 0) of the data; {what_remains(run.out_dir)}. Lower --learning_rate, or look at these examples."
    )


def note_validation(run: Run, progress: Progress, loss: float, lower: str) -> None:
    """Keep the loss of a validation, and write that before the first step. Raises ValueError if it is no number."""
    if not math.isfinite(loss):
        raise ValueError(
            f"The validation loss after step {progress.step} is {loss}; {what_remains(run.out_dir)}. Lower {lower}."
        )
    progress.note_validation(loss)
    if progress.step == 0:
        run.log.write(0, val_loss=loss)
