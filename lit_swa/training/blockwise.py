"""What finetune/linearize_blockwise.py does around its loop: which arguments a step reads, a block as a model, its run.

A block alone is a GPT of its layers whose embedding gives rows of the block's inputs, and which nothing comes behind.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn

from lit_swa.arguments import Training
from lit_swa.checks import check_range
from lit_swa.config import Config
from lit_swa.formats.adapter_files import base_identity
from lit_swa.formats.checkpoint import check_checkpoint_dir, fill_model, load_config, loaded_bytes, set_tensor
from lit_swa.formats.directory import open_weights, read_quantization
from lit_swa.formats.download import find_checkpoint
from lit_swa.formats.files import format_bytes, require_space
from lit_swa.formats.hugging_face import empty_model
from lit_swa.formats.quantized import require_dense
from lit_swa.formats.tokenizer import Tokenizer
from lit_swa.linearize import LINEAR, linear_config, make_linear
from lit_swa.memory import require_memory
from lit_swa.model import GPT
from lit_swa.rope import RoPE
from lit_swa.training.block_inputs import (
    Inputs,
    Rows,
    Table,
    Texts,
    begin_inputs,
    make_table,
    missing_bytes,
    refuse_other_inputs,
    write_parts,
)
from lit_swa.training.blocks import (
    INPUTS,
    INPUTS_AGAIN,
    TRAIN,
    Block,
    block_dir,
    describe,
    plan_blocks,
    read_block,
    split_checkpoint,
    stitch,
    write_features,
)
from lit_swa.training.distribution import start_fabric
from lit_swa.training.feed import ExampleFeed, ExampleValidation, tokens_at_once
from lit_swa.training.finetuning import read_data
from lit_swa.training.linearizing import error_in_words, validate_transfer
from lit_swa.training.loop import Progress, Run
from lit_swa.training.resuming import difference, find_run, require_no_file
from lit_swa.training.saving import note_validation
from lit_swa.utils import ProgressLine, print_line

# ------------------------------------------------------------------------------------------------------------ arguments

OF_DATA = (
    "checkpoint_dir", "data", "validation_data", "validation_fraction", "preset", "prompt_style", "mask_prompt",
    "limit", "max_seq_length",
)  # fmt: skip
OF_INPUTS = {*OF_DATA, "out_dir", "micro_batch_size", "precision", "device", "resume", "seed", "block"}
READ = {  # step -> the arguments that it reads; None: all but those of the other steps
    "shard": {"checkpoint_dir", "out_dir", "resume", "model", "block", "layers_per_block"},
    "inputs": OF_INPUTS,
    "train": None,
    "stitch": {"checkpoint_dir", "out_dir"},
}
NOT_IN_TRAINING = {*OF_DATA, "model", "layers_per_block", "recompute", "sample", "chunk_size", "chunk_offload"}


def check_arguments(step: str, args: Training, own: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises ValueError for an argument that the step would not read. own: the script's, each with its default."""
    given = {f.name for f in fields(Training) if f.name not in own and getattr(args, f.name) != DEFAULTS[f.name]}
    given |= {name for name, (value, plain) in own.items() if value != plain}
    unread = given & NOT_IN_TRAINING if READ[step] is None else given - READ[step]
    if unread:
        readers = [s for s in READ if name_is_read(min(unread), s)]
        remedy = f"give it to {' and '.join(readers)}" if readers else "leave it out"
        raise ValueError(f"--step {step} does not read --{min(unread)}: {remedy}.")
    if step == "train" and own["block"][0] is None:
        raise ValueError("--step train trains one block: give its number as --block.")
    if step == "inputs" and not args.data:
        raise ValueError("--step inputs reads texts: give them as --data.")


DEFAULTS = {f.name: f.default for f in fields(Training)} | {"data": ""}


def name_is_read(name: str, step: str) -> bool:
    return name not in NOT_IN_TRAINING if READ[step] is None else name in READ[step]


# --------------------------------------------------------------------------------------------------- a block as a model


def load_block(
    out_dir: Path, block: Block, variants: Sequence[str], dtype: torch.dtype, device: torch.device, inputs: Inputs
) -> GPT:
    """A block alone, its layers of these variants of softmax attention: tokens are numbers of rows of `inputs`."""
    directory = block_dir(out_dir, block.number)
    model = headless(block.part_of(variants), Rows(inputs, dtype, device))
    try:
        stored = open_weights(directory)
    except (ValueError, OSError):  # named below
        stored = {}
    tensors = {block.local(name): stored[name] for name in block.names(stored)}
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for name in sorted(shapes.keys() | tensors.keys()):
        if name not in tensors or tensors[name].shape != shapes.get(name):
            raise ValueError(f"{directory} is damaged: it has no proper weight {name}; run --step shard again.")
    what = f"The weights of block {block.number}, as {str(dtype).removeprefix('torch.')} on {device},"
    require_memory(loaded_bytes(tensors, dtype, device), device, what, "use --precision bf16-true or smaller blocks")
    model.rope = RoPE(model.config)
    model.rope.to(device)
    fill_model(model, tensors, dtype, device, None, None)
    return model.eval()


def headless(config: Config, embedding: nn.Module) -> GPT:
    """A GPT whose weights are empty, with another embedding and nothing behind its blocks."""
    model = empty_model(config)
    model.transformer.wte, model.transformer.ln_f, model.lm_head = embedding, nn.Identity(), nn.Identity()
    return model


def load_block_student(run: "BlockRun") -> GPT:
    """The run's block with linear attention that has learned nothing yet."""
    block = run.block
    model = load_block(run.blocks_dir, block, block.softmax, run.dtype, run.fabric.device, run.inputs)
    variants = block.config.layer_variants
    make_linear(model, block.part_of([variants[i] for i in block.layers]))
    return model.train()


def load_embedding(checkpoint_dir: Path, dtype: torch.dtype, device: torch.device) -> GPT:
    """A model that has nothing but its embedding."""
    config = load_config(checkpoint_dir)
    model = headless(config, empty_model(config).transformer.wte)
    model.transformer.h = nn.ModuleList()
    weight = open_weights(checkpoint_dir)["transformer.wte.weight"].load()
    set_tensor(model.transformer.wte, "weight", weight.to(device), dtype)
    return model.eval()


# ----------------------------------------------------------------------------------------------- steps without training


def shard(args: Training, out_dir: Path, layers_per_block: int, only: int | None) -> None:
    """Split the checkpoint, one block or all."""
    check_range("layers_per_block", layers_per_block, 1, 4096)
    require_no_file(out_dir)
    checkpoint_dir = find_base(args)
    base = load_config(checkpoint_dir)
    if LINEAR in base.layer_variants:
        raise ValueError(f"{checkpoint_dir} is linear already (attention={base.attention!r}): give a softmax model.")
    config = linear_config(base, args.model or {})
    if config.linear_off:
        raise ValueError("linear_off switches off what is trained: leave it out.")
    blocks = plan_blocks(checkpoint_dir, config, layers_per_block)
    if only is not None and only >= len(blocks):
        raise ValueError(f"Block {only} is out of range: {base.n_layer} layers make the blocks 0 to {len(blocks) - 1}.")
    split_checkpoint(checkpoint_dir, out_dir, blocks, only, args.resume == "restart", print_line)


def find_base(args: Training) -> Path:
    checkpoint_dir = find_checkpoint(args.checkpoint_dir)
    check_checkpoint_dir(checkpoint_dir)
    open_weights(checkpoint_dir)  # refuses an adapter
    require_dense(read_quantization(checkpoint_dir), checkpoint_dir, "split the checkpoint that it was made of")
    return checkpoint_dir


@dataclass
class Saving:
    """What the inputs of blocks are made with."""

    checkpoint_dir: Path
    out_dir: Path
    blocks: dict[int, Block]  # those whose inputs are made, and those before them
    texts: Texts
    tables: dict[int, Table]
    dtype: torch.dtype
    fabric: Any
    tokens: int  # that are read at once

    def directory(self, n: int) -> Path:
        return block_dir(self.out_dir, n) / INPUTS


def save_inputs(args: Training, out_dir: Path, only: int | None) -> None:
    """Write what each block reads, or the block `only`: block after block, each from the one before."""
    saving, numbers = plan_saving(args, out_dir, only)
    needed = sum(missing_bytes(saving.directory(n), saving.tables[n]) for n in numbers)
    table, n_tokens = saving.tables[numbers[0]], int(saving.texts.lengths.sum())
    print_line(
        f"{n_tokens} tokens of {len(saving.texts.lengths)} texts, {table.row_bytes} bytes each: "
        f"{format_bytes(n_tokens * table.row_bytes)} for a block. What is missing of {len(numbers)} blocks needs "
        f"{format_bytes(needed)} of the disk under {out_dir}."
    )
    require_space(out_dir, needed)
    for n in numbers:
        make_inputs(saving, n, args.resume == "restart")


def plan_saving(args: Training, out_dir: Path, only: int | None) -> tuple[Saving, list[int]]:
    """What is needed, and the numbers of the blocks whose inputs are made."""
    checkpoint_dir, first = find_base(args), read_block(out_dir, only or 0)
    if base_identity(checkpoint_dir) != first.base:
        raise ValueError(
            f"The blocks of {out_dir} are not of the weights in {checkpoint_dir}: give the checkpoint that was split."
        )
    numbers = [only] if only is not None else list(range(first.count))
    blocks = {n: read_block(out_dir, n) for n in {*numbers, *(n - 1 for n in numbers if n > 0)}}
    if args.devices * args.num_nodes > 1:
        raise ValueError("--step inputs reads with one device: leave devices out.")
    fabric, dtype = start_fabric(args)
    base = first.config.override(attention=first.attention)
    texts = Texts(*read_data(args, Tokenizer(checkpoint_dir), base))
    length = args.max_seq_length or min(int(texts.lengths.max()), base.block_size)
    identity = {"base": first.base, **texts.identity, "mixed_precision": args.precision == "bf16-mixed"}
    tables = {
        n: make_table(texts, identity | {"first_layer": block.layers[0]}, dtype, base.n_embd, length)
        for n, block in blocks.items()
    }
    tokens = args.micro_batch_size and args.micro_batch_size * length
    tokens = tokens or max(length, tokens_at_once(fabric.device, base.n_embd))
    return Saving(checkpoint_dir, out_dir, blocks, texts, tables, dtype, fabric, tokens), numbers


def make_inputs(saving: Saving, n: int, replaces: bool) -> None:
    """The inputs of block n, or what is missing of them. replaces: in place of others, which are deleted once there is
    what the new ones are made from."""
    directory, table, lengths = saving.directory(n), saving.tables[n], saving.texts.lengths
    if not replaces:
        refuse_other_inputs(directory, table)
    makes = missing_bytes(directory, table) > 0
    model, ids = load_reader(saving, n) if makes else (None, None)
    begin_inputs(directory, table, lengths)
    if makes:
        line, what = ProgressLine(int(lengths.sum()), "token", interval=10.0), f"inputs of block {n}"
        with saving.fabric.autocast():
            write_parts(directory, table, lengths, model, ids, saving.tokens, lambda done: line.show(done, what))
    print_line(f"{directory}: {len(table.parts)} parts, {format_bytes(sum(table.parts) * table.row_bytes)}")


def load_reader(saving: Saving, n: int) -> tuple[GPT, Callable[[int], np.ndarray]]:
    """A model that makes the inputs of block n, and what it reads of a text."""
    device = saving.fabric.device
    if n == 0:
        return load_embedding(saving.checkpoint_dir, saving.dtype, device), saving.texts.ids
    before, inputs = saving.blocks[n - 1], read_inputs(saving.directory(n - 1), saving.tables[n - 1])
    return load_block(saving.out_dir, before, before.softmax, saving.dtype, device, inputs), inputs.numbers


def read_inputs(directory: Path, table: Table) -> Inputs:
    """Inputs that must be this table. Raises ValueError, which says what differs, when they are not."""
    inputs = Inputs(directory)
    if inputs.table != table:
        what = difference(inputs.table._asdict(), table._asdict())
        raise ValueError(f"{directory} is stale ({what}): {INPUTS_AGAIN}.")
    return inputs


def stitch_blocks(args: Training, out_dir: Path) -> None:
    path = stitch(find_base(args), out_dir)
    print_line(f"stitched: python finetune/linearize.py --checkpoint_dir {path} --stage1_steps 0 --data ...")


# ------------------------------------------------------------------------------------------------------- a block's run


@dataclass
class BlockRun(Run):
    """A run of stage 1 on a block alone. It needs nothing but the block's directory."""

    blocks_dir: Path
    block: Block
    inputs: Inputs

    def identity(self) -> dict[str, Any]:
        """What was read, and which layers of which model are trained."""
        return {**super().identity(), "block": asdict(self.block), "inputs": self.inputs.table.identity}

    def samples(self) -> str:
        block, table = self.block, self.inputs.table
        return (
            f"Block {block.number} of {block.count} (layers {describe(block.layers)}): {len(block.linear_layers)} "
            f"layers learn to be linear from {sum(table.parts)} tokens, {table.trained} texts that are trained on and "
            f"{len(self.inputs.lengths) - table.trained} that are validated on."
        )


def prepare_block(args: Training, out_dir: Path, number: int, schedule: str | None) -> BlockRun:
    """The run of a block. schedule: None: plateau, or constant where nothing is validated on."""
    block = read_block(out_dir, number)
    if not block.linear_layers:
        raise ValueError(f"Block {number} has no layer that becomes linear: it stays as it is.")
    if args.strategy == "fsdp":
        raise ValueError("strategy='fsdp' does not fit, as a device holds a whole block: use ddp, or smaller blocks.")
    directory = block_dir(out_dir, number)
    find_run(args.resume, directory / TRAIN)
    inputs = Inputs(directory / INPUTS)
    held = {name: inputs.table.identity.get(name) for name in ("base", "first_layer")}
    if held != (now := {"base": block.base, "first_layer": block.layers[0]}):
        raise ValueError(
            f"{inputs.directory} is stale: it was made for other layers ({difference(held, now)}); --step inputs "
            "--resume restart makes it anew."
        )
    fabric, dtype = start_fabric(args)
    data, held_out = inputs.datasets()
    table = inputs.table
    feed = ExampleFeed(data, args, table.max_seq_length, tokens_at_once(fabric.device, table.width))
    return BlockRun(
        args=replace(args, lr_schedule=schedule or ("constant" if held_out is None else "plateau")),
        fabric=fabric,
        dtype=dtype,
        out_dir=directory / TRAIN,
        feed=feed,
        valid=held_out and ExampleValidation(held_out, feed.longest().idx.numel()),
        peak_rate=args.learning_rate,
        blocks_dir=out_dir,
        block=block,
        inputs=inputs,
    )


def save_block(run: BlockRun, model: GPT, directory: Path) -> None:
    """What the block has learned, as stitching reads it."""
    state = {name: t.to(run.dtype) for name, t in model.state_dict().items()}
    write_features(directory, state, run.block)


def evaluate_block(run: BlockRun, model: nn.Module, progress: Progress) -> float | None:
    """Measure and tell how far the attention outputs are from the softmax model's. None if nothing is validated on."""
    if run.valid is None:
        return None
    loss = validate_transfer(run.fabric, model, run.valid)
    note_validation(run, progress, loss, "--learning_rate, or save the inputs again in another precision")
    run.log.say(f"step {progress.step}: {error_in_words(loss, model)}")
    return loss
