"""Passkey retrieval: prompts as long as asked, the needle where asked, honest scores, runs that can be interrupted."""

import json
import random
import re
import signal
from collections.abc import Callable

import pytest
from test_scripts import run

import lit_swa.generate
from lit_swa.passkey import (
    LARGEST_KEY,
    NEEDLE,
    TASK,
    Trial,
    build_prompt,
    find_answer,
    is_answered,
    largest_fitting,
    plan_trials,
    split_words,
    spread_depths,
)
from lit_swa.tokenizer import Tokenizer

SCRIPT = "scripts/evaluate_passkey.py"
STORY = "Once there was a wall, and a fox that lived behind it; nobody had ever counted its whiskers. " * 40


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint) -> Tokenizer:
    return Tokenizer(tiny_checkpoint)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("haystack", [(), split_words(STORY)], ids=["filler", "story"])
def test_a_prompt_is_as_long_as_asked_and_never_longer(tokenizer, chat, haystack):
    """Catches: lengths counted in words or without BOS or template, a prompt that leaves no room for its answer."""
    for length in (500, 501, 777, 1500):
        for trial in plan_trials([length], [None, 0.0, 1.0], 2):
            ids, passkey, _ = build_prompt(trial, tokenizer, 1, 16, haystack, chat)
            assert length - 16 - 20 < len(ids) <= length - 16  # one word more has up to 16 bytes, a token each
            text = tokenizer.decode(ids)
            assert text.count(NEEDLE.format(key=passkey)) == 1 and len(re.findall(r"\d+", text)) == 2
            assert text.endswith("What is the pass key?\nassistant\n" if chat else "pass key? The pass key is")


def test_the_needle_lies_at_its_depth(tokenizer):
    """Catches: a depth that is the needle's distance from the end, or a share of the wrong thing."""
    for depth in spread_depths(5):
        ids, passkey, used = build_prompt(Trial(2000, depth, 0), tokenizer, 1, 16)
        before, after = tokenizer.decode(ids).split(NEEDLE.format(key=passkey))
        filler = len(before) - len(TASK), len(after) - len("What is the pass key? The pass key is")
        assert used == depth and abs(filler[0] / sum(filler) - depth) < 0.01
    assert spread_depths(5) == [0, 0.25, 0.5, 0.75, 1] and spread_depths(1) == [0.5]
    random_depths = [build_prompt(Trial(600, None, i), tokenizer, 1, 16)[2] for i in range(40)]
    assert min(random_depths) < 0.15 and max(random_depths) > 0.85


def test_trials_follow_from_the_seed_alone(tokenizer):
    """Catches: numbers that depend on the order of the trials, so that a resumed run asks other questions."""
    plan = plan_trials([500, 600], [None], 8)
    forward = [build_prompt(trial, tokenizer, 1, 16) for trial in plan]
    backward = [build_prompt(trial, tokenizer, 1, 16) for trial in reversed(plan)]
    keys = [key for _, key, _ in forward]
    assert forward == backward[::-1] and len(set(keys)) > 12 and 1 <= min(keys) <= max(keys) <= LARGEST_KEY
    assert keys != [build_prompt(trial, tokenizer, 2, 16)[1] for trial in plan]


def test_every_trial_reads_the_haystack_from_another_place(tokenizer):
    """Catches: ten trials that are one, since the same words surround the needle."""
    prompts = [build_prompt(Trial(500, 0.5, i), tokenizer, 1, 16, split_words(STORY))[0] for i in range(3)]
    assert len({tokenizer.decode(ids)[len(TASK) + 1 :][:30] for ids in prompts}) == 3


def test_the_largest_that_fits_is_found_in_few_looks():
    """Catches: an off-by-one at the border, and a search that tokenises a long text dozens of times."""
    chance = random.Random(3)
    for _ in range(200):
        sizes = [chance.randint(0, 30)]
        for _ in range(chance.randint(1, 400)):
            sizes.append(sizes[-1] + chance.randint(1, 9))
        budget, looks = chance.randint(0, sizes[-1] + 9), []
        found = largest_fitting(lambda n, s=sizes, seen=looks: seen.append(n) or s[n], budget, len(sizes) - 1)
        assert found == max((n for n, size in enumerate(sizes) if size <= budget), default=-1)
        assert len(looks) <= 14


@pytest.mark.parametrize(
    "text, answer, complete",
    [
        (" 4711.", 4711, True), ("4711", 4711, False), ("The pass key is 12. Not 13.", 12, True), ("007 ", 7, True),
        ("no idea", None, False), ("", None, False), ("4 711", 4, True),
    ],
)  # fmt: skip
def test_the_answer_is_the_first_number(text, answer, complete):
    """Catches: token ids compared instead of digits, and an answer that is judged before its last digit came."""
    assert find_answer(text) == answer and is_answered(text) == complete


@pytest.fixture
def oracle(monkeypatch, tokenizer) -> Callable[..., list]:
    """Replaces generate: right up to `knows` tokens, else off by one; Ctrl-C arrives in call number `interrupt`."""

    def install(knows: int, interrupt: int | None = None) -> list:
        calls = []

        def answer(gpt, ids, max_new_tokens, stop_tokens, session, should_stop):
            calls.append(len(ids))
            if len(calls) == interrupt:
                signal.raise_signal(signal.SIGINT)
                assert should_stop()
            passkey = int(re.search(r"key is (\d+)", tokenizer.decode(ids)).group(1))
            yield from tokenizer.encode(f" {passkey + (len(ids) > knows)}.", bos=False)

        monkeypatch.setattr(lit_swa.generate, "generate", answer)
        return calls

    return install


def arguments(tiny_checkpoint, tmp_path, *more: str) -> list[str]:
    output = tmp_path / "deep" / "result.json"
    return ["--checkpoint_dir", str(tiny_checkpoint), "--output", str(output), "--model.block_size", "2048", *more]


def test_scores_are_what_the_answers_deserve(tiny_checkpoint, tmp_path, monkeypatch, capsys, oracle):
    """Catches: wrong cells in the table, a score that counts another length's trials, no picture."""
    pytest.importorskip("matplotlib")
    oracle(knows=450)
    needle = ["--task", "needle", "--lengths", "[600,450]", "--depths", "3", "--trials", "2"]
    assert run(SCRIPT, arguments(tiny_checkpoint, tmp_path, *needle), monkeypatch) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| depth | 450 tokens | 600 tokens |"
    assert table[2:] == [f"| {name} | 100% | 0% |" for name in ("0%", "50%", "100%", "all")]
    content = json.loads((tmp_path / "deep/result.json").read_text())
    assert len(content["trials"]) == 12 and content["accuracy"][0] == {
        "length": 450, "depth": 0.0, "trials": 2, "accuracy": 1.0,
    }  # fmt: skip
    for trial in content["trials"]:
        assert int(re.search(r"\d+", trial["answer"]).group()) - trial["expected"] == (trial["length"] == 600)
    assert content["arguments"]["seed"] == 1234 and "--depths 3" in content["command"] and "torch" in content["machine"]
    assert (tmp_path / "deep/result.png").stat().st_size > 5000


def test_an_interrupted_run_goes_on_and_a_complete_one_is_not_repeated(
    tiny_checkpoint, tmp_path, monkeypatch, capsys, oracle
):
    """Catches: lost trials, a trial that was cut short and counted, other results after a resume, a second run."""
    wanted = arguments(tiny_checkpoint, tmp_path / "whole", "--lengths", "[400,500]", "--trials", "3")
    oracle(knows=450)
    assert run(SCRIPT, wanted, monkeypatch) == 0
    whole = capsys.readouterr().out
    cut = arguments(tiny_checkpoint, tmp_path / "cut", "--lengths", "[400,500]", "--trials", "3")
    oracle(knows=450, interrupt=3)
    assert run(SCRIPT, cut, monkeypatch) == 130
    printed = capsys.readouterr()
    assert printed.out == "" and "2 of 6 trials are kept" in printed.err
    assert not (tmp_path / "cut/deep/result.json").exists()
    calls = oracle(knows=450)
    assert run(SCRIPT, cut, monkeypatch) == 0
    assert len(calls) == 4 and capsys.readouterr().out == whole
    results = [json.loads((tmp_path / name / "deep/result.json").read_text()) for name in ("whole", "cut")]
    assert results[0]["trials"] == results[1]["trials"]
    assert run(SCRIPT, cut, monkeypatch) == 0
    assert len(calls) == 4 and capsys.readouterr().out == whole


def test_a_real_model_answers_something(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """Catches: a call of generate that does not fit, a window that is refused a length beyond the context."""
    window = ["--model.attention", "sliding", "--model.sliding_window_size", "32", "--model.rolling_kv_cache", "true"]
    more = ["--lengths", "[700]", "--trials", "2", "--use_chat_template", "true", "--model.block_size", "512", *window]
    assert run(SCRIPT, arguments(tiny_checkpoint, tmp_path, *more), monkeypatch) == 0
    assert capsys.readouterr().out.startswith("| depth | 700 tokens |")
    trials = json.loads((tmp_path / "deep/result.json").read_text())["trials"]
    assert len(trials) == 2 and all(trial["answer"] for trial in trials)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--lengths", "[100]"], "length of 100 tokens is too short"),
        (["--lengths", "[4000]"], "more than the context of 2048"),
        (["--lengths", "[]"], "no length"),
        (["--lengths", "[-5]"], "lengths=-5"),
        (["--depths", "4"], "no effect with the task passkey"),
        (["--task", "needle", "--depths", "0"], "depths=0"),
        (["--task", "haystack"], "haystack"),
        (["--trials", "0"], "trials=0"),
        (["--max_new_tokens", "0"], "max_new_tokens=0"),
        (["--haystack", "{tmp}/none.txt"], "no file"),
        (["--haystack", "{tmp}/short.txt", "--lengths", "[600]"], "has 3 words, too few"),
        (["--haystack", "{tmp}/latin.txt"], "no UTF-8"),
        (["--output", "{tmp}/a.png"], "picture"),
        (["--model.attention", "wide"], "wide"),
    ],
)
def test_bad_input_is_refused_in_one_sentence_before_anything_runs(
    more, message, tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    """Catches: a traceback, or an hour of trials before the length that the model cannot take."""
    (tmp_path / "short.txt").write_text("only three words")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin1"))
    more = [part.replace("{tmp}", str(tmp_path)) for part in more]
    assert run(SCRIPT, arguments(tiny_checkpoint, tmp_path, *more), monkeypatch) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == "" and len(printed.err.strip().splitlines()) == 1
    assert not (tmp_path / "deep").exists()
