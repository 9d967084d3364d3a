"""How fast a run is beside what the memory allows: the bytes that a decode step reads, the rate at which the device
copies, and a trace of a few steps."""

import functools
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from lit_swa.formats.files import copy_file
from lit_swa.linear_formats import INJECTED, is_experts, is_linear, weight_bytes
from lit_swa.memory import format_bytes, free_memory, peak_memory
from lit_swa.model import GPT, KVCache
from lit_swa.moe import MoE
from lit_swa.utils import wait_for

# --------------------------------------------------------------------------------------------------- what a step reads


def step_bytes(model: GPT, first: int, last: int | None = None, batch_size: int = 1) -> float:
    """Bytes that a one-token step has to read: every weight once, and the keys and values that its tokens see.

    first, last: the mean over the steps at which each of the sequences has first .. last tokens, the step's own
        included; last None: the step at first.
    The model's caches must be there: they say what a key takes.
    """
    return weights_read(model, batch_size) + batch_size * keys_read(model, first, first if last is None else last)


def weights_read(module: nn.Module, tokens: int = 1) -> int:
    """Bytes of weights that a call of so many tokens reads: of an embedding a row for each, of experts as many as the
    tokens can choose, everything else once."""
    if is_linear(module) or is_experts(module):  # a format holds its weight as it likes, and knows how much that is
        own = weight_bytes(module) + (0 if module.bias is None else module.bias.nbytes)
        children = [child for name, child in module.named_children() if name in INJECTED]
    elif isinstance(module, nn.Embedding):
        own, children = tokens * module.weight[0].nbytes, []
    else:
        own, children = sum(p.nbytes for p in module.parameters(recurse=False)), module.children()
    return own + sum(int(share_read(module, child, tokens) * weights_read(child, tokens)) for child in children)


def share_read(module: nn.Module, child: nn.Module, tokens: int) -> float:
    """The share of a module's child that a call of so many tokens reads."""
    if not (isinstance(module, MoE) and is_experts(child)):
        return 1.0
    return min(1.0, tokens * module.config.n_expert_per_token / module.config.n_expert)


def keys_read(model: GPT, first: int, last: int) -> float:
    """Bytes of keys and values that a step sees of one sequence: the mean over the lengths first .. last."""
    total = 0.0
    for attn in model.layers:
        cache, window = attn.kv_cache, attn.mixer.window
        if isinstance(cache, KVCache):
            most = last if window is None else window + attn.mixer.n_sinks
            total += cache.bytes / cache.k.size(2) * mean_below(first, last, most) / model.cache_batch_size
        elif cache is not None:  # a state, which every step reads whole
            total += cache.bytes / model.cache_batch_size
    return total


def mean_below(first: int, last: int, most: int) -> float:
    """The mean of min(n, most) over n = first .. last."""
    growing = max(0, min(last, most) - first + 1)  # those up to `most`
    count = last - first + 1
    return (growing * (first + min(last, most)) / 2 + (count - growing) * most) / count


# ------------------------------------------------------------------------------------------------------- the copy rate

COPIED = {"cpu": 2**26, "cuda": 2**29}  # bytes of the copy that is timed: more than the caches of a processor hold
COPIES = {"cpu": (4, 1), "cuda": (4, 5)}  # how often it is timed, and how many are timed together


@functools.cache
def copy_rate(device: torch.device) -> float | None:
    """Bytes read and written per second while the device copies a large tensor to another: the best of four.

    None where that cannot be measured. It takes milliseconds on a GPU and a tenth of a second on a CPU, once a process.
    """
    size = COPIED.get(device.type)
    if size is None or free_memory(device) < 4 * size:
        return None
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    (rounds, copies), seconds = COPIES[device.type], []
    for _ in range(rounds):
        wait_for(device)
        started = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size * copies / max(min(seconds), 1e-9)


def memory_line(model: GPT, read: float, seconds: float) -> str:
    """For people: what decode read per second, its share of the copy rate, and the peak of the memory of each of the
    model's devices. read: bytes, 0 where they are not known."""
    peaks, parts = peak_memories(model), []  # before the copy that is timed
    if read and seconds > 0:
        rate, copied = read / seconds, copy_rate(model.transformer.wte.weight.device)
        share = "" if copied is None else f", {rate / copied:.0%} of the copy rate of {format_bytes(copied)}/s"
        parts.append(f"decode read {format_bytes(rate)}/s{share}")
    return " | ".join(parts + ([f"peak memory {peaks}"] if peaks else []))


def peak_memories(model: GPT) -> str:
    """1.2 GB, or 1.2 GB on cuda:0, 3.4 GB on cuda:1."""
    devices = dict.fromkeys(t.device for t in (*model.parameters(), *model.buffers()))
    peaks = [(format_bytes(peak), f" on {device}") for device in devices if (peak := peak_memory(device))]
    return ", ".join(peak + place * (len(peaks) > 1) for peak, place in peaks)


def mark(device: torch.device) -> Any:
    """A moment of the device's work, which the host does not wait for: for seconds_between."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(began: Any, ended: Any) -> float:
    """Seconds between two marks. The host waits until the second one is reached."""
    if isinstance(began, float):
        return ended - began
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3


# ---------------------------------------------------------------------------------------------------- a trace of steps


class StepTrace:
    """Records a few warm decode steps: call step() when one begins, and close() when no more will follow.

    close() writes them as a trace, which ui.perfetto.dev and chrome://tracing show, and a table of what took longest to
    stderr.
    """

    def __init__(self, path: Path, device: torch.device | str, skip: int = 8, steps: int = 8) -> None:
        """skip: steps that go by first. steps: how many are recorded. Raises OSError as check_trace does."""
        check_trace(path)
        self.path, self.device, self.skip, self.steps = path, torch.device(device), skip, steps
        self.begun, self.stopped, self.closed = 0, False, False
        self.times: list[float] = []  # when each of the recorded steps began, and when the last one ended
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler's own log goes to stderr
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        phases = schedule(wait=skip, warmup=1, active=steps, repeat=1)  # what is traced first takes longer
        self.profiler = profile(activities=activities, schedule=phases)
        self.profiler.start()

    def step(self) -> None:
        if self.stopped or len(self.times) > self.steps:
            return
        self.begun += 1
        if self.begun > self.skip:
            wait_for(self.device)  # its work belongs to the step before
            self.times.append(time.perf_counter())
        self.profiler.step()

    def stop(self) -> None:
        """Record nothing more: what follows is no step."""
        if not self.stopped:
            self.stopped = True
            self.profiler.stop()

    def close(self) -> None:
        """Write what was recorded, or say on stderr that nothing was, unless that was done."""
        if self.closed:
            return
        self.closed = True
        self.stop()
        steps = len(self.times) - 1
        if steps < 1:
            what = f"{max(0, self.begun - 1)} decode steps, and a trace begins after {self.skip}"
            print(f"There is no trace: the text had {what}.", file=sys.stderr)
            return
        with tempfile.TemporaryDirectory() as directory:
            self.profiler.export_chrome_trace(f"{directory}/trace.json")
            copy_file(Path(directory) / "trace.json", self.path)  # it appears whole
        milliseconds = (self.times[-1] - self.times[0]) * 1e3 / steps
        print(*table_of_steps(self.profiler, steps, milliseconds), sep="\n", file=sys.stderr)
        print(f"trace of {steps} steps, for ui.perfetto.dev: {self.path}", file=sys.stderr)


def check_trace(path: Path) -> None:
    """Raises OSError for a name that a trace cannot have."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: give the name of a file, such as {path / 'trace.json'}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no directory {path.parent} for {path.name}: make it, or give another name.")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent} cannot be written to: give {path.name} another directory.")


def table_of_steps(profiler: profile, steps: int, milliseconds: float, most: int = 12) -> list[str]:
    """The operations that took longest, on a GPU its kernels: a line for each, with its time per step.

    milliseconds: what a step took.
    """
    events = [e for e in profiler.key_averages() if not e.is_user_annotation]
    kernels = [(e.self_device_time_total, e) for e in events if e.device_type == DeviceType.CUDA]
    timed = sorted(kernels or [(e.self_cpu_time_total, e) for e in events], key=lambda pair: -pair[0])
    total, kind = sum(us for us, _ in timed), "kernels" if kernels else "operations"
    lines = [f"a step takes {milliseconds:.2f} ms, its {kind} {total / 1e3 / steps:.2f} ms; per step:"]
    for us, event in timed[:most]:
        share = us / max(total, 1e-9)
        lines.append(f"{us / 1e3 / steps:9.3f} ms {share:6.1%} {event.count / steps:7.1f}x  {event.key[:80]}")
    return lines
