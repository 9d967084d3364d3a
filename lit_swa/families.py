"""Named model shapes (data only), and the mapping of a Hugging Face config.json to the fields of Config."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lit_swa.config import RANGES, ROPE_SCALING_KEYS, TRAINED_LENGTH
from lit_swa.formats.json_files import read_json
from lit_swa.formats.reading import find_inside, is_listed

# ------------------------------------------------------------------------------------------------------- named shapes

LLAMA = {"norm_eps": 1e-5}
QWEN2 = {"norm_eps": 1e-6, "attn_bias": True, "rope_base": 1e6, "block_size": 32768}
QWEN3 = {
    "norm_eps": 1e-6,
    "norm_qk": True,
    "rope_base": 1e6,
    "block_size": 40960,
    "vocab_size": 151936,
    "head_size": 128,
}
GEMMA = {
    "norm_eps": 1e-6,
    "norm_unit_offset": True,
    "post_attention_norm": True,
    "post_mlp_norm": True,
    "scale_embeddings": True,
    "activation": "gelu_tanh",
    "tie_embeddings": True,
}
GEMMA2 = GEMMA | {
    "vocab_size": 256000,
    "block_size": 8192,
    "attention": "sliding,full",
    "sliding_window_size": 4096,
    "attention_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GEMMA3 = GEMMA | {
    "vocab_size": 262144,
    "block_size": 32768,
    "norm_qk": True,
    "rope_base": 1e6,
    "rope_local_base_freq": 1e4,
    "attention": "sliding,sliding,sliding,sliding,sliding,full",
    "sliding_window_size": 512,
}
PYTHIA = {
    "norm_class_name": "LayerNorm",
    "mlp_class_name": "PlainMLP",
    "activation": "gelu",
    "parallel_residual": True,
    "rotary_percentage": 0.25,
    "attn_bias": True,
    "attn_proj_bias": True,
    "mlp_bias": True,
    "block_size": 2048,
    "vocab_size": 50254,
    "padded_vocab_size": 50304,
}


def shape(n_layer: int, n_embd: int, n_head: int, n_query_groups: int, intermediate_size: int) -> dict[str, int]:
    return {
        "n_layer": n_layer,
        "n_embd": n_embd,
        "n_head": n_head,
        "n_query_groups": n_query_groups,
        "intermediate_size": intermediate_size,
    }


SMOLLM2 = LLAMA | {"vocab_size": 49152, "block_size": 8192, "tie_embeddings": True}
LLAMA2 = LLAMA | {"vocab_size": 32000, "block_size": 4096}
LLAMA3 = LLAMA | {"vocab_size": 128256, "block_size": 8192, "rope_base": 5e5}
LLAMA31 = LLAMA3 | {
    "block_size": 131072,
    "rope_scaling": {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
LLAMA32 = LLAMA31 | {"tie_embeddings": True, "rope_scaling": LLAMA31["rope_scaling"] | {"factor": 32.0}}

CONFIGS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": SMOLLM2 | {"rope_base": 1e5} | shape(30, 576, 9, 3, 1536),
    "SmolLM2-360M": SMOLLM2 | {"rope_base": 1e5} | shape(32, 960, 15, 5, 2560),
    "SmolLM2-1.7B": SMOLLM2 | {"rope_base": 1.3e5} | shape(24, 2048, 32, 32, 8192),
    "TinyLlama-1.1B": LLAMA2 | {"block_size": 2048} | shape(22, 2048, 32, 4, 5632),
    "Llama-2-7b": LLAMA2 | shape(32, 4096, 32, 32, 11008),
    "Llama-2-13b": LLAMA2 | shape(40, 5120, 40, 40, 13824),
    "Llama-2-70b": LLAMA2 | shape(80, 8192, 64, 8, 28672),
    "Meta-Llama-3-8B": LLAMA3 | shape(32, 4096, 32, 8, 14336),
    "Llama-3.1-8B": LLAMA31 | shape(32, 4096, 32, 8, 14336),
    "Llama-3.1-70B": LLAMA31 | shape(80, 8192, 64, 8, 28672),
    "Llama-3.1-405B": LLAMA31 | shape(126, 16384, 128, 8, 53248),
    "Llama-3.2-1B": LLAMA32 | shape(16, 2048, 32, 8, 8192),
    "Llama-3.2-3B": LLAMA32 | {"head_size": 128} | shape(28, 3072, 24, 8, 8192),
    "Mistral-7B-v0.1": LLAMA
    | {"vocab_size": 32000, "block_size": 32768, "attention": "sliding", "sliding_window_size": 4096}
    | shape(32, 4096, 32, 8, 14336),
    "Mistral-7B-v0.3": LLAMA
    | {"vocab_size": 32768, "block_size": 32768, "rope_base": 1e6}
    | shape(32, 4096, 32, 8, 14336),
    "Qwen2.5-0.5B": QWEN2 | {"vocab_size": 151936, "tie_embeddings": True} | shape(24, 896, 14, 2, 4864),
    "Qwen2.5-1.5B": QWEN2 | {"vocab_size": 151936, "tie_embeddings": True} | shape(28, 1536, 12, 2, 8960),
    "Qwen2.5-7B": QWEN2 | {"vocab_size": 152064} | shape(28, 3584, 28, 4, 18944),
    "Qwen3-0.6B": QWEN3 | {"tie_embeddings": True} | shape(28, 1024, 16, 8, 3072),
    "Qwen3-4B": QWEN3 | {"tie_embeddings": True} | shape(36, 2560, 32, 8, 9728),
    "Qwen3-8B": QWEN3 | shape(36, 4096, 32, 8, 12288),
    "gemma-2-2b": GEMMA2 | {"head_size": 256} | shape(26, 2304, 8, 4, 9216),
    "gemma-2-9b": GEMMA2 | {"head_size": 256} | shape(42, 3584, 16, 8, 14336),
    "gemma-2-27b": GEMMA2 | {"head_size": 128, "attention_scores_scalar": 144} | shape(46, 4608, 32, 16, 36864),
    "gemma-3-270m": GEMMA3 | {"head_size": 256} | shape(18, 640, 4, 1, 2048),
    "gemma-3-1b": GEMMA3 | {"head_size": 256} | shape(26, 1152, 4, 1, 6912),
    "pythia-14m": PYTHIA | shape(6, 128, 4, 4, 512),
    "pythia-70m": PYTHIA | shape(6, 512, 8, 8, 2048),
    "pythia-160m": PYTHIA | shape(12, 768, 12, 12, 3072),
}


# ----------------------------------------------------------------------------------------- Hugging Face config.json


def config_from_hf(path_or_dict: str | Path | dict[str, Any]) -> dict[str, Any]:
    """Fields of Config for a Hugging Face config.json: its path, its directory, or its content.

    Both the older keys (rope_theta, rope_scaling, sliding_window_pattern) and transformers 5's (rope_parameters,
    layer_types) are read. A key that is left out has the default of the architecture's class in transformers; null is
    a value. Raises ValueError, in one sentence, for what is wrong, not supported, or would be computed otherwise.
    """
    hf = path_or_dict if isinstance(path_or_dict, dict) else read_hf_config(Path(path_or_dict))
    hf = language_model(hf)
    name = find_architecture(hf)
    architecture = ARCHITECTURES[name]
    refuse_unread(hf, architecture.reads, name)
    hf = architecture.defaults | hf
    least, most = RANGES["n_layer"]
    if type(hf["num_hidden_layers"]) is not int or not least <= hf["num_hidden_layers"] <= most:
        raise ValueError(
            f"num_hidden_layers={str(hf['num_hidden_layers'])[:40]} does not fit: it is n_layer, 1 to {most}."
        )
    try:
        return common_fields(hf) | architecture.fields(hf)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, OverflowError) as error:
        reason = f"{type(error).__name__}: {str(error)[:160]}"
        raise ValueError(f"The Hugging Face config of a {name} holds a value that does not fit ({reason}).") from None


def read_hf_config(path: Path) -> dict[str, Any]:
    """The content of a config.json, given as a file or by its directory."""
    if not path.is_dir():
        return read_json(path)
    if not is_listed(path / "config.json"):
        raise FileNotFoundError(f"There is no {path / 'config.json'}: a Hugging Face checkpoint directory holds one.")
    return read_json(find_inside(path, "config.json"))


def language_model(hf: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the language model: all of it, or that of a model for images and text."""
    text = hf.get("text_config")
    if not isinstance(text, dict):
        return hf
    outer = {key: hf[key] for key in ("architectures", "tie_word_embeddings", "quantization_config") if key in hf}
    kind = {} if "model_type" in text else {"model_type": f"{hf.get('model_type')}_text"}
    return text | kind | outer | {"name": hf.get("_name_or_path")}


def find_architecture(hf: dict[str, Any]) -> str:
    named = hf.get("architectures") or []
    by_model_type = {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "gemma2": "Gemma2ForCausalLM",
        "gemma3": "Gemma3ForConditionalGeneration",
        "gemma3_text": "Gemma3ForCausalLM",
        "gpt_neox": "GPTNeoXForCausalLM",
        "smollm3": "SmolLM3ForCausalLM",
    }
    architecture = named[0] if isinstance(named, list) and named else by_model_type.get(str(hf.get("model_type")))
    if isinstance(architecture, str):  # saved without its head: it is there if it is tied to the embedding
        architecture = re.sub(r"(Text)?Model$", "ForCausalLM", architecture)
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(
            f"The architecture {architecture or hf.get('model_type')!r} is not supported: "
            f"choose a checkpoint of {', '.join(sorted(ARCHITECTURES))}."
        )
    return architecture


# What changes the attention or the size of what flows through a model has one of these in its key's name.
ATTENTION_KEY = re.compile(
    r"att(ention|n)|rope|rotary|alibi|window|soft_?cap|sink|chunk|(^|_)qkv?(_|$)|layer_types|multiplier|logits?_scal|"
    r"scale_(emb|depth)|emb(edding)?_scale|(^|_)mup|mlp_bias|experts|(quantization|compression)_config|bidirectional|causal|"
    r"position_embedding(_type)?$|softmax_scale|mscale|logn|ntk|yarn|xpos|nope|(^|_)swa(_|$)|self_extend|multi_query|"
    r"kv_shared|lora_rank"
)
NO_EFFECT = re.compile(  # on the logits, or none without a key that is read or refused
    r"dropout|pdrop|att(ention|n)_implementation|flash_att|flash_attn|memory_efficient|sdpa|output_attentions|attention_backend|"
    r"softmax_in_fp32|initializer|num_experts_per_tok|_fused|fused_|ffn_dim_multiplier|^use_sliding_window$|^max_window_layers$"
)
NEUTRAL = {"partial_rotary_factor": 1, "rotary_pct": 1, "rotary_emb_base": 10000, "scale_attn_weights": True}
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
    return type(value) is float and value == 1 or type(value) is int and value == 1 and "multipl" in key


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


def read_rope(hf: dict[str, Any]) -> dict[str, Any]:
    """The RoPE parameters, in one object, of the layers that attend in full. rope_scaling, which is older, comes before
    rope_parameters, as in transformers."""
    parameters, scaling = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
    by_kind = any(isinstance(value, dict) for value in parameters.values())
    if by_kind != bool("rope_local_base_freq" in hf and parameters):  # Gemma 3 has one for each kind of layer
        raise ValueError("rope_parameters has full_attention and sliding_attention for Gemma 3, and only for it.")
    rope = (parameters.get("full_attention") or {}) | scaling if by_kind else scaling or parameters
    return {"rope_theta": hf["rope_theta"]} | rope


def rope_fields(hf: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """Config's rope_scaling and block_size for Hugging Face's scaling. Config checks the values.

    max_position_embeddings is the context. It may be the trained length where the scaling is dynamic, or yarn, or says
    what the trained length is: the context is then at least that length times the factor.
    """
    kind, context = rope.get("rope_type", rope.get("type", "default")), hf["max_position_embeddings"]
    needed, welcome = ROPE_SCALING_KEYS.get(kind, (set(rope), set())) if isinstance(kind, str) else (set(), set())
    partial = {"partial_rotary_factor"} if "rotary_pct" in hf else set()  # which GPT-NeoX calls so, too
    refuse_unread_rope(rope, partial | (needed | welcome if kind != "default" else set()))
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


def window_fields(hf: dict[str, Any], layer_types: list[str], window: int | None) -> dict[str, Any]:
    """The attention pattern of layer_types, which transformers and config.json name alike. A layer_types that is given
    must be the one that is computed."""
    names = {"sliding_attention": "sliding", "full_attention": "full"}
    given = hf.get("layer_types") or layer_types
    for kind in given:
        if kind not in names:
            raise ValueError(
                f"layer_types has {str(kind)[:40]!r}: only full_attention and sliding_attention are supported."
            )
    if len(given) != hf["num_hidden_layers"]:
        raise ValueError(f"layer_types names {len(given)} layers, and num_hidden_layers is {hf['num_hidden_layers']}.")
    if "sliding_attention" not in given:
        return {"attention": "full"}
    if window is None:
        raise ValueError("layer_types has layers with sliding_attention, and sliding_window gives them no window.")
    return {"attention": ",".join(shortest_period([names[t] for t in given])), "sliding_window_size": window}


def without_layer_types(hf: dict[str, Any], kind: str) -> None:
    """Raises ValueError where layer_types asks for other layers than the architecture has, all of one kind."""
    if other := [t for t in hf.get("layer_types") or [] if t != kind]:
        raise ValueError(
            f"layer_types has {str(other[0])[:40]!r}, and the layers of this architecture are all {kind}: choose the "
            "architecture that is meant, or take the key out."
        )


def shortest_period(pattern: list[str]) -> list[str]:
    """The shortest list that, tiled and cut, gives the pattern."""
    for p in range(1, len(pattern)):
        if all(pattern[i] == pattern[i % p] for i in range(len(pattern))):
            return pattern[:p]
    return pattern


def llama(hf: dict[str, Any]) -> dict[str, Any]:
    without_layer_types(hf, "full_attention")
    bias = hf["attention_bias"]
    return {"attn_bias": bias, "attn_proj_bias": bias, "mlp_bias": hf["mlp_bias"]}


def mistral(hf: dict[str, Any]) -> dict[str, Any]:
    window = hf["sliding_window"]
    kind = "full_attention" if window is None else "sliding_attention"
    without_layer_types(hf, kind)
    return window_fields(hf, [kind] * hf["num_hidden_layers"], window)


def qwen2(hf: dict[str, Any]) -> dict[str, Any]:
    return {"attn_bias": True} | qwen_attention(hf)


def qwen3(hf: dict[str, Any]) -> dict[str, Any]:
    bias = hf["attention_bias"]
    return {"norm_qk": True, "attn_bias": bias, "attn_proj_bias": bias} | qwen_attention(hf)


def qwen_attention(hf: dict[str, Any]) -> dict[str, Any]:
    """Qwen gives the window to the layers from max_window_layers on, and only if use_sliding_window says so; or chunks
    to all layers."""
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    n, first = hf["num_hidden_layers"], hf["num_hidden_layers"] if window is None else hf["max_window_layers"]
    types = ["sliding_attention" if i >= first else "full_attention" for i in range(n)]
    values, chunks = window_fields(hf, types, window), hf.get("dual_chunk_attention_config")
    if not chunks:
        return values
    if values["attention"] != "full":
        raise ValueError("dual_chunk_attention_config sees every key, and use_sliding_window is set: choose one.")
    return dual_chunk_fields(chunks)


def dual_chunk_fields(chunks: dict[str, Any]) -> dict[str, Any]:
    """Qwen2.5-1M's chunk_size is the greatest distance, s + w, and its local_size is w."""
    known = ("chunk_size", "local_size", TRAINED_LENGTH)
    if missing := [key for key in known if type(chunks.get(key)) is not int]:
        raise ValueError(f"dual_chunk_attention_config has no {missing[0]}, a number of tokens.")
    if unread := [key for key, value in chunks.items() if key not in known and value]:
        raise ValueError(
            f"dual_chunk_attention_config has {unread[0][:60]}, which is not computed here: take it out to attend to "
            "every key."
        )
    size, local, trained = (chunks[key] for key in known)
    return {
        "attention": "dual_chunk",
        "dual_chunk_size": size - local,
        "dual_chunk_local": local,
        "dual_chunk_pretraining_length": trained,
    }


def gemma2(hf: dict[str, Any]) -> dict[str, Any]:
    pattern = [("sliding_attention", "full_attention")[i % 2] for i in range(hf["num_hidden_layers"])]
    bias = hf["attention_bias"]
    return {
        "norm_unit_offset": True,
        "post_attention_norm": True,
        "post_mlp_norm": True,
        "scale_embeddings": True,
        # Old Gemma configs say "gelu" in hidden_act and mean the tanh form, so only hidden_activation is read.
        "activation": read_activation(hf["hidden_activation"] or "gelu_pytorch_tanh"),
        "attn_bias": bias,
        "attn_proj_bias": bias,
        "attention_scores_scalar": hf["query_pre_attn_scalar"],
        "attention_logit_softcapping": hf["attn_logit_softcapping"],
        "final_logit_softcapping": hf["final_logit_softcapping"],
    } | window_fields(hf, pattern, hf["sliding_window"])


def gemma3(hf: dict[str, Any]) -> dict[str, Any]:
    every = hf["sliding_window_pattern"]
    pattern = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(hf["num_hidden_layers"])]
    local = (hf.get("rope_parameters") or {}).get("sliding_attention") or {}
    local = {"rope_theta": hf["rope_local_base_freq"]} | local
    if local.get("rope_type", "default") != "default":
        raise ValueError(
            f"RoPE of the layers with a window has the type {str(local['rope_type'])[:40]!r}: none is read."
        )
    return {
        **gemma2(hf | {"layer_types": hf.get("layer_types") or pattern}),
        "norm_qk": True,
        "rope_local_base_freq": float(local["rope_theta"]),
    }


def smollm3(hf: dict[str, Any]) -> dict[str, Any]:
    """no_rope_layers has 1 for a layer with RoPE. Those without it have the window, if there is one."""
    n, every, bias = hf["num_hidden_layers"], hf["no_rope_layer_interval"], hf["attention_bias"]
    rotated = hf["no_rope_layers"] or [int((i + 1) % every != 0) for i in range(n)]
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    types = ["full_attention" if r or window is None else "sliding_attention" for r in rotated]
    return {"attn_bias": bias, "attn_proj_bias": bias, "mlp_bias": hf["mlp_bias"]} | {
        "positions": position_pattern(rotated, n), **window_fields(hf, types, window),
    }  # fmt: skip


def position_pattern(rotated: list[Any], n_layer: int) -> str:
    """Config's positions of a list that has 1 for a layer with RoPE, and 0 for one without."""
    if len(rotated) != n_layer or not all(r in (0, 1) for r in rotated):
        raise ValueError(f"no_rope_layers must have 0 or 1 for each of the {n_layer} layers.")
    return ",".join(shortest_period(["rope" if r else "none" for r in rotated]))


def gpt_neox(hf: dict[str, Any]) -> dict[str, Any]:
    without_layer_types(hf, "full_attention")
    rope, bias = read_rope(hf | {"rope_theta": hf["rotary_emb_base"]}), hf["attention_bias"]
    return {
        "norm_class_name": "LayerNorm",
        "mlp_class_name": "PlainMLP",
        "norm_eps": hf["layer_norm_eps"],
        "attn_bias": bias,
        "attn_proj_bias": bias,
        "mlp_bias": True,
        "parallel_residual": hf["use_parallel_residual"],
        "rope_base": float(rope["rope_theta"]),
        "rotary_percentage": float(rope.get("partial_rotary_factor", hf["rotary_pct"])),
    }


class Architecture(NamedTuple):
    """How the config.json of an architecture is read."""

    fields: Callable[[dict[str, Any]], dict[str, Any]]  # what it adds to common_fields
    defaults: dict[str, Any]  # what its class in transformers gives the keys that are left out
    reads: set[str]  # its keys that ATTENTION_KEY names


def defaults(vocab_size: int, context: int, *shape: int | None, **others: Any) -> dict[str, Any]:
    """shape: layers, width, query heads, key/value heads (None: as many) and the width of the MLP."""
    names = "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"
    plain = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1e4, "head_dim": None}
    sizes = {"vocab_size": vocab_size, "max_position_embeddings": context} | dict(zip(names, shape, strict=True))
    return plain | sizes | {"tie_word_embeddings": False, "attention_bias": False} | others


QWEN_KEYS = {"sliding_window", "use_sliding_window", "max_window_layers", "dual_chunk_attention_config"}
QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
GEMMA_KEYS = {
    "sliding_window", "sliding_window_size", "attn_logit_softcapping", "final_logit_softcapping",
    "query_pre_attn_scalar", "attention_bias",
}  # fmt: skip
GEMMA2_DEFAULTS = defaults(
    256000, 8192, 26, 2304, 8, 4, 9216, head_dim=256, hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True,
    query_pre_attn_scalar=256, sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
)  # fmt: skip
GEMMA3_DEFAULTS = GEMMA2_DEFAULTS | {
    "vocab_size": 262208, "max_position_embeddings": 131072, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "sliding_window_pattern": 6, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
}  # fmt: skip
GEMMA3_KEYS = GEMMA_KEYS | {"sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"}
NEOX_DEFAULTS = defaults(
    50432, 2048, 44, 6144, 64, None, 24576, hidden_act="gelu", layer_norm_eps=1e-5, attention_bias=True,
    use_parallel_residual=True, rotary_pct=0.25, rotary_emb_base=10000,
)  # fmt: skip
ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        llama, defaults(32000, 2048, 32, 4096, 32, None, 11008, mlp_bias=False), {"attention_bias", "mlp_bias"}
    ),
    "MistralForCausalLM": Architecture(
        mistral, defaults(32000, 131072, 32, 4096, 32, 8, 14336, sliding_window=4096), {"sliding_window"}
    ),
    "Qwen2ForCausalLM": Architecture(
        qwen2, defaults(151936, 32768, 32, 4096, 32, 32, 22016, **QWEN_WINDOW), QWEN_KEYS | {"attention_bias"}
    ),
    "Qwen3ForCausalLM": Architecture(
        qwen3,
        defaults(151936, 32768, 32, 4096, 32, 32, 22016, head_dim=128, **QWEN_WINDOW),
        QWEN_KEYS | {"attention_bias"},
    ),
    "Gemma2ForCausalLM": Architecture(gemma2, GEMMA2_DEFAULTS, GEMMA_KEYS),
    "Gemma3ForCausalLM": Architecture(gemma3, GEMMA3_DEFAULTS, GEMMA3_KEYS),
    "Gemma3ForConditionalGeneration": Architecture(gemma3, GEMMA3_DEFAULTS, GEMMA3_KEYS),
    "SmolLM3ForCausalLM": Architecture(
        smollm3,
        defaults(
            128256,
            32768,
            36,
            2048,
            16,
            4,
            11008,
            rope_theta=2e6,
            tie_word_embeddings=True,
            mlp_bias=False,
            use_sliding_window=False,
            sliding_window=None,
            no_rope_layers=None,
            no_rope_layer_interval=4,
        ),
        {"attention_bias", "mlp_bias", "sliding_window", "no_rope_layers", "no_rope_layer_interval"},
    ),
    "GPTNeoXForCausalLM": Architecture(
        gpt_neox, NEOX_DEFAULTS, {"rotary_pct", "rotary_emb_base", "attention_bias", "partial_rotary_factor"}
    ),
}
