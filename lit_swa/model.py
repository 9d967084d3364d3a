"""A GPT with its attention variants and caches in one file: read it from the top, change it in place.

GPT -> Block -> CausalSelfAttention -> VARIANTS (who sees whom) -> mixers -> plain attention -> KV caches -> MLP, norms.
Beside it, config.py holds the fields and their checks, rope.py the rotary embedding: copied into another project, these
three files work. linear.py, chunked.py, s2.py, moe.py, head_norms.py, prompt_attention.py add what fewer models need.
fast_attention.py only saves time, and what is computed never needs it.

Notation, used in every shape comment:
    B  batch                    C  n_embd            S  sliding_window_size
    T  tokens in this call      H  n_head            M  slots of a cache
    L  keys read by this call   G  n_query_groups    V  padded_vocab_size
    D  head_size                R  H // G, the query heads that share one key/value head

    who sees whom, T = 8 (row: query, column: key)

    full               sliding, S = 3     streaming, S = 3   dual_chunk, s = 3  S2, g = 4          ... half the heads
    x . . . . . . .    x . . . . . . .    o . . . . . . .    x . . . . . . .    x . . . . . . .    x . . . . . . .
    x x . . . . . .    x x . . . . . .    o x . . . . . .    x x . . . . . .    x x . . . . . .    x x . . . . . .
    x x x . . . . .    x x x . . . . .    o x x . . . . .    x x x . . . . .    x x x . . . . .    . . x . . . . .
    x x x x . . . .    . x x x . . . .    o x x x . . . .    + + + x . . . .    x x x x . . . .    . . x x . . . .
    x x x x x . . .    . . x x x . . .    o . x x x . . .    + + + x x . . .    . . . . x . . .    . . x x x . . .
    x x x x x x . .    . . . x x x . .    o . . x x x . .    + + + x x x . .    . . . . x x . .    . . x x x x . .
    x x x x x x x .    . . . . x x x .    o . . . x x x .    - - - + + + x .    . . . . x x x .    . . . . . . x .
    x x x x x x x x    . . . . . x x x    o . . . . x x x    - - - + + + x x    . . . . x x x x    . . . . . . x x

    o  a sink (here 1), seen from a position beside it   + -  seen from the next chunk's positions, and the farthest

A token's position is its place in its sequence. Masks, RoPE and cache slots are functions of positions, so any split of
a sequence into calls gives the logits of one call. A negative position marks padding, which no token sees.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if __package__:
    from . import config as checks
    from .config import IGNORED, VARIANTS, Config, Part, Variant
    from .rope import RoPE, Span, apply_rope, chunk_temperature, find_span, join_angles, position_temperature, unrotated
else:  # copied beside a script of another project
    import config as checks
    from config import IGNORED, VARIANTS, Config, Part, Variant
    from rope import RoPE, Span, apply_rope, chunk_temperature, find_span, join_angles, position_temperature, unrotated

# ---------------------------------------------------------------------------------------------------------------- GPT

LOSS_ELEMENTS = 2**25, 2**28  # logits that exist at once in a loss, on a CPU and on a GPU


class GPT(nn.Module):
    """A decoder-only transformer.

    `model(idx)` reads whole sequences. After `set_kv_cache`, `model(idx, input_pos)` continues them, in calls of any
    length. Tokens and caches are where the weights are, and `dtype` is what they are computed in.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        checks.check_values(config)  # again: a field may have been set since
        self.config = config
        wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.transformer = nn.ModuleDict({"wte": wte, "h": blocks, "ln_f": build_norm(config, config.n_embd)})
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=config.lm_head_bias)
        self.rope = RoPE(config)
        self.cache_batch_size, self.lookahead, self.max_seq_length = 0, 0, config.block_size  # 0: there are no caches
        self.fixed_shape_steps = False  # True: a one-token call never looks at its position, so no shape depends on it
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make lm_head share wte's weight where the config says so. Call it again after weights were replaced."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Random weights to train from, as GPT-2's (Radford et al. 2019): matrices and embeddings from a normal
        distribution of standard deviation 0.02, the projections back into the residual stream divided by
        sqrt(2 * n_layer), biases 0, norms the identity. The same seed gives the same weights on the same device."""
        generator = None if seed is None else torch.Generator(self.transformer.wte.weight.device).manual_seed(seed)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) or hasattr(module, "gathered"):  # the last: experts
                std = 0.02 / math.sqrt(2 * self.config.n_layer if name.endswith(("attn.proj", "mlp.proj")) else 1)
                module.weight.normal_(0.0, std, generator=generator)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def forward(
        self,
        idx: Tensor,
        input_pos: Tensor | None = None,
        *,
        input_pos_maxp1: int | None = None,
        logits_to_keep: int = 0,
        prompt: bool = False,
        documents: Sequence[int] | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of the token that follows each of idx (B, T), int64.

        input_pos: the tokens' positions, (T,) or (B, T), ascending in each sequence, negative for padding; keys then go
            through the cache. A sequence sees what was given to it before, wherever it began and whatever it left out,
            and forgets what it held from its first position on. None: nothing is cached.
        input_pos_maxp1: the greatest position + 1, if the caller knows it and no position was left out: an eager decode
            step on a GPU then reads no more slots than it needs. Compiled steps do without: each value would recompile.
        logits_to_keep: k > 0 computes logits for the last k tokens only, (B, k, V); 0 for all.
        prompt: these tokens see what config.prompt_attention says, if it says anything; their keys are kept as ever.
        documents: the lengths, T in all, of texts that lie one behind the other in each sequence. Each text is read as
            if it were alone: its positions begin at 0, and it sees no other. Without a cache only.
        targets: (B, T) int64, what follows each token, or IGNORED. The result is then the sum of -log p(target), a
            float32 scalar, made without logits of all tokens at once; in training, with the blocks' own losses.
        Raises ValueError when the tokens do not fit the context or the cache.
        """
        call = self.plan_call(idx, input_pos, input_pos_maxp1=input_pos_maxp1, documents=documents, prompt=prompt)
        # Which tokens have a target is asked before a GPU has the blocks' work, since the answer waits for the GPU.
        trained = None if targets is None else (targets.flatten() != IGNORED).nonzero()[:, 0]
        x = self.run_blocks(idx, call)
        if trained is not None:
            loss = self.sum_nll(x.flatten(0, 1)[trained], targets.flatten()[trained])
            return sum(call.losses, loss) if self.training else loss
        return self.project(x[:, -logits_to_keep:])  # [-0:] is all

    def hidden_states(self, idx: Tensor, input_pos: Tensor | None = None, **options: Any) -> Tensor:
        """What `project` makes logits of, (B, T, C). options: input_pos_maxp1, documents and prompt of forward()."""
        return self.run_blocks(idx, self.plan_call(idx, input_pos, **options))

    def run_blocks(self, idx: Tensor, call: "Call") -> Tensor:
        x = self.embed(idx.reshape(call.texts * idx.size(0), -1))
        for block in self.transformer.h:
            x = block(x, call)
        return x.reshape(*idx.shape, -1)

    def embed(self, idx: Tensor) -> Tensor:
        """What the first block reads, (B, T, C)."""
        x, scale = self.transformer.wte(idx), self.config.embedding_multiplier
        if self.config.scale_embeddings:
            x = x * torch.tensor(self.config.n_embd**0.5, dtype=x.dtype)  # rounded to x's dtype, as Gemma was trained
        return x if scale == 1.0 else x * scale

    def project(self, x: Tensor) -> Tensor:
        """Logits (B, T, V) of hidden states (B, T, C)."""
        return self.finish(self.lm_head(self.transformer.ln_f(x)))

    def finish(self, logits: Tensor) -> Tensor:
        """What lm_head's outputs become: logits."""
        scale, cap = self.config.logit_multiplier, self.config.final_logit_softcapping
        logits = logits if scale == 1.0 else logits * scale
        return logits if cap is None else softcap(logits, cap)

    def sum_nll(self, x: Tensor, targets: Tensor) -> Tensor:
        """Sum of -log p(target) over hidden states x (N, C) and targets (N,), in float32. At most LOSS_ELEMENTS logits
        exist at once; where they are more, the backward makes them a second time."""
        size = max(1, LOSS_ELEMENTS[x.device.type == "cuda"] // self.config.padded_vocab_size)
        if x.size(0) <= size:
            return self.token_losses(x, targets)
        pieces = zip(x.split(size), targets.split(size), strict=True)
        return torch.stack([checkpoint(self.token_losses, *p, use_reentrant=False) for p in pieces]).sum()

    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.project(x)[:, : self.config.vocab_size]  # the padding of the vocabulary holds no tokens
        return F.cross_entropy(logits.float(), targets, reduction="sum")

    def plan_call(self, idx: Tensor, input_pos: Tensor | None, **options: Any) -> "Call":
        """One plan for each kind of mixer: by how much it rotates, and which query sees which key."""
        if (documents := options.get("documents")) is not None:
            return self.plan_documents(idx, input_pos, [int(n) for n in documents], options.get("prompt", False))
        cached, T = input_pos is not None, idx.size(1)
        pos = input_pos if cached else torch.arange(T, device=idx.device)
        if not cached:
            span = Span(True, 0, T - 1, contiguous=True, fresh=True)
        elif torch.compiler.is_compiling() or (self.fixed_shape_steps and T == 1):
            span = Span(uniform=pos.dim() == 1, contiguous=T == 1)
        else:
            span = find_span(pos, options.get("input_pos_maxp1"))
        checks.check_call(self, idx.shape, pos.shape, span, cached)
        span = span._replace(dtype=self.dtype, prompt=options.get("prompt", False))
        pos, plans = pos.view(-1, T), {}  # (1, T): the same for every sequence, or (B, T)
        checks.check_kept(self, pos, span)
        for block in self.transformer.h:
            if (mixer := block.attn.mixer).kind not in plans:
                plans[mixer.kind] = mixer.plan(pos, span, block.attn.kv_cache if cached else None, self.rope)
        return Call(plans, cached)

    def plan_documents(self, idx: Tensor, input_pos: Tensor | None, lengths: list[int], prompt: bool) -> "Call":
        """The call of several texts in a sequence: one plan for all, or for each length, joined in the texts' order."""
        checks.check_documents(lengths, idx.size(1), input_pos is not None)
        calls = {n: self.plan_call(idx[:, :n], None, prompt=prompt) for n in dict.fromkeys(lengths)}
        if len(calls) == 1:
            return replace(calls[lengths[0]], texts=len(lengths))
        mixers = {attn.mixer.kind: attn.mixer for attn in self.layers}
        return Call({k: mixer.join([(n, calls[n].plans[k]) for n in lengths]) for k, mixer in mixers.items()})

    @property
    def dtype(self) -> torch.dtype:
        """What the blocks compute in. Weights may be wider while they are trained (training/precision.py)."""
        return getattr(self.transformer.wte, "compute_dtype", self.transformer.wte.weight.dtype)

    @property
    def layers(self) -> "list[CausalSelfAttention]":
        """The attention of every block."""
        return [block.attn for block in self.transformer.h]

    @property
    def caches(self) -> list[nn.Module]:
        """The caches of the layers; empty before set_kv_cache."""
        return [attn.kv_cache for attn in self.layers if attn.kv_cache is not None]

    @property
    def windows(self) -> list[int | None]:
        """For every layer, how many keys back a query sees, itself included and sinks apart; None: all of them."""
        return [attn.mixer.window for attn in self.layers]

    @property
    def n_sinks(self) -> int:
        """How many first tokens stay visible behind a window, in the layers that keep most; 0: none."""
        return max(attn.mixer.n_sinks for attn in self.layers)

    @property
    def rolls(self) -> bool:
        """True if no layer's cache grows with the text, so that a text may have any length."""
        return all(attn.mixer.rolls for attn in self.layers)

    def unbounded(self, cached: bool) -> bool:
        """True if text of any length can be read. A cache must roll for that, and hold a whole window."""
        if not cached:
            return all(attn.mixer.any_length for attn in self.layers)
        return self.rolls if not self.caches else all(cache.unbounded for cache in self.caches)

    def cache_length(self, tokens: int) -> int:
        """The max_seq_length that a text of so many tokens needs: no more than the context, or a window, is of use."""
        if not self.rolls:
            return min(tokens, self.config.block_size)
        return max(attn.mixer.cache_length(tokens) for attn in self.layers)

    def set_kv_cache(
        self,
        batch_size: int,
        max_seq_length: int | None = None,
        *,
        lookahead: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Give every layer the empty cache that its mixer asks for.

        max_seq_length: how many positions the sequences may use; None: block_size.
        lookahead: how many tokens may be taken back (others fed at their positions) at any time; only a cache that
            rolls needs room for it.
        """
        max_seq_length = self.config.block_size if max_seq_length is None else max_seq_length
        checks.check_cache(self, batch_size, max_seq_length, lookahead)
        self.clear_kv_cache()
        self.cache_batch_size, self.max_seq_length, self.lookahead = batch_size, max_seq_length, lookahead
        weight, first = self.transformer.wte.weight, {}  # the first cache of each kind shares what does not differ
        self.cache_place = {"device": device or weight.device, "dtype": dtype or self.dtype}
        for attn in self.layers:
            heads, beside = (attn.n_head, attn.n_query_groups), first.get(attn.mixer.kind)
            size = (batch_size, max_seq_length, lookahead, heads)
            attn.kv_cache = attn.mixer.new_cache(*size, beside, **self.cache_place)
            first.setdefault(attn.mixer.kind, attn.kv_cache)

    def extend_kv_cache(self, max_seq_length: int) -> None:
        """Make room for more positions, and keep what the caches hold."""
        old = self.caches
        self.set_kv_cache(self.cache_batch_size, max_seq_length, lookahead=self.lookahead, **self.cache_place)
        for attn, cache in zip(self.layers, old, strict=True):
            attn.kv_cache.take_over(cache)

    def clear_kv_cache(self) -> None:
        """Free the caches."""
        self.cache_batch_size, self.lookahead, self.max_seq_length = 0, 0, self.config.block_size
        for attn in self.layers:
            attn.kv_cache = None

    def reset_kv_cache(self) -> None:
        """Empty the caches without freeing them."""
        for cache in self.caches:
            cache.reset()

    def can_take_back(self, n: int) -> bool:
        """True if the newest n tokens of the caches can be forgotten, to feed others at their positions."""
        return all(cache.can_take_back(n) for cache in self.caches)

    def take_back(self, n: int) -> None:
        """Forget the newest n tokens. Raises ValueError if a cache cannot."""
        checks.check_take_back(self, n)
        for cache in self.caches:
            cache.take_back(n)

    def kv_cache_bytes(self) -> int:
        """Bytes of what the caches hold of the tokens."""
        return sum(cache.bytes for cache in self.caches)


@dataclass
class Call:
    """What the blocks of one call share."""

    plans: dict[str, Any]  # kind of mixer -> its plan
    cached: bool = False  # the call goes through the caches
    losses: list[Tensor] = field(default_factory=list)  # a block may add one: a sum over tokens, like the loss itself
    texts: int = 1  # of one length in each sequence, which are read as sequences of their own


class Block(nn.Module):
    """Attention and MLP around the residual stream."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.norm_1 = build_norm(config, config.n_embd, config.pre_norm)
        self.attn = CausalSelfAttention(config, layer)
        self.post_attention_norm = build_norm(config, config.n_embd, config.post_attention_norm)
        self.norm_2 = build_norm(config, config.n_embd, config.pre_norm and not config.shared_norm)
        self.moe = config.layer_mlps[layer] == "MoE"
        self.mlp = checks.module_beside("moe").MoE(config) if self.moe else MLPS[config.layer_mlps[layer]](config)
        self.post_mlp_norm = build_norm(config, config.n_embd, config.post_mlp_norm)
        self.parallel_residual, self.shared_norm = config.parallel_residual, config.shared_norm
        self.multiplier = config.residual_multiplier

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        normed = self.norm_1(x)
        attended = self.add(x, self.post_attention_norm(self.attn(normed, call)))
        into = normed if self.shared_norm else self.norm_2(x if self.parallel_residual else attended)
        y = self.mlp(into, call.losses) if self.moe else self.mlp(into)
        return self.add(attended, self.post_mlp_norm(y))

    def add(self, residual: Tensor, y: Tensor) -> Tensor:
        return residual + (y if self.multiplier == 1.0 else y * self.multiplier)


class CausalSelfAttention(nn.Module):
    """Project to queries, keys and values, mix the tokens as the layer's variant says, project back."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        own, variant = config.of_layer(layer), config.layer_variants[layer]
        H, G, D = own.n_head, own.n_query_groups, own.head_size
        self.n_head, self.n_query_groups = H, G  # of this layer: a rank of several may hold some of them
        self.qkv = nn.Linear(config.n_embd, (H + 2 * G) * D, bias=config.attn_bias)  # rows: H queries, G keys, G values
        self.proj = nn.Linear(H * D, config.n_embd, bias=config.attn_proj_bias)
        self.gate = nn.Linear(config.n_embd, H * D, bias=False) if config.attention_gate else None
        self.norm_q, self.norm_k = build_head_norm(config, layer, H), build_head_norm(config, layer, G)
        softmax = checks.module_beside("s2").ShiftedSparseAttention if config.s2_attention else SoftmaxAttention
        self.mixer = (VARIANTS[variant].mixer or softmax)(own, variant, layer)
        self.kv_cache: nn.Module | None = None
        self.config = config

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        (B, T, _), H, G = x.shape, self.n_head, self.n_query_groups
        qkv = self.clip(self.qkv(x)).view(B, T, H + 2 * G, -1)
        q, k, v = [part.transpose(1, 2) for part in qkv.split((H, G, G), dim=2)]  # (B, H or G, T, D)
        q, k = self.norm_q(q), self.norm_k(k)
        cache = self.kv_cache if call.cached else None
        y = self.mixer(q, k, v, call.plans[self.mixer.kind], cache).transpose(1, 2).flatten(2)  # (B, T, H * D)
        return self.proj(y if self.gate is None else y * torch.sigmoid(self.gate(x)))  # (B, T, C)

    def clip(self, qkv: Tensor) -> Tensor:
        return qkv if (most := self.config.clip_qkv) is None else qkv.clamp(-most, most)


# -------------------------------------------------------------------------------------- the variants, and who sees whom
#
# A mask is a function of positions, which broadcast against each other, and the config. It alone says which query sees
# which key; visible() adds causality, empty slots and padding once, for all. To add a variant: its functions, and a row
# in VARIANTS. What a row says beside the mask only saves work, and is compared with it when a call is planned.


def full(q_pos: Tensor, k_pos: Tensor, config: Config) -> Tensor:
    return k_pos <= q_pos


def sliding(q_pos: Tensor, k_pos: Tensor, config: Config) -> Tensor:
    return q_pos - k_pos < config.sliding_window_size


# Streaming (Xiao et al. 2023, arXiv 2309.17453): every query sees the first tokens and a recent window, as if nothing
# lay between. So it stands no further from the sinks than in a text of just these tokens.


def recent(q_pos: Tensor, k_pos: Tensor, config: Config) -> Tensor:
    return (q_pos - k_pos < config.sliding_window_size) & (k_pos >= config.n_sink_tokens)


def sinks(q_pos: Tensor, k_pos: Tensor, config: Config) -> Tensor:
    return k_pos < config.n_sink_tokens


def beside_sinks(q_pos: Tensor, config: Config) -> Tensor:
    return q_pos.clamp(max=config.n_sink_tokens + config.sliding_window_size - 1)


# Dual-chunk attention (An et al. 2024, arXiv 2402.17463): a key's position is its place in its chunk of s tokens; a
# query's depends on how many chunks lie between. The w nearest keys stay at their true distance; none is farther than
# s + w, which lies within the trained length.


def same_chunk(q_pos: Tensor, k_pos: Tensor, config: Config) -> Tensor:
    return k_pos // config.chunk_size == q_pos // config.chunk_size


def previous_chunk(q_pos: Tensor, k_pos: Tensor, config: Config) -> Tensor:
    return k_pos // config.chunk_size == q_pos // config.chunk_size - 1


def older_chunks(q_pos: Tensor, k_pos: Tensor, config: Config) -> Tensor:
    return k_pos // config.chunk_size < q_pos // config.chunk_size - 1


def in_chunk(pos: Tensor, config: Config) -> Tensor:
    return pos % config.chunk_size


def in_next_chunk(q_pos: Tensor, config: Config) -> Tensor:
    return (q_pos % config.chunk_size + config.chunk_size).clamp(max=config.chunk_size + config.chunk_local)


def farthest(q_pos: Tensor, config: Config) -> Tensor:
    return torch.full_like(q_pos, config.chunk_size + config.chunk_local)


VARIANTS.update(
    full=Variant((Part(full, reach=lambda a, b, c: (0, b), run=True),), groups=True),
    sliding=Variant(
        (Part(sliding, reach=lambda a, b, c: (a - c.sliding_window_size + 1, b), run=True),),
        needs=("sliding_window_size",),
        window=lambda c: c.sliding_window_size,
    ),
    streaming=Variant(
        (
            Part(recent, reach=lambda a, b, c: (max(c.n_sink_tokens, a - c.sliding_window_size + 1), b), run=True),
            Part(sinks, beside_sinks, lambda a, b, c: (0, min(b, c.n_sink_tokens)), run=True),
        ),
        needs=("sliding_window_size",),
        fields=("n_sink_tokens",),
        window=lambda c: c.sliding_window_size,
        sinks=lambda c: c.n_sink_tokens,
        always_rolls=True,
        edges=lambda a, b, c: [c.n_sink_tokens] if a < c.n_sink_tokens < b else [],
    ),
    dual_chunk=Variant(
        (
            Part(same_chunk, in_chunk, lambda a, b, c: (c.chunk_start(a), b), run=True),
            Part(previous_chunk, in_next_chunk, lambda a, b, c: (c.chunk_start(a, 1), c.chunk_start(b - 1)), run=True),
            Part(older_chunks, farthest, lambda a, b, c: (0, c.chunk_start(b - 1, 1)), run=True),
        ),
        fields=tuple(name for name in Config.__dataclass_fields__ if name.startswith("dual_chunk_")),
        key_position=in_chunk,
        temperature=chunk_temperature,
        edges=lambda a, b, c: range(c.chunk_start(a) + c.chunk_size, b, c.chunk_size),
        check=checks.check_dual_chunk,
    ),
)


def visible(part: Part, q_pos: Tensor, k_pos: Tensor, config: Config) -> Tensor:
    """Which of the queries at q_pos (B, T) sees which of the keys at k_pos (B, L): (B, T, L) bool.

    No token sees a key at a negative position (an empty slot, padding). A padding query sees everything: a softmax over
    nothing is NaN, and would spread through the values to the tokens of the next layer.
    """
    q, k = q_pos[:, :, None], k_pos[:, None, :]
    return ((0 <= k) & (k <= q) & part.mask(q, k, config)) | (q < 0)


# ----------------------------------------------------------------------------------------------------- how tokens mix
#
# A mixer is the inner part of attention, between the projections. It makes its own cache, plans a call once for all
# layers of its kind, and mixes. Whatever it keeps of the tokens is the cache's: the model only asks it.


class Mixer(nn.Module):
    """The interface; a mixer that says nothing else has no window, and a cache that grows with the text.

    new_cache(batch_size, length, lookahead, heads=, beside=, device=, dtype=): an empty cache for `length` positions,
        of a layer with so many (query, key/value) heads, that can take back `lookahead` tokens. beside: the cache of
        another layer of this kind, to share what does not differ. A cache has bytes, unbounded (any number of tokens
        fits), reset(), take_over(a smaller cache), can_take_back(n) and take_back(n).
    plan(pos, span, cache, rope): what forward() must know of a call at pos (1 or B, T); cache: its first layer's.
    join(texts): the plan of several texts in a sequence, from pairs of their lengths and plans.
    forward(q, k, v, plan, cache): queries (B, H, T, D) with keys and values (B, G, T, D), before RoPE, to (B, H, T, D).
    """

    window: int | None = None  # how many keys back a query sees, itself included and sinks apart; None: all of them
    n_sinks: int = 0  # first tokens that stay visible behind the window
    rolls: bool = False  # the size of its cache does not grow with the text
    any_length: bool = False  # a whole text of any length can be read

    def __init__(self, config: Config, variant: str, layer: int = 0) -> None:
        super().__init__()
        self.config, self.variant, self.layer = config, variant, layer
        self.positions = config.layer_positions[layer]
        self.kind = config.kind_of(variant, layer)  # layers of one kind share a call's plan

    @property
    def rope_base(self) -> int | None:
        """Which of RoPE's bases it rotates by; None: it does not."""
        bases = self.config.more_bases
        if self.positions != "rope":
            return None if self.positions == "none" else 1 + bases.index(float(self.positions))
        return len(bases) if self.config.rope_local_base_freq is not None and self.window is not None else 0

    def cache_length(self, tokens: int) -> int:
        """The length of a cache for a text of so many tokens: more is of no use."""
        return tokens


class Plan(NamedTuple):
    """How the layers of one kind treat one call."""

    q_angles: list[tuple[Tensor, Tensor]]  # for every part, cos and sin, (1 or B, 1, T, rope_n_elem) each
    k_angles: tuple[Tensor, Tensor]
    rotate_read: bool  # True: keys are cached as they are, and rotated when they are read
    blocks: "list[QueryBlock]"  # who sees whom, in plain steps, for the queries that `faster` leaves
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = apply_rope
    faster: Any = None  # what takes the place of the plain steps: causal and attend of fast_attention.py
    exchange: "Exchange | None" = None  # where the keys go in the cache, and which of its slots are read
    temperature: Tensor | float | None = None  # (1 or B, 1, T, 1): what queries are multiplied by
    group: int = 0  # tokens in a group of S2-Attn; 0: not S2-Attn
    texts: "list[tuple[int, Plan]]" = []  # lengths and plans of texts in a sequence; empty: one text


class Pairs(NamedTuple):
    """The queries and keys of one call, and what is known of them."""

    row: Variant
    config: Config
    q_pos: Tensor  # (1 or B, T)
    k_pos: Tensor  # (1 or B, L)
    span: Span
    layout: "Layout | None"  # None: any key may lie anywhere
    cached: bool
    window: int | None  # the row's window and sinks
    sinks: int

    def reaches(self, part: Part, a: int, b: int) -> list[tuple[int, int]]:
        """First and last + 1 of the key positions that the queries at a .. b - 1 may see: one run, or sinks and one."""
        lo = 0 if self.window is None else a - self.window + 1
        if not self.layout.exact:
            return [(lo, b)]
        if part.reach is not None:
            lo, hi = part.reach(a, b, self.config)
            return [(max(0, lo), hi)] if max(0, lo) < hi else []
        if lo <= self.sinks:
            return [(0, b)]
        return [(0, self.sinks), (lo, b)] if self.sinks else [(lo, b)]

    def sees_all(self, part: Part, a: int, b: int, lo: int, hi: int) -> bool:
        """True if the row says that the queries at a .. b - 1 see all keys at lo .. hi - 1 up to their own."""
        if not (part.run and part.reach and self.layout.exact):
            return False
        return part.reach(b - 1, b, self.config)[0] <= lo and min(hi, a + 1) <= part.reach(a, a + 1, self.config)[1]

    def mask(self, n: int, queries: slice, keys: slice, shared: dict[int, Tensor | None]) -> Tensor | None:
        """Which of some queries sees which of some keys in part n, (1 or B, 1, T, L) bool; None: all are seen.

        shared: part -> the last mask. Blocks of a prompt see the same pattern up to their newest key: where the mask is
        the same, it is held once. Otherwise a prompt's masks would add up to T * L.
        """
        q_pos, k_pos = self.q_pos[:, queries], self.k_pos[:, keys]
        mask = visible(self.row.parts[n], q_pos, k_pos, self.config)[:, None]
        known = self.span.last is not None and not q_pos.is_meta and not torch.compiler.is_compiling()
        if not known or (self.q_pos.size(1) == 1 and q_pos.device.type != "cpu"):
            return mask  # nobody may look at it, or a GPU would wait for the look in every step
        if mask.all():
            shared[n] = None
            return None
        held = shared.get(n)
        if held is not None and held.size(-2) == mask.size(-2) and held.size(-1) >= mask.size(-1):
            columns = held[..., held.size(-1) - mask.size(-1) :]
            if torch.equal(columns, mask):
                return columns
        shared[n] = mask
        return mask


class SoftmaxAttention(Mixer):
    """Softmax attention under the masks of a row of VARIANTS."""

    def __init__(self, config: Config, variant: str, layer: int = 0) -> None:
        super().__init__(config, variant, layer)
        self.row = row = VARIANTS[variant]
        self.window, self.n_sinks = row.window(config) if row.window else None, row.sinks(config) if row.sinks else 0
        self.any_length = row.window is not None
        self.tempered = config.temperature_slope is not None and config.temperature_layers in ("all", self.positions)
        self.sink_logits = nn.Parameter(torch.zeros(config.n_head)) if config.sink_logits else None
        self.faster_plan, self.checked = fast_attention(), {}  # by window, up to where masks were compared

    def reset_parameters(self) -> None:
        if self.sink_logits is not None:
            nn.init.zeros_(self.sink_logits)

    @property
    def rolls(self) -> bool:
        return self.window is not None and (self.row.always_rolls or self.config.rolling_kv_cache)

    def cache_length(self, tokens: int) -> int:
        return self.n_sinks + min(self.window, max(1, tokens - self.n_sinks)) if self.rolls else tokens

    def new_cache(self, batch: int, length: int, lookahead: int, heads: Any, beside: Any = None, **place: Any) -> Any:
        if beside is None:
            self.check(length - 1)
            window = self.window if self.rolls else None
            slots = Slots(batch, length, lookahead, window, self.n_sinks, place["device"])
        else:
            slots = beside.slots
        return KVCache(slots, (batch, heads[1], slots.pos.size(1), self.config.head_size), **place)

    def check(self, last: int) -> None:
        """Compare the row with its masks up to a position and twice as far, unless that was done."""
        if last >= self.checked.get(window := self.config.sliding_window_size, 0) and not torch.compiler.is_compiling():
            checks.check_row(self.variant, self.row, self.config, 2 * last + 1)
            self.checked[window] = 2 * last + 2

    def plan(self, pos: Tensor, span: Span, cache: "KVCache | None", rope: RoPE) -> Plan:
        if span.prompt and self.config.prompt_attention is not None:
            return checks.module_beside("prompt_attention").plan(self, pos, span, cache, rope)
        self.check(span.last or 0)
        exchange, k_pos, layout = None, pos, Layout(0, 0)
        if cache is not None:  # sinks that have no slots of their own lie among the other keys
            exchange = cache.slots.exchange(pos, span, self.window if cache.slots.sinks >= self.n_sinks else None)
            k_pos, layout = exchange.k_pos, exchange.layout
        pairs = Pairs(self.row, self.config, pos, k_pos, span, layout, cache is not None, self.window, self.n_sinks)
        faster = None if self.faster_plan is None else self.faster_plan(pairs)
        rotate, done = (apply_rope, 0) if faster is None else (faster.rotate, faster.n_queries)
        rotate = unrotated if self.positions == "none" else rotate
        blocks = cut_queries(pairs, done) if done < pos.size(1) else []
        return Plan(*self.angles(pos, k_pos, rope), blocks, rotate, faster, exchange, self.temperature(pos))

    def temperature(self, pos: Tensor) -> Tensor | float | None:
        """What queries at pos (1 or B, T) are multiplied by, (1 or B, 1, T, 1) or a number; None: nothing."""
        factor = None if self.row.temperature is None else self.row.temperature(pos, self.config)
        if not self.tempered:
            return factor
        return position_temperature(pos, self.config) * (1.0 if factor is None else factor)

    def angles(self, pos: Tensor, k_pos: Tensor, rope: RoPE) -> tuple[list, tuple, bool]:
        """Plan's q_angles, k_angles and rotate_read, for queries at pos (1 or B, T) and keys at k_pos (1 or B, L)."""
        places = [part.position for part in self.row.parts]
        return rope.angles(pos, k_pos, self.rope_base, self.row.key_position, places)

    def join(self, texts: list[tuple[int, Plan]]) -> Plan:
        first, plans = texts[0][1], [plan for _, plan in texts]
        q_angles = [join_angles(angles) for angles in zip(*(plan.q_angles for plan in plans), strict=True)]
        each = [plan.temperature for plan in plans]
        temperature = torch.cat(each, dim=2) if isinstance(each[0], Tensor) else each[0]
        first = first._replace(k_angles=join_angles([plan.k_angles for plan in plans]), temperature=temperature)
        return first._replace(q_angles=q_angles, blocks=[], texts=texts, group=0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, cache: "KVCache | None") -> Tensor:
        if plan.temperature is not None:
            q = (q * plan.temperature).to(q.dtype)
        queries = [plan.rotate(q, *angles) for angles in plan.q_angles]  # (B, H, T, D) for each part of the variant
        k = k if plan.rotate_read else plan.rotate(k, *plan.k_angles)  # (B, G, T, D)
        if plan.exchange is not None:
            k, v = cache.exchange(k, v, plan.exchange)  # (B, G, L, D)
        k = plan.rotate(k, *plan.k_angles) if plan.rotate_read else k
        return self.attend(queries, k, v, plan)

    def attend(self, queries: list[Tensor], k: Tensor, v: Tensor, plan: Plan) -> Tensor:
        """The queries (B, H, T, D), rotated once for each part, over the keys and values (B, G, L, D)."""
        if plan.texts:
            lengths = [n for n, _ in plan.texts]
            pieces = zip(*(x.split(lengths, dim=2) for x in (k, v, *queries)), strict=True)
            texts = [self.attend(q, k, v, own) for (k, v, *q), (_, own) in zip(pieces, plan.texts, strict=True)]
            return torch.cat(texts, dim=2)
        outputs = [attend_block(queries, k, v, block, self.config, self.sink_logits) for block in plan.blocks]
        if plan.faster is not None and plan.faster.attend is not None:
            outputs.insert(0, plan.faster.attend(queries, k, v, self.sink_logits))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def fast_attention() -> Callable[[Pairs], Any] | None:
    """fast_attention.faster_plan, if that file lies beside this one: a faster plan for a call's pairs, or None."""
    return getattr(checks.module_beside("fast_attention"), "faster_plan", None)


# ------------------------------------------------------------------------------------------- plain attention, in blocks
#
# The queries of a call are cut into blocks, each of which reads the keys within its reach: T * S pairs under a window.

QUERY_BLOCK = {"cpu": 128, "cuda": 512}  # queries in a block; on 2 CPU cores 64 to 256 take the same time
SCORE_ELEMENTS = 2**27  # bound on sequences * heads * queries * keys of one block: what it may put into memory


class KeyRange(NamedTuple):
    """Some keys, and which of them the queries of a block see, in which parts of the variant."""

    keys: slice
    masks: dict[int, Tensor | None]  # part -> (1 or B, 1, T, L) bool; None: every query sees every key


class QueryBlock(NamedTuple):  # some queries and the keys that they read
    queries: slice
    ranges: list[KeyRange]


def cut_queries(pairs: Pairs, start: int = 0) -> list[QueryBlock]:
    """Cut a call's queries, from `start` on, into blocks, and name for each the keys within its reach."""
    T, L, most = pairs.q_pos.size(1), pairs.k_pos.size(1), QUERY_BLOCK.get(pairs.q_pos.device.type, QUERY_BLOCK["cuda"])
    reach = L if pairs.window is None or pairs.layout is None else min(L, pairs.window + QUERY_BLOCK["cuda"])
    parts = len(pairs.row.parts) if pairs.layout is None else 1
    rows = max(pairs.q_pos.size(0), pairs.k_pos.size(0)) * pairs.config.n_head * parts
    size, blocks, shared = max(1, min(most, SCORE_ELEMENTS // (rows * reach))), [], {}
    for first in reversed(range(start, T, size)):  # the block with the most keys first: the others share its mask
        queries = slice(first, min(first + size, T))
        blocks.append(QueryBlock(queries, key_ranges(pairs, queries, shared)))
    return blocks[::-1]


def key_ranges(pairs: Pairs, queries: slice, shared: dict[int, Tensor | None]) -> list[KeyRange]:
    """The keys that some queries read. shared: part -> the mask of a later block, to be used again."""
    parts, everything = pairs.row.parts, slice(0, pairs.k_pos.size(1))
    if pairs.layout is None:
        return [KeyRange(everything, {n: pairs.mask(n, queries, everything, shared) for n in range(len(parts))})]
    ranges = []
    a, b = pairs.layout.first + queries.start, pairs.layout.first + queries.stop  # the queries' positions
    for n, part in enumerate(parts):
        for lo, hi in pairs.reaches(part, a, b):
            keys, all_seen = pairs.layout.keys(lo, hi), hi <= a + 1 and pairs.sees_all(part, a, b, lo, hi)
            ranges.append(KeyRange(keys, {n: None if all_seen else pairs.mask(n, queries, keys, shared)}))
    return ranges


def attend_block(
    queries: list[Tensor], k: Tensor, v: Tensor, block: QueryBlock, config: Config, sinks: Tensor | None = None
) -> Tensor:
    """A block's part of the output, (B, H, T, D): one softmax over all that its queries see. sinks: learned logits
    (H,), one for each head, which share the softmax and have no value (Agarwal et al. 2025, arXiv 2508.10925)."""
    first, cap = block.ranges[0], config.attention_logit_softcapping
    if len(block.ranges) > 1 or len(first.masks) > 1 or cap is not None or sinks is not None:
        return attend_ranges(queries, k, v, block, config, sinks)
    ((part, mask),) = first.masks.items()
    q, k, v = queries[part][:, :, block.queries], k[:, :, first.keys], v[:, :, first.keys]
    scale = (config.attention_scores_scalar or config.head_size) ** -0.5
    (B, H, T, D), G = q.shape, k.size(1)
    # The R query heads of a group are R more queries of one head: no key is copied, and any kernel will do.
    mask = mask if mask is None or T == 1 else mask.repeat(1, 1, H // G, 1)  # one query broadcasts over R by itself
    y = F.scaled_dot_product_attention(q.reshape(B, G, -1, D), k, v, attn_mask=mask, scale=scale)  # (B, G, R * T, D)
    return y.reshape(B, H, T, D)


def attend_ranges(
    queries: list[Tensor], k: Tensor, v: Tensor, block: QueryBlock, config: Config, sinks: Tensor | None = None
) -> Tensor:
    """attend_block step by step: scores of every range, one softmax over them all, the values of every range."""
    rotated = [q[:, :, block.queries] for q in queries]  # (B, H, T, D) each
    (B, H, T, D), G, scores = rotated[0].shape, k.size(1), []
    scale, cap = (config.attention_scores_scalar or config.head_size) ** -0.5, config.attention_logit_softcapping
    for keys, masks in block.ranges:
        per_part = [rotated[part].reshape(B, G, -1, D) for part in masks]  # (B, G, R * T, D) each
        per_part = per_part[0] if len(masks) == 1 else torch.cat(per_part, dim=2)  # one product: keys are read once
        s = per_part @ k[:, :, keys].mT * scale
        s = s if cap is None else softcap(s, cap)
        s = s.view(B, G, len(masks), H // G, T, -1)
        seen = zip(s.unbind(2), masks.values(), strict=True)  # (B, G, R, T, L) each
        seen = [x if mask is None else x.masked_fill(~mask[:, :, None], -math.inf) for x, mask in seen]
        scores.append(functools.reduce(torch.maximum, seen))  # at most one part sees a pair, the others are -inf
    wide = torch.promote_types(v.dtype, torch.float32)
    if sinks is not None:
        scores.append(sinks.to(v.dtype).view(1, G, -1, 1, 1).expand(B, -1, -1, T, -1))
    weights = F.softmax(torch.cat(scores, dim=-1), dim=-1, dtype=wide).to(v.dtype).flatten(2, 3)
    weights = weights.split([s.size(-1) for s in scores], dim=-1)  # (B, G, R * T, L) each, and the sinks'
    y = sum(w @ v[:, :, r.keys] for w, r in zip(weights, block.ranges))  # noqa: B905
    return y.view(B, H, T, D)


def softcap(x: Tensor, cap: float) -> Tensor:
    """Bend x smoothly into (-cap, cap)."""
    return cap * torch.tanh(x / cap)


# ------------------------------------------------------------------------------------------------------------ KV caches
#
# A cache of M slots keeps the token at position p in slot p % M. Dense: M = max_seq_length, nothing ever wraps.
# Rolling: M = S + lookahead, and the token is written a second time M slots further on, so that the last M keys, in
# order and in one piece, always end at slot p % M + M. Worked for S = M = 4, after position 5 (the newest) was written:
#
#     slot        0   1   2   3 | 4   5   6   7
#     position    4   5   2   3 | 4   5   2   3
#                         '---- window ---'        slots p % M + M - S + 1 .. p % M + M = 2 .. 5
#
# The next token, 6, overwrites position 2 in slots 2 and 6, and its window is slots 3 .. 6: one view, whatever p is.
# A step whose position is not known on the host (compiled, or sequences at different positions) reads slots 0 .. M - 1
# instead: the same keys, in rotated order, and the mask is made from their positions. Both read S keys and copy none.


class Layout(NamedTuple):
    """Where the keys of a call lie: sinks apart, if any, then a key for each position, in order, to the call's last."""

    first: int  # the position of the first query
    index: int  # ... and where its own key lies
    sinks: int = 0  # keys 0 .. sinks - 1 are those of the positions 0 .. sinks - 1
    exact: bool = True  # False: `first` is made up and sequences differ; only differences of positions count

    def keys(self, lo: int, hi: int) -> slice:
        """Where the keys of the positions lo .. hi - 1 lie."""
        shift = 0 if hi <= self.sinks else self.index - self.first
        return slice(lo + shift, hi + shift)


class Write(NamedTuple):
    """Where a call's keys and values go. Where sequences are at positions of their own, slots and tokens are (B, T)."""

    slots: list[Tensor]  # per copy: (T',), the same for every sequence
    tokens: Tensor | slice  # (T',): which of the call's tokens go there
    any_token: Tensor | None = None  # (B, 1), False for a sequence of padding alone: it writes nothing


class Exchange(NamedTuple):
    """What a call does with a cache."""

    write: Write
    k_pos: Tensor  # (1 or B, L): the positions of the keys that its queries read
    layout: Layout | None  # how these keys lie; None: anyhow
    read: list[Tensor | slice] = []  # the slots that queries read; empty: they read the call's own keys only
    write_first: bool = False  # True: write, then read `read`. False: read it, put the call's own keys behind, write


class Slots(nn.Module):
    """Which position each slot holds, (B, sinks + copies * M), in all layers of a kind; -1: none, -2 - p: p, forgotten.

    The sinks' slots come first, each once, and what follows is the cache described above for position - sinks.
    """

    def __init__(self, batch: int, length: int, lookahead: int, window: int | None, n_sinks: int, device: Any) -> None:
        """window: what a rolling cache keeps; None: a dense cache, for positions 0 .. length - 1."""
        super().__init__()
        self.window, self.lookahead = window, lookahead
        self.sinks = min(n_sinks, length) if window is None else n_sinks
        self.n_slots = length - self.sinks if window is None else min(window, max(1, length - n_sinks)) + lookahead
        self.copies = 1 if window is None else 2
        empty = torch.full((batch, self.sinks + self.copies * self.n_slots), -1, device=device)
        self.register_buffer("pos", empty, persistent=False)

    def slots_of(self, pos: Tensor) -> list[Tensor]:
        """The slots of positions, for each copy. A dense cache does not wrap: a position beyond it is an error."""
        if self.copies == 1:
            return [pos]
        copies = [self.sinks + n * self.n_slots + (pos - self.sinks) % self.n_slots for n in range(2)]
        return [torch.where(pos < self.sinks, pos, slots) for slots in copies] if self.sinks else copies

    def take_over(self, old: "Slots") -> tuple[Tensor, Tensor, list[Tensor]]:
        """Hold the positions that smaller slots hold. Returns what moves: sequences, slots there, slots here."""
        rows, source = (old.pos[:, : old.sinks + old.n_slots] >= 0).nonzero(as_tuple=True)
        pos = old.pos[rows, source]
        targets = self.slots_of(pos)
        for slots in targets:
            self.pos[rows, slots] = pos
        return rows, source, targets

    def exchange(self, pos: Tensor, span: Span, window: int | None) -> Exchange:
        """Decide where the keys of a call at pos (1 or B, T) go and which slots its queries read, and note it. What a
        sequence holds at the call's first position and beyond is forgotten. A fresh sequence reads its own keys;
        a short call (one token, or one more than can be taken back) and a layer without a window write first, then read
        the cache; a long call to a window reads the last window of cached keys and its own, then writes: its keys may
        replace those that its first queries see.
        """
        T, first = pos.size(1), self.forget(pos)
        if span.fresh:
            return Exchange(self.write(pos, span), pos, Layout(0, 0))
        if span.looked and span.first is not None and not self.holds_all(span.first, window):
            span = span._replace(contiguous=False)
        in_step = span.contiguous or not span.looked  # a compiled call of several tokens leaves no position out
        if window is None or (T <= 1 + self.lookahead and in_step):
            write = self.write(pos, span)
            read, layout = self.view(T, span, window)
            return Exchange(write, self.pos[:, read], layout, [read], write_first=True)
        read, old_pos, layout = self.recent(pos, first, span, window)  # one more than is seen: kernels like it even
        k_pos = torch.cat([old_pos, pos.expand(old_pos.size(0), T)], dim=1)
        return Exchange(self.write(pos, span), k_pos, layout, read)

    def forget(self, pos: Tensor) -> Tensor:
        """Forget each sequence's first position of pos (1 or B, T), and all beyond it; returns it, (1 or B, 1)."""
        first = pos.where(pos >= 0, 2**40).amin(dim=1, keepdim=True)
        self.pos.copy_(torch.where(first == 0, -1, torch.where(self.pos < first, self.pos, -2 - self.pos)))
        return first

    def holds_all(self, first: int, window: int | None) -> bool:
        """True if every sequence holds all positions before `first` that a query there may see."""
        lo, device = 0 if window is None else max(0, first - window + 1), self.pos.device
        pos = torch.cat([torch.arange(min(self.sinks, lo), device=device), torch.arange(lo, first, device=device)])
        return bool((self.pos[:, self.slots_of(pos)[0]] == pos).all())

    def write(self, pos: Tensor, span: Span) -> Write:
        """Note that the slots of pos (1 or B, T) hold these positions now; returns where their keys go."""
        T = pos.size(1)
        if span.uniform and (span.contiguous if self.copies == 2 else span.first is not None or T <= self.n_slots):
            tokens = slice(None)
            if T > self.n_slots:  # of more than M tokens the last M stay, and the sinks
                order, n = torch.arange(T, device=pos.device), max(0, min(T, self.sinks - span.first))
                tokens = torch.cat([order[:n], order[T - self.n_slots :]]) if n else slice(T - self.n_slots, T)
            write = Write(self.slots_of(pos[0, tokens]), tokens)
            for slots in write.slots:
                self.pos.index_copy_(1, slots, pos[:, tokens].expand(self.pos.size(0), -1))
            return write
        pos = pos.expand(self.pos.size(0), -1)
        write = self.write_each(pos)
        stored = torch.where(write.any_token, pos.gather(1, write.tokens), self.pos[:, :1])
        for slots in write.slots:
            self.pos.scatter_(1, slots, stored)
        return write

    def write_each(self, pos: Tensor) -> Write:
        """Sequences at positions of their own, (B, T): padding is not kept, nor is a token that M later ones follow.

        A write has a fixed shape, so what is not kept writes its sequence's newest token again, to that token's slot.
        """
        T = pos.size(1)
        token = pos >= 0
        order = torch.arange(T, device=pos.device).expand_as(pos)
        newest = torch.where(token, order, 0).amax(dim=1, keepdim=True)  # (B, 1)
        kept = token & ((pos > pos.gather(1, newest) - self.n_slots) | (pos < self.sinks))
        tokens = torch.where(kept, order, newest)
        any_token = token.any(dim=1, keepdim=True)
        return Write(self.slots_of(torch.where(any_token, pos.gather(1, tokens), 0)), tokens, any_token)

    def view(self, T: int, span: Span, window: int | None) -> tuple[slice, Layout | None]:
        """The slots that a call of T tokens, already written, reads, and how the keys lie there; None: anyhow."""
        everything = self.sinks + self.n_slots
        if span.first is None or not span.contiguous:
            known = span.last is not None and (self.copies == 1 or span.uniform)
            return slice(0, max(1, min(everything, span.last + 1)) if known else everything), None  # one slot at least
        first, held = span.first, span.last + 1
        if self.copies == 1 or held <= everything:  # nothing has wrapped
            start = 0 if window is None or self.sinks else max(0, first - window + 1)
            return slice(start, held), Layout(first, first - start)
        end = self.sinks + (span.last - self.sinks) % self.n_slots + self.n_slots + 1
        start = 0 if self.sinks else end - min(window - 1 + T, held)
        return slice(start, end), Layout(first, end - T - start, self.sinks)

    def recent(self, pos: Tensor, first: Tensor, span: Span, n: int) -> tuple[list, Tensor, Layout | None]:
        """The slots of the sinks and of the n positions before the call's first; the positions (B, L) that they hold,
        -1 for one that is not there; and how these keys, with the call's own behind them, lie."""
        sinks, most = self.sinks, None if self.copies == 2 else self.sinks + self.n_slots - 1
        layout = Layout(n, n, exact=False) if span.contiguous and not sinks else None
        if span.first is not None:  # uniform
            sinks = min(sinks, span.first)
            n = min(n, span.first - sinks)
            layout = Layout(span.first, sinks + n, sinks if span.first > sinks else 0) if span.contiguous else None
        before = (pos[:, :1] if span.contiguous else first) - n + torch.arange(n, device=pos.device)  # (1 or B, n)
        read = self.slots_of(before.clamp(self.sinks, most))[0].expand(self.pos.size(0), n)
        held = self.pos.gather(1, read)
        held = torch.where(held == before, before, -1)
        return [slice(0, sinks), read], torch.cat([self.pos[:, :sinks], held], dim=1), layout


class KVCache(nn.Module):
    """Keys, after RoPE unless it depends on the text's length, and values of a layer: (B, G, sinks + copies * M, D)."""

    def __init__(self, slots: Slots, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.slots = slots
        self.register_buffer("k", torch.zeros(shape, device=device, dtype=dtype), persistent=False)
        self.register_buffer("v", torch.zeros(shape, device=device, dtype=dtype), persistent=False)

    @property
    def bytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()

    @property
    def unbounded(self) -> bool:
        """True if any number of tokens can go through: it rolls, and holds a whole window."""
        return self.slots.window is not None and self.slots.n_slots - self.slots.lookahead >= self.slots.window

    def reset(self) -> None:
        self.slots.pos.fill_(-1)

    def can_take_back(self, n: int) -> bool:
        return self.slots.window is None or n <= self.slots.lookahead

    def take_back(self, n: int) -> None:
        """Nothing to do: causality hides the newest tokens from those that are fed at their positions next."""

    def take_over(self, old: "KVCache") -> None:
        """Hold what a smaller cache holds."""
        rows, source, targets = self.slots.take_over(old.slots)
        for slots in targets:
            self.k[rows, :, slots] = old.k[rows, :, source]
            self.v[rows, :, slots] = old.v[rows, :, source]

    def exchange(self, k: Tensor, v: Tensor, plan: Exchange) -> tuple[Tensor, Tensor]:
        """Take in the call's keys and values (B, G, T, D), and give those that its queries read (B, G, L, D)."""
        return exchange(self.k, k, plan), exchange(self.v, v, plan)


def exchange(held: Tensor, new: Tensor, plan: Exchange) -> Tensor:
    new = new if new.dtype == held.dtype else new.to(held.dtype).to(new.dtype)  # a key is rounded whoever reads it
    if plan.write_first:
        write_slots(held, new, plan.write)
        return read_slots(held, plan.read[0]).to(new.dtype)
    read = [read_slots(held, slots).to(new.dtype) for slots in plan.read]
    read = torch.cat([*read, new], dim=2) if read else new
    write_slots(held, new, plan.write)
    return read


def read_slots(held: Tensor, slots: slice | Tensor) -> Tensor:
    """What (B, G, slots, D) holds in some of them: a view for a slice, a copy for slots (B, n) of each sequence."""
    if isinstance(slots, slice):
        return held[:, :, slots]
    return held[torch.arange(held.size(0), device=held.device)[:, None], :, slots].transpose(1, 2)  # (B, G, n, D)


def write_slots(held: Tensor, new: Tensor, write: Write) -> None:
    """Put what is new (B, G, T, D) into its slots, in every copy. No gradient flows through a cache."""
    new = new.detach().to(held.dtype)
    if write.any_token is None:
        new = new[:, :, write.tokens]
        for slots in write.slots:
            held.index_copy_(2, slots, new)
        return
    new = new.gather(2, write.tokens[:, None, :, None].expand_as(new))
    new = torch.where(write.any_token[:, None, :, None], new, held[:, :, :1])
    for slots in write.slots:
        held.scatter_(2, slots[:, None, :, None].expand_as(new), new)


# ----------------------------------------------------------------------------------------------------------- MLP, norms


class GatedMLP(nn.Module):
    """act(fc_1(x)) * fc_2(x), projected back (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: Config, size: int | None = None) -> None:
        super().__init__()
        size = size or config.intermediate_size
        self.fc_1 = nn.Linear(config.n_embd, size, bias=config.mlp_bias)
        self.fc_2 = nn.Linear(config.n_embd, size, bias=config.mlp_bias)
        self.proj = nn.Linear(size, config.n_embd, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.activation(self.fc_1(x)) * self.fc_2(x))


class PlainMLP(nn.Module):
    """proj(act(fc(x)))"""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.activation(self.fc(x)))


MLPS = {"GatedMLP": GatedMLP, "PlainMLP": PlainMLP}
GELU_TANH = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": GELU_TANH, "relu": F.relu}


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 (Zhang and Sennrich 2019, arXiv 1910.07467). unit_offset: times (1 + weight)."""

    def __init__(self, size: int, eps: float, unit_offset: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.unit_offset = eps, unit_offset
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.unit_offset else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        if not self.unit_offset:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # in float32 inside
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).to(x.dtype)


def build_norm(config: Config, size: int, wanted: bool = True) -> nn.Module:
    if not wanted:
        return nn.Identity()
    if config.norm_class_name == "LayerNorm":
        return nn.LayerNorm(size, config.norm_eps, config.norm_weight, config.norm_bias)
    return RMSNorm(size, config.norm_eps, config.norm_unit_offset)


def build_head_norm(config: Config, layer: int, heads: int) -> nn.Module:
    """What queries or keys (B, heads, T, D) are normed by."""
    if not config.norm_qk or config.norm_qk_type == "head":
        return build_norm(config, config.head_size, config.norm_qk)
    return checks.module_beside("head_norms").build(config, layer, heads)


for name in ("linear", "chunked"):
    checks.module_beside(name)  # it adds its row to VARIANTS
