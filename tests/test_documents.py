"""Several texts in one row, and the loss without logits of a whole text: what training reads."""

import pytest
import torch
import torch.nn.functional as F

from lit_swa import model as model_file
from lit_swa.exact_chunks import HandedOn
from lit_swa.model import IGNORED
from lit_swa.training.loss import differentiate_pieces_at_once

FIELDS = {
    "full": {},
    "sliding": {"attention": "sliding", "sliding_window_size": 5},
    "mixed": {"attention": "sliding,full", "sliding_window_size": 5},
    "streaming": {"attention": "streaming", "sliding_window_size": 4, "n_sink_tokens": 2},
    "dual_chunk": {"attention": "dual_chunk", "dual_chunk_pretraining_length": 12},
    "temperature": {
        "attention": "dual_chunk",
        "dual_chunk_pretraining_length": 12,
        "dual_chunk_temperature_slope": 0.1,
    },
    "s2": {"s2_attention": True, "s2_group_ratio": 0.25},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9}},
}


@pytest.mark.parametrize("lengths", [[7, 1, 20, 7, 13], [12, 12, 12]], ids=["of many lengths", "of one length"])
@pytest.mark.parametrize("name", FIELDS)
def test_documents_equal_texts_read_alone(tiny_model, name, lengths):
    """Catches: a text that sees its neighbour, positions that run on, groups cut across texts; gradients too; texts of
    one length, which lie side by side, that come back in another order."""
    model = tiny_model(**FIELDS[name]).train()
    idx = torch.randint(0, 97, (2, sum(lengths)))
    together = model(idx, documents=lengths)
    alone = torch.cat([model(text) for text in idx.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    grads = []
    for logits in (together, alone):
        model.zero_grad()
        logits.square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_documents_that_do_not_fit_are_refused(tiny_model):
    """Catches: tokens left over or missing, and a cache that would mix the texts."""
    model, idx = tiny_model(), torch.zeros(1, 10, dtype=torch.long)
    for lengths in ([3, 6], [3, 8], [10, 0], []):
        with pytest.raises(ValueError, match="do not fit 10 tokens"):
            model(idx, documents=lengths)
    model.set_kv_cache(1, 16)
    with pytest.raises(ValueError, match="in a cache"):
        model(idx, torch.arange(10), documents=[5, 5])


def test_texts_together_may_be_longer_than_the_context(tiny_model):
    """Catches: the context's limit applied to the row instead of to each text."""
    model = tiny_model(block_size=16)
    assert model(torch.zeros(1, 40, dtype=torch.long), documents=[16, 16, 8]).shape == (1, 40, 97)
    with pytest.raises(ValueError, match="outside the context of 16"):
        model(torch.zeros(1, 40, dtype=torch.long), documents=[17, 16, 7])


@pytest.mark.parametrize("elements", [97 * 3, 97 * 1000, 1])
@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": True, "final_logit_softcapping": 5.0}])
@pytest.mark.parametrize("at_once", ["", "all", "without head"])
def test_the_loss_equals_cross_entropy_of_all_logits(tiny_model, monkeypatch, fields, elements, at_once):
    """Catches: a piece counted twice or left out, ignored targets that count, a gradient that stops at a piece."""
    monkeypatch.setattr(model_file, "LOSS_ELEMENTS", (elements, elements))
    model, idx = tiny_model(**fields), torch.randint(0, 97, (2, 11))
    if at_once:
        differentiate_pieces_at_once(model)
    for p in [*model.lm_head.parameters(), *model.transformer.ln_f.parameters()] * (at_once == "without head"):
        p.requires_grad_(False)
    targets = torch.randint(0, 97, (2, 11)).masked_fill(torch.rand(2, 11) < 0.4, IGNORED)
    loss = model(idx, targets=targets)
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    names, params = zip(*[(name, p) for name, p in model.named_parameters() if p.requires_grad], strict=True)
    loss, expected = loss * 3, expected * 3
    for name, a, b in zip(names, torch.autograd.grad(loss, params), torch.autograd.grad(expected, params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item(), msg=name)


@pytest.mark.parametrize("at_once", [False, True])
def test_the_loss_never_makes_all_logits(tiny_model, monkeypatch, at_once):
    """Catches: a projection of the whole text, forward or backward. Each projection is watched."""
    monkeypatch.setattr(model_file, "LOSS_ELEMENTS", (97 * 4, 97 * 4))
    model, seen = tiny_model(), []
    if at_once:
        differentiate_pieces_at_once(model)
    model.lm_head.register_forward_hook(lambda module, args, y: seen.append(y.shape[0]))
    idx = torch.randint(0, 97, (1, 30))
    model(idx, targets=idx).backward()
    assert max(seen) <= 4 and sum(seen) == 30 * (1 if at_once else 2)  # once forward, once again in the backward


def test_gradients_that_wait_are_scaled_in_float32():
    """Catches: a factor such as 1/tokens that is rounded to bfloat16, and all gradients with it by up to 0.4%."""
    x = torch.ones(9, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.arange(1.0, 10.0).bfloat16()
    (HandedOn.apply(torch.zeros(()), [grad], x) / 3).backward()
    assert torch.equal(x.grad, (grad.float() / 3).bfloat16())


def test_rows_of_padding_are_no_tokens(tiny_model):
    """Catches: a softmax over rows of the vocabulary's padding, which evaluation leaves out."""
    model, idx = tiny_model(vocab_size=90, padded_vocab_size=97), torch.randint(0, 90, (1, 12))
    expected = F.cross_entropy(model(idx)[0, :, :90], idx[0], reduction="sum")
    torch.testing.assert_close(model(idx, targets=idx), expected, rtol=1e-5, atol=1e-5)
