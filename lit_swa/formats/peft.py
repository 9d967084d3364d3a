"""LoRA on the disk, in the format of Hugging Face's PEFT, which both libraries load to the same logits: names, saving.

A trained directory holds adapter_config.json and adapter_model.safetensors, which are PEFT's, and what all adapter
directories hold (adapter_files.py). Reading is in peft_load.py.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lit_swa.config import Config
from lit_swa.formats.adapter_files import describe_base, write_adapter
from lit_swa.formats.directory import ADAPTER_FILE, CONFIG_FILE, PEFT_CONFIG, STEM
from lit_swa.formats.files import as_lazy, find_inside
from lit_swa.formats.hf_config import find_architecture, language_model
from lit_swa.formats.hf_names import names_of
from lit_swa.formats.hugging_face import has_neighbours, hf_module_names, split_qkv, to_neighbours
from lit_swa.formats.json_files import read_json
from lit_swa.formats.reading import is_listed
from lit_swa.linear_formats import ALL, dense_weight, is_experts, is_linear
from lit_swa.lora import LoRAConfig, extra_modules, lora_linears
from lit_swa.model import GPT

PEFT_STEM = "adapter_model"
# What PEFT is told to adapt where transformers joins the layers: an expression that fits no name, so that PEFT refuses
# the directory, and quotes it, instead of leaving these layers out.
FOR_US = "(?!)This model's layers are joined in transformers: merge the adapter with scripts/merge_lora.py, and export."


@dataclass
class Weights:
    """What one linear layer of Hugging Face's has of LoRA: A (r, in), B (out, r), for DoRA m (out,)."""

    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None = None


def hf_modules(model: GPT) -> dict[str, tuple[str, int, int]]:
    """Hugging Face's name of each module with weights -> ours, which part of ours it is, and of how many."""
    table, result = hf_module_names(model.config), {}
    for name, module in model.named_modules():
        layer = re.search(r"\.h\.(\d+)\.", name)
        hf_names = table.get(name) or table.get(re.sub(r"\.h\.\d+\.", ".h.{i}.", name), ())
        if not (is_linear(module) or hasattr(module, "weight")) or any("{e}" in n or "{h}" in n for n in hf_names):
            continue
        if is_experts(module) or not (is_linear(module) or module.weight.dim() <= 2):  # nor norms of each head
            continue
        for n, hf_name in enumerate(hf_names):
            hf_name = "lm_head" if hf_name == "embed_out" else hf_name.format(i=layer and layer[1])
            result[hf_name] = (name, n, len(hf_names))
    return result


# --------------------------------------------------------------------------------------------------------------- saving


def save_adapter(model: GPT, directory: str | Path, base_dir: str | Path, lora: LoRAConfig) -> None:
    """Write what was trained on the base checkpoint `base_dir`, whose tokenizer's files are copied.

    Each file is replaced whole. peft.PeftModel.from_pretrained(transformers_model, directory) loads the directory, and
    so do load_model, scripts/merge_lora.py and, into a built model, peft_load.load_adapter.
    Raises ValueError when the model has no LoRA or the directory holds a checkpoint, OSError when the disk is full.
    """
    directory, base_dir = Path(directory), Path(base_dir)
    if any(directory.glob(f"{STEM}*.safetensors")):
        raise ValueError(f"{directory} holds a checkpoint already, which would hide the adapter: choose another one.")
    modules, entries = hf_modules(model), lora_entries(model)
    if not entries:
        raise ValueError("The model has no LoRA to save: add_lora gives it one.")
    saved, targets = saved_modules(model, modules, lora, set(entries))
    tensors = {}
    for name, weights in entries.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = weights.A, weights.B
        if weights.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = weights.magnitude
    for name, stored in saved.items():
        for key, tensor in model.get_submodule(modules[name][0]).named_parameters(recurse=False):
            tensors[f"{stored}.{key}"] = tensor
    fields = asdict(lora) | {"targets": list(lora.targets), "extra_trainable": list(lora.extra_trainable)}
    peft = peft_config_of(entries, modules, targets, lora, base_dir)
    if joins_layers(base_dir, model.config):
        peft["target_modules"] = FOR_US
    descriptions = {
        CONFIG_FILE: model.config.to_dict(),
        PEFT_CONFIG: peft,
        ADAPTER_FILE: {"kind": "lora"} | describe_base(base_dir, directory) | {"lora": fields},
    }
    lazy = {f"base_model.model.{name}": as_lazy(tensor) for name, tensor in tensors.items()}
    write_adapter(directory, f"{PEFT_STEM}.safetensors", lazy, descriptions, base_dir)


def joins_layers(base_dir: Path, config: Config) -> bool:
    """True if transformers, which may load the base as it was downloaded, holds several of our layers there as one."""
    if not is_listed(base_dir / "config.json"):
        return False
    with suppress(ValueError, OSError):
        hf = read_json(find_inside(base_dir, "config.json"))
        return bool(names_of(find_architecture(language_model(hf)), config).fused)
    return False


def lora_entries(model: GPT) -> dict[str, Weights]:
    """Every LoRA by Hugging Face's module name. Where that is one module for q, k and v, their parts are joined."""
    names: dict[str, list[str]] = {}
    for hf_name, (name, _, _) in hf_modules(model).items():
        names.setdefault(name, []).append(hf_name)
    result, neighbours = {}, has_neighbours(model.config)
    for name, linear in lora_linears(model):
        parts = linear.lora.parts
        if name not in names:
            raise ValueError(f"The layer {name} has no counterpart in Hugging Face's models: its LoRA cannot be saved.")
        if len(names[name]) == 3:
            for part, hf_name in zip("qkv", names[name], strict=True):
                if part in parts:
                    found = Weights(parts[part].A, parts[part].B, parts[part].scaling, parts[part].magnitude)
                    turned = neighbours and part != "v"
                    result[hf_name] = reordered(found, model.config.head_size, to_neighbours) if turned else found
        elif name.endswith(".attn.qkv"):
            result[names[name][0]] = joined_parts(linear, model.config)
        else:
            part = parts[ALL]
            result[names[name][0]] = Weights(part.A, part.B, part.scaling, part.magnitude)
    return result


def reordered(weights: Weights, head_size: int, order: Callable[[Tensor, int], Tensor]) -> Weights:
    """The rows of queries or keys as Hugging Face's architecture has them, or as ours, where RoPE pairs other ones."""
    m = None if weights.magnitude is None else order(weights.magnitude, head_size)
    return replace(weights, B=order(weights.B, head_size), magnitude=m)


@torch.no_grad()
def joined_parts(linear: nn.Module, config: Config) -> Weights:
    """One A (sum r, in) and one B (out, sum r) that do what a qkv layer's parts do, in GPT-NeoX's order of rows."""
    parts = sorted(linear.lora.parts.values(), key=lambda part: part.start)
    A, scaling, at = torch.cat([part.A for part in parts]), parts[0].scaling, 0
    B = A.new_zeros(linear.out_features, len(A))
    magnitude = None
    if any(part.magnitude is not None for part in parts):
        magnitude = torch.linalg.vector_norm(dense_weight(linear).float(), dim=1)
    for part in parts:
        r = len(part.A)
        B[part.start : part.stop, at : at + r] = part.B * (part.scaling / scaling if scaling else 1.0)
        at += r
        if part.magnitude is not None:
            magnitude[part.start : part.stop] = part.magnitude
    magnitude = None if magnitude is None else split_qkv(magnitude, 1, config)[0]
    return Weights(A, split_qkv(B, 1, config)[0], scaling, magnitude)


def saved_modules(
    model: GPT, modules: Mapping[str, tuple[str, int, int]], lora: LoRAConfig, adapted: set[str]
) -> tuple[dict[str, str], list[str]]:
    """The modules that are stored whole (name -> name in the file), and what PEFT's modules_to_save calls them.

    A tied lm_head is stored too: PEFT gives a trained embedding a copy of its own. One that has a LoRA as well is
    stored as that LoRA's base.
    """
    whole = set(extra_modules(model, lora.extra_trainable))
    for name, p in model.named_parameters():
        if p.requires_grad and ".lora.parts." not in name:
            whole.add(name.rpartition(".")[0])
    by_lit = {lit: hf for hf, (lit, _, n_parts) in modules.items() if n_parts == 1}
    if unknown := sorted(whole - set(by_lit)):
        raise ValueError(f"{unknown[0]} was trained and PEFT has no place for it: its adapter cannot be saved.")
    names = {by_lit[lit] for lit in whole}
    if model.config.tie_embeddings and "transformer.wte" in whole:
        names.add("lm_head")
    listed = names - adapted
    return {n: f"{n}.base_layer" if n in adapted else n for n in sorted(names)}, short_names(listed, modules)


def short_names(chosen: set[str], everything: Iterable[str]) -> list[str]:
    """PEFT's way to name modules: by how their names end. In full where the end would name more than what is chosen."""
    result = set()
    for name in chosen:
        end = name.split(".")[-1]
        result.add(end if all(other in chosen for other in everything if other.endswith(end)) else name)
    return sorted(result)


def peft_config_of(
    entries: Mapping[str, Weights], modules: Iterable[str], to_save: list[str], lora: LoRAConfig, base_dir: Path
) -> dict[str, Any]:
    """adapter_config.json. Ranks and scalings other than the config's own are in the patterns."""
    ranks, alphas = {}, {}
    for name, weights in entries.items():
        r = len(weights.A)
        alpha = weights.scaling * (r**0.5 if lora.rslora else r)
        ranks |= {name: r} if r != lora.r else {}
        alphas |= {name: round(alpha, 9)} if abs(alpha - lora.alpha) > 1e-9 * max(1.0, lora.alpha) else {}
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none",
        "base_model_name_or_path": str(base_dir.resolve()),  # in full, for AutoPeftModelForCausalLM from anywhere
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "r": lora.r,
        "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "use_rslora": lora.rslora, "use_dora": lora.dora,
        "target_modules": short_names(set(entries), modules), "modules_to_save": to_save or None,
        "rank_pattern": shared_pattern(ranks, entries), "alpha_pattern": shared_pattern(alphas, entries),
    }  # fmt: skip


def shared_pattern(values: Mapping[str, float], entries: Iterable[str]) -> dict[str, float]:
    """The values by the ends of the modules' names where all with that end agree, and by whole names elsewhere."""
    result = {}
    for name, value in values.items():
        end = name.split(".")[-1]
        alike = all(values.get(other) == value for other in entries if other.split(".")[-1] == end)
        result[end if alike else name] = value
    return result
