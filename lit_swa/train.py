"""What the finetuning scripts share: the order of the data, the optimiser, saving and resuming, the try before step 1.

The loop itself stands in each script. Shapes: N tokens of a micro-batch, all its texts one behind the other.
"""

import csv
import json
import logging
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_swa.arguments import Training
from lit_swa.data import Dataset, Example, pack
from lit_swa.formats.files import (
    LOCK_NAME,
    TEMPORARY,
    LazyTensor,
    directory_lock,
    open_safetensors,
    read_json,
    remove_leftovers,
    sync_directory,
    write_json,
    write_safetensors,
)
from lit_swa.model import GPT, IGNORED, Config, RMSNorm
from lit_swa.utils import describe_machine, format_seconds, memory_in_use

if TYPE_CHECKING:
    from lightning.fabric import Fabric

STATE_FILE, RUN_FILE = "state.safetensors", "run.json"

# ---------------------------------------------------------------------------------------------------------- the machine


def start_fabric(args: Training) -> "tuple[Fabric, torch.dtype]":
    """Lightning Fabric with the processes that the arguments ask for, and the dtype of frozen weights and products.

    Raises ValueError when Lightning is missing or the machine lacks a device or dtype.
    """
    from lit_swa.utils import count_processes, pick_device

    try:
        from lightning.fabric import Fabric
        from lightning.fabric.strategies import DDPStrategy
    except ImportError:
        raise ValueError("Finetuning needs Lightning Fabric: pip install lightning.") from None
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # no hints to trade precision for speed
    device = pick_device(args.device)
    kind = device.split(":")[0]
    if kind == "cuda":
        use_whole_memory()
    precision = args.precision
    if precision == "auto":
        precision = "bf16-true" if kind == "cuda" and torch.cuda.is_bf16_supported() else "32-true"
    count, num_nodes = count_processes(args.devices, args.num_nodes)
    if kind == "cuda" and count > torch.cuda.device_count():
        raise ValueError(f"devices={count} does not fit: this machine has {torch.cuda.device_count()} GPUs.")
    devices = [int(device.split(":")[1])] if ":" in device and count == 1 else count
    strategy: Any = "auto"
    if args.strategy == "fsdp":
        strategy = fsdp_strategy(count * num_nodes)
    elif count * num_nodes > 1:
        strategy = DDPStrategy(broadcast_buffers=False)  # the only buffers are RoPE's frequencies
    fabric = Fabric(
        accelerator=kind,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        precision="bf16-mixed" if precision == "bf16-mixed" else "32-true",  # bf16-true is made by train_in_float32
    )
    fabric.launch()
    return fabric, torch.bfloat16 if precision == "bf16-true" else torch.float32


def use_whole_memory() -> None:
    """Let torch's allocator grow its pieces of a GPU's memory, so that none is lost between texts of many lengths.

    To be called before the GPU is first used. PYTORCH_CUDA_ALLOC_CONF or PYTORCH_ALLOC_CONF, if set, decides instead.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def fsdp_strategy(world_size: int) -> Any:
    """FSDP2: every block's weights are shared out over all devices and gathered when it is their turn."""
    from lightning.fabric.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    def shard(model: nn.Module, mesh: Any) -> nn.Module:
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh["data_parallel"])
        return fully_shard(model, mesh=mesh["data_parallel"])

    return ModelParallelStrategy(shard, data_parallel_size=world_size, tensor_parallel_size=1)


def train_in_float32(model: GPT, dtype: torch.dtype) -> int:
    """Keep what is trained in float32 though the model computes in `dtype`; returns how many modules that concerns.

    A small step would be lost in bfloat16's rounding. Each weight is rounded where it is used. What is injected (LoRA,
    adapters) does so by itself.
    """
    if dtype == torch.float32:
        return 0
    count = 0
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if not own or type(module) not in ROUNDED:
            continue
        for p in own:
            p.data = p.data.float()
        module.forward = ROUNDED[type(module)].__get__(module)
        module.compute_dtype = dtype
        count += 1
    return count


def rounded_linear(self: nn.Linear, x: Tensor) -> Tensor:
    bias = None if self.bias is None else self.bias.to(x.dtype)
    return F.linear(x, self.weight.to(x.dtype), bias)


def rounded_embedding(self: nn.Embedding, idx: Tensor) -> Tensor:
    return F.embedding(idx, self.weight).to(self.compute_dtype)


def rounded_norm(self: nn.Module, x: Tensor) -> Tensor:
    return type(self).forward(self, x.float()).to(x.dtype)


ROUNDED: dict[type, Callable[..., Tensor]] = {
    nn.Linear: rounded_linear,
    nn.Embedding: rounded_embedding,
    nn.LayerNorm: rounded_norm,
    RMSNorm: rounded_norm,
}


def recompute_blocks(model: GPT, n: int) -> None:
    """Let the first n layers make their activations again in the backward (Chen et al. 2016, arXiv 1604.06174)."""
    for i, block in enumerate(model.transformer.h):
        block.__dict__.pop("forward", None)
        if i < n:
            block.forward = RecomputedForward(type(block).forward.__get__(block))


class RecomputedForward:
    """A forward that keeps nothing but its input."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        self.forward = forward

    def __call__(self, *args: Any) -> Tensor:
        return checkpoint(self.forward, *args, use_reentrant=False, preserve_rng_state=True)


# ------------------------------------------------------------------------------------------------------------- the data


class Batch(NamedTuple):
    """Some texts in one row."""

    idx: Tensor  # (1, N) int64
    targets: Tensor  # (1, N) int64, the token that follows in the same text, or IGNORED
    documents: list[int]  # the texts' lengths
    examples: list[int]  # which of the data they are
    weight: float = 1.0  # 0: there was nothing left for this device, and it only keeps the others company

    def to(self, device: torch.device) -> "Batch":
        return self._replace(
            idx=self.idx.to(device, non_blocking=True), targets=self.targets.to(device, non_blocking=True)
        )


def join_examples(examples: Sequence[Example], numbers: Sequence[int]) -> Batch:
    """The texts of a micro-batch, each predicting its own next tokens and nothing of its neighbour's."""
    ids = np.concatenate([e.ids for e in examples]).astype(np.int64)
    nexts = [np.append(e.labels[1:], IGNORED) for e in examples]
    targets = np.concatenate(nexts).astype(np.int64)
    return Batch(
        torch.from_numpy(ids)[None], torch.from_numpy(targets)[None], [len(e.ids) for e in examples], list(numbers)
    )


MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}  # more at once is hardly faster, and takes memory


class Feed:
    """Which texts each step reads: a function of the step's number alone, so that a run can go on anywhere.

    Rows are texts, or several short ones packed. Every epoch has an order of its own; the longest row comes in the very
    first step, so that what does not fit the memory fails at once.
    """

    def __init__(self, dataset: Dataset, args: Training, max_seq_length: int, device: str = "cpu") -> None:
        self.dataset, self.seed, self.batch_size = dataset, args.seed, args.batch_size
        tokens = MICRO_BATCH_TOKENS.get(device, MICRO_BATCH_TOKENS["cpu"])
        self.micro_batch_size = args.micro_batch_size or min(args.batch_size, max(1, tokens // max_seq_length))
        packs = args.pack and len(dataset) > 1
        self.rows = pack(dataset.lengths, max_seq_length, args.seed) if packs else [[i] for i in range(len(dataset))]
        self.row_tokens = [int(sum(dataset.lengths[i] for i in row)) for row in self.rows]
        self.steps_per_epoch = math.ceil(len(self.rows) / self.batch_size)
        self.last_order: tuple[int, list[int]] = (-1, [])  # of which epoch

    def order(self, epoch: int) -> list[int]:
        """All rows, as the epoch reads them."""
        if self.last_order[0] != epoch:
            self.last_order = epoch, self.new_order(epoch)
        return self.last_order[1]

    def new_order(self, epoch: int) -> list[int]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows)).tolist()
        if epoch == 0:
            longest = order.index(int(np.argmax(self.row_tokens)))
            order[0], order[longest] = order[longest], order[0]
        return order

    def rows_of(self, step: int) -> list[int]:
        """The rows of a step, counted from 0; an epoch's last step may have fewer."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[within * self.batch_size : (within + 1) * self.batch_size]

    def trained_tokens(self, step: int) -> int:
        """Tokens that the step's loss is the mean of, over all devices."""
        return int(sum(self.dataset.trained[i] for row in self.rows_of(step) for i in self.rows[row]))

    def tokens(self, step: int) -> int:
        """Tokens that the step reads, over all devices."""
        return sum(self.row_tokens[row] for row in self.rows_of(step))

    def batches(self, step: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
        """This device's micro-batches of a step, at least one."""
        rows, size = self.rows_of(step), self.micro_batch_size
        micro = [rows[a : a + size] for a in range(0, len(rows), size)]
        own = micro[rank::world_size]
        return [self.join(m) for m in own] or [self.join(micro[0])._replace(weight=0.0)]

    def join(self, rows: Sequence[int]) -> Batch:
        numbers = [i for row in rows for i in self.rows[row]]
        return join_examples([self.dataset[i] for i in numbers], numbers)

    def longest(self) -> Batch:
        """The micro-batch that takes the most memory."""
        order = np.argsort(self.row_tokens)[::-1]
        return self.join(order[: self.micro_batch_size].tolist())


def validation_batches(dataset: Dataset, tokens: int) -> Iterator[Batch]:
    """The whole data set in order, in micro-batches of about so many tokens."""
    numbers: list[int] = []
    filled = 0
    for i, length in enumerate(dataset.lengths.tolist()):
        if numbers and filled + length > tokens:
            yield join_examples([dataset[n] for n in numbers], numbers)
            numbers, filled = [], 0
        numbers.append(i)
        filled += length
    if numbers:
        yield join_examples([dataset[n] for n in numbers], numbers)


@torch.no_grad()
def validate(fabric: "Fabric", model: nn.Module, dataset: Dataset, tokens: int) -> float:
    """Mean of -log p over all trained tokens of the data set, the same on every device. Dropout is off meanwhile."""
    model.eval()
    read = model if sharded(fabric) else unwrapped(model)  # each device its own batches: nothing to wait for
    total = torch.zeros((), dtype=torch.float64, device=fabric.device)
    for n, batch in enumerate(validation_batches(dataset, tokens)):
        if n % fabric.world_size == fabric.global_rank or sharded(fabric):  # a sharded model runs on all at once
            batch = batch.to(fabric.device)
            total += read(batch.idx, targets=batch.targets, documents=batch.documents).double()
    model.train()
    if fabric.world_size > 1 and not sharded(fabric):
        total = fabric.all_reduce(total, reduce_op="sum")
    return total.item() / int(dataset.trained.sum())


def sharded(fabric: "Fabric") -> bool:
    """True if no device holds all weights."""
    from lightning.fabric.strategies import ModelParallelStrategy

    return isinstance(fabric.strategy, ModelParallelStrategy)


# -------------------------------------------------------------------------------------------------------- the optimiser


def build_optimizer(model: nn.Module, args: Training, rate: float, b_ratio: float = 1.0) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) over what is trained. Matrices decay, vectors do not.

    b_ratio: how much faster LoRA's B matrices learn than the rest: LoRA+ (Hayou et al. 2024, arXiv 2402.12354).
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            ratio = b_ratio if ".lora" in name and name.endswith(".B") else 1.0
            groups.setdefault((ratio, args.weight_decay if p.dim() > 1 else 0.0), []).append(p)
    made = [{"params": ps, "weight_decay": decay, "ratio": ratio} for (ratio, decay), ps in groups.items()]
    fused = next(iter(groups.values()))[0].device.type == "cuda"
    return torch.optim.AdamW(made, lr=rate, betas=(0.9, args.beta2), fused=fused or None)


def learning_rate(step: int, steps: int, args: Training, peak: float, scale: float = 1.0) -> float:
    """The rate of a step, counted from 0: up over the warmup, then as lr_schedule says. scale: the plateau's."""
    if step < args.warmup_steps:
        return peak * (step + 1) / args.warmup_steps
    if args.lr_schedule != "cosine":
        return peak * (scale if args.lr_schedule == "plateau" else 1.0)
    done = (step - args.warmup_steps) / max(1, steps - args.warmup_steps)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


# -------------------------------------------------------------------------------------------------- saving and resuming


@dataclass
class Progress:
    """How far a run has come: all that a resumed one must know beside weights and moments."""

    step: int = 0
    tokens: int = 0  # read so far
    seconds: float = 0.0
    step_seconds: float = 0.0  # of the last step
    best: float | None = None  # validation loss
    since_best: int = 0  # validations
    plateau: int = 0  # ... since the rate was halved, too
    scale: float = 1.0

    def advance(self, tokens: int, seconds: float) -> None:
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + tokens, self.seconds + seconds
        self.step_seconds = seconds

    def note_validation(self, loss: float, patience: int = 2) -> None:
        if self.best is None or loss < self.best:
            self.best, self.since_best, self.plateau = loss, 0, 0
            return
        self.since_best, self.plateau = self.since_best + 1, self.plateau + 1
        if self.plateau >= patience:
            self.scale, self.plateau = self.scale / 2, 0


def trained_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Every trained weight and, with an optimiser, its moments, whole and on the CPU. All ranks must call it."""
    state: dict[str, Tensor] = {}
    reshard(model)
    for name, p in model.named_parameters():
        if p.requires_grad:
            state[f"weight.{name}"] = whole(p)
            for key, value in (optimizer.state.get(p, {}) if optimizer else {}).items():
                state[f"{key}.{name}"] = whole(value)
    return state


def reshard(model: nn.Module) -> None:
    """After a forward FSDP leaves some weights gathered: share them out again."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def whole(x: Tensor) -> Tensor:
    """x on the CPU, gathered if it is shared out over devices."""
    x = x.detach()
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).cpu()


@contextmanager
def whole_weights(model: nn.Module, keep: bool) -> Iterator[None]:
    """Within it, trained weights that are shared out over devices are whole, on the CPU, where `keep` is set.

    All ranks must come here, and none may run the model inside.
    """
    shared_out = []
    reshard(model)
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and p.requires_grad and hasattr(p, "full_tensor"):
                full = whole(p)
                if keep:
                    shared_out.append((module, name, p))
                    module._parameters[name] = nn.Parameter(full)
    try:
        yield
    finally:
        for module, name, p in shared_out:
            module._parameters[name] = p


@torch.no_grad()
def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, LazyTensor], where: Path) -> None:
    """Put back what trained_state took. Raises ValueError when it is another model's."""
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    saved = {name.removeprefix("weight.") for name in tensors if name.startswith("weight.")}
    if names != saved:
        other = sorted(names ^ saved)[0]
        raise ValueError(f"{where} was saved with other trained weights ({other}): use the same arguments as before.")
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if tuple(p.shape) != tensors[f"weight.{name}"].shape:
            raise ValueError(f"{where} has {name} in another shape: use the same arguments as before.")
        copy_into(p, tensors[f"weight.{name}"].load())
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"{key}.{name}" in tensors:
                value = tensors[f"{key}.{name}"].load()
                held = torch.zeros_like(p) if key != "step" else torch.zeros((), device=step_device(optimizer, p))
                copy_into(held, value)
                optimizer.state[p][key] = held


def step_device(optimizer: torch.optim.Optimizer, p: Tensor) -> torch.device:
    """Where AdamW counts its steps."""
    return p.device if optimizer.param_groups[0].get("fused") else torch.device("cpu")


def copy_into(held: Tensor, value: Tensor) -> None:
    """value into held, which may be shared out over devices."""
    if hasattr(held, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(held.device, held.dtype), held.device_mesh, held.placements)
    held.copy_(value)


class Saver:
    """Writes out_dir/step-N, whole or not at all, and removes older steps once a newer one is known to be good."""

    def __init__(
        self,
        run: "Run",
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        save_model: Callable[[Path], None],
        method: dict[str, Any],
    ) -> None:
        """save_model: writes what the next command loads. method: what it needs to have in common to go on, as JSON."""
        self.run, self.model, self.optimizer, self.save_model = run, model, optimizer, save_model
        self.identity = json.loads(json.dumps(identity_of(run, method)))
        self.saved = 0  # the last step that was

    def save_step(self, progress: "Progress") -> None:
        """out_dir/step-N, unless it is there."""
        if self.saved < progress.step:
            self.save(f"step-{progress.step:06d}", progress)
            self.saved = progress.step

    def save(self, name: str, progress: "Progress", state: bool = True) -> Path:
        """out_dir/name; with the state, a run can go on from it. All ranks must call it; the first one writes."""
        out_dir, fabric = self.run.out_dir, self.run.fabric
        path, tensors = out_dir / name, trained_state(self.model, self.optimizer) if state else {}
        with whole_weights(self.model, keep=fabric.is_global_zero):
            if fabric.is_global_zero:
                self.write(path, tensors, progress)
        fabric.barrier()
        return path

    def write(self, path: Path, tensors: Mapping[str, Tensor], progress: "Progress") -> None:
        """The directory, under another name until it is whole; older steps go after that."""
        out_dir, temporary = path.parent, path.parent / f".{path.name}{TEMPORARY}"
        with directory_lock(out_dir):
            remove_leftovers(out_dir)
            temporary.mkdir()
            self.save_model(temporary)
            if tensors:
                lazy = {n: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()}
                write_safetensors(temporary / STATE_FILE, lazy)
                open_safetensors(temporary / STATE_FILE)
            write_json(temporary / RUN_FILE, self.record(progress))
            (temporary / LOCK_NAME).unlink(missing_ok=True)
            if path.exists():
                shutil.rmtree(path)
            temporary.rename(path)
            sync_directory(out_dir)
            for old in saved_steps(out_dir)[: -self.run.args.keep_last]:
                shutil.rmtree(old, ignore_errors=True)

    def record(self, progress: "Progress") -> dict[str, Any]:
        return {
            "command": "python " + shlex.join(sys.argv),
            "machine": describe_machine(str(self.run.fabric.device)),
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
            "memory": memory_in_use(),
            "arguments": self.run.args.as_json(),
            "identity": self.identity,
            "progress": asdict(progress),
        }

    def resume(self) -> "Progress":
        """Weights, moments and progress of the run in out_dir, if there is one and --resume says so.

        Raises ValueError when there is one and --resume does not say what to do, or when it is of another run.
        """
        path = find_run(self.run.args, self.run.out_dir)
        if path is None:
            self.run.log.rewind(-1)  # of a run that ended before it saved anything
            return Progress()
        record = read_json(path / RUN_FILE)
        for key, value in self.identity.items():
            if value != (before := record["identity"].get(key)):
                raise ValueError(
                    f"{path} differs in its {key} ({str(before)[:60]}, now {str(value)[:60]}): use the same "
                    "arguments and data as before, or another --out_dir."
                )
        progress = Progress(**record["progress"])
        if progress.step > self.run.steps:
            raise ValueError(f"{path} is beyond the {self.run.steps} steps of this run: raise --max_steps or --epochs.")
        restore(self.model, self.optimizer, open_safetensors(path / STATE_FILE), path)
        self.run.log.rewind(progress.step)
        self.run.log.say(f"going on from {path}")
        self.saved = progress.step
        return progress


def saved_steps(out_dir: Path) -> list[Path]:
    """The complete steps of a run, oldest first. run.json is written last."""
    found = [p for p in out_dir.glob("step-*") if (p / RUN_FILE).is_file() and (p / STATE_FILE).is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")) if p.name[5:].isdigit() else -1)


def find_run(args: Training, out_dir: Path) -> Path | None:
    """The step to go on from, if there is one. Raises ValueError, goes on or starts anew, as --resume says."""
    steps, final = saved_steps(out_dir), out_dir / "final"
    if not steps and not final.exists():
        return None
    if args.resume == "never":
        there = steps[-1].name if steps else "final"
        raise ValueError(
            f"{out_dir} holds a run ({there}): --resume auto goes on with it, --resume restart deletes it, or choose "
            "another --out_dir."
        )
    if args.resume == "restart":
        for path in (*steps, final):
            shutil.rmtree(path, ignore_errors=True)
        (out_dir / "metrics.csv").unlink(missing_ok=True)
        return None
    if not steps:
        raise ValueError(f"{out_dir} has a final model and no step to go on from: choose another --out_dir.")
    return steps[-1]


# --------------------------------------------------------------------------------------------------------- what is told


METRICS = ("step", "loss", "learning_rate", "grad_norm", "tokens", "seconds", "val_loss")


def read_metrics(run: Path) -> dict[str, list[float]]:
    """The columns of a run's metrics.csv; NaN where there is no value. Raises FileNotFoundError or ValueError."""
    path = run / "metrics.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{run} holds no metrics.csv: give directories that a finetuning script wrote.")
    with open(path, newline="") as stream:
        rows = list(csv.DictReader(stream))
    try:
        return {name: [float(row[name] or "nan") for row in rows] for name in METRICS}
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is damaged: it must have the columns {', '.join(METRICS)}.") from None


def read_record(run: Path) -> dict[str, Any]:
    """How a run was started, with which versions and on what machine, as its newest directory has it."""
    found = [path for path in (run / "final", *reversed(saved_steps(run))) if (path / RUN_FILE).is_file()]
    return {key: read_json(found[0] / RUN_FILE).get(key) for key in ("command", "machine", "versions")} if found else {}


class Log:
    """metrics.csv, TensorBoard if asked for, and the line on stderr."""

    def __init__(self, out_dir: Path, args: Training, steps: int, active: bool) -> None:
        self.path, self.args, self.steps, self.active = out_dir / "metrics.csv", args, steps, active
        self.board, self.shown = None, -1e9
        if active and args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard needs a package: pip install tensorboard.") from None
            self.board = SummaryWriter(str(out_dir / "tensorboard"))

    def rewind(self, step: int) -> None:
        """Forget the lines of the steps after this one, which a resumed run makes again."""
        if self.active and self.path.exists():
            with open(self.path, newline="") as stream:
                rows = list(csv.reader(stream))
            kept = rows[:1] + [row for row in rows[1:] if row and row[0].isdigit() and int(row[0]) <= step]
            with open(self.path, "w", newline="") as stream:
                csv.writer(stream).writerows(kept)

    def write(self, step: int, **values: float) -> None:
        if not self.active:
            return
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(",".join(METRICS) + "\n")
        with open(self.path, "a", newline="") as stream:
            csv.writer(stream).writerow([step, *(repr(values[n]) if n in values else "" for n in METRICS[1:])])
        for name, value in values.items():
            if self.board is not None:
                self.board.add_scalar(name, value, step)

    def show(self, progress: "Progress", loss: float) -> None:
        """step 120/2000 6.0% | loss 2.310 | 410 ms | 40.1k tok/s | 7.2 GB | eta 12m"""
        now, terminal, step = time.perf_counter(), sys.stderr.isatty(), progress.step
        last = step == self.steps
        if not self.active or (not last and now - self.shown < (0.1 if terminal else 10.0)):
            return
        self.shown = now
        rate = progress.tokens / max(progress.seconds, 1e-9)
        parts = [
            f"step {step}/{self.steps} {step / self.steps:.1%}",
            f"loss {loss:.3f}",
            f"{progress.step_seconds * 1e3:.0f} ms",
            f"{rate / 1e3:.1f}k tok/s" if rate >= 1e4 else f"{rate:.0f} tok/s",
            memory_in_use(),
            f"eta {format_seconds(progress.seconds / step * (self.steps - step))}",
        ]
        line = " | ".join(p for p in parts if p)
        rewritten = terminal and not last
        print(f"\r\033[K{line}" if rewritten else line, end="" if rewritten else "\n", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if self.active:
            print(("\r\033[K" if sys.stderr.isatty() else "") + text, file=sys.stderr, flush=True)


def require_finite(run: "Run", step: int, loss: float, norm: float, batches: Sequence[Batch]) -> None:
    """Raises ValueError, naming the texts that were read, when a step's loss or gradient is no number."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = "loss" if not math.isfinite(loss) else "gradient"
    numbers = sorted({i for batch in batches for i in batch.examples})
    shown = ", ".join(map(str, numbers[:12])) + (", ..." if len(numbers) > 12 else "")
    kept = saved_steps(run.out_dir)
    remains = f"{kept[-1]} is untouched" if kept else "nothing was saved yet"
    raise ValueError(
        f"The {what} of step {step + 1} is {loss if what == 'loss' else norm}: it read the examples {shown} (counted "
        f"from 0) of the data; {remains}. Lower --learning_rate, or look at these examples."
    )


def gradient_norm(model: nn.Module, most: float) -> float:
    """The norm of all gradients, which are scaled down to `most` if it is greater; 0 for no limit."""
    params = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(params, most if most > 0 else math.inf)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


# ------------------------------------------------------------------------------------------ what stands around the loop


@dataclass
class Run:
    """What a script's loop needs, made once. It holds no loop."""

    args: Training
    fabric: "Fabric"
    dtype: torch.dtype  # of frozen weights and products
    checkpoint_dir: Path
    out_dir: Path
    config: Config
    tokenizer: Any
    train: Dataset
    valid: Dataset | None
    feed: Feed
    max_seq_length: int
    steps: int
    eval_interval: int
    save_interval: int
    peak_rate: float
    log: Log
    step_started: float = 0.0  # by time.perf_counter

    @property
    def valid_tokens(self) -> int:
        """Tokens of a validation micro-batch: no more than training reads at once, which is known to fit."""
        return self.feed.micro_batch_size * self.max_seq_length


def prepare(args: Training, method: str, rate: float) -> Run:
    """Processes, tokenizer, data, and how many steps there are. rate: the method's own learning rate.

    Raises ValueError or OSError for what does not fit, before any weight is read.
    """
    from lit_swa.data import unheard_end
    from lit_swa.formats.checkpoint import check_checkpoint_dir, load_config
    from lit_swa.formats.download import download_checkpoint
    from lit_swa.formats.tokenizer import Tokenizer

    fabric, dtype = start_fabric(args)
    checkpoint_dir = args.checkpoint_dir
    if checkpoint_dir is None:
        with fabric.rank_zero_first():
            checkpoint_dir = download_checkpoint()
    check_checkpoint_dir(checkpoint_dir)
    config = load_config(checkpoint_dir).override(**(args.model or {}))
    tokenizer = Tokenizer(checkpoint_dir)
    train, valid = read_data(args, tokenizer, config)
    longest = max(int(d.lengths.max()) for d in (train, valid) if d is not None)
    max_seq_length = args.max_seq_length or min(longest, config.block_size)
    feed = Feed(train, args, max_seq_length, fabric.device.type)
    steps = args.max_steps or max(1, round(args.epochs * feed.steps_per_epoch))
    out_dir = args.out_dir or Path("out") / method
    log = Log(out_dir, args, steps, active=fabric.is_global_zero)
    log.say(train.report + ("" if valid is None else f" {len(valid)} more are held out for validation."))
    if note := unheard_end(train, tokenizer):
        log.say(note)
    tenth = max(1, math.ceil(steps / 10))
    return Run(
        args, fabric, dtype, checkpoint_dir, out_dir, config, tokenizer, train, valid, feed, max_seq_length, steps,
        args.eval_interval or tenth, args.save_interval or tenth, args.learning_rate or rate, log,
    )  # fmt: skip


def read_data(args: Training, tokenizer: Any, config: Config) -> tuple[Dataset, Dataset | None]:
    """What is trained on, and what is validated on. Raises ValueError for data that would train nothing."""
    from lit_swa.data import check_dataset, load_dataset, split_dataset
    from lit_swa.evaluate import check_context

    length = args.max_seq_length or config.block_size
    check_context(config, length)
    how = {"max_seq_length": length, "prompt_style": args.prompt_style, "preset": args.preset}
    train = load_dataset(args.data, tokenizer, mask_prompt=args.mask_prompt, limit=args.limit, **how)
    check_dataset(train, tokenizer)
    if args.validation_data is not None:
        return train, load_dataset(args.validation_data, tokenizer, mask_prompt=args.mask_prompt, **how)
    if args.validation_fraction == 0 or len(train) < 2:
        return train, None
    return split_dataset(train, max(1, round(args.validation_fraction * len(train))), args.seed)


def identity_of(run: Run, method: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run must have in common with the one that was saved."""
    args = run.args
    return {
        "method": method,
        "data": run.train.fingerprint,
        "order": [run.feed.batch_size, args.seed, args.pack, run.max_seq_length],
        "optimiser": [
            run.peak_rate,
            args.lr_schedule,
            args.warmup_steps,
            args.weight_decay,
            args.beta2,
            args.grad_clip,
        ],
        "precision": str(run.dtype).removeprefix("torch.") if args.precision != "bf16-mixed" else "bf16-mixed",
        "steps": run.steps if args.lr_schedule == "cosine" else None,
    }


def choose_recompute(run: Run, model: GPT) -> int:
    """Make as many layers as --recompute says forget their activations; returns how many.

    auto: as many as it takes that the longest micro-batch leaves a tenth of the GPU's memory free. On a CPU none.
    """
    n, device = model.config.n_layer, run.fabric.device
    wanted = {"all": n, "none": 0}.get(run.args.recompute, run.args.recompute)
    if wanted == "auto" and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        wanted = fitting_recompute(model, run.feed.longest().to(device), int(0.9 * total))
    wanted = 0 if wanted == "auto" else min(int(wanted), n)
    recompute_blocks(model, wanted)
    return wanted


def fitting_recompute(model: GPT, batch: Batch, limit: int) -> int:
    """How many layers must recompute so that a step on a GPU stays below `limit` bytes.

    What one layer keeps is measured, and the peak of a step in which none keeps anything. The optimiser's moments, of
    what is trained, are counted too.
    """
    device, n = batch.idx.device, model.config.n_layer
    recompute_blocks(model, n)
    torch.cuda.reset_peak_memory_stats(device)
    model(batch.idx, targets=batch.targets, documents=batch.documents).backward()
    model.zero_grad(set_to_none=True)
    moments = 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    peak = torch.cuda.max_memory_allocated(device) + moments
    recompute_blocks(model, n - 1)
    with torch.no_grad():
        call = model.plan_call(batch.idx, None, None, batch.documents)
        x = model.transformer.wte(batch.idx)
    x.requires_grad_()
    before = torch.cuda.memory_allocated(device)
    kept = model.transformer.h[n - 1](x, call)
    of_a_layer = torch.cuda.memory_allocated(device) - before
    del kept, call, x
    return n - max(0, min(n, (limit - peak) // max(1, of_a_layer)))


def rehearse(run: Run, model: nn.Module, save_model: Callable[[Path], None], load: Callable[[Path], None]) -> None:
    """Once, before the first step, all that would else fail after hours: the longest rows forward and backward,
    validation, saving and loading. Nothing is left of it. Says what the run will need.

    save_model: writes what the next command loads. load: reads it back as the next command would, and merges.
    Raises whatever fails, and OSError when the disk has not the room for the run.
    """
    from lit_swa.data import show_examples
    from lit_swa.formats.files import require_space

    fabric, out_dir = run.fabric, run.out_dir
    run.log.say(show_examples(run.train, run.tokenizer))
    started = time.perf_counter()
    batch = run.feed.longest().to(fabric.device)
    nll = model(batch.idx, targets=batch.targets, documents=batch.documents)
    loss = nll / int((batch.targets != IGNORED).sum())
    if not math.isfinite(loss.item()):
        raise ValueError(f"The loss is {loss.item()} before the first step: the weights or the precision do not fit.")
    fabric.backward(loss)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, f"{without[:3]} got no gradient"
    model.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    if run.valid is not None:
        head = min(len(run.valid), 4)
        validate(fabric, model, run.valid.subset(np.arange(head), ""), run.valid_tokens)
    with whole_weights(unwrapped(model), keep=fabric.is_global_zero):
        size = try_saving(run, save_model, load) if fabric.is_global_zero else 0
    if fabric.is_global_zero:
        kept = run.args.keep_last + 1  # a new one is whole before the old one goes
        needed = (kept + 1) * size + kept * 12 * trained  # weights and two moments in float32
        run.log.say(
            f"{trained:,} of {sum(p.numel() for p in model.parameters()):,} weights are trained. The longest row has "
            f"{batch.idx.numel()} tokens: {seconds:.1f} s, {memory_in_use()} of memory. The disk needs "
            f"{needed / 1e9:.2f} GB under {out_dir}. {run.steps} steps of {run.feed.batch_size} rows."
        )
        require_space(out_dir, needed)
    fabric.barrier()


def try_saving(run: Run, save_model: Callable[[Path], None], load: Callable[[Path], None]) -> int:
    """Save, load and delete; returns the bytes that it took."""
    run.out_dir.mkdir(parents=True, exist_ok=True)
    trial = run.out_dir / f".trial{TEMPORARY}"
    with directory_lock(run.out_dir):
        shutil.rmtree(trial, ignore_errors=True)
        try:
            trial.mkdir()
            save_model(trial)
            load(trial)
            return sum(p.stat().st_size for p in trial.rglob("*"))
        finally:
            shutil.rmtree(trial, ignore_errors=True)


def steps(
    run: Run, optimizer: torch.optim.Optimizer, progress: Progress, interrupted: Callable[[], bool]
) -> Iterator[tuple[list[Batch], int]]:
    """The steps that are left: this device's micro-batches, and how many trained tokens there are on all devices.

    Sets the rate. Dropout of a step depends on the step alone, so that a resumed run goes on as if it had not stopped.
    Ends when any of the processes was interrupted.
    """
    fabric, args = run.fabric, run.args
    while progress.step < run.steps:
        stop = torch.tensor(float(interrupted()), device=fabric.device)
        if fabric.all_reduce(stop, reduce_op="sum") > 0:
            return
        run.step_started = time.perf_counter()
        seed = np.random.SeedSequence([args.seed, progress.step, fabric.global_rank]).generate_state(1)[0]
        torch.manual_seed(int(seed))
        rate = learning_rate(progress.step, run.steps, args, run.peak_rate, progress.scale)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        batches = run.feed.batches(progress.step, fabric.global_rank, fabric.world_size)
        yield [batch.to(fabric.device) for batch in batches], run.feed.trained_tokens(progress.step)


def finish_gradients(
    run: Run, model: GPT, progress: Progress, nll: Tensor, tokens: int, batches: Sequence[Batch]
) -> dict[str, float]:
    """Clip the gradients; returns what metrics.csv has of the step: loss, learning_rate, grad_norm.

    nll: the sum over this device's tokens. Raises ValueError when loss or gradient is no number.
    """
    loss = run.fabric.all_reduce(nll, reduce_op="sum").item() / tokens
    norm = gradient_norm(model, run.args.grad_clip)
    require_finite(run, progress.step, loss, norm, batches)
    rate = learning_rate(progress.step, run.steps, run.args, run.peak_rate, progress.scale)
    return {"loss": loss, "learning_rate": rate, "grad_norm": norm}


def show_sample(run: Run, model: GPT, tokens: int = 40) -> None:
    """What the model answers, greedily, to the first prompt that is validated on."""
    from lit_swa.generate import generate

    if run.valid is None or sharded(run.fabric) or not run.fabric.is_global_zero:
        return
    example = run.valid[0]
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


def finish_step(run: Run, model: nn.Module, saver: Saver, progress: Progress, values: dict[str, float]) -> bool:
    """Count and log a step, validate and save where it is time; True: --early_stop has had enough."""
    progress.advance(run.feed.tokens(progress.step), time.perf_counter() - run.step_started)
    step, last = progress.step, progress.step == run.steps
    stop = (step % run.eval_interval == 0 or last) and evaluate_step(run, model, progress, values)
    if step % run.args.log_interval == 0 or "val_loss" in values:
        run.log.write(step, tokens=progress.tokens, seconds=progress.step_seconds, **values)
    run.log.show(progress, values["loss"])
    if step % run.save_interval == 0:
        saver.save_step(progress)
    return stop


def evaluate_step(run: Run, model: nn.Module, progress: Progress, values: dict[str, float]) -> bool:
    """Validate, and show what the model answers. True: --early_stop has had enough. Adds val_loss to the values."""
    if run.valid is None:
        return False
    loss = validate(run.fabric, model, run.valid, run.valid_tokens)
    values["val_loss"] = loss
    progress.note_validation(loss)
    if progress.step == 0:
        run.log.write(0, val_loss=loss)
    run.log.say(f"step {progress.step}: validation loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}")
    if run.args.sample:
        show_sample(run, unwrapped(model))
    return 0 < run.args.early_stop <= progress.since_best


def shorten_front(text: str, most: int) -> str:
    """The end of a text, from a word's beginning on."""
    return text if len(text) <= most else "... " + text[-most:].partition(" ")[2]


def unwrapped(model: nn.Module) -> GPT:
    """The GPT inside of what Fabric set up."""
    return getattr(model, "module", model)


def conclude(run: Run, saver: Saver, progress: Progress) -> None:
    """Save the last step, and out_dir/final; or say how to go on with a run that was interrupted."""
    saver.save_step(progress)
    early = 0 < run.args.early_stop <= progress.since_best
    if progress.step < run.steps and not early:
        run.log.say(f"stopped after step {progress.step} of {run.steps}: --resume auto goes on")
        raise KeyboardInterrupt
    path = saver.save("final", progress, state=False)
    run.log.say(f"trained: python generate/base.py --checkpoint_dir {path} --prompt ...")


# --------------------------------------------------------------------------------------------- base models and adapters


def load_base(run: Run, quantize: str | None = None) -> GPT:
    """The model to start from, with the run's config, its weights frozen later by what is injected.

    quantize: a mode of lit_swa.quantize for the linear layers of the blocks.
    """
    from lit_swa.formats.checkpoint import load_model

    fields = run.args.model or {}
    return load_model(run.checkpoint_dir, run.dtype, run.fabric.device, quantize=quantize, **fields).train()


def full_weights(run: Run, model: GPT) -> dict[str, Tensor]:
    """A model's weights in the dtype that it is used in."""
    return {name: t.to(run.dtype) for name, t in model.state_dict().items()}


def try_loading(directory: Path) -> None:
    """Load a trained directory as the next command would; what can be merged into the weights is merged."""
    from lit_swa.formats.checkpoint import check_checkpoint_dir, load_model

    check_checkpoint_dir(directory)
    load_model(directory, torch.float32)
