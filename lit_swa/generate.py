"""Text from a model: how a token is chosen (Sampling), what the caches hold (Session), and the loop (generate).

Shapes: B batch, T tokens of one call, V vocab_size, C n_embd. `generate` works on token ids, `generate_text` on text.
"""

import functools
import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_swa.checks import check_range
from lit_swa.config import Config
from lit_swa.formats.tokenizer import StreamDecoder, Tokenizer
from lit_swa.linear_formats import gpu_kernels
from lit_swa.machine import few_threads
from lit_swa.memory import free_memory, require_memory
from lit_swa.model import GPT
from lit_swa.noise import row_noise
from lit_swa.speed import StepTrace, memory_line, step_bytes
from lit_swa.utils import format_rate, wait_for

# ------------------------------------------------------------------------------------------------------------- sampling

FEW_LOGITS = 2**20  # of which one thread of a CPU chooses a token as fast as several
LIKELIEST = 256, 4096  # tokens to order: on a CPU 40 and 7 times as fast as ordering a vocabulary of 49152
LIMITS = {  # field of Sampling -> least and greatest value, both allowed
    "temperature": (0, 1e4),
    "top_k": (1, 10**9),
    "top_p": (1e-9, 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-3, 1e3),
    "seed": (-(2**63), 2**63),
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The rules apply in the order of penalty, temperature, top_k, top_p, min_p.

    temperature: 0 takes the likeliest token; any other value divides the logits.
    top_k: draw among the k likeliest tokens; None: among all.
    top_p: draw among the fewest tokens, likeliest first, whose probabilities reach top_p (Holtzman et al. 2020,
        arXiv 1904.09751).
    min_p: draw among the tokens at least min_p times as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082).
    repetition_penalty: a token that the text holds already has its logit divided by this if it is positive, and
        multiplied if it is negative (Keskar et al. 2019, arXiv 1909.05858).
    seed: the same seed draws the same tokens; None: draw from torch's global generator.
    Raises ValueError for a value that does not fit.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in LIMITS.items():
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), least, most)

    def distribution(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """The probabilities (B, V), float32, that the next token is drawn with, from logits (B, V).

        seen: (B, V) bool, the tokens that each sequence holds already; None: nothing is penalized.
        A pure function of its arguments. With temperature 0 the likeliest token has probability 1.
        """
        logits = self.penalize(logits.float(), seen)
        if self.temperature == 0:
            return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).float()
        logits = logits / self.temperature
        if self.top_k is not None:
            kth = logits.topk(min(self.top_k, logits.size(-1)), dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p < 1.0:
            logits = logits.masked_fill(beyond_top_p(logits, self.top_p), -torch.inf)
        if self.min_p > 0.0:
            p = logits.softmax(dim=-1)
            logits = logits.masked_fill(p < self.min_p * p.amax(dim=-1, keepdim=True), -torch.inf)
        return logits.softmax(dim=-1)

    def choose(self, logits: Tensor, noise: Tensor | None, seen: Tensor | None = None) -> Tensor:
        """The next tokens (B, 1) for logits (B, V): those that win the exponential race with the numbers noise (B, V),
        as `draw` says; with temperature 0, where noise is None, the likeliest."""
        kernels = gpu_kernels("sampling_kernel") if logits.device.type == "cuda" and self.top_p == 1.0 else None
        if kernels is not None:
            logits = logits if seen is None else self.penalize(logits.float(), seen)
            return kernels.choose_tokens(logits, noise, self.temperature, self.top_k, self.min_p)
        if noise is None:  # the argmax of `distribution`, without making one
            return self.penalize(logits.float(), seen).argmax(dim=-1, keepdim=True)
        return (self.distribution(logits, seen) / noise).argmax(dim=-1, keepdim=True)

    def penalize(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """The logits (B, V) with the repetition penalty on the tokens of seen (B, V)."""
        if seen is None or self.repetition_penalty == 1.0:
            return logits
        penalty = self.repetition_penalty
        return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def beyond_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Which tokens of logits (B, V) are not among the fewest, likeliest first, whose probabilities reach top_p."""
    size, total = logits.size(-1), logits.logsumexp(dim=-1, keepdim=True)
    few = LIKELIEST if logits.device.type == "cpu" else ()  # to look how far they reach would cost a GPU more
    for n in (*(n for n in few if n < size), size):
        ordered, order = logits.topk(n) if n < size else logits.sort(dim=-1, descending=True)
        p = (ordered - total).exp()
        before = p.cumsum(dim=-1) - p  # of the likelier tokens; 0 for the first, which always stays
        if n == size or bool((before[..., -1] >= top_p).all()):
            break
    return torch.ones_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A token (B, 1) for each sequence's probabilities (B, V).

    argmax(p / e) with e exponentially distributed is a draw from p (the exponential race), and it does not make the
    host wait for the GPU, as torch.multinomial does.
    """
    noise = torch.empty_like(probabilities).exponential_(1, generator=generator)
    return (probabilities / noise).argmax(dim=-1, keepdim=True)


def calm(logits: Tensor) -> AbstractContextManager:
    """Where tokens are chosen on a CPU: one thread, which leaves none that spins on a core of the next step."""
    few = logits.device.type == "cpu" and logits.numel() < FEW_LOGITS
    return few_threads(1) if few else nullcontext()


class Sampler:
    """Chooses token after token of a batch: a Sampling, its random numbers, and the tokens that the sequences hold."""

    def __init__(
        self, sampling: Sampling, sequences: Sequence[Sequence[int]], vocab_size: int, device: torch.device | str
    ) -> None:
        """sequences: the ids of B sequences, up to where the first tokens are chosen."""
        self.sampling = sampling
        self.generator = None if sampling.seed is None else torch.Generator(device).manual_seed(sampling.seed)
        self.noise = row_noise(len(sequences), device) if torch.device(device).type == "cuda" else None
        for row in range(len(sequences) if self.noise is not None else 0):
            self.noise.begin(row, None if sampling.seed is None else sampling.seed + row)
        self.seen = None  # (B, V) bool, only where a penalty needs it
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(len(sequences), vocab_size, dtype=torch.bool, device=device)
            for row, ids in zip(self.seen, sequences, strict=True):
                row[[i for i in set(ids) if i < vocab_size]] = True

    def choose(self, logits: Tensor) -> Tensor:
        """The next tokens (B, 1) for logits (B, V); they count as tokens of the sequences from now on."""
        with calm(logits):
            noise = None
            if self.sampling.temperature > 0 and self.noise is not None:
                noise = self.noise.draw(slice(None), logits.size(-1))
            elif self.sampling.temperature > 0:
                noise = torch.empty_like(logits, dtype=torch.float32).exponential_(1, generator=self.generator)
            token = self.sampling.choose(logits, noise, self.seen)
            if self.seen is not None:
                self.seen.scatter_(1, token, True)
            return token


# -------------------------------------------------------------------------------------------------------------- session

# model -> the ticket of the session whose tokens its caches hold, so that no session reads those of another
OWNERS: "weakref.WeakKeyDictionary[GPT, object]" = weakref.WeakKeyDictionary()
Ids = Sequence[int] | Sequence[Sequence[int]] | Tensor  # what a session is fed: (T,) or (B, T)
SMALLEST_CHUNK = 128  # so many tokens are fed in one call, however little memory there is
SHOWN_CHUNK = 1024  # tokens that a CPU is fed in one call where somebody waits for the next sign of progress


class Session:
    """B sequences, fed to a model in step, with their positions and the caches that hold them.

        session = Session(model)
        logits = session.feed(prompt)  # (1, 1, V)
        logits = session.feed([token])
        session.take_back(1)  # as if the token had never been fed

    The session sets up the model's caches when it needs them, and enlarges them when its sequences outgrow them. A
    model has one set of caches: when another session is fed, this one has lost its tokens, and feeding it again raises.
    """

    def __init__(
        self,
        model: GPT,
        batch_size: int = 1,
        *,
        lookahead: int = 0,
        chunk_size: int | None = None,
        decode: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        """Caches are set up by the first `feed` or `reserve`, not here.

        batch_size: B, the sequences that are fed together.
        lookahead: how many tokens a rolling cache must be able to take back; a dense cache can take back any number.
        chunk_size: how many tokens of a sequence to feed in one call; None: as many as fit the free memory.
        decode: feeds few tokens to each sequence, as a compiled step does (compile_decode): (idx (B, T), input_pos
            (T,) or (B, T)) -> logits (B, T, padded_vocab_size), for up to decode.most_tokens tokens, or one. None: the
            model does it.
        """
        check_range("batch_size", batch_size, 1)
        check_range("lookahead", lookahead, 0)
        if chunk_size is not None:
            check_range("chunk_size", chunk_size, 1)
        self.model, self.batch_size, self.lookahead = model, batch_size, lookahead
        self.chunk_size, self.decode = chunk_size, decode
        self.device = model.transformer.wte.weight.device
        self.ticket = object()  # this session's key in OWNERS
        self.reset()

    def reset(self) -> None:
        """Forget all tokens. The caches stay allocated for the next ones."""
        self.length = 0  # tokens of a sequence, with its padding
        self.furthest = 0  # the greatest length so far, which says what a rolling cache has dropped
        self.room = 0.0  # how long the sequences can become in the caches that are there
        self.padding: Tensor | None = None  # (B, 1) how many tokens of padding each sequence begins with
        self.fed = [torch.empty(self.batch_size, 0, dtype=torch.long, device=self.device)]  # each call's tokens (B, T)
        if OWNERS.get(self.model) is self.ticket:
            del OWNERS[self.model]

    @property
    def tokens(self) -> list[list[int]]:
        """The tokens that the caches hold, one list for each sequence, without padding. The host waits for them."""
        self.fed = [torch.cat(self.fed, dim=1)]
        padding = [0] * self.batch_size if self.padding is None else self.padding[:, 0].tolist()
        return [ids[n:] for ids, n in zip(self.fed[0].tolist(), padding, strict=True)]

    # reading

    @torch.inference_mode()
    def feed(
        self,
        ids: Ids,
        *,
        logits_to_keep: int = 1,
        prompt: bool = False,
        should_stop: Callable[[], bool] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor | None:
        """Read more tokens; returns logits (B, k, V) of what follows each of the last k = logits_to_keep.

        ids: (B, T), or (T,) for a session of one sequence. The first tokens of the sequences may differ in number: they
            are padded on the left.
        logits_to_keep: 0 gives the logits of all T tokens.
        prompt: these tokens are read as config.prompt_attention says; see read().
        should_stop: asked before each call of the model; True ends the reading, and the result is None.
        progress: told (tokens of a sequence read so far, all that it will be) before and after each call, where there
            are several calls or more than SHOWN_CHUNK tokens.
        Raises ValueError for tokens that do not fit the session or the context, or if another session took the caches.
        """
        ids = self.next_tokens(ids)  # (B, T)
        T = ids.size(1)
        size, end, pieces = self.call_size(T, progress is not None), self.length + T, []
        if T <= min(size, SHOWN_CHUNK):
            progress = None
        if progress is not None:
            progress(self.length, end)
        first_kept = max(0, T - logits_to_keep) if logits_to_keep else 0
        for start in range(0, T, size):
            if should_stop is not None and should_stop():
                return None
            chunk = ids[:, start : start + size]
            kept = start + chunk.size(1) - max(start, first_kept)  # how many of the chunk's logits; may be below 0
            if self.decode is not None and not prompt and T <= getattr(self.decode, "most_tokens", 1):
                logits = self.call(lambda idx, pos, **_: self.decode(idx, pos), chunk)[:, -kept:]
            else:
                logits = self.call(functools.partial(self.model, logits_to_keep=max(1, kept), prompt=prompt), chunk)
            if kept > 0:
                pieces.append(logits[..., : self.model.config.vocab_size])  # what pads the vocabulary is no token
            if progress is not None:
                progress(self.length, end)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def read(self, ids: Ids, **options: Any) -> Tensor | None:
        """feed() for a prompt: all its tokens but the last, of whose logits the first new token is chosen, are read as
        config.prompt_attention says. options: those of feed()."""
        head, last = cut_last(ids)
        if self.model.config.prompt_attention is None or head is None:
            return self.feed(ids, **options)
        read = self.feed(head, prompt=True, **options)
        return None if read is None else self.feed(last, **options)

    @torch.inference_mode()
    def hidden_states(self, ids: Tensor, prompt: bool = False) -> Tensor:
        """Read more tokens (B, T) in one call; returns (B, T, C), from which `model.project` makes logits."""
        return self.call(functools.partial(self.model.hidden_states, prompt=prompt), self.next_tokens(ids))

    def call(self, forward: Callable[..., Tensor], ids: Tensor) -> Tensor:
        """One call of the model, or of a part of it, on the next tokens (B, T)."""
        stop = self.length + ids.size(1)
        input_pos = torch.arange(self.length, stop, device=self.device)  # made there, so that the host need not wait
        if self.padding is not None:
            input_pos = input_pos - self.padding  # (B, T), negative for padding
        self.furthest = max(self.furthest, stop)
        with few_threads() if self.device.type == "cpu" else nullcontext():
            out = forward(ids, input_pos, input_pos_maxp1=stop)
        self.fed.append(ids)
        self.length = stop
        return out

    def next_tokens(self, ids: Ids) -> Tensor:
        """ids as (B, T) on the model's device, padded if their lengths differ; makes room for them in the caches."""
        ids, padding = to_batch(ids, self.device)
        if padding is not None and self.length:
            raise ValueError("The rows differ in length: only the first rows of a session may.")
        if ids.dim() != 2 or ids.size(0) != self.batch_size or ids.size(1) == 0:
            raise ValueError(f"The tokens have the shape {tuple(ids.shape)}: give {self.batch_size} rows of tokens.")
        tokens = self.length + ids.size(1)
        if tokens > self.model.config.block_size and not self.model.unbounded(cached=False):
            raise context_error(self.model, tokens, "The text")
        if self.length == 0:
            self.padding = padding
        self.reserve(tokens)
        return ids

    def call_size(self, T: int, shown: bool) -> int:
        """How many of the T next tokens of a sequence to feed in one call. shown: somebody watches the progress."""
        if self.model.rope.depends_on_length():
            return T  # read in pieces, a token would count as one of a shorter text
        if self.chunk_size is not None:
            return self.chunk_size
        size = T if T <= SMALLEST_CHUNK else prefill_chunk(self.model, self.batch_size)
        return min(size, SHOWN_CHUNK) if shown and self.device.type == "cpu" else size

    # the caches

    def reserve(self, tokens: int) -> None:
        """Make room in the caches for sequences of so many tokens in all, and keep the tokens that are there.

        `feed` does this itself. A call for a whole text beforehand spares copies, and a compiled step keeps its shapes.
        More than the context, or than the windows where all caches roll, is not allocated. Raises ValueError if another
        session took the caches while this one held tokens.
        """
        owned = OWNERS.get(self.model) is self.ticket
        if owned and tokens <= self.room:
            return
        if self.length and not owned:
            raise ValueError(
                "Another session has used the model's caches since then: reset() this one and feed its tokens again."
            )
        with torch.inference_mode(False), torch.no_grad():  # so that the caches can be used outside inference mode too
            self.set_up_caches(tokens)
        OWNERS[self.model] = self.ticket
        self.room = math.inf if self.model.unbounded(cached=True) else self.model.max_seq_length

    def set_up_caches(self, tokens: int) -> None:
        """Give the model caches with room for so many tokens of this session, unless those that it has will do."""
        model = self.model
        room = model.cache_length(tokens)
        if model.unbounded(cached=False) and not model.rolls:  # windows in dense caches: a slot for each token
            room = tokens
        lookahead = max(self.lookahead, model.lookahead)
        if self.length:
            if model.max_seq_length < room:  # at least double it, so that the content is seldom copied
                double = max(room, model.cache_length(2 * model.max_seq_length))
                fits = 2 * cache_bytes(model, self.batch_size, double, lookahead) < free_memory(self.device)
                require_cache(model, self.batch_size, room, lookahead)
                model.extend_kv_cache(double if fits else room)
        elif model.cache_batch_size != self.batch_size or model.max_seq_length < room or model.lookahead < lookahead:
            require_cache(model, self.batch_size, room, lookahead, freed=model.kv_cache_bytes())
            model.set_kv_cache(self.batch_size, room, lookahead=lookahead)
        else:
            model.reset_kv_cache()

    def can_take_back(self, n: int) -> bool:
        """True if the newest n tokens of every sequence can be taken back.

        Tokens that were taken back before and not replaced count as well: for them a rolling cache has dropped older
        ones, which do not come back.
        """
        return n <= self.length and self.model.can_take_back(self.furthest - (self.length - n))

    @property
    def can_run_ahead(self) -> bool:
        """True if a token may be fed before anybody knows that it is wanted, and it saves time."""
        return self.device.type == "cuda" and self.model.can_take_back(1)

    def take_back(self, n: int) -> None:
        """Forget the newest n tokens of every sequence, as if never fed. Raises ValueError if it cannot."""
        if not 0 <= n <= self.length:
            raise ValueError(f"{n} tokens cannot be taken back: the session holds {self.length}.")
        if not self.can_take_back(n):
            raise ValueError(
                f"The caches cannot take back {n} tokens: they go back {self.model.lookahead} from the furthest token "
                "that was fed. Give Session a larger lookahead, or reset() it and feed the tokens that stay again."
            )
        self.model.take_back(n)
        self.length -= n
        self.fed = [torch.cat(self.fed, dim=1)[:, : self.length]]

    def hold(self, sequences: Sequence[Sequence[int]], ahead: int) -> None:
        """Take note that the caches hold these tokens, fed at their positions from 0 on by other means than feed().

        ahead: how many more tokens were fed behind them at most, which are as if taken back.
        """
        ids, self.padding = to_batch(sequences, self.device)
        self.fed, self.length = [ids], ids.size(1)
        self.furthest = max(self.furthest, self.length + ahead)

    def keep_prefix(self, ids: Sequence[int]) -> int:
        """Keep the tokens that the session shares with the beginning of the text `ids`; returns how many those are.

        What differs is taken back; if that is not possible, all is forgotten. The last token of ids is never kept,
        since its logits are wanted: ids[n:] is to be fed. Raises ValueError for a session of several sequences.
        """
        if self.batch_size != 1:
            raise ValueError(f"The session has {self.batch_size} rows: give one of a single row to go on with a text.")
        held, keep = self.tokens[0], 0
        while keep < min(len(held), len(ids) - 1) and held[keep] == ids[keep]:
            keep += 1
        if keep == 0 or OWNERS.get(self.model) is not self.ticket or not self.can_take_back(len(held) - keep):
            self.reset()
            return 0
        self.take_back(len(held) - keep)
        return keep


def to_batch(ids: Ids, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """(ids (B, T), how many tokens of padding each sequence begins with (B, 1), or None), both on the device."""
    if isinstance(ids, Tensor):
        ids = ids.to(device, torch.long)
        return (ids[None] if ids.dim() == 1 else ids), None
    sequences = [list(ids)] if not len(ids) or isinstance(ids[0], int) else [list(sequence) for sequence in ids]
    longest = max(map(len, sequences))
    padding = [longest - len(sequence) for sequence in sequences]
    batch = torch.tensor([[0] * n + sequence for n, sequence in zip(padding, sequences, strict=True)], device=device)
    return batch, torch.tensor(padding, device=device)[:, None] if any(padding) else None


def cut_last(ids: Ids) -> tuple[Ids | None, Ids]:
    """(all but the last token of each sequence, or None if no sequence has more; the last ones)"""
    if isinstance(ids, Tensor):
        return (ids[..., :-1] if ids.size(-1) > 1 else None), ids[..., -1:]
    if not len(ids) or isinstance(ids[0], int):
        return ids[:-1] or None, ids[-1:]
    head = [sequence[:-1] for sequence in ids]
    return (head if any(head) else None), [sequence[-1:] for sequence in ids]


def context_of(model: GPT) -> float:
    """How many tokens of a text can be fed."""
    return math.inf if model.rolls else model.config.block_size


def context_error(model: GPT, tokens: int, what: str, new_tokens: int = 0) -> ValueError:
    """The error for a text of more tokens than the context. new_tokens: for which there should be room behind it."""
    return ValueError(
        f"{what} has {tokens} tokens and the context {model.config.block_size}: shorten it, go further with "
        f"--model.attention dual_chunk --model.block_size {tokens + new_tokens}, or give every layer a window with "
        "--model.attention streaming --model.sliding_window_size S."
    )


def cache_bytes(model: GPT, batch_size: int, length: int, lookahead: int = 0) -> int:
    """What model.set_kv_cache(batch_size, length, lookahead=lookahead) allocates on the device of the embeddings: each
    cache is made without memory."""
    first, held, weight = {}, {}, model.transformer.wte.weight
    for attn in model.layers:
        if getattr(attn.mixer, "device", weight.device) != weight.device:  # of a model on several devices
            continue
        heads, beside = (attn.n_head, attn.n_query_groups), first.get(attn.mixer.kind)
        cache = attn.mixer.new_cache(batch_size, length, lookahead, heads, beside, device="meta", dtype=model.dtype)
        first.setdefault(attn.mixer.kind, cache)
        held |= {id(buffer): buffer for buffer in cache.buffers()}  # shared ones once
    return sum(buffer.nbytes for buffer in held.values())


def require_cache(model: GPT, batch_size: int, length: int, lookahead: int, freed: int = 0) -> None:
    """Raises ValueError when there is no memory for such caches. freed: bytes that go before they are made."""
    needed = cache_bytes(model, batch_size, length, lookahead)
    of = f"{batch_size} times {length:,}" if batch_size > 1 else f"{length:,}"
    remedy = "lower sliding_window_size or n_sink_tokens" if model.rolls else (
        "ask for fewer tokens (--max_new_tokens, or a shorter text), or give every layer a window (--model.attention "
        "sliding --model.sliding_window_size S --model.rolling_kv_cache true)"
    )  # fmt: skip
    require_memory(
        needed - freed,
        model.transformer.wte.weight.device,
        f"The caches of {of} tokens",
        f"{remedy}, or use --dtype bfloat16",
    )


def live_elements(config: Config) -> int:
    """Elements of activations that are there at once for each token of a call, some in float32: at most, and more than
    a third of it in any case."""
    heads = (2 * config.n_head + 3 * config.n_query_groups) * config.head_size
    return 4 * config.n_embd + 3 * heads + 3 * config.intermediate_size


def require_activations(model: GPT, batch_size: int, tokens: int) -> None:
    """Raises ValueError when there is no memory to read so many tokens of each of so many texts in one call."""
    weight = model.transformer.wte.weight
    needed = batch_size * tokens * live_elements(model.config) * weight.element_size() // 3
    what = f"A call of {batch_size} times {tokens:,} tokens"
    require_memory(needed, weight.device, what, "use a smaller --batch_size or --chunk_size")


def prefill_chunk(model: GPT, batch_size: int) -> int:
    """How many tokens of a prompt to feed at once: as many as a quarter of the free memory holds activations for.

    The weights and the caches are allocated already, and attention bounds its own memory, so what grows with the tokens
    is the residual stream, the projections and the MLP.
    """
    weight = model.transformer.wte.weight
    per_token = batch_size * live_elements(model.config) * max(weight.element_size(), 4)
    most = 16384 if weight.device.type == "cuda" else 4096
    tokens = max(SMALLEST_CHUNK, min(most, free_memory(weight.device) // 4 // per_token))
    return 2 ** (tokens.bit_length() - 1)


# --------------------------------------------------------------------------------------------------------------- stops


def token_stops(stops: Iterable[int | Sequence[int]]) -> list[list[int]]:
    """Ids, or sequences of ids, that end a text: each as a sequence."""
    return [[s] if isinstance(s, int) else list(s) for s in stops]


class StopFinder:
    """Passes a stream of tokens (lists) or text (str) on up to the first stop, and holds back what may begin one."""

    def __init__(self, stops: Sequence, empty: list | str) -> None:
        """empty: [] or "", the kind of stream."""
        self.stops = sorted((s for s in stops if len(s)), key=len, reverse=True)
        self.held = empty

    def push(self, new: list | str) -> tuple[list | str, bool]:
        """(what can be passed on, True if a stop follows it). The stop that is complete first counts."""
        stream = self.held + new
        for end in range(len(self.held) + 1, len(stream) + 1):
            for stop in self.stops:
                if stream[:end][-len(stop) :] == stop:
                    self.held = stream[:0]
                    return stream[: end - len(stop)], True
        begins = (i for i in range(len(stream)) if any(stream[i:] == stop[: len(stream) - i] for stop in self.stops))
        cut = next(begins, len(stream))
        self.held = stream[cut:]
        return stream[:cut], False


# ----------------------------------------------------------------------------------------------------------- statistics


@dataclass
class Stats:
    """What one call of generate did: tokens and seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # those of the prompt that the caches held already
    new_tokens: int = 0
    prefill_seconds: float = 0.0  # to read the prompt
    first_token_seconds: float = 0.0  # to read the prompt and choose the first new token
    decode_seconds: float = 0.0  # to feed each new token and choose the next one
    decode_steps: int = 0
    decode_bytes: float | None = None  # that decode read; None: a call of the model for each step
    cut: str = ""  # why the text goes no further though no stop was found: a sentence
    trace: StepTrace | None = None  # records some of the decode steps

    def count(self, seconds: float) -> None:
        """Count a new token. seconds: from when the tokens before it began to be fed to when it was chosen."""
        if self.trace is not None:
            self.trace.step()
        if self.new_tokens == 0:
            self.first_token_seconds = seconds
        else:
            self.decode_seconds += seconds
            self.decode_steps += 1
        self.new_tokens += 1

    def line(self, model: GPT, text: str | None = None) -> str:
        """The figures for people: a line of speeds, one of what the memory gave, one of the model. text: the answer;
        where it is cut or empty, a fourth line says so."""
        if self.trace is not None:
            self.trace.stop()  # or it would hold the copy that is timed here
        fed, rates = self.prompt_tokens - self.cached_tokens, ["", ""]
        if self.prefill_seconds > 0:
            rates[0] = f", {format_rate(fed / self.prefill_seconds)}"
        if self.decode_steps and self.decode_seconds > 0:
            rates[1] = f", {self.decode_steps / self.decode_seconds:.1f} tok/s"
        first = f"first token {self.first_token_seconds * 1e3:.0f} ms"
        cached = f", {self.cached_tokens} prompt tokens in it" if self.cached_tokens else ""
        lines = [
            f"prefill {fed} tokens{rates[0]} | {first} | decode {self.decode_steps} steps{rates[1]}",
            memory_line(model, self.bytes_decoded(model), self.decode_seconds),
            f"{describe_attention(model)} | cache {model.kv_cache_bytes() / 1e6:.1f} MB{cached}",
        ]
        if text is not None and (self.cut or self.new_tokens and not text):
            lines.append(self.cut or "The model stopped at once: there is no text.")
        return "\n".join(line for line in lines if line)

    def bytes_decoded(self, model: GPT) -> float:
        """Bytes that the decode steps read, by step_bytes."""
        if self.decode_bytes is not None or not self.decode_steps:
            return self.decode_bytes or 0
        first = self.prompt_tokens + 1
        return self.decode_steps * step_bytes(model, first, self.prompt_tokens + self.decode_steps)


def describe_attention(model: GPT) -> str:
    """What decides who sees whom, such as "window none (context 8192) | RoPE yarn by 4"."""
    config, parts = model.config, []
    variants = dict.fromkeys(config.layer_variants)
    chunks = f"dual_chunk {config.chunk_size} + {config.chunk_local}"
    if variants == {"dual_chunk": None}:
        parts.append(f"{chunks} (context {config.block_size})")
    else:
        parts += [chunks] * ("dual_chunk" in variants) + [describe_linear(config)] * ("linear" in variants)
        parts += [f"window {describe_window(model)}"] * (variants != {"linear": None})
    if config.prompt_attention is not None:
        window = f" {config.sliding_window_size}" if config.sliding_window_size is not None else ""
        parts.append(f"prompts {describe_prompts(config)}{window}")
    if without := config.layer_positions.count("none"):
        parts.append(f"no RoPE in {without} of {config.n_layer} layers")
    if config.rope_scaling:
        factor = config.rope_scaling.get("factor")
        parts.append(f"RoPE {config.rope_scaling['type']}" + (f" by {factor:g}" if factor else ""))
    return " | ".join(parts)


def describe_prompts(config: Config) -> str:
    """Such as "streaming in 22 of 30 layers"."""
    pairs = zip(config.layer_variants, config.prompt_variants, strict=True)
    changed = [prompt for own, prompt in pairs if prompt != own]
    names = "/".join(dict.fromkeys(changed))
    return names if len(changed) == config.n_layer else f"{names} in {len(changed)} of {config.n_layer} layers"


def describe_linear(config: Config) -> str:
    """Such as "linear + window 64 in 18 of 24 layers"."""
    count, sinks = config.layer_variants.count("linear"), config.linear_sinks
    window = f"{'no linear part' if config.linear_off else 'linear'} + window {config.linear_window}"
    some = f" in {count} of {config.n_layer} layers" if count < config.n_layer else ""
    return window + (f" behind {sinks} sinks" if sinks else "") + some


def describe_window(model: GPT) -> str:
    """How many keys a query can see, such as "none (context 8192)", "256", "512 rolling in 13 of 26 layers"."""
    windows = model.windows
    sizes = sorted({w for w in windows if w is not None})
    if not sizes:
        return f"none (context {model.config.block_size})"
    kind = " rolling" if model.rolls or model.config.rolling_kv_cache else ""
    sinks = f" behind {model.n_sinks} sinks" if model.n_sinks else ""
    if len(sizes) == 1 and None not in windows:
        return f"{sizes[0]}{kind}{sinks}"
    parts = ", ".join(f"{size}{kind}{sinks} in {windows.count(size)}" for size in sizes)
    return f"{parts} of {len(windows)} layers"


# ------------------------------------------------------------------------------------------------------------- generate


def generate(
    model: GPT,
    prompt_ids: Sequence[int] | Tensor,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop_tokens: Iterable[int | Sequence[int]] = (),
    *,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    sampling: Sampling | None = None,
    session: Session | None = None,
    decode: Callable[[Tensor, Tensor], Tensor] | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
    stats: Stats | None = None,
) -> Iterator[int]:
    """Yield new tokens, one by one, as they are chosen. Wrong arguments are refused at the call, before any token.

    prompt_ids: the whole text so far, at least one token.
    temperature ... seed: the fields of a Sampling, to be given either so or as `sampling`.
    stop_tokens: ids, or sequences of ids, that end the text. They are not yielded, and tokens that may begin such a
        sequence are held back until it is clear that they do not.
    session: a Session(model) of one sequence. What it holds of prompt_ids already is not read again; afterwards it
        holds the new tokens too, except for the last. None: a new session for this call.
    decode: a new session's decode.
    should_stop: asked before each call of the model; True ends the text.
    progress: told (tokens read, tokens of the prompt) while a long prompt is read.
    stats: filled in as the text goes on.
    The text ends early when the context is full. Raises ValueError for arguments that do not fit, and for a prompt that
    is empty, longer than the context, or not of the model's vocabulary.
    """
    ids = [int(i) for i in (prompt_ids.flatten().tolist() if isinstance(prompt_ids, Tensor) else prompt_ids)]
    flat = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    if sampling is not None and flat != Sampling():
        raise ValueError(f"sampling={sampling} is given together with some of its fields: give one or the other.")
    if session is not None and (decode is not None or session.model is not model):
        raise ValueError("The session has a model and a decode step of its own: give that model, and no decode.")
    check_range("max_new_tokens", max_new_tokens, 0, 10**9)
    check_prompt(model, ids, max_new_tokens)
    session, stats = session or Session(model, decode=decode), stats or Stats()
    stats.prompt_tokens, stats.cached_tokens = len(ids), session.keep_prefix(ids)
    context = context_of(model)
    session.reserve(min(len(ids) + max_new_tokens, context))
    count = min(max_new_tokens, context + 1 - len(ids))  # the last one may follow the context: it is not fed
    sampler = Sampler(sampling or flat, [ids], model.config.vocab_size, session.device)
    stops = StopFinder(token_stops(stop_tokens), empty=[])
    return decode_loop(session, ids[stats.cached_tokens :], sampler, count, stops, should_stop, progress, stats)


def check_prompt(model: GPT, ids: Sequence[int], new_tokens: int) -> None:
    """Raises ValueError, in one sentence, for a prompt that the model cannot read."""
    if not ids:
        raise ValueError("The prompt is empty: give at least one token.")
    unknown = [i for i in ids if not 0 <= i < model.config.padded_vocab_size]
    if unknown:
        raise ValueError(
            f"The prompt holds the token id {unknown[0]}, and the vocabulary has {model.config.padded_vocab_size}: "
            "the tokenizer is another model's."
        )
    if len(ids) > model.config.block_size and not model.rolls:
        raise context_error(model, len(ids), "The prompt", new_tokens)


class NonFiniteLogits(ValueError):
    """The model computes no numbers: no other text would make it better."""


def explain_overflow(model: GPT) -> str:
    """Why logits or losses are NaN or infinite, and the remedy."""
    dtype = str(model.transformer.wte.weight.dtype).removeprefix("torch.")
    if dtype == "float32":
        return "the weights are damaged, convert or download them again"
    other = "float32 or bfloat16" if dtype == "float16" else "float32"
    return f"the activations are too large for {dtype} (use --dtype {other}), or the weights are damaged"


def non_finite(model: GPT, what: str = "The logits are no finite numbers") -> NonFiniteLogits:
    """The error, with its reason and remedy."""
    return NonFiniteLogits(f"{what}: {explain_overflow(model)}.")


def why_cut(session: Session, count: int) -> str:
    """Why a text ends after `count` new tokens though no stop was found."""
    context = session.model.config.block_size
    if session.length >= context and not session.model.rolls:
        return f"The context of {context} tokens is full."
    return f"Cut at {count} tokens: --max_new_tokens N gives more." if count else ""


@torch.inference_mode()
def decode_loop(
    session: Session,
    ids: list[int],
    sampler: Sampler,
    count: int,
    stops: StopFinder,
    should_stop: Callable[[], bool] | None,
    progress: Callable[[int, int], None] | None,
    stats: Stats,
) -> Iterator[int]:
    """The loop of generate: read the ids, then choose a token and feed it, `count` times at most.

    On a GPU a token is fed before the host has read it, so that the GPU does not wait for the host; one that turns out
    to be behind a stop is taken back.
    """
    started = time.perf_counter()
    logits = session.read(ids, should_stop=should_stop, progress=progress)  # (1, 1, V)
    wait_for(session.device)
    stats.prefill_seconds = time.perf_counter() - started
    for n in range(1, count + 1):
        if logits is None or (should_stop is not None and should_stop()):
            break
        token, total = sampler.choose(logits[:, -1]), logits[:, -1:].sum(-1, dtype=torch.float32)  # both (1, 1)
        read, ahead = read_later(torch.cat([token, total], dim=1)[0]), n < count and session.can_run_ahead
        logits = session.feed(token) if ahead else None
        chosen, total = read()  # only here the host waits for the device
        if not math.isfinite(total):  # then one of the logits is not
            raise non_finite(session.model)
        now = time.perf_counter()
        stats.count(now - started)
        released, found = stops.push([int(chosen)])  # float32 holds every id below 2**24
        if found and ahead:
            session.take_back(1)
        yield from released
        if found:
            return
        started = now if ahead else time.perf_counter()
        if n < count and not ahead:
            logits = session.feed(token)
    else:
        stats.cut = why_cut(session, count)
    yield from stops.held  # what was not a stop after all


def read_later(x: Tensor) -> Callable[[], list]:
    """Start to copy x to the host; what is returned waits for that and gives x as a list."""
    if x.device.type != "cuda":
        return x.tolist
    host, done = torch.empty_like(x, device="cpu", pin_memory=True), torch.cuda.Event()
    host.copy_(x, non_blocking=True)
    done.record()

    def read() -> list:
        done.synchronize()
        return host.tolist()

    return read


def generate_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    *,
    stop: Sequence[str] = (),
    continues: bool = True,
    generate: Callable[..., Iterator[int]] = generate,
    **arguments: Any,
) -> Iterator[str]:
    """Yield the new text piece by piece, in whole characters and with its spaces. `arguments` are generate's.

    generate: makes the tokens.
    stop: strings that end the text and are not part of it. Raises ValueError for an empty one.
    continues: the new text continues that of the prompt, so a first token " word" keeps its space. False: it begins a
        text of its own.
    """
    check_stops(stop)
    decoder = StreamDecoder(tokenizer)
    for token in prompt_ids if continues else ():
        decoder.push(token)
    return join_text(generate(model, prompt_ids, **arguments), decoder, StopFinder(list(stop), empty=""))


def check_stops(stops: Sequence[str]) -> None:
    """Raises ValueError for a stop that would end nothing."""
    if "" in stops:
        raise ValueError("A stop is an empty text: leave it out, or give the text that ends the answer.")


def join_text(tokens: Iterator[int], decoder: StreamDecoder, stops: StopFinder) -> Iterator[str]:
    """Yield the text of the tokens as they come, up to a stop."""
    for token in tokens:
        released, found = stops.push(decoder.push(token))
        if released:
            yield released
        if found:
            tokens.close()
            return
    released, found = stops.push(decoder.flush())
    yield released if found else released + stops.held
