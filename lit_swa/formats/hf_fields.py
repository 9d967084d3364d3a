"""What the readers of a Hugging Face config.json share: keys that most families have, RoPE, windows, and keys that must
not be left unread."""

import re
from typing import Any

from lit_swa.config import ROPE_SCALING_KEYS, TRAINED_LENGTH, join_pattern

# What changes the attention or the size of what flows through a model has one of these in its key's name.
ATTENTION_KEY = re.compile(
    r"att(ention|n)|rope|rotary|alibi|window|soft_?cap|sink|chunk|(^|_)qkv?(_|$)|layer_types|multiplier|logits?_scal|"
    r"scale_(emb|depth)|emb(edding)?_scale|(^|_)mup|mlp_bias|experts|(quantization|compression)_config|bidirectional|causal|"
    r"position_embedding(_type)?$|softmax_scale|mscale|logn|ntk|yarn|xpos|nope|(^|_)swa(_|$)|self_extend|multi_query|"
    r"kv_shared|lora_rank|per_layer_config|num_(key_value|kv|query)_heads_|heads_per_layer"
)
NO_EFFECT = re.compile(  # on the logits, or none without a key that is read or refused
    r"dropout|pdrop|att(ention|n)_implementation|flash_att|flash_attn|memory_efficient|sdpa|output_attentions|attention_backend|"
    r"softmax_in_fp32|initializer|num_experts_per_tok|_fused|fused_|ffn_dim_multiplier|^use_sliding_window$|^max_window_layers$"
)
NEUTRAL = {"partial_rotary_factor": 1, "rotary_pct": 1, "rotary_emb_base": 10000, "scale_attn_weights": True}
NEUTRAL |= {"full_attn_mod": 1, "position_embedding_type": "rope_gptj"}  # Phi 4 mini; Command R7B, whose RoPE it is
NEUTRAL |= dict.fromkeys(("causal", "is_causal", "use_rope", "use_rotary", "use_rotary_embeddings", "rotary"), True)
ALWAYS_READ = {"num_attention_heads", "rope_theta", "rope_scaling", "rope_parameters", "layer_types"}


def refuse_unread(hf: dict[str, Any], reads: set[str], architecture: str) -> None:
    """Raises ValueError for a key that asks for another computation than the one that is built."""
    for key, value in hf.items():
        read = key in reads | ALWAYS_READ or not ATTENTION_KEY.search(key) or NO_EFFECT.search(key)
        if not read and not is_neutral(key, value):
            raise ValueError(
                f"The Hugging Face config of a {architecture} has {key[:60]}={repr(value)[:60]}, which is not computed "
                "here: choose another checkpoint, or take the key out to convert the model without it."
            )


def is_neutral(key: str, value: Any) -> bool:
    """True for a value that asks for nothing: false, null, a factor of 1, or what is computed anyway."""
    if key in NEUTRAL or value is None:
        return value is None or value == NEUTRAL[key]
    if not value or value in ("none", "default", "rope", "rotary"):
        return True
    if key == "no_rope_layers":  # 1 means that the layer has RoPE
        return isinstance(value, list) and all(v == 1 for v in value)
    return (
        type(value) is float
        and value == 1
        and "clip" not in key
        or type(value) is int
        and value == 1
        and "multipl" in key
    )


def common_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """The fields that every architecture stores under the same keys."""
    n_head, rope = hf["num_attention_heads"], read_rope(hf)
    return {
        "name": str(hf.get("name") or hf.get("_name_or_path") or ""),
        "n_layer": hf["num_hidden_layers"],
        "n_head": n_head,
        "n_query_groups": n_head if hf["num_key_value_heads"] is None else hf["num_key_value_heads"],
        "n_embd": hf["hidden_size"],
        "head_size": hf["hidden_size"] // n_head if hf["head_dim"] is None else hf["head_dim"],
        "intermediate_size": hf["intermediate_size"],
        "vocab_size": hf["vocab_size"],
        "tie_embeddings": hf["tie_word_embeddings"],
        "norm_eps": hf["rms_norm_eps"],
        "rope_base": float(rope["rope_theta"]),
        **rope_fields(hf, rope),
        "activation": read_activation(hf["hidden_act"]),
    }


ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


def read_activation(name: Any) -> str:
    if not isinstance(name, str) or name not in ACTIVATION_NAMES:
        known = ", ".join(ACTIVATION_NAMES)
        raise ValueError(f"The activation {str(name)[:40]!r} is not supported: it must be one of {known}.")
    return ACTIVATION_NAMES[name]


ROPE_KEYS = " keys of RoPE"  # in an architecture's defaults: further ones that it reads, which no config.json has


def read_rope(hf: dict[str, Any]) -> dict[str, Any]:
    """The RoPE parameters, in one object, of the layers that attend in full. rope_scaling, which is older, comes before
    rope_parameters, as in transformers."""
    parameters, scaling = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
    by_kind = any(isinstance(value, dict) for value in parameters.values())
    if by_kind != bool("rope_local_base_freq" in hf and parameters):  # Gemma 3 has one for each kind of layer
        raise ValueError(
            "rope_parameters has full_attention and sliding_attention for Gemma 3 and OLMo 3, and for no other: give "
            "this architecture one set of them, and those both."
        )
    rope = (parameters.get("full_attention") or {}) | scaling if by_kind else scaling or parameters
    return {"rope_theta": hf["rope_theta"]} | rope


def rope_fields(hf: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """Config's rope_scaling and block_size for Hugging Face's scaling. Config checks the values.

    max_position_embeddings is the context. It may be the trained length where the scaling is dynamic, or yarn, or says
    what the trained length is: the context is then at least that length times the factor.
    """
    kind, context = rope.get("rope_type", rope.get("type", "default")), hf["max_position_embeddings"]
    needed, welcome = ROPE_SCALING_KEYS.get(kind, (set(rope), set())) if isinstance(kind, str) else (set(), set())
    refuse_unread_rope(rope, hf.get(ROPE_KEYS, set()) | (needed | welcome if kind != "default" else set()))
    if kind == "default":
        return {"rope_scaling": None, "block_size": context}
    scaling = {"type": kind} | {k: v for k, v in rope.items() if k in needed | welcome and v is not None}
    told = hf.get(TRAINED_LENGTH) or rope.get(TRAINED_LENGTH)
    trained = context if kind == "dynamic" else told or context
    if TRAINED_LENGTH in needed:
        scaling[TRAINED_LENGTH] = trained
    if "factor" not in scaling and kind in ("yarn", "longrope"):
        scaling["factor"] = context / trained
    stretched = kind in ("dynamic", "yarn") or kind == "linear" and told
    reach = int(trained * scaling["factor"]) if stretched and "factor" in scaling else 0
    return {"rope_scaling": scaling, "block_size": max(context, reach)}


def refuse_unread_rope(rope: dict[str, Any], reads: set[str]) -> None:
    """Raises ValueError for a parameter of RoPE that this kind of scaling does not read."""
    known = {"rope_type", "type", "rope_theta", TRAINED_LENGTH, "finetuned", *reads}
    for key, value in rope.items():
        if key not in known and not is_neutral(key, value):
            kind = str(rope.get("rope_type", rope.get("type", "default")))[:40]
            raise ValueError(
                f"RoPE has {key[:60]}={repr(value)[:60]}, which its type {kind!r} does not read: give it the type that "
                "is meant, or take the key out."
            )


LAYER_KINDS = {"sliding_attention": "sliding", "full_attention": "full", "chunked_attention": "chunked"}


def window_fields(hf: dict[str, Any], layer_types: list[str], window: int | None) -> dict[str, Any]:
    """The attention pattern of layer_types, which transformers and config.json name alike. A layer_types that is given
    must be the one that is computed."""
    names = LAYER_KINDS if "attention_chunk_size" in hf else dict(list(LAYER_KINDS.items())[:2])
    given = hf.get("layer_types") or layer_types
    for kind in given:
        if kind not in names:
            raise ValueError(f"layer_types has {str(kind)[:40]!r}: only {' and '.join(names)} are supported.")
    if len(given) != hf["num_hidden_layers"]:
        raise ValueError(
            f"layer_types names {len(given)} layers, and num_hidden_layers is {hf['num_hidden_layers']}: mend one of "
            "them."
        )
    pattern = {"attention": join_pattern([names[t] for t in given])}
    if "sliding_attention" not in given:
        return pattern
    if window is None:
        raise ValueError("layer_types has layers with sliding_attention, and they have no window: set sliding_window.")
    return pattern | {"sliding_window_size": window}


def without_layer_types(hf: dict[str, Any], kind: str) -> None:
    """Raises ValueError where layer_types asks for other layers than the architecture has, all of one kind."""
    if other := [t for t in hf.get("layer_types") or [] if t != kind]:
        raise ValueError(
            f"layer_types has {str(other[0])[:40]!r}, and the layers of this architecture are all {kind}: choose the "
            "architecture that is meant, or take the key out."
        )
