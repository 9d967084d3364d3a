"""Finetune every weight, on instructions or on long texts: python finetune/full.py --data FILE.json."""

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from lit_swa.arguments import Training


def main(**training: Any) -> None:
    """Train all of a model's weights. OUT_DIR/final is a checkpoint as complete as the one it began with.

    Each weight takes 16 bytes of memory (the weight, its gradient and two moments in float32): 2.2 GB for SmolLM2-135M,
    108 GB for a 7B model, which --strategy fsdp shards over devices.
    """
    args = Training(**training)

    import torch

    from lit_swa import train
    from lit_swa.checkpoint import save_checkpoint
    from lit_swa.formats.directory import open_weights, read_quantization
    from lit_swa.formats.quantized import require_dense
    from lit_swa.utils import interruptible

    run = train.prepare(args, "full", rate=2e-5)
    fabric, feed = run.fabric, run.feed
    open_weights(run.checkpoint_dir)  # refuses an adapter
    stored = read_quantization(run.checkpoint_dir)
    require_dense(stored, run.checkpoint_dir, "train beside its weights with finetune/lora.py")
    gpt = train.load_base(run)
    model = train.place(run, gpt)
    optimizer = fabric.setup_optimizers(train.build_optimizer(gpt, args, run.peak_rate))

    def save_model(directory: Path) -> None:
        save_checkpoint(train.full_weights(run, gpt), run.config, directory, run.checkpoint_dir)

    saver = train.Saver(run, gpt, optimizer, save_model, {"full": True})
    progress = train.resume_and_rehearse(run, model, saver, train.validate, train.try_loading)
    if args.dry_run:
        return

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
                    nll = model(batch.idx, targets=batch.targets, documents=batch.documents) * batch.weight
                    fabric.backward(nll * (fabric.world_size / tokens))  # gradients are averaged over devices
                total += nll.detach()
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
    train.tell_end(run, progress, final)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
