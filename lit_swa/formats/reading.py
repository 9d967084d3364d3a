"""Which files of a directory that may come from a stranger are opened, and how much of them is read. No torch here."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def find_inside(directory: Path, name: str, folder: str = "") -> Path:
    """directory / folder / name, for a name that may come from a stranger: the one rule for every file that is read.

    Only a plain file name of a regular file is accepted. A link must lead to a file beside it or in the directory: one
    that leads out is refused, but for Hugging Face's cache, where snapshots/REVISION/NAME leads to blobs/HASH. `folder`
    is our own word. Raises ValueError, or FileNotFoundError.
    """
    plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:") and name.isprintable()
    if not plain or len(name.encode()) > 255:
        raise ValueError(f"{directory} names a file {str(name)[:200]!r}: only plain file names are allowed.")
    path, root = directory / folder / name, directory.resolve()
    if not path.exists():
        if path.is_symlink():
            raise FileNotFoundError(f"{path} is a link to a file that does not exist: put the file there.")
        raise FileNotFoundError(f"{path} is missing: put it there.")
    blobs = [root.parents[1] / "blobs"] if root.parent.name == "snapshots" else []
    if path.resolve().parent not in (root, root / folder, *blobs):
        raise ValueError(f"{path} is a link that leads out of its directory: put a copy of the file there (cp -L).")
    require_regular(path)
    return path


def is_listed(path: Path) -> bool:
    """True if the directory has such an entry, be it a link to nothing: find_inside says what is wrong with one."""
    return path.is_symlink() or path.exists()


POINTER, POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024  # how a Git LFS pointer begins; its limit


def require_regular(path: Path) -> None:
    """Raises FileNotFoundError or ValueError for what must not be opened (a pipe would wait, a device has no end), and
    for what only stands for the file."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: put it there.")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file: put one there.")
    if path.stat().st_size <= POINTER_BYTES:
        with open(path, "rb") as stream, named_when_unread(path):
            if stream.read(len(POINTER)) == POINTER:
                raise ValueError(
                    f"{path} is a Git LFS pointer, not the file itself: run git lfs pull there, or download it again."
                )


@contextmanager
def named_when_unread(path: Path) -> Iterator[None]:
    """The system's error of a disk that gives no bytes does not say of which file. Within this block it does."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror}): put a copy there.") from None


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file. Raises ValueError when it is longer than `limit`, whatever its size is said to be;
    no more than that is read."""
    require_regular(path)
    pieces, left = [], limit + 1
    with open(path, "rb") as stream, named_when_unread(path):
        while left and (piece := stream.read(min(left, 2**20))):  # read() allocates what it is asked for
            pieces.append(piece)
            left -= len(piece)
    data = b"".join(pieces)
    if len(data) > limit:
        raise ValueError(f"{path} has more than {limit:,} bytes, which are not read: it is not such a file.")
    return data
