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
    quantize: Literal["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"] | None = None,
    **training: Any,
) -> None:
    """Train a few learned tokens that the layers attend to through a gate, beside a model's frozen weights.

    OUT_DIR/final is loaded by generate/base.py and chat.py as it is. It cannot be merged into the weights.

    Args:
        version: 1 is the learned tokens alone; 2 adds a bias and a scale to every linear layer and trains the norms.
        prompt_length: Learned tokens of a layer.
        start_layer: The first layer that has them, counted from 0.
        quantize: Hold the frozen weights in 4 or 8 bits.
    """
    args = Training(**training)

    import torch

    from lit_swa import train
    from lit_swa.adapter import AdapterConfig, add_adapter, save_adapter
    from lit_swa.utils import interruptible

    adapter = AdapterConfig(version, prompt_length, start_layer)
    run = train.prepare(args, "adapter", rate=3e-3)
    gpt = train.load_base(run, quantize)
    torch.manual_seed(args.seed)  # the same new weights on every device
    add_adapter(gpt, adapter)
    train.train_in_float32(gpt, run.dtype)
    train.choose_recompute(run, gpt)
    fabric = run.fabric
    model = fabric.setup_module(gpt)
    optimizer = fabric.setup_optimizers(train.build_optimizer(gpt, args, run.peak_rate))

    def save_model(directory: Path) -> None:
        save_adapter(gpt, directory, adapter, run.checkpoint_dir)

    method = {"adapter": vars(adapter), "quantize": quantize}
    saver = train.Saver(run, gpt, optimizer, save_model, method)
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
