"""Pictures of results: one style a method, readable axes, and what is done where matplotlib, an optional package, is
missing."""

import io
import shlex
import sys
import textwrap
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_swa.formats.files import atomic_file

MISSING = "no picture can be drawn without matplotlib: pip install matplotlib"


class Style(NamedTuple):
    """How a method is drawn in every picture."""

    colour: str
    marker: str = "o"
    line: str = "-"

    def of_line(self) -> dict[str, str]:
        """Arguments of matplotlib's plot."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.line}


# Colours of Okabe and Ito and of Tol, which colour-blind readers tell apart; markers and dashes help.
STYLES = {
    # which keys a query sees
    "full": Style("#000000", "o"),
    "sliding": Style("#0072B2", "P"),
    "streaming": Style("#E69F00", "X"),
    "dual_chunk": Style("#009E73", "D"),
    "s2": Style("#CC79A7", "s"),
    "short": Style("#8C510A", "v", "--"),  # groups as in s2 that are not shifted
    # how RoPE is scaled
    "linear": Style("#707070", "s"),
    "ntk": Style("#56B4E9", "^", "--"),
    "dynamic": Style("#882255", "v", ":"),
    "yarn": Style("#B23A00", "*"),
    "llama3": Style("#999933", "p", "--"),
    # what is trained; all weights are drawn as full
    "lora": Style("#332288", "o"),
    "adapter": Style("#44AA99", "^"),
    "adapter_v2": Style("#117733", "D"),
    # what decodes
    "ours": Style("#1F77B4", "o"),
    "compiled": Style("#D55E00", "D"),
    "transformers": Style("#8A8A8A", "s"),
    "transformers static": Style("#404040", "^"),
    "llama.cpp": Style("#2E8B57", "P"),
    "gpt-fast": Style("#AA3377", "X"),
}
OTHERS = ("#AA4499", "#A6761D", "#66A61E", "#6A3D9A", "#B15928", "#1F9E89")  # of names that are not in the table
DASHES = ("-", "--", ":", "-.")


def style_of(name: str) -> Style:
    """The style of this method; that of an unknown name follows from the name, not from its place among others."""
    if name in STYLES:
        return STYLES[name]
    number = zlib.crc32(name.encode())
    return Style(OTHERS[number % len(OTHERS)], "osv^D"[number // 7 % 5], DASHES[number // 41 % 4])


def shades(colour: str, n: int) -> list[tuple[float, float, float]]:
    """n shades of a colour, each lighter than the one before it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    lightness = [0.55 * i / max(1, n - 1) for i in range(n)]
    return [(c[0], c[1], c[2]) for c in ([x + (1 - x) * light for x in channels] for light in lightness)]


# ------------------------------------------------------------------------------------------------------------- numbers


def running_mean(values: Sequence[float], n: int) -> list[float]:
    """For each value, the mean of it and the n - 1 values before it, or of those that there are."""
    return [sum(values[max(0, i - n) : i]) / min(i, n) for i in range(1, len(values) + 1)]


def short_count(n: float) -> str:
    """A number of tokens: 8192 is 8k."""
    return f"{n / 1024:g}k" if n and n % 512 == 0 and n >= 1024 else f"{n:g}"


def names_of(paths: Any) -> str:
    """The names of one text or of several, for a title. paths: a path, a list, or one as a command line gives it."""
    paths = paths if isinstance(paths, list) else str(paths).strip("[]").split(",")
    names = [Path(str(path).strip()).name for path in paths]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more texts"


def model_of(arguments: dict[str, Any]) -> str:
    """The name of the checkpoint that was measured, and the fields that were given with --model, for a title."""
    fields = ", ".join(f"{name} {value}" for name, value in (arguments.get("model") or {}).items())
    return Path(arguments["checkpoint_dir"]).name + (f" with {fields}" if fields else "")


def argument_of(command: str, name: str) -> str:
    """What a command line gives for --name; nothing if it does not."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quote is not closed: somebody wrote it by hand
        return ""
    values = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    values += [value for word, value in zip(words, words[1:], strict=False) if word == f"--{name}"]
    return values[-1] if values else ""


def spread(places: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """The places moved apart until each two differ by `gap`, in the same order, from `low` to `high` as far as it
    fits."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [min(max(place, low), high) for place in places]
    for before, after in zip(order, order[1:], strict=False):
        moved[after] = max(moved[after], moved[before] + gap)
    ceiling = high
    for i in reversed(order):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - gap
    return moved


# ---------------------------------------------------------------------------------------------------------------- axes


def token_axis(axis: Any, stop: int) -> None:
    """A horizontal axis of positions from 0 to `stop` with up to seven ticks, at multiples of a power of two."""
    step = 1
    while step * 6 < stop:
        step *= 2
    ticks = range(0, stop + 1, step)
    axis.set(xlim=(0, stop), xticks=ticks, xticklabels=[short_count(tick) for tick in ticks])


def log_axis(axis: Any) -> None:
    """A logarithmic vertical axis with plain numbers. To be called when all curves are drawn."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    steps = (1, 2, 3, 5) if high < 100 * low else (1, 2, 5) if high < 1e4 * low else (1,)
    axis.yaxis.set_major_locator(MaxNLocator(6) if high < 4 * low else LogLocator(subs=steps))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def set_title(figure: Any, *lines: str) -> None:
    """The title of a whole figure; a line that is too long for its width is broken."""
    width = int(12 * figure.get_size_inches()[0])
    figure.suptitle("\n".join(textwrap.fill(line, width, break_on_hyphens=False) for line in lines), fontsize=11)


def label_ends(figure: Any, ends: dict[Any, list[tuple[float, float, str, str]]], size: float = 9) -> None:
    """Write each (x, y, text, colour) of an axis beside its right edge, at the height of y or where there is room.

    To be called when the limits of all axes are final.
    """
    figure.draw_without_rendering()  # makes the layout, which decides how much room a line of text needs
    heights = {axis: axis.get_window_extent().height / figure.dpi * 72 for axis in ends}
    for axis, labels in ends.items():
        to_axes, (low, high) = axis.transAxes.inverted(), axis.get_ylim()
        places = [to_axes.transform(axis.transData.transform((x, y)))[1] for x, y, _, _ in labels]
        for (x, y, text, colour), place in zip(labels, spread(places, 1.25 * size / heights[axis]), strict=True):
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0}
            axis.annotate(text, (x, min(max(y, low), high)), (1.03, place), textcoords="axes fraction", color=colour,
                          fontsize=size, va="center", arrowprops=line, annotation_clip=False)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- files


def has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def require_matplotlib() -> None:
    """For a script that only draws, before it does anything. Raises ValueError."""
    if not has_matplotlib():
        raise ValueError(f"{MISSING[0].upper()}{MISSING[1:]}.")


def check_output(output: Path) -> None:
    """For a script that measures, before it does: refuses a name of results that their picture would take, and says so
    when there will be no picture. Raises ValueError."""
    if output.suffix == ".png":
        raise ValueError(f"output={output} is where the picture would go: give a name that ends in .json.")
    if not has_matplotlib():
        print(f"{MISSING} (now, or later for: python scripts/redraw.py --results {output})", file=sys.stderr)


NONE = "\u2013"  # where nothing was measured


def draw_shares(axis: Any, grid: list[list[float]], lengths: list[int], names: Sequence[str]) -> None:
    """Shares in per cent, NaN where nothing was measured: a row for each name, a column for each length in tokens."""
    axis.imshow(grid, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for i, row in enumerate(grid):
        for j, share in enumerate(row):
            known = share == share
            colour = "white" if known and share <= 50 else "black"
            axis.text(j, i, f"{share:.0f}" if known else NONE, ha="center", va="center", color=colour)
    axis.set_xticks(range(len(lengths)), map(short_count, lengths))
    axis.set_yticks(range(len(grid)), names)


def draw_results(output: Path, draw: Callable[[Any], Any]) -> None:
    """The picture of results, next to their file; says on stderr where both are."""
    picture = output.with_suffix(".png")
    drawn = save_picture(picture, draw)
    print(f"results: {output}" + (f", picture: {picture}" if drawn else ""), file=sys.stderr)


def save_picture(path: Path, draw: Callable[[Any], Any]) -> bool:
    """Write the figure that `draw(matplotlib.pyplot)` returns to a PNG. Returns False where matplotlib is missing."""
    if not has_matplotlib():
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image  # matplotlib depends on it

    figure, pixels = draw(plt), io.BytesIO()
    figure.savefig(pixels, format="png", dpi=110)
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as stream:  # with a palette, a third of the bytes and no visible difference
        Image.open(pixels).convert("RGB").quantize(256).save(stream, format="png", optimize=True)
    return True
