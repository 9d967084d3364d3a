"""Prompts: how an example is written as text, its token ids, and which of them are trained.

A prompt has the ids that generation makes of it, so the model sees in training what it will see in use. An answer has
the ids that it has behind its prompt; where a token would span both, the answer is encoded by itself.

A conversation is one sequence as long as the chat template only appends to it. Qwen3's and others write an earlier turn
in another way than the last (without its thought); such a conversation becomes one sequence for each answer, behind the
prompt that generation would meet.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from lit_swa.data.records import HARMLESS, Dropped, Record, has
from lit_swa.formats.tokenizer import REASONING_KEYS, Tokenizer
from lit_swa.texts import find_frame


class PromptStyle(NamedTuple):
    """How a turn is written: its prompt, then `before_answer`, the answer, and the token that ends it.

    The model generates `before_answer`, so it is trained. `system` is "" where there is no system message.
    """

    opening: Callable[[str, str, str], str]  # (instruction, input, system) -> the first prompt
    further: Callable[[str], str]  # instruction -> the prompt of each turn after that
    before_answer: str = ""
    end: str = ""  # the token that ends an answer; "" is the tokenizer's EOS
    bos_every_turn: bool = False


ALPACA = "Below is an instruction that describes a task"
ALPACA_INPUT = ", paired with an input that provides further context"
ALPACA_ASK = ". Write a response that appropriately completes the request."
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def alpaca(instruction: str, input: str, system: str) -> str:
    head = system or ALPACA + (ALPACA_INPUT if input else "") + ALPACA_ASK
    middle = f"### Input:\n{input}\n\n" if input else ""
    return f"{head}\n\n### Instruction:\n{instruction}\n\n{middle}### Response:"


def llama2(instruction: str, input: str, system: str) -> str:
    system = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    return f"[INST] {system}{join_parts(instruction, input)} [/INST]"


def chatml(instruction: str, input: str, system: str) -> str:
    system = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{system}<|im_start|>user\n{join_parts(instruction, input)}<|im_end|>\n<|im_start|>assistant\n"


def join_parts(*parts: str, separator: str = "\n\n") -> str:
    return separator.join(part for part in parts if part)


PROMPT_STYLES: dict[str, PromptStyle | None] = {
    "chat": None,  # the model's own template
    "alpaca": PromptStyle(alpaca, lambda text: f"\n\n### Instruction:\n{text}\n\n### Response:"),
    # Each turn is a sequence of its own to Llama 2: BOS prompt answer EOS.
    "llama2": PromptStyle(llama2, lambda text: llama2(text, "", ""), before_answer=" ", bos_every_turn=True),
    "longalpaca": PromptStyle(
        lambda text, input, system: f"[INST]{join_parts(system, text, input, separator=chr(10))}[/INST]",
        lambda text: f"[INST]{text}[/INST]",
    ),
    "chatml": PromptStyle(chatml, lambda text: "\n" + chatml(text, "", ""), end="<|im_end|>"),
    "vicuna": PromptStyle(
        lambda text, input, system: f"{system or VICUNA} USER: {join_parts(text, input)} ASSISTANT:",
        lambda text: f"USER: {text} ASSISTANT:",
        before_answer=" ",
    ),
    "plain": PromptStyle(lambda text, input, system: join_parts(system, text, input), lambda text: text),
}


def pick_style(wanted: str | None, tokenizer: Tokenizer) -> str:
    """The style that is wanted, else the model's chat template, else alpaca. Raises ValueError if it does not fit."""
    name = wanted or ("chat" if tokenizer.has_chat_template else "alpaca")
    if name == "chat" and not tokenizer.has_chat_template:
        others = ", ".join(other for other in PROMPT_STYLES if other != "chat")
        raise ValueError(f"{tokenizer.checkpoint_dir} has no chat template: choose a prompt_style from {others}.")
    end = "" if name == "chat" else PROMPT_STYLES[name].end
    if end and tokenizer.token_to_id(end) is None:
        raise ValueError(f"prompt_style={name!r} does not fit: the tokenizer has no token {end}; choose alpaca, say.")
    if name != "chat" and not end and tokenizer.eos_id is None:
        raise ValueError(f"{tokenizer.checkpoint_dir} has no eos_token: name one in its tokenizer_config.json.")
    return name


# ------------------------------------------------------------------------------------------------------------- tokens
#
# The ids of a prompt are those that generation makes of it, so the model sees in use what it saw in training. The
# answer's ids are those that it has behind the prompt, where the two do not share a token; otherwise its own.


class Encoded(NamedTuple):
    ids: list[int]
    trained: list[bool]


class Piece(NamedTuple):
    """A stretch of an example: a prompt, an answer, or an answer that is read and not trained."""

    ids: list[int]
    kind: str  # "prompt", "answer", "untrained"


def encode_record(record: Record, style: str, tokenizer: Tokenizer, mask_prompt: bool = True) -> Encoded:
    """The tokens of an example that is one sequence, before anything is cut. Raises ValueError, or Dropped."""
    examples, _ = encode_examples(record, style, tokenizer, mask_prompt)
    if len(examples) != 1:
        raise ValueError(
            f"The chat template makes {len(examples)} sequences of the conversation: take encode_examples."
        )
    return examples[0]


def encode_examples(
    record: Record, style: str, tokenizer: Tokenizer, mask_prompt: bool = True
) -> tuple[list[Encoded], list[str]]:
    """(The sequences that are made of an example, with what is trained, before anything is cut; what the prompts leave
    out of it, such as "tools"). Raises ValueError, or Dropped.

    mask_prompt=False also trains the prompts; of several sequences that of the first, which the others repeat.
    """
    if record.text is not None:
        ids = tokenizer.encode(record.text, eos=True)
        return [Encoded(ids, [True] * len(ids))], []
    if style == "chat":
        sequences, left_out = chat_sequences(record, tokenizer, mask_prompt)
    else:
        sequences, left_out = [style_pieces(record, style, tokenizer)], left_out_by_style(record)
    examples = []
    for n, pieces in enumerate(sequences):
        kinds = {"answer"} if mask_prompt or n else {"answer", "prompt"}
        trained = [piece.kind in kinds for piece in pieces for _ in piece.ids]
        if any(trained):
            examples.append(Encoded([i for piece in pieces for i in piece.ids], trained))
    return examples, left_out


# ----------------------------------------------------------------------------------------------------- chat templates


class Turn(NamedTuple):
    """An answer with all that is before it, as the template writes them."""

    text: str  # without the white space behind the answer's end
    start: int  # of the answer: before it is the prompt that generation gets
    kind: str  # of the answer's Piece


def chat_sequences(record: Record, tokenizer: Tokenizer, mask_prompt: bool) -> tuple[list[list[Piece]], list[str]]:
    """The pieces of each sequence, prompt, answer, prompt, answer, ..., and what the template leaves out.

    An answer includes what the template writes after it, without trailing white space.
    """
    messages, sequences, left_out = with_input(record), [], []
    if messages[0]["role"] == "assistant":
        raise ValueError("The conversation begins with an answer: begin it with a message of the user.")
    if messages[-1]["role"] != "assistant":
        raise ValueError("The conversation does not end with an answer: leave out what follows its last one.")
    for k, message in enumerate(messages):
        if message["role"] != "assistant" or (k in record.untrained and mask_prompt):
            continue  # an answer that is not trained is a part of the next one's prompt
        turn = read_turn(messages, k, record, tokenizer)
        left_out += left_out_of_answer(messages[: k + 1], turn, record, tokenizer)
        if sequences and turn.text[: turn.start].startswith(sequences[-1][-1].text):
            sequences[-1].append(turn)
        else:
            sequences.append([turn])
    prompt = sequences[-1][-1].text[: sequences[-1][-1].start]
    left_out += left_out_by_template(messages, prompt, record.tools, tokenizer)
    return [encode_turns(turns, tokenizer) for turns in sequences], left_out


def with_input(record: Record) -> list[dict[str, Any]]:
    """The messages, the input behind the first instruction."""
    messages, n = list(record.messages), int(record.messages[0]["role"] == "system")
    if record.input:
        messages[n] = {**messages[n], "content": join_parts(messages[n]["content"], record.input)}
    return messages


def read_turn(messages: list[dict[str, Any]], k: int, record: Record, tokenizer: Tokenizer) -> Turn:
    """The answer messages[k]. Raises ValueError when it is not written as it is prompted for, Dropped when empty."""
    prompt = tokenizer.render_chat(messages[:k], tools=record.tools)
    text = turn_text(messages[: k + 1], prompt, record, tokenizer)
    if not text.startswith(prompt) or len(prompt) == len(text):
        raise ValueError(
            f"The chat template does not write message {k + 1} as it prompts for it: choose another prompt_style."
        )
    kind = "untrained" if k in record.untrained else "answer"
    content = messages[k]["content"].strip()
    if kind == "answer" and not (content and content in text[len(prompt) :]):
        nothing = [*messages[:k], {"role": "assistant", "content": ""}]
        with contextlib.suppress(ValueError):  # from a template that refuses an empty answer
            if turn_text(nothing, prompt, record, tokenizer) == text:
                raise Dropped("with an empty answer")
    return Turn(text, len(prompt), kind)


def turn_text(messages: list[dict[str, Any]], prompt: str, record: Record, tokenizer: Tokenizer) -> str:
    """A conversation up to the end of its last answer, `prompt` being the text that generation gets for it.

    Where the prompt opens a thought that the template does not write later, as DeepSeek-R1's, the answer ends it; one
    that the prompt ends itself is none of the answer's.
    """
    text = tokenizer.render_chat(messages, False, record.tools).rstrip()
    opened = re.search(r"<think>\s*(</think>\s*)?$", prompt)
    if not opened or text.startswith(prompt) or not text.startswith(prompt[: opened.start()]):
        return text
    answer = re.sub(r"^\s*<think>.*?</think>", "", text[opened.start() :], flags=re.DOTALL).lstrip("\n")
    return f"{prompt}{answer}" if opened[1] else f"{prompt}{thought_of(messages[-1])}\n</think>\n\n{answer}"


def thought_of(message: dict[str, Any]) -> str:
    """The thought of an answer, "" for none: it has a key of its own, or stands between <think> and </think>."""
    thought = next((message[key] for key in REASONING_KEYS if isinstance(message.get(key), str)), None)
    if thought is None:
        match = re.search(r"<think>(.*?)</think>", message["content"], re.DOTALL)
        thought = match[1] if match else ""
    return thought.strip()


def left_out_of_answer(messages: list[dict[str, Any]], turn: Turn, record: Record, tokenizer: Tokenizer) -> list[str]:
    """What the template does not write of the last message, an answer."""
    answer, left_out = messages[-1], []
    if thought_of(answer) not in turn.text[turn.start :]:
        left_out.append("thoughts")
    names = {"tool_calls": "calls of functions"} | {key: f"the key {key[:60]!r}" for key in other_keys([answer])}
    for key in names.keys() & answer.keys():
        plain = [*messages[:-1], without(answer, [key])]
        if turn_text(plain, turn.text[: turn.start], record, tokenizer) == turn.text:
            left_out.append(names[key])
    return left_out


def without(message: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in keys}


def left_out_by_template(
    messages: list[dict[str, Any]], prompt: str, tools: list[dict[str, Any]] | None, tokenizer: Tokenizer
) -> list[str]:
    """What the template leaves out of the tools and the messages before the last answer, of which it made `prompt`."""
    left_out, before = [], messages[: max(k for k, m in enumerate(messages) if m["role"] == "assistant")]
    if tools and tokenizer.render_chat(before) == prompt:
        left_out.append("tools")
    if keys := other_keys([message for message in before if message["role"] != "assistant"]):
        unused = tokenizer.render_chat([without(message, keys) for message in before], tools=tools) == prompt
        left_out += [f"the key {key[:60]!r}" for key in keys if unused]
    for k, message in enumerate(before):
        content = message["content"].strip()
        if message["role"] == "assistant" or not content or content in prompt:
            continue
        changed = [*before[:k], {**message, "content": f"{content} {content}"}, *before[k + 1 :]]
        if tokenizer.render_chat(changed, tools=tools) == prompt:
            left_out.append(f"{message['role']} messages")
    return left_out


def other_keys(messages: list[dict[str, Any]]) -> list[str]:
    """Keys of messages that only a template can know, in order."""
    known = {"role", "content", "tool_calls", "name", "tool_call_id", *REASONING_KEYS, *HARMLESS}
    return list(dict.fromkeys(key for m in messages for key, value in m.items() if has(value) and key not in known))


def encode_turns(turns: list[Turn], tokenizer: Tokenizer) -> list[Piece]:
    """The ids of one sequence; each turn's text begins with the one before it."""
    cuts = [0, *(cut for turn in turns for cut in (turn.start, len(turn.text)))]
    pieces = encode_pieces(tokenizer, turns[-1].text, cuts)
    kinds = [kind for turn in turns for kind in ("prompt", turn.kind)]
    return [Piece(ids, kind) for ids, kind in zip(pieces, kinds, strict=True)]


def encode_pieces(tokenizer: Tokenizer, text: str, cuts: list[int]) -> list[list[int]]:
    """The ids of text[cuts[i] : cuts[i + 1]] for each i: those that it has in the whole text, unless a token crosses a
    cut."""
    spans = list(zip(cuts, cuts[1:], strict=False))
    if len(spans) > 2:  # encode each part once, which saves time if it gives the ids of the whole
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


# ------------------------------------------------------------------------------------------------------- named styles


def style_pieces(record: Record, name: str, tokenizer: Tokenizer) -> list[Piece]:
    style, messages = PROMPT_STYLES[name], record.messages
    first = int(messages[0]["role"] == "system")
    system, turns = messages[0]["content"] if first else "", messages[first:]
    if [m["role"] for m in turns] != ["user", "assistant"] * (len(turns) // 2) or not turns:
        roles = ", ".join(m["role"] for m in messages[:8])
        raise ValueError(f"The messages are of {roles}: prompt_style={name!r} needs user and assistant alternately.")
    end = [tokenizer.token_to_id(style.end) if style.end else tokenizer.eos_id]
    (bos, _), pieces = find_frame(tokenizer) or ([], []), []
    for k in range(0, len(turns), 2):
        user, answer = turns[k]["content"], style.before_answer + turns[k + 1]["content"]
        kind = "untrained" if first + k + 1 in record.untrained else "answer"
        if kind == "answer" and not turns[k + 1]["content"].strip():
            raise Dropped("with an empty answer")
        prompt = style.further(user) if k else style.opening(user, record.input, system)
        cuts = [0, len(prompt), len(prompt) + len(answer)]
        prompt_ids, answer_ids = encode_pieces(tokenizer, prompt + answer, cuts)
        if (k == 0 or style.bos_every_turn) and prompt_ids[: len(bos)] != bos:
            prompt_ids = bos + prompt_ids
        pieces += [Piece(prompt_ids, "prompt"), Piece(answer_ids + end, kind)]
    return pieces


def left_out_by_style(record: Record) -> list[str]:
    """What no named style writes."""
    reasons = ["tools"] if record.tools else []
    for message in record.messages:
        reasons += ["calls of functions"] if message.get("tool_calls") else []
        reasons += ["thoughts"] if any(message.get(key) for key in REASONING_KEYS) else []
    return reasons + [f"the key {key[:60]!r}" for key in other_keys(record.messages)]


def end_ids(style: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens that may end an answer: EOS, and what the style writes at the end of a turn."""
    if style != "chat":
        end = PROMPT_STYLES[style].end
        return [tokenizer.token_to_id(end) if end else tokenizer.eos_id]
    probe = Record([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    try:
        pieces = chat_sequences(probe, tokenizer, True)[0][-1]
    except (ValueError, Dropped):  # the template refuses so short a conversation
        return tokenizer.eos_ids
    last = pieces[-1].ids[-1:]
    text = tokenizer.decode(last, skip_special_tokens=False)
    return sorted({*tokenizer.eos_ids, *(last if not text.strip().endswith("b") else [])})


def encode_at(
    where: str, record: Record, style: str, tokenizer: Tokenizer, mask_prompt: bool
) -> tuple[list[Encoded], list[str]]:
    """encode_examples, with an error that says where the example is."""
    try:
        return encode_examples(record, style, tokenizer, mask_prompt)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
