"""Whatever a cache was given before, a sequence sees what is left of its own text, and nothing else.

Sequences go on, leave positions out, begin anew, take tokens back and pause, each at its own pace. The reference keeps
a list of each sequence's tokens and reads it anew, pair by pair.
"""

import random

import brute_force
import dilated
import pytest
import torch
from tiny import randomize, tiny_config

from lit_swa import GPT

pytestmark = pytest.mark.usefixtures("steps", "dilated_row")
ROOM = 48  # positions of a cache that grows with the text
ROLLING = {"attention": "sliding", "sliding_window_size": 5, "rolling_kv_cache": True}
CASES = {
    "full": ({"attention": "full"}, brute_force.meet_full),
    "sliding": ({"attention": "sliding", "sliding_window_size": 5}, brute_force.meet_sliding(5)),
    "rolling": (ROLLING, brute_force.meet_sliding(5)),
    "2 sinks + 4": (
        {"attention": "streaming", "sliding_window_size": 4, "n_sink_tokens": 2},
        brute_force.meet_streaming(4, 2),
    ),
    "4 sinks + 1": (
        {"attention": "streaming", "sliding_window_size": 1, "n_sink_tokens": 4},
        brute_force.meet_streaming(1, 4),
    ),
    "chunks": (
        {
            "attention": "dual_chunk",
            "dual_chunk_pretraining_length": 16,
            "dual_chunk_size": 6,
            "dual_chunk_local": 3,
        },
        brute_force.meet_dual_chunk(6, 3),
    ),
    "sinks under full": (
        {"attention": "streaming,full", "sliding_window_size": 4, "n_sink_tokens": 2},
        [brute_force.meet_streaming(4, 2), brute_force.meet_full],
    ),
    "dilated": (dilated.FIELDS, brute_force.meet_dilated(4, 3)),
    "dilated rolling": (dilated.FIELDS | {"rolling_kv_cache": True}, brute_force.meet_dilated(4, 3)),
}


def next_positions(rng: random.Random, text: list[tuple[int, int]], T: int, back: int) -> list[int]:
    """Where the next T tokens of a sequence stand, negative for padding. back: how many may be taken back."""
    end = text[-1][0] + 1 if text else 0
    action = rng.choice(("go on", "go on", "skip", "anew", "take back", "pause", "padded", "with gaps"))
    if action == "pause":
        return [-1] * T
    if action == "padded":
        n = rng.randrange(T)
        return [-1] * n + list(range(end, end + T - n))
    starts = {"skip": end + rng.randint(1, 9), "anew": 0, "take back": max(0, end - rng.randint(0, back))}
    start = starts.get(action, end)
    gap = 3 if action == "with gaps" else 1
    return [start + n * gap for n in range(T)]


def play(model: GPT, meet, seed: int, lookahead: int, calls: int = 9) -> int:
    """Feed a batch at random and compare every call's logits; returns how many tokens were compared. With an even seed
    both sequences are at the same positions, which a call then gives once."""
    rng, texts, compared, same = random.Random(seed), [[], []], 0, seed % 2 == 0
    model.set_kv_cache(2, ROOM, lookahead=lookahead)
    for _ in range(calls):
        T = rng.choice((1, 1, 1, 2, 3, 6, 9))
        back = lookahead if any(attn.mixer.rolls for attn in model.layers) else ROOM
        rows = [next_positions(rng, text, T, back) for text in texts]
        rows = [rows[0]] * 2 if same else rows
        rows = [list(range(T)) if row[-1] >= ROOM or same and row[0] < 0 else row for row in rows]
        idx = torch.tensor([[rng.randrange(97) for _ in range(T)] for _ in texts])
        model.fixed_shape_steps = rng.random() < 0.3
        got = model(idx, torch.tensor(rows[0] if same else rows))
        for r, row in enumerate(rows):
            new = [(p, int(token)) for p, token in zip(row, idx[r], strict=True) if p >= 0]
            texts[r] = [(p, token) for p, token in texts[r] if not new or p < new[0][0]] + new
            if new:
                places, tokens = zip(*texts[r], strict=True)
                expected = brute_force.logits(model, torch.tensor(tokens), meet, places=list(places))[-len(new) :]
                error = (got[r, -len(new) :] - expected).abs().max() / expected.abs().max()
                assert error < 1e-5, (seed, r, row, error, texts[r])
                compared += len(new)
    return compared


@pytest.mark.parametrize("lookahead", [0, 3])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_any_history_of_the_cache_leaves_each_sequence_its_own_text(case, lookahead):
    """Catches: sinks, or slots, of an earlier text that are met by a new one, and empty slots that are read as keys."""
    fields, meet = CASES[case]
    model = GPT(tiny_config(n_head=4, n_embd=32, **fields)).eval()
    randomize(model)
    assert sum(play(model, meet, seed, lookahead) for seed in range(4)) > 80


@torch.no_grad()
def test_a_short_call_with_gaps_keeps_the_keys_of_its_first_tokens(tiny_model):
    """Catches: position 25 written to the slot of 17 before position 19 has read it."""
    model, idx = tiny_model(**ROLLING), torch.randint(0, 97, (1, 21))
    places = [*range(18), 19, 22, 25]
    model.set_kv_cache(1, ROOM, lookahead=3)
    model(idx[:, :18], torch.arange(18))
    got = model(idx[:, 18:], torch.tensor(places[18:]))[0]
    expected = brute_force.logits(model, idx[0], brute_force.meet_sliding(5), places=places)[18:]
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
