"""What a training loop calls; the loop itself is in each script. Nothing here knows of texts, prompts or tokenizers.

Shapes: N tokens of a micro-batch, all its documents one behind the other in one row; B rows of T tokens.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from lit_swa.training.distribution import is_sharded, reader
from lit_swa.training.log import Log
from lit_swa.utils import format_perplexity

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class Batch(NamedTuple):
    """Some documents in one row, or rows that are read whole."""

    idx: Tensor  # (1, N) int64; (B, T) for whole rows
    targets: Tensor  # of idx's shape, the token that follows in the same document, or IGNORED
    documents: list[int] | None  # the documents' lengths; None: a row is one
    examples: list[int]  # their numbers in the data, for error messages
    weight: float = 1.0  # of the loss. 0: no data was left for this device, which reads as often as the others

    def to(self, device: torch.device) -> "Batch":
        return self._replace(
            idx=self.idx.to(device, non_blocking=True), targets=self.targets.to(device, non_blocking=True)
        )


class Feed(Protocol):
    """What each step reads: it depends on the step's number alone, so a run can go on anywhere. Steps count from 0.

    batch_size: rows of a step, over all devices. steps_per_epoch: steps that read the data once. identity: what a
    resumed run must have in common with the run that was saved, as JSON.
    """

    batch_size: int
    steps_per_epoch: int
    identity: dict[str, Any]

    def batches(self, step: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
        """This device's micro-batches of a step, at least one."""

    def trained_tokens(self, step: int) -> int:
        """Tokens that the step's loss is the mean of, over all devices."""

    def tokens(self, step: int) -> int:
        """Tokens that the step reads, over all devices."""

    def longest(self) -> Batch:
        """The micro-batch that takes the most memory."""


class Validation(Protocol):
    """What is validated on. identity: losses can be compared where it is the same, as JSON."""

    trained_tokens: int  # tokens that the loss is the mean of
    identity: Any

    def batches(self) -> Iterable[Batch]:
        """All of it, in order."""

    def head(self) -> "Validation":
        """A little of it, to try validation on."""


@dataclass
class Run:
    """What the helpers of a loop need, made once. It holds no loop."""

    args: Any  # lit_swa.arguments.Training, or another with the same fields for what concerns the loop
    fabric: "Fabric"
    dtype: torch.dtype  # of frozen weights and products
    out_dir: Path
    feed: Feed
    valid: Validation | None
    peak_rate: float  # the learning rate after the warmup
    steps: int = field(init=False)
    eval_interval: int = field(init=False)
    save_interval: int = field(init=False)
    log: Log = field(init=False)

    def __post_init__(self) -> None:
        args = self.args
        self.steps = args.max_steps or max(1, round(args.epochs * self.feed.steps_per_epoch))
        tenth = max(1, math.ceil(self.steps / 10))
        self.eval_interval, self.save_interval = args.eval_interval or tenth, args.save_interval or tenth
        waits = [f"early_stop={args.early_stop}"] * (args.early_stop > 0)
        waits += ["lr_schedule=plateau"] * (args.lr_schedule == "plateau")
        if waits and self.valid is None:
            raise ValueError(
                f"{waits[0]} waits for a validation loss, and nothing is validated on: give validation_data, or more "
                "data and a validation_fraction above 0."
            )
        self.log = Log(self.out_dir, args, self.steps, active=self.fabric.is_global_zero)

    @property
    def prompt_style(self) -> str | None:
        """How the prompts that are trained on are written; None where there are none."""
        return None

    def validates_after(self, step: int) -> bool:
        """True if the run validates after so many steps."""
        return self.valid is not None and (step % self.eval_interval == 0 or step == self.steps)

    def stops_early(self, progress: "Progress") -> bool:
        """True if --early_stop validations have brought no better loss."""
        return 0 < self.args.early_stop <= progress.since_best

    def is_over(self, progress: "Progress") -> bool:
        """True if no step is left to be made."""
        return progress.step >= self.steps or self.stops_early(progress)

    def best_step(self, progress: "Progress") -> int | None:
        """The step whose weights are the run's result, if not the last: with --early_stop, that of the best loss."""
        return progress.best_step if self.args.early_stop > 0 else None

    def saves_after(self, progress: "Progress") -> bool:
        """True if the step that was just made is saved: every save_interval steps, and where it is the best so far."""
        step = progress.step
        return step > 0 and step % self.save_interval == 0 or self.best_step(progress) == step

    def samples(self) -> str:
        """What is said of the data before the first step."""
        return ""

    def loss_in_words(self, loss: float) -> str:
        """What is said of a validation loss beside its number."""
        return f"perplexity {format_perplexity(loss)}"

    def show_sample(self, model: nn.Module) -> None:
        """Show at a validation what the model writes."""

    def identity(self) -> dict[str, Any]:
        """What was read and what is trained: a resumed run must have the same. As JSON."""
        return dict(self.feed.identity)


@dataclass
class Progress:
    """How far a run has come: what a resumed run must know besides weights and moments."""

    step: int = 0  # steps that are done
    tokens: int = 0  # read so far
    seconds: float = 0.0
    step_seconds: float = 0.0  # of the last step
    best: float | None = None  # validation loss
    best_step: int | None = None  # after which step that was
    since_best: int = 0  # validations
    plateau: int = 0  # validations since the best one, or since the rate was halved
    scale: float = 1.0  # of the rate, for lr_schedule plateau

    def advance(self, tokens: int, seconds: float) -> None:
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + tokens, self.seconds + seconds
        self.step_seconds = seconds

    def note_validation(self, loss: float, patience: int = 2) -> None:
        if self.best is None or loss < self.best:
            self.best, self.best_step, self.since_best, self.plateau = loss, self.step, 0, 0
            return
        self.since_best, self.plateau = self.since_best + 1, self.plateau + 1
        if self.plateau >= patience:
            self.scale, self.plateau = self.scale / 2, 0


# ------------------------------------------------------------------------------------------------------ steps and rates


def steps(run: Run, progress: Progress, interrupted: Callable[[], bool]) -> Iterator[int]:
    """The steps that are left, until one of the processes is interrupted. The loop advances `progress`.

    Dropout of a step depends on the step alone, so a resumed run goes on as if it had not stopped.
    """
    fabric = run.fabric
    while not run.is_over(progress):
        stop = torch.tensor(float(interrupted()), device=fabric.device)
        if fabric.all_reduce(stop, reduce_op="sum") > 0:
            return
        seed = np.random.SeedSequence([run.args.seed, progress.step, fabric.global_rank]).generate_state(1)[0]
        torch.manual_seed(int(seed))
        yield progress.step


def build_optimizer(model: nn.Module, args: Any, rate: float, b_ratio: float = 1.0) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) over what is trained. Matrices decay, vectors do not. With
    args.optimizer muon, the blocks' matrices have Muon.

    b_ratio: how much faster LoRA's B matrices learn than the rest: LoRA+ (Hayou et al. 2024, arXiv 2402.12354).
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    matrices: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad and getattr(args, "optimizer", "adamw") == "muon" and p.dim() == 2 and ".h." in name:
            matrices.append(p)
        elif p.requires_grad:
            ratio = b_ratio if ".lora" in name and name.endswith(".B") else 1.0
            groups.setdefault((ratio, args.weight_decay if p.dim() > 1 else 0.0), []).append(p)
    made = [{"params": ps, "weight_decay": decay, "ratio": ratio} for (ratio, decay), ps in groups.items()]
    fused = next(iter(groups.values()))[0].device.type == "cuda"
    adamw = ShardwiseAdamW(made, lr=rate, betas=(0.9, args.beta2), fused=fused or None)
    return MuonAndAdamW(matrices, adamw, rate, args.weight_decay) if matrices else adamw


class ShardwiseAdamW(torch.optim.AdamW):
    """AdamW, which under FSDP hands each device's own shards to its kernel: an element's update needs no other's, and
    to ask for every weight what a sharded operation does takes torch longer than the kernel runs."""

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Fill the lists of weights, gradients and moments that a step works on, which may be sharded tensors."""
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [x.to_local() if hasattr(x, "to_local") else x for x in tensors]
        return has_complex


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for matrices, whose momentum is made orthogonal, and AdamW for the rest.

    Muon's steps are scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so both have one rate.
    """

    def __init__(self, matrices: list[nn.Parameter], adamw: torch.optim.AdamW, rate: float, decay: float) -> None:
        group = {"params": matrices, "ratio": 1.0}
        muon = torch.optim.Muon([group], lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        super().__init__([*muon.param_groups, *adamw.param_groups], {})  # the same groups, not copies
        self.parts = (muon, adamw)
        for part in self.parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()


def learning_rate(step: int, steps: int, args: Any, peak: float, scale: float = 1.0) -> float:
    """The rate of a step, counted from 0: it rises over the warmup, then follows lr_schedule. scale: the plateau's."""
    warmup = warmup_steps(steps, args)
    if step < warmup:
        return peak * (step + 1) / warmup
    if args.lr_schedule == "wsd":
        falling = max(1, round(args.decay_fraction * steps)) if args.decay_fraction > 0 else 0
        return peak * min(1.0, (steps - step) / (falling + 1))
    if args.lr_schedule != "cosine":
        return peak * (scale if args.lr_schedule == "plateau" else 1.0)
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def warmup_steps(steps: int, args: Any) -> int:
    """Steps of the warmup: as many as were asked for, unless the run has fewer. Then, and by default, a tenth of it."""
    tenth = math.ceil(steps / 10)
    wanted = min(20, tenth) if args.warmup_steps is None else args.warmup_steps
    return wanted if wanted <= steps else tenth


def set_rate(run: Run, optimizer: torch.optim.Optimizer, progress: Progress) -> float:
    """Give the optimiser the rate of the step at hand, and return it."""
    rate = learning_rate(progress.step, run.steps, run.args, run.peak_rate, progress.scale)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
    return rate


# ---------------------------------------------------------------------------------------------- gradient and validation


def clip_gradients(model: nn.Module, most: float) -> float:
    """Scale all gradients down to a norm of `most`, 0 for no limit. Returns the norm that they had."""
    params = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(params, most if most > 0 else math.inf)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


@torch.no_grad()
def validate(fabric: "Fabric", model: nn.Module, valid: Validation) -> float:
    """Mean of -log p over all trained tokens of `valid`, the same on every device. Dropout is off meanwhile."""
    model.eval()
    together = is_sharded(fabric)  # then every device must read every batch; else each reads its own
    read = model if together else reader(model)  # without DDP, which would wait for the other devices
    total = torch.zeros((), dtype=torch.float64, device=fabric.device)
    for n, batch in enumerate(valid.batches()):
        if together or n % fabric.world_size == fabric.global_rank:
            batch = batch.to(fabric.device)
            total += read(batch.idx, targets=batch.targets, documents=batch.documents).double()
    model.train()
    if fabric.world_size > 1 and not together:
        total = fabric.all_reduce(total, reduce_op="sum")
    return total.item() / valid.trained_tokens
