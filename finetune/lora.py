"""Finetune with LoRA, on instructions or on long texts: python finetune/lora.py --data FILE.json."""

import sys
import time
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from lit_swa.arguments import Training
from lit_swa.checks import check_range


def main(
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: str = "q,k,v,o",
    extra_trainable: str | None = None,
    loraplus_lr_ratio: float = 1.0,
    rslora: bool = False,
    dora: bool = False,
    quantize: Literal["int8", "int4", "int4-hqq", "nf4", "nf4-dq", "fp4", "fp4-dq"] | None = None,
    **training: Any,
) -> None:
    """Train pairs of small matrices that are added to a model's frozen weights (LoRA), and save them in PEFT's format.

    generate/base.py and chat.py load OUT_DIR/final directly; scripts/merge_lora.py makes a plain checkpoint of it.
    LongLoRA is --extra_trainable embed,norm with --model.s2_attention true and a RoPE scaling; QLoRA is --quantize nf4.

    Args:
        r: Rank of the matrices.
        alpha: The product of a pair is scaled by alpha / r: 0.001 to 1000000.
        dropout: Probability that an input of the matrices is set to zero in training.
        targets: The layers that get a pair of matrices, of q, k, v, o, mlp, head.
        extra_trainable: Weights that are trained in full as well, of embed, norm.
        loraplus_lr_ratio: Learning rate of the B matrices, divided by that of the A matrices (LoRA+ of Hayou et al.):
            0.001 to 1000.
        rslora: Scale by alpha / sqrt(r) instead.
        dora: Train the length of each row of a weight apart from its direction (DoRA).
        quantize: Hold the frozen weights in 4 or 8 bits (QLoRA); nf4 and fp4 need bitsandbytes.
    """
    args = Training(**training)
    check_range("alpha", alpha, 1e-3, 1e6)  # at 0 nothing is trained
    check_range("loraplus_lr_ratio", loraplus_lr_ratio, 1e-3, 1e3)

    import torch

    from lit_swa import train
    from lit_swa.formats.peft import save_adapter
    from lit_swa.lora import LoRAConfig, add_lora
    from lit_swa.utils import interruptible

    lora = LoRAConfig(r, alpha, dropout, targets, extra_trainable or (), rslora, dora)
    run = train.prepare(args, "lora", rate=2e-4, small_rate=1e-3)
    fabric, feed = run.fabric, run.feed
    gpt = train.load_base(run, quantize)
    torch.manual_seed(args.seed)  # the same new weights on every device
    add_lora(gpt, lora)
    model = train.place(run, gpt)
    optimizer = fabric.setup_optimizers(train.build_optimizer(gpt, args, run.peak_rate, loraplus_lr_ratio))

    def save_model(directory: Path) -> None:
        save_adapter(gpt, directory, run.checkpoint_dir, lora)

    method = {"lora": vars(lora), "loraplus_lr_ratio": loraplus_lr_ratio, "quantize": quantize}
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
