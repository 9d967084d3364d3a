"""Chat templates: programs in jinja2 that come with a model, rendered where they can do no harm.

    text = render_template(source, {"messages": [...], "add_generation_prompt": True, ...})

jinja2's sandbox keeps a template away from Python's internals, but it bounds neither time nor memory: `'a' * 10**10`
is one call in C, and nothing in the same process can interrupt it. So a child process renders. It is started when
first needed and then kept. It has an address space of RENDER_BYTES, opens and writes no files, starts no programs, and
is killed after RENDER_SECONDS. Requests and replies are lines of JSON. A normal template takes about a millisecond,
the first one about 0.1 s more.

This file is also the program of the child. It imports the standard library, and jinja2 only in the child.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

RENDER_SECONDS = 3.0  # one chat template, one conversation
RENDER_BYTES = 256 * 2**20  # address space of the child
RENDER_CHARS = 16 * 2**20  # length of the rendered text, several million tokens
START_SECONDS = 60.0  # for the child to start


class TemplateError(Exception):
    """Why a template gave no text, as the end of a sentence that begins with the template."""


def render_template(source: str, variables: dict[str, Any]) -> str:
    """The text that the template `source` makes of `variables`.

    Raises:
        TemplateError: the template is wrong, refuses the conversation (raise_exception), or exceeds a limit.
        ValueError: the variables are not plain data, jinja2 is missing, or the child does not start.
    """
    return _template_process(os.getpid()).render(source, variables)


def one_line(text: str, limit: int = 300) -> str:
    """`text` on one line, without a full stop at its end."""
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= limit else line[:limit] + " ..."


# ----------------------------------------------------------------------------------------------------------------------
# In this process


@functools.lru_cache(maxsize=1)
def _template_process(pid: int) -> _TemplateProcess:
    """The child of this process. After a fork `pid` differs, so that two processes never share one."""
    return _TemplateProcess()


class _TemplateProcess:
    """The child that renders. A template that exceeds a limit ends it; the next one starts it again."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def render(self, source: str, variables: dict[str, Any]) -> str:
        """See `render_template`. Threads take turns."""
        try:
            request = json.dumps([source, variables], default=_plain_value).encode("ascii") + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"The conversation is not plain data: {one_line(str(error))}.") from None
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            text, why = self._exchange(request, RENDER_SECONDS)
        if why:
            raise TemplateError(one_line(why))
        return text

    def stop(self) -> None:
        """Ends the child, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()  # waits, and closes the pipes
            self.process = None

    def _start(self) -> None:
        self.stop()
        specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
        if not all(specs):
            raise ValueError("Chat templates need jinja2: run pip install 'jinja2>=3.1.6'.")
        # -I: no environment variables, no user directories, no current directory decide what the child imports.
        command = [sys.executable or "python3", "-I", str(Path(__file__).resolve())]
        command += [str(Path(spec.origin).parents[1]) for spec in specs]
        kept = ("PATH", "TZ", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        try:  # a session of its own: Ctrl-C is for us, and the child ends when its input does
            self.process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        except OSError as error:
            raise ValueError(f"The process for chat templates does not start: {one_line(str(error))}.") from None
        _, why = self._exchange(b"", START_SECONDS)  # its first line says whether it is ready
        if why:
            raise ValueError(f"The process for chat templates does not start ({command[0]}): it {one_line(why)}.")

    def _exchange(self, request: bytes, seconds: float) -> tuple[str, str]:
        """Sends a line and waits for the child's next one: the text, and why there is none."""
        process, expired, answered = self.process, threading.Event(), False
        timer = threading.Timer(seconds, lambda: (expired.set(), process.kill()))
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(request)
            process.stdin.flush()
            text, why = _read_reply(process.stdout)
            answered = True
            return text, why
        except (OSError, ValueError):  # a broken pipe, no line or half a line: the child has ended
            why = f"took longer than {seconds:g} s" if expired.is_set() else "needs too much memory or nests too deeply"
            return "", f"{why} and was stopped"
        finally:  # Ctrl-C would leave the reply for the next request to read
            timer.cancel()
            if expired.is_set() or not answered:
                self.stop()


def _read_reply(pipe: BinaryIO) -> list[str]:
    return json.loads(pipe.readline(6 * RENDER_CHARS + 2**16))  # JSON spells a character in at most six bytes


def _plain_value(value: Any) -> Any:
    """JSON for what json does not know: templates see data, never objects with methods."""
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist") and getattr(value, "ndim", 1) == 0:  # a number of numpy or torch
        return value.tolist()
    if callable(getattr(value, "model_dump", None)):  # pydantic
        return value.model_dump()
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return {name: getattr(value, name) for name in value.__dataclass_fields__}
    return f"<{type(value).__name__}>"


# ----------------------------------------------------------------------------------------------------------------------
# In the child


_cached = functools.lru_cache(maxsize=16)  # compiled templates: a dataset uses one, and compiling takes longest


def _serve(requests: Iterable[bytes], replies: BinaryIO, compiled: Callable[[str], Any]) -> None:
    """Answers each line of `requests`. MemoryError and RecursionError end it: the parent starts a fresh child."""
    alarm = getattr(signal, "alarm", lambda seconds: None)  # Windows has none
    for request in requests:
        source, variables = json.loads(request)
        alarm(int(RENDER_SECONDS) + 1)  # ends this process if the one that would kill it is gone
        reply = _rendered(compiled, source, variables)
        alarm(0)
        del source, variables
        _write_reply(replies, *reply)


def _write_reply(pipe: BinaryIO, text: str, why: str) -> None:
    pipe.write(json.dumps([text, why], ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    pipe.flush()


def _rendered(compiled: Callable[[str], Any], source: str, variables: dict[str, Any]) -> tuple[str, str]:
    """The text, and why there is none."""
    from jinja2 import TemplateSyntaxError

    try:
        pieces, size = [], 0
        for piece in compiled(source).generate(variables):
            pieces.append(piece)
            size += len(piece)
            if size > RENDER_CHARS:
                return "", f"wrote more than {RENDER_CHARS:,} characters and was stopped"
        return "".join(pieces), ""
    except (MemoryError, RecursionError):
        raise
    except TemplateSyntaxError as error:
        return "", f"is not valid in line {error.lineno}: {error.message}"
    except Exception as error:
        return "", f"failed: {str(error)[:1000] or type(error).__name__}"


def _template_environment() -> Any:
    """jinja2 as chat templates expect it: with the functions, the filter and the tag that transformers gives them."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if tuple(map(int, re.findall(r"\d+", jinja2.__version__)[:3])) < (3, 1, 6):
        raise ImportError(f"jinja2 {jinja2.__version__} has known holes, run pip install 'jinja2>=3.1.6'")

    def raise_exception(message: Any) -> None:
        raise ValueError(message)

    def to_json(x: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # jinja2's own filter escapes for HTML; models were trained on plain JSON
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = [_generation_tag(), loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals |= {  # functions only: a template gets no class to climb from
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": _namespaces(),
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
    }
    return environment


def _generation_tag() -> type:
    """{% generation %} ... {% endgeneration %} marks what the model wrote; the text is the same without it."""
    import jinja2
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    return Generation


def _namespaces() -> Callable[..., Any]:
    """A function, and so no class, that makes namespaces without names that begin with an underscore."""
    import jinja2

    class Namespace(jinja2.utils.Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the name {name!r}")
            super().__setitem__(name, value)

    def namespace(*args: Any, **kwargs: Any) -> Namespace:
        space = Namespace()
        for name, value in dict(*args, **kwargs).items():
            space[name] = value
        return space

    return namespace


def _import_late_modules(compiled: Callable[[str], Any]) -> None:
    """What jinja2 and Python import when it is first used has to be here before files can no longer be opened."""
    for name in ("jinja2.constants", "jinja2.debug", "unicodedata", "linecache", "encodings.latin_1"):
        importlib.import_module(name)
    for source in ("{{ 'caf\\xe9\\n' | upper | tojson }}{{ strftime_now('%d %b %Y') }}", "{{ none.a.b }}", "{% if %}"):
        _rendered(compiled, source, {})


def _limit_resources() -> None:
    """No more memory than RENDER_BYTES, no files, no further processes, where the system can say so."""
    try:
        import resource
    except ImportError:  # Windows: the time limit and the limit on the output remain
        return
    limits = {"RLIMIT_AS": RENDER_BYTES, "RLIMIT_NOFILE": 3, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0, "RLIMIT_NPROC": 0}
    for name, value in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (value, value))


def _main() -> None:
    sys.path[:0] = sys.argv[1:]
    try:
        compiled = _cached(_template_environment().from_string)
        _import_late_modules(compiled)
    except Exception as error:
        return _write_reply(sys.stdout.buffer, "", f"failed: {error}")
    _limit_resources()
    _write_reply(sys.stdout.buffer, "", "")
    _serve(sys.stdin.buffer, sys.stdout.buffer, compiled)


if __name__ == "__main__":
    _main()
