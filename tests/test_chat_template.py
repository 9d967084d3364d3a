"""Chat templates: ids equal transformers', and no template does harm or runs for long."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from lit_swa.formats import chat_template
from lit_swa.formats.chat_template import TemplateError, render_template
from lit_swa.tokenizer import Tokenizer

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|eot_id|>", "<end_of_turn>"]

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful assistant<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA_2 = """{% if messages[0]['role'] == 'system' %}
    {% set turns = messages[1:] %}{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{% else %}
    {% set turns = messages %}{% set system = '' %}
{% endif %}
{%- for message in turns %}
    {%- if (message.role == 'user') != (loop.index0 is even) %}
        {{- raise_exception('Roles must alternate user/assistant/user/...') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message.content.strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""

LLAMA_3 = """{{- bos_token }}
{%- if not date is defined %}{% set date = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0].role == "system" %}
    {%- set system = messages[0]['content']|trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = "" %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date + "\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{% endfor %}
{%- endif %}
{{- system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- if message.tool_calls|length != 1 %}{{- raise_exception("One call at a time!") }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- elif message.role in ["tool", "ipython"] %}
        {{- "ipython:" + (message.content | tojson if message.content is mapping else message.content) + "<|eot_id|>" }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim }}<|eot_id|>
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

MISTRAL = """{%- set ns = namespace(index=0) %}
{%- for message in messages if message.role in ["user", "assistant"] and not message.tool_calls is defined %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, roles must alternate") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and loop.last %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.function.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{% endif %}
                    {%- if not loop.last %}{{- ", " }}{% endif %}
                {%- endfor %}
                {{- "}}" }}{{- ", " if not loop.last else "]" }}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message["content"] + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] " + message.tool_calls | map(attribute="function") | list | tojson + eos_token }}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- elif message["role"] in ["tool", "tool_results"] %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + "}[/TOOL_RESULTS]" }}
    {%- elif message["role"] != "system" %}
        {{- raise_exception("Only user, assistant, system and tool roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}
{% for message in messages %}
    {% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
    {{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{% endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == "user" and message.content is string %}
        {%- set ns.searching = false %}{% set ns.last = (messages|length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = message.reasoning_content if message.reasoning_content is string else '' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- (message.content or '').lstrip('\\n') }}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function %}{% set call = call.function %}{% endif %}
            {{- '<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or loop.previtem.role != "tool" %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != "tool" %}{{- '<|im_end|>\\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

GENERATION = """{% for message in messages %}
{% if message.role == 'assistant' %}
<|im_start|>{% generation %}
{% set shown = message.content or '' %}{{ shown }}<|im_end|>
{% endgeneration %}
{% else %}
{{ message.role }}: {{ message.content }} {{ shown }}
{% endif %}
{% endfor %}"""

LOOP_CONTROLS = """{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}
{{ message.role | upper | center(12) }}|{{ message.content }}{% if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}"""

FILTERS = """{% macro show(value, depth=0) -%}
{% if value is string %}{{ value | replace('a', 'A') }}{% elif value is mapping %}{{ value.items() | list }}
{% elif value is iterable %}{% for v in value recursive %}{{ show(v, depth + 1) }};{% endfor %}
{% else %}{{ value }}{% endif %}
{%- endmacro %}
{% for m in messages | selectattr('content', 'defined') %}{{ show(m.content) | indent(2) | trim }}
{% endfor %}{{ messages | map(attribute='role') | unique | join(', ') }}{{ messages | length }}
{{ [3, 1, 2] | sort | tojson }}{{ {'b': '<é>', 'a': none} | tojson(sort_keys=true, separators=(',', ':')) }}
{{ '%s-%05.1f' | format('x', 2.25) }}{{ '{:>4}|{}'.format(1, true) }}{{ dict(a=1) }}{{ range(3) | list }}
{% set cycle = cycler('x', 'y') %}{{ cycle.next() }}{{ cycle.next() }}{{ undefined_name }}{{ unk_token }}
{{ documents }}{{ 7 // 2 ** 2 }}{{ "\\u00e9\\n" | upper }}{{ 'ß'.encode('latin-1').hex() }}"""

TEMPLATES = {
    "chatml": CHATML,
    "llama_2": LLAMA_2,
    "llama_3": LLAMA_3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "qwen": QWEN,
    "generation": GENERATION,
    "loop_controls": LOOP_CONTROLS,
    "filters": FILTERS,
}

ARGUMENTS = {"city": "Zürich", "days": [1, 2.5], "x": None}
CALL = {"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Brief."}, {"role": "user", "content": "  Hi <|im_end|> </s> & \"é\" '日本' 😀\n"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "\nBecause.\n", "thinking": "hm"},
        {"role": "user", "content": "And\twhy else?"},
    ],
    [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "look it up"},
        {"role": "tool", "name": "weather", "content": '{"sun": true}', "tool_call_id": "123456789"},
        {"role": "tool", "name": "weather", "content": "{'rain': 0}", "tool_call_id": "123456780"},
        {"role": "assistant", "content": "Sunny & warm", "reasoning_content": None},
    ],
    [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}],
    [{"role": "assistant", "content": "I begin"}, {"role": "nobody", "content": ""}],
    [{"role": "user", "content": [{"type": "text", "text": "a part"}, {"type": "image"}]}],
    [{"role": "user"}, {"content": "no role"}],
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The weather <in> "Köln" & elsewhere\'s',
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Köln", "北京"]}}},
    },
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    from transformers import PreTrainedTokenizerFast

    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=SPECIALS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([CHATML, QWEN], trainer)
    path = tmp_path_factory.mktemp("chat")
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(directory) -> Tokenizer:
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def theirs(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture
def process():
    """A rendering process for one test alone."""
    process = chat_template._TemplateProcess()
    yield process
    process.stop()


def assert_one_sentence(message: str) -> None:
    assert "\n" not in message and "Traceback" not in message
    assert message.endswith((".", "...")) and len(message) < 800


# --- what a template writes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    ("tools", "add_generation_prompt"), [(None, True), ([TOOL, TOOL], True), ([TOOL], False), ([], False)]
)
def test_ids_equal_transformers(name, add_generation_prompt, tools, ours, theirs):
    """Would catch any difference in what a template sees or may use: whitespace, filters, functions, special tokens."""
    equal = 0
    for conversation in CONVERSATIONS:
        arguments = {"add_generation_prompt": add_generation_prompt, "tools": tools, "chat_template": TEMPLATES[name]}
        try:
            expected = theirs.apply_chat_template(conversation, return_dict=False, **arguments)
        except Exception:  # the template refuses this conversation
            with pytest.raises(ValueError):
                ours.apply_chat_template(conversation, **arguments)
            continue
        assert ours.apply_chat_template(conversation, **arguments) == expected
        equal += 1
    assert equal > 0


def test_variables_equal_transformers(ours, theirs):
    """Would catch template variables that are dropped, converted, or that cannot replace a special token."""
    template = "{{ flag }}{{ bos_token }}{{ documents | tojson }}{{ number + 1 }}{{ enable_thinking is false }}{{ no }}"
    documents = [{"title": "T", "text": "é", "n": 1.5, "deep": {"a": [None, True]}}]
    variables = {"flag": "on", "bos_token": "<|im_start|>", "number": 2**70, "enable_thinking": False, "no": None}
    arguments = {"chat_template": template, "documents": documents, **variables}
    expected = theirs.apply_chat_template(CONVERSATIONS[0], tokenize=False, **arguments)
    assert ours.render_chat(CONVERSATIONS[0], **arguments) == expected


def test_rendering_changes_no_message(ours):
    """Would catch a conversation that loses its None values or gains keys in the caller's hands."""
    before = json.dumps(CONVERSATIONS[3])
    ours.render_chat(CONVERSATIONS[3], chat_template=QWEN)
    assert json.dumps(CONVERSATIONS[3]) == before


def test_objects_are_data_to_a_template(ours):
    """Would catch a template that calls methods of the caller's objects."""

    class Secret:
        key = "secret"

        def __repr__(self):
            return "secret"

    messages = [{"role": "user", "content": Secret()}]
    assert ours.render_chat(messages, chat_template="{{ messages[0].content }}") == "<Secret>"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "empty"),
        ("Hello", "list of dicts"),
        ({"role": "user", "content": "a"}, "list of dicts"),
        (["Hello"], "A message is a dict"),
        (None, "list of dicts"),
        ([{"role": "user", ("a", "b"): 1}], "not plain data"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, said, ours):
    """Would catch an error from inside jinja2 or json, which tells the caller nothing."""
    with pytest.raises(ValueError, match=said) as info:
        ours.render_chat(messages, chat_template=CHATML)
    assert_one_sentence(str(info.value))


def test_a_circle_is_refused(ours):
    """Would catch an endless request."""
    messages = [{"role": "user", "content": []}]
    messages[0]["content"].append(messages)
    with pytest.raises(ValueError, match="not plain data"):
        ours.render_chat(messages, chat_template=CHATML)


def test_arguments_that_would_be_ignored_are_refused(ours):
    """Would catch continue_final_message passing as an unused variable, and a function passing as a tool."""
    with pytest.raises(ValueError, match="continue_final_message is not supported"):
        ours.render_chat(CONVERSATIONS[0], chat_template=CHATML, continue_final_message=True)
    with pytest.raises(ValueError, match="JSON schema"):
        ours.render_chat(CONVERSATIONS[0], chat_template=CHATML, tools=[print])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('Roles must\n alternate.') }}", "failed: Roles must alternate.$"),
        ("{% for %}", "not valid in line 1"),
        ("\n\n{% if a %}{% endfor %}", "not valid in line 3"),
        ("{{ missing.attribute }}", "'missing' is undefined"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages | nothing }}", "nothing"),
        ("{% include 'other' %}", "no loader"),
    ],
)
def test_errors_of_a_template_are_one_sentence(template, said, ours):
    """Would catch a jinja2 exception or its traceback reaching the user, and the reason getting lost."""
    with pytest.raises(ValueError, match=said) as info:
        ours.render_chat(CONVERSATIONS[0], chat_template=template)
    assert str(ours.checkpoint_dir) in str(info.value)
    assert_one_sentence(str(info.value))


# --- where templates come from ----------------------------------------------------------------------------------------


def with_files(directory: Path, tmp_path: Path, files: dict[str, str]) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def config_with(template: object) -> str:
    return json.dumps({"chat_template": template, "bos_token": "<s>"})


NAMED = [{"name": "default", "template": "{{ bos_token }}D"}, {"name": "tool_use", "template": "T{{ tools }}"}]
SOURCES = {
    "file": {"chat_template.jinja": "file é{{ bos_token }}"},
    "config": {"tokenizer_config.json": config_with("config {{ bos_token }}")},
    "file_before_config": {"chat_template.jinja": "file", "tokenizer_config.json": config_with("config")},
    "named": {"tokenizer_config.json": config_with(NAMED)},
    "more_files": {"chat_template.jinja": "D", "additional_chat_templates/tool_use.jinja": "T"},
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_the_template_is_the_one_transformers_takes(source, tools, directory, tmp_path):
    """Would catch another order of precedence, and tool_use taken or passed over against the rule."""
    from transformers import AutoTokenizer

    path = with_files(directory, tmp_path, SOURCES[source])
    expected = AutoTokenizer.from_pretrained(path).apply_chat_template(CONVERSATIONS[0], tools=tools, tokenize=False)
    tokenizer = Tokenizer(path)
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat(CONVERSATIONS[0], tools=tools) == expected


def test_older_places_of_templates_are_read(directory, tmp_path):
    """Would catch a model whose template is only in chat_template.json or in chat_templates/."""
    path = with_files(directory, tmp_path, {"chat_template.json": config_with("J")})
    assert Tokenizer(path).render_chat(CONVERSATIONS[0]) == "J"
    path = with_files(directory, tmp_path, {"chat_templates/default.jinja": "F", "chat_templates/rag.jinja": "R"})
    assert Tokenizer(path).render_chat(CONVERSATIONS[0]) == "F"
    assert Tokenizer(path).render_chat(CONVERSATIONS[0], chat_template="rag") == "R"


def test_a_missing_template_is_named(directory, ours, tmp_path):
    """Would catch a misspelled name being rendered as a template of its own."""
    assert not ours.has_chat_template
    with pytest.raises(ValueError, match="has no chat template: add chat_template.jinja") as info:
        ours.render_chat(CONVERSATIONS[0])
    assert_one_sentence(str(info.value))
    tokenizer = Tokenizer(with_files(directory, tmp_path, SOURCES["named"]))
    with pytest.raises(ValueError, match="called 'tools': pass one of default, tool_use") as info:
        tokenizer.render_chat(CONVERSATIONS[0], chat_template="tools")
    assert_one_sentence(str(info.value))


# --- templates that would do harm -------------------------------------------------------------------------------------

LEVELS = "{% set ns = namespace(a=[], b=[], t=()) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
LEVELS += "{% set ns.b = [ns.b, ns.b] %}{% set ns.t = (ns.t, ns.t) %}{% endfor %}"
BOMBS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested_loops": "{% for i in range(99999) %}" * 6 + "{% endfor %}" * 6,
    "recursive_loop": "{% for i in [1, 1, 1] recursive %}{{ loop([1, 1, 1]) }}{% endfor %}",
    "multiply": "{{ 'a' * 10**10 }}",
    "multiply_list": "{{ ([0] * 10**10) | length }}",
    "multiply_in_steps": "{% set ns = namespace(x='a') %}" + "{% set ns.x = ns.x * 99 %}" * 99,
    "power": "{{ 10 ** (10 ** 10) }}",
    "power_digits": "{{ (10**4000) ** 4000 % 7 }}{{ 7 ** (10**9) }}",
    "string_doubling": "{% set ns = namespace(x='ab') %}" + "{% set ns.x = ns.x ~ ns.x %}" * 60,
    "list_doubling": "{% set ns = namespace(x=[1]) %}" + "{% set ns.x = ns.x + ns.x %}" * 60,
    "block_doubling": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "compare": LEVELS + "{{ ns.a == ns.b }}",
    "print": LEVELS + "{{ ns.a }}",
    "json": LEVELS + "{{ ns.a | tojson | length }}",
    "hash": LEVELS + "{{ {ns.t: 1} | length }}",
    "sort": LEVELS + "{{ [ns.a, ns.b] | sort | length }}",
    "output": "{% for i in range(9999) %}{{ 'a' * 99999 }}{% endfor %}",
    "center": "{{ 'a' | center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "indent": "{{ 'a\nb' | indent(10**10) }}",
    "json_indent": "{{ [1] | tojson(indent=10**10) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "format_filter": "{{ '%-10000000000s' | format('a') }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "join": "{{ (['a' * 9999] * 99999) | join('b' * 99999) }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "lipsum": "{{ lipsum(n=10**8) }}",
    "strftime": "{{ strftime_now('%A' * 10**9) }}",
    "product": "{% for a in range(99999) %}{{ range(99999) | list | sum }}{% endfor %}",
    "macro": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "macro_tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "parentheses": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "brackets": "{{ " + "[" * 2000 + "]" * 2000 + " }}",
    "sum": "{{ 1" + " + 1" * 50_000 + " }}",
    "ifs": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "loops_in_loops": "{% for i in [1] %}" * 200 + "{% endfor %}" * 200,
    "attributes": "{{ messages" + ".a" * 50_000 + " }}",
}


# One for each way a bomb works: Python code that loops, one call in C, memory at once and in steps, output, nesting.
QUICK = "nested_loops compare json power multiply string_doubling output lipsum macro macro_tree parentheses".split()


@pytest.mark.parametrize("name", QUICK)
def test_a_bomb_ends_in_one_sentence(name, ours, monkeypatch):
    """Would catch a template that hangs the program or takes its memory. The limit is a twentieth of the real one."""
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.15)
    with pytest.raises(ValueError) as info:
        ours.render_chat(CONVERSATIONS[0], chat_template=BOMBS[name])
    assert_one_sentence(str(info.value))


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_ends_within_the_real_limits(name, ours):
    """Would catch a bomb that runs without an end or takes 256 MB of this process, with the limits that users have."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError) as info:
        ours.render_chat(CONVERSATIONS[0], chat_template=BOMBS[name])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024
    assert_one_sentence(str(info.value))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_limits_are_set_in_the_process(process):
    """Would catch limits that are silently not applied: the bombs above would then end by time alone."""
    process.render("warm", {})
    limits = Path(f"/proc/{process.process.pid}/limits").read_text()
    found = {line[:26].strip(): line[26:].split()[0] for line in limits.splitlines()}
    assert int(found["Max address space"]) == chat_template.RENDER_BYTES <= 256 * 2**20
    assert int(found["Max open files"]) == 3
    assert int(found["Max file size"]) == 0


def test_what_a_template_may_write_is_bounded(process, monkeypatch):
    """Would catch a reply of any length being read into this process."""
    with pytest.raises(TemplateError, match="characters"):
        process.render(BOMBS["output"], {})
    assert len(process.render("{{ 'é' * 10**6 }}", {})) == 10**6
    monkeypatch.setattr(chat_template, "RENDER_CHARS", 2**10)
    with pytest.raises(TemplateError):
        process.render("{{ 'a' * 10**6 }}", {})


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ (''|attr('__class__')|attr('__mro__'))[0] }}",
    "{{ ''|attr('__cl' ~ 'ass__')|attr('__base__') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{a.__class__.__mro__}'.format_map({'a': ''}) }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f('') }}",
    "{{ ['{0.__class__.__mro__}'] | map('format', '') | list }}",
    "{{ '{0.__globals__}'.format(raise_exception) }}",
    "{{ ('{0.__globals__}'|attr('format'))(strftime_now) }}",
    "{{ raise_exception.__globals__['os'].getpid() }}",
    "{{ strftime_now.__globals__.sys.modules }}",
    "{{ dict.__globals__ }}{{ dict.__globals__.os }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ joiner.__init__.__globals__.os.environ }}",
    "{{ namespace.__init__.__globals__.os.environ }}",
    "{{ namespace.mro() }}",
    "{{ self._TemplateReference__context.environment.globals }}",
    "{{ self.__init__.__globals__.os }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update(role='system') }}",
    "{{ messages[0].setdefault('a', 1) }}",
    "{% set ns = namespace(__class__=1) %}{{ ns }}",
    "{% set ns = namespace() %}{% set ns.__init__ = 1 %}{{ ns.__init__ }}",
    "{% macro m() %}{{ caller.__globals__.os }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% for i in [1] %}{{ loop.__init__.__globals__.os }}{% endfor %}",
    "{% generation %}{% endgeneration %}{{ environment.extensions.values() | list }}x{{ environment.a.b }}",
    "{{ range.__self__.__import__ }}{{ raise_exception.__self__.a }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.environ }}",
    "{% extends '/etc/passwd' %}",
    "{{ (1).__class__.from_bytes.__self__.a.b }}",
    "{{ messages[0].items().__class__.__init__.a }}",
    "{{ strftime_now.__code__.co_code }}",
    "{% set x = caller %}{{ x.gi_frame.f_globals }}",
]


@pytest.mark.parametrize("template", ESCAPES, ids=range(len(ESCAPES)))
def test_no_template_leaves_the_sandbox(template, ours):
    """Would catch a way from a template's values to Python's internals, or a changed message."""
    try:
        assert ours.render_chat(CONVERSATIONS[0], chat_template=template) == ""  # an undefined value
    except ValueError as error:
        assert_one_sentence(str(error))


def test_the_process_cannot_open_files_or_start_programs(tmp_path):
    """Would catch a hole in the sandbox being a hole in the machine: the second wall is tried without the first."""
    program = (
        "import importlib.util, subprocess, sys\n"
        "spec = importlib.util.spec_from_file_location('chat_template', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['chat_template'] = module\n"
        "spec.loader.exec_module(module); module._limit_resources()\n"
        "read, write = lambda: open('/etc/passwd'), lambda: open(sys.argv[2], 'w')\n"
        "for attempt in (read, write, lambda: subprocess.run(['ls'])):\n"
        "    try: attempt(); print('done')\n"
        "    except OSError: print('refused')\n"
    )
    command = [sys.executable, "-c", program, chat_template.__file__, str(tmp_path / "new")]
    nothing = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, **nothing)
    assert run.stdout.split() == ["refused"] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_has_no_secrets_of_the_environment(process, monkeypatch):
    """Would catch access tokens in the memory of a process that runs strangers' programs."""
    monkeypatch.setenv("SOME_TOKEN", "secret-of-the-user")
    process.render("warm", {})
    assert b"secret-of-the-user" not in Path(f"/proc/{process.process.pid}/environ").read_bytes()


# --- the process ------------------------------------------------------------------------------------------------------


def test_many_renders_take_one_process(process, monkeypatch):
    """Would catch a process per render, a tenth of a second each: reading a dataset would take hours."""
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: started.append(args) or popen(*args, **kwargs))
    for i in range(40):
        assert process.render("{{ x }}", {"x": i}) == str(i)
        with pytest.raises(TemplateError):
            process.render("{{ raise_exception('no') }}", {})
    assert len(started) == 1


def test_a_template_is_compiled_once():
    """Would catch a compilation per render, which takes longer than the render itself."""
    sources = []

    class Template:
        def __init__(self, source):
            sources.append(source)

        def generate(self, variables):
            yield variables["x"]

    lines = [json.dumps([source, {"x": source}]).encode() + b"\n" for source in ("a", "b", "a", "b", "a")]
    replies = io.BytesIO()
    chat_template._serve(lines, replies, chat_template._cached(Template))
    assert [json.loads(line)[0] for line in replies.getvalue().splitlines()] == list("ababa")
    assert sources == ["a", "b"]


def test_a_long_conversation_fits(ours):
    """Would catch limits made for small models: this is more text than a million tokens."""
    text = "A sentence with a few é and 日. " * 150_000
    assert text in ours.render_chat([{"role": "user", "content": text}], chat_template=CHATML)


def test_after_a_bomb_the_next_template_renders(process, monkeypatch):
    """Would catch one bad request taking the chat down."""
    for name in ("compare", "multiply", "macro"):  # out of time, out of memory, too deep
        with monkeypatch.context() as patch, pytest.raises(TemplateError):
            patch.setattr(chat_template, "RENDER_SECONDS", 0.15)
            process.render(BOMBS[name], {})
        assert process.render("{{ x }}", {"x": name}) == name


def test_a_process_that_died_is_replaced(process):
    """Would catch a chat that fails for good after the system ended the process."""
    assert process.render("a", {}) == "a"
    process.process.kill()
    process.process.wait()
    assert process.render("b", {}) == "b"


def test_an_interrupted_render_leaves_no_reply_behind(process, monkeypatch):
    """Would catch the next conversation receiving the text of the one that Ctrl-C ended."""
    process.render("warm", {})

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(chat_template, "_read_reply", interrupt)
        process.render("first", {})
    assert process.render("second", {}) == "second"


def test_threads_get_their_own_texts():
    """Would catch cross-talk between the requests of a server."""
    wrong = []

    def work(number: int) -> None:
        for i in range(20):
            mine = f"{number}-{i}"
            try:
                text = render_template("{{ x }}" * 50, {"x": mine})
            except Exception as error:  # a thread's exception would not fail the test
                text = str(error)
            if text != mine * 50:
                wrong.append(text)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_gets_its_own_texts(process, monkeypatch):
    """Would catch two processes that read from one pipe, or a lock that a thread held when the process forked."""
    processes = iter([process, chat_template._TemplateProcess()])
    monkeypatch.setattr(chat_template, "_TemplateProcess", lambda: next(processes))
    chat_template._template_process.cache_clear()
    render_template("warm", {})
    with process.lock:
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            texts = [render_template("{{ x }}", {"x": i}) for i in range(100)]
            os._exit(0 if texts == [str(i) for i in range(100)] else 1)
    texts = [render_template("{{ x }}", {"x": -i}) for i in range(100)]
    assert os.waitpid(pid, 0)[1] == 0
    assert texts == [str(-i) for i in range(100)]
    chat_template._template_process.cache_clear()  # the next test gets a process that nobody stops


PARENT = (
    "import importlib.util, sys\n"
    "spec = importlib.util.spec_from_file_location('chat_template', sys.argv[1])\n"
    "module = importlib.util.module_from_spec(spec); sys.modules['chat_template'] = module\n"
    "spec.loader.exec_module(module)\n"
    "process = module._TemplateProcess(); process.render('warm', {})\n"
    "print(process.process.pid, flush=True)\n"
    "process.render(sys.argv[2], {}); sys.stdin.read()\n"
)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("template", ["idle", pytest.param(BOMBS["nested_loops"], marks=pytest.mark.slow)])
def test_the_process_does_not_outlive_its_parent(template):
    """Would catch processes that collect on a machine, idle or at full load, after `kill -9`."""
    command = [sys.executable, "-c", PARENT, chat_template.__file__, template]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    for _ in range(6000):  # a minute: only a process that does not end at all takes so long
        if not is_running(child):
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the process outlived its parent")


def test_missing_jinja2_is_named(process, monkeypatch):
    """Would catch a ModuleNotFoundError, or an unexplained end of the process."""
    monkeypatch.setattr(chat_template.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'jinja2>=3.1.6'"):
        process.render("a", {})


def test_a_process_that_does_not_start_is_named(process, monkeypatch):
    """Would catch a wait without an end for a process that is not there."""
    monkeypatch.setattr(chat_template.sys, "executable", "/no/such/python")
    with pytest.raises(ValueError, match="does not start") as info:
        process.render("a", {})
    assert_one_sentence(str(info.value))
    monkeypatch.setattr(chat_template.sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="does not start") as info:
        process.render("a", {})
    assert_one_sentence(str(info.value))
