"""Speculative decoding: the text is the target's, whatever the draft proposes."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict

import pytest
import torch
from tiny import randomize, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from lit_swa import GPT, speculative
from lit_swa.adapter import AdapterConfig, add_adapter
from lit_swa.config import VARIANTS, Part
from lit_swa.cpu_decode import build_step
from lit_swa.generate import Sampler, Sampling, Session, Stats, draw, generate
from lit_swa.lora import LoRAConfig, add_lora
from lit_swa.speculative import (
    Lookup,
    ModelDraft,
    SelfDraft,
    SpeculativeStats,
    accept,
    int4_copy,
    make_draft,
    speculate,
    speculative_generate,
    streaming_copy,
)

ROLLING = {"attention": "sliding", "sliding_window_size": 7, "rolling_kv_cache": True}
VARIANTS_OF_TARGETS = {
    "full": {},
    "rolling": ROLLING,
    "streaming": {"attention": "streaming", "sliding_window_size": 7, "n_sink_tokens": 3},
    "dual_chunk": {"attention": "dual_chunk", "dual_chunk_pretraining_length": 24},
    "mixed": ROLLING | {"attention": "sliding,full"},
    "linear": {"attention": "linear", "linear_window": 5, "linear_sinks": 2, "linear_gate": True},
}
DRAFTS = ("model", "lookup", "self-int4", "streaming", "streaming-int4")


def noisy(model: GPT, noise: float) -> GPT:
    """A model that often agrees with another one."""
    other = GPT(model.config).eval()
    with torch.no_grad():
        for p, q in zip(other.parameters(), model.parameters(), strict=True):
            p.copy_(q + noise * torch.randn_like(q))
    return other


def build_draft(kind: str, model: GPT, batch_size: int, k: int) -> speculative.Draft:
    if kind == "model":
        return ModelDraft(Session(noisy(model, 0.01), batch_size, lookahead=k))
    return make_draft(kind, model, window=9)


def run(model: GPT, prompts: list[list[int]], draft: speculative.Draft, k: int, **arguments) -> list[list[int]]:
    texts = [[] for _ in prompts]
    session = Session(model, len(prompts), lookahead=k)
    for new in speculate(session, prompts, draft, speculative_k=k, **arguments):
        for text, tokens in zip(texts, new, strict=True):
            text += tokens
    return texts


def random_prompts(*lengths: int) -> list[list[int]]:
    return [torch.randint(0, 97, (n,)).tolist() for n in lengths]


# ---------------------------------------------------------------------------------------------------------- greedy text


def drafts_of(fields: dict) -> list[str]:
    return [kind for kind in DRAFTS if "streaming" not in kind or "full" in fields.get("attention", "full")]


def check_greedy(model: GPT, kind: str, batch_size: int, k: int, penalty: float, stops: bool) -> SpeculativeStats:
    """Several texts, of which some meet a stop in the middle, are those of plain decoding, token by token."""
    prompts, sampling = random_prompts(20, 3, 11)[:batch_size], Sampling(repetition_penalty=penalty)
    expected, stop_tokens = [list(generate(model, ids, 28, sampling=sampling)) for ids in prompts], []
    if stops:
        stop_tokens = [expected[0][12:14], expected[-1][19]]
        expected = [list(generate(model, ids, 28, sampling=sampling, stop_tokens=stop_tokens)) for ids in prompts]
    draft, stats = build_draft(kind, model, batch_size, k), SpeculativeStats()
    arguments = {"max_new_tokens": 28, "sampling": sampling, "stop_tokens": stop_tokens}
    assert run(model, prompts, draft, k, stats=stats, **arguments) == expected
    return stats


FEW = {name: ("model", "self-int4") for name in VARIANTS_OF_TARGETS} | {"full": DRAFTS, "mixed": ("model", "streaming")}


@pytest.mark.parametrize("name", VARIANTS_OF_TARGETS)
def test_greedy_text_is_the_targets(tiny_model, name):
    """Catches: keys of refused tokens that are seen later, rows that advance by another row's number, a lookahead that
    is too short, a stop or a penalty that looks at refused tokens."""
    model = tiny_model(head_size=16, **VARIANTS_OF_TARGETS[name])
    for n, kind in enumerate(FEW[name]):
        stats = check_greedy(model, kind, batch_size=3, k=(3, 6, 1, 4, 2)[n], penalty=(1.0, 1.3)[n % 2], stops=n == 0)
        if kind in ("model", "self-int4"):
            assert 0 < stats.accepted < stats.proposed  # both ways were taken


GRID = [
    (name, kind, batch_size, k, penalty, stops)
    for name, fields in VARIANTS_OF_TARGETS.items()
    for kind in drafts_of(fields)
    for batch_size, k, penalty, stops in itertools.product((1, 3), (1, 3, 6), (1.0, 1.3), (False, True))
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "batch_size", "k", "penalty", "stops"), GRID)
def test_greedy_text_is_the_targets_in_all_cases(tiny_model, name, kind, batch_size, k, penalty, stops):
    """Catches: a draft, a window, a penalty and an end of the text that do not go together."""
    assert len(GRID) >= 200
    check_greedy(tiny_model(head_size=16, **VARIANTS_OF_TARGETS[name]), kind, batch_size, k, penalty, stops)


def test_a_draft_that_is_the_target_is_always_right(tiny_model):
    """Catches: a draft whose keys are at other positions than the target's, which would only be slow."""
    for fields in VARIANTS_OF_TARGETS.values():
        model, stats = tiny_model(**fields), SpeculativeStats()
        for draft in (ModelDraft(Session(model.__class__(model.config).eval(), 2, lookahead=3)), None):
            if draft is None:
                draft = SelfDraft(speculative.share_weights(model))
            else:
                draft.model.load_state_dict(model.state_dict())
            stats = SpeculativeStats()
            run(model, random_prompts(20, 5), draft, 3, max_new_tokens=41, stats=stats)
            assert (stats.rounds, stats.accepted) == (10, 60)


def test_as_many_tokens_as_plain_decoding_takes_can_be_warmed_up_for(tiny_model):
    """Catches: a longest text, prompt included, that is taken for a number of new tokens that does not fit."""
    model = tiny_model(n_layer=1, **ROLLING)
    session, draft = Session(model, lookahead=3), make_draft("lookup", model, window=9)
    speculative.warm_up(session, draft, 3, tokens=10**9 + 20)
    assert list(speculative_generate(model, [5, 6], draft=draft, speculative_k=3, session=session, max_new_tokens=3))


def test_vocabularies_may_be_padded_differently(tiny_model):
    """Catches: a token that only one of the models has, and a q of another length than p."""
    small = tiny_model(n_layer=1)
    for size in (90, 104):
        model, draft = tiny_model(n_layer=1, vocab_size=size), ModelDraft(Session(small, lookahead=4), min(size, 97))
        prompt = [i % 90 for i in random_prompts(20)[0]] + [size - 1]
        new = list(speculative_generate(model, prompt, draft=draft, max_new_tokens=20))
        assert new == list(generate(model, prompt, 20))
        sampling = Sampling(temperature=1.0, seed=1)
        assert len(list(speculative_generate(model, prompt, draft=draft, max_new_tokens=20, sampling=sampling))) == 20


def test_the_text_ends_with_the_context(tiny_model):
    """Catches: tokens proposed beyond the target's context or the draft's, or fewer than plain decoding gives."""
    model = tiny_model(block_size=48)
    small = GPT(tiny_config(block_size=40)).eval()
    small.load_state_dict(model.state_dict())
    prompts = random_prompts(20, 30)
    expected, plain = [list(generate(model, ids, 100)) for ids in prompts], Stats()
    assert [len(ids) for ids in expected] == [29, 19]
    list(generate(model, prompts[0], 100, stats=plain))
    for draft in (SelfDraft(speculative.share_weights(model)), ModelDraft(Session(small, 2, lookahead=4))):
        assert run(model, prompts, draft, 4, max_new_tokens=100) == expected
    stats = SpeculativeStats()
    assert list(speculative_generate(model, prompts[0], draft=Lookup(), max_new_tokens=100, stats=stats)) == expected[0]
    assert stats.cut == plain.cut == "The context of 48 tokens is full." and stats.new_tokens == 29
    assert list(speculative_generate(model, prompts[0], draft=Lookup(), max_new_tokens=0)) == []
    asked = {"should_stop": itertools.chain([False], itertools.repeat(True)).__next__, "stop_tokens": [expected[0][:2]]}
    assert (
        list(speculative_generate(model, prompts[0], draft=Lookup(), **asked)) == expected[0][:1]
    )  # no stop after all


def test_a_session_goes_on_with_what_it_holds(tiny_model):
    """Catches: refused tokens that count as part of the text, and a cache of which another session took possession."""
    model, draft = tiny_model(), Lookup(shortest=1)
    session, ids = Session(model, lookahead=4), random_prompts(20)[0]
    first = list(speculative_generate(model, ids, draft=draft, session=session, max_new_tokens=20))
    assert session.tokens == [ids + first[:-1]]
    stats, ids = SpeculativeStats(), ids + first + [1, 2, 3]
    second = list(speculative_generate(model, ids, draft=draft, session=session, max_new_tokens=20, stats=stats))
    assert second == list(generate(model, ids, 20)) and stats.cached_tokens == 39
    tokens = speculative_generate(model, ids, draft=draft, session=session, max_new_tokens=20)
    next(tokens)
    Session(model).feed([1, 2, 3])
    with pytest.raises(ValueError, match="Another session has used"):
        list(tokens)


# --------------------------------------------------------------------------------------------------------- sampled text

SAMPLINGS = {
    "temperature": Sampling(temperature=0.8, seed=1),
    "top_k": Sampling(temperature=1.2, top_k=3, seed=2),
    "top_p": Sampling(temperature=1.0, top_p=0.8, seed=3),
    "min_p": Sampling(temperature=1.5, min_p=0.2, seed=4),
    "penalty": Sampling(temperature=1.0, repetition_penalty=1.5, seed=5),
}
# The seeds are fixed, so a test passes always or never. One right sampler in ten thousand is below this; a wrong one,
# such as a residual that is p instead of max(p - q, 0), is below 1e-30.
LEAST_P = 1e-4


def p_value(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's chi-square test of counts against what is expected; cells of fewer than 5 are joined."""
    few = expected < 5
    assert counts[expected == 0].sum() == 0  # what must not happen did not
    counts = torch.cat([counts[~few].double(), counts[few].sum(0, keepdim=True).double()])
    expected = torch.cat([expected[~few].double(), expected[few].sum(0, keepdim=True).double()])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((counts.numel() - 1) / 2, dtype=torch.double)
    return float(torch.special.gammaincc(freedom, statistic / 2)) if counts.numel() > 1 else 1.0


@pytest.mark.parametrize("name", SAMPLINGS)
def test_sampled_texts_have_the_targets_distribution(name):
    """Catches: a wrong residual or acceptance, a draft whose q is not what it drew from, and a penalty that does not
    count the proposed tokens before a place."""
    sampling, vocab, n, k = SAMPLINGS[name], 5, 3000, 2
    model = GPT(tiny_config(n_layer=1, n_embd=24, head_size=4, vocab_size=vocab)).eval()
    randomize(model)
    draft, stats = ModelDraft(Session(noisy(model, 0.1), n, lookahead=k)), SpeculativeStats()
    prompt = [1, 2]
    texts = run(model, [prompt] * n, draft, k, max_new_tokens=4, sampling=sampling, stats=stats)
    assert 0.2 < stats.accepted / stats.proposed < 0.95
    places = torch.tensor([5**3, 5**2, 5, 1])
    counts = (torch.tensor(texts) * places).sum(1).bincount(minlength=vocab**4)
    likely = torch.ones(1)
    for length in range(4):  # of all continuations, by plain calls without a cache
        ends = torch.tensor(list(itertools.product(range(vocab), repeat=length)), dtype=torch.long)
        idx = torch.cat([torch.tensor([prompt]).expand(vocab**length, -1), ends.view(vocab**length, length)], dim=1)
        seen = torch.zeros(vocab**length, vocab, dtype=torch.bool).scatter(1, idx, True)
        with torch.no_grad():
            likely = (likely[:, None] * sampling.distribution(model(idx)[:, -1], seen)).flatten()
    assert p_value(counts, likely * n) > LEAST_P


def test_a_proposal_that_was_not_drawn_keeps_the_distribution():
    """Catches: a look-up that is accepted as if it had been drawn from p."""
    n, k, vocab = 20000, 2, 7
    logits = torch.randn(1, k + 1, vocab).expand(n, -1, -1)
    sampler = Sampler(Sampling(temperature=1.0, seed=0), [[0]] * n, vocab, "cpu")
    p = logits[0].softmax(-1)
    tokens = p[:k].argsort(dim=-1, descending=True)[:, 1].expand(n, k)  # the second likeliest
    accepted, following = accept(logits, tokens, None, sampler)
    new = torch.nn.functional.pad(tokens, (0, 1)).scatter(1, accepted, following)
    for place in range(k + 1):
        there = new[accepted[:, 0] >= place, place]
        assert p_value(there.bincount(minlength=vocab), p[place] * len(there)) > LEAST_P


def test_p_equal_to_q_accepts_everything():
    """Catches: an empty residual, from which nothing can be drawn."""
    logits = torch.randn(500, 3, 11)
    sampler = Sampler(Sampling(temperature=1.0, seed=0), [[0]] * 500, 11, "cpu")
    q = sampler.sampling.distribution(logits[:, :2].flatten(0, 1)).view(500, 2, 11)
    tokens = torch.cat([draw(q[:, i], sampler.generator) for i in range(2)], dim=1)
    accepted, following = accept(logits, tokens, q, sampler)
    assert bool((accepted == 2).all()) and following.shape == (500, 1)
    logits[..., 0] = -torch.inf
    accepted, following = accept(logits, tokens.clamp(min=1), 1.5 * q, sampler)  # p < q everywhere, as by rounding
    assert bool((accepted == 0).any()) and bool((following > 0).all())  # token 0 is what a draw from nothing gives


# --------------------------------------------------------------------------------------------------------------- drafts


LOCAL_BASE = {
    "attention": "sliding,full",
    "sliding_window_size": 50,
    "rope_local_base_freq": 50.0,
    "positions": "rope,none",
}


@pytest.mark.parametrize("fields", [{}, LOCAL_BASE], ids=["full", "mixed"])
@pytest.mark.parametrize(("batch_size", "compiled"), [(1, False), (2, False), (1, True), (2, True)])
@torch.inference_mode()
def test_the_streaming_draft_sees_sinks_and_a_window_of_the_targets_keys(tiny_model, batch_size, compiled, fields):
    """Catches: a wrong mask or rotation, keys of its own instead of the target's, and a read of what is not seen."""
    model, window, n_sinks, T = tiny_model(n_layer=3, **fields), 6, 2, 40

    def only_the_last(q_pos, k_pos, config):  # all others read in full, so that the keys are the target's
        return (q_pos < T - 1) | (q_pos - k_pos < window) | (k_pos < n_sinks)

    idx = torch.randint(0, 97, (batch_size, T))
    oracle = speculative.share_modules(model)
    replaced = [i for i, attn in enumerate(oracle.layers) if attn.mixer.variant == "full"]
    for attn in (oracle.layers[i] for i in replaced):
        attn.mixer.row = VARIANTS["full"]._replace(parts=(Part(only_the_last),))
    expected = oracle(idx)[:, -1]
    session = Session(model, batch_size)
    session.reserve(T + 8)
    session.feed(idx[:, :-1])
    twin = streaming_copy(model, window, n_sinks)
    draft = SelfDraft(twin, build_step(twin) if compiled else None)
    draft.start(session, idx.tolist(), T)
    for attn in (model.layers[i] for i in replaced):
        attn.kv_cache.k[:, :, n_sinks : T - window - 1] = torch.nan
        attn.kv_cache.v[:, :, n_sinks : T - window - 1] = torch.nan
    pos = torch.full((batch_size, 1), T - 1)
    logits = draft.feed(idx[:, -1:], pos if batch_size > 1 else pos[0])[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_self_draft_takes_no_memory_for_weights_or_keys(tiny_model):
    """Catches: a copy of the weights, or caches of its own."""
    model = tiny_model()
    draft = make_draft("streaming", model, window=8)
    list(speculative_generate(model, [1, 2, 3], draft=draft, max_new_tokens=4))
    held = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert {p.data_ptr() for p in draft.model.parameters()} <= held
    assert {b.data_ptr() for cache in draft.model.caches for b in (cache.k, cache.v, cache.slots.pos)} <= held
    shared = {t.data_ptr() for t in int4_copy(model).parameters()}
    assert model.transformer.wte.weight.data_ptr() in shared and model.layers[0].qkv.weight.data_ptr() not in shared


@pytest.mark.parametrize("inject", [lambda model: add_lora(model, LoRAConfig()), lambda model: add_adapter(model, V2)])
def test_a_self_draft_has_the_targets_lora_or_adapter(tiny_model, inject):
    """Catches: a draft of the base model, whose tokens are refused."""
    model = tiny_model()
    inject(model)
    for name, p in model.named_parameters():
        if "lora" in name or "adapter" in name:
            torch.nn.init.normal_(p, std=0.3)
    prompt, expected = random_prompts(20)[0], None
    for kind in ("streaming", "self-int4"):
        draft, stats = make_draft(kind, model, window=99), SpeculativeStats()
        new = list(speculative_generate(model, prompt, draft=draft, max_new_tokens=21, stats=stats))
        expected = expected or list(generate(model, prompt, 21))
        assert new == expected and (stats.accepted == stats.proposed or kind == "self-int4")
        injected = [n for n, _ in draft.model.named_modules() if n.endswith(("lora", "adapter"))]
        assert injected == [n for n, _ in model.named_modules() if n.endswith(("lora", "adapter"))]


V2 = AdapterConfig(version=2, start_layer=0)


def longest_match(text: list[int], longest: int, shortest: int) -> int | None:
    """Where what followed the longest suffix that occurred before begins: the newest occurrence, by trying all."""
    for n in range(longest, shortest - 1, -1):
        for start in range(len(text) - 1, n - 1, -1):
            if text[start - n : start] == text[-n:]:
                return start
    return None


def test_the_look_up_finds_the_longest_suffix():
    """Catches: a suffix that finds itself, a shorter or an older match, a proposal beyond the text's end."""
    for longest, shortest in ((1, 1), (3, 1), (4, 2)):
        text = torch.randint(0, 3, (60,)).tolist()
        draft = Lookup(longest, shortest)
        draft.start(None, [text[:2]], 0)
        for n in range(2, 60):
            start = longest_match(text[:n], longest, shortest)
            expected = None if start is None else ((text[start:n]) * 5)[:5]
            assert draft.look_up(0, 5) == expected, (n, start)
            draft.extend([[text[n]]])


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a value, and results whose shape depends on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.count, self.off = 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not self.off and func.__name__.split(".")[0].rstrip("_2") in self.NAMES
        return func(*args, **(kwargs or {}))

    def unseen(self, model: GPT, most_tokens: int) -> Callable:
        """A decode step: what happens in it is not counted, since a compiled step never looks at a value."""

        def step(idx: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
            self.off = True
            logits = model(idx, input_pos)
            self.off = False
            return logits

        step.most_tokens = most_tokens
        return step


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    mode, tolist = Reads(), torch.Tensor.tolist

    def counted(tensor: torch.Tensor):
        mode.count += not mode.off
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    with mode:
        yield mode


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9, repetition_penalty=1.2)])
def test_the_host_waits_once_in_a_round(tiny_model, reads, sampling):
    """Catches: a value that is looked at between two steps, where a GPU would fall idle."""
    model, k = tiny_model(), 3
    copied = noisy(model, 0.02)
    own = Session(copied, 2, lookahead=k, decode=reads.unseen(copied, 2))
    streaming = streaming_copy(model, window=8)
    for draft in (ModelDraft(own), SelfDraft(streaming, reads.unseen(streaming, 1)), Lookup(shortest=1)):
        session = Session(model, 2, lookahead=k, decode=reads.unseen(model, k + 1))
        arguments = {"speculative_k": k, "max_new_tokens": 20, "sampling": sampling}
        rounds, counts = speculate(session, random_prompts(9, 9), draft, **arguments), []
        for _ in itertools.islice(rounds, 6):
            counts.append(reads.count)
        assert [b - a for a, b in itertools.pairwise(counts)] == [1] * 5


# ------------------------------------------------------------------------------------------------------------ bad input


def test_drafts_and_targets_that_do_not_fit_are_refused(tiny_model):
    """Catches: a crash, or silence, where a sentence says what to do."""
    model = tiny_model()
    other = tiny_model(vocab_size=90)
    refused: list[tuple[str, Callable]] = [
        ("vocabulary has 90 tokens and the target's 97", lambda: start(model, ModelDraft(Session(other, lookahead=4)))),
        ("draft's context 8", lambda: start(model, ModelDraft(Session(tiny_model(block_size=8), lookahead=4)))),
        ("attention is 'sliding'|model's is 'sliding'", lambda: make_draft("streaming", tiny_model(**ROLLING), 9)),
        ("depends on the text's length", lambda: make_draft("streaming", tiny_model(rope_scaling=DYNAMIC), 9)),
        ("no draft called 'medusa'", lambda: make_draft("medusa", model, 9)),
        ("draft_window=0", lambda: make_draft("streaming", model, 0)),
        ("speculative_k=0", lambda: start(model, Lookup(), k=0)),
        ("lookahead of 4: give", lambda: speculate(Session(model, lookahead=4), [[1]], Lookup(), speculative_k=5)),
        ("prompt is empty", lambda: speculate(Session(model, lookahead=4), [[]], Lookup())),
        ("token id 97", lambda: speculate(Session(model, lookahead=4), [[97]], Lookup())),
    ]
    for sentence, call in refused:
        with pytest.raises(ValueError, match=sentence):
            call()


DYNAMIC = {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}


def start(model: GPT, draft: speculative.Draft, k: int = 4) -> Iterator[int]:
    return speculative_generate(model, list(range(9)), draft=draft, speculative_k=k)


def test_no_finite_logits_end_in_a_sentence(tiny_model):
    """Catches: NaN that is accepted as a token."""
    model = tiny_model()
    list(speculative_generate(model, [1, 2], draft=Lookup(), max_new_tokens=5))
    model.transformer.ln_f.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="no finite numbers"):
        list(speculative_generate(model, [1, 2], draft=Lookup(), max_new_tokens=5))


# ----------------------------------------------------------------------------------------------------------- the script


def test_the_script_prints_what_base_prints(tiny_checkpoint, run_script, tmp_path):
    """Catches: another text on stdout, statistics that are missing, two drafts, and a draft with another tokenizer."""
    import json
    import shutil

    arguments = ["--checkpoint_dir", tiny_checkpoint, "--prompt", "the quick brown", "--max_new_tokens", 30]
    arguments += ["--temperature", 0, "--repetition_penalty", 1.1]
    expected = run_script("generate/base.py", *arguments)[1]
    script = "generate/speculative.py"
    for draft in (["--draft", "streaming", "--draft_window", 8], ["--draft", "streaming-int4", "--compile", "true"], [],
                  ["--draft_checkpoint_dir", tiny_checkpoint, "--speculative_k", 2]):  # fmt: skip
        code, out, err = run_script(script, *arguments, *draft)
        assert (code, out) == (0, expected)
        assert "accepted" in err and "tokens a round" in err and "of the time" in err
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    names = list(tokenizer["model"]["vocab"])
    vocab = tokenizer["model"]["vocab"]
    vocab[names[10]], vocab[names[11]] = vocab[names[11]], vocab[names[10]]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    for wrong, sentence in (
        (["--draft_checkpoint_dir", other], "tokenizer is another"),
        (["--draft", "lookup", "--draft_checkpoint_dir", tiny_checkpoint], "two drafts"),
        (["--draft_checkpoint_dir", tmp_path / "nowhere"], "nowhere"),
        (["--speculative_k", 0], "speculative_k"),
        (["--draft", "medusa"], "medusa"),
    ):
        code, out, err = run_script(script, *arguments, *wrong)
        assert code == 2 and out == "" and sentence in err and "Traceback" not in err


def test_statistics_count_tokens_and_rounds(tiny_model):
    """Catches: a rate of tokens that counts rounds, and a share of time without a draft."""
    model, stats, plain = tiny_model(), SpeculativeStats(), Stats()
    ids = random_prompts(9)[0]
    list(generate(model, ids, 21, stats=plain))
    list(speculative_generate(model, ids, draft=SelfDraft(speculative.share_weights(model)), max_new_tokens=21,
                              stats=stats))  # fmt: skip
    for name in ("prompt_tokens", "new_tokens", "decode_steps", "cut"):
        assert asdict(stats)[name] == asdict(plain)[name]
    assert (stats.rounds, stats.proposed, stats.accepted, stats.draft_calls) == (4, 16, 16, 16)
    assert 0 < stats.draft_seconds < stats.decode_seconds
    assert "accepted 16 of 16 (100%) | 5.00 tokens a round, 4 rounds" in stats.line(model)


def test_the_benchmark_forces_the_acceptance(tiny_checkpoint, run_script, tmp_path):
    """Catches: a speed-up from tokens that were not accepted, and rounds that do not end at the first refused token."""
    import json

    output = tmp_path / "speed.json"
    arguments = ["--checkpoint_dir", tiny_checkpoint, "--context", 64, "--batch_size", 2, "--steps", 4, "--repeats", 1]
    for draft, acceptance, expected in (("streaming", 1, 4.0), ("self-int4", 0, 1.0), ("lookup", 1, 4.0)):
        forced = ["--draft", draft, "--acceptance", acceptance, "--speculative_k", "[3]", "--output", output]
        code, out, _ = run_script("scripts/benchmark_speculative.py", *arguments, *forced)
        row = json.loads(output.read_text())["rows"][0]
        assert code == 0 and row["counted_a_round"] == row["tokens_a_round"] == expected
        assert row["ideal"] == pytest.approx(expected / (3 * row["c"] + 1))
        assert row["speed_up"] == pytest.approx(row["tokens_per_second"] / row["plain_tokens_per_second"])
        assert f"{row['share_of_ideal']:.0%} of the ideal" in out


def test_the_table_of_acceptance_counts_what_is_judged(tiny_checkpoint, run_script, tmp_path):
    """Catches: tokens behind a refused one that count as refused, and drafts that read another prompt."""
    import json

    text, output = tmp_path / "text.txt", tmp_path / "table.json"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    code, out, _ = run_script(
        "scripts/evaluate_drafts.py", "--checkpoint_dir", tiny_checkpoint, "--texts", f"[{text}]", "--contexts", "[50]",
        "--max_new_tokens", 21, "--draft_windows", "[4, 99]", "--output", output,
    )  # fmt: skip
    rows = {row["draft"]: row for row in json.loads(output.read_text())["rows"]}
    assert code == 0 and len(rows) == 6
    assert rows["streaming 99"]["acceptance"] == 1.0 and rows["streaming 99"]["tokens_a_round"] == 5.0
    for row in rows.values():
        assert row["accepted"] <= row["judged"] <= row["accepted"] + row["rounds"]
    assert "acceptance 1.00 (16 of 16) | 5.00 tokens a round, 4 rounds" in out
