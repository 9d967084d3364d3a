"""Frozen weights in 4 or 8 bits, by bitsandbytes: QLoRA (Dettmers et al. 2023, arXiv 2305.14314) and int8.

Only the linear layers of the blocks change; embeddings, lm_head and norms do not. A weight is made dense for
a product, and once more for the gradient of the layer's input, and is never kept: y = x W^T with W the dense weight,
rounded to the compute dtype, in training and evaluation, for prompts and for single tokens alike. So a quantised model
gives the same logits however a text is split into calls, and gradients reach what was added to the weights.
"""

import copy
import functools
import logging
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_swa.linear_formats import dense_weight, is_injected, is_linear, is_plain
from lit_swa.model import GPT
from lit_swa.weight_only import Int4Linear, Int8Linear  # noqa: F401


class Mode(NamedTuple):
    quant_type: str | None  # of 4 bits; None: 8 bits
    double: bool = False  # the blocks' scales are quantised as well


MODES = {  # 4 bits per number and a float32 scale per block of them (-dq: a scale of one byte), or 8 bits per number
    "nf4": Mode("nf4"),
    "nf4-dq": Mode("nf4", double=True),
    "fp4": Mode("fp4"),
    "fp4-dq": Mode("fp4", double=True),
    "int8": Mode(None),
}
BLOCK = 64  # numbers that share a scale in 4 bits
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_request(mode: str, compute_dtype: torch.dtype = torch.float32) -> None:
    """Raises ValueError for a mode or dtype that does not exist, and when bitsandbytes is not installed."""
    if mode not in MODES:
        raise ValueError(f"There is no way to quantise called {mode!r}: choose from {', '.join(MODES)}.")
    if compute_dtype not in COMPUTE_DTYPES:
        choices = ", ".join(str(dtype).removeprefix("torch.") for dtype in COMPUTE_DTYPES)
        raise ValueError(f"Quantised layers do not compute in {compute_dtype}: choose from {choices}.")
    import_bitsandbytes()


def quantize_linears(
    model: GPT,
    mode: str,
    compute_dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
) -> int:
    """Replace the linear layers of a model's blocks by quantised ones, in place; returns how many.

    One layer at a time exists twice. The layers are frozen, biases too. LoRA and adapters are put in after this.
    device: where the quantised layers go, one after the other, so that the dense model need not fit there; None: they
        stay where they are.
    Raises ValueError for an unknown mode or dtype, when bitsandbytes is missing, and when a layer cannot be quantised;
    the model is then unchanged.
    """
    linears = quantizable_linears(model, mode, compute_dtype, device)
    count = len(linears)
    while linears:  # each layer is freed once it is replaced
        name, linear = linears.popitem()
        model.set_submodule(name, quantize_linear(linear, mode, compute_dtype, device))
    return count


def quantizable_linears(
    model: GPT, mode: str, compute_dtype: torch.dtype, device: torch.device | str | None = None
) -> dict[str, nn.Module]:
    """The linear layers of the blocks, by name, each of which can be quantised; their numbers are not looked at.

    Raises ValueError as quantize_linears does.
    """
    check_request(mode, compute_dtype)
    linears = block_linears(model)
    for name, linear in linears.items():
        check_linear(linear, mode, torch.device(device or linear.weight.device), name)
    return linears


def block_linears(model: GPT) -> dict[str, nn.Module]:
    """The linear layers of the blocks, by name. Raises ValueError if there are none."""
    blocks = model.transformer.h.named_modules(prefix="transformer.h")
    linears = {name: module for name, module in blocks if is_linear(module)}
    if not linears:
        raise ValueError("The model's blocks have no linear layers that could be quantised.")
    return linears


@torch.no_grad()
def quantize_linear(
    linear: nn.Linear,
    mode: str,
    compute_dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
) -> nn.Module:
    """A frozen, quantised layer that does what `linear` (out, in) does; the layer itself is not changed.

    compute_dtype: what products are made in. Inputs are cast to it, and outputs to the input's dtype.
    device: where the result lies, and is computed; None: where the weight is.
    Raises ValueError as quantize_linears does.
    """
    check_request(mode, compute_dtype)
    device, bitsandbytes = torch.device(device or linear.weight.device), import_bitsandbytes()
    check_linear(linear, mode, device)
    if linear.weight.is_meta:
        raise ValueError("The layer has no numbers yet: load its weight before it is quantised.")
    weight = linear.weight.detach().to(device=device, dtype=torch.float32).contiguous()
    make = _int8 if MODES[mode].quant_type is None else _four_bit
    quantized = make(bitsandbytes, weight, MODES[mode], compute_dtype)
    if linear.bias is not None:
        quantized.bias = nn.Parameter(linear.bias.detach().to(device, copy=True), requires_grad=False)
    return quantized.train(linear.training)


def check_linear(linear: nn.Module, mode: str, device: torch.device, name: str = "The layer") -> None:
    """Raises ValueError for what cannot be quantised."""
    if not is_plain(linear):
        raise ValueError(f"{name} is a {type(linear).__name__}, no plain linear layer: it may be quantised already.")
    if is_injected(linear):
        raise ValueError(f"{name} has something put into it (LoRA or an adapter): quantise before that.")
    if MODES[mode].quant_type is not None and device.type == "cpu" and linear.in_features % BLOCK:
        # bitsandbytes 0.50 quantises blocks of the flattened weight; on a CPU it reads them back as blocks of rows
        raise ValueError(
            f"{name} has {linear.in_features} inputs, and 4 bits on a CPU need a multiple of {BLOCK}: use int8."
        )


@functools.cache
def import_bitsandbytes() -> ModuleType:
    """bitsandbytes, without what it logs while it looks for optional packages. Raises ValueError when it is missing."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError(
            "Quantised weights need bitsandbytes, which is not installed: pip install bitsandbytes."
        ) from None
    finally:
        logger.setLevel(level)
    return bitsandbytes


# --------------------------------------------------------------------------------------------------------------- 4 bits


@functools.cache
def _linear_4bit(bitsandbytes: ModuleType) -> type[nn.Module]:
    """A class: Linear4bit as a LinearFormat (see linear_formats.py)."""

    class Linear4bit(bitsandbytes.nn.Linear4bit):
        differentiable = True

        @torch.no_grad()
        def dense_weight(self) -> Tensor:
            state = copy.copy(self.weight.quant_state)
            state.dtype = torch.float32
            return bitsandbytes.functional.dequantize_4bit(self.weight.data, state)

        def weight_bytes(self) -> int:
            state = self.weight.quant_state
            scales = state.absmax.nbytes + (0 if state.state2 is None else state.state2.absmax.nbytes)
            return self.weight.data.nbytes + scales

    return Linear4bit


def _four_bit(bitsandbytes: ModuleType, weight: Tensor, mode: Mode, compute_dtype: torch.dtype) -> nn.Module:
    """A Linear4bit without a bias."""
    kind = {"compress_statistics": mode.double, "quant_type": mode.quant_type}
    options = kind | {"compute_dtype": compute_dtype, "bias": False, "device": "meta"}
    linear = _linear_4bit(bitsandbytes)(weight.size(1), weight.size(0), **options)
    linear.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **kind).to(weight.device)
    linear.weight.quant_state.dtype = compute_dtype  # else the backward would use float32, as it was before
    # On CPUs with AVX512-BF16 the first call in eval mode would repack the weight for products in bfloat16, whatever
    # the compute dtype is. A repacked weight gives no gradient, and only some sizes can be repacked.
    linear.support_avx512bf16_for_cpu = False
    return linear


# --------------------------------------------------------------------------------------------------------------- 8 bits


class Int8Product(torch.autograd.Function):
    """x (..., in) times W^T for a W (out, in) in 8 bits, which is dense only for as long as a product takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _dense_rows(weight, scale, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return grad @ _dense_rows(weight, scale, grad.dtype), None, None


def _dense_rows(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The dequantised rows (out, in) of int8; scale (out,) is the largest absolute number of each row."""
    return weight.to(dtype).mul_((scale / 127)[:, None])


@functools.cache
def _linear_8bit(bitsandbytes: ModuleType) -> type[nn.Module]:
    """A class: Linear8bitLt as a LinearFormat (see linear_formats.py) that keeps to the activations it is given.

    bitsandbytes' own forward rounds them to 8 bits too (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339): on a GPU
    always, on a CPU in eval mode only, where training and evaluation would then disagree.
    """

    class Linear8bit(bitsandbytes.nn.Linear8bitLt):
        compute_dtype = torch.float32
        differentiable = True

        def forward(self, x: Tensor) -> Tensor:
            y = Int8Product.apply(x.to(self.compute_dtype), self.weight.data, self.weight.SCB)
            return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)

        @torch.no_grad()
        def dense_weight(self) -> Tensor:
            return _dense_rows(self.weight.data, self.weight.SCB.to(torch.float32), torch.float32)

        def weight_bytes(self) -> int:
            return self.weight.data.nbytes + self.weight.SCB.nbytes

        def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
            super()._apply(fn, recurse)
            self.weight.SCB = self.weight.SCB.to(self.weight.device)
            return self

    return Linear8bit


def _int8(bitsandbytes: ModuleType, weight: Tensor, mode: Mode, compute_dtype: torch.dtype) -> nn.Module:
    """Linear8bit, without a bias: each row times 127 / its largest absolute value, rounded."""
    options = {"bias": False, "has_fp16_weights": False, "device": "meta"}
    linear = _linear_8bit(bitsandbytes)(weight.size(1), weight.size(0), **options)
    scale = weight.abs().amax(dim=1)
    rows = (weight * (127 / scale.clamp(min=torch.finfo(torch.float32).tiny))[:, None]).round().to(torch.int8)
    linear.weight = bitsandbytes.nn.Int8Params(rows, requires_grad=False, has_fp16_weights=False, SCB=scale)
    linear.compute_dtype = compute_dtype
    return linear


# ------------------------------------------------------------------------------------------------------------- rounding


@torch.no_grad()
def round_linears(model: GPT, mode: str) -> int:
    """Give the linear layers of a model's blocks the numbers that they would have if quantised, and leave them dense;
    returns how many. Raises ValueError as quantize_linears does."""
    linears = quantizable_linears(model, mode, torch.float32)
    for linear in linears.values():
        linear.weight.data = dense_weight(quantize_linear(linear, mode)).to(linear.weight.dtype)
    return len(linears)
