"""Measure what a second device brings: python scripts/benchmark_parallel.py --devices 2 --name Mistral-7B-v0.1."""

import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

if TYPE_CHECKING:
    from lit_swa.parallel import Rank


def main(
    name: str = "Mistral-7B-v0.1",
    devices: int | None = None,
    modes: list[str] | None = None,
    positions: list[int] | None = None,
    steps: int = 50,
    repeats: int = 3,
    device: str = "auto",
    compile: bool = True,
    alone: bool = True,
    output: Path = Path("tutorials/results/benchmark_parallel.json"),
    model: dict[str, Any] | None = None,
) -> None:
    """Print tokens per second of decode on one device and of the same model split over several, with random weights.

    Args:
        name: A named shape: speed does not depend on the weights.
        devices: Number of devices, with a process each; by default all GPUs. torchrun may start the processes instead.
        modes: float32, bfloat16, float16, or int8 and int4 (weights of 8 and 4 bits, computing in bfloat16). By default
            bfloat16 and int8.
        positions: Where decoding is timed. By default 512.
        steps: How many one-token steps are timed together.
        repeats: How often; the median counts.
        device: auto, cpu or cuda.
        compile: Measure the compiled step, as --compile true of the generating scripts makes it.
        alone: Measure one device too. Leave it out for a model that it cannot hold.
        output: Where the JSON goes.
        model: Any field of the model's config, as --model.FIELD VALUE (--model.help lists them).
    """
    from lit_swa import Config, ranks
    from lit_swa.formats.files import write_json
    from lit_swa.parallel import ALONE
    from lit_swa.utils import describe_command, describe_machine

    unknown = set(modes or ()) - {"float32", "bfloat16", "float16", "int8", "int4"}
    if unknown:
        raise ValueError(f"There is no mode {unknown.pop()!r}: choose from float32, bfloat16, float16, int8, int4.")
    config, positions = Config.from_name(name, **(model or {})), positions or [512]
    if not ranks.started() and (count := ranks.count_ranks(devices, device)) > 1:
        ranks.start(count)
    with ranks.joined(devices, device) as (rank, device):
        exchange = time_exchange(config, rank, device, repeats)
        print(f"a sum over {rank.size} ranks takes {exchange['sum_us']:.1f} us", flush=True)
        rows = []
        for mode in modes or ["bfloat16", "int8"]:
            for position in positions:
                timing = {"position": position, "steps": steps, "repeats": repeats, "compiled": compile}
                one = measure(config, mode, ALONE, device, **timing) if rank.index == 0 and alone else None
                ranks.forget_graphs()
                ranks.from_first(None, rank)  # the others wait until the first has measured alone
                split = measure(config, mode, rank, device, **timing)
                ranks.forget_graphs()
                if rank.index == 0:
                    rows.append({"mode": mode, "position": position, "one": one, "split": split})
                    if one is not None:
                        rows[-1]["ratio"] = split["tokens_per_second"] / one["tokens_per_second"]
                    report(rows[-1], rank.size)
        if rank.index == 0:
            arguments = {"name": name, "steps": steps, "repeats": repeats, "compile": compile, "model": model}
            command = describe_command("--output")
            result = {"command": command, "machine": describe_machine(device), "devices": rank.size}
            output.parent.mkdir(parents=True, exist_ok=True)
            write_json(output, result | {"arguments": arguments, "exchange": exchange, "rows": rows})
            print(f"written to {output}", file=sys.stderr)


def measure(
    config, mode: str, rank: "Rank", device: str, *, position: int, steps: int, repeats: int, compiled: bool
) -> dict[str, float]:
    """Tokens per second of decode steps behind `position` tokens, and what they take."""
    import torch

    from lit_swa.fast_decode import compile_decode, warm_up
    from lit_swa.generate import Session
    from lit_swa.random_model import random_model
    from lit_swa.speed import weights_read
    from lit_swa.utils import wait_for

    quantize, dtype = (mode, torch.bfloat16) if mode in ("int8", "int4") else (None, getattr(torch, mode))
    gpt = random_model(config, dtype, device, quantize, rank=rank)
    place, seconds = gpt.transformer.wte.weight.device, []
    with torch.inference_mode():
        session = Session(gpt, decode=compile_decode(gpt) if compiled else None, chunk_size=512, lookahead=steps)
        ready = warm_up(session, position + steps) if compiled else 0.0
        session.feed(torch.arange(position) % config.vocab_size)
        token = torch.zeros(1, 1, dtype=torch.long, device=place)
        for round_ in range(repeats + 1):
            wait_for(place)
            started = time.perf_counter()
            for _ in range(steps):
                token = session.feed(token)[:, -1].argmax(-1, keepdim=True)
            wait_for(place)
            if round_:
                seconds.append(time.perf_counter() - started)
            session.take_back(steps)
    return {
        "tokens_per_second": steps / median(seconds),
        "compile_seconds": ready,
        "weight_GB": weights_read(gpt) / 1e9,
    }


def time_exchange(config, rank: "Rank", device: str, repeats: int) -> dict[str, Any]:
    """Microseconds of one sum of a token's activations over the ranks, and of joining its logits: of as many as a step
    makes, one after the other; on a GPU in a CUDA graph, as in a compiled step."""
    import torch

    from lit_swa.parallel import join_ranks, sum_over_ranks, vocabulary_rows

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    x = torch.zeros(1, 1, config.n_embd, dtype=dtype, device=device)
    logits = torch.zeros(1, 1, vocabulary_rows(config, rank), dtype=dtype, device=device)
    count = 2 * config.n_layer
    ways = {"sum_us": lambda: sum_over_ranks(x), "join_us": lambda: join_ranks(logits, rank.size)}
    if rank.size == 1:
        return {"bytes": x.nbytes, "sums": 0} | dict.fromkeys(ways, 0.0)
    times = {key: time_repeated(way, count, repeats, x.device) for key, way in ways.items()}
    return {"bytes": x.nbytes, "sums": count} | times


def time_repeated(way, count: int, repeats: int, device) -> float:
    """Microseconds of one call of `count`."""
    import torch

    from lit_swa.utils import timed

    def run() -> None:
        for _ in range(count):
            way()

    run()
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog asks its events meanwhile
            run()
        run = graph.replay
    seconds = [timed(run, device) for _ in range(repeats + 1)]
    return median(seconds[1:]) / count * 1e6


def report(row: dict[str, Any], size: int) -> None:
    one, split, ratio = row["one"], row["split"], ""
    parts = f"{size} devices {split['tokens_per_second']:.1f} tok/s ({split['weight_GB']:.2f} GB each)"
    if one is not None:
        parts = f"one {one['tokens_per_second']:.1f} tok/s ({one['weight_GB']:.2f} GB of weights), {parts}"
        ratio = f": {row['ratio']:.2f}x"
    print(f"{row['mode']:9} at {row['position']}: {parts}{ratio}", flush=True)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
