"""Small configs and weights that many tests build on."""

import torch

from lit_swa import Config


def tiny_config(**fields) -> Config:
    """Two layers, GQA with an odd number of query heads a group, a vocabulary of 97."""
    shape = {
        "n_layer": 2,
        "n_head": 6,
        "n_query_groups": 2,
        "n_embd": 48,
        "intermediate_size": 64,
        "vocab_size": 97,
        "block_size": 256,
    }
    return Config(**shape | fields)


def randomize(model: torch.nn.Module) -> None:
    """Weights large enough that attention is far from uniform, and gates forget: a wrong mask shows in the logits."""
    for name, p in model.named_parameters():
        p.data.normal_(0, 0.2) if p.dim() > 1 else p.data.add_(torch.randn_like(p) * 0.1)
        if "decay_" in name:
            p.data *= 100
