"""On a GPU: python -m pytest tests/gpu. The same promises as on the CPU, and a one-token step that never waits."""

import pytest
import torch

from lit_swa import GPT
from lit_swa.fast_decode import compile_decode
from lit_swa.generate import generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
VARIANTS = {
    "dense": {},
    "dense window": {"attention": "sliding", "sliding_window_size": 9},
    "rolling": {"attention": "sliding", "sliding_window_size": 9, "rolling_kv_cache": True},
    "mixed": {
        "attention": "sliding,full",
        "sliding_window_size": 9,
        "rolling_kv_cache": True,
        "attention_logit_softcapping": 20.0,
    },
}


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert ((a - b).abs().max() / b.abs().max()).item() < 1e-5  # float32, tf32 is off by default


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_any_split_gives_the_logits_of_one_call(tiny_model, variant):
    """Catches: a path that only the CPU takes, since it may look at positions."""
    model = tiny_model(**VARIANTS[variant]).cuda()
    idx = torch.randint(0, 97, (2, 60), device="cuda")
    expected = model(idx)
    for sizes in ([60], [1] * 60, [7] * 8 + [4], [40, 1, 1, 18], [20, 20, 20]):
        for with_hint in (False, True):
            model.set_kv_cache(2, 64)
            outputs, p = [], 0
            for n in sizes:
                hint = p + n if with_hint else None
                outputs.append(model(idx[:, p : p + n], torch.arange(p, p + n, device="cuda"), input_pos_maxp1=hint))
                p += n
            close(torch.cat(outputs, 1), expected)


@torch.no_grad()
def test_a_model_may_be_built_on_the_gpu(tiny_model):
    """Catches: RoPE's table left on the CPU."""
    expected = tiny_model()
    with torch.device("cuda"):
        model = GPT(expected.config).eval()
    model.load_state_dict(expected.state_dict())
    idx = torch.randint(0, 97, (1, 9))
    close(model(idx.cuda()).cpu(), expected(idx))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_rows_at_positions_of_their_own(tiny_model, variant):
    """Catches: a ragged step that needs the host."""
    model = tiny_model(**VARIANTS[variant]).cuda()
    idx = torch.randint(0, 97, (3, 40), device="cuda")
    expected, rows, delay = model(idx), torch.arange(3, device="cuda"), torch.tensor([0, 4, 11], device="cuda")
    model.set_kv_cache(3, 40)
    for t in range(40):
        pos = t - delay
        logits = model(idx[rows, pos.clamp(min=0)][:, None], pos[:, None])[:, 0]
        begun = pos >= 0
        close(logits[begun], expected[rows, pos.clamp(min=0)][begun])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_one_token_step_never_waits_for_the_gpu(tiny_model, variant, compiled):
    """Catches: an .item() or a copy to the host in the step; torch raises on any synchronisation."""
    torch._dynamo.reset()
    model, T = tiny_model(**VARIANTS[variant]).cuda(), 40
    idx = torch.randint(0, 97, (1, T), device="cuda")
    expected = model(idx)
    model.set_kv_cache(1, T)
    step = compile_decode(model) if compiled else model
    position = torch.zeros(1, dtype=torch.long, device="cuda")
    logits = []
    for t in range(T):
        if t == 8:  # compiled, captured, warm
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        logits.append(step(idx[:, t : t + 1], position))
        position += 1
    torch.cuda.set_sync_debug_mode("default")
    close(torch.cat(logits, 1), expected)


def test_greedy_tokens_are_those_of_the_cpu(tiny_model):
    """Catches: a position or a mask that is another one on the GPU."""
    for fields in VARIANTS.values():
        model = tiny_model(**fields)
        expected = list(generate(model, [1, 2, 3], max_new_tokens=40))
        assert list(generate(model.cuda(), [1, 2, 3], max_new_tokens=40)) == expected
