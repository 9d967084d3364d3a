"""The finetuning scripts on a GPU against themselves on a CPU: pytest tests/gpu -q, on a machine that has one."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_swa.checkpoint import load_model

pytest.importorskip("lightning")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).resolve().parents[2]
STEPS = {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0}
SCRIPTS = {
    "lora": {"extra_trainable": "embed,norm"},
    "full": {},
    "adapter": {"version": 2, "start_layer": 0},
    "linearize": {"model.linear_window": 4, "keep_full": 1},
}


@pytest.fixture(scope="module")
def data_file(tmp_path_factory) -> Path:
    rng, words = np.random.default_rng(0), "the quick brown fox jumps over lazy dog and sleeps".split()
    made = [{"instruction": f"Say {i}", "output": " ".join(rng.choice(words, 1 + i % 9))} for i in range(40)]
    path = tmp_path_factory.mktemp("data") / "data.json"
    path.write_text(json.dumps(made))
    return path


@pytest.fixture
def train(tiny_checkpoint, data_file, tmp_path):
    """Run a finetuning script as a process of its own: its directory, and the rows of its metrics."""

    def run(script: str, name: str, **arguments) -> tuple[Path, list[dict[str, str]]]:
        arguments = {"checkpoint_dir": tiny_checkpoint, "data": data_file, "sample": "false"} | STEPS | arguments
        flags = [str(x) for key, value in arguments.items() for x in (f"--{key}", value)]
        command = [sys.executable, str(ROOT / f"finetune/{script}.py"), "--out_dir", str(tmp_path / name), *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        with open(tmp_path / name / "metrics.csv", newline="") as stream:
            return tmp_path / name, list(csv.DictReader(stream))

    return run


def assert_same(rows: list[dict[str, str]], others: list[dict[str, str]], rel: float) -> None:
    assert len(rows) == len(others) == 5
    for row, other in zip(rows, others, strict=True):
        for key in ("loss", "val_loss"):
            assert row[key] == other[key] == "" or float(row[key]) == pytest.approx(float(other[key]), rel=rel), row


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_gpu_makes_the_losses_of_a_cpu(train, script):
    """Catches: a weight left on the CPU, another loss there, bfloat16 that loses small steps, recomputing that differs.
    float32 by 1e-3 (products there round differently), bfloat16 by 3e-2."""
    _, plain = train(script, "cpu", device="cpu", **SCRIPTS[script])
    directory, rows = train(script, "gpu", precision="32-true", recompute="all", **SCRIPTS[script])
    assert_same(rows, plain, 1e-3)
    for precision in ("bf16-true", "bf16-mixed"):
        directory, rows = train(script, precision, precision=precision, **SCRIPTS[script])
        assert_same(rows, plain, 3e-2)
        assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"])
        logits = load_model(directory / "final", torch.bfloat16, "cuda")(torch.arange(9, device="cuda")[None])
        assert logits.isfinite().all()


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"])
def test_qlora_on_a_gpu(train, mode):
    """Catches: bitsandbytes' kernels that do not get the layout they want; a base that does not load again."""
    pytest.importorskip("bitsandbytes")
    directory, rows = train("lora", mode, quantize=mode, precision="bf16-true", max_steps=4)
    _, plain = train("lora", "plain", precision="bf16-true")
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"])
    assert_same(rows, plain, 0.15)
    assert load_model(directory / "final")(torch.arange(9)[None]).isfinite().all()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("script", ["lora", "full"])
def test_two_gpus_make_the_losses_of_one(train, strategy, script):
    """Catches: through NCCL, what test_finetune.py catches through gloo."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    arguments = {"precision": "32-true", "batch_size": 7, "micro_batch_size": 2}
    one, rows = train(script, "one", **arguments)
    two, others = train(script, "two", devices=2, strategy=strategy, **arguments)
    assert_same(rows, others, 1e-3)
    idx = torch.arange(9)[None]
    a, b = load_model(one / "final")(idx), load_model(two / "final")(idx)
    torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * a.abs().max().item())
