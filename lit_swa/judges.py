"""How far a model that was changed is from the one it was made of: likelihood, its own greedy text, and recall.

Perplexity alone hides what generation shows (arXiv 2603.26556), so each judge is a figure of its own:

    divergence       perplexity, KL to the teacher and how often the likeliest token is the same, on held-out text
    follow           the model's own greedy text beside the teacher's; and what it says next along the teacher's
    pass keys        a number hidden far before the question (lit_swa/passkey.py)
    tasks            questions made of held-out text that have one right answer, asked twice: is it the likeliest of
                     four (ranked), and is it what the model writes (written)

Tasks: cloze, the last word of a sentence, which has occurred before, but not lately; copy, how a passage goes on that
is read a second time; continuation, the true next passage among others of the same books.

Shapes: B texts, T tokens, P prompt tokens, n new tokens, C n_embd.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_swa.batches import Batch, Request
from lit_swa.evaluate import Windows, spread_windows, window_nll
from lit_swa.formats.tokenizer import Tokenizer
from lit_swa.model import GPT
from lit_swa.passkey import Trial, build_prompt, find_answer
from lit_swa.texts import encode_behind

CALL_TOKENS = {"cpu": 2048, "cuda": 16384}  # of texts that are read in one call, padding included
LOGIT_ROWS = 128  # positions whose logits exist at once

# ----------------------------------------------------------------------------------------------------------- likelihood


@torch.no_grad()
def hidden_states(model: GPT, idx: Tensor, show: Callable[[int], None] | None = None) -> list[Tensor]:
    """The model's hidden states (1, T, C) of each window of idx (B, T). show: told how many windows are read."""
    states = []
    for window in idx:
        states.append(model.hidden_states(window[None]))
        if show is not None:
            show(len(states))
    return states


@torch.no_grad()
def divergence(
    teacher: GPT, states: Sequence[Tensor], model: GPT, idx: Tensor, first: int, show: Callable | None = None
) -> dict[str, float]:
    """Means over the targets of all windows, the tokens at positions `first` and later.

    states: the teacher's hidden states of each window of idx (B, T). Returns ppl (the model's perplexity), kl (KL of
    the teacher to the model), top_token (how often their likeliest tokens are the same) and tokens (the targets).
    """
    sums, counted = torch.zeros(3, dtype=torch.float64), 0
    for n, (window, state) in enumerate(zip(idx, states, strict=True), start=1):
        hidden = state if model is teacher else model.hidden_states(window[None])
        for start in range(first - 1, idx.size(1) - 1, LOGIT_ROWS):
            stop = min(start + LOGIT_ROWS, idx.size(1) - 1)
            theirs, ours = (log_probabilities(m, h[0, start:stop]) for m, h in ((teacher, state), (model, hidden)))
            sums += differences(theirs, ours, window[start + 1 : stop + 1]).cpu()
            counted += stop - start
        if show is not None:
            show(n)
    nll, kl, same = (sums / counted).tolist()
    return {"ppl": math.exp(nll), "kl": kl, "top_token": same, "tokens": counted}


def log_probabilities(model: GPT, hidden: Tensor) -> Tensor:
    """(T, vocabulary) of hidden states (T, C), in float32; the padding of the vocabulary holds no tokens."""
    return model.project(hidden)[:, : model.config.vocab_size].float().log_softmax(dim=-1)


def differences(theirs: Tensor, ours: Tensor, targets: Tensor) -> Tensor:
    """Sums over positions, float64 (3,): -log p(target) of ours, KL(theirs || ours), and how often their first tokens
    agree."""
    nll = -ours.gather(1, targets[:, None]).sum(dtype=torch.float64)
    kl = (theirs.exp() * (theirs - ours)).sum(dtype=torch.float64)
    return torch.stack([nll, kl, (theirs.argmax(dim=-1) == ours.argmax(dim=-1)).sum(dtype=torch.float64)])


# ---------------------------------------------------------------------------------------------------------- greedy text


def greedy(model: GPT, prompts: Sequence[Sequence[int]], n: int, ends: Sequence[int] = ()) -> list[list[int]]:
    """The n likeliest tokens, one by one, behind each prompt. ends: tokens before which a text ends."""
    answers = dict(Batch(model, [Request(ids, n) for ids in prompts], stop_tokens=ends).run())
    return [answers[i].tokens for i in range(len(prompts))]


def agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> dict[str, float]:
    """Of texts of one length: `same`, the share of tokens that are the same at the same position, and `beginning`, the
    mean number of first tokens that are."""
    equal = np.array(ours) == np.array(theirs)  # (B, n)
    return {"same": float(equal.mean()), "beginning": float(equal.cumprod(axis=1).sum(axis=1).mean())}


@torch.inference_mode()
def forced_agreement(model: GPT, prompts: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """How often the model's likeliest next token is the teacher's, read along what the teacher wrote."""
    right, total, device = 0, sum(map(len, theirs)), model.transformer.wte.weight.device
    texts = [(list(prompt), list(text)) for prompt, text in zip(prompts, theirs, strict=True)]
    for group in groups(texts, CALL_TOKENS.get(device.type, CALL_TOKENS["cpu"])):
        for hidden, (prompt, text) in zip(model.hidden_states(padded(group, device)), group, strict=True):
            read = hidden[len(prompt) - 1 : len(prompt) - 1 + len(text)]
            said = torch.cat([log_probabilities(model, part).argmax(-1) for part in read.split(LOGIT_ROWS)])
            right += int((said == torch.tensor(text, device=device)).sum())
    return right / total


# ---------------------------------------------------------------------------------------------------------------- tasks


class Item(NamedTuple):
    """A question."""

    prompt: list[int]
    choices: list[list[int]]  # answers; the first one is right


class Task(NamedTuple):
    """Questions of one kind. right: whether the tokens that a model writes behind an item's prompt answer it."""

    name: str
    items: list[Item]
    new_tokens: int
    right: Callable[[list[int], Item], bool]


def ranked(model: GPT, items: Sequence[Item]) -> float:
    """How often the right answer is likelier than every other: by the sum of its tokens' log p behind the prompt."""
    texts = [(item.prompt, choice) for item in items for choice in item.choices]
    scores = iter(-nll for nll in answer_nll(model, texts))
    right = 0
    for item in items:
        own, *others = [next(scores) for _ in item.choices]
        right += own > max(others)
    return right / len(items)


def answer_nll(model: GPT, texts: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """-log p of each answer behind its prompt, summed over the answer's tokens."""
    device, sums = model.transformer.wte.weight.device, []
    for group in groups(texts, CALL_TOKENS.get(device.type, CALL_TOKENS["cpu"])):
        first = min(len(prompt) for prompt, _ in group)
        nll = window_nll(model, padded(group, device), first)
        for row, (prompt, answer) in zip(nll, group, strict=True):
            begin = len(prompt) - first
            sums.append(row[begin : begin + len(answer)].double().sum().item())
    return sums


def groups(texts: Sequence[tuple[list[int], list[int]]], most: int) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Runs of texts that padded to their longest have at most so many tokens, or one text."""
    group: list[tuple[list[int], list[int]]] = []
    longest = 0
    for text in texts:
        longest = max(longest, sum(map(len, text)))
        if group and (len(group) + 1) * longest > most:
            yield group
            group, longest = [], sum(map(len, text))
        group.append(text)
    if group:
        yield group


def padded(texts: Sequence[tuple[list[int], list[int]]], device: torch.device) -> Tensor:
    """Prompts and what is behind them as rows (B, T). Nothing sees what they are filled up with at the end."""
    rows = [[*prompt, *answer] for prompt, answer in texts]
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)


def written(model: GPT, task: Task) -> float:
    """How often what the model writes behind the prompt, greedily, answers the question."""
    answers = greedy(model, [item.prompt for item in task.items], task.new_tokens)
    return sum(task.right(tokens, item) for tokens, item in zip(answers, task.items, strict=True)) / len(task.items)


# making tasks

FAR = 128  # tokens between a question and what answers it, at least
TEXT, PASSAGE, COPIED = 384, 32, 8  # tokens of a text, of a passage in it, and of how it goes on


def make_tasks(tokens: np.ndarray, prefix: Sequence[int], tokenizer: Tokenizer, n: int, seed: int) -> list[Task]:
    """Up to n questions of each kind, from places all over the stream. A task that the text does not give is left out.

    prefix: what a text begins with.
    """

    def is_word(ids: list[int], item: Item) -> bool:
        return first_word(tokenizer.decode(ids)) == first_word(tokenizer.decode(item.choices[0]))

    chance, between = random.Random(seed), tokenizer.encode("\n\n", bos=False)
    places = [int(a) for a in np.linspace(0, max(0, len(tokens) - TEXT - PASSAGE), 4 * n)]
    chance.shuffle(places)
    makers: dict[str, Callable[[int], Item | None]] = {
        "cloze": lambda a: cloze(tokens[a : a + TEXT], prefix, tokenizer, chance),
        "copy": lambda a: copy(tokens[a : a + TEXT], prefix, between, chance),
        "continuation": lambda a: continuation(tokens, a, prefix, chance),
    }
    rules = {"cloze": (8, is_word), "copy": (COPIED, is_copy), "continuation": (PASSAGE, is_nearest)}
    tasks = []
    for name, make in makers.items():
        made = (item for item in map(make, places) if item is not None)
        items = [item for item, _ in zip(made, range(n), strict=False)]
        if items:
            tasks.append(Task(name, items, *rules[name]))
    return tasks


def cloze(text: np.ndarray, prefix: Sequence[int], tokenizer: Tokenizer, chance: random.Random) -> Item | None:
    """The last word of a sentence, as in LAMBADA, where a word of four letters or more was there before and not within
    the last FAR tokens; the wrong answers are other such words. None where the text has no such sentence."""
    words = tokenizer.decode([int(i) for i in text])
    for end in reversed([m for m in re.finditer(r" ([a-z]{4,})[.!?;]", words)]):
        before = words[: end.start()]
        known = far_words(before, tokenizer)
        if (word := end[1]) not in known or len(known) < 4:
            continue
        wrong = chance.sample(sorted(known - {word}), 3)
        choices = [encode_behind(tokenizer, before, f" {choice}") for choice in (word, *wrong)]
        if all(choice is not None and len(choice) for choice in choices):
            return Item([*prefix, *tokenizer.encode(before, bos=False)], [choice.tolist() for choice in choices])
    return None


def far_words(before: str, tokenizer: Tokenizer) -> set[str]:
    """Words of four letters or more that occur in a text, none of them within its last FAR tokens."""
    ids = tokenizer.encode(before, bos=False)
    near = tokenizer.decode(ids[-FAR:])
    far = re.findall(r"(?<=\s)[a-z]{4,}(?=[\s.,;!?])", tokenizer.decode(ids[:-FAR]))
    return set(far) - set(re.findall(r"[a-z]+", near.lower()))


def first_word(text: str) -> str:
    found = re.match(r"\s*([^\W\d_]+)", text)
    return found[1] if found else ""


def copy(text: np.ndarray, prefix: Sequence[int], between: list[int], chance: random.Random) -> Item | None:
    """A text, and behind it and the tokens `between` a passage of its first half once more: how does it go on? The
    wrong answers are what other passages of the text go on with."""
    ids = [int(i) for i in text]
    whole, half = len(ids) - PASSAGE - COPIED, len(ids) // 2 - PASSAGE - COPIED
    if half < 1 or whole < 4 * COPIED:
        return None
    start = chance.randrange(half)
    right = start + PASSAGE
    others = [at for at in range(PASSAGE, len(ids) - COPIED) if abs(at - right) >= COPIED]
    ends = [ids[at : at + COPIED] for at in (right, *chance.sample(others, 3))]
    return Item([*prefix, *ids, *between, *ids[start:right]], ends)


def continuation(tokens: np.ndarray, at: int, prefix: Sequence[int], chance: random.Random) -> Item | None:
    """Which of four passages of the books follows this text?"""
    end, last = at + TEXT, len(tokens) - PASSAGE
    others = [a for a in (chance.randrange(max(1, last)) for _ in range(64)) if a >= end + PASSAGE or a < at - PASSAGE]
    if end > last or len(others) < 3:
        return None
    passages = [[int(i) for i in tokens[a : a + PASSAGE]] for a in (end, *others[:3])]
    return Item([*prefix, *(int(i) for i in tokens[at:end])], passages)


def is_copy(ids: list[int], item: Item) -> bool:
    return ids == item.choices[0]


def is_nearest(ids: list[int], item: Item) -> bool:
    """Whether the right answer shares more tokens with these than every other does."""
    own, *others = [sum((Counter(ids) & Counter(choice)).values()) for choice in item.choices]
    return own > max(others)


# --------------------------------------------------------------------------------------------------------------- judges


class Sizes(NamedTuple):
    """How much is asked."""

    seq_len: int = 1024  # tokens of a window that is read, and the most of a text with a pass key
    windows: int = 16
    prompts: int = 32  # that are gone on from greedily
    prompt_tokens: int = 256
    new_tokens: int = 200
    items: int = 200  # of each task
    trials: int = 10  # numbers for each length and depth


DEPTHS = (0.0, 0.25, 0.5, 0.75)  # of a pass key in its text: not at the end, which a window sees


class Judges:
    """All judges, with the teacher's part of the answers."""

    def __init__(
        self, teacher: GPT, tokenizer: Tokenizer, tokens: np.ndarray, prefix: Sequence[int], sizes: Sizes, seed: int
    ) -> None:
        """tokens, prefix: of held-out text, as lit_swa.evaluate.read_stream gives them."""
        self.teacher, self.tokenizer, self.sizes, self.seed = teacher, tokenizer, sizes, seed
        device = teacher.transformer.wte.weight.device
        cut = spread_windows(len(tokens), sizes.seq_len, sizes.windows, sizes.seq_len, "eval_data", prefix)
        self.idx, self.first = cut.batch(tokens, cut.starts, device), cut.first
        self.prompts = prompts_of(tokens, prefix, sizes)
        self.tasks = make_tasks(tokens, prefix, tokenizer, sizes.items, seed)
        self.trials = [Trial(n, d, i) for n in (sizes.seq_len // 2, sizes.seq_len) for d in DEPTHS
                       for i in range(sizes.trials)]  # fmt: skip
        self.hidden = [build_prompt(trial, tokenizer, seed, KEY_TOKENS) for trial in self.trials]
        self.states = hidden_states(teacher, self.idx)
        self.theirs = greedy(teacher, self.prompts, sizes.new_tokens)

    def __call__(self, model: GPT) -> dict[str, Any]:
        """The figures of a model."""
        row: dict[str, Any] = divergence(self.teacher, self.states, model, self.idx, self.first)
        row["read_tokens"] = row.pop("tokens")
        row |= agreement(greedy(model, self.prompts, self.sizes.new_tokens), self.theirs)
        row["forced"] = forced_agreement(model, self.prompts, self.theirs)
        row["passkey"] = self.passkeys(model)
        row["tasks"] = {
            task.name: {"items": len(task.items), "ranked": ranked(model, task.items), "written": written(model, task)}
            for task in self.tasks
        }
        return row

    def passkeys(self, model: GPT) -> dict[str, float]:
        """By length, the share of numbers that the model finds."""
        prompts = [ids for ids, _, _ in self.hidden]
        answers = greedy(model, prompts, KEY_TOKENS, self.tokenizer.eos_ids) if prompts else []
        found: dict[int, list[bool]] = {}
        for trial, (_, key, _), tokens in zip(self.trials, self.hidden, answers, strict=True):
            found.setdefault(trial.length, []).append(find_answer(self.tokenizer.decode(tokens)) == key)
        return {str(length): sum(right) / len(right) for length, right in found.items()}


KEY_TOKENS = 16  # room for the answer to a pass key


def prompts_of(tokens: np.ndarray, prefix: Sequence[int], sizes: Sizes) -> list[list[int]]:
    """Beginnings that are gone on from, evenly spread over the stream."""
    cut: Windows = spread_windows(
        len(tokens), sizes.prompt_tokens, sizes.prompts, sizes.prompt_tokens, "eval_data", prefix
    )
    return cut.batch(tokens, cut.starts, "cpu").tolist()
