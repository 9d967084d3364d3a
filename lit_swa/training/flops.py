"""What a training step computes, beside what the device could: model FLOP utilisation, MFU.

Counted as Chowdhery et al. 2022 (arXiv 2204.02311, appendix B) do: 6 operations for each weight and token, and
12 * head_size for each query head, token and key that it sees. What is computed again in the backward does not count.
"""

import math

import torch

from lit_swa.config import VARIANTS, Config
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


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What a device computes in a second at most; None where that is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAKS.items() if key in name), None)


def count_weights(config: Config) -> int:
    return sum(math.prod(shape) for shape in expected_shapes(config).values())


def token_flops(config: Config, length: int) -> float | None:
    """Operations for a token of a text of so many, in a training step that trains every weight; None for models whose
    layers do not compute scores of pairs alone."""
    rows = [VARIANTS[name] for name in config.layer_variants]
    if config.s2_attention or any(row.mixer is not None for row in rows):
        return None
    pairs = 0.0
    for row in rows:
        most = length if row.window is None else row.window(config) + (row.sinks(config) if row.sinks else 0)
        most = min(most, length)
        pairs += (most * (most + 1) / 2 + (length - most) * most) / length
    return 6 * count_weights(config) + 12 * config.n_head * config.head_size * pairs
