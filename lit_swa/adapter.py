"""LLaMA-Adapter: learned prompts that the layers attend to through a gate, put into a built GPT.

Version 1 (Zhang et al. 2023, arXiv 2303.16199): in the upper layers every query also attends to a few learned tokens,
in a softmax of their own, and the result times a gate is added to the attention's output. Version 2 (Gao et al. 2023,
arXiv 2304.15010) also gives each linear layer of the blocks a bias and a scale, and trains the norms. The gates and
biases start at 0 and the scales at 1, so that a new adapter does not change what the model computes.

Nothing is replaced: a layer gets a child `adapter` and a forward hook, and its own weights, which may be quantised,
keep their names. Version 2's bias and scale can be folded into the weights (fold_scale_and_bias). The prompts cannot:
what they add depends on the query through a softmax, which no weight of the base can express. So there is no merge,
and a model with an adapter is run with it.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_swa.checks import check_range
from lit_swa.formats.adapter_files import adapter_kind, describe_base, load_finite, write_adapter
from lit_swa.formats.directory import ADAPTER_FILE, CONFIG_FILE
from lit_swa.formats.files import as_lazy, find_inside, open_safetensors, read_json
from lit_swa.head_norms import EachHeadNorm, WholeNorm
from lit_swa.linear_formats import (
    INJECTED,
    can_train_beside,
    device_of,
    inject,
    is_linear,
    is_plain,
    remove_injected,
)
from lit_swa.memory import require_memory
from lit_swa.model import GPT, CausalSelfAttention, Plan, RMSNorm, softcap
from lit_swa.rope import apply_rope

WEIGHTS_FILE = "lit_adapter.safetensors"
KINDS = {"adapter_v1": 1, "adapter_v2": 2}  # what lit_adapter.json calls the versions


@dataclass
class AdapterConfig:
    """What is put into a model. Raises ValueError for values that do not fit."""

    version: int = 1  # 1: prompts; 2: also a bias and a scale for each linear layer of the blocks, and trained norms
    prompt_length: int = 10  # P, learned tokens in a layer
    start_layer: int = 2  # the first layer that has a prompt, counted from 0

    def __post_init__(self) -> None:
        if type(self.version) is not int or self.version not in KINDS.values():
            raise ValueError(f"version={self.version!r} does not fit: choose from 1, 2.")
        check_range("prompt_length", self.prompt_length, 1, 4096, whole=True)
        check_range("start_layer", self.start_layer, 0, 4096, whole=True)

    @property
    def kind(self) -> str:
        return next(kind for kind, version in KINDS.items() if version == self.version)


# -------------------------------------------------------------------------------------------------------------- modules


class GatedPrompt(nn.Module):
    """A layer's learned tokens, the prompt (P, C), and a gate for each head (H,).

    As in the authors' code each head has its gate, and tanh(gate) multiplies. (PEFT's AdaptionPrompt has one number for
    all heads and no tanh: its gate g is ours at atanh(g).) A prompt gets no gradient as long as the gates are 0.
    """

    def __init__(self, attn: CausalSelfAttention, prompt_length: int) -> None:
        super().__init__()
        device, config = device_of(attn.proj), attn.config
        prompt = torch.randn(prompt_length, config.n_embd, device="cpu", dtype=torch.float32)  # a seed's, on any device
        self.prompt = nn.Parameter(prompt.to(device))
        self.gate = nn.Parameter(torch.zeros(attn.n_head, device=device, dtype=torch.float32))
        self.layer = (attn,)  # in a tuple, so that it is no submodule; its projection may be quantised or replaced

    def forward(self, q: Tensor) -> Tensor:
        """The attention of queries (B, H, T, D), rotated by RoPE, over the prompt, times the gates: (B, H, T, D)."""
        (attn,) = self.layer
        config, (B, H, T, D), P = attn.config, q.shape, len(self.prompt)
        G, cap = attn.n_query_groups, config.attention_logit_softcapping
        qkv = attn.qkv(self.prompt.to(q.dtype)[None])[0].view(P, H + 2 * G, D).transpose(0, 1)  # (H + 2G, P, D)
        _, k, v = qkv.split((H, G, G))
        k, v = attn.norm_k(k).to(q.dtype), v.to(q.dtype)  # (G, P, D): without RoPE, at no position
        scale = (config.attention_scores_scalar or config.head_size) ** -0.5
        rows = q.reshape(B, G, -1, D)  # (B, H, T, D) -> (B, G, R * T, D)
        scores = rows @ k.mT * scale  # (B, G, R * T, P)
        scores = scores if cap is None else softcap(scores, cap)
        wide = torch.promote_types(q.dtype, torch.float32)
        found = (F.softmax(scores, dim=-1, dtype=wide).to(q.dtype) @ v).view(B, H, T, D)
        return self.gate.tanh().to(q.dtype).view(H, 1, 1) * found


class ScaleAndBias(nn.Module):
    """(y + bias) * scale for the output y (..., out) of a linear layer; bias and scale are (out,)."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        size, device = linear.out_features, device_of(linear)
        self.bias = nn.Parameter(torch.zeros(size, device=device, dtype=torch.float32))
        self.scale = nn.Parameter(torch.ones(size, device=device, dtype=torch.float32))

    def forward(self, y: Tensor) -> Tensor:
        return (y + self.bias.to(y.dtype)) * self.scale.to(y.dtype)


def add_prompt_output(mixer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """The forward hook of the mixer of a layer with a prompt."""
    q, plan = inputs[0], inputs[3]
    if isinstance(plan, Plan):
        q = q if plan.temperature is None else (q * plan.temperature).to(q.dtype)
        q = plan.rotate(q, *plan.q_angles[0])  # as the variant's first part: the queries at their nearest positions
    else:
        q = apply_rope(q, *plan.angles)
    return output + mixer.adapter(q).to(output.dtype)


def scale_output(linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The forward hook of a linear layer with a bias and a scale."""
    return linear.adapter(output)


# ------------------------------------------------------------------------------------------------------------ injection


def add_adapter(model: GPT, config: AdapterConfig) -> list[str]:
    """Put an adapter into a built model, freeze all else, and return the names of the changed modules.

    The new parameters are float32 on the weights' devices. The norms that version 2 trains keep their dtype.
    Raises ValueError when the model has no layer at start_layer, or something put into it already.
    """
    targets = adapter_targets(model, config)
    needed = sum(4 * math.prod(shape) for shape in expected_state(model, config).values())
    device = model.transformer.wte.weight.device
    require_memory(needed, device, f"Prompts of {config.prompt_length} tokens", "use a smaller --prompt_length")
    model.requires_grad_(False)
    for module in targets.values():
        if isinstance(module, CausalSelfAttention):
            inject(module.mixer, "adapter", GatedPrompt(module, config.prompt_length), add_prompt_output)
        elif is_linear(module):
            inject(module, "adapter", ScaleAndBias(module), scale_output)
        else:
            module.requires_grad_(True)
    return [f"{name}.mixer" if isinstance(module, CausalSelfAttention) else name for name, module in targets.items()]


def adapter_targets(model: GPT, config: AdapterConfig) -> dict[str, nn.Module]:
    """The attention layers that get a prompt; for version 2 also the blocks' linear layers and all norms. By name."""
    if config.version == 2 and (model.config.n_expert is not None or model.config.attention_gate):
        raise ValueError("Experts and gates of the attention have no biases and scales beside them: use version 1.")
    if any(isinstance(getattr(module, name, None), nn.Module) for module in model.modules() for name in INJECTED):
        raise ValueError("The model has an adapter or a LoRA already: load it anew, or merge the LoRA first.")
    n_layer = len(model.transformer.h)
    if config.start_layer >= n_layer:
        raise ValueError(
            f"start_layer={config.start_layer} leaves no layer for a prompt: the model's are 0 to {n_layer - 1}."
        )
    targets: dict[str, nn.Module] = {}
    for i, block in enumerate(model.transformer.h):
        if i >= config.start_layer:
            targets[f"transformer.h.{i}.attn"] = block.attn
        if config.version == 2:
            inside = {f"transformer.h.{i}.{name}": module for name, module in block.named_modules()}
            targets |= {name: m for name, m in inside.items() if isinstance(m, NORMS) or can_train_beside(m)}
    return targets | ({"transformer.ln_f": model.transformer.ln_f} if config.version == 2 else {})


NORMS = (RMSNorm, nn.LayerNorm, EachHeadNorm, WholeNorm)


def has_adapter(model: nn.Module) -> bool:
    return any(isinstance(module, (GatedPrompt, ScaleAndBias)) for module in model.modules())


def adapter_state(model: GPT) -> dict[str, Tensor]:
    """What training changes, by the name in the model: the adapter's parameters, and in version 2 the norms.

    The tensors are those of the model, not copies. Raises ValueError when the model has no adapter.
    """
    if not has_adapter(model):
        raise ValueError("The model has no adapter: add_adapter gives it one.")
    modules = dict(model.named_modules())
    chosen = (GatedPrompt, ScaleAndBias)
    if any(isinstance(module, ScaleAndBias) for module in modules.values()):
        chosen += NORMS
    return {
        f"{name}.{key}": parameter.detach()
        for name, module in modules.items()
        if isinstance(module, chosen)
        for key, parameter in module.named_parameters(recurse=False)
    }


# -------------------------------------------------------------------------------------------------------------- folding


@torch.no_grad()
def fold_scale_and_bias(model: GPT) -> int:
    """Fold version 2's biases and scales into the weights: (W x + c + b) * s becomes (s W) x + (c + b) s, computed in
    float32 and rounded once. Returns how many layers there were.

    The layers get biases, and model.config says so. The prompts stay an adapter, of version 1.
    Raises ValueError when there is nothing to fold, or a layer is quantised; the model is then unchanged.
    """
    changed = [(name, m) for name, m in model.named_modules() if isinstance(getattr(m, "adapter", None), ScaleAndBias)]
    if not changed:
        raise ValueError("The model has no adapter of version 2: there is nothing to fold.")
    for name, linear in changed:
        if not is_plain(linear):
            raise ValueError(f"{name} is quantised, and a scale cannot be folded into it: load the base in full.")
    for _, linear in changed:
        weight, wide, own = linear.weight, torch.promote_types(linear.weight.dtype, torch.float32), linear.adapter
        bias = own.bias if linear.bias is None else own.bias + linear.bias
        folded = {"weight": weight.to(wide) * own.scale[:, None], "bias": bias * own.scale}
        for key, values in folded.items():
            setattr(linear, key, nn.Parameter(values.to(weight.dtype), requires_grad=weight.requires_grad))
        remove_injected(linear, "adapter", scale_output)
    model.config.attn_bias = model.config.attn_proj_bias = model.config.mlp_bias = True
    return len(changed)


# ------------------------------------------------------------------------------------------------------ saving, reading


def save_adapter(
    model: GPT, directory: str | Path, config: AdapterConfig, base_dir: str | Path | None = None
) -> dict[str, Any]:
    """Write lit_adapter.safetensors, lit_config.json and, last, lit_adapter.json; returns the fields of the latter.

    base_dir: the base checkpoint. Its path and a fingerprint of its weights are noted, and its tokenizer's files are
        copied. None: load_model cannot load the directory, only load_adapter can, into a model that is there already.
    Each file is replaced whole. Raises ValueError when the model has no adapter, or another than the config says, and
    OSError when the disk is full.
    """
    directory, state = Path(directory), adapter_state(model)
    check_state(state, expected_state(model, config), "The model")
    fields = {"kind": config.kind, "adapter": asdict(config)}
    if base_dir is not None:
        base_dir = Path(base_dir)
        fields |= describe_base(base_dir, directory)
    tensors = {name_in_file(name): as_lazy(tensor) for name, tensor in state.items()}
    descriptions = {CONFIG_FILE: model.config.to_dict(), ADAPTER_FILE: fields}
    write_adapter(directory, WEIGHTS_FILE, tensors, descriptions, base_dir)
    return fields


@torch.no_grad()
def load_adapter(model: GPT, directory: str | Path) -> AdapterConfig:
    """Give a built model the adapter of a directory, as add_adapter and training left it. Returns its config.

    The model is unchanged unless all of it fits. Raises FileNotFoundError or ValueError in one sentence.
    """
    directory = Path(directory)
    config, tensors = read_adapter_config(directory), open_safetensors(find_inside(directory, WEIGHTS_FILE))
    tensors = {name.replace(".attn.meet.", ".attn.mixer."): tensor for name, tensor in tensors.items()}
    adapter_targets(model, config)  # which has no adapter yet
    check_state(tensors, expected_state(model, config), directory / WEIGHTS_FILE)
    loaded = {name: load_finite(tensor, name, directory / WEIGHTS_FILE) for name, tensor in tensors.items()}
    add_adapter(model, config)
    for name, tensor in loaded.items():
        model.get_parameter(name).copy_(tensor)
    return config


def name_in_file(name: str) -> str:
    """A parameter's name as adapter files have it: they keep the name that the mixer had when the format was made."""
    return name.replace(".attn.mixer.", ".attn.meet.")


def is_llama_adapter(directory: Path) -> bool:
    """True for a directory that save_adapter wrote, False for LoRA, PEFT's own included."""
    return adapter_kind(directory) in KINDS


def read_adapter_config(directory: str | Path) -> AdapterConfig:
    """The config in a directory's lit_adapter.json. Raises FileNotFoundError or ValueError."""
    path = find_inside(Path(directory), ADAPTER_FILE)
    content = read_json(path)
    kind, fields = content.get("kind"), content.get("adapter")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{path} is of the kind {str(kind)[:40]!r}, which is none of {', '.join(KINDS)}.")
    known = set(AdapterConfig.__dataclass_fields__)
    if not isinstance(fields, dict) or set(fields) != known:
        raise ValueError(f"{path} is damaged: its adapter must have {', '.join(sorted(known))}, and nothing else.")
    try:
        config = AdapterConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{path} does not describe an adapter: {str(error)[:300]}") from None
    if config.kind != kind:
        raise ValueError(f"{path} is damaged: it is of the kind {kind!r} and its version is {config.version}.")
    return config


def expected_state(model: GPT, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what adapter_state holds for this config, whether the adapter is there yet or not."""
    return dict(_expected(model, config))


def _expected(model: GPT, config: AdapterConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    for i in range(config.start_layer, len(model.transformer.h)):
        yield f"transformer.h.{i}.attn.mixer.adapter.prompt", (config.prompt_length, model.config.n_embd)
        yield f"transformer.h.{i}.attn.mixer.adapter.gate", (model.layers[i].n_head,)
    for name, module in model.named_modules() if config.version == 2 else ():
        if name.startswith("transformer.h.") and can_train_beside(module):
            yield from ((f"{name}.adapter.{key}", (module.out_features,)) for key in ("bias", "scale"))
        elif isinstance(module, NORMS):
            yield from ((f"{name}.{key}", tuple(p.shape)) for key, p in module.named_parameters(recurse=False))


def check_state(tensors: dict[str, Any], expected: dict[str, tuple[int, ...]], where: object) -> None:
    """Raises ValueError unless these tensors have exactly the expected names and shapes, and are real numbers."""
    remedy = "the adapter was made for another model or with other settings."
    if missing := [name for name in expected if name not in tensors]:
        raise ValueError(f"{where} has no {missing[0]}, which its config asks for: {remedy}")
    if more := [name for name in tensors if name not in expected]:
        raise ValueError(f"{where} has {more[0][:120]}, which its config has no place for: {remedy}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            given = list(tensors[name].shape)
            raise ValueError(f"{where} has {name} as {given} and the model asks for {list(shape)}: {remedy}")
        if not tensors[name].dtype.is_floating_point:
            raise ValueError(f"{where} has {name} as {tensors[name].dtype}: it must be of floating point.")
