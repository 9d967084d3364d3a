"""Positions: what is known of a call's, and the rotary embedding with its scalings for texts longer than trained on."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

if __package__:
    from .config import LONGROPE_LISTS, TRAINED_LENGTH, Config
else:  # copied beside a script of another project
    from config import LONGROPE_LISTS, TRAINED_LENGTH, Config


class Span(NamedTuple):
    """What is known of a call outside the device. None and False: not known, as in a compiled step."""

    uniform: bool  # all sequences are at the same positions, and none is padding
    first: int | None = None  # position of a uniform call
    last: int | None = None  # the greatest position of all sequences
    contiguous: bool = False  # in every sequence each position is the one before + 1
    fresh: bool = False  # every sequence is at 0 .. T - 1: nothing cached matters
    looked: bool = False  # the host looked at the positions, so it may look at the cache too
    dtype: torch.dtype = torch.float32  # what the model computes in
    prompt: bool = False  # the caller says that the tokens are a prompt


def find_span(pos: Tensor, maxp1: int | None) -> Span:
    """Look at positions (T,) or (B, T) where that costs nothing: on a CPU, and on a GPU for more than one token."""
    uniform, T = pos.dim() == 1, pos.size(-1)
    if pos.is_meta or pos.numel() == 0:
        return Span(uniform, contiguous=T == 1)
    if T == 1 and pos.device.type != "cpu":
        last = None if maxp1 is None else maxp1 - 1
        return Span(uniform, last if uniform else None, last, contiguous=True)
    if pos.numel() == 1:
        first = last = last_start = int(pos)
        contiguous = True
    else:
        in_step = (pos.diff(dim=-1) == 1).all()
        found = torch.stack([pos.min(), pos.max(), in_step, pos[..., 0].max()])
        first, last, contiguous, last_start = found.tolist()
    uniform = uniform or (pos.size(0) == 1 and first >= 0)
    fresh = bool(contiguous) and first == last_start == 0
    return Span(uniform, first if uniform else None, last, bool(contiguous), fresh, looked=True)


class RoPE(nn.Module):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) rotates pairs (x_i, x_{i + n/2}) by position * f_i.

    A frequency is held as a part of a turn, in units of 2^-64, and multiplied by the position in int64: what overflows
    are whole turns. So distances turn by the same angle at any position, whatever the model's dtype; in float32, the
    product would be off by 0.06 at position 1,000,000.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device()  # where the weights go; real numbers even in a model of meta tensors
        turns = turns_of(rope_frequencies(config)).to("cpu" if device.type == "meta" else device)
        self.register_buffer("turns", turns, persistent=False)  # int64 (bases, rope_n_elem / 2)
        # Llama 4's norm comes behind RoPE, and divides out again what queries and keys are multiplied by.
        normed = config.norm_qk and config.norm_qk_type == "plain"
        self.attention_factor = 1.0 if normed else rope_attention_factor(config.rope_scaling)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RoPE":
        """Follow the model to another device, from the meta device too."""
        super()._apply(fn, recurse)
        self.turns = turns_of(rope_frequencies(self.config)).to(self.turns.device)
        return self

    def depends_on_length(self, base: int | None = 0) -> bool:
        """True if the angles at this base change as a text grows: keys are then cached before they are rotated."""
        return base == 0 and (self.config.rope_scaling or {}).get("type") in LENGTH_SCALINGS

    def forward(self, pos: Tensor, base: int | None = 0, length: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin, (1 or B, 1, T, rope_n_elem) each, for positions (1 or B, T) at one of the bases; None:
        all angles are 0.

        length: tokens seen so far, (1 or B, 1), where the angles depend on it.
        """
        turns = torch.zeros_like(self.turns[0]) if base is None else self.turns[base]
        if length is not None:
            scaling = self.config.rope_scaling
            turns = LENGTH_SCALINGS[scaling["type"]](self.turns, scaling, length)[:, None, None]  # (1 or B, 1, 1, ...)
        angles = (pos[:, None, :, None].long() * turns).float() * (math.pi / 2**63)
        cos, sin = angles.cos(), angles.sin()
        if base == 0 and self.attention_factor != 1.0:
            cos, sin = cos * self.attention_factor, sin * self.attention_factor
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

    def angles(
        self,
        q_pos: Tensor,
        k_pos: Tensor,
        base: int | None,
        key_position: Callable[[Tensor, Config], Tensor],
        positions: Sequence[Callable[[Tensor, Config], Tensor]],
    ) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor], bool]:
        """(cos, sin) of queries at q_pos (1 or B, T), for each of the positions that they are rotated to, and of keys;
        and whether the keys are those at k_pos (1 or B, L), which are rotated when they are read, and not the call's.
        """
        if self.depends_on_length(base):
            length = q_pos.amax(dim=-1, keepdim=True) + 1  # (1 or B, 1)
            return [self(q_pos, base, length)] * len(positions), self(k_pos, base, length), True
        made = {f: self(f(q_pos, self.config), base) for f in {key_position, *positions}}
        return [made[f] for f in positions], made[key_position], False


def join_angles(angles: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(cos, sin) of pieces of a sequence, joined."""
    cos, sin = zip(*angles, strict=True)
    return torch.cat(cos, dim=2), torch.cat(sin, dim=2)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of the first rope_n_elem elements of every head of x (B, H, T, D), in float32 at least.

    (a, b) becomes (a cos - b sin, b cos + a sin).
    """
    n = cos.size(-1)
    head = x if n == x.size(-1) else x[..., :n]
    head = head.to(torch.promote_types(x.dtype, torch.float32))
    crossed = head.roll(n // 2, dims=-1) * sin  # sin holds the signs of both halves
    rotated = (head * cos + crossed).to(x.dtype)  # in this order the gradient lies in memory as x does
    return rotated if n == x.size(-1) else torch.cat([rotated, x[..., n:]], dim=-1)


def unrotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In the place of apply_rope, where all angles are 0."""
    return x


def chunk_temperature(q_pos: Tensor, config: Config) -> Tensor | float | None:
    """A factor for the scores, (1 or B, 1, T, 1), static or by the query's position. The paper's code takes the text's
    length instead, and would read a token differently in a prompt and in a step."""
    if config.dual_chunk_temperature_slope is not None:
        length = (q_pos + 1).clamp(min=1) / config.chunk_trained
        factor = (1 + config.dual_chunk_temperature_slope * length.log()).clamp(min=1)
        return (factor**config.dual_chunk_temperature_power)[:, None, :, None]
    return None if config.dual_chunk_temperature == 1.0 else config.dual_chunk_temperature


def position_temperature(q_pos: Tensor, config: Config) -> Tensor:
    """A factor for the scores, (1 or B, 1, T, 1), that grows by steps of temperature_length tokens (Llama 4, 2025; the
    idea is in Nakanishi 2025, arXiv 2501.19399)."""
    steps = (q_pos + config.temperature_offset).clamp(min=0) // config.temperature_length
    return (1 + config.temperature_slope * (1 + steps).log())[:, None, :, None]


def turns_of(frequencies: Tensor) -> Tensor:
    """Angles per position as parts of a turn, int64, in units of 2^-64; what is more than half a turn is negative."""
    turns = frequencies.double() / (2 * math.pi)
    return ((turns - turns.round()) * 2.0**64).long()


def rope_frequencies(config: Config) -> Tensor:
    """Angles per position, float32 (bases, rope_n_elem / 2): rope_base's, scaled; those of config.more_bases; and
    LongRoPE's for long texts."""
    exponents = torch.arange(0, config.rope_n_elem, 2, device="cpu", dtype=torch.float32) / max(1, config.rope_n_elem)
    plain, scaling = 1.0 / config.rope_base**exponents, config.rope_scaling or {"type": None}
    more = [1.0 / base**exponents for base in config.more_bases]
    if scaling["type"] == "longrope":
        short, long = (plain / torch.tensor(scaling[key], device="cpu", dtype=torch.float32) for key in LONGROPE_LISTS)
        return torch.stack([short, *more, long])
    scale = ROPE_SCALINGS.get(scaling["type"], keep)
    return torch.stack([scale(plain, scaling, config), *more])


# Scalings of a model's frequencies f. A factor of 1 is the identity for each of them.


def scale_linear(f: Tensor, scaling: dict, config: Config) -> Tensor:
    """Position interpolation (Chen et al. 2023, arXiv 2306.15595): position / factor."""
    return f / scaling["factor"]


def scale_ntk(f: Tensor, scaling: dict, config: Config) -> Tensor:
    """Neural tangent kernel scaling (bloc97, 2023): base * factor^(D / (D - 2)); the shortest wave stays as it is."""
    return f * scaling["factor"] ** -ntk_exponents(f)


def ntk_exponents(f: Tensor) -> Tensor:
    """How the factor by which the lowest frequency is divided spreads over all: 0 for the highest, 1 for the lowest."""
    return torch.arange(f.size(-1), device=f.device, dtype=torch.float32) / (f.size(-1) - 1)


def scale_yarn(f: Tensor, scaling: dict, config: Config) -> Tensor:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): short waves are kept, long ones stretched, those between blended.

    The blend is linear in the index of the dimension, as in the reference and in transformers; the paper's is linear in
    the number of rotations.
    """
    n, trained = 2 * f.size(-1), scaling[TRAINED_LENGTH]

    def index_of(rotations: float) -> float:
        """The (real-valued) index of the wave that rotates so often within the trained length."""
        return n * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_base))

    low, high = index_of(scaling.get("beta_fast", 32)), index_of(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n - 1)
    index = torch.arange(f.size(-1), device=f.device, dtype=torch.float32)
    stretched = ((index - low) / (high - low or 0.001)).clamp(0, 1)
    return stretched * f / scaling["factor"] + (1 - stretched) * f


def scale_llama3(f: Tensor, scaling: dict, config: Config) -> Tensor:
    """Llama 3.1: long waves are stretched by the factor, short ones kept, those between blended."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    rotations = scaling[TRAINED_LENGTH] * f / (2 * math.pi)  # within the trained length
    kept = ((rotations - low) / (high - low)).clamp(0, 1) if low < high else (rotations >= low).to(f.dtype)
    return kept * f + (1 - kept) * f / factor


def keep(f: Tensor, scaling: dict, config: Config) -> Tensor:
    return f


def scale_dynamic(turns: Tensor, scaling: dict, length: Tensor) -> Tensor:
    """Dynamic NTK (emozilla, 2023) for texts of `length` (1 or B, 1) tokens so far: int64 (1 or B, rope_n_elem / 2)."""
    stretch = (length / scaling[TRAINED_LENGTH]).clamp(min=1.0)
    factor = scaling["factor"] * stretch - (scaling["factor"] - 1)
    return (turns[0] * factor ** -ntk_exponents(turns)).long()


def scale_longrope(turns: Tensor, scaling: dict, length: Tensor) -> Tensor:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): a searched factor per frequency, others once a text is long."""
    return torch.where(length > scaling[TRAINED_LENGTH], turns[-1], turns[0])


ROPE_SCALINGS: dict[str, Callable[[Tensor, dict, Config], Tensor]] = {
    "linear": scale_linear,
    "ntk": scale_ntk,
    "dynamic": keep,
    "yarn": scale_yarn,
    "llama3": scale_llama3,
    "longrope": keep,
}
LENGTH_SCALINGS: dict[str, Callable[[Tensor, dict, Tensor], Tensor]] = {  # config.LENGTH_DEPENDENT
    "dynamic": scale_dynamic,
    "longrope": scale_longrope,
}


def rope_attention_factor(scaling: dict | None) -> float:
    """What YaRN and LongRoPE multiply queries and keys with, by way of cos and sin."""
    if scaling is None or scaling["type"] not in ("yarn", "longrope"):
        return 1.0
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    factor = scaling.get("factor", 1.0)
    if factor <= 1:
        return 1.0
    if scaling["type"] == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(scaling[TRAINED_LENGTH]))
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        above, below = (0.1 * scaling[key] * math.log(factor) + 1 for key in ("mscale", "mscale_all_dim"))
        return above / below
    return 0.1 * math.log(factor) + 1
