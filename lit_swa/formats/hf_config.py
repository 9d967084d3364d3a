"""How the config.json of each Hugging Face architecture is read, as fields of Config: a row of ARCHITECTURES each.

What the files of its weights are called is in hf_names.py, and the config.json that an export writes in hf_export.py.
"""

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lit_swa.config import RANGES, TRAINED_LENGTH, join_pattern
from lit_swa.formats.hf_fields import (
    ROPE_KEYS,
    common_fields,
    read_activation,
    read_rope,
    refuse_unread,
    window_fields,
    without_layer_types,
)
from lit_swa.formats.json_files import read_json
from lit_swa.formats.reading import find_inside, is_listed


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
        raise ValueError(
            f"The Hugging Face config of a {name} holds a value that does not fit ({reason}): mend it, or download it "
            "again."
        ) from None


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
    given = named[0] if isinstance(named, list) and named else None
    architecture = MODEL_TYPES.get(str(hf.get("model_type"))) if given is None else str(given)
    if architecture not in ARCHITECTURES and str(given).endswith("ForConditionalGeneration"):
        architecture = MODEL_TYPES.get(str(hf.get("model_type")))  # that of the text model within
    if architecture is not None:  # saved without its head: it is there if it is tied to the embedding
        architecture = re.sub(r"(Text)?Model$", "ForCausalLM", architecture)
    if architecture not in ARCHITECTURES:
        asked = str(given or hf.get("model_type"))[:80]
        near = difflib.get_close_matches(asked, ARCHITECTURES, n=1, cutoff=0.0)
        raise ValueError(
            f"The architecture {asked!r} is not supported: the nearest that is here is {near[0]}, and there are "
            f"{', '.join(sorted(ARCHITECTURES.keys() - set(near)))}."
        )
    return architecture


# ---------------------------------------------------------------------------------------------------------- families


def llama(hf: dict[str, Any]) -> dict[str, Any]:
    without_layer_types(hf, "full_attention")
    return biases(hf) | {"mlp_bias": hf["mlp_bias"]}


def biases(hf: dict[str, Any]) -> dict[str, Any]:
    """Those of the attention."""
    return {"attn_bias": hf["attention_bias"], "attn_proj_bias": hf["attention_bias"]}


def mistral(hf: dict[str, Any]) -> dict[str, Any]:
    window = hf["sliding_window"]
    kind = "full_attention" if window is None else "sliding_attention"
    without_layer_types(hf, kind)
    return window_fields(hf, [kind] * hf["num_hidden_layers"], window)


def qwen2(hf: dict[str, Any]) -> dict[str, Any]:
    return {"attn_bias": True} | qwen_attention(hf)


def qwen3(hf: dict[str, Any]) -> dict[str, Any]:
    return {"norm_qk": True} | biases(hf) | qwen_attention(hf)


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
    """Qwen2.5-1M's chunk_size is the greatest distance s + w, its local_size is w. Beyond its trained length YaRN's
    temperature multiplies queries and keys (arXiv 2501.15383): here by the query's position, not the text's length.
    """
    known = ("chunk_size", "local_size", TRAINED_LENGTH)
    if missing := [key for key in known if type(chunks.get(key)) is not int]:
        raise ValueError(f"dual_chunk_attention_config has no {missing[0]}: add it, a number of tokens.")
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
        "dual_chunk_temperature_slope": 0.1,
        "dual_chunk_temperature_power": 2.0,
    }


def gemma2(hf: dict[str, Any]) -> dict[str, Any]:
    pattern = [("sliding_attention", "full_attention")[i % 2] for i in range(hf["num_hidden_layers"])]
    return {
        "norm_unit_offset": True,
        "post_attention_norm": True,
        "post_mlp_norm": True,
        "scale_embeddings": True,
        # Old Gemma configs say "gelu" in hidden_act and mean the tanh form, so only hidden_activation is read.
        "activation": read_activation(hf["hidden_activation"] or "gelu_pytorch_tanh"),
        **biases(hf),
        "attention_scores_scalar": hf["query_pre_attn_scalar"],
        "attention_logit_softcapping": hf["attn_logit_softcapping"],
        "final_logit_softcapping": hf["final_logit_softcapping"],
    } | window_fields(hf, pattern, hf["sliding_window"])


def local_base(hf: dict[str, Any], plain: float) -> float:
    """The base of RoPE in the layers with a window; plain: where they have none of their own. Raises ValueError for a
    scaling, which is read for the other layers alone."""
    local = (hf.get("rope_parameters") or {}).get("sliding_attention") or {}
    if local.get("rope_type", "default") != "default":
        raise ValueError(
            f"RoPE of the layers with a window has the type {str(local['rope_type'])[:40]!r}: none is read."
        )
    return float(local.get("rope_theta", plain))


def gemma3(hf: dict[str, Any]) -> dict[str, Any]:
    every = hf["sliding_window_pattern"]
    pattern = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(hf["num_hidden_layers"])]
    base = local_base(hf, hf["rope_local_base_freq"])
    if hf["attn_logit_softcapping"] is not None:
        raise ValueError(
            "attn_logit_softcapping is set, which transformers leaves out of Gemma 3: take the key out to do the same."
        )
    return {
        **gemma2(hf | {"layer_types": hf.get("layer_types") or pattern}),
        "norm_qk": True,
        "rope_local_base_freq": base,
    }


def gpt_neox(hf: dict[str, Any]) -> dict[str, Any]:
    without_layer_types(hf, "full_attention")
    rope = read_rope(hf | {"rope_theta": hf["rotary_emb_base"]})
    return own_heads(hf) | {
        "norm_class_name": "LayerNorm",
        "mlp_class_name": "PlainMLP",
        "norm_eps": hf["layer_norm_eps"],
        **biases(hf),
        "mlp_bias": True,
        "parallel_residual": hf["use_parallel_residual"],
        "rope_base": float(rope["rope_theta"]),
        "rotary_percentage": float(rope.get("partial_rotary_factor", hf["rotary_pct"])),
    }


def own_heads(hf: dict[str, Any]) -> dict[str, Any]:
    """GPT-NeoX has a key head for each query head, and heads that share the width, whatever else config.json holds."""
    heads = hf["num_attention_heads"]
    return {"n_query_groups": heads, "head_size": hf["hidden_size"] // heads}


def smollm3(hf: dict[str, Any]) -> dict[str, Any]:
    """no_rope_layers has 1 for a layer with RoPE. Those without it have the window, if there is one."""
    n, every = hf["num_hidden_layers"], hf["no_rope_layer_interval"]
    rotated = hf["no_rope_layers"] or [int((i + 1) % every != 0) for i in range(n)]
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    types = ["full_attention" if r or window is None else "sliding_attention" for r in rotated]
    fields = biases(hf) | {"mlp_bias": hf["mlp_bias"], "positions": position_pattern(rotated, n)}
    return fields | window_fields(hf, types, window)


def position_pattern(rotated: list[Any], n_layer: int) -> str:
    """Config's positions of a list that has 1 for a layer with RoPE, and 0 for one without."""
    if len(rotated) != n_layer or not all(r in (0, 1) for r in rotated):
        raise ValueError(f"no_rope_layers must have 0 or 1 for each of the {n_layer} layers.")
    return join_pattern(["rope" if r else "none" for r in rotated])


def gemma(hf: dict[str, Any]) -> dict[str, Any]:
    """Its old configs say "gelu" in hidden_act and mean the tanh form."""
    without_layer_types(hf, "full_attention")
    fields = {"norm_unit_offset": True, "scale_embeddings": True}
    return fields | biases(hf) | {"activation": read_activation(hf["hidden_activation"] or "gelu_pytorch_tanh")}


def cohere(hf: dict[str, Any]) -> dict[str, Any]:
    """Command R: a norm without a bias that the attention and the MLP share."""
    norms = {"norm_class_name": "LayerNorm", "norm_bias": False, "norm_eps": hf["layer_norm_eps"]}
    norms |= {"norm_qk": True, "norm_qk_type": "each"} if hf["use_qk_norm"] else {}
    shared = {"parallel_residual": True, "shared_norm": True, "logit_multiplier": float(hf["logit_scale"])}
    return norms | shared | biases(hf)


def windows_with_rope(hf: dict[str, Any], every: int) -> dict[str, Any]:
    """Layers with a window, which have RoPE, and every so many one that attends in full and has none."""
    n, window = hf["num_hidden_layers"], hf["sliding_window"]
    types = ["sliding_attention" if every and (i + 1) % every else "full_attention" for i in range(n)]
    fields = window_fields(hf, types, window)
    types = hf.get("layer_types") or types
    return fields | {"positions": position_pattern([int(t == "sliding_attention") for t in types], n)}


def cohere2(hf: dict[str, Any]) -> dict[str, Any]:
    return cohere(hf | {"use_qk_norm": False}) | windows_with_rope(hf, hf["sliding_window_pattern"])


def exaone4(hf: dict[str, Any]) -> dict[str, Any]:
    """Without a window, all layers have RoPE."""
    behind = {"norm_qk": True, "pre_norm": False, "post_attention_norm": True, "post_mlp_norm": True}
    every = hf["sliding_window_pattern"] or 0
    every = len(every) if isinstance(every, str) else every  # "LLLG"
    if hf["sliding_window"] is None:
        return behind | window_fields(hf, ["full_attention"] * hf["num_hidden_layers"], None)
    return behind | windows_with_rope(hf, every)


def olmo(hf: dict[str, Any]) -> dict[str, Any]:
    without_layer_types(hf, "full_attention")
    norms = {"norm_class_name": "LayerNorm", "norm_weight": False, "norm_bias": False, "norm_eps": 1e-5}
    return norms | biases(hf) | {"clip_qkv": hf["clip_qkv"]}


def olmo2(hf: dict[str, Any]) -> dict[str, Any]:
    """Norms behind the attention and the MLP only, and one over all queries' heads, and all keys'."""
    norms = {"norm_qk": True, "norm_qk_type": "whole", "pre_norm": False}
    return norms | {"post_attention_norm": True, "post_mlp_norm": True} | biases(hf)


def olmo3(hf: dict[str, Any]) -> dict[str, Any]:
    """A scaling of RoPE counts for the layers without a window."""
    types = ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(hf["num_hidden_layers"])]
    base = local_base(hf, hf["rope_theta"])
    return olmo2(hf) | {"rope_local_base_freq": base} | window_fields(hf, types, hf["sliding_window"])


def stablelm(hf: dict[str, Any]) -> dict[str, Any]:
    parallel = hf["use_parallel_residual"]
    return {
        "head_size": hf["hidden_size"] // hf["num_attention_heads"],
        "norm_class_name": "LayerNorm",
        "norm_eps": hf["layer_norm_eps"],
        "attn_bias": hf["use_qkv_bias"],
        "parallel_residual": parallel,
        "shared_norm": parallel,
        "rotary_percentage": partial_rotary(hf),
        **({"norm_qk": True, "norm_qk_type": "each"} if hf["qk_layernorm"] else {}),
    }


def partial_rotary(hf: dict[str, Any]) -> float:
    return float(read_rope(hf).get("partial_rotary_factor", hf["partial_rotary_factor"]))


def phi(hf: dict[str, Any]) -> dict[str, Any]:
    """Phi 1, 1.5 and 2: the attention and the MLP share a norm, and everything has a bias."""
    biased = dict.fromkeys(("attn_bias", "attn_proj_bias", "mlp_bias", "lm_head_bias"), True)
    return biased | {
        "norm_class_name": "LayerNorm",
        "norm_eps": hf["layer_norm_eps"],
        "mlp_class_name": "PlainMLP",
        "parallel_residual": True,
        "shared_norm": True,
        "norm_qk": hf["qk_layernorm"],
        "rotary_percentage": partial_rotary(hf),
    }


def phi3(hf: dict[str, Any]) -> dict[str, Any]:
    return mistral(hf) | {"rotary_percentage": partial_rotary(hf)}


def falcon(hf: dict[str, Any]) -> dict[str, Any]:
    """The 7B has one key/value head and one norm; the 40B and 180B have groups and a norm for the MLP beside it."""
    n_head, new, parallel = hf["num_attention_heads"], hf["new_decoder_architecture"], hf["parallel_attn"]
    groups = (hf["num_kv_heads"] or n_head) if new else 1 if hf["multi_query"] else n_head
    norms = 2 if new and hf["num_ln_in_parallel_attn"] is None else hf["num_ln_in_parallel_attn"]
    if new and not parallel:
        raise ValueError(
            "new_decoder_architecture with parallel_attn=False is not computed here: choose another model."
        )
    return {
        "n_query_groups": groups,
        "intermediate_size": hf["ffn_hidden_size"] or 4 * hf["hidden_size"],
        "activation": read_activation(hf["activation"]),
        "norm_class_name": "LayerNorm",
        "norm_eps": hf["layer_norm_epsilon"],
        "mlp_class_name": "PlainMLP",
        "parallel_residual": parallel,
        "shared_norm": parallel and not (new and norms == 2),
        **dict.fromkeys(("attn_bias", "attn_proj_bias", "mlp_bias"), hf["bias"]),
    }


def granite(hf: dict[str, Any]) -> dict[str, Any]:
    return biases(hf) | {
        "mlp_bias": hf["mlp_bias"],
        "embedding_multiplier": float(hf["embedding_multiplier"]),
        "residual_multiplier": float(hf["residual_multiplier"]),
        "logit_multiplier": 1.0 / hf["logits_scaling"],
        "attention_scores_scalar": float(hf["attention_multiplier"]) ** -2,
    }


def granite_swa(hf: dict[str, Any]) -> dict[str, Any]:
    """Learned sink logits, and a base of RoPE for each layer, 0 where it has none."""
    n, base = hf["num_hidden_layers"], float(read_rope(hf)["rope_theta"])
    types = ["sliding_attention" if i % 4 else "full_attention" for i in range(n)]
    bases = [float(x or 0) for x in hf["layer_rope_theta"] or [base] * n]
    if len(bases) != n:
        raise ValueError(f"layer_rope_theta names {len(bases)} layers, and num_hidden_layers is {n}: mend one of them.")
    if set(bases) - {0.0, base} and read_rope(hf).get("rope_type", "default") != "default":
        raise ValueError(
            "layer_rope_theta has several bases beside a scaling of RoPE, which is not computed: choose another model."
        )
    names = {0.0: "none", base: "rope"}
    positions = join_pattern([names.get(x, f"{x:.12g}") for x in bases])
    fields = granite(hf) | {"sink_logits": True, "positions": positions}
    return fields | window_fields(hf, types, hf["sliding_window"])


def ministral(hf: dict[str, Any]) -> dict[str, Any]:
    window = hf["sliding_window"]
    types = ["full_attention" if window is None else "sliding_attention"] * hf["num_hidden_layers"]
    return window_fields(hf, types, window)


def ministral3(hf: dict[str, Any]) -> dict[str, Any]:
    """Scores grow with the query's position, by steps of the trained length."""
    rope = read_rope(hf)
    slope = rope.get("llama_4_scaling_beta")
    tempered = {"temperature_slope": slope, "temperature_length": rope[TRAINED_LENGTH]} if slope else {}
    return mistral(hf) | tempered


def mixtral(hf: dict[str, Any]) -> dict[str, Any]:
    return mistral(hf) | experts(hf, hf["num_local_experts"])


def experts(hf: dict[str, Any], count: int, layers: list[bool] | None = None) -> dict[str, Any]:
    """The fields of a mixture of experts, in all layers or in those that are True."""
    layers = layers or [True] * hf["num_hidden_layers"]
    if not any(layers):
        return {}
    return {
        "mlp_class_name": join_pattern(["MoE" if moe else "GatedMLP" for moe in layers]),
        "n_expert": count,
        "n_expert_per_token": hf["num_experts_per_tok"],
        "balancing_loss": float(hf["router_aux_loss_coef"] or 0.0),
    }


def qwen_moe(hf: dict[str, Any]) -> dict[str, Any]:
    count = hf["num_local_experts"] or hf["num_experts"] or 0
    step, without = hf["decoder_sparse_step"], hf["mlp_only_layers"] or []
    layers = [i not in without and count > 0 and (i + 1) % step == 0 for i in range(hf["num_hidden_layers"])]
    found = experts(hf, count, layers)
    if not found:
        return {}
    return found | {
        "expert_size": hf["moe_intermediate_size"],
        "expert_weights": "chosen" if hf["norm_topk_prob"] else "all",
    }


def qwen2_moe(hf: dict[str, Any]) -> dict[str, Any]:
    """A window without layer_types is that of every other layer, of those before max_window_layers."""
    moe, windows = qwen_moe(hf), range(0, hf["max_window_layers"], 2) if hf["use_sliding_window"] else ()
    types = [("full_attention", "sliding_attention")[i in windows] for i in range(hf["num_hidden_layers"])]
    hf = hf | {"layer_types": hf.get("layer_types") or types}
    shared = {"shared_expert_size": hf["shared_expert_intermediate_size"], "shared_expert_gate": True} if moe else {}
    return qwen2(hf) | {"attn_bias": hf["qkv_bias"]} | moe | shared


def qwen3_moe(hf: dict[str, Any]) -> dict[str, Any]:
    """All layers have the window, if use_sliding_window says so."""
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    without_layer_types(hf, "full_attention" if window is None else "sliding_attention")
    return qwen3(hf | {"max_window_layers": 0}) | qwen_moe(hf)


def afmoe(hf: dict[str, Any]) -> dict[str, Any]:
    """Arcee's Trinity: norms on both sides, a gate behind the attention, and RoPE in the layers with a window only."""
    n, dense = hf["num_hidden_layers"], hf["num_dense_layers"] or 0
    fields = {"norm_qk": True, "post_attention_norm": True, "post_mlp_norm": True, "attention_gate": True}
    fields |= {"scale_embeddings": bool(hf["mup_enabled"])} | biases(hf)
    moe = experts(hf | {"router_aux_loss_coef": 0.0}, hf["num_experts"], [i >= dense for i in range(n)])
    if moe:
        size = hf["moe_intermediate_size"]
        shared = size * hf["num_shared_experts"] if hf["num_shared_experts"] else None
        moe |= {"expert_size": size, "expert_weights": "biased", "shared_expert_size": shared}
        moe |= {"expert_scale": float(hf["route_scale"])}
    return fields | moe | windows_with_rope(hf, hf["global_attn_every_n_layers"])


def gpt_oss(hf: dict[str, Any]) -> dict[str, Any]:
    """Learned sink logits, every other layer with a window, and experts with biases and a clamped activation."""
    method = (hf["quantization_config"] or {}).get("quant_method")
    if method not in (None, "mxfp4"):
        raise ValueError(f"quantization_config has the method {str(method)[:40]!r}: only mxfp4 is read of gpt-oss.")
    types = [("sliding_attention", "full_attention")[i % 2] for i in range(hf["num_hidden_layers"])]
    moe = experts(hf, hf["num_local_experts"])
    clamped = {"expert_limit": float(hf["swiglu_limit"]), "expert_slope": float(hf["swiglu_alpha"])}
    fields = {"sink_logits": True, "mlp_bias": True} | biases(hf) | moe | clamped
    return fields | window_fields(hf, types, hf["sliding_window"])


def llama4(hf: dict[str, Any]) -> dict[str, Any]:
    """The text model: layers with RoPE attend within chunks, the others in full, at a temperature that grows."""
    n, every, step = hf["num_hidden_layers"], hf["no_rope_layer_interval"], hf["interleave_moe_layer_step"]
    rotated = hf["no_rope_layers"] or [int((i + 1) % every != 0) for i in range(n)]
    moe = hf["moe_layers"] if hf["moe_layers"] is not None else list(range(step - 1, n, step))
    size = hf["intermediate_size"]
    types = ["chunked_attention" if r else "full_attention" for r in rotated]
    fields = biases(hf) | {"positions": position_pattern(rotated, n), "intermediate_size": hf["intermediate_size_mlp"]}
    if hf["use_qk_norm"]:
        fields |= {"norm_qk": True, "norm_qk_type": "plain"}
    if hf["attn_temperature_tuning"]:
        fields |= {
            "temperature_slope": float(hf["attn_scale"]),
            "temperature_length": int(hf["floor_scale"]),
            "temperature_offset": 1,
            "temperature_layers": "none",
        }
    found = experts(hf, hf["num_local_experts"], [i in moe for i in range(n)])
    if found:
        found |= {"expert_size": size, "expert_weights": "sigmoid", "shared_expert_size": size}
    pattern = window_fields(hf, types, None)
    chunks = {"attention_chunk_size": hf["attention_chunk_size"]} if "chunked" in pattern["attention"] else {}
    return fields | found | pattern | chunks


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


PARTIAL = {ROPE_KEYS: {"partial_rotary_factor"}}
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
    use_parallel_residual=True, rotary_pct=0.25, rotary_emb_base=10000, **PARTIAL,
)  # fmt: skip


def family(fields: Callable[..., Any], *sizes: int | None, reads: str = "", **others: Any) -> Architecture:
    """An architecture that reads `others`, with these defaults, and of the common keys those named in `reads`."""
    return Architecture(fields, defaults(*sizes, **others), {*others, *reads.split()})


MOE = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.001}
MINISTRAL3_ROPE = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, TRAINED_LENGTH: 16384, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
GPT_OSS_ROPE = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    TRAINED_LENGTH: 4096,
}  # fmt: skip
GRANITE = dict.fromkeys(
    ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"), 1.0
) | {"mlp_bias": False}  # fmt: skip
QWEN_MOE = QWEN_WINDOW | MOE | {
    "num_local_experts": None, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "dual_chunk_attention_config": None,
}  # fmt: skip
LLAMA4_TEXT = family(
    llama4, 202048, 131072, 48, 5120, 40, 8, 8192, head_dim=128, rms_norm_eps=1e-5, rope_theta=5e5,
    intermediate_size_mlp=16384, num_local_experts=16, use_qk_norm=True, attention_chunk_size=8192,
    no_rope_layers=None, no_rope_layer_interval=4, moe_layers=None, interleave_moe_layer_step=1,
    attn_temperature_tuning=True, floor_scale=8192, attn_scale=0.1, reads="attention_bias", **MOE |
    {"num_experts_per_tok": 1},
)  # fmt: skip
# fmt: off
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
    "GPTNeoXForCausalLM": Architecture(
        gpt_neox, NEOX_DEFAULTS, {"rotary_pct", "rotary_emb_base", "attention_bias", "partial_rotary_factor"}
    ),
    "SmolLM3ForCausalLM": family(
        smollm3, 128256, 32768, 36, 2048, 16, 4, 11008, rope_theta=2e6, tie_word_embeddings=True, mlp_bias=False,
        use_sliding_window=False, sliding_window=None, no_rope_layers=None, no_rope_layer_interval=4,
        reads="attention_bias",
    ),
    "GemmaForCausalLM": family(
        gemma, 256000, 8192, 28, 3072, 16, 16, 24576, head_dim=256, tie_word_embeddings=True, hidden_activation=None,
        reads="attention_bias",
    ),
    "CohereForCausalLM": family(
        cohere, 256000, 8192, 40, 8192, 64, None, 22528, rope_theta=5e5, tie_word_embeddings=True,
        layer_norm_eps=1e-5, logit_scale=0.0625, use_qk_norm=False, reads="attention_bias",
    ),
    "Cohere2ForCausalLM": family(
        cohere2, 256000, 8192, 40, 8192, 64, None, 22528, tie_word_embeddings=True, layer_norm_eps=1e-5,
        logit_scale=0.0625, sliding_window=4096, sliding_window_pattern=4,
        reads="attention_bias _sliding_window_pattern",
    ),
    "Exaone4ForCausalLM": family(
        exaone4, 102400, 2048, 32, 4096, 32, 32, 16384, rms_norm_eps=1e-5, sliding_window=4096,
        sliding_window_pattern=4,
    ),
    "OlmoForCausalLM": family(olmo, 50304, 2048, 32, 4096, 32, None, 11008, clip_qkv=None, reads="attention_bias"),
    "Olmo2ForCausalLM": family(
        olmo2, 50304, 2048, 32, 4096, 32, None, 11008, rms_norm_eps=1e-5, reads="attention_bias",
    ),
    "Olmo3ForCausalLM": family(
        olmo3, 50304, 2048, 32, 4096, 32, None, 11008, rms_norm_eps=1e-5, rope_theta=5e5, sliding_window=4096,
        rope_local_base_freq=None, reads="attention_bias",
    ),
    "StableLmForCausalLM": family(
        stablelm, 50304, 4096, 32, 2560, 32, 32, 6912, layer_norm_eps=1e-5, use_qkv_bias=False, qk_layernorm=False,
        use_parallel_residual=False, partial_rotary_factor=0.25, **PARTIAL,
    ),
    "PhiForCausalLM": family(
        phi, 51200, 2048, 24, 2048, 32, None, 8192, hidden_act="gelu_new", layer_norm_eps=1e-5, qk_layernorm=False,
        partial_rotary_factor=0.5, **PARTIAL,
    ),
    "Phi3ForCausalLM": family(
        phi3, 32064, 4096, 32, 3072, 32, None, 8192, rms_norm_eps=1e-5, sliding_window=None,
        partial_rotary_factor=1.0, **PARTIAL,
    ),
    "FalconForCausalLM": family(
        falcon, 65024, 2048, 32, 4544, 71, None, 0, tie_word_embeddings=True, layer_norm_epsilon=1e-5,
        num_kv_heads=None, multi_query=True, new_decoder_architecture=False, parallel_attn=True, bias=False,
        num_ln_in_parallel_attn=None, ffn_hidden_size=None, activation="gelu",
    ),
    "GraniteForCausalLM": family(granite, 32000, 2048, 32, 4096, 32, None, 11008, reads="attention_bias", **GRANITE),
    "GraniteSWAForCausalLM": family(
        granite_swa, 100352, 8192, 24, 2560, 20, 4, 8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        sliding_window=128, layer_rope_theta=None, reads="attention_bias", **GRANITE,
    ),
    "MinistralForCausalLM": family(ministral, 32000, 131072, 32, 4096, 32, 8, 14336, sliding_window=4096),
    "Ministral3ForCausalLM": family(
        ministral3, 131072, 262144, 34, 4096, 32, 8, 14336, head_dim=128, rms_norm_eps=1e-5, sliding_window=None,
        rope_parameters=MINISTRAL3_ROPE, **{ROPE_KEYS: {"llama_4_scaling_beta", "max_position_embeddings"}},
    ),
    "MixtralForCausalLM": family(
        mixtral, 32000, 131072, 32, 4096, 32, 8, 14336, rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None,
        num_local_experts=8, **MOE,
    ),
    "Qwen2MoeForCausalLM": family(
        qwen2_moe, 151936, 32768, 24, 2048, 16, 16, 5632, num_experts=60, moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632, qkv_bias=True, **QWEN_MOE | {"num_experts_per_tok": 4},
    ),
    "Qwen3MoeForCausalLM": family(
        qwen3_moe, 151936, 32768, 24, 2048, 32, 4, 6144, num_experts=128, moe_intermediate_size=768,
        reads="attention_bias", **QWEN_MOE | {"num_experts_per_tok": 8},
    ),
    "GptOssForCausalLM": family(
        gpt_oss, 201088, 131072, 36, 2880, 64, 8, 2880, head_dim=64, rms_norm_eps=1e-5, sliding_window=128,
        num_local_experts=128, swiglu_alpha=1.702, swiglu_limit=7.0, rope_parameters=GPT_OSS_ROPE,
        attention_bias=True, quantization_config=None, reads="experts_per_token", **MOE | {"num_experts_per_tok": 4},
    ),
    "AfmoeForCausalLM": family(
        afmoe, 200192, 16384, 32, 2048, 16, None, 6144, head_dim=128, rms_norm_eps=1e-5, sliding_window=1024,
        num_dense_layers=1, num_experts=64, num_experts_per_tok=6, num_shared_experts=2, route_scale=1.0,
        moe_intermediate_size=1408, mup_enabled=False, global_attn_every_n_layers=4, reads="attention_bias",
    ),
    "Llama4ForCausalLM": LLAMA4_TEXT,
    "Llama4ForConditionalGeneration": LLAMA4_TEXT,
}
# fmt: on
MODEL_TYPES = {  # for a config.json that names no architecture
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "olmo": "OlmoForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "falcon": "FalconForCausalLM",
    "granite": "GraniteForCausalLM",
    "granite_swa": "GraniteSWAForCausalLM",
    "ministral": "MinistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "afmoe": "AfmoeForCausalLM",
    "llama4": "Llama4ForConditionalGeneration",
}  # fmt: skip
