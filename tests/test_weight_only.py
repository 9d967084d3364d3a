"""int8 and int4 layers: what is stored, what it stands for, and what is computed with it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_swa.linear_formats import can_train_beside, dense_weight, is_linear, is_plain, weight_bytes
from lit_swa.quantize import Int4Linear, Int8Linear
from lit_swa.weight_only import WeightOnlyLinear, pack_codes, round_groups, unpack_codes

SHAPE = 48, 256  # out, in


def uneven_weight(rows: int = SHAPE[0], columns: int = SHAPE[1]) -> Tensor:
    """Rows of very different sizes, one of zeros, one of equal numbers: another row's scale is far off."""
    weight = torch.randn(rows, columns) * torch.logspace(-3, 2, rows)[:, None]
    weight[7], weight[9] = 0, 0.3
    return weight


def make_linear(kind: str, bias: bool = False, weight: Tensor | None = None) -> tuple[Tensor, WeightOnlyLinear]:
    """A weight, and the layer that holds it in int8, or in groups of 32, 64 or 128."""
    weight = uneven_weight() if weight is None else weight
    offset = torch.randn(len(weight)) if bias else None
    if kind == "int8":
        return weight, Int8Linear.from_weight(weight, offset)
    return weight, Int4Linear.from_codes(*round_groups(weight, int(kind)), offset)


def written_out(linear: WeightOnlyLinear) -> Tensor:
    """W by the formulas in the classes' docstrings, number by number."""
    W = torch.empty(linear.out_features, linear.in_features)
    for n in range(linear.out_features):
        for k in range(linear.in_features):
            if isinstance(linear, Int8Linear):
                W[n, k] = linear.weight[n, k] * linear.scale[n]
                continue
            run, j, i = k // 32, k % 32 // 4, k % 4
            code = (int(linear.weight[n, 4 * run + i]) >> (4 * j)) & 15
            scale, offset = linear.scales[n, k // linear.group_size].float()
            W[n, k] = (code - 8) * scale + offset
    return W


@pytest.fixture(params=["int8", "32", "64", "128"])
def kind(request) -> str:
    return request.param


def test_the_buffers_stand_for_the_weight_as_documented(kind):
    """Catches: another order of the nibbles, words or groups, a scale of another row, codes chosen for scales that are
    rounded afterwards."""
    weight, linear = make_linear(kind)
    W = written_out(linear)
    torch.testing.assert_close(dense_weight(linear), W, rtol=1e-6, atol=0)
    if kind == "int8":
        step = weight.abs().amax(dim=1, keepdim=True) / 127
    else:
        step = linear.scales[..., 0].float().repeat_interleave(linear.group_size, dim=1)
        # in bfloat16 the scale and the offset move the group's ends, by up to 2^-9 of 8 steps and of the offset
        step = (
            step * (1 + 8 * 2**-7)
            + linear.scales[..., 1].float().abs().repeat_interleave(linear.group_size, dim=1) * 2**-7
        )
    error = (W - weight).abs()
    assert (error <= step / 2 * 1.001).all() and error.max() > 0
    assert (W[7] == 0).all() and (W[9] - 0.3).abs().max() <= 0.3 * 2**-8
    names = {"weight", "scale" if kind == "int8" else "scales"}
    assert set(linear.state_dict()) == names and not list(linear.parameters())
    bits = 8 if kind == "int8" else 4
    per_scale = weight.shape[1] if kind == "int8" else int(kind)
    assert weight_bytes(linear) == weight.numel() * bits // 8 + 4 * weight.numel() // per_scale
    assert is_linear(linear) and can_train_beside(linear) and not is_plain(linear)


def test_packing_loses_nothing():
    """Catches: a nibble whose highest bit is the word's sign."""
    codes = torch.randint(0, 16, (5, 96))
    assert torch.equal(unpack_codes(pack_codes(codes)), codes.int())


@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_those_of_the_dense_weight(kind, bias):
    """Catches: a bias left out, gradients that stop or go through another weight, shapes that are not restored."""
    _, linear = make_linear(kind, bias)
    W = written_out(linear)
    for shape in ((linear.in_features,), (1, 1, linear.in_features), (2, 9, linear.in_features)):
        x = torch.randn(shape, requires_grad=True)
        y, expected = linear(x), F.linear(x, W, linear.bias)
        with torch.no_grad():
            alone = linear(x)
        grad = torch.randn_like(y)
        ours, theirs = (torch.autograd.grad(result, x, grad)[0] for result in (y, expected))
        for got, want in ((y, expected), (alone, expected), (ours, theirs)):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * want.abs().max().item())


@pytest.mark.parametrize("rows", [1, 3, 16, 17])
@pytest.mark.parametrize("shape", [(48, 256), (40, 96), (5, 44)])
def test_single_tokens_on_a_cpu_are_products_with_the_same_weight(kind, rows, shape):
    """Catches: a packed product that reads beyond a row's end (torch 2.13 does in rows of 44), scales in another order,
    a packed copy that outlives the numbers it was made of."""
    if kind != "int8" and shape[1] % int(kind):
        pytest.skip("groups of this size do not divide such rows")
    weight, x = torch.randn(shape), torch.randn(2, rows, shape[1], dtype=torch.bfloat16)[:1]
    linear = (
        Int8Linear.from_weight(weight) if kind == "int8" else Int4Linear.from_codes(*round_groups(weight, int(kind)))
    )
    for _ in range(2):
        with torch.no_grad():
            y, expected = linear(x), F.linear(x.float(), dense_weight(linear))
        assert y.dtype == torch.bfloat16 and y.shape == (1, rows, shape[0])
        # bfloat16 scales and results: each is off by 2^-9 of itself at most
        torch.testing.assert_close(y.float(), expected, rtol=2**-7, atol=2**-7 * expected.abs().max().item())
        linear.get_buffer(linear.scale_name).mul_(3)
        linear.to("cpu")  # what is packed is made anew after a move


def test_a_product_begins_anywhere_in_memory(kind):
    """Catches: a process that ends since a weight that is mapped from a file, or an input, begins at no cache line."""
    weight, linear = make_linear(kind)
    moved = torch.empty(linear.weight.nbytes + 72, dtype=torch.uint8)[8 : 8 + linear.weight.nbytes]
    linear.weight = moved.view(linear.weight.dtype).view(linear.weight.shape).copy_(linear.weight)
    x = torch.randn(4 * SHAPE[1] + 8, dtype=torch.bfloat16)[8:].view(4, -1)
    assert linear.weight.data_ptr() % 16 == 8 and x.data_ptr() % 32 == 16
    with torch.no_grad():
        y = linear(x).float()
    expected = x.float() @ dense_weight(linear).T
    assert (y - expected).norm() < 1e-2 * expected.norm()  # bfloat16, of the scales too


def test_casts_and_copies_keep_the_scales(kind):
    """Catches: model.to(bfloat16) that rounds the scales which the codes were chosen for, copies that share them."""
    _, linear = make_linear(kind, bias=True)
    before, twin = dense_weight(linear), copy.deepcopy(linear).to(torch.bfloat16).float().bfloat16()
    assert torch.equal(dense_weight(twin), before) and twin.bias.dtype == torch.bfloat16
    twin.weight.zero_()
    assert torch.equal(dense_weight(linear), before)


def test_int8_has_the_numbers_of_bitsandbytes():
    """Catches: another rounding, or 128 instead of 127 steps."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = uneven_weight().to(torch.float16)  # which bitsandbytes quantises
    codes, scale, _ = bitsandbytes.functional.int8_vectorwise_quant(weight)
    ours = Int8Linear.from_weight(weight.float())
    assert torch.equal(ours.weight, codes)
    torch.testing.assert_close(ours.scale, scale / 127, rtol=1e-6, atol=0)


def test_groups_that_do_not_fit_are_refused():
    """Catches: a last group that is cut off, a remedy that does not work."""
    with pytest.raises(ValueError, match="group_size 48 does not exist: choose one of 32, 64, 128"):
        Int4Linear(192, 8, 48)
    with pytest.raises(
        ValueError, match="has 192 inputs, which groups of 128 do not divide: use --group_size 32 or 64"
    ):
        Int4Linear(192, 8, 128)
    with pytest.raises(ValueError, match="use int8, which has no groups"):
        Int4Linear(44, 8, 32)
