"""Attention made faster: nothing here defines what is computed, and without this file everything still works.

`faster_plan` is the entry. It gets the pairs of a call (model.Pairs: who sees whom, and where the keys lie) and answers
with functions that take the place of the plain steps of model.py, or with None. The ways, by what the device has:

    causal    all keys up to a query's own: cuDNN, FlashAttention or whatever SDPA picks
    merged    each range of keys is seen whole, or is a causal triangle; a kernel for each, merged by their log-sum-exps
    corners   the same for windows: a block of a window's length reads its own keys in a triangle, and those before in a
              triangle that is rotated by half a circle
    window    one kernel that takes the window by itself (cuDNN by its frontend, FlexAttention, FlashAttention), merged
              with the sinks

Shapes as in model.py: queries (B, H, T, D), keys and values (B, G, L, D), log-sum-exps (B, H, T).
"""

import contextlib
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if __package__:
    from .config import module_beside
    from .rope import apply_rope
else:  # copied beside a script of another project
    from config import module_beside
    from rope import apply_rope

if TYPE_CHECKING:
    from .model import Pairs, Part

cudnn_window = module_beside("cudnn_window")
MASKED_BLOCK = 128  # queries in a block that needs a mask, on a CPU
FOLDS = 8  # windows side by side in one call of a kernel: more would only take memory
LONG_CALL = 1024  # tokens from which on a kernel is worth its start
LARGE_TENSOR = 2**22  # elements of a tensor whose passes through a GPU's memory are worth a compiled kernel
FLEX_BLOCK = 128  # queries and keys in a block of FlexAttention's mask


class Faster(NamedTuple):
    """What takes the place of the plain steps."""

    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]  # for rope.apply_rope
    causal: Callable[[Tensor, Tensor, Tensor, float], Tensor]  # for s2.causal_attention
    attend: Callable[..., Tensor] | None = None  # (queries of each part, k, v, learned sink logits or None) -> outputs
    n_queries: int = 0  # how many queries, from the first on, attend() answers; the plain steps do the rest


class Tools(NamedTuple):
    """What the kernels at hand can do."""

    merge: str | None = None  # the kernel whose log-sum-exps let ranges be merged: cpu, cudnn, flash
    window: str | None = None  # what takes a window by itself: flex, flash
    multiple: int = 1  # ... for multiples of so many queries
    corners: bool = False  # windows are merged too, as triangles
    cudnn: bool = False  # cuDNN takes a window that nothing is merged with


def faster_plan(pairs: "Pairs") -> Faster | None:
    """A faster plan for a call, or None. Raises ValueError for an attention_backend that the device lacks."""
    config, device, T = pairs.config, pairs.q_pos.device, pairs.q_pos.size(1)
    if config.attention_backend == "flash" and device.type != "cuda":
        raise ValueError("attention_backend='flash' needs a GPU: set it to auto.")
    if T == 1 or device.type not in ("cpu", "cuda"):
        return None
    causal = functools.partial(causal_attention, backend=config.attention_backend)
    attend, n = choose_attend(pairs, find_tools(pairs), causal)
    if device.type == "cuda":
        return Faster(rotate, causal, attend, n)
    return None if attend is None else Faster(apply_rope, causal, attend, n)


def find_tools(pairs: "Pairs") -> Tools:
    """What attention_backend allows and the device has for a call of this length."""
    config, kind, T = pairs.config, pairs.q_pos.device.type, pairs.q_pos.size(1)
    flex, compiling = "flex" if config.attention_backend == "flex" else None, torch.compiler.is_compiling()
    if config.attention_backend == "sdpa":
        return Tools()
    if kind == "cpu":
        return Tools(None if compiling else "cpu", flex)
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else pairs.span.dtype
    if dtype not in (torch.float16, torch.bfloat16) or config.head_size % 8 or config.head_size > 256:
        return Tools(None, flex)
    hopper = torch.cuda.get_device_capability(pairs.q_pos.device) >= (9, 0) and config.head_size <= 128
    tools = gpu_tools(config.attention_backend, T, pairs.cached, hopper, pairs.window or 0)
    return tools._replace(merge=None, corners=False, cudnn=False) if compiling else tools


def gpu_tools(choice: str, T: int, cached: bool, hopper: bool, window: int) -> Tools:
    """The tools of a GPU in half precision, outside of a compiled function."""
    # cuDNN plans every new shape, which a short call is not worth
    merge = "cudnn" if hopper and T >= LONG_CALL and choice != "flash" else "flash"
    if choice in ("flex", "flash") and T >= FLEX_BLOCK:
        return Tools(merge, choice, corners=choice == "flash" and window >= FLEX_BLOCK)
    if T < LONG_CALL:
        return Tools(merge)
    corners = hopper and window >= LONG_CALL
    # Flex is the faster, and compiles every new shape: a prompt's odd length is not worth that.
    if has_triton() and (not cached or T >= 8 * LONG_CALL):
        cudnn = hopper and cudnn_window is not None and cudnn_window.is_installed()
        return Tools(merge, "flex", LONG_CALL, corners, cudnn)
    return Tools(merge, "flash", 1, corners)


def choose_attend(pairs: "Pairs", tools: Tools, causal: Callable[..., Tensor]) -> tuple[Callable | None, int]:
    """The function that makes the outputs of the first queries, and of how many; (None, 0): the plain steps do all."""
    config, T = pairs.config, pairs.q_pos.size(1)
    scale = (config.attention_scores_scalar or config.head_size) ** -0.5
    if config.attention_logit_softcapping is not None or not is_exact(pairs):
        return None, 0
    if is_whole(pairs) and not config.sink_logits:
        return (lambda queries, k, v, sinks: causal(queries[0], k, v, scale)), T
    bands = [is_band(pairs, part) for part in pairs.row.parts]
    kernel, multiple, corners = plan_window(tools, bands, config.sink_logits)
    if kernel is not None:
        n = T // multiple * multiple
        return (window_attend(pairs, kernel, n, bands, scale), n) if n else (None, 0)
    blocks = merge_blocks(pairs, bands, corners) if is_worth_merging(pairs, tools, corners) else None
    if blocks is None:
        return None, 0
    return (lambda queries, k, v, sinks: MergedAttention.apply(tools.merge, blocks, scale, sinks, k, v, *queries)), T


def plan_window(tools: Tools, bands: list[bool], sink_logits: bool) -> tuple[str | None, int, bool]:
    """How a window among the parts is read: the kernel that takes it whole, or None; the number of whose multiple the
    kernel's queries must be; and whether the window is cut into corners, which are merged."""
    if not any(bands):
        return None, 1, False
    # torch's flash kernel gives no log-sum-exp to merge sinks by, but takes a window alone faster than it merges one
    alone = tools.window is not None and len(bands) == 1 and not sink_logits
    if tools.cudnn and alone:
        return "cudnn", 1, False
    if tools.corners and not (alone and tools.merge == tools.window):
        return None, 1, True
    return tools.window if tools.window == "flex" or alone else None, tools.multiple, False


def is_worth_merging(pairs: "Pairs", tools: Tools, corners: bool) -> bool:
    """True if strips that are merged beat the plain steps: several parts on a CPU; on a GPU, what needs no mask."""
    if tools.merge is None or corners:
        return tools.merge is not None
    if pairs.q_pos.device.type == "cpu":
        return len(pairs.row.parts) > 1 or pairs.config.sink_logits
    return pairs.window is None and pairs.q_pos.size(1) >= FLEX_BLOCK


def is_exact(pairs: "Pairs") -> bool:
    """True if the host knows the keys' positions, and the row which of them a query sees."""
    known = pairs.layout is not None and pairs.layout.exact
    return known and all(part.run and part.reach is not None for part in pairs.row.parts)


def is_whole(pairs: "Pairs") -> bool:
    """True if every query sees the keys up to its own, and no others are there."""
    parts, T = pairs.row.parts, pairs.q_pos.size(1)
    return is_exact(pairs) and pairs.span.fresh and len(parts) == 1 and pairs.sees_all(parts[0], T - 1, T, 0, T)


def is_band(pairs: "Pairs", part: "Part") -> bool:
    """True if the part is the variant's window and nothing else, but for some first keys that it leaves out."""
    window, first, T = pairs.window, pairs.layout.first, pairs.q_pos.size(1)
    if window is None:
        return False
    lead = max(0, part.reach(0, 1, pairs.config)[0])
    some = {first, first + T - 1, lead, lead + window - 1, lead + window, *range(first, first + T, T // 64 + 1)}
    for q in some:
        lo, hi = part.reach(q, q + 1, pairs.config)
        if (max(lead, lo), hi) != (max(lead, q - window + 1), q + 1):
            return False
    return True


# -------------------------------------------------------------------------------------------------------- whole kernels


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Tensor:
    """Every query sees the keys up to its own: (B, H, T, D) with (B, G, T, D) to (B, H, T, D)."""
    gqa, long = q.size(1) != k.size(1), q.device.type == "cuda" and q.size(2) >= LONG_CALL
    if backend == "flash" and long and q.dtype != torch.float32:
        return flash_attention(q, k, v, None, scale)
    if backend == "sdpa" or not long or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels, set_priority=True):  # on an H100 cuDNN takes 0.6 of FlashAttention-2's time
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """FlashAttention for queries (B, H, T, D) whose own keys are the last T of L: the flash-attn package's if it is
    installed, else torch's. window: how many keys a query sees, itself included."""
    (B, H, T, D), L, left = q.shape, k.size(2), -1 if window is None else window - 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, T, H, D)
    if flash_attn_function() is not None:
        y = flash_attn_function()(q, k, v, softmax_scale=scale, causal=True, window_size=(left, -1))
        return y.transpose(1, 2)
    starts = torch.arange(B + 1, device=q.device, dtype=torch.int32)  # of the sequences, one behind the other
    flat = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))  # (B * T, H, D)
    y = varlen_function()(*flat, starts * T, starts * L, T, L, scale=scale, window_size=(left, 0))
    return y.view(B, T, H, D).transpose(1, 2)


@functools.cache
def flash_attn_function() -> Callable[..., Tensor] | None:
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


@functools.cache
def varlen_function() -> Callable[..., Tensor]:
    """torch's FlashAttention, which newer releases must be told of key heads that several query heads share."""
    from torch.nn.attention.varlen import varlen_attn

    told = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return functools.partial(varlen_attn, enable_gqa=True) if told else varlen_attn


def window_attend(pairs: "Pairs", kernel: str, n: int, bands: Sequence[bool], scale: float) -> Callable[..., Tensor]:
    """The first n queries of a window: its keys by a kernel that takes windows, other parts beside it, merged."""
    queries, window = slice(0, n), pairs.window
    strips = [strip for i in range(len(bands)) for strip in window_strips(pairs, i, n, kernel, bands[i])]
    if kernel != "flex":
        whole = flash_attention if kernel == "flash" else cudnn_window.attention
        return lambda q, k, v, sinks: whole(
            q[0][:, :, queries], k[:, :, strips[0].keys], v[:, :, strips[0].keys], window, scale
        )

    def attend(rotated: list[Tensor], k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        parts = []
        for strip in strips:
            cut = rotated[strip.part][:, :, queries], k[:, :, strip.keys], v[:, :, strip.keys]
            if strip.flex is not None:
                parts.append(flex_attention_with_lse(*cut, strip.flex, scale))
            else:
                parts.append(as_one_kernel(attention_with_lse, *cut, strip.dense_mask(n, k.device), scale))
        out, lse = parts[0] if len(parts) == 1 else as_one_kernel(merge, *parts)
        return out if sinks is None else out * kept_beside(lse, sinks).to(out.dtype)

    return attend


def window_strips(pairs: "Pairs", n: int, stop: int, kernel: str, band: bool) -> "list[Strip]":
    """The keys that the queries 0 .. stop - 1 read in part n, with the window left to the kernel."""
    part, window = pairs.row.parts[n], pairs.window
    if not band:
        return part_strips(pairs, n, slice(0, stop), band=False, corners=False, triangles=False, shared={})
    lo, hi = part.reach(pairs.layout.first, pairs.layout.first + stop, pairs.config)
    keys = pairs.layout.keys(max(0, lo), hi)
    if kernel != "flex":
        return [Strip(keys, n)]
    if keys.stop <= keys.start:  # all keys are sinks
        return []
    more = min(keys.start, -(keys.stop - keys.start) % FLEX_BLOCK)  # whole blocks need no check of where keys end
    block_mask = window_block_mask(stop, keys.stop - keys.start + more, window, more, pairs.q_pos.device)
    return [Strip(slice(keys.start - more, keys.stop), n, flex=block_mask)]


def flex_attention_with_lse(q: Tensor, k: Tensor, v: Tensor, block_mask: Any, scale: float) -> tuple[Tensor, Tensor]:
    """FlexAttention's output (B, H, T, D) and log-sum-exp (B, H, T). On a CPU it is not compiled: right, but slow."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    cuda, options = q.device.type == "cuda", None
    if cuda and q.size(-1) <= 128 and torch.cuda.get_device_capability(q.device) >= (9, 0):
        options = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 128, "fwd_num_warps": 8, "fwd_num_stages": 3, "fwd_USE_TMA": True}
    compiles = cuda and not torch.compiler.is_compiling()
    flex = compiled(flex_attention, dynamic=False) if compiles else flex_attention  # for each shape: 1.4 times as fast
    with torch._dynamo.config.patch(recompile_limit=256) if compiles else contextlib.nullcontext():
        y, aux = flex(
            q, k, v, block_mask=block_mask, scale=scale, enable_gqa=q.size(1) != k.size(1), kernel_options=options,
            return_aux=AuxRequest(lse=True),
        )  # fmt: skip
    return y, aux.lse


def window_block_mask(T: int, L: int, window: int, skip: int, device: torch.device) -> Any:
    """FlexAttention's block mask for T queries whose own keys are the last T of L, which see `window` keys each, and of
    the first `skip` keys none. It is made of the window's borders, block by block: nothing of T x L is built.
    """
    from torch.nn.attention.flex_attention import BlockMask

    offset = L - T
    start = torch.arange(0, T, FLEX_BLOCK, device=device) + offset  # where each block's first query has its own key ...
    stop = (start + FLEX_BLOCK).clamp(max=L) - 1  # ... and its last
    block = torch.arange(-(-L // FLEX_BLOCK), device=device)
    seen_by_one = ((start - window + 1).clamp(min=skip) // FLEX_BLOCK, stop // FLEX_BLOCK)  # first and last block
    seen_by_all = (-(-(stop - window + 1).clamp(min=skip) // FLEX_BLOCK), (start + 1) // FLEX_BLOCK - 1)
    near, whole = ((block >= first[:, None]) & (block <= last[:, None]) for first, last in (seen_by_one, seen_by_all))

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:  # how many of each row, and which, in front
        order = torch.sort(~chosen, dim=-1, stable=True).indices
        return chosen.sum(-1)[None, None].to(torch.int32), order[None, None].to(torch.int32)

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q + offset) & (q + offset - k < window) & (k >= skip)

    lists = (*listed(near & ~whole), *listed(whole))
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=FLEX_BLOCK, mask_mod=seen, seq_lengths=(T, L))


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, D) and log-sum-exp (B, H, T) of a few keys, such as sinks, in steps that one kernel can do."""
    (B, H, T, D), G = q.shape, k.size(1)
    q = q.reshape(B, G, H // G, T, 1, D).to(torch.promote_types(q.dtype, torch.float32))
    scores = (q * k[:, :, None, None]).sum(-1) * scale  # (B, G, R, T, L)
    scores = scores if mask is None else scores.masked_fill(~mask[:, :, None], -math.inf)
    lse = scores.logsumexp(dim=-1, keepdim=True)
    out = ((scores - lse).exp().unsqueeze(-1) * v[:, :, None, None]).sum(-2).to(v.dtype)
    return out.view(B, H, T, D), lse.view(B, H, T)


# ------------------------------------------------------------------------------------ queries and keys, cut into strips


class Strip(NamedTuple):
    """Some keys, and how the queries of a block see them in one part of the variant: all, unless a field says else."""

    keys: slice
    part: int
    mask: Tensor | None = None  # (1 or B, 1, T, L) bool
    causal: bool = False  # the keys up to a query's own
    corner: bool = False  # query x sees the keys from x on, and the last query, one more than there are keys, none
    flex: Any = None  # what a BlockMask says
    still: bool = False  # every fold of the block reads the same keys

    def dense_mask(self, T: int, device: torch.device) -> Tensor | None:
        """The mask for T queries, a causal one written out."""
        if not self.causal:
            return self.mask
        return torch.ones(T, self.keys.stop - self.keys.start, dtype=torch.bool, device=device).tril()[None, None]


class MergeBlock(NamedTuple):
    """Some queries and the strips of keys that they read.

    Several windows that are alike, one after the other, are a block of so many folds: a batch to the kernel. The strips
    are those of the first, and move on with each.
    """

    queries: slice
    strips: list[Strip]
    folds: int = 1

    def cut(
        self, strip: Strip, queries: Sequence[Tensor], k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys, values and mask of a strip, the folds in the batch."""
        q = queries[strip.part][:, :, self.queries]
        if self.folds == 1:
            return q, k[:, :, strip.keys], v[:, :, strip.keys], strip.mask
        k, v = (self.folded(strip, x).expand(-1, self.folds, -1, -1, -1).flatten(0, 1) for x in (k, v))
        return fold(q, self.folds), k, v, strip.mask

    def folded(self, strip: Strip, x: Tensor) -> Tensor:
        """What each fold reads of x (B, G, L, D), as a view (B, 1 or folds, G, keys, D) of it."""
        if self.folds == 1 or strip.still:
            return x[:, :, strip.keys].unsqueeze(1)
        run = slice(strip.keys.start, strip.keys.start + self.queries.stop - self.queries.start)
        runs = x[:, :, run].unflatten(2, (self.folds, -1)).transpose(1, 2)
        return runs[:, :, :, : strip.keys.stop - strip.keys.start]


def merge_blocks(pairs: "Pairs", bands: Sequence[bool], corners: bool) -> list[MergeBlock] | None:
    """Cut the queries into blocks as large as they can be, and for each the keys into strips that a kernel can do.

    None: a strip needs a mask, and the kernel takes none.
    """
    T, windowed = pairs.q_pos.size(1), pairs.window is not None
    alike = T
    if windowed:
        alike = pairs.window if corners else MASKED_BLOCK
    cuts = cut_between([0, *block_edges(pairs, corners), T], FOLDS * alike if corners else alike)
    shared: dict[int, Tensor | None] = {}
    blocks = []
    for start, stop in reversed(cuts):  # most keys first, for `shared`
        folds = max(1, (stop - start) // alike)
        one = slice(start, start + (stop - start) // folds)
        strips = [
            strip
            for n, band in enumerate(bands)
            for strip in part_strips(pairs, n, one, band, corners, triangles=True, shared=shared)
        ]
        if pairs.q_pos.device.type != "cpu" and any(strip.mask is not None for strip in strips):
            return None  # only the CPU's kernel takes a mask
        blocks.append(MergeBlock(slice(start, stop), strips, folds))
    return blocks[::-1]


def block_edges(pairs: "Pairs", corners: bool) -> list[int]:
    """Where, among the queries, merged blocks end: at the variant's edges and, where corners are cut, at windows.

    Windows are counted from the call's first query that has a whole window of keys before it; an earlier one sees all
    keys. So a long text's pieces are cut alike, and a kernel that plans for each shape plans few.
    """
    first, config = pairs.layout.first, pairs.config
    stop, edges_of = first + pairs.q_pos.size(1), pairs.row.edges or (lambda a, b, c: ())
    edges = set(edges_of(first, stop, config))
    if corners:
        window, lead = pairs.window, max(edges_of(0, stop, config), default=0)
        begin = max(first, lead + window)
        edges |= {x for x in (begin, stop - (stop - begin) % window) if begin <= x < stop}
    return [edge - first for edge in sorted(edges)]


def cut_between(edges: list[int], size: int) -> list[tuple[int, int]]:
    """Blocks, start and stop, of `size` at most from the first edge to the last, none across an edge."""
    return [(a, min(a + size, stop)) for start, stop in itertools.pairwise(edges) for a in range(start, stop, size)]


def part_strips(
    pairs: "Pairs",
    n: int,
    queries: slice,
    band: bool,
    corners: bool,
    triangles: bool,
    shared: dict[int, Tensor | None],
) -> list[Strip]:
    """The keys that some queries read in part n: none, one strip, or some: a corner, older keys and their own."""
    part, layout, config = pairs.row.parts[n], pairs.layout, pairs.config
    a, b = layout.first + queries.start, layout.first + queries.stop  # the queries' positions
    lo, hi = part.reach(a, b, config)
    lo = max(0, lo)
    if lo >= hi:
        return []
    if triangles and hi == b and part.reach(b - 1, b, config)[0] <= a:  # their own keys: a triangle
        corner = max(lo, b - pairs.window) if band and corners else lo
        if corner == a or pairs.sees_all(part, a, b, corner, a):
            older = [Strip(layout.keys(lo, corner), n, corner=True)] if lo < corner else []
            older += [Strip(layout.keys(corner, a), n)] if corner < a else []
            return [*older, Strip(layout.keys(a, b), n, causal=b - a > 1)]
    keys = layout.keys(lo, hi)
    if hi <= a + 1 and pairs.sees_all(part, a, b, lo, hi):
        return [Strip(keys, n, still=not band)]
    return [Strip(keys, n, mask=pairs.mask(n, queries, keys, shared))]


# ----------------------------------------------------------------------------------------------- merging by log-sum-exp


class MergedAttention(torch.autograd.Function):
    """Attention over several strips of keys, each by a kernel, merged by the log-sum-exps of their scores.

    With lse_r of strip r and lse of all, o = sum of exp(lse_r - lse) o_r. A kernel's backward makes its probabilities
    as exp(score - lse); given lse and output of the whole softmax, it gives the exact gradients of its strip. Learned
    sink logits (H,) are one more strip, of a key without a value.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernel: str,
        blocks: list[MergeBlock],
        scale: float,
        sinks: Tensor | None,
        k: Tensor,
        v: Tensor,
        *queries: Tensor,
    ) -> Tensor:
        out, lses = torch.empty_like(queries[0]), []
        for block in blocks:
            parts = [strip_forward(kernel, scale, s, *block.cut(s, queries, k, v)) for s in block.strips]
            rows = out[:, :, block.queries].unflatten(2, (block.folds, -1)).transpose(1, 2)  # as fold(), still a view
            lses.append(as_one_kernel(merge_into, rows, tuple(s.corner for s in block.strips), *parts))
            if sinks is not None:
                rows *= kept_beside(lses[-1], sinks).unflatten(0, rows.shape[:2]).to(rows.dtype)
                lses[-1] = torch.logaddexp(lses[-1], sinks.to(lses[-1].dtype)[:, None])
        ctx.kernel, ctx.blocks, ctx.scale = kernel, blocks, scale
        ctx.save_for_backward(out, sinks, k, v, *queries, *lses)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, sinks, k, v, *rest = ctx.saved_tensors
        queries, lses = rest[: -len(ctx.blocks)], rest[-len(ctx.blocks) :]
        wide = torch.promote_types(k.dtype, torch.float32)
        dsinks = None if sinks is None else torch.zeros_like(sinks, dtype=wide)
        dkv, dqs = [torch.zeros_like(t, dtype=wide) for t in (k, v)], [torch.zeros_like(q) for q in queries]
        for block, lse in zip(ctx.blocks, lses, strict=True):
            rows, n = block.queries, block.folds
            done = fold(grad[:, :, rows], n), fold(out[:, :, rows], n), lse
            if sinks is not None:
                share = (sinks.to(lse.dtype)[:, None] - lse).exp()  # (B * folds, H, T): the sinks' part of the softmax
                dsinks -= (share * (done[0].to(wide) * done[1]).sum(-1)).sum(dim=(0, 2))
            sums: dict[int, Tensor] = {}  # part -> gradient of this block's queries
            for strip in block.strips:
                dq, *new = strip_backward(ctx.kernel, ctx.scale, strip, done, block.cut(strip, queries, k, v))
                for total, d in zip(dkv, new, strict=True):
                    total = block.folded(strip, total)
                    total += d.unflatten(0, (-1, n)).sum_to_size(total.shape)
                sums[strip.part] = sums[strip.part] + dq if strip.part in sums else dq.to(wide)
            for part, dq in sums.items():
                dqs[part][:, :, rows] = unfold(dq, n)
        return (
            None,
            None,
            None,
            None if sinks is None else dsinks.to(sinks.dtype),
            *(total.to(k.dtype) for total in dkv),
            *dqs,
        )


def merge(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One attention from outputs (B, H, T, D) over disjoint keys and their log-sum-exps (B, H, T)."""
    lse = functools.reduce(torch.logaddexp, [lse for _, lse in parts])  # (B, H, T)
    out = sum(o * (lse_r - lse).exp().unsqueeze(-1) for o, lse_r in parts)
    return out.to(parts[0][0].dtype), lse


def kept_beside(lse: Tensor, sinks: Tensor) -> Tensor:
    """What learned sink logits (H,) leave of a softmax with these log-sum-exps (B, H, T): (B, H, T, 1)."""
    return torch.sigmoid(lse - sinks.to(lse.dtype)[:, None]).unsqueeze(-1)


def merge_into(rows: Tensor, flipped: tuple[bool, ...], *parts: tuple[Tensor, Tensor]) -> Tensor:
    """merge(), written to a block's rows (B, folds, H, T, D) of the output; the log-sum-exp (B * folds, H, T).

    A part that is flipped is a corner's: the last query first, and of the very last nothing.
    """
    upright = []
    for is_flipped, (out, lse) in zip(flipped, parts, strict=True):
        if is_flipped:
            out, lse = F.pad(out.flip(2), (0, 0, 0, 1)), F.pad(lse.flip(2), (0, 1), value=-math.inf)
        upright.append((out, lse))
    out, lse = upright[0] if len(parts) == 1 else merge(*upright)
    rows.copy_(out.unflatten(0, (rows.size(0), -1)))
    return lse


def flip(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The last token first, in (B, H, T, ...)."""
    return tuple(x.flip(2) for x in tensors)


def fold(x: Tensor, n: int) -> Tensor:
    """(B, H, n * T, ...) -> (B * n, H, T, ...): runs of T tokens as a batch. No copy is made if B is 1."""
    return x.unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1)


def unfold(x: Tensor, n: int) -> Tensor:
    """(B * n, H, T, ...) -> (B, H, n * T, ...)."""
    return x.unflatten(0, (-1, n)).transpose(1, 2).flatten(2, 3)


def strip_forward(
    kernel: str, scale: float, strip: Strip, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, D) and log-sum-exp (B, H, T) of one strip.

    A window's corner, rotated by half a circle, is a causal triangle: the last query first, the last key first. Its
    output is left like this, for merge_into().
    """
    if not strip.corner:
        return kernel_forward(kernel, scale, q, k, v, mask, strip.causal)
    return kernel_forward(kernel, scale, *as_one_kernel(flip, q[:, :, : k.size(2)], k, v), None, True)


def strip_backward(
    kernel: str, scale: float, strip: Strip, done: tuple[Tensor, ...], cut: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one strip's queries, keys and values.

    done: gradient, output and log-sum-exp of the whole softmax. cut: the strip's queries, keys, values and mask.
    """
    if not strip.corner:
        return kernel_backward(kernel, scale, *done, *cut, strip.causal)
    q, k, v, _ = cut
    flipped = as_one_kernel(flip, *(x[:, :, : k.size(2)] for x in (*done, q)), k, v)
    dq, dk, dv = kernel_backward(kernel, scale, *flipped, None, True)
    return F.pad(dq.flip(2), (0, 0, 0, 1)), dk.flip(2), dv.flip(2)


def kernel_forward(
    kernel: str, scale: float, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Output (B, H, T, D) and log-sum-exp (B, H, T) of q (B, H, T, D) over k, v (B, G, L, D), by an operator of ATen.

    kernel: cpu, cudnn or flash; only the first of them takes a mask.
    """
    aten = torch.ops.aten
    kernel = kernel_for(kernel, q, k)
    if kernel == "cpu":
        mask = additive(mask, q)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        return out, lse
    if kernel == "cudnn":
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
        return out, lse.view(out.shape[:3])
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]


def kernel_backward(
    kernel: str,
    scale: float,
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given the output and the log-sum-exp of the softmax that they are a part of."""
    aten = torch.ops.aten
    kernel = kernel_for(kernel, q, k)
    if kernel == "cpu":
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(grad, q, k, v, out, lse, 0.0, causal, attn_mask=additive(mask, q), scale=scale)
    seed = torch.zeros((), dtype=torch.int64, device=q.device)  # of the dropout that there is not
    if kernel == "cudnn":
        lse, T, L = lse.contiguous().unsqueeze(-1), q.size(2), k.size(2)
        return aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse, seed, seed, None, None, None, T, L, 0.0, causal, scale=scale
        )
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse.contiguous(), None, None, q.size(2), k.size(2), 0.0, causal, seed, seed, scale=scale
    )


def kernel_for(kernel: str, q: Tensor, k: Tensor) -> str:
    """cuDNN plans every shape; a few sinks are not worth that."""
    return "flash" if kernel == "cudnn" and min(q.size(2), k.size(2)) < FLEX_BLOCK else kernel


def additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """A mask (1 or B, 1, T, L) of bool as numbers to add to scores, (B, H, T, L)."""
    if mask is None:
        return None
    hidden = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -math.inf)
    return hidden.expand(q.size(0), q.size(1), -1, -1)


# ------------------------------------------------------------------------------------------------------------ compiling


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """rope.apply_rope, compiled where it is worth it."""
    return (Rotation.apply if is_large(x) else apply_rope)(x, cos, sin)


class Rotation(torch.autograd.Function):
    """rotate(), whose gradient is rotated back. Compiled gradients are copied until they lie in memory as torch expects
    them; these lie as they come, so that q's, k's and v's are joined in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return as_one_kernel(apply_rope, x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return as_one_kernel(apply_rope, grad, cos, sin.roll(sin.size(-1) // 2, dims=-1)), None, None


def as_one_kernel(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), compiled where it would be many passes over much of a GPU's memory."""
    first = next(x for a in arguments for x in (a if isinstance(a, tuple) else (a,)) if isinstance(x, Tensor))
    if not is_large(first):
        return function(*arguments)
    with torch._dynamo.config.patch(recompile_limit=64):  # for layouts, numbers of strips, with and without gradients
        return compiled(function)(*arguments)


def is_large(x: Tensor) -> bool:
    """True if a compiled kernel is worth its start, and may be compiled here."""
    large = x.device.type == "cuda" and x.numel() >= LARGE_TENSOR
    return large and not torch.compiler.is_compiling() and has_triton()


@functools.cache
def compiled(function: Callable[..., Any], dynamic: bool | None = None) -> Callable[..., Any]:
    return torch.compile(function, dynamic=dynamic)


@functools.cache
def has_triton() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()
