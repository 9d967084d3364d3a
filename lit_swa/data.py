"""Training data: instructions, conversations and plain text as token ids with labels, packed or not.

    dataset = load_dataset("alpaca.json", tokenizer, max_seq_length=1024)
    example = dataset[0]                        # Example(ids, labels), both (T,) int32
    train, validation = split_dataset(dataset, 0.05, seed=1234)
    bins = pack(train.lengths, 1024, seed=0)    # lists of examples that fit one row

A label is the token itself where it is trained and IGNORED where not; labels are aligned with ids, the trainer shifts
them. The tokens of a dataset lie in one flat array, in memory or mapped from a file.

Reading order: Dataset -> load_dataset -> fields, presets and prompt styles (tables) -> files -> records -> tokens ->
text and token files -> prepared directories -> splitting, packing, showing, checking -> the hub.
"""

from __future__ import annotations

import csv
import fnmatch
import functools
import hashlib
import json
import re
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_swa.formats.files import (
    atomic_file,
    directory_lock,
    find_inside,
    read_json,
    remove_leftovers,
    require_space,
    write_json,
)
from lit_swa.formats.tokenizer import StreamDecoder, Tokenizer
from lit_swa.texts import read_text

IGNORED = -100  # a label that is not trained

Progress = Callable[[int, int], None]  # (examples or documents read, tokens so far)
Located = tuple[str, dict[str, Any]]  # where an example stands in its file, and its fields


class Example(NamedTuple):
    """T tokens, and of each whether it is trained. labels[0] is IGNORED: nothing predicts the first token."""

    ids: np.ndarray  # (T,) int32
    labels: np.ndarray  # (T,) int32


class Dataset:
    """Examples over one flat array of tokens.

    Attributes:
        lengths: (n,) int64, tokens of each example.
        trained: (n,) int64, trained tokens of each example, at least one.
        report: one sentence: examples, tokens, trained tokens, what was cut and what was dropped.
        info: how it was made: kind ("instruction" or "text"), prompt_style, preset, mask_prompt, max_seq_length,
            truncated (examples cut), end_ids (tokens that end an answer), tokenizer (its identity), vocab_size.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        mask: np.ndarray | None,
        starts: np.ndarray,
        lengths: np.ndarray,
        report: str,
        info: dict[str, Any],
        trained: np.ndarray | None = None,
    ) -> None:
        """tokens: all ids, flat. mask: 1 where a token is trained; None trains all but an example's first token.
        starts, lengths: (n,), the place of each example. trained: counted here unless given."""
        self.tokens, self.mask, self.starts, self.lengths = tokens, mask, starts, lengths
        self.report, self.info = report, info
        if trained is None:
            trained = lengths - 1 if mask is None else _count_trained(mask, starts, lengths)
        self.trained = trained

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Example:
        if not -len(self) <= i < len(self):
            raise IndexError(f"There is no example {i}: there are {len(self)}.")
        start = int(self.starts[i])
        end = start + int(self.lengths[i])
        ids = self.tokens[start:end].astype(np.int32)
        labels = ids.copy() if self.mask is None else np.where(self.mask[start:end], ids, np.int32(IGNORED))
        labels[:1] = IGNORED
        return Example(ids, labels)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the ids and labels of all examples in order. A resumed run compares it."""
        digest = hashlib.sha256(self.lengths.astype("<i8").tobytes())
        for i in range(len(self)):
            ids, labels = self[i]
            digest.update(ids.astype("<i4").tobytes())
            digest.update((labels != IGNORED).tobytes())
        return digest.hexdigest()

    def subset(self, index: np.ndarray, report: str) -> Dataset:
        """The examples of these indices, over the same tokens."""
        starts, lengths, trained = self.starts[index], self.lengths[index], self.trained[index]
        return Dataset(self.tokens, self.mask, starts, lengths, report, self.info, trained)


def _count_trained(mask: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(n,) trained tokens of each example; the first one never counts."""
    return np.array(
        [np.count_nonzero(mask[s + 1 : s + n]) for s, n in zip(starts.tolist(), lengths.tolist(), strict=True)],
        dtype=np.int64,
    )


def load_dataset(
    data: Path | str,
    tokenizer: Tokenizer,
    *,
    max_seq_length: int,
    prompt_style: str | None = None,
    preset: str | None = None,
    mask_prompt: bool = True,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Examples of at most max_seq_length tokens from a file, a directory, or the hub.

    Args:
        data: .json, .jsonl, .csv or .parquet (instructions, conversations or {"text"} documents, an example each);
            .txt, a directory of them, or a .bin of token ids (rows of max_seq_length tokens of the one stream, the
            documents of which end in EOS); a directory that scripts/prepare_instruct.py made; or the name of a preset,
            such as "alpaca", which is fetched from the hub into data/hub ("flan:aeslc*" takes some of its files).
        prompt_style: one of PROMPT_STYLES. By default the preset's, else the model's chat template, else alpaca.
        preset: one of PRESETS, whose fields and prompt style a local file has.
        mask_prompt: train the answers only. False trains the prompts too.
        limit: read so many examples (rows, of a text) at most.
        progress: called now and then while tokens are made.

    Raises:
        ValueError, OSError: in one sentence, with the line or element where a file is not what it should be.
    """
    if max_seq_length < 2:
        raise ValueError(f"max_seq_length={max_seq_length} does not fit: it must be at least 2.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} does not fit: it must be at least 1.")
    _require_name("prompt_style", prompt_style, PROMPT_STYLES)
    _require_name("preset", preset, PRESETS)
    files, preset = _find_files(data, preset)
    if (files[0] / INFO_NAME).exists():
        wanted = {"prompt_style": prompt_style, "preset": preset, "mask_prompt": mask_prompt}
        return load_prepared(files[0], tokenizer, max_seq_length, wanted, limit)
    if files[0].suffix in (".txt", ".bin"):
        if prompt_style or preset:
            raise ValueError(f"{data} is plain text: leave prompt_style and preset out.")
        return _load_text(files, data, tokenizer, max_seq_length, limit, progress)
    style = _pick_style(prompt_style, preset, tokenizer)
    records = (record for file in files for record in READERS[file.suffix](file))
    return _encode_records(records, data, tokenizer, max_seq_length, style, preset, mask_prompt, limit, progress)


def _require_name(argument: str, name: str | None, table: dict[str, Any]) -> None:
    if name is not None and name not in table:
        raise ValueError(f"{argument}={name!r} does not fit: choose from {', '.join(table)}.")


def _find_files(data: Path | str, preset: str | None) -> tuple[list[Path], str | None]:
    """The files that are meant, at least one, and the preset if `data` names it."""
    path = Path(data)
    if path.is_dir():
        if (path / INFO_NAME).exists():
            return [path], preset
        if (path / TOKENS_NAME).exists():
            raise ValueError(f"{path} is incomplete: it has no {INFO_NAME}; run scripts/prepare_instruct.py again.")
        if texts := sorted(path.glob("*.txt")):
            return texts, preset
        raise ValueError(f"{path} holds neither {INFO_NAME} nor a .txt file: give a file, or a prepared directory.")
    if path.is_file():
        if path.suffix not in (*READERS, ".txt", ".bin"):
            raise ValueError(f"{path} is of no kind that is read: it must be {', '.join(READERS)}, .txt or .bin.")
        return [path], preset
    name, _, selection = str(data).partition(":")
    if name not in PRESETS:
        raise FileNotFoundError(
            f"There is no file {data}, and no dataset of this name: give a file, or one of {', '.join(PRESETS)}."
        )
    if preset not in (None, name):
        raise ValueError(f"preset={preset!r} does not fit: the data is the preset {name}.")
    return fetch_preset(name, selection), name


# ------------------------------------------------------------------------------------------------- fields and presets


class Fields(NamedTuple):
    """The keys of an example. Those of an instruction, a conversation or a text are there, the others empty."""

    instruction: str = ""
    input: str = ""  # may be missing in an example
    output: str = ""
    messages: str = ""
    text: str = ""

    def required(self) -> list[str]:
        return [key for key in (self.instruction, self.output, self.messages, self.text) if key]


# The first row whose keys an example has tells what they mean. Alpaca's files have a "text" too, so it comes last.
FIELDS = (
    Fields(messages="messages"),
    Fields(messages="conversations"),
    Fields(messages="conversation"),
    Fields("instruction", "input", "output"),
    Fields("instruction", "context", "response"),
    Fields("prompt", "", "completion"),
    Fields("prompt", "", "response"),
    Fields("question", "context", "answer"),
    Fields("inputs", "", "targets"),
    Fields("input", "", "output"),
    Fields(text="text"),
)

ROLES = {
    "system": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "tool": "tool",
}  # fmt: skip


class Preset(NamedTuple):
    """A published dataset: where it is on the hub, what its fields mean, how its prompts are written."""

    repo: str
    files: tuple[str, ...]  # patterns of the training files
    fields: Fields
    prompt_style: str | None  # None: the model's chat template if it has one
    description: str


PRESETS = {
    "alpaca": Preset(
        "tatsu-lab/alpaca", ("data/train-*.parquet",), Fields("instruction", "input", "output"), "alpaca",
        "52,002 instructions, answers by text-davinci-003",
    ),
    "alpaca-gpt4": Preset(
        "vicgalle/alpaca-gpt4", ("data/train-*.parquet",), Fields("instruction", "input", "output"), "alpaca",
        "Alpaca's instructions, answers by GPT-4",
    ),
    "dolly": Preset(
        "databricks/databricks-dolly-15k", ("databricks-dolly-15k.jsonl",),
        Fields("instruction", "context", "response"), "alpaca", "15,011 instructions and answers by people",
    ),
    "lima": Preset(
        "GAIR/lima", ("train.jsonl",), Fields(messages="conversations"), None,
        "1,030 chosen conversations; access is asked for on the hub",
    ),
    "longform": Preset(
        "akoksal/LongForm", ("data/train-*.parquet",), Fields("input", "", "output"), "alpaca",
        "23,652 long texts, each with the instruction that asks for it",
    ),
    "flan": Preset(
        "Muennighoff/flan", ("train/*.jsonl",), Fields("inputs", "", "targets"), "alpaca",
        "66 tasks in ten wordings each, many GB: choose with flan:PATTERN",
    ),
    "deita": Preset(
        "HuggingFaceH4/deita-10k-v0-sft", ("data/train_sft-*.parquet",), Fields(messages="messages"), None,
        "about 10,000 conversations chosen for quality",
    ),
    "longalpaca": Preset(
        "Yukang/LongAlpaca-12k", ("LongAlpaca-12k.json",), Fields("instruction", "input", "output"), "longalpaca",
        "9,000 questions on long texts and 3,000 short instructions",
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------------------------------- prompt styles


class PromptStyle(NamedTuple):
    """How a turn is written: its prompt, then `before_answer`, the answer, and what ends it.

    `before_answer` belongs to the answer: the model makes it. Without a system message, `system` is "".
    """

    opening: Callable[[str, str, str], str]  # (instruction, input, system) -> the first prompt
    further: Callable[[str], str]  # instruction -> the prompt of each turn after that
    before_answer: str = ""
    end: str = ""  # the token that ends an answer; "" is the tokenizer's EOS
    bos_every_turn: bool = False


_ALPACA = "Below is an instruction that describes a task"
_ALPACA_INPUT = ", paired with an input that provides further context"
_ALPACA_ASK = ". Write a response that appropriately completes the request."
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def _alpaca(instruction: str, input: str, system: str) -> str:
    head = system or _ALPACA + (_ALPACA_INPUT if input else "") + _ALPACA_ASK
    middle = f"### Input:\n{input}\n\n" if input else ""
    return f"{head}\n\n### Instruction:\n{instruction}\n\n{middle}### Response:"


def _llama2(instruction: str, input: str, system: str) -> str:
    system = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    return f"[INST] {system}{_joined(instruction, input)} [/INST]"


def _chatml(instruction: str, input: str, system: str) -> str:
    system = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{system}<|im_start|>user\n{_joined(instruction, input)}<|im_end|>\n<|im_start|>assistant\n"


def _joined(*parts: str, separator: str = "\n\n") -> str:
    return separator.join(part for part in parts if part)


PROMPT_STYLES: dict[str, PromptStyle | None] = {
    "chat": None,  # the model's own template
    "alpaca": PromptStyle(_alpaca, lambda text: f"\n\n### Instruction:\n{text}\n\n### Response:"),
    # Each turn is a sequence of its own to Llama 2: BOS prompt answer EOS.
    "llama2": PromptStyle(_llama2, lambda text: _llama2(text, "", ""), before_answer=" ", bos_every_turn=True),
    "longalpaca": PromptStyle(
        lambda text, input, system: f"[INST]{_joined(system, text, input, separator=chr(10))}[/INST]",
        lambda text: f"[INST]{text}[/INST]",
    ),
    "chatml": PromptStyle(_chatml, lambda text: "\n" + _chatml(text, "", ""), end="<|im_end|>"),
    "vicuna": PromptStyle(
        lambda text, input, system: f"{system or _VICUNA} USER: {_joined(text, input)} ASSISTANT:",
        lambda text: f"USER: {text} ASSISTANT:",
        before_answer=" ",
    ),
    "plain": PromptStyle(lambda text, input, system: _joined(system, text, input), lambda text: text),
}


def _pick_style(prompt_style: str | None, preset: str | None, tokenizer: Tokenizer) -> str:
    own = "chat" if tokenizer.has_chat_template else "alpaca"
    name = prompt_style or (preset and PRESETS[preset].prompt_style) or own
    if name == "chat" and not tokenizer.has_chat_template:
        others = ", ".join(other for other in PROMPT_STYLES if other != "chat")
        raise ValueError(f"{tokenizer.checkpoint_dir} has no chat template: choose a prompt_style from {others}.")
    end = "" if name == "chat" else PROMPT_STYLES[name].end
    if end and tokenizer.token_to_id(end) is None:
        raise ValueError(f"prompt_style={name!r} does not fit: the tokenizer has no token {end}; choose alpaca, say.")
    if name != "chat" and not end and tokenizer.eos_id is None:
        raise ValueError(f"{tokenizer.checkpoint_dir} has no eos_token: name one in its tokenizer_config.json.")
    return name


# -------------------------------------------------------------------------------------------------------------- files


def _lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends. Raises ValueError with the number of one that is no UTF-8."""
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise ValueError(
                    f"{path} line {number} is no UTF-8 text: convert the file, as with iconv -f latin1 -t utf-8."
                ) from None


def _read_jsonl(path: Path) -> Iterator[Located]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = str(getattr(error, "msg", error))[:80]
                raise ValueError(f"{path} line {number} is no JSON ({reason}): mend or remove the line.") from None
            yield _located(content, f"{path} line {number}")


def _read_json(path: Path) -> Iterator[Located]:
    """A list of examples, an object that holds one, or, under this name too, an object in each line."""
    text = "".join(_lines(path))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and getattr(error, "msg", "") == "Extra data":
            yield from _read_jsonl(path)
            return
        if not text.strip():
            return
        reason, line = str(getattr(error, "msg", error))[:80], getattr(error, "lineno", "1")
        raise ValueError(f"{path} line {line} is no JSON ({reason}): mend the file.") from None
    if isinstance(content, dict) and not any(set(fields.required()) <= set(content) for fields in FIELDS):
        lists = {key: value for key, value in content.items() if isinstance(value, list)}
        if len(lists) != 1 and "train" not in lists:
            raise ValueError(f"{path} holds an object with the lists {sorted(lists)}: it must have one, or a 'train'.")
        content = lists["train"] if "train" in lists else next(iter(lists.values()))
    content = [content] if isinstance(content, dict) else content
    if not isinstance(content, list):
        raise ValueError(f"{path} holds a {type(content).__name__}: it must be a list of examples.")
    for number, element in enumerate(content, start=1):
        yield _located(element, f"{path} element {number}")


def _read_csv(path: Path) -> Iterator[Located]:
    """Rows of a CSV file with a header. A cell may be as large as an answer is, and hold line ends in quotes."""
    rows = _csv_rows(path)
    header = next(rows, (0, []))[1]
    if len(set(header)) < len(header):
        raise ValueError(f"{path} names a column twice in its first line: rename one.")
    for line, cells in rows:
        if len(cells) != len(header):
            raise ValueError(
                f"{path} line {line} has {len(cells)} cells and the header has {len(header)}: mend the row, "
                "and put texts with commas in quotes."
            )
        yield f"{path} line {line}", dict(zip(header, cells, strict=True))


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(the line where a row begins, its cells), without empty rows."""
    reader, line = csv.reader(_lines(path), strict=True), 1
    while True:
        limit = csv.field_size_limit(2**31 - 1)  # the module's own; put back before anybody else can meet it
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path} line {line} is no CSV ({str(error)[:80]}): mend the row.") from None
        finally:
            csv.field_size_limit(limit)
        if cells:
            yield line, cells
        line = reader.line_num + 1


def _read_parquet(path: Path) -> Iterator[Located]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path} is a Parquet file: to read it, run pip install pyarrow.") from None
    try:
        number = 0
        for batch in ParquetFile(path).iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", row
    except OSError as error:  # pyarrow's errors are ValueErrors and OSErrors
        raise ValueError(f"{path} is damaged ({str(error)[:100]}): fetch it again.") from None


READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _located(content: Any, where: str) -> Located:
    content = {"text": content} if isinstance(content, str) else content
    if not isinstance(content, dict):
        raise ValueError(f'{where} is a {type(content).__name__}: it must be an object like {{"instruction": ...}}.')
    return where, content


# ------------------------------------------------------------------------------------------------------------ records


class Record(NamedTuple):
    """One example: a conversation, or a text."""

    messages: list[dict[str, Any]]
    input: str = ""  # what an instruction is about
    text: str | None = None


class Dropped(Exception):
    """Why an example is left out, as the end of "N examples ..."."""


def to_record(content: dict[str, Any], where: str, fields: Fields | None = None) -> Record:
    """The example that an object of a file means. Raises ValueError that names `where`, and Dropped."""
    rows = FIELDS if fields is None else (fields,)
    row = next((row for row in rows if set(row.required()) <= set(content)), None)
    if row is None:
        there = ", ".join(map(str, list(content)[:12])) or "none"
        needed = "instruction and output, prompt and completion, messages, or text"
        needed = needed if fields is None else " and ".join(fields.required())
        raise ValueError(f"{where} has the keys {there}: it needs {needed}.")
    if row.messages:
        return Record(_messages(content[row.messages], f"{where}, {row.messages}"))
    values = {key: _text_of(content.get(key), f"{where}, {key}") for key in (*row.required(), row.input) if key}
    if row.text:
        if not values[row.text].strip():
            raise Dropped("without a text")
        return Record([], text=values[row.text])
    instruction, input = values[row.instruction], values.get(row.input, "")
    if not (instruction + input).strip():
        raise Dropped("without a prompt")
    if not values[row.output].strip():
        raise Dropped("with an empty answer")
    answer = {"role": "assistant", "content": values[row.output]}
    return Record([{"role": "user", "content": instruction}, answer], input if input.strip() else "")


def _text_of(value: Any, where: str) -> str:
    if not isinstance(value, str | None):
        raise ValueError(f"{where} is a {type(value).__name__}: it must be a text.")
    return value or ""


def _messages(turns: Any, where: str) -> list[dict[str, Any]]:
    """Messages with role and content from any way to write a conversation, ending in the last answer."""
    if not isinstance(turns, list):
        raise ValueError(f"{where} is a {type(turns).__name__}: it must be a list of messages.")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if isinstance(turn, str):  # LIMA: user and assistant in turn
            turn = {"role": ("user", "assistant")[(number - 1) % 2], "content": turn}
        if not isinstance(turn, dict) or not ({"role", "content"} <= set(turn) or {"from", "value"} <= set(turn)):
            raise ValueError(f"{where}, message {number} needs role and content (or from and value).")
        others = {key: value for key, value in turn.items() if key not in ("role", "content", "from", "value")}
        role, content = (turn[k] for k in (("role", "content") if "role" in turn else ("from", "value")))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"{where}, message {number} has the role {role!r}: it must be one of {', '.join(ROLES)}.")
        messages.append({"role": ROLES[role], "content": _text_of(content, f"{where}, message {number}"), **others})
    while messages and messages[-1]["role"] != "assistant":  # nothing after the last answer is trained
        messages.pop()
    if not messages:
        raise Dropped("without an answer")
    if any(m["role"] == "assistant" and not m["content"].strip() and not m.get("tool_calls") for m in messages):
        raise Dropped("with an empty answer")
    return messages


# ------------------------------------------------------------------------------------------------------------- tokens
#
# The ids of a prompt are those that generation makes of it, so the model meets in use what it met in training. The
# answer's ids are those that it has behind the prompt, where the two do not share a token; otherwise its own.


class Encoded(NamedTuple):
    ids: list[int]
    trained: list[bool]


def encode_record(record: Record, style: str, tokenizer: Tokenizer, mask_prompt: bool = True) -> Encoded:
    """Tokens of an example, and which of them are trained, before anything is cut. Raises ValueError."""
    if record.text is not None:
        ids = tokenizer.encode(record.text, eos=True)
        return Encoded(ids, [True] * len(ids))
    pieces = _chat_pieces(record, tokenizer) if style == "chat" else _style_pieces(record, style, tokenizer)
    ids = [i for piece, _ in pieces for i in piece]
    return Encoded(ids, [answer or not mask_prompt for piece, answer in pieces for _ in piece])


def _chat_pieces(record: Record, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    """Prompts and answers in turn; an answer ends with what the template writes behind it, but for white space."""
    messages = record.messages
    if record.input:
        messages = [{**messages[0], "content": _joined(messages[0]["content"], record.input)}, *messages[1:]]
    whole, cuts = tokenizer.render_chat(messages, add_generation_prompt=False), [0]
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if k == 0:
            raise ValueError("The conversation begins with an answer: begin it with a message of the user's.")
        prompt = tokenizer.render_chat(messages[:k])
        until = whole if k == len(messages) - 1 else tokenizer.render_chat(messages[: k + 1], False)
        end = len(until.rstrip())
        if not whole.startswith(prompt) or not whole.startswith(until[:end]) or not cuts[-1] <= len(prompt) < end:
            raise ValueError(
                f"The chat template writes the conversation up to message {k + 1} in another way when more follows, "
                "or not as it prompts for an answer: choose another prompt_style, or give one answer per example."
            )
        cuts += [len(prompt), end]
    pieces = _encode_pieces(tokenizer, whole, cuts)
    return [(piece, i % 2 == 1) for i, piece in enumerate(pieces)]


def _encode_pieces(tokenizer: Tokenizer, text: str, cuts: list[int]) -> list[list[int]]:
    """Ids of text[cuts[i] : cuts[i + 1]] for each i, as they are in the whole where no token crosses a cut."""
    spans = list(zip(cuts, cuts[1:], strict=False))
    if len(spans) > 2:  # long conversations: each part encoded once, if that gives the ids of the whole
        pieces = [tokenizer.encode(text[a:b], bos=False) for a, b in spans]
        if [i for piece in pieces for i in piece] == tokenizer.encode(text[: cuts[-1]], bos=False):
            return pieces
    pieces, before = [], []
    for a, b in spans:
        ids = tokenizer.encode(text[:b], bos=False)
        joins = ids[: len(before)] == before
        pieces.append(ids[len(before) :] if joins else tokenizer.encode(text[a:b], bos=False))
        before = ids
    return pieces


def _style_pieces(record: Record, name: str, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    style, messages = PROMPT_STYLES[name], record.messages
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if [m["role"] for m in turns] != ["user", "assistant"] * (len(turns) // 2) or not turns:
        roles = ", ".join(m["role"] for m in messages[:8])
        raise ValueError(f"The messages are of {roles}: prompt_style={name!r} needs user and assistant in turn.")
    end = [tokenizer.token_to_id(style.end) if style.end else tokenizer.eos_id]
    bos, pieces = _own_bos(tokenizer), []
    for k in range(0, len(turns), 2):
        user, answer = turns[k]["content"], style.before_answer + turns[k + 1]["content"]
        prompt = style.further(user) if k else style.opening(user, record.input, system)
        cuts = [0, len(prompt), len(prompt) + len(answer)]
        prompt_ids, answer_ids = _encode_pieces(tokenizer, prompt + answer, cuts)
        if (k == 0 or style.bos_every_turn) and prompt_ids[: len(bos)] != bos:
            prompt_ids = bos + prompt_ids
        pieces += [(prompt_ids, False), (answer_ids + end, True)]
    return pieces


def _own_bos(tokenizer: Tokenizer) -> list[int]:
    """What the model's tokenizer puts in front of a text: BOS, or nothing."""
    plain, own = tokenizer.encode("a", bos=False), tokenizer.encode("a")
    for k in range(len(own) - len(plain) + 1):
        if own[k : k + len(plain)] == plain:
            return own[:k]
    return []


def _end_ids(style: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of which one must be trained, or no answer would ever end: EOS, or the style's end of a turn."""
    if style != "chat":
        end = PROMPT_STYLES[style].end
        return [tokenizer.token_to_id(end) if end else tokenizer.eos_id]
    probe = Record([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    try:
        pieces = _chat_pieces(probe, tokenizer)
    except ValueError:  # a template that wants more of a conversation than this
        return tokenizer.eos_ids
    last = pieces[-1][0][-1:]
    text = tokenizer.decode(last, skip_special_tokens=False)
    return sorted({*tokenizer.eos_ids, *(last if not text.strip().endswith("b") else [])})


# --------------------------------------------------------------------------------------------------- building a dataset


def _encode_records(
    records: Iterable[Located],
    data: Path | str,
    tokenizer: Tokenizer,
    max_seq_length: int,
    style: str,
    preset: str | None,
    mask_prompt: bool,
    limit: int | None,
    progress: Progress | None,
) -> Dataset:
    """Every example that can be trained, cut to max_seq_length."""
    fields = PRESETS[preset].fields if preset else None
    growing, n_read = _Growing(max_seq_length), 0
    for n_read, (where, content) in enumerate(records, start=1):
        try:
            record = to_record(content, where, fields)
            growing.add(record, _encode_at(where, record, style, tokenizer, mask_prompt))
        except Dropped as reason:
            growing.dropped[str(reason)] += 1
        if progress and n_read % 256 == 0:
            progress(n_read, len(growing.tokens))
        if n_read == limit:
            break
    if not n_read:
        raise ValueError(f"{data} holds no examples: give a file with some.")
    if not growing.lengths:
        raise ValueError(
            f"None of the {n_read} examples of {data} is left ({growing.reasons()}): raise max_seq_length, or mend "
            "the data."
        )
    info = {
        "kind": "instruction" if growing.instructions else "text",
        "prompt_style": style,
        "preset": preset,
        "mask_prompt": mask_prompt,
        "max_seq_length": max_seq_length,
        "truncated": growing.truncated,
        "end_ids": _end_ids(style, tokenizer) if growing.instructions else [],
        **_tokenizer_info(tokenizer),
    }
    return growing.finish(data, info)


class _Growing:
    """A dataset in the making: flat arrays that grow, and counts of what was cut and dropped."""

    def __init__(self, max_seq_length: int) -> None:
        self.max_seq_length = max_seq_length
        self.tokens, self.mask, self.lengths = array("i"), bytearray(), array("q")
        self.dropped: Counter[str] = Counter()
        self.truncated = self.instructions = 0

    def add(self, record: Record, encoded: Encoded) -> None:
        ids, trained = encoded.ids[: self.max_seq_length], encoded.trained[1 : self.max_seq_length]
        if not any(trained):
            raise Dropped(f"with nothing to train within {self.max_seq_length} tokens")
        self.tokens.extend(ids)
        self.mask.extend([False, *trained])
        self.lengths.append(len(ids))
        self.truncated += len(encoded.ids) > self.max_seq_length
        self.instructions += record.text is None

    def reasons(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())

    def finish(self, data: Path | str, info: dict[str, Any]) -> Dataset:
        lengths = np.frombuffer(self.lengths, dtype=np.int64)
        tokens, mask = np.frombuffer(self.tokens, dtype=np.int32), np.frombuffer(self.mask, dtype=np.uint8)
        left_out = f"{sum(self.dropped.values())} dropped ({self.reasons()})" if self.dropped else "none dropped"
        report = (
            f"{data}: {len(lengths)} examples, {len(tokens)} tokens, {np.count_nonzero(mask)} of them trained; "
            f"{self.truncated} cut to {self.max_seq_length} tokens, {left_out}."
        )
        return Dataset(tokens, mask, np.cumsum(lengths) - lengths, lengths, report, info)


def _encode_at(where: str, record: Record, style: str, tokenizer: Tokenizer, mask_prompt: bool) -> Encoded:
    try:
        return encode_record(record, style, tokenizer, mask_prompt)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _tokenizer_info(tokenizer: Tokenizer) -> dict[str, Any]:
    """The vocabulary's size and a hash of its tokens: the same vocabulary saved by another library has the same."""
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.vocab_size)]
    return {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
    }


# ----------------------------------------------------------------------------------------------- text and token files


def model_vocab_size(tokenizer: Tokenizer) -> int:
    """The vocabulary's size as the model's config has it, else as the tokenizer has: it decides 16 or 32 bits."""
    if (tokenizer.checkpoint_dir / "lit_config.json").exists():
        return int(read_json(tokenizer.checkpoint_dir / "lit_config.json").get("vocab_size", tokenizer.vocab_size))
    return tokenizer.vocab_size


def read_documents(files: Sequence[Path], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The ids of each document, with what the tokenizer puts in front and with EOS: a .txt file is one, and so is each
    {"text": ...} of a .jsonl, .json, .csv or .parquet file. Raises ValueError or OSError."""
    for file in files:
        if file.suffix == ".txt":
            yield np.array(tokenizer.encode(read_text(file), eos=True), dtype=np.uint32)
            continue
        for where, content in READERS[file.suffix](file):
            try:
                record = to_record(content, where, Fields(text="text"))
            except Dropped:
                continue
            yield np.array(_encode_at(where, record, "plain", tokenizer, False).ids, dtype=np.uint32)


def write_token_file(
    files: Sequence[Path], tokenizer: Tokenizer, output: Path, progress: Progress | None = None
) -> tuple[int, int]:
    """Documents as one stream of ids: 16 bits each for a vocabulary of up to 65,536, else 32, little-endian, no header.

    Returns (documents, tokens). The file appears whole or not at all. Raises ValueError or OSError.
    """
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"There is no file {file}: give texts, or a directory of .txt files.")
        if file.suffix not in (*READERS, ".txt"):
            raise ValueError(f"{file} is no text: it must be .txt, or {', '.join(READERS)} with a text in each record.")
    kind = "<u2" if model_vocab_size(tokenizer) <= 2**16 else "<u4"
    n_documents = n_tokens = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(output) as stream:
        for ids in read_documents(files, tokenizer):
            stream.write(ids.astype(kind).tobytes())
            n_documents, n_tokens = n_documents + 1, n_tokens + len(ids)
            if progress:
                progress(n_documents, n_tokens)
        if not n_tokens:
            raise ValueError(f"{files[0]} holds no text: give a file with some.")
    return n_documents, n_tokens


def _load_text(
    files: list[Path],
    data: Path | str,
    tokenizer: Tokenizer,
    row: int,
    limit: int | None,
    progress: Progress | None,
) -> Dataset:
    """Rows of `row` tokens of the one stream of all documents, or of a token file."""
    from lit_swa.evaluate import check_tokens, open_token_file

    if files[0].suffix == ".bin":
        vocab_size = model_vocab_size(tokenizer)
        tokens = open_token_file(files[0], vocab_size)
        check_tokens(tokens, vocab_size, files[0])
    else:
        parts, n = [], 0
        for ids in read_documents(files, tokenizer):
            parts.append(ids)
            n += len(ids)
            if progress:
                progress(len(parts), n)
            if limit is not None and n >= limit * row:
                break
        tokens = np.concatenate(parts)
    n_rows = min(len(tokens) // row, limit or len(tokens))
    if not n_rows:
        raise ValueError(
            f"{data} gives {len(tokens)} tokens and a row has {row}: lower max_seq_length, or give more text."
        )
    rest = len(tokens) - n_rows * row
    report = (
        f"{data}: {n_rows} examples of {row} tokens, {n_rows * row} tokens, {n_rows * (row - 1)} of them trained; "
        f"none cut, {rest} tokens behind the last row dropped."
    )
    info = {
        "kind": "text", "prompt_style": None, "preset": None, "mask_prompt": True, "max_seq_length": row,
        "truncated": 0, "end_ids": [], **_tokenizer_info(tokenizer),
    }  # fmt: skip
    starts = np.arange(n_rows, dtype=np.int64) * row
    return Dataset(tokens, None, starts, np.full(n_rows, row, dtype=np.int64), report, info)


# ------------------------------------------------------------------------------------------------ prepared directories

INFO_NAME, TOKENS_NAME, MASK_NAME, LENGTHS_NAME = "dataset.json", "tokens.bin", "trained.bin", "lengths.npy"
FORMAT = 1


def save_dataset(dataset: Dataset, directory: Path) -> None:
    """Write a directory that load_dataset takes: dataset.json comes last, so without it the directory is incomplete.

    A dataset that is there already is replaced. Raises OSError when the disk is full.
    """
    kind = "<u2" if dataset.info["vocab_size"] <= 2**16 else "<u4"
    n_tokens = int(dataset.lengths.sum())
    with directory_lock(directory):
        remove_leftovers(directory)
        require_space(directory, n_tokens * (np.dtype(kind).itemsize + 1) + 8 * len(dataset))
        (directory / INFO_NAME).unlink(missing_ok=True)
        with atomic_file(directory / TOKENS_NAME) as tokens, atomic_file(directory / MASK_NAME) as mask:
            for i in range(len(dataset)):
                ids, labels = dataset[i]
                tokens.write(ids.astype(kind).tobytes())
                mask.write((labels != IGNORED).tobytes())
        with atomic_file(directory / LENGTHS_NAME) as stream:
            np.save(stream, dataset.lengths.astype("<i8"), allow_pickle=False)
        content = {"format": FORMAT, "report": dataset.report, "fingerprint": dataset.fingerprint, **dataset.info}
        write_json(directory / INFO_NAME, content)


def load_prepared(
    directory: Path, tokenizer: Tokenizer, max_seq_length: int, wanted: dict[str, Any], limit: int | None = None
) -> Dataset:
    """The dataset of a directory that save_dataset wrote, its tokens mapped; examples beyond max_seq_length are cut.

    wanted: prompt_style, preset (None: as prepared) and mask_prompt. Raises ValueError when the directory was prepared
    in another way, for another tokenizer, or is damaged.
    """
    content = read_json(directory / INFO_NAME)
    missing = {"format", "report", "fingerprint", *_INFO_KEYS} - set(content)
    if missing or content["format"] != FORMAT:
        raise ValueError(f"{directory / INFO_NAME} is damaged or of another version: prepare the dataset again.")
    for key, value in wanted.items():
        if value is not None and value != content[key]:
            raise ValueError(
                f"{directory} was prepared with {key}={content[key]!r} and not {value!r}: leave it so, or prepare it "
                "again."
            )
    if content["tokenizer"] != _tokenizer_info(tokenizer)["tokenizer"]:
        raise ValueError(
            f"{directory} was prepared for another vocabulary (of {content['vocab_size']} tokens) than that of "
            f"{tokenizer.checkpoint_dir} ({tokenizer.vocab_size}): prepare it again."
        )
    if max_seq_length > content["max_seq_length"] and content["truncated"]:
        raise ValueError(
            f"{directory} was prepared with max_seq_length={content['max_seq_length']}, which cut "
            f"{content['truncated']} examples: for {max_seq_length} prepare it again."
        )
    dataset = _open_prepared(directory, content)
    return _shortened(dataset, directory, max_seq_length, limit)


_INFO_KEYS = (
    "kind", "prompt_style", "preset", "mask_prompt", "max_seq_length", "truncated", "end_ids", "vocab_size",
    "tokenizer",
)  # fmt: skip


def _open_prepared(directory: Path, content: dict[str, Any]) -> Dataset:
    """The mapped files, compared with each other and with the fingerprint. Raises ValueError when they do not fit."""
    kind = np.dtype("<u2" if content["vocab_size"] <= 2**16 else "<u4")
    damaged = ValueError(f"{directory} is damaged: its files do not fit each other; prepare the dataset again.")
    try:
        lengths = np.load(find_inside(directory, LENGTHS_NAME), allow_pickle=False)
    except (ValueError, EOFError):
        raise damaged from None
    if lengths.dtype != np.dtype("<i8") or lengths.ndim != 1 or len(lengths) < 1 or lengths.min() < 2:
        raise damaged
    paths = [(find_inside(directory, TOKENS_NAME), kind), (find_inside(directory, MASK_NAME), np.dtype("u1"))]
    if any(path.stat().st_size != int(lengths.sum()) * dtype.itemsize for path, dtype in paths):
        raise damaged
    tokens, mask = (np.memmap(path, dtype=dtype, mode="r") for path, dtype in paths)
    info = {key: content[key] for key in _INFO_KEYS}
    dataset = Dataset(tokens, mask, np.cumsum(lengths) - lengths, lengths, content["report"], info)
    if dataset.fingerprint != content["fingerprint"] or dataset.trained.min() < 1:
        raise damaged
    return dataset


def _shortened(dataset: Dataset, name: object, max_seq_length: int, limit: int | None) -> Dataset:
    """The first `limit` examples, cut to max_seq_length; those without a trained token left are dropped."""
    n = len(dataset) if limit is None else min(limit, len(dataset))
    if n == len(dataset) and int(dataset.lengths.max()) <= max_seq_length:
        return dataset
    lengths = np.minimum(dataset.lengths[:n], max_seq_length)
    cut = int((dataset.lengths[:n] > max_seq_length).sum())
    trained = _count_trained(dataset.mask, dataset.starts[:n], lengths)
    kept = np.flatnonzero(trained)
    if not kept.size:
        raise ValueError(
            f"None of the {n} examples of {name} has a trained token within {max_seq_length}: raise max_seq_length."
        )
    lengths, trained = lengths[kept], trained[kept]
    info = {**dataset.info, "max_seq_length": max_seq_length, "truncated": dataset.info["truncated"] + cut}
    report = (
        f"{name}: {len(kept)} examples, {int(lengths.sum())} tokens, {int(trained.sum())} of them trained; {cut} cut "
        f"to {max_seq_length} tokens, {n - len(kept)} dropped with nothing to train within {max_seq_length} tokens."
    )
    return Dataset(dataset.tokens, dataset.mask, dataset.starts[kept], lengths, report, info, trained)


# ----------------------------------------------------------------------------- splitting, packing, showing, checking


def split_dataset(dataset: Dataset, validation: float | int, seed: int) -> tuple[Dataset, Dataset]:
    """(training, validation), disjoint, both in the dataset's order; the same seed gives the same split.

    validation: how many examples, from 1; or which part of them, between 0 and 1. Raises ValueError for none or all.
    """
    n = len(dataset)
    count = round(validation * n) if 0 < validation < 1 else validation
    if count != int(count) or not 1 <= count < n:
        raise ValueError(
            f"A validation set of {validation} out of {n} examples does not fit: give a number of examples below {n}, "
            "or a part between 0 and 1 that is at least one example."
        )
    shuffled = np.random.RandomState(seed).permutation(n)  # its numbers are promised never to change, a Generator's not
    parts = [np.sort(shuffled[int(count) :]), np.sort(shuffled[: int(count)])]
    return tuple(
        dataset.subset(
            index,
            f"{len(index)} {name} examples, {int(dataset.lengths[index].sum())} tokens, "
            f"{int(dataset.trained[index].sum())} of them trained.",
        )
        for name, index in zip(("training", "validation"), parts, strict=True)
    )


def pack(lengths: np.ndarray, max_seq_length: int, seed: int) -> list[list[int]]:
    """Bins of example indices, each example in one bin, each bin of at most max_seq_length tokens; in mixed order.

    Best fit, longest first: an example goes into the bin where it leaves the least room. Which examples of a length go
    together, and the order of the bins, follow the seed. Raises ValueError for an example that fits no bin.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= max_seq_length:
        raise ValueError(
            f"An example has {int(lengths.max())} tokens and a row {max_seq_length}: an example must have 1 to "
            f"{max_seq_length} tokens."
        )
    random = np.random.RandomState(seed)
    order = random.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(max_seq_length + 1)]  # room -> bins that have exactly so much
    rooms = 0  # bit r is set where with_room[r] has a bin, so the least room that suffices is one shift away
    for i, n in zip(order.tolist(), lengths[order].tolist(), strict=True):
        enough = rooms >> n
        if enough:
            room = n + (enough & -enough).bit_length() - 1
            b = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            bins[b].append(i)
        else:
            room, b = max_seq_length, len(bins)
            bins.append([i])
        left = room - n
        if left:
            with_room[left].append(b)
            rooms |= 1 << left
    mixed = [bins[b] for b in random.permutation(len(bins)).tolist()]
    return [[one[k] for k in random.permutation(len(one))] for one in mixed]


def show_progress(what: str, interval: float = 30.0) -> Progress:
    """A function that says on stderr how far the work is: in one line on a terminal, else every `interval` seconds."""
    started = shown = time.perf_counter()

    def show(count: int, tokens: int) -> None:
        nonlocal shown
        now, terminal = time.perf_counter(), sys.stderr.isatty()
        if now - shown >= (0.2 if terminal else interval):
            shown = now
            line = f"{count} {what} | {tokens} tokens | {tokens / (now - started):.0f} tok/s"
            print(f"\r\033[K{line}\r" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    return show


MARKS = {True: ("\033[7m", "\033[27m"), False: ("[[", "]]")}
SHOWN_CHARS = 240  # of a stretch, at each of its ends


def show_examples(dataset: Dataset, tokenizer: Tokenizer, n: int = 3, terminal: bool | None = None) -> str:
    """Some examples as text, what is trained in reverse on a terminal and else in [[ ]]; long stretches shortened.

    terminal: by default whether stderr is one.
    """
    before, after = MARKS[sys.stderr.isatty() if terminal is None else terminal]
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(n, len(dataset))).astype(int)).tolist()
    shown = []
    for i in chosen:
        ids, labels = dataset[i]
        decoder, text = StreamDecoder(tokenizer, skip_special_tokens=False), ""
        trained = labels != IGNORED
        borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
        for a, b in zip(borders, borders[1:], strict=False):
            stretch = "".join(map(decoder.push, ids[a:b].tolist())) + (decoder.flush() if b == len(ids) else "")
            text += before + _short(stretch) + after if trained[a] else _short(stretch)
        count = f"{len(ids)} tokens, {int(trained.sum())} trained"
        shown.append(f"--- example {i + 1} of {len(dataset)}: {count}\n{text}")
    return "\n".join(shown)


def _short(text: str) -> str:
    """Shortened in the middle, with control characters spelled out: they could change a terminal."""
    if len(text) > 2 * SHOWN_CHARS + 40:
        left_out = len(text) - 2 * SHOWN_CHARS
        text = f"{text[:SHOWN_CHARS]} ... {left_out} characters ... {text[-SHOWN_CHARS:]}"
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)


def check_dataset(dataset: Dataset, tokenizer: Tokenizer) -> None:
    """Raises ValueError when nothing is trained, or, of instructions, never the token that ends an answer."""
    if not len(dataset) or int(dataset.trained.min()) < 1:
        raise ValueError("The dataset has examples of which no token is trained: load it again, it must drop them.")
    if dataset.info["kind"] != "instruction":
        return
    ends = np.array(dataset.info["end_ids"] or tokenizer.eos_ids, dtype=np.int32)
    for i in range(len(dataset)):
        if np.isin(dataset[i].labels, ends).any():
            return
    names = ", ".join(repr(tokenizer.id_to_token(int(i))) for i in ends) or "EOS, which the tokenizer lacks"
    raise ValueError(
        f"In none of the {len(dataset)} examples is the end of an answer trained ({names}), so the model would never "
        f"stop: {dataset.info['truncated']} are cut at {dataset.info['max_seq_length']} tokens, raise max_seq_length; "
        "or the chat template writes none, choose another prompt_style."
    )


def unheard_end(dataset: Dataset, tokenizer: Tokenizer, n: int = 100) -> str:
    """A sentence if, of the first n examples, none trains a token that generation stops at; else nothing."""
    if dataset.info["kind"] != "instruction" or not tokenizer.eos_ids:
        return ""
    trained = np.unique(np.concatenate([dataset[i].labels for i in range(min(n, len(dataset)))]))
    ends = [i for i in dataset.info["end_ids"] if i in trained]
    if not ends or np.isin(trained, tokenizer.eos_ids).any():
        return ""
    others = ", ".join(repr(tokenizer.id_to_token(i)) for i in tokenizer.eos_ids)
    return (
        f"note: answers end with {tokenizer.id_to_token(ends[0])!r}, and generation stops at {others} only: add "
        f"{ends[0]} to eos_token_id in the model's generation_config.json."
    )


# ------------------------------------------------------------------------------------------------------------ the hub

HUB_SECONDS = 10.0  # for the hub's answer to a question
HUB_DIR = Path("data/hub")
HUB_INDEX = "files.json"  # selection -> files, written when they are all there


def fetch_preset(name: str, selection: str = "", directory: Path | None = None) -> list[Path]:
    """The files of a preset, downloaded from the hub into directory/NAME (by default data/hub/NAME) unless there.

    selection: a pattern of file names such as "aeslc*", where not all are wanted. Raises OSError in one sentence.
    """
    directory = (directory or HUB_DIR) / name
    with directory_lock(directory):
        index = read_json(directory / HUB_INDEX) if (directory / HUB_INDEX).exists() else {}
        known = [directory / file for file in index.get(selection, []) if ".." not in Path(file).parts]
        if known and all(path.is_file() for path in known):
            return known
        info = _ask_hub(PRESETS[name].repo)
        files = _select_files(info, PRESETS[name], selection)
        require_space(directory, sum(file.size or 0 for file in files))
        for file in files:
            _download(info, file, directory)
        write_json(directory / HUB_INDEX, {**index, selection: [file.rfilename for file in files]})
    return [directory / file.rfilename for file in files]


def _ask_hub(repo: str) -> Any:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError

    try:
        return HfApi().dataset_info(repo, files_metadata=True, timeout=HUB_SECONDS)
    except GatedRepoError:
        raise OSError(f"Access to {repo} must be asked for on its page on the Hugging Face hub: {_TOKEN}.") from None
    except Exception as error:  # the hub's and the network's errors have no base class in common
        reason = f"{type(error).__name__}: {str(error).strip()[:120]}"
        raise OSError(
            f"The Hugging Face hub does not give {repo} ({reason}): check the network, or give a local file with "
            "preset."
        ) from None


_TOKEN = "then set HF_TOKEN, or log in with hf auth login"


def _select_files(info: Any, preset: Preset, selection: str) -> list[Any]:
    files = [f for f in info.siblings or [] if any(fnmatch.fnmatch(f.rfilename, p) for p in preset.files)]
    chosen = [f for f in files if fnmatch.fnmatch(Path(f.rfilename).name, selection or "*")]
    if not chosen:
        names = ", ".join(Path(f.rfilename).name for f in files[:8]) or "none"
        what = f"called {selection}" if selection else f"like {', '.join(preset.files)}"
        raise ValueError(f"{preset.repo} has no file {what} (it has {names}): choose others, or give a local file.")
    return sorted(chosen, key=lambda file: file.rfilename)


def _download(info: Any, file: Any, directory: Path) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError

    from lit_swa.formats.download import verify_hub_file

    try:
        path = hf_hub_download(info.id, file.rfilename, repo_type="dataset", revision=info.sha, local_dir=directory)
    except GatedRepoError:
        raise OSError(f"Access to {info.id} must be asked for on its page on the Hugging Face hub: {_TOKEN}.") from None
    except Exception as error:
        raise OSError(
            f"The download of {file.rfilename} stopped ({type(error).__name__}: {str(error).strip()[:120]}): run the "
            "command again, it goes on where it stopped."
        ) from error
    verify_hub_file(Path(path), file)
