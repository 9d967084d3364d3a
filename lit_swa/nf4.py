"""Linear layers in 4 bits by bitsandbytes: nf4 and fp4, the formats of QLoRA (Dettmers et al. 2023, arXiv 2305.14314).

A weight is made dense for a product, and once more for the gradient of the layer's input, and is never kept.
"""

import copy
import functools
import logging
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor


class Mode(NamedTuple):
    quant_type: str
    double: bool = False  # the blocks' scales are quantised as well


MODES = {  # 4 bits per number and a float32 scale per block of them (-dq: a scale of one byte)
    "nf4": Mode("nf4"),
    "nf4-dq": Mode("nf4", double=True),
    "fp4": Mode("fp4"),
    "fp4-dq": Mode("fp4", double=True),
}
BLOCK = 64  # numbers that share a scale


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
            "nf4 and fp4 need bitsandbytes, which is not installed: pip install bitsandbytes, or use int4."
        ) from None
    finally:
        logger.setLevel(level)
    return bitsandbytes


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


def four_bit(weight: Tensor, bias: Tensor | None, mode: str, compute_dtype: torch.dtype) -> nn.Module:
    """A frozen Linear4bit that holds a weight (out, in), of float32."""
    bitsandbytes, (quant_type, double) = import_bitsandbytes(), MODES[mode]
    kind = {"compress_statistics": double, "quant_type": quant_type}
    options = kind | {"compute_dtype": compute_dtype, "bias": False, "device": "meta"}
    linear = _linear_4bit(bitsandbytes)(weight.size(1), weight.size(0), **options)
    linear.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **kind).to(weight.device)
    linear.weight.quant_state.dtype = compute_dtype  # else the backward would use float32, as it was before
    # On CPUs with AVX512-BF16 the first call in eval mode would repack the weight for products in bfloat16, whatever
    # the compute dtype is. A repacked weight gives no gradient, and only some sizes can be repacked.
    linear.support_avx512bf16_for_cpu = False
    linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return linear
