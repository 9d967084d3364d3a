"""What the scripts share that ask several methods the same questions: asking, the table, the heat map.

A row is {"method", "length", "task", "score" in per cent or None, ...}: evaluate_ruler.py, evaluate_documents.py.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from lit_swa.batches import Batch, Request
from lit_swa.evaluate import Results, with_fields
from lit_swa.formats.tokenizer import Tokenizer
from lit_swa.linear_formats import pack_for_cpu
from lit_swa.model import GPT
from lit_swa.plots import model_of, set_title, short_count
from lit_swa.utils import ProgressLine

NONE = "\u2013"  # where a question was not asked


def answer_all(
    results: Results,
    prefix: str,
    gpt: GPT,
    fields: dict[str, Any],
    requests: Mapping[str, Request],
    judge: Callable[[str, str], dict[str, Any]],
    tokenizer: Tokenizer,
    line: ProgressLine,
    interrupted: Callable[[], bool],
) -> None:
    """Ask what results.parts has no answer to yet, greedily, and keep each under "prefix key".

    fields: of the config, which the model reads with. requests: by their keys. judge: (key, answer) -> what is kept.
    Raises ValueError where the model cannot read a request, and KeyboardInterrupt when interrupted() says so.
    """
    keys = [key for key in requests if f"{prefix} {key}" not in results.parts]
    if not keys:
        return
    changed = with_fields(gpt, **fields)
    pack_for_cpu(changed)
    batch = Batch(changed, [requests[key] for key in keys], batch_size=results.arguments["batch_size"],
                  tokenizer=tokenizer, stop_tokens=tokenizer.eos_ids)  # fmt: skip
    for i, answer in batch.run(interrupted):
        results.add(f"{prefix} {keys[i]}", judge(keys[i], answer.text))
        line.show(len(results.parts), prefix, tokens=0)
    if interrupted():
        results.save()
        print("what is answered is kept: the same command goes on", file=sys.stderr)
        raise KeyboardInterrupt


def table(rows: list[dict[str, Any]], digits: int = 0) -> list[str]:
    """Markdown: a row for each method and length, a column for each task, and their mean."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    lines = ["| method | tokens | " + " | ".join(tasks) + " | mean |", "| --- | ---: |" + " ---: |" * (len(tasks) + 1)]
    for (method, length), scores in by_method(rows).items():
        cells = [NONE if score is None else f"{score:.{digits}f}" for score in scores.values()]
        lines.append(f"| {method} | {length} | " + " | ".join(cells) + f" | {mean(scores)} |")
    return lines


def by_method(rows: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, float | None]]:
    """(method, length) -> task -> score, the methods one after the other."""
    order = list(dict.fromkeys(row["method"] for row in rows))
    found: dict[tuple[str, int], dict[str, float | None]] = {}
    for row in sorted(rows, key=lambda row: (order.index(row["method"]), row["length"])):
        found.setdefault((row["method"], row["length"]), {})[row["task"]] = row["score"]
    return found


def mean(scores: Mapping[str, float | None]) -> str:
    """Of the tasks that were asked."""
    known = [score for score in scores.values() if score is not None]
    return f"{sum(known) / len(known):.1f}" if known else NONE


def heat_map(plt: Any, result: dict[str, Any], *title: str) -> Any:
    """Tasks over lengths, the methods side by side. title: what follows the model's name, and a second line."""
    a, cells = result["arguments"], by_method(result["rows"])
    tasks, methods, lengths = (list(dict.fromkeys(row[name] for row in result["rows"]))
                               for name in ("task", "method", "length"))  # fmt: skip
    size = (2.6 + len(methods) * (0.5 + 0.6 * len(lengths)), 2.2 + 0.34 * len(tasks))
    figure, axes = plt.subplots(1, len(methods), figsize=(max(6.5, size[0]), size[1]), layout="constrained",
                                sharey=True, squeeze=False)  # fmt: skip
    for axis, method in zip(axes[0], methods, strict=True):
        columns = [cells[method, length] for length in lengths]
        grid = [[float("nan") if column[task] is None else column[task] for column in columns] for task in tasks]
        axis.imshow(grid, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        write_cells(axis, grid)
        axis.set_xticks(range(len(lengths)), map(short_count, lengths))
        axis.set_yticks(range(len(tasks)), tasks)
        axis.set(title=f"method {method}", xlabel="tokens")
        axis.title.set_size(10)
    set_title(figure, f"{model_of(a)}: {title[0]}", *title[1:])
    return figure


def write_cells(axis: Any, grid: list[list[float]]) -> None:
    for i, row in enumerate(grid):
        for j, score in enumerate(row):
            asked = score == score
            colour = "white" if asked and score <= 50 else "black"
            axis.text(j, i, f"{score:.0f}" if asked else NONE, ha="center", va="center", color=colour)
