"""What a training step will need of memory, before it is made.

The blocks are run on tensors without numbers, and what they would allocate and keep is counted: so the estimate holds
for every variant, adapter and precision. Layers that are alike are run once; from what each of them keeps follows the
course of the whole step, whichever of them compute their activations again.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_swa.config import IGNORED
from lit_swa.model import GPT, Call
from lit_swa.training.loop import Batch
from lit_swa.training.precision import copies_for_backward, is_wide


class Cost(NamedTuple):
    """Bytes that a part of the model takes, beyond its weights and its input."""

    forward: int  # the most in the forward
    kept: int  # after it, for the backward, with the output
    output: int
    backward: int  # the most in the backward, what is kept and all gradients included; 0: there is none
    gradients: int  # of the weights, after the backward
    trained: bool  # the output has a gradient


class Parts(NamedTuple):
    embedding: Cost
    layers: list[Cost]
    loss: Cost


class Estimate(NamedTuple):
    """Bytes of a training step on one device."""

    weights: int
    gradients: int  # of all trained weights
    moments: int  # AdamW's
    update: int  # the most that AdamW needs beside them for one weight
    activations: tuple[int, ...]  # with the gradients, by how many layers compute theirs again: 0, 1, ..., all

    def beside_weights(self, recomputed: int) -> int:
        """The most that is allocated beside the weights."""
        return self.moments + max(self.activations[recomputed], self.gradients + self.update)


def estimate_step(
    model: GPT, batch: Batch, accumulates: bool, precision: Callable[[], Any], shards: int = 1
) -> Estimate:
    """The memory of a step that reads this micro-batch, alone or (accumulates) after others.

    precision: gives the context that the model runs in. shards: over how many devices FSDP shards weights, gradients
    and moments. Beside its part a device then holds the embedding and the last projection whole while a step runs, and
    two blocks, since FSDP gathers one ahead. Raises RuntimeError when a part of the model looks at numbers.
    """
    weights = {id(p): p for p in (*model.parameters(), *model.buffers())}.values()
    trained = [p for p in model.parameters() if p.requires_grad]
    sizes = [p.numel() * p.element_size() for p in trained]
    where = (batch.targets.flatten() != IGNORED).nonzero()[:, 0]
    state = torch.get_rng_state()
    with without_compiler(model):
        call = model.plan_call(batch.idx, None, documents=batch.documents)  # with numbers: masks and angles are needed
        with Tracker() as tracker, precision():
            parts = measure_parts(tracker, model, call, batch, where)
    torch.set_rng_state(state)
    gradients, total = sum(sizes) // shards, sum(p.nbytes for p in weights)
    if shards > 1:
        parts, total = sharded_parts(parts, model, shards), total // shards + gathered_bytes(model)
    held = sum(sizes) if accumulates else 0  # FSDP adds them up before it shards them
    activations = tuple(course(parts, n, held) for n in range(len(parts.layers) + 1))
    return Estimate(total, gradients, 2 * gradients, 2 * max(sizes, default=0) // shards, activations)


@contextmanager
def without_compiler(model: GPT) -> Iterator[None]:
    """Within it nothing is compiled: what torch is first asked to compile for tensors without numbers, it compiles for
    no others later. On a GPU windows are planned for FlashAttention, which takes such tensors, and as much memory as
    other kernels. FlexAttention, which reads windows below 1,024 beside sinks, takes up to a fifth more."""
    device = model.transformer.wte.weight.device
    configs = {id(attn.mixer.config): attn.mixer.config for attn in model.layers}.values()
    chosen = [config.attention_backend for config in configs]
    for config in configs:
        if device.type == "cuda" and config.attention_backend != "sdpa":
            config.attention_backend = "flash"
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for config, backend in zip(configs, chosen, strict=True):
            config.attention_backend = backend


def gathered_bytes(model: GPT) -> int:
    """The most that FSDP gathers at a time: the embeddings, the last norm and the head, a block and the next; and what
    it does not shard."""

    def whole(module: nn.Module, root: nn.Module) -> int:
        wide = any(map(is_wide, root.modules()))
        return sum(p.numel() * (model.dtype.itemsize if wide else p.element_size()) for p in module.parameters())

    blocks = [whole(block, block) for block in model.transformer.h]
    rest = nn.ModuleList([model.transformer.wte, model.transformer.ln_f, model.lm_head])
    return whole(rest, model.lm_head) + sum(b.nbytes for b in model.buffers()) + 2 * max(blocks)


def sharded_parts(parts: Parts, model: GPT, shards: int) -> Parts:
    """What the parts take under FSDP, which rounds wide weights before it gathers them: no copies wait for the
    backward, whose gradients are as narrow, until they are added up and sharded."""
    modules = (model.transformer.wte, *model.transformer.h, model.lm_head)
    found = []
    for cost, module in zip((parts.embedding, *parts.layers, parts.loss), modules, strict=True):
        copies, gradients = copies_for_backward(module, model.dtype), cost.gradients
        less = copies + (gradients - gradients * model.dtype.itemsize // 4 if copies else 0)
        kept = max(cost.output, cost.kept - copies)  # a loss that is differentiated at once keeps none
        cost = cost._replace(forward=cost.forward - copies, kept=kept, backward=cost.backward - less)
        found.append(cost._replace(gradients=gradients // shards))
    embedding, *layers, loss = found
    return Parts(embedding, layers, loss)


class Tracker(TorchDispatchMode):
    """Within it tensors have no numbers, and what would be allocated is counted until it would be freed."""

    def __init__(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.live = self.peak = 0
        self.seen: dict[int, weakref.ref] = {}  # storages
        self.given: dict[int, tuple[Tensor, Tensor]] = {}  # weights and parts of the plan, which are there already

    def __enter__(self) -> "Tracker":
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.fake.__exit__(*error)

    def __torch_dispatch__(self, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and not hasattr(x, "fake_mode") and id(x) not in self.given:
                self.given[id(x)] = x, self.fake.from_tensor(x)
                self.count(self.given[id(x)][1], size=0)
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.count(x)
        return result

    def count(self, x: Tensor, size: int | None = None) -> None:
        storage = x.untyped_storage()
        key, size = id(storage), storage.nbytes() if size is None else size
        if key in self.seen:
            return

        def free(_: Any) -> None:
            self.live -= size
            del self.seen[key]

        self.seen[key] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)

    def measure(self, run: Callable[[], Tensor], weights: list[nn.Parameter]) -> Cost:
        """What run() and its backward take."""
        start = self.peak = self.live
        y = run()
        forward, kept, trained = self.peak - start, self.live - start, y.requires_grad
        self.peak = self.live
        if trained:
            y.backward(torch.ones_like(y))
        size = sum(p.grad.nbytes for p in weights if p.grad is not None)
        cost = Cost(forward, kept, y.nbytes, self.peak - start if trained else 0, size, trained)
        for p in weights:
            p.grad = None
        return cost


def measure_parts(tracker: Tracker, model: GPT, call: Call, batch: Batch, where: Tensor) -> Parts:
    """The costs of every part for this micro-batch. where: its tokens that have a target."""
    embedding = tracker.measure(lambda: model.transformer.wte(batch.idx), list(model.transformer.wte.parameters()))
    B, T = batch.idx.shape
    shape, dtype = (B * call.texts, T // call.texts, model.config.n_embd), model.dtype
    known, layers, trained = {}, [], embedding.trained
    for block in model.transformer.h:
        flags = [(name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters()]
        alike = (block.attn.mixer.kind, trained, repr(block), *flags)
        if alike not in known:
            x = torch.empty(shape, dtype=dtype, device=batch.idx.device, requires_grad=trained)
            known[alike] = tracker.measure(functools.partial(block, x, call), list(block.parameters()))
            del x
        layers.append(known[alike])
        trained = trained or known[alike].trained
    x = torch.empty(shape, dtype=dtype, device=batch.idx.device, requires_grad=trained)
    targets = batch.targets.flatten()
    head = [*model.lm_head.parameters(), *model.transformer.ln_f.parameters()]
    loss = tracker.measure(lambda: model.sum_nll(x.flatten(0, 1)[where], targets[where]), head)
    return Parts(embedding, layers, loss)


def course(parts: Parts, recomputed: int, accumulated: int) -> int:
    """The most that a forward and backward take if so many layers compute their activations again.

    accumulated: the bytes of gradients that are there already; 0: they come with the backward.
    """
    embedding, layers, loss = parts
    held = [c.output if i < recomputed else c.kept for i, c in enumerate(layers)]
    live = peak = accumulated + embedding.kept
    for cost, kept in zip(layers, held, strict=True):
        peak = max(peak, live + cost.forward)
        live += kept
    peak = max(peak, live + loss.forward, live + loss.backward)
    arriving = embedding.output  # the gradient of what the part has put out
    live += arriving + loss.gradients * (not accumulated)
    for cost, kept in zip(reversed(layers), reversed(held), strict=True):
        live -= kept
        peak = max(peak, live + cost.forward, live - arriving + cost.backward)
        live += cost.gradients * (not accumulated)
    return max(peak, live - arriving + embedding.backward)
