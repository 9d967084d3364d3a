"""Convert a Hugging Face checkpoint, or a GGUF file, in place."""

import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, installed or not


def main(
    checkpoint_dir: Path,
    quantize: Literal["int8", "int4", "int4-hqq"] | None = None,
    group_size: int | None = None,
) -> None:
    """Write lit_config.json and lit_model.safetensors next to config.json and *.safetensors or *.bin, or a *.gguf file.

    The source files are not changed. Weights keep their dtype; quantised ones (GGUF) become float32.

    Args:
        checkpoint_dir: The directory that holds the checkpoint, or its GGUF file.
        quantize: Write the linear layers in 8 or 4 bits, as scripts/quantize.py --mode does, one layer at a time.
        group_size: 32, 64 or 128 inputs that share a scale in int4. By default the largest that fits every layer.
    """
    import functools

    from lit_swa.checkpoint import convert_hf_checkpoint
    from lit_swa.formats.places import locate
    from lit_swa.quantize_checkpoint import quantized_on_the_way

    if quantize is None and group_size is not None:
        raise ValueError(f"group_size={group_size} has no effect without --quantize int4 or int4-hqq: add one of them.")
    checkpoint_dir = locate(checkpoint_dir, convert=True)
    prepare = quantize and functools.partial(quantized_on_the_way, mode=quantize, group_size=group_size)
    convert_hf_checkpoint(checkpoint_dir, prepare=prepare)
    print(checkpoint_dir)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
