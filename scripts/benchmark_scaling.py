"""Measure what several GPUs of a machine do together: python scripts/benchmark_scaling.py --devices '[1,2,4,8]'."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

PARTS = ("decode", "pretrain", "lora", "resume", "blocks")
MOST_BYTES = 72e9  # of weights on a device
STEPS = 8  # of the run that is resumed, which saves the fourth
STRATEGIES = ("ddp", "fsdp", "hybrid")  # in the order of their colours
Row = dict[str, Any]
Label = tuple[float, float, str, str]  # x, y, text and colour


class Settings(NamedTuple):
    """What the parts read."""

    devices: list[int]
    device: str
    decode_names: list[str]
    decode_modes: list[str]
    pretrain_name: str
    lora_name: str
    length: int
    micro_batch_tokens: int
    compile: bool
    data: Path
    checkpoint_dir: Path
    block_steps: int
    repeats: int
    out_dir: Path


def main(
    devices: list[int] | None = None,
    parts: list[str] | None = None,
    decode_names: list[str] | None = None,
    decode_modes: list[str] | None = None,
    pretrain_name: str = "TinyLlama-1.1B",
    lora_name: str = "Llama-2-7b",
    length: int = 2048,
    micro_batch_tokens: int = 16384,
    compile: bool = True,
    data: Path = Path("data/books/train"),
    checkpoint_dir: Path = Path("HuggingFaceTB/SmolLM2-135M-Instruct"),
    block_steps: int = 100,
    repeats: int = 5,
    device: str = "auto",
    out_dir: Path = Path("out/scaling"),
    output: Path = Path("tutorials/results/scaling.json"),
) -> None:
    """Print tables of what several GPUs do together: decode, training steps, resuming and linearising.

    Decode is in tensor parallelism, training steps stand beside what scripts/plan_training.py predicts, a run is
    resumed on fewer devices, and blocks are linearised at the same time.

    Each measurement is a script of the project, whose command is printed, and is kept in out_dir: the same command goes
    on, and keeps each block that was trained. Decode and training steps use random weights and tokens.

    Args:
        devices: Numbers of devices, 1 among them. By default 1, 2, 4 and 8, as many as there are.
        parts: Of decode, pretrain, lora, resume, blocks. By default all. Rows of others stay in the output, if they are
            of this machine.
        decode_names: Named shapes. By default Llama-2-7b and Llama-2-70b.
        decode_modes: bfloat16, int8, int4. By default bfloat16 and int4. A shape of more than 72 GB a device is not
            measured.
        pretrain_name: The shape whose weights are trained, by DDP, FSDP and hybrid sharding.
        lora_name: The shape whose LoRA of rank 8 is trained, in the same ways.
        length: Tokens of a row of a training step.
        micro_batch_tokens: Tokens that a device reads at once.
        compile: Compile decode steps, and the blocks in training.
        data: Text for the part resume, which trains a small model from scratch, and for the part blocks.
        checkpoint_dir: The model that is linearised in as many blocks as there are devices at most.
        block_steps: Optimiser steps of each block.
        repeats: How often each training step is timed.
        device: auto, cpu or cuda.
        out_dir: What the measurements write.
        output: The JSON file; the picture goes next to it, as .png.
    """
    from lit_swa.plots import check_output, draw_results
    from lit_swa.utils import describe_command, describe_machine, pick_device

    chosen = list(PARTS) if parts is None else parts
    if unknown := [part for part in chosen if part not in PARTS]:
        raise ValueError(f"There is no part {unknown[0]!r}: choose from {', '.join(PARTS)}.")
    device = pick_device(device)
    check_output(output)
    settings = Settings(
        counts(devices, device), device, decode_names or ["Llama-2-7b", "Llama-2-70b"],
        decode_modes or ["bfloat16", "int4"], pretrain_name, lora_name, length, micro_batch_tokens, compile, data,
        checkpoint_dir, block_steps, repeats, out_dir,
    )  # fmt: skip
    out_dir.mkdir(parents=True, exist_ok=True)
    result = {"command": describe_command("--output", "--parts"), "machine": describe_machine(device)}
    result["rows"] = measure(settings, chosen, output, result)
    print("\n".join(tables(result["rows"])))
    draw_results(output, lambda plt: draw(plt, result))


def measure(settings: Settings, chosen: list[str], output: Path, result: Row) -> list[Row]:
    """Rows of the chosen parts, each written as it is there, and of the parts that `output` has from this machine."""
    from lit_swa.formats.files import read_json, write_json

    before: Row = read_json(output) if output.is_file() else {}
    known = before["rows"] if before.get("machine") == result["machine"] else []
    rows = [row for row in known if row["part"] not in chosen]
    output.parent.mkdir(parents=True, exist_ok=True)
    for part in chosen:
        for row in MEASURES[part](settings):
            rows = sorted([*rows, row], key=lambda row: PARTS.index(row["part"]))
            write_json(output, result | {"rows": rows})
    return rows


def counts(devices: list[int] | None, device: str) -> list[int]:
    """The numbers of devices, in order. Raises ValueError for one that is not there, or where 1 is missing."""
    import torch

    from lit_swa.utils import check_devices

    there = torch.cuda.device_count() if device == "cuda" else 2
    chosen = sorted({n for n in (1, 2, 4, 8) if n <= there} if devices is None else set(devices))
    if chosen[:1] != [1]:
        raise ValueError("devices needs 1, which the others are compared with: add it.")
    check_devices(device, chosen[-1])
    return chosen


def measured(command: list[str], output: Path) -> dict[str, Any]:
    """What a script writes to `output`, if it is not there yet."""
    from lit_swa.formats.files import read_json
    from lit_swa.runs import execute

    if not output.is_file():
        execute([*command, "--output", str(output)])
    return read_json(output)


def keep(path: Path, make: Callable[[], Row]) -> Row:
    """What `make` returns, if it is not kept at `path` yet."""
    from lit_swa.formats.files import read_json, write_json

    if not path.is_file():
        write_json(path, make())
    return read_json(path)


# -------------------------------------------------------------------------------------------------------------- decode


def decode(settings: Settings) -> Iterator[Row]:
    from lit_swa.runs import typed

    for name in settings.decode_names:
        for n in settings.devices:
            for mode in settings.decode_modes:
                if weight_bytes(name, mode) / n > MOST_BYTES:
                    continue
                options = {"name": name, "devices": n, "modes": f"[{mode}]", "device": settings.device,
                           "compile": settings.compile, "alone": False}  # fmt: skip
                found = measured(
                    ["scripts/benchmark_parallel.py", *typed(options)],
                    settings.out_dir / f"decode-{name}-{mode}-{n}.json",
                )
                split = found["rows"][0]["split"]
                rate = {"tok_s": split["tokens_per_second"], "GB_s": split["tokens_per_second"] * split["weight_GB"]}
                yield {"part": "decode", "name": name, "mode": mode, "devices": n} | rate


def weight_bytes(name: str, mode: str) -> float:
    from lit_swa import Config
    from lit_swa.training.flops import count_weights

    return count_weights(Config.from_name(name)) * {"int4": 0.56, "int8": 1, "float32": 4}.get(mode, 2)


# ------------------------------------------------------------------------------------------------------------ training


def pretrain(settings: Settings) -> Iterator[Row]:
    return train("pretrain", settings.pretrain_name, {}, settings)


def lora(settings: Settings) -> Iterator[Row]:
    return train("lora", settings.lora_name, {"lora_r": 8}, settings)


def train(part: str, name: str, own: dict[str, Any], settings: Settings) -> Iterator[Row]:
    """Steps on one device and on more. Beside those of all weights stands what the plan computes from the pieces of the
    fewest devices, for more devices than these."""
    from lit_swa.runs import typed

    pieces: dict[str, Any] | None = None
    for n in settings.devices:
        strategies = ["ddp", "fsdp"] + ["hybrid"] * (n >= 4 and n % 2 == 0)
        options = {"name": name, "devices": n, "lengths": f"[{settings.length}]", "device": settings.device,
                   "micro_batch_tokens": settings.micro_batch_tokens, "strategies": f"[{','.join(strategies)}]",
                   "compile": settings.compile, "repeats": settings.repeats} | own  # fmt: skip
        found = measured(["scripts/measure_pieces.py", *typed(options)], settings.out_dir / f"{part}-{n}.json")
        pieces = pieces or (found if n > 1 and not own else None)
        alone = next(row for row in found["steps"] if row["strategy"] == "one")
        for row in found["steps"]:
            if (row["strategy"] == "one") != (n == 1):
                continue
            made = {"part": part, "name": name, "strategy": row["strategy"], "devices": n, "tok_s": n * row["tok_s"]}
            made |= {key: row[key] for key in ("mfu", "memory_GB") if key in row}
            made["share"] = row["tok_s"] / alone["tok_s"]
            if pieces is not None and n > pieces["processes"]:
                made |= predicted(pieces, row, n)
            yield made


def predicted(pieces: dict[str, Any], row: Row, n: int) -> Row:
    """The tokens per second and share of the ideal that plan_training.py computes for all devices."""
    from lit_swa import Config
    from lit_swa.training.plan import Measured, Network, Plan

    per_host = n // 2 if row["strategy"] == "hybrid" else n  # its halves exchange within the machine too
    config = Config.from_name(row["name"], **{"block_size": row["length"]} | row["model"])
    plan = Plan(config, row["strategy"], row["length"], row["rows"], 1)
    time = Measured(pieces, config, row["length"], Network(per_host, 1e15, 0.0)).times(plan, n)
    return {"predicted_tok_s": n * plan.tokens / time.step, "predicted_share": time.alone / time.step}


# -------------------------------------------------------------------------------------------------------------- resume


def resume(settings: Settings) -> Iterator[Row]:
    """A run of all devices, which saves shards; the same from its fourth step on with fewer."""
    from lit_swa.runs import execute, typed
    from lit_swa.train import read_metrics

    most = settings.devices[-1]
    whole = settings.out_dir / f"resume-{most}"
    options = {"data": settings.data, "strategy": "fsdp", "max_steps": STEPS, "batch_size": 2 * most,
               "micro_batch_size": 1, "save_interval": STEPS // 2, "keep_last": 2, "sample": False, "resume": "auto",
               "validation_fraction": 0, "device": settings.device}  # fmt: skip

    def run(directory: Path, n: int) -> dict[str, list[float]]:
        if not (directory / "final").exists():
            execute(["pretrain/base.py", *typed(options | {"out_dir": directory, "devices": n})])
        return read_metrics(directory)

    def compare(n: int) -> Row:
        directory = settings.out_dir / f"resume-{most}-{n}"
        expected = run(whole, most)
        if not directory.exists():
            shutil.copytree(whole, directory)
            shutil.rmtree(directory / "final")
            shutil.rmtree(max(directory.glob("step-*")))
        got = run(directory, n)
        pairs = [(a, b) for name in ("loss", "grad_norm") for a, b in zip(expected[name], got[name], strict=True)]
        off = max(abs(a - b) / abs(a) for a, b in pairs if a == a)  # not of a row that has only one of the two
        same = all(a == b or a != a for a, b in zip(expected["tokens"], got["tokens"], strict=True))
        return {"same_tokens": same, "off": off}

    for n in settings.devices[-2::-1]:
        found = keep(settings.out_dir / f"resume-{most}-{n}.json", lambda n=n: compare(n))
        yield {"part": "resume", "saved_on": most, "devices": n, "steps": STEPS // 2} | found


# -------------------------------------------------------------------------------------------------------------- blocks


def blocks(settings: Settings) -> Iterator[Row]:
    """As many blocks as there are devices at most, trained one after the other and as many at the same time."""
    from lit_swa.checkpoint import load_config
    from lit_swa.formats.download import find_checkpoint
    from lit_swa.formats.files import read_json

    base, ready = find_checkpoint(settings.checkpoint_dir), False
    layers = load_config(base).n_layer
    size = -(-layers // settings.devices[-1])
    numbers = [str(n) for n in range(-(-layers // size))]
    for n in settings.devices:
        kept = settings.out_dir / f"blocks-{n}.json"
        seconds = read_json(kept) if kept.is_file() else {}
        if left := [number for number in numbers if number not in seconds]:
            if not ready:
                make_blocks(settings, base, size)
                ready = True
            train_blocks(settings, left, n, kept, seconds)
        yield {"part": "blocks", "devices": n, "blocks": len(numbers), "seconds": until_all(seconds, numbers, n)}


def make_blocks(settings: Settings, base: Path, size: int) -> None:
    """Blocks and their inputs, and a step of one, so that kernels are compiled and tuned before the clock runs."""
    block_step(settings, "shard", {"checkpoint_dir": base, "layers_per_block": size})
    texts = {"checkpoint_dir": base, "data": settings.data, "max_seq_length": settings.length}
    block_step(settings, "inputs", texts | {"device": settings.device, "limit": 8 * settings.block_steps})
    train_block(settings, "0", "first", 1, {})


def train_blocks(settings: Settings, numbers: list[str], n: int, kept: Path, seconds: dict[str, float]) -> None:
    """Train these blocks, n at the same time, and keep the seconds of each as soon as it has ended."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Lock

    from lit_swa.formats.files import write_json
    from lit_swa.runs import Places

    places, lock = Places(settings.device, n), Lock()

    def train_one(number: str) -> None:
        with places.one() as environment:
            started = time.perf_counter()
            train_block(settings, number, str(n), settings.block_steps, environment)
            with lock:
                seconds[number] = time.perf_counter() - started
                write_json(kept, seconds)

    with ThreadPoolExecutor(n) as pool:
        list(pool.map(train_one, numbers))


def train_block(settings: Settings, number: str, name: str, steps: int, environment: dict[str, str]) -> None:
    """Train a block from its first step on. It validates and saves at the end only."""
    options = {"block": number, "max_steps": steps, "eval_interval": steps, "save_interval": steps}
    how = {"log": settings.out_dir / f"blocks-{name}-{number}.log", "environment": environment}
    block_step(settings, "train", options | {"device": settings.device, "resume": "restart"}, **how)


def block_step(settings: Settings, name: str, options: dict[str, Any], **how: Any) -> None:
    from lit_swa.runs import execute, typed

    words = typed({"step": name, "out_dir": settings.out_dir / "blocks"} | options)
    execute(["finetune/linearize_blockwise.py", *words], **how)


def until_all(seconds: dict[str, float], numbers: list[str], n: int) -> float:
    """When the last block ends, where each begins as soon as one of n devices is free."""
    ends = [0.0] * n
    for number in numbers:
        first = ends.index(min(ends))
        ends[first] += seconds[number]
    return max(ends)


MEASURES: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "decode": decode, "pretrain": pretrain, "lora": lora, "resume": resume, "blocks": blocks,
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------- the results


def tables(rows: list[Row]) -> list[str]:
    """The results in words, a table for each part that was measured."""
    heads = {
        "decode": ["decode", "weights", "GPUs", "tok/s", "of one", "GB/s a GPU"],
        "pretrain": ["step", "strategy", "GPUs", "tok/s", "of ideal", "predicted", "MFU", "GB a GPU"],
        "resume": ["saved on", "resumed on", "steps", "same tokens", "largest difference"],
        "blocks": ["blocks", "GPUs", "seconds", "of one"],
    }
    lines: list[str] = []
    for part, head in heads.items():
        own = [row for row in rows if row["part"] in ((part, "lora") if part == "pretrain" else (part,))]
        if own:
            lines += ["", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
            lines += ["| " + " | ".join(cells(row, own)) + " |" for row in own]
    return lines[1:]


def cells(row: Row, rows: list[Row]) -> list[str]:
    if row["part"] == "decode":
        alike = [r for r in rows if (r["name"], r["mode"]) == (row["name"], row["mode"])]
        one = next((r["tok_s"] for r in alike if r["devices"] == 1), None)
        ratio = f"{row['tok_s'] / one:.2f}x" if one else "does not fit one"
        return [row["name"], row["mode"], f"{row['devices']}", f"{row['tok_s']:.1f}", ratio, f"{row['GB_s']:,.0f}"]
    if row["part"] == "resume":
        same = "yes" if row["same_tokens"] else "no"
        return [f"{row['saved_on']}", f"{row['devices']}", f"{row['steps']}", same, f"{row['off']:.1e}"]
    if row["part"] == "blocks":
        one = next(r["seconds"] for r in rows if r["devices"] == 1)
        return [f"{row['blocks']}", f"{row['devices']}", f"{row['seconds']:.0f}", f"{one / row['seconds']:.2f}x"]
    name = f"{row['name']}, LoRA" if row["part"] == "lora" else row["name"]
    said = [f"{row[key]:.0%}" if key in row else "" for key in ("share", "predicted_share", "mfu")]
    memory = f"{row['memory_GB']:.1f}" if "memory_GB" in row else ""
    return [name, row["strategy"], f"{row['devices']}", f"{row['tok_s']:,.0f}", *said, memory]


def draw(plt: Any, result: dict[str, Any]) -> Any:
    """Decode, and the share of the ideal in training, over the number of devices; predictions are hollow."""
    from lit_swa.plots import label_ends, log_axis

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    rows = result["rows"]
    ends = {axes[0]: draw_decode(axes[0], rows), axes[1]: draw_training(axes[1], rows)}
    most = max(row["devices"] for row in rows)
    for axis, what in zip(axes, ("decode, tokens per second", "training, share of the ideal"), strict=True):
        axis.set(xlabel="devices", ylabel=what, xscale="log", xlim=(0.93, 1.07 * most))
        ticks = sorted({row["devices"] for row in rows})
        axis.set_xticks(ticks, map(str, ticks))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    if ends[axes[0]]:
        log_axis(axes[0])
    if ends[axes[1]]:
        axes[1].set_ylim(min(0.8, axes[1].dataLim.y0 - 0.02), 1.03)
        axes[1].yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    figure.suptitle(f"{result['machine']}; hollow: what plan_training.py computes from fewer devices", fontsize=11)
    label_ends(figure, {axis: labels for axis, labels in ends.items() if labels})
    return figure


def draw_decode(axis: Any, rows: list[Row]) -> list[Label]:
    """Lines of the same model have a colour, of the same weights a dash."""
    from lit_swa.plots import DASHES, OTHERS

    ends = []
    names, modes = (list(dict.fromkeys(r[key] for r in rows if r["part"] == "decode")) for key in ("name", "mode"))
    for name, mode in dict.fromkeys((r["name"], r["mode"]) for r in rows if r["part"] == "decode"):
        own = [r for r in rows if (r["part"], r.get("name"), r.get("mode")) == ("decode", name, mode)]
        colour, line = OTHERS[names.index(name) % len(OTHERS)], DASHES[modes.index(mode) % len(DASHES)]
        x, y = [r["devices"] for r in own], [r["tok_s"] for r in own]
        axis.plot(x, y, marker="o", label=f"{name}, {mode}", color=colour, linestyle=line)
        ends.append((x[-1], y[-1], f"{name}, {mode}", colour))
    return ends


def draw_training(axis: Any, rows: list[Row]) -> list[Label]:
    """Lines of the same strategy have a colour; LoRA is dashed, and blocks, which exchange nothing, are dotted."""
    from lit_swa.plots import OTHERS

    ends = []
    if blocks := [r for r in rows if r["part"] == "blocks"]:
        x = [r["devices"] for r in blocks]
        y = [blocks[0]["seconds"] / (n * r["seconds"]) for n, r in zip(x, blocks, strict=True)]
        axis.plot(x, y, marker="o", label="blocks", color="black", linestyle=":")
        ends.append((x[-1], y[-1], f"{blocks[0]['blocks']} blocks, each alone", "black"))
    for part, strategy in dict.fromkeys((r["part"], r["strategy"]) for r in rows if "share" in r):
        own = [r for r in rows if r["part"] == part and r["strategy"] in (strategy, "one")]
        if strategy == "one" or len(own) < 2:
            continue
        colour, name = OTHERS[2 + STRATEGIES.index(strategy)], own[0]["name"] + ", LoRA" * (part == "lora")
        x, y = [r["devices"] for r in own], [r["share"] for r in own]
        line = "--" if part == "lora" else "-"
        axis.plot(x, y, marker="o", label=f"{name}, {strategy}", color=colour, linestyle=line)
        guessed = [r for r in own if "predicted_share" in r]
        axis.plot([r["devices"] for r in guessed], [r["predicted_share"] for r in guessed], linestyle="none",
                  marker="o", markersize=11, markerfacecolor="none", color=colour)  # fmt: skip
        ends.append((x[-1], y[-1], f"{name}, {strategy}", colour))
    return ends


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
