"""Tiny GGUF files with random weights, written by the gguf library itself."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

TEXT = (
    "def f(x):\n    return x ** 2  # naïve café\n\nThe year 2024 had 366 days; pi is 3.14159.\n"
    "\n\n1. one\n  2. two\t12345\n"
    '"Quoted" text—with dashes… ÀÉÎõü ß 漢字かな 한국어 العربية עברית 🙂👩\u200d👩\u200d👧\u200d👦🏳️\u200d🌈        '
    "eight blanks, don't we'll I'M\r\n\r\nCRLF\n"
)
LETTERS = sorted(ByteLevel.alphabet())  # the 256 letters that spell bytes
USER_DEFINED = 4
SHAPE = dict(n_layer=2, n_head=4, n_kv=2, n_embd=64, head_dim=16, n_ff=96)


def byte_level_vocabulary() -> tuple[list[str], list[int], list[str]]:
    """Tokens, token types and merges of a byte-level BPE whose merges cross the borders between words."""
    merges = json.loads((Path(__file__).parent / "llama_cpp_ids.json").read_text(encoding="utf-8"))["merges"]
    pieces = dict.fromkeys("".join(merge.split()) for merge in merges)
    whole = "Ġblank"  # a token that no merges make
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LETTERS, *pieces, whole, "<think>", "        "]
    types = [3, 3, 3, *[1] * (len(tokens) - 5), 4, 4]
    return tokens, types, merges


def sentencepiece_vocabulary(gemma: bool) -> tuple[list[str], list[int], list[float]]:
    """Tokens, token types and scores of a SentencePiece BPE with byte fallback; the scores imply its merges."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"] if gemma else ["<unk>", "<s>", "</s>"]
    kinds = {"<unk>": 2}
    blank = [" " * n for n in range(2, 6)] if gemma else ["▁▁", "▁▁▁▁"]
    pieces = ["th", "he", "er", "the", "▁t", "▁a", "in", "▁the", "re", "ar", "▁re", "▁1", "12", "20", *blank]
    singles = sorted({c for c in TEXT if c.isascii() and c.isprintable() and c != " "} | {"▁", "é", "漢"})
    tokens = [*specials, *(f"<0x{b:02X}>" for b in range(256)), *pieces, *singles, "<|user|>"]
    types = [*(kinds.get(s, 3) for s in specials), *[6] * 256, *[1] * (len(pieces) + len(singles)), 4]
    scores = [0.0] * (len(specials) + 256) + [-float(n) for n in range(len(pieces))] + [-1e9] * (len(singles) + 1)
    types = [USER_DEFINED if not token.strip() else kind for token, kind in zip(tokens, types, strict=True)]
    return tokens, types, scores


def add_tokenizer(writer: Any, kind: str, pre: str | None) -> int:
    """Write the tokenizer's metadata and return the size of the vocabulary."""
    if kind == "gpt2":
        tokens, types, merges = byte_level_vocabulary()
        writer.add_token_merges(merges)
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        ids = {"bos": 1, "eos": 2, "unk": 0, "pad": 2}
    else:
        tokens, types, scores = sentencepiece_vocabulary(kind == "gemma")
        writer.add_token_scores(scores)
        ids = {name: tokens.index(f"<{name}>") for name in ("bos", "eos", "unk", "pad") if f"<{name}>" in tokens}
        ids = ids | ({"bos": 1, "eos": 2} if kind == "llama" else {})
    writer.add_tokenizer_model("gpt2" if kind == "gpt2" else "llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(ids["bos"])
    writer.add_eos_token_id(ids["eos"])
    writer.add_unk_token_id(ids["unk"])
    if "pad" in ids:
        writer.add_pad_token_id(ids["pad"])
    return len(tokens)


def add_sizes(writer: Any, architecture: str, rope_theta: float) -> None:
    """Write the metadata of SHAPE."""
    writer.add_name("tiny")
    writer.add_block_count(SHAPE["n_layer"])
    writer.add_context_length(64)
    writer.add_embedding_length(SHAPE["n_embd"])
    writer.add_feed_forward_length(SHAPE["n_ff"])
    writer.add_head_count(SHAPE["n_head"])
    writer.add_head_count_kv(SHAPE["n_kv"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(rope_theta)
    if architecture == "llama":
        writer.add_rope_dimension_count(SHAPE["head_dim"])
    else:
        writer.add_key_length(SHAPE["head_dim"])
        writer.add_value_length(SHAPE["head_dim"])
    if architecture.startswith("gemma"):
        writer.add_sliding_window(8)


def shapes_of(architecture: str, n_vocab: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, number format) of each weight."""
    s = SHAPE
    n_embd, q, kv = s["n_embd"], s["n_head"] * s["head_dim"], s["n_kv"] * s["head_dim"]
    yield "token_embd.weight", (n_vocab, n_embd), "Q8_0"
    for i in range(s["n_layer"]):
        yield f"blk.{i}.attn_norm.weight", (n_embd,), "F32"
        yield f"blk.{i}.attn_q.weight", (q, n_embd), "Q4_1"
        yield f"blk.{i}.attn_k.weight", (kv, n_embd), "F16"
        yield f"blk.{i}.attn_v.weight", (kv, n_embd), "Q8_0"
        yield f"blk.{i}.attn_output.weight", (n_embd, q), "BF16"
        if architecture == "qwen2":
            for part, rows in (("q", q), ("k", kv), ("v", kv)):
                yield f"blk.{i}.attn_{part}.bias", (rows,), "F32"
        if architecture in ("qwen3", "gemma3"):
            yield f"blk.{i}.attn_q_norm.weight", (s["head_dim"],), "F32"
            yield f"blk.{i}.attn_k_norm.weight", (s["head_dim"],), "F32"
        if architecture.startswith("gemma"):
            yield f"blk.{i}.post_attention_norm.weight", (n_embd,), "F32"
            yield f"blk.{i}.post_ffw_norm.weight", (n_embd,), "F32"
        yield f"blk.{i}.ffn_norm.weight", (n_embd,), "F32"
        yield f"blk.{i}.ffn_gate.weight", (s["n_ff"], n_embd), "Q4_0"
        yield f"blk.{i}.ffn_up.weight", (s["n_ff"], n_embd), "Q5_1"
        yield f"blk.{i}.ffn_down.weight", (n_embd, s["n_ff"]), "Q4_1"
    yield "output_norm.weight", (n_embd,), "F32"
    if architecture in ("llama", "qwen2"):
        yield "output.weight", (n_vocab, n_embd), "Q8_0"


def write_tiny_gguf(
    path: Path,
    architecture: str = "llama",
    tokenizer: str = "gpt2",
    pre: str | None = "smollm",
    seed: int = 0,
    add_bos: bool | None = None,
    eot: int | None = None,
    rope_freqs: list[float] | None = None,
    rope_theta: float = 10000.0,
    prefix: bool | None = None,
    exact: bool = False,
    split_max_tensors: int = 0,
    keys: dict[str, Any] | None = None,
    **metadata: Any,
) -> None:
    """A random model in several number formats, with F32 norms; exact: all of it in F32.

    keys: further keys of the architecture by their names. metadata: the same by the names of the writer's methods.
    """
    import gguf
    from gguf import GGMLQuantizationType as Q

    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    add_sizes(writer, architecture, rope_theta)
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    n_vocab = add_tokenizer(writer, tokenizer, pre)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    if eot is not None:
        writer.add_eot_token_id(eot)
    if prefix is not None:
        writer.add_add_space_prefix(prefix)
    kinds = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
    for key, value in (keys or {}).items():
        kinds[type(value)](f"{architecture}.{key}", value)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", np.array(rope_freqs, dtype=np.float32))
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    for name, shape, kind in shapes_of(architecture, n_vocab):
        data = (rng.standard_normal(shape) * 0.1).astype(np.float32) + np.float32("norm" in name)
        if exact or kind == "F32":
            writer.add_tensor(name, data)
        elif kind == "F16":
            writer.add_tensor(name, data.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, Q[kind]), raw_dtype=Q[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
