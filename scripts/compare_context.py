"""Perplexity over position, for several ways to read beyond the trained length: python scripts/compare_context.py."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from lit_swa.methods import Method, Setup, choose_methods


def main(
    data: list[Path] | Path,
    checkpoint_dir: Path | None = None,
    methods: list[str] | None = None,
    custom: dict[str, dict[str, Any]] | None = None,
    lengths: list[int] | None = None,
    windows: int = 1,
    last: int = 2048,
    bucket: int = 512,
    trained_length: int | None = None,
    window: int | None = None,
    n_sink_tokens: int = 4,
    dual_chunk_size: int | None = None,
    dual_chunk_local: int | None = None,
    max_tokens: int | None = None,
    chunk_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 1234,
    output: Path = Path("out/compare_context.json"),
    model: dict[str, Any] | None = None,
) -> None:
    """Read the same windows of a text with several methods and lengths; print tables, write a JSON and a picture.

    A method is a set of fields of the model's config, which may depend on the length; the weights do not change. A
    method that cannot read a length says why, and the others go on. An interrupted run goes on where it stopped when it
    is started again with the same arguments.

    Args:
        data: A .txt file (UTF-8), a list or a directory of such files, or a .bin file of token ids.
        checkpoint_dir: A checkpoint's directory or name. By default SmolLM2-135M-Instruct, which is downloaded once.
        methods: Some of rope, linear, ntk, dynamic, yarn, sliding, streaming and dual_chunk. By default all of them but
            dynamic.
        custom: More methods, as names and fields of the config, such as '{"base 1e6": {"rope_base": 1e6}}'.
        lengths: Tokens in a window. By default a half, one, two and four times the trained length.
        windows: How many windows of each length to read, spread evenly over the text.
        last: One table gives the perplexity of so many tokens at the end of each window, the other that of all tokens.
        bucket: How many positions make one point of the curves.
        trained_length: The length that the model was trained for. By default the block_size of the checkpoint.
        window: The sliding_window_size of sliding and streaming. By default half of the trained length.
        n_sink_tokens: How many first tokens streaming keeps.
        dual_chunk_size: Tokens in a chunk of dual_chunk. By default what the model derives from the trained length.
        dual_chunk_local: The distance up to which dual_chunk keeps distances exact. By default what the model
            derives from the trained length.
        max_tokens: Read only so many tokens of the text.
        chunk_size: Feed a window to the model in calls of so many tokens through the KV cache, which takes less memory;
            0 feeds it in one call. The result is the same up to rounding (except with the RoPE scalings dynamic and
            longrope, which follow the length read so far). By default as many as fit the free memory.
        device: auto, cpu, cuda or mps.
        dtype: float32, bfloat16 or float16; auto is bfloat16 on a GPU and float32 on a CPU.
        seed: Seeds torch's random numbers, for a model that you have changed to draw some.
        output: The JSON file for the results; the picture goes next to it, as .png.
        model: Any field of the model's config, as --model.FIELD VALUE (--model.help lists them), for all methods.
    """
    import torch

    from lit_swa import evaluate
    from lit_swa.checkpoint import check_checkpoint_dir, load_config
    from lit_swa.checks import check_at_least
    from lit_swa.formats.download import find_checkpoint
    from lit_swa.plots import check_output, draw_results

    device, dtype = evaluate.pick_place(device, dtype)
    checkpoint_dir = find_checkpoint(checkpoint_dir)
    check_checkpoint_dir(checkpoint_dir, tokenizer=False)
    config = load_config(checkpoint_dir).override(**model or {})
    trained = config.block_size if trained_length is None else trained_length
    lengths = [trained // 2, trained, 2 * trained, 4 * trained] if lengths is None else lengths
    window = max(1, trained // 2) if window is None else window
    check_at_least(trained_length=(trained, 1), window=(window, 1), last=(last, 1), chunk_size=(chunk_size, 0))
    check_output(output)
    setup = Setup(trained, window, n_sink_tokens, dual_chunk_size, dual_chunk_local)
    chosen = choose_methods(methods, custom or {})
    tokens, prefix = evaluate.read_stream(data, checkpoint_dir, config.vocab_size, max_tokens)
    cuts = {n: evaluate.spread_windows(len(tokens), n, windows, bucket, data, prefix) for n in dict.fromkeys(lengths)}
    if not cuts:
        raise ValueError("lengths is empty: give at least one.")
    arguments = {
        "checkpoint_dir": checkpoint_dir, "data": data, "methods": list(chosen), "custom": custom,
        "lengths": list(cuts), "windows": windows, "last": last, "bucket": bucket, "max_tokens": max_tokens,
        "chunk_size": chunk_size, "device": device, "dtype": dtype, "seed": seed, "model": model, **setup._asdict(),
        **({"prefix": prefix} if prefix else {}),
        "data_sha256": evaluate.check_tokens(tokens, config.vocab_size, data),
        "weights": evaluate.weights_identity(checkpoint_dir),
    }  # fmt: skip
    torch.manual_seed(seed)
    with evaluate.Results(output, arguments) as results:
        finished = results.finished
        if finished is None:
            finished = run(results, arguments, chosen, setup, tokens, cuts)
        else:
            print(f"{output} holds the results of these arguments already", file=sys.stderr)
        report(finished)
        draw_results(output, lambda plt: draw(plt, finished))


# ---------------------------------------------------------------------------------------------------------- the reading


def run(results, arguments: dict[str, Any], methods: dict[str, Method], setup: Setup, tokens, cuts) -> dict[str, Any]:
    """Every method at every length, the short ones first; writes the results."""

    from lit_swa.checkpoint import load_model
    from lit_swa.command_line import shorten
    from lit_swa.utils import ProgressLine, describe_command, describe_machine, interruptible, memory_in_use

    results.save()  # a disk that is full or read-only shows now and not after hours
    gpt = load_model(arguments["checkpoint_dir"], arguments["dtype"], arguments["device"], **arguments["model"] or {})
    total = len(methods) * sum(length * len(cut.starts) for length, cut in cuts.items())
    before = sum(part["length"] for part in results.parts.values())
    progress, rows = ProgressLine(total, "tokens", done=before), []
    with interruptible() as interrupted:

        def step(text: str) -> None:
            progress.show(sum(part["length"] for part in results.parts.values()), text)
            if interrupted():
                results.save()
                print("what is read is kept: the same command goes on", file=sys.stderr)
                raise KeyboardInterrupt

        for length, cut in sorted(cuts.items()):
            for name, method in methods.items():
                row = {"method": name, "length": length, "fields": method(length, setup)}
                try:
                    parts = read_windows(results, row, gpt, tokens, cut, arguments, step)
                    rows.append(row | summarize(parts, cut, arguments["last"]))
                except ValueError as error:
                    rows.append(row | {"error": shorten(str(error))})
                    progress.total -= length * len(cut.starts)
    if all("error" in row for row in rows):
        raise ValueError(f"No method can read the text. {rows[0]['method']}: {rows[0]['error']}")
    result = {
        "command": describe_command(),
        "machine": describe_machine(arguments["device"]),
        "peak_memory": memory_in_use(),
        "seconds": sum(row.get("seconds", 0.0) for row in rows),
        "rows": rows,
    }
    results.finish(result)
    return {"arguments": results.arguments} | result


def read_windows(results, row: dict[str, Any], gpt, tokens, cut, arguments: dict[str, Any], step) -> list[dict]:
    """The parts of one method at one length; those that are missing are read. Raises ValueError if the model cannot."""
    import time

    from lit_swa.evaluate import pick_chunk_size, require_finite, window_nll, with_fields
    from lit_swa.linear_formats import pack_for_cpu

    keys = {f"{row['method']} {row['length']} {start}": start for start in cut.starts}
    todo = {key: start for key, start in keys.items() if key not in results.parts}
    for key in keys.keys() - todo:
        cut.check_sums([results.parts[key]["sums"]], 1)
    if todo:
        changed = with_fields(gpt, **row["fields"])
        pack_for_cpu(changed)
        chunk_size = arguments["chunk_size"]
        chunk_size = pick_chunk_size(changed, 1, row["length"]) if chunk_size is None else chunk_size
    for key, start in todo.items():
        started = time.perf_counter()
        nll = window_nll(changed, cut.batch(tokens, [start], arguments["device"]), cut.first, chunk_size)
        last, sums = nll[0, -arguments["last"] :].double().sum().item(), cut.sums(nll)
        require_finite(sums, start, changed)
        seconds = time.perf_counter() - started
        results.add(key, {"length": row["length"], "sums": sums[0], "last": last, "seconds": seconds})
        step(f"{row['method']} at {row['length']}")
    return [results.parts[key] for key in keys]


def summarize(parts: list[dict[str, Any]], cut, last: int) -> dict[str, Any]:
    """Perplexities of all targets, of the last ones of every window, and by position."""
    from lit_swa.evaluate import perplexity

    last_tokens = min(last, cut.seq_len - cut.first) * len(parts)
    return {
        **cut.summary([part["sums"] for part in parts]),
        "last_ppl": perplexity(sum(part["last"] for part in parts) / last_tokens),
        "last_tokens": last_tokens,
        "seconds": sum(part["seconds"] for part in parts),
    }


# ----------------------------------------------------------------------------------------------------------- the answer


def report(result: dict[str, Any]) -> None:
    """The tables on stdout."""
    last = result["arguments"]["last"]
    print(table(result["rows"], f"perplexity of the last {last} tokens", "last_ppl"))
    print()
    print(table(result["rows"], "perplexity of all tokens", "ppl"))
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        if "error" in row:
            reasons.setdefault((row["method"], row["error"]), []).append(str(row["length"]))
    for (method, reason), lengths in reasons.items():
        print(f"\n{method} fails at {', '.join(lengths)}: {reason}")


def table(rows: list[dict[str, Any]], title: str, figure: str) -> str:
    """Markdown: a row for each method, a column for each length."""
    from lit_swa.utils import format_number

    lengths = list(dict.fromkeys(row["length"] for row in rows))
    cells = {(row["method"], row["length"]): format_number(row[figure]) if figure in row else "fails" for row in rows}
    lines = [f"| {title} | " + " | ".join(map(str, lengths)) + " |", "| --- |" + " ---: |" * len(lengths)]
    for method in dict.fromkeys(row["method"] for row in rows):
        lines.append(f"| {method} | " + " | ".join(cells[method, length] for length in lengths) + " |")
    return "\n".join(lines)


def draw(plt, result: dict[str, Any]):
    """Perplexity over position: a panel for each length at which the methods differ, on one logarithmic axis."""
    from lit_swa.plots import log_axis, model_of, names_of, set_title, short_count, token_axis

    a, rows = result["arguments"], [row for row in result["rows"] if "error" not in row]
    by_length = {n: [row for row in rows if row["length"] == n] for n in dict.fromkeys(row["length"] for row in rows)}
    shown = pick_lengths(by_length)
    ratios = {"width_ratios": [max(length, max(shown) / 5) ** 0.5 for length in shown] or [1]}
    size = (max(7.5, 2.9 * len(shown) + 2.8), 5)
    figure, axes = plt.subplots(
        1, len(shown) or 1, figsize=size, layout="constrained", sharey=True, squeeze=False, gridspec_kw=ratios
    )
    for axis, (length, curves) in zip(axes[0], shown.items(), strict=False):
        for row in curves:
            draw_curve(axis, row, term(row["method"], a))
        token_axis(axis, length)
        axis.set(title=f"windows of {short_count(length)} tokens", xlabel="position in the window, tokens")
        axis.grid(alpha=0.3)
        if a["trained_length"] < length:
            axis.axvline(a["trained_length"], color="grey", linestyle=":", linewidth=1)
            place = {"transform": axis.get_xaxis_transform(), "va": "top", "ha": "right"}
            axis.text(a["trained_length"], 0.99, "trained ", color="grey", **place)
    axes[0][0].set(ylabel=f"perplexity, mean of {a['bucket']} positions", ylim=limits(rows))
    log_axis(axes[0][0])
    model = f"{model_of(a)}, trained to {short_count(a['trained_length'])} tokens"
    number = f"{a['windows']} windows of each length" if a["windows"] > 1 else "one window of each length"
    set_title(figure, f"{model}, reads {names_of(a['data'])}", f"perplexity (lower is better), {number}")
    if notes := notes_of(result, by_length, shown):
        figure.supxlabel(notes, fontsize=9, color="dimgrey")
    label_curves(axes[0], shown, a)
    return figure


def pick_lengths(by_length: dict[int, list[dict[str, Any]]]) -> dict[int, list[dict[str, Any]]]:
    """The lengths that get a panel: up to four at which the methods differ, the longest ones; the last if none does."""
    ordered = dict(sorted(by_length.items()))
    differing = [n for n, rows in ordered.items() if spread_of(rows) > 0.02]
    return {n: ordered[n] for n in (differing or list(ordered))[-4 if differing else -1 :]}


def spread_of(rows: list[dict[str, Any]]) -> float:
    """By what share the curves of one length differ at most."""
    columns = zip(*(row["buckets"].values() for row in rows), strict=True)
    return max(max(column) / min(column) - 1 for column in columns)


def limits(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Of the axis: a curve of more than ten times the lowest perplexity leaves it, or the others would be one line."""
    lowest = min((ppl for row in rows for ppl in row["buckets"].values()), default=1.0)
    return 0.93 * lowest, 1.07 * min(highest(rows), 10 * lowest)


def highest(rows: list[dict[str, Any]]) -> float:
    return max((ppl for row in rows for ppl in row["buckets"].values()), default=1.0)


def notes_of(result: dict[str, Any], by_length: dict[int, list], shown: dict[int, list]) -> str:
    """What has no curve, and why."""
    from lit_swa.plots import short_count

    rows = [row for row in result["rows"] if "error" not in row]
    notes = ["\u2191: beyond the axis, with the last perplexity."] if limits(rows)[1] < highest(rows) else []
    left_out = sorted(n for n in by_length if n not in shown)
    if alike := [n for n in left_out if spread_of(by_length[n]) <= 0.02]:
        most = max(spread_of(by_length[n]) for n in alike)
        lengths = ", ".join(map(short_count, alike))
        notes.append(f"No panel for {lengths} tokens: there all methods agree within {max(most, 0.001):.1%}.")
    if others := [short_count(n) for n in left_out if n not in alike]:
        notes.append(f"No panel for {', '.join(others)} tokens either: their figures are in the JSON file.")
    failed = [f"{row['method']} at {short_count(row['length'])}" for row in result["rows"] if "error" in row]
    return " ".join(notes + ([f"Not readable: {', '.join(failed)}."] if failed else []))


def draw_curve(axis, row: dict[str, Any], label: str) -> None:
    """The curve of one method at one length, each point in the middle of its positions."""
    from lit_swa.plots import style_of

    middles = [sum(map(int, positions.split("-"))) / 2 for positions in row["buckets"]]
    style: dict[str, Any] = style_of(STYLES.get(row["method"], row["method"])).of_line()
    # What takes every key and scales RoPE begins as plain RoPE does, which is drawn wide, for it to be seen behind.
    style |= {"linewidth": 3.5 if row["method"] == "rope" else 1.5, "markersize": 5}
    axis.plot(middles, row["buckets"].values(), markevery=max(1, len(middles) // 8), label=label, **style)


def label_curves(axes, shown: dict[int, list[dict[str, Any]]], arguments: dict[str, Any]) -> None:
    """Each method's name at the end of its curve in the last panel that has one; the end of what leaves the axis."""
    from lit_swa.plots import label_ends, style_of

    last = {row["method"]: length for length, rows in shown.items() for row in rows}
    ends: dict[Any, list[tuple[float, float, str, str]]] = {axis: [] for axis in axes}
    for axis, (length, rows) in zip(axes, shown.items(), strict=False):
        top = axis.get_ylim()[1]
        for row in rows:
            colour, end = style_of(STYLES.get(row["method"], row["method"])).colour, list(row["buckets"].values())[-1]
            name = term(row["method"], arguments) if last[row["method"]] == length else ""
            text = f"{name} \u2191 {end:,.0f}".strip() if end > top else name
            if text:
                ends[axis].append((length, end, text, colour))
    label_ends(axes[0].figure, ends)


STYLES = {"rope": "full"}  # all keys, at the positions of training


def term(method: str, arguments: dict[str, Any]) -> str:
    """A method's name with what it keeps."""
    sinks, window = arguments["n_sink_tokens"], arguments["window"]
    own = {"sliding": f"sliding, {window} keys", "streaming": f"streaming, {sinks} + {window}"}
    return "full, plain RoPE" if method == "rope" else own.get(method, method)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
