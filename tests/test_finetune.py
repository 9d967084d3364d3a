"""The finetuning scripts on a tiny model: what a run saves, how it goes on, and that its loss is right."""

import copy
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forked import free_port, start_script, torchrun_environment
from tiny import tiny_config

from lit_swa.arguments import Training
from lit_swa.checkpoint import load_model, save_checkpoint
from lit_swa.data import Example
from lit_swa.formats.files import open_safetensors
from lit_swa.lora import LoRAConfig, add_lora
from lit_swa.model import GPT, IGNORED
from lit_swa.train import (
    ExampleFeed,
    Progress,
    build_optimizer,
    clip_gradients,
    fitting_recompute,
    join_examples,
    learning_rate,
    recompute_blocks,
    require_finite,
    train_in_float32,
    use_whole_memory,
)
from lit_swa.training import memory
from lit_swa.training.distribution import shard_weights
from lit_swa.training.feed import tokens_at_once
from lit_swa.training.loop import Batch
from lit_swa.utils import count_processes

pytest.importorskip("lightning")
WORDS = "the quick brown fox jumps over lazy dog and sleeps".split()


@pytest.fixture(scope="module")
def data_file(tmp_path_factory) -> Path:
    """Forty short instructions of several lengths."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(40):
        words = rng.choice(WORDS, size=int(rng.integers(1, 12))).tolist()
        made.append({"instruction": f"Say {len(words)}", "input": "", "output": " ".join(words) + f" {i}"})
    path = tmp_path_factory.mktemp("data") / "data.json"
    path.write_text(json.dumps(made))
    return path


@pytest.fixture
def train(run_script, tiny_checkpoint, data_file, tmp_path):
    """Run a finetuning script in tmp_path/NAME: (directory, exit code, stdout, stderr)."""

    def run(script: str = "lora", name: str = "run", code: int = 0, **arguments):
        arguments = {"checkpoint_dir": tiny_checkpoint, "data": data_file, "sample": "false"} | arguments
        flags = [x for key, value in arguments.items() for x in (f"--{key}", value)]
        rc, out, err = run_script(f"finetune/{script}.py", "--out_dir", tmp_path / name, *flags)
        assert rc == code, err
        return tmp_path / name, out, err

    return run


def metrics(directory: Path) -> list[dict[str, str]]:
    with open(directory / "metrics.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def losses(directory: Path) -> list[tuple[str, str, str]]:
    return [(row["step"], row["loss"], row["val_loss"]) for row in metrics(directory)]


def stored(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.load() for name, tensor in open_safetensors(path).items()}


# ------------------------------------------------------------------------------------------------------------- resuming


METHODS = {"lora": {"dropout": 0.1}, "full": {}, "adapter": {"version": 2, "start_layer": 0}}
FAST = [("lora", "true", 1), ("full", "false", 4), ("adapter", "true", 4)]
ALL = [(script, pack, size) for script in METHODS for pack in ("true", "false") for size in (1, 4)]


@pytest.mark.parametrize(
    "script, pack, micro_batch_size",
    [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in ALL],
)
def test_a_run_that_was_killed_goes_on_to_the_same_losses(train, script, pack, micro_batch_size):
    """Catches: moments, order, dropout or rate that begin anew; bitwise, across an epoch's border."""
    arguments = METHODS[script] | {
        "pack": pack,
        "micro_batch_size": micro_batch_size,
        "batch_size": 4,
        "max_steps": 12,
        "save_interval": 1,
        "keep_last": 100,
        "eval_interval": 5,
        "warmup_steps": 3,
        "max_seq_length": 96,
    }
    whole, _, _ = train(script, "whole", **arguments)
    expected, state = losses(whole), stored(whole / "step-000012" / "state.safetensors")
    for step in (1, 6, 10):
        killed = whole.with_name(f"killed-{step}")
        shutil.copytree(whole, killed)
        for path in [*killed.glob("step-*"), killed / "final"]:
            if path.name != f"step-{step:06d}":
                shutil.rmtree(path)
        train(script, killed.name, resume="auto", **arguments)
        assert losses(killed) == expected
        resumed = stored(killed / "step-000012" / "state.safetensors")
        assert all(torch.equal(resumed[name], state[name]) for name in state) and len(resumed) == len(state)


def test_a_directory_with_a_run_is_never_overwritten_unasked(train, monkeypatch):
    """Catches: a second start that deletes the first run's steps, also one that cannot start, and a resume of another
    run."""
    from lit_swa import train as train_module

    arguments = {"max_steps": 2, "batch_size": 4}
    directory, _, _ = train(**arguments)
    before = losses(directory)
    _, _, err = train(code=2, **arguments)
    assert "--resume auto goes on with it" in err and losses(directory) == before
    for change, word in (({"limit": 20}, "data"), ({"r": 4}, "method"), ({"learning_rate": 0.1}, "optimiser")):
        _, _, err = train(code=2, resume="auto", **arguments | change)
        assert f"differs in its {word}" in err
    _, _, err = train(code=2, resume="auto", lr_schedule="cosine", **arguments | {"max_steps": 5})
    assert "differs in its steps (2, now 5)" in err  # the cosine would have been another from the first step on
    assert losses(directory) == before
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "validate", lambda *a: (_ for _ in ()).throw(ValueError("it does not fit")))
        train(code=2, resume="restart", **arguments)
    assert losses(directory) == before and load_model(directory / "final") and load_model(directory / "step-000002")
    (directory / "step-000007").mkdir()  # what a kill left
    train(resume="restart", **arguments)
    assert losses(directory) == before and not (directory / "step-000007").exists()


def test_a_run_belongs_to_its_base_and_to_what_its_weights_mean(train, tiny_checkpoint, tmp_path):
    """Catches: moments and an adapter of one model that go on in another of the same shape, or in another attention;
    a moved base that is refused."""
    arguments = {"batch_size": 4, "lr_schedule": "constant", "validation_fraction": 0}
    directory, _, _ = train(max_steps=2, **arguments)
    moved, other = (shutil.copytree(tiny_checkpoint, tmp_path / name) for name in ("moved", "other"))
    model = load_model(other)
    model.transformer.h[1].norm_1.weight.data.mul_(1.01)
    save_checkpoint(model, model.config, other)
    more = arguments | {"max_steps": 3, "resume": "auto"}
    for change, words in (
        ({"checkpoint_dir": other}, "differs in its base ("),
        ({"model.rope_base": 5000}, "differs in its model (rope_base=not given, now 5000"),
        ({"model.attention": "sliding", "model.sliding_window_size": 9}, "differs in its model ("),
        ({"alpha": 8}, "differs in its method (alpha=16, now 8.0)"),
    ):
        _, _, err = train(code=2, **more | change)
        assert words in err.splitlines()[-1], err
    train(checkpoint_dir=moved, **more, **{"model.attention_backend": "sdpa"})
    assert [row["step"] for row in metrics(directory)] == ["1", "2", "3"]
    path = directory / "step-000003" / "run.json"  # of a version that did not note the base
    record = json.loads(path.read_text())
    del record["identity"]["base"], record["identity"]["model"]
    path.write_text(json.dumps(record))
    _, _, err = train(**more | {"max_steps": 4})
    assert "does not say its base, model, which cannot be compared" in err


def test_a_token_without_a_row_is_refused_before_the_first_step(train, tiny_checkpoint, data_file, tmp_path):
    """Catches: an IndexError at the step that reads the text, in training or in validation."""
    copy, tokens = shutil.copytree(tiny_checkpoint, tmp_path / "copy"), [f"<x{i}>" for i in range(20)]
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"extra_special_tokens": tokens}))
    rows = json.loads(data_file.read_text())
    rows[7]["output"] = "so <x19>"
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(rows))
    size = load_model(tiny_checkpoint).config.vocab_size
    for where in ({"data": bad}, {"validation_data": bad}):
        directory, _, err = train(code=2, checkpoint_dir=copy, **where)
        assert f"Example 7 (counted from 0) of {bad} has the token '<x19>', number {size + 19}" in err
        assert f"the tokenizer has {size + 20} tokens and the model {size}" in err and not directory.exists()
    train(checkpoint_dir=copy, dry_run="true")


def test_what_is_shown_is_the_question_and_an_answer_that_is_new(train, tiny_checkpoint):
    """Catches: the template's bare words around the question, the same answer at every validation, a command that does
    not chat with what was trained to chat; a rate and a warmup that nobody hears of."""
    how = {"sample": "true", "max_steps": 3, "eval_interval": 1, "batch_size": 4}
    directory, _, err = train(learning_rate=1e-9, **how)
    assert err.count("answered:") == 1 and re.findall(r"asked: +(.*)", err)[0].startswith("Say ")
    assert err.splitlines()[-1] == f"trained: python generate/chat.py --checkpoint_dir {directory / 'final'}"
    _, _, err = train("adapter", name="other", start_layer=0, prompt_style="alpaca", **how | {"sample": "false"})
    size = sum(p.numel() for p in load_model(tiny_checkpoint).parameters()) / 1e6
    assert f"chosen: --learning_rate 0.003 for a model of {size:.3g}M weights, --warmup_steps 1 of 3" in err
    assert "generate/base.py" in err.splitlines()[-1]
    _, _, err = train(name="third", dry_run="true", warmup_steps=99, learning_rate=1e-3, **how)
    assert "chosen: a warmup of 1 steps, since the run has 3 and not 99" in err


def test_a_sigterm_ends_after_the_step_at_hand(tiny_checkpoint, data_file, tmp_path):
    """Catches: a cluster's warning that loses the steps since the last save."""
    out_dir, log = tmp_path / "run", tmp_path / "log"
    process = start_script(
        "finetune/lora.py", "--checkpoint_dir", tiny_checkpoint, "--data", data_file, "--out_dir", out_dir,
        "--max_steps", 100000, "--save_interval", 100000, "--eval_interval", 100000, "--sample", "false",
        "--device", "cpu", log=log,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not ((out_dir / "metrics.csv").exists() and len(metrics(out_dir)) > 3):
            assert time.monotonic() < deadline and process.is_alive(), log.read_text()
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
    finally:
        process.kill()
    err = log.read_text()
    assert process.exitcode == 130 and "--resume auto goes on" in err, err[-500:]
    assert [path.name for path in out_dir.glob("step-*")] == [f"step-{int(metrics(out_dir)[-1]['step']):06d}"]


@pytest.mark.slow
def test_kill_9_leaves_a_run_that_goes_on(tiny_checkpoint, data_file, tmp_path):
    """Catches: a half-written step taken for whole. Killed at many moments, each save boundary among them."""
    root = Path(__file__).resolve().parents[1]

    def command(name: str, *more: str) -> list[str]:
        return [
            sys.executable, str(root / "finetune/lora.py"), "--checkpoint_dir", str(tiny_checkpoint), "--data",
            str(data_file), "--out_dir", str(tmp_path / name), "--max_steps", "40", "--save_interval", "1",
            "--batch_size", "4", "--eval_interval", "7", "--sample", "false", "--dropout", "0.1", *more,
        ]  # fmt: skip

    subprocess.run(command("whole"), check=True, capture_output=True, timeout=300)
    rng = np.random.default_rng(1)
    for _ in range(12):
        process = subprocess.Popen(command("killed", "--resume", "auto"), stderr=subprocess.PIPE, text=True)
        try:
            _, err = process.communicate(timeout=float(rng.uniform(4, 12)))
            assert process.returncode == 0, err
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        for step in (tmp_path / "killed").glob("step-*"):
            load_model(step)
    subprocess.run(command("killed", "--resume", "auto"), check=True, capture_output=True, timeout=300)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*tmp"))


# ------------------------------------------------------------------------------------------------------------- the loss


def test_the_loss_of_a_step_is_the_mean_over_its_tokens(train):
    """Catches: a mean of means over micro-batches, which weighs a short answer's tokens more."""
    arguments = {"max_steps": 3, "batch_size": 8, "pack": "false", "warmup_steps": 0}
    runs = [metrics(train(name=f"m{m}", micro_batch_size=m, **arguments)[0]) for m in (1, 3, 8)]
    for rows in zip(*runs, strict=True):
        for key in ("loss", "grad_norm", "val_loss"):
            values = [float(row[key]) for row in rows if row[key]]
            assert values == pytest.approx([values[0]] * len(values), rel=1e-5) if values else True


def test_the_step_equals_one_written_out(train, tiny_checkpoint, tmp_path):
    """Catches: targets shifted wrongly, texts that see each other, a gradient that is not of the mean loss."""
    directory, _, _ = train(max_steps=1, batch_size=6, warmup_steps=0, validation_fraction=0, learning_rate=1e-3,
                            weight_decay=0.0)  # fmt: skip
    from lit_swa.data import load_dataset
    from lit_swa.tokenizer import Tokenizer

    args = Training(data="x", batch_size=6)
    run = json.loads((directory / "final" / "run.json").read_text())
    data = load_dataset(run["arguments"]["data"], Tokenizer(tiny_checkpoint), max_seq_length=512)
    assert run["prompt_style"] == data.info["prompt_style"] == "chat"
    feed = ExampleFeed(data, args, run["identity"]["order"][3])
    torch.manual_seed(args.seed)
    model = load_model(tiny_checkpoint).train()
    add_lora(model, LoRAConfig())
    nll, count = 0.0, 0
    for row in feed.rows_of(0):
        for i in feed.rows[row]:
            ids = torch.from_numpy(data[i].ids.astype(np.int64))[None]
            labels = torch.from_numpy(data[i].labels.astype(np.int64))
            logits = model(ids)[0, :-1, : model.config.vocab_size]
            nll = nll + F.cross_entropy(logits, labels[1:], ignore_index=IGNORED, reduction="sum")
            count += int((labels != IGNORED).sum())
    (nll / count).backward()
    row = metrics(directory)[0]
    assert float(row["loss"]) == pytest.approx((nll / count).item(), rel=1e-5)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    assert float(row["grad_norm"]) == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("n", [1, 2])
def test_recomputing_layers_changes_no_gradient(tiny_model, n):
    """Catches: dropout drawn anew in the backward, a layer that is left out."""
    model = tiny_model().train()
    add_lora(model, LoRAConfig(dropout=0.3, targets=("q", "k", "v", "o", "mlp")))
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            p.data.normal_()
    idx, grads = torch.randint(0, 97, (1, 20)), []
    for k in (0, n):
        recompute_blocks(model, k)
        torch.manual_seed(3)
        model.zero_grad()
        model(idx, targets=idx, documents=[12, 8]).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_offloaded_layers_keep_their_input_elsewhere_and_tile_their_mlp(tiny_model, monkeypatch):
    """Catches: a tile that is lost, activations that wait beside the inputs, an MLP that reads a whole text, or as many
    tokens of each text."""
    model, kept, read = tiny_model(n_layer=3).train(), [], []
    idx, grads = torch.randint(0, 97, (2, 20)), []
    monkeypatch.setattr(memory, "TILE", 7)
    monkeypatch.setattr(
        memory,
        "save_on_cpu",
        lambda pin_memory: torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x),
    )
    for block in model.transformer.h:
        block.mlp.fc_1.register_forward_pre_hook(lambda module, args: read.append(args[0][..., 0].numel()))
    for n, offload in ((0, False), (3, True), (0, False)):
        recompute_blocks(model, n, offload)
        model.zero_grad()
        model(idx, targets=idx).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        if offload:
            assert [shape for shape in kept if len(shape) > 1] == [(2, 20, model.config.n_embd)] * 3
            assert max(read[3:]) == 7
    assert max(read[-3:]) == 40  # a choice can be taken back
    for a, b in zip(*grads[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


ROWS = torch.arange(18).view(2, 9)
MICRO_BATCHES = {
    "texts": Batch(ROWS[:, :7].reshape(1, 14), ROWS[:, :7].reshape(1, 14), [9, 5], [0, 1]),
    "texts of one length": Batch(ROWS.reshape(1, 18), ROWS.reshape(1, 18), [9, 9], [0, 1]),
    "rows": Batch(ROWS, ROWS, None, [0, 1]),
}


@pytest.mark.parametrize("batch", MICRO_BATCHES.values(), ids=MICRO_BATCHES)
@pytest.mark.parametrize("room, kept", [(0, 0), (250, 2), (10**6, 3)])
def test_as_few_layers_recompute_as_the_memory_demands(tiny_model, monkeypatch, room, kept, batch):
    """Catches: a layer's memory measured wrongly, or of tokens that lie otherwise than in a step; moments that are not
    counted. The GPU's counters are made up: a step takes 1000 bytes, and a layer keeps 100."""
    model, readings = tiny_model(n_layer=3).train(), iter([500, 600])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(readings))
    moments = 8 * sum(p.numel() for p in model.parameters())
    assert fitting_recompute(model, batch, 1000 + moments + room) == 3 - kept
    assert all(p.grad is None for p in model.parameters())


def test_trained_weights_stay_in_float32_in_a_bfloat16_model(tiny_model):
    """Catches: an update of 1e-4 that bfloat16 rounds away, products that run in float32."""
    model = tiny_model().to(torch.bfloat16)
    add_lora(model, LoRAConfig(extra_trainable=("embed", "norm")))
    assert train_in_float32(model, torch.bfloat16) == 1 + 2 * model.config.n_layer + 1
    assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for p in model.parameters())
    idx = torch.randint(0, 97, (1, 9))
    assert model(idx).dtype == model.dtype == torch.bfloat16  # by the latter kernels are chosen
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = build_optimizer(model, Training(data="x"), 1e-5)
    model(idx, targets=idx).backward()
    optimizer.step()
    moved = [name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])]
    assert len(moved) > len(before) / 2 and "transformer.wte.weight" in moved


WEIGHTS = {
    "plain": {},
    "LayerNorm, tied": {"norm_class_name": "LayerNorm", "tie_embeddings": True},
    "experts": {"n_expert": 4, "n_expert_per_token": 2, "mlp_class_name": "MoE"},
    "linear": {"attention": "linear", "linear_gate": True, "linear_window": 8},
    "sink logits": {"sink_logits": True},
    "a norm for each head": {"norm_qk": True, "norm_qk_type": "each"},
    "a norm of all heads": {"norm_qk": True, "norm_qk_type": "whole"},
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_every_kind_are_trained_in_float32(tiny_model, name):
    """Catches: experts, features, gates and sinks that learn in bfloat16, which rounds their updates away."""
    fields, idx = WEIGHTS[name], torch.randint(0, 97, (2, 40))
    model, rounded = (tiny_model(**fields).train().requires_grad_(True) for _ in range(2))
    rounded.load_state_dict({key: t.bfloat16().float() for key, t in model.state_dict().items()})
    train_in_float32(model.to(torch.bfloat16), torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(idx).dtype == torch.bfloat16
    losses = [m(idx, targets=idx) / idx.numel() for m in (model, rounded)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
    most = 0.15 if name in ("experts", "linear") else 0.06  # rounding shuts gates, and moves tokens to other experts
    for (key, a), (_, b) in zip(model.named_parameters(), rounded.named_parameters(), strict=True):
        assert b.grad is None or (a.grad - b.grad).norm() < most * b.grad.norm(), key


def rounded_shards(rank: int, name: str) -> tuple[list[tuple[float, float]], bool]:
    """(loss, norm of its gradient), in bfloat16, of one model and of the same in two shards, which read half each; and
    whether the latter's gradients have digits that bfloat16 lacks."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    torch.manual_seed(0)
    whole = GPT(tiny_config(**WEIGHTS[name])).to(torch.bfloat16).train()
    sharded, idx, found = copy.deepcopy(whole), torch.randint(0, 97, (4, 24)), []
    for model, rows in ((whole, idx), (sharded, idx[2 * rank : 2 * rank + 2])):
        train_in_float32(model, torch.bfloat16)
        if model is sharded:
            shard_weights(model, init_device_mesh("cpu", (2,)))
        loss = model(rows, targets=rows) / rows.numel()
        loss.backward()
        loss = loss.detach()
        if model is sharded:
            dist.all_reduce(loss)
            loss /= 2
        found.append((loss.item(), clip_gradients(model, 0.0)))
    grads = [p.grad.to_local() for p in sharded.parameters() if p.grad is not None]
    return found, any((grad != grad.bfloat16()).any().item() for grad in grads)


@pytest.mark.parametrize("name", WEIGHTS)
def test_shards_that_are_rounded_before_they_are_gathered_give_the_gradients_of_one_device(two_ranks, name):
    """Catches: weights of two dtypes in a block, which FSDP refuses; norms that cannot take rounded weights; angles
    that are rounded with them; gradients that are added up in bfloat16."""
    for (whole, sharded), finer in two_ranks(rounded_shards, name):
        assert sharded == pytest.approx(whole, rel=2e-3) and finer


def updated_shards(rank: int) -> tuple[bool, float]:
    """(was a kernel given sharded tensors, how far the weights are from those of one device) after three steps."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    whole = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 1))  # a bias of one: a device has none of it
    sharded = fully_shard(copy.deepcopy(whole), mesh=init_device_mesh("cpu", (2,)))
    optimizers = [build_optimizer(model, Training(data="x"), 0.1) for model in (whole, sharded)]
    module = sys.modules[torch.optim.Adam.__module__]
    given, plain = [], module.adam
    module.adam = lambda *lists, **how: (given.extend(lists[:4]), plain(*lists, **how))
    for _ in range(3):
        x = torch.randn(4, 5)
        for model, optimizer in zip((whole, sharded), optimizers, strict=True):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    module.adam = plain
    pairs = zip(whole.parameters(), sharded.parameters(), strict=True)
    off = max((a - b.full_tensor()).abs().max().item() for a, b in pairs)
    return any(hasattr(x, "to_local") for tensors in given for x in tensors), off


def test_sharded_weights_are_updated_shard_by_shard(two_ranks):
    """Catches: a sharded operation that torch works out anew for every weight, moments that are lost, and a device that
    has nothing of a weight."""
    assert all(not sharded and off < 1e-6 for sharded, off in two_ranks(updated_shards))


def test_full_finetuning_in_bfloat16_equals_rounded_weights(tiny_model):
    """Catches: a layer whose float32 weight is used unrounded, or whose gradient is lost by the rounding."""
    model = tiny_model(attn_bias=True)
    rounded = tiny_model(attn_bias=True)
    rounded.load_state_dict({name: t.bfloat16().float() for name, t in model.state_dict().items()})
    rounded = rounded.to(torch.bfloat16)
    for m in (model, rounded):
        m.requires_grad_(True)
    assert train_in_float32(model, torch.bfloat16) > 10
    idx = torch.randint(0, 97, (1, 12))
    for m in (model, rounded):
        m(idx, targets=idx).backward()
    for (name, a), (_, b) in zip(model.named_parameters(), rounded.named_parameters(), strict=True):
        difference = (a.grad - b.grad.float()).norm() / b.grad.float().norm()
        assert difference < 0.05, (name, difference)


# --------------------------------------------------------------------------------------------------- order and schedule


class Lengths:
    """A data set of which only the lengths matter."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths)
        self.trained = self.lengths - 1

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        ids = np.arange(self.lengths[i], dtype=np.int32)
        return Example(ids, np.concatenate([[IGNORED], ids[1:]]).astype(np.int32))


def test_devices_share_a_step_of_short_rows():
    """Catches: a device that reads the whole step as one micro-batch, while the others read it for nothing."""
    feed = ExampleFeed(Lengths(np.full(20, 16)), Training(data="x", batch_size=9, devices=2, pack=False), 16)
    ranks = [feed.batches(0, rank, 2) for rank in range(2)]
    assert [[len(batch.examples) for batch in batches] for batches in ranks] == [[5], [4]]
    assert all(batch.weight for batches in ranks for batch in batches)


@pytest.mark.parametrize(
    "n_embd, gigabytes, tokens",
    [(576, 80, 32768), (2048, 80, 16384), (4096, 80, 8192), (576, 24, 12288), (576, 8, 8192)],
)
def test_a_small_model_reads_more_at_once(monkeypatch, n_embd, gigabytes, tokens):
    """Catches: steps of a small model that wait for the processor, and tokens that a small GPU has no room for."""
    memory = SimpleNamespace(total_memory=gigabytes * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    assert tokens_at_once(torch.device("cuda"), n_embd) == tokens
    assert tokens_at_once(torch.device("cpu"), n_embd) == 1024


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_text_is_read_once_an_epoch_whatever_the_number_of_devices(pack, world_size):
    """Catches: texts lost or read twice at an epoch's end or between devices; an order that is the same every epoch."""
    rng = np.random.default_rng(2)
    feed = ExampleFeed(
        Lengths(rng.integers(2, 60, 53)), Training(data="x", batch_size=5, micro_batch_size=2, pack=pack), 64
    )
    orders = []
    for epoch in range(3):
        read, order = [], []
        for step in range(epoch * feed.steps_per_epoch, (epoch + 1) * feed.steps_per_epoch):
            of_ranks = [feed.batches(step, rank, world_size) for rank in range(world_size)]
            assert len({len(of_rank) for of_rank in of_ranks}) == 1  # or FSDP would wait for ever
            batches = [b for of_rank in of_ranks for b in of_rank]
            own = [b for b in batches if b.weight]
            assert feed.trained_tokens(step) == sum(int((b.targets != IGNORED).sum()) for b in own)
            assert feed.tokens(step) == sum(b.idx.numel() for b in own)
            read += [i for b in own for i in b.examples]
            order += feed.rows_of(step)
        assert sorted(read) == list(range(53))
        orders.append(order)
    assert orders[0] != orders[1] != orders[2]
    assert feed.row_tokens[orders[0][0]] == max(feed.row_tokens)  # the longest comes first


def test_join_predicts_within_each_text():
    """Catches: the last token of a text that predicts the first of the next."""
    batch = join_examples([Lengths([3])[0], Lengths([2])[0]], [7, 9])
    assert batch.idx.tolist() == [[0, 1, 2, 0, 1]] and batch.targets.tolist() == [[1, 2, IGNORED, 1, IGNORED]]
    assert batch.documents == [3, 2] and batch.examples == [7, 9]


def test_rates_rise_and_fall():
    """Catches: a first step without a rate, a cosine that ends elsewhere than at a tenth."""
    args = Training(data="x", warmup_steps=4)
    rates = [learning_rate(step, 104, args, 1.0) for step in range(105)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0 and rates[54] == pytest.approx(0.55)
    assert rates[104] == pytest.approx(0.1) and all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))
    plateau = Training(data="x", warmup_steps=0, lr_schedule="plateau")
    progress = Progress()
    for loss in (3.0, 2.0, 2.5, 2.4, 2.3, 2.2, 1.0):
        progress.note_validation(loss)
    assert learning_rate(9, 10, plateau, 1.0, progress.scale) == 0.25 and progress.best == 1.0


def test_loraplus_gives_b_its_own_rate(tiny_model):
    """Catches: a ratio that A gets too, or that the warmup forgets."""
    model = tiny_model()
    add_lora(model, LoRAConfig(extra_trainable=("norm",)))
    optimizer = build_optimizer(model, Training(data="x", weight_decay=0.1), 1e-3, b_ratio=16.0)
    rate = {id(p): 1e-3 * g["ratio"] for g in optimizer.param_groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert rate[id(p)] == pytest.approx(1.6e-2 if name.endswith(".B") else 1e-3)
            assert decay[id(p)] == (0.1 if p.dim() > 1 else 0.0)


# --------------------------------------------------------------------------------------------------- results and faults


@pytest.mark.parametrize("script", ["lora", "full", "adapter"])
def test_what_a_run_saves_is_what_it_trained(train, script, run_script, tiny_checkpoint):
    """Catches: a final directory that the next command cannot load, or that lacks the last step; a loss that stays."""
    own = {"version": 2, "start_layer": 0} if script == "adapter" else {}
    directory, _, err = train(script, max_steps=30, batch_size=8, learning_rate=5e-3, eval_interval=30, **own)
    rows = metrics(directory)
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"]) - 0.3
    assert (directory / "final" / "run.json").exists() and "trained:" in err
    rc, out, err = run_script("generate/base.py", "--checkpoint_dir", directory / "final", "--prompt", "the quick",
                              "--max_new_tokens", 5)  # fmt: skip
    assert rc == 0 and out.startswith("the quick"), err
    idx = torch.arange(9)[None]
    assert not torch.allclose(load_model(directory / "final")(idx), load_model(tiny_checkpoint)(idx), atol=1e-2)


def test_a_dry_run_tells_what_is_needed_and_leaves_nothing(train):
    """Catches: a rehearsal that is left out, or whose files stay."""
    directory, out, err = train(dry_run="true")
    assert "weights are trained" in err and "The disk needs" in err and err.count("--- example") == 3 and out == ""
    assert [p for p in directory.rglob("*") if p.is_file() and p.name != ".lit_swa.lock"] == []


def test_what_would_fail_later_fails_before_the_first_step(train, monkeypatch):
    """Catches: a save, a load or a validation that is tried after hours for the first time."""
    from lit_swa import train as train_module

    for name in ("validate", "try_loading"):
        with monkeypatch.context() as patch:
            patch.setattr(train_module, name, lambda *a, **k: (_ for _ in ()).throw(ValueError("it would fail")))
            directory, _, err = train(name=name, code=2)
            assert "it would fail" in err and not list(directory.glob("step-*")) + list(directory.glob("*.csv"))


def test_a_loss_that_is_no_number_stops_the_run(train, tiny_checkpoint, tmp_path):
    """Catches: hours of training on NaN, and a last good step overwritten by it."""
    from types import SimpleNamespace

    run = SimpleNamespace(out_dir=tmp_path)
    batch = join_examples([Lengths([3])[0], Lengths([2])[0]], [7, 9])
    for loss, norm, what in ((float("nan"), 1.0, "loss"), (1.0, float("inf"), "gradient")):
        with pytest.raises(ValueError, match=f"The {what} of step 4 is .* examples 7, 9 .*nothing was saved yet"):
            require_finite(run, 3, loss, norm, [batch])
    require_finite(run, 3, 1.0, 1.0, [batch])
    directory, _, err = train("full", code=2, learning_rate=10.0, grad_clip=0, max_steps=60, warmup_steps=0,
                              save_interval=1, batch_size=2)  # fmt: skip
    assert "of the data" in err and "is untouched" in err
    last = sorted(directory.glob("step-*"))[-1]
    assert all(torch.isfinite(t).all() for t in stored(last / "state.safetensors").values())


def test_gradients_are_clipped_to_the_norm(tiny_model):
    """Catches: a norm of the clipped gradient, or no clipping."""
    model = tiny_model()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    count = sum(p.numel() for p in model.parameters())
    assert clip_gradients(model, 0) == pytest.approx(count**0.5) == clip_gradients(model, 1.0)
    assert clip_gradients(model, 0) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"data": "missing.json"}, "missing.json"),
        ({"targets": "q,z"}, "choose from q, k, v"),
        ({"epochs": 0}, "greater than 0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"recompute": "some"}, "choose auto, all, none"),
        ({"recompute": -1}, "recompute='-1'"),
        ({"recompute": 3}, "recompute=3 does not fit: it must lie between 0 and 2"),
        ({"alpha": 0}, "alpha=0.0 does not fit: it must lie between 0.001 and"),
        ({"grad_clip": 1e-30}, "grad_clip=1e-30"),
        ({"loraplus_lr_ratio": 1e308}, "between 0.001 and 1000"),
        ({"early_stop": 1, "validation_fraction": 0}, "early_stop=1 waits for a validation loss"),
        ({"lr_schedule": "plateau", "limit": 1}, "lr_schedule=plateau waits for a validation loss"),
        ({"max_seq_length": 4096}, "context of 512"),
        ({"shard_size": 2, "strategy": "fsdp"}, "shard_size=2 does not divide the 1 processes"),
        ({"shard_size": 1}, "no effect with strategy='ddp'"),
        ({"chunk_size": 5, "strategy": "fsdp"}, "chunk_size needs the whole model on each device"),
        ({"chunk_offload": "true"}, "chunk_offload has no effect without chunks"),
        ({"out_dir": __file__}, "is a file: give a directory as --out_dir"),
        ({"chunk_size": 5, "model.s2_attention": "true"}, "S2-Attn groups the tokens of a whole text"),
        ({"model.nope": 3}, "nope"),
        ({"prompt_style": "nope"}, "alpaca"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(train, arguments, word):
    """Catches: a traceback."""
    directory, _, err = train(code=2, **arguments)
    assert word in err and err.startswith("error: ") and err.count("\n") == 1 and not (directory / "final").exists()


def test_all_weights_are_trained_of_a_whole_checkpoint_only(train, run_script, tiny_checkpoint, data_file, tmp_path):
    """Catches: a traceback where the model of an adapter, all of it frozen, or one in 8 bits is trained on."""
    adapter = train(max_steps=1, limit=4)[0] / "final"
    quantised = tmp_path / "quantised"
    run_script("scripts/quantize.py", "--checkpoint_dir", tiny_checkpoint, "--output_dir", quantised)
    for script in ("finetune/full.py", "pretrain/base.py"):
        for directory, said in ((adapter, "is an adapter: make a checkpoint of it"), (quantised, "quantised already")):
            given = ("--checkpoint_dir", directory, "--data", data_file, "--out_dir", tmp_path / "more")
            code, _, err = run_script(script, *given, "--max_steps", 1)
            assert code == 2 and said in err and not (tmp_path / "more").exists(), err


# ---------------------------------------------------------------------------------------------------- several processes


def start_two(launcher: str, script: str, arguments: list, log: Path) -> list:
    """A script in two processes: by --devices 2, which starts the other itself, or with the environment of torchrun."""
    if launcher == "devices":
        return [start_script(script, *arguments, "--devices", 2, log=log)]
    port = free_port()
    envs = [torchrun_environment(rank, 2, port) for rank in range(2)]
    return [start_script(script, *arguments, log=log.with_suffix(f".{env['RANK']}"), **env) for env in envs]


@pytest.mark.parametrize(
    "strategy, script, launcher",
    [
        ("ddp", "lora", "devices"),
        ("fsdp", "full", "torchrun"),
        ("fsdp --shard_size 1", "full", "torchrun"),  # two copies
        pytest.param("fsdp --shard_size 2", "lora", "torchrun", marks=pytest.mark.slow),
        pytest.param("fsdp", "lora", "devices", marks=pytest.mark.slow),
        pytest.param("ddp", "full", "torchrun", marks=pytest.mark.slow),
    ],
)
def test_two_processes_make_the_losses_of_one(train, strategy, script, launcher, tiny_checkpoint, data_file, tmp_path):
    """Catches: gradients averaged by batch instead of by token, texts read twice, weights that are saved in part,
    processes of torchrun that each train alone.

    The second run goes on from the first's second step: what one process saved, two load, and the other way round.
    """
    arguments = {"max_steps": 4, "batch_size": 5, "micro_batch_size": 2, "eval_interval": 2, "learning_rate": 1e-3,
                 "save_interval": 2, "keep_last": 2}  # fmt: skip
    one, _, _ = train(script, "one", **arguments)
    shutil.copytree(one / "step-000002", tmp_path / "two" / "step-000002")
    shutil.copy(one / "metrics.csv", tmp_path / "two")
    flags = [x for key, value in arguments.items() for x in (f"--{key}", value)]
    flags += ["--checkpoint_dir", tiny_checkpoint, "--data", data_file, "--out_dir", tmp_path / "two", "--sample"]
    flags += ["false", "--device", "cpu", "--strategy", *strategy.split(), "--resume", "auto"]
    processes = start_two(launcher, f"finetune/{script}.py", flags, tmp_path / "log")
    for process in processes:
        process.join(300)
        process.kill()
    assert {process.exitcode for process in processes} == {0}, [p.read_text() for p in tmp_path.glob("log*")]
    assert len(metrics(one)) == len(metrics(tmp_path / "two")) == 5
    for a, b in zip(metrics(one), metrics(tmp_path / "two"), strict=True):
        for key in ("loss", "grad_norm", "val_loss"):
            assert (not a[key] and not b[key]) or float(a[key]) == pytest.approx(float(b[key]), rel=1e-4), (a, b)
    a, b = (stored(d / "step-000004" / "state.safetensors") for d in (one, tmp_path / "two"))
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=name)
    idx = torch.arange(9)[None]
    torch.testing.assert_close(
        load_model(one / "final")(idx), load_model(tmp_path / "two" / "final")(idx), rtol=1e-3, atol=1e-3
    )


def test_processes_that_others_started_are_counted(monkeypatch):
    """Catches: processes of torchrun or SLURM that take themselves for the only one; one that waits for nobody."""
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="num_nodes=2 would wait for other machines without end: start"):
        count_processes(4, 2)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert count_processes(4, 2) == (4, 2)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert count_processes(2, 1) == (2, 1)
    for name, value in {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}.items():
        monkeypatch.setenv(name, value)
    assert count_processes(1, 1) == count_processes(4, 2) == (4, 2)
    with pytest.raises(ValueError, match="the 8 processes that srun started: leave them out"):
        count_processes(2, 1)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    assert count_processes(1, 1) == (3, 2)


def test_an_adapter_that_cannot_be_merged_says_so(train, run_script):
    """Catches: a checkpoint without the adapter's effect."""
    directory, _, _ = train("adapter", max_steps=1, start_layer=0)
    rc, _, err = run_script("scripts/merge_lora.py", "--checkpoint_dir", directory / "final")
    assert rc == 2 and "use the directory as it is" in err and not (directory / "final" / "merged").exists()


def test_qlora_trains_saves_and_merges(train, run_script, tmp_path, tiny_checkpoint):
    """Catches: a quantised base that cannot be saved or loaded, an adapter that has no effect on the dense one."""
    directory, _, _ = train(max_steps=12, quantize="int8", learning_rate=5e-3, batch_size=8)
    rows = metrics(directory)
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"])
    rc, out, err = run_script(
        "scripts/merge_lora.py", "--checkpoint_dir", directory / "final", "--output_dir", tmp_path / "m"
    )
    assert rc == 0, err
    idx = torch.arange(9)[None]
    merged, unmerged = load_model(tmp_path / "m")(idx), load_model(directory / "final", merge=False)(idx)
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4 * merged.abs().max().item())
    assert not torch.allclose(merged, load_model(tiny_checkpoint)(idx), atol=1e-2)


def test_qlora_is_loaded_and_merged_as_it_was_trained(train, run_script, tmp_path, tiny_checkpoint, data_file):
    """Catches: what a run validated and what its result computes that are two models, where that was asked for."""
    directory, _, _ = train(max_steps=8, quantize="int8", learning_rate=5e-3, validation_data=data_file)
    validated = float(metrics(directory)[-1]["val_loss"])

    def loss(checkpoint, quantize=None) -> float:
        _, rows, _ = train(name="read", checkpoint_dir=checkpoint, max_steps=1, learning_rate=1e-12, resume="restart",
                           validation_data=data_file, **({"quantize": quantize} if quantize else {}))  # fmt: skip
        return float(metrics(tmp_path / "read")[0]["val_loss"])

    for name, flags in (("exact", []), ("rounded", ["--quantize", "int8"])):
        rc, _, err = run_script("scripts/merge_lora.py", "--checkpoint_dir", directory / "final", "--dtype", "float32",
                                "--output_dir", tmp_path / name, *flags)  # fmt: skip
        assert rc == 0, err
    assert loss(tmp_path / "rounded") == pytest.approx(validated, rel=1e-5)
    assert loss(tmp_path / "exact") != pytest.approx(validated, rel=1e-5)
    idx = torch.arange(9)[None]
    as_trained = load_model(directory / "final", quantize="int8")
    assert any(".lora" in name for name, _ in as_trained.named_modules())
    torch.testing.assert_close(as_trained(idx), load_model(tmp_path / "rounded")(idx), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_gpus_memory_grows_in_one_piece_unless_it_is_said_otherwise(monkeypatch, name):
    """Catches: a choice of the user's that is replaced."""
    said = {name: "backend:native"} if name else {}
    monkeypatch.setattr(os, "environ", dict(said))
    use_whole_memory()
    assert os.environ == (said or {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})


def test_the_disk_that_a_run_needs_is_checked_before_it(train, monkeypatch):
    """Catches: hours of training that cannot be saved."""
    from lit_swa.formats import files

    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: type("U", (), {"free": 10**5})())
    directory, _, err = train("full", code=2)
    assert "free some space" in err and not (directory / "metrics.csv").exists()


def test_an_end_that_generation_does_not_know_is_told(train, tiny_checkpoint, tmp_path):
    """Catches: a model that learns to end its answers with a token that nobody stops at, in silence."""
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|endoftext|>"}))
    _, _, err = train(name="other", checkpoint_dir=copy, dry_run="true")
    assert "answers end with '<|im_end|>', and generation stops at '<|endoftext|>' only: add 2 to eos_token_id" in err
    _, _, err = train(dry_run="true")
    assert "note:" not in err


def test_tensorboard_gets_what_the_csv_gets(train):
    """Catches: values under other steps or names, a file that is never written to the end."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    directory, _, _ = train(max_steps=3, batch_size=4, tensorboard="true")
    events = accumulator.EventAccumulator(str(directory / "tensorboard")).Reload()
    for name in ("loss", "learning_rate", "grad_norm", "val_loss"):
        written = {str(event.step): event.value for event in events.Scalars(name)}
        expected = {row["step"]: float(row[name]) for row in metrics(directory) if row[name]}
        assert written == pytest.approx(expected, rel=1e-6) and len(written) >= 3


def test_tensorboard_that_is_missing_is_named(train, monkeypatch):
    """Catches: a traceback, and a run that goes on without what was asked for."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    _, _, err = train(code=2, tensorboard="true")
    assert err.splitlines()[-1] == "error: --tensorboard needs a package: pip install tensorboard."


def test_losses_are_drawn(train, run_script, tmp_path):
    """Catches: a picture of nothing, and a directory without losses."""
    directory, _, _ = train(max_steps=4, batch_size=4)
    rc, out, err = run_script("scripts/plot_metrics.py", "--runs", f"[{directory}]", "--output", tmp_path / "m.png")
    assert rc == 0 and (tmp_path / "m.png").stat().st_size > 10_000, err
    rc, _, err = run_script("scripts/plot_metrics.py", "--runs", f"[{tmp_path}]")
    assert rc == 2 and "holds no metrics.csv" in err


def test_a_longer_context_is_trained_and_kept(train, run_script, tmp_path):
    """Catches: a scaling or a context that the next command has forgotten, groups in eval, a row cut elsewhere."""
    text = tmp_path / "book.txt"
    text.write_text(" ".join(np.random.default_rng(1).choice(WORDS, 6000)))
    scaling = {"model.block_size": 1024, "model.rope_scaling": '{"type": "linear", "factor": 2.0}'}
    directory, _, err = train(data=text, max_seq_length=1024, extra_trainable="embed,norm", max_steps=6, batch_size=2,
                              learning_rate=3e-3, **scaling, **{"model.s2_attention": "true"})  # fmt: skip
    rows = metrics(directory)
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"])
    model = load_model(directory / "final")
    assert model.config.block_size == 1024 and model.config.rope_scaling["factor"] == 2.0 and model.config.s2_attention
    plain = load_model(directory / "final", s2_attention=False)
    idx = torch.randint(0, 300, (1, 1000))
    assert torch.equal(model(idx), plain(idx)) and not torch.allclose(model.train()(idx), plain(idx), atol=1e-3)
    rc, _, err = run_script("scripts/evaluate_ppl.py", "--checkpoint_dir", directory / "final", "--data", text,
                            "--seq_len", 1024, "--stride", 1024, "--output", tmp_path / "ppl.json")  # fmt: skip
    assert rc == 0, err
    got = json.loads((tmp_path / "ppl.json").read_text())["ppl"]
    assert got < np.exp(float(rows[0]["val_loss"]))


def test_ctrl_c_ends_after_the_step_at_hand_and_the_run_goes_on(train, monkeypatch):
    """Catches: a step that is lost or counted twice, a final model of half a run."""
    from contextlib import contextmanager

    from lit_swa import utils

    arguments = {"max_steps": 6, "batch_size": 4, "save_interval": 100, "dropout": 0.1}
    whole, _, _ = train(name="whole", **arguments)
    asked = []

    @contextmanager
    def after_three_steps(*signals):
        yield lambda: asked.append(1) or len(asked) > 3

    with monkeypatch.context() as patch:
        patch.setattr(utils, "interruptible", after_three_steps)
        directory, _, err = train(code=130, **arguments)
    assert "stopped after step 3 of 6: --resume auto goes on" in err and not (directory / "final").exists()
    train(resume="auto", **arguments)
    assert losses(directory) == losses(whole) and (directory / "final").exists()


@pytest.mark.parametrize("script", ["lora", "full", "adapter"])
def test_texts_in_chunks_make_the_same_losses(train, script):
    """Catches: --chunk_size that is not heard, or that changes what is learned; validation in chunks."""
    arguments = {"max_steps": 4, "eval_interval": 2, "model.attention": "sliding", "model.sliding_window_size": 6}
    arguments |= {"start_layer": 0} if script == "adapter" else {}
    whole, *_ = train(script, "whole", **arguments)
    chunked, *_ = train(script, "chunked", chunk_size=5, chunk_offload="true", **arguments)
    for a, b in zip(metrics(whole), metrics(chunked), strict=True):
        for name in ("loss", "val_loss", "grad_norm"):
            assert a[name] == b[name] or float(a[name]) == pytest.approx(float(b[name]), rel=1e-4)
    assert (chunked / "final").is_dir()
