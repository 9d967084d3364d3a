"""Prompts: how an example is written as text, its token ids, and which of them are trained.

A prompt has the ids that generation makes of it, so the model sees in training what it will see in use. An answer has
the ids that it has behind its prompt; where a token would span both, the answer is encoded by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lit_swa.data.records import Record
from lit_swa.formats.tokenizer import Tokenizer


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


def encode_record(record: Record, style: str, tokenizer: Tokenizer, mask_prompt: bool = True) -> Encoded:
    """Tokens of an example, and which of them are trained, before anything is cut. Raises ValueError."""
    if record.text is not None:
        ids = tokenizer.encode(record.text, eos=True)
        return Encoded(ids, [True] * len(ids))
    pieces = chat_pieces(record, tokenizer) if style == "chat" else style_pieces(record, style, tokenizer)
    ids = [i for piece, _ in pieces for i in piece]
    return Encoded(ids, [answer or not mask_prompt for piece, answer in pieces for _ in piece])


def chat_pieces(record: Record, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    """The ids of prompt, answer, prompt, answer, ... An answer includes what the template writes after it, without
    trailing white space."""
    messages = record.messages
    if record.input:
        messages = [{**messages[0], "content": join_parts(messages[0]["content"], record.input)}, *messages[1:]]
    whole, cuts = tokenizer.render_chat(messages, add_generation_prompt=False), [0]
    for k, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if k == 0:
            raise ValueError("The conversation begins with an answer: begin it with a message of the user.")
        prompt = tokenizer.render_chat(messages[:k])
        until = whole if k == len(messages) - 1 else tokenizer.render_chat(messages[: k + 1], False)
        end = len(until.rstrip())
        if not whole.startswith(prompt) or not whole.startswith(until[:end]) or not cuts[-1] <= len(prompt) < end:
            raise ValueError(
                f"The chat template writes the conversation up to message {k + 1} in another way when more follows, "
                "or not as it prompts for an answer: choose another prompt_style, or give one answer per example."
            )
        cuts += [len(prompt), end]
    pieces = encode_pieces(tokenizer, whole, cuts)
    return [(piece, i % 2 == 1) for i, piece in enumerate(pieces)]


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


def style_pieces(record: Record, name: str, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    style, messages = PROMPT_STYLES[name], record.messages
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if [m["role"] for m in turns] != ["user", "assistant"] * (len(turns) // 2) or not turns:
        roles = ", ".join(m["role"] for m in messages[:8])
        raise ValueError(f"The messages are of {roles}: prompt_style={name!r} needs user and assistant alternately.")
    end = [tokenizer.token_to_id(style.end) if style.end else tokenizer.eos_id]
    bos, pieces = own_bos(tokenizer), []
    for k in range(0, len(turns), 2):
        user, answer = turns[k]["content"], style.before_answer + turns[k + 1]["content"]
        prompt = style.further(user) if k else style.opening(user, record.input, system)
        cuts = [0, len(prompt), len(prompt) + len(answer)]
        prompt_ids, answer_ids = encode_pieces(tokenizer, prompt + answer, cuts)
        if (k == 0 or style.bos_every_turn) and prompt_ids[: len(bos)] != bos:
            prompt_ids = bos + prompt_ids
        pieces += [(prompt_ids, False), (answer_ids + end, True)]
    return pieces


def own_bos(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts in front of a text: BOS, or nothing."""
    plain, own = tokenizer.encode("a", bos=False), tokenizer.encode("a")
    for k in range(len(own) - len(plain) + 1):
        if own[k : k + len(plain)] == plain:
            return own[:k]
    return []


def end_ids(style: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens that may end an answer: EOS, and what the style writes at the end of a turn."""
    if style != "chat":
        end = PROMPT_STYLES[style].end
        return [tokenizer.token_to_id(end) if end else tokenizer.eos_id]
    probe = Record([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    try:
        pieces = chat_pieces(probe, tokenizer)
    except ValueError:  # the template refuses so short a conversation
        return tokenizer.eos_ids
    last = pieces[-1][0][-1:]
    text = tokenizer.decode(last, skip_special_tokens=False)
    return sorted({*tokenizer.eos_ids, *(last if not text.strip().endswith("b") else [])})


def encode_at(where: str, record: Record, style: str, tokenizer: Tokenizer, mask_prompt: bool) -> Encoded:
    """encode_record, with an error that says where the example is."""
    try:
        return encode_record(record, style, tokenizer, mask_prompt)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
