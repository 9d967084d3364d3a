"""A decoding step on a CPU in one call of compiled code: cpu_step.cpp, which is compiled once for a machine.

Here a model is described to that code: where its weights are and, for every call, the plan that the model's own mixers
made: the slots that keys go to, the angles that queries and keys are rotated by, and the masks of who sees whom. It
knows softmax attention under any masks, and every block that a Config can ask for. `build_step` refuses the rest.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lit_swa.linear_formats import OneTokenLinear, is_injected, pack_for_cpu, replace_linears
from lit_swa.machine import cache_dir, keep_file, processor
from lit_swa.model import (
    GPT,
    Block,
    Call,
    CausalSelfAttention,
    Exchange,
    GatedMLP,
    KVCache,
    PlainMLP,
    Plan,
    RMSNorm,
    SoftmaxAttention,
)
from lit_swa.s2 import ShiftedSparseAttention
from lit_swa.utils import print_line
from lit_swa.weight_only import Int4Linear, Int8Linear

MOST_ROWS = 16  # tokens of a call; the libraries' products are faster for more

# --------------------------------------------------------------------------------------- the structs of cpu_step.cpp


def struct(name: str, **types: type) -> type[Structure]:
    return type(name, (Structure,), {"_fields_": list(types.items())})


def numbers(names: str, of: type = c_int64) -> dict[str, type]:
    return dict.fromkeys(names.split(), of)


LINEARS, NORMS = "qkv proj fc_1 fc_2 out", "norm_1 norm_q norm_k post_attention norm_2 post_mlp"
LinearStruct = struct("LinearStruct", **numbers("weight scale bias", c_void_p), **numbers("rows columns format group"))
NormStruct = struct("NormStruct", **numbers("weight bias", c_void_p), eps=c_double, **numbers("size kind"))
LayerStruct = struct("LayerStruct", **numbers(NORMS, NormStruct), **numbers(LINEARS, LinearStruct), kind=c_int64)
ModelStruct = struct(
    "ModelStruct",
    **numbers("layers heads groups head_size embd rotated activation parallel"),
    **numbers("scale score_cap logit_cap residual logit_scale", c_double),
    layer=POINTER(LayerStruct),
    ln_f=NormStruct,
    head=LinearStruct,
)
SeenStruct = struct("SeenStruct", **numbers("part first count"), mask=c_void_p, **numbers("b t"))
AnglesStruct = struct("AnglesStruct", **numbers("cos sin", c_void_p), **numbers("b t"))
KindStruct = struct(
    "KindStruct",
    **numbers("parts seen_count"),
    seen=POINTER(SeenStruct),
    queries=POINTER(AnglesStruct),
    keys=AnglesStruct,
    rotate_read=c_int64,
    temperature=c_void_p,
    copies=c_int64,
    slots=c_void_p,
    **numbers("cache_slots cache_bfloat16"),
)
CallStruct = struct(
    "CallStruct",
    **numbers("threads batch tokens"),
    **numbers("x logits", c_void_p),
    kind_count=c_int64,
    kinds=POINTER(KindStruct),
    caches=POINTER(c_void_p),
)

# ---------------------------------------------------------------------------------------------------------- compiling

SOURCE = Path(__file__).with_name("cpu_step.cpp")
COMPILERS = ("c++", "g++", "clang++")  # CXX comes before them
FLAGS = ("-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-w", "-shared", "-fPIC", "-pthread")
NATIVE = (("-march=native",), ("-mcpu=native",), ())  # this processor's instructions, as compilers spell it; any's


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled cpu_step.cpp, from the cache if it was compiled before. Raises OSError when that is not possible."""
    compiler = next(filter(shutil.which, filter(None, (os.environ.get("CXX"), *COMPILERS))), None)
    if compiler is None:
        raise OSError("there is no C++ compiler; install g++ or clang++")
    made_of = SOURCE.read_text(), FLAGS, NATIVE, compiler, processor()
    name = f"cpu_step_{hashlib.sha256(repr(made_of).encode()).hexdigest()[:24]}.so"
    library = open_kept(name)
    if library is None:
        with tempfile.TemporaryDirectory() as directory:
            made, started = Path(directory) / name, time.perf_counter()
            compile_source(compiler, made)
            print_line(f"compiled {SOURCE.name} in {time.perf_counter() - started:.1f} s, once for this machine")
            with suppress(OSError):
                content = made.read_bytes()
                keep_file(name, content + hashlib.sha256(content).digest())
            library = ctypes.CDLL(str(made))
    library.step_new.argtypes, library.step_new.restype = [POINTER(ModelStruct)], c_void_p
    library.step_free.argtypes, library.step_free.restype = [c_void_p], None
    library.step_run.argtypes, library.step_run.restype = [c_void_p, POINTER(CallStruct)], None
    return library


def open_kept(name: str) -> ctypes.CDLL | None:
    """The library of this name in the cache directory; None where it is not there, or damaged. The system would load
    half a library, and end the process when the other half is needed: so its digest stands behind it."""
    with suppress(OSError):
        path = cache_dir().absolute() / name  # without a directory the name would be looked up among the system's
        content = path.read_bytes()
        if hashlib.sha256(content[:-32]).digest() == content[-32:]:
            return ctypes.CDLL(str(path))
    return None


def compile_source(compiler: str, library: Path) -> None:
    """Raises OSError with what the compiler says first."""
    for native in NATIVE:
        command = [compiler, *FLAGS, *native, str(SOURCE), "-o", str(library)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0:
            return
    said = next((line for line in result.stderr.splitlines() if "error" in line), "it gives no reason")
    raise OSError(f"{compiler} does not compile {SOURCE.name}: {said}")


# ------------------------------------------------------------------------------------------------ describing the model

FORMATS = {torch.float32: 0, torch.bfloat16: 1}  # of a dense weight; 2 is int8, 3 is int4
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


class Unknown(ValueError):
    """A part of the model is none that cpu_step.cpp knows."""


class Description:
    """A model as cpu_step.cpp sees it. Raises Unknown for what it does not know.

    Pointers lead into the model's weights, which must neither move nor change their size. What has no place there
    (norms and biases in float32) is copied.
    """

    def __init__(self, model: GPT) -> None:
        config, attn = model.config, model.layers[0]
        self.kept: list[Tensor] = []
        self.kinds = list(dict.fromkeys(attn.mixer.kind for attn in model.layers))
        self.layers = (LayerStruct * config.n_layer)(*map(self.layer, model.transformer.h))
        if len({(layer.n_head, layer.n_query_groups) for layer in model.layers}) > 1:
            raise Unknown("layers of different numbers of heads")
        sizes = (config.n_layer, attn.n_head, attn.n_query_groups, config.head_size, config.n_embd, config.rope_n_elem)
        how = ACTIVATIONS.index(config.activation), config.parallel_residual
        scale = (config.attention_scores_scalar or config.head_size) ** -0.5
        factors = config.attention_logit_softcapping or 0.0, config.final_logit_softcapping or 0.0
        factors += config.residual_multiplier, config.logit_multiplier
        last = self.norm(model.transformer.ln_f), self.linear(model.lm_head)
        self.struct = ModelStruct(*sizes, *how, scale, *factors, self.layers, *last)

    def keep(self, tensor: Tensor) -> int:
        """Its address; it stays in memory as long as this object."""
        tensor = tensor.detach().contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def layer(self, block: nn.Module) -> Structure:
        attn, mlp = block.attn, block.mlp
        for module, known in ((block, (Block,)), (attn, (CausalSelfAttention,)), (mlp, (GatedMLP, PlainMLP)),
                              (attn.mixer, (SoftmaxAttention, ShiftedSparseAttention))):  # fmt: skip
            if type(module) not in known or is_injected(module):
                raise Unknown(f"a {type(module).__name__}, or what was put into it")
        if attn.mixer.sink_logits is not None or attn.config.clip_qkv is not None or attn.gate is not None:
            raise Unknown("learned sink logits, values that are clipped, or a gate")
        norm_2 = block.norm_1 if block.shared_norm else block.norm_2
        norms = block.norm_1, attn.norm_q, attn.norm_k, block.post_attention_norm, norm_2, block.post_mlp_norm
        into = (mlp.fc_1, mlp.fc_2) if isinstance(mlp, GatedMLP) else (mlp.fc, None)
        linears = attn.qkv, attn.proj, *into, mlp.proj
        return LayerStruct(*map(self.norm, norms), *map(self.linear, linears), self.kinds.index(attn.mixer.kind))

    def norm(self, norm: nn.Module) -> Structure:
        if type(norm) is nn.Identity:
            return NormStruct()
        if type(norm) not in (RMSNorm, nn.LayerNorm):
            raise Unknown(f"a {type(norm).__name__}")
        weight, bias = norm.weight, getattr(norm, "bias", None)
        size = norm.normalized_shape[0] if weight is None else weight.numel()
        weight = None if weight is None else self.keep(weight.float() + getattr(norm, "unit_offset", 0))
        bias = None if bias is None else self.keep(bias.float())
        return NormStruct(weight, bias, norm.eps, size, 1 if type(norm) is RMSNorm else 2)

    def linear(self, linear: nn.Module | None) -> Structure:
        if linear is None:
            return LinearStruct()
        if type(linear) not in (nn.Linear, Int8Linear, Int4Linear) or is_injected(linear):
            raise Unknown(f"a {type(linear).__name__}, or what was put into it")
        weight, scale, group = linear.weight, None, 0
        if type(linear) is Int8Linear:
            kind, scale = 2, self.keep(linear.scale.float())
        elif type(linear) is Int4Linear:
            kind, scale, group = 3, self.keep(linear.scales), linear.group_size
        elif weight.dtype in FORMATS:
            kind = FORMATS[weight.dtype]
        else:
            raise Unknown(f"weights of {weight.dtype}")
        bias = None if linear.bias is None else self.keep(linear.bias.float())
        return LinearStruct(self.keep(weight), scale, bias, linear.out_features, linear.in_features, kind, group)


# ------------------------------------------------------------------------------------------------- describing a call


def is_known(plan: Plan) -> bool:
    """True for the call of few tokens that writes its keys first and reads its slots under masks, in plain steps."""
    exchange = plan.exchange
    plain = plan.faster is None and len(plan.blocks) == 1 and not plan.texts and not plan.group
    written = exchange is not None and exchange.write_first and isinstance(exchange.read[0], slice)
    return plain and written and (exchange.write.any_token is not None or exchange.write.tokens == slice(None))


def stride(x: Tensor, dim: int) -> int:
    """How far apart the numbers of one sequence or token and the next lie; 0: they share them."""
    return x.stride(dim) if x.size(dim) > 1 else 0


def describe_angles(cos: Tensor, sin: Tensor, first: int = 0) -> Structure:
    """first: the slot of the first angles, where they are those of slots."""
    back = first * cos.size(3) * cos.element_size()
    return AnglesStruct(cos.data_ptr() - back, sin.data_ptr() - back, stride(cos, 0), stride(cos, 2))


def describe_seen(plan: Plan) -> Sequence[Structure]:
    first, count = plan.exchange.read[0].start or 0, plan.exchange.k_pos.size(1)
    seen = []
    for keys, masks in plan.blocks[0].ranges:
        lo, hi, _ = keys.indices(count)
        for part, mask in masks.items():  # (1 or B, 1, T, L)
            where = (0, 0, 0) if mask is None else (mask.data_ptr(), stride(mask, 0), stride(mask, 2))
            seen.append(SeenStruct(part, first + lo, hi - lo, *where))
    return (SeenStruct * len(seen))(*seen)


def slots_written(exchange: Exchange, B: int, T: int) -> Tensor:
    """(copies, B, T): the slot of each token's key in every copy; -1: it is not kept."""
    write, slots = exchange.write, torch.stack(exchange.write.slots)
    if write.any_token is None:
        return slots[:, None].expand(-1, B, T).contiguous()
    kept = slots.new_full((slots.size(0), B, T), -1)  # a token that is not kept has none of the writes
    kept.scatter_(2, write.tokens.expand_as(slots), slots)
    return torch.where(write.any_token, kept, -1)


def describe_plan(plan: Plan, cache: KVCache, B: int, T: int) -> tuple[Structure, tuple]:
    """The plan of a kind of layers, and what must stay in memory during the call."""
    slots, seen = slots_written(plan.exchange, B, T), describe_seen(plan)
    queries = (AnglesStruct * len(plan.q_angles))(*(describe_angles(*angles) for angles in plan.q_angles))
    keys = describe_angles(*plan.k_angles, (plan.exchange.read[0].start or 0) if plan.rotate_read else 0)
    temperature, address = plan.temperature, None
    if temperature is not None:
        temperature = torch.as_tensor(temperature, dtype=torch.float32).expand(B, 1, T, 1).contiguous()
        address = temperature.data_ptr()
    shape = cache.k.size(2), cache.k.dtype is torch.bfloat16
    struct = KindStruct(
        len(queries), len(seen), seen, queries, keys, plan.rotate_read, address, slots.size(0), slots.data_ptr(), *shape
    )
    return struct, (slots, seen, queries, temperature)


class Step:
    """A decode step, see build_step."""

    def __init__(self, model: GPT, tokens: int = 1) -> None:
        self.model, self.most_tokens = model, tokens
        self.library, self.description = load_library(), Description(model)
        self.handle = self.library.step_new(byref(self.description.struct))
        self.first_layer, self.caches = model.layers[0], model.caches[:0]
        model.fixed_shape_steps = True

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self.library.step_free(self.handle)

    def __call__(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        if idx.numel() > MOST_ROWS:
            return self.model(idx, input_pos)
        call = self.model.plan_call(idx, input_pos)
        if not all(map(is_known, call.plans.values())):
            return self.model.project(self.model.run_blocks(idx, call))
        return self.run(idx, call)

    def run(self, idx: Tensor, call: Call) -> Tensor:
        """Logits (B, T, padded_vocab_size) in float32, whatever the weights are."""
        model, (B, T) = self.model, idx.shape
        self.find_caches()
        described = [describe_plan(call.plans[kind], self.first[kind], B, T) for kind in self.description.kinds]
        kinds = (KindStruct * len(described))(*(struct for struct, _ in described))
        x = model.embed(idx).float().contiguous()
        logits = torch.empty(B, T, model.config.padded_vocab_size)
        struct = CallStruct(
            torch.get_num_threads(), B, T, x.data_ptr(), logits.data_ptr(), len(kinds), kinds, self.addresses
        )
        self.library.step_run(self.handle, byref(struct))
        return logits

    def find_caches(self) -> None:
        """Note where the keys and values are, where the caches are not those of the last call; all change together."""
        if self.caches and self.first_layer.kv_cache is self.caches[0]:
            return
        self.caches = self.model.caches
        addresses = [tensor.data_ptr() for cache in self.caches for tensor in (cache.k, cache.v)]
        self.addresses = (c_void_p * len(addresses))(*addresses)
        self.first = {attn.mixer.kind: attn.kv_cache for attn in reversed(self.model.layers)}


def build_step(model: GPT, tokens: int = 1) -> Step:
    """A step for `Session(decode=...)` on a CPU: (idx (B, T), input_pos (T,) or (B, T)) -> logits (B, T, V), float32.

    Calls of more than MOST_ROWS tokens, and those that do not read their slots under masks, go to the model itself. The
    model's weights are read where they are: it must not be moved, nor its linear layers be replaced.
    Raises OSError where cpu_step.cpp cannot be compiled, and Unknown for a model that it does not know.
    """
    weight = model.transformer.wte.weight
    if weight.dtype not in FORMATS:
        raise Unknown(f"weights of {weight.dtype}")
    return Step(model, tokens)


# ------------------------------------------------------------------------------------------------------- what is chosen


def compile_for_cpu(model: GPT, tokens: int = 1) -> Callable[[Tensor, Tensor], Tensor]:
    """The step of `build_step`. For a model that it does not know one block is compiled, which serves all layers: that
    takes seconds each time, its products are sums that Inductor writes itself (see OneTokenLinear), and the model stays
    changed in this way. Where there is no C++ compiler, which both need, the step is the model's own.
    """
    try:
        load_library()
    except OSError as e:
        print_line(f"decoding is not compiled: {e}")
        pack_for_cpu(model)
        return plain_step(model, tokens)
    try:
        return build_step(model, tokens)
    except Unknown:
        layers = model.config  # compiled, one would copy the experts' weights; one code would not serve all layers
        if layers.n_expert is not None or layers.layer_heads or layers.layer_query_groups:
            pack_for_cpu(model)
            return plain_step(model, tokens)
        compile_blocks(model)
        return plain_step(model, tokens)


def plain_step(model: GPT, tokens: int) -> Callable[[Tensor, Tensor], Tensor]:
    def step(idx: Tensor, input_pos: Tensor) -> Tensor:
        return model(idx, input_pos)

    step.most_tokens = tokens
    return step


def compile_blocks(model: GPT) -> None:
    """Make one-token calls of a model run compiled code."""
    model.fixed_shape_steps = True
    replace_linears(model, OneTokenLinear)
    for module in (*model.transformer.h, model.lm_head):
        compile_for_one_token(module)


def compile_for_one_token(module: nn.Module) -> None:
    """Make a module whose first argument is (B, T, C) run compiled code if T is 1, and its own code otherwise."""
    plain = module.forward
    compiled = torch.compile(plain, fullgraph=True)

    def forward(x: Tensor, *arguments: Any) -> Tensor:
        return (compiled if x.size(1) == 1 else plain)(x, *arguments)

    module.forward = forward
