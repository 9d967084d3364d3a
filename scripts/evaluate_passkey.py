"""Hide a number in a long text and ask for it: python scripts/evaluate_passkey.py --lengths '[1024,2048,4096]'."""

import hashlib
import sys
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed


def main(
    checkpoint_dir: Path | None = None,
    task: Literal["passkey", "needle"] = "passkey",
    lengths: list[int] | None = None,
    depths: int | None = None,
    trials: int = 10,
    haystack: Path | None = None,
    max_new_tokens: int = 16,
    use_chat_template: bool = False,
    seed: int = 1234,
    device: str = "auto",
    dtype: str = "auto",
    output: Path = Path("out/passkey.json"),
    model: dict[str, Any] | None = None,
) -> None:
    """Print how often the model finds a number that is hidden in texts of several lengths, and draw a picture of it.

    The model answers greedily. An interrupted run goes on where it stopped when it is started again with the same
    arguments, and a finished one prints its table again.

    Args:
        checkpoint_dir: A checkpoint's directory or name. By default SmolLM2-135M-Instruct, which is downloaded once.
        task: passkey hides each number at a random depth of the text; needle asks at each of --depths depths.
        lengths: Tokens of the prompt and of the room for its answer together. By default 1024, 2048 and 4096.
        depths: With the task needle, how many depths from the text's beginning to its end. By default 16.
        trials: How many numbers to ask for at each length (and depth).
        haystack: A text file to hide the number in, such as a book. By default a few short sentences, repeated.
        max_new_tokens: Room for the answer, in tokens; the model stops as soon as its number has ended.
        use_chat_template: Ask within the model's chat template, which instruct models expect.
        seed: The same seed gives the same numbers at the same places.
        device: auto, cpu, cuda or mps.
        dtype: float32, bfloat16 or float16; auto is bfloat16 on a GPU and float32 on a CPU.
        output: The JSON file for the results; the picture goes next to it, as .png.
        model: Any field of the model's config, as --model.FIELD VALUE (--model.help lists them), such as
            --model.block_size 16384 to read texts longer than those of training.
    """
    from lit_swa.checkpoint import check_checkpoint_dir
    from lit_swa.evaluate import Results, pick_place, weights_identity
    from lit_swa.formats.download import find_checkpoint
    from lit_swa.passkey import accuracy_rows, plan_trials, spread_depths
    from lit_swa.plots import check_output, draw_results
    from lit_swa.texts import read_text
    from lit_swa.utils import describe_command, describe_machine

    device, dtype = pick_place(device, dtype)
    lengths = sorted(set([1024, 2048, 4096] if lengths is None else lengths))
    depths = check_arguments(task, lengths, depths, trials, max_new_tokens)
    check_output(output)
    checkpoint_dir = find_checkpoint(checkpoint_dir)
    check_checkpoint_dir(checkpoint_dir)
    text = "" if haystack is None else read_text(haystack)
    hidden_in = haystack and {"file": str(haystack), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    arguments = {
        "checkpoint_dir": str(checkpoint_dir), "task": task, "lengths": lengths, "depths": depths, "trials": trials,
        "haystack": hidden_in, "max_new_tokens": max_new_tokens, "use_chat_template": use_chat_template, "seed": seed,
        "device": device, "dtype": dtype, "model": model or {}, "weights": weights_identity(checkpoint_dir),
    }  # fmt: skip
    with Results(output, arguments) as results:
        content = results.finished
        if content is not None:
            print(f"{output} is complete: this is what it says", file=sys.stderr)
        else:
            plan = plan_trials(lengths, [None] if task == "passkey" else spread_depths(depths), trials)
            ask_all(plan, results, text)
            parts = [results.parts[trial.key] for trial in plan]
            content = {"command": describe_command(), "machine": describe_machine(device)}
            content |= {"accuracy": accuracy_rows(parts), "trials": parts}
            results.finish(content)
        print("\n".join(table_of(content["accuracy"])))
        draw_results(output, lambda plt: draw(plt, {"arguments": results.arguments} | content))


def check_arguments(task: str, lengths: list[int], depths: int | None, trials: int, max_new_tokens: int) -> int | None:
    """The number of depths, with its default. Raises ValueError for what does not fit, before a model is loaded."""
    from lit_swa.checks import check_at_least

    if not lengths:
        raise ValueError("There is no length to try: give some with --lengths '[1024,2048]'.")
    if task == "passkey" and depths is not None:
        raise ValueError(f"depths={depths} has no effect with the task passkey: add --task needle.")
    depths = 16 if depths is None and task == "needle" else depths
    check_at_least(
        lengths=(min(lengths), 1), depths=(depths, 1), trials=(trials, 1), max_new_tokens=(max_new_tokens, 1)
    )
    if (count := len(lengths) * (depths or 1) * trials) > 10**6:
        raise ValueError(f"That makes {count:,} questions, and 1,000,000 are the most: lower --trials or --depths.")
    return depths


def ask_all(plan: list, results, text: str) -> None:
    """Ask the questions that results.parts has no answer to yet. Ctrl-C keeps the answers and ends the program."""
    from lit_swa.checkpoint import load_model
    from lit_swa.formats.checkpoint import tokenizer_dir
    from lit_swa.generate import Session
    from lit_swa.linear_formats import pack_for_cpu
    from lit_swa.passkey import split_words
    from lit_swa.tokenizer import Tokenizer
    from lit_swa.utils import ProgressLine, interruptible

    a, words = results.arguments, split_words(text)
    tokenizer = Tokenizer(tokenizer_dir(a["checkpoint_dir"]))
    check_prompts(plan, tokenizer, a, words)
    gpt = load_model(a["checkpoint_dir"], dtype=a["dtype"], device=a["device"], **a["model"])
    check_context(gpt, plan[-1].length)
    pack_for_cpu(gpt)
    session = Session(gpt)
    session.reserve(plan[-1].length)  # for the longest text, so that a lack of memory shows now and not after an hour
    done = sum(trial.length for trial in plan if trial.key in results.parts)
    right = sum(part["right"] for part in results.parts.values())
    line = ProgressLine(sum(trial.length for trial in plan), "tokens", done=done)
    try:
        with interruptible() as interrupted:
            for trial in plan:
                if trial.key in results.parts:
                    continue
                part = try_one(session, tokenizer, trial, a, words, interrupted)
                if interrupted():
                    raise KeyboardInterrupt
                results.add(trial.key, part)
                done, right = done + trial.length, right + part["right"]
                line.show(done, f"right {right} of {len(results.parts)}")
    except KeyboardInterrupt:
        print(f"{len(results.parts)} of {len(plan)} trials are kept: the same command goes on", file=sys.stderr)
        raise
    finally:
        results.save()


def check_prompts(plan: list, tokenizer, a: dict[str, Any], words: list[str]) -> None:
    """Raises ValueError, before a model is loaded, when a length or the haystack is too short."""
    from lit_swa.evaluate import check_chat_template
    from lit_swa.passkey import build_prompt

    check_chat_template(tokenizer, a["use_chat_template"])
    for trial in (plan[0], plan[-1]):
        build_prompt(trial, tokenizer, a["seed"], a["max_new_tokens"], words, a["use_chat_template"])


def check_context(gpt, longest: int) -> None:
    """Raises ValueError for a length that the model cannot read."""
    context = gpt.config.block_size
    if longest > context and not gpt.rolls:
        raise ValueError(
            f"A length of {longest} tokens is more than the context of {context}: take shorter --lengths, raise it "
            "with --model.block_size, or give every layer a window with --model.attention sliding "
            "--model.sliding_window_size S --model.rolling_kv_cache true."
        )


def try_one(session, tokenizer, trial, a: dict[str, Any], words: list[str], interrupted) -> dict[str, Any]:
    """One trial: read its prompt, go on greedily for a few tokens, find the first number in them."""
    from lit_swa.passkey import ask, build_prompt, find_answer

    room = a["max_new_tokens"]
    ids, passkey, depth = build_prompt(trial, tokenizer, a["seed"], room, words, a["use_chat_template"])
    answer = ask(session, tokenizer, ids, room, interrupted)
    return {
        "length": trial.length, "cell": trial.depth, "trial": trial.number, "depth": depth, "prompt_tokens": len(ids),
        "expected": passkey, "answer": answer, "right": find_answer(answer) == passkey,
    }  # fmt: skip


def table_of(rows: list[dict[str, Any]]) -> list[str]:
    """The accuracy in percent as a markdown table: a column for each length, a row for each depth, and one for all."""
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    depths = list(dict.fromkeys(row["depth"] for row in rows))
    cells = {(row["length"], row["depth"]): row["accuracy"] for row in rows}
    lines = [f"| depth | {' | '.join(f'{n} tokens' for n in lengths)} |", "| --- |" + " --- |" * len(lengths)]
    for depth in depths:
        name = "random" if depth is None else f"{depth:.0%}"
        lines.append(f"| {name} | {' | '.join(f'{cells[n, depth]:.0%}' for n in lengths)} |")
    if len(depths) > 1:
        means = [sum(cells[n, d] for d in depths) / len(depths) for n in lengths]
        lines.append(f"| all | {' | '.join(f'{mean:.0%}' for mean in means)} |")
    return lines


def draw(plt, result: dict[str, Any]):
    """Depth over length: a heat map of the accuracy, or a point for each trial if the depths are random."""
    from lit_swa.plots import model_of, set_title

    a, rows = result["arguments"], result["accuracy"]
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    depths = list(dict.fromkeys(row["depth"] for row in rows))
    height = max(4.6, 0.34 * len(depths) + 1.4)
    figure, axis = plt.subplots(figsize=(max(5.2, 2.4 + 0.9 * len(lengths)), height), layout="constrained")
    draw_trials(axis, lengths, rows, result["trials"]) if depths == [None] else draw_map(axis, lengths, depths, rows)
    axis.set(xlabel="length of the prompt, tokens", ylabel="depth of the number in the text (0%: beginning)")
    hidden_in = Path(a["haystack"]["file"]).name if a["haystack"] else "short sentences"
    each = "random depths, " if depths == [None] else "found in % of "
    each += f"{a['trials']} trials at each length" + (" and depth" if depths != [None] else "")
    set_title(figure, f"{model_of(a)}: a number hidden in {hidden_in},", each)
    return figure


def draw_trials(axis, lengths: list[int], rows: list[dict[str, Any]], trials: list[dict[str, Any]]) -> None:
    from lit_swa.plots import short_count

    for right, marker, colour, name in ((True, "o", "#009E73", "found"), (False, "x", "#D55E00", "not found")):
        chosen = [t for t in trials if t["right"] == right]
        x, y = [lengths.index(t["length"]) for t in chosen], [100 * t["depth"] for t in chosen]
        axis.scatter(x, y, marker=marker, color=colour, label=name)
    names = [f"{short_count(row['length'])}\nfound {row['accuracy']:.0%}" for row in rows]
    axis.set(xlim=(-0.5, len(lengths) - 0.5), ylim=(102, -2), xticks=range(len(lengths)), xticklabels=names)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    axis.figure.legend(loc="outside lower center", ncols=2, frameon=False)


def draw_map(axis, lengths: list[int], depths: list[float], rows: list[dict[str, Any]]) -> None:
    from lit_swa.plots import draw_shares

    cells = {(row["length"], row["depth"]): 100 * row["accuracy"] for row in rows}
    grid = [[cells[n, depth] for n in lengths] for depth in depths]
    draw_shares(axis, grid, lengths, [f"{depth:.0%}" for depth in depths])


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
