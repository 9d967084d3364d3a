"""The tokenizer of a checkpoint as the metadata of a GGUF file: the inverse of gguf_tokenizer.py.

    keys = vocabulary_of(Path("checkpoints/..."), n_tokens=49152)  # {"tokenizer.ggml.model": "gpt2", ...}

What is made is read back, and must give the same ids for some texts: llama.cpp has two kinds of tokenizers and a list
of names for the ways to cut a text, and what it does not have is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_swa.formats.gguf import GGUFFile
from lit_swa.formats.gguf_pre_tokenizer import CUTS
from lit_swa.formats.gguf_tokenizer import NAMED_TOKENS, pre_tokenizer_of, tokenizer_files
from lit_swa.formats.tokenizer import Tokenizer
from lit_swa.formats.tokenizer_backends import SentencePieceBackend

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
PROBES = (
    "def f(x):\n    return x ** 2  # naïve café\n\nThe year 2024 had 366 days; pi is 3.14159.\n\n\n",
    '1. one\n  2. two\t12345678 "quoted" text—with dashes… ÀÉÎõü ß 漢字かな 한국어 العربية 🙂👩\u200d👩\u200d👧\n',
    "HelloWorld camelCase don't we'll I'M THEY'RE        eight blanks\r\n\r\nCRLF a/b/c//d !!! ... $5.00 <=> ^~|`",
    " a blank in front, and the word <s> and <|im_end|> within",
    "accents of their own: e\u0301te\u0301 हिन्दी, and other numbers: ½ Ⅷ ² x²",
)
CHECKED = PROBES[:3]  # not specials, which llama.cpp finds by their spelling only, and accents, which some compose


def vocabulary_of(directory: Path, n_tokens: int) -> dict[str, Any]:
    """The keys tokenizer.*. n_tokens: rows of the embedding; those without a token get one that is not used.

    Raises ValueError, or FileNotFoundError, where llama.cpp has no such tokenizer.
    """
    tokenizer = Tokenizer(directory)
    if tokenizer.vocab_size > n_tokens:
        raise ValueError(
            f"{directory} has a tokenizer of {tokenizer.vocab_size} tokens and an embedding of {n_tokens}: they do not "
            "belong together."
        )
    template = tokenizer._chat_templates.get("default")
    for candidate in _candidates(tokenizer, n_tokens):
        keys = {f"tokenizer.ggml.{key}": value for key, value in (candidate | _special_keys(tokenizer)).items()}
        keys |= {"tokenizer.chat_template": template} if template else {}
        if _reads_back(tokenizer, keys):
            return keys
    raise ValueError(
        f"{directory} has a tokenizer that llama.cpp has no like of, so no GGUF file can hold it: export the model "
        "with scripts/export_hf.py."
    )


def _candidates(tokenizer: Tokenizer, n_tokens: int) -> Iterator[dict[str, Any]]:
    """Ways to say the tokenizer, the likeliest first."""
    tokens, kinds = _tokens(tokenizer, n_tokens)
    backend = tokenizer._backend
    if isinstance(backend, SentencePieceBackend):
        size = backend.model.get_piece_size()
        scores = [backend.model.get_score(i) if i < size else -1000.0 for i in range(n_tokens)]
        yield _sentencepiece(tokens, kinds, scores, backend.has_prefix)
        return
    spec = json.loads(backend.rust.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        return
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    if not model.get("byte_fallback"):
        whole = bool(model.get("ignore_merges"))
        for name in _names_of_cuts(backend.rust.pre_tokenizer, whole):
            yield {
                "model": "gpt2", "pre": name, "tokens": tokens, "token_type": kinds,
                "merges": [" ".join(pair) for pair in merges],
            }  # fmt: skip
        return
    scores = _scores(tokens, merges)
    for prefix in (True, False):
        yield _sentencepiece(tokens, kinds, scores, prefix)


def _sentencepiece(tokens: list[str], kinds: list[int], scores: list[float], prefix: bool) -> dict[str, Any]:
    names = {"model": "llama", "pre": "default", "tokens": tokens, "token_type": kinds, "scores": scores}
    return names | {"add_space_prefix": prefix}


def _tokens(tokenizer: Tokenizer, n_tokens: int) -> tuple[list[str], list[int]]:
    """Every token and its kind, by id."""
    backend, unknown = tokenizer._backend, tokenizer.special_tokens.get("unk_token")
    if isinstance(backend, SentencePieceBackend):
        added = {content: token.special for content, token in backend.added.items()}
        unused = {i for i in range(backend.model.get_piece_size()) if backend.model.is_unused(i)}
    else:
        added = {token.content: token.special for token in backend.rust.get_added_tokens_decoder().values()}
        unused = set()
    in_bytes = tokenizer.token_to_id("<0x00>") is not None
    tokens, kinds = [], []
    for i in range(n_tokens):
        token = tokenizer.id_to_token(i)
        if token is None or token == "":
            tokens.append(f"[PAD{i}]")
            kinds.append(UNUSED)
            continue
        tokens.append(token)
        if token == unknown and in_bytes:
            kinds.append(UNKNOWN)
        elif token in added:
            kinds.append(CONTROL if added[token] else USER_DEFINED)
        else:
            is_byte = in_bytes and re.fullmatch("<0x[0-9A-F]{2}>", token)
            kinds.append(BYTE if is_byte else UNUSED if i in unused else NORMAL)
    return tokens, kinds


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """SentencePiece merges into the token with the best score first; a list of merges says the same by its order."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _names_of_cuts(pre_tokenizer: Any, words_whole: bool) -> Iterator[str]:
    """Names of the rows of CUTS that cut the probes as this pre-tokenizer does."""
    if pre_tokenizer is None:
        return
    wanted = [pre_tokenizer.pre_tokenize_str(text) for text in PROBES]
    for cut in CUTS:
        same = cut.words_whole == words_whole and wanted == [
            pre_tokenizer_of(cut).pre_tokenize_str(text) for text in PROBES
        ]
        if same:
            yield cut.names.split()[0]


def _special_keys(tokenizer: Tokenizer) -> dict[str, Any]:
    """Which tokens begin, end and pad."""
    keys: dict[str, Any] = {}
    for name, key in NAMED_TOKENS.items():
        token_id = tokenizer._named_id(name)
        if token_id is not None:
            keys[f"{key}_token_id"] = token_id
    ends = list(tokenizer.eos_ids)
    if ends:
        keys.setdefault("eos_token_id", ends[0])
    others = [token_id for token_id in ends if token_id != keys.get("eos_token_id")]
    keys |= dict(zip(("eot_token_id", "eom_token_id"), others, strict=False))
    plain, whole = tokenizer.encode("a", bos=False), tokenizer.encode("a")
    keys["add_bos_token"] = len(whole) > len(plain) and whole[0] == tokenizer.bos_id
    keys["add_eos_token"] = len(whole) > len(plain) and whole[-1] == tokenizer.eos_id
    return keys


def _reads_back(tokenizer: Tokenizer, keys: dict[str, Any]) -> bool:
    """Whether a file with these keys gives the same ids for the probes."""
    from tokenizers import Tokenizer as Fast

    try:
        back = Fast.from_str(tokenizer_files(GGUFFile(Path("the export"), keys))["tokenizer.json"])
    except ValueError:
        return False
    return all(back.encode(text).ids == tokenizer.encode(text) for text in CHECKED)
