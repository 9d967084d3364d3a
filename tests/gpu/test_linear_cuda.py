"""Linear attention compiled, and by flash-linear-attention's kernels, against itself: pytest tests/gpu -q, on a GPU."""

import pytest
import torch
from compiled import check_gradients

from lit_swa import fla_sums, linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WIDE = {"n_embd": 256, "n_head": 4, "n_query_groups": 2, "head_size": 64, "block_size": 1024}


@pytest.mark.skipif(not fla_sums.INSTALLED, reason="needs flash-linear-attention")
@pytest.mark.parametrize("fields", [{}, {"linear_sinks": 3}], ids=["plain", "sinks"])
def test_sums_of_fla_are_those_of_the_chunks(tiny_model, monkeypatch, fields):
    """Catches: a kernel that takes other keys or states; in bfloat16, where each may err as the other does."""
    model = tiny_model(attention="linear", linear_window=48, **WIDE | fields).cuda()
    idx, found = torch.randint(0, 97, (2, 900), device="cuda"), []
    for dtype, sums in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, fla_sums.older_sums)):
        monkeypatch.setattr(linear, "fast_sums", lambda q, sums=sums: sums)
        model = model.to(dtype)
        model.zero_grad()
        y = model(idx)
        y.float().square().mean().backward()
        found.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    for exact, plain, fast in zip(*found, strict=True):
        plain, fast = ((x.float() - exact.float()).square().mean().sqrt() for x in (plain, fast))
        assert fast < (1.25 if exact.numel() > 64 else 2) * plain + 1e-4 * exact.float().square().mean().sqrt()


@pytest.mark.parametrize("fields", [{}, {"linear_gate": True, "linear_sinks": 3}], ids=["plain", "gate and sinks"])
def test_compiled_pieces_have_the_gradients_of_what_they_were_made_of(tiny_model, fields):
    """Catches: a gradient that compiled code adds up wrongly."""
    model = tiny_model(attention="linear", linear_window=48, **WIDE | fields).cuda().train()
    check_gradients(model, torch.randint(0, 97, (2, 900), device="cuda"), 1e-3)
