"""Small exchanges between the GPUs of one machine, there for speed only: in memory that all of them reach (PyTorch's
symmetric memory), in one kernel of peer_kernels.py, which takes less time than NCCL's."""

import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lit_swa.linear_formats import gpu_kernels

MOST_BYTES = 2**18  # of a tensor: larger ones are NCCL's


class Shared(NamedTuple):
    """What a rank needs to exchange tensors of a dtype with its group."""

    memory: Tensor  # its part of the memory, as exchange_kernel describes it
    handle: Any  # keeps the others' parts open
    bases: Tensor  # (size,) int64: where each rank's part begins
    counts: Tensor
    most: int  # elements of a tensor
    rank: int


SHARED: dict[tuple[str, torch.dtype], Shared] = {}  # name of a group, dtype -> what its ranks have set up


def peer_exchange(x: Tensor, group: Any = None, *, plus: Tensor | None = None, gather: bool = False) -> Tensor | None:
    """The sum of all ranks' x and of `plus`, the same bits on each, or with `gather` all x (size, *x.shape); None where
    NCCL or gloo is to make it."""
    if x.device.type != "cuda" or x.nbytes > MOST_BYTES or not x.is_contiguous() or not x.is_floating_point():
        return None
    group = group or dist.group.WORLD
    if not reaches_peers(group.size(), x.device):
        return None
    key = (group.group_name, x.dtype)
    if key not in SHARED:
        SHARED[key] = set_up(x, group)
    shared, size = SHARED[key], group.size()
    flags_at = 2 * size * MOST_BYTES
    exchange = gpu_kernels("peer_kernels").exchange
    return exchange(x, plus, shared.bases, shared.counts, flags_at, shared.most, shared.rank, gather)


def set_up(x: Tensor, group: Any) -> Shared:
    """Memory for tensors like x. All ranks are here at the same exchange."""
    from torch.distributed import _symmetric_memory as symmetric

    size, most = group.size(), MOST_BYTES // x.element_size()
    programs = most // gpu_kernels("peer_kernels").BLOCK
    with torch.inference_mode(False):
        memory = symmetric.empty(2 * size * MOST_BYTES + 4 * size * programs, dtype=torch.uint8, device=x.device)
        handle = symmetric.rendezvous(memory, group)
        memory.zero_()
        bases = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=x.device)
        counts = torch.zeros(programs, dtype=torch.int32, device=x.device)
    torch.cuda.synchronize(x.device)
    dist.barrier(group=group)  # nobody writes before all are empty
    return Shared(memory, handle, bases, counts, most, handle.rank)


def reaches_peers(size: int, device: torch.device) -> bool:
    """True if the ranks are on one machine, whose GPUs reach each other's memory."""
    if gpu_kernels() is None or int(os.environ.get("LOCAL_WORLD_SIZE", size)) != size:
        return False
    if not 1 < size <= torch.cuda.device_count():
        return False
    return all(torch.cuda.can_device_access_peer(device, n) for n in range(size) if n != device.index)


def forget_shared() -> None:
    """Free the memory that ranks share, before their group ends."""
    SHARED.clear()
