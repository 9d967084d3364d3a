"""lit_swa/training without texts: a model from random weights, trained on random tokens by the helpers of the loop."""

import ast
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_config

from lit_swa import GPT
from lit_swa.arguments import Training
from lit_swa.checkpoint import load_model, save_checkpoint
from lit_swa.train import (
    Batch,
    Run,
    Saver,
    build_optimizer,
    clip_gradients,
    read_metrics,
    rehearse,
    require_finite,
    set_rate,
    start_fabric,
    steps,
    validate,
)

pytest.importorskip("lightning")
TRAINING = Path(__file__).resolve().parents[1] / "lit_swa" / "training"


class RandomTokens:
    """Rows of random tokens, which follow from the step's number, as a feed and as what is validated on."""

    batch_size, steps_per_epoch, row = 3, 10, 16
    identity = {"data": "random", "order": [3, 16]}

    def row_of(self, step: int, n: int) -> Batch:
        ids = torch.from_numpy(np.random.default_rng([step, n]).integers(0, 97, (1, self.row + 1)))
        return Batch(ids[:, :-1], ids[:, 1:], [self.row], [n])

    def batches(self, step=10**6, rank=0, world_size=1):
        return [self.row_of(step, n) for n in range(rank, self.batch_size, world_size)]

    def tokens(self, step):
        return self.batch_size * self.row

    def longest(self):
        return self.row_of(0, 0)


class RandomRows(RandomTokens):
    trained_tokens = 3 * 16

    def head(self):
        return self


class RandomFeed(RandomTokens):
    def trained_tokens(self, step):
        return self.batch_size * self.row


def pretrain(out_dir: Path, stop_after: int | None = None, **arguments) -> list[float]:
    """A pretraining script in small: the losses of the steps that it made. stop_after: interrupted after that step."""
    args = Training(data="", device="cpu", learning_rate=1e-3, warmup_steps=2, save_interval=2, keep_last=9,
                    out_dir=out_dir, **arguments)  # fmt: skip
    fabric, dtype = start_fabric(args)
    run = Run(args, fabric, dtype, out_dir, RandomFeed(), RandomRows(), args.learning_rate)
    torch.manual_seed(args.seed)
    gpt = GPT(tiny_config())
    model = fabric.setup_module(gpt)
    optimizer = fabric.setup_optimizers(build_optimizer(gpt, args, run.peak_rate))

    def save_model(directory: Path) -> None:
        save_checkpoint(gpt, gpt.config, directory)

    saver = Saver(run, gpt, optimizer, save_model, {"pretrained": True})
    progress, losses = saver.resume(), []
    rehearse(run, model, validate, save_model, lambda directory: load_model(directory))
    model.train()
    for step in steps(run, progress, lambda: progress.step == stop_after):
        started = time.perf_counter()
        rate = set_rate(run, optimizer, progress)
        batches, tokens = run.feed.batches(step), run.feed.trained_tokens(step)
        loss = sum(model(b.idx, targets=b.targets, documents=b.documents) for b in batches) / tokens
        fabric.backward(loss)
        norm = clip_gradients(gpt, args.grad_clip)
        require_finite(run, step, loss.item(), norm, batches)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.advance(run.feed.tokens(step), time.perf_counter() - started)
        val_loss = validate(fabric, model, run.valid) if run.validates_after(progress.step) else None
        run.log.step(progress, loss.item(), rate, norm, val_loss)
        losses.append(loss.item())
        if progress.step % run.save_interval == 0:
            saver.save_step(progress)
    saver.finish(progress)
    return losses


def test_a_model_is_trained_from_random_weights_and_goes_on(tmp_path, capsys):
    """Catches: a helper of the loop that needs a checkpoint, a tokenizer or examples; a resume that begins anew."""
    whole = pretrain(tmp_path / "whole", max_steps=7)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "parts", max_steps=7, stop_after=3)
    assert (tmp_path / "parts" / "step-000003").is_dir() and not (tmp_path / "parts" / "final").exists()
    assert pretrain(tmp_path / "parts", max_steps=7, resume="auto") == whole[3:]
    columns, expected = read_metrics(tmp_path / "parts"), read_metrics(tmp_path / "whole")
    assert columns["loss"] == expected["loss"] == whole and columns["val_loss"] == expected["val_loss"]
    idx = torch.arange(9)[None]
    models = [load_model(tmp_path / name / "final")(idx) for name in ("parts", "whole")]
    assert torch.equal(*models)
    with pytest.raises(ValueError, match="differs in its steps"):
        pretrain(tmp_path / "parts", max_steps=9, resume="auto")
    assert "step 7/7 100.0% | loss" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["distribution", "precision", "memory", "loop", "log", "saving", "rehearsal"])
def test_the_loop_knows_nothing_of_texts(name):
    """Catches: an import by which pretraining would need instructions, prompts or a tokenizer."""
    tree = ast.parse((TRAINING / f"{name}.py").read_text())
    imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert not [m for m in imported if m.startswith("lit_swa.data") or "tokenizer" in m or "chat" in m]
    own = [m.rpartition(".")[2] for m in imported if m.startswith("lit_swa.training")]
    assert not {"feed", "finetuning"} & set(own)
