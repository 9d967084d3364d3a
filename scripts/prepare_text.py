"""Tokenise texts into one file of ids: python scripts/prepare_text.py --data data/books --output data/books.bin."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed


def main(data: list[Path] | Path, output: Path, checkpoint_dir: Path | None = None) -> None:
    """Write the texts as one stream of token ids, each text with EOS behind it.

    The file has no header: ids of 16 bits for a vocabulary of up to 65,536, else of 32, little-endian. Training on
    long texts and scripts/evaluate_ppl.py take it as --data.

    Args:
        data: A .txt file (UTF-8), which is one text; a .jsonl, .json, .csv or .parquet file with a "text" in each
            record; a list of files; or a directory of .txt files.
        output: The .bin file to write. One that is there already is replaced.
        checkpoint_dir: The model whose tokenizer is used. By default SmolLM2-135M-Instruct, which is downloaded once.
    """
    from lit_swa.checkpoint import check_checkpoint_dir
    from lit_swa.data import write_token_file
    from lit_swa.formats.checkpoint import tokenizer_dir
    from lit_swa.formats.download import find_checkpoint
    from lit_swa.tokenizer import Tokenizer
    from lit_swa.utils import ProgressLine

    if output.suffix != ".bin":
        raise ValueError(f"{output} does not fit: the name of a token file ends in .bin.")
    files: list[Path] = []
    for path in [data] if isinstance(data, Path) else data:
        files += sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{data} holds no .txt file: give texts.")
    checkpoint_dir = find_checkpoint(checkpoint_dir)
    check_checkpoint_dir(checkpoint_dir)
    progress = ProgressLine(None, "documents")
    documents, tokens = write_token_file(files, Tokenizer(tokenizer_dir(checkpoint_dir)), output, progress)
    progress.clear()
    print(f"{documents} documents, {tokens} tokens, {output.stat().st_size} bytes", file=sys.stderr)
    print(output)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
