"""Files that must never be half-written, and files from strangers that must be checked before a library sees them.

Writing: to a temporary name in the same directory, flushed to the disk, then renamed. Reading: every name, length,
shape and offset is compared with the file itself, in Python ints, which do not overflow.
"""

import ctypes
import errno
import glob
import json
import math
import mmap
import os
import shutil
import sys
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from lit_swa.formats.json_files import MAX_JSON_BYTES, parse_json, read_json
from lit_swa.formats.reading import find_inside, require_regular
from lit_swa.utils import print_line

if TYPE_CHECKING:
    from filelock import FileLock

LOCK_NAME = ".lit_swa.lock"
TEMPORARY = ".lit_swa.tmp"  # how temporary names end
MADV_PAGEOUT = 21  # of Linux, from 5.4 on: reclaim pages, and lose nothing
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, the user's quota, the longest file that is allowed

# -------------------------------------------------------------------------------------------------------------- writing


@contextmanager
def atomic_file(path: Path, n_bytes: int | None = None) -> Iterator[BinaryIO]:
    """A binary stream whose content appears under `path` whole, when the block ends without an error, or not at all.

    n_bytes: how long it is going to be, for the message of a disk that is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    remove_leftovers_of(path)
    with named_when_full(path, n_bytes):
        try:
            with open(temporary, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_directory(path.parent)


class DiskFull(OSError):
    """A full disk's error with the place in it."""


@contextmanager
def named_when_full(path: Path, n_bytes: int | None = None) -> Iterator[None]:
    """The system's error of a full disk says neither where nor what to do. Within this block it does.

    path: what is written. n_bytes: its length, where that is known.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        where = path if path.is_dir() else path.parent
        needs = "" if n_bytes is None else f"it takes {format_bytes(n_bytes)} and "
        with suppress(OSError):
            needs += f"{where} has {format_bytes(shutil.disk_usage(where).free)} left: "
        raise DiskFull(
            f"{error.strerror} for {path}: {needs}free some space, or choose another directory, and start again "
            "(a training run goes on with --resume auto)."
        ) from None


def remove_leftovers_of(path: Path) -> None:
    """Delete what killed processes left of this file; one that still runs goes on writing it."""
    if os.name != "posix":  # elsewhere a process cannot be asked whether it runs
        return
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*{TEMPORARY}"):
        process = temporary.name.removesuffix(TEMPORARY).rpartition(".")[2]
        if process.isdecimal() and not is_running(int(process)):
            temporary.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except PermissionError:  # somebody else's
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def sync_directory(directory: Path) -> None:
    """Make renames in the directory last through a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as stream:
        stream.write(text.encode())


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def copy_file(source: Path, path: Path) -> None:
    with open(source, "rb") as reader, atomic_file(path) as writer:
        shutil.copyfileobj(reader, writer)


def remove_directory(path: Path) -> None:
    """Delete a directory: at once under its name, so that no part of it is ever met there, then file by file."""
    hidden = path.with_name(f".{path.name}.old{TEMPORARY}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def replace_directory(new: Path, path: Path) -> None:
    """Rename `new` to `path`, and delete the directory that was there. At every moment a whole one is under `path`,
    where the system can exchange two names (Linux, on most file systems); elsewhere there is none for a moment."""
    if not path.exists():
        new.rename(path)
    elif exchange_names(new, path):
        shutil.rmtree(new, ignore_errors=True)  # the old one, which has a temporary name now
    else:
        hidden = path.with_name(f".{path.name}.old{TEMPORARY}")
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        new.rename(path)
        shutil.rmtree(hidden, ignore_errors=True)
    sync_directory(path.parent)


def exchange_names(a: Path, b: Path) -> bool:
    """Give each of two directories the other's name in one step. Returns False where the system cannot."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        return ctypes.CDLL(None).renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0
    except (AttributeError, OSError, TypeError):  # no such function, or no C library to ask
        return False


def remove_leftovers(directory: Path) -> None:
    """Delete what a killed run left behind. Call it with the directory locked: nobody else is writing then."""
    for path in directory.glob(f".*{TEMPORARY}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def directory_lock(directory: Path) -> Iterator[None]:
    """One process at a time writes into a directory. The system holds the lock, and frees it when the process ends."""
    lock, taken = try_lock(directory)
    if not taken:
        print_line(f"Another process is writing to {directory}: waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def hold_directory(directory: Path) -> "FileLock":
    """Lock a run's directory until the result is forgotten. Raises ValueError where another process has locked it."""
    lock, taken = try_lock(directory)
    if not taken:
        raise ValueError(f"Another run is at work in {directory}: wait for its end, or choose another --out_dir.")
    return lock


def try_lock(directory: Path) -> "tuple[FileLock, bool]":
    """The lock of a directory, which is made, and False if another process holds it. This one may take it again."""
    from filelock import FileLock, Timeout

    with named_when_full(directory):
        if directory.is_file():
            raise ValueError(f"{directory} is a file: give a directory.")
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / LOCK_NAME, is_singleton=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return lock, False
    return lock, True


def require_space(directory: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if n_bytes > free:
        raise OSError(
            f"{directory} needs {format_bytes(n_bytes)} and its disk has {format_bytes(free)} left: free some space."
        )


def format_bytes(n: float) -> str:
    """12.3 MB, or 4.56 GB."""
    return f"{n / 1e6:.1f} MB" if n < 1e9 else f"{n / 1e9:.2f} GB"


# -------------------------------------------------------------------------------------------------------------- reading


def holds_json(path: Path, content: object) -> bool:
    """True when the file is there and holds this."""
    with suppress(ValueError, OSError):
        return read_json(path) == content
    return False


# ---------------------------------------------------------------------------------------------------------- safetensors
#
# The format (https://github.com/huggingface/safetensors#format): u64 length of the header | header | tensor data.
# The header is JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}; the tensors fill the data without holes.

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class LazyTensor(NamedTuple):
    """A tensor that is somewhere else until load() is called."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> "LazyTensor":
        """The rows start .. stop of a tensor (rows, ...). Of a safetensors file the other pages are not read.

        Raises ValueError when the tensor does not have these rows.
        """
        return self.part(0, start, stop)

    def columns(self, start: int, stop: int) -> "LazyTensor":
        """The columns start .. stop of a tensor (rows, columns, ...), as rows() gives rows; a copy."""
        return self.part(1, start, stop)

    def part(self, dim: int, start: int, stop: int) -> "LazyTensor":
        """The places start .. stop of a dimension, as rows() gives those of the first."""
        if dim >= len(self.shape) or not 0 <= start <= stop <= self.shape[dim]:
            raise ValueError(f"A tensor of shape {list(self.shape)} has no part {start} to {stop} of dimension {dim}.")
        index = (slice(None),) * dim + (slice(start, stop),)
        shape = (*self.shape[:dim], stop - start, *self.shape[dim + 1 :])
        return LazyTensor(shape, self.dtype, lambda: self.load()[index].contiguous())


def as_lazy(tensor: Tensor) -> LazyTensor:
    """A tensor in memory as one that is loaded: load() gives the tensor itself, without its history of gradients."""
    tensor = tensor.detach()
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


class MappedFile:
    """One mapping of a file for all of its tensors, which lasts as long as any of them is in use.

    Each tensor is a private view: writing to it changes no file. When the last tensor on a view is gone, its pages are
    given back, so that a loader that casts one tensor after another never holds the file beside the model.
    """

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        try:
            self.data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            n_bytes = os.fstat(stream.fileno()).st_size
            raise OSError(
                f"{path} cannot be mapped ({error.strerror}): it takes {n_bytes / 1e9:.2f} GB of address space; raise "
                "the limit (ulimit -v)."
            ) from None
        self.views: weakref.WeakValueDictionary[int, memoryview] = weakref.WeakValueDictionary()

    def tensor(self, begin: int, end: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The bytes begin .. end as a tensor. Asked for again while it is in use, it is the same memory."""
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        view = self.views.get(begin)
        if view is None:
            self.views[begin] = view = memoryview(self.data)[begin:end]
            weakref.finalize(view, give_back, self.data, begin, end).atexit = False
        return torch.frombuffer(view, dtype=dtype).view(shape)


def give_back(data: mmap.mmap, begin: int, end: int) -> None:
    """Let the system have the whole pages between two bytes of a mapping that nothing uses any more."""
    first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last and hasattr(mmap, "MADV_DONTNEED"):
        data.madvise(mmap.MADV_DONTNEED, first, last - first)


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Every tensor of a safetensors file; load() gives it memory-mapped. Raises ValueError when the file is damaged."""
    require_regular(path)
    with open(path, "rb") as stream:
        file_bytes = os.fstat(stream.fileno()).st_size
        length, header = _read_header(path, stream, file_bytes)
        places = {name: _checked_entry(path, name, entry) for name, entry in header.items()}
        _require_no_holes(path, places, file_bytes - 8 - length)
        file = MappedFile(stream, path)

    def lazy(shape: tuple[int, ...], dtype: torch.dtype, begin: int, end: int) -> LazyTensor:
        start, stop = 8 + length + begin, 8 + length + end
        return LazyTensor(shape, dtype, lambda: file.tensor(start, stop, shape, dtype))

    return {name: lazy(*place) for name, place in places.items()}


def _read_header(path: Path, stream: BinaryIO, file_bytes: int) -> tuple[int, dict[str, Any]]:
    """The header's length in bytes, and its entries by the tensors' names."""
    length = int.from_bytes(stream.read(8), "little")
    if file_bytes < 8 or length > file_bytes - 8:
        raise ValueError(f"{path} is truncated, or no safetensors file: download or convert it again.")
    if length > MAX_JSON_BYTES:
        raise ValueError(f"{path} has a header of {length} bytes: no checkpoint has more than {MAX_JSON_BYTES}.")
    header = parse_json(stream.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path} is damaged: its metadata is not text; download or convert it again.")
    return length, header


def _require_no_holes(path: Path, places: Mapping[str, tuple], data_bytes: int) -> None:
    """The tensors fill the data, one after the other."""
    at = 0
    for begin, end, name in sorted((begin, end, name) for name, (_, _, begin, end) in places.items()):
        if begin != at:
            raise ValueError(f"{path} is damaged: tensor {name[:80]!r} starts at byte {begin} instead of {at}.")
        at = end
    if at != data_bytes:
        raise ValueError(
            f"{path} is truncated or damaged: its tensors take {at} bytes and the file holds {data_bytes}; download or "
            "convert it again."
        )


def _checked_entry(path: Path, name: str, entry: object) -> tuple[tuple[int, ...], torch.dtype, int, int]:
    """Shape, dtype and place of one tensor, whose size must be that of its place."""

    def are_counts(values: object, most: int) -> bool:
        return (
            isinstance(values, list) and len(values) <= most and all(type(v) is int and 0 <= v < 2**63 for v in values)
        )

    where = f"{path} is damaged: tensor {name[:80]!r}"
    if not isinstance(entry, dict) or not are_counts(entry.get("shape"), 8):
        raise ValueError(f"{where} has no proper shape; download or convert it again.")
    if not are_counts(entry.get("data_offsets"), 2) or len(entry["data_offsets"]) != 2:
        raise ValueError(f"{where} has no proper place in the file; download or convert it again.")
    if not isinstance(entry.get("dtype"), str) or entry["dtype"] not in DTYPES:
        raise ValueError(
            f"{path} holds tensor {name[:80]!r} as {str(entry.get('dtype'))[:20]!r}, a dtype that is not read: "
            f"it must be one of {', '.join(DTYPES)}."
        )
    shape, dtype, (begin, end) = tuple(entry["shape"]), DTYPES[entry["dtype"]], entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{where} has {end - begin} bytes for the shape {shape}; download or convert it again.")
    return shape, dtype, begin, end


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write a safetensors file, atomically, with one tensor in memory at a time. They are loaded in the order given, so
    that what is computed for several neighbours is computed once."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)  # so that each stays aligned
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in ordered:
        end = at + tensor.n_bytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path, 8 + len(text) + at) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, lazy in tensors.items():
            tensor = lazy.load().detach()
            if tuple(tensor.shape) != lazy.shape or tensor.dtype != lazy.dtype:
                raise AssertionError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, announced as {lazy[:2]}")
            stream.seek(8 + len(text) + header[name]["data_offsets"][0])
            stream.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


# -------------------------------------------------------------------------------------------------------------- pickles


def open_pickle(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a .bin or .pth file. torch reads it with weights_only=True: nothing in it is run, ever.

    Raises ValueError when the file is damaged or holds anything but a dict of tensors.
    """
    require_regular(path)
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip:  # torch does not compress its tensors; only a bomb would be
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
        type(name) is str and type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and not t.is_nested
        for name, t in state.items()
    ):
        raise ValueError(f"{path} holds something other than a dict of weights: use a checkpoint in safetensors.")
    for name, t in state.items():  # one on the meta device has none, and stride 0 makes gigabytes of one
        if t.device.type != "cpu" or t.numel() * t.element_size() > t.untyped_storage().nbytes():
            raise ValueError(f"{path} holds {name[:80]!r} without all of its numbers: save the checkpoint again.")
    if not is_zip:
        return {name: as_lazy(t) for name, t in state.items()}
    return {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: copied_out(t)) for name, t in state.items()}


def copied_out(mapped: Tensor) -> Tensor:
    """A copy of a tensor on a file that torch mapped, whose pages the system may have back: torch itself keeps them
    until the last tensor of the file is gone. They are read again when they are asked for again."""
    copy, storage = mapped.detach().clone(), mapped.untyped_storage()
    begin = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end and sys.platform == "linux":
        with suppress(AttributeError, OSError, TypeError):  # no C library to ask
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_PAGEOUT)
    return copy


# --------------------------------------------------------------------------------------------- weights in several files


def index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def shard_names(stem: str, sizes: list[int], max_bytes: int) -> list[str]:
    """The file of each tensor, in order: one file, or as many as it takes so that none is larger than max_bytes."""
    shard, filled, shards = 1, 0, []
    for size in sizes:
        if filled and filled + size > max_bytes:
            shard, filled = shard + 1, 0
        filled += size
        shards.append(shard)
    return [f"{stem}.safetensors" if shard == 1 else f"{stem}-{s:05d}-of-{shard:05d}.safetensors" for s in shards]


def write_weights(directory: Path, stem: str, tensors: Mapping[str, LazyTensor], max_bytes: int) -> None:
    """stem.safetensors, or its shards and their index; files of an earlier write that are not replaced are removed."""
    require_space(directory, sum(tensor.n_bytes for tensor in tensors.values()))
    names = shard_names(stem, [tensor.n_bytes for tensor in tensors.values()], max_bytes)
    weight_map = dict(zip(tensors, names, strict=True))
    for file in dict.fromkeys(names):
        write_safetensors(directory / file, {name: t for name, t in tensors.items() if weight_map[name] == file})
    keep = set(names)
    if len(keep) > 1:
        total = sum(tensor.n_bytes for tensor in tensors.values())
        write_json(directory / index_name(stem), {"metadata": {"total_size": total}, "weight_map": weight_map})
        keep.add(index_name(stem))
    for path in [*directory.glob(f"{stem}*.safetensors"), directory / index_name(stem)]:
        if path.name not in keep:
            path.unlink(missing_ok=True)


def read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index: tensor name -> file name, which a stranger chose. Raises ValueError."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{path} is damaged: it has no weight_map; download or convert it again.")
    return weight_map


def open_shards(directory: Path, index: str) -> dict[str, LazyTensor]:
    """The tensors that an index promises. Raises ValueError when a file or a tensor is not where the index says."""
    weight_map = read_index(find_inside(directory, index))
    require_files(directory, sorted(set(weight_map.values())), "shards")
    files = {name: open_safetensors(find_inside(directory, name)) for name in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in files[file]:
            raise ValueError(
                f"{directory / file} lacks tensor {name[:80]!r}, which {index} places there: download or "
                "convert the checkpoint again."
            )
    return {name: files[file][name] for name, file in weight_map.items()}


def require_files(directory: Path, names: list[str], what: str) -> None:
    """Raises FileNotFoundError naming what is missing, and ValueError for a name or a link that leads out."""
    missing = []
    for name in names:
        try:
            find_inside(directory, name)
        except FileNotFoundError:
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FileNotFoundError(
            f"{directory} is incomplete: {len(names) - len(missing)} of {len(names)} {what} are there, "
            f"{', '.join(missing[:3])}{more} {'is' if len(missing) == 1 else 'are'} missing."
        )
