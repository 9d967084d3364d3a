"""Saving and resuming: out_dir/step-N, whole or not at all, from which a run goes on to the same losses.

A saved step holds what the next command loads (a checkpoint or an adapter), state.safetensors with every trained weight
and its moments in float32, and run.json with the arguments and the progress.
"""

import json
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lit_swa.formats.files import (
    LOCK_NAME,
    TEMPORARY,
    LazyTensor,
    directory_lock,
    find_inside,
    open_safetensors,
    read_json,
    remove_leftovers,
    sync_directory,
    write_json,
    write_safetensors,
)
from lit_swa.training.distribution import copy_into, gather, reshard, trained_parameters, whole_weights
from lit_swa.training.loop import Batch, Progress, Run
from lit_swa.utils import describe_machine, memory_in_use

STATE_FILE, RUN_FILE = "state.safetensors", "run.json"


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
def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, LazyTensor], where: Path) -> None:
    """Put back what trained_state took. Raises ValueError when it is another model's."""
    trained = trained_parameters(model)
    saved = {name.removeprefix("weight.") for name in tensors if name.startswith("weight.")}
    if other := sorted(trained.keys() ^ saved):
        raise ValueError(
            f"{where} was saved with other trained weights ({other[0]}): use the same arguments as before."
        )
    count_on_device = optimizer.param_groups[0].get("fused")  # where AdamW counts its steps
    for name, p in trained.items():
        if tuple(p.shape) != tensors[f"weight.{name}"].shape:
            raise ValueError(f"{where} has {name} in another shape: use the same arguments as before.")
        copy_into(p, tensors[f"weight.{name}"].load())
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"{key}.{name}" in tensors:
                counter = torch.zeros((), device=p.device if count_on_device else "cpu")
                held = counter if key == "step" else torch.zeros_like(p)
                copy_into(held, tensors[f"{key}.{name}"].load())
                optimizer.state[p][key] = held


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
        self.saved = 0  # the last step that was

    def save_step(self, progress: Progress) -> None:
        """out_dir/step-N, unless it is saved already."""
        if self.saved < progress.step:
            self.save(f"step-{progress.step:06d}", progress)
            self.saved = progress.step

    def save(self, name: str, progress: Progress, state: bool = True) -> Path:
        """out_dir/name, with state.safetensors if a run may go on from it. Every process must call it; the first
        writes."""
        out_dir, fabric = self.run.out_dir, self.run.fabric
        path, tensors = out_dir / name, trained_state(self.model, self.optimizer) if state else {}
        with whole_weights(self.model, keep=fabric.is_global_zero):
            if fabric.is_global_zero:
                self.write(path, tensors, progress)
        fabric.barrier()
        return path

    def write(self, path: Path, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        """The directory, under another name until it is whole. Older steps go after that."""
        out_dir, temporary = path.parent, path.parent / f".{path.name}{TEMPORARY}"
        with directory_lock(out_dir):
            remove_leftovers(out_dir)
            temporary.mkdir()
            self.save_model(temporary)
            if tensors:
                lazy = {n: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()}
                write_safetensors(temporary / STATE_FILE, lazy)
                open_safetensors(temporary / STATE_FILE)
            write_json(temporary / RUN_FILE, self.record(progress))
            (temporary / LOCK_NAME).unlink(missing_ok=True)
            if path.exists():
                shutil.rmtree(path)
            temporary.rename(path)
            sync_directory(out_dir)
            for old in saved_steps(out_dir)[: -self.run.args.keep_last]:
                shutil.rmtree(old, ignore_errors=True)

    def record(self, progress: Progress) -> dict[str, Any]:
        return {
            "command": "python " + shlex.join(sys.argv),
            "machine": describe_machine(str(self.run.fabric.device)),
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
            "memory": memory_in_use(),
            "arguments": self.run.args.as_json(),
            "identity": self.identity,
            "progress": asdict(progress),
        }

    def resume(self) -> Progress:
        """Load weights, moments and progress of the run in out_dir, if there is one and --resume says so.

        Raises ValueError when there is one and --resume does not say what to do with it, or when it is another run.
        """
        path = find_run(self.run.args.resume, self.run.out_dir)
        if path is None:
            self.run.log.rewind(-1)  # rows of a run that ended before it saved anything
            return Progress()
        record = read_json(find_inside(path, RUN_FILE))
        for key, value in self.identity.items():
            if value != (before := record["identity"].get(key)):
                raise ValueError(
                    f"{path} differs in its {key} ({str(before)[:60]}, now {str(value)[:60]}): use the same "
                    "arguments and data as before, or another --out_dir."
                )
        progress = Progress(**record["progress"])
        if progress.step > self.run.steps:
            raise ValueError(f"{path} is beyond the {self.run.steps} steps of this run: raise --max_steps or --epochs.")
        restore(self.model, self.optimizer, open_safetensors(find_inside(path, STATE_FILE)), path)
        self.run.log.rewind(progress.step)
        self.run.log.say(f"going on from {path}")
        self.saved = progress.step
        return progress

    def finish(self, progress: Progress) -> Path:
        """Save the last step and out_dir/final; returns the latter.

        Raises KeyboardInterrupt, with the last step saved, when the run was interrupted before its end.
        """
        self.save_step(progress)
        if progress.step < self.run.steps and not self.run.stops_early(progress):
            self.run.log.say(f"stopped after step {progress.step} of {self.run.steps}: --resume auto goes on")
            raise KeyboardInterrupt
        return self.save("final", progress, state=False)


def identity_of(run: Run, method: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run must have in common with the run that was saved."""
    args = run.args
    names = ("lr_schedule", "warmup_steps", "weight_decay", "beta2", "grad_clip")
    return {
        "method": method,
        **run.feed.identity,
        "optimiser": [run.peak_rate, *(getattr(args, name) for name in names)],
        "precision": str(run.dtype).removeprefix("torch.") if args.precision != "bf16-mixed" else "bf16-mixed",
        "steps": run.steps if args.lr_schedule == "cosine" else None,
    }


def saved_steps(out_dir: Path) -> list[Path]:
    """The complete steps of a run, oldest first."""
    found = [p for p in out_dir.glob("step-*") if (p / RUN_FILE).is_file() and (p / STATE_FILE).is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")) if p.name[5:].isdigit() else -1)


def find_run(resume: str, out_dir: Path) -> Path | None:
    """The step to go on from, None to start anew. resume: auto, never or restart (which deletes the run that is there).

    Raises ValueError when a run is there and this one must not touch it, or cannot go on.
    """
    steps, final = saved_steps(out_dir), out_dir / "final"
    if not steps and not final.exists():
        return None
    if resume == "never":
        there = steps[-1].name if steps else "final"
        raise ValueError(
            f"{out_dir} holds a run ({there}): --resume auto goes on with it, --resume restart deletes it, or choose "
            "another --out_dir."
        )
    if resume == "restart":
        for path in (*steps, final):
            shutil.rmtree(path, ignore_errors=True)
        (out_dir / "metrics.csv").unlink(missing_ok=True)
        return None
    if not steps:
        raise ValueError(f"{out_dir} has a final model and no step to go on from: choose another --out_dir.")
    return steps[-1]


def read_record(run: Path) -> dict[str, Any]:
    """How a run was started, with which arguments and versions and on what machine, from its newest directory."""
    found = [path for path in (run / "final", *reversed(saved_steps(run))) if (path / RUN_FILE).is_file()]
    record = read_json(find_inside(found[0], RUN_FILE)) if found else {}
    return {key: record.get(key) for key in ("command", "machine", "versions", "arguments")} if found else {}


def require_finite(run: Run, step: int, loss: float, norm: float, batches: Sequence[Batch]) -> None:
    """Raises ValueError, naming the examples that were read and the last good step, when a loss or a gradient is no
    number."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = "loss" if not math.isfinite(loss) else "gradient"
    numbers = sorted({i for batch in batches for i in batch.examples})
    shown = ", ".join(map(str, numbers[:12])) + (", ..." if len(numbers) > 12 else "")
    kept = saved_steps(run.out_dir)
    remains = f"{kept[-1]} is untouched" if kept else "nothing was saved yet"
    raise ValueError(
        f"The {what} of step {step + 1} is {loss if what == 'loss' else norm}: it read the examples {shown} (counted "
        f"from 0) of the data; {remains}. Lower --learning_rate, or look at these examples."
    )
