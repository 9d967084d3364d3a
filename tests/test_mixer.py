"""The seams of the model: a mixer from outside with a state of its own, heads by layer, a block's loss, new weights."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from tiny import randomize, tiny_config
from torch import Tensor

from lit_swa import GPT
from lit_swa.generate import describe_window, generate
from lit_swa.model import VARIANTS, Block, Mixer, RoPE, Span, Variant


class State(nn.Module):
    """A recurrent state (B, H, D, D), whatever the text's length, and those before the last few tokens."""

    unbounded = True

    def __init__(self, batch: int, n_head: int, head_size: int, lookahead: int, **place: Any) -> None:
        super().__init__()
        self.state, self.lookahead, self.past = torch.zeros(batch, n_head, head_size, head_size, **place), lookahead, []

    @property
    def bytes(self) -> int:
        return self.state.numel() * self.state.element_size()

    def reset(self) -> None:
        self.state.zero_()
        self.past.clear()

    def take_over(self, old: "State") -> None:
        self.state, self.past = old.state, old.past

    def can_take_back(self, n: int) -> bool:
        return n <= min(self.lookahead, len(self.past))

    def take_back(self, n: int) -> None:
        for _ in range(n):
            self.state = self.past.pop()


class DecayingSum(Mixer):
    """y_t = q_t S_t with S_t = decay * S_(t-1) + k_t v_t^T, and a trained decay for each head: linear attention."""

    rolls = any_length = True

    def __init__(self, config: Any, variant: str, layer: int) -> None:
        super().__init__(config, variant, layer)
        self.decay = nn.Parameter(torch.full((config.n_head,), 2.0))

    def cache_length(self, tokens: int) -> int:
        return 1

    def new_cache(self, batch: int, length: int, lookahead: int, heads: Any, beside: Any = None, **place: Any) -> State:
        return State(batch, heads[0], self.config.head_size, lookahead, **place)

    def plan(self, pos: Tensor, span: Span, cache: State | None, rope: RoPE) -> dict[str, Any]:
        return {"angles": rope(pos)}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, plan: dict[str, Any], cache: State | None) -> Tensor:
        (B, H, T, D), R = q.shape, q.size(1) // k.size(1)
        k, v = k.repeat_interleave(R, dim=1), v.repeat_interleave(R, dim=1)
        state = torch.zeros(B, H, D, D) if cache is None else cache.state
        outputs = []
        for t in range(T):
            if cache is not None:
                cache.past = [*cache.past, state][-cache.lookahead :] if cache.lookahead else []
            state = self.decay.sigmoid()[:, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
            outputs.append((q[:, :, t, None] @ state).squeeze(2))
        if cache is not None:
            cache.state = state
        return torch.stack(outputs, dim=2)


@pytest.fixture
def recurrent():
    VARIANTS["recurrent"] = Variant(mixer=DecayingSum)
    yield
    del VARIANTS["recurrent"]


def build(**fields) -> GPT:
    model = GPT(tiny_config(**fields)).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("attention", ["recurrent", "recurrent,sliding,full"])
@torch.no_grad()
def test_a_mixer_with_parameters_and_a_state_needs_no_branch_elsewhere(recurrent, attention):
    """Catches: a place that knows what caches are made of. Any split of a text, and tokens that are taken back."""
    model = build(attention=attention, n_layer=3, sliding_window_size=5)
    idx = torch.randint(0, 97, (2, 24))
    expected = model(idx)
    for sizes in ([24], [1] * 24, [7, 1, 1, 9, 6]):
        model.set_kv_cache(2, 32, lookahead=4)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        calls = [model(idx[:, a : a + n], torch.arange(a, a + n)) for a, n in zip(starts, sizes, strict=True)]
        torch.testing.assert_close(torch.cat(calls, dim=1), expected, rtol=1e-4, atol=1e-4)
    model.reset_kv_cache()
    model(idx[:, :10], torch.arange(10))
    model(torch.zeros(2, 3, dtype=torch.long), torch.arange(10, 13))  # a draft that turns out wrong
    assert model.can_take_back(3) and not model.can_take_back(5)
    model.take_back(3)
    torch.testing.assert_close(model(idx[:, 10:], torch.arange(10, 24)), expected[:, 10:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_state_of_constant_size_reads_text_of_any_length(recurrent):
    """Catches: a limit, or a cache, by the text's length for a mixer that has neither; a parameter lost in a file."""
    model = build(attention="recurrent", block_size=16)
    assert model.unbounded(cached=False) and model.rolls and "transformer.h.0.attn.mixer.decay" in model.state_dict()
    tokens = list(generate(model, [1, 2, 3], max_new_tokens=40))
    assert len(tokens) == 40 and model.kv_cache_bytes() == 2 * 6 * 8 * 8 * 4
    text = torch.tensor([[1, 2, 3, *tokens]])
    assert model(text)[0, 2:-1].argmax(-1).tolist() == tokens
    assert "rolling" not in describe_window(model)


@torch.no_grad()
def test_a_layer_may_hold_some_of_the_heads(tiny_model):
    """Catches: code that asks the config for a layer's heads. Two ranks hold half each; their outputs add up."""
    model = tiny_model(attention="sliding,full", sliding_window_size=5, rolling_kv_cache=True)
    idx, D = torch.randint(0, 97, (1, 20)), model.config.head_size
    expected, ranks = model(idx), []
    for rank in range(2):
        part = GPT(model.config).eval()
        part.load_state_dict(model.state_dict())
        for attn in part.layers:
            q, k, v = attn.qkv.weight.split((6 * D, 2 * D, 2 * D))
            own = [w.unflatten(0, (-1, D)).chunk(2)[rank].flatten(0, 1) for w in (q, k, v)]
            attn.qkv.weight = nn.Parameter(torch.cat(own))
            attn.proj.weight = nn.Parameter(attn.proj.weight.chunk(2, dim=1)[rank])
            attn.n_head, attn.n_query_groups = 3, 1
        ranks.append(part)
    for first, second in zip(ranks[0].layers, ranks[1].layers, strict=True):  # the sum that ranks would exchange
        own = first.forward

        def both(x: Tensor, call: Any, own: Any = own, second: Any = second) -> Tensor:
            return own(x, call) + second(x, call)

        first.forward = both
    torch.testing.assert_close(ranks[0](idx), expected, rtol=1e-4, atol=1e-4)
    for part in ranks:
        part.set_kv_cache(1, 20)
    model.set_kv_cache(1, 20)
    assert ranks[0].kv_cache_bytes() == ranks[1].kv_cache_bytes() == model.kv_cache_bytes() // 2


def test_a_block_adds_to_the_loss_in_training():
    """Catches: an auxiliary loss that is lost, counted in evaluation, or without a gradient."""

    class BalancedBlock(Block):
        def forward(self, x: Tensor, call: Any) -> Tensor:
            y = super().forward(x, call)
            call.losses.append(1e-2 * y.square().sum())
            return y

    model = build()
    model.transformer.h[1] = BalancedBlock(model.config, 1)
    randomize(model)
    idx, targets = torch.randint(0, 97, (2, 12)), torch.randint(0, 97, (2, 12))
    plain = model.eval()(idx, targets=targets)
    with_loss = model.train()(idx, targets=targets)
    assert with_loss > plain + 1e-3
    y = model.hidden_states(idx)
    torch.testing.assert_close(with_loss - plain, 1e-2 * y.square().sum(), rtol=1e-3, atol=1e-3)
    with_loss.backward()
    gradient = model.transformer.h[0].mlp.proj.weight.grad.clone()
    model.zero_grad()
    model.eval()(idx, targets=targets).backward()
    assert not torch.allclose(gradient, model.transformer.h[0].mlp.proj.weight.grad)


@pytest.mark.parametrize("norm", ["RMSNorm", "LayerNorm"])
def test_new_weights_follow_their_scheme_and_seed(norm):
    """Catches: a seed that is not used, residual projections of full size, a norm that is not the identity."""
    fields = {"n_layer": 8, "n_embd": 96, "norm_class_name": norm, "attn_bias": True, "mlp_bias": True}
    models = [GPT(tiny_config(**fields)) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        randomize(model)
        model.init_weights(seed)
    a, b, c = (dict(m.named_parameters()) for m in models)
    assert all(torch.equal(a[n], b[n]) for n in a) and not torch.equal(a["lm_head.weight"], c["lm_head.weight"])
    for name, p in a.items():
        if p.dim() == 1:
            assert (p == (1.0 if "norm" in name or "ln_f" in name else 0.0)).all() or name.endswith("bias"), name
        else:
            expected = 0.02 / 4 if name.endswith(("attn.proj.weight", "mlp.proj.weight")) else 0.02
            assert abs(p.std().item() / expected - 1) < 0.1, name
    loss = models[0](torch.randint(0, 97, (4, 32)), targets=torch.randint(0, 97, (4, 32))) / 128
    assert abs(loss.item() - torch.tensor(97.0).log().item()) < 0.1  # a new model knows nothing yet


@pytest.mark.parametrize("beside", [False, True])
def test_three_files_copied_into_another_project_work(tmp_path, beside):
    """Catches: an import of anything else of ours. Beside a script, and inside a package."""
    source = Path(__file__).resolve().parents[1] / "lit_swa"
    place = tmp_path if beside else tmp_path / "theirs"
    place.mkdir(exist_ok=True)
    for name in ("model.py", "config.py", "rope.py"):
        shutil.copy(source / name, place)
    name = "model" if beside else "theirs.model"
    program = (
        f"import sys, torch; sys.path.insert(0, {str(tmp_path)!r})\n"
        f"from {name} import GPT, Config\n"
        "fields = dict(n_layer=2, n_head=4, n_embd=32, vocab_size=50, block_size=64, sliding_window_size=5)\n"
        "for attention in ('full', 'sliding', 'streaming', 'dual_chunk'):\n"
        "    given = {k: v for k, v in fields.items() if k != 'sliding_window_size' or attention != 'dual_chunk'}\n"
        "    model = GPT(Config(attention=attention, **given)).eval()\n"
        "    idx = torch.randint(0, 50, (1, 20))\n"
        "    expected = model(idx)\n"
        "    model.set_kv_cache(1, 20)\n"
        "    steps = torch.cat([model(idx[:, i : i + 1], torch.tensor([i])) for i in range(20)], dim=1)\n"
        "    assert torch.allclose(steps, expected, atol=1e-4), attention\n"
        "ours = {'lit_swa', 'fast_attention'} & {part for m in sys.modules for part in m.split('.')}\n"
        "assert not ours, 'more was imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
