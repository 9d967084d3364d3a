"""scripts/compare_linear.py on a tiny model: what each way trains and is read with, and how it goes on."""

import json
import subprocess
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import in_this_process

from lit_swa.checkpoint import load_config, load_model
from lit_swa.runs import Places
from lit_swa.training import memory

pytest.importorskip("lightning")


@pytest.fixture
def compare(run_script, tiny_checkpoint, tmp_path, monkeypatch):
    """Run the script in this process: (exit code, stdout, stderr). The commands that it starts are noted in `ran`."""
    words = np.random.default_rng(3).choice("the quick brown fox. jumps over lazy. dog sleeps".split(), 3000)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.txt").write_text(" ".join(words[:1500]))
    (tmp_path / "chat.json").write_text(json.dumps([{"instruction": "Say fox", "output": "fox"}] * 9))
    (tmp_path / "eval.txt").write_text(" ".join(words[1500:]))
    ran: list[list[str]] = []
    monkeypatch.setattr("lit_swa.training.linearizing.save_picture", lambda *a: False)  # of each layer
    monkeypatch.setattr(memory, "estimate_step", lambda *a: (_ for _ in ()).throw(RuntimeError("not now")))

    def run(*arguments: object, execute=in_this_process) -> tuple[int, str, str]:
        def noted(command, **options):
            if command[1].startswith("/") and "finetune" in command[1]:  # and not the name of the processor
                ran.append(command)
            return execute(command, **options)

        monkeypatch.setattr(subprocess, "run", noted)
        fixed = ["--checkpoint_dir", tiny_checkpoint, "--data", f"[{tmp_path / 'train'}, {tmp_path / 'chat.json'}]"]
        fixed += ["--eval_data", tmp_path / "eval.txt", "--context", 64, "--batch_size", 2, "--tokens", 3000]
        fixed += ["--linear_window", 8, "--windows", 2, "--prompts", 2, "--new_tokens", 5, "--items", 2, "--trials", 0]
        fixed += ["--device", "cpu", "--out_dir", tmp_path / "runs", "--output", tmp_path / "c.json"]
        return run_script("scripts/compare_linear.py", *fixed, *arguments)

    run.ran = ran
    return run


def rows_of(path: Path) -> dict[str, dict]:
    return {row["method"]: row for row in json.loads(path.read_text())["rows"]}


def test_ways_are_made_as_they_say_and_share_a_stage(compare, tmp_path):
    """Catches: a way with another's flags, a stage that is trained twice, a model that is read without linear_off, a
    teacher that differs from itself, tokens that are not counted, a finished way that is made again."""
    code, out, err = compare("--only", "[softmax, lolcats, lolcats off, quarter full]")
    assert code == 0, err
    rows = rows_of(tmp_path / "c.json")
    assert list(rows) == ["softmax", "lolcats", "quarter full", "lolcats off"] and "| lolcats off |" in out
    teacher = rows["softmax"]
    assert (teacher["kl"], teacher["same"], teacher["forced"], teacher["beginning"]) == (0, 1, 1, 5)
    assert rows["lolcats"]["ppl"] != rows["lolcats off"]["ppl"] and "tokens" not in rows["lolcats off"]
    assert [Path(command[1]).name for command in compare.ran] == ["linearize.py"] * 3  # transfer, lolcats, quarter full
    made = {name: load_config(tmp_path / "runs" / name / "final") for name in ("transfer", "lolcats", "quarter-full")}
    assert {config.linear_window for config in made.values()} == {8}
    assert [config.layer_variants.count("full") for config in made.values()] == [0, 0, 1]
    steps = int(compare.ran[0][compare.ran[0].index("--max_steps") + 1])
    assert steps == 1 and rows["lolcats"]["tokens"] == steps * 2 * 64 and rows["lolcats"]["seconds"] > 0
    features = [load_model(tmp_path / "runs" / n / "final").layers[0].mixer.feature_q for n in ("transfer", "lolcats")]
    assert features[0].equal(features[1])  # stage 2 goes on from stage 1, and leaves it alone
    assert compare("--only", "[lolcats]")[0] == 0 and len(compare.ran) == 3
    assert compare("--only", "[swap]")[0] == 0 and len(compare.ran) == 4
    assert list(rows_of(tmp_path / "c.json")) == ["softmax", "swap", "lolcats", "quarter full", "lolcats off"]
    command = json.loads((tmp_path / "c.json").read_text())["command"]
    assert "--only" not in command and "swap" not in command and command.endswith(f"--output {tmp_path / 'c.json'}")


def test_blocks_equal_all_layers_at_once(compare, tmp_path, monkeypatch):
    """Catches: blocks that are trained on other rows, steps or rates, or clipped."""
    monkeypatch.setattr("lit_swa.plots.has_matplotlib", lambda: False)
    code, _, err = compare("--only", "[joint, blocks]")
    assert code == 0, err
    rows = rows_of(tmp_path / "c.json")
    assert rows["blocks"]["ppl"] == pytest.approx(rows["joint"]["ppl"], rel=1e-4)
    assert rows["blocks"]["tokens"] == rows["joint"]["tokens"]
    trained = [command for command in compare.ran if {"train", "--stage2_steps"} & set(command)]
    assert len(trained) == 3  # of two layers each is a block
    for command in trained:  # one step of Adam shows no clipping
        assert command[command.index("--grad_clip") + 1] == "0" and "constant" in command
    whole, parts = (load_model(tmp_path / "runs" / name) for name in ("joint/final", "blocks/stitched"))
    for a, b in zip(whole.layers, parts.layers, strict=True):
        assert np.allclose(a.mixer.feature_q.detach(), b.mixer.feature_q.detach(), atol=1e-4)


@pytest.mark.slow
def test_all_ways_and_judges(compare, tmp_path, monkeypatch):
    """Catches: a way whose flags are refused, a judge that cannot ask a linear model, two runs that disturb another."""
    monkeypatch.setattr("lit_swa.judges.FAR", 6)
    code, out, err = compare("--context", 512, "--items", 3, "--trials", 1, "--tokens", 20000, "--batch_size", 1)
    assert code == 0, err
    rows = rows_of(tmp_path / "c.json")
    assert len(rows) == 18 and all(set(row["tasks"]) == {"cloze", "copy", "continuation"} for row in rows.values())
    assert sum(row.get("tokens", 0) for row in rows.values()) == pytest.approx(20000, rel=0.3)
    assert (tmp_path / "c.png").exists() and all(f"| {name} |" in out for name in rows)


@pytest.mark.parametrize("code, words", [(130, "interrupted"), (2, "linearize.py failed, as it says above")])
def test_a_comparison_goes_on(compare, tmp_path, monkeypatch, code, words):
    """Catches: finished ways that are lost with one that failed, others that are begun behind it; a machine that is
    told as that of all rows."""

    def fails(command, **options):
        if "--model.linear_off" in command:
            return SimpleNamespace(returncode=code)
        return in_this_process(command, **options)

    monkeypatch.setattr("lit_swa.plots.has_matplotlib", lambda: False)
    monkeypatch.setattr("lit_swa.utils.describe_machine", lambda device: "one machine")
    got, _, err = compare("--only", "[swap, window]", execute=fails)
    assert got == code and words in err
    monkeypatch.setattr("lit_swa.utils.describe_machine", lambda device: "another")
    assert compare("--only", "[swap, window]")[0] == 0
    rows = rows_of(tmp_path / "c.json")
    assert (rows["swap"]["machine"], rows["window"]["machine"]) == ("one machine", "another")
    assert json.loads((tmp_path / "c.json").read_text())["machine"] == "one machine, another"
    assert sum("swap" in " ".join(command) for command in compare.ran) == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--only", "[lolkats]"], "There is no way 'lolkats': choose from softmax"),
        (["--context", 1024], "context"),
        (["--trials", 1], "too short"),
        (["--jobs", 0], "jobs=0 does not fit"),
    ],
)
def test_bad_arguments_are_told_in_a_sentence(compare, arguments, words):
    """Catches: a traceback, a run that begins before it."""
    code, _, err = compare(*arguments)
    assert code == 2 and words in err and "Traceback" not in err and not compare.ran


@pytest.mark.parametrize(
    "device, gpus, seen, given",
    [("cuda", 3, None, ["0", "1", "2", "0"]), ("cuda", 2, "5,7,9", ["5", "7", "5", "7"]), ("cuda:1", 2, None, [None]),
     ("cuda", 1, "4", [None]), ("cpu", 0, None, [None, None])],
)  # fmt: skip
def test_runs_at_the_same_time_have_a_gpu_each(device, gpus, seen, given, monkeypatch):
    """Catches: all runs on the first GPU, or on one that this process was not given."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    places = Places(device, len(given))
    with ExitStack() as stack:
        taken = [stack.enter_context(places.one()) for _ in given]
        assert [place.get("CUDA_VISIBLE_DEVICES") for place in taken] == given
    with places.one() as place:
        assert place.get("CUDA_VISIBLE_DEVICES") in given


def test_runs_at_the_same_time_share_the_cores(monkeypatch):
    """Catches: runs that each have a thread for every core, all of which wait for each other."""
    monkeypatch.setattr("lit_swa.runs.count_cores", lambda: 8)
    for jobs, asked, threads in ((3, None, "2"), (16, None, "1"), (1, None, None), (3, "5", None)):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if asked:
            monkeypatch.setenv("OMP_NUM_THREADS", asked)
        with Places("cpu", jobs).one() as place:
            assert place.get("OMP_NUM_THREADS") == threads
