"""Measure attention over text length, for each method and its peers: python scripts/benchmark_attention.py."""

import sys
import time
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

CALLS = 4  # in a row, in one timing on a GPU


def main(
    device: str = "auto",
    dtype: str = "auto",
    lengths: list[int] | None = None,
    n_head: int | None = None,
    n_query_groups: int | None = None,
    head_size: int | None = None,
    window: int | None = None,
    n_sink_tokens: int = 4,
    trained_length: int = 8192,
    s2_group_ratio: float = 0.25,
    backend: str = "auto",
    methods: list[str] | None = None,
    backward: bool = True,
    repeats: int = 5,
    max_seconds: float = 60.0,
    output: Path = Path("tutorials/results/benchmark_attention.json"),
) -> None:
    """Print milliseconds and memory of one layer's attention, from projected queries, keys and values to its output.

    All methods of one length alternate, `repeats` times, and medians are given. Masks are made before, as a model
    makes them once for all layers. By default Mistral-7B's heads on a GPU and SmolLM2-135M's on a CPU.

    Args:
        device: auto, cpu or cuda.
        dtype: float32, bfloat16 or float16; auto is bfloat16 on a GPU and float32 on a CPU.
        lengths: Tokens of the text. By default 8192, 32768, 65536 and 131072 on a GPU, 1024 to 8192 on a CPU.
        n_head: Query heads.
        n_query_groups: Key and value heads.
        head_size: Elements of a head.
        window: The sliding and the streaming window. By default 4096 on a GPU and 512 on a CPU.
        n_sink_tokens: How many first tokens streaming always sees.
        trained_length: The trained length of dual-chunk attention, which no distance exceeds.
        s2_group_ratio: A group's share of the text in S2-Attn.
        backend: The attention_backend of this project's methods: auto, sdpa, flex or flash.
        methods: Names of methods to measure; by default all that the device has. An unknown name lists them.
        backward: Measure the gradients too.
        repeats: How often each is timed; the median counts.
        max_seconds: A method whose first call takes longer is not measured at greater lengths.
        output: Where the JSON goes; a picture goes next to it.
    """
    import torch

    from lit_swa.checks import check_at_least
    from lit_swa.formats.files import write_json
    from lit_swa.plots import check_output, draw_results
    from lit_swa.utils import describe_command, describe_machine, pick_device, pick_dtype

    device = pick_device(device)
    cuda = device.startswith("cuda")
    shape = (n_head or (32 if cuda else 9), n_query_groups or (8 if cuda else 3), head_size or (128 if cuda else 64))
    settings = {
        "n_head": shape[0], "n_query_groups": shape[1], "head_size": shape[2], "dtype": pick_dtype(dtype, device),
        "window": window or (4096 if cuda else 512), "n_sink_tokens": n_sink_tokens, "trained_length": trained_length,
        "s2_group_ratio": s2_group_ratio, "backend": backend, "repeats": repeats,
    }  # fmt: skip
    lengths = lengths or ([8192, 32768, 65536, 131072] if cuda else [1024, 2048, 4096, 8192])
    check_at_least(lengths=(min(lengths), 2), repeats=(repeats, 1))
    check_output(output)
    rows: list[dict] = []
    slow: set[str] = set()
    output.parent.mkdir(parents=True, exist_ok=True)
    command = describe_command("--output")
    result = {"command": command, "machine": describe_machine(device), "settings": settings, "rows": rows}
    for T in lengths:
        torch.manual_seed(0)
        for row in measure_length(T, device, settings, methods, backward, slow, max_seconds):
            rows.append(row)
            report(row)
        write_json(output, result)  # a length that is done is kept
    draw_results(output, lambda plt: draw(plt, result))


def measure_length(
    T: int, device: str, settings: dict, chosen: list[str] | None, backward: bool, slow: set[str], max_seconds: float
) -> list[dict]:
    """One row for every method at T tokens."""
    import torch

    inputs = make_inputs(T, device, settings)
    ways = choose(ours(T, device, settings, inputs) | peers(T, device, settings, inputs), chosen, slow)
    grad = torch.randn_like(inputs[0])
    rows = []
    for name, way in list(ways.items()):
        row = {"T": T, "method": name} | first_calls(way, inputs, grad, device, backward)
        rows.append(row)
        if "error" in row:
            del ways[name]
        elif row["first_s"] > max_seconds:
            slow.add(name)
    for direction in ("forward", "forward_backward") if backward else ("forward",):
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(settings["repeats"]):
            for name, way in ways.items():
                times[name].append(timed(way, inputs, grad if direction == "forward_backward" else None, device))
        for row in rows:
            if row["method"] in ways:
                row[f"{direction}_ms"] = sorted(times[row["method"]])[settings["repeats"] // 2]
    return rows


def choose(ways: dict[str, Callable], chosen: list[str] | None, slow: set[str]) -> dict[str, Callable]:
    """The methods that were asked for and were not too slow at a lesser length."""
    unknown = set(chosen or ()) - set(ways)
    if unknown and not any(name in slow for name in unknown):
        raise ValueError(f"There is no method {sorted(unknown)[0]!r} here: choose from {', '.join(ways)}.")
    return {name: way for name, way in ways.items() if (not chosen or name in chosen) and name not in slow}


def make_inputs(T: int, device: str, settings: dict) -> list:
    """q (1, H, T, D), k and v (1, G, T, D), laid out as a projection leaves them: a token's heads side by side."""
    import torch

    heads = (settings["n_head"], settings["n_query_groups"], settings["n_query_groups"])
    dtype = getattr(torch, settings["dtype"])
    made = [torch.randn(1, T, h, settings["head_size"], device=device, dtype=dtype).transpose(1, 2) for h in heads]
    return [x.requires_grad_() for x in made]


def ours(T: int, device: str, settings: dict, inputs: list) -> dict[str, Callable]:
    """lit_swa's variants. Those with RoPE rotate first, dual-chunk attention its queries three times; linear attention
    always does, as its features read what is rotated."""
    import torch

    from lit_swa import GPT, Config
    from lit_swa.rope import Span

    window = {"sliding_window_size": settings["window"], "n_sink_tokens": settings["n_sink_tokens"]}
    fields = {
        "full": {},
        f"sliding {settings['window']}": {"attention": "sliding"} | window,
        f"streaming {settings['n_sink_tokens']} + {settings['window']}": {"attention": "streaming"} | window,
        "dual chunk": {"attention": "dual_chunk", "dual_chunk_pretraining_length": settings["trained_length"]},
        "S2": {"s2_attention": True, "s2_group_ratio": settings["s2_group_ratio"]},
        "linear attention": {"attention": "linear"},
    }
    q, k, v = inputs
    ways: dict[str, Callable] = {}
    for name, extra in fields.items():
        config = Config(
            n_layer=1, n_head=settings["n_head"], n_query_groups=settings["n_query_groups"], block_size=T, vocab_size=8,
            head_size=settings["head_size"], n_embd=8, attention_backend=settings["backend"], **extra,
        )  # fmt: skip
        model = GPT(config).to(device, q.dtype)
        mixer, span = model.layers[0].mixer, Span(True, 0, T - 1, contiguous=True, fresh=True, dtype=q.dtype)
        plan = mixer.plan(torch.arange(T, device=device)[None], span, None, model.rope)

        def plain(mixer: Any = mixer, plan: Any = plan) -> torch.Tensor:
            return mixer.attend([q] * len(plan.q_angles), k, v, plan)

        def with_rope(mixer: Any = mixer, plan: Any = plan) -> torch.Tensor:
            return mixer(q, k, v, plan, None)

        ways[name] = with_rope if name == "linear attention" else plain
        if name in ("full", "dual chunk"):
            ways[name + ", with RoPE"] = with_rope
    return ways


def peers(T: int, device: str, settings: dict, inputs: list) -> dict[str, Callable]:
    """What others do: torch's kernels for full causal attention, a window as a dense mask, LongLoRA's S2-Attn, and the
    sums of linear attention by flash-linear-attention where it is installed."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = inputs
    R, W = settings["n_head"] // settings["n_query_groups"], settings["window"]

    def causal(backend: SDPBackend | None) -> Callable:
        def way() -> torch.Tensor:
            if backend is None:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return way

    ways = {"torch SDPA causal": causal(None)}
    if device.startswith("cuda"):
        kinds = {"cuDNN causal": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2 causal": SDPBackend.FLASH_ATTENTION}
        ways = {name: causal(kind) for name, kind in kinds.items()}
    if T <= 8192:  # T * T of it
        i = torch.arange(T, device=device)
        mask = (i[:, None] >= i) & (i[:, None] - i < W)

        def dense() -> torch.Tensor:
            expanded = (x.repeat_interleave(R, dim=1) for x in (k, v))
            return F.scaled_dot_product_attention(q, *expanded, attn_mask=mask)

        ways[f"window {W} as a dense mask"] = dense
    groups = round(1 / settings["s2_group_ratio"])
    if T % (2 * groups) == 0:
        ways["LongLoRA's S2 (roll + flash)"] = partial(roll_and_flash, q, k, v, groups)
    if device.startswith("cuda") and find_spec("fla"):
        ways["fla's linear sums"] = fla_sums(q, k, v)
    return ways


def fla_sums(q, k, v) -> Callable:
    """The sums of linear attention alone, by flash-linear-attention, over features that are there: no RoPE, feature
    maps, window or division by the weights' sum, all of which "linear attention" is measured with."""
    import torch

    @cache
    def made() -> list:
        """Features of q and k, (1, T, H, 2 D), and v (1, T, H, D), in the first call: others need no such room."""
        R = q.size(1) // k.size(1)
        heads = (x.detach().transpose(1, 2) for x in (q, k.repeat_interleave(R, dim=1), v.repeat_interleave(R, dim=1)))
        *given, values = (x.contiguous() for x in heads)
        return [*(torch.cat([x.softmax(-1), (-x).softmax(-1)], dim=-1) for x in given), values]

    def way() -> torch.Tensor:
        from fla.ops.simple_gla import chunk_simple_gla

        leaves = (x.detach().requires_grad_() for x in made())  # new ones: no gradient of a call before is added to
        return chunk_simple_gla(*leaves, scale=1.0)[0].transpose(1, 2)

    return way


def roll_and_flash(q, k, v, groups: int):
    """S2-Attn as LongLoRA does it: half of the heads rolled by half a group, all groups in one batch.

    q: (1, H, T, D). k, v: (1, G, T, D). Twice the number of groups divides T.
    """
    import torch
    import torch.nn.functional as F

    g, half, R = q.size(2) // groups, q.size(1) // 2, q.size(1) // k.size(1)
    shifted = (q, k.repeat_interleave(R, dim=1), v.repeat_interleave(R, dim=1))
    shifted = (torch.cat([x[:, :half], x[:, half:].roll(-g // 2, dims=2)], dim=1) for x in shifted)
    cut = (x.unflatten(2, (groups, g)).transpose(1, 2).flatten(0, 1) for x in shifted)
    y = F.scaled_dot_product_attention(*cut, is_causal=True)
    y = y.unflatten(0, (1, groups)).transpose(1, 2).flatten(2, 3)
    return torch.cat([y[:, :half], y[:, half:].roll(g // 2, dims=2)], dim=1)


def first_calls(way: Callable, inputs: list, grad, device: str, backward: bool) -> dict:
    """Seconds of the first call, in which kernels are compiled or planned, and the peak memory of the second."""
    import torch

    cuda = device.startswith("cuda")
    try:
        started = time.perf_counter()
        timed(way, inputs, grad if backward else None, device)
        row = {"first_s": time.perf_counter() - started}
        timed(way, inputs, None, device)  # planned apart where no gradient is wanted
        if cuda:
            for key, g in (("forward_GB", None), ("forward_backward_GB", grad)):
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                if g is None or backward:
                    timed(way, inputs, g, device)
                    row[key] = (torch.cuda.max_memory_allocated() - before) / 1e9
        return row
    except (RuntimeError, torch.cuda.OutOfMemoryError) as e:
        torch.cuda.empty_cache() if cuda else None
        return {"error": " ".join(str(e).split())[:200]}


def timed(way: Callable, inputs: list, grad, device: str) -> float:
    """Milliseconds of one call, with its gradients if a gradient of the output is given.

    On a GPU, of four calls in a row, as layers follow each other: the processor prepares one while another runs.
    """
    import torch

    def call() -> None:
        if grad is None:
            with torch.no_grad():
                way()
            return
        way().backward(grad)
        for x in inputs:
            x.grad = None

    if not device.startswith("cuda"):
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1e3
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(CALLS):
        call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / CALLS


def report(row: dict) -> None:
    """One line for a person."""
    if "error" in row:
        print(f"T {row['T']:7d}  {row['method']:32s} {row['error'][:80]}", flush=True)
        return
    parts = [f"forward {row['forward_ms']:9.2f} ms"]
    if "forward_backward_ms" in row:
        parts.append(f"with backward {row['forward_backward_ms']:9.2f} ms")
    if "forward_GB" in row:
        parts.append(f"memory {row['forward_GB']:.2f} / {row.get('forward_backward_GB', 0):.2f} GB")
    print(f"T {row['T']:7d}  {row['method']:32s} {'  '.join(parts)}  first {row['first_s']:.1f} s", flush=True)


PANELS = {
    "forward_ms": ("forward", "microseconds per token", 1e3),
    "forward_backward_ms": ("forward and backward", "microseconds per token", 1e3),
    "forward_backward_GB": ("memory of forward and backward", "kilobytes per token", 1e6),
}


def draw(plt, result: dict[str, Any]):
    """Time and memory per token over the text's length, one line a method: what grows as the text does is level."""
    from lit_swa.plots import log_axis, set_title, short_count

    rows, s = [row for row in result["rows"] if "RoPE" not in row["method"]], result["settings"]
    panels = {key: panel for key, panel in PANELS.items() if any(key in row for row in rows)}
    figure, axes = plt.subplots(1, len(panels) or 1, figsize=(11, 5.4), layout="constrained", squeeze=False)
    lengths = sorted({row["T"] for row in rows})
    for axis, (key, (title, unit, factor)) in zip(axes[0], panels.items(), strict=False):
        for method in sorted(dict.fromkeys(row["method"] for row in rows), key=is_peer):
            measured = [row for row in rows if row["method"] == method and key in row]
            points = [(row["T"], factor * row[key] / row["T"]) for row in measured]
            if points:
                only = f" (at {short_count(points[0][0])} only)" if len(points) == 1 < len(lengths) else ""
                axis.plot(*zip(*points, strict=True), label=term(method) + only, **look(method))
        axis.set(xscale="log", xlabel="length of the text, tokens", title=title, ylabel=unit)
        axis.set_xticks(lengths, map(short_count, lengths))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.set_ylim(0) if key.endswith("GB") else log_axis(axis)
    heads = f"{s['n_head']} query and {s['n_query_groups']} key heads of {s['head_size']}, {s['dtype']}, batch 1"
    machine = f"{result['machine']}, median of {s['repeats']}; filled: ours, hollow and dashed: others' kernels"
    set_title(figure, f"attention of one layer per token, lower is better: {heads}", machine)
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(4, len(handles[0]) or 1), fontsize=9, frameon=False)
    return figure


PEERS = {  # how the name begins: what it computes, marker and line
    "torch SDPA": ("full", "s", "--"),
    "cuDNN": ("full", "s", "--"),
    "FlashAttention-2": ("full", "^", ":"),
    "window": ("sliding", "s", "--"),
    "LongLoRA's S2": ("s2", "o", "--"),
    "fla's": ("linear attention", "o", "--"),
}


def is_peer(method: str) -> bool:
    return method.startswith(tuple(PEERS))


def term(method: str) -> str:
    """The name that the method has in all pictures, with what it keeps."""
    kind, _, size = {"dual chunk": "dual_chunk", "S2": "s2"}.get(method, method).partition(" ")
    ours = {"sliding": f"sliding, {size} keys", "streaming": f"streaming, {size}", "dual_chunk": kind, "s2": kind}
    return method if is_peer(method) else ours.get(kind, method)


def look(method: str) -> dict[str, Any]:
    """The colour is that of what is computed. A peer has a large hollow marker, so that ours shows inside."""
    from lit_swa.plots import style_of

    if not is_peer(method):
        name = term(method).partition(",")[0]
        return style_of(name).of_line() | {"markersize": 5, "linewidth": 3 if name == "full" else 1.5}
    kind, marker, line = next(peer for start, peer in PEERS.items() if method.startswith(start))
    style = {"color": style_of(kind).colour, "marker": marker, "linestyle": line, "linewidth": 1.2}
    return style | {"markersize": 10, "markerfacecolor": "none"}


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
