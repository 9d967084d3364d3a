"""What llama.cpp makes of tiny GGUF files: token ids, and the log-probabilities of the next token.

`python tests/llama_cpp_ids.py` records it in llama_cpp_ids.json, for the tests to compare with. That takes llama.cpp,
which nothing else here needs: pip install --no-deps --target DIRECTORY xllamacpp, and PYTHONPATH=DIRECTORY.
"""

import json
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

from tiny_gguf import TEXT, write_tiny_gguf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

RECORD = Path(__file__).with_suffix(".json")
TEXTS = [
    TEXT,
    "In 2024 there were 1234567 foxes,\n\n  x = 42\n\n1. one\n\n2.  3\n   4\t5\r\n6 7",
    "HelloWorld camelCase XMLHttpRequest don't we'll I'M THEY'RE o'clock ''s",
    'a/b/c//d\n!!! ... $5.00 +3 <=> ^~|` (see p. 12), [13]; "quote" x_1 /**/\n\n',
    "漢字かな交じり123文 中文，字符。한국어 𝔸𝔹 ½ ² ßé É 😀🙂 ①",
    "\u00a0nbsp  \n \n\n   trailing  ",
    " blank       'tis",
]
MARKED = ["<|user|>Hi there  <|user|>  the <s>the</s>", "  the", "the\n  the", "a<unk>b <0x41> ▁▁ <|im_end|>x"]
IDS = [(7 * n) % 200 + 5 for n in range(60)]  # a text whose next token is predicted


def tokenizer_cases(names: list[str]) -> dict[str, dict[str, Any]]:
    """Arguments of write_tiny_gguf for each recorded tokenizer. names: one of each row of CUTS."""
    cases: dict[str, dict[str, Any]] = {f"pre {name}": {"pre": name} for name in names}
    cases["no pre"] = {"pre": None}
    for add in (True, False):
        cases[f"llama-bpe add_bos {add}"] = {"pre": "llama-bpe", "add_bos": add}
    for prefix in (None, True, False):
        cases[f"sentencepiece prefix {prefix}"] = {"tokenizer": "llama", "prefix": prefix}
    cases["gemma"] = {"tokenizer": "gemma", "prefix": False, "add_bos": True}
    return cases


SCALINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "scale_linear": {"keys": {"rope.scale_linear": 4.0}},
    "factor without a type": {"keys": {"rope.scaling.factor": 2.0, "rope.scale_linear": 4.0}},
    "a factor of type none": {"keys": {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}},
    "yarn": {"keys": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}},
    "yarn with attn_factor": {
        "keys": {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.attn_factor": 1.3,
            "rope.scaling.original_context_length": 16,
        }
    },
}


def trained_merges() -> list[str]:
    """Merges across every border between words, so that ids show where a text is cut."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=560, initial_alphabet=alphabet, max_token_length=6, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return list(dict.fromkeys([*merges, "ĠĠĠĠ ĠĠ", "i s", "' t", "'t is"]))


class LlamaCpp:
    """One model in llama.cpp's server, in float32."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 256, 1, False
        params.verbosity = -1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def ask(self, what: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.server.listening_address}/{what}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return json.loads(urllib.request.urlopen(request).read())

    def tokenize(self, text: str) -> list[int]:
        return self.ask("tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def log_probabilities(self, ids: list[int]) -> tuple[int, list[list[float]]]:
        """How many of the ids, and the most likely tokens behind them. (It is silent where the token is no whole
        character.)"""
        for n in range(len(ids), 0, -1):
            answer = self.ask("completion", prompt=ids[:n], n_predict=1, n_probs=8, temperature=0, ignore_eos=True)
            if "completion_probabilities" in answer:
                top = answer["completion_probabilities"][0]["top_logprobs"]
                return n, [[token["id"], round(token["logprob"], 5)] for token in top]
        raise ValueError("The model predicts no whole character.")


def record(directory: Path, names: list[str]) -> dict[str, Any]:
    content: dict[str, Any] = {"merges": trained_merges()}
    RECORD.write_text(json.dumps(content))
    content["ids"] = {}
    for name, case in tokenizer_cases(names).items():
        write_tiny_gguf(directory / "tiny.gguf", **case)
        model = LlamaCpp(directory / "tiny.gguf")
        content["ids"][name] = [model.tokenize(text) for text in TEXTS + MARKED]
    content["log_probabilities"] = {}
    for name, case in SCALINGS.items():
        write_tiny_gguf(directory / "tiny.gguf", exact=True, **case)
        content["log_probabilities"][name] = LlamaCpp(directory / "tiny.gguf").log_probabilities(IDS)
    return content


def as_text(content: dict[str, Any]) -> str:
    """JSON with one line per case."""
    lines = [f'"merges": {json.dumps(content["merges"], ensure_ascii=False)}']
    for part in ("ids", "log_probabilities"):
        cases = [
            f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in content[part].items()
        ]
        lines.append(f'"{part}": {{\n' + ",\n".join(cases) + "\n}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from lit_swa.formats.gguf_pre_tokenizer import CUTS

    with tempfile.TemporaryDirectory() as temporary:
        RECORD.write_text(as_text(record(Path(temporary), [cut.names.split()[0] for cut in CUTS])), encoding="utf-8")
