"""scripts/benchmark_finetune.py on a tiny model: what a step trains."""

import runpy
from pathlib import Path

import pytest
import torch

from lit_swa.linear import LinearAttention
from lit_swa.training import loop

pytest.importorskip("lightning")


def test_each_method_trains_what_it_says(tiny_model, monkeypatch):
    """Catches: stage 1 with LoRA, linear attention that is left softmax or trained in stage 2, weights that all
    methods share and one moves."""
    script = runpy.run_path(str(Path(__file__).resolve().parents[1] / "scripts/benchmark_finetune.py"))
    base, made, mixers = tiny_model(), [], []
    build, reset = loop.ShardwiseAdamW, LinearAttention.reset_parameters

    def noted(groups, **how):
        groups = list(groups)
        made.append({id(p): p for group in groups for p in group["params"]})
        return build(groups, **how)

    monkeypatch.setattr(loop, "ShardwiseAdamW", noted)
    monkeypatch.setattr(LinearAttention, "reset_parameters", lambda self: mixers.append(self) or reset(self))
    settings = {
        "r": 2,
        "window": 4,
        "s2_group_ratio": 0.25,
        "dtype": "float32",
        "compile": False,
        "memory_GB": None,
        "repeats": 1,
    }
    before = [p.clone() for p in base.parameters()]
    rows = script["measure"](24, ["all", "linear", "transfer"], base, "cpu", settings)
    assert [row.get("error") for row in rows] == [None] * 3 and all(row["tok_s"] > 0 for row in rows)
    assert len(mixers) == 2 * base.config.n_layer
    lora, linear, transfer = ([tuple(p.shape) for p in params.values()] for params in made)
    H, D = base.config.n_head, base.config.head_size
    assert lora == linear and all(2 in shape for shape in lora)  # of rank 2
    assert sorted(transfer) == sorted([(H, D, D), (H, D, D), (H,)] * base.config.n_layer)
    assert all(torch.equal(a, b) for a, b in zip(before, base.parameters(), strict=True))
