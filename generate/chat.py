"""Talk to a model: python generate/chat.py. The cache stays between turns, so that only new tokens are read."""

import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

HELP = "/reset begins anew, /save [FILE] writes the conversation as JSON, /exit leaves; Ctrl-C stops an answer."
LOOKAHEAD = 64  # tokens that a rolling cache can take back: a template may write the end of an answer in another way


def main(
    checkpoint_dir: Path | None = None,
    base_checkpoint_dir: Path | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_k: int | None = None,
    top_p: float = 0.9,
    min_p: float = 0.0,
    repetition_penalty: float = 1.05,
    stop: list[str] | None = None,
    seed: int = 1234,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    model: dict[str, Any] | None = None,
) -> None:
    """Read turns from standard input, print answers on stdout, and statistics and hints on stderr.

    Args:
        checkpoint_dir: A checkpoint directory with a chat template, or one with an adapter. By default
            SmolLM2-135M-Instruct, downloaded once.
        base_checkpoint_dir: The base checkpoint of an adapter, instead of the one that it names.
        system: The system message that every conversation begins with. By default the one in the template, if any.
        max_new_tokens: How long an answer may become, in tokens.
        temperature: 0 takes the likeliest token each time; a higher temperature gives more varied answers.
        top_k: Sample among the k likeliest tokens.
        top_p: Sample among the fewest tokens, likeliest first, whose probabilities reach this sum.
        min_p: Sample among the tokens that are at least this many times as likely as the likeliest; between 0 and 1.
        repetition_penalty: Above 1, tokens that the conversation holds already become less likely.
        stop: A text that ends an answer and is not printed, as it is typed, such as --stop "User:"; several as a
            list, --stop '["User:", "###"]', or as several --stop.
        seed: The same seed and turns give the same answers.
        device: auto, cpu, cuda or mps.
        dtype: float32, bfloat16 or float16; auto is bfloat16 on a GPU and float32 on a CPU.
        compile: Compile the decode step, which takes a while at the start and makes each token faster.
        model: Any field of the model's config, as --model.FIELD VALUE (--model.help lists them). With --model.attention
            sliding --model.sliding_window_size 1024 --model.rolling_kv_cache true a conversation can go on without end.
    """
    from lit_swa.checkpoint import check_checkpoint_dir, load_model
    from lit_swa.checks import check_range
    from lit_swa.fast_decode import compile_decode, warm_up
    from lit_swa.formats.checkpoint import tokenizer_dir
    from lit_swa.formats.download import find_checkpoint
    from lit_swa.formats.places import locate
    from lit_swa.generate import Sampling, Session, check_stops, require_cache
    from lit_swa.linear_formats import pack_for_cpu
    from lit_swa.tokenizer import Tokenizer
    from lit_swa.training.resuming import trained_prompt_style
    from lit_swa.utils import pick_device, pick_dtype

    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    check_range("max_new_tokens", max_new_tokens, 1, 10**9)
    check_stops(stop or ())
    checkpoint_dir = find_checkpoint(checkpoint_dir)
    base_checkpoint_dir = base_checkpoint_dir and locate(base_checkpoint_dir)
    check_checkpoint_dir(checkpoint_dir, base_dir=base_checkpoint_dir)
    tokenizer = Tokenizer(tokenizer_dir(checkpoint_dir, base_checkpoint_dir))
    if not tokenizer.has_chat_template:
        raise ValueError(
            f"The tokenizer of {checkpoint_dir} has no chat template: use generate/base.py to complete text."
        )
    if (style := trained_prompt_style(checkpoint_dir) or "chat") != "chat":
        print(
            f"note: {checkpoint_dir} was trained on the prompt style {style}, and a chat has the chat template's.",
            file=sys.stderr,
        )
    gpt = load_model(checkpoint_dir, dtype=dtype, device=device, base_dir=base_checkpoint_dir, **(model or {}))
    session = Session(gpt, lookahead=LOOKAHEAD, decode=compile_decode(gpt) if compile else None)
    if compile:
        print(f"compiled in {warm_up(session, min(1024, gpt.config.block_size)):.1f} s", file=sys.stderr)
    else:
        pack_for_cpu(gpt)
    require_cache(gpt, 1, gpt.cache_length(max_new_tokens), LOOKAHEAD)  # or no turn can be answered
    session.reserve(min(1024, gpt.config.block_size))
    arguments = {"max_new_tokens": max_new_tokens, "sampling": sampling, "stop": stop or ()}
    talk(session, tokenizer, [] if system is None else [{"role": "system", "content": system}], arguments)


def talk(session, tokenizer, beginning: list[dict[str, str]], arguments: dict[str, Any]) -> None:
    """Answer turns and obey commands until the input ends. arguments: generate_text's, for every answer."""
    from lit_swa.command_line import shorten
    from lit_swa.generate import NonFiniteLogits

    messages = list(beginning)
    print(HELP, file=sys.stderr)
    while (turn := read_turn()) is not None:
        command, _, argument = turn.strip().partition(" ")
        if command == "/exit":
            break
        if command == "/reset":
            messages = list(beginning)
            print("A new conversation.", file=sys.stderr)
        elif command == "/save":
            save(messages, argument.strip())
        elif command.startswith("/"):
            print(f"There is no command {shorten(command)}: {HELP}", file=sys.stderr)
        elif command:
            asked = [*messages, {"role": "user", "content": turn}]
            try:
                messages = [*asked, {"role": "assistant", "content": answer(session, tokenizer, asked, arguments)}]
            except NonFiniteLogits:  # so would be those of any other turn
                raise
            except ValueError as e:  # the context is full, or the template refuses the turn: it is not kept
                print(f"error: {shorten(str(e))} /reset begins anew.", file=sys.stderr)


def answer(session, tokenizer, messages: list[dict[str, str]], arguments: dict[str, Any]) -> str:
    """Print the answer to a conversation as it comes, up to its end or Ctrl-C; returns it."""
    from lit_swa.generate import Stats, generate_text
    from lit_swa.utils import interruptible, show_reading

    stats, text = Stats(), ""
    with interruptible([signal.SIGINT]) as interrupted:
        pieces = generate_text(
            session.model, tokenizer, tokenizer.apply_chat_template(messages), continues=False,
            stop_tokens=tokenizer.eos_ids, session=session, should_stop=interrupted, progress=show_reading,
            stats=stats, **arguments,
        )  # fmt: skip
        for piece in pieces:
            print(piece, end="", flush=True)
            text += piece
    print(flush=True)
    print(stats.line(session.model, text), file=sys.stderr)
    return text


def read_turn() -> str | None:
    """The next line, or None at the end of the input; Ctrl-C throws the line away. Raises ValueError if not UTF-8."""
    from lit_swa.texts import read_line

    while True:
        try:
            print("> ", end="", file=sys.stderr, flush=True)
            return read_line()
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D leaves.", file=sys.stderr)
        except UnicodeDecodeError:  # of what is typed; a pipe's is raised
            print("error: that line is no UTF-8 text, it is not read.", file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return None


def save(messages: list[dict[str, str]], name: str) -> None:
    """Write the conversation as JSON, whole or not at all; a file that is there already is left alone."""
    from lit_swa.command_line import shorten
    from lit_swa.formats.files import write_json

    path = Path(name or time.strftime("chat-%Y%m%d-%H%M%S.json"))
    try:
        if path.exists():
            raise FileExistsError(f"{path} is there already: give another name.")
        write_json(path, messages)
        print(f"Saved {len(messages)} messages to {path}.", file=sys.stderr)
    except (OSError, ValueError) as e:  # ValueError: a name that no file can have
        print(f"error: {shorten(str(e))}", file=sys.stderr)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
