"""The command line: text as it is typed, errors in words of its own, pipes and consoles of every kind."""

import io
import json
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import pytest
from jsonargparse import ArgumentError

from lit_swa import utils
from lit_swa.command_line import describe_fields, run_main
from lit_swa.config import Config
from lit_swa.texts import read_line, read_stdin
from lit_swa.utils import describe_command, run_script

GOT: dict[str, Any] = {}


def script(
    data: list[Path] | Path = Path("a.txt"),
    prompt: str = "once",
    texts: list[str] | str = "once",
    system: str | None = None,
    output: Path | None = None,
    stop: list[str] | None = None,
    methods: list[str] | None = None,
    lengths: list[int] | None = None,
    steps: int | None = None,
    score: Literal["all", "last"] = "all",
    compile: bool = False,
    own: bool | None = None,
    dtype: str = "auto",
    model: dict[str, Any] | None = None,
) -> None:
    """Remember the arguments.

    Args:
        prompt: A text.
    """
    GOT.clear()
    GOT.update(locals())


@pytest.fixture
def parse(monkeypatch):
    """The values that the script above gets for these arguments."""

    def parse(*arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
        run_main(script)
        return GOT

    return parse


@pytest.mark.parametrize(
    "typed",
    [
        "###",
        ".",
        "User:",
        "- x",
        "-x",
        "[",
        "x]",
        '"',
        "'",
        "null",
        "~",
        "1",
        "true",
        "&a",
        "*a",
        "{",
        "a: b",
        "\n",
        "#",
        "a b",
    ],
)
def test_text_is_taken_as_it_is_typed(parse, typed):
    """Catches: a value read as YAML, in which ### is a comment, null is nothing and "- x" is a list."""
    for arguments in (("--stop", typed), (f"--stop={typed}",)):
        assert parse(*arguments)["stop"] == [typed]
    got = parse("--prompt", typed, "--system", typed, "--output", typed, "--data", typed)
    assert (got["prompt"], got["system"], got["output"], got["data"]) == (typed, typed, Path(typed), Path(typed))


@pytest.mark.parametrize("typed", ["[INST] a", '["a", "b"]', "[", "- x", "null", "{}", "a\nb", r"a\n", ""])
def test_a_text_that_may_be_given_several_times_is_taken_whole(parse, tmp_path, typed, capsys):
    """Catches: a prompt in brackets that becomes a list, on the command line, in a file, or printed and read again."""
    assert parse()["texts"] == "once" and parse("--texts", typed)["texts"] == typed
    assert parse("--texts", typed, "--texts", "x", f"--texts={typed}")["texts"] == [typed, "x", typed]
    for value, expected in ((typed, typed), ([typed, "x"], [typed, "x"])):
        (tmp_path / "c.yaml").write_text(json.dumps({"texts": value}))
        assert parse("--config", str(tmp_path / "c.yaml"))["texts"] == expected
    with pytest.raises(SystemExit):
        parse("--texts", typed, "--print_config")
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert parse("--config", str(tmp_path / "c.yaml"))["texts"] == [typed]


def test_text_in_a_configuration_file_is_taken_as_it_stands(parse, tmp_path):
    """Catches: a text of a YAML file that is read as YAML once more, and is nothing then."""
    (tmp_path / "c.yaml").write_text("stop: '###'\nsystem: 'null'\ndata: 'a: b'\noutput: '~'\nmethods: [rope]\n")
    got = parse("--config", str(tmp_path / "c.yaml"))
    assert (got["stop"], got["system"], got["methods"]) == (["###"], "null", ["rope"])
    assert (got["data"], got["output"]) == (Path("a: b"), Path("~"))
    assert parse("--config", str(tmp_path / "c.yaml"), "--stop", "#")["stop"] == ["#"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"promt: x\n", "--promt: did you mean --prompt?"),
        (b"prompt: \xe9\n", "c.yaml is no UTF-8 text (byte 8)"),
        (b"", "c.yaml holds no arguments"),
        (b"[1, 2]", "c.yaml holds no arguments"),
        (b"[" * 50_000, "c.yaml has more than 200 lists"),
        (b"- " * 50_000, "c.yaml has more than 200 lists"),
        (b"model: {atention: full}", "did you mean attention"),
    ],
)
def test_a_configuration_file_that_does_not_fit_is_told_in_a_sentence(content, message, parse, tmp_path, monkeypatch):
    """Catches: a parser's words, a file without its name, a crash."""
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises((ValueError, ArgumentError), match=re.escape(message)):
        parse("--config", str(tmp_path / "c.yaml"))
    many = f'prompt: "{"[ - " * 300}"\nsteps: 3'
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbf" + many.encode())
    assert parse("--config", str(tmp_path / "c.yaml"))["steps"] == 3


def test_deep_nesting_does_not_reach_the_library_that_crashes_on_it(parse):
    """Catches: a prompt of brackets that ends the process."""
    deep = "[" * 50_000
    assert parse("--prompt", deep, "--stop", deep)["stop"] == [GOT["prompt"]] == [deep]
    with pytest.raises(ValueError, match="more than 200 lists"):
        parse("--model", deep)


ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    "content, message",
    [
        (ALIASES, "more than 20 YAML aliases"),
        ("prompt: " + "[" * 50_000, "more than 200 lists"),
        ("model:\n" + "".join(" " * i + "-\n" for i in range(1, 1200)), "more than 200 lists"),
        ("prompt: caf\udce9", "c.yaml is no UTF-8 text"),
        ("prompt: " + "x" * 2**20, "more than 1,048,576 bytes"),
    ],
)
def test_a_configuration_file_that_would_hang_or_crash_is_refused(parse, tmp_path, content, message):
    """Catches: aliases of aliases, which stand for 2^40 values, and a library in C that overflows its stack."""
    (tmp_path / "c.yaml").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message):
        parse("--config", str(tmp_path / "c.yaml"))


def test_stars_and_brackets_in_a_configuration_files_text_are_text(parse, tmp_path):
    """Catches: an asterisk taken for an alias of YAML, a bracket for a list, of which only so many are allowed."""
    (tmp_path / "c.yaml").write_text("system: '" + "*a [b] " * 300 + "'\n")
    assert parse("--config", str(tmp_path / "c.yaml"))["system"] == "*a [b] " * 300


def test_arguments_that_python_read_as_ascii_are_text(parse):
    """Catches: a C locale, in which the bytes of a letter become surrogates that no tokenizer takes."""
    hidden = "caf\u00e9 \u4f60".encode().decode("ascii", "surrogateescape")
    got = parse("--prompt", hidden, "--system", hidden, "--stop", hidden)
    assert got["prompt"] == got["system"] == "caf\u00e9 \u4f60" and got["stop"] == ["caf\u00e9 \u4f60"]
    assert parse("--data", "caf\udce9", "--output", "caf\udce9")["data"] == GOT["output"] == Path("caf\udce9")


@pytest.mark.parametrize(
    "arguments, stops",
    [
        (["--stop", '["###", "\\n"]'], ["###", "\n"]),
        (["--stop", "[a, null, 1]"], ["a", "null", "1"]),
        (["--stop", "['x']"], ["x"]),
        (["--stop", "a", "--stop=b"], ["a", "b"]),
        (["--stop", "[]"], []),
    ],
)
def test_several_stops_come_as_a_list_or_one_by_one(parse, arguments, stops):
    """Catches: an earlier stop that a later one replaces, items read as numbers or as nothing."""
    assert parse(*arguments)["stop"] == stops


@pytest.mark.parametrize("typed", ["[INST]", "[###, User:]", "[User: , b]", "[[a]]", "\\n", "\\nabla"])
def test_a_stop_that_may_mean_two_things_is_refused_with_the_form(parse, typed):
    """Catches: a stop that is silently another text than the one that was meant."""
    with pytest.raises(ValueError, match=r"write .*\["):
        parse("--stop", typed)


def test_lists_and_switches_need_no_json(parse):
    """Catches: --compile, which wants a value; a single path or number refused for want of brackets."""
    got = parse("--compile", "--own", "--steps", "3", "--model.rolling_kv_cache", "--model.n_layer", "2")
    assert got["compile"] is got["own"] is True and got["steps"] == 3
    assert got["model"] == {"rolling_kv_cache": True, "n_layer": 2}
    got = parse("--compile", "false", "--lengths", "1,2", "--methods", "[rope, ntk]", "--data", "a", "--data", "b")
    assert got["compile"] is False and got["lengths"] == [1, 2] and got["methods"] == ["rope", "ntk"]
    assert got["data"] == [Path("a"), Path("b")] and parse("--lengths", "[7]")["lengths"] == [7]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--promt", "x"], "unrecognized arguments: --promt: did you mean --prompt?"),
        (["--pro", "x"], "did you mean --prompt?"),
        (["--lenghts", "1"], "did you mean --lengths?"),
        (["--prompt", "a", "b c"], "b c: a value with spaces needs quotes"),
        (["--prompt"], "--prompt needs a value"),
        (["--model.n_layer"], "--model.n_layer needs a value"),
        (["--steps", "x"], "--steps x does not fit: give a whole number."),
        (["--score", "some"], "--score some does not fit: give one of all, last."),
        (["--compile", "maybe"], "--compile maybe does not fit: give true or false."),
        (["--lengths", "a"], "whole numbers, as --lengths '[1,2]'"),
        (["--model", "x"], "give --model.NAME VALUE"),
        (["--model.dtype", "x"], "dtype is no field of the config but an argument of its own: give --dtype"),
        (["--model.atention", "x"], "did you mean attention"),
        (["--output", ""], "--output is empty: give a path."),
        (["--system", "\udcff"], "--system is no UTF-8 text (byte 0)"),
    ],
)
def test_errors_are_in_the_words_of_the_command_line(monkeypatch, arguments, message, capsys):
    """Catches: a parser's words on types and keys, a traceback, a misspelt argument without a suggestion."""
    with pytest.raises(SystemExit) as end:
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
        run_script(script)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and message in error
    assert len(error.splitlines()) == 1 and not any(word in error for word in ("Union", "<class", "Parser key"))


def test_every_field_of_the_config_is_explained(parse, capsys):
    """Catches: a --model.help that lists nothing, a field without a meaning."""
    with pytest.raises(SystemExit) as end:
        parse("--model.help")
    printed = capsys.readouterr().out
    assert end.value.code == 0 and printed.strip() == describe_fields()
    for f in fields(Config):
        _, found, rest = printed.partition(f"\n  {f.name}: ")
        assert found and rest.split("\n")[1].startswith("      "), f"{f.name} has no comment in config.py"


def fail(message: str):
    def main() -> None:
        raise ValueError(message)

    return main


def test_a_message_has_a_bounded_length(monkeypatch, capsys):
    """Catches: a megabyte of input that an error repeats."""
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit):
        run_script(fail("the beginning " + "x y" * 500_000 + " the end"))
    error = capsys.readouterr().err
    assert len(error) < 700 and error.startswith("error: the beginning") and error.endswith("the end\n")


def test_an_error_of_the_system_has_a_remedy(monkeypatch, capsys, tmp_path):
    """Catches: a number of the system's in place of a sentence, with nothing to do about it."""
    monkeypatch.setattr(sys, "argv", ["script.py"])

    def main() -> None:
        open(tmp_path)

    with pytest.raises(SystemExit):
        run_script(main)
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path} cannot be used (Is a directory): check the path, its rights and its disk.\n"
    )


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK"])
def test_of_several_processes_the_first_says_an_error(monkeypatch, capsys, variable):
    """Catches: a sentence, or the loss of the first process with its traceback, once more from each other process."""
    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr(utils.time, "sleep", lambda seconds: None)
    monkeypatch.setenv(variable, "1")
    late = iter([7, 7, 7, 7, 1, 1])  # the first one needs longer than PATIENCE to meet its error, and to end
    for patience, parents, said in ((0, iter([7, 7]), "error: no text\n"), (0, iter([7, 1]), ""), (99, late, "")):
        monkeypatch.setattr(utils, "PATIENCE", patience)
        monkeypatch.setattr(os, "getppid", lambda parents=parents: next(parents))
        with pytest.raises(SystemExit) as end:
            run_script(fail("no text"))
        assert end.value.code == 2 and capsys.readouterr().err == said


def say(text: str, times: int = 1):
    def main(n: int = 1) -> None:
        for _ in range(times):
            print(text)

    return main


@pytest.mark.parametrize("arguments, times", [([], 1), ([], 10_000), (["--help"], 1)])
def test_a_pipe_whose_reader_has_gone_ends_without_a_word(monkeypatch, capfd, arguments, times):
    """Catches: "Broken pipe" called an error, at a print or in what is written at the very end."""
    reading, writing = os.pipe()
    os.close(reading)
    stdout = os.fdopen(writing, "w")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    with pytest.raises(SystemExit) as end:
        run_script(say("hello", times))
    assert end.value.code == 141
    stdout.close()  # as Python does at its end
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1"])
def test_a_console_replaces_what_it_cannot_show(monkeypatch, encoding):
    """Catches: a run that an emoji ends."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    monkeypatch.setattr(sys, "argv", ["script.py"])
    run_script(say("a\u4f60\U0001f600b"))
    assert written.getvalue() == b"a??b\n"


@pytest.mark.parametrize(
    "data, text",
    [
        (b"\xef\xbb\xbfHi\r\nyou", "Hi\nyou"),
        ("caf\u00e9\n".encode(), "caf\u00e9\n"),
        ("caf\u00e9".encode("latin-1"), "no UTF-8 text (byte 3)"),
        ("Hi".encode("utf-16"), "no UTF-8 text (byte 0)"),
        ("Hi".encode("utf-16-le"), "no UTF-8 text (it holds zeros)"),
    ],
)
def test_standard_input_is_read_as_a_file_is(monkeypatch, data, text):
    """Catches: a byte order mark and carriage returns in the prompt, bytes read in the console's encoding."""
    for read in (read_stdin, read_line):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="cp1252"))
        if "UTF-8" in text:
            with pytest.raises(ValueError, match="standard input is no UTF-8 text") as error:
                read()
            assert text in str(error.value)
        else:
            assert read() == (text if read is read_stdin else text.split("\n")[0])


def test_a_results_command_has_all_that_was_typed(monkeypatch):
    """Catches: flags that are lost behind --output, and words that a shell would take apart."""
    words = ["scripts/x.py", "--output", "a.json", "--methods", "[a, b]", "--repeats=3", "--output=b.json"]
    monkeypatch.setattr(sys, "argv", words)
    assert describe_command("--output") == "python scripts/x.py --methods '[a, b]' --repeats=3"
