"""Memory, disk and hours of finetune/linearize_blockwise.py: python scripts/plan_blockwise.py --name Llama-3.1-70B."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

if TYPE_CHECKING:
    import torch

    from lit_swa.config import Config


def main(
    name: str = "Llama-3.1-8B",
    layers_per_block: int = 4,
    tokens: int = 20_000_000,
    epochs: float = 2.0,
    max_seq_length: int = 1024,
    micro_batch_size: int | None = None,
    read_rate: float | None = None,
    train_rate: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    repeats: int = 3,
    model: dict[str, Any] | None = None,
) -> None:
    """Print a table of what a model takes to become linear block by block.

    One of its layers, with random weights, is measured on this device, so no checkpoint is needed.

    The hours are those of one device like this; blocks train side by side. Stage 2 is not among them.

    Args:
        name: A named shape, such as Llama-3.1-8B.
        layers_per_block: Layers of a block.
        tokens: How many tokens are saved for each block.
        epochs: How often a block reads them.
        max_seq_length: Tokens of a text.
        micro_batch_size: Texts that are read at once. By default as finetune/linearize_blockwise.py.
        read_rate: Tokens per second of one layer's inference, where it was measured before.
        train_rate: Tokens per second of one layer's training, likewise. Given both, nothing is measured.
        device: auto, cpu or cuda.
        dtype: float32, bfloat16 or float16; auto is bfloat16 on a GPU and float32 on a CPU.
        repeats: Passes that are timed; the fastest counts.
        model: Any field of the model's config, as --model.FIELD VALUE.
    """
    from lit_swa.checks import check_range

    check_range("layers_per_block", layers_per_block, 1, 4096)
    check_range("tokens", tokens, 1, 2**31)
    check_range("epochs", epochs, 1e-6, 1e6)
    check_range("max_seq_length", max_seq_length, 2, 2**20)
    check_range("micro_batch_size", micro_batch_size or 1, 1, 2**20)
    check_range("repeats", repeats, 1, 10**6)
    for option, rate in (("read_rate", read_rate), ("train_rate", train_rate)):
        check_range(option, 1.0 if rate is None else rate, 1e-6, 1e15)
    if (read_rate is None) != (train_rate is None):
        raise ValueError("read_rate and train_rate belong together: give both, or none to measure them.")

    import torch

    from lit_swa import Config
    from lit_swa.linearize import linear_config
    from lit_swa.training.distribution import use_tf32
    from lit_swa.training.feed import tokens_at_once
    from lit_swa.utils import describe_machine, pick_device, pick_dtype

    place = pick_device(device)
    kind = getattr(torch, pick_dtype(dtype, place))
    if place.startswith("cuda") and kind != torch.float32:
        use_tf32()  # as finetune/linearize_blockwise.py
    base = Config.from_name(name)
    linear, where = linear_config(base, model or {}), "as given"
    rates = Rates(read_rate, train_rate, None)
    if read_rate is None:
        texts = micro_batch_size or max(1, tokens_at_once(torch.device(place), base.n_embd) // max_seq_length)
        rates = measure(base, linear, torch.device(place), kind, [max_seq_length] * texts, repeats)
        where = f"measured on {describe_machine(place)}, {texts} texts of {max_seq_length} tokens at once"
    print(f"{name}, {str(kind).removeprefix('torch.')}, {tokens:,} tokens that are read {epochs:g} times.")
    print(f"One layer's rates: {where}.\n")
    print("| | |\n| --- | ---: |")
    for what, value in table(base, linear, kind, layers_per_block, tokens, epochs, rates):
        print(f"| {what} | {value} |")


class Rates(NamedTuple):
    """What was measured of one layer."""

    read: float  # tokens per second of inference
    train: float
    bytes: int | None  # that a pass of training takes beside the weights and what is learned; None: not measured


def table(
    base: "Config", linear: "Config", dtype: "torch.dtype", k: int, tokens: int, epochs: float, rates: Rates
) -> list[tuple[str, str]]:
    """(what, how much) of blocks of k layers."""
    from lit_swa.formats.hugging_face import expected_shapes
    from lit_swa.memory import format_bytes

    sizes = {name: math.prod(shape) for name, shape in expected_shapes(linear).items()}
    learned = sum(n for name, n in sizes.items() if ".attn.mixer." in name)
    in_layers = sum(n for name, n in sizes.items() if name.startswith("transformer.h.")) - learned
    layers, k = linear.layer_variants.count("linear"), min(k, base.n_layer)
    blocks, width, one = -(-base.n_layer // k), base.n_embd * dtype.itemsize, in_layers // base.n_layer
    weights, trained = k * one * dtype.itemsize, 16 * k * learned // layers  # float32: weight, gradient, two moments
    beside = "not measured" if rates.bytes is None else format_bytes(rates.bytes)
    hours = tokens / 3600
    return [
        ("blocks", f"{blocks} of {k} layers"),
        ("weights of the model", format_bytes((sum(sizes.values()) - learned) * dtype.itemsize)),
        ("weights that stage 1 trains", f"{learned:,} in {layers} of {base.n_layer} layers"),
        ("memory: a block's weights", format_bytes(weights)),
        ("memory: what it trains, with gradients and moments", format_bytes(trained)),
        ("memory: a pass of training, layer by layer", beside),
        ("memory: all three", beside if rates.bytes is None else format_bytes(weights + trained + rates.bytes)),
        ("disk: the blocks' weights", format_bytes(in_layers * dtype.itemsize)),
        ("disk: inputs of one block", format_bytes(tokens * width)),
        ("disk: inputs of all blocks", format_bytes(blocks * tokens * width)),
        ("inference of one layer", f"{rates.read:,.0f} tok/s"),
        ("training of one layer", f"{rates.train:,.0f} tok/s"),
        ("what a block in training reads from the disk", f"{format_bytes(rates.train / k * width)}/s"),
        ("hours: inputs of all blocks", f"{hours * (blocks - 1) * k / rates.read:,.1f}"),
        ("hours: training one block", f"{hours * epochs * k / rates.train:,.1f}"),
        ("hours: training all blocks on one device", f"{hours * epochs * base.n_layer / rates.train:,.1f}"),
    ]


def measure(
    base: "Config", linear: "Config", device: "torch.device", dtype: "torch.dtype", texts: list[int], repeats: int
) -> Rates:
    """What the first layer that becomes linear takes, for texts of these lengths at once."""
    import torch

    from lit_swa.linearize import AttentionTransfer, make_linear
    from lit_swa.memory import peak_memory, require_memory
    from lit_swa.mixers import mixing_with
    from lit_swa.random_model import random_model
    from lit_swa.training.flops import count_weights

    variant = base.layer_variants[linear.layer_variants.index("linear")]
    small = {"n_layer": 1, "vocab_size": max(texts), "padded_vocab_size": max(texts), "tie_embeddings": False}
    config = base.override(attention=variant, **small)
    remedy = "measure on a device with more memory, or give both rates"
    require_memory(count_weights(config) * dtype.itemsize, device, "One layer", remedy)
    model = random_model(config, dtype, device)
    softmax = model.layers[0].mixer
    make_linear(model, linear.override(attention="linear", **small))
    learners = AttentionTransfer(model, [variant])
    for p in learners.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    optimizer = torch.optim.AdamW([p for p in learners.parameters() if p.requires_grad], lr=0.0)
    idx = torch.cat([torch.arange(n) for n in texts])[None].to(device)

    def read() -> None:
        with torch.no_grad(), mixing_with(model, [softmax]):
            model.hidden_states(idx, documents=texts)

    def train() -> None:
        learners(idx, documents=texts).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_memory(device)
    rates = [idx.numel() / fastest(run, device, repeats) for run in (read, train)]
    moments = sum(3 * p.nbytes for p in learners.parameters() if p.requires_grad)  # and the gradient
    return Rates(*rates, max(0, peak_memory(device) - before - moments))


def fastest(run: Callable[[], None], device: "torch.device", repeats: int) -> float:
    """Seconds of the fastest of some calls, after one that does not count."""
    from lit_swa.utils import timed

    return min([timed(run, device) for _ in range(repeats + 1)][1:])


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
