"""Dual-chunk attention, streaming and S2-Attn equal what the papers' own code computes, where that code is right.

The fixtures come from reference/make_fixtures.py, which runs that code; reference/fixtures.json says at which commits.

Tolerances. The reference ran in float64, but for softmaxes and log-sum-exps that it rounds to float32, as it does its
RoPE angles. Ours runs in float64 with float32 angles too, so what is left is a float32's rounding: 2e-6 of the logits'
scale. In float32, where rounding adds up through two layers, it is 1e-5.

Not compared, since the reference is wrong there or does what we do not want:
- ChunkLlama: several tokens in one call behind a cache (no causal mask, and one chunk index for all of them), padded
  batches (chunks go by the place in the row), gradients (the log-sum-exps are detached), decoding with a temperature by
  the text's length (cached keys keep that of an earlier length), and w >= s, where its greatest distance is 2s - 1.
- StreamingLLM: several tokens in one call behind a full cache, which all see the whole cache.
- LongLoRA: padded batches (it pairs masks with the wrong rows), odd groups when rolled (rolled back one too few).
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_swa import GPT, Config
from lit_swa.formats.files import LazyTensor
from lit_swa.formats.hugging_face import to_lit

HERE = Path(__file__).parent / "reference"
NOTES = json.loads((HERE / "fixtures.json").read_text())
FOUND = load_file(HERE / "fixtures.safetensors")
IDX = FOUND["idx"]  # (2, T)
T = IDX.size(1)
SHAPE = {
    "n_layer": 2,
    "n_head": 4,
    "n_query_groups": 2,
    "n_embd": 32,
    "intermediate_size": 48,
    "vocab_size": 61,
    "block_size": 64,
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 2e-6}
DUAL = {"attention": "dual_chunk", "dual_chunk_pretraining_length": 16}
EIGHTS = DUAL | {"dual_chunk_size": 8, "dual_chunk_local": 4}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """In models so small, threads wait for each other far longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(**fields) -> GPT:
    """Ours with the weights that the reference had."""
    config = Config(**SHAPE | fields)
    named = {name.removeprefix("weights."): p for name, p in FOUND.items() if name.startswith("weights.")}
    source = {name: LazyTensor(tuple(p.shape), p.dtype, lambda p=p: p) for name, p in named.items()}
    model = GPT(config).eval()
    model.load_state_dict({name: p.load() for name, p in to_lit(source, config, HERE).items()})
    return model


def feed(model: GPT, idx: torch.Tensor, calls: list[int]) -> torch.Tensor:
    """Logits through the cache, in calls of so many tokens."""
    model.set_kv_cache(len(idx), T)
    steps = zip(idx.split(calls, dim=1), torch.arange(T).split(calls), strict=True)
    return torch.cat([model(tokens, at) for tokens, at in steps], dim=1)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The greatest difference, relative to the scale of theirs."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)

# ----------------------------------------------------------------------------------------------------------- dual-chunk


@dtypes
@pytest.mark.parametrize(
    "result, fields",
    [
        ("prefill", EIGHTS),
        ("prefill_by_default", DUAL),
        ("prefill_interpolated", EIGHTS | {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("temperature", EIGHTS | {"dual_chunk_temperature": NOTES["chunkllama"]["temperature"]}),
    ],
)
@torch.no_grad()
def test_a_prompt_of_several_chunks_equals_chunkllama(result, fields, dtype):
    """Catches: a distance, a clamp, a mask between chunks or a merge that is not the paper's, also under scalings."""
    theirs, model = FOUND[f"dual_chunk.{result}"], build(**fields).to(dtype)
    assert error(model(IDX[:1]), theirs) < TOLERANCE[dtype]
    assert error(feed(model, IDX[:1], [13, 1, 20, 14]), theirs) < TOLERANCE[dtype]  # their prompt, our way


@dtypes
@pytest.mark.parametrize(
    "result, fields, prompt", [("steps", EIGHTS, 1), ("prefill_then_steps", EIGHTS, 21), ("steps_by_default", DUAL, 20)]
)
@torch.no_grad()
def test_steps_equal_chunkllamas(result, fields, prompt, dtype):
    """Catches: a step that sees the chunks otherwise than the paper's decoding does. Prompts end within chunks, and at
    a border."""
    theirs, model = FOUND[f"dual_chunk.{result}"], build(**fields).to(dtype)
    assert error(feed(model, IDX[:1], [prompt] + [1] * (T - prompt)), theirs) < TOLERANCE[dtype]
    assert error(model(IDX[:1]), theirs) < TOLERANCE[dtype]


@torch.no_grad()
def test_chunkllama_as_it_is_differs_by_its_bfloat16_merge_alone():
    """Catches: a comparison that holds only for the reference with its rounding taken out.

    It rounds the weights of the merge to bfloat16, 2^-9 each, which the second layer may enlarge: 1e-2 of the scale.
    The first chunk is not merged.
    """
    theirs, ours = FOUND["dual_chunk.bfloat16_merge"], build(**EIGHTS)(IDX[:1])
    assert error(ours[:, :8], theirs[:, :8]) < 1e-5
    assert 1e-5 < error(ours, theirs) < 1e-2


def test_default_chunks_are_chunkllamas():
    """Catches: other fractions of the trained length. Those that 8 does not divide are rounded otherwise there."""
    for c, (s, w) in NOTES["chunkllama"]["defaults"].items():
        config = Config(**SHAPE | {"attention": "dual_chunk", "dual_chunk_pretraining_length": int(c)})
        assert (config.chunk_size, config.chunk_local) == (s, w)


# ------------------------------------------------------------------------------------------------------------ streaming


@dtypes
@pytest.mark.parametrize(
    "result, n_sinks, S",
    [
        ("4_7_after", 4, 8),  # evicting after a step leaves recent_size keys and the next query
        ("1_1_after", 1, 2),
        ("0_6_after", 0, 7),
        ("4_7_before", 4, 7),  # evict_for_space makes room for the query among recent_size
    ],
)
@torch.no_grad()
def test_streaming_equals_evicting_and_shifting_token_by_token(result, n_sinks, S, dtype):
    """Catches: a window off by one, a sink lost, a query not rotated to its place in the reference's cache."""
    theirs = FOUND[f"streaming.{result}"]
    model = build(attention="streaming", sliding_window_size=S, n_sink_tokens=n_sinks).to(dtype)
    assert error(model(IDX[:1]), theirs) < TOLERANCE[dtype]
    assert error(feed(model, IDX[:1], [1] * T), theirs) < TOLERANCE[dtype]
    assert error(feed(model, IDX[:1], [3, 20] + [1] * (T - 23)), theirs) < TOLERANCE[dtype]


# -------------------------------------------------------------------------------------------------------------- S2-Attn


def heads_of_layer_0(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """What enters the output projection, (B, T, H, D)."""
    found = []
    model.transformer.h[0].attn.proj.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    model(idx)
    return found[0].unflatten(-1, (model.config.n_head, model.config.head_size))


@dtypes
@torch.no_grad()
def test_s2_equals_longloras_training(dtype):
    """Catches: groups, a shift or a split of the heads that are not those LongLoRA trains with (by flash_attn)."""
    model = build(s2_attention=True).to(dtype).train()
    assert error(model(IDX), FOUND["s2.logits"]) < TOLERANCE[dtype]


@dtypes
@torch.no_grad()
def test_s2_equals_the_rolled_form_but_where_that_sees_the_future(dtype):
    """Catches: a shift the wrong way or other heads. Rolled, their first half-group sees the text's end."""
    model = build(s2_attention=True).to(dtype).train()
    ours = heads_of_layer_0(model, IDX)
    theirs, H, half = (
        FOUND["s2.rolled_heads_of_layer_0"].view_as(ours),
        model.config.n_head,
        model.config.s2_group(T) // 2,
    )
    assert error(ours[:, :, : H // 2], theirs[:, :, : H // 2]) < TOLERANCE[dtype]
    assert error(ours[:, half:], theirs[:, half:]) < TOLERANCE[dtype]  # the last half-group, too
    leaked = (ours - theirs)[:, :half, H // 2 :].abs().amax(-1)  # (B, half, H / 2)
    assert (leaked > 1e-3 * theirs.abs().max()).all()


# --------------------------------------------------------------------------------------------- would they tell, though?


@pytest.mark.parametrize(
    "result, fields",
    [
        ("dual_chunk.prefill", EIGHTS | {"dual_chunk_local": 3}),
        ("dual_chunk.prefill", EIGHTS | {"dual_chunk_size": 9}),
        ("streaming.4_7_after", {"attention": "streaming", "sliding_window_size": 7, "n_sink_tokens": 4}),
        ("streaming.4_7_after", {"attention": "streaming", "sliding_window_size": 8, "n_sink_tokens": 3}),
        ("s2.logits", {"s2_attention": True, "s2_group_size": 11}),
    ],
)
@torch.no_grad()
def test_settings_off_by_one_are_told_apart(result, fields):
    """Catches: weights so small, or a text so short, that the tests above would pass for anything."""
    theirs = FOUND[result]
    assert error(build(**fields).train()(IDX[: len(theirs)]), theirs) > 1e-2
