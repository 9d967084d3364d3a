"""What the architectures of Hugging Face call their weights, and how these are laid out: a row of NAMES each."""

from collections.abc import Callable
from typing import NamedTuple

from lit_swa.config import Config

Table = dict[str, tuple[str, ...]]
LAYER = "model.layers.{i}."
LIT = "transformer.h.{i}."


class Names(NamedTuple):
    """table: lit name of a module -> Hugging Face's. Several names are joined: those of q, k and v row by row, others
    as layers of a stack; "{e}" stands for every expert and "{h}" for every head. One name of qkv holds the rows of q, k
    and v of the first key/value head, then of the next."""

    table: Table
    neighbours: bool = False  # RoPE turns the elements 2j and 2j + 1 of a head, where ours turns j and j + D / 2
    fused: dict[str, tuple[str, ...]] = {}  # a stored module -> those of the table whose rows it holds, in order
    packed: str | None = None  # experts are stored as (E, in, out), gate and up "halves" of one or "interleaved"


def layer(prefix: str = LAYER, **modules: str) -> Table:
    """Lit names within a layer, "__" for a dot -> names behind the prefix."""
    return {LIT + name.replace("__", "."): (prefix + modules[name],) for name in modules}


LLAMA: Table = {
    "transformer.wte": ("model.embed_tokens",),
    LIT + "attn.qkv": (LAYER + "self_attn.q_proj", LAYER + "self_attn.k_proj", LAYER + "self_attn.v_proj"),
    "transformer.ln_f": ("model.norm",),
    "lm_head": ("lm_head",),
} | layer(
    norm_1="input_layernorm", attn__norm_q="self_attn.q_norm", attn__norm_k="self_attn.k_norm",
    attn__proj="self_attn.o_proj", norm_2="post_attention_layernorm", mlp__fc_1="mlp.gate_proj",
    mlp__fc_2="mlp.up_proj", mlp__proj="mlp.down_proj",
)  # fmt: skip
BEHIND = layer(post_attention_norm="post_attention_layernorm", post_mlp_norm="post_feedforward_layernorm")
GEMMA = LLAMA | BEHIND | layer(norm_2="pre_feedforward_layernorm")
SINKS = {LIT + "attn.mixer.sink_logits": (LAYER + "self_attn.sinks",)}
HEADS = {LIT + f"attn.norm_{x}": (LAYER + f"self_attn.{x}_layernorm.norms.{{h}}",) for x in "qk"}
PHI = LLAMA | {"transformer.ln_f": ("model.final_layernorm",)} | layer(
    attn__proj="self_attn.dense", attn__norm_q="self_attn.q_layernorm", attn__norm_k="self_attn.k_layernorm",
    mlp__fc="mlp.fc1", mlp__proj="mlp.fc2",
)  # fmt: skip
PHI3 = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
NEOX: Table = {
    "transformer.wte": ("gpt_neox.embed_in",),
    "transformer.ln_f": ("gpt_neox.final_layer_norm",),
    "lm_head": ("embed_out",),
} | layer(
    "gpt_neox.layers.{i}.", norm_1="input_layernorm", attn__qkv="attention.query_key_value",
    attn__proj="attention.dense", norm_2="post_attention_layernorm", mlp__fc="mlp.dense_h_to_4h",
    mlp__proj="mlp.dense_4h_to_h",
)  # fmt: skip
MIXTRAL = LLAMA | layer(
    mlp__router="block_sparse_moe.gate", mlp__fc_1="block_sparse_moe.experts.{e}.w1",
    mlp__fc_2="block_sparse_moe.experts.{e}.w3", mlp__proj="block_sparse_moe.experts.{e}.w2",
)  # fmt: skip
SHARED = {
    "mlp__shared__fc_1": "gate_proj", "mlp__shared__fc_2": "up_proj", "mlp__shared__proj": "down_proj",
}  # fmt: skip


def falcon(config: Config) -> Names:
    norms = {"norm_1": "input_layernorm", "norm_2": "post_attention_layernorm"}
    if config.parallel_residual and not config.shared_norm:
        norms = {"norm_1": "ln_attn", "norm_2": "ln_mlp"}
    outside = {
        "transformer.wte": ("transformer.word_embeddings",), "transformer.ln_f": ("transformer.ln_f",),
        "lm_head": ("lm_head",),
    }  # fmt: skip
    inside = layer(
        "transformer.h.{i}.", attn__qkv="self_attention.query_key_value", attn__proj="self_attention.dense",
        mlp__fc="mlp.dense_h_to_4h", mlp__proj="mlp.dense_4h_to_h", **norms,
    )  # fmt: skip
    return Names(outside | inside)


def qwen_moe(config: Config) -> Names:
    """Layers with experts, and those without."""
    experts = layer(
        mlp__router="mlp.gate", mlp__fc_1="mlp.experts.{e}.gate_proj", mlp__fc_2="mlp.experts.{e}.up_proj",
        mlp__proj="mlp.experts.{e}.down_proj", mlp__shared_gate="mlp.shared_expert_gate",
        **{name: f"mlp.shared_expert.{other}" for name, other in SHARED.items()},
    )  # fmt: skip
    return Names(LLAMA | by_layer(config, experts))


def llama4(config: Config) -> Names:
    dense = layer(
        mlp__fc_1="feed_forward.gate_proj", mlp__fc_2="feed_forward.up_proj", mlp__proj="feed_forward.down_proj"
    )
    experts = layer(
        mlp__router="feed_forward.router", mlp__fc_1="feed_forward.experts.gate_proj",
        mlp__fc_2="feed_forward.experts.up_proj", mlp__proj="feed_forward.experts.down_proj",
        **{name: f"feed_forward.shared_expert.{other}" for name, other in SHARED.items()},
    )  # fmt: skip
    return Names(LLAMA | dense | by_layer(config, experts), neighbours=True, packed="halves")


def by_layer(config: Config, experts: Table) -> Table:
    """The rows of the layers that have experts, which stand before those for all layers."""
    return {
        name.replace("{i}", str(i)): tuple(other.replace("{i}", str(i)) for other in others)
        for i, mlp in enumerate(config.layer_mlps)
        for name, others in experts.items()
        if mlp == "MoE"
    }


def afmoe(config: Config) -> Names:
    own = layer(
        attn__gate="self_attn.gate_proj", post_attention_norm="post_attention_layernorm", norm_2="pre_mlp_layernorm",
        post_mlp_norm="post_mlp_layernorm",
    )  # fmt: skip
    experts = layer(
        mlp__router="mlp.router.gate", mlp__fc_1="mlp.experts.{e}.gate_proj", mlp__fc_2="mlp.experts.{e}.up_proj",
        mlp__proj="mlp.experts.{e}.down_proj", mlp__choice="mlp.expert_bias",
        **{name: f"mlp.shared_experts.{other}" for name, other in SHARED.items()},
    )  # fmt: skip
    return Names(LLAMA | own | by_layer(config, experts))


GPT_OSS = LLAMA | SINKS | layer(
    mlp__router="mlp.router", mlp__fc_1="mlp.experts.gate_proj", mlp__fc_2="mlp.experts.up_proj",
    mlp__proj="mlp.experts.down_proj",
)  # fmt: skip
NAMES: dict[str, Names | Callable[[Config], Names]] = {  # others are called as Llama's
    "Gemma2ForCausalLM": Names(GEMMA),
    "Gemma3ForCausalLM": Names(GEMMA),
    "Gemma3ForConditionalGeneration": Names(GEMMA),
    "GPTNeoXForCausalLM": Names(NEOX),
    "CohereForCausalLM": Names(LLAMA, neighbours=True),
    "Cohere2ForCausalLM": Names(LLAMA, neighbours=True),
    "Exaone4ForCausalLM": Names(LLAMA | BEHIND),
    "Olmo2ForCausalLM": Names(LLAMA | BEHIND),
    "Olmo3ForCausalLM": Names(LLAMA | BEHIND),
    "StableLmForCausalLM": Names(LLAMA | HEADS),
    "PhiForCausalLM": Names(PHI),
    "Phi3ForCausalLM": Names(LLAMA, fused=PHI3),
    "FalconForCausalLM": falcon,
    "GraniteSWAForCausalLM": Names(LLAMA | SINKS),
    "MixtralForCausalLM": Names(MIXTRAL),
    "Qwen2MoeForCausalLM": qwen_moe,
    "Qwen3MoeForCausalLM": qwen_moe,
    "AfmoeForCausalLM": afmoe,
    "GptOssForCausalLM": Names(GPT_OSS, packed="interleaved"),
    "Llama4ForCausalLM": llama4,
    "Llama4ForConditionalGeneration": llama4,
}


def names_of(architecture: str, config: Config) -> Names:
    """What this architecture calls the weights of a model with these fields."""
    row = NAMES.get(architecture, Names(LLAMA))
    return row if isinstance(row, Names) else row(config)
