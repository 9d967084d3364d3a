"""The Hugging Face hub: what a repository holds, and its files, each compared with the hub's checksum.

Nothing that is downloaded is run.
"""

import hashlib
import threading
from pathlib import Path
from typing import Any

PROBE_SECONDS = 4.0  # for the hub's first answer
LOG_IN = {  # kind of repository -> how its users say who they are
    "model": "pass --access_token",
    "dataset": "set HF_TOKEN, or log in with hf auth login",
}


def ask_hub(repo_id: str, token: str | None = None, kind: str = "model") -> Any:
    """The hub's description of a repository: its id, its revision `sha`, and its files `siblings`.

    kind: "model" or "dataset".
    Raises ConnectionError when there is no answer within seconds, and another OSError when the hub refuses.
    """
    from huggingface_hub import HfApi

    ask = getattr(HfApi(), f"{kind}_info")
    answer: list[Any] = []

    def wait_for_answer() -> None:
        try:
            answer.append(ask(repo_id, files_metadata=True, timeout=PROBE_SECONDS, token=token))
        except Exception as error:  # noqa: B902 - handed to the caller's thread
            answer.append(error)

    thread = threading.Thread(target=wait_for_answer, daemon=True)  # a silent name server knows no timeout: leave it
    thread.start()
    thread.join(2 * PROBE_SECONDS)
    if not answer:
        raise ConnectionError("The Hugging Face hub does not answer")
    if isinstance(answer[0], Exception):
        raise _sentence(answer[0], repo_id, kind)
    return answer[0]


def _sentence(error: Exception, repo_id: str, kind: str) -> OSError:
    """One of the hub's or the network's errors, which have no base class in common, as an OSError for people."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return OSError(
            f"Access to {repo_id} must be asked for on its page on the Hugging Face hub: then {LOG_IN[kind]}."
        )
    if isinstance(error, RepositoryNotFoundError):
        return OSError(
            f"The Hugging Face hub has no repository {repo_id}, or it is private: check the name, or {LOG_IN[kind]}."
        )
    return ConnectionError(f"The Hugging Face hub does not give {repo_id} ({_reason(error)})")


def fetch_file(info: Any, file: Any, directory: Path, token: str | None = None, kind: str = "model") -> Path:
    """Download one of a repository's files into a directory, and compare it with the hub's checksum.

    info: what ask_hub returned; file: one of its siblings. A file that is there and complete is not fetched again.
    Raises OSError when the download stops, or the file is not the published one.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError

    where = {"repo_type": kind, "revision": info.sha, "local_dir": directory, "token": token}
    try:
        path = Path(hf_hub_download(info.id, file.rfilename, **where))
    except GatedRepoError as error:
        raise _sentence(error, info.id, kind) from None
    except Exception as error:  # the hub's, the network's and the disk's errors have no base class in common
        raise OSError(
            f"The download of {file.rfilename} stopped ({_reason(error)}): run the command again, it goes on where it "
            "stopped."
        ) from error
    _verify(path, file)
    return path


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def _verify(path: Path, file: Any) -> None:
    """Compare a file with the hub's checksum: SHA-256 for large files, git's own SHA-1 for small ones."""
    if file.lfs is not None:
        require_digest(path, file.lfs.sha256, hashlib.sha256())
    elif file.blob_id:
        require_digest(path, file.blob_id, hashlib.sha1(b"blob %d\0" % path.stat().st_size))


def require_digest(path: Path, wanted: str, digest: Any) -> None:
    """Raises OSError, and deletes the file, when its content is not the one that was promised.

    digest: of hashlib, fed with what comes before the content.
    """
    with open(path, "rb") as stream:
        while chunk := stream.read(2**22):
            digest.update(chunk)
    if digest.hexdigest() != wanted:
        path.unlink()
        raise OSError(f"{path.name} arrived damaged: its checksum is not the published one; run the command again.")
