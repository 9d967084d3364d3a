"""Text <-> token ids for one checkpoint directory, and the model's chat template.

    tokenizer = Tokenizer(checkpoint_dir)
    ids = tokenizer.encode("Hello")            # list[int], with BOS where the model's own tokenizer adds it
    text = tokenizer.decode(ids)
    for piece in tokenizer.decode_stream(ids): # the same text, as it comes
        print(piece, end="")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])

`tokenizer.json` is read with the `tokenizers` library, exactly as it is written. `tokenizer.model` is read with
`sentencepiece`, and only where there is no `tokenizer.json`. Where there is neither, `vocab.json` and `merges.txt` are.

All of these files come from strangers. Whatever is wrong with them ends in a `ValueError` or a `FileNotFoundError`
of one sentence. A chat template is a program; chat_template.py runs it within limits.

See also tokenizer_backends.py (the two libraries) and tokenizer_files.py (the small files next to a vocabulary).
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lit_swa.formats.chat_template import TemplateError, one_line, render_template
from lit_swa.formats.tokenizer_backends import FastBackend, SentencePieceBackend
from lit_swa.formats.tokenizer_files import (
    find_vocab_file,
    read_chat_templates,
    read_small_json,
    read_stop_ids,
    read_token_config,
)
from lit_swa.formats.tokenizer_slow import SlowBackend

BACKENDS = {"tokenizer.json": FastBackend, "tokenizer.model": SentencePieceBackend, "vocab.json": SlowBackend}


class Tokenizer:
    """The tokenizer and the chat templates of `checkpoint_dir`.

    Reads tokenizer.json, tokenizer.model or vocab.json and merges.txt, and where they exist tokenizer_config.json,
    special_tokens_map.json, added_tokens.json, generation_config.json, config.json (for EOS), chat_template.jinja,
    additional_chat_templates/*.jinja, chat_templates/*.jinja and chat_template.json.

    Attributes:
        bos_id, eos_id, pad_id: ids of the tokens that the files name so, or None.
        eos_ids: every id that ends an answer, without repetition: `eos_id`, then the ones of generation_config.json, or
            of config.json where that names none.
        special_tokens: name -> text, such as {"bos_token": "<s>"}; chat templates see them under these names.

    Raises:
        FileNotFoundError: there is no such directory or no tokenizer in it.
        ValueError: a file is not what it should be. The message is one sentence that names the file.
    """

    def __init__(self, checkpoint_dir: str | os.PathLike[str]) -> None:
        self.checkpoint_dir = Path(checkpoint_dir)
        vocab_path = find_vocab_file(self.checkpoint_dir)
        config = read_small_json(self.checkpoint_dir / "tokenizer_config.json")
        tokens = read_token_config(self.checkpoint_dir, config)
        self._backend = BACKENDS[vocab_path.name](vocab_path, config, tokens)
        self._chat_templates = read_chat_templates(self.checkpoint_dir, config)

        self.special_tokens = {name: token.content for name, token in self._backend.named.items()}
        self.bos_id = self._named_id("bos_token")
        self.eos_id = self._named_id("eos_token")
        self.pad_id = self._named_id("pad_token")
        own = [] if self.eos_id is None else [self.eos_id]
        self.eos_ids = list(dict.fromkeys(own + read_stop_ids(self.checkpoint_dir)))

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, tokens added to the vocabulary included."""
        return self._backend.largest_id() + 1

    @property
    def sums_scores(self) -> bool:
        """True if any part of a text may change the ids of another, far away: it must be encoded from its beginning."""
        return self._backend.sums_scores

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
        """Token ids of `text`. Special tokens in the text, such as "<|im_end|>", become their one id.

        Args:
            bos: None adds what the model's own tokenizer adds (the post-processor of tokenizer.json; `add_bos_token`
                next to a tokenizer.model). True puts BOS in front and adds nothing else, False adds nothing.
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

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of encode(text, bos=False) for many texts, uint32. The library encodes several at once on as many
        cores as there are, unless TOKENIZERS_PARALLELISM=false is set."""
        return [np.frombuffer(ids, dtype=np.uint32) for ids in self._backend.encode_batch(texts)]

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


class StreamDecoder:
    """Decodes one sequence of ids step by step: the pushed pieces, then `flush`, add up to `decode` of all the ids.

        decoder = StreamDecoder(tokenizer)
        for token_id in generate(...):
            print(decoder.push(token_id), end="", flush=True)
        print(decoder.flush())

    A piece never ends in a part of a character. After `flush` the next push begins a new sequence.

    A push decodes the new id together with the few ids before it, so that its cost does not grow with the text. The
    DecodeStream of the `tokenizers` library is not used: it fails where byte tokens such as <0xF0> form no
    character, and each step costs more than the last while the bytes form no character.
    """

    CONTEXT = 4  # ids kept in front of the next one: a character has at most four bytes, and each may be a token

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._backend = tokenizer._backend
        self._skipped = self._backend.special_contents() if skip_special_tokens else frozenset()
        steps = _decoder_steps(self._backend.decoder)
        self._only_at_end = not _only_appends(steps)
        self._has_byte_tokens = any(step["type"] == "ByteFallback" for step in steps)
        self._ids: list[int] = []  # ids of which text is still to come, and a few before them
        self._shown = 0  # how many characters of their text are out already

    def push(self, token_id: int) -> str:
        """The text that this token completes, often one word, sometimes none."""
        token = self._backend.id_to_token(int(token_id))
        if token is None or token in self._skipped:  # as in `decode`
            return ""
        self._ids.append(int(token_id))
        # A run of byte tokens is one text if it is UTF-8, else one U+FFFD per byte: only its end decides.
        if self._only_at_end or self._has_byte_tokens and _BYTE_TOKEN.fullmatch(token):
            return ""
        text = self._text()
        n_open = text.endswith("\ufffd")  # perhaps a character whose last bytes are still to come
        piece = text[self._shown : len(text) - n_open]
        if piece:
            self._ids = self._ids[-self.CONTEXT :]
            self._shown = len(self._text()) - n_open
        return piece

    def flush(self) -> str:
        """What was kept back. Bytes that never became a character come out as U+FFFD, as in `decode`."""
        piece = self._text()[self._shown :]
        self._ids, self._shown = [], 0
        return piece

    def _text(self) -> str:
        return self._backend.decode(self._ids, skip_special_tokens=False)


_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")
_SPACES = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}


def _decoder_steps(decoder: Any) -> list[dict[str, Any]]:
    """The steps of a decoder of the `tokenizers` library, as tokenizer.json describes them."""

    def flattened(step: dict[str, Any]) -> list[dict[str, Any]]:
        return [s for inner in step["decoders"] for s in flattened(inner)] if step["type"] == "Sequence" else [step]

    return [] if decoder is None else flattened(json.loads(decoder.__getstate__()))


def _only_appends(steps: list[dict[str, Any]]) -> bool:
    """True if a later token changes nothing in the text of earlier ones, except characters that are not complete.

    It is true for the decoders of language models. For others, all the text comes with `flush`.
    """
    joined = next((i for i, step in enumerate(steps) if step["type"] in ("Fuse", "ByteLevel")), len(steps))
    on_text = [step for step in steps[joined + 1 :] if step["type"] != "Fuse"]  # the tokens are one text there
    n_strips = sum(step["type"] == "Strip" for step in on_text)
    return n_strips <= 1 and _reads_single_tokens(steps[:joined]) and all(map(_keeps_earlier_text, on_text))


def _reads_single_tokens(steps: list[dict[str, Any]]) -> bool:
    """True if these steps, which come before the tokens are joined, make a token's text of that token alone."""
    for i, step in enumerate(steps):
        if step["type"] not in ("ByteFallback", "Metaspace", "Replace", "Strip", "WordPiece"):
            return False
        if step["type"] == "ByteFallback" and any(earlier != _SPACES for earlier in steps[:i]):
            return False  # an earlier step may make byte tokens of other tokens
    return True


def _keeps_earlier_text(step: dict[str, Any]) -> bool:
    """True if a step on the joined text changes nothing in its beginning when text is appended."""
    if step["type"] == "Strip":
        return step["start"] <= 1 and not step["stop"]
    old = step["pattern"].get("String", "") if step["type"] == "Replace" else ""
    return len(old) == 1 and old != "\ufffd"


# ----------------------------------------------------------------------------------------------------------------------
# What chat templates are given


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
