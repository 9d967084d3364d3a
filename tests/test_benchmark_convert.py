"""The peak memory of a conversion is what is measured, and it stays far below the model's size."""

import json
import multiprocessing
import os
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "benchmark_convert.py"


def hold(pipe) -> None:
    """80 MB in one step of C, which lets no other thread of this process run, and given back at the end."""
    held = [b"x" * 10**6 * 50]
    pipe.send("imported")
    pipe.recv()
    for _ in range(20):
        bytearray(b"x" * 10**6) * 80
    pipe.send(len(held))


def test_the_peak_is_seen_and_no_more_than_that() -> None:
    """Catches: a watcher that sees nothing, counts what was there before, or misses what is gone at the end."""
    script = runpy.run_path(str(SCRIPT))
    here, there = multiprocessing.Pipe()
    if not (process := os.fork()):
        hold(there)
        os._exit(0)
    here.recv()
    own, with_files = script["peak_growth"](process, here)
    os.waitpid(process, 0)
    assert 40e6 < own < 110e6 and 40e6 < with_files < 110e6
    assert script["resident"](process) == (0, 0)


@pytest.mark.slow
def test_a_small_model_is_measured_in_every_case(tmp_path: Path, tiny_checkpoint: Path, run_script) -> None:
    """Catches: a case that fails, or holds all of the model."""
    output = tmp_path / "out.json"
    sizes = ("--model.n_layer", 4, "--model.vocab_size", 400)
    arguments = ("--tokenizer_dir", tiny_checkpoint, "--shard_MB", 20, "--output", output, *sizes)
    code, _, err = run_script("scripts/benchmark_convert.py", "--name", "SmolLM2-360M", *arguments)
    assert code == 0, err
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 8 and all(row["own_MB"] > 0 for row in rows)
