"""lit_swa: read, run, change and finetune long-context language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_swa.model import GPT, Config

__version__ = "0.1.0"
__all__ = ["GPT", "Config"]


def __getattr__(name: str) -> Any:
    """`from lit_swa import GPT, Config`, without importing torch before it is needed: --help answers at once."""
    if name in __all__:
        from lit_swa import model

        return getattr(model, name)
    raise AttributeError(f"module 'lit_swa' has no attribute {name!r}")
