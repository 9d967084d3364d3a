"""What the evaluation scripts share: results that survive an interruption, texts as tokens, perplexity."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from lit_swa.files import write_json


class Results:
    """The results file of a run, and its finished parts while the run goes on.

    Parts are kept in `<output>.partial`, which a second start with the same arguments goes on from. `finish` writes
    `output` and removes it. Nothing incomplete ever stands under the name `output`.
    """

    def __init__(self, output: Path, arguments: dict[str, Any]) -> None:
        """arguments: all that the results depend on, as JSON can hold it."""
        self.output, self.arguments = Path(output), json.loads(json.dumps(arguments, default=str))
        self.partial = self.output.with_name(self.output.name + ".partial")
        self.parts: dict[str, Any] = {}
        self.saved = time.monotonic()
        kept = self._read(self.partial)
        if kept is not None and kept.get("arguments") == self.arguments:
            self.parts = kept["parts"]
            print(f"going on from {self.partial}: {len(self.parts)} parts are done", file=sys.stderr)

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    @property
    def finished(self) -> dict[str, Any] | None:
        """The results of an earlier run with the same arguments, None if there are none."""
        content = self._read(self.output)
        return content if content is not None and content.get("arguments") == self.arguments else None

    def add(self, key: str, part: Any, every: float = 5.0) -> None:
        """Keep a finished part; to the disk at most once in so many seconds."""
        self.parts[key] = part
        if time.monotonic() - self.saved >= every:
            self.save()

    def save(self) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.partial, {"arguments": self.arguments, "parts": self.parts})
        self.saved = time.monotonic()

    def finish(self, results: dict[str, Any]) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.output, {"arguments": self.arguments} | results)
        self.partial.unlink(missing_ok=True)
