"""How linear layers keep their weights, and what can be asked of any of them.

A plain nn.Linear keeps W (out, in) as a parameter of floating point. Every other format is a module that answers for
itself, see LinearFormat: a new format is one class, and LoRA, adapters, merging, saving and the counting of bytes work
with it unchanged. Nothing is registered: a class from outside this project will do.
"""

import functools
import importlib.util
import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from lit_swa.machine import cache_dir, keep_file, processor
from lit_swa.memory import free_memory

if TYPE_CHECKING:
    from lit_swa.model import GPT

ALL = "all"  # the group of all rows; the fused attn.qkv also has the groups q, k and v
CHOOSING = ("router", "shared_gate")  # what the linear layers that choose among experts are called


class LinearFormat(Protocol):
    """What a linear layer that is not a plain nn.Linear has besides its forward, (..., in) -> (..., out)."""

    in_features: int
    out_features: int
    bias: Tensor | None  # (out,)
    differentiable: bool  # gradients reach the layer's input, so LoRA or an adapter can be trained with it

    def dense_weight(self) -> Tensor:
        """The numbers (out, in) that the layer multiplies with, as a new float32 tensor on the layer's device."""

    def weight_bytes(self) -> int:
        """Bytes that the weight takes, with the scales that belong to it and without the bias."""


# ------------------------------------------------------------------------------------------ questions to a linear layer


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear and for a LinearFormat."""
    return isinstance(module, nn.Linear) or (hasattr(module, "dense_weight") and not is_experts(module))


def is_experts(module: nn.Module) -> bool:
    """True for the stacked layers of a mixture of experts, plain or not: their weight is (E, out, in)."""
    return hasattr(module, "gathered")


def weighty_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers and stacks of experts within a module, by name, but for those that choose among experts: these
    are too small to matter, and all else depends on them."""
    named = {name: m for name, m in module.named_modules() if is_linear(m) or is_experts(m)}
    return {name: m for name, m in named.items() if name.rpartition(".")[2] not in CHOOSING}


def is_plain(linear: nn.Module) -> bool:
    """True when numbers can be merged or folded into the weight: it is a parameter of floating point."""
    return type(linear) is nn.Linear and linear.weight.is_floating_point()


def can_train_beside(module: nn.Module) -> bool:
    """True for a linear layer whose input gets gradients, so that LoRA or an adapter can be added to it."""
    return is_linear(module) and (is_plain(module) or getattr(module, "differentiable", False))


def dense_weight(linear: nn.Module) -> Tensor:
    """W (out, in), of experts (E, out, in): the parameter itself of a plain layer, which is not to be changed; of
    another format the dequantised numbers, in float32. Raises ValueError for a layer that does not say what its weight
    is."""
    if is_plain(linear) or (is_experts(linear) and linear.weight.is_floating_point()):
        return linear.weight
    if not hasattr(linear, "dense_weight"):
        dtype = linear.weight.dtype
        raise ValueError(f"A {type(linear).__name__} keeps its weight as {dtype}, which cannot be read here.")
    return linear.dense_weight()


def weight_bytes(linear: nn.Module) -> int:
    """Bytes that the layer's weight takes, with the scales that belong to it and without the bias."""
    return linear.weight_bytes() if hasattr(linear, "weight_bytes") else linear.weight.nbytes


def device_of(linear: nn.Module) -> torch.device:
    """The device that holds the layer's weight."""
    return next(t.device for tensors in (linear.parameters(False), linear.buffers(False)) for t in tensors)


@functools.cache
def gpu_kernels(file: str = "decode_kernels") -> Any:
    """A file of Triton kernels, by default a decode step's; None without Triton, and for GPUs that are not NVIDIA's
    or older than Ampere."""
    if not torch.cuda.is_available() or torch.version.hip or importlib.util.find_spec("triton") is None:
        return None
    oldest = min(torch.cuda.get_device_capability(n) for n in range(torch.cuda.device_count()))
    return importlib.import_module(f"lit_swa.{file}") if oldest >= (8, 0) else None


def group_rows(group: str, out_features: int, n_head: int, n_query_groups: int) -> tuple[int, int]:
    """The rows start, stop of a weight that a group of outputs is made of.

    attn.qkv holds the queries of n_head heads, then the keys and then the values of n_query_groups heads.
    """
    if group == ALL:
        return 0, out_features
    head_size = out_features // (n_head + 2 * n_query_groups)
    q, kv = n_head * head_size, n_query_groups * head_size
    return {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}[group]


# ------------------------------------------------------------------------------------------- what is added to weights

INJECTED = ("adapter", "lora")  # the names of the children that are put into modules


def inject(module: nn.Module, name: str, child: nn.Module, hook: Callable[..., Any]) -> None:
    """Give a module a child, one of INJECTED, and the forward hook that uses it.

    The hook is a function of the module, so that a copied module uses its own child.
    """
    module.add_module(name, child.train(module.training))
    module.register_forward_hook(hook)


def remove_injected(module: nn.Module, name: str, hook: Callable[..., Any]) -> None:
    """Undo inject: the module computes again what it computed before."""
    for key in [key for key, given in module._forward_hooks.items() if given is hook]:
        del module._forward_hooks[key]
    delattr(module, name)


def is_injected(module: nn.Module) -> bool:
    """True when something was added to the module's own weight, so that it cannot be replaced by another format."""
    return bool(module._forward_hooks) or any(isinstance(getattr(module, name, None), nn.Module) for name in INJECTED)


# ------------------------------------------------------------------------------------------------ formats for inference


class OneTokenLinear(nn.Module):
    """nn.Linear for compiled inference on a CPU: the product with a single vector is a sum that Inductor vectorises.

    That reads the weights at the memory's speed, where the libraries' products reach a half of it or less.
    """

    differentiable = False

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != x.size(-1) or not torch.compiler.is_compiling():
            return nn.functional.linear(x, self.weight, self.bias)
        y = (self.weight.float() * x.reshape(1, -1).float()).sum(dim=-1)
        y = y if self.bias is None else y + self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def dense_weight(self) -> Tensor:
        return self.weight.detach().to(torch.float32, copy=True)

    def weight_bytes(self) -> int:
        return self.weight.nbytes


class VectorLinear(nn.Module):
    """nn.Linear for inference on a CPU, its product with a single vector made by another function."""

    differentiable = False

    def __init__(self, linear: nn.Linear, product: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        """product: (x (..., in), weight (out, in), bias (out,) or None) -> (..., out)"""
        super().__init__()
        self.in_features, self.out_features, self.product = linear.in_features, linear.out_features, product
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        product = self.product if x.numel() == x.size(-1) else nn.functional.linear
        return product(x, self.weight, self.bias)

    def dense_weight(self) -> Tensor:
        return self.weight.detach().to(torch.float32, copy=True)

    def weight_bytes(self) -> int:
        return self.weight.nbytes


class PackedLinear(nn.Module):
    """nn.Linear for inference on a CPU, a copy of its weight in the layout that oneDNN likes best."""

    differentiable = False

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return onednn_product(x, self.weight, self.bias)

    def dense_weight(self) -> Tensor:
        return self.weight.to_dense().float()

    def weight_bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def vector_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, shape = x.reshape(-1), (*x.shape[:-1], -1)
    return (torch.mv(weight, x) if bias is None else torch.addmv(bias, weight, x)).view(shape)


def replace_linears(model: nn.Module, replacement: Callable[[nn.Linear], nn.Module]) -> int:
    """Put replacement(linear) in the place of every plain nn.Linear; returns how many. One with a LoRA stays."""
    named = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    linears = [(parent, name, m) for parent, name, m in named if is_plain(m) and not is_injected(m)]
    for parent, name, linear in linears:
        setattr(parent, name, replacement(linear))
    return len(linears)


# --------------------------------------------------------------------------------------- the fastest product on a CPU
#
# No product with a single vector wins everywhere: with float32 weights oneDNN's takes half the time of torch's own on
# an AMD EPYC, and more than it on an Intel Xeon. So each is timed on weights of the model, once for a machine.

LAYOUT_FILE = "linear_layouts.json"  # in the cache directory: what the choice depends on -> the layout
LAYOUTS: dict[str, Callable[[nn.Linear], nn.Module]] = {  # the first is what is there
    "plain": lambda linear: linear,
    "vector": functools.partial(VectorLinear, product=vector_product),
    "onednn": functools.partial(VectorLinear, product=onednn_product),
    "packed": PackedLinear,
}
NEED_ONEDNN = ("onednn", "packed")
MOST_ROWS = 4096  # of a weight that is timed
FLUSHED = 2**24  # float32 numbers, read before a round: in decoding, no weight is in a processor's cache either
ROUNDS = 4  # at least; then until the two best times of each product agree ...
LONGEST = 0.5  # ... or so many seconds have passed
AGREE = 1.2  # the second best over the best
measured: dict[str, str] = {}  # what this process found
GAIN = 0.95  # of the plain product's time: less of a gain is noise


def pack_for_cpu(model: "GPT") -> int:
    """Replace the linear layers of a model on the CPU by what multiplies single tokens fastest; returns how many.

    The model can then only infer: it is not to be trained, saved or moved. Nothing changes for dtypes other than
    float32 and bfloat16, for other devices, and where the plain product is the fastest. The layout that copies the
    weights is left out where the memory does not hold them a second time.
    """
    weight = model.transformer.wte.weight
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return 0
    names = [name for name in LAYOUTS if name not in NEED_ONEDNN or torch.backends.mkldnn.is_available()]
    if 1.1 * sum(p.nbytes for p in model.parameters()) > free_memory(weight.device):
        names = [name for name in names if name != "packed"]
    linears = {layout_key(m): m for m in model.modules() if is_plain(m) and not is_injected(m)}
    known = read_layouts() | measured
    if unknown := {key: linear for key, linear in linears.items() if known.get(key) not in names}:
        found, agreed = time_layouts(unknown, names)
        known |= found
        measured.update(found)
        if agreed:  # other programs did not disturb
            with suppress(OSError):
                keep_file(LAYOUT_FILE, json.dumps(known, indent=1).encode())
    replaced = replace_linears(model, lambda linear: LAYOUTS[known[layout_key(linear)]](linear))
    return replaced - sum(type(m) is nn.Linear and is_plain(m) and not is_injected(m) for m in model.modules())


def layout_key(linear: nn.Linear) -> str:
    """What the fastest layout depends on."""
    where = f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    return f"{where}, {linear.weight.dtype}, {linear.out_features} x {linear.in_features}"


def read_layouts() -> dict[str, str]:
    """What was found before; empty where there is no such file, or a broken one."""
    with suppress(OSError, ValueError):
        known = json.loads((cache_dir() / LAYOUT_FILE).read_text())
        if isinstance(known, dict):
            return known
    return {}


@torch.inference_mode()
def time_layouts(
    linears: dict[str, nn.Linear], names: list[str], clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, str], bool]:
    """For each linear layer the name of the layout whose product with one vector takes least time; and whether the
    times of several rounds agree. It takes about a tenth of a second."""
    made = {name: {key: LAYOUTS[name](first_rows(linear)) for key, linear in linears.items()} for name in names}
    times: dict[tuple[str, str], list[float]] = {(key, name): [] for key in linears for name in names}
    flushed, agreed, began, n = torch.zeros(FLUSHED).numpy(), False, clock(), 0
    while n < 2 or (clock() - began < LONGEST and not (agreed and n >= ROUNDS)):
        for name, layers in made.items():
            flushed.sum()
            for key, layer in layers.items():
                x, started = torch.ones(1, 1, layer.in_features, dtype=linears[key].weight.dtype), clock()
                layer(x)
                times[key, name] = sorted([*times[key, name], clock() - started])
        n += 1
        agreed = n > 1 and all(ranked[1] < AGREE * ranked[0] for ranked in times.values())
    return {key: pick_layout({name: times[key, name][0] for name in names}) for key in linears}, agreed


def first_rows(linear: nn.Linear) -> nn.Linear:
    """A linear layer of a weight's first rows, without a bias, in the same memory."""
    part = nn.Linear(linear.in_features, min(linear.out_features, MOST_ROWS), bias=False, device="meta")
    part.weight = nn.Parameter(linear.weight.detach()[:MOST_ROWS], requires_grad=False)
    return part


def pick_layout(seconds: dict[str, float]) -> str:
    first = min(seconds, key=seconds.__getitem__)
    return first if seconds[first] < GAIN * seconds["plain"] else "plain"
