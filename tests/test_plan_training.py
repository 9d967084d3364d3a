"""The plan for many GPUs: what it says is held and exchanged, beside what a dry run counts and two processes do."""

import importlib.util
import json
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from lit_swa import GPT, Config
from lit_swa.training.estimate import estimate_step
from lit_swa.training.flops import token_flops
from lit_swa.training.loop import Batch
from lit_swa.training.memory import recompute_blocks
from lit_swa.training.plan import Exchange, Measured, Network, Plan
from lit_swa.training.precision import train_in_float32

ROOT = Path(__file__).resolve().parents[1]
FIELDS = {"padded_vocab_size": 96, "vocab_size": 96, "n_layer": 3}


@cache
def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Counted(TorchDispatchMode):
    """Counts the bytes of every collective: of the tensor as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        tensors = {
            "_allgather_base_": args[:1],
            "_reduce_scatter_base_": args[1:2],
            "allreduce_": args[0] if args else (),
        }
        if function.namespace == "c10d":
            self.bytes[name] = self.bytes.get(name, 0) + sum(t.nbytes for t in tensors.get(name, ()))
        return function(*args, **(kwargs or {}))


def count_bytes(rank: int, strategy: str, accumulate: int) -> dict[str, int]:
    """What one of two processes exchanges in a step, by operation."""
    gpt = GPT(tiny_config(**FIELDS)).to(torch.bfloat16).train()
    train_in_float32(gpt, torch.bfloat16)
    model = script("measure_pieces").spread(gpt, strategy, SimpleNamespace(device="cpu", count=2))
    idx = torch.zeros(1, 8, dtype=torch.long)
    for _ in range(3):  # the first two make DDP's buckets
        with Counted() as counted:
            for n in range(accumulate):
                if strategy == "fsdp":
                    model.set_requires_gradient_sync(n == accumulate - 1)
                model(idx, targets=idx).backward()
    return counted.bytes


WIDE = {"padded_vocab_size": 512, "vocab_size": 512, "n_layer": 6, "n_embd": 96, "intermediate_size": 256}


def peak_of_a_step(rank: int, strategy: str, accumulate: int) -> int:
    """The most bytes that torch's allocator hands out in the second step of one of two processes."""
    gpt = GPT(tiny_config(**WIDE)).to(torch.bfloat16).train()
    train_in_float32(gpt, torch.bfloat16)
    model = script("measure_pieces").spread(gpt, strategy, SimpleNamespace(device="cpu", count=2))
    idx = torch.zeros(8, 64, dtype=torch.long)
    for step in range(3):
        profiling = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        with profiling if step == 2 else nullcontext() as record:
            for n in range(accumulate):
                if strategy == "fsdp":
                    model.set_requires_gradient_sync(n == accumulate - 1)
                model(idx, targets=idx).backward()
        model.zero_grad(set_to_none=True)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("strategy, accumulate", [("fsdp", 1), ("fsdp", 2), ("ddp", 1)])
def test_two_processes_exchange_what_the_plan_says(two_ranks, strategy, accumulate):
    """Catches: weights that are gathered once more or less, gradients counted for each micro-batch, half-wide numbers
    in the plan where FSDP sends whole ones."""
    plan = Plan(tiny_config(**FIELDS), strategy, 8, 1, accumulate)
    expected: dict[str, int] = {}
    for e in plan.exchanges(2, 8):
        expected[e.operation] = expected.get(e.operation, 0) + e.count * e.bytes
    names = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter", "allreduce_": "all_reduce"}
    for counted in two_ranks(count_bytes, strategy, accumulate):
        assert {names[name]: n for name, n in counted.items() if n} == expected


@pytest.mark.parametrize("strategy, accumulate", [("fsdp", 1), ("fsdp", 2), ("ddp", 1)])
def test_two_processes_take_what_the_plan_says(two_ranks, strategy, accumulate):
    """Catches: gradients that are sharded in the plan and whole in a step, or the other way round; layers that are
    gathered and not counted. torch's allocator is the oracle."""
    plan = Plan(tiny_config(**WIDE), strategy, 64, 8, accumulate)
    held = 12 * plan.weights // plan.shards(2, 8)  # weights and moments
    held += 4 * plan.weights * (strategy == "ddp")  # buckets, which are there from the first step on
    for measured in two_ranks(peak_of_a_step, strategy, accumulate):
        assert plan.memory(2, 8) - held == pytest.approx(measured, rel=0.08)


@pytest.mark.parametrize("recompute", [0, 2])
def test_memory_of_one_device_is_that_of_a_dry_run(recompute):
    """Catches: layers that repeat counted once, and what is held twice."""
    config = tiny_config(**FIELDS | {"attention": "sliding,full,full", "sliding_window_size": 4})
    plan = Plan(config, "ddp", 32, 2, 1, recompute)
    gpt = GPT(config).to(torch.bfloat16).train()
    train_in_float32(gpt, torch.bfloat16)
    recompute_blocks(gpt, 0)
    idx = torch.zeros(2, 32, dtype=torch.long)
    step = estimate_step(gpt, Batch(idx, idx, None, [0]), False, nullcontext)
    buffers = sum(b.nbytes for b in gpt.buffers())
    assert plan.memory(1, 8) == step.weights - buffers + step.beside_weights(recompute)


def pieces(tmp_path: Path) -> Path:
    """What a machine might have measured whose rates are round numbers."""
    config = Plan(tiny(), "ddp", 16, 1, 1)
    one = {"name": "pythia-14m", "model": {}, "length": 16, "rows": 4, "strategy": "one", "processes": 1,
           "weights": config.weights, "memory_GB": 0.5, "micro_s": 0.1, "update_s": 0.01}  # fmt: skip
    one |= {"flops_per_token": token_flops(tiny(), 16)}
    fsdp = one | {"strategy": "fsdp", "processes": 2, "step_s": 0.105}
    lora = one | {"lora_r": 8, "micro_s": 1e-6}  # another kind of step, which says nothing here
    exchanges = [
        {"operation": name, "bytes": size, "seconds": 1e-4 + size * (2 if name == "all_reduce" else 1) / 2 / 1e9}
        for name in ("all_gather", "reduce_scatter", "all_reduce")
        for size in (10**3, 10**8)
    ]
    path = tmp_path / "pieces.json"
    path.write_text(
        json.dumps({"machine": "a machine", "processes": 2, "steps": [lora, one, fsdp], "exchanges": exchanges})
    )
    return path


def tiny() -> Config:
    return Config.from_name("pythia-14m", block_size=16)


def test_time_follows_from_the_pieces(tmp_path):
    """Catches: exchanges over the wrong link, a start that is lost, an overlap that hides more than there is."""
    path = pieces(tmp_path)
    measured = Measured(json.loads(path.read_text()), tiny(), 16, Network(8, 1e8, 1e-3))
    gather = Exchange("all_gather", 10**8, 3, 8, False)
    assert measured.seconds(gather) == pytest.approx(3 * 1e-4 + 3 * 1e8 * 7 / 8 / 1e9, rel=1e-2)
    far = Exchange("all_reduce", 10**8, 1, 4, True)  # one card of each of 4 hosts
    assert measured.seconds(far) == pytest.approx(1e-4 + 3e-3 + 2 * 1e8 * 3 / 4 / 1e8, rel=1e-2)
    wide = Exchange("all_gather", 10**8, 1, 32, False)  # 4 hosts, by 8 cards each
    assert measured.seconds(wide) == pytest.approx(1e-4 + 3e-3 + 1e8 * 31 / 32 / 8e8, rel=1e-2)
    plan = Plan(tiny(), "fsdp", 16, 4, 2)
    assert measured.spread("ddp") == (0, 0) and measured.spread("fsdp") == pytest.approx((1.0, 0))
    alone, many = measured.times(plan, 1), measured.times(plan, 8)
    assert alone.step == pytest.approx(0.21) and alone.exchanging == 0
    assert many.computing == pytest.approx(0.2 + 0.01 / 8)
    assert many.step == pytest.approx(max(many.computing + many.exchanging - 0.2, many.computing))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_a_strategy_does_besides_comes_once_a_step_and_grows_with_the_weights(tmp_path, accumulate):
    """Catches: a step that took longer than computing and exchanging told as no overlap and nothing else; the rest
    of FSDP charged to DDP, to one device or to each micro-batch, or left as it is in a model of another size; a step
    that is checked by itself."""
    content = json.loads(pieces(tmp_path).read_text())
    network, (_, one, fsdp) = Network(8, 1e15, 0.0), content["steps"]
    exchanging = Measured(content, tiny(), 16, network).times(Plan(tiny(), "fsdp", 16, 4, 1), 2).exchanging
    fsdp["step_s"] = one["micro_s"] + one["update_s"] / 2 + exchanging + 0.04
    measured = Measured(content, tiny(), 16, network)
    assert measured.spread("fsdp") == measured.spread("hybrid") == pytest.approx((0, 0.04 / one["weights"]))
    assert measured.spread("ddp") == measured.spread("fsdp", but=fsdp) == (0, 0)
    wider = Config.from_name("pythia-14m", block_size=16, n_layer=24)
    for config in (tiny(), wider):
        plan = Plan(config, "fsdp", 16, 4, accumulate)
        time = measured.times(plan, 8)
        assert time.beside == pytest.approx(0.04 * plan.weights / one["weights"])
        assert time.step == pytest.approx(time.computing + time.exchanging + time.beside)
        assert measured.times(plan, 1).beside == measured.times(Plan(config, "ddp", 16, 4, 1), 8).beside == 0
    assert f"a step takes {40 * plan.weights / one['weights']:,.1f} ms beside" in " ".join(measured.notes(plan))
    expected, step = 1e3 * (fsdp["step_s"] - 0.04), 1e3 * fsdp["step_s"]
    said = f"computed {expected:,.1f} ms with nothing hidden and nothing besides, measured {step:,.1f} ms"
    assert said in measured.checks()[0]


def test_the_table_is_printed_and_errors_are_told(run_script, tmp_path):
    """Catches: a plan that says nothing of what was given, and a file that is missing or empty told as a traceback."""
    plan = ["scripts/plan_training.py", "--name", "pythia-14m", "--length", 16, "--micro_batch_size", 1]
    path = pieces(tmp_path)
    code, out, err = run_script(*plan, "--pieces", path, "--devices", "[1,8,32]", "--strategy", "hybrid")
    assert code == 0, err
    assert "check: fsdp on 2 devices, 4 x 16: computed" in out and "measured 105.0 ms" in out
    assert out.count("GB, measured 0.5 GB") == 2
    assert "given, not measured" in out and out.count("\n| ") == 5 and "| 32 | 512 |" in out
    code, out, _ = run_script(*plan, "--pieces", tmp_path / "none", "--devices", "[8]")
    assert code == 0 and "No time is computed without" in out and "tok/s" not in out and "| 8 | 128 |" in out
    empty = tmp_path / "empty.json"
    empty.write_text("{}")
    for arguments, words in (
        (["--pieces", empty], "no step of one device"),
        (["--pieces", path, "--devices", "[12]"], "devices=12 does not fit hosts of 8"),
        (["--pieces", path, "--model.s2_attention", "true"], "are not counted"),
    ):
        code, _, err = run_script(*plan, *arguments)
        assert code == 2 and words in err and "Traceback" not in err


def test_pieces_are_measured(run_script, tmp_path, monkeypatch):
    """Catches: a step that is not timed, a file that the plan cannot read, a machine whose memory runs full."""
    shape = {"n_layer": 2, "n_embd": 64, "n_head": 4, "intermediate_size": 64, "vocab_size": 64}
    fields = [word for name, value in shape.items() for word in (f"--model.{name}", value)]
    measure = ["scripts/measure_pieces.py", "--name", "pythia-14m", *fields, "--lengths", "[16]", "--device", "cpu"]
    code, out, err = run_script(*measure, "--micro_batch_tokens", 32, "--repeats", 1, "--output", tmp_path / "p.json")
    assert code == 0 and "one   2 x     16" in out, err
    (row,) = json.loads((tmp_path / "p.json").read_text())["steps"]
    assert row["step_s"] >= row["micro_s"] > 0
    config = Config.from_name("pythia-14m", block_size=16, **shape)
    assert row["weights"] == Plan(config, "ddp", 16, 1, 1).weights
    monkeypatch.setattr("lit_swa.memory.SLACK", (1.0, 0))
    monkeypatch.setattr("lit_swa.memory.free_memory", lambda *given, **how: 10**6)
    code, _, err = run_script(*measure, "--micro_batch_tokens", 32, "--devices", 2)
    assert code == 2 and "A step of 32 tokens on each device would take" in err and "--micro_batch_tokens or" in err
