"""Ways to read texts beyond the trained length, or with fewer keys: each a set of fields of the model's config.

The weights do not change, and the fields may depend on the length of the text.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Setup(NamedTuple):
    """What the methods make their fields from, besides the length."""

    trained_length: int
    window: int
    n_sink_tokens: int
    dual_chunk_size: int | None
    dual_chunk_local: int | None


Method = Callable[[int, Setup], dict[str, Any]]  # length of a window -> the fields of the config to read it with


def rope(length: int, s: Setup) -> dict[str, Any]:
    """Plain RoPE, also at positions beyond those of training."""
    return {"block_size": max(length, s.trained_length)}


def scaled(kind: str, with_trained_length: bool = False) -> Method:
    """RoPE scaled by the factor length / trained length, or 1 within the trained length."""

    def fields(length: int, s: Setup) -> dict[str, Any]:
        scaling: dict[str, Any] = {"type": kind, "factor": max(1.0, length / s.trained_length)}
        if with_trained_length:
            scaling["original_max_position_embeddings"] = s.trained_length
        return rope(length, s) | {"rope_scaling": scaling}

    return fields


def sliding(length: int, s: Setup) -> dict[str, Any]:
    return {"attention": "sliding", "sliding_window_size": s.window, "rolling_kv_cache": True}


def streaming(length: int, s: Setup) -> dict[str, Any]:
    return {"attention": "streaming", "sliding_window_size": s.window, "n_sink_tokens": s.n_sink_tokens}


def dual_chunk(length: int, s: Setup) -> dict[str, Any]:
    own = {"dual_chunk_size": s.dual_chunk_size, "dual_chunk_local": s.dual_chunk_local}
    own = {name: value for name, value in own.items() if value is not None}
    return rope(length, s) | {"attention": "dual_chunk", "dual_chunk_pretraining_length": s.trained_length} | own


METHODS: dict[str, Method] = {
    "rope": rope,
    "linear": scaled("linear"),
    "ntk": scaled("ntk"),
    "dynamic": scaled("dynamic", with_trained_length=True),
    "yarn": scaled("yarn", with_trained_length=True),
    "sliding": sliding,
    "streaming": streaming,
    "dual_chunk": dual_chunk,
}


def choose_methods(names: list[str] | None, custom: dict[str, dict[str, Any]]) -> dict[str, Method]:
    """The methods of these names, and the custom ones, in the order of the tables. Raises ValueError."""
    names = [name for name in METHODS if name != "dynamic"] if names is None else names
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(
            f"There is no method {unknown[0]!r}: choose from {', '.join(METHODS)}, or define it by --custom."
        )
    if taken := [name for name in custom if name in METHODS]:
        raise ValueError(f"custom: {taken[0]!r} is the name of a method already: choose another.")
    own = {name: lambda length, s, fields=fields: rope(length, s) | fields for name, fields in custom.items()}
    if not names and not own:
        raise ValueError("methods is empty: give at least one.")
    return {name: METHODS[name] for name in names} | own
