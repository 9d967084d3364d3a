"""Exporting a checkpoint to one GGUF file that llama.cpp runs: weights, metadata and tokenizer.

A tensor at a time is in memory, and a piece of it in the numbers of the file. What the file says is read back before
anything is written: a model that llama.cpp would compute otherwise is refused.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from lit_swa.config import Config
from lit_swa.formats import gguf_models
from lit_swa.formats.convert import with_progress
from lit_swa.formats.directory import check_tensors, check_weights_dir, load_config, open_weights, read_quantization
from lit_swa.formats.files import LazyTensor, as_lazy, atomic_file, named_when_full, require_space
from lit_swa.formats.gguf import PLAIN_DTYPES, TensorInfo
from lit_swa.formats.gguf_rope import scaling_tensors
from lit_swa.formats.gguf_vocabulary import vocabulary_of
from lit_swa.formats.hugging_face import to_hf
from lit_swa.formats.quantized import dense_tensors

DTYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # name -> general.file_type
PIECE = 2**22  # elements that are converted at a time


def export_gguf(checkpoint_dir: str | Path, output_file: str | Path, dtype: str = "f16") -> None:
    """Write one GGUF file. dtype: how matrices are stored; norms, biases and routers of experts are float32 always.

    Raises ValueError, in one sentence, for a model or a tokenizer that llama.cpp has no like of, and for a file that is
    there already.
    """
    source, path = Path(checkpoint_dir), Path(output_file)
    check_output(path, dtype)
    check_weights_dir(source)
    config = load_config(source)
    tensors, stored = open_weights(source), read_quantization(source)
    check_tensors(config, tensors, source, stored)
    tensors = dense_tensors(config, tensors, stored, tensors["transformer.wte.weight"].dtype)
    architecture, metadata = gguf_models.find_architecture(config, lambda name: infos(tensors, config, name))
    metadata |= {"general.name": config.name or source.name, "general.file_type": DTYPES[dtype]}
    metadata |= {"general.quantization_version": 2} | vocabulary_of(source, config.padded_vocab_size)
    if warning := gguf_models.MODELS[architecture].warn(config):
        print(f"warning: {warning}", file=sys.stderr)
    write_gguf(path, architecture, metadata, tensors_of(tensors, config, architecture), dtype)


def check_output(path: Path, dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} does not fit: choose from {', '.join(DTYPES)}.")
    if path.suffix != ".gguf":
        raise ValueError(f"{path} does not end in .gguf: name the file to write.")
    if path.exists():
        raise ValueError(f"{path} is there already: delete it, or choose another --output_file.")


def tensors_of(tensors: Mapping[str, LazyTensor], config: Config, architecture: str) -> dict[str, LazyTensor]:
    """The tensors of a file, under their names there; norms as 1 + weight, where llama.cpp wants them so."""
    small = scaling_tensors(config) | gguf_models.sinks_for_none(config, architecture)
    named = to_hf(tensors, config, gguf_models.names_of(architecture, config))
    if config.norm_unit_offset:
        named = {name: _plus_one(tensor) if name.endswith("norm.weight") else tensor for name, tensor in named.items()}
    return named | {name: as_lazy(torch.tensor(numbers)) for name, numbers in small.items()}


def _plus_one(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor.shape, torch.float32, lambda: tensor.load().float() + 1.0)


def infos(tensors: Mapping[str, LazyTensor], config: Config, architecture: str) -> dict[str, TensorInfo]:
    """What a file of this architecture would list."""
    listed = tensors_of(tensors, config, architecture)
    return {name: TensorInfo(tensor.shape, 0, Path("the export"), 0, 0) for name, tensor in listed.items()}


# -------------------------------------------------------------------------------------------------------------- writing


def write_gguf(
    path: Path, architecture: str, metadata: dict[str, Any], tensors: dict[str, LazyTensor], dtype: str
) -> None:
    """The file appears under its name whole, or not at all."""
    from gguf import GGUFWriter

    kinds = {name: number_format(name, tensor.shape, dtype) for name, tensor in tensors.items()}
    sizes = {name: stored_bytes(tensor.shape, kinds[name]) for name, tensor in tensors.items()}
    with named_when_full(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    require_space(path.parent, sum(sizes.values()))
    with atomic_file(path, sum(sizes.values())) as stream:
        writer = GGUFWriter(stream.name, architecture)
        for key, value in metadata.items():
            add_key(writer, key, value)
        for name, tensor in tensors.items():
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), sizes[name], raw_dtype=kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        [out] = writer.fout
        writer.write_padding(out, out.tell())
        for name, tensor in with_progress(tensors, "exporting").items():
            write_tensor(out, name, tensor, kinds[name])
            writer.write_padding(out, sizes[name])
        writer.close()


def add_key(writer: Any, key: str, value: Any) -> None:
    from gguf import GGUFValueType

    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32}
    kinds |= {str: GGUFValueType.STRING, list: GGUFValueType.ARRAY}
    if key != "general.architecture":  # which the writer has
        writer.add_key_value(key, value, kinds[type(value)])


def number_format(name: str, shape: tuple[int, ...], dtype: str) -> Any:
    """The type of a tensor. llama.cpp wants float32 of norms, biases and routers; a row of Q8_0 is whole blocks."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    exact = len(shape) < 2 or "norm" in name or "ffn_gate_inp" in name or not name.endswith(".weight")
    kind = GGMLQuantizationType.F32 if exact else GGMLQuantizationType[dtype.upper()]
    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def stored_bytes(shape: tuple[int, ...], kind: Any) -> int:
    from gguf import GGML_QUANT_SIZES

    block, block_bytes = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * block_bytes


def write_tensor(out: BinaryIO, name: str, tensor: LazyTensor, kind: Any) -> None:
    for piece in pieces(tensor.load()):
        out.write(in_numbers_of(piece, kind, name))


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Rows of a tensor (rows, columns), some at a time."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return iter(rows.split(max(1, PIECE // rows.shape[-1])))


def in_numbers_of(piece: Tensor, kind: Any, name: str) -> bytes:
    from gguf.quants import quantize

    if kind not in PLAIN_DTYPES:
        return quantize(piece.float().numpy(), kind).tobytes()
    numbers = piece.to(PLAIN_DTYPES[kind])
    if kind.name == "F16" and not numbers.isfinite().all() and piece.isfinite().all():
        raise ValueError(f"{name} has numbers that float16 cannot hold: use --dtype bf16.")
    return numbers.contiguous().view(torch.uint8).numpy().tobytes()
