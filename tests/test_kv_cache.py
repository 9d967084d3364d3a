"""Whatever the cache and however a sequence is cut into calls, the logits are those of one uncached call."""

import random

import pytest
import torch
from tiny import tiny_config

from lit_swa import GPT, Config

pytestmark = pytest.mark.usefixtures("steps", "dilated_row")

# Logits here are of size 1 to 10. Another order of the sums moves float32 by a few 1e-6; 1e-5 of the scale.
REL = 1e-5


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    error = ((a - b).abs().max() / b.abs().max()).item()
    assert error <= REL, f"largest error {error:.2e} of the logits' scale"


def feed(model: GPT, idx: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The logits of idx (B, T), fed in calls of the given sizes."""
    outputs, start = [], 0
    for size in sizes:
        outputs.append(model(idx[:, start : start + size], torch.arange(start, start + size)))
        start += size
    assert start == idx.size(1)
    return torch.cat(outputs, dim=1)


def splits(T: int, S: int) -> list[list[int]]:
    """Ways to cut T tokens: at once, one by one, chunks around S and the wrap at 2S, at random."""

    def chunks(n: int) -> list[int]:
        return [min(n, T - i) for i in range(0, T, n)]

    cuts = [[T], chunks(1), chunks(max(1, S - 1)), chunks(S + 1), chunks(2 * S), chunks(3)]
    if T > 2:
        cuts += [[T - 2, 1, 1], [1, T - 1]]
        rng, rest, ragged = random.Random(T * 1000 + S), T, []
        while rest:
            ragged.append(rng.randint(1, min(rest, 2 * S + 3)))
            rest -= ragged[-1]
        cuts.append(ragged)
    return cuts


PATTERNS = {
    "full": {"attention": "full"},
    "sliding": {"attention": "sliding"},
    "rolling": {"attention": "sliding", "rolling_kv_cache": True},
    "mixed": {"attention": "sliding,full"},
    "mixed rolling": {"attention": "sliding,full", "rolling_kv_cache": True},
    "a base for each kind": {"attention": "full,sliding", "rope_local_base_freq": 500.0},
    "dilated": {"attention": "dilated", "n_sink_tokens": 3},
    "dilated rolling": {"attention": "dilated", "n_sink_tokens": 2, "rolling_kv_cache": True},
    "capped rolling": {"attention": "sliding,full", "rolling_kv_cache": True, "attention_logit_softcapping": 5.0},
}


@pytest.mark.parametrize("S, n_query_groups", [(1, 2), (2, 2), (7, 2), (7, 1), (24, 2), (40, 2)])
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_any_split_gives_the_logits_of_one_call(tiny_model, pattern, n_query_groups, S):
    """Catches: writing before reading near the wrap, off-by-one windows, a mask by slot and not by position."""
    model = tiny_model(sliding_window_size=S, n_query_groups=n_query_groups, **PATTERNS[pattern])
    idx = torch.randint(0, 97, (2, 24))
    expected = model(idx)
    for sizes in splits(24, S):
        model.set_kv_cache(2, 24)
        assert_same(feed(model, idx, sizes), expected)


@pytest.mark.parametrize("S", [3, 8])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("n_query_groups", [6, 2])
@torch.no_grad()
def test_rolling_equals_masked_attention_over_many_lengths(tiny_model, n_query_groups, batch, S):
    """Catches: a cache that is right only for the first turns of the ring. 8 x 5 lengths x 7 to 9 splits."""
    model = tiny_model(attention="sliding", sliding_window_size=S, rolling_kv_cache=True, n_query_groups=n_query_groups)
    sizes_seen = set()
    for T in (S - 1, S, S + 1, 2 * S, 10 * S):
        idx = torch.randint(0, 97, (batch, T))
        expected = model(idx)
        for sizes in splits(T, S):
            model.set_kv_cache(batch, 10 * S)
            assert_same(feed(model, idx, sizes), expected)
            sizes_seen.add(model.kv_cache_bytes())
    assert len(sizes_seen) == 1


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("rolling", [False, True])
@torch.no_grad()
def test_soft_capping_local_base_and_partial_rope_go_through_the_cache(tiny_model, rolling, cap):
    """Catches: a cached path that forgets the cap, the local RoPE base or the unturned elements."""
    model = tiny_model(
        attention="sliding,full",
        sliding_window_size=5,
        rolling_kv_cache=rolling,
        attention_logit_softcapping=cap,
        rope_local_base_freq=100.0,
        rotary_percentage=0.5,
        norm_qk=True,
    )
    idx = torch.randint(0, 97, (2, 30))
    for sizes in splits(30, 5):
        model.set_kv_cache(2, 30)
        assert_same(feed(model, idx, sizes), model(idx))


@torch.no_grad()
def test_a_prompt_of_many_query_blocks_equals_a_brute_force_mask(tiny_model):
    """Catches: a block of queries that misses keys at its left edge, or a mask reused where it does not hold."""
    S, T = 50, 700  # blocks of 128 queries
    model = tiny_model(attention="sliding", sliding_window_size=S, block_size=1024)
    reference = tiny_model(attention="full", block_size=1024)
    reference.load_state_dict(model.state_dict())
    idx = torch.randint(0, 97, (1, T))
    logits = model(idx)
    position = 615  # its logits follow from the last n_layer * (S - 1) + 1 tokens, at their own positions
    first = position - 2 * (S - 1)
    model.set_kv_cache(1, 1024)
    shortened = model(idx[:, first : position + 1], torch.arange(first, position + 1))
    assert_same(shortened[:, -1:], logits[:, position : position + 1])
    assert_same(model(idx[:, :S])[:, -1:], reference(idx[:, :S])[:, -1:])
    assert not torch.allclose(model(idx)[:, -1], reference(idx)[:, -1], rtol=1e-2)


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_rows_at_positions_of_their_own(tiny_model, pattern):
    """Catches: one row's position used for all: prompts of different lengths, padded left, then decoded together."""
    model = tiny_model(sliding_window_size=5, **PATTERNS[pattern])
    lengths, T = torch.tensor([9, 3, 17]), 40
    idx = torch.randint(0, 97, (3, T))
    expected = model(idx)
    for padding in ("ascending", "minus one"):
        model.set_kv_cache(3, T)
        longest = int(lengths.max())
        pos = torch.arange(longest) - (longest - lengths)[:, None]  # (3, longest), negative left of the prompt
        prompt = idx.gather(1, pos.clamp(min=0))
        logits = model(prompt, pos if padding == "ascending" else pos.clamp(min=-1))
        for row, length in enumerate(lengths.tolist()):
            assert_same(logits[row, longest - length :], expected[row, :length])
        rows = torch.arange(3)
        for step in range(T - longest):
            pos = lengths + step
            logits = model(idx[rows, pos][:, None], pos[:, None])
            assert_same(logits[:, 0], expected[rows, pos])


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_ragged_chunks_of_different_lengths(tiny_model, pattern):
    """Catches: right padding that is written over live keys, and a row of padding alone that writes at all."""
    model = tiny_model(sliding_window_size=4, **PATTERNS[pattern])
    T, rng = 33, random.Random(7)
    idx = torch.randint(0, 97, (3, T))
    expected = model(idx)
    model.set_kv_cache(3, T)
    done = [0, 0, 0]
    while min(done) < T:
        sizes = [min(rng.choice([0, 1, 2, 6, 11]), T - d) for d in done]
        width = max(*sizes, 1)
        pos, tokens = torch.full((3, width), -1), torch.zeros(3, width, dtype=torch.long)
        places = []
        for row, (start, size) in enumerate(zip(done, sizes, strict=True)):
            first = rng.randint(0, width - size)  # padding on the left, on the right, or on both sides
            places.append(slice(first, first + size))
            pos[row, places[row]] = torch.arange(start, start + size)
            tokens[row, places[row]] = idx[row, start : start + size]
        logits = model(tokens, pos)
        assert torch.isfinite(logits).all()
        for row, (start, size) in enumerate(zip(done, sizes, strict=True)):
            if size:
                assert_same(logits[row, places[row]], expected[row, start : start + size])
            done[row] = start + size


@pytest.mark.parametrize("lookahead", [1, 3])
@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_tokens_within_the_lookahead_can_be_taken_back(tiny_model, pattern, lookahead):
    """Catches: a rejected draft that overwrote keys which the window still needs, or that stays visible."""
    model = tiny_model(sliding_window_size=5, **PATTERNS[pattern])
    T = 40
    idx = torch.randint(0, 97, (2, T))
    expected = model(idx)
    model.set_kv_cache(2, T + lookahead, lookahead=lookahead)
    model(idx[:, :7], torch.arange(7))
    p = 7
    while p < T - lookahead:
        draft = torch.cat([idx[:, p : p + 1], torch.randint(0, 97, (2, lookahead))], dim=1)  # the first is right
        logits = model(draft, torch.arange(p, p + lookahead + 1))
        assert_same(logits[:, 0], expected[:, p])
        p += 1
    for p in range(T - lookahead, T):
        assert_same(model(idx[:, p : p + 1], torch.tensor([p]))[:, 0], expected[:, p])


@torch.no_grad()
def test_rows_take_back_different_numbers_of_tokens(tiny_model):
    """Catches: a lookahead that works for a batch in step only."""
    model = tiny_model(attention="sliding,full", sliding_window_size=4, rolling_kv_cache=True)
    T, k, rng = 30, 3, random.Random(3)
    idx = torch.randint(0, 97, (2, T))
    expected = model(idx)
    model.set_kv_cache(2, T + k, lookahead=k)
    p, rows = torch.tensor([0, 0]), torch.arange(2)
    while int(p.max()) < T - k - 1:
        pos = p[:, None] + torch.arange(k + 1)
        accepted = torch.tensor([rng.randint(1, k + 1) for _ in rows])
        right = torch.arange(k + 1) < accepted[:, None]
        tokens = torch.where(right, idx.gather(1, pos), torch.randint(0, 97, (2, k + 1)))
        logits = model(tokens, pos)
        for row in rows.tolist():
            n = int(accepted[row])
            assert_same(logits[row, :n], expected[row, int(p[row]) : int(p[row]) + n])
        p = p + accepted


@torch.no_grad()
def test_taking_back_more_than_the_lookahead_is_refused(tiny_model):
    """Catches: attention over keys that a rejected draft has replaced, which only costs quality and so goes unseen."""
    model = tiny_model(attention="sliding,full", sliding_window_size=5, rolling_kv_cache=True)
    model.set_kv_cache(1, 64, lookahead=2)
    idx = torch.randint(0, 97, (1, 20))
    feed(model, idx, [20])
    for pos in (torch.tensor([18]), torch.tensor([[18]])):
        model(idx[:, 18:19], pos)
    for pos in (torch.tensor([16]), torch.tensor([[16]]), torch.arange(12, 20)):
        with pytest.raises(ValueError, match="takes back 2 tokens"):
            model(idx[:, : pos.size(-1)], pos)


@pytest.mark.parametrize("pattern", PATTERNS)
@torch.no_grad()
def test_a_cache_that_is_extended_keeps_what_it_holds(tiny_model, pattern):
    """Catches: keys lost, or left in the slots of the smaller cache, when a conversation outgrows it."""
    model = tiny_model(sliding_window_size=9, **PATTERNS[pattern])
    idx = torch.randint(0, 97, (2, 40))
    expected = model(idx)
    model.set_kv_cache(2, 7, lookahead=1)  # less than the window
    outputs, start = [], 0
    for room, sizes in ((7, [3, 2]), (8, [3]), (26, [1, 14]), (40, [1, 6, 10])):
        model.extend_kv_cache(room)
        for size in sizes:
            outputs.append(model(idx[:, start : start + size], torch.arange(start, start + size)))
            start += size
    assert_same(torch.cat(outputs, dim=1), expected)


@torch.no_grad()
def test_the_cache_can_be_used_again_for_another_sequence(tiny_model):
    """Catches: keys of the previous sequence that stay visible."""
    for fields in PATTERNS.values():
        model = tiny_model(sliding_window_size=6, **fields)
        model.set_kv_cache(1, 64)
        feed(model, torch.randint(0, 97, (1, 64)), [60, 1, 3])
        idx = torch.randint(0, 97, (1, 20))
        assert_same(feed(model, idx, [3, 1, 16]), model(idx))  # from position 0 on, without a reset
        model.reset_kv_cache()
        assert_same(feed(model, idx, [1] * 20), model(idx))


def test_a_rolling_cache_has_two_slots_for_each_key_it_must_keep(tiny_model):
    """Catches: memory that grows with the context, or keys stored for every query head."""
    sizes = set()
    for max_seq_length in (16, 64, 256):
        model = tiny_model(attention="sliding", sliding_window_size=16, rolling_kv_cache=True)
        model.set_kv_cache(2, max_seq_length, lookahead=3)
        sizes.add(model.kv_cache_bytes())
    layers, keys_and_values, rows, slots, G, D, float32 = 2, 2, 2, 2 * (16 + 3), 2, 8, 4
    assert sizes == {layers * keys_and_values * rows * slots * G * D * float32}


def test_mistral_7b_keeps_1_07_gb_instead_of_17_2_at_128k():
    """Catches: any change of the cache's geometry. Counted on the meta device: nothing is allocated."""
    for rolling, gigabytes in ((True, 1.07), (False, 17.18)):
        with torch.device("meta"):
            model = GPT(Config.from_name("Mistral-7B-v0.1", rolling_kv_cache=rolling, block_size=131072)).to(
                torch.bfloat16
            )
        model.set_kv_cache(1, 131072)
        assert round(model.kv_cache_bytes() / 1e9, 2) == gigabytes


@torch.no_grad()
def test_a_rolling_cache_reads_text_of_any_length(tiny_model):
    """Catches: a limit by block_size where every layer has a window: position 1000 of a model with a context of 32."""
    model = tiny_model(attention="sliding", sliding_window_size=8, rolling_kv_cache=True, block_size=32)
    model.set_kv_cache(1, 32)
    idx = torch.randint(0, 97, (1, 1001))
    feed(model, idx[:, :1000], [1000])
    last = model(idx[:, 1000:], torch.tensor([1000]))
    assert_same(last[:, 0], model(idx)[:, -1])


@torch.no_grad()
def test_a_rolling_cache_for_less_than_a_window_ends_where_it_was_told(tiny_model):
    """Catches: a window that is silently cut to max_seq_length once the text is longer."""
    model = tiny_model(attention="sliding", sliding_window_size=64, rolling_kv_cache=True)
    model.set_kv_cache(1, 32)
    idx = torch.randint(0, 97, (1, 33))
    assert_same(feed(model, idx[:, :32], [30, 1, 1]), model(idx[:, :32]))
    with pytest.raises(ValueError, match="Position 32"):
        model(idx[:, 32:], torch.tensor([32]))


@torch.no_grad()
def test_positions_beyond_the_cache_or_the_context_are_refused(tiny_model):
    """Catches: silent wrap-around in a dense cache."""
    model = tiny_model(block_size=32)
    with pytest.raises(ValueError, match="context of 32"):
        model(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(ValueError, match="max_seq_length=33"):
        model.set_kv_cache(1, 33)
    model.set_kv_cache(1, 16)
    with pytest.raises(ValueError, match="Position 16"):
        model(torch.zeros(1, 1, dtype=torch.long), torch.tensor([16]))
    with pytest.raises(ValueError, match="2 rows|1 rows"):
        model(torch.zeros(2, 1, dtype=torch.long), torch.tensor([1]))
    with pytest.raises(ValueError, match="padding"):
        model(torch.zeros(1, 2, dtype=torch.long), torch.tensor([-1, 0]))
    with pytest.raises(ValueError, match="shape"):
        model(torch.zeros(1, 2, dtype=torch.long), torch.tensor([0]))
    model.clear_kv_cache()
    with pytest.raises(ValueError, match="set_kv_cache"):
        model(torch.zeros(1, 1, dtype=torch.long), torch.tensor([0]))


@torch.no_grad()
def test_the_cache_follows_the_weights_unless_told(tiny_model):
    """Catches: a float32 cache of a bfloat16 model, and a cache dtype that is ignored."""
    model = tiny_model(attention="sliding,full", sliding_window_size=4, rolling_kv_cache=True).to(torch.bfloat16)
    model.set_kv_cache(1, 16)
    assert model.transformer.h[0].attn.kv_cache.k.dtype == torch.bfloat16
    model.float().set_kv_cache(1, 16, dtype=torch.bfloat16)
    assert model.transformer.h[1].attn.kv_cache.v.dtype == torch.bfloat16
    idx = torch.randint(0, 97, (1, 16))
    once = feed(model, idx, [16])
    model.set_kv_cache(1, 16, dtype=torch.bfloat16)
    # Every key is rounded to bfloat16, whoever meets it; rounding the cached keys only was 2.6e-3 off. What is left
    # comes from keys that float32 noise of 1e-7 puts on the other side of a rounding border.
    assert (feed(model, idx, [5, 1, 10]) - once).abs().max() / once.abs().max() < 3e-4


@torch.no_grad()
def test_logits_to_keep_are_the_last_ones(tiny_model):
    """Catches: logits of other tokens, or all of them computed."""
    model = tiny_model()
    idx = torch.randint(0, 97, (2, 12))
    for k in (1, 3):
        assert_same(model(idx, logits_to_keep=k), model(idx)[:, -k:])


def test_bad_fields_of_set_kv_cache_are_refused():
    """Catches: a cache of no rows or negative lookahead, which would fail far away."""
    model = GPT(tiny_config())
    for arguments in ({"batch_size": 0}, {"batch_size": 1, "max_seq_length": 0}, {"batch_size": 1, "lookahead": -1}):
        with pytest.raises(ValueError, match="at least"):
            model.set_kv_cache(**arguments)
