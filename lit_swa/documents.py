"""Questions on long documents, from files as they are published, and the measures of their answers.

A line of a .jsonl file is one of these objects:

    SCROLLS (Shaham et al. 2022, arXiv 2201.03533)      id, input: the question, an empty line, the document; output
    with its examples (An et al. 2024, arXiv 2402.17463) id, input: the document; query, output, query_examples,
                                                        output_examples
    ZeroSCROLLS (Shaham et al. 2023, arXiv 2305.14196)  id, input: the whole prompt; document_start_index,
                                                        document_end_index: where the document stands in it; output
    L-Eval (An et al. 2023, arXiv 2307.11088)           input: the document; instructions, outputs: lists

Lines of one id are one question with several right answers. A prompt is the document, the examples ("Question: ...
Answer: ...", without their documents) and the question; the document alone is cut where it is too long.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_swa.formats.tokenizer import Tokenizer
from lit_swa.tasks import f1 as words_f1
from lit_swa.tasks import plain_words
from lit_swa.texts import read_text

# ------------------------------------------------------------------------------------------------------- the questions

TASK = (
    "Below is a long document, and a question behind it. Answer from the document alone and in few words; where there "
    "are choices, give only the letter of the right one.\n\n"
)
ANSWER = "\nAnswer:"  # the model goes on from here
NEXT = "Question:"  # where a base model begins a question of its own, its answer has ended


class Question(NamedTuple):
    key: str
    document: str
    query: str
    answers: list[str]  # each is right
    before: str = ""
    behind: str | None = None  # None: the examples, if any, and the query
    begins: str = ANSWER
    gap: str = ""  # stands where the document was cut
    shown: list[tuple[str, str]] = []  # examples of its own: queries and answers


def read_questions(path: Path) -> list[Question]:
    """The questions of a file. Raises ValueError for a line that is none, OSError where there is no file."""
    found: dict[str, Question] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        for question in read_line(line, number, f"{path}, line {number}") if line.strip() else []:
            if question.key in found:
                found[question.key].answers.extend(question.answers)
            else:
                found[question.key] = question
    if not found:
        raise ValueError(f"{path} holds no question: give a .jsonl file of SCROLLS, ZeroSCROLLS or L-Eval.")
    return list(found.values())


def read_line(line: str, number: int, where: str) -> list[Question]:
    try:
        made = parse_line(json.loads(line), number)
        texts = [text for q in made for text in (q.document, q.query, q.before, *q.answers, *sum(q.shown, ()))]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        texts = [None]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{where} is no question on a document: it must be an object of SCROLLS (id, input, output), ZeroSCROLLS "
            "(and document_start_index, document_end_index) or L-Eval (input, instructions, outputs)."
        )
    return made


def parse_line(found: dict[str, Any], number: int) -> list[Question]:
    """Raises KeyError, TypeError or ValueError for what is no such object."""
    text = found["input"]
    if "instructions" in found:
        listed = found["instructions"], found["outputs"]
        if not all(isinstance(each, list) for each in listed):
            raise TypeError("no lists")
        pairs = zip(*listed, strict=True)
        return [Question(f"{number}.{i}", text, query, [answer], TASK) for i, (query, answer) in enumerate(pairs)]
    key, answers = str(found["id"]), [found["output"]]
    if "document_start_index" in found:
        start, stop = int(found["document_start_index"]), int(found["document_end_index"])
        gap = found.get("truncation_seperator", "")  # which is how the files spell it
        return [Question(key, text[start:stop], "", answers, text[:start], text[stop:], "", gap)]
    if "query" in found:
        shown = list(zip(found.get("query_examples", ()), found.get("output_examples", ()), strict=True))
        return [Question(key, text, found["query"], answers, shown=shown)]
    query, document = split_query(text)
    return [Question(key, document, query, answers)]


def split_query(text: str) -> tuple[str, str]:
    """The question and the document; choices (A) to (D) belong to the question. Raises ValueError without an empty line
    between them."""
    at = text.index("\n\n")
    if text[at:].lstrip().startswith("(A)"):
        at = text.index("\n\n", text.index("(D)", at))
    return text[:at].strip(), text[at:].strip()


def pick_shots(questions: Sequence[Question], of: Question, n: int) -> list[tuple[str, str]]:
    """The first n questions on other documents, with an answer of each. Raises ValueError where there are fewer."""
    others = [(other.query, other.answers[0]) for other in questions if other.document != of.document]
    if len(others) < n:
        raise ValueError(
            f"There are {len(others)} questions on other documents to show, and {n} are asked for: lower shots, or "
            "give shot_files."
        )
    return others[:n]


class Prompt(NamedTuple):
    ids: list[int]
    cut: int  # tokens of the document that were left out


def make_prompt(
    question: Question,
    shots: Sequence[tuple[str, str]],
    tokenizer: Tokenizer,
    budget: int,
    drop: str = "middle",
    chat: bool = False,
) -> Prompt:
    """The prompt in at most `budget` tokens.

    drop: which part of the document is left out where it is too long: start, middle or end.
    chat: make it a user's turn in the model's chat template; the answer's beginning follows it.
    Raises ValueError where there is no room for anything of the document.
    """
    examples = "".join(f"\n\n{NEXT} {query}{ANSWER} {answer}" for query, answer in shots)
    behind = f"{examples}\n\n{NEXT} {question.query}" if question.behind is None else question.behind

    def encode(document: str) -> list[int]:
        text = question.before + document + behind
        if not chat:
            return tokenizer.encode(text + question.begins)
        turn = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        return turn + (tokenizer.encode(question.begins.strip(), bos=False) if question.begins else [])

    ids = encode(question.document)
    if len(ids) <= budget:
        return Prompt(ids, 0)
    document = tokenizer.encode(question.document, bos=False)
    kept = len(document)
    while len(ids) > budget:  # what is cut is encoded anew, and may then have more tokens than before
        kept = min(kept - 1, kept - (len(ids) - budget))
        if kept < 1:
            raise ValueError(
                f"{budget} tokens have no room for the question {question.key!r} and any of its document: raise "
                "--lengths, or lower --shots."
            )
        ids = encode(question.gap.join(map(tokenizer.decode, parts(document, kept, drop))).strip())
    return Prompt(ids, len(document) - kept)


def parts(ids: list[int], kept: int, drop: str) -> list[list[int]]:
    """What stays of so many ids."""
    if drop == "start":
        return [[], ids[-kept:]]
    if drop == "end":
        return [ids[:kept], []]
    half = (kept + 1) // 2
    return [ids[:half], ids[len(ids) - (kept - half) :]]


# -------------------------------------------------------------------------------------------------------- the measures


def exact_match(said: str, right: str) -> float:
    """SCROLLS's: equal but for case, punctuation and articles."""
    return float(plain_words(said) == plain_words(right))


def f1(said: str, right: str) -> float:
    """SCROLLS's and SQuAD's (arXiv 1606.05250): of words, without case, punctuation and articles; 0 where none is."""
    ours, theirs = plain_words(said), plain_words(right)
    return words_f1(ours, theirs) if ours and theirs else 0.0


def letter(said: str, right: str) -> float:
    """L-Eval's, of questions with one right choice: the first of the letters A to D that the answer holds, or all where
    it holds nothing else."""
    chosen = said if said in "ABCD" else next(iter(re.findall("[A-D]", said)), None)
    return float(chosen == choices_of(right))


def letters(said: str, right: str) -> float:
    """L-Eval's, of questions with one or more right choices (coursera): a quarter for some of the right ones alone."""
    chosen, wanted = chosen_letters(said), choices_of(right)
    return 1.0 if chosen == wanted else 0.25 if chosen and set(chosen) <= set(wanted) else 0.0


def choices_of(right: str) -> str:
    """The letters in the first word of a right answer."""
    return re.sub("[^A-D]", "", right.split()[0]) if right.split() else ""


def chosen_letters(said: str) -> str:
    """The letters that an answer begins with, if there are several; else these and those that stand alone before the
    next question, as in "B. ... D."; else its first run of letters."""
    if said in "ABCD":
        return said
    first = re.match("[A-D]*", said)[0]
    if len(first) > 1:
        return "".join(sorted(set(first)))
    rest = said[len(first) :]
    alone = re.findall(r"[A-Z](?=[\s.)])", rest.split("Question")[0])
    found = {c for c in first + "".join(alone) if c in "ABCD"}
    runs = re.findall("[A-D]+", rest.split("Question")[0])
    return "".join(sorted(found)) or (runs[0] if runs else "")


def number(said: str, right: str) -> float:
    """L-Eval's, of sums (gsm100): the digits of the number behind "The answer is", or of the first paragraph's last."""
    return float(number_of(said) == number_of(right))


def number_of(text: str) -> str:
    found = re.search(r"The answer is (\S+)", text)
    words = [found[1]] if found else [w for w in text.split("\n\n")[0].split(" ") if re.search(r"\d", w)]
    before_point = words[-1].partition(".")[0] if words else ""
    return "".join(re.findall(r"\d", before_point))


def verdicts(said: str, right: str) -> float:
    """L-Eval's, of statements about a story (sci_fi), such as "True [fact: False]": what holds in the story, and what
    holds in fact, count a half each."""
    pairs = zip(verdicts_of(said), verdicts_of(right), strict=True)
    return sum(ours is not None and ours == theirs for ours, theirs in pairs) / 2


def verdicts_of(text: str) -> list[str | None]:
    """The first true or false before "[fact:" and behind it."""
    story, _, fact = text.lower().partition("[fact:")
    found = [re.search("true|false", part) for part in (story, fact)]
    return [match and match[0] for match in found]


CODE_PHRASES = "will be", "of the code", "is", "would be", "the value of", "the result of", "printed"


def code_output(said: str, right: str) -> float:
    """L-Eval's, of what a program prints (codeU): the right output stands, but for blanks and case, among the words
    behind "the final output", or the last ones, three more than it has itself."""
    n, said, wanted = len(right.split()) + 3, plain_code(said), plain_code(right)
    for phrase in CODE_PHRASES:
        said = said.replace(phrase, "")
    _, marker, behind = said.rpartition("the final output")
    words = re.split(r"\s+", behind if marker else said)
    given = " ".join(words[:n] if marker else words[-n:])
    try:
        return float(float(given) == float(wanted))
    except ValueError:
        return float(wanted.lower().replace(" ", "") in given.lower().replace(" ", ""))


def plain_code(text: str) -> str:
    """A printed value without commas, quotation marks, and blanks between brackets; 2.0 as 2."""
    text = re.sub(r"\s+", " ", text)
    for mark in (",", "'", "\\", ".0"):
        text = text.replace(mark, "")
    return text.replace("] [", "][").replace("[ [", "[[").replace("] ]", "]]")


def rouge(said: str, right: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L (Lin 2004) of the package rouge-score, without stemming, as SCROLLS takes them."""
    scores = rouge_scorer().score(right, said)
    return {name: score.fmeasure for name, score in scores.items()}


def rouge_scorer() -> Any:
    """Raises ValueError where the package is missing."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ValueError("ROUGE is measured by a package that is not installed: pip install rouge-score.") from None
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)


class Metric(NamedTuple):
    score: Callable[[str, str], Any]  # of an answer and one that is right; a number, or several by name
    room: int  # tokens of an answer
    fits: Callable[[str], Any] = str.strip  # of a right answer: what is empty holds nothing that is measured


METRICS = {
    "f1": Metric(f1, 64),
    "em": Metric(exact_match, 64),
    "rouge": Metric(rouge, 128),
    "letter": Metric(letter, 16, choices_of),
    "letters": Metric(letters, 32, choices_of),
    "number": Metric(number, 256, number_of),
    "verdicts": Metric(verdicts, 32, lambda right: verdicts_of(right)[0]),
    "code": Metric(code_output, 256),
}


def cut_answer(text: str) -> str:
    """What a model wrote up to a next question of its own: the first piece that says something."""
    return next((piece.strip() for piece in text.split(NEXT) if piece.strip()), "")


def judge(metric: str, text: str, answers: Sequence[str]) -> dict[str, float]:
    """The best score beside any of the right answers, each measure by itself."""
    score = METRICS[metric].score
    each = [score(text, right) for right in answers]
    if not isinstance(each[0], Mapping):
        return {metric: max(each)}
    return {name: max(scores[name] for scores in each) for name in each[0]}


def file_score(scores: Sequence[dict[str, float]]) -> float:
    """Of a file in per cent: the mean over questions; of ROUGE's three, their geometric mean."""
    means = [sum(one[name] for one in scores) / len(scores) for name in scores[0]]
    product = 1.0
    for mean in means:
        product *= mean
    return 100 * product ** (1 / len(means))


def check_measure(file: str, metric: str, questions: Sequence[Question]) -> None:
    """Raises ValueError where a right answer holds nothing that is measured: an answer that says as little would be
    right."""
    for question in questions:
        if not any(METRICS[metric].fits(right) for right in question.answers):
            raise ValueError(
                f"data: {file} has the right answer {question.answers[0][:60]!r}, in which {metric} finds nothing to "
                "measure: give the file another measure."
            )


def read_files(
    files: Mapping[str, str], shots: int, shot_files: Mapping[str, Path] | None, limit: int | None
) -> dict[str, list[tuple[Question, list[tuple[str, str]]]]]:
    """File -> its questions with the examples that are shown to each. files: -> metrics. Raises ValueError, OSError."""
    made = {}
    for file, metric in files.items():
        if metric not in METRICS:
            raise ValueError(f"data: there is no measure {metric!r}, choose from {', '.join(METRICS)}.")
        if metric == "rouge":
            rouge_scorer()
        questions = read_questions(Path(file))
        check_measure(file, metric, questions)
        pool = read_questions(Path(shot_files[file])) if shot_files and file in shot_files else questions
        made[file] = [(q, shown_before(q, pool, shots)) for q in questions[:limit]]
    if unknown := [file for file in shot_files or () if file not in files]:
        raise ValueError(f"shot_files names {unknown[0]}, which is none of the files of data: choose from them.")
    return made


def shown_before(question: Question, pool: Sequence[Question], n: int) -> list[tuple[str, str]]:
    """Its own examples, as many as it has up to n; those of the pool where it has none. Raises ValueError."""
    if n == 0:
        return []
    if question.behind is not None:
        raise ValueError("The prompts of ZeroSCROLLS have no place for examples: set shots to 0.")
    return question.shown[:n] or pick_shots(pool, question, n)
