"""Complete a prompt: python generate/base.py --prompt "Once upon a time"."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from lit_swa.arguments import Generation


def main(**generation: Any) -> None:
    """Print each prompt and its completion on stdout, and statistics on stderr."""
    args = Generation(**generation)

    from lit_swa import completion
    from lit_swa.fast_decode import compile_decode
    from lit_swa.generate import Session, Stats, generate_text
    from lit_swa.utils import show_reading

    run = completion.prepare(args)
    gpt = run.load_model()
    session = Session(gpt, decode=compile_decode(gpt) if args.compile else None)
    completion.make_ready(session, run)
    for prompt, sampling in run.samples():
        session.reset()  # each completion reads its prompt, so that its statistics are those of a whole run
        stats = Stats(trace=run.trace)
        pieces = generate_text(
            gpt, run.tokenizer, prompt.ids, sampling=sampling, session=session, progress=show_reading,
            stats=stats, **run.limits,
        )  # fmt: skip
        text = completion.show(prompt.text, pieces)
        print(stats.line(gpt, text), file=sys.stderr)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
