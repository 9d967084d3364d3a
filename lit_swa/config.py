"""What shapes a model: the fields of Config, and every check of them. It imports the standard library only.

Behaviour follows from the fields alone; `name` is for people. The attention variants are rows of VARIANTS, which
model.py fills: a row says which fields it reads and needs, and the checks here go by what it says.
"""

import difflib
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import Variant

VARIANTS: dict[str, "Variant"] = {}  # name -> row; filled by model.py, where the variants are defined

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


@dataclass
class Config:
    """The fields that shape a model. ValueError for a value, or a combination, that no model can be built from."""

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
    rotary_percentage: float = 1.0  # the share of each head that RoPE rotates
    rope_scaling: dict | None = None  # {"type": "linear", "factor": 4.0}; see rope.py. Not for rope_local_base_freq
    # attention
    attention: str = "full"  # a variant, or a comma list that tiles over the layers: "sliding,full"
    sliding_window_size: int | None = None  # S: a query at p sees the S keys p - S + 1 .. p
    rolling_kv_cache: bool = False  # layers with a window keep 2S slots instead of one for every position
    n_sink_tokens: int = 4  # streaming: the first tokens, which every query sees beside its window S
    dual_chunk_pretraining_length: int | None = None  # c, the trained length; None: block_size
    dual_chunk_size: int | None = None  # s, the tokens of a chunk; None: 5/8 of c
    dual_chunk_local: int | None = None  # w, the nearest tokens, always at their true distance; None: 1/8 of c
    dual_chunk_temperature: float = 1.0  # multiplies the scores; or, by the query's position p (counted from 1),
    dual_chunk_temperature_slope: float | None = None  # ... by max(1, slope * ln(p / c) + 1)
    s2_attention: bool = False  # in training mode, attend within groups; half of the heads shift theirs by half a group
    s2_group_ratio: float = 0.25  # the group's share of the text
    s2_group_size: int | None = None  # ... or its tokens
    s2_shift: bool = True  # False: no head shifts its groups, LongLoRA's "short attention", to compare with
    attention_scores_scalar: int | None = None  # scores are divided by its square root; None: head_size
    attention_logit_softcapping: float | None = None  # c: scores become c * tanh(scores / c)
    attention_backend: str = "auto"  # sdpa: the plain steps of model.py; flex, flash: see fast_attention.py

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


WINDOW_FIELDS = ("rolling_kv_cache", "rope_local_base_freq")  # every variant with a window reads them
S2_FIELDS = ("s2_group_ratio", "s2_group_size", "s2_shift")


def fields_read(attention: str) -> set[str]:
    """The fields that say something to a variant of the pattern and nothing to the others."""
    rows = [VARIANTS[v.strip()] for v in attention.split(",") if v.strip() in VARIANTS]
    windows = WINDOW_FIELDS if any(row.window is not None for row in rows) else ()
    return {name for row in rows for name in (*row.needs, *row.fields)} | set(windows)


def check_effect(name: str, value: Any, config: Config) -> None:
    """Refuse a value that was asked for and would do nothing."""
    if name in S2_FIELDS and not config.s2_attention:
        raise ValueError(f"{name}={value} has no effect without s2_attention: also set s2_attention to true.")
    readers = [variant for variant in VARIANTS if name in fields_read(variant)]
    if readers and name not in fields_read(config.attention):
        raise ValueError(
            f"{name}={value} has no effect with attention={config.attention!r}: also set attention to "
            f"{' or '.join(map(repr, readers))}, or to a pattern that contains it."
        )


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
            f"{config.rope_n_elem} elements: RoPE rotates pairs, so it must be an even number."
        )
    check_attention(config)
    check_rope_scaling(config)


def check_attention(config: Config) -> None:
    """The variants exist, and have the fields that they need. Where model.py was not imported, GPT checks it."""
    if not VARIANTS:
        return
    for variant in (v.strip() for v in config.attention.split(",")):
        if variant not in VARIANTS:
            raise ValueError(
                f"attention={config.attention!r} does not fit: {variant!r} is none of {', '.join(VARIANTS)}."
            )
    rows = [VARIANTS[name] for name in dict.fromkeys(config.layer_variants)]
    for row in rows:
        for name in row.needs:
            if getattr(config, name) is None:
                raise ValueError(f"attention={config.attention!r} needs {name}: set it.")
        if row.check is not None:
            row.check(config)
    if config.s2_attention and not all(row.groups for row in rows):
        raise ValueError(
            f"s2_attention groups layers that attend in full, and attention={config.attention!r}: "
            "set attention to 'full', or s2_attention to false."
        )


def check_dual_chunk(config: Config) -> None:
    """Dual-chunk attention: the greatest distance lies within the trained length, and there is no window."""
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


def with_trained_length(scaling: dict | None, trained: int) -> dict | None:
    """A scaling that needs the trained length and does not say it, with it; others as they are."""
    needed = ROPE_SCALING_KEYS.get(scaling.get("type") if scaling else None, (set(), set()))[0]
    return {**scaling, TRAINED_LENGTH: trained} if TRAINED_LENGTH in needed - set(scaling or ()) else scaling


def check_rope_scaling(config: Config) -> None:
    scaling = config.rope_scaling
    if scaling is None:
        return
    if scaling.get("type") not in ROPE_SCALING_KEYS:
        given = f"type {scaling['type']!r} is none of" if "type" in scaling else "needs a type, one of"
        raise ValueError(f"rope_scaling {given} {', '.join(ROPE_SCALING_KEYS)}.")
    kind, given = scaling["type"], set(scaling) - {"type"}
    needed, welcome = ROPE_SCALING_KEYS[kind]
    if needed - given:
        raise ValueError(f"rope_scaling of type {kind!r} needs {', '.join(sorted(needed - given))}.")
    if given - needed - welcome:
        unknown, known = ", ".join(sorted(given - needed - welcome)), ", ".join(sorted(needed | welcome))
        raise ValueError(f"rope_scaling of type {kind!r} has no {unknown}: it takes {known}.")
    for key in given - {"truncate"}:
        check_scaling_value(key, scaling[key], config)
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ValueError("rope_scaling high_freq_factor must be greater than low_freq_factor.")
    if kind in ("ntk", "dynamic") and config.rope_n_elem < 4:
        raise ValueError(f"rope_scaling of type {kind!r} needs at least 4 elements of a head that RoPE rotates.")
    if kind == "yarn" and config.rope_base <= 1 or kind == "longrope" and scaling[TRAINED_LENGTH] <= 1:
        raise ValueError(f"rope_scaling of type {kind!r} needs rope_base and the trained length to be more than 1.")
    rows = [VARIANTS[name] for name in config.layer_variants if name in VARIANTS]
    if kind in LENGTH_DEPENDENT and not all(row.own_positions for row in rows):
        raise ValueError(
            f"rope_scaling of type {kind!r} depends on the text's length and attention={config.attention!r} on "
            "positions of its own: use the type linear, ntk, yarn or llama3."
        )


def check_scaling_value(key: str, value: Any, config: Config) -> None:
    """A positive number; for the lists of LongRoPE, one for each frequency."""
    is_list = key in LONGROPE_LISTS
    if is_list and not isinstance(value, list):
        raise ValueError(f"rope_scaling {key}={value!r} does not fit: it must be a list of numbers.")
    if any(type(v) not in (int, float) or not 0 < v < 1e9 for v in (value if is_list else [value])):
        raise ValueError(f"rope_scaling {key}={value!r} does not fit: it must be a positive number.")
    if is_list and len(value) != config.rope_n_elem // 2:
        raise ValueError(
            f"rope_scaling {key} has {len(value)} numbers and RoPE {config.rope_n_elem // 2} frequencies: "
            "it must have one for each."
        )
