"""Records: what the keys of an example mean, and the conversation or text that it holds.

The keys are those of Alpaca's, ShareGPT's and OpenAI's files, as LLaMA-Factory, axolotl and mistral-finetune read them.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from lit_swa.formats.tokenizer import REASONING_KEYS


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
    Fields("question", "context", "response"),
    Fields("inputs", "", "targets"),
    Fields("input", "", "output"),
    Fields(text="text"),
)

# What an example may have beside the keys of its row, to be used; and what may be there without meaning anything.
SYSTEM_KEYS, HISTORY_KEY, TOOL_KEYS = ("system", "system_prompt"), "history", ("tools", "functions")
HARMLESS = {
    "id", "idx", "index", "uuid", "conversation_id", "prompt_id", "source", "data_source", "dataset", "origin", "split",
    "category", "topic", "task", "task_type", "tags", "type", "lang", "language", "url", "license", "model", "author",
    "generator", "date", "timestamp", "created", "meta", "metadata", "score", "quality", "difficulty", "length",
    "num_turns", "num_tokens", "text", "parallel_tool_calls",
}  # fmt: skip
TRAIN_KEYS = ("weight", "train", "training", "loss")  # of an answer: 0 or false is read and not trained
DETAIL_KEYS = ("train_detail", "training_detail")  # axolotl's, for parts of an answer

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool", "ipython": "tool",
    "function_call": "assistant", "tool_call": "assistant",  # its text is the call, as JSON
}  # fmt: skip
CALL_ROLES = ("function_call", "tool_call")


class Record(NamedTuple):
    """One example: a conversation, or a text."""

    messages: list[dict[str, Any]]
    input: str = ""  # the text that the first instruction is about
    text: str | None = None
    tools: list[dict[str, Any]] | None = None  # functions that the model may call, as JSON schemas
    untrained: frozenset[int] = frozenset()  # which messages are answers that are read and not trained
    unread: tuple[str, ...] = ()  # keys that may mean something and are not used


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
    if row.text:
        text = text_of(content[row.text], f"{where}, {row.text}")
        if not text.strip():
            raise Dropped("without a text")
        others = [*SYSTEM_KEYS, HISTORY_KEY, *TOOL_KEYS, *TRAIN_KEYS]  # which a document has not
        return Record([], text=text, unread=tuple(key for key in others if has(content.get(key))))
    turns, input = to_turns(content, row, where) if row.messages else instruction_turns(content, row, where)
    messages, untrained = to_messages([*system_turn(content, turns, where), *turns])
    return Record(messages, input, None, to_tools(content, where), untrained, unread_keys(content, row))


def text_of(value: Any, where: str) -> str:
    """A text; also of OpenAI's list of parts, each of them {"type": "text", "text": ...}."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        return "".join(text_of(part.get("text"), where) for part in value)
    if isinstance(value, list):
        kinds = (str(part.get("type", "list"))[:40] for part in value if isinstance(part, dict))
        kind = next((kind for kind in kinds if kind != "text"), "list")
        raise ValueError(f"{where} is a {kind}: it must be a text.")
    if not isinstance(value, str | None):
        raise ValueError(f"{where} is a {type(value).__name__}: it must be a text.")
    return value or ""


def list_of(value: Any, where: str, of: str) -> list[Any]:
    """A list, which a cell of a table holds as JSON; an empty one for nothing."""
    value = (from_json(value) if isinstance(value, str) and value.strip() else value) or []
    if not isinstance(value, list):
        raise ValueError(f"{where} is a {type(value).__name__}: it must be a list of {of}.")
    return value


def unread_keys(content: dict[str, Any], row: Fields) -> tuple[str, ...]:
    used = {*row, *SYSTEM_KEYS, *TOOL_KEYS, *(() if row.messages else (HISTORY_KEY,))}
    return tuple(key for key in content if key not in used | HARMLESS and has(content[key]))


def has(value: Any) -> bool:
    """Whether a key's value may mean something: 0 and false may, as of a loss_mask."""
    return value not in (None, "", [], {})


# ------------------------------------------------------------------------------------------------------------ the turns


def to_turns(content: dict[str, Any], row: Fields, where: str) -> tuple[list[dict[str, Any]], str]:
    """The turns of a conversation, as messages, and no input."""
    where = f"{where}, {row.messages}"
    turns = list_of(content[row.messages], where, "messages")
    return [to_message(turn, n, f"{where}, message {n + 1}") for n, turn in enumerate(turns)], ""


def instruction_turns(content: dict[str, Any], row: Fields, where: str) -> tuple[list[dict[str, Any]], str]:
    """The turns before, the instruction and its answer, as messages; and the input, where it is the first turn's."""
    values = {key: text_of(content.get(key), f"{where}, {key}") for key in (*row.required(), row.input) if key}
    instruction, input = values[row.instruction], values.get(row.input, "")
    if not (instruction + input).strip():
        raise Dropped("without a prompt")
    earlier = history_turns(content.get(HISTORY_KEY), f"{where}, {HISTORY_KEY}")
    input = input if input.strip() else ""
    if earlier and input:
        instruction, input = (f"{instruction}\n\n{input}" if instruction else input), ""
    answer = {"role": "assistant", "content": values[row.output]}
    return [*earlier, {"role": "user", "content": instruction}, answer], input


def history_turns(history: Any, where: str) -> list[dict[str, Any]]:
    """LLaMA-Factory's earlier turns, [[question, answer], ...], as messages."""
    messages = []
    for pair in list_of(history, where, "pairs of a question and its answer"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{where} must be a list of pairs of a question and its answer.")
        roles = ("user", "assistant")
        messages += [{"role": r, "content": text_of(text, where)} for r, text in zip(roles, pair, strict=True)]
    return messages


def system_turn(content: dict[str, Any], turns: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The system message that stands beside the turns, unless they begin with it."""
    texts = [text_of(content.get(key), f"{where}, {key}") for key in SYSTEM_KEYS]
    text = next((text for text in texts if text.strip()), "")
    there = turns[0]["content"] if turns and turns[0]["role"] == "system" else None
    if text and there not in (None, text):
        raise ValueError(f"{where} has a system message in the conversation and another one beside it: leave one.")
    return [{"role": "system", "content": text}] if text and there is None else []


def to_messages(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], frozenset[int]]:
    """The messages up to the last answer that is trained, and which of their answers are not."""
    trained = [is_trained(message) for message in messages]
    while trained and not trained[-1]:
        trained.pop()
    if not trained:
        answers = any(message["role"] == "assistant" for message in messages)
        raise Dropped("without an answer that is trained" if answers else "without an answer")
    kept = messages[: len(trained)]
    if any(t and not any(m.get(k) for k in ("tool_calls", *REASONING_KEYS)) and not m["content"].strip()
           for m, t in zip(kept, trained, strict=True)):  # fmt: skip
        raise Dropped("with an empty answer")
    untrained = frozenset(n for n, m in enumerate(kept) if m["role"] == "assistant" and not trained[n])
    return [{key: value for key, value in m.items() if key not in TRAIN_KEYS} for m in kept], untrained


def is_trained(message: dict[str, Any]) -> bool:
    """Whether a message is an answer, and its weight, or another of TRAIN_KEYS, lets it be trained."""
    return message["role"] == "assistant" and all(message.get(key) in (None, 1) for key in TRAIN_KEYS)


def check_training_keys(answer: dict[str, Any], where: str) -> None:
    """Raises ValueError for an answer that is to be trained in part."""
    if detail := next((key for key in DETAIL_KEYS if answer.get(key)), None):
        raise ValueError(f"{where} has {detail}, and an answer is trained whole or not at all: leave the key out.")
    for key in TRAIN_KEYS:
        if answer.get(key) not in (None, 0, 1):
            raise ValueError(f"{where} has {key}={str(answer[key])[:40]}: it must be 0 or 1.")


def to_message(turn: Any, n: int, where: str) -> dict[str, Any]:
    """A turn of a conversation, the first of which is n = 0, as a message with role and content."""
    if isinstance(turn, str):  # LIMA: user and assistant take turns
        turn = {"role": ("user", "assistant")[n % 2], "content": turn}
    if not isinstance(turn, dict) or not ({"role"} <= set(turn) or {"from", "value"} <= set(turn)):
        raise ValueError(f"{where} needs role and content (or from and value).")
    role, content = (turn.get(k) for k in (("role", "content") if "role" in turn else ("from", "value")))
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{where} has the role {role!r}: it must be one of {', '.join(ROLES)}.")
    if ROLES[role] == "assistant":
        check_training_keys(turn, where)
    calls = to_calls(turn, role, content, where)
    if "content" not in turn and "value" not in turn and not calls:
        raise ValueError(f"{where} needs role and content (or from and value).")
    own = ("role", "content", "from", "value", "tool_calls", "function_call")
    message = {"role": ROLES[role], "content": "" if role in CALL_ROLES else text_of(content, where)}
    others = {key: value for key, value in turn.items() if key not in own}
    return message | others | ({"tool_calls": calls} if calls else {})


# ------------------------------------------------------------------------------------------------- functions and calls


def to_calls(turn: dict[str, Any], role: str, content: Any, where: str) -> list[dict[str, Any]]:
    """The calls of an answer in the form that templates read: {"type": "function", "function": {name, arguments}}.

    They are in tool_calls, in OpenAI's older function_call, or the content of a turn whose role says so.
    """
    calls = list_of(turn.get("tool_calls"), f"{where}, tool_calls", "calls")
    if turn.get("function_call"):
        calls = [*calls, turn["function_call"]]
    if role in CALL_ROLES:
        given = from_json(content)
        calls = [*calls, *(given if isinstance(given, list) else [given])]
    result = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where} has a call without a function's name: give name and arguments.")
        function = function | {"arguments": from_json(function.get("arguments") or {})}  # OpenAI's are JSON in a text
        result.append((call if "function" in call else {"type": "function"}) | {"function": function})
    return result


def from_json(value: Any) -> Any:
    """What a text holds as JSON, or the text itself."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def to_tools(content: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    """The functions beside a conversation, each as {"type": "function", "function": schema}."""
    tools = []
    for key in TOOL_KEYS:
        for tool in list_of(content.get(key), f"{where}, {key}", "functions"):
            if not isinstance(tool, dict):
                raise ValueError(
                    f"{where}, {key} holds a {type(tool).__name__}: it must hold JSON schemas of functions."
                )
            tool = {name: value for name, value in tool.items() if value is not None}
            bare = "function" not in tool and isinstance(tool.get("name"), str)
            tools.append({"type": "function", "function": tool} if bare else tool)
    return tools or None
