"""Each family equals transformers on a tiny random model: whole, step by step, and back through an export."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_parity_hf import largest_error
from tiny import randomize

from lit_swa import Config
from lit_swa.checkpoint import convert_hf_checkpoint, export_hf_checkpoint, load_model
from lit_swa.formats.convert import special_tokens
from lit_swa.formats.hf_export import config_to_hf
from lit_swa.rope import chunk_temperature
from lit_swa.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
S, T = 6, 21  # a window, and a text that is longer
SHAPE = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NO_GROUPS = {"num_key_value_heads": 6}
GRANITE = {
    "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
SCALED = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0],
    "original_max_position_embeddings": 64, "partial_rotary_factor": 0.5,
}  # fmt: skip
LONG = {"max_position_embeddings": 256, "original_max_position_embeddings": 64}
FALCON = {"num_key_value_heads": None, "intermediate_size": None, "ffn_hidden_size": 64}
GROUPS = {"new_decoder_architecture": True, "num_kv_heads": 2}
EXPERTS = {"num_local_experts": 5, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FULL = ["full_attention"] * 4
LLAMA4 = EXPERTS | {"head_dim": 8, "intermediate_size_mlp": 40, "attention_chunk_size": S, "floor_scale": 4}
CASES = {  # name: the class of transformers, the fields that are not SHAPE's
    "smollm3": ("SmolLM3", {}),
    "smollm3, windows": (
        "SmolLM3",
        {"no_rope_layers": [1, 0, 0, 1], "use_sliding_window": True, "sliding_window": S, "tie_word_embeddings": False},
    ),
    "gemma": ("Gemma", {"head_dim": 16}),
    "command r": ("Cohere", {"logit_scale": 0.5}),
    "command r+": ("Cohere", {"use_qk_norm": True, "attention_bias": True}),
    "command r 7b": ("Cohere2", {"sliding_window": S}),
    "exaone 4": ("Exaone4", {"sliding_window": S}),
    "exaone 4, no positions": ("Exaone4", {"layer_types": ["full_attention"] * 4}),
    "exaone 4 1.2b": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}),
    "olmo": ("Olmo", {"clip_qkv": 0.4}),
    "olmo 2": ("Olmo2", {}),
    "olmo 3": ("Olmo3", {"sliding_window": S}),
    "olmo 3, scaled": ("Olmo3", {"sliding_window": S, "rope_parameters": SCALED}),
    "stablelm": ("StableLm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "stablelm 2 12b": (
        "StableLm",
        {"qk_layernorm": True, "use_parallel_residual": True, "partial_rotary_factor": 0.5},
    ),
    "stablelm, one key head": ("StableLm", {"qk_layernorm": True, "num_key_value_heads": 1}),
    "phi": ("Phi", {}),
    "phi, normed": ("Phi", {"qk_layernorm": True, **NO_GROUPS}),
    "phi 3": ("Phi3", {"sliding_window": S, **NO_GROUPS}),
    "phi 4 mini": ("Phi3", {"rope_parameters": LONGROPE, **LONG}),
    "falcon 7b": ("Falcon", FALCON),
    "falcon 40b": ("Falcon", FALCON | GROUPS),
    "falcon 11b": ("Falcon", FALCON | GROUPS | {"num_ln_in_parallel_attn": 1}),
    "falcon 40b, biases": ("Falcon", FALCON | GROUPS | {"bias": True}),
    "falcon, serial": ("Falcon", FALCON | {"parallel_attn": False, "multi_query": False, "bias": True}),
    "granite": ("Granite", GRANITE | {"attention_bias": True, "mlp_bias": True}),
    "granite swa": ("GraniteSWA", GRANITE | {"sliding_window": S, "layer_rope_theta": [10000.0, 0, 500.0, 10000.0]}),
    "ministral": (
        "Ministral",
        {"sliding_window": S, "layer_types": ["full_attention", *["sliding_attention"] * 3], "head_dim": 16},
    ),
    "ministral 3": ("Ministral3", {"head_dim": 16, "rope_parameters": YARN | {"llama_4_scaling_beta": 0.3}}),
    "mixtral": ("Mixtral", EXPERTS | {"sliding_window": S}),
    "qwen 2 moe": ("Qwen2Moe", QWEN_EXPERTS | {"shared_expert_intermediate_size": 40, "mlp_only_layers": [1]}),
    "qwen 3 moe": ("Qwen3Moe", QWEN_EXPERTS | {"head_dim": 16, "norm_topk_prob": True}),
    "qwen 3 moe, windows": (
        "Qwen3Moe",
        QWEN_EXPERTS | {"use_sliding_window": True, "sliding_window": S, "max_window_layers": 2},
    ),
    "gemma 2, no windows": ("Gemma2", {"head_dim": 16, "layer_types": FULL}),
    "afmoe, dense": (
        "Afmoe",
        {"num_dense_layers": 4, "num_experts": 5, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": S},
    ),
    "afmoe": (
        "Afmoe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "head_dim": 16,
            "sliding_window": S,
            "route_scale": 1.5,
            "mup_enabled": True,
        },
    ),
    "gpt-oss": ("GptOss", EXPERTS | {"head_dim": 16, "sliding_window": S}),
    "gpt-oss, plain": (
        "GptOss",
        EXPERTS | {"head_dim": 16, "layer_types": FULL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "llama 4": ("Llama4", LLAMA4),
    "llama 4, no chunks": ("Llama4", LLAMA4 | {"no_rope_layers": [0] * 4}),
    "llama 4, yarn": ("Llama4", LLAMA4 | {"rope_parameters": YARN | {"factor": 8.0}}),
    "llama 4, every other": ("Llama4", LLAMA4 | {"interleave_moe_layer_step": 2, "use_qk_norm": False}),
}


def build_reference(case: str) -> torch.nn.Module:
    family, fields = CASES[case]
    torch.manual_seed(3)
    kind = f"{family}{'Text' * (family == 'Llama4')}Config"
    values = {k: v for k, v in (SHAPE | fields).items() if v is not None or k == "sliding_window"}
    config = getattr(transformers, kind)(**values)
    config._attn_implementation = "eager"
    reference = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    randomize(reference)
    return reference


SLOW = {  # others have their fields too
    "smollm3, windows", "exaone 4, no positions", "exaone 4 1.2b", "olmo 3", "phi, normed", "falcon 11b",
    "falcon, serial", "llama 4, every other", "command r",
}  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in CASES])
@torch.no_grad()
def test_a_family_equals_transformers_in_cached_and_out(case: str, tmp_path: Path):
    """Catches: a wrong norm, scale, activation, RoPE, window or weight map; a field that an export loses."""
    reference, idx = build_reference(case), torch.randint(1, 97, (2, T), generator=torch.Generator().manual_seed(4))
    reference.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")  # not read here
    convert_hf_checkpoint(tmp_path / "a")
    model, expected = load_model(tmp_path / "a"), reference(idx).logits
    assert largest_error(model(idx), expected) < 1e-5
    for rolling in {False, "sliding" in model.config.layer_variants}:
        model.config.rolling_kv_cache = rolling
        model.set_kv_cache(2, T)
        cuts = [0, 9, 12, *range(13, T + 1)]
        parts = [model(idx[:, a:b], torch.arange(a, b)) for a, b in zip(cuts, cuts[1:], strict=False)]
        assert largest_error(torch.cat(parts, dim=1), expected) < 1e-5
    export_hf_checkpoint(tmp_path / "a", tmp_path / "b")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", attn_implementation="eager").eval()
    assert largest_error(back(idx).logits, expected) < 1e-5


CLASSES = sorted({family for family, _ in CASES.values()})


@pytest.mark.parametrize("family", CLASSES)
def test_a_key_that_is_left_out_has_the_default_of_transformers(family: str):
    """Catches: a base, window, norm or pattern that changes when config.json leaves it to the class."""
    kind = getattr(transformers, f"{family}{'Text' * (family == 'Llama4')}Config")
    named = {"architectures": [f"{family}ForCausalLM"]}
    for given in ({}, {"num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}):
        theirs = kind(**given).to_dict()
        told = {key: value for key, value in theirs.items() if key not in ("architectures", "quantization_config")}
        assert Config.from_hf(named | given) == Config.from_hf(named | told)


def test_qwen_2_moe_has_the_windows_of_transformers_where_no_list_of_layers_is_given():
    """Catches: the windows of Qwen 2, whose keys are called alike and mean other layers."""
    given = SHAPE | {"use_sliding_window": True, "sliding_window": S, "max_window_layers": 3}
    told = transformers.Qwen2MoeConfig(**given)
    config = Config.from_hf({"architectures": ["Qwen2MoeForCausalLM"]} | given)
    assert [f"{kind}_attention" for kind in config.layer_variants] == told.layer_types


def test_an_export_takes_no_class_that_transformers_could_not_build():
    """Catches: YaRN in Phi 3, which knows longrope alone; the padding of a class, 128004, in a vocabulary of 97."""
    half = Config.from_hf(SHAPE | {"architectures": ["PhiForCausalLM"]}).override(rotary_percentage=0.5)
    yarn = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}
    llama = {"norm_class_name": "RMSNorm", "mlp_class_name": "GatedMLP", "parallel_residual": False}
    plain = dict.fromkeys(("shared_norm", "attn_bias", "attn_proj_bias", "mlp_bias", "lm_head_bias"), False)
    with pytest.raises(ValueError, match="No Hugging Face architecture"):
        config_to_hf(replace(half, rope_scaling=yarn, **llama | plain))
    assert special_tokens(Path("nowhere")) == dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


def test_an_export_ends_a_text_where_its_tokenizer_does(tiny_checkpoint: Path, tmp_path: Path):
    """Catches: the end of Llama's class, 2, in a model with a tokenizer of its own and no generation_config.json."""
    export_hf_checkpoint(tiny_checkpoint, tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    end = Tokenizer(tiny_checkpoint).eos_id
    assert end is not None and special_tokens(tmp_path)["eos_token_id"] == end


@torch.no_grad()
def test_gpt_oss_in_four_bits_is_what_transformers_makes_of_it(tmp_path: Path):
    """Catches: nibbles in another order, a scale of another block, gate and up mixed up: the form of the release."""
    from safetensors.torch import load_file, save_file

    family, fields = CASES["gpt-oss"]
    CASES["4 bits"] = family, fields | {"hidden_size": 64, "intermediate_size": 32}
    reference = build_reference("4 bits")
    del CASES["4 bits"]
    reference.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name in [name for name in state if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        E, inputs, outputs = state.pop(name).shape
        state[f"{name}_blocks"] = torch.randint(0, 256, (E, outputs, inputs // 32, 16), dtype=torch.uint8)
        state[f"{name}_scales"] = torch.randint(122, 126, (E, outputs, inputs // 32), dtype=torch.uint8)
        blocks, scales = state[f"{name}_blocks"], state[f"{name}_scales"]
        dense = transformers.integrations.mxfp4.convert_moe_packed_tensors(blocks, scales)
        reference.get_parameter(name).copy_(dense)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    convert_hf_checkpoint(tmp_path)
    idx = torch.randint(1, 97, (2, T))
    assert largest_error(load_model(tmp_path)(idx), reference(idx).logits) < 1e-5


NESTED = {
    "llama4": ("Llama4ForConditionalGeneration", "llama 4", "language_model."),
    "mistral3": ("Mistral3ForConditionalGeneration", "ministral 3", "model.language_model."),
}


@pytest.mark.parametrize("kind", NESTED)
@torch.no_grad()
def test_the_text_model_within_one_for_images_is_read(kind: str, tmp_path: Path):
    """Catches: the released form of Llama 4 and Ministral 3, whose text model has a prefix and a config of its own."""
    from safetensors.torch import load_file, save_file

    architecture, case, prefix = NESTED[kind]
    reference = build_reference(case)
    reference.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    outer = {"architectures": [architecture], "model_type": kind, "text_config": text, "vision_config": {"depth": 1}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    state = load_file(tmp_path / "model.safetensors")
    inner = prefix.replace("model.language_model.", "language_model.")
    named = {(inner if n.startswith("lm_head") else prefix.removesuffix("model.")) + n: t for n, t in state.items()}
    named["vision_tower.layers.0.weight"] = torch.ones(3)
    save_file(named, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "tokenizer.json").write_text("{}")
    convert_hf_checkpoint(tmp_path)
    idx = torch.randint(1, 97, (2, T))
    assert largest_error(load_model(tmp_path)(idx), reference(idx).logits) < 1e-5


UNREAD = [
    ("cohere2", {"attention_multiplier": 2.0}), ("cohere", {"sliding_window": 8}),
    ("exaone4", {"attention_bias": True}),
    ("olmo", {"attention_sink_size": 4}), ("olmo2", {"clip_qkv": 8.0}), ("stablelm", {"alibi": True}),
    ("phi", {"sliding_window": 64}), ("phi3", {"attention_bias": True}), ("falcon", {"alibi": True}),
    ("granite", {"num_local_experts": 4}), ("granite_swa", {"clip_qkv": 4.0}), ("ministral", {"attention_bias": True}),
    ("ministral3", {"rope_interleaved": True}), ("mixtral", {"shared_experts": 2}), ("qwen2_moe", {"clip_qkv": 1.0}),
    ("qwen3_moe", {"n_shared_experts": 2}), ("gpt_oss", {"attn_logit_softcapping": 30.0}),
    ("gpt_oss", {"quantization_config": {"quant_method": "gptq"}}), ("llama4_text", {"sliding_window": 128}),
    ("gemma", {"use_bidirectional_attention": True}), ("smollm3", {"logit_scale": 2.0}),
    ("exaone4", {"layer_types": ["chunked_attention"] * 4}), ("olmo3", {"rope_parameters": {"rope_theta": 1e4}}),
    ("phi3", {"rope_parameters": {"llama_4_scaling_beta": 0.1}}), ("gemma3_text", {"attn_logit_softcapping": 20.0}),
]  # fmt: skip


@pytest.mark.parametrize("kind, fields", UNREAD, ids=[f"{kind} {next(iter(fields))}" for kind, fields in UNREAD])
def test_a_key_that_is_not_read_is_refused_by_name(kind: str, fields: dict):
    """Catches: a checkpoint that is converted to another model than it is, without a word."""
    name = next(iter(fields))
    words = "llama_4_scaling_beta" if "llama_4_scaling_beta" in str(fields) else name
    with pytest.raises(ValueError, match=words):
        Config.from_hf(SHAPE | {"model_type": kind} | fields)


def test_the_weight_that_does_not_fit_is_the_one_that_is_named(tmp_path: Path):
    """Catches: q_proj blamed, with the rows of q, k and v together, where the number of key heads is wrong."""
    build_reference("olmo 2").save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text()) | {"num_key_value_heads": 3}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"k_proj.weight as \[16, 48\] torch.float32, which does not fit the \[24, 48\]"
    ):
        convert_hf_checkpoint(tmp_path)


def test_a_tokenizer_larger_than_the_embedding_is_said(tiny_checkpoint: Path, tmp_path: Path, capsys):
    """Catches: another model's tokenizer, which shows at the first text with one of its later tokens only."""
    build_reference("olmo 2").save_pretrained(tmp_path)
    shutil.copy(tiny_checkpoint / "tokenizer.json", tmp_path)
    convert_hf_checkpoint(tmp_path)
    assert (
        f"a tokenizer of {Tokenizer(tiny_checkpoint).vocab_size} tokens and an embedding of 97"
        in capsys.readouterr().err
    )


NEAREST = {
    "Gemma3nForConditionalGeneration": "Gemma3ForConditionalGeneration",
    "Gemma4ForCausalLM": r"Gemma\w*ForCausalLM",
    "Phi4ForCausalLM": r"Phi\d?ForCausalLM",
}


@pytest.mark.parametrize("name", NEAREST)
def test_an_architecture_that_we_lack_is_named_beside_the_nearest(name: str):
    """Catches: a long list of all that there is, and no hint which of them is meant."""
    with pytest.raises(ValueError, match=f"{name}' is not supported: the nearest that is here is {NEAREST[name]},"):
        Config.from_hf(SHAPE | {"architectures": [name], "model_type": "x"})


@torch.no_grad()
def test_the_family_that_the_tutorial_adds_equals_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches: a page whose code does not run, or computes another model."""
    from lit_swa.formats import hf_config, hf_export, hf_names

    page = (Path(__file__).resolve().parents[1] / "tutorials" / "add_a_model.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) < 40
    for module, table in ((hf_config, "ARCHITECTURES"), (hf_config, "MODEL_TYPES"), (hf_names, "NAMES")):
        monkeypatch.setattr(module, table, dict(getattr(module, table)))
    monkeypatch.setattr(hf_export, "EXPORTS", list(hf_export.EXPORTS))
    exec(compile(code, "add_a_model.md", "exec"), {})
    monkeypatch.setitem(CASES, "starcoder 2", ("Starcoder2", {"sliding_window": S}))
    test_a_family_equals_transformers_in_cached_and_out("starcoder 2", tmp_path)


def test_qwen_1m_has_the_temperature_of_its_report():
    """Catches: a text beyond the trained length that is read at another temperature than the model was trained for."""
    chunks = {"chunk_size": 12, "local_size": 4, "original_max_position_embeddings": 16}
    config = Config.from_hf(SHAPE | {"model_type": "qwen2", "dual_chunk_attention_config": chunks})
    factor = chunk_temperature(torch.tensor([[3, 15, 63]]), config).flatten()
    assert factor.tolist() == pytest.approx([1.0, 1.0, (1 + 0.1 * math.log(4)) ** 2])
