"""What is found out about this machine: its processor, the fastest products on it, the cores that are free."""

import json
import os
import random

import pytest
import torch
from torch import nn

from lit_swa import linear_formats, machine
from lit_swa.generate import Session
from lit_swa.linear_formats import LAYOUTS, PackedLinear, VectorLinear, layout_key, pack_for_cpu, time_layouts


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache directory, and a process that has found out nothing."""
    linear_formats.measured.clear()
    monkeypatch.setenv("LIT_SWA_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    linear_formats.measured.clear()


def fake_clock(monkeypatch, speed: dict[str, float]):
    """A clock by which the product of each layout takes so many seconds."""
    now = [0.0]

    def slowed(name):
        def make(linear):
            layer = LAYOUTS_BEFORE[name](linear)
            layer = VectorLinear(linear, nn.functional.linear) if layer is linear else layer
            layer.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + speed[name]))
            return layer

        return make

    for name in speed:
        monkeypatch.setitem(LAYOUTS, name, slowed(name))
    return lambda: now[0]


LAYOUTS_BEFORE = dict(LAYOUTS)


@pytest.mark.parametrize("fastest", [name for name in LAYOUTS if name != "plain"])
def test_the_fastest_product_is_chosen_and_a_small_gain_is_none(monkeypatch, fastest):
    """Catches: a choice by what a vendor is believed to be good at; noise that decides."""
    layer = {"layer": nn.Linear(32, 16)}
    for seconds, chosen in ((0.5, fastest), (0.98, "plain")):
        speed = dict.fromkeys(LAYOUTS, 1.0) | {fastest: seconds}
        with monkeypatch.context() as patched:
            assert time_layouts(layer, list(LAYOUTS), fake_clock(patched, speed)) == ({"layer": chosen}, True)


def test_times_that_do_not_agree_are_measured_again_and_not_kept(tiny_model, monkeypatch, cache):
    """Catches: what was measured beside another program, kept for ever; a load that takes minutes on a busy machine."""
    chance, now = random.Random(1), [0.0]

    def clock() -> float:
        now[0] += 10 ** chance.uniform(-7, -1)
        return now[0]

    monkeypatch.setattr(linear_formats, "LONGEST", 0.5)
    chosen, agreed = time_layouts({"layer": nn.Linear(32, 16)}, list(LAYOUTS), clock)
    assert chosen["layer"] in LAYOUTS and not agreed and 0.5 < now[0] < 1.5
    monkeypatch.setattr(linear_formats, "time_layouts", lambda linears, _: (dict.fromkeys(linears, "packed"), False))
    assert pack_for_cpu(tiny_model()) == 2 * 5 + 1 and not (cache / linear_formats.LAYOUT_FILE).exists()


@pytest.mark.parametrize("written", [None, "half of", "[]", "{}"])
def test_a_choice_is_kept_and_a_broken_file_is_no_error(tiny_model, monkeypatch, cache, written):
    """Catches: a measurement at every start; a file of another version, or half of one, that ends in an error."""
    if written is not None:
        cache.mkdir()
        (cache / linear_formats.LAYOUT_FILE).write_text(written)
    asked = []

    def measure(linears, names):
        asked.extend(linears)
        return dict.fromkeys(linears, "packed"), True

    monkeypatch.setattr(linear_formats, "time_layouts", measure)
    model = tiny_model(tie_embeddings=False)
    keys = {layout_key(m) for m in model.modules() if isinstance(m, nn.Linear)}
    assert pack_for_cpu(model) == 2 * 5 + 1 and isinstance(model.lm_head, PackedLinear)
    assert set(asked) == keys and len(asked) == len(keys)
    assert json.loads((cache / linear_formats.LAYOUT_FILE).read_text()) == dict.fromkeys(keys, "packed")
    asked.clear()
    linear_formats.measured.clear()
    assert pack_for_cpu(tiny_model(tie_embeddings=False)) == 2 * 5 + 1 and not asked
    assert pack_for_cpu(tiny_model(tie_embeddings=False).bfloat16()) and asked  # another dtype


def test_a_cache_that_cannot_be_written_is_no_error(tiny_model, monkeypatch, cache, tmp_path):
    """Catches: a home directory that must be writable, or there at all."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIT_SWA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(linear_formats, "time_layouts", lambda linears, _: (dict.fromkeys(linears, "plain"), True))
    assert pack_for_cpu(tiny_model()) == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout_multiplies_alike(layout, dtype):
    """Catches: a product that forgets the bias, or the shape of a batch."""
    linear = nn.Linear(48, 80, dtype=dtype)
    layer = LAYOUTS[layout](linear)
    for shape in ((48,), (1, 1, 48), (3, 1, 48), (2, 5, 48)):
        x = torch.randn(shape, dtype=dtype)
        expected = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
        # one rounding of the result, and of the sum before the bias
        torch.testing.assert_close(
            layer(x).double(), expected, rtol=2**-6 if dtype is torch.bfloat16 else 1e-5, atol=2**-6
        )


def test_a_processors_name_depends_on_its_instructions(monkeypatch, tmp_path):
    """Catches: code for one processor that another loads from a shared home directory."""
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    names = []
    for flags in ("avx2", "avx2 avx512f"):
        machine.CPUINFO.write_text(f"processor : 0\nmodel name : AMD EPYC\nflags : {flags}\n\nprocessor : 1\n")
        machine.processor.cache_clear()
        names.append(machine.processor())
    machine.processor.cache_clear()
    assert "AMD EPYC" in names[0] and names[0] != names[1]


def test_sessions_leave_the_cores_that_others_work_on(tiny_model, monkeypatch):
    """Catches: threads that wait for one whose core is taken; threads that stay fewer when the other program ends."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    now, work, threads = [0.0], [0.0, 0.0], []
    monkeypatch.setattr(machine.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(machine, "work_done", lambda: tuple(work))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    model, before = tiny_model(), torch.get_num_threads()
    model.register_forward_pre_hook(lambda *_: threads.append(torch.get_num_threads()))
    session = Session(model)
    torch.set_num_threads(4)
    try:
        with machine.sharing_cores():
            for others in (0.0, 1.0, 2.6, 9.0, 0.0):  # cores' worth of work of other programs
                now[0] += 1.0
                work[0], work[1] = work[0] + others + 1.5, work[1] + 1.5
                session.feed([1])
                assert torch.get_num_threads() == 4
        session.feed([1])
        assert threads == [4, 3, 1, 1, 4, 4]
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        with machine.sharing_cores():
            assert machine.shared is None
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not machine.STAT.exists() or os.nice(0) > 0, reason="Linux counts it, where it is not niced")
def test_a_processs_work_is_part_of_all_work():
    """Catches: idle time that is counted as work; seconds compared with ticks."""
    before = machine.work_done()
    sum(range(2 * 10**7))
    everything, own = (b - a for a, b in zip(before, machine.work_done(), strict=True))
    assert 0 < own <= everything + 0.05  # a tick for each of the counts that are added
