"""python -m lit_swa: the versions, devices and checkpoints that are there, and what to type next."""

import importlib
import os
import platform
from collections.abc import Iterator
from importlib import metadata

NEEDED = ("torch", "numpy", "tokenizers", "sentencepiece", "huggingface_hub", "gguf", "jsonargparse")
OPTIONAL = {  # package -> what it is for
    "lightning": "finetuning",
    "bitsandbytes": "4 and 8 bits",
    "pyarrow": "Parquet files",
    "matplotlib": "pictures",
}


def version_of(package: str) -> str | None:
    """None where it is not installed. That of torch tells its build too: +cpu, +cu130."""
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
    return importlib.import_module(package).__version__ if package == "torch" else installed


def describe_packages() -> Iterator[str]:
    """One line of versions, and one of what else may be installed."""
    yield ", ".join(f"{name} {version_of(name) or 'MISSING: pip install -r requirements.txt'}" for name in NEEDED)
    yield ", ".join(
        f"{name} {version_of(name) or f'is not installed (for {what}: pip install {name})'}"
        for name, what in OPTIONAL.items()
    )


def describe_devices() -> Iterator[str]:
    """One line for each device, with its memory and what of it is free."""
    if version_of("torch") is None:
        yield "unknown without torch"
        return
    import torch

    from lit_swa.memory import free_memory, machine_memory

    total = machine_memory()
    memory = f", {total / 1e9:.1f} GB, {free_memory(torch.device('cpu')) / 1e9:.1f} GB of them free" if total else ""
    yield f"cpu: {platform.processor() or platform.machine()}, {os.cpu_count()} cores{memory}"
    for index in range(torch.cuda.device_count()):
        free, whole = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield f"cuda:{index}: {name}, {whole / 1e9:.1f} GB, {free / 1e9:.1f} GB of them free"
    if torch.backends.mps.is_available():
        yield "mps: Apple's GPU"


def next_commands() -> Iterator[str]:
    """What to type, with the first checkpoint that is ready."""
    from lit_swa.formats.places import PROJECT, is_elsewhere, present

    if not (PROJECT / "generate" / "base.py").is_file():
        yield "The scripts do not come with the package: clone the project, and run python generate/base.py there."
        return
    folder = f"{PROJECT}/" if is_elsewhere() else ""
    ready = [found.name for found in present() if found.state == "ready"]
    which = f" --checkpoint_dir {ready[0]}" if ready else ""
    if not ready:
        yield f"python {folder}scripts/download.py --list    # what can be downloaded"
    yield f'python {folder}generate/base.py{which} --prompt "The three primary colours are"'
    yield f"python {folder}generate/chat.py{which}"


def main() -> None:
    """Print versions, devices with their memory, the checkpoints that are there, and what to type next."""
    from lit_swa import __version__
    from lit_swa.formats.places import roots, table_of_present

    print(f"lit_swa {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for title, lines in (
        ("packages", describe_packages()),
        ("devices", describe_devices()),
        (f"checkpoints in {' and '.join(str(root.resolve()) for root in roots())}", table_of_present() or ["none"]),
        ("next", next_commands()),
    ):
        print(f"\n{title}", *(f"  {line}" for line in lines), sep="\n")


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
