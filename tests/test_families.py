"""Each family equals transformers on a tiny random model: whole, step by step, and back through an export."""

from pathlib import Path

import pytest
import torch
from test_parity_hf import largest_error
from tiny import randomize

from lit_swa import Config
from lit_swa.checkpoint import convert_hf_checkpoint, export_hf_checkpoint, load_model

transformers = pytest.importorskip("transformers")
S, T = 6, 21  # a window, and a text that is longer
SHAPE = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CASES = {  # name: the class of transformers, the fields that are not SHAPE's
    "smollm3": ("SmolLM3", {}),
    "smollm3, windows": (
        "SmolLM3",
        {"no_rope_layers": [1, 0, 0, 1], "use_sliding_window": True, "sliding_window": S, "tie_word_embeddings": False},
    ),
}


def build_reference(case: str) -> torch.nn.Module:
    family, fields = CASES[case]
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**SHAPE | fields)
    config._attn_implementation = "eager"
    reference = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    randomize(reference)
    return reference


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_family_equals_transformers_in_cached_and_out(case: str, tmp_path: Path):
    """Catches: a wrong norm, scale, activation, RoPE, window or weight map; a field that an export loses."""
    reference, idx = build_reference(case), torch.randint(1, 97, (2, T), generator=torch.Generator().manual_seed(4))
    reference.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")  # not read here
    convert_hf_checkpoint(tmp_path / "a")
    model, expected = load_model(tmp_path / "a"), reference(idx).logits
    assert largest_error(model(idx), expected) < 1e-5
    for rolling in {False, "sliding" in model.config.layer_variants}:
        model.config.rolling_kv_cache = rolling
        model.set_kv_cache(2, T)
        cuts = [0, 9, 12, *range(13, T + 1)]
        parts = [model(idx[:, a:b], torch.arange(a, b)) for a, b in zip(cuts, cuts[1:], strict=False)]
        assert largest_error(torch.cat(parts, dim=1), expected) < 1e-5
    export_hf_checkpoint(tmp_path / "a", tmp_path / "b")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", attn_implementation="eager").eval()
    assert largest_error(back(idx).logits, expected) < 1e-5
    assert Config.from_hf(reference.config.to_dict() | {"architectures": None}).attention == model.config.attention
