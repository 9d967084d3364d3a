"""The step of cpu_step.cpp gives the plain model's logits, for whatever a model is made of, and says when it cannot."""

import copy
import ctypes

import pytest
import torch
from test_compile import FIELDS
from tiny import randomize, tiny_config
from torch import nn

from lit_swa import GPT, cpu_decode
from lit_swa.cpu_decode import Unknown, build_step, compile_for_cpu
from lit_swa.generate import generate
from lit_swa.linear_formats import dense_weight
from lit_swa.lora import LoRAConfig, add_lora
from lit_swa.weight_only import Int4Linear, Int8Linear, round_groups

pytestmark = pytest.mark.usefixtures("dilated_row")
BLOCKS = {  # what a block can be made of, in as few models as it takes
    "gemma": {
        "norm_unit_offset": True, "norm_qk": True, "post_attention_norm": True, "post_mlp_norm": True,
        "activation": "gelu_tanh", "scale_embeddings": True, "final_logit_softcapping": 3.0, "head_size": 20,
        "attention": "sliding,full", "sliding_window_size": 8, "rope_local_base_freq": 100.0,
    },
    "neox": {
        "norm_class_name": "LayerNorm", "parallel_residual": True, "mlp_class_name": "PlainMLP", "activation": "gelu",
        "attn_bias": True, "attn_proj_bias": True, "mlp_bias": True, "rotary_percentage": 0.5,
    },
    "relu": {"activation": "relu", "n_query_groups": 1, "tie_embeddings": True, "attention_scores_scalar": 3},
    "command r": {
        "norm_class_name": "LayerNorm", "norm_bias": False, "parallel_residual": True, "shared_norm": True,
        "logit_multiplier": 0.25, "lm_head_bias": True, "positions": "rope,none",
    },
    "granite": {
        "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logit_multiplier": 2.0, "positions": "rope,500",
        "final_logit_softcapping": 3.0, "temperature_slope": 0.3, "temperature_length": 4,
    },
    "exaone": {"pre_norm": False, "post_attention_norm": True, "post_mlp_norm": True, "norm_qk": True},
    "olmo": {"norm_class_name": "LayerNorm", "norm_weight": False, "norm_bias": False},
    "longrope": {
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0,
                         "original_max_position_embeddings": 16},
    },
}  # fmt: skip


def run_and_compare(model: GPT, step, expected: torch.Tensor, idx: torch.Tensor, ragged: bool) -> None:
    """Feed idx (B, T) token by token and compare the logits; ragged: each row at positions of its own."""
    B, T = idx.shape
    rows, delay = torch.arange(B), torch.arange(B) * 3 * ragged
    for t in range(T):
        pos = t - delay  # negative, which is padding, while a row has not begun
        tokens = idx[rows, pos.clamp(min=0)][:, None]
        logits = step(tokens, pos[:, None] if ragged else torch.tensor([t]))[:, 0]
        begun = pos >= 0
        # float32 throughout: only the order of sums differs
        torch.testing.assert_close(logits[begun], expected[rows, pos.clamp(min=0)][begun], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch, ragged", [(1, False), (4, True)])
@pytest.mark.parametrize("fields", [*FIELDS.values(), *BLOCKS.values()], ids=[*FIELDS, *BLOCKS])
@torch.inference_mode()
def test_a_step_gives_the_plain_models_logits(tiny_model, fields, batch, ragged):
    """Catches: a mask, angle or slot of another row or part; a norm, bias or activation that is left out."""
    model, T = tiny_model(**fields), 30
    idx = torch.randint(0, 97, (batch, T))
    expected = model(idx)
    if model.rope.depends_on_length():  # read whole, the angles would be those of the longest text
        model.set_kv_cache(batch, T)
        expected = torch.cat([model(idx[:, t : t + 1], torch.tensor([t])) for t in range(T)], dim=1)
    model.set_kv_cache(batch, T, lookahead=2)
    run_and_compare(model, build_step(model), expected, idx, ragged)


def quantized(model: GPT, kind: str) -> GPT:
    model = copy.deepcopy(model)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            four = kind == "int4" and name != "lm_head"
            new = Int4Linear.from_codes(*round_groups(linear.weight, 32), linear.bias) if four else None
            model.set_submodule(name, new or Int8Linear.from_weight(linear.weight, linear.bias))
    return model


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
@torch.inference_mode()
def test_every_format_of_weights_is_read_as_it_says(kind, batch):
    """Catches: a scale of another row or group, nibbles in another order, a tail of a vector that is left out."""
    model = GPT(tiny_config(n_embd=96, n_head=6, intermediate_size=160, attn_bias=True)).eval()
    randomize(model)
    dense = copy.deepcopy(model.bfloat16()).float()
    model = model if kind == "bfloat16" else quantized(dense, kind)
    for name, linear in dense.named_modules():
        if isinstance(linear, nn.Linear):
            linear.weight.copy_(dense_weight(model.get_submodule(name)))
    idx = torch.randint(0, 97, (batch, 12))
    model.set_kv_cache(batch, 12, dtype=torch.float32)
    run_and_compare(model, build_step(model), dense(idx), idx, ragged=False)


@torch.inference_mode()
def test_a_step_in_bfloat16_is_nearer_to_float32_than_the_plain_one(tiny_model):
    """Catches: a cache in bfloat16 that is written or read wrongly; activations that are rounded on the way."""
    model = tiny_model(**FIELDS["rolling"]).bfloat16()
    exact, idx = copy.deepcopy(model).float(), torch.randint(0, 97, (1, 30))
    expected, errors = exact(idx), []
    for step in (model, build_step(model)):
        model.set_kv_cache(1, 30)
        logits = torch.cat([step(idx[:, t : t + 1], torch.tensor([t])).float() for t in range(30)], dim=1)
        errors.append((logits - expected).abs().mean())
    assert errors[1] < 0.5 * errors[0] < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("fields", [FIELDS["dense"], FIELDS["rolling"], FIELDS["streaming"], FIELDS["dual chunk"]])
@torch.inference_mode()
def test_a_call_of_several_tokens_is_a_step_too(tiny_model, fields):
    """Catches: tokens of a call that share a mask, a position or a slot."""
    model, idx, k = tiny_model(**fields), torch.randint(0, 97, (2, 30)), 3
    expected = model(idx)
    model.set_kv_cache(2, 30, lookahead=k)
    step = build_step(model, tokens=k)
    for t in range(0, 30, k):
        logits = step(idx[:, t : t + k], torch.arange(t, t + k))
        torch.testing.assert_close(logits, expected[:, t : t + k], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_padding_writes_no_key(tiny_model):
    """Catches: a row of padding that writes before its own slots, over what another row holds."""
    model = tiny_model()
    model.set_kv_cache(3, 8)
    step = build_step(model)
    step(torch.tensor([[1], [2], [3]]), torch.tensor([[0], [-1], [0]]))
    for cache in model.caches:
        for held in (cache.k, cache.v):  # (B, G, slots, D)
            written = held.any(dim=-1).any(dim=1)
            assert written.tolist() == [[True] + [False] * 7, [False] * 8, [True] + [False] * 7]


@torch.inference_mode()
def test_threads_do_not_change_the_result(tiny_model):
    """Catches: a stage that begins before the last chunk of the one before is done."""
    model = tiny_model(n_embd=256, n_head=8, intermediate_size=1024, n_layer=4)
    model.set_kv_cache(1, 256)
    step, idx, results = build_step(model), torch.randint(0, 97, (1, 200)), []
    before = torch.get_num_threads()
    for threads in (1, 4):
        model.reset_kv_cache()
        torch.set_num_threads(threads)
        results.append([step(idx[:, t : t + 1], torch.tensor([t])) for t in range(200)])
    torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


def test_a_text_that_outgrows_its_caches_goes_on(tiny_model):
    """Catches: addresses of caches that were replaced by larger ones."""
    model = tiny_model(**FIELDS["mixed"])
    expected = list(generate(model, [1, 2, 3], max_new_tokens=150))
    assert list(generate(model, [1, 2, 3], max_new_tokens=150, decode=compile_for_cpu(model))) == expected


def test_without_a_compiler_the_step_is_the_models(tiny_model, monkeypatch, capsys):
    """Catches: --compile that ends in an error on a laptop without a compiler."""
    monkeypatch.setattr(cpu_decode.shutil, "which", lambda name: None)
    cpu_decode.load_library.cache_clear()
    model = tiny_model()
    expected = list(generate(model, [1, 2, 3], max_new_tokens=8))
    assert list(generate(model, [1, 2, 3], max_new_tokens=8, decode=compile_for_cpu(model))) == expected
    assert capsys.readouterr().err == ("decoding is not compiled: there is no C++ compiler; install g++ or clang++\n")


def test_a_compiler_that_fails_is_quoted(tiny_model, monkeypatch, tmp_path, capsys):
    """Catches: an error of the compiler that is swallowed, or a broken library that is loaded."""
    source = tmp_path / "cpu_step.cpp"
    source.write_text("int broken(")
    monkeypatch.setattr(cpu_decode, "SOURCE", source)
    cpu_decode.load_library.cache_clear()
    compile_for_cpu(tiny_model())
    assert "does not compile cpu_step.cpp" in capsys.readouterr().err


def test_a_broken_or_unwritable_cache_is_no_error(monkeypatch, tmp_path):
    """Catches: half a library of a full disk that is loaded for ever, a home directory that must be writable."""
    cpu_decode.load_library()  # what compiles it is not loaded from where it is kept, but the next one is
    cpu_decode.load_library.cache_clear()
    good = cpu_decode.load_library()._name
    monkeypatch.setattr(cpu_decode, "compile_source", lambda _, made: made.write_bytes(open(good, "rb").read()))
    monkeypatch.setenv("LIT_SWA_CACHE", str(tmp_path))
    cpu_decode.load_library.cache_clear()
    cpu_decode.load_library()
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    for half in (b"half of it", whole[: len(whole) // 3]):  # of the latter, the system would load what is there
        kept.unlink()  # the file that was there is mapped
        kept.write_bytes(half)
        cpu_decode.load_library.cache_clear()
        assert isinstance(cpu_decode.load_library(), ctypes.CDLL)
        assert kept.read_bytes() == whole
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIT_SWA_CACHE", str(tmp_path / "file"))
    cpu_decode.load_library.cache_clear()
    assert isinstance(cpu_decode.load_library(), ctypes.CDLL)


def test_a_model_that_is_not_known_is_compiled_block_by_block(tiny_model, monkeypatch):
    """Catches: a LoRA or a mixer that the step leaves out in silence."""
    compiled = []
    monkeypatch.setattr(cpu_decode, "compile_blocks", compiled.append)
    model = tiny_model()
    add_lora(model, LoRAConfig(r=2))
    with pytest.raises(Unknown, match="what was put into it"):
        build_step(model)
    assert compile_for_cpu(model).most_tokens == 1 and compiled == [model]
    model = tiny_model().half()
    with pytest.raises(Unknown, match="float16"):
        build_step(model)
