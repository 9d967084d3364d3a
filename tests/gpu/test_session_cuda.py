"""On a GPU: python -m pytest tests/gpu. Feeding a token and choosing the next one never make the host wait."""

import pytest
import torch

from lit_swa.fast_decode import compile_decode, warm_up
from lit_swa.generate import Sampler, Sampling, Session, generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROLLING = {"attention": "sliding", "sliding_window_size": 9, "rolling_kv_cache": True}
GREEDY, DRAWN = Sampling(), Sampling(0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=1)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "fields", [{}, ROLLING, ROLLING | {"attention": "sliding,full"}], ids=["full", "roll", "mixed"]
)
def test_a_token_is_fed_and_chosen_without_waiting(tiny_model, fields, compiled, sampling):
    """Catches: a copy to the host or from it in the loop; torch raises on any synchronisation."""
    torch._dynamo.reset()
    model = tiny_model(**fields).cuda()
    expected = list(generate(model, [1, 2, 3], 30, sampling=sampling))
    session = Session(model, decode=compile_decode(model) if compiled else None)
    warm_up(session, 40)
    sampler, chosen = Sampler(sampling, [[1, 2, 3]], 97, "cuda"), []
    with torch.inference_mode():
        logits = session.feed([1, 2, 3])
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(30):
                chosen.append(sampler.choose(logits[:, -1]))
                logits = session.feed(chosen[-1])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.cat(chosen, dim=1)[0].tolist() == expected
    assert session.tokens == [[1, 2, 3, *expected]]
