"""Kept for imports from outside: see formats/download.py."""

from lit_swa.formats.download import *  # noqa: F403
