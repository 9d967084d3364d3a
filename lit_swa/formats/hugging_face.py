"""The weights of a checkpoint in Hugging Face's form, in both directions. What they are called is in hf_names.py.

Where no architecture is named, it is the one that an export of the config's fields has.
"""

import functools
import itertools
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lit_swa.config import Config
from lit_swa.formats.files import LazyTensor
from lit_swa.formats.hf_export import architecture_of
from lit_swa.formats.hf_names import Names, names_of
from lit_swa.linear_formats import group_rows
from lit_swa.model import GPT

# -------------------------------------------------------------------------------------------------------------- weights

# What else may stand before or within the names: a model for images and text holds its language model under a prefix,
# which differs between versions of transformers, and torch's wrappers add their own.
PREFIXES = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.lm_head.": "lm_head."}
WRAPPERS = re.compile(
    r"(^|(?<=\.))(module|_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
FIRST_LAYER = re.compile(r"(?<![^.])(layers|h)\.0\.")  # what stands before it is the prefix
PACKED = re.compile(r"experts\.(gate_up_proj|down_proj)(_bias)?$")  # of all experts in one
BLOCKS, SCALES = "_blocks", "_scales"  # of weights in 4 bits (MXFP4), as gpt-oss stores its experts
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
EACH_HEAD = re.compile(r"\.attn\.norm_[qk]\.")
HEADS = re.compile(r"(^|\.)(lm_head|embed_out)\.(?=[^.]+$)")  # GPT-NeoX's has either name
NOT_NEEDED = re.compile(  # buffers that old checkpoints carry, and the parts of a model that see images
    r"rotary_emb\w*\.[^.]+$|(?<![^.])(self_)?(attention|attn)\.(masked_)?bias$|(^|\.)(causal_mask|position_ids)$|"
    r"(^|\.)(vision_tower|multi_modal_projector)\."
)


def hf_module_names(config: Config) -> dict[str, tuple[str, ...]]:
    """The table of names for a model with these fields."""
    return names_of(architecture_of(config), config).table


def has_neighbours(config: Config) -> bool:
    """True where Hugging Face's RoPE turns pairs of neighbours."""
    return names_of(architecture_of(config), config).neighbours


def hf_names_of(lit_name: str, config: Config, names: Names) -> tuple[str, ...]:
    """The Hugging Face weights that one lit weight is made of; () if it has no counterpart."""
    layer = re.search(r"\.h\.(\d+)\.", lit_name)
    found, end = templates_of(lit_name, names)
    found = tuple(name.replace("{i}", layer[1]) if layer else name for name in found)
    if is_stack(lit_name, names):
        [name] = found
        own = layer_config(lit_name, config)
        heads = own.n_head if ".norm_q" in lit_name else own.n_query_groups
        count, mark = (config.n_expert or 0, "{e}") if "{e}" in name else (heads, "{h}")
        found = tuple(name.replace(mark, str(n)) for n in range(count))
    return tuple(name + end for name in found)


def templates_of(lit_name: str, names: Names) -> tuple[tuple[str, ...], str]:
    """The table's names for a lit weight, (): it has none, and what stands behind them."""
    module, _, suffix = lit_name.rpartition(".")
    for key, end in ((module, f".{suffix}"), (lit_name, "")):
        if found := names.table.get(key) or names.table.get(re.sub(r"\.h\.\d+\.", ".h.{i}.", key)):
            return found, end
    return (), ""


def is_stack(lit_name: str, names: Names) -> bool:
    """True where each expert, or each head, has a weight of its own, be it a single one."""
    return any("{e}" in name or "{h}" in name for name in templates_of(lit_name, names)[0])


def layer_config(lit_name: str, config: Config) -> Config:
    """What the layer reads that a weight belongs to; the config, for one outside the layers."""
    layer = re.search(r"\.h\.(\d+)\.", lit_name)
    return config.of_layer(int(layer[1])) if layer else config


class _NoInit(TorchFunctionMode):
    """Skip random initialisation: it has no effect on the meta device, and torch would import its compiler for it."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init" or func in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def empty_model(config: Config) -> GPT:
    """A GPT whose parameters have shapes but no memory (the meta device)."""
    with torch.device("meta"), _NoInit():
        return GPT(config)


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight that a checkpoint of this config stores. Nothing is allocated."""
    state = empty_model(config).state_dict()
    if config.tie_embeddings:
        del state["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def join_qkv(parts: tuple[Tensor, ...], config: Config) -> Tensor:
    """Hugging Face's query, key and value weights (or biases) -> attn.qkv: H query heads, then G keys, then G values.

    Three parts are stacked. NeoX and Falcon store one: the rows of the queries of the first key/value head, its key and
    its value, then those of the next.
    """
    if len(parts) == 3:
        return torch.cat(parts)
    R, rest = config.n_head // config.n_query_groups, parts[0].shape[1:]
    by_group = parts[0].view(config.n_query_groups, R + 2, config.head_size, *rest)  # (G, R + 2, D, ...)
    return torch.cat([x.reshape(-1, *rest) for x in by_group.split((R, 1, 1), dim=1)])


def split_qkv(qkv: Tensor, n_parts: int, config: Config) -> tuple[Tensor, ...]:
    """The inverse of join_qkv."""
    H, G, D = config.n_head, config.n_query_groups, config.head_size
    if n_parts == 3:
        return qkv.split((H * D, G * D, G * D))
    kinds = qkv.split((H * D, G * D, G * D))
    by_group = [x.reshape(G, -1, D, *qkv.shape[1:]) for x in kinds]  # (G, R or 1, D, ...) each
    return (torch.cat(by_group, dim=1).reshape(qkv.shape),)


def from_neighbours(x: Tensor, size: int) -> Tensor:
    """Heads of `size` elements, in dimension 0, whose RoPE turns pairs of neighbours, as ours turns halves."""
    return x.unflatten(0, (-1, size // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_neighbours(x: Tensor, size: int) -> Tensor:
    """The inverse of from_neighbours."""
    return x.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2)


def chosen_names(architecture: str | Names | None, config: Config) -> Names:
    return (
        architecture if isinstance(architecture, Names) else names_of(architecture or architecture_of(config), config)
    )


def to_lit(
    source: Mapping[str, LazyTensor], config: Config, where: object, architecture: str | Names | None = None
) -> dict[str, LazyTensor]:
    """Hugging Face's weights under lit names, still lazy. `where` is what an error message calls the checkpoint.

    architecture: whose names they have, or the names; None: those that an export of this config has.
    Raises ValueError when a weight is missing, left over, or of another shape than the config asks for.
    """
    require_layers(config, source, where)
    names = chosen_names(architecture, config)
    found = plain_names({n: t for n, t in source.items() if not NOT_NEEDED.search(n)}, config, where, names)
    found = unpacked(found, config, names)
    result, used = {}, set()
    for lit_name, shape in expected_shapes(config).items():
        wanted = hf_names_of(lit_name, config, names)
        missing = [name for name in wanted if name not in found] or ([] if wanted else [lit_name])
        if missing:
            raise ValueError(f"{where} lacks the weight {missing[0]}: download it again, or correct config.json.")
        used.update(wanted)
        parts = tuple(found[name] for name in wanted)
        result[lit_name] = _joined(lit_name, wanted, parts, shape, layer_config(lit_name, config), where, names)
    tied = hf_names_of("lm_head.weight", config, names) if config.tie_embeddings else ()
    left_over = [name for name in found if name not in used and name not in tied]
    if left_over:
        raise ValueError(
            f"{where} holds {len(left_over)} weights that the model in its config.json has no place for, such as "
            f"{left_over[0][:80]}: correct config.json, or take a model of a kind that is supported."
        )
    return result


def plain_names(source: Mapping[str, LazyTensor], config: Config, where: object, names: Names) -> dict[str, LazyTensor]:
    """The weights under the names of the table, without prefixes; of tied ones, the embedding under its own name.

    Raises ValueError where two weights would have the same name.
    """
    [embedding], [head] = (hf_names_of(f"{name}.weight", config, names) for name in ("transformer.wte", "lm_head"))
    body = embedding.split(".")[0] + "."
    unwrapped = {name: WRAPPERS.sub("", name) for name in source}
    before = {name[: found.start()] for name in unwrapped.values() if (found := FIRST_LAYER.search(name))}
    prefix = before.pop() if len(before) == 1 else body
    found: dict[str, LazyTensor] = {}
    for name, plain in unwrapped.items():
        if HEADS.search(plain):
            plain = f"{head.split('.')[0]}.{plain.rpartition('.')[2]}"
        elif plain.startswith(prefix):
            plain = body + plain.removeprefix(prefix)
        if plain in found:
            raise ValueError(f"{where} holds {plain[:80]} twice, once as {name[:80]}: leave one of them.")
        found[plain] = source[name]
    if config.tie_embeddings and embedding not in found and head in found:
        found[embedding] = found[head]
    return found


def have_two_embeddings(
    source: Mapping[str, LazyTensor], config: Config, where: object, architecture: str | Names | None = None
) -> bool:
    """True where an input and an output embedding are stored and differ: transformers then does not tie them, whatever
    config.json says."""
    names = chosen_names(architecture, config)
    found = plain_names({n: t for n, t in source.items() if not NOT_NEEDED.search(n)}, config, where, names)
    both = [found.get(hf_names_of(f"{name}.weight", config, names)[0]) for name in ("transformer.wte", "lm_head")]
    if None in both or both[0].shape != both[1].shape:
        return None not in both
    one, other = (tensor.load() for tensor in both)
    return not torch.equal(one, other.to(one.dtype))


def require_layers(config: Config, tensors: Mapping[str, LazyTensor], where: object) -> None:
    """Before a model is built: every layer needs weights, so a config with more layers than weights is wrong."""
    if config.n_layer > len(tensors):
        raise ValueError(
            f"{where} holds {len(tensors)} weights and its config asks for {config.n_layer} layers: they do not "
            "belong together."
        )


def unpacked(source: Mapping[str, LazyTensor], config: Config, names: Names) -> dict[str, LazyTensor]:
    """The weights under the names of the table, where the architecture stores several of them as one."""
    result = {}
    for name, tensor in (from_mxfp4(source) if names.packed else source).items():
        fused = next((key for key in names.fused if f".{key}." in name), None)
        if fused is not None:
            sizes = fused_rows(config, names.fused[fused], tensor.shape[0])
            starts = [0, *itertools.accumulate(sizes)]
            for part, start, stop in zip(names.fused[fused], starts, starts[1:], strict=False):
                result[name.replace(fused, part)] = tensor.rows(min(start, stop), stop)
        elif names.packed and (match := PACKED.search(name)):
            before, which, bias = name[: match.start()], match[1], bool(match[2])
            for part in ("gate_proj", "up_proj") if which == "gate_up_proj" else (which,):
                plain = f"{before}experts.{part}.{'bias' if bias else 'weight'}"
                result[plain] = _expert_part(tensor, part, names.packed, transposed=not bias)
        else:
            result[name] = tensor
    return result


def from_mxfp4(source: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The same, with weights that are stored as blocks and scales as (E, in, out) in bfloat16.

    A block (E, out, n, 16) holds 32 numbers of 4 bits in a row, two in a byte, the lower half first; its scale is a
    power of two, the exponent plus 127 (Rouhani et al. 2023, arXiv 2310.10537).
    """
    result = {}
    for name, tensor in source.items():
        scales = source.get(name.removesuffix(BLOCKS) + SCALES) if name.endswith(BLOCKS) else None
        if scales is not None and len(tensor.shape) == 4 and tensor.shape[:3] == scales.shape:
            E, out, n, half = tensor.shape
            shape = (E, n * half * 2, out)
            load = functools.partial(_load_mxfp4, tensor, scales)
            result[name.removesuffix(BLOCKS)] = LazyTensor(shape, torch.bfloat16, load)
        elif not (name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in source):
            result[name] = tensor
    return result


def _load_mxfp4(blocks: LazyTensor, scales: LazyTensor) -> Tensor:
    codes, exponents = blocks.load().to(torch.uint8), scales.load().to(torch.int32) - 127
    table = torch.tensor(FP4, dtype=torch.bfloat16)
    numbers = torch.stack([table[(codes & 15).int()], table[(codes >> 4).int()]], dim=-1).flatten(-2)  # (E, out, n, 32)
    return torch.ldexp(numbers, exponents[..., None]).flatten(2).mT


def fused_rows(config: Config, parts: tuple[str, ...], rows: int) -> list[int]:
    """How many rows of a fused weight each of its parts has."""
    if len(parts) == 3:
        heads = config.n_head, config.n_query_groups, config.n_query_groups
        return [n * config.head_size for n in heads]
    return [rows // len(parts)] * len(parts)


def _expert_part(tensor: LazyTensor, part: str, packed: str, transposed: bool) -> LazyTensor:
    """The gate, up or down projection of experts, (E, out, in), of weights (E, in, out) or (E, in, 2 * out)."""
    shape = list(tensor.shape)
    if part != "down_proj":
        shape[-1] //= 2
    if transposed:
        shape[1:] = shape[:0:-1]

    def load() -> Tensor:
        x = tensor.load()
        if part != "down_proj":
            n = x.size(-1) // 2
            up = part == "up_proj"
            x = x[..., int(up) :: 2] if packed == "interleaved" else x[..., n * up : n * (up + 1)]
        return (x.mT if transposed else x).contiguous()

    return LazyTensor(tuple(shape), tensor.dtype, load)


def packed_again(tensors: Mapping[str, LazyTensor], config: Config, names: Names) -> dict[str, LazyTensor]:
    """The inverse of unpacked."""
    result, groups = {}, {}
    for name, tensor in tensors.items():
        fused = next(((key, p) for key, parts in names.fused.items() for p in parts if f".{p}." in name), None)
        expert = re.search(r"experts\.(gate|up|down)_proj\.(weight|bias)$", name) if names.packed else None
        if fused is not None:
            groups.setdefault(name.replace(fused[1], fused[0]), []).append(tensor)
        elif expert:
            which = "down_proj" if expert[1] == "down" else "gate_up_proj"
            end = "_bias" if expert[2] == "bias" else ""
            groups.setdefault(f"{name[: expert.start()]}experts.{which}{end}", []).append(tensor)
        else:
            result[name] = tensor
    for name, parts in groups.items():
        result[name] = _packed(name, parts, names)
    return result


def _packed(name: str, parts: list[LazyTensor], names: Names) -> LazyTensor:
    transposed, first = "experts." in name and not name.endswith("_bias"), parts[0]
    if not (names.packed and "experts." in name):
        shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
        return LazyTensor(shape, first.dtype, lambda: torch.cat([part.load() for part in parts]))
    shape = (first.shape[0], *first.shape[:0:-1]) if transposed else first.shape

    def load() -> Tensor:
        loaded = [part.load().mT if transposed else part.load() for part in parts]
        joined = torch.stack(loaded, -1).flatten(-2) if names.packed == "interleaved" else torch.cat(loaded, -1)
        return joined.contiguous()

    return LazyTensor((*shape[:-1], shape[-1] * len(parts)), first.dtype, load)


def _joined(
    name: str,
    hf_names: tuple[str, ...],
    parts: tuple[LazyTensor, ...],
    shape: tuple[int, ...],
    config: Config,
    where: object,
    names: Names,
) -> LazyTensor:
    """One lit weight of the parts that it is made of. Raises ValueError for a shape that does not fit."""
    qkv, of_heads = ".qkv." in name, bool(EACH_HEAD.search(name)) and len(shape) == 3
    stacked, D = is_stack(name, names), config.head_size
    one = (shape[0], shape[2]) if of_heads else shape
    asked = [one[1:]] * len(parts) if stacked else [one]
    if qkv and len(parts) == 3:
        asked = [(heads * D, *shape[1:]) for heads in (config.n_head, config.n_query_groups, config.n_query_groups)]
    dtype = _checked(hf_names, parts, asked, where)
    if len(parts) == 1 and not qkv and not of_heads and not stacked:
        return parts[0]

    def load() -> Tensor:
        if stacked:
            stack = torch.empty(shape, dtype=dtype)
            for place, part in zip(stack, parts, strict=True):
                place.copy_(part.load())
            return stack
        loaded = [part.load().to(dtype) for part in parts]
        if of_heads:
            return in_our_order(loaded[0].flatten(), D, names).view(shape)
        if len(loaded) == 3:
            loaded[:2] = [in_our_order(x, D, names) for x in loaded[:2]]
        return join_qkv(tuple(loaded), config)

    return LazyTensor(shape, dtype, load)


def _checked(
    hf_names: tuple[str, ...], parts: tuple[LazyTensor, ...], asked: list[tuple[int, ...]], where: object
) -> torch.dtype:
    """The widest dtype of the parts. Raises ValueError for one of another shape than is asked for."""
    dtype = parts[0].dtype
    for name, part, shape in zip(hf_names, parts, asked, strict=True):
        if part.shape != shape or not part.dtype.is_floating_point:
            raise ValueError(
                f"{where} holds {name} as {list(part.shape)} {part.dtype}, which does not fit the {list(shape)} "
                "that its config.json asks for: download it again, or correct config.json."
            )
        dtype = torch.promote_types(dtype, part.dtype) if dtype != part.dtype else dtype
    return dtype


def in_our_order(x: Tensor, size: int, names: Names) -> Tensor:
    return from_neighbours(x, size) if names.neighbours else x


def to_hf(
    tensors: Mapping[str, LazyTensor], config: Config, architecture: str | Names | None = None
) -> dict[str, LazyTensor]:
    """Lit weights under Hugging Face names, still lazy. Raises ValueError for a weight that has no counterpart."""
    result, names = {}, chosen_names(architecture, config)
    for lit_name, tensor in tensors.items():
        wanted = hf_names_of(lit_name, config, names)
        if not wanted:
            raise ValueError(
                f"The weight {lit_name} has no counterpart in Hugging Face's models: it cannot be exported."
            )
        result |= _parts_of(lit_name, tensor, wanted, layer_config(lit_name, config), names)
    return packed_again(result, config, names)


def _parts_of(
    lit_name: str, tensor: LazyTensor, wanted: tuple[str, ...], config: Config, names: Names
) -> dict[str, LazyTensor]:
    """The weights of Hugging Face's that a lit weight holds, by name."""
    D = config.head_size
    if ".qkv." not in lit_name:
        if is_stack(lit_name, names):
            shape = tensor.shape[2:] if EACH_HEAD.search(lit_name) else tensor.shape[1:]
            parts = [tensor.rows(n, n + 1) for n in range(len(wanted))]
            return {n: LazyTensor(shape, p.dtype, lambda p=p: p.load().view(shape)) for n, p in zip(wanted, parts)}  # noqa: B905
        if EACH_HEAD.search(lit_name) and len(tensor.shape) == 3:
            flat = (tensor.shape[0], D)
            tensor = LazyTensor(flat, tensor.dtype, lambda load=tensor.load: _heads_out(load(), D, names).view(flat))
        return {wanted[0]: tensor}
    if len(wanted) == 1:
        return {wanted[0]: tensor._replace(load=_in_their_order(tensor, config))}
    parts = {}
    for group, name in zip("qkv", wanted, strict=True):
        part = tensor.rows(*group_rows(group, tensor.shape[0], config.n_head, config.n_query_groups))
        if names.neighbours and group != "v":
            part = part._replace(load=lambda load=part.load: to_neighbours(load(), D))
        parts[name] = part
    return parts


def _heads_out(x: Tensor, size: int, names: Names) -> Tensor:
    return to_neighbours(x.flatten(), size) if names.neighbours else x


def _in_their_order(qkv: LazyTensor, config: Config) -> Callable[[], Tensor]:
    return lambda: split_qkv(qkv.load(), 1, config)[0]
