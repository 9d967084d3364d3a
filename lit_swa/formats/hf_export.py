"""The config.json of an export: the first architecture that computes what the config's fields ask for."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from lit_swa.config import BY_LAYER, OF_THE_WEIGHTS, TRAINED_LENGTH, Config

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
LEFT_OUT: Any = ...  # in the place of a value: the architecture has no such key
ROPE_TYPES = ("linear", "dynamic", "yarn", "longrope", "llama3")
STRETCHED = ("dynamic", "yarn")  # their block_size is at least the trained length times the factor
CHUNKS = "dual_chunk_attention_config"  # of Qwen2.5-1M
LAYER_TYPES = {"full": "full_attention", "sliding": "sliding_attention", "chunked": "chunked_attention"}


def _common(c: Config) -> dict[str, Any]:
    scaling, context = c.rope_scaling and {"rope_type": c.rope_scaling["type"], **c.rope_scaling}, c.block_size
    if scaling and scaling["type"] == "dynamic":
        context = scaling.pop(TRAINED_LENGTH)
    return {
        "num_hidden_layers": c.n_layer, "hidden_size": c.n_embd, "intermediate_size": c.intermediate_size,
        "num_attention_heads": c.n_head, "num_key_value_heads": c.n_query_groups, "head_dim": c.head_size,
        "max_position_embeddings": context, "vocab_size": c.padded_vocab_size,
        "tie_word_embeddings": c.tie_embeddings, "rms_norm_eps": c.norm_eps, "hidden_act": ACTIVATIONS[c.activation],
        "rope_theta": c.rope_base, "rope_scaling": scaling,
    }  # fmt: skip


def _windows(c: Config) -> dict[str, Any]:
    types = [LAYER_TYPES.get(variant, variant) for variant in c.layer_variants]
    window = c.sliding_window_size if "sliding_attention" in types else None
    return {
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "layer_types": types,
        "max_window_layers": 0,
    }


def _qwen2(c: Config) -> dict[str, Any]:
    """Qwen2.5-1M's chunks stand in a key of their own, beside layers in full."""
    if set(c.layer_variants) != {"dual_chunk"}:
        return _windows(c)
    chunks = {
        "chunk_size": c.chunk_size + c.chunk_local,
        "local_size": c.chunk_local,
        TRAINED_LENGTH: c.chunk_trained,
    }
    return _windows(c.override(attention="full")) | {CHUNKS: chunks}


def _gemma2(c: Config) -> dict[str, Any]:
    scalar = c.head_size if c.attention_scores_scalar is None else c.attention_scores_scalar
    scalar = int(scalar) if scalar == int(scalar) else scalar  # transformers asks for an int
    return _layers(c) | {
        "hidden_activation": ACTIVATIONS[c.activation], "attention_bias": c.attn_bias, "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": c.attention_logit_softcapping, "final_logit_softcapping": c.final_logit_softcapping,
    }  # fmt: skip


def _gemma_activation(c: Config) -> dict[str, Any]:
    """transformers reads hidden_act, and warns of hidden_activation."""
    return {"hidden_act": ACTIVATIONS[c.activation], "hidden_activation": ACTIVATIONS[c.activation]}


def _gemma3(c: Config) -> dict[str, Any]:
    local = c.rope_base if c.rope_local_base_freq is None else c.rope_local_base_freq
    return _gemma2(c) | {"rope_local_base_freq": local}


def _neox(c: Config) -> dict[str, Any]:
    return {
        "layer_norm_eps": c.norm_eps,
        "rotary_pct": c.rotary_percentage,
        "attention_bias": c.attn_bias,
        "use_parallel_residual": c.parallel_residual,
        "rotary_emb_base": c.rope_base,
    }


def _smollm3(c: Config) -> dict[str, Any]:
    rotated = [int(kind == "rope") for kind in c.layer_positions]
    return _windows(c) | {"attention_bias": c.attn_bias, "mlp_bias": c.mlp_bias, "no_rope_layers": rotated}


def _biases(c: Config) -> dict[str, Any]:
    return {"attention_bias": c.attn_bias, "mlp_bias": c.mlp_bias}


def _cohere(c: Config) -> dict[str, Any]:
    return {
        "layer_norm_eps": c.norm_eps, "logit_scale": c.logit_multiplier, "attention_bias": c.attn_bias,
        "use_qk_norm": c.norm_qk,
    }  # fmt: skip


def _cohere2(c: Config) -> dict[str, Any]:
    return {key: value for key, value in _cohere(c).items() if key != "use_qk_norm"} | _layers(c)


def _layers(c: Config) -> dict[str, Any]:
    """Their classes make the mask of a window also where layer_types has none, so there is always a number."""
    return {"layer_types": _windows(c)["layer_types"], "sliding_window": c.sliding_window_size or c.block_size}


def _exaone4(c: Config) -> dict[str, Any]:
    there = "none" in c.layer_positions or "sliding" in c.layer_variants  # without a window, all layers have RoPE
    window = (c.sliding_window_size or c.block_size) if there else None
    return _layers(c) | {"sliding_window": window, "sliding_window_pattern": c.n_layer + 1}


def _olmo3(c: Config) -> dict[str, Any]:
    """RoPE by the kind of layer, as transformers 5 has it."""
    full = {"rope_type": "default", **(c.rope_scaling or {}), "rope_theta": c.rope_base}
    full["rope_type"] = full.pop("type", "default")
    local = {"rope_type": "default", "rope_theta": c.rope_local_base_freq or c.rope_base}
    parameters = {"full_attention": full, "sliding_attention": local}
    return _layers(c) | {"attention_bias": c.attn_bias, "rope_parameters": parameters, "rope_scaling": None}


def _stablelm(c: Config) -> dict[str, Any]:
    return {
        "layer_norm_eps": c.norm_eps, "use_qkv_bias": c.attn_bias, "qk_layernorm": c.norm_qk,
        "use_parallel_residual": c.parallel_residual, "partial_rotary_factor": c.rotary_percentage,
    }  # fmt: skip


def _phi(c: Config) -> dict[str, Any]:
    return {
        "layer_norm_eps": c.norm_eps,
        "qk_layernorm": c.norm_qk,
        "partial_rotary_factor": c.rotary_percentage,
    }


def _phi3(c: Config) -> dict[str, Any]:
    if (c.rope_scaling or {"type": "longrope"})["type"] != "longrope":
        raise ValueError("its scaling of RoPE is longrope")
    lengths = {TRAINED_LENGTH: c.rope_scaling[TRAINED_LENGTH]} if TRAINED_LENGTH in (c.rope_scaling or {}) else {}
    return {"sliding_window": c.sliding_window_size, "partial_rotary_factor": c.rotary_percentage} | lengths


def _falcon(c: Config) -> dict[str, Any]:
    """One key/value head, as many as query heads, or groups; with groups there are two norms unless it says 1."""
    one, each = c.n_query_groups == 1, c.n_query_groups == c.n_head
    new = not (one or each) or c.parallel_residual and not c.shared_norm
    return {
        "layer_norm_epsilon": c.norm_eps, "num_kv_heads": c.n_query_groups, "multi_query": one, "bias": c.attn_bias,
        "new_decoder_architecture": new, "parallel_attn": c.parallel_residual, "alibi": False,
        "num_ln_in_parallel_attn": (1 if c.shared_norm else 2) if new else None,
        "activation": ACTIVATIONS[c.activation], "ffn_hidden_size": c.intermediate_size, "head_dim": LEFT_OUT,
    }  # fmt: skip


def _granite(c: Config) -> dict[str, Any]:
    scalar = c.head_size if c.attention_scores_scalar is None else c.attention_scores_scalar
    return _biases(c) | {
        "embedding_multiplier": c.embedding_multiplier, "residual_multiplier": c.residual_multiplier,
        "logits_scaling": 1.0 / c.logit_multiplier, "attention_multiplier": scalar**-0.5,
    }  # fmt: skip


def _granite_swa(c: Config) -> dict[str, Any]:
    bases = {"none": 0, "rope": c.rope_base}
    thetas = [bases[where] if where in bases else float(where) for where in c.layer_positions]
    return _granite(c) | _layers(c) | {"layer_rope_theta": thetas}


def _ministral3(c: Config) -> dict[str, Any]:
    scaling = c.rope_scaling or {}
    if c.temperature_slope is None or TRAINED_LENGTH not in scaling:
        raise ValueError("it has a temperature and a scaling of RoPE")
    rope = {"rope_type": scaling["type"], **scaling, "rope_theta": c.rope_base}
    rope |= {"llama_4_scaling_beta": c.temperature_slope}
    return {"sliding_window": c.sliding_window_size, "rope_parameters": rope, "rope_scaling": None}


def _experts(c: Config) -> dict[str, Any]:
    if c.n_expert is None:
        raise ValueError("it has experts")
    return {
        "num_local_experts": c.n_expert,
        "num_experts_per_tok": c.n_expert_per_token,
        "router_aux_loss_coef": c.balancing_loss,
    }


def _mixtral(c: Config) -> dict[str, Any]:
    return _experts(c) | {"sliding_window": c.sliding_window_size, "intermediate_size": c.expert_size}


def _qwen_moe(c: Config) -> dict[str, Any]:
    without = [i for i, mlp in enumerate(c.layer_mlps) if mlp != "MoE"]
    experts = {key: value for key, value in _experts(c).items() if key != "num_local_experts"}
    return _windows(c) | experts | {
        "num_experts": c.n_expert, "moe_intermediate_size": c.expert_size, "mlp_only_layers": without,
        "norm_topk_prob": c.expert_weights == "chosen",
    }  # fmt: skip


def _qwen2_moe(c: Config) -> dict[str, Any]:
    return _qwen_moe(c) | {"shared_expert_intermediate_size": c.shared_expert_size, "qkv_bias": c.attn_bias}


def _qwen3_moe(c: Config) -> dict[str, Any]:
    return _qwen_moe(c) | {"attention_bias": c.attn_bias}


def _gpt_oss(c: Config) -> dict[str, Any]:
    """Without a scaling it says so: its class has YaRN where nothing is said."""
    experts = _experts(c) | {"swiglu_limit": c.expert_limit, "swiglu_alpha": c.expert_slope}
    rope = {} if c.rope_scaling else {"rope_parameters": {"rope_type": "default", "rope_theta": c.rope_base}}
    return _layers(c) | experts | rope | {"intermediate_size": c.expert_size, "attention_bias": c.attn_bias}


def _afmoe(c: Config) -> dict[str, Any]:
    """Its layers without experts come first."""
    mlps = c.layer_mlps
    dense = mlps.index("MoE") if "MoE" in mlps else c.n_layer
    shared, rest = divmod(c.shared_expert_size or 0, c.expert_size or 1)
    if "GatedMLP" in mlps[dense:] or rest:
        raise ValueError("its layers without experts come first")
    experts = {} if c.n_expert is None else {
        "num_experts": c.n_expert, "num_experts_per_tok": c.n_expert_per_token, "num_shared_experts": shared,
        "moe_intermediate_size": c.expert_size, "route_scale": c.expert_scale,
    }  # fmt: skip
    own = {"num_dense_layers": dense, "mup_enabled": c.scale_embeddings, "attention_bias": c.attn_bias}
    return _layers(c) | experts | own


def _llama4(c: Config) -> dict[str, Any]:
    rotated = [int(where == "rope") for where in c.layer_positions]
    moe = [i for i, mlp in enumerate(c.layer_mlps) if mlp == "MoE"]
    tempered = c.temperature_slope is not None
    return _experts(c) | {
        "intermediate_size": c.expert_size, "intermediate_size_mlp": c.intermediate_size, "moe_layers": moe,
        "no_rope_layers": rotated, "use_qk_norm": c.norm_qk,
        "attention_chunk_size": c.attention_chunk_size or c.block_size,
        "layer_types": [LAYER_TYPES.get(variant, variant) for variant in c.layer_variants],
        "attn_temperature_tuning": tempered, "attn_scale": c.temperature_slope if tempered else 0.1,
        "floor_scale": c.temperature_length or 8192, "attention_bias": c.attn_bias,
    }  # fmt: skip


# Architecture, model_type, and the fields that it adds. An export takes the first that reads back as the same Config.
EXPORTS: list[tuple[str, str, Callable[[Config], dict[str, Any]]]] = [
    ("LlamaForCausalLM", "llama", _biases),
    ("MistralForCausalLM", "mistral", lambda c: {"sliding_window": c.sliding_window_size}),
    ("Qwen2ForCausalLM", "qwen2", _qwen2),
    ("Qwen3ForCausalLM", "qwen3", lambda c: _windows(c) | {"attention_bias": c.attn_bias}),
    ("GemmaForCausalLM", "gemma", lambda c: _gemma_activation(c) | {"attention_bias": c.attn_bias}),
    ("Gemma2ForCausalLM", "gemma2", _gemma2),
    ("Gemma3ForCausalLM", "gemma3_text", _gemma3),
    ("GPTNeoXForCausalLM", "gpt_neox", _neox),
    ("SmolLM3ForCausalLM", "smollm3", _smollm3),
    ("CohereForCausalLM", "cohere", _cohere),
    ("Cohere2ForCausalLM", "cohere2", _cohere2),
    ("Exaone4ForCausalLM", "exaone4", _exaone4),
    ("OlmoForCausalLM", "olmo", lambda c: {"attention_bias": c.attn_bias, "clip_qkv": c.clip_qkv}),
    ("Olmo2ForCausalLM", "olmo2", lambda c: {"attention_bias": c.attn_bias}),
    ("Olmo3ForCausalLM", "olmo3", _olmo3),
    ("StableLmForCausalLM", "stablelm", _stablelm),
    ("PhiForCausalLM", "phi", _phi),
    ("Phi3ForCausalLM", "phi3", _phi3),
    ("FalconForCausalLM", "falcon", _falcon),
    ("GraniteForCausalLM", "granite", _granite),
    ("GraniteSWAForCausalLM", "granite_swa", _granite_swa),
    ("MinistralForCausalLM", "ministral", _layers),
    ("Ministral3ForCausalLM", "ministral3", _ministral3),
    ("MixtralForCausalLM", "mixtral", _mixtral),
    ("Qwen2MoeForCausalLM", "qwen2_moe", _qwen2_moe),
    ("Qwen3MoeForCausalLM", "qwen3_moe", _qwen3_moe),
    ("GptOssForCausalLM", "gpt_oss", _gpt_oss),
    ("AfmoeForCausalLM", "afmoe", _afmoe),
    ("Llama4ForCausalLM", "llama4_text", _llama4),
]
# Fields that say how the model is run, not what it computes.
NOT_EXPORTED = (
    "name",
    "attention_backend",
    "rolling_kv_cache",
    "vocab_size",
    "padded_vocab_size",
    "s2_attention",
    "s2_group_ratio",
    "s2_group_size",
    "s2_shift",
    "n_sink_tokens",
    "balancing_loss",
)


def config_to_hf(config: Config) -> dict[str, Any]:
    """The config.json of the Hugging Face architecture that computes the same.

    Each candidate is read back by Config.from_hf, so a field that it cannot express is noticed. Raises ValueError,
    naming such a field, when no architecture fits.
    """
    require_softmax(config)
    unlike = []
    for architecture, model_type, fields_of in EXPORTS:
        try:
            hf = {"architectures": [architecture], "model_type": model_type} | _common(config) | fields_of(config)
            hf = {key: value for key, value in hf.items() if value is not LEFT_OUT}
            unlike.append((_differences(config, Config.from_hf(hf)), architecture))
        except (ValueError, TypeError, KeyError) as error:  # such as a field that is None here
            unlike.append(([str(error)] * 99, architecture))
            continue
        if not unlike[-1][0]:
            return hf
    fields, architecture = min(unlike, key=lambda item: len(item[0]))
    raise ValueError(
        f"No Hugging Face architecture computes what this config asks for; {architecture} comes nearest and "
        f"differs in {', '.join(fields[:4])}."
    )


def require_softmax(config: Config) -> None:
    """Raises ValueError for linear attention, which no other program computes."""
    if "linear" in config.layer_variants:
        raise ValueError(
            "Linear attention is computed here alone, so it is not exported: export the softmax checkpoint that was "
            "made linear."
        )


def architecture_of(config: Config) -> str:
    """The architecture whose names an export has. How far a query sees, how RoPE is scaled, and
    how many heads a layer has, changes no name."""
    rest = OF_THE_WEIGHTS - {
        "positions",
        *BY_LAYER,
        *(name for name in OF_THE_WEIGHTS if name.startswith("temperature")),
    }
    plain = Config(**{name: getattr(config.of_layer(0), name) for name in rest})
    try:
        return config_to_hf(plain)["architectures"][0]
    except ValueError:
        behind = config.post_attention_norm and config.post_mlp_norm
        plain_mlp = "PlainMLP" in config.layer_mlps
        return "GPTNeoXForCausalLM" if plain_mlp else "Gemma2ForCausalLM" if behind else "LlamaForCausalLM"


def _differences(config: Config, other: Config) -> list[str]:
    a, b = (asdict(canonical(c)) for c in (config, other))
    changed = [name for name in a if a[name] != b[name] and name not in NOT_EXPORTED]
    if config.rope_scaling and config.rope_scaling["type"] not in ROPE_TYPES:
        changed.append("rope_scaling")
    return changed


def canonical(c: Config) -> Config:
    """The same model with its defaults spelled out, so that equal models have equal fields."""
    variants = c.layer_variants
    windowed = "full" != min(variants) or "full" != max(variants)
    scaling = c.rope_scaling or {}
    same = c.rope_local_base_freq == c.rope_base and not scaling  # which is for rope_base only
    reach = int(scaling.get(TRAINED_LENGTH, 0) * scaling.get("factor", 0)) if scaling.get("type") in STRETCHED else 0
    return replace(
        c,
        block_size=max(c.block_size, reach),
        attention=",".join(variants),
        positions=",".join(w if w in ("rope", "none") else f"{float(w):g}" for w in c.layer_positions),
        mlp_class_name=",".join(c.layer_mlps),
        sliding_window_size=c.sliding_window_size if windowed else None,
        rope_local_base_freq=None if same or not windowed else c.rope_local_base_freq,
        attention_scores_scalar=c.head_size if c.attention_scores_scalar is None else c.attention_scores_scalar,
    )
