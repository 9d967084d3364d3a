"""Too little memory: what is free, what is refused before it is asked for, and what is said when it ran out."""

import contextlib
import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from tiny import tiny_config

from lit_swa import GPT, memory
from lit_swa.arguments import Training
from lit_swa.checkpoint import load_model
from lit_swa.fast_attention import flash_attention
from lit_swa.formats.reading import read_bytes
from lit_swa.generate import Session, cache_bytes, live_elements, require_activations
from lit_swa.lora import LoRAConfig, add_lora
from lit_swa.memory import free_memory, memory_sentence, ran_out_of_memory, require_memory
from lit_swa.training import memory as memory_of_steps
from lit_swa.training.estimate import Tracker, estimate_step
from lit_swa.training.loop import Batch
from lit_swa.training.loss import differentiate_pieces_at_once
from lit_swa.training.memory import choose_recompute, kept_between_chunks, mapped_bytes, recompute_blocks
from lit_swa.training.precision import copies_for_backward, train_in_float32
from lit_swa.utils import check_devices

CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A made-up Linux machine with 8 GB available: its /proc in proc, its control groups in groups."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemFree: 1000000 kB\nMemAvailable: 8000000 kB\nSwapFree: 500000 kB\n")
    (tmp_path / "proc" / "self" / "statm").write_text("0 0 0 0 0 0 0\n")
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "groups")
    return tmp_path


def limit_group(machine: Path, line: str, place: str, files: dict[str, object]) -> None:
    (machine / "proc" / "self" / "cgroup").write_text(line)
    (machine / "groups" / place).mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (machine / "groups" / place / name).write_text(f"{value}\n")


def test_what_is_free_counts_the_page_cache_and_the_limits(machine):
    """Catches: cached files that count as taken, a container's limit that is not seen, in both versions of groups."""
    assert free_memory(CPU) == 8_192_000_000 and free_memory(CPU, swap=True) == 8_704_000_000
    version_2 = {"memory.max": 3 * 10**9, "memory.current": 2 * 10**9}
    limit_group(
        machine, "0::/job/part\n", "job", version_2 | {"memory.stat": "anon 5\nactive_file 400\ninactive_file 8"}
    )
    assert free_memory(CPU) == 10**9 + 408  # the limit of a group around the process's own
    limit_group(machine, "0::/job/part\n", "job/part", {"memory.max": "max", "memory.current": 7})
    assert free_memory(CPU) == 10**9 + 408
    version_1 = {"memory.limit_in_bytes": 10**9, "memory.usage_in_bytes": 10**8, "memory.stat": "total_active_file 5"}
    limit_group(machine, "4:cpu,memory:/elsewhere\n0::/\n", "memory", version_1)  # as a container sees its host's name
    assert free_memory(CPU) == 9 * 10**8 + 5
    limit_group(machine, "4:memory:/\n", "memory", {"memory.limit_in_bytes": 2**63 - 4096})
    assert free_memory(CPU) == 8_192_000_000


def test_a_size_is_refused_only_where_it_cannot_fit(monkeypatch):
    """Catches: a refusal of what would fit, numbers or a remedy that are not said."""
    monkeypatch.setattr(memory, "free_memory", lambda device, swap: 2 * 10**9)
    require_memory(2 * 10**9, CPU, "It", "shrink it")
    require_memory(10**15, torch.device("meta"), "It", "shrink it")
    with pytest.raises(ValueError, match=r"^It would take 2\.30 GB and 2\.00 GB are free: shrink it\.$"):
        require_memory(2_300_000_000, CPU, "It", "shrink it")


@pytest.mark.parametrize(
    "error, words",
    [
        (RuntimeError("CPUAllocator: can't allocate memory: you tried to allocate 2000000000 bytes"), "2.00 GB"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 64000 bytes."), "64.0 kB"),
        (RuntimeError("unable to mmap 538082208 bytes from file </x>: Cannot allocate memory (12)"), "538 MB"),
        (MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,)"), "8.00 GB"),
        (MemoryError("std::bad_alloc"), "--recompute all"),
        (RuntimeError("std::bad_alloc"), "--micro_batch_size 1"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.1 GiB, "
                                "of which 1.50 GiB is free."), "2.15 GB more were asked for and 1.61 GB are free"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "--quantize int4"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "--max_seq_length"),
        (RuntimeError("can't start new thread"), "does not hold"),
        (OSError(12, "Cannot allocate memory"), "does not hold"),
        (ImportError("libx.so: failed to map segment from shared object"), "does not hold"),
        (RuntimeError("Storage size calculation overflowed with sizes=[1, 2]"), "does not hold"),
    ],
)  # fmt: skip
def test_errors_that_mean_too_little_memory_get_a_remedy(error, words):
    """Catches: a traceback where the memory ran out, a lost number, an argument that the script lacks."""
    sentence = memory_sentence(error, ["micro_batch_size", "batch_size", "max_seq_length", "recompute", "quantize"])
    assert words in sentence and "--batch_size" not in sentence and "--max_new_tokens" not in sentence
    assert "--max_new_tokens" in memory_sentence(error, ["max_new_tokens"])


def test_weights_that_do_not_fit_are_not_helped_by_a_shorter_text():
    """Catches: a remedy that cannot work."""

    def build_model():
        raise MemoryError

    with pytest.raises(MemoryError) as caught:
        build_model()
    sentence = memory_sentence(caught.value, ["max_new_tokens", "dtype", "quantize", "model"])
    assert sentence.startswith("The memory does not hold the weights")
    assert sentence.endswith("Use --dtype bfloat16 or --quantize int4.")
    assert "End other programs" not in memory_sentence(caught.value, ["prompt_tokens"])


def test_bugs_keep_their_traceback_and_a_hidden_cause_is_found():
    """Catches: any RuntimeError or OSError taken for one of memory; a MemoryError told as a damaged file."""
    for error in (
        RuntimeError("size mismatch"),
        OSError(28, "No space left"),
        ValueError("out of memory"),
        KeyError(1),
    ):
        assert not ran_out_of_memory(error) and memory_sentence(error, ["dtype"]) is None
    with pytest.raises(ValueError) as caught:
        try:
            raise MemoryError
        except MemoryError:
            raise ValueError("the file is damaged") from None
    assert "--dtype bfloat16" in memory_sentence(caught.value, ["dtype"])


def test_caches_are_counted_before_they_are_made(tiny_model, monkeypatch):
    """Catches: another size than is allocated, a refusal of what would fit, caches made before the question."""
    for fields in ({}, {"attention": "sliding,full", "sliding_window_size": 8, "rolling_kv_cache": True}):
        model = tiny_model(**fields)
        model.set_kv_cache(3, 40)
        held = {id(b): b.nbytes for cache in model.caches for b in cache.buffers()}
        assert cache_bytes(model, 3, 40) == sum(held.values()) >= model.kv_cache_bytes()
    model = tiny_model(block_size=2**31)
    call = model.plan_call(idx := torch.zeros(4, 300, dtype=torch.long), None)
    with torch.no_grad(), Tracker() as tracker:
        model.run_blocks(idx, call)
    most = 4 * 1200 * live_elements(model.config)
    assert most / 3 < tracker.peak < most
    require_activations(model, 4, 300)
    monkeypatch.setattr(memory, "free_memory", lambda device, swap: 10**9)
    with pytest.raises(
        ValueError, match=r"caches of 1,000,000,000 tokens would take 264 GB and 1.00 GB are free: .*--max_new"
    ):
        Session(model).reserve(10**9)
    assert not model.caches
    with pytest.raises(ValueError, match="1000000 times 64 tokens would take .*--batch_size"):
        require_activations(model, 10**6, 64)


def test_scripts_refuse_what_the_memory_does_not_hold(tiny_checkpoint, run_script, monkeypatch, tmp_path):
    """Catches: an allocation before the question whether it fits; an exit code of 1."""
    base = ("generate/base.py", "--checkpoint_dir", tiny_checkpoint, "--prompt", "x")
    many = ("--max_new_tokens", 10**9, "--model.block_size", 2 * 10**9)
    code, out, err = run_script(*base, *many)
    assert code == 2 and out == "" and "error: The caches of 1,000,000,001 tokens would take" in err
    monkeypatch.setattr(memory, "free_memory", lambda device, swap=False: 1000)
    monkeypatch.setattr(memory, "SLACK", (1.05, 0))
    code, _, err = run_script(*base, "--dtype", "bfloat16")
    assert code == 2 and err.startswith("error: The weights, as bfloat16 on cpu, would take")
    assert load_model(tiny_checkpoint, torch.float32) is not None  # the file's own pages
    with pytest.raises(ValueError, match="rank 7 would take"):
        add_lora(load_model(tiny_checkpoint, torch.float32), LoRAConfig(r=7))


def test_a_small_file_takes_no_more_memory_than_it_has(tmp_path):
    """Catches: a read that allocates as much as a file may have, whatever this one has."""
    (tmp_path / "small").write_bytes(b"small")
    tracemalloc.start()
    assert read_bytes(tmp_path / "small", 2**30) == b"small"
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_training_without_memory_ends_in_a_sentence(tiny_checkpoint, tmp_path):
    """Catches: an error that passes run_script by. The child's address space is really bounded."""
    rows = [{"instruction": "Say much", "input": "", "output": "the quick brown fox " * 60}] * 8
    (tmp_path / "data.json").write_text(json.dumps(rows))
    arguments = {"checkpoint_dir": tiny_checkpoint, "data": tmp_path / "data.json", "out_dir": tmp_path / "run",
                 "device": "cpu", "micro_batch_size": 8, "pack": "false", "max_steps": 1}  # fmt: skip
    words = [word for name, value in arguments.items() for word in (f"--{name}", value)]
    child = forked.start_script("finetune/full.py", *words, log=tmp_path / "log", room=24 << 20)
    child.join(60)
    last = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert child.exitcode == 2 and last.startswith("error: ") and "--micro_batch_size 1" in last


def test_more_processes_than_the_machine_has_are_refused(monkeypatch):
    """Catches: a thousand processes on a CPU; two that cannot be tried on one core; torchrun's refused."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0}, raising=False)
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    check_devices("cpu", 2)
    with pytest.raises(ValueError, match="devices=1000 .* use at most 2"):
        check_devices("cpu", 1000)
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_devices("cpu", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device, count in (("cuda", 3), ("cuda:2", 1)):
        with pytest.raises(ValueError, match="this machine has 2 GPUs"):
            check_devices(device, count)


# ------------------------------------------------------------------------------------------------------------- training


def measured_peak(model: GPT, batch: Batch) -> int:
    """The most bytes that torch's allocator holds in a forward and backward, by its own record."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        model(batch.idx, targets=batch.targets, documents=batch.documents).backward()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


SLIDING = {"attention": "sliding,full", "sliding_window_size": 100}


@pytest.mark.parametrize("lengths", [[300, 180], [160, 160, 160]], ids=["texts", "texts of one length"])
@pytest.mark.parametrize(
    "fields, lora, recomputed, dtype",
    [
        ({"tie_embeddings": True}, False, 1, torch.float32),
        (SLIDING, False, 0, torch.bfloat16),
        (SLIDING, True, 0, torch.float32),
        ({"attention": "dual_chunk", "dual_chunk_pretraining_length": 128}, True, 4, torch.float32),
        ({"s2_attention": True, "vocab_size": 1000}, True, 3, torch.float32),
    ],
)
def test_the_estimate_of_a_step_is_what_it_takes(fields, lora, recomputed, dtype, lengths, monkeypatch):
    """Catches: activations, gradients or a layer left out or counted twice, or as wide as weights that are wider than
    what is computed. torch's allocator is the oracle."""
    shape = {"n_layer": 4, "n_embd": 96, "intermediate_size": 256, "block_size": 1024, "vocab_size": 500}
    monkeypatch.setattr("lit_swa.model.LOSS_ELEMENTS", (2**18, 2**18))
    model = GPT(tiny_config(**shape | fields)).train()
    differentiate_pieces_at_once(model)
    if lora:
        add_lora(model, LoRAConfig(dropout=0.1))
    train_in_float32(model.to(dtype), dtype)
    idx = torch.randint(0, 500, (1, 480))
    batch = Batch(idx, idx, lengths, [0, 1])
    state = torch.get_rng_state()
    estimate = estimate_step(model, batch, False, contextlib.nullcontext)
    one, part = (estimate_step(model, batch, True, contextlib.nullcontext, shards) for shards in (1, 4))
    assert torch.equal(state, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    recompute_blocks(model, recomputed)
    assert estimate.activations[recomputed] == pytest.approx(measured_peak(model, batch), rel=0.1)
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert (estimate.gradients, estimate.moments) == (trained, 2 * trained)
    whole = estimate.weights
    block = sum(p.nbytes for p in model.transformer.h.parameters()) // 4
    assert (part.gradients, part.moments) == (trained // 4, 2 * (trained // 4))
    buffers, narrow = sum(b.nbytes for b in model.buffers()), 4 // dtype.itemsize  # wide weights are gathered rounded
    assert part.weights == pytest.approx(whole / 4 + buffers + (whole - buffers - 2 * block) / narrow, abs=8)
    less, rounded = one.activations[recomputed] - part.activations[recomputed], copies_for_backward(model, dtype)
    assert less == 0 if narrow == 1 else less >= rounded > 0  # accumulated gradients are whole until they are sharded


def test_what_an_estimate_saw_is_compiled_later(tiny_model):
    """Catches: a function that torch skips for good since its first tensors had no numbers: slow steps under FSDP, and
    FlexAttention that fails."""
    model, compiled = tiny_model(n_layer=2).train(), []
    norm = model.transformer.h[0].norm_1
    norm.forward = torch.compile(norm.forward, backend=lambda graph, _: compiled.append(graph) or graph.forward)
    idx = torch.randint(0, 97, (2, 40))
    estimate_step(model, Batch(idx, idx, None, [0]), False, contextlib.nullcontext)
    assert not compiled
    model(idx)
    assert len(compiled) == 1


def test_windows_are_estimated_by_flash_attention():
    """Catches: a kernel whose arguments another torch names otherwise, or that cannot be told what it would take."""
    q, k, v = (torch.empty(1, heads, 256, 16, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
    with Tracker() as tracker:
        y = flash_attention(q, k, v, 64, 0.25)
        y.backward(torch.ones_like(y))
    assert [x.grad.shape for x in (q, k, v)] == [q.shape, k.shape, v.shape]
    assert y.shape == q.shape and tracker.peak >= 2 * y.nbytes + k.nbytes + v.nbytes


MOE = {"n_expert": 4, "n_expert_per_token": 2, "mlp_class_name": "MoE"}


@pytest.mark.parametrize("fields, again", [({}, 0), (MOE, 3)])
def test_sharded_layers_of_which_nothing_is_known_compute_again(tiny_model, monkeypatch, fields, again):
    """Catches: a run that ends in its estimate since experts look at numbers, and one that hopes for the best."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=0))
    for name, value in {"free_memory": 10**12, "is_sharded": True, "count_shards": 2}.items():
        monkeypatch.setattr(memory_of_steps, name, lambda *_, value=value: value)
    idx = torch.randint(0, 97, (2, 40))
    fabric = SimpleNamespace(device=CPU, autocast=contextlib.nullcontext)
    feed = SimpleNamespace(longest=lambda: Batch(idx, idx, None, [0]))
    run = SimpleNamespace(args=Training(data=""), fabric=fabric, feed=feed, dtype=torch.float32)
    assert memory_of_steps.fitting_on_gpu(run, tiny_model(n_layer=3, **fields).train(), "auto", True) == again


def test_on_a_cpu_as_many_layers_recompute_as_the_memory_demands(tiny_model, monkeypatch, capsys):
    """Catches: everything kept until the kernel kills the run; a refusal without numbers, or of what would fit."""
    model, lines, free = tiny_model(n_layer=4).train(), [], 10**12
    idx = torch.randint(0, 97, (1, 200))
    batch = Batch(idx, idx, [200], [0])
    args = Training(data="")
    fabric = SimpleNamespace(device=CPU, world_size=1, autocast=contextlib.nullcontext)
    feed, log = SimpleNamespace(longest=lambda: batch), SimpleNamespace(say=lines.append)
    run = SimpleNamespace(args=args, fabric=fabric, feed=feed, log=log)
    step = estimate_step(model, batch, True, contextlib.nullcontext)
    needed = [step.beside_weights(n) for n in range(5)]
    assert needed == sorted(needed, reverse=True)
    monkeypatch.setattr("lit_swa.training.memory.return_what_is_freed", lambda: None)
    for module in ("lit_swa.memory", "lit_swa.training.memory"):
        monkeypatch.setattr(f"{module}.free_memory", lambda device, swap=False: free)
    monkeypatch.setattr(memory, "SLACK", (1.05, 0))
    assert choose_recompute(run, model) == 0 and "0 of 4 layers" in lines[-1]
    free = int(needed[3] / 0.75) + 2
    assert choose_recompute(run, model) == 3 and "3 of 4 layers" in lines[-1]
    free = needed[4]
    assert choose_recompute(run, model) == 4
    args.recompute = "none"
    with pytest.raises(ValueError, match=r"200 tokens.* use --recompute all \("):
        free = needed[4] + 1
        choose_recompute(run, model)
    args.recompute, free = "auto", needed[4] // 2
    with pytest.raises(ValueError, match="would take .* are free: use a smaller --max_seq_length"):
        choose_recompute(run, model)


@pytest.mark.parametrize(
    "device, offload, words",
    [
        (
            "cpu",
            False,
            "A chunk of the longest .* and 213 kB that chunks keep for .* use a larger --chunk_size or a smaller",
        ),
        ("cuda", True, "What chunks of 8 tokens keep of a text of 200 would take .* use a larger --chunk_size"),
        ("cuda", False, "What chunks of 8 tokens keep of a text of 200 would .* use --chunk_offload true, a larger"),
    ],
)
def test_no_room_between_chunks_is_told_with_how_much(device, offload, words, monkeypatch):
    """Catches: hours until a long text's borders fill the memory, and a sentence that speaks of activations only."""
    model, idx = GPT(tiny_config(n_layer=4)).train(), torch.randint(0, 97, (1, 200))
    args = Training(data="", chunk_size=8, chunk_offload=offload)
    fabric = SimpleNamespace(device=torch.device(device), world_size=1, autocast=contextlib.nullcontext)
    feed = SimpleNamespace(longest=lambda: Batch(idx, idx, [200], [0]))
    run = SimpleNamespace(args=args, fabric=fabric, feed=feed, dtype=torch.float32)
    for module in ("lit_swa.memory", "lit_swa.training.memory"):
        monkeypatch.setattr(f"{module}.free_memory", lambda device, swap=False: 1000)
    monkeypatch.setattr(memory, "SLACK", (1.05, 0))
    with pytest.raises(ValueError, match=words):
        choose_recompute(run, model) if device == "cpu" else kept_between_chunks(run, model)


def test_weights_that_are_a_files_pages_are_told_apart(tiny_checkpoint):
    """Catches: full finetuning whose weights take no memory in the estimate until the first update copies them."""
    mapped, copied = (load_model(tiny_checkpoint, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert mapped_bytes(mapped.parameters()) == sum(p.nbytes for p in mapped.parameters())
    assert mapped_bytes(copied.parameters()) == 0
