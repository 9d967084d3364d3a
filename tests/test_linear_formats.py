"""Formats of linear layers: what a layer says of itself is enough for LoRA, adapters, merging and counting bytes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_swa import GPT
from lit_swa.adapter import AdapterConfig, add_adapter, fold_scale_and_bias
from lit_swa.linear_formats import (
    OneTokenLinear,
    PackedLinear,
    can_train_beside,
    dense_weight,
    group_rows,
    inject,
    is_injected,
    is_linear,
    is_plain,
    remove_injected,
    weight_bytes,
)
from lit_swa.lora import LoRAConfig, add_lora, lora_linears, merge_lora


class Int8Linear(nn.Module):
    """A format that the project does not know: int8 rows with a scale each, under names of its own."""

    differentiable = True

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scale = linear.weight.detach().abs().amax(dim=1) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (linear.weight.detach() / scale[:, None]).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense_weight().to(x.dtype), self.bias)

    def dense_weight(self) -> Tensor:
        return self.codes.float() * self.scale[:, None]

    def weight_bytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


@pytest.fixture
def int8_model(tiny_model) -> GPT:
    """A model whose blocks hold Int8Linear."""
    model = tiny_model(attn_bias=True)
    for name, module in list(model.transformer.h.named_modules()):
        if isinstance(module, nn.Linear):
            model.transformer.h.set_submodule(name, Int8Linear(module))
    return model


def tokens() -> Tensor:
    return torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(7))


def shake(model: GPT) -> None:
    """Give what is trained other numbers, so that B is not zero."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))


def test_a_format_from_outside_answers_for_itself():
    """Catches: a question that is answered by a layer's type, or by the name of its weight."""
    linear = nn.Linear(12, 5)
    layer = Int8Linear(linear)
    assert is_linear(layer) and can_train_beside(layer) and not is_plain(layer)
    assert (dense_weight(layer) - linear.weight).abs().max() <= layer.scale.max() / 2 * 1.001
    assert weight_bytes(layer) == 12 * 5 + 4 * 5 and weight_bytes(linear) == 4 * 12 * 5
    assert not is_linear(nn.Embedding(3, 4)) and not can_train_beside(nn.LayerNorm(3))


@pytest.mark.parametrize("dora", [False, True])
def test_lora_stands_beside_a_format_from_outside_and_merges_to_a_dense_layer(int8_model, dora):
    """Catches: arithmetic with a layer's codes instead of its numbers, gradients that stop, a merge that fails."""
    model, idx = int8_model, tokens()
    before = model(idx)
    add_lora(model, LoRAConfig(targets=("q", "v", "mlp"), dora=dora))
    shake(model)
    expected = model(idx)
    assert (expected - before).abs().max() > 0.02 * before.abs().max()
    expected.logsumexp(-1).mean().backward()
    assert all(part.B.grad.any() for _, linear in lora_linears(model) for part in linear.lora.parts.values())
    assert merge_lora(model) == 2 * 4
    assert is_plain(model.transformer.h[0].attn.qkv) and isinstance(model.transformer.h[0].attn.proj, Int8Linear)
    torch.testing.assert_close(model(idx), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_nothing_is_folded_into_a_format_from_outside(int8_model):
    """Catches: scales that are folded into codes; version 2 that passes such layers over."""
    changed = add_adapter(int8_model, AdapterConfig(2, 4, 0))
    assert sum(isinstance(int8_model.get_submodule(name), Int8Linear) for name in changed) == 2 * 5
    shake(int8_model)
    before = int8_model(tokens())
    with pytest.raises(ValueError, match="is quantised, and a scale cannot be folded"):
        fold_scale_and_bias(int8_model)
    assert torch.equal(int8_model(tokens()), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer_type", [PackedLinear, OneTokenLinear])
def test_formats_for_inference_know_their_weight(layer_type, dtype):
    """Catches: a packed layout handed out as the weight, training beside a layer that passes no gradients on."""
    linear = nn.Linear(48, 80).to(dtype)
    layer = layer_type(linear)
    assert is_linear(layer) and not is_plain(layer) and not can_train_beside(layer)
    assert torch.equal(dense_weight(layer), linear.weight.float())
    assert weight_bytes(layer) == linear.weight.nbytes


def test_a_plain_layer_hands_out_its_own_weight_and_an_unknown_one_nothing():
    """Catches: a copy of a dense weight at each step of DoRA; codes read as numbers."""
    linear = nn.Linear(5, 3, dtype=torch.bfloat16)
    assert dense_weight(linear) is linear.weight
    linear.weight = nn.Parameter(torch.zeros(3, 5, dtype=torch.int16), requires_grad=False)
    with pytest.raises(ValueError, match="A Linear keeps its weight as torch.int16"):
        dense_weight(linear)


@pytest.mark.parametrize("n_head, n_query_groups", [(6, 2), (4, 4), (3, 1)])
def test_groups_of_rows_are_those_of_the_heads(n_head, n_query_groups):
    """Catches: keys read as values; head counts of the config instead of those that a layer holds."""
    rows = 8 * (n_head + 2 * n_query_groups)
    (a, b), (c, d), (e, f) = (group_rows(group, rows, n_head, n_query_groups) for group in "qkv")
    assert (a, b - a, c, d - c, e, f) == (0, 8 * n_head, b, 8 * n_query_groups, d, rows)
    assert f - e == d - c and group_rows("all", rows, n_head, n_query_groups) == (0, rows)


def test_what_is_put_beside_a_weight_is_seen_and_can_be_taken_away():
    """Catches: a hook that stays behind and computes with a child that is gone."""
    linear, child, x = nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(2, 4)
    before = linear(x)

    def add_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + module.lora(inputs[0])

    inject(linear, "lora", child, add_output)
    assert is_injected(linear) and torch.equal(linear(x), before + child(x))
    remove_injected(linear, "lora", add_output)
    assert not is_injected(linear) and torch.equal(linear(x), before)
