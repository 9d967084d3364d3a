"""Named model shapes (data only), and the mapping of a Hugging Face config.json to the fields of Config."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_swa.config import ROPE_SCALING_KEYS, TRAINED_LENGTH
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
    "Meta-Llama-3-8B": LLAMA3 | shape(32, 4096, 32, 8, 14336),
    "Llama-3.1-8B": LLAMA31 | shape(32, 4096, 32, 8, 14336),
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
    layer_types) are read. Raises ValueError, in one sentence, for what is missing or not supported.
    """
    hf = path_or_dict if isinstance(path_or_dict, dict) else read_hf_config(Path(path_or_dict))
    if isinstance(hf.get("text_config"), dict):  # a model for images and text: its language model
        hf = hf["text_config"] | {"architectures": hf.get("architectures"), "name": hf.get("_name_or_path")}
    architecture = find_architecture(hf)
    try:
        values = common_fields(hf) | ARCHITECTURES[architecture](hf)
    except KeyError as missing:
        raise ValueError(f"The Hugging Face config of a {architecture} has no {missing}: it is not complete.") from None
    except (TypeError, AttributeError) as e:
        raise ValueError(f"The Hugging Face config of a {architecture} holds a value of a wrong type: {e}.") from None
    return values


def read_hf_config(path: Path) -> dict[str, Any]:
    """The content of a config.json, given as a file or by its directory."""
    if not path.is_dir():
        return read_json(path)
    if not is_listed(path / "config.json"):
        raise FileNotFoundError(f"There is no {path / 'config.json'}: a Hugging Face checkpoint directory holds one.")
    return read_json(find_inside(path, "config.json"))


def find_architecture(hf: dict[str, Any]) -> str:
    named = hf.get("architectures") or []
    by_model_type = {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "gemma2": "Gemma2ForCausalLM",
        "gemma3_text": "Gemma3ForCausalLM",
        "gpt_neox": "GPTNeoXForCausalLM",
    }
    architecture = named[0] if isinstance(named, list) and named else by_model_type.get(str(hf.get("model_type")))
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(
            f"The architecture {architecture or hf.get('model_type')!r} is not supported: "
            f"choose a checkpoint of {', '.join(sorted(ARCHITECTURES))}."
        )
    return architecture


def common_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """The fields that every architecture stores under the same keys."""
    rope, local = read_rope(hf)
    n_head = hf["num_attention_heads"]
    return {
        "name": str(hf.get("name") or hf.get("_name_or_path") or ""),
        "n_layer": hf["num_hidden_layers"],
        "n_head": n_head,
        "n_query_groups": n_head if hf.get("num_key_value_heads") is None else hf["num_key_value_heads"],
        "n_embd": hf["hidden_size"],
        "head_size": hf["hidden_size"] // n_head if hf.get("head_dim") is None else hf["head_dim"],
        "intermediate_size": hf["intermediate_size"],
        "vocab_size": hf["vocab_size"],
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "rope_base": float(rope.get("rope_theta", 10000.0)),
        "rope_local_base_freq": local,
        **rope_fields(hf, rope),
        "activation": ACTIVATION_NAMES[checked_activation(hf)],
    }


ACTIVATION_NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}


def checked_activation(hf: dict[str, Any]) -> str:
    name = hf.get("hidden_activation") or hf.get("hidden_act") or "silu"
    if name not in ACTIVATION_NAMES:
        raise ValueError(f"The activation {name!r} is not supported: it must be one of {', '.join(ACTIVATION_NAMES)}.")
    return name


def read_rope(hf: dict[str, Any]) -> tuple[dict[str, Any], float | None]:
    """The RoPE parameters of the layers that attend in full, and the base of those with a window if it differs."""
    rope = hf.get("rope_parameters")
    if isinstance(rope, dict) and isinstance(rope.get("full_attention"), dict):  # one entry per kind of layer
        return rope["full_attention"], float(rope["sliding_attention"]["rope_theta"])
    if not isinstance(rope, dict):
        rope = dict(hf.get("rope_scaling") or {})
    defaults = {"rope_theta": hf.get("rope_theta", hf.get("rotary_emb_base"))}
    rope = {k: v for k, v in defaults.items() if v is not None} | rope
    return rope, hf.get("rope_local_base_freq")


def rope_fields(hf: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """Config's rope_scaling and block_size for Hugging Face's scaling. Config checks the values.

    max_position_embeddings is often the trained length in configs with linear or dynamic scaling, and the trained
    length times the factor in the others. block_size is the greater of both.
    """
    kind, context = rope.get("rope_type", rope.get("type", "default")), hf["max_position_embeddings"]
    if kind == "default":
        return {"rope_scaling": None, "block_size": context}
    needed, welcome = ROPE_SCALING_KEYS.get(kind, (set(rope), set()))
    scaling = {"type": kind} | {k: v for k, v in rope.items() if k in needed | welcome and v is not None}
    trained = context if kind == "dynamic" else rope.get(TRAINED_LENGTH) or hf.get(TRAINED_LENGTH) or context
    if TRAINED_LENGTH in needed:
        scaling[TRAINED_LENGTH] = trained
    if "factor" not in scaling and kind in ("yarn", "longrope"):
        scaling["factor"] = context / trained
    factor = scaling["factor"] if kind in ("linear", "dynamic", "yarn") and "factor" in scaling else 1.0
    return {"rope_scaling": scaling, "block_size": max(context, int(trained * factor))}


def window_fields(hf: dict[str, Any], layer_types: list[str] | None) -> dict[str, Any]:
    """The attention pattern from Hugging Face's layer_types and sliding_window."""
    window = hf.get("sliding_window")
    if window is None or not layer_types or "sliding_attention" not in layer_types:
        return {"attention": "full"}
    names = {"sliding_attention": "sliding", "full_attention": "full"}
    unknown = sorted({str(t) for t in layer_types} - set(names))
    if unknown:
        raise ValueError(
            f"The layer type {unknown[0]!r} is not supported: layers are full_attention or sliding_attention."
        )
    pattern = [names[t] for t in layer_types]
    return {"attention": ",".join(shortest_period(pattern)), "sliding_window_size": window}


def shortest_period(pattern: list[str]) -> list[str]:
    """The shortest list that, tiled and cut, gives the pattern."""
    for p in range(1, len(pattern)):
        if all(pattern[i] == pattern[i % p] for i in range(len(pattern))):
            return pattern[:p]
    return pattern


def llama(hf: dict[str, Any]) -> dict[str, Any]:
    bias = hf.get("attention_bias", False)
    return {"attn_bias": bias, "attn_proj_bias": bias, "mlp_bias": hf.get("mlp_bias", False)}


def mistral(hf: dict[str, Any]) -> dict[str, Any]:
    return window_fields(hf, ["sliding_attention"] * hf["num_hidden_layers"])


def qwen2(hf: dict[str, Any]) -> dict[str, Any]:
    return {"attn_bias": True} | window_fields(hf, qwen_layer_types(hf))


def qwen3(hf: dict[str, Any]) -> dict[str, Any]:
    bias = hf.get("attention_bias", False)
    return {"norm_qk": True, "attn_bias": bias, "attn_proj_bias": bias} | window_fields(hf, qwen_layer_types(hf))


def qwen_layer_types(hf: dict[str, Any]) -> list[str] | None:
    """Qwen gives the window to the layers from max_window_layers on, and only if use_sliding_window says so."""
    if not hf.get("use_sliding_window"):
        return None
    n = hf["num_hidden_layers"]
    first = min(n, hf.get("max_window_layers", n))
    return hf.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * (n - first)


def gemma2(hf: dict[str, Any]) -> dict[str, Any]:
    pattern = [("sliding_attention", "full_attention")[i % 2] for i in range(hf["num_hidden_layers"])]
    bias = hf.get("attention_bias", False)
    return {
        "norm_unit_offset": True,
        "post_attention_norm": True,
        "post_mlp_norm": True,
        "scale_embeddings": True,
        "tie_embeddings": hf.get("tie_word_embeddings", True),
        "activation": gemma_activation(hf),
        "attn_bias": bias,
        "attn_proj_bias": bias,
        "attention_scores_scalar": hf.get("query_pre_attn_scalar", 256),
        "attention_logit_softcapping": hf.get("attn_logit_softcapping"),
        "final_logit_softcapping": hf.get("final_logit_softcapping"),
    } | window_fields(hf, hf.get("layer_types") or pattern)


def gemma_activation(hf: dict[str, Any]) -> str:
    """Old Gemma configs say "gelu" in hidden_act and mean the tanh form, so only hidden_activation is read."""
    return ACTIVATION_NAMES[hf.get("hidden_activation") or "gelu_pytorch_tanh"]


def gemma3(hf: dict[str, Any]) -> dict[str, Any]:
    n, every = hf["num_hidden_layers"], hf.get("sliding_window_pattern") or 6
    pattern = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(n)]
    values = gemma2(hf | {"layer_types": hf.get("layer_types") or pattern})
    values["norm_qk"] = True
    if "rope_parameters" not in hf:
        values["rope_base"] = float(hf.get("rope_theta", 1e6))
        values["rope_local_base_freq"] = float(hf.get("rope_local_base_freq", 1e4))
    return values


def gpt_neox(hf: dict[str, Any]) -> dict[str, Any]:
    rope = hf.get("rope_parameters") or {}
    bias = hf.get("attention_bias", True)
    return {
        "norm_class_name": "LayerNorm",
        "mlp_class_name": "PlainMLP",
        "norm_eps": hf.get("layer_norm_eps", 1e-5),
        "attn_bias": bias,
        "attn_proj_bias": bias,
        "mlp_bias": True,
        "parallel_residual": hf.get("use_parallel_residual", True),
        "rotary_percentage": float(rope.get("partial_rotary_factor", hf.get("rotary_pct", 0.25))),
    }


ARCHITECTURES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "Gemma3ForConditionalGeneration": gemma3,
    "GPTNeoXForCausalLM": gpt_neox,
}
