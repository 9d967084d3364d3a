"""Talk to a model: python generate/chat.py. The cache is kept between turns, so that only new tokens are read."""

import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

HELP = "/reset begins anew, /save [FILE] writes the conversation as JSON, /exit leaves; Ctrl-C stops an answer."
TAKES_BACK = 64  # tokens of a rolling cache that may be fed again, where a template writes an answer's end otherwise


def main(
    checkpoint_dir: Path | None = None,
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
    """Read turns from standard input, print answers on stdout; statistics and hints go to stderr.

    Args:
        checkpoint_dir: A checkpoint directory with a chat template. By default SmolLM2-135M-Instruct, downloaded once.
        system: A system message to begin every conversation with. Without one, the template's own, if it has one.
        max_new_tokens: How long an answer may become.
        temperature: 0 takes the likeliest token each time; higher is wilder.
        top_k: Sample among the k likeliest tokens.
        top_p: Sample among the fewest tokens whose probabilities sum to this.
        min_p: Sample among the tokens that are at least this times as likely as the likeliest.
        repetition_penalty: Above 1, tokens that were there before become less likely.
        stop: Texts that end an answer and are not printed.
        seed: The same seed and turns give the same answers.
        device: auto, cpu, cuda or mps.
        dtype: float32, bfloat16 or float16; auto is bfloat16 on a GPU and float32 on a CPU.
        compile: Compile the decode step: slow to start, faster after that.
        model: Any field of the model's config, as --model.FIELD VALUE. With --model.attention sliding
            --model.sliding_window_size 1024 --model.rolling_kv_cache true a conversation can go on for ever.
    """
    from lit_swa.checkpoint import check_checkpoint_dir, load_model
    from lit_swa.formats.download import download_checkpoint
    from lit_swa.generate import Stats, compile_decode, generate_text, pack_for_cpu, warm_up
    from lit_swa.tokenizer import Tokenizer
    from lit_swa.utils import interruptible, pick_device, pick_dtype, show_reading

    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    checkpoint_dir = checkpoint_dir or download_checkpoint()
    check_checkpoint_dir(checkpoint_dir)
    tokenizer = Tokenizer(checkpoint_dir)
    if not tokenizer.has_chat_template:
        raise ValueError(
            f"The tokenizer of {checkpoint_dir} has no chat template: use generate/base.py to complete text."
        )
    gpt = load_model(checkpoint_dir, dtype=dtype, device=device, **(model or {}))
    gpt.set_kv_cache(1, min(1024, gpt.config.block_size), lookahead=TAKES_BACK)
    decode = compile_decode(gpt) if compile else None
    if decode is None:
        pack_for_cpu(gpt)
    else:
        print(f"compiled in {warm_up(gpt, decode, 1024):.1f} s", file=sys.stderr)

    beginning = [] if system is None else [{"role": "system", "content": system}]
    messages, cached_ids = list(beginning), []
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
            print(f"There is no command {command}: {HELP}", file=sys.stderr)
        elif command:
            messages.append({"role": "user", "content": turn})
            answer, stats = "", Stats()
            try:
                ids = tokenizer.apply_chat_template(messages)
                with interruptible([signal.SIGINT]) as interrupted:
                    for piece in generate_text(
                        gpt,
                        tokenizer,
                        ids,
                        continues=False,
                        max_new_tokens=max_new_tokens,
                        seed=seed,
                        temperature=temperature,
                        top_k=top_k,
                        top_p=top_p,
                        min_p=min_p,
                        stop=stop or (),
                        repetition_penalty=repetition_penalty,
                        stop_tokens=tokenizer.eos_ids,
                        cached_ids=cached_ids,
                        decode=decode,
                        should_stop=interrupted,
                        progress=show_reading,
                        stats=stats,
                    ):
                        print(piece, end="", flush=True)
                        answer += piece
            except (
                ValueError
            ) as e:  # the conversation has outgrown the context, or its template refuses it: it stays as it was
                messages.pop()
                print(f"error: {e} /reset begins anew.", file=sys.stderr)
                continue
            print(flush=True)
            messages.append({"role": "assistant", "content": answer})
            print(stats.line(gpt), file=sys.stderr)


def read_turn() -> str | None:
    """The next line, or None at the end of the input. Ctrl-C throws the line away."""
    while True:
        try:
            print("> ", end="", file=sys.stderr, flush=True)
            return input()
        except KeyboardInterrupt:
            print("\n/exit or Ctrl-D leaves.", file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return None


def save(messages: list[dict[str, str]], name: str) -> None:
    """Write the conversation as JSON, whole or not at all; a file that is there already is left alone."""
    from lit_swa.formats.files import write_json

    path = Path(name or time.strftime("chat-%Y%m%d-%H%M%S.json"))
    try:
        if path.exists():
            raise FileExistsError(f"{path} is there already: give another name.")
        write_json(path, messages)
        print(f"Saved {len(messages)} messages to {path}.", file=sys.stderr)
    except OSError as e:
        print(f"error: {e}", file=sys.stderr)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
