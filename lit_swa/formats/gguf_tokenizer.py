"""The tokenizer of a GGUF file, as the files of a checkpoint: tokenizer.json and the small ones that go with it.

    files = tokenizer_files(read_gguf(path))  # {"tokenizer.json": "...", "tokenizer_config.json": "...", ...}

The file holds tokens, their kinds, and merges or scores. The pipeline around them (how text is cut, which tokens are
special, how ids become text) follows from the names of the tokenizer and of the architecture, as in transformers.
"""

import json
import math
from typing import Any

from lit_swa.formats.gguf import GGUFFile, architecture_of

MAX_TOKEN_CHARS = 1024

# How text is cut before the merges apply: the published pattern of each tokenizer family, under llama.cpp's names for
# it (`tokenizer.ggml.pre`). A name that is not here means GPT-2's pattern, as in transformers. "smollm" means it too,
# although the SmolLM tokenizer itself also cuts around digits: ids differ where two or more blanks or newlines come
# before a digit. This module and its test follow transformers.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased_words(end: str) -> str:
    """Words are cut where lower case turns into upper case."""
    return rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{end}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{end}"


_TEKKEN = _cased_words("") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
_GPT4O = _cased_words(_CONTRACTIONS + "?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
_PATTERN_NAMES = {
    _LLAMA3: "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe",
    _QWEN2: "qwen2 deepseek-r1-qwen kormo f2llmv2 megrez",
    _TEKKEN: "tekken",
    _GPT4O: "gpt-4o llama4 kanana2 talkie minimax-m2",
}
SPLIT_PATTERNS = {name: pattern for pattern, names in _PATTERN_NAMES.items() for name in names.split()}
NAMED_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# Tokens that are special whatever the file says of them, by family.
USUAL_SPECIALS = {
    "gpt2": ("<|endoftext|>",),
    "llama": ("<unk>", "<s>", "</s>"),
    "gemma": ("<unk>", "<bos>", "<eos>", "<pad>", "<mask>"),
}
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def tokenizer_files(file: GGUFFile) -> dict[str, str]:
    """File name -> content: tokenizer.json, tokenizer_config.json and generation_config.json.

    The token ids are those of transformers' reading of the same file. Raises ValueError when the tokenizer is of a kind
    that is not read, or damaged.
    """
    tokens = _string_list(file, "tokenizer.ggml.tokens")
    named = {name: _token(file, tokens, key) for name, key in NAMED_TOKENS.items()}
    model = file.get("tokenizer.ggml.model", str, "")
    add_bos = file.get("tokenizer.ggml.add_bos_token", bool, model == "llama") and named["bos_token"] is not None
    add_eos = file.get("tokenizer.ggml.add_eos_token", bool, False) and named["eos_token"] is not None
    try:
        tokenizer = _build_tokenizer(file, model, tokens, [t for t in named.values() if t is not None])
        _add_template(tokenizer, named["bos_token"] if add_bos else None, named["eos_token"] if add_eos else None)
        content = tokenizer.to_str()
    except ValueError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(
            f"{file.path} has a damaged tokenizer ({str(error)[:200]}): download the file again."
        ) from None
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "clean_up_tokenization_spaces": False,
        **{k: v for k, v in named.items() if v is not None},
    }
    if chat_template := file.get("tokenizer.chat_template", str):
        config["chat_template"] = chat_template
    return {
        "tokenizer.json": content,
        "tokenizer_config.json": json.dumps(config, indent=2),
        "generation_config.json": json.dumps(_generation_config(file), indent=2),
    }


def _generation_config(file: GGUFFile) -> dict[str, Any]:
    ids = {key: file.get(f"tokenizer.ggml.{key}_token_id", int) for key in ("bos", "eos", "eot", "padding")}
    stops = sorted({ids[key] for key in ("eos", "eot")} - {None})  # chat models end a turn with eot
    config = {
        "bos_token_id": ids["bos"],
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": ids["padding"],
    }
    return {key: value for key, value in config.items() if value is not None}


def _string_list(file: GGUFFile, key: str) -> list[str]:
    strings = file.require(key, list)
    if not strings or not all(type(s) is str for s in strings):
        raise ValueError(f"{file.path} is damaged: {key} is no list of strings.")
    return strings


def _token(file: GGUFFile, tokens: list[str], key: str) -> str | None:
    """The spelling of a named token; None when the file has no id for it."""
    token_id = file.get(f"tokenizer.ggml.{key}_token_id", int)
    if token_id is None:
        return None
    if not 0 <= token_id < len(tokens):
        raise ValueError(f"{file.path} is damaged: its {key} token is number {token_id} of {len(tokens)}.")
    return tokens[token_id]


def _build_tokenizer(file: GGUFFile, model: str, tokens: list[str], named: list[str]) -> Any:
    """A tokenizers.Tokenizer with its special tokens, without the template that adds BOS and EOS."""
    from tokenizers import AddedToken

    if model not in ("gpt2", "llama"):
        raise ValueError(f"{file.path} has a tokenizer of kind {model[:80]!r}: 'gpt2' and 'llama' are read.")
    types = file.get("tokenizer.ggml.token_type", list, [])
    kinds = dict(zip(tokens, types, strict=False))
    family = "gpt2" if model == "gpt2" else architecture_of(file).sentencepiece
    if family == "gpt2":
        vocab, tokenizer = _byte_level_bpe(file, tokens, named)
    else:
        vocab, tokenizer = (_gemma_bpe if family == "gemma" else _llama_bpe)(file, tokens)
    special = [t for t, kind in kinds.items() if kind == CONTROL] + [*USUAL_SPECIALS[family], *named]
    plain = [t for t, kind in kinds.items() if kind == USER_DEFINED and t in vocab and t not in special]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special if t in vocab])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in plain])
    return tokenizer


def _byte_level_bpe(file: GGUFFile, tokens: list[str], named: list[str]) -> tuple[dict[str, int], Any]:
    """GPT-2's byte-level BPE: a token is spelled in 256 letters, one per byte."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = set(byte_level.alphabet())
    vocab = {}
    for index, token in enumerate(tokens):
        if token not in named and not alphabet.issuperset(token):  # stored as text: spell it like the others
            token = "".join(letters for letters, _ in byte_level.pre_tokenize_str(token))
        vocab[token] = index
    merges = [_pair(file, merge) for merge in _string_list(file, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern := SPLIT_PATTERNS.get(file.get("tokenizer.ggml.pre", str, "")):
        cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return vocab, tokenizer


def _pair(file: GGUFFile, merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise ValueError(f"{file.path} is damaged: the merge {merge[:80]!r} is not two tokens.")
    return left, right


def _llama_bpe(file: GGUFFile, tokens: list[str]) -> tuple[dict[str, int], Any]:
    """Llama 2's SentencePiece BPE with byte fallback; a blank goes in front of the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: index for index, token in enumerate(tokens)}
    scores = file.get("tokenizer.ggml.scores", list, [])
    merges = _merges(file, vocab, dict(zip(tokens, scores, strict=False)))
    tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return vocab, tokenizer


def _gemma_bpe(file: GGUFFile, tokens: list[str]) -> tuple[dict[str, int], Any]:
    """Gemma's: no blank in front, runs of blanks are tokens, and tokens are merged in the order of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens = ["▁" * len(token) if token and not token.strip() and " " in token else token for token in tokens]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = _merges(file, vocab, {token: -float(index) for token, index in vocab.items()})
    unk = {"unk_token": "<unk>"} if "<unk>" in vocab else {}
    tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True, **unk))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous", invert=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return vocab, tokenizer


def _merges(file: GGUFFile, vocab: dict[str, int], scores: dict[str, float]) -> list[tuple[str, str]]:
    """The file's merges. Without any: every way to cut a token into two tokens, the token with the best score first."""
    if "tokenizer.ggml.merges" in file.metadata:
        return [_pair(file, merge) for merge in _string_list(file, "tokenizer.ggml.merges")]
    if len(scores) < len(vocab) or not all(type(s) is float and not math.isnan(s) for s in scores.values()):
        raise ValueError(f"{file.path} is damaged: tokenizer.ggml.scores does not hold one number per token.")
    if max(map(len, vocab)) > MAX_TOKEN_CHARS:
        raise ValueError(
            f"{file.path} is damaged: its tokenizer has a token of more than {MAX_TOKEN_CHARS} characters."
        )
    ranked = []
    for token, score in scores.items():
        cuts = [(token[:n], token[n:]) for n in range(1, len(token))]
        cuts = [(left, right) for left, right in cuts if left in vocab and right in vocab]
        cuts.sort(key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
        ranked += [(score, len(left), len(right), (left, right)) for left, right in cuts]
    ranked.sort(key=lambda item: item[:3], reverse=True)  # a stable sort: equals stay in the order of the vocabulary
    return [pair for *_, pair in ranked]


def _add_template(tokenizer: Any, bos: str | None, eos: str | None) -> None:
    """BOS in front and EOS behind, where the model wants them."""
    from tokenizers import processors

    def around(sequence: str, type_id: int) -> list[str]:
        return [f"{part}:{type_id}" for part in (bos, sequence, eos) if part is not None]

    specials = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token is not None]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around("$A", 0), pair=around("$A", 0) + around("$B", 1), special_tokens=specials
    )
