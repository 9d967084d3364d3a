"""Texts and questions from a user's files. An error says in one sentence what is wrong with a file."""

import json
from pathlib import Path
from typing import Any


def read_text(path: Path) -> str:
    """A UTF-8 text, without its byte order mark. Raises OSError, or ValueError if it is empty or not UTF-8."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: give the path of a text file (UTF-8).")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no UTF-8 text (byte {error.start}): convert it, as with iconv -f latin1 -t utf-8."
        ) from None
    if not text.strip():
        raise ValueError(f"{path} holds no text: give a file with some.")
    return text


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
