"""The Hugging Face form of a checkpoint: what its weights are called, and what its config.json says. Both directions.

Which names and which architecture apply follows from the config's fields alone.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lit_swa.config import TRAINED_LENGTH, Config
from lit_swa.formats.files import LazyTensor
from lit_swa.linear_formats import group_rows
from lit_swa.model import GPT

# -------------------------------------------------------------------------------------------------------------- weights

# lit name of a module -> Hugging Face name; three names are stacked into one weight, see join_qkv.
LAYER = "model.layers.{i}."
LLAMA_NAMES: dict[str, tuple[str, ...]] = {
    "transformer.wte": ("model.embed_tokens",),
    "transformer.h.{i}.norm_1": (LAYER + "input_layernorm",),
    "transformer.h.{i}.attn.qkv": (LAYER + "self_attn.q_proj", LAYER + "self_attn.k_proj", LAYER + "self_attn.v_proj"),
    "transformer.h.{i}.attn.norm_q": (LAYER + "self_attn.q_norm",),
    "transformer.h.{i}.attn.norm_k": (LAYER + "self_attn.k_norm",),
    "transformer.h.{i}.attn.proj": (LAYER + "self_attn.o_proj",),
    "transformer.h.{i}.norm_2": (LAYER + "post_attention_layernorm",),
    "transformer.h.{i}.mlp.fc_1": (LAYER + "mlp.gate_proj",),
    "transformer.h.{i}.mlp.fc_2": (LAYER + "mlp.up_proj",),
    "transformer.h.{i}.mlp.proj": (LAYER + "mlp.down_proj",),
    "transformer.ln_f": ("model.norm",),
    "lm_head": ("lm_head",),
}
POST_NORM_NAMES = {  # Gemma 2 and 3, which have a norm on both sides of the attention and of the MLP
    "transformer.h.{i}.post_attention_norm": (LAYER + "post_attention_layernorm",),
    "transformer.h.{i}.norm_2": (LAYER + "pre_feedforward_layernorm",),
    "transformer.h.{i}.post_mlp_norm": (LAYER + "post_feedforward_layernorm",),
}
NEOX_LAYER = "gpt_neox.layers.{i}."
NEOX_NAMES: dict[str, tuple[str, ...]] = {
    "transformer.wte": ("gpt_neox.embed_in",),
    "transformer.h.{i}.norm_1": (NEOX_LAYER + "input_layernorm",),
    "transformer.h.{i}.attn.qkv": (NEOX_LAYER + "attention.query_key_value",),
    "transformer.h.{i}.attn.proj": (NEOX_LAYER + "attention.dense",),
    "transformer.h.{i}.norm_2": (NEOX_LAYER + "post_attention_layernorm",),
    "transformer.h.{i}.mlp.fc": (NEOX_LAYER + "mlp.dense_h_to_4h",),
    "transformer.h.{i}.mlp.proj": (NEOX_LAYER + "mlp.dense_4h_to_h",),
    "transformer.ln_f": ("gpt_neox.final_layer_norm",),
    "lm_head": ("embed_out",),
}
# What else may stand before or within the names: a model for images and text holds its language model under a prefix,
# which differs between versions of transformers, and torch's wrappers add their own.
PREFIXES = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.lm_head.": "lm_head."}
WRAPPERS = re.compile(
    r"(^|(?<=\.))(module|_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
ANCHOR = "layers.0.input_layernorm.weight"  # which every architecture has: what stands before it is the prefix
HEADS = re.compile(r"(^|\.)(lm_head|embed_out)\.(?=[^.]+$)")  # GPT-NeoX's has either name
NOT_NEEDED = re.compile(  # buffers that old checkpoints carry, and the parts of a model that see images
    r"rotary_emb\w*\.[^.]+$|(attention|attn)\.(masked_)?bias$|(^|\.)(causal_mask|position_ids)$|"
    r"(^|\.)(vision_tower|multi_modal_projector)\."
)


def hf_module_names(config: Config) -> dict[str, tuple[str, ...]]:
    """The table for a model with these fields."""
    if config.mlp_class_name == "PlainMLP":
        return NEOX_NAMES
    return LLAMA_NAMES | (POST_NORM_NAMES if config.post_attention_norm and config.post_mlp_norm else {})


def hf_names_of(lit_name: str, config: Config) -> tuple[str, ...]:
    """The Hugging Face weights that one lit weight is made of; () if it has no counterpart."""
    module, _, suffix = lit_name.rpartition(".")
    layer = re.search(r"\.h\.(\d+)\.", lit_name)
    pattern = re.sub(r"\.h\.\d+\.", ".h.{i}.", module)
    names = hf_module_names(config).get(pattern, ())
    return tuple(f"{name.format(i=layer and layer[1])}.{suffix}" for name in names)


class _NoInit(TorchFunctionMode):
    """Skip random initialisation: it has no effect on the meta device, and torch would import its compiler for it."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init" or func in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def empty_model(config: Config) -> GPT:
    """A GPT whose parameters have shapes but no memory (the meta device)."""
    with torch.device("meta"), _NoInit():
        return GPT(config)


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight that a checkpoint of this config stores. Nothing is allocated."""
    state = empty_model(config).state_dict()
    if config.tie_embeddings:
        del state["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def join_qkv(parts: tuple[Tensor, ...], config: Config) -> Tensor:
    """Hugging Face's query, key and value weights (or biases) -> attn.qkv: H query heads, then G keys, then G values.

    Three parts are stacked. NeoX stores one, whose rows are q, k, v of the first head, then of the next.
    """
    if len(parts) == 3:
        return torch.cat(parts)
    rest = parts[0].shape[1:]
    by_head = parts[0].view(config.n_head, 3, config.head_size, *rest)  # (H * 3 * D, ...) -> (H, 3, D, ...)
    return by_head.transpose(0, 1).reshape(-1, *rest)  # (3, H, D, ...) -> (3 * H * D, ...)


def split_qkv(qkv: Tensor, n_parts: int, config: Config) -> tuple[Tensor, ...]:
    """The inverse of join_qkv."""
    H, G, D = config.n_head, config.n_query_groups, config.head_size
    if n_parts == 3:
        return qkv.split((H * D, G * D, G * D))
    by_kind = qkv.view(3, H, D, *qkv.shape[1:])  # (3 * H * D, ...) -> (3, H, D, ...)
    return (by_kind.transpose(0, 1).reshape(qkv.shape),)


def to_lit(source: Mapping[str, LazyTensor], config: Config, where: object) -> dict[str, LazyTensor]:
    """Hugging Face's weights under lit names, still lazy. `where` is what an error message calls the checkpoint.

    Raises ValueError when a weight is missing, left over, or of another shape than the config asks for.
    """
    require_layers(config, source, where)
    found = plain_names({n: t for n, t in source.items() if not NOT_NEEDED.search(n)}, config, where)
    result, used = {}, set()
    for lit_name, shape in expected_shapes(config).items():
        names = hf_names_of(lit_name, config)
        missing = [name for name in names if name not in found] or ([] if names else [lit_name])
        if missing:
            raise ValueError(f"{where} lacks the weight {missing[0]}: download it again, or correct config.json.")
        used.update(names)
        result[lit_name] = _joined(lit_name, tuple(found[name] for name in names), shape, config, where)
    tied = hf_names_of("lm_head.weight", config) if config.tie_embeddings else ()
    left_over = [name for name in found if name not in used and name not in tied]
    if left_over:
        raise ValueError(
            f"{where} holds {len(left_over)} weights that the model in its config.json has no place for, such as "
            f"{left_over[0][:80]}: this kind of model is not supported."
        )
    return result


def plain_names(source: Mapping[str, LazyTensor], config: Config, where: object) -> dict[str, LazyTensor]:
    """The weights under the names of the table, without prefixes; of tied ones, the embedding under its own name.

    Raises ValueError where two weights would have the same name.
    """
    [embedding], [head] = (hf_names_of(f"{name}.weight", config) for name in ("transformer.wte", "lm_head"))
    body = embedding.split(".")[0] + "."
    unwrapped = {name: WRAPPERS.sub("", name) for name in source}
    before = {name.removesuffix(ANCHOR) for name in unwrapped.values() if f".{name}".endswith(f".{ANCHOR}")}
    prefix = before.pop() if len(before) == 1 else body
    found: dict[str, LazyTensor] = {}
    for name, plain in unwrapped.items():
        if HEADS.search(plain):
            plain = f"{head.split('.')[0]}.{plain.rpartition('.')[2]}"
        elif plain.startswith(prefix):
            plain = body + plain.removeprefix(prefix)
        if plain in found:
            raise ValueError(f"{where} holds {plain[:80]} twice, once as {name[:80]}: leave one of them.")
        found[plain] = source[name]
    if config.tie_embeddings and embedding not in found and head in found:
        found[embedding] = found[head]
    return found


def have_two_embeddings(source: Mapping[str, LazyTensor], config: Config, where: object) -> bool:
    """True where an input and an output embedding are stored and differ: transformers then does not tie them, whatever
    config.json says."""
    found = plain_names({n: t for n, t in source.items() if not NOT_NEEDED.search(n)}, config, where)
    both = [found.get(hf_names_of(f"{name}.weight", config)[0]) for name in ("transformer.wte", "lm_head")]
    if None in both or both[0].shape != both[1].shape:
        return None not in both
    one, other = (tensor.load() for tensor in both)
    return not torch.equal(one, other.to(one.dtype))


def require_layers(config: Config, tensors: Mapping[str, LazyTensor], where: object) -> None:
    """Before a model is built: every layer needs weights, so a config with more layers than weights is wrong."""
    if config.n_layer > len(tensors):
        raise ValueError(
            f"{where} holds {len(tensors)} weights and its config asks for {config.n_layer} layers: they do not "
            "belong together."
        )


def _joined(
    name: str, parts: tuple[LazyTensor, ...], shape: tuple[int, ...], config: Config, where: object
) -> LazyTensor:
    rows = sum(part.shape[0] if part.shape else 0 for part in parts)
    dtype = parts[0].dtype
    for part in parts:
        if (rows, *part.shape[1:]) != shape or not part.dtype.is_floating_point:
            raise ValueError(
                f"{where} holds {hf_names_of(name, config)[0]} as {list(part.shape)} {part.dtype}, which does not "
                f"fit the {list(shape)} that its config.json asks for."
            )
        dtype = torch.promote_types(dtype, part.dtype) if dtype != part.dtype else dtype
    if ".qkv." not in name:
        return parts[0]
    if len(parts) == 3:
        H, G, D = config.n_head, config.n_query_groups, config.head_size
        if [part.shape[0] for part in parts] != [H * D, G * D, G * D]:
            raise ValueError(
                f"{where} has other numbers of heads in layer weights such as {name} than in its config.json."
            )
    return LazyTensor(shape, dtype, lambda: join_qkv(tuple(part.load().to(dtype) for part in parts), config))


def to_hf(tensors: Mapping[str, LazyTensor], config: Config) -> dict[str, LazyTensor]:
    """Lit weights under Hugging Face names, still lazy. Raises ValueError for a weight that has no counterpart."""
    result = {}
    for lit_name, tensor in tensors.items():
        names = hf_names_of(lit_name, config)
        if not names:
            raise ValueError(
                f"The weight {lit_name} has no counterpart in Hugging Face's models: it cannot be exported."
            )
        if ".qkv." not in lit_name:
            result[names[0]] = tensor
            continue
        if len(names) == 1:
            result[names[0]] = tensor._replace(load=_in_their_order(tensor, config))
            continue
        for group, name in zip("qkv", names, strict=True):
            result[name] = tensor.rows(*group_rows(group, tensor.shape[0], config.n_head, config.n_query_groups))
    return result


def _in_their_order(qkv: LazyTensor, config: Config) -> Callable[[], Tensor]:
    return lambda: split_qkv(qkv.load(), 1, config)[0]


# ---------------------------------------------------------------------------------------------------------- config.json

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
ROPE_TYPES = ("linear", "dynamic", "yarn", "longrope", "llama3")
STRETCHED = ("dynamic", "yarn")  # their block_size is at least the trained length times the factor
LAYER_TYPES = {"full": "full_attention", "sliding": "sliding_attention"}


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


def _gemma2(c: Config) -> dict[str, Any]:
    scalar = c.head_size if c.attention_scores_scalar is None else c.attention_scores_scalar
    return _windows(c) | {
        "hidden_activation": ACTIVATIONS[c.activation], "attention_bias": c.attn_bias, "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": c.attention_logit_softcapping, "final_logit_softcapping": c.final_logit_softcapping,
    }  # fmt: skip


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


# Architecture, model_type, and the fields that it adds. An export takes the first that reads back as the same Config.
EXPORTS: list[tuple[str, str, Callable[[Config], dict[str, Any]]]] = [
    ("LlamaForCausalLM", "llama", lambda c: {"attention_bias": c.attn_bias, "mlp_bias": c.mlp_bias}),
    ("MistralForCausalLM", "mistral", lambda c: {"sliding_window": c.sliding_window_size}),
    ("Qwen2ForCausalLM", "qwen2", _windows),
    ("Qwen3ForCausalLM", "qwen3", lambda c: _windows(c) | {"attention_bias": c.attn_bias}),
    ("Gemma2ForCausalLM", "gemma2", _gemma2),
    (
        "Gemma3ForCausalLM",
        "gemma3_text",
        lambda c: (
            _gemma2(c)
            | {"rope_local_base_freq": c.rope_base if c.rope_local_base_freq is None else c.rope_local_base_freq}
        ),
    ),
    ("GPTNeoXForCausalLM", "gpt_neox", _neox),
    ("SmolLM3ForCausalLM", "smollm3", _smollm3),
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
)


def config_to_hf(config: Config) -> dict[str, Any]:
    """The config.json of the Hugging Face architecture that computes the same.

    Each candidate is read back by Config.from_hf, so a field that it cannot express is noticed. Raises ValueError,
    naming such a field, when no architecture fits.
    """
    unlike = []
    for architecture, model_type, fields_of in EXPORTS:
        hf = {"architectures": [architecture], "model_type": model_type} | _common(config) | fields_of(config)
        try:
            unlike.append((_differences(config, Config.from_hf(hf)), architecture))
        except ValueError as error:
            unlike.append(([str(error)] * 99, architecture))
            continue
        if not unlike[-1][0]:
            return hf
    fields, architecture = min(unlike, key=lambda item: len(item[0]))
    raise ValueError(
        f"No Hugging Face architecture computes what this config asks for; {architecture} comes nearest and "
        f"differs in {', '.join(fields[:4])}."
    )


def _differences(config: Config, other: Config) -> list[str]:
    a, b = (asdict(_canonical(c)) for c in (config, other))
    changed = [name for name in a if a[name] != b[name] and name not in NOT_EXPORTED]
    if config.rope_scaling and config.rope_scaling["type"] not in ROPE_TYPES:
        changed.append("rope_scaling")
    return changed


def _canonical(c: Config) -> Config:
    """The same model with its defaults spelled out, so that equal models have equal fields."""
    variants = c.layer_variants
    windowed = "full" != min(variants) or "full" != max(variants)
    scaling = c.rope_scaling or {}
    reach = int(scaling.get(TRAINED_LENGTH, 0) * scaling.get("factor", 0)) if scaling.get("type") in STRETCHED else 0
    return replace(
        c,
        block_size=max(c.block_size, reach),
        attention=",".join(variants),
        positions=",".join(c.layer_positions),
        sliding_window_size=c.sliding_window_size if windowed else None,
        rope_local_base_freq=None if c.rope_local_base_freq == c.rope_base or not windowed else c.rope_local_base_freq,
        attention_scores_scalar=c.head_size if c.attention_scores_scalar is None else c.attention_scores_scalar,
    )
