"""Measure prefill and decode, beside transformers: python scripts/benchmark_generate.py."""

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
    transformers: bool = True,
    output: Path = Path("tutorials/results/benchmark_generate.json"),
    model: dict[str, Any] | None = None,
) -> None:
    """Print tokens per second of prefill and of eager decode at several positions; transformers does the same between.

    Both read the same random tokens with the same weights, one after the other, `repeats` times; medians are given.

    Args:
        checkpoint_dir: A checkpoint directory. By default SmolLM2-135M-Instruct, which is downloaded once.
        name: A named shape with random weights instead, such as Mistral-7B-v0.1: speed does not depend on the weights.
        dtypes: float32, bfloat16, float16. By default float32 and bfloat16 on a CPU, bfloat16 on a GPU.
        device: auto, cpu or cuda.
        prompt_tokens: Tokens of the prefill that is timed.
        positions: Where decoding is timed. By default 256 and 4000.
        steps: One-token steps in one timing.
        repeats: Timings of which the median is taken.
        transformers: Measure transformers too.
        output: Where the JSON goes.
        model: Any field of the model's config, as --model.FIELD VALUE.
    """
    import torch

    from lit_swa.files import write_json
    from lit_swa.utils import describe_machine, pick_device

    device = pick_device(device)
    arguments = {"name": name, "prompt_tokens": prompt_tokens, "steps": steps, "repeats": repeats, "model": model}
    if transformers:
        from transformers.utils import logging

        logging.set_verbosity_error()
    rows = []
    for dtype in dtypes or (["float32", "bfloat16"] if device == "cpu" else ["bfloat16"]):
        ours = build(checkpoint_dir, name, dtype, device, model or {})
        theirs = build_transformers(ours, dtype, device) if transformers else None
        with torch.inference_mode():
            rows.append(measure_prefill(ours, theirs, prompt_tokens, repeats) | {"dtype": dtype})
            report(rows[-1])
            for position in positions or [256, 4000]:
                rows.append(measure_decode(ours, theirs, position, steps, repeats) | {"dtype": dtype})
                report(rows[-1])
        del ours, theirs
    output.parent.mkdir(parents=True, exist_ok=True)
    command = "python " + " ".join(sys.argv).partition(" --output")[0]
    machine = describe_machine(device)
    write_json(output, {"command": command, "machine": machine, "arguments": arguments, "rows": rows})
    print(f"written to {output}", file=sys.stderr)


def build(checkpoint_dir: Path | None, name: str | None, dtype: str, device: str, overrides: dict[str, Any]):
    """The model as generate/base.py runs it."""
    import torch

    from lit_swa import GPT, Config
    from lit_swa.checkpoint import load_model
    from lit_swa.download import download_checkpoint
    from lit_swa.generate import pack_for_cpu

    if name is None:
        gpt = load_model(checkpoint_dir or download_checkpoint(), dtype=dtype, device=device, **overrides)
    else:
        with torch.device(device):
            torch.set_default_dtype(getattr(torch, dtype))
            gpt = GPT(Config.from_name(name, **overrides)).eval()
            torch.set_default_dtype(torch.float32)
    gpt.plain_state = {k: v for k, v in gpt.state_dict().items()} if device == "cpu" else None
    pack_for_cpu(gpt)
    return gpt


def build_transformers(ours, dtype: str, device: str):
    """transformers' model of the same config and weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lit_swa.files import LazyTensor
    from lit_swa.hf_format import config_to_hf, to_hf

    config = AutoConfig.for_model(**config_to_hf(ours.config))
    state = ours.plain_state or ours.state_dict()
    if ours.config.tie_embeddings:
        state = {k: v for k, v in state.items() if k != "lm_head.weight"}
    weights = {
        n: t.load()
        for n, t in to_hf(
            {k: LazyTensor(tuple(v.shape), v.dtype, lambda v=v: v) for k, v in state.items()}, ours.config
        ).items()
    }
    with torch.device(device):
        theirs = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    theirs.load_state_dict(weights, strict=False)
    theirs.tie_weights()
    return theirs.eval()


def measure_prefill(ours, theirs, tokens: int, repeats: int) -> dict[str, Any]:
    from lit_swa.generate import prefill

    ids = random_ids(ours, tokens)

    def run_ours() -> None:
        ours.set_kv_cache(1, tokens)
        prefill(ours, ids[0].tolist(), [])

    def run_theirs() -> None:
        theirs(ids, use_cache=True, logits_to_keep=1)

    seconds = alternate([run_ours] + ([run_theirs] if theirs else []), repeats, ids.device)
    return {"what": "prefill", "tokens": tokens} | {
        who: tokens / s for who, s in zip(("ours", "transformers"), seconds, strict=False)
    }


def measure_decode(ours, theirs, position: int, steps: int, repeats: int) -> dict[str, Any]:
    import torch

    from lit_swa.generate import prefill

    ids = random_ids(ours, position)
    device, token = ids.device, ids[:, :1]
    ours.set_kv_cache(1, position + steps)
    prefill(ours, ids[0].tolist(), [])
    cache = theirs(ids, use_cache=True, logits_to_keep=1).past_key_values if theirs else None

    def run_ours() -> None:
        for p in range(position, position + steps):
            ours(token, torch.tensor([p], device=device), input_pos_maxp1=p + 1).argmax(-1)

    def run_theirs() -> None:
        for _ in range(steps):
            theirs(token, past_key_values=cache, use_cache=True).logits.argmax(-1)
        if not ours.unbounded(cached=True):
            cache.crop(-steps)

    seconds = alternate([run_ours] + ([run_theirs] if theirs else []), repeats, device)
    row = {"what": "decode", "position": position} | {
        who: steps / s for who, s in zip(("ours", "transformers"), seconds, strict=False)
    }
    row["cache_MB"] = ours.kv_cache_bytes() / 1e6
    if device.type == "cuda":
        row["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def random_ids(ours, tokens: int):
    import torch

    device = ours.transformer.wte.weight.device
    return torch.randint(0, ours.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)


def alternate(runs: list, repeats: int, device) -> list[float]:
    """Median seconds of each, run in turns after one round of warming up."""
    from statistics import median

    from lit_swa.generate import wait_for

    times = [[] for _ in runs]
    for round_ in range(repeats + 1):
        for run, seconds in zip(runs, times, strict=True):
            wait_for(device)
            started = time.perf_counter()
            run()
            wait_for(device)
            if round_:
                seconds.append(time.perf_counter() - started)
    return [median(t) for t in times]


def report(row: dict[str, Any]) -> None:
    where = f"{row['tokens']} tokens" if row["what"] == "prefill" else f"at position {row['position']}"
    line = f"{row['dtype']:9} {row['what']:8} {where:17} {row['ours']:8.1f} tok/s"
    if "transformers" in row:
        line += f"   transformers {row['transformers']:8.1f}   {row['ours'] / row['transformers']:.2f}x"
    line += f"   cache {row['cache_MB']:.1f} MB" if "cache_MB" in row else ""
    line += f"   peak {row['peak_GB']:.1f} GB" if "peak_GB" in row else ""
    print(line, flush=True)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
