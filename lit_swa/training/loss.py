"""The loss of a long text in pieces, with the gradients of each piece taken at once.

GPT.sum_nll checkpoints its pieces: the backward makes their logits a second time, which is a product with the whole
vocabulary. Here a piece is differentiated while its logits are there, and its gradients, of the hidden states and of
what is behind them, wait for the backward in their place.
"""

import functools

import torch
from torch import Tensor

from lit_swa import model as model_file
from lit_swa.exact_chunks import HandedOn, Sums
from lit_swa.model import GPT


def differentiate_pieces_at_once(model: GPT) -> None:
    """Let the model take its loss like this in training."""
    model.sum_nll = functools.partial(sum_nll, model)


def sum_nll(model: GPT, x: Tensor, targets: Tensor) -> Tensor:
    """GPT.sum_nll: the sum of -log p(target) over hidden states x (N, C) and targets (N,)."""
    elements = model_file.LOSS_ELEMENTS[x.device.type == "cuda"]
    size = max(1, elements // model.config.padded_vocab_size)
    behind = [*model.transformer.ln_f.parameters(), *model.lm_head.parameters()]
    weights = [p for p in dict.fromkeys(behind) if p.requires_grad]
    if x.size(0) <= size or not torch.is_grad_enabled() or not (x.requires_grad or weights):
        return type(model).sum_nll(model, x, targets)
    total, sums, grads = torch.zeros((), device=x.device, dtype=torch.float32), Sums(weights), []
    for piece, wanted in zip(x.detach().split(size), targets.split(size), strict=True):
        piece = piece.requires_grad_(x.requires_grad)
        loss = model.token_losses(piece, wanted)
        given = [piece] * x.requires_grad + weights
        found = torch.autograd.grad(loss, given, allow_unused=True)
        grads += found[: x.requires_grad]
        sums.add(found[x.requires_grad :])
        total = total + loss.detach()
    return HandedOn.apply(total, [torch.cat(grads) if grads else None, *sums.grads], x, *weights)
