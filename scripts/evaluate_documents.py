"""Questions on long documents, for several ways to read them: python scripts/evaluate_documents.py --data '{F: f1}'."""

import functools
import sys
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from lit_swa.methods import Method, Setup, choose_methods


def main(
    data: dict[str, str],
    checkpoint_dir: Path | None = None,
    methods: list[str] | None = None,
    custom: dict[str, dict[str, Any]] | None = None,
    lengths: list[int] | None = None,
    shots: int = 0,
    shot_files: dict[str, Path] | None = None,
    limit: int | None = None,
    drop: Literal["start", "middle", "end"] = "middle",
    max_new_tokens: int | None = None,
    trained_length: int | None = None,
    window: int | None = None,
    n_sink_tokens: int = 4,
    dual_chunk_size: int | None = None,
    dual_chunk_local: int | None = None,
    use_chat_template: bool = False,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    output: Path = Path("out/evaluate_documents.json"),
    model: dict[str, Any] | None = None,
) -> None:
    """Ask the questions of published files of long documents with several methods and lengths, and print the scores.

    A JSON gets every answer, and a heat map is drawn beside it. Files are .jsonl of SCROLLS (NarrativeQA, QMSum,
    Qasper, QuALITY), ZeroSCROLLS or L-Eval; lit_swa/documents.py shows their lines. Nothing is fetched. The model
    answers greedily. A method that cannot read a length says why. An interrupted run goes on where it stopped when it
    is started again with the same arguments.

    Args:
        data: Files and how their answers are measured, such as '{qasper.jsonl: f1, quality.jsonl: em}': f1 and em
            (exact match), as SCROLLS and SQuAD have them; rouge (the geometric mean of ROUGE-1, -2 and -L); and
            L-Eval's letter (one right choice), letters (one or more), number (sums), verdicts (true or
            false, in a story and in fact) and code (what a program prints).
        checkpoint_dir: A checkpoint's directory or name. By default SmolLM2-135M-Instruct, which is downloaded once.
        methods: Some of rope, linear, ntk, dynamic, yarn, sliding, streaming and dual_chunk. By default rope and
            dual_chunk.
        custom: More methods, as names and fields of the config, such as '{"base 1e6": {"rope_base": 1e6}}'.
        lengths: Tokens of a prompt and the room for its answer; documents are cut to them. By default one and two times
            the trained length.
        shots: How many answered questions on other documents stand between the document and the question.
        shot_files: Files of data and the files that their examples are taken from. By default the same file.
        limit: Ask only the first so many questions of each file.
        drop: Which part of a document is left out where it is too long.
        max_new_tokens: Room for an answer. By default 64 for f1 and em, 128 for rouge, 16 for letter, 32 for letters
            and verdicts, 256 for number and code.
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
        output: The JSON file for the results; the picture goes next to it, as .png.
        model: Any field of the model's config, as --model.FIELD VALUE (--model.help lists them), for all methods.
    """
    import hashlib

    from lit_swa import answers, evaluate
    from lit_swa.checkpoint import check_checkpoint_dir, load_config
    from lit_swa.checks import check_at_least
    from lit_swa.documents import read_files
    from lit_swa.formats.download import find_checkpoint
    from lit_swa.plots import check_output, draw_results

    device, dtype = evaluate.pick_place(device, dtype)
    check_at_least(shots=(shots, 0), limit=(limit, 1), batch_size=(batch_size, 1), max_new_tokens=(max_new_tokens, 1))
    questions = read_files(data, shots, shot_files, limit)
    if len(names := set(map(task_name, data))) < len(data):
        raise ValueError(f"Some files of data have one name ({', '.join(sorted(names))} are all): rename one.")
    checkpoint_dir = find_checkpoint(checkpoint_dir)
    check_checkpoint_dir(checkpoint_dir)
    config = load_config(checkpoint_dir).override(**model or {})
    trained = config.block_size if trained_length is None else trained_length
    lengths = sorted(set([trained, 2 * trained] if lengths is None else lengths))
    window = max(1, trained // 2) if window is None else window
    check_at_least(trained_length=(trained, 1), window=(window, 1), lengths=(min(lengths, default=0), 1))
    check_output(output)
    setup = Setup(trained, window, n_sink_tokens, dual_chunk_size, dual_chunk_local)
    chosen = choose_methods(["rope", "dual_chunk"] if methods is None else methods, custom or {})
    files = [Path(name) for name in (*data, *(shot_files or {}).values())]
    arguments = {
        "checkpoint_dir": checkpoint_dir, "data": data, "methods": list(chosen), "custom": custom, "lengths": lengths,
        "shots": shots, "shot_files": shot_files, "limit": limit, "drop": drop, "max_new_tokens": max_new_tokens,
        "use_chat_template": use_chat_template, "batch_size": batch_size, "device": device, "dtype": dtype,
        "model": model, **setup._asdict(),
        "files": {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "weights": evaluate.weights_identity(checkpoint_dir),
    }  # fmt: skip
    with evaluate.Results(output, arguments) as results:
        finished = results.finished
        if finished is None:
            finished = run(results, chosen, setup, questions)
        else:
            print(f"{output} holds the results of these arguments already", file=sys.stderr)
        answers.report(finished, digits=1)
        draw_results(output, lambda plt: draw(plt, finished))


def run(results, methods: dict[str, Method], setup: Setup, questions: dict[str, list]) -> dict[str, Any]:
    from lit_swa.answers import ask_methods

    tasks = {file: task_of(file, pairs, results.arguments) for file, pairs in questions.items()}
    return ask_methods(results, methods, setup, tasks, "answers")


def task_of(file: str, pairs: list, a: dict[str, Any]):
    """The questions of a file. pairs: each with its examples."""
    from lit_swa.answers import Question, Task
    from lit_swa.batches import Request
    from lit_swa.documents import METRICS, NEXT, cut_answer, file_score, judge, make_prompt

    metric = a["data"][file]
    room = a["max_new_tokens"] or METRICS[metric].room

    def make(length: int, tokenizer):
        for question, shown in pairs:
            prompt = make_prompt(question, shown, tokenizer, length - room, a["drop"], a["use_chat_template"])
            request = Request(prompt.ids, room, stop=(f"\n{NEXT}",))
            yield Question(request, functools.partial(keep, question, prompt))

    def keep(question, prompt, text: str) -> dict[str, Any]:
        said = cut_answer(text)
        kept = {"scores": judge(metric, said, question.answers), "answer": said, "right": question.answers}
        return kept | {"query": question.query, "prompt_tokens": len(prompt.ids), "cut_tokens": prompt.cut}

    def summary(parts: list[dict[str, Any]]) -> dict[str, Any]:
        cut = sum(part["cut_tokens"] > 0 for part in parts)
        return {"score": file_score([part["scores"] for part in parts]), "questions": len(parts), "cut": cut}

    return Task(task_name(file), [question.key for question, _ in pairs], make, summary)


def task_name(file: str) -> str:
    """Of a column: qasper for qasper.jsonl, and for qasper/test.jsonl."""
    path = Path(file)
    usual = path.stem in ("test", "validation", "dev", "train")
    return path.parent.name if usual and path.parent.name else path.stem


def draw(plt, result: dict[str, Any]):
    """A heat map: files over lengths, the methods side by side."""
    from lit_swa.answers import heat_map

    shots = result["arguments"]["shots"]
    return heat_map(plt, result, f"questions on long documents, {shots} shown before", "score in % (higher is better)")


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
