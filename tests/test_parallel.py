"""A model over several processes or devices is the model of one: logits to float32's rounding, and greedy tokens."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from forked import free_port, start_script, torchrun_environment
from ranks import Ranks
from tiny import randomize, tiny_config

from lit_swa import GPT, cpu_decode, ranks, sequential
from lit_swa.adapter import AdapterConfig, add_adapter, save_adapter
from lit_swa.checkpoint import load_model, save_checkpoint
from lit_swa.expert_formats import each_expert
from lit_swa.formats.hugging_face import empty_model
from lit_swa.formats.quantized import quantization_of
from lit_swa.generate import Sampling, Session, generate
from lit_swa.linear_formats import is_experts, weighty_layers
from lit_swa.lora import LoRAConfig, add_lora
from lit_swa.parallel import Rank, head_shares, named_parts, split_model
from lit_swa.quantize import quantize_linears
from lit_swa.sequential import Ferry, place_blocks, spread
from lit_swa.speculative import SELF_DRAFTS, ModelDraft, make_draft, speculative_generate
from lit_swa.weight_only import Int4Linear, Int8Linear, round_groups

BIASES = {"attn_bias": True, "attn_proj_bias": True, "mlp_bias": True}
NEOX = {"norm_class_name": "LayerNorm", "mlp_class_name": "PlainMLP", "activation": "gelu", "parallel_residual": True}
LINEAR = {"attention": "linear,full", "linear_window": 4, "linear_sinks": 2, "linear_gate": True}
EXPERTS = {"mlp_class_name": "MoE", "n_expert": 4, "n_expert_per_token": 2, "expert_size": 24}
MIXED = EXPERTS | {"mlp_class_name": "GatedMLP,MoE", "expert_size": 192}
SHAPES = {
    "two groups, each rank one": {},
    "one group on both ranks": {"n_query_groups": 1},
    "three groups, shared unevenly; dynamic RoPE": {
        "n_head": 9,
        "n_query_groups": 3,
        "n_embd": 72,
        "intermediate_size": 67,
        "rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9},
    },
    "NeoX: biases, as many groups as heads": {"n_query_groups": 6} | NEOX | BIASES,
    "Gemma 2: norms behind, tied, capped": {
        "post_attention_norm": True,
        "post_mlp_norm": True,
        "norm_unit_offset": True,
        "tie_embeddings": True,
        "scale_embeddings": True,
        "final_logit_softcapping": 5.0,
        "attention_logit_softcapping": 5.0,
        "attention": "sliding,full",
        "sliding_window_size": 7,
    },
    "rolling": {"attention": "sliding", "sliding_window_size": 7, "rolling_kv_cache": True, "norm_qk": True},
    "streaming": {"attention": "streaming", "sliding_window_size": 7, "n_sink_tokens": 2},
    "dual chunk": {"attention": "dual_chunk", "dual_chunk_pretraining_length": 12},
    "OLMo 2: norms over all heads": {
        "norm_qk": True, "norm_qk_type": "whole", "pre_norm": False, "post_attention_norm": True, "post_mlp_norm": True,
    },
    "gpt-oss: experts, sinks, biases": {"sink_logits": True, "lm_head_bias": True} | BIASES | EXPERTS,
    "heads of each layer": {
        "layer_heads": "6,3", "layer_query_groups": "2,1", "attention_gate": True, "sink_logits": True,
        "norm_qk": True, "norm_qk_type": "each",
    },
    "AFMoE: a gate, norms of each head, a shared expert": {
        "attention_gate": True, "norm_qk": True, "norm_qk_type": "each", "shared_expert_size": 32,
        "mlp_class_name": "GatedMLP,MoE", "expert_weights": "biased",
    } | {k: v for k, v in EXPERTS.items() if k != "mlp_class_name"},
}  # fmt: skip
MOST = {"OLMo 2: norms over all heads": 2, "heads of each layer": 3}  # ranks: of their groups, and of their heads
IDS = (torch.arange(80).view(2, 40) * 7 + 3) % 97


def build(fields: dict, noise: float = 0.0) -> GPT:
    """A random model: the same for the same arguments, in every process. With some noise, one that often agrees."""
    torch.manual_seed(5)
    model = GPT(tiny_config(**fields)).eval()
    randomize(model)
    for p in model.parameters() if noise else ():
        p.data += noise * torch.randn_like(p)
    return model


@torch.inference_mode()
def read(model: GPT) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Logits without a cache, through a cache in pieces, and greedy tokens."""
    session = Session(model, batch_size=2)
    pieces = [session.feed(IDS[:, a:b], logits_to_keep=0) for a, b in ((0, 21), (21, 22), (22, 25), (25, 40))]
    return model(IDS), torch.cat(pieces, dim=1), list(generate(model, IDS[0, :9].tolist(), max_new_tokens=16))


def read_split(index: int, fields: dict, size: int) -> tuple[tuple, int]:
    model = split_model(build(fields), Rank(index, size))
    return read(model), model.kv_cache_bytes()


@pytest.mark.parametrize("name", SHAPES)
def test_two_ranks_are_one(two_ranks, name):
    """Catches: a head or column on no rank or on two, a bias added twice, rows of the vocabulary out of order, a cache
    of another rank's heads, logits that differ between ranks by a bit."""
    model = build(SHAPES[name])
    logits, cached, tokens = read(model)
    answers = two_ranks(read_split, SHAPES[name], 2)
    for (ours, ours_cached, ours_tokens), n_bytes in answers:
        torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5 * logits.abs().max().item())
        torch.testing.assert_close(ours_cached, cached, rtol=1e-5, atol=1e-5 * logits.abs().max().item())
        assert ours_tokens == tokens
        assert torch.equal(ours, answers[0][0][0]) and torch.equal(ours_cached, answers[0][0][1])
        assert n_bytes < model.kv_cache_bytes() or model.config.n_query_groups == 1


def agree(index: int) -> tuple[int, str]:
    rank = Rank(index, 2)
    return ranks.least(10 + index, rank, "cpu"), ranks.from_first(f"text {index}", rank)


def test_ranks_agree(two_ranks):
    """Catches: prompts read in pieces of different lengths, since ranks have different memory left: they would wait for
    each other for ever; a standard input that one has read, and the others read again."""
    assert two_ranks(agree) == [(10, "text 0")] * 2


@pytest.mark.slow
@pytest.mark.parametrize("size, name", [(n, name) for n in (3, 5) for name in SHAPES if n <= MOST.get(name, n)])
def test_more_ranks_are_one(name, size):
    """Catches: parts that are right for two ranks alone; a group of heads on some ranks of many."""
    logits, cached, tokens = read(build(SHAPES[name]))
    several = Ranks(size)
    try:
        for (ours, ours_cached, ours_tokens), _ in several(read_split, SHAPES[name], size):
            torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5 * logits.abs().max().item())
            torch.testing.assert_close(ours_cached, cached, rtol=1e-5, atol=1e-5 * logits.abs().max().item())
            assert ours_tokens == tokens
    finally:
        several.end()


def build_quantized(bits: int, group_size: int = 32) -> GPT:
    model = build({"n_head": 4, "n_embd": 128, "intermediate_size": 192} | BIASES | MIXED)

    def rounded(linear: torch.nn.Linear) -> torch.nn.Module:
        weight, bias = linear.weight.detach(), linear.bias
        if bits == 8 or linear is model.lm_head:
            return Int8Linear.from_weight(weight, bias)
        return Int4Linear.from_codes(*round_groups(weight, group_size), bias)

    for name, layer in weighty_layers(model).items():
        model.set_submodule(name, each_expert(layer, rounded) if is_experts(layer) else rounded(layer))
    return model.bfloat16()


def read_quantized(index: int, bits: int) -> torch.Tensor:
    model = build_quantized(bits)
    model(IDS[:, :3])  # what a layer made at its first call is not that of its part
    return read(split_model(model.float(), Rank(index, 2)))[0]


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_weights_are_split_as_they_are(two_ranks, bits):
    """Catches: codes without their scales, a row's scale that was made of a part of it, runs of 4-bit codes cut."""
    expected = read(build_quantized(bits).float())[0]
    for ours in two_ranks(read_quantized, bits):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_rank_loads_its_part_of_quantised_weights(tmp_path, mode, tied):
    """Catches: stored codes and scales of different parts; an lm_head that was tied and is quantised for itself; a bias
    that a model moved to another device leaves behind."""
    fields = {"n_head": 4, "n_embd": 128, "intermediate_size": 192, "attn_proj_bias": True} | MIXED
    model = build(fields | {"tie_embeddings": tied})
    save_checkpoint(model, model.config, tmp_path / "dense")
    quantize_linears(model, mode)
    save_checkpoint(model, model.config, tmp_path / mode, stored=quantization_of(model))
    for rank in (Rank(0, 2), Rank(1, 2), Rank(2, 3)):
        expected = split_model(load_model(tmp_path / mode), rank).state_dict()
        loaded = load_model(tmp_path / mode, rank=rank).state_dict()
        assert loaded.keys() == expected.keys() >= {"lm_head.linear.scale", "transformer.h.0.attn.proj.bias"}
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)
        # quantised while it is loaded, the rows are those of the whole layer
        made = load_model(tmp_path / "dense", quantize=mode, rank=rank).state_dict()
        assert all(torch.equal(made[name], expected[name]) for name in expected if "proj" not in name)


def test_groups_are_not_cut():
    """Catches: half a group with the scale of the whole, and nothing said."""
    model = build_quantized(4, group_size=64)
    with pytest.raises(
        ValueError, match="attn.proj keeps 64 inputs together, and the processes would cut between them"
    ):
        split_model(model, Rank(1, 4))


def speculate_split(index: int, fields: dict, kind: str, k: int, penalty: float) -> list[int]:
    model = split_model(build(fields), Rank(index, 2))
    if kind == "model":  # split too: alone, each rank would round its logits for itself
        draft = ModelDraft(Session(split_model(build(fields, noise=0.01), Rank(index, 2)), lookahead=k))
    else:
        draft = make_draft(kind, model, window=9)
    sampling = Sampling(repetition_penalty=penalty)
    return list(
        speculative_generate(
            model, IDS[0, :9].tolist(), draft=draft, speculative_k=k, max_new_tokens=25, sampling=sampling
        )
    )


ROLLING = {"attention": "sliding,full", "sliding_window_size": 7, "rolling_kv_cache": True}
SPECULATIVE = [
    (fields, kind, k, penalty)
    for fields in ({}, SHAPES["rolling"], ROLLING, SHAPES["streaming"], SHAPES["dual chunk"])
    for kind in ("model", "lookup", *SELF_DRAFTS)
    if not kind.startswith("streaming") or "full" in fields.get("attention", "full")
    for k in (1, 3, 6)
    for penalty in (1.0, 1.3)
]


def check_speculative(two_ranks: Ranks, fields: dict, kind: str, k: int, penalty: float) -> None:
    model = build(fields)
    sampling = Sampling(repetition_penalty=penalty)
    expected = list(generate(model, IDS[0, :9].tolist(), max_new_tokens=25, sampling=sampling))
    assert two_ranks(speculate_split, fields, kind, k, penalty) == [expected, expected]


def test_speculative_decoding_over_two_ranks(two_ranks):
    """Catches: ranks that accept different tokens, a draft's cache of other heads than the rank's."""
    for kind in ("self-int4", "streaming-int4"):
        check_speculative(two_ranks, ROLLING, kind, 3, 1.3)


@pytest.mark.slow
@pytest.mark.parametrize("fields, kind, k, penalty", SPECULATIVE)
def test_speculative_decoding_over_two_ranks_in_all_cases(two_ranks, fields, kind, k, penalty):
    """Catches: a draft, a window and a penalty that do not go together with heads on several ranks."""
    check_speculative(two_ranks, fields, kind, k, penalty)


@pytest.mark.parametrize("H, G", [(6, 2), (8, 8), (8, 1), (9, 3), (12, 4), (7, 1)])
def test_every_head_is_on_one_rank_with_its_keys(H, G):
    """Catches: a query head that reads another group's keys, or none, for any number of ranks."""
    config, R = tiny_config(n_head=H, n_query_groups=G, n_embd=8 * H), H // G
    for size in range(1, H + 1):
        shares = [head_shares(config, Rank(index, size)) for index in range(size)]
        assert [h for (a, b), _ in shares for h in range(a, b)] == list(range(H))
        for (a, b), (k0, k1) in shares:
            assert (b - a) % (k1 - k0) == 0 and b > a
            assert [k0 + i // ((b - a) // (k1 - k0)) for i in range(b - a)] == [h // R for h in range(a, b)]


def test_parts_make_up_the_whole():
    """Catches: rows of the MLP or of the vocabulary that no rank has, a group of 4-bit weights cut in two."""
    for inner, size in ((512, 3), (96, 3), (67, 5), (128, 2)):
        config = tiny_config(intermediate_size=inner)
        ranks = [named_parts(config, Rank(index, size)) for index in range(size)]
        for name, n in (("transformer.h.1.mlp.proj", inner), ("transformer.h.0.mlp.fc_1", inner), ("lm_head", 97)):
            ends = [part[name].ranges[0] for part in ranks]
            assert [place for end in ends for place in range(*end)] == list(range(n))
            assert "mlp" not in name or inner != 512 or all(start % 128 == 0 for start, _ in ends)


def test_what_cannot_be_split_is_refused(tiny_model, tiny_checkpoint, tmp_path):
    """Catches: a rank without heads, a LoRA that is dropped without a word, a layer whose bytes are no rows."""
    with pytest.raises(ValueError, match="6 query heads and there are 7 processes to hold them: use at most 6"):
        split_model(tiny_model(), Rank(0, 7))
    with pytest.raises(ValueError, match="6 query heads and there are 9"):
        load_model(tiny_checkpoint, rank=Rank(0, 9))
    model = tiny_model()
    add_lora(model, LoRAConfig(r=2))
    with pytest.raises(ValueError, match="has LoRA or an adapter in it, which is not split: merge it"):
        split_model(model, Rank(0, 2))
    model, config = load_model(tiny_checkpoint), AdapterConfig(start_layer=0)
    add_adapter(model, config)
    save_adapter(model, tmp_path, config, base_dir=tiny_checkpoint)
    with pytest.raises(ValueError, match="merge a LoRA with scripts/merge_lora.py, and use a LLaMA-Adapter on one"):
        load_model(tmp_path, rank=Rank(0, 2))
    model = tiny_model()
    model.transformer.h[0].mlp.proj = Blob(64, 48)
    with pytest.raises(ValueError, match="mlp.proj is a Blob, whose weight cannot be split: quantise with scripts/"):
        split_model(model, Rank(0, 2))


def test_a_part_is_no_model_of_its_own(tiny_model):
    """Catches: compiled code for one process that computes with a part, and adds up nothing."""
    cpu_decode.Description(tiny_model())
    with pytest.raises(cpu_decode.Unknown, match="a RowParallelLinear"):
        cpu_decode.Description(split_model(tiny_model(), Rank(0, 2)))


class Blob(torch.nn.Linear):
    """A layer that keeps its weight as a run of bytes, as bitsandbytes' of 4 bits."""

    def __init__(self, *features: int) -> None:
        super().__init__(*features, bias=False)
        self.weight = torch.nn.Parameter(self.weight.detach().view(-1, 1))


PARTS = [{}, {"tie_embeddings": True, "attn_bias": True, "attn_proj_bias": True}, *list(SHAPES.values())[-2:]]


@pytest.mark.parametrize("fields", PARTS)
def test_a_rank_loads_its_part_alone(tmp_path, fields):
    """Catches: a rank that holds the whole model, at the end or as what its parts are views of; another part than that
    of a model in memory."""
    model = build(fields)
    save_checkpoint(model, model.config, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    whole, tied = sum(p.numel() for p in model.parameters()), model.config.tie_embeddings
    for rank in (Rank(0, 2), Rank(1, 2), Rank(2, 3)):
        loaded = load_model(tmp_path, torch.bfloat16, rank=rank)
        expected = dict(split_model(build(fields), rank).named_parameters())
        assert tied or all(p.untyped_storage().nbytes() == p.nbytes for p in expected.values())
        assert loaded.lm_head.linear.weight.shape == expected["lm_head.linear.weight"].shape
        for name, p in loaded.named_parameters():
            assert torch.equal(p, expected[name].bfloat16()) and not p.requires_grad, name
        held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in loaded.parameters()}
        assert sum(held.values()) == 2 * sum(p.numel() for p in expected.values()) - 2 * shared(loaded) < 1.5 * whole


def shared(model: GPT) -> int:
    """Numbers of lm_head that are wte's."""
    head = model.lm_head.linear.weight
    return head.numel() if head.untyped_storage().data_ptr() == model.transformer.wte.weight.data_ptr() else 0


# ---------------------------------------------------------------------------------------------------------- the scripts

SCRIPT = "generate/tensor_parallel.py"


def finish(*processes, patience: float = 60) -> set[int]:
    for process in processes:
        process.join(patience)
        process.kill()
    return {process.exitcode for process in processes}


def test_the_script_prints_what_base_prints(tiny_checkpoint, run_script, tmp_path):
    """Catches: two processes that both print, another text, a standard input that only one of them has read."""
    arguments = ["--checkpoint_dir", tiny_checkpoint, "--device", "cpu", "--max_new_tokens", 30, "--prompt", "the fox"]
    _, expected, _ = run_script("generate/base.py", *arguments)
    assert finish(start_script(SCRIPT, *arguments, "--devices", 2, log=tmp_path / "log")) == {0}
    printed = (tmp_path / "log").read_text()
    assert expected in printed and printed.count("the fox") == 1 and printed.count("tok/s | first token") == 1


@pytest.mark.slow
def test_a_compiled_step_sums_too(tiny_checkpoint, run_script, tmp_path):
    """Catches: a sum that the compiler leaves out, or that breaks its graph; code for one process that takes a part of
    a layer for the whole."""
    arguments = ["--checkpoint_dir", tiny_checkpoint, "--device", "cpu", "--max_new_tokens", 30, "--prompt", "the fox"]
    _, expected, _ = run_script("generate/base.py", *arguments)
    process = start_script(SCRIPT, *arguments, "--devices", 2, "--compile", "true", log=tmp_path / "log")
    assert finish(process, patience=300) == {0}
    printed = (tmp_path / "log").read_text()
    assert expected in printed and printed.count("compiled in") == 1


def test_an_error_of_all_is_said_once(tiny_checkpoint, tmp_path):
    """Catches: a sentence from each process, one that waits for the others for ever. As torchrun starts them, and ends
    the rest when one has ended."""
    port, logs = free_port(), [tmp_path / "0", tmp_path / "1"]
    flags = ["--checkpoint_dir", tiny_checkpoint, "--device", "cpu", "--temperature", -1]
    processes = [start_script(SCRIPT, *flags, log=logs[r], **torchrun_environment(r, 2, port)) for r in range(2)]
    assert finish(processes[0]) == {2}
    processes[1].kill()
    assert logs[0].read_text().startswith("error: temperature=-1.0 does not fit") and logs[1].read_text() == ""


@pytest.mark.parametrize("what, code", [("killed", 2), ("interrupted", 130), ("starter killed", -9)])
def test_when_one_process_ends_all_end(tiny_checkpoint, tmp_path, what, code):
    """Catches: a rank that waits in a sum for one that was killed, one that lives on when the first was interrupted or
    whoever started it was killed."""
    log = tmp_path / "log"
    flags = ["--checkpoint_dir", tiny_checkpoint, "--device", "cpu", "--devices", 2, "--max_new_tokens", 10**6]
    flags += ["--model.attention", "streaming", "--model.sliding_window_size", 16, "--prompt", "the fox"]
    flags += ["--temperature", 0, "--repetition_penalty", 0.5]  # it repeats itself and never ends
    starter = start_script(SCRIPT, *flags, log=log)
    limit = time.monotonic() + 60
    while "the fox" not in (log.read_text() if log.exists() else "") and time.monotonic() < limit:
        time.sleep(0.02)
    children = Path(f"/proc/{starter.pid}/task/{starter.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(
        int(children[1]) if what == "killed" else starter.pid,
        getattr(signal, "SIGINT" if code == 130 else "SIGKILL"),
    )
    assert finish(starter) == {code}
    while code == -9 and any(map(lives, children)) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not any(map(lives, children))
    said = {"killed": "error: process 1 of 2 was ended by SIGKILL: was there too little memory?", "interrupted": what}
    assert log.read_text().count(said.get(what, "the fox")) == 1 and "Traceback" not in log.read_text()


def lives(process: str) -> bool:
    """False for one that has ended, though nobody has asked for its exit code yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ------------------------------------------------------------------------------------------- one device after the other


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)  # no GPU is touched to place blocks on it


@pytest.mark.parametrize(
    "devices, offload, name",
    [
        *(
            (devices, offload, "Gemma 2: norms behind, tied, capped")
            for devices, offload in ((1, 1), (1, 3), (2, 0), (2, 5))
        ),
        (2, 2, "streaming"),
        (2, 2, "linear"),
        (2, 3, "three groups, shared unevenly; dynamic RoPE"),
    ],
)
def test_blocks_on_devices_are_one_model(devices, offload, name):
    """Catches: a block that reads the weights of the one before it, a cache that two devices note twice or not at all,
    a plan of one kind of layer used for another, weights that stay in their place when another block's turn comes."""
    fields = {"linear": LINEAR, **SHAPES}[name] | {"n_layer": 5}
    logits, cached, tokens = read(build(fields))
    model = build(fields)
    placement = place_blocks(model, [CPU] * devices, offload)
    assert sum(placement.waits) == offload and placement.stages == sorted(placement.stages)
    spread(model, placement)
    ours, ours_cached, ours_tokens = read(model)
    assert torch.equal(ours, logits) and torch.equal(ours_cached, cached) and ours_tokens == tokens
    stages = {}
    for cache, stage in zip(model.caches, placement.stages, strict=True):
        (noted,) = cache.children()  # which positions it holds
        stages.setdefault(id(noted), set()).add(stage)
    assert all(len(used) == 1 for used in stages.values())  # each device notes for itself what its caches hold


@pytest.mark.parametrize("waiting", [5, 6])
def test_blocks_that_wait_share_two_places(monkeypatch, waiting):
    """Catches: weights that are held on the device all the time, the point of which was that they are not; a block that
    is brought when its turn has come, and not while another one computes."""
    model, late = build({"n_layer": 8}), []
    expected, one = model(IDS), sum(p.nbytes for p in model.transformer.h[0].parameters())
    before = Ferry.before

    def watched(self: Ferry, n: int, block: torch.nn.Module, args: tuple) -> None:
        late.append(self.inside[n % 2] != n)
        before(self, n, block, args)

    monkeypatch.setattr(Ferry, "before", watched)
    spread(model, place_blocks(model, [CPU], waiting))
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.transformer.h.parameters()}
    n = 8 - waiting + 2  # the blocks that stay, and two places
    assert n * one <= sum(storages.values()) <= 1.05 * n * one
    for _ in range(3):
        assert torch.equal(model(IDS), expected)
    assert late == [True, True] + [False] * (3 * waiting - 2)  # only where nothing was there before


def test_a_call_that_broke_off_leaves_no_wrong_weights(monkeypatch):
    """Catches: a place that is taken to hold the block that was on the way when a call was interrupted."""
    model = build({"n_layer": 5})
    expected = model(IDS)
    spread(model, place_blocks(model, [CPU], 5))
    for broken in range(5):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(model.transformer.h[broken].mlp, "forward", interrupt)
            model(IDS)
        assert torch.equal(model(IDS), expected)


def interrupt(x: torch.Tensor) -> None:
    raise KeyboardInterrupt


def test_what_fits_stays(monkeypatch):
    """Catches: blocks that wait though there is room, or stay without any; shares that forget the embeddings."""
    config = tiny_config(n_layer=10, n_embd=64, padded_vocab_size=4000, vocab_size=4000, n_head=8)
    model = empty_model(config)
    block = sum(p.nbytes for p in model.transformer.h[0].parameters())
    outside = sum(p.nbytes for p in model.parameters()) - 10 * block + model.rope.turns.nbytes
    assert 10 < outside / block < 30
    two = place_blocks(model, [GPU, CPU], 0)
    assert two.stages == [0] + [1] * 9 and "blocks 0 on cuda:0, 1-9 on cpu; embeddings" in str(two)
    beside = sequential.needed_beside(model, 10, 100)
    for room, waiting in ((10, 0), (9.5, 3), (4, 8), (2, 10)):
        free = int(outside + beside + room * block)
        monkeypatch.setattr(sequential, "free_memory", lambda device, free=free: free)
        assert sum(place_blocks(model, [GPU], None, 100).waits) == waiting
        assert sum(place_blocks(model, [CPU], None, 100).waits) == 0  # where they are already
    gaps = [i for i, waits in enumerate(place_blocks(model, [CPU], 5).waits) if waits]
    assert gaps == [1, 3, 5, 7, 9]
    monkeypatch.setattr(sequential, "free_memory", lambda device: int(outside + beside + 1.5 * block))
    with pytest.raises(ValueError, match="cuda:0 has no room for two blocks of .* each"):
        place_blocks(model, [GPU], None, 100)
    with pytest.raises(ValueError, match="10 blocks and there are 11 devices: use at most 10"):
        place_blocks(model, [CPU] * 11)
    with pytest.raises(ValueError, match="offload=11 does not fit: the model has 10 blocks"):
        place_blocks(model, [CPU], 11)


def test_sequential_prints_what_base_prints(tiny_checkpoint, run_script):
    """Catches: other text, placement on stdout, an option that is dropped without a word."""
    arguments = ["--checkpoint_dir", tiny_checkpoint, "--device", "cpu", "--max_new_tokens", 30, "--prompt", "the fox"]
    _, expected, _ = run_script("generate/base.py", *arguments)
    code, out, err = run_script("generate/sequential.py", *arguments, "--devices", 2, "--offload", 1)
    assert (code, out) == (0, expected)
    assert err.startswith("blocks 0 on cpu, 1 on cpu (1 from the CPU's memory); embeddings")
    code, _, err = run_script("generate/sequential.py", *arguments, "--devices", 3)
    assert code == 2 and err == "error: The model has 2 blocks and there are 3 devices: use at most 2.\n"
    code, _, err = run_script("generate/sequential.py", *arguments, "--compile", "true")
    assert code == 2 and "leave --compile out" in err
    code, _, err = run_script("generate/sequential.py", *arguments, "--quantize", "nf4")
    assert code == 2 and err == "error: --quantize nf4 is for one device: use int8 or int4.\n"


def test_the_benchmark_measures_one_and_all(run_script, tmp_path):
    """Catches: a benchmark that ends in a traceback, on the machine that was waited for."""
    arguments = ["--name", "pythia-14m", "--device", "cpu", "--devices", 1, "--compile", "false", "--steps", 2]
    arguments += ["--modes", "[float32,int8]", "--positions", "[4]", "--output", tmp_path / "out.json"]
    code, out, _ = run_script("scripts/benchmark_parallel.py", *arguments)
    assert code == 0 and out.count("tok/s") == 4
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == ["float32", "int8"]
    assert all(row["one"]["tokens_per_second"] > 0 and row["split"]["weight_GB"] > 0 for row in rows)
    assert rows[1]["one"]["weight_GB"] < 0.3 * rows[0]["one"]["weight_GB"]
    code, _, err = run_script("scripts/benchmark_parallel.py", "--modes", "[int7]")
    assert code == 2 and err.startswith("error: There is no mode 'int7': choose from")
