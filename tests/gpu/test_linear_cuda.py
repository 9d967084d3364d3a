"""Linear attention compiled, and by kernels of its own, against itself: pytest tests/gpu -q, on a GPU. Those of whole
texts run in Triton's interpreter too: TRITON_INTERPRET=1 pytest tests/gpu/test_linear_cuda.py -q"""

import os
from types import SimpleNamespace

import pytest
import torch
from compiled import check_gradients
from torch import Tensor

from lit_swa import Config, linear
from lit_swa.rope import RoPE, find_span
from lit_swa.training.estimate import Tracker

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
runs_kernels = pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="needs a GPU, or TRITON_INTERPRET=1"
)
WIDE = {"n_embd": 256, "n_head": 4, "n_query_groups": 2, "head_size": 64, "block_size": 1024}
RELU, GATE = {"linear_feature_map": "relu"}, {"linear_gate": True}
DEVICE, DTYPE = ("cpu", torch.float32) if INTERPRETED else ("cuda", torch.bfloat16)
OF_HEADS = ("mix", "decay_bias")  # one number for each head
TEXTS = {  # tokens, window, sinks, query heads, groups, elements of a head, padding in front of the second text, more
    "a block": (100, 32, 0, 2, 1, 16, 0, {}),
    "a window of three blocks": (200, 96, 0, 2, 2, 32, 0, {}),
    "sinks and groups": (70, 16, 3, 4, 2, 16, 0, {}),
    "shorter than two windows": (90, 64, 4, 2, 1, 16, 0, RELU),
    "padded": (60, 48, 4, 2, 1, 32, 5, {}),
    "a head of 128": (150, 64, 2, 2, 1, 128, 0, {}),
    "gate": (200, 96, 0, 2, 1, 16, 0, GATE),
    "gate, a window of one block": (600, 64, 4, 2, 1, 64, 0, GATE),
    "gate, a window of three blocks, sinks and padding": (200, 96, 3, 4, 2, 64, 5, GATE),
    "gate, a short window, sinks and padding": (70, 16, 3, 4, 2, 16, 5, GATE),
    "no window": (150, 0, 0, 4, 2, 16, 0, {}),
    "gate, no window, sinks and padding": (150, 0, 3, 4, 2, 16, 5, GATE),
    "a window alone, with sinks": (70, 16, 3, 4, 2, 16, 5, GATE | {"linear_off": True}),
}


PROMPTS = {
    "plain": {"linear_window": 16},
    "gate and sinks": {"linear_window": 16, "linear_gate": True, "linear_sinks": 3},
    "no window": {"linear_window": 0, "linear_sinks": 3},
    "a window alone": {"linear_window": 16, "linear_off": True, "linear_sinks": 3},
}


def errs_as(expected: Tensor, plain: Tensor, fast: Tensor) -> bool:
    """True if `fast` errs as `plain` does, which computes the same in the same precision."""
    expected, plain, fast = (x.double() for x in (expected, plain, fast))
    of_plain, of_fast = ((x - expected).square().mean().sqrt() for x in (plain, fast))
    return bool(of_fast <= 2 * of_plain + 4 * torch.finfo(DTYPE).eps * expected.square().mean().sqrt())


def make_layer(case: str, seed: int) -> tuple[linear.LinearAttention, linear.Plan, Tensor, list[Tensor]]:
    """A layer, its plan for two texts, their positions, and q, k, v and a gradient of the outputs."""
    T, window, n, H, G, D, padding, more = TEXTS[case]
    torch.manual_seed(seed)
    fields = {"attention": "linear", "linear_window": window, "linear_sinks": n, "block_size": 512} | more
    config = Config(n_layer=1, n_head=H, n_query_groups=G, n_embd=H * D, head_size=D, **fields)
    mixer = linear.LinearAttention(config, "linear").to(DEVICE)
    for name, parameter in mixer.named_parameters():
        torch.nn.init.normal_(parameter, std=50 if "decay" in name else 0.5)
    inputs = [torch.randn(2, heads, T, D, device=DEVICE) for heads in (H, G, G, H)]
    pos = torch.stack([torch.arange(T), torch.arange(T) - padding]).clamp(min=-1).to(DEVICE)
    plan = mixer.plan(pos, find_span(pos, None), None, RoPE(config).to(DEVICE))
    inputs[3][1, :, :padding] = 0  # of outputs that nobody reads
    return mixer, plan, pos, inputs


def judge(case: str, seed: int, monkeypatch) -> tuple[list[str], list[list[Tensor]]]:
    """What is compared, by name: outputs, and gradients of q, k, v and the layer's parameters. Each by the chunks in
    float64, by the chunks in what the kernels compute in, and by the kernels."""
    from lit_swa import linear_text_kernels

    mixer, plan, pos, inputs = make_layer(case, seed)

    def run(dtype: torch.dtype, kernels: object) -> list[Tensor]:
        monkeypatch.setattr(linear, "text_kernels", lambda *_: kernels)
        q, k, v, grad = (x.to(dtype, copy=True).requires_grad_() for x in inputs)
        y = mixer(q, k, v, plan, None)
        found = [y.detach() * (pos >= 0)[:, None, :, None]]
        of = [q, k, v, *mixer.parameters()]  # a window alone has some for nothing
        found += torch.autograd.grad(y, of, grad, allow_unused=True, materialize_grads=True)
        return [x.double() for x in found]

    names = ["y", "q", "k", "v", *(name for name, _ in mixer.named_parameters())]
    return names, [run(torch.float64, None), run(DTYPE, None), run(DTYPE, linear_text_kernels)]


@runs_kernels
@pytest.mark.parametrize("case", TEXTS)
def test_kernels_of_whole_texts_are_the_chunks(case, monkeypatch):
    """Catches: a key that becomes older a token early or late, a block that is left out, a gradient of the greatest
    score, of a sink or of a state that goes to another key; in bfloat16, where each may err as the other does."""
    names, found = judge(case, 0, monkeypatch)
    for name, expected, plain, fast in zip(names, *found, strict=True):
        assert name in OF_HEADS or errs_as(expected, plain, fast), name


@runs_kernels
@pytest.mark.parametrize("case", ["padded", "gate, a window of three blocks, sinks and padding"])
def test_what_is_frozen_changes_no_gradient_of_the_rest(case, monkeypatch):
    """Catches: a gradient that is left out as nobody wants it, and that another one is made of."""
    from lit_swa import linear_text_kernels

    monkeypatch.setattr(linear, "text_kernels", lambda *_: linear_text_kernels)
    mixer, plan, _, (*inputs, grad) = make_layer(case, 0)
    mixer, inputs = mixer.to(DTYPE), [x.to(DTYPE) for x in inputs]

    def gradients(*learn: bool) -> list[Tensor]:
        leaves = [
            [x.detach().requires_grad_(learn[0]) for x in inputs],
            list(mixer.requires_grad_(learn[1]).parameters()),
        ]
        y = mixer(*leaves[0], plan, None)
        wanted = [x for part, learns in zip(leaves, learn, strict=True) for x in part if learns]
        return list(torch.autograd.grad(y, wanted, grad.to(DTYPE)))

    whole, parts = gradients(True, True), gradients(True, False) + gradients(False, True)
    for got, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=2 * torch.finfo(DTYPE).eps * expected.abs().max().item())


@runs_kernels
@pytest.mark.parametrize("case", ["sinks and groups", "gate"])
def test_kernels_do_not_run_on_tensors_without_numbers(case, monkeypatch):
    """Catches: an estimate of memory that ends in an access to no memory at all."""
    from lit_swa import linear_text_kernels

    monkeypatch.setattr(linear, "text_kernels", lambda *_: linear_text_kernels)
    mixer, plan, _, (q, k, v, _) = make_layer(case, 0)
    with Tracker() as tracker:
        y = mixer(*(torch.empty_like(x, requires_grad=True) for x in (q, k, v)), plan, None)
        y.backward(torch.ones_like(y))
    assert y.shape == q.shape and tracker.peak > 2 * y.nbytes
    assert all(p.grad.shape == p.shape for p in mixer.parameters())


@runs_kernels
def test_gradients_of_one_number_of_a_head_are_those_of_the_chunks(monkeypatch):
    """Catches: errors of rounding that add up over a text. Few numbers tell nothing of how large errors are: 48 do."""
    errors: dict[str, list[tuple[float, float]]] = {name: [] for name in OF_HEADS}
    for seed in range(12):
        names, found = judge("gate, a short window, sinks and padding", seed, monkeypatch)
        for name, expected, plain, fast in zip(names, *found, strict=True):
            if name in OF_HEADS:
                errors[name].append(tuple((x - expected).square().sum().item() for x in (plain, fast)))
    for name, of_seeds in errors.items():
        plain, fast = (sum(column) ** 0.5 for column in zip(*of_seeds, strict=True))
        assert fast < 2 * plain, name


@runs_kernels
@torch.no_grad()
@pytest.mark.parametrize("fields", PROMPTS.values(), ids=PROMPTS)
def test_a_prompt_read_by_kernels_leaves_what_the_chunks_leave(tiny_model, fields, monkeypatch):
    """Catches: a key of the prompt in both the state and the window, or in neither; a state that faded otherwise."""
    from lit_swa import linear_text_kernels

    model = tiny_model(attention="linear", **WIDE | fields).to(DEVICE).to(DTYPE)
    for mixer in (attn.mixer for attn in model.layers):
        for parameter in mixer.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    idx, found = torch.randint(0, 97, (2, 55), device=DEVICE), []
    for dtype, kernels in ((torch.float64, None), (DTYPE, None), (DTYPE, linear_text_kernels)):
        monkeypatch.setattr(linear, "text_kernels", lambda q, plan, _, kernels=kernels: kernels if plan.whole else None)
        model.to(dtype).set_kv_cache(2, 64, lookahead=3)
        y = [model(idx[:, a:b], torch.arange(a, b, device=DEVICE)) for a, b in ((0, 50), (50, 53), (53, 54), (52, 55))]
        caches = [x for name, x in model.named_buffers() if name.endswith((".state", ".norm", ".kv"))]
        found.append([x.clone() for x in (*y, *caches)])
        model.clear_kv_cache()
    assert all(errs_as(*three) for three in zip(*found, strict=True))


@runs_kernels
def test_kernels_read_no_sink_that_is_not_there():
    """Catches: a prompt shorter than the sinks that reads, and multiplies by 0, what lies behind its keys in memory."""
    from lit_swa import linear_text_kernels

    T, D = 2, 16
    q, v, k = (torch.full((1, 1, 8, D), torch.nan, device=DEVICE, dtype=DTYPE)[:, :, :T] for _ in range(3))
    for x in (q, k, v):
        x.normal_()
    seen, valid = torch.ones(1, T, 4, dtype=torch.bool, device=DEVICE).tril(), torch.zeros(1, T, device=DEVICE) > 0
    phi, mix = torch.rand(1, 1, T, 2 * D, device=DEVICE, dtype=DTYPE), torch.zeros(1, device=DEVICE)
    y = linear_text_kernels.attention(q, k, v, phi, phi, mix, None, valid, seen, 16, 1.0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


@runs_kernels
def test_chunks_of_a_text_that_is_trained_have_the_gradients_of_one_pass(tiny_model, monkeypatch):
    """Catches: a first chunk that hands its state on without a gradient, as kernels leave it."""
    from lit_swa import linear_text_kernels
    from lit_swa.exact_chunks import ExactChunks

    model = tiny_model(attention="linear", linear_window=16, linear_sinks=2, **WIDE).to(DEVICE).to(DTYPE).train()
    for mixer in (attn.mixer for attn in model.layers):
        for parameter in mixer.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    idx, targets = torch.randint(0, 97, (2, 1, 90), device=DEVICE)
    found = []
    for dtype, kernels in ((torch.float64, None), (DTYPE, None), (DTYPE, linear_text_kernels)):
        monkeypatch.setattr(linear, "text_kernels", lambda q, plan, _, kernels=kernels: kernels if plan.whole else None)
        reader = model.to(dtype) if kernels is None else ExactChunks(model.to(dtype), 50)
        model.zero_grad()
        reader(idx, targets=targets).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    exact, *both = found
    assert all(errs_as(x, *(grads[name] for grads in both)) for name, x in exact.items() if not name.endswith(OF_HEADS))


@runs_kernels
def test_kernels_leave_a_text_whose_features_would_fill_a_gpu_to_the_chunks(monkeypatch):
    """Catches: a prompt that once was read in pieces and now ends for want of memory; a GPU too small for a program."""
    from lit_swa import linear_text_kernels

    def fits(T: int, gigabytes: int, shared: int = 227) -> bool:
        properties = SimpleNamespace(total_memory=gigabytes * 10**9, shared_memory_per_block_optin=shared * 2**10)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        q = torch.empty(1, 32, T, 128, dtype=torch.bfloat16, device="meta")
        return linear_text_kernels.fits(q, window=64, sinks=0)

    assert fits(131072, 80)  # 8.6 GB
    assert not fits(262144, 80)
    assert not fits(131072, 48)
    assert not fits(1024, 80, shared=99)


@needs_gpu
@torch.no_grad()
def test_kernels_take_more_heads_than_a_grid_is_wide():
    """Catches: a row of many short texts, which is read as many heads, that no launch takes."""
    config = Config(attention="linear", linear_window=16, n_layer=1, n_head=32, n_embd=512, head_size=16, block_size=64)
    mixer = linear.LinearAttention(config, "linear").cuda().bfloat16()
    q, k, v = torch.randn(3, 2100, 32, 20, 16, device="cuda", dtype=torch.bfloat16)  # 67,200 heads
    pos = torch.arange(20, device="cuda")[None]
    plan = mixer.plan(pos, find_span(pos[0], None), None, RoPE(config).cuda())
    assert linear.text_kernels(q, plan, config) is not None
    alone = mixer(q[-1:], k[-1:], v[-1:], plan, None)
    torch.testing.assert_close(mixer(q, k, v, plan, None)[-1:], alone)


@needs_gpu
@pytest.mark.parametrize("fields", [{}, {"linear_gate": True, "linear_sinks": 3}], ids=["plain", "gate and sinks"])
def test_compiled_pieces_have_the_gradients_of_what_they_were_made_of(tiny_model, fields):
    """Catches: a gradient that compiled code adds up wrongly."""
    model = tiny_model(attention="linear", linear_window=48, **WIDE | fields).cuda().train()
    check_gradients(model, torch.randint(0, 97, (2, 900), device="cuda"), 1e-3)
