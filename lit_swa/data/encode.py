"""Documents as token ids, as fast as the tokenizer's library encodes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lit_swa.formats.tokenizer import Tokenizer
from lit_swa.texts import as_ids, encode_file, encode_text, find_frame

LONG = 2**14  # characters from which a text is cut: the library takes twice as long for each of a long one
PIECE = 2**13  # characters of such a cut
NEAR = 128  # characters on either side of a cut whose ids tell whether it is between tokens
BORDER = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S)(?= \S)")  # the end of a line, or of a word


class DocumentEncoder:
    """Gives the ids of tokenizer.encode(document, eos=True), for many documents at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.frame = find_frame(tokenizer, eos=True)
        self.cuts = self.frame is not None and not tokenizer.sums_scores

    def encode(self, documents: Sequence[str | Path]) -> list[np.ndarray]:
        """The ids of each document, uint32. A path is a file that is one document."""
        if self.frame is None:
            return [self.encode_alone(document) for document in documents]
        pieces: list[str] = []
        spans: list[tuple[int, int] | None] = []  # which of the pieces are the document
        for document in documents:
            cut = self.cut(document)
            spans.append(None if cut is None else (len(pieces), len(pieces) + len(cut)))
            pieces += cut or []
        ids = self.tokenizer.encode_batch(pieces)
        before, after = map(as_ids, self.frame)
        return [
            self.encode_alone(document) if span is None else np.concatenate([before, *ids[slice(*span)], after])
            for document, span in zip(documents, spans, strict=True)
        ]

    def encode_alone(self, document: str | Path) -> np.ndarray:
        if isinstance(document, Path):
            return encode_file(self.tokenizer, document, eos=True)
        return encode_text(self.tokenizer, document, eos=True)

    def cut(self, document: str | Path) -> list[str] | None:
        """Pieces whose ids, one behind the other, are the document's; None where no such cuts are found."""
        if isinstance(document, Path):
            return None
        if len(document) < LONG:
            return [document]
        if not self.cuts:
            return None
        places = [0]
        while len(document) - places[-1] >= LONG:
            at = places[-1] + PIECE
            border = BORDER.search(document, at, at + PIECE)
            if border is None:
                return None
            places.append(border.start())
        sides = [(document[at - NEAR : at], document[at : at + NEAR]) for at in places[1:]]
        near = self.tokenizer.encode_batch([text for left, right in sides for text in (left, right, left + right)])
        for left, right, both in zip(near[::3], near[1::3], near[2::3], strict=True):
            if not np.array_equal(np.concatenate([left, right]), both):
                return None
        return [document[a:b] for a, b in zip(places, [*places[1:], len(document)], strict=True)]
