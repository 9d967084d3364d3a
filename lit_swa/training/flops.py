"""What a training step computes, beside what the device could: model FLOP utilisation, MFU.

Counted as Chowdhery et al. 2022 (arXiv 2204.02311, appendix B) do: 6 operations for each token and weight that computes
for it, and 12 * head_size for each query head, token and key that it sees. What is computed again in the backward does
not count.
"""

import math

import torch

from lit_swa.config import VARIANTS, Config, Variant
from lit_swa.formats.hugging_face import expected_shapes

PEAKS = {  # operations per second with dense bfloat16 matrices, as the maker says; the first name that fits counts
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}

MOST_ASKED = 4096


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What a device computes in a second at most; None where that is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def count_weights(config: Config) -> int:
    return sum(math.prod(shape) for shape in expected_shapes(config).values())


def token_flops(config: Config, length: int, frozen: bool = False) -> float | None:
    """Operations for a token of a text of so many, in a training step; None for models whose layers do not compute
    scores of pairs alone. frozen: no weight gets a gradient, as under LoRA, whose own few operations do not count."""
    kinds = {config.kind_of(name, i): (name, i) for i, name in enumerate(config.layer_variants)}
    seen = {kind: keys_seen(VARIANTS[name], config.of_layer(i), length) for kind, (name, i) in kinds.items()}
    if config.s2_attention or None in seen.values():
        return None
    pairs = sum(seen[config.kind_of(v, i)] * config.of_layer(i).n_head for i, v in enumerate(config.layer_variants))
    return (4 if frozen else 6) * active_weights(config) + 12 * config.head_size * pairs


def active_weights(config: Config) -> float:
    """Weights that compute for a token: of the experts, as many as are chosen."""
    share = 1.0 if config.n_expert is None else config.n_expert_per_token / config.n_expert
    shapes = expected_shapes(config).values()
    return sum(math.prod(shape) * (share if len(shape) == 3 else 1.0) for shape in shapes)


def keys_seen(row: Variant, config: Config, length: int) -> float | None:
    """Keys that a query of a text sees in the mean, or of MOST_ASKED queries of a long one; None where the row does not
    say which these are."""
    if row.mixer is not None or any(part.reach is None or not part.run for part in row.parts):
        return None
    queries, total = range(0, length, -(-length // MOST_ASKED)), 0
    for q in queries:
        reaches = (part.reach(q, q + 1, config) for part in row.parts)
        total += sum(max(0, min(hi, q + 1) - max(lo, 0)) for lo, hi in reaches)
    return total / len(queries)
