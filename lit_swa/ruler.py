"""RULER's tasks (Hsieh et al. 2024, arXiv 2404.06654), made here: nothing is fetched.

    niah_*   needles, "One of the special magic numbers for KEY is: VALUE.", in a haystack, and a question about some
    vt       variables: "VAR AAAAA = 12345", "VAR BBBBB = VAR AAAAA", ... in filler: which have this value?
    cwe      a numbered list of words, of which ten are there more often: which ones?
    fwe      coded words whose frequencies follow a zeta distribution: which three are the most frequent?
    qa       documents, one of which answers the question, of a file

The prompts are the paper's. Its essays are sentences of given books here, and its words are words of theirs. vt and cwe
show a solved example first, as the paper does; that of vt has EXAMPLE_LINES lines of filler. A sample follows from the
seed, its task, its length and its number. A length counts the tokens of the prompt and of the room for its answer.
"""

import json
import math
import random
import re
import string
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lit_swa.formats.tokenizer import Tokenizer
from lit_swa.passkey import FILLER, largest_fitting
from lit_swa.texts import read_text

# ------------------------------------------------------------------------------------------------------------- material


class Material(NamedTuple):
    """What the samples are made of."""

    sentences: list[str]  # of the books, in their order
    words: list[str]  # of the books, each once
    questions: list[dict[str, Any]] = []  # of qa: question, answers, documents


def read_material(books: Sequence[Path], qa: Path | None = None) -> Material:
    """Raises ValueError for books that are too short, or a line of `qa` that is no question with a context."""
    text = " ".join(" ".join(read_text(book).split()) for book in books)
    sentences = [found.strip() for found in re.findall(r".+?[.!?][\"'\u201d\u2019]?(?=\s|$)", text)]
    words = sorted(set(re.findall(r"\b[a-z]{4,10}\b", text)))
    if len(words) < 100 or len(sentences) < 10:
        raise ValueError(
            f"The books have {len(words)} different words and {len(sentences)} sentences, and 100 and 10 are the "
            "least: give longer texts with --data."
        )
    return Material(sentences, words, read_qa(qa) if qa else [])


def read_qa(path: Path) -> list[dict[str, Any]]:
    questions = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            questions.append(read_qa_line(line, f"{path}, line {number}"))
    return questions


def read_qa_line(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
        listed = {name: as_list(found[name]) for name in ("answer", "context")}
        texts = [found["question"], *listed["answer"], *listed["context"]]
    except (ValueError, RecursionError, KeyError, TypeError):
        texts = [None]
    if not all(isinstance(text, str) for text in texts) or not all(listed.values()):
        raise ValueError(
            f'{where} is no question with documents: it must be {{"question": ..., "answer": ..., "context": ...}}, '
            "the last two texts or lists of texts."
        )
    return {"question": found["question"], "answers": listed["answer"], "documents": listed["context"]}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


# --------------------------------------------------------------------------------------------------------------- makers


class Made(NamedTuple):
    """A sample whose length is open: `prompt(n)` holds n units of what the answer hides in."""

    prompt: Callable[[int], str]
    answer_begins: str  # the model goes on from here
    answers: list[str]
    most: int  # units
    least: int = 0


Maker = Callable[[random.Random, Material, int], Made]  # random numbers, material, most units that are of use

NEEDLE = "One of the special magic {kind}s for {key} is: {value}."


def draw(kind: str, chance: random.Random, words: Sequence[str], taken: set[str]) -> str:
    """A number, a uuid or two words that are not taken; they are from now on."""
    while True:
        if kind == "number":
            found = str(chance.randint(10**6, 10**7 - 1))
        elif kind == "uuid":
            found = str(uuid.UUID(int=chance.getrandbits(128), version=4))
        else:
            found = "-".join(chance.sample(words, 2))
        if found not in taken:
            taken.add(found)
            return found


def needles(
    chance: random.Random,
    material: Material,
    limit: int,
    *,
    haystack: str = "books",
    kind: str = "number",
    key_kind: str = "words",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
) -> Made:
    """haystack: filler, books or needles. keys: of needles, each with so many values. queries: keys that are asked."""
    taken: set[str] = set()
    key_of, value_of = (partial(draw, each, chance, material.words, taken) for each in (key_kind, kind))
    pairs = [(key_of(), [value_of() for _ in range(values)]) for _ in range(keys)]
    hidden = [NEEDLE.format(kind=kind, key=key, value=value) for key, own in pairs for value in own]
    chance.shuffle(hidden)
    depths, asked = sorted(chance.random() for _ in hidden), chance.sample(pairs, queries)
    if haystack == "filler":
        units, start = [FILLER.strip()] * limit, 0
    elif haystack == "books":
        units, start = material.sentences, chance.randrange(len(material.sentences))
    else:  # one of them has more than 8 tokens
        units, start = [NEEDLE.format(kind=kind, key=key_of(), value=value_of()) for _ in range(limit // 8)], 0
    answers, between = [value for _, own in asked for value in own], " " if haystack == "books" else "\n"
    before, behind, begins = needle_texts(kind, [key for key, _ in asked], len(answers) > 1)
    return Made(
        lambda n: f"{before}\n{between.join(insert(take(units, start, n), hidden, depths))}\n{behind}",
        begins, answers, most=len(units),
    )  # fmt: skip


def needle_texts(kind: str, keys: list[str], several: bool) -> tuple[str, str, str]:
    """(the task, the question, how its answer begins)"""
    query = ", ".join(keys[:-1]) + f", and {keys[-1]}" if len(keys) > 1 else keys[0]
    some, hidden, are_all, are = ("Some", "are", "are all", "are") if several else ("A", "is", "is", "is")
    name = f"{kind}s" if several else kind
    return (
        f"{some} special magic {name} {hidden} hidden within the following text. Make sure to memorize it. I will quiz "
        f"you about the {name} afterwards.",
        f"What {are_all} the special magic {name} for {query} mentioned in the provided text?",
        f" The special magic {name} for {query} mentioned in the provided text {are}",
    )


def take(units: Sequence[str], start: int, n: int) -> list[str]:
    """n units from units[start] on; behind the last comes the first."""
    return [units[(start + i) % len(units)] for i in range(n)]


def insert(units: list[str], hidden: Sequence[str], depths: Sequence[float]) -> list[str]:
    """The hidden texts among the units, in their order, each behind its share of them."""
    cuts = [0, *(int(depth * (len(units) + 1)) for depth in depths), len(units)]
    parts: list[str] = []
    for i, text in enumerate(hidden):
        parts += [*units[cuts[i] : cuts[i + 1]], text]
    return parts + units[cuts[-2] :]


HOPS = 4  # of a chain of variables
EXAMPLE_LINES = 5
VT_TASK = "Memorize and track the chain(s) of variable assignment hidden in the following text."


def variables(chance: random.Random, material: Material, limit: int) -> Made:
    prompt, begins, answers = chain(chance, letters=5)
    shown, shown_begins, shown_answers = chain(chance, letters=3)
    example = f"{shown(EXAMPLE_LINES)}{shown_begins} {' '.join(shown_answers)}\n\n\n"
    return Made(lambda n: example + prompt(n), begins, answers, limit, least=1)


def chain(chance: random.Random, letters: int) -> tuple[Callable[[int], str], str, list[str]]:
    """(the prompt with n lines of filler, how its answer begins, the names that have the value)"""
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(chance.choices(string.ascii_uppercase, k=letters))
        names += [name] if name not in names else []
    value = chance.randint(10000, 99999)
    hidden = [f"VAR {names[0]} = {value}"] + [f"VAR {names[i + 1]} = VAR {names[i]}" for i in range(HOPS)]
    depths = sorted(chance.random() for _ in hidden)
    question = f"Question: Find all variables that are assigned the value {value} in the text above."
    begins = (
        f" Answer: According to the chain(s) of variable assignment in the text above, {len(names)} variables are "
        f"assigned the value {value}, they are:"
    )
    lines = lambda n: "\n".join(insert([FILLER.strip()] * n, hidden, depths))  # noqa: E731
    return lambda n: f"{VT_TASK}\n\n{lines(n)}\n{question}", begins, names


COMMON = 10  # words that are there more often
CWE_BEGINS = " Answer: The top 10 words that appear most often in the list are:"


def common_words(chance: random.Random, material: Material, limit: int) -> Made:
    """Below 4096 tokens a common word is there 6 times and another once, else 30 and 3 times, as in RULER's code."""
    short = limit < 4096
    often, seldom, own = (6, 1, (3, 1, 10)) if short else (30, 3, (10, 3, 30))
    drawn, seed = chance.sample(material.words, len(material.words)), chance.random()
    shown, others = drawn[: COMMON + own[2]], drawn[COMMON + own[2] :]
    example = word_list(shown, *own[:2], seed) + CWE_BEGINS + " " + numbered(shown[:COMMON]) + "\n"
    return Made(
        lambda n: example + word_list(others[: COMMON + n], often, seldom, seed),
        CWE_BEGINS, others[:COMMON], most=len(others) - COMMON, least=COMMON,
    )  # fmt: skip


def word_list(words: list[str], often: int, seldom: int, seed: float) -> str:
    words = words[:COMMON] * often + words[COMMON:] * seldom
    random.Random(seed).shuffle(words)
    return (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{numbered(words)}\nQuestion: What are the 10 most common words in the above list?"
    )


def numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


ZETA_2 = math.pi**2 / 6  # the exponent is 2, as in the paper


def frequent_words(chance: random.Random, material: Material, limit: int) -> Made:
    """The most frequent "word" is dots, which are noise; units are words, each as often as it is there."""
    words: list[str] = ["...."]
    while len(words) < max(50, limit // 50):
        word = "".join(chance.choices(string.ascii_lowercase, k=6))
        words += [word] if word not in words else []
    seed = chance.random()

    def prompt(n: int) -> str:
        coded = [word for k, word in enumerate(words, start=1) for _ in range(round(n / (k * k * ZETA_2)))]
        random.Random(seed).shuffle(coded)
        return (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words. {' '.join(coded)}\nQuestion: Do not provide any explanation. Please ignore the "
            "dots '....'. What are the three most frequently appeared words in the above coded text?"
        )

    begins = " Answer: According to the coded text above, the three most frequently appeared words are:"
    return Made(prompt, begins, words[1:4], limit, least=100)  # so many that the fourth is there less often


def documents(chance: random.Random, material: Material, limit: int) -> Made:
    """Units are documents of other questions."""
    asked = chance.choice(material.questions)
    own = asked["documents"]
    others = sorted({text for one in material.questions for text in one["documents"]} - set(own))
    chance.shuffle(others)
    seed, task = chance.random(), (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )  # fmt: skip

    def prompt(n: int) -> str:
        texts = own + others[:n]
        random.Random(seed).shuffle(texts)
        listed = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(texts, start=1))
        given = "The following are given documents."
        return f"{task}\n\n{given}\n\n{listed}\n\n{task}\n\nQuestion: {asked['question']}"

    return Made(prompt, " Answer:", asked["answers"], len(others))


# ---------------------------------------------------------------------------------------------------------------- tasks


def match_all(text: str, answers: Sequence[str]) -> float:
    """The share of the answers that the text holds, in upper or lower case."""
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def match_part(text: str, answers: Sequence[str]) -> float:
    """1 if the text holds one of the answers."""
    return float(any(answer.lower() in text.lower() for answer in answers))


class Task(NamedTuple):
    make: Maker
    room: int  # tokens of the answer
    score: Callable[[str, Sequence[str]], float] = match_all


TASKS = {
    "niah_single_1": Task(partial(needles, haystack="filler"), 128),
    "niah_single_2": Task(needles, 128),
    "niah_single_3": Task(partial(needles, kind="uuid"), 128),
    "niah_multikey_1": Task(partial(needles, keys=4), 128),
    "niah_multikey_2": Task(partial(needles, haystack="needles"), 128),
    "niah_multikey_3": Task(partial(needles, haystack="needles", kind="uuid", key_kind="uuid"), 128),
    "niah_multivalue": Task(partial(needles, values=4), 128),
    "niah_multiquery": Task(partial(needles, keys=4, queries=4), 128),
    "vt": Task(variables, 30),
    "cwe": Task(common_words, 120),
    "fwe": Task(frequent_words, 50),
    "qa": Task(documents, 32, match_part),
}


class Sample(NamedTuple):
    ids: list[int]  # of the prompt
    answers: list[str]


def make_sample(
    name: str, length: int, number: int, tokenizer: Tokenizer, material: Material, seed: int, chat: bool = False
) -> Sample:
    """The sample of this number, from 0, as long as `length` and the room for its answer allow.

    chat: make the prompt a user's turn in the model's chat template; the answer's beginning follows it.
    Raises ValueError where the length has no room for the task, or the books are too short for it.
    """
    task = TASKS[name]
    budget = length - task.room
    made = task.make(random.Random(f"{seed}/{name}/{length}/{number}"), material, max(1, length))

    def encode(n: int) -> list[int]:
        if not chat:
            return tokenizer.encode(made.prompt(n) + made.answer_begins)
        turn = tokenizer.apply_chat_template([{"role": "user", "content": made.prompt(n)}])
        return turn + tokenizer.encode(made.answer_begins.strip(), bos=False)

    n = largest_fitting(lambda n: len(encode(n)), budget, made.most)
    if n < made.least:
        raise ValueError(
            f"A length of {length} tokens is too short for {name}: it takes {len(encode(made.least)) + task.room} at "
            "least."
        )
    if n == made.most and name != "qa":
        raise ValueError(f"The books are too short for {name} at {length} tokens: give longer texts with --data.")
    return Sample(encode(n), made.answers)
