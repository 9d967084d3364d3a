"""prompt_attention="sliding": a prompt is read under a window, and what the model writes sees all of it.

Reading a prompt of T tokens then costs T * S pairs of query and key in place of T * T / 2, while no key is lost: the
caches are those of attention="full" ("full attention decode", Yu et al. 2025, arXiv 2512.10411). S = 3, a prompt of 5
tokens, 2 written ones (row: query, column: key):

    x . . . . . .
    x x . . . . .
    x x x . . . .
    . x x x . . .
    x x x x x . .    the last token of the prompt, of whose logits the first new token is chosen
    x x x x x x .
    x x x x x x x

Which tokens are the prompt, the caller says, in each call: `model(idx, input_pos, prompt=True)`. A query's mask depends
on that and on its position alone, so the tokens may be fed in any number of calls. `Session.read` reads a prompt so,
all of it but the last token; generation, chat, batches and speculative decoding go through it. In the paper the last
token of a prompt sees the window too, and the first new one is chosen nearly blind: `Session.feed(ids, prompt=True)`.
What a conversation holds already is not read again: the model's own earlier answers have seen everything.

`prompt_attention` is a pattern, as attention is: "streaming" keeps the first tokens in sight, and "full" in some layers
lets those read in full.
"""

from typing import Any

from torch import Tensor

if __package__:
    from .model import Plan, SoftmaxAttention
    from .rope import RoPE, Span
else:  # copied beside a script of another project
    from model import Plan, SoftmaxAttention
    from rope import RoPE, Span


class PromptPlanner(SoftmaxAttention):
    """Plans calls under the mask by which a layer reads a prompt; the layer's own mixer carries the plans out."""

    def __init__(self, own: SoftmaxAttention) -> None:
        super().__init__(own.config, own.config.prompt_variants[own.layer], own.layer)
        self.base = own.rope_base

    @property
    def rope_base(self) -> int | None:
        """That of the layer, whose keys are read again when the prompt has ended."""
        return self.base


def plan(own: SoftmaxAttention, pos: Tensor, span: Span, cache: Any, rope: RoPE) -> Plan:
    """What `own.plan` gives, for tokens of a prompt."""
    span = span._replace(prompt=False)
    same = own.config.prompt_variants[own.layer] == own.variant
    return (own if same else PromptPlanner(own)).plan(pos, span, cache, rope)
