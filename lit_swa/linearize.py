"""From softmax to linear attention: which layers change, what they learn, and what a change costs.

LoLCATs (Zhang et al. 2024, arXiv 2410.10254). A layer that becomes linear keeps its projections and gets a
LinearAttention in place of its softmax. Stage 1, attention transfer: every layer is given what the softmax model would
give it and learns to give on what softmax attention gives on. Stage 2: LoRA on the projections mends what is left, by
the next token or by the softmax model's own predictions (RADLADS, Goldstein et al. 2025, arXiv 2505.03005).

Shapes: B, T, H, G, D and V as in model.py; N tokens, M layers that become linear.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_swa import model as model_file
from lit_swa.config import IGNORED, Config, join_pattern, tiled
from lit_swa.exact_chunks import HandedOn
from lit_swa.linear import LinearAttention
from lit_swa.lora import without_lora
from lit_swa.mixers import harm_of_each, mixing_with
from lit_swa.model import GPT, Mixer, SoftmaxAttention, softcap, visible
from lit_swa.rope import apply_rope

LINEAR = "linear"
SOFTMAX = ("full", "sliding")  # the variants whose layers can become linear
SCALE = 1000.0  # of the mean squared error, as in LoLCATs: a rate and a bound on the gradient that suit any model

# -------------------------------------------------------------------------------------------------- which layers change


def linear_config(base: Config, fields: dict[str, Any]) -> Config:
    """The config of a checkpoint with linear attention and these fields changed. Where they do not say which layers
    become linear, all that attend in full do. Raises ValueError for what cannot become linear."""
    for name in ("n_layer", "linear_teacher"):
        if fields.get(name, (now := getattr(base, name))) != now:
            raise ValueError(f"{name}={fields[name]!r} is not the checkpoint's own, {now!r}: leave --model.{name} out.")
    if fields.get("s2_attention", base.s2_attention):
        raise ValueError("s2_attention groups the tokens of softmax attention in training: --model.s2_attention false.")
    if "attention" not in fields and LINEAR not in base.layer_variants:
        pattern = [LINEAR if variant == "full" else variant for variant in base.layer_variants]
        fields = {"attention": join_pattern(pattern)} | fields
        if not {LINEAR, *SOFTMAX} & set(pattern):
            raise ValueError(f"attention={base.attention!r} cannot be made linear: only {' and '.join(SOFTMAX)} can.")
        if LINEAR not in pattern:
            raise ValueError(
                f"No layer attends in full (attention={base.attention!r}), so none becomes linear: name those that "
                f"shall, as in --model.attention linear."
            )
    config = base.override(**fields)
    if LINEAR not in config.layer_variants:
        raise ValueError(f"attention={config.attention!r} has no linear layer: leave --model.attention out.")
    learned = set()
    for i, (before, after) in enumerate(zip(base.layer_variants, config.layer_variants, strict=True)):
        check_layer(i, before, after)
        learned |= {before} if after == LINEAR else set()
    return config.override(linear_teacher=join_pattern(softmax_variants(base))) if "sliding" in learned else config


def check_layer(i: int, before: str, after: str) -> None:
    """Raises ValueError where a layer of one variant cannot be given the other."""
    if before == after or after == LINEAR and before in SOFTMAX:
        return
    if after == LINEAR:
        raise ValueError(f"Layer {i} is {before}, which cannot be made linear: only {' and '.join(SOFTMAX)} can.")
    raise ValueError(
        f"Layer {i} would be {after} and is {before} in the checkpoint: a layer becomes linear or stays as it is."
    )


def linear_layers(model: GPT) -> list[int]:
    return [i for i, attn in enumerate(model.layers) if isinstance(attn.mixer, LinearAttention)]


def make_linear(model: GPT, config: Config) -> None:
    """Give the layers that are linear in `config` a LinearAttention that has learned nothing yet."""
    weight = model.transformer.wte.weight
    for attn, variant in zip(model.layers, config.layer_variants, strict=True):
        if variant == LINEAR and not isinstance(attn.mixer, LinearAttention):
            attn.mixer = (
                LinearAttention(config, LINEAR, attn.mixer.layer).to(weight.device, weight.dtype).train(attn.training)
            )
    set_config(model, config)


def keep_softmax(model: GPT, layers: Sequence[int], variants: Sequence[str]) -> None:
    """Let these layers attend with softmax again, as `variants` says, and forget what they have learned."""
    teachers = softmax_mixers(model, variants)
    for i in layers:
        model.layers[i].mixer = teachers[i]
    pattern = [variants[i] if i in layers else v for i, v in enumerate(model.config.layer_variants)]
    set_config(model, model.config.override(attention=join_pattern(pattern)))


def set_config(model: GPT, config: Config) -> None:
    before = model.config
    for module in model.modules():
        if getattr(module, "config", None) is before:
            module.config = config


# ------------------------------------------------------------------------------------------------- teacher and students


def softmax_mixers(model: GPT, variants: Sequence[str]) -> list[Mixer]:
    """The model's mixers, with softmax attention of these variants in place of linear attention."""
    return [
        SoftmaxAttention(attn.config.of_layer(i), variant, i).eval()
        if isinstance(attn.mixer, LinearAttention)
        else attn.mixer
        for i, (attn, variant) in enumerate(zip(model.layers, variants, strict=True))
    ]


def softmax_variants(config: Config) -> list[str]:
    """What the layers were before they became linear."""
    teachers = tiled(config.linear_teacher or "full", config.n_layer)
    return [
        teacher if variant == LINEAR else variant
        for variant, teacher in zip(config.layer_variants, teachers, strict=True)
    ]


# ------------------------------------------------------------------------------------------ stage 1: attention transfer


class TransferPlan(NamedTuple):
    """The plans of a layer's teacher and student for one call."""

    teacher: Any
    student: Any
    texts: "list[tuple[int, TransferPlan]]" = []  # lengths and plans of texts in a sequence; empty: one text


class Transfer(Mixer):
    """Softmax attention, which the layer goes on with, and a linear attention that learns to say the same.

    So every layer reads what it reads in the softmax model (teacher forcing), and its loss depends on no other layer's
    weights: its gradient is taken at once, and nothing is kept of it but the gradient.
    """

    def __init__(self, teacher: Mixer, student: LinearAttention, weights_ce: float = 0.0) -> None:
        """weights_ce: how much the cross-entropy of the attention weights counts beside the outputs."""
        super().__init__(student.config, f"{student.variant} that learns from {teacher.variant}", student.layer)
        self.teacher, self.student, self.weights_ce = teacher, student, weights_ce
        self.loss: Tensor | None = None  # of the last call, summed over its tokens

    def plan(self, pos: Tensor, span: Any, cache: None, rope: Any) -> TransferPlan:
        return TransferPlan(self.teacher.plan(pos, span, None, rope), self.student.plan(pos, span, None, rope))

    def join(self, texts: list[tuple[int, TransferPlan]]) -> TransferPlan:
        teacher = self.teacher.join([(n, plan.teacher) for n, plan in texts])
        return TransferPlan(teacher, self.student.join([(n, plan.student) for n, plan in texts]), texts)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: TransferPlan, cache: None) -> Tensor:
        q, k, v = q.detach(), k.detach(), v.detach()
        with torch.no_grad():
            y = self.teacher(q, k, v, plan.teacher, None)  # (B, H, T, D)
        self.loss = differentiated(self.distance(q, k, v, y, plan), list(self.student.parameters()))
        return y

    def distance(self, q: Tensor, k: Tensor, v: Tensor, y: Tensor, plan: TransferPlan) -> Tensor:
        """How far the student is from the outputs y: SCALE times the mean square over the heads' elements, summed over
        tokens."""
        loss = SCALE * squared_error(self.student(q, k, v, plan.student, None), y) / (y.size(1) * y.size(3))
        if not self.weights_ce:
            return loss
        lengths = [n for n, _ in plan.texts] or [q.size(2)]
        plans = [own for _, own in plan.texts] or [plan]
        texts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), plans, strict=True)
        return loss + self.weights_ce * sum(self.cross_entropy(*text) for text in texts)

    def cross_entropy(self, q: Tensor, k: Tensor, v: Tensor, plan: TransferPlan) -> Tensor:
        """Of the student's attention weights under the teacher's, the mean over heads, summed over tokens. It makes all
        T x T weights: for short texts."""
        with torch.no_grad():
            wanted = softmax_weights(self.teacher, q, k, plan.teacher)
        given = self.student.attention_weights(q, k, v, plan.student)
        least = torch.finfo(given.dtype).tiny
        return -(wanted.to(given.dtype) * given.clamp(min=least).log()).sum() / q.size(1)


def squared_error(y: Tensor, wanted: Tensor) -> Tensor:
    wide = torch.promote_types(y.dtype, torch.float32)
    return F.mse_loss(y.to(wide), wanted.to(wide), reduction="sum")


def softmax_weights(mixer: SoftmaxAttention, q: Tensor, k: Tensor, plan: Any) -> Tensor:
    """The attention weights (B, H, T, T) of one text, from queries (B, H, T, D) and keys (B, G, T, D) before RoPE."""
    config, pos = mixer.config, torch.arange(q.size(2), device=q.device)[None]
    q, k = apply_rope(q, *plan.q_angles[0]), apply_rope(k, *plan.k_angles)
    scale = (config.attention_scores_scalar or config.head_size) ** -0.5
    scores = q @ k.repeat_interleave(q.size(1) // k.size(1), dim=1).mT * scale
    if config.attention_logit_softcapping is not None:
        scores = softcap(scores, config.attention_logit_softcapping)
    scores = scores.masked_fill(~visible(mixer.row.parts[0], pos, pos, config), -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def differentiated(loss: Tensor, weights: list[nn.Parameter]) -> Tensor:
    """The same loss, without what it keeps in memory: its gradients by the weights are taken now."""
    if not loss.requires_grad:
        return loss
    gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
    return HandedOn.apply(loss.detach(), gradients, *weights)


class AttentionTransfer(nn.Module):
    """One pass of the softmax model, in which all linear layers learn.

    Calling it gives the mean of their losses, summed over tokens; `layer_losses` then holds each of them, (M,).
    window_dropout: the probability that the layers, where they learn, must do a pass without their windows. It keeps
    them from leaving all work to these (arXiv 2510.05901).
    """

    def __init__(self, model: GPT, variants: Sequence[str], weights_ce: float = 0.0) -> None:
        """variants: what the layers of the softmax model are. The model's other weights are frozen."""
        super().__init__()
        self.module, self.weights_ce, self.window_dropout = model, weights_ce, 0.0
        students = linear_layers(model)
        model.requires_grad_(False)
        self.mixers = softmax_mixers(model, variants)
        for i in students:
            student = model.layers[i].mixer.requires_grad_(True)
            self.mixers[i] = Transfer(self.mixers[i], student, weights_ce)
        self.transfers = [self.mixers[i] for i in students]  # lists hide them from parameters(): the model has theirs
        self.layer_losses = torch.zeros(len(students))

    def forward(self, idx: Tensor, targets: Tensor | None = None, documents: Sequence[int] | None = None) -> Tensor:
        dropped = torch.is_grad_enabled() and self.window_dropout > 0 and torch.rand(()).item() < self.window_dropout
        for transfer in self.transfers:
            transfer.student.near = 0 if dropped else transfer.student.config.linear_window
        try:
            with mixing_with(self.module, self.mixers):
                self.module.hidden_states(idx, documents=documents)
        finally:
            for transfer in self.transfers:
                transfer.student.near = transfer.student.config.linear_window
        losses = torch.stack([transfer.loss for transfer in self.transfers])
        self.layer_losses = losses.detach()
        return losses.mean()


# ------------------------------------------------------------------------------------------------ stage 2: distillation


class Distillation(nn.Module):
    """A model with LoRA that learns the predictions of its own softmax attention without LoRA.

    Calling it gives the sum of KL(teacher || student) over the tokens that have a target; in eval mode the sum of
    -log p(target), as the model itself.
    """

    def __init__(self, model: GPT, variants: Sequence[str]) -> None:
        """variants: what the layers of the softmax model are."""
        super().__init__()
        self.module, self.teachers = model, softmax_mixers(model, variants)

    def forward(self, idx: Tensor, targets: Tensor, documents: Sequence[int] | None = None) -> Tensor:
        model = self.module
        if not self.training:
            return model(idx, targets=targets, documents=documents)
        trained = (targets.flatten() != IGNORED).nonzero()[:, 0]
        with torch.no_grad(), without_lora(model), mixing_with(model, self.teachers):
            wanted = model.hidden_states(idx, documents=documents).flatten(0, 1)[trained]  # (N, C)
        return sum_kl(model, model.hidden_states(idx, documents=documents).flatten(0, 1)[trained], wanted)


def sum_kl(model: GPT, x: Tensor, wanted: Tensor) -> Tensor:
    """Sum of KL(teacher || student) over the hidden states of both, (N, C) each, in float32. As in GPT.sum_nll, the
    logits of few tokens exist at once, and the backward makes them a second time."""

    def piece(x: Tensor, wanted: Tensor) -> Tensor:
        with torch.no_grad(), without_lora(model):
            teacher = log_probabilities(model, wanted)
        return F.kl_div(log_probabilities(model, x), teacher, reduction="sum", log_target=True)

    size = max(1, model_file.LOSS_ELEMENTS[x.device.type == "cuda"] // (2 * model.config.padded_vocab_size))
    if x.size(0) <= size:
        return piece(x, wanted)
    pieces = zip(x.split(size), wanted.split(size), strict=True)
    return torch.stack([checkpoint(piece, *both, use_reentrant=False) for both in pieces]).sum()


def log_probabilities(model: GPT, x: Tensor) -> Tensor:
    """(N, C) -> (N, vocab_size), in float32 at least."""
    logits = model.project(x)[:, : model.config.vocab_size]
    return logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


# -------------------------------------------------------------------------------------------- which layers stay softmax


def measure_harm(
    model: GPT, variants: Sequence[str], loss: Callable[[], float], tell: Callable[[int], None] | None = None
) -> tuple[float, dict[int, float]]:
    """(the loss of the softmax model, the loss with linear attention in one layer alone, by layer).

    variants: what the layers of the softmax model are. loss: measures the model as it is at the time. tell: called with
    the number of measurements that were made.
    """
    softmax = softmax_mixers(model, variants)
    return harm_of_each(model, softmax, {i: model.layers[i].mixer for i in linear_layers(model)}, loss, tell)
