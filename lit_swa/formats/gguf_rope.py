"""RoPE's scalings in GGUF files, in both directions. Llama 3's and LongRoPE's factors are tensors there."""

import itertools
import math
from typing import Any

from lit_swa.config import TRAINED_LENGTH, Config
from lit_swa.formats.gguf import GGUFFile
from lit_swa.rope import rope_attention_factor, rope_frequencies

LONG, SHORT, FREQS = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"
BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}
SCALING = "rope.scaling"


def read_scaling(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any]:
    """rope_scaling and block_size. A factor without a type is linear, and has an older name in files of 2023."""
    arch, context = file.architecture, fields["block_size"]
    scaling = f"{arch}.{SCALING}"
    older = file.get(f"{arch}.rope.scale_linear", float, 0.0)
    factor = file.get(f"{scaling}.factor", float, older)
    kind = file.get(f"{scaling}.type", str, "linear")
    kind = "none" if kind == "linear" and factor in (0, 1) else kind
    attention = file.get(f"{scaling}.attn_factor", float, 1.0)
    trained = file.get(f"{scaling}.original_context_length", int, context)
    if LONG in file.tensors and SHORT in file.tensors and kind in ("none", "longrope"):
        return {"rope_scaling": _longrope(file, attention, trained)}
    llama3 = _llama3(file, fields) if FREQS in file.tensors else None
    if kind not in ("none", "linear", "yarn") or kind != "yarn" and attention != 1 or kind != "none" and llama3:
        raise ValueError(
            f"{file.path} scales RoPE by {kind[:80]!r} with attn_factor {attention:g}{' and rope_freqs' * bool(llama3)}"
            ", which is not read from GGUF files: convert the model's Hugging Face checkpoint instead."
        )
    if not 0 <= factor < 1e9:
        raise ValueError(f"{file.path} scales RoPE by a factor of {factor:g}, which no model has: download it again.")
    if kind == "yarn":
        found = _yarn(file, factor or 1.0, trained, attention)
        return {"rope_scaling": found, "block_size": max(context, int(trained * found["factor"]))}
    return {"rope_scaling": {"type": kind, "factor": factor} if kind == "linear" else llama3}


def _yarn(file: GGUFFile, factor: float, trained: int, attention: float) -> dict[str, Any]:
    """llama.cpp multiplies by its own attn_factor; the model's attention_factor is yarn_attn_factor, which it skips."""
    scaling = f"{file.architecture}.{SCALING}.yarn"
    found: dict[str, Any] = {"type": "yarn", "factor": factor, TRAINED_LENGTH: trained}
    for name, usual in BETAS.items():
        value = file.get(f"{scaling}_{name}", float, usual)
        found |= {} if value == usual else {name: value}
    mscale = file.get(f"{scaling}_log_multiplier", float, 0.0)
    own = file.get(f"{scaling}_attn_factor", float, 0.0)
    if mscale:
        found |= {"mscale": 1.0, "mscale_all_dim": mscale}
    elif own or attention != 1:
        found["attention_factor"] = own or attention * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    if file.architecture == "gpt-oss":
        found["truncate"] = False  # so it was trained
    return found


def _longrope(file: GGUFFile, attention: float, trained: int) -> dict[str, Any]:
    short, long = file.numbers(SHORT), file.numbers(LONG)
    found = {"type": "longrope", "short_factor": short, "long_factor": long, TRAINED_LENGTH: trained}
    return found | {"attention_factor": attention}


def _llama3(file: GGUFFile, fields: dict[str, Any]) -> dict[str, Any] | None:
    """Llama 3.1's scaling. The file has the factors it leads to, one per frequency, but not its four parameters: take
    those that the releases use, or the trained length that the file names, and check that they lead to the same
    factors."""
    factors, theta = file.numbers(FREQS), fields["rope_base"]
    if set(factors) == {1.0}:
        return None
    told = file.get(f"{file.architecture}.{SCALING}.original_context_length", int, 8192)
    for high, trained in itertools.product((4.0, 1.0), {8192: None, told: None}):  # 1 is Llama 4's
        scaling = {
            "type": "llama3",
            "factor": max(factors),
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            TRAINED_LENGTH: trained,
        }
        expected = _llama3_factors(scaling, theta, len(factors))
        if all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(factors, expected, strict=True)):
            return scaling
    raise ValueError(
        f"{file.path} scales RoPE by factors that are not Llama 3.1's: convert the model's Hugging Face checkpoint "
        "instead."
    )


def _llama3_factors(scaling: dict[str, Any], theta: float, n: int) -> list[float]:
    """What each of n frequencies is divided by."""
    if not (0 < scaling["factor"] < math.inf and theta > 0):
        return [math.nan] * n
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for j in range(n):
        rotations = scaling[TRAINED_LENGTH] / (2 * math.pi * theta ** (j / n))
        smooth = (rotations - low) / (high - low) if high > low else float(rotations >= low)
        smooth = min(max(smooth, 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return factors


# --------------------------------------------------------------------------------------------------------------- out


def scaling_keys(config: Config, computed: str) -> dict[str, Any]:
    """computed: the scalings that llama.cpp has for the architecture."""
    scaling = config.rope_scaling or {"type": "none"}
    kind, keys = scaling["type"], {}
    if kind in ("linear", "yarn"):
        keys = {"type": kind, "factor": float(scaling["factor"])}
    if TRAINED_LENGTH in scaling:
        keys["original_context_length"] = scaling[TRAINED_LENGTH]
    if kind == "longrope":
        keys |= {"type": kind, "attn_factor": rope_attention_factor(scaling)}
    if kind == "yarn":
        keys |= {f"yarn_{name}": float(scaling[name]) for name in BETAS if name in scaling}
        if scaling.get("mscale") and scaling.get("mscale_all_dim") and "betas" in computed.split():
            keys["yarn_log_multiplier"] = float(scaling["mscale_all_dim"])
        else:
            keys["attn_factor"] = _yarn_share(scaling)
    return {f"{SCALING}.{key}": value for key, value in keys.items()}


def _yarn_share(scaling: dict[str, Any]) -> float:
    """llama.cpp's attn_factor comes on top of YaRN's usual one."""
    share = rope_attention_factor(scaling) / (0.1 * math.log(max(scaling["factor"], 1.0)) + 1.0)
    return 1.0 if math.isclose(share, 1.0, rel_tol=1e-6) else share


def scaling_tensors(config: Config) -> dict[str, list[float]]:
    """The tensors that a scaling takes in a file, by name."""
    scaling = config.rope_scaling or {"type": "none"}
    if scaling["type"] == "longrope":
        return {SHORT: list(map(float, scaling["short_factor"])), LONG: list(map(float, scaling["long_factor"]))}
    if scaling["type"] == "llama3":
        plain = Config.override(config, rope_scaling=None)
        return {FREQS: (rope_frequencies(plain)[0] / rope_frequencies(config)[0]).tolist()}
    return {}


def refuse_scaling(config: Config, computed: str) -> str | None:
    """Why llama.cpp would not compute the scaling of RoPE; None where it does."""
    scaling, computed = config.rope_scaling or {"type": "linear"}, computed.split()
    if scaling["type"] not in computed:
        return f"rope_scaling of type {scaling['type']}"
    others = [name for name, usual in BETAS.items() if scaling.get(name, usual) != usual]
    if others and "betas" not in computed:
        return f"rope_scaling with {others[0]}={scaling[others[0]]}"
    if scaling.get("truncate", True) is False and "truncate" not in computed:
        return "rope_scaling with truncate=False"
    return None


def canonical_scaling(config: Config) -> Any:
    """What a scaling computes, so that equal ones are equal."""
    scaling = config.rope_scaling
    if scaling is None:
        return None
    numbers = [scaling.get("factor"), scaling.get(TRAINED_LENGTH)]
    if scaling["type"] == "yarn":
        numbers += [scaling.get(name, usual) for name, usual in BETAS.items()] + [scaling.get("truncate", True)]
    if scaling["type"] == "longrope":
        numbers = [scaling[TRAINED_LENGTH], *scaling["short_factor"], *scaling["long_factor"]]
    if scaling["type"] == "llama3":
        numbers += [scaling["low_freq_factor"], scaling["high_freq_factor"]]
    return [scaling["type"], *numbers, rope_attention_factor(scaling)]
