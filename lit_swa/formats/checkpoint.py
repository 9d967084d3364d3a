"""Checkpoint directories: check, load, save, convert from Hugging Face and GGUF, export to Hugging Face.

A checkpoint directory holds lit_config.json, lit_model.safetensors (above 5 GB: shards and their index), the
tokenizer's files and generation_config.json. lit_config.json is written last: with it and every weight file there, the
directory is complete. Every file is written under a temporary name and renamed. A pickle is read with weights_only=True
or not at all.
"""

import re
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lit_swa.formats import gguf, gguf_tokenizer
from lit_swa.formats.files import (
    LazyTensor,
    copy_file,
    directory_lock,
    find_inside,
    index_name,
    open_safetensors,
    open_shards,
    read_index,
    read_json,
    remove_leftovers,
    require_files,
    write_json,
    write_text,
    write_weights,
)
from lit_swa.formats.hugging_face import config_to_hf, empty_model, expected_shapes, require_layers, to_hf, to_lit
from lit_swa.model import GPT, Config, RoPE

CONFIG_FILE, STEM = "lit_config.json", "lit_model"
ADAPTER_FILE = "lit_adapter.json"  # beside an adapter, it says where the base checkpoint is: see peft.py
MAX_SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # any one of them is enough
COPIED_FILES = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "NOTICE",
)

# ---------------------------------------------------------------------------------------------------------------- check


def check_checkpoint_dir(checkpoint_dir: str | Path, tokenizer: bool = True) -> None:
    """Return if the directory can be loaded. Raises an error that names what is there, what is missing and what to do.

    The weight files' headers are read, so a truncated file is noticed; their numbers are not. A directory with an
    adapter needs its base checkpoint too.
    """
    directory = Path(checkpoint_dir)
    require_directory(directory)
    if is_adapter_dir(directory):
        from lit_swa.formats.peft import check_adapter_dir

        if tokenizer and not has_tokenizer(directory):
            raise FileNotFoundError(f"{directory} has no tokenizer.json: copy the base checkpoint's there.")
        return check_adapter_dir(directory)
    names, has_index = [CONFIG_FILE], (directory / index_name(STEM)).exists()
    if not has_index:
        names.append(f"{STEM}.safetensors")
    there, missing = [], []
    for name in names:
        (there if (directory / name).exists() else missing).append(name)
    if tokenizer:
        found = [name for name in TOKENIZER_FILES if (directory / name).exists()]
        (there if found else missing).append(found[0] if found else "tokenizer.json")
    if missing:
        raise FileNotFoundError(_incomplete(directory, there, missing))
    try:
        open_weights(directory)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} {' and '.join(there)} {_is_or_are(there)} there; convert or download the checkpoint again."
        ) from None


def is_adapter_dir(checkpoint_dir: str | Path) -> bool:
    """True for a directory that holds an adapter and no weights of its own."""
    directory = Path(checkpoint_dir)
    weights = (f"{STEM}.safetensors", index_name(STEM))
    return (directory / ADAPTER_FILE).exists() and not any((directory / name).exists() for name in weights)


def has_tokenizer(checkpoint_dir: str | Path) -> bool:
    return any((Path(checkpoint_dir) / name).exists() for name in TOKENIZER_FILES)


def require_directory(directory: Path) -> None:
    if not directory.is_dir():
        raise FileNotFoundError(f"There is no checkpoint directory {directory}: scripts/download.py makes one.")


def _incomplete(directory: Path, there: list[str], missing: list[str]) -> str:
    """One sentence for a directory that lacks files."""
    patterns = ("*.safetensors", "*.gguf", "pytorch_model*.bin")
    source = any(not p.name.startswith(STEM) for pattern in patterns for p in directory.glob(pattern))
    remedy = (
        f"run python scripts/convert_hf.py --checkpoint_dir {directory}" if source else "download or convert it again"
    )
    present = f"{' and '.join(there)} {_is_or_are(there)} there, " if there else ""
    absent = f"{' and '.join(missing)} {_is_or_are(missing)} missing"
    return f"{directory} is no complete checkpoint: {present}{absent}; {remedy}."


def _is_or_are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def is_complete(checkpoint_dir: str | Path) -> bool:
    """True when check_checkpoint_dir has nothing to say."""
    try:
        check_checkpoint_dir(checkpoint_dir)
    except (ValueError, OSError):
        return False
    return True


# ----------------------------------------------------------------------------------------------------------------- load


def load_config(checkpoint_dir: str | Path) -> Config:
    """The Config in lit_config.json. Raises FileNotFoundError or ValueError."""
    path = find_inside(Path(checkpoint_dir), CONFIG_FILE)
    return _build_config(Config.from_dict, read_json(path), path)


def _build_config(build: Callable[[dict[str, Any]], Config], values: dict[str, Any], path: Path) -> Config:
    """build(values); an error names the file, and is short whatever a stranger wrote into it."""
    try:
        return build(values)
    except ValueError as error:
        raise ValueError(f"{path} does not describe a model: {shorten(str(error), 400)}") from None


def open_weights(checkpoint_dir: str | Path) -> dict[str, LazyTensor]:
    """The stored weights by lit name, each read when its load() is called. Raises FileNotFoundError or ValueError."""
    directory = Path(checkpoint_dir)
    if is_adapter_dir(directory):
        raise ValueError(f"{directory} is an adapter: make a checkpoint of it with scripts/merge_lora.py first.")
    if (directory / index_name(STEM)).exists():
        return open_shards(directory, index_name(STEM))
    return open_safetensors(find_inside(directory, f"{STEM}.safetensors"))


def load_model(
    checkpoint_dir: str | Path,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    *,
    merge: bool = True,
    quantize: str | None = None,
    **config_overrides: Any,
) -> GPT:
    """The model of a checkpoint directory, in eval mode, its weights in `dtype` on `device`.

    A directory with an adapter gives the base model with the adapter in it.

    merge: fold an adapter into the weights, for speed; otherwise it stays beside them, as in training.
    quantize: hold the weights of the blocks in 4 or 8 bits, a mode of lit_swa.quantize. They are quantised on their way
        to the device, one after the other, and an adapter stays beside them, as QLoRA trains it.
    config_overrides: fields of Config that replace those of lit_config.json.
    Weights are mapped from the file and cast one by one: the peak is one copy of the model (and one more tensor). A
    model whose stored dtype is asked for, on the CPU, keeps using the file's pages.
    Raises FileNotFoundError or ValueError when the directory is incomplete or damaged, the device lacks the dtype, or
    an override does not fit the weights.
    """
    directory = Path(checkpoint_dir)
    dtype, device = check_dtype(dtype, device)
    check_checkpoint_dir(directory, tokenizer=False)
    if is_adapter_dir(directory):
        from lit_swa.formats.peft import load_adapted

        return load_adapted(
            directory, dtype, device, merge=merge and not quantize, quantize=quantize, **config_overrides
        )
    config = load_config(directory).override(**config_overrides)
    tensors = open_weights(directory)
    check_shapes(config, {name: tensor.shape for name, tensor in tensors.items()}, directory)
    return build_model(config, tensors, dtype, device, quantize)


def build_model(
    config: Config,
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None = None,
) -> GPT:
    """A GPT made of these weights. It is built without memory, then given them one at a time.

    quantize: a mode of lit_swa.quantize for its blocks; the dense weights then stay on the CPU.
    """
    if quantize is not None:
        from lit_swa.quantize import check_request, quantize_linears

        check_request(quantize, dtype)
        model = build_model(config, tensors, dtype, torch.device("cpu"))
        quantize_linears(model, quantize, dtype, device)
        return model.to(device)
    model = empty_model(config)
    model.rope = RoPE(config)  # its frequencies are computed, not stored
    model.rope.to(device)
    state = {name: tensor.load().to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    if config.tie_embeddings:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not left, f"{left[:3]} were never filled"
    return model.eval()


def check_shapes(config: Config, shapes: Mapping[str, tuple[int, ...]], where: object) -> None:
    """Raises ValueError unless these are exactly the weights that the config asks for."""
    require_layers(config, shapes, where)
    expected = expected_shapes(config)
    for name, shape in expected.items():
        if name not in shapes:
            raise ValueError(
                f"{where} has no weight {name}, which its config asks for: convert or download it again, or "
                "leave the config's fields as they were."
            )
        if tuple(shapes[name]) != shape:
            raise ValueError(
                f"{where} has {name} as {list(shapes[name])} and its config asks for {list(shape)}: convert or "
                "download it again, or leave the config's fields as they were."
            )
    if left_over := [name for name in shapes if name not in expected]:
        raise ValueError(f"{where} has the weight {left_over[0][:80]}, which its config has no place for.")


def check_dtype(dtype: torch.dtype | str, device: torch.device | str) -> tuple[torch.dtype, torch.device]:
    """The dtype and device that the names stand for. Raises ValueError for what this machine lacks."""
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


# ----------------------------------------------------------------------------------------------------------------- save


def save_checkpoint(
    model_or_state_dict: nn.Module | Mapping[str, Tensor],
    config: Config,
    output_dir: str | Path,
    source_dir: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a checkpoint directory that load_model loads. The weights keep their dtype.

    source_dir: where the tokenizer's files are copied from.
    Raises ValueError when the weights are not those of the config, OSError when they do not fit on the disk.
    """
    state = (
        model_or_state_dict.state_dict() if isinstance(model_or_state_dict, nn.Module) else dict(model_or_state_dict)
    )
    if config.tie_embeddings:
        state.pop("lm_head.weight", None)
    check_shapes(config, {name: tuple(t.shape) for name, t in state.items()}, "The state dict")
    tensors = {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in state.items()}
    directory = Path(output_dir)
    with directory_lock(directory):
        remove_leftovers(directory)
        if source_dir is not None:
            copy_tokenizer(Path(source_dir), directory)
        _write_checkpoint(directory, tensors, config, max_shard_bytes)


def _write_checkpoint(directory: Path, tensors: Mapping[str, LazyTensor], config: Config, max_shard_bytes: int) -> None:
    """The weights, then lit_config.json. The directory must be locked."""
    fields = asdict(config)
    total = sum(tensor.n_bytes for tensor in tensors.values())
    sharded = total > max_shard_bytes or (directory / index_name(STEM)).exists()
    # A config stands for the weights beside it. It stays in place only where one rename swaps all of them.
    if sharded or not _holds(directory / CONFIG_FILE, fields):
        (directory / CONFIG_FILE).unlink(missing_ok=True)
    write_weights(directory, STEM, tensors, max_shard_bytes)
    write_json(directory / CONFIG_FILE, fields)


def _holds(path: Path, fields: dict[str, Any]) -> bool:
    with suppress(ValueError, OSError):
        return read_json(path) == fields
    return False


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy the tokenizer's files and generation_config.json. Links that lead out of the source are refused."""
    if source.resolve() == directory.resolve():
        return
    for name in COPIED_FILES:
        if (source / name).exists():
            copy_file(find_inside(source, name), directory / name)


# -------------------------------------------------------------------------------------------------------------- convert


def convert_hf_checkpoint(checkpoint_dir: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Add the files of a checkpoint to a directory with a Hugging Face one (*.safetensors or *.bin) or a GGUF file.

    The source files stay. Weights keep their dtype; quantised ones become float32, as in transformers. One tensor at a
    time is in memory. From a GGUF file the config and the tokenizer are read too, where the directory has none.
    Raises FileNotFoundError, ValueError or OSError in one sentence; nothing half-done is taken for complete later.
    """
    directory = Path(checkpoint_dir)
    require_directory(directory)
    with directory_lock(directory):
        remove_leftovers(directory)
        config, source, extra_files = open_source(directory)
        tensors = to_lit(source, config, directory)
        for name, text in extra_files.items():
            if not (directory / name).exists():
                write_text(directory / name, text)
        _write_checkpoint(directory, _with_progress(tensors, "converting"), config, max_shard_bytes)


def open_source(directory: Path) -> tuple[Config, dict[str, LazyTensor], dict[str, str]]:
    """Config, weights by Hugging Face name, and files to add, of an unconverted checkpoint."""
    kind, names, index = find_source(directory)
    if kind == "gguf":
        file = gguf.read_gguf(find_inside(directory, names[0]))
        has_config = (directory / "config.json").exists()
        hf = read_json(find_inside(directory, "config.json")) if has_config else gguf.hf_config(file)
        extra_files = {} if (directory / "tokenizer.json").exists() else gguf_tokenizer.tokenizer_files(file)
        return _build_config(Config.from_hf, hf, file.path), _gguf_weights(file), extra_files
    path = find_inside(directory, "config.json")
    config = _build_config(Config.from_hf, read_json(path), path)
    if index and kind == "safetensors":
        return config, open_shards(directory, index), {}
    source: dict[str, LazyTensor] = {}
    for name in names:
        source |= (open_safetensors if kind == "safetensors" else open_pickle)(find_inside(directory, name))
    return config, source, {}


def find_source(directory: Path) -> tuple[str, list[str], str | None]:
    """(kind, weight files, index or None) of an unconverted checkpoint; kind is "safetensors", "bin" or "gguf".

    Raises FileNotFoundError, naming what is there and what is missing.
    """
    for kind, pattern in (("safetensors", "*.safetensors"), ("bin", "*.bin"), ("bin", "*.pth")):
        index = [p.name for p in directory.glob(f"{pattern}.index.json") if not p.name.startswith(STEM)]
        names = sorted(p.name for p in directory.glob(pattern) if _is_source(p.name))
        if index:
            names = sorted(set(read_index(find_inside(directory, index[0])).values()))
        elif numbered := [m for m in (re.fullmatch(r"(.+-)(\d{5})-of-(\d{5})(\..+)", name) for name in names) if m]:
            stem, _, count, suffix = numbered[0].groups()
            names = [f"{stem}{n:05d}-of-{count}{suffix}" for n in range(1, min(int(count), 9999) + 1)]
        elif len(names) > 1:
            raise ValueError(
                f"{directory} holds {len(names)} weight files and no index that orders them ({names[0]}, "
                f"{names[1]}): leave the one to convert."
            )
        if not names:
            continue
        has_config = (directory / "config.json").exists()
        try:
            require_files(
                directory, [*([] if has_config else ["config.json"]), *names], "shards" if has_config else "files"
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}{' config.json is there.' if has_config else ''}") from None
        return kind, names, index[0] if index else None
    names = sorted(p.name for p in directory.glob("*.gguf") if not p.name.startswith("mmproj"))
    if len(names) > 1:
        raise ValueError(
            f"{directory} holds {len(names)} GGUF files ({names[0]}, {names[1]}): leave the one to convert."
        )
    if not names:
        there = ", ".join(sorted(p.name for p in directory.iterdir() if not p.name.startswith("."))[:6]) or "nothing"
        raise FileNotFoundError(
            f"{directory} holds {there}, but no weights to convert: no *.safetensors, *.bin or *.gguf."
        )
    return "gguf", names, None


def _is_source(name: str) -> bool:
    """Weights of a whole model: not our own, not those of Meta's or Mistral's tools, nor a trainer's state."""
    others = (STEM, "consolidated", "adapter_", "training_args", "optimizer", "scheduler", "rng_state")
    return not name.startswith(others)


def _gguf_weights(file: gguf.GGUFFile) -> dict[str, LazyTensor]:
    return {
        hf_name: LazyTensor(file.tensors[name].shape, gguf.loaded_dtype(file, name),
                            lambda name=name: gguf.load_tensor(file, name))
        for name, hf_name in gguf.hf_names(file).items()
    }  # fmt: skip


def open_pickle(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a .bin or .pth file. torch reads it with weights_only=True: nothing in it is run, ever.

    Raises ValueError when the file is damaged or holds anything but a dict of tensors.
    """
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip:  # torch stores its tensors as they are; only a bomb would be compressed
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True if is_zip else None)
    except Exception as error:  # unpickling raises almost anything; torch's own text would advise to read it unsafely
        raise ValueError(
            f"{path} cannot be read as plain weights ({type(error).__name__}): it is damaged, or holds code that "
            "is not going to be run; use a checkpoint in safetensors."
        ) from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(
        type(name) is str and type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided
        for name, t in state.items()
    ):
        raise ValueError(f"{path} holds something other than a dict of weights: use a checkpoint in safetensors.")
    return {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t.detach()) for name, t in state.items()}


def _with_progress(tensors: Mapping[str, LazyTensor], what: str) -> dict[str, LazyTensor]:
    """The same tensors; loading them moves a progress bar on a terminal's stderr."""
    from tqdm import tqdm

    bar = tqdm(total=sum(t.n_bytes for t in tensors.values()), desc=what, unit="B", unit_scale=True, disable=None)

    def counted(tensor: LazyTensor) -> LazyTensor:
        def load() -> Tensor:
            loaded = tensor.load()
            bar.update(tensor.n_bytes)
            if bar.n >= (bar.total or 0):
                bar.close()
            return loaded

        return tensor._replace(load=load)

    return {name: counted(tensor) for name, tensor in tensors.items()}


# --------------------------------------------------------------------------------------------------------------- export


def export_hf_checkpoint(
    checkpoint_dir: str | Path, output_dir: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a directory that transformers.AutoModelForCausalLM loads, with equal logits. The weights keep their dtype.

    Raises ValueError when no Hugging Face architecture computes what the config asks for.
    """
    source, directory = Path(checkpoint_dir), Path(output_dir)
    check_checkpoint_dir(source, tokenizer=False)
    if source.resolve() == directory.resolve():
        raise ValueError(f"{directory} cannot be both the checkpoint and its export: choose another output_dir.")
    config = load_config(source)
    tensors = open_weights(source)
    check_shapes(config, {name: tensor.shape for name, tensor in tensors.items()}, source)
    hf = config_to_hf(config)
    hf["torch_dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    with directory_lock(directory):
        remove_leftovers(directory)
        (directory / "config.json").unlink(missing_ok=True)
        copy_tokenizer(source, directory)
        if (directory / "generation_config.json").exists():
            generation = read_json(find_inside(directory, "generation_config.json"))
            hf |= {
                key: generation[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in generation
            }
        write_weights(directory, "model", _with_progress(to_hf(tensors, config), "exporting"), max_shard_bytes)
        write_json(directory / "config.json", hf)
