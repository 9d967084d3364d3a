"""Processes that share work, forked at once and kept for many calls."""

import traceback
from collections.abc import Callable
from typing import Any

from forked import CONTEXT, free_port


class Ranks:
    """`size` processes: ranks(function, *arguments) gives what function(rank, *arguments) returns in each."""

    def __init__(self, size: int, backend: str = "gloo") -> None:
        """backend: gloo on a CPU, nccl with a GPU for each."""
        port, self.pipes, self.processes = free_port(), [], []
        for rank in range(size):
            mine, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=serve, args=(theirs, rank, size, port, backend), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = [pipe.recv() if pipe.poll(300) else (False, "no answer") for pipe in self.pipes]
        assert all(well for well, _ in answers), [answer for well, answer in answers if not well]
        return [answer for _, answer in answers]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def serve(pipe: Any, rank: int, size: int, port: int, backend: str) -> None:
    """Answer calls until the other end is gone."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(rank, *arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
