"""The tokenizer of a GGUF file, as the files of a checkpoint: tokenizer.json and the small ones that go with it.

    files = tokenizer_files(read_gguf(path))  # {"tokenizer.json": "...", "tokenizer_config.json": "...", ...}

The file holds tokens, their kinds, and merges or scores. The pipeline around them (how text is cut, which tokens are
special, how ids become text, what ends an answer) is llama.cpp's, for which such files are made.
"""

import json
import math
from typing import Any

from lit_swa.formats.gguf import GGUFFile
from lit_swa.formats.gguf_pre_tokenizer import Cut, cut_of

MAX_TOKEN_CHARS = 1024
NAMED_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # where a file with a SentencePiece vocabulary does not say
USUAL_SPECIALS = ("<unk>", "<s>", "</s>", "<bos>", "<eos>", "<pad>", "<|endoftext|>")  # where it has no token types
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type

# Tokens that end an answer by their spelling. Many files name one EOS only, which is not what ends a turn.
END_SPELLINGS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> "
    "<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> "
    "[e~[".split()
)
END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")  # tokenizer.ggml.eos_token_id and so on
FILE_END_SPELLINGS = {  # for code, where the file has no such key
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]".split(),
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>".split(),
    "fim_sep": ["<|file_sep|>"],
}


def tokenizer_files(file: GGUFFile, vocabulary: bool = True) -> dict[str, str]:
    """File name -> content: tokenizer.json, tokenizer_config.json and generation_config.json.

    vocabulary: False leaves out tokenizer.json, of which the directory has a better one.

    The token ids are llama.cpp's for the same file. Raises ValueError when the tokenizer is of a kind that is not read,
    or damaged.
    """
    tokens = _string_list(file, "tokenizer.ggml.tokens")
    ids = _special_ids(file, tokens)
    ends = _end_ids(tokens, ids)
    named = {name: tokens[ids[key]] for name, key in NAMED_TOKENS.items() if key in ids}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    if chat_template := file.get("tokenizer.chat_template", str):
        config["chat_template"] = chat_template
    files = {}
    if vocabulary:
        tokenizer, adds_bos = _tokenizer(file, tokens, [*named.values(), *(tokens[i] for i in ends)])
        for name, usual in (("bos", adds_bos), ("eos", False)):
            adds = file.get(f"tokenizer.ggml.add_{name}_token", bool, usual)
            config[f"add_{name}_token"] = adds and f"{name}_token" in named
        _add_template(tokenizer, *(named[f"{n}_token"] if config[f"add_{n}_token"] else None for n in ("bos", "eos")))
        files["tokenizer.json"] = tokenizer.to_str()
    generation = {"bos_token_id": ids.get("bos"), "eos_token_id": ends or None, "pad_token_id": ids.get("padding")}
    return files | {
        "tokenizer_config.json": json.dumps(config, indent=2),
        "generation_config.json": json.dumps({k: v for k, v in generation.items() if v is not None}, indent=2),
    }


def _special_ids(file: GGUFFile, tokens: list[str]) -> dict[str, int]:
    """The ids of tokenizer.ggml.*_token_id, by what stands for the star. A file does not have all of them."""
    usual = SENTENCEPIECE_IDS if file.metadata.get("tokenizer.ggml.model") == "llama" else {}
    ids = {key: token_id for key, token_id in usual.items() if token_id < len(tokens)}
    for key in dict.fromkeys((*NAMED_TOKENS.values(), *END_KEYS)):
        token_id = file.get(f"tokenizer.ggml.{key}_token_id", int)
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise ValueError(f"{file.path} is damaged: its {key} token is number {token_id} of {len(tokens)}.")
        ids |= {} if token_id is None else {key: token_id}
    return ids


def _end_ids(tokens: list[str], ids: dict[str, int]) -> list[int]:
    """Ids that end an answer: those that the file names so, and those whose spelling says so."""
    spellings = END_SPELLINGS.union(*(FILE_END_SPELLINGS[key] for key in FILE_END_SPELLINGS.keys() - ids.keys()))
    ends = {i for i, token in enumerate(tokens) if token in spellings} | {ids[key] for key in END_KEYS if key in ids}
    there, not_ends = {tokens[i] for i in ends}, set()
    if there & {"<|return|>", "<|flush|>"} and there & {"<|call|>", "<|calls|>"}:
        not_ends.add("<|end|>")  # ends a part of an answer there
    if there & {"<|tool_response>", "<|plamo:eos|>"}:
        not_ends.add("</s>")  # plain text there
    return sorted(i for i in ends if tokens[i] not in not_ends)


def _string_list(file: GGUFFile, key: str) -> list[str]:
    strings = file.require(key, list)
    if not strings or not all(type(s) is str for s in strings):
        raise ValueError(f"{file.path} is damaged: {key} is no list of strings.")
    return strings


def _tokenizer(file: GGUFFile, tokens: list[str], special: list[str]) -> tuple[Any, bool]:
    """A tokenizers.Tokenizer, without the template that adds BOS and EOS; and whether such tokenizers add BOS."""
    model = file.get("tokenizer.ggml.model", str, "")
    if model not in ("gpt2", "llama"):
        raise ValueError(f"{file.path} has a tokenizer of kind {model[:80]!r}: 'gpt2' and 'llama' are read.")
    try:
        tokenizer, adds_bos = (_byte_level_bpe if model == "gpt2" else _sentencepiece_bpe)(file, tokens)
        _add_tokens(file, tokenizer, tokens, special)
    except ValueError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise ValueError(
            f"{file.path} has a damaged tokenizer ({str(error)[:200]}): download the file again."
        ) from None
    return tokenizer, adds_bos


def _add_tokens(file: GGUFFile, tokenizer: Any, tokens: list[str], special: list[str]) -> None:
    """Tokens that are found in a text before anything else: special ones, which decode can skip, and others."""
    from tokenizers import AddedToken

    kinds = dict(zip(tokens, file.get("tokenizer.ggml.token_type", list, []), strict=False))
    usual = USUAL_SPECIALS if not kinds else [t for t, kind in kinds.items() if kind in (UNKNOWN, CONTROL)]
    known = set(tokens)
    special = dict.fromkeys(t for t in (*usual, *special) if t and t in known)
    plain = [t for t, kind in kinds.items() if kind == USER_DEFINED and t and t not in special]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in plain])


def _byte_level_bpe(file: GGUFFile, tokens: list[str]) -> tuple[Any, bool]:
    """GPT-2's byte-level BPE: a token is spelled in 256 letters, one per byte. And whether BOS goes in front."""
    from tokenizers import Tokenizer, decoders, models

    cut = cut_of(file)
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [_pair(file, merge) for merge in _string_list(file, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="", ignore_merges=cut.words_whole)
    )
    tokenizer.pre_tokenizer = pre_tokenizer_of(cut)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, cut.adds_bos


def pre_tokenizer_of(cut: Cut) -> Any:
    """The steps that cut a text, and spell it in letters for bytes."""
    from tokenizers import Regex, pre_tokenizers

    steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in cut.patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _pair(file: GGUFFile, merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise ValueError(f"{file.path} is damaged: the merge {merge[:80]!r} is not two tokens.")
    return left, right


def _sentencepiece_bpe(file: GGUFFile, tokens: list[str]) -> tuple[Any, bool]:
    """SentencePiece's BPE with byte fallback, which adds BOS. A blank goes in front of every text between special
    tokens, or of none."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, _merges(file, tokens, vocab), fuse_unk=True, byte_fallback=True))
    blanks = [normalizers.Replace(" ", "▁")]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", bool, True):
        blanks.insert(0, normalizers.Prepend("▁"))
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.normalizer = normalizers.Sequence(blanks)
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer, True


def _merges(file: GGUFFile, tokens: list[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to cut a token into two tokens, the token with the best score first. The file's merges, if it has no
    scores."""
    values = file.get("tokenizer.ggml.scores", list, [])
    if not values and "tokenizer.ggml.merges" in file.metadata:
        return [_pair(file, merge) for merge in _string_list(file, "tokenizer.ggml.merges")]
    scores = dict(zip(tokens, values, strict=False))
    if len(scores) < len(vocab) or not all(type(s) in (int, float) and not math.isnan(s) for s in scores.values()):
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
