"""lit_swa: read, run, change and finetune long-context language models."""

from lit_swa.model import GPT, Config

__version__ = "0.1.0"
__all__ = ["GPT", "Config"]
