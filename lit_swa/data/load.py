"""load_dataset: from a file, a directory or a name to a Dataset."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lit_swa.checks import check_range
from lit_swa.data.dataset import Dataset
from lit_swa.data.hub import PRESETS, fetch_preset
from lit_swa.data.prepared import INFO_NAME, TOKENS_NAME, load_prepared
from lit_swa.data.prompts import PROMPT_STYLES, Encoded, encode_at, end_ids, pick_style
from lit_swa.data.readers import READERS, Located
from lit_swa.data.records import Dropped, Record, to_record
from lit_swa.data.token_files import load_text, make_info
from lit_swa.formats.reading import require_regular
from lit_swa.formats.tokenizer import Tokenizer
from lit_swa.utils import ProgressLine


def load_dataset(
    data: Path | str,
    tokenizer: Tokenizer,
    *,
    max_seq_length: int,
    prompt_style: str | None = None,
    preset: str | None = None,
    mask_prompt: bool = True,
    limit: int | None = None,
    progress: ProgressLine | None = None,
) -> Dataset:
    """Examples of at most max_seq_length tokens from a file, a directory, or the hub.

    Args:
        data: a file or directory, or the name of a published dataset:
            .json, .jsonl, .csv or .parquet: each instruction, conversation or {"text": ...} document is an example;
            .txt, a directory of .txt files, or a .bin file of token ids: the documents, each with EOS behind it, are
            one stream, and each max_seq_length tokens of it are an example;
            a directory that scripts/prepare_instruct.py made;
            a name such as "alpaca": fetched from the hub into data/hub ("flan:aeslc*" takes some of its files).
        prompt_style: one of PROMPT_STYLES. By default the preset's, else the model's chat template, else alpaca.
        preset: one of PRESETS: a local file has the fields and the prompt style of this published dataset.
        mask_prompt: train the answers only. False trains the prompts too.
        limit: read at most so many examples.
        progress: shown now and then while tokens are made.

    Raises:
        ValueError, OSError: in one sentence, with the line or element where a file is not what it should be.
    """
    check_range("max_seq_length", max_seq_length, 2)
    if limit is not None:
        check_range("limit", limit, 1)
    require_name("prompt_style", prompt_style, PROMPT_STYLES)
    require_name("preset", preset, PRESETS)
    files, preset = find_files(data, preset)
    if (files[0] / INFO_NAME).exists():
        wanted = {"prompt_style": prompt_style, "preset": preset, "mask_prompt": mask_prompt}
        return load_prepared(files[0], tokenizer, max_seq_length, wanted, limit)
    if files[0].suffix in (".txt", ".bin"):
        if prompt_style or preset:
            raise ValueError(f"{data} is plain text: leave prompt_style and preset out.")
        return load_text(files, data, tokenizer, max_seq_length, limit, progress)
    style = pick_style(prompt_style or (PRESETS[preset].prompt_style if preset else None), tokenizer)
    records = (record for file in files for record in READERS[file.suffix](file))
    return encode_records(records, data, tokenizer, max_seq_length, style, preset, mask_prompt, limit, progress)


def require_name(argument: str, name: str | None, table: dict[str, Any]) -> None:
    if name is not None and name not in table:
        raise ValueError(f"{argument}={name!r} does not fit: choose from {', '.join(table)}.")


def find_files(data: Path | str, preset: str | None) -> tuple[list[Path], str | None]:
    """The files that `data` means, at least one, and the preset if `data` names one."""
    path = Path(data)
    if path.is_dir():
        if (path / INFO_NAME).exists():
            return [path], preset
        if (path / TOKENS_NAME).exists():
            raise ValueError(f"{path} is incomplete: it has no {INFO_NAME}; run scripts/prepare_instruct.py again.")
        if texts := sorted(path.glob("*.txt")):
            for text in texts:
                require_regular(text)
            return texts, preset
        raise ValueError(f"{path} holds neither {INFO_NAME} nor a .txt file: give a file, or a prepared directory.")
    if path.is_file():
        if path.suffix not in (*READERS, ".txt", ".bin"):
            raise ValueError(f"{path} is of no kind that is read: it must be {', '.join(READERS)}, .txt or .bin.")
        require_regular(path)
        return [path], preset
    name, _, selection = str(data).partition(":")
    if name not in PRESETS:
        raise FileNotFoundError(
            f"There is no file {data}, and no dataset of this name: give a file, or one of {', '.join(PRESETS)}."
        )
    if preset not in (None, name):
        raise ValueError(f"preset={preset!r} does not fit: the data is the preset {name}.")
    return fetch_preset(name, selection), name


def encode_records(
    records: Iterable[Located],
    data: Path | str,
    tokenizer: Tokenizer,
    max_seq_length: int,
    style: str,
    preset: str | None,
    mask_prompt: bool,
    limit: int | None,
    progress: ProgressLine | None,
) -> Dataset:
    """Every example that can be trained, cut to max_seq_length."""
    fields = PRESETS[preset].fields if preset else None
    builder, n_read = Builder(max_seq_length), 0
    for n_read, (where, content) in enumerate(records, start=1):
        try:
            record = to_record(content, where, fields)
            builder.add(record, *encode_at(where, record, style, tokenizer, mask_prompt))
        except Dropped as reason:
            builder.dropped[str(reason)] += 1
        if progress and n_read % 256 == 0:
            progress.show(n_read, f"{len(builder.tokens)} tokens", tokens=len(builder.tokens))
        if n_read == limit:
            break
    if not n_read:
        raise ValueError(f"{data} holds no examples: give a file with some.")
    if not builder.lengths:
        raise ValueError(
            f"None of the {n_read} examples of {data} is left ({builder.reasons()}): raise max_seq_length, or mend "
            "the data."
        )
    info = make_info(
        "instruction" if builder.instructions else "text",
        tokenizer,
        max_seq_length,
        prompt_style=style,
        preset=preset,
        mask_prompt=mask_prompt,
        truncated=builder.truncated,
        end_ids=end_ids(style, tokenizer) if builder.instructions else [],
    )
    return builder.finish(data, info)


class Builder:
    """Collects examples in flat arrays, and counts what was cut, what was dropped and what was left out."""

    def __init__(self, max_seq_length: int) -> None:
        self.max_seq_length = max_seq_length
        self.tokens, self.mask, self.lengths = array("i"), bytearray(), array("q")
        self.dropped: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()  # what no prompt holds -> records that have it
        self.truncated = self.instructions = self.split = 0

    def add(self, record: Record, examples: list[Encoded], left_out: list[str]) -> None:
        """The sequences of one record."""
        self.left_out.update(dict.fromkeys([*left_out, *(f"the key {key[:60]!r}" for key in record.unread)], 1))
        self.split += len(examples) > 1
        for encoded in examples:
            ids, trained = encoded.ids[: self.max_seq_length], encoded.trained[1 : self.max_seq_length]
            if not any(trained):
                self.dropped[f"with nothing to train within {self.max_seq_length} tokens"] += 1
                continue
            self.tokens.extend(ids)
            self.mask.extend([False, *trained])
            self.lengths.append(len(ids))
            self.truncated += len(encoded.ids) > self.max_seq_length
            self.instructions += record.text is None

    def reasons(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())

    def notes(self) -> str:
        """What else the report tells."""
        left_out = [f"{what} (of {count})" for what, count in self.left_out.most_common(12)]
        notes = [f"left out of the prompts: {', '.join(left_out)}"] if left_out else []
        if self.split:
            notes.append(f"{self.split} conversations are an example for each answer, as the template rewrites turns")
        return "".join(f"; {note}" for note in notes)

    def finish(self, data: Path | str, info: dict[str, Any]) -> Dataset:
        lengths = np.frombuffer(self.lengths, dtype=np.int64)
        tokens, mask = np.frombuffer(self.tokens, dtype=np.int32), np.frombuffer(self.mask, dtype=np.uint8)
        left_out = f"{sum(self.dropped.values())} dropped ({self.reasons()})" if self.dropped else "none dropped"
        report = (
            f"{data}: {len(lengths)} examples, {len(tokens)} tokens, {np.count_nonzero(mask)} of them trained; "
            f"{self.truncated} cut to {self.max_seq_length} tokens, {left_out}{self.notes()}."
        )
        return Dataset(tokens, mask, np.cumsum(lengths) - lengths, lengths, report, info)
