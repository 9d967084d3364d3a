"""Quantised checkpoints: what scripts/quantize.py writes, and that everything loads it as it is."""

import io
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import randomize, tiny_config
from torch import Tensor, nn

from lit_swa import GPT
from lit_swa.checkpoint import export_hf_checkpoint, load_model, open_weights, save_checkpoint
from lit_swa.formats.files import open_safetensors
from lit_swa.formats.hugging_face import empty_model
from lit_swa.formats.quantized import quantization_of
from lit_swa.gptq import gptq
from lit_swa.hqq import hqq
from lit_swa.linear_formats import dense_weight, is_linear, is_plain
from lit_swa.quantize import Int4Linear, Int8Linear
from lit_swa.quantize_checkpoint import (
    Calibration,
    fill,
    plan_quantization,
    quantize_checkpoint,
    quantized_on_the_way,
)
from lit_swa.weight_only import dense_int4, pack_codes, round_groups

MODES = ("int8", "int4", "int4-hqq", "int4-gptq")
SHAPE = {"n_embd": 64, "n_head": 4, "n_query_groups": 2, "intermediate_size": 128}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose layers groups of 32 and 64 divide, with tied embeddings and biases."""
    directory = tmp_path_factory.mktemp("dense")
    shutil.copytree(tiny_checkpoint, directory, dirs_exist_ok=True)
    size = json.loads((tiny_checkpoint / "lit_config.json").read_text())
    vocabulary = {name: size[name] for name in ("vocab_size", "padded_vocab_size")}
    config = tiny_config(**SHAPE, **vocabulary, tie_embeddings=True, attn_bias=True, block_size=128)
    torch.manual_seed(6)
    model = GPT(config)
    randomize(model)
    save_checkpoint(model.bfloat16(), config, directory)
    return directory


@pytest.fixture(scope="module")
def quantized(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    """Quantised copies of the checkpoint, each made once."""
    import runpy

    main = runpy.run_path(str(Path(__file__).resolve().parents[1] / "scripts/quantize.py"))["main"]
    made: dict[str, Path] = {}

    def make(mode: str) -> Path:
        if mode not in made:
            made[mode] = tmp_path_factory.mktemp("quantized") / mode
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                main(checkpoint, made[mode], mode, calibration_windows=4, calibration_length=32, device="cpu")
        return made[mode]

    return make


@pytest.mark.parametrize("mode", ["int8", "int4-hqq"])
def test_a_conversion_quantises_on_the_way(checkpoint, quantized, run_script, tmp_path, mode):
    """Catches: codes that differ from those of a conversion and scripts/quantize.py, a layer that stays dense."""
    export_hf_checkpoint(checkpoint, tmp_path / "hf")
    code, out, _ = run_script("scripts/convert_hf.py", "--checkpoint_dir", tmp_path / "hf", "--quantize", mode)
    assert code == 0 and out.strip() == str(tmp_path / "hf")
    found, wanted = open_weights(tmp_path / "hf"), open_weights(quantized(mode))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name].load(), wanted[name].load()) for name in wanted)
    assert torch.equal(load_model(tmp_path / "hf")(tokens()), load_model(quantized(mode))(tokens()))
    code, _, error = run_script("scripts/convert_hf.py", "--checkpoint_dir", tmp_path / "hf", "--group_size", 32)
    assert code == 2 and "no effect without --quantize" in error


def test_experts_are_quantised_on_the_way(tmp_path):
    """Catches: experts that are taken for layers, or mixed up."""
    config = tiny_config(**SHAPE, mlp_class_name="MoE", n_expert=4, n_expert_per_token=2, expert_size=64)
    model = GPT(config)
    randomize(model)
    save_checkpoint(model, config, tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")  # not read here
    tensors = open_weights(tmp_path / "dense")
    stored = plan_quantization(tmp_path / "dense", tmp_path / "codes", "int4", None)
    quantize_checkpoint(tmp_path / "dense", tmp_path / "codes", stored, torch.device("cpu"))
    own, found, how = quantized_on_the_way(config, dict(tensors), "int4")
    wanted = open_weights(tmp_path / "codes")
    assert how == stored and own == config and found.keys() == wanted.keys()
    assert all(torch.equal(found[name].load(), wanted[name].load()) for name in wanted)


def tokens(n: int = 24) -> Tensor:
    return torch.randint(0, 300, (2, n), generator=torch.Generator().manual_seed(7))


def dense_twin(model: GPT) -> GPT:
    """The model with plain layers that hold its layers' dense weights."""
    for name, module in [(n, m) for n, m in model.named_modules() if is_linear(m)]:
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        linear.weight.data = dense_weight(module).clone()
        if module.bias is not None:
            linear.bias.data = module.bias.clone()
        model.set_submodule(name, linear)
    return model


@pytest.mark.parametrize("mode", MODES)
def test_what_is_written_loads_as_it_is(quantized, checkpoint, mode):
    """Catches: tensors that are cast on loading, a head that is left dense, a config that does not say so."""
    directory = quantized(mode)
    entry = json.loads((directory / "lit_config.json").read_text())["quantization"]
    assert entry == {"mode": mode} | ({} if mode == "int8" else {"group_size": 64})
    model, idx = load_model(directory), tokens()
    kinds = {type(m) for n, m in model.transformer.h.named_modules() if is_linear(m)}
    assert kinds == {Int8Linear if mode == "int8" else Int4Linear} and type(model.lm_head) is Int8Linear
    assert quantization_of(model).group_size == entry.get("group_size")
    torch.testing.assert_close(model(idx), dense_twin(load_model(directory))(idx), rtol=1e-5, atol=1e-5)
    assert torch.equal(model.transformer.wte.weight, load_model(checkpoint).transformer.wte.weight)
    stored = sum(t.n_bytes for t in open_weights(directory).values())
    weights = sum(m.weight.numel() for n, m in load_model(checkpoint).transformer.h.named_modules() if is_linear(m))
    head = 328 * (64 + 4)
    assert stored < weights * (1 if mode == "int8" else 0.5) * 1.2 + head + 2 * 328 * 64 + 4000


@pytest.mark.parametrize("mode", MODES[:3])
def test_quantising_at_load_gives_the_numbers_of_the_file(quantized, checkpoint, mode):
    """Catches: two rules for groups, heads or scales; a weight that is rounded before its codes."""
    at_load, written = load_model(checkpoint, quantize=mode), load_model(quantized(mode))
    assert torch.equal(at_load(tokens()), written(tokens()))
    assert at_load.config == written.config


def test_the_linear_layers_of_a_published_directory_are_dense_again(quantized, tmp_path, run_script):
    """Catches: codes that are exported as weights, scales that are left over, numbers of another layer."""
    rc, _, err = run_script("scripts/export_hf.py", "--checkpoint_dir", quantized("int4"), "--output_dir", tmp_path)
    assert rc == 0, err
    exported, model = open_safetensors(tmp_path / "model.safetensors"), load_model(quantized("int4"))
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    down = exported["model.layers.1.mlp.down_proj.weight"].load()
    assert torch.equal(down, dense_weight(model.transformer.h[1].mlp.proj).bfloat16())
    assert torch.equal(exported["lm_head.weight"].load(), dense_weight(model.lm_head).bfloat16())
    assert all(tensor.dtype == torch.bfloat16 for tensor in exported.values())


# ------------------------------------------------------------------------------------------------------ what is trained


def test_lora_on_a_quantised_checkpoint_is_saved_loaded_and_merged(quantized, tmp_path, run_script, data_of):
    """Catches: gradients that stop, an adapter that forgets its base, a base that is unpacked to load it, a merge into
    codes, a merged checkpoint that still claims to be quantised."""
    base = quantized("int4-hqq")
    rc, _, err = run_script("finetune/lora.py", "--checkpoint_dir", base, "--data", data_of, "--out_dir",
                            tmp_path / "l", "--max_steps", 2, "--batch_size", 2, "--learning_rate", 0.01, "--device",
                            "cpu", "--max_seq_length", 64)  # fmt: skip
    assert rc == 0, err
    final = tmp_path / "l" / "final"
    assert (final / json.loads((final / "lit_adapter.json").read_text())["base_checkpoint_dir"]).samefile(base)
    loaded = load_model(final)
    assert type(loaded.transformer.h[0].attn.qkv) is Int4Linear and hasattr(loaded.transformer.h[0].attn.qkv, "lora")
    difference = (loaded(tokens()) - load_model(base)(tokens())).abs().max()
    assert difference > 1e-3
    rc, _, err = run_script("scripts/merge_lora.py", "--checkpoint_dir", final, "--output_dir", tmp_path / "merged",
                            "--dtype", "float32")  # fmt: skip
    assert rc == 0, err
    merged = load_model(tmp_path / "merged")
    assert all(is_plain(m) for _, m in merged.named_modules() if is_linear(m))
    assert "quantization" not in json.loads((tmp_path / "merged" / "lit_config.json").read_text())
    torch.testing.assert_close(merged(tokens()), loaded(tokens()), rtol=1e-4, atol=1e-4)


def test_an_embedding_is_not_trained_apart_from_a_head_that_shares_it(
    quantized, checkpoint, tmp_path, run_script, data_of
):
    """Catches: a tied embedding that is trained while lm_head, in 8 bits, keeps the old numbers: loaded dense, the
    adapter would be another model than the one that was trained."""
    rest = ("--data", data_of, "--out_dir", tmp_path / "l", "--max_steps", 1, "--batch_size", 2, "--device", "cpu",
            "--max_seq_length", 64, "--extra_trainable", "embed,norm")  # fmt: skip
    rc, _, err = run_script("finetune/lora.py", "--checkpoint_dir", checkpoint, "--quantize", "int8", *rest)
    assert rc == 2 and "lm_head shares the embedding" in err and "nf4" in err, err
    rc, _, err = run_script("finetune/full.py", "--checkpoint_dir", quantized("int8"), *rest[:-2])
    assert rc == 2 and "is quantised already (int8)" in err and "finetune/lora.py" in err, err


@pytest.fixture
def data_of(tmp_path: Path) -> Path:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"instruction": f"say {n}", "output": f"the fox jumps {n}"} for n in range(8)]))
    return path


# ----------------------------------------------------------------------------------------------------------- algorithms


def test_gptq_keeps_a_layers_outputs_and_hqq_its_weights():
    """Catches: errors that are passed on with the wrong sign or to the wrong columns, an order that is not undone,
    scales of the unsorted columns; an HQQ that is no better than rounding."""
    mix = torch.randn(128, 128) * torch.logspace(-1.5, 0, 128)  # inputs that go together, some of them far larger
    x, held_out = torch.randn(2000, 128) @ mix, torch.randn(500, 128) @ mix
    weight = torch.randn(48, 128) + 3 * torch.randn(48, 128) * (torch.rand(48, 128) < 0.02)
    H = x.T @ x

    def errors(codes: Tensor, scales: Tensor) -> tuple[float, float]:
        difference = dense_int4(pack_codes(codes), scales, torch.float32) - weight
        return (held_out @ difference.T).square().mean().item(), difference.square().mean().item()

    rounded, by_hqq, by_gptq = (errors(*f) for f in (round_groups(weight, 32), hqq(weight, 32), gptq(weight, H, 32)))
    assert by_gptq[0] < 0.4 * rounded[0]
    assert by_hqq[1] < 0.95 * rounded[1]
    H[:, 5] = H[5, :] = 0  # an input that was always zero
    assert errors(*gptq(weight, H, 32))[0] < rounded[0] * 2


def test_a_block_is_calibrated_on_what_the_quantised_ones_before_it_make(checkpoint):
    """Catches: windows that are left out or counted twice, layers that get each other's inputs, a block that sees what
    the dense model makes of the text."""
    text, cpu = torch.cat([tokens(20), tokens(20) + 3])[:3], torch.device("cpu")
    tensors, dense = open_weights(checkpoint), load_model(checkpoint)
    model = empty_model(dense.config).eval()
    fill(model, "transformer.wte", tensors, cpu)
    calibration = Calibration(model, text, cpu)
    fill(model, "transformer.h.0", tensors, cpu)
    assert len(list(calibration.quantize_block(model.transformer.h[0], 32))) == 5
    fill(model, "transformer.h.1", tensors, cpu)
    got, seen = calibration.hessians(model.transformer.h[1]), {}
    dense.transformer.h[0] = model.transformer.h[0]  # which holds the quantised numbers now
    for name, linear in dense.transformer.h[1].named_modules():
        if is_linear(linear):
            linear.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0].flatten(0, 1)}))
    with torch.no_grad():
        dense(text)
    assert got.keys() == seen.keys() and len(seen) == 5
    for name, x in seen.items():
        torch.testing.assert_close(got[name], x.T @ x, rtol=1e-4, atol=1e-4 * (x.T @ x).abs().max().item())


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_written_is_refused_before_any_work(quantized, checkpoint, tmp_path, run_script, monkeypatch):
    """Catches: a traceback, an exit code of 0, a directory that is begun and cannot be finished."""

    def refused(source: Path, *flags: object) -> str:
        rc, out, err = run_script("scripts/quantize.py", "--checkpoint_dir", source, "--output_dir", tmp_path / "new",
                                  "--device", "cpu", *flags)  # fmt: skip
        assert rc == 2 and not out and err.startswith("error: ") and not (tmp_path / "new").exists(), err
        return err

    assert "is quantised already (int4 in groups of 64)" in refused(quantized("int4"), "--mode", "int8")
    assert "groups of 128 do not divide: use --group_size 32 or 64" in refused(
        checkpoint, "--mode", "int4-hqq", "--group_size", 128
    )
    assert "int4-hqq needs groups of 32, 64, 128" in refused(checkpoint, "--mode", "int4-hqq", "--group_size", 0)
    assert "leave --group_size out" in refused(checkpoint, "--mode", "int8", "--group_size", 64)
    assert "leave --calibration_data out" in refused(checkpoint, "--mode", "int4", "--calibration_data", "x.txt")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    few = ("--calibration_data", short, "--calibration_length", 100)
    assert "give a text of at least 100" in refused(checkpoint, "--mode", "int4-gptq", *few)
    assert "use at most 128" in refused(checkpoint, "--mode", "int4-gptq", "--calibration_length", 129)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert "scripts/merge_lora.py" in refused(adapter, "--mode", "int8")
    for place in (short, short / "new"):
        assert f"{short} is a file" in refused(checkpoint, "--output_dir", place)
    with monkeypatch.context() as patched:
        patched.setattr("lit_swa.quantize_checkpoint.os.access", lambda path, mode: False)
        assert f"{tmp_path} cannot be written to" in refused(checkpoint, "--mode", "int8")
    with monkeypatch.context() as patched:
        patched.setattr("lit_swa.formats.files.shutil.disk_usage", lambda path: SimpleNamespace(free=10**4))
        assert "its disk has 0.0 MB left" in refused(checkpoint, "--mode", "int8")
    monkeypatch.setattr("lit_swa.memory.SLACK", (1.0, 0))
    monkeypatch.setattr("lit_swa.memory.free_memory", lambda device, swap: 0)
    assert "use a machine with more memory" in refused(checkpoint, "--mode", "int8")
    monkeypatch.undo()
    rc, _, err = run_script("generate/base.py", "--checkpoint_dir", quantized("int4"), "--quantize", "int8")
    assert rc == 2 and "is quantised already" in err and "leave --quantize out" in err


def test_a_run_that_fails_leaves_nothing(checkpoint, tmp_path, run_script, monkeypatch):
    """Catches: a directory that looks complete, or that is half there, after an error or Ctrl-C."""
    from lit_swa import quantize_checkpoint

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize_checkpoint, "quantize_linear", fail)
    rc, _, err = run_script("scripts/quantize.py", "--checkpoint_dir", checkpoint, "--output_dir", tmp_path / "new")
    assert rc == 130 and err.endswith("interrupted\n") and not (tmp_path / "new").exists()


DAMAGE = {
    "mode": (lambda d: {**d, "mode": "int3"}, "int3"),
    "group": (lambda d: {**d, "group_size": 48}, "group_size 48"),
    "group for another": (lambda d: {**d, "group_size": 32}, "scales"),
    "more": (lambda d: {**d, "zero_point": True}, "is not read here"),
    "no entry": (lambda d: None, "lit_config.json"),
    "a list": (lambda d: [1], "is not read here"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_quantisation_that_is_not_read_is_named(quantized, tmp_path, damage):
    """Catches: weights of a later version, or of another form, that are read as something else."""
    directory = shutil.copytree(quantized("int4"), tmp_path / "c")
    config = json.loads((directory / "lit_config.json").read_text())
    change, message = DAMAGE[damage]
    if (entry := change(config.pop("quantization"))) is not None:
        config["quantization"] = entry
    (directory / "lit_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message if entry is not None else "weight"):
        load_model(directory)


@pytest.mark.parametrize("name, change", [
    ("transformer.h.0.attn.qkv.weight", lambda t: t[:, :-1]),
    ("transformer.h.1.mlp.proj.scales", lambda t: t.float()),
    ("transformer.h.1.mlp.proj.weight", lambda t: t.to(torch.int16)),
    ("lm_head.scale", lambda t: t[1:]),
    ("transformer.h.0.attn.qkv.bias", lambda t: t.to(torch.int8)),
])  # fmt: skip
def test_tensors_of_another_form_are_refused(quantized, tmp_path, name, change):
    """Catches: words that are short, and scales or codes of another dtype, that are read as if they were whole."""
    from lit_swa.formats.files import as_lazy, write_safetensors

    directory = shutil.copytree(quantized("int4"), tmp_path / "c")
    tensors = {n: as_lazy(t.load().clone()) for n, t in open_weights(directory).items()}
    tensors[name] = as_lazy(change(tensors[name].load()).contiguous())
    write_safetensors(directory / "lit_model.safetensors", tensors)
    with pytest.raises(ValueError, match=name):
        load_model(directory)


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_the_table_of_quality_is_that_of_the_models(quantized, checkpoint, tmp_path, run_script):
    """Catches: KL the other way round, targets that are shifted, a dense row that differs from itself."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 20)
    output = tmp_path / "q.json"
    rc, out, err = run_script("scripts/evaluate_quantized.py", "--checkpoint_dir", checkpoint, "--data", text,
                              "--output", output, "--quantized", f"[int8, 'int4:32', {quantized('int4-gptq')}]",
                              "--seq_len", 40, "--windows", 3, "--device", "cpu")  # fmt: skip
    assert rc == 0, err
    rows = json.loads(output.read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "dense",
        "int8",
        "int4:32",
        "int4-gptq:64 (int4-gptq)",
    ] and "`int4:32`" in out
    from lit_swa.evaluate import read_stream, spread_windows

    size = load_model(checkpoint).config.vocab_size
    stream, prefix = read_stream(text, checkpoint, size)
    cut = spread_windows(len(stream), 40, 3, 40, prefix=prefix)
    idx = cut.batch(stream, cut.starts, "cpu")
    dense, other = (
        load_model(checkpoint, quantize=mode)(idx)[:, :-1, :size].log_softmax(-1) for mode in (None, "int8")
    )
    kl = torch.nn.functional.kl_div(other, dense, log_target=True, reduction="none").sum(-1).mean()
    nll = torch.nn.functional.nll_loss(other.flatten(0, 1), idx[:, 1:].flatten())
    assert rows[0]["kl"] == 0 and rows[0]["top_token"] == 1 and rows[1]["tokens"] == 3 * 39
    assert rows[1]["kl"] == pytest.approx(kl.item(), rel=1e-3) and rows[1]["ppl"] == pytest.approx(
        nll.exp().item(), 1e-4
    )
    assert rows[1]["kl"] < rows[2]["kl"] and rows[0]["bytes"] > rows[1]["bytes"] > rows[3]["bytes"]
    assert output.with_suffix(".png").exists()
