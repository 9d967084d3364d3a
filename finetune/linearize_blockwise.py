"""Linear attention for a model that no machine can train whole: python finetune/linearize_blockwise.py --step shard."""

import sys
import time
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from lit_swa.arguments import Training
from lit_swa.checks import check_range


def main(
    step: Literal["shard", "inputs", "train", "stitch"],
    block: int | None = None,
    layers_per_block: int = 4,
    data: str | None = None,
    learning_rate: float = 1e-2,
    lr_schedule: Literal["plateau", "cosine", "constant"] | None = None,
    weights_ce: float = 0.0,
    window_dropout: float = 0.0,
    window_dropout_end: float | None = None,
    **training: Any,
) -> None:
    """Stage 1 of finetune/linearize.py, a few layers at a time. Only a block of them is ever in memory.

    shard splits the checkpoint into OUT_DIR/block-NNN; inputs saves what each block reads in the softmax model; train
    trains one block on it, which needs OUT_DIR/block-NNN alone, so any number of machines may train at the same time;
    stitch makes OUT_DIR/stitched of them, a checkpoint that finetune/linearize.py goes on with.
    scripts/plan_blockwise.py says how much memory, disk and time a model takes.

    Args:
        step: What to do: shard, inputs, train or stitch, in this order. Each goes on where it was interrupted.
        block: The number of a block, counted from 0: what train trains, and all that shard and inputs then make.
        layers_per_block: How many layers shard puts into a block.
        data: What inputs reads: a file, a directory or a dataset's name, as in finetune/linearize.py.
        learning_rate: The rate of train after the warmup.
        lr_schedule: plateau halves the rate when the held-out loss stops falling; cosine falls to a tenth of it. By
            default plateau, or constant where nothing is validated on.
        weights_ce: How much the cross-entropy of the attention weights counts, beside the outputs. It makes all weights
            of a text at once: for short ones.
        window_dropout: Probability that the layers do a pass without their windows, so that the linear part learns
            their work too.
        window_dropout_end: That probability at the last step, reached evenly. By default it stays the same.
    """
    args = Training(data=data or "", learning_rate=learning_rate, lr_schedule=lr_schedule or "cosine", **training)
    check_range("block", block or 0, 0, 2**20)
    check_range("weights_ce", weights_ce, 0, 1e6)
    ends = (window_dropout, window_dropout if window_dropout_end is None else window_dropout_end)
    for name, value in zip(("window_dropout", "window_dropout_end"), ends, strict=True):
        check_range(name, value, 0, 1)

    from lit_swa import train

    own = {"block": (block, None), "layers_per_block": (layers_per_block, 4), "data": (data, None)}
    own |= {"learning_rate": (learning_rate, 1e-2), "lr_schedule": (lr_schedule, None), "weights_ce": (weights_ce, 0.0)}
    own |= {"window_dropout": (window_dropout, 0.0), "window_dropout_end": (window_dropout_end, None)}
    train.check_arguments(step, args, own)
    out_dir = args.out_dir or Path("out/linearize_blockwise")
    if step == "shard":
        train.shard(args, out_dir, layers_per_block, block)
    elif step == "inputs":
        train.save_inputs(args, out_dir, block)
    elif step == "stitch":
        train.stitch_blocks(args, out_dir)
    else:
        train_block(args, out_dir, block, lr_schedule, weights_ce, ends)


def train_block(
    args: Training, out_dir: Path, number: int, schedule: str | None, weights_ce: float, ends: tuple[float, float]
) -> None:
    """Stage 1 of a block alone.

    Its loss is the mean over its own layers. The gradient is that of the mean over all layers, which is smaller by
    their share: without clipping every weight moves as if the whole model were trained at once. ends: of the
    probability that windows are dropped, at the first and the last step.
    """
    import torch

    from lit_swa import train
    from lit_swa.linearize import AttentionTransfer
    from lit_swa.utils import interruptible

    run = train.prepare_block(args, out_dir, number, schedule)
    train.require_older_keys(run, run.block.config, ends)
    fabric, feed = run.fabric, run.feed
    gpt = train.load_block_student(run)
    rows = gpt.transformer.wte
    learners = AttentionTransfer(gpt, run.block.softmax, weights_ce)  # freezes all but the linear attention
    model = train.place_transfer(run, learners)
    optimizer = fabric.setup_optimizers(train.build_optimizer(gpt, run.args, run.peak_rate))
    layers = train.LayerLosses(run, gpt, weights_ce, first=run.block.layers[0])

    def save_model(directory: Path) -> None:
        train.save_block(run, gpt, directory)

    def load(directory: Path) -> None:
        train.read_features(directory, run.block)

    falls = ends[0] != ends[1]  # by the number of steps, which must then stay the same
    method = {"transfer": {"weights_ce": weights_ce, "window_dropout": ends, "steps": run.steps if falls else None}}
    saver = train.Saver(run, gpt, optimizer, save_model, method)
    progress = train.resume_and_rehearse(run, model, saver, train.validate_transfer, load, train.evaluate_block)
    if run.args.dry_run:
        return
    layers.table.rewind(progress.step)

    with interruptible() as interrupted:
        for step in train.steps(run, progress, interrupted):  # ends after an interrupt or --early_stop
            started = time.perf_counter()
            rate = train.set_rate(run, optimizer, progress)
            batches, later = (feed.batches(n, fabric.global_rank, fabric.world_size) for n in (step, step + 1))
            rows.expect(batch.idx for batch in [*batches, *later])
            learners.window_dropout = train.dropout_of(step, run.steps, ends)
            tokens = feed.tokens(step)  # of all devices: each counts, whether its successor is trained or not
            totals = torch.zeros_like(learners.layer_losses)
            for n, batch in enumerate(batches, start=1):
                batch = batch.to(fabric.device)
                with fabric.no_backward_sync(model, enabled=n < len(batches)):
                    error = model(batch.idx, documents=batch.documents) * batch.weight
                    # The gradients are averaged over devices.
                    fabric.backward(error * (run.block.share * fabric.world_size / tokens))
                totals += learners.layer_losses * batch.weight
            by_layer = fabric.all_reduce(totals, reduce_op="sum") / tokens
            loss = by_layer.mean().item()
            norm = train.clip_gradients(gpt, run.args.grad_clip)
            train.require_finite(run, step, loss, norm, batches)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.advance(tokens, time.perf_counter() - started)

            val_loss = train.evaluate_block(run, model, progress) if run.validates_after(progress.step) else None
            run.log.step(progress, loss, rate, norm, val_loss)
            layers.write(progress.step, by_layer)
            if run.saves_after(progress):
                saver.save_step(progress)
    final = saver.finish(progress)
    layers.draw()
    run.log.say(f"trained: {final}; when all blocks are, --step stitch")


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
