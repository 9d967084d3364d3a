"""Train a language model from text: python pretrain/base.py --data BOOK.txt --out_dir out/book."""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from lit_swa.arguments import Pretraining


def main(**pretraining: Any) -> None:
    """Train a model from random weights, or go on with one. OUT_DIR/final is a checkpoint that generate/base.py loads.

    Without a shape it is a lesson: a model of 1M weights on one book, in about a minute on a CPU. Each weight takes 16
    bytes of memory (the weight, its gradient and two moments in float32), which --strategy fsdp shards over devices.
    """
    args = Pretraining(**pretraining)

    import torch

    from lit_swa import train
    from lit_swa.checkpoint import save_checkpoint
    from lit_swa.utils import interruptible

    run = train.prepare_pretraining(args)
    fabric, feed = run.fabric, run.feed
    gpt = train.new_model(run)
    model = train.place(run, gpt)
    optimizer = fabric.setup_optimizers(train.build_optimizer(gpt, args, run.peak_rate))

    def save_model(directory: Path) -> None:
        save_checkpoint(train.full_weights(run, gpt), run.config, directory, run.tokenizer.checkpoint_dir)

    method = {"pretrain": args.optimizer, "z_loss": args.z_loss, "decay_fraction": args.decay_fraction}
    saver = train.Saver(run, gpt, optimizer, save_model, method)
    progress = train.resume_and_rehearse(run, model, saver, train.validate, train.try_loading)
    if args.dry_run:
        return

    with interruptible() as interrupted:
        for step in train.steps(run, progress, interrupted):  # ends after an interrupt or --early_stop
            started = time.perf_counter()
            rate = train.set_rate(run, optimizer, progress)
            batches = feed.batches(step, fabric.global_rank, fabric.world_size)
            tokens = feed.trained_tokens(step)  # of all devices
            total = torch.zeros((), device=fabric.device)
            with train.window_of(run, gpt, step):  # --window_schedule, --random_window
                for n, batch in enumerate(batches, start=1):
                    batch = batch.to(fabric.device)
                    with fabric.no_backward_sync(model, enabled=n < len(batches)):
                        loss = model(batch.idx, targets=batch.targets, documents=batch.documents)  # a sum, with z-loss
                        fabric.backward(loss * (fabric.world_size / tokens))  # gradients are averaged over devices
                    total += loss.detach()
            mean = fabric.all_reduce(total, reduce_op="sum").item() / tokens
            norm = train.clip_gradients(gpt, args.grad_clip)
            train.require_finite(run, step, mean, norm, batches)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.advance(feed.tokens(step), time.perf_counter() - started)

            val_loss = train.evaluate(run, model, progress) if run.validates_after(progress.step) else None
            run.log.step(progress, mean, rate, norm, val_loss)
            if run.saves_after(progress):
                saver.save_step(progress)
    final = saver.finish(progress)
    train.tell_pretrained(run, progress, final)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
