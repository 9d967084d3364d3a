"""Repeat LongLoRA's comparisons with a model of your own: python scripts/compare_longlora.py --data data/train."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

S2, SHORT = {"s2_attention": True}, {"s2_attention": True, "s2_shift": False}
# What is trained (None: nothing; "full": every weight; else LoRA and these weights), and fields of the config.
METHODS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "untrained": (None, {}),
    "full": ("full", {}),
    "short": ("full", SHORT),
    "s2": ("full", S2),
    "s2 lora": ("", S2),
    "s2 lora+norm": ("norm", S2),
    "s2 lora+embed": ("embed", S2),
    "s2 lora+norm+embed": ("embed,norm", S2),
}


def main(
    data: str,
    eval_data: list[Path] | Path,
    checkpoint_dir: Path | None = None,
    methods: list[str] | None = None,
    context: int | None = None,
    lengths: list[int] | None = None,
    steps: int = 70,
    batch_size: int = 4,
    learning_rate: float = 5e-4,
    warmup_steps: int = 10,
    r: int = 8,
    max_eval_tokens: int | None = None,
    out_dir: Path = Path("out/compare_longlora"),
    device: str = "auto",
    seed: int = 1234,
    output: Path = Path("out/compare_longlora.json"),
) -> None:
    """Extend a model's context in several ways, and print the perplexity of each; write a JSON and a picture.

    Each way is a run of finetune/full.py or finetune/lora.py with the same data, steps and learning rate. All scale the
    positions linearly; "untrained" does nothing else. "full" trains every weight with full attention, "short" with
    groups that are not shifted, "s2" with shifted groups (S2-Attn). "s2 lora" trains LoRA's matrices on q, k, v and o;
    "s2 lora+norm", "s2 lora+embed" and "s2 lora+norm+embed" train these weights too. Perplexity is measured with full
    attention. After an interruption, the same command goes on with the comparison.

    Args:
        data: Texts to train on, as finetune/full.py takes them: a directory of .txt files, or a .bin file.
        eval_data: Texts to measure perplexity on: .txt files, a directory of them or a .bin file.
        checkpoint_dir: The model. By default SmolLM2-135M-Instruct, which is downloaded once.
        methods: Which ways to compare. By default all.
        context: Tokens to train with. By default four times the trained length.
        lengths: Window lengths, in tokens, for the perplexity. By default the context, a half and a quarter of it.
        steps: Optimiser steps of each way.
        batch_size: Rows of `context` tokens in a step.
        learning_rate: Constant after the warmup.
        warmup_steps: Steps in which the rate rises.
        r: LoRA's rank; alpha is twice that.
        max_eval_tokens: Use only so many tokens of eval_data.
        out_dir: Holds a directory for each run. For SmolLM2-135M all take about 10 GB.
        device: auto, cpu or cuda.
        seed: Decides the order of the data and the new weights.
        output: The JSON file; the picture goes next to it, as .png.
    """
    import math

    from lit_swa import evaluate
    from lit_swa.checkpoint import check_checkpoint_dir, load_config
    from lit_swa.checks import check_at_least
    from lit_swa.formats.download import find_checkpoint
    from lit_swa.plots import check_output, draw_results
    from lit_swa.utils import describe_command, describe_machine, pick_device

    chosen = list(METHODS) if methods is None else methods
    if unknown := [name for name in chosen if name not in METHODS]:
        raise ValueError(f"There is no method {unknown[0]!r}: choose from {', '.join(METHODS)}.")
    device = pick_device(device)
    checkpoint_dir = find_checkpoint(checkpoint_dir)
    check_checkpoint_dir(checkpoint_dir)
    config = load_config(checkpoint_dir)
    context = 4 * config.block_size if context is None else context
    lengths = [context // 4, context // 2, context] if lengths is None else lengths
    check_at_least(context=(context, 16), steps=(steps, 1), r=(r, 1))
    if not lengths or max(lengths) > context:
        raise ValueError(f"lengths={lengths} does not fit: give lengths of at most the context of {context} tokens.")
    check_output(output)
    tokens, prefix = evaluate.read_stream(eval_data, checkpoint_dir, config.vocab_size, max_eval_tokens)
    cuts = {n: evaluate.full_windows(len(tokens), n, n, "all", None, eval_data, prefix) for n in dict.fromkeys(lengths)}
    scaling = {"type": "linear", "factor": float(max(1, math.ceil(context / config.block_size)))}
    training = {
        "data": data, "checkpoint_dir": checkpoint_dir, "max_seq_length": context, "max_steps": steps,
        "batch_size": batch_size, "learning_rate": learning_rate, "warmup_steps": warmup_steps, "device": device,
        "seed": seed, "lr_schedule": "constant", "validation_fraction": 0.0, "sample": False, "save_interval": steps,
        "resume": "auto",
    }  # fmt: skip
    fields = {"block_size": max(context, config.block_size), "rope_scaling": scaling}
    arguments = {
        "methods": chosen, "training": training, "fields": fields, "r": r, "lengths": list(cuts), "out_dir": out_dir,
        "eval_sha256": evaluate.check_tokens(tokens, config.vocab_size, eval_data),
        "weights": evaluate.weights_identity(checkpoint_dir),
    }  # fmt: skip
    with evaluate.Results(output, arguments) as results:
        finished = results.finished
        if finished is None:
            results.save()
            for name in chosen:
                if name not in results.parts:
                    results.add(name, measure(name, training, fields, r, out_dir, tokens, cuts, device), every=0)
            rows = [{"method": name} | results.parts[name] for name in chosen]
            command, machine = describe_command(), describe_machine(device)
            finished = {"command": command, "machine": machine, "rows": rows}
            results.finish(finished)
            finished["arguments"] = results.arguments
        report(finished)
        draw_results(output, lambda plt: draw(plt, finished))


def measure(
    name: str, training: dict[str, Any], fields: dict[str, Any], r: int, out_dir: Path, tokens, cuts, device: str
) -> dict[str, Any]:
    """Train in this way and measure the perplexity of the result: a row of the table."""
    from lit_swa import runs
    from lit_swa.checkpoint import load_model
    from lit_swa.evaluate import read_windows
    from lit_swa.utils import pick_dtype, release_memory

    trained, own = METHODS[name]
    row: dict[str, Any] = {}
    directory, overrides = training["checkpoint_dir"], fields
    if trained is not None:
        run = out_dir / name.replace(" ", "-")
        command = training_command(trained, training | {"out_dir": run}, fields | own, r)
        row = runs.train(command, run)
        directory, overrides = run / "final", {}
    print(f"reading with {name}", file=sys.stderr)
    model = load_model(directory, pick_dtype("auto", device), device, **overrides)
    row["ppl"] = {str(n): read_windows(model, cut, tokens, device)["ppl"] for n, cut in sorted(cuts.items())}
    del model
    release_memory()
    return row


def training_command(trained: str, training: dict[str, Any], fields: dict[str, Any], r: int) -> list[str]:
    """A finetuning script and its arguments, as typed."""
    from lit_swa.runs import typed

    options = dict(training)
    if trained != "full":
        options |= {"r": r, "alpha": 2 * r} | ({"extra_trainable": trained} if trained else {})
    options |= {f"model.{name}": value for name, value in fields.items()}
    return ["finetune/full.py" if trained == "full" else "finetune/lora.py", *typed(options)]


def report(result: dict[str, Any]) -> None:
    """The table on stdout."""
    from lit_swa.utils import format_number

    lengths = [str(n) for n in sorted(result["arguments"]["lengths"])]
    print("| | " + " | ".join(lengths) + " | tokens / s | memory |\n| --- |" + " ---: |" * (len(lengths) + 2))
    for row in result["rows"]:
        cells = [format_number(row["ppl"][n]) for n in lengths]
        cells.append(f"{row['tok_s']:,.0f}" if "tok_s" in row else "")
        cells.append(row.get("memory", ""))
        print(f"| {row['method']} | " + " | ".join(cells) + " |")


def draw(plt, result: dict[str, Any]):
    """Training loss on the left, perplexity by length on the right."""
    from lit_swa.plots import argument_of, log_axis, names_of, running_mean, set_title, short_count

    rows, training, fields = result["rows"], result["arguments"]["training"], result["arguments"]["fields"]
    figure = plt.figure(figsize=(11, 5.8), layout="constrained")
    left, axes = panels(figure, rows)
    for row in rows:
        if "loss" in row:
            loss = running_mean(row["loss"], 5)
            left.plot(range(1, len(loss) + 1), loss, **look(row["method"]), markevery=max(1, len(loss) // 7))
    left.set(xlabel="optimiser step", ylabel="loss, nats per token", title="training loss, mean of 5 steps")
    left.grid(alpha=0.3)
    log_axis(left)
    draw_perplexities(axes, rows)
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    names = [explain(row["method"]) for row in rows]
    figure.legend([handles[n] for n in names], names, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    steps = f"{training['max_steps']} steps of {training['batch_size']} rows at a rate of {training['learning_rate']:g}"
    factor = f"positions divided by {fields['rope_scaling']['factor']:g}"
    texts = names_of(argument_of(result["command"], "eval_data"))
    model = f"{Path(training['checkpoint_dir']).name} extended to {short_count(training['max_seq_length'])} tokens"
    set_title(figure, f"{model}, {factor}: one run of {steps} each way", f"perplexity of {texts}, lower is better")
    return figure


def panels(figure, rows: list[dict[str, Any]]) -> tuple[Any, list[Any]]:
    """The axis of the loss, and those of the perplexity: what is not trained is far above and has one of its own."""
    both = len({"loss" in row for row in rows}) == 2
    places = figure.add_gridspec(2, 2, height_ratios=[1, 4])
    left = figure.add_subplot(places[:, 0])
    if not both:
        return left, [figure.add_subplot(places[:, 1])]
    top, bottom = (figure.add_subplot(places[n, 1]) for n in (0, 1))
    top.spines.bottom.set_linestyle(":")
    bottom.spines.top.set_linestyle(":")
    return left, [bottom, top]


def draw_perplexities(axes: list[Any], rows: list[dict[str, Any]]) -> None:
    """On the last axis what is not trained, on the first what is, each with its name at the end."""
    from lit_swa.plots import label_ends, log_axis, short_count

    lengths = sorted(map(int, rows[0]["ppl"]))
    for axis, trained in zip(axes, (True, False), strict=False):
        for row in [row for row in rows if len(axes) == 1 or ("loss" in row) == trained]:
            style = look(row["method"]) | {"label": explain(row["method"])}
            axis.plot(lengths, [row["ppl"][str(n)] for n in lengths], **style)
        axis.set(xscale="log", ylabel="perplexity" if trained else "")
        axis.set_xticks(lengths, map(short_count, lengths) if trained else [])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.margins(y=0.4 if not trained else 0.08)
        log_axis(axis)
    axes[0].set_xlabel("length of the windows, tokens")
    axes[-1].set_title("perplexity with full attention")
    ends: dict[Any, list[tuple[float, float, str, str]]] = {axis: [] for axis in axes}
    for row in rows:
        end = (lengths[-1], row["ppl"][str(lengths[-1])], row["method"], look(row["method"])["color"])
        ends[axes[0] if "loss" in row else axes[-1]].append(end)
    label_ends(axes[0].figure, ends)


TRAINED = {"": "LoRA on q, k, v, o", "norm": "LoRA and norms", "embed": "LoRA and embeddings"}
TRAINED["embed,norm"] = "LoRA, norms and embeddings"


def explain(method: str) -> str:
    """What a method trains, and what its queries see in training."""
    trained, fields = METHODS[method]
    if trained is None:
        return f"{method}: positions divided, nothing else"
    seen = (
        "full attention"
        if not fields
        else "shifted groups (S2-Attn)"
        if fields == S2
        else "groups that are not shifted"
    )
    return f"{method}: {TRAINED.get(trained, 'all weights')}, {seen}"


def look(method: str) -> dict[str, Any]:
    """All ways to train LoRA have one colour."""
    from lit_swa.plots import DASHES, style_of

    name, _, extra = method.partition(" lora")
    if " lora" not in method:
        return style_of({"untrained": "linear"}.get(name, name)).of_line() | {"markersize": 6}
    n = ["", "+norm", "+embed", "+norm+embed"].index(extra)
    return {"color": style_of("lora").colour, "marker": "os^D"[n], "linestyle": DASHES[n], "markersize": 6}


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
