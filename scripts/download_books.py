"""Get books from Project Gutenberg as plain text: python scripts/download_books.py --ids '[158,36]'."""

import http.client
import re
import sys
import time
import unicodedata
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed

# Where the site, and mirrors of it, may have the text of a book
PLACES = ("cache/epub/{id}/pg{id}.txt", "files/{id}/{id}-0.txt", "files/{id}/{id}.txt", "{digits}/{id}/{id}-0.txt")
HEADERS = {"User-Agent": "lit_swa download_books.py (a few books for one reader)", "Accept": "text/plain"}
ATTEMPTS = 3
START = re.compile(r"\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG EBOOK[^*]{0,400}\*\*\*", re.IGNORECASE)
END = re.compile(
    r"^(?:End of (?:the |this )?Project Gutenberg['’s]*[^\n]*\n\s*)?"
    r"\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG EBOOK",
    re.IGNORECASE | re.MULTILINE,
)
KEPT = "books.json"  # which book is in which file


def main(
    ids: list[int],
    output_dir: Path = Path("data/books"),
    base_url: str = "https://www.gutenberg.org",
    timeout: float = 30.0,
    max_mb: float = 50.0,
    pause: float = 2.0,
) -> None:
    """Write each book to a .txt file named after its title, without Project Gutenberg's header and licence.

    A book whose file is there already is not fetched again. The site publishes no checksums: a book counts as whole
    when all announced bytes came, with the lines that mark its start and its end. The site is meant for people: for
    hundreds of books, give one of its mirrors (https://www.gutenberg.org/MIRRORS.ALL) as --base_url.

    Args:
        ids: The numbers of the books, as '[158,36]'. A book's number is in the address of its page.
        output_dir: The directory for the files, and for a books.json that says which number is in which file.
        base_url: The site or a mirror of it.
        timeout: Seconds without an answer after which a download is tried again.
        max_mb: The largest file to accept, in MB.
        pause: Seconds to wait between two books, to spare the site.
    """
    from lit_swa.checks import check_at_least
    from lit_swa.formats.files import directory_lock

    if not ids or min(ids) < 1:
        raise ValueError(f"ids={ids} does not fit: give the numbers of some books, as --ids '[158,36]'.")
    check_at_least(timeout=(timeout, 0.01), max_mb=(max_mb, 0.001), pause=(pause, 0))
    if not base_url.startswith(("https://", "http://")):
        raise ValueError(f"base_url={base_url!r} does not fit: it must begin with https:// or http://.")
    with directory_lock(output_dir):
        kept = read_kept(output_dir)
        fetched = 0
        for number in dict.fromkeys(ids):
            entry = kept.get(str(number))
            if entry is not None and (output_dir / entry["file"]).is_file():
                print(f"{number} is there already", file=sys.stderr)
            else:
                time.sleep(pause if fetched else 0)
                entry = keep(number, *find_book(base_url, number, timeout, max_mb), output_dir, kept)
                fetched += 1
            print(output_dir / entry["file"], flush=True)


def find_book(base_url: str, number: int, timeout: float, max_mb: float) -> tuple[str, str, str]:
    """(title, text, address) of a book, from the first of PLACES that has it. Raises OSError, in one sentence."""
    digits = "/".join(str(number)[:-1]) or "0"
    reason = "no plain text of it is there"
    for place in PLACES:
        url = f"{base_url.rstrip('/')}/{place.format(id=number, digits=digits)}"
        data = fetch(url, timeout, max_mb)
        if data is None:
            continue
        try:
            return *strip_licence(data.decode("utf-8-sig"), number), url
        except UnicodeDecodeError:
            reason = f"{url} is not UTF-8"
        except ValueError as error:
            reason = f"{url} {error}"
    raise OSError(
        f"Book {number} was not found ({reason}): look for its number on {base_url.rstrip('/')}/ebooks/{number}, or "
        "try another --base_url."
    )


def fetch(url: str, timeout: float, max_mb: float) -> bytes | None:
    """The bytes at a URL, None if there is nothing. Raises OSError for an error that further attempts do not mend."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=HEADERS), timeout=timeout) as answer:
                data = answer.read(int(max_mb * 1e6) + 1)
                promised = answer.headers.get("Content-Length")
            if len(data) > max_mb * 1e6:
                raise ValueError(f"{url} is larger than {max_mb:g} MB: no book is; raise --max_mb if this one is.")
            if promised is not None and len(data) != int(promised):
                raise ConnectionError(f"{len(data)} of {promised} bytes came")
            return data
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                return None
            reason, passing = f"HTTP {error.code}", error.code == 429 or error.code >= 500
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            reason, passing = str(getattr(error, "reason", error)) or type(error).__name__, True
        if not passing:
            break
        if attempt < ATTEMPTS:
            time.sleep(0.5 * attempt)
    raise OSError(f"{url} could not be read ({reason}): check the network, or try a mirror with --base_url.")


def strip_licence(page: str, number: int) -> tuple[str, str]:
    """(title, text) of a page. Raises ValueError, whose message ends a sentence, when it is not a whole book."""
    page = page.replace("\r\n", "\n").replace("\r", "\n")
    start = START.search(page)
    if start is None:
        raise ValueError("is no Project Gutenberg text: its START line is missing")
    end = END.search(page, start.end())
    if end is None:
        raise ValueError("is cut short: its END line is missing")
    named = re.search(r"^Title:[ \t]*(\S.*)$", page[: start.start()], re.MULTILINE)
    title = named.group(1).strip() if named else f"book {number}"
    return title, page[start.end() : end.start()].strip() + "\n"


def file_name(title: str) -> str:
    """moby-dick-or-the-whale for "Moby-Dick; or, The Whale"; "" if the title has no letter that ASCII can spell."""
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower().replace("'", "")
    return re.sub(r"[^a-z0-9]+", "-", plain)[:80].strip("-")


def read_kept(directory: Path) -> dict[str, Any]:
    """books.json; empty if there is none. Raises ValueError if it is damaged."""
    from lit_swa.formats.files import read_json

    if not (directory / KEPT).exists():
        return {}
    kept = read_json(directory / KEPT)
    for entry in kept.values():
        if not isinstance(entry, dict) or not isinstance(entry.get("file"), str) or "/" in entry["file"]:
            raise ValueError(f"{directory / KEPT} is damaged: delete it, and the books are fetched again.")
    return kept


def keep(number: int, title: str, text: str, url: str, directory: Path, kept: dict[str, Any]) -> dict[str, Any]:
    """Write the book and its entry in books.json, and never replace a file that is not this book's."""
    from lit_swa.formats.files import write_json, write_text

    name = f"{file_name(title) or number}.txt"
    path = directory / name
    if path.exists() and path.read_bytes() != text.encode():
        name = f"{name.removesuffix('.txt')}-{number}.txt"
        path = directory / name
    write_text(path, text)
    entry = {"title": title, "file": name, "url": url, "characters": len(text)}
    kept[str(number)] = entry
    write_json(directory / KEPT, kept)
    return entry


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
