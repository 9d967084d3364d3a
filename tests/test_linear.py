"""Linear attention: against its formula pair by pair in float64, any split, ragged, taken back, trained, saved."""

import importlib.util
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import randomize, tiny_config
from torch import Tensor

from lit_swa import GPT, Config, linear
from lit_swa.checkpoint import load_model, save_checkpoint
from lit_swa.cpu_decode import compile_for_cpu
from lit_swa.formats.hf_export import config_to_hf
from lit_swa.generate import Session, cache_bytes, describe_attention, generate
from lit_swa.linear import LinearAttention
from lit_swa.lora import LoRAConfig, add_lora, lora_linears, merge_lora
from lit_swa.model import RoPE
from lit_swa.parallel import Rank, split_model
from lit_swa.rope import Span, find_span
from lit_swa.speed import keys_read
from lit_swa.training.estimate import Tracker
from lit_swa.training.memory import recompute_blocks

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
PATTERN = {"attention": "linear,linear,linear,full", "n_layer": 4, "linear_window": 6, "linear_sinks": 2}


def build(**fields) -> tuple[LinearAttention, RoPE]:
    """A layer with weights from which every term of the formula shows, in float64."""
    config = tiny_config(n_layer=1, attention="linear", **fields)
    model = GPT(config).double()
    for name, p in model.layers[0].mixer.named_parameters():
        p.data += (50 if "decay" in name else 0.5) * torch.randn_like(p)
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
                    rate = float(v[h, j] @ mixer.decay_weight[h] + mixer.decay_bias[h])
                    kept *= math.exp(-min(max(rate / 100, 0.0), 1.0))
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
        monkeypatch.setattr(linear, "PIECE_ELEMENTS", (elements, elements))
        for n in (T, 13, 2):
            got = run(mixer, rope, *(x[:, :, :n] for x in (q, k, v)))[0]
            torch.testing.assert_close(got, expected[:, :n], rtol=1e-6, atol=1e-6)
    plan = mixer.plan(torch.arange(T)[None], find_span(torch.arange(T), None), None, rope)
    weights = formula_weights(mixer, q[0], k[0], v[0], list(range(T)))
    torch.testing.assert_close(mixer.attention_weights(q, k, v, plan)[0], weights, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_window_of_the_whole_text_is_softmax_attention(tiny_model):
    """Catches: a factor on exact keys that does not cancel, a scale of its own."""
    softmax = tiny_model(attention="full", positions="none,rope").double()
    model = GPT(tiny_config(attention="linear", linear_window=30, positions="none,rope")).double().eval()
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
    assert (mixer.decay_bias.grad.abs() > 1e-6).all() and (mixer.decay_weight.grad.abs() > 1e-6).any()
    mixer.decay_bias.data += 10
    assert (run(mixer, rope, q, k, v) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("case", ["lolcats", "relu", "all", "no window"])
def test_gradients_of_the_chunks_are_those_of_finite_differences(case, monkeypatch):
    """Catches: a gradient lost through a state, the window's greatest score, or a piece that is made again."""
    monkeypatch.setattr(linear, "CHUNKS", (4,))
    monkeypatch.setattr(linear, "PIECE_ELEMENTS", (1, 1))
    mixer, rope = build(n_head=2, n_query_groups=1, n_embd=8, **CASES[case] | {"linear_window": 3})
    if mixer.config.linear_gate:
        mixer.decay_bias.data.fill_(50)
        mixer.decay_weight.data *= 0.1  # within the bounds, where differences say something
    if case == "no window":
        mixer.near = 0
    names, parameters = zip(*mixer.named_parameters(), strict=True)

    def run_with(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        pos = torch.arange(q.size(2))
        plan = mixer.plan(pos[None], find_span(pos, None), None, rope)
        return torch.func.functional_call(mixer, dict(zip(names, weights, strict=True)), (q, k, v, plan, None))

    given = [x.detach().requires_grad_() for x in (*inputs(mixer, T=14), *parameters)]
    assert torch.autograd.gradcheck(run_with, given, fast_mode=True)


# ---------------------------------------------------------------------------------------------------------- recurrent


def next_places(rng: random.Random, text: list[int], T: int, back: int) -> list[int]:
    """Where the next T tokens of a sequence stand, negative for padding. text: the places of those that it has."""
    action = rng.choice(("on", "on", "skip", "anew", "back", "pause", "padded", "padded", "gaps", "anew in gaps"))
    end = text[-1] + 1 if text else 0
    n = {"pause": T, "padded": rng.randrange(T)}.get(action, 0)
    padding = set(rng.sample(range(T), n))
    starts = {"skip": end + rng.randint(1, 9), "anew": 0, "anew in gaps": 0, "back": max(0, end - rng.randint(0, back))}
    start, gap = starts.get(action, end), 3 if action.endswith("gaps") else 1
    places = iter(range(start, start + T * gap, gap))
    return [-1 if i in padding else next(places) for i in range(T)]


@pytest.mark.parametrize("lookahead", [0, 3])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_any_history_of_the_cache_leaves_each_sequence_its_own_text(case, lookahead, monkeypatch):
    """Catches: a key that is in the state and the window, or in neither; one that was taken back and is seen; a row
    that moves with another. Chunks of 4, in calls that begin anywhere, pad, pause and leave positions out."""
    monkeypatch.setattr(linear, "CHUNKS", (4,))
    mixer, rope = build(n_head=2, n_query_groups=1, n_embd=8, **CASES[case])
    compared = 0
    for seed in range(3):
        rng, texts = random.Random(seed), [{}, {}]  # of each row: place -> q, k, v
        cache = mixer.new_cache(2, 99, lookahead, (2, 1), None, device="cpu", dtype=torch.float64)
        size = cache.bytes
        for _ in range(9):
            T = rng.choice((1, 1, 1, 2, 3, 6, 11))
            rows = [next_places(rng, list(text), T, lookahead) for text in texts]
            pos, new = torch.tensor(rows), inputs(mixer, 2, T)
            span = find_span(pos, None)
            if rng.random() < 0.3:
                span = Span(False, contiguous=T == 1)  # of a fixed shape
            got = mixer(*new, mixer.plan(pos, span, cache, rope), cache)
            for r, row in enumerate(rows):
                fed = {p: tuple(x[r, :, i] for x in new) for i, p in enumerate(row) if p >= 0}
                if fed:
                    texts[r] = {p: x for p, x in texts[r].items() if p < min(fed)} | fed
                    q, k, v = (torch.stack(x, dim=1) for x in zip(*texts[r].values(), strict=True))
                    expected = formula(mixer, q, k, v, list(texts[r]))[:, -len(fed) :]
                    own = got[r][:, [p >= 0 for p in row]]
                    torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6, msg=f"{seed} {rows}")
                    compared += len(fed)
        assert cache.bytes == size
    assert compared > 60


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    case=st.sampled_from(sorted(CASES)),
    back=st.integers(0, 3),
)
@torch.no_grad()
def test_any_split_of_a_text_gives_the_logits_of_one_call(sizes, case, back):
    """Catches: a recurrent form that is not the parallel one, through a whole model; tokens taken back that count."""
    torch.manual_seed(3)
    model = GPT(tiny_config(attention="linear", **CASES[case])).eval().double()
    randomize(model)
    idx, start = torch.randint(0, 97, (2, sum(sizes))), 0
    expected = model(idx)
    model.set_kv_cache(2, 256, lookahead=3)
    for n in sizes:
        got = model(idx[:, start : start + n], torch.arange(start, start + n))
        torch.testing.assert_close(got, expected[:, start : start + n], rtol=1e-5, atol=1e-6)
        start += n
        if back and start >= back:  # a draft that turns out wrong
            model(torch.randint(0, 97, (2, back)), torch.arange(start, start + back))
            model.take_back(back)


@pytest.mark.parametrize("case", ["lolcats", "sinks", "gate", "relu", "no window", "off"])
@torch.no_grad()
def test_a_prompt_that_kernels_read_leaves_the_state_that_chunks_leave(case, monkeypatch):
    """Catches: a key of the prompt in both the state and the window, or in neither; a state that faded otherwise; a
    later call that kernels read, which know no state. With one layer, no later logit needs the kernels' outputs."""
    model = GPT(tiny_config(n_layer=1, attention="linear", **CASES[case])).eval().double()
    randomize(model)
    kernels = SimpleNamespace(
        features=lambda x, w, *_: linear.features(linear.widened(x, x.dtype, len(w)), w, model.config),
        gated=lambda phi_q, phi_k, rates, window: (phi_q, phi_k, rates),
        attention=lambda q, *rest: torch.full_like(q, math.nan),
    )
    idx, found = torch.randint(0, 97, (2, 44)), []
    for chosen in (None, kernels):
        monkeypatch.setattr(linear, "text_kernels", lambda q, plan, _, chosen=chosen: chosen if plan.whole else None)
        model.set_kv_cache(2, 64, lookahead=3)
        prompt, *later = [model(idx[:, a:b], torch.arange(a, b)) for a, b in ((0, 40), (40, 43), (43, 44), (41, 44))]
        assert prompt.isnan().any() == (chosen is not None)
        found.append(torch.cat(later, dim=1))
        model.clear_kv_cache()
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_cache_with_room_for_less_than_a_window_grows_and_keeps_its_tokens(tiny_model):
    """Catches: entries that move to other places, a text that goes on in a cache that cannot hold its window."""
    model = tiny_model(attention="linear", linear_window=12, linear_sinks=2)
    idx = torch.randint(0, 97, (1, 40))
    expected = model(idx)
    model.set_kv_cache(1, 8)
    assert not model.unbounded(cached=True)
    got = [model(idx[:, :8], torch.arange(8))]
    with pytest.raises(ValueError, match="outside the context of 8 tokens"):
        model(idx[:, 8:9], torch.tensor([8]))
    for start, stop in ((8, 11), (11, 40)):
        model.extend_kv_cache(stop)
        got.append(model(idx[:, start:stop], torch.arange(start, stop)))
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_step_never_looks_at_its_position(tiny_model):
    """Catches: a look at numbers, or a shape that depends on them: on a GPU a step is recorded once for all positions.
    Tensors without numbers go through."""
    model = tiny_model(attention="linear", linear_window=5, linear_sinks=2, linear_gate=True).to("meta")
    model.set_kv_cache(3, 64, lookahead=2)
    for T, shape in ((1, (1,)), (1, (3, 1)), (3, (3,)), (9, (3, 9))):
        idx, pos = (torch.zeros(size, dtype=torch.long, device="meta") for size in ((3, T), shape))
        assert model(idx, pos).shape == (3, T, 97)


@pytest.mark.parametrize("window", [4, 1])
@torch.no_grad()
def test_what_cannot_be_taken_back_is_refused_in_a_sentence(tiny_model, window):
    """Catches: logits of a state that holds the tokens that were to be forgotten."""
    model = tiny_model(attention="linear", linear_window=window)
    model.set_kv_cache(1, 64, lookahead=2)
    model(torch.randint(0, 97, (1, 20)), torch.arange(20))
    assert model.can_take_back(2) and not model.can_take_back(3)
    model(torch.randint(0, 97, (1, 1)), torch.tensor([18]))
    for p in (15, 12):  # what it needs is in the state, or itself
        words = f"Position {p} comes after later ones, .* takes back 2 tokens, .*lookahead"
        with pytest.raises(ValueError, match=words):
            model(torch.randint(0, 97, (1, 1)), torch.tensor([p]))
    idx = torch.randint(0, 97, (1, 9))
    for cache in model.caches:
        cache.state.fill_(torch.nan)  # another text begins, whatever the one before has left
    torch.testing.assert_close(model(idx, torch.arange(9)), model(idx), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_text_of_any_length_is_written_in_a_constant_cache(tiny_model):
    """Catches: a limit by the context or a cache that grows; other tokens than whole calls choose; ragged rows."""
    model = tiny_model(attention="linear", linear_window=6, linear_sinks=2, block_size=16)
    tokens = list(generate(model, [1, 2, 3], 40))
    size, text = model.kv_cache_bytes(), torch.tensor([[1, 2, 3, *tokens]])
    assert model(text)[0, 2:-1].argmax(-1).tolist() == tokens and model.unbounded(cached=True)
    assert list(generate(model, [1, 2, 3], 90))[:40] == tokens and model.kv_cache_bytes() == size
    per_layer = 6 * 16 * 8 * 4 + 6 * 16 * 4 + (6 + 2) * 2 * 2 * 8 * 4  # the state, its norm, the window and the sinks
    assert size == 2 * per_layer
    session, rows = Session(model, 3, lookahead=2), [[1, 2, 3], list(range(30)), [5] * 11]
    expected = torch.stack([model(torch.tensor([[*row, 7, 8]]))[0, -1] for row in rows])
    session.feed(rows)
    session.feed(torch.tensor([[7, 9]] * 3))
    session.take_back(1)
    torch.testing.assert_close(session.feed(torch.full((3, 1), 8))[:, -1], expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- around the mixer


def test_a_long_text_keeps_little_for_its_backward(monkeypatch):
    """Catches: the weights of all pieces that wait for the backward."""
    mixer, rope = build(linear_window=16)
    monkeypatch.setattr(linear, "CHUNKS", (16,))
    kept = []
    for elements in (2**23, 1):
        monkeypatch.setattr(linear, "PIECE_ELEMENTS", (elements, elements))
        held: dict[int, int] = {}  # storages, each once

        def hold(x: Tensor, held: dict[int, int] = held) -> Tensor:
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
            run(mixer, rope, *(x.requires_grad_() for x in inputs(mixer, T=256)))
        kept.append(sum(held.values()))
    assert kept[1] < kept[0] / 4


def test_a_block_that_computes_again_keeps_its_input_alone(tiny_model, monkeypatch):
    """Catches: pieces within a block that hold queries, keys and states until the backward comes to the block."""
    monkeypatch.setattr(linear, "CHUNKS", (16,))
    monkeypatch.setattr(linear, "PIECE_ELEMENTS", (1, 1))
    model = tiny_model(attention="linear", linear_window=16, n_layer=2, block_size=256).train()
    recompute_blocks(model, 2)
    call = model.plan_call(torch.zeros(1, 256, dtype=torch.long), None)
    with Tracker() as tracker:
        x = torch.empty(1, 256, model.config.n_embd, requires_grad=True)
        before = tracker.live
        y = model.transformer.h[0](x, call)
        assert tracker.live - before == y.nbytes


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
    assert torch.allclose(mixer.mix.sigmoid(), torch.tensor(0.1)) and not mixer.decay_weight.any()
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
            g = -(torch.einsum("bhtd,hd->bth", v, mixer.decay_weight) + mixer.decay_bias).div(100).clamp(0, 1)
            both = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1).transpose(1, 2)
            y = gated.naive_chunk_simple_gla(phi_q, phi_k, both, g, scale=1.0)[0]
            expected = y[..., :-1] / y[..., -1:]
        else:
            expected = plain.naive_recurrent_linear_attn(phi_q, phi_k, v.transpose(1, 2), scale=1.0, normalize=True)[0]
        torch.testing.assert_close(got.float(), expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_step_has_no_breaks_and_serves_all_positions(tiny_model):
    """Catches: what cannot be compiled, or is anew for a position."""
    model, idx = tiny_model(**PATTERN, linear_gate=True), torch.randint(0, 97, (1, 40))
    expected = model(idx)
    model.set_kv_cache(1, 64)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = compile_for_cpu(model)
    got = [step(idx[:, i : i + 1], torch.tensor([i])) for i in range(40)]
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # a linear block, a full one, the last layer
    assert not torch._dynamo.utils.counters["graph_break"]


@torch.no_grad()
def test_texts_in_one_row_are_read_as_alone(tiny_model):
    """Catches: a state that goes on into the next text; texts read side by side that change places, or see padding."""
    model, lengths = tiny_model(attention="linear,full", linear_window=4, linear_sinks=1), [9, 1, 14, 9, 7]
    idx = torch.randint(0, 97, (2, 40))
    expected = torch.cat([model(text) for text in idx.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(model(idx, documents=lengths), expected, rtol=1e-4, atol=1e-5)


def test_a_cached_call_has_the_gradient_of_an_uncached_one(tiny_model):
    """Catches: a state or sinks that are overwritten before the backward has read them."""
    model = tiny_model(attention="linear", linear_window=4, linear_sinks=2, n_query_groups=6)
    idx, gradients = torch.randint(0, 97, (1, 30)), []
    for pos in (None, torch.arange(30)):
        model.set_kv_cache(1, 40)
        model.zero_grad()
        y = model(idx, pos)
        with torch.no_grad():
            model(idx[:, :3], torch.arange(30, 33))
        y.square().mean().backward()
        gradients.append(model.layers[0].mixer.feature_k.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_a_model_with_linear_layers_is_saved_quantised_described_and_measured(tiny_model, tmp_path):
    """Catches: a tool that knows softmax layers only, a weight that no file holds, a field that is not kept."""
    model, idx = tiny_model(**PATTERN, linear_gate=True), torch.randint(0, 97, (1, 40))
    save_checkpoint(model, model.config, tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded(idx), model(idx)) and loaded.config == model.config
    quantised, expected = load_model(tmp_path, quantize="int8"), model(idx)
    assert 0 < (quantised(idx) - expected).abs().max() < 0.1 * expected.abs().max()
    assert (load_model(tmp_path, linear_off=True)(idx) - expected).abs().max() > 0.1
    assert describe_attention(model) == "linear + window 6 behind 2 sinks in 3 of 4 layers | window none (context 256)"
    model.set_kv_cache(2, 64)
    tokens = 2 * 2 * 8 * 4  # bytes of a key and a value of all groups, in the layer that attends in full
    state = sum(attn.kv_cache.bytes for attn in model.layers[:3]) / 2
    assert keys_read(model, 10, 10) == state + 10 * tokens
    held = {id(b): b.nbytes for cache in model.caches for b in cache.buffers()}
    assert cache_bytes(model, 2, 64) == sum(held.values())
    with pytest.raises(ValueError, match="not split over processes"):
        split_model(model, Rank(0, 2))
    with pytest.raises(ValueError, match="export the softmax checkpoint that was made linear"):
        config_to_hf(model.config)


def test_lora_trains_beside_linear_layers_and_merges(tiny_model):
    """Catches: features that LoRA trains too, an adapter that does not reach a linear layer's projections."""
    model, idx = tiny_model(**PATTERN), torch.randint(0, 97, (1, 40))
    add_lora(model, LoRAConfig(r=4, alpha=8, targets=("q", "k", "v", "o")))
    for _, linear_layer in lora_linears(model):
        for p in linear_layer.lora.parameters():
            torch.nn.init.normal_(p, std=0.1)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".lora." in name for name in trained)
    expected = model(idx)
    expected.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    merge_lora(model)
    torch.testing.assert_close(model(idx), expected, rtol=1e-3, atol=1e-3)
