"""scripts/benchmark_scaling.py: what it makes of the figures of the scripts that it starts."""

import json
from pathlib import Path

import pytest

from lit_swa import runs


@pytest.fixture
def scaling(run_script, tmp_path, monkeypatch):
    """Run the script: (exit code, stdout, stderr, rows). The scripts that it starts say what is given here."""
    started: list[list[str]] = []

    def execute(command: list[str], *_, **__) -> None:
        started.append(command)
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
        output = tmp_path / "scaling.json"
        fixed = ["--device", "cpu", "--out_dir", tmp_path / "runs", "--output", output, "--length", 256]
        fixed += ["--pretrain_name", "SmolLM2-135M", "--decode_names", "[SmolLM2-135M, Llama-3.1-405B]"]
        code, out, err = run_script("scripts/benchmark_scaling.py", *fixed, *arguments)
        return code, out, err, json.loads(output.read_text())["rows"] if output.exists() else []

    run.started = started
    return run


def test_rates_are_those_of_all_devices_beside_one(scaling):
    """Catches: the rate of one device taken for that of all, a share of the wrong row, a shape that no device holds, a
    measurement that is made twice."""
    how = ("--devices", "[1, 2]", "--parts", "[decode, pretrain, lora]", "--decode_modes", "[int4]")
    code, out, err, rows = scaling(*how)
    assert code == 0, err
    decode = [(row["name"], row["devices"], row["tok_s"], row["GB_s"]) for row in rows if row["part"] == "decode"]
    assert decode == [("SmolLM2-135M", 1, 100, 1400), ("SmolLM2-135M", 2, 150, 1050)]  # 405B: 227 GB
    steps = {(row["part"], row["strategy"], row["devices"]): row for row in rows if row["part"] != "decode"}
    shares = {key: (row["tok_s"], row["share"]) for key, row in steps.items() if key[0] == "pretrain"}
    assert shares == {
        ("pretrain", "one", 1): (512, 1), ("pretrain", "ddp", 2): (819.2, 0.8), ("pretrain", "fsdp", 2): (512, 0.5),
    }  # fmt: skip
    assert 0 < steps["pretrain", "fsdp", 2]["predicted_share"] < 1 and steps["lora", "ddp", 2]["share"] == 0.8
    assert "predicted_share" not in steps["lora", "ddp", 2] and "| 150.0 | 1.50x | 1,050 |" in out
    assert ["--lora_r" in command for command in scaling.started] == [False] * 4 + [True] * 2
    assert scaling(*how)[3] == rows and len(scaling.started) == 6


@pytest.mark.parametrize(
    "arguments, words",
    [(("--devices", "[2]"), "devices needs 1"), (("--parts", "[sleep]"), "There is no part 'sleep'")],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_in_a_sentence(scaling, arguments, words):
    """Catches: a share of nothing."""
    code, _, err, _ = scaling(*arguments)
    assert code == 2 and words in err and not scaling.started
