"""A variant from outside the package, as tutorials/attention_variants.md builds it: sinks and a dilated window.

A query sees the first n_sink_tokens and, of the last 2 * S positions, every second.
"""

import contextlib
from collections.abc import Iterator

from torch import Tensor

from lit_swa import Config
from lit_swa.model import VARIANTS, Part, Variant

# ---8<--- the tutorial shows what lies between these lines
DILATION = 2


def dilated(q_pos: Tensor, k_pos: Tensor, config: Config) -> Tensor:
    back = q_pos - k_pos
    in_window = (back < DILATION * config.sliding_window_size) & (back % DILATION == 0)
    return in_window | (k_pos < config.n_sink_tokens)


def dilated_window(config: Config) -> int:
    return DILATION * config.sliding_window_size


ROW = Variant(
    (Part(dilated),),
    needs=("sliding_window_size",),
    fields=("n_sink_tokens",),
    window=dilated_window,
    sinks=lambda config: config.n_sink_tokens,
)
# ---8<---

FIELDS = {"attention": "dilated", "sliding_window_size": 4, "n_sink_tokens": 3}


@contextlib.contextmanager
def registered(row: Variant = ROW, name: str = "dilated") -> Iterator[None]:
    """Adds the row to VARIANTS, and takes it out again."""
    VARIANTS[name] = row
    try:
        yield
    finally:
        del VARIANTS[name]
