"""A prompt is read under a window, and what is written sees all of it."""

import brute_force
import pytest
import torch

from lit_swa import Config
from lit_swa.batches import Batch, Request
from lit_swa.evaluate import check_context, window_nll, with_fields
from lit_swa.generate import Session, describe_attention, generate
from lit_swa.sequential import place_blocks, spread
from lit_swa.speculative import make_draft, speculative_generate
from lit_swa.tasks import token_scores

WINDOW = {"sliding_window_size": 4}
READ = {  # name -> fields, and how each layer of the brute force reads the prompt
    "sliding": (WINDOW, [brute_force.meet_sliding(4)] * 2),
    "streaming": (WINDOW | {"n_sink_tokens": 2}, [brute_force.meet_streaming(4, 2)] * 2),
    "streaming,full": (WINDOW | {"n_sink_tokens": 3}, [brute_force.meet_streaming(4, 3), brute_force.meet_full]),
    "full,sliding": ({"layer_windows": "3,5"}, [brute_force.meet_full, brute_force.meet_sliding(5)]),
}


def meet_after(prompt: int, meet: brute_force.Meet) -> brute_force.Meet:
    """A query among the first `prompt` tokens sees what `meet` says, and any other all."""
    return lambda i, j, head: meet(i, j, head) if i < prompt else brute_force.meet_full(i, j, head)


def expected_logits(model, ids: torch.Tensor, prompt: int, name: str) -> torch.Tensor:
    return brute_force.logits(model, ids, [meet_after(prompt, meet) for meet in READ[name][1]]).float()


@pytest.mark.parametrize("name", READ)
@torch.no_grad()
def test_any_split_of_the_prompt_equals_the_brute_force_mask(tiny_model, steps, name):
    """Catches: keys that are lost behind the window, sinks that are not read, a mask that depends on the calls."""
    model, ids, prompt = tiny_model(prompt_attention=name, **READ[name][0]), torch.randint(0, 97, (26,)), 19
    expected = expected_logits(model, ids, prompt, name)
    for size in (1, 5, 19):
        session = Session(model, chunk_size=size)
        read = session.feed(ids[:prompt], logits_to_keep=0, prompt=True)
        written = session.feed(ids[prompt:], logits_to_keep=0)
        torch.testing.assert_close(torch.cat([read, written], dim=1)[0], expected, rtol=1e-4, atol=1e-4)
    uncached = model(ids[None, :prompt], prompt=True)
    torch.testing.assert_close(uncached[0], expected[:prompt], rtol=1e-4, atol=1e-4)
    last = Session(model).read(ids[:prompt])  # a tensor of one sequence; its last token sees everything
    torch.testing.assert_close(
        last[0], expected_logits(model, ids[:prompt], prompt - 1, name)[-1:], rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(expected[:prompt], model(ids[None, :prompt])[0], atol=1e-2)  # the prompt is longer than S


@torch.no_grad()
def test_prompts_of_several_lengths(tiny_model):
    """Catches: a mask that counts the padding in front of a shorter prompt."""
    name = "streaming"
    model, texts = tiny_model(prompt_attention=name, **READ[name][0]), [torch.randint(0, 97, (n,)) for n in (18, 11, 1)]
    logits = Session(model, 3).read([ids.tolist() for ids in texts])
    for row, ids in zip(logits, texts, strict=True):
        torch.testing.assert_close(row[0], expected_logits(model, ids, len(ids) - 1, name)[-1], rtol=1e-4, atol=1e-4)


def greedy(model, ids: list[int], n: int) -> list[int]:
    """New tokens by the brute force: the last token of the prompt and all that are written see everything."""
    text = list(ids)
    for _ in range(n):
        text.append(int(expected_logits(model, torch.tensor(text), len(ids) - 1, "streaming")[-1].argmax()))
    return text[len(ids) :]


def test_all_ways_to_write_read_the_prompt_alike(tiny_model):
    """Catches: a path of generation that reads its prompt in full, or whose last token of the prompt sees a window."""
    model = tiny_model(prompt_attention="streaming", **READ["streaming"][0])
    prompts = [torch.randint(0, 97, (n,)).tolist() for n in (14, 23, 1, 14)]
    expected = [greedy(model, ids, 4) for ids in prompts]
    in_full = with_fields(model, prompt_attention=None, sliding_window_size=None, n_sink_tokens=4)
    assert expected[1] != list(generate(in_full, prompts[1], 4))  # so a wrong path shows
    assert [list(generate(model, ids, 4)) for ids in prompts] == expected
    for size in (1, 4):
        answers = dict(Batch(model, [Request(ids, 4) for ids in prompts], batch_size=size).run())
        assert [answers[n].tokens for n in range(4)] == expected
    for kind in ("lookup", "streaming"):
        new = speculative_generate(model, prompts[1], draft=make_draft(kind, model, 8), max_new_tokens=4)
        assert list(new) == expected[1]
    steps = []
    session = Session(model, decode=lambda idx, pos: steps.append(idx.size(1)) or model(idx, pos))
    for ids, new in zip(prompts, expected, strict=True):  # a decode step knows no prompts
        assert list(generate(model, ids, 4, session=session)) == new
    session.read([3, 5])
    assert steps == [1] * 17  # the 5
    spread(model, place_blocks(model, [torch.device("cpu")]))
    assert [list(generate(model, ids, 4)) for ids in prompts] == expected


def test_layers_on_several_devices_keep_their_own_windows(tiny_model):
    """Catches: a mixer that a layer's device names, whose kind leaves the window out or is not known."""
    model, ids = tiny_model(attention="sliding", layer_windows="3,9"), torch.randint(0, 97, (1, 30))
    expected = model(ids)
    spread(model, place_blocks(model, [torch.device("cpu")]))
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)


def test_texts_without_a_prompt_refuse_it(tiny_model):
    """Catches: a field that is accepted where it would do nothing."""
    model, idx = tiny_model(prompt_attention="sliding", **WINDOW), torch.zeros(1, 9, dtype=torch.long)
    for score, *arguments in (
        (window_nll, model, idx),
        (token_scores, model, idx, 3),
        (check_context, model.config, 9),
    ):
        with pytest.raises(ValueError, match="here none is: leave it out"):
            score(*arguments)
    assert "prompts sliding 4" in describe_attention(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_attention": "nearby"}, "'nearby' is none of full, sliding"),
        ({"prompt_attention": "sliding"}, "needs sliding_window_size: set it"),
        ({"prompt_attention": "full"}, "has no effect: attention='full' says the same"),
        ({"prompt_attention": "linear"}, "layer 0 is 'full' and would read a prompt as 'linear'"),
        ({"prompt_attention": "dual_chunk"}, "would read a prompt as 'dual_chunk'"),
        ({"prompt_attention": "streaming", "attention": "sliding", **WINDOW}, "layer 0 is 'sliding'"),
        ({"prompt_attention": "sliding", "rolling_kv_cache": True, **WINDOW}, "rolling_kv_cache=True has no effect"),
        ({"prompt_attention": "sliding", "n_sink_tokens": 2, **WINDOW}, "n_sink_tokens=2 has no effect"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    """Catches: a combination that computes something else than it says."""
    with pytest.raises(ValueError, match=message):
        Config.from_name("SmolLM2-135M", **fields)
