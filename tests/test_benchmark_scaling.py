"""scripts/benchmark_scaling.py: what it makes of the figures of the scripts that it starts."""

import importlib.util
import json
from pathlib import Path

import pytest

from lit_swa import runs


@pytest.fixture
def scaling_script():
    """The script as a module."""
    path = Path(__file__).resolve().parents[1] / "scripts/benchmark_scaling.py"
    spec = importlib.util.spec_from_file_location("benchmark_scaling", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def scaling(run_script, tmp_path, monkeypatch):
    """Run the script: (exit code, stdout, stderr, rows). The scripts that it starts say what is given here."""
    started: list[list[str]] = []

    def execute(command: list[str], *_, **__) -> None:
        started.append(command)
        if command[0] == "finetune/linearize_blockwise.py":
            if "train" in command and len(started) == run.interrupted_at:
                raise KeyboardInterrupt
            return
        n, output = int(command[command.index("--devices") + 1]), Path(command[-1])
        if command[0] == "scripts/benchmark_parallel.py":
            split = {"tokens_per_second": 100.0 * (1 + 0.5 * (n - 1)), "weight_GB": 14.0 / n}
            content = {"rows": [{"split": split}]}
        else:
            step = {"name": "SmolLM2-135M", "model": {}, "length": 256, "rows": 2, "weights": 134_515_008}
            step |= {"update_s": 0.1, "flops_per_token": 1e9}
            seconds = {"one": 1.0, "ddp": 1.25, "fsdp": 2.0}
            steps = [
                step | {"strategy": name, "processes": 1 if name == "one" else n, "micro_s": s - 0.1, "step_s": s}
                | {"tok_s": 512 / s} for name, s in seconds.items() if n > 1 or name == "one"
            ]  # fmt: skip
            exchanges = [
                {"operation": name, "bytes": size, "seconds": size / 1e9}
                for name in ("all_gather", "reduce_scatter", "all_reduce") for size in (1e6, 1e8)
            ]  # fmt: skip
            content = {"machine": "a machine", "processes": n, "steps": steps, "exchanges": exchanges}
        output.write_text(json.dumps(content))

    def run(*arguments: object) -> tuple[int, str, str, list[dict]]:
        monkeypatch.setattr(runs, "execute", execute)
        monkeypatch.setattr("lit_swa.utils.check_devices", lambda *_: None)  # four, on any machine
        output = tmp_path / "scaling.json"
        fixed = ["--device", "cpu", "--out_dir", tmp_path / "runs", "--output", output, "--length", 256]
        fixed += ["--pretrain_name", "SmolLM2-135M", "--decode_names", "[SmolLM2-135M, Llama-3.1-405B]"]
        code, out, err = run_script("scripts/benchmark_scaling.py", *fixed, *arguments)
        return code, out, err, json.loads(output.read_text())["rows"] if output.exists() else []

    run.started, run.interrupted_at = started, 0
    return run


def test_rates_are_those_of_all_devices_beside_one(scaling):
    """Catches: the rate of one device taken for that of all, a share of the wrong row, a shape that no device holds, a
    measurement that is made twice, a prediction of what it was computed from."""
    how = ("--devices", "[1, 2, 4]", "--parts", "[decode, pretrain, lora]", "--decode_modes", "[int4]")
    code, out, err, rows = scaling(*how)
    assert code == 0, err
    decode = [(row["name"], row["devices"], row["tok_s"], row["GB_s"]) for row in rows if row["part"] == "decode"]
    assert decode == [
        ("SmolLM2-135M", 1, 100, 1400), ("SmolLM2-135M", 2, 150, 1050), ("SmolLM2-135M", 4, 250, 875),
        ("Llama-3.1-405B", 4, 250, 875),  # 227 GB
    ]  # fmt: skip
    steps = {(row["part"], row["strategy"], row["devices"]): row for row in rows if row["part"] != "decode"}
    shares = {key: (row["tok_s"], row["share"]) for key, row in steps.items() if key[0] == "pretrain"}
    assert shares == {
        ("pretrain", "one", 1): (512, 1), ("pretrain", "ddp", 2): (819.2, 0.8), ("pretrain", "fsdp", 2): (512, 0.5),
        ("pretrain", "ddp", 4): (1638.4, 0.8), ("pretrain", "fsdp", 4): (1024, 0.5),
    }  # fmt: skip
    assert {key for key in steps if "predicted_share" in steps[key]} == {("pretrain", s, 4) for s in ("ddp", "fsdp")}
    assert 0 < steps["pretrain", "fsdp", 4]["predicted_share"] < 1 and steps["lora", "ddp", 2]["share"] == 0.8
    assert "| 150.0 | 1.50x | 1,050 |" in out
    assert ["--lora_r" in command for command in scaling.started] == [False] * 7 + [True] * 3
    assert scaling(*how)[3] == rows and len(scaling.started) == 10


def test_an_interrupted_run_keeps_what_it_has(scaling, tiny_checkpoint, tmp_path):
    """Catches: rows that are written when a part is done, a block that is trained again, a clock that stood still
    while another run trained."""
    how = ("--devices", "[1, 2]", "--parts", "[decode, blocks]", "--decode_modes", "[int4]",
           "--checkpoint_dir", tiny_checkpoint)  # fmt: skip
    scaling.interrupted_at = 7  # behind two of decode: shard, inputs, a step before the clock runs, block 0, block 1
    code, _, _, rows = scaling(*how)
    assert code == 130 and [row["part"] for row in rows] == ["decode"] * 2
    kept = tmp_path / "runs/blocks-1.json"
    assert list(json.loads(kept.read_text())) == ["0"]
    kept.write_text(json.dumps({"0": 30.0}))
    scaling.started.clear()
    code, _, err, rows = scaling(*how)
    assert code == 0, err
    trained = [command[command.index("--block") + 1] for command in scaling.started if "train" in command]
    assert trained[:2] == ["0", "1"] and sorted(trained[2:]) == ["0", "1"]
    assert [row["devices"] for row in rows if row["part"] == "blocks"] == [1, 2] and 30 < rows[-2]["seconds"] < 40


def test_a_part_is_measured_anew_beside_the_others(scaling, tmp_path):
    """Catches: results of hours that a part measured alone writes over; rows of another machine beside this one's."""
    assert scaling("--devices", "[1, 2]", "--parts", "[lora, decode]")[0] == 0
    code, _, err, rows = scaling("--devices", "[1]", "--parts", "[pretrain, decode]")
    assert code == 0, err
    found = [(row["part"], row["devices"]) for row in rows if row.get("mode") != "int4"]
    assert found == [("decode", 1), ("pretrain", 1), ("lora", 1), ("lora", 2), ("lora", 2)]
    output = tmp_path / "scaling.json"
    output.write_text(json.dumps(json.loads(output.read_text()) | {"machine": "another"}))
    assert {row["part"] for row in scaling("--devices", "[1]", "--parts", "[pretrain]")[3]} == {"pretrain"}


def test_blocks_wait_for_a_device(scaling_script):
    """Catches: seconds of blocks that ran at the same time added up, and of those that waited not."""
    seconds = {"0": 3.0, "1": 1.0, "2": 1.0, "3": 4.0}
    assert [scaling_script.until_all(seconds, list("0123"), n) for n in (1, 2, 4)] == [9, 6, 4]


@pytest.mark.parametrize(
    "arguments, words",
    [(("--devices", "[2]"), "devices needs 1"), (("--parts", "[sleep]"), "There is no part 'sleep'")],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_in_a_sentence(scaling, arguments, words):
    """Catches: a share of nothing."""
    code, _, err, _ = scaling(*arguments)
    assert code == 2 and words in err and not scaling.started
