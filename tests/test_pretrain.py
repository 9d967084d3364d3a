"""pretrain/base.py: from a text to a model that generates, in runs of a few steps of a tiny model."""

import csv
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from lit_swa import model as model_file
from lit_swa import train
from lit_swa.arguments import Pretraining
from lit_swa.checkpoint import load_model
from lit_swa.data.prepare import make_jobs, prepare
from lit_swa.data.sources import Selection
from lit_swa.data.train_tokenizer import train_tokenizer
from lit_swa.formats.files import open_safetensors
from lit_swa.model import VARIANTS, visible
from lit_swa.token_files import TokenDirectory
from lit_swa.tokenizer import Tokenizer
from lit_swa.training import compiling, pretraining
from lit_swa.training.flops import token_flops
from lit_swa.training.loop import learning_rate
from lit_swa.training.loss import differentiate_pieces_at_once
from lit_swa.training.pretraining import TokenFeed, add_z_loss, token_bytes
from lit_swa.training.resuming import compare_identity
from lit_swa.training.windows import Windows, changed_window

pytest.importorskip("lightning")
ROOT = Path(__file__).resolve().parents[1]
WINDOW = {"model.attention": "sliding,full", "model.sliding_window_size": 6}
SHAPE = {"n_layer": 2, "n_head": 2, "n_query_groups": 1, "n_embd": 32, "intermediate_size": 48, "block_size": 32}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Three documents of plain ASCII in a .jsonl file, and as many tokens as some tiny steps read."""
    path = tmp_path_factory.mktemp("text") / "texts.jsonl"
    lines = [" ".join(f"{n} sheep and {n + k} goats cross the river." for n in range(70)) for k in (1, 2, 3)]
    path.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    return path


@pytest.fixture(scope="module")
def tokens(text, tmp_path_factory):
    """(a tokenizer's directory, a directory of tokens)"""
    directory = tmp_path_factory.mktemp("tokens")
    train_tokenizer([text], 300, directory / "tokenizer")
    prepare(make_jobs(directory / "tokens", directory / "tokenizer", [text], Selection())[0], 1)
    return directory / "tokenizer", directory / "tokens"


@pytest.fixture
def pretrain(run_script, tokens, tmp_path):
    """Run the script in tmp_path/WHERE: (directory, stderr)."""

    def run(where="run", code=0, shape=SHAPE, **arguments):
        given = {"data": tokens[1], "tokenizer_dir": tokens[0], "max_steps": 6, "batch_size": 4, "device": "cpu"}
        given |= {"sample": "false"} | {f"model.{field}": value for field, value in shape.items()} | arguments
        flags = [x for key, value in given.items() if value is not None for x in (f"--{key}", value)]
        rc, _, err = run_script("pretrain/base.py", "--out_dir", tmp_path / where, *flags)
        assert rc == code, err
        return tmp_path / where, err

    return run


def metrics(directory):
    with open(directory / "metrics.csv", newline="") as stream:
        return [(row["step"], row["loss"], row["val_loss"]) for row in csv.DictReader(stream)]


def test_a_text_becomes_a_model_that_generates(pretrain, text, run_script):
    """Catches: a loss that does not fall, a final/ without its tokenizer or with other weights, and a run started anew
    with the tokenizer of another size that lies there."""
    found = {"data": text, "tokenizer_dir": None, "tokenizer_vocab_size": 300, "learning_rate": 1e-2}
    found |= {"max_steps": 30, "eval_interval": 30, "save_interval": 30}
    directory, err = pretrain(**found, sample="true")
    losses = [float(loss) for _, loss, _ in metrics(directory) if loss]
    assert math.log(300) - 0.3 < losses[0] < math.log(300) + 0.3 and losses[-1] < losses[0] - 2.0
    assert " | " in err and "generate/base.py" in err and err.count("chosen: --warmup_steps 3 of 30") == 1
    command = ["--checkpoint_dir", directory / "final", "--prompt", "7 sheep", "--temperature", "0"]
    rc, out, err = run_script("generate/base.py", *command, "--max_new_tokens", "8")
    assert rc == 0 and out.startswith("7 sheep and"), err
    for size in (290, 400):
        _, err = pretrain(code=2, **found | {"tokenizer_vocab_size": size}, resume="restart")
        assert f"tokenizer was trained to at most 300 tokens, and tokenizer_vocab_size is {size}: choose" in err


@pytest.mark.parametrize(
    "arguments",
    [
        {"documents": "true", "lr_schedule": "wsd", "micro_batch_size": 1},
        {"chunk_size": 8, "optimizer": "muon", "random_window": 2} | WINDOW,
    ],
)
def test_sigterm_saves_and_the_run_goes_on_to_the_same_losses(pretrain, monkeypatch, arguments):
    """Catches: tokens that a resumed run reads twice or leaves out, a rate or moments that begin anew, a window that is
    drawn by what was drawn before."""
    arguments = {"eval_interval": 2, "save_interval": 100} | arguments
    whole, _ = pretrain("whole", **arguments)
    calls, clip = [], train.clip_gradients

    def stopping(*given):
        calls.append(given)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(*given)

    with monkeypatch.context() as patch:
        patch.setattr(train, "clip_gradients", stopping)
        directory, err = pretrain("stopped", code=130, **arguments)
    assert "stopped after step 3 of 6" in err and not (directory / "final").exists()
    pretrain("stopped", resume="auto", **arguments)
    assert metrics(directory) == metrics(whole) and len(metrics(whole)) >= 6
    a, b = (open_safetensors(d / "final" / "lit_model.safetensors") for d in (directory, whole))
    assert all(torch.equal(a[name].load(), b[name].load()) for name in b)


def test_bits_per_byte_are_those_of_a_computation_by_hand(pretrain, tokens, monkeypatch):
    """Catches: bytes of inputs in place of targets, a held-out block that is trained on, z-loss in the validation; a
    utilisation that is not of the step's tokens and seconds."""
    monkeypatch.setattr(pretraining, "peak_flops", lambda *given: 1e10)
    directory, err = pretrain(max_steps=3, eval_interval=3, save_interval=3, z_loss=0.1)
    said = float(re.findall(r"([\d.]+) bits per byte", err)[-1])
    columns = train.read_metrics(directory)
    assert columns["bits_per_byte"][-1] == pytest.approx(said, abs=1e-4)
    held = TokenDirectory(tokens[1])
    T, n_blocks = 32, (held.n_tokens - 1) // 32
    n = round(0.05 * n_blocks)
    ids = np.fromfile(tokens[1] / held.shards[0]["file"], dtype="<u2").astype(np.int64)[(n_blocks - n) * T :]
    ids = torch.from_numpy(ids[: n * T + 1])
    model = load_model(directory / "final")
    logits = model(ids[:-1].view(n, T)).flatten(0, 1)[:, : model.config.vocab_size].double()
    nll = -logits.log_softmax(-1).gather(1, ids[1:, None]).sum().item()
    text = Tokenizer(tokens[0]).decode(ids[1:].tolist())
    assert said == pytest.approx(nll / math.log(2) / len(text.encode()), abs=1e-4)
    used = 128 * token_flops(model.config, T) / columns["seconds"][-1] / 1e10
    assert f"MFU {used:.1%}" in err


@pytest.mark.parametrize(
    "fields",
    [
        {"attention": "sliding,full"},
        {"attention": "streaming", "n_sink_tokens": 2, "n_expert": 4, "n_expert_per_token": 1, "mlp_class_name": "MoE"},
        {"attention": "dual_chunk", "dual_chunk_pretraining_length": 12, "sliding_window_size": None},
    ],
)
def test_the_operations_of_a_token_are_6_a_weight_and_12_a_pair(tiny_model, fields):
    """Catches: pairs that no query sees, a window or sinks left out, weights counted twice, experts that do nothing."""
    model, T = tiny_model(**{"sliding_window_size": 9, "tie_embeddings": True} | fields), 30
    row = [VARIANTS[name] for name in model.config.layer_variants]
    p = torch.arange(T)[None]
    seen = sum(visible(part, p, p, model.config).sum().item() for r in row for part in r.parts)
    experts = [p.numel() for p in model.parameters() if p.dim() == 3]
    weights = sum(p.numel() for p in model.parameters()) - 3 * sum(experts) / 4
    assert token_flops(model.config, T) == pytest.approx(6 * weights + 12 * 6 * 8 * seen / T)


def test_frozen_weights_save_two_operations_each(tiny_model):
    """Catches: a share of the peak that LoRA reaches by operations that it does not make. torch's counter of the
    products is the oracle."""
    model, idx = tiny_model(), torch.zeros(1, 12, dtype=torch.long)
    counted = []
    for frozen in (False, True):
        for p in [*model.transformer.h.parameters(), *model.lm_head.parameters()]:
            p.requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counter:
            model(idx).sum().backward()
        counted.append(counter.get_total_flops() / 12)
    other = sum(p.numel() for p in model.parameters() if p.dim() == 1) + model.transformer.wte.weight.numel()
    saved = token_flops(model.config, 12) - token_flops(model.config, 12, frozen=True)
    assert counted[0] - counted[1] == saved - 2 * other  # those that are in no product


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_the_bytes_of_tokens_are_those_of_their_text(kind, tokens):
    """Catches: a token of half a character counted by the characters that spell it, and special tokens counted."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    tokenizer, text = Tokenizer(tokens[0]), "A naïve café, 7 € ‒ 東京 🐑\n"
    if kind == "pieces":
        vocab = {"<unk>": 0, "</s>": 1, "▁": 2, "a": 3, "é": 4, "▁a": 5} | {f"<0x{i:02X}>": 6 + i for i in range(256)}
        library = Library(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()])
        library.add_special_tokens(["</s>"])
        directory = tokens[0].parent / "pieces"
        directory.mkdir()
        library.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
        tokenizer = Tokenizer(directory)
    ids = [*tokenizer.encode(text, bos=False), tokenizer.eos_id]
    assert token_bytes(tokenizer)[ids].sum() == len(text.encode())


@pytest.mark.parametrize("elements, at_once", [(97 * 3, True), (97 * 3, False), (97 * 1000, True)])
def test_z_loss_is_its_formula(tiny_model, monkeypatch, elements, at_once):
    """Catches: the padding's logits in Z, a missing square, a piece left out, z-loss in evaluation."""
    monkeypatch.setattr(model_file, "LOSS_ELEMENTS", (elements, elements))
    model, idx = tiny_model(vocab_size=90, padded_vocab_size=97), torch.randint(0, 90, (2, 11))
    targets = torch.randint(0, 90, (2, 11))
    add_z_loss(model, 0.01)
    if at_once:
        differentiate_pieces_at_once(model)
    logits = model.train()(idx).flatten(0, 1)[:, :90]
    nll = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    expected = nll + 0.01 * logits.exp().sum(-1).log().pow(2).sum()
    loss = model(idx, targets=targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    names = list(model.parameters())
    for a, b in zip(torch.autograd.grad(loss, names), torch.autograd.grad(expected, names), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
    torch.testing.assert_close(model.eval()(idx, targets=targets), nll, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("documents", [False, True])
def test_ranks_share_a_step(tokens, documents):
    """Catches: a row that two ranks read or none, and a count of targets that is one rank's."""
    args = Pretraining(data="", batch_size=8, micro_batch_size=2, documents=documents)
    feed = TokenFeed(args, tokens[1], Tokenizer(tokens[0]), tiny_config(vocab_size=300), 16, 2)
    alone = sorted(i for batch in feed.batches(5) for i in batch.examples)
    ranks = [batch for rank in range(2) for batch in feed.batches(5, rank, 2)]
    assert sorted(i for batch in ranks for i in batch.examples) == alone == list(range(40, 48))
    assert feed.trained_tokens(5) == sum(int((batch.targets != -100).sum()) for batch in ranks)


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest(tiny_model):
    """Catches: an embedding in Muon, a rate or decay that only one of both gets, a weight that neither trains."""
    model = tiny_model().double()
    args = Pretraining(data="", optimizer="muon", weight_decay=0.1)
    expected, names = [], {name: p for name, p in model.named_parameters()}
    optimizer = train.build_optimizer(model, args, 0.5)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    matrices = [p for name, p in names.items() if ".h." in name and p.dim() == 2]
    assert optimizer.param_groups[0]["params"] == matrices and len(matrices) == 10
    for name, p in names.items():
        p.grad = torch.randn_like(p)
        muon, decay = ".h." in name and p.dim() == 2, 0.1 if p.dim() > 1 else 0.0
        own, build = p.detach().clone().requires_grad_(), torch.optim.Muon if muon else torch.optim.AdamW
        extra = {"adjust_lr_fn": "match_rms_adamw"} if muon else {"betas": (0.9, 0.95)}
        alone = build([own], lr=1e-3, weight_decay=decay, **extra)
        own.grad = p.grad
        alone.step()
        expected.append(own)
    optimizer.step()
    for p, own in zip(names.values(), expected, strict=True):
        torch.testing.assert_close(p, own, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fields", [{"attention": "sliding,full"}, {"attention": "streaming", "n_sink_tokens": 2}])
def test_a_window_is_data(tiny_model, fields):
    """Catches: a window that a mask, a kernel's plan or a rotation does not hear of, or that stays behind the step."""
    model, idx = tiny_model(sliding_window_size=9, **fields), torch.randint(0, 97, (2, 40))
    for window in (3, 40, 9):
        other = tiny_model(sliding_window_size=window, **fields)
        other.load_state_dict(model.state_dict())
        with changed_window(model, window, 9):
            torch.testing.assert_close(model(idx), other(idx), rtol=1e-5, atol=1e-5)
            assert model.windows == other.windows
    assert model.config.sliding_window_size == 9 and set(model.windows) <= {9, None}


def test_each_window_is_compared_with_its_mask_once(tiny_model, monkeypatch):
    """Catches: a schedule whose every step compares again, 0.2 s of a busy CPU, or a window that nobody compared."""
    model, idx, compared = tiny_model(sliding_window_size=9, attention="sliding"), torch.zeros(1, 40).long(), []
    check = model_file.checks.check_row

    def noted(variant, row, config, last):
        compared.append(config.sliding_window_size)
        check(variant, row, config, last)

    monkeypatch.setattr(model_file.checks, "check_row", noted)
    for window in (3, 5, 3, 5, 9):
        with changed_window(model, window, 9):
            model(idx)
    model(idx)
    assert sorted(compared) == [3, 5, 9]


@pytest.mark.parametrize(
    "argument, expected",
    [
        ({"window_schedule": "2:0,4:0.34,6:0.7"}, [2, 2, 4, 4, 6, 6]),
        ({"random_window": 2}, [Windows(6, (), (2, 4, 6), 1234).of_step(n) for n in range(6)]),
    ],
)
def test_each_step_has_its_window_and_validation_the_last(pretrain, monkeypatch, argument, expected):
    """Catches: a window that never changes, that validation or the saved model has, that a resumed run may change."""
    seen, read = {True: [], False: []}, model_file.GPT.run_blocks

    def noted(model, *given):
        seen[model.training].append(model.windows[0])
        return read(model, *given)

    monkeypatch.setattr(model_file.GPT, "run_blocks", noted)
    directory, _ = pretrain(eval_interval=3, recompute="none", **argument | WINDOW)
    assert seen[True][-6:] == expected and len(set(expected)) == 3
    assert set(seen[False]) == {6} and load_model(directory / "final").config.sliding_window_size == 6
    _, err = pretrain(code=2, resume="auto", **WINDOW)
    assert "differs in its windows" in err


def test_compiled_blocks_make_the_steps_of_eager_ones(pretrain, monkeypatch):
    """Catches: a --compile that is not used, that compiles anew for other documents, another window or a validation,
    or that makes other gradients, also where a layer computes its activations again."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    arguments = {"documents": "true", "random_window": 2, "recompute": 1, "max_steps": 3, "z_loss": 1e-3}
    arguments |= {"model.n_expert": 4, "model.n_expert_per_token": 2, "model.mlp_class_name": "GatedMLP,MoE"} | WINDOW
    found, graphs = [], []
    for compiles in ("false", "true"):
        directory, _ = pretrain(compiles, compile=compiles, **arguments)
        found.append(train.read_metrics(directory))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [0, 5]  # before attention, behind it with an MLP, before and behind experts, the loss
    for name in ("loss", "grad_norm", "val_loss"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5, nan_ok=True)


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(text, tmp_path):
    """Catches: gradients that are summed and not averaged, and rows that both processes read or none."""
    shape = [x for field, value in SHAPE.items() for x in (f"--model.{field}", str(value))]
    rows = []
    for devices in ("1", "2"):
        command = [sys.executable, "pretrain/base.py", "--data", text, "--out_dir", tmp_path / devices, "--devices"]
        command += [devices, "--micro_batch_size", "1", "--max_steps", "3", "--documents", "true", "--device", "cpu"]
        done = subprocess.run([*command, *shape], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        rows.append([float(value or "nan") for row in metrics(tmp_path / devices) for value in row])
    assert rows[0] == pytest.approx(rows[1], rel=1e-5, nan_ok=True)


def test_wsd_keeps_the_rate_and_falls_to_zero():
    """Catches: a fall that begins too early, or that leaves the last step without a rate."""
    args = Pretraining(data="", lr_schedule="wsd", warmup_steps=2, decay_fraction=0.3)
    rates = [learning_rate(step, 10, args, 1.0) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    args.decay_fraction = 0.0
    assert learning_rate(9, 10, args, 1.0) == 1


def test_a_wsd_run_becomes_longer_before_its_rate_falls(pretrain, tmp_path):
    """Catches: a run whose first steps are those of a longer one and that may not become it, and one that may although
    its rate has fallen."""
    given = {"lr_schedule": "wsd", "decay_fraction": 0.5, "save_interval": 2, "keep_last": 9}  # a warmup of one step
    short, _ = pretrain("short", **given)
    longer, _ = pretrain("longer", **given | {"max_steps": 10})
    (tmp_path / "on").mkdir()
    shutil.copytree(short / "step-000002", tmp_path / "on/step-000002")
    shutil.copy(short / "metrics.csv", tmp_path / "on")
    on, err = pretrain("on", resume="auto", **given | {"max_steps": 10})
    assert "going on from" in err and metrics(on) == metrics(longer)
    _, err = pretrain("short", code=2, resume="auto", **given | {"max_steps": 10})
    assert "step-000006 differs in its steps (6, now 10)" in err
    _, err = pretrain("on", code=2, resume="auto", **given | {"max_steps": 20})
    assert "differs in its optimiser (warmup_steps=1, now 2)" in err


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """Catches: a rate that an older version wrote without its name and that stops a run, or that may be another one."""
    names = ("learning_rate", "lr_schedule", "warmup_steps", "weight_decay", "beta2", "grad_clip")
    now = {"optimiser": dict(zip(names, (0.003, "wsd", 4, 0.1, 0.95, 1.0), strict=True))}
    assert compare_identity({"optimiser": [0.003, "wsd", None, 0.1, 0.95, 1.0]}, now, tmp_path) == []
    with pytest.raises(ValueError, match="its optimiser .beta2=0.9, now 0.95.: use"):
        compare_identity({"optimiser": [0.003, "wsd", 4, 0.1, 0.9, 1.0]}, now, tmp_path)


def test_a_checkpoint_is_trained_on(pretrain, text, tiny_checkpoint):
    """Catches: random weights in place of the checkpoint's, and validation on other text than what was given."""
    given = {"data": text, "checkpoint_dir": tiny_checkpoint, "tokenizer_dir": None, "shape": {}, "block_length": 32}
    directory, err = pretrain(max_steps=1, learning_rate=1e-9, validation_data=text, **given)
    held_out = TokenDirectory(directory / "validation")
    assert f"{(held_out.n_tokens - 1) // 32 * 32:,} tokens to validate on" in err
    before, after = (open_safetensors(d / "lit_model.safetensors") for d in (tiny_checkpoint, directory / "final"))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name].load(), after[name].load(), atol=1e-6) for name in before)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"tokenizer_dir": "CHECKPOINT"}, "another vocabulary"),
        ({"model.vocab_size": 280}, "the model's has 280"),
        ({"tokenizer_dir": None}, "no tokenizer"),
        ({"batch_size": 4096}, "one batch takes"),
        ({"batch_size": 4, "micro_batch_size": 3}, "multiple"),
        ({"name": "x", "checkpoint_dir": "CHECKPOINT"}, "not both"),
        ({"name": "TinyLlama"}, "TinyLlama-1.1B"),
        ({"block_length": 64}, "block_length=64 is more than the context of 32"),
        ({"data": "nowhere.txt"}, "nowhere.txt"),
        ({"z_loss": -1}, "z_loss=-1"),
        ({"optimizer": "muon", "strategy": "fsdp"}, "whole matrices"),
        ({"decay_fraction": 0.3}, "no effect with lr_schedule='cosine': use --lr_schedule wsd"),
        ({"random_window": 2}, "no layer has one"),
        ({"random_window": 2, "model.layer_windows": "4,6"} | WINDOW, "gives each its own"),
        ({"random_window": 6} | WINDOW, "nothing to draw from"),
        ({"window_schedule": "4:0,2:0.5,6:0.7"} | WINDOW, "not in order"),
        ({"window_schedule": "4:0,6:1"} | WINDOW, "not in order"),
        ({"window_schedule": "4,6"} | WINDOW, "such as 256:0"),
        ({"window_schedule": "2:0,4:0.5"} | WINDOW, "sliding_window_size is 6"),
        ({"window_schedule": "2:0,6:0.5", "block_length": 5} | WINDOW, "a row has 5"),
        ({"window_schedule": "2:0,6:0.5", "random_window": 2} | WINDOW, "give one"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(pretrain, tiny_checkpoint, arguments, said):
    """Catches: a traceback, or a run on tokens of another vocabulary."""
    arguments = {key: tiny_checkpoint if value == "CHECKPOINT" else value for key, value in arguments.items()}
    directory, err = pretrain(code=2, **arguments)
    assert said in err and err.count("error:") == 1 and "Traceback" not in err
    assert not (directory / "final").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"name": "TinyLlama"}, "TinyLlama-1.1B"),
        ({"random_window": 2}, "no layer has one"),
        ({"chunk_size": 4, "model.s2_attention": "true"}, "S2-Attn"),
        ({"batch_size": 4, "micro_batch_size": 3}, "does not fit 1 processes"),
    ],
)
def test_what_needs_no_text_is_refused_before_it_is_read(pretrain, text, arguments, said):
    """Catches: a name with a slip in it that is told when hours of text have become tokens."""
    directory, err = pretrain(code=2, data=text, tokenizer_dir=None, tokenizer_vocab_size=300, **arguments)
    assert said in err and not directory.exists()


def test_a_model_that_does_not_fit_is_refused_before_text_becomes_tokens(pretrain, text, tiny_checkpoint):
    """Catches: ids without a row, or weights that a field leaves without a place, told when hours of text are read."""
    directory, err = pretrain(code=2, data=text, **{"model.vocab_size": 280})
    assert "and the model's has 280: leave --model.vocab_size out" in err and not directory.exists()
    given = {"data": text, "checkpoint_dir": tiny_checkpoint, "tokenizer_dir": None, "shape": {"n_layer": 1}}
    directory, err = pretrain(code=2, **given)
    assert "which its config has no place for" in err and not directory.exists()


def test_a_text_under_another_key_is_told_with_its_remedy(pretrain, tmp_path):
    """Catches: a file's own fault told as one of the tokenizer, and an argument that this script has not."""
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    _, err = pretrain(code=2, data=tmp_path / "a.jsonl", tokenizer_dir=None, tokenizer_vocab_size=300)
    assert f"error: {tmp_path / 'a.jsonl'} line 1 has the keys content: name the one of the text with --key of" in err


def test_tokens_whose_index_is_missing_are_no_text(pretrain, tokens, tmp_path):
    """Catches: a copy of a directory of tokens that broke off, of which the script says that it holds no text."""
    shutil.copytree(tokens[1], tmp_path / "tokens", ignore=shutil.ignore_patterns("index.json"))
    assert "tokens holds no index.json: copy it from" in pretrain(code=2, data=tmp_path / "tokens")[1]


def test_the_time_to_go_counts_validations(pretrain, monkeypatch):
    """Catches: half a minute to go, told of a run whose validations take minutes. Here each takes 100 seconds."""
    clock = itertools.count(0, 100).__next__
    monkeypatch.setattr("lit_swa.training.finetuning.time", SimpleNamespace(perf_counter=clock))
    _, err = pretrain(max_steps=6, eval_interval=3)
    assert re.search(r"step 1/6 .* eta 2m[45]\ds", err), err


def test_other_data_is_no_run_to_go_on_with(pretrain, text):
    """Catches: a resumed run that silently reads something else."""
    pretrain(max_steps=2)
    words = {"block_length": "block_length", "seed": "seed", "z_loss": "method", "validation_fraction": "held_out"}
    words |= {"model.n_layer": "model (n_layer"}
    changes = ({"block_length": 16}, {"seed": 3}, {"z_loss": 0.5}, {"validation_fraction": 0.2}, {"model.n_layer": 1})
    for changed in changes:
        _, err = pretrain(code=2, max_steps=2, resume="auto", **changed)
        assert f"differs in its {words[next(iter(changed))]}" in err


def test_other_weights_of_a_mixture_are_named(pretrain, tokens, tmp_path):
    """Catches: a resumed run with other weights, refused with two hashes."""
    for name in "ab":
        shutil.copytree(tokens[1], tmp_path / "mix" / name)
    for code, weights, arguments in ((0, '{"a": 3, "b": 1}', {}), (2, '{"a": 1, "b": 1}', {"resume": "auto"})):
        (tmp_path / "mix/mixture.json").write_text(weights)
        _, err = pretrain(code=code, data=tmp_path / "mix", max_steps=1, **arguments)
    assert "differs in its weights ([0.75, 0.25], now [0.5, 0.5])" in err


def test_processes_that_do_not_share_a_step_evenly_are_refused(pretrain, monkeypatch):
    """Catches: devices that read more rows than others, whose gradients would count as much."""
    fabric = SimpleNamespace(device=torch.device("cpu"), world_size=3, rank_zero_first=nullcontext)
    monkeypatch.setattr("lit_swa.training.pretraining.start_fabric", lambda args: (fabric, torch.float32))
    _, err = pretrain(code=2, batch_size=4, micro_batch_size=1)
    assert "batch_size=4 does not fit 3 processes with micro-batches of 1 rows: make it a multiple" in err
