"""Quantised checkpoints: what scripts/quantize.py writes, and that everything loads it as it is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lit_swa import GPT
from lit_swa.checkpoint import load_model, open_weights, save_checkpoint
from lit_swa.formats.quantized import quantization_of
from lit_swa.linear_formats import dense_weight, is_linear
from lit_swa.quantize import Int4Linear, Int8Linear

MODES = ("int8", "int4", "int4-hqq", "int4-gptq")
SHAPE = {"n_embd": 64, "n_head": 4, "n_query_groups": 2, "intermediate_size": 128}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose layers groups of 32 and 64 divide, with tied embeddings and biases."""
    from tiny import randomize, tiny_config

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
            main(checkpoint, made[mode], mode, calibration_windows=4, calibration_length=32, device="cpu")
        return made[mode]

    return make


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
