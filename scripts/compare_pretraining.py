"""Train small models that differ in their attention: scripts/compare_pretraining.py --data data/train."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed


class Row(NamedTuple):
    """How a model is made by pretrain/base.py."""

    about: str
    flags: dict[str, Any] = {}  # "{S}", "{S/2}", ... stand for the window and parts of it


PATTERN = {"model.attention": "sliding,sliding,sliding,full", "model.sliding_window_size": "{S}"}
NOPE = PATTERN | {"model.positions": "rope,rope,rope,none"}
ROWS = {
    "full": Row("full attention"),
    "SSSL": Row("a window in three of four layers", PATTERN),
    "SSSL, NoPE": Row("the same, no positions in the full layers", NOPE),
    "schedule": Row("SSSL, NoPE with short windows first", NOPE | {"window_schedule": "{S/4}:0,{S/2}:0.3,{S}:0.6"}),
    "random": Row("SSSL, NoPE with a window that each step draws", NOPE | {"random_window": "{S/4}"}),
    "Muon": Row("SSSL, NoPE trained with Muon", NOPE | {"optimizer": "muon"}),
}
SHAPE = {"n_layer": 12, "n_head": 8, "n_query_groups": 4, "n_embd": 512, "intermediate_size": 1408,
         "tie_embeddings": True}  # fmt: skip
LENGTHS = (1, 2, 4, 8)  # times the context


def main(
    data: Path,
    eval_data: list[Path] | Path,
    only: list[str] | None = None,
    tokens: int = 20_000_000,
    context: int = 1024,
    window: int = 256,
    batch_size: int = 32,
    vocab_size: int = 4096,
    targets: int = 32,
    jobs: int = 1,
    compile: bool | None = None,
    out_dir: Path = Path("out/compare_pretraining"),
    device: str = "auto",
    seed: int = 1234,
    output: Path = Path("out/compare_pretraining.json"),
    model: dict[str, Any] | None = None,
) -> None:
    """Train models that differ in their attention or optimiser on the same tokens; print a table and draw a picture.

    Each is a run of pretrain/base.py, by default of about 38M weights. Then each predicts the same tokens of held-out
    texts with 1, 2, 4 and 8 times the context that it was trained with before them, in bits per byte. Each model that
    is measured is kept in the results at once: the same command goes on with the others, and with the steps that an
    interrupted run has saved.

    The models: full, SSSL (three layers with a window, then one without), "SSSL, NoPE" (the one without a window does
    not see positions), and this again with windows by a schedule (schedule), with windows drawn anew in each step
    (random), and trained by Muon in place of AdamW (Muon).

    Args:
        data: What is trained on: a text or a directory of them, from which a tokenizer is trained too.
        eval_data: Texts that nothing is trained on: .txt files or directories of them.
        only: Which models to make. By default all.
        tokens: What each model is trained on.
        context: Tokens of a row.
        window: The window of the layers that have one.
        batch_size: Rows of an optimiser step.
        vocab_size: Tokens of the tokenizer, at most.
        targets: How many pieces of half a context are predicted, spread over eval_data.
        jobs: Runs that train at the same time, on a GPU each as far as there are as many. With more than one, each
            writes its lines to OUT_DIR/NAME.log.
        compile: Compile blocks. By default on a GPU.
        out_dir: Holds tokenizer, tokens and a directory for each run.
        device: auto, cpu or cuda.
        seed: Decides the order of the rows, new weights, and windows that are drawn.
        output: The JSON file; the picture goes next to it, as .png.
        model: Any field of the config of all models, as --model.FIELD VALUE, such as --model.n_layer 16.
    """
    import shlex

    from lit_swa import evaluate
    from lit_swa.checks import check_at_least, check_range
    from lit_swa.plots import check_output, draw_results
    from lit_swa.utils import describe_command, describe_machine, pick_device

    chosen = list(ROWS) if only is None else only
    if unknown := [name for name in chosen if name not in ROWS]:
        raise ValueError(f"There is no model {unknown[0]!r}: choose from {', '.join(ROWS)}.")
    check_at_least(
        tokens=(tokens, 1), batch_size=(batch_size, 1), targets=(targets, 1), jobs=(jobs, 1), context=(context, 16)
    )
    check_range("window", window, 16, context)
    check_output(output)
    device = pick_device(device)
    tokenizer, directory, digest = prepare_data(data, vocab_size, out_dir)
    held_out = evaluate.encode_files(tokenizer, evaluate.find_data(eval_data), None)
    pieces = Pieces.spread(len(held_out), context, targets, eval_data)
    training = {
        "data": directory, "tokenizer_dir": tokenizer.checkpoint_dir, "block_length": context,
        "batch_size": batch_size, "max_steps": max(1, round(tokens / (batch_size * context))), "device": device,
        "seed": seed, "sample": False, "resume": "auto", "compile": device != "cpu" if compile is None else compile,
        **{f"model.{name}": value for name, value in (SHAPE | {"block_size": context} | (model or {})).items()},
    }  # fmt: skip
    arguments = {
        "training": training, "window": window, "tokens_sha256": digest, "data": data, "eval_data": eval_data,
        "eval_sha256": evaluate.check_tokens(held_out, tokenizer.vocab_size, eval_data), "targets": targets,
    }  # fmt: skip
    with evaluate.Results(output, arguments) as results:
        content = results.finished or {"command": "", "machine": "", "rows": []}
        done = {row["method"]: row for row in content["rows"]}
        if missing := [name for name in chosen if name not in done]:
            content["command"] = describe_command("--only")
            content["machine"] = describe_machine(device)
            for name in train_all(missing, training, window, out_dir, jobs):
                row = {"method": name, "about": ROWS[name].about, "arguments": flags_of(name, window)}
                row["command"] = shlex.join(["python", *command_of(name, training, window, out_dir)])
                row |= measured(out_dir / directory_name(name))
                row["bits_per_byte"] = measure(out_dir / directory_name(name), device, held_out, tokenizer, pieces)
                done[name] = row
                content["rows"] = [done[n] for n in ROWS if n in done]
                results.finish(content)
                print(f"{name}: {summary(row)}", file=sys.stderr, flush=True)
        print("\n".join(table_of(content["rows"])))
        draw_results(output, lambda plt: draw(plt, {"arguments": results.arguments} | content))


def prepare_data(data: Path, vocab_size: int, out_dir: Path) -> tuple[Any, Path, str]:
    """The tokenizer, the directory of tokens, and the tokens' digest: made once, by what pretrain/base.py calls."""
    from lit_swa.arguments import Pretraining
    from lit_swa.token_files import TokenDirectory
    from lit_swa.training.pretraining import find_tokenizer, find_tokens

    tokenizer = find_tokenizer(Pretraining(data=str(data), tokenizer_vocab_size=vocab_size), None, out_dir)
    directory = find_tokens(str(data), out_dir / "tokens", tokenizer)
    return tokenizer, directory, TokenDirectory(directory).digest


# ------------------------------------------------------------------------------------------------------------- the runs


def flags_of(name: str, window: int) -> dict[str, Any]:
    """The arguments of pretrain/base.py that make this model different from the others."""
    parts = {"{S}": window, "{S/2}": window // 2, "{S/4}": window // 4}
    flags = dict(ROWS[name].flags)
    for key, value in flags.items():
        for part, size in parts.items():
            value = value.replace(part, str(size))
        flags[key] = value
    return flags


def command_of(name: str, training: dict[str, Any], window: int, out_dir: Path) -> list[str]:
    """The script that makes this model, with its arguments."""
    from lit_swa.runs import typed

    return ["pretrain/base.py", *typed(training | {"out_dir": out_dir / directory_name(name)} | flags_of(name, window))]


def directory_name(name: str) -> str:
    return name.replace(", ", "-").lower()


def train_all(names: list[str], training: dict[str, Any], window: int, out_dir: Path, jobs: int) -> Iterator[str]:
    """Train the models, `jobs` at a time; gives their names as they are there. None begins behind one that failed."""
    import signal
    from concurrent.futures import ThreadPoolExecutor, as_completed

    from lit_swa.runs import Places, execute
    from lit_swa.utils import interruptible

    failed: list[BaseException] = []
    places = Places(training["device"], jobs)

    def make(name: str) -> None:
        run = out_dir / directory_name(name)
        command = command_of(name, training, window, out_dir)
        if failed or interrupted():
            raise failed[0] if failed else KeyboardInterrupt
        try:
            with places.one() as environment:
                execute(command, out_dir / f"{run.name}.log" if jobs > 1 else None, environment)
        except BaseException as error:
            failed.append(error)
            raise

    with interruptible([signal.SIGINT]) as interrupted:  # Ctrl-C reaches the runs too: they save their steps
        pool = ThreadPoolExecutor(jobs)
        futures = {pool.submit(make, name): name for name in names}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        finally:
            pool.shutdown(cancel_futures=True)


def measured(run: Path) -> dict[str, Any]:
    """What a run tells of itself."""
    from lit_swa.training.log import read_metrics

    metrics = read_metrics(run)
    seconds = [s for s in metrics["seconds"] if s == s]
    later = sorted(seconds[len(seconds) // 2 :])
    per_step = metrics["tokens"][-1] / len(seconds)
    return {
        "tokens": int(metrics["tokens"][-1]), "seconds": sum(seconds),
        "tok_s": per_step / later[len(later) // 2],
        "curve": [[int(step), bits] for step, bits in zip(metrics["step"], metrics["bits_per_byte"], strict=True)
                  if bits == bits],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- bits per byte


class Pieces(NamedTuple):
    """Pieces of a text to predict: the same, whatever comes before them."""

    ends: list[int]  # behind each piece
    size: int  # tokens of a piece
    context: int

    @classmethod
    def spread(cls, n_tokens: int, context: int, count: int, data: object) -> "Pieces":
        """`count` pieces of half a context, evenly spread. Raises ValueError where the text is too short."""
        longest, size = max(LENGTHS) * context, context // 2
        if n_tokens < longest + (count - 1) * size:
            raise ValueError(
                f"{data} gives {n_tokens} tokens, and {count} pieces of {size} behind {longest - size} others need "
                f"{longest + (count - 1) * size}: give longer texts, fewer --targets, or a lower --context."
            )
        room = n_tokens - longest
        return cls([longest + room * i // max(1, count - 1) for i in range(count)], size, context)


def measure(run: Path, device: str, tokens: Any, tokenizer: Any, pieces: Pieces) -> dict[str, float]:
    """Bits per byte of the pieces, by how many tokens the model reads: a piece is the end of each reading."""
    import math

    import torch

    from lit_swa.checkpoint import load_model
    from lit_swa.evaluate import window_nll
    from lit_swa.training.pretraining import token_bytes
    from lit_swa.utils import pick_dtype, release_memory

    longest, found = max(LENGTHS) * pieces.context, {}
    dtype = getattr(torch, pick_dtype("auto", device))
    model = load_model(run / "final", dtype=dtype, device=device, block_size=longest)
    sizes = token_bytes(tokenizer)
    n_bytes = sum(int(sizes[tokens[end - pieces.size : end]].sum()) for end in pieces.ends)
    for length in (times * pieces.context for times in LENGTHS):
        total = 0.0
        for end in pieces.ends:
            idx = torch.from_numpy(tokens[end - length : end].astype("int64"))[None].to(device)
            total += window_nll(model, idx, length - pieces.size).double().sum().item()
        found[str(length)] = total / math.log(2) / n_bytes
    del model
    release_memory()
    return found


# ----------------------------------------------------------------------------------------------------------- the answer


def summary(row: dict[str, Any]) -> str:
    bits = ", ".join(f"{value:.4f} at {length}" for length, value in row["bits_per_byte"].items())
    return f"{row['tokens']:,} tokens in {row['seconds']:.0f} s, bits per byte {bits}"


def table_of(rows: list[dict[str, Any]]) -> list[str]:
    """A markdown table: bits per byte by how many tokens are read."""
    from lit_swa.utils import format_number

    heads = ["tok/s", *rows[0]["bits_per_byte"]]
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    for row in rows:
        cells = [f"{row['tok_s']:.0f}", *(format_number(bits, 4) for bits in row["bits_per_byte"].values())]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return lines


def draw(plt, result: dict[str, Any]):
    """On the left validation while they were trained, on the right longer texts."""
    from lit_swa.plots import OTHERS, STYLES, log_axis, names_of, set_title, short_count

    training, context = result["arguments"]["training"], int(result["arguments"]["training"]["block_length"])
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for row in result["rows"]:
        n = list(ROWS).index(row["method"])
        style = STYLES["full"].of_line() if n == 0 else {"color": OTHERS[n - 1], "marker": "osv^D"[n - 1]}
        label = row["method"] if n == 0 else f"{row['method']}: {row['about']}"
        axes[0].plot(*zip(*row["curve"], strict=True), label=label, markersize=4, **style)
        lengths = [int(length) / context for length in row["bits_per_byte"]]
        axes[1].plot(lengths, list(row["bits_per_byte"].values()), markersize=6, **style)
    axes[0].set(xlabel="optimiser step", ylabel="bits per byte", title="held-out blocks of the data, while training")
    titles = [f"{times}x, {short_count(times * context)}" for times in LENGTHS]
    axes[1].set(xlabel="tokens read, in contexts of training", title="the same tokens of other texts")
    log_axis(axes[1])
    axes[1].set_xscale("log", base=2)
    axes[1].set_xticks(LENGTHS, labels=titles)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    tokens = result["rows"][0]["tokens"]
    set_title(
        figure,
        f"{tokens:,} tokens of {names_of(result['arguments']['data'])} in rows of {context}, a window of "
        f"{result['arguments']['window']}, {training['model.n_layer']} layers; one run each",
        f"right: {names_of(result['arguments']['eval_data'])}",
    )
    return figure


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
