"""Measure a finetuning step against transformers + PEFT: python scripts/benchmark_finetune.py."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from lit_swa.utils import release_memory, timed


def main(
    name: str = "Llama-2-7b",
    lengths: list[int] | None = None,
    methods: list[str] | None = None,
    n_layer: int | None = None,
    r: int = 8,
    window: int = 4096,
    s2_group_ratio: float = 0.25,
    chunk_size: int = 32768,
    chunk_offload: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    memory_GB: float | None = None,
    repeats: int = 5,
    transformers: bool = True,
    output: Path = Path("tutorials/results/benchmark_finetune.json"),
) -> None:
    """Print tokens per second and memory of a training step: LoRA on q, k, v and o, batch 1, random weights.

    The method peft is transformers + PEFT with gradient checkpointing. The others are this project, and differ in how
    many layers compute their activations again: all of them (all), as few as the GPU's memory allows (fast), or as few
    as peft's memory allows (same memory). s2, window and linear are fast with S2-Attn, with a sliding window, and with
    linear attention beside a window (stage 2 of finetune/linearize.py); transfer is its stage 1, which trains no LoRA.
    chunks and full chunks read the text in exact chunks, with the window and with full attention; full offload and s2
    offload read it whole, with what the layers compute again from in the CPU's memory.
    The methods alternate, and the median of `repeats` counts.

    Args:
        name: A named shape, such as Llama-2-7b.
        lengths: Tokens of a step. By default 2048, 8192 and 32768 on a GPU and 256 on a CPU.
        methods: Which to measure, of peft, all, fast, same memory, s2, window, linear, transfer, chunks, full chunks,
            full offload, s2 offload. By default the first four, and from 32768 tokens on s2 and window too.
        n_layer: Number of layers. By default the shape's.
        r: LoRA's rank; alpha is twice that.
        window: Size of the sliding window in tokens.
        s2_group_ratio: Length of an S2-Attn group as a share of the text.
        chunk_size: Tokens of an exact chunk.
        chunk_offload: What is kept between chunks waits in the CPU's memory.
        device: auto, cpu or cuda.
        dtype: The dtype of the frozen weights, float32 or bfloat16. Trained weights are float32.
        compile: Compile the blocks of this project's models, as --compile of the finetuning scripts.
        memory_GB: How much of the GPU's memory may be taken, in 10^9 bytes. By default all of it.
        repeats: How often each step is timed, after two that are not; 0: one step is made, and counts.
        transformers: Measure transformers + PEFT too.
        output: The JSON file to write.
    """
    import torch

    from lit_swa import Config
    from lit_swa.formats.files import write_json
    from lit_swa.random_model import random_model
    from lit_swa.train import use_tf32, use_whole_memory
    from lit_swa.utils import describe_command, describe_machine, pick_device, pick_dtype

    use_whole_memory()
    device = pick_device(device)
    if device.startswith("cuda") and memory_GB is not None:
        there = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(usable_bytes(device, memory_GB) / there)
    dtype = pick_dtype(dtype, device)
    if device.startswith("cuda") and dtype == "bfloat16":
        use_tf32()  # as the scripts
    lengths = lengths or ([2048, 8192, 32768] if device.startswith("cuda") else [256])
    settings = {"name": name, "n_layer": n_layer, "r": r, "window": window, "s2_group_ratio": s2_group_ratio,
                "chunk_size": chunk_size, "chunk_offload": chunk_offload, "dtype": dtype,
                "compile": compile, "memory_GB": memory_GB, "repeats": repeats}  # fmt: skip
    command = describe_command("--output")
    result: dict[str, Any] = {"command": command, "machine": describe_machine(device), "settings": settings, "rows": []}
    output.parent.mkdir(parents=True, exist_ok=True)
    config = Config.from_name(name, **({"n_layer": n_layer} if n_layer else {}))
    base = random_model(config, getattr(torch, dtype), device).train()  # all methods of ours share its weights
    for T in lengths:
        chosen = methods or ["peft", "all", "fast", "same memory"] + ["s2", "window"] * (T >= 32768)
        chosen = [m for m in chosen if transformers or m not in ("peft", "same memory")]
        for row in measure(T, chosen, base, device, settings):
            result["rows"].append(row)
            print(describe(row), flush=True)
        write_json(output, result)
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def measure(T: int, chosen: list[str], base: Any, device: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each method at T tokens."""
    import torch

    torch.manual_seed(0)
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], None]] = {}
    for method in chosen:
        memory = rows.get("peft", {}).get("memory_GB")
        row: dict[str, Any] = {"T": T, "method": method}
        try:
            steps[method], row["recompute"], row["weights_GB"] = build(method, T, base, device, settings, memory)
            row |= first_steps(steps[method], device, row["weights_GB"], only=settings["repeats"] == 0)
            print(f"{method} at {T}: {progress(row)}", file=sys.stderr, flush=True)
        except (RuntimeError, ValueError) as e:
            row["error"] = " ".join(str(e).split())[:160]
            steps.pop(method, None)
            release_memory()
        rows[method] = row
    times: dict[str, list[float]] = {method: [] for method in steps}
    for _ in range(settings["repeats"]):
        for method, step in steps.items():
            times[method].append(timed(step, device))
    for method, values in times.items():
        seconds = sorted(values)[len(values) // 2] if values else rows[method]["first_s"]
        rows[method] |= {"step_s": seconds, "tok_s": T / seconds}
    return list(rows.values())


def build(
    method: str, T: int, base: Any, device: str, settings: dict[str, Any], peer_memory: float | None
) -> tuple[Callable[[], None], int, float]:
    """(a training step, how many layers recompute in it, GB of the model's weights)"""
    import torch

    dtype = getattr(torch, settings["dtype"])
    if method == "peft":
        return build_peer(T, device, settings, dtype)
    from lit_swa.arguments import Training
    from lit_swa.data import Example
    from lit_swa.train import build_optimizer, differentiate_pieces_at_once, join_examples, recompute_blocks
    from lit_swa.training.compiling import compile_blocks, compile_linear_attention

    model, loss = build_ours(method, T, base, settings)
    weights = sum(p.nbytes for p in model.parameters())
    ids = torch.randint(0, model.config.vocab_size, (T,), dtype=torch.int32).numpy()
    batch = join_examples([Example(ids, ids)], [0]).to(torch.device(device))
    differentiate_pieces_at_once(model)
    n = layers_again(method, model, batch, weights, settings, peer_memory)
    recompute_blocks(model, n, offload=method.endswith("offload"))
    if settings["compile"]:
        (compile_linear_attention if method == "transfer" else compile_blocks)(model)
    optimizer = build_optimizer(model, Training(data=""), 1e-4)

    def step() -> None:
        (loss(batch.idx, targets=batch.targets, documents=batch.documents) / T).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, n, weights / 1e9


def build_ours(method: str, T: int, base: Any, settings: dict[str, Any]) -> tuple[Any, Any]:
    """(the model with what is trained, what gives the loss)"""
    from lit_swa.evaluate import with_fields
    from lit_swa.exact_chunks import ExactChunks
    from lit_swa.linearize import AttentionTransfer, linear_config, make_linear
    from lit_swa.lora import LoRAConfig, add_lora

    fields = {
        "s2": {"attention": "full", "s2_attention": True, "s2_group_ratio": settings["s2_group_ratio"]},
        "window": {"attention": "sliding", "sliding_window_size": settings["window"]},
        "chunks": {"attention": "sliding", "sliding_window_size": settings["window"]},
    }.get(method.removesuffix(" offload"), {})
    model = with_fields(base, block_size=T, **fields).train()
    variants = model.config.layer_variants
    if method in ("linear", "transfer"):
        make_linear(model, linear_config(model.config, {}))
    if method == "transfer":
        loss = AttentionTransfer(model, variants)
        for p in loss.parameters():
            p.data = p.data.float() if p.requires_grad else p.data
        return model, loss
    add_lora(model, LoRAConfig(r=settings["r"], alpha=2 * settings["r"]))
    if method.endswith("chunks"):
        return model, ExactChunks(model, settings["chunk_size"], settings["chunk_offload"])
    return model, model


def layers_again(
    method: str, model: Any, batch: Any, weights: int, settings: dict[str, Any], peer_memory: float | None
) -> int:
    """How many layers compute their activations again."""
    import torch

    from lit_swa.exact_chunks import border_bytes, kept_bytes
    from lit_swa.train import fitting_recompute

    if method in ("all", "full chunks") or method.endswith("offload"):
        return model.config.n_layer
    if method == "transfer" or batch.idx.device.type != "cuda":  # it keeps nothing for a backward
        return model.config.n_layer if method == "same memory" else 0
    limit = 0.9 * usable_bytes(batch.idx.device, settings["memory_GB"])
    if method == "same memory":
        limit = (peer_memory or 0) * 1e9 + torch.cuda.memory_allocated() - weights
    if method == "chunks":
        size, width = settings["chunk_size"], model.dtype.itemsize
        limit -= border_bytes(model, size, width)
        limit -= 0 if settings["chunk_offload"] else kept_bytes(model, batch.idx.size(1), size, width)
        batch = batch._replace(idx=batch.idx[:, :size], targets=batch.targets[:, :size], documents=None)
    return fitting_recompute(model, batch, int(limit))


def usable_bytes(device: Any, memory_gb: float | None) -> float:
    import torch

    there = torch.cuda.get_device_properties(device).total_memory
    return there if memory_gb is None else min(there, memory_gb * 1e9)


def build_peer(T: int, device: str, settings: dict[str, Any], dtype: Any) -> tuple[Callable[[], None], int, float]:
    """The same with transformers and PEFT, with gradient checkpointing in every layer, as their guides recommend."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lit_swa import Config
    from lit_swa.formats.hf_export import config_to_hf

    fields = {"n_layer": settings["n_layer"]} if settings["n_layer"] else {}
    hf = config_to_hf(Config.from_name(settings["name"], block_size=T, **fields))
    hf.pop("architectures", None)
    if hf.pop("model_type") != "llama":
        raise ValueError("The peer is set up for shapes of the Llama family only: add --transformers false.")
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**hf), dtype=dtype)
    weights = sum(p.nbytes for p in model.parameters())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=settings["r"], lora_alpha=2 * settings["r"], target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, hf["vocab_size"], (1, T), device=device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, hf["num_hidden_layers"], weights / 1e9


def first_steps(step: Callable[[], None], device: str, weights_gb: float, only: bool) -> dict[str, float]:
    """Seconds of the first step, which compiles kernels and pins memory, and unless it is the only one of the second;
    and the memory of the last of them, with the weights of its own model only."""
    import torch

    row = {}
    for name in ["first_s"] if only else ["first_s", "second_s"]:
        before = 0
        if device.startswith("cuda"):
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        row[name] = timed(step, device)
    if device.startswith("cuda"):
        row["memory_GB"] = (torch.cuda.max_memory_allocated() - before) / 1e9 + weights_gb
    return row


def progress(row: dict[str, Any]) -> str:
    """What is known of a method before the steps that count."""
    again = f", the second {row['second_s']:.1f} s" if "second_s" in row else ""
    memory = f", {row['memory_GB']:.1f} GB" if "memory_GB" in row else ""
    return f"the first step took {row['first_s']:.1f} s{again}{memory}"


def describe(row: dict[str, Any]) -> str:
    start = f"T {row['T']:7d}  {row['method']:12s}"
    if "error" in row:
        return f"{start} {row['error'][:100]}"
    memory = f"  {row['memory_GB']:5.1f} GB" if "memory_GB" in row else ""
    return (
        f"{start} {row['tok_s']:9.0f} tok/s{memory}  {row['recompute']} layers recompute  first {row['first_s']:.1f} s"
    )


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
