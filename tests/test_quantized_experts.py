"""Experts in 8 and 4 bits: the numbers of their dense weights on every path, in memory, in files and in training."""

import shutil
from pathlib import Path

import pytest
import torch
from tiny import randomize, tiny_config
from torch import nn

from lit_swa import GPT, moe
from lit_swa.checkpoint import export_hf_checkpoint, load_model, open_weights, save_checkpoint
from lit_swa.expert_formats import Int4Experts, Int8Experts
from lit_swa.formats.files import open_safetensors
from lit_swa.formats.hugging_face import empty_model
from lit_swa.linear_formats import dense_weight, is_experts, weighty_layers
from lit_swa.lora import LoRAConfig, add_lora, merge_lora
from lit_swa.quantize import quantize_linears
from lit_swa.quantize_checkpoint import Calibration, fill, plan_quantization, quantize_checkpoint
from lit_swa.speculative import int4_copy
from lit_swa.speed import weights_read

SHAPE = {"n_embd": 64, "n_head": 4, "n_query_groups": 2, "intermediate_size": 128, "vocab_size": 320}
EXPERTS = {"mlp_class_name": "GatedMLP,MoE", "n_expert": 5, "n_expert_per_token": 2, "expert_size": 32}
QWEN = SHAPE | EXPERTS | {"shared_expert_size": 64, "shared_expert_gate": True, "expert_weights": "all"}
GPT_OSS = SHAPE | EXPERTS | {"expert_limit": 0.7, "mlp_bias": True}
MODES = ("int8", "int4")
CHOOSING = ["transformer.h.1.mlp.router", "transformer.h.1.mlp.shared_gate"]
IDS = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(7))


@pytest.fixture(params=["gathered", "one by one"])
def way(request, monkeypatch) -> str:
    """Runs a test with both ways to compute experts."""
    monkeypatch.setattr(moe, "GATHERING", ("cpu",))
    monkeypatch.setattr(moe, "GATHERED", 100 if request.param == "gathered" else 0)
    return request.param


def build(fields: dict) -> GPT:
    """A random model whose experts' sizes are far apart: another one's scales are far off."""
    torch.manual_seed(3)
    model = GPT(tiny_config(**fields)).eval()
    randomize(model)
    for module in model.modules():
        if is_experts(module):
            module.weight.data *= torch.logspace(-0.6, 0.6, module.weight.size(0))[:, None, None]
    return model


def quantized(fields: dict, mode: str) -> GPT:
    model = build(fields)
    quantize_linears(model, mode, torch.float32)
    return model


def dense_twin(model: GPT) -> GPT:
    """A plain model of the numbers that a quantised one's layers stand for."""
    twin = GPT(model.config).eval()
    state = {name: t for name, t in model.state_dict().items() if not name.endswith((".scale", ".scales"))}
    state |= {f"{name}.weight": dense_weight(layer) for name, layer in weighty_layers(model).items()}
    twin.load_state_dict(state)
    return twin


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fields", [QWEN, GPT_OSS], ids=["qwen", "gpt-oss"])
@torch.no_grad()
def test_logits_are_those_of_the_dense_weights(mode, fields, way):
    """Catches: codes with another expert's scales or bias, in either way to compute; a router in few bits."""
    model = quantized(fields, mode)
    assert {type(m) for m in model.modules() if is_experts(m)} == {Int8Experts if mode == "int8" else Int4Experts}
    plain = [name for name, m in model.transformer.h.named_modules(prefix="transformer.h") if type(m) is nn.Linear]
    assert plain == [name for name in CHOOSING if "shared" not in name or fields is QWEN]
    assert torch.equal(model(IDS), dense_twin(model)(IDS))
    for module in model.modules():  # as a rank of several does
        if is_experts(module):
            module.bias = None if module.bias is None else module.bias + 1
    assert torch.equal(model(IDS), dense_twin(model)(IDS))


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_weight_moves_by_half_a_step_of_its_own_expert(mode):
    """Catches: scales that experts share, and logits that show it."""
    dense, model = build(QWEN), quantized(QWEN, mode)
    before, after = (weighty_layers(m)["transformer.h.1.mlp.proj"] for m in (dense, model))
    W, error = before.weight, (dense_weight(after) - before.weight).abs()
    if mode == "int8":
        bound = W.abs().amax(dim=2, keepdim=True) / 127 / 2
    else:  # in groups of 32, here a row; scale and offset are rounded to bfloat16
        least, most = W.aminmax(dim=2, keepdim=True)
        bound = (most - least) / 30 + ((most - least) * 8 / 15 + torch.maximum(least.abs(), most.abs())) * 2**-8
    assert (error <= bound * 1.001).all() and error.max() > 0
    kl = torch.nn.functional.kl_div(
        model(IDS).log_softmax(-1), dense(IDS).log_softmax(-1), log_target=True, reduction="none"
    )
    assert 0 < kl.sum(-1).mean() < (0.01 if mode == "int8" else 0.5)


@torch.no_grad()
def test_a_token_reads_the_chosen_experts_alone(way, monkeypatch):
    """Catches: a stack that is made dense whole for one token; figures of bytes that count experts nobody chose."""
    mlp, read = quantized(SHAPE | EXPERTS, "int8").transformer.h[1].mlp, []
    dense_int8 = Int8Experts.dequantize
    note = staticmethod(lambda weight, *rest: read.append(weight.numel()) or dense_int8(weight, *rest))
    for kind in (Int8Experts, Int8Experts.of_one):
        monkeypatch.setattr(kind, "dequantize", note)
    mlp(torch.randn(1, 1, 64), [])
    assert sum(read) == 3 * 2 * 64 * 32
    all_of_them, one = weights_read(mlp, 5), weights_read(mlp, 1)
    assert all_of_them - one == 3 * (5 - 2) * 64 * 32 + 4 * 3 * (32 + 32 + 64)


@pytest.mark.parametrize("mode, rows", [("int8", 1), ("int4", 5)])
@torch.no_grad()
def test_a_step_has_no_graph_break(mode, rows):
    """Catches: a look at who is chosen, one layer for each expert in a compiled step, a step that is compiled anew."""
    torch._dynamo.reset()
    model, graphs = quantized(QWEN, mode), []
    idx = (IDS[0] + torch.arange(rows)[:, None]) % 300
    expected = model(idx)
    model.set_kv_cache(rows, 12)
    step = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    logits = torch.cat([step(idx[:, t : t + 1], torch.tensor([t])) for t in range(12)], dim=1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


@pytest.mark.parametrize("mode", MODES)
def test_lora_trains_beside_them_as_beside_their_dense_weights(mode, way):
    """Catches: a gradient that ends at the experts, in either way to compute; a merge that leaves them in few bits."""
    grads = []
    for model in (dense_twin(quantized(QWEN, mode)), quantized(QWEN, mode)):
        torch.manual_seed(4)
        add_lora(model, LoRAConfig(r=2))
        model.train()(IDS).square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == 2 * 4 * 2 and max(g.abs().max() for g in grads[0]) > 1e-3
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)
    model.zero_grad()
    expected = model.eval()(IDS)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("experts")
    shutil.copytree(tiny_checkpoint, directory, dirs_exist_ok=True)
    model = build(QWEN | {"tie_embeddings": True, "attn_bias": True, "block_size": 64})
    save_checkpoint(model, model.config, directory)
    return directory


@pytest.mark.parametrize("mode", ["int8", "int4", "int4-hqq", "int4-gptq"])
def test_what_is_written_loads_as_it_is(checkpoint, tmp_path, mode):
    """Catches: experts that are stored dense, cast or mixed up; codes that are exported as weights."""
    stored, text = plan_quantization(checkpoint, tmp_path / "q", mode, None), IDS if mode == "int4-gptq" else None
    quantize_checkpoint(checkpoint, tmp_path / "q", stored, torch.device("cpu"), text)
    model, files = load_model(tmp_path / "q"), open_weights(tmp_path / "q")
    held = files["transformer.h.1.mlp.fc_1.weight"]
    assert held.shape == ((5, 32, 64) if mode == "int8" else (5, 32, 8)) and held.dtype in (torch.int8, torch.int32)
    assert all(files[f"{name}.weight"].dtype == torch.float32 for name in CHOOSING)
    assert torch.equal(model(IDS), dense_twin(model)(IDS))
    if text is None:
        assert torch.equal(load_model(checkpoint, quantize=mode)(IDS), model(IDS))
    if mode == "int4":
        export_hf_checkpoint(tmp_path / "q", tmp_path / "hf")
        exported = open_safetensors(tmp_path / "hf/model.safetensors")
        down = exported["model.layers.1.mlp.experts.3.down_proj.weight"].load()
        assert torch.equal(down, dense_weight(model.transformer.h[1].mlp.proj)[3])


def test_experts_are_calibrated_on_the_tokens_that_chose_them(checkpoint):
    """Catches: inputs of another expert, of all tokens, or of none; an expert that nobody chose left out."""
    tensors, cpu = open_weights(checkpoint), torch.device("cpu")
    model = empty_model(load_model(checkpoint).config).eval()
    for part in ("transformer.wte", "transformer.h.0", "transformer.h.1"):
        fill(model, part, tensors, cpu)
    calibration, seen, chosen = Calibration(model, IDS, cpu), [], []
    block = model.transformer.h[1]
    block.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, 1)))
    block.mlp.router.register_forward_hook(lambda module, inputs, scores: chosen.append(scores.topk(2).indices))
    with torch.no_grad():
        sums = calibration.hessians(block)
    for expert in range(5):
        own = torch.cat(seen)[(torch.cat(chosen) == expert).any(dim=1)]
        if len(own):
            torch.testing.assert_close(sums["mlp.fc_2", expert], own.T @ own, rtol=1e-4, atol=1e-4)
    calibration.states, calibration.call = [calibration.states[0][:, :1]], model.plan_call(IDS[:1, :1], None)
    with torch.no_grad():
        few = calibration.hessians(block)
    stack = dict(calibration.quantize_block(block, 32))["mlp.proj"]
    assert sum(("mlp.proj", e) in few for e in range(5)) == 2 and stack.weight.shape == (5, 64, 4)


def test_a_draft_in_4_bits_rounds_the_experts_too():
    """Catches: a draft that reads as much as its target."""
    target = build(QWEN)
    draft = int4_copy(target)
    assert {type(m) for m in draft.modules() if is_experts(m)} == {Int4Experts}
    assert weights_read(draft) < 0.4 * weights_read(target)


def test_what_has_no_form_for_experts_says_so():
    """Catches: experts that stay dense under a mode that was to hold them."""
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="holds experts, which nf4 has no form for: use int8 or int4"):
        quantize_linears(build(SHAPE | EXPERTS | {"expert_size": 64}), "nf4")
