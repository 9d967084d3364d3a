"""Draw who sees whom, at which distance, and what a rolling cache holds: python scripts/plot_masks.py."""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

if TYPE_CHECKING:
    from lit_swa import Config

UNSEEN = "#F0F0F0"
TITLES = {  # of what the fields of a config make
    "sliding": "sliding, S = {sliding_window_size}",
    "chunked": "chunked, s = {attention_chunk_size}",
    "streaming": "streaming, {n_sink_tokens} sinks, S = {sliding_window_size}",
    "dual_chunk": "dual_chunk, s = {dual_chunk_size}, w = {dual_chunk_local}",
}


class Grid(NamedTuple):
    """What is drawn of one mask; a key that the query does not see is 0 in `part` and NaN in `distance`."""

    title: str
    names: list[str]  # of the parts
    part: list[list[int]]  # [query][key], from 1
    distance: list[list[float]]  # [query][key]


def main(
    output_dir: Path = Path("tutorials/results"),
    tokens: int = 16,
    window: int = 5,
    sinks: int = 2,
    chunk: int = 5,
    local: int = 3,
    group: int = 4,
    cache_window: int = 4,
) -> None:
    """Write masks.png, distances.png and rope_scalings.png, and for each a .json that holds what was drawn.

    Everything comes from the model's own functions: masks and distances of every variant, the groups of S2-Attn from
    the attention of a model in training mode, a cache's slots from a model that is fed, the frequencies of RoPE.

    Args:
        output_dir: The directory that the files go to.
        tokens: Queries and keys in each mask.
        window: The sliding_window_size of the masks.
        sinks: The n_sink_tokens of streaming.
        chunk: The dual_chunk_size.
        local: The dual_chunk_local.
        group: The s2_group_size.
        cache_window: The sliding window of the cache, which has twice as many slots.
    """
    from lit_swa.checks import check_range
    from lit_swa.formats.files import write_json
    from lit_swa.plots import require_matplotlib, save_picture
    from lit_swa.utils import describe_command

    check_range("tokens", tokens, 1, 100)
    check_range("cache_window", cache_window, 1, 100)
    require_matplotlib()
    fields = {
        "sliding_window_size": window,
        "n_sink_tokens": sinks,
        "attention_chunk_size": chunk,
        "dual_chunk_pretraining_length": chunk + local + 1,
        "dual_chunk_size": chunk,
        "dual_chunk_local": local,
        "s2_group_size": group,
    }
    (masks, distances), history, stretches = all_grids(tokens, fields), cache_history(cache_window), rope_stretches()
    command, sizes = {"command": describe_command()}, {"tokens": tokens, "fields": fields}
    mask_records = {name: mask_record(grid) for name, grid in masks.items()}
    distance_records = {name: distance_record(grid) for name, grid in distances.items()}
    contents = {
        "masks": sizes | {"masks": mask_records, "cache_window": cache_window, "cache": history},
        "distances": sizes | {"distances": distance_records},
        "rope_scalings": stretches,
    }
    for name, content in contents.items():
        content = command | content
        save_picture(output_dir / f"{name}.png", lambda plt, content=content: draw(plt, content))
        write_json(output_dir / f"{name}.json", content)
        print(output_dir / f"{name}.png")


# -------------------------------------------------------------------------------------------------- from the model


def build_config(variant: str, **fields: Any) -> "Config":
    """A small config of the variant, with those of the fields that it reads or needs."""
    from lit_swa import Config
    from lit_swa.config import VARIANTS, fields_read

    own = fields_read(variant)
    others = {name for other in VARIANTS for name in fields_read(other)} - own
    fields = {name: value for name, value in fields.items() if name not in others}
    return Config(n_layer=1, n_head=2, n_embd=8, vocab_size=8, attention=variant, rolling_kv_cache=True, **fields)


def all_grids(tokens: int, fields: dict[str, Any]) -> tuple[dict[str, Grid], dict[str, Grid]]:
    """What the picture of the masks and that of the distances show."""
    from lit_swa.model import VARIANTS

    configs = {name: build_config(name, **fields) for name, row in VARIANTS.items() if row.parts}
    grids = {name: grid_of_variant(config, tokens) for name, config in configs.items()}
    straight, shifted = grids_of_s2(fields["s2_group_size"], tokens)
    linear = grid_of_variant(build_config("full", rope_scaling={"type": "linear", "factor": 2.0}), tokens)
    linear = linear._replace(title="full, linear scaling by 2")
    masks = grids | {"s2 straight": straight, "s2 shifted": shifted}
    return masks, grids | {"full, linear": linear, "s2 shifted": shifted}


def grid_of_variant(config: "Config", tokens: int) -> Grid:
    """Which part of the variant lets a query see a key, and at which relative position."""
    import torch

    from lit_swa.model import VARIANTS, visible

    row, pos = VARIANTS[config.attention], torch.arange(tokens)[None]
    part = torch.zeros(tokens, tokens, dtype=torch.long)
    distance, unit = torch.full((tokens, tokens), math.nan), unit_of_distance(config)
    for n, p in enumerate(row.parts):
        seen = visible(p, pos, pos, config)[0]
        apart = p.position(pos, config)[0, :, None] - row.key_position(pos, config)[0]
        part[seen], distance[seen] = n + 1, (apart * unit)[seen]
    title = TITLES.get(config.attention, config.attention).format(**vars(config))
    names = [p.mask.__name__.replace("_", " ") for p in row.parts]
    return Grid(title, names, part.tolist(), distance.tolist())


def grids_of_s2(group: int, tokens: int) -> list[Grid]:
    """Of a straight and a shifted head, in training mode. All scores are 0 and the values are unit vectors, so that a
    query's output holds the weight that each key got."""
    import torch

    from lit_swa import GPT

    config = build_config("full", s2_attention=True, s2_group_size=group)
    full = grid_of_variant(config, tokens)  # S2-Attn rotates queries and keys as full attention does
    model = GPT(config).train()
    plan = model.plan_call(torch.zeros(1, tokens, dtype=torch.long), None).plans["full"]
    q = torch.zeros(1, config.n_head, tokens, config.head_size)
    v = torch.eye(tokens).expand(1, config.n_head, tokens, tokens)
    weights = model.layers[0].mixer.attend([q], q, v, plan)[0]  # (H, T, T)
    grids = []
    for kind, seen in (("straight", weights[0] > 0), ("shifted", weights[-1] > 0)):
        distance = torch.tensor(full.distance).where(seen, math.nan)
        title = f"S2, groups of {group}, {kind} heads"
        grids.append(Grid(title, ["same group"], seen.long().tolist(), distance.tolist()))
    return grids


def unit_of_distance(config: "Config") -> float:
    """What RoPE's frequencies, one like the other, are multiplied by: 1 / factor for linear scaling."""
    from lit_swa.rope import rope_frequencies

    plain = rope_frequencies(build_config("full"))
    ratios = rope_frequencies(config) / plain
    if not ratios.allclose(ratios[:, :1]):
        raise ValueError(
            "This scaling changes each frequency by another factor, so no one distance says it: use linear."
        )
    return float(ratios[0, 0])


def cache_history(window: int) -> list[dict[str, Any]]:
    """Feed a model token by token, and after each note the positions in its slots and the slots that the step read."""
    import torch

    from lit_swa import GPT
    from lit_swa.rope import find_span

    model = GPT(build_config("sliding", sliding_window_size=window)).eval()
    model.set_kv_cache(1, 4 * window)
    slots, history = model.caches[0].slots, []
    with torch.no_grad():
        for p in range(2 * window + 2):
            pos = torch.tensor([p])
            model(torch.zeros(1, 1, dtype=torch.long), pos)
            read, _ = slots.view(1, find_span(pos, None), window)
            history.append({"position": p, "slots": slots.pos[0].tolist(), "read": [read.start, read.stop]})
    return history


def rope_stretches() -> dict[str, Any]:
    """By how much each scaling divides the frequencies of SmolLM2-135M, over the waves' lengths in tokens."""
    import torch

    from lit_swa import Config
    from lit_swa.rope import RoPE, rope_frequencies

    plain = Config.from_name("SmolLM2-135M")
    trained, f = plain.block_size, rope_frequencies(plain)[0]
    scalings: dict[str, dict[str, Any]] = {
        "linear": {"factor": 4.0},
        "ntk": {"factor": 4.0},
        "yarn": {"factor": 4.0},
        "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "dynamic": {"factor": 4.0},
    }
    stretch: dict[str, list[float]] = {}
    for name, options in scalings.items():
        config = plain.override(rope_scaling={"type": name} | options)
        scaled, label = rope_frequencies(config)[0], name
        if name == "dynamic":  # of a text four times as long as the trained length
            cos, sin = RoPE(config)(torch.tensor([[1]]), 0, torch.tensor([[4 * trained]]))
            half, label = cos.size(-1) // 2, "dynamic, at 4 times the trained length"
            scaled = torch.atan2(sin[0, 0, 0, half:], cos[0, 0, 0, :half])  # angles of position 1, all below pi
        stretch[label] = [round(x, 4) for x in (f / scaled).tolist()]
    waves = [round(x, 2) for x in (2 * math.pi / f).tolist()]
    return {"model": plain.name, "trained_length": trained, "factor": 4.0, "wavelengths": waves, "stretch": stretch}


def mask_record(grid: Grid) -> dict[str, Any]:
    """For the JSON. A row for each query, a character for each key."""
    rows = ["".join(str(n or ".") for n in row) for row in grid.part]
    return {"title": grid.title, "parts": {str(n): name for n, name in enumerate(grid.names, 1)}, "rows": rows}


def distance_record(grid: Grid) -> dict[str, Any]:
    """For the JSON. A row for each query, a word for each key."""
    rows = [" ".join("." if math.isnan(d) else f"{d:g}" for d in row) for row in grid.distance]
    return {"title": grid.title, "greatest": greatest(grid), "rows": rows}


def greatest(grid: Grid) -> float:
    return max(d for row in grid.distance for d in row if not math.isnan(d))


# ------------------------------------------------------------------------------------------------------- drawing


def draw(plt: Any, content: dict[str, Any]) -> Any:
    """The picture of one of the three JSON files."""
    if "masks" in content:
        return draw_masks(plt, content["masks"], content["cache"])
    return draw_distances(plt, content["distances"]) if "distances" in content else draw_stretches(plt, content)


def draw_masks(plt: Any, masks: dict[str, dict[str, Any]], history: list[dict[str, Any]]) -> Any:
    """Two rows of masks, and the cache on their right."""
    columns = math.ceil(len(masks) / 2)
    figure = plt.figure(figsize=(2.75 * columns + 4.4, 6.7), layout="constrained")
    places = figure.add_gridspec(2, columns + 1, width_ratios=[1] * columns + [1.5])
    for n, (name, mask) in enumerate(masks.items()):
        axis = figure.add_subplot(places[n // columns, n % columns])
        draw_mask(axis, name, mask)
        label_grid(axis, mask["title"], len(mask["rows"]), n % columns == 0, n >= columns)
    draw_cache(figure.add_subplot(places[:, columns]), history)
    figure.suptitle("the keys that each query attends to (coloured), made by the model's own functions", fontsize=12)
    return figure


def draw_mask(axis: Any, name: str, mask: dict[str, Any]) -> None:
    """In the colour of the variant, its parts in shades of it."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    from lit_swa.plots import shades, style_of

    names = list(mask["parts"].values())
    colours = shades(style_of(name.split()[0]).colour, len(names))
    parts = [[0 if part == "." else int(part) for part in row] for row in mask["rows"]]
    axis.imshow(parts, cmap=ListedColormap([UNSEEN, *colours]), vmin=0, vmax=len(colours))
    if len(names) > 1:
        patches = [Patch(facecolor=colour, label=name) for colour, name in zip(colours, names, strict=True)]
        axis.legend(handles=patches, loc="upper right", fontsize=9, frameon=False, handlelength=1, borderpad=0)


def label_grid(axis: Any, title: str, n: int, first_column: bool, last_row: bool) -> None:
    axis.set_title(title, fontsize=11)
    axis.set(xticks=range(0, n, 5), yticks=range(0, n, 5))
    axis.set_xlabel("key position" if last_row else "")
    axis.set_ylabel("query position" if first_column else "")
    borders, ends = [i - 0.5 for i in range(1, n)], (-0.5, n - 0.5)
    axis.vlines(borders, *ends, color="white", linewidth=0.8)
    axis.hlines(borders, *ends, color="white", linewidth=0.8)
    axis.set(xlim=ends, ylim=ends[::-1])
    axis.tick_params(length=0)


def draw_cache(axis: Any, history: list[dict[str, Any]]) -> None:
    from matplotlib.patches import Rectangle

    from lit_swa.plots import shades, style_of

    new, held = shades(style_of("sliding").colour, 2)
    n_slots = len(history[0]["slots"])
    for row, step in enumerate(history):
        for slot, position in enumerate(step["slots"]):
            is_new = position == step["position"]
            face = new if is_new else UNSEEN if position < 0 else held
            axis.add_patch(Rectangle((slot, row), 1, 1, facecolor=face, edgecolor="white"))
            text = str(position) if position >= 0 else ""
            colour = "white" if is_new else "black"
            place = {"ha": "center", "va": "center", "in_layout": False}
            axis.text(slot + 0.5, row + 0.5, text, fontsize=10, color=colour, **place)
        start, stop = step["read"]
        frame = {"fill": False, "edgecolor": "black", "linewidth": 1.6}
        axis.add_patch(Rectangle((start + 0.04, row + 0.06), stop - start - 0.08, 0.88, **frame))
    axis.axvline(n_slots / 2, color="black", linestyle=":", linewidth=1)
    title = f"rolling cache, S = {n_slots // 2}: positions in its {n_slots} slots\n(dark: written now, framed: read)"
    axis.set_title(title, fontsize=11)
    axis.set(xlim=(0, n_slots), ylim=(len(history), 0), xlabel="slot", ylabel="position of the token just fed")
    axis.set_xticks([s + 0.5 for s in range(n_slots)], range(n_slots))
    axis.set_yticks([r + 0.5 for r in range(len(history))], [step["position"] for step in history])
    axis.tick_params(length=0)


def draw_distances(plt: Any, records: dict[str, dict[str, Any]]) -> Any:
    """Two rows of grids, coloured by distance on one scale."""
    columns = math.ceil(len(records) / 2)
    figure, axes = plt.subplots(2, columns, figsize=(3.0 * columns + 0.6, 6.6), layout="constrained", squeeze=False)
    most = max(record["greatest"] for record in records.values())
    for n, record in enumerate(records.values()):
        axis, rows = axes[n // columns, n % columns], [row.split() for row in record["rows"]]
        numbers = [[math.nan if d == "." else float(d) for d in row] for row in rows]
        image = axis.imshow(numbers, cmap="cividis", vmin=0, vmax=max(1, most))
        title = f"{record['title']}\ngreatest distance {record['greatest']:g}"
        label_grid(axis, title, len(rows), n % columns == 0, n >= columns)
        axis.set_facecolor(UNSEEN)
        if len(rows) <= 24:
            write_numbers(axis, rows, most)
    for axis in axes.flat[len(records) :]:
        axis.set_axis_off()
    figure.colorbar(image, ax=axes, label="distance: query's position minus key's, as RoPE rotates them", shrink=0.8)
    return figure


def write_numbers(axis: Any, rows: list[list[str]], most: float) -> None:
    for i, row in enumerate(rows):
        for j, text in enumerate(row):
            if text != "." and len(text) <= 2:  # halves do not fit
                colour = "black" if float(text) > 0.5 * most else "white"
                place = {
                    "ha": "center",
                    "va": "center",
                    "in_layout": False,
                }  # in a cell, so of no import for the layout
                axis.text(j, i, text, fontsize=7, color=colour, **place)


def draw_stretches(plt: Any, content: dict[str, Any]) -> Any:
    from lit_swa.plots import log_axis, short_count, style_of

    figure, axis = plt.subplots(figsize=(8, 4.4), layout="constrained")
    for name, stretch in content["stretch"].items():
        style = style_of(name.partition(",")[0])
        wide = {"linewidth": 5, "alpha": 0.5} if name == "linear" else {"linewidth": 2}  # others end on it
        axis.plot(content["wavelengths"], stretch, style.line, color=style.colour, label=name, **wide)
    axis.axvline(content["trained_length"], color="grey", linewidth=1)
    axis.set_xscale("log")
    axis.set(xlabel="wavelength of a pair of dimensions before scaling, tokens", ylabel="its frequency is divided by")
    log_axis(axis)
    axis.set_yticks([1, 2, 4, 8, 13], ["1", "2", "4", "8", "13"])
    axis.minorticks_off()
    top = {"transform": axis.get_xaxis_transform(), "va": "top", "color": "dimgrey"}
    axis.text(content["trained_length"], 0.98, f" trained length, {short_count(content['trained_length'])}", **top)
    axis.set_title(f"RoPE scalings by {content['factor']:g} of the frequencies of {content['model']}", fontsize=11)
    axis.legend(frameon=False, loc="upper left")
    return figure


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
