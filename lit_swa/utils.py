"""What every script shares: the command line, errors for people."""

import gc
import inspect
import io
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from lit_swa.machine import sharing_cores
from lit_swa.memory import memory_sentence, peak_memory

if TYPE_CHECKING:
    import torch


PATIENCE = 2.0  # seconds that a process is left to end by itself where another one has ended


def run_script(main: Callable[..., Any]) -> None:
    """Run main with the command line's arguments.

    A ValueError or an OSError is the user's to mend, and so is too little memory: one sentence goes to stderr, with
    exit code 2. Anything else is a bug of ours and keeps its traceback, as does everything when LIT_SWA_TRACEBACK=1 is
    set. Lines on a stderr that nobody reads any more change neither the work nor the exit code. Where the reader of
    stdout has had enough (| head), the script ends without a word. Of several processes a later one waits before it
    says its error: if the first has met one, torchrun has ended this one by then, or the first, which started it, is
    gone.
    """

    from lit_swa.command_line import run_main

    if not isinstance(sys.stderr, Unbreakable):
        sys.stderr = Unbreakable(sys.stderr or open(os.devnull, "w"))  # None: it was closed before the start
    replace_characters()
    parent = os.getppid()
    try:
        try:
            with sharing_cores():
                run_main(main)
            leave_processes()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        sys.exit(128 + 13)  # as a shell says of SIGPIPE
    except Exception as e:
        if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) != "0":
            limit = time.monotonic() + 5 * PATIENCE
            while time.monotonic() < limit and os.getppid() == parent:
                time.sleep(PATIENCE / 20)
            if os.getppid() != parent:
                sys.exit(2)
        sentence = error_sentence(e, main)
        if sentence is None or os.environ.get("LIT_SWA_TRACEBACK") == "1":
            raise
        print_line(f"error: {sentence}")
        sys.exit(2)
    except KeyboardInterrupt:
        print_line("interrupted")
        sys.exit(130)
    finally:
        drop_unread_output()


def leave_processes() -> None:
    """End what torch.distributed keeps for this process, while Python still runs: its threads may not outlive that.

    Not after an error: the others may wait for this process.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def error_sentence(error: Exception, main: Callable[..., Any]) -> str | None:
    """What to tell the user of main's error; None for a bug of ours."""
    from jsonargparse import ArgumentError

    from lit_swa.arguments import SHARED
    from lit_swa.command_line import shorten

    names = list(inspect.signature(main).parameters)
    shared = [field for name in names if name in SHARED for field in SHARED[name].__dataclass_fields__]
    if (sentence := memory_sentence(error, [*names, *shared])) is not None:
        return sentence
    if isinstance(error, OSError) and error.errno and error.filename:  # the system's own: what, and no remedy
        return shorten(f"{error.filename} cannot be used ({error.strerror}): check the path, its rights and its disk.")
    hint = " (--help lists the arguments)" if isinstance(error, ArgumentError) else ""
    return f"{shorten(str(error))}{hint}" if isinstance(error, (ArgumentError, ValueError, OSError)) else None


class Unbreakable:
    """A stream that drops what cannot be written, since its reader ended, its terminal was closed or its disk is full:
    no work ends for a line on stderr."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def drop_unread_output() -> None:
    """Let what a stdout without a reader still holds go nowhere: Python would exit with 120 when it cannot flush it."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        with suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def replace_characters() -> None:
    """Print ? for a character that the console's encoding lacks, in place of an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def pick_device(name: str) -> str:
    """The device of that name; "auto" is cuda, mps or cpu, whichever is there. Raises ValueError if it is not."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, available in there.items() if available)
    kind = name.split(":")[0]
    if kind not in there:
        raise ValueError(f"device={name!r} does not fit: choose from auto, {', '.join(there)}.")
    if not there[kind]:
        raise ValueError(f"device={name!r} is not on this machine: use --device cpu.")
    return name


def count_processes(devices: int, num_nodes: int) -> tuple[int, int]:
    """Processes on each machine, and machines: as asked for or, if torchrun or SLURM's srun started this process, as
    many as they did. Raises ValueError when both are given and do not agree."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        starter, world, per_node = "torchrun", int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"])
    elif int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:  # an interactive shell of srun's is one task
        starter, world = "srun", int(env["SLURM_STEP_NUM_TASKS"])
        per_node = world // int(env.get("SLURM_STEP_NUM_NODES", "1"))
    else:
        if num_nodes > 1 and "MASTER_ADDR" not in env:
            raise ValueError(
                f"num_nodes={num_nodes} would wait for other machines without end: start the processes with torchrun "
                "or srun, and leave num_nodes out."
            )
        return devices, num_nodes
    if devices * num_nodes not in (1, world):
        raise ValueError(
            f"devices={devices} and num_nodes={num_nodes} do not fit the {world} processes that {starter} started: "
            "leave them out."
        )
    return per_node, world // per_node


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_devices(device: str, count: int) -> None:
    """Raises ValueError when this machine cannot run so many processes on such a device.

    Processes that share a core only take its memory and time from each other. Two are allowed on any machine, so that
    what runs on several devices can be tried; torchrun and srun, which have started theirs already, may start more.
    """
    import torch

    kind, _, number = device.partition(":")
    if kind == "cuda":
        there = torch.cuda.device_count()
        if count > there:
            raise ValueError(f"devices={count} does not fit: this machine has {there} GPUs.")
        if number.isdigit() and int(number) >= there:
            raise ValueError(f"device={device!r} does not fit: this machine has {there} GPUs, counted from 0.")
        return
    cores = count_cores()
    started = {"LOCAL_RANK", "SLURM_LOCALID"} & os.environ.keys()
    if count > max(2, cores) and not started:
        raise ValueError(
            f"devices={count} does not fit: each is a process, and this machine has {cores} cores: use at most "
            f"{max(2, cores)}."
        )


def pick_dtype(name: str, device: str) -> str:
    """The dtype of that name; "auto" is bfloat16 on a GPU that has it and float32 elsewhere."""
    import torch

    if name != "auto":
        return name
    return "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"


HANGUP = getattr(signal, "SIGHUP", None)  # a terminal was closed; Windows has none


@contextmanager
def interruptible(signals: Sequence[int] = (signal.SIGINT, signal.SIGTERM)) -> Iterator[Callable[[], bool]]:
    """Within it Ctrl-C, a SIGTERM such as SLURM sends before it kills, or the terminal's end is only noted, and the
    function that it gives says whether: a step is never cut in two.

    A second Ctrl-C or SIGTERM interrupts at once. The terminal's end is left alone under nohup, which ignores it.
    Outside the main thread, where signals cannot be caught, it changes nothing.
    """
    noted, asked = threading.Event(), threading.Event()

    def note(signum: int, frame: FrameType | None) -> None:
        if asked.is_set() and signum != HANGUP:  # a hangup comes twice, from the shell and from the terminal
            raise KeyboardInterrupt
        noted.set()
        if signum != HANGUP:
            asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield noted.is_set
        return
    if HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN:
        signals = (*signals, HANGUP)
    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield noted.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def describe_command(*left_out: str) -> str:
    """This script's command line, as typed, without these flags and their values."""
    words = sys.argv
    for flag in left_out:
        n = words.index(flag) if flag in words else len(words)
        words = [word for word in words[:n] + words[n + 2 :] if not word.startswith(f"{flag}=")]
    return "python " + shlex.join(words)


def describe_machine(device: str) -> str:
    """What a measurement was taken on: the processor or GPU, and torch's version."""
    import platform

    import torch

    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            model = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), model)
    return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def print_line(text: str, stays: bool = True) -> None:
    """Print a line on stderr. On a terminal it replaces a line that does not stay; a log file keeps every line."""
    terminal = sys.stderr.isatty()
    end = "\n" if stays or not terminal else ""
    print(f"\r\033[K{text}" if terminal else text, end=end, file=sys.stderr, flush=True)


def show_reading(done: int, total: int) -> None:
    """Show on a terminal how far a long prompt is read, in one line that goes when all is read."""
    if sys.stderr.isatty():
        print_line("" if done == total else f"reading {done} of {total} tokens, {done / total:.0%}", stays=False)


def show_encoding(name: str, done: int, total: int) -> None:
    """Show on a terminal how many bytes of a large text are encoded, in one line that goes when all are."""
    if total > 2**23 and sys.stderr.isatty():
        print_line("" if done >= total else f"encoding {done / 1e6:.0f} of {total / 1e6:.0f} MB of {name}", stays=False)


class ProgressLine:
    """One line on stderr: how much is done, what the caller says, tokens per second, memory, time to go.

    On a terminal the line is rewritten; in a log file a new one comes every `interval` seconds.
    """

    def __init__(self, total: int | None, what: str, *, done: int = 0, interval: float = 30.0) -> None:
        """total: units of work (tokens, steps, ...), None where nobody knows. done: units that an earlier run did."""
        self.total, self.what, self.before, self.interval = total, what, done, interval
        self.started = time.perf_counter()
        self.shown = -1e9 if total is not None else self.started

    def show(
        self, done: int, text: str = "", *, tokens: int | None = None, seconds: float | None = None, later: float = 0.0
    ) -> None:
        """Say that `done` units of the total are done. text: put in between, such as "ppl 12.3".

        tokens: what tokens per second counts, by default the units; 0: nothing. seconds: how long the work took, by
            default the time since this object was made. later: seconds that something else will take until the end.
        """
        now, finished = time.perf_counter(), self.total is not None and done >= self.total
        if now - self.shown < (0.1 if sys.stderr.isatty() else self.interval) and not finished:
            return
        self.shown = now
        units = done - self.before
        seconds = max(now - self.started if seconds is None else seconds, 1e-9)
        rate = "" if tokens == 0 else format_rate((units if tokens is None else tokens) / seconds)
        if self.total is None:
            parts = [f"{done} {self.what}", text, rate, memory_in_use()]
        else:
            share = f"{done / max(1, self.total):.1%}"
            eta = format_seconds((self.total - done) * seconds / units + later if units > 0 else math.inf)
            parts = [f"{self.what} {done}/{self.total} {share}", text, rate, memory_in_use(), f"eta {eta}"]
        print_line(" | ".join(part for part in parts if part), stays=finished)

    def clear(self) -> None:
        """Take the line away, where it would stay in front of what is printed next."""
        if sys.stderr.isatty():
            print_line("", stays=False)


def memory_in_use() -> str:
    """The peak so far: of the GPU's memory where there is one, else of this process."""
    import torch

    peak = peak_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return f"{peak / 1e9:.1f} GB" if peak else ""


def wait_for(device: "torch.device") -> None:
    """Wait until the device has done all that it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: "torch.device | str") -> float:
    """Seconds from when the device has nothing else to do until it has done all of work()."""
    import torch

    place = torch.device(device)
    wait_for(place)
    started = time.perf_counter()
    work()
    wait_for(place)
    return time.perf_counter() - started


def release_memory() -> None:
    """Give back what a model held that is gone."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def format_number(x: float, decimals: int = 2) -> str:
    """12.34, from a million on 1.2e+304; inf and nan as they are."""
    return f"{x:.{decimals}f}" if abs(x) < 1e6 else f"{x:.1e}"


def format_perplexity(nll: float) -> str:
    """exp(nll) for a mean of -log p, as format_number writes it; inf where it is beyond every float."""
    try:
        return format_number(math.exp(nll))
    except OverflowError:
        return "inf"


def format_seconds(seconds: float) -> str:
    """12s, 3m20s, 1h02m, or ? when it is not known."""
    if not seconds < 1e7:
        return "?"
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02d}m" if hours else f"{m}m{s:02d}s" if m else f"{s}s"


def format_rate(tokens_per_second: float) -> str:
    """850 tok/s, or 40.1k tok/s."""
    r = tokens_per_second
    return f"{r / 1e3:.1f}k tok/s" if r >= 1e4 else f"{r:.0f} tok/s"
