"""Pictures of results. matplotlib is optional: without it there are the numbers, and a hint."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_swa.files import atomic_file


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
