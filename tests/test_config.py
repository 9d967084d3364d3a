"""Every field is judged in one place, and a config says what a model does."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from released_configs import COMMON, RELEASED
from tiny import tiny_config

from lit_swa import GPT, Config
from lit_swa.checkpoint import load_config
from lit_swa.config import CHOICES, RANGES
from lit_swa.families import CONFIGS
from lit_swa.formats.hugging_face import empty_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_named_shape_builds(name):
    """Catches: a table row with a typo. On the meta device: nothing is allocated."""
    model = empty_model(Config.from_name(name, n_layer=2))
    assert model.config.name == name


def count_parameters(config: Config) -> int:
    """Of the whole model, from one layer of each kind."""
    total = 0
    for kind in dict.fromkeys(config.layer_mlps):
        no_experts = dict.fromkeys(("n_expert", "n_expert_per_token", "expert_size", "shared_expert_size"))
        fields = {} if kind == "MoE" else no_experts | {"shared_expert_gate": False}
        model = empty_model(config.override(n_layer=1, mlp_class_name=kind, **fields))
        block = sum(p.numel() for p in model.transformer.h.parameters())
        total += config.layer_mlps.count(kind) * block
        outside = sum(p.numel() for p in model.parameters()) - block
    return total + outside


PARAMETERS = {  # as the released checkpoints hold them, tied weights once, and without what sees images
    "SmolLM2-135M": 134_515_008, "SmolLM2-360M": 361_821_120, "SmolLM2-1.7B": 1_711_376_384,
    "SmolLM3-3B": 3_075_098_624, "TinyLlama-1.1B": 1_100_048_384, "Llama-2-7b": 6_738_415_616,
    "Llama-2-13b": 13_015_864_320, "Llama-2-70b": 68_976_648_192, "CodeLlama-7b": 6_738_546_688,
    "CodeLlama-13b": 13_016_028_160, "CodeLlama-34b": 33_743_970_304, "Meta-Llama-3-8B": 8_030_261_248,
    "Meta-Llama-3-70B": 70_553_706_496, "Llama-3.1-8B": 8_030_261_248, "Llama-3.1-405B": 405_853_388_800,
    "Llama-3.2-1B": 1_235_814_400, "Llama-3.2-3B": 3_212_749_824, "Llama-4-Scout-17B-16E": 107_769_861_120,
    "gpt-oss-20b": 20_914_757_184, "gpt-oss-120b": 116_829_156_672, "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B-v0.3": 7_248_023_552, "Mistral-Nemo-12B": 12_247_782_400, "Mistral-Small-24B": 23_572_403_200,
    "Mixtral-8x7B-v0.1": 46_702_792_704, "Mixtral-8x22B-v0.1": 140_620_634_112, "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304, "Qwen2.5-3B": 3_085_938_688, "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664, "Qwen2.5-32B": 32_763_876_352, "Qwen2.5-72B": 72_706_203_648,
    "Qwen1.5-MoE-A2.7B": 14_315_784_192, "Qwen3-0.6B": 596_049_920, "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096, "Qwen3-8B": 8_190_735_360, "Qwen3-14B": 14_768_307_200, "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624, "Qwen3-235B-A22B": 235_093_634_560, "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896, "gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320, "gemma-3-270m": 268_098_176, "gemma-3-1b": 999_885_952,
    "pythia-14m": 14_067_712, "pythia-31m": 30_494_720, "pythia-70m": 70_426_624, "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632, "pythia-1.4b": 1_414_647_808, "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016, "pythia-12b": 11_846_072_320, "stablelm-3b-4e1t": 2_795_443_200,
    "stable-code-3b": 2_795_443_200, "stablelm-2-1_6b": 1_644_515_328, "falcon-7b": 6_921_720_704,
    "phi-1_5": 1_418_270_720, "phi-2": 2_779_683_840, "Phi-3-mini-4k": 3_821_079_552,
    "Phi-3-mini-128k": 3_821_079_552, "Phi-4-mini": 3_836_021_760,
    "Phi-3-medium-4k": 13_960_238_080, "phi-4": 14_659_507_200, "OLMo-1B": 1_176_764_416, "OLMo-7B": 6_888_095_744,
    "OLMo-2-1B": 1_484_916_736, "OLMo-2-7B": 7_298_617_344, "OLMo-2-13B": 13_716_198_400,
    "OLMo-2-32B": 32_234_279_936, "c4ai-command-r-v01": 34_980_831_232, "c4ai-command-r-plus": 103_810_674_688,
    "EXAONE-4.0-32B": 32_003_216_384, "granite-3.1-2b": 2_533_531_648, "granite-3.1-8b": 8_170_848_256,
}  # fmt: skip
SIZES = {  # in billions, as papers and model cards round them, of shapes without a count here that is exact
    "open_llama_3b": 3.43, "open_llama_7b": 6.7, "open_llama_13b": 13.0, "Platypus-30B": 32.5, "CodeLlama-70b": 69,
    "Llama-4-Maverick-17B-128E": 400, "Ministral-3-3B": 3.4, "Ministral-3-8B": 8.4, "Ministral-3-14B": 13.5,
    "Qwen2-57B-A14B": 57.4, "gemma-3-4b": 3.88, "gemma-3-12b": 11.77, "gemma-3-27b": 27.0, "dolly-v2-12b": 12,
    "RedPajama-INCITE-3B": 2.8, "RedPajama-INCITE-7B": 6.9, "stablelm-base-alpha-3b": 3.64,
    "stablelm-base-alpha-7b": 7.87, "stablelm-2-12b": 12.1, "falcon-40b": 41, "falcon-180B": 180, "Olmo-3-7B": 7.3,
    "Olmo-3-32B": 32, "c4ai-command-r7b-12-2024": 8, "c4ai-command-a-03-2025": 111, "EXAONE-4.0-1.2B": 1.28,
    "Falcon3-1B-Base": 1.67, "Falcon3-3B-Base": 3.23, "Falcon3-7B-Base": 7.46, "Falcon3-10B-Base": 10.3,
    "salamandra-2b": 2.253, "salamandra-7b": 7.768, "Mistral-Large-Instruct-2407": 123, "MicroLlama": 0.304,
}  # fmt: skip


@pytest.mark.parametrize("name", [*PARAMETERS, *SIZES])
def test_named_shapes_have_the_published_number_of_parameters(name):
    """Catches: a wrong width, head count, bias or tied embedding."""
    count = count_parameters(Config.from_name(name))
    if name in PARAMETERS:
        assert count == PARAMETERS[name]
    else:
        assert count == pytest.approx(SIZES[name] * 1e9, rel=0.015)


FILES = {name: COMMON | content for name, content in RELEASED.items()} | {  # where the class's defaults say it all
    "gpt-oss-120b": {"model_type": "gpt_oss"},
    "c4ai-command-r-v01": {"model_type": "cohere", "rope_theta": 8e6},
    "falcon-7b": {"model_type": "falcon"},
    "phi-1_5": {"model_type": "phi"},
    "stablelm-3b-4e1t": {"model_type": "stablelm"},
    "OLMo-7B": {"model_type": "olmo"},
    "Qwen1.5-MoE-A2.7B": {"model_type": "qwen2_moe", "max_position_embeddings": 8192, "rope_theta": 1e6},
}


@pytest.mark.parametrize("name", FILES)
def test_a_named_shape_is_what_its_config_json_says(name):
    """Catches: a shape whose base, window or pattern is another one, and a released file that is refused."""
    theirs, ours = (dataclasses.asdict(c) for c in (Config.from_hf(FILES[name]), Config.from_name(name)))
    assert {k: v for k, v in theirs.items() if v != ours[k] and k not in ("name", "balancing_loss")} == {}


@pytest.mark.parametrize("field", RANGES)
def test_numbers_out_of_range_are_refused_before_anything_is_built(field):
    """Catches: S7: minimum - 1, maximum + 1, huge and NaN values that would allocate or divide by zero."""
    least, most = RANGES[field]
    for value in (
        least - 1,
        most + 1 if most < 1e9 else most * 2,
        10**30,
        -(10**30),
        math.nan,
        math.inf,
        -math.inf,
        "8",
        [8],
    ):
        with pytest.raises(ValueError, match=field):
            tiny_config(**{field: value})


@pytest.mark.parametrize("field", CHOICES)
def test_a_choice_that_does_not_exist_is_refused_with_the_choices(field):
    """Catches: a typo that falls back to a default."""
    with pytest.raises(ValueError, match=CHOICES[field][0]):
        tiny_config(**{field: "nonsense"})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_query_groups": 4}, "does not divide"),
        ({"attention": "sliding"}, "needs sliding_window_size"),
        ({"attention": "sliding", "sliding_window_size": 0}, "sliding_window_size=0"),
        ({"attention": "banana"}, "'banana' is none of full, sliding"),
        ({"attention": "full,,full"}, "'' is none of"),
        ({"padded_vocab_size": 90}, "less than vocab_size"),
        ({"rotary_percentage": 0.4}, "even number"),
        ({"rolling_kv_cache": 1}, "must be of type bool"),
        ({"n_layer": True}, "must be of type int"),
        ({"rope_scaling": {"type": "magic"}}, "'magic' is none of"),
        ({"rope_scaling": {"type": "linear"}}, "needs factor"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "positive number"),
    ],
)
def test_values_that_do_not_fit_are_refused_in_one_sentence(fields, message):
    """Catches: a config that fails far from its cause."""
    with pytest.raises(ValueError, match=message) as error:
        tiny_config(**fields)
    assert "\n" not in str(error.value)


def test_an_unknown_field_names_its_neighbours():
    """Catches: --model.sliding_window silently ignored."""
    with pytest.raises(ValueError, match="sliding_window_size"):
        Config.from_name("SmolLM2-135M", sliding_window=256)
    with pytest.raises(ValueError, match="n_layer"):
        Config.from_dict({"n_layers": 2})


def test_an_unknown_name_lists_the_near_ones():
    """Catches: a KeyError in place of help."""
    with pytest.raises(ValueError, match=r"Mistral-7B-v0\.1"):
        Config.from_name("Mistral-7B")


def test_an_override_without_effect_is_refused():
    """Catches: a window set on a model that attends in full, which would be measured as if it had one."""
    with pytest.raises(ValueError, match="no effect"):
        Config.from_name("SmolLM2-135M", sliding_window_size=256)
    with pytest.raises(ValueError, match="no effect"):
        Config.from_name("SmolLM2-135M", rolling_kv_cache=True)
    assert (
        Config.from_name("SmolLM2-135M", sliding_window_size=256, attention="sliding").layer_variants
        == ["sliding"] * 30
    )
    assert Config.from_name("Mistral-7B-v0.1", attention="full").layer_variants == ["full"] * 32


def test_a_pattern_tiles_over_the_layers():
    """Catches: a pattern that must divide the number of layers."""
    assert tiny_config(n_layer=5, attention="sliding, full", sliding_window_size=4).layer_variants == [
        "sliding",
        "full",
    ] * 2 + ["sliding"]


def test_the_name_changes_nothing(tiny_model):
    """Catches: behaviour that follows a model's name."""
    model = tiny_model(name="Mistral-7B-v0.1", attention="sliding", sliding_window_size=4)
    other = GPT(dataclasses.replace(model.config, name="gemma-2-2b")).eval()
    other.load_state_dict(model.state_dict())
    idx = torch.randint(0, 97, (1, 9))
    assert torch.equal(model(idx), other(idx))


def test_a_config_survives_its_own_dictionary():
    """Catches: a field that lit_config.json cannot hold."""
    for name in CONFIGS:
        config = Config.from_name(name)
        assert Config.from_dict(dataclasses.asdict(config)) == config


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_file_holds_what_belongs_to_the_weights_and_what_was_changed(name):
    """Catches: a field that gets lost on the way through lit_config.json, and one that hides an edited default."""
    config = Config.from_name(
        name, **({} if "attention" in CONFIGS[name] else {"attention": "streaming", "sliding_window_size": 8})
    )
    stored = json.loads(json.dumps(config.to_dict()))
    assert Config.from_dict(stored) == config
    assert Config.from_dict(dataclasses.asdict(config)) == config  # a file that holds every field, as older ones do
    assert "rolling_kv_cache" not in stored and stored["n_layer"] == config.n_layer and "norm_eps" in stored


def test_a_file_that_an_editor_saved_with_a_byte_order_mark_is_read(tmp_path):
    """Catches: a hand-edited lit_config.json called damaged, with the advice to download it again."""
    (tmp_path / "lit_config.json").write_text(json.dumps(Config(n_layer=3).to_dict()), encoding="utf-8-sig")
    assert load_config(tmp_path).n_layer == 3


def test_an_edited_default_counts_for_a_checkpoint_that_does_not_say_otherwise(monkeypatch):
    """Catches: a file that holds all fields, so that editing Config in place changes nothing, without a word; and one
    that lacks a shape, so that the edit makes its weights unreadable."""
    edited = {"attention": "sliding", "sliding_window_size": 64, "n_layer": 3, "vocab_size": 7, "norm_eps": 0.1}
    plain, mistral = (Config.from_name(name).to_dict() for name in ("Llama-2-7b", "Mistral-7B-v0.1"))
    names = [f.name for f in dataclasses.fields(Config)]
    values = dict(zip(names, Config.__init__.__defaults__, strict=True)) | edited
    monkeypatch.setattr(Config.__init__, "__defaults__", tuple(values[name] for name in names))
    config = Config.from_dict(plain)
    assert (config.attention, config.sliding_window_size) == ("sliding", 64)
    assert (config.n_layer, config.vocab_size, config.norm_eps) == (32, 32000, 1e-5)
    assert Config.from_dict(mistral).sliding_window_size == 4096
    assert Config.from_dict(plain, attention="full").attention == "full"


def test_a_config_alone_is_checked_too():
    """Catches: config.py imported without model.py, whose table of variants would be empty."""
    program = (
        "from lit_swa.config import Config\n"
        "dual = Config.from_name('SmolLM2-135M').override(attention='dual_chunk', block_size=65536)\n"
        "assert dual.chunk_trained == 8192\n"
        "Config(attention='banana')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "ValueError: attention='banana' does not fit" in done.stderr
