"""Each architecture equals transformers' on tiny random models: whole, cached, below and far beyond the window."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import randomize

from lit_swa import Config
from lit_swa.checkpoint import convert_hf_checkpoint, load_model
from lit_swa.formats.hf_export import config_to_hf
from lit_swa.formats.hf_fields import ACTIVATION_NAMES
from lit_swa.generate import generate
from lit_swa.model import PlainMLP

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
        ({"architectures": ["LlamaForCausalLM"], "hidden_size": 8}, "head_size=0"),
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


# ---------------------------------------------------------------------------- what a config.json leaves out, or adds

PLAIN = {
    "vocab_size": 500, "hidden_size": 8192, "intermediate_size": 99, "num_hidden_layers": 5, "num_attention_heads": 64,
    "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 777, "rms_norm_eps": 1e-4,
    "tie_word_embeddings": False, "hidden_act": "gelu",
}  # fmt: skip
WINDOWS = {"use_sliding_window": True, "sliding_window": 33, "max_window_layers": 2, "layer_types": None}
GEMMA = PLAIN | {
    "hidden_activation": "silu", "query_pre_attn_scalar": 40, "attn_logit_softcapping": 7.0, "attention_bias": True,
    "final_logit_softcapping": 9.0, "sliding_window": 33, "layer_types": ["full_attention"] * 4 + ["sliding_attention"],
}  # fmt: skip
GIVEN = {  # a model_type, its class, and a value for every key that is read, none of them the default
    "llama": ("LlamaConfig", PLAIN | {"attention_bias": True, "mlp_bias": True, "rope_theta": 5e5}),
    "mistral": ("MistralConfig", PLAIN | {"sliding_window": 33, "rope_theta": 5e5}),
    "qwen2": ("Qwen2Config", PLAIN | WINDOWS | {"rope_theta": 5e5}),
    "qwen3": ("Qwen3Config", PLAIN | WINDOWS | {"rope_theta": 5e5, "attention_bias": True}),
    "gemma2": ("Gemma2Config", GEMMA | {"rope_theta": 5e5}),
    "gemma3_text": (
        "Gemma3TextConfig",
        {key: value for key, value in GEMMA.items() if key != "attn_logit_softcapping"}
        | {"rope_theta": 5e5, "rope_local_base_freq": 99.0, "sliding_window_pattern": 2, "layer_types": None},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        {k: v for k, v in PLAIN.items() if k not in ("num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act")}
        | {"layer_norm_eps": 1e-4, "hidden_act": "gelu_fast", "attention_bias": False, "use_parallel_residual": False,
           "rotary_pct": 0.5, "rotary_emb_base": 500},
    ),
}  # fmt: skip
NULLS = {  # keys that may be null, which is not what they are when they are left out
    "llama": ("num_key_value_heads", "head_dim"), "mistral": ("head_dim", "sliding_window"),
    "qwen2": ("num_key_value_heads", "sliding_window"), "qwen3": ("num_key_value_heads", "sliding_window"),
    "gemma2": ("attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3_text": ("attn_logit_softcapping", "final_logit_softcapping"), "gpt_neox": (),
}  # fmt: skip
RENAMED = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}


def told(kind: str, config) -> dict[str, object]:
    """What a config of transformers says, by the names of our fields."""
    rope, get = config.rope_parameters, lambda name, default=None: getattr(config, name, default)
    full, local = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    types = (
        get("layer_types")
        or ["full_attention" if get("sliding_window") is None else "sliding_attention"] * config.num_hidden_layers
    )
    gemma, activation = kind.startswith("gemma"), get("hidden_activation", get("hidden_act"))
    return {
        "n_layer": config.num_hidden_layers, "n_head": config.num_attention_heads, "n_embd": config.hidden_size,
        "n_query_groups": get("num_key_value_heads", config.num_attention_heads), "vocab_size": config.vocab_size,
        "head_size": get("head_dim") or config.hidden_size // config.num_attention_heads,
        "intermediate_size": config.intermediate_size, "block_size": config.max_position_embeddings,
        "tie_embeddings": config.tie_word_embeddings, "norm_eps": get("rms_norm_eps", get("layer_norm_eps")),
        "activation": RENAMED.get(activation, activation), "rope_base": full["rope_theta"],
        "rope_local_base_freq": local.get("rope_theta"), "rotary_percentage": full.get("partial_rotary_factor", 1.0),
        "rope_scaling": None if full["rope_type"] == "default" else full["rope_type"],
        "attn_bias": True if kind == "qwen2" else get("attention_bias", False),
        "mlp_bias": True if kind == "gpt_neox" else get("mlp_bias", False),
        "parallel_residual": get("use_parallel_residual", False),
        "attention_scores_scalar": config.query_pre_attn_scalar if gemma else None,
        "attention_logit_softcapping": get("attn_logit_softcapping"),
        "final_logit_softcapping": get("final_logit_softcapping"),
        "layer_variants": [{"full_attention": "full", "sliding_attention": "sliding"}[t] for t in types],
        "sliding_window_size": config.sliding_window if "sliding_attention" in types else None,
    }  # fmt: skip


def as_version_5(kind: str, hf: dict) -> dict:
    """The same config.json with rope_parameters."""
    old = {"rope_theta": "rope_theta", "rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
    rope = {new: hf[key] for key, new in old.items() if key in hf}
    if kind == "gemma3_text":
        local = {"rope_theta": hf["rope_local_base_freq"]} if "rope_local_base_freq" in hf else {}
        rope = {
            "full_attention": rope | {"rope_type": "default"},
            "sliding_attention": local | {"rope_type": "default"},
        }
    rest = {key: value for key, value in hf.items() if key not in (*old, "rope_local_base_freq")}
    return rest | ({"rope_parameters": rope} if rope else {})


@pytest.mark.parametrize("kind", GIVEN)
def test_keys_that_are_left_out_mean_what_transformers_takes_them_for(kind: str):
    """Catches: a window, soft-cap, activation, base or head that changes when config.json leaves its default out."""
    name, given = GIVEN[kind]
    without = [{k: v for k, v in given.items() if k != left_out} for left_out in given]
    only = [{key: value} for key, value in given.items()]
    nulls = [given | {key: None} for key in NULLS[kind]]
    scaled = [{"rope_scaling": {"rope_type": "linear", "factor": 4.0}}]
    compared = 0
    for hf in [{}, given, *without, *only, *nulls, *scaled]:
        for content in (hf, as_version_5(kind, hf)):
            try:
                theirs = getattr(transformers, name)(**json.loads(json.dumps(content)))
            except (ValueError, StrictDataclassError):
                continue  # a width that the heads do not divide, layer_types for another number of layers
            ours = Config.from_hf({"model_type": kind} | content)
            expected = told(kind, theirs)
            found = {field: getattr(ours, field) for field in expected}
            found["rope_scaling"] = ours.rope_scaling and ours.rope_scaling["type"]
            assert found == expected, content
            compared += 1
    assert compared > 2 * len(given)


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_every_spelling_of_an_activation_is_that_function(name: str):
    """Catches: gelu for its tanh form, or the other way round; they differ by 5e-4."""
    mlp = PlainMLP(Config(n_layer=1, n_embd=4, n_head=1, intermediate_size=4, activation=ACTIVATION_NAMES[name]))
    x = torch.linspace(-4, 4, 60).view(15, 4)
    for linear in (mlp.fc, mlp.proj):
        linear.weight.data.copy_(torch.eye(4))
    torch.testing.assert_close(mlp(x), transformers.activations.ACT2FN[name](x), atol=1e-6, rtol=0)


def test_a_nested_config_that_leaves_out_nearly_everything(tmp_path: Path):
    """Catches: gemma-3-4b, whose text_config leaves out the defaults; a linear scaling that multiplies again."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip
    hf = {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {"hidden_size": 1152, "num_attention_heads": 16},
    }
    config, expected = (
        Config.from_hf(hf),
        told("gemma3", transformers.Gemma3Config(**json.loads(json.dumps(hf))).text_config),
    )
    found = {field: getattr(config, field) for field in expected} | {"rope_scaling": config.rope_scaling["type"]}
    assert found == expected and config.block_size == 131072


QWEN_1M = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}


def test_dual_chunk_attention_is_read():
    """Catches: Qwen2.5-1M that is converted to full attention; its s + w is its trained length."""
    hf = SHAPE | {"model_type": "qwen2", "max_position_embeddings": 1010000, "dual_chunk_attention_config": QWEN_1M}
    config = Config.from_hf(hf)
    assert (config.attention, config.block_size) == ("dual_chunk", 1010000)
    assert (config.chunk_trained, config.chunk_size, config.chunk_local) == (262144, 253952, 8192)
    assert Config.from_hf(hf | {"dual_chunk_attention_config": None}).attention == "full"
    back = config_to_hf(config)
    assert back["architectures"] == ["Qwen2ForCausalLM"] and back["dual_chunk_attention_config"] == QWEN_1M
    assert Config.from_hf(back) == config
    with pytest.raises(ValueError, match="No Hugging Face architecture"):  # of another temperature
        config_to_hf(config.override(dual_chunk_temperature_slope=0.2))


UNREAD = {
    "llama": [
        {"attn_logit_softcapping": 50.0}, {"use_alibi": True}, {"alibi": True}, {"attention_chunk_size": 8192},
        {"no_rope_layers": [1, 0, 1, 0]}, {"logit_scale": 0.06}, {"residual_multiplier": 0.2}, {"clip_qkv": 8.0},
        {"embedding_multiplier": 12}, {"attention_multiplier": 0.01}, {"qk_layernorm": True}, {"use_qk_norm": True},
        {"rope_interleaved": True}, {"mrope_section": [8, 8]}, {"partial_rotary_factor": 0.5}, {"is_causal": False},
        {"quantization_config": {"quant_method": "gptq"}}, {"attention_sink_size": 4}, {"sliding_window": 64},
        {"dual_chunk_attention_config": QWEN_1M}, {"num_local_experts": 8}, {"use_bidirectional_attention": True},
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, {"softmax_scale": 0.1}, {"causal": False},
        {"use_rope": False}, {"use_dynamic_ntk": True}, {"kv_lora_rank": 8}, {"embedding_scale": 8.0},
    ],
    "mistral": [{"mlp_bias": True}, {"layer_types": ["chunked_attention"] * 4}],
    "qwen2": [
        {"layer_types": ["linear_attention"] * 4}, {"layer_types": ["full_attention"] * 3},
        {"layer_types": ["sliding_attention"] * 4}, {"dual_chunk_attention_config": {"chunk_size": 64}},
        {"dual_chunk_attention_config": QWEN_1M | {"sparse_attention_config": {"0": {}}}},
        {"dual_chunk_attention_config": QWEN_1M, "use_sliding_window": True, "max_window_layers": 0},
    ],
    "gemma2": [{"sliding_window": None}],
    "gemma3_text": [{"rope_parameters": {"rope_theta": 1e6}}],
    "gpt_neox": [{"sliding_window": 64}],
}  # fmt: skip


@pytest.mark.parametrize("kind, fields", [(kind, fields) for kind, rows in UNREAD.items() for fields in rows])
def test_a_key_that_is_not_read_is_refused_by_name(kind: str, fields: dict):
    """Catches: a checkpoint that is converted to another model than it is, without a word."""
    with pytest.raises(ValueError, match=next(iter(fields))) as error:
        Config.from_hf(SHAPE | {"model_type": kind} | fields)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "kind, fields, message",
    [
        ("llama", {"rope_scaling": {"factor": 4.0}}, "RoPE has factor=4.0, which its type 'default' does not read"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 4.0, "low_freq_factor": 2.0}},
            "has low_freq_factor=2.0",
        ),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}, "a window has the type"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "RoPE has partial_rotary_factor=0.5"),
    ],
)
def test_a_parameter_of_rope_that_is_not_read_is_refused(kind: str, fields: dict, message: str):
    """Catches: a scaling without its type, or another one's parameter, that is left out silently."""
    with pytest.raises(ValueError, match=message):
        Config.from_hf(SHAPE | {"model_type": kind} | fields)


def test_keys_that_ask_for_nothing_are_fine():
    """Catches: real files refused for a switch that is off, a factor of 1, or how transformers once ran the model."""
    off = {
        "attention_dropout": 0.1, "_attn_implementation_autoset": True, "attn_implementation": "sdpa", "alibi": False,
        "use_flash_attention_2": True, "attention_chunk_size": None, "logit_scale": 1.0, "residual_multiplier": 1,
        "partial_rotary_factor": 1.0, "no_rope_layers": [1] * 4, "chunk_size_feed_forward": 0, "sliding_window": None,
        "use_sliding_window": False, "max_window_layers": 28, "quantization_config": None, "clip_qkv": None,
        "use_mrope": False, "is_causal": True, "add_cross_attention": False, "cross_attention_hidden_size": None,
        "layer_types": ["full_attention"] * 4, "pretraining_tp": 2, "rope_interleaved": False, "qk_layernorm": False,
        "rope_scaling": None, "attn_logit_softcapping": None, "output_attentions": True, "num_experts_per_tok": 2,
        "causal": True, "use_rope": True, "use_rotary_embeddings": True, "scale_attn_weights": True,
    }  # fmt: skip
    assert Config.from_hf(SHAPE | {"model_type": "llama"} | off) == Config.from_hf(SHAPE | {"model_type": "llama"})
    legacy = {"type": "linear", "factor": 4.0, "original_max_position_embeddings": 512}
    assert Config.from_hf(SHAPE | {"model_type": "llama", "rope_scaling": legacy}).block_size == 2048
