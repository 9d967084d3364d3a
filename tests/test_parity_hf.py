"""Each architecture equals transformers' on tiny random models: whole, cached, below and far beyond the window."""

import json
from pathlib import Path

import pytest
import torch
from tiny import randomize

from lit_swa import Config
from lit_swa.checkpoint import convert_hf_checkpoint, load_model
from lit_swa.generate import generate

transformers = pytest.importorskip("transformers")
WINDOW = 16
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
ROPE = {"rope_theta": 10000.0}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48}
YARN_ALL = YARN | {"beta_fast": 16, "beta_slow": 2, "mscale": 0.8, "mscale_all_dim": 0.5, "truncate": False}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
}
CASES = {
    "llama": ("Llama", {}),
    "llama, biases and tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama, llama3 scaling": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, linear scaling": ("Llama", {"rope_parameters": LINEAR}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN}),
    "llama, yarn, all options": ("Llama", {"rope_parameters": YARN_ALL}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "mistral, no window": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2, window from layer 2": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3, window from layer 1": (
        "Qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "gemma 2": ("Gemma2", {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 24}),
    "gemma 3": ("Gemma3", {"head_dim": 16, "sliding_window": WINDOW, "num_hidden_layers": 7}),
    "gemma 3, scaled": (
        "Gemma3",
        {"head_dim": 16, "sliding_window": WINDOW, "num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPE},
    ),
    "gpt-neox": ("GPTNeoX", {"num_key_value_heads": None}),
    "gpt-neox, serial, full rope": (
        "GPTNeoX",
        {"num_key_value_heads": None, "use_parallel_residual": False, "rotary_pct": 1.0},
    ),
}


def build_reference(case: str) -> torch.nn.Module:
    family, fields = CASES[case]
    config_class = getattr(transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")
    values = {k: v for k, v in (SHAPE | fields).items() if not (k == "num_key_value_heads" and v is None)}
    reference = getattr(transformers, f"{family}ForCausalLM")(config_class(**values)).eval()
    randomize(reference)
    return reference


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The same random weights in transformers and, through files, here."""
    torch.manual_seed(11)
    reference = build_reference(request.param)
    directory = tmp_path_factory.mktemp("hf")
    reference.save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")  # not read here
    convert_hf_checkpoint(directory)
    return reference, load_model(directory)


def largest_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative to the logits' scale."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("pair", CASES, indirect=True)
@pytest.mark.parametrize("T", [WINDOW - 1, 5 * WINDOW + 1])
@torch.no_grad()
def test_logits_equal_transformers_whole_and_cached(pair, T):
    """Catches: a wrong norm, scale, RoPE, window, pattern, bias or weight map, by 1e-4 of the logits' scale."""
    reference, model = pair
    idx = torch.randint(0, 97, (2, T))
    expected = reference(idx).logits
    assert largest_error(model(idx), expected) < 1e-4
    for rolling in (False, True):
        model.config.rolling_kv_cache = rolling
        for size in (1, 7, T):
            model.set_kv_cache(2, T)
            parts = [model(idx[:, i : i + size], torch.arange(i, min(i + size, T))) for i in range(0, T, size)]
            assert largest_error(torch.cat(parts, dim=1), expected) < 1e-4
    model.config.rolling_kv_cache = False
    model.clear_kv_cache()


@pytest.mark.parametrize("pair", CASES, indirect=True)
@torch.no_grad()
def test_greedy_tokens_equal_transformers(pair):
    """Catches: a difference that only a long generation shows; from below the window to three times beyond it."""
    reference, model = pair
    prompt = torch.randint(0, 97, (1, WINDOW // 2))
    expected = reference.generate(prompt, max_new_tokens=3 * WINDOW, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = expected[0, prompt.size(1) :].tolist()
    assert list(generate(model, prompt, max_new_tokens=3 * WINDOW)) == expected
    model.config.rolling_kv_cache = True
    model.clear_kv_cache()
    assert list(generate(model, prompt, max_new_tokens=3 * WINDOW)) == expected
    model.config.rolling_kv_cache = False
    model.clear_kv_cache()


def test_older_config_files_say_the_same():
    """Catches: a reader that knows only transformers 5's keys; the files on the hub have the older ones."""

    def shape(**fields):
        return Config.from_hf(SHAPE | fields)

    llama = {"architectures": ["LlamaForCausalLM"]}
    assert shape(**llama, rope_theta=5e5, rms_norm_eps=1e-5).rope_base == 5e5
    scaled = shape(**llama, rope_theta=5e5, rope_scaling={k: v for k, v in LLAMA3.items() if k != "rope_theta"})
    assert scaled.rope_scaling["type"] == "llama3" and scaled.rope_base == 5e5
    assert shape(**llama, rope_scaling={"type": "linear", "factor": 4}).rope_scaling == {"type": "linear", "factor": 4}
    gemma3 = shape(
        architectures=["Gemma3ForCausalLM"],
        head_dim=16,
        sliding_window=8,
        sliding_window_pattern=3,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        query_pre_attn_scalar=16,
        hidden_activation="gelu_pytorch_tanh",
    )
    assert gemma3.attention == "sliding,sliding,full" and (gemma3.rope_base, gemma3.rope_local_base_freq) == (1e6, 1e4)
    gemma2 = shape(
        architectures=["Gemma2ForCausalLM"],
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        hidden_act="gelu_pytorch_tanh",
    )
    assert gemma2.attention == "sliding,full" and gemma2.tie_embeddings and gemma2.attention_logit_softcapping == 50.0
    qwen = shape(
        architectures=["Qwen2ForCausalLM"], use_sliding_window=False, sliding_window=131072, max_window_layers=28
    )
    assert qwen.attention == "full" and qwen.attn_bias
    neox = shape(architectures=["GPTNeoXForCausalLM"], rotary_pct=0.25, rotary_emb_base=10000, hidden_act="gelu")
    assert neox.rotary_percentage == 0.25 and neox.parallel_residual


@pytest.mark.parametrize(
    "content, message",
    [
        ({"architectures": ["BloomForCausalLM"]}, "BloomForCausalLM.* not supported.*LlamaForCausalLM"),
        ({"model_type": "mamba"}, "mamba"),
        ({}, "not supported"),
        ({"architectures": ["LlamaForCausalLM"], "hidden_size": 8}, "no 'num_attention_heads'"),
        (SHAPE | {"architectures": ["LlamaForCausalLM"], "hidden_act": "xielu"}, "activation 'xielu'"),
        (SHAPE | {"architectures": ["LlamaForCausalLM"], "rope_scaling": {"type": "magic", "factor": 2}}, "'magic'"),
        (SHAPE | {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 4}, "does not divide"),
        (SHAPE | {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": "many"}, "n_layer"),
        (SHAPE | {"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window_size=0"),
    ],
)
def test_configs_that_cannot_be_built_are_refused_in_one_sentence(content, message, tmp_path: Path):
    """Catches: a KeyError, or a model that is built although the architecture is another."""
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Config.from_hf(tmp_path)
