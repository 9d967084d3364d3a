"""Measure prefill and decode against transformers: python scripts/benchmark_generate.py."""

import shlex
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed


def main(
    checkpoint_dir: Path | None = None,
    name: str | None = None,
    dtypes: list[str] | None = None,
    device: str = "auto",
    prompt_tokens: int = 1024,
    positions: list[int] | None = None,
    steps: int = 32,
    repeats: int = 5,
    compile: bool = False,
    transformers: bool = True,
    output: Path = Path("tutorials/results/benchmark_generate.json"),
    model: dict[str, Any] | None = None,
) -> None:
    """Print tokens per second of prefill, and of decode at several positions, next to those of transformers.

    All read the same random tokens with the same weights and alternate, `repeats` times; medians are given.

    Args:
        checkpoint_dir: A checkpoint's directory or name. By default SmolLM2-135M-Instruct, which is downloaded once.
        name: A named shape, such as Mistral-7B-v0.1, with random weights in place of a checkpoint: speed does not
            depend on the weights.
        dtypes: float32, bfloat16, float16. By default float32 and bfloat16 on a CPU, bfloat16 on a GPU.
        device: auto, cpu or cuda.
        prompt_tokens: Tokens of the prefill that is timed.
        positions: Where decoding is timed. By default 256 and 4000.
        steps: How many one-token steps are timed together.
        repeats: How often each is timed; the median counts.
        compile: Measure the compiled decode step too.
        transformers: Measure transformers too.
        output: Where the JSON goes.
        model: Any field of the model's config, as --model.FIELD VALUE (--model.help lists them).
    """
    import torch

    from lit_swa.formats.files import write_json
    from lit_swa.utils import describe_machine, pick_device

    device = pick_device(device)
    arguments = {"name": name, "prompt_tokens": prompt_tokens, "steps": steps, "repeats": repeats, "model": model}
    if transformers:
        from transformers.utils import logging

        logging.set_verbosity_error()
    rows = []
    for dtype in dtypes or (["float32", "bfloat16"] if device == "cpu" else ["bfloat16"]):
        weights = load(checkpoint_dir, name, dtype, device, model or {})
        ways = {"ours": prepare(weights, device)}
        if compile:
            ways["compiled"] = prepare(weights, device, compiled=True)
        if transformers:
            ways["transformers"] = build_transformers(weights, dtype, device)
        with torch.inference_mode():
            rows.append({"dtype": dtype, "what": "prefill"} | measure_prefill(ways, weights, prompt_tokens, repeats))
            report(rows[-1])
            for row in measure_decode(ways, weights, positions or [256, 4000], steps, repeats):
                rows.append({"dtype": dtype, "what": "decode"} | row)
                report(rows[-1])
        del weights, ways
    output.parent.mkdir(parents=True, exist_ok=True)
    command = "python " + shlex.join(sys.argv).partition(" --output")[0]
    machine = describe_machine(device)
    write_json(output, {"command": command, "machine": machine, "arguments": arguments, "rows": rows})
    print(f"written to {output}", file=sys.stderr)


def load(checkpoint_dir: Path | None, name: str | None, dtype: str, device: str, overrides: dict[str, Any]):
    """The plain model."""
    from lit_swa import Config
    from lit_swa.checkpoint import load_model
    from lit_swa.formats.download import find_checkpoint

    if name is None:
        return load_model(find_checkpoint(checkpoint_dir), dtype=dtype, device=device, **overrides)
    return random_model(Config.from_name(name, **overrides), dtype, device)


def random_model(config, dtype: str, device: str):
    import torch

    from lit_swa import GPT

    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return GPT(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def prepare(weights, device: str, compiled: bool = False):
    """(model, its compiled step or None), as generate/base.py runs them; the weights are shared where they can be."""
    import torch

    from lit_swa import GPT
    from lit_swa.fast_decode import compile_decode
    from lit_swa.linear_formats import pack_for_cpu

    with torch.device("meta"):
        model = GPT(weights.config).eval()
    model.load_state_dict(weights.state_dict(), assign=True)
    model.tie_weights()
    model = model.to(device)
    if compiled:
        return model, compile_decode(model)
    pack_for_cpu(model)
    return model, None


def build_transformers(weights, dtype: str, device: str):
    """transformers' model of the same config and weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lit_swa.formats.files import LazyTensor
    from lit_swa.formats.hugging_face import config_to_hf, to_hf

    config = AutoConfig.for_model(**config_to_hf(weights.config))
    state = weights.state_dict()
    if weights.config.tie_embeddings:
        del state["lm_head.weight"]
    lazy = {k: LazyTensor(tuple(v.shape), v.dtype, lambda v=v: v) for k, v in state.items()}
    with torch.device(device):
        theirs = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    theirs.load_state_dict({n: t.load() for n, t in to_hf(lazy, weights.config).items()}, strict=False)
    theirs.tie_weights()
    return theirs.eval()


def measure_prefill(ways: dict[str, Any], weights, tokens: int, repeats: int) -> dict[str, Any]:
    from lit_swa.generate import Session

    ids = random_ids(weights, tokens)
    model = ways["ours"][0]

    def ours() -> None:
        model.clear_kv_cache()  # making the caches is part of it, as for transformers
        Session(model).feed(ids)

    runs = {"ours": ours}
    if "transformers" in ways:
        runs["transformers"] = lambda: ways["transformers"](ids, use_cache=True, logits_to_keep=1)
    seconds = alternate(runs, repeats, ids.device)
    return {"tokens": tokens} | {who: tokens / s for who, s in seconds.items()}


def measure_decode(ways: dict[str, Any], weights, positions: list[int], steps: int, repeats: int) -> list[dict]:
    """A row for each position. All positions alternate, each with caches of its own."""
    import torch

    from lit_swa.generate import Session

    ids = random_ids(weights, max(positions))
    device, token = ids.device, ids[:, :1]

    def ours(position: int, model, step):
        model.clear_kv_cache()
        session = Session(model, lookahead=steps)  # each round goes back to where it began
        session.reserve(position + steps)
        session.feed(ids[:, :position])
        cache = caches_of(model)
        cache_bytes[position] = model.kv_cache_bytes()

        def run() -> None:
            put_caches(model, *cache)
            for p in range(position, position + steps):
                input_pos = torch.arange(p, p + 1, device=device)
                logits = step(token, input_pos) if step else model(token, input_pos, input_pos_maxp1=p + 1)
                logits.argmax(-1)

        return run

    def theirs(position: int, model):
        cache = model(ids[:, :position], use_cache=True, logits_to_keep=1).past_key_values

        def run() -> None:
            for _ in range(steps):
                model(token, past_key_values=cache, use_cache=True).logits.argmax(-1)
            if not weights.unbounded(cached=True):  # where a window has passed, the oldest keys are gone for good
                cache.crop(-steps)

        return run

    runs, cache_bytes = {}, {}
    for position in positions:
        for who, way in ways.items():
            runs[who, position] = theirs(position, way) if who == "transformers" else ours(position, *way)
    seconds = alternate(runs, repeats, device)
    rows = []
    for position in positions:
        row = {"position": position} | {who: steps / seconds[who, position] for who in ways}
        rows.append(row | {"cache_MB": cache_bytes[position] / 1e6})
        if device.type == "cuda":
            rows[-1]["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
    return rows


def caches_of(model) -> tuple[int, list]:
    """(max_seq_length, each layer's cache) of a model, to be put back by put_caches."""
    return model.max_seq_length, [block.attn.kv_cache for block in model.transformer.h]


def put_caches(model, max_seq_length: int, caches: list) -> None:
    model.max_seq_length = max_seq_length
    for block, cache in zip(model.transformer.h, caches, strict=True):
        block.attn.kv_cache = cache


def random_ids(weights, tokens: int):
    import torch

    device = weights.transformer.wte.weight.device
    return torch.randint(0, weights.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1)).to(
        device
    )


def alternate(runs: dict, repeats: int, device) -> dict:
    """Median seconds of each, run alternately after one round of warming up."""
    from statistics import median

    from lit_swa.utils import wait_for

    times = {who: [] for who in runs}
    for round_ in range(repeats + 1):
        for who, run in runs.items():
            wait_for(device)
            started = time.perf_counter()
            run()
            wait_for(device)
            if round_:
                times[who].append(time.perf_counter() - started)
    return {who: median(seconds) for who, seconds in times.items()}


def report(row: dict[str, Any]) -> None:
    where = f"{row['tokens']} tokens" if row["what"] == "prefill" else f"at position {row['position']}"
    line = f"{row['dtype']:9} {row['what']:8} {where:17}"
    for who in ("ours", "compiled", "transformers"):
        if who in row:
            ratio = (
                f" ({row[who] / row['transformers']:.2f}x)" if "transformers" in row and who != "transformers" else ""
            )
            line += f"  {who} {row[who]:.1f} tok/s{ratio}"
    line += f"  cache {row['cache_MB']:.1f} MB" if "cache_MB" in row else ""
    line += f"  peak {row['peak_GB']:.1f} GB" if "peak_GB" in row else ""
    print(line, flush=True)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
