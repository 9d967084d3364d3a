"""What a window costs, recipe by recipe: the harm of each layer, what is scored behind a prompt, the script."""

import json

import pytest
import torch

from lit_swa.evaluate import with_fields
from lit_swa.mixers import harm_of_each

SINKS = {"sliding_window_size": 4, "n_sink_tokens": 2}


def test_the_harm_of_a_layer_is_that_of_a_model_with_this_layer_alone_changed(tiny_model):
    """Catches: a layer that stays changed, one that is left out, numbers under the wrong layer."""
    gpt, ids = tiny_model(n_layer=3), torch.randint(0, 97, (1, 20))

    def loss(model) -> float:
        return model(ids, targets=ids.roll(-1)).item()

    model = with_fields(gpt, attention="streaming", **SINKS)
    changed, told = {i: attn.mixer for i, attn in enumerate(model.layers)}, []
    before, losses = harm_of_each(model, [attn.mixer for attn in gpt.layers], changed, lambda: loss(model), told.append)
    assert told == [1, 2, 3] and before == pytest.approx(loss(gpt), rel=1e-6)
    for i in range(3):
        pattern = ",".join("streaming" if n == i else "full" for n in range(3))
        assert losses[i] == pytest.approx(loss(with_fields(gpt, attention=pattern, **SINKS)), rel=1e-6)
    assert loss(model) == pytest.approx(loss(with_fields(gpt, attention="streaming", **SINKS)), rel=1e-6)


def test_the_script(run_script, tiny_checkpoint, tmp_path):
    """Catches: a recipe whose fields do not work, the full model at less than 100% agreement with itself, and scores
    that are not those of the positions that they are said to be of."""
    text, output = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("".join(f"The {n}th fox jumps over {n * n} lazy dogs. " for n in range(60)))
    arguments = ["--checkpoint_dir", tiny_checkpoint, "--window", 16, "--keep_full", 1, "--lengths", "[64,96]"]
    arguments += ["--texts", 2, "--scored", 8, "--passkeys", 1, "--passkey_length", 300, "--dtype", "float32"]
    arguments += ["--data", text, "--output", output, "--harm_texts", 1]
    code, out, err = run_script("scripts/adapt_window.py", *arguments)
    assert code == 0, err
    result = json.loads(output.read_text())
    rows = {row["recipe"]: row for row in result["rows"]}
    assert list(rows) == [line.split(" | ")[0][2:] for line in out.splitlines()[2:11]] and len(rows) == 9
    assert rows["full"]["agreement"] == {"64": 1.0, "96": 1.0}
    assert rows["streaming"]["cache_bytes"] < rows["full"]["cache_bytes"] == rows["prompt streaming"]["cache_bytes"]
    assert (
        len({row["ppl"]["96"] for name, row in rows.items() if "1 full" not in name}) == 6
    )  # of two layers both may be kept alike
    assert f"layers {result['kept'][0]} keep full attention: --model.attention " in out
    worst = max(result["harm"], key=lambda i: result["harm"][i])
    assert result["kept"] == [int(worst)] and output.with_suffix(".png").exists()
    check_perplexity(tiny_checkpoint, text, rows["streaming"])
    again = run_script("scripts/adapt_window.py", *arguments)
    assert again[:2] == (0, out) and "holds the results" in again[2]


def check_perplexity(directory, text, row) -> None:
    """The last 8 tokens of both texts of 96, in one call without a cache."""
    from lit_swa.checkpoint import load_model
    from lit_swa.evaluate import read_stream, window_nll

    model = load_model(directory, **row["fields"])
    tokens = read_stream(text, directory, model.config.vocab_size)[0].tolist()
    starts = [64, len(tokens) - 96]  # behind the text of 4 windows that measured the harm
    nll = [window_nll(model, torch.tensor([tokens[a : a + 96]]))[0, -8:] for a in starts]
    assert row["ppl"]["96"] == pytest.approx(torch.cat(nll).mean().exp().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", 90], "window=90 must be smaller than every prompt"),
        (["--recipes", "[sliding,nearby]"], "There is no recipe 'nearby': choose from full, sliding"),
        (["--lengths", "[64,9999]"], "A length of 9999 tokens is more than the context of 512"),
        (["--keep_full", 2], "keep_full=2 does not fit"),
        (["--passkey_length", 64], "A length of 64 tokens is too short: the task, the pass key and the question take"),
        (["--scored", 80], "the shortest has -16 tokens: lower --window or --scored"),
    ],
)
def test_wrong_arguments(run_script, tiny_checkpoint, tmp_path, arguments, message):
    """Catches: a mistake that shows only after hours, or as a traceback."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    given = {"--window": 16, "--keep_full": 1, "--lengths": "[64,96]", "--passkey_length": 300, "--scored": 8}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    flat = [x for pair in given.items() for x in pair]
    code, _, err = run_script(
        "scripts/adapt_window.py",
        "--checkpoint_dir",
        tiny_checkpoint,
        "--data",
        text,
        "--output",
        tmp_path / "o.json",
        *flat,
    )
    assert code == 2 and message in err and "Traceback" not in err
