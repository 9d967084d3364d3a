"""A tokenizer of one's own: byte-level BPE, trained on a user's texts by the tokenizers library."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from lit_swa.checks import check_range
from lit_swa.data.sources import Selection, check_separator, cut_files, find_files, read_part
from lit_swa.formats.files import atomic_file, directory_lock, write_json
from lit_swa.formats.tokenizer_backends import one_sentence_errors
from lit_swa.texts import read_blocks
from lit_swa.utils import ProgressLine

END = "<|endoftext|>"
ASKED = "largest_vocab_size"  # in tokenizer_config.json: how many tokens were asked for, of which a text may give fewer
LEAST = 257  # the 256 bytes and END
PIECE = 2**16  # characters that the library is given at once
DIGITS = r"\p{N}"  # each digit is a token of its own, so that numbers are read in the same way wherever they stand


def train_tokenizer(
    data: list[Path], vocab_size: int, output_dir: Path, selection: Selection | None = None, max_mb: float = 1000.0
) -> int:
    """Train a byte-level BPE, write tokenizer.json and tokenizer_config.json, and return the number of its tokens.

    There are fewer than vocab_size where the text has no more pairs that occur twice. END is the token that ends a
    document. Raises OSError or ValueError.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    check_range("vocab_size", vocab_size, LEAST, 2**24, whole=True)
    check_range("max_mb", max_mb, 0.001)
    selection = selection or Selection()
    check_separator(selection.separator)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"{output_dir} is a file: give a directory to write to.")
    files = find_files(data)
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(DIGITS), "isolated"), words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    with one_sentence_errors("be trained on this text", (OSError, ValueError)):  # which are those of reading
        tokenizer.train_from_iterator(read_pieces(files, selection, int(max_mb * 1e6)), trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END,
        "pad_token": None,
        "clean_up_tokenization_spaces": False,
        ASKED: vocab_size,
    }
    with directory_lock(output_dir):
        write_json(output_dir / "tokenizer_config.json", config)
        with atomic_file(output_dir / "tokenizer.json") as stream:
            stream.write(tokenizer.to_str(pretty=True).encode())
    return tokenizer.get_vocab_size()


def read_pieces(files: list[Path], selection: Selection, most: int) -> Iterator[str]:
    """The texts in pieces, no more than so many bytes of them. Raises ValueError where there are none."""
    parts, done = cut_files(files, selection), 0
    total = min(most, sum(part.size for part in parts))
    progress, started = ProgressLine(total // 10**6, "MB", interval=10.0), time.perf_counter()
    for part in parts:
        for document, _ in read_part(part, selection):
            for piece in read_blocks(document) if isinstance(document, Path) else cut_text(document):
                yield piece
                done += len(piece.encode("utf-8", "replace"))
                if done // 10**6 < total // 10**6:
                    rate = f"{done / 1e6 / max(time.perf_counter() - started, 1e-9):.1f} MB/s"
                    progress.show(done // 10**6, rate, tokens=0)
                if done >= most:
                    progress.clear()
                    return
    progress.clear()
    if not done:
        raise ValueError(f"{files[0]} holds no text: give a file with some.")


def cut_text(text: str) -> Iterator[str]:
    return (text[start : start + PIECE] for start in range(0, len(text), PIECE))
