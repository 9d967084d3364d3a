"""Directories of token files in a bucket (s3://, gs://, hf://, ...): fsspec reads them, and a cache keeps them.

    data = TokenData({BucketDirectory("s3://bucket/tokens", "data/cache"): 1.0}, block_length=2048, batch_size=64)

A shard is fetched when a block of it is read for the first time, and compared with its checksum. The order of the
blocks goes over all shards: after some hundred batches most of them lie in the cache, which needs room for all.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_swa.formats.files import LOCK_NAME, DiskFull, atomic_file
from lit_swa.token_files import INDEX, TokenDirectory, docs_name


class BucketDirectory(TokenDirectory):
    """A directory of token files in a bucket, as a source of TokenData. Raises OSError or ValueError."""

    def __init__(self, address: str, cache_dir: str | Path) -> None:
        """address: as fsspec has it. cache_dir: holds one directory for each address."""
        self.address = address.rstrip("/")
        cache = Path(cache_dir) / hashlib.sha256(self.address.encode()).hexdigest()[:16]
        cache.mkdir(parents=True, exist_ok=True)
        with named(self.address):
            files, root = connect(self.address)
            index = files.cat_file(f"{root}/{INDEX}")
            self.sizes = {Path(entry["name"]).name: entry["size"] for entry in files.ls(root, detail=True)}
        if not (cache / INDEX).is_file():
            with atomic_file(cache / INDEX) as stream:
                stream.write(index)
        elif (cache / INDEX).read_bytes() != index:
            raise ValueError(
                f"{self.address} is not what {cache} was filled from: delete that directory, or name another."
            )
        super().__init__(cache)
        self.digests = {shard["file"]: shard["sha256"] for shard in self.shards}
        self.digests |= {docs_name(shard["file"]): shard["docs_sha256"] for shard in self.shards}

    def size(self, name: str) -> int:
        if Path(name).name != name or name not in self.sizes:
            raise FileNotFoundError(
                f"{self.address} holds no {name[:80]}, which its {INDEX} names: copy it there again."
            )
        return self.sizes[name]

    def path(self, name: str) -> Path:
        """Where a file lies in the cache: it is fetched if it is not there. Raises ValueError for a damaged one."""
        from filelock import FileLock

        path = self.directory / name
        if path.is_file():
            return path
        with FileLock(self.directory / LOCK_NAME):  # one process of a machine fetches it, the others wait
            if path.is_file():
                return path
            with named(f"{self.address}/{name}"), atomic_file(path, self.sizes[name]) as stream:
                files, root = connect(self.address)
                with files.open(f"{root}/{name}", "rb") as remote:
                    shutil.copyfileobj(remote, stream, 2**24)
                stream.flush()
                with open(stream.name, "rb") as received:
                    found = hashlib.file_digest(received, "sha256").hexdigest()
                if found != self.digests[name]:
                    raise ValueError(
                        f"{self.address}/{name} is damaged: its SHA-256 is not that of {INDEX}; copy it again."
                    )
        return path

    def verify(self) -> None:
        """Every file is compared with its checksum when it is fetched."""


def connect(address: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the directory's name in it; a process that was forked gets its own."""
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ValueError(f"{address} is read with fsspec: run pip install fsspec.") from None
    return url_to_fs(address)


@contextmanager
def named(address: str) -> Iterator[None]:
    """What a bucket's library raises becomes a sentence with the address in it."""
    try:
        yield
    except ImportError as error:  # fsspec says which package reads such an address
        raise ValueError(f"{address} cannot be read: {' '.join(str(error).split())[:200]}.") from None
    except ValueError as error:
        if str(error).startswith(address):
            raise
        raise ValueError(f"{address} cannot be read ({' '.join(str(error).split())[:200]}): check it.") from None
    except DiskFull:
        raise
    except OSError as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise OSError(f"{address} cannot be read ({reason}): check the address and your access to it.") from None
