"""Finetune every weight, on instructions or on long texts: python finetune/full.py --data FILE.json."""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from lit_swa.arguments import Training


def main(**training: Any) -> None:
    """Train all of a model's weights. OUT_DIR/final is a checkpoint as complete as the one it began with.

    It needs 16 bytes of memory a weight (weight, gradient and two moments in float32): 2.2 GB for SmolLM2-135M, 108 GB
    for a 7B, which --strategy fsdp shares out over devices.
    """
    args = Training(**training)

    import torch

    from lit_swa import train
    from lit_swa.checkpoint import save_checkpoint
    from lit_swa.utils import interruptible

    run = train.prepare(args, "full", rate=2e-5)
    gpt = train.load_base(run)
    train.train_in_float32(gpt, run.dtype)
    train.choose_recompute(run, gpt)
    fabric = run.fabric
    model = fabric.setup_module(gpt)
    optimizer = fabric.setup_optimizers(train.build_optimizer(gpt, args, run.peak_rate))

    def save_model(directory: Path) -> None:
        save_checkpoint(train.full_weights(run, gpt), run.config, directory, run.checkpoint_dir)

    saver = train.Saver(run, gpt, optimizer, save_model, {"full": True})
    progress = saver.resume()
    train.rehearse(run, model, save_model, train.try_loading)
    if args.dry_run:
        return
    if progress.step == 0:
        train.evaluate_step(run, model, progress, {})

    model.train()
    with interruptible() as interrupted:
        while progress.step < run.steps:
            started, step = time.perf_counter(), progress.step
            train.seed_step(run, step)
            rate = train.learning_rate(step, run.steps, args, run.peak_rate, progress.scale)
            train.set_rate(optimizer, rate)
            batches = run.feed.batches(step, fabric.global_rank, fabric.world_size)
            tokens = run.feed.trained_tokens(step)  # over all devices: the loss is their mean, not that of batches
            total = torch.zeros(2, device=fabric.device)
            for n, batch in enumerate(batches):
                batch = batch.to(fabric.device)
                with fabric.no_backward_sync(model, enabled=n + 1 < len(batches)):
                    nll = model(batch.idx, targets=batch.targets, documents=batch.documents) * batch.weight
                    fabric.backward(nll * (fabric.world_size / tokens))  # gradients are averaged over devices
                total[0] += nll.detach()
            total[1] += interrupted()
            nll, stopped = fabric.all_reduce(total, reduce_op="sum").tolist()
            loss = nll / tokens
            norm = train.gradient_norm(gpt, args.grad_clip)
            train.require_finite(run, step, loss, norm, batches)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.advance(run.feed.tokens(step), time.perf_counter() - started)
            values = {"loss": loss, "learning_rate": rate, "grad_norm": norm}
            if train.finish_step(run, model, saver, progress, values, interrupted=stopped > 0):
                break
    train.conclude(run, saver, progress)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
