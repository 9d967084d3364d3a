"""Prefill, decoding, sampling and stops: equal to the plain loop, and to transformers where it does the same."""

import math

import pytest
import torch

from lit_swa import GPT
from lit_swa.checkpoint import load_model
from lit_swa.generate import (
    Sampler,
    Sampling,
    Session,
    Stats,
    StopFinder,
    describe_window,
    draw,
    generate,
    generate_text,
    prefill_chunk,
)
from lit_swa.tokenizer import Tokenizer


def plain_greedy(model, ids: list[int], n: int) -> list[int]:
    """The loop that cannot be wrong: no cache, everything again for each token."""
    ids = list(ids)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-n:]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attention": "sliding", "sliding_window_size": 5, "rolling_kv_cache": True},
        {"attention": "sliding,full", "sliding_window_size": 5, "rolling_kv_cache": True},
    ],
)
def test_greedy_generation_equals_the_loop_without_a_cache(tiny_model, fields):
    """Catches: a position that is off by one between prefill and decode."""
    model = tiny_model(**fields)
    for prompt in ([3], [5, 6, 7], list(range(30))):
        assert list(generate(model, prompt, max_new_tokens=20)) == plain_greedy(model, prompt, 20)
    assert list(generate(model, torch.tensor([[5, 6, 7]]), max_new_tokens=4)) == plain_greedy(model, [5, 6, 7], 4)
    assert list(generate(model, [1], max_new_tokens=0)) == []


def test_the_chunk_follows_the_memory(tiny_model, monkeypatch):
    """Catches: a chunk that ignores how much memory there is, or the batch."""
    model, sizes = tiny_model(), {}
    for memory in (0, 2**24, 2**26, 2**40):
        monkeypatch.setattr("lit_swa.generate.free_memory", lambda device, memory=memory: memory)
        sizes[memory] = [prefill_chunk(model, batch_size) for batch_size in (1, 8)]
    single = [one for one, _ in sizes.values()]
    assert single == sorted(single) and single[0] == 128 and single[-1] == 4096 and len(set(single)) > 2
    assert sizes[2**26][1] < sizes[2**26][0]


# --------------------------------------------------------------------------------------------------------------- stops


@pytest.mark.parametrize(
    "stops, stream, passed",
    [
        (
            [[1, 2]],
            [1, 1, 2, 9],
            [1],
        ),  # the second 1 begins the stop: a finder that starts over after a mismatch misses it
        ([[1, 2]], [1, 3, 1], [1, 3, 1]),
        ([[1, 1, 2]], [1, 1, 1, 2], [1]),
        ([[4], [1, 2]], [7, 1, 4, 2], [7, 1]),
        ([[1, 2, 3], [2]], [1, 2, 3], [1]),
        ([], [1, 2], [1, 2]),
        ([[]], [1, 2], [1, 2]),
    ],
)
def test_a_stop_is_found_wherever_it_begins(stops, stream, passed):
    """Catches: stops that overlap their own beginning, held-back tokens that are lost at the end."""
    finder, out = StopFinder(stops, empty=[]), []
    for token in stream:
        released, found = finder.push([token])
        out += released
        if found:
            break
    assert out + finder.held == passed


def test_stop_strings_are_found_across_pieces():
    """Catches: a stop that the tokens cut in two."""
    finder, out = StopFinder(["\n\nQ:", "END"], empty=""), ""
    for piece in ["one\n", "two\n", "\nQ", ": three"]:
        released, found = finder.push(piece)
        out += released
    assert found and out == "one\ntwo"


def test_stop_tokens_end_the_text_and_are_not_part_of_it(tiny_model):
    """Catches: a stop that is yielded, or found only at the beginning of a sequence."""
    model = tiny_model()
    text = plain_greedy(model, [1, 2], 24)
    at = next(i for i in range(4, 20) if text[i : i + 2] not in [text[j : j + 2] for j in range(i)])
    stop = text[at : at + 2]
    assert list(generate(model, [1, 2], max_new_tokens=24, stop_tokens=[stop])) == text[:at]
    single = text[at]
    assert list(generate(model, [1, 2], max_new_tokens=24, stop_tokens=(single,))) == text[: text.index(single)]
    assert (
        list(generate(model, [1, 2], max_new_tokens=24, stop_tokens=[[*text[-1:], 96, 95]])) == text
    )  # held back, then released


# ------------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 2.0, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 1.0, "top_p": 1e-6},
        {"temperature": 1.0, "top_k": 500},
    ],
)
def test_sampling_draws_from_the_distribution_of_transformers(arguments):
    """Catches: filters in another order, a border token kept or cut."""
    processors = pytest.importorskip("transformers").generation.logits_process
    logits = torch.randn(4, 60) * 3
    chain = [processors.TemperatureLogitsWarper(arguments["temperature"])]
    if "top_k" in arguments:
        chain.append(processors.TopKLogitsWarper(arguments["top_k"]))
    if "top_p" in arguments:
        chain.append(processors.TopPLogitsWarper(arguments["top_p"]))
    if "min_p" in arguments:
        chain.append(processors.MinPLogitsWarper(arguments["min_p"]))
    expected = logits
    for warp in chain:
        expected = warp(None, expected)
    p = Sampling(**arguments).distribution(logits)
    torch.testing.assert_close(p, expected.softmax(-1), rtol=1e-5, atol=1e-7)


def test_the_repetition_penalty_equals_transformers():
    """Catches: negative logits that become likelier."""
    processors = pytest.importorskip("transformers").generation.logits_process
    logits, ids = torch.randn(1, 30), torch.tensor([[3, 3, 7, 29]])
    seen = torch.zeros(1, 30, dtype=torch.bool).scatter_(1, ids, True)
    expected = processors.RepetitionPenaltyLogitsProcessor(1.4)(ids, logits.clone()).softmax(-1)
    torch.testing.assert_close(Sampling(1.0, repetition_penalty=1.4).distribution(logits, seen), expected)


def test_drawn_tokens_follow_their_probabilities():
    """Catches: a sampler that is biased. 20,000 draws: each frequency within 5 standard deviations."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -20.0]])
    p, n = logits.softmax(-1)[0], 20_000
    draws = draw(Sampling(temperature=1.0).distribution(logits.expand(n, -1)), torch.Generator().manual_seed(0))
    frequency = torch.bincount(draws.flatten(), minlength=5) / n
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-6).all()


@pytest.mark.parametrize("spread", [5.0, 0.1])
def test_top_p_is_the_same_however_many_tokens_are_ordered(monkeypatch, spread):
    """Catches: a nucleus that ends with the tokens that were ordered first, which a flat distribution goes beyond."""
    logits, results = torch.randn(3, 3000) * torch.tensor([[spread], [5.0], [5.0]]), []
    for ordered_first in ((64,), (8, 64), ()):
        monkeypatch.setattr("lit_swa.generate.LIKELIEST", ordered_first)
        results.append(Sampling(temperature=1.0, top_p=0.9).distribution(logits))
    assert all(torch.equal(results[0], result) for result in results)
    kept = results[0].count_nonzero(dim=-1)
    assert kept[1] < 64 and (kept[0] > 1000) == (spread < 1)


def test_a_distribution_is_pure_and_knows_no_other_sequence():
    """Catches: a filter that takes its threshold from another sequence, and logits or seen tokens that are changed."""
    logits, seen = torch.randn(5, 60) * 3, torch.rand(5, 60) < 0.3
    before = logits.clone(), seen.clone()
    for sampling in (Sampling(), Sampling(0.8, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.3, seed=1)):
        p = sampling.distribution(logits, seen)
        rows = [sampling.distribution(logits[i : i + 1], seen[i : i + 1]) for i in range(5)]
        assert torch.equal(p, torch.cat(rows)) and torch.equal(p, sampling.distribution(logits, seen))
        assert torch.equal(logits, before[0]) and torch.equal(seen, before[1])
        torch.testing.assert_close(p.sum(-1), torch.ones(5))


def test_a_greedy_distribution_is_what_greedy_decoding_takes():
    """Catches: a draw from the greedy distribution that is another token than the argmax that decoding computes."""
    logits, sampling = torch.randn(1, 60), Sampling(repetition_penalty=1.5)
    sampler = Sampler(sampling, [[3, 4]], 60, "cpu")
    for _ in range(20):
        expected = draw(sampling.distribution(logits, sampler.seen))
        assert torch.equal(sampler.choose(logits), expected) and sampler.seen[0, expected]


def test_a_seed_repeats_a_text_and_another_changes_it(tiny_model):
    """Catches: sampling from the global generator, which other code moves."""
    model = tiny_model()

    def draw(seed):
        return list(generate(model, [1], max_new_tokens=16, temperature=1.0, seed=seed))

    assert draw(7) == draw(7) != draw(8)


def test_the_penalty_counts_prompt_and_new_tokens(tiny_model):
    """Catches: a penalty that forgets the prompt or what was generated. A huge one repeats nothing."""
    tokens = list(generate(tiny_model(), [3, 4, 5], max_new_tokens=40, repetition_penalty=1000.0))
    assert len({*tokens, 3, 4, 5}) == 43


def test_rows_of_padding_are_never_chosen(tiny_model):
    """Catches: an id beyond the tokenizer's vocabulary."""
    model = tiny_model(vocab_size=50, padded_vocab_size=97)
    model.lm_head.weight.data[50:] *= 100
    assert max(generate(model, [1], max_new_tokens=30)) < 50
    assert max(generate(model, [1], max_new_tokens=30, temperature=2.0, seed=0, repetition_penalty=1.2)) < 50


# -------------------------------------------------------------------------------------------------- cache between calls


def fed_tokens(model):
    """Counts the tokens that go through a model."""
    counts = []
    model.register_forward_pre_hook(lambda module, args: counts.append(args[0].size(1)))
    return counts


@pytest.mark.parametrize("fields", [{}, {"attention": "sliding", "sliding_window_size": 6, "rolling_kv_cache": True}])
def test_only_new_tokens_are_fed_when_a_conversation_goes_on(tiny_model, fields):
    """Catches: a cache that is thrown away between turns, or kept where the text is another one."""
    model = tiny_model(block_size=512, **fields)
    session = Session(model, lookahead=4)
    session.reserve(8)  # it will be outgrown
    text = list(range(10, 40))
    counts = fed_tokens(model)
    answer = list(generate(model, text, max_new_tokens=5, session=session))
    assert answer == plain_greedy(model, text, 5)
    assert session.tokens == [text + answer[:-1]]  # the last token was chosen, not fed
    text = text + answer + [50, 51, 52]
    counts.clear()
    stats = Stats()
    answer = list(generate(model, text, max_new_tokens=5, session=session, stats=stats))
    assert counts == [4, 1, 1, 1, 1] and stats.cached_tokens == len(text) - 4
    assert answer == plain_greedy(model, text, 5)
    text = text[:-2] + [60, 61, 62]  # what was fed is taken back: a rolling cache keeps no more than its lookahead of 4
    counts.clear()
    assert list(generate(model, text, max_new_tokens=2, session=session)) == plain_greedy(model, text, 2)
    assert counts[0] == (len(text) if fields else 3)


def test_a_stopped_generation_leaves_a_session_that_can_go_on(tiny_model):
    """Catches: an interruption after which the cache and the list of its tokens differ."""
    model = tiny_model()
    session = Session(model)
    steps = iter([False] * 6)
    part = list(generate(model, [1, 2, 3], max_new_tokens=50, session=session, should_stop=lambda: next(steps, True)))
    assert 0 < len(part) < 10
    text = [1, 2, 3, *part, 9]
    assert list(generate(model, text, max_new_tokens=5, session=session)) == plain_greedy(model, text, 5)


def test_generation_ends_where_the_context_does(tiny_model):
    """Catches: an index error at the last position; with a window there is no last position."""
    model = tiny_model(block_size=16)
    assert (
        len(list(generate(model, list(range(10)), max_new_tokens=100))) == 7
    )  # positions 10 .. 16: the last is not fed
    model = tiny_model(block_size=16, attention="sliding", sliding_window_size=4, rolling_kv_cache=True)
    model.set_kv_cache(1, 2)  # less than a window: it is made anew
    assert list(generate(model, [1, 2], max_new_tokens=50)) == plain_greedy(model, [1, 2], 50)
    assert len(list(generate(model, list(range(10)), max_new_tokens=100))) == 100


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"prompt_ids": []}, "empty"),
        ({"prompt_ids": [97]}, "token id 97.*vocabulary has 97"),
        ({"prompt_ids": [-1]}, "token id -1"),
        ({"prompt_ids": [1] * 257}, "257 tokens and the context 256"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"sampling": Sampling(0.5), "top_k": 3}, "one or the other"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tiny_model, arguments, message):
    """Catches: nonsense that becomes text."""
    with pytest.raises(ValueError, match=message) as error:
        list(generate(tiny_model(), **{"prompt_ids": [1]} | arguments))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------- text


def test_streamed_text_is_the_decoded_text(tiny_checkpoint):
    """Catches: lost spaces and broken characters between pieces. With random weights many tokens are single bytes."""
    model, tokenizer = load_model(tiny_checkpoint), Tokenizer(tiny_checkpoint)
    ids = tokenizer.encode("the quick brown fox")
    arguments = {"max_new_tokens": 60, "temperature": 1.5, "seed": 3}
    tokens = list(generate(model, ids, **arguments))
    pieces = list(generate_text(model, tokenizer, ids, **arguments))
    assert tokenizer.decode(ids) + "".join(pieces) == tokenizer.decode(ids + tokens)
    whole = "".join(pieces)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    cut = "".join(generate_text(model, tokenizer, ids, stop=[stop], **arguments))
    assert cut == whole[: whole.index(stop)]


def test_statistics_name_the_window_and_the_cache(tiny_model):
    """Catches: a line that says another window than the one in force."""
    model = tiny_model(attention="sliding,full", sliding_window_size=5, rolling_kv_cache=True, n_layer=3)
    stats = Stats()
    list(generate(model, [1, 2, 3], max_new_tokens=4, stats=stats))
    assert (stats.prompt_tokens, stats.new_tokens, stats.decode_steps) == (3, 4, 3)
    line = stats.line(model, "some text")
    assert "window 5 rolling in 2 of 3 layers" in line and f"cache {model.kv_cache_bytes() / 1e6:.1f} MB" in line
    assert line.splitlines()[3:] == ["Cut at 4 tokens: --max_new_tokens N gives more."]
    assert describe_window(tiny_model()) == "none (context 256)"
    model = tiny_model(attention="streaming", sliding_window_size=5, n_sink_tokens=3)
    assert describe_window(model) == "5 rolling behind 3 sinks"


def test_windows_of_several_sizes_are_all_named(tiny_model, monkeypatch):
    """Catches: one layer's window that is shown as every layer's."""
    monkeypatch.setattr(GPT, "windows", [4, None, 8, 8])
    assert describe_window(tiny_model()) == "4 in 1, 8 in 2 of 4 layers"


def test_statistics_fit_a_terminal_and_name_what_shapes_the_attention(tiny_model):
    """Catches: a line that wraps, a chunked attention or a scaling of RoPE that goes unsaid."""
    model = tiny_model(block_size=131072, rope_scaling={"type": "yarn", "factor": 4.0}, attention="dual_chunk")
    lines = Stats(131072, 12345, 10**6, 99.9, 99.99, 5000.0, 10**5).line(model).splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 100 and "12345 prompt tokens" in lines[2]
    assert "dual_chunk 81920 + 16384" in lines[2] and "RoPE yarn by 4" in lines[2]
    usual = Stats(30, 0, 100, 0.1, 0.12, 3.0, 99).line(tiny_model()).splitlines()
    assert max(map(len, usual)) <= 80


def test_an_answer_that_is_cut_or_empty_is_marked(tiny_model):
    """Catches: an answer that looks finished, and an empty one without a word."""
    model = tiny_model(block_size=16)
    for new_tokens, mark in ((3, "Cut at 3 tokens"), (100, "The context of 16 tokens is full.")):
        stats = Stats()
        list(generate(model, list(range(10)), new_tokens, stats=stats))
        assert mark in stats.line(model, "text")
    stats, first = Stats(), next(generate(model, [1, 2], 1))
    assert list(generate(model, [1, 2], 9, stop_tokens=[first], stats=stats)) == []
    assert "stopped at once" in stats.line(model, "") and "at once" not in stats.line(model, "text")


# ---------------------------------------------------------------------------------------------------- no finite numbers


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("arguments", [{}, {"temperature": 1.0, "seed": 1, "top_p": 0.9, "repetition_penalty": 1.2}])
def test_logits_that_are_no_numbers_end_the_text(tiny_model, value, arguments):
    """Catches: the argmax of NaN, which is a token, and nobody is told."""
    model = tiny_model().to(torch.float16)
    with pytest.raises(ValueError, match="no finite numbers.*float16.*--dtype float32 or bfloat16"):
        model.lm_head.weight.data[7, 3] = value
        list(generate(model, [1, 2], 4, **arguments))
    with pytest.raises(ValueError, match="weights are damaged, convert"):
        list(generate(model.float(), [1, 2], 4, decode=model, **arguments))


def test_an_empty_stop_is_refused(tiny_model, tiny_checkpoint):
    """Catches: a stop that ends nothing, and goes unsaid."""
    with pytest.raises(ValueError, match="A stop is an empty text"):
        generate_text(tiny_model(), Tokenizer(tiny_checkpoint), [1], stop=["x", ""])
