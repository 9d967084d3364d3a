"""lit_swa/judges.py: each judge beside a value by hand or by force."""

import random

import numpy as np
import pytest
import torch

from lit_swa import judges
from lit_swa.generate import generate
from lit_swa.judges import Item, Sizes, Task, agreement, cloze, continuation, copy, forced_agreement, greedy, ranked
from lit_swa.tokenizer import Tokenizer

WORDS = "the quick brown fox jumps over lazy dog where nobody sleeps tonight because rivers never freeze".split()


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint) -> Tokenizer:
    return Tokenizer(tiny_checkpoint)


@pytest.fixture(scope="module")
def stream(tokenizer) -> np.ndarray:
    """A book of sentences of eight words."""
    words = np.random.default_rng(1).choice(WORDS, 4000)
    text = " ".join(f"{word}." if i % 8 == 7 else word for i, word in enumerate(words))
    return np.array(tokenizer.encode(text), dtype=np.uint32)


def test_agreement_by_hand():
    """Catches: a beginning that goes on behind a token that differs, or a mean over tokens in place of texts."""
    same = agreement([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 9, 3, 4], [5, 6, 7, 8]])
    assert same == {"same": 7 / 8, "beginning": (1 + 4) / 2}


@pytest.mark.parametrize("attention", ["full", "linear"])
def test_greedy_text_is_that_of_each_prompt_alone(tiny_model, attention):
    """Catches: prompts of other lengths that move a text, answers in the order in which they end."""
    model = tiny_model(attention=attention, linear_window=3)
    prompts = [[5, 6, 7, 8, 9], [3], [9, 8, 7]]
    assert greedy(model, prompts, 12) == [list(generate(model, ids, 12)) for ids in prompts]


def test_agreement_along_a_text_is_read_at_the_right_places(tiny_model):
    """Catches: tokens compared with those that the model says one place before or behind."""
    model, prompts = tiny_model(), [[1, 2, 3], [4, 5]]
    own = greedy(model, prompts, 6)
    assert forced_agreement(model, prompts, own) == 1
    other = [[(token + 1) % 50 if n % 2 else token for n, token in enumerate(text)] for text in own]
    right = 0
    for prompt, text in zip(prompts, other, strict=True):
        said = model(torch.tensor([prompt + text]))[0, :, : model.config.vocab_size].argmax(-1)
        right += sum(said[len(prompt) + n - 1].item() == token for n, token in enumerate(text))
    assert forced_agreement(model, prompts, other) == right / 12 < 1


def test_the_likeliest_answer_is_that_of_the_sums(tiny_model, monkeypatch):
    """Catches: padding that counts, an answer's first token left out, the prompt's own tokens in the sum, answers of
    one call given to another's."""
    model, rng = tiny_model(), random.Random(2)
    draw = lambda n: [rng.randrange(50) for _ in range(n)]  # noqa: E731
    items = [Item(draw(rng.randint(1, 9)), [draw(rng.randint(1, 4)) for _ in range(3)]) for _ in range(12)]

    def score(prompt: list[int], answer: list[int]) -> float:
        logits = model(torch.tensor([prompt + answer]))[0, :, : model.config.vocab_size].log_softmax(-1)
        return sum(logits[len(prompt) + n - 1, token].item() for n, token in enumerate(answer))

    scores = [[score(item.prompt, choice) for choice in item.choices] for item in items]
    best = [np.argmax(own) for own in scores]
    monkeypatch.setitem(judges.CALL_TOKENS, "cpu", 40)  # several calls
    texts = [(item.prompt, choice) for item in items for choice in item.choices]
    assert judges.answer_nll(model, texts) == pytest.approx([-x for own in scores for x in own], rel=1e-5)
    assert ranked(model, items) == sum(n == 0 for n in best) / 12
    assert 0 < sum(n == 0 for n in best) < 12


def test_a_written_answer_counts_by_the_tasks_rule(tiny_model):
    """Catches: rules that are given another item's text."""
    model, prompts = tiny_model(), [[1, 2], [3, 4, 5], [6]]
    own = greedy(model, prompts, 3)
    items = [Item(prompts[0], [own[0]]), Item(prompts[1], [own[0]]), Item(prompts[2], [own[2]])]
    assert judges.written(model, Task("copy", items, 3, judges.is_copy)) == 2 / 3


def test_the_nearest_answer_shares_most_tokens():
    """Catches: a token that counts as often as it is written, a tie that counts as right."""
    assert judges.is_nearest([1, 1, 1, 2], Item([], [[1, 2, 3], [1, 1, 9]])) is False  # two each
    assert judges.is_nearest([1, 1, 1, 2], Item([], [[1, 2, 3], [1, 7, 9]])) is True
    assert judges.is_nearest([1, 1, 4], Item([], [[1, 5], [1, 1]])) is False


def test_a_cloze_asks_for_a_word_that_stood_far_away(tokenizer, stream, monkeypatch):
    """Catches: an answer that the last words give away, one that the text does not hold, answers that are no words."""
    monkeypatch.setattr(judges, "FAR", 20)
    items = [cloze(stream[a : a + 160], (7,), tokenizer, random.Random(a)) for a in range(0, 3000, 160)]
    made = [item for item in items if item is not None]
    assert len(made) > 5
    for item in made:
        prompt, answers = tokenizer.decode(item.prompt[1:]), [tokenizer.decode(choice) for choice in item.choices]
        assert item.prompt[0] == 7 and len(set(answers)) == 4
        near = tokenizer.decode(item.prompt[1:][-20:])
        for answer in answers:
            assert answer.strip() in WORDS and answer in prompt and answer not in near
    at = next(n for n, item in enumerate(items) if item is not None) * 160
    text = tokenizer.decode(stream[at : at + 160].tolist())
    asked = tokenizer.decode(made[0].prompt[1:]) + tokenizer.decode(made[0].choices[0])
    assert text.startswith(asked) and text[len(asked)] in ".!?;"  # the right answer is first
    assert judges.first_word(" don't") == "don" and judges.first_word("\n fox, the") == "fox"
    assert judges.first_word("(fox") == ""


def test_a_copy_and_a_continuation_go_on_as_the_text_does(stream):
    """Catches: passages that are one token off, a right answer among the wrong ones."""
    ids = stream[: judges.TEXT].tolist()
    item = copy(stream[: judges.TEXT], (7,), [8, 9], random.Random(1))
    passage = item.prompt[3 + judges.TEXT :]
    at = next(a for a in range(len(ids)) if ids[a : a + len(passage)] == passage)
    assert item.prompt[0] == 7 and item.prompt[1 : 3 + judges.TEXT] == [*ids, 8, 9]
    assert len(passage) == judges.PASSAGE
    assert item.choices[0] == ids[at + judges.PASSAGE :][: judges.COPIED] and at < judges.TEXT // 2
    assert len(item.choices) == 4 and item.choices[0] not in item.choices[1:]
    item = continuation(stream, 1000, (7,), random.Random(1))
    end = 1000 + judges.TEXT
    assert item.prompt == [7, *stream[1000:end].tolist()]
    assert item.choices[0] == stream[end : end + judges.PASSAGE].tolist() not in item.choices[1:]
    assert continuation(stream, len(stream) - judges.TEXT, (7,), random.Random(1)) is None


def test_a_pass_key_is_found_in_what_is_written(tiny_model, tokenizer, stream, monkeypatch):
    """Catches: answers compared with another trial's key, keys that are hidden at the end, shares over both lengths."""
    model = tiny_model(padded_vocab_size=328, vocab_size=tokenizer.vocab_size, block_size=1024)
    judge = judges.Judges(model, tokenizer, stream, (), Sizes(800, 1, 1, 8, 2, 1, 1), seed=3)
    keys = [key for _, key, _ in judge.hidden]
    assert [len(ids) <= 800 - judges.KEY_TOKENS for ids, _, _ in judge.hidden] == [True] * 8 and len(set(keys)) == 8
    texts = [tokenizer.encode(f" {key}. 4 is") for key in keys]
    texts[1] = tokenizer.encode(f" 1{keys[1]}")
    monkeypatch.setattr(judges, "greedy", lambda *a: texts)
    assert judge.passkeys(model) == {"400": 3 / 4, "800": 1.0}
