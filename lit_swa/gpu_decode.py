"""A decode step on a GPU, there for speed only: one CUDA graph of few kernels (decode_kernels.py).

For each block these are norm and qkv; RoPE, the cache's writes and attention; projection and residual; norm, gate and
activation; projection and residual. No shape in it depends on a position, and the host never looks at one. What the
kernels do not know runs as model.py defines it, inside the same graph.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_swa.linear import LinearAttention
from lit_swa.linear import Plan as LinearPlan
from lit_swa.linear_formats import gpu_kernels
from lit_swa.model import (
    ACTIVATIONS,
    GPT,
    Block,
    Call,
    CausalSelfAttention,
    GatedMLP,
    Part,
    PlainMLP,
    RMSNorm,
    Slots,
    SoftmaxAttention,
    Span,
)

WARM_UPS = 2  # calls of a shape before it is recorded
ACTIVATION_NAMES = {function: name for name, function in ACTIVATIONS.items()}


class SlotPlan(NamedTuple):
    """What the attention kernel must know of a call on T tokens and L slots; one for all layers of a kind."""

    cos: Tensor  # (parts, 1 or B, T, rope_n_elem), of queries
    sin: Tensor
    k_cos: Tensor  # (1 or B, T, rope_n_elem)
    k_sin: Tensor
    seen: Tensor  # (B, T, L + T) int8, what slots held and the call's own keys: 0, or 1 + the part that sees it
    blocks: Tensor  # (1 or B, 1 + blocks) int64: how many blocks of KEYS slots hold one that a query sees, and which
    slots: Tensor  # (1 or B, copies, T) int64: where each key goes; -1: nowhere
    counts: Tensor  # (B * G,) int32, zeros: which programs are done; G of the layer with most


class StatePlan(NamedTuple):
    """What the kernel of linear attention must know of a call of one token."""

    plan: LinearPlan
    counts: Tensor  # (B * (H + G),), as in SlotPlan


class Step:
    """step(idx (B, T), input_pos (T,) or (B, T)) -> logits (B, T, padded_vocab_size), recorded for each shape.

    The graphs read and write the caches that the model had when they were recorded. For others they are recorded anew,
    which takes a fraction of a second; those of caches that are gone go with them. The weights must stay in place.
    """

    def __init__(self, model: GPT, tokens: int = 1) -> None:
        self.model, self.most_tokens = model, tokens
        self.recorded: weakref.WeakKeyDictionary[nn.Module, dict[tuple, Recording]] = weakref.WeakKeyDictionary()
        self.pool: Any = None  # the memory that all graphs share

    @torch.inference_mode()
    def __call__(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        shapes = self.recorded.setdefault(self.model.caches[0], {})
        key = (*idx.shape, input_pos.dim())
        recording = shapes.setdefault(key, Recording())
        recording.calls += 1
        with torch.cuda.device(idx.device):  # where Triton launches
            if recording.calls <= WARM_UPS:
                return self.run(idx, input_pos)
            if recording.graph is None:
                if not any(other.graph for kept in self.recorded.values() for other in kept.values()):
                    self.pool = torch.cuda.graph_pool_handle()  # one without graphs cannot be used again
                recording.record(self.run, idx, input_pos, self.pool)
            return recording.replay(idx, input_pos)

    def run(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        """What is recorded: GPT.forward, with the kernels in place of the modules that they know."""
        model, pos, plans = self.model, input_pos.view(-1, idx.size(1)), {}
        for attn in model.layers:
            if attn.mixer.kind not in plans:
                plans[attn.mixer.kind] = self.plan(attn, pos, input_pos.dim() == 1)
        x = model.embed(idx)  # (B, T, C)
        call = Call(plans, cached=True)
        for block in model.transformer.h:
            x = run_block(block, x, call)
        return model.finish(fused(x, model.lm_head, norm=model.transformer.ln_f))

    def plan(self, attn: CausalSelfAttention, pos: Tensor, uniform: bool) -> Any:
        """A SlotPlan or StatePlan where an attention kernel serves the layer, else the mixer's own plan."""
        mixer, cache, T = attn.mixer, attn.kv_cache, pos.size(1)
        if fits_kernel(attn, T, self.model.rope):
            counts = new_counts(cache.k.size(0), self.model.config.n_query_groups, pos.device)
            return slot_plan(mixer, cache.slots, pos, uniform, self.model.rope, counts)
        plan = mixer.plan(pos, Span(uniform, contiguous=T == 1), cache, self.model.rope)
        if isinstance(mixer, LinearAttention) and fits_linear_kernel(attn, T):
            heads = self.model.config.n_head + self.model.config.n_query_groups
            return StatePlan(plan, new_counts(cache.kv.size(0), heads, pos.device))
        return plan


class Recording:
    """A CUDA graph of a step, and the tensors that it reads its arguments from and writes its result to."""

    def __init__(self) -> None:
        self.calls, self.graph = 0, None

    def record(self, run: Callable[[Tensor, Tensor], Tensor], idx: Tensor, input_pos: Tensor, pool: Any) -> None:
        self.idx, self.input_pos = idx.clone(), input_pos.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # NCCL has threads of its own
            self.logits = run(self.idx, self.input_pos)
        self.graph = graph

    def replay(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        torch._foreach_copy_([self.idx, self.input_pos], [idx, input_pos])
        self.graph.replay()
        return self.logits.clone()  # the next replay overwrites it


def fits_kernel(attn: CausalSelfAttention, T: int, rope: nn.Module) -> bool:
    """True if the attention kernel can take a call of T tokens to this layer."""
    mixer, cache, config = attn.mixer, attn.kv_cache, attn.config
    if gpu_kernels() is None or not isinstance(mixer, SoftmaxAttention) or len(mixer.row.parts) > 3:
        return False
    # a temperature is put into the angles, and must reach all of a head
    tempered = mixer.tempered or mixer.row.temperature is not None
    turned = config.rope_n_elem == config.head_size or (config.rope_n_elem > 0 and not tempered)
    slots = cache.slots
    room = slots.copies == 1 or T <= min(1 + slots.lookahead, slots.n_slots)  # no key is replaced that is seen
    most = gpu_kernels().most_queries(cache.k.size(-1) * cache.k.element_size())
    few = attn.n_head // attn.n_query_groups * T <= most
    norms = isinstance(attn.norm_q, (nn.Identity, RMSNorm))
    return turned and room and few and norms and not rope.depends_on_length(mixer.rope_base)


def fits_linear_kernel(attn: CausalSelfAttention, T: int) -> bool:
    """True if the kernel of linear attention can take a call of T tokens to this layer."""
    kernels, norms = gpu_kernels("linear_kernels"), isinstance(attn.norm_q, (nn.Identity, RMSNorm))
    return kernels is not None and norms and attn.config.rope_n_elem > 0 and kernels.fits(attn.kv_cache, T)


@torch.no_grad()
def slot_plan(
    mixer: SoftmaxAttention, slots: Slots, pos: Tensor, uniform: bool, rope: nn.Module, counts: Tensor
) -> SlotPlan:
    """Plan a call at pos (1 or B, T), and note in the slots which positions they hold from now on."""
    row, config, T = mixer.row, mixer.config, pos.size(1)
    slots.forget(pos)
    held = slots.pos[:, : slots.sinks + slots.n_slots]
    seen = who_sees(row.parts, pos, torch.cat([held, pos.expand(held.size(0), T)], dim=1), config)
    write = slots.write(pos, Span(uniform, contiguous=T == 1))
    if write.any_token is None:
        to = stack(write.slots)[None]  # (1, copies, T)
    else:
        kept = write.any_token & (write.tokens == torch.arange(T, device=pos.device))
        to = torch.stack([torch.where(kept, s, -1) for s in write.slots], dim=1)  # (B, copies, T)
    q_angles, (k_cos, k_sin), _ = mixer.angles(pos, pos, rope)
    cos, sin = (stack(each).squeeze(2) for each in zip(*q_angles, strict=True))  # (parts, 1 or B, T, n)
    if (factor := mixer.temperature(pos)) is not None:
        factor = factor.squeeze(1) if isinstance(factor, Tensor) else factor  # (1 or B, T, 1)
        cos, sin = cos * factor, sin * factor
    angles = cos.contiguous(), sin.contiguous(), k_cos.squeeze(1), k_sin.squeeze(1)
    return SlotPlan(*angles, seen, live_blocks(seen[:, :, : held.size(1)]), to, counts)


def new_counts(batch: int, groups: int, device: torch.device) -> Tensor:
    return torch.zeros(batch * groups, dtype=torch.int32, device=device)


def stack(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]  # without a copy


def who_sees(parts: tuple[Part, ...], q_pos: Tensor, k_pos: Tensor, config: Any) -> Tensor:
    """(1 or B, T, L) int8: 0 where a query sees no key, else 1 + the part in which it does. Padding sees none."""
    q, k = q_pos[:, :, None], k_pos[:, None, :]
    seen = None
    for n, part in enumerate(parts, 1):  # at most one part sees a pair
        found = part.mask(q, k, config)
        seen = found.to(torch.int8) if seen is None else torch.where(found, n, seen)
    return (seen * ((0 <= k) & (k <= q))).contiguous()  # k <= q and 0 <= k: padding neither sees nor is seen


def live_blocks(seen: Tensor) -> Tensor:
    """SlotPlan's blocks of seen (1 or B, T, L)."""
    KEYS = gpu_kernels().KEYS
    n = -(-seen.size(-1) // KEYS)
    seen = F.pad(seen, (0, n * KEYS - seen.size(-1))) if seen.size(-1) % KEYS else seen
    live = seen.unflatten(-1, (n, KEYS)).any(dim=3).any(dim=1)  # (1 or B, n)
    count = live.cumsum(dim=1)
    blocks = torch.empty(seen.size(0), 1 + n, dtype=torch.int64, device=seen.device)
    numbers = torch.arange(n, device=seen.device).expand_as(live)
    blocks.scatter_(1, count * live, numbers)  # those that are not live go where the count will be
    blocks[:, 0] = count[:, -1]
    return blocks


def run_block(block: Block, x: Tensor, call: Call) -> Tensor:
    """Block.forward, (B, T, C) -> (B, T, C)."""
    y = attend(block.attn, block.attn.clip(fused(x, block.attn.qkv, norm=block.norm_1)), call)
    if block.attn.gate is not None:
        y = y * torch.sigmoid(fused(x, block.attn.gate, norm=block.norm_1))
    attended = add(block, x, block.attn.proj, y, block.post_attention_norm)
    into, norm = (x, block.norm_1) if block.shared_norm else (attended, block.norm_2)
    into, mlp = x if block.parallel_residual else into, block.mlp
    if isinstance(mlp, GatedMLP):
        h = fused(into, mlp.fc_1, mlp.fc_2, norm=norm, activation=mlp.activation)
    elif isinstance(mlp, PlainMLP):
        h = fused(into, mlp.fc, norm=norm, activation=mlp.activation)
    else:
        y = mlp(norm(into), call.losses, functools.partial(mix_experts, mlp)) if block.moe else mlp(norm(into))
        return block.add(attended, block.post_mlp_norm(y))
    return add(block, attended, mlp.proj, h, block.post_mlp_norm)


def add(block: Block, residual: Tensor, linear: nn.Module, y: Tensor, norm: nn.Module) -> Tensor:
    """residual + norm(linear(y)), times the block's multiplier."""
    if isinstance(norm, nn.Identity) and block.multiplier == 1.0:
        return fused(y, linear, residual=residual)
    return block.add(residual, norm(fused(y, linear)))


def mix_experts(moe: nn.Module, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """MoE.mix: few tokens by kernels that read the chosen experts' weights where they are."""
    kernels, name = gpu_kernels(), moe.config.activation
    stacks = (moe.fc_1, moe.fc_2), (moe.proj, moe.proj)
    if chosen.numel() > moe.config.n_expert:  # what is recorded, so that its kernels are compiled before
        return moe.mix_all(x, weights, chosen)
    if kernels is None or not all(kernels.knows_experts(x, *pair) for pair in stacks):
        return moe.mix(x, weights, chosen)
    ids, before = chosen.flatten(), moe.config.expert_weights == "sigmoid"
    inputs = (x[:, None] * weights[..., None]).flatten(0, 1) if before else x
    if moe.config.expert_limit is None:
        h = kernels.expert_product(inputs, moe.fc_1, moe.fc_2, ids, name)
    else:
        h = moe.act(*(kernels.expert_product(inputs, fc, None, ids) for fc in (moe.fc_1, moe.fc_2)))
    y = kernels.expert_product(h, moe.proj, None, ids).unflatten(0, chosen.shape)  # (N, k, C)
    return (y if before else y * weights[..., None]).sum(dim=1)


def attend(attn: CausalSelfAttention, qkv: Tensor, call: Call) -> Tensor:
    """What CausalSelfAttention does between its two products: (B, T, (H + 2 G) * D) -> (B, T, H * D)."""
    plan, mixer, heads = call.plans[attn.mixer.kind], attn.mixer, (attn.n_head, attn.n_query_groups)
    q, k, gains = attn.norm_q, attn.norm_k, None
    if isinstance(q, RMSNorm):
        gains = (q.weight, k.weight, q.eps, float(q.unit_offset))
    if isinstance(plan, SlotPlan):
        config = attn.config
        scale = (config.attention_scores_scalar or config.head_size) ** -0.5
        cap = config.attention_logit_softcapping
        return gpu_kernels().attention(qkv, attn.kv_cache, plan, *heads, gains, scale, cap, mixer.sink_logits)
    if isinstance(plan, StatePlan):
        return gpu_kernels("linear_kernels").linear_step(qkv, mixer, attn.kv_cache, *plan, heads, gains)
    (B, T, _), H, G = qkv.shape, attn.n_head, attn.n_query_groups
    q, k, v = qkv.view(B, T, H + 2 * G, -1).transpose(1, 2).split((H, G, G), dim=1)
    y = mixer(attn.norm_q(q), attn.norm_k(k), v, plan, attn.kv_cache)
    return y.transpose(1, 2).flatten(2)


def fused(
    x: Tensor,
    linear: nn.Module,
    gate: nn.Module | None = None,
    *,
    norm: nn.Module | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """activation(linear(norm(x))) * gate(norm(x)) + residual, (B, T, in) -> (B, T, out): in one kernel if there is one
    for it, or else module by module."""
    if hasattr(linear, "finish"):  # a rank's part of a layer: the ranks join what they make
        y = fused(x, linear.linear, norm=norm)
        return linear.finish(y) if residual is None else linear.finish(y, residual)
    kernels, rows = gpu_kernels(), x.size(0) * x.size(1)
    name = "none" if activation is None else ACTIVATION_NAMES.get(activation)
    if kernels is None or name is None or not kernels.knows(rows, linear, gate):
        x = x if norm is None else norm(x)
        y = linear(x) if activation is None else activation(linear(x))
        y = y if gate is None else y * gate(x)
        return y if residual is None else residual + y
    how = {}
    if isinstance(norm, RMSNorm) and (rows == 1 or x.dtype != torch.float16):  # float16 may not hold x * gain
        how = {"gain": norm.weight, "eps": norm.eps, "offset": float(norm.unit_offset)}
    elif norm is not None:
        x = norm(x)
    return kernels.product(x, linear, gate, activation=name, residual=residual, **how)
