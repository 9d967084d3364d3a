"""A checkpoint in blocks of layers, on the disk: split, and put together again with what each block has learned.

out_dir/block-NNN is all that a machine needs to train a block:

    lit_model.safetensors   the layers' weights, with the names that they have in the checkpoint
    block.json              which layers they are, of which checkpoint, and how they become linear; written last
    inputs/                 what the block reads: see block_inputs.py
    train/                  its run of stage 1; train/final/features.safetensors is what it has learned

Weights are read and written one at a time.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_swa.config import BY_LAYER, Config
from lit_swa.formats.adapter_files import base_identity, load_finite
from lit_swa.formats.directory import (
    MAX_SHARD_BYTES,
    STEM,
    build_config,
    check_tensors,
    copy_tokenizer,
    load_config,
    open_weights,
    write_checkpoint,
)
from lit_swa.formats.files import (
    TEMPORARY,
    LazyTensor,
    as_lazy,
    directory_lock,
    find_inside,
    format_bytes,
    named_when_full,
    open_safetensors,
    read_json,
    remove_directory,
    remove_leftovers,
    replace_directory,
    require_space,
    write_json,
    write_safetensors,
    write_weights,
)
from lit_swa.formats.hugging_face import expected_shapes
from lit_swa.linearize import LINEAR
from lit_swa.training.resuming import RUN_FILE, difference

BLOCK_FILE, INPUTS_FILE, FEATURES_FILE = "block.json", "inputs.json", "features.safetensors"
BLOCK_NAME = re.compile(r"block-([0-9]{3,6})")
INPUTS, TRAIN, STITCHED = "inputs", "train", "stitched"  # directories

INPUTS_AGAIN = "--step inputs --resume restart makes it anew"
SPLIT_AGAIN = "delete its directory, and run --step shard again"
OTHER = {"block": "as another block", "inputs": "on other inputs"}


@dataclass(frozen=True)
class Block:
    """Some layers in a row of a checkpoint, and how they become linear."""

    number: int  # counted from 0
    layers_per_block: int  # the last block may have fewer
    base: str  # the checkpoint's identity
    attention: str  # of the softmax model
    model: dict[str, Any]  # the fields of the linear model's config

    @property
    def config(self) -> Config:
        """The whole linear model's."""
        return Config.from_dict(self.model)

    @property
    def count(self) -> int:
        """Blocks of the model."""
        return -(-self.config.n_layer // self.layers_per_block)

    @property
    def layers(self) -> range:
        first = self.number * self.layers_per_block
        return range(first, min(first + self.layers_per_block, self.config.n_layer))

    @property
    def softmax(self) -> list[str]:
        """What the block's layers are in the softmax model."""
        whole = self.config.override(attention=self.attention)
        return [whole.layer_variants[i] for i in self.layers]

    @property
    def linear_layers(self) -> list[int]:
        """Which of them become linear."""
        variants = self.config.layer_variants
        return [i for i in self.layers if variants[i] == LINEAR]

    @property
    def share(self) -> float:
        """The part of the model's linear layers that it has."""
        return len(self.linear_layers) / self.config.layer_variants.count(LINEAR)

    def part_of(self, variants: Sequence[str]) -> Config:
        """The config of a model that is this block alone, with layers of these variants. It is given what comes out of
        an embedding."""
        positions = ",".join(self.config.layer_positions[i] for i in self.layers)
        mlps = ",".join(self.config.layer_mlps[i] for i in self.layers)
        fitting = {"n_layer": len(self.layers), "attention": ",".join(variants), "positions": positions}
        fitting["mlp_class_name"] = mlps
        for field, name in BY_LAYER.items():
            if getattr(self.config, field) is not None:
                numbers = [getattr(self.config.of_layer(i), name) for i in self.layers]
                fitting |= {field: ",".join(map(str, numbers)), name: max(numbers)}
        fitting |= {"linear_teacher": None}  # its pattern counts the whole model's layers
        return self.config.override(**fitting, scale_embeddings=False, embedding_multiplier=1.0, tie_embeddings=False)

    def local(self, name: str) -> str:
        """The name that a weight of the checkpoint has in the block alone."""
        layer, _, rest = name.removeprefix("transformer.h.").partition(".")
        return f"transformer.h.{int(layer) - self.layers[0]}.{rest}"

    def names(self, names: Mapping[str, Any]) -> list[str]:
        """Those of the checkpoint's weights that are the block's."""
        wanted = {f"transformer.h.{i}" for i in self.layers}
        return [name for name in names if ".".join(name.split(".")[:3]) in wanted]


def block_dir(out_dir: Path, number: int) -> Path:
    return out_dir / f"block-{number:03d}"


def there(out_dir: Path) -> list[int]:
    """The numbers of the blocks that are in out_dir."""
    found = [BLOCK_NAME.fullmatch(path.parent.name) for path in out_dir.glob(f"block-*/{BLOCK_FILE}")]
    return sorted(int(match[1]) for match in found if match)


def read_block(out_dir: Path, number: int) -> Block:
    """Raises FileNotFoundError or ValueError for a block that is not there, or that the model does not have."""
    known = there(out_dir)
    if number not in known and known and not number < (count := parse_block(out_dir, known[0]).count):
        raise ValueError(f"Block {number} is out of range: {out_dir} has the blocks 0 to {count - 1}.")
    if number not in known:
        raise FileNotFoundError(f"{block_dir(out_dir, number)} is missing or incomplete: --step shard makes it.")
    return parse_block(out_dir, number)


def read_own(directory: Path, name: str, remedy: str) -> dict[str, Any]:
    """What a file of a block says. Raises ValueError, with this remedy, when it is damaged."""
    path = find_inside(directory, name)
    try:
        return read_json(path)
    except ValueError:
        raise ValueError(f"{directory / name} is damaged: {remedy}.") from None


def parse_block(out_dir: Path, number: int) -> Block:
    path = block_dir(out_dir, number) / BLOCK_FILE
    content = read_own(path.parent, BLOCK_FILE, SPLIT_AGAIN)
    kinds = {f.name: dict if f.name == "model" else f.type for f in fields(Block)}
    proper = content.keys() == kinds.keys() and all(type(content[name]) is kind for name, kind in kinds.items())
    if not proper or content["number"] != number or content["layers_per_block"] < 1:
        raise ValueError(f"{path} is damaged: {SPLIT_AGAIN}.")
    block = Block(**content)
    config = build_config(Config.from_dict, block.model, path)
    build_config(lambda values: config.override(**values), {"attention": block.attention}, path)
    if number >= block.count:
        raise ValueError(f"{path} is damaged: its model has {block.count} blocks; run --step shard again.")
    return block


# ---------------------------------------------------------------------------------------------------------------- split


def plan_blocks(checkpoint_dir: Path, config: Config, layers_per_block: int) -> list[Block]:
    """The blocks of a checkpoint that becomes linear as config says. Raises ValueError for a damaged one."""
    base, tensors = load_config(checkpoint_dir), open_weights(checkpoint_dir)
    check_tensors(config.override(attention=base.attention), tensors, checkpoint_dir)
    count, identity = -(-base.n_layer // layers_per_block), base_identity(checkpoint_dir)
    return [Block(n, layers_per_block, identity, base.attention, config.to_dict()) for n in range(count)]


def split_checkpoint(
    checkpoint_dir: Path, out_dir: Path, blocks: Sequence[Block], only: int | None, replace: bool, say: Callable
) -> None:
    """Write each block, or the one with the number `only`, that is not there yet.

    replace: delete blocks of another split. Raises ValueError for one without it; OSError, with nothing incomplete
    under a block's name, when the disk is full.
    """
    refuse_others(out_dir, blocks, replace)
    tensors = open_weights(checkpoint_dir)
    chosen = [block for block in blocks if only in (None, block.number)]
    left = [block for block in chosen if not is_whole(out_dir, block, tensors)]
    sizes = {block.number: sum(tensors[name].n_bytes for name in block.names(tensors)) for block in left}
    say(f"{len(left)} of {len(chosen)} blocks are to be written: {format_bytes(sum(sizes.values()))}.")
    out_dir.mkdir(parents=True, exist_ok=True)
    require_space(out_dir, sum(sizes.values()))
    for block in left:
        directory = block_dir(out_dir, block.number)
        with directory_lock(directory):
            remove_leftovers(directory)
            write_weights(directory, STEM, {name: tensors[name] for name in block.names(tensors)}, MAX_SHARD_BYTES)
            write_json(directory / BLOCK_FILE, asdict(block))
        say(f"{directory}: layers {describe(block.layers)}, {format_bytes(sizes[block.number])}")


def is_whole(out_dir: Path, block: Block, tensors: Mapping[str, LazyTensor]) -> bool:
    """True if the block is there, with all its weights. tensors: the checkpoint's."""
    directory, shapes = block_dir(out_dir, block.number), {name: tensors[name].shape for name in block.names(tensors)}
    with suppress(ValueError, OSError):
        held = {name: tensor.shape for name, tensor in open_weights(directory).items()}
        return (directory / BLOCK_FILE).is_file() and held == shapes
    return False


def refuse_others(out_dir: Path, blocks: Sequence[Block], replace: bool) -> None:
    """Raises ValueError for a block of another split, or deletes it."""
    for number in there(out_dir):
        path, now = block_dir(out_dir, number), asdict(blocks[number]) if number < len(blocks) else {}
        if (held := read_own(path, BLOCK_FILE, SPLIT_AGAIN)) == now:
            continue
        if not replace:
            what = difference(held, now) if now else f"it is block {number}, and there are {len(blocks)} now"
            raise ValueError(
                f"{path} belongs to another split ({what}): use the same arguments as before, another --out_dir, or "
                "--resume restart, which deletes it with what it has learned."
            )
        remove_directory(path)


def describe(layers: range) -> str:
    return f"{layers[0]} to {layers[-1]}" if len(layers) > 1 else str(layers[0])


# --------------------------------------------------------------------------------------------------------------- stitch


def write_features(directory: Path, state: Mapping[str, Tensor], block: Block) -> None:
    """What a block has learned, with the names of the whole model. state: of the model that is the block alone."""
    names = {block.local(name): name for name in feature_shapes(block)}
    tensors = {names[name]: as_lazy(tensor) for name, tensor in state.items() if name in names}
    assert len(tensors) == len(names)
    write_safetensors(directory / FEATURES_FILE, tensors)


def feature_shapes(block: Block) -> dict[str, tuple[int, ...]]:
    shapes = expected_shapes(block.config)
    return {name: shapes[name] for name in block.names(shapes) if ".attn.mixer." in name}


def read_features(directory: Path, block: Block) -> dict[str, LazyTensor]:
    """Raises ValueError when they are not all there, or not numbers."""
    path, shapes, remedy = directory / FEATURES_FILE, feature_shapes(block), f"train block {block.number} again"
    try:
        tensors = open_safetensors(find_inside(directory, FEATURES_FILE))
    except (ValueError, OSError):
        raise ValueError(f"{path} is missing or damaged: {remedy} with --resume restart.") from None
    for name in sorted(tensors.keys() | shapes.keys()):
        if name not in tensors or tensors[name].shape != shapes.get(name) or not tensors[name].dtype.is_floating_point:
            raise ValueError(f"{path} has no proper {name[:80]!r}: {remedy} with --resume restart.")
        load_finite(tensors[name], name, path)
    return tensors


def find_blocks(out_dir: Path, checkpoint_dir: Path) -> list[Block]:
    """All blocks of a checkpoint. Raises an error that names those that are missing, or are not its own."""
    known = there(out_dir)
    if not known:
        raise FileNotFoundError(f"{out_dir} holds no blocks: --step shard makes them.")
    first = parse_block(out_dir, known[0])
    if missing := sorted(set(range(first.count)) - set(known)):
        names = ", ".join(block_dir(out_dir, n).name for n in missing)
        raise FileNotFoundError(f"{out_dir} lacks {names} of its {first.count} blocks: --step shard makes them.")
    blocks = [parse_block(out_dir, n) for n in known]
    for block in blocks:
        now = asdict(first) | {"number": block.number}
        if asdict(block) != now:
            raise ValueError(
                f"{block_dir(out_dir, block.number)} is of another split than {block_dir(out_dir, first.number)} "
                f"({difference(asdict(block), now)}): --step shard --resume restart makes it anew."
            )
    if base_identity(checkpoint_dir) != first.base:
        raise ValueError(
            f"The blocks of {out_dir} are not of the weights in {checkpoint_dir}: give the checkpoint that was split."
        )
    return blocks


def trained_identity(out_dir: Path, block: Block) -> dict[str, Any]:
    """What a block's final features were trained on. Raises ValueError where that is no longer what is there."""
    directory = block_dir(out_dir, block.number)
    final = directory / TRAIN / "final"
    again = f"train block {block.number} again with --resume restart"
    identity = read_own(final, RUN_FILE, again).get("identity")
    if not isinstance(identity, dict) or not {"block", "inputs"} <= identity.keys():
        raise ValueError(f"{final / RUN_FILE} is damaged: {again}.")
    expected = {"block": asdict(block)}
    if (directory / INPUTS / INPUTS_FILE).exists():
        expected["inputs"] = read_own(directory / INPUTS, INPUTS_FILE, INPUTS_AGAIN).get("identity")
    for key, value in expected.items():
        if identity[key] != value:
            raise ValueError(
                f"{final} is stale: it was trained {OTHER[key]} ({difference(identity[key], value)}); {again}."
            )
    return {name: value for name, value in identity["inputs"].items() if name != "first_layer"}


def find_trained(out_dir: Path, blocks: Sequence[Block]) -> dict[int, Path]:
    """The directories with what the blocks have learned. Raises an error that names what is missing or stale."""
    learning = [block for block in blocks if block.linear_layers]
    finals = {block.number: block_dir(out_dir, block.number) / TRAIN / "final" for block in learning}
    if missing := [str(path) for path in finals.values() if not (path / RUN_FILE).is_file()]:
        raise FileNotFoundError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: train each block to its end with "
            "--step train --block N."
        )
    first = trained_identity(out_dir, learning[0])
    for block in learning[1:]:
        if (inputs := trained_identity(out_dir, block)) != first:
            raise ValueError(
                f"{finals[block.number]} is stale: it was trained on other inputs than "
                f"{finals[learning[0].number]} ({difference(inputs, first)}); save both inputs and train again."
            )
    return finals


def stitch(checkpoint_dir: Path, out_dir: Path) -> Path:
    """A checkpoint of the linear model: the weights of checkpoint_dir, and what every block has learned."""
    blocks = find_blocks(out_dir, checkpoint_dir)
    tensors, config = open_weights(checkpoint_dir), blocks[0].config
    for number, final in find_trained(out_dir, blocks).items():
        tensors |= read_features(final, blocks[number])
    check_tensors(config, tensors, out_dir)
    path, temporary = out_dir / STITCHED, out_dir / f".{STITCHED}{TEMPORARY}"
    with directory_lock(out_dir), named_when_full(out_dir):
        remove_leftovers(out_dir)
        temporary.mkdir()
        try:
            copy_tokenizer(checkpoint_dir, temporary)
            write_checkpoint(temporary, tensors, config, MAX_SHARD_BYTES)
            replace_directory(temporary, path)
        finally:
            remove_leftovers(out_dir)
    return path
