"""Measure decoding on a CPU, alone and beside other programs: python scripts/benchmark_cpu.py."""

import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

MODES = {  # -> dtype, mode of lit_swa.quantize or None, llama.cpp's nearest
    "fp32": ("float32", None, "F32"),
    "bf16": ("bfloat16", None, "BF16"),
    "int8": ("bfloat16", "int8", "Q8_0"),
    "int4": ("bfloat16", "int4", "Q4_0"),
}
WAYS = ("eager", "compiled", "transformers", "llama.cpp")
BUSY = (sys.executable, "-S", "-c", "while True: pass")
SETTLE = 0.5  # seconds in which a change of the load shows


class Task(NamedTuple):
    """What a process of its own measures, so that no way's threads are in another's."""

    way: str
    mode: str
    checkpoint_dir: Path | None
    position: int
    steps: int


def main(
    checkpoint_dir: Path | None = None,
    modes: list[str] | None = None,
    ways: list[str] | None = None,
    position: int = 256,
    steps: int = 32,
    repeats: int = 5,
    busy: int = 1,
    output: Path = Path("tutorials/results/benchmark_cpu.json"),
) -> None:
    """Print tokens per second of greedy decoding on a CPU: of this project, transformers and llama.cpp.

    They are measured alone and while other programs keep some cores busy. Each way runs in a process of its own, and
    all processes take turns: `repeats` rounds alone, then as many beside the busy programs. Medians are given.

    Args:
        checkpoint_dir: A checkpoint's directory or name. By default SmolLM2-135M-Instruct, which is downloaded once.
        modes: How weights are held: fp32, bf16, int8, int4 (rounded). By default all.
        ways: eager, compiled, transformers, llama.cpp (where xllamacpp can be imported). By default all. Quantised
            weights are measured compiled and by llama.cpp.
        position: Where decoding is timed.
        steps: How many tokens are timed together.
        repeats: How often each is timed, alone and beside the busy programs.
        busy: How many programs keep a core busy each.
        output: Where the JSON goes.
    """
    from lit_swa.checks import check_at_least
    from lit_swa.formats.download import find_checkpoint
    from lit_swa.formats.files import write_json
    from lit_swa.utils import describe_command, describe_machine

    checkpoint_dir = find_checkpoint(checkpoint_dir)
    wanted = {"modes": (modes or list(MODES), MODES), "ways": (ways or list(WAYS), WAYS)}
    for name, (values, known) in wanted.items():
        if unknown := [value for value in values if value not in known]:
            raise ValueError(f"{name}: there is no {unknown[0]!r}: choose from {', '.join(known)}.")
    check_at_least(position=(position, 1), steps=(steps, 1), repeats=(repeats, 1), busy=(busy, 0))
    command = describe_command("--output")
    arguments = {"position": position, "steps": steps, "repeats": repeats, "busy": busy}
    result = {"command": command, "machine": describe_machine("cpu"), "arguments": arguments, "rows": []}
    output.parent.mkdir(parents=True, exist_ok=True)
    for mode in wanted["modes"][0]:
        tasks = [Task(way, mode, checkpoint_dir, position, steps) for way in wanted["ways"][0] if fits(way, mode)]
        for row in measure(tasks, repeats, busy):
            result["rows"].append(row)
            report(row)
            write_json(output, result)  # what is done is kept
    print(f"written to {output}", file=sys.stderr)


def fits(way: str, mode: str) -> bool:
    return MODES[mode][1] is None or way in ("compiled", "llama.cpp")


def measure(tasks: list[Task], repeats: int, busy: int) -> list[dict[str, Any]]:
    """A row for each task: tokens per second, alone and beside busy programs."""
    children = {}
    for task in tasks:  # one after the other, so that nothing is chosen or compiled beside another
        child = Child(task)
        if (reason := child.pipe.recv()) is None:
            children[task] = child
        else:
            print(f"{task.way} is left out: {reason}", file=sys.stderr)
    rates: dict[bool, dict[Task, list[float]]] = {}
    for loaded in (False, True):
        programs = [subprocess.Popen(BUSY) for _ in range(busy if loaded else 0)]
        try:
            time.sleep(SETTLE)
            rates[loaded] = take_turns(children, repeats, loaded)
        finally:
            for program in programs:
                program.kill()
                program.wait()
    for child in children.values():
        child.end()
    rows = []
    for task in children:
        alone, loaded = median(rates[False][task]), median(rates[True][task])
        rows.append({"mode": task.mode, "way": task.way, "alone_tok_s": alone, "busy_tok_s": loaded})
    return rows


def take_turns(children: dict[Task, "Child"], repeats: int, loaded: bool) -> dict[Task, list[float]]:
    rates: dict[Task, list[float]] = {task: [] for task in children}
    for n in range(repeats + 1):  # the first round warms up
        for task, child in children.items():
            rate = child.rate(loaded)
            if n:
                rates[task].append(rate)
    return rates


class Child:
    """The process that measures a task."""

    def __init__(self, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, task), daemon=True)
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process inherits it: Ctrl-C ends its parent, and
        self.process.start()  # that ends it
        signal.signal(signal.SIGINT, interrupt)

    def rate(self, loaded: bool) -> float:
        """Tokens per second of one run. loaded: other programs run as well."""
        self.pipe.send(loaded)
        return self.pipe.recv()

    def end(self) -> None:
        self.pipe.send(None)
        self.process.join()


def serve(pipe: Connection, task: Task) -> None:
    """Make ready, and time a run whenever asked. Sends None first, or why the way cannot be measured."""
    import torch

    from lit_swa.machine import sharing_cores
    from scripts.peers.decode import LeftOut

    with torch.inference_mode(), suppress(EOFError, BrokenPipeError):  # the parent is gone
        try:
            run = build(task)
        except (ImportError, LeftOut) as reason:
            return pipe.send(str(reason))
        pipe.send(None)
        while (loaded := pipe.recv()) is not None:
            with sharing_cores() if loaded else nullcontext():  # the processes that wait count as other programs
                until = time.perf_counter() + SETTLE
                while time.perf_counter() < until:
                    run()
                started = time.perf_counter()
                seconds = run()
            pipe.send(task.steps / (time.perf_counter() - started if seconds is None else seconds))


def build(task: Task) -> Callable[[], float | None]:
    """What decodes the steps, from the same position whenever it is called; it may return seconds of its own."""
    import torch

    from lit_swa.checkpoint import load_model
    from lit_swa.generate import Sampling
    from scripts.peers.decode import Cell, LlamaCpp, Transformers

    dtype, quantize, gguf = MODES[task.mode]
    peer = task.way in ("llama.cpp", "transformers")  # which quantise in ways of their own
    weights = load_model(task.checkpoint_dir, dtype, "cpu", quantize=None if peer else quantize)
    ids = torch.randint(0, weights.config.vocab_size, (1, task.position), generator=torch.Generator().manual_seed(1))
    cell = Cell(1, task.position, task.steps)
    if task.way == "llama.cpp":
        return LlamaCpp(weights, Sampling(), gguf, task.position + task.steps).decode(ids, cell)
    if task.way == "transformers":
        return Transformers(weights, Sampling()).decode(ids, cell)
    return ours(weights, task.way == "compiled", ids, cell)


def ours(model, compiled: bool, ids, cell) -> Callable[[], None]:
    """As generate/base.py does it."""
    from lit_swa.fast_decode import compile_decode
    from lit_swa.generate import Sampler, Sampling, Session
    from lit_swa.linear_formats import pack_for_cpu

    session = Session(model, lookahead=cell.steps, decode=compile_decode(model) if compiled else None)
    if not compiled:
        pack_for_cpu(model)
    session.reserve(cell.position + cell.steps)
    session.feed(ids)
    sampler, first = Sampler(Sampling(), [[0]], model.config.vocab_size, "cpu"), ids[:, -1:]

    def run() -> None:
        session.take_back(session.length - cell.position)
        token = first
        for _ in range(cell.steps):
            token = sampler.choose(session.feed(token)[:, -1])

    return run


def report(row: dict[str, Any]) -> None:
    line = f"{row['mode']}  {row['way']:12}  alone {row['alone_tok_s']:6.1f} tok/s"
    line += f"  beside busy programs {row['busy_tok_s']:6.1f} tok/s ({row['busy_tok_s'] / row['alone_tok_s']:.0%})"
    print(line, flush=True)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
