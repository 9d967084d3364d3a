"""The arguments that scripts share, with what they mean: each script's --help shows them."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from lit_swa.checks import check_range


@dataclass
class Loop:
    """What every training script is told of its data, its loop and its devices.

    Args:
        out_dir: The run's directory: saved steps to resume from, metrics.csv, and at the end final/, which
            generate/base.py loads. By default out/ and the script's name.
        validation_fraction: The part of the data that is held out; 0 for none.
        batch_size: Rows (without --pack: examples) of one optimiser step, over all devices.
        micro_batch_size: Rows that one device reads at once; gradients accumulate until the step's rows are read. By
            default as many as make 1024 tokens on a CPU, and on a GPU, by the model's width and the GPU's memory, 8192
            to 32768.
        learning_rate: The rate after the warmup. By default one that suits the method and the model's size.
        warmup_steps: Steps over which the rate rises from zero. By default 20, at most a tenth of the run; more than
            the run has are cut to a tenth.
        weight_decay: AdamW's weight decay, for matrices only.
        beta2: AdamW's beta2; its beta1 is 0.9.
        grad_clip: Largest norm of a step's gradient; 0 for no limit.
        precision: 32-true; bf16-true (frozen weights and matrix products in bfloat16, trained weights in float32); or
            bf16-mixed (autocast). By default bf16-true on a GPU that supports it, and 32-true elsewhere.
        device: auto, cpu or cuda.
        devices: Number of devices on each machine, with a process each. torchrun and SLURM may start them instead.
        num_nodes: Number of machines.
        strategy: ddp holds the whole model on each device; fsdp shards weights, gradients and moments over devices.
        shard_size: With fsdp, shard over groups of so many devices, such as those of one machine; each group holds the
            whole model. By default all devices are one group.
        recompute: How many layers compute their activations again in the backward to save memory: auto (as few as the
            memory allows), all, none, a number, or offload: all, what they are computed from waits in the CPU's memory,
            and MLPs read 16,384 tokens at a time.
        compile: Compile what is around attention in each layer, and linear attention. It takes a while at the start,
            and makes steps faster.
        eval_interval: Steps between validations. By default a tenth of the run.
        early_stop: Stop after so many validations without a better loss, and keep the weights of the best one in
            final/; 0 for never.
        save_interval: Steps between saves. By default a tenth of the run.
        keep_last: How many saved steps to keep.
        log_interval: Steps between rows of metrics.csv.
        tensorboard: Write TensorBoard's files too, to out_dir/tensorboard.
        chunk_size: Read a longer text in chunks of so many tokens, with the gradients of one pass: memory grows by one
            window of keys a chunk. By default a text is read whole.
        chunk_offload: What is kept between chunks waits in the CPU's memory.
        resume: auto goes on with the run in out_dir; never refuses an out_dir that holds a run; restart deletes it once
            the new one is known to start.
        dry_run: Stop before the first step, after showing samples, trying the longest micro-batch, validation, saving
            and loading, and telling how much memory and disk the run needs.
        seed: Decides the order of the data, dropout and new weights.
        model: Any field of the model's config, as --model.FIELD VALUE (--model.help lists them).
    """

    LENGTH: ClassVar[str]  # the argument that makes rows shorter
    LESS: ClassVar[str]  # what takes less memory
    data: str
    out_dir: Path | None = None
    validation_fraction: float = 0.05
    batch_size: int = 8
    micro_batch_size: int | None = None
    learning_rate: float | None = None
    warmup_steps: int | None = None
    weight_decay: float = 0.0
    beta2: float = 0.95
    grad_clip: float = 1.0
    precision: Literal["auto", "32-true", "bf16-true", "bf16-mixed"] = "auto"
    device: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: Literal["ddp", "fsdp"] = "ddp"
    shard_size: int | None = None
    recompute: str | int = "auto"
    compile: bool = False
    eval_interval: int | None = None
    early_stop: int = 0
    save_interval: int | None = None
    keep_last: int = 1
    log_interval: int = 1
    tensorboard: bool = False
    chunk_size: int | None = None
    chunk_offload: bool = False
    resume: Literal["auto", "never", "restart"] = "never"
    dry_run: bool = False
    seed: int = 1234
    model: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in RANGES.items():
            value = getattr(self, name, None)  # not every script has all of them
            if value is not None:
                check_range(name, value, least, most)
        if 0 < self.grad_clip < 1e-6:
            raise ValueError(
                f"grad_clip={self.grad_clip!r} does not fit: it must be 0 for no limit, or at least 1e-06."
            )
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError("learning_rate must be greater than 0.")
        if isinstance(self.recompute, str) and self.recompute.isdigit():
            self.recompute = int(self.recompute)
        if isinstance(self.recompute, int):
            check_range("recompute", self.recompute, 0, 2**31)
        elif self.recompute not in ("auto", "all", "none", "offload"):
            raise ValueError(f"recompute={self.recompute!r} does not fit: choose auto, all, none, offload or a number.")
        if self.shard_size is not None and self.strategy != "fsdp":
            raise ValueError(f"shard_size={self.shard_size} has no effect with strategy='ddp': use --strategy fsdp.")
        if self.chunk_offload and self.chunk_size is None:
            raise ValueError("chunk_offload has no effect without chunks: also set chunk_size.")
        if self.chunk_size is not None and self.strategy == "fsdp":
            raise ValueError("chunk_size needs the whole model on each device: use --strategy ddp, or leave it out.")

    def as_json(self) -> dict[str, Any]:
        """The arguments, as JSON can hold them."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


@dataclass
class Training(Loop):
    """What is trained on which data, for how long, and where the results go.

    Args:
        data: A .json, .jsonl, .csv or .parquet file of instructions or chats; .txt or .bin files to extend the context;
            a directory or file that prepare_instruct.py or prepare_text.py wrote; or the name of a published dataset,
            such as alpaca or dolly.
        checkpoint_dir: The model to start from. By default SmolLM2-135M-Instruct, which is downloaded once.
        validation_data: A file to validate on. By default a part of the data is held out.
        preset: Read a local file with the fields and the prompt of this published dataset.
        prompt_style: How an instruction is written as a prompt: chat (the model's own template), alpaca, llama2, ...
        mask_prompt: Train the answers only, not the prompts.
        max_seq_length: Longer examples are cut to so many tokens. By default the longest example, at most the context.
        pack: Put several short examples into one row of max_seq_length tokens. No example sees the others.
        limit: Read only so many examples of the data.
        epochs: How often the data is read.
        max_steps: Optimiser steps, in place of epochs.
        lr_schedule: cosine falls to a tenth of the rate; plateau halves it when the validation loss stops falling.
        sample: At a validation, show the model's answer to the first prompt that is validated on when it has changed;
            not with --strategy fsdp.
    """

    LENGTH = "--max_seq_length"
    LESS = "finetune/lora.py with --quantize nf4"
    checkpoint_dir: Path | None = None
    validation_data: str | None = None
    preset: str | None = None
    prompt_style: str | None = None
    mask_prompt: bool = True
    max_seq_length: int | None = None
    pack: bool = True
    limit: int | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    lr_schedule: Literal["cosine", "constant", "plateau"] = "cosine"
    sample: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs <= 0:
            raise ValueError("epochs must be greater than 0.")


@dataclass
class Pretraining(Loop):
    """Which model is trained on which text, for how long, and where the results go.

    Args:
        data: Text: a .txt, .jsonl (also .gz or .zst), .csv or .parquet file or a directory of them, which is written as
            tokens into out_dir/tokens first; or a directory that scripts/prepare_text.py wrote.
        name: A named shape to train from random weights, such as TinyLlama-1.1B. By default one of about 1M weights.
            Fields of --model replace those of the shape.
        checkpoint_dir: A model to go on from, in place of a shape and random weights.
        tokenizer_dir: A directory with a tokenizer, such as scripts/train_tokenizer.py writes. By default that of
            checkpoint_dir; without either one is trained on the text, into out_dir/tokenizer.
        tokenizer_vocab_size: How many tokens a tokenizer has at most that is trained here.
        validation_data: Text or a directory of tokens to validate on, written to out_dir/validation. By default the end
            of the data is held out.
        block_length: Tokens of a row. By default the model's context, at most 2048.
        documents: Keep documents apart: none sees, or is predicted from, another one in its row.
        max_steps: Optimiser steps.
        batch_size: Rows of one optimiser step, over all devices.
        optimizer: adamw; or muon, for the matrices of the blocks, with AdamW for the rest. Both at one rate.
        lr_schedule: cosine falls to a tenth of the rate; wsd (warmup, stable, decay) keeps the rate and falls to zero
            over the last part of the run.
        decay_fraction: The part of the run over which wsd falls.
        z_loss: The weight of the mean of log(Z)^2, Z the sum of a token's exponentiated logits; it keeps logits small.
        window_schedule: Windows to train with one after the other, each with the part of the run from which on it
            holds, such as 256:0,512:0.3,1024:0.6. The last is the model's sliding_window_size.
        random_window: Each step draws its window: this one, or its double, and so on, up to sliding_window_size.
        sample: At a validation, show how the model goes on from a text that is held out; not with --strategy fsdp.
    """

    LENGTH = "--block_length"
    LESS = "a smaller model"
    name: str | None = None
    checkpoint_dir: Path | None = None
    tokenizer_dir: Path | None = None
    tokenizer_vocab_size: int = 1024
    validation_data: str | None = None
    block_length: int | None = None
    documents: bool = False
    max_steps: int = 400
    batch_size: int = 4
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr_schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    z_loss: float = 0.0
    window_schedule: str | None = None
    random_window: int | None = None
    sample: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is not None and self.checkpoint_dir is not None:
            raise ValueError("A model has a shape already: give --name or --checkpoint_dir, not both.")
        if self.window_schedule is not None and self.random_window is not None:
            raise ValueError("window_schedule and random_window are two ways to choose a step's window: give one.")
        if self.decay_fraction != type(self).decay_fraction and self.lr_schedule != "wsd":
            raise ValueError(
                f"decay_fraction={self.decay_fraction} has no effect with lr_schedule={self.lr_schedule!r}: use "
                "--lr_schedule wsd."
            )
        if self.optimizer == "muon" and self.strategy == "fsdp":
            raise ValueError("muon needs whole matrices on each device: use --strategy ddp, or --optimizer adamw.")


RANGES: dict[str, tuple[float, float]] = {
    "validation_fraction": (0.0, 0.9),
    "max_seq_length": (2, 2**31),
    "block_length": (2, 2**31),
    "tokenizer_vocab_size": (257, 2**24),
    "decay_fraction": (0.0, 1.0),
    "z_loss": (0.0, 1.0),
    "random_window": (1, 2**31),
    "limit": (1, 2**31),
    "epochs": (0.0, 1e6),
    "max_steps": (1, 2**31),
    "batch_size": (1, 2**20),
    "micro_batch_size": (1, 2**20),
    "learning_rate": (0.0, 10.0),
    "warmup_steps": (0, 2**31),
    "weight_decay": (0.0, 10.0),
    "beta2": (0.0, math.nextafter(1.0, 0.0)),
    "grad_clip": (0.0, 1e9),
    "chunk_size": (1, 2**31),
    "devices": (1, 4096),
    "num_nodes": (1, 4096),
    "shard_size": (1, 2**24),
    "eval_interval": (1, 2**31),
    "early_stop": (0, 2**31),
    "save_interval": (1, 2**31),
    "keep_last": (1, 1000),
    "log_interval": (1, 2**31),
    "seed": (0, 2**31),
}


@dataclass
class Generation:
    """Which text is completed by which model, and how.

    Args:
        prompt: The text to go on from; several --prompt are completed one after the other. "-" reads standard input.
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
        num_samples: How many completions of a prompt to print.
        seed: The same seed gives the same text; each further completion of a prompt takes the next seed.
        device: auto, cpu, cuda or mps.
        dtype: float32, bfloat16 or float16; auto is bfloat16 on a GPU and float32 on a CPU.
        compile: Compile the decode step, which takes a while at the start and makes each token faster.
        quantize: Hold weights in 8 or 4 bits, chosen while they are read: int8, int4 or int4-hqq, which make single
            tokens faster too; nf4 or fp4, with bitsandbytes. scripts/quantize.py does it once and better.
        profile: Write a trace of some decode steps of the first completion to this file, for ui.perfetto.dev, and print
            on stderr which operations took longest.
        model: Any field of the model's config, as --model.FIELD VALUE (--model.help lists them), such as
            --model.attention sliding --model.sliding_window_size 256 --model.rolling_kv_cache true.
    """

    prompt: list[str] | str = "Once upon a time, in a small village by the sea,"
    checkpoint_dir: Path | None = None
    base_checkpoint_dir: Path | None = None
    max_new_tokens: int = 100
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: list[str] | None = None
    num_samples: int = 1
    seed: int = 1234
    device: str = "auto"
    dtype: str = "auto"
    compile: bool = False
    quantize: Literal["int8", "int4", "int4-hqq", "nf4", "nf4-dq", "fp4", "fp4-dq"] | None = None
    profile: Path | None = None
    model: dict[str, Any] | None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


SHARED = {
    "training": Training,
    "pretraining": Pretraining,
    "generation": Generation,
}  # what a script's **arguments are, by their name
