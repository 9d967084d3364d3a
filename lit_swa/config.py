"""What shapes a model: the fields of Config, and every check, of them and of what is asked of a model.

Behaviour follows from the fields alone; `name` is for people. The attention variants are rows of VARIANTS, which
model.py fills: a row says which fields it reads and needs, and the checks here go by what it says.
"""

import copy
import difflib
import importlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from .model import GPT, Mixer
    from .rope import Span

IGNORED = -100  # a target that is not trained on

TRAINED_LENGTH, LONGROPE_LISTS = "original_max_position_embeddings", ("short_factor", "long_factor")
ROPE_SCALING_KEYS: dict[str, tuple[set[str], set[str]]] = {  # type -> the keys that it must have, and may have
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
LENGTH_DEPENDENT = ("dynamic", "longrope")  # types whose frequencies change as a text grows


# ------------------------------------------------------------------------------------------------------- the fields


@dataclass
class Config:
    """The fields that shape a model. ValueError for a value, or a combination, that no model can be built from."""

    name: str = ""  # for people: nothing follows from it
    # shape
    n_layer: int = 16  # blocks
    n_head: int = 32  # query heads of a layer
    n_query_groups: int | None = None  # key/value heads; None: as many as query heads
    layer_heads: str | None = None  # n_head of each layer, where they differ: "32,16" tiles over all layers ...
    layer_query_groups: str | None = None  # ... and n_query_groups; each field above is then the largest
    n_embd: int = 4096  # elements of a token's vector between the layers
    head_size: int | None = None  # elements of a head; None: n_embd // n_head
    intermediate_size: int | None = None  # elements within the MLP; None: 4 * n_embd
    block_size: int = 4096  # the context, in tokens, that a layer without a window can take
    vocab_size: int = 50257  # tokens that can be chosen
    padded_vocab_size: int | None = None  # rows of the embedding; None: vocab_size
    tie_embeddings: bool = False  # lm_head shares its weight with wte
    lm_head_bias: bool = False  # Phi 1 and 2: logits have a bias
    # block
    norm_class_name: str = "RMSNorm"  # or LayerNorm
    norm_weight: bool = True  # OLMo 1: a LayerNorm has none, nor a bias
    norm_bias: bool = True  # Cohere: a LayerNorm has none
    norm_eps: float = 1e-5  # added to the mean square that a norm divides by
    norm_unit_offset: bool = False  # Gemma: the norm multiplies by (1 + weight)
    norm_qk: bool = False  # Qwen3, Gemma 3: a norm over the head size of queries and keys, before RoPE
    norm_qk_type: str = "head"  # or "each" (StableLM 2: weights of each head), "whole" (OLMo 2: over all), "plain"
    pre_norm: bool = True  # False, OLMo 2 and EXAONE 4: no norm before the attention and the MLP
    post_attention_norm: bool = False  # Gemma 2 and 3: a norm also behind the attention ...
    post_mlp_norm: bool = False  # ... and behind the MLP
    parallel_residual: bool = False  # NeoX: x + attn(norm_1(x)) + mlp(norm_2(x))
    shared_norm: bool = False  # Phi, Falcon 7B, Cohere: then norm_1 also in the place of norm_2
    residual_multiplier: float = 1.0  # Granite: of what a block's attention and MLP add to the residual stream
    mlp_class_name: str = "GatedMLP"  # or PlainMLP, MoE; a comma list tiles over the layers: "GatedMLP,MoE"
    activation: str = "silu"  # of the MLP; or gelu, gelu_tanh, relu
    attn_bias: bool = False  # of the query, key and value projections
    attn_proj_bias: bool = False  # of the projection behind the attention
    mlp_bias: bool = False  # of the projections of the MLP
    n_expert: int | None = None  # experts of a layer of MoE; see moe.py
    n_expert_per_token: int | None = None  # ... and how many of them compute for a token
    expert_size: int | None = None  # elements within an expert; None: intermediate_size
    expert_weights: str = "chosen"  # what the experts' outputs are weighted by: softmax over the chosen; see moe.py
    expert_scale: float = 1.0  # ... times this
    expert_limit: float | None = None  # gpt-oss: an expert's inner outputs are clamped to it ...
    expert_slope: float = 1.702  # ... and its activation is x * sigmoid(slope * x)
    shared_expert_size: int | None = None  # elements within an MLP beside the experts, which computes for every token
    shared_expert_gate: bool = False  # Qwen2: a learned number in 0 .. 1 for each token multiplies it
    balancing_loss: float = 0.0  # how much the experts' balance counts in training, beside a token's loss
    clip_qkv: float | None = None  # OLMo 1: queries, keys and values are clamped to -clip_qkv .. clip_qkv
    scale_embeddings: bool = False  # Gemma: embeddings times sqrt(n_embd)
    embedding_multiplier: float = 1.0  # Granite: embeddings times this
    logit_multiplier: float = 1.0  # Cohere, Granite: logits times this
    final_logit_softcapping: float | None = None  # c: logits become c * tanh(logits / c)
    # positions
    positions: str = "rope"  # or "none" (NoPE), or RoPE at another base; a comma list tiles: "rope,10000,none"
    rope_base: float = 10000.0  # RoPE turns the i-th pair of D elements by rope_base ** (-2i / D) a token
    rope_local_base_freq: float | None = None  # Gemma 3: the base of the layers with a window; None: rope_base
    rotary_percentage: float = 1.0  # the share of each head that RoPE rotates
    rope_scaling: dict | None = None  # {"type": "linear", "factor": 4.0}; see rope.py. Not for rope_local_base_freq
    # attention
    attention: str = "full"  # a variant, or a comma list that tiles over the layers: "sliding,full"
    prompt_attention: str | None = None  # how a prompt is read, such as "streaming"; None: as all else. See its file
    sliding_window_size: int | None = None  # S: a query at p sees the S keys p - S + 1 .. p
    layer_windows: str | None = None  # S of each layer, where they differ: "128,1024" tiles over all layers
    rolling_kv_cache: bool = False  # layers with a window keep 2S slots instead of one for every position
    attention_chunk_size: int | None = None  # chunked: a query sees the keys of its own chunk of so many tokens
    n_sink_tokens: int = 4  # streaming: the first tokens, which every query sees beside its window S
    dual_chunk_pretraining_length: int | None = None  # c, the trained length; None: block_size
    dual_chunk_size: int | None = None  # s, the tokens of a chunk; None: 5/8 of c
    dual_chunk_local: int | None = None  # w, the nearest tokens, always at their true distance; None: 1/8 of c
    dual_chunk_temperature: float = 1.0  # multiplies the scores; or, by the query's position p (counted from 1),
    dual_chunk_temperature_slope: float | None = None  # ... by max(1, slope * ln(p / c) + 1) ** power
    dual_chunk_temperature_power: float = 1.0  # Qwen2.5-1M: 2, since YaRN's factor reaches queries and keys
    linear_feature_map: str = "hedgehog"  # linear attention: the features of its queries and keys; or relu
    linear_window: int = 64  # the nearest keys, the query's own included, that a query meets by softmax; 0: none
    linear_sinks: int = 0  # ... and so many first ones
    linear_gate: bool = False  # older keys fade by a learned gate of each head
    linear_off: bool = False  # older keys are left out, to see what they are good for
    linear_teacher: str | None = None  # the softmax attention that linear layers learned from: a pattern; None: full
    s2_attention: bool = False  # in training mode, attend within groups; half of the heads shift theirs by half a group
    s2_group_ratio: float = 0.25  # the group's share of the text
    s2_group_size: int | None = None  # ... or its tokens
    s2_shift: bool = True  # False: no head shifts its groups, LongLoRA's "short attention", to compare with
    temperature_slope: float | None = None  # Llama 4: queries times 1 + slope * ln(1 + (position + offset) // length)
    temperature_length: int | None = None  # ... every so many tokens
    temperature_offset: int = 0  # ... counted from 0 (Ministral 3) or 1 (Llama 4)
    temperature_layers: str = "all"  # ... in all layers, or in those of "none" of the positions
    sink_logits: bool = False  # gpt-oss: each head has a learned logit in its softmax that no key stands behind
    attention_gate: bool = False  # AFMoE: each head's output times sigmoid(a projection of what the layer reads)
    attention_scores_scalar: float | None = None  # scores are divided by its square root; None: head_size
    attention_logit_softcapping: float | None = None  # c: scores become c * tanh(scores / c)
    attention_backend: str = "auto"  # what may take the place of the plain steps: see fast_attention.py

    def __post_init__(self) -> None:
        fill_variants()
        check_types(self)
        if self.n_query_groups is None:
            self.n_query_groups = self.n_head
        if self.head_size is None:
            self.head_size = max(1, self.n_embd // max(1, self.n_head))
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.n_embd
        if self.layer_windows is not None and self.sliding_window_size is None:
            self.sliding_window_size = max(number_list("layer_windows", self.layer_windows))
        if self.expert_size is None:
            self.expert_size = self.intermediate_size if self.n_expert is not None else None
        if self.padded_vocab_size is None:
            self.padded_vocab_size = self.vocab_size
        self.rope_scaling = with_trained_length(self.rope_scaling, self.block_size)
        check_values(self)

    @property
    def layer_variants(self) -> list[str]:
        """The attention variant of every layer: the pattern, tiled and cut to n_layer."""
        return tiled(self.attention, self.n_layer)

    @property
    def prompt_variants(self) -> list[str]:
        """The attention variant by which every layer reads a prompt."""
        return tiled(self.prompt_attention or self.attention, self.n_layer)

    @property
    def layer_positions(self) -> list[str]:
        """For every layer "rope", "none", or the base of RoPE."""
        return tiled(self.positions, self.n_layer)

    @property
    def layer_mlps(self) -> list[str]:
        """The class of every layer's MLP."""
        return tiled(self.mlp_class_name, self.n_layer)

    def of_layer(self, layer: int) -> "Config":
        """What the attention of a layer reads: the same, with the layer's own window and heads where it has some."""
        each = {name: getattr(self, field) for field, name in BY_LAYER.items()}
        if not any(each.values()):
            return self
        own = copy.copy(self)
        for name, numbers in each.items():
            if numbers is not None:
                setattr(own, name, int(tiled(numbers, layer + 1)[layer]))
        return own

    def kind_of(self, variant: str, layer: int) -> str:
        """Layers of one kind see the same keys at the same places."""
        positions, kind, prompt = self.layer_positions[layer], variant, variant
        kind += "" if positions == "rope" else f", positions {positions}"
        if self.prompt_attention is not None:
            prompt = self.prompt_variants[layer]
            kind += f", prompt {prompt}"
        rows = [VARIANTS.get(name) for name in (variant, prompt)]  # None: a mixer's own name for what it does
        windowed = any(row is None or "sliding_window_size" in row.needs for row in rows)
        some = self.layer_windows is not None and windowed
        return kind + (f", window {self.of_layer(layer).sliding_window_size}" if some else "")

    @property
    def more_bases(self) -> list[float]:
        """The bases of RoPE that some layers have in the place of rope_base; that of the windows stands last."""
        named = dict.fromkeys(float(base) for base in self.layer_positions if base not in ("rope", "none"))
        return [*named, *([self.rope_local_base_freq] if self.rope_local_base_freq is not None else [])]

    @property
    def rope_n_elem(self) -> int:
        """How many of the D elements of a head RoPE rotates; even."""
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
        fill_variants()
        reject_unknown_fields(values | overrides)
        if "block_size" in values:  # which was trained on; an override of it is how far to go now
            if isinstance(overrides.get("rope_scaling"), dict):
                overrides["rope_scaling"] = with_trained_length(overrides["rope_scaling"], values["block_size"])
            field = "dual_chunk_pretraining_length"
            if values.get(field) is None and field in fields_read(str(overrides.get("attention"))):
                overrides.setdefault(field, values["block_size"])
        config = cls(**values | overrides)
        for name, value in overrides.items():
            if value is not None and value != cls.__dataclass_fields__[name].default:
                check_effect(name, value, config)
        if {"s2_group_size", "s2_group_ratio"} <= set(overrides):
            raise ValueError("s2_group_size and s2_group_ratio are two ways to say it: set one.")
        return config

    def to_dict(self) -> dict[str, Any]:
        """What lit_config.json holds: the fields that belong to the weights, and others that are not the default.

        So a default that is edited here counts for every checkpoint that does not say otherwise.
        """
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return {name: value for name, (value, plain) in values.items() if name in OF_THE_WEIGHTS or value != plain}

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


def tiled(pattern: str, n: int) -> list[str]:
    """The names of a comma list, one for each of n layers: tiled and cut."""
    names = [name.strip() for name in pattern.split(",")]
    return [names[i % len(names)] for i in range(n)]


def join_pattern(names: Sequence[str]) -> str:
    """The shortest pattern that tiles to the names of the layers."""
    n = len(names)
    periods = (p for p in range(1, n) if all(names[i] == names[i % p] for i in range(n)))
    return ",".join(names[: next(periods, n)])


def number_list(field: str, text: str) -> list[int]:
    """The numbers of a comma list, one of BY_LAYER. Raises ValueError for what is none."""
    least, most = RANGES[BY_LAYER[field]]
    numbers = [int(n) if re.fullmatch(r" *[0-9]{1,10} *", n) else -1 for n in text.split(",")]
    if not all(least <= n <= most for n in numbers):
        of, example = ("tokens", "128,1024") if field == "layer_windows" else ("heads", "32,16")
        raise ValueError(f"{field}={short(text)} does not fit: give numbers of {of}, such as {example!r}.")
    return numbers


BY_LAYER = {  # a list for the layers -> the field of which each layer has its own
    "layer_windows": "sliding_window_size",
    "layer_heads": "n_head",
    "layer_query_groups": "n_query_groups",
}
OF_THE_WEIGHTS = {  # their shapes, and the computation that they were trained for; the rest is how a model is run
    "n_layer", "n_head", "n_query_groups", "n_embd", "head_size", "intermediate_size", "block_size", "vocab_size",
    "padded_vocab_size", "tie_embeddings", "norm_class_name", "norm_eps", "norm_unit_offset", "norm_qk",
    "post_attention_norm", "post_mlp_norm", "parallel_residual", "mlp_class_name", "activation", "attn_bias",
    "attn_proj_bias", "mlp_bias", "scale_embeddings", "final_logit_softcapping", "rope_base", "rotary_percentage",
    "attention_scores_scalar", "attention_logit_softcapping", "positions", "lm_head_bias", "norm_weight", "norm_bias",
    "norm_qk_type", "pre_norm", "shared_norm", "residual_multiplier", "clip_qkv", "embedding_multiplier",
    "logit_multiplier", "temperature_slope", "temperature_length", "temperature_offset", "temperature_layers",
    "sink_logits", "attention_gate", "n_expert", "n_expert_per_token", "expert_size", "expert_weights",
    "expert_scale", "expert_limit", "expert_slope",
    "shared_expert_size", "shared_expert_gate", "layer_heads", "layer_query_groups",
}  # fmt: skip
MLPS = "GatedMLP", "PlainMLP", "MoE"
CHOICES = {
    "norm_class_name": ("RMSNorm", "LayerNorm"),
    "norm_qk_type": ("head", "each", "whole", "plain"),
    "expert_weights": ("chosen", "all", "sigmoid", "biased"),
    "temperature_layers": ("all", "none"),
    "activation": ("silu", "gelu", "gelu_tanh", "relu"),
    "linear_feature_map": ("hedgehog", "relu"),
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
    "residual_multiplier": (1e-6, 1e6),
    "embedding_multiplier": (1e-6, 1e6),
    "logit_multiplier": (1e-6, 1e6),
    "n_expert": (1, 2**16),
    "n_expert_per_token": (1, 2**16),
    "expert_size": (1, 2**20),
    "expert_scale": (1e-3, 1e3),
    "expert_limit": (1e-3, 1e6),
    "expert_slope": (1e-3, 1e3),
    "shared_expert_size": (1, 2**20),
    "balancing_loss": (0.0, 1e3),
    "clip_qkv": (1e-3, 1e6),
    "temperature_slope": (0.0, 1e3),
    "temperature_length": (1, 2**31),
    "temperature_offset": (0, 1),
    "rope_base": (1e-3, 1e12),
    "rope_local_base_freq": (1e-3, 1e12),
    "rotary_percentage": (0.0, 1.0),
    "sliding_window_size": (1, 2**31),
    "attention_chunk_size": (1, 2**31),
    "n_sink_tokens": (0, 2**20),
    "dual_chunk_pretraining_length": (2, 2**31),
    "dual_chunk_size": (1, 2**31),
    "dual_chunk_local": (0, 2**31),
    "dual_chunk_temperature": (1e-3, 1e3),
    "dual_chunk_temperature_slope": (0.0, 1e3),
    "dual_chunk_temperature_power": (0.0, 8.0),
    "linear_window": (0, 2**31),
    "linear_sinks": (0, 2**20),
    "s2_group_ratio": (1e-6, 1.0),
    "s2_group_size": (1, 2**31),
    "attention_scores_scalar": (1e-6, 1e12),
    "attention_logit_softcapping": (1e-3, 1e6),
    "final_logit_softcapping": (1e-3, 1e6),
}


WINDOW_FIELDS = ("rolling_kv_cache", "rope_local_base_freq", "layer_windows")  # every variant with a window reads them
S2_FIELDS = ("s2_group_ratio", "s2_group_size", "s2_shift")


def fields_read(attention: str, prompt: str | None = None) -> set[str]:
    """The fields that say something to a variant of the patterns and nothing to the others."""
    rows, of_prompt = (
        [VARIANTS[v.strip()] for v in (pattern or "").split(",") if v.strip() in VARIANTS]
        for pattern in (attention, prompt)
    )
    windows = WINDOW_FIELDS if any(row.window is not None for row in rows) else ()
    if any("sliding_window_size" in row.needs for row in of_prompt):
        windows = (*windows, "layer_windows")
    return {name for row in rows + of_prompt for name in (*row.needs, *row.fields)} | set(windows)


def check_effect(name: str, value: Any, config: Config) -> None:
    """Refuse a value that was asked for and would do nothing."""
    if name in S2_FIELDS and not config.s2_attention:
        raise ValueError(f"{name}={value} has no effect without s2_attention: also set s2_attention to true.")
    if name == "prompt_attention" and config.prompt_variants == config.layer_variants:
        raise ValueError(f"prompt_attention={value!r} has no effect: attention={config.attention!r} says the same.")
    readers = [variant for variant in VARIANTS if name in fields_read(variant)]
    if readers and name not in fields_read(config.attention, config.prompt_attention):
        raise ValueError(
            f"{name}={value} has no effect with attention={config.attention!r}: also set attention to "
            f"{' or '.join(map(repr, readers))}, or to a pattern that contains it."
        )


def reject_unknown_fields(values: dict[str, Any]) -> None:
    known = [f.name for f in fields(Config)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name)[:80], known, n=3, cutoff=0.4)
            remedy = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}."
            raise ValueError(f"The config has no field {short(str(name))}: {remedy}")


def short(value: Any, most: int = 80) -> str:
    """A stranger's value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 4]} ..."


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
            raise ValueError(f"{f.name}={short(value)} does not fit: it must be of type {names}.")


def check_values(config: Config) -> None:
    """Every value is one that a model can be built from. The only place where fields are judged."""
    for name, (least, most) in RANGES.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:  # NaN fails every comparison
            raise ValueError(f"{name}={value} does not fit: it must lie between {least} and {most}.")
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"{name}={short(getattr(config, name))} does not fit: choose from {', '.join(choices)}.")
    check_heads(config)
    if config.padded_vocab_size < config.vocab_size:
        raise ValueError(
            f"padded_vocab_size={config.padded_vocab_size} is less than vocab_size={config.vocab_size}: raise it, or "
            "leave it out."
        )
    if config.rope_n_elem % 2:
        raise ValueError(
            f"rotary_percentage={config.rotary_percentage} of head_size={config.head_size} is "
            f"{config.rope_n_elem} elements: RoPE rotates pairs, so it must be an even number."
        )
    check_positions(config)
    check_block(config)
    check_experts(config)
    check_attention(config)
    check_rope_scaling(config)


def check_heads(config: Config) -> None:
    """What layers have of their own are numbers; n_head and n_query_groups are the largest, and in every layer the one
    divides the other."""
    for field, name in BY_LAYER.items():
        numbers, given = getattr(config, field), getattr(config, name)
        largest = None if numbers is None else max(number_list(field, numbers))
        if numbers is not None and field != "layer_windows" and largest != given:
            raise ValueError(f"{name}={given} is not the largest of {field}={numbers!r}: set it to {largest}.")
    for own in dict.fromkeys((c.n_head, c.n_query_groups) for c in map(config.of_layer, range(config.n_layer))):
        if own[0] % own[1]:
            raise ValueError(
                f"n_query_groups={own[1]} does not divide n_head={own[0]}: every key/value head must serve the same "
                "number of query heads."
            )


def check_positions(config: Config) -> None:
    """Every layer has RoPE, none, or RoPE at a base of its own; a temperature has its length."""
    least, most = RANGES["rope_base"]
    for name in dict.fromkeys(v.strip() for v in config.positions.split(",")):
        base = float(name) if re.fullmatch(r"[0-9]+(\.[0-9]+)?(e\+?[0-9]+)?", name) else None
        if name not in ("rope", "none") and (base is None or not least <= base <= most):
            raise ValueError(
                f"positions={short(config.positions)} does not fit: {short(name)} is neither rope nor none, nor a base "
                f"between {least:g} and {most:g}."
            )
    if (config.temperature_slope is None) != (config.temperature_length is None):
        raise ValueError("temperature_slope and temperature_length need each other: set both, or neither.")


def require_beside(name: str, field: str) -> None:
    """Raises ValueError where the file that a field needs was not copied with this one."""
    if not Path(__file__).with_name(f"{name}.py").exists():
        raise ValueError(f"{field} needs {name}.py beside config.py: copy it there, or leave the field as it was.")


def check_block(config: Config) -> None:
    """What norms and MLPs there are fits together."""
    for name in dict.fromkeys(v.strip() for v in config.mlp_class_name.split(",")):
        if name not in MLPS:
            raise ValueError(
                f"mlp_class_name={short(config.mlp_class_name)} does not fit: {short(name)} is none of "
                f"{', '.join(MLPS)}."
            )
    if config.shared_norm and not (config.parallel_residual and config.pre_norm):
        raise ValueError("shared_norm needs parallel_residual and pre_norm: set them, or shared_norm to false.")
    if config.norm_qk and config.norm_qk_type != "head":
        require_beside("head_norms", f"norm_qk_type={config.norm_qk_type!r}")
    if not config.norm_weight and config.norm_class_name == "RMSNorm":
        raise ValueError("norm_weight=False is a LayerNorm's: set norm_class_name to LayerNorm.")


def check_experts(config: Config) -> None:
    """A mixture of experts has its numbers, and nothing else has."""
    experts = config.n_expert, config.n_expert_per_token
    if ("MoE" in config.layer_mlps) != (None not in experts) or (None in experts and experts != (None, None)):
        raise ValueError(
            "Layers of MoE need n_expert and n_expert_per_token, and others have none: set both, or neither."
        )
    if config.n_expert is not None:
        require_beside("moe", "n_expert")
    if config.n_expert is not None and config.n_expert_per_token > config.n_expert:
        raise ValueError(
            f"n_expert_per_token={config.n_expert_per_token} is more than n_expert={config.n_expert}: lower it."
        )
    if config.shared_expert_gate and config.shared_expert_size is None:
        raise ValueError("shared_expert_gate needs shared_expert_size: set it.")


def check_attention(config: Config) -> None:
    """The variants exist, and have the fields that they need."""
    for field in ("attention", "prompt_attention"):
        check_variants(config, field, getattr(config, field))
    check_prompt_attention(config)
    rows = [VARIANTS[name] for name in dict.fromkeys(config.layer_variants)]
    if config.s2_attention:
        require_beside("s2", "s2_attention")
    if config.sink_logits and config.s2_attention:
        raise ValueError("s2_attention groups know no learned sink logits: set s2_attention to false.")
    if config.s2_attention and not all(row.groups for row in rows):
        raise ValueError(
            f"s2_attention groups layers that attend in full, and attention={config.attention!r}: "
            "set attention to 'full', or s2_attention to false."
        )


def check_variants(config: Config, field: str, pattern: str | None) -> None:
    for name in [] if pattern is None else dict.fromkeys(v.strip() for v in pattern.split(",")):
        if name not in VARIANTS:
            raise ValueError(f"{field}={short(pattern)} does not fit: {short(name)} is none of {', '.join(VARIANTS)}.")
    for row in [] if pattern is None else [VARIANTS[name] for name in dict.fromkeys(tiled(pattern, config.n_layer))]:
        for name in row.needs:
            if getattr(config, name) is None:
                raise ValueError(f"{field}={short(pattern)} needs {name}: set it.")
        if row.check is not None:
            row.check(config)


def check_prompt_attention(config: Config) -> None:
    """A layer reads a prompt in its own way; or, if it attends in full, under a mask over the same keys."""
    if config.prompt_attention is None:
        return
    require_beside("prompt_attention", "prompt_attention")
    for i, (own, prompt) in enumerate(zip(config.layer_variants, config.prompt_variants, strict=True)):
        row = VARIANTS[prompt]
        if prompt != own and (own != "full" or row.mixer is not None or row.key_position is not own_position):
            raise ValueError(
                f"prompt_attention={short(config.prompt_attention)} does not fit: layer {i} is {own!r} and would read "
                f"a prompt as {prompt!r}; only layers that attend in full can, and as sliding, streaming or chunked."
            )


def check_dual_chunk(config: Config) -> None:
    """Dual-chunk attention: the greatest distance lies within the trained length, and there is no window."""
    c, s, w = config.chunk_trained, config.chunk_size, config.chunk_local
    if s < 1 or s + w > c:
        raise ValueError(
            f"dual_chunk_size={s} + dual_chunk_local={w} must be at most the trained length of {c} tokens "
            "(dual_chunk_pretraining_length), since it is the greatest distance that occurs: make them smaller."
        )
    if config.sliding_window_size is not None:
        alone = "" if set(config.layer_variants) == {"dual_chunk"} else ", and attention to layers without a window"
        raise ValueError(
            f"dual_chunk attention sees every key, and sliding_window_size={config.sliding_window_size}: "
            f"set sliding_window_size to null{alone}."
        )
    if config.dual_chunk_temperature != 1.0 and config.dual_chunk_temperature_slope is not None:
        raise ValueError("dual_chunk_temperature and dual_chunk_temperature_slope are two ways to say it: set one.")


def check_linear(config: Config) -> None:
    """Linear attention: keys are rotated once, and a query sees something."""
    if config.sink_logits or config.temperature_slope is not None:
        name = "learned sink logits" if config.sink_logits else "temperature by position"
        raise ValueError(f"Linear attention has no {name}, and this model has: leave its attention as it is.")
    kind = (config.rope_scaling or {}).get("type")
    if kind in LENGTH_DEPENDENT:
        raise ValueError(
            f"rope_scaling of type {kind!r} rotates old keys anew as a text grows, and linear attention does not keep "
            "them: use the type linear, ntk, yarn or llama3."
        )
    if config.linear_off and config.linear_window + config.linear_sinks == 0:
        raise ValueError("linear_off leaves a query the window and the sinks, and there are none: set linear_window.")
    teachers = tiled(config.linear_teacher or "full", config.n_layer)
    learned = {t for v, t in zip(config.layer_variants, teachers, strict=True) if v == "linear"}
    if not learned <= {"full", "sliding"}:
        raise ValueError(
            f"linear_teacher={short(config.linear_teacher)} does not fit: linear layers learn from full ones or from "
            "sliding ones."
        )


def with_trained_length(scaling: dict | None, trained: int) -> dict | None:
    """A scaling that needs the trained length and does not say it, with it; others as they are."""
    kind = scaling.get("type") if scaling else None
    needed = ROPE_SCALING_KEYS[kind][0] if isinstance(kind, str) and kind in ROPE_SCALING_KEYS else set()
    return {**scaling, TRAINED_LENGTH: trained} if TRAINED_LENGTH in needed - set(scaling or ()) else scaling


def check_rope_scaling(config: Config) -> None:
    scaling = config.rope_scaling
    if scaling is None:
        return
    if not isinstance(scaling.get("type"), str) or scaling["type"] not in ROPE_SCALING_KEYS:
        given = f"type {short(scaling['type'])} is none of" if "type" in scaling else "needs a type, one of"
        raise ValueError(f"rope_scaling {given} {', '.join(ROPE_SCALING_KEYS)}.")
    kind, given = scaling["type"], set(scaling) - {"type"}
    needed, welcome = ROPE_SCALING_KEYS[kind]
    if needed - given:
        raise ValueError(f"rope_scaling of type {kind!r} needs {', '.join(sorted(needed - given))}: add it.")
    if given - needed - welcome:
        unknown, known = ", ".join(sorted(given - needed - welcome))[:80], ", ".join(sorted(needed | welcome))
        raise ValueError(f"rope_scaling of type {kind!r} has no {unknown}: it takes {known}.")
    for key in given - {"truncate"}:
        check_scaling_value(key, scaling[key], config)
    check_scaling_fits(kind, scaling, config)


def check_scaling_fits(kind: str, scaling: dict, config: Config) -> None:
    """The scaling's values fit each other and the other fields."""
    if kind == "llama3" and scaling["high_freq_factor"] < scaling["low_freq_factor"]:
        raise ValueError("rope_scaling high_freq_factor must not be less than low_freq_factor.")
    if kind in ("ntk", "dynamic") and config.rope_n_elem < 4:
        raise ValueError(f"rope_scaling of type {kind!r} needs 4 elements of a head that RoPE rotates: use linear.")
    if kind == "yarn" and config.rope_base <= 1 or kind == "longrope" and scaling[TRAINED_LENGTH] <= 1:
        raise ValueError(f"rope_scaling of type {kind!r} needs rope_base and the trained length to be more than 1.")
    names = {*config.layer_variants, *config.prompt_variants}
    if kind in LENGTH_DEPENDENT and not all(VARIANTS[name].own_positions for name in names if name in VARIANTS):
        raise ValueError(
            f"rope_scaling of type {kind!r} depends on the text's length and attention={config.attention!r} on "
            "positions of its own: use the type linear, ntk, yarn or llama3."
        )


def check_scaling_value(key: str, value: Any, config: Config) -> None:
    """A positive number; for the lists of LongRoPE, one for each frequency."""
    is_list = key in LONGROPE_LISTS
    if is_list and not isinstance(value, list):
        raise ValueError(f"rope_scaling {key}={short(value)} does not fit: it must be a list of numbers.")
    if any(type(v) not in (int, float) or not 0 < v < 1e9 for v in (value if is_list else [value])):
        raise ValueError(f"rope_scaling {key}={short(value)} does not fit: it must be a positive number.")
    if is_list and len(value) != config.rope_n_elem // 2:
        raise ValueError(
            f"rope_scaling {key} has {len(value)} numbers and RoPE {config.rope_n_elem // 2} frequencies: "
            "it must have one for each."
        )


# ------------------------------------------------------------------------------------------- the rows of the variants


def own_position(pos: "Tensor", config: "Config") -> "Tensor":
    return pos


class Part(NamedTuple):
    """Pairs of query and key that meet with the query rotated to one position. A pair belongs to one part at most."""

    mask: Callable[["Tensor", "Tensor", "Config"], "Tensor"]  # (q_pos, k_pos, config) -> bool; all that is needed
    position: Callable[["Tensor", "Config"], "Tensor"] = own_position  # where a query is rotated to
    reach: Callable[[int, int, "Config"], tuple[int, int]] | None = None  # of the queries a .. b - 1: they see no key
    # before the first number, and none from the second on. None: the variant's window and sinks say what can be seen.
    run: bool = False  # a query sees every key of its own reach (a, a + 1), and both ends only grow with the query


class Variant(NamedTuple):
    """A row of VARIANTS: what a variant is, and what saves work. Only the masks decide who sees whom."""

    parts: tuple[Part, ...] = ()
    needs: tuple[str, ...] = ()  # fields of Config that must be set
    fields: tuple[str, ...] = ()  # other fields that it reads
    window: Callable[["Config"], int] | None = None  # a query sees no key further back than this, itself included ...
    sinks: Callable[["Config"], int] | None = None  # ... but for so many first tokens. None: no window, no sinks
    always_rolls: bool = False  # its cache keeps the window only, whatever rolling_kv_cache says
    key_position: Callable[["Tensor", "Config"], "Tensor"] = own_position  # where a key is rotated to
    temperature: Callable[["Tensor", "Config"], Any] | None = None  # (q_pos, config): what queries are multiplied by
    edges: Callable[[int, int, "Config"], Iterable[int]] | None = None  # positions between a and b where what queries
    # see changes abruptly: a fast plan cuts there
    groups: bool = False  # S2-Attn may replace it in training
    check: Callable[["Config"], None] | None = None  # raises ValueError for fields that do not fit together
    mixer: Callable[["Config", str], "Mixer"] | None = None  # None: softmax attention under the masks

    @property
    def own_positions(self) -> bool:
        """True if queries and keys are rotated to their own positions."""
        return all(p is own_position for p in (self.key_position, *(part.position for part in self.parts)))


VARIANTS: dict[str, Variant] = {}  # name -> row; filled by model.py, where the variants are defined


def fill_variants() -> None:
    """Let model.py fill VARIANTS, where this file was imported alone: no config is built unchecked."""
    if not VARIANTS:
        module_beside("model")


def module_beside(name: str) -> Any:
    """A module of ours, if its file lies beside this one; or None."""
    if not Path(__file__).with_name(f"{name}.py").exists():
        return None
    return importlib.import_module(f"{__package__}.{name}" if __package__ else name)


def check_row(kind: str, row: Variant, config: Config, last: int) -> None:
    """Compare what a row says beside its masks with the masks, at a sample of positions 0 .. last.

    Raises ValueError for what is wrong: a row may cost time, and never change what is computed.
    """
    import torch

    window, first_keys = (row.window(config) if row.window else None), (row.sinks(config) if row.sinks else 0)
    near = {p + d for p in (0, first_keys, window or 0, last // 2, last) for d in (-1, 0, 1, 2)}
    queries = sorted(p for p in near | set(range(0, last + 1, last // 16 + 1)) if 0 <= p <= last)
    keys = torch.arange(0, last + 1, last // 4096 | 1, device="cpu")
    sample = Sample(f"The row of {kind!r} in VARIANTS", config, queries, keys)
    q = torch.tensor(queries, device="cpu")[:, None]
    taken = q < 0
    for n, part in enumerate(row.parts):
        seen = (keys <= q) & part.mask(q, keys, config)
        sample.refuse(seen & taken, "has parts that share no pair", f"part {n} sees what an earlier part sees")
        taken = taken | seen
        if window is not None:
            far = seen & (q - keys >= window) & (keys >= first_keys)
            sample.refuse(far, f"says window={window} and sinks={first_keys}", "make window or sinks larger")
        if part.reach is not None:
            check_reach(part, n, seen, q, sample)


class Sample(NamedTuple):
    """Where a row is compared with its masks."""

    what: str
    config: Config
    queries: list[int]
    keys: "Tensor"

    def refuse(self, wrong: "Tensor", says: str, remedy: str) -> None:
        """Raises ValueError if any of the pairs (queries, keys) is wrong."""
        if wrong.any():
            i, j = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{self.what} {says}, and its mask disagrees for the query at {self.queries[i]} and the key at "
                f"{int(self.keys[j])}: {remedy}."
            )


def check_reach(part: Part, n: int, seen: "Tensor", q: "Tensor", sample: Sample) -> None:
    """The reach of part n holds all that a query sees, and with run=True nothing else; of several, that of each."""
    last, keys = sample.queries[-1], sample.keys
    ends = [part.reach(p, p + 1, sample.config) for p in sample.queries]
    lo, hi = (seen.new_tensor(end, dtype=q.dtype)[:, None] for end in zip(*ends, strict=True))
    within = (keys >= lo) & (keys < hi) & (keys <= q)
    sample.refuse(seen & ~within, f"says how far part {n} reaches", "make reach wider, or leave it out")
    if part.run:
        sample.refuse(within & ~seen, f"says run=True of part {n}", "a query does not see all of its reach")
    for i, p in enumerate(sample.queries):
        a, b = part.reach(p, last + 1, sample.config)
        if any(x < y and (x < a or y > b) for x, y in ends[i:]):
            sample.refuse(q == p, f"says how far the queries from {p} on reach in part {n}", "make reach(a, b) wider")


# ------------------------------------------------------------------------------------------------- what is asked of GPT


def check_call(model: "GPT", idx: Sequence[int], pos: Sequence[int], span: "Span", cached: bool) -> None:
    """Refuse what would go wrong without a word. idx, pos: shapes. A compiled step knows no positions to check."""
    (B, T), limit = idx, model.max_seq_length if cached else model.config.block_size
    if cached and not model.cache_batch_size:
        raise ValueError("input_pos needs a cache: call model.set_kv_cache(batch_size, max_seq_length) first.")
    if cached and pos not in ((T,), (B, T)):
        raise ValueError(f"input_pos has the shape {tuple(pos)}: give ({T},) or ({B}, {T}), one position a token.")
    if T == 0:
        raise ValueError("There are no tokens: give at least one.")
    if cached and model.cache_batch_size != B:
        raise ValueError(
            f"The cache was set up for {model.cache_batch_size} rows and idx has {B}: "
            f"call set_kv_cache(batch_size={B})."
        )
    if span.first is not None and span.first < 0:
        raise ValueError(
            f"Position {span.first} is negative, which marks padding: give input_pos as ({B}, {T}), row by row."
        )
    if span.last is not None and span.last >= limit and not model.unbounded(cached):
        remedy = "set_kv_cache with a larger max_seq_length" if cached else "a larger block_size"
        raise ValueError(
            f"Position {span.last} lies outside the context of {limit} tokens: use {remedy}, or a sliding window."
        )


def check_no_prompt(config: Config) -> None:
    """Texts that are scored, or trained on, have no prompt."""
    if config.prompt_attention is not None:
        raise ValueError(
            f"prompt_attention={config.prompt_attention!r} says how a prompt is read before a text is written, and "
            "here none is: leave it out, or set attention."
        )


def check_documents(lengths: list[int], T: int, cached: bool) -> None:
    """The lengths of texts in a sequence make up its T tokens, and no cache is used."""
    if cached or sum(lengths) != T or min(lengths, default=0) < 1:
        raise ValueError(
            f"documents={lengths[:8]} do not fit {T} tokens{' in a cache' * cached}: give the length of each text of "
            "the row, and no input_pos."
        )


def check_cache(model: "GPT", batch_size: int, max_seq_length: int, lookahead: int) -> None:
    """The arguments of set_kv_cache are ones that a cache can be made for."""
    given = {"batch_size": (batch_size, 1), "max_seq_length": (max_seq_length, 1), "lookahead": (lookahead, 0)}
    for name, (value, least) in given.items():
        if value < least:
            raise ValueError(f"{name}={value} does not fit: it must be at least {least}.")
    if max_seq_length > model.config.block_size and not model.unbounded(cached=False):
        raise ValueError(
            f"max_seq_length={max_seq_length} is more than the context of {model.config.block_size} tokens "
            "(block_size): shorten it, set block_size, or give every layer a sliding window."
        )


def check_kept(model: "GPT", pos: "Tensor", span: "Span") -> None:
    """Refuse a call at pos (1 or B, T) whose first tokens need a key that a later one replaced in a rolling cache."""
    if not span.looked:
        return
    caches = [cache for cache in model.caches if hasattr(cache, "slots") and cache.slots.copies == 2]
    rolling = {id(cache.slots): cache.slots for cache in caches}  # one for each kind
    first = pos.where(pos >= 0, 2**40).amin(dim=1, keepdim=True)
    for slots in rolling.values():
        held, first = slots.pos[:, slots.sinks : slots.sinks + slots.n_slots], first.to(slots.pos.device)
        held = held.where(held >= -1, -2 - held)  # what was forgotten had replaced an older key too
        before = held - slots.n_slots * ((held - first) // slots.n_slots + 1)  # the newest before the call in that slot
        replaced = (held >= first) & (before >= (first - slots.window + 1).clamp(min=slots.sinks))
        if replaced.any():
            raise ValueError(
                f"Position {int(first.min())} comes after later ones, and the keys that it needs are gone: a rolling "
                f"cache takes back {slots.lookahead} tokens, more with set_kv_cache(lookahead=...). Another text "
                "begins at 0, or after reset_kv_cache()."
            )


def check_take_back(model: "GPT", n: int) -> None:
    """Every cache can forget its newest n tokens."""
    if not model.can_take_back(n):
        raise ValueError(
            f"The caches cannot take back {n} tokens: a rolling cache takes back {model.lookahead}, more with "
            "set_kv_cache(lookahead=...)."
        )
