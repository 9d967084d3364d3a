"""Speculative decoding with compiled steps on a GPU: python -m pytest tests/gpu."""

import itertools

import pytest
import torch

from lit_swa import GPT
from lit_swa.fast_decode import compile_decode
from lit_swa.generate import Sampling, Session, generate
from lit_swa.speculative import Draft, Lookup, ModelDraft, SpeculativeStats, make_draft, speculate, warm_up

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIZE = {"n_layer": 2, "n_head": 8, "n_query_groups": 4, "n_embd": 256, "intermediate_size": 512}
VARIANTS = {
    "full": {},
    "rolling": {"attention": "sliding", "sliding_window_size": 9, "rolling_kv_cache": True},
    "streaming": {"attention": "streaming", "sliding_window_size": 9, "n_sink_tokens": 2},
    "dual chunk": {"attention": "dual_chunk", "dual_chunk_pretraining_length": 24},
    "mixed": {"attention": "sliding,full", "sliding_window_size": 9, "rolling_kv_cache": True},
}
DRAFTS = ["lookup", "streaming", "self-int4", "model"]


def build_draft(kind: str, target: GPT, batch_size: int, k: int) -> Draft:
    if kind == "lookup":
        return Lookup(shortest=1)
    if kind != "model":
        return make_draft(kind, target, window=8, compile=True)
    draft = GPT(target.config).eval().cuda()
    with torch.no_grad():
        for p, q in zip(draft.parameters(), target.parameters(), strict=True):
            p.copy_(q + 0.005 * torch.randn_like(q))
    return ModelDraft(Session(draft, batch_size, lookahead=k, decode=compile_decode(draft, tokens=2)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", DRAFTS)
def test_greedy_text_is_the_targets(tiny_model, variant, kind):
    """Catches: a recorded step that reads other caches, rows that share a position, a key that a kernel leaves out."""
    if kind == "streaming" and "full" not in VARIANTS[variant].get("attention", "full"):
        pytest.skip("there is no full attention to replace")
    model, k = tiny_model(**SIZE, **VARIANTS[variant]).cuda(), 3
    prompts = [torch.randint(0, 97, (n,)).tolist() for n in (30, 4, 11)]
    expected = [list(generate(model, ids, 50)) for ids in prompts]
    for rows in ([0], [0, 1, 2]):
        session = Session(model, len(rows), lookahead=k, decode=compile_decode(model, tokens=k + 1))
        draft, stats = build_draft(kind, model, len(rows), k), SpeculativeStats()
        warm_up(session, draft, k, 100)
        for _ in range(2):  # the second time with graphs that were recorded the first
            texts = [[] for _ in rows]
            chosen = [prompts[i] for i in rows]
            for new in speculate(session, chosen, draft, speculative_k=k, max_new_tokens=50, stats=stats):
                for text, tokens in zip(texts, new, strict=True):
                    text += tokens
            assert texts == [expected[i] for i in rows]


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.1)])
def test_the_host_waits_once_in_a_round(tiny_model, monkeypatch, kind, sampling):
    """Catches: a synchronisation between two steps; torch raises on any but the one that reads a round's tokens."""
    model, k, tolist, waits = tiny_model(**SIZE).cuda(), 3, torch.Tensor.tolist, []
    session = Session(model, 2, lookahead=k, decode=compile_decode(model, tokens=k + 1))
    draft = build_draft(kind, model, 2, k)
    warm_up(session, draft, k, 100)

    def counted(tensor: torch.Tensor) -> list:
        torch.cuda.set_sync_debug_mode("default")
        waits.append(tensor.shape)
        values = tolist(tensor)
        torch.cuda.set_sync_debug_mode("error")
        return values

    prompts = [torch.randint(0, 97, (n,)).tolist() for n in (9, 14)]
    rounds = speculate(session, prompts, draft, speculative_k=k, max_new_tokens=60, sampling=sampling)
    for _ in itertools.islice(rounds, 4):  # every shape has been recorded
        pass
    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    torch.cuda.set_sync_debug_mode("error")
    try:
        done = sum(1 for _ in itertools.islice(rounds, 8))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == done == 8
