"""Linear attention block by block: what is split, saved, trained alone and put together equals training it whole."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import randomize

from lit_swa import GPT, Config
from lit_swa.checkpoint import load_model, save_checkpoint
from lit_swa.formats.files import open_safetensors
from lit_swa.training import block_inputs, linearizing, memory

SCRIPT = "finetune/linearize_blockwise.py"


@pytest.fixture(scope="module")
def data_file(tmp_path_factory) -> Path:
    """Thirty short instructions of several lengths."""
    rng, words = np.random.default_rng(0), "the quick brown fox jumps over lazy dog and sleeps".split()
    made = [{"instruction": f"Say {i}", "output": " ".join(rng.choice(words, 1 + i % 11))} for i in range(30)]
    path = tmp_path_factory.mktemp("data") / "data.json"
    path.write_text(json.dumps(made))
    return path


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint, tmp_path_factory) -> Path:
    """Five layers, two of them with a window, and embeddings that are scaled: blocks that differ in every way."""
    directory = tmp_path_factory.mktemp("five")
    fields = load_model(tiny_checkpoint).config.to_dict() | {"n_layer": 5, "scale_embeddings": True}
    config = Config.from_dict(fields | {"attention": "full,sliding,full", "sliding_window_size": 6})
    torch.manual_seed(7)
    model = GPT(config)
    randomize(model)
    save_checkpoint(model, config, directory, source_dir=tiny_checkpoint)
    return directory


@pytest.fixture
def blockwise(run_script, checkpoint, data_file, tmp_path, monkeypatch):
    """Run a step in tmp_path/NAME, as a user would: stderr."""
    monkeypatch.setattr(linearizing, "save_picture", lambda *a: False)
    own = {
        "shard": {"checkpoint_dir": checkpoint, "layers_per_block": 2, "model.linear_window": 4},
        "inputs": {"checkpoint_dir": checkpoint, "data": data_file, "max_seq_length": 64},
        "train": {"batch_size": 4, "micro_batch_size": 2, "pack": "false", "max_steps": 4, "eval_interval": 2},
        "stitch": {"checkpoint_dir": checkpoint},
    }
    own["train"] |= {"lr_schedule": "constant", "grad_clip": 0}

    def run(step: str, block: int | None = None, code: int = 0, name: str = "blocks", **arguments) -> str:
        how = own[step] | ({} if block is None else {"block": block}) | arguments
        flags = [x for key, value in how.items() if value is not None for x in (f"--{key}", value)]
        rc, _, err = run_script(SCRIPT, "--step", step, "--out_dir", tmp_path / name, *flags)
        assert rc == code, err
        return err

    return run


@pytest.fixture
def whole(run_script, checkpoint, data_file, tmp_path, monkeypatch) -> Path:
    """What finetune/linearize.py makes of the same checkpoint, all layers at once: OUT_DIR/transfer."""
    monkeypatch.setattr(memory, "estimate_step", lambda *a: (_ for _ in ()).throw(RuntimeError("not now")))
    how = {"checkpoint_dir": checkpoint, "data": data_file, "max_seq_length": 64, "model.linear_window": 4}
    how |= {"batch_size": 4, "micro_batch_size": 2, "pack": "false", "max_steps": 4, "eval_interval": 2}
    how |= {
        "transfer_schedule": "constant",
        "grad_clip": 0,
        "stage2_steps": 0,
        "window_dropout": 0.5,
        "sample": "false",
    }
    flags = [x for key, value in how.items() for x in (f"--{key}", value)]
    rc, _, err = run_script("finetune/linearize.py", "--out_dir", tmp_path / "whole", *flags)
    assert rc == 0, err
    return tmp_path / "whole" / "transfer"


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t.load() for path in directory.glob("*.safetensors") for name, t in open_safetensors(path).items()}


def rows_of(path: Path) -> list[list[str]]:
    return [line.split(",") for line in path.read_text().splitlines()]


def test_blocks_trained_alone_equal_the_whole(blockwise, whole, tmp_path, run_script, monkeypatch):
    """Catches: a block that reads another layer's input, or texts in another order; a weight under another layer's
    name; a gradient of another size; features lost in stitching."""
    monkeypatch.setattr(block_inputs, "PART_BYTES", 100 * 48 * 4)  # several parts
    blockwise("shard")
    said = blockwise("inputs")
    for n in (1, 0):  # in any order; the third has no layer that becomes linear
        blockwise("train", n, window_dropout=0.5)
    blockwise("stitch")
    out_dir = tmp_path / "blocks"
    made, expected = stored(out_dir / "stitched"), stored(whole / "final")
    assert made.keys() == expected.keys() and len(list((out_dir / "block-000" / "inputs").glob("part-*"))) > 3
    base = {name for name in made if ".mixer." not in name}
    assert all(torch.equal(made[name], expected[name]) for name in base)
    untrained = GPT(load_model(out_dir / "stitched").config).state_dict()
    for name in made.keys() - base:
        # Float32 sums in another order, through four updates of AdamW, each of up to 0.01.
        torch.testing.assert_close(made[name], expected[name], rtol=2e-4, atol=2e-4, msg=name)
        assert not torch.allclose(made[name], untrained[name], atol=1e-3)
    joint = rows_of(whole / "layers.csv")
    own = [rows_of(out_dir / f"block-00{n}" / "train" / "layers.csv") for n in (0, 1)]
    assert joint[0] == ["step", "layer_0", "layer_2", "layer_3"] and joint[0] == own[0][0] + own[1][0][1:]
    for row, a, b in zip(joint[1:], own[0][1:], own[1][1:], strict=True):
        assert [float(x) for x in a + b[1:]] == pytest.approx([float(x) for x in row], rel=1e-3)
    assert "for a block. What is missing of 3 blocks needs" in said
