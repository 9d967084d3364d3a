"""Small models and texts that many tests share."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests run from a clone, installed or not

from lit_swa import GPT, Config  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(1234)


def tiny_config(**fields) -> Config:
    """Two layers, GQA with an odd number of query heads a group, a vocabulary of 97."""
    shape = {"n_layer": 2, "n_head": 6, "n_query_groups": 2, "n_embd": 48, "intermediate_size": 64, "vocab_size": 97, "block_size": 256}
    return Config(**shape | fields)


def randomize(model: torch.nn.Module) -> None:
    """Weights large enough that attention is far from uniform: a wrong mask shows in the logits."""
    for p in model.parameters():
        p.data.normal_(0, 0.2) if p.dim() > 1 else p.data.add_(torch.randn_like(p) * 0.1)


@pytest.fixture
def tiny_model() -> Callable[..., GPT]:
    def build(**fields) -> GPT:
        model = GPT(tiny_config(**fields)).eval()
        randomize(model)
        return model

    return build
