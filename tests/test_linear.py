"""Linear attention: against its formula pair by pair in float64, any split, ragged, taken back, trained, saved."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import randomize, tiny_config
from torch import Tensor

from lit_swa import GPT, Config, linear
from lit_swa.linear import LinearAttention
from lit_swa.model import RoPE
from lit_swa.rope import find_span

CASES = {
    "lolcats": {"linear_window": 5},
    "relu": {"linear_window": 5, "linear_feature_map": "relu"},
    "one key": {"linear_window": 1},
    "no window": {"linear_window": 0},
    "sinks": {"linear_window": 4, "linear_sinks": 3},
    "gate": {"linear_window": 3, "linear_gate": True},
    "all": {"linear_window": 6, "linear_sinks": 2, "linear_gate": True, "attention_logit_softcapping": 3.0},
    "off": {"linear_window": 4, "linear_sinks": 1, "linear_off": True},
    "window of all": {"linear_window": 64},
}
T = 40


def build(**fields) -> tuple[LinearAttention, RoPE]:
    """A layer with weights from which every term of the formula shows, in float64."""
    config = tiny_config(n_layer=1, attention="linear", **fields)
    model = GPT(config).double()
    for p in model.layers[0].mixer.parameters():
        p.data += 0.5 * torch.randn_like(p)
    return model.layers[0].mixer, model.rope


def inputs(mixer: LinearAttention, B: int = 1, T: int = T) -> tuple[Tensor, Tensor, Tensor]:
    config = mixer.config
    return tuple(
        torch.randn(B, n, T, config.head_size, dtype=torch.float64)
        for n in (config.n_head, config.n_query_groups, config.n_query_groups)
    )


def rotate(x: Tensor, places: list[int], config: Config) -> Tensor:
    """Two elements of a head are a complex number, which RoPE multiplies by exp(i * position * frequency)."""
    n = config.head_size // 2
    turns = torch.tensor(places, dtype=torch.float64)[:, None] * config.rope_base ** (-torch.arange(n).double() / n)
    turned = torch.complex(x[..., :n], x[..., n:]) * torch.exp(1j * turns)
    return torch.cat([turned.real, turned.imag], dim=-1)


def formula_weights(mixer: LinearAttention, q: Tensor, k: Tensor, v: Tensor, places: list[int]) -> Tensor:
    """w_ij / sum of w_ij of one sequence, (H, T, T), in loops: q (H, T, D), k and v (G, T, D)."""
    config, (H, T, D) = mixer.config, q.shape
    q, k = rotate(q, places, config), rotate(k, places, config).repeat_interleave(H // len(k), 0)
    v, weights = v.repeat_interleave(H // len(v), 0), torch.zeros(H, T, T, dtype=torch.float64)

    def phi(x: Tensor, W: Tensor) -> Tensor:
        x = torch.stack([x @ W, -(x @ W)])
        return (x.softmax(-1) if config.linear_feature_map == "hedgehog" else x.relu()).flatten()

    for h in range(H):
        for i in range(T):
            recent = [j for j in range(i + 1) if places[j] >= config.linear_sinks][::-1]
            near = [j for j in range(i + 1) if places[j] < config.linear_sinks] + recent[: config.linear_window]
            scores = torch.tensor([float(q[h, i] @ k[h, j]) / math.sqrt(D) for j in near])
            if cap := config.attention_logit_softcapping:
                scores = cap * (scores / cap).tanh()
            for j, s in zip(near, scores.double(), strict=True):
                weights[h, i, j] = mixer.mix[h].sigmoid() * (s - scores.max()).exp()
            kept = 1.0
            for j in [] if config.linear_off else recent[config.linear_window :]:  # from the newest to the oldest
                weights[h, i, j] = kept * (phi(q[h, i], mixer.feature_q[h]) @ phi(k[h, j], mixer.feature_k[h]))
                if config.linear_gate:
                    rate = float(v[h, j] @ mixer.gate_weight[h] + mixer.gate_bias[h])
                    kept *= math.exp(-min(max(rate, 0.0), 1.0))
    total = weights.sum(-1, keepdim=True)
    return weights / total.where(total > 0, 1)


@torch.no_grad()
def formula(mixer: LinearAttention, q: Tensor, k: Tensor, v: Tensor, places: list[int] | None = None) -> Tensor:
    """Outputs (H, T, D) of one sequence."""
    weights = formula_weights(mixer, q, k, v, list(range(q.size(1))) if places is None else places)
    return weights @ v.repeat_interleave(len(q) // len(v), 0)


def run(mixer: LinearAttention, rope: RoPE, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pos = torch.arange(q.size(2))
    return mixer(q, k, v, mixer.plan(pos[None], find_span(pos, None), None, rope), None)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_parallel_form_is_the_formula(case, monkeypatch):
    """Catches: a window off by one, a sink counted twice, a key in no part, a gate that fades too early; in pieces and
    in one, at any length."""
    mixer, rope = build(**CASES[case])
    q, k, v = inputs(mixer)
    expected = formula(mixer, q[0], k[0], v[0])
    for chunks, elements in (((64,), 2**23), ((8,), 1), ((4, 16), 6 * 16 * 40)):
        monkeypatch.setattr(linear, "CHUNKS", chunks)
        monkeypatch.setattr(linear, "WEIGHT_ELEMENTS", elements)
        for n in (T, 13, 2):
            got = run(mixer, rope, *(x[:, :, :n] for x in (q, k, v)))[0]
            torch.testing.assert_close(got, expected[:, :n], rtol=1e-6, atol=1e-6)
    plan = mixer.plan(torch.arange(T)[None], find_span(torch.arange(T), None), None, rope)
    weights = formula_weights(mixer, q[0], k[0], v[0], list(range(T)))
    torch.testing.assert_close(mixer.attention_weights(q, k, v, plan)[0], weights, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_window_of_the_whole_text_is_softmax_attention(tiny_model):
    """Catches: a factor on exact keys that does not cancel, a scale of its own."""
    softmax = tiny_model(attention="full").double()
    model = GPT(tiny_config(attention="linear", linear_window=30)).double().eval()
    model.load_state_dict(softmax.state_dict(), strict=False)
    idx = torch.randint(0, 97, (2, 31))
    expected = softmax(idx)
    torch.testing.assert_close(model(idx[:, :30]), expected[:, :30], rtol=1e-10, atol=1e-10)
    assert (model(idx)[:, 30] - expected[:, 30]).abs().max() > 1e-3  # one key is older now


@torch.no_grad()
def test_a_new_gate_keeps_everything_and_an_open_one_does_not():
    """Catches: a gate that forgets before it has learned to, or one without a gradient from there."""
    mixer, rope = build(linear_window=3, linear_gate=True)
    plain, _ = build(linear_window=3)
    mixer.reset_parameters()
    plain.load_state_dict(mixer.state_dict(), strict=False)
    q, k, v = inputs(mixer)
    expected = run(plain, rope, q, k, v)
    assert torch.equal(run(mixer, rope, q, k, v), expected)
    with torch.enable_grad():
        run(mixer, rope, q, k, v).square().sum().backward()
    assert (mixer.gate_bias.grad.abs() > 1e-6).all() and (mixer.gate_weight.grad.abs() > 1e-6).any()
    mixer.gate_bias.data += 0.1
    assert (run(mixer, rope, q, k, v) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("case", ["lolcats", "relu", "all", "no window"])
def test_gradients_of_the_chunks_are_those_of_finite_differences(case, monkeypatch):
    """Catches: a gradient lost through a state, the window's greatest score, or a piece that is made again."""
    monkeypatch.setattr(linear, "CHUNKS", (4,))
    monkeypatch.setattr(linear, "WEIGHT_ELEMENTS", 1)
    mixer, rope = build(n_head=2, n_query_groups=1, n_embd=8, **CASES[case] | {"linear_window": 3})
    if mixer.config.linear_gate:
        mixer.gate_bias.data.fill_(0.5)
        mixer.gate_weight.data *= 0.1  # within the bounds, where differences say something
    if case == "no window":
        mixer.near = 0
    names, parameters = zip(*mixer.named_parameters(), strict=True)

    def run_with(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        pos = torch.arange(q.size(2))
        plan = mixer.plan(pos[None], find_span(pos, None), None, rope)
        return torch.func.functional_call(mixer, dict(zip(names, weights, strict=True)), (q, k, v, plan, None))

    given = [x.detach().requires_grad_() for x in (*inputs(mixer, T=14), *parameters)]
    assert torch.autograd.gradcheck(run_with, given, fast_mode=True)


def test_new_weights_are_the_identity_after_any_way_to_make_a_model():
    """Catches: features, factors or gates that nobody fills in a model that was built without memory."""
    config = tiny_config(attention="linear,full", linear_gate=True)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    randomize(model)
    model.init_weights(1)
    mixer = model.layers[0].mixer
    assert torch.equal(mixer.feature_q, torch.eye(8).expand(6, 8, 8)) and torch.equal(mixer.feature_k, mixer.feature_q)
    assert torch.allclose(mixer.mix.sigmoid(), torch.tensor(0.1)) and not mixer.gate_weight.any()
    assert "transformer.h.0.attn.mixer.feature_q" in model.state_dict()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"linear_window": 7}, "no effect with attention='full': also set attention to 'linear'"),
        ({"attention": "linear", "linear_window": -1}, "linear_window=-1 does not fit"),
        ({"attention": "linear", "linear_feature_map": "exp"}, "choose from hedgehog, relu"),
        ({"attention": "linear", "linear_window": 0, "linear_off": True}, "set linear_window"),
        (
            {"attention": "linear", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "linear attention does not keep them",
        ),
        ({"attention": "linear", "s2_attention": True}, "set attention to 'full'"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields, words):
    """Catches: a field that is taken and does nothing, or fails later without a remedy."""
    with pytest.raises(ValueError, match=words):
        Config.from_dict({"n_layer": 2}, **fields)


def of_fla(module: str) -> Any:
    """A file of flash-linear-attention that needs no GPU, where it is installed: its package imports triton."""
    found = [importlib.util.find_spec(name) for name in ("fla", "einops")]
    if None in found:
        pytest.skip("flash-linear-attention is not installed")
    path = Path(found[0].submodule_search_locations[0]) / f"ops/{module}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    spec.loader.exec_module(loaded := importlib.util.module_from_spec(spec))
    return loaded


@torch.no_grad()
def test_without_a_window_it_is_the_linear_attention_of_fla():
    """Catches: a state that decays or is normalised in another way than the field's kernels do it."""
    plain, gated = of_fla("linear_attn/naive"), of_fla("simple_gla/naive")
    for gate in (False, True):
        mixer, rope = build(linear_window=0, linear_gate=gate, n_query_groups=6)
        q, k, v = inputs(mixer)
        got = run(mixer, rope, q, k, v)[0].transpose(0, 1)[None]  # (1, T, H, D)
        places = list(range(T))
        phi_q = linear.features(rotate(q, places, mixer.config), mixer.feature_q, mixer.config).transpose(1, 2)
        phi_k = linear.features(rotate(k, places, mixer.config), mixer.feature_k, mixer.config).transpose(1, 2)
        if gate:
            g = -(torch.einsum("bhtd,hd->bth", v, mixer.gate_weight) + mixer.gate_bias).clamp(0, 1)
            both = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1).transpose(1, 2)
            y = gated.naive_chunk_simple_gla(phi_q, phi_k, both, g, scale=1.0)[0]
            expected = y[..., :-1] / y[..., -1:]
        else:
            expected = plain.naive_recurrent_linear_attn(phi_q, phi_k, v.transpose(1, 2), scale=1.0, normalize=True)[0]
        torch.testing.assert_close(got.float(), expected.float(), rtol=1e-4, atol=1e-4)
