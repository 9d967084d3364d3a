"""A GPT with every attention variant of the project in one file: read it from the top, change it in place.

Config -> GPT -> Block -> CausalSelfAttention -> VARIANTS (who sees whom) -> attend -> KV caches -> RoPE -> MLP, norms.
It imports torch and the standard library only; copied alone into another project, it works.

Notation, used in every shape comment:
    B  batch                    C  n_embd            S  sliding_window_size
    T  tokens in this call      H  n_head            M  slots of a cache
    L  keys a query may meet    G  n_query_groups    V  padded_vocab_size
    D  head_size                R  H // G, the query heads that share one key/value head

    who sees whom, T = 8 (row: query, column: key)

    full            sliding, S = 3
    x . . . . . . .     x . . . . . . .
    x x . . . . . .     x x . . . . . .
    x x x . . . . .     x x x . . . . .
    x x x x . . . .     . x x x . . . .
    x x x x x . . .     . . x x x . . .
    x x x x x x . .     . . . x x x . .
    x x x x x x x .     . . . . x x x .
    x x x x x x x x     . . . . . x x x

Positions rule everything. A token's position is its place in its sequence; masks, RoPE and cache slots are functions of
positions, so that any split of a sequence into calls gives the same logits as one call. A negative position marks
padding: it is seen by nobody and written nowhere.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------------------------------------- Config


@dataclass
class Config:
    """The fields that shape a model. Behaviour follows from them alone: `name` is for people."""

    name: str = ""
    # shape
    n_layer: int = 16
    n_head: int = 32
    n_query_groups: int | None = None  # key/value heads; None: as many as query heads
    n_embd: int = 4096
    head_size: int | None = None  # None: n_embd // n_head
    intermediate_size: int | None = None  # None: 4 * n_embd
    block_size: int = 4096  # the context, in tokens, that a layer without a window can take
    vocab_size: int = 50257
    padded_vocab_size: int | None = None  # rows of the embedding; None: vocab_size
    tie_embeddings: bool = False  # lm_head shares its weight with wte
    # block
    norm_class_name: str = "RMSNorm"
    norm_eps: float = 1e-5
    norm_unit_offset: bool = False  # Gemma: the norm multiplies by (1 + weight)
    norm_qk: bool = False  # Qwen3, Gemma 3: RMSNorm over the head size of queries and keys, before RoPE
    post_attention_norm: bool = False  # Gemma 2 and 3: a norm also behind the attention ...
    post_mlp_norm: bool = False  # ... and behind the MLP
    parallel_residual: bool = False  # NeoX: x + attn(norm_1(x)) + mlp(norm_2(x))
    mlp_class_name: str = "GatedMLP"
    activation: str = "silu"
    attn_bias: bool = False  # of the query, key and value projections
    attn_proj_bias: bool = False
    mlp_bias: bool = False
    scale_embeddings: bool = False  # Gemma: embeddings times sqrt(n_embd)
    final_logit_softcapping: float | None = None  # c: logits become c * tanh(logits / c)
    # positions
    rope_base: float = 10000.0
    rope_local_base_freq: float | None = None  # Gemma 3: the base of the layers with a window; None: rope_base
    rotary_percentage: float = 1.0  # the share of each head that RoPE turns
    rope_scaling: dict | None = (
        None  # {"type": "linear", "factor": 4.0}; see ROPE_SCALINGS. Not for rope_local_base_freq
    )
    # attention
    attention: str = "full"  # a variant, or a comma list that tiles over the layers: "sliding,full"
    sliding_window_size: int | None = None  # S: a query at p sees the S keys p - S + 1 .. p
    rolling_kv_cache: bool = False  # layers with a window keep 2S slots instead of one for every position
    attention_scores_scalar: int | None = None  # scores are divided by its square root; None: head_size
    attention_logit_softcapping: float | None = None  # c: scores become c * tanh(scores / c)
    attention_backend: str = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        if self.n_query_groups is None:
            self.n_query_groups = self.n_head
        if self.head_size is None:
            self.head_size = max(1, self.n_embd // max(1, self.n_head))
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.n_embd
        if self.padded_vocab_size is None:
            self.padded_vocab_size = self.vocab_size
        check_values(self)

    @property
    def layer_variants(self) -> list[str]:
        """The attention variant of every layer: the pattern, tiled and cut to n_layer."""
        pattern = [v.strip() for v in self.attention.split(",")]
        return [pattern[i % len(pattern)] for i in range(self.n_layer)]

    @property
    def rope_n_elem(self) -> int:
        """How many of the D elements of a head RoPE turns; even."""
        return int(self.rotary_percentage * self.head_size)

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> "Config":
        """The config with the fields `values`, as lit_config.json holds them, some of them overridden.

        Raises ValueError for an unknown field, and for an override that would do nothing.
        """
        reject_unknown_fields(values | overrides)
        config = cls(**values | overrides)
        windowed = any(VARIANTS[v].window(config) for v in config.layer_variants)
        for name in ("sliding_window_size", "rolling_kv_cache", "rope_local_base_freq"):
            if overrides.get(name) and not windowed:
                raise ValueError(
                    f"{name}={overrides[name]} has no effect with attention={config.attention!r}: "
                    "also set attention to 'sliding' or to a pattern that contains it."
                )
        return config

    def override(self, **overrides: Any) -> "Config":
        """A copy with some fields changed, judged as in from_dict."""
        return self.from_dict({f.name: getattr(self, f.name) for f in fields(self)}, **overrides)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "Config":
        """A named shape of lit_swa/configs.py. Raises ValueError, with the near names, when there is none."""
        from lit_swa.configs import CONFIGS

        if name not in CONFIGS:
            near = difflib.get_close_matches(name, CONFIGS, n=3, cutoff=0.3) or sorted(CONFIGS)
            raise ValueError(f"There is no model named {name!r}: choose from {', '.join(near)}.")
        return cls.from_dict(CONFIGS[name] | {"name": name}, **overrides)

    @classmethod
    def from_hf(cls, path_or_dict: str | Path | dict[str, Any], **overrides: Any) -> "Config":
        """From a Hugging Face config.json (its path, its directory, or its content)."""
        from lit_swa.configs import config_from_hf

        return cls.from_dict(config_from_hf(path_or_dict), **overrides)


CHOICES = {
    "norm_class_name": ("RMSNorm", "LayerNorm"),
    "mlp_class_name": ("GatedMLP", "PlainMLP"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu"),
    "attention_backend": ("auto", "sdpa"),
}
RANGES: dict[str, tuple[float, float]] = {  # least and greatest value, both allowed
    "n_layer": (1, 4096),
    "n_head": (1, 4096),
    "n_query_groups": (1, 4096),
    "n_embd": (1, 2**18),
    "head_size": (1, 2**14),
    "intermediate_size": (1, 2**20),
    "block_size": (1, 2**31),
    "vocab_size": (1, 2**24),
    "padded_vocab_size": (1, 2**24),
    "norm_eps": (0.0, 1.0),
    "rope_base": (1e-3, 1e12),
    "rope_local_base_freq": (1e-3, 1e12),
    "rotary_percentage": (0.0, 1.0),
    "sliding_window_size": (1, 2**31),
    "attention_scores_scalar": (1, 2**31),
    "attention_logit_softcapping": (1e-3, 1e6),
    "final_logit_softcapping": (1e-3, 1e6),
}


def reject_unknown_fields(values: dict[str, Any]) -> None:
    known = [f.name for f in fields(Config)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4) or known
            raise ValueError(f"The config has no field {str(name)!r}: did you mean {' or '.join(near)}?")


def check_types(config: Config) -> None:
    """Every field has its annotated type; an int is welcome where a float is asked for."""
    for f in fields(Config):
        value, allowed = getattr(config, f.name), f.type if isinstance(f.type, type) else f.type.__args__
        allowed = allowed if isinstance(allowed, tuple) else (allowed,)
        if float in allowed and type(value) is int:
            value = float(value) if abs(value) < 2**53 else math.inf  # which no range admits
            setattr(config, f.name, value)
        if type(value) not in allowed:
            names = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
            raise ValueError(f"{f.name}={value!r} does not fit: it must be of type {names}.")


def check_values(config: Config) -> None:
    """Every value is one that a model can be built from. The only place where fields are judged."""
    for name, (least, most) in RANGES.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:  # NaN fails every comparison
            raise ValueError(f"{name}={value} does not fit: it must lie between {least} and {most}.")
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"{name}={getattr(config, name)!r} does not fit: choose from {', '.join(choices)}.")
    if config.n_head % config.n_query_groups:
        raise ValueError(
            f"n_query_groups={config.n_query_groups} does not divide n_head={config.n_head}: "
            "every key/value head must serve the same number of query heads."
        )
    if config.padded_vocab_size < config.vocab_size:
        raise ValueError(f"padded_vocab_size={config.padded_vocab_size} is less than vocab_size={config.vocab_size}.")
    if config.rope_n_elem % 2:
        raise ValueError(
            f"rotary_percentage={config.rotary_percentage} of head_size={config.head_size} is "
            f"{config.rope_n_elem} elements: RoPE turns pairs, so it must be an even number."
        )
    for variant in config.attention.split(","):
        if variant.strip() not in VARIANTS:
            raise ValueError(
                f"attention={config.attention!r} does not fit: {variant.strip()!r} is none of {', '.join(VARIANTS)}."
            )
    if config.sliding_window_size is None and any(v == "sliding" for v in config.layer_variants):
        raise ValueError(f"attention={config.attention!r} needs sliding_window_size, the number of keys a query sees.")
    check_rope_scaling(config.rope_scaling)


# ---------------------------------------------------------------------------------------------------------------- GPT


class GPT(nn.Module):
    """A decoder-only transformer.

    `model(idx)` reads whole sequences. After `set_kv_cache`, `model(idx, input_pos)` continues them, in calls of any
    length. Dtype and device are those of the weights.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
                "h": nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
                "ln_f": build_norm(config, config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.rope = RoPE(config)
        self.slot_maps = nn.ModuleDict()  # variant -> SlotMap, once set_kv_cache was called
        self.max_seq_length = config.block_size
        self.fixed_shape_steps = False  # True: a one-token call never looks at its position, so no shape depends on it
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make lm_head share wte's weight where the config says so. To be called again after weights were replaced."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight

    def forward(
        self,
        idx: Tensor,
        input_pos: Tensor | None = None,
        *,
        input_pos_maxp1: int | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Logits (B, T, V) of the token that follows each of idx (B, T), int64.

        input_pos: the tokens' positions, (T,) or (B, T), ascending in each row, negative for padding; the keys and
            values then go through the cache. None: the sequences are whole and nothing is cached.
        input_pos_maxp1: the greatest position + 1, if the caller knows it: spares the GPU unneeded slots of a dense
            cache in an eager decode step. A compiled step does without, or it would recompile as the position grows.
        logits_to_keep: k > 0 computes logits for the last k tokens only, (B, k, V); 0 for all.
        Raises ValueError when the tokens do not fit the context or the cache.
        """
        x = self.hidden_states(idx, input_pos, input_pos_maxp1=input_pos_maxp1)
        return self.project(x[:, -logits_to_keep:])  # [-0:] is all

    def hidden_states(
        self, idx: Tensor, input_pos: Tensor | None = None, *, input_pos_maxp1: int | None = None
    ) -> Tensor:
        """What `project` makes logits of, (B, T, C): a long text's logits need not exist all at once."""
        call = self.plan_call(idx, input_pos, input_pos_maxp1)
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.config.scale_embeddings:
            x = x * torch.tensor(self.config.n_embd**0.5, dtype=x.dtype)  # rounded to x's dtype, as Gemma was trained
        for block in self.transformer.h:
            x = block(x, call)
        return x

    def project(self, x: Tensor) -> Tensor:
        """Logits (B, T, V) of hidden states (B, T, C)."""
        return softcap(self.lm_head(self.transformer.ln_f(x)), self.config.final_logit_softcapping)

    def plan_call(self, idx: Tensor, input_pos: Tensor | None, maxp1: int | None) -> "Call":
        """Everything that the layers of one call share: RoPE's angles and, per variant, which query meets which key."""
        (B, T), device = idx.shape, idx.device
        cached = input_pos is not None
        if cached and not self.slot_maps:
            raise ValueError("input_pos needs a cache: call model.set_kv_cache(batch_size, max_seq_length) first.")
        pos = input_pos if cached else torch.arange(T, device=device)
        if not cached:
            span = Span(True, 0, T - 1, contiguous=True, fresh=True)
        elif torch.compiler.is_compiling() or (self.fixed_shape_steps and T == 1):
            span = Span(uniform=pos.dim() == 1, contiguous=T == 1)
        else:
            span = find_span(pos, maxp1)
        self.check_span(B, T, pos, span, cached)
        pos = pos.view(-1, T)  # (1, T): the same for every row, or (B, T)
        plans = {}
        for name in dict.fromkeys(self.config.layer_variants):
            window = VARIANTS[name].window(self.config)
            slot_map = self.slot_maps[name] if cached else None
            plans[name] = build_plan(name, self.config, pos, span, window, slot_map)
        return Call(self.rope(pos), plans)

    def check_span(self, B: int, T: int, pos: Tensor, span: "Span", cached: bool) -> None:
        """Refuse, in words, what would silently go wrong. A compiled step knows no positions and is not checked."""
        if cached and pos.shape not in ((T,), (B, T)):
            raise ValueError(
                f"input_pos has the shape {tuple(pos.shape)}: give ({T},) or ({B}, {T}), one position a token."
            )
        if T == 0:
            raise ValueError("There are no tokens: give at least one.")
        if cached and (rows := next(iter(self.slot_maps.values())).pos.size(0)) != B:
            raise ValueError(
                f"The cache was set up for {rows} rows and idx has {B}: call set_kv_cache(batch_size={B})."
            )
        if span.first is not None and span.first < 0:
            raise ValueError(
                f"Position {span.first} is negative, which marks padding: give input_pos as ({B}, {T}), row by row."
            )
        limit = self.max_seq_length if cached else self.config.block_size
        if span.last is not None and span.last >= limit and not self.unbounded(cached):
            remedy = "set_kv_cache with a larger max_seq_length" if cached else "a larger block_size"
            raise ValueError(
                f"Position {span.last} lies outside the context of {limit} tokens: use {remedy}, or a sliding window."
            )

    def unbounded(self, cached: bool) -> bool:
        """True when no layer ever needs more than its window, so that text of any length can be read.

        A cache must roll for that, and hold a whole window: one for less than S positions ends with them.
        """
        windows = [VARIANTS[v].window(self.config) for v in self.config.layer_variants]
        if None in windows or not cached:
            return None not in windows
        return self.config.rolling_kv_cache and (not self.slot_maps or self.max_seq_length >= max(windows))

    def set_kv_cache(
        self,
        batch_size: int,
        max_seq_length: int | None = None,
        *,
        lookahead: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Give every layer the empty cache that its variant asks for.

        max_seq_length: positions that the call sequence may use; None: block_size.
        lookahead: how many tokens may be taken back (fed again at an earlier position) at any time; only a rolling
            cache needs room for it.
        """
        max_seq_length = self.config.block_size if max_seq_length is None else max_seq_length
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("max_seq_length", max_seq_length, 1),
            ("lookahead", lookahead, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} does not fit: it must be at least {least}.")
        if max_seq_length > self.config.block_size and not self.unbounded(cached=False):
            raise ValueError(
                f"max_seq_length={max_seq_length} is more than the context of {self.config.block_size} tokens "
                "(block_size): shorten it, set block_size, or give every layer a sliding window."
            )
        self.clear_kv_cache()
        self.max_seq_length = max_seq_length
        weight = self.transformer.wte.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        for name in dict.fromkeys(self.config.layer_variants):
            n_slots, copies = VARIANTS[name].cache(self.config, max_seq_length, lookahead)
            self.slot_maps[name] = SlotMap(batch_size, n_slots, copies, lookahead, device)
        for block in self.transformer.h:
            slot_map = self.slot_maps[block.attn.variant]
            shape = (batch_size, self.config.n_query_groups, slot_map.copies * slot_map.n_slots, self.config.head_size)
            block.attn.kv_cache = KVCache(shape, device, dtype)

    def extend_kv_cache(self, max_seq_length: int) -> None:
        """Make room for more positions, and keep what the caches hold."""
        slot_maps, caches = dict(self.slot_maps.items()), [block.attn.kv_cache for block in self.transformer.h]
        first, dtype = next(iter(slot_maps.values())), caches[0].k.dtype
        self.set_kv_cache(
            first.pos.size(0), max_seq_length, lookahead=first.lookahead, device=first.pos.device, dtype=dtype
        )
        moves = {name: self.slot_maps[name].take_over(old) for name, old in slot_maps.items()}
        for block, old in zip(self.transformer.h, caches, strict=True):
            block.attn.kv_cache.take_over(old, *moves[block.attn.variant])

    def clear_kv_cache(self) -> None:
        """Free the caches."""
        self.slot_maps = nn.ModuleDict()
        self.max_seq_length = self.config.block_size
        for block in self.transformer.h:
            block.attn.kv_cache = None

    def reset_kv_cache(self) -> None:
        """Empty the caches without freeing them: no slot holds a position any more."""
        for slot_map in self.slot_maps.values():
            slot_map.pos.fill_(-1)

    def kv_cache_bytes(self) -> int:
        """Bytes of keys and values in the caches."""
        caches = [block.attn.kv_cache for block in self.transformer.h if block.attn.kv_cache is not None]
        return sum(t.numel() * t.element_size() for cache in caches for t in (cache.k, cache.v))


class Block(nn.Module):
    """Attention and MLP around the residual stream."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.norm_1 = build_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.post_attention_norm = build_norm(config, config.n_embd) if config.post_attention_norm else nn.Identity()
        self.norm_2 = build_norm(config, config.n_embd)
        self.mlp = {"GatedMLP": GatedMLP, "PlainMLP": PlainMLP}[config.mlp_class_name](config)
        self.post_mlp_norm = build_norm(config, config.n_embd) if config.post_mlp_norm else nn.Identity()
        self.parallel_residual = config.parallel_residual

    def forward(self, x: Tensor, call: "Call") -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        attended = x + self.post_attention_norm(self.attn(self.norm_1(x), call))
        mlp_input = x if self.parallel_residual else attended
        return attended + self.post_mlp_norm(self.mlp(self.norm_2(mlp_input)))


class CausalSelfAttention(nn.Module):
    """Project, turn by RoPE, meet the keys as the layer's variant says, project back."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        H, G, D = config.n_head, config.n_query_groups, config.head_size
        self.qkv = nn.Linear(config.n_embd, (H + 2 * G) * D, bias=config.attn_bias)  # rows: H queries, G keys, G values
        self.proj = nn.Linear(H * D, config.n_embd, bias=config.attn_proj_bias)
        self.norm_q = build_norm(config, D) if config.norm_qk else nn.Identity()
        self.norm_k = build_norm(config, D) if config.norm_qk else nn.Identity()
        self.variant = config.layer_variants[layer]
        self.rope_table = rope_table_index(config, self.variant)
        self.kv_cache: KVCache | None = None
        self.config = config

    def forward(self, x: Tensor, call: "Call") -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        (B, T, _), H, G, D = x.shape, self.config.n_head, self.config.n_query_groups, self.config.head_size
        qkv = self.qkv(x).view(B, T, H + 2 * G, D).transpose(1, 2)  # (B, H + 2G, T, D)
        q, k, v = qkv.split((H, G, G), dim=1)
        cos, sin = call.rope[self.rope_table]
        q = apply_rope(self.norm_q(q), cos, sin)  # (B, H, T, D)
        k = apply_rope(self.norm_k(k), cos, sin)  # (B, G, T, D)
        plan = call.plans[self.variant]
        if plan.write is not None:
            k, v = self.kv_cache.exchange(k, v, plan)  # (B, G, L, D)
        y = VARIANTS[self.variant].attend(q, k, v, plan.blocks, self.config)  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, T, H * D) -> (B, T, C)


# -------------------------------------------------------------------------------------- the variants, and who sees whom
#
# A mask function takes absolute positions that broadcast against each other, and says which query may see which key.
# Causality, empty slots and padding are added once, by visible(). To add a variant: its function, and a row below.


def full(q: Tensor, k: Tensor, c: Config) -> Tensor:
    return k <= q


def sliding(q: Tensor, k: Tensor, c: Config) -> Tensor:
    return q - k < c.sliding_window_size


def no_window(c: Config) -> None:
    return None


def sliding_window(c: Config) -> int:
    return c.sliding_window_size


def dense_cache(c: Config, max_seq_length: int, lookahead: int) -> tuple[int, int]:
    """A slot for every position: (slots, copies of each)."""
    return max_seq_length, 1


def window_cache(c: Config, max_seq_length: int, lookahead: int) -> tuple[int, int]:
    """The rolling cache keeps the last S + lookahead positions, each twice; without it, a slot for every position."""
    if not c.rolling_kv_cache:
        return dense_cache(c, max_seq_length, lookahead)
    return min(c.sliding_window_size, max_seq_length) + lookahead, 2


class Variant(NamedTuple):
    mask: Callable[[Tensor, Tensor, Config], Tensor]  # (query positions, key positions) -> bool
    window: Callable[[Config], int | None]  # how many keys back a query can see at most, itself included
    cache: Callable[[Config, int, int], tuple[int, int]]  # (max_seq_length, lookahead) -> (slots, copies)
    attend: Callable[..., Tensor]  # how queries meet keys


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: "list[QueryBlock]", config: Config) -> Tensor:
    """Softmax attention of q (B, H, T, D) over k, v (B, G, L, D), one block of queries after the other."""
    if len(blocks) == 1:  # of all queries and all keys
        return attend_block(q, k, v, blocks[0], config)
    outputs = []
    for block in blocks:
        q_block, k_block, v_block = q[:, :, block.queries], k[:, :, block.keys], v[:, :, block.keys]
        outputs.append(attend_block(q_block, k_block, v_block, block, config))
    return torch.cat(outputs, dim=2)


VARIANTS: dict[str, Variant] = {
    "full": Variant(full, no_window, dense_cache, attend),
    "sliding": Variant(sliding, sliding_window, window_cache, attend),
}


def visible(variant: str, q_pos: Tensor, k_pos: Tensor, config: Config) -> Tensor:
    """Which of the queries at q_pos (B, T) sees which of the keys at k_pos (B, L): (B, T, L) bool.

    A key at a negative position (an empty slot, padding) is seen by no token. A padding query sees everything, since a
    softmax over nothing is NaN and would spread through the values to the tokens of the next layer.
    """
    q, k = q_pos[:, :, None], k_pos[:, None, :]
    return ((0 <= k) & (k <= q) & VARIANTS[variant].mask(q, k, config)) | (q < 0)


def attend_block(q: Tensor, k: Tensor, v: Tensor, block: "QueryBlock", config: Config) -> Tensor:
    """(B, H, T, D) x (B, G, L, D) -> (B, H, T, D), under the block's mask."""
    (B, H, T, D), G = q.shape, k.size(1)
    scale = (config.attention_scores_scalar or config.head_size) ** -0.5
    if block.causal:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=H != G)
    # The R query heads of a group are R more queries of one head: no key is copied, and any kernel will do.
    q = q.reshape(B, G, -1, D)  # (B, G, R * T, D)
    if config.attention_logit_softcapping is None:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=block.mask, scale=scale)
    else:
        scores = softcap(q @ k.mT * scale, config.attention_logit_softcapping)  # (B, G, R * T, L)
        if block.mask is not None:
            scores = scores.masked_fill(~block.mask, -math.inf)
        y = F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v
    return y.reshape(B, H, T, D)


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """Bend x smoothly into (-cap, cap)."""
    return x if cap is None else cap * torch.tanh(x / cap)


# ------------------------------------------------------------------------------------ what a call shares between layers


class Call(NamedTuple):
    rope: list[tuple[Tensor, Tensor]]  # cos and sin, (1 or B, 1, T, rope_n_elem), one pair per base
    plans: "dict[str, Plan]"  # variant -> plan


class Plan(NamedTuple):
    """How the layers of one variant treat one call."""

    blocks: "list[QueryBlock]"
    write: "Write | None" = None  # where the call's keys go; None: there is no cache
    read: Tensor | slice | None = None  # the slots that queries meet; None: they meet the call's own keys only
    write_first: bool = False  # True: write, then read `read`. False: read it, put the call's own keys behind, write


class QueryBlock(NamedTuple):
    """Some queries, the keys that they meet, and which of these they see."""

    queries: slice
    keys: slice
    mask: Tensor | None = None  # (1 or B, 1, R * T, L) bool; None: every key is seen ...
    causal: bool = False  # ... or, if this is set, the lower triangle


class Span(NamedTuple):
    """What is known of a call's positions outside the device. None and False: not known, as in a compiled step."""

    uniform: bool  # all rows are at the same positions, and none is padding
    first: int | None = None  # of a uniform call
    last: int | None = None  # the greatest of all rows
    contiguous: bool = False  # in every row each position is the one before + 1
    fresh: bool = False  # every row is 0 .. T - 1: nothing cached matters


QUERY_BLOCK = {"cpu": 128, "cuda": 512}  # queries in one masked block; on 2 CPU cores 64 to 256 take the same time
SCORE_ELEMENTS = 2**27  # bound on rows * heads * queries * keys of one block: what it may put into memory


def find_span(pos: Tensor, maxp1: int | None) -> Span:
    """Look at positions (T,) or (B, T) where that costs nothing: on a CPU, and on a GPU for more than one token."""
    uniform, T = pos.dim() == 1, pos.size(-1)
    if pos.is_meta or pos.numel() == 0:
        return Span(uniform, contiguous=T == 1)
    if T == 1 and pos.device.type != "cpu":
        last = None if maxp1 is None else maxp1 - 1
        return Span(uniform, last if uniform else None, last, contiguous=True)
    in_step = (pos.diff(dim=-1) == 1).all()
    first, last, contiguous, last_start = torch.stack([pos.min(), pos.max(), in_step, pos[..., 0].max()]).tolist()
    uniform = uniform or (pos.size(0) == 1 and first >= 0)
    fresh = bool(contiguous) and first == last_start == 0
    return Span(uniform, first if uniform else None, last, bool(contiguous), fresh)


def build_plan(
    variant: str, config: Config, pos: Tensor, span: Span, window: int | None, slot_map: "SlotMap | None"
) -> Plan:
    """Decide for one variant what this call's queries, at pos (1 or B, T), meet.

    Three cases: a fresh sequence meets itself; a short call (one token, or a verify step of up to lookahead + 1) and
    a layer without a window write first and meet the cache; a long call to a layer with a window meets the last
    window - 1 cached keys and its own, and only then writes, since its keys may replace those that its first rows see.
    """
    T = pos.size(1)
    if slot_map is None or span.fresh:
        blocks = split_queries(variant, config, pos, pos, window, span, offset=0)
        return Plan(blocks, None if slot_map is None else slot_map.write(pos, span))
    if span.last is not None and window is not None:
        slot_map.check_kept(pos[:, :1], window)
    if window is None or T <= 1 + slot_map.lookahead:
        write = slot_map.write(pos, span)
        read, offset = slot_map.view(T, span, window)
        blocks = split_queries(variant, config, pos, slot_map.pos[:, read], window, span, offset)
        return Plan(blocks, write, read, write_first=True)
    read, old_pos = slot_map.recent(pos, span, window - 1)
    write = slot_map.write(pos, span)
    k_pos = torch.cat([old_pos, pos.expand(old_pos.size(0), T)], dim=1)
    offset = old_pos.size(1) if span.contiguous else None
    return Plan(split_queries(variant, config, pos, k_pos, window, span, offset), write, read)


def split_queries(
    variant: str,
    config: Config,
    q_pos: Tensor,
    k_pos: Tensor,
    window: int | None,
    span: Span,
    offset: int | None,
) -> list[QueryBlock]:
    """Cut the queries at q_pos (1 or B, T) into blocks, and name for each the keys, of k_pos (1 or B, L), in its reach.

    offset: the index, among the keys, of the first query's own key, where keys and queries go in step; a block then
    meets only the keys from its first query's window up to its own last: O(T * S) in all. None: every block meets all.
    """
    T, L = q_pos.size(1), k_pos.size(1)
    if span.fresh and (window is None or T <= window) and config.attention_logit_softcapping is None:
        return [QueryBlock(slice(0, T), slice(0, L), causal=True)]
    rows = max(q_pos.size(0), k_pos.size(0)) * config.n_head
    reach = L if window is None else min(L, window + QUERY_BLOCK["cuda"])
    size = max(1, min(QUERY_BLOCK.get(q_pos.device.type, QUERY_BLOCK["cuda"]), SCORE_ELEMENTS // (rows * reach)))
    blocks: list[QueryBlock] = []
    shared: Tensor | None = None
    for start in reversed(range(0, T, size)):  # the block with the most keys first
        stop, lo, hi = min(start + size, T), 0, L
        if offset is not None:
            lo, hi = max(0, offset + start - (window or L) + 1), offset + stop
        mask = visible(variant, q_pos[:, start:stop], k_pos[:, lo:hi], config)[:, None]  # (1 or B, 1, T, L)
        if T > 1:  # one query broadcasts over R by itself
            mask = mask.repeat(1, 1, config.n_head // config.n_query_groups, 1)
        if span.last is not None and not torch.compiler.is_compiling() and (T > 1 or mask.device.type == "cpu"):
            mask = shared = share_mask(mask, shared)
        blocks.append(QueryBlock(slice(start, stop), slice(lo, hi), mask))
    return blocks[::-1]


def share_mask(mask: Tensor, shared: Tensor | None) -> Tensor | None:
    """None if every key is seen; the last columns of `shared` if they are the same, so that a prompt holds one mask.

    Blocks of a prompt see the same pattern up to their newest key; without this their masks would add up to T * L.
    """
    if mask.all():
        return None
    if shared is not None and shared.size(-2) == mask.size(-2) and shared.size(-1) >= mask.size(-1):
        columns = shared[..., shared.size(-1) - mask.size(-1) :]
        if torch.equal(columns, mask):
            return columns
    return mask


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
# A step whose position is not known on the host (compiled, or rows at different positions) reads slots 0 .. M - 1
# instead: the same keys, rotated, and the mask is made from their positions. Both read S keys and copy none.


class Write(NamedTuple):
    """Where a call's keys and values go."""

    slots: list[Tensor]  # per copy: (T',) for the last T' tokens of every row, or (B, T) where rows differ
    source: Tensor | None = None  # (B, T) where rows differ: the token that goes to each of the slots
    any_token: Tensor | None = None  # (B, 1) False for a row of padding alone, which writes nothing


class SlotMap(nn.Module):
    """Which position each slot holds, (B, copies * M), -1 for an empty one: shared by all layers of one variant."""

    def __init__(self, batch_size: int, n_slots: int, copies: int, lookahead: int, device: torch.device | str) -> None:
        super().__init__()
        self.n_slots, self.copies, self.lookahead = n_slots, copies, lookahead
        empty = torch.full((batch_size, copies * n_slots), -1, device=device)
        self.register_buffer("pos", empty, persistent=False)

    def slot(self, pos: Tensor) -> Tensor:
        """The (first) slot of each position. A dense cache does not wrap: a position beyond it is an index error."""
        return pos if self.copies == 1 else pos % self.n_slots

    def every_copy(self, slots: Tensor) -> list[Tensor]:
        return [slots + copy * self.n_slots if copy else slots for copy in range(self.copies)]

    def take_over(self, old: "SlotMap") -> tuple[Tensor, Tensor, list[Tensor]]:
        """Hold the positions that a smaller map holds. Returns what moves: rows, slots there, slots here."""
        rows, source = (old.pos[:, : old.n_slots] >= 0).nonzero(as_tuple=True)
        pos = old.pos[rows, source]
        targets = self.every_copy(self.slot(pos))
        for slots in targets:
            self.pos[rows, slots] = pos
        return rows, source, targets

    def write(self, pos: Tensor, span: Span) -> Write:
        """Note that the slots of pos (1 or B, T) hold these positions now; returns where their keys go."""
        if span.uniform:
            pos = pos[0, -self.n_slots :]  # of more than M tokens, only the last M stay
            write = Write(self.every_copy(self.slot(pos)))
            for slots in write.slots:
                self.pos.index_copy_(1, slots, pos.expand(self.pos.size(0), -1))
            return write
        pos = pos.expand(self.pos.size(0), -1)
        write = self.write_rows(pos)
        stored = torch.where(write.any_token, pos.gather(1, write.source), self.pos[:, :1])
        for slots in write.slots:
            self.pos.scatter_(1, slots, stored)
        return write

    def write_rows(self, pos: Tensor) -> Write:
        """Rows at positions of their own, (B, T): padding, and tokens that more than M later ones follow, are not kept.

        A write has a fixed shape, so what is not kept writes its row's newest token once more, to that token's slot.
        """
        T = pos.size(1)
        token = pos >= 0
        order = torch.arange(T, device=pos.device).expand_as(pos)
        newest = torch.where(token, order, 0).amax(dim=1, keepdim=True)  # (B, 1)
        kept = token & (pos > pos.gather(1, newest) - self.n_slots)
        source = torch.where(kept, order, newest)
        any_token = token.any(dim=1, keepdim=True)
        slots = torch.where(any_token, self.slot(pos.gather(1, source)), 0)
        return Write(self.every_copy(slots), source, any_token)

    def check_kept(self, first: Tensor, window: int) -> None:
        """Refuse a call whose first tokens, at positions first (1 or B, 1), need a key that a later one replaced."""
        if self.copies == 1 or first.device.type != "cpu":
            return
        oldest = (first - window + 1).clamp(min=0).expand(self.pos.size(0), 1)
        replaced = (self.pos.gather(1, self.slot(oldest)) > oldest) & (oldest < first)
        if replaced.any():
            raise ValueError(
                f"Position {int(first.min())} comes after later ones, and the keys that it needs are gone: a rolling "
                f"cache takes back {self.lookahead} tokens, more with set_kv_cache(lookahead=...)."
            )

    def view(self, T: int, span: Span, window: int | None) -> tuple[slice, int | None]:
        """The slots that a call of T tokens, already written, meets, and which of them is its first token's own."""
        if span.last is None or (self.copies == 2 and not span.uniform):
            return slice(0, self.n_slots), None
        if span.first is None or not span.contiguous:
            return slice(0, min(self.n_slots, max(1, span.last + 1))), None  # one at least, even for padding alone
        n = span.last + 1 if window is None else min(window - 1 + T, span.last + 1)
        end = span.last + 1 if self.copies == 1 else span.last % self.n_slots + self.n_slots + 1
        return slice(end - n, end), n - T

    def recent(self, pos: Tensor, span: Span, n: int) -> tuple[slice | Tensor, Tensor]:
        """The slots of the n positions before the call's first, and these positions (1 or B, n), -1 for a lost one."""
        if span.first is not None:  # uniform: they lie in one piece
            n = min(n, span.first)
            end = span.first if self.copies == 1 else span.first % self.n_slots + self.n_slots
            before = pos[:, :1] - n + torch.arange(n, device=pos.device)  # (1, n)
            read = slice(end - n, end)
            held = self.pos[:, read]
        else:
            first = pos[:, :1] if span.contiguous else torch.where(pos >= 0, pos, 2**40).amin(dim=1, keepdim=True)
            before = first - n + torch.arange(n, device=pos.device)  # (1 or B, n)
            most = None if self.copies == 2 else self.n_slots - 1
            read = self.slot(before.clamp(0, most)).expand(self.pos.size(0), n)
            held = self.pos.gather(1, read)
        return read, torch.where(held == before, before, -1)


class KVCache(nn.Module):
    """The keys, after RoPE, and the values of one layer: (B, G, copies * M, D) each."""

    def __init__(self, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(shape, device=device, dtype=dtype), persistent=False)
        self.register_buffer("v", torch.zeros(shape, device=device, dtype=dtype), persistent=False)

    def take_over(self, old: "KVCache", rows: Tensor, source: Tensor, targets: list[Tensor]) -> None:
        """Copy the keys and values that SlotMap.take_over moved."""
        for slots in targets:
            self.k[rows, :, slots] = old.k[rows, :, source]
            self.v[rows, :, slots] = old.v[rows, :, source]

    def exchange(self, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """Take in the call's keys and values (B, G, T, D), and give those that its queries meet (B, G, L, D)."""
        if self.k.dtype != k.dtype:  # a key is rounded whoever meets it
            k, v = k.to(self.k.dtype).to(k.dtype), v.to(self.v.dtype).to(v.dtype)
        if plan.write_first:
            write_slots(self.k, k, plan.write)
            write_slots(self.v, v, plan.write)
            return read_slots(self.k, plan.read).to(k.dtype), read_slots(self.v, plan.read).to(v.dtype)
        met_k, met_v = k, v
        if plan.read is not None:
            met_k = torch.cat([read_slots(self.k, plan.read).to(k.dtype), k], dim=2)
            met_v = torch.cat([read_slots(self.v, plan.read).to(v.dtype), v], dim=2)
        write_slots(self.k, k, plan.write)
        write_slots(self.v, v, plan.write)
        return met_k, met_v


def read_slots(held: Tensor, slots: slice | Tensor) -> Tensor:
    """What (B, G, copies * M, D) holds in slots: a view for a slice, a copy for slots (B, n) of each row's own."""
    if isinstance(slots, slice):
        return held[:, :, slots]
    rows = torch.arange(held.size(0), device=held.device)[:, None]
    return held[rows, :, slots].transpose(1, 2)  # (B, n, G, D) -> (B, G, n, D)


def write_slots(held: Tensor, new: Tensor, write: Write) -> None:
    """Put what is new (B, G, T, D) into its slots, in every copy. No gradient flows through a cache."""
    new = new.detach().to(held.dtype)
    if write.source is None:
        new = new[:, :, -write.slots[0].size(0) :]
        for slots in write.slots:
            held.index_copy_(2, slots, new)
        return
    new = new.gather(2, write.source[:, None, :, None].expand_as(new))
    new = torch.where(write.any_token[:, None, :, None], new, held[:, :, :1])
    for slots in write.slots:
        held.scatter_(2, slots[:, None, :, None].expand_as(new), new)


# ----------------------------------------------------------------------------------------------------------------- RoPE


class RoPE(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) turns pairs (x_i, x_{i + n/2}) by position * f_i.

    Angles are made in float32 from the call's own positions, whatever the model's dtype, so no position is too far.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device()  # where the weights go; real numbers even in a model of meta tensors
        frequencies = rope_frequencies(config).to("cpu" if device.type == "meta" else device)
        self.register_buffer("inv_freq", frequencies, persistent=False)  # (bases, rope_n_elem / 2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RoPE":
        """Follow the model to another device, but never to another dtype: bfloat16 positions are wrong past 256."""
        super()._apply(fn, recurse)
        self.inv_freq = rope_frequencies(self.config).to(self.inv_freq.device)
        return self

    def forward(self, pos: Tensor) -> list[tuple[Tensor, Tensor]]:
        """cos and sin for positions (1 or B, T): one pair of (1 or B, 1, T, rope_n_elem) for every base."""
        angles = pos[None, :, None, :, None].float() * self.inv_freq[:, None, None, None, :]
        cos, sin = angles.cos(), angles.sin()
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        return list(zip(cos.unbind(), sin.unbind(), strict=True))


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of the first rope_n_elem elements of every head of x (B, H, T, D), in float32.

    (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    n = cos.size(-1)
    head = (x if n == x.size(-1) else x[..., :n]).float()
    turned = (head * cos + head.roll(n // 2, dims=-1) * sin).to(x.dtype)  # sin holds the signs of both halves
    return turned if n == x.size(-1) else torch.cat([turned, x[..., n:]], dim=-1)


def rope_table_index(config: Config, variant: str) -> int:
    """Which of the rows of rope_frequencies a variant turns by."""
    return 1 if config.rope_local_base_freq is not None and VARIANTS[variant].window(config) else 0


def rope_frequencies(config: Config) -> Tensor:
    """Angles per position, float32 (bases, rope_n_elem / 2): rope_base's, scaled, then those of the local base."""
    bases = (
        [config.rope_base] if config.rope_local_base_freq is None else [config.rope_base, config.rope_local_base_freq]
    )
    exponents = torch.arange(0, config.rope_n_elem, 2, device="cpu", dtype=torch.float32) / max(1, config.rope_n_elem)
    frequencies = [1.0 / base**exponents for base in bases]
    if config.rope_scaling is not None:
        frequencies[0] = ROPE_SCALINGS[config.rope_scaling["type"]](frequencies[0], config.rope_scaling)
    return torch.stack(frequencies)


def scale_linear(inv_freq: Tensor, scaling: dict) -> Tensor:
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595)."""
    return inv_freq / scaling["factor"]


def scale_llama3(inv_freq: Tensor, scaling: dict) -> Tensor:
    """Llama 3.1: long waves are stretched by the factor, short ones kept, those between blended."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # within the trained length
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * inv_freq + (1 - kept) * inv_freq / factor


ROPE_SCALINGS: dict[str, Callable[[Tensor, dict], Tensor]] = {"linear": scale_linear, "llama3": scale_llama3}
ROPE_SCALING_KEYS = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def check_rope_scaling(scaling: dict | None) -> None:
    if scaling is None:
        return
    if scaling.get("type") not in ROPE_SCALINGS:
        raise ValueError(f"rope_scaling type {scaling.get('type')!r} is none of {', '.join(ROPE_SCALINGS)}.")
    needed = ROPE_SCALING_KEYS[scaling["type"]]
    if set(scaling) != needed | {"type"}:
        raise ValueError(
            f"rope_scaling of type {scaling['type']!r} takes exactly {', '.join(sorted(needed))}; "
            f"given: {', '.join(sorted(set(scaling) - {'type'})) or 'none'}."
        )
    for key in needed:
        if type(scaling[key]) not in (int, float) or not 0 < scaling[key] < 1e9:
            raise ValueError(f"rope_scaling {key}={scaling[key]!r} does not fit: it must be a positive number.")
    if scaling["type"] == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError("rope_scaling high_freq_factor must be greater than low_freq_factor.")


# ----------------------------------------------------------------------------------------------------------- MLP, norms


class GatedMLP(nn.Module):
    """act(fc_1(x)) * fc_2(x), projected back (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc_1 = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.fc_2 = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.mlp_bias)
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


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
}


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 (Zhang and Sennrich 2019, arXiv 1910.07467). unit_offset: times (1 + weight)."""

    def __init__(self, size: int, eps: float, unit_offset: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if unit_offset else torch.ones(size))
        self.eps, self.unit_offset = eps, unit_offset

    def forward(self, x: Tensor) -> Tensor:
        if not self.unit_offset:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # in float32 inside
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).to(x.dtype)


def build_norm(config: Config, size: int) -> nn.Module:
    if config.norm_class_name == "LayerNorm":
        return nn.LayerNorm(size, eps=config.norm_eps)
    return RMSNorm(size, config.norm_eps, config.norm_unit_offset)
