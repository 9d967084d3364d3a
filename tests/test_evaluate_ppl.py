"""Perplexity over windows: equal to the plainest computation; whole, in pieces, resumed, or in two processes."""

import functools
import itertools
import json
import math
import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import CONTEXT
from tiny import randomize, tiny_config

from lit_swa import GPT, evaluate
from lit_swa.checkpoint import convert_hf_checkpoint, load_model, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "scripts/evaluate_ppl.py"


@pytest.fixture
def ppl(run_script):
    """Run the script in this process: (exit code, stdout, stderr)."""
    return functools.partial(run_script, SCRIPT)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random Llama of transformers', the same as a checkpoint directory here, and 300 random token ids as a file."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(11)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    reference = transformers.LlamaForCausalLM(config).eval()
    randomize(reference)
    directory = tmp_path_factory.mktemp("llama")
    reference.save_pretrained(directory)
    convert_hf_checkpoint(directory)
    ids = np.random.default_rng(3).integers(0, 97, 300)
    ids.astype("<u2").tofile(directory / "ids.bin")
    return reference, directory, ids


def plain_sums(reference, ids, seq_len: int, stride: int, score: str) -> dict[int, list[float]]:
    """Position in the window -> the nll of every target there, window by window and token by token."""
    found: dict[int, list[float]] = {}
    for a in range(0, len(ids) - seq_len + 1, stride):
        window = torch.tensor(ids[a : a + seq_len])[None]
        log_p = reference(window).logits[0].double().log_softmax(-1)
        for p in range(1, seq_len):
            if score == "all" or p >= seq_len - stride:
                found.setdefault(p, []).append(-log_p[p - 1, window[0, p]].item())
    return found


@pytest.mark.parametrize("score", ["all", "last"])
@pytest.mark.parametrize("seq_len, stride, bucket", [(64, 64, None), (64, 16, 24), (60, 7, 1)])
@torch.no_grad()
def test_perplexity_equals_the_plain_sum_of_transformers_losses(llama, ppl, tmp_path, score, seq_len, stride, bucket):
    """Catches: targets shifted by one, a window too few or too many, tokens counted twice, a wrong bucket border."""
    reference, directory, ids = llama
    arguments = ["--checkpoint_dir", directory, "--data", directory / "ids.bin", "--seq_len", seq_len]
    arguments += ["--stride", stride, "--score", score, "--batch_size", 2, "--output", tmp_path / "o.json"]
    code, out, _ = ppl(*arguments, *([] if bucket is None else ["--bucket", bucket]))
    assert code == 0
    result, expected = json.loads((tmp_path / "o.json").read_text()), plain_sums(reference, ids, seq_len, stride, score)
    losses = list(itertools.chain(*expected.values()))
    assert result["tokens"] == len(losses) and result["score"] == score
    windows = (len(ids) - seq_len) // stride + 1
    assert len(losses) == windows * (seq_len - 1 if score == "all" else min(stride, seq_len - 1))
    assert result["nll"] == pytest.approx(np.mean(losses), rel=1e-5)  # float32 logits of another library
    assert result["ppl"] == pytest.approx(math.exp(result["nll"]), rel=1e-12)
    assert f"perplexity {result['ppl']:.4f}" in out and f"score {score}" in out
    size = bucket or 8
    grouped: dict[str, list[float]] = {}
    for p in sorted(expected):
        name = f"{p // size * size}-{min(p // size * size + size, seq_len) - 1}"
        grouped.setdefault(name, []).extend(expected[p])
    assert result["bucket_tokens"] == {name: len(values) for name, values in grouped.items()}
    assert result["buckets"] == pytest.approx({n: math.exp(np.mean(v)) for n, v in grouped.items()}, rel=1e-4)


def test_a_text_is_its_tokens_and_several_are_joined_in_order(tiny_checkpoint, ppl, tmp_path):
    """Catches: a text that is tokenised in another way than the tokenizer does, files that are dropped or reordered."""
    from lit_swa.tokenizer import Tokenizer

    (tmp_path / "texts").mkdir()
    texts = {"b.txt": "The lazy dog\njumps over é ", "a.txt": "the quick brown fox <|im_end|>" * 6}
    for name, text in texts.items():
        (tmp_path / "texts" / name).write_bytes(text.encode())
    tokenizer = Tokenizer(tiny_checkpoint)
    ids = {name: tokenizer.encode(text) for name, text in texts.items()}
    np.array(ids["a.txt"] + ids["b.txt"], dtype="<u2").tofile(tmp_path / "ids.bin")
    sources = [tmp_path / "ids.bin", tmp_path / "texts", [str(tmp_path / "texts" / n) for n in ("a.txt", "b.txt")]]
    results = []
    for i, source in enumerate(sources):
        output = tmp_path / f"{i}.json"
        fixed = ["--checkpoint_dir", tiny_checkpoint, "--seq_len", 20, "--stride", 5, "--output", output]
        data = json.dumps(source) if isinstance(source, list) else source
        assert ppl("--data", data, *fixed)[0] == 0
        result = json.loads(output.read_text())
        results.append((result["nll"], result["arguments"]["data_sha256"], result["arguments"]["data_tokens"]))
    assert results[0] == results[1] == results[2] and results[0][2] == sum(map(len, ids.values()))


@pytest.fixture(scope="module")
def with_bos(tiny_checkpoint, tmp_path_factory):
    """The tiny checkpoint, with a tokenizer that puts the tokens 1 and 2 in front of a text; its text, and the ids."""
    import shutil

    from tokenizers import Tokenizer, processors

    directory = tmp_path_factory.mktemp("bos") / "model"
    shutil.copytree(tiny_checkpoint, directory)
    tokenizer, names = Tokenizer.from_file(str(directory / "tokenizer.json")), ["<|im_start|>", "<|im_end|>"]
    parts, specials = " ".join(f"{name}:0" for name in names), [(name, i + 1) for i, name in enumerate(names)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{parts} $A:0", special_tokens=specials)
    tokenizer.save(str(directory / "tokenizer.json"))
    text = "the quick brown fox jumps over the lazy dog\n" * 12
    (directory / "text.txt").write_text(text)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text).ids == [1, 2, *ids]
    np.array([1, 2, *ids], dtype="<u2").tofile(directory / "ids.bin")
    return directory, ids


@pytest.mark.parametrize("score, stride", [("all", None), ("all", 7), ("last", 7), ("all", 20)])
@torch.no_grad()
def test_every_window_begins_as_a_text_does(with_bos, ppl, tmp_path, score, stride):
    """Catches: BOS in front of the first window alone, a token lost or read twice between windows, BOS as a target."""
    (directory, ids), T, model = with_bos, 20, load_model(with_bos[0])
    arguments = ["--checkpoint_dir", directory, "--data", directory / "text.txt", "--seq_len", T, "--score", score]
    arguments += [] if stride is None else ["--stride", stride]
    assert ppl(*arguments, "--max_tokens", 100, "--output", tmp_path / "o.json")[0] == 0
    step, losses = stride if stride == 7 else T - 2, []  # windows without overlap have T - 2 tokens of the text
    for a in range(0, 100 - (T - 2) + 1, step):
        row = torch.tensor([[1, 2, *ids[a : a + T - 2]]])
        log_p = model(row)[0, :, : model.config.vocab_size].log_softmax(-1)
        first = T - 7 if score == "last" else 2
        losses += [-log_p[p - 1, row[0, p]].item() for p in range(first, T)]
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["tokens"] == len(losses) and result["nll"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result["arguments"]["data_tokens"] == 100 and result["arguments"]["prefix"] == [1, 2]


@torch.no_grad()
def test_windows_of_a_token_file_begin_with_its_own_tokens(with_bos, ppl, tmp_path):
    """Catches: BOS added to LongLoRA's windows, which are cut as the ids stand."""
    (directory, ids), model = with_bos, load_model(with_bos[0])
    fixed = ["--checkpoint_dir", directory, "--seq_len", 20, "--max_tokens", 40, "--output", tmp_path / "o.json"]
    assert ppl("--data", directory / "ids.bin", *fixed)[0] == 0
    windows = torch.tensor([1, 2, *ids[:38]]).view(2, 20)
    expected = evaluate.window_nll(model, windows).mean().item()
    assert json.loads((tmp_path / "o.json").read_text())["nll"] == pytest.approx(expected, rel=1e-5)
    for n, seq_len in ((17, 20), (1, 2)):
        with pytest.raises(ValueError, match="no room" if seq_len == 2 else f"gives {n} tokens and a window has 18"):
            evaluate.full_windows(n, seq_len, seq_len, "all", prefix=(1, 2))


def test_a_great_perplexity_fits_a_line(llama, ppl, tmp_path):
    """Catches: 305 digits."""
    model = load_model(llama[1])
    model.lm_head.weight.data *= 1e4
    save_checkpoint(model, model.config, tmp_path / "wild")
    llama[2].astype("<u2").tofile(tmp_path / "wild" / "ids.bin")
    code, out, err = ppl(*arguments_for(tmp_path / "wild", tmp_path / "o.json"))
    assert code == 0 and "e+" in out and max(map(len, (out + err).splitlines())) < 160


WINDOWED = {"attention": "sliding,full", "sliding_window_size": 9}
ROLLING = {"attention": "sliding", "sliding_window_size": 9, "rolling_kv_cache": True}


@pytest.mark.parametrize("fields", [{}, WINDOWED, ROLLING], ids=["full", "mixed", "rolling"])
def test_a_window_in_chunks_gives_the_losses_of_one_call(tiny_model, fields):
    """Catches: a position or a target lost at a chunk's border, a window that sees what the last one left behind."""
    model = tiny_model(**fields)
    for _ in range(2):  # the second window comes after the first in the cache
        idx = torch.randint(0, 97, (2, 41))
        whole = evaluate.window_nll(model, idx, first=3)
        assert whole.shape == (2, 38)
        for chunk_size in (1, 3, 40):
            in_chunks = evaluate.window_nll(model, idx, first=3, chunk_size=chunk_size)
            torch.testing.assert_close(in_chunks, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk_size", [0, 10])
def test_logits_are_made_in_pieces_and_only_of_what_is_scored(tiny_model, monkeypatch, chunk_size):
    """Catches: (T, V) logits of a long text in memory at once, and work on logits that nobody asked for."""
    model, projected = tiny_model(), []
    project = model.project
    monkeypatch.setattr(model, "project", lambda x: projected.append(x.shape[:2].numel()) or project(x))
    idx = torch.randint(0, 97, (2, 50))
    expected = evaluate.window_nll(model, idx, first=21)
    assert projected == [2 * 29]
    projected.clear()
    monkeypatch.setitem(evaluate.PROJECT_ELEMENTS, "cpu", 2 * 97 * 4)
    torch.testing.assert_close(evaluate.window_nll(model, idx, 21, chunk_size), expected, rtol=1e-4, atol=1e-4)
    assert sum(projected) == 2 * 29 and max(projected) <= 2 * 4


def test_padding_rows_of_the_vocabulary_have_no_probability():
    """Catches: a softmax over rows of the embedding that are no tokens, which makes every perplexity too high."""
    config = tiny_config(padded_vocab_size=128)
    model = GPT(config).eval()
    randomize(model)
    idx = torch.randint(0, 97, (1, 30))
    with torch.no_grad():
        expected = -model(idx)[:, :-1, :97].log_softmax(-1).gather(-1, idx[:, 1:, None])[..., 0]
    torch.testing.assert_close(evaluate.window_nll(model, idx), expected)


# ------------------------------------------------------------------------------------------------- interrupted, resumed


def arguments_for(directory: Path, output: Path) -> list[object]:
    fixed = ["--checkpoint_dir", directory, "--data", directory / "ids.bin", "--seq_len", 40, "--stride", 20]
    return [*fixed, "--score", "last", "--batch_size", 2, "--output", output]


def results_of(output: Path) -> dict:
    content = json.loads(output.read_text())
    return {
        name: content[name] for name in ("arguments", "ppl", "nll", "tokens", "buckets", "bucket_tokens", "windows")
    }


def test_an_interrupted_run_goes_on_to_the_same_result(llama, ppl, tmp_path, monkeypatch):
    """Catches: windows lost or read twice, sums rounded on the way through the file, a result published half-done."""
    directory, output, calls, whole = llama[1], tmp_path / "o.json", [], tmp_path / "whole.json"
    arguments, window_nll = arguments_for(directory, output), evaluate.window_nll
    assert ppl(*arguments_for(directory, whole))[0] == 0

    def interrupted_at_third(*a):
        calls.append(a)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return window_nll(*a)

    monkeypatch.setattr(evaluate, "window_nll", interrupted_at_third)
    code, out, err = ppl(*arguments)
    assert code == 130 and out == "" and "6 of 14 windows are kept" in err
    assert not output.exists() and (tmp_path / "o.json.partial").exists()
    code, out, err = ppl(*arguments)
    assert code == 0 and "going on from" in err and ": 3 parts are done" in err and len(calls) == 7
    first, second = results_of(output), results_of(whole)
    assert first == second and not (tmp_path / "o.json.partial").exists()
    code, again, err = ppl(*arguments)
    assert code == 0 and again == out and "holds the result of these arguments already" in err and len(calls) == 7


def test_a_changed_argument_file_or_weight_is_another_run(llama, tmp_path, ppl, monkeypatch):
    """Catches: an old result printed for new data, a resume that mixes two runs, a restart that says nothing."""
    calls, window_nll = [], evaluate.window_nll
    monkeypatch.setattr(evaluate, "window_nll", lambda *a: calls.append(a) or window_nll(*a))
    directory, output = tmp_path / "copy", tmp_path / "o.json"
    save_checkpoint(load_model(llama[1]), load_model(llama[1]).config, directory)
    llama[2].astype("<u2").tofile(directory / "ids.bin")
    assert ppl(*arguments_for(directory, output))[0] == 0 and len(calls) == 7
    _, _, err = ppl(*arguments_for(directory, output), "--max_tokens", 200)
    assert len(calls) == 12 and "another max_tokens, data_tokens, data_sha256, and will be replaced" in err
    llama[2][::-1].astype("<u2").tofile(directory / "ids.bin")
    _, _, err = ppl(*arguments_for(directory, output), "--max_tokens", 200)
    assert len(calls) == 17 and "another data_sha256, and" in err
    os.utime(directory / "lit_model.safetensors", ns=(1, 1))
    _, _, err = ppl(*arguments_for(directory, output), "--max_tokens", 200)
    assert len(calls) == 22 and "another weights, and" in err


def test_an_output_that_is_no_results_file_is_not_overwritten(llama, ppl, tmp_path):
    """Catches: --output data.txt, which would cost the data."""
    (tmp_path / "book.txt").write_text("once upon a time")
    code, _, err = ppl(*arguments_for(llama[1], tmp_path / "book.txt"))
    assert code == 2 and "holds no results" in err and (tmp_path / "book.txt").read_text() == "once upon a time"


# ---------------------------------------------------------------------------------------------------- several processes


class ThreadRanks:
    """Ranks as two threads: the same dealing and adding up as with processes, without their start."""

    def __init__(self, rank: int, shared: dict) -> None:
        self.rank, self.count, self.device, self.shared = rank, 2, "cpu", shared

    def broadcast(self, value):
        return self.exchange(value)[0]

    def gather(self, x):
        return torch.stack(self.exchange(x))

    def exchange(self, x):
        self.shared[self.rank] = x
        self.shared["barrier"].wait()
        values = [self.shared[0], self.shared[1]]
        self.shared["barrier"].wait()
        return values


def test_two_ranks_add_up_to_the_result_of_one(llama, tmp_path):
    """Catches: windows dealt twice or to nobody, sums gathered in the wrong order, a rank that waits for ever."""
    script = runpy.run_path(str(ROOT / SCRIPT))
    windows, model = evaluate.full_windows(len(llama[2]), 40, 20, "all"), load_model(llama[1])
    one = evaluate.Results(tmp_path / "one.json", {})
    script["read_windows"](evaluate.Ranks("cpu"), one, model, llama[2], windows, 2, 0)
    two, shared = evaluate.Results(tmp_path / "two.json", {}), {"barrier": threading.Barrier(2, timeout=30)}
    two.parts["40"] = one.parts["40"]  # kept from an earlier run: six batches are left, then five for two ranks
    two.parts["80"] = one.parts["80"]
    threads = [
        threading.Thread(
            target=script["read_windows"],
            args=(ThreadRanks(rank, shared), two if rank == 0 else None, load_model(llama[1]), llama[2], windows, 2, 0),
        )
        for rank in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    del one.parts["_seconds"], two.parts["_seconds"]
    assert two.parts == one.parts and len(one.parts) == 7


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "devices"])
def test_two_processes_give_one_process_result_to_the_last_bit(llama, tmp_path, launcher):
    """Catches: a launch that fails, two processes that both write, a result that depends on their number."""
    pytest.importorskip("lightning")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # so that every process rounds alike

    def start(output: Path, *command: str, **more: object) -> subprocess.CompletedProcess:
        arguments = [*map(str, arguments_for(llama[1], output))]
        return subprocess.run(
            [sys.executable, *command, *arguments, *more.get("options", [])],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    assert start(tmp_path / "one.json", SCRIPT).returncode == 0
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533", SCRIPT]
    command, options = (torchrun, []) if launcher == "torchrun" else ([SCRIPT], ["--devices", "2"])
    done = start(tmp_path / "two.json", *command, options=options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("perplexity") == 1
    assert results_of(tmp_path / "two.json") == results_of(tmp_path / "one.json")
    assert json.loads((tmp_path / "two.json").read_text())["processes"] == 2
    partial = {
        "arguments": results_of(tmp_path / "one.json")["arguments"],
        "parts": {"_chunk_size": 0, "_seconds": 1.0},
    }
    partial["parts"]["0"] = [[1.0] * 4, [2.0] * 4]  # false sums, to see that they are taken over and not read again
    (tmp_path / "two.json").unlink()
    (tmp_path / "two.json.partial").write_text(json.dumps(partial))
    done = start(tmp_path / "two.json", *command, options=options)
    assert "1 parts are done" in done.stderr and done.returncode == 0
    assert results_of(tmp_path / "two.json")["nll"] != results_of(tmp_path / "one.json")["nll"]


def run_until_killed(argv: list[str], threads: int) -> None:
    """Run the script in this process, which kills itself at the fourth window."""
    window_nll, calls = evaluate.window_nll, []

    def killed(*a):
        calls.append(a)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return window_nll(*a)

    torch.set_num_threads(threads)  # so that both processes round alike
    evaluate.window_nll = killed
    evaluate.Results.add_all = functools.partialmethod(evaluate.Results.add_all, every=0)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def test_a_killed_run_goes_on(llama, ppl, tmp_path):
    """Catches: a partial file that is only right when a run ends by its own will."""
    argv = [str(ROOT / SCRIPT), *map(str, arguments_for(llama[1], tmp_path / "o.json"))]
    process = CONTEXT.Process(target=run_until_killed, args=(argv, torch.get_num_threads()))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "o.json").exists()
    assert "3 parts are done" in ppl(*arguments_for(llama[1], tmp_path / "o.json"))[2]
    assert ppl(*arguments_for(llama[1], tmp_path / "whole.json"))[0] == 0
    assert results_of(tmp_path / "o.json") == results_of(tmp_path / "whole.json")


@pytest.mark.parametrize("part", ["x", [], [[1.0]], [["x"] * 8] * 2])
def test_kept_parts_and_results_that_no_run_wrote_end_in_a_sentence(llama, ppl, tmp_path, part):
    """Catches: a traceback of a file that was gone on from, a damaged one that is dropped without a word."""
    arguments, output, partial = arguments_for(llama[1], tmp_path / "o.json"), tmp_path / "o.json", ".json.partial"
    assert ppl(*arguments)[0] == 0
    content = json.loads(output.read_text())
    kept = {"arguments": content["arguments"], "parts": {"0": part, "_seconds": 1.0, "_chunk_size": 0}}
    output.with_suffix(partial).write_text(json.dumps(kept))
    assert ppl(*arguments)[0] == 0 and not output.with_suffix(partial).exists()  # left by a kill behind the end
    output.write_text(json.dumps({"arguments": content["arguments"], "ppl": part}))
    code, _, err = ppl(*arguments)
    assert code == 2 and f"error: {output} does not hold what such a run writes" in err
    output.write_text(json.dumps(content | {"seconds": "x"}))
    assert f"error: {output} does not hold what such a run writes" in ppl(*arguments)[2]
    output.write_text(json.dumps({"arguments": content["arguments"]}))
    output.rename(output.with_suffix(partial))
    code, _, err = ppl(*arguments)
    assert code == 2 and f"error: {output}.partial is damaged: delete it" in err
    output.with_suffix(partial).write_text(json.dumps(kept))
    code, _, err = ppl(*arguments)
    assert code == 2 and f"error: {output}.partial does not hold what such a run writes" in err


def test_a_pipe_in_place_of_results_is_not_waited_for(tmp_path):
    """Catches: opening a pipe, which hangs until another process writes into it."""
    os.mkfifo(tmp_path / "o.json.partial")
    with pytest.raises(ValueError, match="damaged"):
        evaluate.Results(tmp_path / "o.json", {})


def test_a_start_of_several_processes_that_cannot_be_is_refused(monkeypatch):
    """Catches: a run on fewer GPUs than asked for, a traceback of another library."""
    with pytest.raises(ValueError, match="has 0 GPUs" if not torch.cuda.is_available() else "GPUs"):
        evaluate.launch_ranks("cuda", devices=999)
    with pytest.raises(ValueError, match="use cuda or cpu"):
        evaluate.launch_ranks("mps", devices=2)
    with pytest.raises(ValueError, match="devices=0"):
        evaluate.launch_ranks("cpu", devices=0)
    monkeypatch.setitem(sys.modules, "lightning.fabric", None)
    with pytest.raises(ValueError, match="pip install lightning"):
        evaluate.launch_ranks("cpu", devices=2)
    assert evaluate.launch_ranks("cpu").count == 1  # for which it is not needed
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="2 processes that torchrun started"):
        evaluate.launch_ranks("cpu", devices=3)


# ------------------------------------------------------------------------------------------------------ files, mistakes


def test_token_files_are_16_bit_up_to_65536_entries_and_mapped(tmp_path):
    """Catches: a file read with the wrong width, or copied into memory."""
    ids = np.array([5, 65535, 0, 7] * 10)
    ids.astype("<u2").tofile(tmp_path / "16.bin")
    ids.astype("<u4").tofile(tmp_path / "32.bin")
    for name, vocab_size in (("16.bin", 65536), ("32.bin", 65537)):
        tokens = evaluate.read_tokens(tmp_path / name, tmp_path, vocab_size)
        assert isinstance(tokens, np.memmap) and tokens.tolist() == ids.tolist()
        assert evaluate.read_tokens(tmp_path / name, tmp_path, vocab_size, max_tokens=3).tolist() == [5, 65535, 0]
    hashes = {evaluate.check_tokens(ids.astype(kind), 70000, "x", piece=7) for kind in ("<u2", "<u4")}
    assert len(hashes) == 1  # of the ids, not of the file
    with pytest.raises(ValueError, match="16-bit"):
        evaluate.read_tokens(tmp_path / "32.bin", tmp_path, 65536)
    with pytest.raises(ValueError, match="at position 0,.*another tokenizer's"):
        evaluate.check_tokens(evaluate.read_tokens(tmp_path / "16.bin", tmp_path, 65537), 65537, "x")
    with pytest.raises(ValueError, match="x has the token id 65535 at position 1, and the vocabulary has 65535"):
        evaluate.check_tokens(ids.astype("<u2"), 65535, "x", piece=7)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seq_len", "1"], "seq_len=1"),
        (["--seq_len", "-4"], "seq_len=-4"),
        (["--stride", "0"], "stride=0"),
        (["--stride", "65"], "stride=65 is more than seq_len=64"),
        (["--seq_len", "513"], "--model.block_size 513"),
        (["--seq_len", "301", "--model.block_size", "301"], "gives 300 tokens and a window has 301"),
        (["--max_tokens", "63"], "gives 63 tokens and a window has 64"),
        (["--max_tokens", "0"], "max_tokens=0"),
        (["--bucket", "0"], "bucket=0"),
        (["--batch_size", "0"], "batch_size=0"),
        (["--chunk_size", "-1"], "chunk_size=-1"),
        (["--devices", "0"], "devices=0"),
        (["--score", "some"], "score"),
        (["--dtype", "float7"], "float7"),
        (["--checkpoint_dir", "{tmp}/none"], "no checkpoint directory"),
        (["--model.attention", "sideways"], "sideways"),
        (["--data", "{tmp}/none.txt"], "There is no file"),
        (["--data", "{tmp}/empty.txt"], "empty.txt holds no text"),
        (["--data", "{tmp}/empty.bin"], "empty.bin is empty"),
        (["--data", "{tmp}/odd.bin"], "odd.bin has 201 bytes"),
        (["--data", "{tmp}/other.bin"], "the token id 400 at position 70, and the vocabulary has 320"),
        (["--data", "{tmp}/latin.txt"], "no UTF-8 text (byte 3)"),
        (["--data", "{tmp}/book.pdf"], "neither a .txt nor a .bin"),
        (["--data", "{tmp}/nothing"], "holds no .txt"),
        (["--data", '["{tmp}/other.bin", "{tmp}/empty.txt"]'], "one .bin file alone"),
        (["--output", "{tmp}"], "holds no results"),
    ],
)
def test_bad_input_ends_in_one_sentence(tiny_checkpoint, ppl, tmp_path, arguments, message):
    """Catches: a traceback, a message without a remedy, anything written for a run that cannot be."""
    for name, content in {
        "ids.bin": bytes([7, 0]) * 300, "empty.txt": b"", "empty.bin": b"", "odd.bin": bytes(201),
        "latin.txt": b"caf\xe9", "book.pdf": b"x", "other.bin": np.array([3] * 70 + [400] * 9, dtype="<u2").tobytes(),
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    (tmp_path / "nothing").mkdir()
    given = {"--checkpoint_dir": tiny_checkpoint, "--data": tmp_path / "ids.bin", "--seq_len": 64, "--stride": 64}
    given |= {"--output": tmp_path / "out" / "o.json"}
    given |= {k: v.replace("{tmp}", str(tmp_path)) for k, v in zip(arguments[::2], arguments[1::2], strict=True)}
    code, out, err = ppl(*itertools.chain(*given.items()))
    assert code == 2 and out == "" and message in err, err
    assert err.startswith("error: ") and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_stops_the_run(llama, ppl, tmp_path):
    """Catches: NaN in a results file, and hours of work behind it."""
    model = load_model(llama[1])
    model.transformer.wte.weight.data[llama[2][130]] = math.nan
    save_checkpoint(model, model.config, tmp_path / "damaged")
    llama[2].astype("<u2").tofile(tmp_path / "damaged" / "ids.bin")
    code, _, err = ppl(*arguments_for(tmp_path / "damaged", tmp_path / "o.json"))
    assert code == 2 and "no finite perplexity" in err and not (tmp_path / "o.json").exists()


def test_the_chunk_is_whole_where_memory_allows(tiny_model, monkeypatch):
    """Catches: a window that does not fit fed whole, and one that does fed in slow pieces."""
    model = tiny_model(block_size=65536)
    monkeypatch.setattr("lit_swa.generate.free_memory", lambda device: 2**40)
    assert evaluate.pick_chunk_size(model, 1, 65536) == 0
    monkeypatch.setattr("lit_swa.generate.free_memory", lambda device: 2**27)
    size = evaluate.pick_chunk_size(model, 1, 65536)
    assert 128 <= size < 65536 and evaluate.pick_chunk_size(model, 1, size) == 0
