"""Kept for imports from outside: see formats/files.py."""

from lit_swa.formats.files import *  # noqa: F403
