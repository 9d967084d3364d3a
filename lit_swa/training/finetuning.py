"""What the finetuning scripts share before and after their loops: data, tokenizer, base model, showing answers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from lit_swa.arguments import Training
from lit_swa.config import IGNORED, Config
from lit_swa.data import Dataset, check_dataset, load_dataset, show_examples, split_dataset, unheard_end
from lit_swa.evaluate import check_context
from lit_swa.formats.checkpoint import check_checkpoint_dir, load_config, load_model
from lit_swa.formats.download import download_checkpoint
from lit_swa.formats.tokenizer import Tokenizer
from lit_swa.generate import generate
from lit_swa.model import GPT
from lit_swa.training.distribution import is_sharded, start_fabric, unwrapped
from lit_swa.training.feed import ExampleFeed, ExampleValidation
from lit_swa.training.loop import Progress, Run, validate
from lit_swa.training.memory import choose_recompute
from lit_swa.training.precision import train_in_float32
from lit_swa.training.rehearsal import rehearse
from lit_swa.training.saving import Saver


@dataclass
class Finetuning(Run):
    """A run that starts from a checkpoint and reads examples."""

    checkpoint_dir: Path
    config: Config
    tokenizer: Tokenizer
    data: Dataset  # what is trained on
    valid: ExampleValidation | None


def prepare(args: Training, method: str, rate: float) -> Finetuning:
    """Processes, tokenizer, data, and the number of steps. rate: the method's own learning rate.

    Raises ValueError or OSError for what does not fit, before any weight is read.
    """
    fabric, dtype = start_fabric(args)
    checkpoint_dir = args.checkpoint_dir
    if checkpoint_dir is None:
        with fabric.rank_zero_first():
            checkpoint_dir = download_checkpoint()
    check_checkpoint_dir(checkpoint_dir)
    config = load_config(checkpoint_dir).override(**(args.model or {}))
    tokenizer = Tokenizer(checkpoint_dir)
    data, held_out = read_data(args, tokenizer, config)
    longest = max(int(d.lengths.max()) for d in (data, held_out) if d is not None)
    max_seq_length = args.max_seq_length or min(longest, config.block_size)
    feed = ExampleFeed(data, args, max_seq_length, fabric.device.type)
    # No more tokens at once than in training, which the rehearsal shows to fit.
    valid = held_out and ExampleValidation(held_out, feed.micro_batch_size * max_seq_length)
    run = Finetuning(
        args=args,
        fabric=fabric,
        dtype=dtype,
        out_dir=args.out_dir or Path("out") / method,
        feed=feed,
        valid=valid,
        peak_rate=args.learning_rate or rate,
        checkpoint_dir=checkpoint_dir,
        config=config,
        tokenizer=tokenizer,
        data=data,
    )
    run.log.say(data.report + ("" if held_out is None else f" {len(held_out)} more are held out for validation."))
    if note := unheard_end(data, tokenizer):
        run.log.say(note)
    return run


def read_data(args: Training, tokenizer: Tokenizer, config: Config) -> tuple[Dataset, Dataset | None]:
    """What is trained on, and what is validated on. Raises ValueError for data that would train nothing."""
    length = args.max_seq_length or config.block_size
    check_context(config, length)
    how = {"max_seq_length": length, "prompt_style": args.prompt_style, "preset": args.preset}
    data = load_dataset(args.data, tokenizer, mask_prompt=args.mask_prompt, limit=args.limit, **how)
    check_dataset(data, tokenizer)
    if args.validation_data is not None:
        return data, load_dataset(args.validation_data, tokenizer, mask_prompt=args.mask_prompt, **how)
    if args.validation_fraction == 0 or len(data) < 2:
        return data, None
    return split_dataset(data, max(1, round(args.validation_fraction * len(data))), args.seed)


def load_base(run: Finetuning, quantize: str | None = None) -> GPT:
    """The model to start from, with the run's config.

    quantize: a mode of lit_swa.quantize for the linear layers of the blocks.
    """
    fields = run.args.model or {}
    return load_model(run.checkpoint_dir, run.dtype, run.fabric.device, quantize=quantize, **fields).train()


def place(run: Run, model: GPT) -> nn.Module:
    """Put the model on its devices: trained weights in float32, as many layers recomputed as memory demands."""
    train_in_float32(model, run.dtype)
    choose_recompute(run, model)
    return run.fabric.setup_module(model)


def full_weights(run: Run, model: GPT) -> dict[str, Tensor]:
    """A model's weights in the dtype that it computes in."""
    return {name: t.to(run.dtype) for name, t in model.state_dict().items()}


def try_loading(directory: Path) -> None:
    """Load a trained directory as the next command would; what can be merged into the weights is merged."""
    check_checkpoint_dir(directory)
    load_model(directory, torch.float32)


def resume_and_rehearse(
    run: Finetuning,
    model: nn.Module,
    saver: Saver,
    validate: Callable[..., float],
    load: Callable[[Path], None],
) -> Progress:
    """Go on from a saved step if --resume says so, show three samples, and try once all that the run will do.

    Then the model is validated, before the first step. validate, load: see rehearse.
    """
    progress = saver.resume()
    run.log.say(show_examples(run.data, run.tokenizer))
    rehearse(run, model, validate, saver.save_model, load)
    if progress.step == 0 and not run.args.dry_run:
        evaluate(run, model, progress)
    model.train()
    return progress


# -------------------------------------------------------------------------------------------------------- what is shown


def evaluate(run: Finetuning, model: nn.Module, progress: Progress) -> float | None:
    """Measure the validation loss, tell it, and show what the model answers. None if nothing is validated on."""
    if run.valid is None:
        return None
    loss = validate(run.fabric, model, run.valid)
    progress.note_validation(loss)
    if progress.step == 0:
        run.log.write(0, val_loss=loss)
    run.log.say(f"step {progress.step}: validation loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}")
    if run.args.sample:
        show_answer(run, unwrapped(model))
    return loss


def show_answer(run: Finetuning, model: GPT, tokens: int = 40) -> None:
    """Show what the model answers, greedily, to the first prompt that is validated on."""
    if is_sharded(run.fabric) or not run.fabric.is_global_zero:
        return
    example = run.valid.dataset[0]
    trained = np.flatnonzero(example.labels != IGNORED)
    prompt = example.ids[: trained[0] if trained[0] > 1 else min(32, len(example.ids) // 2)].tolist()
    room = min(tokens, run.config.block_size - len(prompt))
    if room < 1 or not prompt:
        return
    model.eval()
    answer = list(generate(model, prompt, room, stop_tokens=run.tokenizer.eos_ids))
    model.clear_kv_cache()
    model.train()
    shown = shorten_front(" ".join(run.tokenizer.decode(prompt).split()), 120)
    run.log.say(f"  asked:    {shown}\n  answered: {' '.join(run.tokenizer.decode(answer).split())}")


def shorten_front(text: str, most: int) -> str:
    """The end of a text, from the beginning of a word."""
    return text if len(text) <= most else "... " + text[-most:].partition(" ")[2]
