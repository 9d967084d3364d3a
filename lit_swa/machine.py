"""This machine: its processor, where what was found out about it is kept, and the cores that other programs leave."""

import functools
import hashlib
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CPUINFO, STAT = Path("/proc/cpuinfo"), Path("/proc/stat")
INTERVAL = 0.25  # seconds over which the work of other programs is counted


@functools.cache
def processor() -> str:
    """A text that differs between processors which differ in speed or in instructions."""
    if not CPUINFO.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = CPUINFO.read_text().partition("\n\n")[0].splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    told = [fields.get(key, "") for key in ("vendor_id", "cpu family", "model", "model name", "cache size", "flags")]
    return f"{platform.machine()} {fields.get('model name', '')} {hashlib.sha256(repr(told).encode()).hexdigest()[:16]}"


def cache_dir() -> Path:
    """The directory for files that can be made again: LIT_SWA_CACHE, or lit_swa in the user's cache directory.

    Raises OSError when it cannot be made.
    """
    place = os.environ.get("LIT_SWA_CACHE")
    try:
        place = Path(place) if place else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_swa"
    except RuntimeError as e:  # nobody's home
        raise OSError(f"there is no directory for caches: {e}") from None
    place.mkdir(parents=True, exist_ok=True)
    return place


def keep_file(name: str, content: bytes) -> None:
    """Put a file into the cache directory; nobody ever sees a half of it. Raises OSError."""
    half = cache_dir() / f"{name}.{os.getpid()}.tmp"
    try:
        half.write_bytes(content)
        half.replace(cache_dir() / name)
    finally:
        half.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- the cores that are free
#
# One token's products are hundreds of short parallel regions, and each ends when the last thread is done. Where another
# program runs on a core, the thread there has its turn every few milliseconds only, and all others wait for it, region
# after region: two threads on two cores, one of them busy, make a third of the tokens that one thread makes.


class FreeCores:
    """How many cores other programs leave, by what Linux counts; the answer is at most INTERVAL old."""

    def __init__(self) -> None:
        self.cores = self.free = os.cpu_count() or 1
        self.seen = (time.monotonic(), *work_done())

    def count(self) -> int:
        """At least 1."""
        if time.monotonic() - self.seen[0] >= INTERVAL:
            now = (time.monotonic(), *work_done())
            seconds, all_programs, own = (b - a for a, b in zip(self.seen, now, strict=True))
            self.free, self.seen = max(1, round(self.cores - (all_programs - own) / seconds)), now
        return self.free


def work_done() -> tuple[float, float]:
    """Seconds that all cores have worked since the machine started, without programs that give way by themselves
    (nice), and those that they worked for this process."""
    user, _, system, _, _, *interrupts = map(int, STAT.read_text().split("\n", 1)[0].split()[1:9])
    return (user + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:2])


shared: FreeCores | None = None  # within sharing_cores()


@contextmanager
def sharing_cores() -> Iterator[None]:
    """Within it a Session's calls on a CPU use no more threads than cores are free. It changes nothing where the user
    said how many threads there are (OMP_NUM_THREADS), and where the system does not say what other programs do."""
    global shared
    before = shared
    shared = FreeCores() if STAT.exists() and "OMP_NUM_THREADS" not in os.environ else None
    try:
        yield
    finally:
        shared = before


@contextmanager
def few_threads(most: int | None = None) -> Iterator[None]:
    """torch's threads are at most so many; None: no more than there are free cores, within sharing_cores()."""
    import torch

    before = torch.get_num_threads()
    most = before if most is None and shared is None else shared.count() if most is None else most
    if most >= before:
        yield
        return
    torch.set_num_threads(most)
    try:
        yield
    finally:
        torch.set_num_threads(before)
