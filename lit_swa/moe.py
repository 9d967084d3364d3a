"""A mixture of experts (Shazeer et al. 2017, arXiv 1701.06538) in the place of a block's MLP: mlp_class_name="MoE".

A router scores E experts for each token, and the k best of them compute: y = sum of w_e expert_e(x). Config says how
the weights w are made of the scores (expert_weights):

    chosen     softmax over the scores of the chosen: Mixtral, Qwen3, gpt-oss
    all        softmax over all scores: Qwen2
    sigmoid    of each score; it multiplies what the expert reads, not what it gives: Llama 4
    biased     sigmoid of each score over their sum; a bias decides who is chosen, and no more: AFMoE

Experts are rows of stacked weights, which expert_formats.py holds in fewer bits. On a GPU and in compiled code, few
tokens gather the weights that they need, in one fixed shape, so a decode step has no graph break and waits for nothing
(in a step of many tokens every expert reads all of them); else tokens are sorted by expert. In training a balancing
loss (Fedus et al. 2021, arXiv 2101.03961) keeps the router from sending all tokens to the same experts.
Notation: N tokens, C n_embd, I elements within an expert.
"""

import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

if __package__:
    from .config import Config
    from .model import ACTIVATIONS, GatedMLP
else:  # copied beside a script of another project
    from config import Config
    from model import ACTIVATIONS, GatedMLP

GATHERING = ("cuda",)  # devices that would wait for the host to know who is chosen; a CPU would only copy weights
GATHERED = 4  # gather the experts' weights for up to so many times E pairs of a token and an expert ...
MOST_GATHERED = 2**28  # ... and so many elements


class Experts(nn.Module):
    """E linear layers of one shape. While they are trained their weights may be wider than what they are given."""

    def __init__(self, n_expert: int, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(n_expert, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(n_expert, out_features)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As nn.Linear's."""
        bound = 1 / math.sqrt(self.weight.size(-1))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """One expert's output for tokens (n, in): (n, out)."""
        weight, bias = (None if w is None else w[expert].to(x.dtype) for w in (self.weight, self.bias))
        return F.linear(x, weight, bias)

    def linear(self, expert: int) -> nn.Linear:
        """One expert as a frozen linear layer, on the same memory."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight.detach()[expert], requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach()[expert], requires_grad=False)
        return linear.train(self.training)

    def gathered(self, x: Tensor, chosen: Tensor) -> Tensor:
        """Outputs (N, k, out) of the chosen experts (N, k) for their inputs (N, k, in)."""
        y = (self.weight[chosen].to(x.dtype) @ x.unsqueeze(-1)).squeeze(-1)
        return y if self.bias is None else y + self.bias[chosen].to(x.dtype)


class MoE(nn.Module):
    one_by_one = False  # True: never gather weights, so that every expert's own forward() is called

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.join = config, None  # join: what sums the outputs of several ranks; see parallel.py
        C, E, inner, bias = config.n_embd, config.n_expert, config.expert_size, config.mlp_bias
        self.router = nn.Linear(C, E, bias=bias)
        self.fc_1, self.fc_2 = (Experts(E, C, inner, bias) for _ in range(2))
        self.proj = Experts(E, inner, C, bias)
        self.choice = nn.Parameter(torch.zeros(E), requires_grad=False) if config.expert_weights == "biased" else None
        self.shared = GatedMLP(config, config.shared_expert_size) if config.shared_expert_size else None
        self.shared_gate = nn.Linear(C, 1, bias=False) if config.shared_expert_gate else None

    def reset_parameters(self) -> None:
        if self.choice is not None:
            nn.init.zeros_(self.choice)

    def forward(self, x: Tensor, losses: list, mix: Callable[..., Tensor] | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C). losses: in training the layers share a Balance among them. mix: what does the work of
        mix()."""
        tokens = x.flatten(0, -2)  # (N, C)
        scores = self.router(tokens)  # (N, E)
        ranked = scores if self.choice is None else torch.sigmoid(scores.float()) + self.choice
        chosen = ranked.topk(self.config.n_expert_per_token, dim=-1).indices  # (N, k)
        best = scores.gather(1, chosen)
        if self.training and self.config.balancing_loss:
            balance = next((one for one in losses if isinstance(one, Balance)), None)
            if balance is None:
                losses.append(balance := Balance(self.config.balancing_loss, len(tokens)))
            balance.layers.append(shares(scores, chosen))
        y = (mix or self.mix)(tokens, self.weights(scores, best, chosen).to(x.dtype), chosen)
        if self.shared is not None:
            beside = self.shared(tokens)
            y = y + (beside if self.shared_gate is None else torch.sigmoid(self.shared_gate(tokens)) * beside)
        return (y if self.join is None else self.join(y)).view(x.shape)

    def weights(self, scores: Tensor, best: Tensor, chosen: Tensor) -> Tensor:
        """w (N, k), in float32."""
        if self.choice is not None:
            best = torch.sigmoid(best.float())
            return best / (best.sum(dim=-1, keepdim=True) + 1e-20) * self.config.expert_scale
        if self.config.expert_weights == "sigmoid":
            w = torch.sigmoid(best.float())
        elif self.config.expert_weights == "all":
            w = F.softmax(scores.float(), dim=-1).gather(1, chosen)
        else:
            w = F.softmax(best.float(), dim=-1)
        return w if self.config.expert_scale == 1.0 else w * self.config.expert_scale

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Sum over the chosen experts (N, k) of the tokens x (N, C): (N, C)."""
        pairs, size = chosen.numel(), self.fc_1.in_features * self.fc_1.out_features
        static = torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        if static and pairs > self.config.n_expert:
            return self.mix_all(x, weights, chosen)
        few = pairs <= GATHERED * self.config.n_expert and pairs * size <= MOST_GATHERED and not self.one_by_one
        if static or (few and x.device.type in GATHERING):
            before = self.config.expert_weights == "sigmoid"
            inputs = x[:, None] * weights[..., None] if before else x[:, None].expand(-1, chosen.size(1), -1)
            y = self.proj.gathered(self.act(*(fc.gathered(inputs, chosen) for fc in (self.fc_1, self.fc_2))), chosen)
            return (y if before else y * weights[..., None]).sum(dim=1)
        return self.mix_sorted(x, weights, chosen)

    def mix_all(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """mix() in one fixed shape for many tokens: every expert reads all of them, and each weight is read once."""
        spread = weights.new_zeros(len(x), self.config.n_expert).scatter(1, chosen, weights)
        picked = torch.zeros_like(spread, dtype=torch.bool).scatter(1, chosen, True)
        y, before = torch.zeros_like(x), self.config.expert_weights == "sigmoid"
        for expert in range(self.config.n_expert):
            w, inputs = spread[:, expert, None], x
            if before:
                w, inputs = 1.0, x * w
            out = self.proj(self.act(self.fc_1(inputs, expert), self.fc_2(inputs, expert)), expert) * w
            y = y + torch.where(picked[:, expert, None], out, 0)  # what was not chosen may not even be finite
        return y

    def mix_sorted(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """mix() expert by expert."""
        order = chosen.flatten().argsort(stable=True)  # pairs by expert
        rows, w = order // chosen.size(1), weights.flatten()[order].unsqueeze(-1)
        counts = chosen.flatten().bincount(minlength=self.config.n_expert).tolist()
        y, before = torch.zeros_like(x), self.config.expert_weights == "sigmoid"
        for expert, (row, weight) in enumerate(zip(rows.split(counts), w.split(counts), strict=True)):
            if not len(row):
                continue
            inputs = x[row] * weight if before else x[row]
            out = self.proj(self.act(self.fc_1(inputs, expert), self.fc_2(inputs, expert)), expert)
            y = y.index_add(0, row, (out if before else out * weight).to(y.dtype))
        return y

    def act(self, gate: Tensor, up: Tensor) -> Tensor:
        """The activation between an expert's layers; with expert_limit gpt-oss's, which is clamped."""
        limit = self.config.expert_limit
        if limit is None:
            return ACTIVATIONS[self.config.activation](gate) * up
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(gate * self.config.expert_slope) * (up + 1)


class Balance:
    """What the layers' routers made of a call; a loss plus this is the loss with the balancing loss.

    That is weight * tokens * E times the sum over experts of their share of the tokens times their mean probability,
    both over all layers, as transformers counts them; without weight and tokens it is k where all is even.
    """

    def __init__(self, weight: float, tokens: int) -> None:
        self.weight, self.tokens = weight, tokens
        self.layers: list[tuple[Tensor, Tensor]] = []  # what shares() gave

    def __radd__(self, loss: Tensor) -> Tensor:
        share, probability = (torch.stack(each).mean(dim=0) for each in zip(*self.layers, strict=True))
        return loss + self.weight * self.tokens * share.numel() * (share * probability).sum()


def shares(scores: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Each expert's share of the tokens, and its mean probability (E,), of scores (N, E) and the chosen (N, k)."""
    share = F.one_hot(chosen, scores.size(-1)).float().sum(dim=1).mean(dim=0)
    return share, F.softmax(scores.float(), dim=-1).mean(dim=0)
