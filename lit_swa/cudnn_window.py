"""A window of keys in one kernel of cuDNN, by its own frontend: pip install nvidia-cudnn-frontend.

torch calls cuDNN's attention for causal triangles alone. Its frontend (NVIDIA, github.com/NVIDIA/cudnn-frontend) takes
a band of the scores too, with gradients. Nothing here is imported where the package is missing.

Shapes as in model.py: queries (B, H, T, D), keys and values (B, G, L, D); the queries' own keys are the last T of L.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

OLDEST_BACKEND = 91900  # of cuDNN: the oldest that was tried
GIVEN = ("q", "k", "v", "o", "do", "stats")  # what the backward reads


@functools.cache
def is_installed() -> bool:
    try:
        import cudnn

        return cudnn.backend_version() >= OLDEST_BACKEND
    except (ImportError, RuntimeError):  # the package, or the library that it calls, is missing
        return False


def attention(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Query i sees its own key and the window - 1 before it: (B, H, T, D), in half precision."""
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    return WindowAttention.apply(q, k, v, window, scale)


class WindowAttention(torch.autograd.Function):
    """attention(), with gradients."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
        out = empty(q)
        stats = q.new_empty(*q.shape[:3], 1, dtype=torch.float32)  # log-sum-exps
        run("forward", window, scale, {"q": q, "k": k, "v": v, "o": out, "stats": stats})
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.window, ctx.scale = window, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, stats = ctx.saved_tensors
        T, before = q.size(2), k.size(2) - q.size(2)
        if 0 < before <= T:  # with more keys than queries cuDNN goes through all pairs: queries of zeros add nothing
            q, out, grad, stats = (F.pad(x, (0, 0, before, 0)) for x in (q, out, grad, stats))
        dq, dk, dv = (empty(x) for x in (q, k, v))
        given = {"q": q, "k": k, "v": v, "o": out, "do": grad, "stats": stats}
        run("backward", ctx.window, ctx.scale, given | {"dq": dq, "dk": dk, "dv": dv})
        return dq[:, :, -T:], dk, dv, None, None


def empty(x: Tensor) -> Tensor:
    """As x (B, H, T, D), with a token's heads side by side in memory, as the model's products read and write them."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


class Shape(NamedTuple):
    """What a kernel is chosen for, of one tensor."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def run(direction: str, window: int, scale: float, tensors: dict[str, Tensor]) -> None:
    """Fill the tensors that the direction makes, on the current stream."""
    import cudnn

    tensors = {name: x if x.stride(-1) == 1 else x.contiguous() for name, x in tensors.items()}
    device = tensors["q"].device
    shapes = tuple((name, Shape(tuple(x.shape), x.stride(), x.dtype)) for name, x in tensors.items())
    with torch.cuda.device(device):
        handle = handle_of(device.index)
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
        graph, places = build(direction, window, scale, shapes, device.index)
        workspace = torch.empty(graph.get_workspace_size(), device=device, dtype=torch.uint8)
        graph.execute({places[name]: x for name, x in tensors.items()}, workspace, handle=handle)


@functools.cache
def handle_of(device: int) -> Any:
    import cudnn

    return cudnn.create_handle()


@functools.lru_cache(maxsize=256)
def build(
    direction: str, window: int, scale: float, shapes: tuple[tuple[str, Shape], ...], device: int
) -> tuple[Any, dict[str, Any]]:
    """(cuDNN's graph, its tensors by name)"""
    import cudnn

    kinds, number = dict(shapes), cudnn.data_type
    types = {torch.bfloat16: number.BFLOAT16, torch.float16: number.HALF, torch.float32: number.FLOAT}
    half, wide = types[kinds["q"].dtype], number.FLOAT
    graph = cudnn.pygraph(
        io_data_type=half, intermediate_data_type=wide, compute_data_type=wide, handle=handle_of(device)
    )
    border, alike = cudnn.diagonal_alignment, kinds["q"].size[2] == kinds["k"].size[2]
    band = {
        "attn_scale": scale,
        "diagonal_alignment": border.TOP_LEFT if alike else border.BOTTOM_RIGHT,  # the last query has the last key
        "diagonal_band_left_bound": window,  # so many keys, a query's own included
        "diagonal_band_right_bound": 0,
    }
    given, made = (("q", "k", "v"), ("o", "stats")) if direction == "forward" else (GIVEN, ("dq", "dk", "dv"))
    places = {name: described(graph, name, kinds[name], types) for name in given}
    if direction == "forward":
        outputs = graph.sdpa(**places, is_inference=False, **band)
    else:
        q, k, v, o, do, stats = (places[name] for name in GIVEN)
        outputs = graph.sdpa_backward(q=q, k=k, v=v, o=o, dO=do, stats=stats, **band)
    for name, place in zip(made, outputs, strict=True):
        kind = kinds[name]
        place.set_output(True).set_dim(kind.size).set_stride(kind.stride).set_data_type(types[kind.dtype])
        places[name] = place
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    graph.build_plans()
    return graph, places


def described(graph: Any, name: str, kind: Shape, types: dict[torch.dtype, Any]) -> Any:
    """A tensor of cuDNN's graph."""
    return graph.tensor(name=name, dim=kind.size, stride=kind.stride, data_type=types[kind.dtype])
