"""Windows that change while a model is trained: short ones first, or one that each step draws.

A short window costs less, and what a layer cannot see it has to leave to layers that see everything, or to other
layers' windows on top of its own. A window that is drawn anew in each step (Cabannes et al. 2025, arXiv 2509.24552)
keeps a model from leaning on one.

Only the mixers are told the window of a step: which query sees which key is planned anew in every call, so nothing else
of the model changes. Its config, which is saved with it, keeps the last window, and so do validation and samples.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lit_swa.arguments import Pretraining
from lit_swa.config import VARIANTS, Config
from lit_swa.model import GPT

WINDOW = "sliding_window_size"
DRAW = 77  # tells these random numbers from others of the same seed and step


@dataclass(frozen=True)
class Windows:
    """The window of each step of a run."""

    last: int  # the config's
    schedule: tuple[tuple[int, int], ...]  # (window, from which step on it holds), in order; empty: each step draws one
    drawn: tuple[int, ...]  # the windows that it draws from
    seed: int

    def of_step(self, step: int) -> int:
        """A function of the seed and the step alone, so that a resumed run goes on with the same."""
        if self.schedule:
            return [window for window, first in self.schedule if first <= step][-1]
        return int(np.random.default_rng([self.seed, step, DRAW]).choice(self.drawn))

    def note(self, step: int) -> str:
        """What is said before a step that begins with another scheduled window; nothing before others."""
        begins = [window for window, first in self.schedule if first == step]
        return f"step {step}: a window of {begins[-1]}" if begins else ""


def plan_windows(args: Pretraining, config: Config, block_length: int) -> Windows | None:
    """The windows that the arguments ask for, None: that of the config throughout. Raises ValueError."""
    name = "window_schedule" if args.window_schedule is not None else "random_window"
    if getattr(args, name) is None:
        return None
    last = config.sliding_window_size
    if config.layer_windows is not None:
        raise ValueError(
            f"{name} changes the window of all layers, and layer_windows gives each its own: leave one out."
        )
    if not any(WINDOW in VARIANTS[variant].needs for variant in config.layer_variants):
        raise ValueError(
            f"{name} changes windows, and no layer has one with attention={config.attention!r}: leave it out, or set "
            "--model.attention and --model.sliding_window_size."
        )
    if last > block_length:
        raise ValueError(
            f"{name} ends at the window of {last} tokens, and a row has {block_length}: lower "
            "--model.sliding_window_size, or raise --block_length."
        )
    if name == "window_schedule":
        return Windows(last, read_schedule(args.window_schedule, last, args.max_steps), (), args.seed)
    least = args.random_window
    if not least < last:
        raise ValueError(
            f"random_window={least} leaves nothing to draw from: it must be less than sliding_window_size={last}."
        )
    doubled = [least * 2**n for n in range(last.bit_length()) if least * 2**n < last]
    return Windows(last, (), (*doubled, last), args.seed)


def read_schedule(text: str, last: int, steps: int) -> tuple[tuple[int, int], ...]:
    """256:0,512:0.3,1024:0.6 as (window, step) pairs. Raises ValueError."""
    try:
        pairs = [(int(window), float(start)) for window, start in (item.split(":") for item in text.split(","))]
    except ValueError:
        raise ValueError(
            f"window_schedule={text[:80]!r} does not fit: give windows and the part of the run from which on each "
            "holds, such as 256:0,512:0.3,1024:0.6."
        ) from None
    windows, starts = zip(*pairs, strict=True)
    rises = list(windows) == sorted(set(windows)) and list(starts) == sorted(set(starts))
    if not rises or windows[0] < 1 or starts[0] != 0 or not starts[-1] < 1:
        raise ValueError(
            f"window_schedule={text[:80]!r} is not in order: windows and starts must both rise, the first start must "
            "be 0 and the last one less than 1."
        )
    if windows[-1] != last:
        raise ValueError(
            f"window_schedule={text[:80]!r} ends at {windows[-1]}, and sliding_window_size is {last}: the last window "
            "is what the model is saved with, so both must be the same."
        )
    return tuple((window, round(start * steps)) for window, start in pairs)


def set_window(model: GPT, window: int) -> None:
    """Let every layer that has a window see so many keys. The model's config stays as it is."""
    config = model.config if window == model.config.sliding_window_size else replace(model.config, **{WINDOW: window})
    model.rope.config = config  # a query may be rotated to a place in its window
    for mixer in (attn.mixer for attn in model.layers):
        row = getattr(mixer, "row", None)
        if row is not None and WINDOW in row.needs:
            mixer.config, mixer.window = config, row.window(config)


def window_of(run: Any, model: GPT, step: int) -> Any:
    """Within it the model has the window of a step. run: lit_swa.training.pretraining.PretrainingRun."""
    if run.windows is None:
        return nullcontext()
    if note := run.windows.note(step):
        run.log.say(note)
    return changed_window(model, run.windows.of_step(step), run.windows.last)


@contextmanager
def changed_window(model: GPT, window: int, last: int) -> Iterator[None]:
    """Within it the model's layers have this window, and behind it the last one."""
    set_window(model, window)
    try:
        yield
    finally:
        set_window(model, last)
