"""Text <-> token ids, under the name that scripts import: see formats/tokenizer.py."""

from lit_swa.formats.tokenizer import StreamDecoder, Tokenizer

__all__ = ["StreamDecoder", "Tokenizer"]
