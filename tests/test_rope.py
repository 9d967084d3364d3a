"""RoPE's scalings: equal to transformers' for the same config, the identity for a factor of 1, right with caches."""

import math
from fractions import Fraction

import pytest
import torch
import transformers
from tiny import randomize, tiny_config

from lit_swa import GPT, Config
from lit_swa.checkpoint import convert_hf_checkpoint, load_model
from lit_swa.fast_attention import Rotation
from lit_swa.formats.hf_export import config_to_hf
from lit_swa.rope import ROPE_SCALINGS, RoPE, apply_rope, rope_attention_factor, rope_frequencies

TRAINED = 32
SCALINGS = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": TRAINED},
    "yarn, its temperature given": {
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "attention_factor": 1.5,
        "beta_fast": 8,
        "beta_slow": 2,
        "truncate": False,
    },
    "yarn, two scales": {
        "factor": 4.0,
        "original_max_position_embeddings": TRAINED,
        "mscale": 0.9,
        "mscale_all_dim": 0.4,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": TRAINED,
    },
    "longrope": {
        "short_factor": [1.0, 1.1, 1.3, 1.7, 1.8, 1.9, 2.0, 2.1],
        "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
        "original_max_position_embeddings": TRAINED,
        "factor": 8.0,
    },
    "longrope, its factor from the lengths": {
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": TRAINED,
    },
}
YARN = {"type": "yarn"} | SCALINGS["yarn"]
GROWING = [name for name in SCALINGS if name.startswith(("dynamic", "longrope"))]


def build_pair(name: str, tmp_path, n_layer: int = 2):
    """A random Llama in transformers, and the same through files here."""
    rope = {"rope_type": name.split(",")[0], "rope_theta": 10000.0} | SCALINGS[name]
    context = TRAINED if name == "dynamic" else 4 * TRAINED
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=n_layer,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            rope_parameters=rope,
        )  # fmt: skip
    ).eval()
    randomize(reference)
    reference.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")  # not read here
    convert_hf_checkpoint(tmp_path)
    return reference, load_model(tmp_path)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("name", SCALINGS)
@torch.no_grad()
def test_logits_equal_transformers_below_and_beyond_the_trained_length(name, tmp_path):
    """Catches: a ramp by another variable, a missing temperature, a trained length that is read from the wrong key."""
    reference, model = build_pair(name, tmp_path)
    for T in (TRAINED - 1, TRAINED, TRAINED + 1, 3 * TRAINED):
        idx = torch.randint(0, 97, (2, T))
        expected = reference(idx).logits
        assert_close(model(idx), expected)
        model.set_kv_cache(2, T)
        assert_close(model(idx, torch.arange(T)), expected)
        if name not in GROWING:
            parts = [model(idx[:, i : i + 5], torch.arange(i, min(i + 5, T))) for i in range(0, T, 5)]
            assert_close(torch.cat(parts, dim=1), expected)


@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize("name", GROWING)
@torch.no_grad()
def test_scalings_by_length_turn_cached_keys_anew(name, rolling, tmp_path):
    """Catches: keys cached after RoPE, which stay rotated by the length that the text had then.

    With one layer the keys come from the embeddings, so a step must equal the last row of the text read anew.
    """
    reference, model = build_pair(name, tmp_path, n_layer=1)
    T, idx = 2 * TRAINED, torch.randint(0, 97, (1, 2 * TRAINED))
    if rolling:  # the window is wider than the text
        window = {"attention": "sliding", "sliding_window_size": T, "rolling_kv_cache": True}
        other = GPT(model.config.override(**window)).eval()
        other.load_state_dict(model.state_dict())
        model = other
    model.set_kv_cache(1, T)
    for start, stop in [(0, 9), (9, 10), (10, TRAINED - 1), (TRAINED - 1, TRAINED + 1), (TRAINED + 1, TRAINED + 2)]:
        got = model(idx[:, start:stop], torch.arange(start, stop))
        assert_close(got[:, -1], reference(idx[:, :stop]).logits[:, -1])
    model.fixed_shape_steps = True
    got = model(idx[:, stop : stop + 1], torch.tensor([stop]))
    assert_close(got[:, -1], reference(idx[:, : stop + 1]).logits[:, -1])


@torch.no_grad()
def test_rows_of_a_batch_have_lengths_of_their_own(tmp_path):
    """Catches: a row that is scaled because another row is long."""
    _, model = build_pair("dynamic", tmp_path, n_layer=1)
    idx, lengths = torch.randint(0, 97, (2, 60)), [60, 9]
    model.set_kv_cache(2, 60)
    got = model(idx, torch.arange(60) - (60 - torch.tensor(lengths))[:, None])
    for row, n in enumerate(lengths):
        assert_close(got[row, -n:], model(idx[row : row + 1, -n:])[0])


def test_ntk_is_transformers_dynamic_scaling_at_its_length(tmp_path):
    """Catches: another exponent. Dynamic scaling by 1 at a length of s times the trained one is NTK by s."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0}
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=TRAINED, rope_parameters=rope
    )
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=5 * TRAINED)
    ours = rope_frequencies(tiny_config(head_size=16, rope_scaling={"type": "ntk", "factor": 5.0}))[0]
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ROPE_SCALINGS)
def test_a_factor_of_1_is_the_identity(kind):
    """Catches: a scaling that changes a model. Dynamic scaling is by definition one only up to the trained length."""
    extra = {
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 1.0},
        "longrope": {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
    }
    scaled = tiny_config(rope_scaling={"type": kind} | extra.get(kind, {"factor": 1.0}))
    pos, length = torch.arange(256)[None], torch.tensor([[256]])
    for ours, plain in zip(RoPE(scaled)(pos, 0, length if kind in ("dynamic", "longrope") else None),
                           RoPE(tiny_config())(pos), strict=True):  # fmt: skip
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert rope_attention_factor(scaled.rope_scaling) == 1.0


def test_linear_divides_every_frequency_and_ntk_only_the_low_ones():
    """Catches: a factor applied the wrong way round."""
    plain = rope_frequencies(tiny_config())
    linear, ntk = (rope_frequencies(tiny_config(rope_scaling={"type": t, "factor": 4.0})) for t in ("linear", "ntk"))
    assert torch.allclose(linear, plain / 4)
    assert ntk[0, 0] == plain[0, 0] and math.isclose(ntk[0, -1], plain[0, -1] / 4, rel_tol=1e-6)


@pytest.mark.parametrize("name", SCALINGS)
def test_scalings_survive_the_way_to_hugging_face_and_back(name, tmp_path):
    """Catches: an exported config.json that lost a scaling's option or its trained length."""
    _, model = build_pair(name, tmp_path)
    back = Config.from_hf(config_to_hf(model.config))
    assert (back.rope_scaling, back.block_size) == (model.config.rope_scaling, model.config.block_size)


def test_ntk_cannot_be_exported():
    """Catches: a config.json that transformers would read as another scaling."""
    with pytest.raises(ValueError, match="rope_scaling"):
        config_to_hf(tiny_config(rope_scaling={"type": "ntk", "factor": 2.0}))


@pytest.mark.parametrize(
    "scaling, message",
    [
        ({"type": "yarn"}, "needs factor"),
        ({"type": "ntk", "factor": 2.0, "beta_fast": 3}, "has no beta_fast: it takes factor"),
        ({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4}, "must have one for each"),
        ({"type": "longrope", "short_factor": 1.0, "long_factor": [1.0] * 4}, "a list of numbers"),
        ({"rope_type": "linear", "factor": 2.0}, "needs a type, one of linear"),
        ({"type": "dynamic", "factor": math.nan}, "positive number"),
        ({"type": "su"}, "none of linear, ntk, dynamic, yarn, llama3, longrope"),
    ],
)
def test_scalings_that_do_not_fit_are_refused_in_one_sentence(scaling, message):
    """Catches: an option that is accepted and not used, or lists of another head size."""
    with pytest.raises(ValueError, match=message):
        tiny_config(rope_scaling=scaling)


@torch.no_grad()
def test_a_local_base_knows_no_scaling(tiny_model):
    """Catches: a scaling by length that reaches the layers with a window, whose base is their own."""
    fields = {"attention": "sliding", "sliding_window_size": 9, "rope_local_base_freq": 500.0}
    scaling = {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 16}
    plain, idx = tiny_model(**fields), torch.randint(0, 97, (1, 60))
    scaled = GPT(tiny_config(**fields, rope_scaling=scaling)).eval()
    scaled.load_state_dict(plain.state_dict())
    assert torch.equal(scaled(idx), plain(idx))


@pytest.mark.parametrize("start", [0, 10_000_000, 2**31 - 50])
def test_angles_are_exact_at_any_position(start):
    """Catches: positions rounded to float32, which are off by an angle of 0.06 at a million and all alike at 2^24."""
    config = tiny_config(head_size=16, rope_local_base_freq=1e6)
    pos = torch.arange(start, start + 40)
    for base, theta in enumerate((config.rope_base, config.rope_local_base_freq)):
        cos, sin = RoPE(config)(pos[None], base)
        f = [Fraction(float(x)) for x in 1.0 / theta ** (torch.arange(0, 16, 2, dtype=torch.float32) / 16)]
        turn = Fraction("6.283185307179586476925286766559005768394338798750")
        exact = torch.tensor([[float(int(p) * x % turn) for x in f] for p in pos], dtype=torch.float64)
        assert (cos[0, 0, :, :8] - exact.cos()).abs().max() < 1e-6
        assert (sin[0, 0, :, 8:] - exact.sin()).abs().max() < 1e-6


@pytest.mark.parametrize("fields", [{}, {"rope_scaling": YARN}, {"attention": "streaming"}])
@torch.no_grad()
def test_a_text_reads_the_same_from_any_position_on(fields, tiny_model):
    """Catches: a window that lets a text go on for ever while its angles lose their last digits."""
    window = {"attention": "sliding", "sliding_window_size": 6, "rolling_kv_cache": True, "block_size": 2**31}
    model, idx = tiny_model(**window | fields), torch.randint(0, 97, (1, 30))
    near, far = 100, 1_000_000_007  # beyond the sinks, which are seen from a place in the cache
    seen = []
    for start in (near, far):
        model.set_kv_cache(1, 64)
        parts = [model(idx[:, :17], torch.arange(start, start + 17))]
        parts += [model(idx[:, i : i + 1], torch.tensor([start + i])) for i in range(17, 30)]
        seen.append(torch.cat(parts, dim=1))
    assert_close(seen[1], seen[0])


@pytest.mark.parametrize("percentage", [1.0, 0.5], ids=["whole heads", "halves of heads"])
def test_a_rotation_of_a_long_text_has_the_gradient_of_its_steps(percentage):
    """Catches: a gradient rotated the same way, or with the sign of one half; one that lies in memory as none came."""
    config = tiny_config(
        rotary_percentage=percentage,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED},
    )
    cos, sin = (x.double() for x in RoPE(config)(torch.arange(5, 25)[None]))
    x = torch.randn(1, 20, 6, config.head_size, dtype=torch.float64, requires_grad=True)  # a token's heads side by side
    grad = torch.randn_like(x).transpose(1, 2)
    expected, found = (rotate(x.transpose(1, 2), cos, sin) for rotate in (apply_rope, Rotation.apply))
    assert torch.equal(found, expected)
    (wanted,), (got,) = (torch.autograd.grad(y, x, grad) for y in (expected, found))
    torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-14)
    assert got.is_contiguous() or percentage < 1  # parts of heads are joined by torch.cat, which chooses for itself
