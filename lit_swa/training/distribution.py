"""Several devices: Lightning Fabric with DDP or FSDP, and weights that are sharded over devices made whole again.

DDP holds the whole model on each device and averages gradients. FSDP2 shards every weight, its gradient and its moments
over all devices, and gathers a block's weights when it runs (Zhao et al. 2023, arXiv 2304.11277). Hybrid sharding lies
in between: each group of devices shards a model of its own, and gradients are averaged over all groups.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

from lit_swa.exact_chunks import ExactChunks
from lit_swa.model import GPT
from lit_swa.training.precision import is_wide
from lit_swa.utils import check_devices, count_processes, pick_device

if TYPE_CHECKING:
    from lightning.fabric import Fabric

MAX_WAIT = timedelta(hours=6)  # so long the processes wait for the first, which reads the texts, or for each other


def start_fabric(args: Any) -> "tuple[Fabric, torch.dtype]":
    """Lightning Fabric with the processes that the arguments ask for, and the dtype of frozen weights and products.

    args: has device, devices, num_nodes, strategy and precision, as lit_swa.arguments.Training. Raises ValueError when
    Lightning is missing, or the machine lacks a device.
    """
    try:
        from lightning.fabric import Fabric
        from lightning.fabric.strategies import DDPStrategy
    except ImportError:
        raise ValueError("Training needs Lightning Fabric: pip install lightning.") from None
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # no hints to trade precision for speed
    device = pick_device(args.device)
    kind = device.split(":")[0]
    if kind == "cuda":
        use_whole_memory()
    precision = args.precision
    if precision == "auto":
        precision = "bf16-true" if kind == "cuda" and torch.cuda.is_bf16_supported() else "32-true"
    if kind == "cuda" and precision != "32-true":
        use_tf32()  # for what stays float32, as linear attention
    count, num_nodes = count_processes(args.devices, args.num_nodes)
    check_devices(device, count)
    devices = [int(device.split(":")[1])] if ":" in device and count == 1 else count
    strategy: Any = "auto"
    if args.strategy == "fsdp":
        strategy = fsdp_strategy(count * num_nodes, args.shard_size)
    elif count * num_nodes > 1:
        # No buffers are sent: RoPE's frequencies and quantized weights are each device's own. torch's new argument for
        # that, which it recommends instead, would still send them once.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        strategy = DDPStrategy(broadcast_buffers=False, timeout=MAX_WAIT)
    fabric = Fabric(
        accelerator=kind,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        precision="bf16-mixed" if precision == "bf16-mixed" else "32-true",  # bf16-true is made by train_in_float32
    )
    fabric.launch()
    return fabric, torch.bfloat16 if precision == "bf16-true" else torch.float32


def use_tf32() -> None:
    """Let a GPU round the inputs of products in float32 to TF32. Beside bfloat16 they are hardly finer."""
    torch.set_float32_matmul_precision("high")


def use_whole_memory() -> None:
    """Let torch grow its pieces of GPU memory, so that none is lost between texts of many lengths.

    Call it before the GPU is first used. PYTORCH_CUDA_ALLOC_CONF or PYTORCH_ALLOC_CONF, if set, decides instead.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def fsdp_strategy(world_size: int, shard_size: int | None = None) -> Any:
    """FSDP2, a block at a time, over groups of shard_size devices in a row; None: over all. Raises ValueError when
    groups of that size do not make up all devices."""
    from lightning.fabric.strategies import ModelParallelStrategy

    if shard_size is not None and world_size % shard_size:
        raise ValueError(f"shard_size={shard_size} does not divide the {world_size} processes: give a divisor.")

    def shard(model: nn.Module, mesh: Any) -> nn.Module:
        return shard_weights(model, mesh["data_parallel"] if shard_size is None else mesh)  # (copies, devices of one)

    # Fabric's second dimension is there for tensors in parallel, and does for shards.
    sizes = (world_size, 1) if shard_size is None else (world_size // shard_size, shard_size)
    return ModelParallelStrategy(shard, data_parallel_size=sizes[0], tensor_parallel_size=sizes[1], timeout=MAX_WAIT)


def shard_weights(model: GPT, mesh: Any) -> nn.Module:
    """FSDP2, a block at a time. Weights that are held in float32 and used in less are rounded before they are gathered:
    half of the bytes are sent, and no copies wait for the backward. With them are the few weights of their block that
    one device uses unrounded: norms, sinks, linear attention's. Gradients are added up in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def policy(module: nn.Module) -> Any:
        dtypes = (model.dtype, torch.float32) if any(map(is_wide, module.modules())) else ()
        return MixedPrecisionPolicy(*dtypes, cast_forward_inputs=False)  # a block is given angles, which stay wide

    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy(block))
    return fully_shard(model, mesh=mesh, mp_policy=policy(model.lm_head))


def is_sharded(fabric: "Fabric") -> bool:
    """True if no device holds all weights."""
    from lightning.fabric.strategies import ModelParallelStrategy

    return isinstance(fabric.strategy, ModelParallelStrategy)


def loading_device(fabric: "Fabric") -> torch.device:
    """Where a model is loaded. One that is sharded may be larger than a device: it stays in its file's pages, in the
    CPU's memory, until each block is moved to the device and sharded there."""
    return torch.device("cpu") if is_sharded(fabric) else fabric.device


def count_shards(fabric: "Fabric", args: Any) -> int:
    """Over how many devices each weight is sharded; 1: a device holds all weights."""
    return (args.shard_size or fabric.world_size) if is_sharded(fabric) else 1


def unwrapped(model: nn.Module) -> GPT:
    """The GPT inside the modules that hold it as their `module`: Fabric's, DDP's, and those of a loss of its own."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def reader(model: nn.Module) -> nn.Module:
    """What reads a text in a module that holds a GPT: the GPT, or what cuts texts into chunks for it."""
    while not isinstance(model, ExactChunks) and isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


# -------------------------------------------------------------------------------------------------------- whole weights
#
# torch.distributed.checkpoint.state_dict does this too, but it reads model.state_dict(), which fails where the frozen
# weights are held in 8 bits, and gives tied weights twice.


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gather(x: Tensor) -> Tensor:
    """x on the CPU, whole. Every process must call it if x is sharded."""
    x = x.detach()
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).cpu()


def copy_into(held: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into `held`, which may be sharded."""
    if hasattr(held, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(held.device, held.dtype), held.device_mesh, held.placements)
    held.copy_(value)


def reshard(model: nn.Module) -> None:
    """Shard the weights again that FSDP leaves gathered after a forward."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


@contextmanager
def whole_weights(model: nn.Module, keep: bool) -> Iterator[None]:
    """Within it, trained weights that are sharded are whole, on the CPU, where `keep` is set.

    Every process must enter it, and none may run the model inside.
    """
    sharded = []
    reshard(model)
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and p.requires_grad and hasattr(p, "full_tensor"):
                whole = gather(p)
                if keep:
                    sharded.append((module, name, p))
                    module._parameters[name] = nn.Parameter(whole)
    try:
        yield
    finally:
        for module, name, p in sharded:
            module._parameters[name] = p
