"""Train a model to read far beyond its context with a window and sinks: scripts/extend_context.py --data data/train."""

import sys
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

ROWS = {
    "original": "as it was, every key in reach",
    "untrained": "with a window and sinks",
    "trained": "with both, after training in rows of",
    "short rows": "with both, after as many tokens in rows of",
}
ANSWER_TOKENS = 16  # room for the answer to a pass key


def main(
    data: str,
    eval_data: list[Path] | Path,
    checkpoint_dir: Path | None = None,
    length: int = 4096,
    read_length: int | None = None,
    window: int = 1020,
    sinks: int = 4,
    chunk_size: int = 1024,
    short_length: int | None = None,
    method: Literal["lora", "full"] = "lora",
    steps: int = 8,
    batch_size: int = 1,
    learning_rate: float | None = None,
    passkey_lengths: list[int] | None = None,
    depths: int = 5,
    trials: int = 1,
    bucket: int | None = None,
    max_eval_tokens: int | None = None,
    out_dir: Path = Path("out/extend_context"),
    device: str = "auto",
    precision: Literal["auto", "32-true", "bf16-true"] = "auto",
    seed: int = 1234,
    output: Path = Path("out/extend_context.json"),
    model: dict[str, Any] | None = None,
) -> None:
    """Train a model with a window and sinks in long rows, and compare what it makes of a long text before and after.

    The rows are read in exact chunks (finetune/lora.py or finetune/full.py with --chunk_size). Measured are perplexity
    by position, and pass keys at several depths of texts of several lengths: of the model as it was, of the same with
    the window, and of that after training. Prints tables, writes a JSON and a picture. After an interruption, the same
    command goes on.

    Args:
        data: Texts to train on, as finetune/lora.py takes them: a directory of .txt files, or a .bin file.
        eval_data: Texts to measure perplexity on: .txt files, a directory of them or a .bin file.
        checkpoint_dir: The model. By default SmolLM2-135M-Instruct, which is downloaded once.
        length: Tokens of a row in training.
        read_length: Tokens of a window of eval_data that is read. By default the length.
        window: Keys that a query sees, itself included.
        sinks: First tokens of a text that it sees as well. They, and the window, lie at positions of training.
        chunk_size: Tokens of an exact chunk.
        short_length: Train another model on as many tokens in rows of this length, to see what the length does.
        method: lora trains LoRA's matrices on q, k, v and o; full trains every weight.
        steps: Optimiser steps.
        batch_size: Long rows of a step.
        learning_rate: The rate after the warmup. By default the training script's.
        passkey_lengths: Lengths of the texts with a pass key, in tokens. By default a quarter of read_length, and it.
        depths: At how many depths of the text, from its beginning to its end, keys are hidden; 0 for no pass keys.
        trials: Keys for each length and depth.
        bucket: How many positions make one point of the perplexity. By default a 32nd of read_length.
        max_eval_tokens: Use only so many tokens of eval_data.
        out_dir: Holds the runs.
        device: auto, cpu or cuda.
        precision: Of training and reading; auto is bf16-true on a GPU and 32-true on a CPU.
        seed: Decides the order of the rows, new weights, and the pass keys.
        output: The JSON file; the picture goes next to it, as .png.
        model: Other fields of the config, as --model.FIELD VALUE, such as --model.attention streaming,dual_chunk.
    """
    from lit_swa import evaluate
    from lit_swa.checkpoint import check_checkpoint_dir, load_config
    from lit_swa.checks import check_at_least
    from lit_swa.formats.download import find_checkpoint
    from lit_swa.plots import check_output, draw_results
    from lit_swa.utils import pick_device

    read_length = length if read_length is None else read_length
    lengths = [max(512, read_length // 4), read_length] if passkey_lengths is None else passkey_lengths
    check_at_least(
        length=(length, 16), read_length=(read_length, 16), steps=(steps, 1), batch_size=(batch_size, 1),
        short_length=(short_length, 16), depths=(depths, 0), trials=(trials, 1),
    )  # fmt: skip
    if short_length is not None and length % short_length:
        raise ValueError(f"short_length={short_length} does not fit: it must divide the length of {length} tokens.")
    device, checkpoint_dir = pick_device(device), find_checkpoint(checkpoint_dir)
    check_checkpoint_dir(checkpoint_dir)
    check_output(output)
    config, longest = load_config(checkpoint_dir), max(length, read_length, *(lengths if depths else ()))
    fields = {"attention": "streaming", "sliding_window_size": window, "n_sink_tokens": sinks}
    fields |= {"block_size": max(longest, config.block_size)} | (model or {})
    evaluate.check_context(config.override(**fields), longest)
    tokens, prefix = evaluate.read_stream(eval_data, checkpoint_dir, config.vocab_size, max_eval_tokens)
    size = max(1, read_length // 32) if bucket is None else bucket
    cut = evaluate.full_windows(len(tokens), read_length, read_length, "all", size, eval_data, prefix)
    training = {
        "data": data, "checkpoint_dir": checkpoint_dir, "max_steps": steps, "chunk_size": chunk_size, "device": device,
        "precision": precision, "seed": seed, "validation_fraction": 0.0, "sample": False, "save_interval": steps,
        "resume": "auto",
    }  # fmt: skip
    training |= {} if learning_rate is None else {"learning_rate": learning_rate}
    rows = {"trained": (length, batch_size)}
    if short_length is not None:
        rows["short rows"] = (short_length, batch_size * (length // short_length))
    keys = {"lengths": sorted(lengths) if depths else [], "depths": depths, "trials": trials}
    arguments = {
        "method": method, "training": training, "rows": rows, "fields": fields, "passkeys": keys,
        "trained_length": config.block_size, "read_length": read_length, "bucket": size, "out_dir": out_dir,
        "eval_data": eval_data, "eval_sha256": evaluate.check_tokens(tokens, config.vocab_size, eval_data),
        "weights": evaluate.weights_identity(checkpoint_dir),
    }  # fmt: skip
    with evaluate.Results(output, arguments) as results:
        finished = results.finished
        if finished is None:
            finished = run(results, tokens, cut, device)
        report(finished)
        draw_results(output, lambda plt: draw(plt, finished))


def run(results, tokens, cut, device: str) -> dict[str, Any]:
    """The results: the figures of each model, of which those that were measured before are kept."""
    from lit_swa.utils import describe_command, describe_machine

    results.save()  # a disk that is full shows now and not after the training
    judge, names = Judge(results, tokens, cut, device), ("original", "untrained", *results.arguments["rows"])
    for name in names:
        if name not in results.parts:
            results.add(name, judge(name), every=0)
    finished = {"command": describe_command(), "machine": describe_machine(device)}
    finished["rows"] = [{"model": name} | results.parts[name] for name in names]
    results.finish(finished)
    return finished | {"arguments": results.arguments}


class Judge:
    """Makes a model and measures it; the texts with pass keys are made once."""

    def __init__(self, results, tokens, cut, device: str) -> None:
        """cut: the windows of `tokens` that are read."""
        from lit_swa.formats.checkpoint import tokenizer_dir
        from lit_swa.passkey import build_prompt, plan_trials, spread_depths
        from lit_swa.tokenizer import Tokenizer

        self.arguments, self.tokens, self.cut, self.device = results.arguments, tokens, cut, device
        self.out_dir, training = Path(self.arguments["out_dir"]), self.arguments["training"]
        self.tokenizer, keys = Tokenizer(tokenizer_dir(Path(training["checkpoint_dir"]))), self.arguments["passkeys"]
        trials = plan_trials(keys["lengths"], spread_depths(keys["depths"]) if keys["depths"] else [], keys["trials"])
        self.hidden = [(t, *build_prompt(t, self.tokenizer, training["seed"], ANSWER_TOKENS)[:2]) for t in trials]

    def __call__(self, name: str) -> dict[str, Any]:
        """The figures of a model; trains it first if that is its way."""
        import time

        from lit_swa.checkpoint import load_model
        from lit_swa.evaluate import read_windows
        from lit_swa.linear_formats import pack_for_cpu
        from lit_swa.utils import pick_dtype, release_memory

        a = self.arguments
        row = {} if name in ("original", "untrained") else self.train(name)
        directory, fields = Path(a["training"]["checkpoint_dir"]), {"block_size": a["fields"]["block_size"]}
        if name == "untrained":
            fields = a["fields"]
        elif name != "original":
            directory, fields = self.out_dir / name.replace(" ", "-") / "final", {}
        print(f"reading with {name}", file=sys.stderr, flush=True)
        precision = a["training"]["precision"]
        dtype = {"32-true": "float32", "bf16-true": "bfloat16"}.get(precision) or pick_dtype("auto", self.device)
        gpt, started = load_model(directory, dtype, self.device, **fields), time.perf_counter()
        pack_for_cpu(gpt)
        row |= read_windows(gpt, self.cut, self.tokens, self.device) | {"read_seconds": time.perf_counter() - started}
        started = time.perf_counter()
        row |= {"passkeys": self.find(gpt), "passkey_seconds": time.perf_counter() - started}
        del gpt
        release_memory()
        return row

    def train(self, name: str) -> dict[str, Any]:
        """Train it, and tell what that took."""
        from lit_swa import runs

        a, run = self.arguments, self.out_dir / name.replace(" ", "-")
        length, batch_size = a["rows"][name]
        options = a["training"] | {"max_seq_length": length, "batch_size": batch_size, "out_dir": run}
        options |= {f"model.{field}": value for field, value in a["fields"].items()}
        return runs.train([f"finetune/{a['method']}.py", *runs.typed(options)], run)

    def find(self, gpt) -> list[dict[str, Any]]:
        """The answers to all pass keys."""
        from lit_swa.generate import Session
        from lit_swa.passkey import ask, find_answer

        found, session = [], Session(gpt)
        for trial, ids, key in self.hidden:
            answer = ask(session, self.tokenizer, ids, ANSWER_TOKENS)
            row = {"length": trial.length, "cell": trial.depth, "expected": key, "answer": answer}
            found.append(row | {"right": find_answer(answer) == key})
        return found


def report(result: dict[str, Any]) -> None:
    """Two tables on stdout: perplexity by position, in quarters, and pass keys by length."""
    from lit_swa.utils import format_number

    rows, parts = result["rows"], quarters(result["rows"][0])
    heads = [f"{a:,} to {b:,}" for a, b, _ in parts]
    lengths = result["arguments"]["passkeys"]["lengths"]
    heads += ["tok/s", "memory"] + [f"keys at {n:,}" for n in lengths]
    print("| perplexity of positions | " + " | ".join(heads) + " |\n| --- |" + " ---: |" * len(heads))
    for row in rows:
        cells = [format_number(mean_ppl(row, names)) for _, _, names in parts]
        cells += [f"{row['tok_s']:,.0f}" if "tok_s" in row else "", row.get("memory", "")]
        for n in lengths:
            right = [part["right"] for part in row["passkeys"] if part["length"] == n]
            cells.append(f"{sum(right)} of {len(right)}")
        print(f"| {row['model']} | " + " | ".join(cells) + " |")


def quarters(row: dict[str, Any]) -> list[tuple[int, int, list[str]]]:
    """(first position, last one, names of its buckets) of each quarter of what was read."""
    names = list(row["buckets"])
    n = -(-len(names) // 4)
    groups = [names[i : i + n] for i in range(0, len(names), n)]
    return [(int(g[0].split("-")[0]), int(g[-1].split("-")[1]), g) for g in groups]


def mean_ppl(row: dict[str, Any], names: list[str]) -> float:
    """The perplexity over some buckets."""
    import math

    from lit_swa.evaluate import perplexity

    counts = [row["bucket_tokens"][name] for name in names]
    nlls = [math.log(row["buckets"][name]) for name in names]
    return perplexity(sum(n * nll for n, nll in zip(counts, nlls, strict=True)) / sum(counts))


def draw(plt, result: dict[str, Any]):
    """Perplexity over position on top; below it, for each model, which pass keys were found."""
    from lit_swa.plots import names_of, set_title

    a, rows = result["arguments"], result["rows"]
    lengths, training, fields = a["passkeys"]["lengths"], a["training"], a["fields"]
    figure = plt.figure(figsize=(10, 8 if lengths else 5), layout="constrained")
    heights = [3, 2] if lengths else [3]
    places = figure.add_gridspec(len(heights), len(rows), height_ratios=heights)
    draw_curves(figure.add_subplot(places[0, :]), rows, a)
    for n, row in enumerate(rows if lengths else ()):
        draw_keys(figure.add_subplot(places[1, n]), row, lengths, first=n == 0)
    name, (length, batch) = Path(training["checkpoint_dir"]).name, a["rows"]["trained"]
    what = f"{training['max_steps']} steps of {batch * length:,} tokens"
    seen = f"{fields['attention']}, {fields['n_sink_tokens']} sinks and a window of {fields['sliding_window_size']:,}"
    below = "; below: pass keys found" if lengths else ""
    set_title(figure, f"{name} with {seen}: {what}", f"text: {names_of(a['eval_data'])}{below}")
    return figure


def draw_curves(axis, rows: list[dict[str, Any]], a: dict[str, Any]) -> None:
    """Perplexity over position, cut off at ten times the lowest; the legend says how high a curve goes beyond."""
    from lit_swa.plots import log_axis, short_count, token_axis

    curves = {row["model"]: list(row["buckets"].values()) for row in rows}
    lowest, highest = min(map(min, curves.values())), max(map(max, curves.values()))
    top = 1.1 * min(highest, 10 * lowest)
    for row in rows:
        middles, curve = [sum(map(int, name.split("-"))) / 2 for name in row["buckets"]], curves[row["model"]]
        above = f" (up to {max(curve):,.0f})" if max(curve) > top else ""
        label = f"{row['model']}: {explain(row['model'], a)}{above}"
        axis.plot(middles, curve, label=label, **look(row["model"]))
    axis.set_ylim(0.9 * lowest, top)
    if a["trained_length"] < a["read_length"]:
        label = f"trained to {short_count(a['trained_length'])} before"
        axis.axvline(a["trained_length"], color="grey", linestyle=":", label=label)
    axis.set(xlabel="position in the text, tokens", ylabel=f"perplexity, mean of {a['bucket']:,} positions")
    token_axis(axis, a["read_length"])
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    log_axis(axis)


def explain(name: str, a: dict[str, Any]) -> str:
    """A model in words, with the length of its rows."""
    from lit_swa.plots import short_count

    return ROWS[name] + (f" {short_count(a['rows'][name][0])}" if name in a["rows"] else "")


def look(name: str) -> dict[str, Any]:
    from lit_swa.plots import style_of

    style = {"original": "full", "untrained": "streaming", "trained": "sliding", "short rows": "s2"}[name]
    return style_of(style).of_line() | {"markersize": 4}


def draw_keys(axis, row: dict[str, Any], lengths: list[int], first: bool) -> None:
    """A cell for each length and depth: how many of its keys were found."""
    from lit_swa.passkey import accuracy_rows
    from lit_swa.plots import draw_shares

    shares = {(r["length"], r["depth"]): 100 * r["accuracy"] for r in accuracy_rows(row["passkeys"])}
    depths = sorted({depth for _, depth in shares})
    grid = [[shares[n, depth] for n in lengths] for depth in depths]
    draw_shares(axis, grid, lengths, [f"{depth:.0%}" for depth in depths] if first else [])
    axis.set(xlabel="length, tokens", title=row["model"], ylabel="depth of the key; % found" if first else "")


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
