"""The processes that share a model: starting them, joining them, and ending them all when one ends.

torchrun starts a script in several processes, or `start` does; `joined` lets them talk. The first alone prints. An
error is said once: utils.run_script lets another process wait a moment before it says its own, and if the first has met
the same, whoever started them has ended the rest by then.
"""

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from lit_swa.utils import HANGUP, PATIENCE, check_devices, count_cores, pick_device, print_line

if TYPE_CHECKING:
    from lit_swa.parallel import Rank


STARTER = "LIT_SWA_STARTER"  # in the environment of a process that start() has started: whose child it is


def started() -> bool:
    """True in a process that torchrun, or start(), has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def count_ranks(devices: int | None, device: str) -> int:
    """How many processes to start: as many as asked for, or one for each GPU. Raises ValueError if there are fewer."""
    import torch

    name = pick_device(device)
    if devices is None:
        devices = torch.cuda.device_count() if name == "cuda" else 1
    if devices > 1 and ":" in name:
        raise ValueError(f"device={device!r} is one device and devices={devices}: use --device cuda.")
    check_devices(name, devices)
    return devices


def start(count: int) -> NoReturn:
    """Run this script in `count` processes instead, and end with the exit code of the first that failed, or 0."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared[STARTER] = os.getpid()
    threads = max(1, count_cores() // count)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | {name: str(x) for name, x in shared.items()}
    processes: list[subprocess.Popen] = []
    heeded = [n for n in (signal.SIGTERM, HANGUP) if n is not None and signal.getsignal(n) != signal.SIG_IGN]
    end = {number: signal.signal(number, raise_exit) for number in heeded}
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the processes inherit it: Ctrl-C ends this one,
    try:
        for rank in range(count):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            stdin = None if rank == 0 else subprocess.DEVNULL
            processes.append(subprocess.Popen([sys.executable, *sys.argv], env=own, stdin=stdin))
        signal.signal(signal.SIGINT, interrupt)
        code = wait_for_all(processes)
    finally:  # ... and this one them
        stop_all(processes)
        for number, handler in (end | {signal.SIGINT: interrupt}).items():
            signal.signal(number, handler)
    sys.exit(code)


def raise_exit(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)


def wait_for_all(processes: list[subprocess.Popen]) -> int:
    """0 when all have ended well, else the exit code of the first that has not; a signal's end is told."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [(code, rank) for rank, code in enumerate(codes) if code]
        if not failed:
            if None not in codes:
                return 0
            time.sleep(0.02)
            continue
        code, rank = min(failed)  # a signal is negative: what it ended is the cause of what failed beside it
        if code < 0 and -code not in (signal.SIGABRT, getattr(signal, "SIGALRM", 0)):  # whom these end has said why
            name = signal.Signals(-code).name
            guess = ": was there too little memory?" if name == "SIGKILL" else "."
            print_line(f"error: process {rank} of {len(processes)} was ended by {name}{guess}")
        return code if code > 0 else 2


def stop_all(processes: list[subprocess.Popen]) -> None:
    """End what still runs, by force if need be."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    limit = time.monotonic() + PATIENCE
    while any(process.poll() is None for process in processes):
        if time.monotonic() > limit:
            for process in processes:
                process.kill()
        time.sleep(0.02)


@contextlib.contextmanager
def joined(devices: int | None, device: str) -> "Iterator[tuple[Rank, str]]":
    """Within it this process is one of those that torchrun, or start(), has started, or alone; gives its rank and the
    name of its device. Only the first prints. Raises ValueError if the processes are not as many as asked for."""
    from lit_swa.parallel import ALONE, Rank

    if not started():
        yield ALONE, device
        return
    if STARTER in os.environ and os.name != "nt":  # there the parent may be a launcher, and is never another
        end_with(int(os.environ[STARTER]))
    index, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with ending_quietly(index), muted(index > 0):
        if devices not in (None, size):
            raise ValueError(f"devices={devices} does not fit the {size} processes that were started: leave it out.")
        name = local_device(device)
        with connected(name, index, size):
            yield Rank(index, size), name


def local_device(device: str) -> str:
    """The device of this process: of several GPUs, the one of its number."""
    name, number = pick_device(device), int(os.environ.get("LOCAL_RANK", "0"))
    if ":" in name:
        raise ValueError(f"device={device!r} is one device, and there are several processes: use --device cuda.")
    check_devices(name, int(os.environ.get("LOCAL_WORLD_SIZE", number + 1)))
    return f"cuda:{number}" if name == "cuda" else name


@contextlib.contextmanager
def connected(device: str, index: int, size: int) -> Iterator[None]:
    """Within it torch.distributed reaches the other processes: by NCCL on GPUs, by gloo elsewhere."""
    import torch
    import torch.distributed as dist

    from lit_swa.peer_memory import forget_shared

    options: dict[str, Any] = {"backend": "gloo"}
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        options = {"backend": "nccl", "device_id": torch.device(device)}
    dist.init_process_group(rank=index, world_size=size, **options)
    yield
    forget_graphs()
    forget_shared()
    dist.destroy_process_group()  # not after an error: the others may wait for this process in a sum


def forget_graphs() -> None:
    """Free the CUDA graphs that nobody uses any more: NCCL waits for those that hold its sums before it ends."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        gc.collect()


@contextlib.contextmanager
def muted(silent: bool) -> Iterator[None]:
    """Within it, what Python prints goes nowhere."""
    if not silent:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


@contextlib.contextmanager
def ending_quietly(index: int) -> Iterator[None]:
    """Within it, what follows from the end of another process ends this one without a word."""
    try:
        yield
    except KeyboardInterrupt:
        if index == 0:
            raise
        sys.exit(130)
    except Exception as e:
        if lost_another(e):
            end_by_force()
            sys.exit(2)  # it has said why, or whoever started it does
        end_by_force()
        raise


def end_by_force() -> None:
    """End this process in a while if it has not ended by itself: NCCL may wait for the others for ever."""
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(4 * PATIENCE))


def end_with(starter: int) -> None:
    """End this process when the one that has started it is gone, which could not do so if it was killed."""

    def watch() -> None:
        while os.getppid() == starter:
            time.sleep(PATIENCE / 4)
        os._exit(2)

    threading.Thread(target=watch, daemon=True).start()


def lost_another(error: Exception) -> bool:
    """True for what torch.distributed raises when another process has ended."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and "/gloo/" in str(error)


def from_first(value: Any, rank: "Rank") -> Any:
    """The value of the first process, in all of them."""
    import torch.distributed as dist

    if rank.size == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0, group=rank.group)
    return held[0]


def least(n: int, rank: "Rank", device: str) -> int:
    """The least of all processes' n."""
    import torch
    import torch.distributed as dist

    if rank.size == 1:
        return n
    held = torch.tensor(n, device=device)
    dist.all_reduce(held, op=dist.ReduceOp.MIN, group=rank.group)
    return int(held)
