"""Decode steps that are there for speed only: the same logits, at the memory's speed."""

import time
from collections.abc import Callable

from torch import Tensor

from lit_swa import cpu_decode, gpu_decode
from lit_swa.generate import Session
from lit_swa.model import GPT
from lit_swa.utils import wait_for


def compile_decode(model: GPT, tokens: int = 1) -> Callable[[Tensor, Tensor], Tensor]:
    """A step of few tokens for `Session(decode=...)`, compiled at its first calls, once for all positions.

    tokens: how many tokens of a sequence it feeds at most, as its attribute most_tokens says.
    It takes (idx (B, T), input_pos (T,) or (B, T)) and gives logits (B, T, padded_vocab_size). On an NVIDIA GPU it is a
    CUDA graph of Triton kernels (gpu_decode.py), on a CPU a call of compiled C++ (cpu_decode.py), elsewhere the model.
    """
    if model.transformer.wte.weight.device.type == "cuda":
        return gpu_decode.Step(model, tokens)
    if model.transformer.wte.weight.device.type == "cpu":
        return cpu_decode.compile_for_cpu(model, tokens)
    return cpu_decode.plain_step(model, tokens)


def warm_up(session: Session, tokens: int) -> float:
    """Compile the session's decode step, with room in the caches for so many tokens; returns the seconds it took."""
    started = time.perf_counter()
    session.reserve(tokens)
    for _ in range(int(min(gpu_decode.WARM_UPS + 1, session.room))):
        session.feed([[0]] * session.batch_size)
    wait_for(session.device)
    session.reset()
    return time.perf_counter() - started
