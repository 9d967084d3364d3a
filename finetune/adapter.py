"""Finetune with LLaMA-Adapter, version 1 or 2: python finetune/adapter.py --data FILE.json."""

import sys
import time
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from lit_swa.arguments import Training


def main(
    version: int = 1,
    prompt_length: int = 10,
    start_layer: int = 2,
    quantize: Literal["int8", "int4", "int4-hqq", "nf4", "nf4-dq", "fp4", "fp4-dq"] | None = None,
    **training: Any,
) -> None:
    """Train a few learned tokens that the layers attend to through a gate; the model's weights stay frozen.

    generate/base.py and chat.py load OUT_DIR/final directly. It cannot be merged into the weights.

    Args:
        version: 1 is the learned tokens alone; 2 adds a bias and a scale to every linear layer and trains the norms.
        prompt_length: How many learned tokens a layer has.
        start_layer: The first layer that has them, counted from 0.
        quantize: Hold the frozen weights in 4 or 8 bits; nf4 and fp4 need bitsandbytes.
    """
    args = Training(**training)

    import torch

    from lit_swa import train
    from lit_swa.adapter import AdapterConfig, add_adapter, save_adapter
    from lit_swa.utils import interruptible

    adapter = AdapterConfig(version, prompt_length, start_layer)
    run = train.prepare(args, "adapter", rate=3e-3)
    fabric, feed = run.fabric, run.feed
    gpt = train.load_base(run, quantize)
    torch.manual_seed(args.seed)  # the same new weights on every device
    add_adapter(gpt, adapter)
    model = train.place(run, gpt)
    optimizer = fabric.setup_optimizers(train.build_optimizer(gpt, args, run.peak_rate))

    def save_model(directory: Path) -> None:
        save_adapter(gpt, directory, adapter, run.checkpoint_dir)

    method = {"adapter": vars(adapter), "quantize": quantize}
    saver = train.Saver(run, gpt, optimizer, save_model, method)
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
