"""vocab.json and merges.txt, as slow tokenizers of transformers are saved: byte-level BPE, read as a tokenizer.json.

The files do not say how a text is cut: the name of the tokenizer's class does, `tokenizer_class` in
tokenizer_config.json.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lit_swa.formats.chat_template import one_line
from lit_swa.formats.gguf_pre_tokenizer import QWEN2
from lit_swa.formats.json_files import parse_json
from lit_swa.formats.reading import find_inside, read_bytes
from lit_swa.formats.tokenizer_backends import FastBackend
from lit_swa.formats.tokenizer_files import (
    MAX_DIGITS,
    MAX_VOCAB_BYTES,
    AddedToken,
    TokenConfig,
    read_small_json,
    vocab_file_name,
)

END_OF_TEXT = "<|endoftext|>"
REMEDY = (
    "make a tokenizer.json of it with transformers, AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)"
)


class SlowClass(NamedTuple):
    """What a class of transformers means, without what its config says."""

    cut: str | None  # the pattern that cuts a text; None: GPT-2's
    nfc: bool  # characters are composed first
    named: dict[str, str]  # tokens where the config does not name them


GPT2 = SlowClass(None, False, dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT))
CLASSES = {
    "GPT2Tokenizer": GPT2,
    "CodeGenTokenizer": GPT2,
    "GPTNeoXTokenizer": SlowClass(None, True, GPT2.named | {"pad_token": "<|padding|>"}),
    "Qwen2Tokenizer": SlowClass(QWEN2, True, dict.fromkeys(("eos_token", "unk_token", "pad_token"), END_OF_TEXT)),
}
OF_MODELS = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "gpt_neox": "GPTNeoXTokenizer"}  # others: GPT-2's


class SlowBackend(FastBackend):
    """The same ids as transformers' for these files."""

    def __init__(self, path: Path, config: dict[str, Any], tokens: TokenConfig) -> None:
        self.kind = slow_class(path.parent, config)
        usual = {name: AddedToken(content) for name, content in self.kind.named.items() if name not in config}
        super().__init__(path, config, replace(tokens, named=usual | tokens.named))
        self.rust.post_processor = self._template(config)

    def read(self, path: Path, config: dict[str, Any]) -> bytes:
        """The tokenizer.json that says the same as both files."""
        vocab = parse_json(read_bytes(path, MAX_VOCAB_BYTES), path, MAX_DIGITS)
        if any(token.endswith("</w>") for token in vocab):
            raise ValueError(f"{path} is no byte-level BPE, its words end in '</w>': {REMEDY}.")
        prefix = config.get("add_prefix_space") is True
        cuts = [{"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": not self.kind.cut}]
        if self.kind.cut:
            cuts.insert(
                0, {"type": "Split", "pattern": {"Regex": self.kind.cut}, "behavior": "Isolated", "invert": False}
            )
        spec = {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": {"type": "NFC"} if self.kind.nfc else None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "vocab": vocab, "merges": _read_merges(find_inside(path.parent, "merges.txt"))},
        }
        return json.dumps(spec).encode()

    def _template(self, config: dict[str, Any]) -> Any:
        """BOS in front and EOS behind, where the config asks for them."""
        from tokenizers import processors

        around = {
            n: self.named[n].content for n in ("bos_token", "eos_token") if n in self.named and config.get(f"add_{n}")
        }
        single = [around.get("bos_token"), "$A", around.get("eos_token")]
        ids = [(content, self.rust.token_to_id(content)) for content in dict.fromkeys(around.values())]
        return processors.TemplateProcessing(single=[part for part in single if part], special_tokens=ids)


def slow_class(directory: Path, config: dict[str, Any]) -> SlowClass:
    """The class that the config names. Raises ValueError, with the remedy, for one that is not read."""
    name = config.get("tokenizer_class")
    if name is None:  # transformers goes by the model then
        model_type = read_small_json(directory / "config.json").get("model_type")
        name = OF_MODELS.get(str(model_type), "GPT2Tokenizer")
    kind = CLASSES.get(str(name).removesuffix("Fast"))
    if kind is None:
        raise ValueError(
            f"{directory} has the vocab.json of a {one_line(str(name))}, and those of {', '.join(CLASSES)} are read: "
            f"{REMEDY}."
        )
    return kind


def check_slow_class(directory: Path) -> None:
    """Raises ValueError where the tokenizer of a checkpoint is a vocab.json of a class that is not read."""
    if vocab_file_name(directory) == "vocab.json":
        slow_class(directory, read_small_json(directory / "tokenizer_config.json"))


def _read_merges(path: Path) -> list[list[str]]:
    try:
        lines = read_bytes(path, MAX_VOCAB_BYTES).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): copy the file again.") from None
    lines = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    merges = [line.split(" ") for line in lines]
    if wrong := next((line for line, pair in zip(lines, merges, strict=True) if len(pair) != 2), None):
        raise ValueError(f"{path} has the line {one_line(repr(wrong))}, which is not two tokens: copy the file again.")
    return merges
