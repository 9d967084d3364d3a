"""A tiny model of each architecture that llama.cpp has, and what llama.cpp computes from its export.

`python tests/llama_cpp_families.py` records it in llama_cpp_families.json, for the tests to compare with. That takes
llama-cpp-python, which nothing else here needs: pip install --no-deps --target DIRECTORY llama-cpp-python diskcache,
and PYTHONPATH=DIRECTORY.
"""

import functools
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tiny_gguf import write_tiny_gguf

from lit_swa import GPT, Config, families
from lit_swa.checkpoint import save_checkpoint
from lit_swa.formats import gguf
from lit_swa.formats.gguf_export import export_gguf
from lit_swa.formats.gguf_tokenizer import tokenizer_files

RECORD = Path(__file__).with_suffix(".json")
IDS = [(7 * n) % 200 + 5 for n in range(40)]  # a text longer than the windows
SHAPE = {
    "n_layer": 4, "n_head": 4, "n_query_groups": 2, "n_embd": 64, "head_size": 16, "intermediate_size": 96,
    "block_size": 128,
}  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0] * 4, "factor": 2.0,
    "original_max_position_embeddings": 512,
}  # fmt: skip
EXPERTS = families.experts(5, 2, 32)


def tiny(*base: dict[str, Any], window: bool = False, **fields: Any) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for part in (*base, SHAPE, {"sliding_window_size": 6} if window else {}, fields):
        result |= part
    return result


CASES = {  # name, beginning with the architecture: fields of Config
    "llama": tiny(tie_embeddings=True),
    "llama, biases and yarn": tiny(families.BIASES, rope_scaling=YARN | {"attention_factor": 1.3}),
    "llama, 3.1's scaling": tiny(rope_base=5e5, head_size=32, rope_scaling=families.LLAMA31["rope_scaling"]),
    "llama, experts": tiny(EXPERTS, rope_scaling={"type": "linear", "factor": 4.0}),
    "mistral3": tiny(
        families.MINISTRAL3, temperature_length=32, rope_scaling=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
    ),
    "smollm3": tiny(families.SMOLLM3),
    "qwen2": tiny(families.QWEN2),
    "qwen2moe": tiny(
        families.QWEN2, families.experts(5, 2, 32, "all"), shared_expert_size=40, shared_expert_gate=True
    ),
    "qwen3": tiny(families.QWEN3, head_size=32),
    "qwen3moe": tiny(families.QWEN3, EXPERTS),
    "gemma": tiny(families.GEMMA1),
    "gemma2": tiny(families.GEMMA2, window=True),
    "gemma3": tiny(families.GEMMA3_LARGE, window=True, n_layer=7),
    "gptneox": tiny(families.NEOX, n_query_groups=4, rotary_percentage=0.5),
    "gptneox, serial": tiny(families.NEOX, n_query_groups=4, rotary_percentage=1.0, parallel_residual=False),
    "phi2": tiny(families.PHI, n_query_groups=4),
    "phi3": tiny(rotary_percentage=0.5, block_size=1024, rope_scaling=LONGROPE),
    "stablelm": tiny(families.STABLELM, attn_bias=True, rotary_percentage=0.5),
    "stablelm, parallel": tiny(
        families.STABLELM, parallel_residual=True, shared_norm=True, norm_qk=True, norm_qk_type="each",
        rotary_percentage=0.5,
    ),
    "falcon": tiny(families.FALCON, n_query_groups=1, shared_norm=True),
    "falcon, two norms": tiny(families.FALCON),
    "command-r": tiny(families.COHERE, logit_multiplier=0.5),
    "cohere2": tiny(families.COHERE2, window=True),
    "olmo": tiny(families.OLMO, clip_qkv=0.4),
    "olmo2": tiny(families.OLMO2),
    "olmo2, windows": tiny(families.OLMO3, window=True, rope_scaling=YARN),
    "exaone4": tiny(families.EXAONE4, tie_embeddings=True),
    "granite": tiny(families.GRANITE, attention_scores_scalar=25.0, logit_multiplier=0.5),
    "granite_swa": tiny(
        families.GRANITE, window=True, attention="full,sliding", positions="none,rope", sink_logits=True
    ),
    "granite_swa, for Mistral's windows": tiny(window=True, attention="sliding"),
    "gpt-oss": tiny(families.GPT_OSS, EXPERTS, window=True, rope_scaling=None),
    "afmoe": tiny(
        EXPERTS, window=True, norm_qk=True, post_attention_norm=True, post_mlp_norm=True, attention_gate=True,
        scale_embeddings=True, attention="sliding,sliding,sliding,full", positions="rope,rope,rope,none",
        shared_expert_size=64, mlp_class_name="GatedMLP,MoE,MoE,MoE", expert_scale=1.5, expert_weights="biased",
    ),
    "llama4": tiny(
        families.LLAMA4, families.experts(5, 1, 32, "sigmoid"), norm_qk=True, norm_qk_type="plain",
        shared_expert_size=32, mlp_class_name="GatedMLP,MoE",
    ),
}  # fmt: skip


@functools.cache
def tiny_tokenizer(kind: str = "gpt2", **how: Any) -> tuple[dict[str, str], int]:
    """The files of a tokenizer, and how many tokens it has."""
    with tempfile.TemporaryDirectory() as directory:
        write_tiny_gguf(Path(directory, "t.gguf"), tokenizer=kind, **how)
        file = gguf.read_gguf(Path(directory, "t.gguf"))
    return tokenizer_files(file), len(file.metadata["tokenizer.ggml.tokens"])


def write_checkpoint(directory: Path, **fields: Any) -> GPT:
    """A random model with a tokenizer. The numbers are numpy's, the same on every machine."""
    files, n_tokens = tiny_tokenizer()
    directory.mkdir(exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    config = Config(**fields | {"name": "tiny", "vocab_size": n_tokens, "padded_vocab_size": None})
    rng, model = np.random.default_rng(5), GPT(config)
    for name, weight in model.state_dict().items():
        numbers = torch.from_numpy(rng.standard_normal(weight.shape).astype(np.float32))
        norm = weight.dim() == 1 and name.endswith(".weight") and not config.norm_unit_offset
        weight.copy_(numbers * 0.2 if weight.dim() > 1 else norm + numbers * 0.1)
    save_checkpoint(model, config, directory)
    return model


def digest(path: Path) -> str:
    """Of all that a file says but the numbers."""
    file = gguf.read_gguf(path)
    tensors = {name: (info.shape, info.type_id) for name, info in sorted(file.tensors.items())}
    content = json.dumps([file.metadata, tensors], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


class LlamaCpp:
    """One model in llama.cpp, in float32."""

    def __init__(self, path: Path, n_ctx: int = 128) -> None:
        import llama_cpp

        self.model = llama_cpp.Llama(
            str(path), n_ctx=n_ctx, n_threads=1, logits_all=True, type_k=0, type_v=0, flash_attn=False, verbose=False
        )

    def logits(self, ids: list[int]) -> torch.Tensor:
        self.model.reset()
        self.model.eval(ids)
        return torch.tensor(np.array(self.model.scores[: len(ids)]))


def record(directory: Path) -> dict[str, Any]:
    content = {}
    for case, fields in CASES.items():
        checkpoint = directory / case.replace(" ", "_")
        write_checkpoint(checkpoint, **fields)
        export_gguf(checkpoint, checkpoint / "m.gguf", "f32")
        model = LlamaCpp(checkpoint / "m.gguf")
        logits = model.logits(IDS)[-1]
        model.model.close()
        top = logits.topk(6).indices.tolist()
        values = [[i, round(logits[i].item(), 5)] for i in top]
        content[case] = {"file": digest(checkpoint / "m.gguf"), "logits": values}
    return content


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        rows = [f"{json.dumps(case)}: {json.dumps(row)}" for case, row in record(Path(temporary)).items()]
        RECORD.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
