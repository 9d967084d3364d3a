"""Small sums over the GPUs of one machine, there for speed only: each rank reads the others' numbers from their memory,
in one kernel of PyTorch's symmetric memory, where NCCL passes them round."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MOST_BYTES = 2**18  # of a sum: larger ones are NCCL's
SIZES = 2, 4, 8  # numbers of ranks for which the kernel adds in the same order on each, so that all get the same bits
BUFFERS: dict[tuple[str, torch.dtype], Tensor] = {}  # name of a group, dtype -> memory that all its ranks can read


def peer_sum(x: Tensor, group: Any = None) -> Tensor | None:
    """The sum of all ranks' x, the same bits on each; None where NCCL or gloo is to make it."""
    if x.device.type != "cuda" or x.nbytes > MOST_BYTES or x.dtype not in (torch.bfloat16, torch.float32):
        return None
    group = group or dist.group.WORLD
    if not reaches_peers(group.size(), x.device):
        return None
    key = (group.group_name, x.dtype)
    if key not in BUFFERS:  # all ranks are here at the same sum
        from torch.distributed import _symmetric_memory as symmetric

        buffer = symmetric.empty(MOST_BYTES // x.element_size(), dtype=x.dtype, device=x.device)
        symmetric.rendezvous(buffer, group)
        BUFFERS[key] = buffer
    flat = x.reshape(-1)
    return torch.ops.symm_mem.one_shot_all_reduce_copy(BUFFERS[key][: flat.numel()], flat, "sum", key[0]).view_as(x)


def reaches_peers(size: int, device: torch.device) -> bool:
    """True if the ranks are on one machine, whose GPUs read each other's memory."""
    if size not in SIZES or int(os.environ.get("LOCAL_WORLD_SIZE", size)) != size or torch.version.hip:
        return False
    if torch.cuda.device_count() < size or not hasattr(torch.ops.symm_mem, "one_shot_all_reduce_copy"):
        return False
    return all(torch.cuda.can_device_access_peer(device, n) for n in range(size) if n != device.index)


def forget_buffers() -> None:
    """Free the memory that ranks share: before their group ends."""
    BUFFERS.clear()
