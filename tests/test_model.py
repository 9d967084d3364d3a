"""Masks, RoPE and memory of the model itself, against definitions written here once more in the plainest way."""

import math

import pytest
import torch
from tiny import randomize, tiny_config

from lit_swa import GPT
from lit_swa.model import VARIANTS, SoftmaxAttention, visible
from lit_swa.rope import RoPE, Span, rope_frequencies, turns_of

WHO_SEES_WHOM = {
    "full": lambda i, j, S: j <= i,
    "sliding": lambda i, j, S: i - S < j <= i,
    "streaming": lambda i, j, S: j <= i and (i - S < j or j < 4),
    "dual_chunk": lambda i, j, S: j <= i,
    "chunked": lambda i, j, S: j <= i and i // S == j // S,
}
WINDOWED = ("sliding", "streaming")
MASKED = [name for name, row in VARIANTS.items() if row.parts]  # linear attention has no mask: see test_linear.py


def config_of(variant, S, **fields):
    """A config of the variant; only a variant with a window takes one. The trained length makes chunks of 20."""
    window = {"sliding_window_size": S} if variant in WINDOWED else {}
    window = {"attention_chunk_size": S} if variant == "chunked" else window
    return tiny_config(attention=variant, dual_chunk_pretraining_length=32, **window, **fields)


@pytest.mark.parametrize("S", [1, 2, 7, 12, 100])
@pytest.mark.parametrize("variant", MASKED)
def test_masks_equal_the_definition_over_all_pairs(variant, S):
    """Catches: a window that is off by one. A new variant needs a line in WHO_SEES_WHOM."""
    T, pos = 12, torch.arange(12)[None]
    config = config_of(variant, S)
    parts = torch.stack([visible(part, pos, pos, config)[0] for part in VARIANTS[variant].parts])
    assert parts.sum(0).max() == 1  # no pair is in two parts
    for i in range(T):
        for j in range(T):
            assert parts[:, i, j].any().item() == WHO_SEES_WHOM[variant](i, j, S)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("S, T", [(1, 9), (3, 9), (7, 300), (40, 300), (500, 300)])
@pytest.mark.parametrize("variant", MASKED)
def test_attention_equals_a_dense_softmax_under_the_mask(steps, variant, S, T, cap):
    """Catches: blocks of queries that miss or repeat keys, a wrong scale, heads in another order. In float64."""
    config = config_of(variant, S, attention_logit_softcapping=cap, attention_scores_scalar=5, block_size=512)
    q, k, v = (torch.randn(2, heads, T, 8, dtype=torch.float64) for heads in (6, 2, 2))
    mixer = SoftmaxAttention(config, variant)
    plan = mixer.plan(torch.arange(T)[None], Span(True, 0, T - 1, True, True), None, RoPE(config))
    y = mixer.attend([q] * len(VARIANTS[variant].parts), k, v, plan)  # the same place in every part: positions apart
    mask = torch.tensor([[WHO_SEES_WHOM[variant](i, j, S) for j in range(T)] for i in range(T)])
    for head in range(6):
        scores = q[:, head] @ k[:, head // 3].mT / math.sqrt(5)
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        expected = scores.masked_fill(~mask, -math.inf).softmax(-1) @ v[:, head // 3]
        torch.testing.assert_close(y[:, head], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", MASKED)
@torch.no_grad()
def test_a_changed_token_changes_nothing_before_it_nor_beyond_the_reach_of_the_window(variant):
    """Catches: a leak of the future, and a window wider than it says."""
    S, n_layer, T, p = 4, 2, 40, 11
    model = GPT(config_of(variant, S, n_layer=n_layer)).eval()
    randomize(model)
    idx = torch.randint(0, 97, (1, T))
    changed = idx.clone()
    changed[0, p] = (idx[0, p] + 1) % 97
    moved = (model(idx) - model(changed)).abs().amax(-1)[0] > 1e-6
    assert not moved[:p].any() and moved[p]
    reach = p + n_layer * (S - 1)
    if variant in WINDOWED:
        assert moved[reach] and not moved[reach + 1 :].any()
    elif variant == "chunked":
        assert not moved[(p // S + 1) * S :].any()
    else:
        assert moved[reach + 1 :].any()


def test_nothing_of_size_t_by_t_is_allocated(tiny_model):
    """Catches: a dense mask. Every tensor that a forward makes is counted; the largest is far below T * T elements."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else (out,):
                self.elements = max(
                    self.elements,
                    t.untyped_storage().nbytes() // t.element_size() if isinstance(t, torch.Tensor) else 0,
                )
            return out

    T = 4096
    for fields in (
        {"attention": "sliding"},
        {"attention": "sliding", "attention_logit_softcapping": 5.0},
        {"attention": "full"},
        {"attention": "streaming"},
        {"attention": "dual_chunk", "dual_chunk_pretraining_length": 1024, "sliding_window_size": None},
    ):
        model = tiny_model(**{"sliding_window_size": 64} | fields, block_size=T, n_layer=1)
        with torch.no_grad(), Largest() as largest:
            model(torch.zeros(1, T, dtype=torch.long), logits_to_keep=1)
        assert largest.elements < T * T / 16, fields


@pytest.mark.parametrize("variant, held", [("sliding", 0), ("full", 0), ("full", 4096)])
def test_a_long_prompt_holds_one_mask(variant, held):
    """Catches: masks of all blocks of queries that add up to T * L, also in a chunk behind a long history."""
    T = 8192
    config = tiny_config(attention=variant, sliding_window_size=64, attention_logit_softcapping=5.0, block_size=16384)
    mixer, rope = SoftmaxAttention(config, variant), RoPE(config)
    cache = mixer.new_cache(1, 16384, 0, heads=(6, 2), device="cpu", dtype=torch.float32)
    if held:
        mixer.plan(torch.arange(held)[None], Span(True, 0, held - 1, True, True), cache, rope)
    pos, span = torch.arange(held, held + T), Span(True, held, held + T - 1, contiguous=True, fresh=held == 0)
    plan = mixer.plan(pos[None], span, cache, rope)
    assert len(plan.blocks) == 64
    storages = [block.ranges[0].masks[0].untyped_storage() for block in plan.blocks]
    masks = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert sum(masks.values()) <= 128 * (held + T) and len(masks) == 1


@pytest.mark.parametrize("variant", ["sliding", "streaming"])
def test_a_window_reads_no_more_than_a_window(variant):
    """Catches: attention under a window that still costs T * T: the pairs that a long prompt computes are counted."""
    T, S = 8192, 512
    config = tiny_config(attention=variant, sliding_window_size=S, block_size=T, attention_backend="sdpa")
    plan = SoftmaxAttention(config, variant).plan(
        torch.arange(T)[None], Span(True, 0, T - 1, True, True), None, RoPE(config)
    )
    computed = sum(
        (b.queries.stop - b.queries.start) * (r.keys.stop - r.keys.start) for b in plan.blocks for r in b.ranges
    )
    assert T * S < computed + S * S < 1.3 * T * S


@torch.no_grad()
def test_only_distances_count(tiny_model):
    """Catches: absolute positions in RoPE; the cache makes the shift by 100 possible without the first 100 tokens."""
    model = tiny_model()
    idx = torch.randint(0, 97, (1, 20))
    model.set_kv_cache(1, 200)
    shifted = model(idx, torch.arange(100, 120))
    torch.testing.assert_close(shifted, model(idx), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "convert", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("meta").to_empty(device="cpu")]
)
def test_rope_tables_stay_exact(convert):
    """Catches: bfloat16 positions, which are wrong past 256, and a table lost on the way from the meta device."""
    config = tiny_config(rope_local_base_freq=500.0)
    model = convert(GPT(config))
    assert torch.equal(model.rope.turns, turns_of(rope_frequencies(config)))


def test_tied_embeddings_are_one_parameter(tiny_model):
    """Catches: a copy that drifts in training, and a tie that an assigned state dict breaks."""
    model = tiny_model(tie_embeddings=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    other = GPT(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    other.tie_weights()
    assert other.lm_head.weight is other.transformer.wte.weight
    assert len(list(model.parameters())) == len(list(tiny_model().parameters())) - 1


def test_gradients_equal_those_of_dense_attention(tiny_model):
    """Catches: a blocked path that loses gradient at the borders of its blocks."""
    S, T = 50, 300
    blocked = tiny_model(attention="sliding", sliding_window_size=S, block_size=512)
    dense = tiny_model(
        attention="sliding", sliding_window_size=S, block_size=512, attention_logit_softcapping=1e6
    )  # no cap, other path
    dense.load_state_dict(blocked.state_dict())
    idx = torch.randint(0, 97, (1, T))
    for model in (blocked, dense):
        model(idx).square().mean().backward()
    for (name, a), (_, b) in zip(blocked.named_parameters(), dense.named_parameters(), strict=True):
        error = (a.grad - b.grad).abs().max() / b.grad.abs().max()
        assert error < 1e-4, (name, error)


def test_autograd_and_inference_agree(tiny_model):
    """Catches: a matrix product that is another one without gradients."""
    model = tiny_model(attn_bias=True, mlp_bias=True)
    idx = torch.randint(0, 97, (2, 17))
    with torch.no_grad():
        without = model(idx)
    torch.testing.assert_close(model(idx).detach(), without, rtol=1e-4, atol=1e-4)
