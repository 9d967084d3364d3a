"""What scripts need that start the project's training scripts."""

import gc
import json
import shlex
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lit_swa.utils import interruptible

ROOT = Path(__file__).resolve().parents[1]


def typed(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line."""
    words: list[str] = []
    for name, value in options.items():
        words += [f"--{name}", json.dumps(value) if isinstance(value, bool | dict) else str(value)]
    return words


def execute(command: list[str], log: Path | None = None) -> None:
    """Run one of the project's scripts, and print its command; what it prints goes to `log`, or to stderr.

    Ctrl-C reaches the script too, which saves its step. Raises KeyboardInterrupt if it was interrupted, ValueError if
    it failed.
    """
    print(shlex.join(["python", *command]), file=sys.stderr, flush=True)
    words = [sys.executable, str(ROOT / command[0]), *command[1:]]
    with interruptible([signal.SIGINT]), open(log, "ab") if log else nullcontext(2) as stream:  # 2 is stderr
        code = subprocess.run(words, stdout=stream, stderr=stream).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code:
        where = f"{log} says" if log else "it says above"
        raise ValueError(f"{command[0]} failed, as {where}: mend that, and the same command goes on.")


def free_memory() -> None:
    """Give back what a model held that is gone."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
