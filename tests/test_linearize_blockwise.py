"""Linear attention block by block: what is split, saved, trained alone and put together equals training it whole."""

import json
import resource
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import start_script
from tiny import randomize, tiny_config

from lit_swa import GPT, Config
from lit_swa.checkpoint import load_model, save_checkpoint
from lit_swa.data import Dataset
from lit_swa.formats import files
from lit_swa.formats.files import open_safetensors
from lit_swa.linearize import AttentionTransfer, linear_config, make_linear
from lit_swa.training import block_inputs, linearizing, memory
from lit_swa.training.block_inputs import Inputs, Texts, make_table
from lit_swa.training.blocks import Block, plan_blocks, split_checkpoint
from lit_swa.training.blockwise import Saving, load_block_student, make_inputs
from lit_swa.training.log import read_metrics

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
    runs = [whole, *(out_dir / f"block-00{n}" / "train" for n in (0, 1))]
    joint, a, b = (read_metrics(run)["grad_norm"][1:] for run in runs)
    assert np.hypot(a, b) == pytest.approx(np.array(joint), rel=1e-3)  # AdamW alone hardly minds the gradient's size
    assert "for a block. What is missing of 3 blocks needs" in said


def test_gradients_are_the_joint_ones_times_the_share(tmp_path):
    """Catches: an input of another layer or text, a layer that counts twice, a mean over the wrong layers. Float64."""
    config = tiny_config(n_layer=5, scale_embeddings=True, tie_embeddings=True)
    softmax = GPT(config).double().eval()
    randomize(softmax)
    save_checkpoint(softmax, config, tmp_path / "base")
    linear = linear_config(config, {"linear_window": 3, "linear_gate": True})
    lengths = np.array([9, 2, 17, 30])
    data = Dataset(np.random.default_rng(0).integers(0, 97, 58), None, lengths.cumsum() - lengths, lengths, "", {})
    blocks = plan_blocks(tmp_path / "base", linear, 2)
    split_checkpoint(tmp_path / "base", tmp_path, blocks, None, False, print)
    tables = {n: make_table(Texts(data, None), {}, torch.float64, 48, 30) for n in range(3)}
    fabric = SimpleNamespace(device=torch.device("cpu"), autocast=nullcontext)
    texts = Texts(data, None)
    saving = Saving(tmp_path / "base", tmp_path, dict(enumerate(blocks)), texts, tables, torch.float64, fabric, 30)
    torch.manual_seed(3)
    whole = softmax
    make_linear(whole, linear)
    joint = AttentionTransfer(whole, ["full"] * 5, weights_ce=0.5)
    for p in joint.parameters():
        if p.requires_grad:
            p.data.add_(0.2 * torch.randn_like(p))
    idx = torch.from_numpy(data.tokens)[None]
    loss = joint(idx, documents=lengths.tolist())
    loss.backward()
    state, losses = whole.state_dict(), []
    for n, block in enumerate(blocks):
        make_inputs(saving, n, False)
        inputs = Inputs(tmp_path / f"block-00{n}" / "inputs")
        run = SimpleNamespace(block=block, blocks_dir=tmp_path, dtype=torch.float64, fabric=fabric, inputs=inputs)
        alone = load_block_student(run)
        learned = {block.local(name): state[name] for name in block.names(state) if ".mixer." in name}
        assert not alone.load_state_dict(learned, strict=False).unexpected_keys
        learners = AttentionTransfer(alone, block.softmax, weights_ce=0.5)
        (learners(torch.arange(58)[None], documents=lengths.tolist()) * block.share).backward()
        losses.append(learners.layer_losses)
        for i, layer in enumerate(block.layers):
            mine, theirs = alone.layers[i].mixer, whole.layers[layer].mixer
            for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=f"{layer} {name}")
    torch.testing.assert_close(torch.cat(losses), joint.layer_losses, rtol=1e-10, atol=0)
    assert sum(block.share for block in blocks) == pytest.approx(1)


@pytest.mark.slow
def test_stage_2_runs_under_fsdp(tiny_checkpoint, data_file, tmp_path, run_script):
    """Catches: linear attention whose weights are not whole where they are used, when processes share them."""
    softmax = load_model(tiny_checkpoint)
    make_linear(softmax, linear_config(softmax.config, {"linear_window": 4, "linear_gate": True}))
    save_checkpoint(softmax, softmax.config, tmp_path / "linear", source_dir=tiny_checkpoint)
    how = ["--checkpoint_dir", tmp_path / "linear", "--data", data_file, "--device", "cpu", "--sample", "false"]
    how += ["--batch_size", 8, "--micro_batch_size", 2, "--pack", "false", "--max_steps", 3, "--max_seq_length", 64]
    rc, _, err = run_script("finetune/lora.py", *how, "--out_dir", tmp_path / "one")
    assert rc == 0, err
    shared = ["--out_dir", tmp_path / "two", "--strategy", "fsdp", "--devices", 2]
    process = start_script("finetune/lora.py", *how, *shared, log=tmp_path / "log")
    process.join(300)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    for column in ("loss", "grad_norm", "val_loss"):
        one, two = (np.array(read_metrics(tmp_path / name)[column]) for name in ("one", "two"))
        np.testing.assert_allclose(two, one, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------- going on


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_inputs_go_on_where_a_disk_was_full(blockwise, tmp_path, monkeypatch):
    """Catches: a part that is there in part, parts that are made twice, others than without the interruption, a table
    that counts as complete. The system itself refuses the longer file."""
    monkeypatch.setattr(block_inputs, "PART_BYTES", 100 * 48 * 4)
    blockwise("shard")
    said = blockwise("inputs")
    inputs = tmp_path / "blocks" / "block-001" / "inputs"
    expected, rows = contents(inputs), json.loads((inputs / "inputs.json").read_text())["parts"]
    longest = rows.index(max(rows))
    assert 0 < longest < len(rows) - 1
    shutil.rmtree(inputs)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((max(rows) - 1) * 48 * 4, limits[1]))
    try:
        err = blockwise("inputs", 1, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert err.splitlines()[-1].startswith("error: File too large for ") and f"part-{longest:05d}" in err
    there = {name: data for name, data in contents(inputs).items() if not name.startswith(".")}
    assert {name: expected[name] for name in there} == there and len(there) == longest + 2  # lengths, inputs.json
    err = blockwise("train", 1, code=2)
    assert f"inputs is incomplete: it lacks part-{longest:05d}.safetensors and {len(rows) - longest - 1} more" in err
    first = (inputs / "part-00000.safetensors").stat().st_mtime_ns
    blockwise("inputs", 1)
    assert {n: b for n, b in contents(inputs).items() if not n.startswith(".")} == {
        n: b for n, b in expected.items() if not n.startswith(".")
    }
    assert (inputs / "part-00000.safetensors").stat().st_mtime_ns == first
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**4))
    shutil.rmtree(inputs)
    err = blockwise("inputs", 1, code=2)
    assert "What is missing of 1 blocks needs" in err
    assert "blocks needs 0.2 MB and its disk has 0.0 MB left: free some space" in err.splitlines()[-1]
    assert not inputs.exists() and "What is missing of 3 blocks" in said


def test_a_block_goes_on_to_the_same_losses(blockwise, tmp_path):
    """Catches: moments, order, dropped windows or rates that begin anew; a block that needs its neighbours."""
    how = {"window_dropout": 0.6, "window_dropout_end": 0.1, "save_interval": 1, "keep_last": 9, "lr_schedule": None}
    blockwise("shard")
    blockwise("inputs")
    alone = tmp_path / "alone" / "block-001"
    shutil.move(tmp_path / "blocks" / "block-001", alone)
    err = blockwise("train", 1, name="alone", **how)
    assert "Block 1 of 3 (layers 2 to 3): 2 layers learn to be linear" in err
    train = alone / "train"
    tables = {name: rows_of(train / name) for name in ("metrics.csv", "layers.csv")}
    expected = contents(train / "final")["features.safetensors"]
    for path in [*train.glob("step-*"), train / "final"]:
        if path.name != "step-000002":
            shutil.rmtree(path)
    assert "going on from" in blockwise("train", 1, name="alone", resume="auto", **how)
    assert contents(train / "final")["features.safetensors"] == expected
    seconds = 5
    for name, rows in tables.items():
        again = rows_of(train / name)
        if name == "metrics.csv":
            rows, again = ([row[:seconds] + row[seconds + 1 :] for row in table] for table in (rows, again))
        assert again == rows


@pytest.mark.parametrize("left", [-8, None])
def test_a_block_with_broken_weights_is_written_again(blockwise, tmp_path, left):
    """Catches: a block that is named in an error, and that no command repairs; one that is whole and written again."""
    blockwise("shard")
    path = tmp_path / "blocks" / "block-000" / "lit_model.safetensors"
    expected = path.read_bytes()
    path.unlink() if left is None else path.write_bytes(expected[:left])
    blockwise("inputs", 0)
    assert "block-000 is damaged: it has no proper weight" in blockwise("inputs", 1, code=2)
    assert "1 of 3 blocks are to be written" in blockwise("shard")
    assert path.read_bytes() == expected and "0 of 3 blocks" in blockwise("shard")


def test_a_stale_part_of_the_inputs_is_named_and_made_again(blockwise, tmp_path):
    """Catches: a part of other texts, of the same size, that a block is trained on."""
    for name in ("blocks", "others"):
        blockwise("shard", name=name)
        blockwise("inputs", 0, name=name, limit=20 if name == "others" else None)
    inputs, others = (tmp_path / name / "block-000" / "inputs" for name in ("blocks", "others"))
    expected = contents(inputs)
    content = expected["part-00000.safetensors"]
    other = next(iter(open_safetensors(others / "part-00000.safetensors")))
    own = next(iter(open_safetensors(inputs / "part-00000.safetensors")))
    (inputs / "part-00000.safetensors").write_bytes(content.replace(own.encode(), other.encode()))
    err = blockwise("train", 0, code=2)
    assert "block-000/inputs is incomplete: it has a broken or stale part-00000.safetensors of 1 parts" in err
    blockwise("inputs", 0)
    assert contents(inputs) == expected


@pytest.mark.parametrize("name, remedy", [("inputs.json", "restart"), ("lengths.safetensors", None)])
def test_inputs_with_a_broken_table_are_made_again(blockwise, tmp_path, name, remedy):
    """Catches: a file that is named in an error whose remedy fails for the same file."""
    blockwise("shard")
    blockwise("inputs")
    inputs = tmp_path / "blocks" / "block-001" / "inputs"
    expected = contents(inputs)
    (inputs / name).write_bytes(expected[name][:-2])
    err = blockwise("train", 1, code=2).splitlines()[-1]
    assert name in err and "damaged: --step inputs" in err and ("--resume restart" in err) == (remedy == "restart")
    blockwise("inputs", 1, resume=remedy)
    assert contents(inputs) == expected


def test_a_block_knows_nothing_of_other_layers_teachers():
    """Catches: a block of one linear layer that is told to have learned from the first layer's attention."""
    base = tiny_config(n_layer=3, attention="streaming,sliding,full", sliding_window_size=4)
    config = linear_config(base, {"attention": "streaming,linear,linear"})
    blocks = [Block(n, 1, "weights", base.attention, config.to_dict()) for n in range(3)]
    assert [block.part_of(block.softmax).attention for block in blocks] == ["streaming", "sliding", "full"]
    assert [block.part_of(["linear"]).attention for block in blocks[1:]] == ["linear"] * 2


def test_what_is_expected_is_read_before_it_is_asked_for(blockwise, tmp_path, monkeypatch):
    """Catches: a step that waits for the disk; rows of another micro-batch; a validation that takes what a step
    expects; a disk's error that is lost with the thread that met it."""
    blockwise("shard")
    blockwise("inputs")
    inputs = Inputs(tmp_path / "blocks" / "block-000" / "inputs")
    rows = block_inputs.Rows(inputs, torch.float64, torch.device("cpu"))
    table, read = inputs.rows, []
    whole = table(torch.arange(len(inputs.datasets()[0].tokens))).double()
    monkeypatch.setattr(inputs, "rows", lambda n, *out: read.append(n.tolist()) or table(n, *out))
    a, b, c, other = (torch.tensor([numbers]) for numbers in ([3, 4], [9, 0], [5, 6], [1, 2]))

    rows.expect([a, b, c])
    for asked, there in ((a, [a, b]), (other, [a, b, other]), (b, [a, b, other, c])):
        assert torch.equal(rows(asked)[0], whole[asked[0]])
        rows.ahead[1].result()
        assert read == [numbers[0].tolist() for numbers in there]
    rows.expect([c, a])  # c is there
    assert torch.equal(rows(c)[0], whole[c[0]])
    rows.ahead[1].result()
    assert read == [[3, 4], [9, 0], [1, 2], [5, 6], [3, 4]]

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(inputs, "rows", fail)
    rows.expect([b])
    with pytest.raises(OSError, match="Input/output"):
        rows(b)


def test_every_micro_batch_of_a_run_is_expected(blockwise, monkeypatch):
    """Catches: a loop that tells nothing of what comes, of its second micro-batch or of the next step."""
    blockwise("shard")
    blockwise("inputs")
    expect, forward, found = block_inputs.Rows.expect, block_inputs.Rows.forward, []

    def expecting(rows, batches):
        batches = list(batches)
        found.append(("step", rows.is_ahead(batches[0].flatten())))
        expect(rows, batches)

    def asked(rows, idx):
        found.append(("micro-batch", rows.is_ahead(idx.flatten())))
        return forward(rows, idx)

    monkeypatch.setattr(block_inputs.Rows, "expect", expecting)
    monkeypatch.setattr(block_inputs.Rows, "forward", asked)
    blockwise("train", 0)
    assert found.count(("micro-batch", True)) == 8  # four steps of two; others are of validations and of the rehearsal
    assert [ahead for what, ahead in found if what == "step"] == [False, True, True, True]


def test_a_longer_context_is_that_of_the_blocks(blockwise, tmp_path):
    """Catches: texts refused that the blocks were made for, or cut to the context of the checkpoint."""
    blockwise("shard", **{"model.block_size": 600})
    text = tmp_path / "book.txt"
    text.write_text("the quick brown fox " * 600)
    blockwise("inputs", 0, data=text, max_seq_length=None, limit=2)
    assert (
        json.loads((tmp_path / "blocks" / "block-000" / "inputs" / "inputs.json").read_text())["max_seq_length"] == 600
    )


# --------------------------------------------------------------------------------------------------------------- plan


def plan(run_script, **arguments) -> dict[str, str]:
    flags = [x for key, value in arguments.items() for x in (f"--{key}", value)]
    rc, out, err = run_script("scripts/plan_blockwise.py", "--device", "cpu", *flags)
    assert rc == 0, err
    return dict(line.strip("| ").split(" | ") for line in out.splitlines() if line[:1] == "|" and line[2].isalpha())


def test_the_plan_counts_what_a_model_has(run_script):
    """Catches: a count of weights, bytes or passes that is another than the model's. By hand, Llama-3.1-405B."""
    rows = plan(run_script, name="Llama-3.1-405B", layers_per_block=9, tokens=10**7, dtype="bfloat16", epochs=2,
                read_rate=1e6, train_rate=4e5)  # fmt: skip
    C, inner, kv = 16384, 53248, 1024
    layer = C * (C + 2 * kv) + C * C + 3 * C * inner + 2 * C
    whole = 126 * layer + 2 * 128256 * C + C
    assert rows["blocks"] == "14 of 9 layers" and rows["weights of the model"] == f"{whole * 2 / 1e9:.0f} GB"
    assert rows["weights that stage 1 trains"] == f"{126 * (2 * 128 * 128 * 128 + 128):,} in 126 of 126 layers"
    assert rows["memory: a block's weights"] == f"{9 * layer * 2 / 1e9:.1f} GB"
    assert rows["disk: inputs of one block"] == f"{1e7 * C * 2 / 1e9:.0f} GB"
    assert rows["disk: inputs of all blocks"] == f"{14 * 1e7 * C * 2 / 1e12:.2f} TB"
    assert rows["what a block in training reads from the disk"] == f"{4e5 / 9 * C * 2 / 1e9:.2f} GB/s"
    assert rows["hours: inputs of all blocks"] == f"{1e7 * 13 * 9 / 1e6 / 3600:.1f}"
    assert rows["hours: training one block"] == f"{2e7 * 9 / 4e5 / 3600:.1f}"
    assert rows["hours: training all blocks on one device"] == f"{2e7 * 126 / 4e5 / 3600:.1f}"
    assert rows["memory: all three"] == "not measured"


def test_the_plan_measures_a_layer(run_script):
    """Catches: a measurement that fails, or that is not in the table."""
    rows = plan(run_script, name="pythia-14m", max_seq_length=70, micro_batch_size=2, repeats=1)
    assert all(int(rows[f"{what} of one layer"].split()[0].replace(",", "")) > 0 for what in ("inference", "training"))
    assert rows["memory: all three"] != "not measured"
    rc, _, err = run_script("scripts/plan_blockwise.py", "--train_rate", "5")
    assert rc == 2 and "read_rate and train_rate belong together" in err


# ----------------------------------------------------------------------------------------------------------- bad input


def test_what_does_not_fit_is_refused_in_a_sentence(blockwise, tmp_path, checkpoint, data_file):
    """Catches: a part that is missing, or of another split, model, text or checkpoint, and is used all the same."""
    out_dir = tmp_path / "blocks"

    def refused(words: str, step: str, block: int | None = None, **arguments) -> None:
        err = blockwise(step, block, code=2, **arguments).splitlines()
        assert err[-1].startswith("error: ") and words in err[-1], err[-1]

    refused("holds no blocks", "stitch")
    refused("Block 3 is out of range: 5 layers make the blocks 0 to 2", "shard", 3)
    blockwise("shard", 1)
    refused("lacks block-000, block-002 of its 3 blocks", "stitch")
    refused("block-000 is missing or incomplete", "train", 0)
    blockwise("shard")
    refused("Block 3 is out of range: ", "train", 3)
    refused("block-001/inputs is missing: --step inputs makes it", "train", 1)
    refused("block-000/inputs is missing", "inputs", 1)
    refused("belongs to another split (layers_per_block=2, now 3)", "shard", layers_per_block=3)
    refused("belongs to another split (linear_window=4, now 5)", "shard", **{"model.linear_window": 5})
    refused("its config asks for [32, 48]", "shard", name="other", **{"model.intermediate_size": 32})
    refused("--step train does not read --data: give it to inputs", "train", 0, data=data_file)
    refused("--step shard does not read --max_steps: give it to train", "shard", max_steps=3)
    refused("--step train does not read --chunk_size: leave it out", "train", 0, chunk_size=4)
    refused("give its number as --block", "train")
    blockwise("inputs")
    refused("holds other inputs (data=", "inputs", limit=20)
    inputs = out_dir / "block-001" / "inputs"
    whole = contents(inputs)
    refused("block-000/inputs is stale (data=", "inputs", 1, limit=20, resume="restart")
    assert contents(inputs) == whole  # nothing is deleted for what cannot be made
    refused("Block 2 has no layer that becomes linear", "train", 2)
    for n in (0, 1):
        blockwise("train", n, max_steps=1)
    refused("holds a run", "train", 1)
    refused("differs in its method", "train", 1, resume="auto", weights_ce=1)
    shutil.move(out_dir / "block-001" / "train", tmp_path / "kept")
    refused("block-001/train/final is missing: train each block", "stitch")
    shutil.move(tmp_path / "kept", out_dir / "block-001" / "train")
    blockwise("stitch")
    learned = out_dir / "block-001" / "train" / "final" / "features.safetensors"
    shutil.move(learned, tmp_path / "kept")
    refused("features.safetensors is missing or damaged: train block 1 again with --resume restart", "stitch")
    shutil.move(tmp_path / "kept", learned)

    shutil.copytree(out_dir, tmp_path / "stale")
    shutil.rmtree(tmp_path / "stale" / "block-001" / "inputs")
    for n in (0, 1):
        blockwise("inputs", n, name="stale", limit=20, resume="restart")
    refused("block-000/train/final is stale: it was trained on other inputs (data=", "stitch", name="stale")
    shutil.rmtree(tmp_path / "stale" / "block-001" / "inputs")
    blockwise("train", 0, name="stale", max_steps=1, resume="restart")
    refused("block-001/train/final is stale: it was trained on other inputs than", "stitch", name="stale")
    blockwise("shard", 1, layers_per_block=1, name="other")
    shutil.rmtree(tmp_path / "stale" / "block-001")
    shutil.move(tmp_path / "other" / "block-001", tmp_path / "stale" / "block-001")
    refused("block-001 is of another split than", "stitch", name="stale")

    content = json.loads((out_dir / "block-000" / "block.json").read_text())
    for damaged in (json.dumps(content | {"layers_per_block": "2"}), "{"):
        (out_dir / "block-000" / "block.json").write_text(damaged)
        refused("block.json is damaged: delete its directory, and run --step shard", "train", 0, resume="auto")
