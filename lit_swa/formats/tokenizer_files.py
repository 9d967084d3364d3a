"""The small files next to a vocabulary: added tokens, ids that end an answer, chat templates.

They come from strangers. Whatever is wrong with them ends in a `ValueError` of one sentence that names the file.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_swa.formats.chat_template import one_line
from lit_swa.formats.json_files import parse_json
from lit_swa.formats.reading import find_inside, is_listed, read_bytes

MAX_CONFIG_BYTES = 8 * 2**20  # tokenizer_config.json and the other small files; real ones are below 2 MB
MAX_DIGITS = 40  # tokenizer_config.json writes "no limit" as model_max_length 10**30
MAX_VOCAB_BYTES = 128 * 2**20  # tokenizer.json, tokenizer.model; real ones are below 40 MB
MAX_HOLES = 2**20  # ids that no token has, below the largest: lists of all ids are made

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def find_vocab_file(directory: Path) -> Path:
    if not directory.is_dir():
        raise FileNotFoundError(f"There is no directory {directory}: give the directory of a checkpoint.")
    if name := vocab_file_name(directory):
        return find_inside(directory, name)
    there = sorted(entry.name for entry in directory.iterdir())
    listed = ", ".join(there[:12]) + (" ..." if len(there) > 12 else "") if there else "nothing"
    raise FileNotFoundError(
        f"{directory} holds no tokenizer: copy tokenizer.json or tokenizer.model into it (it holds {listed})."
    )


def vocab_file_name(directory: Path) -> str | None:
    """The file that Tokenizer reads the vocabulary of, or None. A vocab.json needs its merges.txt."""
    for name in ("tokenizer.json", "tokenizer.model"):
        if is_listed(directory / name):
            return name
    return "vocab.json" if all(is_listed(directory / name) for name in ("vocab.json", "merges.txt")) else None


def require_sane_ids(where: Any, ids: Collection[int]) -> None:
    """Raises ValueError where an id lies far beyond the number of tokens."""
    largest = max(ids, default=0)
    if largest > len(ids) + MAX_HOLES:
        raise ValueError(f"{where} gives one of {len(ids):,} tokens the id {largest:,}: copy the file again.")


def read_text(path: Path) -> str:
    try:
        return read_bytes(path, MAX_CONFIG_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): copy the file again.") from None


def read_small_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, a file of a checkpoint's directory; empty where there is no such file."""
    if not is_listed(path):
        return {}
    return parse_json(read_bytes(find_inside(path.parent, path.name), MAX_CONFIG_BYTES), path, MAX_DIGITS)


def read_stop_ids(directory: Path) -> list[int]:
    """Ids that end an answer: of generation_config.json, or of config.json where it names none."""
    path = directory / "generation_config.json"
    value = read_small_json(path).get("eos_token_id")
    if value in (None, []):
        path = directory / "config.json"
        config = read_small_json(path)
        value, text = config.get("eos_token_id"), config.get("text_config")
        if value is None and isinstance(text, dict):
            value = text.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < 2**32:
            raise ValueError(f"eos_token_id in {path} is {one_line(repr(value))}: it takes an id or a list of ids.")
    return ids


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before anything else is, with the fields of `tokenizers.AddedToken`."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool | None = None  # None: the library's default, which is `not special`
    special: bool = True


@dataclass(frozen=True)
class TokenConfig:
    """What the small files say about added tokens.

    recorded: in the order of their ids. named: bos_token, eos_token, ... extra: special, without a name.
    """

    recorded: list[AddedToken]
    named: dict[str, AddedToken]
    extra: list[AddedToken]

    def to_add(self, known: set[str]) -> list[AddedToken]:
        """The tokens to add to a vocabulary that already has `known`, in the order that decides their ids."""
        names = {token.content for token in self.named.values()}
        tokens = [replace(token, special=token.special or token.content in names) for token in self.recorded]
        known = known | {token.content for token in tokens}
        for token in [*self.named.values(), *self.extra]:
            if token.content not in known:
                tokens.append(replace(token, special=True))
                known.add(token.content)
        return tokens


def read_token_config(directory: Path, config: dict[str, Any]) -> TokenConfig:
    """Added tokens as transformers finds them: added_tokens_decoder, or else the two older files."""
    where = directory / "tokenizer_config.json"
    recorded_by_id = config.get("added_tokens_decoder")
    if recorded_by_id is None:
        config = config | read_small_json(directory / "special_tokens_map.json")
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
    return TokenConfig(recorded, named, extra)


def _named_tokens(config: dict[str, Any], where: Any) -> dict[str, AddedToken]:
    """bos_token and the other known names first, then any other "..._token" whose value is a token."""
    others = [name for name in config if name.endswith("_token") and name not in NAMED_TOKENS]
    named = {}
    for name in [*NAMED_TOKENS, *others]:
        value = config.get(name)
        if value is None or (name in others and not isinstance(value, (str, dict))):
            continue  # add_bos_token is a switch, not a token
        named[name] = _added_token(value, f"{name} in {where}")
    return named


def _extra_tokens(config: dict[str, Any], named: dict[str, AddedToken], where: Any) -> list[AddedToken]:
    """extra_special_tokens, called additional_special_tokens before; as a dict they are named, so `named` gets them."""
    value = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(value, dict):
        named.update({name: _added_token(token, f"extra_special_tokens in {where}") for name, token in value.items()})
        return []
    if not isinstance(value, list):
        raise ValueError(f"extra_special_tokens in {where} is a {type(value).__name__}: it must be a list.")
    return [_added_token(token, f"extra_special_tokens in {where}") for token in value]


def _recorded_tokens(recorded_by_id: Any, where: Any) -> list[AddedToken]:
    try:
        by_id = sorted((int(token_id), token) for token_id, token in recorded_by_id.items())
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"added_tokens_decoder in {where} must be an object from token ids to tokens.") from None
    require_sane_ids(f"added_tokens_decoder in {where}", [token_id for token_id, _ in by_id])
    return [_added_token(token, f"added_tokens_decoder in {where}", special=False) for _, token in by_id]


def _legacy_added_tokens(path: Path, specials: set[str]) -> list[AddedToken]:
    ids = read_small_json(path)
    if not all(type(token_id) is int for token_id in ids.values()):
        raise ValueError(f"{path} must be an object from tokens to token ids.")
    require_sane_ids(path, ids.values())
    contents = sorted((content for content in ids if content), key=ids.__getitem__)
    return [AddedToken(c, special=c in specials, normalized=c not in specials) for c in contents]


def _added_token(value: Any, where: str, special: bool = True) -> AddedToken:
    if isinstance(value, str) and value:
        return AddedToken(value)
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, str) or not content:
        raise ValueError(f"{where} is {one_line(repr(value))}: it takes a token's text, or an object with it.")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": None, "special": special}
    for name, default in flags.items():
        flags[name] = value.get(name, default)
        if not isinstance(flags[name], (bool, type(default))):
            raise ValueError(f"{name} of {where} is {one_line(repr(flags[name]))}: it takes true or false.")
    return AddedToken(content, **flags)


# ----------------------------------------------------------------------------------------------------------------------
# Chat templates


TEMPLATE_FOLDERS = ("chat_templates", "additional_chat_templates")


def template_files(directory: Path) -> list[tuple[str, str]]:
    """The folder and the name of every chat template that lies in a folder of its own."""
    return [(folder, p.name) for folder in TEMPLATE_FOLDERS for p in sorted((directory / folder).glob("*.jinja"))]


def read_chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Name -> template. Files of their own come before tokenizer_config.json, chat_template.json comes last."""
    templates = {}
    for folder, name in template_files(directory):
        templates[name.removesuffix(".jinja")] = read_text(find_inside(directory, name, folder))
    if is_listed(directory / "chat_template.jinja"):
        templates["default"] = read_text(find_inside(directory, "chat_template.jinja"))
    if templates:
        return templates
    if config.get("chat_template") is not None:
        return _named_templates(config["chat_template"], directory / "tokenizer_config.json")
    path = directory / "chat_template.json"
    value = read_small_json(path).get("chat_template")
    return {} if value is None else _named_templates(value, path)


def _named_templates(value: Any, path: Path) -> dict[str, str]:
    """A template, a list of {"name", "template"}, or an object from names to templates."""
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item.get("name"), str)}
    if not isinstance(value, dict) or not value or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"chat_template in {path} must be a template, or a list of objects with name and template.")
    return value
