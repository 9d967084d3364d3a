"""Frozen weights in 4 or 8 bits: the modes, and how the linear layers of a built GPT are replaced.

int8 and int4 (weight_only.py) are this project's own, for inference and for LoRA beside them; they take lm_head too,
always in 8 bits, and an lm_head that shared wte's weight gets its own. They hold experts (expert_formats.py), but leave
the layers that choose among them alone. nf4 and fp4 (nf4.py) are those of QLoRA, by bitsandbytes; they leave lm_head
alone, and know no experts. Embeddings and norms do not change. A weight is made dense for a product and
never kept: y = x W^T with W the dense weight, rounded to the compute dtype, in training and evaluation, for prompts and
for single tokens alike. So a quantised model gives the same logits however a text is split into calls, and gradients
reach what was added to the weights.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from lit_swa import nf4
from lit_swa.expert_formats import each_expert
from lit_swa.hqq import hqq
from lit_swa.linear_formats import CHOOSING, dense_weight, is_experts, is_injected, is_plain, weighty_layers
from lit_swa.model import GPT
from lit_swa.moe import Experts
from lit_swa.weight_only import GROUP_SIZES, Int4Linear, Int8Linear, check_group, round_groups

FOUR_BITS: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {  # what chooses an Int4Linear's buffers
    "int4": round_groups,
    "int4-hqq": hqq,
}
WEIGHT_ONLY = ("int8", *FOUR_BITS)
MODES = (*WEIGHT_ONLY, *nf4.MODES)  # each from the weights alone; GPTQ needs a text as well, see gptq.py
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD = "lm_head"


def check_request(mode: str, compute_dtype: torch.dtype = torch.float32, group_size: int | None = None) -> None:
    """Raises ValueError for a mode, dtype or group that does not exist, and when a package is missing."""
    if mode not in MODES:
        raise ValueError(f"There is no way to quantise called {mode!r}: choose from {', '.join(MODES)}.")
    if compute_dtype not in COMPUTE_DTYPES:
        choices = ", ".join(str(dtype).removeprefix("torch.") for dtype in COMPUTE_DTYPES)
        raise ValueError(f"Quantised layers do not compute in {compute_dtype}: choose from {choices}.")
    if group_size is not None and mode not in FOUR_BITS:
        raise ValueError(f"{mode} has no groups of a size to choose: leave group_size out, or use int4 or int4-hqq.")
    if mode in nf4.MODES:
        nf4.import_bitsandbytes()


def quantize_linears(
    model: GPT,
    mode: str,
    compute_dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    group_size: int | None = None,
) -> int:
    """Replace the linear layers of a model, and its stacks of experts, by quantised ones, in place; returns how many.

    One layer, or stack, at a time exists twice. The layers are frozen, biases too. LoRA and adapters are put in after
    this.
    device: where the quantised layers go, one after the other, so that the dense model need not fit there; None: they
        stay where they are.
    group_size: inputs that share a scale in int4; None: see pick_group.
    Raises ValueError for an unknown mode or dtype, when bitsandbytes is missing, and when a layer cannot be quantised;
    the model is then unchanged.
    """
    linears = quantizable_linears(model, mode, compute_dtype, device, group_size)
    group_size, count = pick_group(linears, mode, group_size), len(linears)
    while linears:  # each layer is freed once it is replaced
        name, linear = linears.popitem()
        replace_linear(model, name, quantize_linear(linear, layer_mode(name, mode), compute_dtype, device, group_size))
    return count


def quantizable_linears(
    model: GPT,
    mode: str,
    compute_dtype: torch.dtype,
    device: torch.device | str | None = None,
    group_size: int | None = None,
) -> dict[str, nn.Module]:
    """The linear layers and stacks of experts that a mode replaces, by name, each of which can be quantised; their
    numbers are not looked at.

    Raises ValueError as quantize_linears does.
    """
    check_request(mode, compute_dtype, group_size)
    linears = block_linears(model) | ({HEAD: model.lm_head} if mode in WEIGHT_ONLY else {})
    group_size = pick_group(linears, mode, group_size)
    for name, linear in linears.items():
        check_linear(linear, layer_mode(name, mode), torch.device(device or linear.weight.device), group_size, name)
    return linears


def block_linears(model: GPT) -> dict[str, nn.Module]:
    """The linear layers and experts of the blocks, by name. Raises ValueError if there are none."""
    linears = {f"transformer.h.{name}": layer for name, layer in weighty_layers(model.transformer.h).items()}
    if not linears:
        raise ValueError("The model's blocks have no linear layers that could be quantised: leave it as it is.")
    return linears


def layer_mode(name: str, mode: str) -> str:
    """How the layer `name` is held where the blocks are held in `mode`."""
    return "int8" if name == HEAD else mode


def is_replaced(name: str, shape: Sequence[int], mode: str) -> bool:
    """Whether the weight of this name is one that a mode quantises."""
    layer = name.split(".")[-2]
    held = name.startswith("transformer.h.") and layer not in CHOOSING and not layer.startswith("norm_")
    return len(shape) > 1 and name.endswith(".weight") and (held or (layer == HEAD and mode in WEIGHT_ONLY))


def quantized_bytes(shape: Sequence[int], mode: str) -> int:
    """Bytes that a weight (..., out, in) takes at least, in the largest groups that there are."""
    out_features, in_features = math.prod(shape[:-1]), shape[-1]
    if mode == "int8":
        return out_features * (in_features + 4)
    return out_features * in_features // 2 + 4 * out_features * (in_features // GROUP_SIZES[-1])


def pick_group(linears: dict[str, nn.Module], mode: str, group_size: int | None) -> int | None:
    """The group_size that is given, or the largest that divides the inputs of every layer; None where mode has none."""
    if mode not in FOUR_BITS or group_size is not None:
        return group_size
    inputs = [linear.in_features for name, linear in linears.items() if name != HEAD]
    return next((size for size in reversed(GROUP_SIZES) if all(n % size == 0 for n in inputs)), GROUP_SIZES[0])


def replace_linear(model: GPT, name: str, linear: nn.Module) -> None:
    """Put a quantised layer in a layer's place. A tied lm_head shares wte's weight no more."""
    model.set_submodule(name, linear)
    if name == HEAD and model.config.tie_embeddings:
        model.config.tie_embeddings, linear.was_tied = False, True


@torch.no_grad()
def quantize_linear(
    linear: nn.Linear | Experts,
    mode: str,
    compute_dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    group_size: int | None = None,
) -> nn.Module:
    """A frozen, quantised layer that does what `linear` (out, in), or a stack of experts, does; it is not changed.

    compute_dtype: what products are made in. Inputs are cast to it, and outputs to the input's dtype.
    device: where the result lies, and is computed; None: where the weight is.
    group_size: of int4; None: the largest that divides the layer's inputs.
    Raises ValueError as quantize_linears does.
    """
    check_request(mode, compute_dtype)
    device = torch.device(device or linear.weight.device)
    group_size = pick_group({"": linear}, mode, group_size)
    check_linear(linear, mode, device, group_size)
    if linear.weight.is_meta:
        raise ValueError("The layer has no numbers yet: load its weight before it is quantised.")
    if is_experts(linear):
        how = {"compute_dtype": compute_dtype, "device": device, "group_size": group_size}
        return each_expert(linear, functools.partial(quantize_linear, mode=mode, **how))
    weight = linear.weight.detach().to(device=device, dtype=torch.float32).contiguous()
    bias = None if linear.bias is None else linear.bias.detach().to(device, copy=True)
    if mode in nf4.MODES:
        return nf4.four_bit(weight, bias, mode, compute_dtype).train(linear.training)
    require_finite(weight)
    if mode == "int8":
        quantized = Int8Linear.from_weight(weight, bias)
    else:
        quantized = Int4Linear.from_codes(*FOUR_BITS[mode](weight, group_size), bias)
    quantized.compute_dtype = compute_dtype
    return quantized.train(linear.training)


def require_finite(weight: Tensor) -> None:
    if not bool(weight.isfinite().all()):
        raise ValueError("The layer's weight holds NaN or infinity: quantise a checkpoint whose weights are finite.")


def check_linear(
    linear: nn.Module, mode: str, device: torch.device, group_size: int | None = None, name: str = "The layer"
) -> None:
    """Raises ValueError for what cannot be quantised."""
    if not (is_plain(linear) or type(linear) is Experts):
        raise ValueError(f"{name} is a {type(linear).__name__}, no plain linear layer: it may be quantised already.")
    if mode in nf4.MODES and is_experts(linear):
        raise ValueError(f"{name} holds experts, which {mode} has no form for: use int8 or int4.")
    if is_injected(linear):
        raise ValueError(f"{name} has something put into it (LoRA or an adapter): quantise before that.")
    if mode in FOUR_BITS:
        check_group(linear.in_features, group_size, name)
    if mode in nf4.MODES and device.type == "cpu" and linear.in_features % nf4.BLOCK:
        # bitsandbytes 0.50 quantises blocks of the flattened weight; on a CPU it reads them back as blocks of rows
        raise ValueError(
            f"{name} has {linear.in_features} inputs, and {mode} on a CPU needs a multiple of {nf4.BLOCK}: use int8."
        )


@torch.no_grad()
def round_linears(model: GPT, mode: str) -> int:
    """Give the linear layers of a model the numbers that they would have if quantised, and leave them dense; returns
    how many. Raises ValueError as quantize_linears does."""
    linears = quantizable_linears(model, mode, torch.float32)
    group_size = pick_group(linears, mode, None)
    for name, linear in linears.items():
        rounded = dense_weight(quantize_linear(linear, layer_mode(name, mode), group_size=group_size))
        linear.weight = nn.Parameter(rounded.to(linear.weight.dtype), requires_grad=linear.weight.requires_grad)
    model.config.tie_embeddings &= HEAD not in linears
    return len(linears)
