"""scripts/benchmark_pretrain.py on a tiny model: what each method of ours runs."""

import runpy
from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from lit_swa.model import GPT
from lit_swa.training import compiling

pytest.importorskip("lightning")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    return runpy.run_path(str(Path(__file__).resolve().parents[1] / "scripts/benchmark_pretrain.py"))


SETTINGS = {"length": 24, "micro_batch_size": 2, "accumulate": 2, "window": 5, "recompute": 1, "dtype": "float32"}
SETTINGS |= {"repeats": 1}


def test_each_method_runs_what_it_says(script, monkeypatch):
    """Catches: an eager step that is compiled or the other way round, full attention timed as a window, weights that do
    not move, a step whose optimiser is another's."""
    seen, run, compiled = [], GPT.run_blocks, []
    monkeypatch.setattr(torch, "compile", lambda f, **how: lambda *given: compiled.append(1) or f(*given))
    monkeypatch.setattr(GPT, "run_blocks", lambda model, *given: seen.append(model.windows[0]) or run(model, *given))
    calls = []
    group = script["Group"](tiny_config(), SETTINGS, "cpu")
    step = script["Group"].step
    script["Group"].step = lambda *given: (compiled.clear(), step(*given), calls.append(len(compiled)))[1]
    rows = group.measure(["eager", "compiled", "window"], None)
    assert [row.get("error") for row in rows] == [None] * 3 and all(row["tok_s"] > 0 for row in rows)
    assert seen == [24, 24, 24, 24, 5, 5] * 2  # two micro-batches a step, a first step and a timed one
    blocks, recomputed, losses = 2, 1, 1
    assert calls == [0, 2 * (blocks + recomputed + losses), 2 * (blocks + recomputed + losses)] * 2
    assert rows[0]["loss"] > rows[1]["loss"] > rows[2]["loss"]  # they train one model, one after the other


def test_the_first_method_that_is_compiled_is_traced(script, monkeypatch, tmp_path):
    """Catches: a trace of the window that is never written, one of an eager step, a second one over the first."""
    traced = []
    monkeypatch.setattr(torch, "compile", lambda f, **how: f)
    monkeypatch.setattr(script["Group"], "trace", lambda group, name, path: traced.append(name))
    for names in (["window"], ["eager", "compiled", "window"], ["eager"], ["compiled pure"]):
        rows = script["Group"](tiny_config(), SETTINGS, "cpu").measure(names, tmp_path / "trace.json")
        assert all("error" not in row for row in rows)
    assert traced == ["window", "compiled", "compiled pure"]
    with pytest.raises(ValueError, match="no step to trace: add one of compiled, window, compiled pure"):
        script["main"](methods=["eager", "transformers"], profile=tmp_path / "trace.json")
    given = []
    monkeypatch.setattr(script["Group"], "__init__", lambda *_: None)
    monkeypatch.setattr(script["Group"], "measure", lambda group, names, profile: given.append(profile) or [])
    for methods in (["compiled", "compiled pure"], ["transformers", "compiled pure"]):
        script["main"](methods=methods, device="cpu", profile=tmp_path / "t", output=tmp_path / "x.json")
    assert given == [tmp_path / "t", None, tmp_path / "t", tmp_path / "t"]
