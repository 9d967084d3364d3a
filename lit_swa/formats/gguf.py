"""Reading GGUF files, weights and config, as transformers reads them; gguf_tokenizer.py reads their tokenizer.

A GGUF file comes from a stranger, and the common readers trust its counts (a file of 43 bytes makes one of them
allocate memory without end). So this module reads the header itself and checks every count and length against the
file before using it. The `gguf` library only dequantises blocks.

Layout of the file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian:
    "GGUF" | u32 version | u64 n_tensors | u64 n_keys | keys and values | tensor infos | padding | tensor data
"""

import math
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lit_swa.formats.reading import require_regular

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # type id -> code
STRING, ARRAY = 8, 9
F32, F16, BF16 = 0, 1, 30  # tensor type ids that torch has too
PLAIN_DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}

# Bounds far above every real file, low enough that the header's Python objects stay below 256 MB.
MAX_HEADER_BYTES = 64 * 2**20
MAX_ENTRIES = 100_000  # keys, or tensors
MAX_ITEMS = 2_000_000  # strings and array elements
DEQUANTIZE_BYTES = 8 * 2**20  # quantised bytes that are dequantised at a time


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]  # outermost first, as in torch
    type_id: int
    path: Path
    offset: int  # from the start of that file
    n_bytes: int


@dataclass
class GGUFFile:
    path: Path
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """metadata[key], which must be of that kind (an int will do for a float). Raises ValueError otherwise."""
        value = self.metadata.get(key, default)
        if kind is float and type(value) is int:
            value = float(value)
        if value is not default and type(value) is not kind:
            raise ValueError(f"{self.path} gives {key} as {str(value)[:80]!r}, which is no {kind.__name__}.")
        return value

    def require(self, key: str, kind: type) -> Any:
        if key not in self.metadata:
            raise ValueError(f"{self.path} lacks {key}, which a checkpoint needs: download the file again.")
        return self.get(key, kind)


# --------------------------------------------------------------------------------------------------------------- header


class Cursor:
    """Takes values from the front of a file. A length is compared with what is left before anything is read."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0
        self.end = min(len(data), MAX_HEADER_BYTES)
        self.items_left = MAX_ITEMS

    def advance(self, n_bytes: int) -> int:
        """Step over n_bytes and return where they start."""
        if n_bytes > self.end - self.at:
            raise ValueError(
                f"{self.path} is truncated or damaged: a value at byte {self.at} would run over the end of "
                "the header; download the file again."
            )
        start, self.at = self.at, self.at + n_bytes
        return start

    def number(self, code: str) -> int | float | bool:
        return struct.unpack_from("<" + code, self.data, self.advance(struct.calcsize("<" + code)))[0]

    def count(self, items: int) -> None:
        self.items_left -= items
        if self.items_left < 0:
            raise ValueError(f"{self.path} holds more than {MAX_ITEMS} pieces of metadata: no tokenizer has as many.")

    def string(self) -> str:
        self.count(1)
        n_bytes = self.number("Q")
        start = self.advance(n_bytes)
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self.path} is damaged: the text at byte {start} is not UTF-8.") from None

    def value(self, type_id: int) -> Any:
        if type_id in SCALARS:
            return self.number(SCALARS[type_id])
        if type_id == STRING:
            return self.string()
        if type_id == ARRAY:
            return self.array()
        raise ValueError(f"{self.path} is damaged: there is no value type {type_id}.")

    def array(self) -> list:
        """A list of numbers or of strings. Arrays of arrays are refused: no metadata in use has them."""
        type_id, length = self.number("I"), self.number("Q")
        if type_id in SCALARS:
            code = SCALARS[type_id]
            start = self.advance(length * struct.calcsize(code))
            self.count(length)
            return list(struct.unpack_from(f"<{length}{code}", self.data, start))
        if type_id != STRING:
            raise ValueError(f"{self.path} is damaged: an array of value type {type_id} is not possible.")
        if length * 8 > self.end - self.at:  # each string has at least its own length in front
            raise ValueError(f"{self.path} is truncated or damaged: an array of {length} strings does not fit into it.")
        return [self.string() for _ in range(length)]


def read_gguf(path: str | Path) -> GGUFFile:
    """The metadata and the tensor table of a GGUF file; no tensor data is read.

    Raises FileNotFoundError, or ValueError with one sentence when the file is damaged or of a kind that is not read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    require_regular(path)
    if path.stat().st_size < 24:
        raise ValueError(f"{path} is not a GGUF file: it is shorter than a GGUF header.")
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _read_header(Cursor(data, path), len(data))


def _read_header(cursor: Cursor, file_bytes: int) -> GGUFFile:
    path = cursor.path
    if cursor.data[cursor.advance(4) : 4] != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it does not start with 'GGUF'.")
    version = cursor.number("I")
    if version not in (2, 3):
        raise ValueError(f"{path} is of GGUF version {version}: versions 2 and 3, little-endian, are read.")
    n_tensors, n_keys = cursor.number("Q"), cursor.number("Q")
    if max(n_tensors, n_keys) > MAX_ENTRIES:
        raise ValueError(f"{path} is damaged: it announces {n_tensors} tensors and {n_keys} keys.")
    file = GGUFFile(path)
    for _ in range(n_keys):
        key = cursor.string()
        if key in file.metadata:
            raise ValueError(f"{path} is damaged: it has {key[:80]!r} twice.")
        file.metadata[key] = cursor.value(cursor.number("I"))
    infos = [_read_tensor_info(cursor) for _ in range(n_tensors)]
    alignment = file.get("general.alignment", int, 32)
    if alignment < 1 or alignment > 2**20 or alignment & (alignment - 1):
        raise ValueError(f"{path} is damaged: an alignment of {alignment} bytes is not a power of two.")
    data_start = -(-cursor.at // alignment) * alignment
    _place_tensors(file, infos, data_start, alignment, file_bytes)
    return file


def _read_tensor_info(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, n_dims = cursor.string(), cursor.number("I")
    if not 1 <= n_dims <= 4:
        raise ValueError(f"{cursor.path} is damaged: tensor {name[:80]!r} has {n_dims} dimensions.")
    dims = [cursor.number("Q") for _ in range(n_dims)]
    return name, tuple(reversed(dims)), cursor.number("I"), cursor.number("Q")


def _place_tensors(file: GGUFFile, infos: list, data_start: int, alignment: int, file_bytes: int) -> None:
    """Fill file.tensors; every tensor lies within the file and none on another. Python ints do not overflow."""
    from gguf.constants import GGML_QUANT_SIZES

    end_of_previous = data_start
    for name, shape, type_id, offset in sorted(infos, key=lambda info: info[3]):
        where = f"{file.path} is damaged: tensor {name[:80]!r}"
        if name in file.tensors:
            raise ValueError(f"{where} is there twice.")
        if type_id not in GGML_QUANT_SIZES:
            raise ValueError(
                f"{file.path} holds tensor {name[:80]!r} in number format {type_id}, which the installed "
                "gguf library does not know: upgrade it with 'pip install -U gguf'."
            )
        block, block_bytes = GGML_QUANT_SIZES[type_id]
        if 0 in shape or shape[-1] % block or offset % alignment:
            raise ValueError(f"{where} has the impossible shape {shape} or offset {offset}.")
        start, n_bytes = data_start + offset, math.prod(shape) // block * block_bytes
        if start < end_of_previous:
            raise ValueError(f"{where} lies on top of another one.")
        if start + n_bytes > file_bytes:
            raise ValueError(
                f"{file.path} is truncated: tensor {name[:80]!r} ends at byte {start + n_bytes}, the file "
                f"at {file_bytes}; download it again."
            )
        end_of_previous = start + n_bytes
        file.tensors[name] = TensorInfo(shape, int(type_id), file.path, start, n_bytes)


NAMES_OF_PARTS = (
    "put all parts into one directory, under the names that gguf-split gives them (NAME-00001-of-00002.gguf and so on)"
)


def part_number(file: GGUFFile) -> tuple[int, int]:
    """Which part of a model a file is, counted from 0, and of how many."""
    return file.get("split.no", int, 0), file.get("split.count", int, 1) or 1


def _told_part(file: GGUFFile) -> str:
    number, count = part_number(file)
    return f"{file.path} is part {number + 1} of {count} of a model"


def refuse_renamed_parts(paths: Sequence[Path]) -> None:
    """Raises ValueError for a part of a model whose name does not say so, among files that look like several models."""
    for path in paths:
        file = read_gguf(path)
        if part_number(file)[1] > 1:
            raise ValueError(f"{_told_part(file)}: {NAMES_OF_PARTS}.")


def read_parts(paths: Sequence[Path]) -> GGUFFile:
    """A model in several files, as gguf-split writes it: the metadata of the first, the tensors of all.

    paths: every part, in order; one path for a model in one file. Raises as read_gguf, and ValueError where the files
    are not all parts of one model.
    """
    parts = [read_gguf(path) for path in paths]
    first = parts[0]
    for n, part in enumerate(parts):
        if part_number(part) != (n, len(parts)):
            raise ValueError(f"{_told_part(part)}, not {n + 1} of {len(parts)}: {NAMES_OF_PARTS}.")
        if twice := part.tensors.keys() & first.tensors.keys() if n else ():
            raise ValueError(
                f"{part.path} repeats tensor {min(twice)[:80]!r} of {first.path.name}: they are not of one model."
            )
        first.tensors |= part.tensors
    announced = first.get("split.tensors.count", int, len(first.tensors))
    if len(parts) > 1 and announced != len(first.tensors):
        raise ValueError(
            f"{first.path} and its other parts hold {len(first.tensors)} tensors instead of {announced}: they are not "
            "all of one model; download them again."
        )
    return first


# -------------------------------------------------------------------------------------------------------------- weights


class Architecture(NamedTuple):
    """How files of one `general.architecture` are to be read. The rows follow llama.cpp's conversion script."""

    model_type: str
    hf_class: str
    permuted: bool = False  # rows of q and k are interleaved for llama.cpp's RoPE
    unit_offset: bool = False  # norms are stored as 1 + weight
    pre_mlp_norm: str = "post_attention_layernorm"  # what Hugging Face calls ffn_norm
    extra: dict[str, Any] = {}


GEMMA = {
    "unit_offset": True,
    "pre_mlp_norm": "pre_feedforward_layernorm",
    "extra": {"hidden_activation": "gelu_pytorch_tanh"},
}
ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM"),
    "gemma2": Architecture("gemma2", "Gemma2ForCausalLM", **GEMMA),
    "gemma3": Architecture("gemma3_text", "Gemma3ForCausalLM", **GEMMA),
}
GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
NOT_WEIGHTS = ("rope_freqs.weight",)  # RoPE's frequency factors: part of the config, see _llama3_scaling

# What hf_config reads of the keys that say how a model attends.
READ_KEYS = frozenset(
    "attention.head_count attention.head_count_kv attention.key_length attention.value_length attention.sliding_window "
    "attention.layer_norm_rms_epsilon attention.layer_norm_epsilon rope.dimension_count rope.freq_base "
    "rope.scale_linear rope.scaling.type rope.scaling.factor rope.scaling.attn_factor rope.scaling.finetuned "
    "rope.scaling.original_context_length".split()
)
ALSO_READ = {
    "gemma2": frozenset(("attention.sliding_window_pattern", "attn_logit_softcapping", "final_logit_softcapping")),
    "gemma3": frozenset(("rope.freq_base_swa", "attention.sliding_window_pattern", "final_logit_softcapping")),
}
OTHER_KEYS = ("logit_scale", "embedding_scale", "residual_scale", "attn_logit_softcapping", "final_logit_softcapping")
WITHOUT_EFFECT = {  # values of keys that are not read; any other value is refused. (0,) for keys that are not here
    "attention.causal": (True,),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "logit_scale": (0, 1.0),
    "embedding_scale": (0, 1.0),
    "residual_scale": (0, 1.0),
}


def architecture_of(file: GGUFFile) -> Architecture:
    if file.architecture not in ARCHITECTURES:
        raise ValueError(
            f"{file.path} holds a model of architecture {file.architecture[:80]!r}: choose a file of one of "
            f"{', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[file.architecture]


def hf_names(file: GGUFFile) -> dict[str, str]:
    """GGUF tensor name -> Hugging Face weight name. Raises ValueError for a tensor that has none."""
    layer_names = LAYER_NAMES | {"ffn_norm": architecture_of(file).pre_mlp_norm}
    names = {}
    for name in file.tensors:
        if name in NOT_WEIGHTS:
            continue
        module, _, suffix = name.rpartition(".")
        _, layer, part = module.split(".") if module.count(".") == 2 else ("", "", "")
        if module in GLOBAL_NAMES:
            names[name] = f"{GLOBAL_NAMES[module]}.{suffix}"
        elif module.startswith("blk.") and part in layer_names:
            names[name] = f"model.layers.{layer}.{layer_names[part]}.{suffix}"
        else:
            raise ValueError(
                f"{file.path} holds tensor {name[:80]!r}, which has no place in a model of architecture "
                f"{file.architecture!r}: this kind of model is not supported."
            )
    return names


def loaded_dtype(file: GGUFFile, name: str) -> torch.dtype:
    """The dtype that load_tensor returns: the stored one where torch has it, else float32."""
    if has_offset(file, name):
        return torch.float32
    return PLAIN_DTYPES.get(file.tensors[name].type_id, torch.float32)


def has_offset(file: GGUFFile, name: str) -> bool:
    """True where llama.cpp stores 1 + weight."""
    return architecture_of(file).unit_offset and name.endswith("norm.weight")


def load_tensor(file: GGUFFile, name: str) -> torch.Tensor:
    """The weight under that GGUF name as Hugging Face has it: dequantised, q and k in rotate-half order, norms as w."""
    architecture, info = architecture_of(file), file.tensors[name]
    weight = dequantize(info)
    if architecture.permuted and (".attn_q." in name or ".attn_k." in name):
        key = "head_count" if ".attn_q." in name else "head_count_kv"
        n_head = _heads(file, key)
        if weight.shape[0] % (2 * n_head):
            raise ValueError(f"{file.path} is damaged: {name} has {weight.shape[0]} rows for {n_head} heads.")
        # llama.cpp rotates the pairs (2j, 2j + 1), Hugging Face (j, j + D/2): (n_head, D/2, 2) -> (n_head, 2, D/2)
        weight = weight.view(n_head, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)
    return weight.float() - 1.0 if has_offset(file, name) else weight


def dequantize(info: TensorInfo) -> torch.Tensor:
    """One tensor as float32 (or in its own dtype where torch has it), a few MB of blocks at a time."""
    import numpy as np
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize as dequantize_blocks

    weight = torch.empty(info.shape, dtype=PLAIN_DTYPES.get(info.type_id, torch.float32))
    flat = weight.view(-1)
    block, block_bytes = GGML_QUANT_SIZES[info.type_id]
    with open(info.path, "rb") as stream:
        stream.seek(info.offset)
        if info.type_id in PLAIN_DTYPES:
            stream.readinto(flat.view(torch.uint8).numpy())
            return weight
        done = 0
        while done < flat.numel():
            blocks = min(DEQUANTIZE_BYTES // block_bytes, (flat.numel() - done) // block)
            data = np.frombuffer(stream.read(blocks * block_bytes), dtype=np.uint8)
            try:
                with np.errstate(all="ignore"):  # a scale may be infinite in a damaged file
                    numbers = dequantize_blocks(data, GGMLQuantizationType(info.type_id))
            except NotImplementedError:
                kind = GGMLQuantizationType(info.type_id).name
                raise ValueError(
                    f"{info.path} holds tensors in {kind}, which the installed gguf library cannot turn into "
                    "numbers: choose a file in another quantisation."
                ) from None
            flat[done : done + numbers.size] = torch.from_numpy(numbers)
            done += numbers.size
    return weight


# --------------------------------------------------------------------------------------------------------------- config


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """What the model's Hugging Face config.json would say, from the metadata and the tensors' shapes."""
    row, arch = architecture_of(file), file.architecture
    if file.get(f"{arch}.expert_count", int, 0):
        raise ValueError(f"{file.path} holds a mixture of experts, which is not supported: choose a dense model.")
    _refuse_unread_keys(file)
    if "token_embd.weight" not in file.tensors or len(file.tensors["token_embd.weight"].shape) != 2:
        raise ValueError(f"{file.path} lacks the embedding, token_embd.weight: download the file again.")
    n_embd, n_head = file.require(f"{arch}.embedding_length", int), _heads(file, "head_count")
    config = {
        "architectures": [row.hf_class],
        "model_type": row.model_type,
        "num_hidden_layers": file.require(f"{arch}.block_count", int),
        "hidden_size": n_embd,
        "intermediate_size": file.require(f"{arch}.feed_forward_length", int),
        "num_attention_heads": n_head,
        "num_key_value_heads": _heads(file, "head_count_kv"),
        "head_dim": _head_dim(file, n_embd // n_head),
        "max_position_embeddings": file.require(f"{arch}.context_length", int),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "rms_norm_eps": file.require(f"{arch}.attention.layer_norm_rms_epsilon", float),
        "rope_theta": file.get(f"{arch}.rope.freq_base", float, 10000.0),
        "rope_scaling": _rope_scaling(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "hidden_act": "silu",
    }
    for key in ("bos", "eos"):
        config[f"{key}_token_id"] = file.get(f"tokenizer.ggml.{key}_token_id", int)
    config |= row.extra
    if arch.startswith("gemma"):
        config |= _gemma_config(file, config)
    elif window := file.get(f"{arch}.attention.sliding_window", int, 0):
        if arch != "llama":
            raise ValueError(f"{file.path} has a sliding window of {window} in architecture {arch!r}: not supported.")
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    return config


def _refuse_unread_keys(file: GGUFFile) -> None:
    """Raises ValueError for a key that changes how the model computes, and that is not read here."""
    arch = file.architecture
    for key, value in file.metadata.items():
        name = key.removeprefix(f"{arch}.")
        matters = name.startswith(("rope.", "attention.")) or name in OTHER_KEYS
        if name == key or not matters or name in READ_KEYS | ALSO_READ.get(arch, frozenset()):
            continue
        values = value if isinstance(value, list) else [value]
        if any(v not in WITHOUT_EFFECT.get(name, (0,)) for v in values):
            raise ValueError(
                f"{file.path} says {key[:80]} = {str(value)[:80]}, which changes the model and is not read: convert "
                "the model's Hugging Face checkpoint instead."
            )


def _heads(file: GGUFFile, key: str) -> int:
    """attention.head_count or head_count_kv, a number or one number per layer, which must then be the same."""
    name = f"{file.architecture}.attention.{key}"
    value = file.metadata.get(name, file.metadata.get(f"{file.architecture}.attention.head_count"))
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1 or type(min(values)) is not int or min(values) < 1:
        raise ValueError(f"{file.path} gives {name} as {str(value)[:80]}: one number above 0 for all layers is needed.")
    return values.pop()


def _head_dim(file: GGUFFile, default: int) -> int:
    arch = file.architecture
    rope_dim = file.get(f"{arch}.rope.dimension_count", int)
    head_dim = file.get(f"{arch}.attention.key_length", int, rope_dim or default)
    value_dim = file.get(f"{arch}.attention.value_length", int, head_dim)
    if head_dim != value_dim or (rope_dim or head_dim) != head_dim:
        raise ValueError(
            f"{file.path} has heads of {head_dim} for keys, {value_dim} for values and {rope_dim} for RoPE: "
            "only equal sizes are supported."
        )
    return head_dim


def _gemma_config(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """The fields that only the Gemmas have; where the file is silent, the values that all their checkpoints share."""
    arch, n_layer = file.architecture, config["num_hidden_layers"]
    # llama.cpp knows the two 27B models by their depth: their scores are divided by sqrt(n_embd / n_head) instead.
    largest = {"gemma2": 46, "gemma3": 62}[arch] == n_layer
    scalar = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    window, pattern, score_cap, logit_cap = {"gemma2": (4096, 2, 50.0, 30.0), "gemma3": (0, 6, 0.0, 0.0)}[arch]
    fields = {
        "query_pre_attn_scalar": scalar,
        "sliding_window": file.get(f"{arch}.attention.sliding_window", int, window) or None,
        "attn_logit_softcapping": file.get(f"{arch}.attn_logit_softcapping", float, score_cap) or None,
        "final_logit_softcapping": file.get(f"{arch}.final_logit_softcapping", float, logit_cap) or None,
    }
    if arch == "gemma3":
        fields["rope_local_base_freq"] = file.get(f"{arch}.rope.freq_base_swa", float, 10000.0)
    # n_layer is not checked yet: no list of that length before it is
    if n_layer <= len(file.tensors):
        windowed = [fields["sliding_window"] is not None and w for w in _windowed_layers(file, n_layer, pattern)]
        fields["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windowed]
    return fields


def _windowed_layers(file: GGUFFile, n_layer: int, pattern: int) -> list[bool]:
    """Which layers have the window: all but every pattern-th, or as a list in the file says for each."""
    key = f"{file.architecture}.attention.sliding_window_pattern"
    if isinstance(file.metadata.get(key), list):
        windowed = file.get(key, list)
        if len(windowed) < n_layer:
            raise ValueError(f"{file.path} is damaged: {key} has {len(windowed)} entries for {n_layer} layers.")
        return [bool(w) for w in windowed[:n_layer]]
    pattern = file.get(key, int, pattern)
    return [pattern < 1 or (i + 1) % pattern != 0 for i in range(n_layer)]


def _rope_scaling(file: GGUFFile) -> dict[str, Any] | None:
    """RoPE's scaling. A factor without a type is linear, and has an older name in files of 2023."""
    arch, scaling = file.architecture, f"{file.architecture}.rope.scaling"
    factor = file.get(f"{scaling}.factor", float, file.get(f"{arch}.rope.scale_linear", float, 0.0))
    kind = file.get(f"{scaling}.type", str, "linear")
    kind = "none" if kind == "linear" and factor in (0, 1) else kind
    attention = file.get(f"{scaling}.attn_factor", float, 1.0)
    llama3 = _llama3_scaling(file) if "rope_freqs.weight" in file.tensors else None
    if kind not in ("none", "linear", "yarn") or kind != "yarn" and attention != 1 or kind != "none" and llama3:
        raise ValueError(
            f"{file.path} scales RoPE by {kind[:80]!r} with attn_factor {attention:g}{' and rope_freqs' * bool(llama3)}"
            ", which is not read from GGUF files: convert the model's Hugging Face checkpoint instead."
        )
    if kind == "none":
        return llama3
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    trained = file.get(f"{scaling}.original_context_length", int, file.require(f"{arch}.context_length", int))
    fields = {"rope_type": kind, "factor": factor or 1.0, "original_max_position_embeddings": trained}
    if attention != 1:
        fields["attention_factor"] = attention * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    return fields


def _llama3_scaling(file: GGUFFile) -> dict[str, Any] | None:
    """Llama 3.1's scaling. The file has the factors it leads to, one per frequency, but not its four parameters: take
    those that every Llama 3.1 to 3.3 uses and check that they lead to the same factors."""
    factors = dequantize(file.tensors["rope_freqs.weight"]).float().flatten().tolist()
    theta = file.get(f"{file.architecture}.rope.freq_base", float, 10000.0)
    if set(factors) == {1.0}:
        return None
    scaling = {
        "rope_type": "llama3",
        "factor": max(factors),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for j, factor in enumerate(factors):
        wavelength = 2 * math.pi * theta ** (j / len(factors))
        rotations = scaling["original_max_position_embeddings"] / wavelength
        smooth = min(max((rotations - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        expected = 1 / ((1 - smooth) / scaling["factor"] + smooth) if scaling["factor"] > 0 else math.nan
        if not math.isclose(factor, expected, rel_tol=1e-3):
            raise ValueError(
                f"{file.path} scales RoPE by factors that are not Llama 3.1's: convert the model's Hugging "
                "Face checkpoint instead."
            )
    return scaling
