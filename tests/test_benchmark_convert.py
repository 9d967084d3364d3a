"""The peak memory of a conversion is what is measured, and it stays far below the model's size."""

import json
import multiprocessing
import os
import runpy
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "benchmark_convert.py"


def hold(pipe) -> None:
    """80 MB for a while beside 50 MB, and given back before the end."""
    held = [b"x" * 10**6 * 50]
    pipe.send("imported")
    pipe.recv()
    held.append(b"x" * 10**6 * 80)
    time.sleep(0.7)
    held.pop()
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
    assert 70e6 < own < 90e6 and 70e6 < with_files < 100e6
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
