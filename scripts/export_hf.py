"""Export a checkpoint to the Hugging Face format."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, installed or not


def main(checkpoint_dir: Path, output_dir: Path) -> None:
    """Write a directory that transformers.AutoModelForCausalLM.from_pretrained loads, with equal logits.

    Args:
        checkpoint_dir: The checkpoint, with its lit_config.json.
        output_dir: Where config.json, model.safetensors and the tokenizer's files go.
    """
    from lit_swa.checkpoint import export_hf_checkpoint
    from lit_swa.formats.places import locate

    export_hf_checkpoint(locate(checkpoint_dir), output_dir)
    print(output_dir)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
