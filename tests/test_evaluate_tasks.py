"""lit_swa/tasks.py: what lm-eval asks for, beside the plain model, and beside lm-eval's own Hugging Face backend."""

import json
import math
import random
import shutil
from typing import NamedTuple

import pytest
import torch
from tiny import randomize, tiny_config

from lit_swa import tasks
from lit_swa.checkpoint import export_hf_checkpoint, load_model, save_checkpoint
from lit_swa.formats.tokenizer import Tokenizer
from lit_swa.generate import generate
from lit_swa.model import GPT
from lit_swa.tasks import Reader, Row

SCRIPT = "scripts/evaluate_tasks.py"
PAIRS = [
    ("the quick brown", " fox"),
    ("the lazy dog ", "jumps over"),
    ("", "the fox"),
    ("the quick brown fox jumps over the lazy dog " * 4, " the quick fox"),
    ("over", " the lazy dog, the lazy dog"),
    ("the quick bro", "wn fox jumps over"),  # within a token
]
TEXTS = ["", "fox", "the quick brown fox jumps over the lazy dog " * 3]
WINDOW = {"attention": "sliding", "sliding_window_size": 5, "rolling_kv_cache": True}


class Asked(NamedTuple):
    """A request of lm-eval."""

    args: tuple


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint) -> Tokenizer:
    return Tokenizer(tiny_checkpoint)


def score_alone(model, ids: list[int], n: int) -> tuple[float, bool]:
    """log p of the last n tokens of one text, and whether each is the likeliest."""
    logits = model(torch.tensor([ids[:-1]]))[0, -n:, : model.config.vocab_size].log_softmax(-1)
    logp = logits.gather(-1, torch.tensor(ids[-n:])[:, None]).double().sum().item()
    return logp, logits.argmax(-1).tolist() == ids[-n:]


DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9}}
FIELDS = [
    {},
    WINDOW,
    DYNAMIC,
    {"attention": "streaming", "sliding_window_size": 4, "n_sink_tokens": 2},
    {"attention": "dual_chunk", "dual_chunk_pretraining_length": 12},
    {"attention": "linear", "linear_window": 3},
]


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("chunk_size", [0, 7])
def test_each_text_scores_as_it_does_alone(tiny_model, tokenizer, monkeypatch, fields, chunk_size):
    """Catches: padding that counts, a row's score given to another one, a first token left out, caches that mix rows, a
    length that a neighbour sets."""
    model, chance = tiny_model(vocab_size=320, **fields), random.Random(1)
    rows = [
        Row([chance.randrange(320) for _ in range(chance.choice([4, 9, 30]))], chance.randint(1, 3)) for _ in range(9)
    ]
    greedy = rows[0].ids + list(generate(model, rows[0].ids, 5))
    if chunk_size and not model.rope.depends_on_length():
        monkeypatch.setattr(tasks, "pick_chunk_size", lambda *a: chunk_size)
    found = Reader(model, tokenizer, batch_size=4).score([*rows, Row(greedy, 5)])
    expected = [score_alone(model, *row) for row in [*rows, Row(greedy, 5)]]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [own for _, own in found] == [own for _, own in expected] and found[-1][1] and not found[1][1]


def test_windows_are_those_of_lm_evals_example(tiny_checkpoint, tokenizer):
    """Catches: a token that is predicted twice or never, a last window without its context."""
    reader = Reader(load_model(tiny_checkpoint), tokenizer, max_length=4)
    p = reader.prefix
    rows = list(reader.windows(list(range(10))))
    assert rows == [Row([p, 0, 1, 2, 3], 4), Row([3, 4, 5, 6, 7], 4), Row([5, 6, 7, 8, 9], 2)]
    assert list(reader.windows([7])) == [Row([p, 7], 1)] and list(reader.windows([])) == []
    endless = Reader(load_model(tiny_checkpoint, **WINDOW), tokenizer)
    assert list(endless.windows(list(range(1000)))) == [Row([p, *range(1000)], 1000)]


def test_what_is_written_is_each_texts_own(tiny_checkpoint, tokenizer):
    """Catches: answers in the order in which they end, a stop that stays in the text, the prompt's end cut off."""
    model = load_model(tiny_checkpoint)
    reader = Reader(model, tokenizer, batch_size=2, max_length=40)
    limits = (9, 3, 4, 9, 6, 5)
    asked = [
        ("dog " + context, {"until": [], "max_gen_toks": n}) for (context, _), n in zip(PAIRS, limits, strict=True)
    ]
    plain = []
    for context, settings in asked:
        ids = reader.encode(context)[-(40 - settings["max_gen_toks"]) :]
        tokens = generate(model, ids, settings["max_gen_toks"], stop_tokens=tokenizer.eos_ids)
        plain.append(tokenizer.decode(list(tokens)))
    assert reader.written(asked) == plain
    stop = plain[0][2:4]
    stopped = reader.written([(asked[0][0], {"until": stop, "max_gen_toks": 9})])
    assert stopped == [plain[0].split(stop)[0]]
    with pytest.raises(ValueError, match="leaves no room"):
        reader.written([("a", {"max_gen_toks": 40})])
    with pytest.raises(ValueError, match="A continuation has 4 tokens and the context 3"):
        Reader(model, tokenizer, max_length=3).score([Row([1, 2, 3, 4, 5], 4)])


def test_answers_are_judged_as_in_squad():
    """Catches: words counted once, an article or a full stop that counts, only the first of the right answers."""
    doc = {"answers": ["Gold", "the red fox red"]}
    assert tasks.judge(doc, [" A red, Red fox."]) == {"exact_match": 0.0, "f1": 1.0}
    assert tasks.judge(doc, ["gold."]) == {"exact_match": 1.0, "f1": 1.0}
    assert tasks.judge(doc, ["red dog"]) == {"exact_match": 0.0, "f1": pytest.approx(2 * 1 / 5)}
    assert tasks.judge(doc, [""]) == {"exact_match": 0.0, "f1": 0.0}


@pytest.mark.parametrize(
    "lines, error",
    [
        ("", "holds no"),
        ("\n  \n", "holds no"),
        ("[1]", "line 1 is no question"),
        ('\n{"question": "a", "answer": "b"}\n{"question": 3, "answer": "b"}', "line 3 is no question"),
        ('{"question": "a", "answer": 4}', '"answer" must be a text'),
        ('{"question": "a", "choices": ["b"], "answer": 0}', "two texts or more"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "counted from 0"),
        ('{"question": "a", "choices": ["b", "c"], "answer": true}', "counted from 0"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 1}\n{"question": "a", "answer": "b"}', "mixes questions"),
    ],
)
def test_a_file_of_other_questions_is_refused(tmp_path, lines, error):
    """Catches: a line that is left out in silence, an answer that no choice is."""
    path = tmp_path / "own.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=error) as raised:
        tasks.read_task_file(path)
    assert str(path) in str(raised.value)


def test_the_right_choice_is_named_or_counted(tmp_path):
    """Catches: a text that is taken for a number, numbers that count from 1."""
    path, texts = tmp_path / "own.jsonl", ["0", "1", "b"]
    path.write_text("\n".join(json.dumps({"question": "a", "choices": texts, "answer": a}) for a in ("b", 0, "1")))
    assert [doc["answer"] for doc in tasks.read_task_file(path)] == [2, 0, 1]


def test_the_script_says_what_is_missing(run_script, tmp_path):
    """Catches: a traceback where no task, no file or no lm-eval is there."""
    code, _, err = run_script(SCRIPT)
    assert code == 2 and "error: There is no task: give --tasks" in err
    code, _, err = run_script(SCRIPT, "--task_file", tmp_path / "none.jsonl")
    assert code == 2 and "none.jsonl" in err and err.count("error:") == 1
    (tmp_path / "one.jsonl").write_text('{"question": "a", "answer": "b"}')
    code, _, err = run_script(SCRIPT, "--task_file", tmp_path / "one.jsonl", "--num_fewshot", "1")
    assert code == 2 and "one.jsonl has 1 questions, too few for num_fewshot=1" in err


def test_agreement_with_lm_evals_own_backend(tiny_checkpoint, tokenizer, tmp_path):
    """Catches: tokens that are cut otherwise than lm-eval cuts them, another prefix, other windows."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    own = tmp_path / "own"
    shutil.copytree(tiny_checkpoint, own)
    config = tiny_config(vocab_size=tokenizer.vocab_size, padded_vocab_size=tokenizer.vocab_size)
    model = GPT(config).eval()
    randomize(model)
    save_checkpoint(model, config, own)
    export_hf_checkpoint(own, tmp_path / "hf")
    theirs = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=3, max_length=48)
    ours = tasks.as_lm(Reader(model, tokenizer, batch_size=3, max_length=48))
    pairs = [Asked(pair) for pair in PAIRS]
    a, b = ours.loglikelihood(pairs), theirs.loglikelihood(pairs)
    assert [x for x, _ in a] == pytest.approx([x for x, _ in b], rel=1e-5, abs=1e-4)
    assert [x for _, x in a] == [bool(x) for _, x in b]
    texts = [Asked((text,)) for text in TEXTS if text]
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-5)
    asked = [
        Asked((context or "dog", {"until": ["e"], "max_gen_toks": 12, "do_sample": False})) for context, _ in PAIRS
    ]
    assert ours.generate_until(asked) == theirs.generate_until(asked)


def test_a_local_task_runs_and_is_kept(tiny_checkpoint, run_script, tmp_path):
    """Catches: a task of a file that needs the network, figures that its questions do not give, a run that repeats."""
    pytest.importorskip("lm_eval")
    path, output = tmp_path / "own.jsonl", tmp_path / "out.json"
    choices = [" fox", " dog", " brown"]
    docs = [{"question": f"the {i}", "choices": choices, "answer": i % 3} for i in range(6)]
    path.write_text("\n".join(map(json.dumps, docs)))
    arguments = ["--checkpoint_dir", tiny_checkpoint, "--task_file", path, "--output", output, "--limit", "5"]
    code, out, err = run_script(SCRIPT, *arguments)
    assert code == 0, err
    model, tokenizer = load_model(tiny_checkpoint), Tokenizer(tiny_checkpoint)
    reader, right = Reader(model, tokenizer), 0
    for doc in docs[:5]:
        scores = reader.loglikelihoods([(f"Question: {doc['question']}\nAnswer:", f" {c}") for c in choices])
        right += max(range(3), key=lambda i: scores[i][0]) == doc["answer"]
    found = json.loads(output.read_text())["tasks"]["own"]["results"]["own"]
    assert math.isclose(found["acc,none"], right / 5) and f"| own | 5 | 0 | acc | {right / 5:.4f} |" in out
    assert run_script(SCRIPT, *arguments)[1] == out  # from the file


@pytest.mark.slow  # lm-eval lists thousands of tasks
def test_a_task_that_lm_eval_lacks(run_script):
    """Catches: a traceback, or a model that is loaded first."""
    pytest.importorskip("lm_eval")
    code, _, err = run_script(SCRIPT, "--tasks", "[arc_eazy]")
    assert code == 2 and "lm-eval has no task 'arc_eazy': choose from arc_easy" in err
