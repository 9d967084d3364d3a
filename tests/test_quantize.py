"""Weights in 4 and 8 bits: how far they are from the originals, what is computed with them, and what is refused."""

import copy
import sys
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from lit_swa import GPT, nf4, quantize
from lit_swa.adapter import AdapterConfig, add_adapter, fold_scale_and_bias
from lit_swa.linear_formats import dense_weight, is_linear, is_plain, weight_bytes
from lit_swa.lora import LoRAConfig, add_lora
from lit_swa.quantize import WEIGHT_ONLY, quantize_linear, quantize_linears

SHAPE = {"n_embd": 64, "n_head": 4, "n_query_groups": 2, "intermediate_size": 128}
FLOAT = {"rtol": 1e-5, "atol": 1e-5}  # another order of the sums moves float32 by a few 1e-6


@pytest.fixture(params=["int8", "int4", *nf4.MODES])
def mode(request) -> str:
    if request.param in nf4.MODES:
        pytest.importorskip("bitsandbytes")
    return request.param


def uneven_linear(rows: int = 60, columns: int = 192, bias: bool = True) -> nn.Linear:
    """Rows of very different sizes, one of zeros: a scale applied to the wrong block or row is far off."""
    linear = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        linear.weight.normal_().mul_(torch.logspace(-3, 2, rows)[:, None])
        linear.weight[7] = 0
    return linear


def is_quantized(model: nn.Module) -> bool:
    return any(is_linear(m) and not is_plain(m) for m in model.modules())


def dense_twin(model: GPT) -> GPT:
    """The model with plain linear layers that hold the quantised ones' dense weights."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if is_linear(module):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = dense_weight(module)
            if module.bias is not None:
                linear.bias.data = module.bias.data.float()
            twin.set_submodule(name, linear)
    return twin.train(model.training).requires_grad_(False)


def error_bound(mode: str, weight: torch.Tensor, quantized: nn.Module) -> torch.Tensor:
    """How far a number of weight (out, in) may move: half the widest gap of the code, times the block's scale."""
    if mode == "int8":
        return weight.abs().amax(dim=1, keepdim=True).expand_as(weight) / 127 / 2
    if mode == "int4":  # the end of a group moves by the rounding of scale and offset to bfloat16
        scale, offset = quantized.scales.float().abs().unsqueeze(2).expand(-1, -1, 64, -1).flatten(1, 2).unbind(-1)
        return scale / 2 + 8 * scale * 2**-8 + offset * 2**-8
    state = quantized.weight.quant_state
    scale = weight.reshape(-1, 64).abs().amax(dim=1)  # of each block
    bound = state.code.sort().values.diff().max() / 2 * scale
    if mode.endswith("-dq"):  # the scale moves too: 8 bits for its distance from the mean, in blocks of 256
        offset = scale - scale.mean()
        largest = torch.cat([block.abs().max().expand_as(block) for block in offset.split(256)])
        bound = bound + state.state2.code.sort().values.diff().max() / 2 * largest
    return bound[:, None].expand(-1, 64).reshape(weight.shape)


# ----------------------------------------------------------------------------------------------------------- one layer


def test_a_weight_moves_by_half_a_gap_of_the_code_at_most(mode):
    """Catches: scales of other blocks or rows, transposed or repeated values, a mode that means another."""
    linear = uneven_linear()
    quantized = quantize_linear(linear, mode, torch.float32)
    weight, back = linear.weight.detach(), dense_weight(quantized)
    assert back.dtype == torch.float32 and back.shape == weight.shape
    bound = error_bound(mode, weight, quantized)
    assert ((back - weight).abs() <= bound * 1.001).all()
    assert (back - weight).abs().max() > 0.4 * bound[(back - weight).abs().argmax() // 192, 0]  # not just any bound
    if not mode.endswith("-dq"):
        assert (back[7] == 0).all()
    codes = {"nf4": 0.0796, "fp4": 0.0052}  # the least positive number of each
    if mode[:3] in codes:
        assert quantized.weight.quant_state.code[quantized.weight.quant_state.code > 0].min() == pytest.approx(
            codes[mode[:3]], abs=1e-4
        )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_backward_are_those_of_the_dequantised_weight(mode, training, bias):
    """Catches: activations rounded to 8 bits, another kernel for one token, no gradient or one by another weight."""
    linear = uneven_linear(bias=bias)
    quantized = quantize_linear(linear.train(training), mode, torch.float32)
    weight, before = dense_weight(quantized), copy.deepcopy(linear.bias)
    assert quantized.training == training
    for shape in ((192,), (1, 1, 192), (2, 9, 192)):
        x = torch.randn(shape, requires_grad=True)
        with torch.no_grad():  # as in an evaluation amid training
            alone = quantized(x)
        y, expected = quantized(x), F.linear(x, weight, linear.bias)
        scale = expected.abs().max().item()
        for result in (alone, y):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6 * scale)
        grad = torch.randn_like(y)
        ours, theirs = (torch.autograd.grad(result, x, grad)[0] for result in (y, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * theirs.abs().max().item())
    assert not any(p.requires_grad for p in quantized.parameters())
    assert before is None or torch.equal(before, linear.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_made_in_the_compute_dtype(mode, dtype):
    """Catches: a compute dtype that is accepted and ignored, an output that is not of the input's dtype."""
    linear = nn.Linear(192, 60, bias=False)
    quantized, x = quantize_linear(linear, mode, dtype), torch.randn(3, 192, requires_grad=True)
    y, expected = quantized(x), F.linear(x.to(dtype), dense_weight(quantized).to(dtype)).float()
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, dense_weight(quantized).sum(0).expand(3, -1), rtol=0.02, atol=0.02)


def test_bytes_are_those_of_the_format(mode):
    """Catches: a float copy of the weight kept with the small one."""
    quantized = quantize_linear(nn.Linear(512, 256), mode, torch.float32)
    n, blocks = 512 * 256, 512 * 256 // 64
    expected = {"nf4": n // 2 + 4 * blocks, "nf4-dq": n // 2 + blocks + 4 * (blocks // 256), "int8": n + 4 * 256}
    expected["int4"] = n // 2 + 4 * n // 128
    assert weight_bytes(quantized) == expected[mode.replace("fp4", "nf4")]
    assert weight_bytes(nn.Linear(512, 256, dtype=torch.bfloat16)) == 2 * n
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(quantized)}
    tables = 4 * (16 + 256 + 1)  # the codes of 4 and of 8 bits, and the mean of the scales
    assert sum(held.values()) <= expected[mode.replace("fp4", "nf4")] + 4 * 256 + tables


def tensors_of(thing: object, seen: set[int] | None = None) -> list[torch.Tensor]:
    """Every tensor that can be reached from an object's attributes."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, type):
        return []
    seen.add(id(thing))
    inside = list(vars(thing).values()) if hasattr(thing, "__dict__") else []
    inside += list(thing.values()) if isinstance(thing, dict) else []
    inside += list(thing) if isinstance(thing, (list, tuple)) else []
    found = [t for x in inside for t in tensors_of(x, seen)]
    return found + ([thing] if isinstance(thing, torch.Tensor) else [])


# ------------------------------------------------------------------------------------------------------------- a model


def test_a_quantised_model_computes_with_the_dequantised_weights(tiny_model, mode):
    """Catches: a layer left out, an embedding quantised, logits far from those of the original."""
    model, idx = tiny_model(**SHAPE, attn_bias=True, mlp_bias=True), torch.randint(0, 97, (2, 30))
    before, names = model(idx), [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    head = mode in WEIGHT_ONLY  # which QLoRA's formats leave dense
    assert not is_quantized(model)
    assert quantize_linears(model, mode, torch.float32) == 10 + head == len(names) - (not head)
    assert [name for name, m in model.named_modules() if is_linear(m)] == names
    assert all(not is_plain(model.get_submodule(name)) for name in names[:-1]) and is_plain(model.lm_head) != head
    assert type(model.transformer.wte) is nn.Embedding and model.transformer.wte.weight.is_floating_point()
    logits = model(idx)
    torch.testing.assert_close(logits, dense_twin(model)(idx), **FLOAT)
    error = ((logits - before).square().mean() / before.square().mean()).sqrt()
    # Weights at random lose far more than trained ones, whose errors average out: this tells the formats apart.
    most = {"int8": (0, 0.05), "int4": (0.1, 0.55), "nf4": (0.1, 0.55), "fp4": (0.1, 0.7)}
    least, most = most[mode.removesuffix("-dq")]
    assert least < error < most


@pytest.mark.parametrize("fields", [{}, {"attention": "sliding", "sliding_window_size": 5, "rolling_kv_cache": True}])
def test_any_split_into_cached_calls_gives_the_same_logits(tiny_model, mode, fields):
    """Catches: rounding of activations that depends on the tokens of a call, a decode kernel of less precision."""
    model, idx = tiny_model(**SHAPE, **fields), torch.randint(0, 97, (1, 20))
    quantize_linears(model, mode, torch.float32)
    with torch.no_grad():
        expected = model(idx)
        for sizes in ([1] * 20, [13, 1, 6]):
            model.set_kv_cache(1, 32)
            calls = zip(idx.split(sizes, dim=1), torch.arange(20).split(sizes), strict=True)
            torch.testing.assert_close(torch.cat([model(i, p) for i, p in calls], dim=1), expected, **FLOAT)


def test_a_copy_stands_for_itself(tiny_model, mode):
    """Catches: copies that share their scales or weights, or lose them, and moves between dtypes that lose them."""
    model, idx = tiny_model(**SHAPE), torch.randint(0, 97, (1, 9))
    quantize_linears(model, mode, torch.float32)
    twin, before = copy.deepcopy(model), model(idx)
    assert torch.equal(twin(idx), before)
    for block in twin.transformer.h:
        for tensor in tensors_of(block):
            tensor.data.zero_()
    assert torch.equal(model(idx), before)
    assert torch.equal(copy.deepcopy(model).to("cpu").float()(idx), before)


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_what_is_put_beside_the_weights_learns_as_beside_dense_ones(tiny_model, mode, kind):
    """Catches: gradients that stop at a quantised layer, after an evaluation too, or differ from the dense ones."""
    model, idx, grads = tiny_model(**SHAPE).train(), torch.randint(0, 97, (2, 12)), []
    quantize_linears(model, mode, torch.float32)
    for m in (model, dense_twin(model)):
        torch.manual_seed(3)
        changed = add_lora(m, LoRAConfig(r=2)) if kind == "lora" else add_adapter(m, AdapterConfig(2, 4, 0))
        assert changed
        with torch.no_grad():
            for p in m.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.1)
            m.eval()(idx)
        (m.train()(idx, targets=idx.roll(-1, 1)) / idx.numel()).backward()
        grads.append({name: p.grad for name, p in m.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert grad.any(), name
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-5)
    if kind == "adapter":
        with pytest.raises(ValueError, match="is quantised, and a scale cannot be folded"):
            fold_scale_and_bias(model)


def test_one_dense_layer_goes_before_the_next_is_quantised(tiny_model, monkeypatch):
    """Catches: dense weights held until all layers are done, the whole model twice in memory."""
    model, seen = tiny_model(**SHAPE), []

    def watched(linear, *arguments):
        assert all(weight() is None for weight in seen)
        seen.append(weakref.ref(linear.weight))
        return quantize_linear(linear, *arguments)

    monkeypatch.setattr(quantize, "quantize_linear", watched)
    assert quantize_linears(model, "int8", torch.float32) == len(seen) == 11


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_quantised_is_refused(tiny_model, monkeypatch):
    """Catches: a traceback in place of a reason, and a model that was changed half-way."""
    pytest.importorskip("bitsandbytes")
    model = tiny_model(**SHAPE)
    with pytest.raises(ValueError, match="called 'int3': choose from int8, int4, int4-hqq, nf4, nf4-dq, fp4, fp4-dq"):
        quantize_linears(model, "int3", torch.float32)
    with pytest.raises(ValueError, match="compute in torch.int32: choose from float32, bfloat16, float16"):
        quantize_linears(model, "nf4", torch.int32)
    with pytest.raises(ValueError, match="no numbers yet"):
        quantize_linear(nn.Linear(64, 64, device="meta"), "nf4", torch.float32)
    uneven = tiny_model(**SHAPE | {"intermediate_size": 96})
    with pytest.raises(ValueError, match="mlp.proj has 96 inputs, and nf4 on a CPU needs a multiple of 64: use int8"):
        quantize_linears(uneven, "nf4", torch.float32)
    with pytest.raises(ValueError, match="96 inputs, which groups of 64 do not divide: use --group_size 32"):
        quantize_linears(uneven, "int4", torch.float32, group_size=64)
    with pytest.raises(ValueError, match="int8 has no groups of a size to choose"):
        quantize_linears(uneven, "int8", torch.float32, group_size=64)
    broken = tiny_model(**SHAPE)
    broken.transformer.h[1].mlp.proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        quantize_linears(broken, "int8", torch.float32)
    assert not is_quantized(uneven) and quantize_linears(uneven, "int8", torch.float32) == 11
    with pytest.raises(ValueError, match="it may be quantised already"):
        quantize_linears(uneven, "nf4", torch.float32)
    with_lora = tiny_model(**SHAPE)
    add_lora(with_lora, LoRAConfig(targets=("o",)))
    with pytest.raises(ValueError, match="quantise before that"):
        quantize_linears(with_lora, "nf4", torch.float32)
    nf4.import_bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="not installed: pip install bitsandbytes"):
        quantize_linears(model, "nf4", torch.float32)
    assert not is_quantized(model) and not is_quantized(with_lora)
