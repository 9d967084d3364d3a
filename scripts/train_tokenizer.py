"""Train a byte-level BPE tokenizer: python scripts/train_tokenizer.py --data data/books --output_dir data/tokenizer."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed


def main(
    data: list[Path] | Path,
    output_dir: Path,
    vocab_size: int = 8192,
    key: str = "text",
    separator: str = "",
    max_mb: float = 1000.0,
) -> None:
    """Write a directory with a tokenizer that scripts/prepare_text.py and pretraining take as --checkpoint_dir.

    Args:
        data: A file, a list of files, or a directory: .txt, .jsonl (also .gz or .zst) or .parquet.
        output_dir: The directory to write. A tokenizer that is there already is replaced.
        vocab_size: How many tokens it has: 256 bytes, the token that ends a document, and frequent pieces of words.
        key: Which key of a record, or column of a table, holds the text.
        separator: What stands between the documents of a .txt file. Without it, a file is one document.
        max_mb: Train on no more than so many MB of text, from the beginning.
    """
    from lit_swa.data.sources import Selection
    from lit_swa.data.train_tokenizer import train_tokenizer
    from lit_swa.tokenizer import Tokenizer

    files = [data] if isinstance(data, Path) else data
    made = train_tokenizer(files, vocab_size, output_dir, Selection(key, separator), max_mb)
    fewer = f", fewer than {vocab_size}: no other pair in the text occurs twice" if made < vocab_size else ""
    end = Tokenizer(output_dir).special_tokens["eos_token"]
    print(f"{made} tokens{fewer}; a document ends in {end}", file=sys.stderr)
    print(output_dir)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
