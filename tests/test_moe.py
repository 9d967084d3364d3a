"""Experts and learned sink logits: any way to compute them, their training, a compiled step, and what refuses them."""

import copy

import pytest
import torch

from lit_swa import GPT, Config, cpu_decode, moe
from lit_swa.adapter import AdapterConfig, add_adapter
from lit_swa.config import require_beside
from lit_swa.exact_chunks import ExactChunks
from lit_swa.lora import LoRAConfig, add_lora
from lit_swa.parallel import Rank, split_model
from lit_swa.sequential import place_blocks, spread
from lit_swa.training.memory import recompute_blocks

FIELDS = {
    "mlp_class_name": "GatedMLP,MoE", "n_expert": 5, "n_expert_per_token": 2, "expert_size": 24,
    "shared_expert_size": 16, "shared_expert_gate": True, "expert_weights": "all",
}  # fmt: skip
CLAMPED = {"mlp_class_name": "MoE", "n_expert": 4, "n_expert_per_token": 3, "expert_limit": 0.5, "mlp_bias": True}
KINDS = {
    "qwen": FIELDS, "gpt-oss": CLAMPED | {"sink_logits": True},
    "llama 4": {"mlp_class_name": "MoE", "n_expert": 4, "n_expert_per_token": 1, "expert_weights": "sigmoid"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_expert_by_expert_is_what_gathered_weights_give(tiny_model, kind, monkeypatch):
    """Catches: a token that is sent to another expert, added twice, or weighted by another's weight, in either way."""
    model, idx = tiny_model(**KINDS[kind]).double().train(), torch.randint(0, 97, (2, 11))
    monkeypatch.setattr(moe, "GATHERING", ("cpu",))
    found, calls, gathered = [], [], moe.Experts.gathered
    monkeypatch.setattr(moe.Experts, "gathered", lambda *given: calls.append(1) or gathered(*given))
    for most in (0, 100):
        assert not calls
        monkeypatch.setattr(moe, "GATHERED", most)
        model.zero_grad()
        logits = model(idx)
        logits.square().mean().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    assert calls
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_balancing_loss_is_that_of_transformers(tiny_model):
    """Catches: a loss that counts layers or tokens twice, one that eval adds too, or that moves no router."""
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    model = tiny_model(mlp_class_name="MoE", n_layer=3, n_expert=5, n_expert_per_token=2, balancing_loss=0.3).train()
    routers, scores = [block.mlp.router for block in model.transformer.h], []
    hooks = [r.register_forward_hook(lambda module, inputs, output: scores.append(output)) for r in routers]
    idx, targets, weights = torch.randint(0, 97, (2, 9)), torch.randint(0, 97, (2, 9)), [r.weight for r in routers]
    difference = model(idx, targets=targets)
    for hook in hooks:
        hook.remove()
    expected = 0.3 * 18 * modeling.load_balancing_loss_func(tuple(scores), 5, 2)
    wanted = torch.autograd.grad(expected, weights, retain_graph=True)
    difference = difference - model.eval()(idx, targets=targets)
    torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(wanted, torch.autograd.grad(difference, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * one.abs().max().item())
    grads = []
    for recomputed in (0, 3):  # the blocks that compute their activations again note nothing twice
        recompute_blocks(model.train(), recomputed)
        grads.append(torch.autograd.grad(model(idx, targets=targets), [r.weight for r in routers]))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind, rows", [("qwen", 1), ("gpt-oss", 3), ("llama 4", 6)])
@torch.no_grad()
def test_a_step_has_no_graph_break_and_no_new_graph(tiny_model, kind, rows):
    """Catches: an .item() in the router, a shape that depends on which experts are chosen, many rows whose experts'
    weights are all gathered."""
    torch._dynamo.reset()
    model, graphs = tiny_model(**KINDS[kind], attention="sliding,full", sliding_window_size=4), []
    idx = torch.randint(0, 97, (rows, 9))
    expected = model(idx)
    model.set_kv_cache(rows, 9)
    step = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    logits = torch.cat([step(idx[:, t : t + 1], torch.tensor([t])) for t in range(9)], dim=1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    [graph] = graphs
    made = [node.meta["example_value"] for node in graph.graph.nodes if node.op != "output"]
    assert max(t.numel() for t in made if isinstance(t, torch.Tensor)) <= model.config.n_expert * 64 * 48


def test_what_knows_no_experts_says_so(tiny_model):
    """Catches: experts that stay dense, whole or untrained without a word."""
    model = tiny_model(**FIELDS)
    for act, words in (
        (lambda: add_lora(model, LoRAConfig(targets=("mlp",))), "experts have no LoRA"),
        (lambda: add_adapter(model, AdapterConfig(version=2)), "use version 1"),
        (lambda: cpu_decode.Description(model), "a MoE"),
        (lambda: Config(mlp_class_name="MoE"), "need n_expert"),
        (lambda: Config(n_expert=4, n_expert_per_token=2), "Layers of MoE"),
        (lambda: Config(mlp_class_name="MoE", n_expert=2, n_expert_per_token=3), "is more than n_expert=2"),
        (lambda: Config(mlp_class_name="Mixture"), "none of GatedMLP, PlainMLP, MoE"),
    ):
        with pytest.raises(ValueError, match=words):
            act()


FEATURES = {  # as few models as hold every field that a family brought
    "experts": FIELDS,
    "sinks": {"sink_logits": True, "attention": "sliding,full", "sliding_window_size": 5, "lm_head_bias": True},
    "a gate": {"attention_gate": True, "mlp_class_name": "MoE", "n_expert": 4, "n_expert_per_token": 2,
               "expert_weights": "biased", "expert_scale": 1.5},
    "OLMo 2": {"norm_qk": True, "norm_qk_type": "whole", "pre_norm": False, "post_attention_norm": True,
               "post_mlp_norm": True, "clip_qkv": 0.4},
    "Cohere": {"norm_qk": True, "norm_qk_type": "each", "parallel_residual": True, "shared_norm": True,
               "logit_multiplier": 0.25},
    "Granite": {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "positions": "rope,500,none", "n_layer": 3},
    "heads of each layer": {"n_layer": 3, "layer_heads": "6,4,2", "layer_query_groups": "2,1,1", "sink_logits": True,
                            "attention_gate": True, "norm_qk": True, "norm_qk_type": "each"},
    "Llama 4": {"temperature_slope": 0.3, "temperature_length": 4, "temperature_layers": "none", "norm_qk": True,
                "temperature_offset": 1, "positions": "rope,none", "attention": "chunked,full", "norm_qk_type": "plain",
                "attention_chunk_size": 6, "rolling_kv_cache": True},
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_every_path_computes_the_new_fields(tiny_model, name, monkeypatch):
    """Catches: a compiled step, a run over devices or a training by chunks that leaves a field out."""
    monkeypatch.setattr(cpu_decode, "compile_blocks", lambda model: None)  # seconds of Inductor: the plain step
    T, cpu = 24, torch.device("cpu")
    model, idx, targets = tiny_model(**FEATURES[name]), torch.randint(0, 97, (2, T)), torch.randint(0, 97, (2, T))
    trained = copy.deepcopy(model).double().train()
    with torch.no_grad():
        expected, step = model(idx), cpu_decode.compile_for_cpu(model)
        model.set_kv_cache(2, T)
        logits = torch.cat([step(idx[:, t : t + 1], torch.tensor([t])) for t in range(T)], dim=1)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        placed = spread(model, place_blocks(model, [cpu, cpu], 1))
        torch.testing.assert_close(placed(idx), expected, rtol=1e-5, atol=1e-5)
    grads = []
    for loss in (lambda: trained(idx, targets=targets), lambda: ExactChunks(trained, 7)(idx, targets)):
        trained.zero_grad()
        loss().backward()
        grads.append([p.grad.clone() for p in trained.parameters() if p.requires_grad])
    for one, other in zip(*grads, strict=True):
        assert (one - other).abs().max() <= 1e-6 * one.abs().max()  # the logits are float32


ATTENTION = [
    {"attention": "sliding,full", "sliding_window_size": 5},
    {"attention": "streaming", "sliding_window_size": 5, "n_sink_tokens": 2},
    {"attention": "dual_chunk", "dual_chunk_pretraining_length": 12},
]


@pytest.mark.parametrize("fields", ATTENTION, ids=[fields["attention"] for fields in ATTENTION])
def test_sink_logits_train_the_same_by_kernels_and_in_plain_steps(tiny_model, fields, monkeypatch):
    """Catches: a sink's gradient that is left out or counted for another head, and one that the merged kernels lose."""
    torch.manual_seed(0)
    fast = tiny_model(**fields, sink_logits=True).double()
    monkeypatch.setattr("lit_swa.model.fast_attention", lambda: None)
    plain = GPT(fast.config).double()
    plain.load_state_dict(fast.state_dict())
    idx, grads = torch.randint(0, 97, (2, 31)), []
    for model in (fast, plain):
        model(idx).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert any("sink_logits" in name and g.abs().max() > 1e-9 for name, g in grads[0].items())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-8, atol=1e-10)


def test_what_knows_no_sink_logits_or_temperature_says_so(tiny_model):
    """Catches: a path that computes attention without them."""
    for fields, words in (
        ({"sink_logits": True, "s2_attention": True}, "no learned sink logits"),
        ({"sink_logits": True, "attention": "linear"}, "Linear attention has no learned sink logits"),
        ({"temperature_slope": 0.1, "temperature_length": 4, "attention": "linear"}, "no temperature by position"),
        ({"temperature_slope": 0.1}, "need each other"),
        ({"positions": "rope,alibi"}, "neither rope nor none"),
        ({"shared_norm": True}, "needs parallel_residual"),
        ({"norm_weight": False}, "is a LayerNorm's"),
    ):
        with pytest.raises(ValueError, match=words):
            Config(**fields)
    with pytest.raises(ValueError, match="compares the experts over a whole text"):
        ExactChunks(tiny_model(**FIELDS, balancing_loss=0.1), 7)
    with pytest.raises(ValueError, match="norms all of its 2 key heads at once"):
        split_model(tiny_model(**FEATURES["OLMo 2"]), Rank(0, 3))


def test_a_field_whose_file_was_not_copied_is_refused():
    """Catches: an AttributeError of None, where someone took model.py, config.py and rope.py alone."""
    with pytest.raises(ValueError, match="n_expert needs nothing.py beside config.py"):
        require_beside("nothing", "n_expert")
