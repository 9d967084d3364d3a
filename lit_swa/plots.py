"""Pictures of results. matplotlib is optional: without it no picture is drawn, and a line on stderr says so."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lit_swa.formats.files import atomic_file


def running_mean(values: Sequence[float], n: int) -> list[float]:
    """For each value, the mean of it and the n - 1 values before it, or of those that there are."""
    return [sum(values[max(0, i - n) : i]) / min(i, n) for i in range(1, len(values) + 1)]


def save_picture(path: Path, draw: Callable[[Any], Any]) -> bool:
    """Write the figure that `draw(matplotlib.pyplot)` returns to a PNG. Returns False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print(f"no picture {path}: it needs matplotlib (pip install matplotlib)", file=sys.stderr)
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = draw(plt)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=110)
    plt.close(figure)
    return True
