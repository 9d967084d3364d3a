"""Long texts: their ids in pieces are those of the whole text, and no more is encoded than is asked for."""

import json
import random

import pytest

from lit_swa import texts
from lit_swa.texts import encode_file, encode_text, find_frame, read_text
from lit_swa.tokenizer import Tokenizer

WORDS = "the quick brown fox, it's 1234567 caf\u00e9 don't  jumps\t over ... <|im_end|> \u4f60\u597d\u3002 dog.".split(
    " "
)
LINES = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 20


def byte_level(directory, post_processor=None):
    """A byte-level BPE, as of GPT-2."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|bos|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=specials)
    )
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))


def with_bos_and_eos(directory):
    from tokenizers.processors import TemplateProcessing

    specials = [("<|bos|>", 0), ("<|im_end|>", 1)]
    byte_level(directory, TemplateProcessing(single="<|bos|>:0 $A:0 <|im_end|>:0", special_tokens=specials))


def like_llama(directory):
    """A BPE without words, which puts a space in front of a text, as Llama 2's tokenizer.json."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"]))
    tokenizer.save(str(directory / "tokenizer.json"))


def sentencepiece(directory, model_type):
    import sentencepiece

    with open(directory / "tokenizer.model", "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_writer=stream, model_type=model_type, vocab_size=330, minloglevel=2,
            hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False,
        )  # fmt: skip


def unigram(directory, words: bool):
    """A Unigram model on words, as of T5, or on the text as one word, where rounding reaches far."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    if words:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(
        LINES, trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>")
    )
    tokenizer.save(str(directory / "tokenizer.json"))


TOKENIZERS = {
    "byte-level": byte_level,
    "with BOS and EOS": with_bos_and_eos,
    "like Llama": like_llama,
    "sentencepiece BPE": lambda directory: sentencepiece(directory, "bpe"),
    "sentencepiece Unigram": lambda directory: sentencepiece(directory, "unigram"),
    "Unigram of words": lambda directory: unigram(directory, words=True),
    "Unigram of texts": lambda directory: unigram(directory, words=False),
}


def some_texts() -> dict[str, str]:
    chance = random.Random(4)
    space = [" ", " ", " ", "\n", "\r\n", "\n\n", "  ", "\t"]
    return {
        "prose": "".join(chance.choice(WORDS) + chance.choice(space) for _ in range(2500)),
        "equal lines": "The quick brown fox jumps over the lazy dog, and again.\n" * 200,
        "one line": "".join(chance.choice(WORDS) + chance.choice("  ,") for _ in range(2500)),
        "without spaces": "".join(chance.choice("\u4f60\u597d\u4e16\u754c\uff0c\u3002") for _ in range(4000)),
        "one word": "a" * 9000,
        "indented": "".join(" " * chance.randrange(9) + chance.choice(WORDS) + "\n" for _ in range(2000)),
    }


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_ids_of_pieces_are_those_of_the_whole_text(kind, tmp_path, monkeypatch):
    """Catches: a word cut in two, a space or BOS put in front of each piece, a line lost or read twice."""
    monkeypatch.setattr(texts, "BLOCK_BYTES", 1500)
    monkeypatch.setattr(texts, "NEAR", 200)
    TOKENIZERS[kind](tmp_path)
    tokenizer, longest = Tokenizer(tmp_path), []
    encode, path = tokenizer.encode, tmp_path / "t.txt"
    monkeypatch.setattr(tokenizer, "encode", lambda text, **how: longest.append(len(text)) or encode(text, **how))
    for name, text in some_texts().items():
        path.write_bytes(text.encode())
        expected, one_word = encode(read_text(path)), name == "one word"
        for ids, wanted, in_pieces in (
            (lambda: encode_file(tokenizer, path), expected, not one_word and not tokenizer.sums_scores),
            (lambda: encode_text(tokenizer, read_text(path)), expected, not one_word and not tokenizer.sums_scores),
            (lambda: encode_file(tokenizer, path, 50), expected[:50], True),
        ):
            longest.clear()
            assert ids().tolist() == wanted, name
            assert (max(longest) < len(text) / 2) == in_pieces, name


def test_eos_comes_once_behind_a_text(tmp_path):
    """Catches: an EOS that is lost, or doubled where the tokenizer puts one itself."""
    (tmp_path / "t.txt").write_text("the fox<|im_end|>")
    for make, frame in ((byte_level, ([], [1])), (with_bos_and_eos, ([0], [1]))):
        make(tmp_path)
        tokenizer = Tokenizer(tmp_path)
        ids = encode_file(tokenizer, tmp_path / "t.txt", eos=True).tolist()
        assert find_frame(tokenizer, eos=True) == frame and ids == tokenizer.encode("the fox<|im_end|>", eos=True)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"x" * 3000 + b"\xff", r"byte 3000\)"),
        (b"x" * 2999 + "\u00e9".encode()[:1], r"byte 2999\)"),
        (b" \r\n" * 900, "holds no text"),
        (b"x\0" * 900, "holds zeros"),
    ],
)
def test_a_text_in_blocks_is_checked_as_a_whole_one(tmp_path, monkeypatch, data, message):
    """Catches: a damaged byte at a block's end, and a place that is counted from a block's beginning."""
    monkeypatch.setattr(texts, "BLOCK_BYTES", 1000)
    (tmp_path / "t.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list(texts.read_blocks(tmp_path / "t.txt"))


def test_lines_that_end_at_a_block_s_end_are_lines(tmp_path, monkeypatch):
    """Catches: a carriage return in one block whose line feed is in the next."""
    monkeypatch.setattr(texts, "BLOCK_BYTES", 3)
    data = b"\xef\xbb\xbfab\r\n\r\r\nc\r\r\nd\u00e9\n\r".decode().encode()
    (tmp_path / "t.txt").write_bytes(data)
    assert "".join(texts.read_blocks(tmp_path / "t.txt")) == read_text(tmp_path / "t.txt")
