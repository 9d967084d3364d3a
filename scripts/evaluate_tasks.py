"""lm-eval's tasks, and those of a file: python scripts/evaluate_tasks.py --tasks '[arc_easy, wikitext]' --limit 100."""

import sys
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed


def main(
    checkpoint_dir: Path | None = None,
    tasks: list[str] | None = None,
    task_file: list[Path] | Path | None = None,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    use_chat_template: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    quantize: Literal["int8", "int4", "int4-hqq", "nf4", "nf4-dq", "fp4", "fp4-dq"] | None = None,
    seed: int = 1234,
    output: Path = Path("out/evaluate_tasks.json"),
    model: dict[str, Any] | None = None,
) -> None:
    """Print what the model scores in tasks of EleutherAI's lm-eval (pip install lm-eval), and write it to a JSON file.

    lm-eval makes the questions and judges the answers; it fetches the data of its tasks once. A task of a file needs no
    network. A finished task is kept: the same command goes on with those that are left.

    Args:
        checkpoint_dir: A checkpoint's directory or name. By default SmolLM2-135M-Instruct, which is downloaded once.
        tasks: Names of tasks or groups of lm-eval, such as '[arc_easy, wikitext]'.
        task_file: A JSONL file of questions, or a list of such files. Each line is
            {"question": ..., "choices": [...], "answer": ...}, or {"question": ..., "answer": ...} to be written out.
        include_path: A directory with more tasks, as YAML files of lm-eval.
        num_fewshot: Questions with their answers before each question. By default what each task says.
        limit: Ask only the first so many questions of each task.
        batch_size: Texts that are read at once, at most. By default as many as are of use.
        max_length: Use only so many tokens of the context. By default all; a model whose layers all have a window and
            a rolling cache reads texts of any length.
        use_chat_template: Ask within the model's chat template, which instruct models expect.
        device: auto, cpu, cuda or mps.
        dtype: float32, bfloat16 or float16; auto is bfloat16 on a GPU and float32 on a CPU.
        quantize: Hold weights in 8 or 4 bits, chosen while they are read; nf4 and fp4 need bitsandbytes.
        seed: Seeds the choice of the questions that are shown, and drawn text.
        output: The JSON file for the results.
        model: Any field of the model's config, as --model.FIELD VALUE (--model.help lists them), such as
            --model.attention sliding --model.sliding_window_size 1024.
    """

    import torch

    from lit_swa import evaluate
    from lit_swa.checkpoint import check_checkpoint_dir
    from lit_swa.checks import check_at_least
    from lit_swa.formats.download import find_checkpoint
    from lit_swa.utils import describe_command, describe_machine, memory_in_use

    device, dtype = evaluate.pick_place(device, dtype)
    check_at_least(
        num_fewshot=(num_fewshot, 0), limit=(limit, 1), batch_size=(batch_size, 1), max_length=(max_length, 2)
    )
    chosen = choose_tasks(tasks, task_file, num_fewshot or 0)
    manager = open_tasks(include_path, chosen)
    checkpoint_dir = find_checkpoint(checkpoint_dir)
    check_checkpoint_dir(checkpoint_dir)
    arguments = {
        "checkpoint_dir": checkpoint_dir, "tasks": list(chosen), "files": hashes(task_file, include_path),
        "num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size, "max_length": max_length,
        "use_chat_template": use_chat_template, "device": device, "dtype": dtype, "quantize": quantize, "seed": seed,
        "model": model or {}, "weights": evaluate.weights_identity(checkpoint_dir),
    }  # fmt: skip
    torch.manual_seed(seed)
    with evaluate.Results(output, arguments) as results:
        content = results.finished
        if content is None:
            run(results, chosen, manager)
            content = {
                "command": describe_command(),
                "machine": describe_machine(device),
                "peak_memory": memory_in_use(),
                "tasks": {name: results.parts[name] for name in chosen},
            }
            results.finish(content)
        else:
            print(f"{output} holds the results of these arguments already", file=sys.stderr)
        print("\n".join(table_of(content["tasks"])))
    print(f"results: {output}", file=sys.stderr)


def as_list(paths: list[Path] | Path | None) -> list[Path]:
    return paths if isinstance(paths, list) else [] if paths is None else [paths]


def hashes(task_file: list[Path] | Path | None, include_path: Path | None) -> dict[str, str]:
    """What the files hold that describe tasks, so that a changed one is asked anew."""
    import hashlib

    described = sorted(include_path.rglob("*.yaml")) if include_path else []
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in [*as_list(task_file), *described]}


def choose_tasks(tasks: list[str] | None, task_file: list[Path] | Path | None, num_fewshot: int) -> dict[str, Any]:
    """Name -> what lm-eval is given for it. Raises ValueError where there is none, or two have one name."""
    from lit_swa.tasks import local_task

    chosen: dict[str, Any] = {}
    for name, task in [*((name, name) for name in tasks or ()),
                       *((path.stem, local_task(path, num_fewshot)) for path in as_list(task_file))]:  # fmt: skip
        if name in chosen:
            raise ValueError(f"Two tasks have the name {name!r}: leave one out, or rename its file.")
        chosen[name] = task
    if not chosen:
        raise ValueError("There is no task: give --tasks '[arc_easy]' or --task_file FILE.jsonl.")
    return chosen


def open_tasks(include_path: Path | None, chosen: dict[str, Any]):
    """lm-eval's table of tasks. Raises ValueError where lm-eval is missing, or has no such task."""
    import difflib

    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError("The tasks are those of lm-eval: pip install lm-eval.") from None
    if include_path is not None and not include_path.is_dir():
        raise FileNotFoundError(f"include_path={include_path} is no directory: give one with YAML files of tasks.")
    named = any(task == name for name, task in chosen.items())  # else its own tasks, thousands, need not be listed
    manager = TaskManager(include_path=include_path and str(include_path), include_defaults=named)
    for name, task in chosen.items():
        if task == name and name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise ValueError(
                f"lm-eval has no task {name!r}: " + (f"choose from {', '.join(near)}." if near else
                "its tasks are listed by: lm-eval ls tasks.")
            )  # fmt: skip
        if task != name and name in manager.all_tasks:
            raise ValueError(f"{name!r} is a task of lm-eval already: rename the file {name}.jsonl.")
    return manager


def run(results, chosen: dict[str, Any], manager) -> None:
    """The tasks that results.parts does not hold yet, one after the other."""
    import logging

    import lm_eval

    from lit_swa.checkpoint import load_model
    from lit_swa.evaluate import check_chat_template
    from lit_swa.formats.checkpoint import tokenizer_dir
    from lit_swa.formats.tokenizer import Tokenizer
    from lit_swa.linear_formats import pack_for_cpu
    from lit_swa.tasks import Reader, as_lm

    a = results.arguments
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about options of its own command
    results.save()  # a disk that is full or read-only shows now and not after hours
    tokenizer = Tokenizer(tokenizer_dir(a["checkpoint_dir"]))
    check_chat_template(tokenizer, a["use_chat_template"])
    gpt = load_model(a["checkpoint_dir"], a["dtype"], a["device"], quantize=a["quantize"], **a["model"])
    pack_for_cpu(gpt)
    lm = as_lm(Reader(gpt, tokenizer, a["batch_size"], a["max_length"]))
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), a["seed"])
    for name, task in chosen.items():
        if name in results.parts:
            continue
        print(f"task {name}", file=sys.stderr)
        found = lm_eval.simple_evaluate(
            lm, tasks=[task], num_fewshot=a["num_fewshot"], limit=a["limit"], task_manager=manager, log_samples=False,
            apply_chat_template=a["use_chat_template"], **seeds,
        )  # fmt: skip
        names = ("results", "groups", "n-shot", "versions", "n-samples", "higher_is_better")
        results.add(name, {key: found[key] for key in names if key in found} | {"lm_eval": lm_eval.__version__}, 0)


def table_of(tasks: dict[str, Any]) -> list[str]:
    """Markdown: a row for each measure of each task and of each of its parts."""
    lines = [
        "| task | questions | shots | measure | value | standard error |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    for part in tasks.values():
        for name, figures in part["results"].items():
            asked, shots = part.get("n-samples", {}).get(name, {}).get("effective", ""), part["n-shot"].get(name, "")
            for key, value in figures.items():
                measure, _, kind = key.partition(",")
                if isinstance(value, (int, float)) and kind and not measure.endswith("_stderr"):
                    error = figures.get(f"{measure}_stderr,{kind}")
                    error = f"{error:.4f}" if isinstance(error, float) else ""
                    measure += "" if kind == "none" else f" ({kind})"
                    lines.append(f"| {name} | {asked} | {shots} | {measure} | {value:.4f} | {error} |")
    return lines


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
