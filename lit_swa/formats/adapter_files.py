"""What all adapter directories have in common: lit_adapter.json, and the base checkpoint that it names.

An adapter directory holds the adapter's weights, lit_config.json (the config that was trained with), the tokenizer's
files and lit_adapter.json, which is written last and says what kind of adapter it is and where its base checkpoint is.
"""

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_swa.formats.directory import ADAPTER_FILE, PEFT_CONFIG, copy_tokenizer, is_adapter_dir, open_weights
from lit_swa.formats.files import (
    LazyTensor,
    directory_lock,
    find_inside,
    holds_json,
    open_safetensors,
    read_json,
    remove_leftovers,
    write_json,
    write_safetensors,
)
from lit_swa.formats.places import places


def write_adapter(
    directory: Path,
    weights_file: str,
    tensors: Mapping[str, LazyTensor],
    descriptions: Mapping[str, dict[str, Any]],
    base_dir: Path | None,
) -> None:
    """Write the tokenizer's files of base_dir, the weights, and the JSON files `descriptions` in their order.

    Each file is replaced whole. lit_adapter.json says that the others are complete: it is written last, and
    removed first unless the others keep their content. Raises OSError when the disk is full.
    """
    assert list(descriptions)[-1] == ADAPTER_FILE
    with directory_lock(directory):
        remove_leftovers(directory)
        if not all(holds_json(directory / name, content) for name, content in descriptions.items()):
            (directory / ADAPTER_FILE).unlink(missing_ok=True)
        if base_dir is not None:
            copy_tokenizer(base_dir, directory)
        write_safetensors(directory / weights_file, tensors)
        for name, content in descriptions.items():
            write_json(directory / name, content)


def adapter_kind(directory: Path) -> str | None:
    """The kind that lit_adapter.json gives; None without that file, as in directories that PEFT wrote."""
    if not (directory / ADAPTER_FILE).exists():
        return None
    kind = read_json(find_inside(directory, ADAPTER_FILE)).get("kind")
    return kind if isinstance(kind, str) else None


def load_finite(tensor: LazyTensor, name: str, file: Path | None) -> Tensor:
    """The numbers of an adapter's tensor. Raises ValueError for NaN and infinity, which a diverged training leaves."""
    values = tensor.load()
    if not bool(values.isfinite().all()):
        raise ValueError(f"{file} holds NaN or infinity in {name[:120]}: its training diverged; take an earlier step.")
    return values


# -------------------------------------------------------------------------------------------------- the base checkpoint


def describe_base(base_dir: Path, directory: Path) -> dict[str, str]:
    """The fields of lit_adapter.json that name the base checkpoint of an adapter in `directory`."""
    return {
        "base_checkpoint_dir": relative_path(base_dir, directory),
        "base_identity": weights_fingerprint(base_dir),
    }


def relative_path(base_dir: Path, directory: Path) -> str:
    """From the directory to the base checkpoint, so that both can be moved together; in full on another drive."""
    try:
        return os.path.relpath(base_dir.resolve(), directory.resolve())
    except ValueError:
        return str(base_dir.resolve())


def weights_fingerprint(checkpoint_dir: str | Path) -> str:
    """A hash of the names and shapes of a checkpoint's weights and of 64 numbers of each: a copy has the same."""
    return fingerprint(open_weights(checkpoint_dir))


def base_identity(checkpoint_dir: Path) -> str:
    """weights_fingerprint of what a run starts from; for an adapter, of its base and its own weights."""
    if not is_adapter_dir(checkpoint_dir):
        return weights_fingerprint(checkpoint_dir)
    own = {
        f"{path.name}.{name}": tensor
        for path in checkpoint_dir.glob("*.safetensors")
        for name, tensor in open_safetensors(find_inside(checkpoint_dir, path.name)).items()
    }
    return f"{weights_fingerprint(read_base(checkpoint_dir)[0])} {fingerprint(own)}"


def fingerprint(tensors: Mapping[str, LazyTensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.load().flatten()
        step = max(1, len(values) // 64)
        digest.update(repr((name, tensor.shape)).encode() + values[::step][:64].float().numpy().tobytes())
    return digest.hexdigest()


def read_base(directory: Path) -> tuple[Path, str | None]:
    """The base checkpoint that lit_adapter.json or, where PEFT wrote the adapter, adapter_config.json names, and the
    fingerprint that its weights had.

    Raises FileNotFoundError or ValueError, with the remedy, when they name none or there is none.
    """
    path = directory / ADAPTER_FILE
    if not path.exists():
        return find_named_base(directory), None
    base = read_json(find_inside(directory, ADAPTER_FILE)).get("base_checkpoint_dir")
    if not is_base_name(base):
        raise ValueError(f"{directory} does not say which base checkpoint it belongs to: give --base_checkpoint_dir.")
    where = directory / base
    if not where.is_dir():
        raise FileNotFoundError(
            f"The base checkpoint {where} of the adapter {directory} is missing: move it back, or write its place "
            f"into {path}."
        )
    return where, read_fingerprint(directory)


def read_fingerprint(directory: Path) -> str | None:
    """The fingerprint that the weights of an adapter's base checkpoint had, where lit_adapter.json notes one."""
    if not (directory / ADAPTER_FILE).exists():
        return None
    path = find_inside(directory, ADAPTER_FILE)
    fingerprint = read_json(path).get("base_identity")
    if not isinstance(fingerprint, str | None):
        raise ValueError(f"{path} is damaged: its base_identity must be a text.")
    return fingerprint


def named_fingerprint(directory: Path) -> str | None:
    """The fingerprint of the base checkpoint that PEFT's adapter names, where it is here and converted."""
    with suppress(ValueError, OSError):
        return weights_fingerprint(find_named_base(directory))
    return None


def find_named_base(directory: Path) -> Path:
    """The directory that base_model_name_or_path means: a path, or a repository that was downloaded."""
    name = read_json(find_inside(directory, PEFT_CONFIG)).get("base_model_name_or_path")
    remedy = f"run python scripts/merge_lora.py --checkpoint_dir {directory} --base_checkpoint_dir BASE"
    if not is_base_name(name):
        raise ValueError(f"{directory} does not say which base checkpoint it belongs to: {remedy}.")
    found = next((place for place in (*places(name), directory / name) if place.is_dir()), None)
    if found is None:
        raise FileNotFoundError(
            f"The base checkpoint {name} of the adapter {directory} is not here: download it with scripts/download.py, "
            f"or {remedy} (generate/base.py and chat.py take --base_checkpoint_dir, too)."
        )
    return found


def is_base_name(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name) < 1000 and name.isprintable()
