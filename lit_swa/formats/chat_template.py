"""Chat templates: programs in jinja2 that come with a model, rendered where they can do no harm.

    text = render_template(source, {"messages": [...], "add_generation_prompt": True, ...})

jinja2's sandbox keeps a template from Python's internals. It does not keep it from `'a' * 10**10`, from comparing two
lists that hold themselves thirty levels deep, or from a million nested loops, and many such steps are one call in C
that no check in the same process interrupts. So one process is started when first needed and then kept; it has an
address space of RENDER_BYTES, opens and writes no files, and is killed after RENDER_SECONDS. Only JSON and text pass
between the two. A normal template takes about a millisecond, the first one about 0.1 s more.

This file is also the program of that process. It imports the standard library, and jinja2 only there.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

RENDER_SECONDS = 3.0  # one chat template, one conversation
RENDER_BYTES = 256 * 2**20  # address space of the process that renders
RENDER_CHARS = 16 * 2**20  # length of the rendered text, several million tokens
START_SECONDS = 60.0  # for the process to start


class TemplateError(Exception):
    """Why a template gave no text, as the end of a sentence that begins with the template."""


def render_template(source: str, variables: dict[str, Any]) -> str:
    """The text that the template `source` makes of `variables`.

    Raises:
        TemplateError: the template is wrong, refuses the conversation (raise_exception), or exceeds a limit.
        ValueError: the variables are not plain data, jinja2 is missing, or the process does not start.
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
    """The process that renders for this one. After a fork `pid` differs, and parent and child never share one."""
    return _TemplateProcess()


class _TemplateProcess:
    """The process that renders: started when first needed, ended by a render that exceeds a limit, started again."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.stop: Callable[[], Any] = lambda: None

    def render(self, source: str, variables: dict[str, Any]) -> str:
        """See `render_template`. Threads take turns."""
        try:
            request = json.dumps([source, variables], default=_plain_value).encode("ascii")
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"The conversation is not plain data: {one_line(str(error))}.") from None
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            status, reply = self._exchange(request, RENDER_SECONDS)
        if status != _OK:
            raise TemplateError(one_line(reply.decode("utf-8", "replace")))
        return reply.decode("utf-8", "surrogatepass")

    def _start(self) -> None:
        self.stop()
        paths = []
        for name in ("jinja2", "markupsafe"):
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin is None:
                raise ValueError("Chat templates need jinja2: run pip install 'jinja2>=3.1.6'.")
            paths.append(str(Path(spec.origin).parents[1]))
        # -I: no environment variables, no user directories, no current directory decide what the process imports.
        command = [sys.executable or "python3", "-I", str(Path(__file__).resolve()), json.dumps(paths)]
        kept = ("PATH", "TZ", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        try:  # a session of its own: Ctrl-C is for us, and the process ends when its input does
            self.process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        except OSError as error:
            raise ValueError(f"The process for chat templates does not start: {one_line(str(error))}.") from None
        self.stop = weakref.finalize(self, _stop_process, self.process, os.getpid())
        status, reply = self._exchange(None, START_SECONDS)
        if status != _OK:
            why = one_line(reply.decode("utf-8", "replace"))
            raise ValueError(f"The process for chat templates does not start ({' '.join(command[:2])}): it {why}.")

    def _exchange(self, request: bytes | None, seconds: float) -> tuple[int, bytes]:
        """Sends a request (None: only listens) and waits for the reply, at most so long. The process ends with it."""
        process, expired = self.process, threading.Event()
        timer = threading.Timer(seconds, lambda: (expired.set(), process.kill()))
        timer.daemon = True
        timer.start()
        try:
            if request is not None:
                _write_frame(process.stdin, _OK, request)
            status, reply = _read_frame(process.stdout, 4 * RENDER_CHARS + 2**16)
        except (OSError, EOFError):
            why = f"took longer than {seconds:g} s" if expired.is_set() else "needs too much memory or nests too deeply"
            status, reply = _ERROR_LAST, f"{why} and was stopped".encode()
        except BaseException:  # Ctrl-C here would leave a reply for the next request to read
            self._end()
            raise
        finally:
            timer.cancel()
        if status == _ERROR_LAST or expired.is_set():
            self._end()
        return status, reply

    def _end(self) -> None:
        self.stop()
        self.process = None


def _stop_process(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a forked child inherits the object, not the process
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            pipe.close()


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
# In the process that renders

_OK, _ERROR, _ERROR_LAST = 0, 1, 2  # the last one: the process does not go on after this reply


class _Frame(NamedTuple):
    status: int
    data: bytes


def _write_frame(pipe: BinaryIO, status: int, data: bytes) -> None:
    pipe.write(struct.pack("<BQ", status, len(data)))
    pipe.write(data)
    pipe.flush()


def _read_frame(pipe: BinaryIO, limit: int) -> _Frame:
    status, size = struct.unpack("<BQ", _read_exactly(pipe, 9))
    if size > limit:
        raise EOFError
    return _Frame(status, _read_exactly(pipe, size))


def _read_exactly(pipe: BinaryIO, size: int) -> bytes:
    data = pipe.read(size)
    if len(data) != size:
        raise EOFError
    return data


def _serve_templates() -> None:
    """Renders what comes on stdin until it ends, or until a render used up the memory."""
    sys.path[:0] = json.loads(sys.argv[1])
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    try:
        compiled = functools.lru_cache(maxsize=16)(_template_environment().from_string)
        _import_late_modules(compiled)
    except Exception as error:
        return _write_frame(replies, _ERROR_LAST, f"failed: {error}".encode(errors="replace"))
    _limit_resources()
    _write_frame(replies, _OK, b"")
    status = _OK
    while status != _ERROR_LAST:
        try:
            source, variables = json.loads(_read_frame(requests, 2**63).data)
        except EOFError:
            return
        with _alarm(RENDER_SECONDS + 1):
            status, reply = _rendered(compiled, source, variables)
        del source, variables
        _write_frame(replies, status, reply)


def _import_late_modules(compiled: Callable[[str], Any]) -> None:
    """What jinja2 and Python import when it is first used has to be here before files can no longer be opened."""
    for name in ("jinja2.constants", "jinja2.debug", "unicodedata", "linecache", "encodings.latin_1"):
        importlib.import_module(name)
    for source in ("{{ 'caf\\xe9\\n' | upper | tojson }}{{ strftime_now('%d %b %Y') }}", "{{ none.a.b }}", "{% if %}"):
        _rendered(compiled, source, {})


def _rendered(compiled: Callable[[str], Any], source: str, variables: dict[str, Any]) -> tuple[int, bytes]:
    from jinja2 import TemplateSyntaxError

    try:
        pieces, size = [], 0
        for piece in compiled(source).generate(variables):
            pieces.append(piece)
            size += len(piece)
            if size > RENDER_CHARS:
                return _ERROR, f"wrote more than {RENDER_CHARS:,} characters and was stopped".encode()
        return _OK, "".join(pieces).encode("utf-8", "surrogatepass")
    except MemoryError:
        return _ERROR_LAST, f"needs more than {RENDER_BYTES >> 20} MB and was stopped".encode()
    except RecursionError:
        return _ERROR_LAST, b"nests too deeply, or calls itself without an end"
    except TemplateSyntaxError as error:
        return _ERROR, f"is not valid in line {error.lineno}: {error.message}".encode(errors="replace")
    except Exception as error:
        return _ERROR, f"failed: {str(error)[:1000] or type(error).__name__}".encode(errors="replace")


def _template_environment() -> Any:
    """jinja2 as chat templates expect it: the functions, the filter and the tag that transformers offers them."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit()) < (3, 1, 6):
        raise ImportError(f"has jinja2 {jinja2.__version__} with known holes, run pip install 'jinja2>=3.1.6'")

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks what the model wrote; the text is the same without it."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> str:
            return caller()

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    environment.globals.update(dict=_template_dict, namespace=_template_namespace(jinja2))
    return environment


def _tojson(x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False):
    """JSON as models were trained on it; jinja2's own filter would escape it for HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise ValueError(message)


def _strftime_now(format: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(format)


def _template_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """`dict` as a function, so that a template gets no class to climb from."""
    return dict(*args, **kwargs)


def _template_namespace(jinja2: Any) -> type:
    class Namespace(jinja2.utils.Namespace):
        """`namespace` without names that begin with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            attributes = dict(*args[1:], **kwargs)  # no parameter is called self, a template may use that name
            for name in attributes:
                Namespace.check(name)
            jinja2.utils.Namespace.__init__(args[0], attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            Namespace.check(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

        @staticmethod
        def check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the name {name!r}")

    return Namespace


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


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Ends this process after `seconds`, even if the one that would kill it is gone. Signal 14 asks no Python code."""
    import signal

    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    _serve_templates()
