"""What finetune/linearize.py does before, between and behind its two loops."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

from lit_swa.arguments import Training
from lit_swa.config import Config
from lit_swa.evaluate import check_context
from lit_swa.formats.adapter_files import base_identity
from lit_swa.formats.checkpoint import load_config, load_model
from lit_swa.formats.files import find_inside, read_json, write_json
from lit_swa.formats.quantized import quantization_of, require_dense
from lit_swa.linearize import (
    LINEAR,
    SCALE,
    AttentionTransfer,
    keep_softmax,
    linear_config,
    linear_layers,
    make_linear,
    measure_harm,
    softmax_mixers,
)
from lit_swa.mixers import mixing_with
from lit_swa.model import GPT
from lit_swa.plots import save_picture, shades
from lit_swa.training.compiling import check_compiler, compile_linear_attention
from lit_swa.training.distribution import loading_device, unwrapped
from lit_swa.training.finetuning import Finetuning, prepare
from lit_swa.training.log import Table, read_lines
from lit_swa.training.loop import Progress, Run, Validation, validate
from lit_swa.training.resuming import find_run
from lit_swa.training.saving import Saver, note_validation
from lit_swa.utils import ProgressLine, format_number, format_perplexity

if TYPE_CHECKING:
    from lightning.fabric import Fabric

RANKING = "ranking.json"
COLOUR = "#0072B2"  # of the layers

# ---------------------------------------------------------------------------------------------------------- two stages


def prepare_stages(
    args: Training, steps: tuple[int | None, int | None], rate: float, schedule: str | None, keep_full: int
) -> tuple[Finetuning | None, Finetuning]:
    """The runs of both stages; None for the first where it has no steps.

    steps: of each stage; None: as args say; 0: the stage is left out. rate, schedule: those of the first stage.
    keep_full: how many layers will stay softmax. Raises ValueError or OSError for what does not fit.
    """
    if args.strategy == "fsdp":
        raise ValueError(
            "strategy='fsdp' does not fit, since each device holds the whole model here: use ddp, or --stage2_steps 0 "
            "and then finetune/lora.py with fsdp."
        )
    if args.chunk_size is not None and steps[1] == 0:
        raise ValueError("chunk_size cuts the texts of stage 2 alone, and --stage2_steps is 0: leave --chunk_size out.")
    out_dir, first = args.out_dir or Path("out/linearize"), None
    checked = out_dir if steps[1] != 0 or steps[0] == 0 else out_dir / "transfer"  # where a run may go on
    later = replace(args, max_steps=steps[1] or args.max_steps)
    configure = partial(configured, transfers=steps[0] != 0, keep_full=keep_full, longest=args.max_seq_length or 0)
    second = prepare(replace(later, out_dir=checked), "linearize", 1e-4, small_rate=1e-3, configure=configure)
    require_parts(second, steps[0] != 0, keep_full)
    if steps[0] != 0:
        find_run(args.resume, out_dir / "transfer")
        own = {"lr_schedule": schedule or ("constant" if second.valid is None else "plateau"), "learning_rate": rate}
        own |= {"out_dir": out_dir / "transfer", "max_steps": steps[0] or args.max_steps}
        first = replace(second, args=replace(args, **own), out_dir=own["out_dir"], peak_rate=rate)
    second = replace(second, args=replace(later, out_dir=out_dir), out_dir=out_dir)
    if steps[1] == 0:
        second.steps = 0
    return first, second


def refuse_of_no_stage(stage: int, steps: int | None, own: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises ValueError for an argument of a stage that is left out. own: the stage's, each with its default."""
    given = [name for name, (value, plain) in own.items() if value != plain]
    if steps == 0 and given:
        raise ValueError(f"{given[0]} is for stage {stage}, and --stage{stage}_steps is 0: leave --{given[0]} out.")


def configured(base: Config, fields: dict[str, Any], transfers: bool, keep_full: int, longest: int) -> Config:
    """linear_config for a run. transfers: it has a stage 1. longest: tokens of a text, if that is said. Raises
    ValueError for what the run cannot do."""
    if transfers and LINEAR in base.layer_variants:
        raise ValueError(
            f"The checkpoint's attention is linear already (attention={base.attention!r}): --stage1_steps 0 goes on "
            "with stage 2."
        )
    config = linear_config(base, fields)
    if keep_full >= (there := config.layer_variants.count(LINEAR)):
        raise ValueError(f"keep_full={keep_full} leaves none of {there} layers linear: keep fewer.")
    if transfers:  # the softmax model reads the texts too
        check_context(base.override(block_size=config.block_size), longest, "max_seq_length")
    return config


def require_parts(run: Finetuning, transfers: bool, keep_full: int) -> None:
    """Raises ValueError for what a stage needs and the run does not have."""
    if transfers and run.config.linear_off:
        raise ValueError("linear_off switches off what stage 1 trains: leave it out.")
    if keep_full and run.valid is None:
        raise ValueError(
            "keep_full measures each layer on held-out text, and nothing is held out: give validation_data, or more "
            "data and a validation_fraction above 0."
        )


def require_older_keys(run: Run, config: Config, dropout: tuple[float, float]) -> None:
    """Raises ValueError where no text of stage 1 leaves a key to the linear part. dropout: of windows, at both ends."""
    longest, exact = int(run.feed.dataset.lengths.max()), config.linear_window + config.linear_sinks
    if longest <= exact and not any(dropout):
        raise ValueError(
            f"The longest text has {longest} tokens, and the window and the sinks hold {exact}, so the linear part "
            "would learn nothing: give longer texts, a smaller --model.linear_window, or --window_dropout."
        )


def load_student(run: Finetuning) -> GPT:
    """The run's checkpoint with its linear layers, which have learned nothing yet where it had none."""
    fields = run.args.model or {}
    if LINEAR not in load_config(run.checkpoint_dir).layer_variants:
        fields = {n: value for n, value in fields.items() if n != "attention" and not n.startswith("linear_")}
    model = load_model(run.checkpoint_dir, run.dtype, loading_device(run.fabric), **fields)
    require_dense(quantization_of(model), run.checkpoint_dir, "linearise the checkpoint that it was made of")
    make_linear(model, run.config)
    return model.train()


def from_transfer(run: Finetuning, directory: Path) -> Finetuning:
    """The second run, from what the first left in a directory: it has all fields of the config."""
    made = replace(run, args=replace(run.args, model=None), checkpoint_dir=directory)
    made.steps = run.steps
    return made


def save_unchanged(run: Finetuning, saver: Saver) -> Path:
    """final/ where no step of stage 2 is made."""
    path = run.out_dir / "final"
    path.parent.mkdir(parents=True, exist_ok=True)
    if run.fabric.is_global_zero:
        saver.write(path, saver.save_model, Progress(), 0)
    run.fabric.barrier()
    return path


# -------------------------------------------------------------------------------------------- stage 1: what is measured


def place_transfer(run: Run, transfer: AttentionTransfer) -> nn.Module:
    """Put the model on its devices, with what is trained in float32, and compile linear attention if that is asked for.
    Nothing is kept for a backward, so no layer has anything to compute again."""
    if run.args.compile:
        check_compiler(run.fabric.device)
        compile_linear_attention(transfer.module)
    for p in transfer.parameters():
        if p.requires_grad:
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
    return run.fabric.setup_module(transfer)


@torch.no_grad()
def validate_transfer(fabric: "Fabric", model: nn.Module, valid: Validation) -> float:
    """The loss of stage 1 over all tokens of `valid`, the same on every device."""
    totals = torch.zeros(2, dtype=torch.float64, device=fabric.device)
    for n, batch in enumerate(valid.batches()):
        if n % fabric.world_size == fabric.global_rank:
            batch = batch.to(fabric.device)
            totals[0] += model(batch.idx, documents=batch.documents).double()
            totals[1] += batch.idx.numel()
    if fabric.world_size > 1:
        totals = fabric.all_reduce(totals, reduce_op="sum")
    return (totals[0] / totals[1]).item()


def evaluate_transfer(run: Finetuning, model: nn.Module, progress: Progress) -> float | None:
    """Measure and tell how far the attention outputs are from the softmax model's, and the perplexity of the model with
    linear attention. None if nothing is validated on."""
    if run.valid is None:
        return None
    loss = validate_transfer(run.fabric, model, run.valid)
    note_validation(
        run, progress, loss, "--transfer_learning_rate, or look at the examples of the data that is held out"
    )
    nll = validate(run.fabric, unwrapped(model), run.valid)
    said = f"{error_in_words(loss, model)}, perplexity {format_perplexity(nll)}"
    if progress.step == 0:
        said += f" (softmax attention: {format_perplexity(softmax_nll(run, model))})"
    run.log.say(f"step {progress.step}: {said}")
    return loss


def error_in_words(loss: float, model: nn.Module) -> str:
    """What is said of a loss of stage 1. model: an AttentionTransfer, on its devices or not."""
    while not isinstance(model, AttentionTransfer):
        model = model.module
    name, scale = measure_of(model.weights_ce)
    return f"{name} {loss / scale:.3g} of attention outputs{' and weights' if model.weights_ce else ''}"


def measure_of(weights_ce: float) -> tuple[str, float]:
    """What a loss of stage 1 measures, and how many times it. With a cross-entropy in it, it is no squared error."""
    return ("loss", 1.0) if weights_ce else ("mean squared error", SCALE)


def softmax_nll(run: Finetuning, model: nn.Module) -> float:
    """Mean of -log p of the model with softmax attention over what is validated on."""
    gpt = unwrapped(model)
    with mixing_with(gpt, softmax_mixers(gpt, load_config(run.checkpoint_dir).layer_variants)):
        return validate(run.fabric, gpt, run.valid)


def dropout_of(step: int, steps: int, ends: tuple[float, float]) -> float:
    """The probability of a step, counted from 0, that goes evenly from the first to the last of `ends`."""
    return ends[0] + (ends[1] - ends[0]) * step / max(1, steps - 1)


class LayerLosses:
    """layers.csv, the loss of each layer at every step, and layers.png, its picture."""

    def __init__(self, run: Run, model: GPT, weights_ce: float, first: int = 0) -> None:
        """weights_ce: see Transfer. first: the number that the model's first layer has in the whole model."""
        self.run, self.layers, self.weights_ce = run, [first + i for i in linear_layers(model)], weights_ce
        names = ("step", *(f"layer_{i}" for i in self.layers))
        self.table = Table(run.out_dir / "layers.csv", names, run.fabric.is_global_zero)

    def write(self, step: int, losses: Tensor) -> None:
        """losses: (M,), of the linear layers in their order."""
        if step % self.run.args.log_interval == 0:
            self.table.write(step, **dict(zip(self.table.names[1:], losses.tolist(), strict=True)))

    def draw(self) -> None:
        if self.table.active and self.table.path.exists():
            rows = [line.split(",") for line in read_lines(self.table.path, self.table.names)]
            steps = [int(row[0]) for row in rows]
            name, scale = measure_of(self.weights_ce)
            errors = [[float(value) / scale for value in row[1:]] for row in rows]
            picture = picture_of(steps, self.layers, errors, name)
            if rows and save_picture(path := self.table.path.with_suffix(".png"), picture):
                self.run.log.say(f"each layer's error: {self.table.path}, picture: {path}")


def picture_of(steps: Sequence[int], layers: Sequence[int], errors: Sequence[Sequence[float]], name: str) -> Any:
    """errors: for each of the steps, those of the layers. name: what they are."""

    def draw(plt: Any) -> Any:
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        colours = shades(COLOUR, len(layers))[::-1]
        for n, colour in enumerate(colours):
            left.plot(steps, [row[n] for row in errors], color=colour, linewidth=1)
        left.plot(steps, [sum(row) / len(row) for row in errors], color="black", linewidth=2, label="mean")
        left.set(xlabel="step", ylabel=name, yscale="log", title="every layer (darker: deeper)")
        left.legend(frameon=False)
        for label, row, marker in (("first step", errors[0], "s"), ("last step", errors[-1], "o")):
            right.plot(layers, row, marker, linestyle="-", linewidth=1, markersize=4, label=label)
        right.set(xlabel="layer", yscale="log", title="by layer")
        right.legend(frameon=False)
        figure.suptitle("Attention outputs: linear attention against the softmax that it learns from", fontsize=11)
        return figure

    return draw


# ------------------------------------------------------------------------------------------- which layers stay softmax


def choose_softmax(run: Finetuning, model: GPT, variants: Sequence[str], n: int) -> list[int]:
    """Let the n layers attend with softmax again that do most harm when they alone are linear; returns their numbers.

    The harm is the loss on what is validated on, measured once: RANKING keeps it.
    """
    if n == 0:
        return []
    harm = read_ranking(run) or measure_ranking(run, model, variants)
    kept = sorted(sorted(harm, key=lambda i: -harm[i])[:n])
    run.log.say(f"layers that stay {' and '.join(sorted({variants[i] for i in kept}))}: {', '.join(map(str, kept))}")
    keep_softmax(model, kept, variants)
    return kept


def measure_ranking(run: Finetuning, model: GPT, variants: Sequence[str]) -> dict[int, float]:
    line = ProgressLine(len(linear_layers(model)), "layer", interval=10.0)

    def tell(done: int) -> None:
        if run.fabric.is_global_zero:
            line.show(done, "measuring what each layer costs", tokens=0)

    model.eval()
    before, losses = measure_harm(model, variants, lambda: validate(run.fabric, model, run.valid), tell)
    harm = {i: loss - before for i, loss in losses.items()}
    ranked = sorted(harm, key=lambda i: -harm[i])
    if run.fabric.is_global_zero:
        run.out_dir.mkdir(parents=True, exist_ok=True)
        measured = {"softmax": before, "linear": {str(i): losses[i] for i in ranked}}
        write_json(run.out_dir / RANKING, {**ranking_identity(run), **measured})
    run.log.say(f"the loss with softmax attention is {format_number(before, 4)}; with linear attention in one layer:")
    for i in ranked:
        run.log.say(f"  layer {i:3d}: {format_number(losses[i], 4)} ({harm[i]:+.4f})")
    run.fabric.barrier()
    return harm


def ranking_identity(run: Finetuning) -> dict[str, Any]:
    return {"base": base_identity(run.checkpoint_dir), "validation": run.valid.identity}


def read_ranking(run: Finetuning) -> dict[int, float] | None:
    """The harm of each layer, if it was measured of these weights on this text; the same on every device."""
    harm = None
    with suppress(ValueError, OSError, KeyError, TypeError, AttributeError):
        known, identity = read_json(find_inside(run.out_dir, RANKING)), ranking_identity(run)
        if {key: known[key] for key in identity} == identity:
            harm = {int(i): float(loss) - float(known["softmax"]) for i, loss in known["linear"].items()}
    return run.fabric.broadcast(harm)
