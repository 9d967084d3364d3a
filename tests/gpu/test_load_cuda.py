"""Loading a checkpoint onto a GPU: pytest tests/gpu -q, on a machine that has one."""

from pathlib import Path

import pytest
import torch

from lit_swa import GPT, Config
from lit_swa.checkpoint import load_model, save_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, Config]:
    """100 million random parameters in bfloat16."""
    config = Config(n_layer=8, n_head=16, n_embd=1024, intermediate_size=2816, vocab_size=8000)
    torch.manual_seed(0)
    save_checkpoint(GPT(config).bfloat16(), config, tmp_path_factory.mktemp("model"))
    return tmp_path_factory.getbasetemp() / "model0", config


def requested(when: str) -> int:
    """Bytes on the GPU without what the allocator rounds up; when: "current" or "peak"."""
    return torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_loading_takes_one_copy_of_the_gpus_memory(checkpoint, dtype) -> None:
    """Catches: a model that is on the GPU in two dtypes at once, weights that change on their way."""
    directory, config = checkpoint
    torch.cuda.reset_peak_memory_stats()
    before = requested("current")
    model = load_model(directory, dtype, "cuda")
    peak, held = requested("peak") - before, sum(p.nbytes for p in model.parameters())
    largest = 2 * max(p.numel() for p in model.parameters())  # bytes, as it is stored
    small = 2**20  # RoPE's frequencies
    assert held <= peak <= held + largest + small
    for (name, p), q in zip(model.named_parameters(), load_model(directory, dtype).parameters(), strict=True):
        assert torch.equal(p.cpu(), q), name


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_quantised_weights_are_never_all_dense_on_the_gpu(checkpoint, mode: str) -> None:
    """Catches: a dense model on the GPU, which need not hold it, on the way to one in 4 or 8 bits."""
    pytest.importorskip("bitsandbytes")
    directory, config = checkpoint
    torch.cuda.reset_peak_memory_stats()
    before = requested("current")
    model = load_model(directory, torch.bfloat16, "cuda", quantize=mode)
    peak, held = requested("peak") - before, requested("current") - before
    one_layer = config.n_embd * 2 * config.intermediate_size * (2 + 4 + 4)  # bfloat16, float32 and what is made of it
    assert held < 0.8 * sum(2 * p.numel() for p in load_model(directory).parameters())
    assert peak <= held + one_layer, (peak, held)
    with torch.inference_mode():
        assert model(torch.randint(0, 8000, (1, 16), device="cuda")).isfinite().all()
