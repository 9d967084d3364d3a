"""Questions on long documents: the published formats, what is cut of a document, the published measures, the script."""

import json
import re
import sys
from pathlib import Path

import pytest

from lit_swa import documents
from lit_swa.documents import METRICS, Question, file_score, judge, make_prompt, read_files, read_questions

SCRIPT = "scripts/evaluate_documents.py"
LINES = {
    "scrolls": [
        {"id": "a", "pid": "a_0", "input": "Who came?\n\nA man came.\n\nHe left.", "output": "a man"},
        {"id": "b", "pid": "b_0", "input": "Who left?\n\nA cat left.", "output": "a cat"},
        {"id": "a", "pid": "a_1", "input": "Who came?\n\nA man came.\n\nHe left.", "output": "he"},
    ],
    "quality": [{"id": 7, "input": "Where?\n\n (A) Here\n (B) There\n (C) Up\n (D) Down\n\nText.", "output": "Up"}],
    "shown": [{"id": "x", "input": "Text.", "query": "Q?", "output": "yes", "query_examples": ["P?"],
               "output_examples": ["no"]}],
    "zero": [{"id": "z", "input": "Read.\n\nText.\n\nQuestion:\nQ?\n\nAnswer:\n", "output": "yes",
              "document_start_index": 7, "document_end_index": 12, "truncation_seperator": "... [cut] ..."}],
    "leval": [{"instructions": ["Q?", "R?"], "input": "Text.", "outputs": ["A", "B"], "evaluation": "exam"}],
}  # fmt: skip


class Words:
    """A tokenizer whose tokens are words, with the spaces behind them."""

    def encode(self, text: str, bos: bool | None = None) -> list[str]:
        return re.findall(r"\s*\S+|\s+$", text)

    def decode(self, ids: list[str]) -> str:
        return "".join(ids)

    def apply_chat_template(self, messages: list[dict[str, str]]) -> list[str]:
        return ["<user>", *self.encode(messages[0]["content"]), "<assistant>"]


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    for name, lines in LINES.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return {name: tmp_path / f"{name}.jsonl" for name in LINES}


def test_every_format_is_read(files):
    """Catches: a question in its document, choices in it, right answers that are lost or become questions."""
    read = {name: read_questions(path) for name, path in files.items()}
    first, second = read["scrolls"]
    assert (first.query, first.document, first.answers) == ("Who came?", "A man came.\n\nHe left.", ["a man", "he"])
    assert (second.key, second.answers) == ("b", ["a cat"])
    assert read["quality"][0].query.endswith("(D) Down") and read["quality"][0].document == "Text."
    assert read["shown"][0].shown == [("P?", "no")] and read["shown"][0].document == "Text."
    zero = read["zero"][0]
    assert (zero.before, zero.document) == ("Read.\n\n", "Text.") and zero.behind.endswith("Answer:\n")
    assert [(q.query, q.answers, q.document) for q in read["leval"]] == [("Q?", ["A"], "Text."), ("R?", ["B"], "Text.")]


@pytest.mark.parametrize("line", ['{"id": 1}', "[1]", "{", '{"id": 1, "input": "no empty line", "output": "x"}',
                                  '{"instructions": ["a", "b"], "input": "x", "outputs": ["a"]}',
        '{"instructions": "ab", "input": "x", "outputs": "cd"}',
                                  '{"id": 1, "input": "q\\n\\nd", "output": null}'])  # fmt: skip
def test_other_lines_are_refused(tmp_path, line):
    """Catches: a traceback, and a test file without answers that would score 0."""
    (tmp_path / "f.jsonl").write_text("\n" + line)
    with pytest.raises(ValueError, match="line 2 is no question on a document"):
        read_questions(tmp_path / "f.jsonl")


@pytest.mark.parametrize(
    ("drop", "stays"), [("start", "w40 .*w99"), ("end", "w0 .*w59"), ("middle", "w0 .*w29 w70 .*w99")]
)
def test_the_document_alone_is_cut(drop, stays):
    """Catches: a question or an example that is cut, the wrong end that stays, a prompt of another length."""
    question = Question("k", " ".join(f"w{i}" for i in range(100)), "What now?", ["x"])
    prompt = make_prompt(question, [("Who?", "me")], Words(), 60 + 8, drop)
    text = "".join(prompt.ids)
    assert re.fullmatch(stays + r"\n\nQuestion: Who\?\nAnswer: me\n\nQuestion: What now\?\nAnswer:", text)
    assert len(prompt.ids) == 68 and prompt.cut == 40
    assert make_prompt(question, [], Words(), 200, drop).cut == 0
    with pytest.raises(ValueError, match="have no room for the question 'k'"):
        make_prompt(question, [], Words(), 4, drop)


def test_prompts_of_zero_scrolls_and_chats(files):
    """Catches: a cut that is not marked, and an answer that is begun inside of the user's turn."""
    zero = read_questions(files["zero"])[0]._replace(document=" ".join("abcdefgh"))
    text = "".join(make_prompt(zero, [], Words(), 11).ids)
    assert text.startswith("Read.\n\na b... [cut] ...") and text.endswith(" h\n\nQuestion:\nQ?\n\nAnswer:\n")
    exam = read_questions(files["leval"])[0]
    ids = make_prompt(exam, [], Words(), 99, chat=True).ids
    assert ids[0] == "<user>" and ids[-2:] == ["<assistant>", "Answer:"] and "Answer:" not in "".join(ids[:-1])


def test_examples_are_of_other_documents(files):
    """Catches: an example that gives the answer away, too few that go unnoticed, a file's own that are not taken."""
    read = read_files({str(files["scrolls"]): "f1", str(files["shown"]): "f1"}, 1, None, None)
    assert [shown for _, shown in read[str(files["scrolls"])]] == [[("Who left?", "a cat")], [("Who came?", "a man")]]
    assert read[str(files["shown"])][0][1] == [("P?", "no")]
    leval, zero, scrolls = (str(files[name]) for name in ("leval", "zero", "scrolls"))
    assert read_files({leval: "letter"}, 2, {leval: scrolls}, 1)[leval][0][1][1] == ("Who left?", "a cat")
    for given, message in (
        (({leval: "letter"}, 1, None, None), "0 questions on other documents to show, and 1"),
        (({zero: "f1"}, 1, None, None), "no place for examples"),
        (({zero: "bleu"}, 0, None, None), "no measure 'bleu', choose from f1, em"),
        (({zero: "f1"}, 0, {leval: scrolls}, None), "none of the files of data"),
        (({scrolls: "number"}, 0, None, None), "in which number finds nothing to measure"),
    ):
        with pytest.raises(ValueError, match=message):
            read_files(*given)


SAID = ["exact match example", "hello there", "general kenobi"]  # the example in SCROLLS's own metric
RIGHT = [["exact match example"], ["hello", "hi there"], ["commander kenobi"]]


@pytest.mark.parametrize(("metric", "score"), [("em", 33.3333), ("f1", 72.2222), ("rouge", 55.8136)])
def test_scores_are_those_that_scrolls_publishes(metric, score):
    """Catches: another normalisation, a mean over right answers in place of the best, ROUGE with stemming."""
    found = file_score([judge(metric, said, right) for said, right in zip(SAID, RIGHT, strict=True)])
    assert found == pytest.approx(score, abs=1e-4)


def test_rouge_says_what_to_install(monkeypatch):
    """Catches: a traceback where the package is missing."""
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ValueError, match="pip install rouge-score"):
        documents.rouge("a", "b")


@pytest.mark.parametrize(
    ("metric", "said", "right", "score"),
    [
        ("letter", "B. because C", "B", 1),
        ("letter", "It is (C)", "C (the third)", 1),
        ("letter", "AB", "A", 0),
        ("letter", "none", "A", 0),
        ("letters", "BAB", "AB", 1),
        ("letters", "A. one and D. two", "AD", 1),
        ("letters", "A. one Question: D.", "AD", 0.25),
        ("letters", "option BC", "BC", 1),
        ("letters", "A", "AB", 0.25),
        ("letters", "AC", "AB", 0),
        ("letters", "none", "AB", 0),
        ("number", "So 3 and 4. The answer is 12.0", "... The answer is 12", 1),
        ("number", "it is $1,200 here", "The answer is 1200", 1),
        ("number", "7\n\n8", "8", 0),
        ("verdicts", "True. [fact: It is false]", "True [fact: False]", 1),
        ("verdicts", "False [fact: False]", "True [fact: False]", 0.5),
        ("verdicts", "true", "True [fact: False]", 0.5),
        ("verdicts", "I can't tell", "True [fact: False]", 0),
        ("code", "After both loops the final output is [1, 2] and so on and on", "[1 2]", 1),
        ("code", "The printed value will be 2.0", "2", 1),
        ("code", "[1, 2] is what the program prints when it ends at last", "[1 2]", 0),
        ("code", "[[1, 2], [3]]", "[[1, 2], [3, 4]]", 0),
    ],
)
def test_choices_and_sums(metric, said, right, score):
    """Catches: other letters or numbers than those that L-Eval's code finds in such answers."""
    assert METRICS[metric].score(said, right) == score


def test_an_answer_ends_with_the_next_question():
    """Catches: the model's own questions counted as its answer."""
    assert documents.cut_answer("\n a cat\n\nQuestion: Who?") == "a cat"
    assert documents.cut_answer("Question: \nAnswer") == "Answer" and documents.cut_answer(" \n") == ""


def test_the_script(run_script, tiny_checkpoint, files, tmp_path):
    """Catches: methods asked different questions, scores under another file's name, a run that does not go on."""
    output, text = tmp_path / "out.json", "the fox jumps over the dog " * 30
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps({"instructions": ["Q?"], "input": text, "outputs": ["A"], "evaluation": "exam"}))
    arguments = [
        "--checkpoint_dir",
        tiny_checkpoint,
        "--data",
        json.dumps({str(files["scrolls"]): "f1", str(exam): "letter"}),
    ]
    arguments += ["--lengths", "[40,200]", "--max_new_tokens", 4, "--trained_length", 64, "--output", output]
    code, out, err = run_script(SCRIPT, *arguments)
    assert code == 0, err
    result = json.loads(output.read_text())
    assert out.splitlines()[0] == "| method | tokens | scrolls | exam | mean |" and len(out.splitlines()) == 8
    assert "exam.jsonl at 40: 36 tokens have no room" in out and output.with_suffix(".png").exists()
    rows = {(row["method"], row["length"], row["task"]): row for row in result["rows"]}
    assert len(rows) == 8 and rows["rope", 40, "exam"]["score"] is None
    assert rows["dual_chunk", 200, "exam"]["cut"] == 1 and rows["rope", 200, "scrolls"]["cut"] == 0
    asked = [result["answers"][f"{method} 200 {exam} 1.0"] for method in ("rope", "dual_chunk")]
    assert asked[0]["prompt_tokens"] == asked[1]["prompt_tokens"] <= 196 and asked[0]["cut_tokens"] > 0
    for key, part in result["answers"].items():
        metric = "letter" if str(exam) in key else "f1"
        assert part["scores"] == judge(metric, part["answer"], part["right"])
    again = run_script(SCRIPT, *arguments)
    assert again[:2] == (0, out) and "holds the results" in again[2]
    twice = {"a/test.jsonl": "f1", "b/a.jsonl": "f1"}
    for name in twice:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(files["scrolls"].read_text())
    given = {str(tmp_path / name): metric for name, metric in twice.items()}
    code, _, err = run_script(SCRIPT, "--checkpoint_dir", tiny_checkpoint, "--data", json.dumps(given))
    assert code == 2 and "Some files of data have one name" in err
    code, _, err = run_script(SCRIPT, "--checkpoint_dir", tiny_checkpoint, "--data", json.dumps(given), "--limit", 0)
    assert code == 2 and "limit=0 does not fit: it must be at least 1" in err
