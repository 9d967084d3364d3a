"""Kept for imports from outside: see formats/gguf.py."""

from lit_swa.formats.gguf import *  # noqa: F403
from lit_swa.formats.gguf_tokenizer import tokenizer_files  # noqa: F401
