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
    check_shapes,
    check_weights_dir,
    has_tokenizer,
    is_adapter_dir,
    open_weights,
)
from lit_swa.formats.directory import load_config as read_config
from lit_swa.formats.files import LazyTensor, find_inside, open_safetensors
from lit_swa.formats.hugging_face import empty_model
from lit_swa.formats.peft_load import check_peft_dir, find_adapter_config, load_adapter
from lit_swa.lora import merge_lora, require_held
from lit_swa.memory import require_memory
from lit_swa.model import GPT
from lit_swa.parallel import ALONE, Rank, connect, shrink
from lit_swa.quantize import quantizable_linears, quantize_linear, round_linears
from lit_swa.rope import RoPE

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


def load_model(
    checkpoint_dir: str | Path,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    *,
    merge: bool = True,
    base_dir: str | Path | None = None,
    quantize: str | None = None,
    rank: Rank = ALONE,
    **config_overrides: Any,
) -> GPT:
    """The model of a checkpoint directory, in eval mode, its weights in `dtype` on `device`.

    A directory with an adapter gives the base model with the adapter in it.

    merge: fold an adapter into the weights, for speed; otherwise it stays apart from them, as in training.
    base_dir: the base checkpoint of an adapter, instead of the one that it names.
    quantize: hold the weights of the blocks in 4 or 8 bits, a mode of lit_swa.quantize. An adapter then stays
        apart from them, as QLoRA trains it.
    rank: one of several processes that share the model: only what it holds is read (see parallel.py).
    config_overrides: fields of Config that replace those of lit_config.json.
    Weights are mapped from the file and go to the device one by one, where each is cast or quantised: the peak is one
    copy of the model and one more tensor. A model whose stored dtype is asked for, on the CPU, keeps using the file's
    pages.
    Raises FileNotFoundError or ValueError when the directory is incomplete or damaged, the device lacks the dtype, or
    an override does not fit the weights.
    """
    directory = Path(checkpoint_dir)
    dtype, device = check_dtype(dtype, device)
    check_checkpoint_dir(directory, tokenizer=False, base_dir=base_dir)
    if is_adapter_dir(directory):
        if rank.size > 1:
            raise ValueError(f"{directory} is an adapter, which is not split: merge it with scripts/merge_lora.py.")
        how = {"merge": merge and not quantize, "base_dir": base_dir, "quantize": quantize}
        return load_adapted(directory, dtype, device, **how, **config_overrides)
    config = read_config(directory).override(**config_overrides)
    tensors = open_weights(directory)
    check_shapes(config, {name: tensor.shape for name, tensor in tensors.items()}, directory)
    return build_model(config, tensors, dtype, device, quantize, rank)


def load_adapted(
    directory: str | Path,
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    merge: bool = True,
    base_dir: str | Path | None = None,
    quantize: str | None = None,
    **config_overrides: Any,
) -> GPT:
    """The base model with a directory's adapter, merged into the weights or apart from them, in eval mode.

    LLaMA-Adapters always stay apart from them.
    dtype: None is that of the base's weights. Merging is done in the wider of both dtypes and rounded once.
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
    base_config, tensors = read_config(base), open_weights(base)
    trained = read_config(directory) if (directory / CONFIG_FILE).exists() else base_config
    own = ("padded_vocab_size", "vocab_size", "tie_embeddings")  # which the adapter may change
    config = replace(trained.override(**config_overrides), **{name: getattr(base_config, name) for name in own})
    check_shapes(config, {name: tensor.shape for name, tensor in tensors.items()}, base)
    stored = next(iter(tensors.values())).dtype
    dtype = dtype or stored
    if merge and not llama_adapter:
        model = build_model(config, tensors, torch.promote_types(stored, dtype), device)
        if quantize:
            round_linears(model, quantize)
        load_adapter(model, directory)
        merge_lora(model)
        model.to(dtype)
        for name, p in model.named_parameters() if dtype != torch.promote_types(stored, dtype) else ():
            require_held(p, name.removesuffix(".weight"))
    else:
        model = build_model(config, tensors, dtype, device, quantize)
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
    rank: Rank = ALONE,
) -> GPT:
    """A GPT made of these weights, in eval mode. It is built without memory, then given them one at a time.

    quantize: a mode of lit_swa.quantize for the linear layers of its blocks, each of which is dense on the device for
        as long as it takes to quantise it. Raises ValueError, before anything is loaded, when one cannot be quantised.
    rank: one of several processes that share the model: it is given its part of each tensor.
    """
    model = empty_model(config)
    if rank.size > 1:
        tensors = shrink(model, rank, tensors)
    needed = loaded_bytes(tensors, dtype, device, quantize)
    remedy = "use --dtype bfloat16, --quantize nf4 or a smaller model"
    require_memory(needed, device, f"The weights, as {str(dtype).removeprefix('torch.')} on {device},", remedy)
    model.rope = RoPE(config)  # its frequencies are computed, not stored
    model.rope.to(device)
    linears = quantizable_linears(model, quantize, dtype, device) if quantize is not None else {}
    keys: dict[str, list[str]] = {}  # module -> its stored tensors
    for name in tensors:
        module_name, _, key = name.rpartition(".")
        keys.setdefault(module_name, []).append(key)
    for name in keys:
        for key in keys[name]:
            tensor = tensors[f"{name}.{key}"].load().to(device).to(dtype)  # cast where it is going to lie
            set_parameter(model.get_submodule(name), key, tensor)
            del tensor
        if name in linears:
            model.set_submodule(name, quantize_linear(linears.pop(name), quantize, dtype, device))
    model.tie_weights()
    if rank.size > 1:
        connect(model, rank)
    if device.type != "meta":
        empty = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
        assert not empty, f"{empty[:3]} were never filled"
    return model.eval()


def loaded_bytes(
    tensors: Mapping[str, LazyTensor], dtype: torch.dtype, device: torch.device, quantize: str | None = None
) -> int:
    """Bytes that build_model allocates for these weights, at least. Those that stay a file's pages take none."""
    total = 0
    for name, tensor in tensors.items():
        size = dtype.itemsize
        if quantize is not None and name.startswith("transformer.h.") and len(tensor.shape) == 2:
            size = 1.0 if quantize == "int8" else 0.5
        elif device.type == "cpu" and tensor.dtype == dtype:
            continue
        total += int(size * math.prod(tensor.shape))
    return total


def set_parameter(module: nn.Module, key: str, tensor: Tensor) -> None:
    """Make a tensor a module's parameter, without a copy."""
    assert module.get_parameter(key).shape == tensor.shape
    setattr(module, key, nn.Parameter(tensor, requires_grad=module.get_parameter(key).requires_grad))
