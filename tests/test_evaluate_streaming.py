"""Long texts and long chats through one cache: the same perplexity however it is fed, nothing read twice."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from test_scripts import run
from torch.nn.functional import cross_entropy

import lit_swa.generate
from lit_swa import GPT
from lit_swa.checkpoint import load_model
from lit_swa.texts import read_questions
from lit_swa.tokenizer import Tokenizer

SCRIPT = "scripts/evaluate_streaming.py"
QUESTIONS = Path(__file__).with_name("questions.jsonl")
STORY = "".join(f"In year {n} the lazy dog, {n * n} of them, jumps over the quick brown fox. " for n in range(1, 60))


@pytest.fixture
def stream(tiny_checkpoint, tmp_path, monkeypatch):
    """Runs the script on the story; returns its results."""
    (tmp_path / "story.txt").write_text(STORY)

    def start(*more: str, name: str = "r.json", code: int = 0) -> dict:
        arguments = ["--checkpoint_dir", str(tiny_checkpoint), "--output", str(tmp_path / name), *more]
        if "--chat" not in more:
            arguments += ["--data", str(tmp_path / "story.txt")]
        assert run(SCRIPT, arguments, monkeypatch) == code
        return json.loads((tmp_path / name).read_text()) if code == 0 else {}

    return start


def whole_nll(tiny_checkpoint: Path, tokens: int, **fields) -> torch.Tensor:
    """Each position's loss when the sequence is read in one call, without a cache."""
    ids = torch.tensor(Tokenizer(tiny_checkpoint).encode(STORY)[: tokens + 1])
    model = load_model(tiny_checkpoint, **fields)
    with torch.no_grad():
        logits = model(ids[None, :-1])[0, :, : model.config.vocab_size]
    return cross_entropy(logits, ids[1:], reduction="none")


@pytest.mark.parametrize("chunk", [1, 7, 300])
def test_token_by_token_or_in_chunks_it_is_the_perplexity_of_one_call(stream, tiny_checkpoint, chunk):
    """Catches: a target off by one, a token scored twice at a border, a cache that depends on how it is fed."""
    more = ["--sinks", "[0]", "--cache_size", "24", "--max_tokens", "110", "--bucket_size", "30"]
    content = stream(*more, "--chunk_size", str(chunk), "--model.block_size", "70")
    window, full = content["methods"]
    assert (window["name"], window["tokens"], full["name"], full["tokens"]) == ("window 24", 110, "full", 70)
    wanted = whole_nll(tiny_checkpoint, 110, attention="sliding", sliding_window_size=24)
    for method, losses in ((window, wanted), (full, whole_nll(tiny_checkpoint, 70))):
        assert method["nll"] == pytest.approx(losses.mean().item(), rel=1e-5)
        assert method["ppl"] == pytest.approx(math.exp(method["nll"]))
        for bucket in method["buckets"]:
            part = losses[bucket["start"] : bucket["stop"]]
            assert bucket["nll"] == pytest.approx(part.mean().item(), rel=1e-5) and bucket["ms_per_token"] > 0
        assert [b["start"] for b in method["buckets"]] == list(range(0, method["tokens"], 30))


def test_sinks_are_compared_under_one_budget_of_keys(stream, tiny_checkpoint):
    """Catches: sinks on top of the cache's size, a setting that runs with another's fields."""
    more = ["--sinks", "[1,4]", "--cache_size", "24", "--max_tokens", "110", "--own_attention", "false"]
    one, four = stream(*more, "--chunk_size", "5")["methods"]
    assert (one["name"], four["name"]) == ("1 sink + 23", "4 sinks + 20")
    for n, method in ((1, one), (4, four)):
        losses = whole_nll(
            tiny_checkpoint, 110, attention="streaming", n_sink_tokens=n, sliding_window_size=24 - n,
            rolling_kv_cache=True,
        )  # fmt: skip
        assert method["nll"] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert one["nll"] != four["nll"]
    by_one = stream(*more, name="one.json")["methods"]
    assert [m["nll"] for m in by_one] == pytest.approx([one["nll"], four["nll"]], rel=1e-4)


def test_a_window_costs_the_same_however_long_the_text(stream, capsys):
    """Catches: a cache that grows with the text, a full cache that is not stopped, or stops without notice."""
    more = ["--sinks", "[0]", "--cache_size", "24", "--chunk_size", "64"]
    short, full = stream(*more, "--max_tokens", "200", name="short.json")["methods"]
    capsys.readouterr()
    long, longer_full = stream(*more, "--max_tokens", "0", name="long.json")["methods"]
    printed = capsys.readouterr()
    assert long["tokens"] > 1500 and long["cache_bytes"] == short["cache_bytes"] < full["cache_bytes"]
    assert longer_full["tokens"] == 512 and "full: stops at its context, 512 of" in printed.err
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.out.splitlines()]
    assert table[0][:4] == ["cache", "tokens", "ppl of the first 512", "ppl"] and len(table) == 4
    assert table[2][:2] == ["window 24", str(long["tokens"])] and table[3][:2] == ["full", "512"]
    assert table[3][2] == table[3][3] and table[2][2] != table[2][3]


def test_a_picture_is_drawn(stream, tmp_path):
    """Catches: a run that ends without its picture."""
    pytest.importorskip("matplotlib")
    stream("--sinks", "[0]", "--cache_size", "24", "--chunk_size", "64", "--max_tokens", "300", "--bucket_size", "64")
    assert (tmp_path / "r.png").stat().st_size > 5000


def test_finished_caches_are_kept_when_a_run_is_interrupted(stream, monkeypatch, capsys):
    """Catches: an hour's row lost to Ctrl-C, a row cut short that counts as done, a complete run that starts again."""
    more = ["--sinks", "[0]", "--cache_size", "24", "--chunk_size", "64", "--max_tokens", "300"]
    plain, runs = GPT.set_kv_cache, []

    def set_kv_cache(*arguments, **keywords):  # called once for each cache, when Ctrl-C is only noted
        runs.append(arguments)
        if len(runs) == 2:
            signal.raise_signal(signal.SIGINT)
        return plain(*arguments, **keywords)

    monkeypatch.setattr(GPT, "set_kv_cache", set_kv_cache)
    stream(*more, code=130)
    printed = capsys.readouterr()
    assert "1 of 2 caches are kept" in printed.err and printed.out == ""
    content = stream(*more)
    assert len(runs) == 3 and [m["tokens"] for m in content["methods"]] == [300, 300]
    table = capsys.readouterr().out
    assert stream(*more) == content and len(runs) == 3 and capsys.readouterr().out == table


WINDOW = ["--chat", str(QUESTIONS), "--sinks", "[0]", "--cache_size", "24", "--max_gen", "8"]


@pytest.mark.parametrize("sinks", [0, 3])
def test_a_chat_is_one_conversation_of_which_nothing_is_read_twice(stream, sinks, tiny_checkpoint, monkeypatch, capsys):
    """Catches: a cache emptied between questions, a turn fed again, an answer that another reading would change."""
    fed, plain = [], GPT.forward

    def forward(self, idx, *arguments, **keywords):
        fed.append(idx[0].tolist())
        return plain(self, idx, *arguments, **keywords)

    monkeypatch.setattr(GPT, "forward", forward)
    content = stream(*WINDOW[:2], "--sinks", f"[{sinks}]", *WINDOW[4:])
    out, answers = capsys.readouterr().out, content["answers"]
    assert [(a["question_id"], a["turn"]) for a in answers] == [
        (1, 1), (1, 2), ("letter", 1), ("letter", 2), ("letter", 3), (4, 1), (5, 1),
    ]  # fmt: skip
    ids = [token for call in fed for token in call]
    assert content["tokens"] - len(ids) in (0, 1)  # the very last token need not be fed
    assert len({a["cache_bytes"] for a in answers}) == 1 and content["tokens"] > 10 * 24
    assert all(f"{a['question']}\n{a['answer']}\n" in out for a in answers)
    last = answers[-1]
    begun = last["tokens_so_far"] - last["new_tokens"]
    kind = {"attention": "streaming", "n_sink_tokens": sinks} if sinks else {"attention": "sliding"}
    model = load_model(tiny_checkpoint, **kind, sliding_window_size=24 - sinks, rolling_kv_cache=True)
    again = list(lit_swa.generate.generate(model, ids[:begun], last["new_tokens"]))
    assert Tokenizer(tiny_checkpoint).decode(again) == last["answer"]


def test_the_turns_are_laid_out_by_the_chat_template(stream, tiny_checkpoint, monkeypatch):
    """Catches: an answer that is not closed, a header missing, a system prompt in every turn."""
    tokenizer, prompts = Tokenizer(tiny_checkpoint), []

    def fine(gpt, ids, *arguments, **keywords):
        prompts.append(list(ids))
        yield from tokenizer.encode("fine", bos=False)

    monkeypatch.setattr(lit_swa.generate, "generate", fine)
    stream(*WINDOW)
    messages = []
    for prompt, question in zip(prompts, read_questions(QUESTIONS), strict=True):
        messages.append({"role": "user", "content": question["question"]})
        assert prompt == tokenizer.apply_chat_template(messages)
        messages.append({"role": "assistant", "content": "fine"})


def test_an_interrupted_chat_goes_on_with_the_same_answers(stream, monkeypatch, capsys):
    """Catches: answers lost, or a conversation that is another one after the interruption."""
    whole = stream(*WINDOW, name="whole.json")
    out = capsys.readouterr().out
    plain, calls = lit_swa.generate.generate, []

    def interrupted(*arguments, **keywords):
        calls.append(arguments)
        for i, token in enumerate(plain(*arguments, **keywords)):
            if len(calls) == 4 and i == 2:
                signal.raise_signal(signal.SIGINT)
            yield token

    monkeypatch.setattr(lit_swa.generate, "generate", interrupted)
    stream(*WINDOW, code=130)
    assert "3 answers are kept" in capsys.readouterr().err
    content = stream(*WINDOW)
    assert len(calls) == 8 and capsys.readouterr().out == out
    assert [a["answer"] for a in content["answers"]] == [a["answer"] for a in whole["answers"]]
    assert stream(*WINDOW) == content and capsys.readouterr().out == out


def test_a_full_cache_ends_the_chat_at_its_context(stream, capsys):
    """Catches: a traceback when the context is full, or the answers until then lost."""
    content = stream(
        "--chat", str(QUESTIONS), "--own_attention", "true", "--max_gen", "60", "--model.block_size", "256"
    )
    assert 1 <= len(content["answers"]) < 7 and "context of 256 tokens is full" in content["stopped"]
    assert content["tokens"] <= 257 and "goes on for ever" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"turns": ["a"', "line 3 is no JSON"),
        ("[" * 100_000, "line 3 is no JSON"),
        ('{"question": "a"}', "line 3 asks nothing"),
        ('{"turns": []}', "line 3 asks nothing"),
        ('{"turns": ["a", 5]}', "line 3 asks nothing"),
        ("17", "line 3 asks nothing"),
    ],
)
def test_a_broken_line_is_named(line, message, stream, tmp_path, capsys):
    """Catches: a traceback, or a message that leaves the reader to search a long file."""
    (tmp_path / "chat.jsonl").write_text('\ufeff"one"\n\n' + line + "\n")
    stream("--chat", str(tmp_path / "chat.jsonl"), code=2)
    printed = capsys.readouterr()
    assert message in printed.err and len(printed.err.strip().splitlines()) == 1 and printed.out == ""


@pytest.mark.parametrize(
    "more, message",
    [
        (["--sinks", "[512]"], "sinks=512"),
        (["--sinks", "[-1]"], "sinks=-1"),
        (["--sinks", "[]", "--own_attention", "false"], "0 caches to run"),
        (["--own_attention", "false", "--model.attention", "full"], "model.attention=full has no effect"),
        (["--max_gen", "5"], "no effect with --data"),
        (["--chunk_size", "0"], "chunk_size=0"),
        (["--chat", str(QUESTIONS), "--chunk_size", "5"], "no effect with --chat"),
        (["--chat", str(QUESTIONS), "--sinks", "[0,0,2]"], "give one"),
        (["--chat", "nowhere.jsonl"], "no file"),
        (["--output", "a.png"], "picture"),
        (["--sinks", "[0]", "--model.n_head", "5"], "n_head=5"),
        (["--data", "empty.txt", "--sinks", "[0]"], "no file"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(more, message, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """Catches: a traceback, or an argument that is accepted and not used."""
    (tmp_path / "story.txt").write_text(STORY)
    data = [] if "--chat" in more else ["--data", str(tmp_path / "story.txt")]
    arguments = ["--checkpoint_dir", str(tiny_checkpoint), "--output", str(tmp_path / "r.json"), *data, *more]
    assert run(SCRIPT, arguments, monkeypatch) == 2
    printed = capsys.readouterr()
    assert message in printed.err and len(printed.err.strip().splitlines()) == 1 and printed.out == ""
