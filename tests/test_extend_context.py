"""scripts/extend_context.py on a tiny model: what is trained, what is read before and after, how it goes on."""

import json
import math
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import in_this_process

from lit_swa.checkpoint import load_config, load_model
from lit_swa.evaluate import window_nll

pytest.importorskip("lightning")
WINDOW = {"attention": "streaming", "sliding_window_size": 24, "n_sink_tokens": 2}


@pytest.fixture
def extend(run_script, tiny_checkpoint, tmp_path, monkeypatch):
    """Run the script in this process on random tokens, rows of 1,024: (exit code, stdout, stderr)."""
    rng = np.random.default_rng(3)
    for name, n in (("train", 2100), ("eval", 1024)):
        rng.integers(0, 300, n).astype("<u2").tofile(tmp_path / f"{name}.bin")

    def run(*arguments: object, execute=in_this_process) -> tuple[int, str, str]:
        monkeypatch.setattr(subprocess, "run", execute)
        fixed = ["--checkpoint_dir", tiny_checkpoint, "--data", tmp_path / "train.bin", "--eval_data"]
        fixed += [tmp_path / "eval.bin", "--length", 1024, "--window", 24, "--sinks", 2, "--chunk_size", 256]
        fixed += ["--method", "full", "--steps", 1, "--passkey_lengths", "[600]", "--depths", 1, "--out_dir"]
        fixed += [tmp_path / "runs", "--output", tmp_path / "x.json"]
        return run_script("scripts/extend_context.py", *fixed, *arguments)

    return run


def test_before_and_after_are_what_they_say(extend, tiny_checkpoint, tmp_path):
    """Catches: a perplexity of another model, window or length, a row without the window in it, a control with another
    number of tokens; models that are read again after the training failed, a second start that trains again."""
    code, _, err = extend("--short_length", 256, execute=lambda *_, **__: SimpleNamespace(returncode=2))
    assert code == 2 and "full.py failed, as it says above" in err and not (tmp_path / "x.json").exists()
    code, out, err = extend("--short_length", 256)
    assert code == 0 and "2 parts are done" in err and "reading with original" not in err, err
    rows = {row["model"]: row for row in json.loads((tmp_path / "x.json").read_text())["rows"]}
    assert list(rows) == ["original", "untrained", "trained", "short rows"] and all(
        f"| {name} |" in out for name in rows
    )
    ids = torch.from_numpy(np.fromfile(tmp_path / "eval.bin", dtype="<u2").astype(np.int64)).view(1, 1024)
    runs = tmp_path / "runs"
    places = {"original": (tiny_checkpoint, {"block_size": 1024}), "untrained": (tiny_checkpoint, WINDOW)}
    places |= {"trained": (runs / "trained/final", {}), "short rows": (runs / "short-rows/final", {})}
    for name, (directory, fields) in places.items():
        nll = window_nll(load_model(directory, **fields), ids)
        assert rows[name]["ppl"] == pytest.approx(math.exp(nll.double().mean()), rel=1e-4), name
        assert len(rows[name]["buckets"]) == 32 and len(rows[name]["passkeys"]) == 1
    assert len({rows[name]["ppl"] for name in rows}) == 4
    assert rows["trained"]["trained_tokens"] == rows["short rows"]["trained_tokens"] == 1024
    assert "--chunk_size 256" in rows["trained"]["command"] and "--max_seq_length 256" in rows["short rows"]["command"]
    config = load_config(runs / "trained/final")
    assert config.attention == "streaming" and config.sliding_window_size == 24 and config.n_sink_tokens == 2
    runs.rename(tmp_path / "gone")
    assert extend("--short_length", 256)[1] == out and not runs.exists()


def test_what_does_not_fit_is_told_in_a_sentence(extend):
    """Catches: a control on other tokens, and a length that a layer cannot read found after an hour of training."""
    for arguments, words in (
        (["--short_length", 300], "short_length=300 does not fit: it must divide the length of 1024 tokens."),
        (["--read_length", 4096], "read shorter windows"),
        (["--model.attention", "nothing"], "attention"),
    ):
        code, _, err = extend(*arguments)
        assert code == 2 and words in err and "Traceback" not in err
