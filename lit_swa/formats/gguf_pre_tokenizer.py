"""How the tokenizer of a GGUF file cuts a text before its merges apply: `tokenizer.ggml.pre`.

    cut_of(file)  # Cut(names=..., patterns=(...), adds_bos=True, words_whole=True)

The names are llama.cpp's. Each stands for the patterns of one family of tokenizers. They apply one after the other:
what a pattern finds, and what lies between two finds, is cut further by the next. The patterns are those of the models'
own tokenizers. llama.cpp comes near two of them only, tekken's and gpt-4o's, where accents are characters of their own
and in the upper and lower case of letters beyond ASCII: models were trained on their own.

Left out are names for which llama.cpp's own way is not the models' (afmoe, cohere2moe, kimi-k2, tiny_aya, youtu), and
those whose tokens are not spelled in GPT-2's letters (gemma4, granite-embed-multi-311m, sarvam-moe, whitespace).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lit_swa.formats.gguf import GGUFFile  # imports torch, and a tokenizer does without


class Cut(NamedTuple):
    names: str  # of tokenizer.ggml.pre, with blanks between them
    patterns: tuple[str, ...]
    adds_bos: bool = False  # where the file does not say
    words_whole: bool = False  # a piece that is a token needs no merges (`ignore_merges`)


def _letters(ranges: str) -> str:
    """A class of characters: "41-5A B5" is [A-Zµ]."""
    return "[" + "".join("-".join(chr(int(end, 16)) for end in part.split("-")) for part in ranges.split()) + "]"


def _cased_words(end: str = "") -> str:
    """Words that are cut where lower case turns into upper case."""
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    before = r"[^\r\n\p{L}\p{N}]?"
    return rf"{before}{upper}*{lower}+{end}|{before}{upper}+{lower}*{end}|"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGITS = r"\p{N}"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|"
_PATHS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SHORT}|{_WORD}\p{{N}}{{1,3}}|{_SIGNS}{_BLANKS}"
QWEN2 = rf"{_SHORT}|{_WORD}\p{{N}}|{_SIGNS}{_BLANKS}"
_QWEN35 = rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}"
_MINICPM = rf"{_SHORT}|{_WORD}\p{{N}}+|{_SIGNS}{_BLANKS}"
_SEED_CODER = rf"{_SHORT}|{_WORD}\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BLANKS}"
_EXAONE = (
    rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|{_BLANKS}"
)
_POWERS = "|".join(rf"\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))
_JAIS2 = rf"{_SHORT}|{_WORD}\p{{N}}{{1,3}}|{_SIGNS}\s*[\r\n]+|{_POWERS}|\s"
_TEKKEN = rf"{_cased_words()}\p{{N}}|{_PATHS}{_BLANKS}"
_GPT4O = rf"{_cased_words(_SHORT + '?')}\p{{N}}{{1,3}}|{_PATHS}{_BLANKS}"
_DEEPSEEK_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
_DEEPSEEK = rf"{_DEEPSEEK_WORD} ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}"
_SPARK = rf"{_DEEPSEEK_WORD} ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_HAN_AND_KANA = _letters("4E00-9FA5 3040-309F 30A0-30FF") + "+"
_HAN_AND_MORE = _letters("4E00-9FA5 800-4E00 AC00-D7FF") + "+"
_CASED = _letters(  # the letters with two cases of an older Unicode
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A "
    "1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 "
    "1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 "
    "212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D "
    "A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F "
    "104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
_NOT_LETTERS = _letters("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002")

CUTS = (
    Cut("gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en jina-v2-code"
        " roberta-bpe mpt olmo jais trillion granite-docling exaone4", (_GPT2,)),
    Cut("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", (_DIGITS, _GPT2)),
    Cut("default", (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    Cut("falcon", (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    Cut("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", (_LLAMA3,), True, True),
    Cut("dbrx smaug-bpe chatglm-bpe", (_LLAMA3,)),
    Cut("glm4 glm5", (_LLAMA3,), words_whole=True),
    Cut("jais-2", (_JAIS2,)),
    Cut("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2 bailingmoe bailingmoe2"
        " llada-moe", (QWEN2,)),
    Cut("qwen35", (_QWEN35,)),
    Cut("ufakzeka", (rf"{_WORD}\p{{N}}|{_SIGNS}{_BLANKS}",)),
    Cut("laguna", (r"[^\n]+|[\n]+", QWEN2)),
    Cut("minicpm5", (r"\p{N}{1,3}", _MINICPM), words_whole=True),
    Cut("seed-coder", (_SEED_CODER,)),
    Cut("exaone-moe", (_EXAONE,)),
    Cut("tekken", (_TEKKEN,), True, True),
    Cut("gpt-4o llama4 kanana2 talkie minimax-m2", (_GPT4O,)),
    Cut("granite-embed-multi-97m", (_GPT4O,), words_whole=True),
    Cut("deepseek-llm", (r"[\r\n]", rf"\s?{_CASED}+", rf"\s?{_NOT_LETTERS}+", r"\s+$", _HAN_AND_MORE, r"\p{N}+")),
    Cut("deepseek-coder", (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_AND_MORE, _DIGITS)),
    Cut("deepseek-v3 hunyuan-dense joyai-llm hy_v4", (r"\p{N}{1,3}", _HAN_AND_KANA, _DEEPSEEK)),
    Cut("spark2_5", (r"\p{N}{1,3}", _HAN_AND_KANA, _SPARK, _DIGITS)),
    Cut("bloom gpt3-finnish poro-chat", (_BLOOM,)),
    Cut("viking", (_BLOOM, _DIGITS)),
    Cut("superbpe", (r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    Cut("chameleon", ("<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", _DIGITS,
                      r"[\p{P}!-/:-@\[-`{-~]", _GPT2), adds_bos=True),
)  # fmt: skip
_BY_NAME = {name: cut for cut in CUTS for name in cut.names.split()}


def cut_of(file: GGUFFile) -> Cut:
    """The cut that the file names. Without a name it is llama.cpp's default, which a line on stderr says.

    Raises ValueError for a name that stands for no cut known here.
    """
    name = file.get("tokenizer.ggml.pre", str, "")
    if not name:
        print(
            f"warning: {file.path} lacks tokenizer.ggml.pre: texts are cut in llama.cpp's default way, and answers are "
            "worse if that is not the model's; a newer file, or the model's own tokenizer.json beside it, is better.",
            file=sys.stderr,
        )
        name = "default"
    if name not in _BY_NAME:
        raise ValueError(
            f"{file.path} cuts its texts as {name[:80]!r} (tokenizer.ggml.pre), which is not read: copy the "
            "tokenizer.json of the model's own checkpoint beside the file, and it is read instead."
        )
    return _BY_NAME[name]
