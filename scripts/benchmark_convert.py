"""Measure the peak memory of converting: python scripts/benchmark_convert.py."""

import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

SHARDS, WHOLE, PICKLES = "shards", "whole", "pickles"  # directories of the model in Hugging Face's format


def main(
    name: str = "SmolLM2-1.7B",
    tokenizer_dir: Path = Path("HuggingFaceTB/SmolLM2-135M-Instruct"),
    shard_MB: int = 1000,
    work_dir: Path | None = None,
    output: Path = Path("tutorials/results/benchmark_convert.json"),
    model: dict[str, Any] | None = None,
) -> None:
    """Convert a model of random weights (bfloat16) in and out, each in a process of its own, and print its peak memory.

    Memory is what the process holds beyond what it had after its imports: its own pages (RssAnon), and with the pages
    of files that it maps (VmRSS), which the system takes back when it needs them. Both are read every 2 ms, on Linux.

    Args:
        name: A named shape; its vocabulary must hold the tokenizer.
        tokenizer_dir: The checkpoint, or its name, whose tokenizer goes with the weights.
        shard_MB: The size of a shard.
        work_dir: Where the files go for the time of the run, several times the model's size; by default the system's
            directory for temporary files.
        output: Where the JSON goes.
        model: Any field of the model's config, as --model.FIELD VALUE (--model.help lists them).
    """
    from lit_swa import Config
    from lit_swa.checks import check_range
    from lit_swa.formats.files import write_json
    from lit_swa.formats.places import locate
    from lit_swa.utils import describe_command, describe_machine

    check_range("shard_MB", shard_MB, 1, 10**6)
    if not Path("/proc/self/status").exists():
        raise ValueError("The memory of a process is read from /proc, which this system does not have: use Linux.")
    config = Config.from_name(name, **model or {})
    with tempfile.TemporaryDirectory(dir=work_dir) as directory:
        largest = write_source(config, locate(tokenizer_dir), Path(directory))
        rows = [measured(case, Path(directory), shard_MB * 10**6) for case in CASES]
    content = {
        "command": describe_command(),
        "machine": describe_machine("cpu"),
        "model": name,
        "largest_tensor_MB": round(largest / 1e6, 1),
        "shard_MB": shard_MB,
        "rows": rows,
    }
    write_json(output, content)
    print(output)


def write_source(config: Any, tokenizer_dir: Path, directory: Path) -> int:
    """A checkpoint of random weights, and the bytes of its largest tensor."""
    import torch

    from lit_swa.checkpoint import save_checkpoint
    from lit_swa.random_model import random_model

    made = random_model(config, torch.bfloat16, "cpu")
    save_checkpoint(made, config, directory / "lit", source_dir=tokenizer_dir)
    return max(weight.nbytes for weight in made.state_dict().values())


# What is measured: name -> what a process does in the directory, and what is left there for the next.


def out(directory: Path, shard_bytes: int) -> None:
    from lit_swa.checkpoint import export_hf_checkpoint

    export_hf_checkpoint(directory / "lit", directory / SHARDS, max_shard_bytes=shard_bytes)


def shards_in(directory: Path, shard_bytes: int) -> None:
    from lit_swa.checkpoint import convert_hf_checkpoint

    convert_hf_checkpoint(directory / SHARDS)


def one_file_in(directory: Path, shard_bytes: int) -> None:
    from lit_swa.checkpoint import convert_hf_checkpoint

    convert_hf_checkpoint(directory / WHOLE)


def pickles_in(directory: Path, shard_bytes: int) -> None:
    from lit_swa.checkpoint import convert_hf_checkpoint

    convert_hf_checkpoint(directory / PICKLES)


def gguf_out(dtype: str) -> Callable[[Path, int], None]:
    def run(directory: Path, shard_bytes: int) -> None:
        from lit_swa.formats.gguf_export import export_gguf

        export_gguf(directory / "lit", directory / dtype / "model.gguf", dtype)

    return run


def gguf_in(dtype: str) -> Callable[[Path, int], None]:
    def run(directory: Path, shard_bytes: int) -> None:
        from lit_swa.checkpoint import convert_hf_checkpoint

        convert_hf_checkpoint(directory / dtype)

    return run


CASES: dict[str, Callable[[Path, int], None]] = {
    "out: safetensors in shards": out,
    "in: safetensors in shards": shards_in,
    "in: one safetensors": one_file_in,
    "in: .bin in shards": pickles_in,
    "out: GGUF, F16": gguf_out("f16"),
    "out: GGUF, Q8_0": gguf_out("q8_0"),
    "in: GGUF, F16": gguf_in("f16"),
    "in: GGUF, Q8_0": gguf_in("q8_0"),
}


def prepare(case: str, directory: Path) -> None:
    """Make what a case reads of what an earlier one wrote. This is not measured."""
    import torch

    from lit_swa.formats.files import open_safetensors, write_safetensors

    folder = {"in: one safetensors": WHOLE, "in: .bin in shards": PICKLES}.get(case)
    if folder is None:
        return
    (directory / folder).mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (directory / folder / name).write_bytes((directory / SHARDS / name).read_bytes())
    shards = {path.name: open_safetensors(path) for path in sorted((directory / SHARDS).glob("model*.safetensors"))}
    if folder == WHOLE:
        whole = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
        return write_safetensors(directory / folder / "model.safetensors", whole)
    for file, shard in shards.items():
        target = file.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        torch.save({name: tensor.load() for name, tensor in shard.items()}, directory / folder / target)


def measured(case: str, directory: Path, shard_bytes: int) -> dict[str, Any]:
    """A row of the table: a case in a new process, which this one watches."""
    context = multiprocessing.get_context("spawn")
    prepare(case, directory)
    here, there = context.Pipe()
    process = context.Process(target=child, args=(case, directory, shard_bytes, there))
    process.start()
    there.close()
    try:
        here.recv()  # it has imported
        own, with_files = peak_growth(process.pid, here)
        here.recv()
    except EOFError:
        raise ValueError(f"The case {case!r} failed: its message stands above.") from None
    finally:
        process.join()
        for path in directory.glob("*/lit_model*.safetensors"):  # what was converted is of no more use
            path.unlink() if path.parent.name != "lit" else None
    row = {"case": case, "own_MB": round(own / 1e6, 1), "with_files_MB": round(with_files / 1e6, 1)}
    print(f"{case:28} {row['own_MB']:9.1f} MB  with mapped files {row['with_files_MB']:9.1f} MB", flush=True)
    return row


def child(case: str, directory: Path, shard_bytes: int, parent: Any) -> None:
    import lit_swa.checkpoint  # noqa: F401
    import lit_swa.formats.gguf_export  # noqa: F401

    parent.send("imported")
    parent.recv()
    CASES[case](directory, shard_bytes)
    parent.send("done")


def peak_growth(process: int, pipe: Any) -> tuple[int, int]:
    """Let a process go on, and return the bytes that it holds at most, beyond what it holds now, until it says
    something: its own, and with mapped files."""
    before, most = resident(process), (0, 0)
    pipe.send("go")
    while not pipe.poll(0.002):
        now = resident(process)
        most = max(most[0], now[0] - before[0]), max(most[1], now[1] - before[1])
    return most


def resident(process: int) -> tuple[int, int]:
    """RssAnon and VmRSS of a process, in bytes; (0, 0) where it has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0, 0
    fields = dict(line.split(":", 1) for line in text.splitlines())
    own, whole = (int(fields.get(name, "0").split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))
    return own, whole


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
