"""What quantising costs: python scripts/evaluate_quantized.py --data book.txt --quantized '[int8,int4:64,DIR]'."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed


def main(
    data: list[Path] | Path,
    quantized: list[str],
    checkpoint_dir: Path | None = None,
    seq_len: int = 1024,
    windows: int = 8,
    device: str = "auto",
    dtype: str = "auto",
    output: Path = Path("out/evaluate_quantized.json"),
) -> None:
    """Print, for each way to hold the weights, the perplexity of a text, and how far it is from the dense model.

    The distance is the mean KL divergence of its predictions, and how often the likeliest token is the same. The bytes
    of the linear layers are given too.

    Both models read the same windows of the text, and every token of a window but its first counts. What an earlier run
    on the same windows has measured, interrupted or not, is not measured again.

    Args:
        data: A .txt file (UTF-8), a list or a directory of such files, or a .bin file of token ids; text that the model
            was not calibrated on.
        quantized: What is compared with the dense checkpoint: a mode that --quantize takes, of int4 and int4-hqq with
            the groups' size behind a colon where it is not to be the largest that fits (int4:32), or a directory that
            scripts/quantize.py wrote. A list, such as '[int8,int4]'.
        checkpoint_dir: The dense checkpoint's directory or name. By default SmolLM2-135M-Instruct, which is downloaded
            once.
        seq_len: Tokens in a window.
        windows: Windows that are read, evenly spread over the text.
        device: auto, cpu, cuda or mps.
        dtype: What both models compute in: float32, bfloat16 or float16; auto is bfloat16 on a GPU, else float32.
        output: The JSON file for the results. Their picture is written next to it.
    """
    from lit_swa import evaluate
    from lit_swa.checkpoint import check_checkpoint_dir, load_config
    from lit_swa.formats.directory import read_quantization
    from lit_swa.formats.download import find_checkpoint
    from lit_swa.formats.quantized import require_dense
    from lit_swa.plots import check_output, draw_results
    from lit_swa.utils import describe_command, describe_machine

    device, dtype = evaluate.pick_place(device, dtype)
    check_output(output)
    checkpoint_dir = find_checkpoint(checkpoint_dir)
    check_checkpoint_dir(checkpoint_dir)
    require_dense(read_quantization(checkpoint_dir), checkpoint_dir, "give the dense one as --checkpoint_dir")
    ways = [{"name": "dense", "key": "dense"}, *map(way_of, quantized)]
    config = load_config(checkpoint_dir)
    evaluate.check_context(config, seq_len)
    tokens, prefix = evaluate.read_stream(data, checkpoint_dir, config.vocab_size)
    cut = evaluate.spread_windows(len(tokens), seq_len, windows, seq_len, data, prefix)
    arguments = {
        "checkpoint_dir": checkpoint_dir, "data": data, "seq_len": seq_len, "windows": windows, "device": device,
        "dtype": dtype, "data_sha256": evaluate.check_tokens(tokens, config.vocab_size, data),
        "weights": evaluate.weights_identity(checkpoint_dir),
    }  # fmt: skip
    with evaluate.Results(output, arguments) as results:
        content = results.finished or {}
        results.parts |= {row["key"]: row for row in content.get("rows", [])}
        if any(way["key"] not in results.parts for way in ways):
            compare_all(results, ways, tokens, cut)
            content |= {"command": describe_command(), "machine": describe_machine(device)}
        content["rows"] = [results.parts[way["key"]] for way in ways]
        results.finish(content)
        print("\n".join(table_of(content["rows"])))
        draw_results(output, lambda plt: draw(plt, {"arguments": results.arguments} | content))


def way_of(name: str) -> dict[str, Any]:
    """What a name of --quantized means: the arguments of load_model, and a key that its results are found by.

    Raises ValueError, or FileNotFoundError.
    """
    from lit_swa.checkpoint import check_checkpoint_dir
    from lit_swa.evaluate import weights_identity
    from lit_swa.quantize import MODES, check_request

    mode, _, group = name.partition(":")
    if mode not in MODES:
        if not Path(name).is_dir():
            raise ValueError(f"{name} is no directory and no mode: give one, or choose from {', '.join(MODES)}.")
        check_checkpoint_dir(name, tokenizer=False)
        return {"name": name, "key": weights_identity(Path(name)), "load": {"checkpoint_dir": name}}
    if group and not group.isdecimal():
        raise ValueError(f"{name} is no mode with a group's size: write int4:64.")
    load = {"quantize": mode, "group_size": int(group) if group else None}
    check_request(mode, group_size=load["group_size"])
    return {"name": name, "key": name, "load": load}


def compare_all(results, ways: list[dict[str, Any]], tokens, cut) -> None:
    """Measure what results.parts does not hold yet."""
    from lit_swa.checkpoint import load_model
    from lit_swa.judges import hidden_states
    from lit_swa.utils import ProgressLine

    a = results.arguments
    results.save()  # a disk that is full or read-only shows now
    place = {"dtype": a["dtype"], "device": a["device"]}
    idx = cut.batch(tokens, cut.starts, a["device"])  # (windows, T)
    left = [way for way in ways if way["key"] not in results.parts]
    line = ProgressLine((1 + len(left)) * idx.numel(), "tokens")
    dense = load_model(a["checkpoint_dir"], **place)
    # Of its hidden states its logits are made again for each comparison.
    states = hidden_states(dense, idx, lambda windows: line.show(windows * idx.size(1), "dense"))
    for n, way in enumerate(left, start=1):
        how = {"checkpoint_dir": a["checkpoint_dir"]} | way.get("load", {})
        model = load_model(**how, **place) if "load" in way else dense

        def show(windows: int, n: int = n, name: str = way["name"]) -> None:
            line.show((n * len(idx) + windows) * idx.size(1), name)

        row = {"name": label(way["name"], how, model), "key": way["key"]}
        results.add(way["key"], row | measure(dense, states, model, idx, cut.first, show), every=0)
        del model


def label(name: str, how: dict[str, Any], model) -> str:
    """What a row is called: the mode, with the size of its groups and the name of a directory."""
    from lit_swa.formats.directory import read_quantization
    from lit_swa.formats.quantized import quantization_of

    stored = read_quantization(how["checkpoint_dir"])
    mode = how.get("quantize") or (name if stored is None else stored.mode)
    held = quantization_of(model)
    mode = mode if held is None or held.group_size is None else f"{mode}:{held.group_size}"
    return mode if stored is None else f"{mode} ({Path(name).name})"


def measure(dense, states: list, model, idx, first: int, show) -> dict[str, float]:
    """How far a model is from the dense one, and the bytes of its linear layers."""
    from lit_swa.judges import divergence
    from lit_swa.linear_formats import weight_bytes, weighty_layers

    row = divergence(dense, states, model, idx, first, show)
    return row | {"bytes": sum(map(weight_bytes, weighty_layers(model).values()))}


def table_of(rows: list[dict[str, Any]]) -> list[str]:
    """A markdown table."""
    lines = [
        "| weights | perplexity | | KL to dense | same top token | linear layers |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        change = f"{row['ppl'] / rows[0]['ppl'] - 1:+.2%}" if row is not rows[0] else ""
        lines.append(
            f"| `{row['name']}` | {row['ppl']:.2f} | {change} | {row['kl']:.4f} | {row['top_token']:.1%} | "
            f"{row['bytes'] / 1e6:.1f} MB |"
        )
    return lines


def draw(plt, result: dict[str, Any]):
    """KL divergence over bytes: a point for each way to hold the weights."""
    from lit_swa.plots import log_axis, names_of, set_title, style_of

    rows, a = result["rows"][1:], result["arguments"]
    figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for row in rows:
        style = style_of(row["name"].partition(":")[0])
        axis.plot(row["bytes"] / 1e6, row["kl"], color=style.colour, marker=style.marker, linestyle="")
        axis.annotate(f" {row['name']}", (row["bytes"] / 1e6, row["kl"]), color=style.colour, fontsize=9, va="center")
    log_axis(axis)
    axis.margins(x=0.18)
    axis.set(xlabel="linear layers, MB", ylabel="mean KL to the dense model, nats")
    axis.grid(alpha=0.3)
    set_title(
        figure, f"{Path(a['checkpoint_dir']).name}: what quantising costs, on {names_of(a['data'])}",
        f"dense: {result['rows'][0]['bytes'] / 1e6:.0f} MB, perplexity {result['rows'][0]['ppl']:.2f}",
    )  # fmt: skip
    return figure


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
