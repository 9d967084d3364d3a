"""Perplexity of a text over windows: python scripts/evaluate_ppl.py --data book.txt --seq_len 4096 --score last."""

import sys
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed


def main(
    data: list[Path] | Path,
    checkpoint_dir: Path | None = None,
    seq_len: int = 2048,
    stride: int | None = None,
    score: Literal["all", "last"] = "all",
    max_tokens: int | None = None,
    bucket: int | None = None,
    batch_size: int = 1,
    chunk_size: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: Literal["int8", "int4", "int4-hqq", "nf4", "nf4-dq", "fp4", "fp4-dq"] | None = None,
    devices: int = 1,
    num_nodes: int = 1,
    seed: int = 1234,
    output: Path = Path("out/evaluate_ppl.json"),
    model: dict[str, Any] | None = None,
) -> None:
    """Print the perplexity of a text that is read in windows, overall and by position, and write it to a JSON file.

    The text is one stream of tokens. A window of seq_len tokens begins every `stride` tokens and is read as if nothing
    came before it. It begins with what the tokenizer puts in front of a text, such as BOS; in a .bin file, it begins
    with the file's own tokens. Only full windows are read. The first token of a window is predicted from nothing and
    never counts.
    An interrupted run goes on where it stopped when it is started again with the same arguments.

    Args:
        data: A .txt file (UTF-8), a list or a directory of such files, or a .bin file of token ids: uint16 for a
            vocabulary of up to 65,536, else uint32.
        checkpoint_dir: A checkpoint's directory or name. By default SmolLM2-135M-Instruct, which is downloaded once.
        seq_len: Tokens in a window, BOS included.
        stride: Tokens of the text from the beginning of one window to that of the next. By default, and at most, as
            many as a window has.
        score: all counts every token of a window but its first, so windows that overlap count a token several times
            (LongLoRA's measure); last counts the last `stride` tokens of each window, which have a long context.
        max_tokens: Read only so many tokens of the stream.
        bucket: How many positions one line of the perplexity by position covers. By default an eighth of seq_len.
        batch_size: Windows that are read at once.
        chunk_size: Feed a window to the model in calls of so many tokens through the KV cache, which takes less memory;
            0 feeds it in one call. The result is the same up to rounding (except with the RoPE scalings dynamic and
            longrope, which follow the length read so far). By default as many as fit the free memory.
        device: auto, cpu, cuda or mps.
        dtype: float32, bfloat16 or float16; auto is bfloat16 on a GPU and float32 on a CPU.
        devices: Processes, each with a GPU of its own (or on the CPU) and a share of the windows. Needs lightning.
        num_nodes: Machines that take part, each with so many devices.
        quantize: Hold weights in 8 or 4 bits, chosen while they are read; nf4 and fp4 need bitsandbytes.
        seed: Seeds torch's random numbers, for a model that you have changed to draw some.
        output: The JSON file for the results.
        model: Any field of the model's config, as --model.FIELD VALUE (--model.help lists them), such as
            --model.attention sliding --model.sliding_window_size 1024.
    """
    from contextlib import nullcontext
    from dataclasses import asdict

    import torch

    from lit_swa import evaluate
    from lit_swa.checkpoint import check_checkpoint_dir, load_config
    from lit_swa.checks import check_at_least
    from lit_swa.formats.download import find_checkpoint

    device, dtype = evaluate.pick_place(device, dtype)
    stride = seq_len if stride is None else stride
    evaluate.check_cut(seq_len, stride, score, bucket)
    check_at_least(
        batch_size=(batch_size, 1), devices=(devices, 1), num_nodes=(num_nodes, 1), chunk_size=(chunk_size, 0)
    )
    checkpoint_dir = find_checkpoint(checkpoint_dir)
    check_checkpoint_dir(checkpoint_dir, tokenizer=False)
    config = load_config(checkpoint_dir).override(**model or {})
    evaluate.check_context(config, seq_len)
    tokens, prefix = evaluate.read_stream(data, checkpoint_dir, config.vocab_size, max_tokens)
    windows = evaluate.full_windows(len(tokens), seq_len, stride, score, bucket, name_of(data), prefix)
    arguments = {
        "checkpoint_dir": checkpoint_dir, "data": data, "seq_len": seq_len, "stride": stride, "score": score,
        "max_tokens": max_tokens, "bucket": windows.bucket, "batch_size": batch_size, "chunk_size": chunk_size,
        "device": device, "dtype": dtype, **({"quantize": quantize} if quantize else {}), "seed": seed,
        **({"prefix": prefix} if prefix else {}),
        "model": asdict(config), "data_tokens": len(tokens),
        "data_sha256": evaluate.check_tokens(tokens, config.vocab_size, name_of(data)),
        "weights": evaluate.weights_identity(checkpoint_dir),
    }  # fmt: skip
    torch.manual_seed(seed)
    ranks = evaluate.launch_ranks(device, devices, num_nodes)
    with evaluate.Results(output, arguments) if ranks.rank == 0 else nullcontext() as results:
        finished = ranks.broadcast(results.finished if results else None)
        if finished is None:
            finished = run(ranks, results, arguments, model or {}, tokens, windows)
        elif ranks.rank == 0:
            print(f"{output} holds the result of these arguments already", file=sys.stderr)
        if ranks.rank == 0:
            report(finished, output)
    ranks.leave()


def name_of(data: list[Path] | Path) -> str:
    return str(data) if isinstance(data, Path) else f"{data[0]} and {len(data) - 1} more" if data[1:] else str(*data)


def run(ranks, results, arguments: dict[str, Any], overrides: dict[str, Any], tokens, windows) -> dict[str, Any] | None:
    """Load the model, read the windows that are left, write the results. Returns None on all ranks but 0."""
    from lit_swa.checkpoint import load_model
    from lit_swa.evaluate import pick_chunk_size
    from lit_swa.generate import require_activations
    from lit_swa.linear_formats import pack_for_cpu
    from lit_swa.utils import describe_command, describe_machine, memory_in_use

    if results:
        results.save()  # a disk that is full or read-only shows now and not after hours
    quantize = arguments.get("quantize")
    gpt = load_model(arguments["checkpoint_dir"], arguments["dtype"], ranks.device, quantize=quantize, **overrides)
    pack_for_cpu(gpt)
    batch_size, chunk_size = min(arguments["batch_size"], len(windows.starts)), arguments["chunk_size"]
    if chunk_size is None:  # a resumed run takes the size it had, or its numbers would be rounded in another way
        picked = pick_chunk_size(gpt, batch_size, windows.seq_len)
        chunk_size = ranks.broadcast(results.parts.setdefault("_chunk_size", picked) if results else None)
    require_activations(gpt, batch_size, min(chunk_size or windows.seq_len, windows.seq_len))
    read_windows(ranks, results, gpt, tokens, windows, batch_size, chunk_size)
    if results is None:
        return None
    sums = [window for a in windows.starts[::batch_size] for window in results.parts[str(a)]]
    seconds = results.parts["_seconds"]
    result = {
        "command": describe_command(),
        "machine": describe_machine(ranks.device),
        "processes": ranks.count,
        "score": arguments["score"],
        **windows.summary(sums),
        "windows": len(windows.starts),
        "chunk_size": chunk_size,
        "seconds": seconds,
        "tokens_per_second": len(windows.starts) * windows.seq_len / seconds,  # tokens that were read
        "peak_memory": memory_in_use(),
    }
    results.finish(result)
    return {"arguments": results.arguments} | result


def read_windows(ranks, results, gpt, tokens, windows, batch_size: int, chunk_size: int) -> None:
    """Read the batches of windows that are left; results.parts[start of the batch's first window] = its sums.

    In each round every rank reads one batch, and all of them exchange their sums. So they stop together, and rank 0
    keeps whole batches.
    """
    import time

    import torch

    from lit_swa.evaluate import require_finite
    from lit_swa.utils import ProgressLine, format_perplexity, interruptible

    batches = {str(a): windows.starts[i : i + batch_size] for i, a in enumerate(windows.starts) if i % batch_size == 0}
    done = results.parts if results else {}
    for key in batches.keys() & done:
        windows.check_sums(done[key], len(batches[key]))
    todo = ranks.broadcast([key for key in batches if key not in done])  # as rank 0 has it
    kept = [window for key in batches for window in done.get(key, ())]
    n_done, n_windows, nll_sum = len(kept), len(windows.starts), sum(map(sum, kept))
    progress = ProgressLine(n_windows * windows.seq_len, "perplexity", done=n_done * windows.seq_len)
    with interruptible() as interrupted:
        for i in range(0, len(todo), ranks.count):
            started = time.perf_counter()
            mine = batches[todo[i + ranks.rank]] if i + ranks.rank < len(todo) else ()
            sums = read_batch(gpt, tokens, windows, mine, batch_size, chunk_size, ranks.device)
            gathered, stop = ranks.gather(sums), ranks.gather(torch.tensor(interrupted())).any()
            round_ = {key: part[: len(batches[key])].tolist() for key, part in zip(todo[i:], gathered, strict=False)}
            for key, part in round_.items():
                require_finite(part, int(key), gpt)
            if results is not None:
                seconds = results.parts.get("_seconds", 0.0) + time.perf_counter() - started
                results.add_all(round_ | {"_seconds": seconds})
                n_done += sum(map(len, round_.values()))
                nll_sum += sum(sum(map(sum, part)) for part in round_.values())
                mean = nll_sum / (n_done * (windows.seq_len - windows.first))
                progress.show(n_done * windows.seq_len, f"ppl {format_perplexity(mean)}")
            if stop and i + ranks.count < len(todo):
                if results is not None:
                    results.save()
                    print(f"{n_done} of {n_windows} windows are kept: the same command goes on", file=sys.stderr)
                raise KeyboardInterrupt


def read_batch(gpt, tokens, windows, starts, batch_size: int, chunk_size: int, device):
    """The sums (batch_size, buckets) of the windows at `starts`, in float64; zeros where there are fewer windows."""
    import torch

    from lit_swa.evaluate import window_nll

    sums = torch.zeros(batch_size, len(set(windows.bucket_of_targets())), dtype=torch.float64)
    if len(starts):
        nll = window_nll(gpt, windows.batch(tokens, starts, device), windows.first, chunk_size)
        sums[: len(starts)] = torch.tensor(windows.sums(nll), dtype=torch.float64)
    return sums


def report(result: dict[str, Any], output: Path) -> None:
    """The answer on stdout, and on stderr where it is kept."""
    from lit_swa.utils import format_number

    a = result["arguments"]
    print(
        f"perplexity {format_number(result['ppl'], 4)} (nll {format_number(result['nll'], 5)}) of {result['tokens']} "
        f"tokens | score {a['score']} | "
        f"{result['windows']} windows of {a['seq_len']} every {a['stride']}"
    )
    for positions, ppl in result["buckets"].items():
        print(f"  at {positions:>15}  {format_number(ppl, 4):>12}")
    speed = f"{result['seconds']:.1f} s, {result['tokens_per_second']:.1f} tok/s, {result['peak_memory']}"
    print(f"{speed}\nresults: {output}", file=sys.stderr)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
