"""Finetune with LLaMA-Adapter, version 1 or 2: python finetune/adapter.py --data FILE.json."""

import sys
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
