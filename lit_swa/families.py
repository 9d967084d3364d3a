"""Named model shapes (data only). How a Hugging Face config.json is read is in formats/hf_config.py."""

from typing import Any

from lit_swa.formats.hf_config import config_from_hf as config_from_hf

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
