"""A step's memory on a GPU beside its estimate: pytest tests/gpu/test_memory_cuda.py -q, on a machine that has one."""

import contextlib

import pytest
import torch
from tiny import tiny_config

from lit_swa import GPT
from lit_swa.training.estimate import estimate_step
from lit_swa.training.loop import Batch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPE = {"n_layer": 4, "n_head": 8, "n_query_groups": 4, "n_embd": 512, "head_size": 64, "intermediate_size": 1536}
SHAPE |= {"block_size": 4096, "vocab_size": 8192}
WINDOW = {"sliding_window_size": 1024}


@pytest.mark.parametrize("documents", [None, [3000, 1096]], ids=["rows", "documents"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attention": "sliding"} | WINDOW,
        {"attention": "streaming", "n_sink_tokens": 4} | WINDOW,
        {"attention": "dual_chunk", "dual_chunk_pretraining_length": 2048},
        {"attention": "linear"},
        {"attention": "linear", "linear_gate": True, "linear_sinks": 4},
        {"s2_attention": True},
    ],
    ids=lambda fields: " ".join(map(str, fields.values())) or "full",
)
def test_a_step_takes_what_is_estimated(fields, documents):
    """Catches: kernels that run on tensors without numbers, which ends the process; an estimate by a way that takes
    more than the one that a step goes."""
    torch.manual_seed(0)
    model = GPT(tiny_config(**SHAPE | fields)).to("cuda", torch.bfloat16).train()
    idx = torch.randint(0, 8192, (1 if documents else 2, 4096), device="cuda")
    batch = Batch(idx, idx, documents, [0, 1])
    estimated = estimate_step(model, batch, False, contextlib.nullcontext).activations[0]
    for _ in range(2):  # what is compiled first takes more
        model.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(idx, targets=idx, documents=documents).backward()
        torch.cuda.synchronize()
        taken = torch.cuda.max_memory_allocated() - before
    assert estimated == pytest.approx(taken, rel=0.03)
