"""What linear attention costs, and what helps: python scripts/compare_linear.py --data data/train --eval_data FILE."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed


class Row(NamedTuple):
    """How a model is made, by finetune/linearize.py. `stages` counts what it trains, each stage on the same tokens."""

    about: str
    stages: int = 0
    flags: dict[str, Any] = {}  # those of finetune/linearize.py; keep_full is a share of the layers
    start: str | None = None  # the row whose stage 1 it goes on from
    read: dict[str, Any] | None = None  # fields of the config that another row's model is read with; that is `start`


KL, CE = {"loss": "kl"}, {"loss": "ce"}
SECOND = {"stage1_steps": 0}
SINKS, GATE = {"model.linear_sinks": 4}, {"model.linear_gate": True}
DROPOUT = {"window_dropout": 0.9, "window_dropout_end": 0.0}
PLAIN = {"stage2_steps": 0, "grad_clip": 0, "transfer_schedule": "constant"}
ROWS = {
    "softmax": Row("the model as it was"),
    "swap": Row("linear attention that has learned nothing", flags=SECOND | {"stage2_steps": 0}),
    "transfer": Row("stage 1: attention transfer", 1, {"stage2_steps": 0}),
    "lolcats": Row("transfer, LoRA on the next token: LoLCATs", 1, SECOND | CE, "transfer"),
    "kl": Row("transfer, LoRA on the teacher's predictions", 1, SECOND | KL, "transfer"),
    "kl sinks": Row("kl with 4 sinks", 2, KL | SINKS),
    "kl gate": Row("kl with a gate for each head", 2, KL | GATE),
    "kl dropout": Row("kl, stage 1 at times without windows", 2, KL | DROPOUT),
    "all": Row("kl with sinks, gate and dropout", 2, KL | SINKS | GATE | DROPOUT),
    "quarter full": Row("kl, a quarter of the layers stay softmax", 1, SECOND | KL | {"keep_full": 0.25}, "transfer"),
    "all quarter full": Row("all, a quarter of the layers stay softmax", 1, SECOND | KL | {"keep_full": 0.25}, "all"),
    "window": Row("a window alone, LoRA by KL", 1, SECOND | KL | {"model.linear_off": True}),
    "window sinks": Row("a window and 4 sinks alone, LoRA by KL", 1, SECOND | KL | SINKS | {"model.linear_off": True}),
    "linear": Row("kl without a window", 2, KL | {"model.linear_window": 0}),
    "lolcats off": Row("lolcats, read with linear_off", start="lolcats", read={"linear_off": True}),
    "all off": Row("all, read with linear_off", start="all", read={"linear_off": True}),
    "joint": Row("transfer, not clipped, constant rate", 1, PLAIN),
    "blocks": Row("joint, trained in three blocks, each alone", 1, PLAIN),
}
HELD_OUT = 32  # rows of the data that training validates on, at most
ROW_HEIGHT = 0.34  # inches of the picture for each model


def main(
    data: list[Path] | Path,
    eval_data: list[Path] | Path,
    checkpoint_dir: Path | None = None,
    only: list[str] | None = None,
    tokens: int = 32_000_000,
    context: int = 1024,
    batch_size: int = 8,
    linear_window: int = 64,
    windows: int = 16,
    prompts: int = 32,
    new_tokens: int = 200,
    items: int = 200,
    trials: int = 10,
    jobs: int = 1,
    compile: bool = False,
    out_dir: Path = Path("out/compare_linear"),
    device: str = "auto",
    seed: int = 1234,
    output: Path = Path("out/compare_linear.json"),
) -> None:
    """Make linear models of a softmax model in several ways, judge each beside it; print a table, draw a picture.

    Every way is a run of finetune/linearize.py on the same rows of text; "blocks" is one of
    finetune/linearize_blockwise.py. The judges are those of lit_swa/judges.py, on texts that nothing was trained on.
    Each model that is judged is kept in the results at once: the same command goes on with the others, and with the
    steps that an interrupted run has saved.

    The ways: softmax, swap (nothing learned), transfer, lolcats, kl, kl sinks, kl gate, kl dropout, all, quarter full,
    all quarter full, window, window sinks, linear, lolcats off, all off (both with linear_off), joint, blocks.

    Args:
        data: What is trained on: .txt files or directories of them, .json or .jsonl files of instructions, or one .bin
            file of tokens.
        eval_data: What the judges ask about: .txt files or directories of them.
        checkpoint_dir: The softmax model. By default SmolLM2-135M-Instruct, which is downloaded once.
        only: Which ways to go. By default all; a stage that several share is trained for the first that needs it.
        tokens: What all ways together train on, whichever are chosen: each stage of each takes the same share.
        context: Tokens of a row, of a window that the judges read, and of the longest text with a pass key.
        batch_size: Rows of an optimiser step.
        linear_window: The keys that a query sees exactly, except in "linear".
        windows: Windows of eval_data that are read for perplexity and KL.
        prompts: Texts of eval_data, of a quarter of the context, that each model goes on with greedily.
        new_tokens: How many tokens it writes to each.
        items: Questions of each task, at most; 0 for none.
        trials: Pass keys that are asked for at each of two lengths and four depths; 0 for none.
        jobs: Runs that train at the same time, on a GPU each as far as there are as many. With more than one, each
            writes its lines to OUT_DIR/NAME.log.
        compile: Compile linear attention, and blocks where LoRA trains: worth its start in long runs on a GPU.
        out_dir: Holds a directory for each run. For SmolLM2-135M all take some 25 GB.
        device: auto, cpu or cuda.
        seed: Decides the order of the rows, new weights, and what is asked.
        output: The JSON file; the picture goes next to it, as .png.
    """
    from lit_swa import evaluate
    from lit_swa.checkpoint import check_checkpoint_dir, load_config
    from lit_swa.checks import check_range
    from lit_swa.formats.adapter_files import base_identity
    from lit_swa.formats.download import find_checkpoint
    from lit_swa.judges import Sizes
    from lit_swa.plots import check_output, draw_results
    from lit_swa.utils import describe_command, describe_machine, pick_device

    chosen = list(ROWS) if only is None else only
    if unknown := [name for name in chosen if name not in ROWS]:
        raise ValueError(f"There is no way {unknown[0]!r}: choose from {', '.join(ROWS)}.")
    device, checkpoint_dir = pick_device(device), find_checkpoint(checkpoint_dir)
    check_checkpoint_dir(checkpoint_dir)
    least = {"tokens": tokens, "context": context, "batch_size": batch_size, "windows": windows, "prompts": prompts}
    for name, value in (least | {"new_tokens": new_tokens, "jobs": jobs}).items():
        check_range(name, value, 16 if name == "context" else 1)
    for name, value in (("items", items), ("trials", trials)):
        check_range(name, value, 0)
    check_output(output)
    config = load_config(checkpoint_dir)
    evaluate.check_context(config, context)
    steps = max(1, round(tokens / sum(row.stages for row in ROWS.values()) / (batch_size * context)))
    held_out, prefix = evaluate.read_stream(eval_data, checkpoint_dir, config.vocab_size)
    sizes = Sizes(context, windows, prompts, context // 4, new_tokens, items, trials)
    rows_file, trained = write_rows(data, checkpoint_dir, context, steps * batch_size, seed, out_dir / "rows.bin")
    training = {
        "data": rows_file, "checkpoint_dir": checkpoint_dir, "max_seq_length": context, "batch_size": batch_size,
        "max_steps": steps, "validation_fraction": trained["held_out"] / trained["rows"], "device": device,
        "seed": seed, "sample": False, "save_interval": steps, "resume": "auto", "model.linear_window": linear_window,
        "compile": compile,
    }  # fmt: skip
    arguments = {
        "training": {name: value for name, value in training.items() if name != "checkpoint_dir"} | trained,
        "checkpoint_dir": checkpoint_dir.name, "weights": base_identity(checkpoint_dir), "sizes": sizes._asdict(),
        "eval_data": eval_data, "eval_sha256": evaluate.check_tokens(held_out, config.vocab_size, eval_data),
    }  # fmt: skip
    with evaluate.Results(output, arguments) as results:
        content = results.finished or {"command": "", "machine": "", "rows": []}
        done = {row["method"]: row for row in content["rows"]}
        if any(name not in done for name in chosen):
            content["command"], machine = describe_command("--only"), describe_machine(device)
            runs = Runs(training, config.n_layer, out_dir, jobs, [name for name in chosen if name not in done])
            for row in judge_all(runs, held_out, prefix, sizes):
                done[row["method"]] = row | {"machine": machine}
                content["rows"] = [done[name] for name in ROWS if name in done]
                content["machine"] = ", ".join(dict.fromkeys(row["machine"] for row in content["rows"]))
                results.finish(content)
        print("\n".join(table_of(content["rows"])))
        draw_results(output, lambda plt: draw(plt, {"arguments": results.arguments} | content))


def write_rows(
    data: list[Path] | Path, checkpoint_dir: Path, context: int, needed: int, seed: int, output: Path
) -> tuple[Path, dict[str, Any]]:
    """The rows of `context` tokens that every stage trains on, drawn from all texts, as a token file; and what they
    are: rows, held_out of these, tokens of the data, sha256."""
    import numpy as np

    from lit_swa.data.token_files import check_tokens, id_dtype
    from lit_swa.formats.checkpoint import tokenizer_dir
    from lit_swa.formats.directory import load_config
    from lit_swa.formats.files import atomic_file
    from lit_swa.tokenizer import Tokenizer

    vocab_size = load_config(checkpoint_dir).vocab_size
    stream = read_data(data, Tokenizer(tokenizer_dir(checkpoint_dir)), vocab_size)
    there = len(stream) // context
    if there < 2:
        raise ValueError(f"{data} gives {len(stream)} tokens: give at least two rows of {context}, or a lower context.")
    held_out = max(1, min(HELD_OUT, there // 10, needed // 2))
    rows = stream[: there * context].reshape(there, context)
    rows = rows[np.random.default_rng(seed).permutation(there)[: needed + held_out]]
    what = {"held_out": held_out, "rows": len(rows), "data_tokens": len(stream)}
    what["sha256"] = check_tokens(rows.reshape(-1), vocab_size, data)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as stream:
        stream.write(rows.astype(id_dtype(vocab_size)).tobytes())
    return output, what


def read_data(data: list[Path] | Path, tokenizer, vocab_size: int):
    """All texts and instructions as one stream of ids; an end of text or of an answer is behind each."""
    import numpy as np

    from lit_swa.data import load_dataset
    from lit_swa.data.token_files import open_token_file, read_documents

    parts = []
    for path in data if isinstance(data, list) else [data]:
        if path.suffix == ".bin":
            parts.append(open_token_file(path, vocab_size))
        elif path.is_dir() or path.suffix == ".txt":
            parts += read_documents(sorted(path.glob("*.txt")) if path.is_dir() else [path], tokenizer)
        else:
            parts.append(load_dataset(path, tokenizer, max_seq_length=2**20).tokens)
    return np.concatenate([np.asarray(part, dtype=np.uint32) for part in parts] or [np.zeros(0, np.uint32)])


# ------------------------------------------------------------------------------------------------------------- the runs


class Runs:
    """The runs that make the models, `jobs` at a time; a run starts when the one that it goes on from has ended."""

    def __init__(self, training: dict[str, Any], n_layer: int, out_dir: Path, jobs: int, chosen: list[str]) -> None:
        self.training, self.n_layer, self.out_dir, self.jobs, self.chosen = training, n_layer, out_dir, jobs, chosen
        self.error: BaseException | None = None  # the first one

    def __iter__(self):
        """The chosen ways, as their models are there."""
        import signal
        from concurrent.futures import ThreadPoolExecutor, as_completed

        from lit_swa.runs import Places
        from lit_swa.utils import interruptible

        order: list[str] = []
        for name in sorted(self.chosen, key=lambda name: len(ancestors(name))):
            order += [n for n in [*ancestors(name), name] if n not in order]
        pool, self.places = ThreadPoolExecutor(self.jobs), Places(self.training["device"], self.jobs)
        futures: dict[str, Any] = {}
        with interruptible([signal.SIGINT]) as self.interrupted:  # Ctrl-C reaches the runs too: they save their steps
            try:
                for name in order:  # what a run waits for has begun before it
                    futures[name] = pool.submit(self.make, name, futures.get(ROWS[name].start))
                names = {future: name for name, future in futures.items() if name in self.chosen}
                for future in as_completed(names):
                    future.result()
                    yield names[future]
                    if self.interrupted():
                        raise KeyboardInterrupt
            finally:
                pool.shutdown(cancel_futures=True)

    def make(self, name: str, before: Any) -> None:
        """Train the model of a way. Raises KeyboardInterrupt if it was interrupted, ValueError if it failed, and the
        same for every way behind one that did."""
        from lit_swa.runs import execute

        log = self.out_dir / f"{name.replace(' ', '-')}.log" if self.jobs > 1 else None
        try:
            if before is not None:
                before.result()
            with self.places.one() as environment:
                for command in self.commands(name):
                    if self.error is not None or self.interrupted():
                        raise self.error or KeyboardInterrupt
                    execute(command, log, environment)
        except BaseException as error:
            self.error = self.error or error
            raise

    def directory(self, name: str) -> Path:
        """The checkpoint that a way makes."""
        row, run = ROWS[name], self.out_dir / name.replace(" ", "-")
        if name == "softmax":
            return self.training["checkpoint_dir"]
        return self.directory(row.start) if row.read else run / ("stitched" if name == "blocks" else "final")

    def commands(self, name: str) -> list[list[str]]:
        """The finetuning scripts that make it, with their arguments, as typed."""
        from lit_swa.runs import typed

        row, run = ROWS[name], self.out_dir / name.replace(" ", "-")
        if name == "softmax" or row.read:
            return []
        options = self.training | {"out_dir": run} | row.flags
        if name == "blocks":
            return self.block_commands(options)
        if row.start is not None:  # it holds the fields of linear attention
            options["checkpoint_dir"] = self.out_dir / row.start.replace(" ", "-") / "transfer" / "final"
            del options["model.linear_window"]
        if "keep_full" in options:
            options["keep_full"] = max(1, round(options["keep_full"] * self.n_layer))
        return [["finetune/linearize.py", *typed(options)]]

    def block_commands(self, options: dict[str, Any]) -> list[list[str]]:
        """Split, save what each block reads, train each alone, put together."""
        from lit_swa.runs import typed

        own = {
            "shard": ("checkpoint_dir", "model.linear_window"),
            "inputs": ("checkpoint_dir", "data", "max_seq_length", "validation_fraction", "device", "seed"),
            "train": ("batch_size", "max_steps", "grad_clip", "device", "seed", "save_interval", "resume"),
            "stitch": ("checkpoint_dir",),
        }
        size = -(-self.n_layer // 3)
        blocks = range(-(-self.n_layer // size))
        more: list[tuple[str, dict[str, Any]]] = [("shard", {"layers_per_block": size}), ("inputs", {})]
        more += [("train", {"block": n, "lr_schedule": "constant"}) for n in blocks] + [("stitch", {})]
        return [
            ["finetune/linearize_blockwise.py", "--step", step, *typed(
                {name: options[name] for name in ("out_dir", *own[step])} | extra)]
            for step, extra in more
        ]  # fmt: skip

    def measured(self, name: str) -> dict[str, Any]:
        """What the runs of a way tell: their commands, the tokens that it trained on, and the seconds."""
        import shlex

        from lit_swa.training.log import read_metrics

        run = self.out_dir / name.replace(" ", "-")
        if not (commands := self.commands(name)):
            return {}
        found = [read_metrics(path.parent) for path in sorted(run.rglob("metrics.csv"))]
        counts = [int(metrics["tokens"][-1]) for metrics in found]
        seconds = sum(
            sum(s for s in metrics["seconds"] if s == s) for metrics in found
        )  # NaN where nothing was trained
        tokens = max(counts, default=0) if name == "blocks" else sum(counts)  # all blocks read the same
        rate = {"tok_s": tokens / seconds} if seconds else {}
        return {"commands": [shlex.join(["python", *c]) for c in commands], "tokens": tokens, "seconds": seconds} | rate


def ancestors(name: str) -> list[str]:
    """The ways whose runs one needs, the first to be trained first."""
    start = ROWS[name].start
    return [] if start is None else [*ancestors(start), start]


# ----------------------------------------------------------------------------------------------------------- the judges


def judge_all(runs: Runs, tokens, prefix, sizes):
    """A row of results for each way, as their models are there."""
    import time

    from lit_swa.checkpoint import load_model
    from lit_swa.formats.checkpoint import tokenizer_dir
    from lit_swa.judges import Judges
    from lit_swa.tokenizer import Tokenizer
    from lit_swa.utils import pick_dtype, release_memory

    training = runs.training
    place = {"dtype": pick_dtype("auto", training["device"]), "device": training["device"]}
    teacher = load_model(training["checkpoint_dir"], **place)
    tokenizer = Tokenizer(tokenizer_dir(training["checkpoint_dir"]))
    judges = Judges(teacher, tokenizer, tokens, prefix, sizes, training["seed"])
    for name in runs:
        started = time.perf_counter()
        model = teacher if name == "softmax" else load_model(runs.directory(name), **place, **ROWS[name].read or {})
        row = {"method": name, "about": ROWS[name].about, "attention": model.config.attention}
        row |= runs.measured(name) | judges(model)
        row["judge_seconds"] = time.perf_counter() - started
        del model
        release_memory()
        print(f"{name}: {summary(row)}", file=sys.stderr, flush=True)
        yield row


def summary(row: dict[str, Any]) -> str:
    trained = f"{row['tokens']:,} tokens in {row['seconds']:.0f} s, " if row.get("tokens") else ""
    return f"{trained}judged in {row['judge_seconds']:.0f} s, perplexity {row['ppl']:.2f}, KL {row['kl']:.4f}"


# ----------------------------------------------------------------------------------------------------------- the answer


def table_of(rows: list[dict[str, Any]]) -> list[str]:
    """A markdown table. Of a task, what the likelihood ranks first and what is written are beside each other."""
    from lit_swa.utils import format_number

    tasks = list(rows[0]["tasks"])
    heads = ["tokens", "s", "perplexity", "KL", "top token", "same text", "first tokens", "along teacher"]
    heads += [f"key at {n}" for n in rows[0]["passkey"]]
    heads += [f"{name} {kind}" for name in tasks for kind in ("ranked", "written")]
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for row in rows:
        trained = [f"{row['tokens']:,}", f"{row['seconds']:.0f}"] if row.get("tokens") else ["", ""]
        shares = [row["top_token"], row["same"], row["forced"], *row["passkey"].values()]
        shares += [row["tasks"][task][kind] for task in tasks for kind in ("ranked", "written")]
        top, same, *others = [f"{share:.1%}" for share in shares]
        cells = [*trained, format_number(row["ppl"]), f"{row['kl']:.3f}", top, same, f"{row['beginning']:.1f}", *others]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return lines


def draw(plt, result: dict[str, Any]):
    """A line for each model: perplexity and KL, its own text beside the teacher's, and what it recalls."""
    from lit_swa.plots import names_of, set_title

    rows, a = result["rows"], result["arguments"]
    tasks = {n: [row["tasks"][n] for row in rows] for n in rows[0]["tasks"]}
    panels: list[tuple[str, dict[str, list[float]]]] = [
        ("perplexity", {"perplexity": [row["ppl"] for row in rows]}),
        ("text of its own, % as the teacher's", {
            "same token, along the teacher's text": [100 * row["forced"] for row in rows],
            "same token, own text": [100 * row["same"] for row in rows]}),
        ("likeliest of four, % right", {n: [100 * task["ranked"] for task in asked] for n, asked in tasks.items()}),
        ("written, % right", {n: [100 * task["written"] for task in asked] for n, asked in tasks.items()}
            | {f"pass key, {n} tokens": [100 * row["passkey"][n] for row in rows] for n in rows[0]["passkey"]}),
    ]  # fmt: skip
    panels, places = [panel for panel in panels if panel[1]], range(len(rows))
    size = (3.75 * len(panels), 1.8 + ROW_HEIGHT * len(rows))
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, layout="constrained")
    for axis, (title, series) in zip(axes, panels, strict=True):
        draw_panel(axis, places, series, teacher=rows[0]["method"] == "softmax")
        axis.set_xlabel(title)
    axes[0].set(yticks=places, yticklabels=[row["method"] for row in rows], ylim=(len(rows) - 0.5, -0.5), xscale="log")
    for formatter in (axes[0].xaxis.set_major_formatter, axes[0].xaxis.set_minor_formatter):
        formatter(lambda value, _: f"{value:,.6g}" if f"{value:e}"[0] in "125" else "")
    trained = max((row.get("tokens", 0) for row in rows), default=0)
    model = f"{a['checkpoint_dir']} with linear attention and a window of {a['training']['model.linear_window']}"
    set_title(
        figure,
        f"{model}: up to {trained:,} tokens of training",
        f"asked about {names_of(a['eval_data'])}; dotted: softmax",
    )
    return figure


def draw_panel(axis, places, series: dict[str, list[float]], teacher: bool) -> None:
    """A point for each model and series. teacher: the first model is the teacher, which goes on as a dotted line."""
    from lit_swa.plots import OTHERS

    for n, (name, values) in enumerate(series.items()):
        colour = OTHERS[n % len(OTHERS)]
        axis.plot(values, places, "osv^D"[n % 5], color=colour, label=name, markersize=6, alpha=0.85)
        if teacher:
            axis.axvline(values[0], color=colour, linestyle=":", linewidth=1)
    axis.grid(alpha=0.3)
    if len(series) > 1:
        below = 0.5 / (ROW_HEIGHT * len(places))  # the axis' label, as a part of its height
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -below), frameon=False)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
