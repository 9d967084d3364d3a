"""Checkpoint directories, under the name that scripts import: see formats/."""

from lit_swa.formats.checkpoint import (
    build_model,
    check_checkpoint_dir,
    check_dtype,
    is_complete,
    load_config,
    load_model,
)
from lit_swa.formats.convert import convert_hf_checkpoint, export_hf_checkpoint
from lit_swa.formats.directory import open_weights, save_checkpoint

__all__ = [
    "build_model",
    "check_checkpoint_dir",
    "check_dtype",
    "convert_hf_checkpoint",
    "export_hf_checkpoint",
    "is_complete",
    "load_config",
    "load_model",
    "open_weights",
    "save_checkpoint",
]
