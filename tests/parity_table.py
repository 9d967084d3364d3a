"""The largest difference to transformers, family by family, in and out: python tests/parity_table.py.

The models are those of test_parity_hf.py and test_families.py, which fail at 1e-4 and 1e-5. "exported" is the model
that transformers loads from an export, against the one that was converted.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import test_families
import test_parity_hf
import torch
import transformers
from test_parity_hf import WINDOW, largest_error

from lit_swa.checkpoint import convert_hf_checkpoint, export_hf_checkpoint, load_model
from lit_swa.utils import describe_machine

COLUMNS = ("uncached", "dense cache", "rolling cache", "exported")


@torch.no_grad()
def compare(case: str, build: Callable[[str], torch.nn.Module], tokens: int) -> dict[str, float | str]:
    """Largest error relative to the logits' scale: uncached, over several splits with each cache, and back."""
    torch.manual_seed(11)
    reference, idx = build(case), torch.randint(1, 97, (2, tokens))
    expected = reference(idx).logits
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "a"), Path(directory, "b")
        reference.save_pretrained(source)
        (source / "tokenizer.json").write_text("{}")  # not read here
        convert_hf_checkpoint(source)
        model = load_model(source)
        export_hf_checkpoint(source, target)
        back = transformers.AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager").eval()
        row = {"model": case, "uncached": largest_error(model(idx), expected)}
        row["exported"] = largest_error(back(idx).logits, expected)
    for name, rolling in (("dense cache", False), ("rolling cache", True)):
        model.config.rolling_kv_cache = rolling
        errors = []
        for size in (1, 7, WINDOW, tokens):
            model.set_kv_cache(2, tokens)
            starts = range(0, tokens, size)
            parts = [model(idx[:, i : i + size], torch.arange(i, min(i + size, tokens))) for i in starts]
            errors.append(largest_error(torch.cat(parts, dim=1), expected))
        row[name] = max(errors)
    return row


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = []
    print(f"{'model':30}" + "".join(f" {name:>13}" for name in COLUMNS))
    for tests, tokens in ((test_parity_hf, 12 * WINDOW), (test_families, 64)):
        for case in tests.CASES:
            rows.append(compare(case, tests.build_reference, tokens))
            print(f"{case:30}" + "".join(f" {rows[-1][name]:13.1e}" for name in COLUMNS), flush=True)
    output = Path("tutorials/results/parity.json")
    content = {
        "command": "python tests/parity_table.py",
        "machine": describe_machine("cpu"),
        "transformers": transformers.__version__,
        "rows": rows,
    }
    output.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
