"""Checkpoint directories: Hugging Face to lit and back without loss, and never a half-written one taken for whole."""

import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import start_script
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from torch import nn

from lit_swa import GPT
from lit_swa.checkpoint import (
    build_model,
    check_checkpoint_dir,
    convert_hf_checkpoint,
    export_hf_checkpoint,
    is_complete,
    load_config,
    load_model,
    open_weights,
    save_checkpoint,
)
from lit_swa.formats.files import LazyTensor, as_lazy, shard_names
from lit_swa.linear_formats import group_rows
from lit_swa.quantize import quantize_linears

ROOT = Path(__file__).resolve().parents[1]
BASE = dict(
    num_hidden_layers=3,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    vocab_size=61,
    max_position_embeddings=64,
)
GQA = BASE | dict(num_key_value_heads=2)
HEADS = GQA | dict(head_dim=16)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama": ("LlamaConfig", HEADS),
    "llama, biases": ("LlamaConfig", HEADS | dict(attention_bias=True, mlp_bias=True)),
    "llama 3.1, tied": ("LlamaConfig", HEADS | dict(tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE)),
    "mistral": ("MistralConfig", HEADS | dict(sliding_window=8)),
    "mistral, no window": ("MistralConfig", HEADS | dict(sliding_window=None)),
    "qwen2": ("Qwen2Config", GQA),
    "qwen2, windows": ("Qwen2Config", GQA | dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "qwen3, tied": ("Qwen3Config", HEADS | dict(tie_word_embeddings=True)),
    "gemma2": ("Gemma2Config", HEADS | dict(sliding_window=8, query_pre_attn_scalar=24)),
    "gemma3": ("Gemma3TextConfig", HEADS | dict(sliding_window=8, query_pre_attn_scalar=24)),
    "neox, parallel": ("GPTNeoXConfig", BASE),
    "neox, sequential": ("GPTNeoXConfig", BASE | dict(rotary_pct=0.5, use_parallel_residual=False)),
}


def hf_model(name: str, directory: Path, **save_options) -> torch.nn.Module:
    """A random Hugging Face model, saved in `directory`."""
    import transformers

    class_name, fields = MODELS[name]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, class_name)(**fields)).eval()
    for parameter in model.parameters():  # norms and biases are constant at first: they must count, too
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory, **save_options)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    idx = torch.randint(0, 61, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(idx)
    return getattr(out, "logits", out)


# ------------------------------------------------------------------------------------------ Hugging Face -> lit -> back


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_exact(tmp_path: Path, name: str) -> None:
    """Would catch a weight in the wrong place, rows of q, k and v in the wrong order, a config field that gets lost."""
    from transformers import AutoModelForCausalLM

    theirs = hf_model(name, tmp_path / "hf")
    convert_hf_checkpoint(tmp_path / "hf")
    expected = logits(theirs)
    assert (logits(load_model(tmp_path / "hf")) - expected).abs().max() < 1e-5 * expected.abs().max()  # order of sums
    export_hf_checkpoint(tmp_path / "hf", tmp_path / "out")
    before, after = load_file(tmp_path / "hf/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(exported), expected)


def test_the_name_decides_nothing(tmp_path: Path) -> None:
    """Would catch a weight map or an architecture chosen by the model's name."""
    theirs = hf_model("gemma2", tmp_path / "hf")
    convert_hf_checkpoint(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/lit_config.json").read_text())
    (tmp_path / "hf/lit_config.json").write_text(json.dumps(config | {"name": "Llama-2-7b"}))
    export_hf_checkpoint(tmp_path / "hf", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [type(theirs).__name__]


def test_a_model_with_vision_gives_its_language_model(tmp_path: Path) -> None:
    """Would catch prefixed names not being found, or the vision weights being taken for an error."""
    hf_model("gemma3", tmp_path)
    plain = load_file(tmp_path / "model.safetensors")
    prefixed = {"model.language_model." + key.removeprefix("model."): t for key, t in plain.items()}
    prefixed |= {"model.vision_tower.x.weight": torch.ones(2), "model.multi_modal_projector.y": torch.ones(2)}
    save_file(prefixed, tmp_path / "model.safetensors", {"format": "pt"})
    text_config = json.loads((tmp_path / "config.json").read_text())
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text_config}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    convert_hf_checkpoint(tmp_path)
    assert torch.equal(open_weights(tmp_path)["transformer.wte.weight"].load(), plain["model.embed_tokens.weight"])


def test_shards_are_read_and_written(tmp_path: Path) -> None:
    """Would catch q, k and v being looked for in one file, and shards that are incomplete or too large."""
    theirs = hf_model("llama", tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    convert_hf_checkpoint(tmp_path, max_shard_bytes=30_000)
    shards = sorted(tmp_path.glob("lit_model-*.safetensors"))
    assert len(shards) > 2 and all(path.stat().st_size < 32_000 for path in shards)
    assert torch.allclose(logits(load_model(tmp_path)), logits(theirs), atol=1e-5)
    convert_hf_checkpoint(tmp_path)  # in one file again: the shards go
    assert [path.name for path in tmp_path.glob("lit_model*")] == ["lit_model.safetensors"]
    assert torch.allclose(logits(load_model(tmp_path)), logits(theirs), atol=1e-5)


def test_shards_hold_as_many_tensors_as_fit() -> None:
    """Would catch a tensor larger than a shard looping for ever, or an empty first shard."""
    assert shard_names("m", [5, 5], 10) == ["m.safetensors"] * 2
    assert shard_names("m", [20, 5, 5, 1], 10) == [
        "m-00001-of-00003.safetensors",
        *["m-00002-of-00003.safetensors"] * 2,
        "m-00003-of-00003.safetensors",
    ]


def test_bin_files_convert_like_safetensors(tmp_path: Path) -> None:
    """Would catch an old checkpoint whose tied or transposed tensors are read wrongly."""
    theirs = hf_model("llama", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, tmp_path / "pytorch_model.bin")
    torch.save({"lr": 1}, tmp_path / "training_args.bin")
    convert_hf_checkpoint(tmp_path)
    assert torch.allclose(logits(load_model(tmp_path)), logits(theirs), atol=1e-5)


def renamed(rename: Callable[[str], str]):
    return lambda state: {rename(name): tensor for name, tensor in state.items()}


def without_anchor(name: str) -> str:
    return name.removeprefix("model.").removeprefix("gpt_neox.")


SAVED_OTHERWISE = {  # what training scripts and other libraries make of a state dict
    "compiled": ("llama", renamed(lambda name: f"_orig_mod.{name}")),
    "compiled layers": ("llama", renamed(lambda name: re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", name))),
    "parallel and compiled": ("qwen3, tied", renamed(lambda name: f"module._orig_mod.{name}")),
    "the model of a trainer": ("gemma2", renamed(lambda name: f"model.{name}")),
    "without its head": ("qwen3, tied", renamed(without_anchor)),
    "without a prefix": ("neox, parallel", renamed(without_anchor)),
    "with the newer head": ("neox, sequential", renamed(lambda name: name.replace("embed_out", "lm_head"))),
    "tied, under the head's name": ("llama 3.1, tied", renamed(lambda n: n.replace("model.embed_tokens", "lm_head"))),
    "tied, under both": ("qwen3, tied", lambda s: s | {"lm_head.weight": s["model.embed_tokens.weight"].clone()}),
    "with buffers": (
        "llama",
        lambda state: state
        | {f"model.layers.0.self_attn.rotary_emb.{name}": torch.ones(8) for name in ("cos_cached", "sin_cached")}
        | {f"model.rotary_emb{name}": torch.ones(8) for name in (".inv_freq", ".original_inv_freq", "_local.inv_freq")}
        | {"model.layers.0.self_attn.rotary_emb.cos_sin_cache": torch.ones(8), "model.causal_mask": torch.ones(2, 2)},
    ),
    "with masks": (
        "neox, parallel",
        lambda state: state
        | {f"gpt_neox.layers.0.attention.{name}": torch.ones(1, dtype=torch.bool) for name in ("bias", "masked_bias")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAVED_OTHERWISE)
def test_weights_are_found_under_the_names_that_others_give_them(tmp_path: Path, case: str) -> None:
    """Would catch a wrapper's prefix, a buffer or the one name of tied weights that makes a checkpoint unreadable."""
    name, change = SAVED_OTHERWISE[case]
    theirs = hf_model(name, tmp_path)
    save_file(change(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors", {"format": "pt"})
    if case == "without its head":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3Model"]}))
    convert_hf_checkpoint(tmp_path)
    model, expected = load_model(tmp_path), logits(theirs)
    assert (logits(model) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert model.config.tie_embeddings == ("tied" in name or name.startswith("gemma"))


def test_two_embeddings_are_not_tied_whatever_the_config_says(tmp_path: Path) -> None:
    """Would catch an output embedding that is thrown away; transformers keeps it, too."""
    from transformers import AutoModelForCausalLM

    hf_model("qwen3, tied", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] * 2
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    convert_hf_checkpoint(tmp_path)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    assert (logits(load_model(tmp_path)) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_weight_under_two_names_is_refused(tmp_path: Path) -> None:
    """Would catch one of two different weights being taken by chance."""
    hf_model("llama", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["module.model.norm.weight"] = state["model.norm.weight"] + 1
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"holds model.norm.weight twice, once as module.model.norm.weight"):
        convert_hf_checkpoint(tmp_path)


@pytest.mark.parametrize("shards", ["all", "none"])
def test_the_single_file_counts_and_not_the_shards_beside_it(tmp_path: Path, capsys, shards: str) -> None:
    """Would catch the weights of an older save being converted without a word; transformers takes the single file."""
    hf_model("llama", tmp_path, max_shard_size="20KB")
    new = hf_model("llama", tmp_path / "new")
    for path in tmp_path.glob("model-0*") if shards == "none" else ():
        path.unlink()
    (tmp_path / "new/model.safetensors").rename(tmp_path / "model.safetensors")
    convert_hf_checkpoint(tmp_path)
    assert torch.allclose(logits(load_model(tmp_path)), logits(new), atol=1e-5)
    assert "and not the shards of model.safetensors.index.json" in capsys.readouterr().err


def test_a_converted_file_counts_and_not_the_shards_beside_it(tmp_path: Path) -> None:
    """Would catch a checkpoint copied over an older one, whose weights would be loaded without a word."""
    old, new = (GPT(tiny_config()) for _ in range(2))
    save_checkpoint(old, old.config, tmp_path, max_shard_bytes=80_000)
    save_checkpoint(new, new.config, tmp_path / "new")
    (tmp_path / "new/lit_model.safetensors").rename(tmp_path / "lit_model.safetensors")
    assert torch.equal(load_model(tmp_path).lm_head.weight, new.lm_head.weight)
    save_checkpoint(old, old.config, tmp_path, max_shard_bytes=80_000)
    assert torch.equal(load_model(tmp_path).lm_head.weight, old.lm_head.weight)


def test_two_sets_of_shards_are_named(tmp_path: Path) -> None:
    """Would catch one of two saves being chosen by the order of names."""
    (tmp_path / "config.json").write_text("{}")
    for name in ("model-00001-of-00002", "model-00002-of-00002", "model-00003-of-00003"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="two sets of weights .*00001-of-00002.*00003-of-00003"):
        convert_hf_checkpoint(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="two sets of weights .*a.safetensors.index.json, b"):
        convert_hf_checkpoint(tmp_path)


def test_weights_keep_their_dtype(tmp_path: Path) -> None:
    """Would catch bfloat16 checkpoints that double in size, or lose bits in float16, on either way."""
    hf_model("llama", tmp_path / "hf")
    state = {key: t.bfloat16() for key, t in load_file(tmp_path / "hf/model.safetensors").items()}
    save_file(state, tmp_path / "hf/model.safetensors", {"format": "pt"})
    convert_hf_checkpoint(tmp_path / "hf")
    export_hf_checkpoint(tmp_path / "hf", tmp_path / "out")
    assert {t.dtype for t in open_weights(tmp_path / "hf").values()} == {torch.bfloat16}
    after = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(state[key], after[key]) for key in state)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("model.layers.1.mlp.up_proj.weight"),
            r"lacks the weight model\.layers\.1\.mlp\.up_proj\.weight",
        ),
        (lambda state: state.update({"model.layers.0.mlp.router": torch.ones(2)}), "such as model.layers.0.mlp.router"),
        (lambda state: state.update({"model.norm.weight": torch.ones(31)}), r"model.norm.weight as \[31\]"),
        (lambda state: state.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)}), "int64"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path: Path, change, message: str) -> None:
    """Would catch a checkpoint of another model being converted to nonsense."""
    hf_model("llama", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        convert_hf_checkpoint(tmp_path)
    assert not (tmp_path / "lit_config.json").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"attention": "streaming", "sliding_window_size": 8},
        {"attention": "dual_chunk"},
        {"rotary_percentage": 0.5, "norm_qk": True},
        {"parallel_residual": True},
    ],
)
def test_export_refuses_what_hugging_face_cannot_compute(tmp_path: Path, fields: dict) -> None:
    """Would catch an export that loads and gives other logits."""
    config = tiny_config(**fields)
    save_checkpoint(GPT(config), config, tmp_path / "a")
    with pytest.raises(ValueError, match="No Hugging Face architecture"):
        export_hf_checkpoint(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


# -------------------------------------------------------------------------------------------------------- save and load


def test_save_and_load_keep_every_bit(tmp_path: Path, tiny_model) -> None:
    """Would catch a saved model that is not the one that was trained, or loses its tokenizer."""
    model = tiny_model()
    (tmp_path / "source").mkdir()
    (tmp_path / "source/tokenizer.json").write_text("{}")
    save_checkpoint(model, model.config, tmp_path / "out", source_dir=tmp_path / "source")
    loaded = load_model(tmp_path / "out")
    assert loaded.config == model.config and not loaded.training
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert (tmp_path / "out/tokenizer.json").exists() and is_complete(tmp_path / "out")
    save_checkpoint({k: v.bfloat16() for k, v in model.state_dict().items()}, model.config, tmp_path / "out")
    assert {p.dtype for p in load_model(tmp_path / "out", dtype="bfloat16").parameters()} == {torch.bfloat16}


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path, tiny_model) -> None:
    """Would catch a tied model that unties on loading: half of its embedding would stop training."""
    model = tiny_model(tie_embeddings=True)
    save_checkpoint(model, model.config, tmp_path)
    assert "lm_head.weight" not in open_weights(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_overrides_reach_the_model(tmp_path: Path, tiny_model) -> None:
    """Would catch overrides that are dropped, and overrides that the weights contradict being accepted."""
    model = tiny_model()
    save_checkpoint(model, model.config, tmp_path)
    loaded = load_model(tmp_path, attention="sliding", sliding_window_size=4)
    assert (loaded.config.attention, loaded.config.sliding_window_size) == ("sliding", 4)
    assert load_config(tmp_path) == model.config  # the file is not changed
    with pytest.raises(ValueError, match="asks for"):
        load_model(tmp_path, n_embd=24, n_head=3, n_query_groups=1)
    with pytest.raises(ValueError, match="layers"):
        load_model(tmp_path, n_layer=4000)
    with pytest.raises(ValueError, match="no field 'slidingwindow'"):
        load_model(tmp_path, slidingwindow=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "choose from float32, bfloat16"),
        ({"dtype": torch.int64}, "choose from"),
        ({"device": "warp"}, "cannot hold"),
        ({"device": "cuda:99"}, "cannot hold"),
    ],
)
def test_a_dtype_or_device_that_is_not_there_is_one_sentence(
    tmp_path: Path, tiny_model, arguments: dict, message: str
) -> None:
    """Would catch a traceback from deep inside torch, after minutes of loading."""
    model = tiny_model()
    save_checkpoint(model, model.config, tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path, **arguments)
    assert "\n" not in str(error.value)


def test_weights_of_another_config_are_not_saved(tmp_path: Path, tiny_model) -> None:
    """Would catch a checkpoint that cannot be loaded after hours of training."""
    with pytest.raises(ValueError, match="state dict"):
        save_checkpoint(tiny_model(), tiny_config(n_layer=3), tmp_path)
    assert not (tmp_path / "lit_config.json").exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_pickle_is_read_a_tensor_at_a_time(tmp_path: Path) -> None:
    """Would catch a .bin file that stays in memory as a whole, and numbers that are lost with its pages."""
    from lit_swa.formats.files import open_pickle

    def mapped() -> int:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["RssFile"].split()[0]) * 1024

    state = {f"w{i}": torch.randn(2**20) for i in range(20)}  # 80 MB
    torch.save(state, tmp_path / "pytorch_model.bin")
    tensors, before, most = open_pickle(tmp_path / "pytorch_model.bin"), mapped(), 0
    for _ in range(2):
        for name, tensor in tensors.items():
            assert torch.equal(tensor.load(), state[name])
            most = max(most, mapped() - before)
    assert most < 24e6


@pytest.mark.slow
def test_loading_takes_one_copy_of_memory(tmp_path: Path) -> None:
    """Would catch a loader that holds the file and the model at once, or initialises weights before it reads them."""
    script = """
import resource, sys, torch
from lit_swa import GPT, Config
from lit_swa.checkpoint import load_model, save_checkpoint
if sys.argv[2] == "save":
    config = Config(n_layer=16, n_head=16, n_embd=1024, intermediate_size=4096, vocab_size=1000)
    with torch.device("meta"):
        state = GPT(config).state_dict()
    save_checkpoint({k: torch.zeros(v.shape, dtype=torch.bfloat16) for k, v in state.items()}, config, sys.argv[1])
else:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = load_model(sys.argv[1], dtype=torch.float32)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(grown * 1024, sum(p.nbytes for p in model.parameters()))
"""
    for step in ("save", "load"):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), step], capture_output=True, text=True, cwd=ROOT, check=True
        )
    grown, model_bytes = map(int, done.stdout.split())
    assert model_bytes > 10**9 and grown < 1.05 * model_bytes + 64 * 2**20


# --------------------------------------------------------------------------------------- what is read, and what is held


@pytest.fixture
def mappings(monkeypatch) -> list:
    """The mappings of files that are made from here on; each has the ranges of bytes that were given back."""
    import mmap

    made = []

    class Recorded(mmap.mmap):
        def __new__(cls, *args, **kwargs) -> "Recorded":
            made.append(super().__new__(cls, *args, **kwargs))
            made[-1].given_back = []
            return made[-1]

        def madvise(self, option: int, start: int, length: int) -> None:
            self.given_back.append((start, start + length))
            super().madvise(option, start, length)

    monkeypatch.setattr(mmap, "mmap", Recorded)
    return made


def test_a_file_is_mapped_once_and_its_pages_are_given_back(tmp_path: Path, mappings: list) -> None:
    """Would catch address space of tensors x file size, and a loader that holds the file beside the cast model."""
    config = tiny_config(n_embd=96, n_head=2, intermediate_size=512, vocab_size=4096)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in GPT(config).state_dict().items()}
    save_checkpoint({name: torch.zeros(s, dtype=torch.bfloat16) for name, s in shapes.items()}, config, tmp_path)
    model = load_model(tmp_path, dtype="bfloat16")
    file_bytes = (tmp_path / "lit_model.safetensors").stat().st_size
    assert [len(mapping) for mapping in mappings] == [file_bytes] * 2  # one to check the file, one to load it
    assert mappings[-1].given_back == []  # the model uses them
    model.transformer.wte.weight.data.add_(1)  # which changes no file
    assert load_model(tmp_path).transformer.wte.weight.abs().max() == 0
    large = [t for t in open_weights(tmp_path).values() if t.n_bytes > 3 * mmap_page()]
    assert len(mappings[3].given_back) == len(large) > 5  # all were cast
    assert sum(stop - start for start, stop in mappings[3].given_back) > 0.8 * file_bytes
    tensor = open_weights(tmp_path)["lm_head.weight"]
    loaded, again = tensor.load(), tensor.load()
    assert loaded.data_ptr() == again.data_ptr() and loaded.untyped_storage().nbytes() == tensor.n_bytes
    del loaded
    assert mappings[-1].given_back == []
    del again
    [(start, stop)] = mappings[-1].given_back
    assert tensor.n_bytes - 2 * mmap_page() < stop - start <= tensor.n_bytes


def mmap_page() -> int:
    import mmap

    return mmap.PAGESIZE


def test_a_limit_on_address_space_is_one_sentence(tmp_path: Path, tiny_model, monkeypatch) -> None:
    """Would catch a traceback of "Cannot allocate memory" under ulimit -v."""
    import mmap

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    model = tiny_model()
    save_checkpoint(model, model.config, tmp_path)
    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(OSError, match=r"lit_model.safetensors cannot be mapped .*GB of address space.*ulimit -v"):
        load_model(tmp_path)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_a_rank_reads_the_rows_of_its_own_heads(tmp_path: Path, tiny_model, max_shard_bytes: int) -> None:
    """Would catch a tensor-parallel rank, or a split of q, k and v, that copies whole weights, or other heads' rows."""
    model = tiny_model(attn_bias=True)  # 6 query heads and 2 groups of 8 channels
    save_checkpoint(model, model.config, tmp_path, max_shard_bytes=max_shard_bytes)
    tensors, attn = open_weights(tmp_path), model.transformer.h[1].attn
    rank, ranks = 1, 2
    for key in ("weight", "bias"):
        stored, whole, parts = tensors[f"transformer.h.1.attn.qkv.{key}"], attn.qkv.get_parameter(key), []
        for group in "qkv":
            start, stop = group_rows(group, len(whole), attn.n_head, attn.n_query_groups)
            size = (stop - start) // ranks
            parts.append(stored.rows(start + rank * size, start + (rank + 1) * size))
        assert [part.shape[0] for part in parts] == [24, 8, 8] and sum(
            part.n_bytes for part in parts
        ) == whole.nbytes / 2
        loaded, mapped = [part.load() for part in parts], stored.load()
        assert torch.equal(torch.cat(loaded), torch.cat([whole[24:48], whole[56:64], whole[72:80]]))
        row_bytes = whole.nbytes // len(whole)
        assert [part.data_ptr() - mapped.data_ptr() for part in loaded] == [row_bytes * n for n in (24, 56, 72)]
    columns = tensors["transformer.h.1.attn.proj.weight"].columns(24, 48)  # what multiplies these heads' outputs
    assert torch.equal(columns.load(), attn.proj.weight[:, 24:48])
    assert columns.load().untyped_storage().nbytes() == columns.n_bytes == attn.proj.weight.nbytes / 2


def test_parts_that_are_not_there_are_refused_and_any_tensor_has_parts() -> None:
    """Would catch a slice that is silently shorter than what was asked for."""
    tensor = torch.arange(12.0).view(4, 3)
    computed = LazyTensor((4, 3), torch.float32, lambda: tensor)  # it cannot be read in parts: it is cut
    for lazy in (as_lazy(tensor), computed):
        assert torch.equal(lazy.rows(1, 3).load(), tensor[1:3]) and lazy.rows(2, 2).load().shape == (0, 3)
        assert torch.equal(lazy.rows(1, 3).columns(0, 1).load(), tensor[1:3, :1])
        for part in (lambda lazy=lazy: lazy.rows(3, 5), lambda lazy=lazy: lazy.columns(2, 1)):
            with pytest.raises(ValueError, match=r"shape \[4, 3\] has no part"):
                part()
    with pytest.raises(ValueError, match="no part 0 to 1 of dimension 1"):
        as_lazy(torch.ones(3)).columns(0, 1)


class Held:
    """Counts the bytes of the tensors that lazy ones loaded and that something still holds."""

    def __init__(self, tensors: dict[str, LazyTensor]) -> None:
        self.now, self.most, self.largest = 0, 0, max(tensor.n_bytes for tensor in tensors.values())
        self.tensors = {name: tensor._replace(load=self.counted(tensor)) for name, tensor in tensors.items()}

    def counted(self, tensor: LazyTensor) -> Callable[[], torch.Tensor]:
        def load() -> torch.Tensor:
            memory = tensor.load().numpy().copy()  # the tensor made of it holds it for as long as its storage lives
            self.now += memory.nbytes
            self.most = max(self.most, self.now)
            weakref.finalize(memory, self.release, memory.nbytes)
            return torch.from_numpy(memory)

        return load

    def release(self, n_bytes: int) -> None:
        self.now -= n_bytes


@pytest.mark.parametrize(("device", "dtype"), [("meta", torch.float32), ("cpu", torch.bfloat16)])
def test_weights_go_to_their_device_and_dtype_one_by_one(tmp_path: Path, tiny_model, device: str, dtype) -> None:
    """Would catch a dense model on the CPU on the way to a GPU, or a whole model in its stored dtype."""
    model = tiny_model(attn_bias=True)
    save_checkpoint(model, model.config, tmp_path)
    held = Held(open_weights(tmp_path))
    built = build_model(model.config, held.tensors, dtype, torch.device(device))
    assert held.most == held.largest and held.now == 0
    assert {(p.device.type, p.dtype) for p in built.parameters()} == {(device, dtype)}
    if device == "cpu":
        assert all(torch.equal(a, b.bfloat16()) for a, b in zip(built.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_each_weight_is_quantised_on_its_way(tmp_path: Path, tiny_model, mode: str) -> None:
    """Would catch a dense copy of the blocks, which is what quantised weights are to save, while a model is loaded."""
    pytest.importorskip("bitsandbytes")
    model = tiny_model(n_layer=4, n_embd=64, n_head=4, intermediate_size=128, mlp_bias=True)
    save_checkpoint(model, model.config, tmp_path)
    held = Held(open_weights(tmp_path))
    built = build_model(model.config, held.tensors, torch.float32, torch.device("cpu"), mode)
    linears = {name: module for name, module in model.transformer.h.named_modules() if isinstance(module, nn.Linear)}
    dense = sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for m in linears.values() for p in m.parameters())
    biggest = max(sum(p.nbytes for p in linear.parameters()) for linear in linears.values())
    assert held.now <= dense and held.most <= dense + biggest
    whole = load_model(tmp_path)
    quantize_linears(whole, mode, torch.float32)
    assert torch.equal(logits(built), logits(whole))


# -------------------------------------------------------------------------------------------- what is there and missing


def without(*names: str):
    def remove(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return remove


def truncated(name: str):
    return lambda directory: os.truncate(directory / name, (directory / name).stat().st_size - 5)


@pytest.mark.parametrize(
    ("sharded", "damage", "message"),
    [
        (
            False,
            without("lit_config.json"),
            "lit_model.safetensors and tokenizer.json are there, lit_config.json is missing",
        ),
        (
            False,
            without("lit_model.safetensors"),
            "lit_config.json and tokenizer.json are there, lit_model.safetensors is missing",
        ),
        (
            False,
            without("tokenizer.json"),
            "lit_config.json and lit_model.safetensors are there, tokenizer.json is missing",
        ),
        (False, truncated("lit_model.safetensors"), "lit_model.safetensors is truncated"),
        (
            True,
            without("lit_model-00002-of-00003.safetensors"),
            "2 of 3 shards are there, lit_model-00002-of-00003.safetensors is missing",
        ),
        (True, truncated("lit_model-00003-of-00003.safetensors"), "lit_model-00003-of-00003.safetensors is truncated"),
        (True, without("lit_model.safetensors.index.json"), "lit_model.safetensors is missing"),
    ],
)
def test_an_incomplete_directory_is_described(tmp_path: Path, sharded: bool, damage, message: str) -> None:
    """Would catch a bare "file not found", and a truncated file that loads as noise."""
    config = tiny_config()
    save_checkpoint(GPT(config), config, tmp_path, max_shard_bytes=80_000 if sharded else 10**9)
    (tmp_path / "tokenizer.json").write_text("{}")
    check_checkpoint_dir(tmp_path)
    damage(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
        check_checkpoint_dir(tmp_path)
    assert "\n" not in str(error.value) and not is_complete(tmp_path)


def test_an_unconverted_directory_says_how_to_convert(tmp_path: Path) -> None:
    """Would catch a user left alone with Hugging Face's files."""
    hf_model("llama", tmp_path, max_shard_size="40KB")
    with pytest.raises(FileNotFoundError, match=f"python scripts/convert_hf.py --checkpoint_dir {tmp_path}"):
        load_model(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[-1].unlink()
    n = len(shards)
    with pytest.raises(
        FileNotFoundError, match=f"{n - 1} of {n} shards are there, {shards[-1].name} is missing.*config.json is there"
    ):
        convert_hf_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()  # the shards' own names say how many there should be
    with pytest.raises(FileNotFoundError, match=f"{n - 1} of {n} shards are there"):
        convert_hf_checkpoint(tmp_path)


def test_a_directory_that_is_no_checkpoint_is_described(tmp_path: Path) -> None:
    """Would catch a traceback for a mistyped path."""
    with pytest.raises(FileNotFoundError, match="There is no checkpoint directory"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="holds notes.txt, but no weights"):
        convert_hf_checkpoint(tmp_path)


# ----------------------------------------------------------------------------------------------------- killed processes

KILLED_AT_EVERY_STEP = """
import json, os, sys, torch
from pathlib import Path
from lit_swa import GPT, Config
from lit_swa.checkpoint import convert_hf_checkpoint, export_hf_checkpoint, load_model, save_checkpoint
config = Config(n_layer=1, n_head=2, n_embd=8, intermediate_size=8, vocab_size=16, block_size=8)
old = {k: torch.zeros_like(v) for k, v in GPT(config).state_dict().items()}
new = {k: torch.ones_like(v) for k, v in old.items()}

def run_and_die(step, directory, new_config, shard_bytes):
    # the child dies at its step-th rename, write or removal, without cleaning up, as by kill -9
    pid = os.fork()
    if pid == 0:
        left = [step]
        def dying(function):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return function(*args, **kwargs)
            return call
        os.replace, os.fsync, Path.unlink = dying(os.replace), dying(os.fsync), dying(Path.unlink)
        save_checkpoint(new, new_config, directory, max_shard_bytes=shard_bytes)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

def kill_at_every_step(directory, new_config, shard_bytes):
    seen = []
    for step in range(100):
        save_checkpoint(old, config, directory, max_shard_bytes=shard_bytes)
        finished = run_and_die(step, directory, new_config, shard_bytes)
        try:
            model = load_model(directory)
            values = {p.mean().item() for p in model.parameters()}
            assert values in ({0.0}, {1.0}), f"mixed weights after step {step}"
            assert model.config == (config if values == {0.0} else new_config), f"another's config after step {step}"
            seen.append("old" if values == {0.0} else "new")
        except (ValueError, OSError):
            seen.append("incomplete")
        if finished:
            break
    save_checkpoint(new, new_config, directory, max_shard_bytes=shard_bytes)
    return {"seen": seen, "left": [p.name for p in directory.iterdir() if p.name.endswith(".tmp")]}

other = config.override(rope_base=5000.0)
cases = {"same config": (config, 10**9), "other config": (other, 10**9), "shards": (config, 1500)}
results = {name: kill_at_every_step(Path(sys.argv[1], name), *case) for name, case in cases.items()}
print(json.dumps(results), flush=True)

# and two at once
save_checkpoint(new, config, Path(sys.argv[1], "lit"))
export_hf_checkpoint(Path(sys.argv[1], "lit"), Path(sys.argv[1], "hf"))
def convert_in_a_child():
    pid = os.fork()
    if pid == 0:
        convert_hf_checkpoint(Path(sys.argv[1], "hf"))
        os._exit(0)
    return pid

children = [convert_in_a_child(), convert_in_a_child()]
assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]
load_model(Path(sys.argv[1], "hf"))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_save_leaves_the_old_the_new_or_an_incomplete_checkpoint(tmp_path: Path) -> None:
    """Would catch new weights under an old config, mixed shards, leftovers that stay, two writers in one file."""
    (tmp_path / "killed.py").write_text(KILLED_AT_EVERY_STEP)
    process = start_script(tmp_path / "killed.py", tmp_path, log=tmp_path / "log")
    process.join()
    printed = (tmp_path / "log").read_text()
    assert process.exitcode == 0, printed
    results = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    for result in results.values():
        assert result["seen"][0] in ("old", "incomplete") and result["seen"][-1] == "new" and len(result["seen"]) > 3
        assert result["left"] == []
    assert (
        "incomplete" not in results["same config"]["seen"]
    )  # one rename swaps everything: a checkpoint is always there


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, tiny_model, monkeypatch) -> None:
    """Would catch a run that ends with half a checkpoint on a full disk."""
    import shutil

    model = tiny_model()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(OSError, match="free some space"):
        save_checkpoint(model, model.config, tmp_path)
    assert not list(tmp_path.glob("lit_model*"))


# -------------------------------------------------------------------------------------------------------------- scripts


def test_scripts_convert_export_and_end_in_one_sentence(tmp_path: Path, run_script) -> None:
    """Would catch scripts that lose an argument, print more than the directory, or end in a traceback."""
    hf, out = str(tmp_path / "hf"), str(tmp_path / "out")
    hf_model("llama", tmp_path / "hf")
    code, printed, _ = run_script("scripts/convert_hf.py", "--checkpoint_dir", hf)
    assert (code, printed) == (0, f"{hf}\n")
    code, printed, _ = run_script("scripts/export_hf.py", "--checkpoint_dir", hf, "--output_dir", out)
    assert (code, printed) == (0, f"{out}\n") and (tmp_path / "out/model.safetensors").exists()
    code, printed, err = run_script("scripts/convert_hf.py", "--checkpoint_dir", tmp_path / "nowhere")
    assert (code, printed) == (2, "") and len(err.strip().splitlines()) == 1
