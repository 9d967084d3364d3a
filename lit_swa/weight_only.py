"""Linear layers that hold their weight as whole numbers with a scale: int8 by rows, int4 by groups of inputs.

Only weights are rounded; activations keep their dtype. Both classes are a LinearFormat (see linear_formats.py): LoRA,
adapters, merging and saving work with them. They compute y = x W^T for the dense weight W that their buffers describe,
rounded to x's dtype, and gradients reach x. A dense weight exists for as long as a product takes.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_swa.fast_attention import as_one_kernel
from lit_swa.linear_formats import gpu_kernels

RUN = 32  # inputs whose 4-bit codes are packed together, into four words
GROUP_SIZES = (32, 64, 128)  # inputs that share a scale and an offset in 4 bits
FEW_ROWS_CPU = 16  # products with so many rows read the weight as it is stored; from about there on a dense one pays
LINE = 64  # bytes of a cache line


class DenseProduct(torch.autograd.Function):
    """x (..., in) times W^T for a weight that is dense only during the product, and once more during the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dequantize: Callable[..., Tensor], *stored: Tensor) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.dequantize = dequantize
        return F.linear(x, dequantize(*stored, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stored = ctx.saved_tensors
        return grad @ ctx.dequantize(*stored, grad.dtype), None, *(None for _ in stored)


class WeightOnlyLinear(nn.Module):
    """What Int8Linear and Int4Linear share. Nothing in them is trained: all that they hold are buffers.

    compute_dtype: what products are made in. Inputs are cast to it, outputs to the input's dtype. None: the input's.
    """

    differentiable = True
    scale_name: str  # of the buffer that belongs to `weight` and keeps its dtype, whatever the model is cast to
    dequantize: Callable[..., Tensor]  # (weight, scale, dtype) -> (out, in)

    def __init__(self, in_features: int, out_features: int, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", weight)
        self.register_buffer(self.scale_name, scale)
        self.register_buffer("bias", bias)
        self.compute_dtype: torch.dtype | None = None
        self._for_cpu: tuple[Tensor, Tensor] | None = None  # the arguments of ATen's product, made when first used

    def stored(self) -> tuple[Tensor, Tensor]:
        return self.weight, getattr(self, self.scale_name)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        y = self.product(x.to(self.compute_dtype or x.dtype))
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x W^T, without the bias, in x's dtype."""
        if torch.is_grad_enabled() and x.requires_grad:
            return DenseProduct.apply(x, self.dequantize, *self.stored())
        rows = x.numel() // self.in_features
        if x.is_cuda and (kernels := gpu_kernels()) and kernels.knows(rows, self):
            with torch.cuda.device(x.device):  # where Triton launches
                return kernels.product(x, self, bias=False)
        if rows <= FEW_ROWS_CPU and self.fits_cpu(x):
            return self.cpu_product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return F.linear(x, self.dequantize(*self.stored(), x.dtype))

    def fits_cpu(self, x: Tensor) -> bool:
        """True where ATen's product for CPUs takes the shapes and is faster than a dense weight: not in float32."""
        return x.device.type == "cpu" and x.dtype == torch.bfloat16 and not torch.compiler.is_compiling()

    def cpu_product(self, x: Tensor) -> Tensor:
        """ATen's product of x (N, in), bfloat16, with the weight as it is stored."""
        raise NotImplementedError

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        return self.dequantize(*self.stored(), torch.float32)

    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.stored())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves and casts. The scales keep their dtype, in which the codes were chosen."""
        scale = getattr(self, self.scale_name)
        super()._apply(fn, recurse)
        self._for_cpu = None
        if getattr(self, self.scale_name).dtype != scale.dtype:
            setattr(self, self.scale_name, scale.to(self.weight.device))
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


# --------------------------------------------------------------------------------------------------------------- 8 bits


def dense_int8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., out, in) of int8 rows and their scales (..., out)."""
    return as_one_kernel(scaled_int8, weight, scale, dtype)


def scaled_int8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).mul_(scale.unsqueeze(-1))


class Int8Linear(WeightOnlyLinear):
    """W[n, k] = weight[n, k] * scale[n].

    Buffers: weight (out, in) int8, scale (out,) float32, bias (out,) or None.
    """

    kernel_format, scale_name = "int8", "scale"
    dequantize = staticmethod(dense_int8)

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, device: torch.device | str | None = None
    ) -> None:
        weight = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        scale = torch.zeros(out_features, dtype=torch.float32, device=device)
        super().__init__(in_features, out_features, weight, scale, _empty_bias(out_features, bias, device))

    @classmethod
    def from_weight(cls, weight: Tensor, bias: Tensor | None = None) -> "Int8Linear":
        """Each row of a weight (out, in), in float32, by its largest absolute value."""
        return _filled(cls(weight.size(1), weight.size(0), device="meta"), *round_rows(weight), bias)

    def fits_cpu(self, x: Tensor) -> bool:
        return self.in_features % 32 == 0 and super().fits_cpu(x)  # of other rows, torch 2.13 reads beyond the ends

    def cpu_product(self, x: Tensor) -> Tensor:
        if self._for_cpu is None:
            self._for_cpu = at_line(self.weight), self.scale.to(torch.bfloat16)
        return torch._weight_int8pack_mm(at_line(x), *self._for_cpu)


def at_line(x: Tensor) -> Tensor:
    """x contiguous and at the start of a cache line, where torch 2.13 expects an int8 product's operands: it ends the
    process otherwise. What is mapped from a file may begin anywhere."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % LINE else x


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (out, in) and scales (out,) of a weight in float32: the largest number of a row becomes +-127."""
    largest = weight.abs().amax(dim=1)
    codes = (weight * (127 / largest.clamp(min=torch.finfo(torch.float32).tiny))[:, None]).round()
    return codes.to(torch.int8), largest / 127


# --------------------------------------------------------------------------------------------------------------- 4 bits


def pack_codes(codes: Tensor) -> Tensor:
    """Codes 0 .. 15 (out, in) -> int32 words (out, in / 8).

    Of each run of 32 inputs, word i holds in its bits 4 j .. 4 j + 3 the code of input 4 j + i.
    """
    runs = codes.view(codes.size(0), -1, 8, 4).to(torch.int32)  # (out, in / 32, nibble j, word i)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)[:, None]
    return (runs << shifts).sum(dim=2, dtype=torch.int32).flatten(1)


def unpack_codes(words: Tensor) -> Tensor:
    """The inverse of pack_codes: (out, in), int32."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)[:, None]
    return ((words.view(words.size(0), -1, 1, 4) >> shifts) & 15).flatten(1)  # (out, in / 32, 8, 4) -> (out, in)


def dense_int4(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., out, in) of packed codes and their groups' scales and offsets, computed in float32 and rounded once."""
    return as_one_kernel(scaled_int4, weight, scales, dtype)


def scaled_int4(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    codes = unpack_codes(weight.flatten(0, -2)).view(*scales.shape[:-1], -1)  # (..., out, groups, group)
    scale, offset = scales.float().unsqueeze(-2).unbind(-1)  # (..., out, groups, 1)
    return torch.addcmul(offset, codes.float().sub_(8), scale).flatten(-2).to(dtype)


class Int4Linear(WeightOnlyLinear):
    """W[n, k] = (code[n, k] - 8) * scales[n, k // group, 0] + scales[n, k // group, 1], with codes 0 .. 15.

    Buffers: weight (out, in / 8) int32, the codes as pack_codes packs them, scales (out, in / group, 2) bfloat16, bias
    (out,) or None.
    """

    kernel_format, scale_name = "int4", "scales"
    dequantize = staticmethod(dense_int4)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group_size: int,
        bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        """Raises ValueError when in_features is no multiple of the group, which is one of GROUP_SIZES."""
        check_group(in_features, group_size)
        weight = torch.zeros(out_features, in_features // 8, dtype=torch.int32, device=device)
        scales = torch.zeros(out_features, in_features // group_size, 2, dtype=torch.bfloat16, device=device)
        super().__init__(in_features, out_features, weight, scales, _empty_bias(out_features, bias, device))

    @property
    def group_size(self) -> int:
        return self.in_features // self.scales.size(-2)

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> "Int4Linear":
        """codes (out, in) of 0 .. 15 and scales (out, in / group, 2)."""
        out_features, in_features = codes.shape
        linear = cls(in_features, out_features, in_features // scales.size(1), device="meta")
        return _filled(linear, pack_codes(codes), scales.to(torch.bfloat16), bias)

    def fits_cpu(self, x: Tensor) -> bool:
        return self.out_features % 16 == 0 and super().fits_cpu(x)

    def cpu_product(self, x: Tensor) -> Tensor:
        if self._for_cpu is None:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack_codes(self.weight), 1)
            self._for_cpu = packed, self.scales.transpose(0, 1).contiguous()
        packed, scales = self._for_cpu
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), packed, self.group_size, scales)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"


def check_group(in_features: int, group_size: int, name: str = "The layer") -> None:
    """Raises ValueError unless rows of so many inputs can be quantised in groups of this size."""
    if group_size not in GROUP_SIZES:
        choices = ", ".join(map(str, GROUP_SIZES))
        raise ValueError(f"group_size {group_size} does not exist: choose one of {choices}.")
    if in_features % group_size:
        fitting = [str(size) for size in GROUP_SIZES if in_features % size == 0]
        remedy = f"use --group_size {' or '.join(fitting)}" if fitting else "use int8, which has no groups"
        raise ValueError(f"{name} has {in_features} inputs, which groups of {group_size} do not divide: {remedy}.")


def round_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and scales (out, in / group, 2) of a weight in float32: the least number of a group becomes 0 and
    the largest 15."""
    groups = weight.view(weight.size(0), -1, group_size)
    least, largest = groups.aminmax(dim=2)
    scale = (largest - least) / 15
    scales = round_scales(scale, least + 8 * scale)
    return nearest_codes(weight, scales), scales


def round_scales(scale: Tensor, offset: Tensor) -> Tensor:
    """Scales and offsets (out, groups) as they are stored: (out, groups, 2), bfloat16."""
    return torch.stack([scale, offset], dim=-1).to(torch.bfloat16)


def nearest_codes(weight: Tensor, scales: Tensor) -> Tensor:
    """The codes (out, in) whose numbers come nearest to a weight in float32, with scales as they are stored."""
    groups = weight.view(*scales.shape[:2], -1)
    scale, offset = scales.float().unsqueeze(2).unbind(-1)
    steps = torch.where(scale == 0, 0, (groups - offset) / scale).round_()  # a group of equal numbers is its offset
    return steps.add_(8).clamp_(0, 15).to(torch.uint8).flatten(1)


def _empty_bias(out_features: int, bias: bool, device: torch.device | str | None) -> Tensor | None:
    return torch.zeros(out_features, device=device) if bias else None


def _filled(linear: WeightOnlyLinear, weight: Tensor, scale: Tensor, bias: Tensor | None) -> WeightOnlyLinear:
    """The layer with these buffers."""
    linear.weight = weight
    setattr(linear, linear.scale_name, scale)
    linear.bias = None if bias is None else bias.detach().clone()
    return linear
