"""Draw the losses of training runs: python scripts/plot_metrics.py --runs '[out/lora, out/full]'."""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed


def main(
    runs: list[Path], x: str = "step", smooth: int = 10, output: Path = Path("out/metrics.png"), log: bool = False
) -> None:
    """Draw the smoothed training loss and the validation loss of one run or several.

    Args:
        runs: Directories with a metrics.csv. The name of a directory labels its curve.
        x: The horizontal axis: step, tokens or seconds.
        smooth: The training loss is drawn as the mean over so many steps.
        output: The picture. A JSON file next to it holds its figures and how the runs were started.
        log: Draw the loss on a logarithmic axis.
    """
    from lit_swa.checks import check_range
    from lit_swa.formats.files import write_json
    from lit_swa.plots import save_picture
    from lit_swa.training.log import read_metrics
    from lit_swa.training.saving import read_record

    if x not in ("step", "tokens", "seconds"):
        raise ValueError(f"x={x!r} does not fit: choose from step, tokens, seconds.")
    check_range("smooth", smooth, 1)
    read = {run.name: read_metrics(run) for run in runs}
    output.parent.mkdir(parents=True, exist_ok=True)
    save_picture(output, lambda plt: draw(plt, read, x, smooth, log))
    result = {"command": "python " + shlex.join(sys.argv), "runs": {}}
    for run in runs:
        metrics = {key: [None if y != y else y for y in values] for key, values in read[run.name].items()}
        result["runs"][run.name] = {**read_record(run), "metrics": metrics}
    write_json(output.with_suffix(".json"), result)
    print(output)


def draw(plt, runs: dict[str, dict[str, list[float]]], x: str, smooth: int, log: bool):
    """Training loss on the left, validation loss on the right."""
    import itertools

    from lit_swa.plots import running_mean

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, columns in runs.items():
        places = list(itertools.accumulate(columns[x])) if x == "seconds" else columns[x]
        for axis, key in zip(axes, ("loss", "val_loss"), strict=True):
            points = [(p, y) for p, y in zip(places, columns[key], strict=True) if y == y]  # NaN: not measured there
            if key == "loss":
                means = running_mean([y for _, y in points], smooth)
                points = [(p, y) for (p, _), y in zip(points, means, strict=True)]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o" if key == "val_loss" else None, label=name)
    for axis, title in zip(axes, (f"training loss, mean of {smooth} steps", "validation loss"), strict=True):
        axis.set(xlabel=x, title=title, yscale="log" if log else "linear")
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
