"""On a GPU: python -m pytest tests/gpu. Rows of a batch are single runs, and a step never waits for the GPU."""

import random
from collections import deque
from dataclasses import replace

import pytest
import torch

from lit_swa.batches import Batch, Request, Text, in_order
from lit_swa.fast_decode import compile_decode
from lit_swa.generate import Sampling, generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
VARIANTS = {
    "full": {},
    "rolling": {"attention": "sliding", "sliding_window_size": 9, "rolling_kv_cache": True},
    "streaming": {"attention": "streaming", "sliding_window_size": 7, "n_sink_tokens": 3},
    "dual_chunk": {"attention": "dual_chunk", "dual_chunk_pretraining_length": 12},
}
SAMPLED = Sampling(0.8, top_p=0.9, repetition_penalty=1.2)
STOPS = [5, [6, 7]]


def some_requests(n: int) -> list[Request]:
    rng = random.Random(n)
    lengths = [(rng.randint(1, 30), rng.randint(1, 30)) for _ in range(n)]
    return [Request([rng.randrange(97) for _ in range(a)], b, i) for i, (a, b) in enumerate(lengths)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_are_single_runs(tiny_model, variant, sampling, compiled):
    """Catches: a token that reaches the wrong text since the host learns of it a step late, a row that reads another's
    slots, random numbers that depend on the batch."""
    model, requests = tiny_model(**VARIANTS[variant]).cuda(), some_requests(9)
    expected = [
        list(generate(model, r.ids, r.max_new_tokens, sampling=replace(sampling, seed=r.seed), stop_tokens=STOPS))
        for r in requests
    ]
    decode = compile_decode(model) if compiled else None
    batch = Batch(model, requests, sampling, batch_size=4, decode=decode, stop_tokens=STOPS)
    batch.warm_up()
    batch.together = 2
    assert batch.lag == 1
    assert [answer.tokens for _, answer in in_order(batch.run())] == expected


def test_a_step_never_waits(tiny_model):
    """Catches: a look at a token, a position or a mask, for which the GPU would stand still."""
    model, requests = tiny_model().cuda(), some_requests(4)
    requests = [request._replace(max_new_tokens=20) for request in requests]
    batch = Batch(model, requests, SAMPLED, batch_size=4, decode=compile_decode(model))
    batch.warm_up()
    with torch.inference_mode():
        batch.fill(deque(Text(i, r, 1e9, None, []) for i, r in enumerate(requests)))
        for _ in range(3):
            batch.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(12):
                batch.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
