"""What a run left on the disk: its saved steps, and the step to go on from, checked before anything is made of it.

A saved step that was damaged, or that belongs to another run, ends in a ValueError of one sentence.
"""

import math
import re
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from lit_swa.formats.files import LazyTensor, find_inside, open_safetensors, read_json
from lit_swa.training.distribution import copy_into, trained_parameters
from lit_swa.training.loop import Progress

STATE_FILE, RUN_FILE = "state.safetensors", "run.json"
STEP_NAME = re.compile(r"step-([0-9]{6,12})")
NEW_IN_IDENTITY = ("base", "model", "windows", "weights")  # runs that were saved before they belonged to it go on
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of a weight
MUON_MOMENTS = ("momentum_buffer",)  # and what Muon does


# ---------------------------------------------------------------------------------------------------- steps on the disk


def step_dir(out_dir: Path, step: int) -> Path:
    return out_dir / f"step-{step:06d}"


def saved_steps(out_dir: Path) -> list[Path]:
    """The complete steps of a run, oldest first."""
    return [p for p in all_steps(out_dir) if (p / RUN_FILE).is_file() and (p / STATE_FILE).is_file()]


def all_steps(out_dir: Path) -> list[Path]:
    """Every directory with the name of a step, oldest first."""
    found = [(int(match[1]), path) for path in out_dir.glob("step-*") if (match := STEP_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def half_deleted_steps(out_dir: Path) -> list[Path]:
    """What is left of steps that were being deleted when their run was killed."""
    return [p for p in all_steps(out_dir) if not (p / RUN_FILE).is_file() or not any(p.glob("*.safetensors"))]


def trained_prompt_style(directory: Path) -> str | None:
    """The prompt style that the model or adapter in a directory was trained on, where its run.json says so."""
    if not (directory / RUN_FILE).exists():
        return None
    style = read_json(find_inside(directory, RUN_FILE)).get("prompt_style")
    return style if isinstance(style, str) and len(style) < 100 else None


def find_run(resume: str, out_dir: Path) -> Path | None:
    """The step to go on from, None to start anew. resume: auto, never or restart (the new run replaces the old).

    Raises ValueError when a run is there and this one must not touch it, or cannot go on.
    """
    require_no_file(out_dir)
    steps, final = saved_steps(out_dir), out_dir / "final"
    if resume == "restart" or not steps and not final.exists():
        return None
    if resume == "never":
        there = steps[-1].name if steps else "final"
        raise ValueError(
            f"{out_dir} holds a run ({there}): --resume auto goes on with it, --resume restart deletes it, or choose "
            "another --out_dir."
        )
    if not steps and not holds_no_step(final):
        raise ValueError(f"{out_dir} has a final model and no step to go on from: choose another --out_dir.")
    return steps[-1] if steps else None


def require_no_file(out_dir: Path) -> None:
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"{out_dir} is a file: give a directory as --out_dir.")


def holds_no_step(final: Path) -> bool:
    """True for the result of a run that was to make no step: one that makes some begins there, and replaces it."""
    with suppress(ValueError, OSError, KeyError, TypeError):
        return read_json(find_inside(final, RUN_FILE))["progress"]["step"] == 0
    return False


def what_remains(out_dir: Path) -> str:
    """For the message of a run that fails."""
    kept = saved_steps(out_dir)
    return f"{kept[-1]} is untouched" if kept else "nothing was saved yet"


# ----------------------------------------------------------------------------------------------------- what a step says


def damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path} is damaged: {what}; delete it to go on from the step before, if there is one, or start anew with "
        "--resume restart."
    )


def read_progress(content: object, path: Path) -> Progress:
    """How far the run was when the step in `path` was saved."""
    if not isinstance(content, dict) or content.keys() - {f.name for f in fields(Progress)}:
        raise damaged(path, f"{RUN_FILE} has no proper progress")
    for f in fields(Progress):
        value = content.get(f.name, None if f.name == "best_step" else "missing")  # older versions had no best_step
        if value is None and f.name in ("best", "best_step"):
            continue
        kinds = (int,) if f.type in (int, int | None) else (int, float)
        fits = type(value) in kinds and math.isfinite(value) and value >= 0
        if not fits or f.name == "scale" and not 0 < value <= 1:
            raise damaged(path, f"{RUN_FILE} has no proper {f.name} ({reprlib.repr(value)})")
    progress = Progress(**content)
    if step_dir(path.parent, progress.step) != path:
        raise damaged(path, f"{RUN_FILE} is of step {progress.step}")
    return progress


def compare_identity(before: object, now: Mapping[str, Any], path: Path) -> list[str]:
    """Raises ValueError when a step belongs to another run. Returns what it does not say: an older version wrote it."""
    if not isinstance(before, dict) or now.keys() - before.keys() - set(NEW_IN_IDENTITY):
        raise damaged(path, f"{RUN_FILE} does not say which run it is of")
    if isinstance(values := before.get("optimiser"), list):  # of older versions: without names, as it was typed
        named = zip(now["optimiser"].items(), values, strict=False)
        before = before | {"optimiser": {name: value if was is None else was for (name, value), was in named}}
    for key, value in now.items():
        if key in before and before[key] != value:
            raise ValueError(
                f"{path} differs in its {key} ({difference(before[key], value)}): use the same arguments and data as "
                "before, or another --out_dir."
            )
    return [key for key in now if key not in before]


def difference(before: object, now: object) -> str:
    """What differs between two values, by its name where they have names."""
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in {**now, **before} if key not in before or key not in now or before[key] != now[key])
        a, b = before.get(key, "not given"), now.get(key, "not given")
        return difference(a, b) if isinstance(a, dict) and isinstance(b, dict) else f"{key[:60]}={difference(a, b)}"
    return ", now ".join(value[:60] if isinstance(value, str) else reprlib.repr(value)[:60] for value in (before, now))


# -------------------------------------------------------------------------------------------------- weights and moments


def moments_of(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, tuple[str, ...]]:
    """What is kept of each weight."""
    groups = [(g["params"], MUON_MOMENTS if "momentum" in g else MOMENTS) for g in optimizer.param_groups]
    return {p: keys for params, keys in groups for p in params}


def open_state(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> dict[str, LazyTensor]:
    """The tensors of the step in `path`, in name, shape and kind those that trained_state takes of this model."""
    try:
        tensors = open_safetensors(find_inside(path, STATE_FILE))
    except ValueError:
        raise damaged(path, f"{STATE_FILE} cannot be read") from None
    trained, moments, shapes = trained_parameters(model), moments_of(optimizer), {}
    saved = {name.removeprefix("weight.") for name in tensors if name.startswith("weight.")}
    if other := sorted(trained.keys() ^ saved):
        raise ValueError(
            f"{path} was saved with other trained weights ({other[0][:80]}): use the same arguments as before."
        )
    for name, p in trained.items():
        if tensors[f"weight.{name}"].shape != tuple(p.shape):
            raise ValueError(f"{path} has {name} in another shape: use the same arguments as before.")
        shapes[f"weight.{name}"] = tuple(p.shape)
        if any(f"{key}.{name}" in tensors for key in moments[p]):  # a weight that never had a gradient has none
            shapes |= {f"{key}.{name}": () if key == "step" else tuple(p.shape) for key in moments[p]}
    for name in sorted(tensors.keys() | shapes.keys()):
        fits = name in tensors and tensors[name].shape == shapes.get(name) and tensors[name].dtype.is_floating_point
        if not fits:
            raise damaged(path, f"{STATE_FILE} has no proper {name[:80]!r}")
    return tensors


@torch.no_grad()
def restore(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Put back the weights and moments of the step in `path`. Raises ValueError when they are another model's, or
    damaged."""
    tensors, moments = open_state(model, optimizer, path), moments_of(optimizer)

    def read(name: str) -> torch.Tensor:
        value = tensors[name].load()
        if not value.isfinite().all() or name.startswith(("step.", "exp_avg_sq.")) and (value < 0).any():
            raise damaged(path, f"{STATE_FILE} has numbers in {name[:80]!r} that cannot be")
        return value

    count_on_device = optimizer.param_groups[-1].get("fused")  # where AdamW counts its steps
    for name, p in trained_parameters(model).items():
        copy_into(p, read(f"weight.{name}"))
        for key in moments[p] if f"{moments[p][0]}.{name}" in tensors else ():
            counter = torch.zeros((), device=p.device if count_on_device else "cpu")
            held = counter if key == "step" else torch.zeros_like(p)
            copy_into(held, read(f"{key}.{name}"))
            optimizer.state[p][key] = held
