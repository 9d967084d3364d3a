"""Pictures of results. matplotlib is optional: without it there are the numbers, and a hint."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lit_swa.formats.files import atomic_file


def running_mean(values: Sequence[float], n: int) -> list[float]:
    """The mean of each value and of the n - 1 before it, as far as there are any."""
    return [sum(values[max(0, i - n) : i]) / min(i, n) for i in range(1, len(values) + 1)]


def save_picture(path: Path, draw: Callable[[Any], Any]) -> bool:
    """Write the figure that `draw(matplotlib.pyplot)` makes, whole or not at all; False where matplotlib is missing."""
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
