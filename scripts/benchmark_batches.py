"""Measure throughput over batch sizes: python scripts/benchmark_batches.py --compile true."""

import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

if TYPE_CHECKING:
    from lit_swa import GPT
    from lit_swa.batches import Request


def main(
    checkpoint_dir: Path | None = None,
    name: str | None = None,
    batch_size: list[int] | None = None,
    sequences: int = 256,
    rounds: int = 4,
    shortest: int = 100,
    longest: int = 1024,
    temperature: float = 0.6,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    output: Path = Path("tutorials/results/benchmark_batches.json"),
    model: dict[str, Any] | None = None,
) -> None:
    """Print new tokens per second for each batch size, reading of the prompts included, and its ratio to one row.

    The work is that of nano-vllm's bench.py: prompts of random tokens and answers without an end of their own, the
    lengths of both drawn evenly.

    Args:
        checkpoint_dir: A checkpoint's directory or name.
        name: A named shape with random weights in place of a checkpoint; by default Qwen3-0.6B.
        batch_size: The numbers of rows. By default 1, 8, 32, 64, 128, 256.
        sequences: How many prompts there are.
        rounds: So many prompts for each row, and no more than there are: a single row would take hours with all.
        shortest: The least length of a prompt and of an answer, in tokens.
        longest: The greatest length of a prompt and of an answer.
        temperature: 0 takes the likeliest token each time.
        seed: Decides lengths, prompts and answers.
        device: auto, cpu or cuda.
        dtype: float32, bfloat16 or float16; auto is bfloat16 on a GPU and float32 on a CPU.
        compile: Measure the compiled decode step.
        output: Where the JSON goes.
        model: Any field of the model's config, as --model.FIELD VALUE (--model.help lists them).
    """
    from lit_swa.checks import check_range
    from lit_swa.fast_decode import compile_decode
    from lit_swa.formats.files import write_json
    from lit_swa.generate import Sampling
    from lit_swa.linear_formats import pack_for_cpu
    from lit_swa.utils import describe_command, describe_machine, pick_device, pick_dtype

    sizes = batch_size or [1, 8, 32, 64, 128, 256]
    for field, value in {"sequences": sequences, "rounds": rounds, "shortest": shortest}.items():
        check_range(field, value, 1, 2**31)
    check_range("longest", longest, shortest, 2**31)
    if checkpoint_dir is not None and name is not None:
        raise ValueError("--checkpoint_dir and --name both say which model: give one of them.")
    device = pick_device(device)
    gpt = load(checkpoint_dir, name or "Qwen3-0.6B", pick_dtype(dtype, device), device, model or {})
    requests = make_requests(gpt, sequences, shortest, longest, seed)
    decode = compile_decode(gpt) if compile else None
    if decode is None:
        pack_for_cpu(gpt)
    rows = []
    for size in sizes:
        rows.append(measure(gpt, requests[: rounds * size], size, Sampling(temperature, seed=seed), decode))
        rows[-1]["ratio"] = rows[-1]["tokens_per_second"] / rows[0]["tokens_per_second"]
        report(rows[-1], sizes[0])
    output.parent.mkdir(parents=True, exist_ok=True)
    command = describe_command("--output")
    which = name or "Qwen3-0.6B" if checkpoint_dir is None else str(checkpoint_dir)
    write_json(output, {"command": command, "machine": describe_machine(device), "model": which, "rows": rows})
    print(f"written to {output}", file=sys.stderr)


def load(checkpoint_dir: Path | None, name: str, dtype: str, device: str, overrides: dict[str, Any]) -> "GPT":
    """A checkpoint's model, or one of a named shape with random weights."""
    import torch

    from lit_swa import Config
    from lit_swa.checkpoint import load_model
    from lit_swa.formats.download import find_checkpoint
    from lit_swa.random_model import random_model

    if checkpoint_dir is not None:
        return load_model(find_checkpoint(checkpoint_dir), dtype=dtype, device=device, **overrides)
    gpt = random_model(Config.from_name(name, **overrides), getattr(torch, dtype), device)
    gpt.init_weights(seed=0)
    return gpt


def make_requests(gpt: "GPT", count: int, shortest: int, longest: int, seed: int) -> "list[Request]":
    """Prompts of random tokens, and how many tokens are to follow each."""
    from lit_swa.batches import Request

    rng = random.Random(seed)
    most = min(10_000, gpt.config.vocab_size - 1)
    prompts = [[rng.randint(0, most) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]
    return [Request(ids, rng.randint(shortest, longest), seed + n) for n, ids in enumerate(prompts)]


def measure(gpt: "GPT", requests: "list[Request]", size: int, sampling: Any, decode: Any) -> dict[str, Any]:
    """Answer all requests with so many rows; the caches are new, and prompts were read and the step was compiled before
    the time begins."""
    import torch

    from lit_swa.batches import Batch
    from lit_swa.utils import wait_for

    gpt.clear_kv_cache()
    started = time.perf_counter()
    short = [request._replace(max_new_tokens=2) for request in requests]
    for _ in Batch(gpt, short, sampling, batch_size=size, decode=decode).run():
        pass
    batch = Batch(gpt, requests, sampling, batch_size=size, decode=decode)
    batch.warm_up()
    wait_for(batch.device)
    warm_up, started = time.perf_counter() - started, time.perf_counter()
    for _ in batch.run():
        pass
    wait_for(batch.device)
    seconds = time.perf_counter() - started
    row = {"batch_size": batch.rows, "sequences": len(requests), "prompt_tokens": batch.prompt_tokens}
    row |= {"new_tokens": batch.new_tokens, "steps": batch.steps, "seconds": seconds, "warm_up_seconds": warm_up}
    row |= {"tokens_per_second": batch.new_tokens / seconds, "cache_MB": gpt.kv_cache_bytes() / 1e6}
    if batch.device.type == "cuda":
        row["peak_GB"] = torch.cuda.max_memory_allocated(batch.device) / 1e9
    return row


def report(row: dict[str, Any], first: int) -> None:
    line = f"{row['batch_size']:4} rows, {row['sequences']:4} sequences  {row['tokens_per_second']:9.1f} tok/s"
    line += f"  {row['ratio']:6.2f}x of {first}  {row['steps']} steps in {row['seconds']:.1f} s"
    print(f"{line}  cache {row['cache_MB']:.0f} MB  warm-up {row['warm_up_seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
