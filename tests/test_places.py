"""Which checkpoint a user's words mean, wherever the command is started; what is there; what to type when it is not."""

import importlib
import re
import runpy
import sys
from importlib import metadata
from pathlib import Path

import pytest

from lit_swa.formats import places
from lit_swa.formats.places import locate, present, table_of_present

ROOT = Path(__file__).resolve().parents[1]
READY = ("lit_config.json", "lit_model.safetensors", "tokenizer.json")
NAME = "Org/tiny-Model-1"


def make(directory: Path, *names: str) -> Path:
    directory.mkdir(parents=True)
    for name in names:
        (directory / name).write_bytes(b"1234")
    return directory


@pytest.fixture
def project(tmp_path: Path, monkeypatch) -> Path:
    """A clone with one checkpoint, and another directory where the command is started."""
    clone = tmp_path / "project"
    make(clone / "scripts", "download.py")
    make(clone / "checkpoints" / NAME, *READY)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(places, "PROJECT", clone)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return clone


@pytest.mark.parametrize(
    "name", [NAME, f"{NAME}/", f"checkpoints/{NAME}", f"{NAME}/tokenizer.json", "{clone}/checkpoints/" + NAME]
)
@pytest.mark.parametrize("folder", ["elsewhere", "project", "project/checkpoints"])
def test_a_checkpoint_is_found_from_everywhere(project: Path, monkeypatch, name: str, folder: str) -> None:
    """Would catch a name that works in one directory only, and a second download for another one."""
    monkeypatch.chdir(project.parent / folder)
    found = locate(name.replace("{clone}", str(project)))
    assert found.resolve() == project / "checkpoints" / NAME


def test_what_lies_here_comes_first(project: Path, monkeypatch) -> None:
    """Would catch another model loaded than the one that stands before the user, and ~ taken for a name."""
    assert locate(make(Path("checkpoints", NAME), *READY)) == Path("checkpoints", NAME) == locate(NAME)
    assert locate(make(Path(NAME), *READY)) == Path(NAME) == locate(NAME)
    monkeypatch.setenv("HOME", str(project))
    assert locate(f"~/checkpoints/{NAME}") == project / "checkpoints" / NAME


def test_a_directory_of_something_else_hides_no_checkpoint(project: Path) -> None:
    """Would catch a folder such as Org/tiny-Model-1/notes, where the command is started, taken for the model."""
    make(Path(NAME), "notes.txt")
    assert locate(NAME) == project / "checkpoints" / NAME


def test_a_gguf_file_is_its_directory_or_a_command(project: Path, monkeypatch) -> None:
    """Would catch a file that is refused without a remedy, or weights taken that are not those of the file."""
    alone, mixed = make(Path("alone"), "a.gguf"), make(Path("mixed dir"), "a.gguf", "model.safetensors")
    with pytest.raises(ValueError, match="not converted yet: run python .*convert_hf.py --checkpoint_dir alone once"):
        locate(alone / "a.gguf")
    assert locate(alone / "a.gguf", convert=True) == alone
    for name in READY:
        (alone / name).touch()
    assert locate(alone / "a.gguf") == alone
    part = make(Path("parts"), "a-00001-of-00002.gguf", "a-00002-of-00002.gguf") / "a-00001-of-00002.gguf"
    with pytest.raises(ValueError, match="not converted yet: run python .*--checkpoint_dir parts once"):
        locate(part)
    for convert in (False, True):
        with pytest.raises(ValueError, match="mv 'mixed dir/a.gguf' 'mixed dir/a' && python .*'mixed dir/a'$"):
            locate(mixed / "a.gguf", convert)


@pytest.mark.parametrize(
    "name, message",
    [
        ("org/tiny-model-1", "did you mean Org/tiny-Model-1[?] .*download.py --repo_id org/tiny-model-1 downloads it"),
        ("tiny-Model-1", "did you mean Org/tiny-Model-1[?]$"),
        ("tiny", "did you mean Org/tiny-Model-1[?]$"),
        ("checkpoints/Org", "did you mean .*/checkpoints/Org/tiny-Model-1[?]$"),
        ("run", "run holds no checkpoint itself: did you mean run/final or run/step-4[?]$"),
        ("run/finel", "did you mean run/final[?]"),
        (
            "Other/thing",
            "python .*/scripts/download.py --repo_id Other/thing makes one, if the Hugging Face hub has it",
        ),
        (
            "Cached/thing",
            "cache has it: mkdir -p .*/Cached/thing && cp -rL .*/snapshots/c0/[.] .* && python .*convert_hf",
        ),
        ("nothing-like-it", "download.py makes one, and with --list it shows"),
        ("run/metrics.csv", "is a file: give the directory"),
        ("~nobody-of-this-name/x", "There is no checkpoint directory"),
    ],
)
def test_what_is_not_there_is_said_with_what_to_type(project: Path, name: str, message: str) -> None:
    """Would catch a bare "not found" for a misspelt name, a run's directory, a model of the hub or of its cache."""
    make(Path("run"), "metrics.csv")
    for part in ("final", "step-4"):
        make(Path("run", part), *READY)
    make(project.parent / "cache/models--Cached--thing/refs", "main").joinpath("main").write_text("c0")
    make(project.parent / "cache/models--Cached--thing/snapshots/c0", "config.json")
    with pytest.raises((FileNotFoundError, ValueError), match=message) as error:
        locate(name)
    assert "\n" not in str(error.value)


def test_the_list_says_what_is_there_and_what_is_to_be_done(project: Path) -> None:
    """Would catch a part of a download or of a conversion listed as a model."""
    for name, files in {
        "Org/converting": ("config.json", "model.safetensors"),
        "Org/broken": ("config.json",),
        "Org/fetching": ("config.json", ".model.safetensors.0123.lit_swa.part"),
        "adapter": ("lit_adapter.json",),
        "Org/other": ("notes.txt",),
    }.items():
        make(project / "checkpoints" / name, *files)
    assert {found.name: (found.state, found.n_bytes) for found in present()} == {
        NAME: ("ready", 12),
        "Org/converting": ("to convert", 8),
        "Org/broken": ("incomplete", 4),
        "Org/fetching": ("partly downloaded", 8),
        "adapter": ("adapter", 4),
    }
    [fetching] = [line for line in table_of_present() if line.startswith("Org/fetching")]
    assert fetching.endswith(f"partly downloaded: python {project}/scripts/download.py --repo_id Org/fetching")


def test_downloads_go_to_the_project_from_everywhere(project: Path, monkeypatch) -> None:
    """Would catch a model of GBs for each directory that a command is started in."""
    assert places.roots()[-1] == project / "checkpoints"
    monkeypatch.chdir(project)
    assert places.roots() == [Path("checkpoints")]
    monkeypatch.setattr(places, "PROJECT", project / "site-packages")
    assert places.roots() == [Path("checkpoints")]


def test_every_script_with_a_checkpoint_finds_it_by_name() -> None:
    """Would catch a script that knows paths only. Finetuning scripts find it in lit_swa/training: finetuning.py, and
    blockwise.py for blocks.py."""
    files = [path for folder in ("generate", "scripts", "lit_swa/training") for path in (ROOT / folder).glob("*.py")]
    taking = {path.stem: text for path in files if re.search(r"\bcheckpoint_dir: Path", text := path.read_text())}
    ways = r"(find_checkpoint|locate)\(", r"named_or_loaded\((\w+\.)*name, "
    finder = re.compile(rf"({'|'.join(ways)})(\w+\.)*checkpoint_dir")
    assert {name for name, text in taking.items() if not finder.search(text)} == {"download", "blocks"}
    assert {"chat", "finetuning", "evaluate_ppl", "convert_hf", "merge_lora", "export_hf"} < set(taking)
    assert finder.search((ROOT / "lit_swa/completion.py").read_text())  # for the scripts that take Generation


def test_python_m_lit_swa_tells_what_is_there_and_what_to_type(project: Path, capsys, monkeypatch) -> None:
    """Would catch a first look that needs a model, or commands that are not there."""
    import torch

    monkeypatch.setattr(sys, "argv", ["lit_swa"])
    runpy.run_module("lit_swa", run_name="__main__")
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed and "cpu: " in printed and "GB" in printed
    assert f"{NAME}" in printed and "ready" in printed
    make(project / "generate", "base.py")
    importlib.import_module("lit_swa.__main__").main()
    printed = capsys.readouterr().out
    assert f'python {project}/generate/base.py --checkpoint_dir {NAME} --prompt "' in printed
    assert f"python {project}/generate/chat.py --checkpoint_dir {NAME}" in printed
    monkeypatch.setattr(metadata, "version", lambda name: metadata.distribution("nothing-of-this-name").version)
    importlib.import_module("lit_swa.__main__").main()
    assert "torch MISSING: pip install -r requirements.txt" in capsys.readouterr().out
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert set(importlib.import_module("lit_swa.__main__").NEEDED) <= pinned
