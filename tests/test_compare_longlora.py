"""scripts/compare_longlora.py on a tiny model: what each way trains, what is read afterwards, how it goes on."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import in_this_process, start_script

from lit_swa.checkpoint import load_config, load_model
from lit_swa.evaluate import window_nll

pytest.importorskip("lightning")
METHODS = ["untrained", "full", "short", "s2", "s2 lora", "s2 lora+norm", "s2 lora+embed", "s2 lora+norm+embed"]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint, tmp_path_factory) -> Path:
    """The tiny checkpoint with a context of 64 tokens."""
    directory = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("base") / "short")
    config = json.loads((directory / "lit_config.json").read_text())
    (directory / "lit_config.json").write_text(json.dumps(config | {"block_size": 64}))
    return directory


@pytest.fixture
def compare(run_script, checkpoint, tmp_path, monkeypatch):
    """Run the script in this process on random tokens, from a context of 64 to 128: (exit code, stdout, stderr)."""
    rng = np.random.default_rng(3)
    for name, n in (("train", 800), ("eval", 280)):
        rng.integers(0, 300, n).astype("<u2").tofile(tmp_path / f"{name}.bin")

    def run(*arguments: object, execute=in_this_process) -> tuple[int, str, str]:
        monkeypatch.setattr(subprocess, "run", execute)
        fixed = ["--checkpoint_dir", checkpoint, "--data", tmp_path / "train.bin", "--eval_data"]
        fixed += [tmp_path / "eval.bin", "--context", 128, "--out_dir", tmp_path / "runs", "--steps", 2]
        fixed += ["--batch_size", 2, "--warmup_steps", 0, "--output", tmp_path / "c.json"]
        return run_script("scripts/compare_longlora.py", *fixed, *arguments)

    return run


def changed(base: Path, run: Path) -> set[str]:
    """Which kinds of weights a run moved."""
    before, after = load_model(base).state_dict(), load_model(run).state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = {"embed": "wte", "norm": "norm", "attn": "attn", "mlp": "mlp"}
    return {kind for kind, part in kinds.items() if any(part in name for name in moved)}


def test_each_way_trains_what_it_says_and_is_read_in_full(compare, checkpoint, tmp_path):
    """Catches: a way that trains another's weights, groups that are left in the saved config or not used at all, a
    perplexity of another model, text or length, a second start that trains again."""
    code, out, err = compare()
    assert code == 0, err
    rows = {row["method"]: row for row in json.loads((tmp_path / "c.json").read_text())["rows"]}
    assert list(rows) == METHODS and all(f"| {name} |" in out for name in METHODS)
    assert rows["s2"]["memory"] in out and rows["s2"]["command"].startswith("python finetune/full.py --data ")
    lora = {"attn"}
    expected = {"full": {"attn", "mlp", "embed", "norm"}, "s2-lora": lora, "s2-lora+norm": lora | {"norm"}}
    expected |= {"s2-lora+embed": lora | {"embed"}, "s2-lora+norm+embed": lora | {"norm", "embed"}}
    for name, kinds in expected.items():
        assert changed(checkpoint, tmp_path / "runs" / name / "final") == kinds, name
    for name in ("full", "short", "s2"):
        config = load_config(tmp_path / "runs" / name / "final")
        assert (config.s2_attention, config.s2_shift) == (name != "full", name != "short")
        assert config.block_size == 128 and config.rope_scaling["factor"] == 2.0
    assert len({rows[name]["loss"][0] for name in ("full", "short", "s2")}) == 3  # three kinds of attention
    ids = torch.from_numpy(np.fromfile(tmp_path / "eval.bin", dtype="<u2").astype(np.int64))
    plain = load_model(tmp_path / "runs" / "s2" / "final", s2_attention=False)
    nll = torch.stack([window_nll(plain, ids[None, a : a + 64]) for a in (0, 64, 128, 192)])
    assert rows["s2"]["ppl"]["64"] == pytest.approx(math.exp(nll.double().mean()), rel=1e-4)
    assert rows["untrained"]["ppl"].keys() == {"32", "64", "128"} and "loss" not in rows["untrained"]
    (tmp_path / "runs").rename(tmp_path / "gone")
    assert compare()[1] == out and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("code, words", [(130, "interrupted"), (2, "lora.py failed, as it says above")])
def test_a_comparison_goes_on(compare, tmp_path, code, words):
    """Catches: finished ways that are trained again after one that failed, a failure that is passed over."""

    def fails_at_lora(command, **options):
        if "lora.py" in command[1]:
            return SimpleNamespace(returncode=code)
        return in_this_process(command, **options)

    methods = ("--methods", "[full, s2 lora]")
    got, _, err = compare(*methods, execute=fails_at_lora)
    assert got == code and words in err and not (tmp_path / "c.json").exists()
    (tmp_path / "runs" / "full").rename(tmp_path / "gone")
    assert compare(*methods)[0] == 0 and not (tmp_path / "runs" / "full").exists()
    assert [row["method"] for row in json.loads((tmp_path / "c.json").read_text())["rows"]] == ["full", "s2 lora"]


def test_ctrl_c_keeps_the_steps_of_the_run_at_hand(checkpoint, tmp_path):
    """Catches: a comparison that kills its run while that saves, an argument that only one process understands."""
    np.random.default_rng(3).integers(0, 300, 20_000).astype("<u2").tofile(tmp_path / "ids.bin")
    log, runs = tmp_path / "log", tmp_path / "runs"
    process = start_script(
        "scripts/compare_longlora.py", "--checkpoint_dir", checkpoint, "--data", tmp_path / "ids.bin", "--eval_data",
        tmp_path / "ids.bin", "--context", 128, "--methods", "[s2 lora+norm]", "--steps", 100_000, "--batch_size", 48,
        "--device", "cpu", "--out_dir", runs, "--output", tmp_path / "c.json", log=log,
    )  # fmt: skip
    lines = runs / "s2-lora+norm" / "metrics.csv"
    try:
        deadline = time.monotonic() + 120
        while not (lines.exists() and len(lines.read_text().splitlines()) > 1):
            assert time.monotonic() < deadline and process.is_alive(), log.read_text()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the script and to its run
        process.join(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    err = log.read_text()
    assert process.exitcode == 130 and "python finetune/lora.py --data " in err, err[-500:]
    last = lines.read_text().splitlines()[-1].split(",")[0]
    assert [path.name for path in lines.parent.glob("step-*")] == [f"step-{int(last):06d}"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--methods", "[s3]"], "There is no method 's3': choose from untrained"),
        (["--lengths", "[256]"], "at most the context of 128"),
        (["--context", 8], "context=8 does not fit"),
        (["--max_eval_tokens", 100], "read shorter windows (--seq_len, or --lengths)"),
    ],
)
def test_bad_arguments_are_told_in_a_sentence(compare, arguments, words):
    """Catches: a remedy that is missing."""
    code, _, err = compare(*arguments)
    assert code == 2 and words in err and "Traceback" not in err
