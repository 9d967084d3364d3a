"""Quantised weights in a checkpoint directory: what lit_config.json says of them, and which tensors are stored.

lit_config.json has an entry "quantization" beside the fields of Config: {"mode": "int4-hqq", "group_size": 64}. The
linear layers and experts of the blocks, and lm_head in 8 bits, are then stored as the buffers of weight_only.py's
layers, those of experts as expert_formats.py stacks them; all else, biases and the layers that choose experts too, as
in any checkpoint. A mode says how the codes were chosen; layers of int4 are alike whatever chose them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lit_swa.config import Config
from lit_swa.expert_formats import empty_stack
from lit_swa.formats.files import LazyTensor
from lit_swa.formats.hugging_face import empty_model
from lit_swa.linear_formats import is_experts, weighty_layers
from lit_swa.model import GPT
from lit_swa.quantize import HEAD
from lit_swa.weight_only import GROUP_SIZES, Int4Linear, Int8Linear, WeightOnlyLinear, check_group

FIELD = "quantization"  # in lit_config.json
GROUPED = {"int8": False, "int4": True, "int4-hqq": True, "int4-gptq": True}  # mode -> whether it has groups
REMEDY = "update this package, or quantise the original checkpoint with scripts/quantize.py"


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a checkpoint are stored. Raises ValueError for values that do not fit."""

    mode: str  # of GROUPED
    group_size: int | None = None  # inputs that share a scale; None in 8 bits

    def __post_init__(self) -> None:
        if not isinstance(self.mode, str) or self.mode not in GROUPED:
            raise ValueError(
                f"the quantization {str(self.mode)[:40]!r} is not read here: it must be {', '.join(GROUPED)}"
            )
        sizes = GROUP_SIZES if GROUPED[self.mode] else (None,)
        if self.group_size not in sizes or isinstance(self.group_size, bool):
            choices = ", ".join(map(str, sizes))
            raise ValueError(
                f"{self.mode} with group_size {str(self.group_size)[:40]} is not read here, only {choices}"
            )

    def __str__(self) -> str:
        return self.mode if self.group_size is None else f"{self.mode} in groups of {self.group_size}"

    def as_json(self) -> dict[str, Any]:
        return {"mode": self.mode} | ({} if self.group_size is None else {"group_size": self.group_size})

    @classmethod
    def from_json(cls, entry: object, path: Path) -> "Quantization":
        """Raises ValueError, which names the file, for an entry of another form or version."""
        if not isinstance(entry, dict) or not {"mode"} <= set(entry) <= {"mode", "group_size"}:
            raise ValueError(f"{path} has a {FIELD} that is not read here, {str(entry)[:80]!r}: {REMEDY}.")
        try:
            return cls(**entry)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; {REMEDY}.") from None

    def empty_linear(self, name: str, linear: nn.Module) -> WeightOnlyLinear:
        """The layer, without numbers, that holds the layer `name`, or the experts."""
        if is_experts(linear):
            return empty_stack(self.empty_linear(name, linear.linear(0)), linear.weight.size(0))
        in_features, out_features, bias = linear.in_features, linear.out_features, linear.bias is not None
        if self.group_size is None or name == HEAD:
            return Int8Linear(in_features, out_features, bias, device="meta")
        check_group(in_features, self.group_size, name)
        return Int4Linear(in_features, out_features, self.group_size, bias, device="meta")


def quantization_of(model: GPT) -> Quantization | None:
    """How a model's linear layers are held; None for dense ones, and for those of another library."""
    for module in model.transformer.h.modules():
        if isinstance(module, WeightOnlyLinear):
            group_size = getattr(module, "group_size", None)
            return Quantization("int8" if group_size is None else "int4", group_size)
    return None


def empty_quantized(config: Config, stored: Quantization | None) -> GPT:
    """A GPT whose tensors have shapes and dtypes but no memory, its linear layers as they are stored.

    Raises ValueError for layers that groups of that size do not divide, and for tied embeddings.
    """
    model = empty_model(config)
    if stored is None:
        return model
    if config.tie_embeddings:
        raise ValueError(
            "tie_embeddings is true and lm_head is quantised, which no embedding can share: set it to false."
        )
    for name, linear in weighty_layers(model).items():
        model.set_submodule(name, stored.empty_linear(name, linear))
    return model


def stored_tensors(config: Config, stored: Quantization | None) -> dict[str, Tensor]:
    """Name -> an empty tensor, on the meta device, for every weight that a checkpoint stores. Only codes and scales
    have a fixed dtype."""
    state = dict(empty_quantized(config, stored).state_dict())
    if config.tie_embeddings:
        del state["lm_head.weight"]
    return state


def is_of_format(name: str, dtype: torch.dtype) -> bool:
    """Whether a stored tensor is codes or scales, which keep their dtype."""
    return name.rpartition(".")[2] in ("scale", "scales") or not dtype.is_floating_point


def check_dtypes(config: Config, tensors: Mapping[str, LazyTensor], where: object, stored: Quantization | None) -> None:
    """Raises ValueError for codes or scales of another dtype than the format's, or for weights that are no numbers of
    floating point. The shapes have been checked."""
    for name, expected in stored_tensors(config, stored).items():
        dtype = tensors[name].dtype
        fits = dtype == expected.dtype if is_of_format(name, expected.dtype) else dtype.is_floating_point
        if not fits:
            form = "a dense checkpoint" if stored is None else stored
            raise ValueError(
                f"{where} has {name} as {str(dtype).removeprefix('torch.')}, which is not how {form} stores it: "
                "download, convert or quantise it again."
            )


def dense_tensors(
    config: Config, tensors: Mapping[str, LazyTensor], stored: Quantization | None, dtype: torch.dtype
) -> dict[str, LazyTensor]:
    """The weights that a checkpoint's quantised ones stand for, in `dtype`; each is made when it is loaded."""
    if stored is None:
        return dict(tensors)
    result = {}
    layers = {n: m for n, m in empty_quantized(config, stored).named_modules() if isinstance(m, WeightOnlyLinear)}
    for name, tensor in tensors.items():
        module_name, _, key = name.rpartition(".")
        if (layer := layers.get(module_name)) is None or key == "bias":
            result[name] = tensor
        elif key == "weight":
            shape, scale = (*tensor.shape[:-1], layer.in_features), tensors[f"{module_name}.{layer.scale_name}"]
            load = lambda layer=layer, w=tensor, s=scale: layer.dequantize(w.load(), s.load(), dtype)  # noqa: E731
            result[name] = LazyTensor(shape, dtype, load)
    return result


def require_dense(stored: Quantization | None, directory: Path, remedy: str) -> None:
    """Raises ValueError for a checkpoint that is quantised already."""
    if stored is not None:
        raise ValueError(f"{directory} is quantised already ({stored}): {remedy}.")
