"""Memory, exchange and speed of pretraining on many GPUs: python scripts/plan_training.py --name TinyLlama-1.1B."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

if TYPE_CHECKING:
    from lit_swa.training.plan import Measured, Plan


def main(
    name: str = "TinyLlama-1.1B",
    devices: list[int] | None = None,
    strategy: Literal["ddp", "fsdp", "hybrid"] = "fsdp",
    length: int = 2048,
    micro_batch_size: int = 8,
    accumulate: int = 1,
    recompute: int = 0,
    per_host: int = 8,
    network: float = 50.0,
    network_start: float = 1e-5,
    memory: float = 80.0,
    pieces: Path = Path("tutorials/results/measure_pieces.json"),
    model: dict[str, Any] | None = None,
) -> None:
    """Print a table: for each number of GPUs the memory of one, what it sends, and the speed of all.

    What one GPU and the links within a host do was measured (--pieces, by scripts/measure_pieces.py). The network
    between hosts was not: its speed is given. Everything else is computed.

    Args:
        name: A named shape.
        devices: Numbers of GPUs. By default 8, 16, 32, 64, 128, 256 and 512.
        strategy: ddp holds everything on each GPU; fsdp shards weights, gradients and moments over all; hybrid shards
            them over the GPUs of a host, and each host holds all.
        length: Tokens of a row.
        micro_batch_size: Rows that a GPU reads at once.
        accumulate: Micro-batches of a step on each GPU.
        recompute: How many layers compute their activations again.
        per_host: GPUs of a host.
        network: GB that one GPU's network card takes in per second, and sends as well: 50 for 400 Gb/s.
        network_start: Seconds that an exchange takes longer for each further host.
        memory: GB of a GPU.
        pieces: What was measured. Without the file the table says nothing of time.
        model: Any field of the model's config, as --model.FIELD VALUE.
    """
    from lit_swa.checks import check_at_least, check_range
    from lit_swa.config import Config
    from lit_swa.formats.files import read_json
    from lit_swa.training.plan import Measured, Network, Plan

    devices = [8, 16, 32, 64, 128, 256, 512] if devices is None else devices
    check_at_least(
        length=(length, 2), micro_batch_size=(micro_batch_size, 1), accumulate=(accumulate, 1),
        per_host=(per_host, 1), devices=(min(devices, default=0), 1),
        network=(network, 1e-3), network_start=(network_start, 0), memory=(memory, 1e-3),
    )  # fmt: skip
    if uneven := [n for n in devices if n > per_host and n % per_host]:
        raise ValueError(
            f"devices={uneven[0]} does not fit hosts of {per_host}: give a multiple, or another --per_host."
        )
    config = Config.from_name(name, **{"block_size": length} | (model or {}))
    check_range("recompute", recompute, 0, config.n_layer)
    plan = Plan(config, strategy, length, micro_batch_size, accumulate, recompute)
    print(f"{name}, {plan.weights:,} weights, {strategy}, {accumulate} x {micro_batch_size} rows of {length} a GPU.")
    if pieces.is_file():
        measured = Measured(read_json(pieces), config, length, Network(per_host, network * 1e9, network_start))
        print("\n".join([*measured.notes(plan), *measured.checks()]))
    else:
        measured = None
        print(f"No time is computed without {pieces}: scripts/measure_pieces.py --devices 2 writes it.")
    heads = ["GPUs", "tokens of a step", "memory, GB", "GB moved a step"]
    heads += ["computing, ms", "exchanging, ms", "besides, ms", "step, ms", "tok/s", "of one GPU's"] if measured else []
    print("\n| " + " | ".join(heads) + " |\n|" + " ---: |" * len(heads))
    for n in devices:
        cells = row_of(plan, n, per_host, memory) + (speed_of(plan, n, measured) if measured else [])
        print("| " + " | ".join(cells) + " |")


def row_of(plan: "Plan", n: int, per_host: int, memory: float) -> list[str]:
    """What needs no measurement."""
    needed, moved = plan.memory(n, per_host) / 1e9, sum(e.moved for e in plan.exchanges(n, per_host)) / 1e9
    return [f"{n}", f"{n * plan.tokens:,}", f"{needed:.1f}" + " (too much)" * (needed > memory), f"{moved:.1f}"]


def speed_of(plan: "Plan", n: int, measured: "Measured") -> list[str]:
    """What follows from measurements."""
    time = measured.times(plan, n)
    cells = [f"{1e3 * seconds:,.0f}" for seconds in (time.computing, time.exchanging, time.beside, time.step)]
    return [*cells, f"{n * plan.tokens / time.step:,.0f}", f"{time.alone / time.step:.0%}"]


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
