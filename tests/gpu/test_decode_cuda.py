"""On a GPU: python -m pytest tests/gpu. The same promises as on the CPU, and a one-token step that never waits."""

import copy

import pytest
import torch

from lit_swa import GPT
from lit_swa.fast_decode import compile_decode
from lit_swa.generate import generate
from lit_swa.weight_only import Int4Linear, Int8Linear, round_groups

WIDE = {"n_embd": 128, "n_head": 8, "n_query_groups": 2, "head_size": 64, "intermediate_size": 192}
STEPS = {  # what the kernels of a step must know of a model
    "full": {},
    "window in a dense cache": {"attention": "sliding", "sliding_window_size": 9},
    "rolling": {"attention": "sliding", "sliding_window_size": 9, "rolling_kv_cache": True},
    "streaming": {"attention": "streaming", "sliding_window_size": 9, "n_sink_tokens": 3},
    "dual chunk": {"attention": "dual_chunk", "dual_chunk_pretraining_length": 24},
    "soft-capping": {"attention_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    "norms of heads": {"norm_qk": True},
    "biases": {"attn_bias": True, "attn_proj_bias": True, "mlp_bias": True},
    "GPT-NeoX": {
        "norm_class_name": "LayerNorm", "mlp_class_name": "PlainMLP", "activation": "gelu", "parallel_residual": True,
        "rotary_percentage": 0.25,
    },
    "Gemma": {
        "norm_unit_offset": True, "post_attention_norm": True, "post_mlp_norm": True, "scale_embeddings": True,
        "activation": "gelu_tanh", "rope_local_base_freq": 5000.0, "attention": "sliding,full",
        "sliding_window_size": 9,
    },
    "one key head": {"n_query_groups": 1},
    "odd sizes": {"n_head": 9, "n_query_groups": 3, "n_embd": 144, "intermediate_size": 200},
    "linear": {"attention": "linear,full", "linear_window": 7},
    "linear without a window": {"attention": "linear", "linear_window": 0, "linear_feature_map": "relu"},
    "linear with sinks and gates": {
        "attention": "linear", "linear_window": 5, "linear_sinks": 2, "linear_gate": True, "norm_qk": True,
        "attention_logit_softcapping": 20.0,
    },
    "linear off": {"attention": "linear", "linear_window": 5, "linear_sinks": 1, "linear_off": True},
    "no positions": {"attention": "sliding,full", "sliding_window_size": 9, "positions": "rope,none"},
    "Cohere": {
        "norm_class_name": "LayerNorm", "norm_bias": False, "parallel_residual": True, "shared_norm": True,
        "logit_multiplier": 0.25, "positions": "rope,none", "norm_qk": True, "norm_qk_type": "each", "clip_qkv": 0.4,
    },
    "OLMo 2": {
        "pre_norm": False, "post_attention_norm": True, "post_mlp_norm": True, "norm_qk": True, "norm_qk_type": "whole",
    },
    "gpt-oss": {
        "mlp_class_name": "MoE,GatedMLP", "n_expert": 4, "n_expert_per_token": 2, "sink_logits": True,
        "attention": "sliding,full", "sliding_window_size": 9,
    },
    "Granite": {"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "temperature_slope": 0.3,
                "temperature_length": 4},
    "YaRN": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
}  # fmt: skip

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
VARIANTS = {
    "dense": {},
    "dense window": {"attention": "sliding", "sliding_window_size": 9},
    "rolling": {"attention": "sliding", "sliding_window_size": 9, "rolling_kv_cache": True},
    "mixed": {
        "attention": "sliding,full",
        "sliding_window_size": 9,
        "rolling_kv_cache": True,
        "attention_logit_softcapping": 20.0,
    },
    "linear": {"attention": "linear,full", "linear_window": 7, "linear_sinks": 2, "linear_gate": True},
}


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert ((a - b).abs().max() / b.abs().max()).item() < 1e-5  # float32, tf32 is off by default


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_any_split_gives_the_logits_of_one_call(tiny_model, variant):
    """Catches: a path that only the CPU takes, since it may look at positions."""
    model = tiny_model(**VARIANTS[variant]).cuda()
    idx = torch.randint(0, 97, (2, 60), device="cuda")
    expected = model(idx)
    for sizes in ([60], [1] * 60, [7] * 8 + [4], [40, 1, 1, 18], [20, 20, 20]):
        for with_hint in (False, True):
            model.set_kv_cache(2, 64)
            outputs, p = [], 0
            for n in sizes:
                hint = p + n if with_hint else None
                outputs.append(model(idx[:, p : p + n], torch.arange(p, p + n, device="cuda"), input_pos_maxp1=hint))
                p += n
            close(torch.cat(outputs, 1), expected)


@torch.no_grad()
def test_a_model_may_be_built_on_the_gpu(tiny_model):
    """Catches: RoPE's table left on the CPU."""
    expected = tiny_model()
    with torch.device("cuda"):
        model = GPT(expected.config).eval()
    model.load_state_dict(expected.state_dict())
    idx = torch.randint(0, 97, (1, 9))
    close(model(idx.cuda()).cpu(), expected(idx))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_rows_at_positions_of_their_own(tiny_model, variant):
    """Catches: a ragged step that needs the host."""
    model = tiny_model(**VARIANTS[variant]).cuda()
    idx = torch.randint(0, 97, (3, 40), device="cuda")
    expected, rows, delay = model(idx), torch.arange(3, device="cuda"), torch.tensor([0, 4, 11], device="cuda")
    model.set_kv_cache(3, 40)
    for t in range(40):
        pos = t - delay
        logits = model(idx[rows, pos.clamp(min=0)][:, None], pos[:, None])[:, 0]
        begun = pos >= 0
        close(logits[begun], expected[rows, pos.clamp(min=0)][begun])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_one_token_step_never_waits_for_the_gpu(tiny_model, variant, compiled):
    """Catches: an .item() or a copy to the host in the step; torch raises on any synchronisation."""
    torch._dynamo.reset()
    model, T = tiny_model(**VARIANTS[variant]).cuda(), 40
    idx = torch.randint(0, 97, (1, T), device="cuda")
    expected = model(idx)
    model.set_kv_cache(1, T)
    step = compile_decode(model) if compiled else model
    position = torch.zeros(1, dtype=torch.long, device="cuda")
    logits = []
    for t in range(T):
        if t == 8:  # compiled, captured, warm
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        logits.append(step(idx[:, t : t + 1], position))
        position += 1
    torch.cuda.set_sync_debug_mode("default")
    close(torch.cat(logits, 1), expected)


def test_greedy_tokens_are_those_of_the_cpu(tiny_model):
    """Catches: a position or a mask that is another one on the GPU."""
    for fields in VARIANTS.values():
        model = tiny_model(**fields)
        expected = list(generate(model, [1, 2, 3], max_new_tokens=40))
        assert list(generate(model.cuda(), [1, 2, 3], max_new_tokens=40)) == expected


def codes_of(model: GPT, mode: str) -> GPT:
    """The model with its linear layers in 8 bits, or in 4 bits by groups of 32."""
    for name, linear in list(model.named_modules()):
        if type(linear) is torch.nn.Linear and linear.in_features % 32 == 0:
            weight = linear.weight.data.float()
            if mode == "int8":
                model.set_submodule(name, Int8Linear.from_weight(weight, linear.bias))
            else:
                model.set_submodule(name, Int4Linear.from_codes(*round_groups(weight, 32), linear.bias))
    return model.eval()


@torch.no_grad()
def compare_steps(model: GPT, T: int, B: int) -> None:
    """Steps of T tokens of B sequences, each 3 positions behind the one before, against one call without a cache, in
    float32. In 16 bits both round: then the errors' root mean square, over several texts since that of one varies by
    7%, is compared with that of model.py's own. The kernel of one row of codes adds up runs of products in float16:
    beside a model in float16, that shows."""
    dtype, coded = model.transformer.wte.weight.dtype, isinstance(model.lm_head, Int8Linear | Int4Linear)
    torch.manual_seed(0)
    errors, plain = [], []
    for _ in range(1 if dtype == torch.float32 else 4):
        idx = torch.randint(0, 97, (B, 60), device="cuda")
        exact, own = copy.deepcopy(model).float()(idx), model(idx).float()
        found = steps_of(model, idx, T)
        if dtype == torch.float32:
            assert ((found - exact).abs().max() / exact.abs().max()).item() < 2e-5
        errors.append(found - exact)
        plain.append(own - exact)
    error, usual = (torch.stack(x).square().mean().sqrt().item() for x in (errors, plain))
    if dtype != torch.float32:
        assert error < (1.5 if dtype == torch.float16 and coded and T * B == 1 else 1.25) * usual


def steps_of(model: GPT, idx: torch.Tensor, T: int) -> torch.Tensor:
    """The logits of compiled steps of T tokens, each sequence of idx (B, 60) 3 positions behind the one before."""
    B, length = len(idx), 60 + 3 * (len(idx) - 1)
    model.set_kv_cache(B, 76, lookahead=T - 1)
    step, delay = compile_decode(model, tokens=T), 3 * torch.arange(B, device="cuda")[:, None]
    found = torch.full((B, 60, model.config.padded_vocab_size), torch.nan, device="cuda")
    for first in range(0, length, T):
        pos = torch.arange(first, min(first + T, length), device="cuda") - delay  # (B, T)
        pos = torch.where(pos < 60, pos, -1)
        logits = step(idx.gather(1, pos.clamp(min=0)), pos).float()
        rows, tokens = (pos >= 0).nonzero(as_tuple=True)
        found[rows, pos[rows, tokens]] = logits[rows, tokens]
    model.clear_kv_cache()
    return found


@pytest.mark.parametrize(("T", "B"), [(1, 1), (1, 3), (4, 3)])
@pytest.mark.parametrize("kind", STEPS)
def test_steps_are_the_model(tiny_model, kind, T, B):
    """Catches: a kernel that takes another norm, activation, mask, rotation or slot than model.py, or another row's."""
    for dtype in (torch.float32, torch.bfloat16):
        compare_steps(tiny_model(**WIDE | STEPS[kind]).cuda().to(dtype), T, B)


@pytest.mark.parametrize(("T", "B"), [(1, 1), (1, 2), (5, 3), (4, 12)])
@pytest.mark.parametrize("kind", ["full", "biases", "Gemma"])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_steps_with_weights_in_codes(tiny_model, mode, kind, T, B):
    """Catches: a code, a scale or an offset of another group; float16 that overflows inside a product."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        compare_steps(codes_of(tiny_model(**WIDE | STEPS[kind]).cuda(), mode).to(dtype), T, B)


@torch.no_grad()
def test_new_caches_are_recorded_anew(tiny_model):
    """Catches: a graph that goes on with the caches of a session before."""
    model = tiny_model(**WIDE).cuda()
    idx = torch.randint(0, 97, (1, 12), device="cuda")
    expected, step = model(idx), compile_decode(model)
    for length in (16, 32, 16):
        model.set_kv_cache(1, length)
        pos = torch.arange(12, device="cuda")
        close(torch.cat([step(idx[:, p : p + 1], pos[p : p + 1]) for p in range(12)], 1), expected)
    assert len(step.recorded) == 1  # those of caches that are gone went with them
