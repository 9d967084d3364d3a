"""Layers that mix tokens in another way for a while, and what that costs in each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from lit_swa.model import GPT, Mixer


@contextmanager
def mixing_with(model: GPT, mixers: Sequence[Mixer]) -> Iterator[None]:
    """Within it, the layers mix tokens with these mixers."""
    before = [attn.mixer for attn in model.layers]
    try:
        for attn, mixer in zip(model.layers, mixers, strict=True):
            attn.mixer = mixer
        yield
    finally:
        for attn, mixer in zip(model.layers, before, strict=True):
            attn.mixer = mixer


def harm_of_each(
    model: GPT,
    mixers: Sequence[Mixer],
    changed: Mapping[int, Mixer],
    loss: Callable[[], float],
    tell: Callable[[int], None] | None = None,
) -> tuple[float, dict[int, float]]:
    """(the loss with `mixers`, the loss where one layer alone has its mixer of `changed` instead, by layer).

    loss: measures the model as it is at the time. tell: called with the number of measurements that were made.
    """
    losses: dict[int, float] = {}
    with mixing_with(model, mixers):
        before = loss()
    for i, mixer in changed.items():
        with mixing_with(model, [mixer if n == i else own for n, own in enumerate(mixers)]):
            losses[i] = loss()
        if tell is not None:
            tell(len(losses))
    return before, losses
