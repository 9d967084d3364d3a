"""Measure what a plan for many GPUs is computed from: python scripts/measure_pieces.py --devices 2."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from lit_swa.utils import release_memory, timed

if TYPE_CHECKING:
    import torch

    from lit_swa.config import Config
    from lit_swa.evaluate import Ranks

OPERATIONS = ("all_gather", "reduce_scatter", "all_reduce")


def main(
    name: str = "TinyLlama-1.1B",
    lengths: list[int] | None = None,
    micro_batch_tokens: int = 16384,
    strategies: list[str] | None = None,
    megabytes: list[float] | None = None,
    lora_r: int | None = None,
    compile: bool = False,
    devices: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    repeats: int = 5,
    output: Path = Path("tutorials/results/measure_pieces.json"),
    model: dict[str, Any] | None = None,
) -> None:
    """Write the seconds of training steps, and of exchanges between devices, for scripts/plan_training.py.

    The step is that of one device, and of all of them under DDP and FSDP. Weights are random, and so are the tokens.

    A step reads one micro-batch, forward and backward, and updates the weights as pretrain/base.py does: weights,
    gradients and the moments of AdamW in float32, products in `dtype`. With one device nothing is exchanged.

    Args:
        name: A named shape.
        lengths: Tokens of a row. By default 2048 and 8192 on a GPU and 256 on a CPU.
        micro_batch_tokens: Tokens of a micro-batch.
        strategies: Of the step on all devices: ddp, fsdp, and hybrid, in which each half of the devices shards a model.
            By default ddp and fsdp.
        lora_r: The rank of a LoRA, which is trained in place of the weights; these are held in `dtype`.
        megabytes: Sizes of the tensors that are exchanged, whole. By default 1, 16, 64 and 256, on a CPU 1 and 4.
        compile: Compile the blocks, as pretrain/base.py --compile true does.
        devices: Devices of this machine that take part, with a process each.
        device: auto, cpu or cuda.
        dtype: Of products, float32 or bfloat16; auto is bfloat16 on a GPU and float32 on a CPU.
        repeats: How often each is timed; the median counts.
        output: The JSON file to write.
        model: Any field of the model's config, as --model.FIELD VALUE.
    """
    from lit_swa.checks import check_range
    from lit_swa.config import Config
    from lit_swa.evaluate import launch_ranks
    from lit_swa.formats.files import write_json
    from lit_swa.train import use_whole_memory
    from lit_swa.utils import describe_command, describe_machine, pick_device, pick_dtype

    use_whole_memory()
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    on_gpu = device.startswith("cuda")
    lengths = lengths or ([2048, 8192] if on_gpu else [256])
    strategies = ["ddp", "fsdp"] if strategies is None else strategies
    megabytes = megabytes or ([1, 16, 64, 256] if on_gpu else [1, 4])
    check_range("repeats", repeats, 1)
    check_range("micro_batch_tokens", micro_batch_tokens, max(lengths))
    if unknown := [s for s in strategies if s not in ("ddp", "fsdp", "hybrid")]:
        raise ValueError(f"There is no strategy {unknown[0]!r} to measure: choose from ddp, fsdp, hybrid.")
    if "hybrid" in strategies and (devices < 4 or devices % 2):
        raise ValueError(f"hybrid needs an even number of devices, 4 or more, and there are {devices}.")
    shapes = {length: Config.from_name(name, **{"block_size": length} | (model or {})) for length in lengths}
    if device == "cpu" and lora_r is None:  # a GPU says that it is full; a machine may end any of its programs
        require_room(shapes, micro_batch_tokens, devices)
    ranks = launch_ranks(device, devices)
    rows: list[dict[str, Any]] = []
    for length, config in shapes.items():
        for strategy in ["one", *(strategies if ranks.count > 1 else ())]:
            row = {"name": name, "model": model or {}, "length": length, "rows": micro_batch_tokens // length}
            row |= {"strategy": strategy, "processes": 1 if strategy == "one" else ranks.count, "lora_r": lora_r}
            row |= time_step(config, row, ranks, dtype, compile, repeats)
            rows.append(row)
            if ranks.rank == 0:
                print(describe(row), flush=True)
    exchanges = time_exchanges(ranks, megabytes, repeats) if ranks.count > 1 else []
    if ranks.rank == 0:
        for row in exchanges:
            print(f"{row['operation']:15s} {row['bytes'] / 1e6:8.1f} MB {row['seconds'] * 1e3:9.3f} ms", flush=True)
        command, machine = describe_command("--output"), describe_machine(ranks.device)
        content = {"command": command, "machine": machine, "processes": ranks.count, "dtype": dtype}
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, content | {"compile": compile, "steps": rows, "exchanges": exchanges})
    ranks.leave()


def require_room(shapes: "dict[int, Config]", tokens: int, processes: int) -> None:
    """Raises ValueError where the memory does not hold the steps of all processes. shapes: by the length of rows."""
    import torch

    from lit_swa.memory import require_memory
    from lit_swa.training.plan import Plan

    for length, config in shapes.items():
        one = Plan(config, "ddp", length, tokens // length, 1).memory(processes, processes)
        remedy = "give fewer --micro_batch_tokens or --devices, or another --name"
        require_memory(processes * one, torch.device("cpu"), f"A step of {tokens} tokens on each device", remedy)


# ----------------------------------------------------------------------------------------------------------- the steps


def time_step(
    config: "Config", row: dict[str, Any], ranks: "Ranks", dtype: str, compiled: bool, repeats: int
) -> dict[str, Any]:
    """Seconds of a micro-batch forward and backward, of the update behind it, and of both; the slowest process's. On a
    GPU the most memory too."""
    import torch

    from lit_swa.training.flops import count_weights, peak_flops, token_flops

    device = torch.device(ranks.device)
    run, update = build(config, row, ranks, getattr(torch, dtype), compiled)
    for _ in range(2):  # the first compiles, and makes the moments
        run()
        update()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times: dict[str, list[float]] = {"micro_s": [], "update_s": [], "step_s": []}
    for _ in range(repeats):
        ranks.gather(torch.zeros(1))  # all begin together
        micro, last = timed(run, device), timed(update, device)
        for values, seconds in zip(times.values(), (micro, last, micro + last), strict=True):
            values.append(seconds)
    medians = torch.tensor([sorted(values)[repeats // 2] for values in times.values()])
    slowest = ranks.gather(medians).amax(0).tolist()
    found: dict[str, Any] = {"weights": count_weights(config), **dict(zip(times, slowest, strict=True))}
    tokens, flops = row["rows"] * row["length"], token_flops(config, row["length"], row["lora_r"] is not None)
    peak = peak_flops(device, getattr(torch, dtype))
    found |= {"flops_per_token": flops, "tok_s": tokens / found["step_s"]}
    if peak and flops:
        found["mfu"] = found["tok_s"] * flops / peak
    if device.type == "cuda":
        found["memory_GB"] = torch.cuda.max_memory_allocated() / 1e9
    del run, update
    release_memory()
    return found


def build(
    config: "Config", row: dict[str, Any], ranks: "Ranks", dtype: "torch.dtype", compiled: bool
) -> tuple[Callable[[], None], Callable[[], None]]:
    """(a micro-batch forward and backward, the update)"""
    import torch

    from lit_swa import GPT
    from lit_swa.arguments import Pretraining
    from lit_swa.lora import LoRAConfig, add_lora
    from lit_swa.train import (
        build_optimizer,
        clip_gradients,
        differentiate_pieces_at_once,
        recompute_blocks,
        train_in_float32,
    )
    from lit_swa.training.compiling import compile_blocks

    with torch.device(ranks.device):
        gpt = GPT(config)
        ids = torch.randint(0, config.vocab_size, (row["rows"], row["length"] + 1))
    gpt.init_weights(0)
    if row["lora_r"] is not None:
        gpt.to(dtype)
        add_lora(gpt, LoRAConfig(r=row["lora_r"]))
    train_in_float32(gpt.train(), dtype)
    differentiate_pieces_at_once(gpt)
    recompute_blocks(gpt, 0)
    if compiled:
        compile_blocks(gpt)
    loss, targets = spread(gpt, row["strategy"], ranks), ids[:, 1:].contiguous()
    optimizer = build_optimizer(gpt, Pretraining(data=""), 1e-4)

    def run() -> None:
        (loss(ids[:, :-1], targets=targets) / targets.numel()).backward()

    def update() -> None:
        clip_gradients(gpt, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run, update


def spread(gpt: Any, strategy: str, ranks: "Ranks") -> Any:
    """The model on all devices, as pretrain/base.py spreads it."""
    if strategy == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(gpt, broadcast_buffers=False)
    if strategy in ("fsdp", "hybrid"):
        from torch.distributed.device_mesh import init_device_mesh

        from lit_swa.training.distribution import shard_weights

        sizes = (ranks.count,) if strategy == "fsdp" else (2, ranks.count // 2)  # (copies, devices that share one)
        mesh = init_device_mesh(ranks.device.split(":")[0], sizes, mesh_dim_names=("copies", "shards")[-len(sizes) :])
        return shard_weights(gpt, mesh)
    return gpt


def describe(row: dict[str, Any]) -> str:
    start = f"{row['strategy']:5s} {row['rows']} x {row['length']:6d}  {row['step_s'] * 1e3:9.1f} ms"
    share = f"  MFU {row['mfu']:.1%}" if "mfu" in row else ""
    memory = f"  {row['memory_GB']:.1f} GB" if "memory_GB" in row else ""
    return f"{start}  {row['tok_s']:9.0f} tok/s a device{share}{memory}  update {row['update_s'] * 1e3:.1f} ms"


# ------------------------------------------------------------------------------------------------------- the exchanges


def time_exchanges(ranks: "Ranks", megabytes: list[float], repeats: int) -> list[dict[str, Any]]:
    """Seconds of each operation on tensors of each size: what is gathered, scattered or added up, as a whole."""
    import torch
    import torch.distributed as dist

    rows, device = [], torch.device(ranks.device)
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # their names from torch 2.13 on
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    for size in megabytes:
        part = torch.zeros(max(1, round(size * 1e6 / 4 / ranks.count)), device=device)
        whole = torch.zeros(part.numel() * ranks.count, device=device)
        calls = {
            "all_gather": lambda part=part, whole=whole: gather(whole, part),
            "reduce_scatter": lambda part=part, whole=whole: scatter(part, whole),
            "all_reduce": lambda whole=whole: dist.all_reduce(whole),
        }
        for name in OPERATIONS:
            seconds = ranks.gather(torch.tensor(repeated(calls[name], device, repeats))).max().item()
            rows.append({"operation": name, "bytes": whole.nbytes, "seconds": seconds})
    return rows


def repeated(call: Callable[[], Any], device: "torch.device", repeats: int) -> float:
    """Seconds of one call of ten in a row: the median of some rounds."""

    def ten() -> None:
        for _ in range(10):
            call()

    timed(ten, device)
    return sorted(timed(ten, device) for _ in range(repeats))[repeats // 2] / 10


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
