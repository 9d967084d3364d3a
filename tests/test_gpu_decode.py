"""A GPU's decode step without its kernels, which a CPU can run: the blocks, the plans and the layers that it calls."""

from types import SimpleNamespace

import pytest
import torch

from lit_swa import gpu_decode
from lit_swa.gpu_decode import Step, who_sees
from lit_swa.lora import LoRAConfig, add_lora
from lit_swa.model import VARIANTS
from lit_swa.rope import apply_rope

FIELDS = {
    "full": {},
    "rolling": {"attention": "sliding", "sliding_window_size": 9, "rolling_kv_cache": True},
    "streaming": {"attention": "streaming", "sliding_window_size": 9, "n_sink_tokens": 2},
    "dual chunk": {"attention": "dual_chunk", "dual_chunk_pretraining_length": 24},
    "GPT-NeoX": {
        "norm_class_name": "LayerNorm", "mlp_class_name": "PlainMLP", "activation": "gelu", "parallel_residual": True,
        "attn_bias": True, "mlp_bias": True,
    },
    "Gemma": {
        "norm_unit_offset": True, "post_attention_norm": True, "post_mlp_norm": True, "scale_embeddings": True,
        "norm_qk": True, "final_logit_softcapping": 10.0,
    },
    "Cohere": {
        "norm_class_name": "LayerNorm", "norm_bias": False, "parallel_residual": True, "shared_norm": True,
        "logit_multiplier": 0.25, "positions": "rope,none", "norm_qk": True, "norm_qk_type": "each", "clip_qkv": 0.4,
    },
    "OLMo 2": {
        "pre_norm": False, "post_attention_norm": True, "post_mlp_norm": True, "norm_qk": True, "norm_qk_type": "whole",
    },
    "Granite": {
        "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logit_multiplier": 0.5, "sink_logits": True,
        "positions": "rope,500", "lm_head_bias": True, "temperature_slope": 0.3, "temperature_length": 4,
    },
    "AFMoE": {"attention_gate": True, "mlp_class_name": "MoE", "n_expert": 4, "n_expert_per_token": 2,
              "expert_weights": "biased"},
    "gpt-oss": {
        "mlp_class_name": "MoE,GatedMLP", "n_expert": 4, "n_expert_per_token": 2, "sink_logits": True,
        "attention": "sliding,full", "sliding_window_size": 9,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    monkeypatch.setattr(gpu_decode, "gpu_kernels", lambda: None)


@pytest.mark.parametrize("kind", FIELDS)
@torch.no_grad()
def test_a_step_is_the_model(tiny_model, kind):
    """Catches: a norm, a residual or a cap of model.py that the step leaves out."""
    model, B = tiny_model(**FIELDS[kind]), 2
    idx = torch.randint(0, 97, (B, 30))
    expected = model(idx)
    model.set_kv_cache(B, 30)
    step, delay = Step(model), 4 * torch.arange(B)[:, None]
    for t in range(34):
        pos = torch.where(t - delay < 30, t - delay, -1)  # (B, 1)
        logits = step.run(idx.gather(1, pos.clamp(min=0)), pos)
        rows = (pos[:, 0] >= 0).nonzero()[:, 0]
        torch.testing.assert_close(logits[rows, 0], expected[rows, pos[rows, 0]], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_layer_that_kernels_do_not_know_is_called(tiny_model):
    """Catches: a LoRA beside a weight that the step passes over."""
    model = tiny_model()
    add_lora(model, LoRAConfig(4, 8.0, 0.0, "q,k,v,o,mlp", (), False, False))
    for name, p in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(p, 0, 0.1)
    idx = torch.randint(0, 97, (1, 8))
    expected = model.eval()(idx)
    model.set_kv_cache(1, 8)
    step = Step(model)
    logits = torch.cat([step.run(idx[:, t : t + 1], torch.tensor([t])) for t in range(8)], dim=1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_the_table_of_who_sees_whom(tiny_model):
    """Catches: a part numbered as another, padding that sees something, a live block that is not listed."""
    config = tiny_model(**FIELDS["streaming"]).config
    q_pos, k_pos = torch.tensor([[40, 41], [-1, 3]]), torch.cat([torch.arange(64), torch.full((70,), -1)]).expand(2, -1)
    seen = who_sees(VARIANTS["streaming"].parts, q_pos, k_pos, config)  # (2, 2, 134)
    near = [int(config.n_sink_tokens <= k <= 40 and 40 - k < 9) for k in range(64)]
    assert seen[0, 0, :64].tolist() == [2 if k < config.n_sink_tokens else near[k] for k in range(64)]
    assert not seen[0, :, 64:].any() and not seen[1, 0].any() and seen[1, 1].any()


@pytest.mark.parametrize("kind", ["full", "rolling", "streaming", "dual chunk"])
@torch.no_grad()
def test_a_plan_leads_to_what_the_model_reads(tiny_model, monkeypatch, kind):
    """Catches: a key written to another slot than the model's, a block that is not read, an angle of another part.

    Plain attention by the plan's tables, as the kernel reads them, against the model's own.
    """
    known = SimpleNamespace(KEYS=4, most_queries=lambda size: 64)
    monkeypatch.setattr(gpu_decode, "gpu_kernels", lambda: known)
    model, B, T = tiny_model(**FIELDS[kind], n_layer=1), 2, 3
    idx = torch.randint(0, 97, (B, 30))
    expected = model(idx)
    model.set_kv_cache(B, 32, lookahead=T - 1)
    (attn,), block = model.layers, model.transformer.h[0]
    delay = 4 * torch.arange(B)[:, None]
    for first in range(0, 36, T):
        pos = torch.where((p := torch.arange(first, first + T) - delay) < 30, p, -1)
        x = model.transformer.wte(idx.gather(1, pos.clamp(min=0)))
        assert gpu_decode.fits_kernel(attn, T, model.rope)
        plan = gpu_decode.slot_plan(attn.mixer, attn.kv_cache.slots, pos, False, model.rope, counts=None)
        y = attend_by_tables(attn, attn.qkv(block.norm_1(x)), plan)
        x = x + attn.proj(y)
        logits = model.project(x + block.mlp(block.norm_2(x)))
        rows, tokens = (pos >= 0).nonzero(as_tuple=True)
        torch.testing.assert_close(logits[rows, tokens], expected[rows, pos[rows, tokens]], rtol=1e-4, atol=1e-4)


def attend_by_tables(attn, qkv, plan):
    """The attention kernel in plain steps: (B, T, (H + 2 G) * D) -> (B, T, H * D)."""
    (B, T, _), H, G, cache = qkv.shape, attn.n_head, attn.n_query_groups, attn.kv_cache
    q, k, v = qkv.view(B, T, H + 2 * G, -1).transpose(1, 2).split((H, G, G), dim=1)
    k = apply_rope(k, plan.k_cos[:, None], plan.k_sin[:, None])
    L = plan.seen.size(-1) - T
    read = torch.zeros(B, L, dtype=torch.bool)
    for row, blocks in zip(read, plan.blocks, strict=True):
        for n in blocks[1 : 1 + blocks[0]].tolist():
            row[4 * n : 4 * n + 4] = True
    keys, values = torch.cat([cache.k[:, :, :L], k], dim=2), torch.cat([cache.v[:, :, :L], v], dim=2)
    seen = torch.where(torch.cat([read, torch.ones(B, T, dtype=torch.bool)], dim=1)[:, None], plan.seen, 0)
    scores = torch.full((B, H, T, L + T), -torch.inf)
    for n, (cos, sin) in enumerate(zip(plan.cos, plan.sin, strict=True), 1):
        s = apply_rope(q, cos[:, None], sin[:, None]) @ keys.repeat_interleave(H // G, 1).mT * q.size(-1) ** -0.5
        scores = torch.where((seen == n)[:, None], s, scores)
    weights = scores.softmax(-1).nan_to_num()  # padding sees nothing
    for b, copy, t in (plan.slots >= 0).nonzero().tolist():
        slot = plan.slots[b, copy, t]
        cache.k[b, :, slot], cache.v[b, :, slot] = k[b, :, t], v[b, :, t]
    return (weights @ values.repeat_interleave(H // G, 1)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    "fields",
    [
        {"norm_qk": True, "norm_class_name": "LayerNorm"},
        {"rotary_percentage": 0.0},
        {"attention": "dual_chunk", "dual_chunk_pretraining_length": 24, "rotary_percentage": 0.5},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}},
    ],
)
def test_what_the_attention_kernel_does_not_know(tiny_model, monkeypatch, fields):
    """Catches: a layer that the kernel would compute with another norm, rotation or temperature than the model's."""
    monkeypatch.setattr(gpu_decode, "gpu_kernels", lambda: SimpleNamespace(most_queries=lambda size: 64))
    for known, model in ((True, tiny_model()), (False, tiny_model(**fields))):
        model.set_kv_cache(1, 32)
        assert gpu_decode.fits_kernel(model.layers[0], 1, model.rope) is known
