"""Measure prefill and decode beside peers: python scripts/benchmark_generate.py."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed


class Mode(NamedTuple):
    """The dtype of the activations, and how the weights are held: a mode of lit_swa.quantize, or None: as they are."""

    dtype: str
    quantize: str | None = None
    group_size: int | None = None  # of int4; None: the largest that divides the inputs of every layer
    gguf: str | None = None  # the nearest that llama.cpp has


MODES = {
    "fp32": Mode("float32", gguf="F32"),
    "bf16": Mode("bfloat16", gguf="BF16"),
    "fp16": Mode("float16", gguf="F16"),
    "int8": Mode("bfloat16", "int8", gguf="Q8_0"),
    "int4": Mode("bfloat16", "int4", gguf="Q4_0"),
    "int4-g32": Mode("bfloat16", "int4", 32, gguf="Q4_0"),
    "int4-g64": Mode("bfloat16", "int4", 64, gguf="Q4_0"),
    "int4-g128": Mode("bfloat16", "int4", 128, gguf="Q4_0"),
}
PEERS = (
    "transformers",
    "gpt-fast",
    "llama.cpp",
    "transformers static",
)  # ours are compared with the first one that is there


def main(
    checkpoint_dir: Path | None = None,
    name: str | None = None,
    modes: list[str] | None = None,
    dtypes: list[str] | None = None,
    device: str = "auto",
    prompt_tokens: int = 1024,
    positions: list[int] | None = None,
    batch_size: list[int] | None = None,
    steps: int = 32,
    repeats: int = 5,
    temperature: float = 0.0,
    top_k: int | None = None,
    eager: bool = True,
    compile: bool = False,
    compile_times: bool = False,
    transformers: bool = True,
    llama_cpp: bool = True,
    gpt_fast: Path | None = None,
    attentions: list[str] | None = None,
    output: Path = Path("tutorials/results/benchmark_generate.json"),
    model: dict[str, Any] | None = None,
) -> None:
    """Print tokens per second of prefill, and of decode for several positions and batch sizes, beside peers.

    All read the same random tokens with the same shapes and alternate, `repeats` times; medians are given. Peers are
    transformers (eager; on a GPU also with its static cache, compiled), on a CPU llama.cpp where xllamacpp can be
    imported (with one sequence alone), and gpt-fast.

    Args:
        checkpoint_dir: A checkpoint's directory or name. By default SmolLM2-135M-Instruct, which is downloaded once.
        name: A named shape, such as Mistral-7B-v0.1, with random weights in place of a checkpoint: speed does not
            depend on the weights.
        modes: How weights are held: fp32, bf16, fp16, int8, int4, int4-g32, int4-g64, int4-g128 (weights alone, by
            rounding; activations are bfloat16). By default fp32 and bf16 on a CPU, bf16 on a GPU.
        dtypes: The modes of dense weights by other names: float32, bfloat16, float16.
        device: auto, cpu or cuda.
        prompt_tokens: Tokens of the prefill that is timed; 0 for none.
        positions: Where decoding is timed. By default 256 and 4000.
        batch_size: How many sequences are decoded together, or several such numbers.
        steps: How many one-token steps are timed together.
        repeats: How often each is timed; the median counts.
        temperature: How tokens are chosen, by everyone; 0 takes the likeliest.
        top_k: Sample among the k likeliest tokens.
        eager: Measure the step that is not compiled.
        compile: Measure the compiled decode step too.
        compile_times: Measure how long compiling takes, without and with what an earlier run has kept of it.
        transformers: Measure transformers too.
        llama_cpp: Measure llama.cpp too.
        gpt_fast: The directory of a clone of gpt-fast, to measure it too.
        attentions: Measure the same shape with each of these attentions, such as '[full,linear]', in turns.
        output: Where the JSON goes; a picture goes next to it.
        model: Any field of the model's config, as --model.FIELD VALUE (--model.help lists them).
    """
    import torch

    from lit_swa.checks import check_at_least
    from lit_swa.formats.files import write_json
    from lit_swa.formats.quantized import quantization_of
    from lit_swa.generate import Sampling
    from lit_swa.plots import check_output, draw_results
    from lit_swa.speed import copy_rate
    from lit_swa.utils import describe_command, describe_machine, pick_device
    from scripts.peers.decode import Cell

    device, sampling = pick_device(device), Sampling(temperature, top_k)
    modes = pick_modes(modes, dtypes, device)
    batches, positions = batch_size or [1], positions or [256, 4000]
    check_at_least(
        batch_size=(min(batches), 1), positions=(min(positions), 1), steps=(steps, 1), repeats=(repeats, 1),
        prompt_tokens=(prompt_tokens, 0),
    )  # fmt: skip
    if not (eager or compile):
        raise ValueError("There is no step to time: set eager or compile to true.")
    cells = [Cell(b, p, steps) for b in batches for p in positions]
    check_output(output)
    asked = {"checkpoint_dir": checkpoint_dir and str(checkpoint_dir), "name": name, "model": model, "repeats": repeats,
             "attentions": attentions}  # fmt: skip
    result: dict[str, Any] = {
        "command": describe_command("--output"),
        "machine": describe_machine(device),
        "arguments": asked | {"temperature": temperature, "top_k": top_k},
        "copy_rate": copy_rate(torch.device(device)),
        "compile": [],
        "rows": [],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    # Every batch size and length of caches is compiled anew, for itself, as a run of that size alone would be.
    if compile or device != "cpu":
        torch._dynamo.config.automatic_dynamic_shapes = False
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10**4
    for mode in modes:
        ways: dict[str, Any] = {}
        for attention in attentions or [""]:
            own = {"attention": attention} if attention else {}
            source = Source(checkpoint_dir, name, mode, device, (model or {}) | own)
            if compile and compile_times:
                result["compile"].append({"mode": mode} | own | time_compiling(source))
                print("{mode}: compiled in {cold_s:.1f} s, again in {warm_s:.1f} s".format(**result["compile"][-1]))
            weights = load(source)
            ways |= {f"{way} {attention}".strip(): run for way, run in ours(weights, sampling, eager, compile).items()}
        wanted = {"transformers": transformers, "llama.cpp": llama_cpp, "gpt-fast": gpt_fast}
        ways |= peers(weights, MODES[mode], sampling, max(p + n for _, p, n in cells), wanted)
        with torch.inference_mode():
            for row in measure(ways, weights, cells, prompt_tokens, repeats, result["copy_rate"]):
                result["rows"].append({"mode": mode, "weights": str(quantization_of(weights) or "dense")} | row)
                report(result["rows"][-1])
                write_json(output, result)  # what is done is kept
        del weights, ways
    draw_results(output, lambda plt: draw(plt, result))


def pick_modes(modes: list[str] | None, dtypes: list[str] | None, device: str) -> list[str]:
    """Names of MODES. Raises ValueError for one that there is not."""
    if modes and dtypes:
        raise ValueError("modes and dtypes are both given: give modes alone.")
    named = {mode.dtype: name for name, mode in MODES.items() if mode.quantize is None}
    chosen = [name for text in modes or dtypes or [] for name in text.split(",")]
    chosen = [named.get(name, name) for name in chosen] or (["fp32", "bf16"] if device == "cpu" else ["bf16"])
    if unknown := [name for name in chosen if name not in MODES]:
        raise ValueError(f"There is no mode {unknown[0]!r}: choose from {', '.join(MODES)}.")
    return chosen


# ----------------------------------------------------------------------------------------------------------- the model


class Source(NamedTuple):
    """Where a model comes from, and how its weights are held."""

    checkpoint_dir: Path | None
    name: str | None
    mode: str
    device: str
    overrides: dict[str, Any]


def load(source: Source):
    """The model, before anything makes it faster."""
    from lit_swa.random_model import named_or_loaded

    mode = MODES[source.mode]
    how = (mode.dtype, source.device, mode.quantize, mode.group_size)
    return named_or_loaded(source.name, source.checkpoint_dir, *how, **source.overrides)


def copy_of(model):
    """A model of its own that shares the weights, so that each can be made faster in its own way."""
    import copy

    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


# -------------------------------------------------------------------------------------------------------- what is timed


class Ours:
    """This project's model, plain or by its compiled step, measured as the peers are: see scripts/peers/decode.py."""

    def __init__(self, model, sampling, step: Callable | None = None) -> None:
        self.model, self.sampling, self.step = model, sampling, step
        self.reads, self.batches = step is None, True  # a compiled step reads no prompts
        self.logits: dict[Any, Any] = {}  # cell -> the last ones; None: the prompt's
        self.sizes: dict[Any, dict[str, float]] = {}  # cell -> bytes

    def prefill(self, ids) -> None:
        from lit_swa.generate import Session

        self.model.clear_kv_cache()  # making the caches is part of it, as for transformers
        self.logits[None] = Session(self.model).feed(ids)

    def decode(self, ids, cell) -> Callable[[], None]:
        import torch

        from lit_swa.speed import step_bytes

        model, last = self.model, cell.position + cell.steps
        caches = self.fill(ids, cell)
        read = step_bytes(model, cell.position + 1, last, cell.batch_size)
        self.sizes[cell] = {"read_bytes": read, "cache_bytes": model.kv_cache_bytes()}
        first, sampler = cell.first_tokens(ids), cell.sampler(self.sampling, ids)
        input_pos = torch.tensor([cell.position], device=ids.device)

        def run() -> None:
            vars(model).update(caches[0])
            for attn, cache in zip(model.layers, caches[1], strict=True):
                attn.kv_cache = cache
            token = first
            input_pos.fill_(cell.position)
            for p in range(cell.position, last):  # token and position stay on the device
                if self.step is None:
                    logits = model(token, input_pos, input_pos_maxp1=p + 1)
                else:
                    logits = self.step(token, input_pos)
                token = sampler.choose(logits[:, -1])
                input_pos.add_(1)
            self.logits[cell] = logits

        return run

    def fill(self, ids, cell) -> tuple[dict[str, int], list]:
        """Caches that hold the text up to the cell's position, for each sequence, and the model's sizes of them.

        One sequence is read, and copied to the others.
        """
        from lit_swa.generate import Session

        model, lookahead = self.model, cell.steps if self.step is None else 0  # to go back; a fixed shape does without
        model.clear_kv_cache()
        session = Session(model, lookahead=lookahead)
        session.reserve(cell.position + cell.steps)
        session.feed(ids[:, : cell.position])
        if cell.batch_size > 1:
            filled = model.caches
            Session(model, cell.batch_size, lookahead=lookahead).reserve(cell.position + cell.steps)
            for cache, one in zip(model.caches, filled, strict=True):
                for held, row in zip(cache.buffers(), one.buffers(), strict=True):
                    held.copy_(row)  # (1, ...) to (B, ...)
        sizes = {name: getattr(model, name) for name in ("cache_batch_size", "max_seq_length", "lookahead")}
        return sizes, [attn.kv_cache for attn in model.layers]


def ours(weights, sampling, eager: bool, compile: bool) -> dict[str, Any]:
    """As generate/base.py runs it."""
    from lit_swa.fast_decode import compile_decode
    from lit_swa.linear_formats import pack_for_cpu

    ways = {}
    if eager:
        model = copy_of(weights)
        pack_for_cpu(model)
        ways["ours"] = Ours(model, sampling)
    if compile:
        model = copy_of(weights)
        ways["compiled"] = Ours(model, sampling, compile_decode(model))
    return ways


def peers(weights, mode: Mode, sampling, length: int, wanted: dict[str, Any]) -> dict[str, Any]:
    """The peers that are wanted, there, and fit. length: tokens of the longest text. stderr says why one is missing."""
    from lit_swa.formats.quantized import quantization_of
    from scripts.peers import decode

    held = quantization_of(weights)
    bits = None if held is None else 8 if held.mode == "int8" else 4
    cpu = weights.transformer.wte.weight.device.type == "cpu"
    builders: dict[str, Callable] = {}
    if wanted["transformers"] and bits is None:
        builders["transformers"] = lambda: decode.Transformers(weights, sampling)
    if wanted["llama.cpp"] and cpu:
        builders["llama.cpp"] = lambda: decode.LlamaCpp(weights, sampling, mode.gguf, length)
    if wanted["gpt-fast"]:
        builders["gpt-fast"] = lambda: decode.GptFast(weights, sampling, bits, wanted["gpt-fast"])
    ways: dict[str, Any] = {}
    for name, build in builders.items():
        try:
            ways[name] = build()
        except (ImportError, decode.LeftOut) as reason:
            print(f"{name} is left out: {reason}", file=sys.stderr)
    if "transformers" in ways and not cpu:
        ways["transformers static"] = decode.StaticTransformers(ways["transformers"].model, sampling)
    return ways


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(ways: dict, weights, cells: list, prompt_tokens: int, repeats: int, copied: float | None) -> Iterator[dict]:
    """A row for the prefill, and one for each cell. copied: the copy rate."""
    ids = random_ids(weights, max(prompt_tokens, *(cell.position for cell in cells), 1))
    if prompt_tokens:
        prompt = ids[:, :prompt_tokens]
        runs = {(name, None): lambda way=way: way.prefill(prompt) for name, way in ways.items() if way.reads}
        times = alternate(runs, repeats, ids.device)
        yield {"what": "prefill", "tokens": prompt_tokens} | summarize(times, ways, None, prompt_tokens, None)
    # A GPU's graphs and caches are large: a cell after the other. On a CPU all cells alternate, since its speed drifts.
    for group in [cells] if ids.device.type == "cpu" else [[cell] for cell in cells]:
        pairs = [(name, cell) for cell in group for name in ways if ways[name].batches or cell.batch_size == 1]
        runs = {(name, cell): ways[name].decode(ids, cell) for name, cell in pairs}
        times = alternate(runs, repeats, ids.device)
        del runs  # and the caches in it
        for cell in group:
            figures = summarize(times, ways, cell, cell.batch_size * cell.steps, copied)
            yield {"what": "decode"} | cell._asdict() | figures


def alternate(runs: dict, repeats: int, device) -> dict[Any, tuple[float, float]]:
    """For each, the median of its seconds, run alternately, after a round of warming up; and the seconds of that."""
    from statistics import median

    from lit_swa.utils import wait_for

    times: dict[Any, list[float]] = {key: [] for key in runs}
    for _ in range(repeats + 1):
        for key, run in runs.items():
            wait_for(device)
            started = time.perf_counter()
            own = run()
            wait_for(device)
            times[key].append(time.perf_counter() - started if own is None else own)
    return {key: (median(seconds[1:]), seconds[0]) for key, seconds in times.items()}


def summarize(times: dict, ways: dict, cell, tokens: int, copied: float | None) -> dict[str, Any]:
    """The figures of one row. cell: None for the prefill. tokens: how many were read or made in the seconds."""
    import torch

    row: dict[str, Any] = {"ways": {}}
    for name, way in ways.items():
        if (name, cell) not in times:
            continue
        seconds, first = times[name, cell]
        figures = row["ways"][name] = {"tok_s": tokens / seconds, "first_round_s": first}
        if cell is not None:
            figures["step_ms"] = seconds * 1e3 / cell.steps
        if isinstance(way, Ours):
            figures |= way.sizes.get(cell, {})
            row |= way.sizes.get(cell, {})
            if copied is not None and cell is not None:
                figures["share"] = figures["read_bytes"] * cell.steps / seconds / copied
            figures["finite"] = bool(torch.isfinite(way.logits[cell]).all())
    if torch.cuda.is_available():
        row["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def random_ids(weights, tokens: int):
    """(1, T)"""
    import torch

    generator, device = torch.Generator().manual_seed(1), weights.transformer.wte.weight.device
    return torch.randint(0, weights.config.vocab_size, (1, tokens), generator=generator).to(device)


def time_compiling(source: Source) -> dict[str, float]:
    """Seconds until the compiled step runs, in two new processes: the first one finds nothing compiled, the second what
    the first has kept."""
    import os
    import tempfile
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    before, seconds = dict(os.environ), []
    with tempfile.TemporaryDirectory() as directory:
        os.environ |= dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "LIT_SWA_CACHE"), directory)
        try:
            for _ in range(2):
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    seconds.append(pool.submit(compile_once, source).result())
        finally:
            os.environ.clear()
            os.environ.update(before)
    return dict(zip(("cold_s", "warm_s"), seconds, strict=True))


def compile_once(source: Source) -> float:
    from lit_swa.fast_decode import compile_decode, warm_up
    from lit_swa.generate import Session

    model = load(source)
    return warm_up(Session(model, decode=compile_decode(model)), min(512, model.config.block_size))


# ------------------------------------------------------------------------------------------------- printing and drawing


def report(row: dict[str, Any]) -> None:
    """A line for what is measured, and one for each way."""
    held = row["mode"] if row["weights"] == "dense" else row["weights"]
    if row["what"] == "prefill":
        print(f"{held}: prefill of {row['tokens']} tokens")
    else:
        print(f"{held}: decode at position {row['position']}, batch {row['batch_size']}")
    softmax = [name for name in row["ways"] if name.endswith(" full")]  # with several attentions
    peer = next((name for name in (*PEERS, *softmax) if name in row["ways"]), None)
    for name, figures in row["ways"].items():
        line = f"  {name:19} {figures['tok_s']:9.1f} tok/s"
        line += f" {figures['step_ms']:8.2f} ms" if "step_ms" in figures else ""
        line += f" {figures['share']:5.0%} of the copy rate" if "share" in figures else ""
        if "cache_bytes" in figures:
            line += f", reads {figures['read_bytes'] / 1e9:.3f} GB, caches of {figures['cache_bytes'] / 1e9:.3f} GB"
        if peer is not None and name not in (peer, *PEERS):
            line += f"  {figures['tok_s'] / row['ways'][peer]['tok_s']:.2f}x {peer}"
        if not figures.get("finite", True):
            line += "  its logits are no finite numbers: this dtype is too small for the activations"
        print(line, flush=True)


def draw(plt: Any, result: dict[str, Any]) -> Any:
    """Decode over the positions, and over the batch sizes where there are several; of several attentions, their caches
    too."""
    from lit_swa.plots import set_title

    rows = [row for row in result["rows"] if row["what"] == "decode"]
    batches, positions = (sorted({row[key] for row in rows}) for key in ("batch_size", "position"))
    panels = ["position"] * (len(positions) > 1) + ["batch_size"] * (len(batches) > 1) or ["position"]
    panels += ["caches"] * bool(result["arguments"].get("attentions"))
    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 4.5), squeeze=False, layout="constrained")
    model = result["arguments"]["name"] or Path(result["arguments"]["checkpoint_dir"] or "SmolLM2-135M-Instruct").name
    set_title(figure, f"decode of {model}", result["machine"])
    for axis, across in zip(axes[0], panels, strict=True):
        fixed, value = ("position", positions[0]) if across == "batch_size" else ("batch_size", batches[0])
        draw_panel(axis, [row for row in rows if row[fixed] == value], across)
        axis.set_title(f"{'position' if across == 'batch_size' else 'batch'} {value}", fontsize=10)
    return figure


def draw_panel(axis: Any, rows: list[dict], across: str) -> None:
    """A curve for each way and mode: the way has a colour, the mode a kind of line. across: what the axis is: position
    or batch_size; or caches: their size over the position."""
    from lit_swa.plots import DASHES, log_axis, style_of, token_axis

    across, key, scale = ("position", "cache_bytes", 1e-9) if across == "caches" else (across, "tok_s", 1.0)

    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        for name, figures in row["ways"].items():
            if key in figures:
                curves.setdefault((name, row["mode"]), []).append((row[across], figures[key] * scale))
    modes, places = list(dict.fromkeys(mode for _, mode in curves)), sorted({row[across] for row in rows})
    for (name, mode), points in sorted(curves.items(), key=lambda curve: -curve[1][-1][1]):
        style = style_of(name).of_line() | {"linestyle": DASHES[modes.index(mode) % len(DASHES)]}
        axis.plot(*zip(*sorted(points), strict=True), label=f"{name}, {mode}", **style)
    axis.set_ylabel("decode (tok/s)" if key == "tok_s" else "caches (GB)")
    if across == "position":
        token_axis(axis, max(places) * 21 // 20)
        axis.set_xlabel("position (tokens)")
    else:
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set(xlabel="batch size (sequences)", xticks=places, xticklabels=[str(place) for place in places])
    log_axis(axis)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
