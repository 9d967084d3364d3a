"""Finetune every weight, on instructions or on long texts: python finetune/full.py --data FILE.json."""

import sys
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
        for batches, tokens in train.steps(run, optimizer, progress, interrupted):  # tokens: trained, of all devices
            total = torch.zeros((), device=fabric.device)
            for n, batch in enumerate(batches):
                with fabric.no_backward_sync(model, enabled=n + 1 < len(batches)):
                    nll = model(batch.idx, targets=batch.targets, documents=batch.documents) * batch.weight
                    fabric.backward(nll * (fabric.world_size / tokens))  # gradients are averaged over devices
                total += nll.detach()
            values = train.finish_gradients(run, gpt, progress, total, tokens, batches)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if train.finish_step(run, model, saver, progress, values):
                break
    train.conclude(run, saver, progress)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
