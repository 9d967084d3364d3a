"""Recompute the fixtures of test_reference_code.py with the papers' own code, on a CPU, in float64.

    python tests/reference/make_fixtures.py --chunkllama DIR --streaming DIR --longlora DIR

Each DIR is a clone (bare ones too) of HKUNLP/ChunkLlama, mit-han-lab/streaming-llm or dvlab-research/LongLoRA; HEAD is
read. Needs transformers and einops. A tiny random Llama, written here around the reference's attention, gives the
logits. What had to be replaced for a CPU and for today's transformers is in STUBS, and with the commits in
fixtures.json.
"""

import argparse
import json
import math
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.llama import modeling_llama as hf

HERE = Path(__file__).parent
T, V, C, H, G, D, MLP, LAYERS, BASE = 48, 61, 32, 4, 2, 8, 48, 2, 10000.0
FILES = {
    "chunkllama": ["chunkllama_attn_replace.py"],
    "streaming": ["streaming_llm/pos_shift/modify_llama.py", "streaming_llm/kv_cache.py"],
    "longlora": ["llama_attn_replace.py"],
}
REPOSITORIES = {
    "chunkllama": "HKUNLP/ChunkLlama",
    "streaming": "mit-han-lab/streaming-llm",
    "longlora": "dvlab-research/LongLoRA",
}
FUNCTIONS = {
    "chunkllama": "replace_with_chunkllama, forward, ChunkLlamaRotaryEmbedding, merge_attn_outputs",
    "streaming": "enable_llama_pos_shift_attention, llama_pos_shift_attention_forward, StartRecentKVCache",
    "longlora": "forward_flashattn, forward_noflashattn",
}
STUBS = {
    "chunkllama": "flash_attn_func: softmax and log-sum-exp in float64. transformers' Cache: a dictionary. "
    "torch.bfloat16, to which merge_attn_outputs rounds its weights, is float64, but in dual_chunk.bfloat16_merge. "
    "max_position_embeddings is large, which makes the temperature 1, but in dual_chunk.temperature.",
    "streaming": "LlamaAttention and its rotary embedding as in transformers 4.33: weights, sizes, cos and sin tables.",
    "longlora": "flash_attn_varlen_qkvpacked_func: a softmax for each run of cu_seqlens. pad_input, unpad_input. "
    "apply_rotary_pos_emb and the rotary embedding as in transformers 4.34.",
}


# ------------------------------------------------------------------------------------------ what the references import


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Output (B, T, H, D) and log-sum-exps (B, H, T) of q, k, v in flash_attn's layout, (B, T or L, H, D)."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.size(-1))
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool, return_attn_probs: bool) -> tuple:
    assert not causal or q.size(1) == k.size(1)
    return *softmax_attention(q, k, v, causal), None


def flash_attn_varlen_qkvpacked_func(qkv: Tensor, cu_seqlens: Tensor, longest: int, dropout: float, **kwargs) -> Tensor:
    assert kwargs == {"softmax_scale": None, "causal": True} and dropout == 0 and cu_seqlens[-1] == len(qkv)
    runs = [qkv[a:b].unsqueeze(0).unbind(2) for a, b in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    return torch.cat([softmax_attention(*run, causal=True)[0][0] for run in runs])


def unpad_input(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    lengths = mask.sum(-1, dtype=torch.int32)
    kept = mask.flatten().nonzero().flatten()
    return x.flatten(0, 1)[kept], kept, nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), lengths.max()


def pad_input(x: Tensor, kept: Tensor, batch: int, length: int) -> Tensor:
    return x.new_zeros(batch * length, *x.shape[1:]).index_copy(0, kept, x).unflatten(0, (batch, length))


class OldRotary(nn.Module):
    """Tables (1, 1, seq_len, D) of cos and sin, from angles in float32."""

    def forward(self, x: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        inv_freq = 1.0 / (BASE ** (torch.arange(0, D, 2).float() / D))
        angles = torch.outer(torch.arange(seq_len).float(), inv_freq).repeat(1, 2)[None, None]
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def old_apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> tuple:
    return hf.apply_rotary_pos_emb(q, k, cos[0, 0][position_ids], sin[0, 0][position_ids])


class LlamaAttention(nn.Module):
    """What the references' forward functions look for in transformers' class of their time."""

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(pretraining_tp=1)
        self.hidden_size, self.num_heads, self.num_key_value_heads, self.head_dim = C, H, G, D
        self.num_key_value_groups, self.layer_idx = H // G, 0
        self.q_proj, self.o_proj = nn.Linear(C, H * D, bias=False), nn.Linear(H * D, C, bias=False)
        self.k_proj, self.v_proj = nn.Linear(C, G * D, bias=False), nn.Linear(C, G * D, bias=False)
        self.rotary_emb = OldRotary()


class DictCache:
    """Keys and values of each layer, joined along the tokens."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[Tensor, Tensor]] = {}

    def get_usable_length(self, new: int, layer: int) -> int:
        return self.held[layer][0].size(2) if layer in self.held else 0

    def update(self, k: Tensor, v: Tensor, layer: int, cache_kwargs: None) -> tuple[Tensor, Tensor]:
        if layer in self.held:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.held[layer], (k, v), strict=True))
        self.held[layer] = k, v
        return k, v


def git(directory: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", str(directory), *args], check=True, capture_output=True, text=True).stdout


def import_reference(directory: Path, path: str) -> types.ModuleType:
    """A file of a clone's HEAD as a module, with stand-ins for what it imports."""
    llama = types.ModuleType("transformers.models.llama.modeling_llama")
    llama.rotate_half, llama.repeat_kv = hf.rotate_half, hf.repeat_kv
    llama.apply_rotary_pos_emb, llama.LlamaAttention = old_apply_rotary_pos_emb, LlamaAttention
    llama.LlamaFlashAttention2 = type("LlamaFlashAttention2", (), {})
    root = types.ModuleType("transformers")
    root.models = types.SimpleNamespace(llama=types.SimpleNamespace(modeling_llama=llama))
    stand_ins = {
        "transformers": root,
        "transformers.models.llama.modeling_llama": llama,
        "transformers.cache_utils": types.SimpleNamespace(Cache=DictCache),
        "flash_attn": types.SimpleNamespace(__version__="2.1.0"),
        "flash_attn.bert_padding": types.SimpleNamespace(pad_input=pad_input, unpad_input=unpad_input),
        "flash_attn.flash_attn_interface": types.SimpleNamespace(
            flash_attn_func=flash_attn_func,
            flash_attn_qkvpacked_func=None,
            flash_attn_varlen_kvpacked_func=None,
            flash_attn_varlen_qkvpacked_func=flash_attn_varlen_qkvpacked_func,
        ),
    }
    module = types.ModuleType(Path(path).stem)
    with mock.patch.dict(sys.modules, stand_ins):
        exec(compile(git(directory, "show", f"HEAD:{path}"), path, "exec"), vars(module))
    return module


# ---------------------------------------------------------------------------------------------------------- the model


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = LlamaAttention()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(C, 1e-5), nn.RMSNorm(C, 1e-5)
        self.mlp = nn.ModuleDict({n: nn.Linear(C, MLP, bias=False) for n in ("gate_proj", "up_proj")})
        self.mlp["down_proj"] = nn.Linear(MLP, C, bias=False)

    def forward(self, x: Tensor, **kwargs) -> tuple[Tensor, object]:
        y, _, past = self.self_attn(self.input_layernorm(x), use_cache=True, **kwargs)
        x = x + y
        h = self.post_attention_layernorm(x)
        gated = nn.functional.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h)
        return x + self.mlp["down_proj"](gated), past


class Llama(nn.Module):
    """Parameters are called as in a Hugging Face checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(V, C), "layers": layers, "norm": nn.RMSNorm(C, 1e-5)})
        self.lm_head = nn.Linear(C, V, bias=False)

    def forward(self, idx: Tensor, position_ids: Tensor, pasts: list | None = None, **kwargs) -> tuple[Tensor, list]:
        x, new_pasts = self.model["embed_tokens"](idx), []
        for i, layer in enumerate(self.model["layers"]):
            x, past = layer(x, position_ids=position_ids, past_key_value=pasts and pasts[i], **kwargs)
            new_pasts.append(past)
        return self.lm_head(self.model["norm"](x)), new_pasts


def build_weights() -> dict[str, Tensor]:
    """float32, so large that attention is far from uniform."""
    torch.manual_seed(20)
    weights = {}
    for name, p in Llama().named_parameters():
        weights[name] = torch.randn_like(p) * 0.3 if p.dim() > 1 else 1 + torch.randn_like(p) * 0.1
    return {name: p.detach().contiguous() for name, p in weights.items()}


def build(weights: dict[str, Tensor], forward: Callable | None = None, rotary: nn.Module | None = None) -> Llama:
    """A model in float64 whose attention layers run `forward`."""
    model = Llama().double().eval()
    model.load_state_dict({name: p.double() for name, p in weights.items()})
    for i, layer in enumerate(model.model["layers"]):
        attn = layer.self_attn
        attn.layer_idx = i
        attn.forward = types.MethodType(forward, attn) if forward else attn.forward
        attn.rotary_emb = rotary or attn.rotary_emb
    return model


# ----------------------------------------------------------------------------------------------------- the three papers


def make_dual_chunk(directory: Path, weights: dict[str, Tensor], idx: Tensor) -> tuple[dict[str, Tensor], dict]:
    module = import_reference(directory, FILES["chunkllama"][0])
    in_float64 = types.SimpleNamespace(**vars(torch) | {"bfloat16": torch.float64})

    def run(calls: list[int], c=16, local=4, max_positions=4096, factor=1.0, torch_of_theirs=in_float64) -> Tensor:
        module.replace_with_chunkllama(pretraining_length=c, local_window_size=local)
        module.torch = torch_of_theirs
        rotary = module.ChunkLlamaRotaryEmbedding(D, max_positions, BASE, factor)
        model, cache = build(weights, module.forward, rotary), DictCache()
        pos = torch.arange(T)[None]
        steps = zip(idx.split(calls, dim=1), pos.split(calls, dim=1), strict=True)
        return torch.cat([model(tokens, at, [cache] * LAYERS)[0] for tokens, at in steps], dim=1)

    results = {
        "prefill": run([T]),
        "prefill_by_default": run([T], local=None),
        "prefill_interpolated": run([T], factor=2.0),
        "temperature": run([T], max_positions=16),
        "bfloat16_merge": run([T], torch_of_theirs=torch),
        "steps": run([1] * T),
        "prefill_then_steps": run([21] + [1] * (T - 21)),
        "steps_by_default": run([20] + [1] * (T - 20), local=None),
    }
    defaults = {}
    for c in (16, 64, 1000, 2048, 4096, 8192, 32384, 32768, 131072):
        module.replace_with_chunkllama(pretraining_length=c)
        defaults[str(c)] = [module.chunk_size - module.local_window, module.local_window]
    return results, {"defaults": defaults, "temperature": module.get_mscale(T / 16) ** 2}


def make_streaming(directory: Path, weights: dict[str, Tensor], idx: Tensor) -> dict[str, Tensor]:
    attention, caches = (import_reference(directory, path) for path in FILES["streaming"])

    def run(start: int, recent: int, before: bool) -> Tensor:
        model, logits, pasts = build(weights), [], None
        attention.enable_llama_pos_shift_attention(model)
        cache = caches.StartRecentKVCache(start, recent)
        for token in idx.split(1, dim=1):
            pasts = cache.evict_for_space(pasts, 1) if before else pasts
            held = pasts[0][0].size(2) if pasts else 0  # transformers counts positions by the cache's length
            step, pasts = model(token, torch.tensor([[held]]), pasts)
            logits.append(step)
            pasts = pasts if before else cache(pasts)
        return torch.cat(logits, dim=1)

    return {
        f"{start}_{recent}_{'before' if before else 'after'}": run(start, recent, before)
        for start, recent, before in [(4, 7, False), (1, 1, False), (0, 6, False), (4, 7, True)]
    }


def make_s2(directory: Path, weights: dict[str, Tensor], idx: Tensor) -> dict[str, Tensor]:
    module = import_reference(directory, FILES["longlora"][0])
    pos, heads = torch.arange(T)[None].expand_as(idx), []
    logits, _ = build(weights, module.forward_flashattn).train()(idx, pos, attention_mask=torch.ones_like(idx).bool())
    model = build(weights, module.forward_noflashattn).train()
    attn = model.model["layers"][0].self_attn
    attn.o_proj.register_forward_pre_hook(lambda _, args: heads.append(args[0]))
    causal = torch.full((len(idx), 1, T, T), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)
    model(idx, pos, attention_mask=causal)
    return {"logits": logits, "rolled_heads_of_layer_0": heads[0]}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in FILES:
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"a clone of {REPOSITORIES[name]}")
    directories = vars(parser.parse_args())
    weights = build_weights()
    idx = torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(21))
    dual, numbers = make_dual_chunk(directories["chunkllama"], weights, idx[:1])
    results = {
        "dual_chunk": dual,
        "streaming": make_streaming(directories["streaming"], weights, idx[:1]),
        "s2": make_s2(directories["longlora"], weights, idx),
    }
    tensors = {f"weights.{name}": p for name, p in weights.items()} | {"idx": idx}
    for method, found in results.items():
        tensors |= {f"{method}.{name}": result.float().contiguous() for name, result in found.items()}
    notes = {
        name: {
            "repository": f"https://github.com/{REPOSITORIES[name]}",
            "commit": git(directory, "rev-parse", "HEAD").strip(),
            "files": FILES[name],
            "functions": FUNCTIONS[name],
            "stubbed": STUBS[name],
        }
        for name, directory in directories.items()
    }
    notes["chunkllama"] |= numbers
    notes["fixtures.safetensors"] = (
        "weights.*: a random Llama under Hugging Face's names; idx (2, 48); the rest: logits (rows, 48, 61) computed "
        "in float64, or what enters layer 0's output projection. Dual-chunk and streaming read the first row."
    )
    save_file(tensors, HERE / "fixtures.safetensors")
    (HERE / "fixtures.json").write_text(json.dumps(notes, indent=2) + "\n")


if __name__ == "__main__":
    main()
