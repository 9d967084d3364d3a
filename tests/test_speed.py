"""What a run says of its speed: the bytes that a step reads, worked out by hand; the lines; the trace of steps."""

import json
import os
import re

import pytest
import torch
import torch.nn as nn

from lit_swa import speed
from lit_swa.batches import Batch, Request
from lit_swa.generate import Session, Stats, generate
from lit_swa.memory import format_bytes, peak_memory
from lit_swa.quantize import Int8Linear
from lit_swa.speed import StepTrace, check_trace, copy_rate, mean_below, step_bytes

# The tiny model, in float32: a layer's qkv 80 x 48, proj 48 x 48, MLP 3 x 64 x 48 and two norms of 48; lm_head 97 x 48,
# the last norm and one row of wte. A key and its value take 2 groups x 8 x 2 x 4 = 128 bytes a layer.
WEIGHTS = 4 * (2 * (80 * 48 + 48 * 48 + 3 * 64 * 48 + 2 * 48) + 97 * 48 + 48 + 48)
CPU = torch.device("cpu")


class Wrapped(nn.Module):
    """A LinearFormat that holds another linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.inner, self.bias = linear, linear.bias

    def dense_weight(self) -> torch.Tensor:
        return self.inner.weight

    def weight_bytes(self) -> int:
        return self.inner.weight.nbytes


@pytest.mark.parametrize(
    "fields, keys",
    [
        ({}, 256 * 11),
        ({"tie_embeddings": True}, 256 * 11),  # the table is read once, as lm_head's weight
        ({"attention": "sliding", "sliding_window_size": 5}, 256 * 5),  # in a dense cache too
        ({"attention": "sliding,full", "sliding_window_size": 5, "rolling_kv_cache": True}, 128 * (5 + 11)),
        ({"attention": "streaming", "sliding_window_size": 5, "n_sink_tokens": 3}, 256 * 8),
        ({"attention": "dual_chunk", "dual_chunk_pretraining_length": 12}, 256 * 11),
    ],
)
def test_a_step_reads_every_weight_once_and_the_keys_that_it_sees(tiny_model, fields, keys):
    """Catches: an embedding table that counts, a tied one twice, slots that no query sees, rows counted once."""
    model = tiny_model(**fields)
    model.set_kv_cache(1, 64, lookahead=3)
    assert step_bytes(model, 11) == pytest.approx(WEIGHTS + keys)
    model.set_kv_cache(3, 64)
    assert step_bytes(model, 11, batch_size=3) == pytest.approx(WEIGHTS + 3 * keys + 2 * 4 * 48)


def test_formats_say_what_they_take(tiny_model):
    """Catches: a quantised weight that counts as floats, a bias that is left out, a format's child counted beside it,
    a LoRA left out."""
    from lit_swa.lora import LoRAConfig, add_lora

    model = tiny_model(mlp_bias=True)
    model.set_kv_cache(1, 64)
    biases, before = 2 * 4 * (64 + 64 + 48), step_bytes(model, 1)
    assert before == WEIGHTS + 256 + biases
    mlp = model.transformer.h[0].mlp
    mlp.fc_1, mlp.proj = Wrapped(mlp.fc_1), Int8Linear.from_weight(mlp.proj.weight.data, mlp.proj.bias)
    assert before - step_bytes(model, 1) == 64 * 48 * 3 - 4 * 48  # a byte a number, and a float32 scale for each row
    add_lora(model, LoRAConfig(r=2, targets=("o",)))
    assert before - step_bytes(model, 1) == 64 * 48 * 3 - 4 * 48 - 2 * 4 * 2 * (48 + 48)


def test_lengths_are_averaged_over_the_steps():
    """Catches: a window that is reached in the middle of a text and counts from its beginning, or not at all."""
    for first, last, most in ((3, 9, 5), (1, 4, 9), (6, 9, 5), (5, 5, 5), (1, 1, 1)):
        lengths = range(first, last + 1)
        assert mean_below(first, last, most) == pytest.approx(sum(min(n, most) for n in lengths) / len(lengths))


def test_the_line_gives_the_rates_of_its_counters(tiny_model, monkeypatch):
    """Catches: a rate of the prompt's tokens, of the first token's step, a share of another rate."""
    monkeypatch.setattr(speed, "copy_rate", lambda device: 8 * WEIGHTS)
    model, stats = tiny_model(), Stats()
    list(generate(model, list(range(10)), 5, stats=stats))
    stats.prefill_seconds, stats.decode_seconds = 0.5, 2.0
    keys = 256 * (11 + 12 + 13 + 14)
    assert stats.bytes_decoded(model) == pytest.approx(4 * WEIGHTS + keys)
    speeds, memory = stats.line(model, "text").splitlines()[:2]
    assert "prefill 10 tokens, 20 tok/s" in speeds and speeds.endswith("decode 4 steps, 2.0 tok/s")
    share = (4 * WEIGHTS + keys) / 2 / (8 * WEIGHTS)
    assert memory.startswith(f"decode read {(4 * WEIGHTS + keys) / 2e3:.0f} kB/s, {share:.0%} of the copy rate of ")
    assert memory.rpartition(" | ")[2].startswith("peak memory ") and memory.endswith("B")
    stats.decode_bytes = 6e9
    assert "decode read 3.00 GB/s" in stats.line(model) and " on cpu" not in stats.line(model)
    model.lm_head.to("meta")  # as if it were on another device
    assert re.search(r"peak memory \S+ .B on cpu, \S+ .B on meta\n", stats.line(model))


@pytest.mark.parametrize("fields", [{}, {"attention": "sliding", "sliding_window_size": 5, "rolling_kv_cache": True}])
def test_a_batch_reads_the_weights_once_a_step_and_the_keys_of_its_texts(tiny_model, fields):
    """Catches: weights that count for each row, rows without a text, keys of the prompt's own reading."""
    model, window = tiny_model(**fields), fields.get("sliding_window_size", 99)
    sizes = [(4, 5), (3, 3), (6, 2), (1, 4)]  # tokens of the prompt, and new ones
    batch = Batch(model, [Request(list(range(n)), count) for n, count in sizes], batch_size=2)
    assert len(list(batch.run())) == 4
    batch.count_prefills()
    batch.prefill_seconds = 20.0
    first, speeds, memory, _ = batch.line(100.0).splitlines()
    fed = [range(n + (n > 1), n + count) for n, count in sizes]  # the keys that each step of a text sees
    assert batch.decoded == sum(map(len, fed)) and batch.keys_read == 256 * sum(min(n, window) for r in fed for n in r)
    read = batch.steps * (WEIGHTS + 4 * 48) + batch.keys_read
    assert memory.startswith(f"decode read {format_bytes(read / 80)}/s, ") and "4 answers, 14 prompt tokens" in first
    assert speeds == f"prefill 1 tok/s | decode {batch.decoded} tokens in {batch.steps} steps, 0.1 tok/s"


@pytest.mark.parametrize("steps, seconds", [(0, 0.0), (0, 1e-9), (1, 0.0), (9, 0.0)])
def test_no_figure_is_made_up(tiny_model, monkeypatch, steps, seconds):
    """Catches: a division by zero, nan, and rates of a clock that stood still."""
    stats = Stats(prompt_tokens=3, new_tokens=steps + 1, decode_steps=steps, decode_seconds=seconds)
    speeds, memory = stats.line(tiny_model()).splitlines()[:2]
    assert "tok/s" not in speeds and memory.startswith("peak memory ")
    monkeypatch.setattr(speed, "copy_rate", lambda device: None)
    stats.decode_steps, stats.decode_seconds = 4, 1.0
    assert "%" not in stats.line(tiny_model()) and "decode read" in stats.line(tiny_model())


def test_the_copy_rate_is_measured_where_there_is_memory(monkeypatch):
    """Catches: a run that fails at its end for the memory of a measurement; a rate in other units."""
    copy_rate.cache_clear()
    monkeypatch.setattr("lit_swa.speed.free_memory", lambda device: 2**20)
    assert copy_rate(CPU) is None and copy_rate(torch.device("meta")) is None
    copy_rate.cache_clear()
    monkeypatch.setattr("lit_swa.speed.free_memory", lambda device: 2**40)
    monkeypatch.setattr("lit_swa.speed.COPIED", {"cpu": 2**20})
    assert 1e7 < copy_rate(CPU) < 1e13 and copy_rate(CPU) == copy_rate(CPU)
    copy_rate.cache_clear()
    before = peak_memory(CPU)
    assert before > 5e7 and torch.ones(2**26).sum() and peak_memory(CPU) >= before


# -------------------------------------------------------------------------------------------------------------- traces


def test_a_trace_holds_some_warm_steps(tiny_model, tmp_path, capfd):
    """Catches: a trace of the whole run or of nothing, one that a second text overwrites, times of all steps together,
    a word of it on stdout."""
    model, path = tiny_model(), tmp_path / "trace.json"
    trace, written = StepTrace(path, "cpu", skip=3, steps=4), None
    for text in ([1, 2, 3], [4, 5]):
        list(generate(model, text, 12, stats=Stats(trace=trace)))
        assert capfd.readouterr() == ("", "")  # the text is not interrupted
        trace.close()
        content, before, written = json.loads(path.read_text()), written, path.stat().st_mtime_ns
        assert (capfd.readouterr().out, trace.times[4:]) == ("", [trace.times[4]])
    names = [event.get("name", "") for event in content["traceEvents"] if event.get("ph") == "X"]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 4
    products = 2 * 5 + 1  # qkv, proj and the MLP's three in each of two layers, and lm_head
    assert names.count("aten::linear") == 4 * products
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"] and before == written


def test_a_trace_of_a_short_text_says_what_it_holds(tiny_model, tmp_path, capfd):
    """Catches: a text that ends early, whose trace is lost; one that never came so far, and an empty file for it; the
    large copy of the line of figures among the steps."""
    model, session = tiny_model(), None
    for count, said in ((3, "There is no trace: the text had 2 decode steps"), (7, "trace of 3 steps")):
        path = tmp_path / f"{count}.json"
        trace = StepTrace(path, "cpu", skip=3, steps=9)
        session = session or Session(model)
        stats = Stats(trace=trace)
        list(generate(model, [1, 2, 3], count, session=session, stats=stats))
        copy_rate.cache_clear()
        stats.line(model)
        trace.close()
        trace.close()
        error = capfd.readouterr().err
        assert "USDT" not in error and error.count(said) == 1 and path.exists() == (count == 7)
    rows = [line.split() for line in error.splitlines() if " ms " in line and "x  " in line]
    assert any(row[-1] == "aten::mm" and row[3] == "11.0x" for row in rows)
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    assert "aten::mm" in names and "aten::ones" not in names


def test_a_name_that_no_trace_can_have_is_refused(tmp_path, monkeypatch):
    """Catches: a run that fails at its end, after all its work."""
    with pytest.raises(OSError, match="is a directory: give the name of a file"):
        StepTrace(tmp_path, "cpu")
    with pytest.raises(OSError, match="There is no directory .*nowhere for t.json"):
        check_trace(tmp_path / "nowhere" / "t.json")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="cannot be written to: give t.json another"):
        patch.setattr(os, "access", lambda path, mode: False)  # to root all of them can
        check_trace(tmp_path / "t.json")


def test_a_script_traces_its_first_completion(tiny_checkpoint, run_script, tmp_path):
    """Catches: a --profile that does nothing, or is refused after the model was loaded; a trace of another text."""
    arguments = ["--checkpoint_dir", tiny_checkpoint, "--prompt", "the quick", "--max_new_tokens", "24", "--profile"]
    path = tmp_path / "trace.json"
    code, out, err = run_script("generate/base.py", *arguments, path, "--num_samples", "2", "--temperature", "0")
    assert code == 0 and out.count("the quick") == 2 and err.count("trace of 8 steps") == 1
    assert json.loads(path.read_text())["traceEvents"]
    code, out, err = run_script("generate/base.py", *arguments, tmp_path / "no" / "t.json")
    assert (
        code == 2
        and out == ""
        and err == f"error: There is no directory {tmp_path}/no for t.json: make it, or give another name.\n"
    )
