"""The sums over older keys in linear attention by flash-linear-attention's kernels (github.com/fla-org), where they are
installed: pip install flash-linear-attention. Nothing here imports it before it is asked for.

A kernel sees keys up to a query's own place. Linear attention's older keys enter a window's length later, so the key at
place i of a call is here the one that becomes older with query i.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

ONES = 16  # columns beside the values, the first of ones: a row of the sums stays a multiple of 32 bytes

INSTALLED = all(importlib.util.find_spec(name) is not None for name in ("fla", "triton"))

State = tuple[Tensor, Tensor]


def older_sums(q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
    """For query i the sums of q_i . k_j v_j and of q_i . k_j over the keys j <= i and the state before them.

    q, k: features (B, H, T, F). v: (B, H, T, D). state: (B, H, F, D) and (B, H, F), float32. Returns (B, H, T, D) and
    (B, H, T), float32, and the state behind the call. There are no gates: with Triton 3.4 to 3.7.0 on a Hopper, the
    kernels refuse their backward, which would be wrong (fla-org/flash-linear-attention, issue 640).
    """
    from fla.ops.simple_gla import chunk_simple_gla

    (total, norm), D = state, v.size(-1)
    both = torch.cat([v, F.pad(torch.ones_like(v[..., :1]), (0, ONES - 1))], dim=-1)
    held = torch.cat([total, F.pad(norm[..., None], (0, ONES - 1))], dim=-1)
    q, k, both = (x.transpose(1, 2).contiguous() for x in (q, k, both))
    y, held = chunk_simple_gla(q, k, both, scale=1.0, initial_state=held.contiguous(), output_final_state=True)
    y = y.transpose(1, 2).to(total.dtype)
    return y[..., :D], y[..., D], (held[..., :D], held[..., D])
