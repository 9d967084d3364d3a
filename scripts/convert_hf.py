"""Convert a Hugging Face checkpoint, or a GGUF file, in place."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, installed or not


def main(checkpoint_dir: Path) -> None:
    """Write lit_config.json and lit_model.safetensors next to config.json and *.safetensors or *.bin, or a *.gguf file.

    The source files are not changed. Weights keep their dtype; quantised ones (GGUF) become float32.

    Args:
        checkpoint_dir: The directory that holds the checkpoint, or its GGUF file.
    """
    from lit_swa.checkpoint import convert_hf_checkpoint
    from lit_swa.formats.places import locate

    checkpoint_dir = locate(checkpoint_dir, convert=True)
    convert_hf_checkpoint(checkpoint_dir)
    print(checkpoint_dir)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
