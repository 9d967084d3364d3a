"""Every field is judged in one place, and a config says what a model does."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from lit_swa import GPT, Config
from lit_swa.checkpoint import load_config
from lit_swa.config import CHOICES, RANGES
from lit_swa.families import CONFIGS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_named_shape_builds(name):
    """Catches: a table row with a typo. On the meta device: nothing is allocated."""
    with torch.device("meta"):
        model = GPT(Config.from_name(name))
    assert model.config.name == name


PARAMETERS = {
    "SmolLM2-135M": 134_515_008,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Llama-2-7b": 6_738_415_616,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.2-1B": 1_235_814_400,
    "Qwen2.5-0.5B": 494_032_768,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "pythia-14m": 14_067_712,
    "Qwen3-0.6B": 596_049_920,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_named_shapes_have_the_published_number_of_parameters(name):
    """Catches: a wrong width, head count, bias or tied embedding. The counts are those of the released checkpoints."""
    with torch.device("meta"):
        model = GPT(Config.from_name(name))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


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
