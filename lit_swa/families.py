"""Named model shapes (data only). How a Hugging Face config.json is read is in formats/hf_config.py."""

from typing import Any

from lit_swa.formats.hf_config import config_from_hf as config_from_hf
from lit_swa.longrope_factors import FACTORS

# ------------------------------------------------------------------------------------------------------- named shapes

LLAMA = {"norm_eps": 1e-5}
WINDOW_4096 = {"attention": "sliding", "sliding_window_size": 4096}
LAYER_NORM = {"norm_class_name": "LayerNorm"}
BEHIND = {"pre_norm": False, "post_attention_norm": True, "post_mlp_norm": True}  # norms behind the blocks' parts only
QWEN2 = {"norm_eps": 1e-6, "attn_bias": True, "rope_base": 1e6, "block_size": 32768}
QWEN25 = QWEN2 | {"vocab_size": 151936}
QWEN25_LARGE = QWEN2 | {"vocab_size": 152064, "norm_eps": 1e-5, "block_size": 131072}
QWEN3 = {
    "norm_eps": 1e-6, "norm_qk": True, "rope_base": 1e6, "block_size": 40960, "vocab_size": 151936, "head_size": 128,
}  # fmt: skip
GEMMA1 = {
    "norm_eps": 1e-6, "norm_unit_offset": True, "scale_embeddings": True, "activation": "gelu_tanh",
    "tie_embeddings": True, "vocab_size": 256000, "block_size": 8192, "head_size": 256,
}  # fmt: skip
GEMMA = GEMMA1 | {"post_attention_norm": True, "post_mlp_norm": True}
GEMMA2 = GEMMA | {
    "attention": "sliding,full", "sliding_window_size": 4096, "attention_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}  # fmt: skip
GEMMA3 = GEMMA | {
    "vocab_size": 262144, "block_size": 32768, "norm_qk": True, "rope_base": 1e6, "rope_local_base_freq": 1e4,
    "attention": "sliding,sliding,sliding,sliding,sliding,full", "sliding_window_size": 512,
}  # fmt: skip
GEMMA3_LARGE = GEMMA3 | {
    "vocab_size": 262208, "block_size": 131072, "sliding_window_size": 1024,
    "rope_scaling": {"type": "linear", "factor": 8.0},
}  # fmt: skip
BIASES = {"attn_bias": True, "attn_proj_bias": True, "mlp_bias": True}
NEOX = LAYER_NORM | BIASES | {
    "mlp_class_name": "PlainMLP", "activation": "gelu", "parallel_residual": True, "rotary_percentage": 0.25,
    "block_size": 2048,
}  # fmt: skip
PYTHIA = NEOX | {"vocab_size": 50254, "padded_vocab_size": 50304}
STABLELM = LAYER_NORM | {"rotary_percentage": 0.25, "vocab_size": 50304, "block_size": 4096}
STABLELM2 = STABLELM | {"vocab_size": 100352}
FALCON = LAYER_NORM | {
    "mlp_class_name": "PlainMLP", "activation": "gelu", "parallel_residual": True, "block_size": 2048,
    "tie_embeddings": True,
}  # fmt: skip
PHI = LAYER_NORM | BIASES | {
    "mlp_class_name": "PlainMLP", "activation": "gelu_tanh", "parallel_residual": True, "shared_norm": True,
    "lm_head_bias": True, "vocab_size": 51200, "block_size": 2048, "rotary_percentage": 0.5,
}  # fmt: skip
OLMO = LAYER_NORM | {"norm_weight": False, "norm_bias": False, "vocab_size": 50304, "block_size": 2048}
OLMO2 = BEHIND | {
    "norm_eps": 1e-6, "norm_qk": True, "norm_qk_type": "whole", "vocab_size": 100352, "block_size": 4096,
    "rope_base": 5e5,
}  # fmt: skip
OLMO3 = OLMO2 | {
    "vocab_size": 100278, "block_size": 65536, "attention": "sliding,sliding,sliding,full", "sliding_window_size": 4096,
    "rope_local_base_freq": 5e5, "rope_scaling": {
        "type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0, "beta_slow": 1.0,
    },
}  # fmt: skip
COHERE = LAYER_NORM | {
    "norm_bias": False, "parallel_residual": True, "shared_norm": True, "tie_embeddings": True, "vocab_size": 256000,
}  # fmt: skip
COHERE2 = COHERE | {
    "attention": "sliding,sliding,sliding,full", "positions": "rope,rope,rope,none", "sliding_window_size": 4096,
    "rope_base": 5e4, "logit_multiplier": 0.25, "head_size": 128,
}  # fmt: skip
EXAONE4 = BEHIND | {"norm_eps": 1e-5, "norm_qk": True, "rope_base": 1e6, "vocab_size": 102400}
GRANITE = {
    "norm_eps": 1e-5, "rope_base": 1e7, "vocab_size": 49155, "block_size": 131072, "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22, "tie_embeddings": True,
}  # fmt: skip
MINISTRAL3 = {
    "norm_eps": 1e-5, "rope_base": 1e6, "vocab_size": 131072, "block_size": 262144, "head_size": 128,
    "temperature_slope": 0.1, "temperature_length": 16384, "rope_scaling": {
        "type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16384, "beta_fast": 32.0, "beta_slow": 1.0,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip


def shape(n_layer: int, n_embd: int, n_head: int, n_query_groups: int, intermediate_size: int) -> dict[str, int]:
    return {
        "n_layer": n_layer,
        "n_embd": n_embd,
        "n_head": n_head,
        "n_query_groups": n_query_groups,
        "intermediate_size": intermediate_size,
    }


def longrope(name: str) -> dict[str, Any]:
    """RoPE with two lists of factors, first trained on 4096 tokens and stretched 32 times."""
    trained = {"original_max_position_embeddings": 4096, "factor": 32.0}
    return {"rope_scaling": {"type": "longrope"} | trained | FACTORS[name]}


def experts(n_expert: int, n_expert_per_token: int, expert_size: int, weights: str = "chosen") -> dict[str, Any]:
    sizes = {"n_expert": n_expert, "n_expert_per_token": n_expert_per_token, "expert_size": expert_size}
    return sizes | {"mlp_class_name": "MoE", "expert_weights": weights, "balancing_loss": 0.001}


def linear_scaling(factor: float, block_size: int) -> dict[str, Any]:
    return {"rope_scaling": {"type": "linear", "factor": factor}, "block_size": block_size}


SMOLLM2 = LLAMA | {"vocab_size": 49152, "block_size": 8192, "tie_embeddings": True}
SMOLLM3 = {
    "norm_eps": 1e-6, "vocab_size": 128256, "block_size": 65536, "rope_base": 5e6, "tie_embeddings": True,
    "positions": "rope,rope,rope,none",
}  # fmt: skip
LLAMA1 = {"norm_eps": 1e-6, "vocab_size": 32000, "block_size": 2048}
LLAMA2 = LLAMA | {"vocab_size": 32000, "block_size": 4096}
CODE_LLAMA = LLAMA | {"vocab_size": 32016, "block_size": 16384, "rope_base": 1e6}
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
LLAMA4 = {
    "norm_eps": 1e-5, "vocab_size": 202048, "rope_base": 5e5, "head_size": 128, "positions": "rope,rope,rope,none",
    "attention": "chunked,chunked,chunked,full", "attention_chunk_size": 8192, "temperature_slope": 0.1,
    "temperature_length": 8192, "temperature_offset": 1, "temperature_layers": "none", "shared_expert_size": 8192,
}  # fmt: skip
SCOUT = {"norm_qk": True, "norm_qk_type": "plain", "block_size": 262144, "rope_scaling": LLAMA31["rope_scaling"]}
SCOUT_INSTRUCT = {
    "block_size": 10485760, "rope_scaling": SCOUT["rope_scaling"] | {"factor": 16.0, "high_freq_factor": 1.0},
}  # fmt: skip
GPT_OSS = BIASES | {
    "norm_eps": 1e-5, "vocab_size": 201088, "block_size": 131072, "rope_base": 150000.0, "head_size": 64,
    "attention": "sliding,full", "sliding_window_size": 128, "sink_logits": True, "expert_limit": 7.0,
    "rope_scaling": {
        "type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False,
    },
}  # fmt: skip
MISTRAL = LLAMA | {"vocab_size": 32000, "block_size": 32768}
NEMO = LLAMA | {"vocab_size": 131072, "head_size": 128}
PHI3 = {"vocab_size": 32064, "norm_eps": 1e-5}
PHI3_128K = PHI3 | {"block_size": 131072, "attention": "sliding", "sliding_window_size": 262144}  # of no effect
FALCON3 = {"norm_eps": 1e-6, "vocab_size": 131072, "rope_base": 1000042.0, "block_size": 32768, "head_size": 256}
SALAMANDRA = {"norm_eps": 1e-6, "vocab_size": 256000, "block_size": 8192}

CONFIGS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": SMOLLM2 | {"rope_base": 1e5} | shape(30, 576, 9, 3, 1536),
    "SmolLM2-360M": SMOLLM2 | {"rope_base": 1e5} | shape(32, 960, 15, 5, 2560),
    "SmolLM2-1.7B": SMOLLM2 | {"rope_base": 1.3e5} | shape(24, 2048, 32, 32, 8192),
    "Falcon3-1B-Base": FALCON3 | {"block_size": 4096} | shape(18, 2048, 8, 4, 8192),
    "Falcon3-3B-Base": FALCON3 | shape(22, 3072, 12, 4, 9216),
    "Falcon3-7B-Base": FALCON3 | shape(28, 3072, 12, 4, 23040),
    "Falcon3-10B-Base": FALCON3 | shape(40, 3072, 12, 4, 23040),
    "MicroLlama": LLAMA2 | {"block_size": 2048} | shape(12, 1024, 16, 4, 5632),
    "salamandra-2b": SALAMANDRA | {"norm_eps": 1e-5} | shape(24, 2048, 16, 16, 5440),
    "salamandra-7b": SALAMANDRA | shape(32, 4096, 32, 8, 11008),
    "SmolLM3-3B": SMOLLM3 | shape(36, 2048, 16, 4, 11008),
    "TinyLlama-1.1B": LLAMA2 | {"block_size": 2048} | shape(22, 2048, 32, 4, 5632),
    "open_llama_3b": LLAMA1 | shape(26, 3200, 32, 32, 8640),
    "open_llama_7b": LLAMA1 | shape(32, 4096, 32, 32, 11008),
    "open_llama_13b": LLAMA1 | shape(40, 5120, 40, 40, 13824),
    "Platypus-30B": LLAMA1 | shape(60, 6656, 52, 52, 17920),
    "Llama-2-7b": LLAMA2 | shape(32, 4096, 32, 32, 11008),
    "Llama-2-13b": LLAMA2 | shape(40, 5120, 40, 40, 13824),
    "Llama-2-70b": LLAMA2 | shape(80, 8192, 64, 8, 28672),
    "CodeLlama-7b": CODE_LLAMA | shape(32, 4096, 32, 32, 11008),
    "CodeLlama-13b": CODE_LLAMA | shape(40, 5120, 40, 40, 13824),
    "CodeLlama-34b": CODE_LLAMA | {"vocab_size": 32000} | shape(48, 8192, 64, 8, 22016),
    "CodeLlama-70b": CODE_LLAMA | shape(80, 8192, 64, 8, 28672),
    "Meta-Llama-3-8B": LLAMA3 | shape(32, 4096, 32, 8, 14336),
    "Meta-Llama-3-70B": LLAMA3 | shape(80, 8192, 64, 8, 28672),
    "Llama-3.1-8B": LLAMA31 | shape(32, 4096, 32, 8, 14336),
    "Llama-3.1-70B": LLAMA31 | shape(80, 8192, 64, 8, 28672),
    "Llama-3.1-405B": LLAMA31 | shape(126, 16384, 128, 8, 53248),
    "Llama-3.2-1B": LLAMA32 | shape(16, 2048, 32, 8, 8192),
    "Llama-3.2-3B": LLAMA32 | {"head_size": 128} | shape(28, 3072, 24, 8, 8192),
    "Llama-4-Scout-17B-16E": LLAMA4 | SCOUT | experts(16, 1, 8192, "sigmoid") | shape(48, 5120, 40, 8, 16384),
    "Llama-4-Maverick-17B-128E": LLAMA4
    | {"block_size": 1048576}
    | experts(128, 1, 8192, "sigmoid")
    | {"mlp_class_name": "GatedMLP,MoE"}
    | shape(48, 5120, 40, 8, 16384),
    "gpt-oss-20b": GPT_OSS | experts(32, 4, 2880) | shape(24, 2880, 64, 8, 2880),
    "gpt-oss-120b": GPT_OSS | experts(128, 4, 2880) | shape(36, 2880, 64, 8, 2880),
    "Mistral-7B-v0.1": MISTRAL | WINDOW_4096 | shape(32, 4096, 32, 8, 14336),
    "Mistral-7B-v0.2": MISTRAL | {"rope_base": 1e6} | shape(32, 4096, 32, 8, 14336),
    "Mistral-7B-v0.3": MISTRAL | {"vocab_size": 32768, "rope_base": 1e6} | shape(32, 4096, 32, 8, 14336),
    "Mistral-Large-Instruct-2407": MISTRAL | {"vocab_size": 32768, "rope_base": 1e6} | shape(88, 12288, 96, 8, 28672),
    "Mistral-Nemo-12B": NEMO | {"rope_base": 1e6, "block_size": 131072} | shape(40, 5120, 32, 8, 14336),
    "Mistral-Small-24B": NEMO | {"rope_base": 1e8, "block_size": 32768} | shape(40, 5120, 32, 8, 32768),
    "Mixtral-8x7B-v0.1": MISTRAL | {"rope_base": 1e6} | experts(8, 2, 14336) | shape(32, 4096, 32, 8, 14336),
    "Mixtral-8x22B-v0.1": MISTRAL
    | {"rope_base": 1e6, "block_size": 65536}
    | experts(8, 2, 16384)
    | shape(56, 6144, 48, 8, 16384),
    "Ministral-3-3B": MINISTRAL3 | {"tie_embeddings": True} | shape(26, 3072, 32, 8, 9216),
    "Ministral-3-8B": MINISTRAL3 | shape(34, 4096, 32, 8, 14336),
    "Ministral-3-14B": MINISTRAL3 | shape(40, 5120, 32, 8, 16384),
    "Qwen2-0.5B": QWEN25 | {"block_size": 131072, "tie_embeddings": True} | shape(24, 896, 14, 2, 4864),
    "Qwen2-7B": QWEN2 | {"vocab_size": 152064, "block_size": 131072} | shape(28, 3584, 28, 4, 18944),
    "Qwen2.5-0.5B": QWEN25 | {"tie_embeddings": True} | shape(24, 896, 14, 2, 4864),
    "Qwen2.5-1.5B": QWEN25 | {"tie_embeddings": True, "block_size": 131072} | shape(28, 1536, 12, 2, 8960),
    "Qwen2.5-3B": QWEN25 | {"tie_embeddings": True} | shape(36, 2048, 16, 2, 11008),
    "Qwen2.5-7B": QWEN2 | {"vocab_size": 152064, "block_size": 131072} | shape(28, 3584, 28, 4, 18944),
    "Qwen2.5-14B": QWEN25_LARGE | shape(48, 5120, 40, 8, 13824),
    "Qwen2.5-32B": QWEN25_LARGE | shape(64, 5120, 40, 8, 27648),
    "Qwen2.5-72B": QWEN25_LARGE | shape(80, 8192, 64, 8, 29568),
    "Qwen1.5-MoE-A2.7B": QWEN25
    | {"block_size": 8192, "shared_expert_size": 5632, "shared_expert_gate": True}
    | experts(60, 4, 1408, "all")
    | shape(24, 2048, 16, 16, 5632),
    "Qwen2-57B-A14B": QWEN25
    | {"block_size": 131072, "shared_expert_size": 20480, "shared_expert_gate": True}
    | experts(64, 8, 2560, "all")
    | shape(28, 3584, 28, 4, 18944),
    "Qwen3-0.6B": QWEN3 | {"tie_embeddings": True} | shape(28, 1024, 16, 8, 3072),
    "Qwen3-1.7B": QWEN3 | {"tie_embeddings": True} | shape(28, 2048, 16, 8, 6144),
    "Qwen3-4B": QWEN3 | {"tie_embeddings": True} | shape(36, 2560, 32, 8, 9728),
    "Qwen3-8B": QWEN3 | shape(36, 4096, 32, 8, 12288),
    "Qwen3-14B": QWEN3 | shape(40, 5120, 40, 8, 17408),
    "Qwen3-32B": QWEN3 | shape(64, 5120, 64, 8, 25600),
    "Qwen3-30B-A3B": QWEN3 | experts(128, 8, 768) | shape(48, 2048, 32, 4, 6144),
    "Qwen3-235B-A22B": QWEN3 | experts(128, 8, 1536) | shape(94, 4096, 64, 4, 12288),
    "gemma-2b": GEMMA1 | shape(18, 2048, 8, 1, 16384),
    "gemma-7b": GEMMA1 | shape(28, 3072, 16, 16, 24576),
    "gemma-2-2b": GEMMA2 | shape(26, 2304, 8, 4, 9216),
    "gemma-2-9b": GEMMA2 | shape(42, 3584, 16, 8, 14336),
    "gemma-2-27b": GEMMA2 | {"head_size": 128, "attention_scores_scalar": 144} | shape(46, 4608, 32, 16, 36864),
    "gemma-3-270m": GEMMA3 | shape(18, 640, 4, 1, 2048),
    "gemma-3-1b": GEMMA3 | shape(26, 1152, 4, 1, 6912),
    "gemma-3-4b": GEMMA3_LARGE | shape(34, 2560, 8, 4, 10240),
    "gemma-3-12b": GEMMA3_LARGE | shape(48, 3840, 16, 8, 15360),
    "gemma-3-27b": GEMMA3_LARGE | {"head_size": 128, "attention_scores_scalar": 168} | shape(62, 5376, 32, 16, 21504),
    "pythia-14m": PYTHIA | {"block_size": 512} | shape(6, 128, 4, 4, 512),
    "pythia-31m": PYTHIA | {"block_size": 1024} | shape(6, 256, 8, 8, 1024),
    "pythia-70m": PYTHIA | shape(6, 512, 8, 8, 2048),
    "pythia-160m": PYTHIA | shape(12, 768, 12, 12, 3072),
    "pythia-410m": PYTHIA | shape(24, 1024, 16, 16, 4096),
    "pythia-1b": PYTHIA | shape(16, 2048, 8, 8, 8192),
    "pythia-1.4b": PYTHIA | shape(24, 2048, 16, 16, 8192),
    "pythia-2.8b": PYTHIA | shape(32, 2560, 32, 32, 10240),
    "pythia-6.9b": PYTHIA | {"padded_vocab_size": 50432} | shape(32, 4096, 32, 32, 16384),
    "pythia-12b": PYTHIA | {"padded_vocab_size": 50688} | shape(36, 5120, 40, 40, 20480),
    "dolly-v2-3b": PYTHIA | {"padded_vocab_size": 50280} | shape(32, 2560, 32, 32, 10240),
    "dolly-v2-7b": PYTHIA | {"padded_vocab_size": 50280} | shape(32, 4096, 32, 32, 16384),
    "dolly-v2-12b": PYTHIA | {"padded_vocab_size": 50280} | shape(36, 5120, 40, 40, 20480),
    "RedPajama-INCITE-3B": NEOX
    | {"vocab_size": 50254, "padded_vocab_size": 50432, "rotary_percentage": 1.0, "parallel_residual": False}
    | shape(32, 2560, 32, 32, 10240),
    "RedPajama-INCITE-7B": NEOX
    | {"vocab_size": 50254, "padded_vocab_size": 50432, "rotary_percentage": 1.0, "parallel_residual": False}
    | shape(32, 4096, 32, 32, 16384),
    "stablelm-base-alpha-3b": NEOX | {"vocab_size": 50688, "block_size": 4096} | shape(16, 4096, 32, 32, 16384),
    "stablelm-base-alpha-7b": NEOX | {"vocab_size": 50432, "block_size": 4096} | shape(16, 6144, 48, 48, 24576),
    "stablecode-completion-alpha-3b": NEOX
    | {"vocab_size": 49152, "block_size": 16384}
    | shape(32, 2560, 32, 32, 10240),
    "stablelm-3b-4e1t": STABLELM | shape(32, 2560, 32, 32, 6912),
    "stable-code-3b": STABLELM | {"block_size": 16384, "rope_base": 1e6} | shape(32, 2560, 32, 32, 6912),
    "stablelm-2-1_6b": STABLELM2 | {"attn_bias": True} | shape(24, 2048, 32, 32, 5632),
    "stablelm-2-12b": STABLELM2
    | {"parallel_residual": True, "shared_norm": True, "norm_qk": True, "norm_qk_type": "each"}
    | shape(40, 5120, 32, 8, 13824),
    "falcon-7b": FALCON | {"vocab_size": 65024, "shared_norm": True} | shape(32, 4544, 71, 1, 18176),
    "falcon-40b": FALCON | {"vocab_size": 65024} | shape(60, 8192, 128, 8, 32768),
    "falcon-180B": FALCON | {"vocab_size": 65024} | shape(80, 14848, 232, 8, 59392),
    "phi-1": PHI | shape(24, 2048, 32, 32, 8192),
    "phi-1_5": PHI | shape(24, 2048, 32, 32, 8192),
    "phi-2": PHI | {"rotary_percentage": 0.4} | shape(32, 2560, 32, 32, 10240),
    "Phi-3-mini-4k": PHI3
    | {"block_size": 4096, "attention": "sliding", "sliding_window_size": 2047}
    | shape(32, 3072, 32, 32, 8192),
    "Phi-3-mini-128k": PHI3_128K | longrope("Phi-3-mini-128k") | shape(32, 3072, 32, 32, 8192),
    "Phi-3.5-mini": PHI3_128K | longrope("Phi-3.5-mini") | shape(32, 3072, 32, 32, 8192),
    "Phi-4-mini": PHI3_128K
    | {"vocab_size": 200064, "tie_embeddings": True, "rotary_percentage": 0.75}
    | longrope("Phi-4-mini")
    | shape(32, 3072, 24, 8, 8192),
    "Phi-3-medium-4k": PHI3
    | {"block_size": 4096, "attention": "sliding", "sliding_window_size": 2047}
    | shape(40, 5120, 40, 10, 17920),
    "phi-4": LLAMA
    | {"vocab_size": 100352, "block_size": 16384, "rope_base": 250000.0}
    | shape(40, 5120, 40, 10, 17920),
    "OLMo-1B": OLMO | {"tie_embeddings": True} | shape(16, 2048, 16, 16, 8192),
    "OLMo-7B": OLMO | shape(32, 4096, 32, 32, 11008),
    "OLMo-2-1B": OLMO2 | shape(16, 2048, 16, 16, 8192),
    "OLMo-2-7B": OLMO2 | shape(32, 4096, 32, 32, 11008),
    "OLMo-2-13B": OLMO2 | shape(40, 5120, 40, 40, 13824),
    "OLMo-2-32B": OLMO2 | shape(64, 5120, 40, 8, 27648),
    "Olmo-3-7B": OLMO3 | shape(32, 4096, 32, 32, 11008),
    "Olmo-3-32B": OLMO3 | shape(64, 5120, 40, 8, 27648),
    "c4ai-command-r-v01": COHERE
    | {"rope_base": 8e6, "block_size": 8192, "logit_multiplier": 0.0625}
    | shape(40, 8192, 64, 64, 22528),
    "c4ai-command-r-plus": COHERE
    | {"rope_base": 7.5e7, "block_size": 131072, "logit_multiplier": 0.8333333333333334}
    | {"norm_qk": True, "norm_qk_type": "each"}
    | shape(64, 12288, 96, 8, 33792),
    "c4ai-command-r7b-12-2024": COHERE2 | {"block_size": 8192} | shape(32, 4096, 32, 8, 14336),
    "c4ai-command-a-03-2025": COHERE2 | {"block_size": 131072} | shape(64, 12288, 96, 8, 36864),
    "EXAONE-4.0-1.2B": EXAONE4
    | {
        "block_size": 65536,
        "tie_embeddings": True,
        "rope_scaling": {
            "type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    | shape(30, 2048, 32, 8, 4096),
    "EXAONE-4.0-32B": EXAONE4
    | {
        "block_size": 131072,
        "attention": "sliding,sliding,sliding,full",
        "positions": "rope,rope,rope,none",
        "sliding_window_size": 4096,
        "rope_scaling": {
            "type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    | shape(64, 5120, 40, 8, 27392),
    "granite-3.1-2b": GRANITE
    | {"rope_base": 5e6, "attention_scores_scalar": 4096.0, "logit_multiplier": 0.125}
    | shape(40, 2048, 32, 8, 8192),
    "granite-3.1-8b": GRANITE
    | {"attention_scores_scalar": 16384.0, "logit_multiplier": 0.0625}
    | shape(40, 4096, 32, 8, 12800),
}
QWEN_1M = {
    "block_size": 1010000, "rope_base": 1e7, "attention": "dual_chunk", "dual_chunk_pretraining_length": 262144,
    "dual_chunk_size": 253952, "dual_chunk_local": 8192, "dual_chunk_temperature_slope": 0.1,
    "dual_chunk_temperature_power": 2.0,
}  # fmt: skip
QWEN25_SIZES = ("0.5", "1.5", "3", "7", "14", "32", "72")
SHORTER, SMALL_EPS = {"block_size": 32768}, {"norm_eps": 1e-6}  # of Qwen2.5's finetuned models
# Other names of the same shapes: finetuned models, and the names of lit-gpt. A field that differs stands behind.
SAME: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"Llama-2-{size}-{kind}": (f"Llama-2-{size}", {})
       for size in ("7b", "13b", "70b") for kind in ("hf", "chat-hf")},
    **{
        f"CodeLlama-{size}-{kind}": (f"CodeLlama-{size}", {"vocab_size": 32000} if kind == "Python-hf" else {})
        for size in ("7b", "13b", "34b", "70b")
        for kind in ("hf", "Instruct-hf", "Python-hf")
    },
    **{f"pythia-{size}-deduped": (f"pythia-{size}", {}) for size in
       ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")},
    **{f"RedPajama-INCITE-{name}": (f"RedPajama-INCITE-{size}", {}) for name, size in (
        ("Base-3B-v1", "3B"), ("Chat-3B-v1", "3B"), ("Instruct-3B-v1", "3B"), ("7B-Base", "7B"), ("7B-Chat", "7B"),
        ("7B-Instruct", "7B"), ("Base-7B-v0.1", "7B"), ("Chat-7B-v0.1", "7B"), ("Instruct-7B-v0.1", "7B"))},
    **{f"Mistral-7B-Instruct-{version}": (f"Mistral-7B-{version}", {}) for version in ("v0.1", "v0.2", "v0.3")},
    "Mixtral-8x7B-Instruct-v0.1": ("Mixtral-8x7B-v0.1", {}),
    "stablelm-tuned-alpha-3b": ("stablelm-base-alpha-3b", {}),
    "stablelm-tuned-alpha-7b": ("stablelm-base-alpha-7b", {}),
    "stablelm-zephyr-3b": ("stablelm-3b-4e1t", {}),
    "stablecode-completion-alpha-3b-4k": ("stablecode-completion-alpha-3b", {"block_size": 4096}),
    "stablecode-instruct-alpha-3b": ("stablecode-completion-alpha-3b", {"block_size": 4096}),
    "falcon-7b-instruct": ("falcon-7b", {}),
    "falcon-40b-instruct": ("falcon-40b", {}),
    "falcon-180B-chat": ("falcon-180B", {}),
    "gemma-2b-it": ("gemma-2b", {}),
    "gemma-7b-it": ("gemma-7b", {}),
    "CodeGemma-7b-it": ("gemma-7b", {}),
    "vicuna-7b-v1.3": ("open_llama_7b", {}),
    "vicuna-13b-v1.3": ("open_llama_13b", {}),
    "vicuna-33b-v1.3": ("Platypus-30B", {}),
    "vicuna-7b-v1.5": ("Llama-2-7b", {}),
    "vicuna-13b-v1.5": ("Llama-2-13b", {}),
    "vicuna-7b-v1.5-16k": ("Llama-2-7b", linear_scaling(4.0, 16384)),
    "vicuna-13b-v1.5-16k": ("Llama-2-13b", linear_scaling(4.0, 16384)),
    "longchat-7b-16k": ("open_llama_7b", linear_scaling(8.0, 16384)),
    "longchat-13b-16k": ("open_llama_13b", linear_scaling(8.0, 16384)),
    "LLaMA-2-7B-32K": ("Llama-2-7b", linear_scaling(8.0, 32768)),
    "Nous-Hermes-llama-2-7b": ("Llama-2-7b", {}),
    "Nous-Hermes-13b": ("open_llama_13b", {"vocab_size": 32001}),
    "Nous-Hermes-Llama2-13b": ("Llama-2-13b", {"vocab_size": 32032}),
    "Platypus2-7B": ("Llama-2-7b", {}),
    "Platypus2-13B": ("Llama-2-13b", {}),
    "Platypus2-70B": ("Llama-2-70b", {}),
    "Platypus2-70B-instruct": ("Llama-2-70b", {}),
    "Camel-Platypus2-13B": ("Llama-2-13b", {}),
    "Camel-Platypus2-70B": ("Llama-2-70b", {}),
    "Stable-Platypus2-13B": ("Llama-2-13b", {}),
    "FreeWilly2": ("Llama-2-70b", {}),
    "Llama-2-7b-chat-hf-function-calling-v2": ("Llama-2-7b", {"norm_eps": 1e-6}),
    "Llama-4-Scout-17B-16E-Instruct": ("Llama-4-Scout-17B-16E", SCOUT_INSTRUCT),
    "Llama-4-Maverick-17B-128E-Instruct": ("Llama-4-Maverick-17B-128E", {}),
    "tiny-llama-1.1b": ("TinyLlama-1.1B", {}),
    "tiny-llama-1.1b-chat": ("TinyLlama-1.1B", {}),
    "Llama-3.3-70B": ("Llama-3.1-70B", {}),
    **{f"{name}-Instruct": (name, {}) for name in (
        "Meta-Llama-3-8B", "Meta-Llama-3-70B", "Llama-3.1-8B", "Llama-3.1-70B", "Llama-3.1-405B", "Llama-3.2-1B",
        "Llama-3.2-3B", "SmolLM2-135M", "SmolLM2-360M", "SmolLM2-1.7B")},
    **{f"Qwen2.5-{n}B-Instruct": (f"Qwen2.5-{n}B", SHORTER | (SMALL_EPS if n in ("32", "72") else {}))
       for n in QWEN25_SIZES},
    **{f"Llama-3-{size}{kind}": (f"Meta-Llama-3-{size}", {}) for size in ("8B", "70B") for kind in ("", "-Instruct")},
    "Llama-3.3-70B-Instruct": ("Llama-3.1-70B", {}),
    "Llama-3.1-Nemotron-70B-Instruct-HF": ("Llama-3.1-70B", {}),
    "DeepSeek-R1-Distill-Llama-8B": ("Llama-3.1-8B", {}),
    "DeepSeek-R1-Distill-Llama-70B": ("Llama-3.1-70B", {}),
    **{f"OLMo-{name}-hf": (f"OLMo-{size}", {}) for name, size in (("1B", "1B"), ("7B", "7B"), ("7B-Instruct", "7B"))},
    **{f"OLMo-2-1124-{size}{kind}": (f"OLMo-2-{size}", {})
       for size in ("7B", "13B") for kind in ("", "-SFT", "-DPO", "-Instruct")},
    **{f"gemma-2-{size}-it": (f"gemma-2-{size}", {}) for size in ("2b", "9b", "27b")},
    **{f"gemma-3-{size}-it": (f"gemma-3-{size}", {}) for size in ("1b", "4b", "12b", "27b")},
    **{f"Falcon3-{size}-Instruct": (f"Falcon3-{size}-Base", {}) for size in ("1B", "3B", "7B", "10B")},
    **{f"salamandra-{size}-instruct": (f"salamandra-{size}", {}) for size in ("2b", "7b")},
    **{f"{name}-instruct": (name, {}) for name in ("Phi-3-mini-4k", "Phi-3-mini-128k", "Phi-3.5-mini", "Phi-4-mini")},
    "Phi-4-reasoning": ("phi-4", {"rope_base": 5e5, "block_size": 32768}),
    "Phi-4-reasoning-plus": ("phi-4", {"rope_base": 5e5, "block_size": 32768}),
    "mathstral-7B-v0.1": ("Mistral-7B-v0.3", {}),
    "Mistral-Large-Instruct-2411": ("Mistral-Large-Instruct-2407", {}),
    "Mixtral-8x22B-Instruct-v0.1": ("Mixtral-8x22B-v0.1", {"vocab_size": 32768}),
    **{f"Qwen2.5-Coder-{n}B{kind}": (f"Qwen2.5-{n}B", SHORTER)
       for n in QWEN25_SIZES[:-1] for kind in ("", "-Instruct")},
    "Qwen2.5-Coder-32B-Instruct": ("Qwen2.5-32B", SHORTER | SMALL_EPS),
    **{f"Qwen2.5-Math-{n}B{kind}": (f"Qwen2.5-{n}B", {"rope_base": 1e4, "block_size": 4096})
       for n in ("1.5", "7", "72") for kind in ("", "-Instruct")},
    "QwQ-32B": ("Qwen2.5-32B", {}),
    "QwQ-32B-Preview": ("Qwen2.5-32B", SHORTER),
    **{f"Qwen3-{size}B-Base": (f"Qwen3-{size}B", {"block_size": 32768}) for size in ("0.6", "1.7", "4", "8", "14")},
    "Qwen3-30B-A3B-Base": ("Qwen3-30B-A3B", {"block_size": 32768}),
    **{f"{name}-{kind}-2507": (name, {"rope_base": base, "block_size": 262144})
       for name, base in (("Qwen3-4B", 5e6), ("Qwen3-30B-A3B", 1e7), ("Qwen3-235B-A22B", 5e6))
       for kind in ("Instruct", "Thinking")},
    "Qwen2.5-7B-Instruct-1M": ("Qwen2.5-7B", QWEN_1M | {"norm_eps": 1e-5}),
    "Qwen2.5-14B-Instruct-1M": ("Qwen2.5-14B", QWEN_1M),
}  # fmt: skip
CONFIGS |= {name: CONFIGS[base] | fields for name, (base, fields) in SAME.items()}
