"""Where the documents of a corpus come from: files of text, JSON Lines or Parquet, datasets on the Hugging Face hub.

The input is cut into parts, each of which a process can read by itself: a range of bytes of a file of lines, some row
groups of a Parquet file, one of the files of a dataset on the hub. What the parts are depends on the input alone.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lit_swa.data.corpora import Corpus
from lit_swa.data.readers import READERS
from lit_swa.texts import decode_text, read_text

SMALLEST_PART, LARGEST_PART, PARTS = 2**20, 2**28, 64  # bytes; how many parts an input of medium size has
HUGE_TEXT = 2**26  # bytes of a text without a separator that is read piece by piece
HUB = "hf://datasets"
KEY = "--key of scripts/prepare_text.py"  # which pretrain/base.py has not
TABLES = (".json", ".csv")  # read as a whole, and only where they are named: a directory has them for other reasons
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".jsonl.gz": "json", ".jsonl.zst": "json"}


class Selection(NamedTuple):
    """Which text of a record is a document.

    key: what holds it. separator: what stands between the documents of a .txt file; "": the file is one document.
    left_out: as in Corpus.
    """

    key: str = "text"
    separator: str = ""
    left_out: tuple[str, str, str] | None = None

    def text(self, record: Any, where: Callable[[], str]) -> str:
        """The document that a record holds, "" if it is left out. Raises ValueError that begins with its place."""
        record = {self.key: record} if isinstance(record, str) else record
        if not isinstance(record, dict):
            raise ValueError(f'{where()} is a {type(record).__name__}: it must be an object like {{"text": ...}}.')
        if self.key not in record:
            there = ", ".join(map(str, list(record)[:12])) or "none"
            raise ValueError(f"{where()} has the keys {there}: name the one of the text with {KEY}.")
        if self.left_out is not None:
            outer, inner, value = self.left_out
            found = record.get(outer)
            if isinstance(found, dict) and found.get(inner) == value:
                return ""
        text = record[self.key]
        if not isinstance(text, str | None):
            raise ValueError(f"{where()}, {self.key} is a {type(text).__name__}: it must be a text.")
        if text and not text.isascii() and (half := half_character(text)):
            raise ValueError(
                f"{where()}, {self.key} has half a character, {half!r}, which no tokenizer takes: mend or remove it."
            )
        return text or ""


def half_character(text: str) -> str:
    """The first half of a surrogate pair that stands alone, as JSON can write it; "" if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start]
    return ""


class Part(NamedTuple):
    """A piece of the input: of a file from `start` up to `stop` (bytes or row groups), or one file of a dataset.

    size: about how many bytes are read, for the progress line; 0 where nobody knows.
    """

    file: str
    start: int
    stop: int
    size: int


Document = tuple[str | Path, int]  # a text, or a huge file that is one; and how many bytes of the input it took


# --------------------------------------------------------------------------------------------------------- which parts


def find_files(data: Sequence[Path]) -> list[Path]:
    """The files that paths and directories name. Raises OSError or ValueError."""
    files: list[Path] = []
    for path in data:
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(p for p in path.rglob("*") if suffix_of(p) in KINDS and suffix_of(p) not in TABLES)
        if not inside:
            raise ValueError(f"{path} holds no text: give {', '.join(k for k in KINDS if k not in TABLES)} files.")
        files += inside
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"There is no file {file}: give texts, or a directory of some.")
        if suffix_of(file) not in KINDS:
            raise ValueError(f"{file} is no text: it must be one of {', '.join(KINDS)}.")
    return files


def suffix_of(path: Path) -> str:
    """.jsonl.zst for a.jsonl.zst, .txt for a.b.txt"""
    return "".join(path.suffixes[-2:]) if path.suffix in (".gz", ".zst") else path.suffix


def cut_files(files: Sequence[Path], selection: Selection) -> list[Part]:
    """The parts of the files, in order."""
    sizes = [file.stat().st_size for file in files]
    step = min(LARGEST_PART, max(SMALLEST_PART, sum(sizes) // PARTS))
    return [part for f, n in zip(files, sizes, strict=True) for part in KINDS[suffix_of(f)][0](f, n, step, selection)]


def whole(file: Path, n_bytes: int, step: int, selection: Selection) -> list[Part]:
    return [Part(str(file), 0, n_bytes, n_bytes)]


def ranges(file: Path, n_bytes: int, step: int, selection: Selection) -> list[Part]:
    borders = [*range(0, n_bytes, step), n_bytes]
    return [Part(str(file), a, b, b - a) for a, b in zip(borders, borders[1:], strict=False)]


def text_ranges(file: Path, n_bytes: int, step: int, selection: Selection) -> list[Part]:
    return (ranges if selection.separator else whole)(file, n_bytes, step, selection)


def row_groups(file: Path, n_bytes: int, step: int, selection: Selection) -> list[Part]:
    """Row groups whose texts, uncompressed, make about `step` bytes."""
    with open_parquet(file) as parquet:
        meta, parts, start, size = parquet.metadata, [], 0, 0
        names = parquet.schema_arrow.names
        if selection.key not in names:
            raise ValueError(f"{file} has the columns {', '.join(names[:12])}: name the one of the text with {KEY}.")
        for i in range(meta.num_row_groups):
            group = meta.row_group(i)
            columns = (group.column(c) for c in range(group.num_columns))
            size += sum(c.total_uncompressed_size for c in columns if c.path_in_schema == selection.key)
            if size >= step or i + 1 == meta.num_row_groups:
                parts.append(Part(str(file), start, i + 1, size))
                start, size = i + 1, 0
    return parts


# ----------------------------------------------------------------------------------------------------- their documents


def read_part(part: Part, selection: Selection) -> Iterator[Document]:
    """The documents that begin in a part. Raises OSError or ValueError that names the place."""
    return KINDS[suffix_of(Path(part.file))][1](part, selection)


def read_plain(part: Part, selection: Selection) -> Iterator[Document]:
    path = Path(part.file)
    if selection.separator:
        yield from read_separated(part, selection.separator)
    elif part.size > HUGE_TEXT:
        yield path, part.size
    elif part.size:
        yield read_text(path), part.size


def read_separated(part: Part, separator: str) -> Iterator[Document]:
    """The texts between separators. A text belongs to the part in which its first byte lies."""
    mark = separator.encode()
    with open(part.file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = part.start and first_behind(data, mark, part.start)
        while at < part.stop:
            end = data.find(mark, at)
            end = len(data) if end < 0 else end
            behind = min(end + len(mark), len(data))
            text = decode_text(data[at:end], f"{part.file}, from byte {at} on,").strip("\n")
            yield text, behind - at
            at = behind


def first_behind(data: mmap.mmap, mark: bytes, start: int) -> int:
    """Where the first text that begins at `start` or behind it begins."""
    at = data.find(mark, max(0, start - len(mark)))
    if at < 0:
        return len(data)
    while data[at - 1 : at - 1 + len(mark)] == mark:  # a run of line ends: its marks are counted from its beginning
        at -= 1
    while at + len(mark) < start:
        at = data.find(mark, at + len(mark))
        if at < 0:
            return len(data)
    return at + len(mark)


def check_separator(separator: str) -> None:
    """Raises ValueError where one occurrence could overlap another, so that it is unclear which of them counts."""
    overlaps = any(separator.startswith(separator[i:]) for i in range(1, len(separator)))
    if overlaps and len(set(separator.encode())) > 1:
        raise ValueError(f"separator={separator!r} does not fit: it ends as it begins; choose another.")


def read_lines(part: Part, selection: Selection) -> Iterator[Document]:
    """The lines of a JSON Lines file that begin in a range of bytes."""
    with open(part.file, "rb") as stream:
        stream.seek(max(0, part.start - 1))
        if part.start:
            stream.readline()  # the rest of a line that began before, or the line end just before this one
        while (at := stream.tell()) < part.stop and (line := stream.readline()):
            yield line_text(line, selection, lambda at=at: f"{part.file} line {count_lines(part.file, at)}"), len(line)


def line_text(line: bytes, selection: Selection, where: Callable[[], str]) -> str:
    """The document of a line of JSON, "" for a blank one. where: is called for an error only, since it counts lines."""
    if not line.strip():
        return ""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{where()} is no UTF-8 text: convert the file, as with iconv -f latin1 -t utf-8.") from None
    except (ValueError, RecursionError) as error:
        reason = str(getattr(error, "msg", error))[:80]
        raise ValueError(f"{where()} is no JSON ({reason}): mend or remove the line.") from None
    return selection.text(record, where)


def count_lines(file: str, at: int) -> int:
    """The number of the line that begins at a byte, counted from 1."""
    number = 1
    with open(file, "rb") as stream:
        while at > 0 and (block := stream.read(min(at, 2**20))):
            number, at = number + block.count(b"\n"), at - len(block)
    return number


def read_compressed(part: Part, selection: Selection) -> Iterator[Document]:
    """The lines of a compressed JSON Lines file. Their bytes are counted as they are in the file."""
    with open(part.file, "rb") as raw:
        lines, done, number = compressed_lines(part.file, raw), 0, 0
        while True:
            try:
                line = next(lines, None)
            except Exception as error:  # noqa: B902 - of gzip, zlib or zstandard
                reason = " ".join(str(error).split())[:80]
                raise ValueError(f"{part.file} is damaged ({reason}): fetch it again.") from None
            if line is None:
                return
            number, before, done = number + 1, done, raw.tell()
            yield line_text(line, selection, lambda n=number: f"{part.file} line {n}"), done - before


def compressed_lines(file: str, raw: BinaryIO) -> Iterator[bytes]:
    if file.endswith(".gz"):
        return iter(gzip.GzipFile(fileobj=raw))
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{file} is compressed by zstd: to read it, run pip install zstandard.") from None
    return cut_lines(read_frames(raw, zstandard.ZstdDecompressor))


def read_frames(raw: BinaryIO, new: Callable[[], Any]) -> Iterator[bytes]:
    """What the frames of a zstd file hold. zstandard's own reader takes a file that ends within one for a whole one."""
    frame, block = None, b""
    while block := block or raw.read(2**14):
        frame = frame or new().decompressobj()
        yield frame.decompress(block)
        frame, block = (None, frame.unused_data) if frame.eof else (frame, b"")
    if frame is not None:
        raise EOFError("it ends within a frame")


def cut_lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines with their ends."""
    pieces: list[bytes] = []  # of a line that goes on in the next block
    for block in blocks:
        first, *others = block.split(b"\n")
        pieces.append(first)
        for other in others:
            yield b"".join(pieces) + b"\n"
            pieces = [other]
    if rest := b"".join(pieces):
        yield rest


def read_row_groups(part: Part, selection: Selection) -> Iterator[Document]:
    columns = [selection.key] + ([selection.left_out[0]] if selection.left_out else [])
    with open_parquet(Path(part.file)) as parquet:
        groups = list(range(part.start, part.stop))
        rows = sum(parquet.metadata.row_group(i).num_rows for i in groups)
        each = part.size / max(1, rows)
        columns = [name for name in columns if name in parquet.schema_arrow.names]
        where = f"{part.file} row group {part.start}" + (f" to {part.stop - 1}" if len(groups) > 1 else "")
        for batch in parquet.iter_batches(256, row_groups=groups, columns=columns):
            for row in batch.to_pylist():
                yield selection.text(row, lambda: where), int(each)


@contextlib.contextmanager
def open_parquet(file: Path) -> Iterator[Any]:
    """A Parquet file. Within this block what pyarrow says of a damaged one becomes a sentence."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{file} is a Parquet file: to read it, run pip install pyarrow.") from None
    try:
        with ParquetFile(file) as parquet:
            yield parquet
    except (ArrowException, OSError) as error:
        raise ValueError(f"{file} is damaged ({' '.join(str(error).split())[:100]}): fetch it again.") from None


def read_table(part: Part, selection: Selection) -> Iterator[Document]:
    for where, record in READERS[Path(part.file).suffix](Path(part.file)):
        yield selection.text(record, lambda where=where: where), 0


KINDS: dict[str, tuple[Callable[..., list[Part]], Callable[[Part, Selection], Iterator[Document]]]] = {
    ".txt": (text_ranges, read_plain),
    ".jsonl": (ranges, read_lines),
    ".jsonl.gz": (whole, read_compressed),
    ".jsonl.zst": (whole, read_compressed),
    ".parquet": (row_groups, read_row_groups),
    ".json": (whole, read_table),
    ".csv": (whole, read_table),
}


# --------------------------------------------------------------------------------------------------- datasets, streamed


class Stream(NamedTuple):
    """A dataset that the `datasets` library reads as it comes, without keeping it: from the hub or from a directory.

    name: the dataset. subset: its configuration. pattern: which of its files, where it has no configuration.
    """

    name: str
    split: str = "train"
    subset: str | None = None
    pattern: str | None = None

    def open(self) -> Any:
        """The dataset, as datasets.load_dataset gives it. Raises OSError or ValueError."""
        try:
            import datasets
        except ImportError:
            raise ValueError(f"{self.name} is read with the datasets library: run pip install datasets.") from None
        try:
            if self.pattern is None:
                return datasets.load_dataset(self.name, self.subset, split=self.split, streaming=True)
            builder, files = BUILDERS[suffix_of(Path(self.pattern))], f"{HUB}/{self.name}/{self.pattern}"
            return datasets.load_dataset(builder, data_files=files, split="train", streaming=True)
        except Exception as error:  # noqa: B902 - the hub's, the network's and the library's have no class in common
            reason = " ".join(str(error).split())[:200]
            raise OSError(
                f"The dataset {self.name} cannot be read ({reason}): check its name, split and subset and the network, "
                "or fetch its files and give them with --data."
            ) from None

    def cut(self) -> list[Part]:
        """One part for each of the dataset's files."""
        return [Part(f"{i}", i, i + 1, 0) for i in range(self.open().num_shards)]

    def read(self, part: Part, selection: Selection) -> Iterator[Document]:
        dataset = self.open()
        if dataset.num_shards > 1:
            dataset = dataset.shard(num_shards=dataset.num_shards, index=part.start)
        for number, record in enumerate(dataset):
            yield selection.text(record, lambda n=number: f"{self.name}, file {part.start}, record {n}"), 0


def stream_of(corpus: Corpus, split: str) -> Stream:
    """A corpus on the hub. Raises ValueError for a split that it does not have."""
    if split not in corpus.splits:
        raise ValueError(f"split={split!r} does not fit: {corpus.repo} has {', '.join(corpus.splits)}.")
    return Stream(corpus.repo, split, None, corpus.splits[split])
