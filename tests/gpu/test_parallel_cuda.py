"""A model over two GPUs, or with blocks that wait in the CPU's memory, is the model of one: pytest tests/gpu."""

from collections.abc import Iterator

import pytest
import torch
from ranks import Ranks
from tiny import randomize, tiny_config

from lit_swa import GPT
from lit_swa.fast_decode import compile_decode, warm_up
from lit_swa.generate import Session, generate
from lit_swa.parallel import Rank, join_ranks, split_model, sum_over_ranks
from lit_swa.peer_memory import SHARED
from lit_swa.quantize import quantize_linears
from lit_swa.sequential import place_blocks, spread

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
one_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIZE = {"n_layer": 4, "n_head": 8, "n_query_groups": 4, "n_embd": 256, "intermediate_size": 512}
SHAPES = {
    "full": {},
    "one group, tied, biases": {
        "n_query_groups": 1,
        "tie_embeddings": True,
        "attn_bias": True,
        "attn_proj_bias": True,
        "mlp_bias": True,
    },
    "rolling": {"attention": "sliding", "sliding_window_size": 7, "rolling_kv_cache": True},
    "streaming": {"attention": "streaming", "sliding_window_size": 7, "n_sink_tokens": 2},
    "dual chunk": {"attention": "dual_chunk", "dual_chunk_pretraining_length": 12},
    "mixed": {"attention": "sliding,full", "sliding_window_size": 7, "rolling_kv_cache": True},
}
IDS = (torch.arange(80).view(2, 40) * 7 + 3) % 97


def close(a: torch.Tensor, b: torch.Tensor, bound: float = 1e-5) -> None:
    a, b = a.float().cpu(), b.float().cpu()
    assert ((a - b).abs().max() / b.abs().max()).item() < bound  # float32, tf32 is off by default


def as_near(ours: tuple, one: tuple, exact: tuple) -> None:
    """Logits in another order of rounding: no further from those in float64 than 1.5 times what one GPU's are."""
    for a, b, c in zip(ours[:2], one[:2], exact[:2], strict=True):
        assert (a - c).square().mean().sqrt() < 1.5 * (b - c).square().mean().sqrt()


def build(fields: dict, dtype: torch.dtype = torch.float32) -> GPT:
    """A random model on the CPU: the same in every process."""
    torch.manual_seed(5)
    model = GPT(tiny_config(**SIZE | fields)).eval()
    randomize(model)
    return model.to(dtype)


@torch.inference_mode()
def read(model: GPT, compiled: bool = False) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Logits without a cache, of one-token steps behind a prompt, and greedy tokens."""
    whole = model(IDS.cuda())
    session = Session(model, batch_size=2, decode=compile_decode(model) if compiled else None)
    if compiled:
        warm_up(session, 40)
    session.feed(IDS[:, :20])
    steps = [session.feed(IDS[:, t : t + 1]) for t in range(20, 40)]
    tokens = list(generate(model, IDS[0, :9].tolist(), max_new_tokens=25))
    return whole.cpu(), torch.cat(steps, dim=1).cpu(), tokens


def read_split(index: int, fields: dict, dtype: torch.dtype, compiled: bool) -> tuple:
    torch._dynamo.reset()
    return read(split_model(build(fields, dtype), Rank(index, 2)).cuda(), compiled)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = Ranks(2, "nccl")
    yield ranks
    ranks.end()


@two_gpus
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_two_gpus_are_one(two_ranks, name, compiled):
    """Catches: a sum that a captured step leaves out, or makes once for all; a part that is another one on GPUs."""
    torch._dynamo.reset()
    one, exact = read(build(SHAPES[name]).cuda(), compiled), read(build(SHAPES[name]).double().cuda())
    answers = two_ranks(read_split, SHAPES[name], torch.float32, compiled)
    for ours in answers:
        as_near(ours, one, exact)
        assert ours[2] == one[2]
        assert torch.equal(ours[0], answers[0][0]) and torch.equal(ours[1], answers[0][1])


@two_gpus
@pytest.mark.parametrize("compiled", [False, True])
def test_two_gpus_in_bfloat16(two_ranks, compiled):
    """Catches: a sum in another dtype, or one that is rounded more often."""
    one = read(build({}, torch.bfloat16).cuda(), compiled)
    exact = read(build({}, torch.bfloat16).double().cuda())
    for ours in two_ranks(read_split, {}, torch.bfloat16, compiled):
        as_near(ours, one, exact)


def build_quantized(mode: str) -> GPT:
    model = build({}, torch.bfloat16)
    quantize_linears(model, mode)
    return model


def read_quantized(index: int, mode: str, compiled: bool) -> tuple:
    torch._dynamo.reset()
    return read(split_model(build_quantized(mode), Rank(index, 2)).cuda(), compiled)


def exchange_often(index: int) -> bool:
    """Sums and joins of tensors of many sizes, other numbers each time, one directly behind the other."""
    right, device = [], torch.device("cuda", index)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for n in (1, 97, 1024, 5000, 2**18 // dtype.itemsize, 2**18):
            for k in range(50):
                xs = [torch.full((1, n), 3 * k + 2 * r, dtype=dtype, device=device) for r in range(2)]
                right.append((sum_over_ranks(xs[index].clone()) == xs[0] + xs[1]).all())
                right.append((join_ranks(xs[index], 2) == torch.cat(xs, dim=1)).all())
    return bool(torch.stack(right).all()) and len(SHARED) >= 3


@two_gpus
def test_exchanges_that_follow_each_other(two_ranks):
    """Catches: numbers that are overwritten before they are read, or read before they are there."""
    assert all(two_ranks(exchange_often))


@two_gpus
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantised_weights_on_two_gpus(two_ranks, mode, compiled):
    """Catches: a kernel for quantised weights that does not take the shapes of a part."""
    one, exact = read(build_quantized(mode).cuda(), compiled), read(build_quantized(mode).double().cuda())
    for ours in two_ranks(read_quantized, mode, compiled):
        as_near(ours, one, exact)


@two_gpus
@pytest.mark.parametrize("offload", [0, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_blocks_on_two_gpus_are_one_model(name, offload):
    """Catches: a tensor left on the first GPU, a cache or plan that lies beside another device's blocks."""
    whole, steps, tokens = read(build(SHAPES[name]).cuda())
    model = build(SHAPES[name])
    placement = place_blocks(model, [torch.device("cuda", i) for i in range(2)], offload)
    assert set(placement.stages) == {0, 1}
    ours = read(spread(model, placement))
    close(ours[0], whole)
    close(ours[1], steps)
    assert ours[2] == tokens
    assert {attn.kv_cache.k.device.index for attn in model.layers} == {0, 1}


@one_gpu
@pytest.mark.parametrize("offload", [1, 2, 5, 12])
def test_blocks_that_wait_arrive_in_time(offload):
    """Catches: a block that runs before its weights have come, or whose place is overwritten while it runs. The blocks
    are large enough (25 MB) for a copy to last much longer than a block's work."""
    fields = {"n_layer": 12, "n_embd": 1024, "intermediate_size": 4096, "n_head": 16}
    expected = read(build(fields, torch.bfloat16).cuda())
    model = build(fields, torch.bfloat16)
    spread(model, place_blocks(model, [torch.device("cuda", 0)], offload))
    for _ in range(3):
        ours = read(model)
        close(ours[0], expected[0], 1e-2)
        close(ours[1], expected[1], 1e-2)
        assert ours[2] == expected[2]


@one_gpu
def test_waiting_blocks_take_no_room():
    """Catches: weights that stay on the GPU all the same."""
    fields = {"n_layer": 12, "n_embd": 1024, "intermediate_size": 4096, "n_head": 16}
    model = build(fields, torch.bfloat16)
    block = sum(p.nbytes for p in model.transformer.h[0].parameters())
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    spread(model, place_blocks(model, [torch.device("cuda", 0)], 12))
    assert torch.cuda.memory_allocated() - before < 2.2 * block + 2**21
