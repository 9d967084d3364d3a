"""Give a softmax model linear attention beside a small window: python finetune/linearize.py --data FILE."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from lit_swa.arguments import Training
from lit_swa.checks import check_range

if TYPE_CHECKING:
    from lit_swa.lora import LoRAConfig
    from lit_swa.training.finetuning import Finetuning


def main(
    stage1_steps: int | None = None,
    stage2_steps: int | None = None,
    transfer_learning_rate: float = 1e-2,
    transfer_schedule: Literal["plateau", "cosine", "constant"] | None = None,
    weights_ce: float = 0.0,
    window_dropout: float = 0.0,
    window_dropout_end: float | None = None,
    loss: Literal["ce", "kl"] = "ce",
    keep_full: int = 0,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: str = "q,k,v,o",
    **training: Any,
) -> None:
    """Turn softmax attention into linear attention beside a window (LoLCATs): constant memory and time per token.

    Stage 1, attention transfer, trains each layer's feature maps to give what its softmax attention gives; stage 2
    trains the projections around them with LoRA and merges it. Both resume.
    OUT_DIR/final is a checkpoint that generate/base.py loads; OUT_DIR/transfer is the run of stage 1, with its own.
    The linear attention itself is set with --model.linear_window and the other fields of --model.linear_.

    Args:
        stage1_steps: Steps of stage 1; by default --max_steps or --epochs, which count for each stage. 0 leaves it out,
            as for a checkpoint that is linear already.
        stage2_steps: Steps of stage 2, likewise.
        transfer_learning_rate: The rate of stage 1; --learning_rate is that of stage 2, by default 1e-4, or 1e-3 for a
            model of less than a billion weights.
        transfer_schedule: --lr_schedule of stage 1. By default plateau, or constant where nothing is validated on.
        weights_ce: How much the cross-entropy of the attention weights counts in stage 1, beside the outputs. It makes
            all weights of a text at once: for short ones.
        window_dropout: Probability that the layers do a pass of stage 1 without their windows, so that the linear part
            learns their work too.
        window_dropout_end: That probability at the last step, reached evenly. By default it stays the same.
        loss: What stage 2 learns: ce, the next token; or kl, the predictions of the softmax model.
        keep_full: So many layers stay softmax: those that do most harm to the loss when they alone are linear.
        r: Rank of LoRA's matrices.
        alpha: The product of a pair of them is scaled by alpha / r.
        dropout: Probability that an input of LoRA's matrices is set to zero in training.
        targets: The layers that get a pair of matrices, of q, k, v, o, mlp.
    """
    args = Training(**training)
    for name, value in (("stage1_steps", stage1_steps), ("stage2_steps", stage2_steps)):
        check_range(name, value or 0, 0, 2**31)
    check_range("transfer_learning_rate", transfer_learning_rate, 1e-9, 10)
    check_range("weights_ce", weights_ce, 0, 1e6)
    ends = (window_dropout, window_dropout if window_dropout_end is None else window_dropout_end)
    for name, value in zip(("window_dropout", "window_dropout_end"), ends, strict=True):
        check_range(name, value, 0, 1)
    check_range("keep_full", keep_full, 0, 2**31)
    check_range("alpha", alpha, 1e-3, 1e6)  # at 0 nothing is trained

    from lit_swa import train
    from lit_swa.linearize import softmax_variants
    from lit_swa.lora import LoRAConfig

    of_stage1 = {"transfer_learning_rate": (transfer_learning_rate, 1e-2), "weights_ce": (weights_ce, 0.0)}
    of_stage1 |= {"transfer_schedule": (transfer_schedule, None), "window_dropout": (ends, (0.0, 0.0))}
    of_stage2 = {"loss": (loss, "ce"), "r": (r, 8), "alpha": (alpha, 16), "dropout": (dropout, 0.0)}
    of_stage2 |= {"targets": (targets, "q,k,v,o"), "learning_rate": (args.learning_rate, Training.learning_rate)}
    of_stage2 |= {"lr_schedule": (args.lr_schedule, Training.lr_schedule)}
    train.refuse_of_no_stage(1, stage1_steps, of_stage1)
    train.refuse_of_no_stage(2, stage2_steps, of_stage2)
    lora = LoRAConfig(r, alpha, dropout, targets)
    if "head" in lora.targets:
        raise ValueError("targets has no 'head' here, which no attention needs: choose from q, k, v, o, mlp.")
    steps = (stage1_steps, stage2_steps)
    first, second = train.prepare_stages(args, steps, transfer_learning_rate, transfer_schedule, keep_full)
    variants = softmax_variants(train.load_config(second.checkpoint_dir))  # what the teacher's layers are
    if first is not None:
        train.require_older_keys(first, first.config, ends)
        if second.steps and not (first.out_dir / "final").exists():
            second.log.say("Stage 2 is tried first, so that it cannot fail after stage 1:")
            finetune(second, variants, lora, loss, keep_full, tried=True)
        transferred = transfer(first, second, variants, weights_ce, ends)
        if args.dry_run:
            return
        second = train.from_transfer(second, transferred)
    finetune(second, variants, lora, loss, keep_full)


def transfer(
    run: "Finetuning", later: "Finetuning", variants: list[str], weights_ce: float, ends: tuple[float, float]
) -> Path:
    """Stage 1: all linear layers learn at once in passes of the softmax model. Returns OUT_DIR/transfer/final.

    later: the run of stage 2, which a restart replaces too. variants: what the layers of the softmax model are. ends:
    of the probability that windows are dropped, at the first and the last step.
    """
    import torch

    from lit_swa import train
    from lit_swa.checkpoint import save_checkpoint
    from lit_swa.linearize import AttentionTransfer
    from lit_swa.utils import interruptible

    fabric, feed = run.fabric, run.feed
    gpt = train.load_student(run)
    learners = AttentionTransfer(gpt, variants, weights_ce)  # freezes all but the linear attention
    model = train.place_transfer(run, learners)
    optimizer = fabric.setup_optimizers(train.build_optimizer(gpt, run.args, run.peak_rate))
    layers = train.LayerLosses(run, gpt, weights_ce)
    run.log.say(f"Stage 1, attention transfer: {len(layers.layers)} of {gpt.config.n_layer} layers learn to be linear.")

    def save_model(directory: Path) -> None:
        save_checkpoint(train.full_weights(run, gpt), run.config, directory, run.checkpoint_dir)

    falls = ends[0] != ends[1]  # by the number of steps, which must then stay the same
    method = {"transfer": {"weights_ce": weights_ce, "window_dropout": ends, "steps": run.steps if falls else None}}
    saver = train.Saver(run, gpt, optimizer, save_model, method)
    measures = (train.validate_transfer, train.try_loading, train.evaluate_transfer)
    progress = train.resume_and_rehearse(run, model, saver, *measures)
    final = run.out_dir / "final"
    if run.args.dry_run:
        return final
    train.remove_old_run(later)
    layers.table.rewind(progress.step)

    with interruptible() as interrupted:
        for step in train.steps(run, progress, interrupted):  # ends after an interrupt or --early_stop
            started = time.perf_counter()
            rate = train.set_rate(run, optimizer, progress)
            batches = feed.batches(step, fabric.global_rank, fabric.world_size)
            learners.window_dropout = train.dropout_of(step, run.steps, ends)
            tokens = feed.tokens(step)  # of all devices: each counts, whether its successor is trained or not
            totals = torch.zeros_like(learners.layer_losses)
            for n, batch in enumerate(batches, start=1):
                batch = batch.to(fabric.device)
                with fabric.no_backward_sync(model, enabled=n < len(batches)):
                    error = model(batch.idx, documents=batch.documents) * batch.weight
                    fabric.backward(error * (fabric.world_size / tokens))  # gradients are averaged over devices
                totals += learners.layer_losses * batch.weight
            by_layer = fabric.all_reduce(totals, reduce_op="sum") / tokens
            loss = by_layer.mean().item()
            norm = train.clip_gradients(gpt, run.args.grad_clip)
            train.require_finite(run, step, loss, norm, batches)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.advance(tokens, time.perf_counter() - started)

            val_loss = train.evaluate_transfer(run, model, progress) if run.validates_after(progress.step) else None
            run.log.step(progress, loss, rate, norm, val_loss)
            layers.write(progress.step, by_layer)
            if run.saves_after(progress):
                saver.save_step(progress)
    final = saver.finish(progress)
    layers.draw()
    return final


def finetune(
    run: "Finetuning",
    variants: list[str],
    lora: "LoRAConfig",
    loss_name: str,
    keep_full: int,
    tried: bool = False,
) -> None:
    """Stage 2: LoRA on the projections around the linear attention, which is frozen.

    variants: what the layers of the softmax model are. tried: only try what the stage will do.
    """
    import torch

    from lit_swa import train
    from lit_swa.checkpoint import save_checkpoint
    from lit_swa.linearize import Distillation, keep_softmax, linear_layers
    from lit_swa.lora import add_lora, merged_state
    from lit_swa.utils import interruptible

    fabric, feed, args = run.fabric, run.feed, run.args
    gpt = train.load_student(run)
    if tried:
        kept = linear_layers(gpt)[:keep_full]
        keep_softmax(gpt, kept, variants)
    else:
        kept = train.choose_softmax(run, gpt, variants, keep_full)

    def save_model(directory: Path) -> None:
        weights = {name: t.to(run.dtype) for name, t in merged_state(gpt).items()}
        save_checkpoint(weights, gpt.config, directory, run.checkpoint_dir)

    method = {"linearize": vars(lora) | {"loss": loss_name, "full": kept}}
    if run.steps == 0:
        final = train.save_unchanged(run, train.Saver(run, gpt, None, save_model, method))
        return train.tell_end(run, train.Progress(), final)
    if not tried:
        run.log.say(
            f"Stage 2, LoRA: what is learned is {'the next token' if loss_name == 'ce' else 'the softmax model'}."
        )
    torch.manual_seed(args.seed)  # the same new weights on every device
    add_lora(gpt, lora)
    model = train.place(run, gpt, Distillation(gpt, variants) if loss_name == "kl" else None)
    if tried:
        return train.rehearse(run, model, train.validate, save_model, train.try_loading)
    optimizer = fabric.setup_optimizers(train.build_optimizer(gpt, args, run.peak_rate))
    saver = train.Saver(run, gpt, optimizer, save_model, method)
    progress = train.resume_and_rehearse(run, model, saver, train.validate, train.try_loading)
    if args.dry_run:
        return None

    with interruptible() as interrupted:
        for step in train.steps(run, progress, interrupted):  # seeds dropout, ends after an interrupt or --early_stop
            started = time.perf_counter()
            rate = train.set_rate(run, optimizer, progress)
            batches = feed.batches(step, fabric.global_rank, fabric.world_size)
            tokens = feed.trained_tokens(step)  # of all devices
            total = torch.zeros((), device=fabric.device)
            for n, batch in enumerate(batches, start=1):
                batch = batch.to(fabric.device)
                with fabric.no_backward_sync(model, enabled=n < len(batches)):
                    error = model(batch.idx, targets=batch.targets, documents=batch.documents) * batch.weight
                    fabric.backward(error * (fabric.world_size / tokens))  # gradients are averaged over devices
                total += error.detach()
            loss = fabric.all_reduce(total, reduce_op="sum").item() / tokens
            norm = train.clip_gradients(gpt, args.grad_clip)
            train.require_finite(run, step, loss, norm, batches)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.advance(feed.tokens(step), time.perf_counter() - started)

            val_loss = train.evaluate(run, model, progress) if run.validates_after(progress.step) else None
            run.log.step(progress, loss, rate, norm, val_loss)
            if run.saves_after(progress):
                saver.save_step(progress)
    final = saver.finish(progress)
    return train.tell_end(run, progress, final)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
