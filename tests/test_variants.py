"""Every attention variant against brute force over pairs, for any way of feeding the tokens."""

import functools
import math
from pathlib import Path

import brute_force
import dilated
import pytest
import torch
import torch.nn.functional as F
from tiny import randomize, tiny_config

from lit_swa import GPT, Config, fast_attention
from lit_swa.config import Part, Variant
from lit_swa.fast_attention import FOLDS, MergedAttention, Tools, gpu_tools, is_band, merge_blocks, window_block_mask
from lit_swa.model import VARIANTS, Layout, Pairs, attend_block, cut_queries, sliding
from lit_swa.rope import Span

pytestmark = pytest.mark.usefixtures("steps", "dilated_row")
T = 30
DUAL = {"attention": "dual_chunk", "dual_chunk_pretraining_length": 16}
CASES = {
    "sliding 1": ({"attention": "sliding", "sliding_window_size": 1}, brute_force.meet_sliding(1)),
    "sliding 5": ({"attention": "sliding", "sliding_window_size": 5}, brute_force.meet_sliding(5)),
    "4 sinks + 6": ({"attention": "streaming", "sliding_window_size": 6}, brute_force.meet_streaming(6, 4)),
    "2 sinks + 1": (
        {"attention": "streaming", "sliding_window_size": 1, "n_sink_tokens": 2},
        brute_force.meet_streaming(1, 2),
    ),
    "no sinks + 7": (
        {"attention": "streaming", "sliding_window_size": 7, "n_sink_tokens": 0},
        brute_force.meet_streaming(7, 0),
    ),
    "chunks of 6, 3 near": (
        DUAL | {"dual_chunk_size": 6, "dual_chunk_local": 3},
        brute_force.meet_dual_chunk(6, 3),
    ),
    "chunks of 7, 2 near": (  # s + w is the trained length
        DUAL | {"dual_chunk_pretraining_length": 9, "dual_chunk_size": 7, "dual_chunk_local": 2},
        brute_force.meet_dual_chunk(7, 2),
    ),
    "chunks by default": (DUAL, brute_force.meet_dual_chunk(10, 2)),
    "chunked": (
        {"attention": "chunked", "attention_chunk_size": 7},
        lambda i, j, head: (i, j) if j <= i and i // 7 == j // 7 else None,
    ),
    "chunked rolling": (
        {"attention": "chunked", "attention_chunk_size": 7, "rolling_kv_cache": True},
        lambda i, j, head: (i, j) if j <= i and i // 7 == j // 7 else None,
    ),
    "windows of two sizes": (
        {"attention": "sliding", "layer_windows": "4,9", "rolling_kv_cache": True},
        [brute_force.meet_sliding(4), brute_force.meet_sliding(9)],
    ),
    "no positions behind a window": (
        {"attention": "sliding,full", "sliding_window_size": 7, "positions": "rope,none"},
        [brute_force.meet_sliding(7), lambda i, j, head: (0, 0)],
    ),
    "dilated": (dilated.FIELDS, brute_force.meet_dilated(4, 3)),
    "dilated rolling": (dilated.FIELDS | {"rolling_kv_cache": True}, brute_force.meet_dilated(4, 3)),
}
FEEDING = {
    "one call": [T],
    "token by token": [4] + [1] * 26,
    "chunks": [7, 7, 7, 7, 2],
    "any": [2, 1, 9, 1, 1, 3, 12, 1],
}
RAGGED = {"prompt": [T], "prompt, then steps": [26, 1, 1, 1, 1], "halves": [13, 17], "steps": [5] + [1] * 12 + [13]}
LENGTHS = [T, T - 7, 4]


def build(**fields) -> GPT:
    torch.manual_seed(1)
    model = GPT(tiny_config(**fields)).eval()
    randomize(model)
    return model


@functools.cache
def reference(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens, of LENGTHS, and their logits by brute force."""
    fields, meet = CASES[case]
    model, rows = build(**fields), torch.randint(0, 97, (len(LENGTHS), T), generator=torch.Generator().manual_seed(2))
    return rows, [brute_force.logits(model, row[-n:], meet).float() for row, n in zip(rows, LENGTHS, strict=True)]


def feed(model: GPT, idx: torch.Tensor, pos: torch.Tensor, calls: list[int], **options) -> torch.Tensor:
    """Logits of idx (B, T) at pos (T,) or (B, T) through the cache, in calls of so many tokens."""
    model.set_kv_cache(idx.size(0), 64, **options)
    steps = zip(idx.split(calls, dim=1), pos.split(calls, dim=-1), strict=True)
    return torch.cat([model(tokens, at) for tokens, at in steps], dim=1)


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("backend", ["auto", "flex"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_uncached_logits_equal_brute_force(case, backend):
    """Catches: a window off by one, a wrong distance, a part that is seen twice, in every backend."""
    (rows, expected), model = reference(case), build(**CASES[case][0], attention_backend=backend)
    for n in (T, 3):  # 3: some texts hold no more than sinks
        assert_close(model(rows[:1, :n])[0], expected[0][:n])


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("calls", FEEDING)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_any_split_into_calls_equals_brute_force(case, calls, lookahead):
    """Catches: a key that is written too early, lost at the wrap or at a chunk's border, or turned wrongly."""
    (rows, expected), model = reference(case), build(**CASES[case][0])
    assert_close(feed(model, rows[:1], torch.arange(T), FEEDING[calls], lookahead=lookahead)[0], expected[0])


@pytest.mark.parametrize("calls", RAGGED)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_rows_at_positions_of_their_own_equal_brute_force(case, calls):
    """Catches: chunks or sinks that go by the place in the row instead of the position, and padding that is seen."""
    (rows, expected), model = reference(case), build(**CASES[case][0])
    pos = torch.arange(T) - (T - torch.tensor(LENGTHS))[:, None]  # padded left
    got = feed(model, rows, pos, RAGGED[calls])
    for row, n in enumerate(LENGTHS):
        assert_close(got[row, -n:], expected[row])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_steps_that_know_no_position_equal_brute_force(case):
    """Catches: a fixed-shape step (as it is compiled) that reads other slots than an eager one."""
    (rows, expected), model = reference(case), build(**CASES[case][0])
    model.fixed_shape_steps = True
    assert_close(feed(model, rows[:1], torch.arange(T), [1] * T)[0], expected[0])


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 2.0}, {"type": "ntk", "factor": 3.0}])
@pytest.mark.parametrize("case", ["4 sinks + 6", "chunks of 6, 3 near"])
@torch.no_grad()
def test_variants_compose_with_scalings(case, scaling):
    """Catches: indices that are scaled before they are clamped, or a base that reaches only one of the turns."""
    fields, meet = CASES[case]
    model, idx = build(**fields, rope_scaling=scaling), torch.randint(0, 97, (1, T))
    s, D = scaling["factor"], model.config.head_size
    how = {"scale": s} if scaling["type"] == "linear" else {"base": model.config.rope_base * s ** (D / (D - 2))}
    expected = brute_force.logits(model, idx[0], meet, **how).float()
    assert_close(model(idx)[0], expected)
    assert_close(feed(model, idx, torch.arange(T), FEEDING["any"])[0], expected)


@pytest.mark.parametrize(
    "fields, factor",
    [
        ({"dual_chunk_temperature": 1.3}, lambda i: 1.3),
        ({"dual_chunk_temperature_slope": 0.4}, lambda i: max(1.0, 0.4 * math.log((i + 1) / 16) + 1)),
        (
            {"dual_chunk_temperature_slope": 0.4, "dual_chunk_temperature_power": 2.0},
            lambda i: max(1.0, 0.4 * math.log((i + 1) / 16) + 1) ** 2,
        ),
    ],
)
@torch.no_grad()
def test_temperature_is_static_or_goes_by_the_querys_position(fields, factor):
    """Catches: a temperature by the text's length, which would make decoding differ from a prompt."""
    fields = CASES["chunks of 6, 3 near"][0] | fields
    model, idx = build(**fields), torch.randint(0, 97, (1, T))
    expected = brute_force.logits(model, idx[0], brute_force.meet_dual_chunk(6, 3), factor=factor).float()
    assert_close(model(idx)[0], expected)
    assert_close(feed(model, idx, torch.arange(T), [13] + [1] * (T - 13))[0], expected)


@torch.no_grad()
def test_dual_chunk_within_the_exact_distances_is_plain_rope(tiny_model):
    """Catches: a clamp that bites too early. Up to T = s + w + 1 no distance is changed, and one further some are."""
    s, w = 12, 5
    dual = tiny_model(**DUAL | {"dual_chunk_pretraining_length": 64, "dual_chunk_size": s, "dual_chunk_local": w})
    plain = GPT(tiny_config())
    plain.load_state_dict(dual.state_dict())
    idx = torch.randint(0, 97, (1, 3 * s))
    error = (dual(idx) - plain(idx)).abs().amax(-1)[0] / plain(idx).abs().max()
    assert error[: s + w + 1].max() < 1e-5 < error[s + w + 1]


@torch.no_grad()
def test_streaming_without_sinks_is_the_sliding_window(tiny_model):
    """Catches: a sink's slot or place that is left over when there are none."""
    streaming = tiny_model(attention="streaming", sliding_window_size=6, n_sink_tokens=0)
    sliding = GPT(tiny_config(attention="sliding", sliding_window_size=6))
    sliding.load_state_dict(streaming.state_dict())
    idx = torch.randint(0, 97, (2, 50))
    torch.testing.assert_close(streaming(idx), sliding(idx), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_streaming_runs_for_ever_in_a_cache_of_constant_size(tiny_model):
    """Catches: a cache or a position that grows, and sinks that a long text overwrites."""
    model = tiny_model(attention="streaming", sliding_window_size=6, block_size=16, n_layer=1)
    model.set_kv_cache(1, 16)
    assert model.unbounded(cached=True)
    idx = torch.randint(0, 97, (1, 200))
    stepped = torch.cat([model(idx[:, i : i + 1], torch.tensor([i])) for i in range(200)], dim=1)
    held = model.layers[0].kv_cache.slots.pos
    assert held.size(1) == 4 + 2 * 6 and held[0, :4].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(stepped, model(idx), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_dual_chunk_prompt_may_be_longer_than_a_chunk_border_away(tiny_model):
    """Catches: a chunk index per call instead of per token: two tokens at once across every border."""
    model = tiny_model(**DUAL, dual_chunk_size=6, dual_chunk_local=3)
    idx = torch.randint(0, 97, (1, 48))
    model.set_kv_cache(1, 48)
    pairs = [model(idx[:, i : i + 2], torch.arange(i, i + 2)) for i in range(0, 48, 2)]
    shifted = [model(idx[:, i : i + 2], torch.arange(i, i + 2)) for i in range(5, 47, 2)]  # again, astride the borders
    torch.testing.assert_close(torch.cat(pairs, dim=1), model(idx), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(shifted, dim=1), model(idx)[:, 5:47], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["4 sinks + 6", "chunks of 6, 3 near", "2 sinks + 1", "dilated"])
def test_gradients_of_merged_kernels_equal_those_of_plain_steps(case):
    """Catches: a merge that holds the log-sum-exps constant. In float64, of every weight."""
    fields = CASES[case][0]
    merged, plain = build(**fields).double(), build(**fields, attention_backend="sdpa").double()
    idx = torch.randint(0, 97, (2, T))
    for model in (merged, plain):
        model(idx).square().mean().backward()
    for (name, a), (_, b) in zip(merged.named_parameters(), plain.named_parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-9 * b.grad.abs().max(), name


@pytest.mark.parametrize("first", [0, 1, 9, 30])
@pytest.mark.parametrize("S, n_sinks", [(2, 0), (2, 1), (5, 3), (8, 0), (13, 4)])
@pytest.mark.parametrize("variant", ["sliding", "streaming"])
def test_windows_cut_into_triangles_equal_masked_ones(variant, S, n_sinks, first):
    """Catches: a corner of the window that is off by one, its gradient, or a block that does not end with a window.

    In float64, whole and behind `first` older keys. On a GPU this is how long windows are met.
    """
    sinks = {"n_sink_tokens": n_sinks} if variant == "streaming" else {}
    config, row = tiny_config(attention=variant, sliding_window_size=S, **sinks), VARIANTS[variant]
    scale, most_folds = config.head_size**-0.5, 0
    for T in (1, 7, 16, 40):
        L = first + T
        queries = [torch.randn(2, 6, T, 8, dtype=torch.float64, requires_grad=True) for _ in row.parts]
        k, v = (torch.randn(2, 2, L, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
        pos, span = torch.arange(L)[None], Span(True, first, L - 1, contiguous=True, fresh=first == 0)
        facts = (span, Layout(first, first), False, S, n_sinks)
        pairs = Pairs(row, config, pos[:, first:], pos, *facts)
        blocks = merge_blocks(pairs, [is_band(pairs, part) for part in row.parts], corners=True)
        assert T == 1 or all(strip.mask is None for block in blocks for strip in block.strips)
        most_folds = max(most_folds, *(block.folds for block in blocks))
        cut = MergedAttention.apply("cpu", blocks, scale, None, k, v, *queries)
        masked = torch.cat([attend_block(queries, k, v, block, config) for block in cut_queries(pairs)], dim=2)
        inputs, options = [*queries, k, v], {"allow_unused": True, "materialize_grads": True}
        grads = [torch.autograd.grad(y.square().sum(), inputs, **options) for y in (cut, masked)]
        for a, b in zip((cut, *grads[0]), (masked, *grads[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert most_folds == FOLDS if S == 2 else most_folds > 1 or S == 13  # several windows in one call of the kernel


def test_the_pieces_of_a_long_text_are_cut_alike():
    """Catches: windows counted from the text's beginning, so that cuDNN plans other shapes for each piece."""
    config, row, cuts = Config(attention="streaming", sliding_window_size=13, block_size=400), VARIANTS["streaming"], []
    for first in (32, 64, 96):
        pos, span = torch.arange(first + 32)[None], Span(True, first, first + 31, contiguous=True)
        pairs = Pairs(row, config, pos[:, first:], pos, span, Layout(first, first), True, 13, 4)
        blocks = merge_blocks(pairs, [is_band(pairs, part) for part in row.parts], corners=True)
        cuts.append([(b.queries, b.folds, [s.keys.stop - s.keys.start for s in b.strips]) for b in blocks])
    assert cuts[0] == cuts[1] == cuts[2] and cuts[0][0][1] == 2


@pytest.mark.parametrize("window", [150, 60])
@pytest.mark.parametrize("variant", ["sliding", "streaming"])
@torch.no_grad()
def test_flash_attention_takes_a_window_whole_and_merges_it_with_sinks(tiny_model, monkeypatch, steps, variant, window):
    """Catches: a window beside sinks that falls to masks, in a step or in the estimate of its memory; sinks that are
    lost beside a window too small to be merged."""
    model = tiny_model(attention=variant, sliding_window_size=window, block_size=512, n_layer=1)
    idx, whole, masks, forward = torch.randint(0, 97, (1, 400)), [], [], fast_attention.kernel_forward
    expected = model(idx)

    def flash(q, k, v, window, scale):
        whole.append(window)
        mask = torch.ones(400, 400, dtype=torch.bool).tril().triu(1 - window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)

    def spy(kernel, scale, q, k, v, mask, causal):
        masks.append(mask)
        return forward("cpu", scale, q, k, v, mask, causal)

    monkeypatch.setattr(fast_attention, "find_tools", lambda pairs: gpu_tools("flash", 400, False, True, window))
    monkeypatch.setattr(fast_attention, "flash_attention", flash)
    monkeypatch.setattr(fast_attention, "kernel_forward", spy)
    torch.testing.assert_close(model(idx), expected, rtol=1e-4, atol=1e-5)
    if steps == "fast" and variant == "sliding":
        assert (whole, masks) == ([window], [])
    elif steps == "fast":
        assert not whole and (window == 60 or set(masks) == {None})


def test_merged_kernels_are_what_a_long_prompt_uses(tiny_model, steps):
    """Catches: the test above comparing the plain steps with themselves, and masks where rectangles would do."""
    model, pos = tiny_model(**DUAL, dual_chunk_size=6, dual_chunk_local=3), torch.arange(T)[None]
    span, mixer = Span(True, 0, T - 1, True, True), model.layers[0].mixer
    plan = mixer.plan(pos, span, None, model.rope)
    assert (plan.faster is not None and not plan.blocks) if steps == "fast" else (plan.faster is None and plan.blocks)
    pairs = Pairs(mixer.row, model.config, pos, pos, span, Layout(0, 0), False, None, 0)
    blocks = merge_blocks(pairs, [False] * 3, corners=False)
    assert len(blocks) == 5 and all(strip.mask is None for block in blocks for strip in block.strips)


@torch.no_grad()
def test_a_changed_token_changes_nothing_before_it(tiny_model):
    """Catches: a leak of the future in any variant, S2-Attn in training mode included."""
    for fields in [CASES[c][0] for c in CASES] + [{"s2_attention": True, "s2_group_size": 6}]:
        model, idx = tiny_model(**fields).train(), torch.randint(0, 97, (1, 40))
        changed = idx.clone()
        changed[0, 23] = (idx[0, 23] + 1) % 97
        moved = (model(idx) - model(changed)).abs().amax(-1)[0] > 1e-6
        assert not moved[:23].any() and moved[23], fields


# ------------------------------------------------------------------------------------------------------------- S2-Attn


@pytest.mark.parametrize("heads", [(6, 2), (5, 5), (9, 3), (1, 1)])
@pytest.mark.parametrize("g", [4, 5, 7, 11])
@torch.no_grad()
def test_s2_equals_brute_force(tiny_model, heads, g):
    """Catches: heads that are split by key head, a shift the wrong way for odd g, ends that wrap."""
    H, G = heads
    fields = {"n_head": H, "n_query_groups": G, "n_embd": 8 * H, "n_layer": 1}
    model, idx = tiny_model(**fields, s2_attention=True, s2_group_size=g), torch.randint(0, 97, (2, 24))
    got = model.train()(idx)
    for row in range(2):
        assert_close(got[row], brute_force.logits(model, idx[row], brute_force.meet_shifted_groups(g, H)).float())


@torch.no_grad()
def test_short_attention_is_s2_without_the_shift(tiny_model):
    """Catches: a head that is shifted though none should be. Brute force with no shift: all heads in the lower half."""
    model, idx = tiny_model(s2_attention=True, s2_group_size=7, s2_shift=False), torch.randint(0, 97, (1, 24))
    unshifted = brute_force.meet_shifted_groups(7, 2 * model.config.n_head)
    assert_close(model.train()(idx)[0], brute_force.logits(model, idx[0], unshifted).float())


@torch.no_grad()
def test_s2_is_full_attention_in_eval_and_for_groups_of_the_whole_text(tiny_model):
    """Catches: groups at inference, and a shift that splits a text which one group holds."""
    model, idx = tiny_model(s2_attention=True, s2_group_size=8), torch.randint(0, 97, (2, 24))
    plain = GPT(tiny_config()).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(idx), plain(idx))
    model.train()
    assert not torch.allclose(model(idx), plain(idx), atol=1e-3)
    for g in (24, 25, 1000):
        model.config.s2_group_size = g
        assert torch.equal(model(idx), plain(idx))


@torch.no_grad()
def test_s2_by_ratio_and_right_padding(tiny_model):
    """Catches: a ratio that is not of the text's length, and padding on the right that reaches a real row."""
    model = tiny_model(s2_attention=True, s2_group_ratio=0.25).train()
    assert model.config.s2_group(24) == 6 and model.config.s2_group(3) == 1
    model.config.s2_group_size = 6
    idx = torch.randint(0, 97, (2, 24))
    padded = torch.cat([idx, torch.zeros(2, 7, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(padded)[:, :24], model(idx), rtol=1e-5, atol=1e-5)


def test_s2_trains(tiny_model):
    """Catches: a group that gradients do not come back from."""
    model = tiny_model(s2_attention=True, s2_group_size=5, attention_logit_softcapping=30.0).train()
    model(torch.randint(0, 97, (2, 23))).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.transformer.h.parameters())


# ------------------------------------------------------------------------------------------------------- FlexAttention


@pytest.mark.parametrize("queries, keys", [(300, 300), (256, 256), (130, 429), (1, 200), (500, 627)])
@pytest.mark.parametrize("skip", [0, 4, 128])
@pytest.mark.parametrize("window", [1, 100, 128, 129, 1000])
def test_the_block_mask_of_a_window_equals_the_dense_one(queries, keys, window, skip):
    """Catches: a block that is left out, or taken whole where the window's border runs through it."""
    made = window_block_mask(queries, keys, window, skip, torch.device("cpu"))
    q, k = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)[None]
    seen = (k <= q) & (q - k < window) & (k >= skip)
    blocks = made.to_dense()[0, 0].bool()
    n_q, n_k = blocks.shape
    padded = torch.zeros(n_q * 128, n_k * 128, dtype=torch.bool)
    padded[:queries, :keys] = seen
    tiles = padded.view(n_q, 128, n_k, 128).transpose(1, 2)
    assert torch.equal(blocks, tiles.flatten(2).any(-1))
    real = torch.zeros(n_q * 128, dtype=torch.bool)
    real[:queries] = True
    for row in range(n_q):
        for col in made.full_kv_indices[0, 0, row, : made.full_kv_num_blocks[0, 0, row]].tolist():
            assert tiles[row, col][real.view(n_q, 128)[row]].all()
    mod = made.mask_mod(None, None, torch.arange(queries)[:, None], k)
    assert torch.equal(mod, seen)


# --------------------------------------------------------------------------------------------- what cannot be, is said


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"attention": "streaming"}, "needs sliding_window_size"),
        ({"attention": "dual_chunk", "dual_chunk_size": 200, "dual_chunk_local": 57}, "must be at most the trained"),
        ({"attention": "dual_chunk", "dual_chunk_pretraining_length": 2}, None),
        ({"attention": "dual_chunk", "sliding_window_size": 8}, "set sliding_window_size to null"),
        ({"attention": "dual_chunk,sliding", "sliding_window_size": 8}, "to null, and attention to layers without"),
        (
            {"attention": "dual_chunk", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "depends on the text's length",
        ),
        (
            {"attention": "streaming", "sliding_window_size": 8, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "depends on the text's length",
        ),
        (
            {"attention": "dual_chunk", "dual_chunk_temperature": 1.2, "dual_chunk_temperature_slope": 0.1},
            "two ways to say it",
        ),
        ({"s2_attention": True, "attention": "sliding", "sliding_window_size": 8}, "set attention to 'full'"),
        ({"s2_attention": True, "s2_group_ratio": 0.0}, "must lie between"),
        ({"n_sink_tokens": -1}, "must lie between"),
    ],
)
def test_combinations_that_cannot_be_are_refused_in_one_sentence(fields, message):
    """Catches: a combination that would silently compute something else."""
    if message is None:
        assert tiny_config(**fields).chunk_size == 1
        return
    with pytest.raises(ValueError, match=message) as error:
        tiny_config(**fields)
    assert str(error.value).count(". ") == 0 and str(error.value).endswith(".")


@pytest.mark.parametrize(
    "row, message",
    [
        (dilated.ROW._replace(window=lambda c: c.sliding_window_size), "says window=4 and sinks=3"),
        (dilated.ROW._replace(window=lambda c: 6), "says window=6 and sinks=3"),  # the farthest key is 6 back
        (dilated.ROW._replace(sinks=None), "says window=8 and sinks=0"),
        (Variant((Part(dilated.dilated, reach=lambda a, b, c: (a - 3, b)),)), "says how far part 0 reaches"),
        (Variant((Part(dilated.dilated, reach=lambda a, b, c: (b - 9, b)),)), "says how far part 0 reaches"),
        (Variant((Part(sliding, reach=lambda a, b, c: (b - 4, b)),)), "how far the queries from"),
        (Variant((Part(dilated.dilated, reach=lambda a, b, c: (0, b), run=True),)), "says run=True of part 0"),
        (Variant((Part(sliding), Part(dilated.dilated))), "has parts that share no pair"),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_a_row_that_its_mask_contradicts_ends_in_one_sentence(row, message, cached):
    """Catches: a wrong window, reach or run that would lose keys without a word, or crash a kernel."""
    with dilated.registered(row, "wrong"):
        model = GPT(tiny_config(**dilated.FIELDS | {"attention": "wrong"}))
        with pytest.raises(ValueError, match=message) as error:
            model.set_kv_cache(1, 40) if cached else model(torch.randint(0, 97, (1, 40)))
    assert "\n" not in str(error.value) and "query at" in str(error.value)


def test_an_override_keeps_the_trained_length():
    """Catches: dual-chunk or YaRN on a longer block_size that takes the new length for the trained one."""
    trained = Config.from_name("SmolLM2-135M")
    dual = trained.override(attention="dual_chunk", block_size=65536)
    assert (dual.chunk_trained, dual.chunk_size, dual.chunk_local) == (8192, 5120, 1024)
    yarn = trained.override(rope_scaling={"type": "yarn", "factor": 4.0}, block_size=32768)
    assert yarn.rope_scaling["original_max_position_embeddings"] == 8192
    assert dual.override(block_size=131072).chunk_trained == 8192


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_sink_tokens": 8}, "also set attention to 'streaming'"),
        ({"n_sink_tokens": 0}, "also set attention to 'streaming'"),
        ({"dual_chunk_size": 512}, "also set attention to 'dual_chunk'"),
        ({"layer_windows": "4,9"}, "also set attention to 'sliding'"),
        ({"attention": "sliding", "layer_windows": "4,x"}, "give numbers of tokens"),
        ({"s2_group_size": 64}, "also set s2_attention to true"),
        ({"s2_shift": False}, "also set s2_attention to true"),
        ({"s2_attention": True, "s2_group_size": 64, "s2_group_ratio": 0.5}, "set one"),
    ],
)
def test_overrides_that_would_do_nothing_are_refused(fields, message):
    """Catches: a flag that is accepted and not used."""
    with pytest.raises(ValueError, match=message):
        tiny_config().override(**fields)


def test_a_model_without_memory_can_be_planned():
    """Catches: a look at positions or at autocast that a meta tensor has no answer to."""
    idx = torch.zeros(1, 8, dtype=torch.long, device="meta")
    assert GPT(tiny_config()).to("meta")(idx).shape == (1, 8, 97)


def test_the_tutorial_walks_through_this_very_code():
    """Catches: a page that shows another variant than the one that is tested."""
    code = Path(dilated.__file__).read_text().split("# ---8<---")[1].partition("\n")[2].strip()
    page = Path(__file__).resolve().parents[1] / "tutorials" / "attention_variants.md"
    assert code in page.read_text()


def test_every_variant_is_covered_here():
    """Catches: a new row of VARIANTS that nobody compares with brute force."""
    masked = {name for name, row in VARIANTS.items() if row.parts}
    assert masked - {"full"} <= {fields["attention"] for fields, _ in CASES.values()}


@pytest.mark.parametrize("split", [(40,), (25, 15), (12, 20, 8)])
def test_a_kernel_that_takes_windows_gets_the_keys_of_each_query(tiny_model, split, monkeypatch, steps):
    """Catches: keys cut so that the last is not the last query's own; a window that another part is merged with."""
    model = tiny_model(attention="sliding,streaming", sliding_window_size=9, n_layer=2, block_size=64).eval()
    calls = []

    def attention(q, k, v, window, scale):
        own = torch.arange(k.size(2) - q.size(2), k.size(2))[:, None]
        key = torch.arange(k.size(2))
        calls.append((q.size(2), k.size(2), window))
        mask = (key <= own) & (key > own - window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)

    idx = torch.randint(0, 97, (2, 40))
    with torch.no_grad():
        expected = model(idx)
        monkeypatch.setattr(fast_attention, "find_tools", lambda pairs: Tools("cpu", "flex", 1, False, True))
        monkeypatch.setattr(fast_attention.cudnn_window, "attention", attention)
        model.set_kv_cache(2, 40)
        found, start = [], 0
        for n in split:
            found.append(model(idx[:, start : start + n], torch.arange(start, start + n)))
            start += n
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-4, atol=1e-5)
    assert calls == ([(n, min(n + 8, sum(split[: i + 1])), 9) for i, n in enumerate(split)] if steps == "fast" else [])
