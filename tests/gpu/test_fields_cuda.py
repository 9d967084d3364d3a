"""On a GPU: the fields of the newer families, and experts, against model.py's plain steps on the CPU."""

import pytest
import torch
from torch import Tensor

from lit_swa import GPT
from lit_swa.fast_decode import compile_decode
from lit_swa.linear_formats import gpu_kernels
from lit_swa.quantize import quantize_linears

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
WIDE = {"n_embd": 128, "n_head": 8, "n_query_groups": 2, "head_size": 64, "intermediate_size": 192, "block_size": 64}
WINDOWS = {"attention": "sliding,full", "sliding_window_size": 9}
MOE = {"mlp_class_name": "GatedMLP,MoE", "n_expert": 4, "n_expert_per_token": 2, "expert_size": 96}
NOPE = {"positions": "rope,none", "temperature_slope": 0.3, "temperature_length": 4, "temperature_layers": "none"}
FIELDS = {  # and how many of two layers the attention kernel serves
    "sinks": ({"sink_logits": True} | WINDOWS, 2),
    "sinks, rolling": ({"sink_logits": True, "rolling_kv_cache": True} | WINDOWS, 2),
    "sinks beside first tokens": (
        {"sink_logits": True, "attention": "streaming", "sliding_window_size": 9, "n_sink_tokens": 3}, 2,
    ),
    "gpt-oss": ({"sink_logits": True, "mlp_bias": True, "expert_limit": 0.7} | WINDOWS | MOE, 2),
    "no positions": ({"positions": "rope,none"} | WINDOWS, 2),
    "temperature": ({"temperature_slope": 0.3, "temperature_length": 4} | WINDOWS, 2),
    "Llama 4": (
        {"attention": "chunked,full", "attention_chunk_size": 7, "rolling_kv_cache": True, "temperature_offset": 1,
         "norm_qk": True, "norm_qk_type": "plain", "expert_weights": "sigmoid"} | NOPE | MOE, 1,
    ),
    "chunks and bases": (
        {"attention": "chunked,full", "attention_chunk_size": 7, "positions": "500,none", "temperature_slope": 0.3,
         "temperature_length": 4, "temperature_layers": "none"}, 2,
    ),
    "AFMoE": ({"attention_gate": True, "norm_qk": True, "expert_weights": "biased", "expert_scale": 1.5} | MOE, 2),
    "heads and windows of each layer": (
        {"layer_heads": "8,4", "layer_query_groups": "1,2", "attention": "sliding", "layer_windows": "5,11",
         "sink_logits": True}, 2,
    ),
}  # fmt: skip


@pytest.fixture
def served(monkeypatch) -> list[torch.nn.Module]:
    """Which layers' caches the attention kernel has read."""
    kernels, caches = gpu_kernels(), []
    attention = kernels.attention

    def noted(qkv: Tensor, cache: torch.nn.Module, *how: object) -> Tensor:
        caches.append(cache)
        return attention(qkv, cache, *how)

    monkeypatch.setattr(kernels, "attention", noted)
    return caches


@torch.no_grad()
def plain_logits(model: GPT, idx: Tensor) -> Tensor:
    """Those of model.py's plain steps, on the CPU."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lit_swa.model.fast_attention", lambda: None)
        plain = GPT(model.config).eval().to(model.transformer.wte.weight.dtype)
    plain.load_state_dict(model.state_dict())
    return plain(idx).float()


@torch.no_grad()
def logits_on_gpu(model: GPT, idx: Tensor) -> dict[str, Tensor]:
    """In one call; through a cache in a prompt, eager steps and compiled ones. The last of these never wait."""
    model, idx, (B, T) = model.to(DEVICE), idx.to(DEVICE), idx.shape
    model.set_kv_cache(B, T)
    pieces, step, at = [model(idx[:, :40], torch.arange(40, device=DEVICE))], compile_decode(model), None
    for t in range(40, T):
        if t == T - 6:
            at = torch.cuda.get_sync_debug_mode()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        pos = torch.arange(t, t + 1, device=DEVICE)
        pieces.append((model if t < 46 else step)(idx[:, t : t + 1], pos))
    torch.cuda.set_sync_debug_mode(at)
    return {"uncached": model(idx).float().cpu(), "cached": torch.cat(pieces, dim=1).float().cpu()}


def compare(found: dict[str, Tensor], exact: Tensor, most: float) -> None:
    for name, logits in found.items():
        error = (logits - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert error < most, f"{name}: {error:.1e} of the logits' root mean square, at most {most:.1e}"


@pytest.mark.parametrize("kind", FIELDS)
def test_a_gpu_computes_every_field(tiny_model, served, kind):
    """Catches: a kernel or a step that leaves a field out; one that the kernel knows and that runs in plain steps."""
    fields, layers = FIELDS[kind]
    model, idx = tiny_model(**WIDE | fields), torch.randint(0, 97, (2, 60))
    compare(logits_on_gpu(model, idx), plain_logits(model.cpu(), idx), 2e-5)  # float32
    assert len({id(cache) for cache in served}) == layers


@pytest.mark.parametrize("kind", ["sinks", "Llama 4"])
def test_bfloat16_is_as_near_as_on_a_cpu(tiny_model, kind):
    """Catches: a sum that is kept in 16 bits."""
    model, idx = tiny_model(**WIDE | FIELDS[kind][0]), torch.randint(0, 97, (2, 60))
    exact = plain_logits(model, idx)
    own = (plain_logits(model.bfloat16(), idx) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    compare(logits_on_gpu(model, idx), exact, 2 * own.item())


@pytest.mark.parametrize("rows", [1, 6])  # of many tokens, every expert reads all
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", [None, "int8", "int4"])
def test_experts_in_a_compiled_step(tiny_model, monkeypatch, mode, dtype, rows):
    """Catches: a step that waits to know who was chosen, a weight, scale or bias of another expert, a kernel that is
    not used, memory for the experts of every row."""
    kernels, calls = gpu_kernels(), []
    product = kernels.expert_product
    monkeypatch.setattr(kernels, "expert_product", lambda *given: calls.append(1) or product(*given))
    model, idx = tiny_model(**WIDE | FIELDS["gpt-oss"][0]), torch.randint(0, 97, (rows, 60))
    if mode is not None:
        quantize_linears(model, mode, dtype)
    layers = [m for m in model.modules() if hasattr(m, "compute_dtype")]
    assert len(layers) == (0 if mode is None else 2 * 2 + 3 + 3 + 1)
    with torch.no_grad():
        for layer in layers:
            layer.compute_dtype = torch.float32
        exact = model(idx)  # of codes: what tests/test_quantized_experts.py compares with the dense weights
        for layer in layers:
            layer.compute_dtype = dtype
        own = model.to(dtype)(idx).float() - exact
    most = 1e-4 if dtype == torch.float32 else 2 * (own.square().mean().sqrt() / exact.square().mean().sqrt()).item()
    compare(logits_on_gpu(model, idx), exact, most)
    assert bool(calls) == (rows == 1 and (mode is None or dtype != torch.float32))
