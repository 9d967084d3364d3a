"""Layers with different numbers of heads: as transformers computes them, cached or not, under LoRA; refusals."""

import copy

import pytest
import torch

from lit_swa import GPT, Config, cpu_decode
from lit_swa.checkpoint import load_model, save_checkpoint
from lit_swa.formats.files import as_lazy
from lit_swa.formats.hf_export import config_to_hf
from lit_swa.formats.hugging_face import to_hf, to_lit
from lit_swa.lora import LoRAConfig, add_lora, merge_lora
from lit_swa.training.blocks import Block

HEADS, GROUPS = (6, 4, 2, 3), (2, 4, 1, 3)
FIELDS = {"n_layer": 4, "n_head": 6, "n_query_groups": 4, "layer_heads": "6,4,2,3", "layer_query_groups": "2,4,1,3"}
IDS = torch.randint(0, 97, (2, 23), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
@torch.no_grad()
def test_logits_are_those_of_transformers_with_layers_of_these_heads(kind):
    """Catches: rows of qkv that are cut by another layer's heads, a cache of another layer's shape, weights that are
    joined or written out by the model's heads."""
    transformers = pytest.importorskip("transformers")
    modeling = getattr(transformers.models, kind.lower())
    modeling = getattr(modeling, f"modeling_{kind.lower()}")
    shape = {
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 8,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "attn_implementation": "eager", "tie_word_embeddings": False,
    } | ({"sliding_window": 5} if kind == "Mistral" else {})  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**shape)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for i, layer in enumerate(theirs.model.layers):
        own = copy.deepcopy(config)
        own.num_attention_heads, own.num_key_value_heads = HEADS[i], GROUPS[i]
        layer.self_attn = getattr(modeling, f"{kind}Attention")(own, i)
    for p in theirs.parameters():
        p.normal_(0, 0.2) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    model = GPT(Config.from_hf(config.to_dict(), **FIELDS, rolling_kv_cache=kind == "Mistral")).eval()
    source = {name: as_lazy(t) for name, t in theirs.state_dict().items()}
    tensors = to_lit(source, model.config, "it", f"{kind}ForCausalLM")
    model.load_state_dict({name: t.load() for name, t in tensors.items()})
    expected = theirs(IDS).logits
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-4)
    model.set_kv_cache(2, 23)
    pieces = [model(IDS[:, a:b], torch.arange(a, b)) for a, b in ((0, 9), (9, 10), (10, 11), (11, 18), (18, 23))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-4, atol=1e-4)
    assert [c.k.size(1) for c in model.caches] == list(GROUPS)
    back = to_hf(tensors, model.config, f"{kind}ForCausalLM")
    assert back.keys() == source.keys() and all(torch.equal(back[n].load(), source[n].load()) for n in source)


@torch.no_grad()
def test_a_lora_and_a_file_know_each_layers_heads(tiny_model, tmp_path):
    """Catches: a part of LoRA on rows of other heads; a config that forgets them when it is saved."""
    model = tiny_model(**FIELDS)
    expected = model(IDS)
    add_lora(model, LoRAConfig(r=2, targets=("q", "v")))
    for i, attn in enumerate(model.layers):
        parts = attn.qkv.lora.parts
        assert (parts["q"].start, parts["q"].stop) == (0, HEADS[i] * 8)
        assert (parts["v"].start, parts["v"].stop) == ((HEADS[i] + GROUPS[i]) * 8, (HEADS[i] + 2 * GROUPS[i]) * 8)
        parts["v"].B.normal_(0, 0.1)
    changed = model(IDS)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), changed, rtol=1e-4, atol=1e-4)
    assert (changed - expected).abs().max() > 0.1
    save_checkpoint(model, model.config, tmp_path)
    torch.testing.assert_close(load_model(tmp_path)(IDS), changed, rtol=1e-4, atol=1e-4)
    alone = Block(1, 2, "", "full", model.config.to_dict()).part_of(["full", "full"])  # the layers 2 and 3
    each = [alone.of_layer(i) for i in range(2)]
    assert [(own.n_head, own.n_query_groups) for own in (alone, *each)] == [(3, 3), (2, 1), (3, 3)]


def test_heads_that_do_not_fit_say_so(tiny_model):
    """Catches: a query head without a key head, a list that is not used, a model that a file cannot say."""
    for fields, words in (
        ({"layer_heads": "6,4", "n_query_groups": 3}, "n_query_groups=3 does not divide n_head=4"),
        ({"layer_heads": "4,2"}, "n_head=6 is not the largest of layer_heads='4,2': set it to 4"),
        ({"layer_query_groups": "2,x"}, "layer_query_groups='2,x' does not fit: give numbers of heads"),
        ({"layer_query_groups": "0"}, "layer_query_groups='0' does not fit"),
        ({"layer_windows": "4,x", "attention": "sliding", "sliding_window_size": 4}, "give numbers of tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            tiny_model(**fields)
    model = tiny_model(**FIELDS)
    with pytest.raises(ValueError, match="differs in"):
        config_to_hf(model.config)
    with pytest.raises(cpu_decode.Unknown, match="different numbers of heads"):
        cpu_decode.Description(model)
    llama = {"architectures": ["LlamaForCausalLM"], "vocab_size": 97}
    for key, value in (("per_layer_config", {"1": {"num_key_value_heads": 1}}), ("num_attention_heads_per_layer", [2])):
        with pytest.raises(ValueError, match=f"has {key}="):
            Config.from_hf(llama | {key: value})
