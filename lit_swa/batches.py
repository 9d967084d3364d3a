"""Many texts at once: a batch of B rows, each with a text of its own; where one ends, the next prompt is read.

    batch = Batch(model, [Request(ids) for ids in prompts], tokenizer=tokenizer, stop_tokens=tokenizer.eos_ids)
    for index, answer in batch.run():
        print(index, answer.text)

A row owns its part of every cache, its position, its random numbers and its stops. Rows share the model's calls and
nothing else, so each text is the one that `generate_text` gives, up to the order in which floating point adds.

Shapes: B rows, V vocab_size.
"""

import copy
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from lit_swa.checks import check_range
from lit_swa.formats.tokenizer import StreamDecoder, Tokenizer
from lit_swa.generate import (
    LIMITS,
    SMALLEST_CHUNK,
    Sampling,
    Session,
    StopFinder,
    cache_bytes,
    calm,
    check_prompt,
    check_stops,
    context_of,
    describe_attention,
    non_finite,
    prefill_chunk,
    read_later,
    token_stops,
)
from lit_swa.gpu_decode import WARM_UPS
from lit_swa.machine import few_threads
from lit_swa.memory import free_memory
from lit_swa.model import GPT
from lit_swa.noise import row_noise
from lit_swa.speed import StepTrace, keys_read, mark, memory_line, seconds_between, weights_read
from lit_swa.utils import format_rate, wait_for

MOST_ROWS = {"cpu": 16, "cuda": 256}  # of a batch whose size nobody chose, by the kind of device
GROUP_TOKENS = {"cpu": 512, "cuda": 8192}  # of prompts that are read together, padding included
SCORE_BYTES = 40  # for each row and token of the vocabulary while a token is chosen: logits, their order, sums, noise


class Request(NamedTuple):
    """A prompt, and where its answer ends."""

    ids: Sequence[int]
    max_new_tokens: int = 64
    seed: int | None = None  # None: that of the batch's Sampling
    stop: Sequence[str] = ()  # texts
    continues: bool = True  # the answer continues the prompt's text; False: it begins one of its own


class Answer(NamedTuple):
    """What follows a prompt."""

    tokens: list[int]  # up to a stop
    text: str  # "" without a tokenizer
    new_tokens: int  # how many were chosen, those of a stop included
    ended: str  # stop, length (max_new_tokens) or context (it is full)


# ---------------------------------------------------------------------------------------------------- the text of a row


class Text:
    """The answer to a request as it grows."""

    def __init__(
        self, index: int, request: Request, context: float, tokenizer: Tokenizer | None, stop_tokens: Sequence
    ) -> None:
        """context: how many tokens can be fed. stop_tokens: ids, or sequences of ids."""
        self.index, self.request = index, request
        self.count = count_tokens(request, context)  # at most; the last one is not fed
        self.begun = self.chosen = 0  # tokens that the device chooses or has chosen, and those that arrived here
        self.fed = 0  # tokens of the answer, and of a prompt of one token, in decode steps
        self.ended = "" if self.count else "length"
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.token_stops = StopFinder(token_stops(stop_tokens), empty=[])
        self.text_stops = StopFinder(list(request.stop), empty="")
        self.decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        for token in request.ids if tokenizer is not None and request.continues else ():
            self.decoder.push(token)

    @property
    def length(self) -> int:
        """Tokens of the prompt and the answer, up to the newest that is being chosen."""
        return len(self.request.ids) + self.begun

    def push(self, token: int) -> None:
        """Take the next token; `ended` says then why the text ends, if it does."""
        self.chosen += 1
        released, stopped = self.token_stops.push([token])
        last = self.chosen == self.count
        if last and not stopped:
            released = released + self.token_stops.held  # what was not a stop after all
        if any(self.add(token) for token in released):
            self.ended = "stop"
        elif stopped:
            self.finish("stop")
        elif last:
            self.finish("length" if self.count == self.request.max_new_tokens else "context")

    def add(self, token: int) -> bool:
        """Append a token; True if a stop among the texts is complete."""
        self.tokens.append(token)
        return self.decoder is not None and self.add_text(self.decoder.push(token))

    def add_text(self, text: str) -> bool:
        released, found = self.text_stops.push(text)
        self.pieces.append(released)
        return found

    def finish(self, why: str) -> None:
        """End the text without a stop among the texts, unless the last characters hold one."""
        found = self.decoder is not None and self.add_text(self.decoder.flush())
        if not found:
            self.pieces.append(self.text_stops.held)
        self.ended = "stop" if found else why

    @property
    def answer(self) -> Answer:
        return Answer(self.tokens, "".join(self.pieces), self.chosen, self.ended)


def count_tokens(request: Request, context: float) -> int:
    """How many tokens an answer has at most: the last one may follow the context, since it is not fed."""
    return int(max(0, min(request.max_new_tokens, context + 1 - len(request.ids))))


# -------------------------------------------------------------------------------------------------- the rows of a batch


class RowSampler:
    """Chooses the next token of each row: one Sampling for all, random numbers and penalties of the row's own."""

    def __init__(self, sampling: Sampling, rows: int, vocab_size: int, device: torch.device) -> None:
        self.sampling, self.device, self.noise = sampling, device, row_noise(rows, device)
        self.seen = None  # (B, V) bool, only where a penalty needs it
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)

    def begin(self, row: int, request: Request) -> None:
        """Forget the row's text, and begin another one."""
        self.noise.begin(row, self.sampling.seed if request.seed is None else request.seed)
        if self.seen is not None:
            self.seen[row] = False
            self.seen[row, [i for i in set(request.ids) if i < self.seen.size(1)]] = True

    def choose(self, logits: Tensor, rows: slice) -> Tensor:
        """The next tokens (n, 1) of some rows for their logits (n, V); they count as tokens of the texts from now on.

        What a row without a text gets means nothing.
        """
        with calm(logits):
            seen, noise = None if self.seen is None else self.seen[rows], None
            if self.sampling.temperature > 0:
                noise = self.noise.draw(rows, logits.size(-1))  # the numbers that a Sampler takes for one text
            token = self.sampling.choose(logits, noise, seen)
            if seen is not None:
                seen.scatter_(1, token, True)  # a view of self.seen
            return token


class Arriving(NamedTuple):
    """What the device has chosen, or is choosing, for some texts, and has not told the host yet."""

    texts: list[Text | None]
    read: Callable[[], list[list[float]]]  # waits for each text's token and the sum of its logits


class Batch:
    """B rows of a model's caches, each with a text or free.

    On a GPU the host learns of a token while the next one is being computed, so that the GPU never waits: a text that
    ends with a stop is fed one token more, which nobody reads. Where a text ends by its length the host knows before.
    """

    def __init__(
        self,
        model: GPT,
        requests: Sequence[Request],
        sampling: Sampling | None = None,
        *,
        batch_size: int | None = None,
        decode: Callable[[Tensor, Tensor], Tensor] | None = None,
        tokenizer: Tokenizer | None = None,
        stop_tokens: Iterable[int | Sequence[int]] = (),
        trace: StepTrace | None = None,
    ) -> None:
        """The caches are set up here, with room in each row for the longest prompt and its answer.

        batch_size: B; None: as many as the memory holds and as are of use.
        decode: feeds a token to each row, as a compiled step does (compile_decode); None: the model does it.
        tokenizer: makes texts of the answers, and is needed for stops that are texts.
        stop_tokens: ids, or sequences of ids, that end every answer.
        trace: records some of the steps.
        Raises ValueError for a request that the model cannot read, or more rows than the memory holds.
        """
        self.model, self.requests, self.decode = model, requests, decode
        self.tokenizer, self.stop_tokens, self.trace = tokenizer, list(stop_tokens), trace
        self.device, self.vocab_size = model.transformer.wte.weight.device, model.config.vocab_size
        if tokenizer is None and any(request.stop for request in requests):
            raise ValueError("A request has stops that are texts: give a tokenizer, or stop_tokens.")
        room = require_room(model, requests)
        self.rows = choose_rows(model, room, len(requests), batch_size)
        Session(model, self.rows).reserve(room)
        self.texts: list[Text | None] = [None] * self.rows
        self.token = torch.zeros(self.rows, 1, dtype=torch.long, device=self.device)  # what each row is fed next ...
        self.pos = torch.full((self.rows, 1), -1, device=self.device)  # ... and where; -1: the row is free
        self.sampler = RowSampler(sampling or Sampling(), self.rows, self.vocab_size, self.device)
        self.arriving: deque[Arriving] = deque()
        self.lag = 1 if self.device.type == "cuda" else 0  # results that may be on their way while a step is begun
        self.chunk = prefill_chunk(model, 1)
        self.together = max(1, self.rows // 16)  # prompts that are read together, where there are as many
        self.answered = self.prompt_tokens = self.new_tokens = 0
        self.steps = self.decoded = 0  # decode steps, and the tokens that were fed in them
        self.keys_read = self.prefill_seconds = 0.0  # bytes of keys and values that the steps saw
        self.prefills: list[tuple[Any, Any]] = []  # marks around what is not in prefill_seconds yet

    @torch.inference_mode()
    def run(
        self, should_stop: Callable[[], bool] | None = None, progress: Callable[[int], None] | None = None
    ) -> Iterator[tuple[int, Answer]]:
        """Yield (index of a request, its answer) as the texts end, which is not the order of the requests.

        should_stop: asked before each step; True ends the run, and texts that have not ended are lost.
        progress: told after each step how many tokens were chosen so far.
        """
        context = context_of(self.model)
        texts = (Text(n, r, context, self.tokenizer, self.stop_tokens) for n, r in enumerate(self.requests))
        waiting: deque[Text] = deque()
        while True:
            if should_stop is not None and should_stop():
                break
            while len(waiting) < self.rows and (text := next(texts, None)) is not None:
                if text.ended:  # it is to have no token
                    self.answered += 1
                    yield text.index, text.answer
                else:
                    waiting.append(text)
            self.fill(waiting)
            if self.active:
                self.step()
            elif not self.arriving:
                break
            while len(self.arriving) > (self.lag if self.active else 0):
                yield from self.take()
            if progress is not None:
                progress(self.new_tokens)
        if self.trace is not None:
            self.trace.close()

    @torch.inference_mode()
    def warm_up(self) -> float:
        """Let the decode step compile, in steps of free rows; returns the seconds."""
        started = time.perf_counter()
        for _ in range(WARM_UPS + 1):
            self.feed()
        wait_for(self.device)
        return time.perf_counter() - started

    @property
    def active(self) -> int:
        return sum(text is not None for text in self.texts)

    def line(self, seconds: float) -> str:
        """The figures for people: what was done in so many seconds, what the memory gave, and the model's."""
        self.count_prefills()
        decoding = max(seconds - self.prefill_seconds, 1e-9)
        done = f"{self.answered} answers, {self.prompt_tokens} prompt tokens, {self.new_tokens} new tokens"
        prefill = f"prefill {format_rate(self.prompt_tokens / self.prefill_seconds)} | " if self.prefill_seconds else ""
        decode = f"decode {self.decoded} tokens in {self.steps} steps, {self.decoded / decoding:.1f} tok/s"
        lines = [
            f"{done} in {seconds:.1f} s, {self.new_tokens / max(seconds, 1e-9):.1f} tok/s | {self.rows} rows",
            prefill + decode,
            memory_line(self.model, self.steps * weights_read(self.model, self.rows) + self.keys_read, decoding),
            f"{describe_attention(self.model)} | cache {self.model.kv_cache_bytes() / 1e6:.1f} MB",
        ]
        return "\n".join(lines)

    def count_prefills(self) -> None:
        self.prefill_seconds += sum(seconds_between(began, ended) for began, ended in self.prefills)
        self.prefills.clear()

    # rows

    def fill(self, waiting: deque[Text]) -> None:
        """Read waiting prompts into free rows. Reading takes about as long for a few short prompts as for one, so some
        rows are left free until there are `together` of them."""
        if self.texts.count(None) < min(self.together, len(waiting)):
            return
        while waiting and (free := self.texts.count(None)):
            first, texts = self.free_rows(free).start, [waiting.popleft() for _ in range(min(free, len(waiting)))]
            texts.sort(key=lambda text: len(text.request.ids))  # side by side they need little padding
            while texts:
                n = self.how_many(texts)
                self.begin(texts[:n], slice(first, first + n))
                texts, first = texts[n:], first + n

    def free_rows(self, n: int) -> slice:
        """All n free rows side by side: texts move where the free rows are not."""
        free = [row for row, text in enumerate(self.texts) if text is None]
        if free[-1] - free[0] + 1 == n:
            return slice(free[0], free[0] + n)
        first = self.rows - n
        for row in range(first, self.rows):
            if self.texts[row] is not None:
                self.move(row, free.pop(0))
        return slice(first, self.rows)

    def move(self, row: int, to: int) -> None:
        """Move a text to a free row."""
        modules = {id(module): module for cache in self.model.caches for module in cache.modules()}
        buffers = [buffer for module in modules.values() for buffer in module.buffers(recurse=False)]
        for tensor in (*buffers, self.token, self.pos, *([] if self.sampler.seen is None else [self.sampler.seen])):
            tensor[to] = tensor[row]
        self.pos[row] = -1
        self.sampler.noise.move(row, to)
        self.texts[to], self.texts[row] = self.texts[row], None

    def how_many(self, texts: Sequence[Text]) -> int:
        """How many of the next texts to read in one call: all are padded to the longest."""
        n, longest, budget = 1, len(texts[0].request.ids), GROUP_TOKENS.get(self.device.type, GROUP_TOKENS["cpu"])
        while n < len(texts):
            longest = max(longest, len(texts[n].request.ids))
            if (n + 1) * longest > budget:
                break
            n += 1
        return n

    def begin(self, texts: Sequence[Text], rows: slice) -> None:
        """Read the prompts of texts into free rows, and choose their first tokens, unless the next step does both."""
        for row, text in zip(range(rows.start, rows.stop), texts, strict=True):
            self.texts[row] = text
            self.sampler.begin(row, text.request)
        prompts = [list(text.request.ids) for text in texts]
        lengths = [len(ids) for ids in prompts]
        self.prompt_tokens += sum(lengths)
        apart = self.model.config.prompt_attention is not None  # of a prompt's last token, which sees all of it
        if apart or max(lengths) == 1:  # the next step reads it
            self.token[rows] = torch.tensor([ids[-1:] for ids in prompts], device=self.device)
            self.pos[rows] = torch.tensor(lengths, device=self.device)[:, None] - 1
        if max(lengths) == 1:
            return
        began = mark(self.device)
        with only_rows(self.model, rows):
            logits = self.read([ids[:-1] for ids in prompts] if apart else prompts)
        self.prefills.append((began, mark(self.device)))
        if not apart:
            self.pos[rows] = torch.tensor(lengths, device=self.device)[:, None]
            self.choose(logits, rows)

    def read(self, prompts: list[list[int]]) -> Tensor:
        """Read a prompt into each row; returns logits (n, V) of what follows.

        Where caches can take tokens back, shorter prompts are padded behind and the padding is taken back: a call is
        fastest when all rows are at the same positions.
        """
        lengths = torch.tensor([len(ids) for ids in prompts], device=self.device)
        n, longest = len(prompts), max(map(len, prompts))
        surplus = longest - min(map(len, prompts))
        fits = n * longest <= self.chunk and not self.model.rope.depends_on_length()
        if surplus and fits and self.model.can_take_back(surplus):
            padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in prompts], device=self.device)
            x = Session(self.model, n).hidden_states(padded, prompt=True)
            last = x[torch.arange(n, device=self.device), lengths - 1]
            return self.model.project(last[:, None])[:, 0, : self.vocab_size]
        size = max(SMALLEST_CHUNK, self.chunk // n)
        while longest % size == 1:  # one token of so many rows would compile, and so would one token's logits
            size += 1
        return Session(self.model, n, chunk_size=size).feed(prompts, logits_to_keep=2, prompt=True)[:, -1]  # (n, 2, V)

    def end(self, row: int) -> None:
        """Free a row."""
        text = self.texts[row]
        if text is not None and text.fed:
            self.keys_read += text.fed * keys_read(self.model, text.length - text.fed, text.length - 1)
        self.texts[row] = None
        self.pos[row] = -1
        self.sampler.noise.end(row)

    # steps

    def step(self) -> None:
        """Feed every text its newest token, and choose the next one."""
        if self.trace is not None:
            self.trace.step()
        self.steps += 1
        for text in self.texts:
            if text is not None:
                text.fed, self.decoded = text.fed + 1, self.decoded + 1
        logits = self.feed()
        self.pos += self.pos >= 0
        self.choose(logits, slice(0, self.rows))

    def feed(self) -> Tensor:
        """Logits (B, V) of what follows each row's token; of a free row they mean nothing."""
        with few_threads() if self.device.type == "cpu" else nullcontext():
            if self.decode is not None:
                logits = self.decode(self.token, self.pos)
            else:  # positions count from 0, and the newest token of a text is the one that is fed
                longest = max((text.length for text in self.texts if text is not None), default=1)
                logits = self.model(self.token, self.pos, input_pos_maxp1=longest)
        return logits[:, -1, : self.vocab_size]

    def choose(self, logits: Tensor, rows: slice) -> None:
        """Choose the next token of some rows from their logits (n, V); the host learns of it later."""
        token = self.sampler.choose(logits, rows)
        self.token[rows] = token
        total = logits.sum(-1, keepdim=True, dtype=torch.float32)  # which holds every id below 2**24
        self.arriving.append(Arriving(self.texts[rows], read_later(torch.cat([token, total], dim=1))))
        for row in range(rows.start, rows.stop):
            if (text := self.texts[row]) is not None:
                text.begun += 1
                if text.begun == text.count:
                    self.end(row)

    def take(self) -> Iterator[tuple[int, Answer]]:
        """Give the oldest tokens that are arriving to their texts; yields the answers that end with them."""
        arriving = self.arriving.popleft()
        for text, (token, total) in zip(arriving.texts, arriving.read(), strict=True):
            if text is None or text.ended:
                continue
            if not math.isfinite(total):  # then one of the logits is not
                raise non_finite(self.model)
            text.push(int(token))
            self.new_tokens += 1
            if text.ended:
                if text in self.texts:
                    self.end(self.texts.index(text))
                self.answered += 1
                yield text.index, text.answer


# -------------------------------------------------------------------------------------------------- some rows of caches


@contextmanager
def only_rows(model: GPT, rows: slice) -> Iterator[None]:
    """Within it the model's caches are those of some sequences of the batch."""
    caches, size, made = [attn.kv_cache for attn in model.layers], model.cache_batch_size, {}
    try:
        for attn, cache in zip(model.layers, caches, strict=True):
            attn.kv_cache = view_rows(cache, rows, made)
        model.cache_batch_size = rows.stop - rows.start
        yield
    finally:
        model.cache_batch_size = size
        for attn, cache in zip(model.layers, caches, strict=True):
            attn.kv_cache = cache


def view_rows(module: nn.Module, rows: slice, made: dict[int, nn.Module]) -> nn.Module:
    """Some sequences of a cache, all of whose buffers begin with the dimension of sequences: views, so that the cache
    holds what is written. made: id of a module -> its view, since layers share parts of their caches."""
    if id(module) not in made:
        made[id(module)] = view = copy.copy(module)
        view._buffers = {name: None if b is None else b[rows] for name, b in module._buffers.items()}
        view._modules = {name: view_rows(child, rows, made) for name, child in module._modules.items()}
    return made[id(module)]


# ------------------------------------------------------------------------------------------------------ how many rows


def require_room(model: GPT, requests: Sequence[Request]) -> int:
    """How many tokens the longest prompt is fed with its answer. Raises ValueError for one that cannot be read."""
    context = context_of(model)
    for request in requests:
        check_prompt(model, request.ids, request.max_new_tokens)
        check_range("max_new_tokens", request.max_new_tokens, 0, 10**9)
        if request.seed is not None:
            check_range("seed", request.seed, *LIMITS["seed"])
        check_stops(request.stop)
    return max((len(r.ids) + max(0, count_tokens(r, context) - 1) for r in requests), default=1)


def rows_that_fit(model: GPT, room: int) -> int:
    """How many rows of so many tokens the memory holds beside what reading the prompts takes."""
    device, length = model.transformer.wte.weight.device, model.cache_length(room)
    row = cache_bytes(model, 2, length) - cache_bytes(model, 1, length) + SCORE_BYTES * model.config.vocab_size
    return int(0.8 * (free_memory(device) + model.kv_cache_bytes()) // row)


def choose_rows(model: GPT, room: int, requests: int, wanted: int | None) -> int:
    """The rows of a batch for so many requests, each of `room` tokens. wanted: how many were asked for.

    Raises ValueError for more than the memory holds.
    """
    fits = rows_that_fit(model, room)
    if wanted is None:
        kind = model.transformer.wte.weight.device.type
        return max(1, min(MOST_ROWS.get(kind, MOST_ROWS["cpu"]), fits, requests))
    check_range("batch_size", wanted, 1)
    if wanted > max(1, fits):
        raise ValueError(
            f"batch_size={wanted} does not fit: the memory holds {max(1, fits)} rows of {room:,} tokens, the longest "
            f"prompt with its answer: use --batch_size {max(1, fits)}, or a smaller --max_new_tokens for more."
        )
    return max(1, min(wanted, requests))


def in_order(answers: Iterable[tuple[int, Answer]]) -> Iterator[tuple[int, Answer]]:
    """The answers by index 0, 1, ..., each as soon as it and those before it are there."""
    held, following = {}, 0
    for index, answer in answers:
        held[index] = answer
        while following in held:
            yield following, held.pop(following)
            following += 1
