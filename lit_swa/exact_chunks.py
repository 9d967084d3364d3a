"""Training on texts of any length, chunk by chunk, with the gradients of one pass over the whole text.

The text is run forward in chunks without a graph, and of each chunk those keys and values are kept that later chunks
see: under a window of S keys the last S of it. Then the chunks are run again with a graph, from the last to the first,
with the kept keys as leaves. The backward of a chunk gives the gradients of the weights and of these leaves, and the
latter are handed to the chunks that they came from: they are what the loss of all later chunks says about those keys.
So a chunk's graph is gone before the next one is made, and memory grows by one window of keys a chunk.

    forward     chunk 0 ---keys--> chunk 1 ---keys--> chunk 2
    backward    chunk 0 <--grads-- chunk 1 <--grads-- chunk 2

A layer that sees everything keeps all keys; one of linear attention its state. The gradients are those of one pass up
to the order of sums; dropout draws the same numbers both times that a chunk is run.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_swa.config import IGNORED, LENGTH_DEPENDENT, VARIANTS, Config
from lit_swa.linear import LinearAttention, Moves, State, empty_state
from lit_swa.model import GPT, Call, Exchange, Layout, SoftmaxAttention
from lit_swa.rope import Span

Grads = list[Tensor | None]

# -------------------------------------------------------------------------------------------- keys of softmax attention


class Piece:
    """The keys and values (B, G, n, D) of the positions lo .. hi - 1 of a layer, which later chunks see, and the
    gradients that these have handed back so far."""

    def __init__(self, lo: int, hi: int, kv: tuple[Tensor, Tensor]) -> None:
        self.lo, self.hi, self.kv = lo, hi, kv
        self.grads: list[Tensor | None] = [None, None]

    def add(self, at: int, grads: Grads) -> None:
        """Take gradients of the positions from `at` on. Those that come alone, as under a window, stay as they are."""
        for n, grad in enumerate(grads):
            if grad is None:
                continue
            if self.grads[n] is None and grad.shape == self.kv[n].shape:
                self.grads[n] = grad.clone()  # a view of all keys' otherwise
                continue
            wide = torch.promote_types(grad.dtype, torch.float32)
            held = torch.zeros_like(self.kv[n], dtype=wide) if self.grads[n] is None else self.grads[n].to(wide)
            held[:, :, at - self.lo : at - self.lo + grad.size(2)] += grad.to(held.device)
            self.grads[n] = held


class BorderSlots:
    """Where the keys of a chunk lie: those before it first. Shared by the layers of a kind."""

    def __init__(self, pos: Tensor, sinks: int) -> None:
        self.pos, self.sinks = pos, sinks  # (L,): positions of the keys before the chunk

    def exchange(self, pos: Tensor, span: Span, window: int | None) -> Exchange:
        if not len(self.pos):
            return Exchange(None, pos, Layout(0, 0))
        layout = Layout(span.first, len(self.pos), self.sinks if span.first > self.sinks else 0)
        return Exchange(None, torch.cat([self.pos, pos[0]])[None], layout)


class KeyBorder:
    """In the place of a layer's cache: what a chunk sees of those before it, and what it makes for those behind it."""

    def __init__(self, slots: BorderSlots, pieces: list[tuple[Tensor, Tensor]], parts: list[slice]) -> None:
        """parts: of the chunk's tokens, those that later chunks see."""
        self.slots, self.pieces, self.parts = slots, pieces, parts  # keys and values (B, G, n, D), where they wait
        self.leaves = [x for pair in pieces for x in pair]
        self.own: list[tuple[Tensor, Tensor]] | None = None  # of each part

    def exchange(self, k: Tensor, v: Tensor, plan: Exchange) -> tuple[Tensor, Tensor]:
        """What waits elsewhere comes here for its layer alone, and its gradient goes back so."""
        if self.own is None:  # not once more where the layer computes again in the backward
            self.own = [(part_of(k, part), part_of(v, part)) for part in self.parts]
        if not self.pieces:
            return k, v
        pairs = [[x.to(k.device, non_blocking=True) for x in pair] for pair in self.pieces]
        return tuple(torch.cat(parts, dim=2) for parts in zip(*pairs, (k, v), strict=True))


def part_of(x: Tensor, part: slice) -> Tensor:
    """Some positions of x (B, G, T, D), as a copy: all of x need not stay for them."""
    return x if part == slice(0, x.size(2)) else x[:, :, part].clone()


class KeyStore:
    """The keys that a text's chunks leave for later ones, in a layer of softmax attention."""

    def __init__(self, mixer: SoftmaxAttention, place: torch.device | None) -> None:
        """place: where what is kept waits; None: where it is made."""
        self.window, self.sinks, self.place = mixer.window, mixer.n_sinks, place
        self.pieces: list[Piece] = []

    def ranges(self, first: int) -> list[tuple[int, int]]:
        """The positions that a chunk from `first` on sees before it."""
        if self.window is None:
            return [(0, first)] if first else []
        sinks = min(self.sinks, first)
        return [(a, b) for a, b in ((0, sinks), (max(sinks, first - self.window), first)) if a < b]

    def slots(self, first: int, device: torch.device) -> BorderSlots:
        pos = [torch.arange(a, b, device=device) for a, b in self.ranges(first)]
        return BorderSlots(torch.cat(pos) if pos else torch.arange(0, device=device), self.sinks)

    def found(self, first: int) -> Iterator[tuple[Piece, int, int]]:
        """The pieces that lie in ranges(first), and which of their positions, in order."""
        for a, b in self.ranges(first):
            for piece in self.pieces:
                lo, hi = max(a, piece.lo), min(b, piece.hi)
                if lo < hi:
                    yield piece, lo, hi

    def border(self, slots: BorderSlots, first: int, end: int) -> KeyBorder:
        """What a chunk from `first` on sees, as leaves of its graph. end: where the chunks behind it begin.

        Of all keys there may be more than the device holds: they, and their gradients, stay where they wait.
        """
        pieces, device = [], None if self.window is None else slots.pos.device
        for piece, lo, hi in self.found(first):
            seen = [x[:, :, lo - piece.lo : hi - piece.lo].detach() for x in piece.kv]
            pieces.append(tuple(x.to(device or x.device, non_blocking=True).requires_grad_() for x in seen))
        spans = ((max(a, first) - first, b - first) for a, b in self.ranges(end))
        return KeyBorder(slots, pieces, [slice(a, b) for a, b in spans if a < b])

    def keep(self, border: KeyBorder, first: int, end: int) -> None:
        """Keep what later chunks see of a chunk first .. end - 1."""
        for part, pair in zip(border.parts, border.own, strict=True):
            self.pieces.append(Piece(first + part.start, first + part.stop, tuple(self.moved(x) for x in pair)))

    def moved(self, x: Tensor) -> Tensor:
        if self.place is None:
            return x.detach().clone()
        fast = x.is_cuda and self.place.type == "cpu"  # pinned memory is copied at a bus's full speed
        return torch.empty(x.shape, dtype=x.dtype, device=self.place, pin_memory=fast).copy_(x.detach())

    def made(self, border: KeyBorder, first: int, end: int) -> tuple[list[Tensor], list[Tensor]]:
        """What the chunk first .. end - 1 made for later ones, and the gradients that they have handed back. After that
        nobody needs these keys any more."""
        tensors, grads = [], []
        known = [piece for piece in self.pieces if first <= piece.lo < end]
        for piece, pair in zip(known, border.own, strict=True):
            for own, grad in zip(pair, piece.grads, strict=True):
                if grad is not None:
                    tensors.append(own)
                    grads.append(grad.to(own.device, own.dtype))
            self.pieces.remove(piece)
        return tensors, grads

    def hand_back(self, border: KeyBorder, grads: Grads, first: int) -> None:
        """Give the gradients of a chunk's leaves to the pieces that these came from."""
        for n, (piece, lo, _) in enumerate(self.found(first)):
            piece.add(lo, grads[2 * n : 2 * n + 2])


# ------------------------------------------------------------------------------------------- states of linear attention


IN_PLACE = Moves(None, None, None, ())  # a chunk's tokens are in order, and its border is a leaf that is not written to


class StateBorder:
    """In the place of a StateCache: the state, the nearest keys and the sinks before a chunk, and those behind it."""

    def __init__(self, store: "StateStore", first: int, leaves: list[Tensor]) -> None:
        self.recent, self.store, self.first, self.leaves, self.own = self, store, first, leaves, []

    def admit(self, pos: Tensor, window: int, looked: bool) -> tuple[Tensor, Tensor, Moves]:
        n, lag = self.store.sinks, self.store.lag
        entries = torch.cat([torch.arange(self.first - lag, self.first, device=pos.device), pos[0]])[None]
        numbers = torch.arange(n, device=pos.device)[None]
        return entries >= n, numbers.where(numbers <= pos[:, -1:], -1), IN_PLACE

    def exchange(self, kv: Tensor, moves: Moves) -> tuple[Tensor, Tensor, State]:
        B, G, T, _ = kv.shape
        held, sinks, *state = self.leaves or [kv.new_zeros(B, G, self.store.lag, kv.size(-1)), kv[:, :, :0]]
        entries, missing = torch.cat([held, kv], dim=2), self.store.sinks - sinks.size(2)
        sinks = torch.cat([sinks, kv[:, :, :missing]], dim=2) if missing else sinks
        self.own = [entries[:, :, T:], sinks]
        sinks = F.pad(sinks, (0, 0, 0, self.store.sinks - sinks.size(2)))  # some may come later
        return sinks, entries, tuple(state) or empty_state(kv.new_empty(B, self.store.heads, 0, kv.size(-1) // 2))

    def keep(self, state: State) -> None:
        self.own += state


class StateStore:
    """The states between a text's chunks, in a layer of linear attention."""

    def __init__(self, mixer: LinearAttention, heads: int, place: torch.device | None) -> None:
        self.lag, self.sinks, self.heads = max(1, mixer.config.linear_window), mixer.config.linear_sinks, heads
        self.place, self.states, self.grads = place, {}, {}  # position -> what is there

    def slots(self, first: int, device: torch.device) -> torch.device:
        return device

    def border(self, device: torch.device, first: int, end: int) -> StateBorder:
        return StateBorder(self, first, [x.to(device).detach().requires_grad_() for x in self.states.get(first, ())])

    def keep(self, border: StateBorder, first: int, end: int) -> None:
        self.states[end] = [x.detach().clone() if self.place is None else x.detach().to(self.place) for x in border.own]

    def made(self, border: StateBorder, first: int, end: int) -> tuple[list[Tensor], list[Tensor]]:
        self.states.pop(end, None)
        pairs = zip(border.own, self.grads.pop(end, ()), strict=False)
        known = [(own, grad) for own, grad in pairs if grad is not None]
        return [own for own, _ in known], [grad for _, grad in known]

    def hand_back(self, border: StateBorder, grads: Grads, first: int) -> None:
        self.grads[first] = grads


# ------------------------------------------------------------------------------------------------------------ the text


class Unit(NamedTuple):
    """Some tokens of a row that are read on their own: one long text, or short ones side by side."""

    start: int
    lengths: list[int]  # of the texts; one of more than a chunk is alone


def cut_documents(lengths: Sequence[int], chunk_size: int) -> list[Unit]:
    """Texts of more than a chunk, each alone, and between them as many short ones as fit a chunk."""
    units, start = [], 0
    for n in lengths:
        if units and sum(units[-1].lengths) + n <= chunk_size:
            units[-1].lengths.append(n)
        else:
            units.append(Unit(start, [n]))
        start += n
    return units


def check_chunks(config: Config) -> None:
    """Raises ValueError for a model whose texts cannot be cut into chunks."""
    scaling = (config.rope_scaling or {}).get("type")
    if scaling in LENGTH_DEPENDENT:
        raise ValueError(
            f"RoPE of type {scaling!r} reads a token differently in a longer text, in all {config.n_layer} layers, so "
            "a text is not cut into chunks: leave --chunk_size out."
        )
    if config.s2_attention:
        raise ValueError(
            f"S2-Attn groups the tokens of a whole text in all {config.n_layer} layers, so a text is not cut into "
            "chunks: leave --chunk_size out, or --model.s2_attention false."
        )
    if config.n_expert is not None and config.balancing_loss:
        raise ValueError(
            f"balancing_loss={config.balancing_loss:g} compares the experts over a whole text, which is not cut into "
            "chunks then: --model.balancing_loss 0, or leave --chunk_size out."
        )
    own = [n for n, name in enumerate(config.layer_variants) if VARIANTS[name].mixer not in (None, LinearAttention)]
    if own:
        raise ValueError(
            f"{config.layer_variants[own[0]]!r} attends in a way of its own in the layers {', '.join(map(str, own))}, "
            "of which nothing is known that a chunk could hand on: leave --chunk_size out."
        )


def kept_bytes(model: GPT, tokens: int, chunk_size: int, element_size: int) -> int:
    """Bytes of what the chunks of a text leave for each other, with the gradients that are on their way back."""
    borders, D, total = -(-tokens // chunk_size) - 1, model.config.head_size, 0
    for attn in model.layers:
        mixer, key = attn.mixer, 2 * attn.n_query_groups * D
        if isinstance(mixer, LinearAttention):
            state = 4 * attn.n_head * 2 * D * (D + 1)
            nearest = max(1, mixer.config.linear_window) + mixer.config.linear_sinks
            total += (borders + 1) * (state + element_size * key * nearest)
        elif mixer.window is None:
            total += borders * chunk_size * key * (element_size + 4)
        else:
            total += key * (borders * min(chunk_size, mixer.window) * element_size + 4 * mixer.window)
    return total if borders else 0


def border_bytes(model: GPT, chunk_size: int, element_size: int) -> int:
    """Bytes that a chunk has on the device beside a graph of as many tokens: of each layer the keys and values before
    it and those that it makes for later chunks, and the gradients of both."""
    total = 0
    for attn in model.layers:
        if isinstance(attn.mixer, SoftmaxAttention):
            seen = chunk_size if attn.mixer.window is None else min(chunk_size, attn.mixer.window + attn.mixer.n_sinks)
            total += 4 * seen * 2 * attn.n_query_groups * model.config.head_size * element_size
    return total


class ExactChunks(nn.Module):
    """A model that reads long texts in chunks, called as the model is with targets.

    In training the gradients are there when the loss is, and its backward only hands them on: the graph is gone.
    """

    def __init__(self, model: GPT, chunk_size: int, offload: bool = False) -> None:
        """offload: what is kept between chunks waits in the CPU's memory. Raises ValueError as check_chunks does."""
        super().__init__()
        check_chunks(model.config)
        self.module, self.chunk_size, self.offload = model, chunk_size, offload

    def forward(self, idx: Tensor, targets: Tensor, documents: Sequence[int] | None = None) -> Tensor:
        """The sum of -log p(target), as GPT.forward gives it."""
        weights = [p for p in self.module.parameters() if p.requires_grad]
        learns = torch.is_grad_enabled() and bool(weights)
        total, sums = torch.zeros((), device=idx.device, dtype=torch.float32), Sums(weights)
        for unit in cut_documents(documents or [idx.size(1)], self.chunk_size):
            end = unit.start + sum(unit.lengths)
            text, wanted = idx[:, unit.start : end], targets[:, unit.start : end]
            if len(unit.lengths) > 1 or end - unit.start <= self.chunk_size:
                loss = self.module(text, targets=wanted, documents=unit.lengths)
                total = total + loss.detach()
                if learns and loss.requires_grad:
                    sums.add(torch.autograd.grad(loss, weights, allow_unused=True))
            else:
                total = total + self.read(text, wanted, sums if learns else None)
        return HandedOn.apply(total, sums.grads, *weights) if learns else total

    def read(self, idx: Tensor, targets: Tensor, sums: "Sums | None") -> Tensor:
        """The loss of one long text (B, T); its gradients are added to `sums`."""
        cuts = [*range(0, idx.size(1), self.chunk_size), idx.size(1)]
        chunks, stores, states = list(zip(cuts, cuts[1:], strict=False)), self.stores(idx), []
        total = torch.zeros((), device=idx.device, dtype=torch.float32)
        with torch.no_grad():
            for a, b in chunks if sums is None else chunks[:-1]:
                states.append(random_state(idx.device))
                borders = self.borders(stores, a, b, idx.device)
                with in_place_of_caches(self.module, borders):
                    x = self.run(idx[:, a:b], a, borders)
                if sums is None:
                    total = total + self.loss(x, targets[:, a:b], [])
                for store, border in zip(stores, borders, strict=True):
                    store.keep(border, a, b)
        if sums is None:
            return total
        states.append(random_state(idx.device))
        for (a, b), state in zip(reversed(chunks), reversed(states), strict=True):
            with drawing_from(state, idx.device):
                last = b == idx.size(1)
                total = total + self.differentiate(idx[:, a:b], targets[:, a:b], a, stores, sums, last)
        return total

    def differentiate(self, idx: Tensor, targets: Tensor, first: int, stores: list, sums: "Sums", last: bool) -> Tensor:
        """The loss of a chunk, its gradients, and those of what it sees of the chunks before it."""
        end, losses = first + idx.size(1), []
        borders = self.borders(stores, first, first if last else end, idx.device)  # nobody sees the last chunk's keys
        leaves = [leaf for border in borders for leaf in border.leaves]
        with in_place_of_caches(self.module, borders):  # in the backward too, where layers may compute again
            loss = self.loss(self.run(idx, first, borders, losses), targets, losses)
            outputs, grads = [loss], [torch.ones_like(loss)]
            for store, border in zip(stores, borders, strict=True):
                tensors, handed = store.made(border, first, end)
                known = [(t, grad) for t, grad in zip(tensors, handed, strict=True) if t.requires_grad]
                outputs += [t for t, _ in known]
                grads += [grad for _, grad in known]
            found = torch.autograd.grad(outputs, [*sums.weights, *leaves], grads, allow_unused=True)
        sums.add(found[: len(sums.weights)])
        at = len(sums.weights)
        for store, border in zip(stores, borders, strict=True):
            store.hand_back(border, list(found[at : at + len(border.leaves)]), first)
            at += len(border.leaves)
        return loss.detach()

    def stores(self, idx: Tensor) -> list[KeyStore | StateStore]:
        place = torch.device("cpu") if self.offload else None
        return [
            StateStore(attn.mixer, attn.n_head, place)
            if isinstance(attn.mixer, LinearAttention)
            else KeyStore(attn.mixer, place)
            for attn in self.module.layers
        ]

    def borders(self, stores: list, first: int, end: int, device: torch.device) -> list[KeyBorder | StateBorder]:
        """What each layer sees before a chunk first .. end - 1. Layers of one kind share its places."""
        shared: dict[str, Any] = {}
        borders = []
        for attn, store in zip(self.module.layers, stores, strict=True):
            kind = attn.mixer.kind
            if kind not in shared:
                shared[kind] = store.slots(first, device)
            borders.append(store.border(shared[kind], first, end))
        return borders

    def run(self, idx: Tensor, first: int, borders: list, losses: list[Tensor] | None = None) -> Tensor:
        """Hidden states (B, T, C) of a chunk that begins at position `first`."""
        model, T = self.module, idx.size(1)
        span = Span(True, first, first + T - 1, contiguous=True, fresh=first == 0, looked=True)
        span = span._replace(dtype=model.dtype)
        pos, plans = torch.arange(first, first + T, device=idx.device)[None], {}
        for attn, border in zip(model.layers, borders, strict=True):
            if attn.mixer.kind not in plans:
                plans[attn.mixer.kind] = attn.mixer.plan(pos, span, border, model.rope)
        return model.run_blocks(idx, Call(plans, cached=True, losses=[] if losses is None else losses))

    def loss(self, x: Tensor, targets: Tensor, losses: list[Tensor]) -> Tensor:
        trained = (targets.flatten() != IGNORED).nonzero()[:, 0]
        loss = self.module.sum_nll(x.flatten(0, 1)[trained], targets.flatten()[trained])
        return sum(losses, loss) if self.module.training else loss


@contextmanager
def in_place_of_caches(model: GPT, borders: list) -> Iterator[None]:
    """Within it the layers' caches are these."""
    for attn, border in zip(model.layers, borders, strict=True):
        attn._modules.pop("kv_cache", None)  # the place of a cache that there was: a border is no module
        attn.kv_cache = border
    try:
        yield
    finally:
        for attn in model.layers:
            attn.kv_cache = None


class Sums:
    """Gradients of some weights, added up over chunks, in float32 at least."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights, self.grads = weights, [None] * len(weights)

    def add(self, grads: Sequence[Tensor | None]) -> None:
        for n, grad in enumerate(grads):
            if grad is not None:
                wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
                self.grads[n] = wide if self.grads[n] is None else self.grads[n].add_(wide)


class HandedOn(torch.autograd.Function):
    """A loss whose gradients are known: the graph that they were taken through is gone."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor | None], *weights: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upper: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad if grad is None else scaled(grad, upper) for grad in ctx.grads)


def scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """Their product, rounded once: a factor such as 1/tokens would lose three digits in bfloat16."""
    return (grad.to(torch.promote_types(grad.dtype, factor.dtype)) * factor).to(grad.dtype)


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def drawing_from(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Within it the random numbers are those that were drawn from this state; behind it they go on as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
