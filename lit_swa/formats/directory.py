"""The files of a checkpoint directory: their names, their check, the config and the weights in them, saving.

A checkpoint directory holds lit_config.json, lit_model.safetensors (above 5 GB: shards and their index), the
tokenizer's files and generation_config.json. lit_config.json is written last: with it and every weight file there, the
directory is complete. Every file is written under a temporary name and renamed.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch.nn as nn
from torch import Tensor

from lit_swa.config import Config
from lit_swa.formats.files import (
    LazyTensor,
    as_lazy,
    copy_file,
    directory_lock,
    find_inside,
    holds_json,
    index_name,
    open_safetensors,
    open_shards,
    read_json,
    remove_leftovers,
    write_json,
    write_weights,
)
from lit_swa.formats.hugging_face import require_layers
from lit_swa.formats.quantized import FIELD, Quantization, check_dtypes, stored_tensors
from lit_swa.formats.reading import is_listed
from lit_swa.formats.tokenizer_files import read_stop_ids, template_files, vocab_file_name
from lit_swa.formats.tokenizer_slow import check_slow_class

CONFIG_FILE, STEM = "lit_config.json", "lit_model"
ADAPTER_FILE = "lit_adapter.json"  # an adapter has it in place of weights: see adapter_files.py
PEFT_CONFIG = "adapter_config.json"  # and so has a LoRA in PEFT's format, be it ours or PEFT's own
MAX_SHARD_BYTES = 5 * 10**9
COPIED_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "NOTICE",
)

# ---------------------------------------------------------------------------------------------------------------- check


def check_weights_dir(checkpoint_dir: str | Path, tokenizer: bool = True) -> None:
    """Return if the directory holds a whole checkpoint. Raises an error that names what is there, what is missing and
    what to do.

    The weight files' headers are read, so a truncated file is noticed; their numbers are not.
    """
    directory = Path(checkpoint_dir)
    require_directory(directory)
    refuse_adapter(directory)
    names = [CONFIG_FILE] + [f"{STEM}.safetensors"] * (not is_sharded(directory))
    there, missing = [], []
    for name in names:
        (there if (directory / name).exists() else missing).append(name)
    if tokenizer:
        found = vocab_file_name(directory)
        (there if found else missing).append(found or "tokenizer.json")
    if missing:
        raise FileNotFoundError(_incomplete(directory, there, missing))
    if tokenizer:
        check_slow_class(directory)
    try:
        open_weights(directory)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} {' and '.join(there)} {_is_or_are(there)} there; convert or download the checkpoint again."
        ) from None


def is_adapter_dir(checkpoint_dir: str | Path) -> bool:
    """True for a directory that holds an adapter, ours or PEFT's, and no weights of its own."""
    directory, weights = Path(checkpoint_dir), (f"{STEM}.safetensors", index_name(STEM))
    marked = any((directory / name).exists() for name in (ADAPTER_FILE, PEFT_CONFIG))
    return marked and not any((directory / name).exists() for name in weights)


def has_tokenizer(checkpoint_dir: str | Path) -> bool:
    return vocab_file_name(Path(checkpoint_dir)) is not None


def refuse_adapter(directory: Path) -> None:
    """Raises ValueError where a checkpoint is asked for and an adapter is there."""
    if is_adapter_dir(directory):
        raise ValueError(f"{directory} is an adapter: make a checkpoint of it with scripts/merge_lora.py first.")


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


# ----------------------------------------------------------------------------------------------------------------- read


def load_config(checkpoint_dir: str | Path) -> Config:
    """The Config in lit_config.json. Raises FileNotFoundError or ValueError, which names the file."""
    path = find_inside(Path(checkpoint_dir), CONFIG_FILE)
    values = read_json(path)
    values.pop(FIELD, None)
    return build_config(Config.from_dict, values, path)


def read_quantization(checkpoint_dir: str | Path) -> Quantization | None:
    """How lit_config.json says that the weights are quantised; None for dense ones. Raises ValueError, naming the file,
    for what is not read here."""
    path = find_inside(Path(checkpoint_dir), CONFIG_FILE)
    values = read_json(path)
    return Quantization.from_json(values[FIELD], path) if FIELD in values else None


def build_config(build: Callable[[dict[str, Any]], Config], values: dict[str, Any], path: Path) -> Config:
    """build(values); an error names the file, and is short whatever a stranger wrote into it."""
    try:
        return build(values)
    except ValueError as error:
        raise ValueError(f"{path} does not describe a model: {shorten(str(error), 400)}") from None


def open_weights(checkpoint_dir: str | Path) -> dict[str, LazyTensor]:
    """The stored weights by lit name, each read when its load() is called. Raises FileNotFoundError or ValueError."""
    directory = Path(checkpoint_dir)
    refuse_adapter(directory)
    if is_sharded(directory):
        return open_shards(directory, index_name(STEM))
    return open_safetensors(find_inside(directory, f"{STEM}.safetensors"))


def is_sharded(directory: Path) -> bool:
    """True if the weights are in shards: a single file beside them was put there later, and counts, as in
    transformers."""
    return (directory / index_name(STEM)).exists() and not (directory / f"{STEM}.safetensors").exists()


def check_tensors(
    config: Config, tensors: Mapping[str, LazyTensor], where: object, stored: Quantization | None = None
) -> None:
    """Raises ValueError unless these are exactly the weights, by name, shape and dtype, that the config asks for where
    they are stored in this way."""
    check_shapes(config, {name: tensor.shape for name, tensor in tensors.items()}, where, stored)
    check_dtypes(config, tensors, where, stored)


def check_shapes(
    config: Config, shapes: Mapping[str, tuple[int, ...]], where: object, stored: Quantization | None = None
) -> None:
    """Raises ValueError unless these are exactly the weights that the config asks for."""
    require_layers(config, shapes, where)
    try:
        expected = {name: tuple(tensor.shape) for name, tensor in stored_tensors(config, stored).items()}
    except ValueError as error:
        raise ValueError(f"{where} does not describe its weights: {error}") from None
    for name, shape in expected.items():
        if name not in shapes:
            learned = ".attn.mixer." in name  # what no converted checkpoint has
            remedy = "train it with finetune/linearize.py" if learned else "convert or download it again"
            raise ValueError(
                f"{where} has no weight {name}, which its config asks for: {remedy}, or leave the config's fields as "
                "they were."
            )
        if tuple(shapes[name]) != shape:
            raise ValueError(
                f"{where} has {name} as {list(shapes[name])} and its config asks for {list(shape)}: convert or "
                "download it again, or leave the config's fields as they were."
            )
    if left_over := [name for name in shapes if name not in expected]:
        raise ValueError(
            f"{where} has the weight {left_over[0][:80]}, which its config has no place for: convert or download it "
            "again, or leave the config's fields as they were."
        )


# ----------------------------------------------------------------------------------------------------------------- save


def save_checkpoint(
    model_or_state_dict: nn.Module | Mapping[str, Tensor],
    config: Config,
    output_dir: str | Path,
    source_dir: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    stored: Quantization | None = None,
) -> None:
    """Write a checkpoint directory that load_model loads. The weights keep their dtype.

    source_dir: where the tokenizer's files are copied from.
    stored: how the weights are quantised, if they are.
    Raises ValueError when the weights are not those of the config, OSError when they do not fit on the disk.
    """
    state = (
        model_or_state_dict.state_dict() if isinstance(model_or_state_dict, nn.Module) else dict(model_or_state_dict)
    )
    if config.tie_embeddings:
        state.pop("lm_head.weight", None)
    tensors = {name: as_lazy(t) for name, t in state.items()}
    check_tensors(config, tensors, "The state dict", stored)
    directory = Path(output_dir)
    with directory_lock(directory):
        remove_leftovers(directory)
        if source_dir is not None:
            copy_tokenizer(Path(source_dir), directory)
        write_checkpoint(directory, tensors, config, max_shard_bytes, stored)


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, LazyTensor],
    config: Config,
    max_shard_bytes: int,
    stored: Quantization | None = None,
) -> None:
    """The weights, then lit_config.json. The directory must be locked."""
    fields = config.to_dict() | ({} if stored is None else {FIELD: stored.as_json()})
    total = sum(tensor.n_bytes for tensor in tensors.values())
    sharded = total > max_shard_bytes or (directory / index_name(STEM)).exists()
    # lit_config.json says that the directory's weights are complete. It stays only where one rename replaces them all.
    if sharded or not holds_json(directory / CONFIG_FILE, fields):
        (directory / CONFIG_FILE).unlink(missing_ok=True)
    write_weights(directory, STEM, tensors, max_shard_bytes)
    write_json(directory / CONFIG_FILE, fields)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy the tokenizer's files and generation_config.json. Links that lead out of the source are refused.

    Ids that end a text and stand in the source's config.json alone, which is not copied, go into the latter.
    """
    if source.resolve() == directory.resolve():
        return
    for folder, name in [*(("", name) for name in COPIED_FILES if is_listed(source / name)), *template_files(source)]:
        path = find_inside(source, name, folder)
        (directory / folder).mkdir(exist_ok=True)
        copy_file(path, directory / folder / name)
    path, ids = directory / "generation_config.json", read_stop_ids(source)
    content = read_json(path) if path.exists() else {}
    if ids and content.get("eos_token_id") is None:
        write_json(path, content | {"eos_token_id": ids})
