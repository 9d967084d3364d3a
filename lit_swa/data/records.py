"""Records: what the keys of an example mean, and the conversation or text that it holds."""

from __future__ import annotations

from typing import Any, NamedTuple


class Fields(NamedTuple):
    """Which key of an example holds what. Keys of the other kinds (instruction, conversation, text) are empty."""

    instruction: str = ""
    input: str = ""  # may be missing in an example
    output: str = ""
    messages: str = ""
    text: str = ""

    def required(self) -> list[str]:
        return [key for key in (self.instruction, self.output, self.messages, self.text) if key]


# The first row whose keys are all in an example says what they mean. Alpaca's files have a "text" too: it comes last.
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


class Record(NamedTuple):
    """One example: a conversation, or a text."""

    messages: list[dict[str, Any]]
    input: str = ""  # the text that an instruction is about
    text: str | None = None


class Dropped(Exception):
    """An example is left out. Its message is the reason, such as "without a prompt"."""


def to_record(content: dict[str, Any], where: str, fields: Fields | None = None) -> Record:
    """The example that an object of a file holds. Raises Dropped, or ValueError that begins with `where`."""
    rows = FIELDS if fields is None else (fields,)
    row = next((row for row in rows if set(row.required()) <= set(content)), None)
    if row is None:
        there = ", ".join(map(str, list(content)[:12])) or "none"
        needed = "instruction and output, prompt and completion, messages, or text"
        needed = needed if fields is None else " and ".join(fields.required())
        raise ValueError(f"{where} has the keys {there}: it needs {needed}.")
    if row.messages:
        return Record(to_messages(content[row.messages], f"{where}, {row.messages}"))
    values = {key: text_of(content.get(key), f"{where}, {key}") for key in (*row.required(), row.input) if key}
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


def text_of(value: Any, where: str) -> str:
    if not isinstance(value, str | None):
        raise ValueError(f"{where} is a {type(value).__name__}: it must be a text.")
    return value or ""


def to_messages(turns: Any, where: str) -> list[dict[str, Any]]:
    """Messages with role and content, however the conversation is written. What follows its last answer is cut."""
    if not isinstance(turns, list):
        raise ValueError(f"{where} is a {type(turns).__name__}: it must be a list of messages.")
    messages = [to_message(turn, n, f"{where}, message {n + 1}") for n, turn in enumerate(turns)]
    while messages and messages[-1]["role"] != "assistant":  # nothing after the last answer is trained
        messages.pop()
    if not messages:
        raise Dropped("without an answer")
    if any(m["role"] == "assistant" and not m["content"].strip() and not m.get("tool_calls") for m in messages):
        raise Dropped("with an empty answer")
    return messages


def to_message(turn: Any, n: int, where: str) -> dict[str, Any]:
    """A turn of a conversation, the first of which is n = 0, as a message with role and content."""
    if isinstance(turn, str):  # LIMA: user and assistant take turns
        turn = {"role": ("user", "assistant")[n % 2], "content": turn}
    if not isinstance(turn, dict) or not ({"role", "content"} <= set(turn) or {"from", "value"} <= set(turn)):
        raise ValueError(f"{where} needs role and content (or from and value).")
    role, content = (turn[k] for k in (("role", "content") if "role" in turn else ("from", "value")))
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{where} has the role {role!r}: it must be one of {', '.join(ROLES)}.")
    others = {key: value for key, value in turn.items() if key not in ("role", "content", "from", "value")}
    return {"role": ROLES[role], "content": text_of(content, where), **others}
