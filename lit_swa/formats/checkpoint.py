"""A model from a checkpoint directory, whether the directory holds a whole checkpoint or an adapter and names its base.

This is the top of the formats: it decides by what the directory holds (directory.py, adapter_files.py) and hands over.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lit_swa import adapter
from lit_swa.config import Config
from lit_swa.formats.adapter_files import named_fingerprint, read_base, read_fingerprint, weights_fingerprint
from lit_swa.formats.directory import (
    ADAPTER_FILE,
    CONFIG_FILE,
    check_tensors,
    check_weights_dir,
    has_tokenizer,
    is_adapter_dir,
    open_weights,
    read_quantization,
)
from lit_swa.formats.directory import load_config as read_config
from lit_swa.formats.files import LazyTensor, find_inside, open_safetensors
from lit_swa.formats.peft_load import check_peft_dir, find_adapter_config, load_adapter
from lit_swa.formats.quantized import Quantization, dense_tensors, empty_quantized, is_of_format, require_dense
from lit_swa.lora import merge_lora, require_held
from lit_swa.memory import require_memory
from lit_swa.model import GPT
from lit_swa.parallel import ALONE, Rank, connect, shrink
from lit_swa.quantize import (
    HEAD,
    WEIGHT_ONLY,
    is_replaced,
    layer_mode,
    pick_group,
    quantizable_linears,
    quantize_linear,
    quantized_bytes,
    replace_linear,
    round_linears,
)
from lit_swa.rope import RoPE
from lit_swa.weight_only import WeightOnlyLinear

# --------------------------------------------------------------------------------------------------------------- check


def check_checkpoint_dir(
    checkpoint_dir: str | Path, tokenizer: bool = True, base_dir: str | Path | None = None
) -> None:
    """Return if the directory can be loaded. Raises an error that names what is there, what is missing and what to do.

    The weight files' headers are read, so a truncated file is noticed; their numbers are not. A directory with an
    adapter needs its base checkpoint too: base_dir, or the one that it names.
    """
    directory = Path(checkpoint_dir)
    if not is_adapter_dir(directory):
        if base_dir is not None:
            raise ValueError(f"{directory} is no adapter: leave base_checkpoint_dir out.")
        return check_weights_dir(directory, tokenizer)
    if adapter.is_llama_adapter(directory):
        adapter.read_adapter_config(directory)
        open_safetensors(find_inside(directory, adapter.WEIGHTS_FILE))
    else:
        check_peft_dir(directory)
    check_base(base_of(directory, base_dir))
    load_config(directory, base_dir)
    if tokenizer and not has_tokenizer(tokenizer_dir(directory, base_dir)):
        raise FileNotFoundError(f"{directory} has no tokenizer.json, and neither has its base: put one there.")


def is_complete(checkpoint_dir: str | Path) -> bool:
    """True when check_checkpoint_dir has nothing to say."""
    try:
        check_checkpoint_dir(checkpoint_dir)
    except (ValueError, OSError):
        return False
    return True


def find_base(directory: Path) -> tuple[Path, str | None]:
    """The base checkpoint of an adapter, and the fingerprint that its weights had. Raises an error with the remedy."""
    if not adapter.is_llama_adapter(directory):
        find_adapter_config(directory)
    return read_base(directory)


def base_of(directory: Path, base_dir: str | Path | None) -> Path:
    """The base checkpoint of an adapter: the one that is given, else the one that it names."""
    return Path(base_dir) if base_dir is not None else find_base(directory)[0]


def tokenizer_dir(checkpoint_dir: str | Path, base_dir: str | Path | None = None) -> Path:
    """Where the tokenizer is: in the directory itself or, for an adapter that has none, in its base checkpoint."""
    directory = Path(checkpoint_dir)
    own = not is_adapter_dir(directory) or has_tokenizer(directory)
    return directory if own else base_of(directory, base_dir)


def load_config(checkpoint_dir: str | Path, base_dir: str | Path | None = None) -> Config:
    """The config of a checkpoint directory or, for an adapter of PEFT's own, which has none, of its base checkpoint.

    Raises FileNotFoundError or ValueError, which names the file.
    """
    directory = Path(checkpoint_dir)
    own = not is_adapter_dir(directory) or (directory / CONFIG_FILE).exists() or (directory / ADAPTER_FILE).exists()
    return read_config(directory if own else base_of(directory, base_dir))


def check_base(base: Path) -> None:
    if is_adapter_dir(base):
        raise ValueError(f"The base checkpoint {base} is an adapter itself: merge it with scripts/merge_lora.py.")
    check_weights_dir(base, tokenizer=False)


def check_dtype(dtype: torch.dtype | str, device: torch.device | str) -> tuple[torch.dtype, torch.device]:
    """The dtype and device of these names. Raises ValueError for what this machine lacks."""
    names = ("float32", "bfloat16", "float16", "float64")
    chosen = getattr(torch, dtype, None) if dtype in names else dtype
    if chosen not in [getattr(torch, name) for name in names]:
        raise ValueError(f"The dtype {dtype!r} is not one for weights: choose from {', '.join(names)}.")
    try:
        place = torch.device(device)
        torch.empty(1, device=place, dtype=chosen)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:160]
        raise ValueError(
            f"The device {str(device)!r} cannot hold {str(chosen).removeprefix('torch.')} here ({reason}): "
            "choose another device or dtype."
        ) from None
    if place.type == "cuda" and chosen == torch.bfloat16 and not torch.cuda.is_bf16_supported():
        raise ValueError(f"The device {place} has no bfloat16: use float16 or float32.")
    return chosen, place


# ---------------------------------------------------------------------------------------------------------------- load

LEAVE_OUT = "leave --quantize out, or quantise the checkpoint that it was made of"


def load_model(
    checkpoint_dir: str | Path,
    dtype: torch.dtype | str | None = torch.float32,
    device: torch.device | str = "cpu",
    *,
    merge: bool = True,
    base_dir: str | Path | None = None,
    quantize: str | None = None,
    group_size: int | None = None,
    rank: Rank = ALONE,
    **config_overrides: Any,
) -> GPT:
    """The model of a checkpoint directory, in eval mode, its weights in `dtype` on `device`; None: in their own.

    A directory with an adapter gives the base model with the adapter in it.

    merge: fold an adapter into the weights, for speed; otherwise it stays apart from them, as in training.
    base_dir: the base checkpoint of an adapter, instead of the one that it names.
    quantize: hold the weights of linear layers in 4 or 8 bits, a mode of lit_swa.quantize. An adapter then stays
        apart from them, as QLoRA trains it. A checkpoint that scripts/quantize.py wrote needs no such word.
    group_size: of int4, 32, 64 or 128; None: the largest that fits all layers.
    rank: one of several processes that share the model: only what it holds is read (see parallel.py).
    config_overrides: fields of Config that replace those of lit_config.json.
    Weights are mapped from the file and go to the device one by one, where each is cast or quantised: the peak is one
    copy of the model and one more tensor. A model whose stored dtype is asked for, on the CPU, keeps using the file's
    pages.
    Raises FileNotFoundError or ValueError when the directory is incomplete or damaged, the device lacks the dtype, or
    an override does not fit the weights.
    """
    directory = Path(checkpoint_dir)
    kind, device = check_dtype(dtype or torch.float32, device)
    dtype = dtype and kind
    check_checkpoint_dir(directory, tokenizer=False, base_dir=base_dir)
    if is_adapter_dir(directory):
        if rank.size > 1:
            raise ValueError(
                f"{directory} is an adapter, which is not split: merge a LoRA with scripts/merge_lora.py, and use a "
                "LLaMA-Adapter on one device."
            )
        merge = merge and not quantize and read_quantization(base_of(directory, base_dir)) is None
        how = {"merge": merge, "base_dir": base_dir, "quantize": quantize, "group_size": group_size}
        return load_adapted(directory, dtype, device, **how, **config_overrides)
    config = read_config(directory).override(**config_overrides)
    tensors, stored = open_weights(directory), read_quantization(directory)
    check_tensors(config, tensors, directory, stored)
    if quantize is not None:
        require_dense(stored, directory, LEAVE_OUT)
    dtype = dtype or tensors["transformer.wte.weight"].dtype
    return build_model(config, tensors, dtype, device, quantize, group_size, stored, rank)


def load_adapted(
    directory: str | Path,
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    merge: bool = True,
    base_dir: str | Path | None = None,
    quantize: str | None = None,
    group_size: int | None = None,
    **config_overrides: Any,
) -> GPT:
    """The base model with a directory's adapter, merged into the weights or apart from them, in eval mode.

    LLaMA-Adapters always stay apart from them.
    dtype: None is that of the base's weights. Merging is done in the wider of both dtypes and rounded once. Into a
        quantised base it is done after its weights were made dense, and the result is dense.
    quantize: hold the base's blocks in this mode of lit_swa.quantize or, where the adapter is merged, round their
        weights as it does: QLoRA was trained with these numbers.
    base_dir: the base checkpoint; None: the one that the directory names. Without lit_config.json (PEFT's and
        LongLoRA's directories have none) the base's config counts.
    Raises FileNotFoundError or ValueError when something is missing, base and adapter do not fit, or a merged weight
    is beyond the dtype.
    """
    directory = Path(directory)
    llama_adapter = adapter.is_llama_adapter(directory)
    base = _checked_base(directory, base_dir)
    base_config, tensors, stored = read_config(base), open_weights(base), read_quantization(base)
    trained = read_config(directory) if (directory / CONFIG_FILE).exists() else base_config
    own = ("padded_vocab_size", "vocab_size", "tie_embeddings")  # which the adapter may change
    config = replace(trained.override(**config_overrides), **{name: getattr(base_config, name) for name in own})
    check_tensors(config, tensors, base, stored)
    if quantize is not None:
        require_dense(stored, base, LEAVE_OUT)
    base_dtype = tensors["transformer.wte.weight"].dtype
    dtype = dtype or base_dtype
    if merge and not llama_adapter:
        wide = torch.promote_types(base_dtype, dtype)
        model = build_model(config, dense_tensors(config, tensors, stored, wide), wide, device)
        if quantize:
            round_linears(model, quantize)
        load_adapter(model, directory)
        merge_lora(model)
        model.to(dtype)
        for name, p in model.named_parameters() if dtype != wide else ():
            require_held(p, name.removesuffix(".weight"))
    else:
        model = build_model(config, tensors, dtype, device, quantize, group_size, stored)
        (adapter.load_adapter if llama_adapter else load_adapter)(model, directory)
    if trained is not base_config:
        if model.config.padded_vocab_size != trained.padded_vocab_size:
            raise ValueError(
                f"{directory / CONFIG_FILE} has a vocabulary of {trained.padded_vocab_size} rows and the adapter one "
                f"of {model.config.padded_vocab_size}: they do not belong together."
            )
        model.config.vocab_size = trained.vocab_size
    return model.eval()


def _checked_base(directory: Path, base_dir: str | Path | None) -> Path:
    """The base checkpoint to load an adapter into: whole, and the one that the adapter was trained on. Another one that
    is given by hand is taken, and stderr says so."""
    if not adapter.is_llama_adapter(directory):
        find_adapter_config(directory)
    if base_dir is None:
        base, fingerprint = find_base(directory)
    else:
        base, fingerprint = Path(base_dir), read_fingerprint(directory) or named_fingerprint(directory)
    check_base(base)
    if fingerprint is None or weights_fingerprint(base) == fingerprint:
        return base
    if base_dir is not None:
        print(f"note: the weights in {base} are not those that {directory} was trained on.", file=sys.stderr)
    else:
        raise ValueError(
            f"The weights in {base} are not those that {directory} was trained on: restore them, or take "
            f"base_identity out of {directory / ADAPTER_FILE} to use them all the same."
        )
    return base


# --------------------------------------------------------------------------------------------------------------- build


def build_model(
    config: Config,
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None = None,
    group_size: int | None = None,
    stored: Quantization | None = None,
    rank: Rank = ALONE,
) -> GPT:
    """A GPT made of these weights, in eval mode. It is built without memory, then given them one at a time.

    quantize, group_size: a mode of lit_swa.quantize for its linear layers, each of which is dense on the device for as
        long as it takes to quantise it. Raises ValueError, before anything is loaded, when one cannot be quantised.
    stored: how the weights are quantised already, if they are.
    rank: one of several processes that share the model: it is given its part of each tensor.
    """
    model = empty_quantized(config, stored)
    if quantize is not None:  # the groups are those of the whole layers
        group_size = pick_group(quantizable_linears(model, quantize, dtype, device, group_size), quantize, group_size)
    if rank.size > 1:
        tensors = shrink(model, rank, tensors)
    needed = loaded_bytes(tensors, dtype, device, quantize, stored)
    remedy = "use --dtype bfloat16, --quantize int4 or a smaller model"
    require_memory(needed, device, f"The weights, as {str(dtype).removeprefix('torch.')} on {device},", remedy)
    model.rope = RoPE(config)  # its frequencies are computed, not stored
    model.rope.to(device)
    fill_model(model, tensors, dtype, device, quantize, group_size)
    model.tie_weights()
    if rank.size > 1:
        connect(model, rank)
    if device.type != "meta":
        empty = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
        assert not empty, f"{empty[:3]} were never filled"
    return model.eval()


def fill_model(
    model: GPT,
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None,
    group_size: int | None,
) -> None:
    """Give an empty model its tensors, one at a time. What is to be quantised is dense until the next is read."""
    linears = quantizable_linears(model, quantize, dtype, device, group_size) if quantize is not None else {}
    keys: dict[str, list[str]] = {}  # module -> its stored tensors
    for name in tensors:
        module_name, _, key = name.rpartition(".")
        keys.setdefault(module_name, []).append(key)
    if model.config.tie_embeddings and HEAD in linears:  # which is made of wte
        keys[HEAD] = []
    for name in sorted(keys, key=lambda name: name == HEAD):
        module = model.get_submodule(name)
        for key in keys[name]:
            set_tensor(module, key, tensors[f"{name}.{key}"].load().to(device), dtype)
        if isinstance(module, WeightOnlyLinear):
            module.compute_dtype = dtype
        if linear := linears.pop(name, None):
            model.tie_weights()
            quantized = quantize_linear(linear, layer_mode(name, quantize), dtype, device, group_size)
            del linear
            replace_linear(model, name, quantized)


def loaded_bytes(
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None = None,
    stored: Quantization | None = None,
) -> int:
    """Bytes that build_model allocates for these weights, at least. Those that stay a file's pages take none."""
    total = 0
    for name, tensor in tensors.items():
        if quantize is not None and is_replaced(name, tensor.shape, quantize):
            total += quantized_bytes(tensor.shape, layer_mode(name.removesuffix(".weight"), quantize))
            continue
        held = tensor.dtype if stored is not None and is_of_format(name, tensor.dtype) else dtype
        if device.type != "cpu" or tensor.dtype != held:
            total += held.itemsize * math.prod(tensor.shape)
    if quantize in WEIGHT_ONLY and f"{HEAD}.weight" not in tensors:  # tied: a copy of its own in 8 bits
        total += quantized_bytes(tensors["transformer.wte.weight"].shape, "int8")
    return total


def set_tensor(module: nn.Module, key: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Make a tensor a module's parameter in `dtype`, without a copy where it has it. Codes and scales keep theirs."""
    place = getattr(module, key)
    assert place.shape == tensor.shape
    if isinstance(place, nn.Parameter):
        tensor = nn.Parameter(tensor.to(dtype), requires_grad=place.requires_grad)
    elif key == "bias":
        tensor = tensor.to(dtype)
    setattr(module, key, tensor)
