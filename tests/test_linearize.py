"""From softmax to linear attention: what the layers learn, what stays as it was, and the script on a tiny model."""

import copy
import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from compiled import check_gradients
from tiny import randomize, tiny_config
from torch._dynamo.utils import counters

from lit_swa import GPT, Config
from lit_swa import model as model_file
from lit_swa.checkpoint import load_model, save_checkpoint
from lit_swa.formats.files import open_safetensors
from lit_swa.linearize import (
    AttentionTransfer,
    Distillation,
    keep_softmax,
    linear_config,
    linear_layers,
    make_linear,
    measure_harm,
    softmax_mixers,
    softmax_variants,
)
from lit_swa.lora import LoRAConfig, add_lora, merged_state
from lit_swa.mixers import mixing_with
from lit_swa.model import IGNORED
from lit_swa.train import Progress, dropout_of
from lit_swa.training import compiling, linearizing, memory
from lit_swa.training.compiling import compile_linear_attention

pytest.importorskip("lightning")
FULL = ["full"] * 3


def softmax_model(**fields) -> GPT:
    model = GPT(tiny_config(n_layer=3, **fields)).double().eval()
    randomize(model)
    return model


def linear_model(model: GPT, seed: int = 3, **fields) -> GPT:
    """A copy of a softmax model with linear layers that have random weights."""
    made = copy.deepcopy(model)
    make_linear(made, linear_config(model.config, {"linear_window": 3} | fields))
    torch.manual_seed(seed)
    for i in linear_layers(made):
        for p in made.layers[i].mixer.parameters():
            p.data.add_(0.3 * torch.randn_like(p))
    return made


def attention_calls(model: GPT, idx: torch.Tensor, documents: list[int]) -> tuple[list[tuple], torch.Tensor]:
    """What each mixer of a model was given and gave, and the hidden states."""
    calls = []
    hooks = [
        attn.mixer.register_forward_hook(lambda mixer, given, y: calls.append((mixer, *given, y)))
        for attn in model.layers
    ]
    hidden = model.hidden_states(idx, documents=documents)
    for hook in hooks:
        hook.remove()
    return calls, hidden


# ------------------------------------------------------------------------------------------------------------- stage 1


@pytest.mark.parametrize(
    "weights_ce, attention, before",
    [
        (0.0, "linear", {}),
        (0.7, "linear,full,linear", {}),
        (0.7, "linear", {"attention": "sliding,full", "sliding_window_size": 5, "attention_logit_softcapping": 3.0}),
    ],
)
def test_the_gradients_are_those_of_one_loss_over_all_layers(weights_ce, attention, before):
    """Catches: a layer that is fed what the one before it has learned, a layer's share of the mean, a text that counts
    twice; gradients taken at once that differ from those of the whole."""
    softmax = softmax_model(**before)
    model, variants = linear_model(softmax, attention=attention), softmax.config.layer_variants
    idx, documents = torch.randint(0, 97, (2, 16)), [8, 4, 4]  # no more tokens than a head has elements: see below
    transfer, students = AttentionTransfer(model, variants, weights_ce), linear_layers(model)
    loss = transfer(idx, documents=documents)
    (loss / 7).backward()

    calls, _ = attention_calls(softmax, idx, documents)
    call, losses = model.plan_call(idx, None, documents=documents), []
    for i in students:
        teacher, q, k, v, plan, _, y = calls[i]
        student = model.layers[i].mixer
        of_layer = 1000 * ((student(q, k, v, call.plans["linear"], None) - y) ** 2).mean(dim=(1, 3)).sum()
        for a, n in ((0, 8), (8, 4), (12, 4)) if weights_ce else ():
            q_, k_, v_ = (x[:, :, a : a + n] for x in (q, k, v))
            own, alone = (m.plan_call(idx[:, :n], None).plans for m in (softmax, model))
            units = torch.eye(8).double()[:n].expand_as(k_)  # as values they make outputs of the weights
            wanted = teacher(q_, k_, units, own[teacher.kind], None)[..., :n]
            given = student.attention_weights(q_, k_, v_, alone["linear"])
            seen = given.clamp(min=1e-99).log().flatten(0, 2)  # what no query sees would be minus infinity
            mean = torch.nn.CrossEntropyLoss(reduction="sum")(seen, wanted.flatten(0, 2)) / 6
            of_layer = of_layer + weights_ce * mean
        losses.append(of_layer)
    expected = sum(losses) / len(losses)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(transfer.layer_losses, torch.stack(losses))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names and all(".mixer." in name for name in names)
    for name in names:
        p = model.get_parameter(name)
        (wanted,) = torch.autograd.grad(expected / 7, p, retain_graph=True)
        torch.testing.assert_close(p.grad, wanted, rtol=1e-9, atol=1e-12, msg=name)


def test_compiled_linear_attention_learns_the_same(monkeypatch):
    """Catches: a piece that is compiled for each layer, or not at all, or that has other gradients."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    model = softmax_model()
    student = linear_model(model, linear_sinks=1, linear_gate=True).train()
    transfer, idx, found = AttentionTransfer(student, FULL), torch.randint(0, 97, (2, 150)), []
    for compiles in (False, True):
        if compiles:
            compile_linear_attention(student)
        student.zero_grad()
        transfer(idx).backward()
        found.append([p.grad.clone() for p in student.parameters() if p.requires_grad])
        assert counters["stats"]["unique_graphs"] == 2 * compiles  # two chunks, and what remains of the text
    torch.testing.assert_close(*found)


def test_few_lengths_are_compiled(monkeypatch, recwarn):
    """Catches: texts of many lengths in a row, each of which is compiled, until torch gives up with a warning."""
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    model = linear_model(softmax_model()).train()
    idx, lengths = torch.randint(0, 97, (1, 120)), [[60, 30, 20, 10], [50, 40, 25, 5], [64, 33, 14, 9]]
    expected = [model(idx, documents=n) for n in lengths]
    compile_linear_attention(model)
    for n, wanted in zip(lengths, expected, strict=True):
        torch.testing.assert_close(model(idx, documents=n), wanted)
    assert counters["stats"]["unique_graphs"] == 4 and not recwarn.list


@pytest.mark.slow
@pytest.mark.parametrize("length", [150, 192])
def test_compiled_code_has_the_gradients_of_what_it_was_made_of(length):
    """Catches: sums over overlapping views, in which Inductor's threads overwrite each other's numbers and memory."""
    model = linear_model(softmax_model(), linear_sinks=1, linear_gate=True, linear_window=20).float().train()
    check_gradients(model, torch.randint(0, 97, (2, length)), 1e-4)


def test_the_softmax_model_is_untouched_and_nothing_is_kept():
    """Catches: a layer that goes on with the student's output, mixers that stay exchanged, a graph of each layer that
    lives until the backward: the memory of training in place of that of inference."""
    softmax = softmax_model()
    model, idx, kept = linear_model(softmax), torch.randint(0, 97, (1, 20)), []
    transfer = AttentionTransfer(model, FULL)
    before = model(idx)
    hidden: list[torch.Tensor] = []
    model.transformer.h[2].register_forward_hook(lambda block, given, x: hidden.append(x))

    class Held:
        def __init__(self, x: torch.Tensor) -> None:
            self.x = x
            kept.append(weakref.ref(self))

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.x):
        loss = transfer(idx)
    assert len(kept) > 20 and not any(held() for held in kept)
    torch.testing.assert_close(hidden[0], softmax.hidden_states(idx), rtol=0, atol=0)
    loss.backward()
    assert linear_layers(model) == [0, 1, 2] and torch.equal(model(idx), before)


def test_a_dropped_window_leaves_all_keys_to_the_features():
    """Catches: a window that stays small after the pass, that is dropped in validation too, or never."""
    model, idx = linear_model(softmax_model()), torch.randint(0, 97, (1, 20))
    narrow = linear_model(softmax_model(), linear_window=3)
    narrow.load_state_dict(model.state_dict())
    for i in linear_layers(narrow):
        narrow.layers[i].mixer.near = 0
    transfer, before = AttentionTransfer(model, FULL), model(idx)
    whole = transfer(idx)
    transfer.window_dropout = 1.0
    dropped = transfer(idx)
    assert not torch.isclose(dropped, whole) and torch.equal(model(idx), before)
    with torch.no_grad():
        assert torch.equal(transfer(idx), whole.detach())
    dropped.backward()
    assert model.layers[1].mixer.feature_k.grad.abs().sum() > 0


def test_the_probability_of_a_dropped_window_goes_evenly():
    """Catches: a schedule that ends a step early or late, or starts at the wrong end."""
    assert [dropout_of(step, 5, (0.6, 0.2)) for step in range(5)] == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2])
    assert dropout_of(0, 1, (0.6, 0.2)) == 0.6


def test_the_plateau_is_that_of_torch():
    """Catches: a rate that falls earlier, later or by another factor than ReduceLROnPlateau's."""
    p = torch.nn.Parameter(torch.zeros(1))
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        torch.optim.SGD([p], lr=1.0), factor=0.5, patience=1, threshold=0.0
    )
    progress = Progress()
    for loss in np.random.default_rng(0).normal(1.0, 0.1, 60) - np.linspace(0, 0.4, 60):
        scheduler.step(loss)
        progress.note_validation(loss)
        assert progress.scale == scheduler.get_last_lr()[0]
    assert progress.scale < 0.1


# ------------------------------------------------------------------------------------------------------------- stage 2


@pytest.mark.parametrize("elements", [2 * 97 * 3, 10**9, 1])
def test_kl_in_chunks_equals_the_whole(monkeypatch, elements):
    """Catches: a chunk counted twice or left out, a teacher with LoRA or with linear attention, tokens without a
    target, rows of the vocabulary's padding; gradients too."""
    monkeypatch.setattr(model_file, "LOSS_ELEMENTS", (elements, elements))
    softmax = softmax_model(vocab_size=90, padded_vocab_size=97)
    model = linear_model(softmax)
    add_lora(model, LoRAConfig(r=2))
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.double()
            p.data.add_(0.1 * torch.randn_like(p))
    idx = torch.randint(0, 90, (1, 20))
    targets = torch.where(torch.rand(1, 20) < 0.3, IGNORED, torch.randint(0, 90, (1, 20)))
    trained = targets != IGNORED
    distillation = Distillation(model, FULL).train()
    loss = distillation(idx, targets, documents=[12, 8])
    params = [p for p in model.parameters() if p.requires_grad]
    teacher = softmax(idx, documents=[12, 8])[trained][:, :90].detach().log_softmax(-1)
    student = model(idx, documents=[12, 8])[trained][:, :90].log_softmax(-1)
    expected = (teacher.exp() * (teacher - student)).sum()
    torch.testing.assert_close(loss, expected)
    grads = torch.autograd.grad(expected, params)
    loss.backward()
    for p, wanted in zip(params, grads, strict=True):
        torch.testing.assert_close(p.grad, wanted)
    with torch.no_grad():
        torch.testing.assert_close(distillation.eval()(idx, targets), model(idx, targets=targets))


def test_the_ranking_is_that_of_models_built_one_by_one(tmp_path):
    """Catches: a layer exchanged for another, several at once, or a loss measured with the layer before's."""
    softmax = softmax_model()
    model, idx = linear_model(softmax, attention="linear,full,linear"), torch.randint(0, 97, (1, 30))

    def loss_of(model: GPT) -> float:
        with torch.no_grad():
            return model(idx, targets=idx.roll(-1)).item() / 30

    before, losses = measure_harm(model, FULL, lambda: loss_of(model))
    assert before == pytest.approx(loss_of(softmax), rel=1e-12) and list(losses) == [0, 2]
    for i, loss in losses.items():
        pattern = ",".join("linear" if n == i else "full" for n in range(3))
        alone = GPT(linear_config(softmax.config, {"attention": pattern, "linear_window": 3})).double().eval()
        state = model.state_dict()
        alone.load_state_dict({name: state[name] for name in alone.state_dict()})
        assert loss_of(alone) == pytest.approx(loss, rel=1e-12)
        kept = copy.deepcopy(model)
        keep_softmax(kept, [n for n in losses if n != i], FULL)
        assert kept.config.layer_variants == pattern.split(",") and loss_of(kept) == pytest.approx(loss, rel=1e-12)


def test_what_is_saved_is_the_model_with_its_lora(tmp_path):
    """Catches: LoRA merged at another scale or into another layer, a model changed by being saved, a config whose
    pattern is not that of the layers."""
    model = linear_model(softmax_model(tie_embeddings=True)).float()
    keep_softmax(model, [1], FULL)
    add_lora(model, LoRAConfig(r=2))
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn_like(p))
    idx = torch.randint(0, 97, (1, 30))
    logits = model(idx)
    save_checkpoint(merged_state(model), model.config, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config.layer_variants == ["linear", "full", "linear"] and torch.equal(model(idx), logits)
    torch.testing.assert_close(loaded(idx), logits, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "before, fields, words",
    [
        ({"attention": "streaming", "sliding_window_size": 4}, {}, "attention='streaming' cannot be made linear: only"),
        ({"attention": "sliding", "sliding_window_size": 4}, {}, "--model.attention linear"),
        ({"attention": "dual_chunk"}, {"attention": "linear"}, "Layer 0 is dual_chunk, which cannot be made linear"),
        ({}, {"attention": "linear,streaming", "sliding_window_size": 4}, "Layer 1 would be streaming and is full"),
        ({}, {"attention": "full"}, "has no linear layer"),
        ({"s2_attention": True}, {}, "--model.s2_attention false"),
        ({}, {"n_layer": 3}, "n_layer=3 is not the checkpoint's own, 2: leave --model.n_layer out"),
        ({}, {"linear_teacher": "sliding"}, "linear_teacher='sliding' is not the checkpoint's own, None"),
    ],
)
def test_what_cannot_become_linear_is_refused(before, fields, words):
    """Catches: a teacher that sees other keys than the student is told, layers changed without being trained."""
    with pytest.raises(ValueError, match=words):
        linear_config(tiny_config(**before), fields)


def test_a_linear_checkpoint_knows_that_its_teachers_had_windows():
    """Catches: stage 2 alone, --loss kl or --keep_full, that takes layers for full ones that had a window."""
    base = softmax_model(attention="sliding,full,full", sliding_window_size=4)
    config = Config.from_dict(linear_config(base.config, {"attention": "linear,linear,full"}).to_dict())  # as saved
    variants = softmax_variants(linear_config(config, {"linear_sinks": 1}))
    assert variants == ["sliding", "full", "full"], variants
    model, idx = copy.deepcopy(base), torch.randint(0, 97, (1, 20))
    make_linear(model, config)
    with mixing_with(model, softmax_mixers(model, variants)):
        assert torch.equal(model(idx), base(idx))
    keep_softmax(model, [0], variants)
    assert model.config.layer_variants == ["sliding", "linear", "full"]
    half = linear_config(base.config, {})  # the layer with a window stays, and becomes linear later
    assert (half.attention, half.linear_teacher) == ("sliding,linear,linear", None)
    assert linear_config(half, {"attention": "linear"}).linear_teacher == "sliding,full,full"
    with pytest.raises(ValueError, match="linear layers learn from full ones"):
        config.override(linear_teacher="streaming")


def test_layers_with_a_window_stay_unless_they_are_named():
    """Catches: a pattern of one layer too few or too many, windows replaced unasked."""
    base = tiny_config(n_layer=5, attention="sliding,full", sliding_window_size=4)
    assert linear_config(base, {}).attention == "sliding,linear"
    assert linear_config(base, {"attention": "linear"}).layer_variants == ["linear"] * 5
    assert linear_config(tiny_config(), {}).attention == "linear"


# ---------------------------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def data_file(tmp_path_factory) -> Path:
    """Thirty short instructions of several lengths."""
    rng, words = np.random.default_rng(0), "the quick brown fox jumps over lazy dog and sleeps".split()
    made = [{"instruction": f"Say {i}", "output": " ".join(rng.choice(words, 1 + i % 11))} for i in range(30)]
    path = tmp_path_factory.mktemp("data") / "data.json"
    path.write_text(json.dumps(made))
    return path


@pytest.fixture
def linearize(run_script, tiny_checkpoint, data_file, tmp_path, monkeypatch):
    """Run finetune/linearize.py in tmp_path/NAME: (directory, stderr). slow: with the estimate of the memory."""

    def run(name: str = "run", code: int = 0, slow: bool = False, **arguments):
        with monkeypatch.context() as patch:
            if not slow:
                patch.setattr(memory, "estimate_step", lambda *a: (_ for _ in ()).throw(RuntimeError("not now")))
                patch.setattr(linearizing, "save_picture", lambda *a: False)
            return start(name, code, **arguments)

    def start(name: str, code: int, **arguments):
        how = {"checkpoint_dir": tiny_checkpoint, "data": data_file, "sample": "false", "batch_size": 4} | arguments
        how = {"max_seq_length": 64, "model.linear_window": 4, "micro_batch_size": 2, "pack": "false"} | how
        flags = [x for key, value in how.items() if value is not None for x in (f"--{key}", value)]
        rc, _, err = run_script("finetune/linearize.py", "--out_dir", tmp_path / name, *flags)
        assert rc == code, err
        return tmp_path / name, err

    return run


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t.load() for name, t in open_safetensors(directory / "lit_model.safetensors").items()}


def rows_of(path: Path) -> list[list[str]]:
    """The rows of metrics.csv without the seconds, or of layers.csv."""
    rows = [line.split(",") for line in path.read_text().splitlines()]
    return [row[:5] + row[6:] if path.name == "metrics.csv" else row for row in rows]


def forget(directory: Path, kept: str) -> None:
    for path in [*directory.glob("step-*"), directory / "final"]:
        if path.name != kept and path.exists():
            shutil.rmtree(path)


def test_a_run_trains_what_it_says_and_goes_on_wherever_it_was_killed(linearize, tiny_checkpoint, run_script):
    """Catches: a frozen weight that moves, moments, order, dropped windows or rates that begin anew, in either stage; a
    final directory that does not load."""
    how = {
        "max_steps": 3,
        "eval_interval": 2,
        "limit": 16,
        "loss": "kl",
        "dropout": 0.2,
        "window_dropout": 0.6,
        "window_dropout_end": 0.1,
    }
    how |= {"save_interval": 1, "keep_last": 9, "micro_batch_size": 2, "weights_ce": 0.1, "keep_full": 1}
    whole, err = linearize("whole", slow=True, **how)
    assert "1 of 2 layers" not in err and "2 of 2 layers learn to be linear" in err
    assert "mean squared error" not in err and "of attention outputs and weights, perplexity" in err
    ranking = json.loads((whole / "ranking.json").read_text())
    worst = max(ranking["linear"], key=ranking["linear"].get)
    assert f"layers that stay full: {worst}\n" in err
    assert load_model(whole / "final").config.layer_variants[int(worst)] == "full"
    base, transferred, final = (
        stored(path) for path in (tiny_checkpoint, whole / "transfer" / "final", whole / "final")
    )
    learned = {name for name in transferred if ".mixer." in name}
    assert {n for n in transferred if n not in learned and torch.equal(base[n], transferred[n])} == base.keys()
    assert learned and not any(torch.equal(t, transferred[n]) for n, t in untrained(whole).items())
    changed = {name for name in base if not torch.equal(base[name], final[name])}
    assert changed == {f"transformer.h.{i}.attn.{n}.weight" for i in range(2) for n in ("qkv", "proj")}
    assert all(torch.equal(final[name], transferred[name]) for name in learned & final.keys())
    rc, out, err = run_script("generate/base.py", "--checkpoint_dir", whole / "final", "--prompt", "the quick brown",
                              "--max_new_tokens", 12)  # fmt: skip
    assert rc == 0 and out.startswith("the quick brown"), err

    tables = ("metrics.csv", "transfer/metrics.csv", "transfer/layers.csv")
    expected = {name: rows_of(whole / name) for name in tables}
    assert [row[0] for row in expected["transfer/layers.csv"]] == ["step", "1", "2", "3"]
    for stage, step in ((1, 1), (2, 2)):
        killed = whole.with_name(f"killed-{stage}")
        shutil.copytree(whole, killed)
        forget(killed, f"step-{step:06d}" if stage == 2 else "")
        if stage == 1:
            forget(killed / "transfer", f"step-{step:06d}")
            (killed / "metrics.csv").unlink()
            stale = ranking | {"base": "of other weights", "linear": {i: -x for i, x in ranking["linear"].items()}}
            (killed / "ranking.json").write_text(json.dumps(stale))
        linearize(killed.name, resume="auto", **how)
        assert {name: rows_of(killed / name) for name in tables} == expected
        again = stored(killed / "final")
        assert all(torch.equal(again[name], final[name]) for name in again) and again.keys() == final.keys()


def untrained(run: Path) -> dict[str, torch.Tensor]:
    """The linear attention's weights as a new layer has them."""
    model = GPT(load_model(run / "transfer" / "final").config)
    return {name: t for name, t in model.state_dict().items() if ".mixer." in name}


def test_a_stage_can_be_left_out(linearize):
    """Catches: a linear checkpoint that cannot be finetuned, or that begins anew; a stage that is made all the same, or
    whose rate is told as chosen."""
    arguments = {"max_steps": 2}
    first, err = linearize("first", stage2_steps=0, **arguments)
    assert "Stage 2" not in err and "chosen: --warmup_steps 1 of 2\n" in err and "--learning_rate" not in err
    made, transferred = stored(first / "final"), stored(first / "transfer" / "final")
    assert all(torch.equal(made[name], t) for name, t in transferred.items())
    linearize("first", stage2_steps=0, resume="auto", **arguments)
    both, err = linearize("both", stage2_steps=0, **arguments)
    _, err = linearize("both", code=2, stage2_steps=1, **arguments)
    assert "both holds a run (final): --resume auto goes on" in err
    linearize("both", stage2_steps=1, resume="auto", **arguments)  # stage 1 is not made again for it
    assert any(not torch.equal(made[name], t) for name, t in stored(both / "final").items()) and rows_of(
        both / "transfer" / "metrics.csv"
    ) == rows_of(first / "transfer" / "metrics.csv")
    _, err = linearize("second", code=2, checkpoint_dir=first / "final", **arguments)
    assert "linear already (attention='linear'): --stage1_steps 0 goes on with stage 2" in err
    more = {"checkpoint_dir": first / "final", "stage1_steps": 0, "loss": "kl", "model.linear_window": None}
    second, err = linearize("second", **arguments | more)
    final = stored(second / "final")
    assert "Stage 1" not in err and not (second / "transfer").exists()
    assert {n for n in made if torch.equal(made[n], final[n])} == {
        n for n in made if "qkv" not in n and "attn.proj" not in n
    }
    assert load_model(second / "final").config.linear_window == 4


def test_what_does_not_fit_a_run_is_refused_in_a_sentence(linearize):
    """Catches: a run that goes on with other settings, or begins anew unasked; a restart that keeps an old stage."""
    directory, _ = linearize(max_steps=1)
    before = {name: rows_of(directory / name) for name in ("metrics.csv", "transfer/metrics.csv")}
    for change, words in (
        ({}, "--resume auto goes on with it"),
        ({"resume": "auto", "model.linear_window": 5}, "differs in its model (linear_window=4, now 5)"),
        ({"resume": "auto", "window_dropout": 0.5}, "differs in its method (window_dropout=[0.0, 0.0], now"),
        ({"resume": "auto", "loss": "kl"}, "differs in its method (loss=ce, now kl)"),
        ({"resume": "auto", "keep_full": 2}, "keep_full=2 leaves none of 2 layers linear"),
        (
            {"resume": "auto", "keep_full": 1, "validation_fraction": 0},
            "keep_full measures each layer on held-out text",
        ),
        (
            {"resume": "auto", "model.linear_window": 60, "model.linear_sinks": 4},
            "the window and the sinks hold 64, so",
        ),
        ({"resume": "auto", "model.linear_off": "true"}, "linear_off switches off what stage 1 trains"),
        ({"resume": "auto", "targets": "head"}, "targets has no 'head' here"),
        ({"resume": "auto", "stage2_steps": 0, "chunk_size": 4}, "chunk_size cuts the texts of stage 2 alone"),
        (
            {"resume": "auto", "stage2_steps": 0, "loss": "kl"},
            "loss is for stage 2, and --stage2_steps is 0: leave --loss",
        ),
        ({"resume": "auto", "stage2_steps": 0, "learning_rate": 1e-2}, "learning_rate is for stage 2, and --stage2"),
        ({"resume": "auto", "stage1_steps": 0, "window_dropout": 0.5}, "window_dropout is for stage 1, and --stage1"),
        ({"resume": "auto", "max_seq_length": 600}, "max_seq_length=600 is more than the context of 512"),
    ):
        _, err = linearize(code=2, max_steps=1, **change)
        assert words in err.splitlines()[-1], err
    assert before == {name: rows_of(directory / name) for name in before}
    linearize(max_steps=2, resume="restart", stage2_steps=0)
    assert rows_of(directory / "transfer" / "layers.csv")[-1][0] == "2" and not list(directory.glob("step-*"))
