"""Complete prompts: python generate/base.py --prompt "Once upon a time"."""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from lit_swa.arguments import Generation
from lit_swa.checks import check_range


def main(
    prompts: Path | None = None, output: Path | None = None, batch_size: int | None = None, **generation: Any
) -> None:
    """Print each prompt and its completion on stdout, or write those of a file to another; statistics go to stderr.

    Args:
        prompts: A file of prompts in place of --prompt, a JSON object a line: "prompt" (a text) or "messages" (a chat),
            and if need be "max_new_tokens", "stop" and "seed", by default --seed plus the number of prompts before it.
        output: Where the answers to --prompts go, a JSON object a line in the order of the prompts, with their fields.
            The same command goes on with a file that holds the first answers.
        batch_size: How many of several prompts are answered at once. By default as many as the memory holds, at most 16
            on a CPU and 256 on a GPU.
    """
    args = Generation(**generation)
    if (prompts is None) != (output is None):
        raise ValueError("--prompts FILE.jsonl and --output FILE.jsonl go together: give both or none.")
    if batch_size is not None and prompts is None and len(args.prompts) == 1:
        raise ValueError(
            "--batch_size is for several prompts: give them as several --prompt, or in a file of --prompts."
        )
    if prompts is not None:
        answer_file(args, prompts, output, batch_size)
    elif len(args.prompts) > 1:
        complete_together(args, batch_size)
    else:
        complete(args)


def complete(args: Generation) -> None:
    """Print completions of one prompt as they come."""
    from lit_swa import completion
    from lit_swa.fast_decode import compile_decode
    from lit_swa.generate import Session, Stats, generate_text
    from lit_swa.utils import show_reading

    run = completion.prepare(args)
    gpt = run.load_model()
    ahead = int(run.device.startswith("cuda"))  # a token may be fed there before it is known to be wanted
    session = Session(gpt, lookahead=ahead, decode=compile_decode(gpt) if args.compile else None)
    completion.make_ready(session, run)
    for prompt, sampling in run.samples():
        session.reset()  # each completion reads its prompt, so that its statistics are those of a whole run
        stats = Stats(trace=run.trace)
        pieces = generate_text(
            gpt, run.tokenizer, prompt.ids, sampling=sampling, session=session, progress=show_reading, stats=stats,
            **run.limits,
        )  # fmt: skip
        text = completion.show(prompt.text, pieces)
        print(stats.line(gpt, text), file=sys.stderr)


def complete_together(args: Generation, batch_size: int | None) -> None:
    """Print completions of several prompts, in their order, each when it and those before it have ended."""
    from lit_swa import completion
    from lit_swa.batches import Request, in_order

    check_range("num_samples", args.num_samples, 1, 10**5)
    run = completion.prepare(args)
    samples = [(prompt, sampling) for prompt in run.prompts for sampling in run.samplings()]
    requests = [Request(p.ids, args.max_new_tokens, sampling.seed, args.stop or ()) for p, sampling in samples]
    batch = completion.open_batch(run, run.load_model(), requests, batch_size)
    started = time.perf_counter()
    for index, answer in in_order(batch.run()):
        print(samples[index][0].text, answer.text, sep="", flush=True)
    print(batch.line(time.perf_counter() - started), file=sys.stderr)


def answer_file(args: Generation, prompts: Path, output: Path, batch_size: int | None) -> None:
    """Write an answer to each line of a file, and go on where an earlier run of the same command ended."""
    from lit_swa import completion
    from lit_swa.batches import in_order
    from lit_swa.prompt_files import AnswerFile, check_prompts, make_record, read_prompts, to_requests
    from lit_swa.utils import ProgressLine, interruptible

    if args.prompts != Generation().prompts or args.num_samples != 1:
        raise ValueError("--prompts answers each line of its file once: leave --prompt and --num_samples out.")
    lines = read_prompts(prompts)
    run = completion.prepare(args, from_file=True)
    requests = to_requests(lines, run.tokenizer, args)
    answers = AnswerFile(output, lines, make_record(prompts, lines, run))
    done = answers.done
    if done == len(lines):
        print(f"{output} holds all {done} answers already.", file=sys.stderr)
        return
    gpt = run.load_model()
    check_prompts(gpt, lines, requests)
    batch = completion.open_batch(run, gpt, requests[done:], batch_size)
    answers.open()
    progress, started = ProgressLine(len(lines), "answers", done=done), time.perf_counter()

    def show(tokens: int) -> None:
        progress.show(done + batch.answered, f"{batch.active} rows", tokens=tokens)

    with interruptible() as interrupted:
        for index, answer in in_order(batch.run(interrupted, show)):
            answers.add(requests[done + index], answer)
    answers.close()
    progress.clear()
    print(batch.line(time.perf_counter() - started), file=sys.stderr)
    if answers.done < len(lines):
        print(f"{answers.done} of {len(lines)} prompts are answered: the same command goes on.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
