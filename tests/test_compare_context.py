"""Methods compared: each reads the same windows with the fields it promises, and one that fails says why."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_swa import evaluate, plots
from lit_swa.checkpoint import load_model
from lit_swa.evaluate import Windows, with_fields

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "scripts/compare_context.py"


@pytest.fixture
def compare(monkeypatch, run_script, tiny_checkpoint, tmp_path):
    """Run the script in this process, on 300 tokens of a model whose trained length is given as 64."""
    np.random.default_rng(3).integers(0, 300, 300).astype("<u2").tofile(tmp_path / "ids.bin")

    pictures = plots.save_picture

    def run(*arguments: object, picture: bool = False) -> tuple[int, str, str]:
        monkeypatch.setattr(plots, "save_picture", pictures if picture else lambda path, draw: False)
        fixed = ["--checkpoint_dir", tiny_checkpoint, "--data", tmp_path / "ids.bin", "--trained_length", 64]
        fixed += ["--lengths", "[32, 128]", "--last", 16, "--bucket", 32, "--output", tmp_path / "c.json"]
        return run_script(SCRIPT, *fixed, *arguments)

    return run


def expected_nll(checkpoint, ids, length: int, starts, **fields) -> np.ndarray:
    """(windows, length - 1), from a model that is loaded with these fields."""
    model = load_model(checkpoint, **fields)
    return np.stack([evaluate.window_nll(model, torch.tensor(ids[a : a + length])[None])[0].numpy() for a in starts])


def test_each_method_reads_the_same_windows_with_its_own_fields(compare, tiny_checkpoint, tmp_path):
    """Catches: fields that never reach the model, one method's fields left in the next, another mean than named."""
    pytest.importorskip("matplotlib")
    custom = json.dumps({"large base": {"rope_base": 1e6}})
    code, out, _ = compare("--methods", "[rope, linear, sliding]", "--custom", custom, "--windows", 3, picture=True)
    assert code == 0
    result = json.loads((tmp_path / "c.json").read_text())
    rows = {(row["method"], row["length"]): row for row in result["rows"]}
    ids = np.fromfile(tmp_path / "ids.bin", dtype="<u2").astype(np.int64)
    window = {"attention": "sliding", "sliding_window_size": 32}
    linear = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    for name, fields in (("rope", {}), ("linear", linear), ("sliding", window), ("large base", {"rope_base": 1e6})):
        nll = expected_nll(tiny_checkpoint, ids, 128, (0, 86, 172), **fields)
        row = rows[name, 128]
        assert row["tokens"] == 3 * 127 and row["last_tokens"] == 3 * 16
        assert row["ppl"] == pytest.approx(math.exp(nll.mean()), rel=1e-4)
        assert row["last_ppl"] == pytest.approx(math.exp(nll[:, -16:].mean()), rel=1e-4)
        assert row["buckets"]["32-63"] == pytest.approx(math.exp(nll[:, 31:63].mean()), rel=1e-4)
        assert f"{row['last_ppl']:.2f} |" in out and f"{row['ppl']:.2f} |" in out
    assert len({round(rows[name, 128]["ppl"], 3) for name, length in rows if length == 128}) == 4
    same = {rows[name, 32]["nll"] for name in ("rope", "linear")}  # within the trained length nothing is scaled
    assert max(same) - min(same) < 1e-6
    assert out.count("\n| sliding | ") == 2 and (tmp_path / "c.png").stat().st_size > 5000


@pytest.mark.parametrize("method", ["ntk", "dynamic", "yarn", "streaming", "dual_chunk"])
def test_every_method_runs_beyond_the_trained_length(compare, tmp_path, method):
    """Catches: a method whose fields the model does not take, or takes and ignores."""
    code, out, _ = compare("--methods", f"[rope, {method}]", "--window", 24)
    rows = {(row["method"], row["length"]): row for row in json.loads((tmp_path / "c.json").read_text())["rows"]}
    assert code == 0 and "fails" not in out
    assert abs(rows[method, 128]["nll"] - rows["rope", 128]["nll"]) > 1e-4
    if method != "streaming":
        assert rows[method, 32]["nll"] == pytest.approx(rows["rope", 32]["nll"], rel=1e-5)


def test_a_method_that_cannot_read_a_length_is_told_and_the_others_go_on(compare, tmp_path):
    """Catches: one bad method that costs the results of all others."""
    custom = json.dumps({"short": {"block_size": 100}, "wrong": {"n_head": 5}})
    code, out, _ = compare("--methods", "[rope]", "--custom", custom)
    assert code == 0 and "| wrong | fails | fails |" in out and "short fails at 128: " in out
    assert "wrong fails at 32, 128: n_query_groups" in out and "| rope | fails" not in out
    errors = {
        (row["method"], row["length"])
        for row in json.loads((tmp_path / "c.json").read_text())["rows"]
        if "error" in row
    }
    assert errors == {("wrong", 32), ("wrong", 128), ("short", 128)}


def test_what_was_read_survives_an_interruption(compare, tmp_path, monkeypatch):
    """Catches: finished windows that are read again, or sums that change on the way through the file."""
    calls, window_nll = [], evaluate.window_nll

    def interrupted_at_fourth(*a):
        calls.append(a)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return window_nll(*a)

    monkeypatch.setattr(evaluate, "window_nll", interrupted_at_fourth)
    arguments = ["--methods", "[rope, linear]", "--windows", 2]
    code, out, err = compare(*arguments)
    assert code == 130 and out == "" and "the same command goes on" in err and not (tmp_path / "c.json").exists()
    code, out, err = compare(*arguments)
    assert code == 0 and "4 parts are done" in err and len(calls) == 8
    resumed = json.loads((tmp_path / "c.json").read_text())["rows"]
    code, again, err = compare(*arguments)
    assert again == out and "already" in err and len(calls) == 8
    (tmp_path / "c.json").unlink()
    assert compare(*arguments)[0] == 0
    for row, fresh in zip(resumed, json.loads((tmp_path / "c.json").read_text())["rows"], strict=True):
        assert row | {"seconds": 0} == fresh | {"seconds": 0}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "[rope, magic]"], "There is no method 'magic': choose from rope, linear"),
        (["--methods", "[]"], "methods is empty"),
        (["--custom", '{"rope": {"rope_base": 1.0}}'], "is the name of a method already"),
        (["--lengths", "[32, 301]"], "gives 300 tokens and a window has 301"),
        (["--lengths", "[1]"], "seq_len=1"),
        (["--lengths", "[]"], "lengths is empty"),
        (["--windows", "0"], "windows=0"),
        (["--last", "0"], "last=0"),
        (["--bucket", "-1"], "bucket=-1"),
        (["--window", "0"], "window=0"),
        (["--data", "none.txt"], "There is no file none.txt"),
    ],
)
def test_bad_input_ends_in_one_sentence(compare, tmp_path, arguments, message):
    """Catches: a traceback, or a run that starts and fails after an hour."""
    code, out, err = compare(*arguments)
    assert code == 2 and out == "" and message in err and err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1 and not (tmp_path / "c.json.partial").exists()


def test_a_model_with_other_fields_shares_the_weights(tiny_model):
    """Catches: a copy of the weights for each method, and a base model that is changed by one."""
    for tied in (False, True):
        base = tiny_model(tie_embeddings=tied)
        idx = torch.randint(0, 97, (1, 40))
        before = evaluate.window_nll(base, idx)
        changed = with_fields(base, attention="sliding", sliding_window_size=5)
        assert changed.transformer.h[1].attn.qkv.weight.data_ptr() == base.transformer.h[1].attn.qkv.weight.data_ptr()
        assert not torch.allclose(evaluate.window_nll(changed, idx), before, atol=1e-2)
        assert torch.equal(evaluate.window_nll(base, idx), before)
    with pytest.raises(ValueError, match="asks for"):
        with_fields(base, n_embd=96)


def test_windows_begin_as_a_text_does(tiny_checkpoint):
    """Catches: a BOS that takes a token of the text away, or counts as a target."""
    windows = evaluate.spread_windows(100, 40, 2, 8, prefix=(7,))
    assert windows == Windows([0, 61], 40, 1, 8, (7,))
    assert windows.batch(np.arange(100), [61], "cpu").tolist() == [[7, *range(61, 100)]]


def test_windows_are_spread_from_the_first_token_to_the_last():
    """Catches: windows that all lie at the beginning, or read past the end."""
    assert evaluate.spread_windows(100, 40, 1, 8).starts == [0]
    assert evaluate.spread_windows(100, 40, 3, 8).starts == [0, 30, 60]
    assert evaluate.spread_windows(40, 40, 3, 8) == Windows([0], 40, 1, 8)
    assert evaluate.spread_windows(43, 40, 10**15, 8).starts == [0, 1, 2, 3]
