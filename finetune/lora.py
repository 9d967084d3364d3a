"""Finetune with LoRA, on instructions or on long texts: python finetune/lora.py --data FILE.json."""

import sys
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from lit_swa.arguments import Training


def main(
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    targets: str = "q,k,v,o",
    extra_trainable: str | None = None,
    loraplus_lr_ratio: float = 1.0,
    rslora: bool = False,
    dora: bool = False,
    quantize: Literal["nf4", "nf4-dq", "fp4", "fp4-dq", "int8"] | None = None,
    **training: Any,
) -> None:
    """Train small matrices beside a model's frozen weights (LoRA), then save them as PEFT does.

    The directory OUT_DIR/final is loaded by generate/base.py and chat.py as it is, and made a plain checkpoint by
    scripts/merge_lora.py. LongLoRA is --extra_trainable embed,norm with --model.s2_attention true and a RoPE scaling;
    QLoRA is --quantize nf4.

    Args:
        r: The matrices' rank.
        alpha: Their product is scaled by alpha / r.
        dropout: Of their input.
        targets: What they stand beside, of q, k, v, o, mlp, head.
        extra_trainable: What is trained in full beside them, of embed, norm.
        loraplus_lr_ratio: How much faster the B matrices learn than the A matrices (LoRA+ of Hayou et al.).
        rslora: Scale by alpha / sqrt(r) instead.
        dora: Train each row's length apart from its direction (DoRA).
        quantize: Hold the frozen weights in 4 or 8 bits (QLoRA).
    """
    args = Training(**training)

    import torch

    from lit_swa import train
    from lit_swa.formats.peft import save_adapter
    from lit_swa.lora import LoRAConfig, add_lora
    from lit_swa.utils import interruptible

    lora = LoRAConfig(r, alpha, dropout, targets, extra_trainable or (), rslora, dora)
    run = train.prepare(args, "lora", rate=2e-4)
    gpt = train.load_base(run, quantize)
    torch.manual_seed(args.seed)  # the same new weights on every device
    add_lora(gpt, lora)
    train.train_in_float32(gpt, run.dtype)
    train.choose_recompute(run, gpt)
    fabric = run.fabric
    model = fabric.setup_module(gpt)
    optimizer = fabric.setup_optimizers(train.build_optimizer(gpt, args, run.peak_rate, loraplus_lr_ratio))

    def save_model(directory: Path) -> None:
        save_adapter(gpt, directory, run.checkpoint_dir, lora)

    method = {"lora": vars(lora), "loraplus_lr_ratio": loraplus_lr_ratio, "quantize": quantize}
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
