"""What scripts need that start the project's training scripts."""

import json
import os
import queue
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lit_swa.utils import count_cores, interruptible

ROOT = Path(__file__).resolve().parents[1]


def typed(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line."""
    words: list[str] = []
    for name, value in options.items():
        words += [f"--{name}", json.dumps(value) if isinstance(value, bool | dict) else str(value)]
    return words


class Places:
    """GPUs and cores for scripts that run at the same time: each job has a GPU, and they share them where there are
    fewer. Of the CPU's cores each has its part, since threads that wait for a core are much slower than fewer threads;
    OMP_NUM_THREADS, if set, decides instead."""

    def __init__(self, device: str, jobs: int) -> None:
        """device: cuda for all GPUs that this process sees; of another one there is nothing to choose."""
        import torch

        n = torch.cuda.device_count() if device == "cuda" else 0
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n)))
        names = seen.split(",")[:n]
        self.threads: dict[str, str] = {}
        if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            self.threads = {"OMP_NUM_THREADS": str(max(1, count_cores() // jobs))}
        self.free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for job in range(jobs):
            self.free.put(names[job % n] if n > 1 else None)

    @contextmanager
    def one(self) -> Iterator[dict[str, str]]:
        """What the environment of a script has besides, as long as it runs."""
        name = self.free.get()
        try:
            yield self.threads | ({} if name is None else {"CUDA_VISIBLE_DEVICES": name})
        finally:
            self.free.put(name)


def execute(command: list[str], log: Path | None = None, environment: dict[str, str] | None = None) -> None:
    """Run one of the project's scripts, and print its command; what it prints goes to `log`, or to stderr.

    environment: what differs from this process's. Ctrl-C reaches the script too, which saves its step. Raises
    KeyboardInterrupt if it was interrupted, ValueError if it failed.
    """
    print(shlex.join(["python", *command]), file=sys.stderr, flush=True)
    words = [sys.executable, str(ROOT / command[0]), *command[1:]]
    with interruptible([signal.SIGINT]), open(log, "ab") if log else nullcontext(2) as stream:  # 2 is stderr
        code = subprocess.run(words, stdout=stream, stderr=stream, env=os.environ | (environment or {})).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code:
        where = f"{log} says" if log else "it says above"
        raise ValueError(f"{command[0]} failed, as {where}: mend that, and the same command goes on.")


def train(command: list[str], run: Path) -> dict[str, Any]:
    """Execute a finetuning script whose out_dir is `run`, or go on with it, and tell what the training took.

    Given are the command as typed, the loss of each step, the tokens, the seconds of all steps, the median of the
    steps' tokens per second, and the memory. Raises what `execute` does.
    """
    from lit_swa.formats.files import read_json
    from lit_swa.training.log import read_metrics
    from lit_swa.training.resuming import RUN_FILE

    execute(command)
    metrics = read_metrics(run)
    steps = zip([0.0, *metrics["tokens"]], metrics["tokens"], metrics["seconds"], strict=False)
    return {
        "command": shlex.join(["python", *command]),
        "loss": metrics["loss"],
        "trained_tokens": int(metrics["tokens"][-1]),
        "seconds": sum(metrics["seconds"]),
        "tok_s": statistics.median((after - before) / s for before, after, s in steps),
        "memory": read_json(run / "final" / RUN_FILE)["memory"],
    }
