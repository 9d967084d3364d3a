"""Complete a prompt with a model that is split over several devices.

torchrun --nproc_per_node 2 generate/tensor_parallel.py --checkpoint_dir DIR
python generate/tensor_parallel.py --devices 2 --checkpoint_dir DIR
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from lit_swa.arguments import Generation

if TYPE_CHECKING:
    from lit_swa.parallel import Rank


def main(devices: int | None = None, **generation: Any) -> None:
    """Print each prompt and its completion on stdout, and statistics on stderr. Each device has a part of every layer.

    Args:
        devices: Number of devices, with a process each; by default all GPUs. torchrun may start the processes instead.
    """
    args = Generation(**generation)

    from lit_swa import ranks
    from lit_swa.checks import check_range

    if devices is not None:
        check_range("devices", devices, 1, 4096)
    if not ranks.started() and (count := ranks.count_ranks(devices, args.device)) > 1:
        ranks.start(count)
    with ranks.joined(devices, args.device) as (rank, args.device):
        complete(args, rank)


def complete(args: Generation, rank: "Rank") -> None:
    """What each process does. All make the same calls of the model."""
    from lit_swa import completion, ranks
    from lit_swa.fast_decode import compile_decode
    from lit_swa.generate import Session, Stats, generate_text, prefill_chunk
    from lit_swa.texts import read_stdin
    from lit_swa.utils import show_reading

    texts = [read_stdin() if text == "-" else text for text in args.prompts] if rank.index == 0 else None
    args.prompt = ranks.from_first(texts, rank)
    args.profile = args.profile if rank.index == 0 else None
    run = completion.prepare(args)
    gpt = run.load_model(rank=rank)
    chunk = ranks.least(prefill_chunk(gpt, 1), rank, args.device)  # a prompt is read in the same pieces
    session = Session(gpt, chunk_size=chunk, decode=compile_decode(gpt) if args.compile else None)
    completion.make_ready(session, run)
    for prompt, sampling in run.samples():
        session.reset()
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
