"""Published datasets on the Hugging Face hub: where they are, what their fields mean, and how to fetch them."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from lit_swa.data.records import Fields
from lit_swa.formats.files import directory_lock, find_inside, named_when_full, read_json, require_space, write_json
from lit_swa.formats.hub import ask_hub, fetch_file, missing_bytes
from lit_swa.formats.places import roots


class Preset(NamedTuple):
    """A published dataset: where it is, what its fields mean, how its prompts are written."""

    repo: str
    files: tuple[str, ...]  # patterns of the training files
    fields: Fields
    prompt_style: str | None  # None: the model's chat template if it has one
    description: str


PRESETS = {
    "alpaca": Preset(
        "tatsu-lab/alpaca", ("data/train-*.parquet",), Fields("instruction", "input", "output"), "alpaca",
        "52,002 instructions, answers by text-davinci-003",
    ),
    "alpaca-gpt4": Preset(
        "vicgalle/alpaca-gpt4", ("data/train-*.parquet",), Fields("instruction", "input", "output"), "alpaca",
        "Alpaca's instructions, answers by GPT-4",
    ),
    "dolly": Preset(
        "databricks/databricks-dolly-15k", ("databricks-dolly-15k.jsonl",),
        Fields("instruction", "context", "response"), "alpaca", "15,011 instructions and answers by people",
    ),
    "lima": Preset(
        "GAIR/lima", ("train.jsonl",), Fields(messages="conversations"), None,
        "1,030 chosen conversations; ask for access on the hub",
    ),
    "longform": Preset(
        "akoksal/LongForm", ("data/train-*.parquet",), Fields("input", "", "output"), "alpaca",
        "23,652 long texts, each with the instruction that asks for it",
    ),
    "flan": Preset(
        "Muennighoff/flan", ("train/*.jsonl",), Fields("inputs", "", "targets"), "alpaca",
        "66 tasks in ten wordings each, many GB: choose with flan:PATTERN",
    ),
    "deita": Preset(
        "HuggingFaceH4/deita-10k-v0-sft", ("data/train_sft-*.parquet",), Fields(messages="messages"), None,
        "about 10,000 conversations chosen for quality",
    ),
    "longalpaca": Preset(
        "Yukang/LongAlpaca-12k", ("LongAlpaca-12k.json",), Fields("instruction", "input", "output"), "longalpaca",
        "9,000 questions on long texts and 3,000 short instructions",
    ),
}  # fmt: skip

HUB_DIR = "data/hub"  # in the project's directory, as checkpoints/ is
HUB_INDEX = "files.json"  # selection -> files, written once they are all there


def fetch_preset(name: str, selection: str = "") -> list[Path]:
    """The files of a preset, downloaded into data/hub/NAME of the project unless they are there or here.

    selection: a pattern of file names such as "aeslc*"; "" takes all. Raises OSError in one sentence.
    """
    for root in roots(HUB_DIR):
        if known := _known_files(root / name, selection):
            return known
    directory = root / name
    with directory_lock(directory), named_when_full(directory):
        if known := _known_files(directory, selection):  # another process was faster
            return known
        try:
            info = ask_hub(PRESETS[name].repo, kind="dataset")
        except ConnectionError as error:
            raise OSError(f"{error}: check the network, or give a local file with preset.") from None
        files = select_files(info, PRESETS[name], selection)
        require_space(directory, missing_bytes(files, directory))
        for file in files:
            fetch_file(info, file, directory, kind="dataset")
        write_json(directory / HUB_INDEX, {**_read_index(directory), selection: [file.rfilename for file in files]})
    return [directory / file.rfilename for file in files]


def _known_files(directory: Path, selection: str) -> list[Path]:
    """The files of a selection if all were downloaded, else none."""
    names = _read_index(directory).get(selection, [])
    plain = isinstance(names, list) and all(isinstance(name, str) and name.isprintable() for name in names)
    if not plain or any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
        raise ValueError(f"{directory / HUB_INDEX} is damaged: delete it, and the files are looked at again.")
    known = [directory / name for name in names]
    return known if all(path.is_file() for path in known) else []


def _read_index(directory: Path) -> dict[str, Any]:
    return read_json(find_inside(directory, HUB_INDEX)) if (directory / HUB_INDEX).exists() else {}


def select_files(info: Any, preset: Preset, selection: str) -> list[Any]:
    files = [f for f in info.siblings or [] if any(fnmatch.fnmatch(f.rfilename, p) for p in preset.files)]
    chosen = [f for f in files if fnmatch.fnmatch(Path(f.rfilename).name, selection or "*")]
    if not chosen:
        names = ", ".join(Path(f.rfilename).name for f in files[:8]) or "none"
        what = f"called {selection}" if selection else f"like {', '.join(preset.files)}"
        raise ValueError(f"{preset.repo} has no file {what} (it has {names}): choose others, or give a local file.")
    return sorted(chosen, key=lambda file: file.rfilename)
