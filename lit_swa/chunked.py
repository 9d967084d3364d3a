"""attention="chunked" (Llama 4, 2025): a query sees the keys up to its own in its chunk of attention_chunk_size tokens.

attention_chunk_size = 3, T = 7 (row: query, column: key)

x . . . . . .
x x . . . . .
x x x . . . .
. . . x . . .
. . . x x . .
. . . x x x .
. . . . . . x
"""

from torch import Tensor

if __package__:
    from .config import VARIANTS, Config, Part, Variant
else:  # copied beside a script of another project
    from config import VARIANTS, Config, Part, Variant


def same_chunk(q_pos: Tensor, k_pos: Tensor, config: Config) -> Tensor:
    return q_pos // config.attention_chunk_size == k_pos // config.attention_chunk_size


def chunk_start(p: int, config: Config) -> int:
    return p // config.attention_chunk_size * config.attention_chunk_size


VARIANTS["chunked"] = Variant(
    (Part(same_chunk, reach=lambda a, b, c: (chunk_start(a, c), b), run=True),),
    needs=("attention_chunk_size",),
    window=lambda c: c.attention_chunk_size,
    edges=lambda a, b, c: range(chunk_start(a, c) + c.attention_chunk_size, b, c.attention_chunk_size),
)
