"""What the scripts share that ask several methods the same questions: asking, the table, the heat map.

A row is {"method", "length", "task", "score" in per cent or None, ...}: evaluate_ruler.py, evaluate_documents.py.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from lit_swa.batches import Batch, Request
from lit_swa.checkpoint import load_model
from lit_swa.command_line import shorten
from lit_swa.evaluate import Results, check_chat_template, with_fields
from lit_swa.formats.checkpoint import tokenizer_dir
from lit_swa.formats.tokenizer import Tokenizer
from lit_swa.linear_formats import pack_for_cpu
from lit_swa.methods import Method, Setup
from lit_swa.model import GPT
from lit_swa.plots import NONE, draw_shares, model_of, set_title
from lit_swa.utils import ProgressLine, describe_command, describe_machine, interruptible, memory_in_use


class Question(NamedTuple):
    request: Request
    judge: Callable[[str], dict[str, Any]]  # the answer -> what is kept of it


class Task(NamedTuple):
    """Questions of one kind. make raises ValueError for the first that a length has no room for."""

    name: str  # of its column
    keys: list[str]  # of its questions
    make: Callable[[int, Tokenizer], Iterator[Question]]  # (length, tokenizer) -> its questions, in the order of keys
    summary: Callable[[list[dict[str, Any]]], dict[str, Any]]  # all that is kept -> the "score", and more for the row


def ask_methods(
    results: Results, methods: Mapping[str, Method], setup: Setup, tasks: Mapping[str, Task], kept: str
) -> dict[str, Any]:
    """Ask every method at every length, the short ones first; write the results, with the answers under `kept`.

    Raises ValueError where no question can be asked, and KeyboardInterrupt after Ctrl-C, with the answers saved.
    """
    a = results.arguments
    results.save()  # a disk that is full or read-only shows now and not after hours
    tokenizer = Tokenizer(tokenizer_dir(a["checkpoint_dir"]))
    check_chat_template(tokenizer, a["use_chat_template"])
    gpt = load_model(a["checkpoint_dir"], a["dtype"], a["device"], **a["model"] or {})
    number = len(methods) * len(a["lengths"]) * sum(len(task.keys) for task in tasks.values())
    line = ProgressLine(number, "questions", done=len(results.parts))
    rows, errors = [], {}
    with interruptible() as interrupted:
        for length in a["lengths"]:
            questions, failed = make_all(length, tokenizer, tasks)
            for name, method in methods.items():
                fields = method(length, setup)
                try:
                    answer_all(results, f"{name} {length}", gpt, fields, questions, tokenizer, line, interrupted)
                except ValueError as error:
                    errors[f"{name} at {length}"] = shorten(str(error))
                rows += [row_of(results.parts, name, length, key, task, fields) for key, task in tasks.items()]
            errors |= failed
    if not results.parts:
        raise ValueError(f"No question can be asked. {' '.join(errors.values())}")
    result = {
        "command": describe_command(), "machine": describe_machine(a["device"]),
        "peak_memory": memory_in_use(), "rows": rows, "errors": errors, kept: results.parts,
    }  # fmt: skip
    results.finish(result)
    return {"arguments": a} | result


def make_all(
    length: int, tokenizer: Tokenizer, tasks: Mapping[str, Task]
) -> tuple[dict[str, Question], dict[str, str]]:
    """("task key" -> question, task and length -> why not all of it is asked)"""
    questions, failed = {}, {}
    for name, task in tasks.items():
        try:
            for key, question in zip(task.keys, task.make(length, tokenizer), strict=True):
                questions[f"{name} {key}"] = question
        except ValueError as error:
            failed[f"{name} at {length}"] = str(error)
    return questions, failed


def answer_all(
    results: Results,
    prefix: str,
    gpt: GPT,
    fields: dict[str, Any],
    questions: Mapping[str, Question],
    tokenizer: Tokenizer,
    line: ProgressLine,
    interrupted: Callable[[], bool],
) -> None:
    """Ask what results.parts has no answer to yet, greedily, and keep each under "prefix key".

    fields: of the config, which the model reads with. questions: by their keys.
    Raises ValueError where the model cannot read a request, and KeyboardInterrupt when interrupted() says so.
    """
    keys = [key for key in questions if f"{prefix} {key}" not in results.parts]
    if not keys:
        return
    changed = with_fields(gpt, **fields)
    pack_for_cpu(changed)
    batch = Batch(changed, [questions[key].request for key in keys], batch_size=results.arguments["batch_size"],
                  tokenizer=tokenizer, stop_tokens=tokenizer.eos_ids)  # fmt: skip
    for i, answer in batch.run(interrupted):
        results.add(f"{prefix} {keys[i]}", questions[keys[i]].judge(answer.text))
        line.show(len(results.parts), prefix, tokens=0)
    if interrupted():
        results.save()
        print("what is answered is kept: the same command goes on", file=sys.stderr)
        raise KeyboardInterrupt


def row_of(
    parts: Mapping[str, Any], method: str, length: int, key: str, task: Task, fields: dict[str, Any]
) -> dict[str, Any]:
    """The score of a task in per cent; None where it was not asked whole."""
    found = [parts.get(f"{method} {length} {key} {question}") for question in task.keys]
    row = {"method": method, "length": length, "task": task.name, "score": None, "fields": fields}
    return row if None in found else row | task.summary(found)


def report(result: dict[str, Any], digits: int = 0) -> None:
    """The table on stdout, and why a method or a task is not in all of it."""
    print("\n".join(table(result["rows"], digits)))
    for what, why in result["errors"].items():
        print(f"\n{what}: {why}")


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
        draw_shares(axis, grid, lengths, tasks)
        axis.set(title=f"method {method}", xlabel="tokens")
        axis.title.set_size(10)
    set_title(figure, f"{model_of(a)}: {title[0]}", *title[1:])
    return figure
