"""The command line of every script. jsonargparse reads it; text is taken as it is typed, and errors are sentences."""

import difflib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from jsonargparse import CLI, ArgumentError, ArgumentParser, Namespace

FREE_TEXT = ("stop",)  # lists of any text, in which [INST] is a text
TEXTS = ({str}, {Path})
LISTS = ({list[str]}, {list[str], str}, {list[Path]}, {list[Path], Path}, {list[int]})
LONGEST = 600  # characters of an error
DEEPEST = 200  # lists or mappings within each other, in a text that is read as YAML
MOST_ALIASES = 20  # in a configuration file; aliases of aliases stand for a number of values that grows exponentially
MAX_CONFIG_BYTES = 2**20


def run_main(main: Callable[..., Any]) -> None:
    """Call main with the command line's arguments. Raises ArgumentError, ValueError or what main raises."""
    CLI(main, as_positional=False, exit_on_error=False, allow_abbrev=False, parser_class=Parser)


def shorten(text: str) -> str:
    """One line of at most LONGEST characters: a message may repeat what it was given, and that may be a megabyte."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST * 2 // 3]} [...] {line[-LONGEST // 4 :]}"


class Parser(ArgumentParser):
    """jsonargparse's, with text as it is typed, switches without a value, --model.help, and errors for people."""

    def parse_args(self, args: Sequence[str] | None = None, **how: Any) -> Namespace:  # type: ignore[override]
        args = list(sys.argv[1:] if args is None else args)
        if "--model.help" in args and "--model" in self._option_string_actions:
            print(describe_fields())
            raise SystemExit(0)
        args, typed = take_text(self, args)
        try:
            parsed = super().parse_args(args, **how)
        except ArgumentError as e:
            raise ArgumentError(None, reword(self, str(e))) from e
        except RecursionError:
            raise ValueError("A configuration file has lists within lists that are too deep: write fewer.") from None
        for name, value in typed.items():
            parsed[name] = value
        if isinstance(parsed.get("model"), dict):
            check_fields(self, parsed["model"])
        return parsed

    def format_help(self) -> str:
        """jsonargparse's help, with types as people write them."""
        for action in self._actions:
            if types_of(action) == {list[Path]}:
                action.metavar = "PATHS"
        text = re.sub(r"<class\s+'(\w+)'>", r"\1", super().format_help())
        return re.sub(r"Optional\[(\w+\[[^\[\]]*\])\]", r"\1 | null", text)

    def _check_value_key(self, action: Any, value: Any, key: str, *more: Any, **how: Any) -> Any:
        """The value of an option in a configuration file, where a text is as typed too."""
        kind, option = types_of(action), f"--{key}"
        if isinstance(value, str) and kind in TEXTS:
            return as_text(option, value, kind)
        if isinstance(value, str) and kind in LISTS and kind != {list[int]}:
            return as_list(option, value, kind)
        return super()._check_value_key(action, value, key, *more, **how)


def option_type(parser: ArgumentParser, option: str) -> set[Any]:
    """The types that an option such as --stop takes, without None; empty for what is no option."""
    return types_of(parser._option_string_actions.get(option))


def types_of(action: Any) -> set[Any]:
    hint = getattr(action, "_typehint", None)
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return set(members) - {None, NoneType}


# ------------------------------------------------------------------------------------------------- what was typed


def take_text(parser: ArgumentParser, args: list[str]) -> tuple[list[str], dict[str, Any]]:
    """(the arguments as jsonargparse reads them, the texts and paths among them by the name of their option).

    jsonargparse reads a value as YAML, in which ### is a comment, null is nothing and "- x" is a list. It is given them
    all the same, since it checks what is required and prints the configuration.
    """
    out, typed, left = [], {}, list(args)
    while left:
        option, equals, value = left.pop(0).partition("=")
        option = option.removesuffix("+") if option.startswith("--") else option
        kind, given = option_type(parser, option), bool(equals) or bool(left) and not left[0].startswith("--")
        if given and kind in TEXTS + LISTS:
            out.append(f"{option}={take_value(parser, option, value if equals else left.pop(0), kind, typed)}")
        elif not given and is_switch(option, kind):
            out.append(f"{option}=true")
        elif given and option == "--config":
            value = value if equals else left.pop(0)
            if Path(value).is_file():  # a pipe of the shell's is read as it is
                check_config_file(parser, Path(value))
            out.append(f"--config={value}")
        else:
            check_option(parser, option, value)
            if not given and option.startswith("--model."):
                raise ArgumentError(None, needs_value(option))
            out.append(option + equals + value)
    return out, typed


def check_option(parser: ArgumentParser, option: str, value: str) -> None:
    """Raises ArgumentError for an option that there is not, before a missing one is missed; ValueError for a value that
    would end the process."""
    if option.startswith("--") and option.split(".")[0] not in {"--", *parser._option_string_actions}:
        raise ArgumentError(None, f"unrecognized arguments: {option}{suggestion(parser, option)}")
    if nests_deeply(value) or nests_deeply(option):
        raise ValueError(f"{option[:40]} {value[:40]}... has more than {DEEPEST} lists within each other: give fewer.")


def check_config_file(parser: ArgumentParser, path: Path) -> None:
    """Raises ValueError or OSError for a configuration file that holds no arguments, or would end or hang the process.

    Raises ArgumentError for an argument that there is not.
    """
    from lit_swa.formats.reading import read_bytes

    try:
        text = read_bytes(path, MAX_CONFIG_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is no UTF-8 text (byte {e.start}): write the arguments as YAML in UTF-8.") from None
    if nests_deeply(text):
        raise ValueError(f"{path} has more than {DEEPEST} lists within each other: give fewer.")
    if count_aliases(text) > MOST_ALIASES:
        raise ValueError(f"{path} has more than {MOST_ALIASES} YAML aliases (*NAME): write the values out.")
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # whoever reads the values says what is wrong
        return
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no arguments: write one a line, as in max_new_tokens: 100.")
    for name in values:
        check_option(parser, f"--{name}", "")


def count_aliases(text: str) -> int:
    if text.count("*") <= MOST_ALIASES:
        return 0
    try:
        tokens = yaml.scan(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return sum(isinstance(token, yaml.AliasToken) for token in tokens)
    except yaml.YAMLError:
        return 0


def take_value(parser: ArgumentParser, option: str, value: str, kind: set[Any], typed: dict[str, Any]) -> str:
    """What jsonargparse is given for a text, a path or a list of them, which is put into `typed`."""
    name = option.removeprefix("--")
    if kind == {list[int]}:
        check_option(parser, option, value)
        return value if value.lstrip().startswith("[") else f"[{value}]"
    if kind in TEXTS:
        typed[name] = as_text(option, value, kind)
    else:
        typed[name] = as_list(option, value, kind, typed.get(name))
    items = typed[name] if isinstance(typed[name], list) else [typed[name]]
    several = isinstance(typed[name], list) or kind == {list[str], str}  # such a text alone may look like a list
    value = json.dumps([str(item) for item in items]) if several else str(typed[name])
    if nests_deeply(value) or re.search("[\ud800-\udfff]", value):
        return "." if kind in TEXTS else '["."]'  # a stand-in for what it cannot read
    return value


def nests_deeply(text: str) -> bool:
    """True for YAML with many lists within each other: its library in C crashes on some ten thousand."""
    if sum(map(text.count, "[{-?:")) <= DEEPEST:
        return False
    depth = 0
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                return True
    except yaml.YAMLError:  # jsonargparse says what is wrong
        pass
    return False


def is_switch(option: str, kind: set[Any]) -> bool:
    """True if the option is true or false; so are some fields of the config."""
    if not option.startswith("--model."):
        return kind == {bool}
    from lit_swa.config import Config

    return any(f.name == option.removeprefix("--model.") and f.type is bool for f in fields(Config))


def as_list(option: str, value: str, kind: set[Any], before: Any = None) -> Any:
    """The value of an option that takes several texts or paths. before: that of the same option earlier.

    An option of the type list[str] | str takes each text whole, one in brackets too.
    """
    values = before if isinstance(before, list) else [] if before is None else [before]
    texts = [value] if str in kind else split_list(option.removeprefix("--"), value)
    values = values + [as_text(option, text, kind) for text in texts]
    return values[0] if len(kind) == 2 and len(values) == 1 else values  # one alone is welcome too


def as_text(option: str, value: str, kind: set[Any]) -> str | Path:
    """Raises ValueError for a path that is empty, and for text whose bytes are not UTF-8."""
    if kind & {Path, list[Path]}:
        if not value:
            raise ValueError(f"{option} is empty: give a path.")
        return Path(value)
    try:
        return os.fsencode(value).decode()  # Python may have read the arguments as ASCII
    except UnicodeDecodeError as e:
        raise ValueError(f"{option} is no UTF-8 text (byte {e.start}): set the terminal to UTF-8.") from None
    except UnicodeEncodeError:  # of a file system in another encoding, where nothing was lost
        return value


def split_list(name: str, text: str) -> list[str]:
    """The items of a list in brackets, JSON's or YAML's, each as it is written there. Any other text is one item.

    Raises ValueError where free text may be meant one way or the other.
    """
    if not re.fullmatch(r"\s*\[.*\]\s*", text, re.DOTALL):
        if name in FREE_TEXT and re.search(r"\\[nrt]", text):
            meant = re.sub(r"\\([nrt])", lambda found: {"n": "\n", "r": "\r", "t": "\t"}[found[1]], text)
            raise ValueError(
                f"--{name} {text} may mean white space or a backslash: write --{name} '{json.dumps([meant])}' or "
                f"--{name} '{json.dumps([text])}'."
            )
        return [text]
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        node = None
    items = node.value if isinstance(node, yaml.SequenceNode) else None
    clear = items is not None and all(isinstance(item, yaml.ScalarNode) for item in items)
    if clear and name in FREE_TEXT and len(items) == 1:
        clear = items[0].style is not None  # a quoted one
    if not clear:
        raise ValueError(
            f"--{name} {text} may mean a list or a text in brackets: write a list with each text in double quotes, and "
            f"this text as --{name} '{json.dumps([text])}'."
        )
    return [item.value for item in items]


# -------------------------------------------------------------------------------------------------------- the errors


def check_fields(parser: ArgumentParser, model: dict[str, Any]) -> None:
    """Raises ValueError, with the names that are near, for a field that the config does not have."""
    from lit_swa.config import reject_unknown_fields

    for name in model:
        if f"--{name}" in parser._option_string_actions:
            raise ValueError(f"{name} is no field of the config but an argument of its own: give --{name}.")
    reject_unknown_fields(model)


def reword(parser: ArgumentParser, message: str) -> str:
    """What jsonargparse says of its keys and types, in the words of the command line."""
    if found := re.fullmatch(r"argument (--\S+?)(/\S+)?: expected one argument", message):
        return needs_value(found[1])
    if found := re.fullmatch(r"the following arguments are required: (.*)", message):
        return f"{', '.join(f'--{name}' for name in found[1].split(', '))} is missing: give it a value."
    if message.startswith("unrecognized arguments: "):
        return f"{message}{suggestion(parser, message.partition(': ')[2])}"
    found = re.match(r'Parser key "([^"]+)":\s*(.*)', message, re.DOTALL)
    if not found:
        return message
    option, reason = f"--{found[1]}", found[2]
    value = re.match(r".*(?:Given|Got) value: (.*)", reason, re.DOTALL)
    kind = option_type(parser, option)
    if not value or not kind:
        return f"{option} is missing: give it a value." if "required" in reason else f"{option}: {reason}"
    wanted = " or ".join(sorted(describe_type(t, option) for t in kind))
    return f"{option} {value[1]} does not fit: give {wanted}."


def needs_value(option: str) -> str:
    return f"{option} needs a value; one that begins with two dashes is given as {option}=VALUE."


def suggestion(parser: ArgumentParser, unknown: str) -> str:
    """The option that was meant, or a word on values that fell apart."""
    options = [option for option in parser._option_string_actions if option.startswith("--")]
    word = unknown.split()[0].partition("=")[0]
    near = difflib.get_close_matches(word.replace("-", "_"), [o.replace("-", "_") for o in options], n=1)
    begun = [option for option in options if option.startswith(word)]
    if near or begun:
        return f": did you mean --{(near or begun)[0].lstrip('_-')}?"
    return "" if word.startswith("-") else ": a value with spaces needs quotes."


def describe_type(kind: Any, option: str) -> str:
    """What to give for an option of this type."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is dict:
        return f"{option}.NAME VALUE, or a JSON object"
    if kind == list[int]:
        return f"whole numbers, as {option} '[1,2]'"
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "a text")


# --------------------------------------------------------------------------------------------------- the model's fields


def describe_fields() -> str:
    """The fields of the config with their types, defaults and meanings, which are the comments of config.py."""
    from lit_swa.config import Config

    lines = ["Fields of the model's config, as --model.FIELD VALUE. A checkpoint's lit_config.json has its own values."]
    defaults = {f.name: f.default for f in fields(Config)}
    for line in inspect.getsource(Config).splitlines():
        section = re.fullmatch(r"    # (.*)", line)
        field = re.fullmatch(r"    (\w+): ([^=#]+) = .*?(?:  # (.*))?", line)
        if section:
            lines.append(f"\n{section[1]}:")
        elif field and field[1] in defaults:
            default = "null" if defaults[field[1]] is None else json.dumps(defaults[field[1]])
            lines.append(f"  {field[1]}: {field[2]}, by default {default}".replace("None", "null"))
            lines += [f"      {field[3]}".replace("None", "null")] if field[3] else []
        elif line.startswith("    def "):
            break
    return "\n".join(lines)
