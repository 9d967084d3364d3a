"""LoRA and DoRA equal PEFT's in both directions, merged and apart from the weights; what does not fit is refused."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import randomize, tiny_config
from torch import nn

from lit_swa import GPT
from lit_swa.checkpoint import (
    check_checkpoint_dir,
    convert_hf_checkpoint,
    export_hf_checkpoint,
    is_complete,
    load_config,
    load_model,
    save_checkpoint,
)
from lit_swa.formats.checkpoint import load_adapted
from lit_swa.formats.peft import save_adapter
from lit_swa.formats.peft_load import load_adapter
from lit_swa.generate import generate
from lit_swa.linear_formats import pack_for_cpu
from lit_swa.lora import LoRAConfig, add_lora, lora_linears, merge_lora

pytestmark = pytest.mark.filterwarnings(  # PEFT's, about names of the other families and about tied weights
    "ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning"
)
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "llama with biases": ("Llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "tied llama": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 8}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "gemma2": ("Gemma2", {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}),
    "gpt-neox": ("GPTNeoX", {}),
    "command r": ("Cohere", {"tie_word_embeddings": True, "pad_token_id": 0}),
    "falcon": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 80}),
    "phi": ("Phi", {}),
    "gemma": ("Gemma", {"num_key_value_heads": 2, "head_dim": 16}),
}
QKVO = ("q", "k", "v", "o")
OURS = {
    "q and v": {"targets": ("q", "v"), "r": 4},
    "all linear layers": {"targets": (*QKVO, "mlp"), "alpha": 5},
    "head": {"targets": ("v", "head")},
    "rank-stabilised": {"rslora": True, "r": 4},
    "dora": {"dora": True, "targets": ("q", "v", "o", "mlp")},
    "embed and norm": {"extra_trainable": ("embed", "norm")},
    "norm": {"extra_trainable": ("norm",), "targets": ("q",)},
    "embed beside a changed head": {"extra_trainable": ("embed",), "targets": ("q", "head")},
}
LLAMA_QV, NEOX_QV = ["q_proj", "v_proj"], ["query_key_value"]
PEFTS = {
    "q and v": (LLAMA_QV, NEOX_QV, {}),
    "all linear layers": ("all-linear", "all-linear", {}),
    "one layer": (["layers.1.mlp.up_proj"], ["layers.1.mlp.dense_h_to_4h"], {}),
    "a regular expression": (r".*\.self_attn\.(q|k)_proj", r".*\.attention\.(dense|query_key_value)", {}),
    "patterns": (
        [*LLAMA_QV, "down_proj"],
        [*NEOX_QV, "dense"],
        {"rank_pattern": {"v_proj": 2, "dense": 3}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3, "dense": 7}},
    ),
    "patterns with carets": (  # which fit whole names only
        LLAMA_QV,
        NEOX_QV,
        {
            "alpha_pattern": {
                "^q_proj": 100,
                "^query_key_value": 100,
                r"^model\.layers\.1\.self_attn\.v_proj$": 3,
                "proj": 50,
            }
        },
    ),
    "rank-stabilised": (LLAMA_QV, NEOX_QV, {"use_rslora": True}),
    "dora": ([*LLAMA_QV, "up_proj"], [*NEOX_QV, "dense"], {"use_dora": True}),
    "embeddings and norms": (LLAMA_QV, NEOX_QV, {"modules_to_save": ["embed_tokens", "embed_in", "norm"]}),
    "output layer": (LLAMA_QV, NEOX_QV, {"modules_to_save": ["lm_head"]}),
    "output layer's LoRA": ([*LLAMA_QV, "lm_head"], [*NEOX_QV, "lm_head"], {}),
}


FULL = ("llama with biases", "tied llama", "gpt-neox")  # families that run every case; the others run the first two
OURS_PAIRS = [(f, c) for f in FAMILIES for i, c in enumerate(OURS) if f in FULL or i < 2]
PEFT_PAIRS = [(f, c) for f in FAMILIES for i, c in enumerate(PEFTS) if f in FULL or i < 2]


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict:
    """family -> (a random transformers model, the directory with it and our conversion), made when asked for."""

    class Made(dict):
        def __missing__(self, family: str) -> tuple[nn.Module, Path]:
            name, fields = FAMILIES[family]
            torch.manual_seed(3)
            config = getattr(transformers, f"{name}Config")(**SHAPE | fields)
            reference = getattr(transformers, f"{name}ForCausalLM")(config).eval()
            randomize(reference)
            directory = tmp_path_factory.mktemp("base")
            reference.save_pretrained(directory)
            (directory / "tokenizer.json").write_text("{}")  # not read here
            convert_hf_checkpoint(directory)
            self[family] = reference, directory
            return self[family]

    return Made()


def shake(parameters) -> None:
    """Random numbers, so that B is not zero and what is trained in full has changed."""
    with torch.no_grad():
        for p in parameters:
            p.add_(0.2 * torch.randn_like(p))


def trainable_names(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def with_lora(directory: Path, **fields) -> tuple[GPT, LoRAConfig]:
    model, config = load_model(directory), LoRAConfig(**fields)
    add_lora(model, config)
    shake(p for p in model.parameters() if p.requires_grad)
    return model, config


def tokens(n: int = 20) -> torch.Tensor:
    return torch.randint(0, 97, (2, n), generator=torch.Generator().manual_seed(7))


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative to the logits' scale."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def peft_model(reference: nn.Module, target, **fields) -> nn.Module:
    config = peft.LoraConfig(r=4, lora_alpha=9, target_modules=target, **fields)
    model = peft.get_peft_model(copy.deepcopy(reference), config).eval()
    shake(p for p in model.parameters() if p.requires_grad)
    return model


# ----------------------------------------------------------------------------------------------- PEFT, both directions


@pytest.mark.parametrize("family, case", OURS_PAIRS)
@torch.no_grad()
def test_what_we_save_gives_peft_the_same_logits(families, family, case, tmp_path):
    """Catches: a wrong key, rank, scaling or order of rows in the file; a tied head that PEFT leaves behind."""
    reference, base = families[family]
    model, config = with_lora(base, **OURS[case])
    idx = tokens()
    expected = model(idx)
    assert error(expected, reference(idx).logits) > 0.01, "the adapter does nothing"
    save_adapter(model, tmp_path, base, config)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path).eval()
    assert error(theirs(idx).logits, expected) < 2e-5
    again = load_model(base)
    found = load_adapter(again, tmp_path)
    assert torch.equal(again(idx), expected)
    assert (found.r, found.alpha, found.rslora, found.dora) == (config.r, config.alpha, config.rslora, config.dora)
    assert set(found.targets) == set(config.targets) and set(found.extra_trainable) == set(config.extra_trainable)
    assert set(trainable_names(again)) == set(trainable_names(model))


@pytest.mark.parametrize("family, case", PEFT_PAIRS)
@torch.no_grad()
def test_what_peft_saves_gives_us_the_same_logits(families, family, case, tmp_path):
    """Catches: a pattern, a saved module or PEFT's own copy of a tied embedding that is not honoured."""
    reference, base = families[family]
    llama, neox, fields = PEFTS[case]
    theirs = peft_model(reference, neox if family in ("gpt-neox", "falcon") else llama, **fields)
    theirs.save_pretrained(tmp_path)
    model, idx = load_model(base), tokens()
    load_adapter(model, tmp_path)
    expected = theirs(idx).logits
    assert error(expected, reference(idx).logits) > 1e-3, "the adapter does nothing"
    assert error(model(idx), expected) < 2e-5
    merge_lora(model)
    assert error(model(idx), expected) < 2e-5


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [5, 97, 100]},
    ],
)
@pytest.mark.parametrize("family", ["llama", "tied llama"])
@torch.no_grad()
def test_added_tokens_are_pefts(families, family, fields, tmp_path):
    """Catches: original_module, which PEFT stores beside what was trained, refused or taken for the trained weights;
    rows that were trained alone and are left out, or reach one of two tied matrices."""
    reference, base = families[family]
    larger = copy.deepcopy(reference)
    larger.resize_token_embeddings(101, mean_resizing=False)
    theirs = peft_model(larger, LLAMA_QV, **fields)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model, idx = load_model(base), torch.cat([tokens(), torch.tensor([[97, 98], [99, 100]])], dim=1)
    load_adapter(model, tmp_path)
    assert error(model(idx), theirs(idx).logits) < 2e-5


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}])
@pytest.mark.parametrize("family", ["llama with biases", "gpt-neox"])
def test_gradients_equal_pefts(families, family, fields, tmp_path):
    """Catches: a norm of DoRA's that is not detached, a scaling applied twice, a gradient that leaks between parts."""
    reference, base = families[family]
    theirs = peft_model(reference, "all-linear", **fields)
    theirs.save_pretrained(tmp_path)
    model, idx = load_model(base), tokens()
    load_adapter(model, tmp_path)
    for logits in (theirs(idx).logits, model(idx)):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten()).backward()
    ours = {}
    for name, linear in lora_linears(model):
        for part, p in linear.lora.parts.items():
            ours[name, part] = p
    module = theirs.base_model.model
    pairs = (
        [
            ("transformer.h.1.attn.qkv", part, module.model.layers[1].self_attn.get_submodule(f"{part}_proj"))
            for part in "qkv"
        ]
        + [("transformer.h.0.mlp.proj", "all", module.model.layers[0].mlp.down_proj)]
        if family != "gpt-neox"
        else [("transformer.h.0.mlp.proj", "all", module.gpt_neox.layers[0].mlp.dense_4h_to_h)]
    )
    for name, part, layer in pairs:
        assert error(ours[name, part].A.grad, layer.lora_A["default"].weight.grad) < 1e-4
        assert error(ours[name, part].B.grad, layer.lora_B["default"].weight.grad) < 1e-4
        if "use_dora" in fields:
            theirs_m = layer.lora_magnitude_vector["default"].weight
            assert error(ours[name, part].magnitude.grad, theirs_m.grad) < 1e-4
    frozen = [p for n, p in model.named_parameters() if ".lora." not in n]
    assert all(p.grad is None for p in frozen)


# --------------------------------------------------------------------------------------------- identity, merging, modes


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("fields", [{}, {"attn_bias": True, "mlp_bias": True}, {"mlp_class_name": "PlainMLP"}])
@torch.no_grad()
def test_a_fresh_lora_changes_nothing(tiny_model, fields, dora):
    """Catches: a B that is not zero, a bias that is added twice. DoRA divides lengths: equal up to rounding."""
    model, idx = tiny_model(**fields), tokens()
    expected = model(idx)
    changed = add_lora(model, LoRAConfig(targets=(*QKVO, "mlp", "head"), dora=dora))
    per_layer = 2 + (2 if "mlp_class_name" in fields else 3)
    assert len(changed) == 2 * per_layer + 1
    assert error(model(idx), expected) < 1e-6 if dora else torch.equal(model(idx), expected)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.08)])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", [("k",), ("q", "v", "mlp"), (*QKVO, "mlp", "head")])
@torch.no_grad()
def test_merged_equals_unmerged(tiny_model, targets, dora, dtype, bound):
    """Catches: rows of the wrong part, a scale that is missed. In bfloat16 this model is 0.02 from its float32 self."""
    model, idx = tiny_model(attn_bias=True).to(dtype), tokens()
    before = model(idx)
    names = list(model.state_dict())
    n = len(add_lora(model, LoRAConfig(targets=targets, dora=dora)))
    shake(p for p in model.parameters() if p.requires_grad)
    expected = model(idx)
    assert expected.dtype == dtype and error(expected.float(), before.float()) > 0.02
    assert merge_lora(model) == n and merge_lora(model) == 0
    assert error(model(idx).float(), expected.float()) < bound
    assert list(model.state_dict()) == names and all(p.dtype == dtype for p in model.parameters())


@torch.no_grad()
def test_merging_rounds_once(tiny_model):
    """Catches: a delta that is rounded to bfloat16 before it is added."""
    model = tiny_model().bfloat16()
    add_lora(model, LoRAConfig(targets=("o",)))
    shake(p for p in model.parameters() if p.requires_grad)
    linear = model.transformer.h[0].attn.proj
    part = linear.lora.parts["all"]
    exact = linear.weight.double() + part.scaling * part.B.double() @ part.A.double()
    merge_lora(model)
    assert (linear.weight != exact.float().bfloat16()).float().mean() < 0.001  # float32 may tip a tie


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_acts_in_training_only(tiny_model, dora):
    """Catches: noise in inference, a LoRA that joins an eval model in training mode, none in training."""
    model, idx = tiny_model(), tokens()
    add_lora(model, LoRAConfig(dropout=0.5, dora=dora))
    shake(p for p in model.parameters() if p.requires_grad)
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.equal(model(idx), model(idx))
    assert torch.equal(model.eval()(idx), model(idx))


def test_doras_dropout_is_pefts(families, tmp_path):
    """Catches: a dropped input that reaches A and B only; in DoRA the base's share of the change sees it too."""
    reference, base = families["llama with biases"]
    theirs = peft_model(reference, ["o_proj"], use_dora=True, lora_dropout=0.5)
    theirs.save_pretrained(tmp_path)
    model = load_model(base)
    load_adapter(model, tmp_path)
    x = torch.randn(2, 5, 48)
    ours, layer = (
        model.transformer.h[0].attn.proj.train(),
        theirs.base_model.model.model.layers[0].self_attn.o_proj.train(),
    )
    torch.manual_seed(1)
    expected = layer(x)
    torch.manual_seed(1)
    assert error(ours(x), expected) < 1e-5


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": True}])
def test_only_what_is_asked_for_is_trained(tiny_model, fields):
    """Catches: a base weight that trains along, a norm or an embedding that does not, an untied lm_head that does."""
    model = tiny_model(norm_qk=True, **fields)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    add_lora(model, LoRAConfig(targets=("q",), extra_trainable=("embed", "norm")))
    names = {n for n in trainable_names(model) if ".lora." not in n}
    norms = {
        f"transformer.h.{i}.{n}.weight" for i in (0, 1) for n in ("norm_1", "norm_2", "attn.norm_q", "attn.norm_k")
    }
    assert names == norms | {"transformer.ln_f.weight", "transformer.wte.weight"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # at first A's gradient is zero, since B is
        optimizer.zero_grad()
        model(tokens()).logsumexp(-1).mean().backward()
        optimizer.step()
    changed = {n for n, p in model.named_parameters() if n not in before or not torch.equal(p, before[n])}
    assert changed == set(trainable_names(model))


def test_in_gpt_neox_the_output_embedding_trains(tiny_model):
    """Catches: a rule that knows Llama's names only: there the output layer is called embed_out."""
    model = tiny_model(
        mlp_class_name="PlainMLP", norm_class_name="LayerNorm", n_query_groups=6, parallel_residual=True,
        attn_bias=True, attn_proj_bias=True, mlp_bias=True, activation="gelu",
    )  # fmt: skip
    add_lora(model, LoRAConfig(extra_trainable=("embed",)))
    assert {n for n in trainable_names(model) if ".lora." not in n} == {"transformer.wte.weight", "lm_head.weight"}


@torch.no_grad()
def test_a_copy_has_a_lora_of_its_own(tiny_model):
    """Catches: a hook that holds the original's matrices."""
    model, idx = tiny_model(), tokens()
    add_lora(model, LoRAConfig())
    shake(p for p in model.parameters() if p.requires_grad)
    expected, copied = model(idx), copy.deepcopy(model)
    assert torch.equal(copied(idx), expected)
    merge_lora(copied)
    assert torch.equal(model(idx), expected) and len(lora_linears(model)) == 4


def test_autocast_and_bfloat16_train(tiny_model):
    """Catches: dtypes that do not agree in the product, and matrices that are not kept in float32."""
    for dtype in (torch.float32, torch.bfloat16):
        for dora in (False, True):
            model = tiny_model().to(dtype).train()
            add_lora(model, LoRAConfig(dora=dora, targets=("q", "v", "mlp"), dropout=0.1))
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                loss = model(tokens()).float().logsumexp(-1).mean()
            loss.backward()
            part = model.transformer.h[0].attn.qkv.lora.parts["q"]
            assert part.B.dtype == part.B.grad.dtype == torch.float32 and part.B.grad.abs().sum() > 0


@torch.no_grad()
def test_a_tied_head_can_have_a_lora(tiny_model):
    """Catches: a delta that is folded into the embedding too."""
    model, idx = tiny_model(tie_embeddings=True), tokens()
    add_lora(model, LoRAConfig(targets=("head",)))
    shake(p for p in model.parameters() if p.requires_grad)
    expected, wte = model(idx), model.transformer.wte.weight.clone()
    merge_lora(model)
    assert torch.equal(model.transformer.wte.weight, wte) and not model.config.tie_embeddings
    assert error(model(idx), expected) < 1e-5


@torch.no_grad()
def test_a_cache_and_packed_layers_keep_the_adapter(tiny_model):
    """Catches: layers that are replaced for speed and lose their LoRA."""
    model, idx = tiny_model(), tokens()
    add_lora(model, LoRAConfig(targets=("q", "v")))
    shake(p for p in model.parameters() if p.requires_grad)
    expected = model(idx)
    pack_for_cpu(model)
    model.set_kv_cache(2, 20)
    parts = [model(idx[:, i : i + 1], torch.tensor([i])) for i in range(20)]
    assert error(torch.cat(parts, dim=1), expected) < 1e-5


# ------------------------------------------------------------------------------------------------- trained directories


@pytest.mark.parametrize(
    "fields, lora",
    [
        ({}, {}),
        ({}, {"extra_trainable": ("embed", "norm"), "dora": True}),
        ({"tie_embeddings": True}, {"extra_trainable": ("embed", "norm")}),
        ({"tie_embeddings": True}, {"targets": ("q", "head"), "extra_trainable": ("embed",)}),
    ],
)
def test_a_trained_directory_loads_merges_and_exports(fields, lora, tmp_path, run_script):
    """Catches: an adapter that load_model leaves out, a merge without the embedding, the base's config."""
    base, trained, merged, exported = (tmp_path / name for name in ("base", "trained", "merged", "exported"))
    model, config = GPT(tiny_config(**fields)).eval(), LoRAConfig(**lora)
    randomize(model)
    save_checkpoint(model, model.config, base)
    (base / "tokenizer.json").write_text("{}")
    plain = load_model(base)
    model = load_model(base, rope_scaling={"type": "linear", "factor": 2.0})
    add_lora(model, config)
    shake(p for p in model.parameters() if p.requires_grad)
    save_adapter(model, trained, base, config)
    assert is_complete(trained)
    assert run_script("scripts/merge_lora.py", "--checkpoint_dir", trained, "--output_dir", merged)[0] == 0
    assert is_complete(merged)
    export_hf_checkpoint(merged, exported)
    idx = tokens()
    with torch.no_grad():
        expected = model(idx)
        assert error(plain(idx), expected) > 0.02, "the adapter does nothing"
        assert torch.equal(load_model(trained, merge=False)(idx), expected)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)(idx).logits
        for logits in (load_model(trained)(idx), load_model(merged)(idx), theirs):
            assert error(logits, expected) < 1e-5
    greedy = list(generate(model, idx[:1, :5], max_new_tokens=20))
    assert greedy != list(generate(plain, idx[:1, :5], max_new_tokens=20))
    for loaded in (load_model(trained, merge=False), load_model(trained), load_model(merged)):
        assert list(generate(loaded, idx[:1, :5], max_new_tokens=20)) == greedy
    assert load_config(merged).rope_scaling["factor"] == 2.0
    assert load_config(merged).tie_embeddings is (bool(fields) and "head" not in config.targets)


@torch.no_grad()
def test_dtypes_of_a_trained_directory(tmp_path):
    """Catches: a float32 base that is rounded before the adapter is folded in, a merged model in another dtype."""
    base, trained = tmp_path / "base", tmp_path / "trained"
    model = GPT(tiny_config())
    randomize(model)
    save_checkpoint(model, model.config, base)
    model, config = with_lora(base)
    save_adapter(model, trained, base, config)
    exact = load_model(trained)
    for p, q in zip(exact.parameters(), load_model(trained, dtype="bfloat16").parameters(), strict=True):
        assert torch.equal(p.bfloat16(), q)
    assert load_model(trained, dtype="bfloat16", merge=False).lm_head.weight.dtype == torch.bfloat16
    assert load_adapted(trained, None, torch.device("cpu")).lm_head.weight.dtype == torch.float32


def test_generate_takes_the_trained_directory(tiny_checkpoint, tmp_path, run_script):
    """Catches: a script that reads the base without the adapter."""
    model, config = with_lora(tiny_checkpoint, targets=(*QKVO, "mlp"))
    save_adapter(model, tmp_path / "trained", tiny_checkpoint, config)
    arguments = ("--prompt", "the quick brown", "--max_new_tokens", 12, "--temperature", 0, "--device", "cpu")
    code, adapted, message = run_script("generate/base.py", "--checkpoint_dir", tmp_path / "trained", *arguments)
    assert code == 0, message
    (tmp_path / "trained/run.json").write_text('{"prompt_style": "alpaca"}')
    assert run_script("scripts/merge_lora.py", "--checkpoint_dir", tmp_path / "trained")[0] == 0
    assert (tmp_path / "trained/merged/run.json").read_text() == '{"prompt_style": "alpaca"}'
    outputs = [
        run_script("generate/base.py", "--checkpoint_dir", directory, *arguments)[1]
        for directory in (tmp_path / "trained" / "merged", tiny_checkpoint)
    ]
    assert adapted == outputs[0] != outputs[1]


def test_an_adapter_that_peft_wrote_runs_where_it_is(tiny_checkpoint, tmp_path, run_script, monkeypatch):
    """Catches: an adapter that each script sends to the next one, though it names its base; a tokenizer asked for."""
    model, config = with_lora(tiny_checkpoint, targets=(*QKVO, "mlp"))
    ours, plain, base = tmp_path / "ours", tmp_path / "plain", tmp_path / "checkpoints/org/name"
    save_adapter(model, ours, tiny_checkpoint, config)
    plain.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (plain / name).write_bytes((ours / name).read_bytes())
    base.parent.mkdir(parents=True)
    base.symlink_to(tiny_checkpoint)
    monkeypatch.chdir(tmp_path)
    arguments = ("--prompt", "the quick brown", "--max_new_tokens", 8, "--temperature", 0, "--device", "cpu")
    expected = run_script("generate/base.py", "--checkpoint_dir", ours, *arguments)[1]
    for name in (str(tiny_checkpoint), "org/name", "../checkpoints/org/name", "checkpoints/org/name"):
        edit(plain / "adapter_config.json", base_model_name_or_path=name)
        assert run_script("generate/base.py", "--checkpoint_dir", plain, *arguments)[1] == expected
    for name, reason in (
        ("org/gone", "org/gone of the adapter .*plain is not here"),
        (None, "does not say which base"),
    ):
        edit(plain / "adapter_config.json", base_model_name_or_path=name)
        code, _, stderr = run_script("generate/base.py", "--checkpoint_dir", plain, *arguments)
        assert code == 2 and re.search(reason + ".*--base_checkpoint_dir", stderr) and stderr.count("\n") == 1
    given = ("--checkpoint_dir", plain, "--base_checkpoint_dir", base)
    assert run_script("generate/base.py", *given, *arguments)[1] == expected
    assert run_script("scripts/merge_lora.py", *given)[0] == 0
    assert run_script("generate/base.py", "--checkpoint_dir", plain / "merged", *arguments)[1] == expected
    code, _, stderr = run_script("scripts/convert_hf.py", "--checkpoint_dir", plain)
    assert code == 2 and "plain is an adapter: make a checkpoint of it with scripts/merge_lora.py" in stderr


@torch.no_grad()
def test_auto_peft_finds_the_base_from_anywhere(families, tmp_path, monkeypatch):
    """Catches: a base that is named by a path from where the training was started."""
    base = families["llama"][1]
    model, config = with_lora(base)
    monkeypatch.chdir(base.parent)
    save_adapter(model, tmp_path / "trained", Path(base.name), config)
    monkeypatch.chdir(tmp_path)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained("trained")
    assert error(theirs(tokens()).logits, model(tokens())) < 2e-5


def test_another_base_given_by_hand_is_said(trained, tmp_path, capsys):
    """Catches: an adapter that is merged into another base of the same shape without a word."""
    base, other = tmp_path / "base", tmp_path / "other"
    load_model(trained, base_dir=base)
    assert capsys.readouterr().err == ""
    model = load_model(base)
    randomize(model)
    save_checkpoint(model, model.config, other)
    for own in (True, False):  # PEFT's notes the place of its base alone
        load_model(trained, base_dir=other)
        assert f"the weights in {other} are not those that {trained} was trained on" in capsys.readouterr().err, own
        (trained / "lit_adapter.json").unlink(missing_ok=True)
    load_model(trained, base_dir=base)
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="is no adapter: leave base_checkpoint_dir out"):
        load_model(other, base_dir=base)


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("family", ["llama", "tied llama", "gpt-neox"])
def test_a_longlora_release_loads(families, family, prefix, tmp_path, run_script):
    """Catches: trained embeddings or norms that are left out, and a pad token that the model has no row for."""
    reference, base = families[family]
    theirs = peft_model(reference, NEOX_QV if family == "gpt-neox" else LLAMA_QV)
    theirs.save_pretrained(tmp_path)
    state = peft.get_peft_model_state_dict(theirs)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(state, tmp_path / "adapter_model.bin")
    whole = theirs.merge_and_unload()
    whole.resize_token_embeddings(98, mean_resizing=False)
    for module in {whole.get_input_embeddings(), whole.get_output_embeddings()}:
        module.weight.data[97] = module.weight.data[:97].mean(dim=0)
    trained = {n: p for n, p in whole.named_parameters() if "embed" in n or "norm" in n}
    shake(trained.values())
    torch.save({prefix + n: p.detach().clone() for n, p in trained.items()}, tmp_path / "trainable_params.bin")
    idx = tokens()
    model = load_model(base)
    config = load_adapter(model, tmp_path)
    assert model.config.padded_vocab_size == 98 and set(config.extra_trainable) == {"embed", "norm"}
    scaling = {"type": "linear", "factor": 8}
    code, _, message = run_script(
        "scripts/merge_lora.py", "--checkpoint_dir", tmp_path, "--base_checkpoint_dir", base,
        "--output_dir", tmp_path / "out", "--model.rope_scaling", json.dumps(scaling), "--model.block_size", 1024,
    )  # fmt: skip
    assert code == 0, message
    assert load_config(tmp_path / "out").rope_scaling["factor"] == 8
    with torch.no_grad():
        expected = whole(idx).logits
        assert error(model(idx), expected) < 2e-5
        assert error(load_model(tmp_path / "out", rope_scaling=None)(idx), expected) < 2e-5


# ---------------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"targets": ("q", "query")}, "'query': choose from q, k, v, o, mlp, head"),
        ({"targets": ()}, "targets is empty"),
        ({"extra_trainable": ("bias",)}, "'bias': choose from embed, norm"),
        ({"r": 0}, "r=0"),
        ({"r": 2.5}, "r=2.5"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(fields, message):
    """Catches: a typing error that trains something else."""
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**fields)


def test_a_target_without_a_layer_names_those_that_there_are(tiny_model):
    """Catches: a run that trains nothing."""
    model = tiny_model()
    for block in model.transformer.h:
        block.mlp = nn.Identity()
    with pytest.raises(ValueError, match=r"No trainable layer matches.*'mlp'.*transformer.h.N.attn.proj"):
        add_lora(model, LoRAConfig(targets=("q", "mlp")))
    assert all(p.requires_grad for p in model.parameters()) and not lora_linears(model)
    add_lora(model, LoRAConfig())
    with pytest.raises(ValueError, match="has a LoRA already"):
        add_lora(model, LoRAConfig())


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory) -> Path:
    """A directory with a trained directory and its base."""
    directory = tmp_path_factory.mktemp("trained")
    torch.manual_seed(4)
    model = GPT(tiny_config())
    randomize(model)
    save_checkpoint(model, model.config, directory / "base")
    (directory / "base" / "tokenizer.json").write_text("{}")
    model, config = with_lora(directory / "base", extra_trainable=("norm",))
    save_adapter(model, directory / "trained", directory / "base", config)
    return directory


@pytest.fixture
def trained(trained_once, tmp_path) -> Path:
    """A copy of the trained directory and its base, which may be changed."""
    shutil.copytree(trained_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "trained"


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"peft_type": "IA3"}, "type 'IA3': only LORA"),
        ({"bias": "all"}, "bias='all'"),
        ({"layer_replication": [[0, 1]]}, "layer_replication, which is not supported"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices of adapter_config.json do not fit"),
        ({"r": 9}, "rank is 9: they do not belong together"),
        ({"r": "many"}, "r='many'"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "only plain names"),
        ({"rank_pattern": [1]}, "no proper rank_pattern"),
        ({"use_dora": True}, "lacks .*lora_magnitude_vector"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]}, "lacks a LoRA for .*0.mlp.up_proj"),
        (
            {"target_modules": ["q_proj"]},
            "holds a LoRA for model.layers.0.self_attn.k_proj.* leaves out, as PEFT would",
        ),
        ({"modules_to_save": ["norm", "lm_head"]}, "lacks lm_head, which modules_to_save of adapter_config.json names"),
        ({"kasa_config": {}}, "asks for kasa_config"),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, "holds a LoRA for model.layers.1.self_attn.q_proj"),
        ({"layers_to_transform": [0]}, "holds a LoRA for model.layers.1.self_attn.q_proj"),
        *[
            (
                {"init_lora_weights": k},
                f"init_lora_weights='{k}', so the adapter belongs to a changed base: make it a plain",
            )
            for k in ("pissa", "pissa_niter_16", "OLoRA", "loftq", "corda", "lora_ga", "of 2030")
        ],
    ],
)
def test_an_adapter_config_that_is_not_supported_is_refused(trained, fields, message):
    """Catches: an adapter that is loaded as something that it is not; a stranger's regular expression that is run."""
    edit(trained / "adapter_config.json", **fields)
    model = load_model(trained.parent / "base")
    with pytest.raises(ValueError, match=message):
        load_adapter(model, trained)
    assert not lora_linears(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_layer": 1}, "'base_model.model.model.layers.1.*no place for"),
        ({"n_layer": 3}, "lacks a LoRA for model.layers.2"),
        ({"n_embd": 36}, "made for another model"),
        ({"n_query_groups": 3}, "made for another model"),
        ({"mlp_class_name": "PlainMLP", "n_query_groups": 6}, "no place for"),
    ],
)
def test_an_adapter_of_another_model_is_refused(trained, tiny_model, fields, message):
    """Catches: an adapter that is applied in part."""
    model = tiny_model(**fields)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, trained)
    assert not lora_linears(model)


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.lora_B", "transformer.ln_f.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_diverged_is_refused(trained, name, value):
    """Catches: a checkpoint of NaN, merged without a word."""
    file = trained / "adapter_model.safetensors"
    tensors = load_file(file)
    stored = next(n for n in tensors if name.replace("transformer.ln_f", "model.norm") in n)
    tensors[stored].view(-1)[3] = value
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"adapter_model.safetensors holds NaN or infinity in {name}: its training"):
        load_model(trained)


def test_a_merge_beyond_the_dtype_is_refused(tiny_model):
    """Catches: a finite adapter whose product is infinite in the base's float16."""
    model = tiny_model().half()
    add_lora(model, LoRAConfig(alpha=10**9))
    shake(p for p in model.parameters() if p.requires_grad)
    with pytest.raises(
        ValueError, match="transformer.h.0.attn.qkv with its LoRA is beyond what float16 holds: merge in"
    ):
        merge_lora(model)


def test_a_merge_is_refused_in_a_dtype_that_does_not_hold_it(trained):
    """Catches: a merge in the base's float32, cast to float16 afterwards and written with infinities."""
    file = trained / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: t * 1e4 if ".lora_" in name else t for name, t in tensors.items()}, file)
    assert all(p.isfinite().all() for p in load_model(trained).parameters())
    with pytest.raises(ValueError, match=r"transformer.h.0.attn.qkv is beyond what float16 holds: merge in"):
        load_model(trained, torch.float16)


class Code:
    def __reduce__(self):
        return print, ("run",)


def test_damaged_and_missing_files_are_refused(trained, tmp_path, run_script):
    """Catches: a pickle that runs, a truncated file, a base that is gone or another one, a merge that half happens."""
    file, base = trained / "adapter_model.safetensors", tmp_path / "base"
    model, config = with_lora(base)
    with pytest.raises(ValueError, match="holds a checkpoint already"):
        save_adapter(model, base, base, config)

    def merge_fails(message: str) -> None:
        code, _, stderr = run_script("scripts/merge_lora.py", "--checkpoint_dir", trained)
        assert code == 2 and message in stderr and stderr.count("\n") == 1
        assert not (trained / "merged").exists()

    data = file.read_bytes()
    file.write_bytes(data[:-5])
    merge_fails("truncated")
    file.unlink()
    merge_fails("adapter_model.safetensors are missing")
    assert not is_complete(trained)
    torch.save({"base_model.model.lm_head.lora_A.weight": Code()}, trained / "adapter_model.bin")
    merge_fails("holds code")
    (trained / "adapter_model.bin").unlink()
    file.write_bytes(data)
    with pytest.raises(ValueError, match="is an adapter.*merge_lora"):
        export_hf_checkpoint(trained, tmp_path / "exported")
    code, _, stderr = run_script("scripts/merge_lora.py", "--checkpoint_dir", trained, "--output_dir", base)
    assert code == 2 and "choose another output_dir" in stderr
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"base checkpoint .*base.* is missing: move it back, or write"):
        check_checkpoint_dir(trained)
    merge_fails("is missing")
    (tmp_path / "elsewhere").rename(base)
    other = load_model(base)
    randomize(other)
    save_checkpoint(other, other.config, base)
    merge_fails("are not those that")
    edit(trained / "lit_adapter.json", base_checkpoint_dir=".", base_identity=None)
    merge_fails("is an adapter itself")


@torch.no_grad()
def test_peft_refuses_an_adapter_whose_layers_transformers_joins(tmp_path):
    """Catches: half of an adapter in PEFT: o_proj has its name in Phi 3, and q, k and v are rows of one layer."""
    torch.manual_seed(3)
    reference = transformers.Phi3ForCausalLM(transformers.Phi3Config(**SHAPE, num_key_value_heads=2, pad_token_id=0))
    randomize(reference.eval())
    reference.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")  # not read here
    convert_hf_checkpoint(tmp_path / "base")
    model, config = with_lora(tmp_path / "base", targets=("q", "o", "mlp"))
    save_adapter(model, tmp_path / "adapter", tmp_path / "base", config)
    again = load_model(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(tokens()), model(tokens()))
    with pytest.raises(ValueError, match="joined in transformers: merge the adapter"):
        peft.PeftModel.from_pretrained(reference, tmp_path / "adapter")
