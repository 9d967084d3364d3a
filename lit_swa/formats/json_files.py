"""JSON from strangers: whatever is wrong with it ends in a ValueError of one sentence. Nothing here imports torch."""

import json
from pathlib import Path
from typing import Any

from lit_swa.formats.reading import read_bytes

MAX_JSON_BYTES = 4 * 2**20  # parsed, it may take 25 times as much memory
MAX_KEY_CHARS = 500
MAX_RESULT_BYTES = 2**28  # of results that the scripts wrote
UNFIT = (LookupError, TypeError, AttributeError, ArithmeticError, StopIteration)  # what values of another kind end in


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError with one sentence when there is none in it."""
    return parse_json(read_bytes(path, MAX_JSON_BYTES), path)


def parse_json(data: bytes, path: Path, max_digits: int = 20) -> dict[str, Any]:
    """The JSON object in `data`, which comes from `path`. Raises ValueError with one sentence when it is damaged.

    Refused, too, are keys that occur twice (readers disagree about which one counts), numbers of more than `max_digits`
    digits and NaN or Infinity (no field takes them).
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("a key is there twice")
        if any(len(key) > MAX_KEY_CHARS for key in content):
            raise ValueError(f"a key is longer than {MAX_KEY_CHARS} characters")
        return content

    def number(text: str) -> int:
        if len(text) > max_digits:
            raise ValueError(f"a number has {len(text)} digits")
        return int(text)

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no number")

    try:
        text = data.decode("utf-8-sig")  # some editors put a byte order mark in front
        content = json.loads(text, object_pairs_hook=unique, parse_int=number, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged: it does not hold the JSON it should ({str(error)[:100]}); "
            "download or convert it again."
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object; download or convert it again.")
    return content
