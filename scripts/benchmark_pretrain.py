"""Measure a pretraining step beside transformers': python scripts/benchmark_pretrain.py."""

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

from lit_swa.utils import release_memory, timed


class Method(NamedTuple):
    """How a step is made. Methods of one group take their turns beside each other, and share a model where they can."""

    group: str  # the weights, their gradients and moments: float32, products in `dtype`; pure: all in `dtype`
    peer: bool = False
    compiled: bool = True
    windowed: bool = False


METHODS = {
    "eager": Method("float32", compiled=False),
    "compiled": Method("float32"),
    "window": Method("float32", windowed=True),
    "transformers": Method("float32", peer=True),
    "compiled pure": Method("pure"),
    "transformers pure": Method("pure", peer=True),
}


def main(
    name: str = "TinyLlama-1.1B",
    length: int = 2048,
    micro_batch_size: int = 8,
    accumulate: int = 1,
    window: int | None = None,
    methods: list[str] | None = None,
    n_layer: int | None = None,
    recompute: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    repeats: int = 5,
    profile: Path | None = None,
    output: Path = Path("tutorials/results/benchmark_pretrain.json"),
) -> None:
    """Print tokens per second, model FLOP utilisation and memory of a training step on random tokens.

    eager and compiled are what pretrain/base.py does, without and with --compile: weights, gradients and the moments of
    AdamW in float32, products in bfloat16. window is compiled with a sliding window in every layer. transformers is the
    same shape there, compiled as a whole, with SDPA, under autocast. The pure ones hold weights, gradients and moments
    in bfloat16 too, which is faster and learns worse. All use fused AdamW and clip gradients. The methods of one
    precision alternate, and the median of `repeats` counts. The loss is that of a method's first step; those of ours in
    one precision train one model.

    Args:
        name: A named shape of the Llama family.
        length: Tokens of a row.
        micro_batch_size: Rows that are read at once.
        accumulate: Micro-batches of a step.
        window: Keys that a query sees in the method window.
        methods: Which to measure, of eager, compiled, window, transformers, "compiled pure", "transformers pure". By
            default all, without window where none is given.
        n_layer: Number of layers. By default the shape's.
        recompute: How many layers compute their activations again; of transformers all, if any.
        device: auto, cpu or cuda.
        dtype: Of products: float32 or bfloat16.
        repeats: How often each step is timed.
        profile: Write a trace of some steps of the first method that is compiled and ours to this file, and print
            which kernels took longest.
        output: The JSON file to write.
    """
    import torch

    from lit_swa import Config
    from lit_swa.formats.files import write_json
    from lit_swa.train import use_whole_memory
    from lit_swa.training.flops import peak_flops, token_flops
    from lit_swa.utils import describe_command, describe_machine, pick_device, pick_dtype

    chosen = [m for m in METHODS if m != "window" or window] if methods is None else methods
    if unknown := [m for m in chosen if m not in METHODS]:
        raise ValueError(f"There is no method {unknown[0]!r}: choose from {', '.join(METHODS)}.")
    if "window" in chosen and not (window and window < length):
        raise ValueError(f"The method window needs a window: give a --window of less than {length}, a row's tokens.")
    if profile is not None and not own_compiled(chosen):
        raise ValueError(f"There is no step to trace: add one of {', '.join(own_compiled(METHODS))} to --methods.")
    use_whole_memory()
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    fields = {"block_size": length} | ({"n_layer": n_layer} if n_layer else {})
    config = Config.from_name(name, **fields)
    settings = {"name": name, "length": length, "micro_batch_size": micro_batch_size, "accumulate": accumulate,
                "window": window, "n_layer": n_layer, "recompute": recompute, "dtype": dtype,
                "repeats": repeats}  # fmt: skip
    peak = peak_flops(torch.device(device), getattr(torch, dtype))
    command = describe_command("--output")
    result: dict[str, Any] = {"command": command, "machine": describe_machine(device), "settings": settings}
    result |= {"peak_flops": peak, "rows": []}
    output.parent.mkdir(parents=True, exist_ok=True)
    for group in dict.fromkeys(METHODS[m].group for m in chosen):
        names = [m for m in chosen if METHODS[m].group == group]
        rows = Group(config, settings, device).measure(names, profile)
        profile = None if own_compiled(names) else profile
        for row in rows:
            windowed = METHODS[row["method"]].windowed
            row["flops_per_token"] = token_flops(with_window(config, window) if windowed else config, length)
            if peak and "tok_s" in row:
                row["mfu"] = row["tok_s"] * row["flops_per_token"] / peak
            result["rows"].append(row)
            print(describe(row), flush=True)
        write_json(output, result)


def own_compiled(names: Iterable[str]) -> list[str]:
    return [name for name in names if METHODS[name].compiled and not METHODS[name].peer]


def with_window(config: Any, window: int) -> Any:
    return config.override(attention="sliding", sliding_window_size=window)


class Group:
    """The methods of one precision: a model of ours for all that are ours, and one of transformers."""

    def __init__(self, config: Any, settings: dict[str, Any], device: str) -> None:
        import torch

        self.config, self.settings, self.device = config, settings, torch.device(device)
        self.dtype, self.own, self.steps = getattr(torch, settings["dtype"]), {}, {}
        torch.manual_seed(0)
        shape = (settings["micro_batch_size"], settings["length"] + 1)
        self.ids = torch.randint(0, config.vocab_size, shape, device=device)
        self.tokens = settings["accumulate"] * settings["micro_batch_size"] * settings["length"]

    def measure(self, names: list[str], profile: Path | None) -> list[dict[str, Any]]:
        """A row for each method, measured in turns."""
        rows: dict[str, dict[str, Any]] = {}
        for name in names:
            rows[name] = {"method": name}
            try:
                self.add(name)
                rows[name] |= self.first_steps(name)
                print(f"{name}: first step {rows[name]['first_s']:.1f} s", file=sys.stderr, flush=True)
            except (RuntimeError, ValueError) as error:
                rows[name]["error"] = " ".join(str(error).split())[:200]
                self.steps.pop(name, None)
                release_memory()
        times: dict[str, list[float]] = {name: [] for name in self.steps}
        for _ in range(self.settings["repeats"]):
            for name, step in self.steps.items():
                times[name].append(timed(step, self.device))
        for name, values in times.items():
            seconds = sorted(values)[len(values) // 2]
            rows[name] |= {"step_s": seconds, "tok_s": self.tokens / seconds, "steps_s": values}
        if profile is not None and (traced := own_compiled(self.steps)):
            self.trace(traced[0], profile)
        self.own.clear()
        self.steps.clear()
        release_memory()
        return list(rows.values())

    def add(self, name: str) -> None:
        """The step of a method: it gives the loss."""
        method, before = METHODS[name], allocated(self.device)
        kind = "peer" if method.peer else "ours"
        if kind not in self.own:
            self.own[kind] = self.build_peer(method) if method.peer else self.build(method)
            self.own[kind]["bytes"] = allocated(self.device) - before
        made = self.own[kind]
        losses = made["losses"] if method.peer else made["losses"](method)
        self.steps[name] = lambda: self.step(losses, made["model"], made["optimizer"])

    def step(self, losses: Callable[[], Any], model: Any, optimizer: Any) -> float:
        from lit_swa.train import clip_gradients

        total = 0.0
        for _ in range(self.settings["accumulate"]):
            loss = losses() / self.settings["accumulate"]
            loss.backward()
            total = total + loss.detach()
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)

    def build(self, method: Method) -> dict[str, Any]:
        """A model of ours as pretrain/base.py makes it; a window of the row's length is full attention."""
        import torch

        from lit_swa import GPT
        from lit_swa.arguments import Pretraining
        from lit_swa.train import build_optimizer, differentiate_pieces_at_once, recompute_blocks, train_in_float32
        from lit_swa.training.compiling import compile_blocks
        from lit_swa.training.windows import set_window

        length, window, n = (self.settings[key] for key in ("length", "window", "recompute"))
        config = with_window(self.config, length) if window else self.config
        torch.set_default_dtype(torch.float32 if method.group == "float32" else self.dtype)
        with torch.device(self.device):
            model = GPT(config)
        torch.set_default_dtype(torch.float32)
        model.init_weights(0)
        model.train()
        if method.group == "float32":
            train_in_float32(model, self.dtype)
        differentiate_pieces_at_once(model)
        blocks, plain_losses = model.transformer.h, model.token_losses
        recompute_blocks(model, n)
        eager = [block.__dict__.get("forward", block.forward) for block in blocks]
        recompute_blocks(model, n)
        compile_blocks(model)
        compiled, compiled_losses = [block.forward for block in blocks], model.token_losses
        idx, targets = self.ids[:, :-1], self.ids[:, 1:].contiguous()

        def losses(method: Method) -> Callable[[], Any]:
            def loss() -> Any:
                for block, forward in zip(blocks, compiled if method.compiled else eager, strict=True):
                    block.forward = forward
                model.token_losses = compiled_losses if method.compiled else plain_losses
                if window:
                    set_window(model, window if method.windowed else length)
                return model(idx, targets=targets) / targets.numel()

            return loss

        return {"model": model, "optimizer": build_optimizer(model, Pretraining(data=""), 1e-4), "losses": losses}

    def build_peer(self, method: Method) -> dict[str, Any]:
        """The same shape in transformers, compiled. It is given a causal kernel: some of its releases (5.17) hand SDPA
        a mask once they are compiled, which is slower."""
        import torch
        from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, LlamaConfig
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        from lit_swa.arguments import Pretraining
        from lit_swa.formats.hf_export import config_to_hf
        from lit_swa.train import build_optimizer

        hf = config_to_hf(self.config)
        hf.pop("architectures", None)
        if hf.pop("model_type") != "llama":
            raise ValueError("The peer is set up for shapes of the Llama family only: leave it out of --methods.")
        dtype = torch.float32 if method.group == "float32" else self.dtype
        AttentionInterface.register("causal_sdpa", sdpa_attention_forward)
        AttentionMaskInterface.register("causal_sdpa", lambda *_, **__: None)
        with self.device:
            model = AutoModelForCausalLM.from_config(LlamaConfig(**hf), dtype=dtype, attn_implementation="causal_sdpa")
        model.train()
        if self.settings["recompute"]:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        compiled, ids = torch.compile(model), self.ids[:, :-1].contiguous()
        autocast = dtype != self.dtype

        def loss() -> Any:
            with torch.autocast(self.device.type, self.dtype, enabled=autocast):
                return compiled(input_ids=ids, labels=ids).loss

        return {"model": model, "optimizer": build_optimizer(model, Pretraining(data=""), 1e-4), "losses": loss}

    def first_steps(self, name: str) -> dict[str, float]:
        """Seconds of the first step, which compiles, and its loss; memory of the second, with the weights and moments
        of its own model only."""
        import torch

        method, started = METHODS[name], time.perf_counter()
        row = {"loss": self.steps[name](), "first_s": time.perf_counter() - started}
        if self.device.type != "cuda":
            return row
        made = self.own["peer" if method.peer else "ours"]
        if "moments" not in made:
            made["moments"] = sum(t.nbytes for s in made["optimizer"].state.values() for t in s.values())
        torch.cuda.synchronize()
        before = allocated(self.device)
        torch.cuda.reset_peak_memory_stats()
        self.steps[name]()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        return row | {"memory_GB": (peak + made["bytes"] + made["moments"]) / 1e9}

    def trace(self, name: str, path: Path) -> None:
        from lit_swa.speed import StepTrace

        trace = StepTrace(path, self.device, skip=1, steps=2)
        for _ in range(5):
            trace.step()
            self.steps[name]()
        trace.close()


def allocated(device: Any) -> int:
    import torch

    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def describe(row: dict[str, Any]) -> str:
    start = f"{row['method']:18s}"
    if "error" in row:
        return f"{start} {row['error'][:120]}"
    share = f"  MFU {row['mfu']:.1%}" if "mfu" in row else ""
    memory = f"  {row['memory_GB']:5.1f} GB" if "memory_GB" in row else ""
    return f"{start} {row['tok_s']:9.0f} tok/s{share}{memory}  loss {row['loss']:.3f}  first {row['first_s']:.1f} s"


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
