"""Draw pictures again from results: python scripts/redraw.py --results out/compare_context.json."""

import importlib.util
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

SCRIPTS = (  # those with a function draw(matplotlib.pyplot, content of the JSON file)
    "adapt_window", "benchmark_attention", "benchmark_generate", "benchmark_scaling", "compare_context",
    "compare_linear", "compare_longlora", "compare_pretraining", "evaluate_documents", "evaluate_passkey",
    "evaluate_quantized", "evaluate_ruler", "evaluate_streaming", "extend_context", "plot_masks", "plot_metrics",
)  # fmt: skip


def main(results: list[Path] | Path) -> None:
    """Draw the picture of each JSON file of results next to it, as .png. Nothing is measured.

    Args:
        results: A file, or several as '[a.json,b.json]', that one of these scripts wrote: adapt_window.py,
            benchmark_attention.py, benchmark_generate.py, benchmark_scaling.py, compare_context.py, compare_linear.py,
            compare_longlora.py, compare_pretraining.py, evaluate_documents.py, evaluate_passkey.py,
            evaluate_quantized.py, evaluate_ruler.py, evaluate_streaming.py, extend_context.py, plot_masks.py,
            plot_metrics.py.
    """
    from lit_swa.formats.json_files import MAX_RESULT_BYTES, UNFIT, parse_json
    from lit_swa.formats.reading import read_bytes
    from lit_swa.plots import require_matplotlib, save_picture

    require_matplotlib()
    for path in results if isinstance(results, list) else [results]:
        content = parse_json(read_bytes(path, MAX_RESULT_BYTES), path)
        name = script_of(content, path)
        picture, draw = path.with_suffix(".png"), draw_of(name)
        try:
            save_picture(picture, lambda plt, draw=draw, content=content: draw(plt, content))
        except (*UNFIT, ValueError) as error:
            raise ValueError(f"{path} is no whole result of scripts/{name}.py: run its command again.") from error
        print(picture)


def script_of(content: Any, path: Path) -> str:
    """The name of the script that wrote these results. Raises ValueError where none that draws did."""
    command = content.get("command") if isinstance(content, dict) else None
    try:
        words = shlex.split(command) if isinstance(command, str) else []
    except ValueError:  # a quote is not closed
        words = []
    name = next((Path(word).stem for word in words if word.endswith(".py")), "no script")
    if name not in SCRIPTS:
        raise ValueError(
            f"{path} holds no results that have a picture: its command names {name}, and not one of "
            f"{', '.join(SCRIPTS)}."
        )
    return name


def draw_of(name: str) -> Callable[[Any, Any], Any]:
    """The function `draw` of one of the scripts."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).resolve().parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.draw


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
