"""Scripts in processes of their own that start at once: they are forked from a process that has imported torch."""

import multiprocessing
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "lightning.fabric", "jsonargparse", "lit_swa.train", "lit_swa.lora"])


def start_script(script: str | Path, *arguments: object, log: Path, room: int | None = None, **environment: str):
    """`python script arguments`, its output in the file `log`: a multiprocessing process, in a group of its own.

    The scripts that it starts are forked too. room: how many bytes it may allocate beyond what a fork has.
    """
    argv = [str(ROOT / script), *map(str, arguments)]
    process = CONTEXT.Process(target=run_child, args=(argv, environment, log, room))
    process.start()
    return process


def run_child(argv: list[str], environment: dict[str, str], log: Path, room: int | None = None) -> None:
    import torch

    if room is not None:
        most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + room
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fork_instead()
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


class ForkedPopen:
    """subprocess.Popen for a Python script, forked from this process."""

    def __init__(self, args: list[str], env: dict[str, str] | None = None, **_: object) -> None:
        self.args, self.returncode = args, None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.environ.update(env or {})
                signal.signal(signal.SIGINT, signal.default_int_handler)
                sys.argv = list(args[1:])
                runpy.run_path(sys.argv[0], run_name="__main__")
                code = 0
            except SystemExit as e:
                code = e.code or 0
            finally:
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def fork_instead() -> None:
    """Let this process fork the project's scripts instead of starting Python anew."""
    popen, run = subprocess.Popen, subprocess.run

    def is_script(args: list[str]) -> bool:
        folders = ("finetune", "generate", "scripts")
        return args[0] == sys.executable and Path(args[1]).parent.name in folders

    def forked_run(args: list[str], **how: object) -> SimpleNamespace:
        return SimpleNamespace(returncode=ForkedPopen(args).wait()) if is_script(args) else run(args, **how)

    subprocess.Popen = lambda args, **how: (ForkedPopen if is_script(args) else popen)(args, **how)
    subprocess.run = forked_run


def torchrun_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells the processes that it starts."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": 0}
    return {name: str(value) for name, value in (names | address).items()}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def in_this_process(command: list[str], **options) -> SimpleNamespace:
    """subprocess.run without another process, which takes seconds to import torch."""
    if command[0] != sys.executable:
        return RUN(command, **options)
    assert all(type(argument) is str for argument in command)  # as a shell would give them
    before, code = sys.argv, 0
    sys.argv = command[1:]
    try:
        runpy.run_path(command[1], run_name="__main__")
    except SystemExit as e:
        code = e.code
    finally:
        sys.argv = before
    return SimpleNamespace(returncode=code)


RUN = subprocess.run
