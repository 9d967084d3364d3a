"""Texts as token ids for training: python scripts/prepare_text.py --data data/books --output_dir data/tokens."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed


def main(
    data: list[Path] | Path | None = None,
    output_dir: Path | None = None,
    output: Path | None = None,
    checkpoint_dir: Path | None = None,
    key: str = "text",
    separator: str = "",
    dataset: str | None = None,
    subset: str | None = None,
    split: str = "train",
    preset: str | None = None,
    processes: int | None = None,
    compare: bool = True,
) -> None:
    """Write texts as token ids, each text with EOS behind it: a directory for pretraining, or a file for finetuning.

    A directory holds shards, where their documents begin, and an index with checksums. It can be interrupted: the same
    command goes on, to the same bytes. A file has no header: ids of 16 bits for a vocabulary of up to 65,536, else of
    32, little-endian. Finetuning on long texts and scripts/evaluate_ppl.py take it as --data.

    Args:
        data: A .txt file (UTF-8), which is one text; a .jsonl (also .gz or .zst), .json, .csv or .parquet file with a
            text in each record; a list of files; or a directory of them (for --output: of .txt files).
        output_dir: The directory to write, for pretraining.
        output: The .bin file to write, for finetuning, in place of a directory. One that is there is replaced.
        checkpoint_dir: The model whose tokenizer is used, or a directory that scripts/train_tokenizer.py wrote. By
            default SmolLM2-135M-Instruct, which is downloaded once.
        key: Which key of a record, or column of a table, holds the text.
        separator: What stands between the documents of a .txt file, such as '<|endoftext|>'. Without it, a file is one.
        dataset: In place of data: a dataset on the Hugging Face hub, or the directory of one, read as it comes.
        subset: Which of the dataset's configurations is read.
        split: Which of the dataset's, or of the preset's, splits is read.
        preset: A published corpus: openwebtext, redpajama, slimpajama, starcoder, tinystories, fineweb-edu, or the
            mixture tinyllama. From the hub, or with data from a local copy.
        processes: How many processes encode, by default one for each core.
        compare: Say in the end how fast the tokenizers library alone encodes 4 MB of the text.
    """
    from lit_swa.checkpoint import check_checkpoint_dir
    from lit_swa.checks import check_range
    from lit_swa.data.corpora import find_corpora
    from lit_swa.formats.checkpoint import tokenizer_dir
    from lit_swa.formats.directory import has_tokenizer
    from lit_swa.formats.download import find_checkpoint
    from lit_swa.utils import count_cores

    paths = [data] if isinstance(data, Path) else data or []
    check_sources(paths, output_dir, output, dataset, preset)
    if preset:
        find_corpora(preset)
    processes = count_cores() if processes is None else processes
    check_range("processes", processes, 1, whole=True)
    if checkpoint_dir is None or not has_tokenizer(checkpoint_dir):  # a tokenizer needs no weights beside it
        checkpoint_dir = find_checkpoint(checkpoint_dir)
        check_checkpoint_dir(checkpoint_dir)
    tokenizer = tokenizer_dir(checkpoint_dir)
    if output is not None:
        write_file(paths, output, tokenizer)
    else:
        where = {"key": key, "separator": separator, "dataset": dataset, "subset": subset, "split": split}
        write_directory(paths, output_dir, tokenizer, preset, processes, compare, **where)


def check_sources(
    data: list[Path], output_dir: Path | None, output: Path | None, dataset: str | None, preset: str | None
) -> None:
    """Raises ValueError unless it is said once what is read and once what is written."""
    if (output_dir is None) == (output is None):
        raise ValueError("Give --output_dir, a directory for pretraining, or --output, a .bin file for finetuning.")
    if output is not None and (dataset or preset or not data):
        raise ValueError("--output takes local texts only: give --data, or write a directory with --output_dir.")
    if not data and not dataset and not preset:
        raise ValueError("Nothing to read is given: give --data, --dataset or --preset.")
    if dataset and (data or preset):
        raise ValueError("--dataset is read in place of --data and --preset: leave out one of them.")
    if output_dir is not None and output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"{output_dir} is a file: give a directory to write to.")


def write_file(data: list[Path], output: Path, tokenizer_dir: Path) -> None:
    """One .bin file, by one process."""
    from lit_swa.data import write_token_file
    from lit_swa.tokenizer import Tokenizer
    from lit_swa.utils import ProgressLine

    if output.suffix != ".bin":
        raise ValueError(f"{output} does not fit: the name of a token file ends in .bin.")
    files: list[Path] = []
    for path in data:
        files += sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{data[0]} holds no .txt file: give texts.")
    progress = ProgressLine(None, "documents")
    documents, tokens = write_token_file(files, Tokenizer(tokenizer_dir), output, progress)
    progress.clear()
    print(f"{documents} documents, {tokens} tokens, {output.stat().st_size} bytes", file=sys.stderr)
    print(output)


def write_directory(
    data: list[Path],
    output_dir: Path,
    tokenizer_dir: Path,
    preset: str | None,
    processes: int,
    compare: bool,
    key: str,
    separator: str,
    dataset: str | None,
    subset: str | None,
    split: str,
) -> None:
    """Shards and their index, by several processes; of a mixture, several such directories."""
    from lit_swa.data import prepare
    from lit_swa.data.sources import Selection, Stream
    from lit_swa.token_files import TokenDirectory, describe

    weights: dict[str, float] = {}
    if preset:
        jobs, weights = prepare.make_preset_jobs(output_dir, tokenizer_dir, data, preset, split)
    else:
        stream = Stream(dataset, split, subset) if dataset else None
        jobs = prepare.make_jobs(output_dir, tokenizer_dir, data, Selection(key, separator), stream)
    reports = prepare.prepare_mixture(output_dir, jobs, weights, processes)
    done = [job for job, report in zip(jobs, reports, strict=True) if report.text_bytes]
    library = prepare.measure_library(done[0], processes) if compare and done else None
    for report in reports:
        print(f"{report.directory}: {describe(TokenDirectory(report.directory))}", file=sys.stderr)
        if report.text_bytes:
            print(prepare.describe_speed(report, processes, library), file=sys.stderr)
    print(output_dir)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
