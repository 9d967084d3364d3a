"""RULER's tasks: each is solved from its prompt alone by code that knows nothing of how it was made."""

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from lit_swa import evaluate, ruler
from lit_swa.ruler import TASKS, Material, make_sample

SCRIPT = "scripts/evaluate_ruler.py"
LENGTHS = (900, 1500, 4500)


class Words:
    """A tokenizer whose tokens are words."""

    def encode(self, text: str, bos: bool | None = None) -> list[str]:
        return re.findall(r"\S+\s*", text)

    def apply_chat_template(self, messages: list[dict[str, str]]) -> list[str]:
        return ["user\n", *self.encode(messages[0]["content"]), "\nassistant\n"]


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Path:
    chance = random.Random(7)
    words = ["".join(chance.choices("abcdefghij", k=chance.randint(4, 9))) for _ in range(3000)]
    sentences = [" ".join(chance.choices(words, k=9)).capitalize() + "." for _ in range(1500)]
    path = tmp_path_factory.mktemp("book") / "story.txt"
    path.write_text("\n".join(sentences))
    return path


@pytest.fixture(scope="module")
def material(book) -> Material:
    return ruler.read_material([book])


def solve(name: str, text: str) -> tuple[set[str], int]:
    """(the answers, how many needles or assignments there are) of a prompt."""
    if name.startswith("niah"):
        found = re.findall(r"One of the special magic (?:number|uuid)s for (\S+) is: ([\w-]+)\.", text)
        asked = re.search(r"What (?:is|are all) the special magic \w+ for (.*?) mentioned", text)[1]
        keys = re.split(r", and |, ", asked)
        return {value for key, value in found if key in keys}, len(found)
    if name == "vt":
        own = text[text.rindex(ruler.VT_TASK) :]
        pairs = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", own)
        known = {re.search(r"assigned the value (\d+) in the text", own)[1]}
        for _ in pairs:
            known |= {name for name, value in pairs if value in known}
        return {name for name in known if name.isalpha()}, len(pairs)
    if name == "cwe":
        words = re.findall(r"\d+\. (\w+)", text[text.rindex("Below is a numbered") :])
        ten = Counter(words).most_common(11)
        assert ten[9][1] > ten[10][1]
        return {word for word, _ in ten[:10]}, len(words)
    coded = Counter(re.search(r"coded words\. (.*?)\s*Question", text, re.DOTALL)[1].split()).most_common(5)
    assert coded[0][0] == "...." and coded[3][1] > coded[4][1]
    return {word for word, _ in coded[1:4]}, 3


NEEDLES = {"niah_single_1": 1, "niah_single_2": 1, "niah_single_3": 1, "niah_multikey_1": 4, "niah_multivalue": 4,
           "niah_multiquery": 4, "vt": 5}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in TASKS if name != "qa"])
def test_the_prompt_alone_gives_the_answers(name, material):
    """Catches: an answer that the text does not hold, needles left out or asked for wrongly, ties, an example that is
    solved in place of the question, a prompt that leaves no room for its answer or is far shorter than asked."""
    drawn = set()
    for length in LENGTHS:
        for number in range(3):
            sample = make_sample(name, length, number, Words(), material, seed=5)
            answers, hidden = solve(name, "".join(sample.ids))
            assert answers == set(sample.answers) and len(sample.answers) == len(answers)
            assert hidden == NEEDLES.get(name, hidden) and (name != "niah_multikey_2" or hidden > 20)
            room = length - TASKS[name].room
            assert room - 65 < len(sample.ids) <= room  # a unit of cwe is in the list up to 3 times, two tokens each
            assert sample == make_sample(name, length, number, Words(), material, seed=5)
            drawn.add(tuple(sample.answers))
    assert len(drawn) == 9


def test_the_count_of_values_and_queries(material):
    """Catches: a multivalue task with one value, a multiquery task that asks for one key."""
    count = {name: len(make_sample(name, 1500, 0, Words(), material, 1).answers) for name in TASKS if name != "qa"}
    several = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}
    assert count == dict.fromkeys(count, 1) | several


def test_needles_lie_all_over_the_text(material):
    """Catches: needles at the end alone, which a window sees."""
    places = []
    for number in range(40):
        text = "".join(make_sample("niah_single_2", 900, number, Words(), material, 1).ids)
        places.append(text.index("One of the special") / len(text))
    assert min(places) < 0.2 and max(places) > 0.75 and 0.3 < sum(places) / 40 < 0.7
    assert ruler.insert(["a", "b", "c"], ["X", "Y", "Z"], [0.0, 0.5, 0.99]) == ["X", "a", "b", "Y", "c", "Z"]


def test_scores_are_those_of_the_paper():
    """Catches: an answer that counts twice, upper case that counts, all answers asked for where one is enough."""
    assert ruler.match_all("It is 12, ABC and 12.", ["12", "abc", "7"]) == pytest.approx(2 / 3)
    assert ruler.match_part("It is ABC.", ["12", "abc"]) == 1.0 and ruler.match_part("no", ["12"]) == 0.0


def test_a_question_stands_among_other_documents(book, tmp_path):
    """Catches: a document of the question that is left out or there twice; a chat whose answer begins in the turn."""
    path = tmp_path / "qa.jsonl"
    lines = [{"question": f"who {i}?", "answer": [f"n{i}", "x"], "context": [f"a{i} b{i}", f"c{i}"]} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, lines)))
    material = ruler.read_material([book], path)
    sample = make_sample("qa", 200, 0, Words(), material, 1, chat=True)
    text = "".join(sample.ids)
    number = re.search(r"Question: who (\d+)\?", text)[1]
    documents = re.findall(r"Document \d+:\n(.*)\n", text)
    assert sample.answers == [f"n{number}", "x"] and text.endswith("\nassistant\nAnswer:")
    assert documents.count(f"a{number} b{number}") == documents.count(f"c{number}") == 1
    assert len(documents) > 10 and len(set(documents)) == len(documents) and len(sample.ids) <= 200 - 32
    path.write_text('{"question": "a", "answer": 3, "context": "b"}')
    with pytest.raises(ValueError, match="line 1 is no question with documents"):
        ruler.read_material([book], path)


def test_what_does_not_fit_is_said(material, tmp_path):
    """Catches: a short book that makes short prompts, a task without its context."""
    with pytest.raises(ValueError, match=r"200 tokens is too short for cwe: it takes \d+ at least"):
        make_sample("cwe", 200, 0, Words(), material, 1)
    short = Material(material.sentences[:20], material.words)
    with pytest.raises(ValueError, match="books are too short for niah_single_2 at 900 tokens"):
        make_sample("niah_single_2", 900, 0, Words(), short, 1)
    path = tmp_path / "short.txt"
    path.write_text("One. Two. Three.")
    with pytest.raises(ValueError, match="give longer texts with --data"):
        ruler.read_material([path])


def test_a_run_that_was_interrupted_goes_on(run_script, tiny_checkpoint, book, tmp_path, monkeypatch):
    """Catches: answers that are lost or asked again, methods that are asked other questions, scores of another task."""
    fixed = ["--checkpoint_dir", tiny_checkpoint, "--data", book, "--lengths", "[1000]", "--samples", 1, "--window", 64,
             "--tasks", "[niah_single_1, niah_multiquery, cwe]", "--methods", "[rope, streaming]"]  # fmt: skip
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # pictures take longest, and test_plots.py draws one
    for name in ("niah_single_1", "niah_multiquery"):
        monkeypatch.setitem(TASKS, name, TASKS[name]._replace(room=9))
    code, out, err = run_script(SCRIPT, *fixed, "--output", tmp_path / "whole.json")
    assert code == 0, err
    assert (
        "| method | tokens | niah_single_1 | niah_multiquery | cwe | mean |" in out
        and "cwe at 1000: A length of 1000" in out
    )
    add, done = evaluate.Results.add, []

    def stop_at_third(results, key, part, every=5.0):
        if len(done) == 3:
            results.save()
            raise KeyboardInterrupt
        done.append(key)
        add(results, key, part, every)

    monkeypatch.setattr(evaluate.Results, "add", stop_at_third)
    assert run_script(SCRIPT, *fixed, "--output", tmp_path / "two.json")[0] == 130
    monkeypatch.setattr(evaluate.Results, "add", lambda results, key, *a: done.append(key) or add(results, key, *a))
    assert run_script(SCRIPT, *fixed, "--output", tmp_path / "two.json")[1] == out
    whole, two = (json.loads((tmp_path / name).read_text()) for name in ("whole.json", "two.json"))
    assert two["samples"] == whole["samples"] and len(done) == len(set(done)) == len(whole["samples"])
    asked: dict[str, list] = {}
    for key, part in whole["samples"].items():
        asked.setdefault(key.split(maxsplit=1)[1], []).append(part["answers"])
        assert part["score"] == ruler.match_all(part["text"], part["answers"])
    assert len(asked) == 2 and all(len(own) == 2 and own[0] == own[1] for own in asked.values())


def test_the_script_refuses_what_it_cannot_use(run_script, book):
    """Catches: tasks that are left out in silence, and a --qa without effect."""
    for words, *arguments in (
        ("There is no task 'nih'", "--tasks", "[nih]"),
        ("go together", "--qa", book, "--tasks", "[vt]"),
        ("go together", "--tasks", "[qa]"),
        ("There is no file none.txt", "--data", "none.txt"),
        ("samples=0 does not fit", "--samples", 0),
    ):
        code, _, err = run_script(SCRIPT, *(() if "--data" in arguments else ("--data", book)), *arguments)
        assert code == 2 and words in err and err.count("error:") == 1, err
