"""LoRA and DoRA: small trainable matrices added to frozen weights, put into a built GPT and folded back into it.

LoRA (Hu et al. 2021, arXiv 2106.09685): y = W x + s B A x, with A (r, in), B (out, r) and s = alpha / r, or
alpha / sqrt(r) when rank-stabilised (Kalajdzievski 2023, arXiv 2312.03732). DoRA (Liu et al. 2024, arXiv 2402.09353)
gives each row of W + s B A a trained length of its own. Nothing is replaced: the linear layer, of any format, gets a
child `lora` and a forward hook, and its own weight keeps its name.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_swa.checks import check_range
from lit_swa.formats.hugging_face import hf_module_names
from lit_swa.linear_formats import (
    ALL,
    can_train_beside,
    dense_weight,
    device_of,
    group_rows,
    inject,
    is_plain,
    remove_injected,
)
from lit_swa.memory import require_memory
from lit_swa.model import GPT

QKV = re.compile(r"\.attn\.qkv$")
TARGETS: dict[str, tuple[re.Pattern, str]] = {  # target -> its linear layers' names, and the group of rows in them
    "q": (QKV, "q"),
    "k": (QKV, "k"),
    "v": (QKV, "v"),
    "o": (re.compile(r"\.attn\.proj$"), ALL),
    "mlp": (re.compile(r"\.mlp\.(.+\.)?(fc_1|fc_2|fc|proj)$"), ALL),
    "head": (re.compile(r"^lm_head$"), ALL),
}
EXTRA_TRAINABLE = ("embed", "norm")  # what LongLoRA trains in full (Chen et al. 2023, arXiv 2309.12307)


@dataclass
class LoRAConfig:
    """What is trained, and how. Raises ValueError for values that do not fit."""

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "k", "v", "o")  # of TARGETS
    extra_trainable: tuple[str, ...] = ()  # of EXTRA_TRAINABLE: trained in full
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        check_range("r", self.r, 1, 2**16, whole=True)
        check_range("alpha", self.alpha, 0, 10**9)
        check_range("dropout", self.dropout, 0, 0.999)
        for name, choices in (("targets", TARGETS), ("extra_trainable", EXTRA_TRAINABLE)):
            given = getattr(self, name)
            given = tuple(given.split(",")) if isinstance(given, str) else tuple(given)
            given = tuple(dict.fromkeys(entry.strip() for entry in given))
            if unknown := [entry for entry in given if entry not in choices]:
                raise ValueError(f"{name} has no {unknown[0]!r}: choose from {', '.join(choices)}.")
            setattr(self, name, given)
        if not self.targets:
            raise ValueError(f"targets is empty: name some of {', '.join(TARGETS)}.")

    def scaling(self, r: int | None = None, alpha: float | None = None) -> float:
        """s of a part with this rank and alpha, or with the config's own."""
        r, alpha = r or self.r, self.alpha if alpha is None else alpha
        return alpha / math.sqrt(r) if self.rslora else alpha / r


# -------------------------------------------------------------------------------------------------------------- modules


class LoRAPart(nn.Module):
    """A (r, in) and B (stop - start, r) for the rows start .. stop of one weight; for DoRA the rows' lengths too."""

    def __init__(self, in_features: int, start: int, stop: int, r: int, scaling: float, device: torch.device) -> None:
        super().__init__()
        A = torch.empty(r, in_features, device="cpu", dtype=torch.float32)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # drawn on the CPU: a seed gives the same numbers on every device
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(stop - start, r, device=device, dtype=torch.float32))
        self.register_parameter("magnitude", None)  # (stop - start,), DoRA's m
        self.start, self.stop, self.scaling = start, stop, scaling

    def delta(self) -> Tensor:
        """s B A, (stop - start, in)"""
        return self.scaling * (self.B @ self.A)

    def row_lengths(self, weight: Tensor) -> Tensor:
        """The lengths of the rows of W + s B A, for W (out, in): a constant to the gradient (DoRA, section 4.3)."""
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            rows = weight[self.start : self.stop]
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
            return torch.linalg.vector_norm(rows + self.delta(), dim=1)


class LoRA(nn.Module):
    """All parts of one linear layer, joined into one small product in the forward pass."""

    def __init__(self, out_features: int, dropout: float) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()  # name of the rows ("q", "k", "v", or "all") -> LoRAPart
        self.out_features, self.dropout, self.enabled = out_features, dropout, True

    def forward(self, x: Tensor, y: Tensor, linear: nn.Module) -> Tensor:
        """What the changed layer gives for x (..., in) whose own output is y (..., out)."""
        parts = sorted(self.parts.values(), key=lambda part: part.start)
        dropped = F.dropout(x, self.dropout, self.training)
        A = torch.cat([part.A for part in parts]).to(x.dtype)  # (sum r, in)
        B = self.by_rows([part.B * part.scaling for part in parts], parts, torch.block_diag).to(x.dtype)  # (out, sum r)
        h = dropped.flatten(0, -2) @ A.T  # (..., in) -> (N, sum r)
        if all(part.magnitude is None for part in parts):
            return torch.addmm(y.flatten(0, -2).to(h.dtype), h, B.T).view_as(y)
        weight = dense_weight(linear)
        ratios = [part.magnitude / part.row_lengths(weight) for part in parts]
        ratio = self.by_rows(ratios, parts, lambda *rows: torch.cat(rows))  # (out,), float32
        drops = self.training and self.dropout > 0
        plain = F.linear(dropped, weight.to(x.dtype)) if drops else y if linear.bias is None else y - linear.bias
        changed = torch.addmm(plain.flatten(0, -2).to(h.dtype), h, B.T).view_as(y) * ratio
        rest = y - plain if drops else linear.bias  # what DoRA does not scale
        return (changed if rest is None else changed + rest).to(y.dtype)

    def by_rows(self, values: list[Tensor], parts: list[LoRAPart], join: Callable[..., Tensor]) -> Tensor:
        """Join the parts' values, (rows,) or (rows, r), in the order of the weight's rows.

        Rows that have no part get ones in place of (rows,), and a (rows, 0) in place of (rows, r), of which
        torch.block_diag makes zeros.
        """
        at, pieces = 0, []
        for value, part in zip(values, parts, strict=True):
            gap = (part.start - at,) if value.dim() == 1 else (part.start - at, 0)
            pieces += [value.new_ones(gap), value] if part.start > at else [value]
            at = part.stop
        gap = (self.out_features - at,) if values[0].dim() == 1 else (self.out_features - at, 0)
        pieces += [values[0].new_ones(gap)] if self.out_features > at else []
        return pieces[0] if len(pieces) == 1 else join(*pieces)


def add_lora_output(linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The forward hook."""
    return linear.lora(inputs[0], output, linear) if linear.lora.enabled else output


# ------------------------------------------------------------------------------------------------------------ injection


def add_lora(model: GPT, config: LoRAConfig) -> list[str]:
    """Put LoRA into a built model, freeze all else but `extra_trainable`, and return the names of the changed layers.

    A starts as uniform noise and B as zeros, so that the model computes what it did.
    Raises ValueError, with the names that there are, when a target matches no layer.
    """
    if lora_linears(model):
        raise ValueError("The model has a LoRA already: merge_lora folds it into the weights.")
    if "embed" in config.extra_trainable:
        require_own_embedding(model, "leave embed out of --extra_trainable")
    chosen = [(name, target) for target in config.targets for name in matching_linears(model, target)]
    require_room(model, chosen, config.r)
    model.requires_grad_(False)
    for name, target in chosen:
        add_part(model, name, TARGETS[target][1], config)
    for name in extra_modules(model, config.extra_trainable):
        model.get_submodule(name).requires_grad_(True)
    return list(dict.fromkeys(name for name, _ in chosen))


def require_own_embedding(model: GPT, remedy: str) -> None:
    """Raises ValueError where lm_head shared the embedding until it was quantised: it would not follow its training."""
    if getattr(model.lm_head, "was_tied", False):
        raise ValueError(
            f"lm_head shares the embedding, and --quantize holds it in 8 bits: {remedy}, or use nf4, which leaves it "
            "as it is."
        )


def matching_linears(model: GPT, target: str) -> list[str]:
    """The names of the linear layers that a target means. Raises ValueError when there is none."""
    if target == "mlp" and model.config.n_expert is not None:
        raise ValueError("The model's experts have no LoRA here: leave mlp out of the targets.")
    linears = [name for name, module in model.named_modules() if can_train_beside(module)]
    found = [name for name in linears if TARGETS[target][0].search(name)]
    if not found:
        there = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in linears}) or ["none"]
        raise ValueError(f"No trainable layer matches the target {target!r}: the linear layers are {', '.join(there)}.")
    return found


def require_room(model: GPT, chosen: list[tuple[str, str]], r: int) -> None:
    """Raises ValueError when there is no memory for the matrices of these layers and targets."""
    needed = 0
    for name, target in chosen:
        start, stop = rows_of_part(model, name, TARGETS[target][1])
        needed += 4 * r * (model.get_submodule(name).in_features + stop - start)
    device = model.transformer.wte.weight.device
    require_memory(needed, device, f"LoRA's matrices of rank {r}", "use a smaller --r, or fewer --targets")


def add_part(
    model: GPT, name: str, part: str, config: LoRAConfig, r: int | None = None, scaling: float | None = None
) -> LoRAPart:
    """Give the layer `name` a part for a group of its rows; r and scaling are the config's unless given."""
    linear = model.get_submodule(name)
    if not hasattr(linear, "lora"):
        inject(linear, "lora", LoRA(linear.out_features, config.dropout), add_lora_output)
    start, stop = rows_of_part(model, name, part)
    scaling = config.scaling() if scaling is None else scaling
    new = LoRAPart(linear.in_features, start, stop, r or config.r, scaling, device_of(linear))
    if config.dora:
        with torch.no_grad():
            rows = dense_weight(linear)[start:stop].float()
            new.magnitude = nn.Parameter(torch.linalg.vector_norm(rows, dim=1))
    linear.lora.parts[part] = new.train(linear.training)
    return new


def rows_of_part(model: GPT, name: str, part: str) -> tuple[int, int]:
    """The rows start, stop of the layer `name` that a part is for, by the heads that its attention layer holds."""
    rows = model.get_submodule(name).out_features
    if part == ALL:
        return 0, rows
    attn = model.get_submodule(name.rpartition(".")[0])
    return group_rows(part, rows, attn.n_head, attn.n_query_groups)


def extra_modules(model: GPT, kinds: tuple[str, ...]) -> list[str]:
    """The modules that LongLoRA's rule trains in full: those with "embed" or "norm" in their Hugging Face name.

    "embed" is transformer.wte, and lm_head where it is tied to it or, in GPT-NeoX, called embed_out.
    """
    table, found = hf_module_names(model.config), []
    for name, module in model.named_modules():
        hf_names = table.get(re.sub(r"\.h\.\d+\.", ".h.{i}.", name), ())
        if hasattr(module, "weight") and any(kind in hf_name.split(".")[-1] for kind in kinds for hf_name in hf_names):
            found.append(name)
    return found


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Within it, the model computes what it did before it had a LoRA."""
    linears = [linear for _, linear in lora_linears(model)]
    try:
        for linear in linears:
            linear.lora.enabled = False
        yield
    finally:
        for linear in linears:
            linear.lora.enabled = True


def lora_linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that have a LoRA, by name."""
    return [(name, m) for name, m in model.named_modules() if isinstance(getattr(m, "lora", None), LoRA)]


# -------------------------------------------------------------------------------------------------------------- merging


@torch.no_grad()
def merge_lora(model: GPT) -> int:
    """Fold every LoRA into its layer's weight, in float32 and rounded once; returns how many layers there were.

    A layer whose weight nothing can be merged into (a quantised one) becomes a dense nn.Linear in the
    embedding's dtype. A tied lm_head that has a LoRA gets a weight of its own. Raises ValueError when a merged weight
    is NaN or infinite.
    """
    changed = lora_linears(model)
    for name, linear in changed:
        weight = merged_weight(linear)
        remove_injected(linear, "lora", add_lora_output)
        weight = weight.to((linear if is_plain(linear) else model.transformer.wte).weight.dtype)
        require_held(weight, f"{name} with its LoRA")
        if not is_plain(linear):
            model.set_submodule(name, dense_linear(linear, weight))
            continue
        linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
        if name == "lm_head":
            model.config.tie_embeddings = False
    return len(changed)


@torch.no_grad()
def merged_state(model: GPT) -> dict[str, Tensor]:
    """The model's weights as merge_lora would leave them, each in its own dtype; the model stays as it is."""
    state = {name: t for name, t in model.state_dict().items() if ".lora." not in name}
    for name, linear in lora_linears(model):
        state[f"{name}.weight"] = merged_weight(linear).to(state[f"{name}.weight"].dtype)
        require_held(state[f"{name}.weight"], f"{name} with its LoRA")
    return state


def require_held(weight: Tensor, name: str) -> None:
    """Raises ValueError when a weight is NaN or infinite in its dtype, which may be too narrow for it."""
    if not bool(weight.isfinite().all()):
        held = str(weight.dtype).removeprefix("torch.")
        raise ValueError(f"{name} is beyond what {held} holds: merge in bfloat16 or float32.")


def merged_weight(linear: nn.Module) -> Tensor:
    """W + s B A, for DoRA with its rows' lengths set to m, (out, in), in float32 at least."""
    weight = dense_weight(linear).detach()
    merged = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for part in linear.lora.parts.values():
        rows = merged[part.start : part.stop]  # a view
        ratio = None if part.magnitude is None else (part.magnitude / part.row_lengths(weight))[:, None]
        rows += part.delta()
        if ratio is not None:
            rows *= ratio
    return merged


def dense_linear(linear: nn.Module, weight: Tensor) -> nn.Linear:
    """A frozen nn.Linear with this weight (out, in) and the layer's bias, in the weight's dtype."""
    dense = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        dense.bias = nn.Parameter(linear.bias.detach().to(weight.dtype), requires_grad=False)
    return dense.train(linear.training)
