"""What GGUF files call a model's weights and fields, in and out: a row of MODELS for each `general.architecture`.

    fields_of(file)              # fields of Config, from a file's metadata and the names of its tensors
    metadata_of(config, "llama") # the same back; find_architecture(config) names the row that holds all of a Config

The rows follow llama.cpp: its loader (src/models) says what an architecture computes, its conversion scripts how the
weights of a Hugging Face checkpoint are laid out. RoPE's scalings are in gguf_rope.py.
"""

import difflib
import functools
import math
import re
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from lit_swa.config import Config, join_pattern
from lit_swa.formats.gguf import GGUFFile
from lit_swa.formats.gguf_rope import canonical_scaling, read_scaling, refuse_scaling, scaling_keys, scaling_tensors
from lit_swa.formats.hf_export import NOT_EXPORTED, canonical, require_softmax
from lit_swa.formats.hf_names import LIT, Names, Table, by_layer, layer

# ------------------------------------------------------------------------------------------------------------ the names

block = functools.partial(layer, "blk.{i}.")
TABLE: Table = {
    "transformer.wte": ("token_embd",), "transformer.ln_f": ("output_norm",), "lm_head": ("output",),
    LIT + "attn.qkv": ("blk.{i}.attn_q", "blk.{i}.attn_k", "blk.{i}.attn_v"),
    LIT + "attn.mixer.sink_logits": ("blk.{i}.attn_sinks.weight",),
} | block(
    norm_1="attn_norm", norm_2="ffn_norm", post_attention_norm="post_attention_norm", post_mlp_norm="post_ffw_norm",
    attn__proj="attn_output", attn__norm_q="attn_q_norm", attn__norm_k="attn_k_norm", attn__gate="attn_gate",
    mlp__fc="ffn_up", mlp__fc_1="ffn_gate", mlp__fc_2="ffn_up", mlp__proj="ffn_down",
)  # fmt: skip
EXPERTS = block(
    mlp__router="ffn_gate_inp", mlp__fc_1="ffn_gate_exps", mlp__fc_2="ffn_up_exps", mlp__proj="ffn_down_exps",
    mlp__choice="exp_probs_b.bias", mlp__shared__fc_1="ffn_gate_shexp", mlp__shared__fc_2="ffn_up_shexp",
    mlp__shared__proj="ffn_down_shexp", mlp__shared_gate="ffn_gate_inp_shexp",
)  # fmt: skip
ONE_BY_ONE = block(mlp__fc_1="ffn_gate.{e}", mlp__fc_2="ffn_up.{e}", mlp__proj="ffn_down.{e}")  # until early 2024
ONE_EXPERT = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")
FUSED_QKV = {"attn_qkv": ("attn_q", "attn_k", "attn_v")}
FUSED_MLP = {"ffn_up": ("ffn_gate", "ffn_up")}
NO_SINK = -1e30
NOT_WEIGHTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def names_of(architecture: str, config: Config, tensors: Collection[str] = ()) -> Names:
    """What a file of this architecture calls the weights. tensors: the names in a file that is read, where queries,
    keys and values may always be joined, and experts be a tensor each."""
    row = MODELS[architecture]
    experts = EXPERTS | (ONE_BY_ONE if any(map(ONE_EXPERT.fullmatch, tensors)) else {})
    table = TABLE | by_layer(config, experts) | row.table(config)
    return Names(table, neighbours=row.neighbours, fused=row.fused | (FUSED_QKV if tensors else {}))


def is_weight(name: str, config: Config) -> bool:
    """Whether a tensor is a weight of the model, and not a part of its config."""
    return name not in NOT_WEIGHTS and (config.sink_logits or ".attn_sinks." not in name)


def two_norms(config: Config) -> Table:
    """Falcon 40B: the first norm is the MLP's."""
    parallel = config.parallel_residual and not config.shared_norm
    return block(norm_1="attn_norm_2", norm_2="attn_norm") if parallel else {}


# ------------------------------------------------------------------------------------------------------------- the keys


class Key(NamedTuple):
    """A key of the metadata, without the architecture in front, and the field of Config that it holds."""

    key: str
    field: str
    kind: type = int
    default: Any = None  # where the file lacks it; ...: it must not
    out: Callable[[Any], Any] = lambda value: value  # the file's value for Config's, and back
    back: Callable[[Any], Any] = lambda value: value


COMMON = (
    Key("block_count", "n_layer", default=...),
    Key("context_length", "block_size", default=...),
    Key("embedding_length", "n_embd", default=...),
)
EPS = {"RMSNorm": "attention.layer_norm_rms_epsilon", "LayerNorm": "attention.layer_norm_epsilon"}
MOE = tuple(
    Key(key, field, back=lambda n: n or None)
    for key, field in (("expert_count", "n_expert"), ("expert_used_count", "n_expert_per_token"))
)
EXPERT_SIZE = Key("expert_feed_forward_length", "expert_size", default=...)
CAPS = (
    Key("attn_logit_softcapping", "attention_logit_softcapping", float, 50.0, back=lambda x: x or None),
    Key("final_logit_softcapping", "final_logit_softcapping", float, 30.0, back=lambda x: x or None),
)
LOGITS = Key("logit_scale", "logit_multiplier", float, 1.0)
CLIP = Key("attention.clamp_kqv", "clip_qkv", float, back=lambda x: x or None)
PARALLEL = Key("use_parallel_residual", "parallel_residual", bool, True)
GRANITE = (
    Key("logit_scale", "logit_multiplier", float, 1.0, lambda x: 1 / x, lambda x: 1 / x if x else 1.0),
    Key("embedding_scale", "embedding_multiplier", float, 1.0, back=lambda x: x or 1.0),
    Key("residual_scale", "residual_multiplier", float, 1.0, back=lambda x: x or 1.0),
    Key("attention.scale", "attention_scores_scalar", float, 0.0, lambda x: x**-0.5, lambda x: x**-2 if x else None),
)


class Model(NamedTuple):
    """What is so in all files of an architecture, and what llama.cpp makes of them."""

    fixed: dict[str, Any] = {}  # fields of Config
    found: str = "tie_embeddings"  # fields that follow from which tensors there are: see FOUND_BY
    keys: tuple[Key, ...] = ()  # beside COMMON
    table: Callable[[Config], Table] = lambda config: {}  # names beside TABLE
    neighbours: bool = False  # RoPE turns the elements 2j and 2j + 1
    fused: dict[str, tuple[str, ...]] = {}  # how weights are joined in writing
    square: bool = False  # n_head * head_size is n_embd
    partial: bool = False  # llama.cpp computes a RoPE of a part of each head
    scalings: str = "linear yarn"  # of RoPE, that llama.cpp computes
    period: int | None = None  # every so many-th layer has no window, unless a pattern says otherwise; None: no windows
    always: bool = False  # some layer must have one
    local_base: bool = False  # llama.cpp lets layers with a window have a base of their own
    unscaled: bool = False  # ... and RoPE's scaling is for the others
    more: Callable[[GGUFFile, dict[str, Any]], dict[str, Any]] = lambda file, fields: {}
    more_keys: Callable[[Config], dict[str, Any]] = lambda config: {}  # the inverse of more
    refuse: Callable[[Config], str | None] = lambda config: None  # what llama.cpp would compute otherwise
    warn: Callable[[Config], str | None] = lambda config: None


FOUND_BY = {
    "attn_bias": ("blk.0.attn_q.bias", "blk.0.attn_qkv.bias"), "attn_proj_bias": ("blk.0.attn_output.bias",),
    "mlp_bias": ("blk.0.ffn_up.bias",), "norm_qk": ("blk.0.attn_q_norm.weight",),
}  # fmt: skip
BIASES = "tie_embeddings attn_bias attn_proj_bias mlp_bias"
ALL_BIASES = {"attn_bias": True, "attn_proj_bias": True, "mlp_bias": True}
LAYER_NORM = {"norm_class_name": "LayerNorm"}
PLAIN = LAYER_NORM | {"mlp_class_name": "PlainMLP"}
BEHIND = {"pre_norm": False, "post_attention_norm": True, "post_mlp_norm": True, "norm_qk": True}
GEMMA = {
    "norm_unit_offset": True, "scale_embeddings": True, "activation": "gelu_tanh", "tie_embeddings": True,
}  # fmt: skip
GEMMA2 = GEMMA | {"post_attention_norm": True, "post_mlp_norm": True}
COMMAND_R = LAYER_NORM | {
    "norm_bias": False, "parallel_residual": True, "shared_norm": True, "tie_embeddings": True,
}  # fmt: skip

# --------------------------------------------------------------------- fields that take more than one key, in and out


def every_fourth_without(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    """Layers 4, 8 and so on have no RoPE."""
    return {"positions": "rope,rope,rope,none"}


def rope_with_a_window(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    """Layers that attend in full have no RoPE, if any layer has a window."""
    if fields["sliding_window_size"] is None:
        return {}
    windows = fields["attention"].split(",")
    return {"positions": ",".join("rope" if variant == "sliding" else "none" for variant in windows)}


def gemma_scores(depth: int, file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp knows the two 27B models by their depth: their scores are divided by sqrt(n_embd / n_head)."""
    largest = fields["n_layer"] == depth
    return {"attention_scores_scalar": fields["n_embd"] // fields["n_head"] if largest else fields["head_size"]}


def stablelm(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    parallel = "blk.0.ffn_norm.weight" not in file.tensors
    file.get("stablelm.use_parallel_residual", bool)  # says the same
    return {"parallel_residual": parallel, "shared_norm": parallel}


def llama(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    return moe_everywhere(fields) | {"expert_size": fields["intermediate_size"]} if fields["n_expert"] else {}


def moe_everywhere(fields: dict[str, Any]) -> dict[str, Any]:
    return {"mlp_class_name": "MoE", "expert_weights": "chosen"}


def qwen2moe(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    return {"mlp_class_name": "MoE", "expert_weights": "all", "shared_expert_gate": True}


def afmoe(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    n, size = fields["n_layer"], fields["expert_size"]
    dense = file.get("afmoe.leading_dense_block_count", int, 0)
    shared = file.get("afmoe.expert_shared_count", int, 0)
    if file.get("afmoe.expert_gating_func", int, 2) != 2 or not file.get("afmoe.expert_weights_norm", bool, False):
        raise ValueError(f"{file.path} weights its experts in a way that is not read: convert the original checkpoint.")
    mlps = join_pattern(["GatedMLP" if i < dense else "MoE" for i in range(n)])
    return every_fourth_without(file, fields) | {
        "mlp_class_name": mlps, "expert_weights": "biased", "shared_expert_size": shared * size or None,
    }  # fmt: skip


def afmoe_keys(config: Config) -> dict[str, Any]:
    mlps = config.layer_mlps
    dense = mlps.index("MoE") if "MoE" in mlps else config.n_layer
    shared = (config.shared_expert_size or 0) // (config.expert_size or 1)
    return {
        "leading_dense_block_count": dense, "expert_shared_count": shared, "expert_weights_norm": True,
        "expert_gating_func": 2,
    }  # fmt: skip


def llama4(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    """The windows are chunks of 8192 tokens, and the temperature is that of the release."""
    n, step = fields["n_layer"], file.get("llama4.interleave_moe_layer_step", int, 1)
    if file.get("llama4.attention.sliding_window", int, 8192) != 8192:
        raise ValueError(f"{file.path} attends in other chunks than 8192 tokens: convert the original checkpoint.")
    moe = ["MoE" if step > 0 and (i + 1) % step == 0 else "GatedMLP" for i in range(n)]
    normed = {"norm_qk": True, "norm_qk_type": "plain"} if fields["n_expert"] != 128 else {}
    return every_fourth_without(file, fields) | normed | {
        "mlp_class_name": join_pattern(moe), "expert_weights": "sigmoid",
        "shared_expert_size": fields["expert_size"],
        "attention": fields.get("attention", "full").replace("sliding", "chunked"), "sliding_window_size": None,
        "attention_chunk_size": 8192, "temperature_slope": 0.1, "temperature_length": 8192, "temperature_offset": 1,
        "temperature_layers": "none",
    }  # fmt: skip


def llama4_keys(config: Config) -> dict[str, Any]:
    mlps = config.layer_mlps
    return {"interleave_moe_layer_step": mlps.index("MoE") + 1 if "MoE" in mlps else 0}


def mistral3(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    """Scores grow by steps of the trained length."""
    slope = file.get("mistral3.attention.temperature_scale", float, 0.0)
    trained = file.get("mistral3.rope.scaling.original_context_length", int, fields["block_size"])
    tempered = {"temperature_slope": slope, "temperature_length": trained} if slope else {}
    return llama(file, fields) | tempered


def mistral3_keys(config: Config) -> dict[str, Any]:
    if config.temperature_slope is None:
        return {}
    return {
        "attention.temperature_scale": config.temperature_slope,
        "rope.scaling.original_context_length": config.temperature_length,
    }


def granite(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    """A key that says something else elsewhere switches RoPE off."""
    return {} if file.get("granite.rope.scaling.finetuned", bool, True) else {"positions": "none"}


def granite_swa(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    """The only architecture with windows in a model like Llama. It asks for sink logits: NO_SINK stands for none."""
    rotated = file.get("granite_swa.attention.rope_pattern", list) or [True]
    positions = ",".join("rope" if rotates else "none" for rotates in rotated[: fields["n_layer"]])
    return {"positions": positions, "sink_logits": not is_without_sinks(file)}


def is_without_sinks(file: GGUFFile) -> bool:
    return max(file.numbers("blk.0.attn_sinks.weight"), default=NO_SINK) <= NO_SINK


def sinks_for_none(config: Config, architecture: str) -> dict[str, list[float]]:
    """Sink logits that take no part, for a model that has none in an architecture that asks for them."""
    if architecture != "granite_swa" or config.sink_logits:
        return {}
    return {f"blk.{i}.attn_sinks.weight": [NO_SINK] * config.n_head for i in range(config.n_layer)}


def newer(config: Config) -> str | None:
    return "the file is of the architecture granite_swa, for its windows, which older builds of llama.cpp do not know."


def windows_at_depth_64(config: Config) -> str | None:
    has, computed = "sliding" in config.layer_variants, config.n_layer == 64
    return "windows, which llama.cpp gives to a model of 64 layers only" if has and not computed else None


def norms_at_depth_64(config: Config) -> str | None:
    if config.norm_qk == (config.n_layer >= 64):
        return None
    return "norms of queries and keys, which llama.cpp takes to be there from 64 layers on and only there"


def no_windows(config: Config) -> str | None:
    return "windows, which llama.cpp does not compute there" if "sliding" in config.layer_variants else None


def rope_nowhere(config: Config) -> str | None:
    return "no layer with RoPE" if set(config.layer_positions) == {"none"} else None


def rope_everywhere(config: Config) -> str | None:
    return None if "none" in config.layer_positions else "no layer without RoPE"


def rounded_yarn(config: Config) -> str | None:
    if (config.rope_scaling or {}).get("truncate", True):
        return None
    return "llama.cpp rounds where YaRN's scaling begins and ends, and this model does not: its logits differ a little."


LLAMA = Model(
    found=BIASES, keys=MOE, neighbours=True, scalings="linear yarn llama3 longrope", more=llama, period=0,
    refuse=no_windows,
)  # fmt: skip
MODELS: dict[str, Model] = {  # an export takes the first that holds all of its config
    "qwen2": Model({"attn_bias": True}, square=True),
    "llama": LLAMA,
    "mistral3": LLAMA._replace(more=mistral3, more_keys=mistral3_keys, scalings="betas " + LLAMA.scalings),
    "smollm3": Model(neighbours=True, more=every_fourth_without),
    "qwen3": Model({"norm_qk": True}),
    "qwen2moe": Model(
        {"attn_bias": True}, found="", square=True, more=qwen2moe,
        keys=(*MOE, EXPERT_SIZE, Key("expert_shared_feed_forward_length", "shared_expert_size", default=...)),
    ),
    "qwen3moe": Model(
        {"norm_qk": True}, keys=(*MOE, EXPERT_SIZE), more=lambda file, fields: moe_everywhere(fields)
    ),
    "gemma": Model(GEMMA, found="", partial=True),
    "gemma2": Model(
        GEMMA2, found="", keys=CAPS, period=2, always=True, local_base=True, partial=True,
        more=functools.partial(gemma_scores, 46),
    ),
    "gemma3": Model(
        GEMMA2 | {"norm_qk": True}, found="", keys=(CAPS[1]._replace(default=None),), period=6, local_base=True,
        unscaled=True, partial=True, more=functools.partial(gemma_scores, 62),
    ),
    "gptneox": Model(PLAIN | ALL_BIASES | {"activation": "gelu"}, found="", keys=(PARALLEL,), fused=FUSED_QKV,
                     square=True, partial=True),
    "phi2": Model(PLAIN | ALL_BIASES | {"activation": "gelu_tanh", "parallel_residual": True, "shared_norm": True,
                  "lm_head_bias": True}, found="", square=True, partial=True),
    "phi3": Model(fused=FUSED_QKV | FUSED_MLP, square=True, scalings="linear yarn longrope", period=0,
                  partial=True, refuse=no_windows),
    "stablelm": Model(
        LAYER_NORM | {"norm_qk_type": "each"}, found="attn_bias norm_qk", square=True, partial=True, more=stablelm,
        more_keys=lambda c: {"use_parallel_residual": c.parallel_residual},
    ),
    "falcon": Model(
        PLAIN | {"activation": "gelu", "parallel_residual": True}, fused=FUSED_QKV, square=True, table=two_norms,
        more=lambda file, fields: {"shared_norm": "blk.0.attn_norm_2.weight" not in file.tensors},
    ),
    "command-r": Model(COMMAND_R | {"norm_qk_type": "each"}, found="norm_qk", keys=(LOGITS,), neighbours=True,
                       square=True, refuse=norms_at_depth_64),
    "cohere2": Model(COMMAND_R, found="", keys=(LOGITS,), neighbours=True, square=True, period=4, always=True,
                     more=rope_with_a_window),
    "olmo": Model(
        LAYER_NORM | {"norm_weight": False, "norm_bias": False}, keys=(CLIP,),
        neighbours=True, square=True,
    ),
    "olmo2": Model(BEHIND | {"norm_qk_type": "whole"}, found="", square=True, period=4, unscaled=True),
    "exaone4": Model(BEHIND, square=True, scalings="linear yarn llama3", period=4, more=rope_with_a_window,
                     refuse=windows_at_depth_64),
    "granite": Model(
        found=BIASES, keys=GRANITE, neighbours=True, scalings=LLAMA.scalings, more=granite,
        more_keys=lambda c: {"rope.scaling.finetuned": False} if set(c.layer_positions) == {"none"} else {},
    ),
    "granite_swa": Model(
        found=BIASES, keys=GRANITE, neighbours=True, scalings=LLAMA.scalings, period=4, always=True,
        more=granite_swa, warn=newer, refuse=rope_nowhere,
        more_keys=lambda c: {"attention.rope_pattern": [where == "rope" for where in c.layer_positions]},
    ),
    "gpt-oss": Model(
        ALL_BIASES | {"sink_logits": True, "mlp_class_name": "MoE", "expert_weights": "chosen", "expert_limit": 7.0,
                      "expert_slope": 1.702},
        found="", keys=(*MOE, EXPERT_SIZE), table=lambda c: block(norm_2="post_attention_norm"), period=2, always=True,
        scalings="truncate linear yarn", warn=rounded_yarn, local_base=True,
    ),
    "afmoe": Model(
        GEMMA2 | {"norm_unit_offset": False, "activation": "silu", "tie_embeddings": False, "norm_qk": True,
                  "attention_gate": True},
        keys=(*MOE, EXPERT_SIZE, Key("expert_weights_scale", "expert_scale", float, 1.0)), period=4, local_base=True,
        more=afmoe, more_keys=afmoe_keys,
    ),
    "llama4": Model(keys=(*MOE, EXPERT_SIZE), neighbours=True, scalings="linear llama3", period=4, more=llama4,
                    more_keys=llama4_keys, refuse=rope_everywhere),
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------- in

OTHER_KEYS = (
    "rope.", "attention.", "expert", "leading_dense", "interleave", "nextn", "deepstack", "logit_scale",
    "embedding_scale", "residual_scale", "attn_logit_softcapping", "final_logit_softcapping", "use_parallel_residual",
)  # fmt: skip
WITHOUT_EFFECT = {  # values of keys that are not read; any other value is refused. (0,) for keys that are not here
    "attention.causal": (True,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.finetuned": (True, False),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_gating_func": (0, 1),  # softmax
    "logit_scale": (0, 1.0),
    "embedding_scale": (0, 1.0),
    "residual_scale": (0, 1.0),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0, 1.0),
}


def model_of(file: GGUFFile) -> Model:
    if file.architecture not in MODELS:
        near = difflib.get_close_matches(file.architecture[:80], MODELS, n=1, cutoff=0.0)
        raise ValueError(
            f"{file.path} holds a model of architecture {file.architecture[:80]!r}, which is not supported: the "
            f"nearest that is here is {near[0]}, and there are {', '.join(sorted(MODELS.keys() - set(near)))}."
        )
    return MODELS[file.architecture]


def fields_of(file: GGUFFile) -> dict[str, Any]:
    """The fields of Config for a file's model. Raises ValueError for what is wrong, or would be computed otherwise."""
    row, arch = model_of(file), file.architecture
    if "token_embd.weight" not in file.tensors or len(file.tensors["token_embd.weight"].shape) != 2:
        raise ValueError(f"{file.path} lacks the embedding, token_embd.weight: download the file again.")
    fields: dict[str, Any] = {"vocab_size": file.tensors["token_embd.weight"].shape[0], **row.fixed}
    for key in (*COMMON, *row.keys):
        fields[key.field] = read_key(file, key)
    if not 0 < fields["n_layer"] <= len(file.tensors):  # before any list of that length is made
        raise ValueError(
            f"{file.path} holds {len(file.tensors)} tensors and says that it has {fields['n_layer']} layers: download "
            "it again."
        )
    fields |= _heads_and_norms(file, fields)
    fields |= {name: _is_found(file, name) for name in row.found.split()}
    fields |= _windows(file, row, fields)
    fields |= read_scaling(file, fields)
    fields |= row.more(file, fields)
    if row.unscaled is False and fields.get("rope_local_base_freq") and fields["rope_scaling"]:
        raise ValueError(
            f"{file.path} scales RoPE at a second base, {arch}.rope.freq_base_swa, which is not computed: choose "
            "another model."
        )
    _refuse_unread_keys(file)
    return {name: value for name, value in fields.items() if value is not None}


def read_key(file: GGUFFile, key: Key) -> Any:
    name = f"{file.architecture}.{key.key}"
    value = file.require(name, key.kind) if key.default is ... else file.get(name, key.kind, key.default)
    try:
        return value if value is None else key.back(value)
    except (ZeroDivisionError, OverflowError):
        raise ValueError(f"{file.path} gives {name} as {value}, which no model has: download it again.") from None


def _heads_and_norms(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    arch, row = file.architecture, MODELS[file.architecture]
    file.read |= {f"{arch}.{key}" for key in EPS.values()}  # some converters write both
    heads = _same_for_all(file, "attention.head_count", None)
    default = fields["n_embd"] // heads
    size = file.get(f"{arch}.attention.key_length", int, default)
    values = file.get(f"{arch}.attention.value_length", int, default)
    rotated = file.get(f"{arch}.rope.dimension_count", int, size)
    if size != values or not 0 <= rotated <= size or size < 1 or row.neighbours and rotated != size:
        raise ValueError(
            f"{file.path} has heads of {size} for keys, {values} for values and {rotated} for RoPE: such a model is "
            "not supported."
        )
    return {
        "n_head": heads,
        "n_query_groups": _same_for_all(file, "attention.head_count_kv", heads),
        "head_size": size,
        "rotary_percentage": _share(rotated, size),
        "intermediate_size": _same_for_all(file, "feed_forward_length", fields.get("expert_size")),
        "norm_eps": file.require(f"{arch}.{EPS[row.fixed.get('norm_class_name', 'RMSNorm')]}", float),
        "rope_base": file.get(f"{arch}.rope.freq_base", float, 10000.0),
    }


def _share(rotated: int, size: int) -> float:
    """rotary_percentage, of which int(share * size) gives the number back."""
    share = rotated / size
    return share if int(share * size) == rotated else math.nextafter(share, 2.0)


def _same_for_all(file: GGUFFile, key: str, default: int | None) -> int:
    """A number, or one number per layer, which must then be the same."""
    name = f"{file.architecture}.{key}"
    file.read.add(name)
    value = file.metadata.get(name, default)
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1 or type(next(iter(values))) is not int or min(values) < 1:
        raise ValueError(f"{file.path} gives {name} as {str(value)[:80]}: one number above 0 for all layers is needed.")
    return values.pop()


def _is_found(file: GGUFFile, name: str) -> bool:
    if name == "tie_embeddings":
        return "output.weight" not in file.tensors
    return any(tensor in file.tensors for tensor in FOUND_BY[name])


def _windows(file: GGUFFile, row: Model, fields: dict[str, Any]) -> dict[str, Any]:
    """attention, sliding_window_size and rope_local_base_freq."""
    arch = file.architecture
    if row.period is None:
        return {"sliding_window_size": None}
    usual = {"gemma2": 4096, "llama4": 8192}.get(arch, 0)
    window = file.get(f"{arch}.attention.sliding_window", int, usual)
    layers = _windowed_layers(file, fields["n_layer"], row.period)
    if window < 1 or not any(layers):
        return {"sliding_window_size": None}
    pattern = join_pattern(["sliding" if windowed else "full" for windowed in layers])
    result = {"attention": pattern, "sliding_window_size": window}
    base = file.get(f"{arch}.rope.freq_base", float, 10000.0)
    local = file.get(f"{arch}.rope.freq_base_swa", float, base if arch != "gemma3" else 10000.0)
    return result | ({"rope_local_base_freq": local} if row.unscaled or local != base else {})


def _windowed_layers(file: GGUFFile, n_layer: int, period: int) -> list[bool]:
    """Which layers have the window: all but every so many-th, or as a list in the file says for each."""
    key = f"{file.architecture}.attention.sliding_window_pattern"
    if isinstance(file.metadata.get(key), list):
        windowed = file.get(key, list)
        if len(windowed) < n_layer:
            raise ValueError(f"{file.path} is damaged: {key} has {len(windowed)} entries for {n_layer} layers.")
        return [bool(w) for w in windowed[:n_layer]]
    period = file.get(key, int, period)
    return [period < 1 or (i + 1) % period != 0 for i in range(n_layer)]


def _refuse_unread_keys(file: GGUFFile) -> None:
    """Raises ValueError for a key that changes how the model computes, and that was not read."""
    for key, value in file.metadata.items():
        name = key.removeprefix(f"{file.architecture}.")
        if name == key or not name.startswith(OTHER_KEYS) or key in file.read:
            continue
        values = value if isinstance(value, list) else [value]
        if any(v not in WITHOUT_EFFECT.get(name, (0,)) for v in values):
            raise ValueError(
                f"{file.path} says {key[:80]} = {str(value)[:80]}, which changes the model and is not read: convert "
                "the model's Hugging Face checkpoint instead."
            )


# --------------------------------------------------------------------------------------------------------------- out


def metadata_of(config: Config, architecture: str) -> dict[str, Any]:
    """The keys of a file of this architecture. They need not hold all of the config: see find_architecture."""
    row, keys = MODELS[architecture], {}
    for key in (*COMMON, *row.keys):
        value = getattr(config, key.field)
        if value is not None:
            keys[key.key] = key.kind(key.out(value))
    keys |= {
        "feed_forward_length": config.expert_size if row.more in (llama, mistral3) and config.n_expert
        else config.intermediate_size,
        "attention.head_count": config.n_head, "attention.head_count_kv": config.n_query_groups,
        "attention.key_length": config.head_size, "attention.value_length": config.head_size,
        "rope.dimension_count": config.rope_n_elem, "rope.freq_base": config.rope_base,
        EPS[config.norm_class_name]: config.norm_eps, "vocab_size": config.padded_vocab_size,
    }  # fmt: skip
    keys |= _window_keys(config, row) | scaling_keys(config, row.scalings) | row.more_keys(config)
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in keys.items()}


def _window_keys(config: Config, row: Model) -> dict[str, Any]:
    layers = [variant == "sliding" for variant in config.layer_variants]
    if row.period is None or not any(layers):
        return {}
    keys: dict[str, Any] = {"attention.sliding_window": config.sliding_window_size}
    if row.period:
        keys["attention.sliding_window_pattern"] = layers
    if row.local_base and any(layers):
        keys["rope.freq_base_swa"] = config.rope_local_base_freq or config.rope_base
    return keys


def find_architecture(config: Config, tensors: Callable[[str], dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The architecture whose files hold all of this config, and their metadata.

    tensors: for an architecture, the name and TensorInfo of every tensor. Each candidate is read back, so a field that
    it cannot hold is noticed. Raises ValueError, naming such a field, when none does.
    """
    require_softmax(config)
    unlike: list[tuple[list[str], str]] = []
    for architecture, row in MODELS.items():
        try:
            metadata = metadata_of(config, architecture)
            sinks = {"blk.0.attn_sinks.weight": [0.0]} if config.sink_logits else sinks_for_none(config, architecture)
            known = scaling_tensors(config) | sinks
            file = GGUFFile(Path("the export"), metadata, tensors(architecture), known=known)
            different = differences(config, Config(**fields_of(file)))
            if not different:
                different = [reason for reason in (_refused(config, row),) if reason]
        except (ValueError, TypeError, KeyError, ZeroDivisionError, OverflowError) as error:  # a field is None here
            unlike.append(([str(error).rstrip(".")] * 99, architecture))
            continue
        if not different:
            return architecture, metadata
        unlike.append((different, architecture))
    fields, architecture = min(unlike, key=lambda item: len(item[0]))
    raise ValueError(
        f"llama.cpp has no architecture that computes what this config asks for; {architecture} comes nearest and "
        f"differs in {', '.join(list(dict.fromkeys(fields))[:4])}: export it with scripts/export_hf.py."
    )


def _refused(config: Config, row: Model) -> str | None:
    if row.always and "sliding" not in config.layer_variants:
        return "no layer with a window"
    if row.square and config.n_head * config.head_size != config.n_embd:
        return f"n_head * head_size={config.n_head * config.head_size}, which is n_embd there"
    if not row.partial and config.rope_n_elem != config.head_size:
        return f"rotary_percentage={config.rotary_percentage:g}, which is 1 there"
    return row.refuse(config) or refuse_scaling(config, row.scalings)


def differences(config: Config, other: Config) -> list[str]:
    """The fields in which two models differ, to what float32 tells apart."""
    a, b = (asdict(canonical(c)) | {"rope_scaling": canonical_scaling(c)} for c in (config, other))
    for values, c in ((a, config), (b, other)):
        values |= {"rotary_percentage": c.rope_n_elem, "norm_qk_type": c.norm_qk and c.norm_qk_type}
        if "GatedMLP" not in c.layer_mlps and "PlainMLP" not in c.layer_mlps:
            values["intermediate_size"] = None  # no layer has it
    return [name for name in a if name not in NOT_EXPORTED and not _alike(a[name], b[name])]


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_alike, a, b))
    numbers = type(a) in (int, float) and type(b) in (int, float)
    return math.isclose(a, b, rel_tol=1e-5) if numbers else a == b
