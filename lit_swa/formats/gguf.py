"""Reading GGUF files: their metadata and tensors. gguf_models.py says what model these are, gguf_tokenizer.py reads the
tokenizer, and gguf_export.py writes such files.

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

from lit_swa.formats.files import LazyTensor
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
    read: set[str] = field(default_factory=set)  # keys that were asked for
    known: dict[str, list[float]] = field(default_factory=dict)  # the numbers of some tensors, before there is a file

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """metadata[key], which must be of that kind (an int will do for a float). Raises ValueError otherwise."""
        self.read.add(key)
        value = self.metadata.get(key, default)
        if kind is float and type(value) in (int, float):
            value = shortest(value)
        if value is not default and type(value) is not kind:
            raise ValueError(
                f"{self.path} gives {key} as {str(value)[:80]!r}, which is no {kind.__name__}: download it again, or "
                "convert the original checkpoint."
            )
        return value

    def numbers(self, name: str) -> list[float]:
        """The elements of a small tensor."""
        if name not in self.known and name not in self.tensors:
            raise ValueError(f"{self.path} lacks the tensor {name}: download the file again.")
        return self.known[name] if name in self.known else dequantize(self.tensors[name]).float().flatten().tolist()

    def require(self, key: str, kind: type) -> Any:
        if key not in self.metadata:
            raise ValueError(f"{self.path} lacks {key}, which a checkpoint needs: download the file again.")
        return self.get(key, kind)


def shortest(value: float) -> float:
    """The number of fewest digits that float32, as files have it, cannot tell from this: 1e-06 of 9.99999997e-07."""
    import numpy as np

    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


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
        raise FileNotFoundError(f"There is no file {path}: give the name of a GGUF file.")
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
            raise ValueError(f"{where} is there twice; download it again.")
        if type_id not in GGML_QUANT_SIZES:
            raise ValueError(
                f"{file.path} holds tensor {name[:80]!r} in number format {type_id}, which the installed "
                "gguf library does not know: upgrade it with 'pip install -U gguf'."
            )
        block, block_bytes = GGML_QUANT_SIZES[type_id]
        if 0 in shape or shape[-1] % block or offset % alignment:
            raise ValueError(f"{where} has the impossible shape {shape} or offset {offset}; download it again.")
        start, n_bytes = data_start + offset, math.prod(shape) // block * block_bytes
        if start < end_of_previous:
            raise ValueError(f"{where} lies on top of another one; download it again.")
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


def open_weights(file: GGUFFile, offset: bool = False) -> dict[str, LazyTensor]:
    """The file's tensors, each dequantised when its load() is called, to float32 where torch has no dtype for them.

    offset: norms are stored as 1 + weight, and are wanted as weights (Gemma).
    """

    def lazy(name: str, info: TensorInfo) -> LazyTensor:
        if offset and name.endswith("norm.weight"):
            return LazyTensor(info.shape, torch.float32, lambda: dequantize(info).float() - 1.0)
        return LazyTensor(info.shape, PLAIN_DTYPES.get(info.type_id, torch.float32), lambda: dequantize(info))

    return {name: lazy(name, info) for name, info in file.tensors.items()}


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
