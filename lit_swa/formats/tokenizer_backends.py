"""The two libraries that turn text into token ids and back, with the same methods for both.

`FastBackend` reads tokenizer.json with `tokenizers`, `SentencePieceBackend` reads tokenizer.model with `sentencepiece`.
Both have encode, encode_batch (which adds no special tokens), decode, token_to_id, id_to_token, largest_id,
special_contents, and `decoder`, the object of the `tokenizers` library that turns tokens into text (None: it joins them
with spaces).
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_swa.formats.chat_template import one_line
from lit_swa.formats.json_files import parse_json
from lit_swa.formats.reading import read_bytes
from lit_swa.formats.tokenizer_files import MAX_DIGITS, MAX_VOCAB_BYTES, AddedToken, TokenConfig, require_sane_ids

MAX_GROWTH = 4096  # how many times longer a file's replacement rules may make a text
MAX_FOLLOWED = 100  # rules whose characters are followed one by one through the rules behind them


@contextlib.contextmanager
def one_sentence_errors(task: str, others: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turns whatever the libraries raise into a ValueError of one sentence. others: what passes as it is.

    The Rust library raises bare `Exception`, and where it panics a `PanicException`, which derives from
    BaseException, so that `except Exception` does not catch it.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, *others)):
            raise
        raise ValueError(f"The tokenizer cannot {task}: {one_line(str(error))}.") from None


# ----------------------------------------------------------------------------------------------------------------------
# tokenizer.json


class FastBackend:
    """tokenizer.json, by the `tokenizers` library."""

    def __init__(self, path: Path, config: dict[str, Any], tokens: TokenConfig) -> None:
        import tokenizers

        data = self.read(path, config)
        _check_before_loading(path, data)
        with one_sentence_errors(f"load {path}, copy the file again"):
            self.rust = tokenizers.Tokenizer.from_buffer(data)
        _check_growth(path, self.rust)
        # A file may hold the padding and truncation of its last training run; neither is wanted here.
        self.rust.no_padding()
        self.rust.no_truncation()
        self.rust.encode_special_tokens = config.get("split_special_tokens") is True

        known = {token.content for token in self.rust.get_added_tokens_decoder().values()}
        with one_sentence_errors(f"add the tokens of tokenizer_config.json to {path}"):
            added = [{k: v for k, v in vars(token).items() if v is not None} for token in tokens.to_add(known)]
            self.rust.add_tokens([tokenizers.AddedToken(**fields) for fields in added])
        self.named = tokens.named
        require_sane_ids(path, self.rust.get_vocab(with_added_tokens=True).values())

    def read(self, path: Path, config: dict[str, Any]) -> bytes:
        return read_bytes(path, MAX_VOCAB_BYTES)

    def encode(self, text: str, add_special: bool) -> list[int]:
        with one_sentence_errors("encode this text"):
            return self.rust.encode(text, add_special_tokens=add_special).ids

    def encode_batch(self, texts: list[str]) -> list[array[int]]:
        with one_sentence_errors("encode this text"):
            return [array("I", one.ids) for one in self.rust.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        with one_sentence_errors("decode these tokens"):
            return self.rust.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self.rust.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self.rust.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def largest_id(self) -> int:
        return max(self.rust.get_vocab(with_added_tokens=True).values(), default=-1)

    def special_contents(self) -> frozenset[str]:
        return frozenset(token.content for token in self.rust.get_added_tokens_decoder().values() if token.special)

    @property
    def decoder(self) -> Any:
        return self.rust.decoder

    @property
    def sums_scores(self) -> bool:
        """True if scores are summed over all of a text, and not word by word: rounding may then depend on all of it."""
        split = self.rust.pre_tokenizer
        words = 1 if split is None else len(split.pre_tokenize_str("a a a"))
        return type(self.rust.model).__name__ == "Unigram" and words == 1


_CHARSMAP = re.compile(rb'"precompiled_charsmap"\s*:\s*(?:"([A-Za-z0-9+/=]*)"|null)')
_SUBWORD_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
_ESCAPED_LETTER = re.compile(rb"\\u00(5[fF]|6[1-9a-fA-F]|7[0-9aA])")


def _check_before_loading(path: Path, data: bytes) -> None:
    """Refuses the two kinds of damage that end the process inside the library, where no exception can be caught.

    The file is searched, not parsed: parsing a large vocabulary in Python takes seconds. JSON may write a letter of a
    key as \\u0061, so such letters are unescaped first.
    """
    data = _ESCAPED_LETTER.sub(lambda match: bytes([int(match[1], 16)]), data)
    if not _charsmaps_are_sound(data):
        raise ValueError(f"{path} has a damaged precompiled_charsmap: copy the file again.")
    if _SUBWORD_PREFIX.search(data) and not _merges_have_prefix(parse_json(data, path, MAX_DIGITS)):
        raise ValueError(f"{path} has merges without its continuing_subword_prefix: copy the file again.")


def _charsmaps_are_sound(data: bytes) -> bool:
    """A precompiled table begins with the size of its first half in bytes, and the library allocates that much."""
    tables = _CHARSMAP.findall(data)
    sound = len(tables) == data.count(b'"precompiled_charsmap"')
    for encoded in tables:
        with contextlib.suppress(ValueError):  # not base64: the library says so
            table = base64.b64decode(encoded)
            size = int.from_bytes(table[:4], "little")
            sound = sound and size % 4 == 0 and size <= max(0, len(table) - 4)
    return sound


def _merges_have_prefix(spec: dict[str, Any]) -> bool:
    """The library cuts the prefix's length off the second token of a merge unchecked, perhaps within a character."""
    model = spec.get("model")
    merges = model.get("merges") if isinstance(model, dict) else None
    prefix = model.get("continuing_subword_prefix") if isinstance(merges, list) else None
    if not isinstance(prefix, str):
        return True
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return all(isinstance(pair, list) and pair and str(pair[-1]).startswith(prefix) for pair in pairs)


def _check_growth(path: Path, rust: Any) -> None:
    """Refuses rules that make a text too long: twenty rules that each double it make a gigabyte of a page."""
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        rules = getattr(rust, part)
        if rules is not None and _growth(json.loads(rules.__getstate__())) > MAX_GROWTH:
            raise ValueError(f"The {part} in {path} could make a text {MAX_GROWTH:,} times longer: it is not loaded.")


def _growth(rules: dict[str, Any]) -> float:
    """At most how many times longer these rules, as the library writes them down, make a text.

    From the last rule to the first: what one character becomes by the end. Rules that write what no later rule replaces
    do not multiply.
    """
    steps = _steps(rules)
    written = {c for step in steps[:MAX_FOLLOWED] if step["type"] == "Replace" for c in step["content"][:8]}
    becomes: dict[str | None, float] = dict.fromkeys([None, *written], 1.0)  # by character; None: any other
    for rule in reversed(steps):
        worst, kind = max(becomes.values()), rule["type"]
        if kind == "Replace":
            becomes = _before_replace(rule, becomes)
        elif kind == "TemplateProcessing":
            most = max((len(special["ids"]) for special in rule["special_tokens"].values()), default=1)
            texts = sum("Sequence" in piece for piece in rule["single"])
            becomes = {None: worst * max(1.0, texts, len(rule["single"]) * most / MAX_GROWTH)}
        elif kind == "Prepend":  # in front of every part of a text between special tokens
            becomes = {None: worst * (1.0 + len(rule["prepend"]))}
        else:  # a rule that may turn a character into any other
            becomes = {None: worst * (2.0 if kind == "ByteLevel" else 1.0)}
    return max(becomes.values())


def _steps(rule: dict[str, Any]) -> list[dict[str, Any]]:
    if rule["type"] != "Sequence":
        return [rule]
    return [step for part in rule.values() if isinstance(part, list) for inner in part for step in _steps(inner)]


def _before_replace(rule: dict[str, Any], becomes: dict[str | None, float]) -> dict[str | None, float]:
    """What one character becomes, given what it becomes behind this rule."""
    new = sum(becomes.get(character, becomes[None]) for character in rule["content"])
    literal, regex = rule["pattern"].get("String"), rule["pattern"].get("Regex", "")
    if literal:  # all its characters together become the new ones
        share = new / len(literal)
        return becomes | {c: max(becomes.get(c, becomes[None]), share) for c in literal}
    between = 0.0 if _never_empty(regex) else new  # written where nothing was
    atoms = [] if between else re.findall(_ATOM, regex)
    return {
        c: max(size, new) + between if between or c is None or _any_matches(atoms, c) else size
        for c, size in becomes.items()
    }


def _any_matches(atoms: list[str], character: str) -> bool:
    """True if the library finds one of these patterns, each of one character, in this one."""
    from tokenizers import Regex, normalizers

    return any(normalizers.Replace(Regex(atom), "").normalize_str(character) == "" for atom in atoms)


_ATOM = r"(?:\[\^?(?:\\.|[^\[\]\\])+\]|\\[sdwSDWntr]|\\[pP]\{\w+\}|\\[^\w\s]|[^\\\[\](){}|*+?^$])"
_SOMETHING = re.compile(rf"\^?(?:{_ATOM}[*+?]?)*{_ATOM}(?:\+|\{{[1-9]\d*,?\d*\}})?(?:{_ATOM}[*?])*\$?")


def _never_empty(regex: str) -> bool:
    """True for alternatives of plain characters and classes, one of which at least must be there. Others are not
    looked into."""
    group = re.fullmatch(r"\((?:\?:)?([^()]*)\)\+?", regex)
    parts = (group[1] if group else regex).split("|")
    return len(regex) <= 200 and all(map(_SOMETHING.fullmatch, parts))


# ----------------------------------------------------------------------------------------------------------------------
# tokenizer.model


class SentencePieceBackend:
    """tokenizer.model, by the `sentencepiece` library.

    A tokenizer.json converted from the model would not give the same ids: the `tokenizers` library normalises
    half-width kana, Hangul letters and stacked accents differently, and strips other white space at a text's ends.

    The library does not look for special tokens in a text, so the text is cut at them here. Its model puts a space in
    front of what it encodes. `legacy: true` in tokenizer_config.json keeps that space after every special token,
    `add_prefix_space: false` never has one, and without both only the beginning of the text gets one.
    """

    def __init__(self, path: Path, config: dict[str, Any], tokens: TokenConfig) -> None:
        from tokenizers import decoders

        self.path, self.data = path, read_bytes(path, MAX_VOCAB_BYTES)
        self.model = _load_sentencepiece(path, self.data)
        with one_sentence_errors(f"read the pieces of {path}, copy the file again"):
            self.tokens = [self.model.id_to_piece(i) for i in range(self.model.get_piece_size())]
            self.has_prefix = self.model.normalize("a").startswith("▁") and config.get("add_prefix_space") is not False
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        strip = [decoders.Strip(" ", 1, 0)] if self.has_prefix else []
        self.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
        self.named = self._named_tokens(tokens)

        control = [AddedToken(t) for i, t in enumerate(self.tokens) if self.model.is_control(i)]
        added = [*control, *replace(tokens, named=self.named).to_add({token.content for token in control})]
        self.added = {token.content: token for token in added}
        for content in self.added:
            if content not in self.ids:
                self.ids[content] = len(self.tokens)
                self.tokens.append(content)
        self.specials = frozenset(content for content, token in self.added.items() if token.special)
        self.splitter = _splitter(list(self.added.values()))

        self.prefix_everywhere = config.get("legacy") is True
        self.adds_bos = config.get("add_bos_token", True) is True and "bos_token" in self.named
        self.adds_eos = config.get("add_eos_token", False) is True and "eos_token" in self.named

    def _named_tokens(self, tokens: TokenConfig) -> dict[str, AddedToken]:
        """What tokenizer_config.json names, and for bos, eos and unk otherwise what the model itself does."""
        own = {"bos_token": self.model.bos_id(), "eos_token": self.model.eos_id(), "unk_token": self.model.unk_id()}
        found = {name: AddedToken(self.tokens[i]) for name, i in own.items() if 0 <= i < len(self.tokens)}
        return found | tokens.named

    def encode(self, text: str, add_special: bool) -> list[int]:
        ids = [self.ids[self.named["bos_token"].content]] if add_special and self.adds_bos else []
        start = 0
        with one_sentence_errors("encode this text"):
            for match in self.splitter.finditer(text):
                token = self.added[match[0]]
                part = text[start : match.start()]
                ids += self._encode_part(part.rstrip() if token.lstrip else part, start)
                ids.append(self.ids[token.content])
                start = _SPACES.match(text, match.end()).end() if token.rstrip else match.end()
            ids += self._encode_part(text[start:], start)
        if add_special and self.adds_eos:
            ids.append(self.ids[self.named["eos_token"].content])
        return ids

    def encode_batch(self, texts: list[str]) -> list[array[int]]:
        return [array("I", self.encode(text, add_special=False)) for text in texts]

    def _encode_part(self, text: str, start: int) -> list[int]:
        with_prefix = self.has_prefix and (self.prefix_everywhere or start == 0)
        return (self.model if with_prefix else self.model_without_prefix).encode(text) if text else []

    @functools.cached_property
    def model_without_prefix(self) -> Any:
        # The space in front is a field of the model, not an argument of the library. A protocol buffer takes the last
        # value of a field, so normalizer_spec (field 3) { add_dummy_prefix (field 3) = false } is appended.
        return _load_sentencepiece(self.path, self.data + bytes([3 << 3 | 2, 2, 3 << 3, 0]))

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        skipped = self.specials if skip_special_tokens else frozenset()
        tokens = [token for i in ids if (token := self.id_to_token(i)) is not None and token not in skipped]
        with one_sentence_errors("decode these tokens"):
            return self.decoder.decode(tokens)

    def token_to_id(self, token: str) -> int | None:
        return self.ids.get(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self.tokens[token_id] if 0 <= token_id < len(self.tokens) else None

    def largest_id(self) -> int:
        return len(self.tokens) - 1

    def special_contents(self) -> frozenset[str]:
        return self.specials

    @property
    def sums_scores(self) -> bool:
        """True for a Unigram model, whose scores are no ranks (see FastBackend)."""
        return any(score % 1 for score in map(self.model.get_score, range(self.model.get_piece_size())))


def _load_sentencepiece(path: Path, data: bytes) -> Any:
    try:
        import sentencepiece
    except ImportError:
        raise ValueError(f"{path} needs the sentencepiece library: run pip install sentencepiece.") from None

    model = sentencepiece.SentencePieceProcessor()
    with one_sentence_errors(f"load {path} as a sentencepiece model, copy the file again"):
        if not data or model.LoadFromSerializedProto(data) is False or model.get_piece_size() == 0:
            raise ValueError("it holds no pieces")
    return model


_SPACES = re.compile(r"\s*")


def _splitter(tokens: list[AddedToken]) -> re.Pattern[str]:
    """A pattern that finds added tokens in a text. Where several begin at the same place, it finds the longest."""
    parts = []
    for token in sorted(tokens, key=lambda token: -len(token.content)):
        part = re.escape(token.content)
        parts.append(rf"(?<!\w){part}(?!\w)" if token.single_word else part)
    return re.compile("|".join(parts) or r"(?!)")
