"""The Hugging Face hub: what a repository holds, and its files, each compared with the hub's size and checksum.

A file grows under a partial name that holds its checksum, so that the next start goes on with the bytes that are there,
and with those of the same file only. It gets its own name once it is whole and verified. (huggingface_hub itself, from
1.20 on, gives each attempt a new partial file and starts it at byte 0.) Nothing that is downloaded is run.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote

from lit_swa.formats.files import DiskFull, named_when_full
from lit_swa.formats.places import PARTIAL

PROBE_SECONDS = 4.0  # for the hub's first answer
MAX_DESCRIPTION = 2**25  # bytes
MAX_SIZE = 2**50  # bytes of a file
ATTEMPTS = 5  # in a row that bring no byte
LOG_IN = {  # kind of repository -> how its users say who they are
    "model": "pass --token",
    "dataset": "set HF_TOKEN, or log in with hf auth login",
}


def ask_hub(repo_id: str, token: str | None = None, kind: str = "model", revision: str | None = None) -> Any:
    """The hub's description of a repository: its id, its revision `sha`, and its files `siblings`.

    kind: "model" or "dataset". revision: a branch, a tag or a commit; None: the main branch.
    Raises ConnectionError when there is no answer within seconds, and another OSError when the hub refuses.
    """
    answer: list[Any] = []

    def wait_for_answer() -> None:
        try:
            answer.append(_describe(repo_id, token, kind, revision))
        except Exception as error:  # noqa: B902 - handed to the caller's thread
            answer.append(error)

    thread = threading.Thread(target=wait_for_answer, daemon=True)  # a silent name server knows no timeout: leave it
    thread.start()
    thread.join(2 * PROBE_SECONDS)
    if not answer:
        raise ConnectionError("The Hugging Face hub does not answer")
    if isinstance(answer[0], Refused):
        raise answer[0]
    if isinstance(answer[0], Exception):  # the hub's and the network's errors have no base class in common
        raise ConnectionError(f"The Hugging Face hub does not give {repo_id} ({_reason(answer[0])})")
    return answer[0]


def _describe(repo_id: str, token: str | None, kind: str, revision: str | None) -> Any:
    """What HfApi.model_info and dataset_info ask for, of which no more is read than a description can hold."""
    from huggingface_hub import DatasetInfo, ModelInfo, constants, get_session

    url, body = f"{constants.ENDPOINT}/api/{kind}s/{repo_id}", bytearray()
    url += "" if revision is None else f"/revision/{quote(revision, safe='')}"
    how = {"params": {"blobs": "true"}, "headers": _headers(token), "timeout": PROBE_SECONDS}
    with get_session().stream("GET", url, follow_redirects=True, **how) as answer:
        for chunk in answer.iter_bytes():
            body += chunk
            if len(body) > MAX_DESCRIPTION:
                raise OSError("its answer does not end")
    status, code = answer.status_code, answer.headers.get("X-Error-Code")
    if code == "GatedRepo":
        raise Refused(_gated(repo_id, kind))
    if code == "RevisionNotFound":
        raise Refused(f"{repo_id} has no revision {revision}: give a branch, a tag or a commit of its page on the hub.")
    if code == "RepoNotFound" or status in (401, 404):
        raise Refused(
            f"The Hugging Face hub has no repository {repo_id}, or it is private: check the name, or {LOG_IN[kind]}."
        )
    if status != 200:
        raise OSError(f"HTTP {status}")
    try:
        info = (ModelInfo if kind == "model" else DatasetInfo)(**json.loads(body))
        sound = _is_sound(info)
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError):
        sound = False
    if not sound:
        raise OSError("its description is damaged")
    return info


def _is_sound(info: Any) -> bool:
    """True if what is used of a description has the types and the range that the hub gives."""
    files = info.siblings or []
    texts = [info.id, info.sha, *(file.rfilename for file in files)]
    texts += [text for file in files for text in (file.blob_id, file.lfs and file.lfs.sha256) if text is not None]
    sizes = [file.size for file in files if file.size is not None]
    plain = all(isinstance(text, str) and len(text) < 1000 and text.isprintable() for text in texts)
    return plain and all(type(size) is int and 0 <= size < MAX_SIZE for size in sizes)


def _headers(token: str | None) -> dict[str, str]:
    """The token that is given, else that of HF_TOKEN or of the hub's login. (huggingface_hub's own function for this
    fetches a list of user agents first.)"""
    from huggingface_hub import constants, get_token

    if token is None and not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        token = get_token()
    return {"User-Agent": "lit_swa"} | ({"Authorization": f"Bearer {token}"} if token else {})


def _gated(repo_id: str, kind: str) -> str:
    return f"Access to {repo_id} must be asked for on its page on the Hugging Face hub: then {LOG_IN[kind]}."


class Published(NamedTuple):
    """What the hub promises of one file."""

    name: str
    url: str
    size: int
    checksum: str | None  # SHA-256, or git's own SHA-1 for small files; None where the hub gives none
    version: str | None  # what bytes of the same file have in common; None where nothing says so


def fetch_file(info: Any, file: Any, directory: Path, token: str | None = None, kind: str = "model") -> Path:
    """Download one of a repository's files into a directory, and compare it with the hub's size and checksum.

    info: what ask_hub returned; file: one of its siblings. A file that is there and complete is not fetched again, and
    one that is there in part is gone on with. The directory must be locked.
    Raises OSError when the download stops, or the file is not the published one.
    """
    from huggingface_hub.errors import GatedRepoError

    path = directory / _plain_name(file.rfilename)
    try:
        published = _published(info, file, token, kind)
        if path.is_file() and path.stat().st_size == published.size and _digest(path, published) == published.checksum:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial_path(path, published)
        with named_when_full(partial):
            _receive(published, partial, token)
    except (Refused, DiskFull):
        raise
    except (GatedRepoError, PermissionRefused):
        raise OSError(_gated(info.id, kind)) from None
    except Exception as error:  # the hub's, the network's and the disk's errors have no base class in common
        raise OSError(
            f"The download of {file.rfilename} stopped ({_reason(error)}): run the command again, it goes on where it "
            "stopped."
        ) from error
    if _digest(partial, published) != published.checksum:
        partial.unlink()
        raise OSError(_damaged(path.name))
    os.replace(partial, path)
    return path


def missing_bytes(files: list[Any], directory: Path) -> int:
    """What is still to be fetched of a repository's files."""

    def there(path: Path) -> int:
        paths = [path, *path.parent.glob(f".{path.name}.*{PARTIAL}")]
        return max((p.stat().st_size for p in paths if p.is_file()), default=0)

    return sum(max(0, (file.size or 0) - there(directory / _plain_name(file.rfilename))) for file in files)


class Refused(OSError):
    """What is not the published file; the message is a whole sentence."""


class PermissionRefused(OSError):
    """The hub describes the repository, and keeps its files for those who asked for access."""


def _plain_name(name: str) -> PurePosixPath:
    """The place of a repository's file inside a directory. Raises Refused for a name that leads out of it."""
    path = PurePosixPath(name)
    if path.is_absolute() or {"", ".."} & {*path.parts, path.name} or set(name) & set("\\:"):
        raise Refused(
            f"The repository names a file {name[:200]!r}, which leads out of its directory: take another repository."
        )
    return path


def _published(info: Any, file: Any, token: str | None, kind: str) -> Published:
    """Size and checksum, from the repository's description or, where a server leaves them out, the file's headers."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(info.id, file.rfilename, repo_type=kind, revision=info.sha)
    size, checksum = file.size, file.lfs.sha256 if file.lfs is not None else file.blob_id
    if size is None or not checksum:
        headers = get_hf_file_metadata(url, token=token)
        size = headers.size if size is None else size
        checksum = checksum or (headers.etag if re.fullmatch("[0-9a-f]{64}", headers.etag or "") else None)
    if size is None:
        raise Refused(f"The hub does not say how large {file.rfilename} is, so that nobody could tell where it ends.")
    if not checksum:
        print(f"The hub gives no checksum of {file.rfilename}: only its size is compared.", file=sys.stderr, flush=True)
    return Published(file.rfilename, url, size, checksum, checksum or info.sha)


def _partial_path(path: Path, published: Published) -> Path:
    """Where the file grows. Parts of other versions of it, and those that nothing identifies, are deleted."""
    stem = f".{path.name[:150]}."
    partial = path.with_name(f"{stem}{(published.version or 'unknown')[:16]}{PARTIAL}")
    for other in path.parent.iterdir():
        is_part = other.name.startswith(stem) and other.name.endswith(PARTIAL)
        if is_part and (other != partial or published.version is None or other.stat().st_size > published.size):
            other.unlink()
    partial.touch()
    return partial


def remove_partials(directory: Path) -> None:
    """Delete what downloads left that nobody goes on with. Call it with the directory locked."""
    for path in directory.glob(f".*{PARTIAL}"):
        path.unlink(missing_ok=True)
    shutil.rmtree(directory / ".cache" / "huggingface", ignore_errors=True)  # of huggingface_hub, in earlier versions


def _receive(published: Published, partial: Path, token: str | None) -> None:
    """Append what is missing to the partial file. A connection that breaks is opened again as long as bytes come."""
    from huggingface_hub.utils import tqdm

    idle, there = 0, partial.stat().st_size
    with tqdm(desc=published.name, total=published.size, initial=there, unit="B", unit_scale=True) as bar:
        while there < published.size:
            try:
                _request(published, partial, there, token, bar)
                broken = ConnectionError("the connection ended early")
            except OSError:  # the hub refuses, or the disk is full
                raise
            except Exception as error:  # the network's errors; their module has another name in each huggingface_hub
                broken = error
            before, there = there, partial.stat().st_size
            idle = 0 if there > before else idle + 1
            if there < published.size and idle == ATTEMPTS:
                raise broken
            if there < published.size:
                time.sleep(1)
    with open(partial, "rb+") as stream:
        os.fsync(stream.fileno())


def _request(published: Published, partial: Path, start: int, token: str | None, bar: Any) -> None:
    """One request for the bytes from `start` on; from 0 on where the server sends the whole file again."""
    from huggingface_hub import constants, get_session

    headers = _headers(token) | {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT  # without a byte
    with get_session().stream("GET", published.url, headers=headers, timeout=timeout, follow_redirects=True) as answer:
        if answer.headers.get("X-Error-Code") == "GatedRepo":
            raise PermissionRefused
        goes_on = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if answer.status_code == 416 or answer.status_code == 206 and not goes_on:
            partial.unlink()
            raise OSError(f"the server has no part of it from byte {start} on")
        if answer.status_code not in (200, 206):
            raise OSError(f"HTTP {answer.status_code}")
        with open(partial, "ab" if goes_on else "wb") as stream:
            bar.update(stream.tell() - bar.n)
            for chunk in answer.iter_bytes():
                if stream.tell() + len(chunk) > published.size:
                    stream.close()
                    partial.unlink()
                    raise Refused(
                        f"{published.name} arrived damaged: it is longer than the {published.size} bytes that the hub "
                        "promises; run the command again."
                    )
                stream.write(chunk)
                stream.flush()
                bar.update(len(chunk))


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def _digest(path: Path, published: Published) -> str | None:
    """The checksum of a file's content, of the kind that was promised; None where none was."""
    if published.checksum is None:
        return None
    is_sha256 = len(published.checksum) == 64
    return digest_of(path, hashlib.sha256() if is_sha256 else hashlib.sha1(b"blob %d\0" % path.stat().st_size))


def digest_of(path: Path, digest: Any) -> str:
    """digest: of hashlib, fed with what comes before the content."""
    with open(path, "rb") as stream:
        while chunk := stream.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def require_sha256(path: Path, wanted: str) -> None:
    """Raises OSError, and deletes the file, when its content is not the one that was promised."""
    if digest_of(path, hashlib.sha256()) != wanted:
        path.unlink()
        raise OSError(_damaged(path.name))


def _damaged(name: str) -> str:
    return f"{name} arrived damaged: its checksum is not the published one; run the command again."
