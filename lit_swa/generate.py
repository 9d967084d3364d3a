"""Text from a model: prefill, the decode loop, sampling, and where to stop. Functions, so that the loop can be read.

Shapes: B rows, T tokens, V vocabulary. `generate` works on token ids, `generate_text` on text.
"""

import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

from lit_swa.linear_formats import OneTokenLinear, pack_for_cpu, replace_linears  # noqa: F401
from lit_swa.model import GPT, LENGTH_SCALINGS, VARIANTS, CacheLayout

if TYPE_CHECKING:
    from lit_swa.formats.tokenizer import StreamDecoder, Tokenizer


@dataclass
class Stats:
    """What one call of generate did: tokens and seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, those that were in the cache already
    new_tokens: int = 0
    prefill_seconds: float = 0.0  # until the logits of the first new token are there
    first_token_seconds: float = 0.0  # until the first new token was chosen
    decode_seconds: float = 0.0  # the steps after that
    decode_steps: int = 0

    def line(self, model: GPT) -> str:
        """One line for people."""
        fed = self.prompt_tokens - self.cached_tokens
        prefill = f"prefill {fed} tokens, {fed / max(self.prefill_seconds, 1e-9):.1f} tok/s"
        cached = f" ({self.cached_tokens} more from the cache)" if self.cached_tokens else ""
        decode = f"decode {self.decode_steps} steps, {self.decode_steps / max(self.decode_seconds, 1e-9):.1f} tok/s"
        return (
            f"{prefill}{cached} | first token {self.first_token_seconds * 1e3:.0f} ms | {decode} | "
            f"window {describe_window(model)} | cache {model.kv_cache_bytes() / 1e6:.1f} MB"
        )


def describe_window(model: GPT) -> str:
    """The keys that a query can see: "none (context 8192)", "256", or "4096 in 13 of 26 layers"."""
    windows = windows_of(model)
    n = sum(w is not None for w in windows)
    if n == 0:
        return f"none (context {model.config.block_size})"
    kind = " rolling" if rolls(model) or model.config.rolling_kv_cache else ""
    sinks = f" behind {model.config.n_sink_tokens} sinks" if "streaming" in model.config.layer_variants else ""
    part = "" if n == len(windows) else f" in {n} of {len(windows)} layers"
    return f"{model.config.sliding_window_size}{kind}{sinks}{part}"


# ----------------------------------------------------------------------------------------------------------- generation


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
    cached_ids: list[int] | None = None,
    decode: Callable[[Tensor, Tensor], Tensor] | None = None,
    should_stop: Callable[[], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
    stats: Stats | None = None,
) -> Iterator[int]:
    """Yield new tokens, one by one, as they are chosen. What does not fit is refused at once.

    prompt_ids: the whole sequence so far, at least one token.
    temperature: 0 takes the likeliest token; else logits are divided by it, and top_k, top_p, min_p cut the tail.
    stop_tokens: ids, or sequences of ids, that end the text. They are not yielded, nor is any part of a sequence that
        might become one before it is clear that it does not.
    cached_ids: the tokens that the model's cache holds, kept up to date as tokens are fed; the part of prompt_ids that
        it covers is not fed again. None: the cache is set up for this call.
    decode: what makes a one-token step, (token (1, 1), input_pos (1,)) -> logits (1, 1, V): a compiled model, say.
    should_stop: asked between steps; True ends the text.
    progress: told (tokens read, tokens of the prompt) after each chunk of a prompt that takes several.
    Ends early when the context is full. Raises ValueError for arguments that do not fit and for a prompt that is empty,
    longer than the context or not of the vocabulary.
    """
    ids = [int(i) for i in (prompt_ids.flatten().tolist() if isinstance(prompt_ids, Tensor) else prompt_ids)]
    check_arguments(model, ids, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty)
    cached = [] if cached_ids is None else cached_ids
    last = prepare_cache(model, ids, cached, max_new_tokens)
    vocab_size, device = model.config.vocab_size, model.transformer.wte.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    seen = mark_seen(ids, vocab_size, device) if repetition_penalty != 1.0 else None
    stops = StopFinder([[s] if isinstance(s, int) else [int(i) for i in s] for s in stop_tokens], empty=[])

    def choose(logits: Tensor) -> Tensor:
        logits = logits[:, -1, :vocab_size]  # rows of padding are no tokens
        return choose_token(logits, seen, temperature, top_k, top_p, min_p, repetition_penalty, generator)

    step = decode or (lambda token, input_pos: model(token, input_pos, input_pos_maxp1=len(cached) + 1))
    should_stop = should_stop or (lambda: False)
    read = functools.partial(prefill, model, ids, cached, should_stop, progress)
    return run_loop(
        model, ids, cached, last, read, choose, step, stops, should_stop or (lambda: False), stats or Stats()
    )


@torch.inference_mode()
def run_loop(
    model: GPT,
    ids: list[int],
    cached: list[int],
    last: int,
    read: Callable[[], Tensor | None],
    choose: Callable[[Tensor], Tensor],
    step: Callable[[Tensor, Tensor], Tensor],
    stops: "StopFinder",
    should_stop: Callable[[], bool],
    stats: Stats,
) -> Iterator[int]:
    """The loop of generate: feed the prompt, then choose a token and feed it, until position `last` was chosen for."""
    device, started = model.transformer.wte.weight.device, time.perf_counter()
    stats.prompt_tokens, stats.cached_tokens = len(ids), len(cached)
    logits = read()
    wait_for(device)
    stats.prefill_seconds = time.perf_counter() - started
    for pos in range(len(ids), last + 1):
        if logits is None or should_stop():
            break
        token = choose(logits)
        token_id = int(token)
        stats.new_tokens += 1
        if stats.new_tokens == 1:
            stats.first_token_seconds = time.perf_counter() - started
        released, found = stops.push([token_id])
        yield from released
        if found:
            return
        if pos < last:
            started = time.perf_counter()
            logits = step(token, torch.tensor([pos], device=device))
            cached.append(token_id)
            wait_for(device)
            stats.decode_seconds += time.perf_counter() - started
            stats.decode_steps += 1
    yield from stops.held  # what was not a stop after all


def check_arguments(
    model: GPT,
    ids: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
) -> None:
    """Raises ValueError, in one sentence, for what cannot be generated from."""
    if not ids:
        raise ValueError("The prompt is empty: give at least one token.")
    if not 0 <= min(ids) <= max(ids) < model.config.padded_vocab_size:
        raise ValueError(
            f"The prompt holds the token id {max(ids) if min(ids) >= 0 else min(ids)}, and the vocabulary has "
            f"{model.config.padded_vocab_size}: the tokenizer is another model's."
        )
    limits = (
        ("max_new_tokens", max_new_tokens, 0, 10**9),
        ("temperature", temperature, 0, 1e4),
        ("top_k", top_k, 1, 10**9),
        ("top_p", top_p, 1e-9, 1),
        ("min_p", min_p, 0, 1),
        ("repetition_penalty", repetition_penalty, 1e-3, 1e3),
    )
    for name, value, least, most in limits:
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name}={value} does not fit: it must lie between {least} and {most}.")


def prepare_cache(model: GPT, ids: list[int], cached: list[int], max_new_tokens: int) -> int:
    """See to it that the model has a cache with room, and that `cached`, what it holds, is a true prefix of ids.

    Returns the last position that a token can be chosen for: one after the last that can be fed.
    """
    context = model.config.block_size
    if not rolls(model) and len(ids) > context:
        raise ValueError(
            f"The prompt has {len(ids)} tokens and the context {context}: shorten it, go further with "
            "--model.attention dual_chunk --model.block_size N, or give every layer a window with "
            "--model.attention streaming --model.sliding_window_size S."
        )
    room = cache_room(model, len(ids) + max_new_tokens)
    keep = common_prefix(cached, ids[:-1])  # the last token is fed in any case: its logits are wanted
    slot_map = next(iter(model.slot_maps.values()), None)
    if slot_map is None or slot_map.pos.size(0) != 1:
        model.set_kv_cache(1, room)
        keep = 0
    elif len(cached) - keep > takes_back(model):
        keep = 0
    if model.max_seq_length < room and keep:
        doubled = cache_room(model, 2 * model.max_seq_length)  # so that copies stay few
        model.extend_kv_cache(max(room, doubled))
    elif model.max_seq_length < room:
        model.set_kv_cache(1, room, lookahead=slot_map.lookahead)
    if keep == 0:
        model.reset_kv_cache()
    del cached[keep:]
    last = len(ids) + max_new_tokens - 1
    return last if rolls(model) else min(last, context)


def rolls(model: GPT) -> bool:
    """True when every layer keeps a window and no more, so that a text may have any length."""
    return None not in windows_of(model) and all(layout.copies == 2 for layout in layouts_of(model, 1))


def cache_room(model: GPT, tokens: int) -> int:
    """The max_seq_length that a text of so many tokens needs: no more than a window, or else the context, is of use."""
    if not rolls(model):
        return min(tokens, model.config.block_size)
    return max(layout.sinks + layout.slots for layout in layouts_of(model, tokens))


def layouts_of(model: GPT, tokens: int) -> list[CacheLayout]:
    """The caches that the layers' variants ask for, for so many tokens."""
    return [VARIANTS[v].cache(model.config, tokens, 0) for v in dict.fromkeys(model.config.layer_variants)]


def windows_of(model: GPT) -> list[int | None]:
    """Every layer's window; None for a layer that attends in full."""
    return [VARIANTS[v].window(model.config) for v in model.config.layer_variants]


def takes_back(model: GPT) -> int:
    """How many tokens the model's caches can take back."""
    rolling = [m.lookahead for m in model.slot_maps.values() if m.copies == 2]
    return min(rolling) if rolling else 2**31


def common_prefix(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def prefill(
    model: GPT,
    ids: list[int],
    cached: list[int],
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor | None:
    """Feed the tokens of ids that are not in the cache; logits (1, 1, V) of the last, or None if stopped on the way."""
    device, logits = model.transformer.wte.weight.device, None
    size = prefill_chunk(model, batch_size=1)
    if (model.config.rope_scaling or {}).get("type") in LENGTH_SCALINGS:
        size = len(ids)  # what a token is depends on how long the text is when it is read: not on memory then
    while len(cached) < len(ids):
        if should_stop():
            return None
        start, stop = len(cached), min(len(cached) + size, len(ids))
        chunk = torch.tensor([ids[start:stop]], device=device)
        logits = model(chunk, torch.arange(start, stop, device=device), input_pos_maxp1=stop, logits_to_keep=1)
        cached.extend(ids[start:stop])
        if progress is not None and (start > 0 or stop < len(ids)):
            progress(stop, len(ids))
    return logits


def prefill_chunk(model: GPT, batch_size: int, memory: int | None = None) -> int:
    """How many tokens of a prompt to feed at once: as many as a quarter of the free memory holds activations for.

    memory: free bytes; None: asked of the device. The cache and the weights are there already, and attention bounds
    itself (SCORE_ELEMENTS), so what grows with the tokens is the residual stream, the projections and the MLP.
    """
    config, weight = model.config, model.transformer.wte.weight
    heads = (2 * config.n_head + 3 * config.n_query_groups) * config.head_size
    elements = 4 * config.n_embd + 3 * heads + 3 * config.intermediate_size  # live at once, some of it in float32
    per_token = batch_size * elements * max(weight.element_size(), 4)
    memory = free_memory(weight.device) if memory is None else memory
    most = 16384 if weight.device.type == "cuda" else 4096
    tokens = max(128, min(most, memory // 4 // per_token))
    return 2 ** (tokens.bit_length() - 1)


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on the device; an estimate on a CPU."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on this system
        return 2**31


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -------------------------------------------------------------------------------------------------------- faster steps


def compile_decode(model: GPT) -> Callable[[Tensor, Tensor], Tensor]:
    """A compiled one-token step for `generate(decode=...)`, compiled at its first use, once for all positions.

    On a GPU it is the whole model as one CUDA graph. On a CPU, one block is compiled and serves all layers, which takes
    seconds and not minutes, and its products are sums that Inductor writes itself: see OneTokenLinear.
    """
    if model.transformer.wte.weight.device.type == "cpu":
        model.fixed_shape_steps = True
        replace_linears(model, OneTokenLinear)
        for module in (*model.transformer.h, model.lm_head):
            compile_for_one_token(module)
        return model
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    def step(token: Tensor, input_pos: Tensor) -> Tensor:
        return compiled(token, input_pos).clone()  # a CUDA graph writes its next result to the same place

    return step


def warm_up(model: GPT, decode: Callable[[Tensor, Tensor], Tensor], tokens: int) -> float:
    """Compile the step, on a cache with room for so many tokens (or the one that is there); returns the seconds."""
    device, started = model.transformer.wte.weight.device, time.perf_counter()
    if not model.slot_maps:
        model.set_kv_cache(1, cache_room(model, tokens))
    with torch.inference_mode():
        for position in range(min(3, model.max_seq_length)):  # a CUDA graph is recorded at the second call
            decode(torch.zeros(1, 1, dtype=torch.long, device=device), torch.tensor([position], device=device))
    wait_for(device)
    model.reset_kv_cache()
    return time.perf_counter() - started


def compile_for_one_token(module: nn.Module) -> None:
    """Let a module whose first argument is (B, T, C) run compiled code when T is 1, and be as before otherwise."""
    plain = module.forward
    compiled = torch.compile(plain, fullgraph=True)

    def forward(x: Tensor, *arguments: Any) -> Tensor:
        return (compiled if x.size(1) == 1 else plain)(x, *arguments)

    module.forward = forward


# ------------------------------------------------------------------------------------------------------------- sampling


def choose_token(
    logits: Tensor,
    seen: Tensor | None,
    temperature: float,
    top_k: int | None,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    generator: torch.Generator | None,
) -> Tensor:
    """The next token (1, 1) from logits (1, V); it is marked in `seen`."""
    logits = logits.float()
    if seen is not None:
        logits = penalize(logits, seen, repetition_penalty)
    if temperature == 0:
        token = logits.argmax(dim=-1, keepdim=True)
    else:
        probabilities = probabilities_of(logits, temperature, top_k, top_p, min_p)
        # argmax(p / e) with e exponential is a draw from p (the exponential race), without multinomial's sync
        noise = torch.empty_like(probabilities).exponential_(1, generator=generator)
        token = (probabilities / noise).argmax(dim=-1, keepdim=True)
    if seen is not None:
        seen.scatter_(1, token, True)
    return token


def probabilities_of(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """What is sampled from, (B, V). In the usual order: temperature, top-k, top-p, min-p.

    top_k: the k likeliest.
    top_p: the fewest of the likeliest whose probabilities reach top_p (Holtzman et al. 2020, arXiv 1904.09751).
    min_p: those with at least min_p times the likeliest's probability (Nguyen et al. 2024, arXiv 2407.01082).
    """
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(dim=-1)
        before = p.cumsum(dim=-1) - p  # of the likelier ones; 0 for the first, which always stays
        logits = logits.masked_fill((before >= top_p).scatter(-1, order, before >= top_p), -torch.inf)
    if min_p > 0.0:
        p = logits.softmax(dim=-1)
        logits = logits.masked_fill(p < min_p * p.amax(dim=-1, keepdim=True), -torch.inf)
    return logits.softmax(dim=-1)


def mark_seen(ids: list[int], vocab_size: int, device: torch.device) -> Tensor:
    """(1, V) bool: which tokens the text holds."""
    seen = torch.zeros(1, vocab_size, dtype=torch.bool, device=device)
    seen[0, [i for i in set(ids) if i < vocab_size]] = True
    return seen


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the seen tokens less likely: logits / penalty, or * penalty if negative (Keskar et al. 2019, 1909.05858)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


# --------------------------------------------------------------------------------------------------------------- stops


class StopFinder:
    """Passes a stream of tokens (lists) or text (str) on up to the first stop, and holds back what may begin one."""

    def __init__(self, stops: Sequence, empty: list | str) -> None:
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


def generate_text(
    model: GPT,
    tokenizer: "Tokenizer",
    prompt_ids: Sequence[int],
    *,
    stop: Sequence[str] = (),
    continues: bool = True,
    **arguments: Any,
) -> Iterator[str]:
    """Yield the new text piece by piece: whole characters, no space lost. `arguments` are generate's.

    stop: strings that end the text and are not part of it.
    continues: the text goes on from the prompt's, so that a first token " word" keeps its space. False: it is alone.
    """
    from lit_swa.formats.tokenizer import StreamDecoder

    decoder = StreamDecoder(tokenizer)
    for token in prompt_ids if continues else ():
        decoder.push(token)
    return join_text(generate(model, prompt_ids, **arguments), decoder, StopFinder(list(stop), empty=""))


def join_text(tokens: Iterator[int], decoder: "StreamDecoder", stops: StopFinder) -> Iterator[str]:
    """The text of tokens, as they come, up to a stop."""
    for token in tokens:
        released, found = stops.push(decoder.push(token))
        if released:
            yield released
        if found:
            tokens.close()
            return
    released, found = stops.push(decoder.flush())
    yield released if found else released + stops.held
