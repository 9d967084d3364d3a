"""Perplexity over position, for several ways to read beyond the trained length: python scripts/compare_context.py."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#7F7F7F")  # Okabe and Ito
MARKERS = "osv^DPX*"


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
        checkpoint_dir: A checkpoint directory. By default SmolLM2-135M-Instruct, which is downloaded once.
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
        seed: Seeds torch's random numbers, which only a model that was changed to use some would draw.
        output: The JSON file for the results; the picture goes next to it, as .png.
        model: Any field of the model's config, as --model.FIELD VALUE, for all methods.
    """
    import torch

    from lit_swa import evaluate
    from lit_swa.checkpoint import check_checkpoint_dir, check_dtype, load_config
    from lit_swa.formats.download import download_checkpoint
    from lit_swa.utils import pick_device, pick_dtype

    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    check_dtype(dtype, device)
    checkpoint_dir = checkpoint_dir or download_checkpoint()
    check_checkpoint_dir(checkpoint_dir, tokenizer=False)
    config = load_config(checkpoint_dir).override(**model or {})
    trained = config.block_size if trained_length is None else trained_length
    lengths = [trained // 2, trained, 2 * trained, 4 * trained] if lengths is None else lengths
    window = max(1, trained // 2) if window is None else window
    evaluate.check_at_least(
        trained_length=(trained, 1), window=(window, 1), last=(last, 1), chunk_size=(chunk_size or 0, 0)
    )
    setup = Setup(trained, window, n_sink_tokens, dual_chunk_size, dual_chunk_local)
    chosen = choose_methods(methods, custom or {})
    tokens = evaluate.read_tokens(data, checkpoint_dir, config.vocab_size, max_tokens)
    cuts = {n: evaluate.spread_windows(len(tokens), n, windows, bucket, data) for n in dict.fromkeys(lengths)}
    if not cuts:
        raise ValueError("lengths is empty: give at least one.")
    arguments = {
        "checkpoint_dir": checkpoint_dir, "data": data, "methods": list(chosen), "custom": custom,
        "lengths": list(cuts), "windows": windows, "last": last, "bucket": bucket, "max_tokens": max_tokens,
        "chunk_size": chunk_size, "device": device, "dtype": dtype, "seed": seed, "model": model, **setup._asdict(),
        "data_sha256": evaluate.check_tokens(tokens, config.vocab_size, data),
        "weights": evaluate.weights_identity(checkpoint_dir),
    }  # fmt: skip
    torch.manual_seed(seed)
    results = evaluate.Results(output, arguments)
    finished = results.finished
    if finished is None:
        finished = run(results, arguments, chosen, setup, tokens, cuts)
    else:
        print(f"{output} holds the results of these arguments already", file=sys.stderr)
    report(finished, output.with_suffix(".png"))


# ---------------------------------------------------------------------------------------------------------- the methods


class Setup(NamedTuple):
    """What the methods make their fields from, besides the length."""

    trained_length: int
    window: int
    n_sink_tokens: int
    dual_chunk_size: int | None
    dual_chunk_local: int | None


Method = Callable[[int, Setup], dict[str, Any]]  # length of a window -> the fields of the config to read it with


def rope(length: int, s: Setup) -> dict[str, Any]:
    """Plain RoPE, also at positions beyond those of training."""
    return {"block_size": max(length, s.trained_length)}


def scaled(kind: str, with_trained_length: bool = False) -> Method:
    """RoPE scaled by the factor length / trained length, or 1 within the trained length."""

    def fields(length: int, s: Setup) -> dict[str, Any]:
        scaling: dict[str, Any] = {"type": kind, "factor": max(1.0, length / s.trained_length)}
        if with_trained_length:
            scaling["original_max_position_embeddings"] = s.trained_length
        return rope(length, s) | {"rope_scaling": scaling}

    return fields


def sliding(length: int, s: Setup) -> dict[str, Any]:
    return {"attention": "sliding", "sliding_window_size": s.window, "rolling_kv_cache": True}


def streaming(length: int, s: Setup) -> dict[str, Any]:
    return {"attention": "streaming", "sliding_window_size": s.window, "n_sink_tokens": s.n_sink_tokens}


def dual_chunk(length: int, s: Setup) -> dict[str, Any]:
    own = {"dual_chunk_size": s.dual_chunk_size, "dual_chunk_local": s.dual_chunk_local}
    own = {name: value for name, value in own.items() if value is not None}
    return rope(length, s) | {"attention": "dual_chunk", "dual_chunk_pretraining_length": s.trained_length} | own


METHODS: dict[str, Method] = {
    "rope": rope,
    "linear": scaled("linear"),
    "ntk": scaled("ntk"),
    "dynamic": scaled("dynamic", with_trained_length=True),
    "yarn": scaled("yarn", with_trained_length=True),
    "sliding": sliding,
    "streaming": streaming,
    "dual_chunk": dual_chunk,
}


def choose_methods(names: list[str] | None, custom: dict[str, dict[str, Any]]) -> dict[str, Method]:
    """The methods of these names, and the custom ones, in the order of the tables. Raises ValueError."""
    names = [name for name in METHODS if name != "dynamic"] if names is None else names
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(
            f"There is no method {unknown[0]!r}: choose from {', '.join(METHODS)}, or define it by --custom."
        )
    if taken := [name for name in custom if name in METHODS]:
        raise ValueError(f"custom: {taken[0]!r} is the name of a method already: choose another.")
    own = {name: lambda length, s, fields=fields: rope(length, s) | fields for name, fields in custom.items()}
    if not names and not own:
        raise ValueError("methods is empty: give at least one.")
    return {name: METHODS[name] for name in names} | own


# ---------------------------------------------------------------------------------------------------------- the reading


def run(results, arguments: dict[str, Any], methods: dict[str, Method], setup: Setup, tokens, cuts) -> dict[str, Any]:
    """Every method at every length, the short ones first; writes the results."""
    import shlex

    from lit_swa.checkpoint import load_model
    from lit_swa.utils import ProgressLine, describe_machine, interruptible, memory_in_use

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
                    rows.append(row | {"error": " ".join(str(error).split())})
                    progress.total -= length * len(cut.starts)
    result = {
        "command": "python " + shlex.join(sys.argv),
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
    if todo:
        changed = with_fields(gpt, **row["fields"])
        pack_for_cpu(changed)
        chunk_size = arguments["chunk_size"]
        chunk_size = pick_chunk_size(changed, 1, row["length"]) if chunk_size is None else chunk_size
    for key, start in todo.items():
        started = time.perf_counter()
        nll = window_nll(changed, cut.batch(tokens, [start], arguments["device"]), cut.first, chunk_size)
        last, sums = nll[0, -arguments["last"] :].double().sum().item(), cut.sums(nll)
        require_finite(sums, start)
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


def report(result: dict[str, Any], picture: Path) -> None:
    """The tables on stdout, and the picture."""
    from lit_swa.plots import save_picture

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
    save_picture(picture, lambda plt: draw(plt, result))


def table(rows: list[dict[str, Any]], title: str, figure: str) -> str:
    """Markdown: a row for each method, a column for each length."""
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    cells = {(row["method"], row["length"]): f"{row[figure]:.2f}" if figure in row else "fails" for row in rows}
    lines = [f"| {title} | " + " | ".join(map(str, lengths)) + " |", "| --- |" + " ---: |" * len(lengths)]
    for method in dict.fromkeys(row["method"] for row in rows):
        lines.append(f"| {method} | " + " | ".join(cells[method, length] for length in lengths) + " |")
    return "\n".join(lines)


def draw(plt, result: dict[str, Any]):
    """A panel for each length: perplexity over the position in the window."""
    lengths = list(dict.fromkeys(row["length"] for row in result["rows"]))
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    columns = min(2, len(lengths))
    n_rows = -(-len(lengths) // columns)
    figure, axes = plt.subplots(
        n_rows, columns, figsize=(6.5 * columns + 1.5, 4.2 * n_rows), layout="constrained", squeeze=False
    )
    trained = result["arguments"]["trained_length"]
    for axis, length in zip(axes.flat, lengths, strict=False):
        for row in result["rows"]:
            if row["length"] == length and "error" not in row:
                draw_curve(axis, row, methods.index(row["method"]))
        if trained < length:
            axis.axvline(trained, color="grey", linestyle=":", linewidth=1)
            axis.text(trained, 0.99, " trained", transform=axis.get_xaxis_transform(), va="top", color="grey")
        axis.set(title=f"{length} tokens", xlabel="position", ylabel="perplexity", yscale="log", xlim=(0, length))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "2357" else "")
        axis.grid(which="both", alpha=0.25)
    for axis in axes.flat[len(lengths) :]:
        axis.remove()
    handles = {label: h for axis in axes.flat for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        ordered = [name for name in methods if name in handles]
        figure.legend([handles[name] for name in ordered], ordered, loc="outside right upper")
    return figure


def draw_curve(axis, row: dict[str, Any], n: int) -> None:
    """The curve of one method at one length, each point in the middle of its positions.

    A later curve is thinner, so that an earlier one shows behind it where both are the same.
    """
    middles = [sum(map(int, positions.split("-"))) / 2 for positions in row["buckets"]]
    style = {"color": COLOURS[n % len(COLOURS)], "marker": MARKERS[n % len(MARKERS)], "markersize": 4}
    style |= {"linestyle": ("-", "--", ":")[n // len(COLOURS) % 3], "linewidth": max(1.0, 3.4 - 0.3 * n)}
    axis.plot(middles, row["buckets"].values(), label=row["method"], **style)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
