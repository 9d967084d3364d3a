"""The memory there is, what does not fit into it, and which errors mean that it ran out.

Sizes that can be computed are compared with it before anything is allocated: a CPU's memory that runs out ends in the
kernel killing a process, not in an error. torch is imported where a tensor's device is asked for, not before.
"""

import errno
import math
import os
import re
import sys
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
UNKNOWN = 2**31  # what is planned with where the system does not say
SLACK = 1.05, 2**26  # a size is refused beyond this factor of what is free, and so many bytes that malloc may hold


# --------------------------------------------------------------------------------------------------------- what is free


def free_memory(device: "torch.device", swap: bool = False) -> int:
    """Bytes that can still be allocated on the device.

    On a CPU: what the system can give without swapping (with swap: or by it), within the limits of this process and of
    the control groups that it is in. On Linux alone; elsewhere the half of the machine's memory.
    """
    import torch

    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if not (PROC / "meminfo").exists():
        return machine_memory() // 2 or UNKNOWN
    system = read_sizes(PROC / "meminfo", unit=1024)
    swapped = system.get("SwapFree", 0) if swap else 0
    free = [system.get("MemAvailable", system.get("MemFree", UNKNOWN)), *control_group_room()]
    return max(0, min(min(free) + swapped, *process_room()))


def peak_memory(device: "torch.device") -> int:
    """Bytes: the most that torch had allocated on a GPU so far, or that this process had in memory; 0: not known."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine_memory() -> int:
    """Bytes of memory that the machine has; 0 where nobody says."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # Windows
        return 0


def read_sizes(path: Path, unit: int = 1) -> dict[str, int]:
    """The numbers of a file with a name and a number in each line, in bytes."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): unit * int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def control_group_room() -> Iterator[int]:
    """What each limit of the control groups of this process leaves, in both versions of their files."""
    names = {True: ("memory.max", "memory.current"), False: ("memory.limit_in_bytes", "memory.usage_in_bytes")}
    try:
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, group in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        inside = root / group.lstrip("/")
        for place in (inside, *inside.parents):  # a group's limit holds for those inside it
            limit, used = (read_number(place / name) for name in names[not controllers])
            if limit is not None and used is not None and limit < 2**60:  # "max", or version 1's largest number
                stat = read_sizes(place / "memory.stat")
                prefix = "total_" if controllers else ""
                cache = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
                yield limit - used + cache  # the kernel drops cached files before it refuses memory
            if place == root:
                break


def read_number(path: Path) -> int | None:
    """The number that a file holds, if it is there and holds one."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def process_room() -> Iterator[int]:
    """What the limits on this process (ulimit -v, ulimit -d) leave."""
    import resource

    yield 2**62
    pages = (PROC / "self" / "statm").read_text().split()
    for limit, used in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY:
            yield most - int(used) * resource.getpagesize()


def require_memory(needed: int, device: "torch.device", what: str, remedy: str) -> None:
    """Raises ValueError when `needed` bytes, all of which will be written to, are more than the device can give.

    what: the subject of the sentence, such as "The caches of 2048 tokens". remedy: what to do, in words.
    """
    if needed <= SLACK[1] or device.type == "meta":
        return
    free = free_memory(device, swap=True)
    if needed > SLACK[0] * free + SLACK[1]:
        raise ValueError(f"{what} would take {format_bytes(needed)} and {format_bytes(free)} are free: {remedy}.")


def format_bytes(n: float) -> str:
    """1.2 GB, 345 MB."""
    if n < 1000:
        return f"{n:.0f} bytes"
    for unit in ("kB", "MB", "GB", "TB"):
        n /= 1000
        if n < 999.5 or unit == "TB":
            break
    return f"{n:,.0f} {unit}" if n >= 100 else f"{n:.{1 if n >= 10 else 2}f} {unit}"


# ------------------------------------------------------------------------------------------------------ what ran out

OUT_OF_MEMORY = re.compile(
    "out of memory|can't allocate memory|cannot allocate memory|not enough memory|unable to mmap|bad_alloc"
    "|bad allocation|_alloc_failed|host_allocation_failed|memoryallocation|failed to map segment|invalid buffer size"
    "|can't start new thread|pthread_create|resource temporarily unavailable|storage size calculation overflowed"
    "|integer multiplication overflow",
    re.IGNORECASE,
)
ASKED = re.compile(r"(?:allocate|mmap|buffer size:?) (\d[\d,.]*)\s*(bytes|[KMGT]i?B)", re.IGNORECASE)
FREE = re.compile(r"of which (\d[\d,.]*)\s*([KMGT]i?B) is free", re.IGNORECASE)
UNITS = {
    "bytes": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "tb": 1e12,
}

WHAT = {  # function in the traceback -> what it makes
    "build_model": "the weights",
    "random_model": "the weights",
    "add_lora": "LoRA's matrices",
    "set_kv_cache": "the key/value caches",
    "run_blocks": "the activations",
    "sum_nll": "the logits",
    "project": "the logits",
    "backward": "the activations and gradients",
    "adamw": "the optimiser's moments",
    "pack_for_cpu": "the packed weights",
}
REMEDIES = {  # argument of a script -> how it makes less of what takes memory
    "micro_batch_size": "--micro_batch_size 1",
    "max_seq_length": "a smaller --max_seq_length",
    "recompute": "--recompute all",
    "max_new_tokens": "a smaller --max_new_tokens",
    "seq_len": "a smaller --seq_len",
    "batch_size": "a smaller --batch_size",
    "lengths": "smaller --lengths",
    "prompt_tokens": "a smaller --prompt_tokens",
    "positions": "smaller --positions",
    "cache_size": "a smaller --cache_size",
    "tokens": "fewer --tokens",
    "chunk_size": "a smaller --chunk_size",
    "name": "a smaller model",
    "dtype": "--dtype bfloat16",
    "dtypes": "--dtypes bfloat16",
    "quantize": "--quantize int4",
    "model": "a window (--model.attention sliding --model.sliding_window_size S --model.rolling_kv_cache true)",
}
OF_WEIGHTS = ("name", "dtype", "dtypes", "quantize")  # what makes the weights smaller


def ran_out_of_memory(error: BaseException) -> bool:
    """True for an error by which Python, torch, the system or a GPU's libraries say that memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    named = isinstance(error, (RuntimeError, ImportError, SystemError)) or type(error).__name__ == "SafetensorError"
    return named and OUT_OF_MEMORY.search(str(error)) is not None


def memory_sentence(error: BaseException, arguments: Collection[str]) -> str | None:
    """What to say of an error that means, or hides, that memory ran out; None for any other.

    arguments: those of the script, of which the ones that make it take less are named.
    """
    seen: list[BaseException] = []
    while error is not None and error not in seen and not ran_out_of_memory(error):
        seen.append(error)
        error = error.__cause__ or error.__context__
    if error is None or error in seen:
        return None
    names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    made = next((WHAT[name] for name in reversed(names) if name in WHAT), None)
    asked, free = find_bytes(ASKED, str(error)), find_bytes(FREE, str(error))
    if free is None and "cuda" not in str(error).lower():
        import torch

        free = free_memory(torch.device("cpu"))
    figures = "" if asked is None else f": {format_bytes(asked)} more were asked for"
    figures += "" if free is None else f"{' and' if figures else ':'} {format_bytes(free)} are free"
    if made in ("the weights", "the packed weights"):  # a shorter text is no help
        arguments = [name for name in OF_WEIGHTS if name in arguments] or arguments
    return f"The memory does not hold {made or 'what this run needs'}{figures}. {remedy_sentence(arguments)}"


def remedy_sentence(arguments: Collection[str]) -> str:
    """What makes a script with these arguments take less memory."""
    accumulates = "micro_batch_size" in arguments  # batch_size is then a matter of time alone
    names = [name for name in REMEDIES if name in arguments and not (name == "batch_size" and accumulates)]
    found = [REMEDIES[name] for name in names if not (name == "model" and accumulates)]
    if not found:
        return "End other programs, or use a machine with more memory."
    return f"Use {', '.join(found[:-1])} or {found[-1]}." if len(found) > 1 else f"Use {found[0]}."


def find_bytes(pattern: re.Pattern, text: str) -> float | None:
    """The first size in a library's message."""
    found = pattern.search(text)
    if found is None:
        return None
    number = float(found[1].replace(",", "").rstrip("."))
    return number * UNITS[found[2].lower()] if math.isfinite(number) else None
