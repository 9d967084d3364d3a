"""Prompts in a file, a JSON object a line, and their answers in another, which a run that was ended goes on with."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lit_swa.arguments import Generation
from lit_swa.batches import Answer, Request
from lit_swa.checks import check_range
from lit_swa.completion import Run
from lit_swa.data.readers import read_jsonl
from lit_swa.formats.files import holds_json, named_when_full, write_json
from lit_swa.formats.json_files import read_json
from lit_swa.generate import LIMITS, check_prompt, check_stops
from lit_swa.model import GPT
from lit_swa.texts import encode_text
from lit_swa.tokenizer import Tokenizer

ANSWER_FIELDS = ("completion", "prompt_tokens", "new_tokens", "finish_reason")  # and seed, which a prompt may have too
FOR_ALL = {  # what other programs read of each prompt -> the argument that says it of all prompts
    name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
} | dict.fromkeys(("max_tokens", "max_completion_tokens"), "max_new_tokens")
NO_MATTER = ("prompt", "num_samples", "device", "compile", "profile")  # arguments that change none of the answers


class Prompt(NamedTuple):
    """A line of a file of prompts."""

    where: str  # "FILE line N"
    fields: dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- prompts


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file. Raises OSError, or ValueError with the number of a line that is none.

    A line has "prompt", a text, or "messages", a chat; "max_new_tokens", "stop" (a text or several) and "seed" if they
    are to differ from the arguments; and any other fields, which the answer has too.
    """
    if path.is_dir() or not path.exists():
        raise FileNotFoundError(f"There is no file {path}: give one with a JSON object a line, each with a prompt.")
    prompts = [Prompt(where, fields) for where, fields in read_jsonl(path, example='{"prompt": "Once upon a time"}')]
    if not prompts:
        raise ValueError(f'{path} holds no prompts: write a line such as {{"prompt": "Once upon a time"}} for each.')
    for prompt in prompts:
        with naming(prompt):
            check_fields(prompt.fields)
    warn_of_settings(prompts)
    return prompts


def warn_of_settings(prompts: Sequence[Prompt]) -> None:
    """Say at which line a field has the name of a setting, which is no prompt's own."""
    for name, argument in FOR_ALL.items():
        if where := next((prompt.where for prompt in prompts if name in prompt.fields), None):
            own = ", or max_new_tokens in the line" if argument == "max_new_tokens" else ""
            print(f'warning: {where}: "{name}" is not read: give --{argument}{own}.', file=sys.stderr)


@contextmanager
def naming(prompt: Prompt) -> Iterator[None]:
    """Within it the sentence of a ValueError begins with the prompt's file and line."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prompt.where}: {error}") from None


def check_fields(fields: dict[str, Any]) -> None:
    """Raises ValueError for fields that ask for nothing, or have another type."""
    asked = [name for name in ("prompt", "messages") if name in fields]
    if len(asked) != 1:
        raise ValueError('it has both "prompt" and "messages".' if asked else 'it has neither "prompt" nor "messages".')
    if "prompt" in fields and not (isinstance(fields["prompt"], str) and fields["prompt"]):
        raise ValueError('"prompt" must be a text that is not empty.')
    if taken := [name for name in ANSWER_FIELDS if name in fields]:
        raise ValueError(f'the answer has a field "{taken[0]}" of its own: give this one another name.')
    for name, (least, most) in {"max_new_tokens": (0, 10**9), "seed": LIMITS["seed"]}.items():
        if name in fields:
            if type(fields[name]) is not int:
                raise ValueError(f'"{name}" must be a whole number.')
            check_range(name, fields[name], least, most)
    if not all(isinstance(stop, str) for stop in stops_of(fields)):
        raise ValueError('"stop" must be a text or a list of texts.')
    check_stops(stops_of(fields))
    check_messages(fields.get("messages", []))
    try:
        json.dumps(fields, allow_nan=False)
    except ValueError:
        raise ValueError("it holds NaN or a number beyond all others, which JSON does not have.") from None


def check_messages(messages: Any) -> None:
    """Raises ValueError unless they are a list of messages with a role, and a content or what takes its place."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError('"messages" must be a list of objects like {"role": "user", "content": "Hello"}.')
    for message in messages:
        content = message.get("content")
        there = isinstance(content, str | list) or content is None and not message.keys() <= {"role", "content"}
        if not isinstance(message.get("role"), str) or not there:
            raise ValueError('each of the "messages" must have a "role" and a "content", which are texts.')


def stops_of(fields: dict[str, Any]) -> list[Any]:
    stop = fields.get("stop", [])
    return stop if isinstance(stop, list) else [stop]


def to_requests(prompts: Sequence[Prompt], tokenizer: Tokenizer, args: Generation) -> list[Request]:
    """What is asked of the model. Prompt n takes the seed args.seed + n, unless it has one of its own.

    Raises ValueError with the line of a prompt that cannot be encoded.
    """
    requests = []
    for n, prompt in enumerate(prompts):
        fields, chat = prompt.fields, "messages" in prompt.fields
        with naming(prompt):
            ids = (
                tokenizer.apply_chat_template(fields["messages"]) if chat else encode_text(tokenizer, fields["prompt"])
            )
        seed, most = fields.get("seed", args.seed + n), fields.get("max_new_tokens", args.max_new_tokens)
        stop = stops_of(fields) if "stop" in fields else args.stop or []
        requests.append(Request([int(i) for i in ids], most, seed, stop, continues=not chat))
    return requests


def check_prompts(model: GPT, prompts: Sequence[Prompt], requests: Sequence[Request]) -> None:
    """Raises ValueError with the line of the first prompt that the model cannot read."""
    for prompt, request in zip(prompts, requests, strict=True):
        with naming(prompt):
            check_prompt(model, request.ids, request.max_new_tokens)


# ------------------------------------------------------------------------------------------------------------- answers


class AnswerFile:
    """The answers to the first prompts, in the prompts' order, a JSON object a line.

    Beside it lies FILE.run.json with what the answers depend on, so that only the same run goes on with the file. What
    a killed process wrote of a line is dropped.
    """

    def __init__(self, path: Path, prompts: Sequence[Prompt], record: dict[str, Any]) -> None:
        """record: as make_record makes it. Raises ValueError for a file that another run wrote; nothing is written."""
        self.path, self.prompts, self.record = path, prompts, record
        self.record_path = path.with_name(f"{path.name}.run.json")
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is no file: give --output the name of one.")
        place = next(place for place in (path, *path.absolute().parents) if place.exists())
        if not os.access(place, os.W_OK) or place != path and not place.is_dir():
            raise ValueError(f"{path} cannot be written, because of {place}: give another --output.")
        if path.exists() and path.samefile(record["prompts"]):
            raise ValueError(f"{path} is the file of prompts: give --output another name.")
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        self.done = len(lines) - 1  # how many prompts are answered: a last line without its end does not count
        self.size = sum(map(len, lines)) + self.done
        self.whole = self.size - len(lines[-1])
        if self.size:  # half a line may be another's file
            self.check_record()
            self.check_lines(lines[:-1])

    def open(self) -> None:
        """Begin to write. Raises ValueError if another process does, and OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.stream = open(self.path, "ab")
        lock(self.stream, self.path)
        if self.path.stat().st_size != self.size:
            raise ValueError(f"Another process has written to {self.path}: start again.")
        if self.size > self.whole:
            self.stream.truncate(self.whole)
        if not holds_json(self.record_path, self.record):
            write_json(self.record_path, self.record)

    def check_record(self) -> None:
        """Raises ValueError unless the answers that are there come from the same prompts and arguments."""
        if not self.record_path.exists():
            raise ValueError(f"{self.path} is there, and no {self.record_path.name}: give another --output.")
        try:
            before = read_json(self.record_path)
        except ValueError:
            raise ValueError(f"{self.record_path} is damaged: give another --output.") from None
        if before.get("prompts_sha256") != self.record["prompts_sha256"]:
            raise ValueError(f"{self.path} answers another file of prompts, {before.get('prompts')}: {REMEDY}.")
        arguments = before["arguments"] if isinstance(before.get("arguments"), dict) else {}
        for name, value in self.record["arguments"].items():
            if arguments.get(name) != value:
                was, now = (json.dumps(v, ensure_ascii=False) for v in (arguments.get(name), value))
                raise ValueError(f"{self.path} was made with {name} {was}, and this run has {now}: {REMEDY}.")

    def check_lines(self, lines: Sequence[bytes]) -> None:
        """Raises ValueError unless each line answers its prompt."""
        if len(lines) > len(self.prompts):
            raise ValueError(f"{self.path} has more answers than there are prompts: {REMEDY}.")
        for number, (line, prompt) in enumerate(zip(lines, self.prompts, strict=False), start=1):
            try:
                answer = json.loads(line)
                right = {name: answer[name] for name in prompt.fields} == prompt.fields
                right = right and all(name in answer for name in ANSWER_FIELDS)
            except (ValueError, LookupError, TypeError, RecursionError):
                right = False
            if not right:
                raise ValueError(f"{self.path} line {number} is no answer to {prompt.where}: {REMEDY}.")

    def add(self, request: Request, answer: Answer) -> None:
        """Write the next prompt's answer."""
        values = (answer.text, len(request.ids), answer.new_tokens, answer.ended)
        fields = self.prompts[self.done].fields
        content = fields | dict(zip(ANSWER_FIELDS, values, strict=True)) | {"seed": request.seed}
        with named_when_full(self.path):
            self.stream.write(to_line(content))
            self.stream.flush()
        self.done += 1

    def close(self) -> None:
        with named_when_full(self.path):
            self.stream.flush()
            os.fsync(self.stream.fileno())
            self.stream.close()


REMEDY = "give another --output, or go on with the command that began it"


def to_line(content: dict[str, Any]) -> bytes:
    try:
        return json.dumps(content, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # halves of a character, which JSON can escape and UTF-8 cannot write
        return json.dumps(content).encode() + b"\n"


def lock(stream: BinaryIO, path: Path) -> None:
    """Keep other processes from writing to the file, where the system can. Raises ValueError if one is."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"Another process is writing to {path}: wait for it, or give another --output.") from None
    except OSError:  # a file system without locks
        pass


def make_record(path: Path, prompts: Sequence[Prompt], run: Run) -> dict[str, Any]:
    """What the answers to the prompts of a file depend on."""
    arguments = {name: value for name, value in asdict(run.args).items() if name not in NO_MATTER}
    for name in ("checkpoint_dir", "base_checkpoint_dir"):
        place = getattr(run, name)
        arguments[name] = place and str(place.resolve())
    fields = json.dumps([prompt.fields for prompt in prompts])  # not the file again: a pipe is read once
    digest = hashlib.sha256(fields.encode()).hexdigest()
    return {"prompts": str(path), "prompts_sha256": digest, "arguments": arguments | {"dtype": run.dtype}}
