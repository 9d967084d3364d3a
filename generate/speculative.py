"""Complete a prompt faster: python generate/speculative.py --draft lookup --prompt "Once upon a time"."""

import sys
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from lit_swa.arguments import Generation


def main(
    draft_checkpoint_dir: Path | None = None,
    draft: Literal["lookup", "streaming", "self-int4", "streaming-int4"] | None = None,
    speculative_k: int = 4,
    draft_window: int = 512,
    **generation: Any,
) -> None:
    """Print each prompt and its completion on stdout, as generate/base.py does, by speculative decoding.

    A draft proposes tokens, and the model keeps those that it would have chosen. Statistics go to stderr.

    Args:
        draft_checkpoint_dir: A smaller model with the same tokenizer, which is the draft.
        draft: Or a draft that needs no other model. lookup (the default): what followed the last words where they
            occurred before, for texts that repeat parts of the prompt. streaming: the model itself, reading its first
            tokens and the recent ones only, for long contexts. self-int4: the model itself in 4 bits. streaming-int4:
            both.
        speculative_k: How many tokens the draft proposes at a time.
        draft_window: How many recent tokens the streaming draft reads.
    """
    args = Generation(**generation)

    from functools import partial

    from lit_swa import completion, speculative
    from lit_swa.fast_decode import compile_decode
    from lit_swa.generate import Session, generate_text
    from lit_swa.utils import show_reading

    speculative.check_request(draft_checkpoint_dir, draft, speculative_k, draft_window)
    run = completion.prepare(args)
    gpt = run.load_model()
    decode = compile_decode(gpt, tokens=speculative_k + 1) if args.compile else None
    session = Session(gpt, lookahead=speculative_k, decode=decode)
    completion.make_ready(session, run)
    if draft_checkpoint_dir is not None:
        proposer = speculative.load_draft(draft_checkpoint_dir, run.tokenizer, speculative_k, args.compile, gpt)
    else:
        proposer = speculative.make_draft(draft or "lookup", gpt, draft_window, args.compile)
    if args.compile:
        seconds = speculative.warm_up(session, proposer, speculative_k, run.most_tokens)
        print(f"draft compiled in {seconds:.1f} s", file=sys.stderr)
    generate = partial(speculative.speculative_generate, draft=proposer, speculative_k=speculative_k)
    for prompt, sampling in run.samples():
        session.reset()  # each completion reads its prompt, so that its statistics are those of a whole run
        stats = speculative.SpeculativeStats(trace=run.trace)
        pieces = generate_text(
            gpt, run.tokenizer, prompt.ids, sampling=sampling, session=session, progress=show_reading,
            stats=stats, generate=generate, **run.limits,
        )  # fmt: skip
        text = completion.show(prompt.text, pieces)
        print(stats.line(gpt, text), file=sys.stderr)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
