"""Speculative decoding: a draft proposes k tokens, and the target reads them all in one call and keeps those that fit.

Leviathan et al. 2023 (arXiv 2211.17192), Chen et al. 2023 (arXiv 2302.01318). The target's weights and cache are read
once for several tokens, and the text is the target's: greedy, it is the same text; sampled, it has the same
distribution, whatever the draft is. One round:

    text ... a b                 the caches hold all but the newest token, b
    draft          c d e         k = 3 proposed tokens, from the distributions q
    target       b c d e         one call: p of what follows b, c, d and e
    accepted       c d           c with min(1, p(c) / q(c)), then d, then e: the first that is refused ends it
    new            c d f         f from max(p - q, 0) where e stood; behind k accepted tokens it would come from p

All of it stays on the device, with fixed shapes; the host waits once in a round, to read the new tokens. What was fed
in vain is fed over in the next round, so a rolling cache needs a lookahead of k.

Shapes: B sequences, V vocab_size, k proposed tokens.
"""

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lit_swa.checkpoint import check_checkpoint_dir, load_model
from lit_swa.checks import check_range
from lit_swa.config import VARIANTS, Config, Part
from lit_swa.expert_formats import each_expert
from lit_swa.fast_decode import compile_decode
from lit_swa.formats.checkpoint import tokenizer_dir
from lit_swa.formats.download import find_checkpoint
from lit_swa.formats.tokenizer import Tokenizer
from lit_swa.generate import (
    Sampler,
    Sampling,
    Session,
    Stats,
    StopFinder,
    calm,
    check_prompt,
    context_of,
    draw,
    non_finite,
    token_stops,
    why_cut,
)
from lit_swa.linear_formats import dense_weight, is_experts, pack_for_cpu, weighty_layers
from lit_swa.model import GPT, KVCache, Slots, SoftmaxAttention
from lit_swa.rope import Span
from lit_swa.speed import mark, seconds_between, step_bytes
from lit_swa.utils import wait_for
from lit_swa.weight_only import Int4Linear, Int8Linear, round_groups

SELF_DRAFTS = ("streaming", "self-int4", "streaming-int4")
SPECULATIVE_K = 1, 64  # least and most tokens that are proposed at a time
Step = Callable[[Tensor, Tensor], Tensor]  # (idx (B, T), input_pos (T,) or (B, T)) -> logits (B, T, V or more)

# ---------------------------------------------------------------------------------------------------- accept and refuse


def accept(logits: Tensor, tokens: Tensor, q: Tensor | None, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """How many of the proposed tokens (B, k) stay, (B, 1), and the token that follows them, (B, 1).

    logits: (B, k + 1, V), the target's: of each proposed token, and of what follows them all.
    q: (B, k, V), the distributions that the tokens were drawn from; None where nothing was drawn.
    """
    seen, sampling, k = seen_along(sampler.seen, tokens), sampler.sampling, tokens.size(1)
    if sampling.temperature == 0:
        likeliest = sampling.penalize(logits.float(), seen).argmax(dim=-1)  # (B, k + 1)
        accepted = leading(tokens == likeliest[:, :k])
        return accepted, likeliest.gather(1, accepted)
    p = sampling.distribution(logits.flatten(0, 1), None if seen is None else seen.flatten(0, 1)).view(logits.shape)
    q = F.one_hot(tokens, p.size(-1)).float() if q is None else q
    p_of, q_of = (x[:, :k].gather(2, tokens[:, :, None])[:, :, 0] for x in (p, q))  # (B, k)
    accepted = leading(torch.rand(p_of.shape, device=p.device, generator=sampler.generator) * q_of < p_of)
    p, q = (x.gather(1, accepted[:, :, None].expand(-1, -1, x.size(-1)))[:, 0] for x in (p, F.pad(q, (0, 0, 0, 1))))
    rest = (p - q).clamp(min=0)  # (B, V); behind k accepted tokens q is 0
    rest = torch.where(rest.sum(dim=-1, keepdim=True) > 0, rest, p)  # p = q but for rounding
    return accepted, draw(rest, sampler.generator)


def leading(right: Tensor) -> Tensor:
    """How many of each row (B, k) are True before the first that is not, (B, 1)."""
    return right.long().cumprod(dim=1).sum(dim=1, keepdim=True)


def seen_along(seen: Tensor | None, tokens: Tensor) -> Tensor | None:
    """The tokens that each sequence holds, (B, V), before each proposed token (B, k) and behind them: (B, k + 1, V)."""
    if seen is None:
        return None
    along = [seen]
    for i in range(tokens.size(1)):
        along.append(along[-1].scatter(1, tokens[:, i : i + 1], True))
    return torch.stack(along, dim=1)


# ------------------------------------------------------------------------------------------------------------ sequences


class Rows:
    """B sequences as the device knows them: how long they are is never asked by the host."""

    def __init__(self, sampler: Sampler, newest: Tensor, lengths: Tensor) -> None:
        """newest: (B, 2), the last two tokens of each sequence, of `lengths` (B, 1) tokens: at least two."""
        self.sampler, self.newest, self.length = sampler, newest, lengths
        self.live = [True] * newest.size(0)  # False for a sequence that has ended
        self.going = torch.ones_like(lengths, dtype=torch.bool)  # the same, on the device

    def positions(self, first: int, n: int) -> Tensor:
        """n positions from length + first on: (B, n), negative for sequences that have ended; (n,) for a single one."""
        pos = self.length + torch.arange(first, first + n, device=self.length.device)
        return pos[0] if len(self.live) == 1 else pos.where(self.going, -1)

    def advance(self, tokens: Tensor, accepted: Tensor) -> None:
        """Go on with the first accepted + 1 (B, 1) of the tokens (B, k + 1)."""
        if self.sampler.seen is not None:
            order = torch.arange(tokens.size(1), device=tokens.device)
            taken = torch.where(order <= accepted, tokens, tokens.gather(1, accepted))
            self.sampler.seen.scatter_(1, taken, True)
        last_two = accepted + torch.arange(1, 3, device=tokens.device)
        self.newest = torch.cat([self.newest, tokens], dim=1).gather(1, last_two)
        self.length = self.length + accepted + 1

    def end(self, ended: list[bool]) -> None:
        """Nothing more is fed to the sequences that have ended."""
        if ended != [not live for live in self.live]:
            self.live = [not e for e in ended]
            self.going = to_device(self.live, self.going.device)[:, None]


def to_device(values: list, device: torch.device) -> Tensor:
    """A tensor of host values on the device, which the host does not wait for."""
    tensor = torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def run_step(model: GPT, decode: Step | None, idx: Tensor, input_pos: Tensor) -> Tensor:
    """Logits (B, T, V) of idx (B, T): by the compiled step where it takes so many tokens, or by the model."""
    short = decode is not None and idx.size(1) <= getattr(decode, "most_tokens", 1)
    return (decode if short else model)(idx, input_pos)[..., : model.config.vocab_size]


# --------------------------------------------------------------------------------------------------------------- drafts


class Draft:
    """What proposes tokens. Which ones decides only how many of them are accepted."""

    model: GPT | None = None  # what it calls
    context = math.inf  # tokens that a sequence may have when it proposes some

    def check(self, target: GPT, longest: int) -> None:
        """Raises ValueError for a target, or a longest prompt, that it does not fit."""

    def start(self, target: Session, sequences: list[list[int]], tokens: int) -> None:
        """Begin with these prompts. target: the session that has read them; tokens: how long the texts may become."""

    def propose(self, rows: Rows, k: int) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, k), or (B, 0) where there is nothing to propose, and the distributions (B, k, V) that they were
        drawn from; None for tokens that were not drawn."""
        raise NotImplementedError

    def extend(self, new: list[list[int]]) -> None:
        """Take note that the sequences went on with these tokens."""


def propose(feed: Step, rows: Rows, k: int, first: int) -> tuple[Tensor, Tensor | None]:
    """k tokens of a model, one after the other; the first call feeds the newest `first` tokens of each sequence."""
    sampler, seen = rows.sampler, rows.sampler.seen
    token, tokens, q = rows.newest[:, -first:], [], []
    for i in range(k):
        n = token.size(1)
        logits = feed(token, rows.positions(i - n, n))[:, -1]  # (B, V)
        with calm(logits):
            if sampler.sampling.temperature == 0:
                token = sampler.sampling.penalize(logits.float(), seen).argmax(dim=-1, keepdim=True)
            else:
                q.append(sampler.sampling.distribution(logits, seen))
                token = draw(q[-1], sampler.generator)
            seen = None if seen is None else seen.scatter(1, token, True)
        tokens.append(token)
    return torch.cat(tokens, dim=1), torch.stack(q, dim=1) if q else None


class ModelDraft(Draft):
    """Another, smaller model with caches of its own."""

    def __init__(self, session: Session, vocab_size: int | None = None) -> None:
        """session: of the draft, with a lookahead of at least k. Its decode step should take two tokens.
        vocab_size: how many tokens both models know, where their configs are padded to different numbers.
        """
        self.session, self.model, self.vocab_size = session, session.model, vocab_size
        self.context = context_of(session.model)

    def check(self, target: GPT, longest: int) -> None:
        sizes = self.model.config.vocab_size, target.config.vocab_size
        self.target_size = sizes[1]
        if self.vocab_size is None and sizes[0] != sizes[1]:
            raise ValueError(
                f"The draft's vocabulary has {sizes[0]} tokens and the target's {sizes[1]}: give a draft with the "
                "target's tokenizer."
            )
        if longest > self.context:
            raise ValueError(
                f"The prompt has {longest} tokens and the draft's context {self.context}: give a shorter prompt, or "
                "another draft, such as --draft lookup."
            )

    def start(self, target: Session, sequences: list[list[int]], tokens: int) -> None:
        self.session.reset()
        self.session.reserve(int(min(tokens, self.context)))
        most = self.model.config.vocab_size - 1
        self.session.read([[min(i, most) for i in ids] for ids in sequences])

    def propose(self, rows: Rows, k: int) -> tuple[Tensor, Tensor | None]:
        # The last but one is new to the draft where all its tokens were accepted; else it is fed once more.
        return propose(self.feed, rows, k, first=2)

    def feed(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        idx = idx.clamp(max=self.model.config.vocab_size - 1)  # a token that only the target has is another one here
        logits = run_step(self.model, self.session.decode, idx, input_pos)[..., : self.vocab_size]
        return F.pad(logits, (0, self.target_size - logits.size(-1)), value=-torch.inf)  # no token of the draft's


class SelfDraft(Draft):
    """The target itself, made cheaper: a copy that shares its weights and reads and writes the target's own caches.

    So the draft has nothing to read beforehand, sees the target's exact keys of all tokens before the newest one, and
    takes no memory for keys. It writes its own, which are not exact, only where the target's next call writes too.
    """

    def __init__(self, model: GPT, decode: Step | None = None) -> None:
        """model: made by streaming_copy or int4_copy. decode: its compiled step, of one token."""
        self.model, self.decode = model, decode

    def start(self, target: Session, sequences: list[list[int]], tokens: int) -> None:
        borrow_caches(self.model, target.model)

    def propose(self, rows: Rows, k: int) -> tuple[Tensor, Tensor | None]:
        return propose(self.feed, rows, k, first=1)

    def feed(self, idx: Tensor, input_pos: Tensor) -> Tensor:
        return run_step(self.model, self.decode, idx, input_pos)


class Lookup(Draft):
    """Prompt look-up (Saxena 2023): where the longest suffix of the text occurred before, what followed is proposed.

    No model is called. The newest occurrence counts, and each token takes the same time however long the text is.
    """

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        """longest, shortest: the tokens of the suffixes that are looked for."""
        check_range("shortest", shortest, 1, longest)
        self.sizes = range(longest, shortest - 1, -1)

    def start(self, target: Session, sequences: list[list[int]], tokens: int) -> None:
        self.texts: list[list[int]] = [[] for _ in sequences]
        self.followed: list[dict[tuple[int, ...], int]] = [{} for _ in sequences]  # a run -> where what follows begins
        self.extend(sequences)

    def extend(self, new: list[list[int]]) -> None:
        for text, followed, tokens in zip(self.texts, self.followed, new, strict=True):
            for token in tokens:
                for n in self.sizes:
                    if n <= len(text):
                        followed[tuple(text[-n:])] = len(text)
                text.append(token)

    def propose(self, rows: Rows, k: int) -> tuple[Tensor, Tensor | None]:
        found = [self.look_up(row, k) if live else None for row, live in enumerate(rows.live)]
        k = k if any(found) else 0
        tokens = [ids or text[-1:] * k for ids, text in zip(found, self.texts, strict=True)]
        return to_device(tokens, rows.length.device).view(len(tokens), k).long(), None

    def look_up(self, row: int, k: int) -> list[int] | None:
        text, followed = self.texts[row], self.followed[row]
        starts = (followed.get(tuple(text[-n:])) for n in self.sizes)
        start = next((at for at in starts if at is not None), None)
        if start is None:
            return None
        period = len(text) - start  # where the text ends, it goes on as it would if it repeated itself
        return [text[start + i % period] for i in range(k)]


def check_request(checkpoint_dir: Path | None, kind: str | None, k: int, window: int) -> None:
    """Raises ValueError for a draft that cannot be, before any model is loaded."""
    check_range("speculative_k", k, *SPECULATIVE_K)
    check_range("draft_window", window, 1, 2**31)
    if checkpoint_dir is not None and kind is not None:
        raise ValueError(f"--draft {kind} and --draft_checkpoint_dir are two drafts: give one of them.")


def make_draft(kind: str, target: GPT, window: int, compile: bool = False) -> Draft:
    """The draft of a name that --draft takes. Its model is made of the target as it is by then: packed, or compiled."""
    if kind == "lookup":
        return Lookup()
    if kind not in SELF_DRAFTS:
        raise ValueError(f"There is no draft called {kind!r}: choose from lookup, {', '.join(SELF_DRAFTS)}.")
    model = int4_copy(target) if "int4" in kind else target
    model = streaming_copy(model, window) if "streaming" in kind else model
    return SelfDraft(model, compile_decode(model) if compile else None)


def load_draft(checkpoint_dir: Path, tokenizer: Tokenizer, k: int, compile: bool, target: GPT) -> ModelDraft:
    """The model of a checkpoint, on the target's device and in its dtype.

    Raises ValueError when its tokenizer is not the target's, and what loading raises.
    """
    checkpoint_dir = find_checkpoint(checkpoint_dir)
    check_checkpoint_dir(checkpoint_dir)
    check_tokenizers(tokenizer, Tokenizer(tokenizer_dir(checkpoint_dir)))
    weight = target.transformer.wte.weight
    model = load_model(checkpoint_dir, dtype=weight.dtype, device=weight.device)
    decode = compile_decode(model, tokens=2) if compile else None
    if decode is None:
        pack_for_cpu(model)
    sizes = tokenizer.vocab_size, model.config.vocab_size, target.config.vocab_size
    return ModelDraft(Session(model, lookahead=k, decode=decode), min(sizes))


def check_tokenizers(target: Tokenizer, draft: Tokenizer) -> None:
    """Raises ValueError unless both give every token the same number."""
    for i in range(max(target.vocab_size, draft.vocab_size)):
        ours, theirs = target.id_to_token(i), draft.id_to_token(i)
        if ours != theirs:
            raise ValueError(
                f"The draft's tokenizer is another than the target's (token {i} is {theirs!r}, and there {ours!r}): "
                "give a draft of the same family, or --draft lookup."
            )


def warm_up(session: Session, draft: Draft, k: int, tokens: int) -> float:
    """Compile what a round calls, with room for so many tokens; returns the seconds that it took."""
    started = time.perf_counter()
    prompts = [[0] * min(8, tokens)] * session.batch_size
    count = min(max(1, tokens - len(prompts[0])), 10**9)
    rounds = speculate(session, prompts, draft, speculative_k=k, max_new_tokens=count)
    for _ in itertools.islice(rounds, 5):  # a step is recorded when it has run a few times
        pass
    rounds.close()
    wait_for(session.device)
    session.reset()
    return time.perf_counter() - started


# --------------------------------------------------------------------------- a model that shares another one's weights


def share_modules(module: Any) -> Any:
    """A copy of a module and all in it that holds the same tensors. Code that was compiled into it stays behind."""
    own = copy.copy(module)
    own.__dict__.pop("forward", None)
    own._parameters, own._buffers = dict(module._parameters), dict(module._buffers)
    own._modules = {name: child and share_modules(child) for name, child in module._modules.items()}
    return own


def share_weights(target: GPT) -> GPT:
    """A copy of the target that has its weights and no caches yet."""
    model = share_modules(target)
    for attn in model.layers:
        attn.kv_cache = None
    return model


def with_injected(module: nn.Module, replaced: nn.Module) -> nn.Module:
    """The module with the LoRA or adapter of the one that it takes the place of."""
    module._forward_hooks, module.training = replaced._forward_hooks, replaced.training
    module._modules.update(replaced._modules)
    return module


def int4_copy(target: GPT, group_size: int = 32) -> GPT:
    """The target with the linear layers and experts of its blocks rounded to 4 bits, in groups of so many inputs; to 8
    bits the last layer, and those whose inputs the groups do not divide. It shares the rest."""
    model = share_weights(target)

    def rounded(linear: nn.Module, name: str = "") -> nn.Module:
        weight = dense_weight(linear).detach().float()
        if name.startswith("lm_head") or linear.in_features % group_size:
            return Int8Linear.from_weight(weight, linear.bias)
        return Int4Linear.from_codes(*round_groups(weight, group_size), linear.bias)

    for name, layer in weighty_layers(model).items():
        if is_experts(layer):
            model.set_submodule(name, each_expert(layer, rounded))
        else:
            model.set_submodule(name, with_injected(rounded(layer, name), layer))
    return model


def recent_or_sink(q_pos: Tensor, k_pos: Tensor, config: Config) -> Tensor:
    """Who sees whom in the streaming draft. Unlike the variant "streaming", at the distances of the target's text: the
    cached keys are rotated to these."""
    return (q_pos - k_pos < config.sliding_window_size) | (k_pos < config.n_sink_tokens)


STREAMING_DRAFT = VARIANTS["streaming"]._replace(parts=(Part(recent_or_sink),), edges=None)


def streaming_copy(target: GPT, window: int, n_sinks: int = 4) -> GPT:
    """The target with its weights, whose layers of full attention see `n_sinks` first tokens and `window` recent ones
    (MagicDec, Chen et al. 2024, arXiv 2408.11049). Its other layers see what the target's do.

    Raises ValueError for a target without such layers: a draft that reads as much as the target is of no use.
    """
    check_range("draft_window", window, 1)
    if target.rope.depends_on_length():
        raise ValueError(
            "The streaming draft reads keys as the target caches them, and a RoPE scaling that depends on the text's "
            "length rotates them later: use --draft lookup or --draft self-int4."
        )
    plain = {"layer_windows": None, "rolling_kv_cache": False, "rope_local_base_freq": None, "s2_attention": False}
    plain |= {"prompt_attention": None}  # the target reads the prompt
    config = replace(target.config, attention="streaming", sliding_window_size=window, n_sink_tokens=n_sinks, **plain)
    model = share_weights(target)
    layers = [attn for attn in model.layers if attn.mixer.variant == "full"]
    if not layers:
        raise ValueError(
            f"The streaming draft takes the place of full attention, and this model's is {target.config.attention!r}: "
            "use --draft lookup or --draft self-int4."
        )
    for attn in layers:
        own = SoftmaxAttention(config, "streaming", attn.mixer.layer)
        own.sink_logits = attn.mixer.sink_logits
        attn.mixer = with_injected(own, attn.mixer)
        attn.mixer.kind, attn.mixer.row = f"{attn.mixer.kind}, a draft", STREAMING_DRAFT
    return model


def borrow_caches(draft: GPT, target: GPT) -> None:
    """Let every layer of a copy of the target read and write the target's caches."""
    draft.cache_batch_size, draft.max_seq_length = target.cache_batch_size, target.max_seq_length
    draft.lookahead = target.lookahead
    for own, attn in zip(draft.layers, target.layers, strict=True):
        if own.mixer.kind == attn.mixer.kind:
            own.kv_cache = attn.kv_cache
        elif own.kv_cache is None or own.kv_cache.k is not attn.kv_cache.k:  # a step is recorded for the caches it had
            own.kv_cache = share_modules(attn.kv_cache)
            own.kv_cache.slots = WindowOfSlots(attn.kv_cache, own.mixer.n_sinks)


class WindowOfSlots(Slots):
    """The slots of a dense cache, for a layer that reads the sinks and a window of them, wherever the sequences are.

    A step of cpu_decode.py reads all slots under masks, and by itself only those that the masks show.
    """

    def __init__(self, cache: KVCache, n_sinks: int) -> None:
        nn.Module.__init__(self)
        held = cache.slots
        self.window, self.lookahead, self.copies = None, held.lookahead, 1
        self.sinks = min(n_sinks, held.n_slots)
        self.n_slots = held.n_slots - self.sinks
        self.register_buffer("pos", held.pos, persistent=False)

    def exchange(self, pos: Tensor, span: Span, window: int | None) -> Any:
        if span.first is None and (span.looked or pos.device.type != "cpu"):
            span = span._replace(contiguous=False, looked=True)  # each sequence's window is gathered
        return super().exchange(pos, span, window)


# --------------------------------------------------------------------------------------------------------------- rounds


@dataclass
class SpeculativeStats(Stats):
    """What a run did, summed over its sequences. A decode step is a new token, whichever round it came in."""

    rounds: int = 0
    row_rounds: int = 0  # rounds times the sequences that went on in them
    proposed: int = 0
    accepted: int = 0
    refused: int = 0  # one in a round at most: what was proposed behind it is not judged
    draft_calls: int = 0  # of a model
    draft_seconds: float = 0.0
    draft_model: GPT | None = None

    def count_round(self, tokens: int, seconds: float) -> None:
        """Count the new tokens of a round, as `count` does one."""
        more, begun = max(0, tokens - 1), self.new_tokens > 0  # those after the first came with it
        if tokens:
            self.count(seconds)
        self.new_tokens, self.decode_steps = self.new_tokens + more, self.decode_steps + more * begun

    def line(self, model: GPT, text: str | None = None) -> str:
        tokens = (self.accepted + self.row_rounds) / max(1, self.row_rounds)
        rate = f"accepted {self.accepted} of {self.proposed} ({self.accepted / max(1, self.proposed):.0%})"
        share = self.draft_seconds / max(self.decode_seconds, 1e-9)
        speculative = f"{rate} | {tokens:.2f} tokens a round, {self.rounds} rounds | draft {share:.0%} of the time"
        first, *others = super().line(model, text).split("\n")
        return "\n".join([first, speculative, *others])

    def bytes_decoded(self, model: GPT) -> float:
        lengths = self.prompt_tokens + 1, self.prompt_tokens + self.decode_steps
        if not self.rounds or model.cache_batch_size != 1:  # how long several sequences are is not known here
            return 0
        of_draft = self.draft_calls and self.draft_calls * step_bytes(self.draft_model, *lengths)
        return of_draft + self.rounds * step_bytes(model, *lengths)


class Speculation:
    """Rounds of a draft and a target over B sequences."""

    def __init__(self, target: Session, draft: Draft, rows: Rows, accept: Callable[..., Any] = accept) -> None:
        """target: a session whose caches hold all but the newest token of each of the rows."""
        self.target, self.draft, self.rows, self.accept = target, draft, rows, accept
        self.rounds = 0

    def round(self, k: int) -> Tensor:
        """Propose k tokens and judge them, or 0: plain decoding. Returns what report_round gives, on the device: the
        host has not waited for it."""
        rows, self.rounds = self.rows, self.rounds + 1
        self.began = mark(rows.length.device)
        tokens, q = self.draft.propose(rows, k) if k else (rows.newest[:, :0], None)
        self.proposed, k = mark(rows.length.device), tokens.size(1)
        idx = torch.cat([rows.newest[:, 1:], tokens], dim=1)  # (B, k + 1)
        logits = run_step(self.target.model, self.target.decode, idx, rows.positions(-1, k + 1))
        with calm(logits):
            accepted, following = self.accept(logits, tokens, q, rows.sampler)  # (B, 1) each
            new = F.pad(tokens, (0, 1)).scatter(1, accepted, following)  # (B, k + 1)
            rows.advance(new, accepted)
            return report_round(new, accepted, k, logits)

    def draft_seconds(self) -> float:
        """How long the last round's draft took. The host must have read the round."""
        return seconds_between(self.began, self.proposed)


def report_round(tokens: Tensor, accepted: Tensor, k: int, logits: Tensor) -> Tensor:
    """What the host reads of a round: of each sequence the new tokens (B, k + 1), of which the first accepted + 1
    count; accepted (B, 1); k; and 1 if its logits (B, k + 1, V) are finite."""
    finite = logits.sum(dim=(1, 2), dtype=torch.float32)[:, None].isfinite()  # no sum is, unless they all are
    return torch.cat([tokens, accepted, torch.full_like(accepted, k), finite.long()], dim=1)


class Text:
    """A sequence as the host knows it: its tokens, and where it ends."""

    def __init__(self, ids: list[int], count: int, stops: list[list[int]]) -> None:
        """count: how many new tokens it gets at most."""
        self.ids, self.count, self.end = list(ids), count, len(ids) + count
        self.stops, self.stopped = StopFinder(stops, empty=[]), False

    @property
    def ended(self) -> bool:
        return self.stopped or len(self.ids) >= self.end

    def take(self, tokens: list[int]) -> list[int]:
        """Go on with tokens, as far as the text goes; returns those that can be passed on."""
        passed = []
        for token in tokens:
            if not self.ended:
                self.ids.append(token)
                released, self.stopped = self.stops.push([token])
                passed += released + (self.held() if self.ended else [])
        return passed

    def held(self) -> list[int]:
        """At the text's end, the tokens that might have become a stop."""
        return [] if self.stopped else self.stops.held


class Limits(NamedTuple):
    """How far a run goes."""

    k: int  # proposed tokens in a round
    context: float  # tokens that can be fed
    room: int  # how long the texts may become in the caches


def speculate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    draft: Draft,
    *,
    speculative_k: int = 4,
    max_new_tokens: int = 64,
    stop_tokens: Iterable[int | Sequence[int]] = (),
    sampling: Sampling | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
    stats: SpeculativeStats | None = None,
) -> Iterator[list[list[int]]]:
    """Yield the new tokens of B texts, round by round: a list for each text, empty for one that has ended.

    session: Session(target, batch_size=B, lookahead=at least speculative_k). Afterwards it holds the texts, except for
        the last token of each. One of a single text keeps what it holds of the prompt.
    speculative_k: how many tokens the draft proposes in a round.
    Other arguments are those of lit_swa.generate.generate, and so is where a text ends. Raises ValueError, at the call,
    for arguments that do not fit.
    """
    model, k, sampling, stats = session.model, speculative_k, sampling or Sampling(), stats or SpeculativeStats()
    prompts = [[int(i) for i in ids] for ids in prompts]
    check_range("speculative_k", k, *SPECULATIVE_K)
    check_range("max_new_tokens", max_new_tokens, 0, 10**9)
    for ids in prompts:
        check_prompt(model, ids, max_new_tokens)
    draft.check(model, max(map(len, prompts), default=0))
    if len(prompts) != session.batch_size or session.lookahead < k:
        raise ValueError(
            f"The session has {session.batch_size} rows and a lookahead of {session.lookahead}: give it one row for "
            f"each of the {len(prompts)} prompts, and a lookahead of {k} at least."
        )
    stats.draft_model, stats.prompt_tokens = draft.model, sum(len(ids) for ids in prompts)
    stats.cached_tokens = session.keep_prefix(prompts[0]) if len(prompts) == 1 else session.reset() or 0
    context, longest = context_of(model), max(len(ids) for ids in prompts)
    limits = Limits(k, context, int(min(longest + max_new_tokens + k, context)))
    session.reserve(limits.room)
    stops = token_stops(stop_tokens)
    texts = [Text(ids, int(min(max_new_tokens, context + 1 - len(ids))), stops) for ids in prompts]
    sampler = Sampler(sampling, prompts, model.config.vocab_size, session.device)
    return decode_rounds(session, draft, texts, sampler, limits, should_stop, progress, stats)


@torch.inference_mode()
def decode_rounds(
    session: Session,
    draft: Draft,
    texts: list[Text],
    sampler: Sampler,
    limits: Limits,
    should_stop: Callable[[], bool] | None,
    progress: Callable[[int, int], None] | None,
    stats: SpeculativeStats,
) -> Iterator[list[list[int]]]:
    """The loop of speculate: read the prompts, choose the first tokens as plain decoding does, go round by round."""
    started, k = time.perf_counter(), limits.k
    prompts = [list(text.ids) for text in texts]
    logits = session.read([ids[stats.cached_tokens :] for ids in prompts], should_stop=should_stop, progress=progress)
    if logits is None:
        return
    draft.start(session, prompts, limits.room)
    wait_for(session.device)
    stats.prefill_seconds = time.perf_counter() - started
    if all(text.ended for text in texts):
        return
    run, report = begin(session, draft, prompts, sampler, logits)
    try:
        while True:
            rows = report.tolist()  # only here the host waits for the device
            yield read_round(run, texts, rows, time.perf_counter() - started, stats)
            if all(text.ended for text in texts):
                break
            if should_stop is not None and should_stop():
                yield [[] if text.ended else text.held() for text in texts]
                break
            session.reserve(limits.room)  # raises if another session took the caches since
            started = time.perf_counter()
            longest = max(len(text.ids) for text in texts if not text.ended)
            if longest + k > min(limits.context, draft.context + 1):
                k = 0  # from here on to the end
            run.rows.end([text.ended for text in texts])
            report = run.round(k)
    finally:
        session.hold([text.ids[:-1] for text in texts], ahead=session.lookahead)
        if texts[0].ended and not texts[0].stopped:
            stats.cut = why_cut(session, texts[0].count)


def begin(
    session: Session, draft: Draft, prompts: list[list[int]], sampler: Sampler, logits: Tensor
) -> tuple[Speculation, Tensor]:
    """The first token of each text, chosen from the logits (B, 1, V) that follow its prompt, reported as by a round."""
    token = sampler.choose(logits[:, -1])  # (B, 1)
    lengths = to_device([[len(ids) + 1] for ids in prompts], session.device)
    newest = torch.cat([to_device([ids[-1:] for ids in prompts], session.device), token], dim=1)  # (B, 2)
    run = Speculation(session, draft, Rows(sampler, newest, lengths))
    return run, report_round(token, torch.zeros_like(token), 0, logits)


def read_round(
    run: Speculation, texts: list[Text], rows: list[list[int]], seconds: float, stats: SpeculativeStats
) -> list[list[int]]:
    """What can be passed on of the new tokens of a round, as the device reported it."""
    passed, new = [], []
    for text, (*tokens, accepted, proposed, finite) in zip(texts, rows, strict=True):
        before, going = len(text.ids), not text.ended
        if going and not finite:
            raise non_finite(run.target.model)
        passed.append(text.take(tokens[: accepted + 1]))
        new.append(text.ids[before:])
        if going and run.rounds:
            stats.row_rounds, stats.proposed = stats.row_rounds + 1, stats.proposed + proposed
            stats.accepted, stats.refused = stats.accepted + accepted, stats.refused + (accepted < proposed)
    stats.count_round(sum(map(len, new)), seconds)
    if run.rounds:  # else it is the first token, which plain decoding chose
        stats.rounds += 1
        stats.draft_seconds += run.draft_seconds()
        stats.draft_calls += rows[0][-2] if run.draft.model is not None else 0
    run.draft.extend(new)
    return passed


def speculative_generate(
    model: GPT,
    prompt_ids: Sequence[int] | Tensor,
    *,
    draft: Draft,
    speculative_k: int = 4,
    session: Session | None = None,
    decode: Step | None = None,
    **arguments: Any,
) -> Iterator[int]:
    """lit_swa.generate.generate with a draft: yield the new tokens of one text. arguments: as of speculate."""
    ids = prompt_ids.flatten().tolist() if isinstance(prompt_ids, Tensor) else list(prompt_ids)
    session = session or Session(model, lookahead=speculative_k, decode=decode)
    rounds = speculate(session, [ids], draft, speculative_k=speculative_k, **arguments)
    return (token for (tokens,) in rounds for token in tokens)
