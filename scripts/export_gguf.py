"""Export a checkpoint to one GGUF file for llama.cpp."""

import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, installed or not


def main(checkpoint_dir: Path, output_file: Path, dtype: Literal["f32", "f16", "bf16", "q8_0"] = "f16") -> None:
    """Write a file that llama.cpp loads: weights, hyperparameters, tokenizer and chat template.

    A model that llama.cpp would compute otherwise, and a tokenizer that it does not have, are refused. One tensor at a
    time is in memory.

    Args:
        checkpoint_dir: The checkpoint, with its lit_config.json.
        output_file: The file to write, which must not be there yet.
        dtype: How matrices are stored: f32, f16 and bf16 as they are called, q8_0 in 8 bits with a scale for each 32.
            Norms, biases and the routers of experts are float32 always.
    """
    from lit_swa.formats.gguf_export import export_gguf
    from lit_swa.formats.places import locate

    export_gguf(locate(checkpoint_dir), output_file, dtype)
    print(output_file)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
