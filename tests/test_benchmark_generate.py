"""scripts/benchmark_generate.py on a tiny model: what it measures is what it says, and every figure follows from it."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from lit_swa.generate import Sampling
from scripts.peers.decode import Cell, LeftOut, write_file

SCRIPT = "scripts/benchmark_generate.py"
QUICK = ["--steps", 3, "--repeats", 1, "--transformers", "false", "--llama_cpp", "false", "--device", "cpu"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmark_generate", Path(__file__).resolve().parents[1] / SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_table_of_modes_positions_and_batch_sizes(tiny_checkpoint, run_script, tmp_path):
    """Catches: a row that is missing, a rate of one sequence in a batch, a share of other bytes than the mode's, a
    picture that cannot be drawn again."""
    output = tmp_path / "b.json"
    arguments = ["--checkpoint_dir", tiny_checkpoint, "--modes", "fp32,int8", "--positions", "9,40", *QUICK]
    arguments += ["--gpt_fast", tmp_path]
    code, out, err = run_script(SCRIPT, *arguments, "--batch_size", "1,2", "--prompt_tokens", 20, "--output", output)
    assert code == 0 and f"gpt-fast is left out: {tmp_path} has no generate.py" in err
    result = json.loads(output.read_text())
    decodes = [row for row in result["rows"] if row["what"] == "decode"]
    expected = [(m, b, p) for m in ("fp32", "int8") for b in (1, 2) for p in (9, 40)]
    assert [(row["mode"], row["batch_size"], row["position"]) for row in decodes] == expected
    assert [row["tokens"] for row in result["rows"] if row["what"] == "prefill"] == [20, 20]
    for row in decodes:
        (figures,) = row["ways"].values()
        assert figures["tok_s"] == pytest.approx(row["batch_size"] * 1e3 / figures["step_ms"]) and figures["finite"]
        rate = row["read_bytes"] * 1e3 / figures["step_ms"]
        assert figures["share"] == pytest.approx(rate / result["copy_rate"])
    read = {(row["mode"], row["batch_size"], row["position"]): row["read_bytes"] for row in decodes}
    assert read["fp32", 1, 40] - read["fp32", 1, 9] == pytest.approx(31 * 256)  # keys of two layers
    assert read["int8", 1, 9] < 0.4 * read["fp32", 1, 9] < 0.4 * read["fp32", 2, 9]
    assert "int8: decode at position 40, batch 2" in out and "no finite" not in out
    picture = output.with_suffix(".png")
    picture.unlink()
    assert run_script("scripts/redraw.py", "--results", output)[0] == 0 and picture.stat().st_size > 5_000


def test_attentions_are_measured_in_turns(run_script, tmp_path):
    """Catches: two measurements of one attention, a cache that is another's, a picture that fails with several."""
    output, arguments = tmp_path / "b.json", ["--name", "SmolLM2-135M", "--modes", "fp32", *QUICK]
    arguments += ["--model.n_layer", 1, "--model.vocab_size", 500, "--model.padded_vocab_size", 512]
    arguments += ["--positions", "100,200", "--prompt_tokens", 0, "--attentions", "[full,linear]"]
    code, out, err = run_script(SCRIPT, *arguments, "--output", output)
    assert code == 0 and "x ours full" in out, err
    short, long = (row["ways"] for row in json.loads(output.read_text())["rows"])
    assert list(short) == list(long) == ["ours full", "ours linear"]
    sizes = [[ways[name]["cache_bytes"] for ways in (short, long)] for name in short]
    assert sizes[0][0] < sizes[0][1] and sizes[1][0] == sizes[1][1]
    assert short["ours full"]["read_bytes"] != short["ours linear"]["read_bytes"]
    assert output.with_suffix(".png").exists()


@pytest.mark.parametrize("fields", [{}, {"attention": "sliding", "sliding_window_size": 8, "rolling_kv_cache": True}])
def test_what_is_timed_continues_the_text_in_every_sequence(script, tiny_model, fields):
    """Catches: caches that hold another text or are not put back, sequences of a batch that differ, a step at the wrong
    position."""
    model, cell = tiny_model(**fields), Cell(3, 21, 4)
    ids = script.random_ids(model, 30)
    way = script.Ours(model, Sampling())
    run, other = way.decode(ids, cell), way.decode(ids, Cell(1, 5, 4))
    with torch.inference_mode():
        text = torch.cat([ids[:, :21], ids[:, 20:21]], dim=1)  # the step feeds the text's last token again
        for _ in range(3):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], dim=1)
        expected = model(text)[:, -1:].expand(3, -1, -1)
        for _ in range(2):
            run()
            torch.testing.assert_close(way.logits[cell], expected, rtol=1e-4, atol=1e-4)
            other()


def test_logits_that_are_no_numbers_are_said(tiny_model, run_script, tmp_path):
    """Catches: a float16 that overflows, whose speed is reported as if nothing were wrong."""
    from lit_swa.checkpoint import save_checkpoint

    model = tiny_model()
    model.transformer.h[0].mlp.proj.weight.data.fill_(6e4)
    save_checkpoint(model, model.config, tmp_path)
    arguments = ["--checkpoint_dir", tmp_path, "--dtypes", "float16", "--positions", "5", "--prompt_tokens", 5, *QUICK]
    code, out, _ = run_script(SCRIPT, *arguments, "--output", tmp_path / "b.json")
    assert code == 0 and out.count("its logits are no finite numbers") == 2
    assert not json.loads((tmp_path / "b.json").read_text())["rows"][0]["ways"]["ours"]["finite"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--modes", "int3"], "There is no mode 'int3': choose from fp32, bf16,"),
        (["--modes", "bf16", "--dtypes", "float32"], "give modes alone"),
        (["--batch_size", "0"], "batch_size=0 does not fit: it must be at least 1"),
        (["--prompt_tokens", "-1"], "prompt_tokens=-1 does not fit: it must be at least 0"),
        (["--eager", "false"], "eager or compile"),
        (["--output", "b.png"], "ends in .json"),
    ],
)
def test_wrong_arguments_are_refused_before_a_model_is_loaded(tiny_checkpoint, run_script, arguments, message):
    """Catches: a mistake that shows after minutes."""
    code, out, err = run_script(SCRIPT, "--checkpoint_dir", tiny_checkpoint, *arguments)
    assert code == 2 and out == "" and message in err and err.startswith("error: ")


@pytest.mark.parametrize("mode, bits", [("bf16", 16), ("int8", 8), ("int4", 4), ("int4-g64", 4)])
def test_random_weights_of_a_named_shape_take_the_modes_bits(script, monkeypatch, mode, bits):
    """Catches: a large model that is dense before it is quantised, a layer left out, a group that does not fit."""
    from lit_swa import Config
    from lit_swa.linear_formats import is_linear, weight_bytes

    config = Config(n_layer=1, n_head=4, n_embd=128, intermediate_size=192, vocab_size=64, tie_embeddings=True)
    monkeypatch.setattr(Config, "from_name", lambda name, **overrides: config)
    model = script.load(script.Source(None, "name", mode, "cpu", {}))
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    for name, linear in linears.items():
        numbers = linear.in_features * linear.out_features
        wanted = 8 if name == "lm_head" and bits < 8 else bits
        assert wanted <= 8 * weight_bytes(linear) / numbers <= wanted + 0.6 and len(linears) == 6
    assert model(torch.zeros(1, 4, dtype=torch.long)).isfinite().all() and torch.get_default_dtype() == torch.float32


def test_the_file_for_llama_cpp_holds_the_weights(tiny_model, tmp_path):
    """Catches: a tensor that is missing or in another layer's place, a model that llama.cpp would compute otherwise."""
    from gguf import GGUFReader

    model = tiny_model()
    write_file(model, tmp_path / "m.gguf", "F32")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert len(tensors) == 3 + 2 * 9
    assert (tensors["blk.1.attn_v.weight"] == model.transformer.h[1].attn.qkv.weight[64:].detach().numpy()).all()
    assert (tensors["blk.0.ffn_up.weight"] == model.transformer.h[0].mlp.fc_2.weight.detach().numpy()).all()
    for fields, message in (
        ({"attention": "sliding", "sliding_window_size": 4}, "full attention"),
        ({"norm_class_name": "LayerNorm", "norm_qk": True}, "llama.cpp has no architecture"),
    ):
        with pytest.raises(LeftOut, match=message):
            write_file(tiny_model(**fields), tmp_path / "n.gguf", "F32")


def test_a_model_that_no_peer_has_is_measured_without_them(script, tiny_model):
    """Catches: a benchmark that ends with another program's refusal, or measures it on another model."""
    wanted = {"transformers": True, "llama.cpp": False, "gpt-fast": None}
    assert script.peers(tiny_model(attention="linear"), script.MODES["fp32"], Sampling(), 9, wanted) == {}
