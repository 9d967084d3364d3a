"""Where checkpoints lie, and which one a user's words mean. Nothing here imports torch, and nothing is read but names.

A name is looked for as it stands, then under checkpoints/, here and then in the project's own directory: a command that
is started elsewhere finds what was downloaded. Downloads go to the project's checkpoints/ or, where the package is
installed without its scripts, to checkpoints/ here.
"""

import difflib
import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[2]
CHECKPOINTS = "checkpoints"
REPO_ID = r"\w[\w.-]*/\w[\w.-]*"
WEIGHTS = (".safetensors", ".bin", ".pth", ".gguf")
PARTIAL = ".lit_swa.part"  # how the name of a file ends that is not downloaded whole


class Found(NamedTuple):
    """A directory with a checkpoint, or with a part of one."""

    name: str  # that --checkpoint_dir takes
    directory: Path
    n_bytes: int
    state: str


def places(name: str | Path) -> list[Path]:
    """Where a checkpoint of this name may be, the first choice first."""
    given = Path(os.path.expanduser(name))
    bases = [Path(), *([PROJECT] if is_elsewhere() else [])]
    return [given] if given.is_absolute() else [base / folder / given for base in bases for folder in ("", CHECKPOINTS)]


def roots(folder: str = CHECKPOINTS) -> list[Path]:
    """The directories that hold checkpoints (or what else the folder is for); downloads go to the last one."""
    return [Path(folder), *([PROJECT / folder] if is_elsewhere() else [])]


def is_elsewhere() -> bool:
    """The package is part of a clone, which is not the current directory."""
    return (PROJECT / "scripts" / "download.py").is_file() and Path.cwd() != PROJECT


def locate(name: str | Path, convert: bool = False) -> Path:
    """The directory of the checkpoint that a user names: itself, a file in it, or a repository that was downloaded.

    convert: it may be one that is not converted yet.
    Raises FileNotFoundError or ValueError, which say what there is, or what to type.
    """
    there = [place for place in places(name) if place.exists()]
    if not there:
        raise FileNotFoundError(_unknown(str(name)))
    path = next((place for place in there if place.is_file() or state_of(place)), there[0])
    if not path.is_dir():
        return _directory_of(path, convert)
    if state_of(path) is None and (inside := [child for child in _subdirectories(path) if state_of(child)]):
        raise FileNotFoundError(f"{path} holds no checkpoint itself: did you mean {_either(map(str, inside))}?")
    return path


def state_of(directory: Path) -> str | None:
    """ready, adapter, partly downloaded, to convert, incomplete; None where nothing belongs to a checkpoint."""
    names = _names(directory)
    if "lit_config.json" in names and {"lit_model.safetensors", "lit_model.safetensors.index.json"} & names:
        return "ready"
    if {"lit_adapter.json", "adapter_config.json"} & names:
        return "adapter"
    if any(name.endswith(PARTIAL) for name in names):
        return "partly downloaded"
    if _sources(directory):
        return "to convert"
    return "incomplete" if {"config.json", "lit_config.json"} & names else None


def script(name: str, **arguments: object) -> str:
    """What to type to run one of the project's scripts from here."""
    path = PROJECT / "scripts" / name if is_elsewhere() else Path("scripts", name)
    return shlex.join(
        ["python", str(path), *(str(word) for key, value in arguments.items() for word in (f"--{key}", value))]
    )


def present() -> list[Found]:
    """The checkpoints under checkpoints/, here and in the project."""
    found = []
    for root in roots():
        for directory in sorted(child for top in [root, *_subdirectories(root)] for child in _subdirectories(top)):
            if state := state_of(directory):
                n_bytes = sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
                found.append(Found(directory.relative_to(root).as_posix(), directory, n_bytes, state))
    return found


def table_of_present() -> list[str]:
    """A line for each checkpoint that is there: its name, size and state."""
    rows = [(found.name, f"{found.n_bytes / 1e9:.2f} GB", found.state, _next_step(found)) for found in present()]
    width = max((len(row[0]) for row in rows), default=0)
    return [f"{name:{width}}  {size:>9}  {state}{step}" for name, size, state, step in rows]


def _next_step(found: Found) -> str:
    """What to type so that it becomes ready."""
    repo, _, revision = found.name.partition("@")
    again = script("download.py", repo_id=repo, **({"revision": revision} if revision else {}))
    steps = {
        "to convert": script("convert_hf.py", checkpoint_dir=found.directory),
        "partly downloaded": again,
        "incomplete": again,
    }
    return f": {steps[found.state]}" if found.state in steps else ""


def _subdirectories(directory: Path) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:  # not there, or not to be read
        return []


def _names(directory: Path) -> set[str]:
    try:
        return {path.name for path in directory.iterdir()}
    except OSError:  # not to be read
        return set()


def _sources(directory: Path) -> list[str]:
    """Files of weights that a conversion may start from."""
    names = sorted(name for name in _names(directory) if name.endswith(WEIGHTS))
    return [name for name in names if not name.startswith(("lit_model", "mmproj", "."))]


def _without_part(name: str) -> str:
    """model.gguf for model-00001-of-00003.gguf, so that the parts of a file have one name."""
    return re.sub(r"-\d{5}-of-\d{5}(?=\.gguf$)", "", name)


def _directory_of(file: Path, convert: bool) -> Path:
    """The directory of a checkpoint, a file of which is named. Raises ValueError where it must be converted first."""
    directory = file.parent
    if file.suffix != ".gguf":
        if state_of(directory) is None:
            raise ValueError(f"{file} is a file: give the directory of a checkpoint.")
        return directory
    others = [name for name in _sources(directory) if _without_part(name) != _without_part(file.name)]
    if convert and all(name.endswith(".gguf") for name in others):
        return directory
    if others:
        own = directory / file.stem
        move = shlex.join(["mkdir", str(own)]) + " && " + shlex.join(["mv", str(file), str(own)])
        raise ValueError(
            f"{file} lies beside other weights, such as {others[0]}: put it into a folder of its own and convert it, "
            f"with {move} && {script('convert_hf.py', checkpoint_dir=own)}"
        )
    if state_of(directory) != "ready":
        raise ValueError(
            f"{file} is not converted yet: run {script('convert_hf.py', checkpoint_dir=directory)} once, and then give "
            f"--checkpoint_dir {shlex.quote(str(directory))}."
        )
    return directory


def _unknown(name: str) -> str:
    """One sentence for a checkpoint that is not there, with the names that come near, or the way to get it."""
    text = f"There is no checkpoint directory {name[:200]}"
    repo = name.removeprefix(f"{CHECKPOINTS}/")
    is_repo = re.fullmatch(REPO_ID, repo) is not None
    download = script("download.py", repo_id=repo)
    if is_repo and (copying := copy_from_hub_cache(repo)):
        return f"{text}; Hugging Face's cache has it: {copying}"
    if near := _near(name, repo):
        return f"{text}: did you mean {_either(near)}?" + (f" ({download} downloads it.)" if is_repo else "")
    if is_repo:
        return f"{text}: {download} makes one, if the Hugging Face hub has it."
    return f"{text}: {script('download.py')} makes one, and with --list it shows those that are there."


def _near(name: str, repo: str) -> list[str]:
    """Names of checkpoints that are there, and of neighbours in the directory that is meant, nearly spelt like this or
    beginning so."""
    known = {spelt.lower(): found.name for found in present() for spelt in (found.name.split("/")[-1], found.name)}
    near = [
        known[key] for word in (repo, repo.split("/")[-1]) for key in difflib.get_close_matches(word.lower(), known)
    ]
    near += [known[key] for key in known if key.startswith(repo.lower())]
    parent = Path(os.path.expanduser(name)).parent
    neighbours = {path.name.lower(): str(path) for path in _subdirectories(parent)} if parent != Path() else {}
    near += [neighbours[key] for key in difflib.get_close_matches(Path(name).name.lower(), neighbours)]
    return list(dict.fromkeys(near))[:3]


def _either(names: object) -> str:
    return " or ".join(list(names)[:3])


def copy_from_hub_cache(repo: str) -> str | None:
    """What to type to make a checkpoint of what transformers and others keep of a repository, if they do."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(repo, "config.json")
    except HFValidationError:
        return None
    if not isinstance(config, str):
        return None
    own, snapshot = roots()[-1] / repo, Path(config).parent
    to, convert = shlex.quote(str(own)), script("convert_hf.py", checkpoint_dir=own)
    return f"mkdir -p {to} && cp -rL {shlex.quote(str(snapshot))}/. {to} && {convert}"
