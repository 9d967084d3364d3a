"""Books from Project Gutenberg, served by a local server: whole, without the licence, each fetched once."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_scripts import run

SCRIPT = "scripts/download_books.py"


class Site(ThreadingHTTPServer):
    """Serves `pages` (path -> bytes); a path in `failures` answers with these status codes first."""

    daemon_threads = True

    def __init__(self) -> None:
        self.pages: dict[str, bytes] = {}
        self.failures: dict[str, list[int]] = {}
        self.cut: set[str] = set()  # paths whose connection breaks half-way
        self.requests: list[tuple[str, str]] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Site

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        self.server.requests.append((path, self.headers["User-Agent"]))
        failures = self.server.failures.get(path, [])
        status = failures.pop(0) if failures else 200 if path in self.server.pages else 404
        data = self.server.pages.get(path, b"") if status == 200 else b"sorry"
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if path in self.server.cut else data)


@pytest.fixture
def site(monkeypatch) -> Iterator[Site]:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between attempts and books
    server = Site()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def page(title: str, text: str, line_end: str = "\n", old: bool = False) -> str:
    """A book as the site has it."""
    this, before_end = ("THIS", f"End of Project Gutenberg's {title}, by Nobody\n\n") if old else ("THE", "")
    whole = (
        f"The Project Gutenberg eBook of {title}\n\nThis ebook is for the use of anyone.\n\nTitle: {title}\n\n"
        f"Author: Nobody\n\n*** START OF {this} PROJECT GUTENBERG EBOOK {title.upper()} ***\n\n\n{text}\n\n\n"
        f"{before_end}*** END OF {this} PROJECT GUTENBERG EBOOK {title.upper()} ***\n\nSection 1. The licence.\n"
    )
    return whole.replace("\n", line_end)


def get(site: Site, folder: Path, ids: str, monkeypatch, *more: str) -> int:
    return run(SCRIPT, ["--ids", ids, "--output_dir", str(folder), "--base_url", site.url, *more], monkeypatch)


def test_a_book_arrives_without_header_and_licence_and_only_once(site, tmp_path, monkeypatch, capsys):
    """Catches: licence text in a training set, Windows line ends, a name that is no title, a second download."""
    text = "CHAPTER I\n\nIt began, as “such” things do.\n\nFINIS"
    site.pages["cache/epub/158/pg158.txt"] = b"\xef\xbb\xbf" + page("Emma", text, "\r\n").encode()
    site.pages["cache/epub/2701/pg2701.txt"] = page("Moby-Dick; or, The Whale's Töne", "Call me.", old=True).encode()
    assert get(site, tmp_path / "b", "[158,2701]", monkeypatch) == 0
    assert (tmp_path / "b/emma.txt").read_bytes().decode() == text + "\n"
    assert (tmp_path / "b/moby-dick-or-the-whales-tone.txt").read_text() == "Call me.\n"
    printed = capsys.readouterr().out.splitlines()
    assert printed == [str(tmp_path / "b" / name) for name in ("emma.txt", "moby-dick-or-the-whales-tone.txt")]
    kept = json.loads((tmp_path / "b/books.json").read_text())
    assert kept["158"]["title"] == "Emma" and kept["158"]["url"].endswith("cache/epub/158/pg158.txt")
    assert len(site.requests) == 2 and all("lit_swa" in agent for _, agent in site.requests)
    assert get(site, tmp_path / "b", "[2701,158]", monkeypatch) == 0
    assert len(site.requests) == 2 and capsys.readouterr().out.splitlines() == printed[::-1]
    (tmp_path / "b/emma.txt").unlink()
    assert get(site, tmp_path / "b", "[158]", monkeypatch) == 0 and (tmp_path / "b/emma.txt").exists()


def test_other_places_are_tried_and_passing_errors_outlived(site, tmp_path, monkeypatch, capsys):
    """Catches: giving up at the first 404 or 503, a Latin-1 file taken for UTF-8, a mirror's folders not known."""
    site.pages["files/11/11.txt"] = page("Alice", "Déjà vu.").encode()
    site.pages["files/11/11-0.txt"] = page("Alice", "Déjà vu.").encode("latin1")
    site.pages["1/2/3/1234/1234-0.txt"] = page("Far", "Far away.").encode()
    site.failures["1/2/3/1234/1234-0.txt"] = [503, 429]
    assert get(site, tmp_path, "[11,1234]", monkeypatch) == 0
    assert (tmp_path / "alice.txt").read_text() == "Déjà vu.\n" and (tmp_path / "far.txt").exists()


def test_no_file_is_ever_replaced_by_another_book(site, tmp_path, monkeypatch):
    """Catches: two editions under one name, or a user's own file lost."""
    for number, text in ((1, "first edition"), (2, "second edition"), (3, "first edition")):
        site.pages[f"cache/epub/{number}/pg{number}.txt"] = page("Emma", text).encode()
    (tmp_path / "emma.txt").write_text("mine")
    assert get(site, tmp_path, "[1,2]", monkeypatch) == 0
    texts = {path.name: path.read_text() for path in tmp_path.glob("*.txt")}
    assert texts == {"emma.txt": "mine", "emma-1.txt": "first edition\n", "emma-2.txt": "second edition\n"}


@pytest.mark.parametrize(
    "content, more, message",
    [
        (None, [], "no plain text of it is there"),
        ("<html>Please log in</html>", [], "START line is missing"),
        (page("Emma", "x" * 100).partition("*** END")[0], [], "cut short"),
        (page("Emma", "x" * 3000), ["--max_mb", "0.002"], "larger than 0.002 MB"),
        ("broken", [], "bytes came"),
        ("refused", [], "HTTP 403"),
        ("", ["--ids", "[0]"], "ids=[0]"),
        ("", ["--base_url", "ftp://x"], "base_url='ftp://x'"),
        ("", ["--base_url", "http://127.0.0.1:9"], "check the network"),
        ("", ["--timeout", "0"], "timeout=0"),
    ],
)
def test_what_is_no_book_is_refused_in_one_sentence(content, more, message, site, tmp_path, monkeypatch, capsys):
    """Catches: an error page or half a book saved as a book, a traceback, a retry without end."""
    path = "cache/epub/158/pg158.txt"
    if content is not None:
        site.pages[path] = (page("Emma", "x" * 100) if content == "broken" else content).encode()
    site.cut = {path} if content == "broken" else set()
    site.failures[path] = [403] * 9 if content == "refused" else []
    assert get(site, tmp_path / "b", "[158]", monkeypatch, *more) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == "" and len(printed.err.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.txt")) and not list(tmp_path.rglob("books.json"))
