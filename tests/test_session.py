"""A session feeds, takes back and feeds again: always the logits of one call without a cache."""

import pytest
import torch

from lit_swa.generate import Sampling, Session, draw, generate

ROLLING = {"attention": "sliding", "sliding_window_size": 7, "rolling_kv_cache": True}
CACHES = {
    "dense": {},
    "window": {"attention": "sliding", "sliding_window_size": 7},
    "rolling": ROLLING,
    "mixed": ROLLING | {"attention": "sliding,full"},
    "sinks": {"attention": "streaming", "sliding_window_size": 7, "n_sink_tokens": 3},
}
caches = pytest.mark.parametrize("fields", CACHES.values(), ids=CACHES)


def assert_same(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)  # float32, summed in another order


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 97, shape)


@caches
@torch.no_grad()
def test_a_text_in_chunks_gives_the_logits_of_one_call(tiny_model, fields):
    """Catches: a chunk that starts at a wrong position, and logits of other tokens than those that were asked for."""
    model, ids = tiny_model(**fields), tokens(1, 50)
    expected = model(ids)
    for size in (1, 8, 49, 64):
        for kept in (1, 10, 0):
            session, told = Session(model, chunk_size=size), []
            logits = session.feed(ids, logits_to_keep=kept, progress=lambda *numbers, told=told: told.append(numbers))
            assert_same(logits, expected[:, -kept:])
            assert session.tokens == ids.tolist() and session.length == 50
            assert told == ([] if size >= 50 else [(0, 50), *((min(n + size, 50), 50) for n in range(0, 50, size))])


def test_the_reading_stops_between_two_chunks(tiny_model):
    """Catches: an interruption that is asked for only at the end, or after which the tokens are not those read."""
    session, answers = Session(tiny_model(), chunk_size=8), iter([False, False, True])
    assert session.feed(list(range(50)), should_stop=lambda: next(answers)) is None
    assert session.tokens == [list(range(16))]


@caches
@torch.no_grad()
def test_what_is_taken_back_leaves_no_trace(tiny_model, fields):
    """Catches: positions that go on from the wrong place, and keys of tokens that are no longer there."""
    model, ids, wrong = tiny_model(**fields), tokens(2, 60), tokens(2, 60)
    expected, session = model(ids), Session(model, batch_size=2, lookahead=4)
    session.feed(ids[:, :20])
    for start in range(20, 56, 2):  # two right tokens stay of each four
        session.feed(torch.cat([ids[:, start : start + 2], wrong[:, start : start + 2]], dim=1))
        session.take_back(2)
    assert session.tokens == ids[:, :56].tolist()
    assert_same(session.feed(ids[:, 56:], logits_to_keep=0), expected[:, 56:])


def test_a_rolling_cache_takes_back_no_more_than_it_keeps(tiny_model):
    """Catches: keys that are gone for good and are missed without a word, also when they are asked for bit by bit."""
    session = Session(tiny_model(**ROLLING), lookahead=4)
    session.feed(tokens(1, 30))
    session.take_back(3)
    session.feed([5])
    assert session.can_take_back(2) and not session.can_take_back(3)
    with pytest.raises(ValueError, match="cannot take back 3 tokens"):
        session.take_back(3)
    with pytest.raises(ValueError, match="holds 28"):
        session.take_back(29)
    assert session.length == 28
    dense = Session(tiny_model())
    dense.feed([1, 2, 3])
    dense.take_back(3)
    assert dense.tokens == [[]]


@caches
def test_a_batch_is_its_sequences(tiny_model, fields):
    """Catches: a sequence that sees another's keys or padding, with equal lengths and padded on the left."""
    model = tiny_model(**fields)
    for lengths in ((20, 20, 20), (20, 3, 11)):
        prompts = [tokens(n).tolist() for n in lengths]
        batch = Session(model, batch_size=3, lookahead=2, chunk_size=8)
        more = [tokens(3, 1), tokens(3, 4), tokens(3, 1)]
        together = [batch.feed(prompts), *(batch.feed(ids, logits_to_keep=0) for ids in more)]
        batch.take_back(2)
        together.append(batch.feed(more[-1]))
        assert batch.tokens == [
            p + torch.cat([more[0], more[1][:, :3], more[2]], dim=1)[i].tolist() for i, p in enumerate(prompts)
        ]
        for i, prompt in enumerate(prompts):
            alone = Session(model, lookahead=2)
            rows = [alone.feed(prompt), *(alone.feed(ids[i : i + 1], logits_to_keep=0) for ids in more)]
            alone.take_back(2)
            rows.append(alone.feed(more[-1][i : i + 1]))
            for logits, row in zip(together, rows, strict=True):
                assert_same(logits[i : i + 1], row)


def speculate(target: Session, draft: Session, prompt: list[int], n: int, k: int) -> list[int]:
    """n greedy tokens of the target: the draft guesses k tokens, the target reads them at once and keeps the right."""
    greedy, text = Sampling(), list(prompt)
    while len(text) < len(prompt) + n:
        guess = text + [int(draw(greedy.distribution(draft.feed(text[draft.keep_prefix(text) :])[:, -1])))]
        while len(guess) < len(text) + k:
            guess.append(int(draw(greedy.distribution(draft.feed(guess[-1:])[:, -1]))))
        logits = target.feed(guess[target.length :], logits_to_keep=k + 1)[0]
        wanted = draw(greedy.distribution(logits)).flatten().tolist()  # what follows text and each guess
        right = next((i for i in range(k) if guess[len(text) + i] != wanted[i]), k)
        text += wanted[: right + 1]
        target.take_back(k - right)
    return text[len(prompt) : len(prompt) + n]


@pytest.mark.parametrize(
    "fields", [{}, ROLLING, ROLLING | {"attention": "sliding,full"}], ids=["full", "roll", "mixed"]
)
def test_speculative_decoding_is_a_loop_over_two_sessions(tiny_model, fields):
    """Catches: a session that cannot feed guesses, read all their logits and take the wrong ones back."""
    model, small = tiny_model(**fields), tiny_model(n_layer=1, **fields)
    small.load_state_dict(model.state_dict(), strict=False)  # its guesses are sometimes right
    prompt = tokens(20).tolist()
    expected = list(generate(model, prompt, max_new_tokens=40))
    for draft in (model.__class__(model.config).eval(), small):  # and those of random weights hardly ever
        assert speculate(Session(model, lookahead=4), Session(draft, lookahead=8), prompt, 40, k=4) == expected


def test_a_session_does_not_read_another_ones_cache(tiny_model):
    """Catches: a text that goes on from the keys of whoever used the model last."""
    model = tiny_model()
    first, second = Session(model), Session(model)
    first.feed([1, 2, 3])
    second.feed([4])
    with pytest.raises(ValueError, match="Another session has used"):
        first.feed([4])
    assert first.keep_prefix([1, 2, 3, 4]) == 0  # a text is then read from its beginning
    assert_same(first.feed([1, 2, 3, 4]), Session(model).feed([1, 2, 3, 4]))


def test_a_cache_grows_with_its_text_and_keeps_it(tiny_model):
    """Catches: content lost when a cache is extended, a copy for every token, a step beyond the context."""
    model, ids = tiny_model(block_size=64), tokens(1, 64)
    session, sizes = Session(model), set()
    for i in range(64):
        logits = session.feed(ids[:, i : i + 1])
        sizes.add(model.max_seq_length)
    assert_same(logits, model(ids)[:, -1:]), len(sizes)
    assert sizes == {1, 2, 4, 8, 16, 32, 64}
    with pytest.raises(ValueError, match="65 tokens and the context 64"):
        session.feed([1])


def test_windows_read_beyond_the_context(tiny_model):
    """Catches: a refusal of a length that a model whose layers all have a window can read, whatever its caches."""
    for fields in (CACHES["window"], ROLLING, CACHES["sinks"]):
        model, ids = tiny_model(block_size=16, **fields), tokens(1, 40)
        assert_same(Session(model, chunk_size=9).feed(ids), model(ids)[:, -1:])


def test_a_model_whose_tokens_depend_on_the_length_reads_a_text_whole(tiny_model):
    """Catches: a text read in pieces by a scaling of RoPE that follows the length read so far."""
    model = tiny_model(rope_scaling={"type": "dynamic", "factor": 4.0}, block_size=64)
    ids = tokens(1, 60)
    assert_same(Session(model, chunk_size=8).feed(ids), model(ids)[:, -1:])


def test_a_decode_step_feeds_single_tokens(tiny_model):
    """Catches: a compiled step that is accepted and not used, or used for more than one token."""
    model, calls = tiny_model(), []

    def decode(token: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        calls.append((token.tolist(), input_pos.tolist()))
        return model(token, input_pos)

    session = Session(model, decode=decode)
    session.feed([1, 2, 3])
    session.feed([4])
    assert calls == [([[4]], [3])]
    assert list(generate(model, [1, 2], 4, session=session)) == list(generate(model, [1, 2], 4))
    assert len(calls) == 1 + 1 + 3  # the second token of the prompt, whose logits are wanted again; three of four new


@pytest.mark.parametrize("ids", [[], [[1], [2]], torch.zeros(1, 2, 3), torch.zeros(1, 0)])
def test_tokens_that_do_not_fit_are_refused(tiny_model, ids):
    """Catches: a sequence broadcast over the batch, and a call without tokens."""
    with pytest.raises(ValueError, match="give 1 rows"):
        Session(tiny_model()).feed(ids)


def test_sequences_may_differ_in_length_only_at_first(tiny_model):
    """Catches: padding in the middle of a text."""
    session = Session(tiny_model(), batch_size=2)
    session.feed([[1, 2], [3]])
    with pytest.raises(ValueError, match="only the first rows"):
        session.feed([[1, 2], [3]])


@pytest.mark.parametrize("kind", ["linear,full", "sliding,full"])
def test_no_token_is_fed_ahead_that_a_layer_could_not_take_back(tiny_model, kind):
    """Catches: a stop that ends in an error where some layers roll and others keep every key."""
    model = tiny_model(
        attention=kind, rolling_kv_cache=True, **({"sliding_window_size": 5} if "sliding" in kind else {})
    )
    for lookahead in (0, 1):
        session = Session(model, lookahead=lookahead)
        session.feed([1, 2, 3])
        session.device = torch.device("cuda")
        assert session.can_run_ahead == session.can_take_back(1) == (lookahead == 1)
