"""Training in chunks: the gradients of one pass, what is kept between chunks, and what cannot be cut."""

import pytest
import torch
from tiny import randomize, tiny_config

from lit_swa import GPT, exact_chunks, linear
from lit_swa.config import VARIANTS
from lit_swa.exact_chunks import ExactChunks, KeyStore, border_bytes, check_chunks, cut_documents, kept_bytes
from lit_swa.lora import LoRAConfig, add_lora
from lit_swa.training.distribution import reader, unwrapped
from lit_swa.training.memory import recompute_blocks

CASES = {
    "window": {"attention": "sliding", "sliding_window_size": 7, "norm_qk": True},
    "sinks": {"attention": "streaming", "sliding_window_size": 7, "n_sink_tokens": 3},
    "pattern": {
        "attention": "sliding,full", "sliding_window_size": 5, "n_layer": 4, "attention_logit_softcapping": 5.0,
    },
    "windows of their own": {"attention": "sliding", "layer_windows": "3,9"},
    "chunks of its own": {
        "attention": "chunked,full", "attention_chunk_size": 7, "sink_logits": True, "positions": "rope,none",
        "temperature_slope": 0.5, "temperature_length": 9, "temperature_layers": "none",
    },
    "dual chunk": {"attention": "dual_chunk", "dual_chunk_pretraining_length": 24},
    "linear": {"attention": "linear", "linear_window": 5, "linear_sinks": 2, "linear_gate": True},
    "linear without a window": {"attention": "linear,full", "linear_window": 0, "positions": "none,rope"},
}  # fmt: skip
T = 48


def build(**fields) -> GPT:
    torch.manual_seed(0)
    model = GPT(tiny_config(**fields))
    randomize(model)
    return model.double().train()


def text() -> tuple[torch.Tensor, torch.Tensor]:
    idx, targets = torch.randint(0, 97, (2, T)), torch.randint(0, 97, (2, T))
    targets[:, 13:17] = -100
    return idx, targets


def gradients(model: GPT, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("documents", [None, [4, 26, 3, 15]], ids=["one text", "documents"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_pass(case, documents):
    """Catches: a key of another chunk, a gradient that is handed to the wrong one, lost or counted twice; sinks that
    only the first chunk has; a border within a window or a document."""
    model = build(**CASES[case])
    idx, targets = text()
    whole = model(idx, targets=targets, documents=documents)
    expected = gradients(model, 4 * whole)  # a power of two: the logits are float32, and rounded before it or behind
    for chunk_size in (1, 7, 25):
        chunks = ExactChunks(model, chunk_size)
        loss = chunks(idx, targets, documents)
        assert abs(loss - whole) < 1e-6 * whole
        for found, wanted in zip(gradients(model, 4 * loss), expected, strict=True):
            assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()
        with torch.no_grad():
            assert abs(chunks(idx, targets, documents) - whole) < 1e-6 * whole
    assert all(attn.kv_cache is None for attn in model.layers)


def test_no_chunk_whose_state_needs_a_gradient_is_read_as_a_whole_text(monkeypatch):
    """Catches: a first chunk that kernels on a GPU read, which leave a state without a gradient."""
    told = set()
    monkeypatch.setattr(linear, "text_kernels", lambda q, plan, _: told.add((plan.whole, torch.is_grad_enabled())))
    ExactChunks(build(**CASES["linear"]), 25)(*text())
    assert (True, False) in told and (True, True) not in told


@pytest.mark.parametrize("case", CASES)
def test_layers_that_compute_again_see_their_border(case):
    """Catches: a backward that computes a layer again without what the chunk saw before it."""
    model = build(**CASES[case])
    idx, targets = text()
    expected = gradients(model, 4 * model(idx, targets=targets))
    for n in (1, model.config.n_layer):
        recompute_blocks(model, n)
        found = gradients(model, 4 * ExactChunks(model, 7)(idx, targets))
        for x, wanted in zip(found, expected, strict=True):
            assert (x - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def test_what_waits_on_the_cpu_and_what_accumulates():
    """Catches: gradients that replace those of the batch before; an offloaded key on another device."""
    model = build(**CASES["sinks"])
    (idx, targets), chunks = text(), ExactChunks(model, 16, offload=True)
    expected = gradients(model, model(idx, targets=targets))
    loss = chunks(idx, targets)
    model.zero_grad()
    for _ in range(2):
        chunks(idx, targets).backward()
    for p, wanted in zip(model.parameters(), expected, strict=True):
        assert (p.grad - 2 * wanted).abs().max() <= 1e-12 * wanted.abs().max()
    assert loss.item() > 0


def test_a_model_that_has_generated_goes_on_to_train():
    """Catches: a cache's place that takes modules only, once a sample was written between two steps."""
    model, (idx, targets) = build(**CASES["window"]), text()
    expected = ExactChunks(model, 16)(idx, targets)
    model.set_kv_cache(2, T)
    model.clear_kv_cache()
    assert torch.equal(ExactChunks(model, 16)(idx, targets), expected)
    model.set_kv_cache(2, T)
    assert len(model.caches) == len(model.layers)


def test_dropout_draws_the_same_numbers_again(monkeypatch):
    """Catches: keys of one mask in the forward and of another in the backward."""
    model = build(**CASES["window"])
    add_lora(model, LoRAConfig(r=4, alpha=8, dropout=0.5))
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.3)
    idx, targets = text()
    seen: dict[tuple[int, bool], torch.Tensor] = {}
    run = ExactChunks.run

    def noted(self, idx, first, borders, losses=None):
        x = run(self, idx, first, borders, losses)
        seen[first, torch.is_grad_enabled()] = x.detach()
        return x

    monkeypatch.setattr(ExactChunks, "run", noted)
    torch.manual_seed(1)
    ExactChunks(model, 16)(idx, targets).backward()
    assert len(seen) == 5  # the last chunk is run once
    assert all(torch.equal(seen[first, False], seen[first, True]) for first in (0, 16))
    after = torch.rand(3)
    torch.manual_seed(1)
    ExactChunks(model, 16)(idx, targets)
    assert torch.equal(torch.rand(3), after)


def test_frozen_weights_and_frozen_models():
    """Catches: a gradient for a weight that is frozen; a model with nothing to train."""
    model = build(**CASES["pattern"]).requires_grad_(False)
    idx, targets = text()
    assert not ExactChunks(model, 16)(idx, targets).requires_grad
    model.transformer.h[1].requires_grad_(True)
    expected = gradients(model, model(idx, targets=targets))
    found = gradients(model, ExactChunks(model, 16)(idx, targets))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(found, expected, strict=True))
    assert model.lm_head.weight.grad is None


def test_memory_grows_by_a_window_a_chunk(monkeypatch):
    """Catches: all keys of a text that are kept, or pieces that stay when nobody needs them."""
    model, kept = build(attention="sliding", sliding_window_size=8), []
    keep, made = KeyStore.keep, KeyStore.made

    def count(store: KeyStore) -> int:
        return sum(x.nbytes for piece in store.pieces for x in piece.kv)

    monkeypatch.setattr(KeyStore, "keep", lambda s, *a: (keep(s, *a), kept.append(count(s)))[0])
    monkeypatch.setattr(KeyStore, "made", lambda s, *a: (made(s, *a), kept.append(count(s)))[0])
    idx, targets = text()
    ExactChunks(model, 16)(idx, targets)
    window = 8 * 2 * 2 * 2 * 2 * 8 * 8  # keys and values, B, G, D of 8, float64: for 8 positions
    assert max(kept) == window and kept[-1] == 0
    keys = 2 * model.config.n_query_groups * model.config.head_size * model.config.n_layer
    assert kept_bytes(model, T, 16, 4) == keys * (2 * 8 * 4 + 8 * 4)
    assert kept_bytes(model, 16, 16, 4) == 0


@pytest.mark.parametrize("again", [0, 2])
def test_a_chunk_holds_only_the_keys_that_it_hands_on(monkeypatch, again):
    """Catches: a part that is a view of all the chunk's keys, and keys that a layer makes once more in the backward."""
    model, borders, borders_of = build(attention="sliding", sliding_window_size=4), [], ExactChunks.borders
    recompute_blocks(model, again)
    monkeypatch.setattr(ExactChunks, "borders", lambda *a: (made := borders_of(*a), borders.extend(made))[0])
    copies, part_of = [], exact_chunks.part_of
    monkeypatch.setattr(exact_chunks, "part_of", lambda *a: (copies.append(a), part_of(*a))[1])
    idx, targets = text()
    ExactChunks(model, 16)(idx, targets)
    held = [[x.untyped_storage().nbytes() for pair in border.own for x in pair] for border in borders]
    window = 4 * 2 * 2 * 8 * 8  # B, G, D of 8, float64: for 4 positions
    layers = model.config.n_layer
    assert held == [[window] * 2] * 2 * layers + [[]] * layers + [[window] * 2] * 2 * layers  # none behind the last
    assert len(copies) == 2 * 4 * layers
    assert border_bytes(model, 16, 8) == 4 * 2 * layers * window / 2


def test_short_texts_share_a_chunk():
    """Catches: a chunk for each short text, or texts that together are more than a chunk."""
    units = cut_documents([3, 4, 20, 2, 5, 4, 9], 9)
    assert [(u.start, u.lengths) for u in units] == [(0, [3, 4]), (7, [20]), (27, [2, 5]), (34, [4]), (38, [9])]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' reads a token differently"),
        ({"s2_attention": True, "s2_group_size": 8}, "S2-Attn groups the tokens of a whole text in all 2 layers"),
        ({"attention": "full,own,own", "n_layer": 3}, "'own' attends in a way of its own in the layers 1, 2, of which"),
    ],
)
def test_what_cannot_be_cut_is_refused(fields, words, monkeypatch):
    """Catches: another text trained than was meant, and a mixer that nobody knows met in the middle of a step."""
    monkeypatch.setitem(
        VARIANTS, "own", VARIANTS["full"]._replace(mixer=lambda config, kind, layer: torch.nn.Identity())
    )
    with pytest.raises(ValueError, match=words):
        check_chunks(tiny_config(**fields))


def test_a_validation_reads_in_chunks():
    """Catches: a long text that is read whole where nothing is trained."""
    chunks = ExactChunks(build(**CASES["window"]), 16)
    outer = torch.nn.Module()
    outer.module = chunks
    assert reader(outer) is chunks and unwrapped(outer) is chunks.module and reader(chunks.module) is chunks.module


def test_random_state_is_that_of_the_device():
    state = exact_chunks.random_state(torch.device("cpu"))
    first = torch.rand(2)
    with exact_chunks.drawing_from(state, torch.device("cpu")):
        assert torch.equal(torch.rand(2), first)
