"""Readers of instruction files: each gives the examples of a file, with their place in it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lit_swa.data.records import FIELDS

Located = tuple[str, dict[str, Any]]  # an example's place in its file, and its fields


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends. Raises ValueError with the number of one that is no UTF-8."""
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise ValueError(
                    f"{path} line {number} is no UTF-8 text: convert the file, as with iconv -f latin1 -t utf-8."
                ) from None


def read_jsonl(path: Path, example: str = '{"instruction": ...}') -> Iterator[Located]:
    """example: what a line is like, for the sentence about one that is no object."""
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = str(getattr(error, "msg", error))[:80]
                raise ValueError(f"{path} line {number} is no JSON ({reason}): mend or remove the line.") from None
            yield located(content, f"{path} line {number}", example)


def read_json_examples(path: Path) -> Iterator[Located]:
    """A list of examples, an object that holds such a list, or JSON Lines in a file called .json."""
    text = "".join(read_lines(path))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and getattr(error, "msg", "") == "Extra data":
            yield from read_jsonl(path)
            return
        if not text.strip():
            return
        reason, line = str(getattr(error, "msg", error))[:80], getattr(error, "lineno", "1")
        raise ValueError(f"{path} line {line} is no JSON ({reason}): mend the file.") from None
    if isinstance(content, dict) and not any(set(fields.required()) <= set(content) for fields in FIELDS):
        lists = {key: value for key, value in content.items() if isinstance(value, list)}
        if len(lists) != 1 and "train" not in lists:
            raise ValueError(f"{path} holds an object with the lists {sorted(lists)}: it must have one, or a 'train'.")
        content = lists["train"] if "train" in lists else next(iter(lists.values()))
    content = [content] if isinstance(content, dict) else content
    if not isinstance(content, list):
        raise ValueError(f"{path} holds a {type(content).__name__}: it must be a list of examples.")
    for number, element in enumerate(content, start=1):
        yield located(element, f"{path} element {number}")


def read_csv(path: Path) -> Iterator[Located]:
    """Rows of a CSV file with a header. A quoted cell may be long and hold line ends."""
    rows = csv_rows(path)
    header = next(rows, (0, []))[1]
    if len(set(header)) < len(header):
        raise ValueError(f"{path} names a column twice in its first line: rename one.")
    for line, cells in rows:
        if len(cells) != len(header):
            raise ValueError(
                f"{path} line {line} has {len(cells)} cells and the header has {len(header)}: mend the row, "
                "and put texts with commas in quotes."
            )
        yield f"{path} line {line}", dict(zip(header, cells, strict=True))


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(the line where a row begins, its cells), without empty rows."""
    reader, line = csv.reader(read_lines(path), strict=True), 1
    while True:
        limit = csv.field_size_limit(2**31 - 1)  # a setting of the whole csv module: put back at once
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path} line {line} is no CSV ({str(error)[:80]}): mend the row.") from None
        finally:
            csv.field_size_limit(limit)
        if cells:
            yield line, cells
        line = reader.line_num + 1


def read_parquet(path: Path) -> Iterator[Located]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path} is a Parquet file: to read it, run pip install pyarrow.") from None
    try:
        number = 0
        for batch in ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", without_none(row)
    except (OSError, ValueError, LookupError, TypeError, NotImplementedError) as error:  # what pyarrow's errors are
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())[:100]}): fetch it again.") from None


def without_none(value: Any, depth: int = 0) -> Any:
    """A row, and in it what messages hold without the keys whose value is None: in a column every struct has the keys
    of all of them, so that a call would have the arguments of all calls."""
    if isinstance(value, dict):
        kept = {key: inner for key, inner in value.items() if inner is not None or depth < 2}
        return {key: without_none(inner, depth + 1) for key, inner in kept.items()}
    return [without_none(inner, depth) for inner in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".json": read_json_examples,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def located(content: Any, where: str, example: str = '{"instruction": ...}') -> Located:
    content = {"text": content} if isinstance(content, str) else content
    if not isinstance(content, dict):
        raise ValueError(f"{where} is a {type(content).__name__}: it must be an object like {example}.")
    return where, content
