"""What the scripts in generate/ that complete prompts share: each shows the loop that is its own."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from lit_swa.arguments import Generation
from lit_swa.batches import Batch, Request
from lit_swa.checkpoint import check_checkpoint_dir, load_model
from lit_swa.checks import check_range
from lit_swa.fast_decode import compile_decode, warm_up
from lit_swa.formats.checkpoint import tokenizer_dir
from lit_swa.formats.download import find_checkpoint
from lit_swa.formats.places import locate
from lit_swa.generate import Sampling, Session, check_stops
from lit_swa.linear_formats import pack_for_cpu
from lit_swa.model import GPT
from lit_swa.speed import StepTrace
from lit_swa.texts import encode_text, read_stdin
from lit_swa.tokenizer import Tokenizer
from lit_swa.utils import pick_device, pick_dtype


class Prompt(NamedTuple):
    text: str
    ids: list[int]


@dataclass
class Run:
    """The arguments of a script, checked, and what they lead to: everything but the model."""

    args: Generation
    device: str
    dtype: str
    sampling: Sampling
    checkpoint_dir: Path
    base_checkpoint_dir: Path | None
    tokenizer: Tokenizer
    prompts: list[Prompt]
    trace: StepTrace | None  # for the Stats of a completion

    def load_model(self, **overrides: Any) -> GPT:
        """The model. overrides: of load_model's arguments and of the fields of the config."""
        arguments = {"dtype": self.dtype, "device": self.device, "base_dir": self.base_checkpoint_dir}
        arguments |= {"quantize": self.args.quantize} | (self.args.model or {}) | overrides
        return load_model(self.checkpoint_dir, **arguments)

    def samples(self) -> Iterator[tuple[Prompt, Sampling]]:
        """What to complete: each prompt --num_samples times, each time with the next seed."""
        for prompt in self.prompts:
            for sampling in self.samplings():
                yield prompt, sampling
                if self.trace is not None:  # of the first completion
                    self.trace.close()

    def samplings(self) -> Iterator[Sampling]:
        for n in range(self.args.num_samples):
            yield replace(self.sampling, seed=self.args.seed + n)

    @property
    def limits(self) -> dict[str, Any]:
        """The arguments of generate_text that say where a completion ends."""
        stops = {"stop": self.args.stop or (), "stop_tokens": self.tokenizer.eos_ids}
        return {"max_new_tokens": self.args.max_new_tokens} | stops

    @property
    def most_tokens(self) -> int:
        """How many tokens the longest prompt and its completion have at most."""
        return max(len(prompt.ids) for prompt in self.prompts) + self.args.max_new_tokens


def prepare(args: Generation, from_file: bool = False) -> Run:
    """Check the arguments, find the checkpoint and encode the prompts. Raises ValueError or OSError.

    from_file: the prompts come from a file, and there are none among the arguments.
    """
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    trace = None if args.profile is None else StepTrace(args.profile, device)
    texts = [] if from_file else [read_stdin() if text == "-" else text for text in args.prompts]
    if "" in texts or not texts and not from_file:
        raise ValueError('The prompt is empty: give some text with --prompt "...".')
    check_range("num_samples", args.num_samples, 1)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed)
    check_stops(args.stop or ())
    checkpoint_dir = find_checkpoint(args.checkpoint_dir)
    base_checkpoint_dir = args.base_checkpoint_dir and locate(args.base_checkpoint_dir)
    check_checkpoint_dir(checkpoint_dir, base_dir=base_checkpoint_dir)
    tokenizer = Tokenizer(tokenizer_dir(checkpoint_dir, base_checkpoint_dir))
    encoded = [Prompt(text, encode_text(tokenizer, text).tolist()) for text in texts]
    return Run(args, device, dtype, sampling, checkpoint_dir, base_checkpoint_dir, tokenizer, encoded, trace)


def make_ready(session: Session, run: Run) -> None:
    """Compile the session's decode step if it has one, and otherwise pack the weights of a model on a CPU."""
    if session.decode is not None:
        print(f"compiled in {warm_up(session, run.most_tokens):.1f} s", file=sys.stderr)
    else:
        pack_for_cpu(session.model)


def open_batch(run: Run, model: GPT, requests: Sequence[Request], batch_size: int | None) -> Batch:
    """A batch that is ready to answer the requests: its caches are there, and its decode step is compiled if asked."""
    decode = compile_decode(model) if run.args.compile else None
    batch = Batch(
        model, requests, run.sampling, batch_size=batch_size, decode=decode, tokenizer=run.tokenizer,
        stop_tokens=run.tokenizer.eos_ids, trace=run.trace,
    )  # fmt: skip
    if decode is not None:
        print(f"compiled in {batch.warm_up():.1f} s", file=sys.stderr)
    else:
        pack_for_cpu(model)
    return batch


def show(prompt: str, pieces: Iterator[str]) -> str:
    """Print a prompt, once it is read, and its completion piece by piece as it comes; returns the completion."""
    text = next(pieces, "")
    print(prompt, text, sep="", end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print(flush=True)
    return text
