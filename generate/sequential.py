"""Complete a prompt with a model that does not fit one GPU: its blocks are on several, or wait in the CPU's memory.

python generate/sequential.py --devices 2 --checkpoint_dir DIR
python generate/sequential.py --devices 1 --offload 20 --checkpoint_dir DIR
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from lit_swa.arguments import Generation


def main(devices: int | None = None, offload: int | None = None, **generation: Any) -> None:
    """Print each prompt and its completion on stdout, and statistics on stderr. One device works after the other.

    Args:
        devices: Number of devices that share the blocks; by default all GPUs.
        offload: How many blocks wait in the CPU's memory until it is their turn; by default as few as the devices'
            memory allows.
    """
    args = Generation(**generation)

    from lit_swa import completion, nf4, sequential
    from lit_swa.generate import Session, Stats, generate_text
    from lit_swa.utils import show_reading

    if args.compile:
        raise ValueError("The step is not compiled over several devices: leave --compile out.")
    if args.quantize in nf4.MODES:  # which hold more than their tensors, on the device that they were made on
        raise ValueError(f"--quantize {args.quantize} is for one device: use int8 or int4.")
    places = sequential.find_devices(devices, args.device)
    args.device = str(places[0])
    run = completion.prepare(args)
    gpt = run.load_model(device="cpu")
    placement = sequential.place_blocks(gpt, places, offload, run.most_tokens)
    print(placement, file=sys.stderr)
    sequential.spread(gpt, placement)
    session = Session(gpt)
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
