"""Kept for imports from outside: see formats/gguf.py."""

from lit_swa.formats.gguf import *  # noqa: F403
