"""pretrain/base.py on a GPU: pytest tests/gpu/test_pretrain_cuda.py -q, on a machine that has one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_swa.train import read_metrics
from lit_swa.training.flops import peak_flops

pytest.importorskip("lightning")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"n_layer": 4, "n_head": 4, "n_query_groups": 2, "n_embd": 256, "intermediate_size": 512, "block_size": 2048}
WINDOW = {"model.attention": "sliding,full", "model.sliding_window_size": 512}


@pytest.fixture
def pretrain(tmp_path):
    """Run the script as a process of its own: its metrics, and what it says."""
    words = np.random.default_rng(0).choice("the quick brown fox jumps over lazy dog and sleeps".split(), 60_000)
    (tmp_path / "text.txt").write_text(" ".join(words))

    def run(name: str, **arguments) -> tuple[dict, str]:
        given = {
            "data": tmp_path / "text.txt",
            "max_steps": 4,
            "batch_size": 4,
            "micro_batch_size": 2,
            "sample": "false",
        }
        given |= {"out_dir": tmp_path / name, "warmup_steps": 0, "tokenizer_vocab_size": 300}
        given |= {f"model.{field}": value for field, value in SHAPE.items()} | arguments
        command = [sys.executable, ROOT / "pretrain/base.py", *(x for k, v in given.items() for x in (f"--{k}", v))]
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return read_metrics(tmp_path / name), done.stderr

    return run


@pytest.mark.parametrize(
    "arguments", [{}, {"documents": "true"} | WINDOW, {"random_window": 128, "recompute": 2} | WINDOW]
)
def test_compiled_steps_are_those_of_eager_ones(pretrain, arguments):
    """Catches: weights that a compiled block reads in another precision, a window whose kernel is another's, a
    utilisation that is not told. bfloat16 rounds sums at other places: losses by 1e-2, gradients by 5e-2."""
    (eager, _), (compiled, said) = (
        pretrain(c, compile=c, precision="bf16-true", **arguments) for c in ("false", "true")
    )
    for name, rel in (("loss", 1e-2), ("grad_norm", 5e-2), ("val_loss", 1e-2)):
        assert compiled[name] == pytest.approx(eager[name], rel=rel, nan_ok=True)
    known = peak_flops(torch.device("cuda"), torch.bfloat16) is not None
    assert ("MFU" in said) == (known and "documents" not in arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"strategy": "fsdp"},
        {"chunk_size": 512, "chunk_offload": "false"},
        {"chunk_size": 512, "chunk_offload": "true"},
    ],
)
def test_sharded_steps_and_chunks_are_those_of_whole_rows(pretrain, arguments):
    """Catches: an estimate of a sharded model's memory that has the batch on another device, gradients of a window's
    keys that come back from another device than they went to."""
    windowed = {"model.attention": "sliding", "model.sliding_window_size": 256}
    whole, _ = pretrain("whole", **windowed)
    other, _ = pretrain("other", **windowed, **arguments)
    for name, rel in (("loss", 1e-2), ("grad_norm", 5e-2), ("val_loss", 1e-2)):
        assert other[name] == pytest.approx(whole[name], rel=rel, nan_ok=True)
