"""Tokenizer: ids and texts equal transformers', streams equal decode, damaged files end in one sentence."""

from __future__ import annotations

import base64
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer

from lit_swa.formats.directory import copy_tokenizer, has_tokenizer
from lit_swa.formats.tokenizer_backends import _growth
from lit_swa.formats.tokenizer_slow import check_slow_class
from lit_swa.tokenizer import StreamDecoder, Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. the then they there this that",
    "def add(x: int, y: int) -> int:\n    return x + y\n\n\nprint(add(1, 23))",
    "x = 12 + 345 * 6789 / 3.14159 and 0x1F",
    "naïve café déjà vu, Straße, año, čeština",
    "日本語のテキストと中文字符 한국어",
    "😀 👍 smile",
    "\tif a:\n\t\tb = 1\n",
] * 4

TEXTS = [
    "",
    " ",
    "Hello world",
    " leading space",
    "trailing space ",
    "  two    four     five\n\n\n   mixed \t\t tabs\r\n",
    "for i in range(10):\n    x[i] = i ** 2   # 3.14 1234567890",
    "naïve café Straße ﬁ ½ Ⅷ",
    "e\u0301 \u0301 \u200d \u200b \ufeff\u00a0.",
    "😀👨‍👩‍👧‍👦🏳️‍🌈 flags 🇩🇪🇯🇵 a😀b",
    "日本語 テキスト 中文 한국어 🈚",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>",
    "<s>[INST] a </s> b<s>c</s></s> <unk> d",
    "x" * 300,
    "\x00\x01\x7f control",
    "a\u2581b \u2581 c ▁▁",
    "Ġword Ċ <0x41> <0xE2>",
]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


# --- small tokenizers of every kind -----------------------------------------------------------------------------------


def save(tokenizer: RustTokenizer, directory: Path, **config) -> Path:
    """As transformers would save it: tokenizer.json and tokenizer_config.json."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **config).save_pretrained(directory)
    return directory


def make_byte_level(directory: Path) -> Path:
    """SmolLM2: digits apart, byte-level BPE, nothing added around the text."""
    tokenizer = RustTokenizer(models.BPE())
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIALS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    names = {"bos_token": SPECIALS[1], "eos_token": SPECIALS[2], "pad_token": SPECIALS[2], "unk_token": SPECIALS[0]}
    return save(tokenizer, directory, **names)


def llama_like(**model) -> RustTokenizer:
    """Llama 2: BPE over characters, other characters as byte tokens, BOS in front."""
    tokenizer = RustTokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], limit_alphabet=60)
    tokenizer.train_from_iterator(CORPUS, trainer)
    spec = json.loads(tokenizer.to_str())
    for byte in range(256):
        spec["model"]["vocab"][f"<0x{byte:02X}>"] = len(spec["model"]["vocab"])
    tokenizer = RustTokenizer.from_str(json.dumps(spec))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def make_llama(directory: Path) -> Path:
    return save(llama_like(), directory, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make_metaspace(directory: Path) -> Path:
    """The newer form of the same: a Metaspace pre-tokenizer, a prefix only in front of the whole text."""
    tokenizer = llama_like()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "[PAD]"}
    return save(tokenizer, directory, extra_special_tokens=["<|im_start|>", "<|im_end|>"], **names)


def make_unigram(directory: Path) -> Path:
    """T5: unigram, Metaspace, EOS behind the text."""
    tokenizer = RustTokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return save(tokenizer, directory, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def make_slow(directory: Path, **config) -> Path:
    """GPT-2's slow tokenizer: vocab.json and merges.txt, and no tokenizer.json."""
    spec = json.loads((make_byte_level(directory) / "tokenizer.json").read_text(encoding="utf-8"))
    for path in directory.iterdir():
        path.unlink()
    write_json(directory / "vocab.json", spec["model"]["vocab"])
    merges = ["#version: 0.2", *map(" ".join, spec["model"]["merges"])]
    (directory / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer", **config})
    return directory


def make_sentencepiece(directory: Path, model_type: str = "bpe", **config) -> Path:
    """Llama's own tokenizer.model, without a tokenizer.json."""
    import sentencepiece

    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=data,
        vocab_size=450,
        model_type=model_type,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        user_defined_symbols=["<tool>"],
        minloglevel=5,
    )
    directory.mkdir(parents=True)
    (directory / "tokenizer.model").write_bytes(data.getvalue())
    write_json(directory / "tokenizer_config.json", {"add_bos_token": True, "legacy": False, **config})
    return directory


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


MAKERS = {
    "byte_level": make_byte_level,
    "llama": make_llama,
    "metaspace": make_metaspace,
    "unigram": make_unigram,
    "slow": make_slow,
    "sentencepiece": make_sentencepiece,
}
FAST = [kind for kind in MAKERS if kind != "sentencepiece"]


@pytest.fixture(scope="session")
def directories(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: make(root / kind) for kind, make in MAKERS.items()}


@pytest.fixture(scope="session")
def tokenizers(directories) -> dict[str, Tokenizer]:
    return {kind: Tokenizer(directory) for kind, directory in directories.items()}


@pytest.fixture(scope="session")
def references(directories) -> dict:
    from transformers import AutoTokenizer

    return {kind: AutoTokenizer.from_pretrained(directories[kind]) for kind in FAST}


@pytest.fixture
def copy_of(directories, tmp_path):
    """A writable copy of one directory."""

    def copy(kind: str) -> Path:
        for path in directories[kind].iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        return tmp_path

    return copy


# --- encode and decode ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAST)
def test_ids_equal_transformers(kind, tokenizers, references):
    """Would catch a special token added twice or not at all, and a text changed before it is encoded."""
    ours, theirs = tokenizers[kind], references[kind]
    for text in TEXTS:
        assert ours.encode(text) == theirs(text).input_ids, text
        assert ours.encode(text, bos=False) == theirs(text, add_special_tokens=False).input_ids, text


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("skip", [True, False])
def test_texts_equal_transformers(kind, skip, tokenizers, references):
    """Would catch special tokens that are kept or dropped against the flag, and lost or added spaces."""
    ours, theirs = tokenizers[kind], references[kind]
    for text in TEXTS:
        ids = theirs(text).input_ids
        expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=skip) == expected, text


@pytest.mark.parametrize("kind", FAST)
def test_named_ids_equal_transformers(kind, tokenizers, references):
    """Would catch a token that only tokenizer_config.json names and that gets another id, or none."""
    ours, theirs = tokenizers[kind], references[kind]
    named = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == named
    assert ours.vocab_size == len(theirs)
    assert ours.special_tokens == theirs.special_tokens_map


@pytest.mark.parametrize("kind", ["byte_level", "llama", "metaspace", "sentencepiece"])
def test_decode_gives_the_text_back(kind, tokenizers):
    """Would catch any loss in either direction: these four encode every text."""
    tokenizer = tokenizers[kind]
    for text in TEXTS[:11]:
        if kind == "metaspace" and text.startswith(" "):
            continue  # Metaspace takes a leading space for the prefix that it would add itself
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bos_and_eos_are_forced(tokenizers):
    """Would catch a flag that is ignored, or an EOS that comes twice because the model's own template adds one."""
    for kind, tokenizer in tokenizers.items():
        plain = tokenizer.encode("Hello", bos=False)
        assert tokenizer.encode("Hello", bos=False, eos=True) == [*plain, tokenizer.eos_id]
        if tokenizer.bos_id is not None:
            assert tokenizer.encode("Hello", bos=True) == [tokenizer.bos_id, *plain]
            assert tokenizer.encode("", bos=True, eos=True) == [tokenizer.bos_id, tokenizer.eos_id]
        assert tokenizer.encode("Hello", eos=True).count(tokenizer.eos_id) == 1, kind
        typed = "Hello" + tokenizer.special_tokens["eos_token"]
        assert tokenizer.encode(typed, eos=True)[-2:] == [tokenizer.eos_id] * 2


def test_a_token_that_the_files_do_not_name_is_refused(tokenizers):
    """Would catch None among the ids."""
    assert tokenizers["unigram"].bos_id is None
    with pytest.raises(ValueError, match="no bos_token"):
        tokenizers["unigram"].encode("Hello", bos=True)


def test_decode_takes_tensors_and_iterators(tokenizers):
    """Would catch a tensor's elements reaching the library as tensors."""
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.encode("Hello world")
    assert tokenizer.decode(torch.tensor(ids)) == "Hello world"
    assert tokenizer.decode(iter(ids)) == "Hello world"
    assert tokenizer.decode(torch.tensor([], dtype=torch.int64)) == ""
    assert tokenizer.decode(torch.tensor(ids[0])) == tokenizer.decode(ids[:1])


@pytest.mark.parametrize("ids", [[-1], [2**32], [1.5], ["a"], [None], torch.zeros(1, 2, dtype=torch.int64)])
def test_decode_refuses_what_is_not_an_id(ids, tokenizers):
    """Would catch an OverflowError or a TypeError from inside a library."""
    for tokenizer in tokenizers.values():
        with pytest.raises(ValueError, match="is not an id"):
            tokenizer.decode(ids)


def test_an_id_without_a_token_decodes_to_nothing(tokenizers):
    """Would catch a crash when a model with a padded vocabulary samples one of the unused ids."""
    for tokenizer in tokenizers.values():
        ids = tokenizer.encode("the", bos=False)
        assert tokenizer.decode([*ids, tokenizer.vocab_size + 7]) == "the"
        assert tokenizer.id_to_token(tokenizer.vocab_size + 7) is None
        assert tokenizer.id_to_token(-1) is None
        assert "".join(tokenizer.decode_stream([*ids, tokenizer.vocab_size + 7])) == "the"


def test_tokens_and_ids_are_inverse(tokenizers):
    """Would catch an offset between the two directions, and added tokens missing from one of them."""
    for tokenizer in tokenizers.values():
        for token_id in range(tokenizer.vocab_size):
            assert tokenizer.token_to_id(tokenizer.id_to_token(token_id)) == token_id
        assert tokenizer.token_to_id("no such token") is None


def test_encode_refuses_what_is_not_text(tokenizers):
    """Would catch a TypeError from Rust, and half an emoji sent on as something else."""
    for tokenizer in tokenizers.values():
        with pytest.raises(ValueError, match="takes one string"):
            tokenizer.encode(["Hello"])
        with pytest.raises(ValueError, match="cannot encode this text"):
            tokenizer.encode("half an emoji: \ud83d")


def test_padding_and_truncation_of_the_file_are_off(copy_of):
    """Would catch prompts that are cut to the length of the last training run."""
    directory = copy_of("byte_level")
    rust = RustTokenizer.from_file(str(directory / "tokenizer.json"))
    rust.enable_truncation(4)
    rust.enable_padding(length=16)
    rust.save(str(directory / "tokenizer.json"))
    tokenizer = Tokenizer(directory)
    assert tokenizer.decode(tokenizer.encode("a text, longer than four tokens")) == "a text, longer than four tokens"
    assert len(tokenizer.encode("a")) == 1


def test_a_tokenizer_can_be_pickled(tokenizers):
    """Would catch a data loader that cannot send its tokenizer to its workers."""
    for tokenizer in tokenizers.values():
        assert pickle.loads(pickle.dumps(tokenizer)).encode(TEXTS[9]) == tokenizer.encode(TEXTS[9])


def test_a_tokenizer_needs_no_torch(directories):
    """Would catch seconds of import in every worker that only turns texts into ids."""
    program = "import sys; from lit_swa.tokenizer import Tokenizer; Tokenizer(sys.argv[1]).encode('a'); "
    program += "print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", program, str(directories["byte_level"])]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.stdout == "False\n", run.stderr


# --- the small files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"), [(7, [2, 7]), ([7, 2, 9, 7], [2, 7, 9]), (None, [2]), ([], [2]), (2, [2])]
)
def test_stop_ids_are_both_files_together(value, expected, copy_of):
    """Would catch a chat model that never stops because its end of turn is only in generation_config.json."""
    directory = copy_of("byte_level")
    write_json(directory / "generation_config.json", {"eos_token_id": value})
    assert Tokenizer(directory).eos_ids == expected


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {"eos_token_id": [7, 2, 9]}, [2, 7, 9]),
        ({"temperature": 0.6}, {"eos_token_id": 7}, [2, 7]),
        ({"eos_token_id": None}, {"text_config": {"eos_token_id": [7]}}, [2, 7]),
        ({"eos_token_id": 9}, {"eos_token_id": [7], "text_config": {"eos_token_id": 8}}, [2, 9]),
        ({}, {"eos_token_id": 7, "text_config": {"eos_token_id": 8}}, [2, 7]),
    ],
)
def test_stop_ids_of_config_json_count_where_generation_config_names_none(
    generation, config, expected, copy_of, tmp_path_factory
):
    """Would catch an answer that runs on, in the directory and in one that its tokenizer is copied to."""
    directory, copied = copy_of("byte_level"), tmp_path_factory.mktemp("copied")
    write_json(directory / "config.json", config)
    if generation is not None:
        write_json(directory / "generation_config.json", generation)
    assert Tokenizer(directory).eos_ids == expected
    copy_tokenizer(directory, copied)
    assert Tokenizer(copied).eos_ids == expected
    assert (
        not generation
        or generation.items() - {"eos_token_id": None}.items()
        <= json.loads((copied / "generation_config.json").read_text()).items()
    )


def test_templates_in_folders_are_copied_with_the_tokenizer(copy_of, tmp_path):
    """Catches: a merged or a finetuned model that lost the chat format of its base."""
    directory = copy_of("byte_level")
    for folder in ("chat_templates", "additional_chat_templates"):
        (directory / folder).mkdir()
        (directory / folder / f"{folder}.jinja").write_text("T")
    copy_tokenizer(directory, tmp_path)
    assert sorted(p.parent.name for p in tmp_path.rglob("*.jinja")) == ["additional_chat_templates", "chat_templates"]


@pytest.mark.parametrize("value", ["2", -1, True, [2, None], {"a": 1}, 1.0, 2**40])
def test_stop_ids_of_a_wrong_type_are_refused(value, copy_of):
    """Would catch stop ids that no token ever equals."""
    directory = copy_of("byte_level")
    write_json(directory / "generation_config.json", {"eos_token_id": value})
    with pytest.raises(ValueError, match="eos_token_id in .*generation_config.json"):
        Tokenizer(directory)


CONFIGS = [
    {"bos_token": "<new>", "eos_token": {"content": "</s>", "lstrip": True, "__type": "AddedToken"}},
    {"additional_special_tokens": ["<a>", "<b>"], "eos_token": "</s>", "image_token": "<image>"},
    {"extra_special_tokens": {"tool_token": "<tool>"}},
    {
        "added_tokens_decoder": {
            "900": {"content": "<later>", "special": False, "lstrip": False, "rstrip": False, "single_word": True},
            "3": {"content": "<sooner>", "special": True, "lstrip": True, "rstrip": True, "normalized": False},
        },
        "eos_token": "<later>",
    },
    {"split_special_tokens": True, "eos_token": "</s>"},
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["byte_level", "llama"])
def test_tokens_added_by_the_config_equal_transformers(config, kind, copy_of):
    """Would catch added tokens in another order (so with other ids), with other flags, or left out."""
    from transformers import AutoTokenizer

    directory = copy_of(kind)
    write_json(directory / "tokenizer_config.json", config)
    ours, theirs = Tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    text = "a <new>b <a><b> x<image>y <tool> <sooner>  <later> the<later> </s> end"
    ids = theirs(text).input_ids
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.vocab_size == len(theirs)


def test_older_files_equal_transformers(copy_of):
    """Would catch special_tokens_map.json or added_tokens.json being ignored, or read where newer entries exist."""
    from transformers import AutoTokenizer

    directory = copy_of("byte_level")
    config = {"eos_token": "<|im_end|>"}
    write_json(directory / "tokenizer_config.json", config)
    special = {"content": "<end>", "lstrip": False, "rstrip": True, "normalized": False, "single_word": False}
    write_json(directory / "special_tokens_map.json", {"eos_token": special, "pad_token": "<pad>"})
    write_json(directory / "added_tokens.json", {"<two>": 502, "<end>": 501, "<one>": 500})
    text = "a <end>  b<pad> <one><two>"
    for newer in ({}, {"added_tokens_decoder": {}}):
        write_json(directory / "tokenizer_config.json", config | newer)
        ours, theirs = Tokenizer(directory), AutoTokenizer.from_pretrained(directory)
        assert ours.encode(text) == theirs(text).input_ids
        assert ours.eos_id == theirs.eos_token_id
        assert ours.pad_id == theirs.pad_token_id


# --- sentencepiece ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_ids_equal_the_library(model_type, tmp_path):
    """Would catch an added, lost or doubled space, and a text changed on its way to the library."""
    import sentencepiece

    directory = make_sentencepiece(tmp_path / "model", model_type)
    ours = Tokenizer(directory)
    theirs = sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))
    for text in TEXTS[:11]:
        assert ours.encode(text) == [theirs.bos_id(), *theirs.encode(text)], text
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text)), text


def spelled(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.id_to_token(token_id) for token_id in tokenizer.encode(text)]


def test_sentencepiece_finds_special_tokens_in_the_text(tokenizers, tmp_path):
    """Would catch "<s>" being spelled out, and a space put behind every special token of a newer model."""
    newer = tokenizers["sentencepiece"]
    assert spelled(newer, "the</s>the the") == ["<s>", "▁the", "</s>", *spelled_without_prefix(newer, "the"), "▁the"]
    older = Tokenizer(make_sentencepiece(tmp_path / "legacy", legacy=True))
    assert spelled(older, "the</s>the the") == ["<s>", "▁the", "</s>", "▁the", "▁the"]
    never = Tokenizer(make_sentencepiece(tmp_path / "never", add_prefix_space=False))
    assert spelled(never, "the the") == ["<s>", *spelled_without_prefix(newer, "the"), "▁the"]
    assert never.decode(never.encode(" the")) == " the"


def spelled_without_prefix(tokenizer: Tokenizer, word: str) -> list[str]:
    return spelled(tokenizer, f"<s>{word}")[2:]


@pytest.mark.parametrize(
    ("config", "expected"),
    [({}, ["<s>", "▁the"]), ({"add_bos_token": False}, ["▁the"]), ({"add_eos_token": True}, ["<s>", "▁the", "</s>"])],
)
def test_sentencepiece_adds_what_the_config_says(config, expected, tmp_path):
    """Would catch add_bos_token or add_eos_token being ignored, and a model without either losing its BOS."""
    directory = make_sentencepiece(tmp_path / "model")
    write_json(directory / "tokenizer_config.json", config)
    assert spelled(Tokenizer(directory), "the") == expected


def test_sentencepiece_takes_added_tokens(tmp_path):
    """Would catch a chat model's own markers being spelled out, or getting ids of other tokens."""
    added = {"content": "<|im_end|>", "special": True, "rstrip": True}
    config = {"added_tokens_decoder": {"450": added}, "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    directory = make_sentencepiece(tmp_path / "model", **config)
    pieces = Tokenizer(make_sentencepiece(tmp_path / "plain")).vocab_size
    tokenizer = Tokenizer(directory)
    assert (tokenizer.eos_id, tokenizer.pad_id) == (pieces, pieces + 1)
    ids = tokenizer.encode("the <|im_end|>  the<pad>", bos=False)
    assert ids.count(tokenizer.eos_id) == 1 and ids[-1] == tokenizer.pad_id
    assert tokenizer.decode(ids) == "the the"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the <|im_end|>the<pad>"


def test_sentencepiece_takes_the_flags_of_added_tokens(tmp_path):
    """Would catch spaces kept or taken against lstrip and rstrip, and a marker found inside a word."""
    flags = {"<l>": {"lstrip": True}, "<r>": {"rstrip": True}, "<w>": {"single_word": True}, "<l><r>": {}}
    added = {str(450 + i): {"content": content, **value} for i, (content, value) in enumerate(flags.items())}
    tokenizer = Tokenizer(make_sentencepiece(tmp_path / "model", added_tokens_decoder=added))
    for text, shown in [("a <l> b", "a<l> b"), ("a <r> b", "a <r>b"), ("a  <l><r>  b", "a  <l><r>  b")]:
        ids = tokenizer.encode(text, bos=False)
        assert tokenizer.decode(ids) == shown
        assert sum(token_id >= tokenizer.token_to_id("<l>") for token_id in ids) == 1
    whole, inside = (tokenizer.encode(text) for text in ("a <w> b", "a <w>b"))
    assert tokenizer.token_to_id("<w>") in whole and tokenizer.token_to_id("<w>") not in inside


def test_added_tokens_do_not_make_white_space_slow(tmp_path):
    """Would catch a search for "spaces, then a token" that tries every start: 5 * 10**11 steps, so it never ends."""
    added = {"450": {"content": "<l>", "lstrip": True, "rstrip": True}}
    tokenizer = Tokenizer(make_sentencepiece(tmp_path / "model", added_tokens_decoder=added))
    text = "a" + " " * 10**6 + "b"
    assert tokenizer.decode(tokenizer.encode(text)) == text


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("skip", [True, False])
def test_stream_of_a_text_equals_decode(kind, skip, tokenizers):
    """Would catch lost or doubled spaces at the seams, and characters broken between two pieces."""
    tokenizer = tokenizers[kind]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        pieces = list(tokenizer.decode_stream(iter(ids), skip_special_tokens=skip))
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip), text
        assert not any("\ufffd" in piece for piece in pieces)
        assert all(pieces)


@pytest.mark.parametrize("kind", MAKERS)
def test_stream_of_random_ids_equals_decode(kind, tokenizers):
    """Would catch any difference on what untrained models write: broken characters, specials, unused ids."""
    tokenizer, generator = tokenizers[kind], random.Random(0)
    for length in [1, 2, 3, 5, 8, 40] * 40:
        ids = [generator.randrange(tokenizer.vocab_size + 3) for _ in range(length)]
        for skip in (True, False):
            assert "".join(tokenizer.decode_stream(ids, skip)) == tokenizer.decode(ids, skip), ids


WORDS = ["▁a", "▁", "a", " ", "  a  ", "##b", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<0x41>", "<0x+4>", "<0xG0>"]
WORDS += ["<s>", "ab</w>", "b", "é", "Ġb", "ðŁĺĢ", "ð", "Ł", "ĺ", "Ģ", "日", "n't", "▁▁b▁", ".", "aa", "", "\n", "🙂 b"]
WORDS += ["Ã", "©"]
SPACES = decoders.Replace("▁", " ")
DECODERS = {
    "none": None,
    "byte_level": decoders.ByteLevel(),
    "llama": decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    "gemma": decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse()]),
    "both_ends": decoders.Sequence([SPACES, decoders.Fuse(), decoders.Strip(" ", 2, 3)]),
    "right_end": decoders.Sequence([decoders.ByteLevel(), decoders.Strip("b", 0, 1)]),
    "no_fuse": decoders.Sequence([SPACES, decoders.ByteFallback()]),
    "strip_tokens": decoders.Sequence([SPACES, decoders.Strip(" ", 1, 0)]),
    "metaspace": decoders.Metaspace(),
    "metaspace_never": decoders.Metaspace(prepend_scheme="never"),
    "metaspace_fused": decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()]),
    "wordpiece": decoders.WordPiece(cleanup=False),
    "wordpiece_cleanup": decoders.WordPiece(cleanup=True),
    "bpe": decoders.BPEDecoder(),
    "ctc": decoders.CTC(),
    "regex": decoders.Sequence([decoders.Replace(Regex("a+"), "x"), decoders.Fuse()]),
    "replace_after_fuse": decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", "_"), decoders.Replace("ab", "c")]),
    "nested": decoders.Sequence([decoders.Sequence([SPACES]), decoders.Sequence([decoders.Fuse()])]),
    "twice": decoders.Sequence([decoders.ByteLevel(), decoders.ByteLevel()]),
    "makes_bytes": decoders.Sequence([decoders.Replace("a", "<0x41>"), decoders.ByteFallback(), decoders.Fuse()]),
    "two_strips": decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0), decoders.Strip("a", 1, 0)]),
    "hides_broken": decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\ufffd", "?")]),
}


@pytest.mark.parametrize("name", DECODERS)
def test_stream_equals_decode_for_every_decoder(name, tmp_path):
    """Would catch a decoder whose later tokens change earlier text, although its text is given out at once."""
    rust = RustTokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    rust.add_special_tokens(["<s>"])
    if DECODERS[name] is not None:
        rust.decoder = DECODERS[name]
    rust.save(str(tmp_path / "tokenizer.json"))
    tokenizer, generator = Tokenizer(tmp_path), random.Random(1)
    emoji = [WORDS.index(f"<0x{byte:02X}>") for byte in "😀".encode()]
    for i in range(600):
        ids = [generator.randrange(len(WORDS)) for _ in range(generator.randrange(12))]
        if i % 3 == 0:
            ids[3:3] = emoji
        try:
            text = tokenizer.decode(ids)
        except ValueError:  # the library's Strip panics where the text is shorter than what it may strip
            assert "end" in name
            continue
        assert "".join(tokenizer.decode_stream(ids)) == text, [WORDS[i] for i in ids]


@pytest.mark.parametrize("kind", ["byte_level", "llama", "metaspace", "sentencepiece"])
def test_stream_keeps_back_no_more_than_it_must(kind, tokenizers):
    """Would catch a stream that is right only because it waits for the end."""
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("the then they, the return")
    decoder, text = StreamDecoder(tokenizer), ""
    for i, token_id in enumerate(ids):
        text += decoder.push(token_id)
        assert text == tokenizer.decode(ids[: i + 1])


def test_stream_emits_a_character_with_its_last_byte(tokenizers):
    """Would catch a whole emoji sequence being kept back where the vocabulary is byte-level."""
    tokenizer = tokenizers["byte_level"]
    family = "👨‍👩‍👧"
    pieces = list(tokenizer.decode_stream(tokenizer.encode(family)))
    assert pieces == list(family)


def test_flush_ends_one_sequence_and_begins_the_next(tokenizers):
    """Would catch the second answer of a chat beginning with the first one's leftovers or losing its first space."""
    for tokenizer in tokenizers.values():
        decoder = StreamDecoder(tokenizer)
        ids = tokenizer.encode("日本 😀", bos=False)
        assert decoder.flush() == ""
        for part in (ids, ids[:-1], ids):
            assert "".join([*map(decoder.push, part), decoder.flush()]) == tokenizer.decode(part)


@pytest.mark.parametrize("kind", ["byte_level", "llama", "sentencepiece"])
@pytest.mark.parametrize("text", ["a brown fox 12 é 日 ", "\ufffd"])
def test_cost_of_a_token_does_not_grow_with_the_text(kind, text, tokenizers, monkeypatch):
    """Would catch decoding again what has been written, or everything since bytes stopped being characters."""
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, bos=False) * 500
    if text == "\ufffd":  # its first byte again and again: no character ever
        ids = [tokenizer.encode("😀", bos=False)[-1]] * 4000
    decode, decoded = tokenizer._backend.decode, []
    monkeypatch.setattr(
        tokenizer._backend, "decode", lambda ids, *a, **k: decoded.append(len(ids)) or decode(ids, *a, **k)
    )
    pieces = list(tokenizer.decode_stream(ids))
    monkeypatch.undo()
    assert "".join(pieces) == tokenizer.decode(ids)
    assert sum(decoded) <= 16 * len(ids)


# --- vocab.json and merges.txt ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "added"),
    [
        ({"add_prefix_space": True}, None),
        ({"add_bos_token": True, "add_eos_token": True}, None),
        ({"bos_token": "<s>", "eos_token": "</s>"}, {"<s>": 501, "</s>": 500}),
        ({"bos_token": None, "pad_token": "<pad>"}, None),
        ({"tokenizer_class": "Qwen2TokenizerFast"}, None),
        ({"tokenizer_class": "GPTNeoXTokenizer"}, None),
        ({"added_tokens_decoder": {"500": {"content": "<s>", "special": True, "lstrip": True}}}, None),
    ],
)
def test_slow_tokenizers_are_read_as_transformers_reads_them(config, added, tmp_path):
    """Would catch GPT-2's cut for another class, a switch that is ignored, and added tokens in another order."""
    from transformers import AutoTokenizer

    directory = make_slow(tmp_path / "slow", **config)
    if added:
        write_json(directory / "added_tokens.json", added)
    ours, theirs = Tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text).input_ids, text
    named = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (*named, len(theirs))


def test_slow_tokenizers_of_other_kinds_are_refused(tmp_path):
    """Would catch CLIP's and RoBERTa's vocabularies read as GPT-2's, and half a tokenizer taken for one."""
    directory = make_slow(tmp_path / "slow", tokenizer_class="RobertaTokenizer")
    for read in (Tokenizer, check_slow_class):  # when it is used, and when a checkpoint is converted or checked
        with pytest.raises(ValueError, match="RobertaTokenizer.*save_pretrained"):
            read(directory)
    write_json(directory / "tokenizer_config.json", {})
    write_json(directory / "vocab.json", {"a</w>": 0})
    with pytest.raises(ValueError, match="no byte-level BPE"):
        Tokenizer(directory)
    (directory / "merges.txt").write_text("a b c\n")
    write_json(directory / "vocab.json", {"a": 0})
    with pytest.raises(ValueError, match="merges.txt has the line 'a b c'"):
        Tokenizer(directory)
    (directory / "merges.txt").unlink()
    assert not has_tokenizer(directory)
    with pytest.raises(FileNotFoundError, match="copy tokenizer.json"):
        Tokenizer(directory)


# --- what is wrong is told in one sentence ----------------------------------------------------------------------------


def assert_one_sentence(message: str) -> None:
    assert "\n" not in message and "Traceback" not in message
    assert message.endswith((".", "...")) and len(message) < 800


def test_missing_files_are_named(tmp_path):
    """Would catch a bare "No such file" that says neither what to copy nor what is there."""
    with pytest.raises(FileNotFoundError, match="no directory .*nowhere") as info:
        Tokenizer(tmp_path / "nowhere")
    assert_one_sentence(str(info.value))
    with pytest.raises(FileNotFoundError, match=r"copy tokenizer.json or tokenizer.model .*holds nothing"):
        Tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"holds vocab.json") as info:
        Tokenizer(tmp_path)
    assert_one_sentence(str(info.value))
    os.mkfifo(tmp_path / "tokenizer.json")  # opening it would wait for a writer
    with pytest.raises(ValueError, match="not a regular file"):
        Tokenizer(tmp_path)


BAD_JSON = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "number": b"1e999",
    "many_digits": b'{"a": ' + b"9" * 10000 + b"}",
    "deep_list": b"[" * 100_000,
    "deep_object": b'{"a":' * 100_000,
    "not_utf8": b'{"a": "\xff\xfe"}',
    "utf16": '{"a": 1}'.encode("utf-16"),
    "cut": b'{"bos_token": "<s',
}
SMALL_FILES = ["tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "added_tokens.json"]


@pytest.mark.parametrize("name", ["tokenizer.json", *SMALL_FILES, "chat_template.json"])
@pytest.mark.parametrize("content", BAD_JSON)
def test_bad_json_is_refused_with_the_name_of_its_file(name, content, copy_of):
    """Would catch JSONDecodeError, RecursionError, UnicodeDecodeError and AttributeError that reach the user."""
    directory = copy_of("byte_level")
    (directory / name).write_bytes(BAD_JSON[content])
    with pytest.raises(ValueError, match=name) as info:
        Tokenizer(directory)
    assert type(info.value) is ValueError
    assert_one_sentence(str(info.value))


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": 1},
        {"eos_token": ["</s>"]},
        {"eos_token": {"text": "</s>"}},
        {"pad_token": ""},
        {"added_tokens_decoder": []},
        {"added_tokens_decoder": {"one": {"content": "<a>"}}},
        {"added_tokens_decoder": {"1": "<a>", "2": 3}},
        {"additional_special_tokens": "<a>"},
        {"additional_special_tokens": [None]},
        {"chat_template": 1},
        {"chat_template": [1]},
        {"chat_template": [{"name": "default"}]},
        {"chat_template": []},
    ],
)
def test_wrong_types_in_the_config_are_refused(config, copy_of):
    """Would catch a TypeError or AttributeError far from the file that caused it."""
    directory = copy_of("byte_level")
    write_json(directory / "tokenizer_config.json", config)
    with pytest.raises(ValueError, match="tokenizer_config.json") as info:
        Tokenizer(directory)
    assert_one_sentence(str(info.value))


PIPELINES = {
    # a table of 4 GB announced in 13 bytes: the allocation ends the process
    "charsmap_size": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////////////w=="}},
    "charsmap_short": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAA="}},
    "charsmap_not_a_string": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": [255] * 13}},
    "charsmap_base64": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "@@"}},
    "charsmap_type": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": 7}},
    # one byte is cut off "é", and a message with half a character ends the process
    "subword_prefix": {
        "model": {
            "type": "BPE",
            "vocab": {"a": 0, "é": 1},
            "merges": [["a", "é"]],
            "continuing_subword_prefix": "A",
        }
    },
    # four thousand million ids of which one exists: whoever lists them fills the memory
    "id_far_beyond": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 2**32 - 1}, "merges": []}},
    # twenty doublings: a page becomes a gigabyte
    "doubling": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 20,
        }
    },
    "doubling_decoder": {
        "decoder": {
            "type": "Sequence",
            "decoders": [{"type": "Replace", "pattern": {"Regex": "a"}, "content": "aa"}] * 20,
        }
    },
    "many_copies": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 5_000,
            "pair": [],
            "special_tokens": {},
        }
    },
    "bad_regex": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "((("}, "behavior": "Isolated"}},
    "unknown_type": {"pre_tokenizer": {"type": "NoSuchThing"}},
    "no_model": {"model": None},
    "empty_unigram": {"model": {"type": "Unigram", "unk_id": 0, "vocab": []}},
    "id_too_large": {"model": {"type": "BPE", "vocab": {"a": 2**40}, "merges": []}},
    "unknown_merge": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}},
}


@pytest.mark.parametrize("name", PIPELINES)
def test_damaged_pipelines_are_refused(name, copy_of):
    """Would catch a file that ends the process, fills the memory, or raises Rust's bare Exception."""
    path = copy_of("byte_level") / "tokenizer.json"
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | PIPELINES[name])
    with pytest.raises(ValueError, match="tokenizer.json") as info:
        Tokenizer(path.parent)
    assert_one_sentence(str(info.value))


def replace(old: str, new: str, kind: str = "String") -> dict:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def test_many_harmless_rules_are_loaded(copy_of):
    """Would catch rules whose lengthenings are multiplied although none replaces what another has written."""
    path = copy_of("byte_level") / "tokenizer.json"
    rules = [replace(chr(0xFB00 + n), "ffi") for n in range(30)] + [
        replace(r, " ", "Regex") for r in (r"\s{2,}", "\t|\v")
    ] * 20
    rules += [replace(rf"[{chr(0x2460 + n)}{chr(0x2776 + n)}]+", f"({n})", "Regex") for n in range(9)]
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"normalizer": sequence(rules)})
    tokenizer = Tokenizer(path.parent)
    assert tokenizer.encode("\ufb00 \ufb1d  x\u2460\u2776") == tokenizer.encode("ffi ffi x(0)")


def sequence(rules: list[dict]) -> dict:
    return {"type": "Sequence", "normalizers": rules}


def test_no_rules_make_a_text_longer_than_was_computed():
    """Would catch a bound that is too low, by which a text could still fill the memory."""
    generator, worst = random.Random(0), 0.0
    letters = lambda most: "".join(generator.choice("abcd") for _ in range(generator.randrange(most)))  # noqa: E731
    for _ in range(300):
        rules = [replace(letters(3), letters(4)) for _ in range(4)]
        rules[0] = replace(
            generator.choice(["a", "a*", "[ab]", "b+", "^", "a|b", "(ab|c)+", "a|"]), letters(3), "Regex"
        )
        text = "".join(generator.choice("abcd") for _ in range(40))
        normalizer = RustTokenizer.from_str(
            json.dumps({"normalizer": sequence(rules), "model": {"type": "BPE", "vocab": {}, "merges": []}})
        ).normalizer
        grown, bound = len(normalizer.normalize_str(text)) / len(text), _growth(sequence(rules))
        assert grown <= bound * (1 + 1 / len(text)), (rules, text)  # a rule may write something at the end too
        worst = max(worst, grown / bound)
    assert worst > 0.5


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<a>": 2**32 - 1}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"4294967295": {"content": "<a>"}}}),
    ],
)
def test_recorded_ids_far_beyond_the_vocabulary_are_refused(name, content, copy_of):
    """Would catch an id that is read and then another one given, without a word."""
    directory = copy_of("byte_level")
    write_json(directory / "tokenizer_config.json", {})
    write_json(directory / name, content)
    with pytest.raises(ValueError, match=f"{name}.* the id 4,294,967,295"):
        Tokenizer(directory)


@pytest.mark.parametrize(
    "normalizer",
    [
        r'{"type": "Precompiled", "precompiled\u005fcharsmap": "/////////////w=="}',
        r'{"type": "Precompiled", "\u0070recompiled_charsm\u0061\u0070" : "/////////////w=="}',
        '{"type": "Precompiled",\n"precompiled_charsmap"\t:\n "/////////////w=="}',
    ],
)
def test_the_check_of_tables_reads_json_as_the_library_does(normalizer, copy_of):
    """Would catch a file that ends the process because its key is written with an escape or a space."""
    path = copy_of("byte_level") / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    assert '"normalizer": null' in text
    path.write_text(text.replace('"normalizer": null', f'"normalizer": {normalizer}'), encoding="utf-8")
    with pytest.raises(ValueError, match="damaged precompiled_charsmap"):
        Tokenizer(path.parent)


def test_sound_subword_prefixes_are_loaded(tmp_path):
    """Would catch a check that refuses every BPE with a prefix, or the WordPiece of BERT."""
    bpe = models.BPE({"a": 0, "##b": 1, "ab": 2}, [("a", "##b")], continuing_subword_prefix="##")
    wordpiece = models.WordPiece({"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]")
    for model, ids in [(bpe, [2]), (wordpiece, [0, 1])]:
        RustTokenizer(model).save(str(tmp_path / "tokenizer.json"))
        assert Tokenizer(tmp_path).encode("ab") == ids


def test_a_sound_precompiled_table_is_loaded(copy_of, references):
    """Would catch a check that refuses the tables of real T5 and XLM-R tokenizers."""
    path = copy_of("unigram") / "tokenizer.json"
    table = (8).to_bytes(4, "little") + bytes(8) + b"\x00"
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}
    write_json(path, spec)
    assert Tokenizer(path.parent).vocab_size == len(references["unigram"])


def test_a_panic_in_rust_is_a_value_error(copy_of):
    """Would catch pyo3's PanicException: it derives from BaseException and passes every `except Exception`."""
    path = copy_of("byte_level") / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec["pre_tokenizer"] = {"type": "FixedLength", "length": 0}
    write_json(path, spec)
    with pytest.raises(ValueError, match="cannot encode") as info:
        Tokenizer(path.parent).encode("Hello")
    assert_one_sentence(str(info.value))


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"not a model\n" * 10, b"\x0a\xff\xff\xff\xff\x0f"])
def test_a_damaged_sentencepiece_model_is_refused(content, copy_of):
    """Would catch the RuntimeError of the library, and an empty model that encodes everything to nothing."""
    directory = copy_of("sentencepiece")
    (directory / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match="tokenizer.model") as info:
        Tokenizer(directory)
    assert_one_sentence(str(info.value))


def test_files_of_absurd_size_are_not_read(copy_of):
    """Would catch a sparse file of terabytes filling the memory."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        directory = copy_of("byte_level")
        os.truncate(directory / name, 2**40)
        with pytest.raises(ValueError, match=f"{name} has more than [0-9,]+ bytes"):
            Tokenizer(directory)


# --- mutated files ----------------------------------------------------------------------------------------------------
# They are tried in another process, so that a crash, a hang and used-up memory can be seen.

MUTATED = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"]
VALUES = [None, True, -1, 2**31, 2**63, 10**400, 1e308, "", "x" * 5000, "\ud83d", [], {}, [[[[[]]]]], ["<a>"]]
VALUES += [{"type": 1}, {"type": "Sequence"}]


def mutated_bytes(data: bytes, generator: random.Random) -> bytes:
    at, end = sorted(generator.randrange(len(data) + 1) for _ in range(2))
    end = min(end, at + 64)
    kind = generator.randrange(5)
    if kind == 0:  # a few other bytes
        changed = bytearray(data)
        for _ in range(generator.choice([1, 1, 2, 8, 64])):
            changed[generator.randrange(len(data))] = generator.randrange(256)
        return bytes(changed)
    if kind == 1:  # cut
        return data[:at]
    if kind == 2:  # a part missing
        return data[:at] + data[end:]
    if kind == 3:  # a part twice
        return data[:end] + data[at:]
    return data[:at] + generator.choice([b"\xff\xff\xff\xff", b"\x00" * 8, b"9" * 30, b"[" * 3000, b'"']) + data[end:]


def mutated_json(data: bytes, generator: random.Random) -> bytes:
    """One value somewhere in the document replaced by an unlikely one, or by another value of the document."""
    document = json.loads(data)
    places = []

    def collect(node):
        items = list(node.items() if isinstance(node, dict) else enumerate(node))
        for key, value in generator.sample(items, min(len(items), 40)):
            places.append((node, key))
            if isinstance(value, (dict, list)):
                collect(value)

    collect(document)
    if places:
        node, key = generator.choice(places)
        other, other_key = generator.choice(places)
        node[key] = generator.choice([*VALUES, json.loads(json.dumps(other[other_key]))])
    return json.dumps(document).encode()


def try_mutation(directory: Path, seed: int) -> str:
    """One mutated file, restored afterwards. What happened, in a word."""
    generator = random.Random(seed)
    names = [name for name in [*MUTATED, "tokenizer.model", "vocab.json", "merges.txt"] if (directory / name).is_file()]
    path = directory / generator.choice([names[0], *names])
    original = path.read_bytes()
    mutate = mutated_json if path.suffix == ".json" and generator.random() < 0.6 else mutated_bytes
    path.write_bytes(mutate(original, generator))
    try:
        tokenizer = Tokenizer(directory)
        for text in (TEXTS[6], TEXTS[9], TEXTS[11]):
            ids = tokenizer.encode(text)
            assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)
        return "loaded"
    except (ValueError, OSError) as error:
        assert_one_sentence(str(error))
        return "refused"
    finally:
        path.write_bytes(original)


def run_mutations(directory: Path, first: int, count: int, log: Path) -> None:
    # After a minute of computing the system ends the process: code in Rust would not let a Python handler run.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    Tokenizer(directory).encode("warm up")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {"loaded": 0, "refused": 0}
    for seed in range(first, first + count):
        log.write_text(str(seed))
        signal.setitimer(signal.ITIMER_PROF, 60)
        outcomes[try_mutation(directory, seed)] += 1
        signal.setitimer(signal.ITIMER_PROF, 0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    write_json(log, outcomes | {"grown_mb": grown})


def assert_mutations_end_well(directory: Path, first: int, count: int) -> None:
    write_json(directory / "special_tokens_map.json", {"pad_token": "<pad>"})
    write_json(directory / "generation_config.json", {"eos_token_id": [1, 2]})
    log = directory / "log"
    process = multiprocessing.get_context("fork").Process(target=run_mutations, args=(directory, first, count, log))
    process.start()
    process.join(timeout=600)
    assert process.exitcode == 0, f"seed {log.read_text()} ended with {process.exitcode}"
    result = json.loads(log.read_text())
    assert result["grown_mb"] <= 256
    assert result["loaded"] and result["refused"], "the mutations are all too weak or all too strong"


def test_mutated_files_load_or_are_refused(directories, copy_of):
    """Would catch a crash, a hang, 256 MB of memory, or an error that is not one sentence."""
    assert_mutations_end_well(copy_of("llama"), 0, 60)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_many_mutated_files_load_or_are_refused(kind, copy_of):
    """As above, 2,000 files of each kind of tokenizer."""
    assert_mutations_end_well(copy_of(kind), 1000, 2000)
