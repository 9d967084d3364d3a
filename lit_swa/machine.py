"""This machine: its processor, and where what was found out about it is kept."""

import hashlib
import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def processor() -> str:
    """A text that differs between processors which differ in speed or in instructions."""
    if not CPUINFO.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = CPUINFO.read_text().partition("\n\n")[0].splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    told = [fields.get(key, "") for key in ("vendor_id", "cpu family", "model", "model name", "cache size", "flags")]
    return f"{platform.machine()} {fields.get('model name', '')} {hashlib.sha256(repr(told).encode()).hexdigest()[:16]}"


def cache_dir() -> Path:
    """The directory for files that can be made again: LIT_SWA_CACHE, or lit_swa in the user's cache directory.

    Raises OSError when it cannot be made.
    """
    place = os.environ.get("LIT_SWA_CACHE")
    try:
        place = Path(place) if place else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_swa"
    except RuntimeError as e:  # nobody's home
        raise OSError(f"there is no directory for caches: {e}") from None
    place.mkdir(parents=True, exist_ok=True)
    return place


def keep_file(name: str, content: bytes) -> None:
    """Put a file into the cache directory; nobody ever sees a half of it. Raises OSError."""
    half = cache_dir() / f"{name}.{os.getpid()}.tmp"
    try:
        half.write_bytes(content)
        half.replace(cache_dir() / name)
    finally:
        half.unlink(missing_ok=True)
