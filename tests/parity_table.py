"""The largest difference to transformers, architecture by architecture: python tests/parity_table.py.

The models, lengths and bounds are those of test_parity_hf.py, which fails at 1e-4.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import torch
import transformers
from test_parity_hf import CASES, WINDOW, build_reference, largest_error

from lit_swa.checkpoint import convert_hf_checkpoint, load_model
from lit_swa.utils import describe_machine


@torch.no_grad()
def compare(case: str, tokens: int) -> dict[str, float | str]:
    """Largest error relative to the logits' scale: uncached, and over several splits with each cache."""
    torch.manual_seed(11)
    reference = build_reference(case)
    with tempfile.TemporaryDirectory() as directory:
        reference.save_pretrained(directory)
        convert_hf_checkpoint(directory)
        model = load_model(directory)
    idx = torch.randint(0, 97, (2, tokens))
    expected = reference(idx).logits
    row = {"model": case, "uncached": largest_error(model(idx), expected)}
    for name, rolling in (("dense cache", False), ("rolling cache", True)):
        model.config.rolling_kv_cache = rolling
        errors = []
        for size in (1, 7, WINDOW, tokens):
            model.set_kv_cache(2, tokens)
            parts = [
                model(idx[:, i : i + size], torch.arange(i, min(i + size, tokens))) for i in range(0, tokens, size)
            ]
            errors.append(largest_error(torch.cat(parts, dim=1), expected))
        row[name] = max(errors)
    return row


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokens, rows = 12 * WINDOW, []
    print(f"{'model':30} {'uncached':>10} {'dense':>10} {'rolling':>10}   (window {WINDOW}, {tokens} tokens)")
    for case in CASES:
        rows.append(compare(case, tokens))
        print(
            f"{case:30}" + "".join(f" {rows[-1][k]:10.1e}" for k in ("uncached", "dense cache", "rolling cache")),
            flush=True,
        )
    output = Path("tutorials/results/parity.json")
    content = {
        "command": "python tests/parity_table.py",
        "machine": describe_machine("cpu"),
        "transformers": transformers.__version__,
        "tokens": tokens,
        "window": WINDOW,
        "rows": rows,
    }
    output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
