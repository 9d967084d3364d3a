"""RULER's tasks, for several ways to read long texts: python scripts/evaluate_ruler.py --data book.txt."""

import functools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from lit_swa.methods import Method, Setup, choose_methods


def main(
    data: list[Path] | Path,
    checkpoint_dir: Path | None = None,
    methods: list[str] | None = None,
    custom: dict[str, dict[str, Any]] | None = None,
    lengths: list[int] | None = None,
    tasks: list[str] | None = None,
    samples: int = 10,
    qa: Path | None = None,
    trained_length: int | None = None,
    window: int | None = None,
    n_sink_tokens: int = 4,
    dual_chunk_size: int | None = None,
    dual_chunk_local: int | None = None,
    use_chat_template: bool = False,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 1234,
    output: Path = Path("out/evaluate_ruler.json"),
    model: dict[str, Any] | None = None,
) -> None:
    """Ask RULER's questions with several methods and lengths; print tables, write a JSON and a heat map.

    Every method is asked the same questions, which are made of the texts given; nothing is fetched. A method that
    cannot read a length says why, and so does a task that a length has no room for. An interrupted run goes on where
    it stopped when it is started again with the same arguments.

    Args:
        data: A .txt file (UTF-8), a list or a directory of such files: books to hide needles in and take words from.
        checkpoint_dir: A checkpoint's directory or name. By default SmolLM2-135M-Instruct, which is downloaded once.
        methods: Some of rope, linear, ntk, dynamic, yarn, sliding, streaming and dual_chunk. By default rope, yarn,
            sliding, streaming and dual_chunk.
        custom: More methods, as names and fields of the config, such as '{"base 1e6": {"rope_base": 1e6}}'.
        lengths: Tokens of a prompt and the room for its answer. By default a half, one and two times the trained
            length.
        tasks: Some of niah_single_1 to _3, niah_multikey_1 to _3, niah_multivalue, niah_multiquery, vt, cwe, fwe and
            qa. By default all, qa only with --qa.
        samples: Questions of each task at each length.
        qa: A JSONL file of questions with their documents: {"question": ..., "answer": ..., "context": ...}.
        trained_length: The length that the model was trained for. By default the block_size of the checkpoint.
        window: The sliding_window_size of sliding and streaming. By default half of the trained length.
        n_sink_tokens: How many first tokens streaming keeps.
        dual_chunk_size: Tokens in a chunk of dual_chunk. By default what the model derives from the trained length.
        dual_chunk_local: The distance up to which dual_chunk keeps distances exact. By default what the model
            derives from the trained length.
        use_chat_template: Ask within the model's chat template, which instruct models expect.
        batch_size: Questions that are answered at once. By default as many as the memory holds and as are of use.
        device: auto, cpu, cuda or mps.
        dtype: float32, bfloat16 or float16; auto is bfloat16 on a GPU and float32 on a CPU.
        seed: The same seed gives the same questions.
        output: The JSON file for the results; the picture goes next to it, as .png.
        model: Any field of the model's config, as --model.FIELD VALUE (--model.help lists them), for all methods.
    """
    import hashlib

    from lit_swa import answers, evaluate
    from lit_swa.checkpoint import check_checkpoint_dir, load_config
    from lit_swa.checks import check_at_least
    from lit_swa.formats.download import find_checkpoint
    from lit_swa.plots import check_output, draw_results

    device, dtype = evaluate.pick_place(device, dtype)
    books, tasks = find_books(data), choose_tasks(tasks, qa)
    check_at_least(samples=(samples, 1), batch_size=(batch_size, 1))
    checkpoint_dir = find_checkpoint(checkpoint_dir)
    check_checkpoint_dir(checkpoint_dir)
    config = load_config(checkpoint_dir).override(**model or {})
    trained = config.block_size if trained_length is None else trained_length
    lengths = sorted(set([trained // 2, trained, 2 * trained] if lengths is None else lengths))
    window = max(1, trained // 2) if window is None else window
    check_at_least(trained_length=(trained, 1), window=(window, 1), lengths=(min(lengths, default=0), 1))
    check_output(output)
    setup = Setup(trained, window, n_sink_tokens, dual_chunk_size, dual_chunk_local)
    chosen = choose_methods(list(USUAL) if methods is None else methods, custom or {})
    arguments = {
        "checkpoint_dir": checkpoint_dir, "data": data, "methods": list(chosen), "custom": custom, "lengths": lengths,
        "tasks": tasks, "samples": samples, "use_chat_template": use_chat_template, "batch_size": batch_size,
        "device": device, "dtype": dtype, "seed": seed, "model": model, **setup._asdict(),
        "files": {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in [*books, *([qa] if qa else [])]},
        "weights": evaluate.weights_identity(checkpoint_dir),
    }  # fmt: skip
    with evaluate.Results(output, arguments) as results:
        finished = results.finished
        if finished is None:
            finished = run(results, chosen, setup, books, qa)
        else:
            print(f"{output} holds the results of these arguments already", file=sys.stderr)
        answers.report(finished)
        draw_results(output, lambda plt: draw(plt, finished))


USUAL = ("rope", "yarn", "sliding", "streaming", "dual_chunk")


def find_books(data: list[Path] | Path) -> list[Path]:
    from lit_swa.evaluate import find_data

    books = find_data(data)
    if books[0].suffix == ".bin":
        raise ValueError(f"{books[0]} holds token ids, and needles are hidden in texts: give .txt files.")
    return books


def choose_tasks(names: list[str] | None, qa: Path | None) -> list[str]:
    from lit_swa.ruler import TASKS

    names = [name for name in TASKS if name != "qa" or qa] if names is None else list(dict.fromkeys(names))
    if unknown := [name for name in names if name not in TASKS]:
        raise ValueError(f"There is no task {unknown[0]!r}: choose from {', '.join(TASKS)}.")
    if ("qa" in names) != (qa is not None):
        raise ValueError("The task qa and a file of its questions go together: give both --tasks '[qa]' and --qa FILE.")
    if not names:
        raise ValueError("tasks is empty: give at least one.")
    return names


def run(results, methods: dict[str, Method], setup: Setup, books: list[Path], qa: Path | None) -> dict[str, Any]:
    from lit_swa.answers import ask_methods
    from lit_swa.ruler import read_material

    a, material = results.arguments, read_material(books, qa)
    return ask_methods(results, methods, setup, {name: task_of(name, material, a) for name in a["tasks"]}, "samples")


def task_of(name: str, material, a: dict[str, Any]):
    from lit_swa.answers import Question, Task
    from lit_swa.batches import Request
    from lit_swa.ruler import TASKS, make_sample

    task, n = TASKS[name], a["samples"]

    def make(length: int, tokenizer):
        for number in range(n):
            sample = make_sample(name, length, number, tokenizer, material, a["seed"], a["use_chat_template"])
            yield Question(Request(sample.ids, task.room), functools.partial(judge, sample))

    def judge(sample, text: str) -> dict[str, Any]:
        part = {"score": task.score(text, sample.answers), "text": text, "answers": sample.answers}
        return part | {"prompt_tokens": len(sample.ids)}

    return Task(name, [str(number) for number in range(n)], make,
                lambda parts: {"score": 100 * sum(part["score"] for part in parts) / n})  # fmt: skip


def draw(plt, result: dict[str, Any]):
    """A heat map: tasks over lengths, the methods side by side."""
    from lit_swa.answers import heat_map
    from lit_swa.plots import names_of

    a = result["arguments"]
    number = f"questions of each task and length: {a['samples']}"
    return heat_map(plt, result, f"RULER in {names_of(a['data'])}", f"score in % (higher is better), {number}")


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
