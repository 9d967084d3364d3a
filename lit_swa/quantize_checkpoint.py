"""Quantising a checkpoint directory into another: one block of the model is in memory at a time.

int8, int4 and int4-hqq look at the weights alone. int4-gptq runs a text through the blocks as well, each on what the
quantised ones before it make of the text, so that a block makes up for some of their errors too.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from lit_swa.config import Config
from lit_swa.expert_formats import stack_linears
from lit_swa.formats.checkpoint import load_model, set_tensor
from lit_swa.formats.directory import (
    check_tensors,
    check_weights_dir,
    load_config,
    open_weights,
    read_quantization,
    save_checkpoint,
)
from lit_swa.formats.files import LazyTensor, require_space
from lit_swa.formats.hugging_face import empty_model
from lit_swa.formats.quantized import GROUPED, Quantization, require_dense, stored_tensors
from lit_swa.gptq import gptq
from lit_swa.linear_formats import is_experts, weighty_layers
from lit_swa.memory import require_memory
from lit_swa.model import GPT
from lit_swa.quantize import HEAD, pick_group, quantize_linear, require_finite
from lit_swa.rope import RoPE
from lit_swa.weight_only import GROUP_SIZES, Int4Linear, WeightOnlyLinear

GPTQ = "int4-gptq"
EMBEDDING = "transformer.wte.weight"
Show = Callable[[int, int, str], None]  # layers done, layers in all, the last one's name


def quantize_checkpoint(
    directory: Path,
    output_dir: Path,
    stored: Quantization,
    device: torch.device,
    text: Tensor | None = None,
    show: Show = lambda done, total, name: None,
) -> None:
    """Write a checkpoint directory whose linear layers are quantised as `stored` says.

    The arguments are those that plan_quantization found fit. device: where blocks are computed, in float32.
    text: for int4-gptq, token ids (windows, tokens).
    Raises ValueError for weights that cannot be quantised, OSError for a disk that is full. Nothing is written before
    all layers are done.
    """
    config, tensors = load_config(directory), open_weights(directory)
    require_room(config, tensors, stored)
    state = {name: tensor.load() for name, tensor in tensors.items()}  # of which what is quantised is replaced
    total = sum(name.endswith((".scale", ".scales")) for name in expected_bytes(config, stored))
    layers = quantized_layers(config, tensors, stored, device, text)
    for done, (name, linear) in enumerate(layers, start=1):
        state |= {f"{name}.{key}": tensor.cpu() for key, tensor in linear.state_dict().items() if key != "bias"}
        show(done, total, name)
    save_checkpoint(state, replace(config, tie_embeddings=False), output_dir, source_dir=directory, stored=stored)


def quantized_on_the_way(
    config: Config, tensors: Mapping[str, LazyTensor], mode: str, group_size: int | None = None
) -> tuple[Config, dict[str, LazyTensor], Quantization]:
    """Config, weights and storage of the checkpoint that scripts/quantize.py would make of these weights. Each layer is
    quantised when its codes are loaded, so that one is in memory at a time.

    Raises ValueError for a mode that reads a text, and a group_size that does not fit.
    """
    if mode == GPTQ:
        raise ValueError(f"{GPTQ} reads a text with the whole model: convert without it, then use scripts/quantize.py.")
    stored = Quantization(mode, choose_group(config, mode, group_size))
    if config.tie_embeddings:
        config, tensors = replace(config, tie_embeddings=False), {**tensors, f"{HEAD}.weight": tensors[EMBEDDING]}
    model, made = empty_model(config).eval(), {}  # made: the layer that was quantised last
    layers = weighty_layers(model)

    def load(layer: str, key: str) -> Tensor:
        if layer not in made:
            fill(model, layer, tensors, torch.device("cpu"))
            made.clear()
            kind = "int8" if layer == HEAD else mode
            made[layer] = quantize_linear(layers[layer], kind, group_size=stored.group_size).state_dict()
            layers[layer].to("meta")
        return made[layer][key]

    result = {}
    for name, empty in stored_tensors(config, stored).items():
        layer, _, key = name.rpartition(".")
        result[name] = tensors.get(name)
        if layer in layers and key != "bias":
            result[name] = LazyTensor(tuple(empty.shape), empty.dtype, functools.partial(load, layer, key))
    return config, result, stored


def plan_quantization(directory: Path, output_dir: Path, mode: str, group_size: int | None) -> Quantization:
    """How the checkpoint's layers are going to be stored. Nothing is written or computed yet.

    Raises FileNotFoundError, ValueError or OSError, with the remedy, for a checkpoint, mode or group_size that does not
    fit, and for a disk that does not hold the result.
    """
    check_weights_dir(directory)
    require_dense(read_quantization(directory), directory, "take the checkpoint that it was made of")
    if directory.resolve() == output_dir.resolve():
        raise ValueError(f"{output_dir} is the checkpoint itself: choose another --output_dir.")
    config, tensors = load_config(directory), open_weights(directory)
    check_tensors(config, tensors, directory)
    stored = Quantization(mode, choose_group(config, mode, group_size))
    needed = expected_bytes(config, stored, tensors[EMBEDDING].dtype)
    require_space(writable_place(output_dir), sum(needed.values()))
    return stored


def writable_place(directory: Path) -> Path:
    """The directory, or the one of its parents that it is going to be made in. Raises OSError where it cannot be."""
    there = next(place for place in (directory, *directory.absolute().parents) if place.exists() or place.is_symlink())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file, no directory: choose another --output_dir.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there} cannot be written to: choose another --output_dir.")
    return there


def require_room(config: Config, tensors: Mapping[str, LazyTensor], stored: Quantization) -> None:
    """Raises ValueError when the memory does not hold the result beside the embedding and a block in float32."""
    parts = ["transformer.wte", *(f"transformer.h.{i}" for i in range(config.n_layer))]
    sizes = dict.fromkeys(parts, 0)
    for name, tensor in tensors.items():
        part = re.match(r"transformer\.(wte|h\.\d+)(?=\.)", name)
        if part:
            sizes[part[0]] += 4 * math.prod(tensor.shape)
    needed = sizes.pop("transformer.wte") + max(sizes.values()) + sum(expected_bytes(config, stored).values())
    what = "The quantised weights, and one block that is not yet,"
    require_memory(needed, torch.device("cpu"), what, "end other programs, or use a machine with more memory")


def choose_group(config: Config, mode: str, group_size: int | None) -> int | None:
    """The group_size to use. Raises ValueError for one that does not fit the mode or a layer."""
    if not GROUPED[mode]:
        if group_size is not None:
            raise ValueError(f"{mode} has one scale for each row, and no groups: leave --group_size out.")
        return None
    if group_size is not None and group_size not in GROUP_SIZES:
        choices = ", ".join(map(str, GROUP_SIZES))
        raise ValueError(f"--group_size {group_size} does not exist: {mode} needs groups of {choices}.")
    return pick_group(weighty_layers(empty_model(config)), "int4", group_size)


def expected_bytes(config: Config, stored: Quantization, dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Name -> bytes of every tensor that is going to be written. Raises ValueError for a group that does not divide."""
    tensors = stored_tensors(replace(config, tie_embeddings=False), stored)
    return {name: t.numel() * (dtype if t.dtype == torch.float32 else t.dtype).itemsize for name, t in tensors.items()}


def quantized_layers(
    config: Config, tensors: Mapping[str, LazyTensor], stored: Quantization, device: torch.device, text: Tensor | None
) -> Iterator[tuple[str, WeightOnlyLinear]]:
    """Every linear layer of a checkpoint by its name, quantised, in the model's order."""
    model = empty_model(config).eval()
    fill(model, "transformer.wte", tensors, device)
    calibration = None if text is None else Calibration(model, text, device)
    for i, block in enumerate(model.transformer.h):
        prefix = f"transformer.h.{i}"
        fill(model, prefix, tensors, device)
        if calibration is None:
            for name, linear in weighty_layers(block).items():
                yield f"{prefix}.{name}", quantize_linear(linear, stored.mode, group_size=stored.group_size)
        else:
            for name, linear in calibration.quantize_block(block, stored.group_size):
                yield f"{prefix}.{name}", linear
        block.to("meta")
    if config.tie_embeddings:
        model.tie_weights()
    else:
        fill(model, HEAD, tensors, device)
    yield HEAD, quantize_linear(model.lm_head, "int8")


def fill(model: GPT, prefix: str, tensors: Mapping[str, LazyTensor], device: torch.device) -> None:
    """Give a part of an empty model its weights, in float32."""
    for name in [name for name in tensors if name.startswith(f"{prefix}.")]:
        module, _, key = name.rpartition(".")
        set_tensor(model.get_submodule(module), key, tensors[name].load().to(device), torch.float32)


class Calibration:
    """A text on its way through the blocks."""

    def __init__(self, model: GPT, text: Tensor, device: torch.device) -> None:
        """text: token ids (windows, tokens)."""
        windows, tokens = text.shape
        needed = 4 * windows * tokens * model.config.n_embd
        require_memory(
            needed, torch.device("cpu"), f"The calibration text's {windows * tokens} states", "use less of it"
        )
        self.device = device
        model.rope = RoPE(model.config)
        model.rope.to(device)
        self.call = model.plan_call(text[:1].to(device), None)
        blocks, model.transformer.h = model.transformer.h, nn.ModuleList()  # the embedding, as the model scales it
        with torch.no_grad():
            self.states = [model.run_blocks(window[None].to(device), self.call).cpu() for window in text]
        model.transformer.h = blocks

    @torch.no_grad()
    def quantize_block(self, block: nn.Module, group_size: int) -> Iterator[tuple[str, Int4Linear]]:
        """The quantised linear layers of a block, by name. The text then goes through them to the next block."""
        hessians = self.hessians(block)
        if not all(bool(hessian.isfinite().all()) for hessian in hessians.values()):
            raise ValueError("The calibration text leads to NaN or infinity in the model: its weights are damaged.")
        for name, linear in weighty_layers(block).items():
            require_finite(linear.weight)
            if is_experts(linear):
                each = [hessians.get((name, e)) for e in range(linear.weight.size(0))]
                each = [calibrated(linear.linear(e), hessian, group_size) for e, hessian in enumerate(each)]
                quantized = stack_linears(each)
            else:
                quantized = calibrated(linear, hessians[name], group_size)
            linear.weight = nn.Parameter(quantized.dense_weight(), requires_grad=False)
            yield name, quantized
        for n, states in enumerate(self.states):
            self.states[n] = block(states.to(self.device), self.call).cpu()

    def hessians(self, block: nn.Module) -> dict[str | tuple[str, int], Tensor]:
        """For each linear layer of a block, and each expert that was chosen, the sum of x x^T over its inputs x,
        (in, in)."""
        sums: dict[str | tuple[str, int], Tensor] = {}
        last: list[tuple[Tensor, str | tuple[str, int]]] = []  # layers that are given the same inputs share a sum

        def note(name: str, given: Tensor, expert: int | None = None) -> None:
            key = name if expert is None else (name, expert)
            if last and last[0][0] is given:
                sums[key] = sums[last[0][1]]
                return
            last[:] = [(given, key)]
            x = given.flatten(0, -2)  # (tokens, in)
            sums[key] = x.T @ x if key not in sums else sums[key].addmm_(x.T, x)

        hooks = [
            module.register_forward_pre_hook(lambda module, inputs, name=name: note(name, *inputs))
            for name, module in weighty_layers(block).items()
        ]
        block.mlp.one_by_one = True
        for states in self.states:
            block(states.to(self.device), self.call)
        for hook in hooks:
            hook.remove()
        return sums


def calibrated(linear: nn.Linear, hessian: Tensor | None, group_size: int) -> Int4Linear:
    """The layer in 4 bits. hessian: None for an expert that no token of the text chose: all inputs are alike."""
    if hessian is None:
        hessian = torch.eye(linear.in_features, device=linear.weight.device)
    return Int4Linear.from_codes(*gptq(linear.weight, hessian, group_size), linear.bias)


@torch.no_grad()
def own_text(directory: Path, device: torch.device, windows: int, tokens: int, seed: int, show: Show) -> Tensor:
    """A text that the model writes itself, (windows, tokens), to calibrate on where none is given: each window begins
    with a token at random, and goes on with what is sampled."""
    dtype = open_weights(directory)[EMBEDDING].dtype
    model = load_model(directory, dtype, device)
    model.set_kv_cache(windows, tokens)
    generator = torch.Generator(device).manual_seed(seed)
    vocabulary = model.config.vocab_size
    written = [torch.randint(vocabulary, (windows, 1), generator=generator, device=device)]
    for at in range(tokens - 1):
        logits = model(written[-1], torch.tensor([at], device=device))[:, -1, :vocabulary].float()
        if not bool(logits.isfinite().all()):
            raise ValueError(f"The model writes no numbers in {dtype}: give a text with --calibration_data.")
        written.append(torch.multinomial(logits.softmax(dim=-1), 1, generator=generator))
        show(at + 2, tokens, "")
    return torch.cat(written, dim=1).cpu()
