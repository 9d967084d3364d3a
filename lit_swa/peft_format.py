"""Kept for imports from outside: see formats/peft.py and formats/peft_load.py."""

from lit_swa.formats.checkpoint import load_adapted  # noqa: F401
from lit_swa.formats.peft import *  # noqa: F403
from lit_swa.formats.peft_load import *  # noqa: F403
