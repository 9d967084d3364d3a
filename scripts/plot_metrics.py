"""Draw the losses of training runs: python scripts/plot_metrics.py --runs '[out/lora, out/full]'."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed


def main(
    runs: list[Path], x: str = "step", smooth: int = 10, output: Path = Path("out/metrics.png"), log: bool = False
) -> None:
    """Draw the smoothed training loss and the validation loss of one run or several; of pretraining in bits per byte.

    Args:
        runs: Directories with a metrics.csv. The name of a directory labels its curve.
        x: The horizontal axis: step, tokens or seconds.
        smooth: The training loss is drawn as the mean over so many steps.
        output: The picture. A JSON file next to it holds its figures and how the runs were started.
        log: Draw the loss on a logarithmic axis.
    """
    from lit_swa.checks import check_range
    from lit_swa.formats.files import write_json
    from lit_swa.plots import require_matplotlib, save_picture
    from lit_swa.utils import describe_command

    require_matplotlib()
    if x not in ("step", "tokens", "seconds"):
        raise ValueError(f"x={x!r} does not fit: choose from step, tokens, seconds.")
    check_range("smooth", smooth, 1)
    if not runs:
        raise ValueError("runs is empty: give the directory of a run.")
    if output.suffix == ".json":
        raise ValueError(f"output={output} is where the figures would go: give a name that ends in .png.")
    result = {"command": describe_command(), "axes": {"x": x, "smooth": smooth, "log": log}}
    result["runs"] = read_runs(runs)
    save_picture(output, lambda plt: draw(plt, result))
    write_json(output.with_suffix(".json"), result)
    print(output)


def read_runs(runs: list[Path]) -> dict[str, dict[str, Any]]:
    """Metrics of each run and how it was started, by the name of its directory, or its path if two have one name.

    Raises FileNotFoundError or ValueError for a run without losses.
    """
    import math

    from lit_swa.training.log import read_metrics
    from lit_swa.training.saving import read_record

    names = [run.resolve().name for run in runs]
    read = {}
    for run, name in zip(runs, names, strict=True):
        metrics = {k: [y if math.isfinite(y) else None for y in values] for k, values in read_metrics(run).items()}
        if all(y is None for y in (*metrics["loss"], *metrics["val_loss"])):
            raise ValueError(f"{run / 'metrics.csv'} holds no loss yet: let the run make a step.")
        read[name if names.count(name) == 1 else str(run)] = {**read_record(run), "metrics": metrics}
    return read


def draw(plt, result: dict[str, Any]):
    """Training loss on the left; on the right validation loss, or bits per byte where all runs tell them."""
    from lit_swa.plots import log_axis, set_title

    options = {"x": "step", "smooth": 10, "log": False} | result.get("axes", {})
    columns = [run["metrics"] for run in result["runs"].values()]
    in_bits = all(any(y is not None for y in c.get("bits_per_byte", [])) for c in columns)
    right = "bits_per_byte" if in_bits else "val_loss"
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", sharey=not in_bits)
    for name, (style, label) in styles_of(result["runs"]).items():
        columns = result["runs"][name]["metrics"]
        for axis, key in zip(axes, ("loss", right), strict=True):
            if points := points_of(columns, key, options):
                marks = {"markevery": max(1, len(points) // 6), "markersize": 5} if key == "loss" else {}
                axis.plot(*zip(*points, strict=True), label=label, **style, **marks)
    units = {"step": "optimiser step", "tokens": "tokens read", "seconds": "seconds"}
    titles = (
        f"training loss, mean of {options['smooth']} steps",
        "validation, bits per byte" if in_bits else "validation loss",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xlabel=units[options["x"]], title=title)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss, nats per token")
    axes[1].tick_params(labelleft=True)
    if options["log"]:
        log_axis(axes[0])
    handles = axes[0].get_legend_handles_labels()
    columns = max(1, min(3, 150 // max((len(label) + 8 for label in handles[1]), default=150)))
    figure.legend(*handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    set_title(figure, title_of(result["runs"]))
    return figure


def points_of(columns: dict[str, list], key: str, options: dict[str, Any]) -> list[tuple[float, float]]:
    """The places where this loss was measured and its values, those of training as a running mean."""
    import itertools

    from lit_swa.plots import running_mean

    places = [place or 0 for place in columns[options["x"]]]
    places = list(itertools.accumulate(places)) if options["x"] == "seconds" else places
    points = [(place, y) for place, y in zip(places, columns[key], strict=True) if y is not None]
    if key != "loss":
        return points
    means = running_mean([y for _, y in points], options["smooth"])
    return [(place, mean) for (place, _), mean in zip(points, means, strict=True)]


def styles_of(runs: dict[str, dict[str, Any]]) -> dict[str, tuple[dict[str, Any], str]]:
    """Line and label of each run. The colour is that of the method; several runs of one method differ in their lines,
    and more than four in their colours too."""
    from lit_swa.plots import DASHES, style_of

    styles, seen = {}, {}
    for name, run in runs.items():
        method = method_of(run, name)
        n = seen[method] = seen.get(method, -1) + 1
        style = style_of(method if n < len(DASHES) else name).of_line()
        if n:
            style |= {"linestyle": DASHES[n % len(DASHES)], "marker": "os^D"[n % 4]}
        rates = [rate for rate in run["metrics"]["learning_rate"] if rate]
        terms = {"full": "all weights", "lora": "LoRA", "adapter": "LLaMA-Adapter", "adapter_v2": "LLaMA-Adapter v2"}
        words = [terms.get(method, method)] * (method != name) + ([f"highest rate {max(rates):.3g}"] if rates else [])
        styles[name] = style, f"{name}: {', '.join(words)}"
    return styles


def method_of(run: dict[str, Any], name: str) -> str:
    """What was trained, as the command says: lora, adapter, adapter_v2 or full; else the run's name."""
    command = run.get("command") or ""
    method = next((word.removesuffix(".py") for word in ("lora.py", "adapter.py", "full.py") if word in command), name)
    return "adapter_v2" if method == "adapter" and argument(run, "version") == "2" else method


def argument(run: dict[str, Any], name: str) -> str:
    """An argument of a run, from its record or, in results that have none, from its command."""
    from lit_swa.plots import argument_of

    return str((run.get("arguments") or {}).get(name) or argument_of(run.get("command") or "", name))


def title_of(runs: dict[str, dict[str, Any]]) -> str:
    """The model and the data of the runs."""
    from lit_swa.formats.download import DEFAULT_REPO
    from lit_swa.plots import names_of

    known = [run for run in runs.values() if argument(run, "data")]
    models = dict.fromkeys(Path(argument(run, "checkpoint_dir") or DEFAULT_REPO).name for run in known)
    data = dict.fromkeys(names_of(argument(run, "data")) for run in known)
    trained = f"{', '.join(models)} finetuned"
    if all("pretrain/" in (run.get("command") or "") and not argument(run, "checkpoint_dir") for run in known):
        trained = "Trained from random weights"
    what = f"{trained} on {', '.join(data)}: " if known else ""
    return f"{what}one run each" if len(runs) > 1 else f"{what}one run"


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
