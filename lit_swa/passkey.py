"""Pass key retrieval: a number is hidden in a long text about nothing, and the model is asked for it.

The texts are those of landmark attention (Mohtashami and Jaggi 2023, arXiv 2305.16300), which later papers use too:

    There is an important info hidden inside ...      the task
    The grass is green. The sky is blue. ...          filler, or a text of the user's (the haystack)
    The pass key is 4711. Remember it. ...            the needle, at some depth
    The grass is green. The sky is blue. ...          filler
    What is the pass key? The pass key is             the question, which the model goes on from

A trial's random choices follow from the seed and the trial's length, depth and number, so the order of trials is free.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lit_swa.formats.tokenizer import Tokenizer
from lit_swa.memory import require_memory

if TYPE_CHECKING:
    from lit_swa.generate import Session

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key?"
ANSWER_BEGINS = " The pass key is"  # for a model that completes text; asked in a chat template, it begins by itself
LARGEST_KEY = 49_999
TOKEN_BYTES = 200  # that the tokenizer takes for a token of a text, at least


@dataclass(frozen=True)
class Trial:
    """One question."""

    length: int  # tokens of the prompt and of the room for the answer
    depth: float | None  # the share of the filler that comes before the needle; None: drawn anew in every trial
    number: int  # counts the trials of one length and depth, from 0

    @property
    def key(self) -> str:
        """A name for the trial, such as "1024/0.5000/3"."""
        return f"{self.length}/{'random' if self.depth is None else f'{self.depth:.4f}'}/{self.number}"


def plan_trials(lengths: Sequence[int], depths: Sequence[float | None], trials: int) -> list[Trial]:
    """All trials, the shortest first."""
    return [Trial(length, depth, i) for length in lengths for depth in depths for i in range(trials)]


def spread_depths(n: int) -> list[float]:
    """n depths in equal steps from 0, the beginning, to 1, the end; the middle if n is 1."""
    return [0.5] if n == 1 else [i / (n - 1) for i in range(n)]


def build_prompt(
    trial: Trial, tokenizer: Tokenizer, seed: int, room: int, haystack: Sequence[str] = (), chat: bool = False
) -> tuple[list[int], int, float]:
    """(ids of the prompt, the pass key, the depth). The prompt is as long as the trial's length minus `room` allows.

    room: tokens that are left for the answer.
    haystack: the words (split_words) of a text to use instead of the filler; each trial starts at another of them.
    chat: make the prompt a user's turn in the model's chat template.
    Raises ValueError when the length has no room for the needle and the question, the haystack is too short, or the
    memory too small.
    """
    remedy = "use smaller --lengths"
    require_memory(TOKEN_BYTES * trial.length, torch.device("cpu"), f"A prompt of {trial.length:,} tokens", remedy)
    chance = random.Random(f"{seed}/{trial.key}")
    passkey = chance.randint(1, LARGEST_KEY)
    depth = chance.random() if trial.depth is None else trial.depth
    words = list(haystack) or split_words(FILLER)
    most = len(haystack) or trial.length  # a text has at least as many tokens as words
    start = chance.randrange(len(words)) if haystack else 0

    def encode(n: int) -> list[int]:
        """The prompt with n words of filler."""
        before = round(depth * n)
        parts = (
            take_words(words, start, before),
            NEEDLE.format(key=passkey),
            take_words(words, start + before, n - before),
        )
        text = "\n".join([TASK, *(part for part in parts if part), QUESTION])
        if chat:
            return tokenizer.apply_chat_template([{"role": "user", "content": text}])
        return tokenizer.encode(text + ANSWER_BEGINS)

    budget = trial.length - room
    n = largest_fitting(lambda n: len(encode(n)), budget, most)
    if n < 0:
        raise ValueError(
            f"A length of {trial.length} tokens is too short: the task, the pass key and the question take "
            f"{len(encode(0))} and the answer {room}."
        )
    if haystack and n == most:
        raise ValueError(
            f"The haystack has {most} words, too few for a length of {trial.length} tokens: give a longer text or "
            "shorter lengths."
        )
    return encode(n), passkey, depth


def split_words(text: str) -> list[str]:
    """The words, each with the white space after it. A run of over 16 characters without any, as in Chinese, is cut."""
    return re.findall(r"\S{1,16}\s*", text)


def take_words(words: Sequence[str], start: int, n: int) -> str:
    """n words from words[start] on; after the last comes the first again."""
    return "".join(words[(start + i) % len(words)] for i in range(n)).strip()


def largest_fitting(size: Callable[[int], int], budget: int, most: int) -> int:
    """The n in 0 .. most with size(n) <= budget < size(n + 1); -1 if size(0) is too much, most if nothing is.

    size is expensive and roughly a straight line, so the next n to try is where the line through size(0) and the last
    size reaches the budget. What is known to fit and what is known to be too much close in on the answer.
    """
    at_zero = size(0)
    if at_zero > budget:
        return -1
    fits, too_many, n, per_step = 0, most + 1, min(most, budget), 1.0
    while too_many - fits > 1:
        n = min(max(n, fits + 1), too_many - 1)
        now = size(n)
        fits, too_many = (n, too_many) if now <= budget else (fits, n)
        per_step = max((now - at_zero) / n, 1e-3)
        n += round((budget - now) / per_step)
    return fits


def ask(
    session: "Session",
    tokenizer: Tokenizer,
    ids: Sequence[int],
    room: int,
    should_stop: Callable[[], bool] | None = None,
) -> str:
    """What the model writes greedily behind a prompt, in up to `room` tokens, until its first number has ended."""
    from lit_swa.generate import generate

    answer, new = "", []
    session.reset()  # each trial is read from its beginning, so that none depends on the one before
    tokens = generate(session.model, ids, room, stop_tokens=tokenizer.eos_ids, session=session, should_stop=should_stop)
    for token in tokens:
        new.append(token)
        answer = tokenizer.decode(new)
        if is_answered(answer):
            break
    return answer


def find_answer(text: str) -> int | None:
    """The first number in what a model wrote, None if there is none."""
    found = re.search(r"\d+", text)
    return int(found.group()) if found else None


def is_answered(text: str) -> bool:
    """True if the first number has ended, so that nothing the model adds can change the answer."""
    return re.search(r"\d+\D", text) is not None


def accuracy_rows(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """{"length", "depth", "trials", "accuracy"} for each pair of length and depth.

    parts: the trials, dicts with "length", "cell" (the depth that was asked for, None for a random one) and "right".
    """
    cells: dict[tuple, list[bool]] = {}
    for part in parts:
        cells.setdefault((part["length"], part["cell"]), []).append(part["right"])
    return [
        {"length": length, "depth": depth, "trials": len(right), "accuracy": sum(right) / len(right)}
        for (length, depth), right in cells.items()
    ]
