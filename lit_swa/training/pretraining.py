"""What pretrain/base.py does before and beside its loop: text to tokens, the model, what steps read, bits per byte.

Shapes: B rows of T tokens in a micro-batch.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_swa.arguments import Pretraining
from lit_swa.config import IGNORED, Config
from lit_swa.data.prepare import make_jobs, prepare
from lit_swa.data.sources import Selection
from lit_swa.data.token_files import model_vocab_size
from lit_swa.data.train_tokenizer import ASKED, train_tokenizer
from lit_swa.evaluate import check_context
from lit_swa.formats.adapter_files import base_identity
from lit_swa.formats.checkpoint import check_checkpoint_dir, load_config, load_model
from lit_swa.formats.directory import check_tensors, has_tokenizer, open_weights, read_quantization
from lit_swa.formats.download import find_checkpoint
from lit_swa.formats.files import read_json
from lit_swa.formats.quantized import require_dense
from lit_swa.formats.tokenizer import Tokenizer
from lit_swa.generate import generate_text
from lit_swa.model import GPT
from lit_swa.token_files import INDEX, JOB, MIXTURE, TokenBatch, TokenData, TokenDirectory
from lit_swa.training.distribution import loading_device, start_fabric
from lit_swa.training.feed import tokens_at_once
from lit_swa.training.finetuning import deciding_fields
from lit_swa.training.flops import count_weights, peak_flops, token_flops
from lit_swa.training.loop import Batch, Progress, Run
from lit_swa.training.memory import check_layers
from lit_swa.training.resuming import find_run
from lit_swa.training.windows import Windows, plan_windows
from lit_swa.utils import count_cores, count_processes

if TYPE_CHECKING:
    from lightning.fabric import Fabric

LESSON = {  # with a vocabulary of 1,024 about 1M weights
    "name": "lesson",
    "n_layer": 4,
    "n_head": 4,
    "n_query_groups": 2,
    "n_embd": 128,
    "intermediate_size": 384,
    "block_size": 256,
    "tie_embeddings": True,
}
LONGEST_BLOCK = 2048  # by default
MOST_VALIDATED = 2**17  # tokens of a validation, which is made ten times a run by default
SMALL = 10**7  # weights
ROUNDED = 64  # rows of an embedding, for matrix units

# ---------------------------------------------------------------------------------------------------- what a step reads


class TokenFeed:
    """Feeds blocks of token directories: see lit_swa.training.loop.Feed. The last blocks of each may be held out."""

    def __init__(
        self, args: Pretraining, directory: Path, tokenizer: Tokenizer, config: Config, block_length: int, rows: int
    ) -> None:
        """rows: of a micro-batch. Raises OSError or ValueError as TokenData does."""
        self.data = TokenData(
            directory,
            block_length,
            args.batch_size,
            seed=args.seed,
            micro_batch_size=rows,
            documents=args.documents,
            tokenizer=tokenizer,
            vocab_size=config.vocab_size,
        )
        fraction = 0.0 if args.validation_data is not None else args.validation_fraction
        self.held_out = hold_out(self.data, fraction)
        self.batch_size, self.micro_batches = args.batch_size, args.batch_size // rows
        n_blocks = sum(source.n_blocks for source in self.data.sources)
        self.steps_per_epoch = max(1, n_blocks // args.batch_size)

    @property
    def identity(self) -> dict[str, Any]:
        held_out = [int(n) for n in self.held_out]
        weights = [source.weight for source in self.data.sources]
        mixed = {"weights": weights} if len(weights) > 1 else {}  # before the data, whose hash depends on them
        return {**mixed, **self.data.identity(), "documents": self.data.documents, "held_out": held_out}

    def micro_batch(self, number: int) -> Batch:
        size = self.data.micro_batch_size
        return as_batch(self.data[number], list(range(number * size, (number + 1) * size)))

    def batches(self, step: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
        first = step * self.micro_batches
        return [self.micro_batch(first + n) for n in range(rank, self.micro_batches, world_size)]

    def trained_tokens(self, step: int) -> int:
        if not self.data.documents:
            return self.tokens(step)
        return sum(count_targets(batch) for batch in self.batches(step))

    def tokens(self, step: int) -> int:
        return self.batch_size * self.data.block_length

    def longest(self) -> Batch:
        return self.micro_batch(0)


def micro_batch_rows(args: Pretraining, config: Config, block_length: int, device: torch.device) -> int:
    """Rows that are read at once."""
    devices, nodes = count_processes(args.devices, args.num_nodes)
    most = tokens_at_once(device, config.n_embd) // block_length
    return args.micro_batch_size or largest_divisor(args.batch_size // (devices * nodes), most)


def largest_divisor(n: int, most: int) -> int:
    """The largest divisor of n that is no more than `most`, and 1 at least."""
    return max((d for d in range(1, n + 1) if n % d == 0 and d <= most), default=1)


def hold_out(data: TokenData, fraction: float) -> np.ndarray:
    """Let the last blocks of each directory be read no more; returns how many: a part of them, no more than
    MOST_VALIDATED tokens in all. Raises ValueError where none would be left."""
    counts = np.zeros(len(data.sources), dtype=np.int64)
    most = max(1, MOST_VALIDATED // data.block_length // len(data.sources))
    for i, source in enumerate(data.sources if fraction > 0 else ()):
        counts[i] = min(most, max(1, round(fraction * source.n_blocks)))
        if counts[i] >= source.n_blocks:
            raise ValueError(
                f"{source.tokens.directory} has {source.n_blocks} blocks of {data.block_length} tokens, and {counts[i]}"
                " would be held out: give more text, a smaller --block_length, or --validation_fraction 0."
            )
    left = [s._replace(n_blocks=s.n_blocks - int(n)) for s, n in zip(data.sources, counts, strict=True)]
    data.sources = left
    return counts


def as_batch(blocks: TokenBatch, numbers: list[int]) -> Batch:
    """Whole rows, (B, T); or where documents are kept apart all of them in one, (1, B * T)."""
    if blocks.lengths is None:
        return Batch(blocks.inputs.contiguous(), blocks.targets.contiguous(), None, numbers)
    return Batch(blocks.inputs.reshape(1, -1), blocks.targets.reshape(1, -1), blocks.documents, numbers)


def count_targets(batch: Batch) -> int:
    return int((batch.targets != IGNORED).sum())


# --------------------------------------------------------------------------------------------------------- validation


class TokenValidation:
    """Blocks of token directories to validate on: see lit_swa.training.loop.Validation."""

    def __init__(self, blocks: list[tuple[TokenDirectory, int]], data: TokenData, lengths: np.ndarray) -> None:
        """blocks: of which directory, and the number of the block. data: how they are read. lengths: token_bytes."""
        self.blocks, self.data, self.lengths = blocks, data, lengths
        found = list(self.batches())
        self.trained_tokens = sum(count_targets(batch) for batch in found)
        targets = [batch.targets[batch.targets != IGNORED].numpy() for batch in found]
        self.text_bytes = sum(int(lengths[ids].sum()) for ids in targets)  # of the tokens that are predicted
        if not self.text_bytes:
            raise ValueError("What is validated on holds no text: give validation_data, or other data.")

    @property
    def identity(self) -> str:
        listed = [[tokens.digest, number] for tokens, number in self.blocks]
        content = [listed, self.data.block_length, self.data.documents]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def batches(self) -> Iterator[Batch]:
        T, size = self.data.block_length, self.data.micro_batch_size
        for first in range(0, len(self.blocks), size):
            chosen = self.blocks[first : first + size]
            ids, lengths = np.empty((len(chosen), T + 1), dtype=np.int64), []
            for row, (tokens, number) in zip(ids, chosen, strict=True):
                tokens.read(number * T, row)
                lengths.append(tokens.document_lengths(number * T, T + 1) if self.data.documents else [])
            blocks = TokenBatch(torch.from_numpy(ids), lengths if self.data.documents else None)
            yield as_batch(blocks, list(range(first, first + len(chosen))))

    def head(self) -> "TokenValidation":
        return TokenValidation(self.blocks[: self.data.micro_batch_size], self.data, self.lengths)

    def bits_per_byte(self, loss: float) -> float:
        """loss: the mean of -log p over the tokens that are predicted."""
        return loss * self.trained_tokens / (math.log(2) * self.text_bytes)


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each token stands for, in UTF-8; special tokens stand for none."""
    space = tokenizer.token_to_id("\u0120")
    by_byte = space is not None and tokenizer.decode([space]) == " "  # a character of a token is a byte, as in GPT-2
    lengths = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for i in range(len(lengths)):
        token = tokenizer.id_to_token(i)
        if token is None or not tokenizer.decode([i]) and tokenizer.decode([i], skip_special_tokens=False):
            continue
        if by_byte and all(is_byte(c) for c in token):
            lengths[i] = len(token)
        else:
            piece = re.fullmatch(r"<0x[0-9A-F]{2}>", token)
            lengths[i] = 1 if piece and not by_byte else len(token.replace("\u2581", " ").encode())
    return lengths


def is_byte(character: str) -> bool:
    """True for the 256 characters by which GPT-2's vocabulary (Radford et al. 2019) writes bytes."""
    n = ord(character)
    return 33 <= n <= 126 or 161 <= n <= 172 or 174 <= n < 324


# -------------------------------------------------------------------------------------------------------------- a run


@dataclass
class PretrainingRun(Run):
    """A run that reads blocks of tokens."""

    base_dir: Path | None  # the checkpoint that it goes on from
    config: Config
    tokenizer: Tokenizer
    valid: TokenValidation | None
    windows: Windows | None  # of the steps, where they differ

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.valid is not None:
            self.log.beside = lambda loss: {"bits_per_byte": self.valid.bits_per_byte(loss)}
        precision = torch.bfloat16 if self.args.precision == "bf16-mixed" else self.dtype
        peak, length = peak_flops(self.fabric.device, precision), self.feed.data.block_length
        flops = None if self.feed.data.documents else token_flops(self.config, length)
        if peak is not None and flops is not None:
            self.log.token_share = flops / (peak * self.fabric.world_size)

    def samples(self) -> str:
        ids = self.feed.longest().idx[0, :64].tolist()
        return f"the first row begins: {' '.join(self.tokenizer.decode(ids).split())}"

    def identity(self) -> dict[str, Any]:
        base = None if self.base_dir is None else base_identity(self.base_dir)
        windows = None if self.windows is None else asdict(self.windows)
        return {**super().identity(), "base": base, "model": deciding_fields(self.config), "windows": windows}

    def loss_in_words(self, loss: float) -> str:
        return f"{self.valid.bits_per_byte(loss):.4f} bits per byte"

    def show_sample(self, model: GPT, tokens: int = 40) -> None:
        """Go on, at a temperature of 0.8, from the beginning of the text that is validated on."""
        room = min(tokens, self.config.block_size // 2)
        prompt = next(self.valid.batches()).idx[0, : min(16, self.config.block_size - room)].tolist()
        model.eval()
        sampling = {"max_new_tokens": room, "temperature": 0.8, "seed": self.args.seed}
        written = "".join(generate_text(model, self.tokenizer, prompt, stop_tokens=self.tokenizer.eos_ids, **sampling))
        model.clear_kv_cache()
        model.train()
        asked = " ".join(self.tokenizer.decode(prompt).split())
        self.log.say(f"  {asked} | {' '.join(written.split())}")


def prepare_pretraining(args: Pretraining) -> PretrainingRun:
    """Processes, tokenizer, tokens, the model's shape, and what is read. Raises ValueError or OSError for what does not
    fit, before any weight is made."""
    out_dir = args.out_dir or Path("out/pretrain")
    find_run(args.resume, out_dir)
    fabric, dtype = start_fabric(args)
    base_dir = None
    if args.checkpoint_dir is not None:
        with fabric.rank_zero_first():
            base_dir = find_checkpoint(args.checkpoint_dir)
        check_checkpoint_dir(base_dir)
        tensors = open_weights(base_dir)  # refuses an adapter
        require_dense(read_quantization(base_dir), base_dir, "train the checkpoint that it was made of")
        check_tensors(find_config(args, base_dir, 0), tensors, base_dir)
    check_shape(args, find_config(args, base_dir, args.tokenizer_vocab_size), fabric)  # text to tokens may take hours
    with fabric.rank_zero_first():
        tokenizer = find_tokenizer(args, base_dir, out_dir)
        config = find_config(args, base_dir, tokenizer.vocab_size)
        check_vocabulary(tokenizer, config, base_dir)
        directory = find_tokens(args.data, out_dir / "tokens", tokenizer)
        valid_directory = args.validation_data and find_tokens(args.validation_data, out_dir / "validation", tokenizer)
    block_length = block_length_of(args, config)
    rows = micro_batch_rows(args, config, block_length, fabric.device)
    feed = TokenFeed(args, directory, tokenizer, config, block_length, rows)
    run = PretrainingRun(
        args=args,
        fabric=fabric,
        dtype=dtype,
        out_dir=out_dir,
        feed=feed,
        valid=find_validation(feed, valid_directory, tokenizer, config),
        peak_rate=args.learning_rate or default_rate(config, base_dir is not None),
        base_dir=base_dir,
        config=config,
        tokenizer=tokenizer,
        windows=plan_windows(args, config, block_length),
    )
    run.log.say(describe_run(run))
    return run


def find_config(args: Pretraining, base_dir: Path | None, vocab_size: int) -> Config:
    """The config to train: a checkpoint's, or a new one with a vocabulary of that size. Raises ValueError."""
    return load_config(base_dir).override(**args.model or {}) if base_dir else new_config(args, vocab_size)


def block_length_of(args: Pretraining, config: Config) -> int:
    return args.block_length or min(config.block_size, LONGEST_BLOCK)


def check_shape(args: Pretraining, config: Config, fabric: "Fabric") -> None:
    """Raises ValueError for a model and rows that do not fit each other or the processes."""
    block_length = block_length_of(args, config)
    check_context(config, block_length, "block_length")
    check_layers(args, config)
    plan_windows(args, config, block_length)
    rows = micro_batch_rows(args, config, block_length, fabric.device)
    if args.batch_size % (rows * fabric.world_size):
        raise ValueError(
            f"batch_size={args.batch_size} does not fit {fabric.world_size} processes with micro-batches of {rows} "
            "rows: make it a multiple of their product."
        )


def check_vocabulary(tokenizer: Tokenizer, config: Config, base_dir: Path | None) -> None:
    """Raises ValueError where the tokenizer has ids that the model has no rows for."""
    if (size := model_vocab_size(tokenizer)) > config.vocab_size:
        remedy = "leave --model.vocab_size out" if base_dir is None else "give the model's own tokenizer"
        raise ValueError(
            f"The vocabulary of {tokenizer.checkpoint_dir} has {size} tokens, and the model's has "
            f"{config.vocab_size}: {remedy}."
        )


def find_tokenizer(args: Pretraining, base_dir: Path | None, out_dir: Path) -> Tokenizer:
    """The tokenizer that is given, or the checkpoint's, or one that is trained on the text. Raises OSError or
    ValueError."""
    if given := args.tokenizer_dir or base_dir:
        return Tokenizer(given)
    if is_token_directory(Path(args.data)):
        raise ValueError(f"{args.data} holds tokens and no tokenizer: give the one that made them as --tokenizer_dir.")
    made = out_dir / "tokenizer"
    if not has_tokenizer(made):
        train_tokenizer([Path(args.data)], args.tokenizer_vocab_size, made)
    tokenizer, wanted = Tokenizer(made), args.tokenizer_vocab_size
    asked = read_json(made / "tokenizer_config.json").get(ASKED) or max(wanted, tokenizer.vocab_size)
    if asked != wanted:
        raise ValueError(
            f"{made} was trained to at most {asked} tokens, and tokenizer_vocab_size is {wanted}: choose another "
            "--out_dir, or give it as --tokenizer_dir."
        )
    return tokenizer


def is_token_directory(path: Path) -> bool:
    """True for what scripts/prepare_text.py wrote, complete or not."""
    return any((path / name).is_file() for name in (INDEX, MIXTURE, JOB)) or any(path.glob("tokens-*.bin"))


def find_tokens(data: str, written: Path, tokenizer: Tokenizer) -> Path:
    """The directory of tokens that `data` is, or the one that its text is written to. Raises OSError or ValueError."""
    path = Path(data)
    if is_token_directory(path):
        return path
    job = make_jobs(written, tokenizer.checkpoint_dir, [path], Selection())[0]
    prepare(job, count_cores())
    return written


def new_config(args: Pretraining, vocab_size: int) -> Config:
    """The config of a named shape, or of a small one, with a vocabulary of that size. Raises ValueError."""
    rows = -(-vocab_size // ROUNDED) * ROUNDED
    fields = {"vocab_size": vocab_size, "padded_vocab_size": rows}
    given = args.model or {}
    if "vocab_size" in given:
        fields["padded_vocab_size"] = None
    if args.name is not None:
        return Config.from_name(args.name, **fields | given)
    return Config.from_dict({}, **LESSON | fields | given)


def find_validation(
    feed: TokenFeed, directory: Path | None, tokenizer: Tokenizer, config: Config
) -> TokenValidation | None:
    """What was held out of the feed's directories, or the beginning of another one. Raises OSError or ValueError."""
    data, blocks = feed.data, []
    if directory is not None:
        other = TokenData(directory, data.block_length, 1, tokenizer=tokenizer, vocab_size=config.vocab_size)
        most = max(1, MOST_VALIDATED // data.block_length // len(other.sources))
        blocks = [(s.tokens, i) for s in other.sources for i in range(min(most, s.n_blocks))]
    else:
        for source, n in zip(data.sources, feed.held_out, strict=True):
            blocks += [(source.tokens, source.n_blocks + i) for i in range(n)]
    return TokenValidation(blocks, data, token_bytes(tokenizer)) if blocks else None


def default_rate(config: Config, goes_on: bool) -> float:
    """The rate after the warmup: for small models 3e-3; beyond, what Kaplan et al. 2020 (arXiv 2001.08361, app. D.6)
    found for so many weights. A tenth of it where a model goes on."""
    n = count_weights(config)
    rate = 3e-3 if n < SMALL else max(1e-4, 0.003239 - 0.0001395 * math.log(n))
    return float(f"{rate * (0.1 if goes_on else 1):.2g}")


def describe_run(run: PretrainingRun) -> str:
    feed, valid = run.feed, run.valid
    held = 0 if valid is None else valid.trained_tokens
    per_step = feed.tokens(0)
    return (
        f"{count_weights(run.config):,} weights, {feed.data.n_tokens:,} tokens of data of a vocabulary of "
        f"{run.tokenizer.vocab_size:,}, {held:,} tokens to validate on. {run.steps} steps of {per_step:,} tokens read "
        f"it {run.steps / feed.steps_per_epoch:.2g} times."
    )


def new_model(run: PretrainingRun) -> GPT:
    """The checkpoint to go on from, or random weights that depend on the seed alone; with z-loss if it is asked for."""
    if run.base_dir is not None:
        gpt = load_model(run.base_dir, run.dtype, loading_device(run.fabric), **run.args.model or {})
    else:
        with run.fabric.device:
            gpt = GPT(run.config)
        gpt.init_weights(run.args.seed)
    if run.args.z_loss > 0:
        add_z_loss(gpt, run.args.z_loss)
    return gpt.train()


def add_z_loss(model: GPT, weight: float) -> None:
    """Add weight * log(Z)^2 to the loss of each token in training (Chowdhery et al. 2022, arXiv 2204.02311, section 5).

    Z is the sum of a token's exponentiated logits: the softmax leaves it free, and it may drift.
    """

    def token_losses(x: Tensor, targets: Tensor) -> Tensor:
        if not model.training:
            return type(model).token_losses(model, x, targets)
        logits = model.project(x)[:, : model.config.vocab_size].float()
        nll = F.cross_entropy(logits, targets, reduction="sum")
        return nll + weight * logits.logsumexp(dim=-1).square().sum()

    model.token_losses = token_losses


def tell_pretrained(run: PretrainingRun, progress: Progress, final: Path) -> None:
    """Say which weights are the result, and how to use them."""
    if (best := run.best_step(progress)) is not None:
        run.log.say(f"{final} holds the weights of step {best}: {run.loss_in_words(progress.best)}")
    run.log.say(f"trained: python generate/base.py --checkpoint_dir {final} --prompt ...")
