"""A model whose blocks lie on several devices, one run of blocks after the other, and whose weights may wait in the
CPU's memory for their turn.

Embeddings, the last norm and the last projection are on the first device: tied weights are there once, and tokens are
chosen there. Each block's cache is on its device. One device works at a time: this makes room, not speed.

Blocks that wait ("offload"): the device has two places for them. While one block computes in one place, the next one
comes into the other, on a stream of its own. The weights of a block always come to the same place. Spread evenly
between the blocks that stay, so that each copy has as much time as possible:

    5 of 10 blocks wait        0  (1)  2  (3)  4  (5)  6  (7)  8  (9)
    their places                   A       B       A       B       A      9 is followed by 1, into the same place
"""

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from lit_swa.checks import check_range
from lit_swa.generate import cache_bytes, live_elements
from lit_swa.memory import SLACK, format_bytes, free_memory, require_memory
from lit_swa.model import GPT, Mixer
from lit_swa.rope import RoPE, Span
from lit_swa.utils import check_devices, pick_device

ALIGNMENT = 256  # bytes between the beginnings of a block's tensors, as torch itself aligns them
READ_AT_ONCE = 512  # tokens of a prompt that there should be room for beside the weights


class Placement(NamedTuple):
    """Where the blocks of a model are."""

    devices: list[torch.device]
    stages: list[int]  # for each block, which of the devices it is on
    waits: list[bool]  # for each block, whether its weights are in the CPU's memory until its turn

    def __str__(self) -> str:
        """Such as "blocks 0-14 on cuda:0 (5 from the CPU's memory), 15-31 on cuda:1; embeddings ..."."""
        parts = []
        for stage, device in enumerate(self.devices):
            blocks = [i for i, s in enumerate(self.stages) if s == stage]
            waiting = sum(self.waits[i] for i in blocks)
            ends = dict.fromkeys((blocks[0], blocks[-1]))  # one, if it is the same
            few = f" ({waiting} from the CPU's memory)" if waiting else ""
            parts.append(f"{'-'.join(map(str, ends))} on {device}{few}")
        return f"blocks {', '.join(parts)}; embeddings and the last projection on {self.devices[0]}"


# ----------------------------------------------------------------------------------------------------- which goes where


def find_devices(count: int | None, device: str) -> list[torch.device]:
    """So many devices of this name; None: all that there are. A CPU counts as any number of devices, to try it out.

    Raises ValueError for devices that this machine lacks.
    """
    name = pick_device(device)
    if count is not None:
        check_range("devices", count, 1, 4096)
    if name != "cuda":
        if ":" in name and count not in (None, 1):
            raise ValueError(f"device={device!r} is one device and devices={count}: use --device cuda.")
        check_devices(name, 1)
        return [torch.device(name)] * (count or 1)
    check_devices(name, count or 1)
    return [torch.device("cuda", i) for i in range(count or torch.cuda.device_count())]


def place_blocks(model: GPT, devices: Sequence[torch.device], offload: int | None = None, tokens: int = 0) -> Placement:
    """Share the blocks of a model, wherever it is, out to devices: about as many bytes to each, embeddings counted.

    offload: how many blocks wait in the CPU's memory; None: as few as the devices' free memory allows.
    tokens: how long a text there should be room for in the caches.
    Raises ValueError for more devices than blocks, more waiting blocks than there are, and devices that are too small.
    """
    L, devices = model.config.n_layer, list(devices)
    if len(devices) > L:
        raise ValueError(f"The model has {L} blocks and there are {len(devices)} devices: use at most {L}.")
    if offload is not None and not 0 <= offload <= L:
        raise ValueError(f"offload={offload} does not fit: the model has {L} blocks.")
    block, outside = max(map(bytes_of, model.transformer.h)), bytes_outside(model)
    ends = share_evenly(L, len(devices), outside / block)
    stages = [stage for stage, (a, b) in enumerate(zip([0, *ends], ends)) for _ in range(a, b)]  # noqa: B905
    waits: list[bool] = []
    for stage, device in enumerate(devices):
        n = stages.count(stage)
        if offload is None:
            taken = needed_beside(model, n, tokens) + (outside if stage == 0 else 0)
            room = math.inf if device.type == "cpu" else free_memory(device) - taken  # a CPU holds the blocks already
            waiting = n - fitting(n, block, room, device)
        else:
            before = len(waits)
            waiting = offload * (before + n) // L - offload * before // L
        waits += [(j + 1) * waiting // n > j * waiting // n for j in range(n)]
    return Placement(devices, stages, waits)


def share_evenly(n: int, shares: int, before: float) -> list[int]:
    """Where each share of n blocks ends: at least one block each, and of `before` blocks more that the first has."""
    ends = [round((n + before) * (i + 1) / shares - before) for i in range(shares)]
    return [min(max(end, i + 1), n - (shares - 1 - i)) for i, end in enumerate(ends)]


def fitting(n: int, block: int, room: float, device: torch.device) -> int:
    """How many of n blocks can stay on a device with so many bytes left. Raises ValueError if not even a waiting one
    has a place."""
    if n * block <= room:
        return n
    if 2 * block > room:
        raise ValueError(
            f"{device} has no room for two blocks of {format_bytes(block)} each, beside what always lies there: use a "
            "smaller dtype, quantised weights, a shorter text or more devices."
        )
    return int(room // block) - 2  # two places for those that wait


def needed_beside(model: GPT, blocks: int, tokens: int) -> int:
    """Bytes that a device needs for the caches of its blocks and the activations of a call."""
    caches = cache_bytes(model, 1, max(1, model.cache_length(tokens))) * blocks // model.config.n_layer
    size = model.transformer.wte.weight.element_size()
    return caches + min(READ_AT_ONCE, max(1, tokens)) * live_elements(model.config) * max(size, 4) + SLACK[1]


def bytes_of(module: nn.Module) -> int:
    return sum(t.nbytes for t in tensors_of(module))


def bytes_outside(model: GPT) -> int:
    """Bytes of what is not in the blocks, tied weights once."""
    inside = {id(t) for t in tensors_of(model.transformer.h)}
    return sum(t.nbytes for t in tensors_of(model) if id(t) not in inside)


def tensors_of(module: nn.Module) -> list[Tensor]:
    """The weights of a module, each once."""
    return list({id(t): t for t in (*module.parameters(), *module.buffers())}.values())


# ----------------------------------------------------------------------------------------------------- putting it there


def spread(model: GPT, placement: Placement) -> GPT:
    """Put a model's weights where the placement says, in place, and return it. It can then only infer."""
    model.clear_kv_cache()
    model.requires_grad_(False)
    waiting = sum(bytes_of(block) for block, waits in zip(model.transformer.h, placement.waits, strict=True) if waits)
    if any(device.type == "cuda" for device in placement.devices):  # their copies cannot be swapped out
        require_memory(waiting, torch.device("cpu"), "The blocks that wait", "let fewer wait (--offload)")
    first = placement.devices[0]
    for module in (model.transformer.wte, model.transformer.ln_f, model.lm_head, model.rope):
        module.to(first)
    model.tie_weights()
    model.transformer.ln_f.register_forward_pre_hook(functools.partial(bring_input, first))
    for stage, device in enumerate(placement.devices):
        rope = copy.deepcopy(model.rope).to(device)
        blocks = [block for block, s in zip(model.transformer.h, placement.stages, strict=True) if s == stage]
        for block in blocks:
            block.attn.mixer = PlacedMixer(block.attn.mixer, stage, device, rope)
            block.register_forward_pre_hook(functools.partial(bring_input, device))
        waits = [w for w, s in zip(placement.waits, placement.stages, strict=True) if s == stage]
        for block, w in zip(blocks, waits, strict=True):
            if not w:
                block.to(device)
        if any(waits):
            Ferry([block for block, w in zip(blocks, waits, strict=True) if w], device)
    return model


def bring_input(device: torch.device, module: nn.Module, args: tuple) -> tuple:
    """A module's input on its device; kernels that go by the current device find it there too."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return (args[0].to(device), *args[1:])


class PlacedMixer(Mixer):
    """A mixer on a device of its own: its cache is there, and so is what it plans. Layers share both by device."""

    def __init__(self, mixer: Mixer, stage: int, device: torch.device, rope: RoPE) -> None:
        super().__init__(mixer.config, f"{mixer.variant} {stage}", mixer.layer)
        self.mixer, self.device, self.rope = mixer, device, (rope,)  # in a tuple: it is no part of each layer
        for name in ("window", "n_sinks", "rolls", "any_length"):
            setattr(self, name, getattr(mixer, name))

    def cache_length(self, tokens: int) -> int:
        return self.mixer.cache_length(tokens)

    def new_cache(self, *size: Any, device: torch.device | str, **more: Any) -> Any:
        place = device if torch.device(device).type == "meta" else self.device  # meta: only its size is wanted
        return self.mixer.new_cache(*size, device=place, **more)

    def plan(self, pos: Tensor, span: Span, cache: Any, rope: RoPE) -> Any:
        return self.mixer.plan(pos.to(self.device, non_blocking=True), span, cache, self.rope[0])

    def join(self, texts: list[tuple[int, Any]]) -> Any:
        return self.mixer.join(texts)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Any, cache: Any) -> Tensor:
        return self.mixer(q, k, v, plan, cache)


# ----------------------------------------------------------------------------------------------------- blocks that wait


class Ferry:
    """Brings the weights of blocks that wait in the CPU's memory to a device, each before its turn.

    A block's tensors are views of its place on the device: nothing is allocated while the model runs.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        """The blocks, in the order of their turns. Each keeps this object by its hooks."""
        self.device, n_places = device, min(2, len(blocks))
        self.held = [layout_of(block)[1] for block in blocks]
        size = max(self.held)
        self.places = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(n_places)]
        self.inside: list[int | None] = [None] * n_places  # the block whose weights are there, or on the way
        self.home: list[Tensor] = []
        cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if cuda else None
        self.arrived = [torch.cuda.Event() for _ in range(n_places)] if cuda else []
        for n, block in enumerate(blocks):
            self.home.append(pack(block, self.places[n % n_places], pin=cuda))
            block.register_forward_pre_hook(functools.partial(self.before, n))
            block.register_forward_hook(functools.partial(self.after, n))

    def before(self, n: int, block: nn.Module, args: tuple) -> None:
        """Block n is about to run: its weights are in their place, or will be when the device gets there."""
        place = n % len(self.places)
        if self.inside[place] != n:  # the first time, or after a call that was broken off
            self.bring(n)
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived[place])

    def after(self, n: int, block: nn.Module, args: tuple, output: Tensor) -> None:
        """Block n has run, so its place is free for the next one there; after the last comes the first."""
        following = n + len(self.places)
        self.bring(following if following < len(self.home) else n % len(self.places))

    def bring(self, n: int) -> None:
        """Copy block n to its place, once the device has done all that it was given."""
        place = n % len(self.places)
        if self.inside[place] == n:
            return
        self.inside[place] = n
        target = self.places[place][: self.home[n].numel()]
        if self.stream is None:
            target.copy_(self.home[n])
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(self.home[n], non_blocking=True)
            self.arrived[place].record(self.stream)


def layout_of(block: nn.Module) -> tuple[list[int], int]:
    """Where in one run of bytes each of a block's tensors begins, and how long that run is."""
    starts, end = [], 0
    for tensor in tensors_of(block):
        starts.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return starts, end


def pack(block: nn.Module, place: Tensor, pin: bool) -> Tensor:
    """Copy a block's tensors into one run of bytes in the CPU's memory, which is returned, and make them views of a
    place on a device that such a run is going to be copied to."""
    starts, size = layout_of(block)
    home = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    views: dict[int, Tensor] = {}
    for start, tensor in zip(starts, tensors_of(block), strict=True):
        whole = slice(start, start + tensor.nbytes)
        home[whole].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        views[id(tensor)] = place[whole].view(tensor.dtype).view(tensor.shape)
    for module in block.modules():
        for key, p in module._parameters.items():
            module._parameters[key] = None if p is None else nn.Parameter(views[id(p)], requires_grad=False)
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else views[id(buffer)]
    return home
