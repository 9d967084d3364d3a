"""Kept for imports from outside: see formats/peft.py."""

from lit_swa.formats.peft import *  # noqa: F403
