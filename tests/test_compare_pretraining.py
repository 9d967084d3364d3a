"""scripts/compare_pretraining.py on tiny models: what each is made of and measured on, and how it goes on."""

import json
import math
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import in_this_process

from lit_swa.checkpoint import load_config, load_model
from lit_swa.tokenizer import Tokenizer
from lit_swa.training import memory

pytest.importorskip("lightning")
SHAPE = {"n_layer": 4, "n_head": 2, "n_query_groups": 1, "n_embd": 16, "intermediate_size": 16}


@pytest.fixture
def compare(run_script, tmp_path, monkeypatch):
    """Run the script in this process: (exit code, stdout, stderr). The commands that it starts are noted in `ran`."""
    words = np.random.default_rng(3).choice("the quick brown fox. jumps over lazy. dog sleeps".split(), 3000)
    (tmp_path / "a.txt").write_text(" ".join(words[:1500]))
    (tmp_path / "eval.txt").write_text(" ".join(words[1500:]))
    monkeypatch.setattr("lit_swa.plots.has_matplotlib", lambda: False)
    monkeypatch.setattr(memory, "estimate_step", lambda *a: (_ for _ in ()).throw(RuntimeError("not now")))
    ran: list[list[str]] = []

    def run(*arguments: object, execute=in_this_process) -> tuple[int, str, str]:
        def noted(command, **options):
            if "pretrain/base.py" not in command[1]:  # it is asked for the name of the processor, too
                return in_this_process(command, **options)
            ran.append(command)
            return execute(command, **options)

        monkeypatch.setattr(subprocess, "run", noted)
        fixed = ["--data", tmp_path / "a.txt", "--eval_data", tmp_path / "eval.txt", "--context", 16, "--window", 16]
        fixed += ["--batch_size", 2, "--tokens", 100, "--vocab_size", 300, "--targets", 3, "--device", "cpu"]
        fixed += ["--out_dir", tmp_path / "runs", "--output", tmp_path / "c.json"]
        fixed += [x for name, value in SHAPE.items() for x in (f"--model.{name}", value)]
        return run_script("scripts/compare_pretraining.py", *fixed, *arguments)

    run.ran = ran
    return run


def test_models_are_made_and_measured_as_they_say(compare, tmp_path):
    """Catches: a model without its pattern, positions or schedule; bits of other tokens, or with less before them than
    they say; a finished model that is made again, one that is lost with another that fails."""

    def fails(command, **how):
        return in_this_process(command, **how) if "--window_schedule" in command else SimpleNamespace(returncode=1)

    code, _, err = compare("--only", '["schedule", "full"]', execute=fails)
    assert code == 2 and "base.py failed" in err and len(compare.ran) == 2
    code, out, err = compare("--only", '["schedule", "full"]')
    assert code == 0 and len(compare.ran) == 3 and "| schedule |" in out, err
    content = json.loads((tmp_path / "c.json").read_text())
    rows = {row["method"]: row for row in content["rows"]}
    assert list(rows) == ["full", "schedule"] and "--only" not in content["command"]
    assert "--window_schedule 4:0,8:0.3,16:0.6" in rows["schedule"]["command"]
    assert {row["tokens"] for row in rows.values()} == {96}
    made = load_config(tmp_path / "runs" / "schedule" / "final")
    assert made.layer_variants == ["sliding"] * 3 + ["full"] and made.layer_positions == ["rope"] * 3 + ["none"]
    tokenizer = Tokenizer(tmp_path / "runs" / "tokenizer")
    ids = tokenizer.encode((tmp_path / "eval.txt").read_text())
    model = load_model(tmp_path / "runs" / "schedule" / "final", block_size=128)
    ends = [128 + (len(ids) - 128) * i // 2 for i in range(3)]
    n_bytes = sum(len(tokenizer.decode(ids[end - 8 : end]).encode()) for end in ends)
    for length, bits in rows["schedule"]["bits_per_byte"].items():
        texts = torch.tensor([ids[end - int(length) : end] for end in ends])
        logits = model(texts)[:, -9:-1, : model.config.vocab_size].log_softmax(-1)
        nll = -logits.gather(2, texts[:, -8:, None]).double().sum().item()
        assert bits == pytest.approx(nll / math.log(2) / n_bytes, rel=1e-5)


def test_each_model_differs_by_its_flags():
    """Catches: a part of the window that is left as it is written in the table, two models that are one."""
    script = runpy.run_path(str(Path(__file__).resolve().parents[1] / "scripts/compare_pretraining.py"))
    flags = {name: script["flags_of"](name, 256) for name in script["ROWS"]}
    assert len(flags) == 6 and len({json.dumps(f) for f in flags.values()}) == 6 and flags["full"] == {}
    assert flags["random"]["random_window"] == "64" and flags["Muon"]["optimizer"] == "muon"
    assert all("{" not in v for f in flags.values() for v in f.values())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--only", "[fool]"], "There is no model 'fool': choose from full"),
        (["--window", 17], "window=17"),
        (["--targets", 4000], "fewer --targets"),
        (["--jobs", 0], "jobs=0"),
    ],
)
def test_bad_arguments_are_told_in_a_sentence(compare, arguments, words):
    """Catches: a traceback, a run that begins before it."""
    code, _, err = compare(*arguments)
    assert code == 2 and words in err and "Traceback" not in err and not compare.ran
