"""Experts of a mixture in 8 or 4 bits: the tensors of weight_only.py's layers, those of all experts in one.

A token reads the weights of the experts that were chosen for it, as they are stored. On their own, experts are the
layers of weight_only.py; gathered, their weights become dense for the product. Notation: E experts, N tokens, k of them
for a token.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_swa.moe import Experts
from lit_swa.weight_only import Int4Linear, Int8Linear, WeightOnlyLinear


class StoredExperts(WeightOnlyLinear):
    """What Int8Experts and Int4Experts add to a format of linear layers."""

    of_one: type[WeightOnlyLinear]  # what an expert is on its own

    def __init__(self, in_features: int, out_features: int, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """weight, scale, bias: an expert's tensors, stacked."""
        WeightOnlyLinear.__init__(self, in_features, out_features, weight, scale, bias)
        self._linears: dict[int, WeightOnlyLinear] = {}  # the experts that were asked for, on the memory of _cut ...
        self._cut: tuple[Tensor | None, ...] = ()  # ... which are the buffers, unless one has been replaced since

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """One expert's output for tokens (n, in): (n, out)."""
        if not torch.compiler.is_compiling():
            return self.linear(expert)(x)
        weight, bias = self.dequantize(*(t[expert] for t in self.stored()), x.dtype), self.bias
        return F.linear(x, weight, None if bias is None else bias[expert].to(x.dtype))

    def linear(self, expert: int) -> WeightOnlyLinear:
        """One expert as a linear layer, on the same memory."""
        held = (*self.stored(), self.bias)
        if not self._cut or any(one is not other for one, other in zip(held, self._cut, strict=True)):
            self._linears, self._cut = {}, held
        if expert not in self._linears:
            tensors = (None if t is None else t[expert] for t in held)
            linear = self.of_one.__new__(self.of_one)
            WeightOnlyLinear.__init__(linear, self.in_features, self.out_features, *tensors)
            self._linears[expert] = linear
        self._linears[expert].compute_dtype = self.compute_dtype
        return self._linears[expert]

    def gathered(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Outputs (N, k, out) of the chosen experts (N, k) for their inputs (N, k, in)."""
        given, x = x.dtype, x.to(self.compute_dtype or x.dtype)
        weight = self.dequantize(*(t[chosen] for t in self.stored()), x.dtype)  # (N, k, out, in)
        y = (weight @ x.unsqueeze(-1)).squeeze(-1)
        return (y if self.bias is None else y + self.bias[chosen].to(y.dtype)).to(given)


class Int8Experts(StoredExperts, Int8Linear):
    """weight (E, out, in) int8, scale (E, out) float32, bias (E, out) or None."""

    of_one = Int8Linear


class Int4Experts(StoredExperts, Int4Linear):
    """weight (E, out, in / 8) int32, scales (E, out, in / group, 2) bfloat16, bias (E, out) or None."""

    of_one = Int4Linear


STACKS: dict[type[WeightOnlyLinear], type[StoredExperts]] = {Int8Linear: Int8Experts, Int4Linear: Int4Experts}


def stack_linears(linears: Sequence[WeightOnlyLinear]) -> StoredExperts:
    """Experts of layers of one shape and format, which are copied."""
    tensors = [torch.stack(same) for same in zip(*(linear.stored() for linear in linears), strict=True)]
    bias = None if linears[0].bias is None else torch.stack([linear.bias for linear in linears])
    return _stack(linears[0], *tensors, bias)


def empty_stack(linear: WeightOnlyLinear, n_expert: int) -> StoredExperts:
    """Experts like a layer on the meta device, without numbers."""
    tensors = (*linear.stored(), linear.bias)
    return _stack(linear, *(None if t is None else t.new_empty(n_expert, *t.shape) for t in tensors))


def _stack(linear: WeightOnlyLinear, weight: Tensor, scale: Tensor, bias: Tensor | None) -> StoredExperts:
    experts = STACKS[type(linear)](linear.in_features, linear.out_features, weight, scale, bias)
    experts.compute_dtype = linear.compute_dtype
    return experts.train(linear.training)


def each_expert(experts: Experts, quantize: Callable[[nn.Linear], WeightOnlyLinear]) -> StoredExperts:
    """The experts, each quantised on its own: one at a time is dense in float32."""
    return stack_linears([quantize(experts.linear(e)) for e in range(experts.weight.size(0))])
