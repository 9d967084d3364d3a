"""Texts to directories of token files: several processes, each of which writes the shards of some parts of the input.

A part of the input becomes one shard, whichever process writes it. Its entry of the index, `part-00000.json`, is
written behind the shard's files: what has none is done again by the next start, and gives the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lit_swa.data.corpora import find_corpora
from lit_swa.data.encode import LONG, PIECE, DocumentEncoder
from lit_swa.data.sources import (
    Document,
    Part,
    Selection,
    Stream,
    check_separator,
    cut_files,
    find_files,
    read_part,
    stream_of,
)
from lit_swa.data.token_files import check_tokens, id_dtype, model_vocab_size, tokenizer_hash
from lit_swa.formats.files import atomic_file, directory_lock, read_json, remove_leftovers, sync_directory, write_json
from lit_swa.formats.tokenizer import Tokenizer
from lit_swa.token_files import (
    FORMAT,
    INDEX,
    JOB,
    MIXTURE,
    ShardWriter,
    TokenDirectory,
    docs_name,
)
from lit_swa.utils import ProgressLine, format_seconds, print_line

BATCH_CHARACTERS, BATCH_DOCUMENTS = 2**18, 512  # what is encoded in one call
PEER_BYTES = 2**22  # of the text that the library's own speed is measured on
UNITS, TEXT_BYTES, TOKENS = range(COUNTS := 3)  # what a process counts; units are bytes of the input


class Job(NamedTuple):
    """One directory to write: from which documents, and with which tokenizer."""

    directory: Path
    tokenizer_dir: Path
    selection: Selection
    files: tuple[Path, ...]  # none: the stream is read
    stream: Stream | None

    def cut(self) -> list[Part]:
        return self.stream.cut() if self.stream else cut_files(self.files, self.selection)

    def read(self, part: Part) -> Iterator[Document]:
        return self.stream.read(part, self.selection) if self.stream else read_part(part, self.selection)

    def description(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """What the bytes depend on: the same for a start that goes on."""
        listed = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in self.files]
        return {
            "data": hashlib.sha256(json.dumps([listed, self.stream]).encode()).hexdigest(),
            "tokenizer": tokenizer_hash(tokenizer),
            "key": self.selection.key,
            "separator": self.selection.separator,
            "left_out": list(self.selection.left_out or ()),
        }


class Report(NamedTuple):
    """What a preparation did. seconds: of this start; the counts are those of this start too."""

    directory: Path
    text_bytes: int
    tokens: int
    seconds: float


def make_jobs(
    output_dir: Path,
    tokenizer_dir: Path,
    data: list[Path],
    selection: Selection,
    stream: Stream | None = None,
) -> list[Job]:
    """The directory to write, of files or of a stream. Raises OSError or ValueError."""
    check_separator(selection.separator)
    return [Job(output_dir, tokenizer_dir, selection, () if stream else tuple(find_files(data)), stream)]


def make_preset_jobs(
    output_dir: Path, tokenizer_dir: Path, data: list[Path], preset: str, split: str
) -> tuple[list[Job], dict[str, float]]:
    """The directories to write of a published corpus or mixture and, for the latter, the weights for mixture.json.

    data: a directory with a local copy (of a mixture: with one directory for each corpus), or files; none: the hub.
    Raises OSError or ValueError.
    """
    corpora, jobs = find_corpora(preset), []
    if len(corpora) > 1 and data and not (len(data) == 1 and data[0].is_dir()):
        raise ValueError(
            f"{preset} is a mixture: give one directory, which holds the directories {', '.join(corpora)}."
        )
    for name, (corpus, _) in corpora.items():
        stream = stream_of(corpus, split)
        found = [path / name if name else path for path in data]
        files = [file for path in found for file in sorted(path.glob(stream.pattern)) or [path]]
        selection = Selection(corpus.key, "", corpus.left_out)
        place = output_dir / name if name else output_dir
        jobs += make_jobs(place, tokenizer_dir, files, selection, None if data else stream)
    return jobs, {name: weight for name, (_, weight) in corpora.items() if name}


def prepare_mixture(output_dir: Path, jobs: list[Job], weights: dict[str, float], processes: int) -> list[Report]:
    """Write all directories of a mixture, and mixture.json behind them."""
    reports = [prepare(job, processes) for job in jobs]
    if weights:
        write_json(output_dir / MIXTURE, weights)
    return reports


def prepare(job: Job, processes: int) -> Report:
    """Write a directory of token files, or go on with one. Raises OSError or ValueError.

    One that is there already is compared with its checksums, and left as it is.
    """
    tokenizer = Tokenizer(job.tokenizer_dir)
    if tokenizer.eos_id is None:
        raise ValueError(f"{job.tokenizer_dir} names no eos_token: name the one that ends a document.")
    with directory_lock(job.directory):
        description = job.description(tokenizer)
        if (job.directory / INDEX).is_file():
            require_same_job(job.directory / INDEX, description)
            print_line(f"{job.directory} is there already: comparing it with its checksums.")
            TokenDirectory(job.directory).verify()
            remove_records(job.directory)
            return Report(job.directory, 0, 0, 0.0)
        parts = job.cut()
        remove_leftovers(job.directory)
        begin(job.directory, description)
        started = time.perf_counter()
        counts = write_parts(job, parts, processes, DocumentEncoder(tokenizer))
        seconds = time.perf_counter() - started
        write_index(job, tokenizer, description, len(parts))
        remove_records(job.directory)
        return Report(job.directory, counts[TEXT_BYTES], counts[TOKENS], seconds)


def begin(directory: Path, description: dict[str, Any]) -> None:
    """Go on with a directory in which some part is finished, or begin anew. Raises ValueError for another job's."""
    if (directory / JOB).is_file() and any(directory.glob("part-*.json")):
        require_same_job(directory / JOB, description)
        return
    for path in [*directory.glob("tokens-*.bin"), *directory.glob("tokens-*.docs"), *directory.glob("part-*.json")]:
        path.unlink()
    write_json(directory / JOB, {"job": description})


def require_same_job(path: Path, description: dict[str, Any]) -> None:
    """Raises ValueError where a directory is, or was going to be, made of something else."""
    before = read_json(path).get("job")
    before = before if isinstance(before, dict) else {}
    different = [key for key, value in description.items() if before.get(key) != value]
    if different:
        raise ValueError(
            f"{path.parent} was begun differently ({', '.join(different)}): choose another directory, or delete this "
            "one."
        )


def record_name(number: int) -> str:
    return f"part-{number:05d}.json"


def remove_records(directory: Path) -> None:
    for path in [*directory.glob("part-*.json"), directory / JOB]:
        path.unlink(missing_ok=True)
    sync_directory(directory)


def write_index(job: Job, tokenizer: Tokenizer, description: dict[str, Any], n_parts: int) -> None:
    """Join the parts' records in index.json. A part without a document has no shard."""
    records = [read_json(job.directory / record_name(i)) for i in range(n_parts)]
    shards = [record for record in records if record["tokens"]]
    if not shards:
        remove_records(job.directory)
        raise ValueError(f"{job.files[0] if job.files else job.stream.name} holds no text: give a file with some.")
    vocab_size = model_vocab_size(tokenizer)
    content = {
        "format": FORMAT,
        "dtype": "uint16" if id_dtype(vocab_size).itemsize == 2 else "uint32",
        "vocab_size": vocab_size,
        "eos_id": tokenizer.eos_id,
        "tokenizer": description["tokenizer"],
        "job": description,
        "shards": shards,
    }
    write_json(job.directory / INDEX, content)


# ---------------------------------------------------------------------------------------------------------- one process


def write_part(job: Job, part: Part, number: int, encoder: DocumentEncoder, count: Callable[..., None]) -> None:
    """Write the shard of a part, and its record behind it. count is told the units, bytes and tokens of each batch."""
    vocab_size = model_vocab_size(encoder.tokenizer)
    shard = job.directory / f"tokens-{number:05d}.bin"
    dtype = "uint16" if id_dtype(vocab_size).itemsize == 2 else "uint32"
    with atomic_file(shard) as stream:
        writer = ShardWriter(stream, dtype)
        for batch, units in batches(job.read(part)):
            before = writer.n_text_bytes, writer.n_tokens
            for document, ids in zip(batch, encoder.encode(batch), strict=True):
                if len(ids) and ids.max() >= vocab_size:
                    check_tokens(ids, vocab_size, f"A document of {part.file}")
                writer.add(ids, text_bytes(document))
            count(units, writer.n_text_bytes - before[0], writer.n_tokens - before[1])
    if writer.n_tokens:
        with atomic_file(shard.with_name(docs_name(shard.name))) as stream:
            stream.write(writer.start_bytes())
    else:
        shard.unlink()
    write_json(job.directory / record_name(number), {"file": shard.name, **writer.record()})


def text_bytes(document: str | Path) -> int:
    """The length of a document in UTF-8."""
    if isinstance(document, Path):
        return document.stat().st_size
    return len(document) if document.isascii() else len(document.encode("utf-8", "surrogatepass"))


def batches(documents: Iterator[Document]) -> Iterator[tuple[list[str | Path], int]]:
    """Documents by the batch, with what they took of the input. Those without text are left out."""
    batch: list[str | Path] = []
    units = characters = 0
    for document, size in documents:
        units += size
        if isinstance(document, Path) or document.strip():
            batch.append(document)
            characters += len(document) if isinstance(document, str) else BATCH_CHARACTERS
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch, units
            batch, units, characters = [], 0, 0
    if batch or units:
        yield batch, units


# ------------------------------------------------------------------------------------------------------ all of them


def write_parts(job: Job, parts: list[Part], processes: int, encoder: DocumentEncoder) -> list[int]:
    """Write the shards that are missing. Returns what this start counted."""
    todo = [i for i in range(len(parts)) if not (job.directory / record_name(i)).is_file()]
    before = sum(parts[i].size for i in set(range(len(parts))) - set(todo))
    total = sum(part.size for part in parts)
    progress = Progress(total, before)
    try:
        if min(processes, len(todo)) > 1:
            counts = Workers(job, parts, todo, min(processes, len(todo)), encoder).run(progress)
        else:
            counts = work_alone(job, parts, todo, encoder, progress)
    except KeyboardInterrupt:
        progress.clear()
        done = sum((job.directory / record_name(i)).is_file() for i in range(len(parts)))
        print_line(f"{done} of {len(parts)} parts are done: the same command goes on with the others.")
        raise
    finally:
        remove_leftovers(job.directory)  # of processes that were ended
    progress.clear()
    return counts


class Progress:
    """The progress line of a preparation: MB of the input, MB/s of text, tokens per second, time to go."""

    def __init__(self, total: int, before: int) -> None:
        self.total, self.before, self.started = total, before, time.perf_counter()
        self.line = ProgressLine(total // 10**6 if total else None, "MB", done=before // 10**6, interval=10.0)

    def show(self, counts: list[int]) -> None:
        seconds = max(time.perf_counter() - self.started, 1e-9)
        done = min(self.before + counts[UNITS], self.total) if self.total else counts[TEXT_BYTES]
        text = f"{counts[TEXT_BYTES] / 1e6 / seconds:.1f} MB/s"
        if done < self.total or not self.total:
            self.line.show(done // 10**6, text, tokens=counts[TOKENS])

    def clear(self) -> None:
        self.line.clear()


def work_alone(job: Job, parts: list[Part], todo: list[int], encoder: DocumentEncoder, progress: Progress) -> list[int]:
    """Write the shards in this process."""
    counts = [0] * COUNTS

    def count(*more: int) -> None:
        counts[:] = [a + b for a, b in zip(counts, more, strict=True)]
        progress.show(counts)

    with one_thread():
        for number in todo:
            write_part(job, parts[number], number, encoder, count)
    return counts


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let the library encode on one core: each of the processes has its own. It reads this at every call."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


class Workers:
    """Processes that each take the next part that nobody has taken. One that fails ends all of them."""

    def __init__(self, job: Job, parts: list[Part], todo: list[int], processes: int, encoder: DocumentEncoder) -> None:
        # A fork has all modules and the tokenizer. Libraries survive one on Linux only, and connections nowhere
        forks = sys.platform == "linux" and job.stream is None
        context = multiprocessing.get_context("fork" if forks else "spawn")
        self.errors, self.counts = context.SimpleQueue(), context.Array("q", COUNTS * processes, lock=False)
        # Kept here: what processes share is gone from the system when the one that made it forgets it
        self.shared = (encoder if forks else None, context.Value("q", 0), self.counts, self.errors, os.getpid())
        arguments = [(job, parts, todo, i, *self.shared) for i in range(processes)]
        self.processes = [context.Process(target=run_worker, args=given, daemon=True) for given in arguments]

    def run(self, progress: Progress) -> list[int]:
        """Returns what all of them counted together. Raises what one of them raised."""
        try:
            with one_thread():  # which the processes inherit
                for process in self.processes:
                    process.start()
            while any(process.is_alive() for process in self.processes):
                self.raise_error()
                progress.show(self.total())
                time.sleep(0.05)
            self.raise_error()
            for process in self.processes:
                if process.exitcode:
                    raise OSError(
                        f"A process ended by itself (code {process.exitcode}), perhaps since the memory was full: give "
                        "fewer --processes; the same command goes on where it stopped."
                    )
        finally:
            for process in self.processes:
                if process.is_alive():
                    process.terminate()
            for process in self.processes:
                if process.pid is not None:
                    process.join()
        return self.total()

    def total(self) -> list[int]:
        return [sum(self.counts[i::COUNTS]) for i in range(COUNTS)]

    def raise_error(self) -> None:
        if not self.errors.empty():
            kind, text = self.errors.get()
            raise {"OSError": OSError, "ValueError": ValueError}.get(kind, RuntimeError)(text)


def run_worker(
    job: Job,
    parts: list[Part],
    todo: list[int],
    index: int,
    encoder: DocumentEncoder | None,
    following: Any,
    counts: Any,
    errors: Any,
    parent: int,
) -> None:
    """The life of one process. It ends when its parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def count(*more: int) -> None:
        if os.getppid() != parent:
            os._exit(1)
        for i, value in enumerate(more, start=COUNTS * index):
            counts[i] += value

    try:
        encoder = encoder or DocumentEncoder(Tokenizer(job.tokenizer_dir))
        while True:
            with following.get_lock():
                at, following.value = following.value, following.value + 1
            if at >= len(todo):
                return
            write_part(job, parts[todo[at]], todo[at], encoder, count)
    except (OSError, ValueError) as error:
        errors.put(("OSError" if isinstance(error, OSError) else "ValueError", str(error)))
    except Exception:  # noqa: B902 - a bug of ours, whose traceback is the parent's to show
        errors.put(("RuntimeError", traceback.format_exc()))


# ------------------------------------------------------------------------------------------------- beside the library


def measure_library(job: Job, processes: int) -> tuple[float, int] | None:
    """(MB/s, bytes) of the library's own encode_batch on the beginning of the same text, with as many threads as there
    are processes: without reading, checking and writing. Long texts are cut, which is faster. None: another library.
    """
    import tokenizers

    texts, size = [], 0
    path = job.tokenizer_dir / "tokenizer.json"
    if not path.is_file():
        return None
    for document in (d for part in job.cut() for d, _ in job.read(part) if isinstance(d, str)):
        step = PIECE if len(document) >= LONG else LONG
        texts += [document[i : i + step] for i in range(0, len(document), step)]
        size += text_bytes(document)
        if size >= PEER_BYTES:
            break
    os.environ.setdefault("RAYON_NUM_THREADS", str(processes))  # heeded where no thread has been started yet
    library = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    started = time.perf_counter()
    library.encode_batch(texts)
    return size / 1e6 / (time.perf_counter() - started), size


def describe_speed(report: Report, processes: int, library: tuple[float, int] | None) -> str:
    """One line on how fast the text was prepared, beside the library alone."""
    rate = report.text_bytes / 1e6 / max(report.seconds, 1e-9)
    line = (
        f"{report.text_bytes / 1e6:.1f} MB of text in {format_seconds(report.seconds)}: {rate:.1f} MB/s, "
        f"{report.tokens / max(report.seconds, 1e-9) / 1e6:.2f}M tok/s with {processes} process{'es' * (processes > 1)}"
    )
    if library is None:
        return line
    return f"{line} (encode_batch of tokenizers alone, {library[1] / 1e6:.1f} MB of it: {library[0]:.1f} MB/s)"
