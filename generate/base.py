"""Complete a prompt: python generate/base.py --prompt "Once upon a time"."""

import sys
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed


def main(
    prompt: str = "Once upon a time, in a small village by the sea,",
    checkpoint_dir: Path | None = None,
    base_checkpoint_dir: Path | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 0.95,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: list[str] | None = None,
    num_samples: int = 1,
    seed: int = 1234,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    quantize: Literal["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"] | None = None,
    model: dict[str, Any] | None = None,
) -> None:
    """Print the prompt and its completion on stdout, and statistics on stderr.

    Args:
        prompt: The text to go on from. "-" reads it from standard input.
        checkpoint_dir: The directory of a checkpoint or an adapter, or a checkpoint's name. By default
            SmolLM2-135M-Instruct, which is downloaded once.
        base_checkpoint_dir: The base checkpoint of an adapter, instead of the one that it names.
        max_new_tokens: How many tokens to add at most.
        temperature: 0 takes the likeliest token each time; a higher temperature gives more varied text.
        top_k: Sample among the k likeliest tokens.
        top_p: Sample among the fewest tokens, likeliest first, whose probabilities reach this sum.
        min_p: Sample among the tokens that are at least this many times as likely as the likeliest; between 0 and 1.
        repetition_penalty: Above 1, tokens that the text holds already become less likely.
        stop: A text that ends the completion and is not printed, as it is typed, such as --stop "User:"; several as a
            list, --stop '["User:", "###"]', or as several --stop.
        num_samples: How many completions to print.
        seed: The same seed gives the same text; each further completion takes the next seed.
        device: auto, cpu, cuda or mps.
        dtype: float32, bfloat16 or float16; auto is bfloat16 on a GPU and float32 on a CPU.
        compile: Compile the decode step, which takes a while at the start and makes each token faster.
        quantize: Hold the weights of the blocks in 4 or 8 bits, with bitsandbytes: it saves memory, not time.
        model: Any field of the model's config, as --model.FIELD VALUE (--model.help lists them), such as
            --model.attention sliding --model.sliding_window_size 256 --model.rolling_kv_cache true.
    """
    from dataclasses import replace

    from lit_swa.checkpoint import check_checkpoint_dir, load_model
    from lit_swa.checks import check_range
    from lit_swa.fast_decode import compile_decode, warm_up
    from lit_swa.formats.checkpoint import tokenizer_dir
    from lit_swa.formats.download import find_checkpoint
    from lit_swa.formats.places import locate
    from lit_swa.generate import Sampling, Session, Stats, generate_text
    from lit_swa.linear_formats import pack_for_cpu
    from lit_swa.texts import encode_text, read_stdin
    from lit_swa.tokenizer import Tokenizer
    from lit_swa.utils import pick_device, pick_dtype, show_reading

    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    prompt = read_stdin() if prompt == "-" else prompt
    if not prompt:
        raise ValueError('The prompt is empty: give some text with --prompt "...".')
    check_range("num_samples", num_samples, 1)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    checkpoint_dir = find_checkpoint(checkpoint_dir)
    base_checkpoint_dir = base_checkpoint_dir and locate(base_checkpoint_dir)
    check_checkpoint_dir(checkpoint_dir, base_dir=base_checkpoint_dir)
    tokenizer = Tokenizer(tokenizer_dir(checkpoint_dir, base_checkpoint_dir))
    ids = encode_text(tokenizer, prompt).tolist()
    where = {"dtype": dtype, "device": device, "base_dir": base_checkpoint_dir}
    gpt = load_model(checkpoint_dir, quantize=quantize, **where, **(model or {}))
    session = Session(gpt, decode=compile_decode(gpt) if compile else None)
    if compile:
        print(f"compiled in {warm_up(session, len(ids) + max_new_tokens):.1f} s", file=sys.stderr)
    else:
        pack_for_cpu(gpt)
    for sample in range(num_samples):
        session.reset()  # each completion reads the prompt, so that its statistics are those of a whole run
        stats = Stats()
        pieces = generate_text(
            gpt, tokenizer, ids, max_new_tokens=max_new_tokens,
            sampling=replace(sampling, seed=seed + sample), stop=stop or (), stop_tokens=tokenizer.eos_ids,
            session=session, progress=show_reading, stats=stats,
        )  # fmt: skip
        text = next(pieces, "")  # it comes when the prompt is read
        print(prompt, text, sep="", end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
            text += piece
        print(flush=True)
        print(stats.line(gpt, text), file=sys.stderr)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
