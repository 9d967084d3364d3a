"""Batches: every row is the text that it would be alone, and a file of answers is whole, whatever ended the run."""

import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import forked
import pytest
import torch

from lit_swa import GPT, batches
from lit_swa.arguments import Generation
from lit_swa.batches import Answer, Batch, Request, in_order
from lit_swa.checkpoint import load_model
from lit_swa.generate import NonFiniteLogits, Sampling, Stats, generate, generate_text
from lit_swa.prompt_files import AnswerFile, read_prompts, to_requests
from lit_swa.tokenizer import Tokenizer

WINDOW = {"attention": "sliding", "sliding_window_size": 7}
FIELDS = {
    "full": {},
    "sliding": WINDOW,
    "rolling": WINDOW | {"rolling_kv_cache": True},
    "mixed": WINDOW | {"attention": "sliding,full", "rolling_kv_cache": True},
    "streaming": {"attention": "streaming", "sliding_window_size": 5, "n_sink_tokens": 3},
    "dual_chunk": {"attention": "dual_chunk", "dual_chunk_pretraining_length": 12},
    "temperature": {
        "attention": "dual_chunk",
        "dual_chunk_pretraining_length": 12,
        "dual_chunk_temperature_slope": 0.1,
    },
    "linear": {"attention": "linear,full", "linear_window": 5, "linear_sinks": 2, "linear_gate": True},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9}},
}
SAMPLED = Sampling(0.8, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
STOPS = [5, [6, 7]]


def some_requests(n: int, vocab_size: int = 97) -> list[Request]:
    """Prompts of 1 to 24 tokens whose answers have 0 to 24, each with a seed of its own."""
    rng = random.Random(n)
    lengths = [(1, 9), (24, 0), (1, 1), *((rng.randint(1, 24), rng.randint(1, 24)) for _ in range(n - 3))]
    return [Request([rng.randrange(vocab_size) for _ in range(a)], b, i) for i, (a, b) in enumerate(lengths)]


def alone(model: GPT, request: Request, sampling: Sampling) -> list[int]:
    own = replace(sampling, seed=request.seed)
    return list(generate(model, request.ids, request.max_new_tokens, sampling=own, stop_tokens=STOPS))


@pytest.mark.parametrize("sampling", [Sampling(repetition_penalty=1.3), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", FIELDS)
def test_rows_are_single_runs(tiny_model, name, sampling):
    """Catches: a row that sees another's keys, position, random numbers, penalties or stop, or what a text before it in
    its row has left; in steps that know no positions, with results that arrive a step late and texts that move, too."""
    model, requests = tiny_model(**FIELDS[name]), some_requests(9)
    expected = [alone(model, request, sampling) for request in requests]
    for rows, lag, fixed, together in ((1, 0, False, 1), (4, 1, True, 3), (3, 0, True, 1)):
        model.fixed_shape_steps = fixed
        batch = Batch(model, requests, sampling, batch_size=rows, stop_tokens=STOPS)
        batch.lag, batch.together, seen = lag, together, []
        answers = dict(batch.run(progress=seen.append))
        assert [answers[i].tokens for i in range(9)] == expected
        assert seen[-1] == sum(answer.new_tokens for answer in answers.values()) == batch.new_tokens
        assert batch.rows == rows and batch.active == 0 and batch.answered == 9


def test_the_order_of_prompts_changes_no_answer(tiny_model):
    """Catches: answers that depend on what else is in the batch."""
    model, requests = tiny_model(**FIELDS["streaming"]), some_requests(9)
    expected = dict(Batch(model, requests, SAMPLED, batch_size=4).run())
    order = random.Random(2).sample(range(9), 9)
    got = dict(Batch(model, [requests[i] for i in order], SAMPLED, batch_size=4).run())
    assert {i: got[n].tokens for n, i in enumerate(order)} == {i: a.tokens for i, a in expected.items()}


def test_why_an_answer_ends(tiny_model):
    """Catches: a full context called max_new_tokens, a stop that counts as text, a stop cut off by the last token."""
    model = tiny_model(block_size=32)
    free = [t.tokens for _, t in in_order(Batch(model, [Request(list(range(9)), 8)]).run())][0]
    requests = [Request(list(range(9)), n) for n in (100, 8, 3)]
    for stop, ends in ((None, ["context", "length", "length"]), (free[3], ["stop", "stop", "length"])):
        batch = Batch(model, requests, stop_tokens=[] if stop is None else [stop])
        answers = [answer for _, answer in in_order(batch.run())]
        assert [answer.ended for answer in answers] == ends
    assert answers[0] == Answer(free[:3], "", 4, "stop") and answers[2].tokens == free[:3]
    assert [a.tokens for a in dict(Batch(model, requests[1:2], stop_tokens=[[free[7], 1]]).run()).values()] == [free]


def test_prompts_that_are_to_have_no_answer_hide_no_others(tiny_model):
    """Catches: a run that ends where nothing is left to be done for the moment."""
    requests = [Request([1], n) for n in (0, 0, 2, 0, 0, 1, 0)]
    answers = [answer for _, answer in in_order(Batch(tiny_model(), requests, batch_size=1).run())]
    assert [answer.new_tokens for answer in answers] == [0, 0, 2, 0, 0, 1, 0]


def test_texts_and_their_stops_are_those_of_single_runs(tiny_checkpoint):
    """Catches: a stop of one row that ends another, a space lost at the start, half a character, text behind a stop."""
    model, tokenizer = load_model(tiny_checkpoint), Tokenizer(tiny_checkpoint)
    how = {"tokenizer": tokenizer, "stop_tokens": tokenizer.eos_ids}

    def text_of(request: Request, stats: Stats) -> str:
        arguments = {"stop": request.stop, "continues": request.continues, "max_new_tokens": request.max_new_tokens}
        arguments |= {"sampling": replace(SAMPLED, seed=request.seed), "stop_tokens": tokenizer.eos_ids, "stats": stats}
        return "".join(generate_text(model, tokenizer, request.ids, **arguments))

    prompts = [tokenizer.encode(p) for p in ("the quick brown", "fox", "\u00fc\u4f60", "jumps over", "the", "lazy dog")]
    prompts[2].pop()  # the prompt ends within a character
    begun = text_of(Request(prompts[4], 30, 4), Stats())[-1] + "zzz"  # a stop of which the text ends in the first half
    stops = [(), ("e",), (" ", "\n"), ("th", "the"), (begun,), ("\ufffd",)]
    requests = [Request(ids, 30, i, s) for i, (ids, s) in enumerate(zip(prompts, stops, strict=True))]
    requests[1::2] = [r._replace(continues=False) for r in requests[1::2]]
    answers = dict(Batch(model, requests, SAMPLED, batch_size=4, **how).run())
    for i, request in enumerate(requests):
        stats = Stats()
        assert answers[i].text == text_of(request, stats)
        assert answers[i].new_tokens == stats.new_tokens and (answers[i].ended == "stop") == (not stats.cut)
    assert {a.ended for a in answers.values()} == {"stop", "length"}


def test_prompts_are_read_in_calls_of_several_tokens(tiny_model, monkeypatch):
    """Catches: a call of one token outside the compiled step, which would compile for each number of rows."""
    monkeypatch.setattr(batches, "SMALLEST_CHUNK", 4)
    model, seen, steps = tiny_model(), [], []
    requests = [Request(list(range(n)), 3, 0) for n in (1, 1, 9, 13, 5, 4, 17, 1, 2)]
    expected = [alone(model, request, Sampling()) for request in requests]

    def decode(token, pos):
        steps.append(token.shape)
        return model(token, pos)

    forward = GPT.forward
    monkeypatch.setattr(
        GPT, "forward", lambda self, idx, *a, **k: (seen.append(idx.shape), forward(self, idx, *a, **k))[1]
    )
    batch = Batch(model, requests, batch_size=3, decode=decode, stop_tokens=STOPS)
    batch.chunk = 4
    batch.warm_up()
    assert [a.tokens for _, a in in_order(batch.run())] == expected
    assert set(steps) == {(3, 1)} and len([s for s in seen if s[1] == 1]) == len(steps)


def test_a_batch_is_stopped_between_steps_and_refuses_what_is_no_number(tiny_model):
    """Catches: a run that cannot be ended, and answers made of NaN."""
    model, calls = tiny_model(), iter([False] * 3 + [True])
    assert list(Batch(model, [Request([1, 2], 50)] * 4).run(lambda: next(calls))) == []
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(NonFiniteLogits, match="weights are damaged"):
        list(Batch(model, [Request([1, 2], 50)] * 2).run())


def test_a_batch_that_memory_does_not_hold_says_what_fits(tiny_model, monkeypatch):
    """Catches: a process that is killed, a batch that is smaller than was asked for without a word."""
    model, requests = tiny_model(), some_requests(30)
    monkeypatch.setattr(batches, "free_memory", lambda device: 2**18)
    fits = Batch(model, requests).rows
    made = model.kv_cache_bytes() + fits * 97 * batches.SCORE_BYTES
    assert 1 < fits < 16 and 2**17 < made < 2**18
    model.clear_kv_cache()
    assert Batch(model, requests, batch_size=fits).rows == fits
    model.clear_kv_cache()
    with pytest.raises(ValueError, match=f"batch_size={fits + 1} .* holds {fits} rows of .* use --batch_size {fits},"):
        Batch(model, requests, batch_size=fits + 1)
    assert not model.caches
    with pytest.raises(ValueError, match="batch_size=0"):
        Batch(model, requests, batch_size=0)
    with pytest.raises(ValueError, match="give a tokenizer"):
        Batch(model, [Request([1], stop=("x",))])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "streaming"])
def test_a_compiled_step_serves_all_rows(tiny_model, name):
    """Catches: a step that compiles again while rows come and go, and other tokens than the plain model's."""
    from torch._dynamo.utils import counters

    from lit_swa.fast_decode import compile_decode

    model, requests = tiny_model(**FIELDS[name]), some_requests(7)
    expected = [alone(model, request, SAMPLED) for request in requests]
    batch = Batch(model, requests, SAMPLED, batch_size=3, decode=compile_decode(model), stop_tokens=STOPS)
    batch.warm_up()
    graphs = counters["stats"]["unique_graphs"]
    assert [a.tokens for _, a in in_order(batch.run())] == expected
    assert counters["stats"]["unique_graphs"] == graphs


# --------------------------------------------------------------------------------------------------------------- files

PROMPTS = [
    {"prompt": "the quick", "id": 7},
    {"prompt": "brown", "id": {"a": ["\u00fc", None]}, "max_new_tokens": 3},
    {"messages": [{"role": "user", "content": "hello"}], "stop": "e"},
    {"prompt": "the quick", "id": 7},
    {"prompt": "x\ny", "seed": 3, "stop": ["th", "\n"], "half": "\ud83d"},
]


def write_lines(path: Path, lines: list) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().decode().splitlines()]


@pytest.fixture
def answer(run_script, tiny_checkpoint, tmp_path):
    """Runs generate/base.py on a file of prompts: (exit code, what stderr says, the answers' path)."""

    def run(prompts=PROMPTS, *more: object) -> tuple[int, str, Path]:
        path = prompts if isinstance(prompts, Path) else write_lines(tmp_path / "prompts.jsonl", prompts)
        files = ("--prompts", path, "--output", tmp_path / "out" / "answers.jsonl")
        code, out, err = run_script(
            "generate/base.py", "--checkpoint_dir", tiny_checkpoint, "--max_new_tokens", 12, *files, *more
        )
        assert out == ""
        return code, err, files[-1]

    return run


def test_each_line_is_answered_as_alone_and_in_order(answer, run_script, tiny_checkpoint):
    """Catches: answers that are mixed up, lost fields, a prompt's own stop, seed or length that is not used."""
    code, err, path = answer(PROMPTS, "--batch_size", 2)
    answers = read_lines(path)
    assert code == 0 and "5 answers" in err and "tok/s" in err and "2 rows" in err
    for n, (given, got) in enumerate(zip(PROMPTS, answers, strict=True)):
        assert {name: got[name] for name in given} == given and got["seed"] == given.get("seed", 1234 + n)
        assert got["finish_reason"] == "stop" or got["new_tokens"] == given.get("max_new_tokens", 12)
        if "messages" in given:
            continue
        stops = [part for text in given.get("stop", []) for part in ("--stop", json.dumps([text]))]
        _, out, _ = run_script(
            "generate/base.py", "--checkpoint_dir", tiny_checkpoint, "--prompt", given["prompt"], *stops,
            "--max_new_tokens", given.get("max_new_tokens", 12), "--seed", got["seed"],
        )  # fmt: skip
        assert out == given["prompt"] + got["completion"] + "\n"
    assert answers[0]["completion"] != answers[3]["completion"]  # the same prompt twice has two seeds


def test_several_prompts_are_printed_as_single_ones(run_script, tiny_checkpoint):
    """Catches: a prompt in brackets that becomes a list, a completion of another prompt, an order by length."""
    prompts = ["[the]", "- quick", "brown fox"]
    fixed = ("--checkpoint_dir", tiny_checkpoint, "--max_new_tokens", 9, "--num_samples", 2)
    each = [run_script("generate/base.py", *fixed, "--prompt", p)[1] for p in prompts]
    options = [part for prompt in prompts for part in ("--prompt", prompt)]
    code, out, err = run_script("generate/base.py", *fixed, *options, "--batch_size", 4)
    assert code == 0 and out == "".join(each) and "6 answers" in err and "4 rows" in err


def test_a_setting_that_no_prompt_has_is_named(tmp_path, capsys):
    """Catches: a file that asks for greedy text, as other programs read it, and is sampled without a word."""
    read_prompts(write_lines(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b", "temperature": 0, "id": 1}]))
    assert (
        capsys.readouterr().err
        == f'warning: {tmp_path}/p.jsonl line 2: "temperature" is not read: give --temperature.\n'
    )


def test_a_file_cut_at_any_byte_is_completed_to_the_same_bytes(tmp_path, tiny_checkpoint, monkeypatch):
    """Catches: an answer lost or doubled, half a line that stays, a line that is whole but for its end."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power is cut here, and it takes most of the time
    lines = read_prompts(write_lines(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "\u00fc"}]))
    requests = to_requests(lines, Tokenizer(tiny_checkpoint), Generation())
    record = {"prompts": str(tmp_path / "p.jsonl"), "prompts_sha256": "0", "arguments": {}}
    path = tmp_path / "a.jsonl"

    def go_on() -> int:
        answers = AnswerFile(path, lines, record)
        done = answers.done
        answers.open()
        for n in range(done, len(lines)):
            answers.add(requests[n], Answer([n], f"{n}\n\u00fc", n, "stop"))
        answers.close()
        return done

    assert go_on() == 0
    whole = path.read_bytes()
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        assert go_on() == whole[:size].count(b"\n")
        assert path.read_bytes() == whole


def test_a_run_goes_on_and_notices_that_it_is_another(answer, tmp_path):
    """Catches: answers of two models, prompts or settings in one file; a whole file that is answered again."""
    answer(PROMPTS)
    path = tmp_path / "out" / "answers.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\n") + 9])
    code, err, _ = answer(PROMPTS, "--batch_size", 3)  # which changes no answer
    assert code == 0 and "4 answers" in err and path.read_bytes() == whole
    code, err, _ = answer(PROMPTS)
    assert code == 0 and "holds all 5 answers already" in err and path.read_bytes() == whole
    for changed, message in (
        ((PROMPTS, "--temperature", "0.1"), "made with temperature 0.8, and this run has 0.1"),
        ((PROMPTS, "--model.attention", "sliding", "--model.sliding_window_size", "4"), "made with model null"),
        ((PROMPTS[:4],), "answers another file of prompts"),
    ):
        code, err, _ = answer(*changed)
        assert code == 2 and message in err and len(err.splitlines()) == 1 and path.read_bytes() == whole
    write_lines(tmp_path / "prompts.jsonl", PROMPTS)
    for damaged, message in (
        (whole.replace(b"brown", b"green"), "line 2 is no answer to"),
        (whole + whole, "more answers than there are prompts"),
        (b"{}\n", "line 1 is no answer to"),
    ):
        path.write_bytes(damaged)
        code, err, _ = answer(tmp_path / "prompts.jsonl")
        assert code == 2 and message in err and path.read_bytes() == damaged
    path.with_name("answers.jsonl.run.json").write_text("{")
    assert "answers.jsonl.run.json is damaged: give another --output" in answer(PROMPTS)[1]
    path.with_name("answers.jsonl.run.json").unlink()
    for foreign in (whole, b"a note without a line's end"):
        path.write_bytes(foreign)
        assert "and no answers.jsonl.run.json" in answer(PROMPTS)[1] and path.read_bytes() == foreign


def test_prompts_may_come_through_a_pipe(answer):
    """Catches: a file that is read twice, the second time to its end, so that all prompts are the same run's."""
    for prompts, code in ((PROMPTS, 0), (PROMPTS, 0), ([*PROMPTS, {"prompt": "more"}], 2)):
        read, write = os.pipe()
        os.write(write, "".join(json.dumps(line) + "\n" for line in prompts).encode())
        os.close(write)
        got, err, path = answer(Path(f"/dev/fd/{read}"))
        os.close(read)
        assert got == code and len(read_lines(path)) == len(PROMPTS)
    assert "answers another file of prompts" in err


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "holds no prompts"),
        ('\n{"prompt": "a"}\n{"prompt": "a"\n', "line 3 is no JSON"),
        ('{"prompt": "a"}\n["a"]\n', 'line 2 is a list: it must be an object like {"prompt"'),
        ('{"prompt": "a"}\n{"text": "a"}\n', 'line 2: it has neither "prompt" nor "messages"'),
        ('{"prompt": "a", "messages": []}\n', "line 1: it has both"),
        ('{"prompt": ""}\n', 'line 1: "prompt" must be a text'),
        ('{"prompt": 3}\n', 'line 1: "prompt" must be a text'),
        ('{"messages": []}\n', "line 1: The conversation is empty"),
        ('{"messages": "hi"}\n', 'line 1: "messages" must be a list of objects'),
        ('{"messages": [{"role": "user"}]}\n', 'must have a "role" and a "content"'),
        ('{"messages": [{"role": "user", "content": 3}]}\n', 'must have a "role" and a "content"'),
        ('{"messages": [{"role": null, "content": "a"}]}\n', 'must have a "role" and a "content"'),
        ('{"prompt": "a", "completion": "b"}\n', 'line 1: the answer has a field "completion" of its own'),
        ('{"prompt": "a", "max_new_tokens": true}\n', '"max_new_tokens" must be a whole number'),
        ('{"prompt": "a", "max_new_tokens": -1}\n', "line 1: max_new_tokens=-1"),
        ('{"prompt": "a", "seed": 1e3}\n', '"seed" must be a whole number'),
        ('{"prompt": "a", "stop": ["x", 3]}\n', '"stop" must be a text or a list of texts'),
        ('{"prompt": "a", "stop": ""}\n', "line 1: A stop is an empty text"),
        ('{"prompt": "a", "id": NaN}\n', "line 1: it holds NaN"),
        ('{"prompt": "a"}\n{"prompt": "caf\udce9"}\n', "line 2 is no UTF-8 text"),
        ('{"prompt": "a\\ud800"}\n', "line 1: "),
        (
            '{"prompt": "a"}\n{"prompt": "' + "a b " * 500 + '"}\n',
            "line 2: The prompt has 2000 tokens and the context 512",
        ),
    ],
)
def test_a_broken_line_is_named_before_anything_is_written(content, message, answer, tmp_path):
    """Catches: hours of answers in front of an error, a traceback, an output that only looks as if it were one."""
    (tmp_path / "p.jsonl").write_bytes(content.encode(errors="surrogateescape"))
    code, err, path = answer(tmp_path / "p.jsonl")
    assert code == 2 and message in err and len(err.splitlines()) == 1 and not path.exists()


def test_arguments_that_do_not_fit_each_other_are_refused(run_script, tiny_checkpoint, tmp_path):
    """Catches: an argument that is accepted and has no effect, prompts that the answers overwrite."""
    path = write_lines(tmp_path / "p.jsonl", PROMPTS)
    for arguments, message in (
        (("--prompts", path), "go together"),
        (("--output", path), "go together"),
        (("--prompts", path, "--output", path), "is the file of prompts"),
        (("--prompts", tmp_path / "none", "--output", tmp_path / "o"), "There is no file"),
        (("--prompts", path, "--output", tmp_path), "is no file"),
        (("--prompts", path, "--output", path / "o"), f"cannot be written, because of {path}"),
        (("--prompts", path, "--output", tmp_path / "o", "--prompt", "x"), "leave --prompt and --num_samples out"),
        (("--prompts", path, "--output", tmp_path / "o", "--num_samples", 2), "leave --prompt and --num_samples out"),
        (("--prompts", path, "--output", tmp_path / "o", "--batch_size", 10**9), "batch_size=1000000000 does not fit"),
        (("--prompt", "x", "--batch_size", 2), "--batch_size is for several prompts"),
    ):
        code, out, err = run_script("generate/base.py", "--checkpoint_dir", tiny_checkpoint, *arguments)
        assert code == 2 and message in err and len(err.splitlines()) == 1 and out == ""
    assert read_lines(path) == PROMPTS and os.listdir(tmp_path) == ["p.jsonl"]


def test_the_benchmark_counts_what_it_asked_for(run_script, tiny_checkpoint, tmp_path):
    """Catches: answers that end early and count in full, a ratio to another batch size than the first."""
    code, out, err = run_script(
        "scripts/benchmark_batches.py", "--checkpoint_dir", tiny_checkpoint, "--sequences", 5, "--rounds", 2,
        "--shortest", 3, "--longest", 9, "--batch_size", "[1,3]", "--output", tmp_path / "b.json",
    )  # fmt: skip
    one, three = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert code == 0 and "3 rows" in out and (one["sequences"], three["sequences"]) == (2, 5)
    assert 5 * 3 <= three["new_tokens"] <= 5 * 9 and three["steps"] < three["new_tokens"] < 3 * three["steps"] + 5
    assert three["ratio"] == three["tokens_per_second"] / one["tokens_per_second"] and one["ratio"] == 1


def test_ctrl_c_leaves_whole_answers_and_says_how_to_go_on(answer, monkeypatch):
    """Catches: a traceback, an answer that was cut off, answers out of order."""
    calls, step = [], Batch.step

    def interrupted_step(self):
        calls.append(1)
        if len(calls) == 20:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    whole = read_lines(answer(PROMPTS)[2])
    answer(PROMPTS)[2].unlink()
    monkeypatch.setattr(Batch, "step", interrupted_step)
    code, err, path = answer(PROMPTS, "--batch_size", 1)
    got = read_lines(path)
    assert code == 130 and 0 < len(got) < 5 and got == whole[: len(got)]
    assert f"{len(got)} of 5 prompts are answered: the same command goes on" in err
    assert answer(PROMPTS)[0] == 0 and read_lines(path) == whole


def test_a_killed_run_goes_on_with_no_answer_lost_or_doubled(answer, tiny_checkpoint, tmp_path):
    """Catches: a run that must begin again after kill -9, or whose last line is half of one."""
    prompts = write_lines(tmp_path / "prompts.jsonl", PROMPTS * 12)
    path = tmp_path / "out" / "answers.jsonl"
    arguments = ("--checkpoint_dir", tiny_checkpoint, "--max_new_tokens", 12, "--prompts", prompts, "--output", path)
    process = forked.start_script("generate/base.py", *arguments, log=tmp_path / "log")
    while process.is_alive() and not (path.exists() and path.read_bytes().count(b"\n")):
        time.sleep(0.001)
    process.kill()
    process.join()
    done = path.read_bytes().count(b"\n")
    assert 0 < done < 60
    code, err, _ = answer(prompts)
    answers = read_lines(path)
    assert code == 0 and f"{60 - done} answers" in err and len(answers) == 60
    assert [{name: a[name] for name in p} for p, a in zip(PROMPTS * 12, answers, strict=True)] == PROMPTS * 12
    path.unlink()
    answer(prompts)
    assert read_lines(path) == answers
