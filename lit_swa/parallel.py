"""Tensor parallelism: each of several processes, its ranks, holds a part of every layer (Shoeybi et al. 2019,
arXiv 1909.08053), and all of them compute every token together.

    attn.qkv             rows: the rank's query heads, and the key and value heads that these read
    attn.proj            columns: those of the rank's query heads; the ranks' products are summed, then comes the bias
    mlp.fc_1, fc_2, fc   rows
    mlp.proj             columns, summed in the same way
    experts              each one's rows and columns so; their weighted sum is summed over the ranks
    attn.gate, sinks     those of the rank's query heads; norms of each head, too
    norms over heads     weights of the rank's heads; the ranks' squares are summed
    lm_head              rows of the vocabulary; each rank gets the logits of all
    wte, norms, RoPE     whole on each rank

Two sums in each block are all that ranks exchange, and the logits at the end. Attention is per head: every variant and
cache works as it is, on fewer heads. The logits of a rank are gathered from the others' by copying, so they are the
same bits on all ranks, and samplers with the same seed choose the same tokens: no choice needs to be sent.

For inference: no gradient flows through the sums. Shapes: V padded_vocab_size, G n_query_groups, as in model.py.
"""

import copy
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_swa.config import Config
from lit_swa.formats.files import LazyTensor, as_lazy
from lit_swa.head_norms import WholeNorm
from lit_swa.linear_formats import INJECTED, is_experts
from lit_swa.model import GPT
from lit_swa.peer_memory import peer_exchange

# A rank has a multiple of one of these of the MLP's inner outputs: whole groups of int4 weights.
UNITS = (128, 64, 32, 1)


class Rank(NamedTuple):
    """One of the processes that share a model."""

    index: int = 0  # 0 .. size - 1
    size: int = 1
    group: "dist.ProcessGroup | None" = None  # None: all processes of torch.distributed


ALONE = Rank()

# ------------------------------------------------------------------------------------------------- what ranks exchange


def sum_over_ranks(x: Tensor, group: Any = None, plus: Tensor | None = None) -> Tensor:
    """The sum of all ranks' x, the same bits on each, and of `plus`, which each of them has. May change x. Every sum of
    a forward is made here."""
    total = peer_exchange(x, group, plus=plus)
    if total is not None:
        return total
    dist.all_reduce(x, group=group)
    return x if plus is None else plus + x


def join_ranks(x: Tensor, size: int, group: Any = None) -> Tensor:
    """All ranks' x (..., n), one behind the other: (..., size * n)."""
    parts = peer_exchange(x, group, gather=True)  # (size, ..., n)
    if parts is None:
        parts = x.new_empty(size * x.size(0), *x.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        gather(parts, x, group=group)
        parts = parts.unflatten(0, (size, -1))
    return parts.movedim(0, -2).flatten(-2)


class RowParallelLinear(nn.Module):
    """A linear layer whose inputs are split over the ranks: their products are summed, and the bias is added once."""

    def __init__(self, linear: nn.Module, rank: Rank) -> None:
        """linear: the columns of this rank, with the bias of the whole layer."""
        super().__init__()
        self.group = rank.group
        if isinstance(linear.bias, nn.Parameter):
            self.bias = linear.bias
        else:
            self.register_buffer("bias", linear.bias)
        linear.bias = None
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.linear(x))

    def finish(self, y: Tensor, residual: Tensor | None = None) -> Tensor:
        """The layer's output, of the ranks' products; with a residual the sum of both."""
        y = sum_over_ranks(y, self.group, residual)
        return y if self.bias is None else y + self.bias


class VocabParallelLinear(nn.Module):
    """A last projection of which each rank holds some rows: (..., C) to logits of the whole vocabulary (..., V)."""

    def __init__(self, linear: nn.Module, rank: Rank, rows: int, vocabulary: int) -> None:
        """linear: the rows of this rank: `rows` of them, fewer on the last ranks if the vocabulary does not divide."""
        super().__init__()
        self.size, self.group, self.rows, self.vocabulary = rank.size, rank.group, rows, vocabulary
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.linear(x))

    def finish(self, y: Tensor) -> Tensor:
        """The logits of all ranks."""
        if y.size(-1) < self.rows:
            y = F.pad(y, (0, self.rows - y.size(-1)))
        return join_ranks(y.contiguous(), self.size, self.group)[..., : self.vocabulary]


# -------------------------------------------------------------------------------------------------- what a rank holds


class Part(NamedTuple):
    """Some rows or columns of a linear layer's weight (out, in)."""

    dim: int  # 0: rows, 1: columns
    ranges: tuple[tuple[int, int], ...]  # first and last + 1 of each run of them

    @property
    def size(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


def share(n: int, index: int, size: int) -> tuple[int, int]:
    """First and last + 1 of n things that one of `size` gets, about as many as the others."""
    return n * index // size, n * (index + 1) // size


def head_shares(config: Config, rank: Rank) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last + 1 of a rank's query heads, and of the key/value heads that these read.

    Ranks get whole groups of heads, and where there are more ranks than groups, heads of one group. That group's keys
    are then on several ranks. H = 8, G = 2 on four ranks: query heads 0-1, 2-3, 4-5, 6-7 with key heads 0, 0, 1, 1.
    """
    H, G = config.n_head, config.n_query_groups
    R = H // G
    if rank.size <= G:
        first, last = share(G, *rank[:2])
        return (first * R, last * R), (first, last)
    group = rank.index * G // rank.size
    mates = [i for i in range(rank.size) if i * G // rank.size == group]
    first, last = share(R, mates.index(rank.index), len(mates))
    return (group * R + first, group * R + last), (group, group + 1)


def vocabulary_rows(config: Config, rank: Rank) -> int:
    """How many rows of lm_head a rank has, but for the last ranks where that does not divide the vocabulary."""
    return -(-config.padded_vocab_size // rank.size)


def named_parts(config: Config, rank: Rank) -> dict[str, Part]:
    """Name of a linear layer or a stack of experts -> what the rank holds of it."""
    check_split(config, rank)
    inner, V, n = config.intermediate_size, config.padded_vocab_size, vocabulary_rows(config, rank)
    kinds = {
        "GatedMLP": mlp_parts("mlp", ("fc_1", "fc_2"), inner, rank),
        "PlainMLP": mlp_parts("mlp", ("fc",), inner, rank),
        "MoE": mlp_parts("mlp.shared", ("fc_1", "fc_2"), config.shared_expert_size, rank),
    }
    kinds["MoE"] |= mlp_parts("mlp", ("fc_1", "fc_2"), config.expert_size, rank)  # each expert's
    named = {}
    for i, mlp in enumerate(config.layer_mlps):
        parts = attention_parts(config.of_layer(i), rank) | kinds[mlp]
        named |= {f"transformer.h.{i}.{name}": part for name, part in parts.items()}
    return named | {"lm_head": Part(0, ((min(V, n * rank.index), min(V, n * (rank.index + 1))),))}


def attention_parts(config: Config, rank: Rank) -> dict[str, Part]:
    """What a rank holds of a layer's attention, for what config.of_layer gives."""
    H, G, D = config.n_head, config.n_query_groups, config.head_size
    (q0, q1), (k0, k1) = head_shares(config, rank)
    rows = [(q0, q1), (H + k0, H + k1), (H + G + k0, H + G + k1)]
    heads = ((q0 * D, q1 * D),)
    parts = {"attn.qkv": Part(0, tuple((a * D, b * D) for a, b in rows)), "attn.proj": Part(1, heads)}
    return parts | ({"attn.gate": Part(0, heads)} if config.attention_gate else {})


def mlp_parts(prefix: str, names: tuple[str, ...], inner: int | None, rank: Rank) -> dict[str, Part]:
    """What a rank holds of an MLP with so many inner outputs; None: there is no MLP."""
    if inner is None:
        return {}
    inside = (inner_share(inner, rank),)
    return {f"{prefix}.{name}": Part(0, inside) for name in names} | {f"{prefix}.proj": Part(1, inside)}


def inner_share(inner: int, rank: Rank) -> tuple[int, int]:
    """First and last + 1 of the inner outputs that a rank has: whole groups of int4 weights where there are enough."""
    unit = next(u for u in UNITS if inner % u == 0 and inner // u >= rank.size)
    first, last = share(inner // unit, *rank[:2])
    return first * unit, last * unit


def other_parts(config: Config, rank: Rank) -> dict[str, tuple[int, tuple[int, int]]]:
    """Name of a parameter that is no linear layer's -> the dimension that is cut, and the rank's part of it: norms of
    each head, learned sink logits."""
    named = {}
    for i in range(config.n_layer):
        parts = head_parts(config.of_layer(i), rank)
        named |= {f"transformer.h.{i}.{name}": part for name, part in parts.items()}
    return named


def head_parts(config: Config, rank: Rank) -> dict[str, tuple[int, tuple[int, int]]]:
    """other_parts of a layer, for what config.of_layer gives."""
    queries, keys = head_shares(config, rank)
    parts = {"attn.mixer.sink_logits": (0, queries)} if config.sink_logits else {}
    if config.norm_qk and config.norm_qk_type == "each":
        parts |= {"attn.norm_q.weight": (0, queries), "attn.norm_k.weight": (0, keys)}
    if config.norm_qk and config.norm_qk_type == "whole":
        D = config.head_size
        cut = {"q": (queries[0] * D, queries[1] * D), "k": (keys[0] * D, keys[1] * D)}
        parts |= {f"attn.norm_{x}.weight": (0, rows) for x, rows in cut.items()}
    return parts


def check_split(config: Config, rank: Rank) -> None:
    """Raises ValueError for more ranks than there are parts, and for what is not split."""
    if rank.size > 1 and "linear" in config.layer_variants:
        raise ValueError("Layers of linear attention are not split over processes: run the model in one.")
    layers = [config.of_layer(i) for i in range(config.n_layer)]
    H, G = min(own.n_head for own in layers), min(own.n_query_groups for own in layers)
    if rank.size > G and config.norm_qk and config.norm_qk_type == "whole":
        raise ValueError(
            f"The model norms all of its {G} key heads at once, and {rank.size} processes would have some of them "
            f"twice: use at most {G}."
        )
    counts = {"query heads": H, "inner outputs of its MLP": config.intermediate_size}
    counts |= {"inner outputs of an expert": config.expert_size, "of the shared expert": config.shared_expert_size}
    for what, count in counts.items():
        if count is not None and rank.size > count:
            raise ValueError(
                f"The model has {count} {what} and there are {rank.size} processes to hold them: use at most {count}."
            )


# ---------------------------------------------------------------------------------------------------- a tensor's part


def cut(tensor: LazyTensor, part: Part, linear: nn.Module, name: str) -> LazyTensor:
    """A part of a tensor that belongs to a linear layer (out, in): its weight, its bias, or the scales of either.

    A tensor has a row for each output, and a dimension 1 that the inputs divide: weights packed in bytes and scales of
    groups too. Rows cut all of a layer's tensors, columns those of two dimensions. Of a stack of experts each one's are
    cut so. Only the part is read.
    Raises ValueError where the part begins or ends within a packed number or a group.
    """
    dim = part.dim + is_experts(linear)
    if part.dim == 1 and len(tensor.shape) <= dim:
        return tensor
    whole, held = (linear.out_features, linear.in_features)[part.dim], tensor.shape[dim]
    if any(place * held % whole for pair in part.ranges for place in pair):
        raise ValueError(
            f"{name} keeps {whole // held} inputs together, and the processes would cut between them: use fewer "
            "processes, or a smaller group_size."
        )
    ranges = [(start * held // whole, stop * held // whole) for start, stop in part.ranges]
    pieces = [tensor.part(dim, *pair) for pair in ranges]
    if len(pieces) == 1:
        return pieces[0]
    shape = (sum(piece.shape[0] for piece in pieces), *tensor.shape[1:])  # rows of a linear layer
    return LazyTensor(shape, tensor.dtype, lambda: torch.cat([piece.load() for piece in pieces]))


def cut_linear(linear: nn.Module, part: Part, name: str) -> nn.Module:
    """A layer of the same class with a part of a layer's tensors, which are copied: the whole one can be freed.

    Any format will do that keeps a row for each output. Raises ValueError for one that does not.
    """
    features, rows = (linear.out_features, linear.in_features), int(is_experts(linear))  # rows: their dimension
    tensors = dict(linear.named_parameters()) | dict(linear.named_buffers())
    if any(tensor.dim() <= rows or tensor.size(rows) != features[0] for tensor in tensors.values()):
        raise ValueError(
            f"{name} is a {type(linear).__name__}, whose weight cannot be split: quantise with scripts/quantize.py."
        )
    piece = copy.copy(linear)
    piece._parameters, piece._buffers = dict(linear._parameters), dict(linear._buffers)
    for key, tensor in tensors.items():
        held = cut(as_lazy(tensor), part, linear, name)
        # torch.cat of meta tensors would import all of torch's compiler
        new = tensor.new_empty(held.shape) if tensor.is_meta else held.load().clone()
        setattr(piece, key, nn.Parameter(new, requires_grad=False) if key in piece._parameters else new)
    sizes = (part.size, features[1]) if part.dim == 0 else (features[0], part.size)
    piece.out_features, piece.in_features = sizes
    return piece.to(piece.weight.device)  # a format that keeps more beside its tensors forgets it, as at any move


# --------------------------------------------------------------------------------------------------- a model's part


def split_model(model: GPT, rank: Rank) -> GPT:
    """Keep a rank's part of a model, in place, and return it. Its config stays that of the whole model.

    From then on every rank must make the same calls of it. Caches that it has are dropped.
    Raises ValueError for more ranks than query heads, and for a layer that cannot be split: the model is then unusable.
    """
    if rank.size == 1:
        return model
    if any(name.rpartition(".")[2] in INJECTED for name, _ in model.named_modules()):
        raise ValueError("The model has LoRA or an adapter in it, which is not split: merge it first.")
    shrink(model, rank)
    connect(model, rank)
    return model


def shrink(model: GPT, rank: Rank, tensors: Mapping[str, LazyTensor] | None = None) -> dict[str, LazyTensor]:
    """Keep a rank's part of every linear layer, and of the stored tensors that are going to fill them, which are
    returned. Nothing can be computed until `connect`."""
    model.clear_kv_cache()
    for i, attn in enumerate(model.layers):
        (q0, q1), (k0, k1) = head_shares(model.config.of_layer(i), rank)
        attn.n_head, attn.n_query_groups = q1 - q0, k1 - k0
    tensors = dict(tensors or {})
    for name, part in named_parts(model.config, rank).items():
        if name == "lm_head" and model.config.tie_embeddings:
            continue
        linear = model.get_submodule(name)
        for key in [key for key in tensors if key.rpartition(".")[0] == name]:
            tensors[key] = cut(tensors[key], part, linear, name)
        model.set_submodule(name, cut_linear(linear, part, name))
    for name, (dim, (start, stop)) in other_parts(model.config, rank).items():
        module, _, key = name.rpartition(".")
        held = getattr(model.get_submodule(module), key).detach().narrow(dim, start, stop - start)
        setattr(model.get_submodule(module), key, nn.Parameter(held.clone(), requires_grad=False))
        if name in tensors:
            tensors[name] = tensors[name].part(dim, start, stop)
    return tensors


def connect_experts(moe: nn.Module, rank: Rank) -> None:
    """Let the ranks sum what their parts of the experts give, once for a block; the first rank adds the biases."""
    moe.join = functools.partial(sum_over_ranks, group=rank.group)
    for linear in (moe.proj, *(() if moe.shared is None else (moe.shared.proj,))):
        if rank.index > 0:
            linear.bias = None


def connect(model: GPT, rank: Rank) -> None:
    """Let the layers of a model that was shrunk exchange what they make with the other ranks'."""
    config = model.config
    for block in model.transformer.h:
        for module in (block.attn, *(() if block.moe else (block.mlp,))):
            module.proj = RowParallelLinear(module.proj, rank)
        if block.moe:
            connect_experts(block.mlp, rank)
        for norm in (block.attn.norm_q, block.attn.norm_k):
            if isinstance(norm, WholeNorm):
                norm.join = functools.partial(sum_over_ranks, group=rank.group)
    part = named_parts(config, rank)["lm_head"]
    if config.tie_embeddings:  # the rows are those of wte, which is whole
        ((start, stop),) = part.ranges
        model.lm_head = nn.Linear(config.n_embd, stop - start, bias=False, device="meta")
        model.lm_head.weight = nn.Parameter(model.transformer.wte.weight.detach()[start:stop])
    elif model.lm_head.out_features != part.size:  # it was tied until it was quantised
        model.lm_head = cut_linear(model.lm_head, part, "lm_head")
    model.lm_head = VocabParallelLinear(model.lm_head, rank, vocabulary_rows(config, rank), config.padded_vocab_size)
    model.requires_grad_(False)
