"""Draw who sees whom, and what a rolling cache holds: python scripts/plot_masks.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

MISS, SEE, OWN = "#f2f2f2", "#4c78a8", "#f58518"


def main(
    output: Path = Path("tutorials/results/masks.png"), tokens: int = 20, window: int = 6, cache_window: int = 4
) -> None:
    """Write a picture of every variant's mask, made by the mask functions themselves, and of a real cache's slots.

    Args:
        output: The picture; a .json beside it holds what was drawn.
        tokens: Queries and keys in each mask.
        window: The sliding window of the masks.
        cache_window: The sliding window of the cache, which has twice as many slots.
    """
    if min(tokens, window, cache_window) < 1 or max(tokens, cache_window) > 100:
        raise ValueError("tokens, window and cache_window must be between 1 and 100.")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from lit_swa.files import write_json
    from lit_swa.model import VARIANTS

    masks = {name: mask_of(name, tokens, window) for name in VARIANTS}
    history = cache_history(cache_window)
    figure, axes = plt.subplots(
        1,
        len(masks) + 1,
        figsize=(4.2 * len(masks) + 6.5, 4.6),
        width_ratios=[1] * len(masks) + [1.5],
        layout="constrained",
    )
    for axis, (name, mask) in zip(axes, masks.items(), strict=False):
        draw_mask(axis, mask)
        axis.set_title(name + (f", S = {window}" if VARIANTS[name].window(config_of(name, window)) else ""))
    draw_cache(axes[-1], history, cache_window)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    write_json(
        output.with_suffix(".json"),
        {
            "command": "python scripts/plot_masks.py",
            "tokens": tokens,
            "window": window,
            "cache_window": cache_window,
            "keys_seen_by_the_last_query": {name: int(sum(mask[-1])) for name, mask in masks.items()},
            "cache": history,
        },
    )
    print(output)


def config_of(variant: str, window: int):
    from lit_swa import Config

    return Config(
        n_layer=1,
        n_head=2,
        n_embd=8,
        vocab_size=8,
        attention=variant,
        sliding_window_size=window,
        rolling_kv_cache=True,
    )


def mask_of(variant: str, tokens: int, window: int) -> list[list[bool]]:
    """[query][key], from the function that the model uses."""
    import torch

    from lit_swa.model import visible

    pos = torch.arange(tokens)[None]
    return visible(variant, pos, pos, config_of(variant, window))[0].tolist()


def cache_history(window: int) -> list[dict]:
    """Feed a model token by token, and after each note the positions in its slots and the slots that the step read."""
    import torch

    from lit_swa import GPT
    from lit_swa.model import find_span

    model = GPT(config_of("sliding", window)).eval()
    model.set_kv_cache(1, 4 * window)
    slot_map, history = model.slot_maps["sliding"], []
    with torch.no_grad():
        for p in range(2 * window + 2):
            pos = torch.tensor([p])
            model(torch.zeros(1, 1, dtype=torch.long), pos)
            read, _ = slot_map.view(1, find_span(pos, None), window)
            history.append({"position": p, "slots": slot_map.pos[0].tolist(), "read": [read.start, read.stop]})
    return history


def draw_mask(axis, mask: list[list[bool]]) -> None:
    from matplotlib.colors import ListedColormap

    n = len(mask)
    colours = [[2 if i == j else int(mask[i][j]) for j in range(n)] for i in range(n)]
    axis.imshow(colours, cmap=ListedColormap([MISS, SEE, OWN]), vmin=0, vmax=2)
    axis.set(xlabel="key position", ylabel="query position", xticks=range(0, n, 5), yticks=range(0, n, 5))
    axis.set_xticks([i - 0.5 for i in range(1, n)], minor=True)
    axis.set_yticks([i - 0.5 for i in range(1, n)], minor=True)
    axis.grid(which="minor", color="white", linewidth=0.8)
    axis.tick_params(which="both", length=0)


def draw_cache(axis, history: list[dict], window: int) -> None:
    from matplotlib.patches import Rectangle

    n_slots = len(history[0]["slots"])
    for row, step in enumerate(history):
        for slot, position in enumerate(step["slots"]):
            face = OWN if position == step["position"] else MISS if position < 0 else "#b9cde5"
            axis.add_patch(Rectangle((slot, row), 1, 1, facecolor=face, edgecolor="white"))
            axis.text(
                slot + 0.5, row + 0.5, str(position) if position >= 0 else "", ha="center", va="center", fontsize=9
            )
        start, stop = step["read"]
        axis.add_patch(
            Rectangle(
                (start + 0.04, row + 0.06), stop - start - 0.08, 0.88, fill=False, edgecolor="black", linewidth=1.6
            )
        )
    axis.axvline(n_slots / 2, color="black", linestyle=":", linewidth=1)
    axis.set(
        xlim=(0, n_slots),
        ylim=(len(history), 0),
        xlabel="slot",
        ylabel="token just fed",
        title=f"rolling cache, S = {window}: positions in its {n_slots} slots\n(orange: written now; frame: read)",
    )
    axis.set_xticks([s + 0.5 for s in range(n_slots)], range(n_slots))
    axis.set_yticks([r + 0.5 for r in range(len(history))], [step["position"] for step in history])
    axis.tick_params(length=0)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
