"""Read a long text through a small cache: scripts/evaluate_streaming.py --data FILE.txt, or talk: --chat FILE.jsonl."""

import hashlib
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed


def main(
    data: Path | None = None,
    chat: Path | None = None,
    checkpoint_dir: Path | None = None,
    cache_size: int = 512,
    sinks: list[int] | None = None,
    own_attention: bool | None = None,
    max_tokens: int | None = None,
    chunk_size: int | None = None,
    bucket_size: int | None = None,
    max_gen: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    output: Path = Path("out/streaming.json"),
    model: dict[str, Any] | None = None,
) -> None:
    """Compare caches on one long text by perplexity, milliseconds per token and bytes, or hold a long chat.

    A cache of N keys with n sinks keeps the first n tokens of the text and the N - n latest ones, as in StreamingLLM
    (Xiao et al. 2023, arXiv 2309.17453); with 0 sinks it is a sliding window of N. Its size stays the same, and the
    text may have any length. With --chat, the questions of a file are asked one after the other in one conversation,
    whose cache is never emptied. Answers go to stdout, statistics to stderr.

    Args:
        data: A text to read: .txt (UTF-8), or .bin with token ids.
        chat: A file of questions, a JSON line each, such as {"question_id": 1, "turns": ["first", "second"]}.
        checkpoint_dir: A checkpoint's directory or name. By default SmolLM2-135M-Instruct, which is downloaded once.
        cache_size: How many keys a layer keeps, sinks and latest tokens together.
        sinks: The numbers of sinks to compare, as '[0,1,4]'. By default 0 and 4, and for a chat 4.
        own_attention: Run the model's own attention too (full, for most models), which stops at its context. By default
            true for a text and false for a chat.
        max_tokens: How many tokens of the text to read; 0 reads all of it. By default 16384.
        chunk_size: Tokens fed in one call. By default 1, as in decoding; more is faster and gives the same perplexity.
        bucket_size: How many positions make one point of the picture. By default 512.
        max_gen: The longest answer of a chat, in tokens. By default 256.
        device: auto, cpu, cuda or mps.
        dtype: float32, bfloat16 or float16; auto is bfloat16 on a GPU and float32 on a CPU.
        output: The JSON file for the results; the picture of a text goes next to it, as .png.
        model: Any field of the model's config, as --model.FIELD VALUE (--model.help lists them). Fields of attention
            are for own_attention only.
    """
    from lit_swa.checkpoint import check_checkpoint_dir
    from lit_swa.evaluate import Results, weights_identity
    from lit_swa.formats.download import find_checkpoint
    from lit_swa.plots import check_output, draw_results
    from lit_swa.texts import read_questions
    from lit_swa.utils import describe_command, describe_machine, pick_device, pick_dtype

    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    given = {"max_tokens": max_tokens, "chunk_size": chunk_size, "bucket_size": bucket_size, "max_gen": max_gen}
    settings = check_settings(data, chat, given)
    if data is not None:
        check_output(output)
    questions = [] if chat is None else read_questions(chat)
    checkpoint_dir = find_checkpoint(checkpoint_dir)
    check_checkpoint_dir(checkpoint_dir)
    tokens, digest = ([], digest_of(questions)) if data is None else read_text(data, checkpoint_dir, settings)
    methods = plan_methods(checkpoint_dir, sinks, cache_size, own_attention, model or {}, chat is not None)
    arguments = {
        "checkpoint_dir": str(checkpoint_dir), "data": data and str(data), "chat": chat and str(chat),
        "sha256": digest, "methods": methods, "device": device, "dtype": dtype,
        "weights": weights_identity(checkpoint_dir),
    }  # fmt: skip
    with Results(output, arguments | settings) as results:
        finished = results.finished
        if finished is None:
            content = {"command": describe_command(), "machine": describe_machine(device)}
            content |= run_chat(results, questions) if data is None else run_text(results, tokens)
            results.finish(content)
        else:
            print(f"{output} is complete: this is what it says", file=sys.stderr)
            content = finished
            for part in content.get("answers", []):
                print_answer(part)
        if data is None:
            print(f"results: {output}", file=sys.stderr)
            return
        print("\n".join(table_of(content["methods"])))
        draw_results(output, lambda plt: draw(plt, {"arguments": results.arguments} | content))


def check_settings(data: Path | None, chat: Path | None, given: dict[str, int | None]) -> dict[str, int]:
    """The settings of a text or of a chat, with their defaults. Raises ValueError for one that does not fit."""
    from lit_swa.checks import check_range

    if (data is None) == (chat is None):
        raise ValueError("Give a text with --data FILE.txt, or questions with --chat FILE.jsonl: one of the two.")
    defaults = {"max_gen": 256} if data is None else {"max_tokens": 16384, "chunk_size": 1, "bucket_size": 512}
    for name, value in given.items():
        if value is not None and name not in defaults:
            raise ValueError(f"{name}={value} has no effect with --{'chat' if data is None else 'data'}: leave it out.")
        if value is not None:
            check_range(name, value, 0 if name == "max_tokens" else 1)
    return {name: default if given[name] is None else given[name] for name, default in defaults.items()}


def plan_methods(
    checkpoint_dir: Path, sinks: list[int] | None, cache_size: int, own: bool | None, fields: dict[str, Any], chat: bool
) -> list[dict[str, Any]]:
    """{"name", "model"} for each cache to run; "model" holds config fields. Raises ValueError for a wrong one."""
    from lit_swa.checkpoint import load_config

    own = not chat if own is None else own
    rest = {name: value for name, value in fields.items() if name not in cache_fields(1, cache_size)}
    if not own and len(rest) < len(fields):
        unused = next(name for name in fields if name not in rest)
        raise ValueError(
            f"model.{unused}={fields[unused]} has no effect on the caches of --sinks, which set it themselves: "
            "add --own_attention true."
        )
    if sinks is None:
        sinks = default_sinks(own, chat)
    methods = [sink_method(n, cache_size, rest) for n in dict.fromkeys(sinks)]
    if own:
        name = load_config(checkpoint_dir).override(**fields).attention
        methods.append({"name": name, "model": fields})
    if not methods or (chat and len(methods) > 1):
        raise ValueError(
            f"There are {len(methods)} caches to run: give {'one' if chat else 'some'} with --sinks '[4]'."
        )
    for method in methods:
        load_config(checkpoint_dir).override(**method["model"])  # a wrong field shows now and not after an hour
    return methods


def default_sinks(own: bool, chat: bool) -> list[int]:
    """The numbers of sinks to run when none are given: a chat has one cache, a text compares several."""
    if not chat:
        return [0, 4]
    return [] if own else [4]


def sink_method(n: int, cache_size: int, fields: dict[str, Any]) -> dict[str, Any]:
    """The method of n sinks, with these other fields of the config. Raises ValueError for an n that does not fit."""
    if not 0 <= n < cache_size:
        raise ValueError(f"sinks={n} does not fit: it must be at least 0 and less than cache_size={cache_size}.")
    name = f"{n} sink{'s' if n > 1 else ''} + {cache_size - n}" if n else f"window {cache_size}"
    return {"name": name, "model": fields | cache_fields(n, cache_size)}


def cache_fields(sinks: int, cache_size: int) -> dict[str, Any]:
    """The fields of the config that give every layer a cache of so many keys, the first tokens among them."""
    attention = {"attention": "streaming", "n_sink_tokens": sinks} if sinks else {"attention": "sliding"}
    return attention | {"sliding_window_size": cache_size - sinks, "rolling_kv_cache": True}


def digest_of(questions: list[dict[str, Any]]) -> str:
    return hashlib.sha256(repr(questions).encode()).hexdigest()


def load(results, method: dict[str, Any]):
    """The model with one method's cache."""
    from lit_swa.checkpoint import load_model
    from lit_swa.linear_formats import pack_for_cpu

    a = results.arguments
    gpt = load_model(a["checkpoint_dir"], dtype=a["dtype"], device=a["device"], **method["model"])
    pack_for_cpu(gpt)
    return gpt


# ---------------------------------------------------------------------------------------------------------- a long text


def read_text(data: Path, checkpoint_dir: Path, settings: dict[str, int]):
    """(tokens, a hash of them): those to read and one more, which is only predicted. Raises ValueError or OSError."""
    from lit_swa.checkpoint import load_config
    from lit_swa.evaluate import check_tokens, read_tokens

    vocab_size = load_config(checkpoint_dir).vocab_size
    tokens = read_tokens(
        data, checkpoint_dir, vocab_size, settings["max_tokens"] + 1 if settings["max_tokens"] else None
    )
    if len(tokens) < 2:
        raise ValueError(f"{data} is a text of one token: there is nothing to predict, give a longer one.")
    return tokens, check_tokens(tokens, vocab_size, data)


def run_text(results, tokens) -> dict[str, Any]:
    """Read the text with every method. Ctrl-C keeps finished methods; the one that it stops will begin anew."""
    from lit_swa.utils import ProgressLine, interruptible

    a, total = results.arguments, len(tokens) - 1
    to_read = [m for m in a["methods"] if m["name"] not in results.parts]
    for method in to_read:
        gpt = load(results, method)
        n = total if gpt.rolls else min(total, gpt.config.block_size)
        if n < total:
            print(f"{method['name']}: stops at its context, {n} of {total} tokens", file=sys.stderr)
        line = ProgressLine(n, method["name"])
        with interruptible() as interrupted:
            buckets = read(gpt, tokens[: n + 1], a["chunk_size"], a["bucket_size"], line, interrupted)
        if interrupted():
            results.save()
            print(
                f"{len(results.parts)} of {len(a['methods'])} caches are kept: the same command goes on "
                f"with {method['name']}, from the beginning of the text",
                file=sys.stderr,
            )
            raise KeyboardInterrupt
        results.add(
            method["name"], method | summary(buckets) | {"cache_bytes": gpt.kv_cache_bytes(), "buckets": buckets}
        )
        results.save()
        del gpt  # before the next one comes
    return {"text_tokens": total, "methods": [results.parts[m["name"]] for m in a["methods"]]}


def read(gpt, tokens, chunk: int, bucket: int, line, interrupted) -> list[dict[str, float]]:
    """Feed all tokens but the last, `chunk` at a time; returns the mean loss of the next tokens for each bucket."""
    import torch
    from torch.nn.functional import cross_entropy

    from lit_swa.config import check_no_prompt
    from lit_swa.evaluate import perplexity
    from lit_swa.generate import Session, non_finite
    from lit_swa.utils import format_perplexity, wait_for

    check_no_prompt(gpt.config)
    n, session = len(tokens) - 1, Session(gpt, chunk_size=chunk)
    text, buckets, seen = torch.tensor(tokens.tolist(), device=session.device), [], 0.0
    session.reserve(n)
    session.feed(text[:1])  # what only the first call does is not timed
    session.reset()
    with torch.inference_mode():
        for start in range(0, n, bucket):
            stop, total, started = min(start + bucket, n), torch.zeros((), device=text.device), time.perf_counter()
            for at in range(start, stop, chunk):
                end = min(at + chunk, stop)
                logits = session.feed(text[at:end], logits_to_keep=0)[0]  # (T, V)
                total += cross_entropy(logits.float(), text[at + 1 : end + 1], reduction="sum")
                if interrupted():
                    return buckets
                if end < stop:
                    line.show(end, f"ppl {format_perplexity(seen / start)}" if start else "")
            wait_for(text.device)
            ms = 1e3 * (time.perf_counter() - started) / (stop - start)
            nll = float(total) / (stop - start)
            if not math.isfinite(nll):
                raise non_finite(gpt, f"From token {start} on there is no finite perplexity")
            seen += float(total)
            buckets.append({"start": start, "stop": stop, "nll": nll, "ppl": perplexity(nll), "ms_per_token": ms})
            line.show(stop, f"ppl {format_perplexity(seen / stop)}")
    return buckets


def summary(buckets: list[dict[str, float]]) -> dict[str, float]:
    """The means over some buckets."""
    from lit_swa.evaluate import perplexity

    tokens = [b["stop"] - b["start"] for b in buckets]
    nll = sum(n * b["nll"] for n, b in zip(tokens, buckets, strict=True)) / sum(tokens)
    ms = sum(n * b["ms_per_token"] for n, b in zip(tokens, buckets, strict=True)) / sum(tokens)
    return {"tokens": sum(tokens), "nll": nll, "ppl": perplexity(nll), "ms_per_token": ms}


def table_of(methods: list[dict[str, Any]]) -> list[str]:
    """A markdown table, a row for each method. If some stopped early, it adds the perplexity of what all have read."""
    from lit_swa.utils import format_number

    names = ["cache", "tokens", "ppl", "ms/token, first", "ms/token, last", "cache MB"]
    common = max(set.intersection(*({b["stop"] for b in m["buckets"]} for m in methods)), default=0)
    if common and len({m["tokens"] for m in methods}) > 1:
        names.insert(2, f"ppl of the first {common}")
    lines = [f"| {' | '.join(names)} |", "| --- |" + " --- |" * (len(names) - 1)]
    for m in methods:
        cells = [m["name"], str(m["tokens"]), format_number(m["ppl"])]
        if len(names) == 7:
            cells.insert(2, format_number(summary([b for b in m["buckets"] if b["stop"] <= common])["ppl"]))
        cells += [f"{m['buckets'][i]['ms_per_token']:.1f}" for i in (0, -1)] + [f"{m['cache_bytes'] / 1e6:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(plt, result: dict[str, Any]):
    """Perplexity and milliseconds per token over position."""
    from lit_swa.plots import log_axis, names_of, set_title, short_count, token_axis

    a, methods = result["arguments"], result["methods"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    wide = [m for m in methods if m["model"].get("n_sink_tokens")][:0:-1]  # all numbers of sinks but the first
    for m in [*wide, *(m for m in methods if m not in wide)]:
        middle = [(b["start"] + b["stop"]) / 2 for b in m["buckets"]]
        for axis, key in zip(axes, ("ppl", "ms_per_token"), strict=True):
            axis.plot(middle, [b[key] for b in m["buckets"]], label=term(m), **look(m, wide))
    for axis in axes:
        token_axis(axis, result["text_tokens"])
        axis.set_xlabel("position in the text, tokens")
        axis.grid(alpha=0.3)
    axes[0].set(title="perplexity: lower is better", ylabel=f"perplexity, mean of {a['bucket_size']} positions")
    log_axis(axes[0])
    fed = "one at a time" if a["chunk_size"] == 1 else f"{a['chunk_size']} at a time"
    axes[1].set(title=f"time, tokens fed {fed}", ylabel="milliseconds per token")
    cut_peaks(axes[1], methods)
    tokens = f"{short_count(result['text_tokens'])} tokens of {names_of(a['data'])}"
    set_title(figure, f"{Path(a['checkpoint_dir']).name} reads {tokens}, once with each cache")
    lines = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    handles = [lines[term(m)] for m in methods]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(methods), frameon=False)
    return figure


def term(method: dict[str, Any]) -> str:
    """A cache's name behind that of its attention."""
    attention = method["model"].get("attention", method["name"])
    return method["name"] if attention == method["name"] else f"{attention}, {method['name']}"


def look(method: dict[str, Any], wide: list[dict[str, Any]]) -> dict[str, Any]:
    """How one method's curve is drawn; those that are drawn wide and pale show behind the others."""
    from lit_swa.plots import style_of

    style = style_of(method["model"].get("attention", method["name"]))
    if method in wide:
        width = 3 + 3 * (len(wide) - wide.index(method))
        return {"color": style.colour, "linewidth": width, "alpha": 0.35, "solid_capstyle": "butt"}
    return {"color": style.colour, "linewidth": 1.5, "marker": "." if len(method["buckets"]) < 40 else ""}


def cut_peaks(axis, methods: list[dict[str, Any]]) -> None:
    """End the axis of the times where the first call, which loads kernels, would set its scale, and say so."""
    times = sorted(b["ms_per_token"] for m in methods for b in m["buckets"])
    top = 3 * times[len(times) // 2]
    top = max([top, *(1.1 * b["ms_per_token"] for m in methods for b in m["buckets"][2:])])
    axis.set_ylim(0, min(top, 1.1 * times[-1]))
    peaks = [(m["name"], max(b["ms_per_token"] for b in m["buckets"])) for m in methods]
    if cut := [f"{name} begins with up to {peak:.1f} ms" for name, peak in peaks if peak > top]:
        note = f"beyond the axis: {', '.join(cut)}"
        axis.text(0.98, 0.96, note, transform=axis.transAxes, ha="right", va="top", color="dimgrey", fontsize=9)


# -------------------------------------------------------------------------------------------------------- a long chat


def run_chat(results, questions: list[dict[str, Any]]) -> dict[str, Any]:
    """Ask all questions in one conversation. Ctrl-C keeps the answers; the next start reads them again and goes on."""
    from lit_swa.formats.checkpoint import tokenizer_dir
    from lit_swa.generate import Session
    from lit_swa.tokenizer import Tokenizer
    from lit_swa.utils import interruptible

    a = results.arguments
    tokenizer = Tokenizer(tokenizer_dir(a["checkpoint_dir"]))
    if not tokenizer.has_chat_template:
        raise ValueError(f"The tokenizer of {a['checkpoint_dir']} has no chat template: take an instruct model.")
    session = Session(load(results, a["methods"][0]))
    rolls, context = session.model.rolls, session.model.config.block_size
    session.reserve(2**31 if rolls else min(1024, context))  # where all caches roll, a window is all that they hold
    ids, stopped = [], None  # the conversation
    for i, question in enumerate(questions):
        part = results.parts.get(str(i))
        turn = next_turn(tokenizer, question["question"], first=i == 0) if part is None else part["ids"]
        if part is None and not rolls and len(ids) + len(turn) > context:
            stopped = f"the context of {context} tokens is full after {i} of {len(questions)} questions"
            print(f"{stopped}: a cache of --sinks goes on for ever", file=sys.stderr)
            break
        ids += turn
        if part is not None:
            print_answer(part)
            continue
        with interruptible() as interrupted:
            part = answer(session, tokenizer, question, ids, a["max_gen"], interrupted)
        if interrupted():
            results.save()
            print(f"\n{len(results.parts)} answers are kept: the same command goes on", file=sys.stderr)
            raise KeyboardInterrupt
        results.add(str(i), part | {"ids": turn + part["ids"]})
    parts = [results.parts[str(i)] for i in range(len(questions)) if str(i) in results.parts]
    answers = [{key: value for key, value in part.items() if key != "ids"} for part in parts]
    return {"answers": answers, "tokens": len(ids), "stopped": stopped}


def next_turn(tokenizer, question: str, first: bool) -> list[int]:
    """The tokens that a question adds to a conversation, up to where the answer begins.

    The cache holds all that came before, so only what the template writes after an answer is needed. It is cut from a
    short conversation with a stand-in for that answer, which costs the same however long the real conversation is.
    """
    ask = {"role": "user", "content": question}
    if first:
        return tokenizer.apply_chat_template([ask])
    stand_in = "(the-answer-before)"
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": stand_in}, ask]
    return tokenizer.encode(tokenizer.render_chat(turns).partition(stand_in)[2], bos=False)


def answer(session, tokenizer, question: dict, ids: list[int], max_gen: int, interrupted) -> dict[str, Any]:
    """Answer greedily and print the answer as it comes; its tokens are added to ids."""
    from lit_swa.generate import Stats, generate
    from lit_swa.tokenizer import StreamDecoder

    stats, decoder, new, pieces = Stats(), StreamDecoder(tokenizer), [], []
    print(heading(question), flush=True)
    tokens = generate(
        session.model, ids, max_gen, stop_tokens=tokenizer.eos_ids, session=session, should_stop=interrupted,
        stats=stats,
    )  # fmt: skip
    for token in tokens:
        new.append(token)
        pieces.append(decoder.push(token))
        print(pieces[-1], end="", flush=True)
    pieces.append(decoder.flush())
    print(pieces[-1], end="\n\n", flush=True)
    ids += new
    seconds = stats.first_token_seconds + stats.decode_seconds
    part = question | {"answer": "".join(pieces), "tokens_so_far": len(ids), "new_tokens": len(new)}
    part |= {"ms_per_token": 1e3 * stats.decode_seconds / max(1, stats.decode_steps), "seconds": seconds}
    part |= {"cache_bytes": session.model.kv_cache_bytes(), "ids": new}
    print(
        f"{len(ids)} tokens so far | {len(new)} new | {part['ms_per_token']:.1f} ms/token | "
        f"cache {part['cache_bytes'] / 1e6:.1f} MB",
        file=sys.stderr,
    )
    return part


def heading(question: dict[str, Any]) -> str:
    return f"[{question['question_id']}, turn {question['turn']}] {question['question']}"


def print_answer(part: dict[str, Any]) -> None:
    print(heading(part), part["answer"], sep="\n", end="\n\n")


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
