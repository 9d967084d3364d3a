"""A decoding step on a CPU in one call of compiled code: cpu_step.cpp, which is compiled once for each machine.

Here the model is described to it: pointers to weights, and for every call the plan that the model's own mixers made (which
slots a token's key goes to, the angles that queries are rotated by, and the masks). The code knows softmax attention under
any masks, and what config.py can ask of a block. What it does not know, `describe` refuses.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lit_swa import model as parts
from lit_swa.linear_formats import is_injected
from lit_swa.model import GPT, Call, Plan, RMSNorm, SoftmaxAttention
from lit_swa.weight_only import Int4Linear, Int8Linear

SOURCE = Path(__file__).with_name("cpu_step.cpp")
FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-w", "-shared", "-fPIC", "-pthread")
NATIVE = ("-march=native", "-mcpu=native", None)  # for this processor, as compilers spell it; the last: for any
MOST_ROWS = 16  # tokens of a call; for more, the products of libraries are faster
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")

# ------------------------------------------------------------------------------------- the structs of cpu_step.cpp


class Linear(Structure):
    _fields_ = [("weight", c_void_p), ("scale", c_void_p), ("bias", c_void_p)] + [
        (name, c_int64) for name in ("out", "in_", "format", "group")
    ]


class Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("eps", c_double), ("size", c_int64), ("kind", c_int64)]


NORMS = ("norm_1", "norm_q", "norm_k", "post_attention", "norm_2", "post_mlp")
LINEARS = ("qkv", "proj", "fc_1", "fc_2", "out")


class Layer(Structure):
    _fields_ = [(n, Norm) for n in NORMS] + [(n, Linear) for n in LINEARS] + [("kind", c_int64)]


SIZES = ("layers", "heads", "groups", "head_size", "embd", "rotated", "activation", "parallel")


class Model(Structure):
    _fields_ = (
        [(n, c_int64) for n in SIZES]
        + [(n, c_double) for n in ("scale", "score_cap", "logit_cap")]
        + [("layer", POINTER(Layer)), ("ln_f", Norm), ("head", Linear)]
    )


class Seen(Structure):
    _fields_ = [("part", c_int64), ("first", c_int64), ("count", c_int64), ("mask", c_void_p)] + [
        ("b", c_int64),
        ("t", c_int64),
    ]


class Angles(Structure):
    _fields_ = [("cos", c_void_p), ("sin", c_void_p), ("b", c_int64), ("t", c_int64)]


class Kind(Structure):
    _fields_ = [
        ("parts", c_int64), ("seen_count", c_int64), ("seen", POINTER(Seen)), ("queries", POINTER(Angles)),
        ("keys", Angles), ("rotate_read", c_int64), ("temperature", c_void_p), ("copies", c_int64),
        ("slots", c_void_p), ("cache_slots", c_int64), ("cache_bfloat16", c_int64),
    ]  # fmt: skip


class CallStruct(Structure):
    _fields_ = [
        ("batch", c_int64), ("tokens", c_int64), ("x", c_void_p), ("logits", c_void_p), ("logits_bfloat16", c_int64),
        ("kinds", c_int64), ("kind", POINTER(Kind)), ("caches", POINTER(c_void_p)),
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- compiling


@functools.cache
def load_library() -> ctypes.CDLL:
    """cpu_step.cpp as a library, compiled if it was not. Raises OSError when that cannot be done."""
    compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    if compiler is None:
        raise OSError("there is no C++ compiler: install g++ or clang++.")
    machine = platform.processor() + platform.machine()
    from lit_swa.utils import describe_machine
    key = hashlib.sha256(repr((SOURCE.read_text(), FLAGS, compiler, describe_machine("cpu"))).encode()).hexdigest()[:16]
    for directory in (Path.home() / ".cache" / "lit_swa", Path(tempfile.gettempdir()) / "lit_swa"):
        library = directory / f"cpu_step_{key}.so"
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            build(compiler, library)
        lib = ctypes.CDLL(str(library))
        lib.step_new.restype = c_void_p
        lib.step_new.argtypes = [POINTER(Model), c_int64]
        lib.step_free.argtypes = [c_void_p]
        lib.step_run.argtypes = [c_void_p, POINTER(CallStruct)]
        return lib


def build(compiler, library):
    for native in NATIVE:
        flags = [f for f in (*FLAGS, native) if f]
        if subprocess.run([compiler, *flags, str(SOURCE), "-o", f"{library}.tmp"]).returncode == 0:
            os.replace(f"{library}.tmp", library)
            return
    raise OSError("compile")


# ------------------------------------------------------------------------------------------------- describing the model


class Unknown(Exception):
    """Something that cpu_step.cpp does not know."""


class Step:
    def __init__(self, model: GPT, threads: int | None = None) -> None:
        self.model, self.kept = model, []
        self.lib = load_library()
        self.kinds = list(dict.fromkeys(attn.mixer.kind for attn in model.layers))
        self.layers = (Layer * len(model.transformer.h))(*(self.layer(block) for block in model.transformer.h))
        config, attn = model.config, model.layers[0]
        sizes = (
            len(self.layers), attn.n_head, attn.n_query_groups, config.head_size, config.n_embd, config.rope_n_elem,
            ACTIVATIONS.index(config.activation), config.parallel_residual,
        )
        scale = (config.attention_scores_scalar or config.head_size) ** -0.5
        caps = config.attention_logit_softcapping or 0.0, config.final_logit_softcapping or 0.0
        self.struct = Model(*sizes, scale, *caps, self.layers, self.norm(model.transformer.ln_f), self.linear(model.lm_head))
        self.handle = self.lib.step_new(ctypes.byref(self.struct), threads or torch.get_num_threads())
        self.dtype = model.transformer.wte.weight.dtype
        model.fixed_shape_steps = True
        self.caches = None
        self.embedding = model.transformer.wte

    def keep(self, tensor: Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def norm(self, norm: nn.Module) -> Norm:
        if type(norm) is nn.Identity:
            return Norm()
        if type(norm) is RMSNorm:
            weight = norm.weight.float() + norm.unit_offset
            return Norm(self.keep(weight), None, norm.eps, weight.numel(), 1)
        if type(norm) is nn.LayerNorm:
            bias = None if norm.bias is None else self.keep(norm.bias.float())
            return Norm(self.keep(norm.weight.float()), bias, norm.eps, norm.weight.numel(), 2)
        raise Unknown(type(norm).__name__)

    def linear(self, linear: nn.Module) -> Linear:
        if is_injected(linear):
            raise Unknown("LoRA")
        bias = None if linear.bias is None else self.keep(linear.bias.float())
        shape = linear.out_features, linear.in_features
        if type(linear) is nn.Linear and linear.weight.dtype in DTYPES:
            return Linear(self.keep(linear.weight), None, bias, *shape, DTYPES[linear.weight.dtype], 0)
        if type(linear) is Int8Linear:
            return Linear(self.keep(linear.weight), self.keep(linear.scale.float()), bias, *shape, 2, 0)
        if type(linear) is Int4Linear:
            return Linear(self.keep(linear.weight), self.keep(linear.scales), bias, *shape, 3, linear.group_size)
        raise Unknown(type(linear).__name__)

    def layer(self, block: nn.Module) -> Layer:
        attn, mlp = block.attn, block.mlp
        gated = type(mlp) is parts.GatedMLP
        norms = (block.norm_1, attn.norm_q, attn.norm_k, block.post_attention_norm, block.norm_2, block.post_mlp_norm)
        linears = (attn.qkv, attn.proj, *((mlp.fc_1, mlp.fc_2) if gated else (mlp.fc, None)), mlp.proj)
        return Layer(*map(self.norm, norms), *(self.linear(l) if l is not None else Linear() for l in linears), self.kinds.index(attn.mixer.kind))

    def __call__(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        B, T = idx.shape
        model = self.model
        if B * T > MOST_ROWS:
            return model(idx, input_pos)
        call = model.plan_call(idx, input_pos)
        self.now = []
        kinds = (Kind * len(self.kinds))()
        held = [attn.kv_cache for attn in model.layers]
        if held != self.caches:
            self.caches = held
            pointers = [t.data_ptr() for cache in held for t in (cache.k, cache.v)]
            self.pointers = (c_void_p * len(pointers))(*pointers)
            self.first = {attn.mixer.kind: attn.kv_cache.k for attn in reversed(model.layers)}
        for kind, name in zip(kinds, self.kinds):
            self.fill(kind, call.plans[name], B, T, self.first[name])
        x = self.embedding(idx)
        if model.config.scale_embeddings:
            x = x * torch.tensor(model.config.n_embd**0.5, dtype=x.dtype)
        x = x.float().contiguous()
        logits = torch.empty(B, T, model.config.padded_vocab_size, dtype=self.dtype)
        struct = CallStruct(B, T, x.data_ptr(), logits.data_ptr(), self.dtype is torch.bfloat16, len(kinds), kinds, self.pointers)
        self.lib.step_run(self.handle, ctypes.byref(struct))
        return logits

    def fill(self, kind: Kind, plan: Plan, B: int, T: int, k: Tensor) -> None:
        assert plan.exchange.write_first and len(plan.blocks) == 1 and plan.faster is None
        read = plan.exchange.read[0]
        first = read.start or 0
        L = plan.exchange.k_pos.size(1)
        kind.parts = len(plan.q_angles)
        queries = (Angles * kind.parts)(*(angles(*a) for a in plan.q_angles))
        kind.queries = queries
        kind.keys = angles(*plan.k_angles)
        kind.rotate_read = plan.rotate_read
        seen = []
        for keys, masks in plan.blocks[0].ranges:
            lo, hi, _ = keys.indices(L)
            for part, mask in masks.items():
                if mask is None:
                    seen.append(Seen(part, first + lo, hi - lo, None, 0, 0))
                else:
                    assert mask.stride(3) == 1
                    seen.append(Seen(part, first + lo, hi - lo, mask.data_ptr(), stride(mask, 0), stride(mask, 2)))
        kind.seen_count = len(seen)
        seen = (Seen * len(seen))(*seen)
        kind.seen = seen
        if plan.temperature is not None:
            t = torch.as_tensor(plan.temperature, dtype=torch.float32).expand(B, 1, T, 1).contiguous()
            self.now.append(t)
            kind.temperature = t.data_ptr()
        write = plan.exchange.write
        slots = torch.stack(write.slots)
        if write.any_token is None:
            slots = slots[:, None].expand(-1, B, -1).contiguous()
        else:
            slots = torch.where(write.any_token, slots, -1)
        self.now.append((slots, queries, seen))
        kind.copies = slots.size(0)
        kind.slots = slots.data_ptr()
        kind.cache_slots = k.size(2)
        kind.cache_bfloat16 = k.dtype is torch.bfloat16


def angles(cos, sin):
    return Angles(cos.data_ptr(), sin.data_ptr(), stride(cos, 0), stride(cos, 2))


def stride(x, dim):
    return x.stride(dim) if x.size(dim) > 1 else 0
