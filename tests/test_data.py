"""Training data: what is trained is what generation needs, nothing is lost in silence, bad files name their line."""

import csv
import hashlib
import io
import json
import os
import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from test_chat_template import LLAMA_3, MISTRAL, QWEN

from lit_swa.data import (
    IGNORED,
    PRESETS,
    PROMPT_STYLES,
    Record,
    check_dataset,
    encode_record,
    load_dataset,
    pack,
    save_dataset,
    show_examples,
    split_dataset,
    write_token_file,
)
from lit_swa.evaluate import read_tokens
from lit_swa.formats.files import atomic_file
from lit_swa.tokenizer import Tokenizer

ROWS = [
    {"instruction": "Convert 45 kilometers to meters.", "input": "", "output": "45 kilometers is 45000 meters."},
    {"instruction": "Translate into French.", "input": "Where is it?", "output": "Où est-ce ?"},
    {"instruction": "Edit the grammar, please.", "input": "He go, home", "output": 'He "goes"\nhome.'},
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who jumps?"},
    {"role": "assistant", "content": "the quick brown fox"},
    {"role": "user", "content": "Over whom?"},
    {"role": "assistant", "content": "\n the lazy dog"},
]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
# The same text as conftest's template, with the answers marked as transformers wants them.
MARKED_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint) -> Tokenizer:
    return Tokenizer(tiny_checkpoint)


def write(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def load(path, tokenizer, **arguments):
    return load_dataset(path, tokenizer, **{"max_seq_length": 1024, **arguments})


def answer_ids(example) -> list[int]:
    return example.ids[example.labels != IGNORED].tolist()


def copy_checkpoint(source: Path, target: Path, **config) -> Tokenizer:
    """The tiny tokenizer with other entries in tokenizer_config.json (None removes one)."""
    target.mkdir()
    (target / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    content = {**json.loads((source / "tokenizer_config.json").read_text()), **config}
    write(target / "tokenizer_config.json", {k: v for k, v in content.items() if v is not None})
    return Tokenizer(target)


# ---------------------------------------------------------------------------------------------- what is trained


def test_chat_masks_are_those_of_transformers(tiny_checkpoint, tokenizer, tmp_path):
    """Catches: a header that is trained, an end of turn that is not, a turn that is shifted by a token."""
    from transformers import PreTrainedTokenizerFast

    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    hf = PreTrainedTokenizerFast(tokenizer_file=str(tiny_checkpoint / "tokenizer.json"), **names)
    plain = [{**m, "content": m["content"].strip()} for m in CHAT]  # see the next test for white space at a border
    conversations = [plain, plain[1:3], plain[1:], plain[:3]]
    data = load(write(tmp_path / "a.json", [{"messages": c} for c in conversations]), tokenizer)
    for example, messages in zip(data, conversations, strict=True):
        theirs = hf.apply_chat_template(
            messages, chat_template=MARKED_TEMPLATE, return_assistant_tokens_mask=True, return_dict=True
        )
        n = len(example.ids)  # ours ends with the last trained token
        assert example.ids.tolist() == theirs["input_ids"][:n] and example.ids.dtype == np.int32
        assert (example.labels != IGNORED).tolist() == [bool(x) for x in theirs["assistant_masks"][:n]]
        assert not any(theirs["assistant_masks"][n:])
    assert data.info["kind"] == "instruction"


def test_every_chat_prompt_is_what_generation_feeds(tokenizer):
    """Catches: an answer's first line end that melts into the header's, so that the prompt of training never comes."""
    ids, trained = encode_record(Record(CHAT), "chat", tokenizer)
    starts = [i for i in range(1, len(ids)) if trained[i] and not trained[i - 1]]
    assert len(starts) == 2
    for start, k in zip(starts, (2, 4), strict=True):
        assert ids[:start] == tokenizer.apply_chat_template(CHAT[:k])
    assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.render_chat(CHAT, False).rstrip()


@pytest.mark.parametrize("style", [name for name in PROMPT_STYLES if name != "chat"])
def test_named_prompts_are_what_generation_feeds_and_answers_end(style, tokenizer):
    """Catches: a prompt tokenised together with its answer, a missing or doubled EOS, a turn without its end."""
    rows = [CHAT[0], CHAT[1], CHAT[2], CHAT[3], {"role": "assistant", "content": "the lazy dog"}]
    ids, trained = encode_record(Record(rows), style, tokenizer)
    form = PROMPT_STYLES[style]
    prompt = tokenizer.encode(form.opening("Who jumps?", "", "Be brief."))
    assert ids[: len(prompt)] == prompt and not any(trained[: len(prompt)]) and trained[len(prompt)]
    stretches = "".join("x" if t else " " for t in trained).split()
    assert len(stretches) == 2 and trained[-1]
    end = tokenizer.token_to_id(form.end or "<|im_end|>")
    trained_ids = [i for i, t in zip(ids, trained, strict=True) if t]
    assert trained_ids.count(end) == 2 and ids[-1] == end
    text = tokenizer.decode(trained_ids, skip_special_tokens=False)
    assert text == "".join(f"{form.before_answer}{a}<|im_end|>" for a in ("the quick brown fox", "the lazy dog"))


def test_bos_comes_as_the_tokenizer_adds_it_and_once(tiny_checkpoint, tmp_path):
    """Catches: no BOS for a model that has one, two where the template writes it, none at Llama 2's second turn."""
    from tokenizers import Tokenizer as Rust
    from tokenizers.processors import TemplateProcessing

    own = copy_checkpoint(tiny_checkpoint, tmp_path / "t", bos_token="<|endoftext|>")
    rust = Rust.from_file(str(tmp_path / "t/tokenizer.json"))
    rust.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    rust.save(str(tmp_path / "t/tokenizer.json"))
    own = Tokenizer(tmp_path / "t")
    assert own.encode("a")[0] == 0
    counts = {s: encode_record(Record(CHAT[1:]), s, own).ids.count(0) for s in ("alpaca", "llama2", "chatml", "chat")}
    assert counts == {"alpaca": 1, "llama2": 2, "chatml": 1, "chat": 0}
    prompt = PROMPT_STYLES["alpaca"].opening("Hi", "", "")
    record = Record([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}])
    assert encode_record(record, "alpaca", own).ids[: len(own.encode(prompt))] == own.encode(prompt)
    typed = Record([{"role": "user", "content": "<|endoftext|>Hi"}, {"role": "assistant", "content": "Ho"}])
    assert encode_record(typed, "plain", own).ids.count(0) == 1
    assert encode_record(Record([], text="Hi"), "chat", own).ids == [0, *own.encode("Hi", bos=False), own.eos_id]


def test_prompts_are_the_published_ones():
    """Catches: a word or a line end of a prompt that differs from the one that published models were trained on."""
    assert PROMPT_STYLES["alpaca"].opening("Do it.", "", "") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nDo it.\n\n### Response:"
    )
    assert PROMPT_STYLES["alpaca"].opening("Do it.", "This.", "") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nDo it.\n\n### Input:\nThis.\n\n"
        "### Response:"
    )
    assert PROMPT_STYLES["longalpaca"].opening("Do it.", "", "") == "[INST]Do it.[/INST]"
    assert PROMPT_STYLES["llama2"].opening("Hi", "", "Be kind.") == "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST]"
    assert PROMPT_STYLES["llama2"].opening("Hi", "", "") == "[INST] Hi [/INST]"


def test_an_answer_is_tokenised_as_it_stands_behind_its_prompt(tmp_path):
    """Catches: the space that SentencePiece puts in front of a text of its own, in the middle of a sequence."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentences = ["the quick brown fox jumps over the lazy dog", "### Response: yes", "[INST] hello [/INST] world"] * 20
    options = {"vocab_size": 60, "hard_vocab_limit": False, "byte_fallback": False, "character_coverage": 1.0}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, minloglevel=2, **options
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = Tokenizer(tmp_path)
    record = Record([{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the fox"}])
    for style in ("longalpaca", "llama2", "alpaca"):
        form = PROMPT_STYLES[style]
        prompt = form.opening("hello", "", "")
        ids, trained = encode_record(record, style, tokenizer)
        assert ids[: trained.index(True)] == tokenizer.encode(prompt)
        assert ids == tokenizer.encode(prompt + form.before_answer + "the fox", eos=True), style


def test_a_token_never_crosses_from_the_prompt_into_the_answer(tiny_checkpoint, tokenizer, tmp_path):
    """Catches: a prompt that ends in another token than generation feeds, or a first word that is lost with it."""
    assert tokenizer.encode("the quick")[:-1] != tokenizer.encode("the qui")[:-1] + tokenizer.encode("ck")
    template = "{% for m in messages %}{{ m['content'] }}{{ '<|im_end|>' if m['role'] == 'assistant' }}{% endfor %}"
    own = copy_checkpoint(tiny_checkpoint, tmp_path / "t", chat_template=template)
    turn = [{"role": "user", "content": "the qui"}, {"role": "assistant", "content": "ck brown"}]
    for style, messages in (("plain", turn), ("chat", turn), ("chat", turn + turn)):
        ids, trained = encode_record(Record(messages), style, own)
        assert ids[: trained.index(True)] == own.encode("the qui")
        assert own.decode(ids, skip_special_tokens=False) == "the quick brown<|im_end|>" * (len(messages) // 2)
        answers = [i for i, t in zip(ids, trained, strict=True) if t]
        assert own.decode(answers, skip_special_tokens=False) == "ck brown<|im_end|>" * (len(messages) // 2)


def test_mask_prompt_false_trains_all_but_the_first_token(tokenizer, tmp_path):
    """Catches: a flag without effect, a label for the token that nothing predicts."""
    path = write(tmp_path / "a.json", ROWS)
    for masked, full in zip(load(path, tokenizer), load(path, tokenizer, mask_prompt=False), strict=True):
        assert full.ids.tolist() == masked.ids.tolist() and full.labels[1:].tolist() == full.ids[1:].tolist()
        assert full.labels[0] == masked.labels[0] == IGNORED
        assert 0 < (masked.labels != IGNORED).sum() < len(masked.ids) - 1


# ---------------------------------------------------------------------------------------------- truncation


def test_truncation_never_leaves_an_example_without_labels(tokenizer, tmp_path):
    """Catches: a NaN loss from a prompt that fills the context, an off-by-one at its border, an EOS put at the cut."""
    path = write(tmp_path / "a.json", ROWS[:1])
    whole = load(path, tokenizer, prompt_style="alpaca")[0]
    first = int(np.flatnonzero(whole.labels != IGNORED)[0])
    with pytest.raises(ValueError, match=r"None of the 1 examples .* is left \(1 with nothing to train within"):
        load(path, tokenizer, prompt_style="alpaca", max_seq_length=first)
    one = load(path, tokenizer, prompt_style="alpaca", max_seq_length=first + 1)
    assert one.trained.tolist() == [1] and answer_ids(one[0]) == [whole.ids[first]] and one.info["truncated"] == 1
    cut = load(path, tokenizer, prompt_style="alpaca", max_seq_length=len(whole.ids) - 1)
    assert answer_ids(cut[0]) == answer_ids(whole)[:-1]  # no EOS where the answer does not end
    exact = load(path, tokenizer, prompt_style="alpaca", max_seq_length=len(whole.ids))
    assert exact.info["truncated"] == 0 and answer_ids(exact[0]) == answer_ids(whole)


def test_what_is_dropped_is_counted_with_its_reason(tokenizer, tmp_path):
    """Catches: examples that vanish in silence, empty answers that teach the model to say nothing."""
    rows = [
        *ROWS,
        {"instruction": "a", "output": " \n"},
        {"instruction": "a", "output": None},
        {"instruction": "", "input": "", "output": "b"},
        {"instruction": "word " * 500, "output": "b"},
        {"messages": [{"role": "user", "content": "anyone?"}]},
        {"text": ""},
    ]
    data = load(write(tmp_path / "a.json", rows), tokenizer, max_seq_length=200)
    assert len(data) == 3 == len(data.lengths) and (data.trained > 0).all()
    for part in (
        "3 examples", "6 dropped", "2 with an empty answer", "1 without a prompt", "1 without an answer",
        "1 without a text", "1 with nothing to train within 200 tokens", f"{data.trained.sum()} of them trained",
    ):  # fmt: skip
        assert part in data.report
    assert data.trained.tolist() == [(e.labels != IGNORED).sum() for e in data]
    assert data.lengths.tolist() == [len(e.ids) for e in data]
    with pytest.raises(IndexError):
        data[3]


def test_limit_reads_no_further(tokenizer, tmp_path):
    """Catches: a quick try that reads, and stumbles over, the whole file."""
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n{broken")
    assert len(load(path, tokenizer, limit=3)) == 3
    with pytest.raises(ValueError, match="line 4 is no JSON"):
        load(path, tokenizer)


# ---------------------------------------------------------------------------------------------- files and fields


def test_the_same_examples_come_from_every_kind_of_file(tokenizer, tmp_path):
    """Catches: a comma, quote or line end lost in CSV, a byte order mark in a key, a list under another key."""
    files = [
        write(tmp_path / "a.json", ROWS),
        write(tmp_path / "b.json", {"version": 1, "data": ROWS}),
        write(tmp_path / "c.jsonl", "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
        write(tmp_path / "d.json", "\n".join(map(json.dumps, ROWS))),  # JSON Lines under the other name
        tmp_path / "e.csv",
    ]
    with open(files[-1], "w", newline="", encoding="utf-8-sig") as stream:
        rows = csv.DictWriter(stream, list(ROWS[0]))
        rows.writeheader()
        rows.writerows(ROWS)
    prints = {load(path, tokenizer).fingerprint for path in files}
    assert len(prints) == 1
    assert load(write(tmp_path / "f.json", ROWS[::-1]), tokenizer).fingerprint not in prints
    assert load(files[0], tokenizer, mask_prompt=False).fingerprint not in prints


def test_a_cell_of_csv_may_be_long_and_the_limit_is_put_back(tokenizer, tmp_path):
    """Catches: csv's limit of 128 kB, and a global setting left changed."""
    csv.field_size_limit(131072)
    path = write(tmp_path / "a.csv", f'instruction,output\n"{"x" * 200_000}",y\nb,c\n')
    assert len(load(path, tokenizer)) == 1 and csv.field_size_limit() == 131072


def test_field_names_are_known_without_a_preset(tokenizer, tmp_path):
    """Catches: a dataset of another tradition that needs to be rewritten first, roles taken for each other."""
    shapes = [
        {"instruction": "Who?", "input": "", "output": "Me."},
        {"instruction": "Who?", "context": "", "response": "Me.", "category": "qa"},
        {"prompt": "Who?", "completion": "Me."},
        {"question": "Who?", "answer": "Me."},
        {"inputs": "Who?", "targets": "Me."},
        {"input": "Who?", "output": "Me.", "source": "x"},
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]},
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Me."}]},
        {"conversations": ["Who?", "Me."]},
        {"messages": [*CHAT[1:1], {"role": "user", "content": "Who?"}, {"role": "model", "content": "Me."}]},
    ]
    data = load(write(tmp_path / "a.json", shapes), tokenizer)
    assert len(data) == len(shapes) and len({tuple(e.ids) + tuple(e.labels) for e in data}) == 1
    texts = load(write(tmp_path / "b.jsonl", '{"text": "the fox"}\n"the dog"'), tokenizer)
    assert [answer_ids(e) for e in texts] == [tokenizer.encode(t, eos=True)[1:] for t in ("the fox", "the dog")]
    assert texts.info["kind"] == "text"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", json.dumps(ROWS[0]) + "\n\n{'instruction': 1}\n", "line 3 is no JSON"),
        ("a.jsonl", json.dumps(ROWS[0]) + '\n{"instruction": "x", "answer": "y"}', "line 2 has the keys instruction, "),
        ("a.jsonl", "[" * 100_000, "line 1 is no JSON"),
        ("a.jsonl", "17", "line 1 is a int"),
        ("a.jsonl", '{"instruction": "x", "output": 5}', "line 1, output is a int"),
        ("a.jsonl", '{"instruction": "x", "output": "\\ud800"}', "line 1: "),
        ("a.json", [ROWS[0], {"instruction": "x"}], "element 2 has the keys instruction: it needs"),
        ("a.json", '[\n{"instruction": "x",\n "output" "y"}]', "line 3 is no JSON"),
        ("a.json", {"a": [1], "b": [2]}, "the lists ['a', 'b']"),
        ("a.json", "5", "holds a int"),
        ("a.json", "[]", "holds no examples"),
        ("a.json", "", "holds no examples"),
        ("a.csv", "", "holds no examples"),
        ("a.csv", "instruction,output\na,b\na,b,c\n", "line 3 has 3 cells"),
        ("a.csv", 'instruction,output\n"a\nb",c\nx,"y\n', "line 4 is no CSV"),
        ("a.csv", "question,output\na,b\n", "line 2 has the keys question, output"),
        ("a.csv", "output,output\na,b\n", "twice"),
        ("a.json", [{"messages": "hi"}], "element 1, messages is a str"),
        ("a.json", [{"messages": [{"role": "user"}]}], "message 1 needs role and content"),
        ("a.json", [{"messages": [{"role": "king", "content": "x"}]}], "the role 'king'"),
        ("a.json", [{"messages": CHAT[2:3]}], "element 1: The conversation begins with an answer"),
        ("a.tsv", "a", "of no kind that is read"),
        ("a.txt", "one short text", "lower max_seq_length"),
    ],
)
def test_bad_files_name_the_place_in_one_sentence(name, content, message, tokenizer, tmp_path):
    """Catches: a KeyError or JSONDecodeError without file and line, for a file of a million lines."""
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError) as error:
        load(path, tokenizer)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_utf8_names_its_line(tokenizer, tmp_path):
    """Catches: a UnicodeDecodeError that names a byte of a buffer, or mojibake that is trained."""
    for name in ("a.jsonl", "a.csv", "a.json"):
        (tmp_path / name).write_bytes(b'"instruction"\n"na\xefve"\n')
        with pytest.raises(ValueError, match="line 2 is no UTF-8 text"):
            load(tmp_path / name, tokenizer)


def test_unknown_names_list_the_known_ones(tokenizer, tmp_path):
    """Catches: a KeyError for a typing error in a name."""
    path = write(tmp_path / "a.json", ROWS)
    with pytest.raises(ValueError, match="choose from chat, alpaca, llama2"):
        load(path, tokenizer, prompt_style="alpacca")
    with pytest.raises(ValueError, match="choose from alpaca, alpaca-gpt4, dolly"):
        load(path, tokenizer, preset="doly")
    with pytest.raises(FileNotFoundError, match="no file alpacca.*one of alpaca, "):
        load("alpacca", tokenizer)
    with pytest.raises(ValueError, match="max_seq_length=1"):
        load(path, tokenizer, max_seq_length=1)
    with pytest.raises(ValueError, match="plain text: leave prompt_style"):
        load(write(tmp_path / "a.txt", "x"), tokenizer, prompt_style="alpaca")


SYSTEM = {
    "instruction": "And now?",
    "input": "",
    "output": "aye",
    "system": "pirate",
    "history": [["earlier", "before"]],
}
TOOLS = [WEATHER["function"]]
SAID = [["user", "a"], ["assistant", "b"]]


@pytest.mark.parametrize(
    "record, expected",
    [
        (SYSTEM, [["system", "pirate"], ["user", "earlier"], ["assistant", "before"],
                  ["user", "And now?"], ["assistant", "aye"]]),
        ({**SYSTEM, "system": "", "history": '[["x", "y"]]', "input": "this"},  # as cells of a table
         [["user", "x"], ["assistant", "y"], ["user", "And now?\n\nthis"], ["assistant", "aye"]]),
        ({**SYSTEM, "history": None, "input": "this"},
         [["system", "pirate"], ["user", "And now?\n\nthis"], ["assistant", "aye"]]),
        ({"system_prompt": "s", "question": "a", "response": "b"}, [["system", "s"], *SAID]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
         [["system", "s"], *SAID]),
        ({"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'}, SAID),
        ({"messages": [{"role": "developer", "content": [{"type": "text", "text": "d"}, {"type": "text", "text": "e"}]},
                       {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "system": "de"},
         [["system", "de"], *SAID]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "observation", "value": "o"},
                            {"from": "gpt", "value": "b"}]}, [SAID[0], ["tool", "o"], SAID[1]]),
    ],
)  # fmt: skip
def test_what_stands_beside_a_turn_reaches_the_prompt(record, expected, tokenizer, tmp_path):
    """Catches: a system message, earlier turns or parts of a content that are dropped without a word."""
    data = load(write(tmp_path / "a.json", [record]), tokenizer)
    messages = [dict(zip(("role", "content"), m, strict=True)) for m in expected]
    assert tokenizer.decode(data[0].ids, skip_special_tokens=False) == tokenizer.render_chat(messages, False).rstrip()
    assert data.report.endswith("none dropped.")
    if "system" not in record or not record.get("history"):
        return
    text = tokenizer.decode(load(tmp_path / "a.json", tokenizer, prompt_style="alpaca")[0].ids)
    assert all(content in text for _, content in expected)


@pytest.mark.parametrize("tools", [[WEATHER], json.dumps(TOOLS)])
@pytest.mark.parametrize(
    "call",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {
            "role": "assistant",
            "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}],
        },
        {"role": "assistant", "content": "", "function_call": CALL["function"]},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
    ],
)
def test_tools_and_calls_come_in_every_spelling(call, tools, tiny_checkpoint, tmp_path):
    """Catches: functions that never reach the template, arguments that are written as a text within the JSON."""
    own = copy_checkpoint(tiny_checkpoint, tmp_path / "t", chat_template=QWEN)
    path = write(tmp_path / "a.json", [{"messages": [{"role": "user", "content": "warm?"}, call], "tools": tools}])
    written = [{"role": "user", "content": "warm?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    text = own.decode(load(path, own)[0].ids, skip_special_tokens=False)
    assert text == own.render_chat(written, False, tools=[WEATHER]).rstrip() and '"arguments": {"city": "Rome"}' in text


def test_what_no_prompt_holds_is_in_the_report(tiny_checkpoint, tokenizer, tmp_path):
    """Catches: tools, calls, thoughts and keys that are left out of the training without a word."""
    turns = [
        {"role": "user", "content": "a", "mask": 1, "name": "Ann"},
        {"role": "assistant", "content": "b", "tool_calls": [CALL], "thinking": "t", "eot": True, "loss_mask": 0},
    ]
    rows = [
        {"messages": turns, "tools": TOOLS, "images": ["x.png"], "id": 7, "source": "s"},
        {**ROWS[0], "text": "Below"},
    ]
    path = write(tmp_path / "a.json", rows)
    keys = [f"the key {key!r}" for key in ("images", "mask", "eot", "loss_mask")]
    for style, known in ((None, "chat"), ("alpaca", "alpaca")):
        report = load(path, tokenizer, prompt_style=style).report
        for what in ("tools", "calls of functions", "thoughts", *keys):
            assert f"{what} (of 1)" in report, known
        assert "'id'" not in report and "source" not in report and "text" not in report
    report = load(write(path, [{"text": "a b", "system": "s", "weight": 0, "url": "x"}]), tokenizer).report
    assert "the key 'system' (of 1), the key 'weight' (of 1)." in report
    with pytest.raises(ValueError, match="element 1, prompt is a list: it must be a text"):
        load(write(path, [{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}]), tokenizer)
    users = "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    users += "{% if add_generation_prompt %}assistant: {% endif %}"
    own = copy_checkpoint(tiny_checkpoint, tmp_path / "t", chat_template=users)
    assert "left out of the prompts: system messages (of 1)" in load(write(path, [{"messages": CHAT}]), own).report


def test_an_answer_of_weight_0_is_read_and_not_trained(tokenizer, tmp_path):
    """Catches: a wrong answer that is trained as the right one, in any style, also where prompts are trained."""
    turns = [
        {"role": r, "content": c}
        for r, c in (("user", "a"), ("assistant", "wrong"), ("user", "b"), ("assistant", "right"))
    ]
    for key in ("weight", "train", "training", "loss"):
        marked = [turns[0], {**turns[1], key: 0}, turns[2], {**turns[3], key: 1}, turns[0], {**turns[1], key: False}]
        path = write(tmp_path / "a.json", [{"messages": marked}, {"messages": marked[:2]}])
        for style in (None, "alpaca", "chatml"):
            data = load(path, tokenizer, prompt_style=style)
            assert "1 without an answer that is trained" in data.report and len(data) == 1
            assert tokenizer.decode(answer_ids(data[0])).strip() == "right"
            assert (
                load(write(tmp_path / "b.json", [{"messages": turns}]), tokenizer, prompt_style=style)[0].ids.tolist()
                == data[0].ids.tolist()
            )
            whole = load(path, tokenizer, prompt_style=style, mask_prompt=False)[0]
            assert whole.ids.tolist() == data[0].ids.tolist()
            assert "wrong" not in tokenizer.decode(answer_ids(whole)) and (whole.labels == IGNORED).sum() < 12
    for value, reason in ((0.5, "message 2 has weight=0.5: it must be 0 or 1"), ("0", "weight=0: it must")):
        with pytest.raises(ValueError, match=reason):
            load(write(path, [{"messages": [turns[0], {**turns[1], "weight": value}]}]), tokenizer)


def test_what_counts_for_an_empty_answer_is_what_the_template_wrote(tiny_checkpoint, tokenizer, tmp_path):
    """Catches: an end token alone that is trained, because the template writes no calls or drops the thought."""
    call = [{"role": "user", "content": "warm?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    path = write(tmp_path / "a.json", [{"messages": call}, {"messages": [*call, *CHAT[1:3]]}, {"messages": CHAT}])
    data = load(path, tokenizer)
    assert len(data) == 1 and "2 dropped (2 with an empty answer)" in data.report
    assert "2 with an empty answer" in load(path, tokenizer, prompt_style="alpaca").report
    own = copy_checkpoint(tiny_checkpoint, tmp_path / "t", chat_template=QWEN)
    assert "none dropped" in load(path, own).report


def test_without_a_chat_template_the_style_is_alpaca_and_chat_is_refused(tiny_checkpoint, tmp_path):
    """Catches: a base model that cannot be finetuned without knowing the styles, a style whose end is no token."""
    bare = copy_checkpoint(tiny_checkpoint, tmp_path / "t", chat_template=None, eos_token="<|endoftext|>")
    path = write(tmp_path / "a.json", ROWS)
    data = load(path, bare)
    assert data.info["prompt_style"] == "alpaca" and data[0].labels[-1] == bare.eos_id
    with pytest.raises(ValueError, match="has no chat template: choose a prompt_style from alpaca"):
        load(path, bare, prompt_style="chat")
    (tmp_path / "t/tokenizer.json").write_text((tmp_path / "t/tokenizer.json").read_text().replace("im_end", "no_end"))
    with pytest.raises(ValueError, match=r"no token <\|im_end\|>"):
        load(path, Tokenizer(tmp_path / "t"), prompt_style="chatml")


def test_a_template_that_rewrites_earlier_turns_is_refused(tiny_checkpoint, tmp_path):
    """Catches: labels on the wrong tokens where a template shortens an answer once another turn follows."""
    template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] if loop.last else m['content'][:3] }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    odd = copy_checkpoint(tiny_checkpoint, tmp_path / "t", chat_template=template)
    with pytest.raises(ValueError, match="element 1: The chat template does not write message 3 as it prompts for it"):
        load(write(tmp_path / "a.json", [{"messages": CHAT}]), odd)


THOUGHT = [  # an answer with a thought, a call, its result, a wrong answer
    {"role": "user", "content": "Who jumps?"},
    {"role": "assistant", "content": "the fox", "reasoning_content": "a quick one"},
    {"role": "user", "content": "Is it warm?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "22"},
    {"role": "assistant", "content": "the dog", "weight": 0},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "yes, it is"},
]
# As DeepSeek-R1's: an answer is prompted for with the beginning of a thought, and written without it.
R1_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'].split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# Another prompts with an empty thought, which it writes nowhere else.
NO_THOUGHT_TEMPLATE = R1_TEMPLATE.replace("<think>\n{% endif", "<think>\n\n</think>\n\n{% endif")
ONCE_TEMPLATE = QWEN.replace("loop.index0 > ns.last and (loop.last or thought)", "loop.last")


@pytest.mark.parametrize("template", [QWEN, ONCE_TEMPLATE, MISTRAL, LLAMA_3, R1_TEMPLATE, NO_THOUGHT_TEMPLATE])
def test_each_answer_follows_the_prompt_that_generation_meets(template, tiny_checkpoint, tmp_path):
    """Catches: a family whose template rewrites earlier turns refused; a thought or tools in the wrong turn; an answer
    of weight 0 that is trained. transformers renders what is expected."""
    from transformers import PreTrainedTokenizerFast

    own = copy_checkpoint(tiny_checkpoint, tmp_path / "t", chat_template=template)
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    hf = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "t/tokenizer.json"), chat_template=template, **names)
    calls = template in (QWEN, ONCE_TEMPLATE)
    messages = THOUGHT if calls else [m for m in THOUGHT if m["role"] != "tool" and not m.get("tool_calls")]
    tools = [WEATHER] if calls or template == LLAMA_3 else None
    data = load(write(tmp_path / "a.json", [{"messages": messages, "tools": tools}]), own)
    expected, end = {}, "<|im_end|>" if template != LLAMA_3 else "<|eot_id|>"
    for k, message in enumerate(messages):
        if message["role"] == "assistant" and "weight" not in message:
            prompt, whole = (
                hf.apply_chat_template(messages[:n], tools=tools, add_generation_prompt=n == k, tokenize=False).rstrip(
                    " "
                )
                for n in (k, k + 1)
            )
            if template == R1_TEMPLATE:
                header, thought = prompt.removesuffix("<think>\n"), message.get("reasoning_content", "")
                whole = f"{prompt}{thought}\n</think>\n\n{whole.removeprefix(header)}"
            if template == NO_THOUGHT_TEMPLATE:
                whole = prompt + whole.removeprefix(prompt.removesuffix("<think>\n\n</think>\n\n"))
            assert whole.startswith(prompt)
            expected[prompt] = whole.removeprefix(prompt).rstrip()
    found = {}
    for example in data:
        trained = example.labels != IGNORED
        for start in np.flatnonzero(np.diff(trained.astype(int), prepend=0) == 1):
            stop = start + int(np.argmin([*trained[start:], False]))
            prompt, answer = (
                own.decode(ids, skip_special_tokens=False) for ids in (example.ids[:start], example.ids[start:stop])
            )
            assert example.ids[:start].tolist() == own.encode(prompt, bos=False)
            found[prompt] = answer
    assert found == expected and all(answer.endswith(end) for answer in found.values())
    assert "the dog" not in "".join(found.values()) and len(found) == (3 if calls else 2)
    splits = template not in (MISTRAL, LLAMA_3)
    assert ("1 conversations are an example for each answer" in data.report) == splits == (len(data) > 1)


# ---------------------------------------------------------------------------------------------- presets and the hub

HUB_FILES = {  # tiny files with the fields that the published ones have
    "tatsu-lab/alpaca": {"data/train-00000-of-00001-a09b.parquet": [{**ROWS[0], "text": "Below is ..."}]},
    "vicgalle/alpaca-gpt4": {"data/train-00000-of-00001-6ef3.parquet": [{**ROWS[0], "text": "Below is ..."}]},
    "databricks/databricks-dolly-15k": {
        "databricks-dolly-15k.jsonl": [{"instruction": "Who?", "context": "I.", "response": "Me.", "category": "qa"}]
    },
    "GAIR/lima": {"train.jsonl": [{"conversations": ["Who?", "Me."], "source": "wikihow"}], "test.jsonl": []},
    "akoksal/LongForm": {
        "data/train-00000-of-00001-367.parquet": [{"input": "Who?", "output": "Me.", "source": "C4", "subset": "c4"}],
        "data/test-00000-of-00001-5da.parquet": [],
    },
    "Muennighoff/flan": {
        "train/aeslc_10templates_train.jsonl": [{"inputs": "Who?", "targets": "Me.", "task": "aeslc"}],
        "train/wnli_10templates_train.jsonl": [{"inputs": "What?", "targets": "It.", "task": "wnli"}],
        "test/aeslc_10templates_test.jsonl": [],
    },
    "HuggingFaceH4/deita-10k-v0-sft": {
        "data/train_sft-00000-of-00001.parquet": [{"prompt": "Who?", "prompt_id": "1", "messages": CHAT[1:3]}],
        "data/test_sft-00000-of-00001.parquet": [],
    },
    "Yukang/LongAlpaca-12k": {"LongAlpaca-12k.json": [{"instruction": "Who?", "output": "Me.", "file": "a.pdf"}]},
}


@pytest.fixture
def hub(monkeypatch, tmp_path) -> list[str]:
    """A hub of HUB_FILES and a pyarrow that reads its Parquet files, which are JSON; the list of what was fetched."""
    fetched: list[str] = []

    def content(repo: str, name: str) -> bytes:
        rows, lines = HUB_FILES[repo][name], name.endswith(".jsonl")
        return ("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)).encode()

    def describe(repo, token, kind, revision):
        assert kind == "dataset"
        siblings = []
        for name in HUB_FILES[repo]:
            data = content(repo, name)
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            siblings.append(types.SimpleNamespace(rfilename=name, size=len(data), lfs=None, blob_id=blob))
        return types.SimpleNamespace(id=repo, sha="abc", siblings=siblings)

    def receive(published, partial, token):
        repo = published.url.partition("/datasets/")[2].partition("/resolve/abc/")[0]
        partial.write_bytes(content(repo, published.name))
        fetched.append(published.name)

    class ParquetFile:
        def __init__(self, path):
            self.rows = json.loads(Path(path).read_text())

        def iter_batches(self, size):
            yield types.SimpleNamespace(to_pylist=lambda: self.rows)

    monkeypatch.setattr("lit_swa.formats.hub._describe", describe)
    monkeypatch.setattr("lit_swa.formats.hub._receive", receive)
    monkeypatch.setattr("lit_swa.formats.places.PROJECT", tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", types.SimpleNamespace(ParquetFile=ParquetFile))
    monkeypatch.chdir(tmp_path)
    return fetched


@pytest.mark.parametrize("name", PRESETS)
def test_presets_know_their_fields_and_prompts_and_are_fetched_once(name, hub, tokenizer):
    """Catches: a preset whose fields or files were renamed, test data in training, a download at every start."""
    data = load(name, tokenizer)
    assert len(data) == (2 if name == "flan" else 1) and not any("test" in file for file in hub)
    assert data.info["prompt_style"] == (PRESETS[name].prompt_style or "chat") and data.info["preset"] == name
    assert data[0].labels[-1] == tokenizer.eos_id
    n = len(hub)
    assert load(name, tokenizer).fingerprint == data.fingerprint and len(hub) == n
    assert Path("data/hub", name, hub[0]).is_file()


def test_a_published_dataset_is_fetched_once_for_all_directories(hub, tokenizer, tmp_path, monkeypatch):
    """Catches: a copy of a data set for each directory that a run is started in, and one here that is not seen."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/download.py").touch()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        load("dolly", tokenizer)
    assert len(hub) == 1 and (tmp_path / "data/hub/dolly" / hub[0]).is_file()
    (tmp_path / "data").rename("data")
    load("dolly", tokenizer)
    assert len(hub) == 1


def test_a_part_of_flan_may_be_chosen_and_a_local_file_read_as_a_preset(hub, tokenizer):
    """Catches: many GB fetched for one task, a preset that works with the hub only."""
    assert len(load("flan:aeslc*", tokenizer)) == 1 and hub == ["train/aeslc_10templates_train.jsonl"]
    with pytest.raises(ValueError, match="no file called x .it has aeslc_10templates_train.jsonl"):
        load("flan:x", tokenizer)
    rows = HUB_FILES["databricks/databricks-dolly-15k"]["databricks-dolly-15k.jsonl"]
    path = write(Path("mine.jsonl"), json.dumps(rows[0]))
    dolly = load(path, tokenizer, preset="dolly")
    assert "### Input:\nI." in tokenizer.decode(dolly[0].ids)
    with pytest.raises(ValueError, match="line 1 has the keys .* it needs input and output"):
        load(path, tokenizer, preset="longform")


def test_a_hub_out_of_reach_and_a_missing_pyarrow_are_one_sentence(monkeypatch, tokenizer, tmp_path):
    """Catches: a stack of network errors, an ImportError in the middle of a run."""

    def describe(repo, token, kind, revision):
        raise ConnectionError("no route")

    monkeypatch.setattr("lit_swa.formats.hub._describe", describe)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="hub does not give GAIR/lima .*no route.*: check the network"):
        load("lima", tokenizer)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        load(write(tmp_path / "a.parquet", "PAR1"), tokenizer)


# ---------------------------------------------------------------------------------------------- text and token files


def test_texts_become_rows_of_one_stream(tokenizer, tmp_path):
    """Catches: documents joined without EOS, a row that is short, a token that two rows train."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, text in (("b.txt", "the lazy dog " * 30), ("a.txt", "the quick fox " * 30)):
        write(texts / name, text)
    stream = [i for name in ("a.txt", "b.txt") for i in tokenizer.encode((texts / name).read_text(), eos=True)]
    data = load(texts, tokenizer, max_seq_length=32)
    assert len(data) == len(stream) // 32 and set(data.lengths) == {32} and set(data.trained) == {31}
    assert np.concatenate([e.ids for e in data]).tolist() == stream[: 32 * len(data)]
    for example in data:
        assert example.labels[0] == IGNORED and example.labels[1:].tolist() == example.ids[1:].tolist()
    assert f"{len(stream) % 32} tokens behind the last row dropped" in data.report
    check_dataset(data, tokenizer)

    output = tmp_path / "texts.bin"
    assert write_token_file([texts / "a.txt", texts / "b.txt"], tokenizer, output) == (2, len(stream))
    binary = load(output, tokenizer, max_seq_length=32)
    assert isinstance(binary.tokens, np.memmap) and binary.fingerprint == data.fingerprint
    assert read_tokens(output, tokenizer.checkpoint_dir, 320).tolist() == stream
    assert len(load(output, tokenizer, max_seq_length=32, limit=2)) == 2
    with pytest.raises(ValueError, match="the token id 60000 at position 0"):
        np.full(64, 60000, "<u2").tofile(output)
        load(output, tokenizer, max_seq_length=32)


def test_token_files_are_written_whole_and_from_records_too(tokenizer, tmp_path, run_script):
    """Catches: half a token file under the final name, a text in JSON Lines that must be unpacked by hand."""
    lines = write(tmp_path / "a.jsonl", '{"text": "the fox"}\n{"text": ""}\n{"text": "the dog"}\n')
    output, checkpoint = tmp_path / "out/a.bin", tokenizer.checkpoint_dir
    arguments = ["--data", lines, "--output", output, "--checkpoint_dir", checkpoint]
    code, out, err = run_script("scripts/prepare_text.py", *arguments)
    assert code == 0 and out.strip() == str(output) and "2 documents" in err
    wanted = tokenizer.encode("the fox", eos=True) + tokenizer.encode("the dog", eos=True)
    assert np.fromfile(output, "<u2").tolist() == wanted
    write(lines, '{"text": "other"}\n{"title": "x"}\n')
    code, out, err = run_script("scripts/prepare_text.py", *arguments)
    assert code == 2 and "line 2 has the keys title: it needs text" in err and len(err.strip().splitlines()) == 1
    assert np.fromfile(output, "<u2").tolist() == wanted and [p.name for p in output.parent.iterdir()] == ["a.bin"]


def test_what_a_killed_preparation_left_goes_with_the_next_start(tokenizer, tmp_path, run_script):
    """Catches: temporary files that pile up, and one that is taken from a process that still writes it."""
    output, text = tmp_path / "out/a.bin", write(tmp_path / "a.txt", "the fox")
    output.parent.mkdir()
    process = os.fork()
    if process == 0:  # what it wrote stays under its temporary name, as after kill -9
        with atomic_file(output) as stream:
            stream.write(b"half")
            os._exit(9)
    os.waitpid(process, 0)
    running = output.with_name(f".a.bin.{os.getppid()}.lit_swa.tmp")
    running.touch()
    assert len(list(output.parent.iterdir())) == 2
    arguments = ["--data", text, "--output", output, "--checkpoint_dir", tokenizer.checkpoint_dir]
    assert run_script("scripts/prepare_text.py", *arguments)[0] == 0
    assert {p.name for p in output.parent.iterdir()} == {"a.bin", running.name}


# ---------------------------------------------------------------------------------------------- prepared directories


def test_a_prepared_directory_gives_the_same_examples(tokenizer, tmp_path):
    """Catches: labels lost or shifted on the way through the files, an option that is ignored, a stale directory."""
    rows = [*ROWS, {"messages": CHAT}]
    data = load(write(tmp_path / "a.json", rows), tokenizer)
    save_dataset(data, tmp_path / "p")
    again = load(tmp_path / "p", tokenizer)
    assert isinstance(again.tokens, np.memmap) and again.report == data.report and again.info == data.info
    assert again.fingerprint == data.fingerprint and again.trained.tolist() == data.trained.tolist()
    for one, other in zip(data, again, strict=True):
        assert one.ids.tolist() == other.ids.tolist() and one.labels.tolist() == other.labels.tolist()
    check_dataset(again, tokenizer)
    for option in ({"prompt_style": "alpaca"}, {"mask_prompt": False}, {"preset": "dolly"}):
        with pytest.raises(ValueError, match="was prepared with"):
            load(tmp_path / "p", tokenizer, **option)
    assert len(load(tmp_path / "p", tokenizer, limit=2)) == 2
    direct = load(tmp_path / "a.json", tokenizer, max_seq_length=60)
    short = load(tmp_path / "p", tokenizer, max_seq_length=60)
    assert short.fingerprint == direct.fingerprint and short.info["truncated"] == direct.info["truncated"] > 0
    save_dataset(direct, tmp_path / "p")  # replaced
    with pytest.raises(ValueError, match="max_seq_length=60, which cut"):
        load(tmp_path / "p", tokenizer, max_seq_length=61)


def test_a_prepared_directory_that_does_not_fit_is_refused(tokenizer, tiny_checkpoint, tmp_path):
    """Catches: tokens of another vocabulary, a truncated file, an interrupted preparation taken for a finished one."""
    save_dataset(load(write(tmp_path / "a.json", ROWS), tokenizer), tmp_path / "p")
    other = copy_checkpoint(tiny_checkpoint, tmp_path / "t", additional_special_tokens=["<|other|>"])
    with pytest.raises(ValueError, match="prepared for another vocabulary"):
        load(tmp_path / "p", other)
    for name in ("tokens.bin", "trained.bin", "lengths.npy"):
        path, whole = tmp_path / "p" / name, (tmp_path / "p" / name).read_bytes()
        for damaged in (whole[:-2], whole[:-2] + bytes([whole[-2] ^ 1, whole[-1]])):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="is damaged"):
                load(tmp_path / "p", tokenizer)
        path.write_bytes(whole)
    assert len(load(tmp_path / "p", tokenizer)) == 3
    (tmp_path / "p/dataset.json").unlink()
    with pytest.raises(ValueError, match="is incomplete"):
        load(tmp_path / "p", tokenizer)


def test_a_mutated_prepared_directory_is_refused_in_a_sentence(tokenizer, tmp_path):
    """Catches: a TypeError, an overflow, a length that is believed and allocated, a message of a megabyte."""
    save_dataset(load(write(tmp_path / "a.json", ROWS), tokenizer), tmp_path / "p")
    path, description = tmp_path / "p/lengths.npy", tmp_path / "p/dataset.json"
    whole, info, mutated = path.read_bytes(), json.loads(description.read_text()), []
    for shape in ((-1,), (2**40,), (1, 3), ()):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": shape})
        mutated += [header.getvalue() + whole[128:], header.getvalue()[:-9] + b"((((((((\n"]
    for lengths in (np.full(4, 2**62), np.array([2**63 - 1, 3]), np.array([5, -2, 40]), np.array(["a"])):
        np.save(buffer := io.BytesIO(), lengths)
        mutated.append(buffer.getvalue())
    for content in (*mutated, b"", whole[:40]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="p is damaged: its files do not fit each other"):
            load(tmp_path / "p", tokenizer)
    path.write_bytes(whole)
    for key in info:
        for value in (None, -1, 1.5, 2**31, "x" * 10**5, [None], [2**40], {"a": 1}):
            write(description, {**info, key: value})
            try:
                data = load(tmp_path / "p", tokenizer)
                check_dataset(data, tokenizer)
                assert len(data) == 3 and key in ("report", "prompt_style", "preset", "end_ids", "mask_prompt")
            except ValueError as error:
                assert len(str(error)) < 600
    write(description, info)
    assert len(load(tmp_path / "p", tokenizer)) == 3


def test_an_interrupted_preparation_is_never_taken_for_a_finished_one(tokenizer, tmp_path, monkeypatch):
    """Catches: new tokens with the old description after a crash, a temporary file that stays."""
    data = load(write(tmp_path / "a.json", ROWS), tokenizer)
    save_dataset(data, tmp_path / "p")
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            save_dataset(load(tmp_path / "a.json", tokenizer, limit=1), tmp_path / "p")
    with pytest.raises(ValueError, match="is incomplete"):
        load(tmp_path / "p", tokenizer)
    save_dataset(data, tmp_path / "p")
    assert load(tmp_path / "p", tokenizer).fingerprint == data.fingerprint
    assert not list((tmp_path / "p").glob(".*.tmp"))


def test_prepare_instruct_shows_samples_and_refuses_what_cannot_be_learned(tokenizer, tmp_path, run_script):
    """Catches: a run of hours on answers that never end, samples that hide what is trained."""
    path = write(tmp_path / "a.json", ROWS)
    arguments = ["--data", path, "--output_dir", tmp_path / "p", "--checkpoint_dir", tokenizer.checkpoint_dir]
    code, out, err = run_script("scripts/prepare_instruct.py", *arguments, "--prompt_style", "alpaca")
    assert code == 0 and out.strip() == str(tmp_path / "p") and "3 examples" in err
    assert "### Response:[[45 kilometers is 45000 meters.<|im_end|>]]" in err
    assert len(load(tmp_path / "p", tokenizer)) == 3
    cut = int(load(path, tokenizer, prompt_style="alpaca").lengths.min()) - 1
    code, out, err = run_script(
        "scripts/prepare_instruct.py", *arguments, "--prompt_style", "alpaca", "--max_seq_length", cut, "--limit", 1
    )
    assert code == 2 and "the end of an answer" in err and "raise max_seq_length" in err and out == ""


# ------------------------------------------------------------------------------ checking, showing, splitting, packing


def test_a_dataset_that_cannot_be_learned_from_is_refused(tokenizer, tiny_checkpoint, tmp_path):
    """Catches: an end of turn that the template never writes, or that every answer has lost at its cut."""
    path = write(tmp_path / "a.json", ROWS)
    check_dataset(load(path, tokenizer), tokenizer)
    endless = copy_checkpoint(
        tiny_checkpoint,
        tmp_path / "t",
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
    with pytest.raises(ValueError, match="In none of the 3 examples is the end of an answer trained"):
        check_dataset(load(path, endless), endless)
    other_end = copy_checkpoint(tiny_checkpoint, tmp_path / "u", eos_token="<|endoftext|>")
    data = load(path, other_end)  # the template's own end of turn counts as well
    assert set(data.info["end_ids"]) == {other_end.eos_id, other_end.token_to_id("<|im_end|>")}
    check_dataset(data, other_end)
    data = load(path, tokenizer)
    data.trained[1] = 0
    with pytest.raises(ValueError, match="no token is trained"):
        check_dataset(data, tokenizer)


def test_shown_examples_mark_what_is_trained_and_cannot_harm_a_terminal(tokenizer, tmp_path):
    """Catches: marks on the prompt, a page for each sample, escape sequences of a stranger's file."""
    long = {"instruction": "".join(f"word{n} " for n in range(1500)), "output": "Me."}
    rows = [{"instruction": "x" * 5000, "output": "Me\x1b[2J."}, ROWS[0], long, ROWS[2]]
    data = load(write(tmp_path / "a.json", rows), tokenizer, max_seq_length=16384)
    shown = show_examples(data, tokenizer, 4, terminal=False)
    assert "word0 word1" in shown and "tokens ... " in shown and "word1499" in shown and len(shown) < 4000
    shown = show_examples(data, tokenizer, 2, terminal=False)
    assert "[[Me\\x1b[2J.<|im_end|>]]" in shown and "\x1b" not in shown and len(shown) < 2000
    assert shown.count("[[") == 2 and "example 1 of 4" in shown and "example 4 of 4" in shown
    assert "assistant\n\033[7mMe" in show_examples(data, tokenizer, 1, terminal=True)
    assert show_examples(data, tokenizer, 9, terminal=False).count("---") == 4


def test_splits_are_disjoint_complete_and_repeatable(tokenizer, tmp_path):
    """Catches: validation examples in training, a split that changes when a run is resumed."""
    rows = [{"instruction": f"number {i}", "output": f"is {i}"} for i in range(40)]
    data = load(write(tmp_path / "a.json", rows), tokenizer)
    everything = sorted(tuple(e.ids) for e in data)
    for part, size in ((0.1, 4), (7, 7)):
        train, validation = split_dataset(data, part, seed=3)
        assert len(validation) == size and sorted(tuple(e.ids) for d in (train, validation) for e in d) == everything
        again = split_dataset(data, part, seed=3)
        assert [d.fingerprint for d in again] == [train.fingerprint, validation.fingerprint]
        assert split_dataset(data, part, seed=4)[1].fingerprint != validation.fingerprint
        assert validation.trained.tolist() == [(e.labels != IGNORED).sum() for e in validation]
    for wrong in (0, 40, 0.001, -1, 2.5, 1.0 - 1e-9):
        with pytest.raises(ValueError, match="validation set"):
            split_dataset(data, wrong, seed=3)


def test_the_answers_of_a_conversation_are_on_one_side_of_a_split(tokenizer, tmp_path):
    """Catches: a validation loss over prompts and answers that were trained."""
    rows = [{"instruction": f"number {i // 3}", "output": f"is {i}"} for i in range(60)]
    data = load(write(tmp_path / "a.json", rows), tokenizer)
    for part, size in ((0.05, 3), (7, 9)):
        train, validation = split_dataset(data, part, seed=3)
        assert len(validation) == size and len(train) == 60 - size
        prompts = [{tuple(e.ids[: int((e.labels == IGNORED).sum())]) for e in d} for d in (train, validation)]
        assert not prompts[0] & prompts[1]
    one = split_dataset(data.subset(np.arange(3), ""), 1, seed=3)
    assert [len(d) for d in one] == [2, 1]


@pytest.mark.parametrize("limit", [64, 512, 4096])
def test_packing_puts_every_example_in_one_bin_and_fills_the_bins(limit):
    """Catches: an example lost or doubled, a bin beyond the context, half-empty bins, all long ones first."""
    random_ = np.random.RandomState(1)
    lengths = np.clip(np.exp(random_.normal(4.5, 0.8, 8_000)).astype(int), 2, limit)
    bins = pack(lengths, limit, seed=5)
    assert sorted(i for one in bins for i in one) == list(range(len(lengths)))
    totals = np.array([lengths[one].sum() for one in bins])
    assert totals.max() <= limit and lengths.sum() / (limit * len(bins)) > 0.95
    assert bins == pack(lengths, limit, seed=5) != pack(lengths, limit, seed=6)
    longest = np.array([lengths[one].max() for one in bins])
    correlation = np.corrcoef(np.arange(len(bins)), longest)[0, 1]
    assert abs(correlation) < 4 / len(bins) ** 0.5  # in mixed order: four standard deviations of chance
    if limit > 64:  # else no bin has many
        assert any((np.diff(lengths[one]) > 0).any() for one in bins if len(one) > 2)


def test_packing_borders():
    """Catches: an example of exactly the limit refused, one beyond it cut in silence, an empty set that fails."""
    assert pack(np.array([8]), 8, 0) == [[0]] and pack(np.array([], dtype=int), 8, 0) == []
    assert sorted(map(sorted, pack(np.array([8, 5, 3, 7]), 8, 0))) == [[0], [1, 2], [3]]
    for wrong in ([9], [0, 3]):
        with pytest.raises(ValueError, match="An example has"):
            pack(np.array(wrong), 8, 0)


def test_many_examples_take_flat_memory(tokenizer, tmp_path):
    """Catches: a Python list of ints for each example that stays (28 bytes and more a token)."""
    rows = random.Random(0)
    with open(tmp_path / "a.jsonl", "w") as stream:
        for i in range(1_000):
            row = {"instruction": f"the {i} fox", "output": "jumps over " * rows.randrange(1, 9)}
            stream.write(json.dumps(row) + "\n")
    data = load(tmp_path / "a.jsonl", tokenizer, prompt_style="plain")
    assert len(data) == 1_000 and data.tokens.nbytes + data.mask.nbytes == 5 * data.lengths.sum()


def test_packing_takes_work_in_proportion_to_the_examples():
    """Catches: quadratic packing, which a million examples would never end. The lines that Python runs are counted."""

    def lines(n: int) -> int:
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            count += event == "line"
            return trace

        lengths = np.random.RandomState(0).randint(10, 512, n)
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            bins = pack(lengths, 512, seed=0)
        finally:
            sys.settrace(before)
        assert lengths.sum() / (512 * len(bins)) > 0.97
        return count

    assert lines(4_000) < 5 * lines(1_000)


@pytest.mark.parametrize("names", [5, [5], ["/etc/passwd"], ["../x"], ["a\0"], {"a": 1}])
def test_the_index_of_a_published_dataset_names_files_of_its_directory(tmp_path, names):
    """Catches: a file elsewhere that is read as the dataset, a traceback."""
    from lit_swa.data.hub import HUB_INDEX, _known_files

    (tmp_path / HUB_INDEX).write_text(json.dumps({"": names}))
    with pytest.raises(ValueError, match=f"{HUB_INDEX} is damaged"):
        _known_files(tmp_path, "")
