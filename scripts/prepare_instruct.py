"""Tokenise instructions or conversations once: python scripts/prepare_instruct.py --data alpaca --output_dir data/a."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a clone that is not installed


def main(
    data: str,
    output_dir: Path,
    checkpoint_dir: Path | None = None,
    max_seq_length: int = 2048,
    prompt_style: str | None = None,
    preset: str | None = None,
    mask_prompt: bool = True,
    limit: int | None = None,
    show: int = 3,
) -> None:
    """Write a directory that the finetuning scripts take as --data, and show samples with the trained tokens marked.

    A dataset in which the answers or their end are never trained is refused.

    Args:
        data: A .json, .jsonl, .csv or .parquet file of instructions or conversations; or the name of a published
            dataset, which is fetched from the Hugging Face hub into data/hub: alpaca, alpaca-gpt4, dolly, lima,
            longform, flan (flan:PATTERN for some of its files), deita, longalpaca.
        output_dir: The directory to write. A dataset that is there already is replaced.
        checkpoint_dir: The model to train: its tokenizer and chat template are used. By default
            SmolLM2-135M-Instruct, which is downloaded once.
        max_seq_length: Longer examples are cut to so many tokens. An example that keeps no trained token is dropped.
        prompt_style: chat (the model's own template), alpaca, llama2, longalpaca, chatml, vicuna or plain. By default
            the published dataset's own, else chat where the model has a template, else alpaca.
        preset: Read a local file with the fields and the prompt style of this published dataset.
        mask_prompt: Train the answers only. False trains the prompts as well.
        limit: Read at most so many examples.
        show: How many samples to print.
    """
    from lit_swa.checkpoint import check_checkpoint_dir
    from lit_swa.checks import check_range
    from lit_swa.data import check_dataset, load_dataset, save_dataset, show_examples
    from lit_swa.formats.checkpoint import tokenizer_dir
    from lit_swa.formats.download import find_checkpoint
    from lit_swa.tokenizer import Tokenizer
    from lit_swa.utils import ProgressLine

    check_range("show", show, 0)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"{output_dir} is a file: give a directory to write to.")
    checkpoint_dir = find_checkpoint(checkpoint_dir)
    check_checkpoint_dir(checkpoint_dir)
    tokenizer, progress = Tokenizer(tokenizer_dir(checkpoint_dir)), ProgressLine(None, "examples")
    dataset = load_dataset(
        data,
        tokenizer,
        max_seq_length=max_seq_length,
        prompt_style=prompt_style,
        preset=preset,
        mask_prompt=mask_prompt,
        limit=limit,
        progress=progress,
    )
    progress.clear()
    print(dataset.report, file=sys.stderr)
    if show:
        print(show_examples(dataset, tokenizer, show), file=sys.stderr)
    check_dataset(dataset, tokenizer)
    save_dataset(dataset, output_dir)
    print(output_dir)


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
