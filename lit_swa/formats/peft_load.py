"""LoRA from the disk into a built model: what peft.py saved, any LoRA of PEFT's, and LongLoRA's releases.

LongLoRA keeps trained embeddings and norms in trainable_params.bin. The weights in the files decide what is changed;
every name and shape is checked before the model is.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from lit_swa.config import Config
from lit_swa.formats.adapter_files import load_finite
from lit_swa.formats.directory import ADAPTER_FILE, PEFT_CONFIG
from lit_swa.formats.files import LazyTensor, find_inside, open_pickle, open_safetensors, read_json
from lit_swa.formats.hugging_face import PREFIXES, WRAPPERS, from_neighbours, has_neighbours, join_qkv
from lit_swa.formats.peft import PEFT_STEM, Weights, hf_modules, reordered
from lit_swa.linear_formats import ALL, group_rows, is_plain
from lit_swa.lora import TARGETS, LoRAConfig, add_part, extra_modules, lora_linears, require_own_embedding, rows_of_part
from lit_swa.model import GPT

LONGLORA_STEM = "trainable_params"
FUSED = "fused"  # the queries, keys and values of GPT-NeoX, which has one A and one B for them
KNOWN_PEFT_KEYS = {  # any other key that is set asks for something that is not supported
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern", "revision", "target_modules",
    "trainable_token_indices",
    "task_type", "use_dora", "use_rslora", "megatron_core", "qalora_group_size", "runtime_config", "enable_lora",
    "merge_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # how the weights were initialised
}  # fmt: skip
# The ways to initialise A and B that leave the base as it is. PiSSA and its like take A and B's product out of it, so
# that their adapter belongs to other weights than the base's.
KEEPS_BASE = ("none", "true", "false", "gaussian", "orthogonal", "eva", "mica")
LORA_NAME = re.compile(r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_magnitude_vector)(\.[\w-]+?)?(\.weight)?")
PLAIN_PATTERN = re.compile(r"\^?[\w-]+(\\?\.[\w-]+)*\$?")  # an expression of PEFT's that is read: it cannot run long
TOKEN_ROWS = "trainable_tokens_delta"  # rows of the embedding that were trained alone
UNTRAINED = re.compile(r"\.original_module(\.[\w-]+)?$")  # what modules_to_save began as, which PEFT may store too
SAVED_NAME = re.compile(
    r"(?P<module>.+?)(\.modules_to_save(\.[\w-]+?)?|\.(?P<base>base_layer))?\.(?P<kind>weight|bias)"
)


@dataclass
class Found:
    """LoRA's tensors for one module: lora_A, lora_B and, for DoRA, lora_magnitude_vector."""

    own_name: str  # the module's in the model that was trained, which PEFT's patterns are for
    tensors: dict[str, LazyTensor] = field(default_factory=dict)


@dataclass
class Adapter:
    """A directory's content, checked against a model."""

    config: LoRAConfig
    parts: list[tuple[str, str, Weights]] = field(default_factory=list)  # layer, part of its rows, in our order
    saved: dict[str, Tensor] = field(default_factory=dict)  # lit weight -> what it becomes
    trained: set[str] = field(default_factory=set)  # those of `saved` that training goes on with
    rows: int = 0  # of wte and lm_head, once the adapter is in
    untie: bool = False  # lm_head gets a weight of its own, which it shared with wte


# -------------------------------------------------------------------------------------------------------------- reading


def load_adapter(model: GPT, directory: str | Path) -> LoRAConfig:
    """Give a built model the adapter of a directory: ours, one of PEFT's, or LongLoRA's release. Returns its config.

    As after add_lora, the LoRA and what was saved whole can be trained, and the rest is frozen. A larger vocabulary
    (an added pad token) makes the model's grow: rows that the file does not give are the mean of those there, as in
    LongLoRA. The model is unchanged unless all of it fits.
    Raises FileNotFoundError or ValueError in one sentence.
    """
    if lora_linears(model):
        raise ValueError("The model has a LoRA already: merge_lora folds it into the weights.")
    adapter = read_adapter(Path(directory), model)
    model.requires_grad_(False)
    with torch.no_grad():
        if adapter.untie and model.config.tie_embeddings:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
            model.config.tie_embeddings = False
        if adapter.rows > model.config.padded_vocab_size:
            grow_vocabulary(model, adapter.rows)
        for name, tensor in adapter.saved.items():
            model.get_parameter(name).copy_(tensor)
            model.get_parameter(name).requires_grad_(name in adapter.trained)
        for name, part, weights in adapter.parts:
            new = add_part(model, name, part, adapter.config, len(weights.A), weights.scaling)
            new.A.copy_(weights.A)
            new.B.copy_(weights.B)
            if weights.magnitude is not None:
                new.magnitude.copy_(weights.magnitude)
    return adapter.config


def grow_vocabulary(model: GPT, rows: int) -> None:
    """Add rows to wte and lm_head; each is the mean of those there."""
    wte, head = model.transformer.wte, model.lm_head
    for module in (wte, head):
        old = module.weight
        mean = old.float().mean(dim=0, keepdim=True).to(old.dtype).expand(rows - len(old), -1)
        module.weight = nn.Parameter(torch.cat([old, mean]), requires_grad=old.requires_grad)
    wte.num_embeddings = head.out_features = rows
    model.config.padded_vocab_size = model.config.vocab_size = rows
    model.tie_weights()


def read_adapter(directory: Path, model: GPT) -> Adapter:
    """The adapter in a directory, with every name and shape checked against the model, which is not changed."""
    path = find_adapter_config(directory)
    peft = read_json(path)
    check_peft_config(peft, path)
    modules = hf_modules(model)
    why = "the adapter was made for another model, or changes what is not supported"
    file, lora, saved = open_sorted(directory, PEFT_STEM, modules, why)
    if file is None:
        raise FileNotFoundError(
            f"{directory} holds {PEFT_CONFIG}, and its weights {PEFT_STEM}.safetensors are missing: put them there."
        )
    check_complete(lora, modules, peft, file)
    why = "give the base that it was trained on"
    more_file, _, also_saved = open_sorted(directory, LONGLORA_STEM, modules, why)
    if any(name.startswith(("transformer.wte.", "lm_head.")) for name, _ in (*saved, *also_saved)):
        require_own_embedding(model, f"load {directory}, which trains both, without it")
    config = config_of(peft, path)
    adapter = Adapter(config, rows=model.config.padded_vocab_size)
    rows = {name: saved.pop((name, False)) for name, _ in list(saved) if name.endswith(TOKEN_ROWS)}
    read_saved(adapter, saved, model, file)
    read_token_rows(adapter, rows, peft, model, file)
    read_saved(adapter, also_saved, model, more_file)
    check_saved(adapter, modules, peft, file)
    if "transformer.wte.weight" in adapter.trained and "lm_head" in extra_modules(model, ("embed",)):
        adapter.trained |= {"lm_head.weight"} & set(adapter.saved)  # also where it is a LoRA's base
    adapter.untie = unties(adapter, model, has_own_embedding(peft, modules) and not also_saved)
    for hf_name, found in lora.items():
        weights = read_weights(hf_name, found, peft, config, file)
        name, part, weights = placed(weights, *modules[hf_name], model)
        check_part(hf_name, name, part, weights, adapter, model, file)
        adapter.parts += [(name, part, weights)] if part != FUSED else split_fused(name, weights, directory, model)
    check_rows(adapter, model, file)
    adapter.config = with_targets(adapter)
    return adapter


def placed(weights: Weights, name: str, n: int, n_parts: int, model: GPT) -> tuple[str, str, Weights]:
    """(our layer, the part of its rows, the weights with rows in our order), of the n-th of so many layers of Hugging
    Face's that are one of ours."""
    rotated = has_neighbours(model.config) and n_parts == 3 and n < 2  # queries or keys
    if rotated and len(weights.B) % model.config.head_size == 0:
        weights = reordered(weights, model.config.head_size, from_neighbours)
    return name, ALL if not name.endswith(".attn.qkv") else "qkv"[n] if n_parts == 3 else FUSED, weights


def with_targets(adapter: Adapter) -> LoRAConfig:
    """The adapter's config, with the targets and extra weights that it holds."""
    return replace(
        adapter.config,
        targets=tuple(t for t in TARGETS if any(matches(t, name, part) for name, part, _ in adapter.parts)),
        extra_trainable=tuple(
            kind
            for kind, modules in (("embed", r"wte\."), ("norm", r"(norm_\w+|ln_f|_norm)\."))
            if any(re.search(modules, name) for name in adapter.trained)
        ),
    )


def matches(target: str, name: str, part: str) -> bool:
    pattern, of_target = TARGETS[target]
    return bool(pattern.search(name)) and part in (of_target, ALL)


def find_adapter_config(directory: Path) -> Path:
    if not directory.is_dir():
        raise FileNotFoundError(f"There is no adapter directory {directory}: give one.")
    if not (directory / PEFT_CONFIG).exists():
        raise FileNotFoundError(f"{directory} holds no {PEFT_CONFIG}: it is no LoRA adapter.")
    return find_inside(directory, PEFT_CONFIG)


def check_peft_dir(directory: Path) -> None:
    """Raises an error unless a LoRA's files are there. No numbers are read."""
    path = find_adapter_config(directory)
    check_peft_config(read_json(path), path)
    if open_tensors(directory, PEFT_STEM)[0] is None:
        raise FileNotFoundError(f"{directory} is no complete adapter: {PEFT_STEM}.safetensors is missing.")


def check_peft_config(peft: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError when the config asks for anything but LoRA as it is computed here."""
    if (kind := str(peft.get("peft_type"))[:40]) != "LORA":
        raise ValueError(f"{path} describes an adapter of type {kind!r}: only LORA is supported.")
    if peft.get("bias", "none") != "none":
        raise ValueError(f"{path} has bias={str(peft['bias'])[:40]!r}: only 'none' is supported.")
    if peft.get("fan_in_fan_out"):
        raise ValueError(f"{path} has fan_in_fan_out, which no supported model needs: set it to false.")
    if (start := str(peft.get("init_lora_weights"))[:40]).lower() not in KEEPS_BASE:
        raise ValueError(
            f"{path} has init_lora_weights={start!r}, so the adapter belongs to a changed base: make it a plain LoRA "
            "first, with path_initial_model_for_weight_conversion of PEFT's save_pretrained."
        )
    unknown = [key for key, value in peft.items() if key not in KNOWN_PEFT_KEYS and value not in (None, False, [])]
    if unknown:
        raise ValueError(f"{path} asks for {unknown[0][:60]}, which is not supported: merge it with PEFT.")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = peft.get(key) or {}
        if not isinstance(pattern, dict) or any(type(v) not in (int, float) for v in pattern.values()):
            raise ValueError(f"{path} has no proper {key}: it must give numbers by the modules' names.")
        for name in pattern:
            if not PLAIN_PATTERN.fullmatch(name):
                raise ValueError(f"{path} has the {key} {name[:80]!r}: only plain names are supported there.")


def config_of(peft: Mapping[str, Any], path: Path) -> LoRAConfig:
    """The LoRAConfig that adapter_config.json describes; targets are left to the weights. An error names the file."""
    try:
        return LoRAConfig(
            r=peft.get("r", 8),
            alpha=peft.get("lora_alpha", 8),
            dropout=peft.get("lora_dropout", 0.0),
            rslora=bool(peft.get("use_rslora")),
            dora=bool(peft.get("use_dora")),
        )
    except ValueError as error:
        raise ValueError(f"{path} does not describe a LoRA: {str(error)[:300]}") from None


def open_tensors(directory: Path, stem: str) -> tuple[Path | None, dict[str, LazyTensor]]:
    """The tensors of stem.safetensors or, read with weights_only=True, of stem.bin; none if there is neither."""
    for suffix, opener in ((".safetensors", open_safetensors), (".bin", open_pickle)):
        if (directory / (stem + suffix)).exists():
            path = find_inside(directory, stem + suffix)
            tensors = opener(path)
            for name, tensor in tensors.items():
                if not tensor.dtype.is_floating_point:
                    raise ValueError(f"{path} holds {name[:120]!r} as {tensor.dtype}: weights must be real numbers.")
            return path, tensors
    return None, {}


def open_sorted(
    directory: Path, stem: str, modules: Mapping[str, tuple[str, int, int]], why: str
) -> tuple[Path | None, dict[str, Found], dict[tuple[str, bool], LazyTensor]]:
    """(the file, None if there is none; its LoRA and its whole weights, as sort_tensors sorts them).

    Raises ValueError for a tensor that the model has no place for. why: what may have led to one, or what to do.
    """
    file, tensors = open_tensors(directory, stem)
    lora, saved, left = sort_tensors(tensors, modules)
    if left:
        raise ValueError(f"{file} holds {left[0][:120]!r}, which this model has no place for: {why}.")
    return file, lora, saved


def sort_tensors(
    tensors: Mapping[str, LazyTensor], modules: Mapping[str, tuple[str, int, int]]
) -> tuple[dict[str, Found], dict[tuple[str, bool], LazyTensor], list[str]]:
    """(LoRA's tensors by module and kind; whole weights by lit name and whether they are a LoRA's base; the rest)."""
    lora: dict[str, Found] = {}
    saved, left = {}, []
    for full_name, tensor in tensors.items():
        if UNTRAINED.search(full_name):
            continue
        own_name = re.sub(r"^(base_model\.model\.)*", "", WRAPPERS.sub("", full_name))
        name = re.sub(
            r"^embed_out\.", "lm_head.", own_name.replace(".token_adapter.", ".")
        )  # of GPT-NeoX, renamed in transformers 5
        for prefix, plain in PREFIXES.items():
            name = plain + name.removeprefix(prefix) if name.startswith(prefix) else name
        if (match := LORA_NAME.fullmatch(name)) and match["module"] in modules:
            found = lora.setdefault(match["module"], Found(LORA_NAME.fullmatch(own_name)["module"]))
            found.tensors[match["kind"]] = tensor
        elif name.endswith(f".{TOKEN_ROWS}") and name.removesuffix(f".{TOKEN_ROWS}") in modules:
            saved[f"{modules[name.removesuffix(f'.{TOKEN_ROWS}')][0]}.{TOKEN_ROWS}", False] = tensor
        elif (match := SAVED_NAME.fullmatch(name)) and modules.get(match["module"], ("", 0, 3))[2:] == (1,):
            lit = modules[match["module"]][0]
            key = f"{lit}.{match['kind']}", bool(match["base"])
            saved[key] = saved.get(key, tensor) if ".modules_to_save" in name else tensor  # the plain name counts
            left += [full_name] if lit.endswith(".attn.qkv") else []  # whose rows would have another order
        else:
            left.append(full_name)
    return lora, saved, left


def check_complete(lora: Mapping[str, Found], modules: Iterable[str], peft: Mapping[str, Any], file: Path) -> None:
    """Every changed module has its A and B, and the config names those that are changed, and no other."""
    if not lora:
        raise ValueError(f"{file} holds no LoRA for any layer of this model: give the base that it was trained on.")
    for name, found in lora.items():
        for kind in ("lora_A", "lora_B", *(("lora_magnitude_vector",) if peft.get("use_dora") else ())):
            if kind not in found.tensors:
                raise ValueError(f"{file} lacks {name}.{kind}: it is incomplete.")
        if "lora_magnitude_vector" in found.tensors and not peft.get("use_dora"):
            raise ValueError(f"{file} holds a DoRA for {name} and {PEFT_CONFIG} describes a LoRA: set use_dora there.")
    for name in modules:
        named = is_named(lora[name].own_name if name in lora else name, peft)
        if named and name not in lora:
            raise ValueError(
                f"{file} lacks a LoRA for {name}, which {PEFT_CONFIG} names: the adapter was made for another model."
            )
        if named is False and name in lora:
            raise ValueError(
                f"{file} holds a LoRA for {name}, which {PEFT_CONFIG} leaves out, as PEFT would: they do not belong "
                "together."
            )


def is_named(name: str, peft: Mapping[str, Any]) -> bool | None:
    """Whether adapter_config.json gives the module a LoRA, as PEFT reads it; None where only a regular expression says
    so: it is a stranger's program and is not run."""
    targets, layers = peft.get("target_modules"), peft.get("layers_to_transform")
    excluded, whole = peft.get("exclude_modules") or [], peft.get("modules_to_save") or []
    if not all(isinstance(names, list) for names in (targets, excluded, whole)) or peft.get("layers_pattern"):
        return None
    if not ends_as(name, targets) or ends_as(name, excluded) or any(f".{part}." in f".{name}." for part in whole):
        return False
    if name in targets or layers is None or layers == []:
        return True
    index = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return index is not None and int(index[1]) in (layers if isinstance(layers, list) else [layers])


def ends_as(name: str, ends: list[Any]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def value_for(name: str, patterns: Mapping[str, float] | None, default: float) -> float:
    """The value of the first pattern that fits a module's name, as PEFT reads them: a pattern fits the name's end, and
    with a caret the whole name only."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def read_weights(name: str, found: Found, peft: Mapping[str, Any], config: LoRAConfig, file: Path) -> Weights:
    """A module's tensors with its scaling, as PEFT computes it."""
    r = value_for(found.own_name, peft.get("rank_pattern"), config.r)
    alpha = value_for(found.own_name, peft.get("alpha_pattern"), config.alpha)
    A, B = found.tensors["lora_A"], found.tensors["lora_B"]
    if len(A.shape) != 2 or len(B.shape) != 2 or r < 1 or A.shape[0] != r or B.shape[1] != r:
        raise ValueError(
            f"{file} has the LoRA of {name} as {list(A.shape)} and {list(B.shape)}, and {PEFT_CONFIG} says that its "
            f"rank is {r}: they do not belong together."
        )
    loaded = {kind: load_finite(tensor, f"{name}.{kind}", file) for kind, tensor in found.tensors.items()}
    scaling = config.scaling(int(r), alpha)
    return Weights(loaded["lora_A"], loaded["lora_B"], scaling, loaded.get("lora_magnitude_vector"))


def check_part(hf_name: str, name: str, part: str, weights: Weights, adapter: Adapter, model: GPT, file: Path) -> None:
    """The shapes fit the layer."""
    linear = model.get_submodule(name)
    if name == "lm_head":
        adapter.rows = max(adapter.rows, len(weights.B))
    out = adapter.rows if name == "lm_head" else linear.out_features
    start, stop = (0, out) if part in (FUSED, ALL) else rows_of_part(model, name, part)
    m = weights.magnitude
    fits = weights.A.shape[1] == linear.in_features and len(weights.B) == stop - start
    if not fits or (m is not None and m.shape != (stop - start,)):
        raise ValueError(
            f"{file} has the LoRA of {hf_name} for {weights.A.shape[1]} inputs and {len(weights.B)} outputs, and the "
            f"model's layer has {linear.in_features} and {stop - start}: the adapter was made for another model."
        )


def split_fused(name: str, weights: Weights, directory: Path, model: GPT) -> list[tuple[str, str, Weights]]:
    """GPT-NeoX's A and B for all rows: as the q, k and v that we saved them from, else as one part, as in PEFT."""
    B = join_qkv((weights.B,), model.config)
    magnitude = None if weights.magnitude is None else join_qkv((weights.magnitude,), model.config)
    ours = directory / ADAPTER_FILE
    lora = read_json(find_inside(directory, ADAPTER_FILE)).get("lora") if ours.exists() else None
    targets = lora.get("targets") if isinstance(lora, dict) else None
    parts = [part for part in "qkv" if isinstance(targets, list) and part in targets]
    blocks = split_blocks(weights.A, B, parts, model.config) if parts else None
    if blocks is None:
        return [(name, ALL, replace(weights, B=B, magnitude=magnitude))]
    return [(name, p, Weights(*blocks[p], weights.scaling, of_rows(magnitude, p, model.config))) for p in blocks]


def rows_of(part: str, out_features: int, config: Config) -> tuple[int, int]:
    return group_rows(part, out_features, config.n_head, config.n_query_groups)


def of_rows(values: Tensor | None, part: str, config: Config) -> Tensor | None:
    return None if values is None else values[slice(*rows_of(part, len(values), config))]


def split_blocks(A: Tensor, B: Tensor, parts: list[str], config: Config) -> dict[str, tuple[Tensor, Tensor]] | None:
    """What joined_parts joined, taken apart; None if A (sum r, in) and B (out, sum r) are no such blocks."""
    r, rest = divmod(len(A), len(parts))
    if rest:
        return None
    left, result = B.clone(), {}
    for i, part in enumerate(parts):
        rows, columns = slice(*rows_of(part, len(B), config)), slice(i * r, (i + 1) * r)
        result[part] = (A[columns], B[rows, columns])
        left[rows, columns] = 0
    return None if left.any() else result


def read_saved(adapter: Adapter, saved: Mapping[tuple[str, bool], LazyTensor], model: GPT, file: Path | None) -> None:
    """The weights that are stored whole, checked; those of the vocabulary may have more rows than the model's."""
    for (name, is_base), tensor in saved.items():
        try:
            shape = tuple(model.get_parameter(name).shape)
        except AttributeError:
            raise ValueError(
                f"{file} holds {name}, which this model has no place for: give the base that it was trained on."
            ) from None
        vocabulary = name in ("transformer.wte.weight", "lm_head.weight")
        if vocabulary and tensor.shape[1:] == shape[1:] and tensor.shape[:1] > shape[:1]:
            adapter.rows = max(adapter.rows, tensor.shape[0])
        elif tensor.shape != shape:
            raise ValueError(
                f"{file} has {name} as {list(tensor.shape)} and the model has it as {list(shape)}: the adapter was "
                "made for another model."
            )
        if name in adapter.saved and is_base:
            continue
        adapter.saved[name] = load_finite(tensor, name, file)
        adapter.trained |= set() if is_base else {name}


def read_token_rows(
    adapter: Adapter, rows: Mapping[str, LazyTensor], peft: Mapping[str, Any], model: GPT, file: Path
) -> None:
    """The rows of the embedding that trainable_token_indices names, trained alone; a tied lm_head has them too."""
    indices, wte, head = peft.get("trainable_token_indices"), "transformer.wte", "lm_head"
    if not rows and not indices:
        return
    tied = model.config.tie_embeddings
    if not isinstance(indices, list) or f"{wte}.{TOKEN_ROWS}" not in rows or len(rows) > 1 + tied:
        raise ValueError(
            f"{file} and trainable_token_indices of {PEFT_CONFIG} do not fit: only a list, for the embedding, is read."
        )
    values = load_finite(rows[f"{wte}.{TOKEN_ROWS}"], f"{wte}.{TOKEN_ROWS}", file)
    weight = adapter.saved.get(f"{wte}.weight", model.transformer.wte.weight).detach().clone()
    whole = all(type(i) is int and 0 <= i < len(weight) for i in indices)
    if not whole or values.shape != (len(indices), weight.shape[1]):
        raise ValueError(
            f"{file} has {list(values.shape)} for the rows that trainable_token_indices of {PEFT_CONFIG} names, of an "
            f"embedding of {list(weight.shape)}: they do not belong together."
        )
    weight[indices] = values.to(weight)
    adapter.saved[f"{wte}.weight"] = weight
    adapter.trained.add(f"{wte}.weight")
    if tied and f"{head}.weight" in adapter.saved:
        adapter.saved[f"{head}.weight"] = weight


def check_saved(
    adapter: Adapter, modules: Mapping[str, tuple[str, int, int]], peft: Mapping[str, Any], file: Path
) -> None:
    """What modules_to_save names is stored; PEFT goes by how names end."""
    listed = peft.get("modules_to_save")
    for name, (lit, _, _) in modules.items():
        named = isinstance(listed, list) and any(name.endswith(str(end)) for end in listed)
        if named and f"{lit}.weight" not in adapter.saved:
            raise ValueError(f"{file} lacks {name}, which modules_to_save of {PEFT_CONFIG} names: it is incomplete.")


def check_rows(adapter: Adapter, model: GPT, file: Path) -> None:
    """What is stored of the vocabulary has equally many rows, and the model can grow to them."""
    if adapter.rows > model.config.padded_vocab_size and not is_plain(model.lm_head):
        raise ValueError(f"{file} has a larger vocabulary and the model's is quantised: load it into a dense model.")
    for name in ("transformer.wte.weight", "lm_head.weight"):
        if name in adapter.saved and len(adapter.saved[name]) < adapter.rows:
            raise ValueError(
                f"{file} has {name} with {len(adapter.saved[name])} rows and others of the vocabulary with "
                f"{adapter.rows}: they do not belong together."
            )


def has_own_embedding(peft: Mapping[str, Any], modules: Mapping[str, tuple[str, int, int]]) -> bool:
    """Whether PEFT gives the embedding a copy to train, which a tied lm_head does not follow."""
    name = next(hf_name for hf_name, (lit, _, _) in modules.items() if lit == "transformer.wte")
    listed = peft.get("modules_to_save")
    listed = any(name.endswith(str(end)) for end in listed) if isinstance(listed, list) else False
    return listed and not peft.get("ensure_weight_tying")


def unties(adapter: Adapter, model: GPT, own_embedding: bool) -> bool:
    """Whether a tied lm_head becomes another matrix than wte, as in PEFT when only one of them is trained.

    Where both are stored and equal, they stay tied. LongLoRA trains the tied one.
    """
    wte, head = (adapter.saved.get(f"{name}.weight") for name in ("transformer.wte", "lm_head"))
    if not model.config.tie_embeddings or (wte is None and head is None):
        return False
    if head is None:
        return own_embedding
    wte = model.transformer.wte.weight if wte is None else wte
    dtype = model.transformer.wte.weight.dtype
    if wte.shape != head.shape or not torch.equal(wte.to(dtype).cpu(), head.to(dtype).cpu()):
        return True
    adapter.saved["transformer.wte.weight"] = wte.detach()
    adapter.saved.pop("lm_head.weight")
    adapter.trained |= {"transformer.wte.weight"} if "lm_head.weight" in adapter.trained else set()
    adapter.trained.discard("lm_head.weight")
    return False
