"""Fold a LoRA adapter into its base model's weights."""

import sys
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, installed or not


def main(
    checkpoint_dir: Path,
    base_checkpoint_dir: Path | None = None,
    output_dir: Path | None = None,
    dtype: str = "auto",
    quantize: Literal["int8", "int4", "int4-hqq", "nf4", "nf4-dq", "fp4", "fp4-dq"] | None = None,
    model: dict[str, Any] | None = None,
) -> None:
    """Write a whole checkpoint, which needs neither the adapter nor the base any more.

    The adapter may be one that finetuning wrote, PEFT's, or a LongLoRA release with its trainable_params.bin.

    Args:
        checkpoint_dir: The directory with the adapter.
        base_checkpoint_dir: The base checkpoint. By default the one that the adapter names, by its path or as a
            repository that was downloaded.
        output_dir: Where the checkpoint goes. By default the folder "merged" in checkpoint_dir.
        dtype: float32, bfloat16 or float16; auto is that of the base's weights.
        quantize: Merge into the base's weights as this mode rounds them, with which QLoRA was trained, instead of the
            exact ones. The result is dense, and computes what the run validated.
        model: Any field of the model's config, as --model.FIELD VALUE (--model.help lists them), for adapters that come
            without lit_config.json, such as --model.block_size 32768 --model.rope_scaling '{"type": "linear", "factor":
            8}'.
    """
    from lit_swa.adapter import is_llama_adapter
    from lit_swa.checkpoint import check_dtype, save_checkpoint
    from lit_swa.formats.checkpoint import base_of, load_adapted, tokenizer_dir
    from lit_swa.formats.files import copy_file, find_inside
    from lit_swa.formats.places import locate
    from lit_swa.training.resuming import RUN_FILE

    checkpoint_dir = locate(checkpoint_dir)
    base_checkpoint_dir = base_checkpoint_dir and locate(base_checkpoint_dir)
    if is_llama_adapter(checkpoint_dir):
        raise ValueError(
            f"{checkpoint_dir} is a LLaMA-Adapter, which no weights can express: use the directory as it is."
        )
    output_dir = output_dir or checkpoint_dir / "merged"
    chosen, device = check_dtype("float32" if dtype == "auto" else dtype, "cpu")
    base = base_of(checkpoint_dir, base_checkpoint_dir)
    for directory in (checkpoint_dir, base):
        if directory.resolve() == output_dir.resolve():
            raise ValueError(f"{output_dir} is one of the two that are merged: choose another output_dir.")
    gpt = load_adapted(
        checkpoint_dir, None if dtype == "auto" else chosen, device, base_dir=base_checkpoint_dir, quantize=quantize,
        **(model or {})
    )  # fmt: skip
    save_checkpoint(gpt, gpt.config, output_dir, source_dir=tokenizer_dir(checkpoint_dir, base))
    if (checkpoint_dir / RUN_FILE).exists():  # how the weights were trained, such as the prompt style
        copy_file(find_inside(checkpoint_dir, RUN_FILE), output_dir / RUN_FILE)
    print(output_dir)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
