"""Texts and questions from a user's files, and the ids of long texts. An error says in one sentence what is wrong."""

import codecs
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_swa.utils import show_encoding

if TYPE_CHECKING:
    from lit_swa.formats.tokenizer import Tokenizer


def read_text(path: Path) -> str:
    """A UTF-8 text, without its byte order mark, its lines ended by line feeds alone.

    Raises OSError, or ValueError if it is empty or not UTF-8.
    """
    check_file(path)
    text = decode_text(path.read_bytes(), path)
    if not text.strip():
        raise ValueError(f"{path} holds no text: give a file with some.")
    return text


def check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: give the path of a text file (UTF-8).")


def decode_text(data: bytes, name: object) -> str:
    """The text that these bytes of a file or of a pipe are. Raises ValueError if they are not UTF-8."""
    try:
        text, wrong = data.decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        text, wrong = "", f"byte {error.start}"
    if wrong or "\0" in text:
        other = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or not wrong else "latin1"
        raise ValueError(
            f"{name} is no UTF-8 text ({wrong or 'it holds zeros'}): convert it, as with iconv -f {other} -t utf-8."
        )
    return unify_lines(text)


def unify_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_stdin() -> str:
    """All of standard input, read as a file is, whatever encoding the console has. Raises ValueError."""
    if sys.stdin is None:
        raise ValueError("Standard input is closed: give the text as an argument.")
    if not hasattr(sys.stdin, "buffer"):  # no file but another object
        return sys.stdin.read()
    return decode_text(sys.stdin.buffer.read(), "The standard input")


def read_line() -> str:
    """The next line of standard input, read as a file is. Raises EOFError at its end, or ValueError."""
    if sys.stdin is None:
        raise EOFError
    if not hasattr(sys.stdin, "buffer"):  # no file but another object
        return input()
    if sys.stdin.isatty():  # input() lets people edit their line; a console in ASCII gives other bytes as surrogates
        line = input()
        plain = not any("\ud800" <= c <= "\udfff" for c in line)
        return line if plain else decode_text(line.encode(sys.stdin.encoding, "surrogateescape"), "The line")
    if not (line := sys.stdin.buffer.readline()):
        raise EOFError
    return decode_text(line, "The standard input").removesuffix("\n")


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The questions of a chat file in order, each as a dict with question_id, turn (counted from 1) and question.

    A line of the file is JSON: {"question_id": ..., "turns": ["...", ...]} as in MT-bench (question_id may be missing),
    {"prompt": "..."}, or just "...". Raises OSError, or ValueError with the number of a line that is none of these.
    """
    questions = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        name, turns = _read_line(line, f"{path}, line {number}")
        name = number if name is None else name
        questions += [{"question_id": name, "turn": i, "question": turn} for i, turn in enumerate(turns, start=1)]
    return questions


def _read_line(line: str, where: str) -> tuple[Any, list[str]]:
    """(the question's id or None, its turns)"""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f'{where} is no JSON ({str(error)[:80]}): a line must be an object like {{"turns": ["first", "second"]}}.'
        ) from None
    name = content.get("question_id") if isinstance(content, dict) else None
    turns = content
    if isinstance(content, dict):
        turns = content.get("turns", content.get("prompt"))
    turns = [turns] if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise ValueError(f'{where} asks nothing: it needs "turns", a list of texts, or "prompt", a text.')
    return name, turns


# ------------------------------------------------------------------------------------------- the ids of a long text

BLOCK_BYTES = 2**17  # of a file that are read and encoded at once
NEAR = 1024  # characters on either side of a cut that are looked at


def encode_file(tokenizer: "Tokenizer", path: Path, most: int | None = None, eos: bool = False) -> np.ndarray:
    """The ids that tokenizer.encode(read_text(path), eos=eos) gives, as uint32, and no more than the first `most`.

    It is read and encoded no further than is asked for. Raises OSError or ValueError as read_text does.
    """
    check_file(path)
    return encode_blocks(tokenizer, read_blocks(path), lambda: read_text(path), most, eos)


def encode_text(tokenizer: "Tokenizer", text: str, eos: bool = False) -> np.ndarray:
    """The ids that tokenizer.encode(text, eos=eos) gives, as uint32."""
    blocks = (text[start : start + BLOCK_BYTES] for start in range(0, len(text), BLOCK_BYTES))
    return encode_blocks(tokenizer, blocks, lambda: text, eos=eos)


def encode_blocks(
    tokenizer: "Tokenizer",
    blocks: Iterator[str],
    whole: Callable[[], str],
    most: int | None = None,
    eos: bool = False,
) -> np.ndarray:
    """The ids of the text that the blocks make up and that `whole` gives where it must be encoded in one call.

    It is encoded in pieces, since a tokenizer takes some 150 bytes for each one of the text.
    """
    frame = find_frame(tokenizer, eos)
    if frame is None:
        return as_ids(tokenizer.encode(whole(), eos=eos))[:most]
    before, after = frame
    parts, n = [as_ids(before)], len(before)
    for ids in encode_pieces(tokenizer, blocks):
        if ids is None:  # a cut was none after all
            return as_ids(tokenizer.encode(whole(), eos=eos))[:most]
        parts.append(ids)
        n += len(ids)
        if most is not None and n >= most:
            break
    return np.concatenate([*parts, as_ids(after)])[:most]


def as_ids(ids: list[int]) -> np.ndarray:
    return np.array(ids, dtype=np.uint32)


def find_frame(tokenizer: "Tokenizer", eos: bool = False) -> tuple[list[int], list[int]] | None:
    """The ids that the tokenizer puts in front of any text, and those behind it. None where this cannot be told."""
    plain, whole = tokenizer.encode("a", bos=False), tokenizer.encode("a", eos=eos)
    for at in range(len(whole) - len(plain) + 1):
        if plain and whole[at : at + len(plain)] == plain:
            return whole[:at], whole[at + len(plain) :]
    return None


def read_blocks(path: Path) -> Iterator[str]:
    """A text in pieces, which joined are read_text(path). Raises OSError or ValueError as read_text does."""
    decoder, blank, data = codecs.getincrementaldecoder("utf-8-sig")(), True, b"?"
    total = path.stat().st_size
    try:
        with open(path, "rb") as file:
            while data:
                data = file.read(BLOCK_BYTES)
                while data.endswith(b"\r") and (more := file.read(1)):  # the first half of a line's end
                    data += more
                text = decode_block(decoder, data, path)
                blank = blank and not text.strip()
                yield text
                show_encoding(path.name, file.tell(), total)
    finally:
        show_encoding(path.name, total, total)
    if blank:
        read_text(path)


def decode_block(decoder: codecs.IncrementalDecoder, data: bytes, path: Path) -> str:
    """The text of the file's next bytes; none are the file's end. Raises ValueError where they are no text."""
    try:
        text = decoder.decode(data, final=not data)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        read_text(path)  # it says what is wrong, and where
    return unify_lines(text)


def encode_pieces(tokenizer: "Tokenizer", blocks: Iterator[str]) -> Iterator[np.ndarray | None]:
    """The ids of a text, without what the tokenizer puts around it, piece by piece. The last is None where they are
    not those of the whole text.

    A piece is encoded behind the last few lines before it, whose ids are then taken off: what a tokenizer does at the
    beginning of a text, such as a space in front, happens at the beginning of these lines.
    """
    from_beginning = tokenizer.sums_scores
    text, done, tried = "", 0, 0  # text[:done] is encoded already
    for block in blocks:
        text += block
        if from_beginning and len(text) < 2 * done:
            continue  # what is encoded already is encoded again
        cut = find_cut(tokenizer, text, done)
        if cut is None and len(text) - done >= BLOCK_BYTES // 4 and len(text) >= 2 * tried:
            tried = len(text)
            cut = find_cut_within_word(tokenizer, text, done)
        if cut is None:
            continue  # the next block may hold a place
        start, stop = cut
        start = 0 if from_beginning else start
        yield (ids := encode_behind(tokenizer, text[:done], text[done:stop]))
        if ids is None:
            return
        text, done = text[start:], stop - start
    yield encode_behind(tokenizer, text[:done], text[done:])


def encode_behind(tokenizer: "Tokenizer", context: str, text: str) -> np.ndarray | None:
    """The ids of the text that stands behind this context; None where the context's own ids are others then."""
    first = tokenizer.encode(context, bos=False) if context else []
    ids = tokenizer.encode(context + text, bos=False)
    return as_ids(ids[len(first) :]) if ids[: len(first)] == first else None


BORDERS = (  # places that no token reaches over, the safest first
    re.compile(r"(?<=\n)(?=\S)"),
    re.compile(r"(?<=\S)(?= \S)"),
    re.compile(
        r"(?<=[\u3001\u3002\uff01\uff0c\uff1b\uff1f])(?=\w)"
    ),  # in a text without spaces, behind a comma or stop
)


def find_cut(tokenizer: "Tokenizer", text: str, done: int) -> tuple[int, int] | None:
    """The last place to cut the text at behind `done`, and one before it where the context of what follows can begin:
    (start, stop). None: there is no place at which the ids on the left stay the same whatever follows.
    """
    for border in BORDERS:
        places = [m.start() for m in border.finditer(text, max(done + 1, len(text) - BLOCK_BYTES), len(text) - NEAR)]
        for stop in reversed(places[-4:]):
            starts = [m.start() for m in border.finditer(text, max(0, stop - 4 * NEAR), max(0, stop - NEAR))]
            start = starts[-1] if starts else 0
            if encode_behind(tokenizer, text[start:stop], text[stop : stop + NEAR]) is not None:
                return start, stop
    return None


def find_cut_within_word(tokenizer: "Tokenizer", text: str, done: int) -> tuple[int, int] | None:
    """As find_cut, in a text without a border: all of it is the context of what follows, and the ids on the left of the
    cut stay the same with what stands near on its right."""
    for stop in range(len(text) - NEAR, max(done, len(text) - NEAR - 4), -1):
        if encode_behind(tokenizer, text[:stop], text[stop:]) is not None:
            return 0, stop
    return None
