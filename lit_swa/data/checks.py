"""Looking at a dataset before it is trained on: samples with the trained tokens marked, and checks."""

from __future__ import annotations

import itertools
import re
import sys

import numpy as np

from lit_swa.config import IGNORED
from lit_swa.data.dataset import Dataset
from lit_swa.formats.tokenizer import StreamDecoder, Tokenizer

MARKS = {True: ("\033[7m", "\033[27m"), False: ("[[", "]]")}
SHOWN_CHARS = 240  # at each end of a stretch of text
SHOWN_TOKENS = 1024  # at each end, of which these characters are taken


def show_examples(dataset: Dataset, tokenizer: Tokenizer, n: int = 3, terminal: bool | None = None) -> str:
    """n examples as text, long stretches shortened. What is trained is in reverse on a terminal, else in [[ ]].

    terminal: by default whether stderr is one.
    """
    before, after = MARKS[sys.stderr.isatty() if terminal is None else terminal]
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(n, len(dataset))).astype(int)).tolist()
    shown = []
    for i in chosen:
        ids, labels = dataset[i]
        text, trained = "", labels != IGNORED
        borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
        decoder = StreamDecoder(tokenizer, skip_special_tokens=False)
        for a, b in itertools.pairwise(borders):
            stretch = shorten_stretch(decoder, ids[a:b].tolist(), at_end=b == len(ids))
            text += before + stretch + after if trained[a] else stretch
        count = f"{len(ids)} tokens, {int(trained.sum())} trained"
        shown.append(f"--- example {i + 1} of {len(dataset)}: {count}\n{text}")
    return "\n".join(shown)


def shorten_stretch(decoder: StreamDecoder, ids: list[int], at_end: bool) -> str:
    """The text of some tokens, shortened in the middle. Control characters, which could change a terminal, are spelled
    out. at_end: no token follows."""
    cut = len(ids) > 2 * SHOWN_TOKENS  # decoding all of a book takes seconds
    first, last = (ids[:SHOWN_TOKENS], ids[-SHOWN_TOKENS:]) if cut else (ids, [])
    text = "".join(map(decoder.push, first + last)) + (decoder.flush() if at_end else "")
    if cut or len(text) > 2 * SHOWN_CHARS + 40:
        between = f"{len(ids)} tokens" if cut else f"{len(text) - 2 * SHOWN_CHARS} characters"
        text = f"{text[:SHOWN_CHARS]} ... {between} ... {text[-SHOWN_CHARS:]}"
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)


def check_dataset(dataset: Dataset, tokenizer: Tokenizer) -> None:
    """Raises ValueError when an example trains nothing, or when no answer trains the token that ends it."""
    if not len(dataset) or int(dataset.trained.min()) < 1:
        raise ValueError("The dataset has examples of which no token is trained: load it again, it must drop them.")
    if dataset.info["kind"] != "instruction":
        return
    ends = np.array(dataset.info["end_ids"] or tokenizer.eos_ids, dtype=np.int32)
    for i in range(len(dataset)):
        if np.isin(dataset[i].labels, ends).any():
            return
    names = ", ".join(repr(tokenizer.id_to_token(int(i))) for i in ends) or "EOS, which the tokenizer lacks"
    raise ValueError(
        f"In none of the {len(dataset)} examples is the end of an answer trained ({names}), so the model would never "
        f"stop: {dataset.info['truncated']} are cut at {dataset.info['max_seq_length']} tokens, raise max_seq_length; "
        "or the chat template writes none, choose another prompt_style."
    )


def unheard_end(dataset: Dataset, tokenizer: Tokenizer, n: int = 100) -> str:
    """A sentence if none of the first n examples trains a token that generation stops at, else ""."""
    if dataset.info["kind"] != "instruction" or not tokenizer.eos_ids:
        return ""
    trained = np.unique(np.concatenate([dataset[i].labels for i in range(min(n, len(dataset)))]))
    ends = [i for i in dataset.info["end_ids"] if i in trained]
    if not ends or np.isin(trained, tokenizer.eos_ids).any():
        return ""
    others = ", ".join(repr(tokenizer.id_to_token(i)) for i in tokenizer.eos_ids)
    return (
        f"note: answers end with {tokenizer.id_to_token(ends[0])!r}, and generation stops at {others} only: add "
        f"{ends[0]} to eos_token_id in the model's generation_config.json."
    )
