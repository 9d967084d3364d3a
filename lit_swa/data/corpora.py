"""Published texts to pretrain on: where each is on the Hugging Face hub, and which key holds the text."""

from __future__ import annotations

from typing import NamedTuple


class Corpus(NamedTuple):
    """A published corpus.

    Attributes:
        repo: Its dataset on the hub.
        splits: Split -> pattern of its files, all of them Parquet or all of them JSON Lines.
        key: The key that holds the text.
        left_out: (key, inner key, value): documents with this value are left out; None: all are used.
        description: What it is.
    """

    repo: str
    splits: dict[str, str]
    key: str
    left_out: tuple[str, str, str] | None
    description: str


SLIMPAJAMA = Corpus(
    "cerebras/SlimPajama-627B",
    {
        "train": "train/chunk*/*.jsonl.zst",
        "validation": "validation/chunk*/*.jsonl.zst",
        "test": "test/chunk*/*.jsonl.zst",
    },
    "text",
    None,
    "RedPajama without duplicates, 627 billion tokens",
)
STARCODER = Corpus(
    "bigcode/starcoderdata", {"train": "*/train-*.parquet"}, "content", None,
    "783 GB of code in 86 languages; ask for access on the hub",
)  # fmt: skip

CORPORA = {
    "openwebtext": Corpus(
        "Skylion007/openwebtext", {"train": "plain_text/train-*.parquet"}, "text", None,
        "8 million pages that Reddit linked to, as GPT-2's",
    ),
    "redpajama": Corpus(
        "togethercomputer/RedPajama-Data-1T-Sample", {"train": "*.jsonl"}, "text", None,
        "a billion tokens of RedPajama; the files of all 1.2 trillion have the same keys",
    ),
    "slimpajama": SLIMPAJAMA,
    "starcoder": STARCODER,
    "tinystories": Corpus(
        "roneneldan/TinyStories",
        {"train": "data/train-*.parquet", "validation": "data/validation-*.parquet"},
        "text", None, "2 million stories in a small child's words",
    ),
    "fineweb-edu": Corpus(
        "HuggingFaceFW/fineweb-edu",
        {"train": "data/*/*.parquet", **{f"sample-{n}BT": f"sample/{n}BT/*.parquet" for n in (10, 100, 350)}},
        "text", None, "1.3 trillion tokens of educational pages; --split sample-10BT for a part",
    ),
}  # fmt: skip

# Name -> (corpus, its share of the samples). TinyLlama leaves SlimPajama's GitHub out, since StarCoder has it.
MIXTURES: dict[str, dict[str, tuple[Corpus, float]]] = {
    "tinyllama": {
        "slimpajama": (SLIMPAJAMA._replace(left_out=("meta", "redpajama_set_name", "RedPajamaGithub")), 0.693584),
        "starcoder": (STARCODER, 0.306416),
    },
}


def find_corpora(preset: str) -> dict[str, tuple[Corpus, float]]:
    """The corpora of a preset with their weights, one of them called "" where it is no mixture. Raises ValueError."""
    if preset in MIXTURES:
        return MIXTURES[preset]
    if preset not in CORPORA:
        names = ", ".join(sorted([*CORPORA, *MIXTURES]))
        raise ValueError(f"preset={preset!r} is not known: choose from {names}.")
    return {"": (CORPORA[preset], 1.0)}
