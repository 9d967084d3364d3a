"""What the finetuning scripts share before and after their loops: data, tokenizer, base model, showing answers."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn as nn
from torch import Tensor

from lit_swa import nf4
from lit_swa.arguments import Training
from lit_swa.config import IGNORED, Config
from lit_swa.data import (
    Dataset,
    Record,
    check_dataset,
    encode_record,
    load_dataset,
    show_examples,
    split_dataset,
    unheard_end,
)
from lit_swa.evaluate import check_context
from lit_swa.exact_chunks import ExactChunks
from lit_swa.formats.adapter_files import base_identity
from lit_swa.formats.checkpoint import check_checkpoint_dir, load_config, load_model
from lit_swa.formats.download import find_checkpoint
from lit_swa.formats.tokenizer import Tokenizer
from lit_swa.generate import generate
from lit_swa.model import GPT
from lit_swa.training.compiling import compile_blocks
from lit_swa.training.distribution import is_sharded, loading_device, start_fabric, unwrapped
from lit_swa.training.feed import ExampleFeed, ExampleValidation, tokens_at_once
from lit_swa.training.flops import count_weights
from lit_swa.training.loop import Progress, Run, validate, warmup_steps
from lit_swa.training.loss import differentiate_pieces_at_once
from lit_swa.training.memory import check_layers, choose_recompute
from lit_swa.training.precision import train_in_float32
from lit_swa.training.rehearsal import rehearse
from lit_swa.training.resuming import find_run
from lit_swa.training.saving import Saver, note_validation, remove_old_run
from lit_swa.utils import format_number


@dataclass
class Finetuning(Run):
    """A run that starts from a checkpoint and reads examples."""

    checkpoint_dir: Path
    config: Config
    tokenizer: Tokenizer
    data: Dataset  # what is trained on
    valid: ExampleValidation | None
    shown: str = field(init=False, default="")  # the sample answer that was shown last

    @property
    def prompt_style(self) -> str | None:
        return self.data.info["prompt_style"] if self.data.info["kind"] == "instruction" else None

    def samples(self) -> str:
        return show_examples(self.data, self.tokenizer)

    def identity(self) -> dict[str, Any]:
        """What was read, on which base, and the fields of its config that decide what a weight means."""
        base = base_identity(self.checkpoint_dir)
        return {**super().identity(), "base": base, "model": deciding_fields(self.config)}

    def show_sample(self, model: GPT) -> None:
        show_answer(self, model)


def deciding_fields(config: Config) -> dict[str, Any]:
    """The fields of a config that decide what a weight means, where they differ from their defaults."""
    free = ("name", "attention_backend", "rolling_kv_cache")
    shaped = {f.name: getattr(config, f.name) for f in fields(Config) if f.name not in free}
    return {name: value for name, value in shaped.items() if value != getattr(Config, name, MISSING)}


SMALL = 10**9  # weights


def prepare(
    args: Training,
    method: str,
    rate: float,
    small_rate: float | None = None,
    configure: Callable[[Config, dict[str, Any]], Config] | None = None,
) -> Finetuning:
    """Processes, tokenizer, data, and the number of steps. rate: the method's own learning rate; small_rate: that of
    models below SMALL.

    configure: makes the run's config of the checkpoint's and of the fields of --model; None: they replace its own.
    Raises ValueError or OSError for what does not fit, before any weight is read.
    """
    out_dir = args.out_dir or Path("out") / method
    find_run(args.resume, out_dir)
    fabric, dtype = start_fabric(args)
    with fabric.rank_zero_first():
        checkpoint_dir = find_checkpoint(args.checkpoint_dir)
    check_checkpoint_dir(checkpoint_dir)
    config, fields = load_config(checkpoint_dir), args.model or {}
    config = config.override(**fields) if configure is None else configure(config, fields)
    check_layers(args, config)
    tokenizer = Tokenizer(checkpoint_dir)
    data, held_out = read_data(args, tokenizer, config)
    if small_rate is not None and count_weights(config) < SMALL:
        rate = small_rate
    longest = max(int(d.lengths.max()) for d in (data, held_out) if d is not None)
    max_seq_length = args.max_seq_length or min(longest, config.block_size)
    feed = ExampleFeed(data, args, max_seq_length, tokens_at_once(fabric.device, config.n_embd))
    # No more tokens at once than in training, which the rehearsal shows to fit.
    valid = held_out and ExampleValidation(held_out, feed.longest().idx.numel())
    run = Finetuning(
        args=args,
        fabric=fabric,
        dtype=dtype,
        out_dir=out_dir,
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


def describe_choices(run: Run) -> str:
    """What was chosen for the model and the run where the arguments left it open, or do not fit them."""
    args, chosen, warmup = run.args, [], warmup_steps(run.steps, run.args)
    if args.learning_rate is None:
        chosen.append(
            f"--learning_rate {run.peak_rate:g} for a model of {count_weights(run.config) / 1e6:.3g}M weights"
        )
    if args.warmup_steps is None:
        chosen.append(f"--warmup_steps {warmup} of {run.steps}")
    elif args.warmup_steps != warmup:
        chosen.append(f"a warmup of {warmup} steps, since the run has {run.steps} and not {args.warmup_steps}")
    return f"chosen: {', '.join(chosen)}" if chosen else ""


def read_data(args: Training, tokenizer: Tokenizer, config: Config) -> tuple[Dataset, Dataset | None]:
    """What is trained on, and what is validated on. Raises ValueError for data that would train nothing."""
    length = args.max_seq_length or config.block_size
    check_context(config, length, "max_seq_length")
    how = {"max_seq_length": length, "prompt_style": args.prompt_style, "preset": args.preset}
    data = load_dataset(args.data, tokenizer, mask_prompt=args.mask_prompt, limit=args.limit, **how)
    check_dataset(data, tokenizer)
    require_known_tokens(data, args.data, tokenizer, config)
    if args.validation_data is not None:
        held_out = load_dataset(args.validation_data, tokenizer, mask_prompt=args.mask_prompt, **how)
        require_known_tokens(held_out, args.validation_data, tokenizer, config)
        return data, held_out
    if args.validation_fraction == 0 or len(data) < 2:
        return data, None
    return split_dataset(data, max(1, round(args.validation_fraction * len(data))), args.seed)


def require_known_tokens(data: Dataset, name: object, tokenizer: Tokenizer, config: Config) -> None:
    """Raises ValueError for a text with a token that the model has no row for."""
    for i in range(len(data)):
        ids = data[i].ids
        unknown = np.flatnonzero((ids < 0) | (ids >= config.vocab_size))
        if unknown.size:
            at, token_id = int(unknown[0]), int(ids[unknown[0]])
            text = tokenizer.decode(ids[max(0, at - 20) : at + 1].tolist(), skip_special_tokens=False)
            raise ValueError(
                f"Example {i} (counted from 0) of {name} has the token {tokenizer.id_to_token(token_id)!r}, number "
                f"{token_id}, at the end of {shorten_front(' '.join(text.split()), 60)!r}: the tokenizer has "
                f"{tokenizer.vocab_size} tokens and the model {config.vocab_size}; take the model's own tokenizer, or "
                "leave this token out of the data."
            )


def load_base(run: Finetuning, quantize: str | None = None) -> GPT:
    """The model to start from, with the run's config.

    quantize: a mode of lit_swa.quantize for the linear layers of the blocks.
    """
    fields = run.args.model or {}
    on_device = quantize in nf4.MODES  # which hold more than their tensors, on the device that they were made on
    device = run.fabric.device if on_device else loading_device(run.fabric)
    return load_model(run.checkpoint_dir, run.dtype, device, quantize=quantize, **fields).train()


def place(run: Run, model: GPT, holder: nn.Module | None = None) -> nn.Module:
    """Put the model on its devices: trained weights in float32, as many layers recomputed as memory demands, and
    compiled if that is asked for.

    holder: what the loop calls in the model's place, a module that holds it and has a loss of its own. None: the model,
        or with --chunk_size ExactChunks.
    Raises ValueError where texts cannot be read in chunks.
    """
    if run.args.chunk_size is not None:
        if holder is not None:
            raise ValueError("What is learned here needs whole texts: leave --chunk_size out.")
        holder = ExactChunks(model, run.args.chunk_size, run.args.chunk_offload)
    train_in_float32(model, run.dtype)
    differentiate_pieces_at_once(model)
    choose_recompute(run, model, accumulates=len(run.feed.batches(0)) > run.fabric.world_size)
    if run.args.compile:
        compile_blocks(model, run.fabric.device)
    return run.fabric.setup_module(holder or model)


def full_weights(run: Run, model: GPT) -> dict[str, Tensor]:
    """A model's weights in the dtype that it computes in."""
    return {name: t.to(run.dtype) for name, t in model.state_dict().items()}


def try_loading(directory: Path) -> None:
    """Load a trained directory as the next command would; what can be merged into the weights is merged."""
    check_checkpoint_dir(directory)
    load_model(directory, None)  # so what an adapter does not change stays in the file's pages


def resume_and_rehearse(
    run: Run,
    model: nn.Module,
    saver: Saver,
    validate: Callable[..., float],
    load: Callable[[Path], None],
    measure: Callable[..., Any] | None = None,
) -> Progress:
    """Go on from a saved step if --resume says so, show samples of the data, and try once all that the run will do.

    Then the model is validated, before the first step. validate, load: see rehearse. measure: what the loop calls to
    validate and tell the loss; None: evaluate.
    """
    progress = saver.resume()
    if run.is_over(progress):
        return progress
    for note in (describe_choices(run), run.samples()):
        if note:
            run.log.say(note)
    rehearse(run, model, validate, saver.save_model, load)
    if not run.args.dry_run:
        remove_old_run(run)
        if progress.step == 0 and progress.best is None:
            (measure or evaluate)(run, model, progress)
            if run.saves_after(progress):
                saver.save_step(progress)
    model.train()
    return progress


# -------------------------------------------------------------------------------------------------------- what is shown


def evaluate(run: Run, model: nn.Module, progress: Progress) -> float | None:
    """Measure the validation loss, tell it, and show what the model writes. None if nothing is validated on."""
    if run.valid is None:
        return None
    started = time.perf_counter()
    loss = validate(run.fabric, model, run.valid)
    note_validation(run, progress, loss, "--learning_rate, or look at the examples of the data that is held out")
    said = f"validation loss {format_number(loss, 4)}, {run.loss_in_words(loss)}"
    run.log.say(f"step {progress.step}: {said}")
    if run.args.sample and run.fabric.is_global_zero and not is_sharded(run.fabric):
        run.show_sample(unwrapped(model))
    run.log.validating = (time.perf_counter() - started) / run.eval_interval
    return loss


def show_answer(run: Finetuning, model: GPT, tokens: int = 40) -> None:
    """Show what the model answers, greedily, to the first prompt that is validated on, if the answer is a new one."""
    example = run.valid.dataset[0]
    trained = np.flatnonzero(example.labels != IGNORED)
    prompt = example.ids[: trained[0] if trained[0] > 1 else min(32, len(example.ids) // 2)].tolist()
    room = min(tokens, run.config.block_size - len(prompt))
    if room < 1 or not prompt:
        return
    model.eval()
    ids = list(generate(model, prompt, room, stop_tokens=run.tokenizer.eos_ids))
    model.clear_kv_cache()
    model.train()
    answer = " ".join(run.tokenizer.decode(ids).split())
    if answer != run.shown:
        question = " ".join(question_of(run, prompt).split())
        run.log.say(f"  asked:    {shorten_front(question, 120)}\n  answered: {answer}")
    run.shown = answer


PROBES = ((("one", ""), ("2", "")), (("one", "more"), ("2", "x")))  # (question, input) twice: nothing in common


def question_of(run: Finetuning, prompt: list[int]) -> str:
    """The text of a prompt, without what the prompt style writes before and behind every question."""
    text, info = run.tokenizer.decode(prompt, skip_special_tokens=False), run.data.info
    for probes in PROBES if info["kind"] == "instruction" else ():
        with suppress(ValueError):  # the template refuses so short a conversation
            prompts = [prompt_text(run.tokenizer, info["prompt_style"], *probe) for probe in probes]
            before = os.path.commonprefix(prompts)
            behind = os.path.commonprefix([p[::-1] for p in prompts])[::-1]
            if text.startswith(before) and text.endswith(behind) and len(before) + len(behind) < len(text):
                return text[len(before) : len(text) - len(behind)]
    return run.tokenizer.decode(prompt)


def prompt_text(tokenizer: Tokenizer, style: str, question: str, more: str) -> str:
    """What the prompt style makes of a question."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "b"}]
    ids, trained = encode_record(Record(messages=messages, input=more), style, tokenizer)
    return tokenizer.decode(ids[: trained.index(True)], skip_special_tokens=False)


def tell_end(run: Finetuning, progress: Progress, final: Path) -> None:
    """Say which weights are the result, and how to use them."""
    if (best := run.best_step(progress)) is not None:
        loss = f"validation loss {format_number(progress.best, 4)}"
        run.log.say(f"{final} holds the weights of step {best}, which has the best {loss}")
    chats = run.data.info["kind"] == "instruction" and run.data.info["prompt_style"] == "chat"
    command = "generate/chat.py --checkpoint_dir {}" if chats else "generate/base.py --checkpoint_dir {} --prompt ..."
    run.log.say(f"trained: python {command.format(final)}")


def shorten_front(text: str, most: int) -> str:
    """The end of a text, from the beginning of a word."""
    return text if len(text) <= most else "... " + text[-most:].partition(" ")[2]
