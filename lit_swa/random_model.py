"""Models of random weights, to measure speed and memory with: they do not depend on the weights' values."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lit_swa.config import Config
from lit_swa.formats.checkpoint import load_model
from lit_swa.formats.download import find_checkpoint
from lit_swa.formats.hugging_face import empty_model
from lit_swa.model import GPT
from lit_swa.parallel import ALONE, Rank, connect, shrink
from lit_swa.quantize import layer_mode, pick_group, quantizable_linears, quantize_linear, replace_linear


def random_model(
    config: Config,
    dtype: torch.dtype,
    device: str | torch.device,
    quantize: str | None = None,
    group_size: int | None = None,
    rank: Rank = ALONE,
) -> GPT:
    """A model of random weights, in eval mode, or one rank's part of it. Only one layer is dense at a time where they
    are quantised, so a model may be made that would not fit in `dtype`.

    quantize, group_size: as in lit_swa.quantize.quantize_linears, which says what it raises.
    """
    model, linears = empty_model(replace(config)).to(dtype).eval(), {}
    if quantize is not None:  # the groups are those of the whole layers
        linears = quantizable_linears(model, quantize, dtype, device, group_size)
        group_size = pick_group(linears, quantize, group_size)
    if rank.size > 1:
        shrink(model, rank)
    for name in [name for name, _ in model.named_modules()]:
        module = model.get_submodule(name)
        if hasattr(module, "reset_parameters"):
            module.to_empty(device=device, recurse=False)
            module.reset_parameters()
        if linears.pop(name, None) is not None:
            replace_linear(model, name, quantize_linear(module, layer_mode(name, quantize), dtype, None, group_size))
    model.tie_weights()
    model.rope.to(device)
    if rank.size > 1:
        connect(model, rank)
    return model


def named_or_loaded(
    name: str | None,
    checkpoint_dir: Path | None,
    dtype: str,
    device: str,
    quantize: str | None = None,
    group_size: int | None = None,
    **overrides: Any,
) -> GPT:
    """A model to measure: of a named shape with random weights, or, where there is no name, a checkpoint's.

    checkpoint_dir: None for the model that is downloaded once; the other arguments, and what is raised, are those of
        lit_swa.checkpoint.load_model.
    """
    if name is not None:
        return random_model(Config.from_name(name, **overrides), getattr(torch, dtype), device, quantize, group_size)
    found, how = find_checkpoint(checkpoint_dir), {"quantize": quantize, "group_size": group_size}
    return load_model(found, dtype, device, **how, **overrides)
