"""Converting: a Hugging Face checkpoint or a GGUF file to a checkpoint directory, and back to Hugging Face.

One tensor is in memory at a time. A pickle is read with weights_only=True or not at all.
"""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_swa.config import Config
from lit_swa.formats import gguf, gguf_models, gguf_tokenizer
from lit_swa.formats.directory import (
    MAX_SHARD_BYTES,
    STEM,
    build_config,
    check_tensors,
    check_weights_dir,
    copy_tokenizer,
    load_config,
    open_weights,
    read_quantization,
    refuse_adapter,
    require_directory,
    write_checkpoint,
)
from lit_swa.formats.files import (
    LazyTensor,
    directory_lock,
    find_inside,
    open_pickle,
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
from lit_swa.formats.hf_config import find_architecture, language_model
from lit_swa.formats.hf_export import CHUNKS, config_to_hf
from lit_swa.formats.hf_names import Names
from lit_swa.formats.hugging_face import have_two_embeddings, to_hf, to_lit
from lit_swa.formats.quantized import Quantization, dense_tensors
from lit_swa.formats.reading import is_listed
from lit_swa.formats.tokenizer import Tokenizer
from lit_swa.formats.tokenizer_slow import check_slow_class

# -------------------------------------------------------------------------------------------------------------- convert


Prepare = Callable[[Config, dict[str, LazyTensor]], tuple[Config, dict[str, LazyTensor], Quantization]]


def convert_hf_checkpoint(
    checkpoint_dir: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES, prepare: Prepare | None = None
) -> None:
    """Add the files of a checkpoint to a directory with a Hugging Face one (*.safetensors or *.bin) or a GGUF file.

    The source files stay. Weights keep their dtype; quantised ones become float32, as in transformers. One tensor at a
    time is in memory. From a GGUF file the config and the tokenizer are read too, where the directory has none.
    prepare: makes what is written of the config and weights that were read, as quantized_on_the_way.
    Raises FileNotFoundError, ValueError or OSError in one sentence; nothing half-done is taken for complete later.
    """
    directory = Path(checkpoint_dir)
    require_directory(directory)
    with directory_lock(directory):
        remove_leftovers(directory)
        config, source, extra_files, architecture = open_source(directory)
        if config.tie_embeddings and have_two_embeddings(source, config, directory, architecture):
            config = replace(config, tie_embeddings=False)
        tensors = to_lit(source, config, directory, architecture)
        for name, text in extra_files.items():
            if not (directory / name).exists():
                write_text(directory / name, text)
        stored = None
        if prepare is not None:
            config, tensors, stored = prepare(config, tensors)
        write_checkpoint(directory, with_progress(tensors, "converting"), config, max_shard_bytes, stored)
    _warn_of_tokenizer(directory, config.padded_vocab_size)


def _warn_of_tokenizer(directory: Path, rows: int) -> None:
    """Say at once that the tokenizer is of a kind that is not read, or has more ids than the embedding has rows: the
    weights are converted all the same."""
    try:
        check_slow_class(directory)
    except (ValueError, OSError) as error:
        print(f"warning: {error}", file=sys.stderr)
        return
    try:
        size = Tokenizer(directory).vocab_size
    except (ValueError, OSError):  # said where it is used; some checkpoints have none
        return
    if size > rows:
        print(
            f"warning: {directory} has a tokenizer of {size} tokens and an embedding of {rows}: a text with a token "
            f"from {rows} on will be refused. Is it another model's?",
            file=sys.stderr,
        )


def open_source(directory: Path) -> tuple[Config, dict[str, LazyTensor], dict[str, str], str | Names]:
    """Config, weights, files to add, and the architecture, or names, of the weights of an unconverted checkpoint."""
    kind, names, index = find_source(directory)
    if kind == "gguf":
        return open_gguf(gguf.read_parts([find_inside(directory, name) for name in names]), directory)
    path = find_inside(directory, "config.json")
    hf = read_json(path)
    config = build_config(Config.from_hf, hf, path)
    architecture = find_architecture(language_model(hf))
    if index and kind == "safetensors":
        return config, open_shards(directory, index), {}, architecture
    source: dict[str, LazyTensor] = {}
    for name in names:
        source |= (open_safetensors if kind == "safetensors" else open_pickle)(find_inside(directory, name))
    return config, source, {}, architecture


def open_gguf(
    file: gguf.GGUFFile, directory: Path
) -> tuple[Config, dict[str, LazyTensor], dict[str, str], str | Names]:
    """open_source of a GGUF file. A config.json and a tokenizer.json beside it come before what it says."""
    fields = gguf_models.fields_of(file)
    if is_listed(directory / "config.json"):
        config = build_config(Config.from_hf, read_json(find_inside(directory, "config.json")), file.path)
    else:
        config = build_config(Config.from_dict, fields, file.path)
    extra_files = gguf_tokenizer.tokenizer_files(file, vocabulary=not is_listed(directory / "tokenizer.json"))
    weights = gguf.open_weights(file, offset=config.norm_unit_offset)
    weights = {name: tensor for name, tensor in weights.items() if gguf_models.is_weight(name, config)}
    return config, weights, extra_files, gguf_models.names_of(file.architecture, config, weights)


def find_source(directory: Path) -> tuple[str, list[str], str | None]:
    """(kind, weight files, index or None) of an unconverted checkpoint; kind is "safetensors", "bin" or "gguf".

    Raises FileNotFoundError, naming what is there and what is missing.
    """
    for kind, pattern in (("safetensors", "*.safetensors"), ("bin", "*.bin"), ("bin", "*.pth")):
        names, index = _find_shards(directory, pattern)
        if names:
            _require_with_config(directory, names)
            return kind, names, index
    refuse_adapter(directory)
    return "gguf", _find_gguf(directory), None


SINGLE_FILES = {"*.safetensors": "model.safetensors", "*.bin": "pytorch_model.bin"}


def _find_shards(directory: Path, pattern: str) -> tuple[list[str], str | None]:
    """(weight files, index or None): the files that there should be, by the index or by the numbers in their names."""
    index = sorted(p.name for p in directory.glob(f"{pattern}.index.json") if not p.name.startswith(STEM))
    single = SINGLE_FILES.get(pattern)
    if single and is_listed(directory / single):  # which transformers takes first, whatever lies beside it
        if index:
            print(f"Converting {directory / single}, and not the shards of {index[0]}.", file=sys.stderr)
        return [single], None
    if len(index) > 1:
        raise ValueError(f"{directory} holds two sets of weights ({index[0]}, {index[1]}): leave the one to convert.")
    if index:
        return sorted(set(read_index(find_inside(directory, index[0])).values())), index[0]
    names = sorted(p.name for p in directory.glob(pattern) if _is_source(p.name))
    numbered = [m for m in (re.fullmatch(r"(.+-)(\d{5})-of-(\d{5})(\..+)", name) for name in names) if m]
    if numbered:
        stem, _, count, suffix = numbered[0].groups()
        if others := sorted(set(names) - {f"{stem}{n:05d}-of-{count}{suffix}" for n in range(1, len(names) + 1)}):
            raise ValueError(
                f"{directory} holds two sets of weights ({numbered[0][0]}, {others[0]}): leave the one to convert."
            )
        return [f"{stem}{n:05d}-of-{count}{suffix}" for n in range(1, min(int(count), 9999) + 1)], None
    if len(names) > 1:
        raise ValueError(
            f"{directory} holds {len(names)} weight files and no index that orders them ({names[0]}, "
            f"{names[1]}): leave the one to convert."
        )
    return names, None


def _require_with_config(directory: Path, names: list[str]) -> None:
    """Raises FileNotFoundError if config.json or one of the weight files is missing."""
    if not (directory / "config.json").exists():
        require_files(directory, ["config.json", *names], "files")
    try:
        require_files(directory, names, "shards")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} config.json is there.") from None


def _find_gguf(directory: Path) -> list[str]:
    """The file of the one GGUF model, or all its parts in order.

    Raises ValueError for several models, and FileNotFoundError for none (it is looked for last) or for a missing part.
    """
    names = sorted(p.name for p in directory.glob("*.gguf") if "mmproj" not in p.name and not p.name.startswith("."))
    parts = {name: re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", name) for name in names}
    models = {part.groups() if part else (name, None): name for name, part in parts.items()}
    if len(models) > 1:
        gguf.refuse_renamed_parts([find_inside(directory, name) for name, part in parts.items() if not part])
        first, second = sorted(models.values())[:2]
        raise ValueError(
            f"{directory} holds {len(models)} models as GGUF files ({first}, {second}): leave the files of the one to "
            "convert, and move the others to directories of their own."
        )
    if not names:
        there = ", ".join(sorted(p.name for p in directory.iterdir() if not p.name.startswith("."))[:6]) or "nothing"
        raise FileNotFoundError(
            f"{directory} holds {there}, but no weights to convert: no *.safetensors, *.bin or *.gguf."
        )
    (stem, count), *_ = models
    if count is not None:
        names = [f"{stem}-{n:05d}-of-{count}.gguf" for n in range(1, min(int(count), 9999) + 1)]
        require_files(directory, names, "parts")
    return names


def _is_source(name: str) -> bool:
    """Weights of a whole model: not our own, not those of Meta's or Mistral's tools, nor a trainer's state."""
    others = (STEM, "consolidated", "adapter_", "training_args", "optimizer", "scheduler", "rng_state")
    return not name.startswith(others)


def with_progress(tensors: Mapping[str, LazyTensor], what: str) -> dict[str, LazyTensor]:
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


def special_tokens(directory: Path) -> dict[str, Any]:
    """The ids that generation_config.json names, and else the tokenizer's end of a text. None stands for the others: a
    class of transformers has defaults of its own, which may mean something else or lie beyond the vocabulary."""
    there = (directory / "generation_config.json").exists()
    generation = read_json(find_inside(directory, "generation_config.json")) if there else {}
    found = {name: generation.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if found["eos_token_id"] is None:
        try:
            found["eos_token_id"] = Tokenizer(directory).eos_id
        except (ValueError, OSError):  # it is copied, and not read
            pass
    return found


def export_hf_checkpoint(
    checkpoint_dir: str | Path, output_dir: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a directory that transformers.AutoModelForCausalLM loads, with equal logits. The weights keep their dtype;
    quantised ones become dense, in that of the embedding.

    Raises ValueError when no Hugging Face architecture computes what the config asks for.
    """
    source, directory = Path(checkpoint_dir), Path(output_dir)
    check_weights_dir(source, tokenizer=False)
    if source.resolve() == directory.resolve():
        raise ValueError(f"{directory} cannot be both the checkpoint and its export: choose another output_dir.")
    config = load_config(source)
    tensors, stored = open_weights(source), read_quantization(source)
    check_tensors(config, tensors, source, stored)
    dtype = tensors["transformer.wte.weight"].dtype
    tensors = dense_tensors(config, tensors, stored, dtype)
    hf = config_to_hf(config)
    if CHUNKS in hf:
        print(
            f"warning: transformers does not read {CHUNKS}, and attends to every key; vLLM reads it.", file=sys.stderr
        )
    hf["torch_dtype"] = str(dtype).removeprefix("torch.")
    with directory_lock(directory):
        remove_leftovers(directory)
        (directory / "config.json").unlink(missing_ok=True)
        copy_tokenizer(source, directory)
        hf |= special_tokens(directory)
        tensors = to_hf(tensors, config, hf["architectures"][0])
        write_weights(directory, "model", with_progress(tensors, "exporting"), max_shard_bytes)
        write_json(directory / "config.json", hf)
