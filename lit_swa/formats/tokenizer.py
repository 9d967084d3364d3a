"""Text <-> token ids for one checkpoint directory, and the model's chat template.

    tokenizer = Tokenizer(checkpoint_dir)
    ids = tokenizer.encode("Hello")            # list[int], with BOS where the model's own tokenizer adds it
    text = tokenizer.decode(ids)
    for piece in tokenizer.decode_stream(ids): # the same text, as it comes
        print(piece, end="")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])

`tokenizer.json` is read with the `tokenizers` library, exactly as it is written. `tokenizer.model` is read with
`sentencepiece`, and only where there is no `tokenizer.json`.

All of these files come from strangers. Whatever is wrong with them ends in a `ValueError` or a `FileNotFoundError`
of one sentence. A chat template is a program; chat_template.py runs it within limits.

Reading order: Tokenizer -> StreamDecoder and its stages -> the two backends -> configuration files -> what chat
templates are given. Nothing here imports torch.
"""

from __future__ import annotations

import base64
import codecs
import contextlib
import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_swa.formats.chat_template import TemplateError, one_line, render_template

MAX_CONFIG_BYTES = 8 * 2**20  # tokenizer_config.json and the other small files; real ones are below 2 MB
MAX_VOCAB_BYTES = 128 * 2**20  # tokenizer.json, tokenizer.model; real ones are below 40 MB
MAX_GROWTH = 4096  # how many times longer a file's replacement rules may make a text

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer and the chat templates of `checkpoint_dir`.

    Reads tokenizer.json or tokenizer.model, and where they exist tokenizer_config.json, special_tokens_map.json,
    added_tokens.json, generation_config.json, chat_template.jinja, additional_chat_templates/*.jinja,
    chat_templates/*.jinja and chat_template.json.

    Attributes:
        bos_id, eos_id, pad_id: ids of the tokens that the files name so, or None.
        eos_ids: every id that ends an answer, without repetition: `eos_id`, then the ones of generation_config.json.
        special_tokens: name -> text, such as {"bos_token": "<s>"}; chat templates see them under these names.

    Raises:
        FileNotFoundError: there is no such directory or no tokenizer in it.
        ValueError: a file is not what it should be. The message is one sentence that names the file.
    """

    def __init__(self, checkpoint_dir: str | os.PathLike[str]) -> None:
        self.checkpoint_dir = Path(checkpoint_dir)
        vocab_path = _find_vocab_file(self.checkpoint_dir)
        config = _read_json(self.checkpoint_dir / "tokenizer_config.json")
        tokens = _read_token_config(self.checkpoint_dir, config)
        backend = _FastBackend if vocab_path.name == "tokenizer.json" else _SentencePieceBackend
        self._backend = backend(vocab_path, config, tokens)
        self._chat_templates = _read_chat_templates(self.checkpoint_dir, config)

        named = tokens.named if backend is _FastBackend else self._backend.named
        self.special_tokens = {name: token.content for name, token in named.items()}
        self.bos_id = self._named_id("bos_token")
        self.eos_id = self._named_id("eos_token")
        self.pad_id = self._named_id("pad_token")
        own = [] if self.eos_id is None else [self.eos_id]
        self.eos_ids = list(dict.fromkeys(own + _read_stop_ids(self.checkpoint_dir)))

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, tokens added to the vocabulary included."""
        return self._backend.largest_id() + 1

    @property
    def has_chat_template(self) -> bool:
        return bool(self._chat_templates)

    def token_to_id(self, token: str) -> int | None:
        """The id of exactly this token, or None. Spaces look as they do in the vocabulary ("Ġthe", "▁the")."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token, or None where no token has this id."""
        return self._backend.id_to_token(int(token_id))

    def encode(self, text: str, bos: bool | None = None, eos: bool = False) -> list[int]:
        """Token ids of `text`. Special tokens that stand in the text, such as "<|im_end|>", become their one id.

        Args:
            bos: None adds what the model's own tokenizer adds (the post-processor of tokenizer.json; `add_bos_token`
                beside a tokenizer.model). True puts BOS in front and adds nothing else, False adds nothing.
            eos: appends EOS, unless the model's own tokenizer has already put it there.

        Raises:
            ValueError: the text is not one that can be encoded, or a token is asked for that the files do not name.
        """
        if not isinstance(text, str):
            raise ValueError(f"encode takes one string, not {type(text).__name__}.")
        ids = self._backend.encode(text, add_special=bos is None)
        if bos:
            ids.insert(0, self._required(self.bos_id, "bos_token"))
        if eos:
            eos_id = self._required(self.eos_id, "eos_token")
            if bos is not None or not self._ends_in_own_eos(text, ids, eos_id):
                ids.append(eos_id)
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`, a list or a one-dimensional tensor. An id that no token has adds nothing."""
        return self._backend.decode(_plain_ids(ids), skip_special_tokens)

    def decode_stream(self, ids: Iterable[int], skip_special_tokens: bool = True) -> Iterator[str]:
        """Pieces of text while the ids come; joined they are `decode` of all the ids. See `StreamDecoder`."""
        decoder = StreamDecoder(self, skip_special_tokens)
        for token_id in ids:
            if piece := decoder.push(token_id):
                yield piece
        if piece := decoder.flush():
            yield piece

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        **template_kwargs: Any,
    ) -> str:
        """The conversation as the text that the model was trained on.

        Args:
            messages: dicts with "role", "content" and whatever else the template reads; keys whose value is None are
                dropped. A message's reasoning may be called reasoning_content, thinking or reasoning.
            add_generation_prompt: end with the header that makes the model answer.
            tools: functions that the model may call, as JSON schema dicts.
            chat_template: the name of one of the model's templates, or a template. Without it, "tool_use" is taken
                where there are tools and such a template, otherwise "default".
            template_kwargs: further variables of the template, such as documents or enable_thinking.

        Raises:
            ValueError: no template, a template that refuses the conversation, is wrong, or exceeds its limits.
        """
        source = self._chat_template_source(chat_template, tools)
        variables = {
            **self.special_tokens,
            "documents": None,
            **_checked_template_kwargs(template_kwargs),
            "messages": _checked_messages(messages),
            "tools": _checked_tools(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return render_template(source, variables)
        except TemplateError as error:
            raise ValueError(f"The chat template of {self.checkpoint_dir} {error}.") from None

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        **template_kwargs: Any,
    ) -> list[int]:
        """Token ids of `render_chat` with the same arguments. The template writes BOS, so none is added.

        A special token that a message's content spells out becomes that token, as in transformers.
        """
        text = self.render_chat(messages, add_generation_prompt, tools, chat_template, **template_kwargs)
        return self._backend.encode(text, add_special=False)

    def _named_id(self, name: str) -> int | None:
        return self.token_to_id(self.special_tokens[name]) if name in self.special_tokens else None

    def _required(self, token_id: int | None, name: str) -> int:
        if token_id is None:
            raise ValueError(f"{self.checkpoint_dir} has no {name}: name one in its tokenizer_config.json.")
        return token_id

    def _ends_in_own_eos(self, text: str, ids: list[int], eos_id: int) -> bool:
        if not ids or ids[-1] != eos_id:
            return False
        plain = self._backend.encode(text, add_special=False)  # the text itself may end in a typed EOS
        return ids[len(ids) - len(plain) :] != plain

    def _chat_template_source(self, chat_template: str | None, tools: Any) -> str:
        templates = self._chat_templates
        if chat_template is not None and "{" in chat_template:
            return chat_template
        if not templates:
            raise ValueError(
                f"{self.checkpoint_dir} has no chat template: add chat_template.jinja or pass chat_template=..., "
                "or use encode for a model that was not trained on conversations."
            )
        name = chat_template or ("tool_use" if tools is not None and "tool_use" in templates else "default")
        if name not in templates:
            names = ", ".join(sorted(templates))
            raise ValueError(f"{self.checkpoint_dir} has no chat template called {name!r}: pass one of {names}.")
        return templates[name]


def _plain_ids(ids: Any) -> list[int]:
    """A list of ids that fit the vocabularies' 32 bits, from a list, an iterator, a tensor or an array."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    ids = [ids] if isinstance(ids, int) else list(ids)
    for token_id in ids:
        if not hasattr(token_id, "__index__") or not 0 <= token_id < 2**32:
            raise ValueError(f"decode takes one sequence of token ids, and {one_line(repr(token_id))} is not an id.")
    return [int(token_id) for token_id in ids]


# ----------------------------------------------------------------------------------------------------------------------
# Decoding as the tokens come
#
# `decode` of a part of the ids is not a part of the text: the first token loses its leading space, a character may be
# spread over several byte tokens, a run of byte tokens is valid or invalid as a whole. So each decoder of the
# `tokenizers` library has a stage here that does the same work on one token after the other and keeps back exactly
# what later tokens can still change. The work per token does not grow with the length of the text.


class StreamDecoder:
    """Decodes one sequence of ids step by step: the pushed pieces, then `flush`, add up to `decode` of all the ids.

        decoder = StreamDecoder(tokenizer)
        for token_id in generate(...):
            print(decoder.push(token_id), end="", flush=True)
        print(decoder.flush())

    A piece never ends in a part of a character. After `flush` the next push begins a new sequence.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._backend = tokenizer._backend
        self._skipped = self._backend.special_contents() if skip_special_tokens else frozenset()
        self._stages = _decoder_stages(self._backend.decoder_spec())

    def push(self, token_id: int) -> str:
        """The text that this token completes, often one word, sometimes none."""
        token = self._backend.id_to_token(int(token_id))
        if token is None or token in self._skipped:
            return ""
        return "".join(_run(self._stages, [token]))

    def flush(self) -> str:
        """What was kept back. Bytes that never became a character come out as U+FFFD, as in `decode`."""
        stages, self._stages = self._stages, _decoder_stages(self._backend.decoder_spec())
        return "".join(_end(stages))


def _run(stages: list[_Stage], tokens: list[str]) -> list[str]:
    """The tokens that are certain after `tokens` went through all the stages."""
    for stage in stages:
        tokens = [out for token in tokens for out in stage.push(token)]
    return tokens


def _end(stages: list[_Stage]) -> list[str]:
    """The rest: what each stage kept goes through the stages after it."""
    return [out for i, stage in enumerate(stages) for out in _run(stages[i + 1 :], stage.end())]


class _Stage:
    """One step of decoding: takes one token, gives the tokens that are certain; `end` gives the rest."""

    def push(self, token: str) -> list[str]:
        raise NotImplementedError

    def end(self) -> list[str]:
        return []


class _Map(_Stage):
    """A step that looks at one token at a time. `function(token, is_first)` is the new token."""

    def __init__(self, function: Callable[[str, bool], str]) -> None:
        self.function = function
        self.is_first = True

    def push(self, token: str) -> list[str]:
        token, self.is_first = self.function(token, self.is_first), False
        return [token]


class _ByteLevel(_Stage):
    """GPT-2's alphabet: every byte is one printable character. All tokens together are one UTF-8 text."""

    def __init__(self) -> None:
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: str) -> list[str]:
        table = _byte_of_char()
        try:
            data = bytes([table[char] for char in token])
        except KeyError:  # an added token, written with characters outside the alphabet, stands for itself
            data = token.encode("utf-8")
        return [self.utf8.decode(data)]

    def end(self) -> list[str]:
        return [self.utf8.decode(b"", final=True)]


class _ByteFallback(_Stage):
    """Llama's bytes: a run of tokens <0x00> .. <0xFF> is one text, or, if that is not UTF-8, one U+FFFD per byte."""

    BYTE = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")

    def __init__(self) -> None:
        self.run = bytearray()

    def push(self, token: str) -> list[str]:
        match = self.BYTE.fullmatch(token)
        if match is None:
            return [*self.end(), token]
        self.run.append(int(match[1], 16))
        return []

    def end(self) -> list[str]:
        run, self.run = bytes(self.run), bytearray()
        try:
            return [run.decode("utf-8")] if run else []
        except UnicodeDecodeError:
            return ["\ufffd" * len(run)]


class _StripText(_Stage):
    """Takes up to `left` characters `content` off the beginning of the whole text, up to `right` off its end."""

    def __init__(self, content: str, left: int, right: int) -> None:
        self.content, self.left, self.right = content, left, right
        self.kept = ""  # the last characters, as long as they may turn out to be the end of the text

    def push(self, token: str) -> list[str]:
        rest = token
        while rest and self.left > 0:
            if not rest.startswith(self.content):
                self.left = 0
                break
            rest, self.left = rest[1:], self.left - 1
        text = self.kept + rest
        stripped = len(text.rstrip(self.content)) if self.right else len(text)
        cut = max(stripped, len(text) - self.right)
        self.kept = text[cut:]
        return [text[:cut]]


class _BPEDecoder(_Stage):
    """`suffix` ends a word: it becomes a space, and nothing in the last token."""

    def __init__(self, suffix: str) -> None:
        self.suffix = suffix
        self.last: str | None = None

    def push(self, token: str) -> list[str]:
        ready = [] if self.last is None else [self.last.replace(self.suffix, " ")]
        self.last = token
        return ready

    def end(self) -> list[str]:
        return [] if self.last is None else [self.last.replace(self.suffix, "")]


class _Held(_Stage):
    """For steps that cannot be done piece by piece: keeps everything, and lets the library decode it at the end."""

    def __init__(self, specs: list[dict[str, Any]], fused: bool) -> None:
        self.specs, self.fused = specs, fused
        self.tokens: list[str] = []

    def push(self, token: str) -> list[str]:
        self.tokens.append(token)
        return []

    def end(self) -> list[str]:
        from tokenizers import decoders

        decoder = decoders.Sequence([])
        decoder.__setstate__(json.dumps({"type": "Sequence", "decoders": self.specs}).encode())
        with _one_sentence_errors("decode these tokens"):
            return [decoder.decode(["".join(self.tokens)] if self.fused else self.tokens)]


def _decoder_stages(spec: dict[str, Any] | None) -> list[_Stage]:
    """The stages of a decoder as tokenizer.json describes it; None joins the tokens with spaces."""
    if spec is None:
        return [_Map(lambda token, is_first: token if is_first else " " + token)]
    specs = _flattened(spec)
    stages: list[_Stage] = []
    fused = False  # has an earlier step made one text of all the tokens?
    for i, step in enumerate(specs):
        if step["type"] == "Fuse":
            fused = True
            continue
        stage = (_text_stage if fused else _token_stage)(step)
        if stage is None:
            return [*stages, _Held(specs[i:], fused)]
        stages.append(stage)
        fused = fused or step["type"] == "ByteLevel"
    return stages


def _flattened(spec: dict[str, Any]) -> list[dict[str, Any]]:
    if spec["type"] != "Sequence":
        return [spec]
    return [step for inner in spec["decoders"] for step in _flattened(inner)]


def _token_stage(step: dict[str, Any]) -> _Stage | None:
    """The stage that does `step` on separate tokens, or None if it cannot be done one by one."""
    kind = step["type"]
    if kind == "ByteLevel":
        return _ByteLevel()
    if kind == "ByteFallback":
        return _ByteFallback()
    if kind == "BPEDecoder" and step["suffix"]:
        return _BPEDecoder(step["suffix"])
    if kind == "Replace" and step["pattern"].get("String"):
        old, new = step["pattern"]["String"], step["content"]
        return _Map(lambda token, is_first: token.replace(old, new))
    if kind == "Metaspace":
        mark, first = step["replacement"], " " if step["prepend_scheme"] == "never" else ""
        return _Map(lambda token, is_first: token.replace(mark, first if is_first else " "))
    if kind == "WordPiece" and not step["cleanup"]:
        prefix = step["prefix"]
        return _Map(lambda token, is_first: _wordpiece(token, is_first, prefix))
    return None


def _text_stage(step: dict[str, Any]) -> _Stage | None:
    """The stage that does `step` on a text that comes in pieces, or None if it needs the whole text."""
    if step["type"] == "Strip":
        return _StripText(step["content"], step["start"], step["stop"]) if step["stop"] < 2**16 else None
    if step["type"] == "Replace" and len(step["pattern"].get("String", "")) == 1:
        old, new = step["pattern"]["String"], step["content"]
        return _Map(lambda piece, is_first: piece.replace(old, new))
    return None


def _wordpiece(token: str, is_first: bool, prefix: str) -> str:
    if is_first:
        return token
    return token[len(prefix) :] if token.startswith(prefix) else " " + token


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 bytes are themselves, the other 68 are U+0100 and following."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


# ----------------------------------------------------------------------------------------------------------------------
# The two libraries behind one face: encode, decode, token_to_id, id_to_token, largest_id, special_contents,
# decoder_spec


class _FastBackend:
    """tokenizer.json, by the `tokenizers` library."""

    def __init__(self, path: Path, config: dict[str, Any], tokens: _TokenConfig) -> None:
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as RustTokenizer

        data = _read_bytes(path, MAX_VOCAB_BYTES)
        _check_before_loading(path, data)
        with _one_sentence_errors(f"load {path}, copy the file again"):
            self.rust = RustTokenizer.from_buffer(data)
        _check_growth(path, self.rust)
        # A file may carry the padding and truncation of the last training run; text is never cut or filled here.
        self.rust.no_padding()
        self.rust.no_truncation()
        self.rust.encode_special_tokens = config.get("split_special_tokens") is True

        known = {token.content for token in self.rust.get_added_tokens_decoder().values()}
        with _one_sentence_errors(f"add the tokens of tokenizer_config.json to {path}"):
            added = [{k: v for k, v in vars(token).items() if v is not None} for token in tokens.to_add(known)]
            self.rust.add_tokens([AddedToken(**fields) for fields in added])

    def encode(self, text: str, add_special: bool) -> list[int]:
        with _one_sentence_errors("encode this text"):
            return self.rust.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        with _one_sentence_errors("decode these tokens"):
            return self.rust.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self.rust.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self.rust.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def largest_id(self) -> int:
        return max(self.rust.get_vocab(with_added_tokens=True).values(), default=-1)

    def special_contents(self) -> frozenset[str]:
        return frozenset(token.content for token in self.rust.get_added_tokens_decoder().values() if token.special)

    def decoder_spec(self) -> dict[str, Any] | None:
        return None if self.rust.decoder is None else json.loads(self.rust.decoder.__getstate__())


class _SentencePieceBackend:
    """tokenizer.model, by the `sentencepiece` library.

    The library knows nothing of special tokens in a text, so the text is cut at them here. Its model puts a space in
    front of what it encodes: `legacy: true` of tokenizer_config.json does so after every special token,
    `add_prefix_space: false` never, and without them only the beginning of the text gets one.
    """

    def __init__(self, path: Path, config: dict[str, Any], tokens: _TokenConfig) -> None:
        self.path, self.data = path, _read_bytes(path, MAX_VOCAB_BYTES)
        self.model = _load_sentencepiece(path, self.data)
        with _one_sentence_errors(f"read the pieces of {path}, copy the file again"):
            self.tokens = [self.model.id_to_piece(i) for i in range(self.model.get_piece_size())]
            self.has_prefix = self.model.normalize("a").startswith("▁") and config.get("add_prefix_space") is not False
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.named = self._named_tokens(tokens)

        control = [_AddedToken(t) for i, t in enumerate(self.tokens) if self.model.is_control(i)]
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

    def _named_tokens(self, tokens: _TokenConfig) -> dict[str, _AddedToken]:
        """What tokenizer_config.json names, and for bos, eos and unk otherwise what the model itself does."""
        own = {"bos_token": self.model.bos_id(), "eos_token": self.model.eos_id(), "unk_token": self.model.unk_id()}
        found = {name: _AddedToken(self.tokens[i]) for name, i in own.items() if 0 <= i < len(self.tokens)}
        return found | tokens.named

    def encode(self, text: str, add_special: bool) -> list[int]:
        ids = [self.ids[self.named["bos_token"].content]] if add_special and self.adds_bos else []
        start = 0
        with _one_sentence_errors("encode this text"):
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

    def _encode_part(self, text: str, start: int) -> list[int]:
        with_prefix = self.has_prefix and (self.prefix_everywhere or start == 0)
        return (self.model if with_prefix else self.model_without_prefix).encode(text) if text else []

    @functools.cached_property
    def model_without_prefix(self) -> Any:
        # The library has no switch for the space in front, the model has: a protocol buffer takes the last value of
        # a field, so two fields are appended, normalizer_spec (3) { add_dummy_prefix (3) = false }.
        return _load_sentencepiece(self.path, self.data + bytes([3 << 3 | 2, 2, 3 << 3, 0]))

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        skipped = self.specials if skip_special_tokens else frozenset()
        tokens = [token for i in ids if (token := self.id_to_token(i)) is not None and token not in skipped]
        stages = _decoder_stages(self.decoder_spec())
        return "".join(_run(stages, tokens) + _end(stages))

    def token_to_id(self, token: str) -> int | None:
        return self.ids.get(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self.tokens[token_id] if 0 <= token_id < len(self.tokens) else None

    def largest_id(self) -> int:
        return len(self.tokens) - 1

    def special_contents(self) -> frozenset[str]:
        return self.specials

    def decoder_spec(self) -> dict[str, Any]:
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if self.has_prefix else []
        spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
        return {"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]}


def _load_sentencepiece(path: Path, data: bytes) -> Any:
    try:
        import sentencepiece
    except ImportError:
        raise ValueError(f"{path} needs the sentencepiece library: run pip install sentencepiece.") from None

    model = sentencepiece.SentencePieceProcessor()
    with _one_sentence_errors(f"load {path} as a sentencepiece model, copy the file again"):
        if not data or model.LoadFromSerializedProto(data) is False or model.get_piece_size() == 0:
            raise ValueError("it holds no pieces")
    return model


_SPACES = re.compile(r"\s*")


def _splitter(tokens: list[_AddedToken]) -> re.Pattern[str]:
    """A pattern that finds added tokens in a text, where several begin at one place the longest."""
    parts = []
    for token in sorted(tokens, key=lambda token: -len(token.content)):
        part = re.escape(token.content)
        parts.append(rf"(?<!\w){part}(?!\w)" if token.single_word else part)
    return re.compile("|".join(parts) or r"(?!)")


@contextlib.contextmanager
def _one_sentence_errors(task: str) -> Iterator[None]:
    """Turns whatever the libraries raise into a ValueError of one sentence.

    The Rust library raises bare `Exception`, and where it panics a `PanicException`, which derives from
    BaseException and so slips through `except Exception`.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)):
            raise
        raise ValueError(f"The tokenizer cannot {task}: {one_line(str(error))}.") from None


# ----------------------------------------------------------------------------------------------------------------------
# Files of the checkpoint directory


def _find_vocab_file(directory: Path) -> Path:
    if not directory.is_dir():
        raise FileNotFoundError(f"There is no directory {directory}: give the directory of a checkpoint.")
    for name in ("tokenizer.json", "tokenizer.model"):
        if (directory / name).is_file():
            return directory / name
    there = sorted(entry.name for entry in directory.iterdir())
    listed = ", ".join(there[:12]) + (" ..." if len(there) > 12 else "") if there else "nothing"
    raise FileNotFoundError(
        f"{directory} holds no tokenizer: copy tokenizer.json or tokenizer.model into it (it holds {listed})."
    )


def _read_bytes(path: Path, limit: int) -> bytes:
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path} has {size:,} bytes, and more than {limit:,} are not read: it is not such a file.")
    return path.read_bytes()


def _read_text(path: Path) -> str:
    try:
        return _read_bytes(path, MAX_CONFIG_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): copy the file again.") from None


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty where there is no such file."""
    return _parse_json(path, _read_text(path)) if path.is_file() else {}


def _parse_json(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply: it is not such a file.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({one_line(str(error))}): copy the file again.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object: copy the file again.")
    return value


def _read_stop_ids(directory: Path) -> list[int]:
    path = directory / "generation_config.json"
    value = _read_json(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < 2**32:
            raise ValueError(f"eos_token_id in {path} is {one_line(repr(value))}: it takes an id or a list of ids.")
    return ids


@dataclass(frozen=True)
class _AddedToken:
    """A token that is found in a text before anything else is, with the fields of `tokenizers.AddedToken`."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None  # None: the library's default, which is `not special`
    special: bool = True


@dataclass(frozen=True)
class _TokenConfig:
    """What the small files say about added tokens.

    recorded: in the order of their ids. named: bos_token, eos_token, ... extra: special, without a name.
    """

    recorded: list[_AddedToken]
    named: dict[str, _AddedToken]
    extra: list[_AddedToken]

    def to_add(self, known: set[str]) -> list[_AddedToken]:
        """The tokens to add to a vocabulary that already has `known`, in the order that decides their ids."""
        names = {token.content for token in self.named.values()}
        tokens = [replace(token, special=token.special or token.content in names) for token in self.recorded]
        known = known | {token.content for token in tokens}
        for token in [*self.named.values(), *self.extra]:
            if token.content not in known:
                tokens.append(replace(token, special=True))
                known.add(token.content)
        return tokens


def _read_token_config(directory: Path, config: dict[str, Any]) -> _TokenConfig:
    """Added tokens as transformers finds them: added_tokens_decoder, or else the two older files."""
    where = directory / "tokenizer_config.json"
    recorded_by_id = config.get("added_tokens_decoder")
    if recorded_by_id is None:
        config = config | _read_json(directory / "special_tokens_map.json")
        where = f"{where} or special_tokens_map.json"
    named = _named_tokens(config, where)
    extra = _extra_tokens(config, named, where)
    if recorded_by_id is None:
        specials = {token.content for token in [*named.values(), *extra]}
        recorded = _legacy_added_tokens(directory / "added_tokens.json", specials)
    else:
        recorded = _recorded_tokens(recorded_by_id, where)
    by_content = {token.content: token for token in recorded}
    named = {name: by_content.get(token.content, token) for name, token in named.items()}
    return _TokenConfig(recorded, named, extra)


def _named_tokens(config: dict[str, Any], where: Any) -> dict[str, _AddedToken]:
    """bos_token and the other known names first, then any other "..._token" whose value is a token."""
    others = [name for name in config if name.endswith("_token") and name not in NAMED_TOKENS]
    named = {}
    for name in [*NAMED_TOKENS, *others]:
        value = config.get(name)
        if value is None or (name in others and not isinstance(value, (str, dict))):
            continue  # add_bos_token is a switch, not a token
        named[name] = _added_token(value, f"{name} in {where}")
    return named


def _extra_tokens(config: dict[str, Any], named: dict[str, _AddedToken], where: Any) -> list[_AddedToken]:
    """extra_special_tokens, called additional_special_tokens before; as a dict they are named, so `named` gets them."""
    value = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(value, dict):
        named.update({name: _added_token(token, f"extra_special_tokens in {where}") for name, token in value.items()})
        return []
    if not isinstance(value, list):
        raise ValueError(f"extra_special_tokens in {where} is a {type(value).__name__}, not a list.")
    return [_added_token(token, f"extra_special_tokens in {where}") for token in value]


def _recorded_tokens(recorded_by_id: Any, where: Any) -> list[_AddedToken]:
    try:
        by_id = sorted((int(token_id), token) for token_id, token in recorded_by_id.items())
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"added_tokens_decoder in {where} is not an object from token ids to tokens.") from None
    return [_added_token(token, f"added_tokens_decoder in {where}", special=False) for _, token in by_id]


def _legacy_added_tokens(path: Path, specials: set[str]) -> list[_AddedToken]:
    ids = _read_json(path)
    if not all(type(token_id) is int for token_id in ids.values()):
        raise ValueError(f"{path} is not an object from tokens to token ids.")
    contents = sorted((content for content in ids if content), key=ids.__getitem__)
    return [_AddedToken(c, special=c in specials, normalized=c not in specials) for c in contents]


def _added_token(value: Any, where: str, special: bool = True) -> _AddedToken:
    if isinstance(value, str) and value:
        return _AddedToken(value)
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, str) or not content:
        raise ValueError(f"{where} is {one_line(repr(value))}: it takes a token's text, or an object with it.")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": None, "special": special}
    for name, default in flags.items():
        flags[name] = value.get(name, default)
        if not isinstance(flags[name], (bool, type(default))):
            raise ValueError(f"{name} of {where} is {one_line(repr(flags[name]))}: it takes true or false.")
    return _AddedToken(content, **flags)


_CHARSMAP = re.compile(rb'"precompiled_charsmap"\s*:\s*(?:"([A-Za-z0-9+/=]*)"|null)')
_SUBWORD_PREFIX = re.compile(rb'"continuing_subword_prefix"\s*:\s*"[^"]')
_ESCAPED_LETTER = re.compile(rb"\\u00(5[fF]|6[1-9a-fA-F]|7[0-9aA])")


def _check_before_loading(path: Path, data: bytes) -> None:
    """Refuses the two things that end the process inside the library, where no exception can be caught.

    The file is searched, not parsed: parsing a large vocabulary in Python takes seconds. JSON may write a letter of a
    key as \\u0061, so that is undone first.
    """
    data = _ESCAPED_LETTER.sub(lambda match: bytes([int(match[1], 16)]), data)
    if not _charsmaps_are_sound(data):
        raise ValueError(f"{path} has a damaged precompiled_charsmap: copy the file again.")
    if _SUBWORD_PREFIX.search(data) and not _merges_have_prefix(_parse_json(path, data.decode("utf-8", "replace"))):
        raise ValueError(f"{path} has merges without its continuing_subword_prefix: copy the file again.")


def _charsmaps_are_sound(data: bytes) -> bool:
    """A precompiled table begins with the size in bytes of its first half, and so much memory is asked for."""
    tables = _CHARSMAP.findall(data)
    sound = len(tables) == data.count(b'"precompiled_charsmap"')
    for encoded in tables:
        with contextlib.suppress(ValueError):  # not base64: the library says so
            table = base64.b64decode(encoded)
            size = int.from_bytes(table[:4], "little")
            sound = sound and size % 4 == 0 and size <= max(0, len(table) - 4)
    return sound


def _merges_have_prefix(spec: dict[str, Any]) -> bool:
    """The library cuts the prefix off the second token of a merge unseen, and may cut a character in two."""
    model = spec.get("model")
    merges = model.get("merges") if isinstance(model, dict) else None
    prefix = model.get("continuing_subword_prefix") if isinstance(merges, list) else None
    if not isinstance(prefix, str):
        return True
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    return all(isinstance(pair, list) and pair and str(pair[-1]).startswith(prefix) for pair in pairs)


def _check_growth(path: Path, rust: Any) -> None:
    """Refuses rules that make a text too long: twenty that double it turn a page into a gigabyte."""
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        rules = getattr(rust, part)
        if rules is not None and _growth(json.loads(rules.__getstate__())) > MAX_GROWTH:
            raise ValueError(f"The {part} in {path} could make a text {MAX_GROWTH:,} times longer: it is not loaded.")


def _growth(node: Any) -> float:
    """At most how many times longer these rules, as the library writes them down, make a text."""
    if isinstance(node, list):
        return math.prod(map(_growth, node))
    if not isinstance(node, dict):
        return 1.0
    kind = node.get("type")
    if kind == "TemplateProcessing":
        most = max((len(special["ids"]) for special in node["special_tokens"].values()), default=1)
        texts = sum("Sequence" in piece for piece in node["single"])
        return max(1.0, texts, len(node["single"]) * most / MAX_GROWTH)
    factor = 1.0
    if kind == "Replace":
        literal, new = node["pattern"].get("String"), len(node["content"])
        factor = max(1.0, new / len(literal)) if literal else 1.0 + new
    if kind == "ByteLevel":
        factor = 2.0
    return factor * math.prod(map(_growth, node.values()))


# ----------------------------------------------------------------------------------------------------------------------
# What a chat template is and what it is given


def _read_chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Name -> template. Files of their own come before tokenizer_config.json, chat_template.json comes last."""
    templates = {}
    for folder in ("chat_templates", "additional_chat_templates"):
        for path in sorted((directory / folder).glob("*.jinja")):
            templates[path.stem] = _read_text(path)
    if (directory / "chat_template.jinja").is_file():
        templates["default"] = _read_text(directory / "chat_template.jinja")
    if templates:
        return templates
    if config.get("chat_template") is not None:
        return _named_templates(config["chat_template"], directory / "tokenizer_config.json")
    path = directory / "chat_template.json"
    value = _read_json(path).get("chat_template")
    return {} if value is None else _named_templates(value, path)


def _named_templates(value: Any, path: Path) -> dict[str, str]:
    """A template, a list of {"name", "template"}, or an object from names to templates."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item.get("name"), str)}
    if not isinstance(value, dict) or not value or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"chat_template in {path} is neither a template nor a list of objects with name and template.")
    return value


REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# Arguments of transformers' function of the same name that mean something other than a variable of the template.
NOT_TEMPLATE_VARIABLES = (
    "continue_final_message tokenize return_dict return_tensors return_assistant_tokens_mask padding truncation "
    "max_length tokenizer_kwargs sanitize_control_tokens"
).split()


def _checked_template_kwargs(variables: dict[str, Any]) -> dict[str, Any]:
    if refused := sorted(set(variables) & set(NOT_TEMPLATE_VARIABLES)):
        raise ValueError(f"{refused[0]} is not supported here: render_chat and apply_chat_template do without it.")
    return variables


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Copies of the messages, without keys whose value is None, with a message's reasoning under its usual names."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise ValueError(f"messages is a list of dicts with role and content, not a {type(messages).__name__}.")
    checked = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise ValueError(f"A message is a dict with role and content, not a {type(message).__name__}.")
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[key] for key in REASONING_KEYS if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        checked.append(message)
    if not checked:
        raise ValueError("The conversation is empty: give at least one message.")
    return checked


def _checked_tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError("tools is a list of dicts, each the JSON schema of one function.")
    return list(tools)
