"""Hold a checkpoint's weights in 4 or 8 bits: python scripts/quantize.py --checkpoint_dir DIR --output_dir DIR."""

import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed


def main(
    checkpoint_dir: Path,
    output_dir: Path,
    mode: Literal["int8", "int4", "int4-hqq", "int4-gptq"] = "int8",
    group_size: int | None = None,
    calibration_data: list[Path] | Path | None = None,
    calibration_windows: int = 32,
    calibration_length: int = 512,
    device: str = "auto",
    seed: int = 1234,
) -> None:
    """Quantise the linear layers of a checkpoint. What is written loads like any checkpoint, without a flag.

    The weights of the blocks are rounded, and lm_head in 8 bits always; embeddings, norms and biases stay as they are.
    One block at a time is in memory. Nothing is written before all are done.

    Args:
        checkpoint_dir: The checkpoint, or its name.
        output_dir: Where the quantised one goes, with the tokenizer's files.
        mode: int8 has a scale for each row, int4 a scale and an offset for each group of inputs. int4 rounds between a
            group's least and largest weight, int4-hqq looks for a better range (no data either), int4-gptq for codes
            that keep the layers' outputs on a text, which takes longer and gives the best result.
        group_size: 32, 64 or 128 inputs that share a scale in int4: smaller groups are better and take more memory. By
            default the largest that divides the inputs of every layer.
        calibration_data: The text that int4-gptq keeps the outputs on: a .txt file (UTF-8), a list or a directory of
            such files, or a .bin file of token ids. By default the model writes one itself.
        calibration_windows: Texts that are read or written for that.
        calibration_length: Tokens in each of them.
        device: Where the blocks are computed: auto, cpu, cuda or mps.
        seed: The same seed gives the same text.
    """
    import torch

    from lit_swa.checks import check_at_least
    from lit_swa.formats.places import locate
    from lit_swa.quantize_checkpoint import GPTQ, plan_quantization, quantize_checkpoint
    from lit_swa.utils import ProgressLine, pick_device

    check_at_least(calibration_windows=(calibration_windows, 1), calibration_length=(calibration_length, 2))
    if calibration_data is not None and mode != GPTQ:
        raise ValueError(f"{mode} reads no text: leave --calibration_data out, or use --mode {GPTQ}.")
    checkpoint_dir, place = locate(checkpoint_dir), torch.device(pick_device(device))
    stored = plan_quantization(checkpoint_dir, output_dir, mode, group_size)
    text = None
    if mode == GPTQ:
        text = calibration_text(checkpoint_dir, calibration_data, calibration_windows, calibration_length, place, seed)
    progress: list[ProgressLine] = []

    def show(done: int, total: int, name: str) -> None:
        if not progress:
            progress.append(ProgressLine(total, "layer", interval=10.0))
        progress[0].show(done, name, tokens=0)

    quantize_checkpoint(checkpoint_dir, output_dir, stored, place, text, show)
    print(output_dir)


def calibration_text(
    checkpoint_dir: Path, data: list[Path] | Path | None, windows: int, length: int, device, seed: int
):
    """Token ids (windows, length): spread over the texts that are given, or written by the model."""
    import torch

    from lit_swa.checkpoint import load_config
    from lit_swa.evaluate import read_stream
    from lit_swa.quantize_checkpoint import own_text
    from lit_swa.utils import ProgressLine

    config = load_config(checkpoint_dir)
    if length > config.block_size:
        raise ValueError(
            f"--calibration_length {length} is beyond the model's context: use at most {config.block_size}."
        )
    if data is None:
        progress = ProgressLine(length, "writing a text to calibrate on", interval=10.0)
        return own_text(checkpoint_dir, device, windows, length, seed, lambda done, total, _: progress.show(done))
    tokens, prefix = read_stream(data, checkpoint_dir, config.vocab_size)
    length -= len(prefix)
    if len(tokens) < length:
        raise ValueError(f"The calibration data has {len(tokens)} tokens: give a text of at least {length}.")
    windows = min(windows, len(tokens) // length)
    starts = [i * (len(tokens) - length) // max(1, windows - 1) for i in range(windows)]
    rows = [[*prefix, *tokens[start : start + length].tolist()] for start in starts]
    return torch.tensor(rows)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
