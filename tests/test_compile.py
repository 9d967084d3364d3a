"""A compiled one-token step is one graph for every position: what fast decoding stands on."""

import dilated
import pytest
import torch
from torch._dynamo.utils import counters

from lit_swa.cpu_decode import compile_blocks, plain_step
from lit_swa.generate import generate

pytestmark = pytest.mark.usefixtures("dilated_row")
FIELDS = {
    "dense": {},
    "dense window": {"attention": "sliding", "sliding_window_size": 8},
    "rolling": {"attention": "sliding", "sliding_window_size": 8, "rolling_kv_cache": True},
    "mixed": {
        "attention": "sliding,full",
        "sliding_window_size": 8,
        "rolling_kv_cache": True,
        "attention_logit_softcapping": 20.0,
    },
    "streaming": {"attention": "streaming", "sliding_window_size": 8, "n_sink_tokens": 3},
    "dilated": dilated.FIELDS,
    "dilated rolling": dilated.FIELDS | {"rolling_kv_cache": True},
    "dual chunk": {
        "attention": "dual_chunk",
        "dual_chunk_pretraining_length": 16,
        "dual_chunk_temperature_slope": 0.2,
    },
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "no positions": {"attention": "sliding,full", "sliding_window_size": 8, "positions": "rope,none"},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "block_size": 64},
}


@pytest.mark.parametrize("batch, ragged", [(1, False), (4, True)])
@pytest.mark.parametrize("variant", FIELDS)
@torch.no_grad()
def test_a_one_token_step_is_captured_once(tiny_model, variant, batch, ragged):
    """Catches: an .item(), a Python int that grows with the position, a shape that depends on it."""
    torch._dynamo.reset()
    counters.clear()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    model, T = tiny_model(**FIELDS[variant]), 30
    idx = torch.randint(0, 97, (batch, T))
    expected = model(idx)
    model.set_kv_cache(batch, T, lookahead=2)
    step = torch.compile(model, backend=count)
    rows, delay = torch.arange(batch), torch.arange(batch) * 3 if ragged else torch.zeros(batch, dtype=torch.long)
    for t in range(T):
        pos = t - delay  # negative, which is padding, while a row has not begun
        tokens = idx[rows, pos.clamp(min=0)][:, None]
        logits = step(tokens, pos[:, None] if ragged else torch.tensor([t]))[:, 0]
        begun = pos >= 0
        torch.testing.assert_close(logits[begun], expected[rows, pos.clamp(min=0)][begun], rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1, f"{len(graphs)} graphs: the step was compiled again as the position grew"
    assert not counters["graph_break"], dict(counters["graph_break"])


@torch.no_grad()
def test_a_verify_step_is_captured_once(tiny_model):
    """Catches: a step of several tokens, as speculative decoding makes, that looks at its positions."""
    torch._dynamo.reset()
    counters.clear()
    graphs = []
    model, T, k = tiny_model(**FIELDS["mixed"]), 30, 2
    idx = torch.randint(0, 97, (1, T))
    expected = model(idx)
    model.set_kv_cache(1, T, lookahead=k)
    step = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph)
    for t in range(0, T, k + 1):
        logits = step(idx[:, t : t + k + 1], torch.arange(t, t + k + 1))
        torch.testing.assert_close(logits, expected[:, t : t + k + 1], rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    "fields",
    [
        {"attention": "sliding,full", "sliding_window_size": 50},
        {"attention": "streaming", "sliding_window_size": 50},
        {"attention": "dual_chunk", "dual_chunk_pretraining_length": 64},
        {"s2_attention": True, "s2_group_size": 48},
    ],
)
def test_a_whole_sequence_is_one_graph(tiny_model, fields):
    """Catches: a mask that is looked at while compiling for training."""
    torch._dynamo.reset()
    model = tiny_model(**fields).train()
    idx = torch.randint(0, 97, (2, 200))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(idx), model(idx), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", FIELDS)
def test_compiled_blocks_equal_the_plain_ones(tiny_model, variant):
    """Catches: a product that Inductor writes wrongly, or a block that is compiled again for each layer or position."""
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model(**FIELDS[variant], attn_bias=True, mlp_bias=True, n_layer=4)
    expected = list(generate(model, [1, 2, 3], max_new_tokens=40))
    compile_blocks(model)
    assert list(generate(model, [1, 2, 3], max_new_tokens=40, decode=plain_step(model, 1))) == expected
    kinds_of_layer = len(set(model.config.layer_variants))
    assert counters["stats"]["unique_graphs"] == kinds_of_layer + 1  # and lm_head
