"""A GPT with every attention variant of the project in one file: read it from the top, change it in place.

Config -> GPT -> Block -> CausalSelfAttention -> VARIANTS (who sees whom) -> attend -> KV caches -> RoPE -> MLP, norms.
It imports torch and the standard library only; copied alone into another project, it works.

Notation, used in every shape comment:
    B  batch                    C  n_embd            S  sliding_window_size
    T  tokens in this call      H  n_head            M  slots of a cache
    L  keys a query may meet    G  n_query_groups    V  padded_vocab_size
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

    o  a sink (here 1), from a position beside it   + -  from a position in the next chunk, at the greatest distance

Positions rule everything. A token's position is its place in its sequence; masks, RoPE and cache slots are functions of
positions, so that any split of a sequence into calls gives the same logits as one call. A negative position marks
padding: it is seen by nobody and written nowhere.
"""

import contextlib
import difflib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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
    n_sink_tokens: int = 4  # streaming: the first tokens, which are seen for ever beside the window S
    dual_chunk_pretraining_length: int | None = None  # c, the trained length; None: block_size
    dual_chunk_size: int | None = None  # s, the tokens of a chunk; None: 5/8 of c
    dual_chunk_local: int | None = None  # w, the nearest tokens, always at their true distance; None: 1/8 of c
    dual_chunk_temperature: float = 1.0  # multiplies the scores; or, by the query's position p (counted from 1),
    dual_chunk_temperature_slope: float | None = None  # ... by max(1, slope * ln(p / c) + 1)
    s2_attention: bool = False  # in training mode, attend within groups, half of the heads' shifted by half a group
    s2_group_ratio: float = 0.25  # the group's share of the text
    s2_group_size: int | None = None  # ... or its tokens
    s2_shift: bool = True  # False: no head's groups are shifted, LongLoRA's "short attention", to compare with
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
        self.rope_scaling = with_trained_length(self.rope_scaling, self.block_size)
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

    @property
    def chunk_trained(self) -> int:
        """c, the length that dual-chunk attention keeps all distances within."""
        return self.dual_chunk_pretraining_length or self.block_size

    @property
    def chunk_size(self) -> int:
        """s of dual-chunk attention."""
        return self.dual_chunk_size or self.chunk_trained * 5 // 8

    @property
    def chunk_local(self) -> int:
        """w of dual-chunk attention."""
        return self.chunk_trained // 8 if self.dual_chunk_local is None else self.dual_chunk_local

    def chunk_start(self, p: int, back: int = 0) -> int:
        """The first position of the chunk that holds p, or of one so many chunks back; at least 0."""
        return max(0, (p // self.chunk_size - back) * self.chunk_size)

    def s2_group(self, T: int) -> int:
        """Tokens in a group of S2-Attn for texts of T."""
        return self.s2_group_size or max(1, int(T * self.s2_group_ratio))

    @classmethod
    def from_dict(cls, values: dict[str, Any], **overrides: Any) -> "Config":
        """The config with the fields `values`, as lit_config.json holds them, some of them overridden.

        Raises ValueError for an unknown field, and for an override that would do nothing.
        """
        reject_unknown_fields(values | overrides)
        if "block_size" in values:  # which was trained on; an override of it is how far to go now
            if isinstance(overrides.get("rope_scaling"), dict):
                overrides["rope_scaling"] = with_trained_length(overrides["rope_scaling"], values["block_size"])
            if values.get("dual_chunk_pretraining_length") is None and "dual_chunk" in str(overrides.get("attention")):
                overrides.setdefault("dual_chunk_pretraining_length", values["block_size"])
        config = cls(**values | overrides)
        for name, value in overrides.items():
            default = cls.__dataclass_fields__[name].default
            if name in EFFECTIVE_WITH and value is not None and value != default:
                EFFECTIVE_WITH[name](name, value, config)
        if {"s2_group_size", "s2_group_ratio"} <= set(overrides):
            raise ValueError("s2_group_size and s2_group_ratio are two ways to say it: set one.")
        return config

    def override(self, **overrides: Any) -> "Config":
        """A copy with some fields changed, judged as in from_dict."""
        return self.from_dict({f.name: getattr(self, f.name) for f in fields(self)}, **overrides)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "Config":
        """A named shape of lit_swa/families.py. Raises ValueError, with the near names, when there is none."""
        from lit_swa.families import CONFIGS

        if name not in CONFIGS:
            near = difflib.get_close_matches(name, CONFIGS, n=3, cutoff=0.3) or sorted(CONFIGS)
            raise ValueError(f"There is no model named {name!r}: choose from {', '.join(near)}.")
        return cls.from_dict(CONFIGS[name] | {"name": name}, **overrides)

    @classmethod
    def from_hf(cls, path_or_dict: str | Path | dict[str, Any], **overrides: Any) -> "Config":
        """From a Hugging Face config.json (its path, its directory, or its content)."""
        from lit_swa.families import config_from_hf

        return cls.from_dict(config_from_hf(path_or_dict), **overrides)


CHOICES = {
    "norm_class_name": ("RMSNorm", "LayerNorm"),
    "mlp_class_name": ("GatedMLP", "PlainMLP"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu"),
    "attention_backend": ("auto", "sdpa", "flex", "flash"),
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
    "n_sink_tokens": (0, 2**20),
    "dual_chunk_pretraining_length": (2, 2**31),
    "dual_chunk_size": (1, 2**31),
    "dual_chunk_local": (0, 2**31),
    "dual_chunk_temperature": (1e-3, 1e3),
    "dual_chunk_temperature_slope": (0.0, 1e3),
    "s2_group_ratio": (1e-6, 1.0),
    "s2_group_size": (1, 2**31),
    "attention_scores_scalar": (1, 2**31),
    "attention_logit_softcapping": (1e-3, 1e6),
    "final_logit_softcapping": (1e-3, 1e6),
}


def needs_variant(*variants: str) -> Callable[[str, Any, Config], None]:
    """A check that a field, set to a value, meets one of these variants in a config."""

    def check(name: str, value: Any, config: Config) -> None:
        if not set(variants) & set(config.layer_variants):
            raise ValueError(
                f"{name}={value} has no effect with attention={config.attention!r}: also set attention to "
                f"{' or '.join(map(repr, variants))}, or to a pattern that contains it."
            )

    return check


def needs_s2(name: str, value: Any, config: Config) -> None:
    if not config.s2_attention:
        raise ValueError(f"{name}={value} has no effect without s2_attention: also set s2_attention to true.")


EFFECTIVE_WITH: dict[str, Callable[[str, Any, Config], None]] = {  # what an override of a field needs beside it
    "sliding_window_size": needs_variant("sliding", "streaming"),
    "rolling_kv_cache": needs_variant("sliding", "streaming"),
    "rope_local_base_freq": needs_variant("sliding", "streaming"),
    "n_sink_tokens": needs_variant("streaming"),
    "dual_chunk_pretraining_length": needs_variant("dual_chunk"),
    "dual_chunk_size": needs_variant("dual_chunk"),
    "dual_chunk_local": needs_variant("dual_chunk"),
    "dual_chunk_temperature": needs_variant("dual_chunk"),
    "dual_chunk_temperature_slope": needs_variant("dual_chunk"),
    "s2_group_ratio": needs_s2,
    "s2_group_size": needs_s2,
    "s2_shift": needs_s2,
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
    if config.sliding_window_size is None and {"sliding", "streaming"} & set(config.layer_variants):
        raise ValueError(f"attention={config.attention!r} needs sliding_window_size, the number of keys a query sees.")
    check_dual_chunk(config)
    if config.s2_attention and set(config.layer_variants) != {"full"}:
        raise ValueError(
            f"s2_attention groups layers that attend in full, and attention={config.attention!r}: "
            "set attention to 'full', or s2_attention to false."
        )
    check_rope_scaling(config)


def check_dual_chunk(config: Config) -> None:
    if "dual_chunk" not in config.layer_variants:
        return
    c, s, w = config.chunk_trained, config.chunk_size, config.chunk_local
    if s < 1 or s + w >= c:
        raise ValueError(
            f"dual_chunk_size={s} + dual_chunk_local={w} must be less than the trained length of {c} tokens "
            "(dual_chunk_pretraining_length), since it is the greatest distance that occurs: make them smaller."
        )
    if config.sliding_window_size is not None:
        raise ValueError(
            f"dual_chunk attention sees every key, and sliding_window_size={config.sliding_window_size}: "
            "set sliding_window_size to null."
        )
    if config.dual_chunk_temperature != 1.0 and config.dual_chunk_temperature_slope is not None:
        raise ValueError("dual_chunk_temperature and dual_chunk_temperature_slope are two ways to say it: set one.")


# ---------------------------------------------------------------------------------------------------------------- GPT


IGNORED = -100  # a target that is none
LOSS_ELEMENTS = 2**25, 2**28  # logits that exist at once in a loss, on a CPU and on a GPU


def trained_rows(targets: Tensor) -> Tensor:
    """Which of the tokens of targets (B, T), flattened, have one. Asked before a GPU has work: it waits here."""
    return (targets.flatten() != IGNORED).nonzero()[:, 0]


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
        documents: Sequence[int] | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of the token that follows each of idx (B, T), int64.

        input_pos: the tokens' positions, (T,) or (B, T), ascending in each row, negative for padding; the keys and
            values then go through the cache. None: the sequences are whole and nothing is cached.
        input_pos_maxp1: the greatest position + 1, if the caller knows it: spares the GPU unneeded slots of a dense
            cache in an eager decode step. A compiled step does without, or it would recompile as the position grows.
        logits_to_keep: k > 0 computes logits for the last k tokens only, (B, k, V); 0 for all.
        documents: the lengths, T in all, of texts that lie one behind the other in each row. Positions begin anew in
            each and none sees another, as if each were read alone. Without a cache only.
        targets: (B, T) int64, what follows each token, or IGNORED. The result is then no logits but the sum of
            -log p(target), a float32 scalar, made without logits of all tokens at once.
        Raises ValueError when the tokens do not fit the context or the cache.
        """
        rows = None if targets is None else trained_rows(targets)
        x = self.hidden_states(idx, input_pos, input_pos_maxp1=input_pos_maxp1, documents=documents)
        if rows is not None:
            return self.sum_nll(x.flatten(0, 1)[rows], targets.flatten()[rows])
        return self.project(x[:, -logits_to_keep:])  # [-0:] is all

    def hidden_states(
        self,
        idx: Tensor,
        input_pos: Tensor | None = None,
        *,
        input_pos_maxp1: int | None = None,
        documents: Sequence[int] | None = None,
    ) -> Tensor:
        """What `project` makes logits of, (B, T, C): a long text's logits need not exist all at once."""
        call = self.plan_call(idx, input_pos, input_pos_maxp1, documents)
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.config.scale_embeddings:
            x = x * torch.tensor(self.config.n_embd**0.5, dtype=x.dtype)  # rounded to x's dtype, as Gemma was trained
        for block in self.transformer.h:
            x = block(x, call)
        return x

    def project(self, x: Tensor) -> Tensor:
        """Logits (B, T, V) of hidden states (B, T, C)."""
        return softcap(self.lm_head(self.transformer.ln_f(x)), self.config.final_logit_softcapping)

    def sum_nll(self, x: Tensor, targets: Tensor) -> Tensor:
        """Sum of -log p(target) over hidden states x (N, C) and targets (N,), in float32.

        Logits of LOSS_ELEMENTS at most exist at once. If that is not all of them, they are made again in the backward.
        """

        def piece(x: Tensor, targets: Tensor) -> Tensor:
            logits = self.project(x)[:, : self.config.vocab_size]  # rows of padding are no tokens
            return F.cross_entropy(logits.float(), targets, reduction="sum")

        size = max(1, LOSS_ELEMENTS[x.device.type == "cuda"] // self.config.padded_vocab_size)
        if x.size(0) <= size:
            return piece(x, targets)
        pieces = zip(x.split(size), targets.split(size), strict=True)
        return torch.stack([checkpoint(piece, *p, use_reentrant=False) for p in pieces]).sum()

    def plan_call(
        self,
        idx: Tensor,
        input_pos: Tensor | None,
        maxp1: int | None = None,
        documents: Sequence[int] | None = None,
    ) -> "Call":
        """Everything that the layers of one call share, per variant: RoPE's turns, and which query meets which key."""
        (B, T), device = idx.shape, idx.device
        cached = input_pos is not None
        if documents is not None:
            return self.plan_documents(idx, cached, [int(n) for n in documents])
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
        config, dtype = self.config, self.transformer.wte.weight.dtype
        if device.type != "meta" and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        plans, turns, made = {}, {}, {}
        for name in dict.fromkeys(config.layer_variants):
            slot_map = self.slot_maps[name] if cached else None
            if config.s2_attention and self.training and not cached and config.s2_group(T) < T:
                plans[name] = Plan([], pos, s2_group=config.s2_group(T))
            else:
                plans[name] = build_plan(
                    name, config, pos, span, pick_engine(config, device, dtype, T, cached), slot_map
                )
            turns[name] = self.plan_turns(name, pos, plans[name].k_pos, made)
        return Call(plans, turns)

    def plan_documents(self, idx: Tensor, cached: bool, lengths: list[int]) -> "Call":
        """The call of several texts in a row: that of each length made once, and set side by side."""
        if cached or sum(lengths) != idx.size(1) or min(lengths, default=0) < 1:
            raise ValueError(
                f"documents={lengths[:8]} do not fit {idx.size(1)} tokens{' in a cache' * cached}: give the length of "
                "each text of the row, and no input_pos."
            )
        if len(lengths) == 1:
            return self.plan_call(idx, None)
        calls = {n: self.plan_call(idx[:, :n], None) for n in dict.fromkeys(lengths)}
        texts = [calls[n] for n in lengths]
        plans = {}
        for name in texts[0].plans:
            own = [(n, call.plans[name]) for n, call in zip(lengths, texts, strict=True)]
            plans[name] = Plan([], torch.cat([plan.k_pos for _, plan in own], dim=1), documents=own)
        return Call(plans, {name: join_turns([call.turns[name] for call in texts]) for name in texts[0].turns})

    def plan_turns(self, variant: str, pos: Tensor, k_pos: Tensor, made: dict) -> "Turns":
        """By how much queries at pos (1 or B, T) and keys are turned. made: what the call's variants share of it."""
        row, config = VARIANTS[variant], self.config
        base, length = rope_base_index(config, variant), None
        if config.rope_scaling is not None and config.rope_scaling["type"] in LENGTH_SCALINGS and base == 0:
            length = pos.amax(dim=-1, keepdim=True) + 1  # (1 or B, 1)
            return Turns([self.rope(pos, base, length)], self.rope(k_pos, base, length), when_met=True)
        for position in (row.key_position, *(part.position for part in row.parts)):
            if (base, position) not in made:
                made[base, position] = self.rope(position(pos, config), base)
        queries = [made[base, part.position] for part in row.parts]
        return Turns(queries, made[base, row.key_position], temperature=row.temperature(pos, config))

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
        windows = {v: VARIANTS[v].window(self.config) for v in self.config.layer_variants}
        if None in windows.values() or not cached:
            return None not in windows.values()
        if not self.slot_maps:
            return all(VARIANTS[v].cache(self.config, 1, 0).copies == 2 for v in windows)
        return all(m.copies == 2 and m.n_slots - m.lookahead >= windows[v] for v, m in self.slot_maps.items())

    @property
    def windows(self) -> list[int | None]:
        """For every layer, how many keys back a query sees, itself included and sinks apart; None: all of them."""
        return [VARIANTS[v].window(self.config) for v in self.config.layer_variants]

    @property
    def n_sinks(self) -> int:
        """How many first tokens stay visible behind a window, in the layers that keep any; 0: none."""
        return max(layout.sinks for layout in self.layouts(1))

    @property
    def rolls(self) -> bool:
        """True if no layer's cache grows with the text, so that a text may have any length."""
        return None not in self.windows and all(layout.copies == 2 for layout in self.layouts(1))

    @property
    def depends_on_length(self) -> bool:
        """True if what a token is depends on how long the text is when it is read (dynamic RoPE scalings)."""
        return (self.config.rope_scaling or {}).get("type") in LENGTH_SCALINGS

    def layouts(self, tokens: int) -> "list[CacheLayout]":
        return [VARIANTS[v].cache(self.config, tokens, 0) for v in dict.fromkeys(self.config.layer_variants)]

    def cache_length(self, tokens: int) -> int:
        """The max_seq_length that a text of so many tokens needs: the context, or a window, is the most that helps."""
        if not self.rolls:
            return min(tokens, self.config.block_size)
        return max(layout.sinks + layout.slots for layout in self.layouts(tokens))

    @property
    def cache_batch_size(self) -> int:
        """The sequences that the caches are for; 0: there are no caches."""
        return next(iter(self.slot_maps.values())).pos.size(0) if self.slot_maps else 0

    @property
    def lookahead(self) -> int:
        """The lookahead that set_kv_cache was called with."""
        return next(iter(self.slot_maps.values())).lookahead if self.slot_maps else 0

    def can_take_back(self, n: int) -> bool:
        """True if the newest n tokens of the caches can be forgotten, to feed others in their place."""
        return all(m.copies == 1 or n <= m.lookahead for m in self.slot_maps.values())

    def take_back(self, n: int) -> None:
        """Forget the newest n tokens. Raises ValueError if a cache cannot."""
        if not self.can_take_back(n):
            raise ValueError(
                f"The caches cannot take back {n} tokens: a rolling cache takes back {self.lookahead}, more with "
                "set_kv_cache(lookahead=...)."
            )

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
            layout = VARIANTS[name].cache(self.config, max_seq_length, lookahead)
            self.slot_maps[name] = SlotMap(batch_size, layout, lookahead, device)
        for block in self.transformer.h:
            slots = self.slot_maps[block.attn.variant].pos.size(1)
            shape = (batch_size, self.config.n_query_groups, slots, self.config.head_size)
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


class Meet(nn.Module):
    """attend() as a module, so that what is injected into a model can see queries and output, and add to it."""

    def forward(self, queries: list[Tensor], k: Tensor, v: Tensor, plan: "Plan", config: Config) -> Tensor:
        return attend(queries, k, v, plan, config)


class CausalSelfAttention(nn.Module):
    """Project, turn by RoPE, meet the keys as the layer's variant says, project back."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        H, G, D = config.n_head, config.n_query_groups, config.head_size
        self.qkv = nn.Linear(config.n_embd, (H + 2 * G) * D, bias=config.attn_bias)  # rows: H queries, G keys, G values
        self.proj = nn.Linear(H * D, config.n_embd, bias=config.attn_proj_bias)
        self.norm_q = build_norm(config, D) if config.norm_qk else nn.Identity()
        self.norm_k = build_norm(config, D) if config.norm_qk else nn.Identity()
        self.meet = Meet()
        self.variant = config.layer_variants[layer]
        self.kv_cache: KVCache | None = None
        self.config = config

    def forward(self, x: Tensor, call: "Call") -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        (B, T, _), H, G, D = x.shape, self.config.n_head, self.config.n_query_groups, self.config.head_size
        qkv = self.qkv(x).view(B, T, H + 2 * G, D).transpose(1, 2)  # (B, H + 2G, T, D)
        q, k, v = qkv.split((H, G, G), dim=1)
        q, k = self.norm_q(q), self.norm_k(k)
        plan, turns = call.plans[self.variant], call.turns[self.variant]
        if turns.temperature is not None:
            q = (q * turns.temperature).to(q.dtype)
        queries = [fused(apply_rope, q, *turn) for turn in turns.queries]  # (B, H, T, D) for each part of the variant
        k = k if turns.when_met else fused(apply_rope, k, *turns.keys)  # (B, G, T, D)
        if plan.write is not None:
            k, v = self.kv_cache.exchange(k, v, plan)  # (B, G, L, D)
        k = fused(apply_rope, k, *turns.keys) if turns.when_met else k
        y = self.meet(queries, k, v, plan, self.config)  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, T, H * D) -> (B, T, C)


# -------------------------------------------------------------------------------------- the variants, and who sees whom
#
# A mask function takes absolute positions that broadcast against each other, and says which query may see which key.
# Causality, empty slots and padding are added once, by visible(). To add a variant: its functions, and a row below.


def full(q: Tensor, k: Tensor, c: Config) -> Tensor:
    return k <= q


def sliding(q: Tensor, k: Tensor, c: Config) -> Tensor:
    return q - k < c.sliding_window_size


# Streaming (Xiao et al. 2023, arXiv 2309.17453): the first tokens stay for ever, and the recent window closes up to
# them. A query never stands further from the sinks than in a text of just both.


def recent(q: Tensor, k: Tensor, c: Config) -> Tensor:
    return (q - k < c.sliding_window_size) & (k >= c.n_sink_tokens)


def sinks(q: Tensor, k: Tensor, c: Config) -> Tensor:
    return k < c.n_sink_tokens


def beside_sinks(q: Tensor, c: Config) -> Tensor:
    return q.clamp(max=c.n_sink_tokens + c.sliding_window_size - 1)


def sink_edge(a: int, b: int, c: Config) -> list[int]:
    return [c.n_sink_tokens] if a < c.n_sink_tokens < b else []


# Dual-chunk attention (An et al. 2024, arXiv 2402.17463): a key's position is its place in its chunk of s tokens, and a
# query's depends on how many chunks lie between. The w nearest keys are met at their true distance, and no distance
# exceeds s + w, which lies within the trained length.


def same_chunk(q: Tensor, k: Tensor, c: Config) -> Tensor:
    return k // c.chunk_size == q // c.chunk_size


def previous_chunk(q: Tensor, k: Tensor, c: Config) -> Tensor:
    return k // c.chunk_size == q // c.chunk_size - 1


def older_chunks(q: Tensor, k: Tensor, c: Config) -> Tensor:
    return k // c.chunk_size < q // c.chunk_size - 1


def in_chunk(p: Tensor, c: Config) -> Tensor:
    return p % c.chunk_size


def one_chunk_on(q: Tensor, c: Config) -> Tensor:
    return (q % c.chunk_size + c.chunk_size).clamp(max=c.chunk_size + c.chunk_local)


def far_on(q: Tensor, c: Config) -> Tensor:
    return torch.full_like(q, c.chunk_size + c.chunk_local)


def chunk_edges(a: int, b: int, c: Config) -> range:
    return range(c.chunk_start(a) + c.chunk_size, b, c.chunk_size)


def chunk_temperature(q: Tensor, c: Config) -> Tensor | float | None:
    """A factor for the scores, static or by the query's position, (1 or B, 1, T, 1): by the text's length, as in the
    paper's code, a token would be read otherwise in a prompt than alone."""
    if c.dual_chunk_temperature_slope is not None:
        seen = (q + 1).clamp(min=1) / c.chunk_trained
        return (1 + c.dual_chunk_temperature_slope * seen.log()).clamp(min=1)[:, None, :, None]
    return None if c.dual_chunk_temperature == 1.0 else c.dual_chunk_temperature


def own_position(p: Tensor, c: Config) -> Tensor:
    return p


def no_edges(a: int, b: int, c: Config) -> tuple[int, ...]:
    return ()


def no_temperature(q: Tensor, c: Config) -> None:
    return None


def no_window(c: Config) -> None:
    return None


def sliding_window(c: Config) -> int:
    return c.sliding_window_size


class CacheLayout(NamedTuple):
    slots: int  # M: positions held, the sinks apart
    copies: int = 1  # 2: rolling, each position in two slots
    sinks: int = 0  # slots in front of them, for the positions 0 .. sinks - 1 for ever


def dense_cache(c: Config, max_seq_length: int, lookahead: int) -> CacheLayout:
    """A slot for every position."""
    return CacheLayout(max_seq_length)


def window_cache(c: Config, max_seq_length: int, lookahead: int) -> CacheLayout:
    """The rolling cache keeps the last S + lookahead positions, each twice; without it, a slot for every position."""
    if not c.rolling_kv_cache:
        return dense_cache(c, max_seq_length, lookahead)
    return CacheLayout(min(c.sliding_window_size, max_seq_length) + lookahead, copies=2)


def streaming_cache(c: Config, max_seq_length: int, lookahead: int) -> CacheLayout:
    """The sinks, and a rolling cache of the recent window: always, since no more is ever seen."""
    held = min(c.sliding_window_size, max(1, max_seq_length - c.n_sink_tokens))
    return CacheLayout(held + lookahead, copies=2, sinks=c.n_sink_tokens)


class Part(NamedTuple):
    """The pairs of query and key that meet with the query turned to one position. No pair is in two parts.

    reach: for queries at a .. b - 1, first and last + 1 of the key positions that one of them may see. With it, what a
    query sees must be one run of keys whose ends only move forward with the query, so that the corners of a block of
    pairs tell whether all are seen. None: any mask goes, and every key before b is looked at.
    """

    mask: Callable[[Tensor, Tensor, Config], Tensor]  # (query positions, key positions) -> bool
    reach: Callable[[int, int, Config], tuple[int, int]] | None = None
    position: Callable[[Tensor, Config], Tensor] = own_position  # where a query is turned to
    band: bool = False  # the mask is the variant's window within the reach: a kernel that takes a window may do it


class Variant(NamedTuple):
    parts: tuple[Part, ...]
    window: Callable[[Config], int | None] = no_window  # how many keys back a query can see, itself included
    cache: Callable[[Config, int, int], CacheLayout] = dense_cache  # (max_seq_length, lookahead) -> its shape
    key_position: Callable[[Tensor, Config], Tensor] = own_position  # where a key is turned to
    edges: Callable[[int, int, Config], Iterable[int]] = (
        no_edges  # between a and b, positions where a block of queries ends
    )
    temperature: Callable[[Tensor, Config], Tensor | float | None] = no_temperature  # what queries are multiplied by


VARIANTS: dict[str, Variant] = {
    "full": Variant((Part(full, lambda a, b, c: (0, b)),)),
    "sliding": Variant(
        (Part(sliding, lambda a, b, c: (a - c.sliding_window_size + 1, b), band=True),), sliding_window, window_cache
    ),
    "streaming": Variant(
        (
            Part(recent, lambda a, b, c: (max(c.n_sink_tokens, a - c.sliding_window_size + 1), b), band=True),
            Part(sinks, lambda a, b, c: (0, min(b, c.n_sink_tokens)), beside_sinks),
        ),
        sliding_window,
        streaming_cache,
        edges=sink_edge,
    ),
    "dual_chunk": Variant(
        (
            Part(same_chunk, lambda a, b, c: (c.chunk_start(a), b), in_chunk),
            Part(previous_chunk, lambda a, b, c: (c.chunk_start(a, 1), c.chunk_start(b - 1)), one_chunk_on),
            Part(older_chunks, lambda a, b, c: (0, c.chunk_start(b - 1, 1)), far_on),
        ),
        key_position=in_chunk,
        edges=chunk_edges,
        temperature=chunk_temperature,
    ),
}


def visible(part: Part, q_pos: Tensor, k_pos: Tensor, config: Config) -> Tensor:
    """Which of the queries at q_pos (B, T) sees which of the keys at k_pos (B, L): (B, T, L) bool.

    A key at a negative position (an empty slot, padding) is seen by no token. A padding query sees everything, since a
    softmax over nothing is NaN and would spread through the values to the tokens of the next layer.
    """
    q, k = q_pos[:, :, None], k_pos[:, None, :]
    return ((0 <= k) & (k <= q) & part.mask(q, k, config)) | (q < 0)


# ------------------------------------------------------------------------------------------------ how queries meet keys


def attend(queries: list[Tensor], k: Tensor, v: Tensor, plan: "Plan", config: Config) -> Tensor:
    """Softmax attention of the queries, (B, H, T, D) turned once for each part, over k and v (B, G, L, D)."""
    scale = (config.attention_scores_scalar or config.head_size) ** -0.5
    if plan.documents:
        lengths = [n for n, _ in plan.documents]
        texts = zip(*(x.split(lengths, dim=2) for x in (k, v, *queries)), strict=True)  # (B, H or G, n, D) each
        met = zip(texts, plan.documents, strict=True)
        return torch.cat([attend(q, k, v, own, config) for (k, v, *q), (_, own) in met], dim=2)
    if plan.s2_group:
        return attend_shifted_groups(queries[0], k, v, plan.s2_group, scale, config)
    if plan.blocks[0].merged:
        return MergedAttention.apply(plan.blocks, scale, k, v, *queries)
    outputs = [attend_block(queries, k, v, block, scale, config) for block in plan.blocks]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def attend_block(
    queries: list[Tensor], k: Tensor, v: Tensor, block: "QueryBlock", scale: float, config: Config
) -> Tensor:
    """A block's rows of the output: one softmax over all that its queries see."""
    if any(met.flex is not None for met in block.ranges):
        parts = [met.attend_apart(queries, k, v, block, scale) for met in block.ranges]
        return parts[0][0] if len(parts) == 1 else fused(merge, *parts)[0]
    first = block.ranges[0]
    if len(block.ranges) > 1 or len(first.seen) > 1 or config.attention_logit_softcapping is not None:
        return attend_ranges(queries, k, v, block, scale, config)
    q, k, v, mask = first.cut(queries, k, v, block)
    (B, H, T, D), G = q.shape, k.size(1)
    if first.causal:
        return causal_attention(q, k, v, scale, config.attention_backend)
    if first.window is not None:
        return flash_attention(q, k, v, first.window, scale)
    # The R query heads of a group are R more queries of one head: no key is copied, and any kernel will do.
    mask = mask if mask is None or T == 1 else mask.repeat(1, 1, H // G, 1)  # one query broadcasts over R by itself
    y = F.scaled_dot_product_attention(q.reshape(B, G, -1, D), k, v, attn_mask=mask, scale=scale)  # (B, G, R * T, D)
    return y.reshape(B, H, T, D)


def attend_ranges(
    queries: list[Tensor], k: Tensor, v: Tensor, block: "QueryBlock", scale: float, config: Config
) -> Tensor:
    """attend_block in plain steps: scores of every range, one softmax over them all, the values of every range."""
    turned = [q[:, :, block.queries] for q in queries]  # (B, H, T, D) each
    (B, H, T, D), G = turned[0].shape, k.size(1)
    scores = []
    for met in block.ranges:
        parts = list(met.seen)
        rows = [turned[part].reshape(B, G, -1, D) for part in parts]  # (B, G, R * T, D) each
        rows = rows[0] if len(rows) == 1 else torch.cat(rows, dim=2)  # in one product, so that keys are read once
        s = softcap(rows @ k[:, :, met.keys].mT * scale, config.attention_logit_softcapping)
        s = s.view(B, G, len(parts), H // G, T, -1)
        seen = [hide(s[:, :, n], met.mask(part, s)) for n, part in enumerate(parts)]
        scores.append(functools.reduce(torch.maximum, seen))  # at most one part sees a pair, the others are -inf
    wide = torch.promote_types(v.dtype, torch.float32)
    weights = F.softmax(torch.cat(scores, dim=-1), dim=-1, dtype=wide).to(v.dtype).flatten(2, 3)
    weights = weights.split([s.size(-1) for s in scores], dim=-1)  # (B, G, R * T, L) each
    y = sum(w @ v[:, :, met.keys] for w, met in zip(weights, block.ranges, strict=True))
    return y.view(B, H, T, D)


def hide(scores: Tensor, mask: Tensor | None) -> Tensor:
    """scores (B, G, R, T, L) without those that the mask (1 or B, 1, T, L) does not let be."""
    return scores if mask is None else scores.masked_fill(~mask[:, :, None], -math.inf)


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """Bend x smoothly into (-cap, cap)."""
    return x if cap is None else cap * torch.tanh(x / cap)


def attend_shifted_groups(q: Tensor, k: Tensor, v: Tensor, g: int, scale: float, config: Config) -> Tensor:
    """S2-Attn (LongLoRA, Chen et al. 2023, arXiv 2309.12307), causal: half of the heads attend within groups of g
    tokens, the others within groups that are shifted by half a group. No pair wraps around the ends.

    g = 4, T = 10, who is with whom:    |0 1 2 3|4 5 6 7|8 9|    shifted    |0 1|2 3 4 5|6 7 8 9|
    """
    H, G = q.size(1), k.size(1)
    if not config.s2_shift:
        return attend_groups(q, k, v, g, 0, scale, config)
    half = H // 2
    if half % (H // G):  # the border cuts a key head's group of query heads
        k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    cut = half * k.size(1) // H
    straight = attend_groups(q[:, :half], k[:, :cut], v[:, :cut], g, 0, scale, config) if half else q[:, :0]
    shifted = attend_groups(q[:, half:], k[:, cut:], v[:, cut:], g, g - g // 2, scale, config)
    return torch.cat([straight, shifted], dim=1)


def attend_groups(q: Tensor, k: Tensor, v: Tensor, g: int, first: int, scale: float, config: Config) -> Tensor:
    """Causal attention within the tokens 0 .. first - 1, then within every g tokens, then within what is left."""
    n = max(0, q.size(2) - first) // g
    outputs = []
    for start, groups, size in ((0, 1, first), (first, n, g), (first + n * g, 1, q.size(2) - first - n * g)):
        if groups * size <= 0:
            continue
        cut = [x[:, :, start : start + groups * size].unflatten(2, (groups, -1)) for x in (q, k, v)]
        q_, k_, v_ = (x.transpose(1, 2).flatten(0, 1) for x in cut)  # (B * groups, heads, size, D)
        block = QueryBlock(slice(0, size), [Range(slice(0, size), {0: None}, causal=True)])
        y = attend_block([q_], k_, v_, block, scale, config)
        outputs.append(y.unflatten(0, (-1, groups)).transpose(1, 2).flatten(2, 3))  # (B, heads, groups * size, D)
    return torch.cat(outputs, dim=2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Tensor:
    """Every query sees the keys up to its own: (B, H, T, D) x (B, G, T, D) -> (B, H, T, D)."""
    gqa, long = q.size(1) != k.size(1), q.device.type == "cuda" and q.size(2) >= LONG_CALL
    if backend == "flash" and long and q.dtype != torch.float32:
        return flash_attention(q, k, v, None, scale)
    if backend == "sdpa" or not long or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels, set_priority=True):  # on an H100 cuDNN takes 0.6 of FlashAttention-2's time
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """FlashAttention for queries (B, H, T, D) whose own keys are the last T of L: the flash-attn package's if it is
    installed, else torch's. window: how many keys a query sees, itself included."""
    (B, H, T, D), L, left = q.shape, k.size(2), -1 if window is None else window - 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, T, H, D)
    if flash_attn_function() is not None:
        y = flash_attn_function()(q, k, v, softmax_scale=scale, causal=True, window_size=(left, -1))
        return y.transpose(1, 2)
    from torch.nn.attention.varlen import varlen_attn

    starts = torch.arange(B + 1, device=q.device, dtype=torch.int32)  # of the rows, one behind the other
    rows = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))  # (B * T, H, D)
    y = varlen_attn(*rows, starts * T, starts * L, T, L, scale=scale, window_size=(left, 0))
    return y.view(B, T, H, D).transpose(1, 2)


@functools.cache
def flash_attn_function() -> Callable[..., Tensor] | None:
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


class MergedAttention(torch.autograd.Function):
    """Attention over several ranges of keys, each by a fused kernel, merged by the log-sum-exps of their scores.

    With lse_r of range r and lse of all, o = sum of exp(lse_r - lse) o_r. A kernel's backward makes its probabilities
    as exp(score - lse); given lse and output of the whole softmax, it gives the exact gradients of its range.
    """

    @staticmethod
    def forward(ctx: Any, blocks: "list[QueryBlock]", scale: float, k: Tensor, v: Tensor, *queries: Tensor) -> Tensor:
        out, lses = torch.empty_like(queries[0]), []
        for block in blocks:
            parts = [fused_range(block.merged, scale, met, *met.cut(queries, k, v, block)) for met in block.ranges]
            rows = out[:, :, block.queries].unflatten(2, (block.folds, -1)).transpose(1, 2)  # as fold(), still a view
            lses.append(fused(merge_into, rows, tuple(met.corner for met in block.ranges), *parts))
        ctx.blocks, ctx.scale = blocks, scale
        ctx.save_for_backward(out, k, v, *queries, *lses)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, k, v, *rest = ctx.saved_tensors
        queries, lses = rest[: -len(ctx.blocks)], rest[-len(ctx.blocks) :]
        wide = torch.promote_types(k.dtype, torch.float32)
        dkv, dqs = [torch.zeros_like(t, dtype=wide) for t in (k, v)], [torch.zeros_like(q) for q in queries]
        for block, lse in zip(ctx.blocks, lses, strict=True):
            rows, n = block.queries, block.folds
            done = fold(grad[:, :, rows], n), fold(out[:, :, rows], n), lse
            sums: dict[int, Tensor] = {}  # part -> gradient of this block's queries
            for met in block.ranges:
                part = next(iter(met.seen))
                dq, *new = fused_range_backward(block.merged, ctx.scale, met, done, met.cut(queries, k, v, block))
                for total, d in zip(dkv, new, strict=True):
                    total = met.folded(total, block)
                    total += d.unflatten(0, (-1, n)).sum_to_size(total.shape)
                sums[part] = sums[part] + dq if part in sums else dq.to(wide)
            for part, dq in sums.items():
                dqs[part][:, :, rows] = unfold(dq, n)
        return None, None, *(total.to(k.dtype) for total in dkv), *dqs


def merge(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One attention from outputs (B, H, T, D) over disjoint keys and their log-sum-exps (B, H, T)."""
    lse = functools.reduce(torch.logaddexp, [lse for _, lse in parts])  # (B, H, T)
    out = sum(o * (lse_r - lse).exp().unsqueeze(-1) for o, lse_r in parts)
    return out.to(parts[0][0].dtype), lse


def merge_into(rows: Tensor, turned: tuple[bool, ...], *parts: tuple[Tensor, Tensor]) -> Tensor:
    """merge(), written to a block's rows (B, folds, H, T, D) of the output; the log-sum-exp (B * folds, H, T).

    A part that is turned is a corner's: the last query first, and of the very last nothing.
    """
    upright = []
    for is_turned, (out, lse) in zip(turned, parts, strict=True):
        if is_turned:
            out, lse = F.pad(out.flip(2), (0, 0, 0, 1)), F.pad(lse.flip(2), (0, 1), value=-math.inf)
        upright.append((out, lse))
    out, lse = upright[0] if len(parts) == 1 else merge(*upright)
    rows.copy_(out.unflatten(0, (rows.size(0), -1)))
    return lse


def turn(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The last token first, in (B, H, T, ...)."""
    return tuple(x.flip(2) for x in tensors)


def fold(x: Tensor, n: int) -> Tensor:
    """(B, H, n * T, ...) -> (B * n, H, T, ...): runs of T tokens as rows of a batch. No copy is made if B is 1."""
    return x.unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1)


def unfold(x: Tensor, n: int) -> Tensor:
    """(B * n, H, T, ...) -> (B, H, n * T, ...)."""
    return x.unflatten(0, (-1, n)).transpose(1, 2).flatten(2, 3)


def fused_range(
    kernel: str, scale: float, met: "Range", q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, D) and log-sum-exp (B, H, T) of one range.

    A window's corner, turned by half a circle, is a causal triangle: the last query first, the last key first. Its
    output is left like this, for merge_into().
    """
    if not met.corner:
        return fused_attention(kernel, scale, q, k, v, mask, met.causal)
    return fused_attention(kernel, scale, *fused(turn, q[:, :, : k.size(2)], k, v), None, True)


def fused_range_backward(
    kernel: str, scale: float, met: "Range", done: tuple[Tensor, ...], cut: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one range's queries, keys and values.

    done: gradient, output and log-sum-exp of the whole softmax. cut: the range's queries, keys, values and mask.
    """
    if not met.corner:
        return fused_backward(kernel, scale, *done, *cut, met.causal)
    q, k, v, _ = cut
    turned = fused(turn, *(x[:, :, : k.size(2)] for x in (*done, q)), k, v)
    dq, dk, dv = fused_backward(kernel, scale, *turned, None, True)
    return F.pad(dq.flip(2), (0, 0, 0, 1)), dk.flip(2), dv.flip(2)


def fused_attention(
    kernel: str, scale: float, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, D) and log-sum-exp (B, H, T) of q (B, H, T, D) over k, v (B, G, L, D).

    kernel: cpu, cudnn or flash; only the first of them takes a mask.
    """
    aten = torch.ops.aten
    kernel = kernel_for(kernel, q, k)
    if kernel == "cpu":
        mask = additive(mask, q)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        return out, lse
    if kernel == "cudnn":
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
        return out, lse.view(out.shape[:3])
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]


def fused_backward(
    kernel: str,
    scale: float,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given the output and the log-sum-exp of the softmax that they are a part of."""
    aten = torch.ops.aten
    kernel = kernel_for(kernel, q, k)
    if kernel == "cpu":
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(grad, q, k, v, out, lse, 0.0, causal, attn_mask=additive(mask, q), scale=scale)
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of the dropout that there is not
    if kernel == "cudnn":
        lse, T, L = lse.contiguous().unsqueeze(-1), q.size(2), k.size(2)
        return aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse, seed, seed, None, None, None, T, L, 0.0, causal, scale=scale
        )
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse.contiguous(), None, None, q.size(2), k.size(2), 0.0, causal, seed, seed, scale=scale
    )


def kernel_for(kernel: str, q: Tensor, k: Tensor) -> str:
    """cuDNN is for much at once; a few sinks are not worth its plan."""
    return "flash" if kernel == "cudnn" and min(q.size(2), k.size(2)) < FLEX_BLOCK else kernel


def additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A mask (1 or B, 1, T, L) of bool as numbers to add to scores, (B, H, T, L)."""
    if mask is None:
        return None
    hidden = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
    return hidden.expand(q.size(0), q.size(1), -1, -1)


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, D) and log-sum-exp (B, H, T) of a few keys, such as sinks, in steps that one kernel can do."""
    (B, H, T, D), G = q.shape, k.size(1)
    q = q.reshape(B, G, H // G, T, 1, D).to(torch.promote_types(q.dtype, torch.float32))
    scores = hide((q * k[:, :, None, None]).sum(-1) * scale, mask)  # (B, G, R, T, L)
    lse = scores.logsumexp(dim=-1, keepdim=True)
    out = ((scores - lse).exp().unsqueeze(-1) * v[:, :, None, None]).sum(-2).to(v.dtype)
    return out.view(B, H, T, D), lse.view(B, H, T)


@functools.cache
def compiled(function: Callable[..., Any], dynamic: bool | None = None) -> Callable[..., Any]:
    return torch.compile(function, dynamic=dynamic)


def fused(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), as one kernel where it would be many passes over much of a GPU's memory."""
    first = next(x for a in arguments for x in (a if isinstance(a, tuple) else (a,)) if isinstance(x, Tensor))
    if first.device.type != "cuda" or first.numel() < FUSED_ELEMENTS or torch.compiler.is_compiling():
        return function(*arguments)
    if not has_triton():
        return function(*arguments)
    with torch._dynamo.config.patch(recompile_limit=64):  # for layouts, numbers of ranges, with and without gradients
        return compiled(function)(*arguments)


@functools.cache
def has_triton() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()


def flex_attention_with_lse(q: Tensor, k: Tensor, v: Tensor, block_mask: Any, scale: float) -> tuple[Tensor, Tensor]:
    """FlexAttention's output (B, H, T, D) and log-sum-exp (B, H, T). On a CPU it is not compiled: right, but slow."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    cuda, options = q.device.type == "cuda", None
    if cuda and q.size(-1) <= 128 and torch.cuda.get_device_capability(q.device) >= (9, 0):
        options = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 128, "fwd_num_warps": 8, "fwd_num_stages": 3, "fwd_USE_TMA": True}
    compiles = cuda and not torch.compiler.is_compiling()
    flex = compiled(flex_attention, dynamic=False) if compiles else flex_attention  # for each shape: 1.4 times as fast
    with torch._dynamo.config.patch(recompile_limit=256) if compiles else contextlib.nullcontext():
        y, aux = flex(
            q, k, v, block_mask=block_mask, scale=scale, enable_gqa=q.size(1) != k.size(1), kernel_options=options,
            return_aux=AuxRequest(lse=True),
        )  # fmt: skip
    return y, aux.lse


def window_block_mask(T: int, L: int, window: int, skip: int, device: torch.device) -> Any:
    """FlexAttention's block mask for T queries whose own keys are the last T of L, which see `window` keys each, and of
    the first `skip` keys none. It is made of the window's borders, block by block: nothing of T x L is built.
    """
    from torch.nn.attention.flex_attention import BlockMask

    offset = L - T
    start = torch.arange(0, T, FLEX_BLOCK, device=device) + offset  # where each block's first query has its own key ...
    stop = (start + FLEX_BLOCK).clamp(max=L) - 1  # ... and its last
    block = torch.arange(-(-L // FLEX_BLOCK), device=device)
    seen_by_one = ((start - window + 1).clamp(min=skip) // FLEX_BLOCK, stop // FLEX_BLOCK)  # first and last block
    seen_by_all = (-(-(stop - window + 1).clamp(min=skip) // FLEX_BLOCK), (start + 1) // FLEX_BLOCK - 1)
    near, whole = ((block >= first[:, None]) & (block <= last[:, None]) for first, last in (seen_by_one, seen_by_all))

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:  # how many of each row, and which, in front
        order = torch.sort(~chosen, dim=-1, stable=True).indices
        return chosen.sum(-1)[None, None].to(torch.int32), order[None, None].to(torch.int32)

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q + offset) & (q + offset - k < window) & (k >= skip)

    lists = (*listed(near & ~whole), *listed(whole))
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=FLEX_BLOCK, mask_mod=seen, seq_lengths=(T, L))


# ------------------------------------------------------------------------------------ what a call shares between layers


class Call(NamedTuple):
    plans: "dict[str, Plan]"  # variant -> plan
    turns: "dict[str, Turns]"  # variant -> RoPE


class Turns(NamedTuple):
    """How the layers of one variant turn queries and keys: cos and sin, (1 or B, 1, T, rope_n_elem) each."""

    queries: list[tuple[Tensor, Tensor]]  # one pair for every part of the variant
    keys: tuple[Tensor, Tensor]
    when_met: bool = False  # True: keys are cached as they are, and all that a call meets are turned
    temperature: Tensor | float | None = None  # (1 or B, 1, T, 1): what queries are multiplied by


class Plan(NamedTuple):
    """How the layers of one variant treat one call."""

    blocks: "list[QueryBlock]"
    k_pos: Tensor  # (1 or B, L): the positions of the keys that queries meet
    write: "Write | None" = None  # where the call's keys go; None: there is no cache
    read: "list[Tensor | slice]" = []  # the slots that queries meet; empty: they meet the call's own keys only
    write_first: bool = False  # True: write, then read `read`. False: read it, put the call's own keys behind, write
    s2_group: int = 0  # tokens in a group of S2-Attn; 0: not S2-Attn
    documents: "list[tuple[int, Plan]]" = []  # the lengths of texts in a row and how each meets itself; empty: one text


def join_turns(texts: list[Turns]) -> Turns:
    """The turns of several texts, one behind the other."""
    queries = [join_pairs(pairs) for pairs in zip(*(t.queries for t in texts), strict=True)]
    temperature = texts[0].temperature
    if isinstance(temperature, Tensor):
        temperature = torch.cat([t.temperature for t in texts], dim=2)
    return Turns(queries, join_pairs([t.keys for t in texts]), texts[0].when_met, temperature)


def join_pairs(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(cos, sin) of pieces of a row, joined."""
    cos, sin = zip(*pairs, strict=True)
    return torch.cat(cos, dim=2), torch.cat(sin, dim=2)


class Range(NamedTuple):
    """Some keys, and which of them the queries of a block see, in which parts of the variant."""

    keys: slice
    seen: dict[int, Tensor | None]  # part -> mask (1 or B, 1, T, L) of bool; None: every key is seen ...
    causal: bool = False  # ... or, if this is set, the lower triangle
    corner: bool = False  # ... or this: query x sees the keys from x on, and the last query, one more than keys, none
    flex: Any = None  # a BlockMask that says it instead
    window: int | None = None  # or a window, for the flash kernel
    still: bool = False  # the same keys for every fold of the block

    def cut(
        self, queries: list[Tensor], k: Tensor, v: Tensor, block: "QueryBlock"
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys, values and mask of a range that one part sees."""
        ((part, mask),) = self.seen.items()
        if block.folds == 1:
            return queries[part][:, :, block.queries], k[:, :, self.keys], v[:, :, self.keys], mask
        k, v = (self.folded(x, block).expand(-1, block.folds, -1, -1, -1).flatten(0, 1) for x in (k, v))
        return fold(queries[part][:, :, block.queries], block.folds), k, v, mask

    def folded(self, x: Tensor, block: "QueryBlock") -> Tensor:
        """What each fold of the block meets of x (B, G, L, D), as a view (B, 1 or folds, G, keys, D) of it."""
        if block.folds == 1 or self.still:
            return x[:, :, self.keys].unsqueeze(1)
        rows = slice(self.keys.start, self.keys.start + block.queries.stop - block.queries.start)
        runs = x[:, :, rows].unflatten(2, (block.folds, -1)).transpose(1, 2)
        return runs[:, :, :, : self.keys.stop - self.keys.start]

    def mask(self, part: int, scores: Tensor) -> Tensor | None:
        """A part's mask for scores (..., T, L)."""
        if not self.causal:
            return self.seen[part]
        return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()[None, None]

    def attend_apart(
        self, queries: list[Tensor], k: Tensor, v: Tensor, block: "QueryBlock", scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output (B, H, T, D) and log-sum-exp (B, H, T) of this range alone, for merge()."""
        q, k, v, mask = self.cut(queries, k, v, block)
        if self.flex is not None:
            return flex_attention_with_lse(q, k, v, self.flex, scale)
        mask = self.mask(0, q.new_empty(q.size(2), k.size(2))) if self.causal else mask
        return fused(attention_with_lse, q, k, v, mask, scale)


class QueryBlock(NamedTuple):
    """Some queries and the keys that they meet.

    Several windows that are alike, one after the other, are a block of so many folds: rows of one batch to the kernel.
    Their ranges are those of the first, and move on with each.
    """

    queries: slice
    ranges: list[Range]
    merged: str | None = None  # each range by this fused kernel, see MergedAttention
    folds: int = 1


class Span(NamedTuple):
    """What is known of a call's positions outside the device. None and False: not known, as in a compiled step."""

    uniform: bool  # all rows are at the same positions, and none is padding
    first: int | None = None  # of a uniform call
    last: int | None = None  # the greatest of all rows
    contiguous: bool = False  # in every row each position is the one before + 1
    fresh: bool = False  # every row is 0 .. T - 1: nothing cached matters


class Layout(NamedTuple):
    """Where the keys of a call lie: sinks apart, if any, then a key for each position, in order, to the call's last."""

    first: int  # the position of the first query
    index: int  # ... and where its own key lies
    sinks: int = 0  # keys 0 .. sinks - 1 are those of the positions 0 .. sinks - 1
    exact: bool = True  # False: `first` is made up and rows differ; only differences of positions count

    def keys(self, lo: int, hi: int) -> slice:
        """Where the keys of the positions lo .. hi - 1 lie."""
        if hi <= self.sinks:
            return slice(lo, hi)
        shift = self.index - self.first
        return slice(max(self.sinks, lo + shift), hi + shift)


class Engine(NamedTuple):
    """What the kernels at hand can do."""

    kind: str  # "cpu", "cuda", ...
    merge: str | None = None  # the fused kernel whose log-sum-exps let ranges be merged: cpu, cudnn, flash
    window: str | None = None  # what takes a window by itself: flex, flash
    whole: int = 1  # ... in multiples of so many queries
    corners: bool = False  # windows are merged too, as triangles


QUERY_BLOCK = {"cpu": 128, "cuda": 512}  # queries in one masked block; on 2 CPU cores 64 to 256 take the same time
SCORE_ELEMENTS = 2**27  # bound on rows * heads * queries * keys of one block: what it may put into memory
FOLDS = 8  # windows side by side in one call of a kernel: more would only take memory
LONG_CALL = 1024  # tokens from which on a kernel is worth its start
FUSED_ELEMENTS = 2**22  # of a tensor whose passes through a GPU's memory are worth a compiled kernel
FLEX_BLOCK = 128  # queries and keys in a block of FlexAttention's mask


def pick_engine(config: Config, device: torch.device, dtype: torch.dtype, T: int, cached: bool) -> Engine:
    """What attention_backend allows and the device has for a call of T tokens."""
    kind, choice, D = device.type, config.attention_backend, config.head_size
    if choice == "flash" and kind != "cuda":
        raise ValueError("attention_backend='flash' needs a GPU: set it to auto.")
    if T == 1 or choice == "sdpa" or config.attention_logit_softcapping is not None:
        return Engine(kind)
    plain, flex = not torch.compiler.is_compiling(), "flex" if choice == "flex" else None
    if kind != "cuda":
        return Engine(kind, "cpu" if kind == "cpu" and plain else None, flex)
    if dtype not in (torch.float16, torch.bfloat16) or D % 8 or D > 256:
        return Engine(kind, None, flex)
    hopper = torch.cuda.get_device_capability(device) >= (9, 0) and D <= 128
    merge = "cudnn" if hopper and T >= LONG_CALL and choice != "flash" else "flash"  # cuDNN plans every new shape
    if choice in ("flex", "flash") and T >= FLEX_BLOCK:
        return Engine(kind, merge if plain else None, choice)
    if T < LONG_CALL:
        return Engine(kind, merge if plain else None)
    # Flex is the faster and compiles every new shape: a prompt's odd length is not worth that.
    compiles = has_triton() and (not cached or T >= 8 * LONG_CALL)
    corners = plain and hopper and (config.sliding_window_size or 0) >= LONG_CALL
    return Engine(kind, merge if plain else None, *(("flex", LONG_CALL) if compiles else ("flash", 1)), corners)


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
    variant: str, config: Config, pos: Tensor, span: Span, engine: Engine, slot_map: "SlotMap | None" = None
) -> Plan:
    """Decide for one variant what this call's queries, at pos (1 or B, T), meet.

    Three cases: a fresh sequence meets itself; a short call (one token, or a verify step of up to lookahead + 1) and
    a layer without a window write first and meet the cache; a long call to a layer with a window meets the last
    window of cached keys and its own, and only then writes, since its keys may replace those that its first rows see.
    """
    row, T = VARIANTS[variant], pos.size(1)
    window = row.window(config)
    if slot_map is None or span.fresh:
        blocks = split_queries(Meeting(row, config, pos, pos, span, Layout(0, 0), engine))
        return Plan(blocks, pos, None if slot_map is None else slot_map.write(pos, span))
    if span.last is not None and window is not None:
        slot_map.check_kept(pos[:, :1], window)
    if window is None or T <= 1 + slot_map.lookahead:
        write = slot_map.write(pos, span)
        read, layout = slot_map.view(T, span, window)
        k_pos = slot_map.pos[:, read]
        blocks = split_queries(Meeting(row, config, pos, k_pos, span, layout, engine))
        return Plan(blocks, k_pos, write, [read], write_first=True)
    read, old_pos, layout = slot_map.recent(pos, span, window)  # one more than is seen: even numbers suit kernels
    write = slot_map.write(pos, span)
    k_pos = torch.cat([old_pos, pos.expand(old_pos.size(0), T)], dim=1)
    return Plan(split_queries(Meeting(row, config, pos, k_pos, span, layout, engine)), k_pos, write, read)


# ------------------------------------------------------------------------------------ which query meets which key, cut
#
# The queries of a call are cut into blocks, and each block meets only the keys that the reach of its parts names: T * S
# under a window. How large a block is, and how its masks are said, depends on the kernels at hand:
#   masked   blocks of QUERY_BLOCK, their masks made from positions; any call, any device
#   merged   blocks as large as they can be, each range of keys a rectangle that is seen whole or a causal triangle; a
#            block of a window's length meets its own keys in such a triangle, and those before in one that is turned
#   whole    one block, and a kernel that takes the window by itself


class Meeting(NamedTuple):
    """The queries and keys of one call to one variant."""

    variant: Variant
    config: Config
    q_pos: Tensor  # (1 or B, T)
    k_pos: Tensor  # (1 or B, L)
    span: Span
    layout: Layout | None  # None: any key may lie anywhere
    engine: Engine

    @property
    def exact(self) -> bool:
        """The keys' positions are known on the host, and the parts say how far they reach."""
        return self.layout is not None and self.layout.exact and all(p.reach is not None for p in self.variant.parts)

    @property
    def comparable(self) -> bool:
        """Masks can be looked at without making a GPU wait in a decode step, or a compiler give up."""
        if self.span.last is None or torch.compiler.is_compiling():
            return False
        return self.q_pos.size(1) > 1 or self.engine.kind == "cpu"


def split_queries(m: Meeting) -> list[QueryBlock]:
    """Cut the queries into blocks, and name for each the keys in its reach and which of them it sees."""
    T, parts, windowed = m.q_pos.size(1), m.variant.parts, m.variant.window(m.config) is not None
    joined = m.exact and len(parts) == 1 and m.span.fresh and m.config.attention_logit_softcapping is None
    if joined and parts[0].mask(T - 1, 0, m.config):
        return [QueryBlock(slice(0, T), [Range(slice(0, T), {0: None}, causal=True)])]
    corners = windowed and m.engine.corners and m.exact and any(p.band for p in parts)
    n_whole = whole_queries(m) if m.exact and windowed and not corners else 0
    merges = len(parts) > 1 if m.engine.kind == "cpu" else not windowed and T >= QUERY_BLOCK["cpu"]
    merge = m.engine.merge if m.exact and (merges or corners) and not n_whole else None
    size = T if merge and not windowed else masked_block_size(m)
    alike = m.variant.window(m.config) if merge and corners else size  # merged blocks hold several windows
    size = FOLDS * alike if merge and corners else size
    edges = block_edges(m, corners) if merge else []
    shared: dict[int, Tensor | None] = {}
    blocks: list[QueryBlock] = []
    for start, stop in reversed(cut_between([n_whole, *edges, T], size)):  # the block with the most keys first
        folds = max(1, (stop - start) // alike)
        if m.layout is None:
            ranges = [Range(slice(0, m.k_pos.size(1)), all_parts(m, start, stop, shared))]
        else:
            end = start + (stop - start) // folds
            ranges = [r for n in range(len(parts)) for r in part_ranges(m, n, start, end, merge, shared)]
        blocks.append(QueryBlock(slice(start, stop), ranges, merge, folds))
    if n_whole:
        ranges = [r for n in range(len(parts)) for r in whole_ranges(m, n, n_whole, shared)]
        blocks.append(QueryBlock(slice(0, n_whole), ranges))
    return blocks[::-1]


def block_edges(m: Meeting, corners: bool) -> list[int]:
    """Where, among the queries, merged blocks end: at the variant's edges and, where corners are cut, at windows.

    Windows are counted from the first key that is in one. A query of the first sees all keys before it; the others are
    alike but for the call's first and last, of which a part may be missing.
    """
    first, stop = m.layout.first, m.layout.first + m.q_pos.size(1)
    edges = set(m.variant.edges(first, stop, m.config))
    if corners:
        window, lead = m.variant.window(m.config), max(m.variant.edges(0, stop, m.config), default=0)
        begin = lead + max(1, -(-(first - lead) // window)) * window
        edges |= {x for x in (begin, stop - (stop - begin) % window) if begin <= x < stop}
    return [edge - first for edge in sorted(edges)]


def cut_between(edges: list[int], size: int) -> list[tuple[int, int]]:
    """Blocks, start and stop, of `size` at most from the first edge to the last, none across an edge."""
    return [(a, min(a + size, stop)) for start, stop in itertools.pairwise(edges) for a in range(start, stop, size)]


def whole_queries(m: Meeting) -> int:
    """How many of the queries, from the first on, go in one block to a kernel that takes a window by itself."""
    parts = m.variant.parts
    if m.engine.window is None or not any(p.band for p in parts) or (m.engine.window == "flash" and len(parts) > 1):
        return 0  # torch's flash kernel gives no log-sum-exp to merge sinks by
    return m.q_pos.size(1) // m.engine.whole * m.engine.whole


def whole_ranges(m: Meeting, n: int, stop: int, shared: dict[int, Tensor | None]) -> list[Range]:
    """The keys that the queries 0 .. stop - 1 meet in part n, with the window left to the kernel."""
    part, window = m.variant.parts[n], m.variant.window(m.config)
    a, b = m.layout.first, m.layout.first + stop
    lo, hi = part.reach(a, b, m.config)
    if not part.band:
        return part_ranges(m, n, 0, stop, None, shared)
    keys = m.layout.keys(max(0, lo), hi)
    if m.engine.window == "flash":
        return [Range(keys, {n: None}, window=window)]
    more = min(keys.start, -(keys.stop - keys.start) % FLEX_BLOCK)  # whole blocks need no check of where keys end
    block_mask = window_block_mask(stop, keys.stop - keys.start + more, window, more, m.q_pos.device)
    return [Range(slice(keys.start - more, keys.stop), {n: None}, flex=block_mask)]


def masked_block_size(m: Meeting) -> int:
    """How many queries may meet all keys in their reach at once under a mask."""
    window, L = m.variant.window(m.config), m.k_pos.size(1)
    reach = L if window is None or m.layout is None else min(L, window + QUERY_BLOCK["cuda"])
    parts = len(m.variant.parts) if m.layout is None else 1
    rows = max(m.q_pos.size(0), m.k_pos.size(0)) * m.config.n_head * parts
    return max(1, min(QUERY_BLOCK.get(m.engine.kind, QUERY_BLOCK["cuda"]), SCORE_ELEMENTS // (rows * reach)))


def all_parts(m: Meeting, start: int, stop: int, shared: dict[int, Tensor | None]) -> dict[int, Tensor | None]:
    """Every part's mask over all keys."""
    q_pos = m.q_pos[:, start:stop]
    masks = {n: visible(part, q_pos, m.k_pos, m.config)[:, None] for n, part in enumerate(m.variant.parts)}
    if len(masks) > 1 or not m.comparable:
        return masks
    shared[0] = share_mask(masks[0], shared.get(0))
    return {0: shared[0]}


def part_ranges(
    m: Meeting, n: int, start: int, stop: int, merge: str | None, shared: dict[int, Tensor | None]
) -> list[Range]:
    """The keys that the queries start .. stop - 1 meet in part n: none, one range, or two: older keys and their own."""
    part, window = m.variant.parts[n], m.variant.window(m.config)
    a, b = m.layout.first + start, m.layout.first + stop  # the queries' positions
    lo, hi = part.reach(a, b, m.config) if m.exact else (a - window + 1 if window else 0, b)
    if m.exact:
        lo = max(0, lo)
    if lo >= hi:
        return []
    if merge and hi == b and part.mask(b - 1, a, m.config):  # their own keys: a triangle
        corner = max(lo, b - window) if part.band and m.engine.corners else lo
        if lo == a or sees_all(part, a, b, corner, a, m.config) or corner == a:
            older = [Range(m.layout.keys(lo, corner), {n: None}, corner=True)] if lo < corner else []
            older += [Range(m.layout.keys(corner, a), {n: None})] if corner < a else []
            return [*older, Range(m.layout.keys(a, b), {n: None}, causal=b - a > 1)]
    keys = m.layout.keys(lo, hi)
    if m.exact and sees_all(part, a, b, lo, hi, m.config):
        return [Range(keys, {n: None}, still=not part.band)]
    mask = visible(part, m.q_pos[:, start:stop], m.k_pos[:, keys], m.config)[:, None]  # (1 or B, 1, T, L)
    if m.comparable:
        mask = shared[n] = share_mask(mask, shared.get(n))
    return [Range(keys, {n: mask})]


def sees_all(part: Part, a: int, b: int, lo: int, hi: int, config: Config) -> bool:
    """True if every query at a .. b - 1 sees every key at lo .. hi - 1: by the corners, see Part.reach."""
    return hi - 1 <= a and bool(part.mask(b - 1, lo, config) and part.mask(a, hi - 1, config))


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

    slots: list[Tensor]  # per copy: (T',) for tokens of every row, or (B, T) where rows differ
    tokens: Tensor | slice = slice(None)  # which of the call's tokens, or (B, T) where rows differ: one for every slot
    any_token: Tensor | None = None  # (B, 1) False for a row of padding alone, which writes nothing; None: rows agree


class SlotMap(nn.Module):
    """Which position each slot holds, -1 for an empty one: shared by all layers of one variant.

    (B, sinks + copies * M): the sinks' slots come first, each once, and what follows is the cache described above for
    position - sinks.
    """

    def __init__(self, batch_size: int, layout: CacheLayout, lookahead: int, device: torch.device | str) -> None:
        super().__init__()
        self.n_slots, self.copies, self.sinks, self.lookahead = *layout, lookahead
        empty = torch.full((batch_size, self.sinks + self.copies * self.n_slots), -1, device=device)
        self.register_buffer("pos", empty, persistent=False)

    def slot(self, pos: Tensor) -> Tensor:
        """The (first) slot of each position. A dense cache does not wrap: a position beyond it is an index error."""
        if self.copies == 1:
            return pos
        rolled = self.sinks + (pos - self.sinks) % self.n_slots
        return torch.where(pos < self.sinks, pos, rolled) if self.sinks else rolled

    def every_copy(self, slots: Tensor) -> list[Tensor]:
        if self.copies == 1:
            return [slots]
        second = slots + self.n_slots
        return [slots, torch.where(slots < self.sinks, slots, second) if self.sinks else second]

    def take_over(self, old: "SlotMap") -> tuple[Tensor, Tensor, list[Tensor]]:
        """Hold the positions that a smaller map holds. Returns what moves: rows, slots there, slots here."""
        rows, source = (old.pos[:, : old.sinks + old.n_slots] >= 0).nonzero(as_tuple=True)
        pos = old.pos[rows, source]
        targets = self.every_copy(self.slot(pos))
        for slots in targets:
            self.pos[rows, slots] = pos
        return rows, source, targets

    def write(self, pos: Tensor, span: Span) -> Write:
        """Note that the slots of pos (1 or B, T) hold these positions now; returns where their keys go."""
        if span.uniform and (span.first is not None or pos.size(1) <= self.n_slots):
            tokens = self.kept(pos.size(1), span.first, pos.device)
            pos = pos[0, tokens]
            write = Write(self.every_copy(self.slot(pos)), tokens)
            for slots in write.slots:
                self.pos.index_copy_(1, slots, pos.expand(self.pos.size(0), -1))
            return write
        pos = pos.expand(self.pos.size(0), -1)
        write = self.write_rows(pos)
        stored = torch.where(write.any_token, pos.gather(1, write.tokens), self.pos[:, :1])
        for slots in write.slots:
            self.pos.scatter_(1, slots, stored)
        return write

    def kept(self, T: int, first: int | None, device: torch.device) -> Tensor | slice:
        """Which of T tokens from position `first` on stay: the sinks, and of more than M others the last M."""
        n_sinks = 0 if first is None else max(0, min(T, self.sinks - first))
        if T - n_sinks <= self.n_slots:
            return slice(None)
        if n_sinks == 0:
            return slice(T - self.n_slots, T)
        tokens = torch.arange(T, device=device)
        return torch.cat([tokens[:n_sinks], tokens[T - self.n_slots :]])

    def write_rows(self, pos: Tensor) -> Write:
        """Rows at positions of their own, (B, T): padding, and tokens that more than M later ones follow, are not kept.

        A write has a fixed shape, so what is not kept writes its row's newest token once more, to that token's slot.
        """
        T = pos.size(1)
        token = pos >= 0
        order = torch.arange(T, device=pos.device).expand_as(pos)
        newest = torch.where(token, order, 0).amax(dim=1, keepdim=True)  # (B, 1)
        kept = token & ((pos > pos.gather(1, newest) - self.n_slots) | (pos < self.sinks))
        tokens = torch.where(kept, order, newest)
        any_token = token.any(dim=1, keepdim=True)
        slots = torch.where(any_token, self.slot(pos.gather(1, tokens)), 0)
        return Write(self.every_copy(slots), tokens, any_token)

    def check_kept(self, first: Tensor, window: int) -> None:
        """Refuse a call whose first tokens, at positions first (1 or B, 1), need a key that a later one replaced."""
        if self.copies == 1 or first.device.type != "cpu":
            return
        oldest = (first - window + 1).clamp(min=self.sinks).expand(self.pos.size(0), 1)
        replaced = (self.pos.gather(1, self.slot(oldest)) > oldest) & (oldest < first)
        if replaced.any():
            raise ValueError(
                f"Position {int(first.min())} comes after later ones, and the keys that it needs are gone: a rolling "
                f"cache takes back {self.lookahead} tokens, more with set_kv_cache(lookahead=...)."
            )

    def view(self, T: int, span: Span, window: int | None) -> tuple[slice, Layout | None]:
        """The slots that a call of T tokens, already written, meets, and how the keys lie there; None: anyhow."""
        if span.last is None or (self.copies == 2 and not span.uniform):
            return slice(0, self.sinks + self.n_slots), None
        if span.first is None or not span.contiguous:
            return slice(0, max(1, min(self.sinks + self.n_slots, span.last + 1))), None  # one, even for padding alone
        first, held = span.first, span.last + 1
        if self.copies == 1 or held <= self.sinks + self.n_slots:  # nothing has wrapped
            start = 0 if window is None or self.sinks else max(0, first - window + 1)
            return slice(start, held), Layout(first, first - start)
        end = self.sinks + (span.last - self.sinks) % self.n_slots + self.n_slots + 1
        start = 0 if self.sinks else end - min(window - 1 + T, held)
        return slice(start, end), Layout(first, end - T - start, self.sinks)

    def recent(self, pos: Tensor, span: Span, n: int) -> tuple[list[slice | Tensor], Tensor, Layout | None]:
        """The slots of the sinks and of the n positions before the call's first; the positions (1 or B, L) that they
        hold, -1 for a lost one; and how these keys, with the call's own behind them, lie."""
        if span.first is not None:  # uniform: they lie in one piece
            first, sinks = span.first, min(self.sinks, span.first)
            n = min(n, first - sinks)
            end = first if self.copies == 1 else self.sinks + (first - self.sinks) % self.n_slots + self.n_slots
            before = pos[:, :1] - n + torch.arange(n, device=pos.device)  # (1, n)
            read = slice(end - n, end) if n else slice(0, 0)
            held = self.pos[:, read]
            layout = Layout(first, sinks + n, sinks if first > sinks else 0) if span.contiguous else None
        else:
            sinks = self.sinks
            first = pos[:, :1] if span.contiguous else torch.where(pos >= 0, pos, 2**40).amin(dim=1, keepdim=True)
            before = first - n + torch.arange(n, device=pos.device)  # (1 or B, n)
            most = None if self.copies == 2 else self.n_slots - 1
            read = self.slot(before.clamp(sinks, most)).expand(self.pos.size(0), n)
            held = self.pos.gather(1, read)
            layout = Layout(n, n, exact=False) if span.contiguous and not sinks else None
        held = torch.where(held == before, before, -1)
        if not sinks:
            return [read], held, layout
        return [slice(0, sinks), read], torch.cat([self.pos[:, :sinks], held], dim=1), layout


class KVCache(nn.Module):
    """The keys, after RoPE where it does not depend on the text's length, and the values of one layer.

    (B, G, sinks + copies * M, D) each.
    """

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
            return read_slots(self.k, plan.read[0]).to(k.dtype), read_slots(self.v, plan.read[0]).to(v.dtype)
        met_k, met_v = k, v
        if plan.read:
            met_k = torch.cat([*(read_slots(self.k, read).to(k.dtype) for read in plan.read), k], dim=2)
            met_v = torch.cat([*(read_slots(self.v, read).to(v.dtype) for read in plan.read), v], dim=2)
        write_slots(self.k, k, plan.write)
        write_slots(self.v, v, plan.write)
        return met_k, met_v


def read_slots(held: Tensor, slots: slice | Tensor) -> Tensor:
    """What (B, G, slots, D) holds in some of them: a view for a slice, a copy for slots (B, n) of each row's own."""
    if isinstance(slots, slice):
        return held[:, :, slots]
    rows = torch.arange(held.size(0), device=held.device)[:, None]
    return held[rows, :, slots].transpose(1, 2)  # (B, n, G, D) -> (B, G, n, D)


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
        self.attention_factor = rope_attention_factor(config.rope_scaling)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RoPE":
        """Follow the model to another device, but never to another dtype: bfloat16 positions are wrong past 256."""
        super()._apply(fn, recurse)
        self.inv_freq = rope_frequencies(self.config).to(self.inv_freq.device)
        return self

    def forward(self, pos: Tensor, base: int = 0, length: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin, (1 or B, 1, T, rope_n_elem) each, for positions (1 or B, T) at one of the bases.

        length: tokens seen so far, (1 or B, 1), which the scalings of LENGTH_SCALINGS go by.
        """
        inv_freq = self.inv_freq[base]
        if length is not None and base == 0:
            scaling = self.config.rope_scaling
            inv_freq = LENGTH_SCALINGS[scaling["type"]](self.inv_freq, scaling, length)[:, None, None]  # (1 or B, ...)
        angles = pos[:, None, :, None].float() * inv_freq
        cos, sin = angles.cos(), angles.sin()
        if base == 0 and self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of the first rope_n_elem elements of every head of x (B, H, T, D), in float32 at least.

    (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    n = cos.size(-1)
    head = x if n == x.size(-1) else x[..., :n]
    head = head.to(torch.promote_types(x.dtype, torch.float32))
    turned = (head * cos + head.roll(n // 2, dims=-1) * sin).to(x.dtype)  # sin holds the signs of both halves
    return turned if n == x.size(-1) else torch.cat([turned, x[..., n:]], dim=-1)


def rope_base_index(config: Config, variant: str) -> int:
    """Which of the rows of rope_frequencies a variant turns by."""
    return 1 if config.rope_local_base_freq is not None and VARIANTS[variant].window(config) else 0


def rope_frequencies(config: Config) -> Tensor:
    """Angles per position, float32 (rows, rope_n_elem / 2): rope_base's, scaled; the local base's, if there is one; and
    LongRoPE's for long texts."""
    exponents = torch.arange(0, config.rope_n_elem, 2, device="cpu", dtype=torch.float32) / max(1, config.rope_n_elem)
    plain, scaling = 1.0 / config.rope_base**exponents, config.rope_scaling or {"type": None}
    local = [] if config.rope_local_base_freq is None else [1.0 / config.rope_local_base_freq**exponents]
    if scaling["type"] == "longrope":
        short, long = (plain / torch.tensor(scaling[key], device="cpu", dtype=torch.float32) for key in LONGROPE_LISTS)
        return torch.stack([short, *local, long])
    scale = ROPE_SCALINGS.get(scaling["type"], keep)
    return torch.stack([scale(plain, scaling, config), *local])


# Scalings of RoPE for texts longer than those a model was trained on, with its frequencies f. A factor of 1 is the
# identity for each of them.


def scale_linear(f: Tensor, scaling: dict, config: Config) -> Tensor:
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): position / factor."""
    return f / scaling["factor"]


def scale_ntk(f: Tensor, scaling: dict, config: Config) -> Tensor:
    """Neural tangent kernel scaling (bloc97, 2023): base * factor^(D / (D - 2)); the shortest wave stays as it is."""
    return f * scaling["factor"] ** -ntk_exponents(f)


def ntk_exponents(f: Tensor) -> Tensor:
    """How the factor by which the lowest frequency is divided spreads over all: 0 for the highest, 1 for the lowest."""
    return torch.arange(f.size(-1), device=f.device, dtype=torch.float32) / (f.size(-1) - 1)


def scale_yarn(f: Tensor, scaling: dict, config: Config) -> Tensor:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): waves that turn often are kept, slow ones stretched, between blended.

    The blend is linear in the index of the dimension, as the reference's and transformers', not in the number of turns.
    """
    n, trained = 2 * f.size(-1), scaling["original_max_position_embeddings"]

    def index_of(
        turns: float,
    ) -> float:  # the (real-valued) index of the wave that turns so often in the trained length
        return n * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rope_base))

    low, high = index_of(scaling.get("beta_fast", 32)), index_of(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n - 1)
    index = torch.arange(f.size(-1), device=f.device, dtype=torch.float32)
    stretched = ((index - low) / (high - low or 0.001)).clamp(0, 1)
    return stretched * f / scaling["factor"] + (1 - stretched) * f


def scale_llama3(f: Tensor, scaling: dict, config: Config) -> Tensor:
    """Llama 3.1: long waves are stretched by the factor, short ones kept, those between blended."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)  # within the trained length
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * f + (1 - kept) * f / factor


def keep(f: Tensor, scaling: dict, config: Config) -> Tensor:
    return f


def scale_dynamic(inv_freq: Tensor, scaling: dict, length: Tensor) -> Tensor:
    """Dynamic NTK (emozilla, 2023) for texts of `length` (1 or B, 1) tokens so far: (1 or B, rope_n_elem / 2)."""
    stretch = (length / scaling["original_max_position_embeddings"]).clamp(min=1.0)
    factor = scaling["factor"] * stretch - (scaling["factor"] - 1)
    return inv_freq[0] * factor ** -ntk_exponents(inv_freq)


def scale_longrope(inv_freq: Tensor, scaling: dict, length: Tensor) -> Tensor:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): a searched factor per frequency, others once a text is long."""
    return torch.where(length > scaling["original_max_position_embeddings"], inv_freq[-1], inv_freq[0])


ROPE_SCALINGS: dict[str, Callable[[Tensor, dict, Config], Tensor]] = {
    "linear": scale_linear,
    "ntk": scale_ntk,
    "dynamic": keep,
    "yarn": scale_yarn,
    "llama3": scale_llama3,
    "longrope": keep,
}
# Those whose frequencies change as a text grows. Keys are then cached before RoPE and turned when they are met.
LENGTH_SCALINGS: dict[str, Callable[[Tensor, dict, Tensor], Tensor]] = {
    "dynamic": scale_dynamic,
    "longrope": scale_longrope,
}
LONGROPE_LISTS = ("short_factor", "long_factor")
TRAINED_LENGTH = "original_max_position_embeddings"
ROPE_SCALING_KEYS: dict[str, tuple[set[str], set[str]]] = {  # needed, welcome
    "linear": ({"factor"}, set()),
    "ntk": ({"factor"}, set()),
    "dynamic": ({"factor", TRAINED_LENGTH}, set()),
    "yarn": (
        {"factor", TRAINED_LENGTH},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", TRAINED_LENGTH}, set()),
    "longrope": ({*LONGROPE_LISTS, TRAINED_LENGTH}, {"factor", "attention_factor"}),
}


def rope_attention_factor(scaling: dict | None) -> float:
    """What YaRN and LongRoPE multiply queries and keys with, by way of cos and sin."""
    if scaling is None or scaling["type"] not in ("yarn", "longrope"):
        return 1.0
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    factor = scaling.get("factor", 1.0)
    if factor <= 1:
        return 1.0
    if scaling["type"] == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(scaling[TRAINED_LENGTH]))
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        above, below = (0.1 * scaling[key] * math.log(factor) + 1 for key in ("mscale", "mscale_all_dim"))
        return above / below
    return 0.1 * math.log(factor) + 1


def with_trained_length(scaling: dict | None, trained: int) -> dict | None:
    """A scaling that needs the trained length and does not say it, with it; others as they are."""
    needed = ROPE_SCALING_KEYS.get(scaling.get("type") if scaling else None, (set(), set()))[0]
    return {**scaling, TRAINED_LENGTH: trained} if TRAINED_LENGTH in needed - set(scaling or ()) else scaling


def check_rope_scaling(config: Config) -> None:
    scaling = config.rope_scaling
    if scaling is None:
        return
    if scaling.get("type") not in ROPE_SCALINGS:
        given = f"type {scaling['type']!r} is none of" if "type" in scaling else "needs a type, one of"
        raise ValueError(f"rope_scaling {given} {', '.join(ROPE_SCALINGS)}.")
    kind, given = scaling["type"], set(scaling) - {"type"}
    needed, welcome = ROPE_SCALING_KEYS[kind]
    if needed - given:
        raise ValueError(f"rope_scaling of type {kind!r} needs {', '.join(sorted(needed - given))}.")
    if given - needed - welcome:
        unknown, known = ", ".join(sorted(given - needed - welcome)), ", ".join(sorted(needed | welcome))
        raise ValueError(f"rope_scaling of type {kind!r} has no {unknown}: it takes {known}.")
    for key in given - {"truncate"}:
        values = scaling[key] if key in LONGROPE_LISTS else [scaling[key]]
        if not isinstance(values, list):
            raise ValueError(f"rope_scaling {key}={values!r} does not fit: it must be a list of numbers.")
        if any(type(v) not in (int, float) or not 0 < v < 1e9 for v in values):
            raise ValueError(f"rope_scaling {key}={scaling[key]!r} does not fit: it must be a positive number.")
        if key in LONGROPE_LISTS and len(values) != config.rope_n_elem // 2:
            raise ValueError(
                f"rope_scaling {key} has {len(values)} numbers and RoPE {config.rope_n_elem // 2} frequencies: "
                "it must have one for each."
            )
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError("rope_scaling high_freq_factor must be greater than low_freq_factor.")
    if kind in ("ntk", "dynamic") and config.rope_n_elem < 4:
        raise ValueError(f"rope_scaling of type {kind!r} needs at least 4 elements of a head that RoPE turns.")
    if kind == "yarn" and config.rope_base <= 1 or kind == "longrope" and scaling[TRAINED_LENGTH] <= 1:
        raise ValueError(f"rope_scaling of type {kind!r} needs rope_base and the trained length to be more than 1.")
    if kind in LENGTH_SCALINGS and not all(v in ("full", "sliding") for v in config.layer_variants):
        raise ValueError(
            f"rope_scaling of type {kind!r} depends on the text's length and attention={config.attention!r} on "
            "positions of its own: use the type linear, ntk, yarn or llama3."
        )


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
